"""Measures prepare_data against nanoGPT's own prepare.py, on a local text: time, peak memory, and the same bytes.

The text is the source code of Python's library, repeated. "char" is data/shakespeare_char, "gpt2" data/shakespeare.
GPT-2's encoding may not be on this machine, so both programs get one of the same size and pattern, which `tokenizers`
trains on the text first. NANOGPT_DIR names a checkout of karpathy/nanoGPT.

Each run is in a fresh process, after the imports; the programs take turns. Memory is the growth of the peak resident
set. Both must write the same bytes. Then prepare_data alone reads a text of --memory-mb.

Run: NANOGPT_DIR=... python benchmarks/prepare.py [--mb 50] [--memory-mb 2000] [--rounds 3]; the files
are in TMPDIR. The last line is one JSON object.
"""

import argparse
import contextlib
import io
import os
import pickle
import runpy
import statistics
import sys
import sysconfig
import tempfile
import time
import types
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import tiktoken
from common import Target, print_result, print_table, read_resident_bytes, reset_peak_bytes, run_in_child
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import hugging_nano_gpt.tokenization.bpe as bpe
from hugging_nano_gpt import prepare_data

DATA_SETS = {"char": "shakespeare_char", "gpt2": "shakespeare"}
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_TOKENS = 50257


def main() -> None:
    """Writes the text and the encoding, measures both programs in turn, and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, default=50, help="megabytes of text (default 50)")
    parser.add_argument(
        "--memory-mb", type=int, default=2000, help="megabytes of the text that is read for its memory"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program (default 3)")
    parser.add_argument(
        "--num-proc", type=int, default=2, help="threads of prepare_data in its second way (default 2)"
    )
    args = parser.parse_args()
    if "NANOGPT_DIR" not in os.environ:
        raise SystemExit("NANOGPT_DIR: expected the folder of a checkout of karpathy/nanoGPT, got none; set it")
    figures = {"benchmark": "prepare", "mb": args.mb, "memory_mb": args.memory_mb, "rounds": args.rounds}
    targets = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "input.txt", args.mb)
        run_in_child(train_encoding, folder)
        for tokenizer in DATA_SETS:
            found = compare(folder, tokenizer, args.rounds)
            figures |= {f"{tokenizer}_{key}": value for key, value in found.items()}
            targets.append(Target(f"{tokenizer}_time_ratio", found["time_ratio"], 1))
        write_text(folder / "input.txt", args.memory_mb)
        for tokenizer in DATA_SETS:
            sample = run_in_child(measure, partial(run_ours, folder, tokenizer))
            figures[f"{tokenizer}_large_peak_mb"] = round(sample["peak_bytes"] / 1e6)
            print(f"{tokenizer}: {args.memory_mb} MB in {sample['time_s']:.1f} s, {sample['peak_bytes'] / 1e6:.0f} MB")
            targets.append(Target(f"{tokenizer}_large_peak_mb", sample["peak_bytes"] / 1e6, 1000))
    print_result(figures, targets if args.memory_mb >= 2000 else targets[:2])


def compare(folder: Path, tokenizer: str, rounds: int) -> dict[str, float]:
    """Returns medians of the times of both programs, their ratios, and the memory of each."""
    ways = {
        "nanoGPT": partial(run_theirs, folder, tokenizer),
        "ours": partial(run_ours, folder, tokenizer),
        "one_thread": partial(run_ours, folder, tokenizer, num_proc=1),
    }
    samples = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            samples[way].append(run_in_child(measure, run))
    if (folder / "nanoGPT" / "train.bin").read_bytes() != (folder / "ours" / "train.bin").read_bytes():
        raise SystemExit(f"{tokenizer}: expected nanoGPT's bytes, got others")
    times_s = {way: statistics.median(each["time_s"] for each in found) for way, found in samples.items()}
    cpu_s = {way: statistics.median(each["cpu_s"] for each in found) for way, found in samples.items()}
    peaks_mb = {way: max(each["peak_bytes"] for each in found) / 1e6 for way, found in samples.items()}
    rows = [(way, times_s[way], cpu_s[way], peaks_mb[way]) for way in ways]
    print_table((tokenizer, "median s", "processor s", "peak MB"), rows)
    return {
        **{f"{way}_s": round(time_s, 3) for way, time_s in times_s.items()},
        **{f"{way}_cpu_s": round(time_s, 3) for way, time_s in cpu_s.items()},
        **{f"{way}_peak_mb": round(peak_mb) for way, peak_mb in peaks_mb.items()},
        "time_ratio": round(times_s["ours"] / times_s["nanoGPT"], 3),
        "one_thread_cpu_ratio": round(cpu_s["one_thread"] / cpu_s["nanoGPT"], 3),
        "one_thread_time_ratio": round(times_s["one_thread"] / times_s["nanoGPT"], 3),
    }


def measure(run: partial) -> dict[str, float]:
    """Runs a program with the trained encoding instead of GPT-2's; returns its time and how its memory grew."""
    folder = run.args[0]
    encoding = tiktoken.Encoding(**pickle.loads((folder / "encoding.pkl").read_bytes()))
    reset_peak_bytes()
    before = read_resident_bytes("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    with (
        mock.patch.object(tiktoken, "get_encoding", return_value=encoding),
        mock.patch.object(bpe, "try_to_load_from_cache", return_value=None),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        run()
    times_s = {"time_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}
    return {**times_s, "peak_bytes": read_resident_bytes("VmHWM") - before}


def run_theirs(folder: Path, tokenizer: str) -> None:
    """Runs nanoGPT's prepare.py in a folder that has the text already."""
    place = folder / "nanoGPT"
    place.mkdir(exist_ok=True)
    code = (Path(os.environ["NANOGPT_DIR"]) / "data" / DATA_SETS[tokenizer] / "prepare.py").read_text()
    (place / "prepare.py").write_text(code)
    (place / "input.txt").unlink(missing_ok=True)
    (place / "input.txt").hardlink_to(folder / "input.txt")
    with mock.patch.dict(sys.modules, requests=types.ModuleType("requests")):
        runpy.run_path(str(place / "prepare.py"), run_name="__main__")


def run_ours(folder: Path, tokenizer: str, **options: Any) -> None:
    """Runs prepare_data, by default with its own number of threads."""
    prepare_data(folder / "input.txt", folder / "ours", tokenizer=tokenizer, overwrite=True, **options)


def write_text(path: Path, megabytes: int) -> None:
    """Writes the source code of Python's library, repeated to a size."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(source.read_text(encoding="utf-8", errors="ignore") for source in sources).encode()
    path.unlink(missing_ok=True)  # nanoGPT's folder may have a link to it
    with path.open("wb") as file:
        for _ in range(megabytes * 1_000_000 // len(text)):
            file.write(text)
        file.write(text[: megabytes * 1_000_000 % len(text)].decode(errors="ignore").encode())


def train_encoding(folder: Path) -> None:
    """Trains a byte-level BPE of GPT-2's size on the text, and writes the arguments of tiktoken's encoding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=GPT2_TOKENS - 1, initial_alphabet=alphabet, show_progress=False)
    backend.train([str(folder / "input.txt")], trainer)
    spellings = {character: byte for byte, character in enumerate(bpe._spell_bytes())}
    ranks = {bytes(spellings[c] for c in token): rank for token, rank in backend.get_vocab().items()}
    arguments = {"name": "gpt2", "pat_str": PATTERN, "mergeable_ranks": ranks}
    special_tokens = {"<|endoftext|>": len(ranks)}
    (folder / "encoding.pkl").write_bytes(pickle.dumps({**arguments, "special_tokens": special_tokens}))


if __name__ == "__main__":
    main()
