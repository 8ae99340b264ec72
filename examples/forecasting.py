"""Forecasts a week of daily temperatures, with how sure it is of them.

A GRU reads the weather day by day, and after each day says three quantiles of the temperature of
each of the next seven: an output at every step, all trained at once with the pinball loss, from one
call for whole windows of time. To forecast, it reads on with the state that it has.

The baselines: the value of today, of the same day last year (the seasonal-naive forecast), and the
mean of the days around it in the years before.

--data is a CSV file of your own, with a line of names and then one for each step of time, in order,
with no gaps; columns that are not numbers are left out."""

import argparse
import csv
import io
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import training

QUANTILES = (0.1, 0.5, 0.9)


class Series(NamedTuple):
    values: Tensor  # [T, columns]
    names: list[str]


class Batch(NamedTuple):
    inputs: Tensor  # [B, T, features]
    targets: Tensor  # [B, T, horizon]


class Forecaster(nn.Module):
    """layer -> for each day and each of the days after it the median's change from today, and the
    distance from there to the other quantiles, which is positive: they never cross."""

    def __init__(self, layer: Callable[..., Any], features: int, hidden: int, horizon: int) -> None:
        super().__init__()
        self.rnn = layer(features, hidden, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(hidden, 3 * horizon)

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        """x [B, T, features], of which the first is forecast -> [B, T, horizon, quantiles]"""
        # In training what it reads is blurred, as the years that it learns from are few.
        read = x + 0.3 * torch.randn_like(x) if self.training else x
        y, _ = self.rnn(read, state)
        change, below, above = self.output(self.dropout(y)).chunk(3, -1)
        median = x[..., :1] + change
        softplus = nn.functional.softplus
        return torch.stack([median - softplus(below), median, median + softplus(above)], -1)


def pinball(forecast: Tensor, target: Tensor) -> Tensor:
    """The loss that a quantile minimises (Koenker and Bassett 1978), of [..., quantiles] and
    [...]."""
    over = target[..., None] - forecast
    quantiles = torch.tensor(QUANTILES, device=target.device)
    return torch.maximum(quantiles * over, (quantiles - 1) * over)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return pinball(model(batch.inputs), batch.targets).mean()


def days_ahead(series: Tensor, horizon: int) -> Tensor:
    """series [T] -> [T - horizon, horizon], the values that follow each step."""
    return series.unfold(0, horizon, 1)[1:]


def make_features(series: Series, target: int, season: int, known: int) -> tuple[Tensor, float]:
    """[T, features]: the target, then the other columns, scaled by what they are in the `known`
    first steps, then the time of the season. And the target's scale."""
    mean = series.values[:known].mean(0)
    deviation = series.values[:known].std(0).clamp(min=1e-6)
    scaled = (series.values - mean) / deviation
    angle = torch.arange(len(scaled)) * (2 * math.pi / season)
    columns = [target, *(i for i in range(len(series.names)) if i != target)]
    features = torch.cat([scaled[:, columns], angle.sin()[:, None], angle.cos()[:, None]], 1)
    return features, deviation[target].item()


def window_batches(features: Tensor, horizon: int, options: argparse.Namespace) -> Iterator[Batch]:
    """Forever: windows that begin anywhere."""
    targets = days_ahead(features[:, 0], horizon)
    windows = features[:-horizon].unfold(0, options.window, 1).transpose(1, 2)
    wanted = targets.unfold(0, options.window, 1).transpose(1, 2)
    for rows in training.minibatches(len(windows), options.batch, options.seed):
        yield Batch(windows[rows].to(options.device), wanted[rows].to(options.device))


@torch.no_grad()
def forecast(model: nn.Module, features: Tensor, device: str) -> Tensor:
    """[T, horizon, quantiles]: after each step of the whole series."""
    return model(features[None].to(device))[0].cpu()


def season_mean(series: Tensor, season: int, known: int) -> Tensor:
    """[season]: of the `known` first values, the mean over a fortnight around each day."""
    near = max(1, season // 50)
    rows = []
    for day in range(season):
        distance = (torch.arange(known) - day + season // 2) % season - season // 2
        rows.append(series[:known][distance.abs() <= near].mean())
    return torch.stack(rows)


def baselines(series: Tensor, horizon: int, season: int, known: int) -> dict[str, Tensor]:
    """Forecasts [T - horizon, horizon] of each step for those after it."""
    steps = torch.arange(len(series) - horizon)[:, None] + torch.arange(1, horizon + 1)
    return {
        "today's": series[: len(steps), None].expand(-1, horizon),
        f"{season} steps before": series[(steps - season).clamp(min=0)],
        "mean of the season": season_mean(series, season, known)[steps % season],
    }


def read_series(path: Path | None) -> Series:
    if path is None:
        with zipfile.ZipFile(training.fetch("vega-datasets==0.9.0")) as archive:
            text = archive.read("vega_datasets/_data/seattle-weather.csv").decode()
    else:
        text = training.read_text(path)
    names, *rows = csv.reader(io.StringIO(text))
    numeric = [i for i in range(len(names)) if rows and is_number(rows[0], i)]
    if not numeric:
        training.fail(f"{path} has no column of numbers under a line of names")
    values = []
    for number, row in enumerate(rows, start=2):
        if not all(is_number(row, i) for i in numeric):
            training.fail(f"{path}, line {number}: a number for each of the columns is expected")
        values.append([float(row[i]) for i in numeric])
    return Series(torch.tensor(values), [names[i] for i in numeric])


def is_number(row: Sequence[str], i: int) -> bool:
    try:
        return math.isfinite(float(row[i]))
    except (ValueError, IndexError):
        return False


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="gru", steps=200, rate=5e-3)
    option = parser.add_argument
    positive = training.positive
    option("--hidden", type=positive, default=16, help="hidden units (default: %(default)s)")
    option("--batch", type=positive, default=32, help="windows in a step (default: %(default)s)")
    option("--window", type=positive, default=90, help="days of a window (default: %(default)s)")
    option("--horizon", type=positive, default=7, help="days ahead (default: %(default)s)")
    option("--season", type=positive, default=365, help="days of a season (default: %(default)s)")
    option("--column", help="what is forecast (default: temp_max, or the first of --data)")
    return training.parse(parser, arguments, steps=40, hidden=8)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    series = read_series(options.data)
    column = options.column or ("temp_max" if options.data is None else series.names[0])
    if column not in series.names:
        training.fail(f"--column {column} is none of {', '.join(series.names)}")
    target = series.names.index(column)
    T = len(series.values)
    # The last quarter is held out.
    known = T * 3 // 4
    needed = max(options.season, options.window + options.horizon)
    if known <= needed:
        training.fail(f"{T} steps of time are too few: more than {needed * 4 // 3} are needed")
    if options.data is None:
        training.print_source(
            "seattle-weather.csv (daily, 2012 to 2015, from NOAA) in vega-datasets 0.9.0",
            "MIT (of the package); NOAA's data is in the public domain",
        )
    features, scale = make_features(series, target, options.season, known)
    model = Forecaster(
        training.layer(options.cell), features.shape[1], options.hidden, options.horizon
    )
    batches = window_batches(features[:known], options.horizon, options)
    runs = training.train(model, loss, batches, options)
    if options.compare:
        training.print_comparison(runs)

    # Of forecasts made in the part that is held out, in the series' own unit.
    held = slice(known, T - options.horizon)
    values = series.values[:, target]
    truth = days_ahead(values, options.horizon)[held]
    offset = values[0] - features[0, 0] * scale
    quantiles = {
        run.name: forecast(run.model, features, options.device)[held] * scale + offset
        for run in runs
    }
    guesses = baselines(values, options.horizon, options.season, known)
    errors = {name: (guess[held] - truth).abs().mean(0) for name, guess in guesses.items()}
    for name, found in quantiles.items():
        errors[name] = (found[..., 1] - truth).abs().mean(0)
    first, last = f"{1} ahead", f"{options.horizon} ahead"
    rows = [
        (name, *(f"{error:.3f}" for error in (e[0], e[-1], e.mean()))) for name, e in errors.items()
    ]
    title = f"mean absolute error of {column}"
    training.print_table(title, [first, last, "all"], rows)
    ours = quantiles[runs[0].name]
    inside = (truth >= ours[..., 0]) & (truth <= ours[..., 2])
    print(f"\n{inside.float().mean():.0%} lie within the 80 % interval")
    path = options.out / "forecasting.png"
    plot(path, runs, errors, (values, ours, known, column))
    print(f"Picture: {path}")


def plot(
    path: Path,
    runs: Sequence[training.Run],
    errors: dict[str, Tensor],
    forecasts: tuple[Tensor, Tensor, int, str],
) -> None:
    pyplot = training.pyplot()
    figure, axes = pyplot.subplot_mosaic(
        [["loss", "error"], ["forecast", "forecast"]], figsize=(9, 6), layout="constrained"
    )
    training.plot_losses(axes["loss"], runs, "pinball, scaled")
    for name, error in errors.items():
        style = "-" if name.startswith(("rnn.", "torch.")) else ":"
        axes["error"].plot(range(1, len(error) + 1), error, style, label=name)
    axes["error"].set(xlabel="steps ahead", ylabel="mean absolute error", ylim=(0, None))
    axes["error"].legend()
    values, quantiles, known, column = forecasts
    horizon = quantiles.shape[1]
    shown = min(20 * horizon, len(quantiles))
    axes["forecast"].plot(range(shown), values[known : known + shown], color="black", label=column)
    # Every second week's forecast, from the day that it was made on.
    for start in range(0, shown - horizon, 2 * horizon):
        low, median, high = quantiles[start].t()
        ahead = range(start + 1, start + horizon + 1)
        label = f"forecast of {horizon} steps, 80 % interval" if start == 0 else None
        axes["forecast"].plot(ahead, median, color="C0", label=label)
        axes["forecast"].fill_between(ahead, low, high, color="C0", alpha=0.25)
    axes["forecast"].set(xlabel="steps in the part held out", ylabel=column)
    axes["forecast"].legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
