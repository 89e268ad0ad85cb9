"""Prompts as token ids, no longer than a limit: from texts, ids, and messages in the folder's chat template."""

import inspect
import re
from typing import Any

from jinja2 import Environment, meta
from transformers import PreTrainedTokenizerBase

from ..errors import TokenizerError, list_some
from ..tokenization.text import encode_text, find_unknown
from .request import ChatRequest, Message, Request, RequestError

_MOST_PROMPTS = 16  # of the greatest length, in one request


class Prompter:
    """Encodes the prompts of requests to a model of `n_rows` token rows, of `most_tokens` at most each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, n_rows: int, most_tokens: int):
        self._tokenizer, self._n_rows, self._most_tokens = tokenizer, n_rows, most_tokens
        self._most_characters = most_tokens * max(map(len, tokenizer.get_vocab()))
        self._variables = None if tokenizer.chat_template is None else _list_variables(tokenizer)

    def encode(self, request: Request) -> list[list[int]]:
        """Returns the token ids of each prompt.

        Raises:
            RequestError: If one is empty, too long, or has tokens that the model does not have.
        """
        if isinstance(request, ChatRequest):
            return [self._encode_chat(request)]
        given: Any = request.prompt
        prompts = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given
        ids = [self._encode(each) if isinstance(each, str) else self._check(each) for each in prompts]
        if sum(map(len, ids)) * request.n > _MOST_PROMPTS * self._most_tokens:
            raise self._refuse_length("more in all prompts, each n times", "prompt", _MOST_PROMPTS)
        return ids

    def _encode(self, text: str, param: str = "prompt") -> list[int]:
        if len(text) > self._most_characters:  # so it has too many tokens, and is not encoded
            raise self._refuse_length(f"{len(text)} characters", param)
        try:
            return self._check(encode_text(self._tokenizer, text, param), param)
        except TokenizerError as error:
            raise RequestError(str(error), param) from error

    def _check(self, ids: list[int], param: str = "prompt") -> list[int]:
        if len(ids) > self._most_tokens:
            raise self._refuse_length(str(len(ids)), param)
        wrong = [index for index in ids if not 0 <= index < self._n_rows]
        if wrong or not ids:
            got = list_some(wrong) or "none"
            raise RequestError(f"{param}: expected token ids of 0 to {self._n_rows - 1}, got {got}; change it", param)
        return ids

    def _refuse_length(self, got: str, param: str, times: int = 1) -> RequestError:
        most = times * self._most_tokens
        return RequestError(f"{param}: expected at most {most} tokens, got {got}; shorten it", param)

    def _encode_chat(self, request: ChatRequest) -> list[int]:
        text = self._render(messages := [*map(_simplify, request.messages)], request.chat_template_kwargs)
        try:
            return self._encode(text, "messages")
        except RequestError as error:
            given = [value for each in (*messages, request.chat_template_kwargs) for value in each.values()]
            own = find_unknown(self._tokenizer, text).difference(*map(str, given))
            if not own or not isinstance(error.__cause__, TokenizerError):
                raise
            raise RequestError(
                f"chat template: it writes characters itself that the model does not have, {list_some(sorted(own))}, "
                f"so no message can be answered; whoever serves the model has to give its tokenizer another template",
                "messages",
            ) from error

    def _render(self, messages: list[dict[str, Any]], extra: dict[str, Any]) -> str:
        if self._variables is None:
            raise RequestError(
                "messages: this is a base model: expected a tokenizer with a chat template, got none; send a prompt "
                "to /v1/completions, or give its tokenizer the template that it was trained to chat with",
                "messages",
            )
        if others := extra.keys() - self._variables:
            known, param = list_some(sorted(self._variables)) or "none", "chat_template_kwargs"
            got = list_some(sorted(others))
            raise RequestError(f"{param}: expected the template's own, {known}, got {got}; leave them out", param)
        render = self._tokenizer.apply_chat_template
        try:
            return render(messages, add_generation_prompt=True, tokenize=False, **extra)
        except Exception as error:  # a template may raise anything
            message = f"messages: the chat template refuses them: {error}; change them"
            raise RequestError(message, "messages") from error


def _simplify(message: Message) -> dict[str, Any]:
    """Returns a message for a template, with its content as one text."""
    content = message.content
    text = content if isinstance(content, str) else " ".join(part.text for part in content)
    return {**(message.model_extra or {}), "role": message.role, "content": text}


def _list_variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Lists the variables of a chat template that neither Transformers nor Jinja sets."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    # Transformers' own block around what assistants say, which Jinja does not know.
    template = re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", tokenizer.get_chat_template())
    names = meta.find_undeclared_variables(environment.parse(template))
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    others = {"messages", "raise_exception", "strftime_now", *tokenizer.special_tokens_map, *environment.globals}
    return names - arguments - others
