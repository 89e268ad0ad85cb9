"""Model cards: they are true, never replace the user's own, and are uploaded by a push."""

import re
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from packaging.requirements import Requirement
from packaging.version import Version

from hugging_nano_gpt import CheckpointError, NanoGPTConfig, NanoGPTLMHeadModel, build_character_tokenizer, read_meta
from hugging_nano_gpt.convert import card as module
from hugging_nano_gpt.convert.facts import count_model_parameters
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH
from hugging_nano_gpt.model.configuration_nano_gpt import OLDEST_TRANSFORMERS

from ..helpers.folders import FILES, MODEL_DIR, list_files
from ..helpers.limits import limit_file_size
from ..helpers.tiny import CLASSES, MODEL_ARGS, make_classifier, make_model, make_untied


@pytest.mark.parametrize(
    "make", [make_model, make_untied, make_classifier, lambda: make_model(bias=False).transformer]
)
def test_parameters_are_counted_as_they_are(make):
    model = make()
    without_positions, total = count_model_parameters(model.config, type(model).__name__)
    assert total == model.num_parameters()
    positions = getattr(model, "transformer", model).wpe.weight
    assert without_positions == total - positions.numel()  # model.py @ 3adf61e, get_num_params


def test_card_tells_shape_training_and_limits(tmp_path):
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(CKPT_PATH)
    card = module.make_card(model)
    for row in ("layers | 3", "heads | 3", "block size | 128 tokens", "vocabulary | 65 tokens", "biases | no"):
        assert f"| {row} |" in card
    for text in (
        "338,688",
        "350,976",
        "| iteration | 5,000 |",
        "| validation loss | 1.6176 |",
        "| `learning_rate` | 0.001 |",
        "to_nanogpt_ckpt",
    ):
        assert text in card
    assert "trust_remote_code=True" in card
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["nanogpt"])
    assert data.license is None


@pytest.mark.parametrize("model_class", CLASSES)
def test_python_in_the_card_runs(model_class, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "path" / "or" / "name"
    model_class.from_nanogpt_ckpt(CKPT_PATH).save_pretrained(folder)
    build_character_tokenizer(read_meta(META_PATH)).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert type(names["model"]) is model_class
    assert Path("ckpt.pt").exists() == (model_class is NanoGPTLMHeadModel)
    assert len(capsys.readouterr().out) == (2 * 102 if model_class is NanoGPTLMHeadModel else 0)


def test_card_names_the_oldest_transformers_that_works():
    """A folder's code works in releases that are older than those that the package is tested with."""
    (requirement,) = (Requirement(each) for each in requires("hugging-nano-gpt") if each.startswith("transformers"))
    (tested,) = (each.version for each in requirement.specifier if each.operator == ">=")
    assert Version(tested).release >= OLDEST_TRANSFORMERS
    assert "With Transformers 5.4 or newer, which runs the Python files" in module.make_card(make_model())
    assert OLDEST_TRANSFORMERS == (5, 4)


def test_card_of_an_untied_model_does_not_promise_the_way_back():
    card = module.make_card(make_untied())
    assert "model.to_nanogpt_ckpt" not in card
    assert "cannot go back to nanoGPT" in card
    assert "has its own weights" in card


def test_card_of_gpt2_vocabulary_and_tanh_gelu_says_so():
    config = NanoGPTConfig(**{**MODEL_ARGS, "vocab_size": 50304}, activation_function="gelu_new")
    with torch.device("meta"):
        card = module.make_card(NanoGPTLMHeadModel(config))
    assert "50,304 rows are taken for GPT-2's 50,257 tokens" in card
    assert "tanh GELU" in card
    assert "differ slightly" in card


def test_settings_cannot_break_the_card(model):
    model.config.nanogpt_training_state["config"]["dataset"] = "a|b\n---\n# c `d` [e](f) <g>" + "x" * 1000
    row = next(line for line in module.make_card(model).splitlines() if line.startswith("| `dataset`"))
    assert row.startswith("| `dataset` | a b --- # c d e (f) g xxx")
    assert len(row) < 130


def test_existing_card_is_never_overwritten(model, tmp_path):
    (tmp_path / "README.md").write_bytes(b"mine\r\n\xff")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"mine\r\n\xff"
    assert list_files(tmp_path) == FILES


def test_failed_card_leaves_no_half_file(model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with limit_file_size(100), pytest.raises(CheckpointError, match=r"README.md: cannot be written"):
        module.write_card(model, tmp_path)
    assert list_files(tmp_path) == ["config.json"]


# Pushing


@pytest.fixture
def repository(monkeypatch):
    """Replaces the Hub: stores uploads in a dict of contents, and serves a card if one exists."""
    repository = SimpleNamespace(card=None, files={})

    def load_card(*_, **__):
        if repository.card is None:
            raise EntryNotFoundError("no README.md")
        return ModelCard(repository.card)

    def create_commit(self, repo_id, operations, **_):
        repository.files = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "load", load_card)
    return repository


def test_push_to_hub_uploads_the_whole_folder_and_our_card(model, repository):
    model.push_to_hub("me/model", tags=["shakespeare"])
    assert sorted(repository.files) == FILES
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.tags == ["nanogpt", "shakespeare"]
    assert "# nanoGPT language model" in card.text
    assert repository.files["modeling_nano_gpt.py"] == (MODEL_DIR / "modeling_nano_gpt.py").read_bytes()


def test_save_and_push_uploads_what_is_new_also_into_a_used_folder(model, repository, tmp_path):
    for _ in range(2):
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
        assert sorted(repository.files) == list_files(tmp_path) == FILES
        assert "# nanoGPT language model" in repository.files["README.md"].decode()


def test_push_keeps_the_card_on_the_hub(model, repository, tmp_path):
    repository.card = "---\nlicense: mit\n---\n\nWritten on the Hub.\n"
    model.push_to_hub("me/model")
    assert "Written on the Hub." in repository.files["README.md"].decode()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
    assert "Written on the Hub." in repository.files["README.md"].decode()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_uploads_the_card_in_the_folder_to_a_new_repository(model, repository, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
    assert repository.files["README.md"] == (tmp_path / "README.md").read_bytes() == b"mine"
