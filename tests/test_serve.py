"""serve: what a real client of OpenAI's gets, over HTTP: texts, streams, settings that count, errors that explain."""

import contextlib
import re
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from hugging_nano_gpt import (
    MissingDependencyError,
    NanoGPTLMHeadModel,
    ServerError,
    build_character_tokenizer,
    read_meta,
    run_server,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.sample import serve

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

# What the packages that are underneath warn of is their own business.
pytestmark = pytest.mark.filterwarnings("ignore")

SERVING_MD = Path(__file__).parents[1] / "docs" / "serving.md"
PROMPT = "ROMEO:"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)


@contextlib.contextmanager
def serve_app(model, tokenizer, name="demo"):
    from hugging_nano_gpt.sample.server import build_app

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(model, tokenizer, name), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def make_client(address):
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(model):
    with serve_app(model, make_tokenizer()) as address, make_client(address) as client:
        yield client


@pytest.fixture(scope="module")
def chat_client(model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    with serve_app(model, tokenizer) as address, make_client(address) as client:
        yield client


def make_tokenizer():
    return build_character_tokenizer(read_meta(META_PATH), block_size=128)


def draw(model, prompt=PROMPT, seed=None, **settings):
    """Draws with generate alone."""
    tokenizer = make_tokenizer()
    idx = tokenizer(prompt, return_tensors="pt").input_ids
    if seed is not None:
        torch.manual_seed(seed)
    return tokenizer.decode(model.generate(idx, **settings)[0, idx.shape[1] :])


def complete(client, prompt=PROMPT, **settings):
    return client.completions.create(model="demo", prompt=prompt, **settings)


def test_completion_goes_on_past_block_size(client, model):
    answer = complete(client, max_tokens=140, temperature=0)
    assert answer.choices[0].text == draw(model, max_new_tokens=140, do_sample=False)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 140)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7, "top_k": 0}),
        ({"temperature": 1.3, "top_p": 0.5}, {"temperature": 1.3, "top_p": 0.5, "top_k": 0}),
        ({"extra_body": {"top_k": 3}}, {"top_k": 3}),
        ({}, {"top_k": 0}),
    ],
)
def test_settings_of_a_request_count(client, model, settings, expected):
    texts = [complete(client, max_tokens=40, seed=seed, **settings).choices[0].text for seed in (5, 6, 5)]
    drawn = [draw(model, seed=seed, max_new_tokens=40, do_sample=True, **expected) for seed in (5, 6)]
    assert texts == [*drawn, drawn[0]]
    assert drawn[0] != drawn[1]


def test_request_without_a_seed_does_not_follow_from_the_one_before(client):
    def ask():
        complete(client, max_tokens=1, seed=1)
        return complete(client, max_tokens=60, temperature=1).choices[0].text

    assert ask() != ask()


def test_stream_brings_the_same_text_in_pieces(client):
    settings = {"max_tokens": 50, "temperature": 0.8, "seed": 3}
    pieces = [chunk.choices[0] for chunk in complete(client, stream=True, **settings)]
    assert "".join(piece.text for piece in pieces) == complete(client, **settings).choices[0].text
    assert len(pieces) > 10
    assert pieces[-1].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stops", ["\n", ["and ", "\n\n", "x"], "never, never"])
def test_text_ends_before_its_stop(client, model, stream, stops):
    whole = draw(model, max_new_tokens=120, do_sample=False)
    found = [whole.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
    expected = whole[: min([place for place in found if place >= 0], default=None)]
    answer = complete(client, max_tokens=120, temperature=0, stop=stops, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == expected
    assert choices[-1].finish_reason == ("length" if expected == whole else "stop")


def test_answer_that_nobody_waits_for_makes_no_difference(client, model):
    for _, chunk in zip(range(2), complete(client, max_tokens=3000, stream=True), strict=False):
        assert chunk.choices
    answer = complete(client, max_tokens=30, temperature=0.9, seed=4)
    assert answer.choices[0].text == draw(model, seed=4, max_new_tokens=30, do_sample=True, temperature=0.9, top_k=0)


def test_settings_of_the_model_are_used_where_a_request_gives_none(model):
    settings, model.generation_config = model.generation_config, GenerationConfig(do_sample=True, top_k=1)
    try:
        with serve_app(model, make_tokenizer()) as address, make_client(address) as client:
            text = complete(client, max_tokens=20).choices[0].text
    finally:
        model.generation_config = settings
    assert text == draw(model, max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "R\xd6MEO"}, "prompt: expected characters of the model's 65, got '\xd6'; leave them out"),
        ({"prompt": ""}, "prompt: expected at least one token, got none"),
        ({"prompt": ["a", "b"]}, "prompt: expected one text, got list"),
        ({"max_tokens": 0}, "max_tokens: expected a whole number of 1 or more, got 0"),
        ({"max_tokens": 1.5}, "max_tokens: expected a whole number of 1 or more, got 1.5"),
        ({"temperature": -1}, "temperature: expected a number from 0 to 100, got -1"),
        ({"temperature": "hot"}, "temperature: expected a number from 0 to 100, got 'hot'"),
        ({"top_p": 0}, "top_p: expected more than 0"),
        ({"top_p": 1.5}, "top_p: expected a number from 0 to 1, got 1.5"),
        ({"extra_body": {"top_k": -1}}, "top_k: expected a whole number of 0 or more, got -1"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"stop": ["a", ""]}, "stop: expected a text or up to 4 of them, none empty"),
        ({"n": 2}, "n: is not supported: expected none, got 2"),
        ({"echo": True}, "echo: is not supported"),
        ({"logprobs": 3}, "logprobs: is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: is not supported"),
        ({"extra_body": {"min_p": 0.1}}, "min_p: is not known here"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_request_that_cannot_be_obeyed_is_refused(client, settings, message, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, stream=stream, **{"prompt": PROMPT, **settings})
    assert message in caught.value.body["message"]


def test_values_that_change_nothing_are_taken(client):
    neutral = {"n": 1, "echo": False, "presence_penalty": 0, "best_of": 1, "user": "me", "suffix": None}
    assert complete(client, max_tokens=3, **neutral).choices[0].text


def test_other_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="model: expected 'demo', which is served here, got 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert [model.id for model in client.models.list()] == ["demo"]


def test_chat_with_a_base_model_says_what_it_needs(client):
    with pytest.raises(openai.BadRequestError, match=r"a base model: expected a tokenizer with a chat template"):
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("content", ["Speak", [{"type": "text", "text": "Speak"}]])
@pytest.mark.parametrize("stream", [False, True])
def test_chat_answers_after_the_template(chat_client, model, content, stream):
    answer = chat_client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": content}],
        max_completion_tokens=30,
        temperature=0,
        stream=stream,
    )
    pieces = [chunk.choices[0].delta.content for chunk in answer] if stream else [answer.choices[0].message.content]
    expected = draw(model, "user: Speak\nassistant:", max_new_tokens=30, do_sample=False)
    assert "".join(piece or "" for piece in pieces) == expected


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of objects with a role and a content of text"),
        ([{"role": "user"}], "expected a list of objects"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "expected a list"),
        ([{"role": "tool", "content": "x"}], "the chat template takes none such: no such role"),
        ([{"role": "user", "content": "\xd6"}], "messages: expected characters of the model's 65, got '\xd6'"),
    ],
    ids=["none", "no content", "image", "role", "character"],
)
def test_chat_that_cannot_be_read_is_refused(chat_client, messages, message):
    with pytest.raises(openai.BadRequestError) as caught:
        chat_client.chat.completions.create(model="demo", messages=messages)
    assert message in caught.value.body["message"]


def test_serving_md_python_runs_as_written(model, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", SERVING_MD.read_text(), flags=re.DOTALL)
    with serve_app(model, make_tokenizer(), "shakespeare") as address:
        exec(block.replace("http://127.0.0.1:8000/v1", address), {})
    expected = draw(model, seed=1337, max_new_tokens=200, do_sample=True, temperature=0.8, top_k=200)
    assert capsys.readouterr().out == expected


def test_run_server_refuses_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ServerError, match=rf"^127.0.0.1:{port}: cannot be listened on: "):
            run_server("missing.pt", port=port)


def test_run_server_loads_names_and_serves(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: calls.append((app.title, settings)))
    folder = tmp_path / "out-demo"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes(CKPT_PATH.read_bytes())
    run_server(folder / "ckpt.pt", port=8123, meta_path=META_PATH)
    assert calls == [("out-demo", {"host": "127.0.0.1", "port": 8123, "log_level": "warning"})]
    assert capsys.readouterr().out == "out-demo is served at http://127.0.0.1:8123/v1; Ctrl-C ends it\n"


def test_run_server_without_its_packages_names_them(monkeypatch):
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'transformers\[serving\]'"):
        run_server(CKPT_PATH)
