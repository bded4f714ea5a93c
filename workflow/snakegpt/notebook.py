"""Results for notebooks: an experiment's metrics, evaluation, samples, weights, settings and provenance.

    from snakegpt import results

    results()                  # every experiment that has results, one row each
    gpt2 = results("gpt2")
    gpt2.metrics               # pandas, one row a line of metrics.jsonl

Reads what stands in results/ and the records behind it; runs nothing and reads no settings file.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snakegpt.errors import UserError, nearest
from snakegpt.pipeline import OUTPUTS
from snakegpt.store import Store, provenance
from snakegpt.store.links import maker, pointer

if TYPE_CHECKING:
    import pandas

# Stage -> the target that makes its results: snakemake train_gpt2.
_TARGETS = {"train_model": "train", "evaluate_model": "evaluate", "sample_text": "sample"}


class Results:
    """What one experiment left; each attribute is read when it is asked for.

    raises   UserError, from every attribute, that names what is not there and the command that makes it
    """

    def __init__(self, experiment: str, project: Path) -> None:
        self.experiment, self.project = experiment, project

    def __repr__(self) -> str:
        return f"<results of {self.experiment} in {self.project}>"

    @functools.cached_property
    def metrics(self) -> pandas.DataFrame:
        """metrics.jsonl, one row a line; `event` says what a line is (docs/metrics.md)."""
        import pandas

        lines = _json_lines(self._file("train_model", "metrics.jsonl"))
        # A column that not every event has keeps its integers: step 10, not 10.0.
        values: dict[str, list[Any]] = {}
        for line in lines:
            for name, value in line.items():
                values.setdefault(name, []).append(value)
        whole = [name for name, column in values.items() if all(type(v) is int for v in column)]
        return pandas.DataFrame(lines).astype(dict.fromkeys(whole, "Int64"))

    @functools.cached_property
    def evaluation(self) -> dict[str, Any]:
        """evaluation.json: losses of the last and the best weights on the validation split."""
        text = self._file("evaluate_model", "evaluation.json").read_text(encoding="utf-8")
        value: dict[str, Any] = json.loads(text)
        return value

    @functools.cached_property
    def samples(self) -> pandas.DataFrame:
        """samples.jsonl, one row a sample: prompt, sample, text, ids, finish_reason."""
        import pandas

        return pandas.DataFrame(_json_lines(self._file("sample_text", "samples.jsonl")))

    @property
    def weights(self) -> Path:
        """The last weights, safetensors, float32; config.json beside them is what transformers loads."""
        return self._file("train_model", "weights.safetensors")

    @property
    def best_weights(self) -> Path:
        """The weights with the lowest validation loss."""
        return self._file("train_model", "best.safetensors")

    @property
    def settings(self) -> dict[str, Any]:
        """Blocks model and training as they were when these weights were made, whatever config.yaml says now."""
        path = self.weights
        record = maker(path, self.project / "results")
        if record is None:
            raise UserError(
                f"no record says what made {path}: it is no link that the pipeline made."
            )
        science: dict[str, Any] = record["science"]
        return science

    @property
    def provenance(self) -> list[dict[str, Any]]:
        """Every action behind the results that are there, sources first: stage, key, inputs, host, commit, ..."""
        results = self.project / "results"
        paths = [self._path(stage, Path(OUTPUTS[stage][0]).name) for stage in _TARGETS]
        there = [path for path in paths if path.exists()]
        records = [record for path in there if (record := maker(path, results))]
        if not records:
            self._file("train_model", "weights.safetensors")  # says what to do
            raise UserError(f"no record says what made the results of {self.experiment}.")
        # Records point at each other by key, so the store is where their own files lie.
        record_file = next(p for path in there if (p := pointer(path, results)).exists())
        store = Store(Path(os.path.realpath(record_file)).parents[2])
        return [provenance.summary(r) for r in provenance.chain_of(store, records, results)]

    def _path(self, stage: str, name: str) -> Path:
        folder = Path(OUTPUTS[stage][0].format(experiment=self.experiment)).parent
        return self.project / folder / name

    def _file(self, stage: str, name: str) -> Path:
        path = self._path(stage, name)
        if not path.exists():
            gone = "points to an object that is gone" if path.is_symlink() else "is not there"
            raise UserError(
                f"{path} {gone}.\n"
                f"  make it: snakemake --cores all {_TARGETS[stage]}_{self.experiment}"
            )
        return path


def experiments(project: Path) -> list[str]:
    """Experiments of which anything stands in results/."""
    patterns = [OUTPUTS[stage][0].replace("{experiment}", "*") for stage in _TARGETS]
    found = {path.parent.name for pattern in patterns for path in project.glob(pattern)}
    return sorted(found)


def one(experiment: str, project: Path) -> Results:
    """The results of an experiment.

    raises   UserError if nothing of it stands in results/
    """
    known = experiments(project)
    if experiment not in known:
        raise UserError(
            f"no results of an experiment '{experiment}' in {(project / 'results').absolute()}."
            f"{nearest(experiment, known)}\n"
            f"  make them: snakemake --cores all report_{experiment}"
        )
    return Results(experiment, project)


def overview(project: Path) -> pandas.DataFrame:
    """One row an experiment: its key figures where they are there, of the best weights."""
    import pandas

    rows = [_row(Results(name, project)) for name in experiments(project)]
    index = pandas.Index([row.pop("experiment") for row in rows], name="experiment")
    columns = [
        "n_parameters", "steps", "loss_nats", "perplexity", "bits_per_byte",
        "rate_tokens_per_s", "train_time_s",
    ]  # fmt: skip
    return pandas.DataFrame(rows, index=index, columns=columns)


def _row(found: Results) -> dict[str, Any]:
    row: dict[str, Any] = {"experiment": found.experiment}
    metrics = found._path("train_model", "metrics.jsonl")
    if metrics.exists():
        lines = _json_lines(metrics)
        row["n_parameters"] = next((x["n_parameters"] for x in lines if "n_parameters" in x), None)
        for end in lines[-1:]:
            row |= {"steps": end.get("step"), "rate_tokens_per_s": end.get("rate_tokens_per_s")}
            row["train_time_s"] = end.get("elapsed_s")
    if found._path("evaluate_model", "evaluation.json").exists():
        best: Mapping[str, Any] = found.evaluation["best"]
        row |= {name: best[name] for name in ("loss_nats", "perplexity", "bits_per_byte")}
    return row


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]
