"""The thread that generates: one answer of each request in turn, and the requests that wait for it.

torch's random numbers belong to the whole process, so one answer is generated at a time. A slow reader does not slow
the model down; one that leaves ends its work at the next token.
"""

import asyncio
import functools
import secrets
import traceback
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from .draft import Draft, Piece
from .request import Request, RequestError


class Drawer:
    """Generates answers with a model, while at most `queue` other requests wait.

    The model's generation_config is replaced; only its end-of-text tokens and suppress_tokens are used.
    """

    def __init__(self, model: NanoGPTLMHeadModel, tokenizer: PreTrainedTokenizerBase, queue: int):
        self._model, self._tokenizer, self._queue = model, tokenizer, queue
        self._thread = ThreadPoolExecutor(1, "hugging-nano-gpt drawing")
        self._jobs: set[Job] = set()
        self._end_reason: RequestError | None = None
        before, ends = model.generation_config, model.generation_config.eos_token_id
        self._ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._suppressed = [index for index in before.suppress_tokens or () if index not in self._ends]
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=before.pad_token_id)

    def start(self, request: Request, prompts: list[list[int]]) -> "Job":
        """Starts answering each prompt n times, when its turn comes.

        Raises:
            RequestError: If too many requests wait.
        """
        if self._end_reason is not None:
            raise self._end_reason
        if len(self._jobs) > self._queue:
            raise RequestError(f"server: {self._queue} requests wait already; try again later", status=503)
        self._jobs.add(job := Job())
        job.task = asyncio.create_task(self._answer(request, prompts, job))
        job.task.add_done_callback(functools.partial(self._finish, job))
        return job

    def close(self) -> None:
        """Ends all work, for good."""
        self._end_reason = RequestError("server: it is being ended; try again later", status=503)
        for job in self._jobs:
            job.end(self._end_reason)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _answer(self, request: Request, prompts: list[list[int]], job: "Job") -> None:
        """Generates one answer after the other; other requests have their turn between two of them."""
        loop = asyncio.get_running_loop()

        def send(piece: Piece) -> None:
            loop.call_soon_threadsafe(job.pieces.put_nowait, piece)

        for index in range(len(prompts) * request.n):
            prompt = prompts[index // request.n]
            await loop.run_in_executor(self._thread, self._draw, request, prompt, index, job, send)

    def _finish(self, job: "Job", task: asyncio.Task) -> None:
        self._jobs.discard(job)
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(error)
            job.end_reason = RequestError(f"server: the model cannot answer: {error}", status=500)
        job.pieces.put_nowait(None)

    def _draw(self, request: Request, prompt: list[int], index: int, job: "Job", send: Callable) -> None:
        """Generates one answer, in the thread."""
        draft = Draft(self._tokenizer, index, stops=request.stop, ends=self._ends, n_top=request.n_top)
        if request.echo:
            draft.add_prompt(prompt, self._score(prompt) if request.n_top is not None and len(prompt) > 1 else None)
        if request.max_tokens:
            # Without a new seed, an answer would follow from the seed of the one before.
            torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed + index % request.n)
            idx = torch.tensor([prompt], device=self._model.device)
            observer = _Observer() if request.n_top is not None else None
            reporter = _Reporter(draft, observer, job, send if request.stream else None)
            self._model.generate(
                idx,
                attention_mask=torch.ones_like(idx),  # else padding tokens of a prompt would be masked
                max_new_tokens=request.max_tokens,
                logits_processor=self._list_processors(observer, request.repetition_penalty),
                stopping_criteria=StoppingCriteriaList([reporter]),
                **request.get_generate_kwargs(),
            )
        send(draft.take(is_last=True))

    def _list_processors(self, observer: "_Observer | None", penalty: float) -> LogitsProcessorList:
        """Lists what generate would do itself, after the observer, which has to see the model's own logits."""
        processors = LogitsProcessorList([] if observer is None else [observer])
        if penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        if self._suppressed:
            processors.append(SuppressTokensLogitsProcessor(self._suppressed, self._model.device))
        return processors

    @torch.no_grad()
    def _score(self, ids: list[int]) -> torch.Tensor:  # (T - 1, V) float32
        logits = self._model(torch.tensor([ids[:-1]], device=self._model.device), use_cache=False).logits
        return logits[0].float().log_softmax(-1).cpu()


class Job:
    """The work on a request: its pieces as they are generated, and why it was ended early, if it was."""

    task: asyncio.Task
    watch: asyncio.Task  # waits for the client to leave; kept here because asyncio does not keep tasks

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self.end_reason: RequestError | None = None

    def end(self, reason: RequestError) -> None:
        """Ends the work: at once if it waits, at the next token if it is being generated."""
        self.end_reason = self.end_reason or reason
        self.task.cancel()

    async def read(self) -> AsyncIterator[Piece]:
        """Yields the pieces.

        Raises:
            RequestError: If the work was ended before it was done.
        """
        while (piece := await self.pieces.get()) is not None:
            yield piece
        if self.end_reason is not None:
            raise self.end_reason


class _Observer(LogitsProcessor):
    """Keeps the log-probabilities (V,) of the next token."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.logprobs = scores[0].log_softmax(-1).cpu()
        return scores


class _Reporter(StoppingCriteria):
    """Adds each token to the draft and sends what is new; stops when the answer or the job has ended."""

    def __init__(self, draft: Draft, observer: _Observer | None, job: Job, send: Callable | None):
        self._draft, self._observer, self._job, self._send = draft, observer, job, send

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        is_done = self._draft.add(int(input_ids[0, -1]), None if self._observer is None else self._observer.logprobs)
        if self._send is not None and not is_done:
            piece = self._draft.take(is_last=False)
            if piece.text or piece.tokens:
                self._send(piece)
        is_done = is_done or self._job.end_reason is not None
        return torch.full((len(input_ids),), is_done, device=input_ids.device)
