"""run_training and its command: ckpt.pt has the same contents as that of an independent run in train.py's order."""

import contextlib
import json
import re

import pytest
import torch

from hugging_nano_gpt import ConversionError, NanoGPTLMHeadModel, TokenizerError, read_checkpoint
from hugging_nano_gpt.training.callbacks import TrainPyCallback

from ..helpers.programs import run_command
from ..helpers.reference_run import ReferenceRun, flatten_saved
from ..helpers.scripts import link_scripts, run_script, skip_without_nanogpt
from ..helpers.tiny import TORCH_VERSION
from ..helpers.toy_run import SETTINGS, VOCAB_SIZE, flatten_checkpoint, list_differences, make_workplace, train
from ..helpers.trace import TOLERANCE, TRACE_DIR
from ..record_training import FIXTURE_PATH, summarize

CHANGES = {
    "bias": {},
    "no bias": {"bias": False},
    "no decay": {"decay_lr": False},
    "no clipping": {"grad_clip": 0.0},
    "intervals that do not divide": {"eval_interval": 5},
    "only the best": {"always_save_checkpoint": False, "learning_rate": 0.3, "eval_interval": 2},
}


def run_reference(changes, saved=None):
    settings = {**SETTINGS, **changes}
    return ReferenceRun(settings, TRACE_DIR, VOCAB_SIZE, saved)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_run_from_scratch_writes_the_bits_of_train_pys_order(tmp_path, changes):
    train(tmp_path, **changes)
    assert (
        list_differences(flatten_checkpoint(tmp_path / "out" / "ckpt.pt"), flatten_saved(run_reference(changes).run()))
        == []
    )


def test_only_the_best_is_saved_if_always_save_checkpoint_is_off(tmp_path):
    """The losses of this run rise at its end; otherwise the test above would show nothing."""
    train(tmp_path, **CHANGES["only the best"])
    assert read_checkpoint(tmp_path / "out" / "ckpt.pt").training_state.iter_num < SETTINGS["max_iters"]


def test_run_resumed_from_ckpt_pt_writes_the_bits_of_train_pys_order(tmp_path):
    """The first evaluation saves before any update; Trainer's count of updates is not nanoGPT's."""
    changes = {"max_iters": 9, "eval_interval": 3}
    saved = run_reference({"max_iters": 5, "eval_interval": 5}).run().saved
    train(tmp_path, max_iters=5, eval_interval=5)
    (tmp_path / "out" / "checkpoint-5").rename(tmp_path / "earlier")
    train(tmp_path, init_from="resume", **changes)
    expected = flatten_saved(run_reference(changes, saved).run())
    assert list_differences(flatten_checkpoint(tmp_path / "out" / "ckpt.pt"), expected) == []


def test_run_that_stopped_and_resumed_has_the_bits_of_one_that_did_not(tmp_path):
    train(tmp_path, out_dir="whole")
    train(tmp_path, max_iters=4)  # like train.py, makes a fifth update after its last checkpoint
    trainer = train(tmp_path, resume=True)
    assert trainer.state.global_step == trainer.iter_num == 13
    found, expected = (flatten_checkpoint(tmp_path / name / "ckpt.pt") for name in ("out", "whole"))
    assert list_differences(found, expected) == []


def test_one_checkpoint_of_trainers_is_kept(tmp_path):
    train(tmp_path)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".train.lock",
        "ckpt.pt",
        "checkpoint-12",
        "log.jsonl",
    }


def test_checkpoint_holds_every_setting_in_train_pys_order(tmp_path):
    train(tmp_path, max_iters=4)
    config = read_checkpoint(tmp_path / "out" / "ckpt.pt").training_state.config
    assert list(config.items()) == list({**SETTINGS, "max_iters": 4}.items())


def test_command_prints_train_pys_lines_and_writes_the_folder(tmp_path):
    flags = [f"--{name}={value}" for name, value in {**SETTINGS, "max_iters": 8, "log_interval": 4}.items()]
    result = run_command("train", *flags, "--folder", "out/folder", cwd=make_workplace(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    update = r"iter {}: loss \d\.\d{{4}}, time \d+\.\d\dms, mfu -?\d+\.\d\d%"
    evaluation = r"step {}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}"
    expected = [
        "tokens per iteration will be: 96",
        r"found vocab_size = 31 \(inside data/toy/meta\.pkl\)",
        "Initializing a new model from scratch",
        r"number of parameters: 0\.01M",
        r"num decayed parameter tensors: 10, with 6,896 parameters",
        r"num non-decayed parameter tensors: 18, with 448 parameters",
        "using fused AdamW: False",
        evaluation.format(0),
        update.format(0),
        evaluation.format(4),
        "saving checkpoint to out",
        update.format(4),
        evaluation.format(8),
        "saving checkpoint to out",
        update.format(8),
    ]
    lines = result.stdout.splitlines()
    assert len(lines) == len(expected), result.stdout
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    folder, written = NanoGPTLMHeadModel.from_pretrained(tmp_path / "out" / "folder"), tmp_path / "out" / "ckpt.pt"
    assert all(torch.equal(t, read_checkpoint(written).state_dict[name]) for name, t in folder.state_dict().items())
    assert folder.nanogpt_training_state.iter_num == 8


def mask_times(text):
    """Lists train.py's own lines, without configurator.py's and without what differs from run to run."""
    return [line for line in re.sub(r"time .*", "", text).splitlines() if not line.startswith("Overriding: ")]


@pytest.fixture
def no_compiler(monkeypatch):
    """Lets compile=True cost nothing."""
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)


def test_compiling_is_announced_after_the_optimizer(tmp_path, capsys, no_compiler):
    train(tmp_path, max_iters=0, compile=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("using fused AdamW: False") + 1] == "compiling the model... (takes a ~minute)"
    train(tmp_path, max_iters=0, force=True)
    assert "compiling" not in capsys.readouterr().out


def test_resumed_run_prints_what_train_py_prints_of_the_model(tmp_path, capsys):
    """A smaller block_size crops the positions, which count as a decayed tensor and not as parameters of the model."""
    train(tmp_path, max_iters=4)
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "earlier")
    capsys.readouterr()
    train(tmp_path, init_from="resume", block_size=8, eval_only=True)
    assert capsys.readouterr().out.splitlines()[:7] == [
        "tokens per iteration will be: 48",
        "found vocab_size = 31 (inside data/toy/meta.pkl)",
        "Resuming training from out",
        "number of parameters: 0.01M",
        "num decayed parameter tensors: 10, with 6,768 parameters",
        "num non-decayed parameter tensors: 18, with 448 parameters",
        "using fused AdamW: False",
    ]


def test_eval_only_evaluates_and_writes_nothing(tmp_path, capsys):
    train(tmp_path, eval_only=True)
    run = run_reference({"max_iters": 0}).run()
    means = run.evaluations[0]
    line = f"step 0: train loss {means['train']:.4f}, val loss {means['val']:.4f}\n"
    assert line in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == []  # train.py makes it too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "elsewhere"}, r"init_from: expected 'scratch', 'resume' or .* got 'elsewhere'"),
        ({"device": "cuda"}, r"device: expected a GPU for 'cuda', .*--device=cpu --compile=False"),
    ],
)
def test_setting_that_cannot_be_used_is_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConversionError, match=message):
        train(tmp_path, **changes)
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_batches_longer_than_the_model_reads_are_refused(tmp_path):
    train(tmp_path, max_iters=4)
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "earlier")
    with pytest.raises(
        ConversionError, match=r"block_size: expected at most the 16 tokens .* got 17; give --block_size=16"
    ):
        train(tmp_path, init_from="resume", block_size=17)


def test_meta_pkl_that_names_no_size_is_refused(tmp_path):
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        (folder / name).symlink_to(TRACE_DIR / name)
    (folder / "meta.pkl").write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(TokenizerError, match=r"meta\.pkl: expected a positive vocab_size, got None"):
        train(tmp_path)


@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="torch 2.6 draws other dropout masks from the same seed")
def test_recorded_run_of_train_py_ends_where_ours_does(tmp_path):
    recorded = json.loads(FIXTURE_PATH.read_text())
    train(tmp_path, **recorded["changes"])
    found = summarize(tmp_path / "out" / "ckpt.pt")
    assert found.keys() == recorded["numbers"].keys()
    for name, numbers in recorded["numbers"].items():
        assert torch.allclose(torch.tensor(found[name]), torch.tensor(numbers), rtol=0, atol=TOLERANCE), name


@pytest.mark.nanogpt
@skip_without_nanogpt
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_ckpt_pt_and_lines_are_train_pys_own(tmp_path, capsys, no_compiler, changes):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    link_scripts(make_workplace(theirs))
    settings = {**SETTINGS, **changes, "compile": True}
    printed = run_script(theirs, "train.py", *(f"--{name}={value}" for name, value in settings.items()))
    train(tmp_path, **changes, compile=True)
    assert mask_times(capsys.readouterr().out) == mask_times(printed)
    found, expected = tmp_path / "out" / "ckpt.pt", theirs / "out" / "ckpt.pt"
    assert list_differences(flatten_checkpoint(found), flatten_checkpoint(expected)) == []
    assert read_checkpoint(found).training_state.config == read_checkpoint(expected).training_state.config
    assert read_checkpoint(found).model_args == read_checkpoint(expected).model_args
    assert list_differences(flatten_checkpoint(expected), flatten_saved(run_reference(changes).run())) == []


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_ckpt_pt_and_lines_of_a_resumed_run_are_train_pys_own(tmp_path, capsys):
    train(tmp_path, max_iters=5, eval_interval=5)
    (tmp_path / "out" / "checkpoint-5").rename(tmp_path / "earlier")
    theirs = tmp_path / "theirs"
    (theirs / "out").mkdir(parents=True)
    (theirs / "out" / "ckpt.pt").write_bytes((tmp_path / "out" / "ckpt.pt").read_bytes())
    link_scripts(make_workplace(theirs))
    changes = {"init_from": "resume", "max_iters": 9, "eval_interval": 3}
    capsys.readouterr()
    settings = {**SETTINGS, **changes}
    printed = run_script(theirs, "train.py", *(f"--{name}={value}" for name, value in settings.items()))
    train(tmp_path, **changes)
    assert mask_times(capsys.readouterr().out) == mask_times(printed)
    found, expected = (flatten_checkpoint(folder / "out" / "ckpt.pt") for folder in (tmp_path, theirs))
    assert list_differences(found, expected) == []


def test_lines_reach_a_file_while_the_run_goes_on(tmp_path, monkeypatch):
    path, seen = tmp_path / "lines.txt", []
    monkeypatch.setattr(TrainPyCallback, "on_step_begin", lambda *args, **kwargs: seen.append(path.read_text()))
    with path.open("w") as file, contextlib.redirect_stdout(file):
        train(tmp_path, max_iters=1)
    assert seen[0].splitlines()[-1].startswith("step 0: train loss ")
    assert seen[1].splitlines()[-1].startswith("iter 0: loss ")


def test_progress_bar_of_a_resumed_run_begins_where_the_run_does(tmp_path, capsys):
    """Otherwise the time left would count the updates of the earlier run as this one's."""
    train(tmp_path, max_iters=4, has_bar=True)
    bar = capsys.readouterr().err
    assert re.search(r"\b5/5 \[", bar)
    train(tmp_path, max_iters=8, resume=True, has_bar=True)
    counts = re.findall(r"(\d+)/9 \[", capsys.readouterr().err)
    assert (counts[0], counts[1], counts[-1]) == ("0", "4", "9")  # tqdm shows 0 when it is created
