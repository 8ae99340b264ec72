"""PyTorch's private interfaces are used in rnn/transforms.py alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# File and name of what has to stand elsewhere: why.
_FOREACH = "documented in spite of its name, among torch's foreach functions: one launch for all"
ELSEWHERE: dict[tuple[str, str], str] = {
    ("kernels/gpu/tensors.py", "torch._foreach_zero_"): _FOREACH,
    ("kernels/gpu/triton_kernels/library.py", "torch._foreach_copy_"): _FOREACH,
}


def private(name: str) -> bool:
    """Whether a dotted name of torch has a part that begins with one underscore."""
    return bool(re.match(r"torch\.(\w+\.)*_(?!_)\w", name))


def dotted(node: ast.expr) -> str:
    """a.b.c as it is written, "" for other expressions."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def names(tree: ast.Module) -> Iterator[str]:
    """All dotted names that a module imports, reads, or has as a string. What was imported goes by
    its full name."""
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                full[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                full[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node):
            first, _, rest = dotted(node).partition(".")
            yield f"{full.get(first, first)}.{rest}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def found() -> set[tuple[str, str]]:
    folders = ROOT / "rnn", ROOT / "rnn" / "command_line"
    paths = [path for folder in folders for path in folder.glob("*.py")]
    paths += (ROOT / "kernels").rglob("*.py")
    return {
        (str(path.relative_to(ROOT)), name)
        for path in paths
        for name in names(ast.parse(path.read_text()))
        if private(name)
    }


def test_the_search() -> None:
    source = "import torch\nfrom torch import fx as f, _VF\nfrom torch.utils import _pytree as p\n"
    source += "f.x._y; torch._C.a; p.leaves; torch.nn.Linear.__name__; g('torch._dynamo.config')"
    assert {name for name in names(ast.parse(source)) if private(name)} == {
        "torch._VF",
        "torch.fx.x._y",
        "torch._C",
        "torch._C.a",
        "torch.utils._pytree",
        "torch.utils._pytree.leaves",
        "torch._dynamo.config",
    }


def test_in_one_file() -> None:
    here = found()
    assert {path for path, _ in here} >= {"rnn/transforms.py"}
    assert {use for use in here if use[0] != "rnn/transforms.py"} == {*ELSEWHERE}
