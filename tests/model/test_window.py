"""generate() past block_size: nanoGPT's samples token for token, padded rows, beam search, drafts, and stride."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from hugging_nano_gpt.demo import SAMPLES_PATH
from hugging_nano_gpt.model import decoding_nano_gpt

from ..helpers.tiny import TORCH_VERSION, make_batch, make_model, make_pair, pad_left

BLOCK_SIZE = 32  # of the toy models
CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}


@pytest.fixture(params=CACHES)
def cache(request):
    return CACHES[request.param]


@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="torch 2.6 has other random numbers for the same seed")
def test_samples_of_nanogpts_sample_py_are_reproduced(demo, cache):
    recorded = load_file(SAMPLES_PATH)  # seed 1337; block_size is 128
    prompt = torch.zeros((1, 1), dtype=torch.long)
    torch.manual_seed(1337)
    for sample in recorded["samples"]:
        tokens = demo.generate(prompt, max_new_tokens=200, do_sample=True, temperature=0.8, top_k=200, **cache)
        assert torch.equal(tokens[0], sample)
    tokens = demo.generate(prompt, max_new_tokens=200, do_sample=False, **cache)
    assert torch.equal(tokens[0], recorded["greedy"])


@functools.cache
def generate_with_reference(bias, prompt_length):
    """Returns the reference's greedy and sampled tokens, which ours have to equal with every cache."""
    reference = make_pair(bias=bias)[1].eval()
    idx, _ = make_batch(2, prompt_length)
    greedy = reference.generate_greedily(idx, 50)
    torch.manual_seed(0)
    return greedy, reference.sample(idx, 50, temperature=0.8, top_k=20)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prompt_length", [1, 31, 32, 33, 80])
def test_tokens_equal_reference(bias, prompt_length, cache):
    greedy, sampled = generate_with_reference(bias, prompt_length)
    model = make_pair(bias=bias)[0].eval()
    idx, _ = make_batch(2, prompt_length)
    assert torch.equal(model.generate(idx, max_new_tokens=50, do_sample=False, **cache), greedy)
    torch.manual_seed(0)
    tokens = model.generate(idx, max_new_tokens=50, do_sample=True, temperature=0.8, top_k=20, **cache)
    assert torch.equal(tokens, sampled)


def test_logits_without_cache_equal_reference_bitwise():
    model, reference = make_pair()
    model.eval(), reference.eval()
    idx, _ = make_batch(1, 5)
    settings = {"use_cache": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(idx, max_new_tokens=40, do_sample=False, **settings)
    read = []
    reference.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0][:, [-1]]))
    for step, logits in enumerate(output.logits):
        reference(output.sequences[:, : 5 + step][:, -BLOCK_SIZE:])
        # only the last position, as in nanoGPT, because a product with one row and one with many round differently
        assert torch.equal(logits, torch.nn.functional.linear(read[step], reference.lm_head.weight)[:, 0])


def test_ties_at_the_top_k_threshold_are_kept_as_in_nanogpt():
    model, reference = make_pair(n_layer=1)
    with torch.no_grad():  # three equal rows of the head are three equal logits
        for module in (model, reference):
            bias = module.get_parameter("transformer.ln_f.bias")
            module.lm_head.weight[10:13] = module.lm_head.weight[10] + 3 * bias
    model.eval(), reference.eval()
    idx, _ = make_batch(1, 4)
    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        tokens = model.generate(idx, max_new_tokens=30, do_sample=True, top_k=2)
        torch.manual_seed(seed)
        assert torch.equal(tokens, reference.sample(idx, 30, top_k=2))
        found.update(tokens[0, 4:].tolist())
    assert {10, 11, 12} <= found


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"stride": 8}])
def test_left_padded_rows_equal_single_rows(settings):
    model = make_model()
    lengths = (1, 5, 12, 17, 23, 30, 31, 25)
    ids, mask = pad_left(lengths)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False, **settings)
    if "stride" in settings:  # in a batch the longest row decides when the window moves
        lengths = (31,)
        ids, tokens = ids[6:7], tokens[6:7]
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], max_new_tokens=60, do_sample=False, **settings)
        assert torch.equal(tokens[row, -60:], alone[0, -60:])


def test_padding_of_every_row_takes_no_room_in_the_window():
    model = make_model()
    ids, mask = pad_left((9, 4))
    wide_ids, wide_mask = (torch.nn.functional.pad(t, (40, 0), value=v) for t, v in ((ids, 64), (mask, 0)))
    for settings in CACHES.values():
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, **settings)
        wide = model.generate(wide_ids, attention_mask=wide_mask, max_new_tokens=40, do_sample=False, **settings)
        assert torch.equal(wide[:, 40:], tokens)


def test_demo_rows_that_cross_block_size_equal_single_rows(demo):
    lengths = (1, 22, 68, 100)  # the shortest is the last to pass block_size
    ids = torch.zeros((4, 100), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = make_batch(1, length, seed=row)[0], 1
    alone = [demo.generate(ids[i : i + 1, -n:], max_new_tokens=140, do_sample=False) for i, n in enumerate(lengths)]
    for settings in ({}, {"cache_implementation": "static"}):
        tokens = demo.generate(ids, attention_mask=mask, max_new_tokens=140, do_sample=False, **settings)
        for row in range(4):
            assert torch.equal(tokens[row, -140:], alone[row][0, -140:]), (settings, lengths[row])


def test_stride_keeps_the_window_that_the_length_gives():
    model, reference = make_pair()
    model.eval(), reference.eval()
    for prompt_length, stride in ((5, 8), (70, 8), (5, BLOCK_SIZE), (40, 1)):
        tokens, _ = make_batch(2, prompt_length)
        for _ in range(50):
            length = tokens.shape[1]
            start = max(0, -(-(length - BLOCK_SIZE) // stride) * stride)
            start = min(start, length - 1)
            tokens = torch.cat([tokens, reference(tokens[:, start:])[0][:, -1:].argmax(-1)], dim=1)
        for settings in CACHES.values():
            found = model.generate(
                tokens[:, :prompt_length], max_new_tokens=50, do_sample=False, stride=stride, **settings
            )
            assert torch.equal(found, tokens), (prompt_length, stride, settings)


def test_stride_reads_a_window_once_and_then_token_by_token():
    model = make_model()
    lengths = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(make_batch(1, 30)[0], max_new_tokens=20, do_sample=False, stride=8)
    assert lengths == [30, 1, 1, 25, 1, 1, 1, 1, 1, 1, 1, 25, 1, 1, 1, 1, 1, 1, 1, 25]


@pytest.mark.parametrize("stride", [0, BLOCK_SIZE + 1, 2.0, True])
def test_impossible_stride_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride: expected 1 to 32, got {stride}"):
        make_model().generate(make_batch(1, 5)[0], max_new_tokens=5, stride=stride)


def test_beams_find_what_a_search_finds_up_to_block_size():
    model, reference = make_pair()
    model.eval(), reference.eval()
    idx, _ = make_batch(1, 21)
    beams, scores = idx.repeat(3, 1), torch.tensor([0.0, -1e9, -1e9])
    for _ in range(12):
        totals = scores[:, None] + reference(beams)[0][:, -1].log_softmax(-1)
        scores, flat = totals.flatten().topk(3)
        beams = torch.cat([beams[flat // 65], flat[:, None] % 65], dim=1)
    for settings in CACHES.values():
        found = model.generate(idx, max_new_tokens=12, num_beams=3, do_sample=False, **settings)
        assert torch.equal(found, beams[:1])


@pytest.mark.parametrize(
    ("settings", "way", "longest"),
    [
        ({"num_beams": 2}, "beam search", 33),
        ({"num_beams": 2, "do_sample": True}, "beam sample", 33),
        ({"prompt_lookup_num_tokens": 4}, "assisted generation", 30),
        ({"guidance_scale": 1.5}, "guidance_scale", 33),
        ({"guidance_scale": 1.5, "negative_prompt_ids": make_batch(1, 12)[0]}, "guidance_scale", 33),
        ({"synced_gpus": True}, "greedy search", 33),
    ],
)
def test_what_cannot_go_past_block_size_is_refused_before_the_first_token(settings, way, longest):
    model = make_model()
    n_prompt = max(8, settings.get("negative_prompt_ids", torch.zeros(1, 1)).shape[1])
    idx, _ = make_batch(1, 8)
    n_new = longest - n_prompt
    message = rf"generate: sequence too long for {way}: expected at most {longest} .*got {longest + 1}; lower max_new"
    for length in ({"max_new_tokens": n_new + 1}, {"max_length": n_prompt + n_new + 1}):
        with pytest.raises(ValueError, match=message):
            model.generate(idx, **length, **settings)
    if "synced_gpus" not in settings:  # which needs several processes
        assert model.generate(idx, max_new_tokens=n_new, **settings).shape == (1, 8 + n_new)
    ids, mask = pad_left((8, 5))
    padded = {"inputs": torch.nn.functional.pad(ids, (9, 0)), "attention_mask": torch.nn.functional.pad(mask, (9, 0))}
    if n_prompt == 8 and "prompt_lookup_num_tokens" not in settings:  # padding of all rows takes no room
        with pytest.raises(ValueError, match=message):
            model.generate(**padded, max_new_tokens=n_new + 1, **settings)


def test_return_sequences_and_streamed_tokens_go_past_block_size():
    model, reference = make_pair()
    model.eval(), reference.eval()
    idx, _ = make_batch(1, 6)
    torch.manual_seed(0)
    tokens = model.generate(idx, max_new_tokens=40, do_sample=True, top_k=0, num_return_sequences=3)
    torch.manual_seed(0)
    assert torch.equal(tokens, reference.sample(idx.repeat(3, 1), 40))


def test_drafted_tokens_equal_greedy_up_to_the_shorter_block_size():
    model, assistant = make_model(), make_model(seed=5, n_layer=1, block_size=24)
    idx, _ = make_batch(1, 6)
    for settings, n_new in (
        ({"prompt_lookup_num_tokens": 3}, 25),
        ({"assistant_model": model}, 27),
        ({"assistant_model": assistant}, 19),
    ):
        greedy = model.generate(idx, max_new_tokens=n_new, do_sample=False)
        assert torch.equal(model.generate(idx, max_new_tokens=n_new, do_sample=False, **settings), greedy)
        with pytest.raises(ValueError, match=f"assisted generation: expected at most {6 + n_new} tokens"):
            model.generate(idx, max_new_tokens=n_new + 1, do_sample=False, **settings)


def test_early_exit_is_refused_and_does_not_change_the_model():
    model = make_model()
    idx, _ = make_batch(1, 6)
    greedy = model.generate(idx, max_new_tokens=8, do_sample=False)
    with pytest.raises(ValueError, match="no head before their last layer: expected None, got 1; use assistant_model"):
        model.generate(idx, max_new_tokens=8, do_sample=False, assistant_early_exit=1)
    assert model.config.n_layer == 2
    assert torch.equal(model.generate(idx, max_new_tokens=8, do_sample=False), greedy)


def test_default_length_is_20_new_tokens_past_block_size_too():
    model = make_model()
    model.generation_config.max_length = None
    with pytest.warns(UserWarning, match="max_length"):
        assert model.generate(make_batch(1, 50)[0], do_sample=False).shape == (1, 70)


def test_long_prompt_is_not_read_in_chunks():
    model, reference = make_pair()
    model.eval(), reference.eval()
    idx, _ = make_batch(1, 70)
    tokens = model.generate(idx, max_new_tokens=6, do_sample=False, prefill_chunk_size=7)
    assert torch.equal(tokens, reference.generate_greedily(idx, 6))


def test_a_cache_of_the_caller_ends_with_the_last_window():
    model, reference = make_pair()
    model.eval(), reference.eval()
    idx, _ = make_batch(2, 20)
    cache = DynamicCache(config=model.config)
    tokens = model.generate(idx, max_new_tokens=10, do_sample=False, past_key_values=cache)
    tokens = model.generate(tokens, max_new_tokens=30, do_sample=False, past_key_values=cache)
    assert torch.equal(tokens, reference.generate_greedily(idx, 40))
    assert cache.get_seq_length() == BLOCK_SIZE


def test_prompt_of_embeddings_cannot_be_read_again():
    model = make_model()
    embeds = model.get_input_embeddings()(make_batch(1, 8)[0])
    assert model.generate(inputs_embeds=embeds, max_new_tokens=25, do_sample=False).shape == (1, 25)
    with pytest.raises(
        ValueError, match=r"at most block_size=32 tokens after .* inputs_embeds, .* got 34; give input_ids"
    ):
        model.generate(inputs_embeds=embeds, max_new_tokens=26, do_sample=False)


def test_growing_past_block_size_warns_once(monkeypatch):
    messages = []
    monkeypatch.setattr(decoding_nano_gpt.logger, "warning_once", messages.append)
    model = make_model()
    model.generate(make_batch(1, 8)[0], max_new_tokens=25, do_sample=False)  # the last token is not read
    model.generate(make_batch(1, 8)[0], max_new_tokens=26, do_sample=False, stride=2)
    assert messages == []
    model.generate(make_batch(1, 8)[0], max_new_tokens=26, do_sample=False)
    assert len(messages) == 1
    assert "past block_size=32 tokens" in messages[0]
