"""serve: streams and chats: the pieces are the whole text, stops cut it, and the chat template is used."""

import pytest

from ..helpers.serving import PROMPT, chat, complete, connect, draw, serve_app
from ..helpers.tiny import make_model, make_tokenizer

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

# Warnings of fastapi, uvicorn and their dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_stream_has_the_same_text_in_pieces(client):
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
def test_text_ends_before_its_stop(client, demo, stream, stops):
    whole = draw(demo, make_tokenizer(), PROMPT, max_new_tokens=120, do_sample=False)[0]
    found = [whole.find(stop) for stop in ([stops] if isinstance(stops, str) else stops)]
    expected = whole[: min([place for place in found if place >= 0], default=None)]
    answer = complete(client, max_tokens=120, temperature=0, stop=stops, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == expected
    assert choices[-1].finish_reason == ("length" if expected == whole else "stop")


def test_answers_that_end_inside_a_character_are_complete(byte_parts):
    n_halves = 0
    with serve_app(*byte_parts) as address, connect(address) as client:
        for seed in range(20):
            settings = {"max_tokens": 11, "seed": seed}
            expected, _ = draw(*byte_parts, "a b", seed=seed, max_new_tokens=11, do_sample=True, top_k=0)
            pieces = [part.choices[0].text for part in complete(client, "a b", stream=True, **settings)]
            n_halves += expected.endswith("\ufffd")
            assert "".join(pieces) == complete(client, "a b", **settings).choices[0].text == expected
    assert n_halves > 3


def test_chat_with_a_base_model_says_what_it_needs(client):
    with pytest.raises(openai.BadRequestError, match=r"a base model: expected a tokenizer with a chat template"):
        chat(client)


@pytest.mark.parametrize("content", ["Speak", [{"type": "text", "text": "Speak"}]])
@pytest.mark.parametrize("stream", [False, True])
def test_chat_continues_the_text_of_the_template(chat_client, demo, content, stream):
    answer = chat(chat_client, content, max_completion_tokens=30, temperature=0, stream=stream)
    parts = [
        (chunk.choices[0].delta if stream else chunk.choices[0].message) for chunk in (answer if stream else [answer])
    ]
    prompt = "user: Speak\nassistant:"
    expected = draw(demo, make_tokenizer(), prompt, max_new_tokens=30, do_sample=False)[0]
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


def test_chat_accepts_either_name_of_its_length(chat_client):
    for name in ("max_tokens", "max_completion_tokens"):
        assert chat(chat_client, **{name: 5}).usage.completion_tokens == 5
        with pytest.raises(openai.BadRequestError, match="expected greater than or equal to 1, got 0") as caught:
            chat(chat_client, **{name: 0})
        assert caught.value.param == name
    with pytest.raises(openai.BadRequestError, match="max_tokens: is not known here"):
        chat(chat_client, max_tokens=5, max_completion_tokens=6)


def test_chat_continues_to_block_size_by_default(chat_client):
    assert chat(chat_client).usage.completion_tokens == 128


def test_chat_sets_the_templates_own_variables_and_no_others(chat_client, demo):
    answer = chat(chat_client, max_tokens=9, extra_body={"chat_template_kwargs": {"mood": "Hark! "}})
    prompt = "user: Speak\nHark! assistant:"
    expected = draw(demo, make_tokenizer(), prompt, max_new_tokens=9, do_sample=False)[0]
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


def test_chat_template_is_blamed_for_its_own_characters(demo):
    template = "{% for message in messages %}<{{ message.content }}>\n{% endfor %}"
    with serve_app(demo, make_tokenizer(chat_template=template)) as address, connect(address) as client:
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
