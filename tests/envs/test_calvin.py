"""CALVIN: sequences and starts everywhere; the simulator where CALVIN_ENV names a checkout of it."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.robots.calvin import MAPPING
from mllm_act import envs
from mllm_act.envs import Job
from mllm_act.envs.base import metadata
from mllm_act.envs.calvin import sequences, server, starts, tasks
from mllm_act.envs.calvin.calvin import FIRST, SPEC
from mllm_act.envs.calvin.client import Client
from mllm_act.envs.calvin.phrasings import phrasings
from mllm_act.envs.play import Episode
from mllm_act.envs.results import summarize
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError

OFFICIAL = Path(__file__).parents[3] / "shared/data/calvin_sequences.json"
simulated = pytest.mark.skipif(not os.environ.get("CALVIN_ENV"), reason="CALVIN_ENV is not set")


def test_the_sequences_are_drawn_as_the_protocol_says() -> None:
    states, loaded = sequences.initial_states(), sequences.load()
    assert len(loaded) == 1000 and all(sequences.possible(*sequence) for sequence in loaded)
    for number in (0, 100):
        of_state = {names for state, names in loaded if state == states[number]}
        assert set(sequences.draw_of_state(number, states[number], 2)) <= of_state


def test_the_first_tasks_are_the_papers_27() -> None:
    assert {names[0] for _, names in sequences.load()} == set(FIRST) and len(FIRST) == 27
    assert {name for _, names in sequences.load() for name in names} == set(tasks.TASKS)


@pytest.mark.skipif(not OFFICIAL.exists(), reason="needs the sequences of the original program")
def test_the_sequences_are_the_official_ones() -> None:
    official = [(state, tuple(names)) for state, names in json.loads(OFFICIAL.read_text())]
    assert sequences.load() == official


def test_any_is_counted_under_the_task_of_its_configuration() -> None:
    of = [envs.task_of("calvin_static", Job("any", c, 0)) for c in envs.splits("calvin")["test"]]
    assert of == [names[0] for _, names in sequences.load()]
    assert envs.task_of("calvin", Job("any", 3, 0)) == tasks.TASKS[1]  # one task a scene of three
    assert envs.task_of("calvin", Job("open_drawer", 3, 0)) == "open_drawer"
    episodes = [Episode(Job("any", c, 0), 7, c % 2 == 0) for c in range(6)]
    rows = summarize(episodes, task_of=lambda job: envs.task_of("calvin", job))
    assert [(row["task"], row["episodes"]) for row in rows] == [
        (tasks.TASKS[0], 3), (tasks.TASKS[1], 3), ("mean", 6),
    ]  # fmt: skip


def test_the_hash_has_its_published_values() -> None:
    assert sequences.fnv1("test") == 3910690890


def test_a_start_depends_on_its_state_only() -> None:
    state = sequences.load()[0][0]
    np.testing.assert_array_equal(sequences.scene_of(state), sequences.scene_of(dict(state)))
    blocks = sequences.scene_of(state)[6:].reshape(3, 6)
    assert (np.abs(blocks[:, 5] - np.pi / 2) <= np.pi / 8).all()


@given(st.sampled_from(tasks.TASKS), st.integers(0, 2**32))
def test_every_task_gets_starts_in_which_it_is_possible(task: str, seed: int) -> None:
    surfaces: starts.Surfaces = {
        "table": ((0.0, -0.15, 0.46), (0.35, -0.03, 0.46)),
        "slider_left": ((-0.32, 0.05, 0.46), (-0.16, 0.12, 0.46)),
        "slider_right": ((-0.05, 0.05, 0.46), (0.13, 0.12, 0.46)),
    }
    start = starts.drawn(task, "D", surfaces, np.random.default_rng(seed))
    assert tasks.outcomes(start.state, task) and np.isfinite(start.scene_obs).all()
    assert bool(start.carries) == bool(start.state["grasped"])


def test_messages_return_as_they_were_sent() -> None:
    stream = io.BytesIO()
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    server.send(stream, {"success": True, "image": image, "empty": np.zeros((0, 7))})
    stream.seek(0)
    found = server.receive(stream)
    np.testing.assert_array_equal(found.pop("image"), image)
    assert found.pop("empty").shape == (0, 7) and found == {"success": True}
    with pytest.raises(EOFError):
        server.receive(stream)


def test_a_message_holds_numbers_only() -> None:
    stream = io.BytesIO()
    server.send(stream, {"x": np.zeros(1)})
    data = stream.getvalue().replace(b"<f8", b"|O8")
    with pytest.raises(ValueError, match="an array of numbers"):
        server.receive(io.BytesIO(data))


def test_generated_data_has_the_names_of_imported_data() -> None:
    assert SPEC.cameras == tuple(MAPPING.cameras)
    assert SPEC.action_names == tuple(name for part in MAPPING.action for name in part.names)
    assert SPEC.proprio_names == tuple(name for part in MAPPING.proprio for name in part.names)


def test_without_a_checkout_the_error_names_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CALVIN_ENV", raising=False)
    with pytest.raises(UserError, match=r"CALVIN_ENV.*github\.com/mees/calvin_env"):
        envs.make("calvin").reset("any", 100_000, 0)
    monkeypatch.setenv("CALVIN_ENV", str(Path(__file__).parent))
    with pytest.raises(UserError, match="found no conf/config_data_collection.yaml"):
        envs.make("calvin").reset("any", 100_000, 0)


def test_the_official_split_has_its_own_tasks() -> None:
    with pytest.raises(UserError, match="pass --tasks=any"):
        envs.make("calvin").reset("open_drawer", 100_000, 0)
    with pytest.raises(UserError, match="no configuration 102000"):
        envs.make("calvin").reset("any", 102_000, 0)
    with pytest.raises(UserError, match="start with the task any"):
        envs.make("calvin").reset("next", 100_000, 0)


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    with EnvPool("calvin", num_envs=2, num_workers=2) as pool:
        yield pool


@simulated
@pytest.mark.slow
def test_the_same_job_gives_the_same_episode(pool: EnvPool) -> None:
    job, actions = Job("any", 5, 3), np.tile(np.array([0.5, 0.2, -1, 0, 0, 0.3, -0.2]), (2, 1))
    seen = []
    for _ in range(2):
        pool.reset([0, 1], [job, job])
        seen += [pool.step(actions)[0] for _ in range(3)]
    for first, second in zip(seen[:3], seen[3:], strict=True):
        for camera, size in zip(SPEC.cameras, SPEC.image_sizes, strict=True):
            images = first["images"][camera]
            assert images.shape == (2, size, size, 3) and images.std() > 10
            np.testing.assert_array_equal(images[0], images[1])
            np.testing.assert_array_equal(images, second["images"][camera])
        np.testing.assert_array_equal(first["proprio"], second["proprio"])


@simulated
@pytest.mark.slow
def test_the_sign_of_the_gripper_decides_and_the_target_moves(pool: EnvPool) -> None:
    start = pool.reset([0, 1], [Job("any", 100_000, 0)] * 2)
    actions = np.zeros((2, 7))
    actions[:, 0], actions[:, 6] = 1, (0.1, -0.1)
    for _ in range(6):
        after, _, success = pool.step(actions)
    width, x = SPEC.proprio_names.index("gripper_width"), SPEC.proprio_names.index("x")
    assert after["proprio"][0, width] > 0.07 and after["proprio"][1, width] < 0.01
    np.testing.assert_allclose(after["proprio"][:, x] - start["proprio"][:, x], 0.1, atol=0.03)
    assert after["proprio"][:, -1].tolist() == [1, -1] and not success.any()
    assert start["instruction"][0] == tasks.SENTENCES[sequences.load()[0][1][0]]


@simulated
@pytest.mark.slow
def test_a_sequence_goes_on_with_its_next_task(pool: EnvPool) -> None:
    pool.reset([0], [Job("any", 100_001, 0)])
    before, _, _ = pool.step(np.full((1, 7), 0.5), [0])
    after = pool.reset([0], [Job("next", 100_001, 0)])
    assert after["instruction"][0] == tasks.SENTENCES[sequences.load()[1][1][1]]
    np.testing.assert_array_equal(before["proprio"], after["proprio"])
    with pytest.raises(UserError, match="found configuration 100001"):
        pool.reset([0], [Job("next", 100_002, 0)])


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("task", ["open_drawer", "place_in_drawer", "push_red_block_left"])
def test_experts_solve_drawn_starts(task: str) -> None:
    env = envs.make("calvin", render=False)
    first = env.reset(task, 1, 0)
    assert str(first["instruction"]) in phrasings()[task] and first["images"] == {}
    success, steps = False, 0
    while not success:
        _, reward, success = env.step(env.expert_action())
        assert reward == float(success)
        steps += 1
    env.close()
    assert steps < SPEC.horizon / 2


@simulated
def test_the_training_sentences_are_calvins() -> None:
    assert sum(len(set(sentences)) for sentences in phrasings().values()) == 389


def test_missing_sentences_name_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("conf/config_data_collection.yaml", "data/calvin_table_D", "calvin_env", ".git"):
        (tmp_path / "calvin_env" / part).mkdir(parents=True)
    monkeypatch.setenv("CALVIN_ENV", str(tmp_path / "calvin_env"))
    phrasings.cache_clear()
    with pytest.raises(UserError, match=r"new_playtable\.yaml.*github\.com/mees/calvin"):
        phrasings()
    phrasings.cache_clear()


def test_cameras_of_different_sizes_and_one_alone() -> None:
    assert [SPEC.size_of(camera) for camera in SPEC.cameras] == [200, 84]
    alone = envs.spec("calvin_static")
    assert alone.cameras == ("static",) and alone.size_of("static") == 200
    assert "image_sizes" not in metadata(alone) and metadata(SPEC)["image_sizes"] == (200, 84)


@simulated
@pytest.mark.slow
def test_faults_of_the_simulator_are_one_line_each() -> None:
    client = Client(())
    with pytest.raises(UserError, match=r"here: .* the gripper's action is 1 .* found 0.5"):
        client.ask("step", "here", action=np.full(7, 0.5))
    client._process.kill()
    with pytest.raises(UserError, match="here: .* ended with status -9"):
        client.ask("surfaces", "here", scene="A")
    client.close()
