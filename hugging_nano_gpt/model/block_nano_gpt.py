"""One block of the model: causal self-attention and an MLP, with nanoGPT's names, layouts and order of arithmetic.

This file travels with saved models as remote code.

Shapes: B batch, T tokens, S keys (cached + T), C n_embd, H heads, D head size = C / H.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_nano_gpt import RoomyLayer
from .configuration_nano_gpt import NanoGPTConfig
from .kernels_nano_gpt import Linear, bind_linear


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # (B, H, T, D)
    key: torch.Tensor,  # (B, H, S, D)
    value: torch.Tensor,  # (B, H, S, D)
    attention_mask: torch.Tensor | None,  # (B or 1, 1, T, S), added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention step by step, as nanoGPT does without flash attention, and returns the weights too."""
    scores = (query @ key.transpose(-2, -1)) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights  # (B, T, H, D)


class NanoGPTAttention(nn.Module):
    """Causal self-attention of all heads, with query, key and value in one projection."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = 1.0 / math.sqrt(self.head_dim)
        self.is_causal = True
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True  # type: ignore[assignment]  # read by _init_weights
        # Never called, as the back ends drop weights themselves: TRL turns dropout off by setting p of nn.Dropout.
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, C)
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache
        | None = None,  # not `cache`: before Transformers 5.24, back ends take one out of kwargs
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # vLLM's Transformers backend reads and rewrites this source: the split by a literal 3-tuple, the -1 heads, the
        # interface fetched once into a local and called once, and `scaling=self.scaling` are its contract.
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        C = self.config.n_embd
        query, key, value = self.c_attn(hidden_states).split((C, C, C), dim=-1)
        query = query.view(head_shape).transpose(1, 2)  # (B, H, T, D)
        key = key.view(head_shape).transpose(1, 2)
        value = value.view(head_shape).transpose(1, 2)
        dtype = query.dtype

        if past_key_values is not None:  # the cache of continuous batching also changes the back end's arguments
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, H, S, D)
            query = query.to(key.dtype)  # a cache may be more precise than the model is

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous().to(dtype)  # (B, T, C)
        return self.resid_dropout(self.c_proj(attn_output)), attn_weights


class NanoGPTMLP(nn.Module):
    """The feed-forward half of a block, four times as wide inside."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True  # type: ignore[assignment]  # read by _init_weights
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class NanoGPTBlock(GradientCheckpointingLayer):
    """A transformer block: attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        # nn.LayerNorm itself, not a subclass of ours: Trainer exempts it from weight decay by its type.
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = NanoGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = NanoGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        attn_output, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))

    def bind_step(self, linear: Linear) -> Callable[[torch.Tensor, RoomyLayer, torch.Tensor | None], torch.Tensor]:
        """Returns a function that computes what forward does for one new token a row; a test compares the two.

        Parameters are looked up here and not at every token, where that takes as long as a small model's arithmetic.

        Args:
            linear: Computes inputs @ weight.T + bias.

        Returns:
            Takes hidden_states (B, C); the layer that holds keys and values of earlier tokens, to which it appends the
            new ones; and attention_mask (B, 1, 1, S) bool, True for tokens, or None where all of them are. Returns the
            hidden states (B, C) after this block.
        """
        attn, mlp = self.attn, self.mlp
        ln_1, ln_2 = bind_norm(self.ln_1), bind_norm(self.ln_2)
        c_attn, attn_proj = bind_linear(linear, attn.c_attn), bind_linear(linear, attn.c_proj)
        c_fc, act, mlp_proj = bind_linear(linear, mlp.c_fc), mlp.act.forward, bind_linear(linear, mlp.c_proj)
        head_shape, scaling = (attn.config.n_head, 1, attn.head_dim), attn.scaling

        def step(hidden_states: torch.Tensor, layer: RoomyLayer, attention_mask: torch.Tensor | None) -> torch.Tensor:
            states = c_attn(ln_1(hidden_states)).view(-1, 3, *head_shape)  # (B, 3, H, 1, D)
            key, value = layer.append(states[:, 1:])  # (B, H, S, D)
            attn_output = nn.functional.scaled_dot_product_attention(
                _cast(states[:, 0], key.dtype), key, value, attn_mask=attention_mask, scale=scaling
            )  # (B, H, 1, D)
            hidden_states = hidden_states + attn_proj(_cast(attn_output.flatten(1), hidden_states.dtype))
            return hidden_states + mlp_proj(act(c_fc(ln_2(hidden_states))))

        return step


def bind_norm(norm: nn.LayerNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what a LayerNorm's forward does, for parameters that are looked up only now."""
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda hidden_states: torch.layer_norm(hidden_states, shape, weight, bias, eps)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # asking to() costs 6 us where there is nothing to do


__all__ = ["NanoGPTAttention", "NanoGPTBlock", "NanoGPTMLP", "bind_norm", "eager_attention_forward"]
