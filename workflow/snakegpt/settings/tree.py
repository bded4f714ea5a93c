"""The root of config.yaml, and what must fit together in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from snakegpt.errors import UserError, nearest
from snakegpt.gpus import GPUS
from snakegpt.lineage import lineage_conflicts
from snakegpt.settings.blocks import Closed, Name, meaningless
from snakegpt.settings.experiments import (
    Execution,
    Experiment,
    exchange_problem,
    model_problems,
    order_problem,
)
from snakegpt.settings.sources import AnyTokenizer, Corpus, HttpSource, Mixture, Tokenizer, Weights

Scale = Literal["laptop", "full"]


class StoreSettings(Closed):
    """The content-addressed store: where it is, how it is checked and shown."""

    path: Annotated[str, Field(min_length=1)] = "store"
    """Folder; the environment variable SNAKEGPT_STORE wins over it."""
    check: Literal["size", "digest"] = "size"
    """What a hit checks of each object: its size, or its sha256 as well, which reads it whole."""
    link: Literal["auto", "symlink", "hardlink", "reflink", "copy"] = "auto"
    """How results/ shows objects; auto: symbolic links, where the filesystem has them."""
    remote: Annotated[str, Field(min_length=1)] | None = None
    """Store that several machines share, asked before a stage runs: a folder or an fsspec URL such as s3://bucket/team. Credentials come from the environment."""
    push: bool = True
    """Give the remote store what runs here."""


class Settings(Closed):
    """The root of config.yaml."""

    scale: Scale = "laptop"
    """laptop: minutes on two CPU cores; full: the published recipe. Picks each experiment's own block."""
    store: StoreSettings = StoreSettings()
    """The content-addressed store."""
    default_experiments: list[Name] = []
    """Experiments whose reports plain `snakemake` builds."""
    execution: Execution = Execution()
    prices: dict[Annotated[str, Field(pattern=r"^\S")], Annotated[float, Field(ge=0)]] = {}
    """What an hour of one GPU costs you, in any currency, by its name in docs/plan.md; for plans."""
    corpora: dict[Name, Corpus]
    """Text sources by name."""
    mixtures: dict[Name, Mixture] = {}
    """Mixtures of them by name; an experiment takes one where it takes a corpus."""
    tokenizers: dict[Name, Tokenizer]
    """Tokenizers by name."""
    weights: dict[Name, Weights] = {}
    """Pretrained weights by name; `training.start_from` takes one."""
    experiments: dict[Name, Experiment]
    """Experiments by name; each gets targets train_<name>, evaluate_<name>, sample_<name>, report_<name>."""

    @field_validator("prices")
    @classmethod
    def _are_of_known_gpus(cls, prices: dict[str, float]) -> dict[str, float]:
        known = [gpu.name for gpu in GPUS]
        for name in prices:
            if name not in known:
                raise ValueError(f"no datasheet of a GPU named '{name}'.{nearest(name, known)}")
        return prices

    def experiment(self, name: str) -> Experiment:
        return _named(self.experiments, name, "experiment")

    def corpus(self, name: str) -> Corpus:
        return _named(self.corpora, name, "corpus")

    def pinned(self, name: str) -> Corpus | Weights:
        """The corpus or the weights of a name: what the lock pins."""
        both: dict[str, Corpus | Weights] = {**self.corpora, **self.weights}
        chosen: Corpus | Weights = _named(both, name, "corpus")
        return chosen

    def shares(self, name: str) -> dict[str, float]:
        """The corpora that a name stands for, each with its weight: one for a corpus itself."""
        if name in self.corpora:
            return {name: 1.0}
        return dict(_named({**self.corpora, **self.mixtures}, name, "corpus").weights)

    def tokenizer(self, name: str) -> AnyTokenizer:
        return _named(self.tokenizers, name, "tokenizer")


def _named(table: Mapping[str, Any], name: str, noun: str) -> Any:
    if name not in table:
        raise UserError(f"unknown {noun} '{name}'.{nearest(name, table)}")
    return table[name]


def conflicts(settings: Settings) -> list[str]:
    """Mistakes that only show when several values are seen together, each with its way out."""
    problems = [
        problem for name in settings.experiments for problem in _conflicts_of(settings, name)
    ]
    problems += [
        f"default_experiments names '{name}', which is not defined.{nearest(name, settings.experiments)}"
        for name in settings.default_experiments
        if name not in settings.experiments
    ]
    for name, mixture in settings.mixtures.items():
        if name in settings.corpora:
            problems.append(f"mixtures.{name} has the name of a corpus; give it another one.")
        problems += [
            f"mixtures.{name}.weights names '{corpus}', which is not defined."
            + nearest(corpus, settings.corpora)
            for corpus in mixture.weights
            if corpus not in settings.corpora
        ]
    for name, tokenizer in settings.tokenizers.items():
        corpus = getattr(tokenizer, "corpus", None)
        if corpus is not None and corpus not in settings.corpora:
            problems.append(
                f"tokenizers.{name}.corpus = '{corpus}' is not defined."
                + nearest(corpus, settings.corpora)
            )
    for name, weights in settings.weights.items():
        # What is locked, and what training starts from, is said by name alone.
        taken: dict[str, Mapping[str, Any]] = {
            "a corpus": settings.corpora,
            "an experiment": settings.experiments,
        }
        problems += [
            f"weights.{name} has the name of {what}; give it another one."
            for what, names in taken.items()
            if name in names
        ]
        if weights.tokenizer not in settings.tokenizers:
            problems.append(
                f"weights.{name}.tokenizer = '{weights.tokenizer}' is not defined."
                + nearest(weights.tokenizer, settings.tokenizers)
            )
    if _holds_password(settings.store.remote or ""):
        problems.append(
            "store.remote holds a password; it would stand in files and logs."
            "\n  credentials come from the environment (AWS_ACCESS_KEY_ID, ...)"
        )
    for name, source in _sources(settings):
        urls = source.urls if isinstance(source, HttpSource) else []
        if any(map(_holds_password, urls)):
            problems.append(
                f"{name}.source.urls holds a password; it would stand in the lock and the store."
                "\n  put it into ~/.netrc"
            )
    return problems


def _conflicts_of(settings: Settings, name: str) -> list[str]:
    """Mistakes that only show when several values of one experiment are seen together."""
    experiment = settings.experiments[name]
    model, training = experiment.model, experiment.training
    problems = []
    where = f"experiments.{name}"
    texts = {**settings.corpora, **settings.mixtures}
    for noun, table in (("corpus", texts), ("tokenizer", settings.tokenizers)):
        value = getattr(experiment, noun)
        if value not in table:
            problems.append(f"{where}.{noun} = '{value}' is not defined.{nearest(value, table)}")
    problems += model_problems(model, f"{where}.model")
    if training.batch_tokens % model.context:
        rows = training.batch_tokens // model.context
        problems.append(
            f"{where}.training.batch_tokens = {training.batch_tokens:,} is not a multiple of"
            f" model.context = {model.context:,};"
            f" nearest that fit: {max(rows, 1) * model.context:,} and {(rows + 1) * model.context:,}."
        )
    problems += lineage_conflicts(settings, name)
    if training.min_learning_rate > training.learning_rate:
        problems.append(
            f"{where}.training.min_learning_rate = {training.min_learning_rate:g} is above"
            f" learning_rate = {training.learning_rate:g}."
        )
    problems += meaningless(training, f"{where}.training")
    how = experiment.execution
    if problem := exchange_problem(training, how.strategy, deterministic=how.deterministic):
        problems.append(f"{where}: {problem}")
    if problem := order_problem(how):
        problems.append(f"{where}: {problem}")
    if training.skip_spikes_above is not None and training.spike_window >= training.steps:
        problems.append(
            f"{where}.training.skip_spikes_above = {training.skip_spikes_above:g} would find nothing:"
            f" spike_window = {training.spike_window:,} losses are not complete before the last of"
            f" {training.steps:,} steps. Set spike_window to a tenth of the steps or so."
        )
    end = training.decay_end
    cooldown = training.cooldown_fraction
    if training.schedule == "warmup_stable_decay" and cooldown and round(cooldown * end) < 1:
        problems.append(
            f"{where}.training.cooldown_fraction = {cooldown:g} of {end:,} steps is less than one step:"
            f" set it to {1 / end:.2g} or more, or schedule to another one."
        )
    if training.warmup_steps > end:
        problems.append(
            f"{where}.training.warmup_steps = {training.warmup_steps:,} is beyond the end of the"
            f" decay at step {end:,}."
        )
    return problems


def _sources(settings: Settings) -> list[tuple[str, Any]]:
    """Place and source of each corpus and of all weights."""
    return [
        *((f"corpora.{name}", corpus.source) for name, corpus in settings.corpora.items()),
        *((f"weights.{name}", weights.source) for name, weights in settings.weights.items()),
    ]


def _holds_password(url: str) -> bool:
    return re.search(r"://[^/]*:[^/]*@", url) is not None
