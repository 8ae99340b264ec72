"""Ready-made cells for `rnn.Recurrent`, from their step alone.

x are the G input pre-activations W_ih x_t + b_ih, r the recurrent ones W_hh h_{t-1} + b_hh, s the
states of which the first is h, and k the constants of each unit. One product with h_{t-1} a step is
what the recurrence has: a cell that multiplies something computed in the same step, as the GRU of
Cho et al. does with reset * h before the product (Keras: reset_after=False), or the minimal gated
unit of Zhou et al. with f * h, is not one of these; their forms after the product are."""

from typing import Any

from .kernels.cells import Cell, register, relu, sigmoid, tanh

__all__ = ["cifg", "indrnn", "mgu", "peephole_lstm"]


def _peephole_lstm(x: Any, r: Any, s: Any, k: Any) -> Any:
    _, c = s
    i = sigmoid(x[0] + r[0] + k[0] * c)
    f = sigmoid(x[1] + r[1] + k[1] * c)
    g = tanh(x[2] + r[2])
    c_next = f * c + i * g
    o = sigmoid(x[3] + r[3] + k[2] * c_next)
    return o * tanh(c_next), c_next


def _cifg(x: Any, r: Any, s: Any) -> Any:
    _, c = s
    f = sigmoid(x[0] + r[0])
    g = tanh(x[1] + r[1])
    o = sigmoid(x[2] + r[2])
    c_next = f * c + (1 - f) * g
    return o * tanh(c_next), c_next


def _mgu(x: Any, r: Any, s: Any) -> Any:
    f = sigmoid(x[0] + r[0])
    n = tanh(x[1] + f * r[1])
    return (s[0] + f * (n - s[0]),)


def _indrnn(x: Any, r: Any, s: Any, k: Any) -> Any:
    return (relu(x[0] + k[0] * s[0]),)


peephole_lstm = register(Cell("peephole_lstm", _peephole_lstm, gates=4, states=5, constants=3))
"""The LSTM whose gates see c: k are the peepholes of i, f and o. Gates i, f, g, o as in torch.nn.
Gers, Schraudolph and Schmidhuber, Learning Precise Timing with LSTM Recurrent Networks, 2002,
https://www.jmlr.org/papers/v3/gers02a.html"""

cifg = register(Cell("cifg", _cifg, gates=3, states=2))
"""The LSTM with coupled input and forget gates, i = 1 - f. Gates f, g, o. Greff et al., LSTM: A
Search Space Odyssey, 2017, https://arxiv.org/abs/1503.04069"""

mgu = register(Cell("mgu", _mgu, gates=2))
"""The minimal gated unit, its gate after the product as in torch.nn's GRU. Gates f, n. Zhou et al.,
Minimal Gated Unit for Recurrent Neural Networks, 2016, https://arxiv.org/abs/1603.09420"""

indrnn = register(Cell("indrnn", _indrnn, gates=1, states=2, constants=1))
"""h' = relu(W_ih x + b + k h), a recurrence of each unit by itself. W_hh is multiplied all the
same, and its product not used: for its formula, not for its speed. Li et al., Independently
Recurrent Neural Network, 2018, https://arxiv.org/abs/1803.04831"""
