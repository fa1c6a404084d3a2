"""Damaged files and killed programs, counted.

    python benchmarks/reliability.py bitflips --run=runs/demo/policy_rvq            # 200 flips
    python benchmarks/reliability.py cost
    python benchmarks/reliability.py flat --data=/tmp/kills/data --updates=2000
    python benchmarks/reliability.py kills --out=/tmp/kills --programs=generate,train_tokenizer,train --kills=30
    python benchmarks/reliability.py hosts --data=/tmp/kills/data --out=/tmp/hosts --kills=30

``bitflips`` flips one bit at a time in a copy of a run: a random bit of a random file of its checkpoints or of
``frozen``. Every flip must be refused in one line, or leave the loaded arrays and JSON document as they were.

``kills`` makes a small Meta-World dataset, a tokenizer and a policy undisturbed, then again while it kills the program
with SIGKILL at random moments, every second time while files are being written, and starts it again. What the killed
runs end with must be the same to the bit. On 2 cores: about 25 s a kill.

``flat`` trains a tiny policy for 2,000 updates, with a save every 100, and prints every 200 what the process holds:
resident memory, open files and threads.

``hosts`` trains a small policy in four processes, undisturbed and then again, while it kills one of the four with
SIGKILL at random moments; ``launch.local --restarts`` starts them again. Both must end with the same bits.

``cost`` saves and loads 1 GB of random float32 with and without digests, in turns, and verifies it alone.

The exit status is 1 if a flip went unnoticed, a killed run ended otherwise, or more was held at the end of ``flat``.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mllm_act.checkpoints import checkpoint, digests
from mllm_act.checkpoints.frozen import load_frozen
from mllm_act.checkpoints.paths import LiteralPath
from mllm_act.errors import UserError, expect_new, run
from mllm_act.files import user_path

WRITING = (  # what exists in a program's folder while it writes
    "*.orbax-checkpoint-tmp*",
    "checkpoints/*.orbax-checkpoint-tmp*",
    ".episodes/*/.partial-*",
    ".episodes/rlds",
)
UNNOTICED, DIFFERENT, TRACEBACK = "UNNOTICED", "DIFFERENT", "TRACEBACK"

Shapes = Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]


def shapes(folder: Path) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the arrays of each item in a checkpoint's folder, if there is one, without reading them."""
    if not folder.exists():  # a tokenizer has no frozen arrays
        return {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = {}
    for item in sorted(path for path in folder.iterdir() if (path / "_METADATA").exists()):
        tree = ocp.StandardCheckpointHandler().metadata(LiteralPath(item)).tree
        found[item.name] = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
            for name, leaf in tree.items()
        }
    return found


def load(workdir: Path, step: int, like: Shapes, frozen: Shapes) -> dict[str, Any]:
    """Returns all that a checkpoint holds: the JSON document, and the bytes of every array by path."""
    meta = checkpoint.read_meta(workdir, step)
    items = checkpoint.read_items(workdir, step, dict(like))
    if "frozen" in meta:
        items["frozen"] = load_frozen(workdir, frozen.get("arrays", {}), meta["frozen"])
    arrays = {
        f"{item}/{name}": array for item, tree in items.items() for name, array in tree.items()
    }
    return {"meta": meta} | {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def flip_bits(workdir: Path, flips: int, seed: int) -> Counter[str]:
    """Flips bits of a run's files, each for one attempt to load the newest step; returns how the attempts ended.

    Prints the flips that ended in anything but a refusal.
    """
    workdir, step = checkpoint.find(workdir)
    folders = [workdir / "checkpoints" / str(step), workdir / "frozen"]
    like, frozen = map(shapes, folders)
    right = load(workdir, step, like, frozen)
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    rng, ends = random.Random(seed), Counter[str]()
    for _ in range(flips):
        path = rng.choice(files)
        content = path.read_bytes()
        bit = rng.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            same = load(workdir, step, like, frozen) == right
            end = "without effect" if same else UNNOTICED
        except UserError:
            end = "refused"
        except Exception:
            end = TRACEBACK
        if end != "refused":
            print(f"{end}: bit {bit} of {path.relative_to(workdir)}")
        path.write_bytes(content)
        ends[end] += 1
    return ends


def commands(out: Path) -> dict[str, tuple[str, list[str]]]:
    """Returns the folder and the command of each program; ``out`` has the undisturbed folders, which others read."""
    tokenizer = "steps=60 log_every=2 checkpoint_every=4 replay=false data.batch_size=64 tokenizer.hidden=64"
    policy = "steps=60 log_every=1 checkpoint_every=4 validate_every=20 data.batch_size=4"
    config = "-m mllm_act.{} --config=configs/{}/metaworld.py:rvq"
    data = f"data.directory={out}/data"
    lines = {
        "generate": ("data", "-m data_pipelines.generate --tasks=drawer-close-v3 --episodes=12 --workers=2"),
        "train_tokenizer": ("tokenizer", config.format("train_tokenizer", "tokenizer")),
        "train": ("policy", config.format("train", "policy")),
    }  # fmt: skip
    settings = {
        "generate": [],
        "train_tokenizer": [*tokenizer.split(), data],
        "train": [*policy.split(), data, f"tokenizer={out}/tokenizer"],
    }
    return {
        name: (folder, [sys.executable, *line.split(), *(f"--config.{x}" for x in settings[name])])
        for name, (folder, line) in lines.items()
    }


def start(program: str, command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Starts a program on its folder; its output goes to ``FOLDER.log``."""
    flag = "--out" if program == "generate" else "--workdir"
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, f"{flag}={folder}"], stdout=log, stderr=log)


def content(program: str, folder: Path) -> dict[str, Any]:
    """Returns what a program's folder must hold to the bit."""
    if program == "generate":
        return {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scalars = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    _, step = checkpoint.find(folder)
    found = load(
        folder, step, shapes(folder / "checkpoints" / str(step)), shapes(folder / "frozen")
    )
    del found["meta"]  # it has the mark of the run
    return found | {"metrics": scalars, "step": step}


def at_work(folder: Path) -> bool:
    """Whether a program writes to its folder at this moment."""
    return any(any(folder.glob(pattern)) for pattern in WRITING)


def disturb(
    program: str, command: list[str], folder: Path, rng: random.Random, seconds: float, kills: int
) -> list[str]:
    """Runs a program to its end and kills it on the way, at most ``kills`` times.

    Returns:
      What it was doing at each kill: ``writing`` or ``anything``.
    """
    done: list[str] = []
    while True:
        process = start(program, command, folder)
        writing, moment = len(done) % 2 == 0, time.monotonic() + rng.uniform(0.1, 0.9) * seconds
        while process.poll() is None and len(done) < kills:
            if time.monotonic() > moment and (not writing or at_work(folder)):
                time.sleep(rng.uniform(0, 0.05) if writing else 0)
                process.kill()
                break
            time.sleep(0.001)
        status = process.wait()
        if status == 0:
            return done
        if status != -signal.SIGKILL:
            raise UserError(f"{folder}.log: expected a program that goes on, found an error in it")
        done.append("writing" if writing else "anything")


def count_kills(out: Path, programs: list[str], kills: int, seed: int) -> Counter[str]:
    """Kills each program so many times, in one or more runs; returns how many runs ended how."""
    ends, rng = Counter[str](), random.Random(seed)
    for program, (name, command) in commands(out).items():
        began = time.monotonic()
        if not (out / name).exists() and start(program, command, out / name).wait():
            raise UserError(f"{out / name}.log: expected a run without an error, found one in it")
        seconds = time.monotonic() - began
        left, number = kills if program in programs else 0, 0
        while left > 0:
            number += 1
            folder = out / f"{name}_{number}"
            done = disturb(program, command, folder, rng, seconds, left)
            left -= len(done)
            if not done:  # it has become faster than the undisturbed one
                seconds *= 0.7
            end = "equal" if content(program, folder) == content(program, out / name) else DIFFERENT
            print(f"{folder}: {end} after {len(done)} kills, {done.count('writing')} while writing")
            ends[f"{program}, kills"] += len(done)
            ends[f"{program}, {end} runs"] += 1
    return ends


def train_in_processes(
    data: Path, folder: Path, processes: int, kills: int, rng: random.Random, seconds: float
) -> list[int]:
    """Trains a policy in several processes, and kills one of them so many times; returns which it were."""
    sizes = "steps=60 log_every=5 checkpoint_every=4 validate_every=30 data.batch_size=4 adapter.bins=16"
    settings = [f"--config.{x}" for x in [*sizes.split(), f"data.directory={data}"]]
    train = [
        sys.executable,
        "-m",
        "mllm_act.train",
        "--config=configs/policy/metaworld.py:uniform",
        *settings,
    ]
    launching = [
        sys.executable,
        "-m",
        "launch.local",
        f"--processes={processes}",
        f"--restarts={2 * kills}",
        "--",
    ]
    killed: list[int] = []
    with folder.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [*launching, *train, f"--workdir={folder}"], stdout=log, stderr=log
        )
        while process.poll() is None and len(killed) < kills:
            time.sleep(rng.uniform(0.3, 1.3) * seconds)
            listed = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
            )
            children = [int(child) for child in listed.stdout.split()]
            if len(children) == processes:
                killed.append(rng.randrange(processes))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(children[killed[-1]], signal.SIGKILL)
        if process.wait():
            raise UserError(f"{folder}.log: expected a program that goes on, found an error in it")
    return killed


def count_host_kills(data: Path, out: Path, processes: int, kills: int, seed: int) -> Counter[str]:
    """Compares runs in which one of several processes is killed with an undisturbed one; returns how they ended."""
    ends, rng, began = Counter[str](), random.Random(seed), time.monotonic()
    train_in_processes(data, out / "whole", processes, 0, rng, 0)
    seconds, number = time.monotonic() - began, 0
    while ends["kills"] < kills:
        number += 1
        folder = out / f"killed_{number}"
        killed = train_in_processes(data, folder, processes, kills - ends["kills"], rng, seconds)
        end = "equal" if content("train", folder) == content("train", out / "whole") else DIFFERENT
        print(f"{folder}: {end} after kills of the processes {killed}", flush=True)
        ends["kills"] += len(killed)
        ends[f"{end} runs"] += 1
    return ends


def measure_cost(repeats: int) -> Iterator[str]:
    """Yields a line for each way to save and load 1 GB: medians of wall and processor time in seconds."""
    rng = np.random.default_rng(0)
    arrays = {
        f"layer{i}": jax.device_put(rng.standard_normal((4096, 1024), np.float32))
        for i in range(64)
    }
    times: dict[str, list[tuple[float, float]]] = {}

    @contextlib.contextmanager
    def timed(name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        seconds = (time.perf_counter() - wall, time.process_time() - cpu)
        times.setdefault(name, []).append(seconds)

    write, problems = digests.write, digests.problems
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpointer(Path(folder)) as saving:
        for step in range(2 * repeats):
            name = "with digests" if step % 2 else "without"
            digests.write = write if step % 2 else lambda folder: None
            digests.problems = problems if step % 2 else lambda folder, items=None: []
            with timed(f"save, {name}"):
                saving.save(step, {"trained": arrays}, {})
                saving.wait()
            like = shapes(saving.directory / str(step))
            with timed(f"load, {name}"):
                jax.block_until_ready(saving.restore(step, like))
            if step % 2:
                with timed("verify alone"):
                    problems(saving.directory / str(step))
    digests.write, digests.problems = write, problems
    for name, seconds in sorted(times.items()):
        wall, cpu = np.median(seconds, 0)
        yield f"{name:20s} {wall:6.2f} s, {cpu:6.2f} s of the processor"


def held(pid: int) -> dict[str, int]:
    """Returns what a process holds at this moment."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "MB": int(lines["VmRSS"].split()[0]) // 1000,
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(lines["Threads"]),
    }


def train_flat(data: Path, updates: int) -> Iterator[str]:
    """Yields a line every tenth of a training, and raises UserError if more is held in its second half."""
    settings = (
        f"data.directory={data} steps={updates} log_every=10 checkpoint_every={max(1, updates // 20)} "
        f"validate_every={max(1, updates // 10)} data.batch_size=2 adapter.bins=16"
    )
    command = [sys.executable, "-m", "mllm_act.train", "--config=configs/policy/metaworld.py:uniform"]  # fmt: skip
    command += [f"--config.{setting}" for setting in settings.split()]
    tenths: dict[int, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder, "run")
        process = start("train", command, run_folder)
        while process.poll() is None:
            tenth = 10 * max(checkpoint.steps(run_folder), default=0) // updates
            if tenth and tenth not in tenths:
                with contextlib.suppress(FileNotFoundError, KeyError):  # it has just ended
                    tenths[tenth] = held(process.pid)
                    yield f"update {tenth * updates // 10:5d}: " + ", ".join(
                        f"{count} {name}" for name, count in tenths[tenth].items()
                    )
            time.sleep(0.05)
        if process.returncode:
            raise UserError(run_folder.with_suffix(".log").read_text().strip().splitlines()[-1])
    for name in ("files", "threads"):
        half, last = (tenths[tenth][name] for tenth in (5, 9))
        if last > half + 2:
            raise UserError(f"expected {half} {name} at the end as in the middle, found {last}")


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bitflips = commands.add_parser("bitflips")
    bitflips.add_argument("--run", type=user_path, required=True, help="a run's folder")
    bitflips.add_argument("--flips", type=int, default=200)
    killing = commands.add_parser("kills")
    killing.add_argument("--out", type=user_path, required=True, help="a new folder")
    killing.add_argument("--programs", default="generate,train_tokenizer,train")
    killing.add_argument("--kills", type=int, default=30, help="of each program")
    hosts = commands.add_parser("hosts")
    hosts.add_argument("--data", type=user_path, required=True, help="a small dataset")
    hosts.add_argument("--out", type=user_path, required=True, help="a new folder")
    hosts.add_argument("--processes", type=int, default=4)
    hosts.add_argument("--kills", type=int, default=30)
    cost = commands.add_parser("cost")
    cost.add_argument("--repeats", type=int, default=5)
    flat = commands.add_parser("flat")
    flat.add_argument("--data", type=user_path, required=True, help="a Meta-World dataset")
    flat.add_argument("--updates", type=int, default=2000)
    for command in (bitflips, killing, hosts):
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "cost":
        print("\n".join(measure_cost(args.repeats)))
        return
    if args.command == "flat":
        for line in train_flat(args.data.resolve(), args.updates):
            print(line, flush=True)
        return
    if args.command == "bitflips":
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "run")
            shutil.copytree(args.run, copy)
            ends = flip_bits(copy, args.flips, args.seed)
    elif args.command == "hosts":
        expect_new(args.out)
        args.out.mkdir(parents=True)
        ends = count_host_kills(
            args.data.resolve(), args.out.resolve(), args.processes, args.kills, args.seed
        )
    else:
        expect_new(args.out)
        args.out.mkdir(parents=True)
        ends = count_kills(args.out.resolve(), args.programs.split(","), args.kills, args.seed)
    print("\n".join(f"{count:4d} {end}" for end, count in sorted(ends.items())))
    if any(word in end for end in ends for word in (UNNOTICED, DIFFERENT, TRACEBACK)):
        raise UserError("expected no end in capitals, found some above")


if __name__ == "__main__":
    run(main)
