"""`why`: what would happen to each action and for which reason, field by field, before anything runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from snakegpt import locks
from snakegpt.errors import UserError
from snakegpt.pipeline import OUTPUTS
from snakegpt.store import __main__ as cli
from snakegpt.store import differences, explain, forecast, origins
from snakegpt.store.estimate import Cost, cost
from snakegpt.store.why import lines

pytest_plugins = ["made_results"]

TOKENS = {"corpus": "generated", "tokenizer": "generated_char"}
FLAGS = ["--configfile", "mine.yaml"]
AFTER = ("evaluate_model tiny", "sample_text tiny")


def why(project, target: str, *words: str) -> None:
    cli.main(["why", target, *FLAGS, *words])


@pytest.fixture
def project(made):
    return made


# ---- what would happen -------------------------------------------------------------------------


def test_nothing_differs_right_after_a_run(project, capsys):
    assert set(project.fates().values()) == {"up to date"}
    why(project, "report_tiny")
    assert capsys.readouterr().out.startswith("build_report tiny: is up to date")


def test_before_the_first_run_everything_runs(bare):
    verdict = bare.verdict("build_report")
    assert {v.status for v in verdict.chain()} == {"runs"}
    assert all(v.notes == ["nothing has made it yet"] for v in verdict.chain())


def test_what_differs_itself_runs_and_what_follows_may_run(project):
    project.set("experiments.tiny.training.learning_rate", 0.02)
    fates = project.fates()
    assert fates["train_model tiny"] == fates["plan_training tiny"] == "runs"
    assert fates["build_report tiny"] == "runs"  # it tells of the settings
    assert {fates[label] for label in AFTER} == {"may run"}
    assert fates["index_tokens generated-generated_char"] == "up to date"
    project.set("experiments.tiny.sampling.max_tokens", 21)
    assert (
        project.verdict("sample_text").status == "runs"
    )  # its own setting, whatever training gives
    assert (
        project.verdict("evaluate_model").reason() == "only on a change of weights, best or config"
    )


def test_the_forecast_comes_true(project):
    """Training that gives the same bytes is the end of it: what may run is looked up."""
    project.set("experiments.tiny.training.learning_rate", 0.02)
    old = {Path(p).name: Path(p).read_text() for p in project.request("train_model").outputs}
    chain = list(project.verdict("build_report").chain())
    for verdict in chain:
        same = verdict.request.stage == "train_model"
        contents = {name.replace(".", "__"): text for name, text in old.items()} if same else {}
        project.make(verdict.request, **contents)
    assert set(project.ran) == {v.label for v in chain if v.status == "runs"}
    assert set(project.fates().values()) == {"up to date"}


def test_going_back_is_seen_to_be_free_all_the_way_down(project):
    project.set("experiments.tiny.training.learning_rate", 0.02)
    project.make_all()
    project.set("experiments.tiny.training.learning_rate", 0.01)
    fates = project.fates()
    for label in ("train_model tiny", "plan_training tiny", "build_report tiny", *AFTER):
        assert fates[label] == "look-up", label
    assert fates["index_tokens generated-generated_char"] == "up to date"


def test_lost_results_are_looked_up(project):
    shutil.rmtree("results")
    verdict = project.verdict("build_report")
    assert {v.status for v in verdict.chain()} == {"look-up"}
    assert verdict.notes == ["not in results/"]
    project.make_all()
    Path("results/models/tiny/config.json").unlink()
    assert project.verdict("train_model").notes == [
        "results/models/tiny/config.json is gone from results/"
    ]


def test_a_saved_state_is_mentioned(project):
    project.set("experiments.tiny.training.learning_rate", 0.02)
    key = project.verdict("train_model").key
    project.store.state_path(key).mkdir(parents=True)
    assert "goes on from its saved state" in project.verdict("train_model").notes


# ---- damage ------------------------------------------------------------------------------------


def weights(project) -> tuple[Path, str]:
    record = project.verdict("train_model").record
    sha256 = record["outputs"]["weights.safetensors"]["sha256"]
    return project.store.object_path(sha256), sha256


@pytest.mark.parametrize("damage", ["short", "gone", "flipped"])
def test_a_damaged_object_is_named(project, damage):
    path, sha256 = weights(project)
    content = path.read_bytes()
    path.chmod(0o644)
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[:7] if damage == "short" else bytes([content[0] ^ 1]) + content[1:]
        )
    if damage == "flipped":
        assert project.verdict("train_model").status == "up to date"  # store.check: size
        project.store.check = "digest"
    verdict = project.verdict("train_model")
    assert verdict.status == "runs"
    assert verdict.differences == []
    said = {"short": f"is damaged: 7 of {len(content)} B", "gone": "is gone", "flipped": "is damaged: its bytes changed"}  # fmt: skip
    assert f"object {sha256[:12]} of weights.safetensors {said[damage]}" in verdict.notes
    assert project.verdict("evaluate_model").status == "may run"


def test_a_lost_record_and_a_foreign_file_are_told(project):
    record = project.verdict("index_tokens", **TOKENS).record
    project.store.action_path(record["key"]).unlink()
    verdict = project.verdict("index_tokens", **TOKENS)
    assert (verdict.status, verdict.notes) == ("runs", ["no record says what made it"])
    foreign = Path("results/tokenizers/generated_char/tokenizer.json")
    foreign.unlink()
    foreign.write_text("mine")
    verdict = project.verdict("build_tokenizer", tokenizer="generated_char")
    assert verdict.status == "look-up"
    assert verdict.notes == [f"{foreign} is not what the action made; remove it to get that back"]


# ---- why: settings, inputs, code ---------------------------------------------------------------


def test_a_setting_is_told_with_old_new_and_its_place(project, capsys):
    project.set("experiments.tiny.training.learning_rate", 0.02)
    line = project.line_of("learning_rate:")
    (found,) = project.verdict("train_model").differences
    assert (found.kind, found.name, found.old, found.new) == (
        "setting", "training.learning_rate", 0.01, 0.02,
    )  # fmt: skip
    assert found.config == "experiments.tiny.training.learning_rate"
    assert found.place == f"mine.yaml, line {line}"
    why(project, "evaluate_tiny")
    out = capsys.readouterr().out
    assert f"setting training.learning_rate: 0.01 -> 0.02  (mine.yaml, line {line})" in out
    assert out.index("train_model tiny: runs") < out.index("evaluate_model tiny")


def test_a_setting_of_the_scale_block_is_found_there(project):
    project.set("experiments.tiny.laptop", {"training": {"steps": 60}})
    (found,) = project.verdict("train_model").differences
    assert found.config == "experiments.tiny.laptop.training.steps"
    block = project.line_of("laptop:")
    assert found.place == f"mine.yaml, line {block + 2}"


def test_a_setting_that_fell_back_to_its_default_says_so(project):
    config = project.file.read_text().replace("      validation_interval: 10\n", "")
    project.file.write_text(config)
    (found,) = project.verdict("train_model").differences
    assert (found.old, found.place) == (10, None)
    assert found.line().endswith("(experiments.tiny.training.validation_interval, its default)")


def test_every_science_setting_is_traced_to_the_value_in_the_settings(project):
    """Of every stage: the name in config.yaml leads to the value in the record, or to no name at all."""
    pipeline = project.pipeline
    tree = pipeline.settings.model_dump()
    traced = 0
    for verdict in project.verdict("build_report").chain():
        for name, value in leaves(verdict.request.settings):
            config, place = origins.locate(pipeline, verdict.request, name, [])
            if config is None:
                assert name.partition("[")[0].partition(".")[0] in origins.ELSEWHERE, name
                continue
            assert place is None
            here: Any = tree
            for part in origins._parts(config):
                here = here[part]
            assert here == value, (name, config)
            traced += 1
    assert traced > 60


def leaves(value: Any, where: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [
            leaf
            for key, item in value.items()
            for leaf in leaves(item, f"{where}.{key}" if where else key)
        ]
    if isinstance(value, list | tuple):
        return [leaf for i, item in enumerate(value) for leaf in leaves(item, f"{where}[{i}]")]
    return [(where, value)]


def test_an_input_is_told_by_old_and_new_digest_and_makers(project):
    before = Path("results/tokens/generated-generated_char/manifest.json").resolve().name
    project.set("corpora.generated.validation.fraction", 0.2)
    for part in ("000000", "000001"):
        project.make(project.request("encode_tokens", **TOKENS, part=part))
    project.make(project.request("index_tokens", **TOKENS), manifest__json={"other": 1})
    after = Path("results/tokens/generated-generated_char/manifest.json").resolve().name
    (found,) = project.verdict("train_model").differences
    assert found.kind == "input"
    assert found.name == "tokens results/tokens/generated-generated_char/manifest.json"
    assert (found.old, found.new) == (before, after)
    assert found.makers == ("index_tokens generated-generated_char",) * 2
    assert f"{before[:12]} -> {after[:12]}  (made by index_tokens" in found.line()


def test_a_pinned_file_that_changed_is_the_one_that_is_named(project):
    files = (locks.File("a.txt", "4a" * 32, 8), locks.File("aa.txt", "ee" * 32, 8), locks.File("b.txt", "cf" * 32, 9))  # fmt: skip
    project.lock(files)
    found = {d.name: (d.old, d.new, d.place) for d in project.verdict("fetch_corpus", corpus="generated").differences}  # fmt: skip
    assert found == {
        "files[aa.txt]": (differences.ABSENT, "ee" * 32, "corpora.lock.json"),
        "files[b.txt].bytes": (8, 9, "corpora.lock.json"),
    }


def test_code_is_told_by_module_and_function(project, monkeypatch):
    def changed(stage: str) -> dict[str, Any]:
        code = json.loads(json.dumps(real(stage)))
        if stage == "train_model":
            code["revision"] += 1
            module = code["modules"]["snakegpt.model"]
            module |= {"GPT": "0" * 64, "New": "1" * 64, "": "2" * 64}
            del module["Block"], code["modules"]["snakegpt.batches"]
        return code

    real = explain.code_of
    monkeypatch.setattr(explain, "code_of", changed)
    revision = real("train_model")["revision"]
    assert [d.line() for d in project.verdict("train_model").differences] == [
        f"code REVISION: {revision} -> {revision + 1}",
        "code snakegpt.batches: removed",
        "code snakegpt.model, outside functions and classes: changed",
        "code snakegpt.model.Block: removed",
        "code snakegpt.model.GPT: changed",
        "code snakegpt.model.New: added",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": (1, 2)}, {"a": [1, 2]}, []),
        ({"a": 1}, {"a": 1.0}, ["setting a: 1 -> 1.0"]),  # canonical JSON tells them apart
        ({"a": 1}, {"a": True}, ["setting a: 1 -> True"]),
        ({"a": None}, {}, ["setting a: null -> (not set)"]),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, ["setting a.b: 'x' -> 'y'"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["setting a[1]: 2 -> 3"]),
        ({"a": [1, 2]}, {"a": [1]}, ["setting a: [1, 2] -> [1]"]),
    ],
)
def test_settings_are_compared_as_the_key_sees_them(old, new, expected):
    assert [d.line() for d in differences.settings(old, new)] == expected


# ---- telling -----------------------------------------------------------------------------------


def test_json_has_every_difference_and_cost(project, capsys):
    project.set("experiments.tiny.training.learning_rate", 0.02)
    why(project, "evaluate_tiny", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["target"]["status"] == "may run"
    assert told["target"]["awaited"] == dict.fromkeys(
        ("weights", "best", "config"), "train_model tiny"
    )
    (train,) = [a for a in told["actions"] if a["stage"] == "train_model"]
    assert train["differences"] == [
        {
            "kind": "setting",
            "name": "training.learning_rate",
            "old": 0.01,
            "new": 0.02,
            "config": "experiments.tiny.training.learning_rate",
            "place": f"mine.yaml, line {project.line_of('learning_rate:')}",
        }
    ]
    assert [a["stage"] for a in told["actions"]] == ["train_model", "evaluate_model"]
    assert told["costs"][0]["time_s"] == 90.0
    why(project, "evaluate_tiny", "--json", "--all")
    assert len(json.loads(capsys.readouterr().out)["actions"]) == 7


def test_long_lists_are_cut_on_a_terminal_only(project):
    changed = {
        "batch_tokens": 256, "beta1": 0.5, "beta2": 0.5, "weight_decay": 0.5, "gradient_clip": 0.5,
        "learning_rate": 0.5, "min_learning_rate": 0.1, "steps": 9, "decay_steps": 9, "seed": 9,
        "validation_interval": 9, "validation_tokens": 9, "warmup_steps": 1, "precision": "float32",
    }  # fmt: skip
    project.set("experiments.tiny.training", changed)
    explainer = project.explainer()
    verdict = explainer.of(project.request("train_model"))
    assert len(verdict.differences) == 14
    short, long = (lines(explainer, verdict, everything=all_) for all_ in (False, True))
    assert "  and 2 more (--all shows them)" in short
    assert sum(line.startswith("  setting") for line in long) == 14


@pytest.mark.parametrize(
    ("target", "label"),
    [
        ("train_tiny", "train_model tiny"),
        ("results/models/tiny/metrics.jsonl", "train_model tiny"),
        ("./results/../results/models/tiny/config.json", "train_model tiny"),
        ("results/corpora/generated/files/a.txt", "fetch_corpus generated"),
        ("results/tokens/generated-generated_char/val_000001.bin", "encode_tokens generated-generated_char/000001"),
        ("all", "build_index all"),
    ],
)  # fmt: skip
def test_any_result_or_target_can_be_asked_for(project, capsys, target, label):
    why(project, target, "--json")
    told = json.loads(capsys.readouterr().out)["target"]
    assert f"{told['stage']} {told['name']}" == label


def test_what_is_no_result_is_refused(project, capsys):
    with pytest.raises(SystemExit) as stopped:
        why(project, "results/models/tiny/nothing.txt")
    assert stopped.value.code == 2
    assert "is no result of this pipeline" in capsys.readouterr().err


# ---- what it may cost --------------------------------------------------------------------------


def train_cost(project) -> Cost:
    explainer = project.explainer()
    return cost(explainer, explainer.of(project.request("train_model")))


def test_training_costs_what_it_took_scaled_by_its_tokens(project):
    published = sum(
        output["bytes"] for output in project.verdict("train_model").record["outputs"].values()
    )
    project.set("experiments.tiny.training.learning_rate", 0.02)
    assert train_cost(project) == Cost(90.0, published, "last run")  # the metrics count all resumes
    project.set("experiments.tiny.training.steps", 90)
    project.set("experiments.tiny.training.batch_tokens", 64)
    assert train_cost(project) == Cost(135.0, published, "last run")


def test_another_model_costs_what_the_plan_says_and_else_nobody_knows(project):
    project.set("experiments.tiny.model.channels", 32)
    assert train_cost(project) == Cost()
    explainer = project.explainer()
    assert cost(explainer, explainer.of(project.request("evaluate_model"))) == Cost()
    project.make(project.request("plan_training"))
    assert train_cost(project) == Cost(520.0, 123_456, "plan")


def test_parts_cost_by_their_bytes(project):
    project.lock((locks.File("a.txt", "4a" * 32, 8), locks.File("b.txt", "dd" * 32, 24)))
    explainer = project.explainer()
    part = explainer.of(project.request("encode_tokens", **TOKENS, part="000001"))
    found = cost(explainer, part)
    outputs = part.record["outputs"].values()
    assert found.n_bytes == 3 * sum(output["bytes"] for output in outputs)
    assert found.time_s == pytest.approx(3 * part.record["provenance"]["wall_s"])


def test_a_look_up_costs_nothing(project):
    shutil.rmtree("results")
    assert train_cost(project) == Cost(0.0, 0, "look-up")


def test_what_was_never_made_has_no_figure(bare):
    assert train_cost(bare) == Cost()
    explainer = bare.explainer()
    rows = forecast.rows(explainer, [explainer.of(bare.request("train_model"))])
    assert "unknown" in forecast.table(rows)[1]
    assert forecast.table(rows)[-1] == "1 to run (cost unknown)."


def test_a_thousand_parts_are_one_line(bare):
    bare.set("corpora.generated.part_bytes", 1)
    bare.lock(tuple(locks.File(f"{i:04d}.txt", f"{i:064x}", 8) for i in range(1000)))
    jobs = [("encode_tokens", {**TOKENS, "part": f"{i:06d}"}) for i in range(1000)]
    told = forecast.of_jobs(bare.explainer(), [*jobs, ("index_tokens", TOKENS), ("all", {})])
    assert [line.partition("  ")[0] for line in told[:3]] == [
        "stage",
        "encode_tokens generated-generated_char (1,000 parts)",
        "index_tokens generated-generated_char",
    ]
    assert told[-1] == "1,001 to run (cost unknown)."


def test_jobs_that_snakemake_starts_for_nothing_are_look_ups(project):
    (row,) = [line for line in forecast.of_jobs(project.explainer(), [("train_model", {"experiment": "tiny"})]) if "train_model" in line]  # fmt: skip
    assert row.split()[2:] == ["look-up", "-", "-", "nothing", "differs"]
    assert forecast.of_jobs(project.explainer(), []) == []


def test_unknown_experiments_are_refused_with_the_nearest_name(project):
    with pytest.raises(UserError, match="Nearest valid name: tiny"):
        project.explainer().of(project.request("train_model", experiment="tinny"))


def test_every_stage_has_its_settings_traced():
    free = {
        "fetch_corpus",
        "fetch_weights",
        "index_tokens",
        "build_index",
    }  # lock file; no settings at all
    assert set(OUTPUTS) - free == set(origins.ORIGINS)
