"""generate() of nanoGPT models: Transformers' own, with a decoding loop that continues past block_size.

Greedy decoding and sampling run the loop of decoding_nano_gpt.py, which Transformers calls through its public argument
`custom_generate`. Beam search, assisted decoding and continuous batching are Transformers' own: they cannot continue
past block_size, so an error says so before the first token. Rows of the vocabulary without a token are never sampled:
generation_config.suppress_tokens lists them. This file travels with saved models as remote code.
"""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
from transformers import GenerationConfig, GenerationMixin, StopStringCriteria
from transformers.generation import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .decoding_nano_gpt import Call, count_padding, decode
from .fast_nano_gpt import use_kernels
from .inputs_nano_gpt import CACHE_NAME, describe_untested, is_untested

_SIGNATURE = inspect.signature(GenerationMixin.generate)
_DEFAULT_NEW_TOKENS = 20  # Transformers' default, which it would limit to block_size

Method = TypeVar("Method", bound=Callable)


def document_as(original: Callable) -> Callable[[Method], Method]:
    """Gives a method the docstring and signature of the one it overrides; type checkers see its own signature."""
    return cast("Callable[[Method], Method]", functools.wraps(original))


class NanoGPTGenerationMixin(GenerationMixin):
    """GenerationMixin that continues past block_size, with an additional argument: `generate(..., stride=n)`."""

    _is_cache_checked = False  # in this process; see _check_cache_once

    @document_as(GenerationMixin.generate)
    def generate(self, *args: Any, stride: int = 1, **kwargs: Any):
        kwargs = _name_arguments(self, args, kwargs)
        block_size = self.config.block_size
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= block_size:
            raise ValueError(f"{type(self).__name__}.generate: stride: expected 1 to {block_size}, got {stride!r}")
        merged = _merge_config(self, kwargs)
        if merged.use_cache is not False and is_untested():
            self._check_cache_once()
        if merged.stop_strings is not None and kwargs.get("tokenizer") is not None:
            criterion = _StopStrings(kwargs["tokenizer"], merged.stop_strings)
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), criterion]
            kwargs["stop_strings"] = None
        if merged.use_cache is False and kwargs.get(CACHE_NAME) is not None:
            raise ValueError(
                f"{type(self).__name__}.generate: use_cache=False with a cache: expected one of the two, got a "
                f"{type(kwargs[CACHE_NAME]).__name__} too; leave one out"
            )
        self._allow_end_tokens(merged, kwargs)
        is_ours = _uses_own_loop(self, merged, kwargs)
        if not is_ours or merged.guidance_scale not in (None, 1):
            self._check_room(merged, kwargs)
        if is_ours:
            call = Call(
                stride=stride,
                streamer=kwargs.get("streamer"),
                has_cache=kwargs.get(CACHE_NAME) is not None,
                has_positions=kwargs.get("position_ids") is not None,
            )
            return super().generate(**kwargs, custom_generate=functools.partial(decode, call=call))
        # without a cache the numbers are nanoGPT's, bit for bit, and a compiled model has its own kernels
        is_plain = merged.use_cache is False or merged.compile_config is not None
        with nullcontext() if is_plain else use_kernels(self)():
            return super().generate(**kwargs)

    def _allow_end_tokens(self, merged: GenerationConfig, kwargs: dict[str, Any]) -> None:
        """Allows an eos token in a row that had no token; what the call itself suppresses stays suppressed."""
        own, n_rows = self.generation_config.suppress_tokens, self.config.vocab_size
        if own and merged.suppress_tokens == own and kwargs.get("suppress_tokens") is None:
            n_tokens = count_tokens(self.generation_config, n_rows)
            ends = merged.eos_token_id if isinstance(merged.eos_token_id, list) else [merged.eos_token_id]
            kwargs["suppress_tokens"] = [each for each in own if each < n_tokens or each not in ends]

    def _check_room(self, merged: GenerationConfig, kwargs: dict[str, Any]) -> None:
        """Raises ValueError for a call that Transformers' own decoding could not finish within block_size."""
        name = f"{type(self).__name__}.generate"
        assistant = kwargs.get("assistant_model")
        mode = merged.get_generation_mode(assistant).value.replace("_", " ")
        if merged.assistant_early_exit is not None:
            raise ValueError(
                f"{name}: assistant_early_exit: nanoGPT's models have no head before their last layer: expected None, "
                f"got {merged.assistant_early_exit!r}; use assistant_model or prompt_lookup_num_tokens"
            )
        if getattr(merged, "is_assistant", False) or kwargs.get("custom_generate") is not None:
            return
        limit = getattr(getattr(assistant, "config", self.config), "max_position_embeddings", self.config.block_size)
        limit = min(limit, self.config.block_size)
        inputs = (kwargs.get(key) for key in ("inputs", "input_ids", "inputs_embeds", "negative_prompt_ids"))
        n_prompt = max((each.shape[1] for each in inputs if each is not None), default=1)
        n_new = merged.max_length - n_prompt if merged.max_new_tokens is None else merged.max_new_tokens
        length = n_prompt - count_padding(kwargs.get("attention_mask")) + n_new
        n_ahead = (merged.prompt_lookup_num_tokens or 1) - 1  # drafts can be longer than the text
        if length - 1 + n_ahead > limit:
            way = "guidance_scale" if merged.guidance_scale not in (None, 1) else mode
            raise ValueError(
                f"{name}: sequence too long for {way}: expected at most {limit + 1 - n_ahead} tokens at "
                f"block_size={limit}, got {length}; lower max_new_tokens, or use sampling or greedy decoding, which "
                f"continue past block_size"
            )

    def _check_cache_once(self) -> None:
        """Compares the logits with and without a cache, once in a process, if Transformers is newer than tested.

        Raises:
            RuntimeError: If they differ by more than rounding: caches have changed, and the tokens would be wrong.
        """
        if NanoGPTGenerationMixin._is_cache_checked or self.config.block_size == 1:
            return
        generator = torch.Generator().manual_seed(1337)  # the global generator is not changed
        n_new = min(4, self.config.block_size - 1)
        length = min(8, self.config.block_size - n_new)
        prompt = torch.randint(self.config.vocab_size, (1, length), generator=generator).to(self.device)
        own_config = self.generation_config  # type: ignore[has-type]
        self.generation_config = GenerationConfig()
        NanoGPTGenerationMixin._is_cache_checked = True  # for the next line but one
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        try:
            output = self.generate(prompt, max_new_tokens=n_new, **options)
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
                f"{type(self).__name__}.generate: a cache changes the logits: expected a difference of at most "
                f"{tolerance:.3g}, got {difference:.3g}; {describe_untested()}; use generate(..., use_cache=False), "
                f"or install an older Transformers"
            )

    def generate_batch(self, inputs, generation_config=None, **kwargs):
        # checked here too, because Transformers logs the errors of single requests and ignores them
        used = self.generation_config if generation_config is None else generation_config
        max_new_tokens = kwargs.get("max_new_tokens")
        max_new_tokens = used.max_new_tokens if max_new_tokens is None else max_new_tokens
        for input_ids in inputs:
            self._limit_new_tokens(len(input_ids), max_new_tokens)
        return super().generate_batch(inputs, generation_config=generation_config, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        manager = super().init_continuous_batching(*args, **kwargs)
        if "add_request" not in vars(manager):  # else this manager was returned before
            add_request = manager.add_request

            def add_request_that_fits(input_ids, request_id=None, max_new_tokens=None, *args: Any, **kwargs: Any):
                max_new_tokens = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
                max_new_tokens = self._limit_new_tokens(len(input_ids), max_new_tokens)
                return add_request(input_ids, request_id, max_new_tokens, *args, **kwargs)

            manager.add_request = add_request_that_fits
        return manager

    def _limit_new_tokens(self, prompt_length: int, max_new_tokens: int | None) -> int:
        """Returns how many tokens fit into block_size after a prompt, for continuous batching."""
        room = self.config.block_size - prompt_length
        if room < 1 or (max_new_tokens is not None and max_new_tokens > room):
            raise ValueError(
                f"{type(self).__name__}: request too long for continuous batching: expected at most "
                f"block_size={self.config.block_size} tokens, got {prompt_length} of the prompt and "
                f"{max_new_tokens or 'any number of'} new; shorten it, or use generate, which continues past "
                f"block_size"
            )
        return room if max_new_tokens is None else max_new_tokens


class _StopStrings(StopStringCriteria):
    """StopStringCriteria for any vocabulary: the original decodes tokens after "abcdef", which some cannot encode."""

    @staticmethod
    def clean_tokenizer_vocab(tokenizer: Any, static_prefix: str = "abcdef", **kwargs: Any):
        vocabulary = tokenizer.get_vocab()
        if not set(static_prefix) <= {letter for token in vocabulary for letter in token}:
            static_prefix = next((token for token in sorted(vocabulary) if token.isprintable()), static_prefix)
        return StopStringCriteria.clean_tokenizer_vocab(tokenizer, static_prefix, **kwargs)


def _name_arguments(model: GenerationMixin, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of generate by name, the cache by its name in this Transformers."""
    arguments = _SIGNATURE.bind(model, *args, **kwargs).arguments
    named = {**arguments, **arguments.get("kwargs", {})}
    for name in ("self", "kwargs"):
        named.pop(name, None)
    for name in ("past_key_values", "cache"):  # either name in any Transformers
        if named.get(name) is None:
            named.pop(name, None)
        elif name != CACHE_NAME:
            named[CACHE_NAME] = named.pop(name)
    return named


def _merge_config(model: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    """Merges what a call of generate uses: first its arguments, then its generation_config, then the model's.

    The default length is added to kwargs, because Transformers would end the text at block_size.
    """
    given = kwargs.get("generation_config")
    merged = GenerationConfig() if given is None else copy.deepcopy(given)
    merged.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    merged.update(**kwargs)
    if merged.max_length is None and merged.max_new_tokens is None:
        warnings.warn(
            f"{type(model).__name__}.generate: neither max_new_tokens nor max_length is given: "
            f"{_DEFAULT_NEW_TOKENS} tokens are generated",
            stacklevel=3,
        )
        merged.max_new_tokens = kwargs["max_new_tokens"] = _DEFAULT_NEW_TOKENS
    return merged


def _uses_own_loop(model: Any, merged: GenerationConfig, kwargs: dict[str, Any]) -> bool:
    """Returns whether a call of generate runs decode, and not a loop of Transformers'."""
    is_synced = kwargs.get("synced_gpus")
    if is_synced is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        is_synced = is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()
    return (
        merged.get_generation_mode(kwargs.get("assistant_model"))
        in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and not getattr(merged, "is_assistant", False)
        and kwargs.get("custom_generate") is None
        and merged.cache_implementation != "paged"
        and not is_synced  # where every process needs the same number of forward passes
        and "prepare_inputs_for_generation" not in vars(model)  # PEFT puts virtual tokens before a prompt there
    )


def count_tokens(generation_config: GenerationConfig, n_rows: int) -> int:
    """Returns how many of the n_rows of a vocabulary are tokens: all rows after the last token are suppressed."""
    suppressed, n_tokens = set(generation_config.suppress_tokens or ()), n_rows
    while n_tokens - 1 in suppressed:
        n_tokens -= 1
    return n_tokens


def suppress_rows(generation_config: GenerationConfig, n_rows: int, spare: Iterable[int]) -> None:
    """Makes generate never sample the spare rows, instead of those that were spare among n_rows until now."""
    n_tokens = count_tokens(generation_config, n_rows)
    by_user = {index for index in generation_config.suppress_tokens or () if index < n_tokens}
    generation_config.suppress_tokens = sorted(by_user.union(spare)) or None


def follow_resize(generation_config: GenerationConfig, n_before: int, n_rows: int, n_tokens: int | None) -> None:
    """Adapts a generation config to a vocabulary that was resized from n_before to n_rows rows.

    Args:
        generation_config: The model's, which is changed.
        n_before: The number of rows before.
        n_rows: The number of rows now.
        n_tokens: The number of rows that was asked for, without padding; None if only padding was asked for.
    """
    n_tokens = min(n_rows, count_tokens(generation_config, n_before) if n_tokens is None else n_tokens)
    suppress_rows(generation_config, n_before, range(n_tokens, n_rows))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(generation_config, name)
        if isinstance(value, int) and value >= n_rows:  # this row is gone
            setattr(generation_config, name, None)
