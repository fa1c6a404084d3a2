"""Generates small datasets with the real simulator, also when it is interrupted, killed or run twice."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.generate import generate, is_val
from data_pipelines.reading.rlds import RECORD, open_dataset
from data_pipelines.tensorflow_cpu import tf
from data_pipelines.writing import recording
from mllm_act import envs
from mllm_act.envs.processes import Worker
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError
from mllm_act.files import locked

pytestmark = pytest.mark.slow

TASKS = "coffee-button-v3,handle-press-v3"  # the shortest demonstrations: about 40 steps
ARGUMENTS: dict[str, Any] = {"env": "metaworld", "tasks": TASKS, "episodes": 3, "seed": 5}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generate") / "one_worker"
    generate(**ARGUMENTS, out=out, workers=1)
    return out


def start(out: Path, hash_seed: int) -> subprocess.Popen[str]:
    flags = [f"--{key}={value}" for key, value in (ARGUMENTS | {"out": out, "workers": 2}).items()]
    return subprocess.Popen(
        [sys.executable, "-m", "data_pipelines.generate", *flags],
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that Ctrl-C can be sent to all its processes, as a shell does
    )


def wait_for_episodes(program: subprocess.Popen[str], out: Path, count: int) -> None:
    while len(list(out.glob(".episodes/*/[0-9]*.npz"))) < count:
        assert program.poll() is None, "it ended before it was interrupted"
        time.sleep(0.01)


def test_two_workers_interrupted_and_killed_write_the_same_bytes_as_one(
    dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "data"
    program = start(out, 1)
    wait_for_episodes(program, out, 1)
    os.killpg(program.pid, signal.SIGINT)
    _, errors = program.communicate()
    assert program.returncode == 130
    assert re.search(r"^interrupted: \d of 6 episodes are kept in .* to continue$", errors, re.M)
    assert "Traceback" not in errors

    program = start(out, 2)
    wait_for_episodes(program, out, 3)
    program.kill()
    program.communicate()
    with pytest.raises(UserError, match="dataset_info.json"):
        open_dataset(out)  # rejected, because it is not complete

    # What a kill while the dataset is written may leave, and a file that the disk has damaged.
    (out / ".partial-0-generation.json").write_text("{")
    (out / next(dataset.glob("*train*")).name).write_bytes(b"half")
    damaged = sorted(out.glob(".episodes/*/[0-9]*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    program = start(out, 3)
    printed, _ = program.communicate()
    assert f"notice: {damaged} is damaged: the episode is written again\n" in printed
    assert contents(out) == contents(dataset)


def test_the_record_has_the_digests_of_all_files(dataset: Path) -> None:
    digests = json.loads((dataset / RECORD).read_text())["sha256"]
    assert digests == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents(dataset).items()
        if name != RECORD and not name.startswith("statistics-")
    }


def test_a_complete_dataset_that_was_damaged_is_not_complete(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    shutil.copytree(dataset, out)
    shard = next(out.glob("*val*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{shard}: record 1 .* truncated.*delete {out} first"):
        generate(**ARGUMENTS, out=out, workers=1)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"{}", b'{"arguments": 3, "recipe": null}', b"[" * 10**5]
)
def test_a_damaged_record_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(UserError, match=f"{RECORD}: .*expected .* found .*choose another --out"):
        generate(**ARGUMENTS, out=tmp_path, workers=1)
    assert contents(tmp_path) == {RECORD: content}


def test_one_program_in_a_folder_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path, "--out"), pytest.raises(UserError, match="--out=.* held by process"):
        generate(**ARGUMENTS, out=tmp_path, workers=1)


def test_a_second_call_does_nothing(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.iterdir()}
    generate(**ARGUMENTS, out=dataset, workers=7)
    assert {path: path.stat().st_mtime_ns for path in dataset.iterdir()} == before
    assert "is complete: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"seed": 6}, "seed: expected 6 of this command, found 5; choose another --out, or delete"),
        ({"episodes": 4}, "episodes: expected 4 of this command, found 3"),
        ({"tasks": "ml5"}, "found coffee-button-v3,handle-press-v3; choose"),
        ({"tasks": "reach-v2"}, "no task 'reach-v2' in metaworld: did you mean 'reach-v3'?"),
        ({"episodes": 1}, "--episodes: expected at least 2"),
        ({"episodes": 10**12}, "at most 1000000, found 1000000000000"),
        ({"workers": 0}, "--workers: expected at least 1, found 0"),
        ({"env": "metawurld"}, "did you mean 'metaworld'?"),
    ],
)
def test_wrong_arguments_are_errors_and_change_nothing(
    dataset: Path, argument: dict[str, Any], message: str
) -> None:
    before = contents(dataset)
    with pytest.raises(UserError, match=re.escape(message)):
        generate(**(ARGUMENTS | {"workers": 1, "out": dataset} | argument))
    assert contents(dataset) == before


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="one with generation.json, found other files"):
        generate(**ARGUMENTS, out=tmp_path, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def read(dataset: Path, split: str) -> list[dict[str, Any]]:
    import tensorflow_datasets as tfds

    decoders = {"steps": {"observation": {"image": {"corner4": tfds.decode.SkipDecoding()}}}}
    episodes = []
    builder = tfds.builder_from_directory(dataset)
    for episode in builder.as_dataset(split=split, decoders=decoders, shuffle_files=False):
        steps = list(episode["steps"].as_numpy_iterator())
        columns = tf.nest.map_structure(lambda *values: np.array(values), *steps)
        metadata = tf.nest.map_structure(lambda value: value.numpy(), episode["episode_metadata"])
        episodes.append(columns | metadata)
    return episodes


def test_the_layout_is_the_one_that_the_pipeline_reads(dataset: Path) -> None:
    opened = open_dataset(dataset)
    assert opened.name == "metaworld"
    assert opened.action_dim == 4 and opened.proprio_dim == 4
    assert opened.image_shapes == {"corner4": (200, 200, 3)}
    assert opened.metadata["action_scale"] == [0.01, 0.01, 0.01, 1.0]
    assert {name: len(split) for name, split in opened.splits.items()} == {
        "train": 4,
        "val": 2,
    }


def test_episodes_replay_in_the_simulator(dataset: Path) -> None:
    env = envs.make("metaworld", render=False)
    with EnvPool("metaworld", 1, 1) as pool:
        job = envs.Job("handle-press-v3", 1, 0)
        image = pool.reset([0], [job])["images"]["corner4"][0]
    episodes = read(dataset, "train") + read(dataset, "val")
    assert {(episode["task"], episode["episode"]) for episode in episodes} == {
        (task.encode(), index) for task in TASKS.split(",") for index in range(3)
    }
    for episode in episodes:
        task = episode["task"].decode()
        length = len(episode["action"])
        assert episode["success"] and episode["configuration"] == episode["episode"]
        assert episode["is_first"].tolist() == [True] + [False] * (length - 1)
        assert episode["is_last"].tolist() == [False] * (length - 1) + [True]
        assert episode["is_terminal"].tolist() == episode["is_last"].tolist()
        assert episode["discount"].tolist() == [1.0] * (length - 1) + [0.0]
        sentence = envs.instructions("metaworld")[task].encode()
        assert set(episode["language_instruction"]) == {sentence}
        observation = env.reset(task, int(episode["configuration"]), int(episode["seed"]))
        if (task, episode["configuration"]) == job[:2]:
            # The bytes are those that the worker encoded; they are not decoded and encoded again.
            jpeg = recording._jpeg(image)
            assert episode["observation"]["image"]["corner4"][0] == jpeg
        successes = []
        for step in range(length):
            np.testing.assert_array_equal(
                episode["observation"]["proprio"][step], observation["proprio"]
            )
            np.testing.assert_array_equal(episode["action"][step], env.expert_action())
            observation, reward, success = env.step(episode["executed_action"][step])
            assert np.float32(reward) == episode["reward"][step]
            successes.append(success)
        assert successes.index(True) == length - 1 - recording.HOLD_STEPS
        noise = (episode["executed_action"] - episode["action"])[abs(episode["action"]) < 0.5]
        assert 0.05 < noise.std() < 0.15


def test_an_episode_that_never_succeeded_is_reported_and_omitted(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The files of an interrupted run whose first episode failed in every attempt.
    task = "handle-press-v3"
    record = json.loads((dataset / "generation.json").read_text())
    del record["results"]
    record["arguments"]["tasks"] = [task]
    out = tmp_path / "data"
    cache = out / ".episodes" / task
    cache.mkdir(parents=True)
    (out / "generation.json").write_text(json.dumps(record))
    worker = Worker(
        "data_pipelines.writing.recording:serve", env="metaworld", seed=ARGUMENTS["seed"]
    )
    worker.send((task, 0, str(cache / "000000.npz")))
    worker.receive("a test")
    worker.close()
    arrays = recording.load(cache / "000000.npz")
    attempts = recording.MAX_ATTEMPTS
    assert arrays["success"] and arrays["attempts"] == 1
    failed = {"success": np.bool_(False), "attempts": np.int64(attempts)}
    recording.save(cache / "000000.npz", arrays | failed)
    results = generate(**(ARGUMENTS | {"tasks": task}), out=out, workers=1)["results"]
    assert results["failed"] == ["handle-press-v3, episode 0"]
    assert results["episodes"] == 2 and results["attempts"] == attempts + 2
    printed = capsys.readouterr().out
    assert f"omitted, no success in {attempts} attempts: handle-press-v3, episode 0" in printed


@settings(deadline=None)  # an environment is imported when it is first named
@given(st.sampled_from(sorted(envs.ENVS)), st.integers(2, 3000))
def test_held_out_configurations_are_in_no_training_episode(env: str, episodes: int) -> None:
    number = len(envs.splits(env)["train"])
    val = {i % number for i in range(episodes) if is_val(i, episodes)}
    train = {i % number for i in range(episodes) if not is_val(i, episodes)}
    assert val and train and not val & train


@given(st.integers(0, 2**31), st.integers(0, 10**6), st.integers(0, 9))
def test_each_attempt_has_a_seed_of_its_own(seed: int, episode: int, attempt: int) -> None:
    attempt_seed = recording.attempt_seed(seed, "reach-v3", episode, attempt)
    assert 0 <= attempt_seed < 2**63
    others = {
        recording.attempt_seed(seed + 1, "reach-v3", episode, attempt),
        recording.attempt_seed(seed, "push-v3", episode, attempt),
        recording.attempt_seed(seed, "reach-v3", episode + 1, attempt),
        recording.attempt_seed(seed, "reach-v3", episode, attempt + 1),
    }
    assert attempt_seed not in others and len(others) == 4


def test_a_process_with_tensorflow_cannot_render() -> None:
    assert "tensorflow" in sys.modules
    with pytest.raises(UserError, match="imported TensorFlow .*EnvPool"):
        envs.make("metaworld").reset("reach-v3", 0, 0)
