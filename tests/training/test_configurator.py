"""train.py's settings, read without executing anything: defaults, config files, flags."""

import ast
import os
import re
from pathlib import Path

import pytest

from hugging_nano_gpt import ConversionError
from hugging_nano_gpt.training import TRAIN_DEFAULTS, read_settings

from ..helpers.scripts import NANOGPT_DIR, skip_without_nanogpt


def write(folder, text):
    path = folder / "config.py"
    path.write_text(text)
    return str(path)


def test_without_arguments_the_settings_are_train_pys_defaults():
    settings = read_settings([])
    assert list(settings) == list(TRAIN_DEFAULTS)
    assert settings == {**TRAIN_DEFAULTS, "dtype": settings["dtype"]}
    assert settings["dtype"] in ("float16", "bfloat16")


def test_file_overrides_defaults_and_flags_override_the_file(tmp_path):
    text = '"""A docstring."""\nbatch_size = 12 # windows\ngradient_accumulation_steps = 5 * 8\nmin_lr = 6e-4/10\n'
    text += "out_dir: str = 'out-' + \"x\"\nbias = True\ndropout = 0\nmax_iters = 6e5\nlr_decay_iters = max_iters\n"
    settings = read_settings([write(tmp_path, text), "--batch_size=4", "--eval_only=True", "--dataset=1"])
    changed = {name: value for name, value in settings.items() if value != TRAIN_DEFAULTS[name]}
    changed.pop("dtype", None)
    assert changed == {
        "batch_size": 4,
        "out_dir": "out-x",
        "bias": True,
        "min_lr": 6e-4 / 10,
        "eval_only": True,
        "dataset": "1",
    }
    assert settings["gradient_accumulation_steps"] == 40
    assert settings["max_iters"] == 6e5


def test_later_flags_and_files_override_earlier_ones(tmp_path):
    path = write(tmp_path, "batch_size = 3")
    assert read_settings(["--batch_size=4", path])["batch_size"] == 3
    assert read_settings([path, "--batch_size=4"])["batch_size"] == 4


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--out_dir=a=b", "out_dir", "a=b"),
        ("--learning_rate=1", "learning_rate", 1),
        ("--learning_rate=1e-3", "learning_rate", 1e-3),
        ("--compile=False", "compile", False),
        ("--dataset='x'", "dataset", "x"),
        ("--wandb_run_name=", "wandb_run_name", ""),
    ],
)
def test_flag_is_read_as_a_literal_or_as_text(flag, name, value):
    assert read_settings([flag])[name] == value


def test_name_of_the_file_s_own_can_be_used_in_a_later_line(tmp_path):
    path = write(tmp_path, "tokens = 2**15\nbatch_size = tokens // block_size\n")
    assert read_settings([path])["batch_size"] == 32


def test_time_in_a_run_s_name_is_read_as_nanogpts_own_file_has_it(tmp_path):
    path = write(tmp_path, "import time\nwandb_run_name = 'ft-' + str(time.time())\n")
    assert re.fullmatch(r"ft-\d+\.\d+", read_settings([path])["wandb_run_name"])


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "from time import time",
        "print('x')",
        "batch_size = __import__('os').system('true')",
        "batch_size = int('3')",
        "batch_size = [3][0]",
        "batch_size, block_size = 3, 4",
        "batch_size = block_size = 3",
        "batch_size += 1",
        "batch_size = 3 if True else 4",
        "batch_size = 9**9**9",
        "out_dir = 'x' * 10**9",
        "batch_size = 1 / 0",
        "batch_size = unknown",
        "out_dir = f'{1}'",
        "batch_size = -'x'",
        "def f(): pass",
        "batch_size = (lambda: 3)()",
        "batch_size = None",
    ],
)
def test_line_that_would_have_to_be_executed_is_refused_by_its_number(tmp_path, line):
    path = write(tmp_path, f"n_layer = 2\n{line}\n")
    message = rf"config\.py, line 2: nothing in a config file is executed: .* got {re.escape(repr(line))}; write"
    with pytest.raises(ConversionError, match=message):
        read_settings([path])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learing_rate=1.0"], r"--learing_rate: unknown setting: .* got 'learing_rate'; write learning_rate$"),
        (["--zzz=1", "--qqq=1"], r"--zzz: .*leave it out, --qqq: unknown"),
        (["--batch_size=x"], r"--batch_size: batch_size: wrong type: expected int, .* got 'x'"),
        (["--batch_size=1.5"], r"expected int, .* got 1\.5"),
        (["--batch_size=True"], r"expected int, .* got True"),
        (["--compile=1"], r"expected bool, .* got 1"),
        (["--bias"], r"--bias: not a setting: expected a config file or --key=value"),
        (["batch_size=1"], r"batch_size=1: not a setting"),
        (["nowhere.py"], r"nowhere\.py: cannot be read: .*No such file"),
    ],
)
def test_bad_argument_is_refused(arguments, message):
    with pytest.raises(ConversionError, match=message):
        read_settings(arguments)


def test_unknown_name_in_a_file_is_refused(tmp_path):
    with pytest.raises(
        ConversionError, match=r"config\.py: unknown setting: .* got 'batchsize'; write batch_size, or"
    ):
        read_settings([write(tmp_path, "batchsize = 3")])


def test_names_of_the_file_s_own_are_accepted_as_by_train_py(tmp_path):
    own = "_comment = 3\n_batchsize = 4\nnotes = {'lr': [1e-3, None]}\nbetas_tried = (0.9, 0.95)\nbatch_size = 2\n"
    assert read_settings([write(tmp_path, own)]) == {**read_settings([]), "batch_size": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "batch_size = " + "-" * 60_000 + "1",
            "cannot be read: .*got: an expression too long or too deep for Python",
        ),
        ("batch_size = " + "(" * 30_000 + "1" + ")" * 30_000, "cannot be read: .*got: too many nested parentheses"),
        ("batch_size = " + "+".join(["1"] * 30_000), "cannot be read: .*an expression too long or too deep"),
        ("batch_size = " + "+".join(["1"] * 2500), r"line 1: nothing in .* got 'batch_size = 1\+1\+"),
        ("-" * 100_000, r"cannot be read: .*got: more than 65,536 bytes"),
        ("batch_size = 0x" + "f" * 9000, r"batch_size: too large: expected .* got a number of 36000 bits"),
        ("batch_size = '" + "f" * 60_000 + "'", r"batch_size: wrong type: .* got 'f+\.\.\. \(60002 characters\)"),
    ],
    ids=["signs", "parentheses", "terms", "fewer terms", "bytes", "digits", "text"],
)
def test_file_that_is_too_large_to_read_is_refused_in_a_short_message(tmp_path, text, message):
    with pytest.raises(ConversionError, match=rf"config\.py.*{message}") as caught:
        read_settings([write(tmp_path, text)])
    assert len(str(caught.value)) < 500


def test_flag_that_is_too_large_to_read_is_refused_in_a_short_message():
    for text in ("-" * 100_000 + "1", "0x" + "f" * 9000):
        with pytest.raises(ConversionError, match=r"--batch_size: batch_size: (wrong type|too large)") as caught:
            read_settings([f"--batch_size={text}"])
        assert len(str(caught.value)) < 500


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_defaults_are_those_written_in_train_py():
    source = (Path(NANOGPT_DIR) / "train.py").read_text().split("config_keys")[0]
    found = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id != "dtype":
            found[statement.targets[0].id] = eval(ast.unparse(statement.value), {})
    assert found == {name: value for name, value in TRAIN_DEFAULTS.items() if name != "dtype"}
    assert [name for name in TRAIN_DEFAULTS if name != "dtype"] == list(found)


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_every_config_of_nanogpts_is_read_as_python_reads_it():
    for path in sorted((Path(NANOGPT_DIR) / "config").glob("*.py")):
        expected = {}
        exec(path.read_text(), {"time": os}, expected)
        settings = read_settings([str(path)])
        for name, value in expected.items():
            if name not in ("time", "wandb_run_name"):
                assert settings[name] == value, (path, name)
