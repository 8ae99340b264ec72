"""What is measured, by device and suite: cases are data."""

from itertools import product
from typing import NamedTuple

GATES = {"tanh": 1, "relu": 1, "lstm": 4, "gru": 3}
DTYPES = ("float32", "tf32", "default", "float16", "bfloat16", "float64")
FORMS = ("padded", "packed", "streaming")


class Case(NamedTuple):
    """A layer and its input. `I` of 0 is H; dtype tf32 is float32 where products may be in TF32,
    float32 where they may not, default where torch's switches are as they are. Packed sequences
    have lengths drawn from 1 to T; streaming is T calls of one step each, without gradients, that
    pass the state on; `hx` gives an initial state."""

    B: int
    T: int
    H: int
    I: int = 0
    cell: str = "tanh"
    dtype: str = "float32"
    form: str = "padded"
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    batch_first: bool = False
    hx: bool = False

    @property
    def inputs(self) -> int:
        return self.I or self.H

    @property
    def trains(self) -> bool:
        return self.form != "streaming"

    @property
    def options(self) -> str:
        """What is not a size, a cell or a dtype, and not as usual."""
        unusual = {
            k: v
            for k, v in self._asdict().items()
            if k in Case._fields[6:] and v != Case._field_defaults[k]
        }
        return " ".join(
            k if v is True else v if k == "form" else f"{k}={v}" for k, v in unusual.items()
        )

    def flop(self, steps: int) -> int:
        """Floating-point operations of the matrix products of a forward pass over so many steps of
        one sequence. Backward has twice as many."""
        directions = 1 + self.bidirectional
        widths = [self.inputs, *[directions * self.H] * (self.layers - 1)]
        return (
            steps
            * directions
            * sum(2 * GATES[self.cell] * self.H * (width + self.H) for width in widths)
        )


def _with(dtypes: str, *cases: Case) -> list[Case]:
    return [case._replace(dtype=dtype) for dtype in dtypes.split() for case in cases]


def _cells(cells: str, *cases: Case) -> list[Case]:
    return [case._replace(cell=cell) for case in cases for cell in cells.split()]


_SMOKE = [
    Case(1, 10, 20),
    Case(5, 10, 64, 32, "lstm"),
    Case(5, 10, 32, cell="gru", form="packed", bidirectional=True),
    Case(1, 8, 32, form="streaming"),
]

CPU: dict[str, list[Case]] = {
    "core": _cells(
        "tanh lstm gru",
        Case(1, 32, 32),
        Case(1, 256, 64, 32),
        Case(1, 256, 128),
        Case(1, 32, 512),
        Case(16, 32, 32),
        Case(16, 256, 128),
        Case(16, 128, 256, 32),
        Case(16, 32, 512),
        Case(64, 32, 64),
        Case(64, 128, 128),
        Case(64, 32, 512),
        Case(256, 128, 32),
        Case(256, 32, 256),
        Case(16, 128, 64, form="packed"),
        Case(64, 64, 128, form="packed"),
        Case(1, 64, 64, form="streaming"),
        Case(1, 64, 256, form="streaming"),
        Case(16, 64, 128, form="streaming"),
    ),
    "grid": _cells(
        "tanh lstm gru",
        *(Case(B, T, H) for B, H, T in product((1, 16, 64, 256), (32, 128, 256, 512), (32, 256))),
    ),
    "packed": _cells(
        "tanh lstm gru",
        *(
            Case(B, T, H, form="packed")
            for B, T, H in ((8, 1000, 64), (16, 256, 128), (64, 128, 64), (64, 64, 256))
        ),
    ),
    "dtypes": _with(
        "float32 float16 bfloat16 float64", *_cells("tanh lstm gru", Case(16, 64, 128))
    ),
    "growth": [
        *_cells("tanh lstm gru", *(Case(16, T, 64) for T in (128, 512, 2048, 8192))),
        *_cells("tanh lstm gru", *(Case(B, 64, 64) for B in (1, 4, 16, 64, 256))),
    ],
    "smoke": _SMOKE,
}

GPU: dict[str, list[Case]] = {
    "core": _with(
        "tf32 bfloat16 float16",
        Case(16, 1024, 64),
        Case(64, 1024, 128),
        Case(64, 1024, 256),
        Case(64, 1024, 512),
        Case(64, 1024, 1024),
        Case(16, 1024, 2048),
    ),
    # Where cuDNN has its best kernels: small H in float32, and float16 to H = 1024.
    "must-not-lose": [
        *_with(
            "float16", Case(64, 1024, 512), Case(64, 512, 1024), Case(16, 1024, 768, cell="lstm")
        ),
        *_with("tf32", Case(20, 2048, 64), Case(34, 1406, 120)),
    ],
    # Just past the sizes of those.
    "cliffs": _with(
        "tf32 bfloat16",
        Case(16, 1024, 264),
        Case(6, 4814, 360),
        Case(64, 1024, 384),
        *_cells("lstm", Case(44, 1125, 160), Case(62, 2058, 168), Case(64, 1024, 192)),
    ),
    "long": _with(
        "tf32 bfloat16",
        Case(1, 4096, 128),
        Case(1, 16384, 256),
        Case(4, 4096, 512),
        Case(1, 4096, 1024),
    ),
    "short": _with(
        "tf32 bfloat16", *_cells("tanh lstm gru", Case(64, 128, 128), Case(256, 128, 512))
    ),
    "large": _with("tf32 bfloat16", Case(256, 1024, 1024), Case(256, 512, 2048)),
    # what a user gets who sets no switch
    "defaults": _with(
        "default",
        *_cells("tanh lstm gru", *(Case(64, 1024, H) for H in (128, 256, 512))),
        Case(64, 1024, 256, cell="lstm", form="packed"),
    ),
    "edges": [
        *_with(
            "tf32",
            Case(1, 512, 100),
            Case(7, 512, 200),
            Case(33, 512, 500),
            Case(129, 512, 128),
            Case(64, 1024, 160, 40),
            Case(64, 512, 256, bidirectional=True),
            Case(64, 512, 256, batch_first=True),
            Case(64, 512, 256, layers=3, dropout=0.1),
            Case(64, 512, 256, layers=3, bidirectional=True),
            Case(64, 512, 256, hx=True),
            *_cells(
                "tanh lstm gru",
                Case(64, 512, 256, form="packed"),
                Case(1, 64, 256, form="streaming"),
            ),
        ),
        *_with("bfloat16", *_cells("gru", Case(64, 1024, 256), Case(64, 1024, 512))),
    ],
    "cells": _with(
        "tf32 bfloat16",
        *_cells("tanh relu lstm gru", Case(64, 1024, 128), Case(64, 1024, 256), Case(64, 512, 512)),
    ),
    "dtypes": _with(
        "tf32 float32 bfloat16 float16 float64", *_cells("tanh lstm gru", Case(64, 256, 256))
    ),
    "growth": _with(
        "bfloat16",
        *_cells(
            "tanh lstm",
            *(Case(16, T, 256) for T in (64, 256, 1024, 4096, 16384)),
            *(Case(B, 256, 256) for B in (1, 4, 64, 256, 1024, 4096)),
        ),
    ),
    "smoke": _SMOKE,
}
SUITES = {"cpu": CPU, "cuda": GPU}
