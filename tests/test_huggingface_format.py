"""Weights and configuration that transformers reads as its own, and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from snakegpt.errors import UserError
from snakegpt.huggingface_format import (
    from_config,
    from_hugging_face,
    load_model,
    save_weights,
    to_config,
)
from snakegpt.model import GPT, Shape, n_parameters
from snakegpt.sampling import continue_ids
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    NanoChatConfig,
    NanoChatForCausalLM,
)

IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def shape(bias: bool = True) -> Shape:
    return Shape(vocabulary=64, layers=2, heads=2, channels=32, context=16, bias=bias)


def random_model(bias: bool = True) -> GPT:
    """Weights large enough that a wrong activation or a missed bias shows."""
    torch.manual_seed(0)
    model = GPT(shape(bias)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def write(folder, model, bias=True):
    config = to_config(
        shape(bias), n_vocab=50, end_of_text=0, tokenizer_fingerprint="f", model={"bias": bias}
    )
    (folder / "config.json").write_text(json.dumps(config))
    save_weights(folder / "model.safetensors", model, "f")
    return config


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_computes_our_logits(tmp_path, bias):
    model = random_model(bias)
    write(tmp_path, model, bias)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GPT2Config)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDS).logits, model(IDS), atol=1e-5, rtol=1e-5)


# ---- modern is NanoChatForCausalLM ----


def modern_model(tied: bool, softcap: float | None = 15.0) -> GPT:
    torch.manual_seed(0)
    shape = Shape(64, 2, 2, 32, 16, bias=False, architecture="modern", tied=tied, softcap=softcap)
    model = GPT(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def write_modern(folder, model):
    config = to_config(model.shape, n_vocab=50, end_of_text=0, tokenizer_fingerprint="f", model={})
    (folder / "config.json").write_text(json.dumps(config))
    save_weights(folder / "model.safetensors", model, "f")
    return config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softcap", [15.0, None])
def test_nanochat_computes_our_logits(tmp_path, tied, softcap):
    model = modern_model(tied, softcap)
    write_modern(tmp_path, model)
    theirs, info = NanoChatForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(p.numel() for p in theirs.parameters()) == n_parameters(model.shape)
    with torch.no_grad():
        ours = model(IDS)
        torch.testing.assert_close(theirs.eval()(IDS).logits, ours, atol=1e-5, rtol=1e-5)
        # Greedy, with their cache of keys and values and with ours.
        grown = theirs.generate(IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert ours.abs().max() > 3  # a wrong scale or soft-cap would show
    tokens, _ = continue_ids(
        model, IDS[0].tolist(), n_vocab=64, end_of_text=-1, max_tokens=6, temperature=0.0,
        top_k=None, generator=torch.Generator(),
    )  # fmt: skip
    assert grown[0, IDS.shape[1] :].tolist() == tokens


@pytest.mark.parametrize("tied", [True, False])
def test_we_compute_nanochats_logits(tmp_path, tied):
    torch.manual_seed(1)
    config = NanoChatConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    theirs = NanoChatForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    ours = load_model(tmp_path / "model.safetensors", written)
    assert ours.shape.tied == tied
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_modern_model_comes_back_as_it_was(tmp_path, tied):
    model = modern_model(tied)
    back = load_model(tmp_path / "model.safetensors", write_modern(tmp_path, model))
    assert back.shape == model.shape
    weights = back.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_nanochat_that_we_cannot_compute_is_refused(tmp_path):
    config = write_modern(tmp_path, modern_model(True))
    for change, words in (
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1"),
        ({"intermediate_size": 64}, "intermediate_size = 64"),
        ({"rope_parameters": {"rope_theta": 1e5}}, "rope_theta = 100000"),
    ):
        with pytest.raises(ValueError, match=words):
            from_config(config | change)
    with pytest.raises(UserError, match="is missing"):  # weights of the other architecture
        load_model(tmp_path / "model.safetensors", write(tmp_path, random_model()) and config)


# ---- gpt2 is GPT2LMHeadModel ----


def test_we_compute_transformers_logits(tmp_path):
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=64, n_layer=2, n_head=2, n_embd=32, n_positions=16, initializer_range=0.3
    )
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    ours = load_model(tmp_path / "model.safetensors", written)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_comes_back_as_it_was(tmp_path, bias):
    model = random_model(bias)
    config = write(tmp_path, model, bias)
    back = load_model(tmp_path / "model.safetensors", config).state_dict()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


def test_the_same_weights_are_the_same_bytes(tmp_path):
    for name in "abc":
        save_weights(tmp_path / name, random_model(), "fingerprint")
    assert (
        (tmp_path / "a").read_bytes()
        == (tmp_path / "b").read_bytes()
        == (tmp_path / "c").read_bytes()
    )


def test_old_files_with_masks_and_without_prefix_are_read(tmp_path):
    model = random_model()
    save_weights(tmp_path / "x", model, "f")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "x").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    back = from_hugging_face(tensors, shape())
    assert torch.equal(back["blocks.0.attention.qkv.bias"], model.blocks[0].attention.qkv.bias)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias is missing"),
        (lambda t: t.update({"transformer.h.9.x": torch.ones(1)}), "unknown tensors: h.9.x"),
        (lambda t: t.update({"transformer.wpe.weight": torch.ones(8, 32)}), "wpe.weight is"),
        (lambda t: t.update({"lm_head.weight": torch.ones(64, 32)}), "not tied"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, change, words):
    config = write(tmp_path, random_model())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        load_model(tmp_path / "bad.safetensors", config)


def test_a_truncated_file_is_refused(tmp_path):
    config = write(tmp_path, random_model())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is no model"):
        load_model(path, config)


def test_weights_of_another_tokenizer_are_refused_naming_both(tmp_path):
    config = write(tmp_path, random_model())
    config["snakegpt"]["tokenizer_fingerprint"] = "g"
    with pytest.raises(UserError, match=r"tokenizer f, its config\.json says g"):
        load_model(tmp_path / "model.safetensors", config)


def test_what_our_model_cannot_compute_is_refused():
    config = to_config(shape(), n_vocab=50, end_of_text=0, tokenizer_fingerprint="f", model={})
    with pytest.raises(ValueError, match="activation_function = 'gelu'"):
        from_config(config | {"activation_function": "gelu"})
    with pytest.raises(ValueError, match="n_inner"):
        from_config(config | {"n_inner": 7})
