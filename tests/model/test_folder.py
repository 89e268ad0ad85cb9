"""Complete conversions: every fixture there and back, what is overwritten, what is left behind; and inspect_path."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hugging_nano_gpt import (
    CharacterTable,
    CheckpointError,
    ConversionError,
    NanoGPTLMHeadModel,
    TokenizerError,
    convert_to_checkpoint,
    convert_to_folder,
    inspect_path,
    read_checkpoint,
    write_checkpoint,
    write_meta,
)
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

from ..helpers.comparison import assert_same
from ..helpers.folders import read_files
from ..helpers.limits import limit_file_size
from ..helpers.programs import run_command
from ..helpers.tiny import FIXTURES_DIR, make_model

FIXTURES = sorted(
    str(path.relative_to(FIXTURES_DIR)) for pattern in ("*/*.pt", "llmc/*.bin") for path in FIXTURES_DIR.glob(pattern)
)
N_HEAD = {"mingpt/model.pt": 4}  # the file does not record it


@pytest.mark.parametrize("name", FIXTURES)
def test_every_fixture_comes_back_with_the_same_bits(name, tmp_path):
    path = FIXTURES_DIR / name
    before = read_checkpoint(path, with_optimizer=False, n_head=N_HEAD.get(name))
    convert_to_folder(path, tmp_path / "folder", n_head=N_HEAD.get(name))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder"]
    if not before.tie_word_embeddings:
        tensors = load_file(tmp_path / "folder" / "model.safetensors")
        assert_same({n: tensors[n] for n in sorted(tensors)}, {n: before.state_dict[n] for n in sorted(tensors)})
        assert tensors.keys() == before.state_dict.keys()
        with pytest.raises(ConversionError, match="as they are tied and one is lost"):
            convert_to_checkpoint(tmp_path / "folder", tmp_path / "ckpt.pt")
        assert not (tmp_path / "ckpt.pt").exists()
        return
    convert_to_checkpoint(tmp_path / "folder", tmp_path / "ckpt.pt")
    after = read_checkpoint(tmp_path / "ckpt.pt", with_optimizer=False)
    assert_same(dict(after.state_dict), dict(before.state_dict))
    assert after.model_args == before.model_args
    assert after.training_state == before.training_state


def test_fixtures_are_all_there():
    assert len(FIXTURES) >= 15


def test_folder_has_the_tokenizer_and_says_what_was_assumed(tmp_path):
    conversion = convert_to_folder(CKPT_PATH, tmp_path / "folder", meta_path=META_PATH)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer.decode(tokenizer("O!\n\nHo").input_ids) == "O!\n\nHo"
    assert str(conversion).splitlines() == [
        f"Wrote {tmp_path / 'folder'}: 350,976 parameters, float32, and a tokenizer of 65 tokens",
        "  assumed: exact GELU, as nanoGPT computes since 2023-06-14: the file does not record it",
    ]
    assert inspect_path(tmp_path / "folder").has_tokenizer


def test_folder_without_a_tokenizer_says_why(tmp_path):
    conversion = convert_to_folder(CKPT_PATH, tmp_path / "folder")
    assert conversion.tokenizer is None
    assert "and no tokenizer" in str(conversion)
    assert "no tokenizer found: expected a meta.pkl of 65 characters" in conversion.notes[-1]


def test_dtype_and_shards_are_as_requested(tmp_path):
    convert_to_folder(CKPT_PATH, tmp_path / "folder", dtype="float16", max_shard_size="300KB")
    assert inspect_path(tmp_path / "folder").dtypes == ("float16",)
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 2
    convert_to_folder(CKPT_PATH, tmp_path / "folder", overwrite=True)
    assert [path.name for path in (tmp_path / "folder").glob("*.safetensors*")] == ["model.safetensors"]
    model = NanoGPTLMHeadModel.from_pretrained(tmp_path / "folder")
    assert model.dtype == torch.float32


def test_files_of_a_folder_can_be_read_as_others_can(tmp_path):
    convert_to_folder(CKPT_PATH, tmp_path / "folder")
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "folder").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_folder_with_files_is_refused_and_with_overwrite_keeps_what_is_the_users(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine too")
    before = read_files(folder)
    with pytest.raises(ConversionError, match=r"is not empty: expected a new .* got 'README.md', 'notes.txt' in it"):
        convert_to_folder(CKPT_PATH, folder)
    assert read_files(folder) == before
    convert_to_folder(CKPT_PATH, folder, overwrite=True)
    after = read_files(folder)
    assert before.items() <= after.items()
    assert "model.safetensors" in after
    with pytest.raises(ConversionError, match="expected a folder, got a file"):
        convert_to_folder(CKPT_PATH, folder / "notes.txt", overwrite=True)


def test_folder_is_written_anew_in_another_place_but_not_in_its_own(tmp_path):
    convert_to_folder(CKPT_PATH, tmp_path / "folder")
    conversion = convert_to_folder(tmp_path / "folder", tmp_path / "other", meta_path=META_PATH)
    assert len(conversion.tokenizer) == 65
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("folder", "other")]
    assert_same(*tensors)
    before = read_files(tmp_path / "folder")
    with pytest.raises(ConversionError, match="is the source: expected another place"):
        convert_to_folder(tmp_path / "folder", tmp_path / "folder", overwrite=True)
    assert read_files(tmp_path / "folder") == before


def test_failed_conversion_leaves_nothing_behind(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        convert_to_folder(tmp_path / "missing.pt", tmp_path / "folder")
    write_meta(CharacterTable(tuple(map(chr, range(70)))), tmp_path / "meta.pkl")
    with pytest.raises(TokenizerError, match=r"expected at most 65 tokens, as the model has rows, got 70"):
        convert_to_folder(CKPT_PATH, tmp_path / "folder", meta_path=tmp_path / "meta.pkl")
    with limit_file_size(100_000), pytest.raises(ConversionError, match="cannot be written"):
        convert_to_folder(CKPT_PATH, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.pkl"]


def test_failed_overwriting_leaves_what_was_there(tmp_path):
    convert_to_folder(CKPT_PATH, tmp_path / "folder")
    before = read_files(tmp_path / "folder")
    with limit_file_size(100_000), pytest.raises(ConversionError, match="cannot be written"):
        convert_to_folder(FIXTURES_DIR / "nanogpt-head-nobias" / "ckpt.pt", tmp_path / "folder", overwrite=True)
    assert read_files(tmp_path / "folder") == before


def test_checkpoint_is_not_overwritten_by_default(tmp_path):
    make_model().save_pretrained(tmp_path / "folder")
    (tmp_path / "ckpt.pt").write_text("mine")
    with pytest.raises(ConversionError, match="is there already"):
        convert_to_checkpoint(tmp_path / "folder", tmp_path / "ckpt.pt")
    assert (tmp_path / "ckpt.pt").read_text() == "mine"
    convert_to_checkpoint(tmp_path / "folder", tmp_path / "ckpt.pt", overwrite=True)
    assert read_checkpoint(tmp_path / "ckpt.pt").model_args["n_layer"] == 2


@pytest.mark.parametrize("way", ["to_nanogpt_ckpt", "write_checkpoint"])
def test_writers_of_checkpoints_refuse_a_file_or_warn_that_they_will(way, tmp_path):
    path, to_file = tmp_path / "ckpt.pt", functools.partial(write_checkpoint, read_checkpoint(CKPT_PATH))
    write = to_file if way == "write_checkpoint" else make_model().to_nanogpt_ckpt
    write(path)  # nothing is there, so nothing is said
    path.write_text("mine")
    with pytest.raises(ConversionError, match=r"ckpt\.pt: is there already: .*overwrite=True"):
        write(path, overwrite=False)
    assert path.read_text() == "mine"
    with pytest.warns(FutureWarning, match=r"ckpt\.pt: is there already .* release will refuse; pass overwrite"):
        write(path)
    assert read_checkpoint(path).training_state.optimizer is not None
    path.write_text("mine")
    write(path, overwrite=True)  # a warning would be an error
    assert read_checkpoint(path).training_state.optimizer is not None


def test_back_takes_a_name_without_a_suffix_for_a_folder(tmp_path):
    make_model().save_pretrained(tmp_path / "saved")
    (tmp_path / "there.v2").mkdir()
    (tmp_path / "note").write_text("mine")
    for name, file in (("new", "new/ckpt.pt"), ("new.pt", "new.pt"), ("there.v2", "there.v2/ckpt.pt")):
        result = run_command("back", "saved", name, cwd=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(f"Wrote {file}: ")
        assert read_checkpoint(tmp_path / file).model_args["n_layer"] == 2
        assert run_command("back", "saved", name, cwd=tmp_path).returncode == 1
        assert run_command("back", "saved", name, "--force", cwd=tmp_path).returncode == 0
    with pytest.raises(ConversionError, match=r"note: expected a folder, got a file; give another path"):
        convert_to_checkpoint(tmp_path / "saved", tmp_path / "note", overwrite=True)
    assert (tmp_path / "note").read_text() == "mine"


def test_inspection_of_file_and_folder_agree(tmp_path):
    path = FIXTURES_DIR / "trace" / "ckpt_200.pt"
    convert_to_folder(path, tmp_path / "folder")
    file, folder = inspect_path(path), inspect_path(tmp_path / "folder")
    facts, others = file.to_json(), folder.to_json()
    differing = {"path", "kind", "size_bytes", "era", "has_optimizer", "assumptions"}
    assert {name for name in facts if facts[name] != others[name]} == differing
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(path)
    assert facts["n_params_total"] == model.num_parameters()
    assert facts["n_params"] == model.num_parameters() - model.transformer.wpe.weight.numel()
    assert (file.kind, file.era, file.has_optimizer) == ("nanoGPT checkpoint", "since 2023-05-06", True)
    assert (folder.kind, folder.era, folder.has_optimizer) == ("folder of Transformers", "", False)
    assert file.size_bytes == path.stat().st_size
    assert json.loads(json.dumps(facts))["config"] == file.training_state.config
    for row in ("iteration        200", "layers           2", "optimizer state  yes", "dtype            float32"):
        assert row in str(file).splitlines()


@pytest.mark.parametrize(
    ("name", "era", "activation_function"),
    [
        ("nanogpt-2022-12-28-fe804286", "before 2023-01-27", "gelu_new"),
        ("nanogpt-2023-02-05-ab0718a7", "before 2023-05-06", "gelu_new"),
        ("nanogpt-head-compiled", "since 2023-05-06", "gelu"),
    ],
)
def test_inspection_names_the_era(name, era, activation_function):
    found = inspect_path(FIXTURES_DIR / name / "ckpt.pt")
    assert (found.era, found.model_config.activation_function) == (era, activation_function)
    assert any("GELU" in assumption for assumption in found.assumptions)


def test_inspection_refuses_other_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"a folder with config\.json, got a folder without; give"):
        inspect_path(tmp_path)
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="cannot be read"):
        inspect_path(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected tensors in \*\.safetensors"):
        inspect_path(tmp_path)
    shutil.copy(FIXTURES_DIR.parent.parent / "pyproject.toml", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .* is not a valid JSON file"):
        inspect_path(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        CheckpointError, match=r"expected model_type 'hugging_nano_gpt' in its config\.json, got 'gpt2'"
    ):
        inspect_path(tmp_path)
