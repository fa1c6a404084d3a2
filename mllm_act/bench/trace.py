"""Where a device's time goes: the kernels of a profiler trace, added up by name."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax


def kernels(run: Callable[[], None]) -> list[tuple[str, float, int]]:
    """Runs a function under the profiler.

    Args:
      run: it must wait for what it starts.

    Returns:
      Name, milliseconds and count of each kind of kernel on the first accelerator, longest first. Numbers at the end of
      names are taken off, so that the layers of a model add up. Empty on the CPU, which has no kernels.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(files[0])).planes
        time: Counter[str] = Counter()
        count: Counter[str] = Counter()
        for plane in planes:
            if not plane.name.startswith("/device:") or not plane.name.endswith(":0"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    name = re.sub(r"[_.]\d+$", "", event.name)
                    time[name] += event.duration_ns
                    count[name] += 1
    return [(name, ns / 1e6, count[name]) for name, ns in time.most_common()]


def table(found: list[tuple[str, float, int]], runs: int, rows: int = 25) -> str:
    """Returns the longest kernels as text, in milliseconds and count of one of ``runs`` runs."""
    total = sum(ms for _, ms, _ in found)
    lines = [
        f"{'ms':>9} {'share':>6} {'count':>6}  kernel",
        f"{total / runs:9.3f}   100%         all",
    ]
    for name, ms, count in found[:rows]:
        lines.append(f"{ms / runs:9.3f} {ms / total:6.1%} {count / runs:6.0f}  {name[:90]}")
    return "\n".join(lines)
