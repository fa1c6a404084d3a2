"""A policy behind a server, for evaluation: it acts as ``Policy`` does, through one session for each episode.

    python -m mllm_act.evaluate --policy=ws://127.0.0.1:8000 --env=metaworld --out=DIR

Every observation is sent, and the server executes its chunks, so the results are those of an evaluation in one process.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt32

from mllm_act.errors import UserError

Memory = list[Any]  # a client for each episode


def check_source(args: argparse.Namespace) -> None:
    """Raises UserError unless exactly one policy is named, and options that a server does not take are left out."""
    if (args.checkpoint is None) == (args.policy is None):
        raise UserError(
            f"--checkpoint, --policy: expected one of them, found {'none' if args.policy is None else 'both'}"
        )
    if args.policy is not None and (
        args.data is not None or args.ensembling is not None or args.out is None
    ):
        raise UserError(
            "--policy: expected a simulator and --out, without --data and --ensembling (the server has one), found "
            "others"
        )


class RemotePolicy:
    """The policy at an address."""

    def __init__(self, url: str, env: str, sample: bool) -> None:
        """Connects.

        Args:
          url: such as ``ws://127.0.0.1:8000``.
          env: the environment that it must act in.
          sample: whether it must sample.

        Raises:
          UserError: there is no server, or it serves another policy.
        """
        try:
            from mllm_act_client import Client
        except ImportError:
            raise UserError(
                f"--policy={url}: expected the package mllm_act_client, found none; pip install clients/python"
            ) from None
        self._url, self._open = url, Client
        self._clients: Memory = []
        self.metadata = self._connect().metadata
        found = self.metadata.get("embodiment")
        if found != env:
            raise UserError(
                f"--policy={url}: expected a server of mllm_act with a policy for {env}, found "
                f"{'another server' if found is None else found}"
            )
        if self.metadata["sample"] != sample:
            raise UserError(
                f"--sample: expected it if and only if the server was started with --sample, found {sample}"
            )

    def _connect(self) -> Any:
        try:
            client = self._open(self._url)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"--policy={self._url}: expected a server, found none: {error}"
            ) from None
        self._clients.append(client)
        return client

    def start(self, batch: int) -> Memory:
        """Returns a new session for each of ``batch`` episodes."""
        while len(self._clients) < batch:
            self._connect()
        self._threads = ThreadPoolExecutor(batch)
        return self._clients[:batch]

    def act(
        self,
        images: Mapping[str, UInt8[np.ndarray, "B H W 3"]],
        proprio: Float[np.ndarray, "B P"],
        instructions: Sequence[str],
        first: Bool[np.ndarray, " B"],
        memory: Memory,
        words: UInt32[np.ndarray, "B 2"] | None = None,
    ) -> tuple[Float[np.ndarray, "B A"], Memory]:
        """Decides the next action of each episode, see ``Policy.act``; ``words`` are the data of random keys.

        Raises:
          UserError: the server refused an observation, or was lost.
        """

        def one(i: int) -> np.ndarray:
            message: dict[str, Any] = {
                key: images[known["camera"]][i]
                for key, known in self.metadata["observation"].items()
                if known["kind"] == "image"
            }
            message |= {
                "observation/state": proprio[i], "prompt": instructions[i], "reset": bool(first[i]),
                "step_by_step": True,
            }  # fmt: skip
            if words is not None:
                message["random_key"] = words[i]
            return memory[i].infer(message)["actions"][0]

        try:
            return np.stack(list(self._threads.map(one, range(len(first))))), memory
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--policy={self._url}: expected an answer, found: {error}") from None

    def close(self) -> None:
        """Ends all sessions."""
        for client in self._clients:
            client.close()
