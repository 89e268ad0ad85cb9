"""serve: what OpenAI's client gets for a completion: texts, settings that count, and log-probabilities."""

import json

import pytest
import torch
from transformers import GenerationConfig

from hugging_nano_gpt import run_server

from ..helpers.serving import PROMPT, ask_app, chat, complete, connect, draw, find_port, serve_app
from ..helpers.tiny import make_tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

# Warnings of fastapi, uvicorn and their dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_completion_goes_on_past_block_size(client, demo):
    answer = complete(client, max_tokens=140, temperature=0)
    assert answer.choices[0].text == draw(demo, make_tokenizer(), PROMPT, max_new_tokens=140, do_sample=False)[0]
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 140)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 2}, {"temperature": 2.0}),  # an integer too
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
def test_settings_of_a_request_are_used(client, demo, settings, expected):
    settings = {"max_tokens": 40, **settings}
    texts = [complete(client, seed=seed, **settings).choices[0].text for seed in (5, 6, 5)]
    expected = {"max_new_tokens": 40, "do_sample": True, "top_k": 0, **expected}
    drawn = [draw(demo, make_tokenizer(), PROMPT, seed=seed, **expected)[0] for seed in (5, 6)]
    assert texts == [*drawn, drawn[0]]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("temperature", [1e-19, 1e-21, 1e-30, 1e-320])
def test_temperature_near_zero_is_greedy(client, temperature):
    greedy = complete(client, max_tokens=30).choices[0].text
    assert complete(client, max_tokens=30, temperature=temperature, seed=1).choices[0].text == greedy


def test_request_without_a_seed_does_not_depend_on_the_one_before(client):
    def ask():
        complete(client, max_tokens=1, seed=1)
        return complete(client, max_tokens=60, temperature=1).choices[0].text

    assert ask() != ask()


def test_prompts_of_each_kind_are_answered_as_alone(client, demo):
    tokenizer = make_tokenizer()
    texts = [PROMPT, "JULIET:"]
    ids = [tokenizer(text).input_ids for text in texts]
    expected = [draw(demo, tokenizer, text, max_new_tokens=20, do_sample=False)[0] for text in texts]
    for prompts, n_prompts in ((texts[0], 1), (texts[:1], 1), (texts, 2), (ids[0], 1), (ids[:1], 1), (ids, 2)):
        answer = complete(client, prompts, max_tokens=20)
        assert [choice.text for choice in answer.choices] == expected[:n_prompts]
        assert [choice.index for choice in answer.choices] == list(range(n_prompts))
        assert answer.usage.completion_tokens == 20 * n_prompts


@pytest.mark.parametrize("stream", [False, True])
def test_nth_answer_is_sampled_with_the_nth_seed(client, demo, stream):
    prompts, settings = [PROMPT, "JULIET:"], {"max_tokens": 15, "n": 3, "seed": 2**63 - 1, "stream": stream}
    answer = complete(client, prompts, **settings)
    choices = [choice for part in (answer if stream else [answer]) for choice in part.choices]
    texts = ["".join(each.text for each in choices if each.index == index) for index in range(6)]
    drawing = {"max_new_tokens": 15, "do_sample": True, "top_k": 0}
    seeds = range(2**63 - 1, 2**63 + 2)
    expected = [draw(demo, make_tokenizer(), p, seed=seed, **drawing)[0] for p in prompts for seed in seeds]
    assert texts == expected
    assert len(set(texts)) == 6


def test_end_of_text_ends_an_answer_and_is_not_part_of_it(demo):
    whole = draw(demo, make_tokenizer(), PROMPT, max_new_tokens=60, do_sample=False)[0]
    end = whole[30]
    demo.generation_config = GenerationConfig(eos_token_id=make_tokenizer()(end).input_ids)
    with serve_app(demo, make_tokenizer()) as address, connect(address) as client:
        answer = complete(client, max_tokens=60, logprobs=0)
    demo.generation_config = GenerationConfig()
    assert answer.choices[0].text == whole[: whole.index(end)]
    assert answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.tokens) == whole.index(end) == answer.usage.completion_tokens - 1


def test_suppressed_tokens_are_never_sampled(demo):
    first, (index,) = draw(demo, make_tokenizer(), PROMPT, max_new_tokens=1, do_sample=False)
    demo.generation_config = GenerationConfig(suppress_tokens=[index])
    expected = draw(demo, make_tokenizer(), PROMPT, max_new_tokens=20, do_sample=False)[0]
    with serve_app(demo, make_tokenizer()) as address, connect(address) as client:
        (choice,) = complete(client, max_tokens=20, logprobs=1).choices
    assert choice.text == expected
    assert first in choice.logprobs.top_logprobs[0]  # the log-probabilities are those of the model itself
    demo.generation_config = GenerationConfig()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_are_the_models_own(client, demo, stream, echo):
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
        rows = demo(whole).logits[0].log_softmax(-1)[:-1]
    expected = rows.gather(1, whole[0, 1:, None])[:, 0].tolist()
    if echo:
        assert (logprobs.pop(0), tops.pop(0)) == (None, None)
    n_last = len(logprobs)
    assert logprobs == pytest.approx(expected[-n_last:], abs=1e-4)
    best = rows.topk(2).values.tolist()[-n_last:]
    assert [sorted(top.values(), reverse=True)[:2] for top in tops] == [pytest.approx(each, abs=1e-4) for each in best]
    names = tokens[-n_last:]
    assert [top[name] for top, name in zip(tops, names, strict=True)] == logprobs


def test_logprobs_of_zero_are_those_of_the_token_only(client):
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


def test_values_that_change_nothing_are_accepted(client, chat_client):
    neutral = {"n": 1, "echo": False, "presence_penalty": 0, "best_of": 1, "user": "me", "suffix": None}
    assert complete(client, max_tokens=3, **neutral).choices[0].text
    of_chats = {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "response_format": {"type": "text"}}
    assert chat(chat_client, max_tokens=3, **of_chats, top_logprobs=None, store=False).choices[0].message.content


@pytest.mark.parametrize(
    "setting", [{"num_beams": 3}, {"do_sample": True, "temperature": 0.1}, {"guidance_scale": 2.0}, {"max_length": 7}]
)
def test_other_settings_of_a_folder_change_nothing(demo, tmp_path, monkeypatch, setting):
    demo.save_pretrained(tmp_path / "demo")
    make_tokenizer().save_pretrained(tmp_path / "demo")
    path = tmp_path / "demo" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    apps = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: apps.append(server.config.app))
    run_server(tmp_path / "demo", port=find_port(), quiet=True)
    answer = ask_app(apps[0], prompt=PROMPT, max_tokens=20)
    expected = draw(demo, make_tokenizer(), PROMPT, max_new_tokens=20, do_sample=False)[0]
    assert answer["choices"][0]["text"] == expected
