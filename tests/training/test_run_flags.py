"""What `hugging-nano-gpt train` has beside train.py: loggers and savings of memory; and GPT-2 as a start."""

import contextlib
import json
import os

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from hugging_nano_gpt import ConversionError, MissingDependencyError, read_checkpoint
from hugging_nano_gpt.model.modeling_nano_gpt import NanoGPTMLP
from hugging_nano_gpt.training import arguments, compute_lr, loggers, run, run_training

from ..helpers.programs import run_command
from ..helpers.reference_run import ReferenceRun
from ..helpers.scripts import link_scripts, run_script, skip_without_nanogpt
from ..helpers.tiny import make_gpt2
from ..helpers.toy_run import SETTINGS, VOCAB_SIZE, flatten_checkpoint, list_differences, make_workplace, train
from ..helpers.trace import TRACE_DIR, find_largest_difference

SHORT = {"max_iters": 4, "eval_interval": 2}


def run_train(folder, *flags, **changes):
    """Runs the command in a folder, and returns what its ckpt.pt holds."""
    settings = {**SETTINGS, **SHORT, "out_dir": "out-flags", **changes}
    result = run_command("train", *(f"--{name}={value}" for name, value in settings.items()), *flags, cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    return flatten_checkpoint(folder / settings["out_dir"] / "ckpt.pt")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the ckpt.pt of the run without flags holds."""
    folder = tmp_path_factory.mktemp("plain")
    train(folder, **SHORT)
    return flatten_checkpoint(folder / "out" / "ckpt.pt")


def test_gradient_checkpointing_computes_twice_and_changes_no_bit(tmp_path, plain, monkeypatch):
    """Dropout masks are drawn again in the backward pass, with the next batch drawn in between."""
    passes = []
    forward = NanoGPTMLP.forward
    monkeypatch.setattr(NanoGPTMLP, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
    counts = []
    for flags in ([], ["--gradient-checkpointing"]):
        passes.clear()
        found = run_train(make_workplace(tmp_path), *flags, out_dir=f"out{len(flags)}")
        assert list_differences(found, plain) == []
        counts.append(len(passes))
    n_updates = SHORT["max_iters"] + 1
    assert counts[1] - counts[0] == n_updates * SETTINGS["gradient_accumulation_steps"] * SETTINGS["n_layer"]


# Each chunk's sum is rounded by itself; a few updates of AdamW make 1e-7 of the gradients more.
@pytest.mark.parametrize(("flags", "tolerance"), [(["--loss-chunk-size=7"], 1e-4), (["--bf16"], 0.05)])
def test_flags_that_change_the_arithmetic_change_the_numbers_a_little(tmp_path, plain, flags, tolerance):
    found = run_train(make_workplace(tmp_path), *flags)
    assert 0 < find_largest_difference(found, plain) < tolerance


def test_bf16_goes_before_the_dtype_asked_for(monkeypatch):
    """train.py's default dtype may be float16, and Trainer refuses both."""
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)  # the true ones ask for a GPU
    settings = {**SETTINGS, "device": "cuda", "dtype": "float16"}
    for bf16 in (False, True):
        args = run._make_arguments(settings, 0, False, [], bf16=bf16, fsdp=False)
        assert (args.get("bf16", False), args["fp16"]) == (bf16, not bf16)


class NoteLogs(TrainerCallback):
    """Stands in for a logger that is not installed here."""

    logs: list = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


@pytest.fixture
def logger(monkeypatch):
    monkeypatch.setattr(NoteLogs, "logs", [])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", NoteLogs)
    monkeypatch.setattr(loggers, "get_available_reporting_integrations", lambda: ["trackio"])
    return NoteLogs


def test_report_to_logs_updates_and_evaluations_and_changes_no_bit(tmp_path, plain, logger):
    found = run_train(make_workplace(tmp_path), "--report-to", "trackio")
    assert list_differences(found, plain) == []
    updates = [entry for entry in logger.logs if "loss" in entry]
    evaluations = [entry for entry in logger.logs if "val/loss" in entry]
    assert [entry["step"] for entry in updates] == [1, 2, 3, 4, 5]
    assert [entry["learning_rate"] for entry in updates] == [
        compute_lr(iter_num, {**SETTINGS, **SHORT}) for iter_num in range(5)
    ]
    assert [entry["iter"] for entry in evaluations] == [0, 2, 4]
    assert evaluations[-1]["val/loss"] == found["best_val_loss"].item()


class NoteScalars(integration_utils.TensorBoardCallback):
    """Trainer's logger without TensorBoard, of whose writer it takes the place."""

    def __init__(self):
        self.tb_writer, self.logging_dir, self.scalars = self, "", []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, step))

    def add_text(self, name, text):
        pass

    flush = close = lambda self: None


def test_tensorboard_shows_train_pys_names_and_the_history_keeps_trainers(tmp_path, monkeypatch):
    """Through Trainer's own callback, whose names are wandb's, trackio's and others' too."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", NoteScalars)
    monkeypatch.setattr(loggers, "get_available_reporting_integrations", lambda: ["tensorboard"])
    trainer = train(tmp_path, **SHORT, report_to="tensorboard")
    (scalars,) = (each.scalars for each in trainer.callback_handler.callbacks if isinstance(each, NoteScalars))
    steps = {name: [step for shown, step in scalars if shown == name] for name, _ in scalars}
    assert steps["train/loss"] == steps["val/loss"] == steps["iter"] == [0, 2, 4]
    assert steps["iter/loss"] == steps["train/learning_rate"] == [1, 2, 3, 4, 5]
    assert not [name for name in steps if name.startswith(("train/train/", "train/val/"))]
    last = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    names = {"loss", "train/loss", "val/loss", "eval_loss", "iter"}
    assert names <= {name for entry in last for name in entry}
    assert names <= {name for entry in trainer.state.log_history for name in entry}


def test_wandb_is_one_logger_with_train_pys_project_however_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(loggers, "get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)
    for wandb_log, report_to in ((True, "none"), (False, ["wandb"]), (True, "wandb")):
        monkeypatch.delenv("WANDB_PROJECT", raising=False)
        settings = {**SETTINGS, "wandb_log": wandb_log, "wandb_project": "toys", "wandb_run_name": "first"}
        names = loggers.list_loggers(settings, report_to)
        args = run._make_arguments(settings, 0, False, names, bf16=False, fsdp=False)
        assert (args["report_to"], args["run_name"], os.environ["WANDB_PROJECT"]) == (["wandb"], "first", "toys")


def test_trackio_has_train_pys_project(monkeypatch):
    monkeypatch.setattr(arguments, "NanoGPTArguments", dict)
    settings = {**SETTINGS, "wandb_project": "toys"}
    projects = [
        run._make_arguments(settings, 0, False, names, False, False).get("project") for names in ([], ["trackio"])
    ]
    assert projects == [None, "toys"]


@pytest.mark.parametrize(
    ("report_to", "error", "message"),
    [
        (["tensorbord"], ConversionError, r"report_to: expected names of Trainer's loggers, got 'tensorbord'; give"),
        ("trackio", MissingDependencyError, r"report_to: trackio is not installed; pip install trackio"),
    ],
)
def test_logger_that_is_not_there_is_refused_before_the_run(tmp_path, monkeypatch, report_to, error, message):
    monkeypatch.setattr(loggers, "get_available_reporting_integrations", list)
    with pytest.raises(error, match=message), contextlib.chdir(make_workplace(tmp_path)):
        run_training(SETTINGS, report_to=report_to)
    assert not (tmp_path / "out").exists()


def test_fsdp_without_torchrun_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"fsdp: expected the processes that torchrun starts, .*torchrun"):
        train(tmp_path, fsdp=True)
    assert not (tmp_path / "out").exists()


def save_gpt2(folder, n_positions):
    """Saves a stock GPT-2 with random weights; returns them as nanoGPT has them."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": VOCAB_SIZE}
    gpt2 = make_gpt2(**shape, n_positions=n_positions, bos_token_id=0, eos_token_id=0)
    gpt2.save_pretrained(folder)
    transposed = tuple(f"{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    return {name: t.T if name.endswith(transposed) else t for name, t in gpt2.state_dict().items()}


def test_run_from_gpt2_writes_the_bits_of_train_pys_order(tmp_path):
    """A folder in the working directory goes before the Hub."""
    weights = save_gpt2(make_workplace(tmp_path) / "gpt2-toy", SETTINGS["block_size"])
    found = run_train(tmp_path, init_from="gpt2-toy")
    reference = ReferenceRun({**SETTINGS, **SHORT}, TRACE_DIR, VOCAB_SIZE)
    reference.model.load_state_dict(weights)
    saved = reference.run().saved["model"]
    assert list_differences({name: found[name] for name in saved}, saved) == []


def test_run_from_gpt2_is_cropped_to_block_size_as_train_py_does(tmp_path):
    weights = save_gpt2(make_workplace(tmp_path) / "gpt2-toy", 4 * SETTINGS["block_size"])
    found = run_train(tmp_path, init_from="gpt2-toy", learning_rate=0.0, min_lr=0.0)
    checkpoint = read_checkpoint(tmp_path / "out-flags" / "ckpt.pt")
    assert checkpoint.model_args["block_size"] == SETTINGS["block_size"]
    assert torch.equal(found["transformer.wpe.weight"], weights["transformer.wpe.weight"][: SETTINGS["block_size"]])


def test_run_from_gpt2_prints_train_pys_lines(tmp_path, capsys):
    save_gpt2(make_workplace(tmp_path) / "gpt2-toy", 4 * SETTINGS["block_size"])
    train(tmp_path, init_from="gpt2-toy", eval_only=True)
    assert capsys.readouterr().out.splitlines()[2:7] == [
        "Initializing from OpenAI GPT-2 weights: gpt2-toy",
        "loading weights from pretrained gpt: gpt2-toy",
        "forcing vocab_size=31, block_size=64, bias=True",
        "overriding dropout rate to 0.2",
        "number of parameters: 0.01M",
    ]


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_run_from_gpt2_writes_train_pys_own_bits(tmp_path):
    """With model.py's table of GPT-2's sizes made small, and its crop to block_size."""
    save_gpt2(make_workplace(tmp_path) / "gpt2", 2 * SETTINGS["block_size"])
    link_scripts(tmp_path)
    source = (tmp_path / "model.py").read_text()
    for theirs, small in (
        ("n_layer=12, n_head=12, n_embd=768", "n_layer=2, n_head=2, n_embd=16"),
        ("= 50257 #", f"= {VOCAB_SIZE} #"),
        ("= 1024 #", f"= {2 * SETTINGS['block_size']} #"),
    ):
        assert theirs in source
        source = source.replace(theirs, small)
    (tmp_path / "model.py").unlink()
    (tmp_path / "model.py").write_text(source)
    found = run_train(tmp_path, init_from="gpt2")
    settings = {**SETTINGS, **SHORT, "init_from": "gpt2"}
    run_script(tmp_path, "train.py", *(f"--{name}={value}" for name, value in settings.items()))
    expected = flatten_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert list_differences(found, expected) == []
    model_args = [read_checkpoint(tmp_path / name / "ckpt.pt").model_args for name in ("out", "out-flags")]
    assert model_args[0] == model_args[1]
