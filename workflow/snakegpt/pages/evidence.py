"""What is known about an experiment, and its key figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snakegpt.charts import thinned

CURVE_POINTS = 60  # of the validation curve that the summary carries for the index
SAMPLE_CHARACTERS = 400  # of the sample that the summary carries


@dataclass(frozen=True)
class Evidence:
    """All that is known about an experiment, as the stages wrote it.

    settings    blocks corpus, tokenizer, model, training, evaluation, sampling; description, scale;
                weights, where training started from such
    corpora     corpus.json of the corpus, or of each corpus of a mixture
    metrics     the lines of metrics.jsonl
    start       start.json of the weights that training started from; None for new weights
    provenance  records of the stage runs behind it, sources first; None where stages ran by hand
    digests     input role -> sha256 of its file
    """

    experiment: str
    settings: Mapping[str, Any]
    corpora: Sequence[Mapping[str, Any]]
    tokenizer: Mapping[str, Any]
    tokens: Mapping[str, Any]
    plan: Mapping[str, Any]
    network: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    provenance: Sequence[Mapping[str, Any]] | None
    digests: Mapping[str, str]
    start: Mapping[str, Any] | None = None

    @property
    def texts(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Settings and corpus.json of each corpus: one, or those of a mixture."""
        block = self.settings["corpus"]
        return list(zip(block.get("corpora", [block]), self.corpora, strict=True))

    def events(self, kind: str) -> list[Mapping[str, Any]]:
        return [line for line in self.metrics if line["event"] == kind]

    @property
    def launch(self) -> Mapping[str, Any]:
        """How training ran, as its last start said."""
        return [line for line in self.metrics if line["event"] in ("start", "resume")][-1]

    @property
    def end(self) -> Mapping[str, Any]:
        return self.events("end")[-1]

    @property
    def trained_tokens(self) -> int:
        return int(self.end["step"]) * int(self.settings["training"]["batch_tokens"])


def summary(evidence: Evidence) -> dict[str, Any]:
    """What the index and other programs want to know of an experiment: the figures of its best weights."""
    best = evidence.evaluation["best"]
    first = evidence.samples[0] if evidence.samples else {"prompt": "", "text": ""}
    curve = [(v["step"], v["loss"]) for v in evidence.events("validation")]
    return {
        "experiment": evidence.experiment,
        "description": evidence.settings.get("description", ""),
        "corpus": evidence.settings["corpus"]["name"],
        "tokenizer": evidence.settings["tokenizer"]["name"],
        "loss_nats": best["loss_nats"],
        "perplexity": best["perplexity"],
        "bits_per_byte": best["bits_per_byte"],
        "n_parameters": evidence.launch["n_parameters"],
        "tokens": evidence.trained_tokens,
        "rate_tokens_per_s": evidence.end["rate_tokens_per_s"],
        "train_time_s": evidence.end["elapsed_s"],
        "prompt": first["prompt"],
        "sample": first["text"][:SAMPLE_CHARACTERS],
        "validation_curve": [list(point) for point in thinned(curve, CURVE_POINTS)],
    }
