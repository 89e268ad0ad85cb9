"""What Transformers expects of a model, in addition to nanoGPT's numbers: masks, caches, back ends, heads."""

import ast
import functools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, StaticCache

from hugging_nano_gpt import NanoGPTConfig, NanoGPTForSequenceClassification, NanoGPTLMHeadModel, NanoGPTModel
from hugging_nano_gpt.model import modeling_nano_gpt
from hugging_nano_gpt.model.inputs_nano_gpt import CACHE_NAME, check_positions

from ..helpers.tiny import MODEL_ARGS, PAD, TORCH_VERSION, make_batch, make_model, pad_left

# Another order of float32 sums over at most 32 positions and 2 layers, on logits of size 10; measured at most 3e-6.
TOLERANCE = {"rtol": 0, "atol": 2e-5}

ONE_ROW_LENGTHS = (3, 16, 9, 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padded_rows_equal_single_rows(implementation):
    model = make_model()
    model.set_attn_implementation(implementation)
    ids, mask = pad_left(ONE_ROW_LENGTHS)
    padded = model(ids, attention_mask=mask).logits
    for row, length in enumerate(ONE_ROW_LENGTHS):
        alone = model(ids[row : row + 1, -length:]).logits[0]
        torch.testing.assert_close(padded[row, -length:], alone, **TOLERANCE)


def test_left_padded_rows_with_plain_positions_differ():
    """Shows that the test of padding can fail: with GPT2LMHeadModel's default positions, the rows differ."""
    model = make_model()
    ids, mask = pad_left(ONE_ROW_LENGTHS)
    wrong = model(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).logits[0, -3:]
    assert (wrong - model(ids[:1, -3:]).logits[0]).abs().max() > 1e-2


def test_right_padded_rows_equal_single_rows():
    model = make_model()
    ids, _ = make_batch(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, :5], model(ids[:1, :5]).logits[0], **TOLERANCE)


def test_left_padded_decoding_with_cache_equals_single_row():
    model = make_model()
    ids, mask = pad_left((5, 12))
    prefill = model(ids[:, :-2], attention_mask=mask[:, :-2])
    step = model(ids[:, -2:], attention_mask=mask, cache=prefill[CACHE_NAME])
    torch.testing.assert_close(step.logits[0], model(ids[:1, -5:]).logits[0, -2:], **TOLERANCE)


@pytest.mark.parametrize("n_cached", [0, 3])
@pytest.mark.parametrize("fill", [0, 1])
def test_mask_longer_than_the_text_is_read_from_the_first_column(n_cached, fill):
    model = make_model()
    ids, mask = pad_left((5, 12))
    long_mask = torch.nn.functional.pad(mask, (0, 9), value=fill)
    expected = model(ids, attention_mask=mask).logits[:, n_cached:]
    cache = None if n_cached == 0 else DynamicCache(config=model.config)
    if cache is not None:
        model(ids[:, :n_cached], attention_mask=long_mask, cache=cache)
    found = model(ids[:, n_cached:], attention_mask=long_mask, cache=cache).logits
    torch.testing.assert_close(found[mask[:, n_cached:].bool()], expected[mask[:, n_cached:].bool()], **TOLERANCE)


@pytest.mark.parametrize(("n_cached", "columns"), [(0, 11), (3, 9), (3, 11), (3, 1)])
def test_mask_shorter_than_the_text_is_refused(n_cached, columns):
    model = make_model()
    ids, _ = make_batch(2, 12)
    cache = DynamicCache(config=model.config)
    if n_cached:
        model(ids[:, :n_cached], cache=cache)
    message = rf"a column for each of {n_cached} cached and {12 - n_cached} new tokens, got \(2, {columns}\)"
    with pytest.raises(ValueError, match=message):
        model(ids[:, n_cached:], attention_mask=torch.ones(2, columns), cache=cache)


@pytest.mark.parametrize("columns", [12, 32])
def test_mask_with_a_static_cache_is_read_from_the_first_column(columns):
    model = make_model()
    ids, mask = pad_left((5, 12))
    expected = model(ids, attention_mask=mask).logits[:, -1]
    cache = StaticCache(config=model.config, max_cache_len=32)
    mask = torch.nn.functional.pad(mask, (0, columns - 12), value=1)
    model(ids[:, :-1], attention_mask=mask, cache=cache)
    step = model(ids[:, -1:], attention_mask=mask, cache=cache).logits[:, -1]
    torch.testing.assert_close(step, expected, **TOLERANCE)


def test_classifier_scores_the_last_token_of_a_mask_with_a_cache():
    torch.manual_seed(0)
    model = NanoGPTForSequenceClassification(NanoGPTConfig(**MODEL_ARGS)).eval()
    ids, mask = pad_left((5, 12))
    ids, mask = ids.flip(1), mask.flip(1)  # padded on the right
    expected = model(ids, attention_mask=mask).logits
    for columns in (12, 20):
        long_mask = torch.nn.functional.pad(mask, (0, columns - 12))
        cache = DynamicCache(config=model.config)
        model(ids[:, :3], attention_mask=long_mask, cache=cache)
        found = model(ids[:, 3:], attention_mask=long_mask, cache=cache).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_mask_of_ones_equals_no_mask_bitwise():
    model = make_model()
    ids, _ = make_batch(2, 16)
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("make_cache", [lambda config: None, lambda config: StaticCache(config, max_cache_len=32)])
def test_cached_forward_equals_uncached(make_cache):
    model = make_model()
    ids, _ = make_batch(2, 16)
    cache = make_cache(model.config)
    logits = []
    for piece in ids.split([9, 1, 1, 5], dim=1):
        outputs = model(piece, use_cache=True, cache=cache)
        cache = outputs[CACHE_NAME]
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **TOLERANCE)


def test_eager_attention_equals_sdpa():
    model = make_model()
    ids, _ = make_batch(2, 32)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_modules_set_to_zero_turn_all_dropout_off(implementation):
    """TRL's disable_dropout does this by default for DPO and reward models."""
    model = make_model(dropout=0.5).train()
    model.set_attn_implementation(implementation)
    ids, _ = make_batch(2, 16)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(ids).logits, model.eval()(ids, use_cache=False).logits)


@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="the compiler of torch 2.6 fails on Transformers' code")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and Transformers, when they compile it
def test_flex_attention_equals_sdpa():
    model = make_model(n_head=1)  # of width 32: torch computes narrower heads wrongly on CPUs without AVX512
    ids, mask = pad_left((5, 16))
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():  # its backward pass does not run on a CPU
        flex = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(flex[mask.bool()], expected[mask.bool()], **TOLERANCE)


@pytest.mark.parametrize(
    "implementation",
    [
        "sdpa",
        "eager",
        pytest.param(
            "flex_attention",
            marks=pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="the compiler of torch 2.6 fails on it"),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and Transformers, when they compile it
@torch.no_grad()  # the backward pass of flex does not run on a CPU
def test_packed_documents_equal_separate_ones(implementation):
    model = make_model(n_head=1)
    ids, _ = make_batch(1, 40)  # longer than block_size: only each document has to fit
    separate = torch.cat([model(ids[:, :25]).logits, model(ids[:, 25:]).logits], dim=1)
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    model.set_attn_implementation(implementation)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)


def test_flex_attention_is_refused_where_torch_computes_wrong_numbers(monkeypatch):
    model = make_model()
    model.set_attn_implementation("flex_attention")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(ValueError, match=r"expected n_embd / n_head of at least 32, got 8; use .*'sdpa'"):
        model(make_batch(1, 20)[0], use_cache=False)


def test_inputs_embeds_equal_input_ids_bitwise():
    model = make_model()
    ids, _ = make_batch(2, 16)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


@pytest.mark.parametrize(
    "inputs", [{}, {"input_ids": torch.zeros(1, 2).long(), "inputs_embeds": torch.zeros(1, 2, 32)}]
)
def test_forward_without_exactly_one_input_is_refused(inputs):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        make_model()(**inputs)


def count_module_calls(model):
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.Linear):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({}, 33),
        ({"attention_mask": torch.ones(2, 33)}, 33),
        ({"position_ids": torch.arange(33)[None]}, 33),
        ({"position_ids": torch.full((1, 33), 99)}, 100),
    ],
)
def test_input_longer_than_block_size_is_refused_before_any_kernel(extra, found):
    model = make_model()
    calls = count_module_calls(model)
    with pytest.raises(ValueError, match=rf"expected at most block_size=32 tokens, got {found}; keep the last 32"):
        model(make_batch(2, 33)[0], **extra)
    assert not calls


def test_cached_step_beyond_block_size_is_refused():
    model = make_model()
    cache = model(make_batch(1, 32)[0])[CACHE_NAME]
    with pytest.raises(ValueError, match="block_size=32 tokens, got 33"):
        model(torch.tensor([[1]]), cache=cache)


def test_padding_beyond_block_size_is_accepted_when_the_tokens_fit():
    model = make_model()
    ids, mask = pad_left((32, 20))
    wide_ids = torch.cat([torch.full((2, 8), PAD), ids], dim=1)
    wide_mask = torch.cat([torch.zeros(2, 8, dtype=torch.long), mask], dim=1)
    torch.testing.assert_close(
        model(wide_ids, attention_mask=wide_mask).logits[:, -20:],
        model(ids, attention_mask=mask).logits[:, -20:],
        **TOLERANCE,
    )


def test_hidden_states_and_attentions_are_recorded_on_request():
    model = make_model()
    model.set_attn_implementation("eager")
    outputs = model(make_batch(2, 16)[0], output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 16, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 16, 16)] * 2
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, 16))
    assert not outputs.attentions[0].triu(1).any()


def test_tuple_output_has_logits_first():
    model = make_model()
    ids, _ = make_batch(1, 4)
    assert torch.equal(model(ids, return_dict=False, use_cache=False)[0], model(ids).logits)
    assert torch.equal(model.transformer(ids, return_dict=False)[0], model.transformer(ids).last_hidden_state)


def test_training_forward_makes_no_cache_unless_asked():
    model = make_model().train()
    ids, _ = make_batch(1, 4)
    assert getattr(model(ids), CACHE_NAME) is None
    assert model(ids, use_cache=True)[CACHE_NAME].get_seq_length() == 4
    assert model.eval()(ids)[CACHE_NAME].get_seq_length() == 4
    assert getattr(model(ids, use_cache=False), CACHE_NAME) is None


@pytest.mark.parametrize(
    "make", [NanoGPTLMHeadModel, AutoModelForCausalLM.from_config, NanoGPTForSequenceClassification]
)
def test_initial_weights_have_nanogpt_deviations(make):
    torch.manual_seed(0)
    model = make(NanoGPTConfig(**{**MODEL_ARGS, "n_layer": 8, "n_embd": 128, "vocab_size": 512}))
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05), name
        elif parameter.ndim >= 2 and name != "score.weight":  # too few numbers for a deviation
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif parameter.ndim < 2:
            assert bool((parameter == (0.0 if name.endswith("bias") else 1.0)).all()), name


def test_weights_missing_from_a_folder_get_nanogpt_deviations(tmp_path):
    """from_pretrained initializes missing weights in another way than the constructor."""
    config = NanoGPTConfig(**{**MODEL_ARGS, "n_layer": 8, "n_embd": 128})
    model = NanoGPTLMHeadModel(config)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "mlp" not in name and "lm_head" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = NanoGPTLMHeadModel.from_pretrained(tmp_path)
    assert loaded.transformer.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
    assert loaded.transformer.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_tied_head_is_one_parameter_and_untied_two():
    tied = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS))
    untied = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS, tie_word_embeddings=False))
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_save_and_load_keeps_names_and_bits(tmp_path, tie_word_embeddings):
    model = NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS, tie_word_embeddings=tie_word_embeddings))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is NanoGPTLMHeadModel
    assert loaded.config.architectures == ["NanoGPTLMHeadModel"]
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is tie_word_embeddings
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_auto_classes_know_the_model(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is NanoGPTModel
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is NanoGPTForSequenceClassification
    assert classifier.score.weight.shape == (3, 32)


@pytest.mark.parametrize("bigger", [65 + 7, 50])
def test_resized_embeddings_stay_tied_and_keep_the_old_logits(bigger):
    model = make_model()
    ids, _ = make_batch(2, 8, vocab_size=50)
    expected = model(ids).logits
    model.resize_token_embeddings(bigger, mean_resizing=False)
    kept = min(bigger, 65)
    assert model.config.vocab_size == bigger
    assert model.lm_head.weight is model.transformer.wte.weight
    torch.testing.assert_close(model(ids).logits[..., :kept], expected[..., :kept], **TOLERANCE)


@pytest.mark.skipif(TORCH_VERSION < (2, 7), reason="the compiler of torch 2.6 fails on Transformers' code")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
def test_compiled_forward_is_one_graph_without_a_mask():
    model = make_model().train()
    ids, targets = make_batch(2, 16)
    expected = model(ids, shift_labels=targets).loss
    graphs = []

    def record(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=record)
    torch.testing.assert_close(compiled(ids, shift_labels=targets).loss, expected)
    attention = [node for node in graphs[0].graph.nodes if "scaled_dot_product" in str(node.target)]
    assert len(graphs) == 1
    assert [(node.kwargs["attn_mask"], node.kwargs["is_causal"]) for node in attention] == [(None, True)] * 2


def test_classifier_scores_the_last_token_of_each_row():
    torch.manual_seed(0)
    model = NanoGPTForSequenceClassification(NanoGPTConfig(**MODEL_ARGS, num_labels=3)).eval()
    ids, mask = pad_left((4, 9))
    alone = torch.cat([model(ids[:1, -4:]).logits, model(ids[1:]).logits])
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, alone, **TOLERANCE)
    right_ids, right_mask = ids.clone(), torch.ones_like(mask)
    right_ids[0, :4], right_ids[0, 4:], right_mask[0, 4:] = ids[0, -4:], PAD, 0
    torch.testing.assert_close(model(right_ids, attention_mask=right_mask).logits, alone, **TOLERANCE)
    assert (model(right_ids).logits[0] - alone[0]).abs().max() > 1e-2  # without a mask, padding cannot be found
    model.config.pad_token_id = PAD
    torch.testing.assert_close(model(right_ids).logits, alone, **TOLERANCE)


@pytest.mark.parametrize(
    ("num_labels", "labels"),
    [(3, torch.tensor([0, 2])), (1, torch.tensor([0.5, -1.0])), (3, torch.tensor([[1.0, 0, 1], [0, 0, 1]]))],
)
def test_classifier_computes_a_loss_for_every_problem_type(num_labels, labels):
    model = NanoGPTForSequenceClassification(NanoGPTConfig(**MODEL_ARGS, num_labels=num_labels))
    outputs = model(make_batch(2, 8)[0], labels=labels)
    outputs.loss.backward()
    assert outputs.logits.shape == (2, num_labels)
    assert model.score.weight.grad.abs().sum() > 0


def test_decay_groups_of_trainer_are_those_of_nanogpt():
    """Trainer excludes nn.LayerNorm and biases from decay; nanoGPT excludes tensors of less than two dimensions."""
    from transformers.trainer_pt_utils import get_parameter_names

    model = make_model()
    decayed = get_parameter_names(model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)"])
    expected = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    assert [name for name in decayed if name != "lm_head.weight"] == expected


# The files that are copied into a saved folder, and which of them each imports.
SIBLINGS = {
    "configuration": [],
    "decoding": ["fast", "inputs"],
    "fast": [],
    "folder": [],
    "generation": ["decoding", "fast", "inputs"],
    "inputs": [],
    "loss": [],
    "modeling": ["configuration", "decoding", "fast", "folder", "generation", "inputs", "loss", "persistence"],
    "persistence": ["configuration", "folder", "generation"],
}


def test_remote_code_files_are_all_there():
    paths = Path(modeling_nano_gpt.__file__).parent.glob("*.py")
    assert {path.name for path in paths} == {"__init__.py", *(f"{name}_nano_gpt.py" for name in SIBLINGS)}


@pytest.mark.parametrize("name", SIBLINGS)
def test_remote_code_files_import_nothing_else_of_ours(name):
    tree = ast.parse(Path(modeling_nano_gpt.__file__).with_name(f"{name}_nano_gpt.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [node.module for node in imported if isinstance(node, ast.ImportFrom) and node.level]
    plain = [alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names]
    absolute = [node.module for node in imported if isinstance(node, ast.ImportFrom) and not node.level]
    assert ours == [f"{sibling}_nano_gpt" for sibling in SIBLINGS[name]]
    assert not [name for name in plain + absolute if name.startswith("hugging_nano_gpt")]


def test_explicit_positions_past_the_table_are_refused_on_a_gpu_too(monkeypatch):
    class OnGPU:  # the attributes that the check reads
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, values):
            self.max, self.numel = values.max, values.numel

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check = functools.partial(check_positions, make_model().transformer)
    check(OnGPU(torch.arange(32)), end=8, is_explicit=True)
    check(OnGPU(torch.tensor([32])), end=8, is_explicit=False)  # the values are not read, because the shape is enough
    check(OnGPU(torch.tensor([32])), end=torch.tensor(8), is_explicit=True)  # a static cache, checked by generate
    with pytest.raises(ValueError, match="expected at most block_size=32 tokens, got 33"):
        check(OnGPU(torch.tensor([32])), end=8, is_explicit=True)
