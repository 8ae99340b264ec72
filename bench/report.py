"""Writes the figures of README.md from the newest results under bench/results/, of each device and suite.

`--check` writes nothing and fails if README.md has others."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- These figures are written by bench/report.py. -->", "<!-- Here they end. -->"
CELLS = {"tanh": "RNN", "relu": "RNN, relu", "lstm": "LSTM", "gru": "GRU"}
KINDS = ("forward", "training")
MIB = 2**20
Results = dict[str, Any]
Row = dict[str, Any]


def newest(folder: Path) -> dict[tuple[str, str], Results]:
    """By device and suite, of whole suites and both contestants."""
    found: dict[tuple[str, str], Results] = {}
    for path in folder.glob("*-*.json"):
        results = json.loads(path.read_text())
        key = results["kind"], results["suite"]
        whole = results.get("rows") and not (results.get("baseline") or results.get("cell") or results.get("dtype")
                                          or results.get("plan"))
        if whole and (key not in found or results["date"] > found[key]["date"]):
            found[key] = results
    return found


def ratio(row: Row, figure: str, kind: str = "") -> float | None:
    """torch.nn's by ours: above 1, ours is the better. `kind` may be that of both as CUDA graphs."""
    ours, theirs = (row.get(figure, {}).get(f"{name}{kind}") for name in ("rnn", "torch.nn"))
    return theirs / ours if ours and theirs else None


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def table(head: list[str], body: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---", *["--:"] * (len(head) - 1)], *body)]


def column(row: Row, rows: list[Row]) -> str:
    """What tells a row from the others of its sizes: its cell, its dtype, or both."""
    cells, dtypes = (len({row[name] for row in rows}) > 1 for name in ("cell", "dtype"))
    return " ".join([CELLS[row["cell"]]] * (cells or not dtypes) + [row["dtype"]] * dtypes)


def figures(rows: list[Row]) -> list[str]:
    """A line for each size and form; for each cell or dtype our microseconds a step, and the ratios."""
    columns = list(dict.fromkeys(column(row, rows) for row in rows))
    body: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        line = body.setdefault((row["form"], *(row[size] for size in "BTHI")), {})
        for kind in KINDS:
            times = ratio(row, kind)
            line[f"{column(row, rows)} {kind}"] = "" if times is None else (
                f"{number(1e6 * row[kind]['rnn'] / row['T'])} ({number(times)})")
    heads = [f"{name} {kind}" for name in columns for kind in KINDS]
    return table(["", "B", "T", "H", "I", *heads],
                 [["" if form == "padded" else form, *map(str, sizes), *(line.get(head, "") for head in heads)]
                  for (form, *sizes), line in body.items()])


def summary(suites: dict[str, list[Row]]) -> list[str]:
    """A line for each suite, cell or dtype, and form."""

    def show(function: Callable[[list[float]], float], values: list[float | None]) -> str:
        there = [value for value in values if value is not None]
        return number(function(there)) if there else ""

    body = []
    for suite, rows in suites.items():
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            groups.setdefault((row["form"], column(row, rows)), []).append(row)
        for (form, name), group in groups.items():
            line = [f"{suite}, {name}{'' if form == 'padded' else f', {form}'}", str(len(group))]
            for kind in KINDS:
                line += [show(function, [ratio(row, kind) for row in group]) for function in (geometric_mean, min)]
            large = [row for row in group if (row["memory"].get("torch.nn") or 0) >= MIB]  # less is below its noise
            for figure, of in (("memory", large), ("error", group)):
                line.append(show(max, [1 / value for row in of if (value := ratio(row, figure))]))
            body.append(line)
    return table(["suite", "cases", "forward: mean", "least", "training: mean", "least", "memory: most", "error: most"],
                 body)


def section(found: dict[tuple[str, str], Results], kind: str) -> list[str]:
    name = {"cpu": "CPU", "cuda": "GPU"}[kind]
    core = found.get((kind, "core"))
    if core is None:
        return [f"**{name}: not measured yet.** `python bench/run.py --device {kind} --suite core` measures yours."]
    versions = ", ".join(f"{k} {v}" for k, v in core["versions"].items() if v)
    commit = f"{core['commit']}{' with changes' if core['modified'] else ''}"
    return [f"**{name}: {core['device']}**, {versions}; {core['date'][:10]}, at {commit}. Microseconds a step "
            "of ours, and in brackets torch.nn's time divided by ours.", "",
            *figures(core["rows"]), "",
            "Geometric means and the least of those ratios; and the most that our peak memory (with all that is kept "
            "between calls, where torch.nn's is 1 MiB or more) and our error against float64 come to, divided by "
            "torch.nn's.", "",
            *summary({suite: results["rows"] for (device, suite), results in sorted(found.items()) if device == kind})]


def render(readme: str, folder: Path) -> str:
    """The text with the figures of the results in the folder between its marks."""
    found = newest(folder)
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([before + BEGIN, "", *section(found, "cpu"), "", *section(found, "cuda"), "", END + after])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    old = path.read_text()
    new = render(old, ROOT / "bench/results")
    if options.check:
        print("README.md has the newest figures" if new == old else "README.md is stale: run python bench/report.py")
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
