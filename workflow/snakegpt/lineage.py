"""What a training comes from: whether it may go on from a finished run, or start from some weights.

The settings ask here before anything runs, between experiments; the stages once files are there. No
import of the settings at run time: they import this.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from snakegpt.errors import nearest

if TYPE_CHECKING:
    from snakegpt.settings import Model, Settings, Training


def lineage_conflicts(settings: Settings, name: str) -> list[str]:
    """What is wrong with what an experiment continues or starts from."""
    experiment = settings.experiments[name]
    training, where = experiment.training, f"experiments.{name}.training"
    if training.continue_from and training.start_from:
        return [
            f"{where} has both continue_from = '{training.continue_from}' and start_from ="
            f" '{training.start_from}': the one goes on with the optimiser of a finished run, the other"
            " starts anew from weights.\n  set one of them to null"
        ]
    field = "continue_from" if training.continue_from else "start_from"
    source: str | None = getattr(training, field)
    if source is None:
        return []
    where = f"{where}.{field}"
    if field == "start_from" and source in settings.weights:
        return []
    if source not in settings.experiments:
        known = [*settings.experiments, *(settings.weights if field == "start_from" else ())]
        return [f"{where} = '{source}' is not defined.{nearest(source, known)}"]
    passed, ahead = [name], source
    while ahead in settings.experiments:
        if ahead in passed:
            return [f"{where}: {' -> '.join([*passed, ahead])} comes back to itself."]
        passed.append(ahead)
        before = settings.experiments[ahead].training
        ahead = before.continue_from or before.start_from or ""
    if field == "start_from":
        return []
    start = settings.experiments[source]
    problems = continuation_problems(start.training, training)
    problems += _other_tokenizer(settings, start.tokenizer, experiment.tokenizer)
    problems += _other_model(start.model, experiment.model)
    return [f"{where} = '{source}': {problem}" for problem in problems]


def start_conflicts(settings: Settings, name: str) -> list[str]:
    """Why an experiment cannot start from what it names, as far as the settings tell.

    Asked for when its weights are, not when the settings are read: who changes the model of one
    experiment need not care for those that start from it.
    """
    experiment = settings.experiments[name]
    source = experiment.training.start_from
    if source is None:
        return []
    problems = []
    if source in settings.weights:
        tokenizer = settings.weights[source].tokenizer
    else:
        start = settings.experiments[source]
        tokenizer, problems = start.tokenizer, start_problems(start.model, experiment.model)
    problems += _other_tokenizer(settings, tokenizer, experiment.tokenizer)
    where = f"experiments.{name}.training.start_from = '{source}'"
    return [f"{where}: {problem}" for problem in problems]


def _other_tokenizer(settings: Settings, theirs: str, ours: str) -> list[str]:
    """A complaint if two names are not one tokenizer; they are where their settings are the same."""
    found, wanted = (settings.tokenizers.get(name) for name in (theirs, ours))
    if found is None or wanted is None or found == wanted:
        return []
    return [f"its tokenizer is {theirs}, this one's {ours}: use the same."]


def _other_model(found: Model, wanted: Model) -> list[str]:
    """A complaint if two models differ in more than dropout."""
    before, now = (model.model_dump(exclude={"dropout", "preset"}) for model in (found, wanted))
    differ = ", ".join(key for key, value in before.items() if value != now[key])
    return [f"its model is another one: {differ} differ."] if differ else []


def continuation_problems(done: Training, wanted: Training) -> list[str]:
    """Why a run may not go on from a finished one; none if it may.

    It may where it would have made the same steps up to there, had it started anew: with learning rates
    that fall as they fell, or that had not begun to fall.
    """
    problems = []
    if wanted.steps <= done.steps:
        problems.append(
            f"training.steps = {wanted.steps:,}, but the run to continue from has made"
            f" {done.steps:,} already: ask for more."
        )
    rises = ("optimizer", "learning_rate", "muon_learning_rate", "warmup_steps")
    falls = ("schedule", "min_learning_rate", "decay_end")
    differ = [name for name in rises if getattr(done, name) != getattr(wanted, name)]
    if done.steps > min(done.decay_begin, wanted.decay_begin):
        differ += [name for name in falls if getattr(done, name) != getattr(wanted, name)]
        differ += ["cooldown_fraction"] * (done.decay_begin != wanted.decay_begin)
    if differ:
        names = [name.replace("decay_end", "decay_steps") for name in dict.fromkeys(differ)]
        problems.append(
            f"the run to continue from has had other learning rates in its {done.steps:,} steps:"
            f" training.{', training.'.join(names)} differ"
            f" (decay from {done.decay_begin:,} to {done.decay_end:,}; here from"
            f" {wanted.decay_begin:,} to {wanted.decay_end:,}).\n"
            "  give both the same; or train with schedule = warmup_stable_decay and a decay_steps far"
            " enough for it to begin after training.steps"
        )
    return problems


def start_problems(found: Model, wanted: Model) -> list[str]:
    """In what the model of some weights is not the one to be trained; none if it can start from them.

    Dropout is free, and so is the padding of the vocabulary. Of gpt2's positions the first ones may be
    kept; those of modern are no weights.
    """
    names = ["architecture", "layers", "heads", "channels"]
    if found.architecture == wanted.architecture:
        names += {"gpt2": ["bias"], "modern": ["tie_embeddings", "logit_softcap"]}[
            found.architecture
        ]
    problems = [
        f"model.{name} is {json.dumps(here)}, the weights have {json.dumps(theirs)}: set it to that"
        for name in names
        if (here := _resolved(wanted, name)) != (theirs := _resolved(found, name))
    ]
    if found.architecture == wanted.architecture == "gpt2" and wanted.context > found.context:
        problems.append(
            f"model.context is {wanted.context:,}, and the weights have {found.context:,} positions:"
            " set it to that or less"
        )
    return problems


def _resolved(model: Model, name: str) -> Any:
    """A value as the network has it: null is true for these switches."""
    value = getattr(model, name)
    return value is not False if name in ("bias", "tie_embeddings") else value
