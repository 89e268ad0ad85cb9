"""The fast path of generate: a step that reads one new token, a cache without copies, and faster products on a CPU.

With small models a forward pass of one token is mostly overhead: modules, hooks, masks, and a cache that is copied to
append to it. The step computes the same numbers from weights that are looked up once. Nothing in the model is changed,
so training, other threads and copies keep nanoGPT's arithmetic. This file travels with saved models as remote code.

Shapes: B batch, T tokens, S keys, C n_embd, H heads, D head size, V vocabulary; a Linear has N rows, I inputs and O
outputs.
"""

import functools
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
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

# Numbers of rows up to which other kernels replace torch's in float32, and from which they do in float16.
# Measured at widths 768 to 50304. On 2 AVX512 cores BLAS reads 16 GB/s of weights for 1 row and 9 for 8, oneDNN 35 and
# 26; float16 reads 40 GB/s for 1 row, and its time then grows with the rows. On 2 AVX2 cores BLAS reads 14 GB/s for 1
# row and 6 for 8, oneDNN 18 and 10, and BLAS on both threads 26 and 11.
_FEW_ROWS = 32
_MANY_HALF_ROWS = 8

# Bytes of a model up to which BLAS is faster than oneDNN: it fits the CPU's cache, and a call of oneDNN takes 11 us.
_CACHED_BYTES = 32 * 2**20
# Numbers in a weight from which threads share its product: below, waking the other thread costs more (measured, AVX2).
_SHARED_SIZE = 2**16


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
    linear = choose_linear(model, n_rows)
    base = model.transformer
    wte, wpe = base.wte.weight, base.wpe.weight
    block_steps = [_bind_block(block, linear) for block in base.h]
    ln_f, lm_head = _bind_norm(base.ln_f), bind_linear(linear, model.lm_head)

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


def _bind_block(block: Any, linear: Linear) -> Callable[..., torch.Tensor]:
    attn, mlp = block.attn, block.mlp
    ln_1, ln_2 = _bind_norm(block.ln_1), _bind_norm(block.ln_2)
    c_attn, attn_proj = bind_linear(linear, attn.c_attn), bind_linear(linear, attn.c_proj)
    c_fc, act, mlp_proj = bind_linear(linear, mlp.c_fc), mlp.act.forward, bind_linear(linear, mlp.c_proj)
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


def choose_linear(model: Any, n_rows: int) -> Linear:
    """Returns the fastest product for the Linear modules of a model with n_rows rows; on a GPU, torch's own."""
    return _choose(_measure_bytes(model), model.dtype, n_rows)


def bind_linear(linear: Linear, module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that applies a Linear module to inputs (N, I) by the chosen product."""
    weight, bias = module.weight, module.bias
    return _share(weight, bias) if linear is _apply_shared else lambda inputs: linear(inputs, weight, bias)


def use_kernels(model: Any) -> Callable[[], AbstractContextManager]:
    """Returns a context manager in which the Linear modules that this thread calls use the faster kernels."""
    n_bytes = 0 if has_compiled_parts(model) else _measure_bytes(model)
    # _Kernels adds a call in Python to each function of torch, which costs more than a small model gains.
    is_small = model.dtype == torch.float32 and n_bytes <= _CACHED_BYTES
    has_others = any(_choose(n_bytes, model.dtype, n) is not nn.functional.linear for n in (1, _MANY_HALF_ROWS))
    return (lambda: _Kernels(n_bytes)) if has_others and not is_small else nullcontext


def has_compiled_parts(model: nn.Module) -> bool:
    """Returns whether torch.compile was applied to the model or to a part of it."""
    parts = (m for m in model.modules() if m._compiled_call_impl is not None or "_orig_mod" in m._modules)
    return "forward" in vars(model) or next(parts, None) is not None


class _Kernels(TorchFunctionMode):
    """Replaces torch's linear in one thread, for weights that are plain tensors and without gradients."""

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
    """Returns the bytes of the weights, or 0 where only torch's own kernels can be used."""
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
    """Returns whether BLAS is fastest here if all threads share a product; BLAS alone gives one row to one thread."""
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _apply_shared(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _share(weight, bias)(inputs.reshape(-1, inputs.shape[-1])).view(*inputs.shape[:-1], len(weight))


def _share(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function (N, I) -> (N, O) in which each thread computes an equal part of the outputs, by a bmm."""
    n_threads = torch.get_num_threads()
    n_each = len(weight) // n_threads
    if n_threads == 1 or weight.numel() < _SHARED_SIZE or n_each == 0:
        return lambda inputs: nn.functional.linear(inputs, weight, bias)
    n_shared = n_threads * n_each
    pieces = weight[:n_shared].view(n_threads, n_each, -1).mT  # (threads, I, O / threads)
    bias_pieces = None if bias is None else bias[:n_shared].view(n_threads, 1, n_each)

    def apply(inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.expand(n_threads, *inputs.shape)  # (threads, N, I)
        products = torch.bmm(rows, pieces) if bias_pieces is None else torch.baddbmm(bias_pieces, rows, pieces)
        if inputs.shape[0] > 1:
            products = products.transpose(0, 1)  # (N, threads, O / threads)
        outputs = products.reshape(-1, n_shared)
        if n_shared == len(weight):
            return outputs
        rest = nn.functional.linear(inputs, weight[n_shared:], None if bias is None else bias[n_shared:])
        return torch.cat([outputs, rest], dim=-1)

    return apply


def _apply_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(inputs, weight, bias, "none", [], "")


def _apply_in_float32(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = inputs.float()
    linear = _apply_shared if _is_blas_shared() else _apply_onednn
    # the weight in pieces, because a float32 copy of lm_head (154 MB) costs more than the product
    outputs = torch.cat([linear(rows, piece.float(), None) for piece in weight.split(2048)], dim=-1)
    return (outputs if bias is None else outputs + bias).to(inputs.dtype)
