"""Memory that is kept from call to call: whose it is, how much there is of it, and that the system
can have it back."""

import copy
import gc
import io
import mmap
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnn
from rnn import dispatch
from rnn.kernels import cells
from rnn.kernels.cpu import native
from rnn.kernels.cpu import workspace as memory
from rnn.kernels.plan import Plan
from tests.cases import NAMES, check_recurrence

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_FREE"), reason="this system has no memory to be freed lazily"
)
T = 6
B = 3
H = 5


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """All that lasts is in memory that is kept, which holds NaN when it is had; the pieces that the
    system gave."""
    made: list[Any] = []
    read = torch.frombuffer

    def mapped(*args: Any, **kwargs: Any) -> Any:
        made.append(mmap.mmap(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(memory, "POOLED", 1)
    monkeypatch.setattr(
        memory.torch, "frombuffer", lambda *a, **k: read(*a, **k).fill_(float("nan"))
    )
    monkeypatch.setattr(memory, "mmap", SimpleNamespace(**{**vars(mmap), "mmap": mapped}))
    memory.release()
    yield made
    gc.collect()
    memory.release()


def layers(name: str) -> tuple[Any, Any]:
    ours = getattr(rnn, name)(H, H)
    theirs = getattr(nn, name)(H, H)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.double()


def gradients(layer: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    return [t.double() for t in torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def near(found: list[Tensor], exact: list[Tensor]) -> None:
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_calls_at_the_same_time(name: str, pieces: list[Any]) -> None:
    """Each has memory of its own, until its last tensor is gone; and the next one has it then."""
    ours, theirs = layers(name)
    counts = []
    for _ in range(3):
        xs = [torch.randn(T, B, H, requires_grad=True) for _ in range(3)]
        ys = [ours(x)[0] for x in xs]
        exact = [theirs(x.double())[0] for x in xs]
        for k in (1, 2, 0):
            near(gradients(ours, xs[k], ys[k]), gradients(theirs, xs[k], exact[k]))
        near([y.double() for y in ys], exact)
        del ys
        gc.collect()
        counts.append(len(pieces))
    assert counts[0] == counts[1] == counts[2] > 0
    assert sum(map(len, memory.spare.values())) == counts[0]


def test_views_keep_it(pieces: list[Any]) -> None:
    like = torch.zeros(1)
    row = memory.pooled_empty(like, T, B, H)[2, 1:].copy_(torch.randn(B - 1, H))
    was = row.clone()
    memory.pooled_empty(like, T, B, H).zero_()
    assert len(pieces) == 2 and row.equal(was)


@pytest.mark.parametrize("cell", NAMES)
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
def test_nothing_unwritten_is_read(cell: str, form: str) -> None:
    check_recurrence(cell, Plan("numpy"), (T, B, 4, H), (False, True), form)


def test_threads() -> None:
    ours, theirs = layers("LSTM")
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for steps in range(1, 40):
                x = torch.randn(steps, B, H, generator=generator, requires_grad=True)
                near(gradients(ours, x, ours(x)[0]), gradients(theirs, x, theirs(x.double())[0]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]


def test_lengths_that_vary(pieces: list[Any]) -> None:
    """A factor of 2 in size at most is between those that have the same memory: few pieces,
    whatever lengths come."""
    layer = rnn.GRU(H, H)
    for steps in range(1, 200):
        layer(torch.zeros(steps, B, H))
    assert len({len(piece) for piece in pieces}) == len(pieces) <= 9


def test_the_system_can_have_it() -> None:
    lazy = Path("/proc/self/smaps_rollup")
    if not lazy.exists() or "LazyFree" not in lazy.read_text():
        pytest.skip("this system does not say how much memory it may take")

    def free() -> int:
        return sum(
            int(line.split()[1])
            for line in lazy.read_text().splitlines()
            if line.startswith("LazyFree")
        )

    y = memory.pooled_empty(torch.zeros(1), 2**22).zero_()
    few = [memory.pooled_empty(torch.zeros(1), 2**20).zero_() for _ in range(memory.FEW + 3)]
    before = free()
    del y
    assert free() - before >= 2**14  # KiB
    before = free()
    few.clear()
    assert 3 * 2**12 <= free() - before < 4 * 2**12, "of small ones a few stay"


@pytest.mark.parametrize("fault", ["missing", "refused", "full"])
def test_systems_that_cannot(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is memory like any other."""
    monkeypatch.setattr(memory, "FEW", 0)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no")

    there = {k: v for k, v in vars(mmap).items() if fault != "missing" or k[:4] != "MADV"}
    kind = type("Refusing", (mmap.mmap,), {"madvise": refuse})
    monkeypatch.setattr(
        memory, "mmap", SimpleNamespace(**there | {"mmap": refuse if fault == "full" else kind})
    )
    ours, theirs = layers("LSTM")
    for _ in range(2):
        x = torch.randn(T, B, H, requires_grad=True)
        near(gradients(ours, x, ours(x)[0]), gradients(theirs, x, theirs(x.double())[0]))
    assert not any(memory.spare.values())


def test_as_any_tensor(pieces: list[Any]) -> None:
    """What users do with an output: it is in torch's own memory, whatever its size."""
    layer = rnn.RNN(H, H)
    x = torch.randn(T, B, H)
    y = layer(x)[0].detach()
    assert not pieces and y.untyped_storage().resizable()
    was = y.clone()
    file = io.BytesIO()
    assert y.untyped_storage().nbytes() == 4 * T * B * H
    torch.save(y, file)
    file.seek(0)
    assert (
        torch.load(file).equal(was) and copy.deepcopy(y).equal(was) and y.numpy().shape == (T, B, H)
    )
    assert len(file.getvalue()) < 4000
    y.share_memory_()
    layer(x)
    assert y.is_shared() and y.equal(was)
    assert y.mul_(2).equal(2 * was)


@pytest.mark.parametrize("nested", ["forward", "training", "release"])
def test_a_call_within_a_call(nested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler or a finalizer may run a layer, or give memory back, wherever another call
    of the thread is."""
    if not dispatch.native_available(cells.lstm, torch.float32):
        pytest.skip("there is no C++ compiler")
    theirs = nn.LSTM(H, H)
    ours: Any = rnn.LSTM(H, H, plan=Plan("native"))
    ours.load_state_dict(theirs.state_dict())
    theirs = theirs.double()
    x = torch.randn(T, B, H, requires_grad=True)
    other = torch.randn(2 * T, B, H, requires_grad=True)
    take = memory.scratch
    lent: list[Tensor] = []
    depth = 0

    def scratch(like: Tensor, size: int) -> Tensor:
        nonlocal depth
        mine = take(like, size).fill_(7)  # whoever else has it finds out
        lent.append(mine)
        if depth == 0:
            depth += 1
            if nested == "release":
                memory.release()
            else:
                with torch.enable_grad():
                    y = ours(other)[0]
                    if nested == "training":
                        torch.autograd.grad(y.sum(), other)
            depth -= 1
        assert (mine == 7).all()
        return mine

    monkeypatch.setattr(native, "scratch", scratch)
    want = theirs(x.double())[0]
    y = ours(x)[0]
    near([y.double()], [want])
    near(gradients(ours, x, y), gradients(theirs, x, want))
    assert depth == 0 and len(lent) >= 2
    lent.clear()
    addresses = {take(x, 1).data_ptr() for _ in range(3)}
    assert len(addresses) == 1, "one after the other they get the same"


def test_memory_that_an_exception_holds() -> None:
    """A traceback that somebody keeps, with what a call worked in, does not cost every later
    call."""
    like = torch.zeros(1)
    held = memory.scratch(like, 100)
    after = [memory.scratch(like, 100).data_ptr() for _ in range(3)]
    assert len(set(after)) == 1 and held.data_ptr() not in after


def test_a_signal_at_any_time() -> None:
    """Its handler trains a layer and gives memory back, between whatever two operations of a call
    it comes."""
    ours, theirs = layers("GRU")
    x = torch.randn(T, B, H, requires_grad=True)
    other = torch.randn(2 * T, B, H)
    exact = theirs(x.double())[0]
    wanted = gradients(theirs, x, exact)
    handled = 0

    def handle(*_: Any) -> None:
        nonlocal handled
        handled += 1
        with torch.no_grad():
            ours(other)
        memory.release()
        signal.setitimer(signal.ITIMER_REAL, 1e-3)

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    try:
        for _ in range(300):
            y = ours(x)[0]
            near([y.double()], [exact])
            near(gradients(ours, x, y), wanted)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled > 10


def test_a_finalizer_that_runs_a_layer() -> None:
    ours, theirs = layers("RNN")
    x = torch.randn(T, B, H, requires_grad=True)
    exact = theirs(x.double())[0]

    class Cycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            with torch.no_grad():
                ours(x)
            memory.release()

    thresholds = gc.get_threshold()
    gc.set_threshold(20)
    try:
        for _ in range(100):
            Cycle()
            y = ours(x)[0]
            near(gradients(ours, x, y), gradients(theirs, x, theirs(x.double())[0]))
            near([y.double()], [exact])
    finally:
        gc.set_threshold(*thresholds)
