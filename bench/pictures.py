"""Curves over a logarithmic grid, as SVG."""

import math
from typing import NamedTuple

COLORS = ("#1f77b4", "#e6750a", "#2a8a3e")
WIDTH = 520
HEIGHT = 320
LEFT, RIGHT, TOP, BOTTOM = 56, 120, 52, 48


class Curve(NamedTuple):
    """A label, its points (x, y), the number of its color, and whether it is dashed."""

    label: str
    points: list[tuple[float, float]]
    color: int
    dashed: bool


class Axis(NamedTuple):
    """From `low` to `high`, at `start` and `end` of the picture, in ticks of a factor."""

    low: float
    high: float
    start: int
    end: int
    factor: int

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        count = round(math.log(self.high / self.low, self.factor))
        return [self.low * self.factor**k for k in range(count + 1)]


def axis(values: list[float], start: int, end: int, factor: int) -> Axis:
    """That has all values, and whose ends are powers of the factor times the least tick."""
    low = float(factor) ** math.floor(math.log(min(values), factor) + 1e-9)
    high = float(factor) ** math.ceil(math.log(max(values), factor) - 1e-9)
    return Axis(low, high, start, end, factor)


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{words}</text>'


def apart(ends: list[float], distance: float) -> list[float]:
    """The places of labels, moved down where one would touch another."""
    places: dict[int, float] = {}
    least = -math.inf
    for k in sorted(range(len(ends)), key=ends.__getitem__):
        places[k] = max(ends[k], least + distance)
        least = places[k]
    return [places[k] for k in range(len(ends))]


def curves(title: str, names: tuple[str, str], lines: list[Curve]) -> str:
    """On two logarithmic axes of these names, which have the units."""
    points = [point for line in lines for point in line.points]
    across = axis([x for x, _ in points], LEFT, WIDTH - RIGHT, 4)
    up = axis([y for _, y in points], HEIGHT - BOTTOM, TOP, 2)
    shapes = []
    for value in across.ticks():
        x = across.place(value)
        shapes.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        shapes.append(text(x, HEIGHT - BOTTOM + 16, f"{value:,.0f}", ' text-anchor="middle"'))
    for value in up.ticks():
        y = up.place(value)
        shapes.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        shapes.append(text(LEFT - 6, y + 4, f"{value:g}", ' text-anchor="end"'))
    labels = apart([up.place(line.points[-1][1]) for line in lines], 14)
    for line, place in zip(lines, labels):
        color = COLORS[line.color]
        path = "L".join(f"{across.place(x):.1f} {up.place(y):.1f}" for x, y in line.points)
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        shapes.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        shapes.append(text(WIDTH - RIGHT + 6, place + 4, line.label, f' fill="{color}"'))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
            text(8, 18, title, ' font-size="13"'),
            text(8, 38, names[1]),
            text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, names[0], ' text-anchor="middle"'),
            *shapes,
            "</svg>",
            "",
        ]
    )
