"""How long a memory lasts: cells and initial values on two problems that need one.

Adding (Hochreiter and Schmidhuber, 1997): of a long series of numbers two are marked; their sum is
asked for at the end. Copying: some symbols are shown, and have to be repeated after a long silence.
Beside the plain RNN, LSTM and GRU stand an RNN with ReLU that begins with the identity (IRNN; Le,
Jaitly and Hinton, 2015) and the gates' biases of chrono initialisation (Tallec and Ollivier, 2018),
both of rnn.init. The figure of `rnn.gradient_flow` shows why: how much of the gradient of a loss at
the end reaches each earlier step."""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rnn
import training

SHOWN = 3  # symbols to repeat
SYMBOLS = 6
SILENCE = SYMBOLS
RECALL = SYMBOLS + 1


class Variant(NamedTuple):
    """A cell and its initial values. make(inputs, hidden, steps) is the layer; it learns at --rate
    times `rate`."""

    name: str
    cell: str
    make: Callable[[int, int, int], nn.Module]
    rate: float = 1.0


def irnn(inputs: int, hidden: int, steps: int) -> nn.Module:
    return rnn.init.identity_(rnn.RNN(inputs, hidden, nonlinearity="relu"))


VARIANTS = (
    Variant("RNN", "rnn", lambda inputs, hidden, steps: rnn.RNN(inputs, hidden)),
    # Without a bound on its outputs it needs smaller steps
    Variant("RNN, ReLU, identity", "rnn", irnn, rate=0.5),
    Variant("LSTM", "lstm", lambda inputs, hidden, steps: rnn.LSTM(inputs, hidden)),
    Variant(
        "LSTM, chrono",
        "lstm",
        lambda inputs, hidden, steps: rnn.init.chrono_(rnn.LSTM(inputs, hidden), steps),
    ),
    Variant("GRU", "gru", lambda inputs, hidden, steps: rnn.GRU(inputs, hidden)),
    Variant(
        "GRU, chrono",
        "gru",
        lambda inputs, hidden, steps: rnn.init.chrono_(rnn.GRU(inputs, hidden), steps),
    ),
)


class Model(nn.Module):
    """A layer; a linear map of its last outputs."""

    def __init__(self, layer: nn.Module, hidden: int, outputs: int, answers: int) -> None:
        super().__init__()
        self.rnn = layer
        self.output = nn.Linear(hidden, outputs)
        self.answers = answers

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, I] -> [answers, B, outputs], of the last steps."""
        h, _ = self.rnn(x)
        return self.output(h[-self.answers :])


class Problem(NamedTuple):
    """batch(steps, size, generator) is x [T, B, inputs] and what to answer; loss(found, answer) a
    scalar, error(found, answer) what is reported, `baseline` its value without a memory."""

    name: str
    inputs: int
    outputs: int
    answers: int
    batch: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    unit: str
    baseline: float
    baseline_loss: float


def adding_batch(steps: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [T, B, 2]: numbers and marks, one in each half. The answers [1, B, 1]."""
    numbers = torch.rand(steps, size, generator=generator)
    half = steps // 2
    first = torch.randint(half, (1, size), generator=generator)
    second = half + torch.randint(steps - half, (1, size), generator=generator)
    marks = torch.zeros(steps, size).scatter_(0, torch.cat([first, second]), 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0)[None, :, None]


def copy_batch(steps: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [T, B, SYMBOLS + 2]: symbols, silence, a sign for each symbol to repeat. The symbols
    [SHOWN, B]."""
    symbols = torch.randint(SYMBOLS, (SHOWN, size), generator=generator)
    silence = torch.full((steps - 2 * SHOWN, size), SILENCE)
    series = torch.cat([symbols, silence, torch.full((SHOWN, size), RECALL)])
    return nn.functional.one_hot(series, SYMBOLS + 2).float(), symbols


def copy_loss(found: Tensor, symbols: Tensor) -> Tensor:
    return nn.functional.cross_entropy(found.flatten(0, 1), symbols.flatten())


def wrong_symbols(found: Tensor, symbols: Tensor) -> Tensor:
    return (found.argmax(2) != symbols).double().mean()


mse = nn.functional.mse_loss
PROBLEMS = (
    # Always to answer 1 has the variance of the sum of two numbers between 0 and 1
    Problem("adding", 2, 1, 1, adding_batch, mse, mse, "mean squared error", 1 / 6, 1 / 6),
    Problem(
        "copying",
        SYMBOLS + 2,
        SYMBOLS,
        SHOWN,
        copy_batch,
        copy_loss,
        wrong_symbols,
        "symbols wrong",
        1 - 1 / SYMBOLS,
        math.log(SYMBOLS),
    ),
)


class Result(NamedTuple):
    variant: Variant
    run: training.Run
    error: float
    flow: Tensor


def batches_of(problem: Problem, options: argparse.Namespace) -> Iterator[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        batch = problem.batch(options.time, options.batch, generator)
        yield tuple(t.to(options.device) for t in batch)


def solve(problem: Problem, variant: Variant, options: argparse.Namespace) -> Result:
    """Train one variant, and test it on series that it has not seen."""
    torch.manual_seed(options.seed)
    layer = variant.make(problem.inputs, options.hidden, options.time)
    model = Model(layer, options.hidden, problem.outputs, problem.answers).to(options.device)
    test = problem.batch(options.time, 500, torch.Generator().manual_seed(options.seed + 1))
    x, answer = (t.to(options.device) for t in test)
    few = slice(32)
    flow = rnn.gradient_flow(model, x[:, few], lambda found: problem.loss(found, answer[:, few]))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return problem.loss(model(batch[0]), batch[1])

    print(f"\n{problem.name}: {variant.name}", flush=True)
    rate = options.rate * variant.rate
    own = argparse.Namespace(**{**vars(options), "cell": variant.cell, "rate": rate})
    runs = training.train(model, loss, batches_of(problem, options), own)
    if options.compare:
        training.print_comparison(runs)
    with torch.no_grad():
        error = problem.error(model(x), answer).item()
    return Result(variant, runs[0], error, flow.norms["rnn.l0"])


def draw(path: Path, results: dict[str, list[Result]]) -> None:
    """Losses of each problem above, the gradients' flow before training below."""
    pyplot = training.pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for column, problem in enumerate(PROBLEMS):
        above, below = axes[:, column]
        for n, result in enumerate(results[problem.name]):
            style: dict[str, Any] = {"color": f"C{n}", "label": result.variant.name}
            smooth = torch.tensor(result.run.losses).unfold(0, 10, 10).mean(1)
            above.plot(range(0, 10 * len(smooth), 10), smooth, **style)
            below.plot(result.flow.clamp(min=1e-12), **style)
        above.axhline(problem.baseline_loss, color="gray", linestyle=":", label="without memory")
        above.set(title=problem.name, xlabel="training step", ylabel="loss")
        above.set_ylim(0, 1.5 * problem.baseline_loss)
        below.set(xlabel="step t", ylabel="norm of dL/dh_t before training", yscale="log")
        below.set_ylim(1e-10, 10)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    print(f"\nLosses and the gradients' flow: {path}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="", steps=1500, rate=5e-3)
    option = parser.add_argument
    positive = training.positive
    option("--hidden", type=positive, default=64, help="hidden units (default: %(default)s)")
    option("--batch", type=positive, default=32, help="series of a step (default: %(default)s)")
    option("--time", type=positive, default=50, help="steps of a series (default: %(default)s)")
    options = training.parse(parser, arguments, steps=20, time=20, hidden=16)
    if options.data is not None:
        training.fail("--data: this example makes its series itself")
    if options.time < 3 * SHOWN:
        training.fail(f"--time {options.time}: {3 * SHOWN} are needed")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    training.print_source("series made by this program, at random", "none needed")
    chosen = [v for v in VARIANTS if options.cell in ("", v.cell)]
    results = {}
    for problem in PROBLEMS:
        results[problem.name] = [solve(problem, variant, options) for variant in chosen]
    for problem in PROBLEMS:
        rows = [("without memory", f"{problem.baseline:.4f}", "", "")]
        for variant, run, error, flow in results[problem.name]:
            first = flow[0].item() / flow[-problem.answers].item()
            rows.append((variant.name, f"{error:.4f}", f"{run.seconds:.1f}", f"{first:.0e}"))
        columns = [problem.unit, "seconds", "|dL/dh| first/last, untrained"]
        training.print_table(f"{problem.name}, {options.time} steps", columns, rows)
    draw(options.out / "long_memory.png", results)


if __name__ == "__main__":
    main()
