"""Times `rnn.RNN` against `torch.nn.RNN`, side by side: forward without gradients, and training (forward and backward).

The layers take turns, and medians are compared, so that what else the machine does falls on all of them alike. float32
runs in the same mode everywhere: on a GPU in TF32 or not, as torch.backends.cudnn.rnn.fp32_precision says. Prints a
table, and writes a JSON file with the device, the versions and the commit, and a plot of the ratios."""

import argparse
import datetime
import functools
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import suites
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # it runs from a checkout, too
import rnn

RESULTS = Path(__file__).parent / "results"


def timed(functions: Sequence[Callable[[], Any]], seconds: float, device: str) -> list[float]:
    """The median time of each function in seconds; they are called in turn for some `seconds`."""

    def once(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for function in [*functions, *functions]:
        once(function)
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or (time.perf_counter() < end and len(rounds) < 1000):
        # Backwards every other time: nobody always comes after the same other.
        order = range(len(functions))[:: 1 if len(rounds) % 2 else -1]
        measured = {i: once(functions[i]) for i in order}
        rounds.append([measured[i] for i in range(len(functions))])
    return [statistics.median(column) for column in zip(*rounds)]


def measure(shape: suites.Shape, layers: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Times of each layer and its error against float64, all with the same weights and input."""
    B, T, H, I = *shape, *([] if len(shape) == 4 else [shape[2]])
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    oracle = nn.RNN(I, H, nonlinearity=options.cell).to(torch.float64)
    exact = torch.randn(T, B, I)
    built = {}
    for name, layer in layers.items():
        built[name] = layer(I, H, nonlinearity=options.cell).to(options.device, dtype)
        built[name].load_state_dict(oracle.state_dict())
    x = exact.to(options.device, dtype)
    dy = torch.randn(T, B, H).to(options.device, dtype)

    def forward(layer: nn.Module) -> Any:
        with torch.no_grad():
            return layer(x)[0]

    def training(layer: nn.Module) -> None:
        layer(x)[0].backward(dy)
        layer.zero_grad()

    row: dict[str, Any] = dict(B=B, T=T, H=H, I=I)
    for kind in (forward, training):
        functions = [functools.partial(kind, layer) for layer in built.values()]
        row[kind.__name__] = dict(zip(built, timed(functions, options.seconds, options.device)))
    weights = {name: p.to(dtype).double() for name, p in oracle.state_dict().items()}
    oracle.load_state_dict(weights)
    with torch.no_grad():
        want = oracle(x.double().cpu())[0]
        row["error"] = {name: ((forward(layer).double().cpu() - want).norm() / want.norm()).item()
                        for name, layer in built.items()}
    return row


def environment(options: argparse.Namespace) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=RESULTS, capture_output=True, text=True)
        return done.stdout.strip()

    versions: dict[str, Any] = dict(python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__)
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
        versions |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
                         triton=importlib.import_module("triton").__version__)
    else:
        models = [line.partition(": ")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
        device = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return dict(device=device, kind=options.device, dtype=options.dtype, cell=options.cell, suite=options.suite,
                fp32_precision=getattr(torch.backends.cudnn.rnn, "fp32_precision", "unknown"),
                versions=versions, commit=git("rev-parse", "--short", "HEAD"),
                modified=bool(git("status", "--porcelain", "-uno")),
                date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))


def ratio(row: dict[str, Any], kind: str) -> float:
    """torch.nn's time by ours: above 1, ours is the faster."""
    return row[kind]["torch.nn"] / row[kind]["rnn"]


def show(row: dict[str, Any]) -> str:
    def cell(kind: str) -> str:
        times = "".join(f"{1e6 * seconds / row['T']:12.2f}" for seconds in row[kind].values())
        return f"{times}{ratio(row, kind):8.2f}"

    return (f"{row['B']:5}{row['T']:7}{row['H']:6}{row['I']:6} {cell('forward')}  {cell('training')}  "
            + "".join(f"{error:9.1e}" for error in row["error"].values()))


def plot(path: Path, results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.25 * len(rows)), layout="constrained")
    places = range(len(rows))
    for offset, kind in ((-0.2, "forward"), (0.2, "training")):
        axes.barh([p + offset for p in places], [ratio(row, kind) for row in rows], height=0.4, label=kind)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"B {row['B']}  T {row['T']}  H {row['H']}  I {row['I']}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="torch.nn.RNN's time / ours", title=f"{results['device']}, {results['dtype']}, {results['cell']}")
    axes.legend()
    figure.savefig(path, dpi=100)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    option("--suite", default="core", help=f"cpu: {', '.join(suites.CPU)}; cuda: {', '.join(suites.GPU)}")
    option("--cell", choices=("tanh", "relu"), default="tanh", help="the nonlinearity")
    option("--dtype", choices=("float32", "float16", "bfloat16", "float64"), default="float32")
    option("--seconds", type=float, default=1.5, help="to spend on each figure (default: %(default)s)")
    option("--peer", action="append", default=[], metavar="MODULE:CLASS",
           help="another layer with the constructor of torch.nn.RNN, to be timed too")
    option("--out", type=Path, default=RESULTS, help="folder of the JSON file and the plot (default: bench/results)")
    options = parser.parse_args(arguments)
    if options.suite not in (suites.CPU if options.device == "cpu" else suites.GPU):
        parser.error(f"there is no suite {options.suite} for {options.device}: see --help")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    layers: dict[str, Any] = {"rnn": rnn.RNN, "torch.nn": nn.RNN}
    for peer in options.peer:
        module, _, name = peer.partition(":")
        layers[peer] = getattr(importlib.import_module(module), name)
    results: dict[str, Any] = environment(options) | dict(rows=[])
    print(f"{results['device']}, {options.dtype}, {options.cell}; us per step of {', '.join(layers)}, and the ratio of "
          "torch.nn's time to rnn's")
    width = 12 * len(layers) + 8
    print(f"{'B':>5}{'T':>7}{'H':>6}{'I':>6} {'forward':>{width}}  {'training':>{width}}  "
          f"{'errors':>{9 * len(layers)}}")
    for shape in (suites.CPU if options.device == "cpu" else suites.GPU)[options.suite]:
        row = measure(shape, layers, options)
        results["rows"].append(row)
        print(show(row), flush=True)
    for kind in ("forward", "training"):
        ratios = [ratio(row, kind) for row in results["rows"]]
        print(f"{kind}: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    small = [ratio(row, "training") for row in results["rows"] if row["B"] <= 16 and row["H"] <= 128]
    if small and options.device == "cpu":
        print(f"training at B <= 16, H <= 128: median {statistics.median(small):.2f}")
    options.out.mkdir(parents=True, exist_ok=True)
    name = "-".join((options.device, options.suite, options.cell, options.dtype, results["commit"] or "unknown"))
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    plot(path.with_suffix(".png"), results)
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
