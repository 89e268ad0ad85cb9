"""A model folder that is written again and killed at any moment: the old model, the new one, or a refusal.

A kill leaves the files of that moment, so one write is enough to see all states that kills can leave: they are
recorded before each call that changes a folder. The two models differ in n_head, not in shapes: a mix would load.
"""

import contextlib
import os
import random
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    modeling_utils,
)
from transformers.utils import hub, logging

from hugging_nano_gpt import (
    CharacterTable,
    CheckpointError,
    ConversionError,
    NanoGPTLMHeadModel,
    convert_to_checkpoint,
    convert_to_folder,
    inspect_path,
    write_meta,
)
from hugging_nano_gpt.convert.source import load_source
from hugging_nano_gpt.export import onnx
from hugging_nano_gpt.export.exporting import export_model
from hugging_nano_gpt.files.files import open_folder
from hugging_nano_gpt.model import folder_nano_gpt
from hugging_nano_gpt.model.folder_nano_gpt import replace_model

from ..helpers.children import KILL_SEED, forks, start_child
from ..helpers.limits import limit_file_size, limit_time
from ..helpers.tiny import make_batch, make_model

OLD, NEW = 0, 1
OPENING = ("model.safetensors", "model.safetensors.index.json", "model.onnx")  # nothing loads without one of them
IDX = make_batch(1, 16)[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two checkpoints, each with the meta.pkl of its characters next to it."""
    paths = []
    for seed, n_head in ((OLD, 4), (NEW, 2)):
        folder = tmp_path_factory.mktemp("source")
        make_model(seed, n_head=n_head).to_nanogpt_ckpt(folder / "ckpt.pt", overwrite=True)
        write_meta(CharacterTable(tuple(map(chr, range(60 + seed, 125 + seed)))), folder / "meta.pkl")
        paths.append(folder / "ckpt.pt")
    return paths


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """Flushing is slow, and does not matter without a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def load_folder(source):
    return load_source(source).model


def load(source):
    return NanoGPTLMHeadModel.from_nanogpt_ckpt(source)


def convert(source, folder):
    convert_to_folder(source, folder, meta_path=source.with_name("meta.pkl"), overwrite=True)


def convert_in_shards(source, folder):
    meta_path = source.with_name("meta.pkl")
    convert_to_folder(source, folder, meta_path=meta_path, max_shard_size="50KB", overwrite=True)


def export_gpt2(source, folder):
    export_model(source, folder, to="gpt2", meta_path=source.with_name("meta.pkl"), overwrite=True)


def export_onnx(source, folder):
    """Writes any bytes instead of the graph, which takes seconds to make, and the weights in a separate file."""

    def write_graph(graph, temporary):
        for name in ("model.onnx", "model.onnx_data"):
            (temporary / name).write_bytes(source.read_bytes()[:5000])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_make_graph", lambda plain: None)
        patch.setattr(onnx, "_write", write_graph)
        export_model(source, folder, to="onnx", meta_path=source.with_name("meta.pkl"), overwrite=True)


def save(source, folder):
    load(source).save_pretrained(folder)


def save_in_shards(source, folder):
    load(source).save_pretrained(folder, max_shard_size="50KB")


WRITERS = [
    (convert, convert),
    (convert_in_shards, convert),
    (convert, convert_in_shards),
    (export_gpt2, export_gpt2),
    (export_onnx, export_onnx),
    (export_gpt2, export_onnx),
    (save, save),
    (save_in_shards, save),
    (save, save_in_shards),
]


def record_states(folder, write):
    """Calls a writer; returns the contents of the folder before each call that changes a folder, and at the end."""
    states = []

    def watch(function):
        def call(*args, **kwargs):
            state = read_tree(folder)
            if not states or state != states[-1]:
                states.append(state)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
            patch.setattr(os, name, watch(getattr(os, name)))
        write()
    return [*states, read_tree(folder)]


def read_tree(folder):
    """Reads a folder: names to bytes, of folders to None."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def restore(state, folder):
    folder.mkdir(parents=True)
    for name, contents in state.items():
        if contents is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(contents)
    return folder


def take_own(state):
    """Removes the temporary folders of writers."""
    return {name: contents for name, contents in state.items() if not name.startswith(".writing-")}


@torch.no_grad()
def get_outcome(loader, folder):
    try:
        return loader(folder)(IDX).logits
    except (OSError, ValueError, RuntimeError) as error:
        return error


@pytest.mark.parametrize(("write_old", "write_new"), WRITERS, ids=lambda writer: writer.__name__)
def test_folder_written_again_and_killed_anywhere_has_the_old_model_the_new_one_or_none(
    sources, tmp_path, write_old, write_new
):
    folder = tmp_path / "folder"
    write_old(sources[OLD], folder)
    (folder / "optimizer.pt").write_text("mine")
    states = record_states(folder, lambda: write_new(sources[NEW], folder))
    old, new = states[0], states[-1]
    assert len(states) > 20
    assert old["optimizer.pt"] == new["optimizer.pt"]
    assert take_own(new) == new
    between = [state for state in states if not any(name in state for name in OPENING)]
    for state in states:
        own = take_own(state)
        assert own in (old, new) or state in between, sorted(own)
        names = {name for name in own if "safetensors" in name or "onnx" in name or name == "config.json"}
        assert any(all(own[name] == whole.get(name) for name in names) for whole in (old, new)), sorted(own)
    assert 5 < len(between) < len(states)

    for number, state in enumerate(states):  # each can be written again, and then nothing of the killed writer is left
        place = restore(state, tmp_path / str(number))
        with open_folder(place, overwrite=True) as temporary:
            for name in take_own(new).keys() - {"optimizer.pt", "README.md"}:
                (temporary / name).write_bytes(new[name])
        assert {**read_tree(place), "README.md": b""} == {**new, "README.md": b""}
        shutil.rmtree(place)


@pytest.mark.parametrize(
    ("write", "loaders"),
    [
        (convert, [NanoGPTLMHeadModel.from_pretrained, AutoModelForCausalLM.from_pretrained, load_folder]),
        (save_in_shards, [NanoGPTLMHeadModel.from_pretrained, AutoModelForCausalLM.from_pretrained, load_folder]),
        (export_gpt2, [GPT2LMHeadModel.from_pretrained, AutoModelForCausalLM.from_pretrained, load_folder]),
    ],
)
def test_loaders_give_the_old_logits_the_new_ones_or_an_error(sources, tmp_path, write, loaders):
    """Loads one folder for each set of file names, because loaders depend only on these."""
    folder = tmp_path / "folder"
    write(sources[OLD], folder)
    states = record_states(folder, lambda: write(sources[NEW], folder))
    whole = (states[0], states[-1])
    expected = [get_outcome(loaders[0], restore(state, tmp_path / f"whole-{i}")) for i, state in enumerate(whole)]
    assert not torch.equal(*expected)
    n_refused = 0
    distinct = {frozenset(take_own(state).items()): state for state in states}
    for number, state in enumerate(list(distinct.values())[:: 1 if write is export_gpt2 else 3]):
        place = restore(state, tmp_path / str(number))
        for loader in loaders:
            outcome = get_outcome(loader, place)
            if isinstance(outcome, Exception):
                n_refused += 1
                if loader in (NanoGPTLMHeadModel.from_pretrained, load_folder):
                    assert str(place) in str(outcome)
                    assert "a write of this folder is under way or was interrupted" in str(outcome)
            else:
                assert any(torch.equal(outcome, logits) for logits in expected)
    assert n_refused > 10


def test_mix_of_two_models_would_load(sources, tmp_path):
    """Shows that the tests can fail: the shapes are the same."""
    for name, source in zip(("old", "new"), sources, strict=True):
        convert(source, tmp_path / name)
    shutil.copy(tmp_path / "old" / "config.json", tmp_path / "new")
    mixed = get_outcome(NanoGPTLMHeadModel.from_pretrained, tmp_path / "new")
    assert not any(torch.equal(mixed, load(source)(IDX).logits) for source in sources)


def test_weights_without_config_would_load_in_transformers_and_are_refused_by_ours(tmp_path):
    """Why weights move out first and in last: Transformers would load them with its default configuration."""
    GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=768, n_head=6, vocab_size=50257)).half().save_pretrained(
        tmp_path / "a"
    )
    (tmp_path / "a" / "config.json").unlink()
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "a").config.n_head == 12
    make_model().save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(
        OSError, match=r"b: expected a folder that save_pretrained wrote, got one without config\.json"
    ):
        NanoGPTLMHeadModel.from_pretrained(tmp_path / "b")


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize(
    ("write", "name"), [(save, "auto"), (save, "ours"), (save, "command"), (export_gpt2, "command")]
)
def test_reader_never_gets_the_old_config_with_the_new_weights(sources, tmp_path, monkeypatch, write, call, name):
    """The other model is written as soon as config.json has been read, the first time, the second or the third."""
    loaders = {"auto": AutoModelForCausalLM.from_pretrained, "ours": NanoGPTLMHeadModel.from_pretrained}
    folder = tmp_path / "folder"
    write(sources[OLD], folder)
    get_config_dict, calls = PreTrainedConfig.get_config_dict.__func__, []

    def read_then_write(cls, *args, **kwargs):
        read = get_config_dict(cls, *args, **kwargs)
        calls.append(None)
        if len(calls) == call:
            write(sources[NEW], folder)
        return read

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", classmethod(read_then_write))
    outcome = get_outcome(loaders.get(name, load_folder), folder)
    monkeypatch.undo()
    if isinstance(outcome, Exception):
        assert f"{folder}: another model was written into it while it was read; load it again" in str(outcome)
    else:
        assert name == "command" or call > 1, "not a call of every loader"
        assert any(torch.equal(outcome, load(source)(IDX).logits) for source in sources)
    assert not list(folder.glob(".writing-*"))
    assert get_outcome(load_folder, folder).shape == (1, 16, 65)


def test_config_that_autoconfig_read_is_used_for_its_folder_and_others(tmp_path):
    for n_layer in (1, 2):
        make_model(n_layer=n_layer).save_pretrained(tmp_path / str(n_layer))
    config = AutoConfig.from_pretrained(tmp_path / "1")
    config.dropout = 0.25
    assert "_as_read" not in config.to_dict()
    assert NanoGPTLMHeadModel.from_pretrained(tmp_path / "1", config=config).config.dropout == 0.25
    model = NanoGPTLMHeadModel.from_pretrained(tmp_path / "2", config=AutoConfig.from_pretrained(tmp_path / "2"))
    assert model.config == NanoGPTLMHeadModel.from_pretrained(tmp_path / "2").config
    make_model(n_layer=2, dropout=0.5).save_pretrained(tmp_path / "1")
    assert NanoGPTLMHeadModel.from_pretrained(tmp_path / "1", config=model.config).config.dropout == 0


# the files of a killed writer, and who removes them


def write_model(folder, text):
    with open_folder(folder, overwrite=True) as temporary:
        for name in ("config.json", "model.safetensors"):
            (temporary / name).write_text(text)


@forks
def test_files_of_a_killed_writer_are_removed_and_those_of_a_live_one_are_not(tmp_path):
    folder = tmp_path / "folder"
    write_model(folder, "old")

    def write_forever(ready):
        with replace_model(folder) as temporary:
            (temporary / "config.json").write_text("half")
            ready()
            time.sleep(60)

    with limit_time(20):
        with start_child(write_forever):
            (temporary,) = folder.glob(".writing-*")
            write_model(folder, "new")
            assert (temporary / "new" / "config.json").read_text() == "half"
        write_model(folder, "newer")
    assert read_tree(folder) == {"config.json": b"newer", "model.safetensors": b"newer"}


def test_live_writers_do_not_remove_each_others_files(tmp_path):
    write_model(tmp_path, "old")
    with open_folder(tmp_path, overwrite=True) as temporary:
        (temporary / "config.json").write_text("last")
        write_model(tmp_path, "first")
        (temporary / "model.safetensors").write_text("last")
    assert read_tree(tmp_path) == {"config.json": b"last", "model.safetensors": b"last"}


@forks
def test_process_forked_during_a_write_keeps_no_later_writer_waiting(tmp_path):
    """A forked process, such as a worker of a DataLoader, has the lock open until it ends."""
    with contextlib.ExitStack() as stack:
        with folder_nano_gpt._lock_folder(tmp_path):
            stack.enter_context(start_child(lambda ready: (ready(), time.sleep(60))))
        with limit_time(10):
            write_model(tmp_path, "new")


@forks
def test_save_pretrained_killed_at_random_moments_leaves_the_old_or_the_new_or_a_refusal(sources, tmp_path):
    folder, rng, parent = tmp_path / "folder", random.Random(KILL_SEED), os.getpid()
    models = [load(source) for source in sources]
    expected = [model(IDX).logits for model in models]
    models[OLD].save_pretrained(folder)

    def save_in_turn(ready):
        logging.disable_progress_bar()  # this process shares its lock, which a killed process would never release
        ready()
        while os.getppid() == parent:
            for model in models:
                model.save_pretrained(folder)

    with limit_time(60):
        for _ in range(8):
            with start_child(save_in_turn):
                time.sleep(rng.uniform(0, 0.2))
            outcome = get_outcome(NanoGPTLMHeadModel.from_pretrained, folder)
            if isinstance(outcome, Exception):
                assert "was interrupted" in str(outcome), f"KILL_SEED={KILL_SEED}"
            else:
                assert any(torch.equal(outcome, logits) for logits in expected), f"KILL_SEED={KILL_SEED}"
    models[NEW].save_pretrained(folder)
    assert torch.equal(get_outcome(NanoGPTLMHeadModel.from_pretrained, folder), expected[NEW])
    assert not list(folder.glob(".writing-*"))


def test_folder_is_flushed_before_the_weights_go_back_and_after(tmp_path, monkeypatch):
    """So that a power cut leaves the same states as a kill."""
    write_model(tmp_path, "old")
    (tmp_path / "notes.txt").write_text("mine")
    calls, rename = [], Path.rename

    def record_rename(path, goal):
        calls.append(("out" if goal.parent.name == "old" else "in", path.name))
        return rename(path, goal)

    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(folder_nano_gpt, "sync_folder", lambda path: path == tmp_path and calls.append("sync"))
    write_model(tmp_path, "new")
    assert calls == [
        ("out", "model.safetensors"),
        "sync",
        ("out", "config.json"),
        ("in", "config.json"),
        "sync",
        ("in", "model.safetensors"),
        "sync",
    ]


def test_interrupted_folder_is_explained_by_the_commands_and_where_its_files_are(tmp_path):
    make_model(0).save_pretrained(tmp_path / "a")
    states = record_states(tmp_path / "a", lambda: make_model(1).save_pretrained(tmp_path / "a"))
    state = next(state for state in states if "config.json" not in state)
    folder = restore(state, tmp_path / "b")
    (temporary,) = folder.glob(".writing-*")
    message = re.escape(
        f"{folder}: a write of this folder is under way or was interrupted: expected a whole model, got "
        f"{temporary.name} and no weights; the files of the model before are in {temporary / 'old'}; if no program "
        f"writes it now, save the model again"
    )
    for use in (inspect_path, load_folder, lambda path: convert_to_checkpoint(path, tmp_path / "ckpt.pt")):
        with pytest.raises(CheckpointError, match=message):
            use(folder)
    with pytest.raises(OSError, match=message):
        NanoGPTLMHeadModel.from_pretrained(folder)
    with pytest.raises(ConversionError, match="is not empty"):
        convert_to_folder(tmp_path / "a", folder)
    convert_to_folder(tmp_path / "a", folder, overwrite=True)
    assert torch.equal(*(get_outcome(load_folder, path) for path in (folder, tmp_path / "a")))


# arguments of save_pretrained, for a folder that contains a model already


def test_saving_again_keeps_what_is_not_the_models_and_removes_what_would_mislead(tmp_path):
    make_model(0).save_pretrained(tmp_path, max_shard_size="50KB")
    mine = (
        "README.md",
        "optimizer.pt",
        "tokenizer.json",
        "model.onnx",
        "model.fp16.safetensors",
        "mine/model.safetensors",
    )
    (tmp_path / "mine").mkdir()
    for name in (*mine, "pytorch_model.bin"):
        (tmp_path / name).write_text("mine")
    model = make_model(1)
    model.save_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    weights = sorted(
        path.name for path in tmp_path.glob("*model*") if "safetensors" in path.name or "bin" in path.name
    )
    assert weights == ["model.fp16.safetensors", "model.safetensors"]
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "model.fp16.safetensors").exists()
    assert torch.equal(NanoGPTLMHeadModel.from_pretrained(tmp_path, variant="fp16")(IDX).logits, model(IDX).logits)
    assert torch.equal(NanoGPTLMHeadModel.from_pretrained(tmp_path)(IDX).logits, model(IDX).logits)


def test_saving_again_writes_the_state_dict_that_is_given(tmp_path):
    first, second = make_model(0), make_model(1)
    first.save_pretrained(tmp_path)
    first.save_pretrained(tmp_path, state_dict=second.state_dict())
    assert torch.equal(NanoGPTLMHeadModel.from_pretrained(tmp_path)(IDX).logits, second(IDX).logits)


def test_saving_again_that_fails_leaves_the_old_model(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    before = read_tree(tmp_path)
    with limit_file_size(50_000), pytest.raises(Exception, match="File too large"):
        make_model(1).save_pretrained(tmp_path)
    assert read_tree(tmp_path) == before


def test_saving_again_with_an_upload_uploads_the_new_files_and_survives_its_failure(tmp_path, monkeypatch):
    folder, uploads = tmp_path / "name", []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **kwargs):
            uploads.append((repo_id, sorted(operation.path_in_repo for operation in operations)))
            raise ConnectionError("the network is gone")

    make_model(0).save_pretrained(folder)
    (folder / "optimizer.pt").write_text("mine")
    monkeypatch.setattr(modeling_utils, "hf_api", Hub)
    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *_, **__: ModelCard("---\n---\n"))
    model = make_model(1)
    with pytest.raises(ConnectionError, match="the network is gone"):
        model.save_pretrained(folder, push_to_hub=True)
    assert uploads == [("name", sorted(name for name in read_tree(folder) if name != "optimizer.pt"))]
    assert torch.equal(NanoGPTLMHeadModel.from_pretrained(folder)(IDX).logits, model(IDX).logits)
    assert not list(folder.glob(".writing-*"))


def test_trainer_saves_again_into_its_folder(sources, tmp_path):
    for source in sources:
        model = load(source)
        trainer = Trainer(model, TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[]))
        trainer.save_model(str(tmp_path / "saved"))
        assert torch.equal(NanoGPTLMHeadModel.from_pretrained(tmp_path / "saved")(IDX).logits, model(IDX).logits)
    assert not list((tmp_path / "saved").glob(".writing-*"))
