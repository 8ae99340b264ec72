"""Runs a small case list, every cell in every kind of plan, under NVIDIA's compute-sanitizer.

python -m tests.kernels.gpu.sanitize [tool ...]
    with memcheck, racecheck, synccheck and initcheck, or those named
python -m tests.kernels.gpu.sanitize cases [every]
    the cases alone, or one in so many; without a GPU in Triton's interpreter

Exits with 0 if nothing was found, with 1 if a tool or a case found something, with 2 if that cannot
be said: there is no compute-sanitizer, no CUDA device, or the tool does not work with it.
(racecheck sees shared memory alone: what programs pass on through global memory is for the tests,
which repeat it bit by bit.)"""

import itertools
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.cases import NAMES, check_recurrence, thrice
from tests.conftest import GPU
from tests.kernels.gpu.test_gpu import DEVICE, FORMS, SCOPES, plan_for

MODULE = "tests.kernels.gpu.sanitize"
TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]
# On a GPU more steps than a graph has, and tiles that are not full in every direction of the grid.
SIZES = (17, 9, 5, 18) if GPU else (2, 2, 2, 3)
DONE = "All cases are right."


def cases(every: int = 1) -> int:
    """Forward and backward, both directions, and right. Returns how many there were."""
    chosen = [*itertools.product(NAMES, SCOPES, (FORMS[0], *FORMS[2:]))][::every]
    for name, scope, (form, resets) in chosen:
        print(name, scope, form, *["resets"] * resets, flush=True)
        compare: Any = partial(
            check_recurrence, name, plan_for(scope, SIZES[3]), SIZES, (False, True), form, resets
        )
        thrice(partial(compare, True, torch.float32, DEVICE))
    print(DONE, flush=True)
    return len(chosen)


def run(command: list[str], what: str) -> int:
    """What the command, the cases under some tool, says of them: on the screen, and as an exit
    status."""
    print(f"== {what}", flush=True)
    # Memory as CUDA gives it, so that what lies past the end of a tensor is no other's.
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    done = subprocess.run(
        command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    status = (
        2
        if "Device not supported" in done.stdout
        else int(done.returncode != 0 or DONE not in done.stdout)
    )
    print(*done.stdout.splitlines()[-60 if status else -1 :], sep="\n")
    print(f"== {what}: {['nothing found', 'FAILED', 'does not work here'][status]}", flush=True)
    return status


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["cases"]:
        return 0 if cases(*map(int, arguments[1:])) else 1
    sanitizer = shutil.which("compute-sanitizer")
    tools = arguments or TOOLS
    for trouble, text in (
        (not {*tools} <= {*TOOLS}, f"The tools are {', '.join(TOOLS)}."),
        (not GPU, f"There is no CUDA device. (Without one: `python -m {MODULE} cases`.)"),
        (sanitizer is None, "There is no compute-sanitizer on the PATH; the CUDA toolkit has it."),
    ):
        if trouble:
            print(text)
            return 2
    script = [sys.executable, "-m", MODULE, "cases"]
    # First without: what is wrong then is no matter for a sanitizer; and the kernels are compiled
    # from here on.
    if run(script, "the cases alone"):
        return 1
    command = [str(sanitizer), "--target-processes", "all", "--error-exitcode", "1", "--tool"]
    results = [run([*command, tool, *script], tool) for tool in tools]
    return 1 if 1 in results else max(results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
