"""Chunks of time side by side (`time_parallel=`) against the same layer step after step: passes and
time, with fresh weights and with those that the example of a language model trains.

python bench/time_parallel.py [--cell rnn] [--steps 300] [--time 4096] [--hidden 128]"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1] / "examples")]

import language_model

import rnn

REPEATS = 7


def trained(layer: Any, characters: int, text: torch.Tensor, steps: int) -> Any:
    """The example's model with that layer, after so many steps of its training."""
    model = language_model.LanguageModel(lambda *sizes: layer, characters, layer.hidden_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss = language_model.TruncatedLoss()
    batches = language_model.stream_batches(text, 32, 64, slice(None))
    for _, batch in zip(range(steps), batches):
        optimizer.zero_grad()
        loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def ratio(layer: Any, x: torch.Tensor, limits: Any, train: bool) -> float:
    """The median time in chunks by that step after step, in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for way, kept in enumerate((False, limits)):
            layer.time_parallel = kept
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                y, _ = layer(x)
                if train:
                    y.sum().backward()
            times[way].append(time.perf_counter() - start)
    return statistics.median(b / a for a, b in zip(*times))


def measure(name: str, layer: Any, x: torch.Tensor, limits: Any) -> None:
    layer.time_parallel = limits
    with torch.no_grad():
        layer(x)
    (report,) = layer.last_time_parallel
    words = f"{report.passes} passes" if report.converged else f"not in {report.passes} passes"
    forward = ratio(layer, x, limits, False)
    training = ratio(layer, x, limits, True)
    print(f"{name}: {words}; time {forward:.2f} forward, {training:.2f} training", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--cell", choices=("rnn", "lstm", "gru"), nargs="*")
    for name, default in dict(steps=300, time=4096, hidden=128, chunk=64, passes=16).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "rnn.*one step after the other")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; T {options.time}, B 1")
    limits = rnn.TimeParallel(options.chunk, options.passes)
    text = language_model.read_text(None)
    alphabet = sorted({*text})
    codes = torch.tensor([alphabet.index(c) for c in text])
    layers: dict[str, Callable[..., Any]] = dict(rnn=rnn.RNN, lstm=rnn.LSTM, gru=rnn.GRU)
    for cell in options.cell or layers:
        torch.manual_seed(0)
        layer = layers[cell](options.hidden, options.hidden)
        x = torch.randn(options.time, 1, options.hidden)
        measure(f"{cell}, fresh", layer, x, limits)
        layer.time_parallel = False
        model = trained(layer, len(alphabet), codes, options.steps)
        with torch.no_grad():
            x = model.embedding(codes[: options.time, None])
        measure(f"{cell}, trained", layer, x, limits)


if __name__ == "__main__":
    main()
