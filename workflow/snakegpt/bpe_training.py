"""Learn a byte-pair vocabulary from text, with rustbpe; the result runs in tiktoken like any other.

The merge learnt next is that of the commonest pair of neighbouring tokens inside pretokens; of equally
common ones, that of the lowest ids. Counts are sums over documents, so neither their order nor the
number of threads changes a merge, and no pair reaches from one document into the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from snakegpt.documents.document import Document
from snakegpt.errors import UserError
from snakegpt.tokenizers import PATTERNS, BytePairTokenizer, chunks

BUFFER_CHUNKS = 256  # of 64 K characters, counted at once by all threads
HASH_BITS = 16


def train(texts: Iterable[str], vocabulary: int, pattern: str) -> BytePairTokenizer:
    """The tokenizer of `vocabulary` ids, end-of-text among them, learnt from documents or pieces of them.

    pattern  one of the names of PATTERNS
    raises   UserError if the texts do not hold that many different pairs
    """
    import rustbpe

    regex = PATTERNS[pattern]
    trainer = rustbpe.Tokenizer()
    cut = (chunk for text in texts for chunk in chunks(text, regex))
    trainer.train_from_iterator(cut, vocabulary - 1, buffer_size=BUFFER_CHUNKS, pattern=regex)
    by_rank = {rank: bytes(token) for token, rank in trainer.get_mergeable_ranks()}
    n_ids = len(by_rank) + 1
    if n_ids < vocabulary:
        raise UserError(
            f"vocabulary = {vocabulary:,} is more than this text teaches: when its pretokens are whole,"
            f" there are {n_ids:,} ids.\n  set vocabulary to {n_ids:,} at most, or use more text"
        )
    return BytePairTokenizer(regex, [by_rank[rank] for rank in range(len(by_rank))], kind="bpe")


def hash_of(document: Document) -> int:
    """A document's place among 65,536; another hash than the one that chooses validation documents."""
    person = b"bpe sample"
    digest = hashlib.blake2b(document.digest, digest_size=8, person=person).digest()
    return int.from_bytes(digest, "big") >> (64 - HASH_BITS)


def sample_limit(documents: Iterable[Document], n_bytes: int) -> int:
    """The least limit such that the documents whose hash is below it hold `n_bytes` of text, or all do."""
    text_bytes = np.zeros(1 << HASH_BITS, dtype=np.int64)
    for document in documents:
        text_bytes[hash_of(document)] += document.n_bytes
    return int(np.searchsorted(np.cumsum(text_bytes), n_bytes)) + 1
