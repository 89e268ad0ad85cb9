"""The parts of the page that are drawn by hand, as HTML: what model it is, and the bars of the last step.

Names and tokens come from files that are not trusted, so every text is escaped. Colours are those of Gradio's theme.
"""

from html import escape
from pathlib import Path

from ..convert.facts import describe_model, describe_training
from ..convert.source import Source
from .streaming import Candidate

CSS = """
.box h3 { margin: 0 0 10px; font-size: 14px; font-weight: 400; color: var(--block-title-text-color); }
.facts { display: flex; flex-wrap: wrap; gap: 8px 20px; margin: 0; }
.facts dt { font-size: 11px; color: var(--body-text-color-subdued); }
.facts dd { margin: 0; font-size: 13px; overflow-wrap: anywhere; color: var(--body-text-color); }
.bars { display: grid; grid-template-columns: minmax(36px, max-content) 1fr 64px; gap: 4px 12px; align-items: center; }
.bars { align-content: start; min-height: 240px; font-size: 13px; color: var(--body-text-color); }
.bars .token { font-family: var(--font-mono); white-space: pre; }
.bars .track { height: 14px; border-radius: 3px; background: var(--border-color-primary); }
.bars .bar { display: block; height: 100%; min-width: 1px; border-radius: 3px; background: var(--neutral-400); }
.bars .share { text-align: right; font-variant-numeric: tabular-nums; }
.bars .drawn { font-weight: 700; }
.bars .drawn .bar { background: var(--color-accent); }
.text { display: flex; flex-direction: column-reverse; height: 420px; overflow-y: auto; } /* keeps its end in sight */
.text div { flex: none; min-height: 100%; white-space: pre-wrap; overflow-wrap: anywhere; }
.text div { font-family: var(--font-mono); font-size: 13px; line-height: 1.45; color: var(--body-text-color); }
.text .prompt { color: var(--color-accent); }
"""


def list_facts(source: Source) -> dict[str, str]:
    """Returns what model it is: names and values, for people to read."""
    model, path = source.model, Path(source.name)
    return {
        "model": path.resolve().name if path.exists() else source.name,
        "kind": source.kind,
        **describe_model(model.config),
        **describe_training(model.nanogpt_training_state),
        "computes on": f"{model.device}, {str(model.dtype).removeprefix('torch.')}",
    }


def draw_facts(facts: dict[str, str]) -> str:
    """Returns the facts as HTML."""
    items = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<div class="box"><dl class="facts">{"".join(items)}</dl></div>'


def draw_text(prompt: str, text: str) -> str:
    """Returns a text as HTML, with the prompt that it starts with in another colour."""
    start = prompt if text.startswith(prompt) else ""
    marked = f'<span class="prompt">{escape(start)}</span>{escape(text.removeprefix(start))}'
    return f'<div class="box"><h3>text</h3><div class="text"><div>{marked}</div></div></div>'


def draw_bars(candidates: list[Candidate]) -> str:
    """Returns a bar for each token as HTML, the one that was drawn in another colour."""
    bars = "".join(map(_draw_bar, candidates))
    return f'<div class="box"><h3>probabilities of the last step</h3><div class="bars">{bars}</div></div>'


def _draw_bar(candidate: Candidate) -> str:
    drawn, percent = " drawn" if candidate.is_drawn else "", 100 * candidate.probability
    share = f"{percent:.2f}%" if percent >= 0.005 else "< 0.01%"
    return (
        f'<span class="token{drawn}">{escape(candidate.token)}</span>'
        f'<span class="track{drawn}"><span class="bar" style="width: {percent:.2f}%"></span></span>'
        f'<span class="share{drawn}">{escape(share)}</span>'
    )
