"""Proves the project on an accelerator: numbers, speed, a real run; one command and one table.

    python -m benchmarks.accelerator --reference BinaryViT --json found.json   # on a GPU: 8 minutes
    python -m benchmarks.accelerator --quick                                   # a trial on a CPU

Run it from the root of a checkout; see `benchmarks/accelerator.sh` for a machine without a network. Needs
jax, flax, optax, orbax-checkpoint, safetensors and numpy; with ``--reference``, a checkout of
github.com/Phuoc-Hoan-Le/BinaryViT, also torch. Pieces that need more say so and are skipped where it is
missing.

Every piece (`benchmarks.pieces.catalogue`) has a process of its own, so that it leaves the device as it found
it, and a failure is one line of the report. Pieces run in the order of their value; one that is not expected
to fit into the time that is left is skipped. The report is written after each of them, with all that they
print next to it in a ``.log``; ``--known`` goes on from it. The exit status is 1 if a piece fails or a number
differs.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # called as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.pieces import catalogue, process, summary
from benchmarks.pieces.piece import PARTS, Piece
from bvit_jax.errors import UserError, nearest

PATIENCE = 3  # times its estimate that a piece may take
LEAST_PATIENCE = 120  # seconds
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")  # as XLA and PyTorch say


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        chosen = _chosen(arguments)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = _measure(arguments, chosen, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary.table(report))
    print(f"\n{arguments.json}, {_log(arguments)}")
    return 0 if summary.passed(report["pieces"]) else 1


def _chosen(arguments: argparse.Namespace) -> list[Piece]:
    """Returns the pieces of the parts that are asked for.

    Raises:
      UserError: there is no such part, or the reference is no checkout.
    """
    parts = [part.strip() for part in arguments.parts.split(",")] if arguments.parts else list(PARTS)
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts has {part!r}" + nearest(part, PARTS))
    checkout = arguments.reference.resolve() if arguments.reference else None
    if checkout and not (checkout / "models.py").exists():
        raise UserError(f"--reference is {arguments.reference}: there is no models.py")
    if arguments.known and not arguments.known.is_file():
        raise UserError(f"--known is {arguments.known}: there is no such file")
    every = (catalogue.quick_pieces if arguments.quick else catalogue.pieces)(str(checkout or ""))
    return [piece for piece in every if piece.part in parts]


def _measure(arguments: argparse.Namespace, chosen: list[Piece], argv: Sequence[str]) -> dict[str, Any]:
    """Runs the pieces and returns the report, which is written after each of them.

    Raises:
      UserError: there is no accelerator.
    """
    deadline, log = time.monotonic() + 60 * arguments.minutes, _log(arguments)
    log.write_text("")
    device = process.run(catalogue.DEVICE, min(60 * arguments.minutes, LEAST_PATIENCE), log)
    if device.get("platform") in (None, "cpu") and not arguments.quick:
        reason = device.get("error") or "jax sees none; are its plugin and the driver installed?"
        raise UserError(f"no accelerator: {reason}; --quick tries the command on a CPU")
    command = shlex.join(["python", "-m", "benchmarks.accelerator", *argv])
    known = _known(arguments.known, device)
    report: dict[str, Any] = {"command": command, "device": device, "pieces": known}
    done = {(result["part"], result["name"]) for result in known}
    for piece in (piece for piece in chosen if (piece.part, piece.name) not in done):
        result = _result(piece, str(arguments.reference or ""), deadline - time.monotonic(), log)
        report["pieces"].append(result)
        _write(arguments.json, report)
        summary.add_floors(report["pieces"])
        _write(arguments.json, report)
        print(f"{piece.part}: {piece.name}: {result['status']}", file=sys.stderr, flush=True)
    return report


def _write(file: Path, report: dict[str, Any]) -> None:
    file.write_text(json.dumps(report, indent=1) + "\n")


def _known(file: Path | None, device: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what was done according to an earlier report.

    Raises:
      UserError: it is of another device.
    """
    if file is None:
        return []
    report = json.loads(file.read_text())
    if report["device"].get("device") != device.get("device"):
        raise UserError(f"--known is {file}, of another device: {report['device'].get('device')}")
    return [result for result in report["pieces"] if result["status"] == "done"]


def _result(piece: Piece, reference: str, left: float, log: Path) -> dict[str, Any]:
    """Runs a piece if there is what it needs and time for it, and returns its part of the report."""
    result = {"part": piece.part, "name": piece.name, "estimate": piece.seconds}
    if not catalogue.found(piece.needs, reference):
        return {**result, "status": "skipped", "error": f"needs {catalogue.NEEDS[piece.needs]}"}
    if piece.seconds > left:
        return {**result, "status": "skipped", "error": f"{left:.0f} s are left, --minutes"}
    found = process.run(piece, min(left, max(PATIENCE * piece.seconds, LEAST_PATIENCE)), log)
    result["seconds"] = found.pop("seconds")
    error = found.pop("error", "")
    status = "too large" if any(words in error for words in OUT_OF_MEMORY) else "failed"
    ended = {"status": status, "error": error} if error else {"status": "done"}
    return {**result, **ended, "found": found, "arguments": dict(piece.arguments)}


def _log(arguments: argparse.Namespace) -> Path:
    return arguments.json.with_suffix(".log")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description="Measures numbers, speed and a real run on an accelerator within a budget of time.",
    )
    listed = "; ".join(f"{name}, {text}" for name, text in PARTS.items())
    parser.add_argument("--parts", default="", metavar="A,B", help=f"only these ({listed})")
    parser.add_argument("--minutes", type=float, default=8, metavar="N", help="budget of time (8)")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, on any device")
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="the PyTorch code")
    parser.add_argument(
        "--known", type=Path, metavar="FILE", help="an earlier report; what is done there is not done again"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("build/accelerator.json"),
        metavar="FILE",
        help="the report (build/accelerator.json)",
    )
    return parser


if __name__ == "__main__":
    # So that the piece that runs ends too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
