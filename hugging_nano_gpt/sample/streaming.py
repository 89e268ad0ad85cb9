"""Text while it is generated, token by token, with the probabilities that each token was sampled from.

The model samples in a thread of its own, as sample_text does and with the same random numbers. A slow reader does not
slow the model down; one that leaves stops it.
"""

import queue
import threading
from collections.abc import Generator
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .sampling import Sampler

# torch's random numbers belong to the whole process: one text at a time, or each would change the other.
_DRAWING = threading.Lock()


@dataclass(frozen=True)
class Step:
    """A token that was sampled, and the probabilities.

    Args:
        idx: The ids of the prompt and of all sampled tokens.
        probabilities: (V,) float32, of the last token, after temperature and top_k.
    """

    idx: list[int]
    probabilities: torch.Tensor


@dataclass(frozen=True)
class Candidate:
    """A token that could have been sampled.

    Args:
        token: Its text, with visible signs for spaces and for characters that do not print.
        probability: Its probability, after temperature and top_k.
        is_drawn: Whether it was sampled.
    """

    token: str
    probability: float
    is_drawn: bool


def stream_steps(
    sampler: Sampler,
    prompt: str = "\n",
    *,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 1337,
) -> Generator[Step, None, None]:
    """Generates one sample, the first one of sample_text, and yields after each token.

    Closing the iterator stops the model at its next token.

    Args:
        sampler: Model and tokenizer.
        prompt: Text to continue.
        max_new_tokens: Most tokens, past block_size too.
        temperature: Divides the logits; more than 0.
        top_k: Number of likeliest tokens to choose among, 0 for all.
        seed: Of the random numbers.

    Raises:
        TokenizerError: If the prompt has what the tokenizer does not know.
    """
    idx = sampler.encode(prompt)
    results: queue.SimpleQueue[Step | BaseException | None] = queue.SimpleQueue()
    is_wanted = threading.Event()
    is_wanted.set()
    recorder = _Recorder()
    stopping = StoppingCriteriaList([_Sender(recorder, results, is_wanted)])

    def draw() -> None:
        try:
            with _DRAWING:
                if is_wanted.is_set():
                    sampler.seed(seed)
                    sampler.draw(
                        idx,
                        max_new_tokens=max_new_tokens,
                        temperature=temperature,
                        top_k=top_k,
                        observe=recorder,
                        stopping_criteria=stopping,
                    )
            results.put(None)
        except BaseException as error:  # it is raised where the steps are read
            results.put(error)

    threading.Thread(target=draw, name="hugging-nano-gpt drawing", daemon=True).start()
    try:
        while (result := results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        is_wanted.clear()


def list_candidates(step: Step, tokenizer: PreTrainedTokenizerBase, limit: int = 10) -> list[Candidate]:
    """Lists the likeliest tokens of a step and the one that was sampled, the likeliest first."""
    probabilities, drawn = step.probabilities, step.idx[-1]
    likeliest = probabilities.topk(min(limit, len(probabilities))).indices.tolist()
    ids = [index for index in likeliest if probabilities[index] > 0]
    ids += [] if drawn in ids else [drawn]
    return [Candidate(_spell(tokenizer, index), probabilities[index].item(), index == drawn) for index in ids]


def _spell(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """Returns a token's text with a sign for each space and escapes for what does not print, or else its id."""
    text = tokenizer.decode([index])
    if not text or "\ufffd" in text:  # a row without a token, or a piece of a character
        return f"#{index}"
    signs = {" ": "\u2423"}
    return "".join(signs.get(c, c if c.isprintable() else c.encode("unicode_escape").decode("ascii")) for c in text)


class _Recorder(LogitsProcessor):
    """Keeps the probabilities of the last step."""

    probabilities: torch.Tensor

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.probabilities = scores[0].softmax(-1).cpu()
        return scores


class _Sender(StoppingCriteria):
    """Sends each step, and stops when the reader has left."""

    def __init__(self, recorder: _Recorder, results: queue.SimpleQueue, is_wanted: threading.Event):
        self._recorder, self._results, self._is_wanted = recorder, results, is_wanted

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.Tensor:
        self._results.put(Step(input_ids[0].tolist(), self._recorder.probabilities))
        return torch.full((len(input_ids),), not self._is_wanted.is_set(), device=input_ids.device)
