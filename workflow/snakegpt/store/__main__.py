"""Questions about the store.

python -m snakegpt.store why results/models/gpt2/weights.safetensors
python -m snakegpt.store why train_gpt2 --config scale=full
"""

from __future__ import annotations

import argparse

from snakegpt.errors import reports_errors
from snakegpt.store import explain, gc, pins, verify

# Each adds its subparser, whose `run` is called with the arguments.
COMMANDS = (
    explain,
    verify,
    gc,
    pins,
)


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
