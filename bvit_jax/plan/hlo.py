"""What a compiled program does, from its HLO text: its collectives, and the bytes of memory it touches."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from bvit_jax.layers.closed_form import BATCH_NORM_SCOPE

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all"]
Purpose = Literal["gradient", "batch_norm_forward", "batch_norm_backward", "other"]

KINDS: tuple[Kind, ...] = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
PURPOSES: tuple[Purpose, ...] = ("gradient", "batch_norm_forward", "batch_norm_backward", "other")

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) "
    r"(?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\("
)
# What every operation between devices has, and no other.
_BETWEEN_DEVICES = re.compile(r"[ ,](?:channel_id|replica_groups|source_target_pairs)=")
_ELEMENT = re.compile(r"get-tuple-element\((?:.*? )?%?([\w.\-]+)\), index=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALL = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?(%?[\w.\-]+(?:, %[\w.\-]+)*)")
_BRANCHES = re.compile(
    r"(?:branch_computations|true_computation|false_computation)=\{?([^,}]+(?:, %[^,}]+)*)"
)
_BATCH_NORM = re.compile(rf"\b{BATCH_NORM_SCOPE}\b")  # in jvp(batch_norm) as well as in norm/batch_norm/sum
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LAYOUT = re.compile(r"\{[^{}]*\}|/\*.*?\*/")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)(?= [a-z])|\S+) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NEAR = "S(1)"  # of a layout: memory on the chip's own die, not its HBM
_CALLERS = ("while", "conditional", "call", "async-start")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collective:
    """One operation in which all devices take part.

    Attributes:
      kind: what it does; an asynchronous pair of start and done is one.
      sizes: bytes on one device of each array of its result; several where the compiler merged operations on
        several arrays. A reduce-scatter's result is the device's own share.
      op_names: where in the program each of them comes from, empty where unknown.
      times: how often it runs in one execution of the program: more than once in a loop.
    """

    kind: Kind
    sizes: tuple[int, ...]
    op_names: tuple[str, ...]
    times: int = 1

    @property
    def purposes(self) -> tuple[Purpose, ...]:
        """What each array is for."""
        return tuple(purpose_of(name) for name in self.op_names)


@dataclass
class Traffic:
    """How many collectives there are and how many bytes of results they have on one device."""

    count: int = 0
    bytes: int = 0


def purpose_of(op_name: str) -> Purpose:
    """Returns what a collective of a training step serves, by the name that JAX gave its operation.

    ``batch_norm_backward`` is part of the gradient: these sums are the gradients of a batch norm's scale
    and bias, which its gradient for the input needs from the whole batch.
    """
    backward = "transpose(" in op_name
    if _BATCH_NORM.search(op_name):
        return "batch_norm_backward" if backward else "batch_norm_forward"
    return "gradient" if backward else "other"


def by_kind(collectives: Iterable[Collective]) -> dict[Kind, Traffic]:
    """Returns count and bytes of every kind that occurs."""
    traffic: dict[Kind, Traffic] = {}
    for collective in collectives:
        of_kind = traffic.setdefault(collective.kind, Traffic())
        of_kind.count += collective.times
        of_kind.bytes += collective.times * sum(collective.sizes)
    return traffic


def by_purpose(collectives: Iterable[Collective]) -> dict[Purpose, Traffic]:
    """Returns count and bytes of every purpose, all of `PURPOSES`.

    An operation on several arrays counts once, for the purpose of most of its bytes; the bytes of each
    array count for its own.
    """
    traffic: dict[Purpose, Traffic] = {purpose: Traffic() for purpose in PURPOSES}
    for collective in collectives:
        shares = dict.fromkeys(collective.purposes, 0)
        for purpose, size in zip(collective.purposes, collective.sizes, strict=True):
            shares[purpose] += size
        for purpose, size in shares.items():
            traffic[purpose].bytes += collective.times * size
        traffic[max(shares, key=lambda purpose: shares[purpose])].count += collective.times
    return traffic


def collectives_of(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program.

    The text has no promised format. An operation between devices that is not understood is logged as a
    warning, since what is returned is then too little.

    Args:
      text: optimised HLO, as ``compiled.as_text()`` gives it.
    """
    lines = text.splitlines()
    times = _repetitions(lines)
    names = _element_names(lines)
    found, unknown = [], []
    for computation, line in _instructions(lines):
        if not _BETWEEN_DEVICES.search(line) or "-done(" in line:
            continue
        match = _COLLECTIVE.match(line)
        if match is None:
            unknown.append(line.strip())
            continue
        sizes = _result_sizes(match["kind"], bool(match["start"]), match["shape"])
        own = _OP_NAME.search(line)
        of_elements = names.get(match["name"], {})
        default = own[1] if own else ""
        op_names = tuple(of_elements.get(i) or default for i in range(len(sizes)))
        kind = _real_kind(match["kind"], computation)
        found.append(Collective(kind, sizes, op_names, times.get(computation, 1)))
    if unknown:
        logger.warning(
            "%d of %d operations between devices are not understood, so that the traffic is more than is"
            " counted; the first: %.200s",
            len(unknown),
            len(unknown) + len(found),
            unknown[0],
        )
    return found


def hbm_bytes(text: str) -> int:
    """Returns the bytes that one execution reads from and writes to a device's main memory.

    The sum over all instructions of their operands and results, without those that the compiler put into
    memory on the die. XLA's own figure, "bytes accessed", counts both alike. Arrays count without their
    padding, and whole where an operation reads a part of one; a copy or slice counts what it moves.

    Args:
      text: optimised HLO, as ``compiled.as_text()`` gives it.
    """
    lines = text.splitlines()
    times, executed = _repetitions(lines), _executed(lines)
    arrays: dict[str, list[tuple[int, bool]]] = {}
    total = 0
    for computation, line in _instructions(lines):
        match = _INSTRUCTION.match(line) if computation in executed else None
        if match is None:
            continue
        name, shape, operation, rest = match.groups()
        arrays[name] = _arrays(shape)
        operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
        read = [array for operand in operands for array in arrays.get(operand, [])]
        total += times.get(computation, 1) * _touched(operation, arrays[name], read)
    return total


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Returns the bytes of each array of a shape, and whether it is in main memory."""
    found = _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    return [(_bits(dtype) * _elements(sizes) // 8, _NEAR not in layout) for dtype, sizes, layout in found]


def _touched(operation: str, written: list[tuple[int, bool]], read: list[tuple[int, bool]]) -> int:
    if operation in _FREE or operation in _CALLERS or operation.endswith("-done"):
        return 0
    if operation in ("copy-start", "slice-start") and len(written) > 1:
        # Source and destination are the first two of the result; a slice is the smaller of them.
        moved = min(size for size, _ in written[:2])
        return moved * sum(main for _, main in written[:2])
    if operation.endswith("-start"):
        written = written[:1]
    if operation in ("slice", "dynamic-slice"):
        return sum(2 * size for size, main in written if main)
    return sum(size for size, main in (*written, *read) if main)


def _executed(lines: Iterable[str]) -> set[str]:
    """Returns the computations whose instructions run as such, not as parts of a fusion or a reduction."""
    called: dict[str, set[str]] = {}
    found: list[str] = []
    for line in lines:
        if line.startswith("ENTRY"):
            header = _HEADER.match(line)
            found += [header["name"]] if header else []
    for computation, line in _instructions(lines):
        if any(f" {operation}(" in line for operation in _CALLERS):
            called.setdefault(computation, set()).update(_callees(line))
    executed: set[str] = set()
    while found:
        name = found.pop()
        if name not in executed:
            executed.add(name)
            found += called.get(name, ())
    return executed


def shape_bytes(shape: str) -> tuple[int, ...]:
    """Returns the bytes of each array of an HLO shape, such as ``(f32[8,4]{1,0}, bf16[])``."""
    return tuple(size for size, _ in _arrays(shape))


def _elements(sizes: str) -> int:
    return prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)  # f32, bf16, u8, f8e4m3fn
    return int(digits[1]) if digits else 0


def _result_sizes(kind: str, start: bool, shape: str) -> tuple[int, ...]:
    """Leaves the operands and counters out that some kinds carry in the result of their start."""
    if not start or kind == "all-reduce" or not shape.startswith("("):
        return shape_bytes(shape)
    # (operand, result, ...), or ((operands...), (results...), ...)
    parts = _top_level(_LAYOUT.sub("", shape)[1:-1])
    return shape_bytes(parts[1]) if len(parts) > 1 else shape_bytes(parts[0])


def _top_level(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [*parts, current]


def _real_kind(kind: str, computation: str) -> Kind:
    # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice, so called.
    return "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind  # type: ignore[return-value]


def _instructions(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields each instruction with the name of its computation."""
    computation = ""
    for line in lines:
        if not line.startswith(" "):
            header = _HEADER.match(line)
            computation = header["name"] if header else computation
        else:
            yield computation, line


def _element_names(lines: Iterable[str]) -> Mapping[str, Mapping[int, str]]:
    """Returns the op names of the elements of tuples: the compiler keeps them where it merges operations."""
    names: dict[str, dict[int, str]] = {}
    for line in lines:
        if "get-tuple-element(" not in line:
            continue
        element, op_name = _ELEMENT.search(line), _OP_NAME.search(line)
        if element and op_name:
            names.setdefault(element[1], {})[int(element[2])] = op_name[1]
    return names


def _callees(line: str) -> list[str]:
    matches = (*_CALL.finditer(line), *_BRANCHES.finditer(line))
    return [name.strip().lstrip("%") for match in matches for name in match[1].split(",")]


def _repetitions(lines: Iterable[str]) -> dict[str, int]:
    """Returns how often each computation runs; the trips of a loop whose number is unknown count as one."""
    callers: dict[str, list[tuple[str, int]]] = {}
    for computation, line in _instructions(lines):
        if "=" not in line or "%" not in line:
            continue
        trips = _TRIPS.search(line) if " while(" in line else None
        factor = int(trips[1]) if trips else 1
        for callee in _callees(line):
            callers.setdefault(callee, []).append((computation, factor))
    memo: dict[str, int] = {}

    def times(name: str) -> int:
        if name not in memo:
            memo[name] = 1  # the entry, and a guard against cycles
            # The start, updates and end of an asynchronous operation all name the same computation.
            memo[name] = max((times(caller) * n for caller, n in callers.get(name, [])), default=1)
        return memo[name]

    return {name: times(name) for name in callers}
