"""The commands' errors for wrong input: what was typed, what is wrong with it, and the flag or the path that helps."""

import re
import shutil

import pytest
import torch

from hugging_nano_gpt import CheckpointError, MissingDependencyError, convert_to_folder, read_checkpoint
from hugging_nano_gpt.convert.pretrained import read_model_type
from hugging_nano_gpt.convert.source import names_file
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.errors import require

from .helpers.programs import run_command
from .helpers.tiny import FIXTURES_DIR
from .helpers.trace import TRACE_DIR


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with files that people name by mistake."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copy(CKPT_PATH, folder / "ckpt.pt")
    shutil.copy(META_PATH, folder / "meta.pkl")
    shutil.copy(FIXTURES_DIR / "mingpt" / "model.pt", folder / "mingpt.pt")
    shutil.copy(TRACE_DIR / "ckpt_100.pt", folder / "other.pt")
    for name in ("out", "finished"):
        (folder / name).mkdir()
    (folder / "out" / "ckpt.pt").symlink_to(folder / "ckpt.pt")
    (folder / "finished" / "model_19073.pt").symlink_to(folder / "ckpt.pt")
    (folder / "empty").mkdir()
    for name in ("text.txt", "note"):
        (folder / name).write_text("hello")
    convert_to_folder(folder / "ckpt.pt", folder / "saved", meta_path=folder / "meta.pkl")
    shutil.copytree(folder / "saved", folder / "run" / "saved")
    shutil.copytree(folder / "saved", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    extra = {"model": {}, "model_args": {}, "wandb_id": "x"}
    torch.save({**torch.load(folder / "ckpt.pt"), "wandb_id": "x"}, folder / "fork.pt")
    torch.save({**torch.load(folder / "ckpt.pt"), "optimizer": None}, folder / "bare.pt")
    torch.save({**extra, "model": torch.load(folder / "ckpt.pt")["model"]}, folder / "headless.pt")
    return folder


NO_TOKENIZER = r"; give its meta\.pkl \(--meta FILE, read_meta\), or another by name \(--tokenizer NAME, "

MESSAGES = {
    # A folder, or a name, that is no model: what is in it is named.
    "inspect out": r"out: expected .* a folder with config\.json, .*; give the file in it, as out/ckpt\.pt$",
    "generate finished hi": r"finished: .*; give the file in it, as finished/model_19073\.pt$",
    "convert run x": r"run: .*; give the folder in it, as run/saved$",
    "verify ckpt.pt empty": r"empty: .* a folder without; give the path of a checkpoint file or of a saved folder$",
    "generate nowhere hi": r"nowhere: cannot be opened: No such file or directory; check the path",
    "generate out/ckpt hi": r"out/ckpt: cannot be opened: No such file or directory; check the path",
    "back saved x.pt --optimizer-from bare.pt": r"bare\.pt: has no optimizer state: .*leave out --optimizer-from",
    "export ckpt.pt x --to onnx --file-type f16": r"got 'f16' for 'onnx'; leave out --file-type$",
    "export nowhere x.gguf --to gguf": r"nowhere: cannot be opened: No such file",
    "back nowhere x.pt": r"nowhere: cannot be loaded: .* no such folder, and no hub id, which is owner/name;",
    "inspect saved --n-head 4": r"saved: expected no 'n_head' for a folder .*got \[4\]; leave out --n-head$",
    "generate saved hi --activation gelu": r"saved: expected no 'activation_function' .*; leave out --activation$",
    "inspect ckpt.pt --n-head 5": r"ckpt\.pt: expected n_head=3 as it records, got 5; leave out n_head \(--n-head\)$",
    "inspect mingpt.pt": r"mingpt\.pt: .*; give it as n_head=\.\.\. \(--n-head\)",
    # Where to write.
    "back saved saved": r"error: saved: is the source: expected another place, got the model itself",
    "back saved out": r"out/ckpt\.pt: is there already: .* \(--force, overwrite=True\)$",
    "back saved note --force": r"note: expected a folder, got a file; give another path$",
    "export ckpt.pt saved --to gguf": r"saved: expected a file to write, got a folder; give the path of a file in it$",
    "back saved ckpt.pt": r"ckpt\.pt: is there already: .* \(--force, overwrite=True\)$",
    "convert saved saved": r"saved: is the source: expected another place",
    "convert ckpt.pt x --max-shard-size big": r"'--max-shard-size': expected a number and a unit, as 5GB, got 'big'",
    "back saved x.pt --optimizer-from other.pt": r"error: other\.pt: its optimizer state is of another model .*\)$",
    # Tokenizers.
    "generate bare hi": rf"bare: no tokenizer in it: expected tokenizer\.json, .*, got 'README\.md', .*{NO_TOKENIZER}",
    "generate ckpt.pt hi": rf"ckpt\.pt: no tokenizer found: .* got none{NO_TOKENIZER}",
    "evaluate bare text.txt": rf"bare: no tokenizer in it: .*{NO_TOKENIZER}",
    "convert ckpt.pt x --tokenizer text.txt": r"'text\.txt': is not known to tiktoken: .* a hub id .*\(--tokenizer\)$",
    "generate saved hi --meta meta.pkl --tokenizer gpt2": r"got both; leave out one, --meta or --tokenizer$",
    # Numbers and devices.
    "generate saved hi --stride 1000": r"error: stride: expected 1 to block_size=128, got 1000; change --str",
    "evaluate saved text.txt --stride 1000": r"error: stride: expected 1 to block_size=128, got 1000; change --str",
    "evaluate saved text.txt --eval-iters 3": r"text\.txt: expected no eval_iters .*, got 3; leave out --eval-iters$",
    "generate saved hi --device bogus": r"got 'bogus'; give one of these, or none \(--device\)$",
    "evaluate saved nowhere.bin": r"nowhere\.bin: cannot be opened: No such file or directory; check the path, or run",
    "train --device=cpu --out_dir=ckpt.pt": r"settings: out_dir: expected a folder, got 'ckpt\.pt'; change",
    # --ignore-extra is advised for what a fork has added, unless it was given or more is wrong.
    "inspect fork.pt": r"fork\.pt: .*got unknown 'wandb_id'; .*\(--ignore-extra\)$",
    "inspect headless.pt": r"headless\.pt: .*model_args: missing .* as nanoGPT's train\.py wrote it$",
    "inspect headless.pt --ignore-extra": r"headless\.pt: .*model_args: missing .* as nanoGPT's train\.py wrote it$",
}


@pytest.mark.parametrize("arguments", MESSAGES)
def test_wrong_input_is_named_with_what_helps(workplace, arguments):
    code, _, said = run_command(*arguments.split(), cwd=workplace)
    assert code in (1, 2)
    assert re.search(MESSAGES[arguments], said.strip(), re.MULTILINE), said
    assert not (workplace / "x").exists()


def test_packages_that_are_not_installed_are_named_with_the_command():
    require("here", "torch>=2.6", "typer")
    message = r"^here: no_such_a and no_such_b are not installed; pip install 'no_such_a>=2' torch no_such_b$"
    with pytest.raises(MissingDependencyError, match=message):
        require("here", "no_such_a>=2", "torch", "no_such_b")
    with pytest.raises(MissingDependencyError, match=r"^here: no_such_a is not installed; pip install no_such_a; or$"):
        require("here", "no_such_a", alternative="or")


class Foreign:
    """An object that a fork pickles."""


@pytest.mark.parametrize(("place", "is_advised"), [("extra", True), ("model_args", False), ("model", False)])
def test_leaving_out_is_advised_only_for_code_outside_of_the_model(tmp_path, place, is_advised):
    contents = torch.load(CKPT_PATH)
    contents.get(place, contents)["foreign"] = Foreign()
    torch.save(contents, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="its pickle could run code") as caught:
        read_checkpoint(tmp_path / "ckpt.pt")
    assert ("--ignore-extra" in str(caught.value)) == is_advised
    if not is_advised:
        with pytest.raises(CheckpointError, match="its pickle could run code") as caught:
            read_checkpoint(tmp_path / "ckpt.pt", ignore_extra=True)
        assert "--ignore-extra" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere", "gpt3", "gpt2-small", "bert-base-uncased"])
def test_name_without_an_owner_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    """Offline, a request to the Hub would wait for 23 seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", lambda *args, **kwargs: pytest.fail("asked"))
    assert names_file(name)
    with pytest.raises(CheckpointError, match=rf"^{name}: .*no such folder, and no hub id, which is owner/name"):
        read_model_type(name)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "distilgpt2", "owner/name"])
def test_names_of_the_hub_are_looked_for_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", lambda name: ({"model_type": name}, {}))
    assert not names_file(name)
    assert read_model_type(name) == name
