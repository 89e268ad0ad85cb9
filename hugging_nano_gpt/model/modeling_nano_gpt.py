"""The nanoGPT model (karpathy/nanoGPT model.py @ 3adf61e) as native Transformers classes, around its blocks.

Modules carry nanoGPT's names and layouts and the arithmetic follows its order, so in training and in inference every
number equals nanoGPT's bit for bit. What Transformers adds (caches, attention back ends, padding, recorded outputs)
stays out of the way when it is not asked for. This file travels with saved models as remote code, so it imports
torch, transformers and the files that travel with it, and nothing else of this package.

Shapes: B batch, T tokens, S keys (cached + T), C n_embd, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .block_nano_gpt import NanoGPTAttention, NanoGPTBlock, NanoGPTMLP, bind_norm
from .cache_nano_gpt import CACHE_NAME, RoomyLayer, deprecate_old_name, take_cache
from .configuration_nano_gpt import NanoGPTConfig
from .generation_nano_gpt import NanoGPTGenerationMixin, document_as
from .inputs_nano_gpt import (
    find_last_tokens,
    find_positions,
    refuse_filled_cache,
    refuse_narrow_flex_heads,
    select_columns,
)
from .kernels_nano_gpt import Linear, bind_linear
from .loss_nano_gpt import compute_chunked_loss, compute_loss, find_targets, ignore_minus_one
from .persistence_nano_gpt import NanoGPTPersistence, NanoGPTWayBackMixin
from .vocabulary_nano_gpt import follow_resize


class NanoGPTPreTrainedModel(NanoGPTPersistence):
    """What all nanoGPT models share: initialisation, and what they support."""

    config_class = NanoGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoGPTBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NanoGPTBlock, "attentions": NanoGPTAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # N(0, 0.02) and zero biases, which are also the defaults of Transformers; but nanoGPT's narrower residual
        # projections, at the Linear itself: modules without parameters of their own are not visited in remote code.
        if getattr(module, "is_residual_projection", False):
            self._draw_residual_projection(module)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws fresh weights in nanoGPT's order: every module's, children first, then the residual projections anew.

        After the same torch.manual_seed a new model has nanoGPT's bits, and torch's generator is where nanoGPT leaves
        it. What from_pretrained has loaded is not drawn.
        """
        super().initialize_weights()
        for module in self.modules():
            if getattr(module, "is_residual_projection", False):
                self._draw_residual_projection(module)

    def _draw_residual_projection(self, module: nn.Module) -> None:
        init.normal_(module.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))


class NanoGPTModel(NanoGPTPreTrainedModel):
    """The transformer without a head: token ids in, hidden states after the last LayerNorm out."""

    def __init__(self, config: NanoGPTConfig, *, is_part: bool = False):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(NanoGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.gradient_checkpointing = False
        self._is_drawn_later = is_part  # by the model that it is part of, whose own modules come in between
        self.post_init()
        self._is_drawn_later = False

    def init_weights(self) -> None:
        if not self._is_drawn_later:
            super().init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def crop_block_size(self, block_size: int) -> None:
        """Keeps only the first positions, so that the model reads at most block_size tokens, as nanoGPT's does.

        Args:
            block_size: New length in tokens, from 1 to the present one.

        Raises:
            ValueError: If it is longer than the present one: those positions have not been learned.
        """
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"{type(self).__name__}.crop_block_size: expected 1 to block_size={self.config.block_size}, got "
                f"{block_size!r}; positions can be cropped but not added"
            )
        weight = self.wpe.weight
        self.wpe.weight = nn.Parameter(weight.detach()[:block_size].clone(), requires_grad=weight.requires_grad)
        self.wpe.num_embeddings = self.config.block_size = block_size

    @capture_outputs
    @deprecate_old_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Computes the hidden states of a batch of sequences.

        Args:
            input_ids: (B, T) int64, token ids in [0, V).
            attention_mask: (B, S), 1 for tokens and 0 for padding, columns after S are left out; or a prepared 4-D
                mask of the attention back end.
            position_ids: (B or 1, T) int64 in [0, block_size). Without them a token's position is the number of
                unmasked tokens before it, so that padded rows give what the same rows give alone. On a GPU they are
                not read beforehand: those past the table end in torch's device-side assert.
            past_key_values, cache: Keys and values of the tokens before these, under the old or the new name; the old
                one is deprecated since Transformers 5.24.
            inputs_embeds: (B, T, C), token embeddings in place of input_ids.
            use_cache: Whether to return keys and values; config.use_cache in eval mode and False in training.
            **kwargs: output_hidden_states, output_attentions, return_dict, and arguments of the attention back end.

        Returns:
            last_hidden_state (B, T, C) in the model's dtype, and the keys and values if use_cache: past_key_values,
            called cache since Transformers 5.24.

        Raises:
            TypeError: If an argument of another name holds keys and values.
            ValueError: If a token lies beyond the last learned position, if not exactly one of input_ids and
                inputs_embeds is given, if a 2-D attention_mask leaves columns out, or if a cache with tokens in it
                meets gradient checkpointing.
        """
        cache = take_cache(self, past_key_values, cache, kwargs)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError(f"{type(self).__name__}: give exactly one of input_ids and inputs_embeds")
        if use_cache is None:  # a cache that training never reads would cost a copy of all keys and values
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            refuse_filled_cache(self, cache)
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        past_length = 0 if cache is None or not hasattr(cache, "get_seq_length") else cache.get_seq_length()
        attention_mask = select_columns(self, attention_mask, past_length, inputs.shape[1])
        positions = find_positions(self, position_ids, attention_mask, past_length, inputs)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (B, T, C)
        hidden_states = self.drop(inputs_embeds + self.wpe(positions))  # (B, T, C)

        # Plain causal attention needs no mask: SDPA's is_causal is nanoGPT's own call and the way to flash kernels.
        # create_causal_mask would find that out too, but not under torch.compile, where it always makes a mask.
        if self.config._attn_implementation == "flex_attention":
            refuse_narrow_flex_heads(self, self.config.n_embd // self.config.n_head, inputs_embeds.device)
        is_plain = attention_mask is None and position_ids is None and cache is None
        causal_mask = None
        if not (is_plain and self.config._attn_implementation == "sdpa"):
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                **{CACHE_NAME: cache},
                position_ids=position_ids,  # only the caller's: they can mark packed sequences, ours never do
            )

        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                past_key_values=cache,
                position_ids=position_ids,
                **kwargs,
            )
        hidden_states = self.ln_f(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: cache if use_cache else None})


class NanoGPTLMHeadModel(NanoGPTPreTrainedModel, NanoGPTWayBackMixin, NanoGPTGenerationMixin):
    """nanoGPT's GPT: the transformer and the language-model head, tied to the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_rep"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.transformer = NanoGPTModel(config, is_part=True)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Before the weights are drawn: nanoGPT draws this one twice, under both names. from_pretrained makes the model
        # on the meta device, ties by itself, and takes what it ties for loaded.
        if config.tie_word_embeddings and not self.lm_head.weight.is_meta:
            self.lm_head.weight = self.transformer.wte.weight
        self.loss_type = "ForCausalLM"  # not in the class name, where Transformers looks for it
        self.post_init()

    def crop_block_size(self, block_size: int) -> None:
        """Keeps only the first positions; see NanoGPTModel.crop_block_size."""
        self.transformer.crop_block_size(block_size)

    @document_as(NanoGPTPersistence.resize_token_embeddings)
    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        n_before = self.config.vocab_size
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        follow_resize(self.generation_config, n_before, self.config.vocab_size, new_num_tokens)
        return embeddings

    @can_return_tuple
    @deprecate_old_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes next-token logits, and the loss if labels are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: See
                NanoGPTModel.
            labels: (B, T) int64, the input ids again; the model shifts them, as Transformers does. -100, and nanoGPT's
                -1, are ignored.
            logits_to_keep: Number of last positions, or index tensor of positions, to compute logits for; 0 for all.
            **kwargs: shift_labels, (B, T) int64: targets already shifted, as nanoGPT's get_batch makes them, which are
                used instead of labels; num_items_in_batch (the loss becomes a sum divided by it); and what
                NanoGPTModel takes.

        Returns:
            loss (mean cross-entropy in nats, float32), logits (B, T or kept, V), past_key_values, and the recorded
            hidden_states and attentions. With config.loss_chunk_size and labels there are no logits, in evaluation
            neither. A loss_function set on the model gets all logits.
        """
        # Not a parameter: Trainer would evaluate only batches with everything that is named like a label here.
        shift_labels = kwargs.pop("shift_labels", None)
        cache = take_cache(self, past_key_values, cache, kwargs)
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        logits, loss = None, None
        has_labels = labels is not None or shift_labels is not None
        is_nanogpt_loss = has_labels and self.loss_function is ForCausalLMLoss  # no other one or loss_type was set
        if is_nanogpt_loss and self.config.loss_chunk_size is not None:
            targets = find_targets(labels, shift_labels, **kwargs)
            chunk_size = self.config.loss_chunk_size
            loss = compute_chunked_loss(self.lm_head, outputs.last_hidden_state, targets, chunk_size, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, T or kept, V)
        if has_labels and logits is not None:
            if is_nanogpt_loss:
                loss = compute_loss(logits, find_targets(labels, shift_labels, **kwargs), **kwargs)
            else:
                loss = self.loss_function(
                    logits=logits,
                    labels=ignore_minus_one(labels),
                    shift_labels=ignore_minus_one(shift_labels),
                    vocab_size=self.config.vocab_size,
                    **kwargs,
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def can_step(self) -> bool:
        """Tells whether step computes what forward does: all modules are as they were built, and nothing hooks in."""
        own = {NanoGPTLMHeadModel, NanoGPTModel, NanoGPTBlock, NanoGPTAttention, NanoGPTMLP, nn.ModuleList}
        kinds = own | {
            nn.Linear,
            nn.LayerNorm,
            nn.Embedding,
            nn.Dropout,
            type(ACT2FN[self.config.activation_function]),
        }
        parameters = list(self.parameters())
        return (
            not self.training
            and self.config._attn_implementation == "sdpa"
            and not torch.is_autocast_enabled(self.device.type)
            and all(type(m) in kinds and not m.training and _is_as_written(m) for m in self.modules())
            and all(type(p) is nn.Parameter and type(p.data) is torch.Tensor for p in parameters)
            and len({(p.device, p.dtype) for p in parameters}) == 1
            and not any(vars(nn.modules.module)[name] for name in _GLOBAL_HOOKS)
        )

    def bind_step(self, linear: Linear) -> Callable[..., torch.Tensor]:
        """Returns a function that computes what forward does for one new token a row; see NanoGPTBlock.bind_step.

        Returns:
            Takes input_ids (B,) int64; the tokens' position, or one for each row, (B,) int64; the cache's layers, one
            for each block; and attention_mask as there. Returns logits (B, V).
        """
        base = self.transformer
        wte, wpe = base.wte.weight, base.wpe.weight
        blocks: Any = base.h
        steps = [block.bind_step(linear) for block in blocks]
        ln_f, lm_head = bind_norm(base.ln_f), bind_linear(linear, self.lm_head)

        def step(
            input_ids: torch.Tensor,
            positions: int | torch.Tensor,
            layers: list[RoomyLayer],
            attention_mask: torch.Tensor | None,
        ) -> torch.Tensor:
            hidden_states = torch.embedding(wte, input_ids) + wpe[positions]  # (B, C)
            for block_step, layer in zip(steps, layers, strict=True):
                hidden_states = block_step(hidden_states, layer, attention_mask)
            return lm_head(ln_f(hidden_states))

        return step


class NanoGPTForSequenceClassification(NanoGPTPreTrainedModel):
    """The transformer with a linear score of each row's last token: classifiers, reward models, critics."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = NanoGPTModel(config, is_part=True)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    @deprecate_old_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores each row at its last token, and computes the loss if labels are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: See
                NanoGPTModel.
                A row's last token is the last that the 2-D attention_mask leaves in; without a mask, the last that is
                not config.pad_token_id; without either, the last one.
            labels: (B,) class ids int64 or values float32, or (B, num_labels); config.problem_type decides.

        Returns:
            loss, logits (B, num_labels), past_key_values, and the recorded hidden_states and attentions.
        """
        cache = take_cache(self, past_key_values, cache, kwargs)
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)  # (B, T, num_labels)
        rows = torch.arange(logits.shape[0], device=logits.device)
        start = 0 if cache is None else int(cache.get_seq_length()) - logits.shape[1]  # the new tokens' first column
        last_tokens = find_last_tokens(self.config.pad_token_id, input_ids, attention_mask, start, logits)
        pooled_logits = logits[rows, last_tokens]  # (B, num_labels)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled_logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def _is_as_written(module: nn.Module) -> bool:
    is_hooked = bool(module._forward_hooks) or bool(module._forward_pre_hooks)
    return not is_hooked and "forward" not in vars(module) and module._compiled_call_impl is None


__all__ = [
    "NanoGPTForSequenceClassification",
    "NanoGPTLMHeadModel",
    "NanoGPTModel",
    "NanoGPTPreTrainedModel",
]
