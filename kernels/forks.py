"""Whether this process is a child of fork.

There OpenMP would wait for ever for its parent's threads, whoever started them: torch and our
libraries share one runtime. So this is imported with the package, before any fork that could
matter."""

import os

_children: list[int] = []  # the numbers of this process and of those it descends from by fork


def _in_child() -> None:
    _children.append(os.getpid())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def forked() -> bool:
    return bool(_children)
