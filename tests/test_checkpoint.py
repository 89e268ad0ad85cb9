"""checkpoint.py: real and tiny checkpoints there and back, and wrong ones refused with a message that helps."""

import os
import re
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hugging_nano_gpt import Checkpoint, CheckpointError, ConversionError, read_checkpoint, write_checkpoint
from hugging_nano_gpt.demo import CKPT_PATH
from hugging_nano_gpt.formats import torch_file

from .conftest import assert_same, limit_file_size, limit_time, make_contents, save
from .tiny import FIXTURES_DIR

PATHS = [CKPT_PATH, *sorted(FIXTURES_DIR.glob("*/ckpt.pt"))]
WTE, HEAD, LN = "transformer.wte.weight", "lm_head.weight", "transformer.h.1.ln_1.weight"


@pytest.fixture(params=PATHS, ids=lambda path: path.parent.name)
def real_path(request):
    return request.param


@pytest.fixture
def checkpoint(contents, tmp_path) -> Checkpoint:
    return read_checkpoint(save(contents, tmp_path))


def strip_prefix(state_dict):
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}


# Reading and writing what is right


def test_read_real_checkpoint_equals_torch_load(real_path):
    checkpoint = read_checkpoint(real_path)
    expected = torch.load(real_path, weights_only=True)
    state = checkpoint.training_state
    assert_same(checkpoint.state_dict, strip_prefix(expected["model"]))
    assert_same(checkpoint.model_args, expected["model_args"])
    assert_same(state.optimizer, expected["optimizer"])
    assert_same(state.config, expected["config"])
    assert (state.iter_num, state.best_val_loss) == (expected["iter_num"], float(expected["best_val_loss"]))
    assert checkpoint.state_dict[HEAD] is checkpoint.state_dict[WTE]
    assert checkpoint.path == real_path


def test_round_trip_of_real_checkpoint_keeps_keys_order_and_bits(real_path, tmp_path):
    first = read_checkpoint(real_path)
    write_checkpoint(first, tmp_path / "ckpt.pt")
    second = read_checkpoint(tmp_path / "ckpt.pt")
    assert_same(first.state_dict, second.state_dict)
    assert_same(first.model_args, second.model_args)
    assert_same(vars(first.training_state), vars(second.training_state))


def test_written_checkpoint_equals_original_for_torch_load(real_path, tmp_path):
    write_checkpoint(read_checkpoint(real_path), tmp_path / "ckpt.pt")
    original, written = (torch.load(path, weights_only=True) for path in (real_path, tmp_path / "ckpt.pt"))
    assert list(written) == list(original)
    assert_same(strip_prefix(written["model"]), strip_prefix(original["model"]))
    assert written["model"][HEAD].data_ptr() == written["model"][WTE].data_ptr()
    for key in ("optimizer", "model_args", "iter_num", "config"):
        assert_same(written[key], original[key])
    assert written["best_val_loss"] == original["best_val_loss"]


def test_round_trip_with_a_swapped_layer_is_not_equal(contents, tmp_path):
    """Shows that the comparison of the tests above can fail."""
    first = read_checkpoint(save(contents, tmp_path))
    swap = {"h.0": "h.1", "h.1": "h.0"}
    contents["model"] = {
        name: contents["model"][re.sub(r"h\.[01]", lambda m: swap[m[0]], name)] for name in contents["model"]
    }
    second = read_checkpoint(save(contents, tmp_path))
    with pytest.raises(AssertionError, match=r"torch\.equal"):
        assert_same(first.state_dict, second.state_dict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_keeps_dtype_and_special_values(tmp_path, dtype):
    contents = make_contents(dtype)
    contents["model"][LN][:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    path = save(contents, tmp_path)
    write_checkpoint(read_checkpoint(path), path)
    assert_same(dict(torch.load(path, weights_only=True)["model"]), contents["model"])


def test_round_trip_through_a_string_path_replaces_the_file_read(contents, tmp_path):
    path = str(save(contents, tmp_path))
    checkpoint = read_checkpoint(path)
    write_checkpoint(checkpoint, path)
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


def test_read_stripped_checkpoint_gives_defaults(contents, tmp_path):
    contents = {key: contents[key] for key in ("model", "model_args")}
    checkpoint = read_checkpoint(save(contents, tmp_path))
    state = checkpoint.training_state
    assert_same(checkpoint.state_dict, contents["model"])
    assert (state.iter_num, state.best_val_loss, state.config, state.optimizer) == (0, 1e9, {}, None)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_read_wrapper_prefix_is_stripped(contents, tmp_path, prefix):
    plain = contents["model"]
    contents["model"] = {prefix + name: tensor for name, tensor in plain.items()}
    assert_same(read_checkpoint(save(contents, tmp_path)).state_dict, plain)


@pytest.mark.parametrize("front", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_read_wrapper_prefix_inside_a_name_is_kept_and_refused(contents, tmp_path, prefix, front):
    name = LN.replace("ln_1", f"{prefix}ln_1")
    contents["model"][front + name] = contents["model"].pop(LN)
    with pytest.raises(CheckpointError, match=rf"missing '{LN}'.* got unknown '{re.escape(name)}'"):
        read_checkpoint(save(contents, tmp_path))


def test_read_name_twice_after_stripping_is_refused(contents, tmp_path):
    contents["model"][f"_orig_mod.{LN}"] = contents["model"][LN] + 1
    with pytest.raises(CheckpointError, match=rf"each tensor once, got '{LN}' again as '_orig_mod\.{LN}'"):
        read_checkpoint(save(contents, tmp_path))


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_read_mask_buffers_are_dropped_and_biases_kept(contents, tmp_path, prefix):
    plain = dict(contents["model"])
    for layer in range(2):
        contents["model"][f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    contents["model"] = {prefix + name: tensor for name, tensor in contents["model"].items()}
    state_dict = read_checkpoint(save(contents, tmp_path)).state_dict
    assert_same(state_dict, plain)
    assert "transformer.h.0.attn.c_attn.bias" in state_dict


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("transformer.h.0.attn.bias", torch.ones(32)),
        ("transformer.h.0.mlp.bias", torch.ones(1, 1, 32, 32)),
        ("transformer.h.0.attn.bias.x", torch.ones(1, 1, 32, 32)),
        ("x.transformer.h.0.attn.bias", torch.ones(1, 1, 32, 32)),
    ],
)
def test_read_buffer_that_is_no_mask_is_refused(contents, tmp_path, name, tensor):
    contents["model"][name] = tensor
    with pytest.raises(CheckpointError, match=f"got unknown '{re.escape(name)}'"):
        read_checkpoint(save(contents, tmp_path))


@pytest.mark.parametrize("has_offsets", [True, False])
def test_read_without_optimizer_does_not_touch_it(contents, tmp_path, monkeypatch, has_offsets):
    """A damaged optimizer goes unnoticed when it is not wanted, and only then."""
    if not has_offsets:
        monkeypatch.setattr(torch_file, "_get_offset", lambda tensor: None)
    path = save(contents, tmp_path)
    moment = bytes(contents["optimizer"]["state"][3]["exp_avg"].numpy())
    path.write_bytes(path.read_bytes().replace(moment, moment[::-1]))
    checkpoint = read_checkpoint(path, with_optimizer=False)
    assert checkpoint.training_state.optimizer is None
    assert checkpoint.training_state.iter_num == 7
    assert_same(checkpoint.state_dict, contents["model"])
    with pytest.raises(CheckpointError, match="a wrong checksum"):
        read_checkpoint(path)


def test_round_trip_without_optimizer_has_none(contents, tmp_path):
    path = save(contents, tmp_path)
    write_checkpoint(read_checkpoint(path, with_optimizer=False), path)
    assert read_checkpoint(path).training_state.optimizer is None


# Reading what is wrong


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
    "biases not told": (edit("model_args", "bias", False), r"got unknown 'transformer\.h\.0\.ln_1\.bias'"),
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
        "one floating dtype, got .*'torch.int64'",
    ),
    "one half tensor": (
        edit("model", LN, torch.ones(32).half()),
        "one floating dtype, got 'torch.float16', 'torch.fl",
    ),
    "sparse tensor": (
        edit("model", LN, torch.ones(32).to_sparse()),
        f"{LN}: expected a dense tensor, got torch.sparse",
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
    with pytest.raises(CheckpointError, match=r"expected all tensors of one floating dtype, got 'torch.int64'"):
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
        ({}, "dict of 0 other keys"),
        ({"model_state_dict": {}, "epoch": 3}, "dict of 2 other keys"),
        (torch.ones(3), "Tensor"),
        (None, "NoneType"),
    ],
    ids=str,
)
def test_read_other_contents_is_refused(tmp_path, other, found):
    path = save(other, tmp_path)
    message = f"{path}: not a nanoGPT checkpoint: expected a dict with 'model' and 'model_args', got {found}; give"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_checkpoint(path)


def test_read_bare_state_dict_is_refused(contents, tmp_path):
    with pytest.raises(
        CheckpointError, match="expected a dict with 'model' and 'model_args', got dict of 29 other keys"
    ):
        read_checkpoint(save(contents["model"], tmp_path))


class Malicious:
    """Makes a folder as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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


# Writing what nanoGPT could not hold


def change_tensor(checkpoint, name, tensor):
    return replace(checkpoint, state_dict={**checkpoint.state_dict, name: tensor})


def change_state(checkpoint, **values):
    return replace(checkpoint, training_state=replace(checkpoint.training_state, **values))


Sizes = namedtuple("Sizes", "width height")


def assert_write_refused(checkpoint, folder, message):
    path = folder / "refused.pt"
    with pytest.raises(ConversionError, match=message) as caught:
        write_checkpoint(checkpoint, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert not path.exists()


def test_write_untied_head_is_refused(checkpoint, tmp_path):
    untied = change_tensor(checkpoint, HEAD, checkpoint.state_dict[WTE] + 1)
    assert_write_refused(untied, tmp_path, r"lm_head\.weight: expected the numbers of transformer\.wte\.weight")


def test_write_equal_but_separate_head_is_accepted(checkpoint, tmp_path):
    separate = change_tensor(checkpoint, HEAD, checkpoint.state_dict[WTE].clone())
    write_checkpoint(separate, tmp_path / "out.pt")
    assert_same(read_checkpoint(tmp_path / "out.pt").state_dict, checkpoint.state_dict)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (LN, torch.ones(33), r"expected \(32,\), got \(33,\)"),
        (LN, torch.ones(32).half(), "one floating dtype"),
        (LN, torch.ones(32, dtype=torch.int64), "one floating dtype"),
        (LN, None, "NoneType"),
        (LN, torch.ones(32).to("meta"), "meta"),
        (LN, torch.ones(32).to_sparse(), "sparse"),
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 32, 32), "got unknown 'transformer.h.0.attn.bias'"),
        (f"_orig_mod.{LN}", torch.ones(32), "got unknown '_orig_mod.transformer"),
    ],
    ids=["shape", "half", "int", "None", "meta", "sparse", "mask buffer", "prefix"],
)
def test_write_wrong_tensor_is_refused(checkpoint, tmp_path, name, tensor, message):
    assert_write_refused(change_tensor(checkpoint, name, tensor), tmp_path, message)


def test_write_missing_tensor_is_refused(checkpoint, tmp_path):
    del checkpoint.state_dict[LN]
    assert_write_refused(checkpoint, tmp_path, f"model: missing '{LN}'; not written")


def test_write_wrong_model_args_is_refused(checkpoint, tmp_path):
    wrong = replace(checkpoint, model_args={**checkpoint.model_args, "n_head": 3})
    assert_write_refused(wrong, tmp_path, "n_embd: expected a multiple of n_head")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", {"out_dir": Path("out")}),
        ("config", {"get_lr": lambda step: 1e-3}),
        ("config", {"sizes": [Sizes(1, 2)]}),
        ("config", {"counts": defaultdict(int, a=1)}),
        ("config", {Path("out"): 1}),
        ("config", None),
        ("iter_num", 7.5),
        ("iter_num", None),
        ("best_val_loss", None),
        ("best_val_loss", "2.5"),
    ],
)
def test_write_training_state_that_could_not_be_read_is_refused(checkpoint, tmp_path, name, value):
    assert_write_refused(change_state(checkpoint, **{name: value}), tmp_path, name)


# The shapes of parameters 0 and 1 are those of wte and wpe; 10 to 27 are the vectors.
GROUPS = [{"params": list(range(10))}, {"params": list(range(10, 28))}]
OPTIMIZERS = {
    "not a state dict": ({}, "expected a torch.optim.AdamW state dict"),
    "no groups": (
        {"state": {}, "param_groups": []},
        "expected two groups, parameters 0 to 9 and 10 to 27, got .* of \\[\\]",
    ),
    "one group": ({"state": {}, "param_groups": GROUPS[:1]}, r"10 to 27, got groups of \[10\]"),
    "groups swapped": ({"state": {}, "param_groups": GROUPS[::-1]}, r"10 to 27, got groups of \[18, 10\]"),
    "moment of other shape": (
        {"state": {0: {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(65, 32)}}, "param_groups": GROUPS},
        r"exp_avg of parameter 0: expected \(65, 32\), got \(3,\)",
    ),
    "moments of no parameter": (
        {"state": {28: {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}}, "param_groups": GROUPS},
        r"exp_avg of parameter 28: expected none, got \(3,\)",
    ),
    "no second moment": (
        {"state": {0: {"exp_avg": torch.ones(65, 32)}}, "param_groups": GROUPS},
        "optimizer: expected",
    ),
    "group is no dict": ({"state": {}, "param_groups": [1]}, "optimizer: expected"),
    "group without params": ({"state": {}, "param_groups": [{}]}, "optimizer: expected"),
    "params is a number": ({"state": {}, "param_groups": [{"params": 3}]}, "optimizer: expected"),
    "state is a list": ({"state": [], "param_groups": GROUPS}, "optimizer: expected"),
    "state of a parameter is a number": ({"state": {0: 5}, "param_groups": GROUPS}, "optimizer: expected"),
    "setting of another class": (
        {"state": {}, "param_groups": [{**group, "lr": Path("lr.txt")} for group in GROUPS]},
        "optimizer.* expected plain Python types, got ",
    ),
    "moment is a number": ({"state": {0: {"exp_avg": 1}}, "param_groups": GROUPS}, "optimizer: expected"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_write_wrong_optimizer_is_refused(checkpoint, tmp_path, name):
    optimizer, message = OPTIMIZERS[name]
    assert_write_refused(change_state(checkpoint, optimizer=optimizer), tmp_path, message)


def test_write_optimizer_with_many_faults_stays_short(checkpoint, tmp_path):
    wrong = {index: {"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)} for index in range(28)}
    optimizer = {"state": wrong, "param_groups": GROUPS}
    assert_write_refused(change_state(checkpoint, optimizer=optimizer), tmp_path, r"\(56 in all\)")


def test_write_optimizer_in_another_order_is_refused(checkpoint, tmp_path):
    """Moments in the order of named_parameters, which nanoGPT does not use: the first two fit, the third does not."""
    moments = list(checkpoint.training_state.optimizer["state"].values())
    state = dict(enumerate(moments[:2] + moments[10:] + moments[2:10]))
    optimizer = {**checkpoint.training_state.optimizer, "state": state}
    message = r"exp_avg of parameter 2: expected \(96, 32\), got \(32,\)"
    assert_write_refused(change_state(checkpoint, optimizer=optimizer), tmp_path, message)


def test_write_refused_leaves_the_old_file(checkpoint, tmp_path):
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(ConversionError, match="not written"):
        write_checkpoint(change_tensor(checkpoint, HEAD, checkpoint.state_dict[WTE] + 1), tmp_path / "ckpt.pt")
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_write_without_room_leaves_the_old_file(checkpoint, tmp_path):
    path = tmp_path / "ckpt.pt"
    before = path.read_bytes()
    with limit_file_size(100_000), pytest.raises(CheckpointError, match=r"cannot be written: .*untouched, .*has room"):
        write_checkpoint(checkpoint, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
