"""Where the classes of modules.py were: models that were pickled then load by it."""

from .modules import GRU as GRU
from .modules import LSTM as LSTM
from .modules import RNN as RNN
from .modules import GRUCell as GRUCell
from .modules import LSTMCell as LSTMCell
from .modules import RNNCell as RNNCell
