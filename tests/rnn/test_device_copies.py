"""Integers that callers have on the CPU, on a GPU (a stand-in here): copied once, and never while
a CUDA graph is captured."""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rnn import device_copies
from rnn.checks import as_tensor
from rnn.device_copies import kept_on_device, on_device
from rnn.kernels import cells
from rnn.kernels.plan import Plan
from rnn.kernels.types import Layout
from rnn.layer_call import LayerCall
from rnn.layer_types import Masks

DEVICE = torch.device("cuda", 0)


class Gpu:
    """Counts what is copied to it; its tensors are really on the CPU."""

    def __init__(self) -> None:
        self.capturing = False
        self.stream = 1
        self.copies = list[Tensor]()
        self.waits = 0
        self.recorded = 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    machine = Gpu()
    real_to: Callable[..., Tensor] = Tensor.to

    def to(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and args[0] == DEVICE:
            machine.copies.append(t)
            assert not machine.capturing, "each replay would read memory that is freed by then"
            return t.clone()
        return real_to(t, *args, **kwargs)

    def wait_event(_: Any) -> None:
        machine.waits += 1

    def record_stream(*_: Any) -> None:
        machine.recorded += 1

    for name, value in (
        ("device", lambda _: nullcontext()),
        (
            "current_stream",
            lambda: SimpleNamespace(wait_event=wait_event, cuda_stream=machine.stream),
        ),
        ("is_current_stream_capturing", lambda: machine.capturing),
        ("Event", lambda: SimpleNamespace(record=lambda _: None)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    monkeypatch.setattr(device_copies, "_kept", OrderedDict())
    monkeypatch.setattr(device_copies, "_captured", {})
    return machine


def lengths(*numbers: int) -> Tensor:
    return torch.tensor(numbers)


def test_copied_once(gpu: Gpu) -> None:
    first = on_device("lengths", lengths(3, 2, 1), DEVICE)
    again = on_device("lengths", lengths(3, 2, 1), DEVICE)
    assert again is first and first.tolist() == [3, 2, 1]
    others = [
        on_device("lengths", lengths(3, 2, 2), DEVICE),
        on_device("lengths", lengths(3, 2, 1).int(), DEVICE),
        on_device("lengths", lengths(3, 2, 1)[None], DEVICE),
    ]
    assert [t.tolist() for t in others] == [[3, 2, 2], [3, 2, 1], [[3, 2, 1]]]
    assert len(gpu.copies) == 4


def test_the_callers_memory_is_not_looked_at_again(gpu: Gpu) -> None:
    mine = lengths(3, 2, 1)
    found = on_device("lengths", mine, DEVICE)
    mine[0] = 9
    assert on_device("lengths", mine, DEVICE).tolist() == [9, 2, 1]
    assert found.tolist() == [3, 2, 1]


def test_another_stream_waits(gpu: Gpu) -> None:
    on_device("lengths", lengths(3, 2), DEVICE)
    on_device("lengths", lengths(3, 2), DEVICE)
    assert gpu.waits == 0
    gpu.stream = 2
    on_device("lengths", lengths(3, 2), DEVICE)
    assert gpu.waits == 1 and gpu.recorded == 1 and len(gpu.copies) == 1


def test_bounded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes; what was used last stays."""
    monkeypatch.setattr(device_copies, "KEPT_BYTES", 3 * 16)
    for k in range(3):
        on_device("lengths", lengths(k, k), DEVICE)
    on_device("lengths", lengths(0, 0), DEVICE)
    on_device("lengths", lengths(3, 3), DEVICE)
    assert len(gpu.copies) == 4 and len(device_copies._kept) == 3
    on_device("lengths", lengths(0, 0), DEVICE)
    assert len(gpu.copies) == 4
    on_device("lengths", lengths(1, 1), DEVICE)
    assert len(gpu.copies) == 5


def test_while_a_graph_is_captured(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call before it left is used, and stays, whatever comes after; the rest is refused."""
    warm = on_device("lengths", lengths(3, 2), DEVICE)
    gpu.capturing = True
    assert on_device("lengths", lengths(3, 2), DEVICE) is warm
    with pytest.raises(RuntimeError, match=r"CUDA graph is being captured, and the lengths.*CPU"):
        on_device("lengths", lengths(3, 1), DEVICE)
    gpu.capturing = False
    monkeypatch.setattr(device_copies, "KEPT_BYTES", 16)
    for k in range(9):
        on_device("lengths", lengths(k, 1), DEVICE)
    assert on_device("lengths", lengths(3, 2), DEVICE) is warm
    assert len(device_copies._kept) == 1


def test_what_tensors_of_a_mode_hold_is_not_kept(gpu: Gpu) -> None:
    class Fake(Tensor):
        pass

    made = kept_on_device("x", lengths(1), DEVICE, lambda: [lengths(1).as_subclass(Fake)])
    assert type(made[0]) is Fake and not device_copies._kept


class Input(NamedTuple):
    """What a call asks of its x."""

    shape: tuple[int, ...]
    device: torch.device = DEVICE
    is_cpu: bool = False


def layout_of(x: Input, *masks: Any) -> Layout:
    plan = Plan("cuda", "block", 16, 8, 0, 1)
    call = LayerCall(cells.lstm, plan, x, Masks(*masks), [0])  # type: ignore[arg-type]
    return call.layout


def test_packed_calls(gpu: Gpu) -> None:
    """One copy for the first of its kind; then none, also under capture."""
    ends = [5, 4, 4, 2, 1]
    sizes = [sum(end > t for end in ends) for t in range(5)]
    for k in range(3):
        gpu.capturing = k == 2
        layout = layout_of(Input((sum(sizes), 3)), None, torch.tensor(sizes), None)
        assert layout.lengths.tolist() == ends
        assert layout.offsets.tolist() == [sum(sizes[:t]) for t in range(5)]
        assert [*layout.sizes] == sizes and layout.sequences == 5
        assert layout.offsets.storage_offset() % 2 == 0, "aligned as ever"
    assert len(gpu.copies) == 1
    with pytest.raises(RuntimeError, match=r"captured, and the batch_sizes of this call"):
        layout_of(Input((9, 3)), None, torch.tensor([5, 4]), None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_padded_calls(gpu: Gpu, dtype: torch.dtype) -> None:
    for k in range(3):
        gpu.capturing = k == 2
        layout = layout_of(Input((4, 2, 3)), torch.tensor([4, 1], dtype=dtype), None, None)
        assert layout.lengths.tolist() == [4, 1] and layout.lengths.dtype == torch.int64
    assert len(gpu.copies) == 1
    with pytest.raises(RuntimeError, match=r"captured, and the lengths of this call"):
        layout_of(Input((4, 2, 3)), torch.tensor([4, 2], dtype=dtype), None, None)


def test_graphs_of_the_benchmark(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It calls a packed case before it captures it: nothing is copied in the capture."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    graphed: Any = importlib.import_module("measure").graphed
    copies = list[int]()

    @contextmanager
    def capture(_: Any) -> Iterator[None]:
        gpu.capturing = True
        yield
        gpu.capturing = False

    def call() -> None:
        layout_of(Input((9, 3)), None, torch.tensor([5, 3, 1]), None)
        copies.append(len(gpu.copies))

    stream = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None, cuda_stream=1)
    for name, value in (
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda _: nullcontext()),
        ("CUDAGraph", lambda: SimpleNamespace(replay=None)),
        ("graph", capture),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    graphed(call)
    assert copies == [1, 1, 1, 1]


def test_lists(gpu: Gpu) -> None:
    """Resets as a list are looked at once; lengths stay on the CPU, where they are checked."""
    for k in range(3):
        gpu.capturing = k == 2
        made = as_tensor("resets", [[True, False]], DEVICE)
        assert made is not None and made.tolist() == [[True, False]]
    assert len(gpu.copies) == 1
    found = as_tensor("lengths", [3, 2])
    assert found is not None and found.is_cpu and len(gpu.copies) == 1
