"""Bring the files of a corpus here and check every one against the sha256 in the lock.

Reads: the files' source. Writes: corpus.json (path, sha256 and bytes of each file, in lock order) and
the raw files below files/. A corpus that is not locked yet is locked first, and then this stops: what
was found is to be looked at and committed. The state folder keeps finished files and the beginnings of
others, so that a killed fetch asks for the rest alone. By hand:

    python -m snakegpt.stages.fetch_corpus --out /tmp/corpus \\
        --settings '{"files": [{"path": "a.txt", "sha256": "...", "bytes": 3}]}' \\
        --execution '{"corpus": "mine", "source": {"kind": "local", "paths": ["texts/*.txt"]}}'
"""

from __future__ import annotations

from snakegpt.command import stage_parser
from snakegpt.errors import reports_errors
from snakegpt.settings import Source
from snakegpt.sources.fetching import fetch_as_locked

REVISION = 1
SCIENCE = ()  # the lock decides the bytes


@reports_errors
def main(argv: list[str] | None = None) -> None:
    args = stage_parser(__doc__, state=True).parse_args(argv)
    fetch_as_locked(args, "corpus", Source)


if __name__ == "__main__":
    main()
