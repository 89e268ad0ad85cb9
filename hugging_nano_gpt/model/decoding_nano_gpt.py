"""The loop of generate that appends one token after the other, by greedy decoding or sampling.

nanoGPT reads the last block_size tokens for every new token (model.py @ 3adf61e, GPT.generate). A cache of keys and
values saves that work while the text fits into block_size. Beyond it, learned positions cannot move inside a cache, so
the window is read again: for every token, which gives nanoGPT's own numbers, or for every `stride` tokens, which is
cheap. This file travels with saved models as remote code.

Shapes: B batch, N given and generated tokens, V vocabulary; columns count the tokens of a row from the first one that
the attention mask covers: tokens in the caller's cache, or a prompt of embeddings, may come before the given ids.
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

from .fast_nano_gpt import PreallocatedLayer, has_compiled_parts, use_kernels
from .inputs_nano_gpt import CACHE_NAME

logger = logging.get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a call of generate that Transformers does not pass on to the loop."""

    stride: int = 1
    streamer: Any = None
    has_cache: bool = False  # from the caller
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
    """Generates tokens until max_length is reached or every sequence has finished; GenerationMixin.generate calls it.

    The host waits for a GPU only if there are criteria other than the length: once a token.
    """
    reader = WindowReader(model, input_ids, generation_config, call, model_kwargs)
    max_length = min((c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria), default=math.inf)
    criteria = StoppingCriteriaList([c for c in stopping_criteria if type(c) is not MaxLengthCriteria])
    pad_id = _find_pad_id(generation_config) if any(hasattr(c, "eos_token_id") for c in criteria) else None
    is_unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    record = _Record(generation_config)
    while True:
        raw_logits, outputs = reader.read(input_ids)
        logits = raw_logits.to(input_ids.device, torch.float32, copy=True)  # (B, V)
        scores = logits
        for processor in logits_processor:
            scores = processor(input_ids, scores)
        record.add(scores, logits, outputs)
        if generation_config.do_sample:  # with the random numbers that nanoGPT would use
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)  # (B,)
        else:
            tokens = scores.argmax(-1)
        if pad_id is not None:
            tokens = torch.where(is_unfinished, tokens, pad_id)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if call.streamer is not None:
            call.streamer.put(tokens.cpu())
        if criteria:
            is_unfinished &= ~criteria(input_ids, record.fields["scores"])
        if input_ids.shape[1] >= max_length or (criteria and not is_unfinished.any()):
            break
    if call.streamer is not None:
        call.streamer.end()
    return record.finish(input_ids, reader.cache)


class _Record:
    """What generate returns with return_dict_in_generate: a tuple for each field that was asked for."""

    def __init__(self, generation_config: GenerationConfig):
        self.is_wanted = generation_config.return_dict_in_generate
        self.fields: dict[str, tuple | None] = {
            name: () if self.is_wanted and getattr(generation_config, f"output_{name}") else None
            for name in ("scores", "logits", "attentions", "hidden_states")
        }

    def add(self, scores: torch.Tensor, logits: torch.Tensor, outputs: Any) -> None:
        new = {"scores": scores, "logits": logits}
        for name, values in self.fields.items():
            if values is not None:
                self.fields[name] = (*values, new[name] if name in new else getattr(outputs, name))

    def finish(self, sequences: torch.Tensor, cache: Cache | None) -> torch.Tensor | GenerateDecoderOnlyOutput:
        if not self.is_wanted:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, **self.fields, **{CACHE_NAME: cache})


class Window:
    """The columns of a growing text that the model reads: the last block_size, or fewer after a stride.

    Args:
        block_size: The most columns that it has, without padding.
        call: The arguments of generate.
        n_given: The number of given ids.
        mask: (B, columns), or None.
        positions: (B or 1, columns).
    """

    def __init__(self, block_size: int, call: Call, n_given: int, mask: torch.Tensor | None, positions: torch.Tensor):
        self.block_size, self.stride = block_size, call.stride
        self.n_before = positions.shape[-1] - n_given  # columns before the given ids
        self.n_padding = count_padding(mask)
        masked: Any = () if mask is None else (mask == 0).any(0).nonzero()
        self.n_masked = int(masked[-1]) + 1 if len(masked) > 0 else 0  # no column from here on is masked
        self._mask = mask if self.n_masked > 0 else None
        self._positions = positions if call.has_positions else None
        self.start = self.end = 0

    def follow(self, n_tokens: int) -> bool:
        """Moves the window to the end of a text of n_tokens ids; returns whether its first column has changed.

        The first column depends only on the length of the text, not on where the prompt ended.
        """
        self.end = self.n_before + n_tokens
        if self._mask is not None and self._mask.shape[1] < self.end:
            self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        if self._positions is not None and self._positions.shape[-1] < self.end:
            self._positions = torch.cat([self._positions, self._positions[..., -1:] + 1], dim=-1)
        before, length = self.start, self.end - self.n_padding
        n_strides = math.ceil((length - self.block_size) / self.stride)
        self.start = 0 if n_strides <= 0 else self.n_padding + min(n_strides * self.stride, length - 1)
        return self.start != before

    @property
    def mask(self) -> torch.Tensor | None:
        """The mask of the columns in the window, or None if none of them is masked."""
        return None if self._mask is None or self.start >= self.n_masked else self._mask[:, self.start :]

    def find_positions(self, stop: int, is_static: bool) -> torch.Tensor | None:
        """Returns the positions up to a column that forward cannot find: the caller's own, or for a static cache."""
        if self._positions is not None and self.start == 0:
            return self._positions[..., :stop]
        if self.mask is None or not is_static:
            return None
        return (self.mask[:, : stop - self.start].long().cumsum(-1) - 1).clamp(min=0)


class WindowReader:
    """Computes the logits of the next token: reads the columns of the window that are not in the cache yet."""

    def __init__(
        self, model: Any, input_ids: torch.Tensor, generation_config: GenerationConfig, call: Call, kwargs: dict
    ):
        self.model, self.generation_config, self.call = model, generation_config, call
        mask, positions = kwargs.pop("attention_mask", None), kwargs.pop("position_ids")
        self.window = Window(model.config.block_size, call, input_ids.shape[1], mask, positions)
        self.embeds = kwargs.pop("inputs_embeds", None)
        cache = kwargs.pop(CACHE_NAME, None) if kwargs.pop("use_cache", True) else None
        self.kwargs = kwargs  # for the forward pass
        self._check_length()
        self.cache: Any = self._choose_cache(cache)
        self.n_read = 0 if self.cache is None else int(self.cache.get_seq_length())  # columns in the cache
        self.is_first = True
        self.step = model.bind_step(len(input_ids)) if self._is_plain(input_ids) else None
        self.is_cache_kept = call.has_cache or generation_config.return_dict_in_generate
        # in inference mode only copies leave this class, because its tensors cannot be trained on
        self.mode = nullcontext if self.step is None or self.is_cache_kept else torch.inference_mode
        can_compile = model._valid_auto_compile_criteria({CACHE_NAME: self.cache}, generation_config)
        self.forward = model.get_compiled_call(generation_config.compile_config) if can_compile else model
        self.kernels = nullcontext if self.cache is None or can_compile else use_kernels(model)

    def _check_length(self) -> None:
        block_size, name = self.model.config.block_size, f"{type(self.model).__name__}.generate"
        length = self.window.n_before + self.generation_config.max_length - self.window.n_padding
        if length - 1 <= block_size:  # the last token is not read
            return
        if self.window.n_before > 0 or self.embeds is not None:
            raise ValueError(
                f"{name}: sequence too long: expected at most block_size={block_size} tokens after a prompt given as "
                f"inputs_embeds, or known to a cache alone, got {length}; give input_ids, or lower max_new_tokens"
            )
        if self.call.stride == 1:
            logger.warning_once(
                f"{name}: the text grows past block_size={block_size} tokens. From there on the last {block_size} "
                f"tokens are read again for every new token, as nanoGPT does; generate(..., stride=n) drops n tokens "
                f"at once, which is faster and not what nanoGPT computes"
            )

    def _choose_cache(self, cache: Cache | None) -> Cache | None:
        """Returns the caller's cache, or a new one that has memory for the whole window and not more."""
        if cache is None or self.call.has_cache:
            return cache
        longest = self.model.config.block_size + self.window.n_padding
        if type(cache) is DynamicCache and not cache.offloading and not has_compiled_parts(self.model):
            longest = min(longest, self.window.n_before + self.generation_config.max_length - 1)
            cache.layers = [PreallocatedLayer(longest) for _ in range(self.model.config.n_layer)]
        elif type(cache) is StaticCache and cache.layers[0].max_cache_len > longest:
            return StaticCache(self.model.config, max_cache_len=longest, offloading=cache.offloading)
        return cache

    def _is_plain(self, input_ids: torch.Tensor) -> bool:
        """Returns whether this call of generate asks for nothing that the model's step does not know."""
        has_layers = self.cache is not None and all(type(layer) is PreallocatedLayer for layer in self.cache.layers)
        has_options = self.call.has_positions or not self.kwargs.keys() <= {"logits_to_keep"}
        return has_layers and not has_options and input_ids.device == self.model.device

    def read(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Returns the logits (B, V) after the text so far, (B, N), and the outputs of forward if it was called."""
        if self.window.follow(input_ids.shape[1]):
            self._empty_cache()
        n_new = self.window.end - self.window.start - self.n_read
        if self.step is None or self.is_first or n_new != 1:
            with self.kernels(), self.mode():
                outputs = self._read_by_forward(input_ids)
            self.is_first = False
            return outputs.logits[:, -1], outputs
        mask = self.window.mask
        positions = self.n_read if mask is None else mask.long().sum(-1) - 1
        key_mask = None if mask is None else (mask != 0)[:, None, None]  # (B, 1, 1, S)
        self.n_read += 1
        with self.mode():
            return self.step(input_ids[:, -1], positions, self.cache.layers, key_mask), None

    def _empty_cache(self) -> None:
        self.n_read = 0
        if self.call.stride == 1 and not self.is_cache_kept:
            self.cache = self.step = None  # each token would fill it, and nothing would read it
        elif isinstance(self.cache, DynamicCache):  # before Transformers 5.18, reset() left zeros of the old length
            self.cache.crop(-self.cache.get_seq_length())
        elif self.cache is not None:
            self.cache.reset()

    def _read_by_forward(self, input_ids: torch.Tensor) -> Any:
        """Reads the columns of the window that are not in the cache, all at once or in chunks."""
        window, is_cached = self.window, self.cache is not None
        first = window.start + self.n_read
        if first >= window.end:
            raise ValueError(
                f"{type(self.model).__name__}.generate: the cache contains {self.n_read} tokens: expected fewer than "
                f"the text's {window.end}; give the tokens that come after those in the cache"
            )
        n_chunk = window.end - first
        if self.generation_config.prefill_chunk_size and is_cached and self.embeds is None and window.start == 0:
            n_chunk = self.generation_config.prefill_chunk_size
        forward = self.model if self.is_first or n_chunk > 1 else self.forward
        for chunk in range(first, window.end, n_chunk):
            stop = min(chunk + n_chunk, window.end)
            inputs = self.model.prepare_inputs_for_generation(
                input_ids[:, max(0, window.start - window.n_before) : stop - window.n_before],
                next_sequence_length=stop - chunk if is_cached else None,
                attention_mask=None if window.mask is None else window.mask[:, : stop - window.start],
                position_ids=window.find_positions(stop, is_cached and self.cache.is_compileable),
                inputs_embeds=self.embeds,
                is_first_iteration=self.is_first,
                use_cache=is_cached,
                **{CACHE_NAME: self.cache},
                **self.kwargs,
            )
            outputs = forward(**inputs, return_dict=True)
        self.n_read += window.end - first if is_cached else 0
        return outputs


def count_padding(attention_mask: torch.Tensor | None) -> int:
    """Returns how many columns on the left are padding in every row."""
    return 0 if attention_mask is None else int(attention_mask.long().argmax(-1).min())


def _find_pad_id(generation_config: GenerationConfig) -> int | None:
    """Returns the token that follows the end of a sequence: the pad token, or else the first eos token."""
    for value in (generation_config.pad_token_id, generation_config.eos_token_id):
        if value is not None:
            return int(torch.as_tensor(value).flatten()[0])
    return None
