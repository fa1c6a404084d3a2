"""A program that stands still ends with the stacks of its threads. A real process."""

import subprocess
import sys
from pathlib import Path

from mllm_act.errors import LOST

PROGRAM = """
import time
from mllm_act.training.stop import Stop

def stuck():
    time.sleep(60)

with Stop(stall_minutes=0.005) as stop:
    stop.requested()
    stuck()
"""


def test_a_program_that_stands_still_shows_where_and_may_be_started_again() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == LOST
    assert "in stuck" in done.stderr  # the stack
    assert done.stderr.splitlines()[-1].startswith("error: expected a step, a validation batch")
