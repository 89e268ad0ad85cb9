"""Checks that generate gives nanoGPT's tokens on the device in every way, and counts how often it waits for the GPU.

Keys and values from a cache differ from those of a full pass in their last bits. If two tokens are almost equally
likely, that can select the other one. So a row may differ from the reference's only from such a pair on.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hugging_nano_gpt import NanoGPTLMHeadModel
from hugging_nano_gpt.sample.sampling import Sampler

from .probe import Outcome, Probe, Setting, SkippedError, make_batch, make_pair

LIMIT_S = 110.0
NEAR_TIE = 1e-3  # in units of the largest logit
N_TOKENS = {"full": 64, "toy": 8}
N_WAITED = 8
PAST_TOKENS = 12  # this many past block_size; each computes the whole window again


def probe_tokens(setting: Setting, batch: int, **settings: Any) -> Outcome:
    """Compares greedy tokens within block_size with the reference's."""
    is_static = "cache_implementation" in settings  # it is compiled, where more layers only cost time
    ours, reference = make_eval_pair(setting, **({"n_layer": 2} if is_static else {}))
    prompt, _ = make_batch(setting, batch, setting.choose(16, 4), ours.config.vocab_size)
    count = setting.choose(N_TOKENS["full"], N_TOKENS["toy"])
    return compare_tokens(setting, ours, reference, prompt, count, settings)


def probe_past_block_size(setting: Setting, batch: int, **settings: Any) -> Outcome:
    """Compares greedy tokens that start within block_size and end past it."""
    ours, reference = make_eval_pair(setting, n_layer=2)
    prompt, _ = make_batch(setting, batch, ours.config.block_size - PAST_TOKENS, ours.config.vocab_size)
    return compare_tokens(setting, ours, reference, prompt, 2 * PAST_TOKENS, settings)


def probe_padded(setting: Setting) -> Outcome:
    """Compares rows of different lengths, padded on the left, with the same rows alone, within and past block_size."""
    ours, _ = make_eval_pair(setting, n_layer=2)
    block_size, vocab_size = ours.config.block_size, ours.config.vocab_size
    rows = [make_batch(setting, 1, block_size - PAST_TOKENS - 3 * n, vocab_size, seed=n)[0] for n in range(3)]
    longest = rows[0].shape[1]
    padded = torch.cat([nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat([nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows])
    found = ours.generate(padded, attention_mask=mask, max_new_tokens=2 * PAST_TOKENS, do_sample=False)[:, longest:]
    alone = [ours.generate(row, max_new_tokens=2 * PAST_TOKENS, do_sample=False)[0, row.shape[1] :] for row in rows]
    equal = [int((new == expected).all()) for new, expected in zip(found, alone, strict=True)]
    figures = {"rows": len(rows), "rows with the tokens they have alone": sum(equal)}
    return Outcome(all(equal), "a padded row's tokens are those it has alone", figures)


def probe_sampled(setting: Setting) -> Outcome:
    """Samples from one seed with temperature and top_k; without a cache, the tokens equal the reference's."""
    ours, reference = make_eval_pair(setting, n_layer=2)
    prompt, _ = make_batch(setting, 4, 8, ours.config.vocab_size)
    count = setting.choose(N_TOKENS["full"], N_TOKENS["toy"])
    top_k = setting.choose(200, 20)
    torch.manual_seed(11)
    expected = reference.sample(prompt, count, temperature=0.8, top_k=top_k)
    figures = {}
    for name, use_cache in (("without a cache", False), ("cached", True)):
        torch.manual_seed(11)
        found = ours.generate(
            prompt, max_new_tokens=count, do_sample=True, temperature=0.8, top_k=top_k, use_cache=use_cache
        )
        figures[f"{name}: rows equal of {len(prompt)}"] = int((found == expected).all(1).sum())
    is_true = figures[f"without a cache: rows equal of {len(prompt)}"] == len(prompt)
    return Outcome(is_true, "the reference's draws from the same seed", figures)


class Collector:
    """A streamer that collects the tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        pass


def probe_sampler(setting: Setting) -> Outcome:
    """Samples like the command line, against the reference under sample.py's bfloat16 autocast."""
    if not setting.is_cuda:
        raise SkippedError("on a CPU, sample.py does not autocast")
    ours, reference = make_eval_pair(setting, n_layer=2)
    reference.lm_head.register_forward_pre_hook(lambda module, args: (args[0][:, [-1]],))  # as in nanoGPT's generate
    count, settings = setting.choose(N_TOKENS["full"], N_TOKENS["toy"]), {"temperature": 0.8, "top_k": 20}
    n_equal, n_seeds = {"as sample.py": 0, "in float32": 0}, 4
    for seed in range(n_seeds):
        prompt, _ = make_batch(setting, 1, 8, ours.config.vocab_size, seed=seed)
        torch.manual_seed(seed)
        with torch.autocast(torch.device(setting.device).type, dtype=torch.bfloat16):
            expected = reference.sample(prompt, count, **settings)[0].tolist()
        for way, dtype in (("as sample.py", torch.bfloat16), ("in float32", None)):
            torch.manual_seed(seed)
            collector = Collector()
            Sampler(ours, None, dtype).draw(prompt, max_new_tokens=count, streamer=collector, **settings)
            n_equal[way] += collector.tokens == expected
    figures = {f"{way}: draws equal of {n_seeds}": n for way, n in n_equal.items()}
    return Outcome(
        n_equal["as sample.py"] == n_seeds, "the draws of the reference under sample.py's autocast", figures
    )


def make_eval_pair(setting: Setting, **changes: Any) -> tuple[NanoGPTLMHeadModel, nn.Module]:
    """Makes our model and the reference in eval mode."""
    ours, reference = make_pair(setting, **changes)
    return ours.eval(), reference.eval()


def compare_tokens(
    setting: Setting,
    ours: NanoGPTLMHeadModel,
    reference: Any,
    prompt: torch.Tensor,
    count: int,
    settings: dict[str, Any],
) -> Outcome:
    """Compares greedy tokens; where a row first differs, both tokens must be almost equally likely."""
    expected = reference.generate_greedily(prompt, count)
    generate = partial(ours.generate, prompt, max_new_tokens=count, do_sample=False, **settings)
    figures: dict[str, Any] = {}
    found = generate()  # compiles, with a static cache
    if settings.get("cache_implementation") == "static" and setting.is_cuda:
        found, graphs = count_graph_launches(setting, generate)
        figures["CUDA graphs launched a token"] = graphs / count
    gaps = [measure_gap(reference, *rows) for rows in zip(found, expected, strict=True) if not torch.equal(*rows)]
    figures |= {
        "rows": len(prompt),
        "rows equal": len(prompt) - len(gaps),
        "largest gap where one parts": max(gaps, default=0.0),
    }
    return Outcome(
        max(gaps, default=0.0) <= NEAR_TIE, "the reference's greedy tokens, or nearly as likely ones", figures
    )


def count_graph_launches(setting: Setting, run: Callable[[], Any]) -> tuple[Any, int]:
    """Calls a function, and counts the CUDA graphs that it launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        result = run()
        setting.synchronize()
    return result, sum(event.count for event in profiled.key_averages() if "GraphLaunch" in event.key)


@torch.no_grad()
def measure_gap(reference: Any, found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the difference of the logits of the reference's token and ours, in units of the largest logit."""
    where = int((found != expected).nonzero()[0])
    block_size = reference.transformer["wpe"].num_embeddings
    logits = reference(expected[None, max(0, where - block_size) : where])[0][0, -1]
    return float((logits[expected[where]] - logits[found[where]]) / logits.abs().max())


def probe_waits(setting: Setting) -> Outcome:
    """Counts how often generate waits for the GPU for each further token, and where."""
    if not setting.is_cuda:
        raise SkippedError("there is no GPU to wait for")
    ours, _ = make_eval_pair(setting, n_layer=2)
    block_size, vocab_size = ours.config.block_size, ours.config.vocab_size
    short, _ = make_batch(setting, 4, 16, vocab_size)
    long, _ = make_batch(setting, 4, block_size + 1, vocab_size)
    cases: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
        "greedy": (short, {}),
        "drawn": (short, {"do_sample": True}),
        "with a mask": (short, {"is_masked": True}),
        "past block_size": (long, {}),
        "past block_size with a mask": (long, {"is_masked": True}),
        "past block_size with a stride": (long, {"stride": N_WAITED}),
        "static": (short, {"cache_implementation": "static"}),  # last, because it compiles
    }
    figures = setting.figures
    for name, (prompt, settings) in cases.items():
        # Both end at the same length, so they have the same static cache.
        longer = nn.functional.pad(prompt, (N_WAITED, 0), value=1)
        few, many = (
            count_waits(ours, *case, settings) for case in ((longer, 1 + N_WAITED), (prompt, 1 + 2 * N_WAITED))
        )
        figures[f"{name}: waits a token"] = (many.total() - few.total()) / N_WAITED
        extra = many - few
        figures[f"{name}: where"] = ", ".join(f"{place} {n / N_WAITED:g}" for place, n in extra.most_common(4))
    most = max(figures[f"{name}: waits a token"] for name in cases)
    return Outcome(most <= 1.0, "at most one wait for the GPU a token")


def make_mask(prompt: torch.Tensor) -> torch.Tensor:
    """Makes a mask that masks the first two tokens of the first row."""
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    return mask


def count_waits(model: NanoGPTLMHeadModel, prompt: torch.Tensor, count: int, settings: dict[str, Any]) -> Counter[str]:
    """Counts the waits for the GPU while tokens are generated, by file and line."""
    arguments = {"do_sample": False, **settings, "max_new_tokens": count}
    if arguments.pop("is_masked", False):
        arguments["attention_mask"] = make_mask(prompt)
    model.generate(prompt, **arguments)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model.generate(prompt, **arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "called a synchronizing" in str(each.message)]
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in waits)


PROBES: dict[str, Probe] = {
    "batch 1": partial(probe_tokens, batch=1),
    "batch 32": partial(probe_tokens, batch=32),
    "past block_size, batch 1": partial(probe_past_block_size, batch=1),
    "past block_size, batch 32": partial(probe_past_block_size, batch=32),
    "padded rows": probe_padded,
    "drawn": probe_sampled,
    "as sample.py draws": probe_sampler,
    "waits for the GPU": probe_waits,
    "static cache": partial(probe_tokens, batch=1, cache_implementation="static"),
    "static cache, batch 32": partial(probe_tokens, batch=32, cache_implementation="static"),
    "static, past block_size": partial(probe_past_block_size, batch=1, cache_implementation="static"),
}
