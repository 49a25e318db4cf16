"""Checks of the pickles in PyTorch's files that come before anything is read."""

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

from bvit_jax.errors import UserError

MAX_TUPLES = 20  # in each other: Python hashes what is shared again for every place
PICKLES = 5  # at the beginning of a file from before PyTorch 1.6
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
EFFECTS = {  # of an operation: what it takes from the stack, and how many values it leaves there
    opcode.name: ([kind.name for kind in opcode.stack_before], len(opcode.stack_after))
    for opcode in pickletools.opcodes
}
MEMO_GET, MEMO_PUT = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT")


def check_torch(path: Path) -> None:
    """Checks a ``.pth`` before torch reads it, without running any of it.

    Checksums are compared, which torch does not do; files from before PyTorch 1.6 have none.

    Raises:
      UserError: it is damaged, compressed, or has tuples so deep that their hash would never end.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            _check_pickles(file, path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
            if claimed > path.stat().st_size:  # PyTorch does not compress
                raise UserError(f"{path} is compressed, to {claimed:,} bytes; expected a file of torch.save")
            damaged = archive.testzip()
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    with archive.open(name) as file:
                        _check_pickles(file, path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; is the file complete?") from error
    if damaged is not None:
        raise UserError(f"cannot read {path}: {damaged} in it does not match its checksum")


def _check_pickles(file: IO[bytes], path: Path) -> None:
    for _ in range(PICKLES):
        try:
            _check_tuples(file, path)
        except UserError:
            raise
        except Exception:  # torch stops there too, and says why; genops may raise anything
            return


def _check_tuples(file: IO[bytes], path: Path) -> None:
    """Raises `UserError` at the first tuple of a pickle that is nested too deep, whatever follows it.

    Runs the pickle's operations with the depths of tuples in place of values.
    """
    stack: list[int | None] = []  # None is a mark
    memo: dict[int, int] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in MEMO_GET:
            stack.append(memo.get(argument, 0))
        elif name in MEMO_PUT or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] or 0
        elif name == "MARK":
            stack.append(None)
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            kinds, pushed = EFFECTS[name]
            popped = _popped(stack, kinds)
            depth = 1 + max(popped, default=0) if name in TUPLES else 0
            if depth > MAX_TUPLES:
                raise UserError(f"{path} has tuples more than {MAX_TUPLES} deep, which nobody could hash")
            stack += [depth] * pushed


def _popped(stack: list[int | None], kinds: list[str]) -> list[int]:
    """Removes from the stack what an operation takes, down to its mark if it has one."""
    if "mark" not in kinds:
        return [stack.pop() or 0 for _ in kinds]
    taken = []
    while (depth := stack.pop()) is not None:
        taken.append(depth)
    return taken + [stack.pop() or 0 for _ in kinds[: kinds.index("mark")]]


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0].rstrip(".")
