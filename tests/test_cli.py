"""The program: what it imports and prints, its exit codes, and a demonstration that can fail."""

import io
import re
import runpy
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import hugging_nano_gpt
import hugging_nano_gpt_cli
from hugging_nano_gpt import NanoGPTLMHeadModel, demo, training

from .helpers.programs import run_command, run_program
from .helpers.tiny import TORCH_VERSION

# Runs the command line with the arguments given to python -c, and then prints what it imported.
SCRIPT = """
import sys
import hugging_nano_gpt_cli
try:
    hugging_nano_gpt_cli.main()
finally:
    print("imported:", *sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_demo_shows_five_steps_and_succeeds():
    result = run_command("demo")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.findall(r"^(\d)\. (\w+)", result.stdout, re.M) == [
        ("1", "Load"),
        ("2", "Generate"),
        ("3", "Compare"),
        ("4", "Generate"),
        ("5", "Convert"),
    ]
    assert result.stdout.count("[ok: ") == (4 if TORCH_VERSION >= (2, 7) else 3)
    assert "WRONG" not in result.stdout
    assert result.stdout.endswith("Equal: nanoGPT -> Transformers -> nanoGPT.\n")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version_prints_that_of_the_package(flag):
    result = run_command(flag)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{version('hugging-nano-gpt')}\n", "")


def test_package_runs_as_the_program(monkeypatch, capsys):
    """As `python -m hugging_nano_gpt` and `torchrun -m hugging_nano_gpt` do."""
    monkeypatch.setattr(sys, "argv", ["hugging-nano-gpt", "-V"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("hugging_nano_gpt", run_name="__main__")
    assert (end.value.code, capsys.readouterr().out) == (0, f"{version('hugging-nano-gpt')}\n")


class Terminal(io.StringIO):
    """A stream that is a terminal, where progress bars are shown."""

    def isatty(self):
        return True


def test_every_command_has_quiet_and_it_silences_notes_warnings_and_progress(monkeypatch, tmp_path):
    commands = [command.callback.__name__ for command in hugging_nano_gpt_cli.program.app.registered_commands]
    assert all("--quiet" in run_command(command, "-h").stdout for command in commands)

    def convert(*_, **__):
        logging.get_logger("transformers.modeling_utils").warning("a note")
        logging.get_logger("hugging_nano_gpt.convert").warning("another note")
        warnings.warn("a warning", FutureWarning, stacklevel=1)
        list(logging.tqdm(range(3)))  # a progress bar
        return "Wrote it"

    monkeypatch.setattr(hugging_nano_gpt, "convert_to_folder", convert)
    monkeypatch.setattr(io, "StringIO", Terminal)  # of run_command
    assert run_command("convert", "a", "b", "--quiet") == (0, "Wrote it\n", "")
    with pytest.warns(FutureWarning, match="a warning"):
        result = run_command("convert", "a", "b")
    assert result.stdout == "Wrote it\n"
    assert re.match(r"a note\nanother note\n.*3/3", result.stderr, re.DOTALL)
    result = run_command("inspect", tmp_path / "missing.pt", "--quiet")
    assert result.stderr.startswith("error: ")


def test_quiet_training_has_no_bar_and_the_same_lines(monkeypatch):
    given = {}
    monkeypatch.setattr(io, "StringIO", Terminal)  # of run_command
    monkeypatch.setattr(training, "run_training", lambda settings, **options: given.update(options))
    for arguments, has_bar in ([], True), (["--quiet"], False):
        assert run_command("train", *arguments).returncode == 0
        assert given == {**given, "has_bar": has_bar}
        assert "quiet" not in given


@pytest.mark.parametrize("arguments", [["--version", "--verbose"], ["--verbose", "--version"]], ids=" ".join)
def test_verbose_version_prints_what_a_report_needs(arguments):
    result = run_command(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    names = ["hugging-nano-gpt", "torch", "transformers", "Python", "platform", "device"]
    assert [line.split()[0] for line in result.stdout.splitlines()] == names
    assert f"\ntorch {version('torch')}\ntransformers {version('transformers')}\n" in result.stdout
    assert result.stdout.endswith("\ndevice cpu\n") or torch.accelerator.is_available()


def test_verbose_alone_is_refused():
    result = run_command("--verbose", "demo")
    assert (result.returncode, result.stdout) == (2, "")
    assert "expected --verbose only with --version" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["demo", "--help"], ["verify", "--help"], ["--version"]], ids=" ".join
)
def test_help_imports_neither_torch_nor_transformers(arguments):
    result = run_program(sys.executable, "-c", SCRIPT, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    text, _, imported = result.stdout.partition("imported: ")
    assert text
    assert "typer" in imported.split()
    assert {"torch", "transformers", "numpy", "hugging_nano_gpt"} & set(imported.split()) == set()


@pytest.mark.parametrize("arguments", [["convrt"], ["demo", "--fast"], ["demo", "extra"]], ids=" ".join)
def test_unknown_argument_exits_with_2_and_says_so(arguments):
    result = run_command(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert arguments[-1] in result.stderr


def test_error_of_ours_goes_to_stderr_in_one_line(monkeypatch):
    monkeypatch.setattr(demo, "CKPT_PATH", Path("missing.pt"))
    result = run_command("demo")
    assert result.returncode == 1
    assert result.stderr == (
        "error: missing.pt: cannot be opened: No such file or directory; check the path and its permissions\n"
    )


def run_demo():
    stream = io.StringIO()
    is_proved = demo.run_demo(stream)
    return is_proved, stream.getvalue()


@pytest.mark.parametrize("change", [1e-4, float("nan")])
def test_demo_with_altered_golden_logits_says_wrong(tmp_path, monkeypatch, change):
    golden = load_file(demo.GOLDEN_PATH)
    golden["logits"][1, 2, 3] += change
    save_file(golden, tmp_path / "golden.safetensors")
    monkeypatch.setattr(demo, "GOLDEN_PATH", tmp_path / "golden.safetensors")
    is_proved, text = run_demo()
    assert not is_proved
    assert text.count("[WRONG: expected at most 5e-05]") == 1
    assert text.count("[ok: same names, same bits]") == 1
    assert text.endswith("NOT EQUAL: see above.\n")


def swap_layers(model):
    first, second = model.transformer.h[0].attn.c_proj.weight, model.transformer.h[1].attn.c_proj.weight
    first.data, second.data = second.data, first.data


def transpose_square(model):
    """The usual fault of converters that transpose by shape."""
    weight = model.transformer.h[0].attn.c_proj.weight
    weight.data = weight.data.T.contiguous()


@pytest.mark.parametrize("break_model", [swap_layers, transpose_square])
def test_demo_with_a_broken_way_back_says_wrong(monkeypatch, break_model):
    write = NanoGPTLMHeadModel.to_nanogpt_ckpt

    def write_wrong(model, path):
        with torch.no_grad():
            break_model(model)
        write(model, path)

    monkeypatch.setattr(NanoGPTLMHeadModel, "to_nanogpt_ckpt", write_wrong)
    is_proved, text = run_demo()
    assert not is_proved
    assert text.count("[ok: at most 5e-05]") == 1
    assert text.count("[WRONG: expected same names, same bits]") == 1


def test_demo_exits_with_1_when_something_is_wrong(monkeypatch):
    monkeypatch.setattr(demo, "run_demo", lambda: False)
    assert run_command("demo").returncode == 1
