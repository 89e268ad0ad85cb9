"""The loop that draws one token after the other, greedy or sampled: what generate() hands its prepared settings to.

nanoGPT reads the last block_size tokens for every token it draws (model.py @ 3adf61e, GPT.generate). A cache of keys
and values does the same work while the text fits. Beyond that, learned positions cannot move inside a cache, so the
window is read again: for each token, which gives nanoGPT's own numbers, or for every `stride` tokens, which is cheap.
Where a model is as it was built, one token is read by its `step`; otherwise by its forward pass, as Transformers does.
This file travels with saved models as remote code.
"""

import dataclasses
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, StaticCache, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, MaxLengthCriteria
from transformers.utils import logging

from .cache_nano_gpt import CACHE_NAME, RoomyLayer
from .kernels_nano_gpt import choose_linear, has_compiled_parts, use_kernels

logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Call:
    """What a call of generate() has for the loop beside what Transformers hands on."""

    stride: int = 1
    streamer: Any = None
    has_cache: bool = False  # given by the caller
    has_positions: bool = False


@torch.no_grad()
def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    call: Call,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Draws tokens until they are long enough or every row has ended; GenerationMixin.generate calls it.

    Nothing here waits for a GPU, but a criterion other than the length: once a token.
    """
    reader = Reader(model, input_ids, generation_config, call, model_kwargs)
    max_length = min((c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria), default=math.inf)
    checks = StoppingCriteriaList([c for c in stopping_criteria if type(c) is not MaxLengthCriteria])
    pad_id = _find_pad_id(generation_config) if any(hasattr(c, "eos_token_id") for c in checks) else None
    is_going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    record = _Record(generation_config)
    while True:
        raw_logits, outputs = reader.read(input_ids)
        logits = raw_logits.to(input_ids.device, torch.float32, copy=True)
        scores = logits
        for processor in logits_processor:
            scores = processor(input_ids, scores)
        record.add(scores, logits, outputs)
        tokens = _draw(scores) if generation_config.do_sample else scores.argmax(-1)
        if pad_id is not None:
            tokens = torch.where(is_going, tokens, pad_id)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if call.streamer is not None:
            call.streamer.put(tokens.cpu())
        if checks:
            is_going &= ~checks(input_ids, record.scores)
        if input_ids.shape[1] >= max_length or (checks and not is_going.any()):
            break
    if call.streamer is not None:
        call.streamer.end()
    return record.finish(input_ids, reader.cache)


def _draw(scores: torch.Tensor) -> torch.Tensor:  # (B, V) -> (B,), by the random numbers that nanoGPT would use
    return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)


class _Record:
    """What return_dict_in_generate asks for."""

    def __init__(self, settings: GenerationConfig):
        def start(is_wanted: bool | None) -> tuple | None:
            return () if settings.return_dict_in_generate and is_wanted else None

        self.is_wanted = settings.return_dict_in_generate
        self.scores, self.logits = start(settings.output_scores), start(settings.output_logits)
        self.attentions, self.hidden_states = start(settings.output_attentions), start(settings.output_hidden_states)

    def add(self, scores: torch.Tensor, logits: torch.Tensor, outputs: Any) -> None:
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.attentions is not None:
            self.attentions += (outputs.attentions,)
        if self.hidden_states is not None:
            self.hidden_states += (outputs.hidden_states,)

    def finish(self, sequences: torch.Tensor, cache: Cache | None) -> torch.Tensor | GenerateDecoderOnlyOutput:
        if not self.is_wanted:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=self.scores,
            logits=self.logits,
            attentions=self.attentions,
            hidden_states=self.hidden_states,
            **{CACHE_NAME: cache},
        )


class Reader:
    """Reads a growing text and returns the logits of its next token, within block_size and past it.

    Columns are counted from the first one that the mask speaks of: tokens that the caller's cache holds, or a prompt
    of embeddings, may come before the given ids.
    """

    def __init__(
        self, model: Any, input_ids: torch.Tensor, settings: GenerationConfig, call: Call, kwargs: dict[str, Any]
    ):
        self.model, self.settings, self.call = model, settings, call
        self.mask = kwargs.pop("attention_mask", None)  # (B, columns) or None
        self.positions = kwargs.pop("position_ids")  # (B or 1, columns)
        self.embeds = kwargs.pop("inputs_embeds", None)
        cache = kwargs.pop(CACHE_NAME, None) if kwargs.pop("use_cache", True) else None
        self.kwargs = kwargs  # for the forward pass
        self.n_before = self.positions.shape[-1] - input_ids.shape[1]
        self.n_padding, self.n_masked = count_padding(self.mask), 0  # columns; from n_masked on, none is masked
        if self.mask is not None and (masked := (self.mask == 0).any(0).nonzero()).numel() > 0:
            self.n_masked = int(masked[-1]) + 1
        else:
            self.mask = None
        self._check_length()
        self.cache: Any = self._choose_cache(cache)
        self.n_read = 0 if self.cache is None else int(self.cache.get_seq_length())
        self.start, self.is_first = 0, True
        self.kernels = nullcontext if self.cache is None else use_kernels(model)
        self.step = model.bind_step(choose_linear(model, len(input_ids))) if self._can_step(input_ids) else None
        self.is_kept = call.has_cache or settings.return_dict_in_generate
        # Nothing but copies may leave inference mode: its tensors cannot be trained on.
        self.mode = nullcontext if self.step is None or self.is_kept else torch.inference_mode
        can_compile = model._valid_auto_compile_criteria({CACHE_NAME: self.cache}, settings)
        self.forward = model.get_compiled_call(settings.compile_config) if can_compile else model

    def _check_length(self) -> None:
        block_size, name = self.model.config.block_size, f"{type(self.model).__name__}.generate"
        length = self.n_before + self.settings.max_length - self.n_padding  # the last token is not read
        if length - 1 > block_size and (self.n_before > 0 or self.embeds is not None):
            raise ValueError(
                f"{name}: sequence too long: expected at most block_size={block_size} tokens after a prompt given as "
                f"inputs_embeds, or known to a cache alone, got {length}; give input_ids, or lower max_new_tokens"
            )
        if length - 1 > block_size and self.call.stride == 1:
            logger.warning_once(
                f"{name}: the text grows past block_size={block_size} tokens. From there on the last {block_size} "
                f"tokens are read again for every new token, as nanoGPT does; generate(..., stride=n) drops n tokens "
                f"at once, which is faster and not what nanoGPT computes"
            )

    def _choose_cache(self, cache: Cache | None) -> Cache | None:
        """Returns the cache to use in place of a new one: with room to grow, and no longer than the window."""
        if cache is None or self.call.has_cache:
            return cache
        longest = self.model.config.block_size + self.n_padding
        if type(cache) is DynamicCache and not cache.offloading and not has_compiled_parts(self.model):
            longest = min(longest, self.n_before + self.settings.max_length - 1)
            cache.layers = [RoomyLayer(longest) for _ in range(self.model.config.n_layer)]
        elif type(cache) is StaticCache and cache.layers[0].max_cache_len > longest:
            return StaticCache(self.model.config, max_cache_len=longest, offloading=cache.offloading)
        return cache

    def _can_step(self, input_ids: torch.Tensor) -> bool:
        """Tells whether one token is read by the model's step; otherwise its forward pass reads it."""
        has_room = self.cache is not None and all(type(layer) is RoomyLayer for layer in self.cache.layers)
        is_plain = self.kwargs.keys() <= {"logits_to_keep"} and not self.call.has_positions
        return has_room and is_plain and input_ids.device == self.model.device and self.model.can_step()

    def read(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Returns the logits (B, V) after the text so far, (B, N), and the forward pass's outputs if there was one."""
        end = self.n_before + input_ids.shape[1]
        start = self._find_start(end)
        self._grow(end)
        if start != self.start:
            self._open_window(start)
        mask = None if start >= self.n_masked else self.mask[:, start:]
        if self.step is None or self.is_first or self.n_read != end - start - 1:
            with self.kernels(), self.mode():
                outputs = self._forward(input_ids, start, end, mask)
            self.is_first = False
            return outputs.logits[:, -1], outputs
        positions = self.n_read if mask is None else mask.long().sum(-1) - 1
        key_mask = None if mask is None else (mask != 0)[:, None, None]  # (B, 1, 1, S)
        self.n_read += 1
        with self.mode():
            return self.step(input_ids[:, -1], positions, self.cache.layers, key_mask), None

    def _find_start(self, end: int) -> int:
        """Returns the window's first column. It depends on the length alone, not on where the prompt ended."""
        excess, stride = end - self.n_padding - self.model.config.block_size, self.call.stride
        return (
            0 if excess <= 0 else self.n_padding + min(math.ceil(excess / stride) * stride, end - self.n_padding - 1)
        )

    def _grow(self, end: int) -> None:
        if self.mask is not None and self.mask.shape[1] < end:
            self.mask = nn.functional.pad(self.mask, (0, 1), value=1)
        if self.call.has_positions and self.positions.shape[-1] < end:
            self.positions = torch.cat([self.positions, self.positions[..., -1:] + 1], dim=-1)

    def _open_window(self, start: int) -> None:
        self.start, self.n_read = start, 0
        if self.call.stride == 1 and not self.is_kept:
            self.cache = self.step = None  # it would be filled for each token and never read
        elif isinstance(self.cache, DynamicCache):  # before Transformers 5.18, reset() left zeros of the old length
            self.cache.crop(-self.cache.get_seq_length())
        elif self.cache is not None:
            self.cache.reset()

    def _forward(self, input_ids: torch.Tensor, start: int, end: int, mask: torch.Tensor | None) -> Any:
        """Reads the columns of the window that the cache does not hold, all at once or in chunks."""
        first = start + self.n_read
        if first >= end:
            raise ValueError(
                f"{type(self.model).__name__}.generate: the cache holds {self.n_read} tokens: expected fewer than the "
                f"text's {end}; give the tokens that come after those in the cache"
            )
        n_chunk = end - first
        if self.settings.prefill_chunk_size and self.cache is not None and self.embeds is None and start == 0:
            n_chunk = self.settings.prefill_chunk_size
        forward = self.model if self.is_first or start != self.start or n_chunk > 1 else self.forward
        for chunk in range(first, end, n_chunk):
            stop = min(chunk + n_chunk, end)
            inputs = self.model.prepare_inputs_for_generation(
                input_ids[:, max(0, start - self.n_before) : stop - self.n_before],
                next_sequence_length=None if self.cache is None else stop - chunk,
                attention_mask=None if mask is None else mask[:, : stop - start],
                position_ids=self._find_positions(mask, start, stop),
                inputs_embeds=self.embeds,
                is_first_iteration=self.is_first,
                use_cache=self.cache is not None,
                **{CACHE_NAME: self.cache},
                **self.kwargs,
            )
            outputs = forward(**inputs, return_dict=True)
        self.n_read += 0 if self.cache is None else end - first
        return outputs

    def _find_positions(self, mask: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
        """Returns positions where the forward pass cannot count them: the caller's own, and a static cache's."""
        if self.call.has_positions and start == 0:
            return self.positions[..., :stop]
        if mask is None or self.cache is None or not self.cache.is_compileable:
            return None
        return (mask[:, : stop - start].long().cumsum(-1) - 1).clamp(min=0)


def count_padding(attention_mask: torch.Tensor | None) -> int:
    """Returns how many columns on the left are padding in every row."""
    return 0 if attention_mask is None else int(attention_mask.long().argmax(-1).min())


def _find_pad_id(settings: GenerationConfig) -> int | None:
    """Returns the token of rows that have ended: the pad token, or else the first end-of-text token."""
    for value in (settings.pad_token_id, settings.eos_token_id):
        if value is not None:
            return int(torch.as_tensor(value).flatten()[0])
    return None


__all__ = ["Call", "Reader", "count_padding", "decode"]
