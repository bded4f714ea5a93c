"""The settings tree: closed, explained, resolved by scale; science and execution told apart."""

from __future__ import annotations

import copy
import math
import typing
from pathlib import Path

import pytest
import yaml
from snakegpt import settings
from snakegpt.errors import UserError
from snakegpt.model import n_parameters
from snakegpt.placement import shape_of
from snakegpt.settings import load, load_files, science

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


def changed(path: str, value: object) -> dict:
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    block = config
    for parent in parents:
        block = block.setdefault(parent, {})
    block[last] = value
    return config


def test_the_shipped_configuration_is_valid_at_both_scales():
    laptop = load(CONFIG)
    full = load(CONFIG | {"scale": "full"})
    assert laptop.experiments["gpt2"].corpus == "shakespeare"
    assert full.experiments["gpt2"].corpus == "fineweb_edu_10b"
    model = full.experiments["gpt2"].model
    assert (model.layers, model.heads, model.channels, model.context) == (12, 12, 768, 1024)
    assert full.experiments["gpt2"].training.batch_tokens == 2**19


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("scael", "full", ["unknown setting scael", "Nearest valid name: scale"]),
        ("scale", "lapttop", ["scale = 'lapttop'", "Nearest valid name: laptop"]),
        (
            "experiments.gpt2.training.lerning_rate",
            1e-3,
            [
                "unknown setting experiments.gpt2.training.lerning_rate",
                "Nearest valid name: learning_rate",
            ],
        ),
        (
            "experiments.gpt2.full.training.warmup",
            1,
            ["unknown setting experiments.gpt2.full.training.warmup", "warmup_steps"],
        ),
        ("experiments.gpt2.model.layers", "four", ["model.layers = 'four'", "valid integer"]),
        ("experiments.gpt2.model.dropout", 1.5, ["dropout = 1.5", "less than 1"]),
        ("prices", {"H10": 2.5}, ["no datasheet of a GPU named 'H10'", "Nearest valid name: H100"]),
        ("execution.device", "gpu", ["execution.device = 'gpu'", "cpu"]),
        (
            "corpora.shakespeare.source.kind",
            "htp",
            ["source.kind = 'htp'", "Nearest valid name: http"],
        ),
        (
            "corpora.shakespeare.source.membres",
            [],
            ["unknown setting", "Nearest valid name: members"],
        ),
        (
            "tokenizers.gpt2.kind",
            "gtp2",
            ["tokenizers.gpt2.kind = 'gtp2'", "Nearest valid name: gpt2"],
        ),
        (
            "tokenizers.shakespeare_bpe.corpus",
            "shakespare",
            ["shakespeare_bpe.corpus", "shakespeare"],
        ),
        ("tokenizers.shakespeare_bpe.vocabulary", 256, ["vocabulary = 256", "257"]),
        ("tokenizers.shakespeare_bpe.pattern", "gpt4", ["pattern = 'gpt4'", "gpt2"]),
        (
            "tokenizers.shakespeare_char.corpus",
            "shakespear",
            ["shakespeare_char.corpus", "shakespeare"],
        ),
        ("default_experiments", ["gpt3"], ["'gpt3'", "Nearest valid name: gpt2"]),
        ("experiments.gpt2.laptop.corpus", "tiny", ["gpt2.corpus = 'tiny' is not defined"]),
        ("experiments.gpt2.laptop.tokenizer", "gpt3", ["gpt2.tokenizer = 'gpt3'", "gpt2"]),
        ("experiments.gpt2.laptop.model.heads", 3, ["channels = 128", "heads = 3", "126 and 129"]),
        (
            "experiments.gpt2.laptop.training.batch_tokens",
            1000,
            ["batch_tokens = 1,000", "context = 128", "896 and 1,024"],
        ),
        (
            "experiments.gpt2.laptop.training.learning_rate",
            math.inf,
            ["learning_rate = inf", "finite number"],
        ),
        (
            "experiments.gpt2.laptop.training",
            {"schedule": "warmup_stable_decay", "cooldown_fraction": 1e-4, "steps": 1000},
            ["cooldown_fraction = 0.0001 of 1,000 steps is less than one", "0.001 or more"],
        ),
        ("experiments.gpt2.laptop.training.warmup_steps", 5000, ["warmup_steps = 5,000", "beyond"]),
        (
            "experiments.gpt2.laptop.training.min_learning_rate",
            1.0,
            ["min_learning_rate = 1 is above"],
        ),
        (
            "experiments.gpt2.laptop.training.cooldown_fraction",
            0.3,
            ["cooldown_fraction = 0.3 means nothing", "schedule = cosine", "warmup_stable_decay"],
        ),
        (
            "experiments.gpt2.model.tie_embeddings",
            False,
            ["tie_embeddings = False means nothing", "architecture = gpt2", "only modern knows"],
        ),
        (
            "experiments.gpt2.laptop.training.muon_momentum",
            0.9,
            ["muon_momentum = 0.9 means nothing", "optimizer = adamw", "only muon"],
        ),
        (
            "experiments.gpt2.laptop",
            {"training": {"gradient_exchange": "bfloat16"}, "execution": {"deterministic": True}},
            ["gradient_exchange = bfloat16 does not go with execution.deterministic", "float32"],
        ),
        (
            "experiments.gpt2.laptop",
            {"training": {"gradient_exchange": "bfloat16"}, "execution": {"strategy": "fsdp"}},
            ["gradient_exchange = bfloat16 does not go with strategy fsdp", "ddp or zero1"],
        ),
        (
            "experiments.gpt2.laptop.execution",
            {"deterministic": True, "strategy": "zero1"},
            ["execution.deterministic goes with strategy ddp alone, not with zero1", "ddp or auto"],
        ),
        (
            "experiments.gpt2.laptop.training",
            {"skip_spikes_above": 6, "spike_window": 128, "steps": 100, "warmup_steps": 5},
            ["skip_spikes_above = 6 would find nothing", "spike_window = 128", "100 steps"],
        ),
        (
            "experiments.gpt2.model.preset",
            "1.6B",
            ["preset = '1.6B'", "Nearest valid name: 1.5B. All of them: nano, "],
        ),
        ("experiments.My Model", {}, ["My Model", "pattern"]),
    ],
)
def test_a_mistake_is_explained(path, value, words):
    with pytest.raises(UserError) as caught:
        load(changed(path, value))
    for word in words:
        assert word in str(caught.value)


def modern(**model: object) -> dict:
    config = copy.deepcopy(CONFIG)
    config["experiments"]["gpt2"]["laptop"]["model"] |= {"architecture": "modern", **model}
    return config


def test_what_is_chosen_decides_defaults():
    model = load(modern()).experiments["gpt2"].model
    assert (model.bias, model.tie_embeddings, model.logit_softcap) == (None, True, 15.0)
    assert load(modern(logit_softcap=None)).experiments["gpt2"].model.logit_softcap is None
    model = load(CONFIG).experiments["gpt2"].model
    assert (model.bias, model.tie_embeddings, model.logit_softcap) == (True, None, None)
    assert settings.Training(optimizer="muon").muon_learning_rate == 0.02


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"bias": False}, ["bias = False means nothing", "only gpt2"]),
        ({"heads": 128}, ["channels = 128", "heads = 128 x 2", "256"]),
    ],
)
def test_modern_has_mistakes_of_its_own(model, words):
    with pytest.raises(UserError) as caught:
        load(modern(**model))
    assert all(word in str(caught.value) for word in words)


def test_a_preset_fills_in_sizes_and_is_no_identity():
    model = settings.Model(preset="124M", context=512)
    assert (model.layers, model.heads, model.channels, model.context) == (12, 12, 768, 512)
    written_out = settings.Model(layers=12, heads=12, channels=768, context=512)
    assert science(model) == science(written_out)


def test_the_presets_are_the_published_sizes():
    published = {"124M": 124.4e6, "350M": 354.8e6, "774M": 774.0e6, "1.5B": 1557.6e6}
    for name, n in published.items():
        shape = shape_of(settings.Model(preset=name, vocabulary_multiple=1), 50_257)
        assert n_parameters(shape) == pytest.approx(n, rel=1e-3)
    assert set(settings.PRESETS) == set(typing.get_args(preset_choices()))


def preset_choices() -> object:
    return typing.get_args(settings.Model.model_fields["preset"].annotation)[0]


def test_a_missing_block_is_named():
    config = {key: value for key, value in CONFIG.items() if key != "tokenizers"}
    with pytest.raises(UserError, match="setting tokenizers is missing"):
        load(config)


def test_an_error_says_file_and_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("execution:\n  # how loudly\n  log_interval_s: -1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml, line 3"):
        load_files([ROOT / "config.yaml", file])


def test_later_files_and_overrides_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("experiments: {gpt2: {laptop: {training: {steps: 7, warmup_steps: 1}}}}\n")
    loaded = load_files([ROOT / "config.yaml", file])
    assert loaded.experiments["gpt2"].training.steps == 7
    assert loaded.experiments["gpt2"].model.layers == 4  # the rest of the block stays
    assert (
        load_files([ROOT / "config.yaml", file], {"scale": "full"})
        .experiments["gpt2"]
        .training.steps
        != 7
    )


def test_numbers_that_yaml_reads_as_text_are_numbers():
    # YAML 1.1 reads 1e-3 without a dot as a string; nested `--config` values arrive as strings too.
    config = changed("experiments.gpt2.laptop.training.learning_rate", "1e-2")
    assert load(config).experiments["gpt2"].training.learning_rate == 0.01


@pytest.mark.parametrize("text", ["a: [1", "a: b: c"])
def test_broken_yaml_is_a_clear_error(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="not valid YAML"):
        load_files([file])


def test_a_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_files([tmp_path / "nowhere.yaml"])


def test_unknown_names_are_explained():
    loaded = load(CONFIG)
    for look_up, noun in ((loaded.experiment, "experiment"), (loaded.corpus, "corpus")):
        with pytest.raises(UserError, match=f"unknown {noun} 'gpt'"):
            look_up("gpt")


def test_science_leaves_out_labels_and_keeps_everything_else():
    corpus = load(CONFIG).corpora["shakespeare"]
    assert set(science(corpus)) == set(type(corpus).model_fields) - {
        "source",
        "description",
        "license",
    }
    training = load(CONFIG).experiments["gpt2"].training
    later = {"gradient_exchange", "start_from"}
    assert science(training) == training.model_dump(exclude=later)


def test_a_later_setting_counts_only_where_it_is_not_what_it_always_was():
    """Else it would give all results that there are another key, and the runs that are under way."""
    before = science(settings.Training())
    assert science(settings.Training(gradient_exchange="float32")) == before
    after = science(settings.Training(gradient_exchange="bfloat16"))
    assert after == {**before, "gradient_exchange": "bfloat16"}


def test_every_setting_is_described():
    for block in vars(settings).values():
        if (
            isinstance(block, type)
            and issubclass(block, settings.Closed)
            and block is not settings.Closed
        ):
            assert block.__doc__, block
            for name, field in block.model_fields.items():
                described = (
                    field.description
                    or name == "kind"
                    or "BaseModel" in str(getattr(field.annotation, "__mro__", ""))
                )
                assert described, f"{block.__name__}.{name}"


def test_every_execution_default_stands_in_the_shipped_configuration():
    assert CONFIG["execution"] == settings.Execution().model_dump()
