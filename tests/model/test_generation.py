"""generate(): the tokens equal the reference's for every decoding strategy; past block_size, see test_window.py."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation import CompileConfig
from transformers.generation.streamers import BaseStreamer

from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.model import fast_nano_gpt
from hugging_nano_gpt.model.modeling_nano_gpt import NanoGPTLMHeadModel

from ..helpers.tiny import TORCH_VERSION, make_batch, make_model, make_pair, pad_left

N_TOKENS = 50257  # of GPT-2's vocabulary, which nanoGPT pads to 50304 rows


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


@pytest.mark.parametrize("num_beams", [1, 2])
def test_cache_given_with_use_cache_false_is_refused(num_beams):
    """Beam search would read the text into the growing cache repeatedly, and return other tokens without a warning."""
    idx, _ = make_batch(1, 8)
    with pytest.raises(ValueError, match=r"use_cache=False with a cache: .*got a DynamicCache too; leave one"):
        make_model().generate(
            idx, max_new_tokens=4, num_beams=num_beams, use_cache=False, past_key_values=DynamicCache()
        )


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


def test_generation_without_a_prompt_starts_at_the_newline():
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    tokens = model.generate(max_new_tokens=20, do_sample=True)
    assert tokens.shape == (1, 21)
    assert tokens[0, 0] == 0


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model of GPT-2's padded vocabulary whose logits favour the spare rows."""
    model = make_model(vocab_size=50304, n_layer=1)
    path = tmp_path_factory.mktemp("padded") / "ckpt.pt"
    model.to_nanogpt_ckpt(path)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(path)
    with torch.no_grad():  # the last LayerNorm returns its bias, which points in the direction of the spare rows
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[N_TOKENS:] = 5.0
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 5.0, "top_k": 0},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": True, "num_beams": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
        {"do_sample": True, "use_cache": False, "generation_config": GenerationConfig(top_k=0)},
    ],
    ids=["greedy", "sampling", "beams", "sampled beams", "drafts", "settings of the caller"],
)
def test_spare_rows_of_a_padded_vocabulary_are_never_generated(padded, settings):
    idx, _ = make_batch(1, 6)
    logits = padded(idx).logits[0, -1]
    assert logits.argmax() >= N_TOKENS  # the logits themselves do not change
    assert logits[N_TOKENS:].min() > logits[:N_TOKENS].max()
    torch.manual_seed(0)
    tokens = padded.generate(idx, max_new_tokens=26, min_new_tokens=26, **settings)
    assert tokens.shape == (1, 32)
    assert tokens.max() < N_TOKENS


def test_spare_rows_stay_out_of_a_saved_model_and_of_a_served_batch(padded, tmp_path):
    padded.save_pretrained(tmp_path)
    model = NanoGPTLMHeadModel.from_pretrained(tmp_path)
    assert model.generate(make_batch(1, 6)[0], max_new_tokens=10, do_sample=False).max() < N_TOKENS


@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="torch.compile does not work with torch 2.6 and Transformers 5")
def test_compiled_static_cache_decodes_without_recompiling(monkeypatch):
    monkeypatch.setattr(fast_nano_gpt, "_LARGE_MODEL", 0)  # the compiler does not see the kernels of large models
    model = make_model()
    idx, _ = make_batch(2, 8)
    ids, mask = pad_left((3, 8))
    settings = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    settings._compile_all_devices = True  # Transformers compiles only on accelerators by default
    for inputs in ({"inputs": idx}, {"inputs": ids, "attention_mask": mask}):
        torch._dynamo.reset()
        counters.clear()
        streamer = CountingStreamer()
        eager = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        tokens = model.generate(
            **inputs, max_new_tokens=20, do_sample=False, cache_implementation="static", compile_config=settings
        )
        assert torch.equal(tokens, eager)
        first_run = counters["stats"]["unique_graphs"]
        assert first_run > 0
        row = {name: value[:1] for name, value in inputs.items()}
        model.generate(
            **row,
            max_new_tokens=20,
            do_sample=False,
            cache_implementation="static",
            compile_config=settings,
            streamer=streamer,
        )
        # The prompt, the token it gives, the first decoded token, which may compile for the new batch size; the rest.
        assert set(streamer.graphs[2:]) == {streamer.graphs[2]}
        assert first_run <= streamer.graphs[2] <= first_run + 1


class CountingStreamer(BaseStreamer):
    """Counts the graphs compiled so far at each token."""

    def __init__(self):
        self.graphs = []

    def put(self, value):
        self.graphs.append(counters["stats"]["unique_graphs"])

    def end(self):
        assert len(self.graphs) == 21


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning"
)  # the experimental batcher warns about itself
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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_continuous_batching_refuses_requests_longer_than_block_size():
    model = make_model()
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = r"at most block_size=32 tokens, got 21 of the prompt and 12 new; shorten"
    with pytest.raises(ValueError, match=expected):
        model.generate_batch([[1, 2], [3] * 21], generation_config=settings)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    manager = model.init_continuous_batching(generation_config=settings, continuous_batching_config=small)
    with pytest.raises(ValueError, match=expected):
        manager.add_request([3] * 21)
    with pytest.raises(ValueError, match="got 32 of the prompt"):
        manager.add_request([3] * 32, max_new_tokens=1)
