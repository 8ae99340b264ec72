"""Times a layer: ours against that of torch.nn, in turns, forward and in training."""

import argparse

import torch
from torch import nn

from .. import modules
from ..explain import explain
from . import arguments, machine
from .timing import compare, forward, train


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cell", choices=arguments.CELLS, default="lstm", help="(%(default)s)")
    arguments.add_layer(parser)
    parser.add_argument(
        "--seconds",
        type=arguments.seconds,
        default=3.0,
        help="for each of forward and training (%(default)s)",
    )


def run(given: argparse.Namespace) -> int:
    torch.manual_seed(0)
    theirs = arguments.layer(given, nn)
    ours = arguments.layer(given, modules)
    ours.load_state_dict(theirs.state_dict())
    x = arguments.sample(given)
    directions = "two directions" if given.bidirectional else "one direction"
    print(
        f"{given.cell} B={given.batch} T={given.time} I={x.shape[-1]} H={given.hidden}, "
        f"{given.layers} layer{'s' * (given.layers > 1)}, {directions}, {given.dtype}"
    )
    print(machine.conditions(x.device))
    print(explain(ours, x))
    print(f"{'median of a call':18}{'torch.nn':>12}{'rnn':>12}{'ratio':>8}")
    for name, call in (("forward", forward), ("training", train)):
        found = compare(call, theirs, ours, x, given.seconds)
        print(
            f"{name:18}{machine.duration(found.theirs):>12}{machine.duration(found.ours):>12}"
            f"{found.theirs / found.ours:8.2f}   {found.rounds} calls of each, in turns",
            flush=True,
        )
    print("A ratio above 1 says that rnn is faster.")
    return 0
