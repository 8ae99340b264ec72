"""Scratch memory that is kept from call to call: whose it is; and large arrays."""

import copy
import gc
import io
import signal
import threading
from pathlib import Path
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

T = 6
B = 3
H = 5


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
def test_calls_at_the_same_time(name: str) -> None:
    """The outputs and activations of each are its own, in whatever order gradients are asked
    for."""
    ours, theirs = layers(name)
    for _ in range(3):
        xs = [torch.randn(T, B, H, requires_grad=True) for _ in range(3)]
        ys = [ours(x)[0] for x in xs]
        exact = [theirs(x.double())[0] for x in xs]
        for k in (1, 2, 0):
            near(gradients(ours, xs[k], ys[k]), gradients(theirs, xs[k], exact[k]))
        near([y.double() for y in ys], exact)


def test_large_arrays_are_of_huge_pages() -> None:
    """The system is asked for them where an array is written: the first touch by small pages takes
    long."""
    maps = Path("/proc/self/smaps")
    if not maps.exists() or "VmFlags" not in maps.read_text():
        pytest.skip("this system does not say of what pages memory is")
    if not dispatch.native_available(cells.rnn_tanh, torch.float32):
        pytest.skip("there is no C++ compiler")
    y = rnn.RNN(8, 512)(torch.randn(64, 128, 8))[0]
    middle = y.data_ptr() + y.nbytes // 2
    flags = ""
    inside = False
    for line in maps.read_text().splitlines():
        key = line.split()[0]
        if not key.endswith(":"):
            first, _, end = key.partition("-")
            inside = int(first, 16) <= middle < int(end, 16)
        elif inside and key == "VmFlags:":
            flags = line
    assert y.nbytes == 2**24 and " hg" in flags


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


def test_as_any_tensor() -> None:
    """What users do with an output: it is in torch's own memory, whatever its size."""
    layer = rnn.RNN(H, H)
    x = torch.randn(T, B, H)
    y = layer(x)[0].detach()
    assert y.untyped_storage().resizable()
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
