"""Assertions that two trees of plain data and tensors are the same, and that a checkpoint is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hugging_nano_gpt import Checkpoint, ConversionError, write_checkpoint


def assert_same(left: Any, right: Any) -> None:
    """Asserts that two trees have the same types, keys, order and values, and tensors with the same bits."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert torch.equal(as_bytes(left), as_bytes(right))
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for left_item, right_item in zip(left, right, strict=True):
            assert_same(left_item, right_item)
    else:
        assert left == right


def assert_write_refused(checkpoint: Checkpoint, folder: Path, message: str) -> None:
    """Asserts that a checkpoint is refused with a message that starts with the path, and that nothing is written."""
    path = folder / "refused.pt"
    with pytest.raises(ConversionError, match=message) as caught:
        write_checkpoint(checkpoint, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert not path.exists()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
