"""Which documents are kept, and what becomes of what is no text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from snakegpt.documents.document import Document
from snakegpt.errors import UserError
from snakegpt.settings import Closed


class TextSettings(Closed):
    """Which documents a file holds; settings.Corpus says what each field means."""

    text_column: str = "text"
    document_separator: str | None = None
    encoding_errors: Literal["refuse", "replace"] = "refuse"
    minimum_characters: int = 0
    filter: str | None = None


@dataclass
class Counts:
    """What was left out or altered on the way.

    dropped         documents, by reason
    replaced_bytes  places where invalid UTF-8 or a lone surrogate became U+FFFD
    """

    dropped: Counter[str] = field(default_factory=lambda: Counter({"empty": 0}))
    replaced_bytes: int = 0


class Filter:
    """Decides which documents are kept, and counts the others."""

    def __init__(self, settings: TextSettings, counts: Counts) -> None:
        self._settings, self._counts = settings, counts
        self.columns: set[str] = set()
        if settings.filter is not None:
            self._prepare(settings.filter)

    def _prepare(self, expression: str) -> None:
        import ast

        from simpleeval import EvalWithCompoundTypes, InvalidExpression

        self._evaluator = EvalWithCompoundTypes(functions=dict(FILTER_FUNCTIONS))
        try:
            self._parsed = self._evaluator.parse(expression)
        except (InvalidExpression, SyntaxError) as error:
            raise UserError(f"filter: '{expression}' is no expression: {error}.") from None
        names = {node.id for node in ast.walk(self._parsed) if isinstance(node, ast.Name)}
        self.columns = (
            names - set(FILTER_FUNCTIONS) - {"text", "characters", "true", "false", "null"}
        )

    def keeps(self, document: Document, row: Mapping[str, Any], where: str) -> bool:
        if not document.n_characters:
            self._counts.dropped["empty"] += 1
        elif document.n_characters < self._settings.minimum_characters:
            self._counts.dropped["short"] += 1
        elif self._settings.filter is not None and not self._evaluate(document, row, where):
            self._counts.dropped["filter"] += 1
        else:
            return True
        return False

    def _evaluate(self, document: Document, row: Mapping[str, Any], where: str) -> bool:
        missing = self.columns - row.keys()
        if missing:
            raise UserError(
                f"{where} has no column '{min(missing)}', which the corpus's filter names."
                f" Its columns: {', '.join(row) or 'none'}.\n"
                "  every filter may use `text` and `characters` besides"
            )
        text = next(document.chunks(), "")  # of a large document its first million characters
        self._evaluator.names = {
            **row,
            "text": text,
            "characters": document.n_characters,
            "true": True,
            "false": False,
            "null": None,
        }
        try:
            return bool(self._evaluator.eval(self._settings.filter, previously_parsed=self._parsed))
        except Exception as error:  # whatever an expression can do wrong with this row's values
            raise UserError(f"{where}: the corpus's filter fails: {error}.") from None


FILTER_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "len": len,
    "min": min,
    "max": max,
    "abs": abs,
    "round": round,
    "int": int,
    "float": float,
    "str": str,
}


def not_utf8(where: str, offset: int, byte: int, reason: str) -> UserError:
    return UserError(
        f"{where} is not valid UTF-8 at byte {offset:,} (0x{byte:02x}: {reason}).\n"
        "  repair the file, or set encoding_errors: replace to have U+FFFD in its place"
    )
