"""A cell's forward and backward, derived from its step alone by reverse-mode differentiation.

The gradient of a value is kept as terms sign * root * factor: `root` is what came from outside, a
sum of such terms or the result of a function that is not a product, and `factor` a product of the
step's own values. So a gradient meets one product, whose factors are known before it arrives.

What the adjoint needs of the step is, in this order: a state before or after it, which is kept in
any case; computed once more, where states and saved values are enough; or saved."""

import builtins
import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from .tracing import FUNCTIONS, INFIX, Line, Tape, Value
from .tracing import recorded as recorded


class Term(NamedTuple):
    """sign * root * factor; a factor of None is 1."""

    sign: int
    root: Value
    factor: Any


class Step(NamedTuple):
    """A recorded step: its operations, its inputs and the new states, values or numbers."""

    tape: Tape
    x: tuple[Value, ...]
    r: tuple[Value, ...]
    s: tuple[Value, ...]
    s_next: tuple[Any, ...]


class Functions(NamedTuple):
    """As the docstring of cells.py has them."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def record(step: Callable[..., Any], gates: int, states: int, constants: int) -> Step:
    """What `recorded` has made of a step, on values. `states` counts the constants, which are its
    last argument if there are any, and stay what they are."""
    tape = Tape(shared=True)
    x = tape.inputs("x", gates)
    r = tape.inputs("r", gates)
    s = tape.inputs("s", states)
    carried = states - constants
    arguments = (x, r, s[:carried], s[carried:]) if constants else (x, r, s)
    s_next = step(*arguments)
    return Step(tape, x, r, s, (*s_next, *s[carried:]))


def derive(step: Step, names: Mapping[str, Any]) -> Functions:
    """The forward and the backward of the step, as functions whose free names are `names`."""
    needed = _needed(step)
    saved = _choose_saved(step, needed)
    results = [*step.s_next, *saved]
    lines = _used(step.tape.lines, results)
    body = _assignments(lines)
    s_next = _tuple([_as_array(value) for value in step.s_next])
    body += [f"return {s_next}, {_tuple(saved)}"]
    forward = _function("forward(x, r, s)", body, names)
    backward = _function("backward(saved, s, s_next, ds)", _backward_body(step, saved), names)
    return Functions(forward, backward)


def elementwise_jacobian(step: Step) -> list[Any]:
    """The derivative of each new state by the state before it, unit by unit and leaving out what
    flows through W_hh, as values of the step's own tape, or 0."""
    diagonal: list[Any] = []
    for before, after in zip(step.s, step.s_next):
        one = Value(step.tape, "1")
        seeds = [(after, one)] if isinstance(after, Value) else []
        gradients = _sweep(step.tape, step.tape.lines[:], seeds, lambda v: v)
        term = gradients.get(before)
        if term is None:
            diagonal.append(0)
        elif term.root is one:
            factor = 1 if term.factor is None else term.factor
            diagonal.append(factor if term.sign > 0 else -factor)
        else:
            raise TypeError("a step with relu or clip_grad has no gate to be read off")
    return diagonal


def _needed(step: Step) -> list[Value]:
    """The values of the step that its adjoint asks for, in the order of the step."""
    asked = set()

    def note(value: Value) -> Value:
        asked.add(value)
        return value

    tape = Tape(shared=True)
    seeds = _seeds(step, tape.inputs("ds", len(step.s)))
    _sweep(tape, step.tape.lines, seeds, note)
    every = [*step.x, *step.r, *step.s, *(line.result for line in step.tape.lines)]
    return [value for value in every if value in asked]


def _choose_saved(step: Step, needed: Sequence[Value]) -> list[Value]:
    """The values to be saved for those that are needed: a function's result or an input, and of an
    expression what it takes, or where that is more than one value, itself."""
    producer = {line.result: line for line in step.tape.lines}
    kept = {*step.s, *(value for value in step.s_next if isinstance(value, Value))}
    saved: list[Value] = []

    def missing(value: Any) -> set[Value]:
        """What has to be saved beside the rest to have the value."""
        if not isinstance(value, Value) or value in kept:
            return set()
        if value not in producer:
            return {value}
        operation, arguments, _ = producer[value]
        parts = {part for argument in arguments for part in missing(argument)}
        return {value} if parts and operation in FUNCTIONS else parts

    def is_expression(value: Value) -> bool:
        return value in producer and producer[value].operation in INFIX

    # Expressions last: what they take may be saved by then.
    for value in sorted(needed, key=is_expression):
        parts = missing(value)
        chosen = parts if len(parts) == 1 else {value} if parts else set()
        saved += chosen
        kept |= chosen
    order = [*step.x, *step.r, *producer]
    return sorted(saved, key=order.index)


def _backward_body(step: Step, saved: Sequence[Value]) -> list[str]:
    """Statements: the gradients of x, r and the states from those of the new states."""
    tape = Tape(shared=True)
    producer = {line.result: line for line in step.tape.lines}
    known: dict[Value, Value] = {}
    known.update(zip(step.s, tape.inputs("s", len(step.s))))
    for value, state in zip(step.s_next, tape.inputs("s_next", len(step.s))):
        if isinstance(value, Value):
            known.setdefault(value, state)
    known.update(zip(saved, tape.inputs("saved", len(saved))))

    def primal(value: Any) -> Any:
        """A value of the step, in the adjoint."""
        if not isinstance(value, Value):
            return value
        if value not in known:
            operation, arguments, _ = producer[value]
            known[value] = tape.do(operation, *map(primal, arguments))
        return known[value]

    seeds = _seeds(step, tape.inputs("ds", len(step.s)))
    gradients = _sweep(tape, step.tape.lines, seeds, primal)

    def result(value: Value) -> Any:
        term = gradients.get(value)
        if term is None:
            return 0
        product = _product(tape, term)
        return product if term.sign > 0 else tape.do("multiply", product, -1)

    dx = [result(value) for value in step.x]
    dr = [result(value) for value in step.r]
    ds_prev = [result(value) for value in step.s]
    body = _assignments(_used(tape.lines, [*dx, *dr, *ds_prev]))
    of_x, of_r, of_s = (
        _tuple([_as_array(value, "ds[0]") for value in group]) for group in (dx, dr, ds_prev)
    )
    if dx == dr:
        # One tuple: cells.py says why.
        return [*body, f"d = {of_x}", f"return d, d, {of_s}"]
    return [*body, f"return {of_x}, {of_r}, {of_s}"]


def _seeds(step: Step, ds: Sequence[Value]) -> list[tuple[Value, Value]]:
    return [(value, d) for value, d in zip(step.s_next, ds) if isinstance(value, Value)]


def _sweep(
    tape: Tape,
    lines: Sequence[Line],
    seeds: Iterable[tuple[Value, Value]],
    primal: Callable[[Any], Any],
) -> dict[Value, Term]:
    """The gradient of every value that the seeds, values with their gradients, depend on. New
    operations go to `tape`; `primal` says what stands there for a value of the lines."""
    terms: dict[Value, list[Term]] = {}
    for value, d in seeds:
        terms.setdefault(value, []).append(Term(1, d, None))
    for line in reversed(lines):
        if line.result not in terms:
            continue
        total = _sum(tape, terms[line.result])
        terms[line.result] = [total]
        for argument, term in _rule(tape, line, total, primal):
            if isinstance(argument, Value):
                terms.setdefault(argument, []).append(term)
    return {value: _sum(tape, found) for value, found in terms.items()}


def _rule(tape: Tape, line: Line, d: Term, primal: Callable[[Any], Any]) -> list[tuple[Any, Term]]:
    """The gradients of an operation's arguments from that of its result."""
    operation, arguments, y = line
    a = arguments[0]
    b = arguments[-1]
    sign, root, factor = d

    def scaled(value: Any) -> Term:
        return Term(sign, root, _times(tape, factor, value))

    if operation == "add":
        return [(a, d), (b, d)]
    if operation == "subtract":
        return [(a, d), (b, Term(-sign, root, factor))]
    if operation == "multiply":
        found = []
        if isinstance(a, Value):
            found.append((a, scaled(primal(b))))
        if isinstance(b, Value):
            found.append((b, scaled(primal(a))))
        return found
    if operation == "divide":
        found = []
        if isinstance(a, Value):
            quotient = tape.do("divide", 1 if factor is None else factor, primal(b))
            found.append((a, Term(sign, root, quotient)))
        if isinstance(b, Value):
            of_b = scaled(tape.do("divide", primal(y), primal(b)))
            found.append((b, Term(-of_b.sign, of_b.root, of_b.factor)))
        return found
    if operation in ("tanh", "sigmoid", "exp", "rsqrt"):
        return [(a, scaled(_derivative(tape, operation, primal(y))))]
    if operation == "row_mean":
        return [(a, Term(sign, tape.do("row_mean", _product(tape, d)), None))]
    if operation == "relu":
        return [(a, Term(sign, tape.do("relu_grad", _product(tape, d), primal(y)), None))]
    if operation == "clip_grad":
        return [(a, Term(sign, tape.do("clamp", _product(tape, d), b), None))]
    raise TypeError(f"{operation} has no derivative here")


def _derivative(tape: Tape, operation: str, y: Value) -> Value:
    """Of a function, from its value."""
    if operation == "tanh":
        return tape.do("subtract", 1, tape.do("multiply", y, y))
    if operation == "sigmoid":
        return tape.do("multiply", y, tape.do("subtract", 1, y))
    if operation == "rsqrt":
        cube = tape.do("multiply", tape.do("multiply", y, y), y)
        return tape.do("multiply", cube, -0.5)
    return y


def _sum(tape: Tape, terms: Sequence[Term]) -> Term:
    """Terms of one root are one product with the sum of their factors."""
    of_root: dict[Value, list[Term]] = {}
    for term in terms:
        of_root.setdefault(term.root, []).append(term)
    if len(of_root) == 1:
        ((root, group),) = of_root.items()
        if len(group) == 1:
            return group[0]
        factors = [(sign, 1 if factor is None else factor) for sign, _, factor in group]
        sign, factor = _signed_sum(tape, factors)
        return Term(sign, root, factor)
    products = []
    for group in of_root.values():
        term = _sum(tape, group)
        products.append((term.sign, _product(tape, term)))
    sign, total = _signed_sum(tape, products)
    return Term(sign, total, None)


def _signed_sum(tape: Tape, parts: Sequence[tuple[int, Any]]) -> tuple[int, Any]:
    """A sign, and a sum with that sign: one that begins with a positive part."""
    overall = 1 if any(sign > 0 for sign, _ in parts) else -1
    ordered = sorted(parts, key=lambda part: -part[0] * overall)
    total = ordered[0][1]
    for sign, value in ordered[1:]:
        total = tape.do("add" if sign == overall else "subtract", total, value)
    return overall, total


def _times(tape: Tape, factor: Any, value: Any) -> Any:
    return value if factor is None else tape.do("multiply", factor, value)


def _product(tape: Tape, term: Term) -> Value:
    """Without its sign."""
    return term.root if term.factor is None else tape.do("multiply", term.root, term.factor)


def _used(lines: Sequence[Line], results: Iterable[Any]) -> list[Line]:
    """The lines that the results depend on."""
    wanted = {value for value in results if isinstance(value, Value)}
    used = []
    for line in reversed(lines):
        if line.result in wanted:
            used.append(line)
            wanted.update(value for value in line.arguments if isinstance(value, Value))
    return used[::-1]


def _assignments(lines: Sequence[Line]) -> list[str]:
    body = []
    for operation, arguments, result in lines:
        words = [str(a) if isinstance(a, Value) else repr(float(a)) for a in arguments]
        if operation in INFIX:
            expression = f"{words[0]} {INFIX[operation]} {words[1]}"
        else:
            expression = f"{operation}({', '.join(words)})"
        body.append(f"{result} = {expression}")
    return body


def _as_array(value: Any, like: str = "s[0]") -> str:
    """A result, which may be a number."""
    if isinstance(value, Value):
        return str(value)
    return f"zeros_like({like})" + (f" + {float(value)!r}" if value else "")


def _tuple(parts: Iterable[Any]) -> str:
    texts = [*map(str, parts)]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


def _function(signature: str, body: Sequence[str], names: Mapping[str, Any]) -> Callable[..., Any]:
    """A function of that text, which `inspect.getsource` finds, as Triton's compiler does."""
    source = "".join(f"{line}\n" for line in (f"def {signature}:", *(f"    {b}" for b in body)))
    file = f"<cell {sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = compile(source, file, "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    # Dynamo looks for the built-in names in a function's globals
    return FunctionType(code, {"__builtins__": builtins, **names}, code.co_name)
