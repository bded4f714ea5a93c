"""Token shards: the format that llm.c and modded-nanogpt read, with our fingerprint in words they ignore.

256 x int32, little-endian   [0] 20240520   [1] version 1   [2] number of tokens
                             [8..15] the tokenizer's fingerprint, 32 bytes   [16] bytes a token (2)
then uint16 ids, little-endian; the file is exactly 1,024 + 2 n bytes

Above 65,536 ids: magic 20240801, version 7, 4 bytes a token and uint32 ids, as llm.c has it for Llama 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from snakegpt.artefacts import WriteBehind, note
from snakegpt.errors import UserError
from snakegpt.identity import file_digest

# Bytes a token -> magic and version.
FORMATS = {2: (20240520, 1), 4: (20240801, 7)}
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
FINGERPRINT_WORDS = slice(8, 16)
TOKEN_BYTES_WORD = 16
UINT16_IDS = 1 << 16
MOST_TOKENS = 2**31 - 1  # the count is an int32


def token_bytes(n_vocab: int) -> int:
    """Bytes a token of a vocabulary's shards: 2 up to 65,536 ids, else 4."""
    return 2 if n_vocab <= UINT16_IDS else 4


@dataclass(frozen=True)
class Shard:
    """What a manifest says of a shard."""

    name: str
    sha256: str
    bytes: int
    n_tokens: int


class ShardWriter:
    """Writes one shard. Its header counts the tokens, so its place stays empty until the end.

    with ShardWriter(path, fingerprint, n_vocab) as writer:
        writer.add(ids)
    writer.shard

    n_vocab  of the tokenizer; decides how wide an id is
    """

    def __init__(self, path: Path, fingerprint: str, n_vocab: int = UINT16_IDS) -> None:
        self.path, self.fingerprint, self.n_tokens = path, fingerprint, 0
        self.token_bytes = token_bytes(n_vocab)
        self._sha256 = ""

    def add(self, ids: Sequence[int] | NDArray[np.integer]) -> None:
        """Append ids that fit; numpy refuses a list's larger ones, and would wrap an array's."""
        fits = 1 << (8 * self.token_bytes)
        assert not isinstance(ids, np.ndarray) or not len(ids) or ids.max() < fits
        tokens = np.asarray(ids, dtype=f"<u{self.token_bytes}")
        if self.n_tokens + len(tokens) > MOST_TOKENS:
            raise UserError(
                f"{self.path.name} would hold more than {MOST_TOKENS:,} tokens,"
                " which is all that its header can count"
            )
        self._file.write(tokens.data)
        self.n_tokens += len(tokens)

    def __enter__(self) -> ShardWriter:
        self._file = WriteBehind(self.path)
        self._file.write(bytes(HEADER_BYTES))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is not None:
            self.path.unlink()
            return
        with self.path.open("r+b") as file:
            file.write(header(self.n_tokens, self.fingerprint, self.token_bytes))
        self._sha256 = file_digest(self.path)
        note(self.path, self._sha256)

    @property
    def shard(self) -> Shard:
        """Name, digest and size of the finished file."""
        n_bytes = HEADER_BYTES + self.token_bytes * self.n_tokens
        return Shard(self.path.name, self._sha256, n_bytes, self.n_tokens)


class ShardSeries:
    """A shard, and where that cannot count all its tokens further ones: a.bin, a_1.bin, a_2.bin, ..."""

    def __init__(self, path: Path, fingerprint: str, n_vocab: int = UINT16_IDS) -> None:
        self._first, self._kind = path, (fingerprint, n_vocab)
        self._opened = contextlib.ExitStack()
        self._writers: list[ShardWriter] = []

    def _begin(self) -> None:
        self._opened.close()  # the one before is complete
        number = len(self._writers)
        name = f"{self._first.stem}_{number}.bin" if number else self._first.name
        writer = ShardWriter(self._first.with_name(name), *self._kind)
        self._writers.append(self._opened.enter_context(writer))

    def add(self, ids: NDArray[np.integer]) -> None:
        """Append ids."""
        while len(ids):
            room = MOST_TOKENS - self._writers[-1].n_tokens
            if not room:
                self._begin()
                continue
            self._writers[-1].add(ids[:room])
            ids = ids[room:]

    @property
    def n_tokens(self) -> int:
        return sum(writer.n_tokens for writer in self._writers)

    @property
    def shards(self) -> list[Shard]:
        """The finished files."""
        return [writer.shard for writer in self._writers]

    def __enter__(self) -> ShardSeries:
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)


def header(n_tokens: int, fingerprint: str, token_bytes: int = 2) -> bytes:
    """The first 1,024 bytes of a shard."""
    words = np.zeros(HEADER_WORDS, dtype="<i4")
    words[:3] = *FORMATS[token_bytes], n_tokens
    words[FINGERPRINT_WORDS] = np.frombuffer(bytes.fromhex(fingerprint), dtype="<i4")
    words[TOKEN_BYTES_WORD] = token_bytes
    return words.tobytes()


def read_shard(path: Path, *, fingerprint: str | None = None) -> NDArray[np.unsignedinteger]:
    """The ids of a shard, memory-mapped: uint16 or uint32, as its header says.

    fingerprint  the tokenizer it must be of; None: any, also a shard that another program wrote
    raises       UserError that says what is wrong with the file
    """
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise UserError(f"{path} is no shard: {size:,} bytes, shorter than its header.")
    words = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
    widths = {form: width for width, form in FORMATS.items()}
    begins = int(words[0]), int(words[1])
    if begins not in widths:
        raise UserError(
            f"{path} is no shard of tokens: it begins with {begins[0]}, {begins[1]}"
            " instead of 20240520, 1 (uint16) or 20240801, 7 (uint32)."
        )
    n_tokens, width = int(words[2]), widths[begins]
    expected = HEADER_BYTES + width * n_tokens
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, its header of {n_tokens:,} tokens means {expected:,}: it is damaged."
        )
    found = words[FINGERPRINT_WORDS].tobytes().hex()
    if fingerprint is not None and found != fingerprint:
        raise UserError(
            f"{path} was encoded by tokenizer {found},\n  but tokenizer {fingerprint} is wanted."
        )
    if n_tokens == 0:
        return np.empty(0, dtype=f"<u{width}")
    return np.memmap(path, dtype=f"<u{width}", mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
