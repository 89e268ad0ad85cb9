"""benchmarks/gpu.py with toy models, on the CPU and, if one is present, on the GPU."""

import json
import time

import pytest
import torch
from transformers.utils import logging

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel
from hugging_nano_gpt.model import modeling_nano_gpt

from .helpers.folders import ROOT

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
    ),
]

# The probes that are skipped on a CPU.
NEEDS_GPU = {
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "as sample.py draws",
    "waits for the GPU",
    "FSDP2 on one device",
}


@pytest.fixture
def script(monkeypatch):
    """Imports benchmarks/gpu.py, and afterwards restores the logging of Transformers."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    import gpu

    yield gpu
    logging.set_verbosity(verbosity)
    if has_progress_bar:
        logging.enable_progress_bar()


def run(script, capsys, *arguments):
    """Runs the script; returns the exit status and the JSON object of its last line."""
    status = script.main(["--size", "toy", "--in-process", *arguments])
    return status, json.loads(capsys.readouterr().out.splitlines()[-1])


def list_verdicts(report):
    return {name: probe["verdict"] for part in report["parts"].values() for name, probe in part["probes"].items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["exactness", "attention", "generate", "speed", "trainer"])
def test_every_part_passes(script, capsys, tmp_path, part, device):
    status, report = run(script, capsys, "--device", device, "--only", part, "--output", str(tmp_path / "gpu.json"))
    verdicts = list_verdicts(report)
    assert list(verdicts) == list(script.PARTS[part].PROBES)
    assert not [name for name, verdict in verdicts.items() if verdict == "failed"]
    if device == "cpu":
        assert {name for name, verdict in verdicts.items() if verdict == "skipped"} == NEEDS_GPU & verdicts.keys()
    assert (status, report["parts"][part]["verdict"]) == (0, "ok")
    assert json.loads((tmp_path / "gpu.json").read_text()) == report


def use_another_activation(script, monkeypatch):
    from gpu_parts import probe

    other = {"activation_function": "gelu_new"}
    monkeypatch.setattr(probe, "make_ours", lambda sizes: NanoGPTLMHeadModel(NanoGPTConfig(**sizes, **other)))


def ignore_the_mask(script, monkeypatch):
    forward = NanoGPTLMHeadModel.forward
    monkeypatch.setattr(
        NanoGPTLMHeadModel, "forward", lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None})
    )


def forget_positions(script, monkeypatch):
    find = modeling_nano_gpt.find_positions
    monkeypatch.setattr(modeling_nano_gpt, "find_positions", lambda *args: find(*args) * 0)


def halve_the_chunked_loss(script, monkeypatch):
    compute = modeling_nano_gpt.compute_chunked_loss
    monkeypatch.setattr(modeling_nano_gpt, "compute_chunked_loss", lambda *args, **kw: compute(*args, **kw) / 2)


def decay_nothing_in_the_loop(script, monkeypatch):
    import trainer

    make = trainer.make_optimizer
    monkeypatch.setattr(trainer, "make_optimizer", lambda model, config: make(model, {**config, "weight_decay": 0.0}))


@pytest.mark.parametrize(
    ("part", "break_something", "failed"),
    [
        ("exactness", use_another_activation, {"float32", "bfloat16 autocast", "adamw", "torch.compile"}),
        ("attention", ignore_the_mask, {"sdpa", "eager"}),
        ("generate", forget_positions, {"batch 32", "past block_size, batch 32", "drawn", "static cache, batch 32"}),
        ("speed", halve_the_chunked_loss, {"loss_chunk_size"}),
        ("trainer", decay_nothing_in_the_loop, {"against a bare loop"}),
    ],
)
def test_every_part_can_fail(script, capsys, monkeypatch, part, break_something, failed):
    """Only the probes that have to fail are run; the test above shows that they pass otherwise."""
    break_something(script, monkeypatch)
    monkeypatch.setattr(script.PARTS[part], "PROBES", {name: script.PARTS[part].PROBES[name] for name in failed})
    status, report = run(script, capsys, "--device", "cpu", "--only", part)
    assert (status, report["parts"][part]["verdict"]) == (1, "failed")
    assert list_verdicts(report) == dict.fromkeys(failed, "failed")


class Part:
    """A part of the script with given probes."""

    def __init__(self, limit_s=600.0, **probes):
        self.LIMIT_S, self.PROBES = limit_s, probes


def test_what_goes_wrong_in_one_probe_is_reported_and_the_others_run(script, capsys, monkeypatch):
    from gpu_parts.probe import Outcome, SkippedError

    def fail(setting):
        setting.figures["so far"] = 3
        raise RuntimeError("out of luck\nand more")

    def skip(setting):
        raise SkippedError("nothing here")

    passing = Part(passes=lambda setting: Outcome(True, "it passes", {"figure": 1.5}))
    sleep = Part(1.0, sleeps=lambda setting: time.sleep(60))
    first = Part(fails=fail, skips=skip, **{"passes too": passing.PROBES["passes"]})
    monkeypatch.setattr(script, "PARTS", {"one": first, "two": sleep, "three": passing})
    status, report = run(script, capsys, "--device", "cpu", "--only", "one,two,three")
    assert status == 1
    verdicts = {"fails": "failed", "skips": "skipped", "passes too": "ok", "sleeps": "failed", "passes": "ok"}
    assert list_verdicts(report) == verdicts
    assert [part["verdict"] for part in report["parts"].values()] == ["failed", "failed", "ok"]
    fails, skips, _ = report["parts"]["one"]["probes"].values()
    assert (fails["why"], fails["figures"], skips["why"]) == (
        "RuntimeError: out of luck",
        {"so far": 3},
        "nothing here",
    )
    assert "raise RuntimeError" in fails["trace"]
    assert report["parts"]["two"]["probes"]["sleeps"]["why"] == "not finished when 1 s were over"
    assert report["parts"]["three"]["probes"]["passes"]["figures"] == {"figure": 1.5}


def test_nothing_is_tried_without_time_or_device(script, capsys, monkeypatch):
    _, report = run(script, capsys, "--device", "cpu", "--only", "attention", "--time-limit", "0")
    assert set(list_verdicts(report).values()) == {"skipped"}
    monkeypatch.setattr(script, "tidy_up", lambda setting: False)
    _, report = run(script, capsys, "--device", "cpu", "--only", "attention,trainer")
    whys = [probe["why"] for part in report["parts"].values() for probe in part["probes"].values()]
    assert set(whys[1:]) == {"an earlier probe left the GPU unusable in this process"}


def test_unknown_part_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--only", "exactness,sped"])
    assert "got sped" in capsys.readouterr().err
