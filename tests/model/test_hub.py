"""Saved folders: complete, and equal bit for bit where this package is not installed."""

import ast
import builtins
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.dynamic_module_utils import get_relative_imports

from hugging_nano_gpt import (
    NanoGPTConfig,
    NanoGPTLMHeadModel,
    TrainingState,
    convert,
    convert_to_folder,
    read_checkpoint,
    write_checkpoint,
)
from hugging_nano_gpt.convert import nanogpt as conversion
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.model import persistence_nano_gpt

from ..helpers.comparison import assert_same
from ..helpers.folders import CODE_FILES, DOCS_DIR, FILES, MODEL_DIR, ROOT, list_files
from ..helpers.tiny import (
    CLASSES,
    FIXTURES_DIR,
    MODEL_ARGS,
    make_batch,
    make_classifier,
    make_model,
    make_tokenizer,
    make_untied,
)

PROMPT = "ROMEO:"  # of tests/helpers/remote_worker.py too
# A Python with only torch and transformers, from tests/fresh_venv.sh, for what happens without the package.
FRESH_PYTHON = os.environ.get("FRESH_PYTHON")
# A folder that save_pretrained of commit 5e83a34 wrote, and in golden.safetensors what that model computed.
EARLIER_DIR = FIXTURES_DIR / "folder-5e83a34"
SAVING_MD = DOCS_DIR / "saving.md"


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """Runs tests/helpers/remote_worker.py once on folders saved here; returns what it found and what to expect."""
    folder = tmp_path_factory.mktemp("remote")
    idx, _ = make_batch(2, MODEL_ARGS["block_size"])
    saved = {
        "lm": NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH),
        "base": make_model().transformer,
        "classifier": make_classifier(),
        "untied": make_untied(),
    }
    for name, model in saved.items():
        model.save_pretrained(folder / name)
    saved["lm"].save_pretrained(folder / "sharded", max_shard_size="200KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 1
    make_tokenizer().save_pretrained(folder / "lm")
    save_file({"idx": idx.contiguous()}, folder / "idx.safetensors")
    shutil.copytree(EARLIER_DIR / "model", folder / "earlier")
    shutil.copy(EARLIER_DIR / "golden.safetensors", folder)

    worker = [Path(__file__).parents[1] / "helpers" / "remote_worker.py", folder, str(torch.get_num_threads())]
    with start_python(folder, *worker) as process:
        errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    return SimpleNamespace(
        folder=folder,
        idx=idx,
        models=saved,
        outputs=load_file(folder / "outputs.safetensors"),
        facts=json.loads((folder / "facts.json").read_text()),
    )


def start_python(folder, *arguments):
    """Starts an isolated Python with its own caches."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [FRESH_PYTHON or sys.executable, "-I", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@torch.no_grad()
def test_remote_code_gives_the_same_bits(remote):
    assert remote.facts["module"].startswith("transformers_modules.")
    lm, outputs, idx = remote.models["lm"], remote.outputs, remote.idx
    assert torch.equal(outputs["lm"], lm(idx).logits)
    assert torch.equal(outputs["sharded"], lm(idx).logits)
    assert torch.equal(outputs["lm_hidden"], lm.transformer(idx).last_hidden_state)
    assert torch.equal(outputs["from_lm"], lm.transformer(idx).last_hidden_state)
    assert torch.equal(outputs["base"], remote.models["base"](idx).last_hidden_state)
    assert torch.equal(outputs["classifier"], remote.models["classifier"](idx).logits)
    assert torch.equal(outputs["untied"], remote.models["untied"](idx).logits)
    assert not torch.equal(outputs["untied"], outputs["lm"])  # the comparison can fail


@torch.no_grad()
def test_folder_of_an_earlier_version_gives_the_same_bits(remote, tmp_path):
    """By its own code as remote code, by the package, as a checkpoint, and saved again."""
    if FRESH_PYTHON and "earlier" not in remote.outputs:
        pytest.skip("its code needs Transformers 5.14")
    golden = load_file(EARLIER_DIR / "golden.safetensors")
    # not bit for bit, because another CPU may have computed the golden logits
    torch.testing.assert_close(remote.outputs["earlier"], golden["logits"], rtol=0, atol=1e-5)
    assert torch.equal(remote.outputs["earlier_tokens"], golden["tokens"])
    model = NanoGPTLMHeadModel.from_pretrained(EARLIER_DIR / "model")
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    model.save_pretrained(tmp_path / "again")
    again = [
        NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt"),
        NanoGPTLMHeadModel.from_pretrained(tmp_path / "again"),
    ]
    for each in (model, *again):
        assert type(each) is NanoGPTLMHeadModel
        assert_same(each.state_dict(), model.state_dict())
        assert each.nanogpt_training_state == TrainingState(7, 2.5, {"learning_rate": 1e-3})
        assert torch.equal(each(golden["idx"]).logits, remote.outputs["earlier"])
        tokens = each.generate(golden["idx"][:, :4], max_new_tokens=28, do_sample=False)
        assert torch.equal(tokens, golden["tokens"])
    weights = load_file(EARLIER_DIR / "model" / "model.safetensors")
    assert_same({name: model.state_dict()[name] for name in weights}, weights)


@pytest.mark.parametrize("way", ["save_pretrained", "convert"])
def test_code_of_an_earlier_version_is_replaced(way, tmp_path):
    folder = shutil.copytree(EARLIER_DIR / "model", tmp_path / "folder")
    (folder / "train_nano_gpt.py").write_text("mine")
    assert (folder / "block_nano_gpt.py").exists()
    if way == "convert":
        convert_to_folder(CKPT_PATH, folder, overwrite=True)
    else:
        NanoGPTLMHeadModel.from_pretrained(folder).save_pretrained(folder)
    assert list_files(folder) == sorted([*FILES, "train_nano_gpt.py"])
    assert all((folder / name).read_bytes() == (MODEL_DIR / name).read_bytes() for name in CODE_FILES)


def test_remote_code_refuses_to_generate_with_caches_it_does_not_know(remote):
    assert re.match(
        r"TypeError: NanoGPTLMHeadModel.forward: the argument 'kv_store' contains", remote.facts["renamed"]
    )
    assert re.match(r"RuntimeError: .*a cache changes the logits: expected", remote.facts["broken"])


def test_remote_code_generates_past_block_size(remote):
    lm, idx = remote.models["lm"], remote.idx
    expected = lm.generate(idx[:1, :4], max_new_tokens=lm.config.block_size + 8, do_sample=False)
    assert torch.equal(remote.outputs["generated"], expected)
    tokenizer = make_tokenizer()
    ids = lm.generate(tokenizer(PROMPT, return_tensors="pt").input_ids, max_new_tokens=8, do_sample=False)
    assert remote.facts["pipeline"] == tokenizer.decode(ids[0])


def test_remote_code_without_the_package_says_so(remote):
    assert "install it from a clone of its repository" in remote.facts["import_error"]
    assert remote.facts["training_state"] == "None"
    assert remote.facts["config"]["nanogpt_training_state"]["iter_num"] == 5000


def test_no_text_advises_to_fetch_the_package_by_its_name(model, tmp_path):
    """It is on no index, so anybody could publish another package there under its name."""
    model.save_pretrained(tmp_path)
    root = ROOT
    texts = [*root.glob("*.md"), *root.glob("*.py"), *tmp_path.iterdir()]
    texts += [
        path for name in ("benchmarks", "docs", "examples", "hugging_nano_gpt") for path in (root / name).rglob("*")
    ]
    found = [
        path
        for path in texts
        if path.suffix in (".md", ".py", ".sh", ".json") and find_advice(path.read_text("utf-8"))
    ]
    assert found == []
    assert find_advice("run: pip install -U 'hugging-nano-gpt[train]'")
    assert "install it from a clone of its repository" in (tmp_path / "README.md").read_text()


def find_advice(text):
    return re.search(r"(pip3?|uv|pipx) +(add|install|run)\b[^\n]*hugging[-_]nano", text)


def test_remote_code_refuses_a_folder_whose_write_was_interrupted(remote):
    assert "interrupted: a write of this folder is under way or was interrupted" in remote.facts["interrupted"]


@torch.no_grad()
def test_remote_code_saved_again_works_again(remote):
    without_card = [name for name in FILES if name != "README.md"]  # only the package writes cards
    assert list_files(remote.folder / "again") == list_files(remote.folder / "third") == without_card
    without_card.remove("generation_config.json")
    assert list_files(remote.folder / "again-base") == without_card
    assert torch.equal(remote.outputs["third"], remote.outputs["lm"])
    assert torch.equal(remote.outputs["again_base"], remote.outputs["lm_hidden"])
    for name in ("again", "again-base", "third", "trained"):
        assert read_json(remote.folder / name / "config.json")["auto_map"] == persistence_nano_gpt.AUTO_MAP
    assert torch.equal(
        NanoGPTLMHeadModel.from_pretrained(remote.folder / "third")(remote.idx).logits, remote.outputs["lm"]
    )


def test_remote_code_trained_and_saved_by_trainer_works_again(remote, tmp_path):
    outputs = remote.outputs
    assert torch.equal(outputs["trained"], outputs["trained_here"])
    assert not torch.equal(outputs["trained"], outputs["lm"])
    evaluated, length = remote.facts["evaluated"], remote.idx.shape[1]
    assert evaluated["eval_shape"] == [8, length, 65]
    model = NanoGPTLMHeadModel.from_pretrained(remote.folder / "trained")
    assert model.nanogpt_training_state == remote.models["lm"].nanogpt_training_state
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert read_checkpoint(tmp_path / "ckpt.pt").training_state.iter_num == 5000


def test_package_imported_after_remote_code_is_used_by_it(remote):
    assert remote.facts["late_module"].startswith("transformers_modules.")
    assert list_files(remote.folder / "late") == sorted([*FILES, "ckpt.pt"])
    assert_equal_checkpoints(read_checkpoint(remote.folder / "late" / "ckpt.pt"), read_checkpoint(CKPT_PATH))


def test_local_classes_win_over_remote_code_without_a_prompt(model, tmp_path, monkeypatch):
    def refuse(*_):
        pytest.fail("asked the user")

    monkeypatch.setattr(builtins, "input", refuse)
    model.save_pretrained(tmp_path)
    auto_classes = [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification]
    for settings in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        assert type(AutoConfig.from_pretrained(tmp_path, **settings)) is NanoGPTConfig
        for auto_class, model_class in zip(auto_classes, CLASSES, strict=True):
            assert type(auto_class.from_pretrained(tmp_path, **settings)) is model_class
            assert type(auto_class.from_config(model.config, **settings)) is model_class


@pytest.mark.parametrize("model_class", CLASSES)
def test_folder_has_all_files_and_all_auto_classes(model_class, tmp_path):
    model_class.from_nanogpt_ckpt(CKPT_PATH).save_pretrained(tmp_path)
    has_generation = model_class is NanoGPTLMHeadModel
    assert list_files(tmp_path) == [name for name in FILES if has_generation or name != "generation_config.json"]
    assert all((tmp_path / name).read_bytes() == (MODEL_DIR / name).read_bytes() for name in CODE_FILES)
    config = read_json(tmp_path / "config.json")
    assert config["architectures"] == [model_class.__name__]
    assert config["auto_map"] == persistence_nano_gpt.AUTO_MAP


def test_modeling_file_imports_every_other_file_itself():
    """Transformers 5.4 to 5.13 copy only the files of a folder that this one imports, and then read the others."""
    imported = {f"{name}.py" for name in get_relative_imports(MODEL_DIR / "modeling_nano_gpt.py")}
    assert imported == {*CODE_FILES} - {"modeling_nano_gpt.py"}
    assert get_relative_imports(MODEL_DIR / "configuration_nano_gpt.py") == []  # as AutoConfig loads it on its own


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0"])
def test_code_of_a_folder_refuses_older_transformers_before_anything_else(version, monkeypatch):
    file = MODEL_DIR / "configuration_nano_gpt.py"  # the one that AutoConfig runs first
    monkeypatch.setattr(transformers, "__version__", "5.4.0.dev0")
    assert runpy.run_path(str(file))["OLDEST_TRANSFORMERS"] == (5, 4)
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setitem(sys.modules["transformers"].__dict__, "PreTrainedConfig", None)  # as if it had none
    message = rf"expected 5\.4 or newer, got {re.escape(version)}; pip install --upgrade transformers$"
    with pytest.raises(ImportError, match=rf"^configuration_nano_gpt\.py: Transformers is too old .*: {message}"):
        runpy.run_path(str(file))


def test_auto_map_names_every_class_and_keeps_what_others_put_there(model, tmp_path):
    names = {name.partition(".")[2] for name in persistence_nano_gpt.AUTO_MAP.values()}
    assert names == {model_class.__name__ for model_class in [NanoGPTConfig, *CLASSES]}
    assert {f"{name.partition('.')[0]}.py" for name in persistence_nano_gpt.AUTO_MAP.values()} < set(CODE_FILES)
    model.config.auto_map = {
        "AutoModel": "someone/repo--modeling_nano_gpt.NanoGPTModel",
        "AutoTokenizer": ["a.B", None],
    }
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["auto_map"] == {
        **persistence_nano_gpt.AUTO_MAP,
        "AutoTokenizer": ["a.B", None],
    }


def test_package_has_what_the_code_in_saved_folders_asks_it_for():
    tree = ast.parse(Path(persistence_nano_gpt.__file__).read_text())
    asked = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("package", "_require_package()")
    }
    assert sorted(asked) == convert.__all__
    assert all(callable(getattr(convert, name)) for name in asked)


def test_package_with_a_missing_dependency_raises(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'safetensors'", name="safetensors")

    monkeypatch.setattr(persistence_nano_gpt.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="safetensors"):
        NanoGPTLMHeadModel.from_nanogpt_ckpt("ckpt.pt")


def test_padding_ids_stay_suppressed(tmp_path):
    model = make_model()
    model.generation_config.suppress_tokens = [63, 64]
    model.save_pretrained(tmp_path)
    assert NanoGPTLMHeadModel.from_pretrained(tmp_path).generation_config.suppress_tokens == [63, 64]
    assert "2 ids of the vocabulary have no token" in (tmp_path / "README.md").read_text()


def test_adapter_folder_gets_no_code(model, tmp_path):
    """With an adapter of PEFT, save_pretrained writes no config.json."""
    model._add_code_and_card(tmp_path)
    assert list_files(tmp_path) == []


def test_second_process_writes_nothing(model, tmp_path):
    model.config.save_pretrained(tmp_path)  # as the first process does
    model.save_pretrained(tmp_path, is_main_process=False)
    assert list_files(tmp_path) == ["config.json"]


@pytest.mark.parametrize("loss", [1.5, 0.1, math.inf, -math.inf, math.nan, 1e9, torch.tensor(1 / 3).item()])
def test_training_state_survives_the_folder_bit_for_bit(checkpoint, tmp_path, loss):
    config = {
        "a": 0,
        "b": 0.1,
        "c": -0.0,
        "d": True,
        "e": None,
        "f": "\u20ac|\n",
        "g": [1, [2.0]],
        "h": {"x": math.inf},
    }
    state = replace(checkpoint.training_state, iter_num=2**40, best_val_loss=loss, config=config)
    write_checkpoint(replace(checkpoint, training_state=state), tmp_path / "ckpt.pt", overwrite=True)
    NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt").save_pretrained(tmp_path / "first")
    NanoGPTLMHeadModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    model.to_nanogpt_ckpt(tmp_path / "back.pt")
    assert_equal_checkpoints(read_checkpoint(tmp_path / "back.pt"), read_checkpoint(tmp_path / "ckpt.pt"))


def test_state_that_json_would_change_is_left_out_with_a_warning(checkpoint, tmp_path, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(conversion.logger, "warning", warnings.append)
    config = {"kept": 1, "tuple": (1, 2), "tensor": torch.zeros(1), "keys": {1: 2}}
    state = replace(checkpoint.training_state, config=config)
    write_checkpoint(replace(checkpoint, training_state=state), tmp_path / "ckpt.pt", overwrite=True)
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert re.search(
        r"ckpt.pt: config: save_pretrained will leave out 'tuple', 'tensor', 'keys': expected", warnings[0]
    )
    assert_same(model.nanogpt_training_state.config, config)  # in this process nothing is lost
    model.save_pretrained(tmp_path / "folder")
    again = NanoGPTLMHeadModel.from_pretrained(tmp_path / "folder")
    assert again.nanogpt_training_state.config == {"kept": 1}


def test_model_without_a_checkpoint_has_the_state_before_the_first_step(tmp_path):
    make_model().save_pretrained(tmp_path)
    state = NanoGPTLMHeadModel.from_pretrained(tmp_path).nanogpt_training_state
    assert (state.iter_num, state.best_val_loss, state.config) == (0, 1e9, {})
    assert "## Training" not in (tmp_path / "README.md").read_text()


def test_trainer_saves_a_complete_folder(model, tmp_path):
    idx, _ = make_batch(8, 16)
    rows = [{"input_ids": row, "labels": row} for row in idx]
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert set(list_files(tmp_path / "final")) >= set(FILES)
    assert set(list_files(tmp_path / "out" / "checkpoint-1")) >= set(FILES)
    again = NanoGPTLMHeadModel.from_pretrained(tmp_path / "final")
    assert torch.equal(again(idx).logits, model.eval()(idx).logits)
    assert again.nanogpt_training_state == model.nanogpt_training_state


def test_saving_md_python_runs_as_written(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_bytes(CKPT_PATH.read_bytes())
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", SAVING_MD.read_text(), flags=re.DOTALL):
        exec(block, {})
    assert_equal_checkpoints(read_checkpoint("out-back/ckpt.pt"), read_checkpoint(CKPT_PATH))


def test_state_can_be_left_out(model, tmp_path):
    assert model.nanogpt_training_state.iter_num > 0
    model.config.nanogpt_training_state = None
    assert model.nanogpt_training_state == TrainingState()
    model.save_pretrained(tmp_path / "folder")
    written = [(tmp_path / "folder" / name).read_text() for name in ("README.md", "config.json")]
    assert "learning_rate" not in "".join(written)
    model.to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    assert read_checkpoint(tmp_path / "ckpt.pt", with_optimizer=False).training_state == TrainingState()


def read_json(path):
    return json.loads(path.read_text())


def assert_equal_checkpoints(left, right):
    assert list(left.state_dict) == list(right.state_dict)
    assert all(torch.equal(left.state_dict[name], right.state_dict[name]) for name in left.state_dict)
    assert left.model_args == right.model_args
    for name in ("iter_num", "best_val_loss", "config"):
        ours, theirs = getattr(left.training_state, name), getattr(right.training_state, name)
        assert type(ours) is type(theirs)
        assert repr(sort(ours)) == repr(sort(theirs))  # by repr, because nan != nan, -0.0 == 0.0 and True == 1


def sort(value):
    """Sorts the keys, as config.json does."""
    return {key: sort(value[key]) for key in sorted(value)} if isinstance(value, dict) else value
