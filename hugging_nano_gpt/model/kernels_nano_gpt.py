"""Faster products with the weights where a CPU decodes: BLAS's on all threads, oneDNN's, and float16 in float32.

They are chosen for the thread that decodes, as long as it does: no module is changed, so other threads, copies and
training keep nanoGPT's own arithmetic. This file travels with saved models as remote code.

Shapes: N rows, I inputs, O outputs.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# Rows up to which other float32 kernels take the place of torch's, and from which float16 is computed in float32.
# Measured at widths 768 to 50304. On 2 AVX512 cores BLAS reads 16 GB/s of weights for 1 row and 9 for 8, oneDNN 35 and
# 26; float16 reads 40 GB/s for 1 row, and its time then grows with the rows. On 2 AVX2 cores BLAS reads 14 GB/s for 1
# row and 6 for 8, oneDNN 18 and 10, and BLAS on both threads 26 and 11.
_FEW_ROWS = 32
_MANY_HALF_ROWS = 8

# Bytes of a model up to which BLAS is faster than oneDNN, whose call costs 11 us: it is in the processor's cache.
_CACHED_BYTES = 32 * 2**20
# Numbers of a weight from which threads share its product: below, waking the other thread costs more (measured, AVX2).
_SHARED_SIZE = 2**16


def choose_linear(model: Any, n_rows: int) -> Linear:
    """Returns what computes inputs (n_rows, I) @ weight (O, I).T + bias fastest; on a GPU, torch's own."""
    return _choose(_measure_bytes(model), model.dtype, n_rows)


def bind_linear(apply: Linear, module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what applies a Linear to inputs (N, I) by the chosen product; its weight is looked up only now."""
    weight, bias = module.weight, module.bias
    return _share(weight, bias) if apply is _apply_shared else lambda inputs: apply(inputs, weight, bias)


def use_kernels(model: Any) -> Callable[[], AbstractContextManager]:
    """Returns a context in which this thread's Linear modules compute by the faster kernels."""
    n_bytes = 0 if has_compiled_parts(model) else _measure_bytes(model)
    # The mode costs a call in Python for each of torch's, which is more than sharing gains in a small model.
    is_small = model.dtype == torch.float32 and n_bytes <= _CACHED_BYTES
    has_others = any(_choose(n_bytes, model.dtype, n) is not nn.functional.linear for n in (1, _MANY_HALF_ROWS))
    return (lambda: _Kernels(n_bytes)) if has_others and not is_small else nullcontext


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


def _choose(n_bytes: int, dtype: torch.dtype, n_rows: int) -> Linear:
    if n_bytes > 0 and dtype == torch.float32 and n_rows <= _FEW_ROWS:
        if _is_blas_shared():
            return _apply_shared
        if n_bytes > _CACHED_BYTES:
            return _apply_onednn
    if n_bytes > 0 and dtype == torch.float16 and n_rows >= _MANY_HALF_ROWS:
        return _apply_in_float32
    return nn.functional.linear


@functools.cache
def _is_blas_shared() -> bool:
    """Tells whether BLAS on all threads is the fastest here. By itself it leaves the products of one row to one."""
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _apply_shared(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _share(weight, bias)(inputs.reshape(-1, inputs.shape[-1])).view(*inputs.shape[:-1], len(weight))


def _share(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function of inputs (N, I) -> (N, O), of which BLAS computes an equal part in each thread."""
    n_threads = torch.get_num_threads()
    n_each = len(weight) // n_threads
    if n_threads == 1 or weight.numel() < _SHARED_SIZE or n_each == 0:
        return lambda inputs: nn.functional.linear(inputs, weight, bias)
    n_shared = n_threads * n_each
    pieces = weight[:n_shared].view(n_threads, n_each, -1).mT  # (threads, I, O / threads)
    bias_pieces = None if bias is None else bias[:n_shared].view(n_threads, 1, n_each)

    def apply(inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.expand(n_threads, *inputs.shape)
        products = torch.bmm(rows, pieces) if bias_pieces is None else torch.baddbmm(bias_pieces, rows, pieces)
        if inputs.shape[0] > 1:
            products = products.transpose(0, 1)
        outputs = products.reshape(-1, n_shared)
        if n_shared == len(weight):
            return outputs
        rest = nn.functional.linear(inputs, weight[n_shared:], None if bias is None else bias[n_shared:])
        return torch.cat([outputs, rest], dim=-1)

    return apply


def _apply_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, "none", [], "")


def _apply_in_float32(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = inputs.float()  # in pieces, because a fresh float32 lm_head of 154 MB costs more than the product
    apply = _apply_shared if _is_blas_shared() else _apply_onednn
    outputs = torch.cat([apply(rows, piece.float()) for piece in weight.split(2048)], dim=-1)
    return (outputs if bias is None else outputs + bias).to(inputs.dtype)


__all__ = ["Linear", "bind_linear", "choose_linear", "has_compiled_parts", "use_kernels"]
