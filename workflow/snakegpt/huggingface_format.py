"""Weights and configuration as transformers reads and writes them, without transformers.

Architecture gpt2 is its GPT2LMHeadModel. Ours and theirs differ in names, in layout (their Conv1D keeps
linear weights as (in, out), torch's Linear as (out, in)), and in that theirs always has biases: a model
without them is written with zeros. Architecture modern is its NanoChatForCausalLM, which has q, k and v
in matrices of their own. A tied head is not written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from snakegpt.errors import UserError
from snakegpt.model import GPT, NORM_EPSILON, ROTARY_BASE, AttentionKernel, Shape

# Our module -> theirs, inside a block and outside; several of theirs are stacked by rows in ours.
GPT2_BLOCK = {
    "attention_norm": ["ln_1"],
    "attention.qkv": ["attn.c_attn"],
    "attention.projection": ["attn.c_proj"],
    "mlp_norm": ["ln_2"],
    "mlp.expansion": ["mlp.c_fc"],
    "mlp.projection": ["mlp.c_proj"],
}
GPT2_OTHER = {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MODERN_BLOCK = {
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.projection": ["self_attn.o_proj"],
    "mlp.expansion": ["mlp.fc1"],
    "mlp.projection": ["mlp.fc2"],
}

# Causal masks that old files carry. Anchored: `attn.c_attn.bias` also ends in `attn.bias`.
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


def their_names(shape: Shape) -> dict[str, list[str]]:
    """Our parameter name -> theirs, without gpt2's `transformer.` prefix and with all its biases."""
    if shape.modern:
        modules = {"token_embedding": ["model.embed_tokens"]}
        if not shape.tied:
            modules["head"] = ["lm_head"]
        block, prefix = MODERN_BLOCK, "model.layers"
    else:
        modules = {ours: [theirs] for ours, theirs in GPT2_OTHER.items()}
        block, prefix = GPT2_BLOCK, "h"
    for layer in range(shape.layers):
        for ours, several in block.items():
            modules[f"blocks.{layer}.{ours}"] = [f"{prefix}.{layer}.{theirs}" for theirs in several]
    return {
        f"{ours}.{kind}": [f"{theirs}.{kind}" for theirs in several]
        for ours, several in modules.items()
        for kind in ("weight", "bias")
        if kind == "weight" or not (shape.modern or "embedding" in ours)
    }


def to_hugging_face(parameters: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Our state dict as theirs: float32, on CPU, contiguous."""
    theirs = {}
    for our_name, names in their_names(shape).items():
        if our_name in parameters:
            tensor = parameters[our_name].detach().to("cpu", torch.float32)
        else:  # a bias that this model does without
            tensor = torch.zeros(parameters[our_name.removesuffix("bias") + "weight"].shape[0])
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            part = part.t() if name.endswith(CONV1D) else part
            theirs[name if shape.modern else f"transformer.{name}"] = part.contiguous()
    return theirs


def from_hugging_face(theirs: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Their tensors as our state dict; files with and without the `transformer.` prefix are read.

    raises  ValueError that names missing, unknown, misshapen or inexpressible tensors
    """
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    if shape.tied:
        head = tensors.pop("lm_head.weight", None)
        [embedding] = their_names(shape)["token_embedding.weight"]
        if head is not None and not torch.equal(head, tensors.get(embedding, torch.empty(0))):
            raise ValueError(f"lm_head.weight is not tied to {embedding}")
    tensors = {name: t for name, t in tensors.items() if not MASK.fullmatch(name)}
    with torch.device("meta"):
        wanted = GPT(shape).state_dict()
    ours = {}
    for our_name, names in their_names(shape).items():
        parts = []
        for name in names:
            if name not in tensors:
                raise ValueError(f"{name} is missing")
            part = tensors.pop(name)
            parts.append(part.t() if name.endswith(CONV1D) else part)
        if our_name in wanted:
            whole = wanted[our_name].shape
            expected = torch.Size([whole[0] // len(parts), *whole[1:]])
            for name, part in zip(names, parts, strict=True):
                if part.shape != expected:
                    found = tuple(part.shape)
                    raise ValueError(
                        f"{name} is {found}, the configuration wants {tuple(expected)}"
                    )
            ours[our_name] = torch.cat(parts).contiguous()
        elif parts[0].any():
            raise ValueError(f"{names[0]} is not zero, but the model has no biases")
    if tensors:
        raise ValueError(f"unknown tensors: {', '.join(sorted(tensors))}")
    return ours


def to_config(
    shape: Shape, *, n_vocab: int, end_of_text: int, tokenizer_fingerprint: str, model: Any
) -> dict[str, Any]:
    """config.json: what transformers' AutoConfig reads, and our own facts under "snakegpt".

    model  the settings block that the shape was made from, as JSON
    """
    return {
        **(_nanochat_config(shape) if shape.modern else _gpt2_config(shape)),
        "vocab_size": shape.vocabulary,
        "initializer_range": 0.02,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
        "snakegpt": {
            "model": model,
            "n_vocab": n_vocab,
            "end_of_text": end_of_text,
            "tokenizer_fingerprint": tokenizer_fingerprint,
        },
    }


def _gpt2_config(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",  # the tanh form
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_embd": shape.channels,
        "n_positions": shape.context,
        "n_ctx": shape.context,
        "n_inner": None,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "layer_norm_epsilon": NORM_EPSILON["gpt2"],
    }


def _nanochat_config(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "nanochat",
        "architectures": ["NanoChatForCausalLM"],
        "hidden_act": "relu2",
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "hidden_size": shape.channels,
        "intermediate_size": 4 * shape.channels,
        "max_position_embeddings": shape.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "rms_norm_eps": NORM_EPSILON["modern"],
        "attention_bias": False,
        "attention_dropout": shape.dropout,
        "final_logit_softcapping": shape.softcap,
        "pad_token_id": None,
    }


def from_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes: ours, anybody's GPT-2, or anybody's NanoChat.

    raises  ValueError that names what our model cannot compute
    """
    if config.get("model_type", "gpt2") == "nanochat":
        return _nanochat_shape(config)
    _require(
        config,
        {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "layer_norm_epsilon": NORM_EPSILON["gpt2"],
            "add_cross_attention": False,
        },
    )
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"n_inner = {config['n_inner']} is not supported, only 4 x n_embd")
    ours = config.get("snakegpt", {}).get("model", {})
    return Shape(
        vocabulary=config["vocab_size"],
        layers=config["n_layer"],
        heads=config["n_head"],
        channels=config["n_embd"],
        context=config["n_positions"],
        dropout=config.get("resid_pdrop", 0.0),
        bias=ours.get("bias", True),
    )


def _nanochat_shape(config: Mapping[str, Any]) -> Shape:
    heads, channels = config["num_attention_heads"], config["hidden_size"]
    rotary = {"rope_type": "default", "rope_theta": ROTARY_BASE}
    if config.get("num_key_value_heads") is None:  # their default: as many as heads
        config = {**config, "num_key_value_heads": heads}
    _require(
        config,
        {
            "hidden_act": "relu2",
            "num_key_value_heads": heads,
            "intermediate_size": 4 * channels,
            "head_dim": channels // heads,
            "rms_norm_eps": NORM_EPSILON["modern"],
            "attention_bias": False,
        },
    )
    _require(config.get("rope_parameters") or {}, rotary)
    return Shape(
        vocabulary=config["vocab_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        channels=channels,
        context=config["max_position_embeddings"],
        dropout=config.get("attention_dropout", 0.0),
        bias=False,
        architecture="modern",
        tied=config.get("tie_word_embeddings", False),
        softcap=config.get("final_logit_softcapping", 15.0),  # where theirs says nothing
    )


def _require(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse values that our model cannot compute; what is not said has the value that it can."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} = {config[key]!r} is not supported, only {value!r}")


def save_weights(path: Path, model: GPT, tokenizer_fingerprint: str) -> None:
    """Write a model as safetensors, the same bytes for the same weights."""
    metadata = {"format": "pt", "tokenizer_fingerprint": tokenizer_fingerprint}
    save_file(to_hugging_face(model.state_dict(), model.shape), path, metadata)
    # The library writes the metadata in the random order of a hash map (seen with 0.8.0): sort it.
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on CPU.

    raises  SafetensorError, OSError
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fingerprint_in(path: Path) -> str | None:
    """Whose tokenizer's ids a safetensors file of ours is for; None if it does not say.

    raises  SafetensorError, OSError
    """
    with safe_open(path, framework="pt") as file:
        found: str | None = (file.metadata() or {}).get("tokenizer_fingerprint")
    return found


def load_model(weights: Path, config: Mapping[str, Any], kernel: AttentionKernel = "sdpa") -> GPT:
    """A model on CPU, ready to evaluate, from a safetensors file and the content of its config.json.

    raises  UserError if they do not fit each other or carry different tokenizers' fingerprints
    """
    try:
        shape = from_config(config)
        parameters = from_hugging_face(read_tensors(weights), shape)
        found = fingerprint_in(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{weights} is no model that its config.json describes: {error}") from None
    wanted = config.get("snakegpt", {}).get("tokenizer_fingerprint", found)
    if found != wanted:
        raise UserError(
            f"{weights} was trained with tokenizer {found}, its config.json says {wanted}.\n"
            "  use the config.json that stands beside the weights"
        )
    model = GPT(shape, kernel)
    model.load_state_dict(parameters)
    return model.eval()
