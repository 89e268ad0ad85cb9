"""Every member of the nanoGPT family gives upstream's numbers, is written back without loss, and is never guessed."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hugging_nano_gpt import (
    CheckpointError,
    ConversionError,
    NanoGPTConfig,
    NanoGPTLMHeadModel,
    TrainingState,
    read_checkpoint,
    write_checkpoint,
)
from hugging_nano_gpt.checkpoint import formats
from hugging_nano_gpt.checkpoint.moments import from_adamw, group_by_dimension, group_by_module, list_parameter_shapes
from hugging_nano_gpt.demo import CKPT_PATH

from ..helpers.folders import ROOT
from ..helpers.members import MEMBERS
from ..helpers.tiny import FIXTURES_DIR, MODEL_ARGS, make_batch, make_model

TIED = [name for name, (_, _, is_tied) in MEMBERS.items() if is_tied]


def read_member(name, **kwargs):
    return read_checkpoint(FIXTURES_DIR / name, **MEMBERS[name][0], **kwargs)


def load_golden(name):
    return load_file((FIXTURES_DIR / name).parent / "golden.safetensors")


@pytest.mark.parametrize("name", MEMBERS)
def test_member_gives_upstream_numbers(name):
    options, activation_function, is_tied = MEMBERS[name]
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(FIXTURES_DIR / name, **options)
    assert model.config.activation_function == activation_function
    assert model.config.tie_word_embeddings is is_tied
    assert (model.lm_head.weight is model.transformer.wte.weight) is is_tied
    golden = load_golden(name)
    logits = model(golden["idx"]).logits[..., : golden["logits"].shape[-1]]  # llm.c's are without the padding rows
    # Upstream ran on another machine: float32 sums in another order; the wrong GELU gives at least 1e-4.
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MEMBERS if "llmc" not in name])
def test_member_with_another_activation_does_not(name):
    """Shows that the golden numbers distinguish the activations, even with toy weights."""
    options, activation_function, _ = MEMBERS[name]
    other = "gelu" if activation_function != "gelu" else "gelu_new"
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(FIXTURES_DIR / name, **{**options, "activation_function": other})
    golden = load_golden(name)
    assert (model(golden["idx"]).logits - golden["logits"]).abs().max() > 5e-5


def test_every_format_of_the_table_has_a_member():
    assert {read_member(name, with_optimizer=False).format for name in MEMBERS} == formats.FILE_KINDS.keys()


def test_format_is_read_once_it_is_in_the_table(tmp_path, monkeypatch):
    expected = read_checkpoint(CKPT_PATH)
    added = SimpleNamespace(
        NAME="added",
        KIND="checkpoint of another program",
        recognise=lambda file: file.raw.seek(0) == 0 and file.raw.read() == b"added",
        read=lambda file, options: replace(expected, training_state=TrainingState(options.n_head)),
    )
    (tmp_path / "model.bin").write_bytes(b"added")
    with pytest.raises(CheckpointError, match="got 5 bytes of something else"):
        read_checkpoint(tmp_path / "model.bin")
    monkeypatch.setattr(formats, "FORMATS", (added, *formats.FORMATS))
    found = read_checkpoint(tmp_path / "model.bin", n_head=3)
    assert (found.format, found.path, found.training_state.iter_num) == ("added", tmp_path / "model.bin", 3)


def assert_same_moments(first, second):
    assert first.moments.keys() == second.moments.keys()
    assert first.settings == second.settings
    for name, moments in first.moments.items():
        assert moments.keys() == second.moments[name].keys()
        assert all(torch.equal(moments[key], second.moments[name][key]) for key in moments), name


@pytest.mark.parametrize("name", TIED)
def test_member_written_as_todays_nanogpt_reads_back_the_same(name, tmp_path):
    first = read_member(name)
    write_checkpoint(first, tmp_path / "ckpt.pt")
    second = read_checkpoint(tmp_path / "ckpt.pt")
    assert list(first.state_dict) == list(second.state_dict)
    assert all(torch.equal(first.state_dict[key], second.state_dict[key]) for key in first.state_dict)
    assert first.model_args == second.model_args
    for field in ("iter_num", "best_val_loss", "config"):
        assert getattr(first.training_state, field) == getattr(second.training_state, field)
    if first.training_state.optimizer is not None:
        assert_same_moments(first.training_state.optimizer, second.training_state.optimizer)
        assert second.training_state.optimizer.grouping is group_by_dimension


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in TIED])
def test_untied_member_is_refused_by_todays_nanogpt(name, tmp_path):
    with pytest.raises(ConversionError, match=r"lm_head\.weight: expected the numbers of transformer\.wte\.weight"):
        write_checkpoint(read_member(name), tmp_path / "ckpt.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "grouping"),
    [
        ("nanogpt-2022-12-28-fe804286/ckpt.pt", group_by_module),
        ("nanogpt-2023-02-05-ab0718a7/ckpt.pt", group_by_module),
        ("nanogpt-2023-05-06-7fe4a099/ckpt.pt", group_by_dimension),
    ],
)
def test_moments_of_every_era_get_the_names_of_their_parameters(name, grouping):
    """Moments are identified by what upstream's training did: a step in the direction of exp_avg's sign."""
    checkpoint = read_member(name)
    optimizer = checkpoint.training_state.optimizer
    assert optimizer.grouping is grouping
    assert set(optimizer.moments) == set(list_parameter_shapes(checkpoint.model_args, checkpoint.tie_word_embeddings))
    raw = torch.load(FIXTURES_DIR / name, weights_only=True)["optimizer"]["state"]
    for key, moments in optimizer.moments.items():
        assert moments["exp_avg"].shape == checkpoint.state_dict[key].shape
        assert any(torch.equal(moments["exp_avg_sq"], other["exp_avg_sq"]) for other in raw.values())
        assert (moments["exp_avg"] != 0).any()


def test_grouping_by_module_sorts_layer_10_before_layer_2():
    shapes = list_parameter_shapes({**MODEL_ARGS, "n_layer": 11}, is_tied=True)
    decayed, others = group_by_module(list(shapes), shapes)
    layers = [name.split(".")[2] for name in decayed if name.endswith("c_attn.weight")]
    assert layers == ["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"]
    assert others[-2:] == ["transformer.wpe.weight", "transformer.wte.weight"]


def break_optimizer(kind):
    optimizer = copy.deepcopy(torch.load(CKPT_PATH, weights_only=True)["optimizer"])
    if kind == "swapped":
        optimizer["state"][2], optimizer["state"][3] = optimizer["state"][3], optimizer["state"][2]
    elif kind == "one group":
        numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
        optimizer["param_groups"] = [{**optimizer["param_groups"][0], "params": numbers}]
    elif kind == "other sizes":
        optimizer["param_groups"][1]["params"].insert(0, optimizer["param_groups"][0]["params"].pop())
    elif kind == "other optimizer":
        optimizer["state"] = {0: {"momentum_buffer": torch.zeros(65, 96)}}
    elif kind == "too many":
        optimizer["state"][99] = optimizer["state"][0]
    return optimizer


@pytest.mark.parametrize("kind", ["swapped", "one group", "other sizes", "other optimizer", "too many"])
def test_optimizer_that_fits_no_grouping_is_refused_but_the_model_loads(kind, tmp_path):
    contents = torch.load(CKPT_PATH, weights_only=True)
    contents["optimizer"] = break_optimizer(kind)
    torch.save(contents, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"ckpt.pt: its optimizer state cannot be named .*with_optimizer=False"):
        read_checkpoint(tmp_path / "ckpt.pt")
    assert read_checkpoint(tmp_path / "ckpt.pt", with_optimizer=False).training_state.iter_num == 5000
    NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")


def test_optimizer_round_trip_by_number_is_the_identity():
    raw = torch.load(CKPT_PATH, weights_only=True)["optimizer"]
    args = read_checkpoint(CKPT_PATH, with_optimizer=False).model_args
    again = from_adamw(raw, args, is_tied=True).to_adamw(args)
    assert again["param_groups"] == raw["param_groups"]
    assert list(again["state"]) == list(raw["state"])
    for number, moments in raw["state"].items():
        assert all(moments[key] is again["state"][number][key] for key in moments)


@pytest.mark.parametrize("name", ["gpt2_tiny.bin", "gpt2_tiny_bf16.bin"])
def test_llmc_read_and_written_is_byte_identical(name, tmp_path):
    write_checkpoint(read_checkpoint(FIXTURES_DIR / "llmc" / name), tmp_path / name, to="llmc")
    assert (tmp_path / name).read_bytes() == (FIXTURES_DIR / "llmc" / name).read_bytes()


def test_llmc_bfloat16_holds_the_rounded_numbers():
    full = read_checkpoint(FIXTURES_DIR / "llmc" / "gpt2_tiny.bin").state_dict
    half = read_checkpoint(FIXTURES_DIR / "llmc" / "gpt2_tiny_bf16.bin").state_dict
    assert all(torch.equal(full[name].to(torch.bfloat16), half[name]) for name in full)


def test_llmc_padding_rows_are_kept_and_never_generated():
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(FIXTURES_DIR / "llmc" / "gpt2_tiny.bin")
    assert model.config.vocab_size == 128
    with torch.no_grad():
        model.transformer.wte.weight[100:].normal_(std=50)  # so that the padding rows would win
    tokens = model.generate(make_batch(4, 4)[0], max_new_tokens=20, do_sample=True)
    assert tokens.max() < 100
    assert (model(tokens).logits.argmax(-1) >= 100).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {"bias": False}}, r"bias: expected True, because llm\.c's model always has biases"),
        ({"activation_function": "gelu"}, r"activation_function: expected a tanh GELU"),
        ({"dtype": torch.float16}, r"dtype: expected torch\.float32 or torch\.bfloat16, got torch\.float16"),
    ],
)
def test_checkpoint_that_llmc_cannot_hold_is_refused(changes, message, tmp_path):
    args = {**MODEL_ARGS, **changes.get("model_args", {})}
    state_dict = make_model(**args).to(changes.get("dtype", torch.float32)).state_dict()
    checkpoint = replace(
        read_checkpoint(FIXTURES_DIR / "llmc" / "gpt2_tiny.bin"),
        model_args=args,
        state_dict=state_dict,
        activation_function=changes.get("activation_function", "gelu_new"),
    )
    with pytest.raises(ConversionError, match=message):
        write_checkpoint(checkpoint, tmp_path / "model.bin", to="llmc")
    assert not list(tmp_path.iterdir())


def test_format_that_is_not_written_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"expected a format of \['nanogpt', 'llmc'\], got 'mingpt'"):
        write_checkpoint(read_checkpoint(CKPT_PATH), tmp_path / "model.pt", to="mingpt")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (1, 4, r"version: expected 3 \(float32\) or 5 \(bfloat16\), got 4"),
        (3, 129, r"vocab_size: expected 1 to 128, the padded size, got 129"),
        (5, 5, r"n_embd: expected a multiple of n_head"),
        (4, 0, r"n_layer: expected a positive int, got 0"),
        (4, 2**31 - 1, r"bytes where its header says"),
        (7, 2**31 - 1, r"bytes where its header says"),
        (9, 1, r"expected zeros after the eighth number"),
    ],
)
def test_llmc_header_with_impossible_number_is_refused(position, value, message, tmp_path):
    data = bytearray((FIXTURES_DIR / "llmc" / "gpt2_tiny.bin").read_bytes())
    data[4 * position : 4 * position + 4] = value.to_bytes(4, "little")
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "model.bin")


def test_mingpt_without_heads_asks_for_them():
    with pytest.raises(
        CheckpointError, match=r"model\.pt: .*expected n_head, a divisor of 32, got none; give it as n_head"
    ):
        read_checkpoint(FIXTURES_DIR / "mingpt" / "model.pt")
    with pytest.raises(CheckpointError, match=r"n_embd: expected a multiple of n_head"):
        read_checkpoint(FIXTURES_DIR / "mingpt" / "model.pt", n_head=5)


def test_bare_state_dict_of_todays_nanogpt_is_tied_with_exact_gelu(tmp_path):
    model = make_model()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    checkpoint = read_checkpoint(tmp_path / "model.pt", n_head=4)
    assert (checkpoint.activation_function, checkpoint.tie_word_embeddings) == ("gelu", True)
    assert checkpoint.model_args == MODEL_ARGS


def test_heads_other_than_recorded_are_refused():
    assert read_checkpoint(CKPT_PATH, n_head=3).model_args["n_head"] == 3
    with pytest.raises(CheckpointError, match="expected n_head=3 as it records, got 6; leave out n_head"):
        read_checkpoint(CKPT_PATH, n_head=6)


def test_unknown_activation_is_refused():
    with pytest.raises(CheckpointError, match=r"expected a GELU of .*got 'relu'"):
        read_checkpoint(CKPT_PATH, activation_function="relu")


def test_tying_can_be_set_where_the_matrices_allow_it():
    untied = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH, tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert torch.equal(untied.lm_head.weight, untied.transformer.wte.weight)
    with pytest.raises(CheckpointError, match="cannot be tied: expected equal matrices, got different ones"):
        read_member("nanogpt-2022-12-28-fe804286/ckpt.pt", tie_word_embeddings=True)


def test_masks_without_an_optimizer_tell_the_tanh_gelu(tmp_path):
    contents = torch.load(FIXTURES_DIR / "nanogpt-2023-02-02-1e87509e" / "ckpt.pt", weights_only=True)
    del contents["optimizer"]
    torch.save(contents, tmp_path / "ckpt.pt")
    checkpoint = read_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint.activation_function == "gelu_new"
    assert "attention masks" in checkpoint.assumptions[-1]


@pytest.mark.parametrize("name", MEMBERS)
def test_assumptions_say_where_the_activation_came_from_unless_it_is_given(name):
    options = {key: value for key, value in MEMBERS[name][0].items() if key != "activation_function"}
    assumptions = read_checkpoint(FIXTURES_DIR / name, **options).assumptions
    assert sum("GELU" in assumption for assumption in assumptions) == 1
    given = read_checkpoint(FIXTURES_DIR / name, **options, activation_function="gelu")
    assert given.assumptions == tuple(assumption for assumption in assumptions if "GELU" not in assumption)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    contents = torch.load(CKPT_PATH, weights_only=True)
    contents["model"]["transformer.h.1.mlp.c_fc.weight"][3, 5] = value
    torch.save(contents, tmp_path / "ckpt.pt")
    with pytest.raises(
        CheckpointError, match=r"NaN or infinity in 'transformer\.h\.1\.mlp\.c_fc\.weight'; the run div"
    ):
        read_checkpoint(tmp_path / "ckpt.pt")


def test_weights_whose_sum_overflows_are_accepted(tmp_path):
    contents = torch.load(CKPT_PATH, weights_only=True)
    contents["model"]["transformer.ln_f.weight"].fill_(3e38)
    torch.save(contents, tmp_path / "ckpt.pt")
    assert read_checkpoint(tmp_path / "ckpt.pt").state_dict["transformer.ln_f.weight"][0] == 3e38


@pytest.mark.parametrize("block_size", [1, 20, 32])
def test_cropped_model_reads_no_further_and_survives_the_way_back(block_size, tmp_path):
    model = make_model()
    idx, _ = make_batch(2, block_size)
    expected = model(idx).logits
    model.crop_block_size(block_size)
    assert torch.equal(model(idx).logits, expected)
    assert model.config.block_size == model.config.max_position_embeddings == block_size
    with pytest.raises(ValueError, match=f"block_size={block_size} tokens, got {block_size + 1}"):
        model(make_batch(2, block_size + 1)[0])
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["model_args"]["block_size"] == block_size
    assert torch.equal(NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")(idx).logits, expected)
    assert (tmp_path / "ckpt.pt").stat().st_size < 200_000  # the cropped rows are not written


@pytest.mark.parametrize("block_size", [0, 33])
def test_crop_beyond_what_was_learned_is_refused(block_size):
    with pytest.raises(ValueError, match=f"expected 1 to block_size=32, got {block_size}"):
        NanoGPTLMHeadModel(NanoGPTConfig(**MODEL_ARGS)).crop_block_size(block_size)


def test_documentation_has_a_row_for_every_era():
    rows = [
        line for line in (ROOT / "docs" / "checkpoint-format.md").read_text().splitlines() if line.startswith("| ")
    ]
    for name, (_, activation_function, is_tied) in MEMBERS.items():
        commit = name.split("/")[0].rsplit("-", 1)[-1]
        found = [row.split(" | ") for row in rows if commit in row.split(" | ")[0]]
        for row in found:
            assert ("tanh" in row[2]) is (activation_function != "gelu") or "wrong for these six weeks" in row[2], name
            assert row[3] == ("tied" if is_tied else "untied"), name
        assert found or not name.startswith("nanogpt-20") or commit in ("1e87509e", "ab0718a7"), name  # within a row
