"""Drop-in layers and cells, and the layer of a cell of your own."""

from typing import Any, ClassVar

from torch import nn

from . import interop
from .docstrings import cell_doc, layer_doc
from .kernels.cells import Cell
from .stack import Stack, prepare_scriptable


class RNN(Stack):
    __doc__ = layer_doc(nn.RNN)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nonlinearity = args[3] if len(args) > 3 else kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        super().__init__(f"RNN_{nonlinearity.upper()}", *args[:3], *args[4:], **kwargs)
        self.nonlinearity = nonlinearity


class LSTM(Stack):
    __doc__ = layer_doc(nn.LSTM)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # Of two states: torch.nn's.
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden


class GRU(Stack):
    __doc__ = layer_doc(nn.GRU)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


class Recurrent(Stack):
    """Layers of a cell of your own, with all that RNN, LSTM and GRU have.

        def step(x, r, s):
            f = sigmoid(x[0] + r[0])
            n = tanh(x[1] + f * r[1])
            return (s[0] + f * (n - s[0]),)

        layer = rnn.Recurrent(rnn.Cell("mgu", step, gates=2), input_size=32, hidden_size=64)
        output, h_n = layer(x)

    Args:
        cell: the algebra of a step, a `rnn.Cell`, or one of `rnn.cells`.
        input_size, hidden_size: I and H.
        num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as in torch.nn.LSTM.
        plan, recompute, and the options of extensions: as in `rnn.LSTM`.

    Parameters are named as torch.nn's: weight_ih_l0 [G*H, I], weight_hh_l0 [G*H, H], bias_ih_l0 and
    bias_hh_l0 [G*H], gate after gate, and of a cell with P constants constants_l0 [P, H]; initial
    values are uniform within 1 / sqrt(H). `forward` takes and returns what `rnn.LSTM`'s does: of a
    cell of one state hx is a tensor, of more states a tuple of so many.

    Raises TypeError for what is no Cell, and what torch.nn's layers raise for the other
    arguments."""

    def __init__(self, cell: Cell, *args: Any, **kwargs: Any) -> None:
        if not isinstance(cell, Cell):
            raise TypeError(f"Expected cell to be a rnn.Cell, got {type(cell).__name__}")
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not Recurrent")
        super().__init__(cell.name, *args, cell=cell, **kwargs)

    def layer_cell(self) -> Cell:
        return self.cell

    def extra_repr(self) -> str:
        return f"{self.cell.name}, {super().extra_repr()}"


class _Cell(nn.Module):
    """What all cells have beside torch.nn's."""

    qconfig = interop.qconfig
    __jit_unused_properties__: ClassVar = ["qconfig"]
    _prepare_scriptable__ = prepare_scriptable


# In a single step there is no loop through time to be fused: torch.nn's own, under our names.
class RNNCell(_Cell, nn.RNNCell):
    __doc__ = cell_doc(nn.RNNCell)
    forward = interop.leaf(nn.RNNCell.forward)


class LSTMCell(_Cell, nn.LSTMCell):
    __doc__ = cell_doc(nn.LSTMCell)
    forward = interop.leaf(nn.LSTMCell.forward)


class GRUCell(_Cell, nn.GRUCell):
    __doc__ = cell_doc(nn.GRUCell)
    forward = interop.leaf(nn.GRUCell.forward)
