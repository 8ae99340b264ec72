"""Warnings that name the user's line, however deep in rnn and torch they arise."""

import sys
import warnings
from collections.abc import Hashable

# By their key, those that were given once.
_given: set[Hashable] = set()
# What a call passes through on its way here: rnn, torch, and what decorates functions of torch
_PASSED = (__name__.partition(".")[0], "torch", "contextlib", "typing_extensions", "warnings")


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the line that called into rnn or torch from outside, or where there is none, as
    in autograd's threads, at the outermost."""
    # Of this function's caller
    level = 2
    frame = sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in _PASSED:
        frame = frame.f_back
        level += 1
    warnings.warn(text, category, stacklevel=level)


def warn_once(key: Hashable, text: str, category: type[Warning] = UserWarning) -> None:
    """Likewise, the first time for a key."""
    if key not in _given:
        _given.add(key)
        warn(text, category)
