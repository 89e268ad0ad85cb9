"""Files of forks and of other programs: nanoGPT's model is read, and an error says what to do about the rest."""

import collections
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hugging_nano_gpt import (
    CheckpointError,
    ConversionError,
    NanoGPTConfig,
    NanoGPTForSequenceClassification,
    NanoGPTLMHeadModel,
    convert_to_checkpoint,
    convert_to_folder,
    inspect_path,
    read_checkpoint,
    verify_models,
)
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.training import TRAIN_DEFAULTS

from ..conftest import assert_same, save
from ..helpers.tiny import FIXTURES_DIR


class Plan:
    """A class that a fork pickles."""


EXTRAS = {
    "scaler": {"scale": 65536.0, "growth_tracker": 3},
    "rng_state": torch.get_rng_state(),
    "tokens_seen": 10**12,
    "optimizers": [{"state": {}}, {"state": {}}],
    "numpy_rng": np.random.default_rng(0).random(4),
    "plan": Plan(),
    "path": pathlib.PurePosixPath("/data"),
    "counter": collections.Counter("abc"),
}


@pytest.mark.parametrize("name", [*EXTRAS, "all"])
def test_extra_keys_are_named_with_the_way_out_and_then_ignored(contents, tmp_path, name):
    path = save(contents | (EXTRAS if name == "all" else {name: EXTRAS[name]}), tmp_path)
    with pytest.raises(CheckpointError, match=r"(expected only|could run code).*ignore_extra=True \(--ignore-extra\)"):
        NanoGPTLMHeadModel.from_nanogpt_ckpt(path)
    checkpoint = read_checkpoint(path, ignore_extra=True)
    assert_same(checkpoint.state_dict, contents["model"])
    assert (checkpoint.training_state.iter_num, checkpoint.training_state.optimizer is None) == (7, False)
    assert any("ignored, as asked" in text for text in checkpoint.assumptions)
    assert NanoGPTLMHeadModel.from_nanogpt_ckpt(path, ignore_extra=True).num_parameters() > 0


@pytest.mark.parametrize("optimizer", [[{"state": {}}] * 2, {"muon": {}, "adamw": {}}, "none"])
def test_optimizers_of_another_form_do_not_keep_the_model_from_loading(contents, tmp_path, optimizer):
    path = save({**contents, "optimizer": optimizer}, tmp_path)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(path)
    assert torch.equal(model.transformer.wte.weight, contents["model"]["transformer.wte.weight"])
    with pytest.raises(CheckpointError, match="optimizer: expected"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "part", [{"config": Plan()}, {"config": {"a": Plan()}}, {"iter_num": "7"}, {"best_val_loss": []}]
)
def test_training_state_of_another_form_is_ignored_only_when_asked(contents, tmp_path, part):
    path = save({**contents, **part}, tmp_path)
    with pytest.raises(CheckpointError, match="ignore_extra=True"):
        read_checkpoint(path)
    assert_same(read_checkpoint(path, ignore_extra=True).state_dict, contents["model"])


@pytest.mark.parametrize("part", ["model", "model_args"])
def test_what_the_model_is_made_of_is_never_ignored(contents, tmp_path, part):
    contents[part] = {**contents[part], "rotary": Plan()}
    with pytest.raises(CheckpointError, match=r"could run code: .*Plan"):
        read_checkpoint(save(contents, tmp_path), ignore_extra=True)
    contents[part]["rotary"] = 1
    with pytest.raises(CheckpointError, match="rotary"):
        read_checkpoint(save(contents, tmp_path), ignore_extra=True)


def test_extra_keys_of_build_nanogpt_are_ignored_too(tmp_path, monkeypatch):
    from hugging_nano_gpt.checkpoint import build_nanogpt

    path = FIXTURES_DIR / "build-nanogpt" / "model_05000.pt"
    with torch.serialization.safe_globals([(build_nanogpt.GPTConfig, "__main__.GPTConfig")]):
        whole = torch.load(path, weights_only=True)
    monkeypatch.setattr(build_nanogpt.GPTConfig, "__module__", "__main__")
    monkeypatch.setattr("__main__.GPTConfig", build_nanogpt.GPTConfig, raising=False)
    other = save({**whole, "optimizer": {}, "rng_state": Plan()}, tmp_path)
    with pytest.raises(CheckpointError, match="ignore_extra=True"):
        read_checkpoint(other)
    assert_same(read_checkpoint(other, ignore_extra=True).state_dict, read_checkpoint(path).state_dict)


def test_every_function_and_command_takes_ignore_extra(contents, tmp_path):
    path = save(contents | EXTRAS, tmp_path)
    written = convert_to_folder(path, tmp_path / "out", ignore_extra=True)
    assert any("ignored, as asked" in note for note in written.notes)
    assert inspect_path(path, ignore_extra=True).training_state.iter_num == 7
    assert verify_models(path, tmp_path / "out", ignore_extra=True).is_equal


# Settings.


def test_settings_of_a_fork_are_in_the_notes_of_every_command(contents, tmp_path):
    """Nothing else shows that the tensors of a fork's model are read as nanoGPT's."""
    contents["config"] = {
        "batch_size": 4,
        "norm_type": "rmsnorm",
        "use_rope": True,
        "parallel_block": False,
        "n_kv_head": None,
    }
    path = save(contents, tmp_path)
    note = (
        "nanoGPT's own model, though config has settings that nanoGPT's train.py does not have: norm_type='rmsnorm', "
        "use_rope=True; if they change the model, its numbers will differ"
    )
    assert note in read_checkpoint(path).assumptions
    assert note in inspect_path(path).assumptions
    assert f"assumed: {note}" in convert_to_folder(path, tmp_path / "folder").notes
    assert f"left: assumed: {note}" in verify_models(path, tmp_path / "folder").notes


CKPT_FILES = [*sorted(FIXTURES_DIR.rglob("*.pt")), CKPT_PATH]


@pytest.mark.parametrize("path", CKPT_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_settings_of_every_age_of_nanogpt_give_no_note(path):
    checkpoint = read_checkpoint(path, n_head=4 if "mingpt" in str(path) else None, with_optimizer=False)
    assert not any("settings" in text for text in checkpoint.assumptions)


def test_settings_of_train_give_no_note(contents, tmp_path):
    contents["config"] = TRAIN_DEFAULTS
    assert not any("settings" in text for text in read_checkpoint(save(contents, tmp_path)).assumptions)


# Numbers.


@pytest.mark.parametrize("make", [np.float64, np.float32, lambda value: torch.tensor(value)])
def test_best_val_loss_of_every_kind_of_number_is_read(contents, tmp_path, make):
    state = read_checkpoint(save({**contents, "best_val_loss": make(1.5), "iter_num": np.int64(9)}, tmp_path))
    assert (state.training_state.best_val_loss, state.training_state.iter_num) == (1.5, 9)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32])
def test_weights_of_8_bits_are_refused_in_one_line(contents, tmp_path, dtype):
    contents["model"] = {name: tensor.to(dtype) for name, tensor in contents["model"].items()}
    with pytest.raises(CheckpointError, match=r"one floating dtype \(float32, .*\), got 'torch\.\w+'"):
        read_checkpoint(save(contents, tmp_path))


# Other files.


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
            "torch before 1.6; save",
        ),
        (save_file, "a .safetensors file; give the folder"),
        (lambda _, path: path.write_bytes(b"GGUF\x03\0\0\0"), "a GGUF file of llama.cpp; give the"),
        (
            lambda tensors, path: torch.save({"state_dict": tensors, "pytorch-lightning_version": "2.5"}, path),
            "a checkpoint of Lightning: save its 'state_dict' alone",
        ),
        (lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path), "save its 'state_dict' alone"),
    ],
    ids=["old torch", "safetensors", "gguf", "lightning", "another trainer"],
)
def test_file_of_another_program_is_refused_with_what_to_do(tmp_path, write, message):
    path = tmp_path / "ckpt.pt"
    write({"transformer.wte.weight": torch.ones(4, 4)}, path)
    with pytest.raises(CheckpointError, match=message):
        NanoGPTLMHeadModel.from_nanogpt_ckpt(path)


@pytest.mark.parametrize("load", [read_checkpoint, lambda path: convert_to_folder(path, path.parent / "out")])
def test_folder_of_torch_distributed_is_refused_with_what_to_do(tmp_path, load):
    folder = tmp_path / "dcp"
    folder.mkdir()
    for name in (".metadata", "__0_0.distcp"):  # what torch.distributed.checkpoint.save writes
        (folder / name).write_bytes(b"...")
    with pytest.raises(CheckpointError, match="dcp_to_torch_save"):
        load(folder)


@pytest.mark.parametrize("model_class", [NanoGPTLMHeadModel, NanoGPTForSequenceClassification])
@pytest.mark.parametrize("name", ["ckpt.pt", ".", "missing.pt"])
def test_from_pretrained_of_a_checkpoint_names_what_loads_it(contents, tmp_path, model_class, name):
    save(contents, tmp_path)
    with pytest.raises(
        ValueError, match=rf"load it with {model_class.__name__}\.from_nanogpt_ckpt, or .*nano-gpt convert"
    ):
        model_class.from_pretrained(tmp_path / name)


def test_back_of_a_checkpoint_names_what_loads_it(contents, tmp_path):
    path = save(contents, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"got a checkpoint; load it with NanoGPTLMHeadModel\.from_nanogpt_ckpt, or .*convert"
    ):
        convert_to_checkpoint(path, tmp_path / "back.pt")


# from_nanogpt_ckpt's own arguments, and config.json.


@pytest.mark.parametrize("name", ["config", "state_dict"])
def test_what_is_the_checkpoints_own_cannot_be_given(contents, tmp_path, name):
    with pytest.raises(ConversionError, match=f"'{name}' cannot be set: expected the checkpoint's own.*dropout"):
        NanoGPTLMHeadModel.from_nanogpt_ckpt(save(contents, tmp_path), **{name: NanoGPTConfig()})


@pytest.mark.parametrize("wanted", [True, False])
def test_loading_info_is_returned_when_asked_for(contents, tmp_path, wanted):
    found = NanoGPTLMHeadModel.from_nanogpt_ckpt(save(contents, tmp_path), output_loading_info=wanted)
    model, info = found if wanted else (found, {})
    assert model.nanogpt_training_state.iter_num == 7
    assert not any(info.values())


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["float33", "nn", "save"])
def test_dtype_that_torch_does_not_have_is_refused_in_one_line(contents, tmp_path, key, value):
    convert_to_folder(save(contents, tmp_path), tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float32"', f'"{key}": "{value}"'))
    for load in (
        NanoGPTLMHeadModel.from_pretrained,
        inspect_path,
        lambda path: convert_to_folder(path, tmp_path / "b"),
    ):
        with pytest.raises(ValueError, match=f"dtype: expected one that this torch has, .*got '{value}'"):
            load(tmp_path / "out")
