"""From files to settings: merged, checked, and at their scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from snakegpt.errors import UserError
from snakegpt.settings.messages import changed_in, explain
from snakegpt.settings.tree import Settings, conflicts


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: maps merge deeply, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        both_maps = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_maps else value
    return merged


def load(config: Mapping[str, Any], files: Sequence[str | Path] = ()) -> Settings:
    """Check a configuration and resolve its scale.

    config   the merged contents of the configuration files
    files    those files, last one wins; only used to say where a bad value stands
    returns  settings whose experiments have their scale block and the common execution settings laid on
    raises   UserError that lists every mistake with its place and, for a mistyped name, the nearest valid one
    """
    _parse(config, files)  # the whole tree as written, so that both scales' blocks are checked
    scale = config.get("scale", "laptop")
    resolved = dict(config)
    resolved["experiments"] = {
        name: _at_scale(experiment, scale, config.get("execution") or {})
        for name, experiment in config["experiments"].items()
    }
    settings = _parse(resolved, files)
    if problems := conflicts(settings):
        raise UserError("\n".join(problems) + changed_in(files))
    return settings


def load_files(files: Sequence[str | Path], overrides: Mapping[str, Any] | None = None) -> Settings:
    """Settings from YAML files, later ones laid over earlier ones, and top-level overrides."""
    config: dict[str, Any] = {}
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}.") from None
        try:
            config = merge(config, yaml.safe_load(text) or {})
        except yaml.YAMLError as error:
            raise UserError(f"{file} is not valid YAML: {error}") from None
    return load(merge(config, overrides or {}), files)


def _at_scale(
    experiment: Mapping[str, Any], scale: str, execution: Mapping[str, Any]
) -> dict[str, Any]:
    base = {key: value for key, value in experiment.items() if key not in ("laptop", "full")}
    at_scale = merge(base, experiment.get(scale) or {})
    at_scale["execution"] = merge(execution, at_scale.get("execution") or {})
    return at_scale


def _parse(config: Mapping[str, Any], files: Sequence[str | Path]) -> Settings:
    try:
        return Settings.model_validate(config)
    except ValidationError as error:
        lines = [explain(dict(problem), config, files) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines)) + changed_in(files)) from None
