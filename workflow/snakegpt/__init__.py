"""From text to a trained, evaluated and reported GPT, as content-addressed stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import pandas

    from snakegpt.notebook import Results

__all__ = ["results"]


@overload
def results(experiment: None = None, *, project: str | Path = ".") -> pandas.DataFrame: ...


@overload
def results(experiment: str, *, project: str | Path = ".") -> Results: ...


def results(
    experiment: str | None = None, *, project: str | Path = "."
) -> Results | pandas.DataFrame:
    """What an experiment left; without a name, a pandas frame of all experiments that left something.

    project  the folder that holds results/
    raises   UserError that names what is missing and the command that makes it
    """
    from snakegpt import notebook

    folder = Path(project)
    return notebook.overview(folder) if experiment is None else notebook.one(experiment, folder)
