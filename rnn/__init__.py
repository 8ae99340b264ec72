"""Recurrent layers in fused kernels: RNN, LSTM, GRU and their cells take the place of
torch.nn's."""

from . import cells, functional
from .convert import patch, replace, restore, unpatch
from .explain import explain
from .kernels.cells import Cell, register
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, Recurrent, RNNCell
from .time_parallel import TimeParallel

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "TimeParallel",
    "cells",
    "explain",
    "functional",
    "patch",
    "register",
    "replace",
    "restore",
    "unpatch",
]
