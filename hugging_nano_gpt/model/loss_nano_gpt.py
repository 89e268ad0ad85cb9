"""nanoGPT's loss, for the labels of Transformers, for targets that are already shifted, and in chunks.

Transformers' ForCausalLMLoss converts the logits to float32 first. That costs memory and time, and gives other
numbers: under autocast on CUDA, nanoGPT's log-probabilities are rounded to the dtype of the logits. This file travels
with saved models as remote code.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def compute_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, **kwargs: Any
) -> torch.Tensor:
    """Computes nanoGPT's cross-entropy, in nats.

    Half-precision logits without autocast are converted to float32 here too: nanoGPT always has float32 weights.

    Args:
        logits: (B, T, V) or (N, V).
        targets: (B * T) or (N) int64, from find_targets; -100 is ignored.
        num_items_in_batch: What the sum of all losses is divided by. Defaults to the number of targets.
        **kwargs: Other arguments of loss functions, which are ignored.
    """
    if logits.dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(logits.device.type):
        logits = logits.float()
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.to(logits.device)
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(logits, targets)
    return _divide(nn.functional.cross_entropy(logits, targets, reduction="sum"), num_items_in_batch)


def compute_chunked_loss(
    head: Any,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    chunk_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Computes the same loss in chunks, so that only the logits of one chunk are in memory.

    Args:
        head: The module that computes logits (N, V) of hidden states (N, C), with its adapters, hooks and sharding.
        hidden_states: (B, T, C).
        targets: (B * T) int64.
        chunk_size: The number of tokens in a chunk.
        num_items_in_batch, **kwargs: See compute_loss.
    """

    def sum_losses(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return compute_loss(head(rows), targets, num_items_in_batch=1)

    rows, targets = hidden_states.flatten(0, 1), targets.to(hidden_states.device)
    if _is_plain(head) and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        # torch computes the gradients of a chunk in the forward pass, so its logits are computed once
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, acc_policy="compact")
        loss = nn.functional.linear_cross_entropy(rows, head.weight, targets, reduction="sum", options=options)
        if loss.requires_grad:
            loss.register_hook(_refuse_second_derivatives)
    else:
        # checkpoint frees the logits of a chunk, and computes them again in the backward pass
        pieces = zip(rows.split(chunk_size), targets.split(chunk_size), strict=True)
        loss = torch.stack([checkpoint(sum_losses, *piece, use_reentrant=False) for piece in pieces]).sum()
    return _divide(loss, (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def find_targets(
    labels: torch.Tensor | None, shift_labels: torch.Tensor | None, ignore_index: int = -100, **kwargs: Any
) -> torch.Tensor:
    """Returns the next token of each position, (B * T) int64, or -100.

    Args:
        labels, shift_labels: See NanoGPTLMHeadModel.forward; labels are ignored if both are given.
        ignore_index: Another number that is ignored.
        **kwargs: Other arguments of loss functions, which are ignored.
    """
    if shift_labels is None:
        assert labels is not None  # forward calls this with one of the two
        # position t predicts token t + 1
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = ignore_minus_one(shift_labels).reshape(-1)
    return targets if ignore_index == -100 else targets.masked_fill(targets == ignore_index, -100)


def ignore_minus_one(labels: Any) -> Any:
    """Replaces nanoGPT's ignore index, -1, by Transformers', -100; None stays None."""
    return None if labels is None else labels.masked_fill(labels == -1, -100)


def _is_plain(head: Any) -> bool:
    """Returns whether torch's linear_cross_entropy computes what the head does; it is faster on a CPU (measured)."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return (
        hasattr(nn, "LinearCrossEntropyOptions")  # since torch 2.13
        and not torch.compiler.is_compiling()  # which it would interrupt
        and type(head) is nn.Linear
        and not (any(hooks) or "forward" in vars(head))
        and type(head.weight) is nn.Parameter
        and (head.weight.device.type, head.weight.dtype) == ("cpu", torch.float32)
    )


def _refuse_second_derivatives(gradient: torch.Tensor) -> None:
    """Raises RuntimeError in a backward pass that builds a graph, from which the chunks would be missing."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "loss_chunk_size on a CPU: expected no create_graph=True, got it; set loss_chunk_size to None"
        )


def _divide(loss: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    return loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
