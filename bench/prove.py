"""Everything that a machine with a GPU has to show, in one command that installs and fetches
nothing.

In this order: versions, the constants of the machine, torch.nn's own times, every test of the GPU
(tests/on_gpu.py), our times by suite, and the sanitizer. Each step is a process of its own, and its
log and JSON are there at once: what ends it early costs only what comes later. `--device cpu
--suite smoke` is the rehearsal."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SUITES = (
    "core",
    "defaults",
    "must-not-lose",
    "cliffs",
    "cells",
    "edges",
    "short",
    "long",
    "dtypes",
    "large",
    "growth",
)
TOLD = "prove-tests.jsonl"  # what became of each test
SPARE = 0.5  # minutes: what a benchmark takes beyond the time after which it begins no further case

# of tests: of each a context of CUDA, and the memory that torch keeps there
MOST_PROCESSES = 8


def processes() -> int:
    """How many share the GPU: they compile most of the time, each on one core."""
    return max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // 2))


class Step(NamedTuple):
    name: str
    minutes: float
    command: list[str]
    missing: str = ""  # why it cannot be done


def plan(device: str, suites: list[str], out: Path) -> list[Step]:
    def python(*arguments: object) -> list[str]:
        return [sys.executable, "-u", *map(str, arguments)]

    def bench(suite: str, *options: object) -> list[str]:
        return python("bench/run.py", "--device", device, "--suite", suite, "--out", out, *options)

    print_versions = (
        f"import sys; sys.path.insert(0, 'bench'); import run; print(run.environment({device!r}))"
    )
    tests = python("-m", "pytest", "-q", "-p", "tests.on_gpu", "--told", out / TOLD)
    if device == "cpu":
        tests.append("--collect-only")
    elif find_spec("xdist"):
        # a test takes as long as its kernels are compiled, 1 to 3 s, and there are 1,500
        tests += ["--numprocesses", str(processes())]
    constants = ["--out", out] if device == "cuda" else ["--compile", "sm_90"]
    no = {name: "" if find_spec(name) else f"there is no {name}" for name in ("cupy", "pytest")}
    no |= {
        name: "" if shutil.which(name) else f"there is no {name}"
        for name in ("nvidia-smi", "compute-sanitizer")
    }
    return [
        Step("versions", 2, python("-c", print_versions)),
        Step("driver", 1, ["nvidia-smi"], no["nvidia-smi"]),
        Step("microbench", 2, python("bench/microbench.py", *constants), no["cupy"]),
        Step("baseline", 4, bench(suites[0], "--baseline", "--seconds", 0.2)),
        Step("tests", 25, tests, no["pytest"]),
        *(Step(suite, 6, bench(suite)) for suite in suites),
        Step("sanitize", 10, python("-m", "tests.kernels.gpu.sanitize"), no["compute-sanitizer"]),
    ]


def tested(told: Path) -> dict[str, Any]:
    """From what tests/on_gpu.py wrote: how many tests were chosen and passed, and which failed,
    were skipped (and why), or had no turn."""
    chosen: list[str] = []
    outcomes: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for line in told.read_text().splitlines():
        entry = json.loads(line)
        chosen = entry.get("chosen", chosen)
        skipped |= entry.get("marked", {})
        if "test" in entry:
            worse = outcomes.get(entry["test"]) == "failed"
            outcomes[entry["test"]] = "failed" if worse else entry["outcome"]
            if entry["outcome"] == "skipped":
                skipped[entry["test"]] = entry["why"]
    return dict(
        chosen=len(chosen),
        passed=sum(outcome == "passed" for outcome in outcomes.values()),
        failed=[test for test, outcome in outcomes.items() if outcome == "failed"],
        skipped=skipped,
        left_out=[test for test in chosen if test not in outcomes and test not in skipped],
    )


def summary(tests: dict[str, Any]) -> str:
    parts = [f"{len(tests[key])} {key.replace('_', ' ')}" for key in list(tests)[2:]]
    return f"of {tests['chosen']} tests {tests['passed']} passed, {', '.join(parts)}"


def do(step: Step, minutes: float, log: Path) -> tuple[int | None, str]:
    """The exit status, and what to say of it; what the step prints goes to the log."""
    command = step.command
    if "--suite" in command:
        command = [*command, "--minutes", f"{max(0.1, minutes - SPARE):.2f}"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None, f"ended after {minutes:.1f} minutes"
    return code, "done" if code == 0 else f"failed with status {code}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--device", choices=("cpu", "cuda"), default="cuda")
    option("--suite", action="append", help=f"instead of all: {', '.join(SUITES)}")
    option("--only", nargs="+", metavar="STEP", help="only these steps")
    option(
        "--minutes", type=float, default=90, help="for all steps together (default: %(default)g)"
    )
    option(
        "--out",
        type=Path,
        default=ROOT / "bench/results",
        help="folder of logs and JSON files (bench/results)",
    )
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not options.only or "tests" in options.only:
        (out / TOLD).unlink(missing_ok=True)
    steps = plan(options.device, options.suite or list(SUITES), out)
    if unknown := {*(options.only or ())} - {step.name for step in steps}:
        parser.error(
            f"there is no step {', '.join(sorted(unknown))}: "
            f"{', '.join(step.name for step in steps)}"
        )
    end = time.monotonic() + 60 * options.minutes
    outcomes = list[dict[str, Any]]()
    for step in steps:
        if options.only and step.name not in options.only:
            continue
        start = time.monotonic()
        log = out / f"prove-{step.name}.log"
        left = (end - start) / 60
        code = None
        outcome = step.missing
        if not outcome:
            code, outcome = (
                do(step, min(step.minutes, left), log) if left > 0.2 else (None, "no time left")
            )
        seconds = time.monotonic() - start
        outcomes.append(
            dict(
                step=step.name,
                status=code,
                outcome=outcome,
                seconds=round(seconds, 1),
                command=step.command,
            )
        )
        if step.name == "tests" and (out / TOLD).exists() and not step.missing:
            outcomes[-1]["tests"] = tested(out / TOLD)
            outcome += f"; {summary(outcomes[-1]['tests'])}"
        (out / "prove.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        tail = (
            log.read_text(errors="replace").splitlines()[-12:]
            if log.exists() and not step.missing
            else []
        )
        print(
            "\n".join(
                [f"{step.name}: {outcome}, {seconds:.0f} s", *(f"    {line}" for line in tail)]
            ),
            flush=True,
        )
    return int(any(entry["status"] for entry in outcomes))


if __name__ == "__main__":
    sys.exit(main())
