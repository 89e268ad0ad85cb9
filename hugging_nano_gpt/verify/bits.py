"""Tensors as bits: 0.0 is not -0.0, and one NaN is not another."""

import math

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def have_same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tells whether two tensors have the same dtype, shape and bits."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(_view_bits(left), _view_bits(right))


def measure_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Returns the largest difference of two tensors of one shape, infinite where only one is NaN or infinite."""
    return float(_subtract(left, right).max()) if left.numel() else 0.0


def describe_difference(left: torch.Tensor, right: torch.Tensor) -> str:
    """Says how many numbers of two tensors of one shape and dtype differ, and shows the two furthest apart."""
    is_other = _view_bits(left) != _view_bits(right)
    # Where the difference is 0, as of -0.0 and 0.0, the first that differs.
    furthest = torch.where(is_other, _subtract(left, right), -1.0).argmax()
    index = [int(i) for i in torch.unravel_index(furthest, left.shape)]
    values = _describe_pair(left[tuple(index)], right[tuple(index)])
    return f"{int(is_other.sum()):,} of {left.numel():,} numbers differ, most at {index}: {values}"


def _view_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


def _subtract(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    left, right = (t.detach() if t.dtype == torch.float64 else t.detach().float() for t in (left, right))
    difference = (left - right).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return difference.masked_fill_((left == right) | (left.isnan() & right.isnan()), 0.0)


def _describe_pair(left: torch.Tensor, right: torch.Tensor) -> str:
    texts = [f"{number.item():.9g}" for number in (left, right)]
    if texts[0] == texts[1]:
        mask = 2 ** (8 * left.element_size()) - 1
        texts = [f"{text} ({int(_view_bits(n)) & mask:#x})" for text, n in zip(texts, (left, right), strict=True)]
    return " and ".join(texts)
