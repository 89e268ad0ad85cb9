"""Answers as OpenAI's JSON objects, whole or as the events of a stream."""

import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from .draft import Piece, Token
from .request import ChatRequest, Request


class Answer:
    """Writes the answer of a model to a request whose prompts have n_prompt tokens together, and counts its tokens."""

    def __init__(self, request: Request, name: str, n_prompt: int):
        self._is_chat, self._has_logprobs = isinstance(request, ChatRequest), request.n_top is not None
        self._has_usage = request.stream and request.stream_options.include_usage
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"chat.completion{'.chunk' if request.stream else ''}" if self._is_chat else "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        self.n_prompt, self.n_drawn = n_prompt, 0

    def write(self, pieces: Iterable[Piece]) -> str:
        """Writes an answer that is not streamed; each choice is one piece."""
        choices = [self._describe(piece, "message") for piece in pieces]
        return json.dumps({**self._head, "choices": choices, "usage": self._count()})

    def write_event(self, piece: Piece) -> str:
        """Writes an event of a stream."""
        return self._write_event([self._describe(piece, "delta")], None)

    def write_end(self) -> str:
        """Writes the events that end a stream."""
        return (self._write_event([], self._count()) if self._has_usage else "") + "data: [DONE]\n\n"

    def _write_event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> str:
        chunk = {**self._head, "choices": choices, **({"usage": usage} if self._has_usage else {})}
        return f"data: {json.dumps(chunk)}\n\n"

    def _count(self) -> dict[str, int]:
        total = self.n_prompt + self.n_drawn
        return {"prompt_tokens": self.n_prompt, "completion_tokens": self.n_drawn, "total_tokens": total}

    def _describe(self, piece: Piece, place: str) -> dict[str, Any]:
        self.n_drawn += piece.n_drawn
        role = {"role": "assistant"} if piece.is_first else {}
        content: Any = {place: {**role, "content": piece.text}} if self._is_chat else {"text": piece.text}
        list_tokens = _list_of_chat if self._is_chat else _list
        logprobs = list_tokens(piece.tokens) if self._has_logprobs else None
        return {"index": piece.index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _list(tokens: list[Token]) -> dict[str, Any]:
    """Lists tokens as completions do: top_logprobs always has the token itself."""
    return {
        "tokens": [token.text for token in tokens],
        "text_offset": [token.offset for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [None if t.logprob is None else {t.text: t.logprob, **t.top} for t in tokens],
    }


def _list_of_chat(tokens: list[Token]) -> dict[str, Any]:
    def describe(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    tops = ([describe(*each) for each in token.top.items()] for token in tokens)
    return {"content": [{**describe(t.text, t.logprob), "top_logprobs": next(tops)} for t in tokens]}
