"""What a run reports: times without compiling, rates, traces, Weights & Biases only where it is installed."""

import importlib.util
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mllm_act.errors import UserError
from mllm_act.training.metrics import MetricsWriter, StepTimer
from mllm_act.training.profile import Profile


def test_compiling_is_no_part_of_a_step() -> None:
    timer = StepTimer(0, operations=6e12)
    with timer.compiling():
        time.sleep(0.2)
    with timer.waiting():
        time.sleep(0.01)
    found = timer.lap(2, batch_size=4, actions=12)
    seconds = found["step_ms"] / 1e3
    assert found["compile_seconds"] >= 0.2 and found["step_ms"] >= found["data_wait_ms"] >= 5
    assert found["samples_per_second"] == pytest.approx(4 / seconds)
    assert found["actions_per_second"] == pytest.approx(12 / seconds)
    assert found["tflops"] == pytest.approx(6 / seconds)
    assert "utilisation" not in found  # the CPU's peak is not known


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_wandb_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.wandb=mine: .*pip install 'mllm-act\[wandb\]'"):
        MetricsWriter(tmp_path, wandb_project="mine")


@pytest.mark.parametrize(("after", "steps", "count"), [(0, 20, 2), (0, 3, 2), (4, 5, 9), (0, 4, 0)])
def test_a_profile_is_of_as_many_updates_as_there_are(
    tmp_path: Path, after: int, steps: int, count: int
) -> None:
    profile = Profile(tmp_path, after, steps, count)
    for step in range(after + 1, steps + 1):
        profile.before(step)
        profile.after(step, jax.jit(jnp.cos)(jnp.ones(3)))
    traces = list(tmp_path.rglob("perfetto_trace.json.gz"))
    assert len(traces) == (count > 0)
