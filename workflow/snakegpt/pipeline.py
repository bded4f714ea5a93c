"""What each stage of the pipeline reads, writes and depends on, for given settings.

The rules, `why` and the reports all ask here, so that Snakemake's view of the pipeline and the
store's are one. Every path is relative to the working directory.

    corpora -> tokenizers -> tokens (, weights) -> models -> evaluations, samples -> reports
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from snakegpt.corpus_parts import divide
from snakegpt.errors import UserError, nearest
from snakegpt.lineage import start_conflicts
from snakegpt.locks import Entry, is_current
from snakegpt.settings import Corpus, Experiment, Settings, science

# Stage -> the files each run of it is asked for; a rule's `output:` says the same (a test holds them equal).
OUTPUTS = {
    "fetch_corpus": ["results/corpora/{corpus}/corpus.json"],
    "fetch_weights": ["results/weights/{weights}/weights.json"],
    "build_tokenizer": ["results/tokenizers/{tokenizer}/tokenizer.json"],
    "screen_documents": ["results/corpora/{corpus}/drops.json"],
    "encode_tokens": [
        "results/tokens/{corpus}-{tokenizer}/train_{part}.bin",
        "results/tokens/{corpus}-{tokenizer}/val_{part}.bin",
        "results/tokens/{corpus}-{tokenizer}/part_{part}.json",
    ],
    "index_tokens": ["results/tokens/{corpus}-{tokenizer}/manifest.json"],
    "bench_network": ["results/networks/{experiment}/network.json"],
    "measure_scaling": ["results/scaling/{experiment}/scaling.json"],
    "draw_network": ["results/networks/{experiment}/network.html"],
    "plan_training": ["results/plans/{experiment}/plan.json"],
    "adapt_weights": [
        "results/starts/{experiment}/weights.safetensors",
        "results/starts/{experiment}/start.json",
    ],
    "train_model": [
        "results/models/{experiment}/weights.safetensors",
        "results/models/{experiment}/best.safetensors",
        "results/models/{experiment}/config.json",
        "results/models/{experiment}/metrics.jsonl",
        "results/models/{experiment}/optimizer.safetensors",
    ],
    "evaluate_model": ["results/evaluations/{experiment}/evaluation.json"],
    "sample_text": ["results/samples/{experiment}/samples.jsonl"],
    "build_report": [
        "results/reports/{experiment}/report.html",
        "results/reports/{experiment}/summary.json",
    ],
    "build_index": ["results/reports/index.html"],
}

# Target prefix -> the result it stands for: `snakemake train_gpt2`.
TARGETS = {
    "scaling": "results/networks/{experiment}/network.html",
    "plan": "results/plans/{experiment}/plan.json",
    "train": "results/models/{experiment}/weights.safetensors",
    "evaluate": "results/evaluations/{experiment}/evaluation.json",
    "sample": "results/samples/{experiment}/samples.jsonl",
    "report": "results/reports/{experiment}/report.html",
}

MACHINE = "SNAKEGPT_MACHINE"  # environment variable: what `machine` says, for the jobs of a cluster
UNLOCKED_PART = "000000"  # stands in the plan for the parts of a corpus that is not locked yet


@dataclass(frozen=True)
class Request:
    """One stage run as the settings ask for it.

    settings   science settings, part of the key
    inputs     role -> files that are part of the key by content
    unhashed   role -> files the stage gets or waits for that are not
    execution  execution settings, part of no key
    """

    stage: str
    wildcards: Mapping[str, str]
    settings: dict[str, Any]
    inputs: dict[str, list[str]] = field(default_factory=dict)
    unhashed: dict[str, list[str]] = field(default_factory=dict)
    execution: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What people call this run: `gpt2`, `shakespeare-gpt2/000000`."""
        tokens = "-".join(self.wildcards[w] for w in ("corpus", "tokenizer") if w in self.wildcards)
        rest = [self.wildcards[w] for w in ("experiment", "weights", "part") if w in self.wildcards]
        return "/".join([tokens, *rest] if tokens else rest) or "all"

    @property
    def outputs(self) -> list[str]:
        """The files Snakemake asks for; the action may publish more beside them."""
        return [pattern.format(**self.wildcards) for pattern in OUTPUTS[self.stage]]

    @property
    def folder(self) -> str:
        return os.path.dirname(self.outputs[0])


class Pipeline:
    """The requests of all stages under some settings and corpus locks."""

    def __init__(self, settings: Settings, locks: Mapping[str, Entry]) -> None:
        self.settings = settings
        self.locks = locks
        self._requests: dict[tuple[Any, ...], Request] = {}
        self._parts: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def request(self, stage: str, wildcards: Mapping[str, str]) -> Request:
        """The run of a stage for some wildcards.

        raises   UserError for a name the settings do not know
        """
        known = (stage, *sorted(wildcards.items()))
        # Kept, since Snakemake asks several times for each of many thousand jobs.
        if known not in self._requests:
            build = getattr(self, f"_{stage}", None)
            if build is None:
                raise UserError(f"unknown stage '{stage}'.{nearest(stage, OUTPUTS)}")
            self._requests[known] = build(**wildcards)
        return self._requests[known]

    def find(self, path: str) -> Request | None:
        """The request that makes a file below results/, or None."""
        for stage, patterns in OUTPUTS.items():
            for pattern in patterns:
                match = _expression(pattern).fullmatch(path)
                if match:
                    return self.request(stage, match.groupdict())
        return None

    # ---- corpora and tokens ----

    def lock(self, name: str) -> Entry | None:
        """The pins of a corpus or of weights; None if not locked, or locked from another source."""
        source = self.settings.pinned(name).source.model_dump()
        locked = self.locks.get(name)
        return locked if locked and is_current(locked, source) else None

    def parts(self, corpus: str) -> dict[str, list[dict[str, Any]]]:
        """Part id -> locked files, in lock order, up to part_bytes; known before any download."""
        if corpus not in self._parts:  # asked for by every job of every part
            self._parts[corpus] = self._divide(corpus)
        return self._parts[corpus]

    def _divide(self, corpus: str) -> dict[str, list[dict[str, Any]]]:
        locked = self.lock(corpus)
        if locked is None:
            return {UNLOCKED_PART: []}
        chosen = self.settings.corpus(corpus)
        return divide(locked.files, chosen.part_bytes, chosen.document_separator)

    def _fetch_corpus(self, corpus: str) -> Request:
        return self._fetch("fetch_corpus", corpus=corpus)

    def _fetch_weights(self, weights: str) -> Request:
        return self._fetch("fetch_weights", weights=weights)

    def _fetch(self, stage: str, **wildcard: str) -> Request:
        [name] = wildcard.values()
        locked = self.lock(name)
        return Request(
            stage,
            wildcard,
            settings={"files": [dict(vars(f)) for f in locked.files] if locked else None},
            execution={
                **wildcard,
                "source": self.settings.pinned(name).source.model_dump(),
                "archive": asdict(locked.archive) if locked and locked.archive else None,
                "revision": locked.revision if locked else None,
                "lock_file": "corpora.lock.json",
                "download_workers": self.settings.execution.download_workers,
                "download_rate": self.settings.execution.download_rate,
                "log_interval_s": self.settings.execution.log_interval_s,
            },
        )

    def _build_tokenizer(self, tokenizer: str) -> Request:
        chosen = self.settings.tokenizer(tokenizer)
        settings, inputs = science(chosen), {}
        corpus = settings.pop("corpus", None)  # its name decides nothing, its content does
        if corpus is not None:
            settings["text"] = _text_settings(self.settings.corpus(corpus))
            inputs["corpus"] = [_output("fetch_corpus", corpus=corpus)]
        return Request("build_tokenizer", {"tokenizer": tokenizer}, settings, inputs)

    def _encode_tokens(self, corpus: str, tokenizer: str, part: str) -> Request:
        files = self.parts(corpus).get(part)
        if files is None:
            raise UserError(f"corpus {corpus} has no part {part}.")
        chosen = self.settings.corpus(corpus)
        return Request(
            "encode_tokens",
            {"corpus": corpus, "tokenizer": tokenizer, "part": part},
            # The part's files enter by their locked digests, so that changing one file of a corpus
            # encodes its part alone; corpus.json only says where they lie.
            settings={
                "part": part,
                "files": files,
                "text": _text_settings(chosen),
                "validation": science(chosen.validation),
            },
            inputs={
                "tokenizer": [_output("build_tokenizer", tokenizer=tokenizer)],
                **self._drops(corpus),
            },
            unhashed={"corpus": [_output("fetch_corpus", corpus=corpus)]},
            execution={
                "engine": self.settings.execution.engine,
                "log_interval_s": self.settings.execution.log_interval_s,
            },
        )

    def _drops(self, corpus: str) -> dict[str, list[str]]:
        chosen = self.settings.corpus(corpus)
        screened = chosen.deduplicate or chosen.decontaminate
        return {"drops": [_output("screen_documents", corpus=corpus)]} if screened else {}

    def _screen_documents(self, corpus: str) -> Request:
        chosen = self.settings.corpus(corpus)
        against = chosen.decontaminate.against if chosen.decontaminate else []
        comparison: dict[str, Any] = {}
        if chosen.decontaminate:
            comparison = {
                "against": [_text_settings(self.settings.corpus(name)) for name in against],
                "words": chosen.decontaminate.words,
                "drop": chosen.decontaminate.drop,
            }
        return Request(
            "screen_documents",
            {"corpus": corpus},
            settings={
                "files": [file for files in self.parts(corpus).values() for file in files],
                "text": _text_settings(chosen),
                "deduplicate": chosen.deduplicate,
                **comparison,
            },
            inputs={"against": [_output("fetch_corpus", corpus=name) for name in against]}
            if against
            else {},
            unhashed={"corpus": [_output("fetch_corpus", corpus=corpus)]},
            execution={"log_interval_s": self.settings.execution.log_interval_s},
        )

    def _index_tokens(self, corpus: str, tokenizer: str) -> Request:
        if corpus in self.settings.mixtures:
            return self._mix_tokens(corpus, tokenizer)
        parts = [
            _output("encode_tokens", 2, corpus=corpus, tokenizer=tokenizer, part=part)
            for part in self.parts(corpus)
        ]
        wildcards = {"corpus": corpus, "tokenizer": tokenizer}
        inputs = {"parts": parts, **self._drops(corpus)}
        return Request("index_tokens", wildcards, settings={}, inputs=inputs)

    def _mix_tokens(self, mixture: str, tokenizer: str) -> Request:
        shares = self.settings.shares(mixture)
        return Request(
            "index_tokens",
            {"corpus": mixture, "tokenizer": tokenizer},
            settings={"weights": list(shares.values())},
            inputs={
                "sets": [_output("index_tokens", corpus=c, tokenizer=tokenizer) for c in shares]
            },
        )

    # ---- experiments ----

    def _bench_network(self, experiment: str) -> Request:
        chosen = self.settings.experiment(experiment)
        # A measurement of this machine, so the machine is what identifies it; and of nodes like it, so
        # their number does too.
        several = {"nodes": chosen.execution.nodes} if chosen.execution.nodes > 1 else {}
        return self._experiment_request(
            "bench_network",
            experiment,
            settings={"model": science(chosen.model), "machine": machine(), **several},
            inputs={"tokenizer": [_tokenizer_of(chosen)]},
            execution={"batch_tokens": chosen.training.batch_tokens},
        )

    def _measure_scaling(self, experiment: str) -> Request:
        chosen = self.settings.experiment(experiment)
        several = {"nodes": chosen.execution.nodes} if chosen.execution.nodes > 1 else {}
        return self._experiment_request(
            "measure_scaling",
            experiment,
            settings={
                "model": science(chosen.model),
                "training": _recipe_of(chosen),
                "machine": machine(),
                **several,
            },
            inputs={"tokens": [_tokens_of(chosen)]},
            execution={"network": _output("bench_network", experiment=experiment)},
        )

    def _draw_network(self, experiment: str) -> Request:
        of = functools.partial(_output, experiment=experiment)
        return Request(
            "draw_network",
            {"experiment": experiment},
            settings={"experiment": experiment},
            inputs={"network": [of("bench_network")], "scaling": [of("measure_scaling")]},
        )

    def _plan_training(self, experiment: str) -> Request:
        chosen = self.settings.experiment(experiment)
        before = chosen.training.continue_from
        done = {"steps_done": self.settings.experiment(before).training.steps} if before else {}
        return self._experiment_request(
            "plan_training",
            experiment,
            settings={
                "model": science(chosen.model),
                "training": _recipe_of(chosen),
                "machine": machine(),
                "prices": self.settings.prices,
                **done,
            },
            inputs={"tokenizer": [_tokenizer_of(chosen)]},
            execution=self._size_of(chosen.corpus),
        )

    def _size_of(self, corpus: str) -> dict[str, Any]:
        """Raw bytes of a corpus or mixture, None before it is locked, and the share that validates."""
        names = list(self.settings.shares(corpus))
        locks = [self.lock(name) for name in names]
        sizes = [locked.n_bytes for locked in locks if locked]
        is_known = len(sizes) == len(names)
        weights = sizes if is_known else [1] * len(names)
        fractions = [self.settings.corpus(name).validation.fraction for name in names]
        validating = sum(n * part for n, part in zip(weights, fractions, strict=True))
        return {
            "corpus_bytes": sum(sizes) if is_known else None,
            "validation_fraction": validating / sum(weights),
        }

    def _adapt_weights(self, experiment: str) -> Request:
        chosen = self.settings.experiment(experiment)
        name = chosen.training.start_from
        if name is None:
            raise UserError(f"experiment {experiment} starts from new weights: none are adapted.")
        if problems := start_conflicts(self.settings, experiment):
            raise UserError("\n".join(problems))
        model = science(chosen.model)
        model.pop("dropout")  # may differ, and decides no weight
        if name in self.settings.weights:
            theirs = self.settings.weights[name].tokenizer
            inputs = {
                "weights": [_output("fetch_weights", weights=name)],
                "trained_with": [_output("build_tokenizer", tokenizer=theirs)],
            }
        else:
            inputs = {
                "weights": [_output("train_model", 1, experiment=name)],
                "config": [_output("train_model", 2, experiment=name)],
            }
        return self._experiment_request(
            "adapt_weights",
            experiment,
            settings={"model": model},
            inputs={**inputs, "tokenizer": [_tokenizer_of(chosen)]},
        )

    def _train_model(self, experiment: str) -> Request:
        chosen = self.settings.experiment(experiment)
        training = _recipe_of(chosen)
        before = training.pop("continue_from")  # its name decides nothing, what it left does
        left = {"weights": 0, "config": 2, "optimizer": 4} if before else {}
        inputs = {
            "tokens": [_tokens_of(chosen)],
            **{role: [_output("train_model", i, experiment=before)] for role, i in left.items()},
        }
        if chosen.training.start_from:
            inputs["initial"] = [_output("adapt_weights", experiment=experiment)]
        return self._experiment_request(
            "train_model",
            experiment,
            settings={"model": science(chosen.model), "training": training},
            inputs=inputs,
            execution={
                "network": _output("bench_network", experiment=experiment),
                "started_from": before or chosen.training.start_from,
            },
        )

    def _evaluate_model(self, experiment: str) -> Request:
        chosen = self.settings.experiment(experiment)
        return self._experiment_request(
            "evaluate_model",
            experiment,
            settings={"evaluation": science(chosen.evaluation)},
            inputs={
                "weights": [_output("train_model", 0, experiment=experiment)],
                "best": [_output("train_model", 1, experiment=experiment)],
                "config": [_output("train_model", 2, experiment=experiment)],
                "tokens": [_tokens_of(chosen)],
                "tokenizer": [_tokenizer_of(chosen)],
            },
        )

    def _sample_text(self, experiment: str) -> Request:
        chosen = self.settings.experiment(experiment)
        return self._experiment_request(
            "sample_text",
            experiment,
            settings={"sampling": science(chosen.sampling)},
            inputs={
                "weights": [_output("train_model", 1, experiment=experiment)],
                "config": [_output("train_model", 2, experiment=experiment)],
                "tokenizer": [_tokenizer_of(chosen)],
            },
        )

    def _build_report(self, experiment: str) -> Request:
        chosen = self.settings.experiment(experiment)
        blocks = ("model", "training", "evaluation", "sampling")
        shares = self.settings.shares(chosen.corpus)
        described: dict[str, Any] = {
            "scale": self.settings.scale,
            "description": chosen.description,
            "corpus": self._described(chosen.corpus),
            "tokenizer": {
                "name": chosen.tokenizer,
                **self.settings.tokenizer(chosen.tokenizer).model_dump(),
            },
            **{name: getattr(chosen, name).model_dump() for name in blocks},
        }
        start = chosen.training.start_from
        if start and start in self.settings.weights:
            theirs = self.settings.weights[start]
            described["weights"] = {"name": start, **theirs.model_dump()}
        of = functools.partial(_output, experiment=experiment)
        return self._experiment_request(
            "build_report",
            experiment,
            settings={"experiment": experiment, "settings": described},
            inputs={
                "corpus": [_output("fetch_corpus", corpus=name) for name in shares],
                "tokenizer": [_tokenizer_of(chosen)],
                "tokens": [_tokens_of(chosen)],
                "plan": [of("plan_training")],
                "network": [of("bench_network")],
                "model_config": [of("train_model", 2)],
                "metrics": [of("train_model", 3)],
                "evaluation": [of("evaluate_model")],
                "samples": [of("sample_text")],
                **({"start": [of("adapt_weights", 1)]} if start else {}),
            },
        )

    def _described(self, corpus: str) -> dict[str, Any]:
        """All that the settings say of a corpus, or of a mixture and its corpora."""
        if corpus in self.settings.corpora:
            return {"name": corpus, **self.settings.corpus(corpus).model_dump()}
        mixture = self.settings.mixtures[corpus]
        parts = [self._described(name) for name in mixture.weights]
        return {"name": corpus, **mixture.model_dump(), "corpora": parts}

    def _build_index(self) -> Request:
        summaries = [
            _output("build_report", 1, experiment=experiment)
            for experiment in self.settings.default_experiments
        ]
        # Pages that are there get a link. As inputs they would be measured for its sake; and only the
        # index looks, so that no measurement makes a report anew.
        networks = [
            experiment
            for experiment in self.settings.default_experiments
            if Path(_output("draw_network", experiment=experiment)).exists()
        ]
        return Request(
            "build_index", {}, settings={"networks": networks}, inputs={"summaries": summaries}
        )

    def _experiment_request(
        self,
        stage: str,
        experiment: str,
        settings: dict[str, Any],
        inputs: dict[str, list[str]],
        execution: dict[str, Any] | None = None,
    ) -> Request:
        chosen = self.settings.experiment(experiment)
        return Request(
            stage,
            {"experiment": experiment},
            settings,
            inputs,
            execution={**chosen.execution.model_dump(), **(execution or {})},
        )


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    """What paths of a pattern of OUTPUTS look like, with a group for each wildcard."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>[a-z0-9_]+)", re.escape(pattern)))


def _output(stage: str, index: int = 0, **wildcards: str) -> str:
    return OUTPUTS[stage][index].format(**wildcards)


def _tokens_of(experiment: Experiment) -> str:
    return _output("index_tokens", corpus=experiment.corpus, tokenizer=experiment.tokenizer)


def _tokenizer_of(experiment: Experiment) -> str:
    return _output("build_tokenizer", tokenizer=experiment.tokenizer)


def _recipe_of(experiment: Experiment) -> dict[str, Any]:
    """Training settings that decide bytes: of what it starts from the content does, not the name."""
    recipe = science(experiment.training)
    recipe.pop("start_from", None)
    return recipe


def _text_settings(corpus: Corpus) -> dict[str, Any]:
    """The settings that decide which documents a file holds."""
    names = (
        "text_column",
        "document_separator",
        "encoding_errors",
        "minimum_characters",
        "filter",
    )
    return {name: getattr(corpus, name) for name in names}


def usable_threads() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def machine() -> dict[str, Any]:
    """What a measurement of this machine depends on: host, processor, cores, memory, GPUs.

    In a job of a cluster, what it was for the machine that Snakemake was started on, or another node
    would ask for measurements of its own.
    """
    if MACHINE in os.environ:
        told: dict[str, Any] = json.loads(os.environ[MACHINE])
        return told
    gpus = Path("/proc/driver/nvidia/gpus")
    return {
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": usable_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "gpus": len(list(gpus.iterdir())) if gpus.is_dir() else 0,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
