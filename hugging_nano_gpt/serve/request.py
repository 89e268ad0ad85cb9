"""What a request asks for, checked before anything is generated: OpenAI's fields, and generate's as extensions.

A field that is not supported is refused, unless it has the value that changes nothing.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import join_some, show

# Fields that are not supported, and their values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}  # notes of clients
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed"}
_COLDEST = 1e-20  # greedy long before; logits divided by less can leave float32

# Clearer than pydantic's own messages.
_EXPECTED = {
    "messages": "a list of objects with a role and a content of text",
    "prompt": "a text, a list of texts, token ids, or a list of lists of token ids",
    "stop": "a text or up to 16 of them, of 1 to 256 characters each",
}


class RequestError(Exception):
    """A request cannot be answered. The client gets the message, the field to blame, a status, and OpenAI's code."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _StreamOptions(_Strict):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Common(_Strict):
    """The fields of both kinds of requests."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(max_length=16),
    ] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    temperature: float = Field(1, ge=0, le=100)
    top_p: float = Field(1, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0, ge=0, le=1)
    repetition_penalty: float = Field(1, ge=0.01, le=100)
    stride: int = Field(1, ge=1)

    def get_generate_kwargs(self) -> dict[str, Any]:
        """Returns arguments of generate. It samples if a field of sampling is given, and is greedy otherwise."""
        if not self.model_fields_set & _SAMPLING or self.temperature < _COLDEST:
            return {"do_sample": False, "stride": self.stride}
        return {"do_sample": True, **self.model_dump(include=(_SAMPLING | {"stride"}) - {"seed"})}


class CompletionRequest(_Common):
    """A request to /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def n_top(self) -> int | None:
        """How many of the likeliest tokens to list for each token; None for no log-probabilities."""
        return self.logprobs


class _Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat; a template may read more fields of it."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[_Part]


class ChatRequest(_Common):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}
    echo: ClassVar[bool] = False

    @property
    def n_top(self) -> int | None:
        """As in CompletionRequest."""
        return self.top_logprobs if self.logprobs else None


Request = CompletionRequest | ChatRequest


def read_request(body: bytes, kind: type[Request], name: str) -> Request:
    """Reads a request of a kind to the model of a name.

    Raises:
        RequestError: If it is not JSON, asks for another model, or a field is unknown, not supported or out of range.
    """
    try:
        given = json.loads(body.decode(), parse_constant=_refuse_constant)
        json.dumps(given, ensure_ascii=False).encode()  # fails for halves of characters, which escapes can spell
    except ValueError as error:
        raise RequestError(f"body: expected JSON in UTF-8, got other bytes: {error}; check them") from error
    if not isinstance(given, dict):
        raise RequestError(f"body: expected an object in JSON, got {show(given)}; send one")
    given = {key: value for key, value in given.items() if value is not None and key not in _IGNORED}
    for key in sorted(given.keys() & _NEUTRAL.keys()):
        if (value := given.pop(key)) not in _NEUTRAL[key]:
            raise RequestError(f"{key}: is not supported: expected none, got {show(value)}; leave it out", key)
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        raise _explain(error) from error
    check_name(name if request.model is None else request.model, name)
    return request


def check_name(asked: str, name: str) -> None:
    """Raises RequestError if another model is asked for."""
    if asked != name:
        message = f"model: expected {name!r}, which is served here, got {show(asked)}; ask for that"
        raise RequestError(message, "model", 404, "model_not_found")


def check_size(request: Request, prompts: list[list[int]], *, most_tokens: int, block_size: int) -> None:
    """Checks the sizes; sets max_tokens if a request leaves it open: 16 as OpenAI, or block_size in a chat.

    Raises:
        RequestError: If all answers together are longer than most_tokens, or block_size is too small.
    """
    n_choices, default = len(prompts) * request.n, block_size if isinstance(request, ChatRequest) else 16
    if request.max_tokens is None:
        request.max_tokens = min(default, most_tokens // n_choices)
    if n_choices * max(request.max_tokens, 1) > most_tokens:
        got = f"{n_choices} x {request.max_tokens}"
        message = f"max_tokens: expected at most {most_tokens} in all answers together, got {got}; ask for fewer"
        raise RequestError(message, "max_tokens")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs: expected logprobs=true with it, got none; give both", "top_logprobs")
    if request.stride > block_size:
        raise RequestError(f"stride: expected 1 to block_size={block_size}, got {request.stride}; lower it", "stride")
    if request.echo and request.n_top is not None and max(map(len, prompts)) > block_size + 1:
        most = f"block_size + 1 = {block_size + 1} tokens with echo and logprobs"
        raise RequestError(f"prompt: expected at most {most}, got {max(map(len, prompts))}; shorten it", "prompt")


def _explain(error: ValidationError) -> RequestError:
    sentences = {}
    for fault in error.errors(include_url=False):
        param = str(fault["loc"][0])
        expected = _EXPECTED.get(param) or fault["msg"].replace("Input should be ", "")
        got = "none" if fault["type"] == "missing" else show(fault["input"])
        is_unknown = fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1
        message = "is not known here; leave it out" if is_unknown else f"expected {expected}, got {got}; change it"
        sentences[param] = f"{param[:60]}: {message}"
    return RequestError(join_some([*sentences.values()]), next(iter(sentences)))


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number in JSON")
