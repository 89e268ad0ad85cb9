"""What the tests share: a tiny checkpoint as train.py writes it, exact comparison, limits of time and disk."""

import contextlib
import copy
import gc
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hugging_nano_gpt import Checkpoint, ConversionError, NanoGPTLMHeadModel, read_checkpoint, write_checkpoint

from .helpers.tiny import MODEL_ARGS


@pytest.fixture(scope="module", autouse=True)
def keep_what_is_loaded():
    """Excludes loaded objects from garbage collection, which Trainer and torch call often: half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def two_threads():
    """The recorded run was made with two threads; with one, sums are added in another order (4e-7)."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_contents() -> dict[str, Any]:
    return make_contents()


@pytest.fixture
def contents(shared_contents) -> dict[str, Any]:
    """A copy that each test may change; a new AdamW step would take 20 times as long."""
    return copy.deepcopy(shared_contents)


@pytest.fixture
def checkpoint(contents, tmp_path) -> Checkpoint:
    return read_checkpoint(save(contents, tmp_path))


@pytest.fixture
def model(checkpoint):
    """A toy model with a training state in which no value is a default."""
    model = NanoGPTLMHeadModel.from_nanogpt_ckpt(checkpoint.path)
    checkpoint.path.unlink()  # tests check the other files in the folder
    return model


def make_contents(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Makes the dict that train.py saves, after one AdamW step; written out here to be independent of the package."""
    torch.manual_seed(0)
    C, T, V = MODEL_ARGS["n_embd"], MODEL_ARGS["block_size"], MODEL_ARGS["vocab_size"]
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for layer in range(MODEL_ARGS["n_layer"]):
        linear = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shapes[f"transformer.h.{layer}.{name}.weight"] = linear.get(name, (C,))
            shapes[f"transformer.h.{layer}.{name}.bias"] = linear.get(name, (C,))[:1]
    shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    model = {name: torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for name, shape in shapes.items()}

    decayed, others = [p for p in model.values() if p.ndim >= 2], [p for p in model.values() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-4)  # 1e-8 is 0 in float16
    for parameter in model.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    state_dict = {name: parameter.detach() for name, parameter in model.items()}
    state_dict["lm_head.weight"] = state_dict["transformer.wte.weight"]
    return {
        "model": state_dict,
        "optimizer": optimizer.state_dict(),
        "model_args": dict(MODEL_ARGS),
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out", "learning_rate": 1e-3, "compile": True, "init_from": "scratch", "seeds": [1, 2]},
    }


def save(contents: Any, folder: Path) -> Path:
    """Writes contents as train.py does; returns the path."""
    path = folder / "ckpt.pt"
    torch.save(contents, path)
    return path


def assert_same(left: Any, right: Any) -> None:
    """Asserts that two trees have the same types, keys, order and values, and tensors with the same bits."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert torch.equal(as_bytes(left), as_bytes(right))
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for left_item, right_item in zip(left, right, strict=True):
            assert_same(left_item, right_item)
    else:
        assert left == right


def assert_write_refused(checkpoint: Checkpoint, folder: Path, message: str) -> None:
    """Asserts that a checkpoint is refused with a message that starts with the path, and that nothing is written."""
    path = folder / "refused.pt"
    with pytest.raises(ConversionError, match=message) as caught:
        write_checkpoint(checkpoint, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert not path.exists()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@contextlib.contextmanager
def limit_time(seconds: float):
    """Fails the test if the block takes longer, also while it waits for the system; not on Windows."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        pytest.fail(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def limit_file_size(size_bytes: int):
    """Makes the system refuse to let a file grow past a size, like a full disk."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def measure_peak_bytes() -> int:
    """Returns the largest amount of memory that this process has used."""
    resource = pytest.importorskip("resource", reason="Windows does not count it")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
