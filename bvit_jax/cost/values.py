"""What is known of every array of a program without running it: does one bit per element suffice?

The analysis goes through the operations in order and tracks, per array, whether it depends on the images,
whether its values are integers and in which range, and which parameters it is derived from. An array of
integers in [-1, 1] consists of codes: signs, or the {0, 1} of binarised probabilities. That includes the
sign of exactly zero, which is 0 in most of the models and has no bit. A few arrays of codes, each times a
number, may be added: a product with the sum is as many products of codes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bvit_jax.cost.program import CARRIED_WITH, Node, Operation, Path, Program

# Operations that move or retype data, by what the elements of the result are.
_LAYOUT_NAMES = """
broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice dynamic_update_slice
expand_dims gather name optimization_barrier pad reduce_precision reshape rev scan_carry scan_slice
scan_stack select_n slice split squeeze stop_gradient tile transpose sharding_constraint pvary
mesh_cast reshard real unstack
"""
LAYOUT = frozenset(_LAYOUT_NAMES.split())
MOST_TERMS = 3  # two bits: codes from 0 to 3 are the sum of three masks


@dataclass(frozen=True)
class Value:
    """What is known of the elements of an array.

    Attributes:
      varies: whether it depends on the images (or on a random key), not on parameters alone.
      integer: whether all elements are integers.
      low, high: bounds of the elements.
      sources: the parameters and statistics that it is derived from.
      raw: the parameter or statistic that it is, up to layout and dtype; otherwise None.
      distinct: the number of elements that are not copies of others by broadcasting.
      moved: whether the bounds are those before the addition of an integer that does not depend on the
        images: codes with an offset are still codes.
      terms: of how many arrays of codes it is the sum, each times a number of its own; 0 if that is not known
        or more than `MOST_TERMS`.
    """

    varies: bool
    integer: bool = False
    low: float = -math.inf
    high: float = math.inf
    sources: frozenset[Path] = frozenset()
    raw: Path | None = None
    distinct: int = 1
    moved: bool = False
    terms: int = 0

    @property
    def one_bit(self) -> bool:
        """Whether one bit holds an element."""
        return self.integer and self.low >= -1 and self.high <= 1


def analyse(program: Program, fixed: Callable[[Path], bool]) -> dict[Node, Value]:
    """Returns what is known of every array of a program.

    Args:
      program: of `bvit_jax.cost.program.trace`.
      fixed: whether an input, by its name, is a parameter or statistic, constant in inference.
    """
    values: dict[Node, Value] = {}
    for node in program.inputs:
        assert node.name is not None
        is_fixed = fixed(node.name)
        sources = frozenset([node.name]) if is_fixed else frozenset()
        values[node] = Value(not is_fixed, sources=sources, raw=node.name if is_fixed else None)
        values[node] = replace(values[node], distinct=node.size, integer=_integer_dtype(node))
    for operation in program.operations:
        for node in (*operation.inputs, *operation.params.get(CARRIED_WITH, ())):
            values.setdefault(node, _of_constant(node))
        inputs = [values[node] for node in operation.inputs]
        for node in operation.outputs:
            values[node] = _result(operation, node, inputs)
            if any(values[other].varies for other in operation.params.get(CARRIED_WITH, ())):
                values[node] = replace(values[node], varies=True)
    for node in program.outputs:
        values.setdefault(node, _of_constant(node))
    return values


def _integer_dtype(node: Node) -> bool:
    return np.dtype(node.dtype).kind in "iub" if isinstance(node.dtype, np.dtype) else False


def _of_constant(node: Node) -> Value:
    if node.value is None:
        return Value(False, integer=_integer_dtype(node), distinct=node.size)
    return Value(False, float(node.value).is_integer(), node.value, node.value)


def _result(operation: Operation, node: Node, inputs: Sequence[Value]) -> Value:
    sources = frozenset[Path]().union(*(value.sources for value in inputs))
    varies = any(value.varies for value in inputs)
    known = _range(operation.name, inputs)
    if known is None and node.dtype == np.bool_:
        known = True, 0.0, 1.0
    integer, low, high = known or (_integer_dtype(node), -math.inf, math.inf)
    first = inputs[0] if inputs else None
    is_layout = operation.name in LAYOUT and first is not None
    distinct = node.size
    if is_layout and first is not None and operation.name in ("broadcast_in_dim", "tile", "reshape"):
        distinct = min(first.distinct, node.size)
    elif operation.name in (
        "convert_element_type",
        "name",
        "stop_gradient",
        "transpose",
        "optimization_barrier",
    ):
        distinct = max((value.distinct for value in inputs), default=node.size)
    elif operation.name not in LAYOUT and inputs:
        distinct = min(node.size, max(math.prod(v.distinct for v in inputs), 1))
    keeps = is_layout and operation.name != "scan_carry"
    raw = first.raw if keeps and first is not None and len(inputs) == 1 else None
    moved = known is not None and (
        any(value.moved for value in inputs) or (operation.name in ("add", "sub") and _is_offset(inputs))
    )
    value = Value(varies, integer, low, high, sources, raw, distinct, moved)
    return replace(value, terms=_terms(operation.name, value, inputs))


def _terms(name: str, value: Value, inputs: Sequence[Value]) -> int:
    """Returns `Value.terms` of the result of an operation."""
    if value.one_bit:
        return 1
    if value.integer and value.low == 0 and value.high <= MOST_TERMS and not value.moved:
        return int(value.high)  # the masks of all that reach 1, 2, 3
    terms = [given.terms for given in inputs]
    if name in ("add", "sub") and all(terms) and not any(given.moved for given in inputs):
        return sum(terms) if sum(terms) <= MOST_TERMS else 0
    if name == "mul":
        numbers = [not given.varies and given.distinct == 1 for given in inputs]
        return max((n for n, by in zip(terms, reversed(numbers), strict=True) if by), default=0)
    return terms[0] if name in LAYOUT and len(terms) == 1 else 0


Range = tuple[bool, float, float]


def _range(name: str, inputs: Sequence[Value]) -> Range | None:
    """Returns whether the elements of a result are integers, and their bounds; None if nothing is known."""
    if name == "sign":
        return True, -1.0, 1.0
    if name == "scan_carry":  # what the loop carries later is not followed
        return None
    if name in ("add", "sub") and _is_offset(inputs):
        return True, -1.0, 1.0
    if any(value.moved for value in inputs) and (name not in LAYOUT or name == "select_n"):
        return None  # the true range is not known
    if name in LAYOUT:
        return _layout_range(name, inputs)
    if name in ("round", "floor", "ceil"):
        low, high = inputs[0].low, inputs[0].high
        low = math.floor(low) if math.isfinite(low) else low
        return True, low, math.ceil(high) if math.isfinite(high) else high
    if name in _ARITHMETIC and len(inputs) == 2:
        a, b = inputs
        return (a.integer and b.integer, *_ARITHMETIC[name](a, b))
    if name == "neg":
        return inputs[0].integer, -inputs[0].high, -inputs[0].low
    if name == "abs":
        largest = max(abs(inputs[0].low), abs(inputs[0].high))
        return inputs[0].integer, 0.0, largest
    if name == "clamp":
        least, x, most = inputs
        integer = all(value.integer for value in inputs)
        return integer, max(x.low, least.low), min(x.high, most.high)
    return None


def _layout_range(name: str, inputs: Sequence[Value]) -> Range:
    used = inputs
    if name == "select_n":
        used = inputs[1:]  # the first says which
    elif name in ("gather", "dynamic_slice"):
        used = inputs[:1]  # the rest are positions
    elif name == "dynamic_update_slice":
        used = inputs[:2]
    return all(v.integer for v in used), min(v.low for v in used), max(v.high for v in used)


def _is_offset(inputs: Sequence[Value]) -> bool:
    """Returns whether a sum is that of codes and an integer that does not depend on the images.

    A product then needs the bits alone: what the integer adds to it is known in advance.
    """
    a, b = inputs
    return any(
        code.varies and code.one_bit and offset.integer and not offset.varies
        for code, offset in ((a, b), (b, a))
    )


def _product(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


def _multiply(a: Value, b: Value) -> tuple[float, float]:
    ends = [_product(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(ends), max(ends)


_ARITHMETIC: dict[str, Callable[[Value, Value], tuple[float, float]]] = {
    "add": lambda a, b: (a.low + b.low, a.high + b.high),
    "add_any": lambda a, b: (a.low + b.low, a.high + b.high),
    "sub": lambda a, b: (a.low - b.high, a.high - b.low),
    "mul": _multiply,
    "max": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
    "min": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
}
