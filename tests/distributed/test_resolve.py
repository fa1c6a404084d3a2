"""How a process finds the others: every way, by the variables that its launcher sets."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_act.distributed.resolve import Processes, resolve, timeout
from mllm_act.distributed.start import take_flags
from mllm_act.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[07-09,12],cpu3", "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x5)",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_ID": "0",
}  # fmt: skip
SHARED = {
    **SLURM,
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_PROCID": "3",
}
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
       "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}  # fmt: skip
FOUND, OF_SLURM, OF_MPI = "deactivate", "Slurm's variables", "Open MPI's variables"
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
HERE = {"coordinator": "h:1", "processes": "2", "process_id": "1"}

PROGRAM = """
import sys
from mllm_act import errors
from mllm_act.distributed.start import start

errors.run(lambda: start(sys.argv))
"""


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        ({}, {}, None),
        ({"processes": "1"}, SLURM, None),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        (HERE, SLURM, Processes("flags", "h:1", 2, 1, None, FOUND)),
        ({}, {**SKYPILOT, **SLURM}, Processes("SkyPilot's variables", "10.0.0.1:8476", 2, 1, None, FOUND)),
        # One task per node sees all of the node's GPUs; two share them.
        ({}, SLURM, Processes(OF_SLURM, "gpu07:61447", 5, 4, None, FOUND)),
        ({}, SHARED, Processes(OF_SLURM, "gpu07:61447", 5, 3, (2, 3), FOUND)),
        ({}, {**SHARED, "CUDA_VISIBLE_DEVICES": "3"}, Processes(OF_SLURM, "gpu07:61447", 5, 3, None, FOUND)),
        ({}, {**MPI, "OMPI_MCA_orte_hnp_uri": "x"}, Processes(OF_MPI, None, 2, 1, (1,), "ompi")),
        ({}, {**MPI, "JAX_COORDINATOR_ADDRESS": "h:1"}, Processes(OF_MPI, "h:1", 2, 1, (1,), FOUND)),
    ],
)  # fmt: skip
def test_the_first_that_is_there_decides(
    flags: dict[str, str], env: dict[str, str], expected: Processes | None
) -> None:
    assert resolve(flags, env) == expected


@pytest.mark.parametrize(
    ("package", "env", "expected"),
    [
        ("mpi4py", MPI, Processes("mpi4py", None, 2, 1, (1,), "mpi4py")),
        ("kubernetes", KUBERNETES, Processes("Kubernetes, detected by JAX", method="k8s")),
        ("libtpu", TPU, Processes("GKE's TPU variables, read by JAX", method="gketpu")),
        ("libtpu", {**TPU, "TPU_WORKER_HOSTNAMES": "a"}, None),
    ],
)
def test_what_jax_detects_needs_a_package(
    package: str, env: dict[str, str], expected: Processes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == package or None)
    assert resolve({}, env) == expected


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        ({"coordinator": "h:1"}, {}, "--processes: expected the number"),
        ({"processes": "2", "process_id": "0"}, {}, "--coordinator: expected a value"),
        ({**HERE, "process_id": "2"}, {}, "--process_id: expected 0 to 1 of 2 processes, found 2"),
        ({**HERE, "coordinator": "h"}, {}, "--coordinator: expected HOST:PORT, found 'h'"),
        ({**HERE, "processes": "two"}, {}, "--processes: expected a whole number"),
        ({}, {**SKYPILOT, "SKYPILOT_NODE_IPS": "a"}, "SKYPILOT_NODE_IPS: expected 2 addresses"),
        ({}, MPI, "JAX_COORDINATOR_ADDRESS: expected HOST:PORT of process 0 under Open MPI 5"),
        ({}, KUBERNETES, "--coordinator: expected flags in an indexed job of Kubernetes"),
    ],
)
def test_what_does_not_fit_is_named(
    flags: dict[str, str], env: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        resolve(flags, env)


def test_flags_are_taken_out_of_the_command_line() -> None:
    argv = [
        "train",
        "--coordinator=h:1",
        "--config.steps=3",
        "--processes",
        "2",
        "--start_timeout=5",
    ]
    flags, rest = take_flags(argv)
    assert flags == {"coordinator": "h:1", "processes": "2", "start_timeout": "5"}
    assert rest == ["train", "--config.steps=3"] and timeout(flags) == 5 and timeout({}) == 1800


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_meet_end_with_one_line(process: int) -> None:
    port = 1 if process else 45671
    flags = (f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={process}")
    command = [sys.executable, "-c", PROGRAM, *flags, "--start_timeout=1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: processes: expected all 2 to meet at localhost:")
