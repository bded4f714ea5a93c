"""Continue texts with a model: temperature, top-k, one seed a sample, keys and values cached."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from snakegpt.model import GPT, KeyValueCache


def sample_generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    """The draws of one sample: the same whatever other prompts and samples are asked for with it."""
    digest = hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def continue_ids(
    model: GPT,
    ids: list[int],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    generator: torch.Generator,
    n_vocab: int,
    end_of_text: int,
    cached: bool = True,
) -> tuple[list[int], str]:
    """Draw tokens after `ids`, at least one of them, until the end-of-text id or `max_tokens`.

    n_vocab  ids from here on are padding and never drawn
    cached   keep keys and values; the same tokens, sooner
    returns  the new ids without the end-of-text id, and why they end: "end_of_text" or "length"

    A text longer than the context is continued from its last `context` tokens, as nanoGPT does; their
    positions change with every token, so that from there on nothing can be cached.
    """
    if not ids:
        raise ValueError("there is nothing to continue: begin with the end-of-text id")
    device = next(model.parameters()).device
    context = model.shape.context
    cache = KeyValueCache(model.shape, 1, device) if cached else None
    text, new = list(ids), list[int]()
    for _ in range(max_tokens):
        if cache is not None and len(text) <= context:
            fresh = text[cache.n_seen :]
            logits_V = model(torch.tensor([fresh], device=device), cache=cache)[0, -1]
        else:
            logits_V = model(torch.tensor([text[-context:]], device=device))[0, -1]
        token = draw(logits_V[:n_vocab], temperature, top_k, generator)
        if token == end_of_text:
            return new, "end_of_text"
        text.append(token)
        new.append(token)
    return new, "length"


def draw(
    logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    """One id drawn from softmax(logits / temperature) over the top k; the likeliest at temperature 0."""
    logits_V = logits_V.float().cpu()  # draws are the CPU generator's on every device
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        values_K, ids_K = logits_V.topk(top_k)
    else:
        values_K, ids_K = logits_V, torch.arange(len(logits_V))
    chosen = torch.multinomial((values_K / temperature).softmax(dim=-1), 1, generator=generator)
    return int(ids_K[chosen])
