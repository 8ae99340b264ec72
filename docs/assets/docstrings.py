"""What mkdocstrings is to read of layers and cells: their docstrings are made when rnn is imported,
and begin with torch.nn's own, which is linked in place of being repeated."""

import inspect
import re
from typing import Any

from griffe import Class, Docstring, Extension, Object

import rnn
from rnn import interop

FIELD = re.compile(r"^(\w+): (?=\S)", re.M)
LINK = "https://pytorch.org/docs/stable/generated/torch.nn.{name}.html"


class Docstrings(Extension):
    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """A product such as L*D is no emphasis, and `name: text` an item of a list."""
        if obj.docstring is not None:
            text = re.sub(r"\n(?=Returns |Raises )", "\n\n", obj.docstring.value)
            text = FIELD.sub(r"- `\1`: ", text)
            obj.docstring.value = re.sub(r"(?<=\w)\*(?=\w)", r"\\*", text)

    def on_class_instance(self, *, cls: Class, **_: Any) -> None:
        ours = getattr(rnn, cls.name, None)
        if cls.module.path != "rnn.modules" or cls.name not in interop.TORCH or ours is None:
            return
        theirs = interop.TORCH[cls.name].__doc__
        text = inspect.cleandoc(ours.__doc__.removeprefix(theirs))
        text = text.replace("Beside the arguments of torch.nn's layer:", "Args:")
        link = f"[`torch.nn.{cls.name}`]({LINK.format(name=cls.name)})"
        head = f"Takes the arguments of {link}, and has its parameters, shapes and formulas."
        cls.docstring = Docstring(
            f"{head}\n\n{text}", parent=cls, parser="google", parser_options={"warnings": False}
        )
