"""Pretrained weights made to fit: what may differ does no harm, and all else is refused with reasons."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from pretrained_fixtures import (
    FINGERPRINT,
    MODEL,
    N_VOCAB,
    adapt_arguments,
    foreign,
    tokenizer_json,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snakegpt.huggingface_format import load_model, save_weights, to_config
from snakegpt.identity import file_digest
from snakegpt.model import GPT, Shape, initialise
from snakegpt.placement import shape_of
from snakegpt.settings import Model
from snakegpt.stages import adapt_weights
from snakegpt.starting import model_of
from transformers import NanoChatConfig, NanoChatForCausalLM

IDS = torch.randint(N_VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))


def adapt(folder, model=MODEL, **files):
    """Run the stage; returns the folder that it wrote."""
    out = folder / "start"
    adapt_weights.main(adapt_arguments(folder / "theirs", out, model, **files))
    return out


def our_logits(out, model) -> torch.Tensor:
    shape = shape_of(Model(**model), N_VOCAB)
    config = to_config(
        shape, n_vocab=N_VOCAB, end_of_text=0, tokenizer_fingerprint=FINGERPRINT, model=model
    )
    with torch.no_grad():
        return load_model(out / "weights.safetensors", config)(IDS)


def test_weights_that_fit_compute_what_they_computed(tmp_path):
    theirs = foreign(tmp_path / "theirs")
    out = adapt(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(out, MODEL), theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    facts = json.loads((out / "start.json").read_text())
    assert facts == {
        "files": {
            name: file_digest(tmp_path / "theirs" / name)
            for name in ("config.json", "model.safetensors")
        },
        "tokenizer_fingerprint": FINGERPRINT,
    }
    with safe_open(out / "weights.safetensors", framework="pt") as file:
        assert file.metadata()["tokenizer_fingerprint"] == FINGERPRINT


def test_a_shorter_context_keeps_the_first_positions(tmp_path, capsys):
    theirs = foreign(tmp_path / "theirs", n_positions=32)
    out = adapt(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(out, MODEL), theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    assert json.loads((out / "start.json").read_text())["context"] == [32, 8]
    assert "context 32 -> 8" in capsys.readouterr().err


def test_padding_is_a_mean_row_which_takes_no_more_than_its_share(tmp_path):
    """Also where all logits are far below 0, as those of OpenAI's GPT-2 are."""
    theirs = foreign(tmp_path / "theirs")
    with torch.no_grad():  # one direction that all rows share, and that the last norm always has
        theirs.transformer.ln_f.bias[0] = 10.0
        theirs.transformer.wte.weight[:, 0] -= 5.0
    theirs.save_pretrained(tmp_path / "theirs")
    model = {**MODEL, "vocabulary_multiple": 8}
    out = adapt(tmp_path, model)
    with torch.no_grad():
        logits = theirs(IDS).logits
    assert logits.max() < -10
    mean = logits.mean(dim=-1, keepdim=True).expand(-1, -1, 5)
    ours = our_logits(out, model)
    torch.testing.assert_close(ours, torch.cat([logits, mean], dim=-1), atol=1e-4, rtol=1e-5)
    worse = torch.logsumexp(ours, -1) - torch.logsumexp(logits, -1)
    assert worse.max() <= math.log(1 + 5 / N_VOCAB) + 1e-4
    assert json.loads((out / "start.json").read_text())["vocabulary_rows"] == [N_VOCAB, 16]


def test_padding_of_the_weights_may_be_left_out(tmp_path):
    theirs = foreign(tmp_path / "theirs", vocab_size=16)
    out = adapt(tmp_path)
    with torch.no_grad():
        logits = theirs(IDS).logits[..., :N_VOCAB]
    torch.testing.assert_close(our_logits(out, MODEL), logits, atol=1e-5, rtol=1e-5)


def test_parts_of_one_file_and_other_types_are_read(tmp_path):
    theirs = foreign(tmp_path / "theirs")
    whole = tmp_path / "theirs/model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(whole).items()}
    names = sorted(tensors)
    for index, part in enumerate((names[::2], names[1::2])):
        save_file({n: tensors[n] for n in part}, tmp_path / f"theirs/part{index}.safetensors")
    words = adapt_arguments(tmp_path / "theirs", tmp_path / "start", MODEL)
    at = words.index(str(whole))
    words[at : at + 1] = [str(tmp_path / f"theirs/part{index}.safetensors") for index in (0, 1)]
    adapt_weights.main(words)
    with torch.no_grad():
        logits = theirs.bfloat16().float()(IDS).logits
    torch.testing.assert_close(our_logits(tmp_path / "start", MODEL), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_nanochat_is_adapted_with_both_its_tables_and_a_longer_context(tmp_path, tied):
    torch.manual_seed(1)
    config = NanoChatConfig(
        vocab_size=N_VOCAB, hidden_size=16, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=4, initializer_range=0.3, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = NanoChatForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = {
        "architecture": "modern", "layers": 2, "heads": 2, "channels": 16, "context": 8,
        "tie_embeddings": tied, "vocabulary_multiple": 4,
    }  # fmt: skip
    out = adapt(tmp_path, model)
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(
        our_logits(out, model)[..., :N_VOCAB], expected, atol=1e-5, rtol=1e-5
    )


def test_our_own_weights_stay_the_bytes_they_are(tmp_path):
    """So that they are one object in the store, and training's key the same."""
    shape = shape_of(Model(**MODEL), N_VOCAB)
    (tmp_path / "theirs").mkdir()
    save_weights(tmp_path / "theirs/model.safetensors", initialise(GPT(shape), seed=3), FINGERPRINT)
    config = to_config(
        shape, n_vocab=N_VOCAB, end_of_text=0, tokenizer_fingerprint=FINGERPRINT, model=MODEL
    )
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    out = adapt(tmp_path)
    before, after = tmp_path / "theirs/model.safetensors", out / "weights.safetensors"
    assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize(
    "model",
    [
        Model(preset="nano", bias=False),
        Model(architecture="modern", tie_embeddings=False, logit_softcap=None),
    ],
)
def test_settings_and_networks_translate_both_ways(model):
    shape = shape_of(model, 100)
    assert shape_of(model_of(shape), 100) == Shape(**{**shape.__dict__, "dropout": 0.0})


# ---- refusals ----


def refusal(capsys, folder, model=MODEL, **files) -> str:
    with pytest.raises(SystemExit) as ending:
        adapt(folder, model, **files)
    assert ending.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert not (folder / "start/weights.safetensors").exists()
    return said


def test_every_difference_of_the_model_is_told_at_once(tmp_path, capsys):
    foreign(tmp_path / "theirs")
    model = {**MODEL, "layers": 3, "heads": 4, "channels": 32, "context": 16, "bias": False}
    said = refusal(capsys, tmp_path, model)
    for line in (
        "is of another model than the one to be trained:",
        "model.layers is 3, the weights have 2: set it to that",
        "model.heads is 4, the weights have 2: set it to that",
        "model.channels is 32, the weights have 16: set it to that",
        "model.bias is false, the weights have true: set it to that",
        "model.context is 16, and the weights have 8 positions: set it to that or less",
    ):
        assert line in said


def test_another_architecture_is_refused(tmp_path, capsys):
    foreign(tmp_path / "theirs")
    model = {"architecture": "modern", "layers": 2, "heads": 2, "channels": 16, "context": 8}
    said = refusal(capsys, tmp_path, model)
    assert 'model.architecture is "modern", the weights have "gpt2": set it to that' in said
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "model_type = 'llama' is not supported, only 'gpt2'" in refusal(capsys, tmp_path)
    del config["n_layer"]
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    assert "its config.json lacks 'n_layer'" in refusal(capsys, tmp_path)


def test_a_missing_bias_is_named(tmp_path, capsys):
    foreign(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save_file(tensors, path)
    assert "h.1.mlp.c_fc.bias is missing" in refusal(capsys, tmp_path)


def test_integers_are_no_weights(tmp_path, capsys):
    foreign(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    tensors = load_file(path)
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].to(torch.int8)
    save_file(tensors, path)
    assert "wpe.weight holds torch.int8, not floating-point" in refusal(capsys, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, -20])
def test_a_damaged_file_is_named(tmp_path, capsys, keep):
    foreign(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is damaged, or no safetensors file" in refusal(capsys, tmp_path)


def test_a_pickle_is_not_opened(tmp_path, capsys):
    foreign(tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs/model.safetensors", tmp_path / "theirs/pytorch_model.bin")
    listing = tmp_path / "weights.json"
    (tmp_path / "files").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(tmp_path / "theirs" / name, tmp_path / "files" / name)
    files = [{"path": name} for name in ("config.json", "pytorch_model.bin")]
    listing.write_text(json.dumps({"files": files}))
    words = adapt_arguments(tmp_path / "theirs", tmp_path / "start", MODEL, weights=listing)
    at = words.index("--config")
    with pytest.raises(SystemExit):
        adapt_weights.main(words[:at] + words[at + 2 :])
    assert "pytorch_model.bin is a pickle, which can run code" in capsys.readouterr().err


def test_another_tokenizer_is_refused_naming_both(tmp_path, capsys):
    foreign(tmp_path / "theirs")
    other = tokenizer_json(tmp_path / "other.json", "cd" * 32)
    said = refusal(capsys, tmp_path, trained_with=other)
    assert f"trained with tokenizer {'cd' * 32} ({other})" in said
    assert f"the experiment uses {FINGERPRINT}" in said
    larger = tokenizer_json(tmp_path / "larger.json", FINGERPRINT, 20)
    said = refusal(capsys, tmp_path, tokenizer=larger)
    assert "they have rows for 11 ids, the tokenizer has 20" in said


def test_weights_that_say_nothing_of_their_tokenizer_need_it_named(tmp_path, capsys):
    foreign(tmp_path / "theirs")
    words = adapt_arguments(tmp_path / "theirs", tmp_path / "start", MODEL)
    at = words.index("--trained_with")
    with pytest.raises(SystemExit):
        adapt_weights.main(words[:at] + words[at + 2 :])
    assert "name its tokenizer.json: --trained_with" in capsys.readouterr().err
