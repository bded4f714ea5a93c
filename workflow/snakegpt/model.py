"""The network, top to bottom, in two architectures.

    gpt2    GPT-2 as OpenAI trained it and transformers' `GPT2LMHeadModel` computes it
    modern  what has proved better since, as transformers' `NanoChatForCausalLM` computes it: rotary
            positions, normalised queries and keys, squared ReLU, norms without parameters (one more right
            after the embedding), logits softly capped. docs/model.md has sources and measured gains.

Axes, as suffixes of tensor names:

    B  rows of a batch          H  attention heads
    T  positions (context)      D  channels of one head, C / H
    S  positions attended to    V  vocabulary, padded
    C  channels                 F  channels inside the MLP, 4 C

Sources: Radford et al. 2019 and OpenAI's code for what gpt2 computes; nanoGPT for how plainly it can be
said; the padded vocabulary is nanoGPT's too (a multiple of 64 is 3 % faster on an A100); modded-nanogpt
and nanochat for what modern is made of.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from snakegpt.activations import gelu, squared_relu
from snakegpt.losses import LossKernel, MeanLoss, logits, mean_loss, product_dtype, token_losses

Architecture = Literal["gpt2", "modern"]
AttentionKernel = Literal["sdpa", "math", "flex"]

INIT_STD = 0.02  # OpenAI's
ROTARY_BASE = 10_000.0
NORM_EPSILON = {"gpt2": 1e-5, "modern": 1e-6}


@dataclass(frozen=True)
class Shape:
    """What a network computes, and its size. `vocabulary` is the padded one; see `padded_vocabulary`.

    bias     gpt2: biases in linear layers and norms
    tied     the head is the token embedding again; always so in gpt2
    softcap  modern: logits are held between -softcap and softcap; None: they are not
    """

    vocabulary: int
    layers: int
    heads: int
    channels: int
    context: int
    dropout: float = 0.0
    bias: bool = True
    architecture: Architecture = "gpt2"
    tied: bool = True
    softcap: float | None = None

    def __post_init__(self) -> None:
        assert not (self.modern and self.bias)
        assert self.modern or (self.tied and self.softcap is None)

    @property
    def modern(self) -> bool:
        return self.architecture == "modern"


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


@dataclass
class Pass:
    """What every block is told about the positions that go through the network.

    angles   modern: what each position is turned by, see `rotation_angles`
    allowed  who may attend to whom, where more than causality forbids it: (B, 1, T, T) boolean, or the
             blocks of it that are not empty, for flex
    cache    positions seen before these
    """

    angles: tuple[Tensor, Tensor] | None = None
    allowed: Tensor | BlockMask | None = None
    cache: KeyValueCache | None = None


def rotation_angles(position_T: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines by which positions turn channels, each (T, D) (Su et al. 2021, RoPE)."""
    place = torch.arange(0, D, 2, dtype=torch.float32, device=position_T.device)
    angle = position_T.float().unsqueeze(1) * (1.0 / ROTARY_BASE ** (place / D))
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat((cosine, cosine), dim=1), torch.cat((sine, -sine), dim=1)


def rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Channels d and d + D/2 of (..., T, D) turned together, so that q k^T sees distances only."""
    cosine, sine = (a.to(x.dtype) for a in angles)
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, dims=-1), sine)


def rms_normalised(x: Tensor) -> Tensor:
    """Divided by the root of its mean square over the last axis (Zhang and Sennrich 2019)."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPSILON["modern"]).to(x.dtype)


def residual_dtype(x: Tensor) -> torch.dtype:
    """Type of the stream that blocks read and add to: bfloat16 where products are, else float32.

    Half the memory traffic of what is not a product. float16 has too little range for sums of many.
    """
    return torch.bfloat16 if product_dtype(x) == torch.bfloat16 else x.dtype


class Norm(nn.LayerNorm):
    """LayerNorm in gpt2; in modern what is left of it without parameters and means."""

    def __init__(self, shape: Shape) -> None:
        epsilon, learnt = NORM_EPSILON[shape.architecture], not shape.modern
        super().__init__(shape.channels, epsilon, elementwise_affine=learnt, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.elementwise_affine else rms_normalised(x)


class Attention(nn.Module):
    """Causal self-attention: every position reads the ones up to itself."""

    def __init__(self, shape: Shape, kernel: AttentionKernel) -> None:
        super().__init__()
        self.heads, self.dropout, self.kernel = shape.heads, shape.dropout, kernel
        self.qkv = nn.Linear(shape.channels, 3 * shape.channels, bias=shape.bias)
        self.projection = nn.Linear(shape.channels, shape.channels, bias=shape.bias)
        self.projection_dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTC: Tensor, how: Pass, layer: int) -> Tensor:
        B, T, C = x_BTC.shape
        heads_3_BHTD = self.qkv(x_BTC).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHTD, k_BHSD, v_BHSD = heads_3_BHTD
        if how.angles is not None:
            # Their length cannot grow, so neither can the scores (Henry et al. 2020, QK norm).
            q_BHTD, k_BHSD = rms_normalised(rotated(heads_3_BHTD[:2], how.angles))
        if how.cache is not None:
            k_BHSD, v_BHSD = how.cache.extend(layer, k_BHSD, v_BHSD)
        y_BHTD = self.attend(q_BHTD, k_BHSD, v_BHSD, how.allowed)
        y_BTC = y_BHTD.transpose(1, 2).reshape(B, T, C)
        out_BTC: Tensor = self.projection_dropout(self.projection(y_BTC))
        return out_BTC

    def attend(
        self, q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, allowed: Tensor | BlockMask | None
    ) -> Tensor:
        """softmax(q k^T / sqrt(D)) v, by one of torch's kernels or written out; q is of the last T of S."""
        T, S = q_BHTD.shape[2], k_BHSD.shape[2]
        dropout = self.dropout if self.training else 0.0
        if isinstance(allowed, BlockMask):
            found: Tensor = flex()(q_BHTD, k_BHSD, v_BHSD, block_mask=allowed)
            return found
        if self.kernel != "math" and T == S and allowed is None:
            return F.scaled_dot_product_attention(
                q_BHTD, k_BHSD, v_BHSD, dropout_p=dropout, is_causal=True
            )
        if allowed is None:
            allowed = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril(S - T)
        if self.kernel != "math":
            return F.scaled_dot_product_attention(
                q_BHTD, k_BHSD, v_BHSD, attn_mask=allowed, dropout_p=dropout
            )
        B, H, _, D = q_BHTD.shape
        # Product, scale and mask are one operation: a twentieth of a step of a small model on a CPU.
        mask = torch.where(allowed, 0.0, -torch.inf).to(q_BHTD.dtype)
        mask = mask if mask.dim() == 2 else mask.expand(B, H, T, S).flatten(0, 1)
        q, k_transposed = q_BHTD.flatten(0, 1), k_BHSD.flatten(0, 1).transpose(1, 2)
        score = torch.baddbmm(mask, q, k_transposed, alpha=1 / math.sqrt(D))
        weight_BHTS = score.softmax(dim=-1).view(B, H, T, S)
        return F.dropout(weight_BHTS, dropout) @ v_BHSD


@functools.cache
def flex() -> Callable[..., Tensor]:
    """torch's flex_attention, which is a kernel only when compiled: blocks of a mask that are empty cost
    nothing. It draws no dropout."""
    return torch.compile(flex_attention, dynamic=False)


def document_mask(documents_BT: Tensor, kernel: AttentionKernel) -> Tensor | BlockMask:
    """Positions attend to earlier ones of their own document."""
    B, T = documents_BT.shape
    if kernel != "flex":
        same_BTT = documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)
        return same_BTT.tril().unsqueeze(1)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents_BT[b, q] == documents_BT[b, k])

    return create_block_mask(allowed, B, None, T, T, device=documents_BT.device)


class MLP(nn.Module):
    """Two linear layers around a GELU, in the tanh form that OpenAI used, or a squared ReLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.modern = shape.modern
        self.expansion = nn.Linear(shape.channels, 4 * shape.channels, bias=shape.bias)
        self.projection = nn.Linear(4 * shape.channels, shape.channels, bias=shape.bias)
        self.projection_dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTF = self.expansion(x_BTC)
        h_BTF = squared_relu(h_BTF) if self.modern else gelu(h_BTF)
        out_BTC: Tensor = self.projection_dropout(self.projection(h_BTF))
        return out_BTC


class Block(nn.Module):
    """Attention, then MLP; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, shape: Shape, kernel: AttentionKernel) -> None:
        super().__init__()
        self.attention_norm = Norm(shape)
        self.attention = Attention(shape, kernel)
        self.mlp_norm = Norm(shape)
        self.mlp = MLP(shape)

    def forward(self, x_BTC: Tensor, how: Pass, layer: int) -> Tensor:
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), how, layer)
        return x_BTC + self.mlp(self.mlp_norm(x_BTC))


class GPT(nn.Module):
    """Embeddings, blocks, a last norm, and the head: the token embedding again unless untied.

    kernel  how attention is computed: decides rounding alone, as does the next
    loss    how the cross-entropy is computed; see snakegpt.losses
    """

    def __init__(
        self, shape: Shape, kernel: AttentionKernel = "sdpa", loss: LossKernel = "plain"
    ) -> None:
        super().__init__()
        self.shape, self.kernel, self.loss = shape, kernel, loss
        self.mean_loss: MeanLoss = mean_loss
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.channels)
        if not shape.modern:
            self.position_embedding = nn.Embedding(shape.context, shape.channels)
        self.embedding_dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.ModuleList(Block(shape, kernel) for _ in range(shape.layers))
        self.final_norm = Norm(shape)
        if not shape.tied:
            self.head = nn.Linear(shape.channels, shape.vocabulary, bias=False)

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
        documents_BT: Tensor | None = None,
        *,
        reduction: Literal["none", "mean"] = "none",
    ) -> Tensor:
        """What comes next.

        ids_BT        (B, T) int64, T at most the context
        targets_BT    (B, T) int64, the token after each of `ids_BT`
        cache         positions seen before these; it is extended by them
        documents_BT  (B, T) int64, the document of each position, which sees no other; not with a cache
        reduction     of the losses; training asks for the mean, see `snakegpt.losses.mean_loss`
        returns       without targets logits (B, T, V); with targets the cross-entropy of each of them,
                      (B, T) float32, nats, or their mean
        """
        T = ids_BT.shape[1]
        first = cache.n_seen if cache is not None else 0
        position_T = torch.arange(first, first + T, device=ids_BT.device)
        how = Pass(cache=cache)
        x_BTC = self.token_embedding(ids_BT)
        if self.shape.modern:
            x_BTC = rms_normalised(x_BTC)
            how.angles = rotation_angles(position_T, self.shape.channels // self.shape.heads)
        else:
            x_BTC = x_BTC + self.position_embedding(position_T)
        x_BTC = x_BTC.to(residual_dtype(x_BTC))
        if documents_BT is not None:
            assert cache is None
            how.allowed = document_mask(documents_BT, self.kernel)
        x_BTC = self.embedding_dropout(x_BTC)
        for layer, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, how, layer)
        if cache is not None:
            cache.n_seen += T
        x_BTC = self.final_norm(x_BTC)
        head_VC = self.token_embedding.weight if self.shape.tied else self.head.weight
        if targets_BT is None:
            return logits(x_BTC, head_VC, self.shape.softcap)
        given = x_BTC.flatten(0, 1), head_VC, targets_BT.flatten(), self.shape.softcap, self.loss
        if reduction == "mean":
            return self.mean_loss(*given)
        return token_losses(*given).view_as(targets_BT)


@torch.no_grad()
def initialise(model: GPT, seed: int) -> GPT:
    """Give a model its first weights, a function of the seed alone, and return it.

    gpt2: normal with std 0.02, biases 0, norms 1; what is added to the residual stream starts smaller by
    1/sqrt(additions), so that the stream's variance does not grow with depth.
    modern: what is added to the residual stream starts at 0 and so does an untied head (Yang et al. 2022,
    muP): an untrained model predicts nothing in particular. Other matrices are uniform with variance 1/C.
    """
    draws = torch.Generator().manual_seed(seed)
    additions = 2 * model.shape.layers
    for name, parameter in model.named_parameters():
        residual, drawn = name.endswith("projection.weight"), torch.empty(parameter.shape)
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        elif model.shape.modern and (residual or name == "head.weight"):
            parameter.zero_()
        elif model.shape.modern and name.startswith("blocks."):
            limit = math.sqrt(3 / model.shape.channels)
            parameter.copy_(drawn.uniform_(-limit, limit, generator=draws))
        else:
            std = INIT_STD / math.sqrt(additions) if residual else INIT_STD
            parameter.copy_(drawn.normal_(0.0, std, generator=draws))
    return model


def n_parameters(shape: Shape, *, embeddings: bool = True) -> int:
    """Weights of a model by arithmetic; a tied head counts once, in the embeddings, an untied one too."""
    C, one = shape.channels, int(shape.bias)
    norm = 0 if shape.modern else C + one * C
    attention = 3 * C * C + C * C + one * (3 * C + C)
    mlp = 2 * 4 * C * C + one * (4 * C + C)
    total = shape.layers * (attention + mlp + 2 * norm) + norm
    rows = shape.vocabulary * (1 if shape.tied else 2) + (0 if shape.modern else shape.context)
    return total + embeddings * rows * C


def flops_per_token(shape: Shape) -> int:
    """Floating-point operations of one token's forward and backward pass.

    source  PaLM (Chowdhery et al. 2022, appendix B), as nanoGPT counts: 6 a weight, the head once, no
            look-ups, plus 12 L H D T for attention as if it were not causal
    """
    C = shape.channels
    weights = n_parameters(shape, embeddings=False) + shape.vocabulary * C
    return 6 * weights + 12 * shape.layers * C * shape.context


def choose_kernel(
    device: str, dtype: torch.dtype, context: int, *, masks_documents: bool = False
) -> AttentionKernel:
    """The fastest attention kernel.

    On CPU the backward pass of the fused kernel in bfloat16 is slow for short contexts: 7.1 ms against
    1.7 ms written out (12 rows, 4 heads of 32, 64 tokens) and 90 against 54 (16 rows, 6 heads of 64,
    256 tokens); at 1,024 tokens, and in float32, the fused one wins. Measured on Zen 4, torch 2.13.
    On CUDA torch chooses among the fused ones itself: cuDNN's on Hopper and on data centres' Blackwell
    (an H100: 1.6 ms against FlashAttention 2's 2.1 for 64 rows of 1,024 tokens), else FlashAttention 2.
    Nothing is timed at the start of a run: noise would decide its rounding. A document mask would cost
    them their fast path; flex skips what is masked.
    """
    if device == "cuda" and masks_documents:
        return "flex"
    slow = device == "cpu" and dtype == torch.bfloat16 and context <= 512
    return "math" if slow else "sdpa"
