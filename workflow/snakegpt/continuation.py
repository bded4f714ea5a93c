"""What a finished run leaves so that another goes on from it: optimizer.safetensors.

Beside the weights, training needs the moments of the optimisers (8 bytes a parameter with AdamW, 4 a
parameter that Muon moves), the recent losses and its place in the data. Named as in a saved state, whole
and float32; the metadata says whose they are, in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from snakegpt.command import read_json
from snakegpt.errors import UserError
from snakegpt.huggingface_format import from_config, load_model, read_tensors
from snakegpt.identity import file_digest
from snakegpt.lineage import continuation_problems
from snakegpt.model import Shape
from snakegpt.settings import Training, science
from snakegpt.training_state import Saved

KEPT = ("step", "skipped_batches", "rollbacks", "in_a_row")  # of a state's note


class Finished(NamedTuple):
    """A finished run to go on from.

    note     the step it came to and the other numbers of `KEPT`; its training settings
    weights, optimizer, config  its files
    """

    note: dict[str, Any]
    weights: Path
    optimizer: Path
    config: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """All it left, named as in a saved state."""
        model = load_model(self.weights, self.config).state_dict()
        moments = read_tensors(self.optimizer)
        return {**{f"model.{name}": tensor for name, tensor in model.items()}, **moments}


def leave(out: Path, saved: Saved, recipe: Training, tokenizer_fingerprint: str) -> None:
    """Write optimizer.safetensors into a folder that holds the weights of the same step."""
    tensors = {
        name: tensor.contiguous()
        for name, tensor in saved.whole().items()
        if not name.startswith("model.")
    }
    note = {
        **{key: saved.note[key] for key in KEPT},
        "training": science(recipe),
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "weights_sha256": file_digest(out / "weights.safetensors"),
    }
    # One entry, since the library writes several in any order.
    metadata = {"snakegpt": json.dumps(note, sort_keys=True)}
    save_file(tensors, out / "optimizer.safetensors", metadata)


def finished(
    weights: Path,
    config: Path,
    optimizer: Path,
    *,
    shape: Shape,
    recipe: Training,
    tokenizer_fingerprint: str,
) -> Finished:
    """A finished run that this one may go on from.

    raises  UserError if the files are not one run's, or if model, tokenizer or learning rates are others
    """
    try:
        with safe_open(optimizer, framework="pt") as file:
            note = json.loads((file.metadata() or {})["snakegpt"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{optimizer} was left by no training of ours: {error!r}.") from None
    if file_digest(weights) != note["weights_sha256"]:
        raise UserError(
            f"{weights} and {optimizer} are of different runs.\n"
            "  take weights.safetensors, config.json and optimizer.safetensors of one training"
        )
    described = read_json(config)
    try:
        found = from_config(described)
    except (ValueError, KeyError) as error:
        raise UserError(f"{config} describes no model of ours: {error}.") from None
    differences = [
        f"{name} {getattr(found, name)}, here {value}"
        for name, value in asdict(shape).items()
        if name != "dropout" and getattr(found, name) != value
    ]
    if differences:
        raise UserError(f"{weights} is of another model: {'; '.join(differences)}.")
    if note["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise UserError(
            f"{weights} was trained with tokenizer {note['tokenizer_fingerprint']}, the tokens are of"
            f" {tokenizer_fingerprint}.\n  encode the corpus with the tokenizer of the run"
        )
    problems = continuation_problems(Training(**note["training"]), recipe)
    if problems:
        raise UserError("\n".join(problems))
    return Finished(note, weights, optimizer, described)


@torch.no_grad()
def fill(room: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names; into sharded ones, each rank its part."""
    for name, tensor in room.items():
        if hasattr(tensor, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor  # takes a second to load

            part = distribute_tensor(
                whole[name].to(tensor.device),
                tensor.device_mesh,
                tensor.placements,  # type: ignore[attr-defined]
                src_data_rank=None,
            )
            tensor.copy_(part)
        else:
            tensor.copy_(whole[name])
