"""Foreign files with one change each, and what their parsers make of them. For tests and ``benchmarks/fuzz.py``."""

import contextlib
import dataclasses
import io
import json
import random
import resource
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllm_act.errors import UserError

SECONDS = 20  # for one file
GIGABYTE = 1 << 20  # in ru_maxrss's kilobytes
RIGHT = {"refused", "equal", "other"}  # the outcomes that may be

Damage = Callable[[bytes, random.Random], bytes]
Ranges = list[tuple[int, int]]


class Hang(BaseException):
    """Not an Exception, so that no handler takes it for a parser's."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file, and how the programs read it.

    Attributes:
      name: of the kind.
      make: writes a good file, and what belongs to it, into an empty folder; returns the file that is damaged.
      read: the file's content.
      damage: makes one change.
      compare: content and good content to ``equal``, ``other`` (a change that no reader can tell from another good
        file) or ``wrong``. Without it, other content is wrong: the format has checksums.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    damage: Damage
    compare: Callable[[Any, Any], str] | None = None


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises Hang after some seconds."""

    def ring(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def outcome(kind: Format, path: Path, folder: Path, expected: Any) -> str:
    """Reads a damaged file in a folder: ``refused``, ``equal``, ``other``, or what is wrong, with a reason."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with limited(SECONDS), contextlib.redirect_stdout(io.StringIO()):
            found = kind.read(path)
        compare = kind.compare or (lambda a, b: "equal" if a == b else "wrong")
        result = compare(found, expected)
    except UserError as error:
        one_line = str(error).isprintable() and str(folder) in str(error)
        result = "refused" if one_line else f"not one line with the file's name: {error}"
    except Hang:
        result = f"hang: over {SECONDS} s"
    except Exception as error:
        result = f"exception: {type(error).__name__}: {str(error)[:200]}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return result if grown < GIGABYTE else f"memory: {grown >> 10} MB"


def fuzz(kind: Format, folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Damages a file ``count`` times, and counts the outcomes."""
    path = kind.make(folder)
    data, expected = path.read_bytes(), kind.read(path)
    draw, counts = random.Random(seed), Counter[str]()
    for _ in range(count):
        path.write_bytes(kind.damage(data, draw))
        counts[outcome(kind, path, folder, expected)] += 1
    return counts


def mutated(data: bytes, draw: random.Random, frozen: Ranges = []) -> bytes:  # noqa: B006
    """One change of the bytes, outside of the ranges of values that no format can notice a change in."""
    while True:
        at = draw.randrange(len(data))
        if not any(start <= at < stop for start, stop in frozen):
            break
    huge = struct.pack("<q", draw.choice([-1, 2**62, 2**31, 2**40, draw.getrandbits(62)]))
    changed = draw.choice([
        lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
        lambda: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :],
        lambda: data[:at] + data[at + draw.randrange(1, 9) :],
        lambda: data[:at] + draw.randbytes(draw.randrange(1, 9)) + data[at:],
        lambda: data[:at] + huge + data[at + 8 :],
        lambda: data[:at],
    ])()  # fmt: skip
    end = at + 8 if len(changed) == len(data) else at
    return data if any(start < end and at < stop for start, stop in frozen) else changed


_DEEP = "a place for many brackets"
_ODD: list[Any] = [
    None, True, -1, 0, 2, 10**10, 10**400, 1.5, float("nan"), "", "x" * 5_000, "../../x", "/etc/passwd", "a\0b\nc",
    "\ud800", "{SPLIT:>9999999999}", "{SPLIT.__class__}", [], {}, [0] * 100_000, ["1"] * 100_000, _DEEP,
    {f"camera{i}": {"image": {}} for i in range(10_000)},
]  # fmt: skip


def mutated_json(data: bytes, draw: random.Random) -> bytes:
    """One change of a JSON file: of its bytes, or a value that is gone, twice there, renamed, or something odd."""
    if draw.random() < 0.4:
        return mutated(data, draw)
    value = json.loads(data)
    container, key = draw.choice(list(_places(value)))
    change = draw.randrange(6)
    if change == 0:
        del container[key]
    elif change == 1 and isinstance(container, list):
        container.append(container[key])
    elif change == 1:
        container[draw.choice(["x", "", "../x", "x" * 2_000])] = container.pop(key)
    else:
        container[key] = draw.choice(_ODD)
    deep = "[" * 50_000 + "]" * 50_000
    return json.dumps(value).replace(f'"{_DEEP}"', deep).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()  # fmt: skip
    for key in keys:
        yield value, key
        yield from _places(value[key])
