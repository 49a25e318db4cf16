"""Starting a run of several processes, one on each host."""

import hashlib
import importlib.util
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from bvit_jax.errors import UserError
from bvit_jax.runtime import coordinator, process
from bvit_jax.workdir.collectives import of_all_processes

DEFAULT_TIMEOUT = 300  # seconds
HEARTBEAT = 45  # seconds without one, after which a process counts as gone
# At its own limit JAX ends the process without saying what to check: where we may, we do so first.
_MARGIN = 3600
# What jax and Gloo say where another process is gone.
_LOST = re.compile(
    "^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)|Gloo|[Hh]eartbeat|[Cc]onnection (reset|refused)"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """How the processes of a run find each other.

    Attributes:
      coordinator: ``HOST:PORT`` of process 0, reachable from all; "" to ask the cluster.
      num_processes: of the run; None to ask the cluster.
      process_id: of this process, from 0; None to ask the cluster.
      timeout: seconds to wait for all processes.
    """

    coordinator: str = ""
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = DEFAULT_TIMEOUT

    def explicit(self) -> bool:
        """Returns whether anything is given by hand."""
        return bool(self.coordinator) or self.num_processes is not None or self.process_id is not None


def start(cluster: Cluster, wanted: bool | None = None) -> None:
    """Connects this process with the others; call it before anything that asks jax for devices.

    Without ``wanted``, it does so where the cluster is given by hand and on TPUs, whose hosts know
    each other. Clusters that need not be given by hand: Cloud TPU, Slurm, Open MPI, Kubernetes jobs.
    Each process announces itself to the log once all have come. If they do not all come in time, the
    process ends with one line and exit status 1; where it is not ours, JAX's own limit does the same.

    Raises:
      UserError: the settings do not fit together, or no cluster was found.
    """
    if wanted is False or (wanted is None and not (cluster.explicit() or _on_tpu())):
        if wanted is False and cluster.explicit():
            raise UserError("--nodistributed excludes --coordinator, --num_processes and --process_id")
        return
    _check(cluster)
    if cluster.process_id is not None:
        coordinator.claim(cluster.coordinator, cluster.process_id)
    explain = partial(coordinator.explain, cluster.process_id, cluster.num_processes)
    process.answer_aborts(explain, coordinator.SAID_OF_OTHERS)
    probed = cluster.coordinator if cluster.process_id else ""  # the first one is the coordinator
    try:
        with process.watched(partial(coordinator.watch, probed, cluster.timeout, _nobody_came(cluster))):
            jax.distributed.initialize(
                cluster.coordinator or None,
                cluster.num_processes,
                cluster.process_id,
                heartbeat_timeout_seconds=HEARTBEAT,
                initialization_timeout=cluster.timeout + (_MARGIN if process.is_ours() else 0),
                cluster_detection_method="deactivate" if cluster.explicit() else None,
            )
    except ValueError as error:
        raise UserError(
            f"no cluster was found ({error}); give --coordinator=HOST:PORT, --num_processes and"
            " --process_id, or --nodistributed for this host alone"
        ) from error
    except RuntimeError as error:  # such as a port that is taken
        raise UserError(f"cannot start process {_name(cluster)}: {' '.join(str(error).split())}") from error
    logger.info("process %d of %d on %s", jax.process_index(), jax.process_count(), socket.gethostname())


def is_active() -> bool:
    """Returns whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def lost(error: Exception) -> str:
    """Returns the message for an error which means that another process of the run is gone, else ""."""
    # A step that runs in the thread that calls it raises ValueError.
    if not isinstance(error, jax.errors.JaxRuntimeError | ValueError) or not _LOST.search(str(error)):
        return ""
    first = str(error).strip().splitlines()[0]
    who = coordinator.silent(str(error), jax.process_index(), jax.process_count())
    return f"{who}: {first}; start all of them again"


def check_same(values: Mapping[str, str]) -> None:
    """Raises `UserError` in all processes, naming one of the values, unless it is the same in all."""
    if not is_active():
        return
    digests = [list(hashlib.sha256(value.encode()).digest()) for value in values.values()]
    of_all = of_all_processes(np.array(digests, np.int32))
    for index, name in enumerate(values):
        differs = (of_all[:, index] != of_all[0, index]).any(-1)
        if differs.any():
            raise UserError(
                f"process {int(np.argmax(differs))} has another {name} than process 0; start all processes"
                " with the same command and the same files"
            )


def _on_tpu() -> bool:
    """Returns whether this is a TPU host with the TPU's library: libtpu alone is only its compiler."""
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    if importlib.util.find_spec("libtpu") is None or "tpu" not in platforms.split(","):
        return False
    return any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def _check(cluster: Cluster) -> None:
    if not cluster.explicit():
        return
    missing = [
        flag
        for flag, given in (
            ("--coordinator", bool(cluster.coordinator)),
            ("--num_processes", cluster.num_processes is not None),
            ("--process_id", cluster.process_id is not None),
        )
        if not given
    ]
    if missing or cluster.num_processes is None or cluster.process_id is None:
        raise UserError(f"{', '.join(missing)} must be given too; all three flags go together")
    host, _, port = cluster.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator is {cluster.coordinator!r}; expected HOST:PORT of process 0")
    if cluster.num_processes < 1:
        raise UserError(f"--num_processes is {cluster.num_processes}; expected at least 1")
    if not 0 <= cluster.process_id < cluster.num_processes:
        raise UserError(
            f"--process_id is {cluster.process_id}; expected 0 to {cluster.num_processes - 1}, another one"
            " for each of the --num_processes processes"
        )


def _name(cluster: Cluster) -> str:
    if cluster.process_id is None:
        return f"on {socket.gethostname()}"
    return f"{cluster.process_id} of {cluster.num_processes}"


def _nobody_came(cluster: Cluster) -> str:
    where = f" at --coordinator={cluster.coordinator}" if cluster.coordinator else ""
    return (
        f"process {_name(cluster)} has waited {cluster.timeout} seconds{where} for the others; check"
        " that every host runs the same command, that --num_processes is their number, that each has a"
        " --process_id of its own from 0, and that --coordinator is the address of process 0 and its port"
        " is open; --startup_timeout waits longer"
    )
