"""A model's program as one flat list of operations, each with the layer that it belongs to.

The program is JAX's own trace (jaxpr) of the model. Calls of functions, such as those with a custom
gradient, are inlined; a scan is its body, repeated. The layer of an operation is the path of the innermost
linen module whose method was running.

Names of primitives and of their parameters, and name stacks, are internals of JAX. This module reads them,
`bvit_jax.cost.count` and `bvit_jax.cost.values` list primitives by name, and nothing else does. What they do
not know is listed as uncounted; a test fails if one of our models has any of it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.extend import core

Path = tuple[str, ...]

_MODULE = re.compile(r"@(\d+)")  # named scope of a module, by number: linen's own lack the whole path
CARRIED_WITH = "carried_with"  # key of the arrays that the carry of a loop may depend on
_CALLS = {  # to the parameter that holds the program that is called
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclass(eq=False)
class Node:
    """An array of the program, compared by identity.

    Attributes:
      shape, dtype: of the array.
      name: for an input its path in the arguments, otherwise None.
      value: for a constant that is a single number its value, otherwise None.
    """

    shape: tuple[int, ...]
    dtype: Any
    name: Path | None = None
    value: float | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        """Its size in memory, in its dtype."""
        return self.size * int(self.dtype.itemsize)


@dataclass(eq=False)
class Operation:
    """One primitive operation.

    Attributes:
      name: the name of the primitive.
      layer: path of the module that it belongs to.
      scopes: the other named scopes around it, the innermost last.
      inputs, outputs: arrays.
      params: the parameters of the primitive.
      times: how often it runs; more than once within scans.
    """

    name: str
    layer: Path
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    params: Mapping[str, Any]
    scopes: Path = ()
    times: int = 1


@dataclass
class Program:
    """What a function computes.

    Attributes:
      inputs: in the order of the flattened arguments.
      operations: in the order of the trace.
      outputs: in the order of the flattened results.
      modules: every linen module that ran, unbound, by path.
    """

    inputs: list[Node] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    modules: dict[Path, nn.Module] = field(default_factory=dict)


def trace(function: Callable[..., Any], *arguments: Any) -> Program:
    """Traces a function of arrays; nothing is computed.

    Args:
      function: what to trace; it may call linen modules.
      arguments: trees of arrays or of their shapes.
    """
    program = Program()
    paths: list[Path] = []  # of modules, by number

    def scoped(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.path not in program.modules:
            paths.append(module.path)
        program.modules[module.path] = module
        with jax.named_scope(f"@{paths.index(module.path)}"):
            return call(*args, **kwargs)

    def run(*arguments: Any) -> Any:
        with nn.intercept_methods(scoped):
            return function(*arguments)

    closed = jax.make_jaxpr(run)(*arguments)
    names = [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(arguments)]
    program.inputs = [_node(v.aval, name) for v, name in zip(closed.jaxpr.invars, names, strict=True)]
    program.outputs = _inline(closed.jaxpr, closed.consts, program.inputs, program, _Place(paths), 1)
    return program


def _path(keys: Sequence[Any]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _node(aval: Any, name: Path | None = None) -> Node:
    return Node(tuple(aval.shape), aval.dtype, name)


def _constant(value: Any, aval: Any) -> Node:
    node = _node(aval)
    if node.size == 1 and isinstance(node.dtype, np.dtype) and node.dtype.kind in "biuf":
        node.value = float(np.asarray(value).reshape(()))
    return node


def _inline(
    jaxpr: core.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Node],
    program: Program,
    place: "_Place",
    times: int,
) -> list[Node]:
    """Appends the operations of a jaxpr to a program; returns the arrays that it returns."""
    nodes: dict[Any, Node] = dict(zip(jaxpr.invars, inputs, strict=True))
    nodes.update((v, _constant(c, v.aval)) for v, c in zip(jaxpr.constvars, consts, strict=True))

    def read(atom: Any) -> Node:
        return _constant(atom.val, atom.aval) if isinstance(atom, core.Literal) else nodes[atom]

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        within = place.at(_scopes(equation))
        given = [read(atom) for atom in equation.invars]
        if name in _CALLS and _CALLS[name] in params:
            called, constants = _open(params[_CALLS[name]])
            results = _inline(called, constants, given, program, within, times)
        elif name == "scan":
            results = _inline_scan(equation, given, program, within, times)
        else:
            results = [_node(v.aval) for v in equation.outvars]
            program.operations.append(
                Operation(name, within.layer, tuple(given), tuple(results), params, within.scopes, times)
            )
        nodes.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _scopes(equation: Any) -> list[str]:
    """Returns the named scopes that an equation is in, without the transformations applied to them.

    Raises:
      RuntimeError: this version of JAX keeps them elsewhere.
    """
    try:
        text = str(equation.source_info.name_stack)
    except AttributeError as error:
        raise RuntimeError(
            f"bvit_jax.cost cannot read the named scopes of jax {jax.__version__}: {error}"
        ) from error
    return [scope.split("(")[-1].rstrip(")") for scope in text.split("/")]


def _open(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def _inline_scan(
    equation: Any, given: Sequence[Node], program: Program, place: "_Place", times: int
) -> list[Node]:
    """Appends a scan as its body, repeated, between the operations that take its data apart and join it."""
    params = equation.params
    body, consts = _open(params["jaxpr"])
    # By the axis that only what is taken apart or joined has more of: jax's own counts differ by version.
    sliced = sum(_rank(v) > _rank(inner) for v, inner in zip(equation.invars, body.invars))
    carried = sum(_rank(v) == _rank(inner) for v, inner in zip(equation.outvars, body.outvars))
    constants = len(given) - carried - sliced
    inputs = list(given[:constants])
    for i, variable in enumerate(body.invars[constants:], constants):
        node = _node(variable.aval)
        is_carried = i < constants + carried
        kind = "scan_carry" if is_carried else "scan_slice"
        more = {CARRIED_WITH: tuple(given)} if is_carried else {}
        program.operations.append(Operation(kind, place.layer, (given[i],), (node,), more, (), times))
        inputs.append(node)
    outputs = _inline(body, consts, inputs, program, place, times * params["length"])
    results = [_node(variable.aval) for variable in equation.outvars]
    for i, (output, result) in enumerate(zip(outputs, results, strict=True)):
        kind = "scan_carry" if i < carried else "scan_stack"
        program.operations.append(Operation(kind, place.layer, (output,), (result,), {}, (), times))
    return results


def _rank(variable: Any) -> int:
    return variable.aval.ndim


@dataclass(frozen=True)
class _Place:
    """Where in the model an operation is: the module, and the named scopes inside it.

    Attributes:
      paths: those of the modules, by the number in their named scope.
      layer: path of the module.
      scopes: the innermost last.
    """

    paths: list[Path]
    layer: Path = ()
    scopes: Path = ()

    def at(self, names: Sequence[str]) -> "_Place":
        """Returns the place of an operation that is called here within further named scopes."""
        layer, scopes = self.layer, list(self.scopes)
        for name in names:
            if found := _MODULE.fullmatch(name):
                outer, layer = layer, self.paths[int(found[1])]
                scopes = scopes if layer == outer else []  # another method of a module keeps them
            elif name:
                scopes.append(name)
        return _Place(self.paths, layer, tuple(scopes))
