"""Recurrent layers in fused kernels: RNN and RNNCell take the place of torch.nn's."""

from . import ops as functional
from .layers import RNN, RNNCell

__all__ = ["RNN", "RNNCell", "functional"]
