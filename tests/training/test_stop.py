"""A training that a signal stops saves its step, says where, and continues bit for bit."""

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import reliability
from mllm_act import errors, train, train_tokenizer
from mllm_act.checkpoints import checkpoint
from mllm_act.config import load_config
from mllm_act.errors import Interrupted, signals
from mllm_act.training import step
from mllm_act.training.metrics import MetricsWriter
from tests.data_pipelines import tiny_rlds

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine takes longer than a program is given to end; what ends it would end the tests."""
    monkeypatch.setattr(errors, "GRACE", 600.0)


SETTINGS: dict[str, dict[str, Any]] = {
    "train": {
        "adapter.bins": 16,
        "checkpoint_every": 4,
        "data.batch_size": 2,
        "log_every": 1,
        "steps": 8,
        "validate_every": 4,
    },
    "train_tokenizer": {
        "checkpoint_every": 8,
        "data.batch_size": 4,
        "log_every": 2,
        "replay": False,
        "steps": 12,
        "tokenizer.codes": 8,
        "tokenizer.hidden": 8,
        "tokenizer.width": 8,
    },
}
CONFIGS = {"train": "policy/metaworld.py:uniform", "train_tokenizer": "tokenizer/metaworld.py:rvq"}
PROGRAMS = {"train": train.main, "train_tokenizer": train_tokenizer.main}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rlds.write_lengths(tmp_path_factory.mktemp("data"), [[5, 4, 7], [6, 3]])


def run(program: str, data: Path, workdir: Path) -> None:
    config = load_config(str(ROOT / "configs" / CONFIGS[program]))
    for key, value in {**SETTINGS[program], "data.directory": str(data)}.items():
        node, _, name = key.rpartition(".")
        (config[node] if node else config)[name] = value
    with signals.handled():
        PROGRAMS[program](config, workdir)


@contextlib.contextmanager
def signalled(number: signal.Signals, place: Any, name: str, call: int = 1) -> Iterator[None]:
    """Within the block, this process gets a signal just before a call of ``place.name``, counted from 1."""
    calls, function = itertools.count(1), getattr(place, name)

    def with_signal(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, with_signal)
        yield


def test_a_policy_stopped_again_and_again_equals_an_undisturbed_one(
    data: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run("train", data, whole)

    # Before the first update, which compiles, there is nothing to save.
    with pytest.raises(KeyboardInterrupt), signalled(signal.SIGTERM, step, "update"):
        run("train", data, stopped)
    assert not list((stopped / "checkpoints").iterdir())

    message = (
        rf"^SIGTERM: stopped after step 3 of 8, saved in {stopped}/checkpoints/3; run the same"
    )
    with (
        pytest.raises(Interrupted, match=message),
        signalled(signal.SIGTERM, MetricsWriter, "write", call=3),
    ):
        run("train", data, stopped)

    # While it validates, it saves at once; the next run makes up for the scores.
    with (
        pytest.raises(Interrupted, match="SIGINT: stopped after step 4 of 8"),
        signalled(signal.SIGINT, train, "_validate"),
    ):
        run("train", data, stopped)
    assert not [
        line for line in reliability.content("train", stopped)["metrics"] if "val/loss" in line
    ]

    with (
        pytest.raises(Interrupted, match="stopped after step 8 of 8"),
        signalled(signal.SIGTERM, checkpoint.Checkpointer, "save"),
    ):
        run("train", data, stopped)
    assert reliability.content("train", stopped) == reliability.content("train", whole)


def test_a_tokenizer_stopped_and_continued_equals_an_undisturbed_one(
    data: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run("train_tokenizer", data, whole)
    with (
        pytest.raises(Interrupted, match=f"after step 4 of 12, saved in {stopped}/checkpoints/4;"),
        signalled(signal.SIGTERM, MetricsWriter, "write", call=2),
    ):
        run("train_tokenizer", data, stopped)
    run("train_tokenizer", data, stopped)
    found, right = (reliability.content("train_tokenizer", folder) for folder in (stopped, whole))
    assert found == right
