"""The library of the CPU, attacked: how it is compiled, kept on disk and loaded, and what interrupts its calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnn.kernels import cells, native

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(not native.compiler(), reason="there is no C++ compiler")


def python(code: str, timeout: float = 120, **environment: str) -> str:
    """What a program of its own prints; it ends well, and in time."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=timeout,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr[-3000:]}"
    return done.stdout


FORK = """
import multiprocessing, torch, rnn
x = torch.randn(50, 32, 64)
theirs = torch.nn.GRU(64, 256)
layer = rnn.GRU(64, 256)
layer.load_state_dict(theirs.state_dict())

def use(answers, deeper):
    # All products but the layer's are on one thread: torch's own threads are missing here as well.
    with torch.no_grad():
        y = layer(x)[0]
    torch.set_num_threads(1)
    rnn.RNN(64, 64)(x)[0].sum().backward()
    answers.put(y.sum().item())
    if deeper:
        start(answers, deeper - 1)

def start(answers, deeper):
    process = context.Process(target=use, args=(answers, deeper))
    process.start()
    process.join(60)
    hangs = process.exitcode is None
    process.kill()
    assert not hangs and process.exitcode == 0, process.exitcode

torch.set_num_threads(2)
(torch.randn(1000, 1000) @ torch.randn(1000, 1000)).tanh_()  # torch has its threads now
want = theirs(x)[0].sum().item()
if "{what}" == "used before":
    layer(x)[0].sum().backward()
context = multiprocessing.get_context("fork")
answers = context.SimpleQueue()
start(answers, 1)
for _ in range(2):
    assert abs(answers.get() - want) < 1e-3 * abs(want)
assert abs(layer(x)[0].sum().item() - want) < 1e-3 * abs(want)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("what", ["imported", "used before"])
def test_fork(what: str) -> None:
    """A child, and a child of it, do not wait for threads that only the parent has."""
    assert python(FORK.replace("{what}", what)) == "done\n"


SMALL_STACK = """
import threading, torch, rnn
torch.set_num_threads(2)
done = []

def work():
    for layer in (rnn.RNN, rnn.LSTM, rnn.GRU):
        for bidirectional in (False, True):
            y = layer(40, 72, bidirectional=bidirectional)(torch.randn(100, 24, 40))[0]
            y.sum().backward()
            done.append(y)

threading.stack_size(64 * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(len(done))
"""


def test_small_stacks() -> None:
    """Of a thread of Python's, and of OpenMP's threads, which have what $OMP_STACKSIZE says."""
    assert python(SMALL_STACK, OMP_STACKSIZE="64k") == "6\n"


@needs_compiler
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_frames_are_small(cell: str, tmp_path: Path) -> None:
    """No function has more than 20 KiB on the stack, even without the compiler's help."""
    flags = ["-O1", "-fopenmp", "-Wframe-larger-than=20480", "-Werror", "-x", "c++", "-"]
    done = subprocess.run([*native.compiler(), *native._FLAGS, *flags, "-o", str(tmp_path / "cell.so")],
                          input=native.program(getattr(cells, cell)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
