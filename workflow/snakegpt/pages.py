"""The pages that people read: one per experiment, and the index over all of them.

What is said is decided here, how it looks in `templates/`. A page is one HTML file without scripts and
without a reference to anything outside itself. All text from corpora and models is untrusted and escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from snakegpt import charts
from snakegpt.progress import quantity

SAMPLES_SHOWN = 8
FILES_SHOWN = 100
CURVE_POINTS = 60  # of the validation curve that the summary carries for the index
SAMPLE_CHARACTERS = 400  # of the sample that the summary carries

SECTIONS = (
    ("samples", "What it writes"),
    ("training", "How it learned"),
    ("evaluation", "How well it predicts"),
    ("plan", "Planned, and what happened"),
    ("data", "What it read"),
    ("network", "The network under it"),
    ("reproduce", "How to get it again"),
    ("provenance", "What follows from what"),
)


@dataclass(frozen=True)
class Evidence:
    """All that is known about an experiment, as the stages wrote it.

    settings    blocks corpus, tokenizer, model, training, evaluation, sampling; description, scale
    metrics     the lines of metrics.jsonl
    provenance  records of the stage runs behind it, sources first; None where stages ran by hand
    digests     input role -> sha256 of its file
    """

    experiment: str
    settings: Mapping[str, Any]
    corpus: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    tokens: Mapping[str, Any]
    plan: Mapping[str, Any]
    network: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    provenance: Sequence[Mapping[str, Any]] | None
    digests: Mapping[str, str]

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


# ---- pages ---------------------------------------------------------------------------------------


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
        "validation_curve": [list(point) for point in charts.thinned(curve, CURVE_POINTS)],
    }


def report_page(evidence: Evidence) -> str:
    """The page of one experiment."""
    settings = evidence.settings
    context = {
        "experiment": evidence.experiment,
        "description": settings.get("description", ""),
        "scale": settings.get("scale"),
        "sections": SECTIONS,
        "lead": _lead(evidence),
        "headline": _headline(evidence),
        "sampling": settings["sampling"],
        "samples": [{**sample, "how": _how_it_ended(sample)} for sample in evidence.samples],
        "n_samples_shown": SAMPLES_SHOWN,
        "charts": {name: Markup(svg) for name, svg in _charts(evidence).items()},
        "interruptions": _interruptions(evidence),
        "resumes": [_resume(event) for event in evidence.events("resume")],
        "evaluation": _evaluation(evidence),
        "comparison": _comparison(evidence),
        "arithmetic": _arithmetic(evidence),
        "corpus": _corpus(evidence),
        "n_files_shown": FILES_SHOWN,
        "tokens": _tokens(evidence),
        "tokenizer": _tokenizer(evidence),
        "network": _network(evidence),
        "commands": _commands(evidence),
        "dirty": any(action.get("dirty") for action in evidence.provenance or ()),
        "settings_yaml": settings_yaml(evidence.experiment, settings),
        "chain": _chain(evidence),
        "actions": [_action(action) for action in evidence.provenance or ()],
        "versions": _versions(evidence),
    }
    return _environment().get_template("report.html.j2").render(context)


def index_page(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The page over all experiments, best bits per byte first."""
    ranked = sorted(summaries, key=lambda s: (s["bits_per_byte"], s["experiment"]))
    experiments = []
    for found in ranked:
        curve = [(float(x), float(y)) for x, y in found["validation_curve"]]
        what = f"validation loss of {found['experiment']} by step"
        experiments.append({**found, "sparkline": Markup(charts.sparkline(curve, what))})
    return _environment().get_template("index.html.j2").render(experiments=experiments)


def settings_yaml(experiment: str, settings: Mapping[str, Any]) -> str:
    """A configuration file that runs exactly these settings, laid over any config.yaml.

    Everything stands in the block of the scale, which wins over the experiment's own values.
    """
    scale = settings.get("scale") or "laptop"
    corpus, tokenizer = dict(settings["corpus"]), dict(settings["tokenizer"])
    names = {"corpus": corpus.pop("name"), "tokenizer": tokenizer.pop("name")}
    blocks = ("model", "training", "evaluation", "sampling")
    tree: dict[str, Any] = {"scale": scale, "corpora": {names["corpus"]: corpus}}
    tree["tokenizers"] = {names["tokenizer"]: tokenizer}
    tree["experiments"] = {
        experiment: {
            **names,
            "description": settings.get("description", ""),
            scale: {**names, **{name: settings[name] for name in blocks}},
        }
    }
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=90))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("snakegpt", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "quantity": quantity,
        "number": lambda value: f"{value:,}",
        "bytes": readable_bytes,
        "fixed": lambda value, decimals: f"{value:.{decimals}f}",
        "figures": figures,
        "time": readable_time,
        "visible": visible,
    }
    return environment


# ---- how things are written ------------------------------------------------------------------------


def readable_time(seconds: float) -> str:
    """A time as people say it, to about three digits: 350 µs, 18.4 ms, 43 s, 5 min 12 s, 2 h 5 min."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (10.0, 1.0, "s")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 2880:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds / 86_400:.3g} days"


def readable_bytes(n_bytes: float) -> str:
    """Bytes with a decimal prefix: 5,057,198 -> 5.06 MB."""
    number = quantity(n_bytes)
    return f"{number[:-1]} {number[-1]}B" if number[-1].isalpha() else f"{number} bytes"


def figures(value: float) -> str:
    """About four significant digits, never in scientific notation: 94.63, 1,234, 0.001570."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def visible(text: str) -> str:
    """Text whose control characters are replaced by their pictures, since HTML cannot hold them."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\N{SYMBOL FOR DELETE}" if c == "\x7f" else c
        for c in text
    )  # fmt: skip


# ---- what the report says --------------------------------------------------------------------------


def _lead(evidence: Evidence) -> str:
    end, launch, best = evidence.end, evidence.launch, evidence.evaluation["best"]
    train = evidence.tokens["splits"]["train"]
    processes = "one process" if launch["ranks"] == 1 else f"{launch['ranks']} processes"
    epochs = evidence.trained_tokens / max(train["n_tokens"], 1)
    return (
        f"A GPT of {quantity(launch['n_parameters'])} parameters, trained from random weights for"
        f" {end['step']:,} steps on {evidence.settings['corpus']['name']}: it saw"
        f" {quantity(evidence.trained_tokens)} tokens, {figures(epochs)} times the training text, in"
        f" {readable_time(end['elapsed_s'])} on {launch['device']} with {processes}. On text it never"
        f" saw, its best weights need {best['bits_per_byte']:.3f} bits for a byte."
    )


def _headline(evidence: Evidence) -> list[dict[str, str]]:
    best, end = evidence.evaluation["best"], evidence.end
    stderr = best.get("loss_stderr")
    precision = f"± {stderr:.4f} nats a token" if stderr is not None else "nats a token"
    rows = [
        ("Validation loss", f"{best['loss_nats']:.4f}", precision),
        ("Perplexity", figures(best["perplexity"]), "of a token"),
        ("Bits per byte", f"{best['bits_per_byte']:.4f}", "of validation text"),
        ("Speed", quantity(end["rate_tokens_per_s"]), "tokens per second"),
        ("Training time", readable_time(end["elapsed_s"]), "without validation and saving"),
        (
            "Parameters",
            quantity(evidence.launch["n_parameters"]),
            f"{evidence.launch['n_parameters']:,}",
        ),
    ]
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in rows]


def _how_it_ended(sample: Mapping[str, Any]) -> str:
    count = f"{len(sample['ids']):,} tokens"
    if not sample["prompt"].strip():
        count = f"From the start of a document, {count}"
    ended = "ended by itself" if sample["finish_reason"] == "end_of_text" else "cut at the limit"
    return f"{count}, {ended}."


def _charts(evidence: Evidence) -> dict[str, str]:
    train = evidence.events("train")
    validation = [(v["step"], v["loss"]) for v in evidence.events("validation")]
    planned = evidence.plan.get("rate_tokens_per_s_estimate")
    return {
        "loss": charts.loss_chart(
            [(t["step"], t["loss"]) for t in train],
            validation,
            math.log(evidence.tokenizer["n_vocab"]),
            evidence.end["best_step"],
        ),
        "learning_rate": charts.learning_rate_chart(
            [(t["step"], t["learning_rate"]) for t in train]
        ),
        "gradient_norm": charts.gradient_chart(
            [(t["step"], t["gradient_norm"]) for t in train],
            evidence.settings["training"]["gradient_clip"],
        ),
        "throughput": charts.throughput_chart(
            [(t["elapsed_s"], t["rate_tokens_per_s"]) for t in train], planned
        ),
        "bandwidth": charts.bandwidth_chart(
            [(r["bytes"], r["busbw_gb_per_s"]) for r in evidence.network["all_reduce"]]
        )
        if evidence.network["all_reduce"]
        else "",
    }


def _interruptions(evidence: Evidence) -> str:
    resumes = len(evidence.events("resume"))
    if not resumes:
        return "It ran through without an interruption."
    times = "once" if resumes == 1 else f"{resumes} times"
    return (
        f"It was interrupted {times} and went on from its saved state. What came after that state is"
        " not shown twice: the curves are those of the weights."
    )


def _resume(event: Mapping[str, Any]) -> str:
    where = f"{event['ranks']} x {event['device']}, " if "ranks" in event else ""
    return f"resumed at step {event['step']:,} ({where}{event.get('precision', '')})".replace(
        ", )", ")"
    )


def _evaluation(evidence: Evidence) -> dict[str, Any]:
    found, end = evidence.evaluation, evidence.end
    rows = [
        {"name": "best on validation", "step": f"{end['best_step']:,}", **found["best"]},
        {"name": "last", "step": f"{end['step']:,}", **found["weights"]},
    ]
    n_vocab = evidence.tokenizer["n_vocab"]
    uniform = math.log(n_vocab)
    rows.append(
        {
            "name": "a uniform guess",
            "step": "",
            "loss_nats": uniform,
            "loss_stderr": None,
            "perplexity": float(n_vocab),
            "bits_per_byte": uniform / math.log(2) * found["n_tokens"] / max(found["n_bytes"], 1),
        }
    )
    rows = [{"loss_stderr": None, **row} for row in rows]
    return {**{k: found[k] for k in ("split", "n_tokens", "n_bytes")}, "rows": rows}


def _comparison(evidence: Evidence) -> list[dict[str, str]]:
    plan, end, launch = evidence.plan, evidence.end, evidence.launch
    splits = evidence.tokens["splits"]
    train_tokens = splits["train"]["n_tokens"]
    corpus_tokens = sum(split["n_tokens"] for split in splits.values())

    def row(name: str, planned: float | None, actual: float | None, write: Any) -> dict[str, str]:
        known = planned is not None and actual is not None and planned > 0
        return {
            "name": name,
            "planned": "unknown" if planned is None else write(planned),
            "actual": "unknown" if actual is None else write(actual),
            "ratio": f"{actual / planned:.2f}" if known and actual and planned else "",
        }

    rows = [
        row("training time", plan["time_estimate_s"], end["elapsed_s"], readable_time),
        row(
            "tokens per second",
            plan["rate_tokens_per_s_estimate"],
            end["rate_tokens_per_s"],
            quantity,
        ),
        row(
            "memory of a process",
            plan["memory_bytes"]["total"],
            end.get("peak_memory_bytes"),
            readable_bytes,
        ),
        row("tokens of the corpus", plan["corpus_tokens_estimate"], corpus_tokens, quantity),
        row(
            "epochs",
            plan["epochs_estimate"],
            evidence.trained_tokens / train_tokens if train_tokens else None,
            figures,
        ),
        row("parameters", plan["n_parameters"], launch["n_parameters"], lambda n: f"{n:,}"),
    ]
    shapes = [
        " x ".join(str(of[name]) for name in ("ranks", "rows_per_rank", "accumulation"))
        for of in (plan, launch)
    ]
    name = "processes x rows x accumulated"
    return [*rows, {"name": name, "planned": shapes[0], "actual": shapes[1], "ratio": ""}]


def _arithmetic(evidence: Evidence) -> str:
    plan, end, launch = evidence.plan, evidence.end, evidence.launch
    reached = end["rate_tokens_per_s"] * plan["flops_per_token"]
    text = (
        f"A token costs {quantity(plan['flops_per_token'])}FLOP (6N + 12LCT, as nanoGPT and PaLM count),"
        f" so training ran at {quantity(reached)}FLOP/s, {reached / plan['matmul_flops_per_s']:.0%} of"
        f" the {quantity(plan['matmul_flops_per_s'])}FLOP/s that matrix products alone reached here in"
        f" {plan['precision']}."
    )
    if launch["precision"] != plan["precision"]:
        text += f" Training itself ran in {launch['precision']}."
    wall_s = [a["wall_s"] for a in evidence.provenance or () if a["stage"] == "train_model"]
    if wall_s:
        text += (
            f" With start-up, validation and saving the stage took {readable_time(wall_s[-1])}"
            + ("." if not evidence.events("resume") else " since it was last started.")
        )
    return text


def _corpus(evidence: Evidence) -> dict[str, Any]:
    block, files = evidence.settings["corpus"], evidence.corpus["files"]
    source = block.get("source") or {}
    where = {
        "registry": lambda s: (
            f"the archive of {s['package']} on the package registry {s['registry']}"
        ),
        "huggingface": lambda s: f"{s['repo']} on the Hugging Face hub",
        "http": lambda s: ", ".join(s["urls"]),
        "local": lambda s: ", ".join(s["paths"]),
    }.get(str(source.get("kind")), lambda s: "not stated")
    validation = block.get("validation") or {}
    share = f"{validation.get('fraction', 0) * 100:g} %"
    chosen = {
        "document": f"by a hash of each document's text, {share} of them",
        "position": f"by position, the last {share} of every document",
    }.get(str(validation.get("by")), "as the settings say")
    return {
        "name": block["name"],
        "description": (block.get("description") or "").rstrip("."),
        "license": block.get("license") or "unknown",
        "source": where(source),
        "validation": chosen,
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
    }


def _tokens(evidence: Evidence) -> dict[str, Any]:
    splits = [
        {
            **split,
            "name": {"train": "training", "val": "validation"}.get(name, name),
            "bytes_per_token": split["n_text_bytes"] / max(split["n_tokens"], 1),
            "n_shards": len(split["shards"]),
        }
        for name, split in sorted(evidence.tokens["splits"].items())
    ]
    dropped = evidence.tokens.get("dropped") or {}
    remarks = [
        f"{count:,} {kind} documents were dropped" for kind, count in dropped.items() if count
    ]
    replaced = evidence.tokens.get("replaced_bytes")
    if replaced:
        remarks.append(f"{replaced:,} bytes that were no UTF-8 were replaced by U+FFFD")
    text = "; ".join(remarks)
    return {"splits": splits, "remarks": f"{text[0].upper()}{text[1:]}." if text else ""}


def _tokenizer(evidence: Evidence) -> dict[str, Any]:
    found = evidence.tokenizer
    kinds = {
        "gpt2": "OpenAI's GPT-2 byte-pair encoding",
        "char": "one id per character",
    }
    padded = evidence.plan.get("n_vocab_padded")
    text = f"{kinds.get(found['kind'], found['kind'])}, {found['n_vocab']:,} ids"
    if padded and padded != found["n_vocab"]:
        text += f", padded to {padded:,} in the model"
    return {
        "name": evidence.settings["tokenizer"]["name"],
        "text": f"{text}; id {found['end_of_text']:,} starts every document.",
        "fingerprint": found["fingerprint"],
        "characters": [_character(c) for c in found.get("characters") or ()],
    }


def _character(character: str) -> str:
    return (
        character
        if character.isprintable() and character != " "
        else repr(character)[1:-1].replace(" ", "␠")
    )


def _network(evidence: Evidence) -> dict[str, Any]:
    found = evidence.network
    text = (
        f"{found['ranks']} processes sum their gradients by {found['backend']} before every update,"
        f" {readable_bytes(found['gradient_bytes'])} a step."
    )
    tcp = found.get("iperf3")
    if tcp:
        text += f" A plain TCP stream over the same interface carries {tcp['gb_per_s']:.3g} GB/s (iperf3)."
    reasons = [
        f"{what} was not measured: {why}." for what, why in (found.get("reason") or {}).items()
    ]
    return {"rows": found["all_reduce"], "text": text, "advice": [*found["advice"], *reasons]}


def _commands(evidence: Evidence) -> str:
    scale = evidence.settings.get("scale")
    lines = ["make setup"]
    commits = [a["git_commit"] for a in evidence.provenance or () if a.get("git_commit")]
    if commits:
        lines.insert(0, f"git checkout {commits[-1]}")
    flags = f" --config scale={scale}" if scale and scale != "laptop" else ""
    return "\n".join([*lines, f"snakemake --cores all report_{evidence.experiment}{flags}"])


def _chain(evidence: Evidence) -> list[dict[str, Any]]:
    published = {
        (action["stage"], path.rsplit("/", 1)[-1]): sha256
        for action in evidence.provenance or ()
        for path, sha256 in action["outputs"].items()
    }
    files = evidence.corpus["files"]
    tokens = sum(split["n_tokens"] for split in evidence.tokens["splits"].values())
    steps, best = f"{evidence.end['step']:,}", f"{evidence.end['best_step']:,}"
    model = published.get(("train_model", "weights.safetensors"))
    links = [
        ("Corpus", evidence.digests.get("corpus"),
         f"{evidence.settings['corpus']['name']}: the list of its {len(files):,} files, each with its own sha256"),
        ("Tokenizer", evidence.tokenizer["fingerprint"], "the fingerprint that tokens and weights carry"),
        ("Tokens", evidence.digests.get("tokens"), f"the manifest of {tokens:,} tokens, shard by shard"),
        ("Last weights", model, f"after {steps} steps"),
        ("Best weights", published.get(("train_model", "best.safetensors")),
         f"lowest validation loss, after {best} steps"),
        ("Evaluation", evidence.digests.get("evaluation"), "losses of both weights on the validation split"),
        ("Samples", evidence.digests.get("samples"), "what the best weights wrote"),
    ]  # fmt: skip
    return [{"name": name, "digest": sha256, "text": text} for name, sha256, text in links]


def _action(action: Mapping[str, Any]) -> dict[str, Any]:
    finished = str(action.get("finished", "")).replace("T", " ").replace("+00:00", " UTC")
    return {**action, "finished": finished}


def _versions(evidence: Evidence) -> str:
    found: dict[str, str] = {}
    for action in evidence.provenance or ():
        found |= action.get("versions") or {}
    return ", ".join(f"{library} {version}" for library, version in sorted(found.items()))
