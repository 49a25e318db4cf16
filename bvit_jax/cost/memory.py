"""The memory of activations: what a training step saves, and the most that inference needs at once."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from bvit_jax.cost.program import Node, Path, Program, trace
from bvit_jax.cost.values import Value, analyse

# Operations whose result shares the memory of their input.
_ALIASES = frozenset(
    ("copy", "copy_p", "expand_dims", "name", "optimization_barrier", "reshape", "squeeze", "stop_gradient")
)


def saved_for_backward(model: nn.Module, variables: Mapping[str, Any], images: Any) -> dict[Path, int]:
    """Returns the bytes of activations that the backward pass of the logits needs, by their layer.

    They are the residuals of JAX's reverse-mode derivative, each array counted once. Parameters, values that
    depend on parameters alone, and the images themselves are not counted. A compiler may keep less.

    Args:
      model: as it is trained.
      variables: shapes of its parameters and statistics.
      images: shape of the batch.
    """
    params = variables["params"]
    state = {name: tree for name, tree in variables.items() if name != "params"}

    def residuals(params: Any, state: Any, images: Any, key: Any) -> Any:
        def logits(params: Any) -> Any:
            output, updates = model.apply(
                {"params": params, **state}, images, train=True, rngs={"dropout": key}, mutable=list(state)
            )
            return output.logits, updates

        _, backward, _ = jax.vjp(logits, params, has_aux=True)
        return jax.tree.leaves(backward)

    key = jax.eval_shape(lambda: jax.random.key(0))
    program = trace(residuals, params, state, images, key)
    values = analyse(program, lambda name: name[0] in ("0", "1"))
    owner = _owners(program)
    made = {node: operation.layer for operation in program.operations for node in operation.outputs}
    saved: Counter[Path] = Counter()
    for node in {owner.get(node, node) for node in program.outputs}:
        if node in made and values[node].varies:
            saved[made[node]] += node.bytes
    return dict(saved)


def largest_live_set(program: Program, values: Mapping[Node, Value]) -> int:
    """Returns the bytes of the activations that are alive at once, at the worst operation of a program.

    The operations run in the order of the program and each writes its result to memory; a compiler that
    fuses them needs less. Parameters, and values that depend on parameters alone, are not counted.
    """
    owner = _owners(program)
    last: dict[Node, int] = {}
    for i, operation in enumerate(program.operations):
        for node in operation.inputs:
            last[owner.get(node, node)] = i
    for node in program.outputs:
        last[owner.get(node, node)] = len(program.operations)
    live = sum(node.bytes for node in program.inputs if values[node].varies)
    ends: Counter[int] = Counter()
    for node, end in last.items():
        if values[node].varies:
            ends[end] += node.bytes
    most = live
    for i, operation in enumerate(program.operations):
        for node in operation.outputs:
            if node not in owner and values[node].varies:
                live += node.bytes
                if node not in last:  # nothing reads it
                    ends[i] += node.bytes
        most = max(most, live)
        live -= ends[i]
    return most


def _owners(program: Program) -> dict[Node, Node]:
    """Returns, per array without memory of its own, the array whose memory it shares."""
    owner: dict[Node, Node] = {}
    for operation in program.operations:
        if operation.name in _ALIASES:
            for given, result in zip(operation.inputs, operation.outputs):
                owner[result] = owner.get(given, given)
    return owner
