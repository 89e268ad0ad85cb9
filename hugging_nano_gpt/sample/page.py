"""The page itself: prompt, sample.py's settings and the model on the left, text and bars on the right.

Text is shown while it is generated, a few times a second; it is the first sample of `hugging-nano-gpt generate`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import NanoGPTError
from .markup import draw_bars, draw_facts, draw_text
from .sampling import Sampler
from .streaming import Step, list_candidates, stream_steps

if TYPE_CHECKING:
    import gradio

_INTERVAL_S = 0.05  # between two states of the page, so that rendering does not slow the model down
_LARGEST_SEED = 2**53 - 1  # the largest integer up to which a browser represents all exactly


def build_page(sampler: Sampler, facts: dict[str, str]) -> "gradio.Blocks":
    """Builds the page of a model.

    Args:
        sampler: Model and tokenizer.
        facts: What model it is, as list_facts returns it.

    Returns:
        The page, not launched. It generates one text at a time; other visitors wait.
    """
    import gradio as gr

    def generate(
        prompt: str, temperature: float, top_k: int, max_new_tokens: int, seed: int | None
    ) -> Iterator[tuple[str, str, str]]:
        if seed is None:
            raise gr.Error("seed: expected a whole number, got none; give one", print_exception=False)
        settings = {"temperature": temperature, "top_k": top_k, "seed": seed}
        try:
            yield from show_steps(sampler, prompt, max_new_tokens=max_new_tokens, **settings)
        except NanoGPTError as error:
            raise gr.Error(escape(str(error)), print_exception=False) from error

    with gr.Blocks(title=f"{facts['model']} - hugging-nano-gpt", analytics_enabled=False) as page:
        gr.HTML(draw_facts(facts), container=True, elem_id="facts")
        with gr.Row():
            with gr.Column(scale=4, min_width=340):
                prompt = gr.Textbox(label="prompt", lines=4, max_lines=8, placeholder="a newline", elem_id="prompt")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                controls = _add_controls(gr)
                status = gr.Markdown(elem_id="status")
            with gr.Column(scale=6, min_width=340):
                text = gr.HTML(draw_text("", ""), container=True, elem_id="text")
                bars = gr.HTML(draw_bars([]), container=True, elem_id="bars")
        run = start.click(
            generate, [prompt, *controls], [text, bars, status], show_progress_on=status, concurrency_limit=1
        )
        stop.click(None, cancels=run, queue=False)
    return page


def show_steps(
    sampler: Sampler, prompt: str, *, max_new_tokens: int, **settings: Any
) -> Iterator[tuple[str, str, str]]:
    """Generates a text and yields what the page shows: the text so far, the bars as HTML, and the progress.

    Args:
        sampler: Model and tokenizer.
        prompt: Text to continue; a newline if it is empty, as in sample.py.
        max_new_tokens: Most tokens to generate; the end token ends the text before.
        **settings: The others of stream_steps.

    Raises:
        TokenizerError: If the prompt has what the tokenizer does not know.
    """
    prompt = prompt or "\n"
    tokenizer, begin, shown = sampler.tokenizer, time.perf_counter(), -math.inf

    def show(n_drawn: int, step: Step) -> tuple[str, str, str]:
        rate = n_drawn / (time.perf_counter() - begin)
        progress = f"{n_drawn:,} of {max_new_tokens:,} tokens, {rate:,.0f} a second"
        return draw_text(prompt, tokenizer.decode(step.idx)), draw_bars(list_candidates(step, tokenizer)), progress

    with closing(stream_steps(sampler, prompt, max_new_tokens=max_new_tokens, **settings)) as steps:
        n_shown = n_drawn = 0
        for n_drawn, step in enumerate(steps, start=1):
            if time.perf_counter() >= shown + _INTERVAL_S:
                yield show(n_drawn, step)
                shown, n_shown = time.perf_counter(), n_drawn
        if n_shown < n_drawn:  # the last one, at max_new_tokens or at the end token
            yield show(n_drawn, step)


def _add_controls(gr: ModuleType) -> list["gradio.components.Component"]:
    """Adds sample.py's settings, with its defaults."""
    whole: dict[str, Any] = {"step": 1, "precision": 0}
    hints = ("divides the logits", "likeliest tokens to choose among; 0 for all", "past block_size too")
    return [
        gr.Slider(0.05, 2, 0.8, step=0.05, label="temperature", info=hints[0], elem_id="temperature"),
        gr.Slider(0, 200, 200, **whole, label="top_k", info=hints[1], elem_id="top_k"),
        gr.Slider(1, 2000, 500, **whole, label="max_new_tokens", info=hints[2], elem_id="max_new_tokens"),
        gr.Number(1337, precision=0, minimum=0, maximum=_LARGEST_SEED, label="seed", elem_id="seed"),
    ]
