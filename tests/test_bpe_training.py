"""Merges equal those of a slow trainer, whatever the order of documents; tiktoken gives the trainer's ids."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import regex
import rustbpe
from hypothesis import given
from hypothesis import strategies as st
from snakegpt import bpe_training
from snakegpt.bpe_training import hash_of, sample_limit, train
from snakegpt.documents.document import Document
from snakegpt.errors import UserError
from snakegpt.tokenizers import PATTERNS, load

SYLLABLES = ["ba", "be", "di", "do", "ku", "lo", "mi", "no", "aaaa", "é", "日", "'s", "12", "!", "<|endoftext|>"]  # fmt: skip


def documents(n, seed=0, length=30):
    """Made-up words, many of them equally common."""
    draw = random.Random(seed)
    word = lambda: "".join(draw.choices(SYLLABLES, k=draw.randrange(1, 4)))  # noqa: E731
    space = lambda: draw.choice([" ", " ", " ", "\n", "\n\n  ", "   "])  # noqa: E731
    return ["".join(word() + space() for _ in range(length)) for _ in range(n)]


def slowly(texts, vocabulary, pattern):
    """The tokens of every rank by counting all pairs anew for each merge."""
    counts = Counter(word.encode() for text in texts for word in regex.findall(pattern, text))
    words = [([*word], count) for word, count in counts.items()]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocabulary - 1:
        pairs = Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in words:
            at = 0
            while at < len(ids) - 1:
                if (ids[at], ids[at + 1]) == best:
                    ids[at : at + 2] = [len(tokens)]
                at += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_are_those_of_a_slow_trainer(pattern):
    texts = documents(40)
    tokenizer = train(texts, 400, pattern)
    assert tokenizer.ranks == slowly(texts, 400, PATTERNS[pattern])
    assert (tokenizer.n_vocab, tokenizer.end_of_text, tokenizer.kind) == (400, 399, "bpe")


def test_neither_order_nor_chunks_of_documents_change_a_merge(monkeypatch):
    texts = documents(300)
    wanted = train(texts, 700, "gpt2").to_json()
    random.Random(1).shuffle(texts)
    assert train(texts, 700, "gpt2").to_json() == wanted
    monkeypatch.setattr(bpe_training, "BUFFER_CHUNKS", 2)
    small = bpe_training.chunks
    monkeypatch.setattr(bpe_training, "chunks", lambda text, pattern: small(text, pattern, 20))
    assert len(list(bpe_training.chunks(texts[0], PATTERNS["gpt2"]))) > 3
    assert train(texts, 700, "gpt2").to_json() == wanted


def test_no_merge_reaches_from_one_document_into_the_next():
    with pytest.raises(UserError, match="there are 257 ids"):
        train(["a", "b"] * 100, 258, "gpt2")
    assert train(["ab"] * 100, 258, "gpt2").ranks[256] == b"ab"


def test_a_vocabulary_that_the_text_does_not_teach_is_refused():
    # ab, abc and cd: three merges make every word one token
    assert train(["abc cd"], 260, "cl100k").n_vocab == 260
    with pytest.raises(UserError, match=r"vocabulary = 5,000 .*\n.*set vocabulary to 261 at most"):
        train(["abc cd"], 5000, "cl100k")


@pytest.fixture(scope="module", params=PATTERNS)
def both(request):
    """A trained tokenizer, and the trainer that made the same merges out of whole documents."""
    texts = documents(200)
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), 499, pattern=PATTERNS[request.param])
    tokenizer = train(texts, 500, request.param)
    assert {bytes(t): r for t, r in trainer.get_mergeable_ranks()} == {
        token: rank for rank, token in enumerate(tokenizer.ranks)
    }
    return tokenizer, trainer


TEXT = st.text() | st.lists(st.sampled_from([*SYLLABLES, " ", "\n", "  "])).map("".join)


@given(TEXT)
def test_tiktoken_gives_the_trainer_s_ids_and_they_come_back(both, text):
    tokenizer, trainer = both
    ids = tokenizer.encode(text)
    assert ids == list(trainer.encode(text))
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_a_trained_tokenizer_is_saved_whole(both, tmp_path):
    tokenizer, _ = both
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    again = load(tmp_path / "tokenizer.json")
    assert again.to_json() == tokenizer.to_json()
    text = documents(1, seed=9)[0] + "<|endoftext|>"
    assert again.encode(text) == tokenizer.encode(text)


def test_a_million_spaces_are_learnt_from_without_a_panic():
    text = f"ab{' ' * 1_200_000}ab"
    for pattern in PATTERNS:
        assert train([text], 259, pattern).ranks[256:] == [b"  ", b"    "]


def test_a_sample_is_the_fewest_documents_that_hold_its_bytes():
    texts = documents(500)
    found = [Document(text) for text in texts]
    total = sum(len(text.encode()) for text in texts)
    for n_bytes in (1, total // 3, total):
        limit = sample_limit(found, n_bytes)
        inside = [len(text.encode()) for text in texts if hash_of(Document(text)) < limit]
        below = [len(text.encode()) for text in texts if hash_of(Document(text)) < limit - 1]
        assert sum(below) < n_bytes <= sum(inside)
    assert sample_limit(reversed(found), total // 3) == sample_limit(found, total // 3)
    limit = sample_limit(found, 10 * total)
    assert all(hash_of(document) < limit for document in found)
