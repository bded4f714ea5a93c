"""Which split a document, or a piece of it, belongs to."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from fractions import Fraction

from snakegpt.documents.document import Document
from snakegpt.settings import Validation


class Splitter:
    """Divides documents by a corpus's validation settings.

    document   the whole text goes by its own hash: independent of order and parts, and exact
               duplicates stay on one side
    position   the first characters to train, the rest to val; to train as many as fit its share
    file       all documents of the files that are named go to val
    """

    def __init__(self, validation: Validation) -> None:
        self._validation = validation
        self._share = Fraction(str(validation.fraction))  # the decimal that the settings say
        # Digests below it are val: the least integer that is not below share x 2^64.
        self._limit = math.ceil(self._share * 2**64).to_bytes(9, "big")

    def divide(self, document: Document, file: str) -> Iterator[tuple[str, int, int]]:
        """(split, first character, end) of each piece; no piece is empty.

        file  path of the document's file in its corpus
        """
        n = document.n_characters
        if self._validation.by == "position":
            # As nanoGPT cuts, int(n x 0.9), but in integers: for Python's floats 10 x (1 - 0.9) is
            # below 1.
            n_train = (
                n * (self._share.denominator - self._share.numerator) // self._share.denominator
            )
            pieces = (("train", 0, n_train), ("val", n_train, n))
            yield from (piece for piece in pieces if piece[1] < piece[2])
        elif self._validation.by == "file":
            is_val = any(fnmatch.fnmatchcase(file, pattern) for pattern in self._validation.files)
            yield ("val" if is_val else "train"), 0, n
        else:
            is_val = b"\0" + document.digest[:8] < self._limit
            yield ("val" if is_val else "train"), 0, n
