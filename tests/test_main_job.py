"""The main job at its smallest, all real: experts in MuJoCo, RLDS, tokenizer, policy, roll-out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from data_pipelines.reading import pipeline, rlds
from mllm_act import evaluate, report, train
from mllm_act.action_tokenizer.checkpoint import load_tokenizer, tokenizer_arrays
from mllm_act.checkpoints import checkpoint
from mllm_act.config import load_config
from mllm_act.envs.base import Job
from mllm_act.envs.play import Episode
from mllm_act.envs.results import summarize
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError
from mllm_act.policy import Policy
from tests.checkpoints import documents
from tests.policy.window import decider

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TASKS = ("drawer-close-v3", "handle-press-v3")


def configure(file: str, **overrides: Any) -> Any:
    config = load_config(str(ROOT / "configs" / file))
    for key, value in overrides.items():
        node, _, name = key.rpartition(".")
        (config[node] if node else config)[name] = value
    return config


@pytest.fixture(scope="module")
def home(metaworld: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations, tokenizer and policy, made once; the tests look at what they left."""
    home = tmp_path_factory.mktemp("job")
    for name in ("data", "tokenizer"):
        (home / name).symlink_to(metaworld / name)
    settings = {
        "data.directory": str(home / "data"),
        "data.batch_size": 4,
        "tokenizer": str(home / "tokenizer"),
        "steps": 3,
        "log_every": 1,
        "checkpoint_every": 3,
        "validate_every": 3,
    }
    train.main(configure("policy/metaworld.py:rvq", **settings), home / "policy")
    return home


@pytest.fixture(scope="module")
def policy(home: Path) -> Policy:
    """The policy, loaded and compiled once."""
    return Policy.load(home / "policy")


def test_the_tokenizer_in_the_policy_is_stage_ones_to_the_bit_and_has_no_optimizer_state(
    home: Path,
) -> None:
    tokenizer = load_tokenizer(home / "tokenizer")
    workdir, step = checkpoint.find(home / "policy")
    read = ocp.StandardCheckpointer().restore
    frozen = read(workdir / "frozen" / "arrays")
    expected = tokenizer_arrays(tokenizer.model)
    assert {f"adapters/metaworld/tokenizer/{name}" for name in expected} == frozen.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(
            frozen[f"adapters/metaworld/tokenizer/{name}"], array, err_msg=name
        )
    optimizer = read(workdir / "checkpoints" / str(step) / "optimizer")
    assert not [name for name in optimizer if "tokenizer" in name]
    assert [name for name in optimizer if "adapters/metaworld/head" in name]


def test_a_tokenizer_of_the_other_kind_or_another_environment_is_refused(
    home: Path, tmp_path: Path
) -> None:
    given = {"data.directory": str(home / "data"), "data.batch_size": 4, "steps": 3}
    given["tokenizer"] = str(home / "tokenizer")
    with pytest.raises(
        UserError, match=r"for the adapter 'vq' and chunks of 1 actions, found one for 'rvq'"
    ):
        train.main(configure("policy/metaworld.py:vq", **given), tmp_path / "vq")
    shutil.copytree(home / "tokenizer", tmp_path / "tokenizer")
    documents.edit(tmp_path / "tokenizer", lambda meta: meta["metadata"].update(name="elsewhere"))
    given["tokenizer"] = str(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="name: expected 'metaworld' .* found 'elsewhere'"):
        train.main(configure("policy/metaworld.py:rvq", **given), tmp_path / "rvq")


def test_resuming_with_a_tokenizer_of_other_actions_is_refused(home: Path, tmp_path: Path) -> None:
    """Its normalisation would not be that of the codes in the checkpoint."""
    shutil.copytree(home / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(home / "policy", tmp_path / "policy")

    def widen(meta: dict[str, Any]) -> None:
        meta["statistics"]["action"]["max"][0] = 2.0

    documents.edit(tmp_path / "tokenizer", widen)
    config = configure("policy/metaworld.py:rvq")
    config.update(
        json.loads(next((home / "policy").glob("checkpoints/*/meta/metadata")).read_text())[
            "config"
        ]
    )
    config.tokenizer = str(tmp_path / "tokenizer")
    with pytest.raises(
        UserError, match=r"statistics.metaworld.action.max: expected .* as in the checkpoint"
    ):
        train.main(config, tmp_path / "policy")


def test_acting_on_training_frames_is_what_the_network_makes_of_the_window(
    home: Path, policy: Policy
) -> None:
    """Frame by frame through the policy's memory equals whole windows through the network."""
    dataset = rlds.open_dataset(home / "data")
    length = 4
    [episode, *_] = pipeline.EvalBatches(dataset, "train", batch_size=1, context=length)
    [text] = [text.decode() for text in episode["instruction"]]
    memory = policy.start(batch=1)
    acted = []
    for t in range(length):
        images = {camera: frames[:, t] for camera, frames in episode["images"].items()}
        first = np.array([t == 0])
        action, memory = policy.act(images, episode["proprio"][:, t], [text], first, memory)
        acted.append(action[0])

    decide = decider(policy)
    for t in range(length):
        window = slice(max(0, t + 1 - policy.context), t + 1)
        images = {camera: frames[:, window] for camera, frames in episode["images"].items()}
        expected = decide(text, images, episode["action"][:, window], episode["proprio"][:, t])
        np.testing.assert_allclose(acted[t], expected[0], atol=1e-5)


def test_roll_out_is_the_same_for_the_same_seed_and_writes_its_results(
    policy: Policy, tmp_path: Path
) -> None:
    found = []
    for workers in (1, 2):
        episodes = [Episode(Job(task, c, 0)) for task in TASKS for c in (40, 41)]
        episodes[0].frames = []
        with EnvPool("metaworld", 2, workers) as pool:
            ended = list(evaluate.rollout(policy, pool, episodes, horizon=6))
        assert sorted(e.job for e in ended) == sorted(e.job for e in episodes)
        found.append([(e.job, e.steps, e.success) for e in episodes])
        assert all(e.success or e.steps == 6 for e in episodes)
    assert found[0] == found[1]
    rows = summarize(episodes)
    assert [row["task"] for row in rows] == [*TASKS, "mean"] and rows[-1]["episodes"] == 4
    out, scratch = tmp_path / "run" / "evaluation" / "metaworld" / "test", tmp_path / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    evaluate.write_video(scratch / "videos", episodes[0], 80)
    evaluate.write_results(scratch, episodes, rows, {"tasks": rows})
    evaluate.publish(scratch, out)
    assert [path.name for path in (out / "videos").iterdir()] == [f"{TASKS[0]}.mp4"]
    assert (out / "videos" / f"{TASKS[0]}.mp4").stat().st_size > 1000
    assert len((out / "episodes.csv").read_text().splitlines()) == 5
    assert json.loads((out / "summary.json").read_text())["tasks"] == rows
    text = report.write(tmp_path / "report", {"rvq": tmp_path / "run"}, "test")
    assert TASKS[1] in text and (tmp_path / "report" / "success.png").stat().st_size > 1000


def test_same_actions_in_other_batches(policy: Policy) -> None:
    """What other episodes share the batch does not change an action."""
    rng = np.random.default_rng(0)
    images = {"corner4": rng.integers(0, 256, (4, 200, 200, 3), np.uint8)}
    proprio = rng.normal(size=(4, 4)).astype(np.float32)
    first, texts = np.ones(4, bool), ["Close the drawer."] * 4
    together, _ = policy.act(images, proprio, texts, first, policy.start(4))
    alone, _ = policy.act(
        {"corner4": images["corner4"][2:3]}, proprio[2:3], texts[:1], first[:1], policy.start(1)
    )
    np.testing.assert_allclose(alone[0], together[2], atol=1e-5)


def test_an_instruction_longer_than_any_in_training_is_read_and_changes_no_other(
    home: Path,
) -> None:
    policy = Policy.load(home / "policy")  # of its own: it pads to the longest it has read
    images = {"corner4": np.random.default_rng(0).integers(0, 256, (2, 200, 200, 3), np.uint8)}
    proprio, first = np.zeros((2, 4), np.float32), np.ones(2, bool)
    short, long = "Close the drawer.", "Close the drawer, " + "slowly " * 60
    alone, _ = policy.act(images, proprio, [short, short], first, policy.start(2))
    beside, _ = policy.act(images, proprio, [short, long], first, policy.start(2))
    np.testing.assert_allclose(beside[0], alone[0], atol=1e-5)


def test_an_instruction_that_changes_within_an_episode_is_read_again(policy: Policy) -> None:
    images = {"corner4": np.random.default_rng(0).integers(0, 256, (2, 200, 200, 3), np.uint8)}
    proprio, start = np.zeros((2, 4), np.float32), np.ones(2, bool)
    before, after = "Press the button.", "Close the drawer."
    found = []
    for texts in ([before, after], [after, after]):
        _, memory = policy.act(images, proprio, texts, start, policy.start(2))
        action, _ = policy.act(images, proprio, [after, after], ~start, memory)
        found.append(action)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_wrong_images_are_refused(policy: Policy) -> None:
    for images in (
        {"front": np.zeros((1, 8, 8, 3), np.uint8)},
        {"corner4": np.zeros((1, 8, 8, 3))},
        {"corner4": np.zeros((1, 8, 8, 4), np.uint8)},
        {"corner4": np.zeros((8, 8, 3), np.uint8)},
        {"corner4": np.zeros((2, 8, 8, 3), np.uint8)},
    ):
        with pytest.raises(UserError, match=r"images\['corner4'\]: expected uint8"):
            policy.act(images, np.zeros((1, 4)), [""], np.array([True]), policy.start(1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first": np.array([1])}, r"first: expected bool\[1\]"),
        ({"first": np.array([True, False])}, r"first: expected bool\[1\]"),
        ({"instructions": "x"}, "instructions: expected a list with one sentence per episode"),
        ({"instructions": [3]}, "instructions: expected a list with one sentence per episode"),
        ({"instructions": ["", ""]}, "1 instructions for 1 episodes"),
        ({"proprio": np.full((1, 4), np.nan)}, "proprio: expected finite numbers"),
        ({"proprio": np.zeros((1, 3))}, r"expected proprio\[1, 4\]"),
    ],
)
def test_wrong_inputs_are_refused(policy: Policy, wrong: dict[str, Any], message: str) -> None:
    right = {
        "images": {"corner4": np.zeros((1, 8, 8, 3), np.uint8)},
        "proprio": np.zeros((1, 4), np.float32),
        "instructions": [""],
        "first": np.array([True]),
    }
    with pytest.raises(UserError, match=message):
        policy.act(**(right | wrong), memory=policy.start(1))


def test_a_tokenizers_folder_is_no_policy(home: Path) -> None:
    with pytest.raises(UserError, match="expected a policy's checkpoint .* found no network"):
        Policy.load(home / "tokenizer")
    with pytest.raises(UserError, match="found no whole checkpoint"):
        Policy.load(home / "data")


def test_a_checkpoint_without_what_acting_needs_is_refused(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "policy" / "checkpoints", tmp_path / "checkpoints")
    documents.edit(tmp_path, lambda meta: meta.pop("statistics"))
    with pytest.raises(UserError, match="found no statistics in it"):
        Policy.load(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "policy" / "checkpoints", tmp_path / "checkpoints")

    def age(meta: dict[str, Any]) -> None:
        del meta["network"]["format"]
        meta["provenance"] = {"git_commit": "abc123"}

    documents.edit(tmp_path, age)
    message = r"found format 1, written by mllm_act 0.1.0 \(git checkout abc123\); use that version"
    with pytest.raises(UserError, match=message):
        Policy.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("policy", lambda meta: meta["prompt"]["metaworld"].update(future=1), "future"),
        ("policy", lambda meta: meta["prompt"].clear(), "found another .no 'metaworld'."),
        ("policy", lambda meta: meta.update(network=[]), "found another"),
        ("policy", lambda meta: meta.update(provenance=3, frozen=[]), r"the mark \[\] of"),
        ("tokenizer", lambda meta: meta["tokenizer"].update(future=1), "future"),
        ("tokenizer", lambda meta: meta["tokenizer"].pop("action_dim"), "action_dim"),
        ("tokenizer", lambda meta: meta["statistics"].update(action=3), "statistics"),
    ],
)
def test_a_document_of_a_newer_version_or_a_stranger_is_one_line(
    home: Path, tmp_path: Path, part: str, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    shutil.copytree(home / part, tmp_path / part)
    documents.edit(tmp_path / part, change)
    load = Policy.load if part == "policy" else load_tokenizer
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / part)
    assert "\n" not in str(caught.value)
