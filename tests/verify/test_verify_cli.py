"""The command `verify`: what it prints to stdout and stderr, its exit codes, and --json."""

import json

import pytest
import torch

from hugging_nano_gpt import NanoGPTLMHeadModel, verify_models
from hugging_nano_gpt.demo import CKPT_PATH as DEMO_CKPT_PATH
from hugging_nano_gpt.model.configuration_nano_gpt import ACTIVATION_FUNCTIONS
from hugging_nano_gpt_cli import options

from ..helpers.contents import HEAD, save, swap
from ..helpers.programs import run_command
from ..helpers.scripts import NANOGPT_DIR, skip_without_nanogpt
from ..helpers.trace import TRACE_DIR

CKPT_PATH = TRACE_DIR / "ckpt_200.pt"


@pytest.fixture
def pair(contents, tmp_path):
    """A checkpoint file, and one with its two layers swapped."""
    paths = []
    for name in ("right", "swapped"):
        (tmp_path / name).mkdir()
        paths.append(str(save(contents, tmp_path / name)))
        for tensor_name in list(contents["model"]):
            if tensor_name.startswith("transformer.h.0."):
                swap(contents["model"], tensor_name, tensor_name.replace(".h.0.", ".h.1."))
    return paths


def verify(*arguments):
    return run_command("verify", *arguments)


def test_equal_models_print_the_report_and_exit_with_0(pair):
    result = verify(pair[0], pair[0])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{verify_models(pair[0], pair[0])}\n"
    assert "WRONG" not in result.stdout


def test_unequal_models_print_the_same_facts_as_json_and_exit_with_1(pair):
    result = verify(*pair, "--gradients", "--json")
    assert (result.returncode, result.stderr) == (1, "")
    report = verify_models(*pair, gradients=True)
    facts = json.loads(result.stdout)
    assert facts == report.to_json()
    assert facts["is_equal"] is False
    (check,) = (check for check in facts["checks"] if check["name"] == "tensors")
    assert check["detail"] == "transformer.h.0 and transformer.h.1 are swapped"
    assert all(check["detail"] in str(report) for check in facts["checks"])


def test_error_of_ours_is_one_line_on_stderr(tmp_path):
    result = verify(tmp_path / "missing.pt", CKPT_PATH)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'missing.pt'}: cannot be opened")
    assert result.stderr.count("\n") == 1


def test_warnings_of_transformers_do_not_join_the_error(pair, tmp_path):
    NanoGPTLMHeadModel.from_nanogpt_ckpt(pair[0]).save_pretrained(tmp_path / "saved")
    config_path = tmp_path / "saved" / "config.json"
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "n_layer": 3}))
    result = verify(pair[0], tmp_path / "saved")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.pt"], "exactly one of B and --nanogpt"),
        (["a.pt", "b.pt", "--nanogpt", "n"], "exactly one of B and --nanogpt"),
        (["a.pt", "b.pt", "--activation", "relu"], "relu"),
        (["a.pt", "b.pt", "--n-head", "0"], "--n-head"),
        ([], "Missing argument"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(arguments, message):
    code, out, err = verify(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_help_names_every_option():
    result = verify("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for option in ("--gradients", "--nanogpt", "--activation", "--n-head", "--ignore-extra", "--json"):
        assert option in result.stdout


def test_activations_are_those_of_the_configuration():
    assert tuple(item.value for item in options.Activation) == ACTIVATION_FUNCTIONS


def test_nanogpt_option_runs_the_checkout(tmp_path):
    code, out, err = verify(CKPT_PATH, "--nanogpt", tmp_path)
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path}: expected a checkout of nanoGPT, got no model.py in it; give its folder\n"


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_nanogpt_option_prints_equality_for_the_demo_checkpoint():
    result = verify(DEMO_CKPT_PATH, "--nanogpt", NANOGPT_DIR, "--gradients")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("Equal: 13 of 13 checks passed.\n")
    assert result.stdout.count("bitwise equal") == 7


def test_n_head_is_passed_on(contents, tmp_path):
    bare = {name: tensor for name, tensor in contents["model"].items() if name != HEAD}
    bare[HEAD] = bare["transformer.wte.weight"]
    torch.save(bare, tmp_path / "bare.pt")
    whole = save(contents, tmp_path)
    assert verify(tmp_path / "bare.pt", whole, "--n-head", "4")[0] == 0
    assert "a bare state dict does not record the number of heads" in verify(tmp_path / "bare.pt", whole)[2]
