"""Says where compiled programs are kept, how many, how large; or deletes them. Those of `build`
stay."""

import argparse
import sys

from . import machine


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="delete them")


def run(given: argparse.Namespace) -> int:
    failed = False
    for cache in machine.caches():
        if cache.folder is None:
            print(f"{cache.name}: this user has no home, so that nothing is kept")
            continue
        programs = cache.programs()
        size = sum(path.stat().st_size for path in programs)
        print(f"{cache.name}: {cache.folder}, {machine.count(programs)}, {machine.size(size)}")
        if not given.clear:
            continue
        deleted = []
        for path in programs:
            try:
                path.unlink(missing_ok=True)
                deleted.append(path)
            except OSError as error:
                failed = True
                print(f"cannot delete {path}: {error.strerror}", file=sys.stderr)
        print(f"{cache.name}: deleted {machine.count(deleted)}")
    return int(failed)
