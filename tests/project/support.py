"""The support tables of docs/index.md: what serves each cell, use, dtype and device.

Nothing in them is written by hand: uses are run on this machine's CPU, and watched; what serves a
device is asked of `rnn.dispatch`, for GPUs that are described and not there.

    python -m tests.project.support    writes them"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import rnn
from rnn import composite, dispatch, single_step
from rnn.kernels import reference
from rnn.kernels.cells import tanh
from rnn.kernels.cpu import native
from rnn.kernels.plan import Gpu
from tests.cases import CELLS

PAGE = Path(__file__).parents[2] / "docs/index.md"
BEGIN = "<!-- Written by tests/project/support.py. -->"
END = "<!-- Here it ends. -->"
T, B, I, H = 4, 3, 5, 6


def own_cell(x: Any, r: Any, s: Any) -> Any:
    return (s[0] + x[0] * tanh(r[0] - s[0]),)


LAYERS: dict[str, Callable[..., Any]] = {
    "RNN, tanh": rnn.RNN,
    "RNN, relu": lambda *args, **options: rnn.RNN(*args, nonlinearity="relu", **options),
    "LSTM": rnn.LSTM,
    "GRU": rnn.GRU,
    "`Recurrent`, any cell": partial(rnn.Recurrent, rnn.register(rnn.Cell("support", own_cell))),
}
OWN = [*LAYERS][-1]


def train(y: Tensor) -> None:
    y.square().sum().backward()


def states_of(layer: Any) -> Any:
    h = torch.randn(1, B, H)
    return (h, h.clone()) if layer.mode == "LSTM" else h


def second_derivatives(layer: Any, x: Tensor) -> None:
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    train(grad)


def sample_gradients(layer: Any, x: Tensor) -> None:
    weights = {name: weight.detach() for name, weight in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, one)[0].square().sum()

    torch.func.vmap(torch.func.grad(loss), (None, 1))(weights, x)


def under_autocast(layer: Any, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
    train(y.float())


def compiled(layer: Any, x: Tensor) -> None:
    train(torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0])


def exported(layer: Any, x: Tensor) -> None:
    torch.export.export(layer, (x,)).module()(x)


class Use(NamedTuple):
    """What is done with a layer of these options and x [T, B, I] of a dtype; and whether it would
    have to compile a cell of its own."""

    run: Callable[[Any, Tensor], Any]
    options: Mapping[str, Any] = MappingProxyType({})
    dtype: torch.dtype = torch.float32
    compiles: bool = False


def outputs(**given: Any) -> Use:
    """A call with arguments, and its backward pass."""
    return Use(lambda layer, x: train(layer(x, **given)[0]))


USES: dict[str, Use] = {
    "forward": Use(lambda layer, x: layer(x)),
    "training": outputs(),
    "states given": Use(lambda layer, x: train(layer(x, states_of(layer))[0])),
    "one step a call": Use(lambda layer, x: layer(x[:1])),
    "one sequence, no batch": Use(lambda layer, x: train(layer(x[:, 0])[0])),
    "`PackedSequence`": Use(
        lambda layer, x: train(layer(pack_sequence([x[:, 0], x[:2, 1]]))[0].data)
    ),
    "`lengths=`": outputs(lengths=[4, 0, 2]),
    "`resets=`": outputs(resets=torch.eye(T, B).bool()),
    "`return_states=True`": outputs(return_states=True),
    "`recompute=True`": Use(outputs().run, dict(recompute=True)),
    "`checkpoint=True`": Use(outputs().run, dict(checkpoint=True)),
    "`time_parallel=True`": Use(outputs().run, dict(time_parallel=True)),
    "`batch_first=True`": Use(outputs().run, dict(batch_first=True)),
    "`bidirectional=True`": Use(outputs().run, dict(bidirectional=True)),
    "layers with `dropout=`": Use(outputs().run, dict(num_layers=2, dropout=0.5)),
    "`bias=False`": Use(outputs().run, dict(bias=False)),
    "`proj_size=`": Use(outputs().run, dict(proj_size=2)),
    "`num_heads=`": Use(outputs().run, dict(num_heads=2)),
    "`recurrent_dropout=`": Use(outputs().run, dict(recurrent_dropout=0.5), compiles=True),
    "`zoneout=`": Use(outputs().run, dict(zoneout=0.5), compiles=True),
    "`weight_drop=`": Use(outputs().run, dict(weight_drop=0.5)),
    "`learned_state=True`": Use(outputs().run, dict(learned_state=True)),
    "`clip_recurrent_grad=1.0`": Use(outputs().run, dict(clip_recurrent_grad=1.0), compiles=True),
    '`clip_recurrent_grad=("norm", 1.0)`': Use(
        outputs().run, dict(clip_recurrent_grad=("norm", 1.0))
    ),
    "`layer_norm=True`": Use(outputs().run, dict(layer_norm=True)),
    "float64": Use(outputs().run, dtype=torch.float64),
    "float16, bfloat16": Use(outputs().run, dtype=torch.bfloat16),
    "autocast": Use(under_autocast),
    "`torch.compile(fullgraph=True)`": Use(compiled),
    "`torch.export`": Use(exported),
    "second derivatives": Use(second_derivatives),
    "gradients of each sample (`torch.func`)": Use(sample_gradients),
    "forward mode (`torch.func.jvp`)": Use(
        lambda layer, x: torch.func.jvp(lambda value: layer(value)[0], (x,), (x,))
    ),
}


def watched(used: set[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        used.add(name)
        return function(*args, **kwargs)

    return call


def spies(compiles: bool, used: set[str]) -> list[Any]:
    """What watches a run. Where a cell would have to be compiled, which takes long, the reference
    runs in place of the C++, as it does without a compiler."""
    native_calls = [(native, "_call"), (single_step, "_call")]
    if compiles:
        native_calls = [(reference, "forward"), (reference, "backward")]
    calls = [(owner, name, "C++") for owner, name in native_calls]
    calls.append((composite, "_linear", "torch operations"))
    patches: list[Any] = [
        patch.object(owner, name, watched(used, label, getattr(owner, name)))
        for owner, name, label in calls
    ]
    if compiles:
        patches.append(patch.object(dispatch, "native_available", lambda *_: False))
    return patches


def served_by(layer: Callable[..., nn.Module], use: Use) -> str:
    """Runs it; what computed it, or a dash where the layer refuses it, as torch.nn's does."""
    used: set[str] = set()
    patches = spies(use.compiles or layer is LAYERS[OWN], used)
    try:
        module = layer(I, H, **use.options).to(use.dtype)
    except ValueError:
        return "-"
    for each in patches:
        each.start()
    try:
        with warnings.catch_warnings(action="ignore"):
            use.run(module, torch.randn(T, B, I, dtype=use.dtype))
    finally:
        for each in patches:
            each.stop()
    return ", then ".join(sorted(used))


class Device(NamedTuple):
    """What a machine has, as `rnn.dispatch` asks for it."""

    type: str
    libraries: tuple[str, ...] = ()
    compiler: bool = False
    capability: tuple[int, int] = (9, 0)


DEVICES = {
    "CPU with a compiler": Device("cpu", compiler=True),
    "CPU without": Device("cpu"),
    "NVIDIA GPU, Triton and CuPy": Device("cuda", ("triton", "cupy")),
    "Triton alone": Device("cuda", ("triton",)),
    "CuPy alone (Windows)": Device("cuda", ("cupy",)),
    "neither, or capability below 8.0": Device("cuda"),
    "other devices": Device("mps"),
}
DTYPES = {
    "float32": (torch.float32,),
    "float16, bfloat16": (torch.float16, torch.bfloat16),
    "float64": (torch.float64,),
}
WORDS = {
    "native": "C++",
    "cuda": "CUDA C++",
    "triton": "Triton",
    "cupy": "the reference on CuPy arrays",
    "numpy": "torch's own or NumPy",
}
HIDDEN = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 16, 64, 256)


@contextmanager
def described(device: Device) -> Iterator[None]:
    """`rnn.dispatch` sees that machine."""
    major, minor = device.capability
    gpu = Gpu(10 * major + minor, 132, 232448, "cupy" in device.libraries)
    with (
        patch.object(torch.cuda, "get_device_capability", lambda _: device.capability),
        patch.object(dispatch, "_available", lambda library: library in device.libraries),
        patch.object(dispatch, "gpu", lambda _: gpu),
        patch.object(dispatch, "native_available", lambda *_: device.compiler),
    ):
        yield


def backends(device: Device, dtype: torch.dtype) -> str:
    """All that any cell of any common size gets there, and the dtype if it is another."""
    target = torch.device(device.type)
    with described(device):
        serves, computed, _ = dispatch._served.__wrapped__(target, dtype)
        if not serves:
            return "torch operations"
        found = set()
        dispatch._served.cache_clear()
        for cell, hidden, batch in product(CELLS, HIDDEN, BATCHES):
            sizes = batch, hidden, hidden, 1
            plan = dispatch._plan.__wrapped__(cell, sizes, computed, target, True)
            found.add(WORDS[plan.backend])
    dispatch._served.cache_clear()
    words = " or ".join(sorted(found))
    return words if computed == dtype else f"{words}, in {computed}".replace("torch.", "")


def table(corner: str, heads: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [[corner, *heads], ["---"] * (len(heads) + 1), *([k, *row] for k, row in rows.items())]
    return [f"| {' | '.join(line)} |" for line in lines]


def same(values: list[str]) -> str:
    """Of what one line of the table is about."""
    (value,) = {*values}
    return value


def of_uses() -> list[str]:
    rows = {}
    for name, use in USES.items():
        rows[name] = [served_by(layer, use) for layer in LAYERS.values()]
    return table("on the CPU", [*LAYERS], rows)


def of_devices() -> list[str]:
    rows = {}
    for name, device in DEVICES.items():
        dtypes = DTYPES.values()
        rows[name] = [same([backends(device, dtype) for dtype in group]) for group in dtypes]
    return table("device", [*DTYPES], rows)


def render(text: str) -> str:
    """The page with its tables as they are now."""
    parts = text.split(BEGIN)
    rest = [part.split(END)[1] for part in parts[1:]]
    tables = "\n".join(of_devices()), "\n".join(of_uses())
    pieces = [f"{BEGIN}\n\n{lines}\n\n{END}{after}" for lines, after in zip(tables, rest)]
    return "".join([parts[0], *pieces])


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
