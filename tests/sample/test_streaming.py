"""Streaming: the text of sample_text, token by token, and the probabilities that it is sampled from."""

import re

import pytest
import torch

from hugging_nano_gpt import TokenizerError, build_tiktoken_tokenizer
from hugging_nano_gpt.convert.source import load_source
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.sample import streaming as module
from hugging_nano_gpt.sample.sampling import Sampler, make_sampler
from hugging_nano_gpt.sample.streaming import Step, list_candidates, stream_steps

from ..helpers.encodings import make_encoding
from ..helpers.reference import ReferenceGPT
from ..helpers.samples import sample
from ..helpers.tiny import make_model

SETTINGS = {"max_new_tokens": 140, "temperature": 0.9, "top_k": 8, "seed": 5}
DONE_S = 30  # far more than a token takes, far less than the texts that are stopped


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["sample.py's", "others"])
def test_streamed_text_is_that_of_sample_text(sampler, settings):
    steps = list(stream_steps(sampler, "ROMEO:", **settings))
    expected = sample(CKPT_PATH, "ROMEO:", meta_path=META_PATH, **settings)
    assert len(steps) == settings.get("max_new_tokens", 500)
    assert sampler.tokenizer.decode(steps[-1].idx) == expected
    assert [len(step.idx) for step in steps] == list(range(7, 7 + len(steps)))  # past block_size, which is 128
    assert all(step.idx == steps[-1].idx[: len(step.idx)] for step in steps)
    *_, other = stream_steps(sampler, "ROMEO:", **{**settings, "seed": 6, "max_new_tokens": 40})
    assert other.idx != steps[39].idx


def test_streamed_text_of_bytes_is_that_of_sample_text(tmp_path):
    tokenizer = build_tiktoken_tokenizer(make_encoding())
    model = make_model(vocab_size=len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    *_, last = stream_steps(make_sampler(load_source(tmp_path)), "a b", max_new_tokens=60)
    assert tokenizer.decode(last.idx) == sample(tmp_path, "a b", max_new_tokens=60)


def compute_reference(reference, idx, temperature, top_k):
    """Computes the probabilities that nanoGPT samples from: the last block_size tokens, temperature, then top_k."""
    logits = reference(torch.tensor([idx[-128:]]))[0][0, -1] / temperature
    threshold = logits.topk(min(top_k, len(logits))).values[-1] if top_k else -torch.inf
    return logits.masked_fill(logits < threshold, -torch.inf).softmax(-1)


def test_probabilities_are_those_of_the_reference(sampler):
    reference = ReferenceGPT(block_size=128, vocab_size=65, n_layer=3, n_head=3, n_embd=96, dropout=0.0, bias=False)
    reference.load_state_dict(sampler.model.state_dict())
    reference.eval()
    steps = list(stream_steps(sampler, "ROMEO:", **SETTINGS))
    with torch.no_grad():
        for step in steps[::7] + steps[-1:]:
            expected = compute_reference(reference, step.idx[:-1], 0.9, 8)
            # the cache adds float32 numbers in another order
            torch.testing.assert_close(step.probabilities, expected, rtol=0, atol=1e-5)
            assert step.probabilities.count_nonzero() == 8
            assert step.probabilities.sum().item() == pytest.approx(1, abs=1e-6)
            assert step.probabilities[step.idx[-1]] > 0
        for temperature, top_k in ((0.8, 8), (0.9, 7)):  # the comparison can fail
            other = compute_reference(reference, steps[-1].idx[:-1], temperature, top_k)
            assert (other - steps[-1].probabilities).abs().max() > 1e-3


def test_one_likeliest_token_is_greedy(sampler):
    steps = list(stream_steps(sampler, "ROMEO:", max_new_tokens=140, top_k=1))
    greedy = sampler.model.generate(sampler.encode("ROMEO:"), max_new_tokens=140, do_sample=False)
    assert steps[-1].idx == greedy[0].tolist()
    assert {step.probabilities.max().item() for step in steps} == {1.0}


def test_closing_stops_the_model(sampler):
    steps = stream_steps(sampler, max_new_tokens=1_000_000)
    next(steps)
    assert not module._DRAWING.acquire(timeout=0.5)  # it continues on its own
    steps.close()
    assert module._DRAWING.acquire(timeout=DONE_S)
    module._DRAWING.release()


def test_texts_read_in_turns_are_those_read_alone(sampler):
    alone = [list(stream_steps(sampler, max_new_tokens=40, seed=seed))[-1].idx for seed in (1, 2)]
    streams = [stream_steps(sampler, max_new_tokens=40, seed=seed) for seed in (1, 2)]
    *_, last = zip(*streams, strict=True)
    assert [step.idx for step in last] == alone


def test_prompt_that_cannot_be_read_is_refused(sampler):
    with pytest.raises(TokenizerError, match=re.escape("of the model's 65, got '\xd6'; leave them out")):
        next(stream_steps(sampler, "R\xd6MEO"))


def test_error_of_the_model_is_raised_where_the_steps_are_read(sampler, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Sampler, "draw", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream_steps(sampler))
    monkeypatch.undo()
    assert len(list(stream_steps(sampler, max_new_tokens=3))) == 3


def make_step(sampler, probabilities, drawn):
    """Makes a step with given probabilities of some of the demo's characters."""
    everything = torch.zeros(65)
    for character, probability in probabilities.items():
        everything[sampler.encode(character)[0, 0]] = probability
    return Step(sampler.encode(drawn)[0].tolist(), everything)


def test_candidates_are_the_likeliest_and_the_one_sampled(sampler):
    step = make_step(sampler, {" ": 0.5, "\n": 0.25, "a": 0.15, "b": 0.1}, "b")
    found = [
        (each.token, round(each.probability, 6), each.is_drawn) for each in list_candidates(step, sampler.tokenizer)
    ]
    assert found == [("\u2423", 0.5, False), ("\\n", 0.25, False), ("a", 0.15, False), ("b", 0.1, True)]
    fewer = list_candidates(step, sampler.tokenizer, limit=2)
    assert [(each.token, each.is_drawn) for each in fewer] == [("\u2423", False), ("\\n", False), ("b", True)]


def test_candidate_that_is_not_a_text_on_its_own_is_shown_by_its_id():
    tokenizer = build_tiktoken_tokenizer(make_encoding())
    byte = tokenizer("\xd6").input_ids[0]  # the first of two
    rows = len(tokenizer) + 3
    probabilities = torch.zeros(rows)
    probabilities[[byte, rows - 1]] = torch.tensor([0.75, 0.25])
    found = list_candidates(Step([byte], probabilities), tokenizer)
    assert [each.token for each in found] == [f"#{byte}", f"#{rows - 1}"]
