"""What each idea of architecture modern and its recipe is worth: the loss when one is taken back.

python benchmarks/ablation.py --text tinyshakespeare.txt --json > ablation.json
python benchmarks/ablation.py --text tinyshakespeare.txt --only muon "squared ReLU" --steps 300

A small model (4 layers of 128 channels, context 64) on one id a character, the last tenth held out, on
one thread in float32. Each line changes one thing of the whole; a positive difference is what the idea
gains. Nothing here can be missed, so there are no bars; differences below the spread of seeds are noise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import snakegpt.model
import torch
from common import machine
from snakegpt.batches import TokenStream, TrainingBatches, sequential_batches
from snakegpt.model import GPT, Shape, initialise
from snakegpt.optimizer import clip_gradients, make_optimizers, schedule_of, set_learning_rate
from snakegpt.settings import Training
from torch import Tensor, nn

CONTEXT, ROWS = 64, 12
VALIDATION_TOKENS = 32_768
RECIPE: dict[str, Any] = {
    "optimizer": "muon",
    "learning_rate": 0.02,
    "muon_learning_rate": 0.04,
    "min_learning_rate": 0.0,
    "schedule": "warmup_stable_decay",
    "warmup_steps": 0,
}
SIZE = {
    "vocabulary": 0,
    "layers": 4,
    "heads": 4,
    "channels": 128,
    "context": CONTEXT,
    "bias": False,
}
MODERN = {"architecture": "modern", "tied": False, "softcap": 15.0}
GPT2_ADAMW = {
    "optimizer": "adamw",
    "learning_rate": 6e-3,  # the best of 1e-3, 3e-3 and 6e-3 for this model and batch
    "min_learning_rate": 6e-4,
    "schedule": "cosine",
    "warmup_steps": 15,
}

Change = Callable[[GPT], contextlib.AbstractContextManager[None]]


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--text", type=Path, required=True, help="what to train on")
    made.add_argument("--steps", type=int, default=150)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--only", nargs="+", help="some of the ideas, by name")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = made.parse_args()
    torch.set_num_threads(1)
    text = args.text.read_text(encoding="utf-8")
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    ids = np.array([number[character] for character in text], dtype=np.uint16)
    cut = int(0.9 * len(ids))
    train, validation = TokenStream([ids[:cut]]), TokenStream([ids[cut:]])
    found: dict[str, list[float]] = {}
    for name, (shape, recipe, change) in variants(len(number), args.steps).items():
        if args.only and name not in ("everything", *args.only):
            continue
        found[name] = [
            loss_of(
                shape, Training(**recipe, steps=args.steps, seed=seed), change, train, validation
            )
            for seed in range(1, args.seeds + 1)
        ]
        if not args.json:
            line(name, found[name], found["everything"])
    if args.json:
        print(json.dumps({"machine": machine(), "steps": args.steps, "losses": found}, indent=2))


def line(name: str, losses: list[float], whole: list[float]) -> None:
    """Mean loss, what it is above the whole, and how far seeds lie apart."""
    mean, spread = statistics.mean(losses), max(losses) - min(losses)
    gain = mean - statistics.mean(whole)
    print(f"{name:28} {mean:.3f}  {gain:+.3f}  (seeds {spread:.3f} apart)", flush=True)


def variants(vocabulary: int, steps: int) -> dict[str, tuple[Shape, dict[str, Any], Change]]:
    """Name -> shape, recipe and what is done to the model: the whole, each idea taken back, and gpt2."""
    size: dict[str, Any] = {**SIZE, "vocabulary": vocabulary}
    modern = Shape(**{**size, **MODERN})
    cosine = {**RECIPE, "schedule": "cosine"}
    adamw = {k: v for k, v in RECIPE.items() if "muon" not in k}
    adamw |= {"optimizer": "adamw", "learning_rate": GPT2_ADAMW["learning_rate"]}
    adamw |= {"warmup_steps": steps // 10}
    return {
        "everything": (modern, RECIPE, as_it_is),
        "rotary positions": (modern, RECIPE, learnt_positions),
        "QK norm": (modern, RECIPE, no_qk_norm),
        "squared ReLU": (modern, RECIPE, gelu),
        "norms without parameters": (modern, RECIPE, layer_norms),
        "norm after the embedding": (modern, RECIPE, no_embedding_norm),
        "zero-initialised projections": (modern, RECIPE, drawn_projections),
        "untied head": (Shape(**{**size, **MODERN, "tied": True}), RECIPE, as_it_is),
        "soft-capped logits": (Shape(**{**size, **MODERN, "softcap": None}), RECIPE, as_it_is),
        "muon": (modern, adamw, as_it_is),
        "stable phase": (modern, cosine, as_it_is),
        "all of it (gpt2, adamw)": (Shape(**size), GPT2_ADAMW, as_it_is),
    }


def loss_of(
    shape: Shape, recipe: Training, change: Change, train: TokenStream, validation: TokenStream
) -> float:
    """Validation loss after training, nats."""
    model = initialise(GPT(shape), recipe.seed)
    with change(model):
        optimizers, schedule = make_optimizers(model, recipe), schedule_of(recipe)
        batches = TrainingBatches(train, CONTEXT, ROWS, recipe.seed).from_step(0, ROWS, 0, 1)
        for step in range(recipe.steps):
            ids, targets = next(batches)
            set_learning_rate(optimizers, schedule.at(step))
            model.zero_grad()
            model(ids, targets).mean().backward()
            clip_gradients(model.parameters(), recipe.gradient_clip)
            for optimizer in optimizers:
                optimizer.step()
        held_out = sequential_batches(validation, CONTEXT, 128, n_targets=VALIDATION_TOKENS)
        with torch.no_grad():
            losses = [model(x, y).flatten() for x, y in held_out]
    return float(torch.cat(losses).mean())


# ---- ideas taken back ----


@contextlib.contextmanager
def as_it_is(model: GPT) -> Iterator[None]:
    yield


@contextlib.contextmanager
def learnt_positions(model: GPT) -> Iterator[None]:
    """Positions as in gpt2: one vector each, added to the token's."""
    positions = nn.Parameter(torch.randn(CONTEXT, model.shape.channels) * 0.02)
    model.register_parameter("positions", positions)
    hook = model.token_embedding.register_forward_hook(
        lambda module, given, x: x + positions[: x.shape[1]]
    )
    with mock.patch.object(snakegpt.model, "rotated", lambda x, angles: x):
        yield
    hook.remove()


@contextlib.contextmanager
def no_qk_norm(model: GPT) -> Iterator[None]:
    normalised = snakegpt.model.rms_normalised

    def but_for_heads(x: Tensor) -> Tensor:
        return x if x.dim() == 5 else normalised(x)

    with mock.patch.object(snakegpt.model, "rms_normalised", but_for_heads):
        yield


@contextlib.contextmanager
def gelu(model: GPT) -> Iterator[None]:
    for block in model.blocks:
        block.mlp.modern = False
    yield


@contextlib.contextmanager
def layer_norms(model: GPT) -> Iterator[None]:
    for block in model.blocks:
        block.attention_norm, block.mlp_norm = (
            nn.LayerNorm(model.shape.channels) for _ in range(2)
        )
    model.final_norm = nn.LayerNorm(model.shape.channels)
    yield


@contextlib.contextmanager
def no_embedding_norm(model: GPT) -> Iterator[None]:
    """The embedding then starts at the size that the norm would give it."""
    model.token_embedding.weight.data /= snakegpt.model.INIT_STD
    normalised, embedded = snakegpt.model.rms_normalised, []
    hook = model.token_embedding.register_forward_hook(lambda module, given, x: embedded.append(x))

    def but_for_embedding(x: Tensor) -> Tensor:
        return embedded.pop() if embedded else normalised(x)

    with mock.patch.object(snakegpt.model, "rms_normalised", but_for_embedding):
        yield
    hook.remove()


@contextlib.contextmanager
def drawn_projections(model: GPT) -> Iterator[None]:
    std = snakegpt.model.INIT_STD / math.sqrt(2 * model.shape.layers)
    for name, parameter in model.named_parameters():
        if name.endswith("projection.weight"):
            nn.init.normal_(parameter, std=std)
    yield


if __name__ == "__main__":
    main()
