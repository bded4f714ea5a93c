"""Fixtures of several test files."""

from __future__ import annotations

import pytest
from store_fixtures import new_store


@pytest.fixture
def here(tmp_path):
    return new_store(tmp_path / "here")


@pytest.fixture
def there(tmp_path):
    return new_store(tmp_path / "there")
