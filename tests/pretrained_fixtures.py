"""Weights that transformers has written, and experiments of the tests that start from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from train_fixtures import SETTINGS
from transformers import GPT2Config, GPT2LMHeadModel

N_VOCAB = 11  # of the token sets of train_fixtures
FINGERPRINT = "ab" * 32  # of their tokenizer
MODEL = {**SETTINGS["model"], "bias": True, "vocabulary_multiple": 1}


def foreign(folder: Path, **config: Any) -> GPT2LMHeadModel:
    """A random GPT-2 of transformers, saved to a folder as people publish them."""
    torch.manual_seed(7)
    sizes = {"vocab_size": N_VOCAB, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 8}
    # Large weights: a matrix read the wrong way round must show.
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, "initializer_range": 0.3, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def tokenizer_json(path: Path, fingerprint: str = FINGERPRINT, n_vocab: int = N_VOCAB) -> Path:
    about = {"fingerprint": fingerprint, "n_vocab": n_vocab, "end_of_text": 0, "kind": "char"}
    path.write_text(json.dumps(about), encoding="utf-8")
    return path


def adapt_arguments(folder: Path, out: Path, model: dict[str, Any], **files: Path) -> list[str]:
    """The stage's command line for a folder that `foreign` has filled; files: role -> path."""
    tokenizer = tokenizer_json(folder.parent / "tokenizer.json")
    roles = {
        "weights": folder / "model.safetensors",
        "config": folder / "config.json",
        "tokenizer": tokenizer,
        "trained_with": tokenizer,
        **files,
    }
    words = [word for role, path in roles.items() for word in (f"--{role}", str(path))]
    return [*words, "--settings", json.dumps({"model": model}), "--out", str(out)]
