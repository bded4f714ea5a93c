"""Questions about the store, and ways in and out of it.

python -m snakegpt.store why results/models/gpt2/weights.safetensors
python -m snakegpt.store why train_gpt2 --config scale=full
python -m snakegpt.store pull train_gpt2
python -m snakegpt.store export train_gpt2 gpt2.tar --without fetch_corpus,encode_tokens
python -m snakegpt.store import gpt2.tar
"""

from __future__ import annotations

import argparse

from snakegpt.errors import reports_errors
from snakegpt.store import adopt, archive, diff, gc, pins, sharing, show, verify, why

# Each adds its subparser, whose `run` is called with the arguments.
COMMANDS = (why, show, diff, adopt, verify, gc, pins, sharing, archive)


@reports_errors
def main(argv: list[str] | None = None) -> None:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m snakegpt.store",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
