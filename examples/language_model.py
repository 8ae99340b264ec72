"""Trains a character language model with `rnn.RNN`, beside the same model with `torch.nn.RNN`.

Truncated backpropagation through time: the text is cut into parallel streams, each step reads the
next characters of every stream, and the hidden state is carried over from step to step, without its
gradient.

Under torchrun every process takes its share of the streams, and the gradients are averaged over
all."""

import argparse
import builtins
import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import rnn


class LanguageModel(nn.Module):
    """h_t = tanh(W_xh x_t + W_hh h_{t-1} + b), y_t = W_hy h_t + b_y, where y_t scores the next
    character."""

    def __init__(
        self, layer: Callable[[int, int], nn.Module], characters: int, hidden: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.rnn = layer(hidden, hidden)
        self.output = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """text [T, B] -> scores [T, B, characters] and the last state [1, B, hidden]."""
        h, state = self.rnn(self.embedding(text), state)
        return self.output(h), state


class Run:
    """One model in training: its losses and the seconds that it took."""

    def __init__(self, model: LanguageModel, rate: float) -> None:
        self.model: nn.Module = (
            DistributedDataParallel(model) if distributed.is_initialized() else model
        )
        self.state: Tensor | None = None
        self.optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, text: Tensor, first: bool) -> None:
        """One step on text [T + 1, B], from a zero state where the streams begin."""
        start = time.perf_counter()
        scores, state = self.model(text[:-1], None if first else self.state)
        self.state = state.detach()
        loss = nn.functional.cross_entropy(scores.flatten(0, 1).float(), text[1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        total = loss.detach()
        if distributed.is_initialized():
            distributed.all_reduce(total)
            total /= distributed.get_world_size()
        self.losses.append(total.item())
        self.seconds += time.perf_counter() - start

    @property
    def final(self) -> float:
        last = self.losses[-50:]
        return sum(last) / len(last)


def chunks(text: Tensor, batch: int, length: int) -> Iterator[tuple[Tensor, bool]]:
    """Forever: the next length + 1 characters [T + 1, B] of `batch` streams, and whether they are
    the first."""
    streams = text[: len(text) // batch * batch].view(batch, -1).t().contiguous()
    while True:
        for start in range(0, len(streams) - length, length):
            yield streams[start : start + length + 1], start == 0


def bigram_loss(text: Tensor, characters: int) -> float:
    """Nats per character of the best guess from the character before, with counts from this very
    text."""
    counts = torch.bincount(text[:-1] * characters + text[1:], minlength=characters**2).view(
        characters, characters
    )
    probability = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return -(counts * probability.clamp(min=1e-30).log()).sum().item() / (len(text) - 1)


@torch.no_grad()
def sample(model: LanguageModel, prompt: Tensor, length: int, temperature: float = 0.7) -> Tensor:
    """`length` characters that follow prompt [T], one at a time."""
    scores, state = model(prompt[:, None])
    out = []
    for _ in range(length):
        out.append(torch.multinomial((scores[-1, 0].float() / temperature).softmax(0), 1))
        scores, state = model(out[-1][:, None], state)
    return torch.cat(out)


def read_text(path: str | None) -> str:
    """The file's text, or English that is on every machine: the help texts of Python's standard
    library."""
    if path is None:
        topics = importlib.import_module("pydoc_data.topics").topics
        return "\n".join(topics[name] for name in sorted(topics))
    return Path(path).read_text(encoding="utf-8")


def fail(message: str) -> NoReturn:
    print(f"language_model.py: {message}", file=sys.stderr)
    sys.exit(2)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option(
        "--text",
        metavar="FILE",
        help="UTF-8 text to learn (default: the help texts that come with Python)",
    )
    option(
        "--hidden",
        type=positive,
        default=256,
        help="hidden units and embedding size (default: %(default)s)",
    )
    option(
        "--batch",
        type=positive,
        default=32,
        help="streams that the text is cut into (default: %(default)s)",
    )
    option(
        "--length",
        type=positive,
        default=64,
        help="characters of each stream in a step (default: %(default)s)",
    )
    option("--steps", type=positive, default=800, help="training steps (default: %(default)s)")
    option("--rate", type=float, default=2e-3, help="learning rate of Adam (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    option("--device", default=device, help="cpu or cuda (default: %(default)s)")
    option(
        "--dtype",
        choices=("float32", "float64", "bfloat16"),
        default="float32",
        help="(default: %(default)s)",
    )
    option(
        "--seed",
        type=int,
        default=0,
        help="of the weights and of the sample (default: %(default)s)",
    )
    option(
        "--plot",
        metavar="FILE",
        default="language_model.png",
        help="the loss curves (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        text = read_text(options.text)
    except (OSError, UnicodeDecodeError) as error:
        fail(
            f"cannot read {options.text}: "
            f"{error.strerror if isinstance(error, OSError) else 'it is not UTF-8 text'}"
        )
    needed = options.batch * (options.length + 1)
    if len(text) < needed:
        fail(
            f"the text has {len(text)} characters; {needed} are needed, or a smaller --batch or "
            "--length"
        )
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    data = torch.tensor([index[character] for character in text])
    dtype = getattr(torch, options.dtype)

    rank = 0
    processes = 1
    if distributed.is_torchelastic_launched():
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
        rank = distributed.get_rank()
        processes = distributed.get_world_size()
        if options.batch % processes:
            fail(f"--batch {options.batch} cannot be shared by {processes} processes")

    def print(text: str) -> None:
        if rank == 0:
            builtins.print(text)

    torch.manual_seed(options.seed)
    first = LanguageModel(rnn.RNN, len(alphabet), options.hidden)
    second = LanguageModel(nn.RNN, len(alphabet), options.hidden)
    second.load_state_dict(first.state_dict())
    ours, theirs = (Run(model.to(options.device, dtype), options.rate) for model in (first, second))
    parameters = sum(p.numel() for p in first.parameters())
    print(
        f"{len(text):,} characters, {len(alphabet)} different; {parameters:,} parameters in "
        f"{options.dtype} "
        f"on {options.device}"
    )
    batches = chunks(data.to(options.device), options.batch, options.length)
    with tqdm(range(options.steps), unit="step", dynamic_ncols=True, disable=rank > 0) as bar:
        for step in bar:
            batch, begins = next(batches)
            for run in (ours, theirs) if step % 2 else (theirs, ours):
                run.step(batch[:, rank::processes], begins)
            speed = options.batch * options.length * (step + 1) / ours.seconds
            bar.set_postfix_str(
                f"loss {ours.losses[-1]:.3f}, {speed:,.0f} characters/s", refresh=False
            )

    compared = min(50, options.steps)
    difference = max(abs(a - b) for a, b in zip(ours.losses[:compared], theirs.losses[:compared]))
    bigram = bigram_loss(data, len(alphabet))
    print(f"\n{'':34}{'rnn.RNN':>10}{'torch.nn.RNN':>14}")
    print(f"{'loss at the start':34}{ours.losses[0]:10.4f}{theirs.losses[0]:14.4f}")
    both = f"{ours.losses[compared - 1]:10.4f}{theirs.losses[compared - 1]:14.4f}"
    print(f"{f'loss at step {compared}':34}{both}")
    print(f"{'final loss (mean of 50 steps)':34}{ours.final:10.4f}{theirs.final:14.4f}")
    print(f"{'seconds':34}{ours.seconds:10.2f}{theirs.seconds:14.2f}")
    print(f"\n{f'largest difference in {compared} steps':34}{difference:10.1e}")
    print(
        f"{'loss of the best bigram guess':34}{bigram:10.4f}   "
        f"{'beaten' if ours.final < bigram else 'not beaten: more --steps are needed'}"
    )
    print(f"{'torch.nn.RNN seconds / ours':34}{theirs.seconds / ours.seconds:10.2f}")

    prompt = data[: options.length].to(options.device)
    written = sample(first, prompt, 400)
    print("\nIt writes:\n" + "".join(alphabet[i] for i in written.tolist()))
    if rank == 0:
        plot(options.plot, ours.losses, theirs.losses, bigram)
    print(f"\nLoss curves: {options.plot}")
    if processes > 1:
        distributed.destroy_process_group()


def plot(path: str, ours: list[float], theirs: list[float], bigram: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(theirs, label="torch.nn.RNN", linewidth=3, alpha=0.4)
    axes.plot(ours, label="rnn.RNN", linewidth=1)
    axes.axhline(bigram, label="best bigram guess", color="gray", linestyle=":")
    axes.set(xlabel="step", ylabel="loss (nats per character)", ylim=(0, math.ceil(max(ours))))
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
