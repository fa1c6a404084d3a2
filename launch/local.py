"""Starts a program as several processes on this machine, and restarts it when one of them fails.

    python -m launch.local --processes=4 -- python -m mllm_act.train --config=... --workdir=...

Each process gets ``--coordinator``, ``--processes`` and ``--process_id`` appended to the command, and its part of the
GPUs. Where there are none, ``--devices=N`` gives each N virtual CPU devices. The output of process i is prefixed with
``[i]``.

When a process fails, the others are ended: they say why, or get SIGTERM, and SIGKILL 60 s later. With ``--restarts=N``
the program is then started again, at most N times: not after an error of the user (exit status 1 or 2) or Ctrl-C.
SIGTERM and SIGINT are passed on, and nothing is restarted after them. The exit status is that of a process that failed,
128 + the signal's number where a signal ended it.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

GRACE = 60.0  # seconds between SIGTERM and SIGKILL; a checkpoint may have to be written
FAILING = 10.0  # seconds for the others to say why one has failed
FINAL = (0, 1, 2, 128 + signal.SIGINT)  # exit statuses that a restart would repeat


def free_port() -> int:
    """Returns a port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(process: int, processes: int, devices: int | None) -> dict[str, str]:
    """Returns the environment of a process: its part of the GPUs, or its number of virtual CPU devices."""
    env = dict(os.environ)
    gpus = env.get("CUDA_VISIBLE_DEVICES")
    numbers = gpus.split(",") if gpus else [str(i) for i in range(_gpus())]
    if devices is not None:
        flag = f"--xla_force_host_platform_device_count={devices}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}".strip()
    elif len(numbers) >= processes:
        each = len(numbers) // processes
        env["CUDA_VISIBLE_DEVICES"] = ",".join(numbers[process * each : (process + 1) * each])
    return env


def _gpus() -> int:
    return sum(name.startswith("nvidia") and name[6:].isdigit() for name in os.listdir("/dev"))


class Program:
    """The processes of one start of a program."""

    def __init__(self, command: Sequence[str], processes: int, devices: int | None) -> None:
        """Starts them."""
        address = f"localhost:{free_port()}"
        self.processes = [
            subprocess.Popen(
                [*command, f"--coordinator={address}", f"--processes={processes}", f"--process_id={i}"],
                env=environment(i, processes, devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches this program alone, which passes it on
            )
            for i in range(processes)
        ]  # fmt: skip
        self._copying = [
            threading.Thread(target=_copy, args=(number, process.stdout), daemon=True)
            for number, process in enumerate(self.processes)
        ]
        for thread in self._copying:
            thread.start()

    def send(self, number: int) -> None:
        """Sends a signal to those that run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Waits until all have ended, and ends the others when one fails; returns the first status that is not 0."""
        while all(process.poll() in (None, 0) for process in self.processes):
            if self._ended(0.05):
                break
        self._ended(FAILING)
        statuses = [process.poll() for process in self.processes]
        failed = [128 - status if status < 0 else status for status in statuses if status]
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self._ended(0):
                self.send(number)
                self._ended(GRACE)
        for thread in self._copying:
            thread.join(timeout=5)
        # Where one was killed, others may fail in another way.
        return next((status for status in failed if status not in FINAL), max(failed, default=0))

    def _ended(self, seconds: float) -> bool:
        """Waits for all to end, so long at the most; returns whether they have."""
        limit = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() >= limit:
                return False
            time.sleep(0.02)
        return True


def _copy(number: int, output: IO[bytes] | None) -> None:
    assert output is not None
    for line in output:
        sys.stdout.write(f"[{number}] {line.decode(errors='replace')}")
        sys.stdout.flush()


def launch(
    command: Sequence[str], processes: int, devices: int | None = None, restarts: int = 0
) -> int:
    """Runs a program to its end, see above; returns its exit status."""
    running: Program | None = None
    ended = False

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal ended
        ended = True
        if running is not None:
            running.send(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            running = Program(command, processes, devices)
            status = running.wait()
            if status in FINAL or ended or restarts <= 0:
                return status
            restarts -= 1
            print(
                f"launch: exit status {status}; starting again, {restarts} restarts left",
                flush=True,
            )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Runs the program."""
    own, separator, command = (
        (sys.argv[1:], "", [])
        if "--" not in sys.argv
        else (sys.argv[1 : sys.argv.index("--")], "--", sys.argv[sys.argv.index("--") + 1 :])
    )
    parser = argparse.ArgumentParser(
        prog="python -m launch.local",
        usage="%(prog)s --processes=N [--restarts=N] [--devices=N] -- COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("--restarts", type=int, default=0, help="after failures (default: 0)")
    parser.add_argument("--devices", type=int, help="virtual CPU devices of each process")
    args = parser.parse_args(own)
    if args.processes < 1 or args.restarts < 0 or (args.devices is not None and args.devices < 1):
        parser.error("--processes, --devices: expected at least 1, and --restarts at least 0")
    if not separator or not command:
        parser.error("expected -- and the command to run after the options, found none")
    sys.exit(launch(command, args.processes, args.devices, args.restarts))


if __name__ == "__main__":
    main()
