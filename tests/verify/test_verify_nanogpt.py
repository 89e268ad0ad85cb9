"""verify_against_nanogpt: with a small checkout written here, and with the real one if NANOGPT_DIR is set.

Their code's process is forked, with torch imported; three tests start one as users do.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hugging_nano_gpt import NanoGPTLMHeadModel, VerifyError, verify_against_nanogpt
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.verify import nanogpt

from ..helpers.contents import save
from ..helpers.folders import ROOT
from ..helpers.processes import run_script_forked
from ..helpers.reports import find_wrong
from ..helpers.scripts import NANOGPT_DIR, skip_without_nanogpt

# The parts of nanoGPT's model.py that the comparison uses, around the independent reference.
MODEL_PY = """
import sys
from dataclasses import asdict, dataclass

import torch

sys.path.insert(0, {root!r})
from tests.helpers.reference import ReferenceGPT


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class GPT(ReferenceGPT):
    def __init__(self, config):
        super().__init__(**asdict(config))
        print("number of parameters: 0.03M")

{changes}
"""

TANH = """
gelu = torch.nn.functional.gelu
torch.nn.functional.gelu = lambda x: gelu(x, approximate="tanh")
"""

# The same function, with the sums of attention in another order.
WRITTEN_OUT = """
def attend(q, k, v, attn_mask, dropout_p, is_causal):
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, float("-inf"))
    return scores.softmax(-1) @ v

torch.nn.functional.scaled_dot_product_attention = attend
"""

# nanoGPT of 2022-12-28 had no bias to configure.
OLD_CONFIG = """
@dataclass
class GPTConfig:
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.1

class GPT(ReferenceGPT):
    def __init__(self, config):
        super().__init__(vocab_size=65, bias=True, **asdict(config))
"""

UNTIED = """
class GPT(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = torch.nn.Parameter(torch.zeros(config.vocab_size, config.n_embd))
"""


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    monkeypatch.setattr(nanogpt, "subprocess", SimpleNamespace(run=run_script_forked))


@pytest.fixture
def not_forked(forked, monkeypatch):
    monkeypatch.setattr(nanogpt, "subprocess", subprocess)


@pytest.fixture
def make_checkout(tmp_path, monkeypatch):
    """Writes a checkout; afterwards no other file may be in it or in the temporary folder."""
    checkout, temporary = tmp_path / "nanoGPT", tmp_path / "tmp"
    checkout.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def make(changes: str = "") -> Path:
        (checkout / "model.py").write_text(MODEL_PY.format(root=str(ROOT), changes=changes))
        return checkout

    yield make
    assert [path.name for path in checkout.iterdir()] in ([], ["model.py"])
    assert not list(temporary.iterdir())


def test_equal_model_is_bitwise_equal_from_any_folder(not_forked, ckpt_path, make_checkout, monkeypatch, capfd):
    make_checkout()
    monkeypatch.chdir(ckpt_path.parent)
    report = verify_against_nanogpt("ckpt.pt", "nanoGPT", gradients=True)
    assert find_wrong(report) == {}
    details = {check.name: check.detail for check in report.checks}
    assert details["parameters"] == "the same 29 names"
    assert details["activation"] == "gelu, as the logits show"
    assert details["logits 2x32"] == "bitwise equal"
    assert details["gradients"] == "28 tensors, bitwise equal"
    assert details["greedy tokens"] == "2 rows of 32 tokens equal"
    assert capfd.readouterr().out == ""


def test_tanh_in_their_code_is_named(ckpt_path, make_checkout):
    wrong = find_wrong(verify_against_nanogpt(ckpt_path, make_checkout(TANH)))
    assert wrong["activation"].startswith("gelu and gelu_")
    assert "with gelu_" in wrong["activation"]
    assert {"logits 2x1", "logits 2x17", "logits 2x32"} < set(wrong)
    assert {"parameters", "tensors"}.isdisjoint(wrong)
    report = verify_against_nanogpt(ckpt_path, make_checkout(TANH), activation_function="gelu_pytorch_tanh")
    assert find_wrong(report) == {}


def test_same_function_in_another_order_is_equal_within_a_stated_tolerance(ckpt_path, make_checkout):
    report = verify_against_nanogpt(ckpt_path, make_checkout(WRITTEN_OUT), gradients=True)
    assert find_wrong(report) == {}
    (check,) = (check for check in report.checks if check.name == "logits 2x32")
    assert 0 < check.largest_difference <= check.tolerance
    assert check.detail == f"equal within {check.tolerance:.2g} (largest difference {check.largest_difference:.2g})"


def test_another_function_is_found_and_no_activation_is_blamed(ckpt_path, make_checkout):
    wrong = find_wrong(verify_against_nanogpt(ckpt_path, make_checkout(WRITTEN_OUT.replace("-0.5", "-0.49"))))
    assert wrong["activation"] == "gelu on the left; no GELU gives the logits of their code"
    assert "at most" in wrong["logits 2x32"]


def test_config_without_bias_and_vocab_size_is_equal_with_a_note(ckpt_path, make_checkout):
    report = verify_against_nanogpt(ckpt_path, make_checkout(OLD_CONFIG))
    assert find_wrong(report) == {}
    assert "right: its GPTConfig does not know 'bias', 'vocab_size'" in report.notes


def test_parameters_that_do_not_fit_are_named(make_checkout, contents, tmp_path):
    contents["model"] = {name: t for name, t in contents["model"].items() if not name.endswith(".bias")}
    del contents["model_args"]["bias"], contents["optimizer"]
    contents["model"]["transformer.wpe.weight"] = contents["model"]["transformer.wpe.weight"][:16].clone()
    contents["model_args"]["block_size"] = 16
    changes = OLD_CONFIG.replace("**asdict(config)", "**{**asdict(config), 'block_size': 32}")
    report = verify_against_nanogpt(save(contents, tmp_path), make_checkout(changes))
    wrong = find_wrong(report)["parameters"]
    assert "only on the right: 'transformer.h.0.ln_1.bias', " in wrong
    assert wrong.endswith("transformer.wpe.weight: shape (16, 32) and (32, 32)")
    assert "were not compared, because the parameters do not fit" in report.notes[-1]


def test_code_that_ties_what_the_checkpoint_does_not_is_named(make_checkout, contents, tmp_path):
    contents["model"]["lm_head.weight"] = contents["model"]["lm_head.weight"] + 1
    wrong = find_wrong(verify_against_nanogpt(save(contents, tmp_path), make_checkout()))
    assert wrong["tying"] == "lm_head is untied and tied"
    assert wrong["tensors"] == "their model does not have the numbers of 'transformer.wte.weight'"


def test_code_that_unties_is_named_though_its_logits_are_equal(ckpt_path, make_checkout):
    assert find_wrong(verify_against_nanogpt(ckpt_path, make_checkout(UNTIED))) == {
        "tying": "lm_head is tied and untied"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("raise ValueError('no such\\n  thing')", r"model\.py: stopped while it computed: .*, got thing; see that it"),
        ("def forward(self, idx, targets=None): return 1 / 0\nGPT.forward = forward", "got ZeroDivisionError: "),
        ("del GPTConfig", "got AttributeError: .*GPTConfig"),
        ("sys.exit(3)", "got exit code 3"),
        ("sys.exit()", "ended early: expected an answer, got none"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "got signal 9, perhaps out of memory"),
    ],
)
def test_code_that_does_not_run_is_reported_in_one_line(ckpt_path, make_checkout, changes, message):
    with pytest.raises(VerifyError, match=message) as caught:
        verify_against_nanogpt(ckpt_path, make_checkout(changes))
    assert "\n" not in str(caught.value)


def test_code_that_does_not_run_is_reported_in_one_line_from_a_process_of_its_own(
    not_forked, ckpt_path, make_checkout
):
    with pytest.raises(
        VerifyError, match=r"model\.py: stopped while it computed: .*, got SystemError: no; see"
    ) as caught:
        verify_against_nanogpt(ckpt_path, make_checkout("raise SystemError('no')"))
    assert "\n" not in str(caught.value)


def test_folder_without_model_py_is_refused(ckpt_path, tmp_path):
    with pytest.raises(VerifyError, match=r"expected a checkout of nanoGPT, got no model\.py in it"):
        verify_against_nanogpt(ckpt_path, tmp_path)


def test_bfloat16_weights_are_computed_in_float32_as_nanogpt_does(ckpt_path, make_checkout, tmp_path):
    NanoGPTLMHeadModel.from_nanogpt_ckpt(ckpt_path, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    report = verify_against_nanogpt(tmp_path / "half", make_checkout())
    assert find_wrong(report) == {}
    assert "left: torch.bfloat16 weights, computed in float32 on both sides" in report.notes


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_demo_checkpoint_equals_nanogpt_itself_bitwise(not_forked):
    report = verify_against_nanogpt(CKPT_PATH, NANOGPT_DIR, gradients=True)
    assert find_wrong(report) == {}
    assert {check.largest_difference for check in report.checks} == {None, 0.0}
    assert json.loads(json.dumps(report.to_json()))["is_equal"] is True


@pytest.mark.nanogpt
@skip_without_nanogpt
def test_demo_checkpoint_read_with_tanh_is_found_by_nanogpt_itself():
    wrong = find_wrong(verify_against_nanogpt(CKPT_PATH, NANOGPT_DIR, activation_function="gelu_new"))
    assert wrong["activation"].startswith("gelu_new and gelu: ")
    assert "logits 2x128" in wrong
