"""Recurrent layers in fused kernels: RNN, LSTM, GRU and their cells take the place of
torch.nn's."""

from . import functional, init
from .convert import patch, replace, restore, unpatch
from .explain import explain
from .gradient_flow import GradientFlow, gradient_flow
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .streaming import Streaming
from .tbptt import tbptt

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "GradientFlow",
    "LSTMCell",
    "RNNCell",
    "Streaming",
    "explain",
    "functional",
    "gradient_flow",
    "init",
    "patch",
    "replace",
    "restore",
    "tbptt",
    "unpatch",
]
