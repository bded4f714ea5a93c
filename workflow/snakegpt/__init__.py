"""From text to a trained, evaluated and reported GPT, as content-addressed stages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import pandas

    from snakegpt.notebook import Results

__all__ = ["results"]

# At the end of every operation torch's threads (libgomp's) wait for each other and spin for milliseconds
# before they sleep. Where another program has one of the cores, all that time is lost: a step of 24 ms
# took 755, and with this limit (some 0.1 ms) 150. On quiet cores nothing is slower. Before torch loads.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")


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
