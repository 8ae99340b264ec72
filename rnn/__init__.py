"""Recurrent layers in fused kernels: RNN, LSTM, GRU and their cells take the place of
torch.nn's."""

from . import cells, functional, init
from .convert import patch, replace, restore, unpatch
from .explain import explain
from .gradient_flow import GradientFlow, gradient_flow
from .kernels.cells import Cell, register
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, Recurrent, RNNCell
from .streaming import Streaming
from .tbptt import tbptt
from .time_options import TimeParallel

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "GRUCell",
    "GradientFlow",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "Streaming",
    "TimeParallel",
    "cells",
    "explain",
    "functional",
    "gradient_flow",
    "init",
    "patch",
    "register",
    "replace",
    "restore",
    "tbptt",
    "unpatch",
]
