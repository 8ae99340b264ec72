"""Tries an installed fused-rnn, with nothing of the source tree: `python -I` runs it elsewhere.

Forward, backward and the files that come with the package; prints what served the layers."""

import sysconfig
from importlib.metadata import version
from pathlib import Path

import torch

import rnn
from rnn.kernels import cells
from rnn.kernels.cpu import native

ROOT = Path(rnn.__file__).parent
LAYERS = (rnn.RNN, rnn.LSTM, rnn.GRU)


def main() -> None:
    installed = Path(sysconfig.get_paths()["purelib"])
    assert ROOT.is_relative_to(installed), f"{ROOT} is not in {installed}"
    for name in ("py.typed", "kernels/cpu/recurrence.cpp", "kernels/gpu/cuda/forward.cu"):
        assert (ROOT / name).exists(), name
    for layer in LAYERS:
        torch.manual_seed(0)
        ours = layer(5, 7, num_layers=2, bidirectional=True)
        theirs = getattr(torch.nn, layer.__name__)(5, 7, num_layers=2, bidirectional=True)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(9, 3, 5)
        grads = []
        for module in (ours, theirs):
            module(x)[0].square().sum().backward()
            grads.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(*grads)
        print(rnn.explain(ours, x).splitlines()[0])
    print(f"fused-rnn {version('fused-rnn')} in {ROOT}, torch {torch.__version__}")
    if native.compiler():
        assert native.load(cells.gru, torch.float32)


if __name__ == "__main__":
    main()
