"""evaluate on a run's val.bin: the recorded best_val_loss is found again, or it is reported why not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hugging_nano_gpt import DataError, NanoGPTLMHeadModel, evaluate_loss, read_checkpoint

from ..helpers.contents import save
from ..helpers.folders import DOCS_DIR
from ..helpers.programs import run_command
from ..helpers.tiny import MODEL_ARGS
from ..helpers.trace import TRACE_DIR

DOCS = (DOCS_DIR / "evaluating.md").read_text()
CKPT_PATH = TRACE_DIR / "ckpt_200.pt"  # train.py evaluated it on 5 batches of 8 windows
BLOCK_SIZE = MODEL_ARGS["block_size"]


@pytest.fixture
def constant_dir(tmp_path) -> Path:
    """A folder whose val.bin repeats one token: all windows have the same loss, so the standard error is 0."""
    np.full(200, 7, dtype=np.uint16).tofile(tmp_path / "val.bin")
    return tmp_path


def save_evaluated(contents, tmp_path: Path, activation_function: str = "gelu", offset: float = 0.0) -> Path:
    """Writes a checkpoint with the loss that its model has on constant_dir, plus an offset."""
    contents["config"] |= {"batch_size": 4, "eval_iters": 3}
    generator = torch.Generator().manual_seed(3)  # large weights, so that the other GELU changes the loss by 2e-5
    contents["model"]["transformer.h.1.mlp.c_proj.weight"] = 5 * torch.randn(32, 128, generator=generator)
    path = save(contents, tmp_path)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(path, activation_function=activation_function)
    tokens = torch.full((1, BLOCK_SIZE), 7)
    with torch.no_grad():
        contents["best_val_loss"] = model(tokens, shift_labels=tokens, use_cache=False).loss + offset
    return save(contents, tmp_path)


def test_estimate_is_seeded_agrees_and_is_that_of_the_docs():
    first, second = (evaluate_loss(CKPT_PATH, TRACE_DIR) for _ in range(2))
    assert first.estimate == second.estimate
    assert first.matches_recorded
    (line,) = (line for line in str(first).splitlines() if line.startswith("estimate"))
    assert f"{line}\n" in DOCS


def test_another_checkpoint_of_the_run_does_not_agree(tmp_path):
    """The loss after 100 updates is 0.19 higher than after 200, which is more than the tolerance."""
    checkpoint = torch.load(TRACE_DIR / "ckpt_100.pt", weights_only=True)
    checkpoint["best_val_loss"] = torch.tensor(read_checkpoint(CKPT_PATH).training_state.best_val_loss)
    evaluation = evaluate_loss(save(checkpoint, tmp_path), TRACE_DIR)
    assert evaluation.matches_recorded is False
    assert "does not agree: 0.1" in str(evaluation)


def test_fewer_batches_are_compared_with_more_tolerance():
    full, few = (evaluate_loss(CKPT_PATH, TRACE_DIR, eval_iters=n).to_json()["estimate"] for n in (None, 2))
    assert few["n_windows"] == 16
    assert few["tolerance"] > full["tolerance"]
    assert full["tolerance"] < 0.15


@pytest.mark.parametrize("offset", [0.01, -0.01])
def test_other_loss_is_found(contents, constant_dir, offset):
    evaluation = evaluate_loss(save_evaluated(contents, constant_dir, offset=offset), constant_dir)
    assert evaluation.matches_recorded is False
    assert "does not agree: 0.0100 apart" in str(evaluation)


@pytest.mark.parametrize(("trained_with", "other"), [("gelu", "gelu_new"), ("gelu_new", "gelu")])
def test_the_other_activation_does_not_agree_where_the_loss_can_tell(contents, constant_dir, trained_with, other):
    path = save_evaluated(contents, constant_dir, trained_with)
    assert evaluate_loss(path, constant_dir, activation_function=trained_with).matches_recorded
    assert evaluate_loss(path, constant_dir, activation_function=other).matches_recorded is False


def test_saved_folder_records_the_loss_too(contents, constant_dir):
    for name, offset in (("saved", 0.0), ("other", 0.01)):
        model = NanoGPTLMHeadModel.from_nanogpt_ckpt(save_evaluated(contents, constant_dir, offset=offset))
        model.save_pretrained(constant_dir / name)
        assert evaluate_loss(constant_dir / name, constant_dir, eval_iters=2).matches_recorded == (offset == 0.0)


def test_missing_data_are_refused(contents, tmp_path):
    with pytest.raises(DataError, match=r"val\.bin: cannot be opened: No such file"):
        evaluate_loss(save(contents, tmp_path), tmp_path)


def test_expect_recorded_exits_with_0_only_if_the_loss_agrees(contents, constant_dir):
    path = save_evaluated(contents, constant_dir)
    result = run_command("evaluate", path, constant_dir, "--expect-recorded")
    assert result == (0, f"{evaluate_loss(path, constant_dir)}\n", "")
    path = save_evaluated(contents, constant_dir, offset=0.01)
    code, out, _ = run_command("evaluate", path, constant_dir / "val.bin", "--expect-recorded")
    assert (code, "does not agree" in out) == (1, True)
    assert run_command("evaluate", path, constant_dir).returncode == 0


def test_without_a_recorded_loss_nothing_is_compared(contents, constant_dir):
    contents["best_val_loss"] = 1e9  # as before the first evaluation
    path = save(contents, constant_dir)
    assert evaluate_loss(path, constant_dir).matches_recorded is None
    code, out, _ = run_command("evaluate", path, constant_dir, "--expect-recorded")
    assert code == 1
    assert "note: the estimate is not compared, because no best_val_loss is recorded\n" in out


def test_expect_recorded_is_refused_for_other_files():
    code, out, err = run_command("evaluate", CKPT_PATH, "text.txt", "--expect-recorded")
    assert (code, out) == (2, "")
    assert "--expect-recorded only with val.bin" in err
