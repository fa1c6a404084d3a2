"""Device time by kernel, from a profiler trace."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax


def kernels(run: Callable[[], None]) -> list[tuple[str, float, int]]:
    """Profiles a function.

    Args:
      run: the function, which must wait until the device has finished.

    Returns:
      Name, milliseconds and count of each kernel on the first accelerator, longest first. Numbers at the end of names
      are removed, so that the same kernel of all layers is one row. Empty on the CPU, which has no kernels.
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
