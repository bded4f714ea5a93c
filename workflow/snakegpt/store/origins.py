"""Where in config.yaml a science setting of an action comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snakegpt.pipeline import Pipeline, Request
from snakegpt.settings import place

BLOCKS = ("model", "training", "evaluation", "sampling")
_EXPERIMENT = {block: f"experiments.{{experiment}}.{block}" for block in BLOCKS}

_TOKENIZER = ("kind", "encoding", "vocabulary", "pattern", "sample_bytes")

# Stage -> where the names in its record start -> where those in config.yaml do.
ORIGINS: dict[str, dict[str, str]] = {
    "build_tokenizer": {
        **{name: f"tokenizers.{{tokenizer}}.{name}" for name in _TOKENIZER},
        "text": "corpora.{corpus}",
    },
    "screen_documents": {
        "text": "corpora.{corpus}",
        "deduplicate": "corpora.{corpus}.deduplicate",
        "words": "corpora.{corpus}.decontaminate.words",
        "drop": "corpora.{corpus}.decontaminate.drop",
    },
    "encode_tokens": {"text": "corpora.{corpus}", "validation": "corpora.{corpus}.validation"},
    "bench_network": _EXPERIMENT,
    "measure_scaling": _EXPERIMENT,
    "draw_network": {},
    "plan_training": _EXPERIMENT,
    "adapt_weights": _EXPERIMENT,
    "train_model": _EXPERIMENT,
    "evaluate_model": _EXPERIMENT,
    "sample_text": _EXPERIMENT,
    "build_report": {
        "settings.scale": "scale",
        "settings.description": "experiments.{experiment}.description",
        "settings.corpus.name": "experiments.{experiment}.corpus",
        "settings.corpus": "corpora.{corpus}",
        "settings.tokenizer.name": "experiments.{experiment}.tokenizer",
        "settings.tokenizer": "tokenizers.{tokenizer}",
        "settings.weights": "weights.{weights}",
        **{f"settings.{block}": origin for block, origin in _EXPERIMENT.items()},
    },
}

# Names in records that no line of config.yaml decides by itself.
ELSEWHERE = {
    "files": "corpora.lock.json",  # pins
    "part": None,  # a share of them
    "machine": "this machine",
    "experiment": None,  # the name of the action itself
    "adopted": None,  # see provenance.told
}


def locate(
    pipeline: Pipeline, request: Request, name: str, files: Sequence[str | Path]
) -> tuple[str | None, str | None]:
    """(name in config.yaml, where it stands) of a setting in an action's record, as far as known.

    experiments.gpt2.laptop.training.steps where the scale's own block sets it, else without `laptop`.
    """
    config = _config_name(pipeline, request, name)
    if config is None:
        return None, ELSEWHERE.get(re.split(r"[.\[]", name)[0])
    names = [config]
    block, _, rest = config.partition(".")
    if block == "experiments":
        experiment, _, rest = rest.partition(".")
        names.insert(0, f"experiments.{experiment}.{pipeline.settings.scale}.{rest}")
    for candidate in names:
        found = place(_parts(candidate), files)
        if found:
            return candidate, f"{found[0]}, line {found[1]}"
    return config, None


def _config_name(pipeline: Pipeline, request: Request, name: str) -> str | None:
    origins = ORIGINS.get(request.stage, {})
    for start in sorted(origins, key=len, reverse=True):
        if name == start or name.startswith((f"{start}.", f"{start}[")):
            return origins[start].format(**_words(pipeline, request)) + name[len(start) :]
    return None


def _words(pipeline: Pipeline, request: Request) -> dict[str, str]:
    """What the braces of ORIGINS stand for."""
    words = dict(request.wildcards)
    if "experiment" in words:
        chosen = pipeline.settings.experiment(words["experiment"])
        words |= {"corpus": chosen.corpus, "tokenizer": chosen.tokenizer}
        words["weights"] = chosen.training.start_from or ""
    elif "corpus" not in words and "tokenizer" in words:
        tokenizer = pipeline.settings.tokenizer(words["tokenizer"])
        words["corpus"] = getattr(tokenizer, "corpus", "")
    return words


def _parts(name: str) -> list[Any]:
    """`a.b[2].c` as the path ["a", "b", 2, "c"]."""
    parts = re.findall(r"\[(\d+)\]|([^.\[\]]+)", name)
    return [int(index) if index else word for index, word in parts]
