"""Faster products with the weights where a CPU decodes: oneDNN's in place of BLAS's, and float16 in float32.

They are chosen for the thread that decodes, as long as it does: no module is changed, so other threads, copies and
training keep nanoGPT's own arithmetic. This file travels with saved models as remote code.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# Rows up to which oneDNN's float32 kernel takes the place of BLAS, and from which float16 is computed in float32.
# Measured on 2 AVX512 cores at widths 768 to 50304: BLAS reads 16 GB/s of weights for 1 row and 9 for 8, oneDNN 35 and
# 26; float16 reads 40 GB/s for 1 row, and its time then grows with the rows.
_FEW_ROWS = 32
_MANY_HALF_ROWS = 8


def choose_linear(model: Any, n_rows: int) -> Linear:
    """Returns what computes inputs (n_rows, I) @ weight (O, I).T + bias fastest; on a GPU, torch's own."""
    return _choose(_measure_bytes(model), model.dtype, n_rows)


def use_kernels(model: Any) -> Callable[[], AbstractContextManager]:
    """Returns a context in which this thread's Linear modules compute by the faster kernels."""
    n_bytes = 0 if has_compiled_parts(model) else _measure_bytes(model)
    has_others = any(_choose(n_bytes, model.dtype, n) is not nn.functional.linear for n in (1, _MANY_HALF_ROWS))
    return (lambda: _Kernels(n_bytes)) if has_others else nullcontext


def has_compiled_parts(model: nn.Module) -> bool:
    """Tells whether torch.compile has a part of the model."""
    parts = (m for m in model.modules() if m._compiled_call_impl is not None or "_orig_mod" in m._modules)
    return "forward" in vars(model) or next(parts, None) is not None


class _Kernels(TorchFunctionMode):
    """Takes the place of torch's linear in one thread, where weights are plain tensors and no gradient is wanted."""

    def __init__(self, n_bytes: int):
        super().__init__()
        self.n_bytes = n_bytes

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            inputs, weight = args[0], args[1]
            is_plain = type(inputs) is torch.Tensor and type(weight) in (torch.Tensor, nn.Parameter)
            if is_plain and inputs.dtype == weight.dtype and not torch.is_autocast_enabled("cpu"):
                func = _choose(self.n_bytes, weight.dtype, inputs.numel() // inputs.shape[-1])
        return func(*args, **(kwargs or {}))


def _measure_bytes(model: Any) -> int:
    """Returns the bytes of the weights; 0 where torch's own kernels are the only ones."""
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if model.device.type != "cpu" or not has_onednn or torch.is_autocast_enabled("cpu"):
        return 0
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _count_cached_bytes() -> int:
    """Returns the bytes of a model for which BLAS is faster: in the processor's cache a call of oneDNN costs 11 us.

    With one AVX2 thread BLAS is a tenth faster at 42 MB too, and a tenth slower at 498 MB for 8 rows. With two threads
    oneDNN is faster for 1 row, 1.09 times at 42 MB and 1.31 times at 498 MB, and as fast for 8 rows at 42 MB.
    """
    is_slow = torch.get_num_threads() == 1 and torch.backends.cpu.get_cpu_capability() != "AVX512"
    return (256 if is_slow else 32) * 2**20


def _choose(n_bytes: int, dtype: torch.dtype, n_rows: int) -> Linear:
    if n_bytes > _count_cached_bytes() and dtype == torch.float32 and n_rows <= _FEW_ROWS:
        return _apply_onednn
    if n_bytes > 0 and dtype == torch.float16 and n_rows >= _MANY_HALF_ROWS:
        return _apply_in_float32
    return nn.functional.linear


def _apply_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, "none", [], "")


def _apply_in_float32(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = inputs.float()  # in pieces, because a fresh float32 lm_head of 154 MB costs more than the product
    outputs = torch.cat([_apply_onednn(rows, piece.float()) for piece in weight.split(2048)], dim=-1)
    return (outputs if bias is None else outputs + bias).to(inputs.dtype)


__all__ = ["choose_linear", "has_compiled_parts", "use_kernels"]
