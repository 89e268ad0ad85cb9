"""The nanoGPT model (karpathy/nanoGPT model.py @ 3adf61e) as native Transformers classes.

Modules have nanoGPT's names and layouts, and the arithmetic follows its order, so that every number equals nanoGPT's
bit for bit, in training and in inference. Caches, attention back ends, padding and recorded outputs are Transformers'
own. This file travels with saved models as remote code: it imports only torch, transformers and the files next to it.

Shapes: B batch, T tokens, S keys (cached + T), C n_embd, H heads, D head size = C / H, V vocabulary.
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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_nano_gpt import NanoGPTConfig

# Before 5.14, Transformers copies only the files of a folder that this file imports itself.
from .decoding_nano_gpt import decode  # noqa: F401
from .fast_nano_gpt import Step, bind_step, can_step
from .folder_nano_gpt import replace_model  # noqa: F401
from .generation_nano_gpt import NanoGPTGenerationMixin, document_as, follow_resize
from .inputs_nano_gpt import (
    CACHE_NAME,
    deprecate_old_name,
    find_last_tokens,
    find_positions,
    refuse_filled_cache,
    refuse_narrow_flex_heads,
    select_columns,
    take_cache,
)
from .loss_nano_gpt import compute_chunked_loss, compute_loss, find_targets, ignore_minus_one
from .persistence_nano_gpt import NanoGPTCheckpointMixin, NanoGPTPersistence


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
    """The manual implementation of attention, which also returns the attention weights."""
    scores = (query @ key.transpose(-2, -1)) * scaling  # (B, H, T, D) x (B, H, D, S) -> (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights  # (B, H, T, S) x (B, H, S, D) -> (B, T, H, D)


class NanoGPTAttention(nn.Module):
    """Causal self-attention: each token attends to itself and to the tokens before it."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = 1.0 / math.sqrt(self.head_dim)
        self.is_causal = True
        # query, key and value projections for all heads, in one matrix
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        # output projection, back into the residual stream; _init_weights gives it a smaller deviation
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True  # type: ignore[assignment]
        # not called: the back ends get its p and do the dropout themselves; TRL sets p to turn dropout off
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, C)
        attention_mask: torch.Tensor | None = None,
        # not named `cache`: before Transformers 5.24, back ends look for another one of that name in kwargs
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # vLLM's Transformers backend reads and rewrites this source. It expects the split by a literal 3-tuple, the -1
        # heads, the interface that is fetched once into a local and called once, and `scaling=self.scaling`.
        input_shape = hidden_states.shape[:-1]  # (B, T)
        head_shape = (*input_shape, -1, self.head_dim)
        C = self.config.n_embd
        # one product for all heads, (B, T, C) -> (B, T, 3C); then move the heads next to the batch
        query, key, value = self.c_attn(hidden_states).split((C, C, C), dim=-1)
        query = query.view(head_shape).transpose(1, 2)  # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
        key = key.view(head_shape).transpose(1, 2)  # (B, H, T, D)
        value = value.view(head_shape).transpose(1, 2)  # (B, H, T, D)
        dtype = query.dtype

        # append to the keys and values of earlier tokens; continuous batching also adds to the back end's arguments
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, H, S, D)
            query = query.to(key.dtype)  # a cache may have a more precise dtype than the model

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
        # put the outputs of all heads side by side: (B, T, H, D) -> (B, T, C)
        attn_output = attn_output.reshape(*input_shape, -1).contiguous().to(dtype)
        return self.resid_dropout(self.c_proj(attn_output)), attn_weights


class NanoGPTMLP(nn.Module):
    """The feed-forward network of a block, which computes each token on its own."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True  # type: ignore[assignment]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, 4C) -> (B, T, C)
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class NanoGPTBlock(GradientCheckpointingLayer):
    """A transformer block: attention and MLP read the normalized residual stream and add to it."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        # nn.LayerNorm itself and not a subclass, because Trainer exempts this type from weight decay
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.attn = NanoGPTAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.mlp = NanoGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        attn_output, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class NanoGPTPreTrainedModel(NanoGPTPersistence):
    """What all nanoGPT models share: how weights are initialized, and which features of Transformers they support."""

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
        # N(0, 0.02) and zero biases are also Transformers' defaults. The residual projections are initialized here, at
        # the Linear itself, because Transformers skips modules of remote code that have no parameters themselves.
        if getattr(module, "is_residual_projection", False):
            self._init_residual_projection(module)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initializes weights in nanoGPT's order: all modules, children first, then the residual projections again.

        After the same torch.manual_seed, a new model and torch's generator therefore have the same bits as nanoGPT's.
        Weights that from_pretrained has loaded are not changed.
        """
        super().initialize_weights()
        for module in self.modules():
            if getattr(module, "is_residual_projection", False):
                self._init_residual_projection(module)

    def _init_residual_projection(self, module: nn.Module) -> None:
        init.normal_(module.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))


class NanoGPTModel(NanoGPTPreTrainedModel):
    """The transformer without a head: from token ids to the hidden states after the last LayerNorm."""

    def __init__(self, config: NanoGPTConfig, *, is_part: bool = False):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # token embeddings
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # position embeddings
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(NanoGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5, bias=config.bias)
        self.gradient_checkpointing = False
        self._is_part = is_part  # the model that it is part of initializes it, to keep nanoGPT's order
        self.post_init()
        self._is_part = False

    def init_weights(self) -> None:
        if not self._is_part:
            super().init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def crop_block_size(self, block_size: int) -> None:
        """Keeps only the first block_size positions, as nanoGPT's method of this name does.

        Raises:
            ValueError: If block_size is not from 1 to the present one: positions cannot be added.
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
            attention_mask: (B, S), 1 for tokens and 0 for padding; columns after S are ignored. Or a 4-D mask as the
                attention back end expects it.
            position_ids: (B or 1, T) int64 in [0, block_size). By default the position of a token is the number of
                unmasked tokens before it, so that padding does not change the outputs of a row.
            past_key_values, cache: The keys and values of earlier tokens. Transformers 5.24 renamed the argument to
                `cache`; both names are accepted.
            inputs_embeds: (B, T, C), token embeddings instead of input_ids.
            use_cache: Whether to return keys and values. Defaults to config.use_cache in eval mode, False in training.
            **kwargs: output_hidden_states, output_attentions, return_dict, and arguments of the attention back end.

        Returns:
            last_hidden_state (B, T, C) in the model's dtype, and if use_cache the keys and values (`cache`, or
            `past_key_values` before Transformers 5.24).

        Raises:
            TypeError: If an argument of another name contains keys and values.
            ValueError: If a position is not below block_size, if not exactly one of input_ids and inputs_embeds is
                given, if a 2-D attention_mask is too short, or if gradient checkpointing gets a cache with tokens.
        """
        cache = take_cache(self, past_key_values, cache, kwargs)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError(f"{type(self).__name__}: give exactly one of input_ids and inputs_embeds")
        if use_cache is None:  # in training nothing reads a cache, and it would copy all keys and values
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
            inputs_embeds = self.wte(input_ids)  # token embeddings (B, T, C)
        hidden_states = self.drop(inputs_embeds + self.wpe(positions))  # position embeddings (B or 1, T, C)

        # Plain causal attention needs no mask: nanoGPT passes is_causal to SDPA, which can then use flash kernels.
        # create_causal_mask leaves the mask out too, except under torch.compile.
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
                position_ids=position_ids,  # only the caller's, which can mark where packed sequences begin
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


class NanoGPTLMHeadModel(NanoGPTPreTrainedModel, NanoGPTCheckpointMixin, NanoGPTGenerationMixin):
    """nanoGPT's GPT: the transformer and a language-model head, whose weight is the token embedding's."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_rep"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.transformer = NanoGPTModel(config, is_part=True)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Tie before the weights are initialized, because nanoGPT initializes this one twice, under both names. Not on
        # the meta device, where from_pretrained makes the model: it ties later, and regards tied weights as loaded.
        if config.tie_word_embeddings and not self.lm_head.weight.is_meta:
            self.lm_head.weight = self.transformer.wte.weight
        self.loss_type = "ForCausalLM"  # Transformers looks for it in the class name
        self.post_init()

    def crop_block_size(self, block_size: int) -> None:
        """Keeps only the first block_size positions; see NanoGPTModel.crop_block_size."""
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
            labels: (B, T) int64, the same ids as input_ids: the model shifts them, as Transformers' models do. -100
                and nanoGPT's -1 are ignored.
            logits_to_keep: The number of last positions, or an index tensor of positions, to compute logits for; 0
                for all.
            **kwargs: shift_labels, (B, T) int64: targets that are already shifted, as nanoGPT's get_batch returns
                them, instead of labels; num_items_in_batch: the loss is then the sum divided by it; and what
                NanoGPTModel accepts.

        Returns:
            loss (mean cross-entropy in nats, float32), logits (B, T or kept, V), the keys and values, and the recorded
            hidden_states and attentions. With config.loss_chunk_size and labels, no logits are returned. A
            loss_function that was set on the model gets all logits.
        """
        # not a parameter, because Trainer evaluates only batches that have every parameter with "label" in its name
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
        is_own_loss = has_labels and self.loss_function is ForCausalLMLoss  # the user has set no other
        if is_own_loss and self.config.loss_chunk_size is not None:
            targets = find_targets(labels, shift_labels, **kwargs)
            chunk_size = self.config.loss_chunk_size
            loss = compute_chunked_loss(self.lm_head, outputs.last_hidden_state, targets, chunk_size, **kwargs)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, T or kept, V)
            if is_own_loss:
                loss = compute_loss(logits, find_targets(labels, shift_labels, **kwargs), **kwargs)
            elif has_labels:
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

    def bind_step(self, n_rows: int) -> Step | None:
        """Returns a faster forward for one new token of each row, or None if it would not equal this model's own."""
        classes = (NanoGPTLMHeadModel, NanoGPTModel, NanoGPTBlock, NanoGPTAttention, NanoGPTMLP)
        return bind_step(self, n_rows) if can_step(self, classes) else None


class NanoGPTForSequenceClassification(NanoGPTPreTrainedModel):
    """The transformer with a linear score of the last token: for classifiers, reward models and critics."""

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
        """Scores the last token of each sequence, and computes the loss if labels are given.

        The last token is the last one that a 2-D attention_mask does not mask; without a mask, the last one that is
        not config.pad_token_id; without either, the last column.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache: See
                NanoGPTModel.
            labels: (B,) class ids int64 or values float32, or (B, num_labels), depending on config.problem_type.

        Returns:
            loss, logits (B, num_labels), the keys and values, and the recorded hidden_states and attentions.
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
        start = 0 if cache is None else int(cache.get_seq_length()) - logits.shape[1]  # column of the first new token
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
