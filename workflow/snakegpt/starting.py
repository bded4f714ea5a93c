"""Weights that training starts from: read as somebody left them, made to fit the model to be trained.

What may differ, and what becomes of it:

    vocabulary  rows beyond the tokenizer's ids are padding: added or left out as the settings pad
    context     gpt2: the first positions are kept (nanoGPT's crop_block_size)
    dropout     none of the weights' business
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from snakegpt.errors import UserError
from snakegpt.huggingface_format import (
    MASK,
    fingerprint_in,
    from_config,
    from_hugging_face,
    read_tensors,
)
from snakegpt.identity import file_digest
from snakegpt.model import Shape
from snakegpt.settings import Model

VOCABULARY_ROWS = ("token_embedding.weight", "head.weight")  # a row an id
POSITION_ROWS = "position_embedding.weight"


class Pretrained(NamedTuple):
    """Weights as they were found: our names and float32, in the shape of their config.json.

    fingerprint  of the tokenizer that they were trained with; None if they do not say
    """

    shape: Shape
    parameters: dict[str, Tensor]
    fingerprint: str | None


def read_pretrained(files: Sequence[Path], config: Mapping[str, Any]) -> Pretrained:
    """Weights from safetensors, one file or the parts of one, and the content of their config.json.

    raises  UserError for a damaged file, and for a model that ours cannot compute
    """
    where = str(files[0])
    theirs: dict[str, Tensor] = {}
    fingerprint = config.get("snakegpt", {}).get("tokenizer_fingerprint")
    try:
        for path in files:
            where = str(path)
            with safe_open(path, framework="pt") as file:
                told = (file.metadata() or {}).get("tokenizer_fingerprint", fingerprint)
                if fingerprint not in (None, told):
                    raise ValueError(f"it belongs to tokenizer {told}, its config to {fingerprint}")
                fingerprint = told
                for name in file.keys():  # noqa: SIM118
                    theirs[name] = _as_float32(name, file.get_tensor(name))
        shape = from_config(config)
        return Pretrained(shape, from_hugging_face(theirs, shape), fingerprint)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{where} is damaged, or no safetensors file: {error}.\n"
            "  fetch it again, or lock it again if that is what its source has"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        lacks = f"its config.json lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"training cannot start from {where}: {lacks}.\n"
            "  take weights of transformers' GPT2LMHeadModel or NanoChatForCausalLM, and the config.json"
            " that stands beside them"
        ) from None


def _as_float32(name: str, tensor: Tensor) -> Tensor:
    if MASK.fullmatch(name.removeprefix("transformer.")):
        return tensor
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
    return tensor.float()


def model_of(shape: Shape) -> Model:
    """The settings of a network: `placement.shape_of` the other way round, without dropout and padding."""
    own: dict[str, Any] = {"bias": shape.bias}
    if shape.modern:
        own = {"tie_embeddings": shape.tied, "logit_softcap": shape.softcap}
    sizes = {name: getattr(shape, name) for name in ("layers", "heads", "channels", "context")}
    return Model.model_validate({"architecture": shape.architecture, **sizes, **own})


def fitted(found: Pretrained, wanted: Shape, n_vocab: int) -> dict[str, Tensor]:
    """The parameters of a network like the weights' own, with its positions and its padding.

    n_vocab  ids of the tokenizer; what rows follow are padding
    """
    assert n_vocab <= min(found.shape.vocabulary, wanted.vocabulary)
    parameters = dict(found.parameters)
    for name in VOCABULARY_ROWS:
        if name in parameters:
            parameters[name] = _padded(parameters[name], n_vocab, wanted.vocabulary)
    if POSITION_ROWS in parameters:
        parameters[POSITION_ROWS] = parameters[POSITION_ROWS][: wanted.context].clone()
    return parameters


def _padded(rows_VC: Tensor, n_vocab: int, n_rows: int) -> Tensor:
    """(V, C) rows cut off at `n_rows`, or filled up to them by the mean of the rows that are ids.

    The logit of a mean row is the mean of all logits, and its exponential at most the mean of theirs: n
    such rows take at most n / (n_vocab + n) of the probability, whatever the text. GPT-2's 47 rows
    raise a loss by 0.0009 nats at most; in truth by far less, since its likely tokens lie far above the
    mean. Rows of zeros would swallow everything: all logits of OpenAI's GPT-2 are far below 0.

    source  Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models
    """
    if n_rows <= len(rows_VC):
        return rows_VC[:n_rows].clone()
    mean_C = rows_VC[:n_vocab].mean(dim=0, dtype=torch.float64).to(rows_VC.dtype)
    return torch.cat([rows_VC, mean_C.expand(n_rows - len(rows_VC), -1)])


class Start(NamedTuple):
    """Adapted weights that a training starts from: what adapt_weights left.

    note  the file's digest
    """

    note: dict[str, Any]
    weights: Path
    shape: Shape

    def tensors(self) -> dict[str, Tensor]:
        """The weights, named as in a saved state.

        raises  UserError if they do not fit the model
        """
        try:
            ours = from_hugging_face(read_tensors(self.weights), self.shape)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{self.weights} does not fit the model to be trained: {error}.\n"
                "  make it with adapt_weights, from the same model settings"
            ) from None
        return {f"model.{name}": tensor for name, tensor in ours.items()}


def adapted(weights: Path, shape: Shape, tokenizer_fingerprint: str) -> Start:
    """Weights to start from, after a look at whose they are.

    raises  UserError if they are no safetensors of ours, or of another tokenizer
    """
    try:
        found = fingerprint_in(weights)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{weights} is damaged, or no safetensors file: {error}.") from None
    if found != tokenizer_fingerprint:
        raise UserError(
            f"{weights} belongs to tokenizer {found}, the tokens to {tokenizer_fingerprint}.\n"
            "  make it with adapt_weights and the tokenizer that the corpus was encoded with"
        )
    return Start({"weights_sha256": file_digest(weights)}, weights, shape)
