"""`show`, `diff` and `adopt`: what made a file, what differs between two, and what somebody vouched for."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from snakegpt.errors import UserError
from snakegpt.identity import digest, file_digest
from snakegpt.pipeline import OUTPUTS
from snakegpt.store import __main__ as cli
from snakegpt.store import adopt, provenance, show

pytest_plugins = ["made_results"]

ROOT = Path(__file__).parent.parent
FLAGS = ["--configfile", "mine.yaml"]
WEIGHTS = "results/models/tiny/weights.safetensors"
TOKENS = {"corpus": "generated", "tokenizer": "generated_char"}


def ask(capsys, *words):
    capsys.readouterr()
    cli.main([*words, *FLAGS])
    return capsys.readouterr().out


def refused(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, *FLAGS])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def sha256_of(path):
    return Path(path).resolve().name


# ---- show --------------------------------------------------------------------------------------


def test_the_chain_reaches_the_pinned_files(made, capsys):
    told = json.loads(ask(capsys, "show", WEIGHTS, "--json"))
    assert told["sha256"] == sha256_of(WEIGHTS) == file_digest(Path(WEIGHTS))
    stages = [action["stage"] for action in told["actions"]]
    assert stages[0] == "fetch_corpus" and stages[-1] == "train_model"
    assert sorted(stages) == sorted(
        ["fetch_corpus", "build_tokenizer", "encode_tokens", "encode_tokens", "index_tokens", "train_model"]
    )  # fmt: skip
    pins = [file["sha256"] for file in told["actions"][0]["science"]["files"]]
    assert pins == ["4a" * 32, "cf" * 32]
    train = told["actions"][-1]
    assert train["key"] == told["action"]
    assert train["code_digest"] == digest(train["code"])
    assert train["science"]["training"]["steps"] == 30
    made_by = {"user", "host", "finished", "wall_s", "versions", "git_commit", "dirty", "platform"}
    assert made_by <= train["provenance"].keys()


def test_a_terminal_sees_the_same_in_short(made, capsys):
    out = ask(capsys, "show", WEIGHTS)
    assert out.index("train_model tiny") < out.index("index_tokens") < out.index("fetch_corpus")
    assert "encode_tokens generated-generated_char (2 parts)" in out
    assert "learning_rate 0.01" in out
    assert "pinned    2 files" in out and "4a4a4a4a4a4a       8B  a.txt" in out
    assert out.count("versions") == 1  # what does not change from action to action is told once


@pytest.mark.parametrize(
    "path",
    [
        "results/corpora/generated/files/a.txt",  # in a published folder
        WEIGHTS,
        "results/tokens/generated-generated_char/manifest.json",
    ],
)
def test_a_file_a_digest_and_how_it_starts_are_one(made, capsys, path):
    sha256 = sha256_of(path)
    by_path, by_digest, by_start, by_object = (
        json.loads(ask(capsys, "show", word, "--json"))
        for word in (path, sha256, sha256[:8], str(made.store.object_path(sha256)))
    )
    assert {told["sha256"] for told in (by_path, by_digest, by_start, by_object)} == {sha256}
    assert len({told["action"] for told in (by_path, by_digest, by_start, by_object)}) == 1


def test_an_action_is_found_by_its_key(made, capsys):
    key = made.verdict("evaluate_model").key
    told = json.loads(ask(capsys, "show", key[:6], "--json"))
    assert (told["action"], told["sha256"]) == (key, None)


def test_an_object_that_no_result_shows_is_found_in_the_store(made, capsys):
    old = sha256_of(WEIGHTS)
    made.set("experiments.tiny.training.learning_rate", 0.02)
    made.make_all()
    assert sha256_of(WEIGHTS) != old
    told = json.loads(ask(capsys, "show", old, "--json"))
    assert told["what"] == "weights.safetensors of train_model tiny"
    assert told["actions"][-1]["science"]["training"]["learning_rate"] == 0.01


def test_what_is_not_one_thing_is_refused(made, capsys):
    key = made.verdict("train_model").key
    other = key[:62] + ("00" if key[62:] != "00" else "11")
    shutil.copy(made.store.action_path(key), made.store.action_path(other))
    assert "names 2 things" in refused(capsys, "show", key[:10])
    assert "too short" in refused(capsys, "show", key[:5])
    assert "neither a file nor a digest" in refused(capsys, "show", "train_model")
    assert "no object and no action" in refused(capsys, "show", "0" * 12)
    assert "is a folder" in refused(capsys, "show", "results/models/tiny")


def test_a_file_that_is_not_what_was_made_is_told_apart(made, capsys):
    sha256 = sha256_of(WEIGHTS)
    shutil.copy(WEIGHTS, "copy.safetensors")
    told = json.loads(ask(capsys, "show", "copy.safetensors", "--json"))
    assert told["remarks"] == ["a copy of weights.safetensors of train_model tiny"]
    Path(WEIGHTS).unlink()
    told = json.loads(ask(capsys, "show", WEIGHTS, "--json"))
    assert told["sha256"] == sha256 and "is gone" in told["remarks"][0]
    Path(WEIGHTS).write_text("mine")
    told = json.loads(ask(capsys, "show", WEIGHTS, "--json"))
    assert told["sha256"] == sha256
    assert told["remarks"] == [
        f"the file is not what the action made: its sha256 is {file_digest(Path(WEIGHTS))}"
    ]
    Path("stranger").write_text("?")
    assert "made stranger" in refused(capsys, "show", "stranger")


def test_a_lost_record_upstream_is_told_and_never_replaced_by_another(made, capsys):
    index = made.verdict("index_tokens", **TOKENS)
    made.store.action_path(index.key).unlink()
    stages = [a["stage"] for a in json.loads(ask(capsys, "show", WEIGHTS, "--json"))["actions"]]
    assert stages == ["train_model"]
    assert f"no longer known ({index.key[:12]})" in ask(capsys, "show", WEIGHTS)
    made.make(index.request, manifest__json={"other": 1})  # another content at the same path
    record = made.verdict("train_model").record
    (entry,) = record["inputs"]["tokens"]
    assert provenance.made(made.store, {**entry, "action": "0" * 64}) is None


def test_what_was_not_committed_is_printed_for_git_apply(made, capsysbinary):
    record = made.verdict("train_model").record
    patch = b"diff --git a/x b/x\n\xff\n"
    made.store.make()
    sha256 = made.store.put(patch)
    told = record["provenance"] | {"dirty": True, "git_commit": "c" * 40, "diff": {"sha256": sha256, "bytes": len(patch)}}  # fmt: skip
    made.store.record(record["key"], {**record, "provenance": told})
    cli.main(["show", WEIGHTS, "--diff", *FLAGS])
    assert capsysbinary.readouterr().out == patch
    found = show.find(made.store, sha256)
    assert found.what == "what was not committed when train_model tiny ran"
    assert f"uncommitted changes ({sha256[:12]}" in "\n".join(show.lines(made.store, found))


# ---- diff --------------------------------------------------------------------------------------


@pytest.fixture
def two(made):
    """A second experiment beside the tiny one: twice the steps, half the loss."""
    config = made.config()
    config["experiments"]["second"] = json.loads(json.dumps(config["experiments"]["tiny"]))
    config["experiments"]["second"]["training"]["steps"] = 60
    made.write(config)
    second = {"experiment": "second"}
    metrics = json.dumps(
        {"event": "end", "step": 60, "elapsed_s": 30.0, "rate_tokens_per_s": 256.0}
    )
    made.make(made.request("train_model", **second), metrics__jsonl=metrics + "\n")
    best = {"loss_nats": 1.0, "perplexity": 2.718, "bits_per_byte": 1.4427}
    made.make(made.request("evaluate_model", **second), evaluation__json={"best": best})
    return made


def test_experiments_are_compared_field_by_field_with_their_metrics(two, capsys):
    told = json.loads(ask(capsys, "diff", "tiny", "second", "--json"))
    settings = [d for d in told["differences"] if d["kind"] == "setting"]
    assert settings == [
        {"stage": "train_model", "kind": "setting", "name": "training.steps", "old": 30, "new": 60}
    ]
    changed = {d["name"].split()[0] for d in told["differences"] if d["kind"] == "input"}
    assert changed == {"weights", "best"}
    assert told["metrics"]["loss_nats"] == [2.0, 1.0]
    assert told["metrics"]["bits_per_byte"] == [2.885, 1.4427]
    assert told["metrics"]["rate_tokens_per_s"] == [42.7, 256.0]
    assert told["metrics"]["train_time_s"] == [90.0, 30.0]
    out = ask(capsys, "diff", "tiny", "second")
    (loss,) = [line.split() for line in out.splitlines() if line.startswith("loss_nats")]
    assert loss == ["loss_nats", "2", "1", "-50.0%"]
    assert "  setting training.steps: 30 -> 60" in out
    assert "Not made for second: sample_text" in out


def test_actions_are_compared_by_file_or_key(two, capsys):
    key = two.verdict("train_model", experiment="second").key
    told = json.loads(ask(capsys, "diff", WEIGHTS, key[:8], "--json"))
    assert [d["name"] for d in told["differences"]] == ["training.steps"]
    assert told["metrics"]["wall_time_s"] == [90.0, 30.0]
    assert "Nothing differs" in ask(capsys, "diff", WEIGHTS, WEIGHTS)


def test_what_cannot_be_compared_is_refused(two, capsys):
    assert "different stages" in refused(capsys, "diff", WEIGHTS, "results/plans/tiny/plan.json")
    assert "not one with the other" in refused(capsys, "diff", "tiny", WEIGHTS)
    assert "Nearest valid name: second" in refused(capsys, "diff", "tiny", "secnd")


# ---- adopt -------------------------------------------------------------------------------------

ADOPT = ("adopt", "train_tiny", "--yes", "--reason", "nothing but names")


def changed(project):
    project.set("experiments.tiny.training.learning_rate", 0.02)
    return project


def test_an_adopted_result_is_a_hit_from_then_on(made, capsys):
    old = made.verdict("train_model").record
    key = changed(made).verdict("train_model").key
    err = ask_err(capsys, *ADOPT)
    assert "setting training.learning_rate: 0.01 -> 0.02" in err
    record = made.store.look_up(key)
    assert record["outputs"] == old["outputs"]
    assert record["provenance"] == old["provenance"]
    assert record["science"]["training"]["learning_rate"] == 0.02
    assert record["adopted"].keys() == {"from", "user", "finished", "reason"}
    assert (record["adopted"]["from"], record["adopted"]["reason"]) == (
        old["key"],
        "nothing but names",
    )
    made.make(made.request("train_model"))
    assert made.ran == []
    assert made.fates()["train_model tiny"] == made.fates()["evaluate_model tiny"] == "up to date"
    out = ask(capsys, "why", "train_tiny")
    assert "is up to date" in out
    assert f"from {old['key'][:12]}: nothing but names" in out
    assert f"from {old['key'][:12]}: nothing but names" in ask(capsys, "show", WEIGHTS)
    made.set("experiments.tiny.training.learning_rate", 0.01)
    assert made.verdict("train_model").status == "look-up"  # the old key is as good as before


def ask_err(capsys, *words):
    capsys.readouterr()
    cli.main([*words, *FLAGS])
    return capsys.readouterr().err


def test_the_report_is_told_of_an_adoption_behind_it(made, capsys):
    key = changed(made).verdict("train_model").key
    made.make(made.request("plan_training"))
    ask(capsys, *ADOPT)
    verdict = made.verdict("build_report")
    assert verdict.status == "runs"
    assert "setting adopted: (not set) -> 1 adopted behind it" in verdict.reasons()
    record = made.make(verdict.request)
    assert [a["key"] for a in record["science"]["adopted"]] == [key]
    assert made.verdict("build_report").status == "up to date"
    summaries = map(provenance.summary, provenance.chain(made.store, [Path(WEIGHTS)]))
    assert [s["adopted"]["reason"] for s in summaries if "adopted" in s] == ["nothing but names"]


def test_the_rule_that_says_provenance_is_the_stage_that_is_told():
    rules = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "rules").glob("*.smk"))
    blocks = {block.partition(":")[0]: block for block in rules.split("\nrule ")[1:]}
    told = {stage for stage in OUTPUTS if "--provenance" in blocks[stage]}
    assert told == provenance.TOLD


def test_several_are_adopted_from_the_top_down(made, capsys):
    """Dependents of what is adopted become settled by it; the order on the command line does not matter."""
    made.set("corpora.generated.encoding_errors", "replace")
    parts = [f"results/tokens/generated-generated_char/part_00000{i}.json" for i in "01"]
    tokenizer = "results/tokenizers/generated_char/tokenizer.json"
    assert "not settled" in refused(capsys, "adopt", *parts, "--yes", "--reason", "plain ASCII")
    told = json.loads(
        ask(capsys, "adopt", *parts, tokenizer, "--yes", "--json", "--reason", "plain ASCII")
    )
    assert [r["stage"] for r in told] == ["build_tokenizer", "encode_tokens", "encode_tokens"]
    fates = made.fates()
    assert fates.pop("build_report tiny") == "runs"  # it tells of settings and adoptions
    assert set(fates.values()) == {"up to date"}


@pytest.mark.parametrize("case", [
    "nothing differs", "never made", "input made anew", "input lost", "object short", "object flipped",
    "foreign file", "in the store", "no reason", "no terminal", "another input",
])  # fmt: skip
def test_what_cannot_be_vouched_for_is_refused(made, capsys, monkeypatch, case):
    words, expected = list(ADOPT), None
    path = made.store.object_path(sha256_of(WEIGHTS))
    if case != "nothing differs":
        changed(made)
    if case == "nothing differs":
        expected = "nothing differs"
    elif case == "never made":
        shutil.rmtree("results/models")
        shutil.rmtree("results/.actions/models")
        expected = "has no result to adopt: nothing has made it yet"
    elif case == "input made anew":
        made.set("experiments.tiny.evaluation.tokens", 7)
        words[1], expected = (
            "evaluate_tiny",
            "are not settled: weights, made anew by train_model tiny",
        )
    elif case == "input lost":
        Path("results/tokens/generated-generated_char/manifest.json").unlink()
        expected = "are not settled: results/tokens/generated-generated_char/manifest.json"
    elif case in ("object short", "object flipped"):
        content = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(content[:5] if case == "object short" else b"X" + content[1:])
        expected = "is damaged"
    elif case == "foreign file":
        Path(WEIGHTS).unlink()
        Path(WEIGHTS).write_text("mine")
        expected = "is not what the action made"
    elif case == "in the store":
        made.make_all()
        made.set("experiments.tiny.training.learning_rate", 0.01)
        expected = "the store has what its settings ask for"
    elif case == "no reason":
        words[-1], expected = "  ", "--reason is empty"
    elif case == "no terminal":
        words.remove("--yes")
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        expected = "say --yes if you are sure"
    elif case == "another input":
        made.set("corpora.generated.validation.fraction", 0.2)
        made.make_all()
        made.set("corpora.generated.validation.fraction", 0.1)
        made.set("experiments.tiny.training.learning_rate", 0.03)
        (manifest,) = made.request("train_model").inputs["tokens"]
        Path(manifest).unlink()
        Path(manifest).write_text("mine")
        expected = "is not what train_model tiny would read"
    before = sorted(made.store.root.rglob("*.json"))
    assert expected in refused(capsys, *words)
    assert sorted(made.store.root.rglob("*.json")) == before


@pytest.mark.parametrize(("answer", "taken"), [("y\n", True), ("\n", False), ("no\n", False)])
def test_a_person_is_asked(made, capsys, monkeypatch, answer, taken):
    class Terminal:
        def isatty(self):
            return True

        def readline(self):
            return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    key = changed(made).verdict("train_model").key
    words = [word for word in ADOPT if word != "--yes"]
    if taken:
        assert "Adopt it? [y/N]" in ask_err(capsys, *words)
    else:
        assert "without a yes" in refused(capsys, *words)
    assert bool(made.store.look_up(key)) is taken


def test_what_somebody_else_made_meanwhile_is_not_overwritten(made):
    verdict = changed(made).verdict("train_model")
    record = adopt.adopted(made.store, verdict, "why not")
    made.make(verdict.request)
    with pytest.raises(UserError, match="was made meanwhile"):
        adopt.publish(made.store, verdict, record)
    assert "adopted" not in made.store.look_up(verdict.key)


def test_an_adoption_of_an_adoption_keeps_both(made, capsys):
    first = made.verdict("train_model").key
    ask(capsys, *(ADOPT if changed(made) else ()))
    second = made.verdict("train_model").key
    made.set("experiments.tiny.training.learning_rate", 0.03)
    ask(capsys, *ADOPT[:-1], "again")
    third = made.store.look_up(made.verdict("train_model").key)
    assert third["adopted"]["from"] == second
    assert made.store.look_up(second)["adopted"]["from"] == first
