"""An experiment: model, training, evaluation, sampling, and how it is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from snakegpt.settings.blocks import LABEL, LATER, Closed, Name, meaningless

ScheduleKind = Literal["cosine", "linear", "warmup_stable_decay"]


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
