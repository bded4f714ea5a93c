"""Tell the whole story of an experiment on one self-contained HTML page.

Reads: what the other stages wrote about the experiment (JSON and JSON lines, no weights, no shards).
Writes: report.html, one UTF-8 file that needs no network and runs no scripts; summary.json, its key
figures. By hand, with results/ as R:

    python -m snakegpt.stages.build_report --settings @settings.json --corpus R/corpora/C/corpus.json \\
        --tokenizer R/tokenizers/T/tokenizer.json --tokens R/tokens/C-T/manifest.json \\
        --plan R/plans/E/plan.json --network R/networks/E/network.json \\
        --model_config R/models/E/config.json --metrics R/models/E/metrics.jsonl \\
        --evaluation R/evaluations/E/evaluation.json --samples R/samples/E/samples.jsonl --out /tmp/report
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snakegpt.command import only_path, stage_parser, write_json
from snakegpt.errors import UserError, reports_errors
from snakegpt.identity import file_digest
from snakegpt.pages.evidence import Evidence, summary
from snakegpt.pages.report import report_page
from snakegpt.progress import say

REVISION = 5  # bump when templates/ change: tests/test_pages.py tells
SCIENCE = ("snakegpt.pages.evidence", "snakegpt.pages.report")

ROLES = {
    "corpus": "corpus.json; of a mixture one a corpus",
    "tokenizer": "tokenizer.json",
    "tokens": "manifest.json of the tokens",
    "plan": "plan.json",
    "network": "network.json",
    "model_config": "config.json of the model",
    "metrics": "metrics.jsonl",
    "evaluation": "evaluation.json",
    "samples": "samples.jsonl",
    "start": "start.json of the weights that training started from, if it did",
}
MANY = ("corpus", "start")  # roles of any number of files; the others have one


def build_report(
    experiment: str,
    settings: dict[str, Any],
    files: dict[str, list[Path]],
    provenance: Path | None,
    out: Path,
) -> None:
    """Write report.html and summary.json to `out`.

    settings    the experiment's blocks, labels included
    files       role -> file, see ROLES; several for a mixture's corpora, none for new weights
    provenance  records of the runs behind those files; None leaves them out
    raises      UserError if a file is damaged, or if weights and tokenizer do not belong together
    """
    only = {role: only_path(paths, role) for role, paths in files.items() if role not in MANY}
    found = {role: _read(path) for role, path in only.items()}
    fingerprints = {
        "the tokenizer": found["tokenizer"]["fingerprint"],
        "the tokens": found["tokens"]["tokenizer"]["fingerprint"],
        "the model": found["model_config"]["snakegpt"]["tokenizer_fingerprint"],
        "the evaluation": found["evaluation"]["tokenizer_fingerprint"],
    }
    if len(set(fingerprints.values())) > 1:
        told = "\n".join(f"  {what}: {value}" for what, value in fingerprints.items())
        raise UserError(f"the results of {experiment} come from different tokenizers:\n{told}")
    if not any(line["event"] == "end" for line in found["metrics"]):
        raise UserError(f"{only['metrics']} has no `end`: the training has not finished.")
    evidence = Evidence(
        experiment=experiment,
        settings=settings,
        corpora=[_read(path) for path in files["corpus"]],
        tokenizer=found["tokenizer"],
        tokens=found["tokens"],
        plan=found["plan"],
        network=found["network"],
        metrics=found["metrics"],
        evaluation=found["evaluation"],
        samples=found["samples"],
        start=next(map(_read, files.get("start", [])), None),
        provenance=_read(provenance)["actions"] if provenance else None,
        digests={
            **{role: file_digest(path) for role, path in only.items()},
            **{f"corpus {k}": file_digest(path) for k, path in enumerate(files["corpus"])},
        },
    )
    (out / "report.html").write_text(report_page(evidence), encoding="utf-8")
    write_json(out / "summary.json", summary(evidence))


def _read(path: Path) -> Any:
    """A JSON file's value, or the list of a JSON lines file."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line]
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = stage_parser(__doc__, ROLES).parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    experiment = args.settings.get("experiment")
    if not experiment or "settings" not in args.settings:
        raise UserError('--settings wants {"experiment": NAME, "settings": {...}}.')
    provenance = args.execution.get("provenance")
    build_report(
        experiment,
        args.settings["settings"],
        {role: getattr(args, role) for role in ROLES},
        Path(provenance) if provenance else None,
        args.out,
    )
    label = args.execution.get("label", "build_report")
    say(f"{label}  {(args.out / 'report.html').stat().st_size / 1e3:.0f} kB, one page")


if __name__ == "__main__":
    main()
