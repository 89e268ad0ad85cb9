"""checkpoint/formats.py: real and tiny checkpoints are read and written; wrong ones are refused in a useful line."""

import re
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hugging_nano_gpt import CheckpointError, ConversionError, read_checkpoint, write_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH

from ..helpers.comparison import assert_same, assert_write_refused
from ..helpers.contents import Malicious, make_contents, save
from ..helpers.limits import limit_file_size, limit_time
from ..helpers.tiny import FIXTURES_DIR

# nanoGPT's files of today and of earlier eras; tests/checkpoint/test_family.py tests the other differences.
TODAYS = ("nanogpt-2023-05-06-7fe4a099", "nanogpt-2023-06-14-f08abb45", "nanogpt-head-compiled", "nanogpt-head-nobias")
TODAYS_PATHS = [CKPT_PATH, *(FIXTURES_DIR / name / "ckpt.pt" for name in TODAYS)]
PATHS = [CKPT_PATH, *sorted(FIXTURES_DIR.glob("nanogpt-*/ckpt.pt"))]
WTE, HEAD, LN = "transformer.wte.weight", "lm_head.weight", "transformer.h.1.ln_1.weight"


def clean(state_dict):
    """Removes torch.compile's prefix and the attention masks, which are the only tensors of four dimensions."""
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items() if tensor.ndim != 4}


# Reading and writing whole checkpoints.


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.parent.name)
def test_read_real_checkpoint_equals_torch_load(path):
    checkpoint = read_checkpoint(path)
    expected = torch.load(path, weights_only=True)
    state = checkpoint.training_state
    assert len(PATHS) == 11
    assert_same(checkpoint.state_dict, clean(expected["model"]))
    assert checkpoint.model_args.items() >= expected["model_args"].items()
    assert_same(state.config, expected.get("config", {}))
    assert (state.iter_num, state.best_val_loss) == (expected["iter_num"], float(expected.get("best_val_loss", 1e9)))
    is_tied = torch.equal(checkpoint.state_dict[HEAD], checkpoint.state_dict[WTE])
    assert (checkpoint.state_dict[HEAD] is checkpoint.state_dict[WTE]) is is_tied
    assert checkpoint.path == path


@pytest.mark.parametrize("path", TODAYS_PATHS, ids=lambda path: path.parent.name)
def test_written_checkpoint_equals_todays_original_for_torch_load(path, tmp_path):
    write_checkpoint(read_checkpoint(path), tmp_path / "ckpt.pt")
    original, written = (torch.load(path, weights_only=True) for path in (path, tmp_path / "ckpt.pt"))
    assert list(written) == list(original)
    assert_same(dict(written["model"]), clean(original["model"]))
    assert written["model"][HEAD].data_ptr() == written["model"][WTE].data_ptr()
    for key in ("optimizer", "iter_num", "config"):
        assert_same(written[key], original[key])
    for key in ("model_args", "best_val_loss"):  # which differ in order and in type
        assert written[key] == original[key]


def test_round_trip_with_a_swapped_layer_is_not_equal(contents, tmp_path):
    """Shows that the comparison of the tests here can fail."""
    first = read_checkpoint(save(contents, tmp_path))
    swap = {"h.0": "h.1", "h.1": "h.0"}
    contents["model"] = {
        name: contents["model"][re.sub(r"h\.[01]", lambda m: swap[m[0]], name)] for name in contents["model"]
    }
    second = read_checkpoint(save(contents, tmp_path))
    with pytest.raises(AssertionError, match=r"torch\.equal"):
        assert_same(first.state_dict, second.state_dict)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_keeps_dtype_and_special_values(tmp_path, dtype):
    contents = make_contents(dtype)
    limits = torch.finfo(dtype)
    contents["model"][LN][:4] = torch.tensor([-0.0, limits.tiny / 2, limits.max, limits.min], dtype=dtype)
    path = save(contents, tmp_path)
    write_checkpoint(read_checkpoint(path), path, overwrite=True)
    assert_same(dict(torch.load(path, weights_only=True)["model"]), contents["model"])


def test_round_trip_through_a_string_path_replaces_the_file_read(contents, tmp_path):
    path = str(save(contents, tmp_path))
    checkpoint = read_checkpoint(path)
    write_checkpoint(checkpoint, path, overwrite=True)
    assert_same(read_checkpoint(path).state_dict, checkpoint.state_dict)


@pytest.mark.parametrize(
    "loss", [2.5, 3, torch.tensor(2.5), torch.tensor([2.5]), torch.tensor(2.5, dtype=torch.bfloat16)]
)
def test_read_training_state_gives_plain_python_types(contents, tmp_path, loss):
    contents["best_val_loss"] = loss
    contents["config"] = OrderedDict(contents["config"])
    state = read_checkpoint(save(contents, tmp_path)).training_state
    assert [type(value) for value in (state.iter_num, state.best_val_loss, state.config)] == [int, float, dict]
    assert (state.iter_num, state.best_val_loss) == (7, float(loss))
    assert state.config == contents["config"]


@pytest.mark.parametrize("extra", [{}, {"optimizer": None}], ids=str)
def test_read_stripped_checkpoint_gives_defaults(contents, tmp_path, extra):
    contents = {key: contents[key] for key in ("model", "model_args")} | extra
    checkpoint = read_checkpoint(save(contents, tmp_path))
    state = checkpoint.training_state
    assert_same(checkpoint.state_dict, contents["model"])
    assert (state.iter_num, state.best_val_loss, state.config, state.optimizer) == (0, 1e9, {}, None)


@pytest.mark.parametrize("missing", [["bias"], ["vocab_size"], ["bias", "vocab_size"]], ids=str)
def test_read_model_args_missing_in_old_files_are_told_by_the_tensors(contents, tmp_path, missing):
    expected = dict(contents["model_args"])
    for name in missing:
        del contents["model_args"][name]
    checkpoint = read_checkpoint(save(contents, tmp_path))
    assert checkpoint.model_args == expected
    assert [name for name in missing if f"{name} {expected[name]}, as" not in "".join(checkpoint.assumptions)] == []


# Reading faulty checkpoints.


def edit(part, key, value):
    """Makes a change to contents: sets contents[part][key], or contents[key] where part is None."""

    def change(contents):
        (contents if part is None else contents[part])[key] = value

    return change


def drop(part, key):
    return lambda contents: (contents if part is None else contents[part]).pop(key)


FAULTS = {
    "no model": (drop(None, "model"), "missing 'model'"),
    "no model_args": (drop(None, "model_args"), "missing 'model_args'"),
    "empty model": (edit(None, "model", {}), "expected 2 layers, got only 0 tensors"),
    "unknown key": (edit(None, "scaler", {}), "expected only 'model', 'optimizer', .* got unknown 'scaler'"),
    "unknown key with a newline": (edit(None, "an extra\nkey", 1), r"got unknown 'an extra\\nkey'"),
    "unknown key that is no text": (edit(None, 3, 1), "got unknown 3"),
    "model is a list": (edit(None, "model", []), "model: expected dict, got list"),
    "model_args is None": (edit(None, "model_args", None), "model_args: expected dict, got NoneType"),
    "config is a list": (edit(None, "config", []), "config: expected dict, got list"),
    "optimizer is a list": (edit(None, "optimizer", []), "optimizer: expected dict, got list"),
    "iter_num is text": (edit(None, "iter_num", "7"), "iter_num: expected int, got str"),
    "iter_num is a tensor": (edit(None, "iter_num", torch.tensor(7)), "iter_num: expected int, got Tensor"),
    "loss is text": (edit(None, "best_val_loss", "2.5"), "best_val_loss: expected a number, got str"),
    "loss is None": (edit(None, "best_val_loss", None), "best_val_loss: expected a number, got NoneType"),
    "loss is a vector": (edit(None, "best_val_loss", torch.ones(2)), "best_val_loss: expected a number, got Tensor"),
    "loss is complex": (edit(None, "best_val_loss", torch.tensor(1j)), "best_val_loss: expected a number, got"),
    "loss is too large": (edit(None, "best_val_loss", 10**400), "best_val_loss: expected a number, got"),
    "no n_head": (drop("model_args", "n_head"), "model_args: missing 'n_head'"),
    "unknown argument": (edit("model_args", "rotary", True), "model_args: expected only .* got unknown 'rotary'"),
    "n_head that does not divide": (
        edit("model_args", "n_head", 3),
        "n_embd: expected a multiple of n_head.*n_head=3",
    ),
    "n_head of 0": (edit("model_args", "n_head", 0), "n_head: expected a positive int, got 0"),
    "n_embd is text": (edit("model_args", "n_embd", "32"), "n_embd: expected a positive int, got '32'"),
    "n_layer is a float": (edit("model_args", "n_layer", 2.0), r"n_layer: expected a positive int, got 2\.0"),
    "bias is None": (edit("model_args", "bias", None), "bias: expected True or False, got None"),
    "dropout of 1": (edit("model_args", "dropout", 1), r"dropout: expected a probability in \[0, 1\), got 1"),
    "too many layers": (edit("model_args", "n_layer", 3), r"model: missing 'transformer\.h\.2\.ln_1\.weight'"),
    "too few layers": (edit("model_args", "n_layer", 1), r"got unknown 'transformer\.h\.1\.ln_1\.weight'"),
    "biases not recorded": (edit("model_args", "bias", False), r"got unknown 'transformer\.h\.0\.ln_1\.bias'"),
    "other block_size": (edit("model_args", "block_size", 64), r"wpe\.weight: expected \(64, 32\), got \(32, 32\)"),
    "no tensor": (drop("model", LN), f"model: missing '{LN}'"),
    "unknown tensor": (edit("model", "value.weight", torch.ones(1)), r"got unknown 'value\.weight'"),
    "name that is no text": (edit("model", 5, torch.ones(1)), "expected names and tensors, got 5: Tensor"),
    "value that is no tensor": (edit("model", LN, [1.0]), f"expected names and tensors, got '{LN}': list"),
    "transposed": (
        edit("model", "transformer.h.0.mlp.c_fc.weight", torch.ones(32, 128)),
        r"h\.0\.mlp\.c_fc\.weight: expected \(128, 32\), got \(32, 128\)",
    ),
    "bias shaped like a mask": (
        edit("model", "transformer.h.0.attn.c_attn.bias", torch.ones(1, 1, 32, 32)),
        r"h\.0\.attn\.c_attn\.bias: expected \(96,\), got \(1, 1, 32, 32\)",
    ),
    "one int tensor": (
        edit("model", LN, torch.ones(32, dtype=torch.int64)),
        r"one floating dtype \(.*\), got .*'torch.int64'",
    ),
    "one half tensor": (
        edit("model", LN, torch.ones(32).half()),
        r"one floating dtype \(.*\), got 'torch.float16', 'torch.fl",
    ),
    "sparse tensor": (
        edit("model", LN, torch.ones(32).to_sparse()),
        f"{LN}: expected a dense tensor, got torch.sparse|damaged or cut off",  # torch 2.6 and 2.11 fail earlier
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_read_faulty_checkpoint_is_refused_in_one_useful_line(contents, tmp_path, name):
    change, message = FAULTS[name]
    change(contents)
    path = save(contents, tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    # the file, what was expected and found, and what to do
    assert re.fullmatch(rf"{re.escape(str(path))}: .*(expected .* got |missing ).*; .+", str(caught.value))


def test_read_checkpoint_of_ints_is_refused(contents, tmp_path):
    contents["model"] = {name: tensor.long() for name, tensor in contents["model"].items()}
    with pytest.raises(CheckpointError, match=r"expected all tensors of one floating dtype \(.*\), got 'torch.int64'"):
        read_checkpoint(save(contents, tmp_path))


def test_read_checkpoint_with_several_faults_lists_them_all(contents, tmp_path):
    contents["scaler"] = {}
    contents["iter_num"] = "7"
    contents["model"]["extra.weight"] = torch.ones(2)
    contents["model"]["transformer.wpe.weight"] = torch.ones(31, 32)
    contents["model"]["transformer.ln_f.bias"] = torch.ones(32).half()
    del contents["model"][LN]
    with pytest.raises(CheckpointError, match="not a whole nanoGPT checkpoint") as caught:
        read_checkpoint(save(contents, tmp_path))
    expected = ["'scaler'", "iter_num", "'extra.weight'", "(31, 32)", "torch.float16", f"missing '{LN}'"]
    assert [text for text in expected if text not in str(caught.value)] == []


def test_read_checkpoint_with_many_faults_stays_short(contents, tmp_path):
    contents["model"] = {f"student.{name}": tensor for name, tensor in contents["model"].items()}
    with pytest.raises(CheckpointError, match=r"missing .*\(29 in all\).* got unknown .*\(29 in all\)") as caught:
        read_checkpoint(save(contents, tmp_path))
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "block_size", "vocab_size"])
@pytest.mark.parametrize("size", [10**9, 10**18])
def test_read_huge_size_in_model_args_is_refused_at_once(contents, tmp_path, name, size):
    contents["model_args"][name] = size
    path = save(contents, tmp_path)
    with limit_time(5), pytest.raises(CheckpointError, match=rf"expected .*{size}.* got "):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ([1, 2], "list"),
        ({}, "a dict of 0 other keys"),
        ({"model_state_dict": {}, "epoch": 3}, "a dict of 2 other keys"),
        (torch.ones(3), "Tensor"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_read_other_contents_is_refused(tmp_path, other, found):
    path = save(other, tmp_path)
    message = f"{path}: not a checkpoint of the nanoGPT family: expected a dict with 'model' and 'model_args', or a "
    with pytest.raises(CheckpointError, match=f"{re.escape(message)}state dict, got {found}; give the file that"):
        read_checkpoint(path)


@pytest.mark.parametrize("n_head", [None, 4])
@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.ones(65), torch.ones(65, 4, 8)], ids=lambda t: t.ndim)
def test_read_bare_state_dict_with_a_table_of_other_dimensions_is_refused(contents, tmp_path, tensor, n_head):
    path = save({**contents["model"], WTE: tensor, HEAD: tensor}, tmp_path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*(expected|missing)"):
        read_checkpoint(path, n_head=n_head)


@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("part", [None, "model", "model_args", "config", "optimizer"])
def test_read_malicious_pickle_executes_nothing(contents, tmp_path, part, with_optimizer):
    canary = tmp_path / "canary"
    edit(part, "iter_num", Malicious(canary))(contents)
    path = save(contents, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"refused, as its pickle could run code: .* the name \S*mkdir; nothing in"
    ):
        read_checkpoint(path, with_optimizer=with_optimizer)
    assert not canary.exists()


def test_unsafe_load_of_malicious_pickle_executes_it(contents, tmp_path):
    """Shows that the canary of the test above lives only because nothing is executed."""
    contents["iter_num"] = Malicious(tmp_path / "canary")
    torch.load(save(contents, tmp_path), weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "value", [Path("out"), make_contents, torch.nn.Linear(1, 1)], ids=lambda value: type(value).__name__
)
def test_read_other_classes_are_refused(contents, tmp_path, value):
    contents["config"]["value"] = value
    with pytest.raises(CheckpointError, match="expected only tensors and plain Python types, got the name"):
        read_checkpoint(save(contents, tmp_path))


# Writing what nanoGPT cannot express.


def change_tensor(checkpoint, name, tensor):
    return replace(checkpoint, state_dict={**checkpoint.state_dict, name: tensor})


def test_write_untied_head_is_refused(checkpoint, tmp_path):
    untied = change_tensor(checkpoint, HEAD, checkpoint.state_dict[WTE] + 1)
    assert_write_refused(untied, tmp_path, r"lm_head\.weight: expected the numbers of transformer\.wte\.weight")


def test_write_equal_but_separate_head_is_accepted(checkpoint, tmp_path):
    separate = change_tensor(checkpoint, HEAD, checkpoint.state_dict[WTE].clone())
    write_checkpoint(separate, tmp_path / "out.pt")
    assert_same(read_checkpoint(tmp_path / "out.pt").state_dict, checkpoint.state_dict)


NOT_DENSE = f"model: expected dense tensors .*'{LN}'"
WRONG_TENSORS = {
    "shape": (LN, torch.ones(33), r"expected \(32,\), got \(33,\)"),
    "half": (LN, torch.ones(32).half(), "one floating dtype"),
    "int": (LN, torch.ones(32, dtype=torch.int64), "one floating dtype"),
    "NaN": (LN, torch.full((32,), float("nan")), f"expected finite numbers, got NaN or infinity in '{LN}'"),
    "one infinity": (LN, torch.ones(32).index_fill(0, torch.tensor(31), float("-inf")), "got NaN or infinity in"),
    "None": (LN, None, NOT_DENSE),
    "meta": (LN, torch.ones(32, device="meta"), NOT_DENSE),
    "sparse": (LN, torch.ones(32).to_sparse(), NOT_DENSE),
    "expanded": (LN, torch.ones(1).expand(32), NOT_DENSE),
    "negated view": (LN, torch.ones(32, dtype=torch.complex64).conj().imag, NOT_DENSE),
    "mask buffer": ("transformer.h.0.attn.bias", torch.ones(1, 1, 32, 32), "got unknown 'transformer.h.0.attn.bias'"),
    "prefix": (f"_orig_mod.{LN}", torch.ones(32), "got unknown '_orig_mod.transformer"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_write_wrong_tensor_is_refused(checkpoint, tmp_path, name):
    where, tensor, message = WRONG_TENSORS[name]
    assert_write_refused(change_tensor(checkpoint, where, tensor), tmp_path, message)


def test_write_missing_tensor_is_refused(checkpoint, tmp_path):
    del checkpoint.state_dict[LN]
    assert_write_refused(checkpoint, tmp_path, f"model: missing '{LN}'; nothing was written")


def test_write_wrong_model_args_is_refused(checkpoint, tmp_path):
    wrong = replace(checkpoint, model_args={**checkpoint.model_args, "n_head": 3})
    assert_write_refused(wrong, tmp_path, "n_embd: expected a multiple of n_head")


Sizes = namedtuple("Sizes", "width height")
ENDLESS: dict = {}
ENDLESS["config"] = ENDLESS

UNREADABLE_STATES = {
    "path": ("config", {"out_dir": Path("out")}),
    "path as key": ("config", {Path("out"): 1}),
    "function": ("config", {"get_lr": lambda step: 1e-3}),
    "named tuple": ("config", {"sizes": [Sizes(1, 2)]}),
    "defaultdict": ("config", {"counts": defaultdict(int, a=1)}),
    "expanded tensor": ("config", {"table": torch.ones(1).expand(3)}),
    "sparse tensor": ("config", {"table": torch.ones(3).to_sparse()}),
    "meta tensor": ("config", {"table": torch.ones(3, device="meta")}),
    "endless dict": ("config", ENDLESS),
    "no config": ("config", None),
    "iter_num is a float": ("iter_num", 7.5),
    "no iter_num": ("iter_num", None),
    "loss is text": ("best_val_loss", "2.5"),
    "no loss": ("best_val_loss", None),
}


@pytest.mark.parametrize("name", UNREADABLE_STATES)
def test_write_training_state_that_could_not_be_read_is_refused(checkpoint, tmp_path, name):
    field, value = UNREADABLE_STATES[name]
    wrong = replace(checkpoint, training_state=replace(checkpoint.training_state, **{field: value}))
    assert_write_refused(wrong, tmp_path, field)


def test_write_refused_leaves_the_old_file(checkpoint, tmp_path):
    before = (tmp_path / "ckpt.pt").read_bytes()
    changed = change_tensor(checkpoint, HEAD, checkpoint.state_dict[WTE] + 1)
    with pytest.raises(ConversionError, match="nothing was written"):
        write_checkpoint(changed, tmp_path / "ckpt.pt", overwrite=True)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_write_without_room_leaves_the_old_file(checkpoint, tmp_path):
    path = tmp_path / "ckpt.pt"
    before = path.read_bytes()
    with limit_file_size(100_000), pytest.raises(CheckpointError, match=r"cannot be written: .*untouched, .*has room"):
        write_checkpoint(checkpoint, path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
