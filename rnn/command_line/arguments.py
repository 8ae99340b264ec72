"""The arguments that describe a layer, and the layer that they describe."""

import argparse
from typing import Any, NoReturn

import torch
from torch import Tensor

CELLS = ("rnn", "rnn_relu", "lstm", "gru")
DTYPES = ("float32", "float64", "float16", "bfloat16")
CLASSES = dict(rnn="RNN", rnn_relu="RNN", lstm="LSTM", gru="GRU")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help says more)\n")


def positive(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def device(text: str) -> torch.device:
    """One that torch can use here."""
    try:
        found = torch.device(text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r} here: {first}") from error
    if found.type == "meta":
        raise argparse.ArgumentTypeError("a layer on 'meta' computes nothing")
    return found


def add_layer(parser: argparse.ArgumentParser) -> None:
    """All but the cell."""
    parser.add_argument("--batch", type=positive, default=16, help="sequences (%(default)s)")
    parser.add_argument(
        "--time", type=positive, default=128, help="steps of a sequence (%(default)s)"
    )
    parser.add_argument("--input", type=positive, help="input size (that of --hidden)")
    parser.add_argument("--hidden", type=positive, default=256, help="hidden units (%(default)s)")
    parser.add_argument("--layers", type=positive, default=1, help="layers (%(default)s)")
    parser.add_argument("--bidirectional", action="store_true", help="both directions")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(%(default)s)")
    parser.add_argument(
        "--device", type=device, default="cpu", help="cpu, cuda, cuda:1 ... (%(default)s)"
    )


def input_size(arguments: argparse.Namespace) -> int:
    given: int | None = arguments.input
    hidden: int = arguments.hidden
    return hidden if given is None else given


def layer(arguments: argparse.Namespace, package: Any) -> Any:
    """The layer, of `torch.nn` or of this package; the same one for the same seed."""
    options: dict[str, Any] = dict(
        num_layers=arguments.layers,
        bidirectional=arguments.bidirectional,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
    )
    if CLASSES[arguments.cell] == "RNN":
        options["nonlinearity"] = "relu" if arguments.cell == "rnn_relu" else "tanh"
    return getattr(package, CLASSES[arguments.cell])(
        input_size(arguments), arguments.hidden, **options
    )


def sample(arguments: argparse.Namespace) -> Tensor:
    """An input [T, B, I] for it."""
    return torch.randn(
        arguments.time,
        arguments.batch,
        input_size(arguments),
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
    )
