"""Comparing what two models compute: logits and loss of each batch, gradients, greedy tokens."""

from collections.abc import Mapping

import torch

from ..formats.check import join_some, list_some
from .bits import describe_difference, have_same_bits, measure_difference
from .report import Check

Numbers = Mapping[str, torch.Tensor]


def compare_numbers(left: Numbers, right: Numbers, relative_tolerance: float = 0.0) -> list[Check]:
    """Compares what compute_numbers computed from the same batches.

    Args:
        left, right: The numbers by name; logits of one vocabulary.
        relative_tolerance: Largest difference accepted, as a part of the largest number on the left in magnitude;
            0.0 asks for the same bits. Of gradients ten times as much is accepted: they collect the roundings of two
            passes, and a wrong one is wrong by far more.
    """
    checks = []
    for name in left:
        kind, _, size = name.partition("/")
        if kind in ("logits", "loss"):
            checks.append(_compare(f"{kind} {size}", left[name], right[name], relative_tolerance))
    if any(name.startswith("gradient/") for name in left):
        checks.append(_compare_gradients(left, right, 10 * relative_tolerance))
    return [*checks, _compare_tokens(left["tokens"], right["tokens"])]


def is_within(left: torch.Tensor, right: torch.Tensor, relative_tolerance: float) -> bool:
    """Tells whether two tensors of numbers are equal within a tolerance relative to the largest on the left."""
    return _compare("", left, right, relative_tolerance).is_equal


def _compare(name: str, left: torch.Tensor, right: torch.Tensor, relative_tolerance: float) -> Check:
    if have_same_bits(left, right):
        value = f": {left.item():.4f}" if left.ndim == 0 else ""
        return Check(name, True, f"bitwise equal{value}", 0.0, 0.0)
    if left.shape != right.shape:
        return Check(name, False, f"shape {tuple(left.shape)} and {tuple(right.shape)}")
    difference = measure_difference(left, right)
    tolerance = relative_tolerance * float(left.abs().max())
    if difference <= tolerance:
        detail = f"equal within {tolerance:.2g} (largest difference {difference:.2g})"
        return Check(name, True, detail, difference, tolerance)
    accepted = f"at most {tolerance:.2g} accepted" if relative_tolerance else "the same bits expected"
    where = f"; {describe_difference(left, right)}" if left.dtype == right.dtype else ""
    return Check(name, False, f"largest difference {difference:.2g}, {accepted}{where}", difference, tolerance)


def _compare_gradients(left: Numbers, right: Numbers, relative_tolerance: float) -> Check:
    sides = [[name for name in side if name.startswith("gradient/")] for side in (left, right)]
    uncommon = sorted({name.removeprefix("gradient/") for name in set(sides[0]) ^ set(sides[1])})
    common = [name for name in sides[0] if name in right]
    checks = [_compare(name.removeprefix("gradient/"), left[name], right[name], relative_tolerance) for name in common]
    faults = [f"only on one side: {list_some(uncommon)}"] if uncommon else []
    faults += [f"{check.name}: {check.detail}" for check in checks if not check.is_equal]
    largest = max((check.largest_difference or 0.0 for check in checks), default=None)
    tolerance = max((check.tolerance or 0.0 for check in checks), default=None)
    if faults:
        return Check("gradients", False, join_some(faults), largest, tolerance)
    bitwise = all(have_same_bits(left[name], right[name]) for name in common)
    detail = "bitwise equal" if bitwise else f"equal within {tolerance:.2g} (largest difference {largest:.2g})"
    return Check("gradients", True, f"{len(common)} tensors, {detail}", largest, tolerance)


def _compare_tokens(left: torch.Tensor, right: torch.Tensor) -> Check:
    n_rows, n_tokens = left.shape
    if torch.equal(left, right):
        return Check("greedy tokens", True, f"{n_rows} rows of {n_tokens} tokens equal")
    row, column = (int(i) for i in (left != right).nonzero()[0])
    detail = f"row {row} differs from token {column} on: {int(left[row, column])} and {int(right[row, column])}"
    return Check("greedy tokens", False, detail)
