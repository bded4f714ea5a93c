"""Scores against transformers' loss, numpy's statistics and arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from snakegpt.batches import TokenStream
from snakegpt.evaluation import bits_per_byte, evaluate
from snakegpt.huggingface_format import save_weights, to_config
from snakegpt.model import GPT, Shape, initialise
from transformers import GPT2Config, GPT2LMHeadModel

SHAPE = Shape(vocabulary=12, layers=2, heads=2, channels=16, context=8)
IDS = np.random.default_rng(3).integers(0, 11, 53)
BYTES = np.array([0, 1, 1, 2, 3, 1, 1, 4, 1, 1, 2], dtype=np.int32)  # id 0 ends a text


def model() -> GPT:
    made = initialise(GPT(SHAPE), 0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(10)
    return made


def losses_of_transformers(folder) -> np.ndarray:
    """Every target's loss, windows of the context one after another, the last one shorter."""
    config = to_config(SHAPE, n_vocab=11, end_of_text=0, tokenizer_fingerprint="f", model={})
    save_weights(folder / "model.safetensors", model(), "f")
    GPT2Config.from_dict(config).save_pretrained(folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    losses = []
    for start in range(0, len(IDS) - 1, 8):
        window = torch.tensor(IDS[start : start + 9])
        with torch.no_grad():
            logits = theirs(window[None, :-1]).logits[0].double()
        p = torch.softmax(logits, -1)[torch.arange(len(window) - 1), window[1:]]
        losses += (-p.log()).tolist()
    return np.array(losses)


def stream() -> TokenStream:
    return TokenStream([IDS[:20].astype("<u2"), IDS[20:].astype("<u2")])


def test_a_score_is_that_of_transformers_over_every_target(tmp_path):
    losses = losses_of_transformers(tmp_path)
    assert len(losses) == 52
    score, _ = evaluate(model(), [stream()], BYTES, rows=4)
    assert score.n_tokens == 52
    assert score.loss_nats == pytest.approx(losses.mean(), rel=1e-5)
    assert score.loss_stderr == pytest.approx(losses.std(ddof=1) / math.sqrt(52), rel=1e-5)
    assert score.perplexity == pytest.approx(2 ** (losses.mean() / math.log(2)), rel=1e-5)
    counted = IDS[1:] != 0
    n_bytes = sum(int(BYTES[i]) for i in IDS[1:])
    assert score.n_bytes == n_bytes
    bits = losses[counted].sum() / math.log(2)  # the ends of texts are left out of both
    assert score.bits_per_byte == pytest.approx(bits / n_bytes, rel=1e-5)


def test_rows_at_once_change_nothing_but_rounding_and_repeating_changes_nothing():
    scores = [evaluate(model(), [stream()], BYTES, rows=rows)[0] for rows in (1, 4, 100, 4)]
    assert scores[1] == scores[3]
    for score in scores:
        assert score.loss_nats == pytest.approx(scores[0].loss_nats, rel=1e-6)


@pytest.mark.parametrize("n_targets", [2, 8, 11])
def test_a_limit_takes_the_first_targets(tmp_path, n_targets):
    losses = losses_of_transformers(tmp_path)
    score, _ = evaluate(model(), [stream()], BYTES, rows=4, n_targets=n_targets)
    assert score.n_tokens == n_targets
    assert score.loss_nats == pytest.approx(losses[:n_targets].mean(), rel=1e-5)


def test_bits_per_byte_by_hand():
    # Two tokens of 1 and 3 bytes that cost 1 and 7 bits; the third decodes to nothing.
    loss = torch.tensor([1.0, 7.0, 100.0]) * math.log(2)
    assert bits_per_byte(loss, torch.tensor([1, 3, 0])) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no target token"):
        bits_per_byte(loss, torch.zeros(3, dtype=torch.int64))
