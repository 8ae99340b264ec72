"""Compiles the CPU's libraries ahead, into a folder, for machines without a compiler."""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..kernels.cpu import build as compilers
from ..kernels.cpu import native, shipping, targets
from . import arguments, machine

CPU_DTYPES = ("float32", "float64")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--march",
        default="native",
        help="CPUs to compile for, as the compiler has them: x86-64-v3 ... (%(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=shipping.IN_PACKAGE,
        help="folder (inside the installed package: %(default)s)",
    )
    parser.add_argument(
        "--cell", nargs="+", choices=arguments.CELLS, default=arguments.CELLS, help="(all)"
    )
    parser.add_argument("--dtype", nargs="+", choices=CPU_DTYPES, default=CPU_DTYPES, help="(both)")


def run(given: argparse.Namespace) -> int:
    """Fails before it compiles anything if the compiler does not know `--march`."""
    command = compilers.required_compiler()
    target = targets.target_of_macros(compilers.macros(command, given.march))
    print(f"{machine.compiler_version()}, -march={given.march}: {target.machine} with", end=" ")
    print(", ".join(target.features) or "nothing beyond the least", flush=True)
    begin = time.monotonic()

    def compile_one(pair: tuple[str, str]) -> tuple[str, str, Path]:
        name, dtype = pair
        number = getattr(torch, dtype)
        path = native.prebuild(machine.BUILT_IN[name], number, given.march, given.output)
        return name, dtype, path

    pairs = [(name, dtype) for name in given.cell for dtype in given.dtype]
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        made = []
        for name, dtype, path in workers.map(compile_one, pairs):
            made.append(path)
            size = machine.size(path.stat().st_size)
            print(f"{name:9}{dtype:9}{path.name}, {size}", flush=True)
    seconds = time.monotonic() - begin
    print(f"{machine.count(made, 'library')} in {seconds:.0f} s: {given.output.resolve()}")
    places = [shipping.IN_PACKAGE, *filter(None, [shipping.in_cache()])]
    if given.output.resolve() not in [place.resolve() for place in places]:
        print("A machine without a compiler finds them where this folder is copied to, as either")
        for place in places:
            print(f"  {place}")
    return 0
