"""Serves a policy to robots and simulators, in openpi's websocket protocol.

    python -m mllm_act.serve --checkpoint=runs/mine --port=8000

Everything is compiled before the first client is let in; until then ``/healthz`` answers 503. Clients are
``openpi-client``, and the package in ``clients/python``, which also reconnects, resumes and asks ahead. SIGTERM stops
the server once it has answered what is in work. docs/serving.md describes the protocol.

With ``--replay`` it serves nothing, but gives requests that were kept by ``--record`` to the policy again, and compares
the actions.
"""

import argparse
import asyncio
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_act.errors import Interrupted, UserError, run, signals
from mllm_act.files import user_path
from mllm_act.policy import Policy
from mllm_act.policy.slots import Slots

try:
    from mllm_act.serving import recording
    from mllm_act.serving.metadata import IMAGE, PROMPT, STATE, describe, image_shapes
    from mllm_act.serving.requests import Checker
    from mllm_act.serving.server import Options, Server
except ModuleNotFoundError as error:
    if error.name not in ("msgpack", "prometheus_client", "websockets"):
        raise
    sys.exit(
        f"error: serving needs a package that is not installed ({error}); pip install 'mllm-act[serve]'"
    )


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Returns the sizes that programs are compiled for: the powers of two below ``largest``, and itself."""
    return (*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest)


def prepare(
    policy: Policy,
    sizes: Sequence[int],
    sessions: int,
    prompt_tokens: int | None = None,
    images: dict[str, tuple[int, int]] | None = None,
    sample: bool = False,
    ensembling: float | None = None,
) -> tuple[Slots, Checker, dict[str, Any]]:
    """Returns compiled slots, the checker of messages, and the metadata of a policy.

    Raises:
      UserError: if an option does not fit the policy.
    """
    if sample and policy.embodiment.adapter == "regression":
        raise UserError(
            "--sample: expected a policy that predicts a distribution of actions, found the regression adapter, which "
            "predicts a single action; omit --sample"
        )
    shapes = image_shapes(policy, images or {})
    tokens = prompt_tokens or policy.prompt.length
    slots = Slots(policy, sessions, sizes, tokens, shapes, sample)
    slots.compile()
    metadata = describe(policy, shapes, tokens, sample, ensembling)
    checker = Checker(
        shapes, policy.proprios, slots.encode, sample, policy.actions, metadata["max_delay"]
    )
    return slots, checker, metadata


def replay(folder: Path, slots: Slots) -> str:
    """Gives recorded requests to the policy again, and returns how far its actions are from the recorded ones."""
    session, instruction, count, equal, largest = "", "", 0, 0, 0.0
    for name, rows in recording.read(folder):
        if name != session:
            slots.clear()
            session, instruction = name, ""
        for i, actions in enumerate(rows["actions"]):
            text, first = str(rows[PROMPT][i]), bool(rows["reset"][i])
            if text != instruction or (first and not i):
                slots.read(0, slots.encode(text), again=not first)
                instruction = text
            step_by_step = bool(rows["step_by_step"][i])
            chunk, action = slots.act(
                [0],
                {camera: rows[IMAGE.format(camera)][i][None] for camera in slots.image_shapes},
                rows[STATE][i][None],
                np.array([first]),
                np.array([not step_by_step]),
                rows["random_key"][i][None] if slots.sample else None,
                [rows["committed"][i]] if "committed" in rows else None,
            )
            found = action if step_by_step else chunk[0]
            error = float(np.abs(found - actions).max())
            count, equal, largest = count + 1, equal + (error == 0), max(largest, error)
    return f"{count} requests: {equal} answered equally, the largest difference of an action is {largest:.3g}"


def _image(text: str) -> tuple[str, tuple[int, int]]:
    camera, _, size = text.rpartition(":")
    height, _, width = size.partition("x")
    if (
        not camera
        or not height.isdecimal()
        or not width.isdecimal()
        or not int(height) * int(width)
    ):
        raise UserError(f"--image: expected CAMERA:HEIGHTxWIDTH, found {text!r}")
    return camera, (int(height), int(width))


def _tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise UserError("--tls-cert, --tls-key: expected both or none, found one; pass the other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"--tls-cert={cert}, --tls-key={key}: expected a certificate and its key in PEM, found {error}"
        ) from None
    return context


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--api-key-file={path}: expected a file with the key, found {error}"
        ) from None
    if len(key) < 16 or not key.isascii() or not key.isprintable():
        raise UserError(
            f"--api-key-file={path}: expected at least 16 printable ASCII characters, found {len(key)}; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return key


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, help="a run's folder, or one of its steps")
    add("--embodiment", help="which one to serve, of a policy that was trained for several")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add(
        "--sessions",
        type=int,
        default=64,
        help="clients at a time; their histories stay on the device (default: 64)",
    )
    add(
        "--max-batch",
        type=int,
        default=16,
        help="observations that act together; programs are compiled for the powers of two up to it (default: 16)",
    )
    add(
        "--wait-ms",
        type=float,
        default=2.0,
        help="how long an observation may wait for those of other clients (default: 2)",
    )
    add("--prompt-tokens", type=int, help="the longest prompt (default: as in training)")
    add(
        "--image",
        type=_image,
        action="append",
        default=[],
        metavar="CAMERA:HxW",
        help="size of a camera's frames (default: as in training)",
    )
    add("--sample", action="store_true", help="sample actions instead of taking the most likely")
    add(
        "--ensembling",
        type=float,
        metavar="DECAY",
        help="as in evaluate; actions come step by step",
    )
    add("--api-key-file", type=user_path, help="clients must send the key in this file")
    add("--tls-cert", type=user_path, help="certificate chain, PEM: serve wss://")
    add("--tls-key", type=user_path, help="its private key, PEM")
    add(
        "--rate", type=float, default=1000.0, help="messages per second of a client (default: 1000)"
    )
    add("--max-megabytes", type=float, default=32.0, help="of a message (default: 32)")
    add(
        "--save-sessions",
        type=user_path,
        metavar="DIR",
        help="save every history, so that sessions go on after a crash (a few milliseconds for each answer)",
    )
    add("--record", type=user_path, metavar="DIR", help="keep all requests and answers")
    add("--replay", type=user_path, metavar="DIR", help="compare with recorded requests, and end")
    args = parser.parse_args()
    for option, low in (
        ("sessions", 1),
        ("max_batch", 1),
        ("rate", 1),
        ("max_megabytes", 1e-3),
        ("wait_ms", 0),
    ):
        value = getattr(args, option)
        if not low <= value < 1e6:
            raise UserError(
                f"--{option.replace('_', '-')}: expected {low:g} to 1e6, found {value:g}"
            )
    return args


def main() -> None:
    """Runs the program."""
    args = _parse()
    tls, key = _tls(args.tls_cert, args.tls_key), _key(args.api_key_file)

    def load() -> tuple[Slots, Checker, dict[str, Any]]:
        policy = Policy.load(args.checkpoint, args.embodiment, args.ensembling)
        sizes, sessions = batch_sizes(min(args.max_batch, args.sessions)), args.sessions
        if args.replay is not None:
            sizes, sessions = (1,), 1
        return prepare(
            policy, sizes, sessions, args.prompt_tokens, dict(args.image), args.sample, args.ensembling
        )  # fmt: skip

    if args.replay is not None:
        print(replay(args.replay, load()[0]))
        return
    options = Options(
        args.host, args.port, args.wait_ms / 1e3, int(args.max_megabytes * 2**20), args.rate, key=key, tls=tls,
        histories=args.save_sessions,
    )  # fmt: skip
    if args.host not in ("127.0.0.1", "::1", "localhost") and (key is None or tls is None):
        print(
            f"notice: --host={args.host}: others can reach this server; use --api-key-file and --tls-cert"
        )

    def listening(port: int) -> None:
        signals.deferred = True  # from now on ``stop`` looks for them
        print(
            f"Serving {args.checkpoint} on {'wss' if tls else 'ws'}://{args.host}:{port}",
            flush=True,
        )

    server = Server(options, args.sessions, args.record and recording.Recorder(args.record))
    try:
        asyncio.run(server.run(load, lambda: signals.received is not None, listening))
    except OSError as error:
        raise UserError(
            f"--host={args.host} --port={args.port}: expected an address to listen on, found {error}"
        ) from None
    assert signals.received is not None
    raise Interrupted(f"{signals.received.name}: stopped; all that was in work is answered")


if __name__ == "__main__":
    run(main)
