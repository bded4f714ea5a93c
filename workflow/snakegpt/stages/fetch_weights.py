"""Bring pretrained weights here and check every file against the sha256 in the lock.

Reads: the files' source. Writes: weights.json (path, sha256 and bytes of each file) and the files below
files/: a config.json and safetensors. Weights that are not locked yet are locked first, and then this
stops: what was found is to be looked at and committed. Resumes as fetch_corpus does. By hand:

    python -m snakegpt.stages.fetch_weights --out /tmp/weights \\
        --settings '{"files": [{"path": "model.safetensors", "sha256": "...", "bytes": 3}, ...]}' \\
        --execution '{"weights": "mine", "source": {"kind": "local", "paths": ["mine/*"]}}'
"""

from __future__ import annotations

from snakegpt.command import stage_parser
from snakegpt.errors import reports_errors
from snakegpt.settings import WeightsSource
from snakegpt.sources.fetching import fetch_as_locked

REVISION = 1
SCIENCE = ()  # the lock decides the bytes


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = stage_parser(__doc__, state=True).parse_args(argv)
    fetch_as_locked(args, "weights", WeightsSource)


if __name__ == "__main__":
    main()
