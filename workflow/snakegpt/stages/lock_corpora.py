"""Write into corpora.lock.json which bytes corpora and weights are made of: path, sha256, size of each file.

    python -m snakegpt.stages.lock_corpora                  what the default experiments use and lacks a lock
    python -m snakegpt.stages.lock_corpora shakespeare      these
    python -m snakegpt.stages.lock_corpora --update mine    take the source as it is now

NAME is a corpus or pretrained weights. One whose source gives other bytes than were locked is an error
that shows both, unless --update. A hub repository without a revision stays at the commit it was locked
at; --update takes the newest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from snakegpt import locks
from snakegpt.errors import UserError, reports_errors
from snakegpt.progress import quantity, say
from snakegpt.settings import Settings, load_files
from snakegpt.sources.fetching import TABLES, Noun, lock_files

REVISION = 1
SCIENCE = ()


def in_use(settings: Settings) -> list[str]:
    """The corpora that the default experiments read, also through their tokenizers, and their weights."""
    names: list[str | None] = []
    asked = list(settings.default_experiments)
    for experiment in (settings.experiments[name] for name in asked):
        names.append(getattr(settings.tokenizers[experiment.tokenizer], "corpus", None))
        for corpus in settings.shares(experiment.corpus):
            names.append(corpus)
            screened = settings.corpus(corpus).decontaminate
            names += screened.against if screened else []
        before = experiment.training.continue_from or experiment.training.start_from
        names.append(before if before in settings.weights else None)
        if before in settings.experiments and before not in asked:
            asked.append(before)
    return list(dict.fromkeys(name for name in names if name))


def lock_corpora(settings: Settings, lock_file: Path, names: list[str], *, update: bool) -> None:
    """Lock the named corpora and weights, each as soon as it is known; one that fails holds up no other.

    raises   UserError if sources cannot be reached, or give other bytes than were locked
    """
    failures = []
    for name in names:
        try:
            _lock(settings, lock_file, name, update=update)
        except UserError as error:
            failures.append(str(error))
    if failures:
        raise UserError("\n".join(failures))


def _lock(settings: Settings, lock_file: Path, name: str, *, update: bool) -> None:
    source: Any = settings.pinned(name).source
    noun: Noun = "weights" if name in settings.weights else "corpus"
    old = locks.read(lock_file).get(name)
    same_source = old is not None and locks.is_current(old, source.model_dump(mode="json"))
    if old and not same_source:
        say(f"{name}  its source has changed: {locks.changes(old, source.model_dump(mode='json'))}")
    new = lock_files(
        noun,
        name,
        source,
        workers=settings.execution.download_workers,
        label=f"lock_corpora {name}",
        interval_s=settings.execution.log_interval_s,
        rate=settings.execution.download_rate,
        before=None if update else old,
    )
    drift = locks.drift(old, new) if old and same_source else []
    if drift and not update:
        raise UserError(
            f"{noun} {name}: the source has other bytes than were locked:\n  "
            + "\n  ".join(drift)
            + "\n"
            f"  if that is meant: {locks.update_command(name)}"
        )
    locks.put(lock_file, {name: new}, TABLES[noun])
    say(
        f"{name}  {'unchanged' if old and same_source and not drift else 'locked'}:"
        f" {len(new.files):,} files, {quantity(new.n_bytes, 'B')}"
    )


@reports_errors
def main(argv: list[str] | None = None) -> None:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="corpora or weights of the settings"
    )
    parser.add_argument("--configfile", nargs="+", default=["config.yaml"], metavar="FILE")
    parser.add_argument("--lock", type=Path, default=Path("corpora.lock.json"), metavar="FILE")
    parser.add_argument("--scale", help="laptop or full; default: what the settings say")
    parser.add_argument(
        "--all", action="store_true", help="all corpora and weights of the settings"
    )
    parser.add_argument("--update", action="store_true", help="accept what has changed")
    args = parser.parse_args(argv)
    settings = load_files(args.configfile, {"scale": args.scale} if args.scale else None)
    names = args.names or ([*settings.corpora, *settings.weights] if args.all else in_use(settings))
    if not (args.names or args.all or args.update):
        known = locks.read(args.lock)
        current = [
            name
            for name in names
            if name in known
            and locks.is_current(known[name], settings.pinned(name).source.model_dump(mode="json"))
        ]
        for name in current:
            say(f"{name}  is locked: {len(known[name].files):,} files")
        everything = (*settings.corpora, *settings.weights)
        left = [name for name in everything if name not in names and name not in known]
        if left:
            say(
                f"{', '.join(left)}  not locked, since no default experiment reads it:"
                " name it, or say --all"
            )
        names = [name for name in names if name not in current]
    lock_corpora(settings, args.lock, names, update=args.update)


if __name__ == "__main__":
    main()
