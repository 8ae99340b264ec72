"""The algebra of each recurrent cell, written once for every backend. Formulas and gate order are
torch.nn's.

forward(x, r, s) -> (s_next, saved)                    one step
backward(saved, s, s_next, ds) -> (dx, dr, ds_prev)    its adjoint, linear in ds

All are tuples. x: G input pre-activations W_ih x_t + b_ih; r: G recurrent ones W_hh h_{t-1} + b_hh;
s: S states, of which W_hh multiplies s[0] = h; ds: the gradient of s_next. ds_prev leaves out what
flows back through W_hh: the recurrence adds that. (Functions that Triton reads have no
annotations.)

A cell of your own is its step alone, step(x, r, s) -> s_next: both are derived from it."""

from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch

from . import adjoint
from .cell_checks import (
    StandIn,
    check_function,
    check_gradients,
    check_sizes,
    recorded_step,
    results_of,
)
from .tracing import Value, trace
from .tracing import bind as bind


# The names that the algebra may use (a cell of your own imports them), for torch; `bind` gives
# another backend its own.
def sigmoid(x: Any) -> Any:
    return x.sigmoid()


def tanh(x: Any) -> Any:
    return x.tanh()


def relu(x: Any) -> Any:
    return x.relu()


def exp(x: Any) -> Any:
    return x.exp()


def relu_grad(d: Any, y: Any) -> Any:
    """The gradient of relu's argument from that of its value y: where it is 0, an infinite d counts
    for nothing."""
    return d.masked_fill(y <= 0, 0)


def clamp(x: Any, limit: Any) -> Any:
    """x, or the nearest number in [-limit, limit]."""
    return x.clamp(-limit, limit)


class ClipGrad(torch.autograd.Function):
    """The identity, whose gradient is cut on its way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any, limit: Any) -> Any:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Any) -> Any:
        return clamp(d, ctx.limit), None


def _identity_jvp(ctx: Any, tangent: Any, _: Any) -> Any:
    return tangent.view_as(tangent)


def cutting(function: Any) -> Callable[[Any, float], Any]:
    """`apply` of a ClipGrad, whose forward mode is that of the identity."""
    forward_mode: Any = type(function.__name__, (function,), dict(jvp=staticmethod(_identity_jvp)))

    def apply(x: Any, limit: float) -> Any:
        # Dynamo records no function that has a jvp.
        compiled = torch.compiler.is_compiling()
        return function.apply(x, limit) if compiled else forward_mode.apply(x, limit)

    return apply


_clip_grad = cutting(ClipGrad)


def clip_grad(x: Any, limit: float) -> Any:
    """x, whose gradient is cut to [-limit, limit] on its way back."""
    return x.do("clip_grad", x, limit) if isinstance(x, Value) else _clip_grad(x, limit)


def row_mean(x: Any) -> Any:
    """The mean over all hidden units of a sequence, for layer norm, and its own adjoint. Kernels
    have it that have these units in one place: the CPU's, and Triton's of scope block."""
    return x.do("row_mean", x) if isinstance(x, Value) else x.mean(-1, keepdim=True)


def rsqrt(x: Any) -> Any:
    """1 / sqrt(x)."""
    return x.do("rsqrt", x) if isinstance(x, Value) else x.rsqrt()


def zeros_like(x: Any) -> Any:
    return x.new_zeros(x.shape)


# All that a derived function uses
_NAMES: dict[str, Any] = dict(
    sigmoid=sigmoid,
    tanh=tanh,
    relu=relu,
    exp=exp,
    relu_grad=relu_grad,
    clamp=clamp,
    clip_grad=clip_grad,
    row_mean=row_mean,
    rsqrt=rsqrt,
    zeros_like=zeros_like,
)


@dataclass(eq=False)
class Cell:
    """A recurrence of G gates and S states, that saves A activations for its adjoint.

    From the step alone:

        def step(x, r, s):
            f = sigmoid(x[0] + r[0])
            n = tanh(x[1] + f * r[1])
            return (s[0] + f * (n - s[0]),)

        mgu = Cell("mgu", step, gates=2)

    The step takes tuples of arrays of one shape, [..., H], and one floating-point dtype, and
    returns a tuple of the new states. It is called once, on values that are recorded: it may use
    Python's + - * / and this module's sigmoid, tanh, relu, exp and clip_grad, numbers, loops and
    functions of its own, but no branches on values and no methods. Its adjoint is derived
    (kernels/adjoint.py), and with it what is saved.

    The last `constants` of the S states stay what they are at every step, and no reset clears them:
    parameters of each unit, or masks of each sequence. Then the step is step(x, r, s, k), with k
    these constants and s and s_next the other states.

    With `backward` both functions are yours: `forward` and `backward` are as the module's docstring
    says, and each backend takes their code as it is. What they have to keep to:

    - Python's + - * / and the functions of this module alone: no methods, no branches.
    - All results are tuples, of one value too: (value,).
    - If x and r meet only as x + r, dx and dr are one and the same tuple object: then one gradient
      serves both, and one product.
    - No annotations, for Triton; no default arguments, closures or constants of the module: each
      backend takes the code and gives it names of its own. Write constants into the formula.

    They are called once, on stand-ins for arrays, which sets `saved` to A, and `split` to whether x
    and r have different gradients. With `check`, `backward` is compared with the derived one, in
    float64 on random numbers.

    `register` gives a cell the name under which torch.compile and torch.export record it as an
    operator; without it they record it step by step.

    Raises TypeError, with the line, where a function fails, uses what no backend has, or where a
    result does not have as many values as it should; and ValueError for sizes that there are not,
    and a `backward` that `check` finds wrong.

    Sources of the four: rnn_tanh and rnn_relu, Elman, Finding Structure in Time, 1990; lstm,
    Hochreiter and Schmidhuber, Long Short-Term Memory, 1997, with the forget gate of Gers et al.,
    2000; gru, Cho et al., 2014 (https://arxiv.org/abs/1406.1078v1), with the reset gate after the
    product; all as torch.nn has them."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] = None  # type: ignore[assignment]  # derived
    gates: int = 1
    states: int = 1
    constants: int = 0
    check: InitVar[bool] = False
    saved: int = field(init=False)
    split: bool = field(init=False)
    # Whether a step takes means over all hidden units: then it takes pre-activations in place of x
    whole_rows: bool = field(init=False)

    def __post_init__(self, check: bool) -> None:
        # Cells made of this one, by what was changed
        self.variants: dict[Any, Cell] = {}
        check_sizes(self.name, self.gates, self.states, self.constants)
        self._given = (self.name, self.forward, self.backward, *self._sizes)
        _interned.setdefault(self._given, self)
        self._step = self.forward
        derived = self.backward is None
        if derived:
            functions = adjoint.derive(self.recorded(), _NAMES)
            self.forward = functions.forward
            self.backward = functions.backward
        elif self.constants:
            raise TypeError("A cell with constants has its backward derived: leave it out")
        else:
            check_function(self.forward)
            check_function(self.backward)
        self._count_results()
        lines = trace(self.forward, self.inputs("xrs"))[0] if derived else []
        self.whole_rows = any(line.operation == "row_mean" for line in lines)
        if not derived:
            given = self.forward
            self._step = lambda *arguments: given(*arguments)[0]
        if check and not derived:
            functions = adjoint.derive(self.recorded(), _NAMES)
            check_gradients(self, functions)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        return self.gates, self.states, self.constants

    @property
    def carried(self) -> int:
        """The number of states that change."""
        return self.states - self.constants

    def step(self, x: Any, r: Any, s: Any, k: Any = ()) -> Any:
        """The new states, from the step as it was given, for the step of another cell."""
        return self._step(x, r, s, k) if self.constants else self._step(x, r, s)

    def recorded(self) -> adjoint.Step:
        """The step's operations. Raises TypeError, with the line, where it fails."""
        return recorded_step(self._step, *self._sizes)

    def text(self) -> str:
        """What it computes, operation by operation."""
        forward = trace(self.forward, self.inputs("xrs"))
        return repr((self._sizes, forward, trace(self.backward, self.inputs("asnd"))))

    def inputs(self, groups: str) -> list[list[str]]:
        """Names for values in groups, such as x[0]: of x, r, a (which is `saved`), and others,
        which are states."""
        sizes = dict(x=self.gates, r=self.gates, a=self.saved)
        return [[f"{group}[{k}]" for k in range(sizes.get(group, self.states))] for group in groups]

    def _count_results(self) -> None:
        names = dict.fromkeys(_NAMES, lambda *values: values[0])
        x = (StandIn(),) * self.gates
        s = (StandIn(),) * self.states
        forward = bind(self.forward, **names)
        sizes = dict(s_next=self.states, saved=None)
        s_next, saved = results_of(self.forward, forward, (x, x, s), sizes)
        backward = bind(self.backward, **names)
        sizes = dict(dx=self.gates, dr=self.gates, ds_prev=self.states)
        dx, dr, _ = results_of(self.backward, backward, (saved, s, s_next, s), sizes)
        self.saved = len(saved)
        self.split = dx is not dr

    # A cell is one object, by which programs are found that were compiled for it.
    def __copy__(self) -> "Cell":
        return self

    def __deepcopy__(self, _: Any) -> "Cell":
        return self

    def __reduce__(self) -> Any:
        return _interned_cell, self._given


# By what they were made of: so that a pickle gives the cell that there is.
_interned: WeakValueDictionary[Any, Cell] = WeakValueDictionary()


def _interned_cell(*given: Any) -> Cell:
    return _interned.get(given) or Cell(*given)


def _rnn_tanh(x, r, s):
    return (tanh(x[0] + r[0]),), ()


def _rnn_tanh_backward(saved, s, s_next, ds):
    d = (ds[0] * (1 - s_next[0] * s_next[0]),)
    return d, d, (zeros_like(ds[0]),)


def _rnn_relu(x, r, s):
    return (relu(x[0] + r[0]),), ()


def _rnn_relu_backward(saved, s, s_next, ds):
    d = (relu_grad(ds[0], s_next[0]),)
    return d, d, (zeros_like(ds[0]),)


def _lstm(x, r, s):
    i = sigmoid(x[0] + r[0])
    f = sigmoid(x[1] + r[1])
    g = tanh(x[2] + r[2])
    o = sigmoid(x[3] + r[3])
    c = f * s[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


def _lstm_backward(saved, s, s_next, ds):
    i, f, g, o = saved
    tc = tanh(s_next[1])
    dc = ds[1] + ds[0] * (o * (1 - tc * tc))
    d = (
        dc * (g * i * (1 - i)),
        dc * (s[1] * f * (1 - f)),
        dc * (i * (1 - g * g)),
        ds[0] * (tc * o * (1 - o)),
    )
    return d, d, (zeros_like(dc), dc * f)


def _gru(x, r, s):
    reset = sigmoid(x[0] + r[0])
    z = sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    return (n + z * (s[0] - n),), (reset, z, n, r[2])


def _gru_backward(saved, s, s_next, ds):
    reset, z, n, rn = saved
    dn = ds[0] * ((1 - z) * (1 - n * n))
    dz = ds[0] * ((s[0] - n) * z * (1 - z))
    dreset = dn * (rn * reset * (1 - reset))
    return (dreset, dz, dn), (dreset, dz, dn * reset), (ds[0] * z,)


rnn_tanh = Cell("rnn_tanh", _rnn_tanh, _rnn_tanh_backward, gates=1, states=1)
rnn_relu = Cell("rnn_relu", _rnn_relu, _rnn_relu_backward, gates=1, states=1)
lstm = Cell("lstm", _lstm, _lstm_backward, gates=4, states=2)
gru = Cell("gru", _gru, _gru_backward, gates=3, states=1)

# By their names, which operators take
_registered: dict[str, Cell] = {c.name: c for c in (rnn_tanh, rnn_relu, lstm, gru)}


def register(cell: Cell) -> Cell:
    """Gives a cell its name in torch.compile, torch.export and files of exported programs, where it
    is an operator from then on. Returns it, or the cell of that name that is the same. A process
    that loads such a file has to register the cell first.

    Raises TypeError for what is no Cell, and ValueError where another cell has that name."""
    if not isinstance(cell, Cell):
        raise TypeError(f"Expected cell to be a Cell, got {type(cell).__name__}")
    known = _registered.setdefault(cell.name, cell)
    if known is not cell and known.text() != cell.text():
        raise ValueError(f"There is another cell of the name {cell.name!r}")
    return known


def registered(name: str) -> Cell:
    """Raises RuntimeError where there is none."""
    if name not in _registered:
        raise RuntimeError(f"There is no cell of the name {name!r}: rnn.register it first")
    return _registered[name]


def is_registered(cell: Cell) -> bool:
    return _registered.get(cell.name) is cell
