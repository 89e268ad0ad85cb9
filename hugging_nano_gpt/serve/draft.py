"""An answer while it is generated: whole characters up to the first stop text, with log-probabilities."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

_PART = "\ufffd"  # how a tokenizer decodes a part of a character
_LEAST = -9999.0  # what OpenAI writes for minus infinity, which JSON does not have


@dataclass(frozen=True)
class Token:
    """A token of an answer, the number of characters before it, and the model's log-probabilities of it and others.

    The first token of a prompt has none. A token without text, or that is a part of a character, is token_id:N.
    """

    text: str
    offset: int
    logprob: float | None
    top: dict[str, float]


@dataclass(frozen=True)
class Piece:
    """A part of an answer: its next characters, the tokens that begin in it, and how many were generated for it."""

    index: int
    is_first: bool
    text: str
    tokens: list[Token]
    n_drawn: int
    finish_reason: str | None  # only in the last piece


class Draft:
    """The answer of an index, which ends before a text of `stops` or a token of `ends`.

    Unless n_top is None, it has log-probabilities, also those of the n_top likeliest tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, index: int, *, stops: list[str], ends: list[int], n_top: int | None
    ):
        self._tokenizer, self._index, self._stops, self._ends, self._n_top = tokenizer, index, stops, ends, n_top
        self._text, self._tokens = "", list[Token]()
        self._n_drawn = self._n_sent = self._begin = 0  # no stop begins before _begin
        # The last ids, how many of them are in the text already, and their text.
        self._window, self._n_known, self._known = list[int](), 0, ""
        self._is_first, self.finish_reason = True, "length"

    def add_prompt(self, ids: list[int], logprobs: torch.Tensor | None) -> None:
        """Begins with a prompt of T ids; logprobs are (T - 1, V), of the token after each of them but the last."""
        for place, token in enumerate([] if self._n_top is None else ids):
            self._read(token, None if logprobs is None or place == 0 else logprobs[place - 1])
        self._window = ids if self._n_top is None else self._window  # without logprobs, all at once
        self._flush()
        self._begin = len(self._text)

    def add(self, token: int, logprobs: torch.Tensor | None) -> bool:
        """Adds a token that was sampled with (V,) logprobs; returns whether the answer ends there."""
        self._n_drawn += 1
        if token in self._ends:
            self.finish_reason = "stop"
        else:
            self._read(token, logprobs)
            self._cut()
        return self.finish_reason == "stop"

    def take(self, is_last: bool) -> Piece:
        """Returns what is new since the last call, except what may still become a stop unless this is the last."""
        if is_last:
            self._flush()
            self._cut()
        end = len(self._text) - (0 if is_last else self._count_held())
        n_tokens = len(self._tokens) if is_last else sum(token.offset < end for token in self._tokens)
        text, tokens = self._text[self._n_sent : end], self._tokens[:n_tokens]
        finish_reason = self.finish_reason if is_last else None
        piece = Piece(self._index, self._is_first, text, tokens, self._n_drawn, finish_reason)
        self._is_first, self._n_sent, self._n_drawn, self._tokens = False, end, 0, self._tokens[n_tokens:]
        return piece

    def _read(self, token: int, logprobs: torch.Tensor | None) -> None:
        begin = len(self._text)
        self._window.append(token)
        text = self._decode(self._window)
        if not text.endswith(_PART):  # a decoder may look at the token before, which the window keeps
            self._text += text[len(self._known) :]
            self._window = self._window[self._n_known :]
            self._n_known, self._known = len(self._window), self._decode(self._window)
        if self._n_top is not None:  # parts of characters before it may have become text only now
            begin = max(begin, len(self._text) - len(self._decode([token])))
            self._tokens.append(self._describe(token, begin, logprobs))

    def _flush(self) -> None:
        """Adds parts of characters to the text, because nothing follows."""
        self._text += self._decode(self._window)[len(self._known) :]
        self._window, self._n_known, self._known = [], 0, ""

    def _cut(self) -> None:
        """Cuts the text before the stop that is complete first."""
        places = [(self._text.find(stop, self._begin), len(stop)) for stop in self._stops]
        if found := [(place + length, place) for place, length in places if place >= 0]:
            self._text, self.finish_reason = self._text[: min(found)[1]], "stop"
            self._tokens = [token for token in self._tokens if token.offset < len(self._text)]
            self._window, self._n_known, self._known = [], 0, ""
        self._begin = max(self._begin, len(self._text) + 1 - max(map(len, self._stops), default=1))

    def _count_held(self) -> int:
        """Counts the characters at the end that may be the beginning of a stop."""
        end = self._text[self._begin :]
        return max((n for stop in self._stops for n in range(1, len(stop)) if end.endswith(stop[:n])), default=0)

    def _describe(self, token: int, offset: int, logprobs: torch.Tensor | None) -> Token:
        if logprobs is None:
            return Token(self._spell(token), offset, None, {})
        values, ids = logprobs.topk(min(self._n_top or 0, len(logprobs)))
        top = {
            self._spell(index): max(_LEAST, value) for index, value in zip(ids.tolist(), values.tolist(), strict=True)
        }
        return Token(self._spell(token), offset, max(_LEAST, logprobs[token].item()), top)

    def _spell(self, token: int) -> str:
        text = self._decode([token])
        return text if text and _PART not in text else f"token_id:{token}"

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
