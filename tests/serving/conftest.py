"""An untrained policy with chunks of four actions and a context of three steps, compiled once for all tests."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mllm_act import serve, train
from mllm_act.config import load_config
from mllm_act.policy import Policy
from tests.data_pipelines import tiny_rlds
from tests.serving.server_thread import Loaded, Running, running
from tests.shared import once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(home: Path) -> None:
        config = load_config(str(ROOT / "configs/policy/metaworld.py:uniform"))
        config.data.directory = str(tiny_rlds.write_lengths(home / "data", [[5, 4]]))
        config.steps, config.data.batch_size, config.adapter.bins = 0, 2, 16
        config.chunk, config.context, config.max_delay = 4, 3, 2
        train.main(config, home / "policy")

    return once(tmp_path_factory, "served_policy", make) / "policy"


@pytest.fixture(scope="session")
def policy(workdir: Path) -> Policy:
    return Policy.load(workdir)


@pytest.fixture(scope="session")
def loaded(policy: Policy) -> Loaded:
    return serve.prepare(policy, sizes=(4,), sessions=8, prompt_tokens=16)


@pytest.fixture(scope="module")
def server(loaded: Loaded) -> Iterator[Running]:
    with running(loaded) as server:
        yield server


def observation(seed: int, text: str = "do task 0") -> dict[str, object]:
    """A random observation of the tiny policy."""
    rng = np.random.default_rng(seed)
    return {
        "observation/corner4": rng.integers(0, 256, (16, 16, 3), np.uint8),
        "observation/state": rng.normal(size=3).astype(np.float32),
        "prompt": text,
    }
