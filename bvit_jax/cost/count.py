"""What a model costs, layer by layer, counted from its own program."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from bvit_jax.binary.convolutions import GROUPS_SCOPE
from bvit_jax.cost.memory import largest_live_set, saved_for_backward
from bvit_jax.cost.program import Node, Operation, Path, Program, trace
from bvit_jax.cost.values import LAYOUT, Value, analyse
from bvit_jax.layers.activation import ACTIVATION_SCOPE, SOFTMAX_SCOPE
from bvit_jax.layers.grid import POOLING_SCOPE
from bvit_jax.weights.state_dicts import abstract_variables

BINARY = "binary"
BINARY_WEIGHT = "binary_weight"  # and a real input
BINARY_INPUT = "binary_input"  # and a real weight, or one of several bits
REAL = "real"
KINDS = (BINARY, BINARY_WEIGHT, BINARY_INPUT, REAL)
BINARY_PER_OP = 64  # binary multiply-accumulates per operation: a 64-bit XNOR and popcount
FLOAT_BYTES = 4

OTHER = "shortcuts, biases, shifts, signs, scales"
CONCEPTS = {  # of element-wise operations, by named scope or by class of the module
    "BatchNorm": "normalisation",
    "LayerNorm": "normalisation",
    "RPReLU": "activation",
    ACTIVATION_SCOPE: "activation",
    "LayerScale": "affine before a shortcut",
    POOLING_SCOPE: "pooling",
    SOFTMAX_SCOPE: "softmax",
}

_PRODUCTS = ("dot_general", "conv_general_dilated")
_ELEMENTWISE_NAMES = """
abs acos add add_any and asin atan2 cbrt ceil clamp cos digamma div eq erf erf_inv erfc exp exp2
expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter
not or polynomial pow rem round rsqrt select_n sign sin sqrt square sub tan tanh xor
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
_REDUCTION_NAMES = """
argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum
"""
_REDUCTIONS = frozenset(_REDUCTION_NAMES.split())
_WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
_FREE = LAYOUT | {"bitcast_convert_type", "iota"}
KNOWN = _FREE.union(_PRODUCTS, _ELEMENTWISE, _REDUCTIONS, _WINDOWS)


@dataclass
class LayerCost:
    """The cost of one module for one image, without its submodules.

    Attributes:
      path: of the module in the model, "" for the model itself.
      kind: the class of the module.
      binary_params, low_bit_params, real_params: learned values by how inference must keep them: in one
        bit, in a few, as a float32.
      packed_bits: size of the learned values when packed, including the scales of binary weights.
      scales: float32 numbers that inference needs for binary weights in addition to their bits.
      statistics: running statistics, which are not parameters.
      macs: multiply-accumulates of products by kind, one of `KINDS`.
      elementwise_by: operations on single elements that depend on the image, by `CONCEPTS`.
      moved_bytes: size of the operands and results of the products, in the dtypes of the program.
      packed_moved_bytes: the same with one bit per element of a binary operand.
      saved_bytes: size of the arrays made here that a training step saves for its backward pass.
    """

    path: str
    kind: str
    binary_params: int = 0
    low_bit_params: int = 0
    real_params: int = 0
    packed_bits: int = 0
    scales: int = 0
    statistics: int = 0
    macs: Counter[str] = field(default_factory=Counter)
    elementwise_by: Counter[str] = field(default_factory=Counter)
    moved_bytes: int = 0
    packed_moved_bytes: int = 0
    saved_bytes: int = 0

    @property
    def params(self) -> int:
        """All learned values."""
        return self.binary_params + self.low_bit_params + self.real_params

    @property
    def packed_bytes(self) -> int:
        """Size of the learned values in memory when packed."""
        return -(-self.packed_bits // 8)

    @property
    def float_bytes(self) -> int:
        """Size of the learned values in memory in float32."""
        return FLOAT_BYTES * self.params

    @property
    def real_macs(self) -> int:
        """The multiply-accumulates that are not an XNOR: all but those of two binary operands."""
        return sum(self.macs.values()) - self.macs[BINARY]

    @property
    def elementwise(self) -> int:
        """All element-wise operations."""
        return sum(self.elementwise_by.values())

    @property
    def ops(self) -> float:
        """Operations by the papers' convention: binary multiply-accumulates over 64, plus the real ones."""
        return self.macs[BINARY] / BINARY_PER_OP + self.real_macs

    @property
    def ops_with_elementwise(self) -> float:
        """`ops` with every element-wise operation counted as one."""
        return self.ops + self.elementwise

    @property
    def macs_per_byte(self) -> float:
        """Arithmetic intensity of the products: multiply-accumulates per byte moved."""
        return sum(self.macs.values()) / self.moved_bytes if self.moved_bytes else 0.0

    @property
    def macs_per_packed_byte(self) -> float:
        """The same with binary operands packed."""
        return sum(self.macs.values()) / self.packed_moved_bytes if self.packed_moved_bytes else 0.0


@dataclass(frozen=True)
class Uncounted:
    """Something that the count leaves out.

    Attributes:
      path: of the module.
      what: the operation, or the parameter that no counted operation takes.
      elements: of the results of all its runs, or of the parameter.
    """

    path: str
    what: str
    elements: int


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model for one image.

    Attributes:
      layers: one entry per path, in the order of their first operation.
      uncounted: what the other numbers leave out.
      inference_bytes: the largest live set of a forward pass; see `bvit_jax.cost.memory`.
    """

    layers: tuple[LayerCost, ...]
    uncounted: tuple[Uncounted, ...]
    inference_bytes: int

    @functools.cached_property
    def total(self) -> LayerCost:
        """The sum of the layers."""
        return add_up(self.layers, "total", "")

    def grouped(self, depth: int) -> tuple[LayerCost, ...]:
        """Returns the layers with modules below ``depth`` added to their parent; 0 keeps all of them."""
        if not depth:
            return self.layers
        groups: dict[str, list[LayerCost]] = defaultdict(list)
        for layer in self.layers:
            groups["/".join(layer.path.split("/")[:depth])].append(layer)
        kinds = {layer.path: layer.kind for layer in self.layers}
        return tuple(add_up(group, path, kinds.get(path, "")) for path, group in groups.items())


def add_up(layers: Iterable[LayerCost], path: str, kind: str) -> LayerCost:
    """Returns the sum of layers under another name."""
    total = LayerCost(path, kind)
    for layer in layers:
        for name, value in vars(layer).items():
            if name not in ("path", "kind"):
                setattr(total, name, getattr(total, name) + value)
    return total


def cost_of(
    model: nn.Module,
    image_size: int,
    dtype: DTypeLike = jnp.float32,
    *,
    training: bool = True,
    trained: nn.Module | None = None,
) -> ModelCost:
    """Counts the cost of a model for one image by tracing it; computes nothing and allocates nothing.

    Args:
      model: takes images (batch, size, size, 3) and ``train``, and returns logits as the models here do.
      image_size: in pixels.
      dtype: of the images.
      training: whether to trace the backward pass too, which takes most of the time; otherwise
        ``saved_bytes`` is 0.
      trained: the model as it is trained, for example with rematerialisation; ``model`` if None.
    """
    variables = jax.tree.map(_float32, abstract_variables(model, image_size))
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), dtype)

    def logits(variables: Any, images: Any) -> Any:
        output: Any = model.apply(variables, images)
        return output.logits

    program = trace(logits, variables, images)
    saved = saved_for_backward(trained or model, variables, images) if training else {}
    return _count(program, variables, saved)


def _float32(leaf: Any) -> Any:
    # Whatever the default dtype of the process is.
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _count(program: Program, variables: Mapping[str, Any], saved: Mapping[Path, int]) -> ModelCost:
    values = analyse(program, lambda name: name[0] == "0")  # of the two arguments, the variables
    layers: dict[Path, LayerCost] = {}

    def layer(path: Path) -> LayerCost:
        if path not in layers:
            module = program.modules.get(path)
            layers[path] = LayerCost("/".join(path), type(module).__name__ if module else "")
        return layers[path]

    uncounted: Counter[tuple[str, str]] = Counter()
    for operation in program.operations:
        result = operation.outputs[0] if operation.outputs else None
        if result is None or not any(values[node].varies for node in operation.inputs):
            continue  # of parameters alone: done once, not per image
        if operation.name in _PRODUCTS:
            _add_product(layer(operation.layer), operation, values)
        elif operation.name in _ELEMENTWISE:
            _add_elementwise(layer(operation.layer), operation, result.size)
        elif operation.name in _REDUCTIONS:
            _add_elementwise(layer(operation.layer), operation, operation.inputs[0].size)
        elif operation.name in _WINDOWS:
            window = math.prod(operation.params["window_dimensions"])
            _add_elementwise(layer(operation.layer), operation, window * result.size)
        elif operation.name not in KNOWN:
            key = ("/".join(operation.layer), operation.name)
            uncounted[key] += operation.times * sum(node.size for node in operation.outputs)

    uses = _uses(program, values)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        path, size = name[1:-1], math.prod(leaf.shape)
        if name[0] != "params":
            layer(path).statistics += size
            continue
        _add_parameter(layer(path), program.modules.get(path), size, uses[("0", *name)])
        if not uses[("0", *name)]:
            uncounted["/".join(path), f"parameter {name[-1]}, used by nothing"] += size
    for path, size in saved.items():
        layer(path).saved_bytes += size
    listed = tuple(Uncounted(path, what, count) for (path, what), count in uncounted.items())
    return ModelCost(tuple(layers.values()), listed, largest_live_set(program, values))


def _add_elementwise(layer: LayerCost, operation: Operation, elements: int) -> None:
    concept = next((CONCEPTS[scope] for scope in reversed(operation.scopes) if scope in CONCEPTS), OTHER)
    if concept == OTHER:
        concept = CONCEPTS.get(layer.kind, OTHER)
    layer.elementwise_by[concept] += operation.times * elements


# --- products ----------------------------------------------------------------------------------


def _add_product(layer: LayerCost, operation: Operation, values: Mapping[Node, Value]) -> None:
    left, right = operation.inputs[:2]
    result = operation.outputs[0]
    bits = _bits(values[left], values[right])
    kind = BINARY if all(bits) else _kind(values[left], values[right])
    groups = _groups(operation)
    layer.macs[kind] += operation.times * _macs(operation) * max(math.prod(bits), 1) // groups
    sizes, whole = (left.size, right.size // groups), (left.bytes, right.bytes // groups)
    layer.moved_bytes += operation.times * (sum(whole) + result.bytes)
    packed = sum(-(-n * size // 8) if n else real for n, size, real in zip(bits, sizes, whole))
    layer.packed_moved_bytes += operation.times * (packed + result.bytes)


def _macs(operation: Operation) -> int:
    left, right = operation.inputs[:2]
    result = operation.outputs[0]
    if operation.name == "dot_general":
        (contracted, _), _ = operation.params["dimension_numbers"]
        return result.size * math.prod(left.shape[axis] for axis in contracted)
    features = right.shape[operation.params["dimension_numbers"].rhs_spec[0]]
    return result.size * (right.size // features)  # padding included


def _groups(operation: Operation) -> int:
    """Returns the groups of channels of a convolution, whose kernel is zero between them."""
    found = (scope for scope in operation.scopes if scope.startswith(GROUPS_SCOPE))
    return next((int(scope.removeprefix(GROUPS_SCOPE)) for scope in found), 1)


def _bits(left: Value, right: Value) -> tuple[int, int]:
    """Returns how many bits an element of each operand needs, 0 for one that is real.

    A sum of several arrays of codes needs one for each, if the other operand has one bit: then the product is
    that many products.
    """
    several = left.one_bit or right.one_bit
    a, b = (1 if x.one_bit else x.terms if several and x.terms > 1 else 0 for x in (left, right))
    return a, b


def _kind(left: Value, right: Value) -> str:
    """Returns the kind of a product that is not binary."""
    if not (left.one_bit or right.one_bit):
        return REAL
    bits, other = (left, right) if left.one_bit else (right, left)
    if bits.varies and other.varies:
        return BINARY_INPUT
    return BINARY_INPUT if bits.varies else BINARY_WEIGHT


# --- parameters --------------------------------------------------------------------------------


def _uses(program: Program, values: Mapping[Node, Value]) -> Mapping[Path, list[Value]]:
    """Returns, per parameter, every value derived from it that meets one that depends on the image."""
    uses: dict[Path, list[Value]] = defaultdict(list)
    for operation in program.operations:
        inputs = [values[node] for node in operation.inputs]
        if any(value.varies for value in inputs):
            for value in inputs:
                for source in value.sources if not value.varies else ():
                    uses[source].append(value)
    for node in program.outputs:
        for source in values[node].sources if not values[node].varies else ():
            uses[source].append(values[node])
    return uses


def _add_parameter(layer: LayerCost, module: nn.Module | None, size: int, uses: list[Value]) -> None:
    """Adds a parameter to a layer, in the fewest bits that suffice for all its uses."""
    whole = [value for value in uses if value.distinct >= size and size > 1]
    bits = getattr(module, "weight_bits", None)
    if whole and all(value.one_bit for value in whole):
        layer.binary_params += size
        scales = max((value.distinct for value in uses if value.distinct < size), default=0)
        layer.scales += scales
        layer.packed_bits += size + 8 * FLOAT_BYTES * scales
    elif whole and type(bits) is int and 2 <= bits <= 8 and all(value.raw is None for value in whole):
        layer.low_bit_params += size
        layer.scales += 1
        layer.packed_bits += bits * size + 8 * FLOAT_BYTES
    else:
        layer.real_params += size
        layer.packed_bits += 8 * FLOAT_BYTES * size
