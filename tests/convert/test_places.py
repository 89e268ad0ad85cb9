"""Where on the Hub, or in a folder, a model is: its config, weights, settings and tokenizer come from one place."""

import io

import pytest

from hugging_nano_gpt import (
    CharacterTable,
    CheckpointError,
    ConversionError,
    NanoGPTLMHeadModel,
    build_character_tokenizer,
    convert_to_checkpoint,
    convert_to_folder,
    evaluate_loss,
    export_gpt2,
    export_model,
    import_gpt2,
    read_checkpoint,
    sample_text,
    verify_models,
)
from hugging_nano_gpt.convert.source import load_source
from hugging_nano_gpt.demo import CKPT_PATH

from ..helpers.comparison import assert_same
from ..helpers.tiny import make_model

ALPHABET = [chr(ord("0") + index) for index in range(65)]
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_new")

# Indexed by the number of the model in that place.
PLACES = (
    {},
    {"revision": "other"},
    {"subfolder": "part"},
    {"revision": "other", "subfolder": "part"},
)


def write(number, kind, folder):
    """Writes a model; each part of it depends on its number."""
    model = make_model(number)
    model.config.activation_function = ACTIVATIONS[number]
    model.generation_config.eos_token_id = number + 1
    tokenizer = build_character_tokenizer(CharacterTable(tuple(ALPHABET[number:] + ALPHABET[:number])))
    if kind == "gpt2":
        export_gpt2(model, folder, tokenizer=tokenizer, overwrite=True)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module", params=["nanogpt", "gpt2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def cache(kind, tmp_path_factory):
    """The Hub's cache of a repository with two revisions, in huggingface_hub's layout, and the folders in it."""
    root = tmp_path_factory.mktemp(kind)
    repository = root / "models--someone--model"
    folders = []
    for number, (revision, commit) in enumerate((("main", "0" * 40), ("other", "1" * 40))):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        folder = repository / "snapshots" / commit
        write(number, kind, folder)
        write(number + 2, kind, folder / "part")
        folders.append(folder)
    return root, [*folders, *(folder / "part" for folder in folders)]


@pytest.fixture(params=range(4), ids=["main", "revision", "subfolder", "both"])
def place(request, cache):
    """What is given to a function, and the folder that it means."""
    root, folders = cache
    return {"cache_dir": str(root), **PLACES[request.param]}, folders[request.param]


def assert_is(model, folder):
    expected = load_source(folder).model
    assert_same(model.state_dict(), expected.state_dict())
    assert model.config.activation_function == expected.config.activation_function
    assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id


def test_model_is_loaded_from_its_place(place):
    assert_is(load_source("someone/model", **place[0]).model, place[1])


def test_folder_is_written_with_the_tokenizer_of_the_place(place, tmp_path):
    conversion = convert_to_folder("someone/model", tmp_path / "out", **place[0])
    assert_is(conversion.model, place[1])
    assert conversion.tokenizer.get_vocab() == convert_to_folder(place[1], tmp_path / "x").tokenizer.get_vocab()


def test_export_takes_the_place(place, tmp_path):
    conversion = export_model("someone/model", tmp_path / "out", to="gpt2", **place[0])
    assert_is(conversion.model, place[1])
    assert_is(load_source(tmp_path / "out").model, place[1])


def test_checkpoint_is_written_of_the_place(place, tmp_path):
    convert_to_checkpoint("someone/model", tmp_path / "ckpt.pt", **place[0])
    assert_same(read_checkpoint(tmp_path / "ckpt.pt").state_dict, dict(load_source(place[1]).model.state_dict()))


@pytest.mark.parametrize("kind", ["nanogpt"], indirect=True)
def test_place_is_that_of_the_models_on_the_hub_in_a_verification(place, tmp_path):
    """A file next to such a model takes what says how to read it, and neither gets the other's arguments."""
    assert verify_models("someone/model", "someone/model", **place[0]).is_equal
    NanoGPTLMHeadModel.from_pretrained(place[1]).to_nanogpt_ckpt(tmp_path / "ckpt.pt")
    activation = load_source(place[1]).model.config.activation_function
    options = {**place[0], "activation_function": activation}
    assert verify_models(tmp_path / "ckpt.pt", "someone/model", **options).is_equal
    options["revision"] = "main" if "revision" in place[0] else "other"
    assert not verify_models(tmp_path / "ckpt.pt", "someone/model", **options).is_equal
    with pytest.raises(CheckpointError, match=r"'revision' cannot be set: expected none for a file"):
        verify_models(tmp_path / "ckpt.pt", tmp_path / "ckpt.pt", revision="other")


def test_loss_and_text_are_of_the_place(place, tmp_path):
    (tmp_path / "text.txt").write_text("".join(ALPHABET[:40]))
    losses, texts = [], []
    for source, kwargs in (("someone/model", place[0]), (place[1], {})):
        losses.append(evaluate_loss(source, tmp_path / "text.txt", device="cpu", **kwargs).loss)
        stream = io.StringIO()
        sample_text(source, "0", num_samples=1, max_new_tokens=8, device="cpu", stream=stream, **kwargs)
        texts.append(stream.getvalue())
    assert losses[0] == losses[1]
    assert texts[0] == texts[1]


def test_places_hold_different_models(cache):
    """Shows that the tests above can fail."""
    models = [load_source(folder).model for folder in cache[1]]
    assert len({model.transformer.wte.weight[0, 0].item() for model in models}) == 4


def test_subfolder_of_a_local_folder_is_taken(cache, tmp_path):
    folders = cache[1]
    conversion = convert_to_folder(folders[0], tmp_path / "out", subfolder="part")
    assert_is(conversion.model, folders[2])
    assert conversion.tokenizer.convert_tokens_to_ids(ALPHABET[2]) == 0


def test_tokenizer_of_another_repository_is_not_looked_for_in_the_place(cache, tmp_path):
    root, folders = cache
    kwargs = {"cache_dir": str(root), "subfolder": "part"}
    conversion = convert_to_folder("someone/model", tmp_path / "out", tokenizer=str(folders[1]), **kwargs)
    assert conversion.tokenizer.convert_tokens_to_ids(ALPHABET[1]) == 0


def test_file_with_a_place_is_refused():
    with pytest.raises(CheckpointError, match=r"'revision' cannot be set: expected none for a file, got \['other'\]"):
        load_source(CKPT_PATH, revision="other")


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_import_gpt2_takes_the_place_and_returns_the_loading_info(place):
    model, info = import_gpt2("someone/model", output_loading_info=True, **place[0])
    assert_is(model, place[1])
    expected = NanoGPTLMHeadModel.from_pretrained(None, config=model.config, state_dict={}, output_loading_info=True)
    assert info.keys() == expected[1].keys()
    assert not any(info.values())


@pytest.mark.parametrize("kind", ["gpt2"], indirect=True)
def test_import_gpt2_of_a_model_with_a_place_is_refused(cache):
    from transformers import GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel.from_pretrained(cache[1][0])
    with pytest.raises(ConversionError, match="'subfolder' cannot be set: expected none for a model in memory"):
        import_gpt2(gpt2, subfolder="part")


@pytest.mark.parametrize("is_file", [False, True])
def test_loading_info_is_refused_where_no_model_is_returned(cache, is_file):
    with pytest.raises(ConversionError, match=r"output_loading_info cannot be set: .* or import_gpt2"):
        load_source(CKPT_PATH if is_file else cache[1][0], output_loading_info=True)
