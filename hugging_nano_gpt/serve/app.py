"""The app: OpenAI's paths and errors, the API key, a log line for each request, and clients that leave."""

import asyncio
import functools
import hmac
import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import anyio
import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from transformers import PreTrainedTokenizerBase

from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .answer import Answer
from .drawing import Drawer, Job
from .prompt import Prompter
from .request import ChatRequest, CompletionRequest, Request, RequestError, check_name, check_size, read_request

_MOST_BYTES = 1 << 20
_PATIENCE_S = 30  # for a body to arrive and to be read
_N_READERS = 4  # threads that read bodies
_LEFT = 499  # nginx's status for a client that left


def build_app(
    model: NanoGPTLMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    queue: int = 32,
    max_tokens: int = 4096,
    api_key: str | None = None,
    allow_origin: str | None = None,
    quiet: bool = False,
) -> FastAPI:
    """Makes the app that serves a model on its device, with its tokenizer, under a name; see run_server."""
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.desk = desk = _Desk(model, tokenizer, name, queue, max_tokens)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "local"}

    @app.post("/v1/completions")
    async def complete(http: HTTPRequest) -> Response:
        return await desk.answer(http, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat(http: HTTPRequest) -> Response:
        return await desk.answer(http, ChatRequest)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{asked:path}")
    async def describe_model(asked: str) -> dict[str, Any]:
        check_name(asked, name)
        return card

    @app.get("/health")
    async def report_health() -> dict[str, str]:
        return {"status": "ok"}

    for kind in (RequestError, HTTPException, TimeoutError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _explain)
    app.add_middleware(_Gate, api_key=api_key, quiet=quiet)
    if allow_origin is not None:
        app.add_middleware(CORSMiddleware, allow_origins=[allow_origin], allow_methods=["*"], allow_headers=["*"])
    return app


class Server(uvicorn.Server):
    """uvicorn, which ends the streams of the app properly before it stops."""

    def __init__(self, app: FastAPI, host: str, port: int):
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "ws": "none", "lifespan": "off"}
        super().__init__(uvicorn.Config(app, host, port, timeout_graceful_shutdown=1, **quiet))

    async def shutdown(self, sockets: Any = None) -> None:
        self.config.app.state.desk.drawer.close()
        logging.getLogger("uvicorn.error").setLevel("CRITICAL")  # or a client that does not read causes a traceback
        await super().shutdown(sockets)


class _Desk:
    """Takes in requests and hands out answers."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, name: str, queue: int, max_tokens: int):
        self._name, self._max_tokens, self._block_size = name, max_tokens, model.config.block_size
        self._prompter = Prompter(tokenizer, model.config.vocab_size, max(max_tokens, self._block_size))
        self._readers = anyio.CapacityLimiter(_N_READERS)
        self.drawer = Drawer(model, tokenizer, queue)

    async def answer(self, http: HTTPRequest, kind: type[Request]) -> Response:
        """Answers a request, whole or as a stream.

        Raises:
            RequestError: If it cannot be answered.
        """
        with anyio.fail_after(_PATIENCE_S):
            read = functools.partial(self._read, await _read_body(http), kind)
            request, prompts = await anyio.to_thread.run_sync(read, limiter=self._readers, abandon_on_cancel=True)
        http.scope["answer"] = answer = Answer(request, self._name, sum(map(len, prompts)))
        job = self.drawer.start(request, prompts)
        job.watch = asyncio.create_task(_watch(http, job))
        if request.stream:
            return StreamingResponse(_stream(answer, job), media_type="text/event-stream")
        pieces = [piece async for piece in job.read()]
        return Response(await anyio.to_thread.run_sync(answer.write, pieces), media_type="application/json")

    def _read(self, body: bytes, kind: type[Request]) -> tuple[Request, list[list[int]]]:
        try:
            request = read_request(body, kind, self._name)
            prompts = self._prompter.encode(request)
        except RecursionError as error:
            raise RequestError("body: expected a flat object, got one nested too deeply; flatten it") from error
        check_size(request, prompts, most_tokens=self._max_tokens, block_size=self._block_size)
        return request, prompts


class _Gate:
    """Refuses requests without the key, and logs a line for each request when it has been answered."""

    def __init__(self, app: Any, api_key: str | None, quiet: bool):
        self._app, self._quiet = app, quiet
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        status, start = 500, time.perf_counter()

        async def send_and_note(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        given = dict(scope["headers"]).get(b"authorization", b"")
        is_let_in = self._expected is None or hmac.compare_digest(given, self._expected) or scope["path"] == "/health"
        refusal = RequestError("key: expected the server's, got another or none", None, 401, "invalid_api_key")
        try:
            await (self._app if is_let_in else _respond(refusal))(scope, receive, send_and_note)
        finally:
            if not self._quiet:
                _log(scope, status, time.perf_counter() - start)


def _log(scope: Any, status: int, seconds: float) -> None:
    answer, now = scope.get("answer"), time.strftime("%Y-%m-%d %H:%M:%S")
    counts = "" if answer is None else f", {answer.n_prompt} tokens in, {answer.n_drawn} out"
    path = quote(scope["path"])[:80]
    print(f"{now} {scope['method']} {path} {status}{counts}, {seconds:.3f} s", file=sys.stderr, flush=True)


async def _read_body(http: HTTPRequest) -> bytes:
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("body: expected JSON; send the header Content-Type: application/json")
    body = b""
    async for chunk in http.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise RequestError(f"body: expected at most {_MOST_BYTES} bytes, got more; shorten it", status=413)
    return body


async def _watch(http: HTTPRequest, job: Job) -> None:
    """Ends the work when the client has left; after its answer there is no work to end."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    job.end(RequestError("client: is gone", status=_LEFT))


async def _stream(answer: Answer, job: Job) -> AsyncIterator[str]:
    try:
        async for piece in job.read():
            yield answer.write_event(piece)
        yield answer.write_end()
    except RequestError as error:
        yield f"data: {_describe(error)}\n\ndata: [DONE]\n\n"


async def _explain(http: HTTPRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = f"{http.method} {http.url.path}: {error.detail}; docs/serving.md lists the paths"
        error = RequestError(message, status=error.status_code)
    elif isinstance(error, TimeoutError):
        message = f"body: expected within {_PATIENCE_S} s, and read by then, got no whole one; send it at once"
        error = RequestError(message, status=408)
    elif not isinstance(error, RequestError):
        status = _LEFT if isinstance(error, ClientDisconnect) else 500
        error = RequestError(f"server: {type(error).__name__}", status=status)
    return _respond(error)


def _respond(error: RequestError) -> Response:
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return Response(_describe(error), error.status, headers, media_type="application/json")


def _describe(error: RequestError) -> str:
    """Writes an error as OpenAI does; in ASCII, because it may quote what UTF-8 cannot encode."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return json.dumps({"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}})
