"""Small values that processes tell each other, through the coordinator and not through devices.

With one process, all of this costs nothing and waits for nothing.
"""

import base64
import dataclasses
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mllm_act import __version__
from mllm_act.errors import UserError

WAIT = 1800.0  # seconds for the slowest process, which may be reading a large dataset
_PREFIX = "mllm_act"
_SLICE_MS = 1000

Plain = TypeVar("Plain")  # of JSON


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a process failed, with its exit status, and whether it stood still."""

    status: int
    message: str
    stalled: bool


class Group:
    """The processes of this program.

    Attributes:
      process: the number of this one.
      count: how many there are.
    """

    process = 0
    count = 1

    def __init__(self) -> None:
        """One process."""
        self._client: Any = None
        self._used: Counter[str] = Counter()

    def join(self, client: Any, process: int, count: int) -> None:
        """Becomes a group of several; ``client`` is JAX's, connected to the coordinator."""
        self._client, self.process, self.count = client, process, count

    @property
    def first(self) -> bool:
        """Whether this is process 0, which alone prints, and writes to the run's folder."""
        return self.process == 0

    def from_first(self, name: str, make: Callable[[], Plain]) -> Plain:
        """Returns what ``make`` returns in process 0, to every process; plain JSON types. All must call it.

        Raises:
          UserError: ``make`` raised it.
        """
        if self.count == 1:
            return make()
        key = self._key(name)
        if self.first:
            try:
                answer: dict[str, Any] = {"value": make()}
            except UserError as error:
                answer = {"error": str(error)}
            self._client.key_value_set(key, json.dumps(answer))
        else:
            answer = json.loads(self._get(key))
        if "error" in answer:
            raise UserError(answer["error"])
        return answer["value"]

    def gather(self, name: str, value: Plain) -> list[Plain]:
        """Returns the values of all processes, in process 0; an empty list in the others. All must call it."""
        if self.count == 1:
            return [value]
        key = self._key(name)
        self._client.key_value_set(f"{key}/{self.process}", json.dumps(value))
        if not self.first:
            return []
        return [json.loads(self._get(f"{key}/{process}")) for process in range(self.count)]

    def everyone(self, message: bytes) -> Iterator[bytes]:
        """Yields the messages of all processes in order, one at a time. All must call it."""
        if self.count == 1:
            yield message
            return
        key = self._key("everyone")
        self._client.key_value_set(f"{key}/{self.process}", base64.b85encode(message).decode())
        for process in range(self.count):
            yield base64.b85decode(self._get(f"{key}/{process}"))

    def expect_same(self, name: str, facts: Mapping[str, Any]) -> None:
        """Compares the version and what the processes are started with, before they compute together. All must call it.

        Raises:
          UserError: in every process, if two of them differ; it names the key, the processes and both values.
        """
        if self.count == 1:
            return
        told = {key: json.dumps(value) for key, value in {"version": __version__, **facts}.items()}
        told[""] = socket.gethostname()
        everyone = self.gather(name, told)

        def compare() -> None:
            first, *others = everyone
            for process, other in enumerate(others, 1):
                for key in sorted((first.keys() | other.keys()) - {""}):
                    if first.get(key) != other.get(key):
                        raise UserError(
                            f"{key}: expected the same in all {self.count} processes, found {first.get(key)} in "
                            f"process 0 on {first['']} and {other.get(key)} in process {process} on {other['']}; "
                            "start all with the same command, code and data"
                        )

        self.from_first(name, compare)

    def tell(self, name: str, value: str) -> None:
        """Leaves a value for the other processes; the first to do so wins."""
        try:
            self._client.key_value_set(f"{_PREFIX}/{name}", value)
        except (
            Exception
        ) as error:  # another was first, or the coordinator is gone; JAX's class has no public name
            if "ALREADY_EXISTS" not in str(error) and "UNAVAILABLE" not in str(error):
                raise

    def told(self, name: str) -> str | None:
        """Returns what a process has left, or None."""
        try:
            return self._client.key_value_try_get(f"{_PREFIX}/{name}")
        except Exception:  # there is none, or the coordinator is gone
            return None

    def wait_for(self, name: str, seconds: float) -> str:
        """Returns what a process leaves within so many seconds. Raises UserError if none does."""
        return self._get(f"{_PREFIX}/{name}", seconds)

    def tell_failure(self, status: int, message: str, stalled: bool) -> None:
        """Leaves the reason why this process fails."""
        host = f"process {self.process} of {self.count} on {socket.gethostname()}"
        self.tell("failure", json.dumps([status, f"{host}: {message}", stalled]))

    def failure(self) -> Failure | None:
        """Returns why another process failed, or None."""
        text = self.told("failure")
        return None if text is None else Failure(*json.loads(text))

    def _key(self, name: str) -> str:
        """Returns another key for each use of a name; all processes use the names in the same order."""
        self._used[name] += 1
        return f"{_PREFIX}/{name}/{self._used[name]}"

    def _get(self, key: str, seconds: float = WAIT) -> str:
        limit = time.monotonic() + seconds
        while True:
            try:
                return self._client.blocking_key_value_get(key, _SLICE_MS)
            except Exception as error:  # not yet there
                if time.monotonic() > limit:
                    raise UserError(
                        f"processes: expected all {self.count} to reach {key!r} within {seconds:.0f} s, found some "
                        f"that did not ({str(error).splitlines()[0]}); look at the output of the others"
                    ) from None


group = Group()  # of this process
