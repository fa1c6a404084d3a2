"""Decides how the processes of a program find each other.

The first of these that is there decides:

1. flags: ``--coordinator=HOST:PORT --processes=N --process_id=I``; ``--processes=1`` starts one process, whatever the
   environment says;
2. SkyPilot's variables;
3. Slurm's, inside ``srun``: one task per node sees all GPUs of the node, several tasks share them out;
4. Open MPI's: up to version 4 the address is in its variables; with version 5 it is ``JAX_COORDINATOR_ADDRESS``, or is
   found with mpi4py;
5. an indexed job of Kubernetes, through its API (package ``kubernetes``), and Cloud TPUs: JAX detects these.

Nothing of these: one process.
"""

import dataclasses
import glob
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

from mllm_act.errors import UserError

FLAGS = {
    "coordinator": "HOST:PORT of process 0, where several processes are started by hand",
    "processes": "how many there are",
    "process_id": "which of them this is, from 0 on",
    "start_timeout": "seconds to wait for the others (default: 1800)",
    "compilation_cache": "folder of compiled programs, which may be shared by all hosts and restarts",
}
TIMEOUT = 1800  # seconds; a cold start of hundreds of hosts takes more than JAX's 300
SKYPILOT_PORT = 8476


@dataclasses.dataclass(frozen=True)
class Processes:
    """How a process joins the others.

    Attributes:
      source: what decided.
      coordinator: HOST:PORT of process 0; None if JAX finds it.
      count: how many processes there are; None if JAX finds it.
      process: the number of this one; None if JAX finds it.
      devices: the numbers of this process's GPUs among those it sees; None for all.
      method: JAX's name of the way to find what is None.
    """

    source: str
    coordinator: str | None = None
    count: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None
    method: str | None = None


def resolve(flags: Mapping[str, str], env: Mapping[str, str] = os.environ) -> Processes | None:
    """Returns how this process joins the others, or None if it is the only one.

    Raises:
      UserError: a flag or a variable is missing or is not what it should be.
    """
    if flags.keys() & {"coordinator", "processes", "process_id"}:
        return _from_flags(flags)
    for find in (_from_skypilot, _from_slurm, _from_open_mpi, _from_kubernetes, _from_cloud_tpu):
        found = find(env)
        if found is not None:
            return found if found.count != 1 else None
    return None


def timeout(flags: Mapping[str, str]) -> int:
    """Returns the seconds to wait for the other processes."""
    return _number("--start_timeout", flags.get("start_timeout", str(TIMEOUT)), least=1)


def _from_flags(flags: Mapping[str, str]) -> Processes | None:
    if "processes" not in flags:
        raise UserError(
            "--processes: expected the number of processes beside --coordinator and --process_id, found none; pass all "
            "three"
        )
    count = _number("--processes", flags["processes"], least=1)
    if count == 1:
        return None
    for name in ("coordinator", "process_id"):
        if name not in flags:
            raise UserError(
                f"--{name}: expected a value for each of {count} processes, found none; pass --coordinator=HOST:PORT "
                "--processes=N --process_id=I, or start them with python -m launch.local"
            )
    process = _number("--process_id", flags["process_id"], least=0)
    if process >= count:
        raise UserError(
            f"--process_id: expected 0 to {count - 1} of {count} processes, found {process}"
        )
    return Processes(
        "flags", _address("--coordinator", flags["coordinator"]), count, process, method="deactivate"
    )  # fmt: skip


def _from_skypilot(env: Mapping[str, str]) -> Processes | None:
    if "SKYPILOT_NODE_RANK" not in env:
        return None
    count = _number("SKYPILOT_NUM_NODES", env.get("SKYPILOT_NUM_NODES", ""), least=1)
    process = _number("SKYPILOT_NODE_RANK", env["SKYPILOT_NODE_RANK"], least=0)
    hosts = env.get("SKYPILOT_NODE_IPS", "").split()
    if len(hosts) != count:
        raise UserError(
            f"SKYPILOT_NODE_IPS: expected {count} addresses (SKYPILOT_NUM_NODES), found {len(hosts)}; pass "
            "--coordinator, --processes and --process_id"
        )
    coordinator = f"{hosts[0]}:{SKYPILOT_PORT}"
    return Processes("SkyPilot's variables", coordinator, count, process, method="deactivate")


def _from_slurm(env: Mapping[str, str]) -> Processes | None:
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in env for name in needed):
        return None  # not inside srun
    # SLURM_NTASKS is the job's, of which srun may start fewer in a step.
    count = _number(
        "SLURM_STEP_NUM_TASKS", env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"], least=1
    )
    process = _number("SLURM_PROCID", env["SLURM_PROCID"], least=0)
    node = _number("SLURM_NODEID", env.get("SLURM_NODEID", "0"), least=0)
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")
    devices = _share(int(env["SLURM_LOCALID"]), _tasks_per_node(tasks)[node], env)
    # Two steps of one job may run on the same node at the same time.
    job, step = int(env["SLURM_JOB_ID"]), int(env.get("SLURM_STEP_ID", "0") or 0)
    port = 61440 + (job * 7 + step) % 4096
    coordinator = f"{_first_host(env['SLURM_STEP_NODELIST'])}:{port}"
    return Processes("Slurm's variables", coordinator, count, process, devices, method="deactivate")


def _from_open_mpi(env: Mapping[str, str]) -> Processes | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    count = _number("OMPI_COMM_WORLD_SIZE", env.get("OMPI_COMM_WORLD_SIZE", "1"), least=1)
    if count == 1:
        return None
    process = int(env["OMPI_COMM_WORLD_RANK"])
    local, tasks = (
        int(env.get(f"OMPI_COMM_WORLD_LOCAL_{name}", default))
        for name, default in (("RANK", "0"), ("SIZE", "1"))
    )
    known: dict[str, Any] = {
        "count": count,
        "process": process,
        "devices": _share(local, tasks, env),
    }
    if "JAX_COORDINATOR_ADDRESS" in env:
        coordinator = _address("JAX_COORDINATOR_ADDRESS", env["JAX_COORDINATOR_ADDRESS"])
        return Processes("Open MPI's variables", coordinator, method="deactivate", **known)
    if "OMPI_MCA_orte_hnp_uri" in env:
        return Processes("Open MPI's variables", method="ompi", **known)
    if importlib.util.find_spec("mpi4py"):
        return Processes("mpi4py", method="mpi4py", **known)
    raise UserError(
        "JAX_COORDINATOR_ADDRESS: expected HOST:PORT of process 0 under Open MPI 5, found none; set it (mpirun -x), or "
        "install mpi4py"
    )


def _from_kubernetes(env: Mapping[str, str]) -> Processes | None:
    if "KUBERNETES_SERVICE_HOST" not in env or "JOB_COMPLETION_INDEX" not in env:
        return None
    if "TPU_WORKER_HOSTNAMES" in env or "TPU_PROCESS_ADDRESSES" in env:
        return None
    if importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "--coordinator: expected flags in an indexed job of Kubernetes where the package kubernetes is not "
            "installed, found none; pass --coordinator, --processes and --process_id=$(JOB_COMPLETION_INDEX) as "
            "launch/jobset.yaml does, or --processes=1"
        )
    return Processes("Kubernetes, detected by JAX", method="k8s")


def _from_cloud_tpu(env: Mapping[str, str]) -> Processes | None:
    if importlib.util.find_spec("libtpu") is None:
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        several = "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in env
        return Processes("GKE's TPU variables, read by JAX", method="gketpu") if several else None
    if "TPU_SKIP_MDS_QUERY" in env or not (
        glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    ):
        return None
    return Processes("the metadata of this TPU VM, read by JAX", method="gcetpu")


def _share(local: int, tasks: int, env: Mapping[str, str]) -> tuple[int, ...] | None:
    """Returns which of the GPUs that it sees are a task's, where ``tasks`` of them share a host; None for all."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    gpus = len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len(visible.split(","))
    if tasks == 1 or gpus < tasks:  # Slurm may have given each task its own
        return None
    each = gpus // tasks
    return tuple(range(local * each, (local + 1) * each))


def _first_host(nodes: str) -> str:
    """``gpu[07-12,15],login`` -> ``gpu07``."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    assert match is not None
    return match[1] + (match[2] or "")


def _tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` -> [2, 2, 2, 1]."""
    result: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        result += [int(tasks)] * int(times or 1)
    return result


def _number(name: str, text: str, least: int) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise UserError(f"{name}: expected a whole number of at least {least}, found {text!r}")
    return int(text)


def _address(name: str, text: str) -> str:
    if not re.fullmatch(r".+:[0-9]{1,5}", text):
        raise UserError(f"{name}: expected HOST:PORT, found {text!r}")
    return text
