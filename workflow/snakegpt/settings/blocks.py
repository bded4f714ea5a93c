"""What every block of the settings is: closed, frozen, described, and of a key or of none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
LABEL = {"identity": False}  # on a field of a science block: describes, decides no byte
# On one that came when there were results already: its default is how they were made, and stays out of keys.
LATER = {"identity": "unless default"}


class Closed(BaseModel):
    """A settings block: unknown keys are errors, values are frozen, every field has a description.

    Some fields mean something only for one value of another field, and are null for the others.
    `CHOICES` says which, and their defaults: choosing field -> its value -> field -> default.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    CHOICES: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _take_defaults_of_choices(cls, values: Any) -> Any:
        if not (isinstance(values, Mapping) and cls.CHOICES):
            return values
        defaults: dict[str, Any] = {}
        for chooser, options in cls.CHOICES.items():
            chosen = values.get(chooser, cls.model_fields[chooser].default)
            defaults |= options.get(chosen, {}) if isinstance(chosen, str) else {}
        return {**defaults, **values}


def meaningless(block: Closed, where: str) -> list[str]:
    """Complaints about fields that are set although what was chosen does not know them."""
    problems = []
    for chooser, options in block.CHOICES.items():
        chosen = getattr(block, chooser)
        for field in dict.fromkeys(field for fields in options.values() for field in fields):
            knowing = [option for option, fields in options.items() if field in fields]
            value = getattr(block, field)
            if value is not None and chosen not in knowing:
                problems.append(
                    f"{where}.{field} = {value} means nothing for {chooser} = {chosen};"
                    f" only {' and '.join(knowing)} knows it: remove it."
                )
    return problems


def science(block: BaseModel) -> dict[str, Any]:
    """The identity part of a settings block as plain JSON values: every field that is no LABEL.

    A field that is LATER is left out while it has its default.
    """
    values = {}
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        as_before = _identity(field) == LATER["identity"] and value == field.default
        if not (is_label(field) or as_before):
            values[name] = science(value) if isinstance(value, BaseModel) else value
    return values


def _identity(field: FieldInfo) -> Any:
    extra = field.json_schema_extra
    return extra.get("identity") if isinstance(extra, dict) else None


def is_label(field: FieldInfo) -> bool:
    """Whether a field describes only, and so is no part of identity."""
    return _identity(field) is False
