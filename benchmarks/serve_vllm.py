"""Compares vLLM's greedy tokens with our own, in float32 on a CPU, and times it against our generate.

The bundled demo checkpoint is converted to a folder, and vLLM serves it twice: with the folder's own code and
trust_remote_code, in an environment without this package, and with this package's plugin and no trust. Each continues
20 prompts, of 1 to block_size - 1 tokens, up to block_size. The same is done for a model with features that the demo
lacks and, as text, for the OpenAI server. A position table shifted by one row shows that the comparison can fail. Then
vLLM's offline engine and our generate continue the same prompts in turns, with the same number of threads.

Run: make vllm, which installs vLLM; or python benchmarks/serve_vllm.py [--rounds 5] [--sizes demo 124m]
The last line is one JSON object: equal prompts, tokens/s, ratios, versions and threads. The exit code is 1 if a check
fails.
"""

import argparse
import functools
import signal
import statistics
import sys
import tempfile
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Target, print_result, print_table
from transformers import AutoTokenizer
from transformers.utils import logging
from vllm_processes import Engine, Place, Server, open_engine, open_server

from hugging_nano_gpt import NanoGPTConfig, NanoGPTLMHeadModel, convert_to_folder
from hugging_nano_gpt.demo import CKPT_PATH, META_PATH

N_PROMPTS = 20
CONCURRENCY = 16
PROMPT_LENGTH = 16  # of the timed prompts
NEW_TOKENS = {"demo": 100, "124m": 64}

LARGE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "bias": False}
TOY = {**LARGE, "n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 64, "bias": True}

# Largest |difference| of a log-probability, because kernels and the order of float32 sums differ; measured: 2e-5.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class Case:
    """A model to compare vLLM with.

    Args:
        name: Prefix of the figures' names.
        model: Our model.
        folder: Where it is saved.
        prompts: Token ids, 1 to block_size - 1 of them; each prompt is continued to block_size.
    """

    name: str
    model: NanoGPTLMHeadModel
    folder: Path
    prompts: list[list[int]]

    @property
    def counts(self) -> list[int]:
        """The number of new tokens for each prompt."""
        return [self.model.config.block_size - len(prompt) for prompt in self.prompts]

    @functools.cached_property
    def continued(self) -> list[torch.Tensor]:
        """The prompts continued by our generate, one by one: (block_size,) int64 each."""
        return [
            self.model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)[0]
            for prompt, count in zip(self.prompts, self.counts, strict=True)
        ]


@torch.no_grad()
def main() -> None:
    """Checks, times, and prints the results."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that vLLM's processes end too
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(1337)
    with tempfile.TemporaryDirectory() as work_dir:
        place = Place(args.venv.absolute(), args.venv.absolute() / "plugin", Path(work_dir))
        demo = make_demo(place)
        targets = [
            *check_engine(place, demo, with_plugin=False),
            *check_engine(place, demo, with_plugin=True),
            *check_engine(place, make_toy(place), with_plugin=False),
            *check_server(place, demo, with_plugin=False),
            *check_server(place, demo, with_plugin=True),
        ]
        figures = {target.name: target.value for target in targets}
        for size in args.sizes:
            model, folder = (demo.model, demo.folder) if size == "demo" else make_model(place, size, 4, **LARGE)
            figures |= time_model(size, place, model, folder, args.rounds)
    print_result({"benchmark": "serve_vllm", "rounds": args.rounds, **figures}, targets)
    sys.exit(not all(target.is_met for target in targets))


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm", help="vLLM's environment (.venv-vllm)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each size (default 5)")
    parser.add_argument("--sizes", nargs="*", choices=NEW_TOKENS, default=["demo", "124m"], help="what is timed")
    args = parser.parse_args()
    if not (args.venv / "plugin").is_dir():
        parser.error(f"{args.venv}: expected vLLM's environment, with this package in its plugin/; run: make vllm")
    return args


def make_demo(place: Place) -> Case:
    """Converts the bundled checkpoint; the prompts are the starts of 20 texts that it writes."""
    folder = place.work_dir / "demo"
    model = convert_to_folder(CKPT_PATH, folder, meta_path=META_PATH).model
    lengths = list_lengths(model)
    newlines = torch.zeros(N_PROMPTS, 1, dtype=torch.long)
    texts = model.generate(newlines, max_new_tokens=max(lengths), do_sample=True)[:, 1:]
    return Case("demo", model, folder, [text[:n].tolist() for text, n in zip(texts, lengths, strict=True)])


def make_toy(place: Place) -> Case:
    """Makes a model with features that the demo lacks: biases, tanh GELU, an untied output layer, heads of 64."""
    model, folder = make_model(place, "toy", 10, **TOY, activation_function="gelu_new", tie_word_embeddings=False)
    prompts = [torch.randint(model.config.vocab_size, (length,)).tolist() for length in list_lengths(model)]
    return Case("toy", model, folder, prompts)


def make_model(place: Place, name: str, scale: int, **settings: Any) -> tuple[NanoGPTLMHeadModel, Path]:
    """Makes and saves a model with random weights, so large that tokens vary and no two logits are nearly equal."""
    model = NanoGPTLMHeadModel(NanoGPTConfig(**settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(scale)
        else:  # norms and biases, around their usual values
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(place.work_dir / name)
    return model, place.work_dir / name


def list_lengths(model: NanoGPTLMHeadModel) -> list[int]:
    """Lists the lengths of the prompts, evenly spaced from 1 to block_size - 1."""
    longest = model.config.block_size - 1
    return [1 + index * (longest - 1) // (N_PROMPTS - 1) for index in range(N_PROMPTS)]


def check_engine(place: Place, case: Case, *, with_plugin: bool) -> list[Target]:
    """Compares the offline engine with our model, and checks whose code ran and that a fault is found."""
    name = f"{case.name}_{'plugin' if with_plugin else 'remote'}"
    package = "hugging_nano_gpt" if with_plugin else "transformers_modules"
    with open_engine(place, case.folder, with_plugin=with_plugin) as engine:
        facts = engine.ask("describe")
        is_right_code = facts["model_class"].startswith(f"{package}.") and facts["has_package"] == with_plugin
        n_equal, difference = compare_engine(engine, case)
        engine.ask("shift_positions")
        n_equal_shifted, _ = compare_engine(engine, case)
    return [
        Target(f"{name}_is_code_of_{package}", is_right_code, 1, is_minimum=True),
        Target(f"{name}_equal_prompts", n_equal, N_PROMPTS, is_minimum=True),
        Target(f"{name}_logprob_difference", difference, TOLERANCE),
        Target(f"{name}_equal_prompts_with_positions_shifted", n_equal_shifted, N_PROMPTS // 2),
    ]


def compare_engine(engine: Engine, case: Case) -> tuple[int, float]:
    """Returns how many prompts the engine continues as we do, and the largest difference of log-probabilities."""
    answer = engine.ask("generate", prompts=case.prompts, max_tokens=case.counts, with_logprobs=True)
    n_equal, difference = 0, 0.0
    for ours, count, tokens, logprobs in zip(
        case.continued, case.counts, answer["tokens"], answer["logprobs"], strict=True
    ):
        if ours[-count:].tolist() == tokens:
            n_equal += 1
            expected = case.model(ours[None]).logits[0, -count - 1 : -1].log_softmax(-1).amax(-1)
            difference = max(difference, (expected - torch.tensor(logprobs)).abs().max().item())
    return n_equal, difference


def check_server(place: Place, case: Case, *, with_plugin: bool) -> list[Target]:
    """Compares the OpenAI server's answers to concurrent clients, and checks that it refuses too long a prompt."""
    name = f"{case.name}_{'plugin' if with_plugin else 'remote'}_server"
    decode = AutoTokenizer.from_pretrained(case.folder).decode
    texts = [decode(prompt) for prompt in case.prompts]
    expected = [decode(ours[-count:]) for ours, count in zip(case.continued, case.counts, strict=True)]
    with open_server(place, case.folder, with_plugin=with_plugin) as server:
        with ThreadPoolExecutor(CONCURRENCY) as clients:
            answers = list(clients.map(server.complete, texts, case.counts))
        status = ask_too_much(server, texts[-1] + expected[-1])
    n_equal = sum(answer == text for answer, text in zip(answers, expected, strict=True))
    return [
        Target(f"{name}_equal_texts", n_equal, N_PROMPTS, is_minimum=True),
        Target(f"{name}_refuses_a_full_context", status == 400, 1, is_minimum=True),
    ]


def ask_too_much(server: Server, text: str) -> int:
    """Requests one token after a text of block_size tokens; returns the HTTP status."""
    try:
        server.complete(text, 1)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def time_model(size: str, place: Place, model: NanoGPTLMHeadModel, folder: Path, rounds: int) -> dict[str, Any]:
    """Times the offline engine and our generate in turns, prints a table, and returns the figures.

    vLLM is timed with our number of threads, and with its own choice, which leaves a core to its other processes.
    """
    figures: dict[str, Any] = {}
    rows = []
    for binding in ("nobind", "auto"):
        with open_engine(place, folder, with_plugin=True, binding=binding) as engine:
            facts = engine.ask("describe")
            figures |= {**facts["versions"], f"vllm_threads_{size}_{binding}": facts["threads"]}
            for concurrency in (1, CONCURRENCY):
                prompts = torch.randint(model.config.vocab_size, (concurrency, PROMPT_LENGTH))
                vllm, ours, are_equal = time_both(engine, model, prompts, NEW_TOKENS[size], rounds)
                ratio = statistics.median(theirs / mine for theirs, mine in zip(vllm, ours, strict=True))
                row = (concurrency, facts["threads"], statistics.median(vllm), statistics.median(ours), ratio)
                rows.append((size, *row))
                key = f"{size}_{concurrency}_{binding}"
                figures |= {f"vllm_tokens_per_s_{key}": round(row[2], 1), f"ours_tokens_per_s_{key}": round(row[3], 1)}
                figures |= {f"vllm_to_ours_{key}": round(ratio, 3), f"are_tokens_equal_{key}": are_equal}
    print()
    print_table(("tokens/s", "at once", "vLLM's threads", "vLLM", "ours", "vLLM / ours"), rows)
    return figures


def time_both(
    engine: Engine, model: NanoGPTLMHeadModel, prompts: torch.Tensor, count: int, rounds: int
) -> tuple[list[float], list[float], bool]:
    """Returns vLLM's and our tokens/s of each round after a warm-up, and whether the tokens are equal."""
    request = {"prompts": prompts.tolist(), "max_tokens": [count] * len(prompts), "with_logprobs": False}
    vllm, ours = [], []
    for _ in range(1 + rounds):
        answer = engine.ask("generate", **request)
        vllm.append(len(prompts) * count / answer["seconds"])
        with engine.pause():
            start = time.perf_counter()
            tokens = model.generate(prompts, max_new_tokens=count, do_sample=False)
            ours.append(len(prompts) * count / (time.perf_counter() - start))
    return vllm[1:], ours[1:], tokens[:, PROMPT_LENGTH:].tolist() == answer["tokens"]


if __name__ == "__main__":
    main()
