"""generate(): greedy tokens equal the reference's, in every way of decoding that stays within block_size."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.modeling_nano_gpt import NanoGPTLMHeadModel

from .test_modeling import pad_left
from .tiny import make_batch, make_model, make_pair


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["dynamic cache", "no cache", "static cache"],
)
def test_greedy_tokens_equal_reference(settings):
    model, reference = make_pair()
    idx, _ = make_batch(2, 8)
    tokens = model.eval().generate(idx, max_new_tokens=24, do_sample=False, **settings)
    assert torch.equal(tokens, reference.eval().generate_greedily(idx, 24))


def test_prompt_lookup_tokens_equal_greedy():
    model = make_model()
    idx, _ = make_batch(1, 8)
    greedy = model.generate(idx, max_new_tokens=16, do_sample=False)
    assert torch.equal(model.generate(idx, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=2), greedy)


def test_left_padded_batch_equals_single_rows():
    model, reference = make_pair()
    lengths = (3, 12, 7)
    ids, mask = pad_left(lengths)
    tokens = model.eval().generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    for row, length in enumerate(lengths):
        alone = reference.eval().generate_greedily(ids[row : row + 1, -length:], 16)
        assert torch.equal(tokens[row, -16:], alone[0, -16:])


def score_sequence(reference, tokens, prompt_length):
    logprobs = reference(tokens)[0].log_softmax(-1)
    return logprobs[0, prompt_length - 1 : -1].gather(-1, tokens[0, prompt_length:, None]).sum().item()


def test_beams_find_a_sequence_at_least_as_likely_as_greedy():
    model, reference = make_pair()
    idx, _ = make_batch(1, 8)
    reference.eval()
    beams = model.eval().generate(idx, max_new_tokens=12, num_beams=4, do_sample=False)
    greedy = reference.generate_greedily(idx, 12)
    assert beams.shape == greedy.shape
    assert score_sequence(reference, beams, 8) >= score_sequence(reference, greedy, 8)


def test_sampling_with_a_seed_repeats_and_without_it_varies():
    model = make_model()
    idx, _ = make_batch(1, 4)

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(idx, max_new_tokens=20, do_sample=True, num_return_sequences=3)

    assert sample(1).shape == (3, 24)
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


class RecordingStreamer(BaseStreamer):
    def __init__(self):
        self.pieces, self.is_ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten())

    def end(self):
        self.is_ended = True


def test_streamer_receives_every_token_as_it_comes():
    model = make_model()
    idx, _ = make_batch(1, 4)
    streamer = RecordingStreamer()
    tokens = model.generate(idx, max_new_tokens=10, do_sample=False, streamer=streamer)
    assert len(streamer.pieces) == 11
    assert torch.equal(torch.cat(streamer.pieces), tokens[0])
    assert streamer.is_ended


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_generation_past_block_size_is_refused_before_it_starts(settings):
    model = make_model()
    with pytest.raises(
        ValueError, match=r"at most block_size=32 tokens, got 33 \(8 of the prompt and 25 new\); shorten"
    ):
        model.generate(make_batch(2, 8)[0], max_new_tokens=25, **settings)


def test_generation_without_a_prompt_starts_at_the_newline():
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    tokens = model.generate(max_new_tokens=20, do_sample=True)
    assert tokens.shape == (1, 21)
    assert tokens[0, 0] == 0


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # of the experimental batcher, about itself
def test_continuous_batching_equals_single_rows():
    model, reference = make_pair()
    prompts = [make_batch(1, length, seed=length)[0] for length in (3, 9, 5)]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # by default it fills the machine's memory
    outputs = model.eval().generate_batch(
        [prompt[0].tolist() for prompt in prompts], generation_config=settings, continuous_batching_config=small
    )
    found = [output.generated_tokens for output in outputs.values()]
    expected = [reference.eval().generate_greedily(prompt, 12)[0, -12:].tolist() for prompt in prompts]
    assert found == expected
