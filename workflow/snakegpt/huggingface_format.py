"""Weights and configuration as transformers' GPT2LMHeadModel reads and writes them, without transformers.

Ours and theirs differ in names, in layout (their Conv1D keeps linear weights as (in, out), torch's
Linear as (out, in)), and in that theirs always has biases: a model without them is written with zeros.
The head is tied on both sides and not written.
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
from snakegpt.model import GPT, AttentionKernel, Shape

# Our module -> theirs, inside a block and outside.
BLOCK_MODULES = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.expansion": "mlp.c_fc",
    "mlp.projection": "mlp.c_proj",
}
OTHER_MODULES = {"token_embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Causal masks that old files carry. Anchored: `attn.c_attn.bias` also ends in `attn.bias`.
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")


def their_names(shape: Shape) -> dict[str, str]:
    """Our parameter name -> theirs without the `transformer.` prefix, biases included."""
    modules = dict(OTHER_MODULES)
    for layer in range(shape.layers):
        for ours, theirs in BLOCK_MODULES.items():
            modules[f"blocks.{layer}.{ours}"] = f"h.{layer}.{theirs}"
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in modules.items()
        for kind in (("weight",) if "embedding" in ours else ("weight", "bias"))
    }


def to_hugging_face(parameters: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Our state dict as theirs: float32, on CPU, contiguous."""
    theirs = {}
    for our_name, their_name in their_names(shape).items():
        if our_name in parameters:
            tensor = parameters[our_name].detach().to("cpu", torch.float32)
        else:  # a bias that this model does without
            tensor = torch.zeros(parameters[our_name.removesuffix("bias") + "weight"].shape[0])
        if their_name.endswith(CONV1D):
            tensor = tensor.t()
        theirs[f"transformer.{their_name}"] = tensor.contiguous()
    return theirs


def from_hugging_face(theirs: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Their tensors as our state dict; files with and without the `transformer.` prefix are read.

    raises  ValueError that names missing, unknown, misshapen or inexpressible tensors
    """
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("wte.weight", torch.empty(0))):
        raise ValueError("lm_head.weight is not tied to wte.weight")
    tensors = {name: t for name, t in tensors.items() if not MASK.fullmatch(name)}
    with torch.device("meta"):
        wanted = GPT(shape).state_dict()
    ours = {}
    for our_name, their_name in their_names(shape).items():
        if their_name not in tensors:
            raise ValueError(f"{their_name} is missing")
        tensor = tensors.pop(their_name)
        if their_name.endswith(CONV1D):
            tensor = tensor.t()
        if our_name in wanted:
            if tensor.shape != wanted[our_name].shape:
                found, expected = tuple(tensor.shape), tuple(wanted[our_name].shape)
                raise ValueError(f"{their_name} is {found}, the configuration wants {expected}")
            ours[our_name] = tensor.contiguous()
        elif tensor.any():
            raise ValueError(f"{their_name} is not zero, but the model has no biases")
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
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",  # the tanh form
        "vocab_size": shape.vocabulary,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_embd": shape.channels,
        "n_positions": shape.context,
        "n_ctx": shape.context,
        "n_inner": None,
        "attn_pdrop": shape.dropout,
        "embd_pdrop": shape.dropout,
        "resid_pdrop": shape.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
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


def from_config(config: Mapping[str, Any]) -> Shape:
    """The shape that a config.json describes, ours or anybody's GPT-2.

    raises  ValueError that names what our model cannot compute
    """
    wanted = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "layer_norm_epsilon": 1e-5,
        "add_cross_attention": False,
    }
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} = {config[key]!r} is not supported, only {value!r}")
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


def load_model(weights: Path, config: Mapping[str, Any], kernel: AttentionKernel = "sdpa") -> GPT:
    """A model on CPU, ready to evaluate, from a safetensors file and the content of its config.json.

    raises  UserError if they do not fit each other or carry different tokenizers' fingerprints
    """
    try:
        shape = from_config(config)
        with safe_open(weights, framework="pt") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = (file.metadata() or {}).get("tokenizer_fingerprint")
        parameters = from_hugging_face(theirs, shape)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{weights} is no GPT-2 model that its config.json describes: {error}"
        ) from None
    wanted = config.get("snakegpt", {}).get("tokenizer_fingerprint", found)
    if found != wanted:
        raise UserError(
            f"{weights} was trained with tokenizer {found}, its config.json says {wanted}.\n"
            "  use the config.json that stands beside the weights"
        )
    model = GPT(shape, kernel)
    model.load_state_dict(parameters)
    return model.eval()
