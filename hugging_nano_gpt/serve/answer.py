"""Pieces of answers as OpenAI's objects, whole or in the chunks of a stream."""

import time
import uuid
from collections.abc import Iterable
from typing import Any

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from .draft import Piece, Token
from .request import ChatRequest, Request


class Answer:
    """Writes the answer to a request whose prompts have n_prompt tokens, of the model of a name; counts its tokens."""

    def __init__(self, request: Request, name: str, n_prompt: int):
        self._is_chat, self._has_logprobs = isinstance(request, ChatRequest), request.n_top is not None
        self._has_usage = request.stream and request.stream_options.include_usage
        identity = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": identity, "created": int(time.time()), "model": name}
        self.n_prompt, self.n_drawn = n_prompt, 0

    def write(self, pieces: Iterable[Piece]) -> str:
        """Writes an answer that is not streamed; each choice is one piece."""
        kind = (ChatCompletion, "chat.completion") if self._is_chat else (Completion, "text_completion")
        return self._write(*kind, [self._describe(piece, "message") for piece in pieces], usage=self._count())

    def write_chunk(self, piece: Piece) -> str:
        """Writes an event of a stream."""
        choices = [self._describe(piece, "delta")]
        return self._write_chunk(choices, usage=None) if self._has_usage else self._write_chunk(choices)

    def write_end(self) -> str:
        """Writes the events that end a stream."""
        return (self._write_chunk([], usage=self._count()) if self._has_usage else "") + "data: [DONE]\n\n"

    def _write_chunk(self, choices: list[dict[str, Any]], **usage: Any) -> str:
        kind = (ChatCompletionChunk, "chat.completion.chunk") if self._is_chat else (Completion, "text_completion")
        return f"data: {self._write(*kind, choices, **usage)}\n\n"

    def _write(self, kind: Any, word: str, choices: list[dict[str, Any]], **usage: Any) -> str:
        answer = kind.construct(**self._head, object=word, choices=choices, **usage)
        return answer.model_dump_json(exclude_unset=True, warnings=False)

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
    """Lists tokens as completions have them: each is among its likeliest in any case."""
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
