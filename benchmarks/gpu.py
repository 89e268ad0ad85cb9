"""Checks on a GPU that the numbers are nanoGPT's, and measures the speed: one command, eight minutes.

Each part is a list of probes (gpu_parts/), the most important part first. A probe is ok, failed or skipped, and says
why. A failing probe does not stop the others. A part has failed if one of its probes has failed, and is skipped if all
are skipped. Each part and the whole run have time limits; a probe that is still running then is stopped and fails.

Needs torch, transformers, numpy, safetensors, and accelerate for the part "trainer"; the package itself need not be
installed. Nothing is downloaded. With --device cpu the same probes run at toy size.

Run: PYTHONPATH=. python benchmarks/gpu.py [--device cuda] [--only exactness,speed] [--time-limit 480]
     [--output gpu.json]
The last line is one JSON object; --output is rewritten after each probe, so that an interrupted run leaves one too.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import describe_machine
from gpu_parts import attention, decoding, exactness, speed, training
from gpu_parts.probe import Probe, Setting, SkippedError
from transformers.utils import logging

# The most important first, because a short time limit skips the last ones.
PARTS = {"exactness": exactness, "attention": attention, "generate": decoding, "speed": speed, "trainer": training}
TIME_LIMIT_S = 480.0
LONGEST_NOTE = 110


class TimeOverError(BaseException):
    """Raised when the time is over. Not an Exception, because torch.compile and others would catch that."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts and prints the results; returns 1 if anything failed."""
    args = parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch.use_deterministic_algorithms needs it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    setting = Setting(args.device, is_toy=args.size == "toy", has_children=not args.in_process)
    report: dict[str, Any] = {
        "benchmark": "gpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: value for name, value in vars(args).items() if name != "output"},
        **describe_machine(args.device),
        "parts": {},
    }
    end = time.monotonic() + args.time_limit
    for name in args.only:
        report["parts"][name] = {"verdict": "skipped", "probes": {}}
        run_part(name, setting, end, report, args.output)
    print("".join(f"\n{name:<12}{part['verdict']:<9}{part['why']}" for name, part in report["parts"].items()))
    print(json.dumps(report), flush=True)
    return int(any(part["verdict"] == "failed" for part in report["parts"].values()))


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, mps or cpu")
    parser.add_argument("--size", choices=("full", "toy"), help="full (default on CUDA) or toy (elsewhere)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them (default all)")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds in all (default 480)")
    parser.add_argument("--in-process", action="store_true", help="skip probes that need their own process")
    parser.add_argument("--output", type=Path, help="file for the JSON object")
    args = parser.parse_args(arguments)
    args.only = args.only.split(",")
    args.size = args.size or ("full" if args.device.startswith("cuda") else "toy")
    if unknown := [name for name in args.only if name not in PARTS]:
        parser.error(f"--only: expected parts of {', '.join(PARTS)}, got {', '.join(unknown)}")
    return args


def run_part(name: str, setting: Setting, end: float, report: dict[str, Any], output: Path | None) -> None:
    """Runs the probes of a part within its time limit, and writes the results to the report."""
    part, start = report["parts"][name], time.monotonic()
    end = min(end, start + PARTS[name].LIMIT_S)
    print(f"\n{name}", flush=True)
    for probe_name, probe in PARTS[name].PROBES.items():
        result = run_probe(probe, setting, end - time.monotonic(), is_lost=report.get("is_device_lost", False))
        part["probes"][probe_name] = result
        report["is_device_lost"] = result.pop("is_device_lost")
        print_probe(probe_name, result)
        verdicts = [each["verdict"] for each in part["probes"].values()]
        part["verdict"] = next((each for each in ("failed", "ok") if each in verdicts), "skipped")
        part["why"] = ", ".join(f"{verdicts.count(each)} {each}" for each in dict.fromkeys(verdicts))
        part["seconds"] = round(time.monotonic() - start, 1)
        if output is not None:
            output.write_text(json.dumps(report, indent=1))


def run_probe(probe: Probe, setting: Setting, seconds: float, is_lost: bool = False) -> dict[str, Any]:
    """Runs a probe; returns its verdict, the reason, seconds, figures, and whether the device is lost."""
    result: dict[str, Any] = {
        "verdict": "skipped",
        "why": "",
        "seconds": 0.0,
        "figures": {},
        "is_device_lost": is_lost,
    }
    if is_lost:
        return {**result, "why": "an earlier probe left the GPU unusable in this process"}
    if seconds <= 0:
        return {**result, "why": "no time was left"}
    start, setting = time.monotonic(), replace(setting, seconds=seconds, figures=result["figures"])
    try:
        with limit_time(seconds):
            outcome = probe(setting)
        result |= {"verdict": "ok" if outcome.is_true else "failed", "why": outcome.claim}
        result["figures"] |= outcome.figures
    except SkippedError as reason:
        result["why"] = str(reason)
    except TimeOverError:
        result |= {"verdict": "failed", "why": f"not finished when {seconds:.0f} s were over"}
    except Exception as error:
        message = next(iter(str(error).splitlines()), "")
        result |= {"verdict": "failed", "why": f"{type(error).__name__}: {message}", "trace": traceback.format_exc()}
    result["seconds"] = round(time.monotonic() - start, 2)
    return {**result, "is_device_lost": not tidy_up(setting)}


@contextlib.contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raises TimeOverError in the block when the time is over, if the system has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeOverError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tidy_up(setting: Setting) -> bool:
    """Frees what a probe left, resets what it may have set, and returns whether the device still works."""
    torch.use_deterministic_algorithms(False)
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"  # Trainer turns TF32 on for the whole process
    torch.compiler.reset()
    gc.collect()
    try:
        if setting.is_cuda:
            torch.cuda.set_sync_debug_mode("default")
        setting.synchronize()
        if setting.device != "cpu":
            torch.get_device_module(setting.device).empty_cache()
    except RuntimeError:  # after a device-side assert every call raises it again
        return False
    return True


def print_probe(name: str, result: dict[str, Any]) -> None:
    """Prints a probe's verdict and its claim, and the figures below."""
    print(f"  {name:<26}{result['verdict']:<9}{result['seconds']:>7.1f} s  {result['why'][:LONGEST_NOTE]}")
    for figure, value in result["figures"].items():
        print(f"      {figure:<47} {value:.4g}" if isinstance(value, float) else f"      {figure:<47} {value}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
