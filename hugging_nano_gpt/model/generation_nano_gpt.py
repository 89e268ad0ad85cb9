"""How nanoGPT models generate: generate() of Transformers, with a decoding loop of nanoGPT's own.

Greedy decoding and sampling enter the loop of decoding_nano_gpt.py by the door that Transformers leaves open,
`generate(custom_generate=...)`, and go on past block_size as nanoGPT does. Beams, drafts and continuous batching are
Transformers' own and end at block_size, with an error before the first token. This file travels with saved models as
remote code, so it imports torch, transformers and the files that travel with it.
"""

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch
import transformers
from transformers import GenerationConfig, GenerationMixin, StopStringCriteria
from transformers.generation import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .cache_nano_gpt import CACHE_NAME, describe_newest, is_untested
from .decoding_nano_gpt import Call, count_padding, decode
from .kernels_nano_gpt import use_kernels
from .vocabulary_nano_gpt import count_tokens

_SIGNATURE = inspect.signature(GenerationMixin.generate)
_DEFAULT_NEW_TOKENS = 20  # Transformers' own, which it would cut at block_size

Method = TypeVar("Method", bound=Callable)


def document_as(original: Callable) -> Callable[[Method], Method]:
    """Gives a method the documentation and signature of the one it overrides; to type checkers it stays itself."""
    return cast("Callable[[Method], Method]", functools.wraps(original))


class NanoGPTGenerationMixin(GenerationMixin):
    """GenerationMixin with nanoGPT's window, and one argument more: `generate(..., stride=n)`."""

    _is_cache_checked = False  # in this process; only where Transformers is newer than the tested ones

    @document_as(GenerationMixin.generate)
    def generate(self, *args: Any, stride: int = 1, **kwargs: Any):
        kwargs = _name_arguments(self, args, kwargs)
        block_size = self.config.block_size
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= block_size:
            raise ValueError(f"{type(self).__name__}.generate: stride: expected 1 to {block_size}, got {stride!r}")
        settings = _merge_settings(self, kwargs)
        if settings.use_cache is not False and is_untested():
            self._check_cache_once()
        if settings.stop_strings is not None and kwargs.get("tokenizer") is not None:
            criterion = _StopStrings(kwargs["tokenizer"], settings.stop_strings)
            kwargs |= {
                "stopping_criteria": [*(kwargs.get("stopping_criteria") or []), criterion],
                "stop_strings": None,
            }
        if settings.use_cache is False and kwargs.get(CACHE_NAME) is not None:
            raise ValueError(
                f"{type(self).__name__}.generate: use_cache=False with past_key_values: expected one of the two, got "
                f"a {type(kwargs[CACHE_NAME]).__name__} too; leave one out"
            )
        self._let_text_end(settings, kwargs)
        is_ours = _uses_own_loop(self, settings, kwargs)
        if not is_ours or settings.guidance_scale not in (None, 1):
            self._check_room(settings, kwargs)
        if is_ours:
            call = Call(
                stride=stride,
                streamer=kwargs.get("streamer"),
                has_cache=kwargs.get(CACHE_NAME) is not None,
                has_positions=kwargs.get("position_ids") is not None,
            )
            return super().generate(**kwargs, custom_generate=functools.partial(decode, call=call))
        # Without a cache the kernels stay nanoGPT's, bit for bit; and a compiled model has kernels of its own.
        is_plain = settings.use_cache is False or settings.compile_config is not None
        with nullcontext() if is_plain else use_kernels(self)():
            return super().generate(**kwargs)

    def _let_text_end(self, settings: GenerationConfig, kwargs: dict[str, Any]) -> None:
        """Lets an end-of-text token be drawn that was added in a row without a token; what a call suppresses stays."""
        own, n_rows = self.generation_config.suppress_tokens, self.config.vocab_size
        if own and settings.suppress_tokens == own and kwargs.get("suppress_tokens") is None:
            n_tokens = count_tokens(self.generation_config, n_rows)
            ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
            kwargs["suppress_tokens"] = [each for each in own if each < n_tokens or each not in ends]

    def _check_room(self, settings: GenerationConfig, kwargs: dict[str, Any]) -> None:
        """Refuses what Transformers does in its own way and could not go on with past block_size."""
        name = f"{type(self).__name__}.generate"
        assistant = kwargs.get("assistant_model")
        mode = settings.get_generation_mode(assistant).value.replace("_", " ")
        if settings.assistant_early_exit is not None:
            raise ValueError(
                f"{name}: assistant_early_exit: nanoGPT's models have no head before their last layer: expected None, "
                f"got {settings.assistant_early_exit!r}; use assistant_model or prompt_lookup_num_tokens"
            )
        if getattr(settings, "is_assistant", False) or kwargs.get("custom_generate") is not None:
            return
        limit = getattr(getattr(assistant, "config", self.config), "max_position_embeddings", self.config.block_size)
        limit = min(limit, self.config.block_size)
        inputs = (kwargs.get(key) for key in ("inputs", "input_ids", "inputs_embeds", "negative_prompt_ids"))
        n_prompt = max((each.shape[1] for each in inputs if each is not None), default=1)
        n_new = settings.max_length - n_prompt if settings.max_new_tokens is None else settings.max_new_tokens
        length = n_prompt - count_padding(kwargs.get("attention_mask")) + n_new
        n_ahead = (settings.prompt_lookup_num_tokens or 1) - 1  # drafts can go beyond the end of the text
        if length - 1 + n_ahead > limit:
            way = "guidance_scale" if settings.guidance_scale not in (None, 1) else mode
            raise ValueError(
                f"{name}: sequence too long for {way}: expected at most {limit + 1 - n_ahead} tokens at "
                f"block_size={limit}, got {length}; lower max_new_tokens, or use plain sampling or greedy decoding, "
                f"which go on past block_size"
            )

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


class _StopStrings(StopStringCriteria):
    """StopStringCriteria for any vocabulary: the original spells tokens behind "abcdef", which some do not have."""

    @staticmethod
    def clean_tokenizer_vocab(tokenizer: Any, static_prefix: str = "abcdef", **kwargs: Any):
        vocabulary = tokenizer.get_vocab()
        if not set(static_prefix) <= {letter for token in vocabulary for letter in token}:
            static_prefix = next((token for token in sorted(vocabulary) if token.isprintable()), static_prefix)
        return StopStringCriteria.clean_tokenizer_vocab(tokenizer, static_prefix, **kwargs)


def _name_arguments(model: GenerationMixin, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of generate by name, those that hold a cache by this Transformers' name."""
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


def _merge_settings(model: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    """Returns what a call of generate will use: its arguments, its generation_config, the model's, in this order.

    A length that nobody gave is put into kwargs, because Transformers would end the text at block_size.
    """
    given = kwargs.get("generation_config")
    settings = GenerationConfig() if given is None else copy.deepcopy(given)
    settings.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
    settings.update(**kwargs)
    if settings.max_length is None and settings.max_new_tokens is None:
        warnings.warn(
            f"{type(model).__name__}.generate: neither max_new_tokens nor max_length is given: "
            f"{_DEFAULT_NEW_TOKENS} tokens are generated",
            stacklevel=3,
        )
        settings.max_new_tokens = kwargs["max_new_tokens"] = _DEFAULT_NEW_TOKENS
    return settings


def _uses_own_loop(model: Any, settings: GenerationConfig, kwargs: dict[str, Any]) -> bool:
    """Tells whether a call of generate goes through decode; otherwise it is Transformers' own from end to end."""
    is_synced = kwargs.get("synced_gpus")
    if is_synced is None and torch.distributed.is_available() and torch.distributed.is_initialized():
        is_synced = is_fsdp_managed_module(model) or is_deepspeed_zero3_enabled()
    return (
        settings.get_generation_mode(kwargs.get("assistant_model"))
        in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and not getattr(settings, "is_assistant", False)
        and kwargs.get("custom_generate") is None
        and settings.cache_implementation != "paged"
        and not is_synced  # every process has to read as many tokens as the others
        and "prepare_inputs_for_generation" not in vars(model)  # PEFT puts virtual tokens before a prompt there
    )


__all__ = ["NanoGPTGenerationMixin", "document_as"]
