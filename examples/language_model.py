"""Trains a character language model, and writes text with it.

Truncated backpropagation through time: the text is cut into parallel streams, each step reads the
next characters of every stream, and the hidden state is carried over from step to step, without its
gradient. The baseline is the best guess from the character before (the bigram).

The default text is English that is on every machine: the help texts of Python's standard library.

Under torchrun every process takes its share of the streams, and the gradients are averaged over
all."""

import argparse
import builtins
import importlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

import training


class Batch(NamedTuple):
    text: Tensor  # [T + 1, B]
    begins: bool  # whether it is where the streams begin


class LanguageModel(nn.Module):
    """With the cell rnn: h_t = tanh(W_xh x_t + W_hh h_{t-1} + b), y_t = W_hy h_t + b_y, where y_t
    scores the next character."""

    def __init__(
        self, layer: Callable[[int, int], nn.Module], characters: int, hidden: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.rnn = layer(hidden, hidden)
        self.output = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """text [T, B] -> scores [T, B, characters] and the last state [1, B, hidden], of an LSTM
        two."""
        h, state = self.rnn(self.embedding(text), state)
        return self.output(h), state


class TruncatedLoss:
    """The cross entropy of a batch, from the state that the model had after the one before."""

    def __init__(self) -> None:
        self.states: dict[nn.Module, Any] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        state = None if batch.begins else self.states[model]
        scores, state = model(batch.text[:-1], state)
        lstm = isinstance(state, tuple)
        self.states[model] = tuple(s.detach() for s in state) if lstm else state.detach()
        return nn.functional.cross_entropy(scores.flatten(0, 1).float(), batch.text[1:].flatten())


def stream_batches(text: Tensor, batch: int, length: int, share: slice) -> Iterator[Batch]:
    """Forever: the next length + 1 characters of a share of `batch` streams."""
    streams = text[: len(text) // batch * batch].view(batch, -1).t()[:, share].contiguous()
    while True:
        for start in range(0, len(streams) - length, length):
            yield Batch(streams[start : start + length + 1], start == 0)


def bigram_loss(text: Tensor, characters: int) -> float:
    """Nats per character of the best guess from the character before, with counts from this very
    text."""
    counts = torch.bincount(text[:-1] * characters + text[1:], minlength=characters**2).view(
        characters, characters
    )
    probability = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return -(counts * probability.clamp(min=1e-30).log()).sum().item() / (len(text) - 1)


@torch.no_grad()
def sample(model: LanguageModel, prompt: Tensor, length: int, temperature: float) -> Tensor:
    """`length` characters that follow prompt [T], one at a time."""
    scores, state = model(prompt[:, None])
    out = []
    for _ in range(length):
        out.append(torch.multinomial((scores[-1, 0].float() / temperature).softmax(0), 1))
        scores, state = model(out[-1][:, None], state)
    return torch.cat(out)


def read_text(path: Path | None) -> str:
    if path is not None:
        return training.read_text(path)
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(__doc__, cell="rnn", steps=800, rate=2e-3)
    option = parser.add_argument
    positive = training.positive
    option("--text", dest="data", type=Path, metavar="PATH", help="the same as --data: UTF-8 text")
    option("--hidden", type=positive, default=256, help="hidden units (default: %(default)s)")
    option("--batch", type=positive, default=32, help="streams of text (default: %(default)s)")
    option("--length", type=positive, default=64, help="steps of a batch (default: %(default)s)")
    option("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    option("--temperature", type=float, default=0.7, help="of the sample (default: %(default)s)")
    option("--prompt", help="what the sample follows (default: the text's first characters)")
    option("--plot", type=Path, help="the loss curves (default: language_model.png in --out)")
    quick = {"steps": 60, "hidden": 64, "batch": 16, "length": 32, "rate": 0.01}
    options = training.parse(parser, arguments, **quick)
    if not options.temperature > 0:
        training.fail(f"--temperature {options.temperature}: a number above 0 is needed")
    return options


def start_process(options: argparse.Namespace) -> tuple[int, int]:
    """This process's rank among those that torchrun has started, and their number."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if options.device == "cuda" else "gloo")
    processes = distributed.get_world_size()
    if options.batch % processes:
        training.fail(f"--batch {options.batch} cannot be shared by {processes} processes")
    return distributed.get_rank(), processes


def encode(text: str, alphabet: list[str], name: str) -> Tensor:
    index = {character: i for i, character in enumerate(alphabet)}
    unknown = sorted(set(text) - set(alphabet))
    if unknown:
        training.fail(f"{name} has characters that the text has not: {unknown}")
    return torch.tensor([index[character] for character in text])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    text = read_text(options.data)
    needed = options.batch * (options.length + 1)
    if len(text) < needed:
        training.fail(
            f"the text has {len(text)} characters; {needed} are needed, or a smaller --batch or "
            "--length"
        )
    alphabet = sorted(set(text))
    data = encode(text, alphabet, "the text")
    prompt = encode(options.prompt or text[: options.length], alphabet, "--prompt")
    rank, processes = start_process(options)
    # The first process speaks for all.
    say = builtins.print if rank == 0 else lambda *_: None

    model = LanguageModel(training.layer(options.cell), len(alphabet), options.hidden)
    model.to(options.device, getattr(torch, options.dtype))
    if options.data is None:
        say("Data: pydoc_data.topics of Python's standard library\nLicence: PSF-2.0")
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{len(text):,} characters, {len(alphabet)} different; {parameters:,} parameters in "
        f"{options.dtype} on {options.device}"
    )
    share = slice(rank, None, processes)
    batches = stream_batches(data.to(options.device), options.batch, options.length, share)
    runs = training.train(model, TruncatedLoss(), batches, options)
    bigram = bigram_loss(data, len(alphabet))
    written = sample(model, prompt.to(options.device), 400, options.temperature)
    if rank == 0:
        report(options, runs, bigram)
        print("\nIt writes:\n" + "".join(alphabet[i] for i in written.tolist()))
    if processes > 1:
        distributed.destroy_process_group()


def report(options: argparse.Namespace, runs: list[training.Run], bigram: float) -> None:
    training.print_comparison(runs)
    characters = options.batch * options.length * options.steps
    loss = runs[0].final
    rows = [
        ("best bigram guess", f"{bigram / math.log(2):.3f}"),
        (runs[0].name, f"{loss / math.log(2):.3f}"),
    ]
    training.print_table("", ["bits per character"], rows)
    print("The bigram is", "beaten" if loss < bigram else "not beaten: more --steps are needed")
    print(f"{characters / runs[0].seconds:,.0f} characters/s")
    path = options.plot or options.out / "language_model.png"
    pyplot = training.pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    training.plot_losses(axes, runs, "nats per character", best_bigram_guess=bigram)
    figure.savefig(path, dpi=100)
    print(f"Loss curves: {path}")


if __name__ == "__main__":
    main()
