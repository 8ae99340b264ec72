"""A few cases of each fuzzer, and the oracle that they share against torch.nn."""

import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests import cases, fuzz_layouts, fuzzing
from tests.cases import lengths_of
from tests.fuzzing import ByCells, place, plain
from tests.kernels.cpu.test_cpu import KINDS


@pytest.mark.parametrize("name", ["fuzz_layouts", "fuzz_arguments"])
def test_cases(name: str, request: pytest.FixtureRequest) -> None:
    """In a process of their own, which they may end."""
    count = request.config.getoption("--cases")
    found = fuzzing.run(f"tests.{name}", 0, count, 1)
    assert not found, fuzzing.report(found, f"tests.{name}", 0)


@pytest.mark.parametrize("index", range(40))
def test_layouts_in_poisoned_memory(index: int) -> None:
    """In this process, in which fresh memory holds NaN."""
    found = fuzz_layouts.check(1, index)
    assert not found, found


@pytest.mark.parametrize(("mode", "nonlinearity"), KINDS)
@pytest.mark.parametrize("form", ["padded", "unbatched", "packed", "unsorted", "lengths"])
@pytest.mark.parametrize("proj", [0, 2], ids=["", "projection"])
def test_the_oracle(mode: str, nonlinearity: str, form: str, proj: int) -> None:
    """It is as torch.nn, also where that has no `lengths`."""
    if proj and mode != "LSTM":
        pytest.skip("torch.nn has projections for LSTM alone")
    case = cases.Case(
        5,
        1 if form == "unbatched" else 4,
        3,
        6,
        form,
        2,
        True,
        nonlinearity or "tanh",
        batch_first=True,
        dtype=torch.float64,
        mode=mode,
        proj=proj,
    )
    module = cases.build(nn, case, dtype=torch.float64)
    x = torch.randn(case.B, case.T, case.I, dtype=torch.float64)
    widths = (proj or 6, 6) if mode == "LSTM" else (6,)
    states = [torch.randn(4, case.B, width, dtype=torch.float64) for width in widths]
    hx: Any = tuple(states) if mode == "LSTM" else states[0]
    if form == "lengths":
        got = ByCells(module)(x, hx, lengths=lengths_of(case))
        y, ends = cases.one_by_one(module, x.transpose(0, 1), states, lengths_of(case))
        want: Any = (y.transpose(0, 1), tuple(ends) if mode == "LSTM" else ends[0])
    else:
        given: Any = x
        if form == "unbatched":
            given = x[0]
            hx = tuple(s[:, 0] for s in hx) if mode == "LSTM" else hx[:, 0]
        elif form != "padded":
            given = pack_padded_sequence(x, lengths_of(case), True, form == "packed")
        got = ByCells(module)(given, hx)
        want = module(given, hx)
    torch.testing.assert_close(fuzz_layouts.flat(got), fuzz_layouts.flat(want))


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.bool],
)
def test_layouts_are_what_they_say(dtype: torch.dtype) -> None:
    """Every layout is drawn, holds the values of the data where it can, and some are what kernels
    cannot read."""
    drawn: dict[str, set[bool]] = {}
    for seed in range(300):
        rng = random.Random(seed)
        data = (torch.randn(2, 3, 4) * 9).to(dtype)
        t, name = place(rng, data)
        assert t.shape == data.shape and t.dtype == dtype
        if name not in ("expanded", "overlapping", "zero", "flipped", "negative", "conjugate"):
            assert torch.equal(plain(t), data)
        drawn.setdefault(name, set()).add(t.is_contiguous() and not t.is_neg() and not t.is_conj())
    assert drawn.keys() == {"contiguous", *fuzzing.layouts(dtype, True)}
    assert False in drawn["permuted"] and False in drawn["sliced"] and False in drawn["expanded"]
