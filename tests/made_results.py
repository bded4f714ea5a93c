"""A project whose results were made by the runner, with the stages' work left out: files that a test chooses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from snakegpt import locks, run
from snakegpt.pipeline import Pipeline, Request
from snakegpt.settings import load_files
from snakegpt.store import Store
from snakegpt.store.explain import Explainer, Verdict, ordered
from snakegpt.store.links import maker

TINY = Path(__file__).parent / "tiny.yaml"
PINS = ("4a" * 32, "cf" * 32)
PART_BYTES = 10  # so that each of the two files is a part

EVALUATION = {"best": {"loss_nats": 2.0, "perplexity": 7.389, "bits_per_byte": 2.885}}
METRICS = [
    {"event": "start", "n_parameters": 3680},
    {"event": "train", "step": 30, "loss": 2.5},
    {"event": "end", "step": 30, "elapsed_s": 90.0, "rate_tokens_per_s": 42.7, "best_loss": 2.1},
]
PLAN = {
    "time_estimate_s": 500.0,
    "validation_time_estimate_s": 20.0,
    "disk_bytes": {"weights": 123_456},
}


class MadeProject:
    """Two files of text, one tiny experiment; `make` brings results to where the settings want them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.delenv("SNAKEGPT_STORE", raising=False)
        self.file, self.store = folder / "mine.yaml", Store("store")
        self.ran: list[str] = []
        config = yaml.safe_load(TINY.read_text(encoding="utf-8"))
        config["corpora"]["generated"]["part_bytes"] = PART_BYTES
        self.write(config)
        files = tuple(locks.File(f"{n}.txt", pin, 8) for n, pin in zip("ab", PINS, strict=True))
        self.lock(files)

    def lock(self, files: tuple[locks.File, ...]) -> None:
        source = load_files([self.file]).corpus("generated").source.model_dump()
        locks.put("corpora.lock.json", {"generated": locks.Entry(source, files)})

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        return config

    def write(self, config: dict[str, Any]) -> None:
        self.file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def set(self, path: str, value: object) -> None:
        config = self.config()
        *parents, last = path.split(".")
        block = config
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = value
        self.write(config)

    def line_of(self, start: str) -> int:
        lines = self.file.read_text(encoding="utf-8").splitlines()
        return 1 + next(i for i, line in enumerate(lines) if line.strip().startswith(start))

    # ---- asking ----

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(load_files([self.file]), locks.read("corpora.lock.json"))

    def explainer(self) -> Explainer:
        return Explainer(self.store, self.pipeline, ["mine.yaml"])

    def request(self, stage: str, **wildcards: str) -> Request:
        return self.pipeline.request(stage, wildcards or {"experiment": "tiny"})

    def verdict(self, stage: str, **wildcards: str) -> Verdict:
        return self.explainer().of(self.request(stage, **wildcards))

    def fates(self) -> dict[str, str]:
        """Label -> status of everything behind the report."""
        return {v.label: v.status for v in self.verdict("build_report").chain()}

    # ---- making ----

    def make(self, request: Request, **contents: object) -> dict[str, Any]:
        """Run one action through the runner; contents replace the usual ones, file name -> content."""
        files = {**self._usual(request), **{n.replace("__", "."): c for n, c in contents.items()}}

        def stage(action: Any, label: str, *_rest: object) -> Any:
            self.ran.append(label)
            with self.store.workspace(action.key) as workspace:
                for name, content in files.items():
                    path = workspace / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(content if isinstance(content, str) else json.dumps(content))
                return self.store.publish(workspace)

        self._monkeypatch.setattr(run, "_run_stage", stage)
        paths = [
            {role: [Path(p) for p in group] for role, group in groups.items()}
            for groups in (request.inputs, request.unhashed)
        ]
        run.run(
            request.stage,
            request.name,
            request.settings,
            paths[0],
            Path(request.folder),
            self.store,
            execution={},
            unhashed=paths[1],
            state=False,
            chain=request.stage == "build_report",
        )
        record = maker(Path(request.outputs[0]))
        assert record
        return record

    def make_all(self) -> MadeProject:
        """Everything up to the report, in order."""
        for verdict in list(ordered([self.verdict("build_report")])):
            self.make(verdict.request)
        self.ran.clear()
        return self

    def _usual(self, request: Request) -> dict[str, object]:
        files: dict[str, object] = {
            Path(path).name: f"{path} {json.dumps(request.settings, sort_keys=True)}"
            for path in request.outputs
        }
        if request.stage == "fetch_corpus":
            files |= {"files/a.txt": "the cat ", "files/b.txt": "the dog "}
        elif request.stage == "index_tokens":
            files = {"manifest.json": {"splits": {}}}
        elif request.stage == "train_model":
            files["metrics.jsonl"] = "".join(f"{json.dumps(line)}\n" for line in METRICS)
            files["config.json"] = {"n_layer": 1}
        elif request.stage == "evaluate_model":
            files = {"evaluation.json": EVALUATION}
        elif request.stage == "plan_training":
            files = {"plan.json": PLAN}
        elif request.stage == "sample_text":
            files = {"samples.jsonl": json.dumps({"prompt": "the ", "text": "cat"}) + "\n"}
        return files


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeProject:
    """Nothing made yet."""
    return MadeProject(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def _made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as monkeypatch:
        MadeProject(folder, monkeypatch).make_all()
    return folder


@pytest.fixture
def made(_made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeProject:
    """Everything up to the report made; a copy of its own."""
    shutil.copytree(_made_once, tmp_path, symlinks=True, dirs_exist_ok=True)
    return MadeProject(tmp_path, monkeypatch)
