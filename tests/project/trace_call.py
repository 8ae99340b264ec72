"""Prints the files of rnn that lie on the way of an LSTM's call to its kernel, and all others that
it asks on that way.

python tests/project/trace_call.py [inference]"""

import sys
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import rnn

ROOT = Path(rnn.__file__).resolve().parent.parent
KERNEL = "kernels/cpu/native.py"


class Trace(NamedTuple):
    """Files in order: those whose functions are not yet done when the kernel's is called, and the
    others that are called before."""

    way_in: list[str]
    asked: list[str]


def _file(frame: FrameType) -> str:
    """A source file of ours, as it is called in the repository, or ""."""
    path = Path(frame.f_code.co_filename).resolve()
    if not path.is_relative_to(ROOT) or "site-packages" in path.parts:
        return ""
    name = str(path.relative_to(ROOT))
    return name if name.startswith(("rnn/", "kernels/")) else ""


def trace(call: Any) -> Trace:
    ways: list[list[str]] = []
    asked: list[str] = []

    def note(frame: FrameType | None, event: str, _: Any) -> None:
        if event != "call" or frame is None or not _file(frame):
            return
        asked.append(_file(frame))
        if _file(frame) == KERNEL and not ways:
            way = []
            while frame is not None:
                way.append(_file(frame))
                frame = frame.f_back
            ways.append([name for name, _ in groupby(filter(None, reversed(way)))])

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    way_in = ways[0] if ways else []
    return Trace(way_in, [name for name in dict.fromkeys(asked) if name not in way_in])


def lstm_call(grad: bool) -> Trace:
    layer = rnn.LSTM(8, 16)
    x = torch.randn(5, 2, 8)
    layer(x)[0].sum().backward()  # compiled, imported and chosen
    with torch.set_grad_enabled(grad):
        return trace(lambda: layer(x))


def main() -> None:
    found = lstm_call("inference" not in sys.argv)
    print("on the way in:", *found.way_in, sep="\n  ")
    print("asked on the way:", *found.asked, sep="\n  ")


if __name__ == "__main__":
    main()
