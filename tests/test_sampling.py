"""Draws: the cache changes nothing, padding never comes, a seed is a sample's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from snakegpt.model import GPT, Shape, initialise
from snakegpt.sampling import continue_ids, draw, sample_generator

SHAPE = Shape(vocabulary=16, layers=2, heads=2, channels=16, context=12)


def model(kernel="sdpa", std=0.5) -> GPT:
    """A model with opinions: greedy choices are far from ties."""
    made = initialise(GPT(SHAPE, kernel), 5).eval()
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, std, generator=draws))
    return made


def sample(made: GPT, ids=(3, 1, 4), **changes):
    asked = {
        "max_tokens": 9,
        "temperature": 1.0,
        "top_k": None,
        "generator": sample_generator(1, 0, 0),
        "n_vocab": 11,
        "end_of_text": 99,
        **changes,
    }
    return continue_ids(made, list(ids), **asked)


@pytest.mark.parametrize("kernel", ["sdpa", "math"])
@pytest.mark.parametrize("max_tokens", [9, 30])  # within the context of 12, and beyond it
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_changes_no_token(kernel, max_tokens, temperature):
    made = model(kernel)
    runs = [
        sample(
            made,
            max_tokens=max_tokens,
            temperature=temperature,
            generator=sample_generator(1, 0, 0),
            cached=cached,
        )
        for cached in (True, False)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == max_tokens
    assert len(set(runs[0][0])) > 1


def test_greedy_is_the_argmax_of_the_model_on_the_last_context_tokens():
    made = model()
    text = [3, 1, 4]
    new, reason = sample(made, text, max_tokens=20, temperature=0)
    for token in new:
        with torch.no_grad():
            logits = made(torch.tensor([text[-12:]]))[0, -1]
        assert token == int(logits[:11].argmax())
        text.append(token)
    assert reason == "length"


def test_a_prompt_longer_than_the_context_is_continued_from_its_end():
    made = model()
    assert sample(made, range(10), temperature=0) != ([], "length")
    long = [7, 7, 7, *range(11), 5]
    assert sample(made, long, temperature=0) == sample(made, long[-12:], temperature=0)


def test_padded_ids_are_never_drawn():
    made = initialise(GPT(SHAPE), 0).eval()
    with torch.no_grad():
        made.token_embedding.weight[11:] *= 0
        made.token_embedding.weight[11:, 0] += 50  # what would be drawn if it could
        made.final_norm.bias[0] = 10
    new, _ = sample(made, max_tokens=200)
    assert max(new) < 11


def test_the_end_of_text_id_ends_a_sample_and_is_not_part_of_it():
    made = model()
    free, _ = sample(made)
    stop = free[3]
    new, reason = sample(made, generator=sample_generator(1, 0, 0), end_of_text=stop)
    assert new == free[: free.index(stop)]
    assert reason == "end_of_text"


def test_a_samples_draws_depend_on_its_own_place_alone():
    made = model(std=0.05)
    one = sample(made, generator=sample_generator(1, 4, 2))
    torch.rand(9)
    assert sample(made, generator=sample_generator(1, 4, 2)) == one
    for other in ((2, 4, 2), (1, 5, 2), (1, 4, 3)):
        assert sample(made, generator=sample_generator(*other)) != one


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).log()  # the first can never come
    generator = sample_generator(0, 0, 0)
    counts = Counter(draw(logits, 1.0, None, generator) for _ in range(6000))
    assert counts[0] == 0
    for token, weight in ((1, 1), (2, 2), (3, 3)):
        assert counts[token] == pytest.approx(1000 * weight, abs=150)
    cold = Counter(draw(logits, 0.5, None, generator) for _ in range(1400))  # weights 1, 4, 9
    assert cold[3] == pytest.approx(900, abs=90)


def test_top_k_leaves_out_the_rest():
    logits = torch.tensor([0.5, 3.0, 1.0, 2.9, 0.7])
    generator = sample_generator(0, 0, 0)
    assert {draw(logits, 5.0, 2, generator) for _ in range(300)} == {1, 3}
    assert {draw(logits, 5.0, 1, generator) for _ in range(20)} == {1}
    assert {draw(logits, 5.0, 50, generator) for _ in range(300)} == {0, 1, 2, 3, 4}


def test_nothing_to_continue_is_our_mistake():
    with pytest.raises(ValueError, match="nothing to continue"):
        sample(model(), [])
