"""Offline evaluation: the figures of recorded episodes, against arithmetic and against the trainer's own."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.mapping import DataMapping, Part
from data_pipelines.reading.rlds import open_dataset
from mllm_act import evaluate, evaluate_data, open_loop, train
from mllm_act.config import load_config
from mllm_act.errors import UserError
from mllm_act.open_loop import Acted
from mllm_act.policy import Policy
from tests.data_pipelines import tiny_rlds

ROOT = Path(__file__).parent.parent
COLUMNS = [("x", "m", 0.01), ("gripper", "", 1.0)]
USUAL = np.array([5.0, 0.5])


def acted(true: list, predicted: list, position: list[int]) -> Acted:
    arrays = (np.array(x, np.float32) for x in (true, predicted))
    return Acted(0, "file: record 0", "task", "do it", *arrays, np.array(position))


EPISODES = [
    acted([[1, 0], [3, 0], [6, 0]], [[2, 0], [3, 0], [4, 0]], [0, 1, 0]),
    acted([[10, 0]], [[10, 0]], [0]),
]


def test_errors_are_in_physical_units_beside_those_of_simple_policies() -> None:
    x, gripper = open_loop.dimension_rows(EPISODES, COLUMNS, USUAL, False)
    assert x == {
        "dimension": "x",
        "unit": "m",
        "error": pytest.approx(0.01 * (1 + 0 + 2 + 0) / 4),
        "error_mean_action": pytest.approx(0.01 * (4 + 2 + 1 + 5) / 4),
        "error_repeat_last": pytest.approx(0.01 * (4 + 2 + 3 + 5) / 4),  # first steps: the mean
        "r2": pytest.approx(1 - 5 / 46),
    }
    assert (gripper["error"], gripper["error_mean_action"], gripper["r2"]) == (0, 0.5, None)
    assert "-" in open_loop.table([x, gripper]).splitlines()[-1]
    assert open_loop.episode_row(EPISODES[0], COLUMNS, False)["error_x_m"] == pytest.approx(0.01)


def test_the_horizon_compares_with_the_last_action_before_the_chunk() -> None:
    first, second = open_loop.horizon_rows(EPISODES, COLUMNS, USUAL)
    assert (first["position"], first["steps"], second["position"], second["steps"]) == (0, 3, 1, 1)
    assert first["error_x_m"] == pytest.approx(0.01 * (1 + 2 + 0) / 3)
    assert first["error_repeat_last_x_m"] == pytest.approx(0.01 * (4 + 3 + 5) / 3)
    assert second["error_repeat_last_x_m"] == pytest.approx(0.01 * 2)  # 5, before the episode


def test_discrete_actions_are_wrong_or_right() -> None:
    episodes = [acted([[2], [2], [0]], [[2], [1], [0]], [0, 0, 0])]
    usual = open_loop.most_frequent(episodes)
    [row] = open_loop.dimension_rows(episodes, [("action", "index", 1.0)], usual, True)
    assert usual == [2] and row == {
        "dimension": "action",
        "wrong_actions": pytest.approx(1 / 3),
        "wrong_most_frequent": pytest.approx(1 / 3),
        "wrong_repeat_last": pytest.approx(1 / 3),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three held-out episodes, of more and of fewer steps than the context."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    lengths = iter(enumerate((5, 4, 6, 1, 3)))
    made = [tiny_rlds.episode(index, length) for index, length in lengths]
    return tiny_rlds.write(folder, {"train": [made[:2]], "val": [made[2:]]})


def trained(data: Path, workdir: Path, context: int, chunk: int, steps: int) -> Path:
    config = load_config(str(ROOT / "configs/policy/metaworld.py:regression"))
    config.data.directory, config.data.batch_size, config.data.context = str(data), 2, context
    config.steps, config.validate_every, config.chunk, config.fit = steps, 2, chunk, "crop"
    train.main(config, workdir)
    return workdir


def run(monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, options)])
    evaluate.main()


@pytest.fixture(scope="module")
def workdir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that sees one step, so that every held-out step is the newest of a validation window."""
    return trained(data, tmp_path_factory.mktemp("run"), context=1, chunk=1, steps=2)


@pytest.mark.slow
def test_the_trainers_validation_figures_agree(
    data: Path,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, f"--checkpoint={workdir}", f"--data={data}", "--envs=2")
    assert evaluate_data.NOTE in capsys.readouterr().out
    out = workdir / "offline" / "tiny" / "val"
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["episodes"], summary["steps"], summary["horizon"]) == (3, 10, [])
    logged = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    for row in summary["dimensions"]:
        validation = logged[f"val/error_{row['dimension']}_{row['unit']}"]
        assert row["error"] == pytest.approx(validation, rel=1e-4)
    with (out / "episodes.csv").open() as file:
        assert [int(row["steps"]) for row in csv.DictReader(file)] == [6, 1, 3]
    plots = {f"episodes/{number:05d}.png" for number in range(3)}
    assert set(summary["files"]) == plots | {"dimensions.csv", "episodes.csv", "summary.json"}

    options = (f"--checkpoint={workdir}", f"--data={data}")
    run(monkeypatch, *options, "--episodes=1")  # replaces what is there
    assert json.loads((out / "summary.json").read_text())["episodes"] == 1
    for wrong, message in (
        ("--env=metaworld", "--env, --data: expected a simulator or recorded episodes, found both"),
        ("--tasks=all", "--tasks: expected it only with a simulator"),
        ("--episodes=0", "--episodes: expected at least 1, found 0"),
        ("--split=", "--split: expected a value, found an empty one; leave the option out"),
        ("--split=test", "expected a split of the dataset, found 'test'"),
        ("--embodiment=other", "embodiment: expected one of tiny"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *options, wrong)
    with pytest.raises(UserError, match="--mapping: expected it only with --data"):
        run(monkeypatch, options[0], "--mapping=bridge")


@pytest.mark.slow
def test_a_policy_with_chunks_acts_on_episodes_as_alone(data: Path, tmp_path: Path) -> None:
    """History, chunks and slots: an episode's actions do not depend on the others in the batch."""
    workdir = trained(data, tmp_path / "run", context=2, chunk=2, steps=0)
    policy = Policy.load(workdir)
    recordings = evaluate_data.open_recordings(policy, str(data), None, "val", None)
    together = {acted.number: acted for acted in evaluate_data.act(recordings, 2)}
    for alone in evaluate_data.act(recordings, 1):
        same = together[alone.number]
        np.testing.assert_allclose(same.predicted, alone.predicted, atol=1e-5)
        assert same.position.tolist() == [step % 2 for step in range(len(same.true))]
    (tmp_path / "out").mkdir()
    summary, _ = evaluate_data.evaluate(recordings, 3, tmp_path / "out")
    assert [row["steps"] for row in summary["horizon"]] == [6, 4]
    assert (tmp_path / "out" / "horizon.csv").is_file()


@pytest.mark.slow
def test_data_that_does_not_fit_is_refused_with_all_that_differs(
    workdir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy.load(workdir)
    other = tiny_rlds.write_lengths(tmp_path / "other", [[3]], action_dim=2)
    with pytest.raises(UserError, match="name: expected 'tiny', found 'tiny2'; action_names"):
        evaluate_data.open_recordings(policy, str(other), None, "val", None)

    # A mapping that is kept as values, as of a checkpoint trained with it.
    mapping = DataMapping(
        name="tiny",
        cameras={"front": "observation/image/corner4", "corner4": "observation/image/corner4"},
        action=(
            Part("action", ("dx", "dy", "dz"), "m", 0.01),
            Part("action", ("gripper",), "effort", start=3),
        ),
        proprio=(Part("observation/proprio", ("a", "b", "c")),),
        instruction=("language_instruction",),
        digest="of a file",
    )
    fingerprint = open_dataset(data, mapping).split("train").fingerprint
    kept = json.loads(json.dumps({"dataset": {"tiny": mapping.metadata()}}))
    policy.meta = {**policy.meta, **kept}
    policy.meta["statistics"]["tiny"]["fingerprint"] = fingerprint
    opened = evaluate_data.open_recordings(policy, str(data), None, "val", None)
    assert opened.dataset.split("train").fingerprint == fingerprint
    assert capsys.readouterr().out == ""
    policy.meta["dataset"]["tiny"]["mapping"]["step"] = True
    with pytest.raises(UserError, match="--mapping: expected the file of the mapping of tiny"):
        evaluate_data.open_recordings(policy, str(data), None, "val", None)
    relabelled = dataclasses.replace(mapping, step=lambda numbers: {"action": numbers["action"]})
    evaluate_data.open_recordings(policy, str(data), relabelled, "val", None)


@pytest.mark.slow
def test_a_split_held_out_from_other_data_is_noticed(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy.load(workdir)
    episodes = [tiny_rlds.episode(index, 2) for index in range(3)]
    data = tiny_rlds.write(tmp_path / "data", {"train": [episodes]})
    evaluate_data.open_recordings(policy, str(data), None, "val", None)
    assert "val was held out from other episodes than those" in capsys.readouterr().out
