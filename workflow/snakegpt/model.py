"""GPT-2 as OpenAI trained it and transformers' `GPT2LMHeadModel` computes it, top to bottom.

Axes, as suffixes of tensor names:

    B  rows of a batch          H  attention heads
    T  positions (context)      D  channels of one head, C / H
    S  positions attended to    V  vocabulary, padded
    C  channels                 F  channels inside the MLP, 4 C

Sources: Radford et al. 2019 and OpenAI's code for what is computed; nanoGPT for how plainly it can be
said; the padded vocabulary is nanoGPT's too (a multiple of 64 is 3 % faster on an A100).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionKernel = Literal["sdpa", "math"]

INIT_STD = 0.02  # OpenAI's


@dataclass(frozen=True)
class Shape:
    """The size of a network. `vocabulary` is the padded one; see `padded_vocabulary`."""

    vocabulary: int
    layers: int
    heads: int
    channels: int
    context: int
    dropout: float = 0.0
    bias: bool = True


def padded_vocabulary(n_vocab: int, multiple: int) -> int:
    """The vocabulary rounded up to a multiple, as matrix units like it: 50,257 -> 50,304 for 64.

    No target is ever a padded id, so training pushes their logits down like those of any token that
    does not come next; sampling masks them.
    """
    return -(-n_vocab // multiple) * multiple


class KeyValueCache:
    """Keys and values of the positions seen so far, so that a new token costs one position.

    shape     the model's
    rows      sequences that grow together
    n_seen    positions filled; set it back to 0 to start over
    """

    def __init__(self, shape: Shape, rows: int, device: torch.device | str = "cpu") -> None:
        size = (shape.layers, rows, shape.heads, shape.context, shape.channels // shape.heads)
        self.keys = torch.zeros(size, device=device)
        self.values = torch.zeros(size, device=device)
        self.n_seen = 0

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add one layer's keys and values of the new positions; returns those of all (B, H, S, D)."""
        end = self.n_seen + k_BHTD.shape[2]
        self.keys[layer, :, :, self.n_seen : end] = k_BHTD
        self.values[layer, :, :, self.n_seen : end] = v_BHTD
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention: every position reads the ones up to itself."""

    def __init__(self, shape: Shape, kernel: AttentionKernel) -> None:
        super().__init__()
        self.heads, self.dropout, self.kernel = shape.heads, shape.dropout, kernel
        self.qkv = nn.Linear(shape.channels, 3 * shape.channels, bias=shape.bias)
        self.projection = nn.Linear(shape.channels, shape.channels, bias=shape.bias)
        self.projection_dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTC: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        B, T, C = x_BTC.shape
        heads_3_BHTD = self.qkv(x_BTC).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHSD, v_BHSD = heads_3_BHTD
        if cache is not None:
            k_BHSD, v_BHSD = cache.extend(layer, k_BHSD, v_BHSD)
        y_BHTD = self.attend(q_BHTD, k_BHSD, v_BHSD)
        y_BTC = y_BHTD.transpose(1, 2).reshape(B, T, C)
        out_BTC: Tensor = self.projection_dropout(self.projection(y_BTC))
        return out_BTC

    def attend(self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, by torch's fused kernel or written out; q is of the last T of S."""
        T, S = q_BHTD.shape[2], k_BHSD.shape[2]
        dropout = self.dropout if self.training else 0.0
        if self.kernel == "sdpa" and T == S:
            return F.scaled_dot_product_attention(
                q_BHTD, k_BHSD, v_BHSD, dropout_p=dropout, is_causal=True
            )
        allowed_TS = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril(S - T)
        if self.kernel == "sdpa":
            return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=allowed_TS)
        score_BHTS = q_BHTD @ k_BHSD.transpose(-2, -1) / math.sqrt(q_BHTD.shape[-1])
        weight_BHTS = score_BHTS.masked_fill(~allowed_TS, -torch.inf).softmax(dim=-1)
        return F.dropout(weight_BHTS, dropout) @ v_BHSD


class MLP(nn.Module):
    """Two linear layers around a GELU, in the tanh form that OpenAI used."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.expansion = nn.Linear(shape.channels, 4 * shape.channels, bias=shape.bias)
        self.projection = nn.Linear(4 * shape.channels, shape.channels, bias=shape.bias)
        self.projection_dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = F.gelu(self.expansion(x_BTC), approximate="tanh")
        out_BTC: Tensor = self.projection_dropout(self.projection(h_BTF))
        return out_BTC


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, shape: Shape, kernel: AttentionKernel) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.channels, bias=shape.bias)
        self.attention = Attention(shape, kernel)
        self.mlp_norm = nn.LayerNorm(shape.channels, bias=shape.bias)
        self.mlp = MLP(shape)

    def forward(self, x_BTC: Tensor, cache: KeyValueCache | None, layer: int) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), cache, layer)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a last norm, and the token embedding again as the head."""

    def __init__(self, shape: Shape, kernel: AttentionKernel = "sdpa") -> None:
        super().__init__()
        self.shape = shape
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.channels)
        self.position_embedding = nn.Embedding(shape.context, shape.channels)
        self.embedding_dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, kernel) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.channels, bias=shape.bias)

    def forward(
        self, ids_BT: Tensor, targets_BT: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """What comes next.

        ids_BT      (B, T) int64, T at most the context
        targets_BT  (B, T) int64, the token after each of `ids_BT`
        cache       positions seen before these; it is extended by them
        returns     without targets logits (B, T, V); with targets the cross-entropy of each of them,
                    (B, T) float32, nats
        """
        T = ids_BT.shape[1]
        first = cache.n_seen if cache is not None else 0
        position_T = torch.arange(first, first + T, device=ids_BT.device)
        x_BTC = self.token_embedding(ids_BT) + self.position_embedding(position_T)
        x_BTC = self.embedding_dropout(x_BTC)
        for layer, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, cache, layer)
        if cache is not None:
            cache.n_seen += T
        logits_BTV = F.linear(self.final_norm(x_BTC), self.token_embedding.weight)
        if targets_BT is None:
            return logits_BTV
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none"
        )
        return loss.view_as(targets_BT)


@torch.no_grad()
def initialise(model: GPT, seed: int) -> GPT:
    """Give a model its first weights, a function of the seed alone, and return it.

    As GPT-2: normal with std 0.02, biases 0, norms 1; what is added to the residual stream starts
    smaller by 1/sqrt(additions), so that the stream's variance does not grow with depth.
    """
    draws = torch.Generator().manual_seed(seed)
    additions = 2 * model.shape.layers
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            residual = name.endswith("projection.weight")
            std = INIT_STD / math.sqrt(additions) if residual else INIT_STD
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=draws))
        else:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def n_parameters(shape: Shape, *, embeddings: bool = True) -> int:
    """Weights of a model by arithmetic; the tied head counts once, in the embeddings."""
    C, one = shape.channels, int(shape.bias)
    norm = C + one * C
    attention = 3 * C * C + C * C + one * (3 * C + C)
    mlp = 2 * 4 * C * C + one * (4 * C + C)
    total = shape.layers * (attention + mlp + 2 * norm) + norm
    return total + embeddings * (shape.vocabulary + shape.context) * C


def flops_per_token(shape: Shape) -> int:
    """Floating-point operations of one token's forward and backward pass.

    source  PaLM (Chowdhery et al. 2022, appendix B), as nanoGPT counts: 6 a weight, the head once, no
            look-ups, plus 12 L H D T for attention as if it were not causal
    """
    weights = n_parameters(shape) - shape.context * shape.channels
    return 6 * weights + 12 * shape.layers * shape.channels * shape.context


def choose_kernel(device: str, dtype: torch.dtype, context: int) -> AttentionKernel:
    """The faster attention kernel.

    On CPU the backward pass of the fused kernel in bfloat16 is slow for short contexts: 7.1 ms against
    1.7 ms written out (12 rows, 4 heads of 32, 64 tokens) and 90 against 54 (16 rows, 6 heads of 64,
    256 tokens); at 1,024 tokens, and in float32, the fused one wins. Measured on Zen 4, torch 2.13.
    """
    slow = device == "cpu" and dtype == torch.bfloat16 and context <= 512
    return "math" if slow else "sdpa"
