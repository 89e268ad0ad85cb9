"""What a request asks for, checked before anything is drawn: settings of OpenAI's API as settings of generate.

A setting that is not obeyed is refused, unless it has the value that changes nothing.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

# OpenAI's own default for completions.
_MAX_TOKENS = 16
_MOST_STOPS = 4

# Settings that are not obeyed, and what they may say because it changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "suffix": ("",),
    "top_logprobs": (),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}
_IGNORED = {"metadata", "store", "stream_options", "user"}  # of the client's own, or what is sent in any case
_OBEYED = {"max_tokens", "model", "seed", "stop", "stream", "temperature", "top_k", "top_p"}


class RequestError(Exception):
    """A request asks for what cannot be had: a client gets the message with the status 400."""


@dataclass(frozen=True)
class RequestSettings:
    """How to draw what a request asks for.

    Args:
        generation: Settings of generate.
        seed: Of torch's random numbers; None for a seed of the machine's.
        stops: Texts that end the answer and are no part of it.
    """

    generation: GenerationConfig
    seed: int | None
    stops: tuple[str, ...]


def read_settings(
    body: Mapping[str, Any], defaults: GenerationConfig, *, names: frozenset[str], max_tokens: int | None = None
) -> RequestSettings:
    """Reads the settings of a request.

    Args:
        body: The request.
        defaults: The model's settings, for what the request leaves open.
        names: What the request may have beside the settings, such as "prompt".
        max_tokens: Default length; OpenAI's 16 tokens if None.

    Raises:
        RequestError: If a setting is unknown, not obeyed, or no number in its range.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        _check_name(name, value, names)
    lengths = ("max_completion_tokens", "max_tokens")
    length = next((_take(given, name, int, 1, math.inf) for name in lengths if name in given), None)
    temperature = _take(given, "temperature", float, 0, 100)
    top_p, top_k = _take(given, "top_p", float, 0, 1), _take(given, "top_k", int, 0, math.inf)
    seed = _take(given, "seed", int, -(2**63), 2**63 - 1)
    if top_p == 0:
        raise RequestError("top_p: expected more than 0, got 0; temperature 0 draws the likeliest token")
    settings = copy.deepcopy(defaults)
    settings.max_length = None
    settings.max_new_tokens = length or settings.max_new_tokens or max_tokens or _MAX_TOKENS
    if temperature == 0:
        settings.do_sample, settings.temperature, settings.top_p, settings.top_k = False, None, None, None
    elif given.keys() & {"temperature", "top_p", "top_k", "seed"}:
        settings.do_sample = True
    if settings.do_sample:
        settings.temperature = temperature or settings.temperature
        settings.top_p = top_p or settings.top_p
        settings.top_k = top_k if top_k is not None else settings.top_k or 0  # generate's own default is 50
    stops = _read_stops(given.get("stop"))
    settings.stop_strings = list(stops) or settings.stop_strings
    return RequestSettings(settings, seed, stops)


def _check_name(name: str, value: Any, names: frozenset[str]) -> None:
    if name in names | _OBEYED | _IGNORED:
        return
    if name not in _NEUTRAL:
        raise RequestError(f"{name}: is not known here: expected {sorted(names | _OBEYED)}; leave it out")
    if value not in _NEUTRAL[name]:
        raise RequestError(f"{name}: is not supported: expected none, got {value!r}; leave it out")


def _take(given: Mapping[str, Any], name: str, kind: type, least: float, most: float) -> Any:
    """Returns a number of the request, or None if it gives none."""
    value = given.get(name)
    if value is None:
        return None
    is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # NaN is in no range
        limits = f"of {least} or more" if most == math.inf else f"from {least} to {most}"
        word = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name}: expected {word} {limits}, got {value!r}; change it or leave it out")
    return value


def _read_stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    is_right = isinstance(stops, list) and all(isinstance(text, str) and text for text in stops)
    if not is_right or len(stops) > _MOST_STOPS:
        raise RequestError(
            f"stop: expected a text or up to {_MOST_STOPS} of them, none empty, got {stop!r}; change it"
        )
    return tuple(stops)
