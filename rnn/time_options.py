"""What `time_parallel` is told and what it reports."""

from typing import Any, NamedTuple


class TimeParallel(NamedTuple):
    """How to cut a sequence: the steps of a chunk; after how many passes to give up and run one
    step after the other; and the change of a state, relative to the largest, that counts as none,
    of the dtype if None (float64 1e-11, float32 2e-6, float16 2e-3, bfloat16 2e-2)."""

    chunk: int = 64
    max_passes: int = 8
    tol: float | None = None


class Report(NamedTuple):
    """Of one layer's call: the passes of the forward pass, the last change of a state, whether it
    converged (else the sequential kernel ran), and the passes of the backward pass, when it has
    run."""

    passes: int
    residual: float
    converged: bool
    backward_passes: int = 0


def check_time_parallel(value: Any) -> TimeParallel | None:
    """What `time_parallel=` of a layer means; None if it is off. Raises TypeError and
    ValueError."""
    if value is None or value is False:
        return None
    if value is True:
        return TimeParallel()
    if not isinstance(value, TimeParallel):
        raise TypeError(
            f"Expected time_parallel to be a bool or a TimeParallel, got {type(value).__name__}"
        )
    for name in ("chunk", "max_passes"):
        size = getattr(value, name)
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"Expected time_parallel's {name} to be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"Expected time_parallel's {name} to be positive, got {size}")
    if value.tol is not None and not isinstance(value.tol, (int, float)):
        raise TypeError(f"Expected time_parallel's tol to be a number, got {value.tol!r}")
    if value.tol is not None and not 0 < value.tol < 1:
        raise ValueError(f"Expected time_parallel's tol between 0 and 1, got {value.tol}")
    return value
