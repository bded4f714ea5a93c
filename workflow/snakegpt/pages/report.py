"""The page of one experiment. What it says is decided here, how it looks in `templates/`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from snakegpt.pages.evidence import Evidence
from snakegpt.pages.network import network_section
from snakegpt.pages.plan import plan_section
from snakegpt.pages.rendering import (
    figures,
    readable_time,
    render,
)
from snakegpt.pages.training import training_charts, training_section
from snakegpt.progress import count, quantity

SAMPLES_SHOWN = 8
FILES_SHOWN = 100

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
        "charts": {name: Markup(svg) for name, svg in training_charts(evidence).items()},
        "training": training_section(evidence),
        "evaluation": _evaluation(evidence),
        "plan": plan_section(evidence),
        "corpora": _corpora(evidence),
        "n_files_shown": FILES_SHOWN,
        "tokens": _tokens(evidence),
        "tokenizer": _tokenizer(evidence),
        "network": network_section(evidence.network),
        "commands": _commands(evidence),
        "dirty": any(action.get("dirty") for action in evidence.provenance or ()),
        "settings_yaml": settings_yaml(evidence.experiment, settings),
        "chain": _chain(evidence),
        "actions": [_action(action) for action in evidence.provenance or ()],
        "adoptions": [_adoption(a) for a in evidence.provenance or () if "adopted" in a],
        "versions": _versions(evidence),
    }
    return render("report.html.j2", **context)


def settings_yaml(experiment: str, settings: Mapping[str, Any]) -> str:
    """A configuration file that runs exactly these settings, laid over any config.yaml.

    Everything stands in the block of the scale, which wins over the experiment's own values.
    """
    scale = settings.get("scale") or "laptop"
    corpus, tokenizer = dict(settings["corpus"]), dict(settings["tokenizer"])
    names = {"corpus": corpus.pop("name"), "tokenizer": tokenizer.pop("name")}
    blocks = ("model", "training", "evaluation", "sampling")
    tree: dict[str, Any] = {"scale": scale, "corpora": {names["corpus"]: corpus}}
    if "corpora" in corpus:
        parts = {part["name"]: dict(part) for part in corpus.pop("corpora")}
        tree["corpora"] = {n: {k: v for k, v in p.items() if k != "name"} for n, p in parts.items()}
        tree["mixtures"] = {names["corpus"]: corpus}
    tree["tokenizers"] = {names["tokenizer"]: tokenizer}
    if "weights" in settings:
        weights = {**settings["weights"], "tokenizer": names["tokenizer"]}
        tree["weights"] = {weights.pop("name"): weights}
    tree["experiments"] = {
        experiment: {
            **names,
            "description": settings.get("description", ""),
            scale: {**names, **{name: settings[name] for name in blocks}},
        }
    }
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=90))


# ---- what the page says ---------------------------------------------------------------------------


def _lead(evidence: Evidence) -> str:
    end, launch, best = evidence.end, evidence.launch, evidence.evaluation["best"]
    train = evidence.tokens["splits"]["train"]
    processes = "one process" if launch["ranks"] == 1 else f"{launch['ranks']} processes"
    epochs = evidence.trained_tokens / max(train["n_tokens"], 1)
    before = evidence.settings["training"].get("continue_from")
    begun = (
        f"continued from {before} up to" if before else f"trained from {_beginning(evidence)} for"
    )
    return (
        f"A GPT of {quantity(launch['n_parameters'])} parameters, {begun}"
        f" {end['step']:,} steps on {evidence.settings['corpus']['name']}: it saw"
        f" {quantity(evidence.trained_tokens)} tokens, {epochs:.3g} times the training text,"
        f" {'the new ones ' if before else ''}in {readable_time(end['elapsed_s'])} on"
        f" {_machine(evidence)}, in {processes}. On text it never saw, its best weights need"
        f" {best['bits_per_byte']:.3f} bits for a byte."
    )


def _beginning(evidence: Evidence) -> str:
    """What the first step of training found."""
    training, start = evidence.settings["training"], evidence.start
    if start is None:
        return "random weights"
    whose = evidence.settings.get("weights", {})
    name = training["start_from"]
    text = (
        f"the weights {name} ({whose.get('license', 'unknown')})"
        if whose
        else f"the best weights of {name}"
    )
    changes = []
    if "context" in start:
        changes.append("their context cut from {:,} to {:,} tokens".format(*start["context"]))
    if "vocabulary_rows" in start:
        changes.append("their vocabulary from {:,} to {:,} rows".format(*start["vocabulary_rows"]))
    return "".join([text, *(f", {change}" for change in changes), "," if changes else ""])


def _machine(evidence: Evidence) -> str:
    device = str(evidence.launch["device"])
    processor = evidence.network["machine"].get("processor")
    return f"a CPU ({processor})" if device == "cpu" and processor else device.replace("cpu", "CPU")


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
    length = count(len(sample["ids"]), "token")
    if not sample["prompt"].strip():
        length = f"From the start of a document, {length}"
    ended = "ended by itself" if sample["finish_reason"] == "end_of_text" else "cut at the limit"
    return f"{length}, {ended}."


def _evaluation(evidence: Evidence) -> dict[str, Any]:
    found, end = evidence.evaluation, evidence.end
    rows = [
        {"name": "best on validation", "step": f"{end['best_step']:,}", **found["best"]},
        {"name": "last", "step": f"{end['step']:,}", **found["weights"]},
    ]
    rows += [
        {"name": f"best, on {block['name']}", "step": f"{end['best_step']:,}", **part["best"]}
        for (block, _), part in zip(evidence.texts, found.get("sets", []), strict=False)
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


def _corpora(evidence: Evidence) -> list[dict[str, Any]]:
    weights = evidence.settings["corpus"].get("weights", {})
    whole = sum(weights.values())
    return [
        {
            **_corpus(block, found["files"]),
            "share": f"{weights[block['name']] / whole:.3g}" if weights else None,
        }
        for block, found in evidence.texts
    ]


def _corpus(block: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    source = block.get("source") or {}
    where = {
        "registry": lambda s: f"the archive of the package {s['package']}, by {s['registry']}",
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
        "n_files": count(len(files), "file"),
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
    remarks = [f"dropped: {count(n, f'{kind} document')}" for kind, n in dropped.items() if n]
    screening = evidence.tokens.get("screening") or {}
    if screening.get("n_overlapping") is not None:
        documents = count(screening["n_documents"], "document")
        remarks.append(
            f"{screening['n_overlapping']:,} of {documents} overlap with evaluation texts"
        )
    replaced = evidence.tokens.get("replaced_bytes")
    if replaced:
        remarks.append(f"replaced by U+FFFD: {count(replaced, 'byte')} of invalid UTF-8")
    text = "; ".join(remarks)
    return {"splits": splits, "remarks": f"{text[0].upper()}{text[1:]}." if text else ""}


def _tokenizer(evidence: Evidence) -> dict[str, Any]:
    found = evidence.tokenizer
    kinds = {
        "gpt2": "OpenAI's GPT-2 byte-pair encoding",
        "tiktoken": f"OpenAI's {found.get('encoding')} byte-pair encoding",
        "char": "one id per character",
        "byte": "one id per byte of UTF-8",
        "bpe": "byte-pair encoding learnt from text",
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
    corpora = [
        ("Corpus", evidence.digests.get(f"corpus {k}"),
         f"{block['name']}: the list of its {len(found['files']):,} files, each with its own sha256")
        for k, (block, found) in enumerate(evidence.texts)
    ]  # fmt: skip
    tokens = sum(split["n_tokens"] for split in evidence.tokens["splits"].values())
    steps, best = f"{evidence.end['step']:,}", f"{evidence.end['best_step']:,}"
    model = published.get(("train_model", "weights.safetensors"))
    start = published.get(("adapt_weights", "weights.safetensors"))
    begun = [("Weights it started from", start, "made to fit the model, of the right tokenizer")]
    links = [
        *corpora,
        ("Tokenizer", evidence.tokenizer["fingerprint"], "the fingerprint that tokens and weights carry"),
        ("Tokens", evidence.digests.get("tokens"), f"the manifest of {tokens:,} tokens, shard by shard"),
        *(begun if evidence.start else ()),
        ("Last weights", model, f"after {steps} steps"),
        ("Best weights", published.get(("train_model", "best.safetensors")),
         f"lowest validation loss, after {best} steps"),
        ("Evaluation", evidence.digests.get("evaluation"), "losses of both weights on the validation split"),
        ("Samples", evidence.digests.get("samples"), "what the best weights wrote"),
    ]  # fmt: skip
    return [{"name": name, "digest": sha256, "text": text} for name, sha256, text in links]


def _action(action: Mapping[str, Any]) -> dict[str, Any]:
    finished = str(action.get("finished", ""))  # ISO 8601, UTC
    return {**action, "finished": finished[:16].replace("T", " ")}


def _adoption(action: Mapping[str, Any]) -> dict[str, Any]:
    return {**_action(action["adopted"]), "stage": action["stage"], "name": action["name"]}


def _versions(evidence: Evidence) -> str:
    found: dict[str, str] = {}
    for action in evidence.provenance or ():
        found |= action.get("versions") or {}
    return ", ".join(f"{library} {version}" for library, version in sorted(found.items()))
