"""Where the time of a run went, from events written by hand."""

import json
from pathlib import Path

import pytest

from mllm_act import goodput

EVENTS = [
    {"time": 100.0, "event": "start", "processes": 4},
    {"time": 110.0, "event": "init", "seconds": 10.0},
    {"time": 112.0, "event": "restore", "seconds": 2.0, "step": 0},
    {"time": 120.0, "event": "compile", "seconds": 8.0, "step": 1},
    {"time": 130.0, "event": "steps", "step": 10, "steps": 10, "seconds": 10.0, "wait": 1.0},
    {"time": 131.0, "event": "save", "seconds": 1.0, "step": 10},
    {"time": 141.0, "event": "steps", "step": 20, "steps": 10, "seconds": 10.0, "wait": 2.0},
    {"time": 150.0, "event": "start", "processes": 2},  # killed; from step 10 again
    {"time": 153.0, "event": "restore", "seconds": 3.0, "step": 10},
    {"time": 163.0, "event": "steps", "step": 20, "steps": 10, "seconds": 10.0, "wait": 4.0},
    {"time": 165.0, "event": "evaluate", "seconds": 2.0, "step": 20},
    {"time": 165.0, "event": "end", "step": 20},
]


def test_updates_that_were_made_again_are_lost(tmp_path: Path) -> None:
    text = "\n".join(map(json.dumps, EVENTS)) + '\n{"time": 99'  # a killed program's last line
    (tmp_path / goodput.EVENTS).write_text(text)
    parts = goodput.seconds(goodput.read_events(tmp_path))
    assert parts == pytest.approx({
        "total": 65, "updates": 20, "of them waiting for data": 5, "lost updates": 10, "init": 10, "restore": 5,
        "compile": 8, "save": 1, "evaluate": 2, "stopped, and starting": 9,
    })  # fmt: skip
    table = goodput.table(tmp_path)
    assert table.startswith(
        "Goodput 30.8% of 65 s in 2 start(s), of which 1 came to the end, 0 were"
    )
    assert "| lost updates | 10.0 | 15.4% |" in table


def test_no_events_no_table(tmp_path: Path) -> None:
    assert goodput.table(tmp_path) == ""
