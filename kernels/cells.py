"""The algebra of each recurrent cell, written once for every backend. Formulas and gate order are
torch.nn's.

forward(x, r, s) -> (s_next, saved)                    one step
backward(saved, s, s_next, ds) -> (dx, dr, ds_prev)    its adjoint, linear in ds

All are tuples. x: G input pre-activations W_ih x_t + b_ih; r: G recurrent ones W_hh h_{t-1} + b_hh;
s: S states, of which W_hh multiplies s[0] = h; ds: the gradient of s_next. ds_prev leaves out what
flows back through W_hh: the recurrence adds that. (Functions that Triton reads have no
annotations.)"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, cast

from .cell_checks import StandIn, check_function, results_of


# The names that the algebra may use (a cell of your own imports them), for torch; `bind` gives
# another backend its own.
def sigmoid(x: Any) -> Any:
    return x.sigmoid()


def tanh(x: Any) -> Any:
    return x.tanh()


def relu(x: Any) -> Any:
    return x.relu()


def relu_grad(d: Any, y: Any) -> Any:
    """The gradient of relu's argument from that of its value y: where it is 0, an infinite d counts
    for nothing."""
    return d.masked_fill(y <= 0, 0)


def zeros_like(x: Any) -> Any:
    return x.new_zeros(x.shape)


def bind(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of `function` whose free names resolve to `names`."""
    plain = cast(FunctionType, function)
    return FunctionType(plain.__code__, {**plain.__globals__, **names}, plain.__name__)


@dataclass(eq=False)
class Cell:
    """A recurrence of G gates and S states, that saves A activations for its adjoint.

    `forward` and `backward` are as the module's docstring says: functions of tuples of arrays of
    one shape, [..., H], and one floating-point dtype. What they have to keep to:

    - Python's + - * / and the five functions of this module alone: no methods, no branches.
    - All results are tuples, of one value too: (value,).
    - If x and r meet only as x + r, dx and dr are one and the same tuple object: then one gradient
      serves both, and one product.
    - No annotations, for Triton; no default arguments, closures or constants of the module: each
      backend takes the code and gives it names of its own. Write constants into the formula.
    - `name` is that of the cell's variable in this module, if torch.compile is to record it as an
      operator: other cells are recorded step by step.

    Both are called once, on stand-ins for arrays, which sets `saved` to A, and `split` to whether x
    and r have different gradients. Raises TypeError, with the line, where that fails, or where a
    result does not have as many values as it should.

    Sources of the four: rnn_tanh and rnn_relu, Elman, Finding Structure in Time, 1990; lstm,
    Hochreiter and Schmidhuber, Long Short-Term Memory, 1997, with the forget gate of Gers et al.,
    2000; gru, Cho et al., 2014 (https://arxiv.org/abs/1406.1078v1), with the reset gate after the
    product; all as torch.nn has them."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    gates: int
    states: int
    saved: int = field(init=False)
    split: bool = field(init=False)

    def __post_init__(self) -> None:
        check_function(self.forward)
        check_function(self.backward)
        # Only to count the results
        names = dict.fromkeys(
            ("sigmoid", "tanh", "relu", "relu_grad", "zeros_like"), lambda *values: values[0]
        )
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
