"""Writes the tables of docs/performance.md, the pictures docs/speed.svg and docs/growth.svg, and
their captions in README.md and docs/index.md.

They come from the newest results under bench/results/, of each device and suite.

`--check` writes nothing and fails if one of them is out of date."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from pictures import Curve, curves

ROOT = Path(__file__).parent.parent
BEGIN = "<!-- These figures are written by bench/report.py. -->"
END = "<!-- Here they end. -->"
CELLS = {"tanh": "RNN", "relu": "RNN, relu", "lstm": "LSTM", "gru": "GRU"}
KINDS = ("forward", "training")
COLORS = ("#1f77b4", "#e6750a")
MIB = 2**20
LITTLE = 1.1  # a gain that noise may be
Results = dict[str, Any]
Row = dict[str, Any]


def newest(folder: Path) -> dict[tuple[str, str], Results]:
    """By device and suite, of complete suites and both contestants."""
    by_suite: dict[tuple[str, str], Results] = {}
    for path in folder.glob("*-*.json"):
        results = json.loads(path.read_text())
        key = results["kind"], results["suite"]
        complete = results.get("rows") and not (
            results.get("baseline")
            or results.get("cell")
            or results.get("dtype")
            or results.get("plan")
        )
        if complete and (key not in by_suite or results["date"] > by_suite[key]["date"]):
            by_suite[key] = results
    return by_suite


def ratio(row: Row, figure: str, kind: str = "") -> float | None:
    """torch.nn's by ours: above 1, ours is the better. `kind` may be that of both as CUDA
    graphs."""
    ours, theirs = (row.get(figure, {}).get(f"{name}{kind}") for name in ("rnn", "torch.nn"))
    return theirs / ours if ours and theirs else None


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def table(head: list[str], body: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(line)} |" for line in (head, ["---", *["--:"] * (len(head) - 1)], *body)
    ]


def column(row: Row, rows: list[Row]) -> str:
    """What tells a row from the others of its sizes: its cell, its dtype, or both."""
    cells, dtypes = (len({row[name] for row in rows}) > 1 for name in ("cell", "dtype"))
    return " ".join([CELLS[row["cell"]]] * (cells or not dtypes) + [row["dtype"]] * dtypes)


def figures(rows: list[Row]) -> list[str]:
    """A line for each size and form; for each cell or dtype our microseconds a step, and the
    ratios."""
    columns = list(dict.fromkeys(column(row, rows) for row in rows))
    body: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        line = body.setdefault((row["form"], *(row[size] for size in "BTHI")), {})
        for kind in KINDS:
            times = ratio(row, kind)
            line[f"{column(row, rows)} {kind}"] = (
                ""
                if times is None
                else (f"{number(1e6 * row[kind]['rnn'] / row['T'])} ({number(times)})")
            )
    heads = [f"{name} {kind}" for name in columns for kind in KINDS]
    return table(
        ["", "B", "T", "H", "I", *heads],
        [
            [
                "" if form == "padded" else form,
                *map(str, sizes),
                *(line.get(head, "") for head in heads),
            ]
            for (form, *sizes), line in body.items()
        ],
    )


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
                line += [
                    show(function, [ratio(row, kind) for row in group])
                    for function in (geometric_mean, min)
                ]
            # Less is below its noise
            large = [row for row in group if (row["memory"].get("torch.nn") or 0) >= MIB]
            for figure, of in (("memory", large), ("error", group)):
                line.append(show(max, [1 / value for row in of if (value := ratio(row, figure))]))
            body.append(line)
    return table(
        [
            "suite",
            "cases",
            "forward: mean",
            "least",
            "training: mean",
            "least",
            "memory: most",
            "error: most",
        ],
        body,
    )


def losses(suites: dict[str, list[Row]]) -> list[str]:
    """A line for each case in which one of the ratios is below `LITTLE`."""
    body = []
    for suite, rows in suites.items():
        for row in rows:
            times = [ratio(row, kind) for kind in KINDS]
            if any(value is not None and value < LITTLE for value in times):
                sizes = [str(row[size]) for size in "BTHI"]
                name = column(row, rows)
                form = "" if row["form"] == "padded" else f", {row['form']}"
                shown = ["" if value is None else number(value) for value in times]
                body.append([f"{suite}, {name}{form}", *sizes, *shown])
    if not body:
        return [f"In no case is the ratio below {LITTLE}."]
    return [
        f"The {len(body)} cases in which a ratio is below {LITTLE}: `torch.nn` is faster, or as "
        "fast within noise.",
        "",
        *table(["suite", *"BTHI", *KINDS], body),
    ]


def section(by_suite: dict[tuple[str, str], Results], kind: str) -> list[str]:
    name = {"cpu": "CPU", "cuda": "GPU"}[kind]
    core = by_suite.get((kind, "core"))
    if core is None:
        return [
            f"**{name}: not measured yet.** `python bench/run.py --device {kind} --suite core` "
            "measures yours."
        ]
    versions = ", ".join(f"{k} {v}" for k, v in core["versions"].items() if v)
    commit = f"{core['commit']}{' with changes' if core['modified'] else ''}"
    suites = {
        suite: results["rows"]
        for (device, suite), results in sorted(by_suite.items())
        if device == kind
    }
    return [
        f"**{name}: {core['device']}**, {versions}; {core['date'][:10]}, at {commit}. "
        "Microseconds a step "
        "of ours, and in brackets torch.nn's time divided by ours.",
        "",
        *figures(core["rows"]),
        "",
        "Geometric means and the least of those ratios; and the most that our peak memory (with "
        "all that is kept "
        "between calls, where torch.nn's is 1 MiB or more) and our error against float64 come to, "
        "divided by "
        "torch.nn's.",
        "",
        *summary(suites),
        "",
        *losses(suites),
    ]


def bars(rows: list[Row]) -> list[tuple[str, list[list[float]]]]:
    """For each form and cell a label and the ratios of all its cases: forward, and in training."""
    groups = []
    for form in ("padded", "packed", "streaming"):
        for cell, name in CELLS.items():
            group = [row for row in rows if row["form"] == form and row["cell"] == cell]
            if not group:
                continue
            label = name if form == "padded" else f"{name}, {form}"
            kinds = []
            for kind in KINDS:
                values = [value for row in group if (value := ratio(row, kind)) is not None]
                if values:
                    kinds.append(values)
            groups.append((label, kinds))
    return groups


def picture(results: Results) -> str:
    """An SVG on a logarithmic axis: bars go from 1 to the geometric mean, lines over all ratios."""
    left = 120
    top = 58
    width = 520
    height = 14  # of a bar
    groups = bars(results["rows"])
    most = max(value for _, kinds in groups for values in kinds for value in values)
    low = 0.5
    high = 2.0 ** math.ceil(math.log2(most))

    def place(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return left + share * (width - left - 20)

    shapes = []
    y = top
    for label, kinds in groups:
        middle = y + height * len(kinds) / 2 + 4
        shapes.append(f'<text x="{left - 8}" y="{middle:.0f}" text-anchor="end">{label}</text>')
        for color, values in zip(COLORS, kinds):
            mean = geometric_mean(values)
            start, end = sorted((place(1), place(mean)))
            center = y + height / 2
            reach = f"M{place(min(values)):.1f} {center - 1:.0f}H{place(max(values)):.1f}"
            shapes += [
                f'<rect x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="{height - 2}" '
                f'fill="{color}"/>',
                f'<path d="{reach}" stroke="#333"/>',
                f'<text x="{place(1) - 4:.1f}" y="{center + 3:.0f}" text-anchor="end">'
                f"{number(mean)}</text>",
            ]
            y += height
        y += 8
    ticks = []
    value = low
    while value <= high:
        style = 'stroke="#333"' if value == 1 else 'stroke="#ddd"'
        x = f"{place(value):.1f}"
        ticks += [
            f'<path d="M{x} {top - 6}V{y}" {style}/>',
            f'<text x="{x}" y="{y + 14}" text-anchor="middle">{value:g}</text>',
        ]
        value *= 2
    legend = [
        f'<rect x="{left + 150 * k}" y="30" width="10" height="10" fill="{color}"/>'
        f'<text x="{left + 15 + 150 * k}" y="39">{kind}</text>'
        for k, (color, kind) in enumerate(zip(COLORS, KINDS))
    ]
    title = f"torch.nn's time divided by ours ({results['device']}; suite core)"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 24}" '
        f'viewBox="0 0 {width} {y + 24}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join(
        [
            head,
            f'<rect width="{width}" height="{y + 24}" fill="#fff"/>',
            f'<text x="8" y="18" font-size="13">{title}</text>',
            *legend,
            *ticks,
            *shapes,
            "</svg>",
            "",
        ]
    )


def growth(results: Results) -> str:
    """Time of a training step over the length of the sequence, of the most usual sizes."""
    rows = [row for row in results["rows"] if row["form"] == "padded" and row["B"] == 16]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        for name in ("rnn", "torch.nn"):
            seconds = row["training"].get(name)
            if seconds:
                points = found.setdefault((row["cell"], name), [])
                points.append((row["T"], 1e6 * seconds / row["T"]))
    lines = []
    for (cell, name), points in found.items():
        label = f"{CELLS[cell]}, {'ours' if name == 'rnn' else name}"
        color = ["tanh", "lstm", "gru"].index(cell)
        lines.append(Curve(label, sorted(points), color, name != "rnn"))
    title = f"Training, microseconds a step ({results['device']}; B 16, H 64)"
    return curves(title, ("steps of the sequence, T", "µs a step"), lines)


def conditions(results: Results) -> str:
    """Where the figures of a picture were measured."""
    what = results["device"], "float32", f"torch {results['versions']['torch']}"
    return f"{', '.join([*what, results['date'][:10]])}, commit {results['commit']}"


def captions(by_suite: dict[tuple[str, str], Results]) -> list[str]:
    """Both pictures, and below each what was measured."""
    lines = []
    core = by_suite.get(("cpu", "core"))
    long = by_suite.get(("cpu", "growth"))
    if core is not None:
        lines += [
            "![Geometric means of torch.nn's time divided by ours](speed.svg)",
            "",
            f"*{conditions(core)}; suite core.",
            "Bars are geometric means over its shapes, lines go from the least favourable shape to",
            "the most. Right of 1, ours is faster.*",
            "",
        ]
    if long is not None:
        lines += [
            "![Microseconds a step in training, by the length of the sequence](growth.svg)",
            "",
            f"*{conditions(long)}; suite growth.",
            "Forward and backward of one layer, divided by the steps; both axes are logarithmic.*",
            "",
        ]
    if ("cuda", "core") not in by_suite:
        lines.append("**No GPU has been measured yet.**")
    return lines or ["Nothing has been measured yet."]


def caption(by_suite: dict[tuple[str, str], Results]) -> list[str]:
    """What the picture shows, and of what nothing is known."""
    core = by_suite.get(("cpu", "core"))
    if core is None:
        return ["Nothing has been measured yet."]
    lines = [
        "![Geometric means of torch.nn's time divided by ours](docs/speed.svg)",
        "",
        f"{conditions(core)};",
        "bars are geometric means, lines go from the least favourable shape to the most.",
    ]
    if ("cuda", "core") not in by_suite:
        lines.append("**No GPU has been measured yet.**")
    return lines


def between_marks(text: str, lines: list[str]) -> str:
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def render(text: str, folder: Path) -> str:
    """The text with the tables of the results in the folder between its marks."""
    by_suite = newest(folder)
    return between_marks(text, [*section(by_suite, "cpu"), "", *section(by_suite, "cuda")])


def outputs() -> dict[Path, str]:
    """All that this script writes."""
    folder = ROOT / "bench/results"
    by_suite = newest(folder)
    readme = ROOT / "README.md"
    performance = ROOT / "docs/performance.md"
    index = ROOT / "docs/index.md"
    texts = {
        index: between_marks(index.read_text(), captions(by_suite)),
        readme: between_marks(readme.read_text(), caption(by_suite)),
        performance: render(performance.read_text(), folder),
    }
    core = by_suite.get(("cpu", "core"))
    if core is not None:
        texts[ROOT / "docs/speed.svg"] = picture(core)
    long = by_suite.get(("cpu", "growth"))
    if long is not None:
        texts[ROOT / "docs/growth.svg"] = growth(long)
    return texts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    stale = False
    for path, text in outputs().items():
        if path.exists() and path.read_text() == text:
            continue
        stale = True
        if options.check:
            print(f"{path.relative_to(ROOT)} is out of date: run python bench/report.py")
        else:
            path.write_text(text)
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
