"""Verifies a model against a checkout of nanoGPT, which computes the other side in a separate process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..convert.source import load_source
from ..convert.tensors import get_model_args
from ..errors import VerifyError, list_some
from ..model.configuration_nano_gpt import ACTIVATION_FUNCTIONS
from . import computing
from .compare import Tensors, compare_numbers, compare_pair, list_unshared
from .computing import Batches
from .report import Check, VerifyReport
from .sides import Side, make_batches

# Largest difference that counts as equal, relative to the largest number: 100 times float32's eps. Measured with toy
# models and all versions of nanoGPT: the same function with its sums in another order differs by at most 5 eps, the
# wrong GELU by at least 470.
_TOLERANCE = 100 * torch.finfo(torch.float32).eps


def verify_against_nanogpt(
    path: str | os.PathLike[str],
    nanogpt_dir: str | os.PathLike[str],
    *,
    gradients: bool = False,
    **kwargs: Any,
) -> VerifyReport:
    """Compares a model with what the model.py of a nanoGPT checkout computes from the same weights.

    The checkout's code runs in a separate process, with as many threads as this one. It gets the weights that we read,
    and never sees the checkpoint. Today's nanoGPT is equal bit for bit. An older or a changed one may compute the same
    function with its sums in another order, so differences of up to 1.2e-5 of the largest number count as equal, and
    the report says how large they are. Both sides compute in float32, as nanoGPT does for a checkpoint of any dtype.

    Args:
        path: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or hub id.
        nanogpt_dir: Folder with nanoGPT's model.py, of any version.
        gradients, **kwargs: As for verify_models.

    Raises:
        CheckpointError: If the model cannot be loaded.
        VerifyError: If there is no model.py, or it does not run; the message has the last line that it printed.
    """
    folder = Path(nanogpt_dir).resolve()
    if not (folder / "model.py").is_file():
        raise VerifyError(f"{nanogpt_dir}: expected a checkout of nanoGPT, got no model.py in it; give its folder")
    side = Side(load_source(path, attn_implementation="sdpa", **kwargs))
    notes, config = side.list_notes("left"), side.model.config
    if side.model.dtype != torch.float32:
        notes.append(f"left: {side.model.dtype} weights, computed in float32 on both sides")
        side.model.float()
    batches = make_batches(config.vocab_size, config.block_size)
    answer, theirs = _run_theirs(side, folder, batches, gradients)
    checks = _check_answer(answer, side)
    if answer["unknown_args"]:
        notes.append(f"right: its GPTConfig does not know {list_some(answer['unknown_args'])}")
    if theirs:
        ours = side.compute(batches, gradients)
        checks.append(_compare_activation(side, batches, ours, theirs))
        checks += compare_numbers(ours, theirs, _TOLERANCE)
    else:
        notes.append("logits, loss, gradients and tokens were not compared, because the parameters do not fit")
    return VerifyReport(side.label, f"{folder / 'model.py'} with the same weights", tuple(checks), tuple(notes))


def _run_theirs(
    side: Side, folder: Path, batches: Batches, with_gradients: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Runs the checkout's code; returns what it found about the parameters, and the numbers that it computed."""
    tensors = {f"model/{name}": tensor for name, tensor in side.model.state_dict().items()}
    if side.is_tied:
        del tensors["model/lm_head.weight"]  # safetensors stores no tensor twice
    for i, (idx, targets) in enumerate(batches):
        tensors |= {f"idx/{i}": idx, f"targets/{i}": targets}
    request = {
        "model_args": get_model_args(side.model.config),
        "is_tied": side.is_tied,
        "n_batches": len(batches),
        "n_threads": torch.get_num_threads(),
        "with_gradients": with_gradients,
    }
    with tempfile.TemporaryDirectory(prefix="hugging-nano-gpt-") as exchange:
        request_path, answer_path = Path(exchange, "request.safetensors"), Path(exchange, "answer.safetensors")
        try:
            save_file(tensors, request_path, {"request": json.dumps(request)})
        except (OSError, SafetensorError) as error:
            raise VerifyError(f"{exchange}: cannot be written: {error}; make room in the temporary folder") from error
        _run_script(folder, request_path, answer_path)
        try:
            with safe_open(answer_path, framework="pt") as file:
                answer = json.loads(file.metadata()["answer"])
                numbers = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a dict
        except (OSError, SafetensorError) as error:
            raise VerifyError(
                f"{folder / 'model.py'}: ended early: expected an answer, got none: {error}; see whether it exits"
            ) from error
    return answer, numbers if "tokens" in numbers else {}


def _run_script(folder: Path, request_path: Path, answer_path: Path) -> None:
    # With -P, the modules in the script's folder are not importable. No __pycache__ is written into the checkout.
    command = [sys.executable, "-P", computing.__file__, *map(str, (folder, request_path, answer_path))]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(  # noqa: S603  # the user asked for their own code to be run
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit code {done.returncode}"
    if done.returncode < 0:
        reason = f"signal {-done.returncode}, perhaps out of memory"
    raise VerifyError(
        f"{folder / 'model.py'}: stopped while it computed: expected logits from its GPT(GPTConfig(...)), got "
        f"{reason}; see that it runs on its own"
    )


def _check_answer(answer: dict[str, Any], side: Side) -> list[Check]:
    """Compares the parameters of the checkout's model with ours."""
    faults = list_unshared(answer["unexpected"], answer["missing"])
    faults += [f"{name}: shape {tuple(one)} and {tuple(other)}" for name, (one, other) in answer["shapes"].items()]
    checks = [Check("parameters", not faults, "; ".join(faults) or f"the same {len(side.model.state_dict())} names")]
    if "changed" not in answer:
        return checks
    ours, theirs = ("tied" if is_tied else "untied" for is_tied in (side.is_tied, answer["is_tied"]))
    checks.append(Check("tying", ours == theirs, f"lm_head is {ours}" + f" and {theirs}" * (ours != theirs)))
    changed = answer["changed"]
    detail = f"their model does not have the numbers of {list_some(changed)}" if changed else "bitwise taken over"
    checks.append(Check("tensors", not changed, detail))
    return checks


def _compare_activation(side: Side, batches: Batches, ours: Tensors, theirs: Tensors) -> Check:
    """Finds out by the logits whether both models compute the same GELU, and otherwise which one theirs computes."""
    longest = next(reversed([name for name in ours if name.startswith("logits/")]))
    current = side.model.config.activation_function
    if compare_pair(longest, ours[longest], theirs[longest], _TOLERANCE).is_equal:
        return Check("activation", True, f"{current}, as the logits show")
    for name in ACTIVATION_FUNCTIONS:
        with side.computing_with(name):
            logits = side.compute(batches[-1:], False)[longest]
        if compare_pair(longest, logits, theirs[longest], _TOLERANCE).is_equal:
            detail = f"{current} and {name}: with {name} on the left as well, the logits are equal"
            return Check("activation", False, detail)
    return Check("activation", False, f"{current} on the left; no GELU gives the logits of their code")
