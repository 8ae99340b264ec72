"""How the host goes through time in launch scope: by blocks in a CUDA graph, for which there is a stand-in here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import check_recurrence
from test_gpu import plan_for

from rnn.kernels import cells, gpu, replay
from rnn.kernels.plan import Rows


class Machine:
    """Kernels that run in the interpreter, except while a graph captures them. With a table, the tensors they are
    called with hold nothing but NaN: what they need must come from the table."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs, self.replays, self.plain, self.stream = list[list[Any]](), 0, 0, 0
        self.capturing: list[Any] | None = None
        self.by_user, machine = False, self

        class Graph:
            def capture_begin(self, capture_error_mode: str) -> None:
                machine.capturing = self.launches = list[Any]()

            def capture_end(self) -> None:
                machine.graphs.append(self.launches)
                machine.capturing = None

            def replay(self) -> None:
                machine.replays += 1
                for launch in self.launches:
                    launch()

        class Stream:
            @property
            def cuda_stream(self) -> int:
                return machine.stream

            def __enter__(self) -> None: ...
            def __exit__(self, *_: Any) -> None: ...

        class Kernel:
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *arguments, **options: machine.launch(self.kernel[grid], arguments, options)

        for name, value in (("CUDAGraph", Graph), ("Stream", Stream), ("current_stream", Stream),
                            ("stream", lambda stream: stream), ("is_current_stream_capturing", lambda: self.by_user)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(replay, "STEPS", 4)
        for name in ("forward_kernel", "backward_kernel"):
            monkeypatch.setattr(gpu, name, Kernel(getattr(gpu, name)))

    def launch(self, run: Any, arguments: Any, options: Any) -> None:
        table, rest = arguments[0], arguments[1:]
        if table is None:
            self.plain += 1
        else:
            rest = [torch.full_like(a, 77 if a.dtype != torch.bool and not a.is_floating_point() else float("nan"))
                    if isinstance(a, torch.Tensor) else a for a in rest]
        if self.capturing is None:
            run(table, *rest, **options)
        else:
            self.capturing.append(lambda: run(table, *rest, **options))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def check(T: int, cell: str = "rnn_tanh", form: str = "padded", resets: bool = False, seed: int = 2) -> None:
    check_recurrence(cell, plan_for("launch", 18), (T, 3, 3, 18), (False, True), form, resets, seed=seed)


def test_one_graph_for_any_steps_and_tensors(machine: Machine) -> None:
    for seed, T in enumerate((4, 9, 5, 9)):  # whole blocks, remainders of 1, one and many; backward has T + 1 steps
        before = machine.replays
        check(T, seed=seed)
        assert machine.replays - before == -(-T // 4) + -(-(T + 1) // 4)
    assert [len(launches) for launches in machine.graphs] == [4, 4], "one for forward, one for backward"
    assert machine.plain == 0


@pytest.mark.parametrize(("cell", "form", "resets"), [("lstm", "packed", True), ("gru", "lengths", False)])
def test_everything_a_layer_is_given(machine: Machine, cell: str, form: str, resets: bool) -> None:
    check(6, cell, form, resets)
    assert len(machine.graphs) == 2 and machine.plain == 0


def test_a_stream_has_its_own(machine: Machine) -> None:
    for machine.stream in (1, 2, 1):
        check(5)
    assert len(machine.graphs) == 4


def test_few_steps_are_launched(machine: Machine) -> None:
    check(2)
    assert not machine.graphs and machine.plain == 2 + 3


def test_a_capture_of_the_users_gets_plain_launches(machine: Machine) -> None:
    machine.by_user = True
    check(5)
    assert not machine.graphs and machine.plain == 5 + 6


def test_tensors_that_begin_anywhere_get_plain_launches(machine: Machine) -> None:
    x, w, s = torch.randn(5 * 3, 18), torch.randn(18, 18) / 5, torch.zeros(1, 3, 18)
    plan, rows = plan_for("launch", 18), Rows(5, [0])
    odd = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    want = gpu.forward(cells.rnn_tanh, plan, rows, x, w, None, s, 0)[0]
    assert len(machine.graphs) == 1 and machine.plain == 0
    assert torch.equal(gpu.forward(cells.rnn_tanh, plan, rows, odd, w, None, s, 0)[0], want)
    assert machine.plain == 5


def test_a_capture_that_failed_is_made_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        if machine.capturing:
            raise torch.OutOfMemoryError
        launch(*_)

    launch = machine.launch
    monkeypatch.setattr(machine, "launch", fail)
    with pytest.raises(torch.OutOfMemoryError):
        check(6)
    assert machine.capturing is None
    monkeypatch.setattr(machine, "launch", launch)
    check(6)
