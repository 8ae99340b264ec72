"""The command line, `python -m rnn` or `fused-rnn`: a module for each command, with `add`, which
declares its arguments, and `run`, which returns the exit status."""

import os
import sys
from collections.abc import Sequence

from . import bench, build, cache, doctor, explain, info
from .arguments import Parser

COMMANDS = info, doctor, bench, explain, build, cache


def main(arguments: Sequence[str] | None = None, prog: str = "fused-rnn") -> int:
    """Run a command: 0 if all is well, 1 if something is broken or fails. Wrong arguments end the
    process with status 2."""
    parser = Parser(prog=prog, description="Looks after fused-rnn on this machine.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        words = command.__doc__ or ""
        one = commands.add_parser(
            name,
            help=words.partition(". ")[0].strip().rstrip("."),
            description=words,
        )
        command.add(one)
        one.set_defaults(run=command.run)
    given = parser.parse_args(arguments)
    try:
        status: int = given.run(given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever reads it has enough; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (OSError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        print(f"{prog} {given.command}: {type(error).__name__}: {first}", file=sys.stderr)
        return 1
