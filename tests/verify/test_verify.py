"""verify_models: a model equals itself as a file and as a folder, and every kind of mismatch is found and named."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from hugging_nano_gpt import CheckpointError, NanoGPTLMHeadModel, export_gpt2, verify_against_nanogpt, verify_models
from hugging_nano_gpt.convert import pretrained
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.model.fast_nano_gpt import PreallocatedLayer
from hugging_nano_gpt.verify.compare import describe_difference, measure_difference
from hugging_nano_gpt.verify.computing import have_same_bits

from ..helpers.contents import HEAD, WTE, save, swap
from ..helpers.folders import DOCS_DIR
from ..helpers.reports import find_wrong
from ..helpers.tiny import FIXTURES_DIR, MODEL_ARGS, make_model

DOCS = (DOCS_DIR / "verify.md").read_text()
C_FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture
def folder(ckpt_path, tmp_path) -> Path:
    return save_folder(ckpt_path, tmp_path / "saved")


def save_folder(ckpt_path: Path, folder: Path, **kwargs) -> Path:
    """Converts a checkpoint file to a folder, with arguments of from_nanogpt_ckpt."""
    NanoGPTLMHeadModel.from_nanogpt_ckpt(ckpt_path, **kwargs).save_pretrained(folder)
    return folder


def save_changed(contents, tmp_path: Path) -> Path:
    folder = tmp_path / "changed"
    folder.mkdir()
    return save(contents, folder)


def flip_bit(tensor: torch.Tensor, index: tuple[int, ...], bit: int = 0) -> None:
    tensor.view(torch.int32)[index] ^= 1 << bit


@pytest.mark.parametrize("pair", ["file file", "file folder", "folder file", "folder folder"])
def test_every_pairing_of_one_model_is_equal(ckpt_path, folder, pair):
    report = verify_models(*({"file": ckpt_path, "folder": folder}[kind] for kind in pair.split()), gradients=True)
    assert find_wrong(report) == {}
    assert report.is_equal
    names = [check.name for check in report.checks]
    assert names[:6] == ["sizes", "activation", "tying", "names", "dtypes", "tensors"]
    assert [name for name in names if name.startswith("logits")] == ["logits 2x1", "logits 2x17", "logits 2x32"]
    assert names[-4:] == ["gradients", "greedy tokens", "cached, left", "cached, right"]
    assert {check.largest_difference for check in report.checks} == {None, 0.0}
    assert str(report).endswith(f"Equal: {len(names)} of {len(names)} checks passed.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_broken_cache_is_found_on_its_side(ckpt_path, folder, monkeypatch, dtype):
    NanoGPTLMHeadModel.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    assert find_wrong(verify_models(folder, folder)) == {}
    monkeypatch.setattr(PreallocatedLayer, "update", lambda self, keys, values, *args, **kwargs: (keys, values))
    wrong = find_wrong(verify_models(folder, folder))
    assert list(wrong) == ["cached, left", "cached, right"]
    assert re.fullmatch(r"row \d differs from token \d+ on: .* the left side generates other.*", wrong["cached, left"])
    generate = NanoGPTLMHeadModel.generate
    sides = []

    def generate_well_on_the_right(model, *args, **kwargs):
        sides.append(model)
        return generate(model, *args, use_cache=len(sides) == 1, **kwargs)

    monkeypatch.setattr(NanoGPTLMHeadModel, "generate", generate_well_on_the_right)
    assert list(find_wrong(verify_models(folder, folder))) == ["cached, left"]


def test_caches_of_two_different_models_are_each_compared_with_their_own_model(ckpt_path, tmp_path):
    torch.manual_seed(1)
    other = NanoGPTLMHeadModel(NanoGPTLMHeadModel.from_nanogpt_ckpt(ckpt_path).config)
    other.save_pretrained(tmp_path / "other")
    wrong = find_wrong(verify_models(ckpt_path, tmp_path / "other"))
    assert {"tensors", "greedy tokens"} <= wrong.keys()
    assert not {"cached, left", "cached, right"} & wrong.keys()


@pytest.mark.parametrize("name", ["nanogpt-2022-12-28-fe804286", "nanogpt-head-compiled", "mingpt"])
def test_old_and_wrapped_and_bare_files_equal_their_conversions(name, tmp_path):
    (path,) = (FIXTURES_DIR / name).glob("*.pt")
    n_head = 4 if name == "mingpt" else None
    kwargs = {"n_head": n_head} if n_head else {}
    report = verify_models(path, save_folder(path, tmp_path / "saved", **kwargs), n_head=n_head)
    assert find_wrong(report) == {}
    assert any("the file does not record it" in note or "tanh GELU" in note for note in report.notes)


def test_model_of_another_dropout_is_equal_with_a_note(ckpt_path, tmp_path):
    report = verify_models(ckpt_path, save_folder(ckpt_path, tmp_path / "saved", dropout=0.2))
    assert report.is_equal
    assert "dropout 0.0 and 0.2: it acts in training only" in report.notes


def test_one_flipped_mantissa_bit_is_found_and_named(ckpt_path, contents, tmp_path):
    before = contents["model"][C_FC][3, 7].item()
    flip_bit(contents["model"][C_FC], (3, 7))
    after = contents["model"][C_FC][3, 7].item()
    report = verify_models(ckpt_path, save_changed(contents, tmp_path))
    expected = f"{C_FC}: 1 of 4,096 numbers differ, most at [3, 7]: {before:.9g} and {after:.9g}"
    assert find_wrong(report)["tensors"] == expected
    (check,) = (check for check in report.checks if check.name == "tensors")
    assert check.largest_difference == pytest.approx(abs(after - before))
    assert "NOT EQUAL" in str(report)


def test_flipped_bit_in_the_tied_matrix_is_named_once(ckpt_path, contents, tmp_path):
    flip_bit(contents["model"][WTE], (64, 31), bit=22)
    wrong = find_wrong(verify_models(ckpt_path, save_changed(contents, tmp_path)))
    assert wrong["tensors"].startswith(f"{WTE}: 1 of 2,080 numbers differ, most at [64, 31]: ")
    assert HEAD not in wrong["tensors"]
    assert "tying" not in wrong
    assert "logits 2x32" in wrong
    assert "the same bits expected" in wrong["logits 2x32"]


@pytest.mark.parametrize(
    ("value", "other", "shown", "largest"),
    [
        (0.0, -0.0, "0 and -0", 0.0),
        (1.0, 1 + 2**-23, "1 and 1.00000012", 2**-23),
        (math.nan, None, "nan (0x7fc00000) and nan (0x7fc00001)", 0.0),
        (math.nan, 1.0, "nan and 1", math.inf),
        (math.inf, 1.0, "inf and 1", math.inf),
    ],
)
def test_bits_are_compared_not_values(value, other, shown, largest):
    left, right = torch.ones(2, 3), torch.ones(2, 3)
    left[1, 2] = value
    if other is None:
        right.view(torch.int32)[1, 2] = 0x7FC00001
    else:
        right[1, 2] = other
    assert have_same_bits(left, left.clone())
    assert not have_same_bits(left, right)
    assert describe_difference(left, right) == f"1 of 6 numbers differ, most at [1, 2]: {shown}"
    assert measure_difference(left, right) == largest


def test_nan_payload_in_a_folder_is_found(folder, tmp_path):
    paths = [tmp_path / "nan", tmp_path / "other-nan"]
    for payload, path in enumerate(paths):
        model = NanoGPTLMHeadModel.from_pretrained(folder)
        with torch.no_grad():
            model.transformer.h[0].ln_1.bias.view(torch.int32)[5] = 0x7FC00000 + payload
        model.save_pretrained(path)
    wrong = find_wrong(verify_models(*paths))
    assert wrong["tensors"].startswith(
        "transformer.h.0.ln_1.bias: 1 of 32 numbers differ, most at [5]: nan (0x7fc00000)"
    )
    report = verify_models(folder, paths[0])
    assert find_wrong(report)["logits 2x1"].startswith("largest difference inf")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["is_equal"] is False


def test_swapped_layers_are_named(ckpt_path, contents, tmp_path):
    for name in list(contents["model"]):
        if name.startswith("transformer.h.0."):
            swap(contents["model"], name, name.replace(".h.0.", ".h.1."))
    wrong = find_wrong(verify_models(ckpt_path, save_changed(contents, tmp_path)))
    assert wrong["tensors"] == "transformer.h.0 and transformer.h.1 are swapped"
    assert "logits 2x1" in wrong


def test_rotated_layers_are_named(tmp_path):
    model = make_model(n_layer=3)
    model.save_pretrained(tmp_path / "left")
    model.transformer.h = torch.nn.ModuleList([model.transformer.h[i] for i in (1, 2, 0)])
    model.save_pretrained(tmp_path / "right")
    assert find_wrong(verify_models(tmp_path / "left", tmp_path / "right"))["tensors"] == (
        "transformer.h.0 on the left is transformer.h.2 on the right, "
        "transformer.h.1 on the left is transformer.h.0 on the right, "
        "transformer.h.2 on the left is transformer.h.1 on the right"
    )


def test_swapped_and_transposed_tensors_are_named(ckpt_path, contents, tmp_path):
    tensors, proj = contents["model"], "transformer.h.{}.attn.c_proj.weight"
    swap(tensors, "transformer.h.0.ln_1.bias", "transformer.h.0.ln_2.bias")
    tensors[proj.format(0)] = tensors[proj.format(0)].T.contiguous()
    wrong = find_wrong(verify_models(ckpt_path, save_changed(contents, tmp_path)))
    assert wrong["tensors"] == (
        f"transformer.h.0.ln_1.bias and transformer.h.0.ln_2.bias are swapped, {proj.format(0)} is transposed"
    )


@pytest.mark.parametrize("activation_function", ["gelu_new", "gelu_pytorch_tanh"])
def test_tanh_instead_of_exact_gelu_is_named_while_the_tensors_are_equal(ckpt_path, tmp_path, activation_function):
    other = save_folder(ckpt_path, tmp_path / "saved", activation_function=activation_function)
    wrong = find_wrong(verify_models(ckpt_path, other, gradients=True))
    assert wrong["activation"] == f"gelu and {activation_function}: one is exact, the other the tanh formula"
    assert {"logits 2x1", "logits 2x17", "logits 2x32", "gradients"} < set(wrong)
    assert "tensors" not in wrong
    assert verify_models(ckpt_path, other, activation_function=activation_function).is_equal


def test_untied_head_with_other_numbers_is_named(ckpt_path, contents, tmp_path):
    contents["model"][HEAD] = contents["model"][HEAD].clone()
    flip_bit(contents["model"][HEAD], (2, 3), bit=22)
    changed = save_changed(contents, tmp_path)
    for pair, side in (((ckpt_path, changed), "right"), ((changed, ckpt_path), "left")):
        wrong = find_wrong(verify_models(*pair, gradients=True))
        assert wrong["tying"].startswith(
            f"only on the {side} lm_head is untied, a matrix of its own: 1 of 2,080 numbers differ, most at [2, 3]: "
        )
        assert wrong["tensors"].startswith(f"{HEAD}: 1 of 2,080 numbers differ")
        assert wrong["gradients"].startswith(f"only on one side: '{HEAD}'")


def test_untied_head_with_the_embeddings_numbers_is_named(ckpt_path, folder, tmp_path):
    untied = save_folder(ckpt_path, tmp_path / "untied", tie_word_embeddings=False)
    wrong = find_wrong(verify_models(folder, untied))
    assert set(wrong) == {"tying"}
    assert "it has the embedding's numbers, but the two would train apart" in wrong["tying"]


def test_other_dtype_is_a_mismatch_that_says_whether_the_values_are_equal(ckpt_path, folder, tmp_path):
    half = save_folder(ckpt_path, tmp_path / "half", dtype=torch.bfloat16)
    NanoGPTLMHeadModel.from_pretrained(half, dtype=torch.float32).save_pretrained(tmp_path / "widened")
    model = NanoGPTLMHeadModel.from_pretrained(half)
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")

    def describe(left, right):
        wrong = find_wrong(verify_models(left, right))
        assert re.search("tensors not compared bit for bit, as their dtypes differ|: shape ", wrong["tensors"])
        return wrong["dtypes"]

    assert describe(folder, half) == "float32 and bfloat16; equal once rounded to bfloat16"
    assert describe(half, tmp_path / "widened") == "bfloat16 and float32; as numbers they are equal"
    assert describe(folder, tmp_path / "other") == ("float32 and bfloat16; they differ even when rounded to bfloat16")
    make_model(n_embd=64).bfloat16().save_pretrained(tmp_path / "wide")
    assert describe(folder, tmp_path / "wide") == "float32 and bfloat16; their shapes differ too"
    assert verify_models(half, half, gradients=True).is_equal


def test_other_number_of_heads_is_named(ckpt_path, contents, tmp_path):
    contents["model_args"]["n_head"] = 2
    wrong = find_wrong(verify_models(ckpt_path, save_changed(contents, tmp_path)))
    assert wrong["sizes"] == "n_head: 4 and 2"
    assert "tensors" not in wrong
    assert "logits 2x32" in wrong


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "block_size", "vocab_size", "bias"])
def test_other_size_is_named_with_the_tensors_it_changes(name, tmp_path):
    value = False if name == "bias" else MODEL_ARGS[name] * 2
    make_model().save_pretrained(tmp_path / "left")
    make_model(**{name: value}).save_pretrained(tmp_path / "right")
    report = verify_models(tmp_path / "left", tmp_path / "right")
    wrong = find_wrong(report)
    assert wrong["sizes"] == f"{name}: {MODEL_ARGS[name]} and {value}"
    assert ("names" in wrong) == (name in ("n_layer", "bias"))
    assert any("vocab_size differs" in note for note in report.notes) == (name == "vocab_size")
    if name == "block_size":
        assert wrong["tensors"].startswith("transformer.wpe.weight: shape (32, 32) and (64, 32)")


def test_folder_with_a_loss_in_chunks_is_compared_by_all_its_numbers(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "left")
    model.config.loss_chunk_size = 8
    model.save_pretrained(tmp_path / "right")
    assert verify_models(tmp_path / "left", tmp_path / "right", gradients=True).is_equal


def test_hub_id_is_loaded_by_our_class_alone(folder, monkeypatch):
    load, asked = NanoGPTLMHeadModel.from_pretrained, []

    def load_folder(source, **kwargs):
        asked.append((source, kwargs.get("trust_remote_code")))
        return load(folder, **kwargs)

    fields = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(NanoGPTLMHeadModel, "from_pretrained", load_folder)
    monkeypatch.setattr(pretrained, "PreTrainedConfig", SimpleNamespace(get_config_dict=lambda source: (fields, {})))
    report = verify_models("someone/model-1.0", "someone/model-1.0")
    assert report.is_equal
    assert report.left == "someone/model-1.0 (model of the Hub, iteration 7)"
    assert asked == [("someone/model-1.0", None)] * 2


def test_hub_out_of_reach_is_one_line(ckpt_path, monkeypatch):
    def fail(source):
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(pretrained.PreTrainedConfig, "get_config_dict", fail)
    with pytest.raises(
        CheckpointError, match=r"^someone/model: cannot be loaded: .* connect to the hub; check "
    ) as caught:
        verify_models(ckpt_path, "someone/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.pt", "out/missing.pt", "./a/b", "/a/b", "a/b/c"])
def test_missing_file_is_not_looked_for_on_the_hub(ckpt_path, source):
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        verify_models(ckpt_path, source)


@pytest.mark.parametrize("gpt2", ["gpt2", "openai-community/gpt2"])
def test_gpt2_is_taken_by_its_name_on_the_hub(gpt2, ckpt_path, tmp_path, monkeypatch):
    snapshot = tmp_path / f"models--{gpt2.replace('/', '--')}" / "snapshots" / "0123"
    export_gpt2(NanoGPTLMHeadModel.from_nanogpt_ckpt(ckpt_path), snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    report = verify_models(ckpt_path, gpt2)
    assert report.is_equal
    assert report.right == f"{gpt2} (model of the Hub, iteration 7)"


@pytest.mark.parametrize("setting", [{"n_head": 4}, {"activation_function": "gelu_new"}])
def test_settings_of_files_are_refused_without_a_file(setting, ckpt_path, folder):
    (name,) = setting
    (ckpt_path.parent / "model.py").touch()
    for verify in (
        lambda: verify_models(folder, folder, **setting),
        lambda: verify_against_nanogpt(folder, ckpt_path.parent, **setting),
    ):
        with pytest.raises(CheckpointError, match=f"expected no '{name}' for a folder.*; leave out --"):
            verify()


def test_settings_of_files_apply_to_a_file_next_to_a_folder(ckpt_path, folder):
    report = verify_models(folder, ckpt_path, activation_function="gelu_new")
    assert find_wrong(report)["activation"].startswith("gelu and gelu_new")


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_folder_of_another_kind_is_refused(ckpt_path, folder):
    change_config(folder, model_type="llama")
    with pytest.raises(
        CheckpointError, match=r"expected model_type 'hugging_nano_gpt' in its config\.json, got 'llama'"
    ):
        verify_models(ckpt_path, folder)
    change_config(folder, model_type="hugging_nano_gpt", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(CheckpointError, match="expected the model's own numbers, got a quantization_config"):
        verify_models(ckpt_path, folder)
    with pytest.raises(CheckpointError, match=re.escape(f"give the file in it, as {ckpt_path}")):
        verify_models(ckpt_path, ckpt_path.parent)


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("model.safetensors", "cannot be loaded: expected a folder"),
        ("config.json", "expected a checkpoint file or a folder with config.json, got a folder without"),
    ],
)
def test_folder_without_one_of_its_files_is_refused(ckpt_path, folder, file_name, message):
    (folder / file_name).unlink()
    with pytest.raises(CheckpointError, match=message):
        verify_models(folder, ckpt_path)


def test_folder_with_layers_missing_is_refused_not_filled_in(ckpt_path, folder):
    change_config(folder, n_layer=3)
    with pytest.raises(CheckpointError, match=r"not a whole model: .*missing_keys 'transformer\.h\.2") as caught:
        verify_models(ckpt_path, folder)
    assert "\n" not in str(caught.value)


def test_report_in_the_docs_is_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/ckpt.pt").write_bytes(CKPT_PATH.read_bytes())
    save_folder(Path("out/ckpt.pt"), Path("saved"))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", DOCS, flags=re.DOTALL | re.MULTILINE)
    assert ("", f"{verify_models('out/ckpt.pt', 'saved', gradients=True)}\n") in blocks
    (code,) = (text for language, text in blocks if language == "python")
    exec(code, {})
