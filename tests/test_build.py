"""The library of the CPU, attacked: how it is compiled, kept on disk and loaded, and what interrupts its calls."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
