"""Times our layers against torch.nn's, side by side: forward without gradients, and training
(forward and backward).

The layers take turns, and medians are compared, so that what else the machine does falls on all of
them alike. Prints a table, and writes a JSON file, after every case, and a plot. The JSON has the
device, the versions and the commit, and of every case and layer the seconds a call, the first
call's, the bytes at the peak and the errors against float64."""

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # it runs from a checkout, too
import peers
import suites
from measure import measure
from report import KINDS, Row, ratio
from suites import Case

from rnn.kernels.cpu import native
from rnn.kernels.plan import Plan

RESULTS = Path(__file__).parent / "results"


def environment(device: str) -> dict[str, Any]:
    """The device, the versions, the commit and the time."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True
            )
        except OSError:
            return ""
        return done.stdout.strip()

    versions: dict[str, Any] = dict(
        python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__
    )
    if device == "cuda":
        name = torch.cuda.get_device_name()
        versions |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
        for module in ("triton", "cupy"):
            try:
                versions[module] = importlib.import_module(module).__version__
            except ImportError:
                versions[module] = None
    else:
        models = (
            [
                line.partition(": ")[2].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ]
            if Path("/proc/cpuinfo").exists()
            else []
        )
        command = native.compiler()
        threads = torch.get_num_threads()
        if command:
            done = subprocess.run([*command, "-dumpversion"], capture_output=True, text=True)
            versions["c++"] = done.stdout.strip()
        name = (
            f"{models[0] if models else platform.processor()}, {threads} "
            f"thread{'s' * (threads > 1)}"
        )
    return dict(
        device=name,
        kind=device,
        versions=versions,
        commit=git("rev-parse", "--short", "HEAD"),
        modified=bool(git("status", "--porcelain", "-uno")),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def summary(rows: list[Row]) -> list[str]:
    """The geometric mean of the ratios, the least, and whose it is; as calls and as CUDA graphs."""
    lines = []
    for figure, kind in ((figure, kind) for kind in ("", " graph") for figure in KINDS):
        ratios = [(value, label(row)) for row in rows if (value := ratio(row, figure, kind))]
        if ratios:
            mean = statistics.geometric_mean([value for value, _ in ratios])
            (least, whose) = min(ratios)
            lines.append(
                f"{figure}{kind}: torch.nn's time by ours has the geometric mean {mean:.2f}; the "
                "least is "
                f"{least:.2f} ({whose})"
            )
    return lines


def label(row: Row) -> str:
    case = Case(*(row[name] for name in Case._fields))
    sizes = f"{case.B:4} {case.T:5} {case.H:4} {case.inputs:4}"
    return f"{case.cell:4} {sizes} {case.dtype:8} {case.options}".rstrip()


HEADER = f"{'cell':4} {'B':>4} {'T':>5} {'H':>4} {'I':>4} {'dtype':8} options"


def lines(row: Row) -> str:
    """The case, and a line of figures for each layer."""
    lines = [label(row)]
    for name in dict.fromkeys((*row[KINDS[0]], *row["failed"])):
        if name in row["failed"]:
            lines.append(f"    {name:16} n/a: {row['failed'][name]}")
        if name not in row[KINDS[0]]:
            continue
        text = f"    {name:16}"
        for kind, factor in zip(KINDS, (1, 3)):
            seconds = row.get(kind, {}).get(name)
            if seconds:
                text += (
                    f" {kind} {1e6 * seconds / row['T']:10.3f} us/step"
                    f"{factor * row['flop'] / seconds / 1e12:9.3g} TFLOP/s"
                )
                text += (
                    f"{row[kind]['torch.nn'] / seconds:6.2f}x " if row[kind].get("torch.nn") else ""
                )
        if name in row["first"]:
            memory = row["memory"][name]
            text += f" first {row['first'][name]:.2f} s, " + (
                "" if memory is None else f"{memory / 2**20:.1f} MiB, "
            )
            errors = [row[k][name] for k in ("error", "gradient_error") if name in row[k]]
            text += f"error {' '.join(f'{error:.0e}' for error in errors)}"
        lines.append(text)
    return "\n".join(lines)


def plot(path: Path, results: dict[str, Any]) -> None:
    """The ratios as bars; of the suite `growth` also times and memory against T and against B, as
    lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    growth = results["suite"] == "growth"
    figure = pyplot.figure(figsize=(10, 1.5 + 0.3 * len(rows) + 8 * growth), layout="constrained")
    parts: Any = figure.subfigures(1 + growth, 1, squeeze=False).flat
    bars, *more = parts
    axes = bars.subplots()
    for offset, kind in ((-0.2, "forward"), (0.2, "training")):
        axes.barh(
            [p + offset for p in range(len(rows))],
            [ratio(row, kind) or 0 for row in rows],
            height=0.4,
            label=kind,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], family="monospace", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="torch.nn's time / ours", title=f"{results['device']}, {results['commit']}")
    axes.legend()
    for part in more:
        for (times, memory), size, other in zip(part.subplots(2, 2).T, "TB", "BT"):
            groups: dict[Any, list[Row]] = {}
            for row in rows:
                groups.setdefault((row["cell"], row[other]), []).append(row)
            for (cell, fixed), group in (
                (k, sorted(v, key=lambda row: row[size])) for k, v in groups.items()
            ):
                for name, line in (("rnn", "-"), ("torch.nn", ":")) if len(group) > 2 else ():
                    style: Any = dict(
                        label=f"{name} {cell}, {other} {fixed}", marker=".", linestyle=line
                    )
                    shown = [row for row in group if row["memory"].get(name)]
                    sizes = [row[size] for row in shown]
                    times.loglog(
                        sizes, [1e6 * row["training"][name] / row["T"] for row in shown], **style
                    )
                    memory.loglog(sizes, [row["memory"][name] / 2**20 for row in shown], **style)
            times.set(xlabel=size, ylabel="training, us/step")
            memory.set(xlabel=size, ylabel="training, MiB at the peak")
            times.legend(fontsize=6)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def chosen(cases: list[Case], change: dict[str, Any]) -> list[Case]:
    """The suite's cases that are of this cell or dtype; if there are none, all of them made so."""
    made = [case._replace(**change) for case in cases]
    return [case for case, other in zip(cases, made) if case == other] or list(dict.fromkeys(made))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    option(
        "--suite",
        default="core",
        help="; ".join(f"{d}: {', '.join(s)}" for d, s in suites.SUITES.items()),
    )
    option(
        "--cell",
        choices=tuple(suites.GATES),
        help="the suite's cases of this cell, or all of them made so",
    )
    option(
        "--dtype",
        choices=suites.DTYPES,
        help="likewise; tf32 is float32 whose products may be in TF32, default what torch does",
    )
    option(
        "--seconds", type=float, default=0.5, help="to spend on each figure (default: %(default)s)"
    )
    option(
        "--minutes",
        type=float,
        default=4.5,
        help="after which no case is begun (default: %(default)s)",
    )
    option(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help=f"also {', '.join(peers.NAMED)}, or MODULE:CLASS with torch.nn's constructor",
    )
    option(
        "--plan",
        type=json.loads,
        metavar="JSON",
        help="of ours, in place of what it would choose: the fields of "
        """rnn.kernels.plan.Plan, as '{"backend": "triton", "scope": "block"...}'""",
    )
    option("--baseline", action="store_true", help="time torch.nn alone")
    option(
        "--cold",
        action="store_true",
        help="use no kernels that earlier runs compiled, for first calls that are",
    )
    option(
        "--out",
        type=Path,
        default=RESULTS,
        help="folder of the JSON file and the plot (default: bench/results)",
    )
    options = parser.parse_args(arguments)
    if options.suite not in suites.SUITES[options.device]:
        parser.error(f"there is no suite {options.suite} for {options.device}: see --help")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    return options


def run(options: argparse.Namespace, path: Path, results: dict[str, Any]) -> None:
    """Measures case after case into `results`, and writes them after each."""
    end = time.monotonic() + 60 * options.minutes
    names = (
        ["torch.nn"] if options.baseline else ["rnn", "torch.nn", *peers.installed(options.device)]
    )
    builders = {name: peers.find(name) for name in dict.fromkeys((*names, *options.peer))}
    if options.plan:
        builders["rnn"] = peers.planned(Plan(**options.plan))
    cases = suites.SUITES[options.device][options.suite]
    for name in ("cell", "dtype"):
        cases = chosen(cases, {name: getattr(options, name)}) if getattr(options, name) else cases
    # The context and the libraries' own beginnings are nobody's first call
    if options.device == "cuda":
        square = torch.randn(64, 64, device="cuda")
        (square @ square).sum().item()
    for case in cases:
        row = dict(case._asdict(), I=case.inputs)
        if time.monotonic() > end:
            results["left_out"].append(row)
        else:
            try:
                row = measure(case, builders, options.seconds, options.device)
                results["rows"].append(row)
                print(lines(row), flush=True)
            except Exception as error:  # the other cases still have their figures
                row["failed"] = {"all": f"{type(error).__name__}: {error}"}
                results["failed"].append(row)
                print(f"{label(row)}\n    n/a: {row['failed']['all']}", flush=True)
        path.with_suffix(".tmp").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.cold:
        for name in ("TRITON_CACHE_DIR", "CUPY_CACHE_DIR"):
            os.environ[name] = tempfile.mkdtemp()
    choices = {
        name: getattr(options, name)
        for name in ("suite", "cell", "dtype", "plan", "baseline", "cold", "seconds")
    }
    results = environment(options.device) | choices | dict(failed=[], left_out=[], rows=[])
    options.out.mkdir(parents=True, exist_ok=True)
    suite = f"{options.suite}-baseline" if options.baseline else options.suite
    forced = options.plan and "-".join(map(str, options.plan.values()))
    name = "-".join(
        filter(
            None, (options.device, suite, options.cell, options.dtype, forced, results["commit"])
        )
    )
    path = options.out / f"{name}.json"
    print(
        f"{results['device']}; "
        f"{', '.join(f'{k} {v}' for k, v in results['versions'].items())}\n{HEADER}"
    )
    run(options, path, results)
    print("\n".join(summary(results["rows"])))
    if results["left_out"]:
        print(
            f"{len(results['left_out'])} cases left out: the {options.minutes:g} minutes were over"
        )
    print(path)
    try:
        plot(path.with_suffix(".png"), results)
        print(path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is missing")
    return int(bool(results["failed"]) or any("rnn" in row["failed"] for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
