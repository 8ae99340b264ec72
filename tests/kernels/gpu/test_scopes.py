"""Launch scope: how the host goes through time, in CUDA graphs of several steps (a stand-in
here)."""

import gc
import itertools
import mmap
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton.runtime.errors import OutOfResources

import rnn
from rnn.kernels import cells
from rnn.kernels import gpu as device
from rnn.kernels.gpu.tensors import BackwardTensors, ForwardTensors
from rnn.kernels.gpu.triton_kernels import cuda_graph, kernels
from rnn.kernels.gpu.triton_kernels import launch as gpu
from rnn.kernels.plan import Plan, Slice
from rnn.kernels.types import Layout, Weights
from tests.cases import check_recurrence
from tests.kernels.gpu.test_gpu import check_not_asked_for, plan_for

pytestmark = pytest.mark.interpreted


def useless(t: Any) -> Any:
    """A tensor of its kind, of NaN or of a number that is no index, or a tuple of such."""
    if t is None:
        return None
    if isinstance(t, tuple):
        return tuple(map(useless, t))
    shape = t.shape if t.numel() < 2**20 else (1,)
    return t.new_full(shape, float("nan") if t.is_floating_point() else 77)


class Driver:
    """The part of the CUDA driver's library that captures: graphs are lists of launches, by
    handle. Handles that were destroyed are gone."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine
        self.made = itertools.count(1)
        self.streams = set[int]()
        self.captured = dict[int, list[Any]]()
        self.executables = dict[int, list[Any]]()
        self.modes = list[int]()

    def cuStreamCreate(self, to: Any, flags: int) -> int:
        assert flags == 1, "it would wait for the legacy default stream"
        to._obj.value = next(self.made)
        self.streams.add(to._obj.value)
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        self.streams.remove(stream.value)
        return 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        if stream.value not in self.streams:
            return 400
        self.modes.append(mode)
        self.machine.capturing = []
        return 0

    def cuStreamEndCapture(self, stream: Any, to: Any) -> int:
        to._obj.value = next(self.made)
        self.captured[to._obj.value] = self.machine.capturing or []
        self.machine.capturing = None
        return 0

    def cuGraphInstantiateWithFlags(self, to: Any, graph: Any, flags: Any) -> int:
        assert flags.value == 0
        to._obj.value = next(self.made)
        self.executables[to._obj.value] = self.captured[graph.value]
        self.machine.graphs.append(self.captured[graph.value])
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        del self.captured[graph.value]
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:
        del self.executables[executable.value]
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        assert (stream.value or 0) == self.machine.stream
        self.machine.replays += 1
        for launch in self.executables[executable.value]:
            launch()
        return 0

    def cuGetErrorName(self, status: int, to: Any) -> int:
        to._obj.value = b"CUDA_ERROR_INVALID_HANDLE"
        return 0


class Machine:
    """Kernels that run in the interpreter, except while a graph captures them. With a table, the
    tensors they are called with hold nothing but NaN: what they need must come from the table."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs = list[list[Any]]()
        self.replays = 0
        self.plain = 0
        self.loaded = 0
        self.stream = 0
        self.capturing: list[Any] | None = None
        self.by_user = False
        self.allocator = "native"
        # the pool that a library's workspace would be of
        self.pool: Any = None
        self.driver = Driver(self)
        machine = self

        class Stream:
            def __init__(self, *_: Any) -> None: ...

            @property
            def cuda_stream(self) -> int:
                return machine.stream

            def __enter__(self) -> None: ...
            def __exit__(self, *_: Any) -> None: ...

        class Kernel:
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *arguments, **options: machine.launch(
                    self.kernel[grid], arguments, options
                )

        def registers_a_generator(*_: Any) -> None:
            pytest.fail("other threads could not draw random numbers meanwhile")

        class Pool:
            """Memory that none but its owner gets."""

        @contextmanager
        def use_pool(pool: Pool) -> Iterator[None]:
            assert not self.pool, "torch would take the memory of the outer one"
            self.pool = weakref.ref(pool)
            yield
            self.pool = None

        for name, value in (
            ("MemPool", Pool),
            ("use_mem_pool", use_pool),
            ("CUDAGraph", registers_a_generator),
            ("graph", registers_a_generator),
            ("ExternalStream", Stream),
            ("current_stream", Stream),
            ("stream", lambda stream: stream),
            ("set_stream", lambda _: None),
            ("current_device", lambda: -1),  # that of these tensors
            ("is_current_stream_capturing", lambda: self.by_user),
            ("get_allocator_backend", lambda: self.allocator),
        ):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda_graph, "_library", lambda: self.driver)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(cuda_graph, "STEPS_PER_GRAPH", 4)
        monkeypatch.setattr(torch, "bmm", self.multiply)
        for name in ("forward_kernel", "backward_kernel"):
            monkeypatch.setattr(gpu, name, Kernel(getattr(gpu, name)))

    def multiply(self, *operands: torch.Tensor, out: torch.Tensor, bmm: Any = torch.bmm) -> None:
        """The library's product: a graph has it with the addresses that it was captured with."""
        if self.capturing is None:
            bmm(*operands, out=out)
            return
        pool = self.pool

        def replay() -> None:
            assert pool is not None and pool() is not None, "the workspace is another's by now"
            bmm(*operands, out=out)

        self.capturing.append(replay)

    def launch(self, run: Any, arguments: Any, options: Any) -> None:
        table, tensors, *rest = arguments
        if table is None:
            _, _, start, end, *_ = rest
            self.plain += end > start
            self.loaded += end == start
        else:
            tensors = tensors._make(map(useless, tensors))
        if self.capturing is None:
            run(table, tensors, *rest, **options)
        else:
            self.capturing.append(lambda: run(table, tensors, *rest, **options))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(monkeypatch)
    # graphs are destroyed by the driver that made them
    cuda_graph.step_graph.cache_clear()
    cuda_graph._capture_stream.cache_clear()
    gc.collect()


def check(
    T: int,
    cell: str = "rnn_tanh",
    form: str = "padded",
    resets: bool = False,
    seed: int = 2,
    scope: str = "launch",
) -> None:
    reverse = (False, True) if cell == "lstm" else (True,)
    check_recurrence(cell, plan_for(scope, 18), (T, 3, 3, 18), reverse, form, resets, seed=seed)


def test_one_graph_for_any_steps_and_tensors(machine: Machine) -> None:
    for seed, T in enumerate((4, 9, 6)):  # whole blocks and remainders; backward has T + 1 steps
        before = machine.replays
        check(T, seed=seed)
        assert machine.replays - before == -(-T // 4) + -(-(T + 1) // 4)
    assert [len(launches) for launches in machine.graphs] == [4, 4], (
        "one for forward, one for backward"
    )
    assert machine.plain == 0


@pytest.mark.parametrize(
    ("cell", "form", "resets"), [("lstm", "packed", True), ("gru", "lengths", False)]
)
def test_everything_a_layer_is_given(machine: Machine, cell: str, form: str, resets: bool) -> None:
    check(6, cell, form, resets)
    assert len(machine.graphs) == 2 and machine.plain == 0


@pytest.mark.parametrize("scope", ["launch", "library"])
def test_constants(machine: Machine, scope: str) -> None:
    """What stays, such as the mask of recurrent dropout, is read at each step where it was
    given."""
    layer = rnn.LSTM(3, 18, recurrent_dropout=0.5)
    x = torch.randn(4, 2, 3)
    found = []
    for plan in (plan_for(scope, 18), Plan("numpy")):
        layer.plan = plan
        torch.manual_seed(3)
        y, (h, c) = layer(x, resets=torch.arange(8).view(4, 2) == 5)
        loss = (y.sin() * 2).sum() + h.cos().sum() + c.sin().sum()
        found.append([y, h, c, *torch.autograd.grad(loss, [*layer.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert machine.replays and not machine.plain


@pytest.mark.parametrize(
    ("cell", "form", "resets"),
    [("rnn_relu", "padded", False), ("lstm", "packed", True), ("gru", "lengths", True)],
)
def test_library_products_in_graphs(machine: Machine, cell: str, form: str, resets: bool) -> None:
    """Whole blocks of steps and remainders; the graphs serve any weights."""
    for count, T in enumerate((9, 6)):
        check(T, cell, form, resets, seed=count, scope="library")
    assert machine.plain == 0
    assert len(machine.driver.streams) == 1, "of all captures for this stream"
    # of each step a product and a kernel
    assert [len(launches) for launches in machine.graphs] == [8, 8]


@pytest.mark.parametrize("T", [2, 6])
@pytest.mark.parametrize("form", ["padded", "packed", "lengths"])
def test_library_products_of_what_was_written(
    T: int, form: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a graph for few steps, and with one: fresh memory holds NaN here."""
    bmm = torch.bmm
    seen = list[bool]()

    def noted(a: Tensor, b: Tensor, **options: Any) -> Any:
        if machine.capturing is None:
            seen.append(bool(a.isnan().any()))
        return bmm(a, b, **options)

    monkeypatch.setattr(torch, "bmm", noted)
    check(T, "lstm", form, scope="library")
    assert seen and not any(seen)
    assert bool(machine.graphs) == (T == 6)


@pytest.mark.parametrize(("scope", "form"), [("launch", "padded"), ("library", "lengths")])
def test_steps_not_asked_for(machine: Machine, scope: str, form: str) -> None:
    """In graphs too the rows of h that no gradient comes to are set to 0."""
    check_not_asked_for("rnn_tanh", plan_for(scope, 18), form)
    assert machine.replays and not machine.plain


def check_units_apart(scope: str) -> None:
    """A gradient that comes to a unit of one tile alone is multiplied with h of all units."""
    ours = rnn.RNN(3, 18, plan=plan_for(scope, 18))
    exact = nn.RNN(3, 18).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 3)
    resets = torch.zeros(2, 3, dtype=torch.bool)
    for y in (ours(x, resets=resets)[0], exact(x.double())[0]):
        y[1, :, 17].sum().backward()
    got, want = (dict(layer.named_parameters())["weight_hh_l0"].grad for layer in (ours, exact))
    assert want is not None and want[17].abs().min() > 1e-3
    torch.testing.assert_close(got, want.float())


@pytest.mark.parametrize("scope", ["launch", "library"])
def test_a_gradient_of_few_units(scope: str) -> None:
    check_units_apart(scope)


@pytest.mark.parametrize("fault", ["no rows", "rows of another direction", "rows of the launch"])
def test_rows_that_are_wrongly_set_to_0_are_found(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = kernels.mark_rows
    zero = kernels.zero_unmarked
    steps = list[Any]()

    def mark_rows(tensors: Any, step: Any, *rest: Any) -> None:
        steps.append(step)
        mark(tensors, step, *rest)

    def zero_rows(tensors: Any, last: Any, tile: Any, *rest: Any) -> None:
        if fault == "rows of another direction":
            zero(tensors, last, tile._replace(n=1 - tile.n), *rest)
        elif fault == "rows of the launch":
            zero(tensors, steps[-1], tile, *rest)

    monkeypatch.setattr(kernels, "mark_rows", mark_rows)
    monkeypatch.setattr(kernels, "zero_unmarked", zero_rows)
    check = partial(check_not_asked_for, "rnn_tanh", plan_for("launch", 18), "lengths")
    if fault == "rows of the launch":
        check = partial(check_units_apart, "launch")
    with pytest.raises(AssertionError):
        check()


def check_two_layers() -> None:
    for seed in range(2):
        check(9, "gru", seed=seed, scope="library")


@pytest.mark.parametrize("left_out", ["w_hh", "hidden"])
def test_a_library_graph_with_a_callers_tensors_is_found(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """The graph's products would be of what the first call had there."""
    operands = tuple(name for name in gpu.OPERANDS if name != left_out)
    monkeypatch.setattr(gpu, "OPERANDS", operands)
    with pytest.raises(AssertionError):
        check_two_layers()


@pytest.mark.parametrize("allocator", ["cudaMallocAsync", "pluggable"])
def test_an_allocator_without_pools(
    allocator: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library's steps are launched one by one; other graphs need none."""

    def refuse() -> None:
        raise RuntimeError(f"{allocator} does not yet support createOrIncrefPool")

    machine.allocator = allocator
    monkeypatch.setattr(torch.cuda, "MemPool", refuse)
    check(6, scope="library")
    assert not machine.graphs and machine.plain == 6 + 7
    check(6)
    assert len(machine.graphs) == 2


def test_threads_that_capture_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one stream, at the same time: their graphs have one workspace, which stays."""
    pools = list[Any]()
    pool = torch.cuda.MemPool

    def made() -> Any:
        time.sleep(0.1)
        pools.append(pool())
        return pools[-1]

    monkeypatch.setattr(torch.cuda, "MemPool", made)
    with ThreadPoolExecutor(2) as threads:
        graphs = [threads.submit(cuda_graph.Graph, lambda: None, True) for _ in range(2)]
        assert [graph.result() for graph in graphs]
    assert len(pools) == len(machine.driver.streams) == 1


@pytest.mark.parametrize("fault", ["none", "let go"])
def test_a_workspace_that_others_get_is_found(
    fault: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch drops the workspaces of cuBLAS whenever it likes: that of a graph must be in memory
    which nobody else is given as long as the graph is replayed."""
    if fault == "none":
        monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda _: nullcontext())
    else:
        # which remembers nothing
        forgotten = lru_cache(maxsize=0)(cuda_graph._capture_stream.__wrapped__)
        monkeypatch.setattr(cuda_graph, "_capture_stream", forgotten)
    with pytest.raises(AssertionError, match="another's by now"):
        check_two_layers()


def test_a_step_without_its_product_is_found(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply = gpu.multiply
    monkeypatch.setattr(
        gpu, "multiply", lambda tensors, u, *precision: u % 4 and multiply(tensors, u, *precision)
    )
    with pytest.raises(AssertionError):
        check_two_layers()


def test_a_stream_has_its_own(machine: Machine) -> None:
    for machine.stream in (1, 2, 1):
        check(4)
    assert len(machine.graphs) == 4


def test_few_steps_are_launched(machine: Machine) -> None:
    check(2)
    assert not machine.graphs and machine.plain == 2 + 3


def test_a_capture_of_the_users_gets_plain_launches(machine: Machine) -> None:
    """Of kernels that the calls before it loaded, whatever they launched."""
    check(5)
    assert machine.loaded == len(machine.graphs) == 2 and machine.plain == 0
    machine.graphs.clear()
    machine.by_user = True
    check(5)
    assert not machine.graphs and machine.plain == 5 + 6


def test_tensors_that_begin_anywhere_get_plain_launches(machine: Machine) -> None:
    x = torch.randn(5 * 3, 7)
    w_ih = torch.randn(18, 7)
    w = torch.randn(18, 18) / 5
    s = torch.zeros(1, 3, 18)
    plan = plan_for("launch", 18)
    rows = Layout(5, [0])
    odd = torch.empty(w.numel() + 1)[1:].view_as(w).copy_(w)
    want = device.forward(cells.rnn_tanh, plan, rows, x, Weights(w_ih, w, None, None), [s], 0).y
    assert len(machine.graphs) == 1 and machine.plain == 0
    got = device.forward(cells.rnn_tanh, plan, rows, x, Weights(w_ih, odd, None, None), [s], 0).y
    assert torch.equal(got, want)
    assert machine.plain == 5


@pytest.mark.parametrize("wrong", [(0, 1), (2, 2), (1, 1)], ids=["first", "late", "forgotten"])
def test_wrong_slices_are_found(wrong: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for("grid", 18)._replace(slice_tiles=1)
    parts = [Slice(0, 1), Slice(*wrong)]
    monkeypatch.setattr(gpu, "slices", lambda *_: parts)
    with pytest.raises(AssertionError):
        check_recurrence("gru", plan, (3, 2 * plan.sequences + 1, 2, 18))


def test_a_capture_that_failed_is_made_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        if machine.capturing:
            raise torch.OutOfMemoryError
        launch(*_)

    launch = machine.launch
    monkeypatch.setattr(machine, "launch", fail)
    with pytest.raises(torch.OutOfMemoryError):
        check(6)
    assert machine.capturing is None and not machine.driver.captured
    monkeypatch.setattr(machine, "launch", launch)
    check(6)


def test_what_triton_refuses_names_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own error too, which is none of Python's kinds; memory that is short stays that."""

    def refuse(error: Exception) -> None:
        class Kernel:
            arg_names = gpu.forward_kernel.arg_names

            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def launch(*_: Any, **__: Any) -> None:
                    raise error

                return launch

        monkeypatch.setattr(gpu, "forward_kernel", Kernel())

    words = r"cpu does not run the plan backend=triton scope=launch"
    for error in (RuntimeError("Triton Error [CUDA]: too large"), OutOfResources(9, 8, "shared")):
        refuse(error)
        with pytest.raises(RuntimeError, match=words) as caught:
            check(3)
        assert caught.value.__cause__ is error and str(error) in str(caught.value)
    refuse(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        check(3)


def test_what_a_capture_leaves(machine: Machine) -> None:
    """Graphs that are let go are freed, and so are the stream and the graph of each capture; what
    other threads do meanwhile does not end it."""
    check(6)
    driver = machine.driver
    assert driver.modes == [2, 2] and len(driver.executables) == 2
    assert not driver.streams and not driver.captured
    cuda_graph.step_graph.cache_clear()
    cuda_graph._capture_stream.cache_clear()
    gc.collect()
    assert not driver.executables


def test_a_refused_capture(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.driver, "cuStreamBeginCapture_v2", lambda *_: 400)
    with pytest.raises(RuntimeError, match=r"cuStreamBeginCapture_v2 failed: CUDA_ERROR_INVALID"):
        check(6)
    assert not machine.driver.streams


def rows_of(count: int, *shape: int) -> torch.Tensor:
    """float16 [*shape[:-1], count, shape[-1]], 0, in memory that is there only where it is
    written."""
    shape = (*shape[:-1], count, shape[-1])
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    memory = mmap.mmap(-1, 2 * torch.Size(shape).numel(), flags=flags)
    return torch.frombuffer(memory, dtype=torch.float16).view(shape)


def test_more_elements_than_32_bits_count(machine: Machine) -> None:
    """The last four steps of a sequence so long that each of its tensors has more, as those of a
    short one."""
    B = 2
    H = 16
    cell = cells.lstm
    plan = plan_for("launch", 16, torch.float16)
    w = torch.randn(4 * H, H).half() / 4
    s0 = torch.randn(2, 1, B, H).half()
    data = torch.randn(9, 5 * B, 4 * H).half()
    found = []
    for T in (5, 2**31 // H // B + 5):
        R = T * B
        x = rows_of(R, 4 * H)
        dr = rows_of(R, 4 * H)
        (y, dy) = rows_of(R, 2, H)
        states = rows_of(R, 1, H)
        saved = rows_of(R, 4, H)
        x[-5 * B :] = data[0]
        no_masks = None, None, None
        given = tuple(s0), tuple(torch.empty_like(s0))
        # In reverse the first steps are the last rows; likewise in the adjoint of a forward pass.
        forward = ForwardTensors(x, None, w, None, None, y, states, saved, *no_masks, *given)
        gpu.launch_steps(cell, plan, Layout(T, [1]), 4, forward, B)
        found.append([t[..., -4 * B :, :].clone() for t in (y, states, saved)])
        for k, t in enumerate((y, dy, states[0], *saved)):
            t[-5 * B :] = data[1 + k, :, :H]
        grads = dy, None, None, dr, None, None
        ends = given[0], *given
        backward = BackwardTensors(w, y, states, saved, *grads, *no_masks, *ends)
        gpu.launch_steps(cell, plan, Layout(T, [0]), 4, backward, B)
        found[-1].append(dr[-4 * B :].clone())
    assert machine.replays == 4 and R * H > 2**31
    for short, long in zip(*found):
        assert short.abs().sum() > 0 and torch.equal(short, long)


def test_what_triton_made_is_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any B and T, with what the kernel's own dispatch would have given it; not for tensors of
    another kind."""
    made = list[dict[str, Any]]()
    again = list[tuple[int, dict[str, Any]]]()
    names = gpu.forward_kernel.arg_names

    class Compiled:
        def __init__(self, number: int) -> None:
            self.number = number

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *given: again.append(
                (self.number, dict(zip(names, given, strict=True), grid=grid))
            )

    class Kernel:
        arg_names = names

        def __getitem__(self, grid: Any) -> Callable[..., Compiled]:
            def launch(*given: Any, **options: Any) -> Compiled:
                made.append({**dict(zip(names, given)), **options, "grid": grid})
                return Compiled(len(made) - 1)

            return launch

    monkeypatch.setattr(gpu, "forward_kernel", Kernel())

    def run(
        T: int,
        B: int,
        cell: cells.Cell = cells.rnn_tanh,
        shift: int = 0,
        dtype: torch.dtype = torch.float32,
        reverse: int = 0,
    ) -> None:
        x, w_ih, s = (
            torch.zeros(shape, dtype=dtype) for shape in ((T * B, 7), (18, 7), (1, B, 18))
        )
        w = torch.zeros(18 * 18 + shift, dtype=dtype)[shift:].view(18, 18)
        weights = Weights(w_ih, w, None, None)
        device.forward(cell, plan_for("block", 18), Layout(T, [reverse]), x, weights, [s], 0)

    run(5, 3)
    run(1, 1)
    run(7, 16)
    assert len(made) == 1 and [number for number, _ in again] == [0, 0]
    assert made[0]["enable_fp_fusion"], "whatever Triton's default is"
    assert {k: again[1][1][k] for k in ("T", "B", "R", "u1")} == dict(T=7, B=16, R=112, u1=7)
    assert again[1][1]["grid"] == (1, 2, 1)
    same = set(names) - {"T", "B", "R", "u1", "tensors"}
    assert all(again[1][1][k] == made[0][k] for k in same)
    for count, other in enumerate(
        ({"shift": 1}, {"dtype": torch.float16}, {"cell": cells.rnn_relu}, {"reverse": 1})
    ):
        run(5, 3, **other)  # type: ignore[arg-type]
        assert len(made) == 2 + count
