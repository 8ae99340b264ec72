"""What mkdocstrings is to read of layers and cells: their docstrings are made when rnn is imported,
and begin with torch.nn's own, which is linked in place of being repeated."""

import inspect
from typing import Any

from griffe import Class, Docstring, Extension

import rnn
from rnn import interop

LINK = "https://pytorch.org/docs/stable/generated/torch.nn.{name}.html"


class Layers(Extension):
    def on_class_instance(self, *, cls: Class, **_: Any) -> None:
        ours = getattr(rnn, cls.name, None)
        if cls.module.path != "rnn.modules" or cls.name not in interop.TORCH or ours is None:
            return
        theirs = interop.TORCH[cls.name].__doc__
        text = inspect.cleandoc(ours.__doc__.removeprefix(theirs))
        link = f"[`torch.nn.{cls.name}`]({LINK.format(name=cls.name)})"
        cls.docstring = Docstring(
            f"Takes the arguments of {link}, and has its parameters, shapes and formulas.\n\n{text}",
            parent=cls,
        )
