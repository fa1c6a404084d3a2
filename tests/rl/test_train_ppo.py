"""The program, in a corridor: it learns, its checkpoints act and resume, and what goes wrong is one line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

from mllm_act import parameters, report, train_ppo
from mllm_act.checkpoints import checkpoint
from mllm_act.config import load_config
from mllm_act.errors import UserError
from mllm_act.policy import Policy
from mllm_act.policy.load import load_network
from mllm_act.rl import evaluation, update
from mllm_act.rl.setup import set_up
from tests.rl import corridor, small

pytestmark = pytest.mark.slow

# Updates of the run that all tests look at, and an earlier checkpoint of it
LEARNED, STOPPED = 10, 8
SETTINGS = {"steps": LEARNED, "checkpoint_every": STOPPED, "ppo__running_scale": True}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small.register(patch)
        yield


@pytest.fixture(scope="module")
def learned(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("ppo")
    train_ppo.main(small.config(**SETTINGS), workdir)
    return workdir


def command(workdir: Path, **settings: Any) -> list[str]:
    """The same run in a process of its own."""
    return [
        sys.executable,
        "-m",
        "tests.rl.in_a_process",
        str(workdir),
        json.dumps(SETTINGS | settings),
    ]


def metrics(workdir: Path) -> list[dict[str, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """All learned arrays of the newest checkpoint, and its simulators."""
    run = set_up(small.config(**SETTINGS))
    like = {item: parameters.flatten(tree) for item, tree in run.state.items()}
    folder, step = checkpoint.find(workdir)
    items = checkpoint.read_items(folder, step, like)
    return {f"{item}/{k}": np.asarray(x) for item, tree in items.items() for k, x in tree.items()}


def test_solves_the_corridor(learned: Path) -> None:
    lines = metrics(learned)
    assert [line["step"] for line in lines] == list(range(1, LEARNED + 1))
    assert lines[0]["rollout/success"] < 0.5 and lines[-1]["rollout/success"] > 0.9
    assert lines[-1]["rollout/length"] < 3  # 2 is the shortest way
    assert lines[0]["train/gap_max"] < 1e-4  # in float32 rollout and update agree
    assert lines[0]["train/entropy"] == pytest.approx(1, abs=0.05)


def test_solves_a_contextual_bandit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRIDOR_GOAL", "1")
    train_ppo.main(small.config(steps=8, env__horizon=1), tmp_path)
    lines = metrics(tmp_path)
    assert lines[0]["rollout/success"] < 0.5 and lines[-1]["rollout/success"] > 0.9
    assert lines[-1]["rollout/length"] == 1


def test_the_checkpoint_is_a_policy(learned: Path) -> None:
    policy = Policy.load(learned)
    assert policy.meta["dataset"]["corridor"]["tasks"] == ["left", "right"]
    envs = [corridor.make(), corridor.make()]
    seen = [env.reset(task, 4, 0) for env, task in zip(envs, ("left", "right"), strict=True)]
    memory, solved = policy.start(2), np.zeros(2, bool)
    for step in range(2):
        images = {"front": np.stack([o["images"]["front"] for o in seen])}
        proprio = np.stack([o["proprio"] for o in seen])
        texts = [str(o["instruction"]) for o in seen]
        action, memory = policy.act(images, proprio, texts, np.full(2, step == 0), memory)
        results = [env.step(a) for env, a in zip(envs, action, strict=True)]
        seen, solved = [r[0] for r in results], np.array([r[2] for r in results])
    assert solved.all()


def test_killed_and_resumed_equals_undisturbed(learned: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    with subprocess.Popen(command(killed, steps=1000), cwd=small.ROOT) as process:
        while (
            not (killed / "checkpoints" / str(STOPPED)).exists() or len(metrics(killed)) <= STOPPED
        ):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    train_ppo.main(small.config(**SETTINGS), killed)
    expected, found = arrays(learned), arrays(killed)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    players = [checkpoint.read_meta(w, LEARNED)["simulators"] for w in (learned, killed)]
    assert players[0] == players[1]
    assert any(actions for _, actions, _ in players[0]), "no episode was running"
    without_time = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in metrics(w)]
        for w in (learned, killed)
    ]
    assert json.dumps(without_time[0]) == json.dumps(without_time[1])


def test_ratios_are_one_bit_for_bit_until_something_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, where rollout and update may disagree."""
    compared = []
    call = update.Learner._call

    def spy(self: Any, state: Any, frozen: Any, block: Any, targets: Any, *rest: Any) -> Any:
        result = call(self, state, frozen, block, targets, *rest)
        exists = np.asarray(targets.exists)
        if exists.any():
            compared.append(np.asarray(result[2])[exists] == np.asarray(targets.log_prob)[exists])
        return result

    monkeypatch.setattr(update.Learner, "_call", spy)
    monkeypatch.setitem(small.presets.PRESETS, "corridor", small.in_bfloat16())
    train_ppo.main(small.config(steps=1, optimizer__learning_rate=0.0), tmp_path)
    (line,) = metrics(tmp_path)
    assert len(compared) >= 4 and all(same.all() for same in compared)
    assert line["train/kl"] == 0 and line["train/clip_share"] == 0


def test_four_devices_learn_what_one_does(learned: Path, tmp_path: Path) -> None:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    sizes = {"steps": 3, "mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
    environment = {**os.environ, "XLA_FLAGS": flags}
    subprocess.run(command(tmp_path, **sizes), cwd=small.ROOT, env=environment, check=True)
    for many, one in zip(metrics(tmp_path)[:3], metrics(learned)[:3], strict=True):
        for name in (n for n in one if n.startswith(("rollout/", "train/"))):
            np.testing.assert_allclose(many[name], one[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_value_head_learns_a_known_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRIDOR_REWARD", "0.7")  # of every step, and none counts but the next
    config = small.config(steps=8, ppo__discount=0.0, ppo__value_coefficient=5.0)
    train_ppo.main(config, tmp_path)
    values = [line["train/value_mean"] for line in metrics(tmp_path)]
    assert values[0] == 0 and values[-1] == pytest.approx(0.7, abs=0.07)


def test_a_worker_that_dies_is_replaced_and_its_episodes_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = tmp_path / "kill"
    kill.touch()
    monkeypatch.setenv("CORRIDOR_KILLS", str(kill))
    train_ppo.main(small.config(steps=2, rollout__workers=4), tmp_path / "run")
    first, second = metrics(tmp_path / "run")
    assert not kill.exists()
    assert first["rollout/lost"] == 4 and second["rollout/lost"] == 0


def test_without_the_filter_most_of_what_is_drawn_is_no_action(tmp_path: Path) -> None:
    config = small.config(steps=1, adapter="semlang", adapter__filter=False)
    train_ppo.main(config, tmp_path)
    (line,) = metrics(tmp_path)
    assert line["rollout/invalid"] > 0.9 and line["rollout/success"] == 0
    assert line["rollout/length"] == corridor.HORIZON  # such a step counts


def test_starts_from_another_run_and_evaluates(learned: Path, tmp_path: Path) -> None:
    train_ppo.main(small.config(steps=0, init=str(learned), evaluate__every=1), tmp_path)
    expected, found = (load_network(w, small.cpu()).arrays for w in (learned, tmp_path))
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)

    (line,) = metrics(tmp_path)
    scores = {name.rpartition("/")[2]: value for name, value in line.items()}
    assert scores == {"step": 0, "success": 1, "return": 1, "length": corridor.GOAL, "episodes": 4}
    assert "| test | 100% (51% to 100%) | 4        |" in evaluation.compare(
        tmp_path / "metrics.jsonl"
    )
    videos = [iio.imread(path) for path in sorted((tmp_path / "videos").iterdir())]
    assert [len(video) for video in videos] == [corridor.GOAL, corridor.GOAL]  # best and worst


def test_the_report_plots_what_was_learned(
    learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", f"--out={tmp_path}", f"corridor={learned}"])
    report.main()
    assert iio.imread(tmp_path / "learning.png").std() > 10


def test_rewards_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRIDOR_REWARD", "nan")
    expected = r"(left|right), configuration \d, seed \d+: expected a finite reward, found nan"
    with pytest.raises(UserError, match=expected):
        train_ppo.main(small.config(steps=1), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"ppo__minibatches": 17}, "config.ppo.minibatches: expected at most 16"),
        ({"rollout__simulators": 15}, "config.rollout.simulators: expected a multiple of 2"),
        ({"env__split": "tset"}, "config.env.split: expected one of train, test"),
        ({"env__tasks": "lefft"}, "did you mean 'left'"),
        ({"env__horizon": 6}, "config.env.horizon: expected 1 to 5"),
        ({"history": "observations_and_actions"}, "config.history: expected observations"),
        ({"prompt_tokens": 1}, "prompt_tokens: expected prompts of at most 1 tokens"),
        ({"ppo__value_loss": "huber"}, "config.ppo.value_loss: expected one of 'none'"),
        ({"adapter": "uniform"}, "discrete actions of corridor"),
    ],
)
def test_wrong_configs_are_one_line(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_up(small.config(**overrides))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("regression", "expected an adapter with a distribution of actions"),
        ("rvq", "pass --config.init=ITS_WORKDIR"),
    ],
)
def test_adapters_that_ppo_cannot_train(adapter: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        set_up(load_config(f"{small.ROOT}/configs/rl/metaworld.py:{adapter}"))
