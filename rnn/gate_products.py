"""Cells that multiply up, over the steps, how much of a state each step keeps."""

import operator as arithmetic
from typing import Any

from .kernels import cells
from .kernels.adjoint import elementwise_jacobian
from .kernels.cells import Cell

_ARITHMETIC = dict(
    add=arithmetic.add,
    subtract=arithmetic.sub,
    multiply=arithmetic.mul,
    divide=arithmetic.truediv,
)


def with_products(cell: Cell) -> tuple[Cell, list[int]]:
    """The cell with further states, the products of the elementwise derivatives of those of its
    states that have any; and which these are."""
    step = cell.recorded()
    try:
        diagonal = elementwise_jacobian(step)[: cell.carried]
    except TypeError:
        diagonal = []
    gated = [k for k, factor in enumerate(diagonal) if factor != 0]
    if not gated or cell.constants:
        return cell, []
    found = cell.variants.get("products")
    if found is None:

        def product_step(x: Any, r: Any, s: Any) -> Any:
            known = dict(zip((*step.x, *step.r, *step.s), (*x, *r, *s)))
            for operation, arguments, result in step.tape.lines:
                values = [known.get(a, a) for a in arguments]
                function = _ARITHMETIC.get(operation) or getattr(cells, operation)
                known[result] = function(*values)
            products = [
                s[cell.states + place] * known.get(diagonal[k], diagonal[k])
                for place, k in enumerate(gated)
            ]
            return (*(known.get(v, v) for v in step.s_next), *products)

        states = cell.states + len(gated)
        found = Cell(f"{cell.name}-products", product_step, gates=cell.gates, states=states)
        cell.variants["products"] = found
    return found, gated
