"""How nanoGPT models generate: on past block_size as nanoGPT does, from prompts of any length, and quickly on a CPU.

nanoGPT reads the last block_size tokens for every token it draws (model.py @ 3adf61e, GPT.generate). Here the KV cache
does the same work while the text fits. Beyond that, learned positions cannot move inside a cache, so the window is
read again: for each token, which gives nanoGPT's own numbers, or for every `stride` tokens, which is cheap. Everything
else is Transformers' GenerationMixin. This file travels with saved models as remote code, so it imports torch,
transformers and cache_nano_gpt.py, which travels too.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
import transformers
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin
from transformers.utils import logging

from .cache_nano_gpt import CACHE_NAME, RoomyLayer, describe_newest, is_untested

logger = logging.get_logger(__name__)

# Rows up to which oneDNN's float32 kernel takes the place of BLAS, and from which float16 is computed in float32.
# Measured on 2 AVX512 cores at widths 768 to 50304: BLAS reads 16 GB/s of weights for 1 row and 9 for 8, oneDNN 35 and
# 26; float16 reads 40 GB/s for 1 row, and its time then grows with the rows.
_FEW_ROWS = 32
_MANY_HALF_ROWS = 8


Method = TypeVar("Method", bound=Callable)


def document_as(original: Callable) -> Callable[[Method], Method]:
    """Gives a method the documentation and signature of the one it overrides; to type checkers it stays itself."""
    return cast("Callable[[Method], Method]", functools.wraps(original))


class NanoGPTGenerationMixin(GenerationMixin):
    """GenerationMixin with nanoGPT's window, and one argument more: `generate(..., stride=n)`."""

    _is_cache_checked = False  # in this process; only where Transformers is newer than the tested ones

    @document_as(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any):
        for name in ("past_key_values", "cache"):  # either name in any Transformers
            if kwargs.get(name) is None:
                kwargs.pop(name, None)
            elif name != CACHE_NAME:
                kwargs[CACHE_NAME] = kwargs.pop(name)
        # Without a cache the kernels stay nanoGPT's, bit for bit; and a compiled model has kernels of its own.
        is_cached = _get_setting("use_cache", self, args, kwargs) is not False
        is_compiled = _get_setting("compile_config", self, args, kwargs) is not None
        if is_cached and is_untested():
            self._check_cache_once()
        with _use_decoding_kernels(self) if is_cached and not is_compiled else nullcontext():
            return super().generate(*args, **kwargs)

    def _check_cache_once(self) -> None:
        """Compares this model's logits with a cache and without, on the first cached generate of a process.

        It is for a Transformers that nobody has tried: a change of its caches can give other tokens without an error.

        Raises:
            RuntimeError: If the logits differ by more than rounding can explain.
        """
        if NanoGPTGenerationMixin._is_cache_checked or self.config.block_size == 1:
            return
        generator = torch.Generator().manual_seed(1337)  # no number is drawn from the caller's generator
        n_new = min(4, self.config.block_size - 1)
        length = min(8, self.config.block_size - n_new)
        prompt = torch.randint(self.config.vocab_size, (1, length), generator=generator).to(self.device)
        settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        own_config = self.generation_config  # type: ignore[has-type]
        self.generation_config = GenerationConfig()
        NanoGPTGenerationMixin._is_cache_checked = True  # for the call that follows
        try:
            output = self.generate(prompt, max_new_tokens=n_new, **settings)
            with torch.no_grad():
                uncached = self(output.sequences[:, :-1], use_cache=False).logits[0, length - 1 :].float()
        except BaseException:
            NanoGPTGenerationMixin._is_cache_checked = False
            raise
        finally:
            self.generation_config = own_config
        tolerance = math.sqrt(torch.finfo(self.dtype).eps) * uncached.abs().max()
        difference = (torch.cat(output.logits).float() - uncached).abs().max()
        if not difference <= tolerance:
            NanoGPTGenerationMixin._is_cache_checked = False
            raise RuntimeError(
                f"{type(self).__name__}.generate: a cache changes the logits by {difference:.3g}, where at most "
                f"{tolerance:.3g} was expected. Transformers {transformers.__version__} is newer than this model's "
                f"code was tested with ({describe_newest()}); generate(..., use_cache=False) goes on without a cache, "
                f"or install an older Transformers"
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        stride: int = 1,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Selects what the next forward pass reads; see GenerationMixin.

        Args:
            input_ids: (B, N) int64, all tokens so far, left-padded.
            stride: Tokens to drop at once when the text outgrows block_size. 1 is nanoGPT's way. With more, the cache
                is filled again once every `stride` tokens, and a token sees block_size - stride + 1 to block_size
                tokens.
        """
        cache = past_key_values if cache is None else cache
        length, position_ids = input_ids.shape[1], kwargs.get("position_ids")
        has_all_tokens = position_ids is None or position_ids.shape[-1] == length
        n_padding = 0
        if has_all_tokens and length > self.config.block_size:
            n_padding = _count_padding(attention_mask)
        start = self._find_window_start(length, n_padding, stride)
        if start == 0 or not has_all_tokens:
            return super().prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_sequence_length,
                **{CACHE_NAME: cache},
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **kwargs,
            )

        is_new_window = is_first_iteration or start != self._find_window_start(length - 1, n_padding, stride)
        window_mask = None if attention_mask is None else attention_mask[:, start:]
        if window_mask is not None and is_new_window and window_mask.all():
            window_mask = None
        kwargs["position_ids"] = None
        if cache is not None:
            kwargs["position_ids"] = _count_positions(input_ids[:, start:], window_mask)
            if is_new_window:
                _empty_cache(cache)
                next_sequence_length = None
        return super().prepare_inputs_for_generation(
            input_ids[:, start:],
            next_sequence_length=next_sequence_length,
            **{CACHE_NAME: cache},
            attention_mask=window_mask,
            **kwargs,
        )

    def _find_window_start(self, length: int, n_padding: int, stride: int) -> int:
        """Returns the first column to read. It depends on the length alone, not on where the prompt ended."""
        excess = length - n_padding - self.config.block_size
        return 0 if excess <= 0 else n_padding + min(math.ceil(excess / stride) * stride, length - n_padding - 1)

    def _prepare_generated_length(self, generation_config, has_default_max_length, input_ids_length, **kwargs):
        default_length = generation_config.max_length
        if generation_config.suppress_tokens:  # a token that ends the text is one, whatever row it was added in
            ends = generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [ends]
            generation_config.suppress_tokens = [i for i in generation_config.suppress_tokens if i not in ends]
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            input_ids_length=input_ids_length,
            **kwargs,
        )
        if has_default_max_length and generation_config.max_new_tokens is None:  # super() stops at block_size
            generation_config.max_length = default_length + input_ids_length
        if input_ids_length > self.config.block_size:  # the window is short, and chunks of it would not be
            generation_config.prefill_chunk_size = None
        return generation_config

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        # GenerationMixin calls this once, with the final max_length, before the first forward pass.
        block_size, stride = self.config.block_size, model_kwargs.get("stride", 1)
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= block_size:
            raise ValueError(f"{type(self).__name__}.generate: stride: expected 1 to {block_size}, got {stride!r}")
        n_padding = _count_padding(model_kwargs.get("attention_mask"))
        if max_cache_length - n_padding > block_size:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    f"{type(self).__name__}.generate: sequence too long: expected at most block_size={block_size} "
                    f"tokens after a prompt given as inputs_embeds, got {max_cache_length - n_padding + 1}; give "
                    f"input_ids, or lower max_new_tokens"
                )
            if stride == 1:
                logger.warning_once(
                    f"{type(self).__name__}.generate: the text grows past block_size={block_size} tokens. From there "
                    f"on the last {block_size} tokens are read again for every new token, as nanoGPT does; "
                    f"generate(..., stride=n) drops n tokens at once, which is faster and not what nanoGPT computes"
                )
            max_cache_length = block_size + n_padding
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get(CACHE_NAME)
        is_new = type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading
        if is_new and not getattr(cache, "_is_user_defined", False) and _decodes_on_cpu(self):
            cache.layers = [RoomyLayer(max_cache_length) for _ in range(self.config.n_layer)]

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if hasattr(criterion, "max_position_embeddings"):  # it warns of exceptions past block_size: there are none
                criterion.max_position_embeddings = None
        return criteria

    def _get_candidate_generator(self, generation_config, assistant_model=None, **kwargs):
        # Drafts are checked in one pass, which only works where they all fit; after that, tokens come one by one.
        limit = self.config.block_size
        if assistant_model is not None:
            limit = min(limit, getattr(assistant_model.config, "max_position_embeddings", limit))
        longest = generation_config.max_length
        generation_config.max_length = min(longest, limit + 1)
        generator = super()._get_candidate_generator(
            generation_config=generation_config, assistant_model=assistant_model, **kwargs
        )
        generation_config.max_length = longest
        draft = generator.get_candidates

        def get_candidates(input_ids: torch.LongTensor, *args: Any, **kwargs: Any):
            room = limit - input_ids.shape[1]
            if room <= 0:
                return input_ids, None
            candidate_ids, candidate_logits = draft(input_ids, *args, **kwargs)  # prompt lookup may draft too many
            return candidate_ids[:, :limit], None if candidate_logits is None else candidate_logits[:, :room]

        generator.get_candidates = get_candidates
        return generator

    def generate_batch(self, inputs, generation_config=None, **kwargs):
        # Checked here too: the method of the same name logs errors of the requests and goes on without them.
        settings = self.generation_config if generation_config is None else generation_config
        max_new_tokens = kwargs.get("max_new_tokens")
        max_new_tokens = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        for input_ids in inputs:
            self._limit_new_tokens(len(input_ids), max_new_tokens)
        return super().generate_batch(inputs, generation_config=generation_config, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        manager = super().init_continuous_batching(*args, **kwargs)
        if "add_request" not in vars(manager):  # a kept manager comes back with it
            add_request = manager.add_request

            def add_request_that_fits(input_ids, request_id=None, max_new_tokens=None, *args: Any, **kwargs: Any):
                max_new_tokens = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
                max_new_tokens = self._limit_new_tokens(len(input_ids), max_new_tokens)
                return add_request(input_ids, request_id, max_new_tokens, *args, **kwargs)

            manager.add_request = add_request_that_fits
        return manager

    def _limit_new_tokens(self, prompt_length: int, max_new_tokens: int | None) -> int:
        """Returns how many tokens may be generated where the cache is shared and no window can move."""
        room = self.config.block_size - prompt_length
        if room < 1 or (max_new_tokens is not None and max_new_tokens > room):
            raise ValueError(
                f"{type(self).__name__}: request too long for continuous batching: expected at most "
                f"block_size={self.config.block_size} tokens, got {prompt_length} of the prompt and "
                f"{max_new_tokens or 'any number of'} new; shorten it, or use generate, which goes on past block_size"
            )
        return room if max_new_tokens is None else max_new_tokens


def _count_padding(attention_mask: torch.Tensor | None) -> int:
    """Returns how many columns on the left are padding in every row."""
    return 0 if attention_mask is None else int(attention_mask.long().argmax(-1).min())


def _count_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _empty_cache(cache: Cache) -> None:
    if isinstance(cache, DynamicCache):  # before Transformers 5.18, reset() left zeros of the old length
        cache.crop(-cache.get_seq_length())
    else:
        cache.reset()


def _get_setting(name: str, model: GenerationMixin, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Returns what a call of generate(*args, **kwargs) will use for a generation setting."""
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    values = [kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None)]
    return next((value for value in values if value is not None), None)


def _decodes_on_cpu(model: nn.Module) -> bool:
    """Tells whether the model runs on a CPU as it is written, with no part of it compiled."""
    compiled = (m for m in model.modules() if m._compiled_call_impl is not None or "_orig_mod" in m._modules)
    return model.device.type == "cpu" and "forward" not in vars(model) and next(compiled, None) is None


@contextmanager
def _use_decoding_kernels(model: nn.Module) -> Iterator[None]:
    """Lets the Linear modules of a model on a CPU use faster kernels for few rows."""
    changed = []
    if _decodes_on_cpu(model) and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        kernel = torch.ops.mkldnn._linear_pointwise.default
        for module in model.modules():
            # Not where a wrapper, a quantised or a sharded weight has taken the place of plain ones.
            if (
                type(module) is nn.Linear
                and "forward" not in vars(module)
                and type(module.weight.data) is torch.Tensor
            ):
                module.forward = functools.partial(_apply_linear, module, kernel)  # type: ignore[method-assign]
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _apply_linear(linear: nn.Linear, kernel: Callable, inputs: torch.Tensor) -> torch.Tensor:
    weight, bias = linear.weight, linear.bias
    n_rows = inputs.numel() // inputs.shape[-1]
    if inputs.dtype != weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(inputs, weight, bias)
    if inputs.dtype == torch.float32 and n_rows <= _FEW_ROWS:
        return kernel(inputs, weight, bias, "none", [], "")
    if inputs.dtype == torch.float16 and n_rows >= _MANY_HALF_ROWS:
        rows = inputs.float()  # in pieces, because a fresh float32 lm_head of 154 MB costs more than the product
        pieces = [kernel(rows, piece.float(), None, "none", [], "") for piece in weight.split(2048)]
        outputs = torch.cat(pieces, dim=-1)
        return (outputs if bias is None else outputs + bias).to(inputs.dtype)
    return nn.functional.linear(inputs, weight, bias)


__all__ = ["NanoGPTGenerationMixin", "document_as"]
