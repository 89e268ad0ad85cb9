"""serve: what a real client of OpenAI's gets, over HTTP: texts, streams, settings that count, errors that explain."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from hugging_nano_gpt import (
    MissingDependencyError,
    NanoGPTLMHeadModel,
    ServerError,
    build_tiktoken_tokenizer,
    run_server,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.serve import server as module

from ..helpers.programs import run_command
from ..helpers.serving import connect, draw, run_in_thread, serve_app
from ..helpers.tiny import make_model, make_tokenizer
from ..tokenization.test_bpe import make_encoding

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx2")  # openai is built on it

# What the packages that are underneath warn of is their own business.
pytestmark = pytest.mark.filterwarnings("ignore")

SERVING_MD = Path(__file__).parents[2] / "docs" / "serving.md"
PROMPT = "ROMEO:"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role }}: {% generation %}{{ message.content }}{% endgeneration %}{{ '\n' }}{% endfor %}"
    "{{ mood or '' }}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)


@pytest.fixture(scope="module")
def client(model):
    with serve_app(model, make_tokenizer()) as address, connect(address) as client:
        yield client


@pytest.fixture(scope="module")
def chat_client(model):
    with serve_app(model, make_tokenizer(chat_template=CHAT_TEMPLATE)) as address, connect(address) as client:
        yield client


@pytest.fixture(scope="module")
def byte_parts():
    """A random model of bytes; most of its answers end inside a character or contain halves of characters."""
    tokenizer = build_tiktoken_tokenizer(make_encoding())
    return make_model(vocab_size=len(tokenizer)), tokenizer


def complete(client, prompt=PROMPT, **settings):
    return client.completions.create(model="demo", prompt=prompt, **settings)


def chat(client, content="Speak", **settings):
    return client.chat.completions.create(model="demo", messages=[{"role": "user", "content": content}], **settings)


def post(client, path="completions", **body):
    """Sends what the client of OpenAI's would not send; returns the raw answer."""
    return httpx.post(f"{client.base_url}{path}", json={"prompt": PROMPT, **body}, timeout=60)


def test_completion_goes_on_past_block_size(client, model):
    answer = complete(client, max_tokens=140, temperature=0)
    assert answer.choices[0].text == draw(model, make_tokenizer(), PROMPT, max_new_tokens=140, do_sample=False)[0]
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 140)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 2}, {"temperature": 2.0}),  # a whole number too
        ({"temperature": 1.3, "top_p": 0.5}, {"temperature": 1.3, "top_p": 0.5}),
        ({"top_p": 1}, {}),
        ({"extra_body": {"top_k": 3}}, {"top_k": 3}),
        ({"extra_body": {"min_p": 0.2}}, {"min_p": 0.2}),
        ({"extra_body": {"repetition_penalty": 2}}, {"repetition_penalty": 2.0}),
        ({"extra_body": {"stride": 32}, "max_tokens": 150}, {"stride": 32, "max_new_tokens": 150}),
        ({}, {}),
    ],
    ids=str,
)
def test_settings_of_a_request_count(client, model, settings, expected):
    settings = {"max_tokens": 40, **settings}
    texts = [complete(client, seed=seed, **settings).choices[0].text for seed in (5, 6, 5)]
    expected = {"max_new_tokens": 40, "do_sample": True, "top_k": 0, **expected}
    drawn = [draw(model, make_tokenizer(), PROMPT, seed=seed, **expected)[0] for seed in (5, 6)]
    assert texts == [*drawn, drawn[0]]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("temperature", [1e-19, 1e-21, 1e-30, 1e-320])
def test_temperature_near_nothing_is_greedy(client, temperature):
    greedy = complete(client, max_tokens=30).choices[0].text
    assert complete(client, max_tokens=30, temperature=temperature, seed=1).choices[0].text == greedy


def test_request_without_a_seed_does_not_follow_from_the_one_before(client):
    def ask():
        complete(client, max_tokens=1, seed=1)
        return complete(client, max_tokens=60, temperature=1).choices[0].text

    assert ask() != ask()


def test_prompts_of_each_kind_are_answered_as_alone(client, model):
    tokenizer = make_tokenizer()
    texts = [PROMPT, "JULIET:"]
    ids = [tokenizer(text).input_ids for text in texts]
    expected = [draw(model, tokenizer, text, max_new_tokens=20, do_sample=False)[0] for text in texts]
    for prompts, n_prompts in ((texts[0], 1), (texts[:1], 1), (texts, 2), (ids[0], 1), (ids[:1], 1), (ids, 2)):
        answer = complete(client, prompts, max_tokens=20)
        assert [choice.text for choice in answer.choices] == expected[:n_prompts]
        assert [choice.index for choice in answer.choices] == list(range(n_prompts))
        assert answer.usage.completion_tokens == 20 * n_prompts


@pytest.mark.parametrize("stream", [False, True])
def test_nth_answer_is_drawn_from_the_nth_seed(client, model, stream):
    prompts, settings = [PROMPT, "JULIET:"], {"max_tokens": 15, "n": 3, "seed": 2**63 - 1, "stream": stream}
    answer = complete(client, prompts, **settings)
    choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
    texts = ["".join(each.text for each in choices if each.index == index) for index in range(6)]
    drawing = {"max_new_tokens": 15, "do_sample": True, "top_k": 0}
    seeds = range(2**63 - 1, 2**63 + 2)
    expected = [draw(model, make_tokenizer(), p, seed=seed, **drawing)[0] for p in prompts for seed in seeds]
    assert texts == expected
    assert len(set(texts)) == 6


def test_stream_brings_the_same_text_in_pieces(client):
    settings = {"max_tokens": 50, "temperature": 0.8, "seed": 3}
    *parts, last = complete(client, stream=True, stream_options={"include_usage": True}, **settings)
    pieces = [part.choices[0] for part in parts]
    whole = complete(client, **settings)
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    assert len(pieces) > 10
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert (last.choices, last.usage) == ([], whole.usage)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stops", ["\n", ["and ", "\n\n", "x"], "never, never", ["\xd6", "\U0001f600 "]])
def test_text_ends_before_its_stop(client, model, stream, stops):
    whole = draw(model, make_tokenizer(), PROMPT, max_new_tokens=120, do_sample=False)[0]
    found = [whole.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
    expected = whole[: min([place for place in found if place >= 0], default=None)]
    answer = complete(client, max_tokens=120, temperature=0, stop=stops, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == expected
    assert choices[-1].finish_reason == ("length" if expected == whole else "stop")


def test_answers_that_end_inside_a_character_are_whole(byte_parts):
    n_halves = 0
    with serve_app(*byte_parts) as address, connect(address) as client:
        for seed in range(20):
            settings = {"max_tokens": 11, "seed": seed}
            expected, _ = draw(*byte_parts, "a b", seed=seed, max_new_tokens=11, do_sample=True, top_k=0)
            pieces = [part.choices[0].text for part in complete(client, "a b", stream=True, **settings)]
            n_halves += expected.endswith("\ufffd")
            assert "".join(pieces) == complete(client, "a b", **settings).choices[0].text == expected
    assert n_halves > 3


def test_end_of_text_ends_an_answer_and_is_no_part_of_it(model):
    whole = draw(model, make_tokenizer(), PROMPT, max_new_tokens=60, do_sample=False)[0]
    end = whole[30]
    model.generation_config = GenerationConfig(eos_token_id=make_tokenizer()(end).input_ids)
    with serve_app(model, make_tokenizer()) as address, connect(address) as client:
        answer = complete(client, max_tokens=60, logprobs=0)
    model.generation_config = GenerationConfig()
    assert answer.choices[0].text == whole[: whole.index(end)]
    assert answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.tokens) == whole.index(end) == answer.usage.completion_tokens - 1


def test_rows_that_are_never_drawn_are_never_drawn(model):
    first, (index,) = draw(model, make_tokenizer(), PROMPT, max_new_tokens=1, do_sample=False)
    model.generation_config = GenerationConfig(suppress_tokens=[index])
    expected = draw(model, make_tokenizer(), PROMPT, max_new_tokens=20, do_sample=False)[0]
    with serve_app(model, make_tokenizer()) as address, connect(address) as client:
        (choice,) = complete(client, max_tokens=20, logprobs=1).choices
    assert choice.text == expected
    assert first in choice.logprobs.top_logprobs[0]  # the log-probabilities are those of the model itself
    model.generation_config = GenerationConfig()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_are_the_models_own(client, model, stream, echo):
    settings = {"max_tokens": 30, "temperature": 0.7, "seed": 1, "logprobs": 2, "echo": echo, "stream": stream}
    answer = complete(client, **settings, extra_body={"top_k": 5, "repetition_penalty": 1.5})
    choices = [part.choices[0] for part in answer] if stream else answer.choices
    text = "".join(choice.text for choice in choices)
    tokens, offsets, logprobs, tops = (
        [each for choice in choices for each in getattr(choice.logprobs, name)]
        for name in ("tokens", "text_offset", "token_logprobs", "top_logprobs")
    )
    assert ("".join(tokens), offsets) == (text, list(range(len(text))))
    whole = make_tokenizer()(text if echo else PROMPT + text, return_tensors="pt").input_ids
    with torch.no_grad():
        rows = model(whole).logits[0].log_softmax(-1)[:-1]
    expected = rows.gather(1, whole[0, 1:, None])[:, 0].tolist()
    if echo:
        assert (logprobs.pop(0), tops.pop(0)) == (None, None)
    n_last = len(logprobs)
    assert logprobs == pytest.approx(expected[-n_last:], abs=1e-4)
    best = rows.topk(2).values.tolist()[-n_last:]
    assert [sorted(top.values(), reverse=True)[:2] for top in tops] == [pytest.approx(each, abs=1e-4) for each in best]
    names = tokens[-n_last:]
    assert [top[name] for top, name in zip(tops, names, strict=True)] == logprobs


def test_logprobs_of_zero_tell_of_the_token_alone(client):
    found = complete(client, max_tokens=3, logprobs=0).choices[0].logprobs
    assert [list(top) for top in found.top_logprobs] == [[token] for token in found.tokens]


def test_echo_of_no_new_tokens_scores_the_prompt(client):
    answer = complete(client, max_tokens=0, echo=True, logprobs=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (PROMPT, "length")
    assert len(answer.choices[0].logprobs.token_logprobs) == len(PROMPT)
    assert answer.usage.completion_tokens == 0


def test_parts_of_characters_are_named_in_logprobs(byte_parts):
    with serve_app(*byte_parts) as address, connect(address) as client:
        (choice,) = complete(client, "a b", max_tokens=12, seed=1, logprobs=3).choices
    _, ids = draw(*byte_parts, "a b", seed=1, max_new_tokens=12, do_sample=True, top_k=0)
    texts = [byte_parts[1].decode([index]) for index in ids]
    named = [f"token_id:{index}" if "\ufffd" in text else text for index, text in zip(ids, texts, strict=True)]
    assert choice.logprobs.tokens == named
    assert any(name.startswith("token_id:") for name in named)
    assert all(len(top) >= 3 for top in choice.logprobs.top_logprobs)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "R\xd6MEO"}, "prompt", "prompt: expected characters of the model's 65, got '\xd6'; leave them"),
        ({"prompt": ""}, "prompt", "prompt: expected at least one token, got none"),
        ({"prompt": []}, "prompt", "prompt: expected token ids of 0 to 64, got none"),
        ({"prompt": [[]]}, "prompt", "prompt: expected token ids of 0 to 64, got none"),
        ({"prompt": [1, 65, -1]}, "prompt", "prompt: expected token ids of 0 to 64, got 65, -1"),
        ({"prompt": [True]}, "prompt", "prompt: expected a text, a list of texts, token ids, or a list of lists"),
        ({"prompt": ["a", 1]}, "prompt", "prompt: expected a text, a list of texts, token ids, or a list of lists"),
        ({"prompt": None}, "prompt", "prompt: expected a text, a list of texts"),
        ({"prompt": "a" * 5000}, "prompt", "prompt: expected at most 4096 tokens, got 5000 characters; shorten it"),
        ({"prompt": [1] * 5000}, "prompt", "prompt: expected at most 4096 tokens, got 5000; shorten it"),
        ({"prompt": ["a" * 4000] * 20}, "prompt", "prompt: expected at most 65536 tokens, got more in all prompts"),
        (
            {"prompt": [1] * 130, "echo": True, "logprobs": 0},
            "prompt",
            "at most block_size + 1 = 129 tokens with echo",
        ),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: expected greater than or equal to 0, got -1"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: expected a valid integer, got 1.5"),
        (
            {"max_tokens": 10_000_000},
            "max_tokens",
            "max_tokens: expected at most 4096 in all answers together, got 1 x",
        ),
        (
            {"max_tokens": 2000, "n": 3},
            "max_tokens",
            "max_tokens: expected at most 4096 in all answers together, got 3 x 2000",
        ),
        ({"n": 5000}, "max_tokens", "max_tokens: expected at most 4096 in all answers together, got 5000 x 0"),
        ({"temperature": -1}, "temperature", "temperature: expected greater than or equal to 0, got -1"),
        ({"temperature": "hot"}, "temperature", "temperature: expected a valid number, got 'hot'"),
        ({"top_p": 0}, "top_p", "top_p: expected greater than 0"),
        ({"top_p": 1.5}, "top_p", "top_p: expected less than or equal to 1, got 1.5"),
        ({"top_k": -1}, "top_k", "top_k: expected greater than or equal to 0, got -1"),
        ({"seed": True}, "seed", "seed: expected a valid integer, got True"),
        ({"seed": 2**63}, "seed", "seed: expected less than 9223372036854775808"),
        (
            {"stop": ["a", ""]},
            "stop",
            "stop: expected a text or up to 16 of them, of 1 to 256 characters each, got ''",
        ),
        ({"stride": 129}, "stride", "stride: expected 1 to block_size=128, got 129"),
        ({"logprobs": 6}, "logprobs", "logprobs: expected less than or equal to 5, got 6"),
        ({"best_of": 2}, "best_of", "best_of: is not supported: expected none, got 2"),
        ({"suffix": "end"}, "suffix", "suffix: is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty: is not supported"),
        ({"num_beams": 2}, "num_beams", "num_beams: is not known here; leave it out"),
        ({"padding": True}, "padding", "padding: is not known here"),
        ({"model": "gpt-4"}, "model", "model: expected 'demo', which is served here, got 'gpt-4'"),
        (
            {"stream_options": {"include_usage": 1}},
            "stream_options",
            "stream_options: expected a valid boolean, got 1",
        ),
        ({"model": 4}, "model", "model: expected a valid string, got 4"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_request_that_cannot_be_obeyed_is_refused(client, body, param, message):
    for stream in (False, True):
        answer = post(client, stream=stream, **body)
        error = answer.json()["error"]
        assert answer.status_code == (404 if body.get("model") == "gpt-4" else 400)
        assert message in error["message"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "R", "temperature": NaN}', "NaN is not a number in JSON"),
        (b'{"prompt": "R", "temperature": 1e999}', "temperature: expected a finite number, got inf"),
        (b'{"prompt": "R", "seed": ' + b"1" * 5000 + b"}", "body: expected JSON in UTF-8"),
        (b'{"prompt": "\xff"}', "body: expected JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        (b'["prompt"]', "body: expected an object in JSON, got ['prompt']"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "body: expected a flat object"),
        (b"", "body: expected JSON in UTF-8"),
    ],
    ids=["nan", "inf", "digits", "utf-8", "surrogate", "name", "list", "deep", "empty"],
)
def test_body_that_is_no_request_is_refused(client, body, message):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{client.base_url}completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_body_that_is_not_said_to_be_json_is_refused(client):
    """So that no page of the web can make a browser send it unasked."""
    answer = httpx.post(f"{client.base_url}completions", content=b'{"prompt": "R"}')
    assert (answer.status_code, "Content-Type: application/json" in answer.text) == (400, True)


def test_values_that_change_nothing_are_taken(client, chat_client):
    neutral = {"n": 1, "echo": False, "presence_penalty": 0, "best_of": 1, "user": "me", "suffix": None}
    assert complete(client, max_tokens=3, **neutral).choices[0].text
    of_chats = {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "response_format": {"type": "text"}}
    assert chat(chat_client, max_tokens=3, **of_chats, top_logprobs=None, store=False).choices[0].message.content


def test_model_and_paths_that_do_not_exist_are_not_found(client):
    with pytest.raises(openai.NotFoundError, match="model: expected 'demo', which is served here, got 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError, match="got 'gpt-4'") as caught:
        client.models.retrieve("gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings: Not Found"):
        client.embeddings.create(model="demo", input="x")
    assert httpx.get(f"{client.base_url}completions").status_code == 405
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_chat_with_a_base_model_says_what_it_needs(client):
    with pytest.raises(openai.BadRequestError, match=r"a base model: expected a tokenizer with a chat template"):
        chat(client)


@pytest.mark.parametrize("content", ["Speak", [{"type": "text", "text": "Speak"}]])
@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers_after_the_template(chat_client, model, content, stream):
    answer = chat(chat_client, content, max_completion_tokens=30, temperature=0, stream=stream)
    parts = [
        (chunk.choices[0].delta if stream else chunk.choices[0].message) for chunk in (answer if stream else [answer])
    ]
    prompt = "user: Speak\nassistant:"
    expected = draw(model, make_tokenizer(), prompt, max_new_tokens=30, do_sample=False)[0]
    assert "".join(part.content for part in parts) == expected
    assert [part.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)


def test_chat_has_logprobs_of_its_tokens(chat_client):
    (choice,) = chat(chat_client, max_tokens=10, logprobs=True, top_logprobs=20).choices
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    assert all(bytes(token.bytes).decode() == token.token for token in choice.logprobs.content)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in choice.logprobs.content)  # greedy
    assert {len(token.top_logprobs) for token in choice.logprobs.content} == {20}
    (bare,) = chat(chat_client, max_tokens=10, logprobs=True).choices
    assert [token.top_logprobs for token in bare.logprobs.content] == [[]] * 10
    assert chat(chat_client, max_tokens=10).choices[0].logprobs is None
    with pytest.raises(openai.BadRequestError, match="top_logprobs: expected logprobs=true with it"):
        chat(chat_client, top_logprobs=2)


def test_chat_takes_either_name_of_its_length(chat_client):
    for name in ("max_tokens", "max_completion_tokens"):
        assert chat(chat_client, **{name: 5}).usage.completion_tokens == 5
        with pytest.raises(openai.BadRequestError, match="expected greater than or equal to 1, got 0") as caught:
            chat(chat_client, **{name: 0})
        assert caught.value.param == name
    with pytest.raises(openai.BadRequestError, match="max_tokens: is not known here"):
        chat(chat_client, max_tokens=5, max_completion_tokens=6)


def test_chat_goes_on_to_block_size_unless_told(chat_client):
    assert chat(chat_client).usage.completion_tokens == 128


def test_chat_sets_the_templates_own_variables_and_no_others(chat_client, model):
    answer = chat(chat_client, max_tokens=9, extra_body={"chat_template_kwargs": {"mood": "Hark! "}})
    prompt = "user: Speak\nHark! assistant:"
    expected = draw(model, make_tokenizer(), prompt, max_new_tokens=9, do_sample=False)[0]
    assert answer.choices[0].message.content == expected
    names = (
        "chat_template",
        "padding",
        "return_tensors",
        "tokenize",
        "add_generation_prompt",
        "messages",
        "bos_token",
    )
    for name in (*names, "conversation", "range", "other"):
        with pytest.raises(openai.BadRequestError, match=rf"the template's own, 'mood', got '{name}'") as caught:
            chat(chat_client, extra_body={"chat_template_kwargs": {name: "{{ 1 / 0 }}"}})
        assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of objects with a role and a content of text"),
        ([{"role": "user"}], "expected a list of objects"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "expected a list"),
        ([{"role": "tool", "content": "x"}], "the chat template refuses them: no such role"),
        ([{"role": "user", "content": "\xd6"}], "messages: expected characters of the model's 65, got '\xd6'"),
        ([{"role": "user", "content": "x" * 9999}], "messages: expected at most 4096 tokens"),
    ],
    ids=["none", "no content", "image", "role", "character", "long"],
)
def test_chat_that_cannot_be_read_is_refused(chat_client, messages, message):
    with pytest.raises(openai.BadRequestError) as caught:
        chat_client.chat.completions.create(model="demo", messages=messages)
    assert message in caught.value.body["message"]


def test_chat_template_is_blamed_for_its_own_characters(model):
    template = "{% for message in messages %}<{{ message.content }}>\n{% endfor %}"
    with serve_app(model, make_tokenizer(chat_template=template)) as address, connect(address) as client:
        with pytest.raises(
            openai.BadRequestError, match=r"^Error code: 400.*chat template: it writes characters itse"
        ):
            chat(client, "Speak\n")
        with pytest.raises(openai.BadRequestError, match=r"does not have, '<', '>', so"):
            chat(client, "\xd6")
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<", ">"]})
    larger = make_model(vocab_size=len(tokenizer))
    with serve_app(larger, tokenizer) as address, connect(address) as client:
        with pytest.raises(openai.BadRequestError, match="of the model's 67, got '\xd6'; leave"):
            chat(client, "\xd6")
        assert chat(client, "Speak", max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize(
    "setting", [{"num_beams": 3}, {"do_sample": True, "temperature": 0.1}, {"guidance_scale": 2.0}, {"max_length": 7}]
)
def test_other_settings_of_a_folder_change_nothing(model, tmp_path, monkeypatch, setting):
    model.save_pretrained(tmp_path / "demo")
    make_tokenizer().save_pretrained(tmp_path / "demo")
    path = tmp_path / "demo" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    apps = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: apps.append(server.config.app))
    run_server(tmp_path / "demo", port=find_port(), quiet=True)
    answer = ask_app(apps[0], prompt=PROMPT, max_tokens=20)
    expected = draw(model, make_tokenizer(), PROMPT, max_new_tokens=20, do_sample=False)[0]
    assert answer["choices"][0]["text"] == expected


def ask_app(app, **body):
    """Asks an app without a server."""
    from starlette.testclient import TestClient

    return TestClient(app).post("/v1/completions", json=body).json()


def find_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_key_is_asked_for_everywhere_but_of_health(model):
    with serve_app(model, make_tokenizer(), api_key="s\xe9same") as address:
        for key in ("none", "s\xe9sam"):
            answer = httpx.post(
                f"{address}/v1/completions", json={}, headers={"Authorization": f"Bearer {key}".encode()}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        headers = {"Authorization": "Bearer s\xe9same".encode()}
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
    with serve_app(model, make_tokenizer(), api_key="sesame") as address:
        with connect(address, api_key="sesame") as client:
            assert complete(client, max_tokens=1).choices
        with connect(address) as client, pytest.raises(openai.AuthenticationError, match="key: expected the server's"):
            complete(client)


@pytest.mark.parametrize(("allowed", "expected"), [(None, None), ("http://page.test", "http://page.test")])
def test_pages_may_ask_only_where_they_are_let_in(model, allowed, expected):
    with serve_app(model, make_tokenizer(), allow_origin=allowed, api_key="sesame") as address:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        for origin, found in (("http://page.test", expected), ("http://other.test", None)):
            answer = httpx.options(f"{address}/v1/completions", headers={"Origin": origin, **asked})
            assert answer.headers.get("access-control-allow-origin") == found
            assert (answer.status_code == 200) == (found is not None)


def test_log_has_a_line_for_each_request(model, capfd):
    with serve_app(model, make_tokenizer(), quiet=False) as address, connect(address) as client:
        complete(client, max_tokens=5)
        list(complete(client, max_tokens=4, stream=True))
        httpx.get(f"{address}/a%0Ab\u20ac")
    lines = capfd.readouterr().err.splitlines()
    begin, end = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", r", \d+\.\d{3} s"
    assert re.fullmatch(f"{begin}POST /v1/completions 200, 6 tokens in, 5 out{end}", lines[0])
    assert re.fullmatch(f"{begin}POST /v1/completions 200, 6 tokens in, 4 out{end}", lines[1])
    assert re.fullmatch(f"{begin}GET /a%0Ab%E2%82%AC 404{end}", lines[2])
    assert len(lines) == 3


def test_quiet_server_logs_nothing(model, capfd):
    with serve_app(model, make_tokenizer()) as address, connect(address) as client:
        complete(client, max_tokens=5)
    assert capfd.readouterr().err == ""


def test_serving_md_python_runs_as_written(model, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", SERVING_MD.read_text(), flags=re.DOTALL)
    with serve_app(model, make_tokenizer(), "shakespeare") as address:
        exec(block.replace("http://127.0.0.1:8000", address), {})
    settings = {"max_new_tokens": 200, "do_sample": True, "temperature": 0.8, "top_k": 200}
    assert capsys.readouterr().out == draw(model, make_tokenizer(), PROMPT, seed=1337, **settings)[0]


def test_serving_md_has_at_most_600_words():
    assert len(SERVING_MD.read_text().split()) <= 600


def test_serving_md_names_every_field_of_a_request():
    from hugging_nano_gpt.serve import request

    text = SERVING_MD.read_text()
    names = {*request.CompletionRequest.model_fields, *request.ChatRequest.model_fields, *request._NEUTRAL}
    assert [name for name in sorted(names | {"max_completion_tokens"}) if f"`{name}`" not in text] == []


def test_nothing_of_transformers_own_server_is_imported():
    paths = Path(module.__file__).parents[1].rglob("*.py")
    assert [path.name for path in paths if "transformers.cli" in path.read_text()] == []


def test_run_server_refuses_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^127.0.0.1:{port}: cannot be listened on: "):
            run_server("missing.pt", port=port)


@pytest.fixture
def ipv6_port():
    """A free port of ::1."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            return listener.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")


def test_ipv6_address_is_checked_printed_as_a_url_and_listened_on(model, monkeypatch, tmp_path, capsys, ipv6_port):
    model.save_pretrained(tmp_path / "demo")
    make_tokenizer().save_pretrained(tmp_path / "demo")
    found = []

    def ask_and_end(server):
        with run_in_thread(server, run):
            url = re.search(r"http://[^;]+", capsys.readouterr().out)[0]
            found.append(httpx.get(f"{url}/models", timeout=60).json()["data"][0]["id"])

    run = uvicorn.Server.run
    monkeypatch.setattr(uvicorn.Server, "run", ask_and_end)
    run_server(tmp_path / "demo", host="::1", port=ipv6_port, quiet=True)
    assert found == ["demo"]
    with (
        socket.create_server(("::1", ipv6_port), family=socket.AF_INET6),
        pytest.raises(ServerError, match=rf"^\[::1\]:{ipv6_port}: cannot be listened on: "),
    ):
        run_server("missing.pt", host="::1", port=ipv6_port)


def test_run_server_refuses_an_empty_key():
    """An empty key is what "$KEY" gives if KEY is not set: everyone would be let in."""
    with pytest.raises(ServerError, match="--api-key: expected some text, got none"):
        run_server("missing.pt", api_key="")


@pytest.mark.parametrize(
    ("host", "key", "is_warned"), [("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "sesame", False)]
)
def test_command_loads_names_serves_and_warns(monkeypatch, tmp_path, host, key, is_warned):
    configs = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: configs.append(server.config))
    if key is not None:
        monkeypatch.setitem(os.environ, "HUGGING_NANO_GPT_API_KEY", key)
    folder = tmp_path / "out-demo"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(CKPT_PATH.read_bytes())
    port = find_port()
    done = run_command("serve", folder / "ckpt.pt", "--host", host, "--port", port, "--meta", META_PATH)
    assert (done.returncode, done.stdout) == (0, f"out-demo is served at http://{host}:{port}/v1; Ctrl-C ends it\n")
    (config,) = configs
    assert (config.app.title, config.host, config.port) == ("out-demo", host, port)
    assert done.stderr == (
        f"warning: everyone who reaches {host}:{port} can use it; --api-key asks for a key\n" * is_warned
    )
    answer = ask_app(config.app, prompt=PROMPT)
    assert ("error" in answer) == (key is not None)


def test_run_server_without_its_packages_names_them(monkeypatch):
    monkeypatch.setattr("hugging_nano_gpt.errors.find_spec", lambda package: None)
    with pytest.raises(MissingDependencyError, match=r"pip install fastapi uvicorn"):
        run_server(CKPT_PATH)
