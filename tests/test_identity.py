"""Keys: one value, one byte string; code counts by what it does, not by how it is written."""

from __future__ import annotations

import hashlib
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snakegpt.identity import Action, canonical_json, code_of, digest


def test_canonical_json_has_one_golden_form():
    value = {"b": [1, 2.5, None, True], "a": {"é": "\n"}}
    expected = b'{"a":{"\\u00e9":"\\n"},"b":[1,2.5,null,true]}'
    assert canonical_json(value) == expected
    assert digest(value) == hashlib.sha256(expected).hexdigest()


def test_the_golden_key_has_not_moved():
    action = Action("train_model", {"steps": 3}, {"revision": 1, "modules": {}}, {"tokens": ["00"]})
    by_hand = (
        b'{"code":{"modules":{},"revision":1},"inputs":{"tokens":["00"]},'
        b'"science":{"steps":3},"stage":"train_model"}'
    )
    assert action.key == hashlib.sha256(by_hand).hexdigest()
    assert action.key == "077714436c0623e001904a5d996184077f84f8b2b59fd088f43ec4adfe7b67c3"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values))
def test_the_order_of_keys_counts_for_nothing(value):
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1, 2}, Path("x"), {1: 2}, b"x", object()]
)
def test_what_cannot_be_written_twice_the_same_is_refused(value):
    with pytest.raises(TypeError, match="value"):
        canonical_json({"nested": [value]})


SCIENCE = '''
"""Docstring."""
import math
import os
from snakegpt import leaf

LIMIT = 3


def double(x: int, y: int = 2) -> int:
    """Twice."""
    # a comment
    return x * y


class Box:
    """A box."""

    size: int

    def area(self) -> float:
        return math.pi * self.size
'''


def package(
    folder: Path, science: str = SCIENCE, leaf: str = "VALUE = 1\n", stage: str = ""
) -> Path:
    root = folder / "snakegpt"
    (root / "stages").mkdir(parents=True, exist_ok=True)
    (root / "__init__.py").touch()
    (root / "science.py").write_text(textwrap.dedent(science))
    (root / "leaf.py").write_text(leaf)
    (root / "stages" / "cook.py").write_text(
        stage or 'REVISION = 1\nSCIENCE = ("snakegpt.science",)\n'
    )
    return root


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("comment", "# a comment", "# another"),
        ("docstring", '"""Twice."""', '"""Two times.\n\n    In many words.\n    """'),
        ("no docstring", '    """Twice."""\n', ""),
        ("module docstring", '"""Docstring."""', '"""Other."""'),
        ("formatting", "return x * y", "return (\n        x\n        * y\n    )"),
        ("annotation", "x: int, y: int = 2) -> int", "x, y: 'float' = 2)"),
        ("field annotation", "size: int", "size: float"),
        ("import order", "import math\nimport os", "import os\nimport math"),
        ("import grouping", "import math\nimport os", "import math, os"),
        ("future import", "import math", "from __future__ import annotations\nimport math"),
    ],
)
def test_how_code_is_written_counts_for_nothing(tmp_path, what, old, new):
    before = code_of("cook", package(tmp_path / "a"))
    assert old in SCIENCE
    assert code_of("cook", package(tmp_path / "b", SCIENCE.replace(old, new))) == before, what


@pytest.mark.parametrize(
    ("what", "old", "new", "where"),
    [
        ("constant", "LIMIT = 3", "LIMIT = 4", ""),
        ("operator", "x * y", "x + y", "double"),
        ("default", "y: int = 2", "y: int = 3", "double"),
        ("argument name", "x: int", "z: int", "double"),
        ("field", "size: int", "width: int", "Box"),
        ("imported module", "import os", "import sys", ""),
        ("type of a literal", "LIMIT = 3", "LIMIT = 3.0", ""),
    ],
)
def test_what_code_does_counts_and_is_named(tmp_path, what, old, new, where):
    before = code_of("cook", package(tmp_path / "a"))["modules"]["snakegpt.science"]
    changed = package(tmp_path / "b", SCIENCE.replace(old, new))
    after = code_of("cook", changed)["modules"]["snakegpt.science"]
    assert {name for name in before if before[name] != after[name]} == {where}, what


def test_imported_modules_of_the_package_count(tmp_path):
    before = code_of("cook", package(tmp_path / "a"))
    after = code_of("cook", package(tmp_path / "b", leaf="VALUE = 2\n"))
    assert before["modules"]["snakegpt.leaf"] != after["modules"]["snakegpt.leaf"]
    assert before["modules"]["snakegpt.science"] == after["modules"]["snakegpt.science"]


def test_an_import_inside_a_function_counts_too(tmp_path):
    hidden = SCIENCE.replace("from snakegpt import leaf\n", "").replace(
        "    return x * y", "    if x:\n        from snakegpt.leaf import VALUE\n    return x * y"
    )
    before = code_of("cook", package(tmp_path / "a", hidden))
    after = code_of("cook", package(tmp_path / "b", hidden, leaf="VALUE = 2\n"))
    assert before["modules"]["snakegpt.leaf"] != after["modules"]["snakegpt.leaf"]


def test_the_rest_of_a_stage_counts_by_its_revision_alone(tmp_path):
    declaration = 'REVISION = {}\nSCIENCE = ("snakegpt.science",)\n'
    before = code_of("cook", package(tmp_path / "a", stage=declaration.format(1)))
    edited = code_of(
        "cook", package(tmp_path / "b", stage=declaration.format(1) + "print('loud')\n")
    )
    bumped = code_of("cook", package(tmp_path / "c", stage=declaration.format(2)))
    assert edited == before
    assert digest(bumped) != digest(before)


def test_a_stage_without_its_declaration_is_a_defect(tmp_path):
    with pytest.raises(ValueError, match="REVISION and SCIENCE"):
        code_of("cook", package(tmp_path, stage="SCIENCE = ()\n"))
