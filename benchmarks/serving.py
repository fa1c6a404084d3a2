"""A policy server under load, under attack, killed; and what it costs over ``policy.act`` in the same process.

    export PYTHONPATH=.:clients/python
    python benchmarks/serving.py load --checkpoint=runs/demo/rvq --clients=100 --rate=10 --minutes=5
    python benchmarks/serving.py hostile --checkpoint=runs/demo/rvq --messages=10000
    python benchmarks/serving.py latency --checkpoint=runs/demo/rvq
    python benchmarks/serving.py kill --checkpoint=runs/demo/rvq
    python benchmarks/serving.py kill --checkpoint=runs/demo/rvq --more=--save-sessions=runs/sessions

Each starts ``python -m mllm_act.serve`` as a process of its own and prints one line of JSON. Every client plays an
episode of random observations, its own, again and again: an answer is right if it is what that client got for that step
while it was alone.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mllm_act_client import Client, SessionLost, wire
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from mllm_act.errors import run

STEPS = 8  # of an episode
TOLERANCE = 1e-4  # of an action: sums of other batch sizes round otherwise


class Served:
    """A server process."""

    def __init__(self, args: argparse.Namespace, port: int = 0) -> None:
        command = [
            sys.executable,
            "-m",
            "mllm_act.serve",
            f"--checkpoint={args.checkpoint}",
            f"--port={port}",
        ]
        command += args.more.split()
        command += [f"--sessions={max(args.clients + 20, 32)}", f"--max-batch={args.max_batch}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = next(
            line.split()[-1] for line in self.process.stdout if line.startswith("Serving")
        )

    @property
    def memory(self) -> float:
        """Resident MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def served(args: argparse.Namespace) -> Iterator[Served]:
    server = Served(args)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)


def episode(metadata: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Returns the observations of a client."""
    rng = np.random.default_rng(seed)
    messages = []
    for step in range(STEPS):
        message: dict[str, Any] = {"reset": step == 0}
        for key, known in metadata["observation"].items():
            if known["kind"] == "image":
                message[key] = rng.integers(0, 256, known["shape"], np.uint8)
            elif known["kind"] == "state":
                message[key] = rng.normal(size=known["shape"]).astype(np.float32)
            else:
                message[key] = f"do task {seed % 3}"
        messages.append(message)
    return messages


def references(url: str, clients: int) -> tuple[list[list[dict[str, Any]]], np.ndarray]:
    """Returns the episode of each client, and the actions [client, step, H, A] that it gets alone."""
    with Client(url) as client:
        episodes = [episode(client.metadata, seed) for seed in range(clients)]
        actions = [[client.infer(message)["actions"] for message in one] for one in episodes]
    return episodes, np.array(actions)


class Check:
    """Compares answers with the references."""

    def __init__(self, actions: np.ndarray) -> None:
        self.actions, self.found = actions, Counter[str]()

    def __call__(self, client: int, step: int, actions: np.ndarray) -> None:
        close = np.abs(self.actions[:, step] - actions).max(axis=(1, 2)) <= TOLERANCE
        self.found["right" if close[client] else "another's" if close.any() else "other"] += 1


async def _play(
    url: str, client: int, messages: list[Any], check: Check, rate: float, until: float
) -> tuple[list[float], int]:
    """One client's load; returns the milliseconds of each answer and how many were not answered."""
    times, lost, number = [], 0, 0
    await asyncio.sleep(random.random() / rate)
    async with connect(url, compression=None, max_size=None) as connection:
        await connection.recv()
        due = time.perf_counter()
        while time.time() < until:
            step = number % STEPS
            packed = wire.pack({**messages[step], "obs_id": number})
            began = time.perf_counter()
            await connection.send(packed)
            try:
                answer = wire.unpack(await asyncio.wait_for(connection.recv(), 30))
                times.append(1e3 * (time.perf_counter() - began))
                check(client, step, answer["actions"])
                lost += answer["obs_id"] != number
            except (TimeoutError, TypeError):  # none, or an error in a text frame
                lost += 1
            number += 1
            due = max(due + 1 / rate, time.perf_counter() - 1 / rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return times, lost


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Many clients at a steady rate."""
    with served(args) as server:
        episodes, actions = references(server.url, args.clients)
        check, memory = Check(actions), []
        until = time.time() + 60 * args.minutes

        async def everything() -> list[tuple[list[float], int]]:
            async def watch() -> None:
                while time.time() < until:
                    memory.append(server.memory)
                    await asyncio.sleep(2)

            watching = asyncio.create_task(watch())
            found = await asyncio.gather(*(
                _play(server.url, i, messages, check, args.rate, until) for i, messages in enumerate(episodes)
            ))  # fmt: skip
            await watching
            return found

        found = asyncio.run(everything())
    times = np.concatenate([times for times, _ in found])
    return {
        "clients": args.clients, "asked_hz": args.clients * args.rate,
        "answered_hz": round(len(times) / 60 / args.minutes, 1), "answers": len(times),
        "lost": sum(lost for _, lost in found), **check.found,
        "median_ms": round(float(np.median(times)), 2), "p99_ms": round(float(np.percentile(times, 99)), 2),
        "max_ms": round(float(times.max()), 2), "memory_mib": [round(memory[len(memory) // 5]), round(memory[-1])],
    }  # fmt: skip


def malformed(rng: random.Random, good: bytes) -> tuple[str, bytes]:
    """Returns one hostile message and its kind."""
    kind = rng.choice(["random", "truncated", "changed", "wrong", "huge", "nested"])
    if kind == "random":
        return kind, rng.randbytes(rng.randrange(0, 300))
    if kind == "truncated":
        return kind, good[: rng.randrange(len(good))]
    if kind == "changed":
        data = bytearray(good)
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data)) if rng.random() < 0.3 else rng.randrange(120)] = (
                rng.randrange(256)
            )
        return kind, bytes(data)
    if kind == "wrong":
        message = wire.unpack(good)
        key = rng.choice(list(message))
        shape = [rng.randrange(0, 5) for _ in range(rng.randrange(0, 5))]
        dtype = rng.choice(["u1", "<f8", ">i2", "?", "<f4"])
        message[key] = rng.choice(
            [np.zeros(shape, dtype), None, -1, "x" * 9000, b"\xff\xd8\xff", [[]], {"a": 1}]
        )
        return kind, wire.pack(message)
    if kind == "huge":
        array = (
            b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x00\xc4\x05dtype\xa3<f8\xc4\x05shape\x93"
        )
        return kind, rng.choice([
            b"\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
            b"\x81\xb1observation/state" + array + 3 * b"\xce\x7f\xff\xff\xff",
        ])  # fmt: skip
    return kind, b"\x81\xa1x" + b"\x91" * rng.randrange(1, 3000)


async def _attack(url: str, messages: int, good: bytes) -> Counter[str]:
    rng, found, connection = random.Random(0), Counter[str](), None
    for _ in range(messages):
        kind, data = malformed(rng, good)
        try:
            if connection is None:
                connection = await connect(url, compression=None, max_size=None).__aenter__()
                await connection.recv()
            await connection.send(data)
            answer = await asyncio.wait_for(connection.recv(), 30)
            assert "Traceback" not in answer if isinstance(answer, str) else True
            found[f"{kind}: {'refused' if isinstance(answer, str) else 'answered'}"] += 1
        except ConnectionClosed:
            found[f"{kind}: closed"] += 1
            connection = None
    return found


def slow_and_half_open(url: str) -> list[socket.socket]:
    """Opens connections that never end what they began."""
    host, _, port = url.removeprefix("ws://").rpartition(":")
    sockets = []
    for beginning in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"):
        for _ in range(3):
            sockets.append(socket.create_connection((host, int(port))))
            sockets[-1].sendall(beginning)
    handshake = (
        f"GET / HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()
    claims = (
        b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00",
        b"\x82\xfe\x7f\xff\x00\x00\x00\x00abc",
    )
    for claim in claims:  # 2^63 bytes; 32 KB of which three come
        sockets.append(socket.create_connection((host, int(port))))
        sockets[-1].sendall(handshake + claim)
    return sockets


def hostile(args: argparse.Namespace) -> dict[str, Any]:
    """Malformed messages, beside clients whose answers must not change."""
    with served(args) as server:
        episodes, actions = references(server.url, 2)
        check, stop = Check(actions), threading.Event()

        def play(number: int) -> None:
            with Client(server.url) as client:
                while not stop.is_set():
                    for step, message in enumerate(episodes[number]):
                        check(number, step, client.infer(message)["actions"])

        threads = [threading.Thread(target=play, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        before, open_sockets = server.memory, slow_and_half_open(server.url)
        found = asyncio.run(_attack(server.url, args.messages, wire.pack(episodes[0][0])))
        stop.set()
        for thread in threads:
            thread.join()
        after = server.memory
        for half_open in open_sockets:
            half_open.close()
    return {
        "messages": args.messages, **dict(sorted(found.items())), "others": dict(check.found),
        "memory_mib": [round(before), round(after)],
    }  # fmt: skip


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """What a client waits for, beside ``policy.act``, in turns."""
    from mllm_act.policy import Policy

    policy = Policy.load(args.checkpoint)
    with served(args) as server, Client(server.url) as client:
        messages, memory = episode(client.metadata, 0), policy.start(1)
        served_ms, alone_ms = [], []
        for i in range(args.answers + 50):
            message = messages[i % STEPS]
            images = {c: message[f"observation/{c}"][None] for c in policy.embodiment.cameras}
            began = time.perf_counter()
            _, memory = policy.act(
                images, message["observation/state"][None], [message["prompt"]], np.array([i % STEPS == 0]), memory
            )  # fmt: skip
            middle = time.perf_counter()
            client.infer({**message, "step_by_step": True})
            alone_ms.append(1e3 * (middle - began))
            served_ms.append(1e3 * (time.perf_counter() - middle))
    alone, remote = np.median(alone_ms[50:]), np.median(served_ms[50:])
    return {
        "answers": args.answers, "policy_act_ms": round(alone, 3), "served_ms": round(remote, 3),
        "overhead_ms": round(remote - alone, 3),
    }  # fmt: skip


def kill(args: argparse.Namespace) -> dict[str, Any]:
    """Kills the server in the middle of an episode, and starts it again."""
    server = Served(args)
    port = int(server.url.rpartition(":")[2])
    with Client(server.url, wait=120) as client:
        messages = episode(client.metadata, 0)
        for message in messages[:3]:
            client.infer(message)
        server.process.kill()
        server.process.wait()
        began, threads = time.monotonic(), []
        threads.append(threading.Thread(target=lambda: servers.append(Served(args, port))))
        servers: list[Served] = []
        threads[0].start()
        told, answer = "nothing", None
        try:
            answer = client.infer(messages[3])
        except SessionLost as error:
            told = str(error)
            answer = client.infer(messages[3])
        seconds = time.monotonic() - began
        threads[0].join()
        servers[0].process.terminate()
        servers[0].process.wait(60)
    return {"told": told, "step": answer["step"], "seconds_with_start": round(seconds, 1)}


def main() -> None:
    """Runs the program."""
    programs = {"load": load, "hostile": hostile, "latency": latency, "kill": kill}
    parser = argparse.ArgumentParser(
        prog="python benchmarks/serving.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=programs)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--more", default="", help="options for the server")
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--answers", type=int, default=500)
    args = parser.parse_args()
    print(json.dumps({"what": args.what, **programs[args.what](args)}))


if __name__ == "__main__":
    run(main)
