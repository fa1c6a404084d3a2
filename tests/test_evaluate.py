"""Evaluation: what an episode's random draws depend on, which files are replaced, a folder per environment."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks import fuzz
from mllm_act import envs, evaluate, report, train
from mllm_act.adapters.token_filter import choose
from mllm_act.config import load_config
from mllm_act.envs import Job, play
from mllm_act.envs.play import Episode
from mllm_act.envs.results import summarize
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError
from mllm_act.files import locked
from mllm_act.policy import Policy
from tests import fuzzing
from tests.data_pipelines import tiny_rlds

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(envs.ENVS, "tiny", "tests.envs.tiny_env")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained policy."""
    home = tmp_path_factory.mktemp("run")
    config = load_config(str(ROOT / "configs/policy/metaworld.py:uniform"))
    config.data.directory = str(tiny_rlds.write_lengths(home / "data", [[5, 4]]))
    config.steps, config.data.batch_size, config.adapter.bins = 0, 2, 16
    train.main(config, home / "policy")
    return home / "policy"


@pytest.fixture(scope="module")
def policy(workdir: Path) -> Policy:
    return Policy.load(workdir)


def played(policy: Policy, num_envs: int, sample: bool = True, seed: int = 0) -> list[Episode]:
    """The episodes of the split ``test``, with the frames of all."""
    episodes = play.episodes("tiny", "all", "test", seed)
    for episode in episodes:
        episode.frames = []
    with EnvPool("tiny", num_envs, 1) as pool:
        assert len(list(evaluate.rollout(policy, pool, episodes, 8, sample))) == len(episodes) == 6
    return episodes


def frames(episodes: list[Episode]) -> list[list[list[int]]]:
    return [np.array(episode.frames).tolist() for episode in episodes]


@pytest.mark.slow
def test_a_sampled_episode_does_not_depend_on_the_pool(policy: Policy) -> None:
    alone = played(policy, 1)
    together = played(policy, 4)
    assert frames(together) == frames(alone)
    assert [e.steps for e in together] == [e.steps for e in alone]
    assert frames(played(policy, 4, sample=False)) != frames(alone)
    assert len({e.steps for e in alone}) > 1  # so that slots take new episodes at other steps


@pytest.mark.slow
def test_with_a_key_per_episode_an_action_does_not_depend_on_the_batch(policy: Policy) -> None:
    rng, n = np.random.default_rng(0), 4
    images = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
    proprio = rng.normal(size=(n, 3)).astype(np.float32)
    keys = evaluate.step_keys([(Job("task-0", configuration, 0), 3) for configuration in range(n)])

    def act(rows: list[int], key: jax.Array) -> np.ndarray:
        action, _ = policy.act(
            {"corner4": images[rows]},
            proprio[rows],
            ["do task 0"] * len(rows),
            np.ones(len(rows), bool),
            policy.start(len(rows)),
            key,
        )
        return action

    together = act([0, 1, 2, 3], keys)
    for row in range(n):
        np.testing.assert_allclose(act([row], keys[row : row + 1])[0], together[row], atol=1e-6)
    assert not np.allclose(act([0], keys[1:2])[0], together[0])
    assert act([0, 1], jax.random.key(0)).shape == (2, 4)
    with pytest.raises(UserError, match="key: expected one, or one for each of 2 episodes"):
        act([0, 1], keys)


def test_keys_differ_between_seeds_tasks_configurations_and_steps() -> None:
    first = Job("left", 1, 0)
    others = [
        (first, 1),
        (first._replace(task="right"), 0),
        (first._replace(configuration=2), 0),
        (first._replace(seed=1), 0),
    ]
    data = jax.random.key_data(evaluate.step_keys([(first, 0), *others, (first, 0)]))
    assert len({tuple(row) for row in data.tolist()}) == 5
    np.testing.assert_array_equal(data[0], data[-1])


def test_a_row_with_its_own_key_draws_what_it_draws_alone() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    allowed = jax.random.bernoulli(jax.random.key(1), 0.6, (5, 7)).at[:, 0].set(True)
    keys = jax.random.split(jax.random.key(2), 5)
    together = choose(logits, allowed, keys)
    for i in range(5):
        row = slice(i, i + 1)
        assert choose(logits[row], allowed[row], keys[row])[0] == together[i]
        assert allowed[i, together[i]]
    masked = jnp.where(allowed, logits, -jnp.inf)
    expected = jax.random.categorical(keys[0], masked)
    np.testing.assert_array_equal(choose(logits, allowed, keys[0]), expected)


@pytest.mark.slow
def test_mutated_documents_of_a_checkpoint(workdir: Path, tmp_path: Path) -> None:
    counts = fuzzing.fuzz(fuzz.checkpoint_meta(workdir), tmp_path, 30)
    assert counts.keys() <= fuzzing.RIGHT, counts
    assert counts["refused"] > 10, counts


def results(folder: Path, *videos: str) -> Path:
    """Writes the results of an evaluation with videos of these tasks."""
    (folder / "videos").mkdir(parents=True)
    for video in videos:
        (folder / "videos" / f"{video}.mp4").write_text(video)
    episodes = [Episode(Job("left", 0, 0), steps=3, success=True)]
    rows = summarize(episodes)
    evaluate.write_results(folder, episodes, rows, {"tasks": rows})
    return folder


def test_an_evaluation_replaces_the_files_of_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".partial-killed").mkdir()
    evaluate.publish(results(tmp_path / "first", "left", "right"), out)
    listed = json.loads((out / "summary.json").read_text())["files"]
    own = ["episodes.csv", "summary.json", "tasks.csv", "videos/left.mp4", "videos/right.mp4"]
    assert listed == own and evaluate.own_files(out) == set(own)
    evaluate.publish(results(tmp_path / "second", "left"), out)
    own.remove("videos/right.mp4")
    assert json.loads((out / "summary.json").read_text())["files"] == own
    assert evaluate.own_files(out) == set(own)


@pytest.mark.parametrize("name", ["notes.txt", "videos/mine.mp4", "other/tasks.csv"])
@pytest.mark.parametrize("evaluated", [False, True])
def test_files_of_others_are_refused_and_kept(tmp_path: Path, name: str, evaluated: bool) -> None:
    out = tmp_path / "out"
    if evaluated:
        results(out, "left")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    for check in (evaluate.own_files, lambda out: evaluate.publish(results(tmp_path / "r"), out)):
        with pytest.raises(UserError, match=f"found {name}; move it, or choose another --out"):
            check(out)
    assert (out / name).read_text() == "mine"


@pytest.mark.parametrize(
    "summary", ['{"tasks": []}', "[]", "nonsense", '{"files": 3}', '{"files": ["x']
)
def test_the_summary_of_another_program_is_refused(tmp_path: Path, summary: str) -> None:
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(UserError, match="found summary.json; move it"):
        evaluate.own_files(tmp_path)
    with pytest.raises(UserError, match="expected a folder"):
        evaluate.own_files(tmp_path / "summary.json")


def test_what_a_summary_lists_elsewhere_is_not_touched(tmp_path: Path) -> None:
    out, precious = results(tmp_path / "out"), tmp_path / "precious"
    precious.write_text("mine")
    summary = json.loads((out / "summary.json").read_text())
    summary["files"] += ["../precious", str(precious)]
    (out / "summary.json").write_text(json.dumps(summary))
    evaluate.publish(results(tmp_path / "second"), out)
    assert precious.read_text() == "mine"


EVALUATE = """
from mllm_act import envs, errors, evaluate

envs.ENVS["tiny"] = "tests.envs.tiny_env"
errors.run(evaluate.main)
"""


def alive(group: int) -> list[str]:
    """The processes of a group, without those that have ended and wait for their parent to look."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stats.append(path.read_text().rpartition(")")[2].split())
    return [state for state, _, of, *_ in stats if of == str(group) and state != "Z"]


@pytest.mark.slow
def test_sigterm_to_all_processes_ends_an_evaluation_with_its_own_status(workdir: Path) -> None:
    options = [f"--checkpoint={workdir}", "--env=tiny", "--tasks=all", "--split=train"]
    program = subprocess.Popen(
        [sys.executable, "-c", EVALUATE, *options],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )
    # Its first child is a simulator that has just begun to start; versions of libraries are read without processes.
    while not Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text():
        assert program.poll() is None
        time.sleep(0.001)
    os.killpg(program.pid, signal.SIGTERM)
    _, errors = program.communicate(timeout=30)
    assert (program.returncode, errors) == (128 + signal.SIGTERM, "interrupted\n")
    deadline = time.monotonic() + 20
    while alive(program.pid):
        assert time.monotonic() < deadline, "a worker outlived its program"
        time.sleep(0.05)
    assert not (workdir / "evaluation" / "tiny" / "train").exists()


@pytest.mark.slow
def test_each_environment_has_its_folder_and_the_report_knows_it(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*options: str) -> None:
        command = ["evaluate", f"--checkpoint={workdir}", "--env=tiny", "--tasks=all", *options]
        monkeypatch.setattr(sys, "argv", command)
        evaluate.main()

    run("--horizon=2", "--workers=1", "--envs=3", "--sample")
    out = workdir / "evaluation" / "tiny" / "test"
    assert iio.imread(out / "videos" / "task-1.mp4").shape == (2, 16, 16, 3)
    (out / ".partial-killed").mkdir()
    run("--horizon=2", "--workers=1", "--no-videos")
    assert {path.name for path in out.rglob("*.*")} == {"episodes.csv", "tasks.csv", "summary.json"}

    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="found notes.txt"):
        run(f"--out={tmp_path}")
    with pytest.raises(UserError, match="--timeout: expected seconds"):
        run("--timeout=0")
    with locked(out, "--out"), pytest.raises(UserError, match=f"--out={out}: .* held by process"):
        run("--horizon=2")

    titles = []
    monkeypatch.setattr(plt, "close", lambda figure: titles.append(figure.axes[0].get_title()))
    assert "task-1" in report.write(tmp_path / "report", {"run": workdir}, "test")
    assert titles[0] == "Success in tiny, split test, 95 % intervals"
    with pytest.raises(UserError, match="expected RUN/evaluation/ENV/train/summary.json"):
        report.write(tmp_path / "other", {"run": workdir}, "train")
    results(workdir / "evaluation" / "toy" / "test")
    with pytest.raises(UserError, match="--env: expected one of tiny, toy"):
        report.write(tmp_path / "other", {"run": workdir}, "test")
    assert not (tmp_path / "other").exists()
    assert "left" in report.write(tmp_path / "report", {"run": workdir}, "test", "toy")
    with pytest.raises(UserError, match=r"babyai/test/summary.json: .* --env=babyai --split=test"):
        report.write(tmp_path / "report", {"run": workdir}, "test", "babyai")
