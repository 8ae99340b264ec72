"""Says what computes a layer: its backend, its plan and why. Nothing is computed."""

import argparse

from .. import modules
from ..explain import explain
from . import arguments


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cell", choices=arguments.CELLS, help="kind of layer")
    arguments.add_layer(parser)


def run(given: argparse.Namespace) -> int:
    print(explain(arguments.layer(given, modules), arguments.sample(given)))
    return 0
