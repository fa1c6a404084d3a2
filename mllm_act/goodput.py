"""Where the time of a run went, over all its starts, from ``WORKDIR/events.jsonl`` (see ``mllm_act.training.events``).

Goodput is the share of the time, from the first start to the last event, that was spent on updates that count. Updates
that a later start made again, because they were not saved, are lost.
"""

import json
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
# The rows of the table: what they are called, and the events whose seconds they sum.
ROWS = {
    "init": ("init",), "restore": ("restore",), "compile": ("compile",),
    "save": ("save",), "evaluate": ("evaluate",),
}  # fmt: skip


def read_events(workdir: Path) -> list[list[dict[str, Any]]]:
    """Returns the events of each start of a run; a line that a killed program was writing is left out."""
    path = workdir / EVENTS
    starts: list[list[dict[str, Any]]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event["event"] == "start":
            starts.append([])
        if starts:
            starts[-1].append(event)
    return starts


def seconds(starts: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Returns the seconds of a run by what was done in them; they sum to ``total``, which comes first."""
    first, last = starts[0][0]["time"], starts[-1][-1]["time"]
    result = {
        "total": last - first,
        "updates": 0.0,
        "of them waiting for data": 0.0,
        "lost updates": 0.0,
    }
    for number, events in enumerate(starts):
        later = [
            e["step"] for start in starts[number + 1 :] for e in start if e["event"] == "restore"
        ]
        kept_to = min(later, default=float("inf"))
        for event in (e for e in events if e["event"] == "steps"):
            spent, done = event["seconds"], event["steps"]
            kept = min(done, max(0, kept_to - event["step"] + done)) / done
            result["updates"] += kept * spent
            result["of them waiting for data"] += kept * min(spent, event["wait"])
            result["lost updates"] += (1 - kept) * spent
    for name, kinds in ROWS.items():
        result[name] = sum(e["seconds"] for start in starts for e in start if e["event"] in kinds)
    told = sum(x for name, x in result.items() if name not in ("total", "of them waiting for data"))
    result["stopped, and starting"] = max(0.0, result["total"] - told)
    return result


def table(workdir: Path) -> str:
    """Returns the table of a run as Markdown; empty if it has no events."""
    starts = read_events(workdir)
    if not starts or starts[-1][-1]["time"] <= starts[0][0]["time"]:
        return ""
    parts = seconds(starts)
    total = parts.pop("total")
    ends = [start[-1]["event"] for start in starts]
    lines = [
        f"Goodput {parts['updates'] / total:.1%} of {total:.0f} s in {len(starts)} start(s), of which "
        f"{ends.count('end')} came to the end, {ends.count('preempt')} were preempted, and "
        f"{len(ends) - ends.count('end') - ends.count('preempt')} were killed or failed.",
        "", "| time in | seconds | share |", "|---|---|---|",
        *(f"| {name} | {spent:.1f} | {spent / total:.1%} |" for name, spent in parts.items()),
    ]  # fmt: skip
    return "\n".join(lines)
