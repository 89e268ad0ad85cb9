"""Damage of every kind to every format: each case loads equal tensors or raises CheckpointError, and runs nothing.

The seed is printed with every failure and can be set: FUZZ_SEED=7 python -m pytest tests/checkpoint/test_fuzz.py
"""

import io
import os
import random
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hugging_nano_gpt import CheckpointError, read_checkpoint
from hugging_nano_gpt.checkpoint.build_nanogpt import GPTConfig

from ..helpers.limits import measure_peak_bytes
from ..helpers.tiny import FIXTURES_DIR, TORCH_VERSION

SEED = int(os.environ.get("FUZZ_SEED", "1337"))
CASES_PER_KIND = 75
LONGEST_S = 5.0
MOST_BYTES = 500e6

FILES = {
    "nanogpt": FIXTURES_DIR / "nanogpt-head-nobias" / "ckpt.pt",
    "nanogpt-2022": FIXTURES_DIR / "nanogpt-2022-12-28-fe804286" / "ckpt.pt",
    "build_nanogpt": FIXTURES_DIR / "build-nanogpt" / "model_05000.pt",
    "mingpt": FIXTURES_DIR / "mingpt" / "model.pt",
    "llmc": FIXTURES_DIR / "llmc" / "gpt2_tiny.bin",
}


class Canary:
    """Pickles to a call that makes a file, in one of several ways."""

    def __init__(self, way, path):
        self.way, self.path = way, str(path)

    def __reduce__(self):
        code = f"open({self.path!r}, 'w').close()"
        return {
            "system": (os.system, (f"touch {self.path}",)),
            "exec": (exec, (code,)),
            "eval": (eval, (f"__import__('pathlib').Path({self.path!r}).touch()",)),
            "open": (open, (self.path, "w")),
            "getattr": (getattr(Path, "touch"), (Path(self.path),)),  # noqa: B009
        }[self.way]


def read(path):
    kwargs = {"n_head": 4} if "mingpt" in path.name else {}
    return read_checkpoint(path, **kwargs)


def try_to_read(path):
    """Returns the tensors, the message of a CheckpointError, or any other exception."""
    try:
        return collect(read(path))
    except CheckpointError as error:
        return str(error)
    except BaseException as error:
        return error


def collect(checkpoint):
    optimizer = checkpoint.training_state.optimizer
    moments = {} if optimizer is None else optimizer.moments
    flat = {f"{name}.{key}": value for name, kept in moments.items() for key, value in kept.items()}
    return {**checkpoint.state_dict, **flat}


def truncate(data, rng) -> bytes:
    return data[: rng.randrange(len(data))]


def flip(data, rng) -> bytes:
    damaged = bytearray(data)
    # llm.c's format has no checksums, so only a fault in its header can be found
    end = 1024 if data[:2] != b"PK" else len(data)
    for _ in range(rng.choice([1, 1, 1, 4])):
        # half of the flips in the structure: the pickle at the front, the directory at the back
        position = rng.choice(
            [rng.randrange(end), rng.randrange(min(end, 4000)), end - 1 - rng.randrange(min(end, 4000))]
        )
        damaged[position] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def splice(data, rng) -> bytes:
    """Overwrites, removes or repeats a range of bytes."""
    start, length = rng.randrange(len(data)), rng.randrange(1, 2000)
    if data[:2] != b"PK":  # see flip: no byte of a weight may change unless the length changes too
        return data[:start] + data[start + length :]
    inserted = rng.choice([b"", rng.randbytes(length), data[start : start + length] * 2])
    return data[:start] + inserted + data[start + length :]


def restructure(data, rng, canary) -> bytes:
    """Changes one value in the header or in the pickle, and writes the file again."""
    if data[:2] != b"PK":
        header = bytearray(data)
        position = 4 * rng.randrange(256)
        number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)])
        header[position : position + 4] = number.to_bytes(4, "little")
        return bytes(header)
    with torch.serialization.safe_globals([(GPTConfig, "__main__.GPTConfig")]):
        contents = torch.load(io.BytesIO(data), weights_only=True)
    spoil = rng.choice([spoil_names, spoil_tensor, spoil_tensor, spoil_entry, plant_canary])
    spoil(contents, contents.get("model", contents), rng, canary)
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


def spoil_names(contents, model, rng, canary):
    name = rng.choice(list(model))
    tensor = model.pop(name)
    if rng.random() < 0.5:
        model[f"{name}{rng.choice(['', 's', '.weight'])}_"] = tensor


def spoil_tensor(contents, model, rng, canary):
    name = rng.choice(list(model))
    tensor = model[name]
    replacements = [
        lambda: tensor[..., :-1],
        lambda: tensor.flatten()[None],
        lambda: torch.zeros(0),
        lambda: tensor.to(rng.choice([torch.int64, torch.bool, torch.complex64, torch.float16, torch.uint8])),
        lambda: torch.full_like(tensor, rng.choice([float("nan"), float("inf")])),
        lambda: tensor[..., :1].expand_as(tensor),
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: tensor.to_sparse() if TORCH_VERSION >= (2, 7) else None,  # torch 2.6 fails at the next load
        lambda: rng.choice([None, 1.5, "x", [tensor], {"a": tensor}]),
    ]
    model[name] = rng.choice(replacements)()


def spoil_entry(contents, model, rng, canary):
    args = contents.get("model_args")
    if args and rng.random() < 0.7:
        args[rng.choice([*args, "rotary"])] = rng.choice([0, -1, 10**9, 2**70, None, "3", 2.5])
    else:
        contents[rng.choice(list(contents))] = rng.choice([3j, "x", [], {}, [[]] * 3])


def plant_canary(contents, model, rng, canary):
    way = rng.choice(["system", "exec", "eval", "open", "getattr"])
    rng.choice([contents, model])[rng.choice([*model, "extra"])] = Canary(way, canary)


def make_cases(data, canary) -> Iterator[tuple[str, bytes]]:
    rng = random.Random(SEED)
    for number in range(CASES_PER_KIND):
        yield f"truncate {number}", truncate(data, rng)
        yield f"flip {number}", flip(data, rng)
        yield f"splice {number}", splice(data, rng)
        yield f"restructure {number}", restructure(data, rng, canary)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore")  # torch and zipfile warn of some kinds of damage
def test_damaged_file_loads_equal_tensors_or_is_refused(kind, tmp_path):
    data = FILES[kind].read_bytes()
    path, canary = tmp_path / FILES[kind].name.replace("model.pt", "mingpt.pt"), tmp_path / "canary"
    path.write_bytes(data)
    expected = collect(read(path))
    peak_before = measure_peak_bytes()
    cases = refused = 0
    for case, damaged in make_cases(data, canary):
        path.write_bytes(damaged)
        where = f"{kind}, {case}, FUZZ_SEED={SEED}"
        start_s = time.monotonic()
        outcome = try_to_read(path)
        assert not isinstance(outcome, BaseException), f"{where}: {type(outcome).__name__}: {outcome}"
        if isinstance(outcome, str):
            assert str(path) in outcome, where
        else:
            assert [name for name in expected if not torch.equal(outcome[name], expected[name])] == [], where
            assert outcome.keys() == expected.keys(), where
        refused += isinstance(outcome, str)
        cases += 1
        assert time.monotonic() - start_s < LONGEST_S, where
        assert not canary.exists(), where
    assert measure_peak_bytes() - peak_before < MOST_BYTES
    assert cases >= 300
    assert refused >= 150


def test_zip_bomb_is_refused_without_being_unpacked(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(300 << 20))
    peak_before = measure_peak_bytes()
    with pytest.raises(CheckpointError, match="compressed record"):
        read_checkpoint(path)
    assert measure_peak_bytes() - peak_before < 50e6
