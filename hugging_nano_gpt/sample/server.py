"""The app that run_server serves: Transformers' handlers of OpenAI's API, held to what a request asks for.

Transformers' own server (transformers.cli.serving, 5.17 to 5.24) answers, streams, and draws one text at a time in a
thread. This adds what it leaves out: the requests are checked, sampling starts where they ask for it, each draws from
its own seed, and a text ends before its stop text. Needs the extra `serve`.
"""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from ..errors import TokenizerError
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.text import encode_text
from .requests import RequestError, RequestSettings, read_settings

_COMPLETION = frozenset({"prompt"})
_CHAT = frozenset({"messages", "max_completion_tokens", "chat_template_kwargs"})


def build_app(model: NanoGPTLMHeadModel, tokenizer: PreTrainedTokenizerBase, name: str) -> FastAPI:
    """Makes the app.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer; for chats, with a chat template.
        name: What requests call the model; one that names none means it too.
    """
    app = FastAPI(title=name)
    models = _OneModel(name, model, tokenizer)
    state = _OneManager()
    handlers = {"completions": _Completions(models, state), "chat/completions": _Chats(models, state)}

    def add(path: str, handler: Any) -> None:
        @app.post(f"/v1/{path}")
        async def answer(body: dict) -> Any:
            return await handler.handle_request(body, f"cmpl-{uuid.uuid4()}")

    for path, handler in handlers.items():
        add(path, handler)

    @app.get("/v1/models")
    def list_models() -> dict:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "local"}]}

    @app.get("/health")
    def tell_health() -> dict:
        return {"status": "ok"}

    @app.exception_handler(RequestError)
    @app.exception_handler(StarletteHTTPException)
    @app.exception_handler(RequestValidationError)
    def explain(_request: Request, error: Any) -> JSONResponse:
        is_http = isinstance(error, StarletteHTTPException)
        status, message = (error.status_code, error.detail) if is_http else (400, str(error))
        if isinstance(error, RequestValidationError):
            message = "body: expected an object in JSON, got another; send the header Content-Type: application/json"
        return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status_code=status)

    return app


class _OneModel:
    """Stands in for the ModelManager of the handlers, which would load models by name."""

    def __init__(self, name: str, model: NanoGPTLMHeadModel, tokenizer: PreTrainedTokenizerBase):
        self.name, self.model, self.tokenizer = name, model, tokenizer

    @staticmethod
    def get_model_modality(*_: Any, **__: Any) -> Modality:
        return Modality.LLM


class _OneManager(GenerationState):
    """Draws for all handlers in the same thread, one text after another."""

    def __init__(self) -> None:
        super().__init__()
        self._manager = _Manager()

    def get_manager(self, *_: Any, **__: Any) -> GenerateManager:
        return self._manager


class _Obedient:
    """What both handlers share: a request is checked, and its settings are those that are used."""

    model_manager: _OneModel
    _names: frozenset[str]
    _valid_params_class = None  # read_settings checks the names
    _unused_fields: set[str] = set()

    async def handle_request(self, body: dict, request_id: str) -> Any:
        name = self.model_manager.name
        if body.get("model") not in (None, name):
            raise HTTPException(404, f"model: expected {name!r}, which is served here, got {body['model']!r}")
        body = {"model": name, **{key: value for key, value in body.items() if value is not None}}
        self._read_settings(body, self.model_manager.model.generation_config)
        self._check_text(body)
        response = await super().handle_request(body, request_id)  # type: ignore[misc]
        if isinstance(response, StreamingResponse):
            response.body_iterator = _end_stream(response.body_iterator)
        return response

    def _resolve_model(self, body: dict) -> tuple[str, NanoGPTLMHeadModel, PreTrainedTokenizerBase]:
        return self.model_manager.name, self.model_manager.model, self.model_manager.tokenizer

    def _build_generation_config(self, body: dict, defaults: GenerationConfig, use_cb: bool = False) -> Any:
        settings = self._read_settings(body, defaults)
        settings.generation.nanogpt_request = settings  # for _Manager, which gets nothing else of the request
        return settings.generation

    def _read_settings(self, body: dict, defaults: GenerationConfig) -> RequestSettings:
        return read_settings(body, defaults, names=self._names)

    def _check_text(self, body: dict) -> None:
        raise NotImplementedError

    def _check_tokens(self, text: str, where: str) -> None:
        try:
            encode_text(self.model_manager.tokenizer, text, where)
        except TokenizerError as error:
            raise RequestError(str(error)) from error


class _Completions(_Obedient, CompletionHandler):
    _names = _COMPLETION

    def _check_text(self, body: dict) -> None:
        prompt = body.get("prompt", "")
        if not isinstance(prompt, str):
            raise RequestError(f"prompt: expected one text, got {type(prompt).__name__}; send a request for each")
        self._check_tokens(prompt, "prompt")


class _Chats(_Obedient, ChatCompletionHandler):
    _names = _CHAT

    def _read_settings(self, body: dict, defaults: GenerationConfig) -> RequestSettings:
        block_size = self.model_manager.model.config.block_size
        return read_settings(body, defaults, names=self._names, max_tokens=block_size)

    def _check_text(self, body: dict) -> None:
        tokenizer = self.model_manager.tokenizer
        if tokenizer.chat_template is None:
            raise RequestError(
                "messages: this is a base model: expected a tokenizer with a chat template, got none; send a prompt "
                "to /v1/completions, or give its tokenizer the template that it was trained to chat with"
            )
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise RequestError(
                "messages: expected a list of objects with a role and a content of text, got another; change it"
            )
        plain = self.get_processor_inputs_from_messages(messages, Modality.LLM)
        extra = body.get("chat_template_kwargs", {})
        try:
            text = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False, **extra)
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"messages: the chat template takes none such: {error}; change them") from error
        self._check_tokens(text, "messages")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )


class _Manager(GenerateManager):
    """Draws with the seed of a request, and ends its text before a stop text."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        settings = gen_config.__dict__.pop("nanogpt_request")  # generate does not know it
        seeded = _Seeded(model, settings.seed)
        queue, streamer = super().generate_streaming(seeded, processor, inputs, gen_config, **kwargs)
        return (_CutQueue(queue, settings.stops) if settings.stops else queue), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any
    ) -> Any:
        settings = gen_config.__dict__.pop("nanogpt_request")  # generate does not know it
        seeded = _Seeded(model, settings.seed)
        text, *others = await super().generate_non_streaming(seeded, processor, inputs, gen_config, **kwargs)
        return (_find_stop(settings.stops).split(text, maxsplit=1)[0] if settings.stops else text), *others


class _Seeded:
    """A model that seeds before it draws, in the thread that draws."""

    def __init__(self, model: NanoGPTLMHeadModel, seed: int | None):
        self._model, self._seed = model, seed

    def generate(self, **kwargs: Any) -> Any:
        if self._seed is None:
            torch.seed()  # else the text would follow from the seed of the request before
        else:
            torch.manual_seed(self._seed)
        return self._model.generate(**kwargs)


class _CutQueue:
    """Hands on pieces of a text up to its first stop text, and holds back what may be the beginning of one."""

    def __init__(self, queue: asyncio.Queue, stops: Sequence[str]):
        self._queue, self._stop, self._stops = queue, _find_stop(stops), stops
        self._held, self._is_cut = "", False
        self._next: list[Any] = []

    async def get(self) -> Any:
        return self._next.pop() if self._next else self._cut(await self._queue.get())

    def get_nowait(self) -> Any:
        return self._next.pop() if self._next else self._cut(self._queue.get_nowait())

    def _cut(self, item: Any) -> Any:
        if not isinstance(item, str):  # the end, or an error
            if self._is_cut or not self._held:
                return item
            self._next.append(item)
            return self._held
        if self._is_cut:
            return ""
        text = self._held + item
        found = self._stop.search(text)
        if found:
            self._is_cut = True
            return text[: found.start()]
        n_held = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _find_stop(stops: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, stops)))


async def _end_stream(chunks: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for chunk in chunks:
        yield chunk
    yield "data: [DONE]\n\n"
