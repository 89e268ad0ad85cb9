"""Compares ours with nanoGPT's architecture in plain torch (tests/helpers/reference.py), side by side on the device.

On a GPU some sums are added in another order in each run, so the reference differs from itself between runs. Ours may
differ from the reference by no more than that. With torch's deterministic algorithms neither differs.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hugging_nano_gpt import NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.training import make_optimizer, read_optimizer

from .probe import (
    Outcome,
    Probe,
    Setting,
    deterministic,
    make_batch,
    make_ours,
    make_pair,
    measure_difference,
    measure_differences,
    run_apart,
)

LIMIT_S = 150.0
REFERENCE_RUNS = 4
MOST_OF_YARDSTICK = 2.0  # the largest difference of a few runs is itself random
ADAMW = {"learning_rate": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99}
ADAMW_STEPS = {"full": 100, "toy": 20}

# The recorded run on CPUs, with one thread instead of two: 4e-7. A GPU computes exp, erf and sums differently.
TRACE_TOLERANCE = 1e-3

Results = dict[str, torch.Tensor]
Run = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def probe_precision(setting: Setting, dtype: torch.dtype) -> Outcome:
    """Compares logits, loss and gradients with dropout, by default and with deterministic algorithms."""
    ours, reference = make_pair(setting, dropout=0.1)
    batch = make_batch(setting, 4, ours.config.block_size, ours.config.vocab_size)
    usual = compare(setting, dtype, batch, (ours, run_ours(ours)), (reference, run_reference(reference)))
    with deterministic():
        exact = compare(setting, dtype, batch, (ours, run_ours(ours)), (reference, run_reference(reference)))
    is_same = all(exact[f"{kind}: ours to the reference"] == 0.0 for kind in ("logits", "loss", "gradients"))
    return Outcome(
        is_within(usual) and is_same,
        "no further from the reference than it is from itself; equal to the last bit with deterministic algorithms",
        {**usual, "bitwise with deterministic algorithms": is_same},
    )


def probe_compiled(setting: Setting) -> Outcome:
    """Compares both compiled; they may also differ as much as compiling changes the reference."""
    ours, reference = make_pair(setting, n_layer=2)
    batch = make_batch(setting, 4, ours.config.block_size, ours.config.vocab_size)
    backend = "inductor" if setting.is_cuda else "eager"  # compiling C++ takes minutes, and is tested on CPUs
    runs = [torch.compile(run, backend=backend) for run in (run_ours(ours), run_reference(reference))]
    figures = compare(setting, torch.bfloat16, batch, (ours, runs[0]), (reference, runs[1]))
    plain = compute(setting, torch.bfloat16, batch, reference, run_reference(reference))
    compiled = compute(setting, torch.bfloat16, batch, reference, runs[1])
    for kind, difference in compare_results(compiled, plain).items():
        figures[f"{kind}: reference, compiled to not compiled"] = difference
    return Outcome(
        is_within(figures),
        "compiled, no further from the compiled reference than compiling moves the reference",
        figures,
    )


def compare(
    setting: Setting,
    dtype: torch.dtype,
    batch: tuple[torch.Tensor, ...],
    ours: tuple[nn.Module, Run],
    reference: tuple[nn.Module, Run],
) -> dict[str, Any]:
    """Returns the differences of ours from the reference, and of the reference from itself, by kind of result."""
    first, *others = [compute(setting, dtype, batch, *reference) for _ in range(REFERENCE_RUNS)]
    found = compare_results(compute(setting, dtype, batch, *ours), first)
    again = [compare_results(other, first) for other in others]
    figures: dict[str, Any] = {}
    for kind, difference in found.items():
        figures[f"{kind}: ours to the reference"] = difference
        figures[f"{kind}: the reference to itself"] = max(each[kind] for each in again)
    return figures


def compute(
    setting: Setting, dtype: torch.dtype, batch: tuple[torch.Tensor, ...], model: nn.Module, run: Run
) -> Results:
    """Returns the logits, the loss and the gradients by name of one pass with one seed."""
    torch.manual_seed(5)
    device_type = torch.device(setting.device).type
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, loss = run(*batch)
    loss.backward()
    results = {"logits": logits.detach(), "loss": loss.detach()}
    results |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return results


def compare_results(found: Results, expected: Results) -> dict[str, float]:
    """Returns the differences of the logits, the loss, and the largest of the gradients."""
    gradients = [{k: v for k, v in each.items() if k not in ("logits", "loss")} for each in (found, expected)]
    return {
        "logits": measure_difference(found["logits"], expected["logits"]),
        "loss": measure_difference(found["loss"], expected["loss"]),
        "gradients": measure_differences(*gradients),
    }


def is_within(figures: dict[str, Any]) -> bool:
    """Returns whether ours is as close to the reference as the reference is to itself, or to itself compiled."""
    for kind in ("logits", "loss", "gradients"):
        run_to_run = MOST_OF_YARDSTICK * figures[f"{kind}: the reference to itself"]
        by_compiling = figures.get(f"{kind}: reference, compiled to not compiled", 0.0)
        if not figures[f"{kind}: ours to the reference"] <= max(run_to_run, by_compiling):
            return False
    return True


def run_ours(model: nn.Module) -> Run:
    """Makes a function of idx and targets that returns our logits and loss."""

    def run(idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model(idx, shift_labels=targets)
        return outputs.logits, outputs.loss

    return run


def run_reference(model: nn.Module) -> Run:
    """Makes the same function for the reference."""
    return lambda idx, targets: model(idx, targets)


def probe_adamw(setting: Setting) -> Outcome:
    """Trains both with fused AdamW from one seed, by default and with deterministic algorithms."""
    usual = [train(setting, index) for index in (0, 1, 1)]  # ours, the reference, the reference again
    with deterministic():
        exact = [train(setting, index) for index in (0, 1)]
    figures = {
        "parameters: ours to the reference": measure_differences(usual[0], usual[1]),
        "parameters: the reference to itself": measure_differences(usual[2], usual[1]),
        "bitwise with deterministic algorithms": measure_differences(exact[0], exact[1]) == 0.0,
    }
    return Outcome(
        figures["bitwise with deterministic algorithms"]
        and figures["parameters: ours to the reference"]
        <= 10 * MOST_OF_YARDSTICK * figures["parameters: the reference to itself"],  # differences grow with each step
        "after the same steps with dropout, the reference's parameters",
        figures,
    )


def train(setting: Setting, index: int) -> Results:
    """Trains ours (0) or the reference (1) on the same batches; returns the parameters."""
    sizes = setting.sizes("shakespeare")
    model = make_pair(setting, scale=1.0, **sizes, dropout=0.2)[index]
    run = (run_ours, run_reference)[index](model)
    optimizer = make_optimizer(model, ADAMW) if index == 0 else make_plain_optimizer(model, setting.is_cuda)
    torch.manual_seed(7)
    for step in range(setting.choose(ADAMW_STEPS["full"], ADAMW_STEPS["toy"])):
        batch = make_batch(setting, setting.choose(64, 4), sizes["block_size"], sizes["vocab_size"], seed=step)
        run(*batch)[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def make_plain_optimizer(model: nn.Module, is_fused: bool) -> torch.optim.AdamW:
    """Makes nanoGPT's optimizer in plain torch."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (ADAMW["beta1"], ADAMW["beta2"])
    return torch.optim.AdamW(groups, lr=ADAMW["learning_rate"], betas=betas, **({"fused": True} if is_fused else {}))


def probe_trace(setting: Setting) -> Outcome:
    """Repeats the recorded updates of nanoGPT's train.py on the device, from one of its checkpoints to the next."""
    from tests.helpers.trace import CONFIG, END, START, STEPS, find_largest_difference, load_start, train_by_hand

    steps = STEPS[: setting.choose(len(STEPS), 10)]
    figures: dict[str, Any] = {}
    for name, state in (("", START.training_state.optimizer), ("without moments, ", None)):
        model = load_start().to(setting.device).train()
        losses: list[torch.Tensor] = []
        model.register_forward_hook(lambda module, args, outputs, losses=losses: losses.append(outputs.loss.detach()))
        train_by_hand(model, make_optimizer(model, CONFIG, state), steps)
        recorded = torch.tensor([micro["loss"] for step in steps for micro in step["micro"]])
        difference = (torch.stack(losses).cpu() - recorded).abs().max()
        figures[f"{name}largest difference of a loss"] = float(difference)
        if len(steps) == len(STEPS):
            found = {key: value.cpu() for key, value in model.state_dict().items()}
            figures[f"{name}of a parameter"] = find_largest_difference(found, END.state_dict)
    is_true = figures["largest difference of a loss"] <= TRACE_TOLERANCE
    can_fail = figures["without moments, largest difference of a loss"] > TRACE_TOLERANCE
    return Outcome(
        is_true and can_fail,
        f"{len(steps)} recorded updates of train.py, within {TRACE_TOLERANCE:g} in the loss",
        figures,
    )


def probe_checkpoint(setting: Setting) -> Outcome:
    """Writes a model that was trained on the device, reads it back there, and continues training both."""
    from tests.helpers.trace import CONFIG, START, STEPS, load_start, train_by_hand

    with deterministic(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt.pt"
        model = load_start().to(setting.device).train()
        optimizer = make_optimizer(model, CONFIG, START.training_state.optimizer)
        train_by_hand(model, optimizer, STEPS[:2])
        model.to_nanogpt_ckpt(path, optimizer=read_optimizer(optimizer, model), iter_num=102)

        back = NanoGPTLMHeadModel.from_nanogpt_ckpt(path).to(setting.device).train()
        is_same = measure_differences(dict(back.named_parameters()), dict(model.named_parameters())) == 0.0
        resumed = make_optimizer(back, CONFIG, read_checkpoint(path).training_state.optimizer)
        train_by_hand(model, optimizer, STEPS[2:4])
        train_by_hand(back, resumed, STEPS[2:4])
        goes_on = measure_differences(dict(back.named_parameters()), dict(model.named_parameters())) == 0.0
    figures = {"every tensor came back": is_same, "the next updates are the same": goes_on}
    return Outcome(is_same and goes_on, "there and back to the last bit, and on as if nothing had happened", figures)


def probe_positions(setting: Setting) -> Outcome:
    """Passes positions past the table: too many tokens, then explicit positions, which a GPU does not check."""
    if setting.is_cuda and setting.has_children:  # a device-side assert would stop all other probes
        figures = run_apart(try_positions_silently, setting)
    elif setting.is_cuda:
        figures = {"too many tokens": try_forward(setting, is_explicit=False), "explicit positions": "not tried"}
    else:
        figures = try_positions(setting)
    is_true = figures["too many tokens"].startswith("ValueError: ") and "returned" not in figures["explicit positions"]
    return Outcome(
        is_true, "too many tokens are an error of ours, and no position past the table gives numbers", figures
    )


def try_positions_silently(setting: Setting) -> dict[str, str]:
    """Does this in its own process, without the line that the GPU prints for each thread of a failed assertion."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # stdout and stderr, at the level of the system
        os.dup2(nowhere, stream)
    return try_positions(setting)


def try_positions(setting: Setting) -> dict[str, str]:
    """Returns a description of what happens."""
    return {
        "too many tokens": try_forward(setting, is_explicit=False),
        "explicit positions": try_forward(setting, is_explicit=True),
    }


def try_forward(setting: Setting, is_explicit: bool) -> str:
    """Returns the error that a forward pass past the table raises."""
    model = make_ours(setting.sizes("shakespeare")).to(setting.device).eval()
    length = model.config.block_size + (0 if is_explicit else 1)
    idx = torch.zeros(1, length, dtype=torch.int64, device=setting.device)
    positions = {"position_ids": torch.arange(1, length + 1, device=setting.device)[None]} if is_explicit else {}
    try:
        with torch.no_grad():
            model(idx, **positions)
        setting.synchronize()
    except Exception as error:
        with contextlib.suppress(Exception):
            setting.synchronize()
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return "returned numbers"


PROBES: dict[str, Probe] = {
    "float32": partial(probe_precision, dtype=torch.float32),
    "bfloat16 autocast": partial(probe_precision, dtype=torch.bfloat16),
    "adamw": probe_adamw,
    "recorded run": probe_trace,
    "checkpoint": probe_checkpoint,
    "torch.compile": probe_compiled,
    "positions past the table": probe_positions,
}
