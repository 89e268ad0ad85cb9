"""The fast path of generate: a step that reads one new token, a cache without copies, and faster products on a CPU.

With small models a forward pass of one token is mostly overhead: modules, hooks, masks, and a cache that is copied to
append to it. The step computes the same numbers from weights that are looked up once. Nothing in the model is changed,
so training, other threads and copies keep nanoGPT's arithmetic. This file travels with saved models as remote code.

Shapes: B batch, T tokens, S keys, C n_embd, H heads, D head size, V vocabulary; a Linear has N rows, I inputs and O
outputs.
"""

import functools
import platform
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicLayer

# Computes inputs (N, I) @ weight (O, I).T + bias (O), where the bias may be None.
Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# Takes input_ids (B,) int64; the position of these tokens, or one for each row, (B,) int64; the layers of the cache,
# to which it appends; and attention_mask (B, 1, 1, S) bool, or None if no token is masked. Returns logits (B, V).
Step = Callable[[torch.Tensor, int | torch.Tensor, list["PreallocatedLayer"], torch.Tensor | None], torch.Tensor]

# Where other kernels replace torch's on a CPU. docs/benchmarks.md, "Products", has the measured rates that decide it.
_LARGE_WEIGHT = 2**17  # numbers; below, one thread of BLAS is fastest, because its calls are short
_FEW_ROWS = 32  # of float32, at most
_FEW_ROWS_ON_INTEL = 2
_FEW_INPUTS = 3072  # numbers in all rows, at most
_MANY_HALF_ROWS = 8  # of float16, at least

# Bytes of a float32 model from which its forward passes gain more by other kernels than _Kernels costs.
_LARGE_MODEL = 32 * 2**20


def can_step(model: Any, classes: Collection[type]) -> bool:
    """Returns whether a step computes what forward does: all modules are as they were built, and nothing hooks in.

    Args:
        model: A NanoGPTLMHeadModel.
        classes: The classes of modeling_nano_gpt.py, whose forward methods the step repeats.
    """
    known = {*classes, nn.ModuleList, nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout}
    known.add(type(ACT2FN[model.config.activation_function]))
    parameters = list(model.parameters())
    hooks = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return (
        not model.training
        and model.config._attn_implementation == "sdpa"
        and not torch.is_autocast_enabled(model.device.type)
        and all(type(module) in known and _is_as_built(module) for module in model.modules())
        and all(type(p) is nn.Parameter and type(p.data) is torch.Tensor for p in parameters)
        and len({(p.device, p.dtype) for p in parameters}) == 1
        and not any(vars(nn.modules.module)[name] for name in hooks)
    )


def _is_as_built(module: nn.Module) -> bool:
    is_hooked = bool(module._forward_hooks) or bool(module._forward_pre_hooks)
    is_replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return not (is_hooked or is_replaced or module.training)


def bind_step(model: Any, n_rows: int) -> Step:
    """Returns a function that computes what the model's forward does for one new token of each row.

    The weights are looked up here, because doing so for each token takes as long as a small model's arithmetic.
    """
    base = model.transformer
    wte, wpe = base.wte.weight, base.wpe.weight
    block_steps = [_bind_block(block, n_rows) for block in base.h]
    ln_f, lm_head = _bind_norm(base.ln_f), bind_linear(model.lm_head, n_rows)

    def step(
        input_ids: torch.Tensor,
        positions: int | torch.Tensor,
        layers: list[PreallocatedLayer],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden_states = torch.embedding(wte, input_ids) + wpe[positions]  # (B, C)
        for block_step, layer in zip(block_steps, layers, strict=True):
            hidden_states = block_step(hidden_states, layer, attention_mask)
        return lm_head(ln_f(hidden_states))  # (B, V)

    return step


def _bind_block(block: Any, n_rows: int) -> Callable[..., torch.Tensor]:
    attn, mlp = block.attn, block.mlp
    ln_1, ln_2 = _bind_norm(block.ln_1), _bind_norm(block.ln_2)
    c_attn, attn_proj = bind_linear(attn.c_attn, n_rows), bind_linear(attn.c_proj, n_rows)
    c_fc, act, mlp_proj = bind_linear(mlp.c_fc, n_rows), _bind_act(mlp, n_rows), bind_linear(mlp.c_proj, n_rows)
    head_shape, scaling = (attn.config.n_head, 1, attn.head_dim), attn.scaling

    def step(hidden_states: torch.Tensor, layer: PreallocatedLayer, mask: torch.Tensor | None) -> torch.Tensor:
        states = c_attn(ln_1(hidden_states)).view(-1, 3, *head_shape)  # query, key, value in one: (B, 3, H, 1, D)
        key, value = layer.append(states[:, 1:])  # (B, H, S, D) each
        query = _cast(states[:, 0], key.dtype)  # (B, H, 1, D)
        attn_output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        attn_output = _cast(attn_output.flatten(1), hidden_states.dtype)  # (B, H, 1, D) -> (B, C)
        hidden_states = hidden_states + attn_proj(attn_output)
        return hidden_states + mlp_proj(act(c_fc(ln_2(hidden_states))))  # (B, C)

    return step


def _bind_norm(norm: nn.LayerNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda hidden_states: torch.layer_norm(hidden_states, shape, weight, bias, eps)


def _bind_act(mlp: Any, n_rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    is_exact_gelu = getattr(mlp.act, "act", None) is nn.functional.gelu
    if n_rows > 1 or not is_exact_gelu or mlp.c_fc.weight.device.type != "cpu":
        return mlp.act.forward
    # torch gives contiguous tensors to oneDNN, which takes 15 us for a row; a transposed view stays in torch's kernel
    return lambda inputs: nn.functional.gelu(inputs.view(2, -1).mT).mT.reshape(1, -1)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # to() costs 6 us even if it has nothing to do


class PreallocatedLayer(DynamicLayer):
    """A cache layer that reserves memory for later tokens, so that a new token does not copy the earlier ones.

    On a CPU it keeps half-precision keys and values in float32, in which CPUs attend several times faster. Tensors
    that it has returned never change: new tokens are written after them, and a layer that was cropped, reordered or
    copied moves to new memory.

    Args:
        max_length: Tokens that the layer will contain in the end.
    """

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self._last: tuple[torch.Tensor, ...] = ()  # keys and values as this layer left them
        self._memory: list[Any] = [None, 0]  # (B, 2, H, room, D), and the tokens in it; shared by shallow copies

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values (B, H, T, D), and returns all of them (B, H, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.append(torch.stack([key_states, value_states], dim=1))

    def append(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends keys and values in one tensor (B, 2, H, T, D), and returns all of them (B, H, S, D)."""
        start, n_new = self.get_seq_length(), states.shape[3]
        if not self._has_room(start, start + n_new):
            self._reserve(states, start, start + n_new)
        memory = self._memory[0]
        memory.narrow(3, start, n_new).copy_(states)
        self._memory[1] = start + n_new
        self.keys, self.values = self._last = memory.narrow(3, 0, start + n_new).unbind(1)
        return self.keys, self.values

    def _has_room(self, start: int, end: int) -> bool:
        memory, n_written = self._memory
        is_unchanged = len(self._last) == 2 and self.keys is self._last[0] and self.values is self._last[1]
        return is_unchanged and n_written == start and memory.shape[3] >= end

    def _reserve(self, states: torch.Tensor, start: int, end: int) -> None:
        """Reserves memory for twice the tokens, up to max_length, and copies the earlier ones into it."""
        batch, _, n_head, _, head_dim = states.shape
        room = max(end, min(2 * end, self.max_length))
        dtype = torch.promote_types(states.dtype, torch.float32) if states.device.type == "cpu" else states.dtype
        memory = states.new_empty((batch, 2, n_head, room, head_dim), dtype=dtype)
        if start > 0:
            memory[:, 0, :, :start], memory[:, 1, :, :start] = self.keys, self.values
        self._memory = [memory, start]


def bind_linear(module: nn.Linear, n_rows: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the fastest function that applies a Linear module to inputs (n_rows, I); on a GPU, torch's own."""
    weight, bias = module.weight, module.bias
    linear = _choose(weight, n_rows) if _has_kernels(module) else nn.functional.linear
    if linear is _apply_in_parts:
        return _split(weight, bias)
    if linear is not nn.functional.linear:
        return lambda inputs: linear(inputs, weight, bias)
    columns = weight.t()
    return lambda inputs: torch.mm(inputs, columns) if bias is None else torch.addmm(bias, inputs, columns)


def use_kernels(model: Any) -> Callable[[], AbstractContextManager]:
    """Returns a context manager in which the Linear modules that this thread calls use the faster kernels."""
    # _Kernels adds a call in Python to each function of torch, which costs more than a small model gains
    n_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    gains = model.dtype == torch.float16 or (model.dtype == torch.float32 and n_bytes > _LARGE_MODEL)
    return _Kernels if gains and _has_kernels(model) and not has_compiled_parts(model) else nullcontext


def has_compiled_parts(model: nn.Module) -> bool:
    """Returns whether torch.compile was applied to the model or to a part of it."""
    parts = (m for m in model.modules() if m._compiled_call_impl is not None or "_orig_mod" in m._modules)
    return "forward" in vars(model) or next(parts, None) is not None


class _Kernels(TorchFunctionMode):
    """Replaces torch's linear in one thread, for weights that are plain tensors and without gradients."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            inputs, weight = args[0], args[1]
            is_plain = type(inputs) is torch.Tensor and type(weight) in (torch.Tensor, nn.Parameter) and weight.is_cpu
            if is_plain and inputs.dtype == weight.dtype and not torch.is_autocast_enabled("cpu"):
                func = _choose(weight, inputs.numel() // inputs.shape[-1])
        return func(*args, **(kwargs or {}))


def _has_kernels(module: Any) -> bool:
    """Returns whether a module can be computed by other kernels than torch's own here."""
    has_onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_onednn and next(module.parameters()).is_cpu and not torch.is_autocast_enabled("cpu")


def _choose(weight: torch.Tensor, n_rows: int) -> Linear:
    if weight.dtype == torch.float32 and weight.numel() >= _LARGE_WEIGHT and n_rows <= _FEW_ROWS:
        return _choose_float32(n_rows, n_rows * weight.shape[1])
    if weight.dtype == torch.float16 and n_rows >= _MANY_HALF_ROWS:
        return _apply_in_float32
    return nn.functional.linear


def _choose_float32(n_rows: int, n_inputs: int) -> Linear:
    if torch.backends.mkl.is_available() and _is_intel():
        has_fast_onednn = torch.backends.cpu.get_cpu_capability() == "AVX512"
        if n_rows <= _FEW_ROWS_ON_INTEL or not has_fast_onednn:
            return nn.functional.linear
    elif torch.backends.mkl.is_available() and (n_rows == 1 or n_inputs <= _FEW_INPUTS):
        return _apply_in_parts
    return _apply_onednn


@functools.cache
def _is_intel() -> bool:
    """Returns whether the processor is Intel's; for others MKL uses general kernels."""
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not on Linux
        processor = platform.processor()
    return "GenuineIntel" in processor


def _apply_in_parts(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _split(weight, bias)(inputs.reshape(-1, inputs.shape[-1])).view(*inputs.shape[:-1], len(weight))


def _split(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function (N, I) -> (N, O) that computes parts of the outputs in one bmm.

    MKL's general kernels multiply each matrix of a batch in a thread, and read twice as fast as in a product with a
    vector. That needs the weights as the first factor, and two parts also for one thread.
    """
    n_parts = min(max(2, torch.get_num_threads()), len(weight))
    n_each = len(weight) // n_parts
    n_split = n_parts * n_each
    parts = weight[:n_split].view(n_parts, n_each, -1)  # (parts, O / parts, I)
    bias_parts = None if bias is None else bias[:n_split].view(n_parts, n_each, 1)
    rest, bias_rest = weight[n_split:], None if bias is None else bias[n_split:]

    def apply(inputs: torch.Tensor) -> torch.Tensor:
        columns = inputs.mT.expand(n_parts, -1, -1)  # (parts, I, N)
        products = torch.bmm(parts, columns) if bias_parts is None else torch.baddbmm(bias_parts, parts, columns)
        outputs = products.view(n_split, -1).mT.contiguous()  # (N, O)
        if n_split == len(weight):
            return outputs
        return torch.cat([outputs, nn.functional.linear(inputs, rest, bias_rest)], dim=-1)

    return apply


def _apply_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, "none", [], "")


def _apply_in_float32(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = inputs.float()
    # the weight in pieces, because a float32 copy of lm_head (154 MB) costs more than the product
    outputs = torch.cat([_apply_onednn(rows, piece.float()) for piece in weight.split(2048)], dim=-1)
    return (outputs if bias is None else outputs + bias).to(inputs.dtype)
