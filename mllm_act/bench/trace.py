"""Device time by kernel, from a profiler trace."""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

Event = tuple[str, float, float]  # name, start and end in nanoseconds


def events(run: Callable[[], None]) -> list[Event]:
    """Profiles a function, which must wait until the device has finished.

    Returns:
      The kernels of the first accelerator. Empty on the CPU, which has no kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(files[0])).planes
        return [
            (event.name, event.start_ns, event.start_ns + event.duration_ns)
            for plane in planes
            if plane.name.startswith("/device:") and plane.name.endswith(":0")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]


def kernels(events: Iterable[Event]) -> list[tuple[str, float, int]]:
    """Returns name, milliseconds and count of each kernel, longest first.

    Numbers at the end of names are removed, so that the same kernel of all layers is one row.
    """
    time: dict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    for event, start, end in events:
        name = re.sub(r"[_.]\d+$", "", event)
        time[name] += end - start
        count[name] += 1
    longest = sorted(time.items(), key=lambda item: -item[1])
    return [(name, ns / 1e6, count[name]) for name, ns in longest]


def collectives(events: Iterable[Event]) -> tuple[float, float]:
    """Returns the milliseconds of NCCL's kernels and copies, and those of them in which no other kernel ran."""
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for name, start, end in events:
        spans[name.lower().startswith(("nccl", "memcpyp2p"))].append((start, end))
    total, others = _union(spans[True]), _union(spans[False])
    both = sum(max(0.0, min(end, b) - max(start, a)) for start, end in total for a, b in others)
    length = sum(end - start for start, end in total)
    return length / 1e6, (length - both) / 1e6


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns disjoint spans that cover the same time."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def table(times: list[tuple[str, float, int]], runs: int, rows: int = 25) -> str:
    """Returns the result of ``kernels`` as text, the longest ``rows``, divided by the number of ``runs``."""
    total = sum(ms for _, ms, _ in times)
    lines = [
        f"{'ms':>9} {'share':>6} {'count':>6}  kernel",
        f"{total / runs:9.3f}   100%         all",
    ]
    for name, ms, count in times[:rows]:
        lines.append(f"{ms / runs:9.3f} {ms / total:6.1%} {count / runs:6.0f}  {name[:90]}")
    return "\n".join(lines)
