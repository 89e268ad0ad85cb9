"""The run of nanoGPT's train.py recorded in tests/fixtures/trace, and functions that repeat its updates.

Two checkpoints 100 updates apart, and every offset, learning rate and loss between them (2 micro-steps an update).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hugging_nano_gpt import NanoGPTLMHeadModel, read_checkpoint
from hugging_nano_gpt.training import (
    NanoGPTSchedule,
    NanoGPTTrainer,
    TokenDataset,
    collate_windows,
    training_arguments_from_nanogpt,
)

from .tiny import FIXTURES_DIR

TRACE_DIR = FIXTURES_DIR / "trace"
START_PATH = TRACE_DIR / "ckpt_100.pt"
STEPS: list[dict[str, Any]] = json.loads((TRACE_DIR / "trace.json").read_text())["steps"]
START, END = (read_checkpoint(TRACE_DIR / f"ckpt_{number}.pt") for number in (100, 200))
CONFIG = START.training_state.config
BLOCK_SIZE = CONFIG["block_size"]

# The difference is 0.0 on the machine and torch that made the trace. Other processors, other builds and several
# processes add in another order.
TOLERANCE = 1e-6


def load_start() -> NanoGPTLMHeadModel:
    """Loads the model as it was after 100 updates."""
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(START_PATH)


def record_losses(model: nn.Module) -> list[float]:
    """Returns a list to which every later forward pass appends its loss."""
    losses: list[float] = []
    model.register_forward_hook(lambda module, args, outputs: losses.append(outputs.loss.item()))
    return losses


def list_offsets(steps: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Lists the offsets of each micro-step."""
    return [micro["offsets"] for step in steps for micro in step["micro"]]


def make_trainer(
    folder: Path,
    model: NanoGPTLMHeadModel,
    steps: Sequence[Mapping[str, Any]],
    trainer_class: type[NanoGPTTrainer] = NanoGPTTrainer,
    **settings: Any,
) -> NanoGPTTrainer:
    """Makes a trainer that continues from the start with the recorded batches of some updates."""
    config = {**CONFIG, "max_iters": 100 + len(steps), "out_dir": str(folder)}
    quiet = {"save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True}
    args, _ = training_arguments_from_nanogpt(config, iter_num=100, **{**quiet, **settings})
    return trainer_class(
        model,
        args,
        TokenDataset(TRACE_DIR / "train.bin", BLOCK_SIZE),
        TokenDataset(TRACE_DIR / "val.bin", BLOCK_SIZE),
        training_state=START.training_state,
        train_batch_sampler=list_offsets(steps),
    )


def train_by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[Mapping[str, Any]],
    rows: slice = slice(None),
    config: Mapping[str, Any] = CONFIG,
) -> None:
    """Makes recorded updates in nanoGPT's plain loop, on all rows of each batch or on one process's share of them."""
    dataset = TokenDataset(TRACE_DIR / "train.bin", BLOCK_SIZE)
    schedule = NanoGPTSchedule(optimizer, config, iter_num=steps[0]["iter"])
    for step in steps:
        for micro in step["micro"]:
            batch = collate_windows([dataset[offset] for offset in micro["offsets"][rows]])
            batch = {name: tensor.to(next(model.parameters()).device) for name, tensor in batch.items()}
            (model(**batch).loss / len(step["micro"])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CONFIG["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


def find_largest_difference(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Returns the largest difference of two sets of tensors with the same names."""
    assert left.keys() == right.keys()
    return torch.stack([(left[name] - right[name]).abs().max() for name in left]).max().item()  # NaN if any is


def flatten_moments(moments: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns moments in one dict, with names like `exp_avg of lm_head.weight`."""
    return {f"{key} of {name}": value for name, kept in moments.items() for key, value in kept.items()}
