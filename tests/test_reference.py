"""What is generated from the settings is up to date, and complete."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import yaml
from snakegpt import reference, settings

ROOT = Path(__file__).parent.parent


def test_schema_and_reference_are_up_to_date():
    assert (ROOT / reference.SCHEMA).read_text(encoding="utf-8") == reference.schema(), (
        "run: make generate"
    )
    assert (ROOT / reference.REFERENCE).read_text(encoding="utf-8") == reference.reference()


def test_every_block_is_in_the_reference():
    blocks = {
        block
        for block in vars(settings).values()
        if isinstance(block, type) and issubclass(block, settings.Closed)
    }
    assert blocks - {settings.Closed, settings.Block} == set(reference.BLOCKS)


def test_the_schema_accepts_the_shipped_configuration_and_refuses_a_typo():
    schema = json.loads(reference.schema())
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(config))
    config["experiments"]["gpt2"]["laptop"]["training"]["lerning_rate"] = 1
    assert list(validator.iter_errors(config))
