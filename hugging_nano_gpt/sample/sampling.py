"""Drawing text as nanoGPT's sample.py does (@ 3adf61e): the same settings, the same seed, the same text.

A prompt is encoded, and every token is written as text as soon as it is drawn. Nothing stops at an end of text.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
)

from ..convert.source import Source, choose_device, load_source
from ..errors import DataError
from ..model.configuration_nano_gpt import NanoGPTConfig
from ..model.modeling_nano_gpt import NanoGPTLMHeadModel
from ..tokenization.text import encode_text, read_text
from ..tokenization.vocabulary import make_generation_config

# What sample.py prints after each sample.
SEPARATOR = "---------------"
_FILE_PREFIX = "FILE:"


def sample_text(
    source: str | os.PathLike[str],
    prompt: str = "\n",
    *,
    num_samples: int = 10,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 1337,
    stride: int = 1,
    device: str | None = None,
    stream: TextIO | None = None,
    **kwargs: Any,
) -> None:
    """Draws samples after a prompt and writes them to a stream, a line of dashes after each.

    The defaults are sample.py's. On a GPU matrix products are in bfloat16 (float16 where it has none) and TF32, as
    there, unless `dtype` is given.

    Args:
        source: Checkpoint file of the nanoGPT family, folder that save_pretrained wrote, or Hub id.
        prompt: Text to go on from, or FILE:name for the text of a file, as sample.py has it.
        num_samples: Number of samples.
        max_new_tokens: Length of each in tokens, past block_size too.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Number of likeliest tokens to choose among, 0 for all.
        seed: Of the random numbers, used as sample.py uses it: random weights are drawn before the first sample.
        stride: Tokens dropped at once past block_size; 1 is nanoGPT's way (docs/generation.md).
        device: Device of torch; by default CUDA where there is a GPU for it, else the CPU.
        meta_path: meta.pkl of the model's characters, in place of the tokenizer that belongs to the source.
        tokenizer: Name, folder or Hub id of a tokenizer, in place of meta_path.
        stream: Where to write; standard output by default.
        **kwargs: What from_nanogpt_ckpt or from_pretrained takes, such as `dtype`, `n_head`, `activation_function`.

    Raises:
        DeviceError: If torch cannot compute on the device.
        CheckpointError: If there is no whole model.
        TokenizerError: If there is no tokenizer, or the prompt has what it does not know.
        DataError: If the prompt's file cannot be read, or the stride is none.
    """
    loaded = load_source(source, device=choose_device(device), **kwargs)
    sampler = make_sampler(loaded, is_autocast=kwargs.get("dtype") is None)
    block_size = sampler.model.config.block_size
    if not 1 <= stride <= block_size:
        raise DataError(f"stride: expected 1 to block_size={block_size}, got {stride}; change --stride")
    idx = sampler.encode(_read_prompt(prompt))
    stream = sys.stdout if stream is None else stream
    sampler.seed(seed)
    for _ in range(num_samples):
        sampler.draw(
            idx,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            stride=stride,
            streamer=_StreamWriter(sampler.tokenizer, stream),
        )
        print(SEPARATOR, file=stream)


@dataclass(frozen=True)
class Sampler:
    """A model that draws as sample.py does, and the tokenizer of its text. make_sampler makes one.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        autocast_dtype: What matrix products are computed in, as sample.py does on a GPU; None for the model's dtype.
    """

    model: NanoGPTLMHeadModel
    tokenizer: PreTrainedTokenizerBase
    autocast_dtype: torch.dtype | None = None

    def encode(self, prompt: str) -> torch.Tensor:
        """Returns the ids of a prompt, (1, T) int64 on the model's device.

        Raises:
            TokenizerError: If the prompt has what the tokenizer does not know, or nothing.
        """
        return torch.tensor([encode_text(self.tokenizer, prompt)], device=self.model.device)

    def seed(self, seed: int) -> None:
        """Seeds torch's global random numbers as sample.py does: random weights are drawn before the first sample."""
        _seed_as_sample_py(self.model.config, seed)

    def draw(
        self,
        idx: torch.Tensor,
        *,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        stride: int = 1,
        observe: LogitsProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        """Draws a sample with torch's global random numbers.

        Args:
            idx: (1, T) int64, the prompt.
            max_new_tokens: Tokens to draw, past block_size too.
            temperature: Divides the logits; 0 always takes the likeliest token.
            top_k: Number of likeliest tokens to choose among, 0 for all.
            stride: Tokens dropped at once past block_size.
            observe: Is called with the tokens so far (1, T) and the logits (1, V) float32 that the next is drawn from,
                after temperature and top_k, and returns them.
            **kwargs: What generate takes, such as `streamer` and `stopping_criteria`.
        """
        is_greedy = temperature == 0
        drawing: dict[str, Any] = (
            {"do_sample": False} if is_greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
        )
        processors: list[LogitsProcessor] = [] if is_greedy else [TemperatureLogitsWarper(float(temperature))]
        if self.autocast_dtype is not None:  # in which sample.py's logits and their quotients stay
            processors.append(_Rounding(self.autocast_dtype))
            # Keys from a cache are rounded otherwise than in a whole pass, which is what sample.py makes.
            kwargs.setdefault("use_cache", stride > 1)
        processors += [TopKLogitsWarper(top_k)] if top_k > 0 and not is_greedy else []
        processors += [observe] if observe is not None else []
        with _computing_as_sample_py(self.model.device.type, self.autocast_dtype):
            self.model.generate(
                idx,
                max_new_tokens=max_new_tokens,
                **drawing,
                logits_processor=LogitsProcessorList(processors),
                stride=stride,
                **kwargs,
            )


def make_sampler(source: Source, *, is_autocast: bool = True) -> Sampler:
    """Makes the sampler of a model that was loaded with its tokenizer.

    Args:
        source: The model, whose generation_config is replaced, and its tokenizer.
        is_autocast: Whether matrix products on a GPU are in bfloat16, as in sample.py, or else in the model's dtype.

    Raises:
        TokenizerError: If there is no tokenizer.
    """
    model = source.model
    # sample.py does not know what else a generation_config.json may set: an end of text, a top_p, a penalty.
    suppressed = make_generation_config(model, source.tokenizer).suppress_tokens
    model.generation_config = GenerationConfig(suppress_tokens=suppressed)
    if not is_autocast or model.device.type != "cuda":
        return Sampler(model, source.tokenizer)
    autocast_dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return Sampler(model, source.tokenizer, autocast_dtype)


class _Rounding(LogitsProcessor):
    """Rounds logits (B, V) as a lesser dtype has them."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.to(self.dtype).to(scores.dtype)


@contextlib.contextmanager
def _computing_as_sample_py(device_type: str, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Turns on autocast, and TF32 for what float32 is left, while the block lasts."""
    # torch 2.9 gave the switch another name. Trainer turns that one on, and then the old one cannot even be read.
    switch = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(switch, "fp32_precision") else ("allow_tf32", True)
    before = getattr(switch, name)
    setattr(switch, name, value if device_type == "cuda" else before)
    try:
        with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            yield
    finally:
        setattr(switch, name, before)


def _seed_as_sample_py(config: NanoGPTConfig, seed: int) -> None:
    """Seeds, and draws the random weights that sample.py draws between seeding and sampling, to overwrite them."""
    C, tokens, positions = config.n_embd, (config.vocab_size, config.n_embd), (config.block_size, config.n_embd)
    layer = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]  # c_attn, c_proj, c_fc, c_proj
    torch.manual_seed(seed)
    for shape in (tokens, positions):
        nn.Embedding(*shape)
    for n_out, n_in in layer * config.n_layer:
        nn.Linear(n_in, n_out, bias=config.bias)
    nn.Linear(C, config.vocab_size, bias=False)
    # Then its own initialisation: every matrix, the tied one twice, and the residual projections once more.
    for shape in (tokens, positions, *layer * config.n_layer, tokens, *(layer[1], layer[3]) * config.n_layer):
        torch.empty(shape).normal_()


def _read_prompt(prompt: str) -> str:
    if not prompt.startswith(_FILE_PREFIX):
        return prompt
    text = read_text(Path(prompt.removeprefix(_FILE_PREFIX)))
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as open() gives it to sample.py


class _StreamWriter(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: TextIO):
        super().__init__(tokenizer)
        self._stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._stream.write(f"{text}\n" if stream_end else text)
        self._stream.flush()
