"""Verifying a checkpoint's best_val_loss on data: agreement, disagreement, and what the loss cannot tell."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hugging_nano_gpt import DataError, NanoGPTLMHeadModel, read_checkpoint, verify_loss

from ..conftest import save
from ..helpers.tiny import FIXTURES_DIR, MODEL_ARGS
from ..helpers.trace import TRACE_DIR
from .test_verify import find_wrong

CKPT_PATH = TRACE_DIR / "ckpt_200.pt"  # train.py evaluated it on 5 batches of 8 windows
BLOCK_SIZE = MODEL_ARGS["block_size"]


@pytest.fixture
def constant_dir(tmp_path) -> Path:
    """Data of one token over and over: every window has the same loss, so that nothing spreads."""
    for split in ("train", "val"):
        np.full(200, 7, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    return tmp_path


def save_evaluated(contents, tmp_path: Path, activation_function: str = "gelu", offset: float = 0.0) -> Path:
    """Writes a checkpoint with the loss that its model has on constant_dir, or another by an offset."""
    contents["config"] |= {"batch_size": 4, "eval_iters": 3}
    generator = torch.Generator().manual_seed(3)  # wide, so that the GELU makes a difference of 2e-5
    contents["model"]["transformer.h.1.mlp.c_proj.weight"] = 5 * torch.randn(32, 128, generator=generator)
    path = save(contents, tmp_path)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(path, activation_function=activation_function)
    tokens = torch.full((1, BLOCK_SIZE), 7)
    with torch.no_grad():
        contents["best_val_loss"] = model(tokens, shift_labels=tokens, use_cache=False).loss + offset
    return save(contents, tmp_path)


def test_recorded_loss_of_a_real_run_agrees():
    report = verify_loss(CKPT_PATH, TRACE_DIR)
    (check,) = report.checks
    assert (report.is_equal, check.name) == (True, "val loss")
    best = read_checkpoint(CKPT_PATH).training_state.best_val_loss
    assert f" over 40 windows with gelu; best_val_loss {best:.4f} agrees: " in check.detail
    assert check.largest_difference <= check.tolerance < 0.15
    assert check.detail.endswith(f"at most {check.tolerance:.4f} accepted (3 standard errors of both)")
    assert report.notes[0].startswith("val loss ")
    assert report.notes[0].endswith("is too little to tell which the model was trained with")
    assert report.notes[1].startswith("train loss 1.9")


def test_estimate_is_seeded():
    assert verify_loss(CKPT_PATH, TRACE_DIR) == verify_loss(CKPT_PATH, TRACE_DIR)


def test_another_checkpoint_of_the_run_does_not_agree(tmp_path):
    """The loss after 100 updates is 0.19 higher: enough to be told from that after 200."""
    checkpoint = torch.load(TRACE_DIR / "ckpt_100.pt", weights_only=True)
    checkpoint["best_val_loss"] = torch.tensor(read_checkpoint(CKPT_PATH).training_state.best_val_loss)
    wrong = find_wrong(verify_loss(save(checkpoint, tmp_path), TRACE_DIR))
    assert "does not agree: 0.1" in wrong["val loss"]


def test_fewer_batches_are_compared_with_more_tolerance():
    full, few = (verify_loss(CKPT_PATH, TRACE_DIR, eval_iters=n).checks[0] for n in (None, 2))
    assert "over 16 windows" in few.detail
    assert few.tolerance > full.tolerance


def test_progress_is_told_for_each_part():
    lines = []
    verify_loss(CKPT_PATH, TRACE_DIR, eval_iters=2, progress=lines.append)
    sizes = "2 batches of 8 windows"
    assert lines == [f"val.bin, gelu: {sizes}", f"val.bin, gelu_new: {sizes}", f"train.bin, gelu: {sizes}"]


@pytest.mark.parametrize("offset", [0.01, -0.01])
def test_other_loss_is_found(contents, constant_dir, offset):
    report = verify_loss(save_evaluated(contents, constant_dir, offset=offset), constant_dir)
    assert "does not agree: 0.0100 apart" in find_wrong(report)["val loss"]
    assert "neither fits" in report.notes[0]


def test_the_activation_that_fits_is_named_where_the_loss_can_tell(contents, constant_dir):
    path = save_evaluated(contents, constant_dir, "gelu_new")
    report = verify_loss(path, constant_dir)
    assert "val loss" in find_wrong(report)
    assert report.notes[0].endswith("only gelu_new fits, so activation_function='gelu_new' is right")
    assert verify_loss(path, constant_dir, activation_function="gelu_new").is_equal
    report = verify_loss(save_evaluated(contents, constant_dir), constant_dir)
    assert report.is_equal
    assert report.notes[0].endswith("only gelu fits, so activation_function='gelu' is right")


def test_only_one_activation_is_tried_where_the_file_tells_it(tmp_path):
    path = FIXTURES_DIR / "nanogpt-2023-01-14-43b37fd5" / "ckpt.pt"
    model_args = read_checkpoint(path).model_args
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, model_args["vocab_size"], 500, dtype=np.uint16).tofile(
            tmp_path / f"{split}.bin"
        )
    report = verify_loss(path, tmp_path, eval_iters=2)
    assert "with gelu_new" in report.notes[0]
    assert not any("fit" in note for note in report.notes)


def test_without_a_recorded_loss_nothing_is_proved(contents, constant_dir):
    contents["best_val_loss"] = 1e9  # as before the first evaluation
    report = verify_loss(save(contents, constant_dir), constant_dir, eval_iters=2)
    assert (report.is_equal, report.checks) == (False, ())
    assert "but no best_val_loss is recorded" in report.notes[0]
    assert str(report).endswith("NOT PROVED: there was nothing to compare with.")


def test_saved_folder_records_the_loss_too(contents, constant_dir):
    NanoGPTLMHeadModel.from_nanogpt_ckpt(save_evaluated(contents, constant_dir)).save_pretrained(
        constant_dir / "saved"
    )
    assert verify_loss(constant_dir / "saved", constant_dir, eval_iters=2).is_equal
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(save_evaluated(contents, constant_dir, offset=0.01))
    model.save_pretrained(constant_dir / "other")
    assert not verify_loss(constant_dir / "other", constant_dir, eval_iters=2).is_equal


def test_data_that_do_not_fit_are_refused(contents, constant_dir):
    path = save_evaluated(contents, constant_dir)
    np.full(200, 65, dtype=np.uint16).tofile(constant_dir / "val.bin")
    message = r"val\.bin: does not fit the model: expected token ids below vocab_size=65, got 65; give the data"
    with pytest.raises(DataError, match=message):
        verify_loss(path, constant_dir)
    (constant_dir / "val.bin").unlink()
    with pytest.raises(DataError, match=r"val\.bin: cannot be opened: No such file"):
        verify_loss(path, constant_dir)


def test_val_bin_alone_is_enough(tmp_path):
    (tmp_path / "val.bin").symlink_to(TRACE_DIR / "val.bin")
    report = verify_loss(CKPT_PATH, tmp_path, eval_iters=2)
    assert report.checks == verify_loss(CKPT_PATH, TRACE_DIR, eval_iters=2).checks
    assert report.notes[1] == f"there is no {tmp_path / 'train.bin'}, which is not compared"


def test_train_bin_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "val.bin").symlink_to(TRACE_DIR / "val.bin")
    (tmp_path / "train.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"train\.bin: expected uint16 tokens, got an odd number of bytes"):
        verify_loss(CKPT_PATH, tmp_path, eval_iters=2)
