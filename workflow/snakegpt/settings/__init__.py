"""The settings tree: everything config.yaml may say, with units, ranges and defaults.

This package is the only truth about settings: the JSON schema (workflow/schemas), the reference
(docs/settings.md) and the checks of the stages are generated from it or call it. Two kinds of
settings are told apart by where they stand:

    experiments, corpora, weights, ...  science: they decide bytes and are part of an artefact's key
    execution, store, scale             execution: where, how fast, how loudly; never part of a key

(The few labels inside science blocks, such as a corpus's licence, are marked with `LABEL` and left
out of keys too; so is where a corpus comes from, since its content is pinned by sha256.)
"""

from snakegpt.settings.blocks import LABEL, LATER, Closed, is_label, meaningless, science
from snakegpt.settings.experiments import (
    PRESETS,
    Block,
    Evaluation,
    Execution,
    Experiment,
    Model,
    Sampling,
    ScheduleKind,
    Training,
    exchange_problem,
    model_problems,
    order_problem,
)
from snakegpt.settings.loading import load, load_files, merge
from snakegpt.settings.messages import place
from snakegpt.settings.sources import (
    AnyTokenizer,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Corpus,
    Decontamination,
    Gpt2Tokenizer,
    HttpSource,
    HuggingFaceModelSource,
    HuggingFaceSource,
    LocalSource,
    Mixture,
    RegistrySource,
    Source,
    TiktokenTokenizer,
    Validation,
    Weights,
    WeightsSource,
)
from snakegpt.settings.tree import Scale, Settings, StoreSettings

__all__ = [
    "LABEL",
    "LATER",
    "PRESETS",
    "AnyTokenizer",
    "Block",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Closed",
    "Corpus",
    "Decontamination",
    "Evaluation",
    "Execution",
    "Experiment",
    "Gpt2Tokenizer",
    "HttpSource",
    "HuggingFaceModelSource",
    "HuggingFaceSource",
    "LocalSource",
    "Mixture",
    "Model",
    "RegistrySource",
    "Sampling",
    "Scale",
    "ScheduleKind",
    "Settings",
    "Source",
    "StoreSettings",
    "TiktokenTokenizer",
    "Training",
    "Validation",
    "Weights",
    "WeightsSource",
    "exchange_problem",
    "is_label",
    "load",
    "load_files",
    "meaningless",
    "merge",
    "model_problems",
    "order_problem",
    "place",
    "science",
]
