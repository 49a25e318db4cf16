"""The steps of one side at one batch size, as `benchmarks.train_step` measures them."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Rounds, entry
from benchmarks.pieces.piece import one_line
from benchmarks.workload import KINDS, Kind, Plan, Side, known_model, prepare, seconds_of
from bvit_jax.errors import UserError

TOP = 10  # kernels of a profile
PROFILED_STEPS = 3


def ceilings(scale: float) -> Iterator[dict[str, Any]]:
    """Yields what the device reaches at best; see `benchmarks.ceilings`."""
    import jax

    from benchmarks import ceilings

    yield ceilings.measure(ceilings.default_sizes(jax.default_backend(), scale))


def ours(
    model: str,
    batch: int,
    dtype: str,
    kinds: Sequence[Kind] = ("evaluation", "training"),
    settings: Mapping[str, Any] | None = None,
    execution: Mapping[str, Any] | None = None,
    precision: str = "",
    profile: bool = False,
    **counts: int,
) -> Iterator[dict[str, Any]]:
    """Yields what bvit_jax reaches, and with ``profile`` the longest kernels of its training step."""
    import jax

    from benchmarks import jax_side

    jax.config.update("jax_default_matmul_precision", precision or None)
    plan = _plan(model, batch, kinds, settings, dtype=dtype, execution=execution or {})
    side = jax_side.start(plan, None)
    yield _measured(side, plan, **counts)
    if profile:
        try:
            yield {"profile": _kernels(side)}
        except Exception as error:  # the profiler's; what was measured stands
            yield {"profile_error": one_line(error)}


def reference(
    model: str,
    batch: int,
    checkout: str,
    kinds: Sequence[Kind] = ("evaluation", "training"),
    settings: Mapping[str, Any] | None = None,
    compiled: bool = False,
    autocast: bool = True,
    **counts: int,
) -> Iterator[dict[str, Any]]:
    """Yields what the PyTorch code reaches with the settings of our model."""
    from benchmarks import jax_side, torch_side
    from bvit_jax.models import create_model

    how = {"compiled": compiled, "autocast": autocast, "reference": Path(checkout)}
    plan = _plan(model, batch, kinds, settings, **how)
    values, _ = jax_side.model_of(plan)
    complete = {"name": values["name"], **jax_side.settings_of(create_model(values))}
    with tempfile.TemporaryDirectory(prefix="inductor_") as cache:  # an earlier run's would be found
        plan = dataclasses.replace(plan, cache=Path(cache))
        yield _measured(torch_side.start(plan, complete), plan, **counts)


def _plan(
    model: str, batch: int, kinds: Sequence[Kind], settings: Mapping[str, Any] | None, **changes: Any
) -> Plan:
    plan = Plan(
        model=model,
        config=None,
        overrides={key: _tuple(value) for key, value in (settings or {}).items()},
        batch=batch,
        dtype=None,
        reference=None,
        compiled=False,
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        cold=True,
    )
    known_model(model)
    return dataclasses.replace(plan, **changes)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has lists only


def _measured(side: Side, plan: Plan, rounds: int = 3, steps: int = 5) -> dict[str, Any]:
    """Compiles, warms up and measures a side in this process."""
    compilation, setup_peak = prepare(side, plan.kinds)
    speeds: Rounds = {}
    for kind in plan.kinds:
        taken = [seconds_of(side, kind, steps) for _ in range(rounds)]
        speeds[kind] = [plan.batch * steps / seconds for seconds in taken if seconds]
    memory = dataclasses.replace(side.memory(), setup_peak=setup_peak)
    return {
        "batch": plan.batch,
        "work": dataclasses.asdict(compilation.work) if compilation.work else None,
        **entry(side.facts, compilation, speeds, memory),
    }


def _kernels(side: Side) -> list[dict[str, Any]]:
    """Returns the kernels of the training step that take the most time, from a trace of a few steps.

    Raises:
      UserError: the trace holds no events of a device.
    """
    import jax

    directory = tempfile.mkdtemp(prefix="profile_")
    try:
        with jax.profiler.trace(directory):
            for _ in range(PROFILED_STEPS):
                side.step("training")
        (file,) = Path(directory).rglob("*.xplane.pb")
        return _longest(jax.profiler.ProfileData.from_file(str(file)))
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(directory)


def _longest(trace: Any) -> list[dict[str, Any]]:
    totals: dict[str, list[float]] = {}
    planes = [plane for plane in trace.planes if plane.name.startswith("/device:")]
    for plane in planes:
        for line in plane.lines:
            if not line.name.startswith("Stream"):  # the others repeat the same time by module and by source
                continue
            for event in line.events:
                totals.setdefault(event.name, []).append(event.duration_ns)
    if not totals:
        raise UserError(f"the trace has no kernels; its planes are {[plane.name for plane in trace.planes]}")
    everything = sum(map(sum, totals.values()))
    longest = sorted(totals.items(), key=lambda item: -sum(item[1]))[:TOP]
    return [
        {
            "kernel": name[:120],
            "milliseconds_of_a_step": sum(taken) / PROFILED_STEPS / 1e6,
            "calls_of_a_step": len(taken) / PROFILED_STEPS,
            "share": sum(taken) / everything,
        }
        for name, taken in longest
    ]
