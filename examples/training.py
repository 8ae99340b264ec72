"""What the examples share: options, data from the package index, training, tables and curves.

An example builds its model from `layer(options.cell)`, gives `train` its loss and its batches, and
with --compare gets the same training of torch.nn's layers beside it."""

import argparse
import copy
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import rnn as packing
from tqdm import tqdm

import rnn

CELLS = {"rnn": rnn.RNN, "lstm": rnn.LSTM, "gru": rnn.GRU}
CACHE = Path("~/.cache/fused-rnn/examples")
FINAL = 50  # steps whose mean is the final loss

Loss = Callable[[nn.Module, Any], Tensor]


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parser(description: str | None, cell: str, steps: int, rate: float) -> argparse.ArgumentParser:
    """The options that all examples take, with an example's own defaults."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = made.add_argument
    option("--cell", choices=CELLS, default=cell, help="(default: %(default)s)")
    option("--compare", action="store_true", help="train torch.nn's layer on the same batches too")
    option("--data", metavar="PATH", type=Path, help="your own data (default: see above)")
    option("--steps", type=positive, default=steps, help="training steps (default: %(default)s)")
    option("--rate", type=float, default=rate, help="learning rate of Adam (default: %(default)s)")
    option("--quick", action="store_true", help="a small model and a few steps: does it run?")
    option("--seed", type=int, default=0, help="of weights, batches, samples (default: 0)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    option("--device", default=device, help="cpu or cuda (default: %(default)s)")
    option("--out", metavar="DIR", type=Path, default=Path("out"), help="for files (default: out)")
    return made


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **quick: Any
) -> argparse.Namespace:
    """The options, where --quick changes the defaults to those of `quick`. Sets the seed."""
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**quick)
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        fail("--device cuda: this torch finds no CUDA device")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    return options


def fail(message: str) -> NoReturn:
    """One line, and exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def read_text(path: Path) -> str:
    """A file of the user's: UTF-8 text that is not empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"cannot read {path}: it is not UTF-8 text")
    if not text.strip():
        fail(f"cannot learn from {path}: it is empty")
    return text


def fetch(requirement: str, source: bool = False) -> Path:
    """The archive of a package such as "name==1.0", its wheel or its `source`, downloaded once.

    Nothing of it is installed or run but, of a source archive, its setup.py for pip's metadata."""
    folder = CACHE.expanduser() / requirement.replace("==", "-")
    archives = [*folder.glob("*")]
    if archives:
        return archives[0]
    print(f"Downloading {requirement} from the package index to {folder}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.expanduser()) as made:
            download(requirement, made, "--no-binary" if source else "--only-binary")
            archive = next(Path(made).iterdir())
            return archive.rename(folder / archive.name)
    except OSError as error:
        fail(f"cannot keep {requirement} in {folder}: {error.strerror}")


def download(requirement: str, folder: str, kind: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
    options = ["--disable-pip-version-check", "--retries", "1", "--dest", folder]
    done = subprocess.run([*command, *options, requirement], text=True, capture_output=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = errors[-1] if errors else done.stderr.strip() or "pip failed"
        fail(f"cannot download {requirement}, is there a network? {reason}")


def print_source(data: str, licence: str) -> None:
    print(f"Data: {data}\nLicence: {licence}")


def minibatches(examples: int, size: int, seed: int) -> Iterator[Tensor]:
    """Forever: the indices [size] of a batch; each example once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, examples)
    while True:
        order = torch.randperm(examples, generator=generator)
        yield from order[: examples // size * size].view(-1, size)


def layer(cell: str) -> Callable[..., Any]:
    """rnn.RNN, rnn.LSTM or rnn.GRU."""
    return CELLS[cell]


class PackingLayer(nn.Module):
    """A layer of torch.nn that takes `lengths` as ours does."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return self.layer(x, state)
        first = self.layer.batch_first
        packed = packing.pack_padded_sequence(x, lengths.cpu(), first, enforce_sorted=False)
        y, state = self.layer(packed, state)
        steps = x.shape[1 if first else 0]
        return packing.pad_packed_sequence(y, first, total_length=steps)[0], state


def torch_twin(model: nn.Module) -> nn.Module:
    """A copy with torch.nn's layers and cells, which have the same weights."""
    twin = rnn.restore(copy.deepcopy(model), verbose=False)
    for module in [*twin.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.RNNBase):
                setattr(module, name, PackingLayer(child))
    return twin


class Run:
    """One model in training: its losses and the seconds that it took."""

    def __init__(self, name: str, model: nn.Module, options: argparse.Namespace) -> None:
        self.name = name
        self.model = DistributedDataParallel(model) if distributed.is_initialized() else model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, options.steps, eta_min=options.rate / 10
        )
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, loss: Loss, batch: Any) -> None:
        start = time.perf_counter()
        value = loss(self.model, batch)
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        total = value.detach()
        if distributed.is_initialized():
            distributed.all_reduce(total)
            total /= distributed.get_world_size()
        # .item() waits for the device, so that the seconds are those of the work.
        self.losses.append(total.item())
        self.seconds += time.perf_counter() - start

    @property
    def final(self) -> float:
        last = self.losses[-FINAL:]
        return sum(last) / len(last)


def train(
    model: nn.Module, loss: Loss, batches: Iterable[Any], options: argparse.Namespace
) -> list[Run]:
    """Trains `model`, and with --compare its twin of torch.nn on the same batches: their runs.

    `loss(model, batch)` is a scalar; `batches` has at least options.steps of them."""
    name = options.cell.upper()
    model.to(options.device)
    runs = [Run(f"rnn.{name}", model, options)]
    if options.compare:
        runs.append(Run(f"torch.nn.{name}", torch_twin(model), options))
    source: Iterator[Any] = iter(batches)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    for run in runs:
        run.model.train()
    with tqdm(range(options.steps), unit="step", dynamic_ncols=True, disable=rank > 0) as bar:
        for step in bar:
            batch = next(source)
            # By turns who is first, with the same random numbers, as for dropout.
            for run in runs if step % 2 else runs[::-1]:
                torch.manual_seed(options.seed + step)
                run.step(loss, batch)
            bar.set_postfix_str(f"loss {runs[0].losses[-1]:.3f}", refresh=False)
    for run in runs:
        run.model.eval()
    return runs


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A title and columns, then rows of a label and as many values."""
    rows = [(title, *columns), *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for label, *values in rows:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:])]
        print("  ".join([label.ljust(widths[0]), *cells]))


def print_comparison(runs: Sequence[Run]) -> None:
    """The losses and seconds of what `train` returned."""
    compared = min(50, len(runs[0].losses))
    rows = [
        ("loss at the start", *(f"{run.losses[0]:.4f}" for run in runs)),
        (f"loss at step {compared}", *(f"{run.losses[compared - 1]:.4f}" for run in runs)),
        (f"final loss (mean of {FINAL} steps)", *(f"{run.final:.4f}" for run in runs)),
        ("seconds", *(f"{run.seconds:.2f}" for run in runs)),
    ]
    print_table("", [run.name for run in runs], rows)
    if len(runs) > 1:
        ours, theirs = runs
        pairs = zip(ours.losses[:compared], theirs.losses[:compared])
        difference = max(abs(a - b) for a, b in pairs)
        print(f"\nlargest difference in {compared} steps {difference:10.1e}")
        print(f"{theirs.name} seconds / ours {theirs.seconds / ours.seconds:10.2f}")


def pyplot() -> Any:
    """matplotlib's pyplot, which draws to files alone."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def plot_losses(axes: Any, runs: Sequence[Run], unit: str, **baselines: float) -> None:
    """The loss curves, and a dotted line for each baseline, whose name has _ for a space."""
    for run in runs[::-1]:
        ours = run is runs[0]
        axes.plot(run.losses, label=run.name, linewidth=1 if ours else 3, alpha=1 if ours else 0.4)
    for name, value in baselines.items():
        axes.axhline(value, label=name.replace("_", " "), color="gray", linestyle=":")
    axes.set(xlabel="step", ylabel=f"loss ({unit})", ylim=(0, None))
    axes.legend()
