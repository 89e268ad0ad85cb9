"""An independent reference of nanoGPT's model in plain torch, to compare the Transformers model with, bit for bit.

Written from the description of the architecture and the order of its operations (karpathy/nanoGPT model.py @ 3adf61e),
sharing no code with the package. Its state dict has nanoGPT's names. tests/test_nanogpt.py compares both with nanoGPT.

Shapes: B batch, T tokens, C n_embd, H heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReferenceLayer(nn.Module):
    """Everything of one block: two norms, attention, feed-forward."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, bias: bool):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.ln_1 = nn.LayerNorm(n_embd, bias=bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(n_embd, 3 * n_embd, bias=bias), "c_proj": nn.Linear(n_embd, n_embd, bias=bias)}
        )
        self.ln_2 = nn.LayerNorm(n_embd, bias=bias)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(n_embd, 4 * n_embd, bias=bias), "c_proj": nn.Linear(4 * n_embd, n_embd, bias=bias)}
        )

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def attend(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.attn["c_attn"](x).split(C, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        return self.drop(self.attn["c_proj"](y.transpose(1, 2).contiguous().view(B, T, C)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.ln_1(x))
        return x + self.drop(self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)))))


class ReferenceGPT(nn.Module):
    """nanoGPT's GPT: learned positions, pre-norm blocks, exact GELU, head tied to the token embedding."""

    def __init__(
        self, block_size: int, vocab_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float, bias: bool
    ):
        super().__init__()
        self.dropout = dropout
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(ReferenceLayer(n_embd, n_head, dropout, bias) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def draw_weights(self) -> None:
        """Draws new weights: for each module, children first and the tied matrix twice, then again for each c_proj."""
        for module in self._list_children_first(self):
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.transformer["h"])) ** 0.5)

    def _list_children_first(self, module: nn.Module) -> list[nn.Module]:
        return [below for child in module.children() for below in self._list_children_first(child)] + [module]

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns logits (B, T, V) and, with targets (B, T), the mean cross-entropy; targets of -1 are ignored."""
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.transformer["h"]:
            x = layer(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)

    def generate_greedily(self, idx: Tensor, count: int) -> Tensor:
        """Appends the most likely token count times."""
        return self.sample(idx, count, top_k=1)

    @torch.no_grad()
    def sample(self, idx: Tensor, count: int, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
        """Samples count tokens, each from the last block_size tokens; tokens tied with the top_k-th one stay."""
        block_size = self.transformer["wpe"].num_embeddings
        for _ in range(count):
            scores = self(idx[:, -block_size:])[0][:, -1] / temperature
            if top_k is not None:
                threshold = scores.sort(descending=True).values[:, min(top_k, scores.shape[1]) - 1]
                scores = torch.where(scores < threshold[:, None], -torch.inf, scores)
            idx = torch.cat([idx, torch.multinomial(scores.softmax(-1), 1)], dim=1)
        return idx
