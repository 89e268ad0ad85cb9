"""Our decoding loop returns what Transformers' loop returns, and waits for a GPU as rarely as possible."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, GenerationMixin, MaxTimeCriteria, StoppingCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from hugging_nano_gpt import build_character_tokenizer
from hugging_nano_gpt.model import generation_nano_gpt
from hugging_nano_gpt.model.inputs_nano_gpt import CACHE_NAME
from hugging_nano_gpt.tokenization.characters import CharacterTable

from ..helpers.tiny import make_batch, make_model, make_pair, pad_left

SETTINGS = [
    {},
    {"do_sample": True, "temperature": 0.9, "top_k": 12, "top_p": 0.9},
    {"do_sample": True, "num_return_sequences": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"output_attentions": True, "output_hidden_states": True},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"eos_token_id": [3, 7, 20, 41], "pad_token_id": 5, "do_sample": True, "top_k": 0},
    {"eos_token_id": 20, "min_new_tokens": 3, "do_sample": True, "top_k": 0},
    {"prefill_chunk_size": 3},
    {"guidance_scale": 1.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("is_padded", [True, False], ids=["padded", "plain"])
def test_loop_returns_what_transformers_loop_returns(settings, is_padded):
    model = make_model()
    model.set_attn_implementation("eager" if "output_attentions" in settings else "sdpa")
    ids, mask = pad_left((9, 5))
    inputs = {"input_ids": ids, "attention_mask": mask} if is_padded else {"input_ids": make_batch(2, 9)[0]}
    settings = {"do_sample": False, "max_new_tokens": 16, **settings}
    recording = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    outputs = []
    for generate in (type(model).generate, GenerationMixin.generate):
        torch.manual_seed(4)
        outputs.append(generate(model, **inputs, **settings, **recording))
        torch.manual_seed(4)
        assert torch.equal(generate(model, **inputs, **settings), outputs[-1].sequences)
    ours, theirs = outputs
    assert type(ours) is type(theirs) is GenerateDecoderOnlyOutput
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits", "attentions", "hidden_states"):
        assert (getattr(ours, name) is None) == (getattr(theirs, name) is None), name
        for found, expected in zip(flatten(getattr(ours, name)), flatten(getattr(theirs, name)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)  # the order of float32 sums
    caches = [getattr(output, CACHE_NAME) for output in outputs]
    assert (caches[0] is None) == (caches[1] is None)
    if caches[0] is not None:
        assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length())


def flatten(values):
    if values is None or isinstance(values, torch.Tensor):
        return [] if values is None else [values]
    return [each for value in values for each in flatten(value)]


@pytest.mark.parametrize(
    "settings", [{}, {"stride": 4}, {"use_cache": False}, {"return_dict_in_generate": True}], ids=str
)
def test_what_generate_returns_can_be_written_to_and_trained_on(settings):
    """The loop computes in torch's inference mode, whose tensors cannot be changed or trained on."""
    model = make_model()

    def ban(input_ids, scores):
        scores[:, 7] = -torch.inf
        input_ids[:, 0] = input_ids[:, 0].clone()
        return scores

    recording = {"output_logits": True, "output_scores": True}
    output = model.generate(make_batch(2, 8)[0], max_new_tokens=40, logits_processor=[ban], **recording, **settings)
    tokens = getattr(output, "sequences", output)
    assert not (tokens == 7)[:, 8:].any()
    tokens[:, 0] = 3
    model.train()(tokens[:, :32], labels=tokens[:, :32]).loss.backward()
    if settings.get("return_dict_in_generate"):
        layers = getattr(output, CACHE_NAME).layers
        kept = [*output.logits, *output.scores, *(each for layer in layers for each in (layer.keys, layer.values))]
        assert not any(each.is_inference() for each in kept)


def test_positions_of_the_caller_are_used():
    model = make_model()
    ids, _ = make_batch(1, 6)
    settings = {"position_ids": torch.arange(6)[None] + 9, "max_new_tokens": 8, "do_sample": False}
    expected = GenerationMixin.generate(model, ids, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert not torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_tokens_after_those_in_a_cache_are_enough():
    model, reference = make_pair()
    model.eval(), reference.eval()
    idx, _ = make_batch(2, 12)
    expected = reference.generate_greedily(idx, 20)
    settings = {"attention_mask": torch.ones(2, 12, dtype=torch.long), "do_sample": False}
    for n_new in (20, 22):
        cache = DynamicCache(config=model.config)
        model(idx[:, :8], cache=cache)
        if n_new == 20:
            tokens = model.generate(idx[:, 8:], max_new_tokens=20, past_key_values=cache, **settings)
            assert torch.equal(tokens, expected[:, 8:])
        else:
            with pytest.raises(ValueError, match=r"at most block_size=32 tokens .* known to a cache alone, got 34"):
                model.generate(idx[:, 8:], max_new_tokens=22, past_key_values=cache, **settings)
    cache = model(idx)[CACHE_NAME]
    with pytest.raises(ValueError, match="the cache contains 12 tokens: expected fewer than the text's 12"):
        model.generate(idx, max_new_tokens=5, past_key_values=cache, do_sample=False)


def test_a_criterion_of_the_caller_sees_every_token_and_ends_the_text():
    class Stop(StoppingCriteria):
        lengths: list[int] = []

        def __call__(self, input_ids, scores, **kwargs):
            self.lengths.append(input_ids.shape[1])
            return torch.full((len(input_ids),), input_ids.shape[1] >= 40)

    tokens = make_model().generate(make_batch(2, 30)[0], max_new_tokens=90, stopping_criteria=[Stop()])
    assert tokens.shape == (2, 40)
    assert Stop.lengths == list(range(31, 41))
    assert make_model().generate(tokens, max_new_tokens=9, stopping_criteria=[MaxTimeCriteria(0.0)]).shape == (2, 41)


@pytest.mark.parametrize("alphabet", ["0123456789 +=", "abcdefgh \n", "\n 12"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_stop_strings_of_any_alphabet(alphabet, num_beams):
    tokenizer = build_character_tokenizer(CharacterTable(tuple(alphabet)))
    model = make_model(vocab_size=len(alphabet))
    prompt = torch.tensor([[0, 1]])
    settings = {"max_new_tokens": 30, "do_sample": False, "num_beams": num_beams}
    whole = model.generate(prompt, **settings)[0].tolist()
    stop = tokenizer.decode(whole[9:11])
    found = model.generate(prompt, stop_strings=stop, tokenizer=tokenizer, **settings)[0].tolist()
    end = next(n for n in range(3, 40) if tokenizer.decode(whole[:n]).endswith(stop))
    if num_beams == 1:
        assert found == whole[:end]
    assert stop in tokenizer.decode(found)


class CountWaits(TorchDispatchMode):
    """Counts the operations that make the host wait for a GPU, because they read numbers of a tensor."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("settings", "n_prompt", "n_waits"),
    [
        ({}, 8, 0),
        ({"do_sample": True, "top_k": 10}, 8, 0),
        ({"is_padded": True}, 8, 0),
        ({"eos_token_id": 99}, 8, 1),
        ({"is_padded": True, "eos_token_id": 99, "do_sample": True}, 8, 1),
        ({}, 40, 0),
        ({"stride": 4}, 40, 0),
        ({"eos_token_id": 99}, 40, 1),
        ({"use_cache": False}, 8, 0),
    ],
)
def test_loop_reads_a_tensor_at_most_once_a_token(settings, n_prompt, n_waits):
    model = make_model()
    settings = {"do_sample": False, "pad_token_id": 98, **settings}
    ids, _ = make_batch(2, n_prompt)
    if settings.pop("is_padded", False):
        ids, mask = pad_left((n_prompt, n_prompt - 3))
        settings["attention_mask"] = mask
    counts = []
    for n_new in (5, 13):
        with CountWaits() as waits:
            model.generate(ids, max_new_tokens=n_new, **settings)
        counts.append(waits.count)
    assert counts[1] - counts[0] == 8 * n_waits


def test_nothing_private_of_transformers_is_overridden_for_generation():
    own = {name for name in vars(generation_nano_gpt.NanoGPTGenerationMixin) if not name.startswith("__")}
    overridden = {name for name in own if hasattr(GenerationMixin, name)}
    assert overridden == {"generate", "generate_batch", "init_continuous_batching"}
