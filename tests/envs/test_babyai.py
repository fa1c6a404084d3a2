"""BabyAI in the real simulator: images, instructions and minigrid's bot."""

import contextlib
import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_act import envs
from mllm_act.envs import Env, Job, play
from mllm_act.envs.babyai import babyai, levels
from mllm_act.envs.babyai.expert import Expert
from mllm_act.envs.base import ExpertFailed, choice, metadata
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import UserError

pytestmark = pytest.mark.slow

SPEC = envs.spec("babyai")
FAMILIES = envs.select_tasks("babyai", "all")
LEFT, RIGHT, FORWARD, PICK, DROP, TOGGLE = (np.array([i], np.float32) for i in range(6))
families = st.sampled_from(FAMILIES)
seeds = st.integers(0, 2**63 - 1)


def make(render: bool = False) -> Env:
    return envs.make("babyai", render=render)


def sentence(task: str, configuration: int, seed: int = 0) -> str:
    return str(make().reset(task, configuration, seed)["instruction"])


def demonstrate(env: Env, task: str, configuration: int, seed: int) -> list[int]:
    """The expert's actions until it succeeds."""
    env.reset(task, configuration, seed)
    actions = []
    for _ in range(SPEC.horizon):
        action = env.expert_action()
        actions.append(int(action[0]))
        *_, success = env.step(action)
        if success:
            return actions
    pytest.fail(f"{task}, configuration {configuration}: no success")


def test_observations_are_as_the_spec_says() -> None:
    assert FAMILIES == ("goto", "pickup", "putnext", "pickup-goto", "open")
    assert SPEC.choices == ("left", "right", "forward", "pick", "drop", "toggle")
    for task in FAMILIES:
        observation = make(render=True).reset(task, 0, 0)
        assert tuple(observation["images"]) == SPEC.cameras
        assert observation["images"]["top"].shape == (200, 200, 3)
        assert observation["images"]["top"].dtype == np.uint8
        np.testing.assert_array_equal(observation["proprio"], np.zeros(1, np.float32))
        assert observation["proprio"].dtype == np.float32


def test_only_a_discrete_environments_metadata_has_choices() -> None:
    assert metadata(SPEC)["choices"] == SPEC.choices
    assert "choices" not in metadata(envs.spec("metaworld"))


@settings(max_examples=20, deadline=None)
@given(families, st.integers(0, 1399), seeds)
def test_the_expert_solves_every_episode_with_the_six_actions(
    task: str, configuration: int, seed: int
) -> None:
    actions = demonstrate(make(), task, configuration, seed)
    assert set(actions) <= set(range(6))
    assert len(actions) <= SPEC.horizon


@settings(max_examples=10, deadline=None)
@given(families, st.integers(0, 1399), seeds)
def test_an_episode_depends_on_its_job_and_actions_only(
    task: str, configuration: int, seed: int
) -> None:
    env, blind = make(render=True), make()
    env.reset("goto", 3, 1)
    demonstrate(env, task, configuration, seed + 1)
    observation = env.reset(task, configuration, seed)
    unrendered = blind.reset(task, configuration, seed)
    again = make(render=True).reset(task, configuration, seed)
    assert observation["instruction"] == unrendered["instruction"] == again["instruction"]
    np.testing.assert_array_equal(observation["images"]["top"], again["images"]["top"])
    for _ in range(3):
        action = env.expert_action()
        np.testing.assert_array_equal(action, blind.expert_action())
        rendered, blind_step = env.step(action), blind.step(action)
        assert rendered[1:] == blind_step[1:] and blind_step[0]["images"] == {}
        if rendered[2]:
            break


@pytest.mark.parametrize("task", FAMILIES)
def test_no_demonstration_shows_an_episode_of_the_evaluation(task: str) -> None:
    splits = envs.splits("babyai")
    assert len(splits["train"]) == 1000 and len(splits["test"]) == len(splits["synonyms"]) == 200
    known = [c for name in splits for c in splits[name]]
    assert sorted(known) == list(range(1400))
    # Whatever the seeds of the demonstrations and of the evaluation.
    train = {babyai.layout_seed(task, c, seed) for c in splits["train"] for seed in (0, 1, 2**62)}
    test = {babyai.layout_seed(task, c, seed) for c in splits["test"] for seed in (0, 1, 2**62)}
    assert len(train) == 3000 and len(test) == 600 and not train & test
    env = make(render=True)

    def images(configurations: range) -> set[bytes]:
        return {env.reset(task, c, 0)["images"]["top"].tobytes() for c in configurations}

    train_images, test_images = images(range(0, 60)), images(range(1000, 1030))
    assert len(train_images) == 60 and len(test_images) == 30
    assert not train_images & test_images


@pytest.mark.parametrize("task", FAMILIES)
def test_the_synonyms_are_the_test_episodes_in_other_words(task: str) -> None:
    env, changed = make(render=True), 0
    for test in envs.splits("babyai")["test"][:30]:
        other = test + 200
        plain, reworded = env.reset(task, test, 4), env.reset(task, other, 4)
        np.testing.assert_array_equal(plain["images"]["top"], reworded["images"]["top"])
        said, words = str(plain["instruction"]), str(reworded["instruction"]).split()
        assert not set(words) & set(levels.SYNONYMS)
        back = {synonym: word for word, synonym in levels.SYNONYMS.items()}
        assert " ".join(back.get(word.rstrip(","), word) for word in words) == said.replace(",", "")
        changed += said != str(reworded["instruction"])
    assert changed == 30 or task == "open"  # "open the door" has no word to replace
    assert changed > 8


def test_a_synonym_replaces_whole_words_only() -> None:
    reworded = levels.with_synonyms("pick up a red key, then go to the grey box")
    assert reworded == "pick up a vermilion chair, then go to the silver car"
    assert levels.with_synonyms("open the door") == "open the door"
    assert levels.with_synonyms("a keyring, bluer") == "a keyring, bluer"


PATTERNS = {
    "goto": r"go to (a|the) THING",
    "pickup": r"pick up (a|the) THING",
    "putnext": r"put (a|the) THING next to (a|the) THING",
    "pickup-goto": r"pick up (a|the) THING, then go to (a|the) THING|"
    r"go to (a|the) THING after you pick up (a|the) THING",
    "open": r"open the (\w+ )?door",
}
HELD_OUT = ("yellow box", "red key", "green ball", "red door", "grey door")


@pytest.mark.parametrize("task", FAMILIES)
def test_missions_have_the_wording_of_their_family_and_name_no_held_out_object(task: str) -> None:
    env = make()
    said = {str(env.reset(task, c, 0)["instruction"]) for c in range(300)}
    pattern = PATTERNS[task].replace("THING", r"\w+ (key|ball|box)")
    assert all(re.fullmatch(pattern, mission) for mission in said)
    assert not [mission for mission in said for thing in HELD_OUT if thing in mission]
    things = re.findall(r"(\w+ (?:key|ball|box))", " ".join(said))
    assert task == "open" or len(set(things)) == 15  # 6 colours x 3 kinds, less 3
    if task == "open":
        assert said == {"open the door"} | {
            f"open the {color} door" for color in ("yellow", "green", "blue", "purple")
        }
    if task == "pickup-goto":
        assert 0.3 < np.mean(["after" in mission for mission in said]) < 0.7


@pytest.mark.parametrize("task", FAMILIES)
def test_the_room_has_the_objects_of_the_paper(task: str) -> None:
    level = levels.Level(task, SPEC.horizon)
    for seed in range(20):
        level.start(seed)
        assert level.max_steps == 50
        cells = [cell for cell in level.grid.grid if cell is not None]
        things = [cell for cell in cells if cell.type not in ("wall", "door")]
        doors = [cell for cell in cells if cell.type == "door"]
        assert len(things) == 8 + {"goto": 1, "pickup": 1, "open": 1}.get(task, 2)
        assert len(doors) == (task == "open") and all(door.is_locked for door in doors)
        assert all(("key", door.color) in {(t.type, t.color) for t in things} for door in doors)
        x, y = level.agent_pos
        assert level.left < x < level.left + 7 and 0 < y < 7
        assert level.grid.get(*level.front_pos) is None or (
            level.grid.get(*level.front_pos).type == "wall"
        )


def cell(image: np.ndarray, x: int, y: int) -> np.ndarray:
    return image[25 * y : 25 * y + 25, 25 * x : 25 * x + 25].astype(int)


def test_the_image_is_upright_and_shows_the_agent_at_its_cell() -> None:
    env = make(render=True)
    image = env.reset("goto", 0, 0)["images"]["top"]
    assert (image[2:23, 2:-2] == 100).all() and (image[2:-2, -23:-2] == 100).all()  # walls
    level = env._level
    for action in (RIGHT, RIGHT, FORWARD, FORWARD):
        x, y = level.agent_pos
        agent = cell(image, x, y)
        red = (agent[..., 0] > 200) & (agent[..., 1:] < 60).all(-1)
        assert red.sum() > 100
        # The triangle is wider at its back than at its tip.
        towards = np.array(level.dir_vec)
        rows, columns = np.nonzero(red)
        offset = np.stack([columns, rows], 1).mean(0) - 12
        assert offset @ towards < 0
        if action is FORWARD and level.grid.get(*level.front_pos) is None:
            moved = (x + towards[0], y + towards[1])
        else:
            moved = (x, y)
        observation, _, success = env.step(action)
        assert tuple(level.agent_pos) == moved and not success
        image = observation["images"]["top"]


def test_the_locked_door_is_in_a_wall_of_the_image() -> None:
    env = make(render=True)
    for seed in range(6):
        image = env.reset("open", 1000, seed)["images"]["top"].astype(int)
        walls = [cell(image, x, y) for x in (0, 7) for y in range(1, 7)]
        doors = [wall for wall in walls if np.ptp(wall.mean((0, 1))) > 20]
        assert len(doors) == 1  # the only one with a colour
        assert (abs(image[2:23, 2:-2] - 100) == 0).all()


def test_reward_and_success_come_with_the_end_of_the_mission() -> None:
    env = make()
    actions = demonstrate(env, "putnext", 5, 0)
    env.reset("putnext", 5, 0)
    for number, action in enumerate(actions, 1):
        _, reward, success = env.step(np.array([action]))
        assert success == (number == len(actions))
        assert reward == pytest.approx(success * (1 - 0.9 * number / 50))
    with pytest.raises(RuntimeError, match=f"step {len(actions)} without a reset"):
        env.step(LEFT)


def test_the_expert_takes_over_from_another_policy() -> None:
    # It is first asked after other actions, none of which can make the mission impossible.
    for task in FAMILIES:
        env = make()
        env.reset(task, 7, 0)
        for action in (LEFT, FORWARD, DROP, RIGHT, RIGHT, FORWARD):
            *_, success = env.step(action)
            assert not success
        asked_twice = env.expert_action()
        np.testing.assert_array_equal(env.expert_action(), asked_twice)
        for _ in range(44):
            *_, success = env.step(env.expert_action())
            if success:
                break
        assert success, task


def test_the_expert_gives_up_if_its_box_was_destroyed() -> None:
    for configuration in range(60):
        env = make()
        said = str(env.reset("pickup", configuration, 0)["instruction"])
        if said.endswith("box"):
            break
    # It walks to the box, which is then opened and so disappears.
    while (action := env.expert_action()) != PICK:
        env.step(action)
    env.step(TOGGLE)
    for _ in range(2):
        with pytest.raises(ExpertFailed, match="A box was opened"):
            env.expert_action()
    env.reset("pickup", 3, 0)
    env.expert_action()  # of the next episode


def test_an_expert_that_plans_endlessly_is_stopped() -> None:
    from minigrid.envs.babyai.unlock import UnlockToUnlock

    level = UnlockToUnlock()
    with contextlib.redirect_stdout(io.StringIO()):
        level.reset(seed=4)  # minigrid's bot never returns from this one
    expert, taken = Expert(level, 6), []
    with pytest.raises(ExpertFailed, match="no action after 500 rounds of planning"):
        while len(taken) < 100:
            taken.append(expert.advise(taken))


@given(st.floats(allow_nan=True, allow_infinity=True, width=32))
def test_only_an_index_is_an_action(value: float) -> None:
    if value in range(6):
        assert choice(SPEC, np.array([value]), "here") == value
    else:
        with pytest.raises(UserError, match=r"here: expected the index of an action \(0 left, .*5"):
            choice(SPEC, np.array([value]), "here")


def test_bad_input_is_named() -> None:
    env = make()
    with pytest.raises(UserError, match="did you mean 'goto'"):
        env.reset("go-to", 0, 0)
    with pytest.raises(UserError, match=r"goto: no configuration 1400, expected 0\.\.1399"):
        env.reset("goto", 1400, 0)
    with pytest.raises(RuntimeError, match="step 0 without a reset"):
        env.step(LEFT)
    env.reset("goto", 2, 1)
    with pytest.raises(UserError, match=r"goto, configuration 2, seed 1, step 0: .*found 6; was"):
        env.step(np.array([6]))
    with pytest.raises(UserError, match=r"shape \(1,\), found \(4,\)"):
        env.step(np.zeros(4))
    for _ in range(SPEC.horizon):
        env.step(LEFT)
    with pytest.raises(RuntimeError, match="step 50 without a reset"):
        env.step(LEFT)


def test_a_pool_plays_a_split_with_the_instruction_of_every_episode() -> None:
    episodes = play.episodes("babyai", "goto,open", "synonyms", seed=2)
    assert len(episodes) == 400
    todo = [*episodes[:4], *episodes[200:203]]
    instructions: dict[Job, str] = {}
    with EnvPool("babyai", 3, 2, render=False) as pool:

        def decide(
            playing: dict[int, play.Episode], started: list[int], latest: envs.EnvObservation
        ) -> np.ndarray:
            for slot, episode in playing.items():
                text = latest["instruction"][slot]
                assert isinstance(text, str) and instructions.setdefault(episode.job, text) == text
            return pool.expert_actions(sorted(playing))

        played = list(play.play(pool, todo, SPEC.horizon, decide, "test"))
    assert all(episode.success for episode in played)
    assert instructions == {episode.job: sentence(*episode.job) for episode in todo}
    assert all(set(text.split()) & set(levels.SYNONYMS.values()) for text in
               [instructions[episode.job] for episode in todo[:4]])  # fmt: skip
