"""Language Rearrangement: the skills, the reward, the expert, and episodes of the generator."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.writing import recording
from mllm_act import envs
from mllm_act.adapters import action_words
from mllm_act.envs.language_rearrangement import goals, instructions, language_rearrangement, rooms
from mllm_act.envs.language_rearrangement.entities import (
    ACTIONS,
    FRIDGE,
    HELD_OUT,
    INDEX,
    OBJECTS,
    OPEN_AIR,
    PLACES,
    RECEPTACLE,
    RECEPTACLES,
    Action,
)
from mllm_act.envs.language_rearrangement.expert import Expert, plan
from mllm_act.envs.language_rearrangement.generator import generate
from mllm_act.envs.language_rearrangement.layout import HANDLES, SIZES, SURFACES, Layout, Pose
from mllm_act.envs.language_rearrangement.world import GRASP, Episode, Task, Thing, World
from mllm_act.errors import UserError
from mllm_act.policy.prompt import train_text_tokenizer

SPEC = envs.spec("language_rearrangement")
SPLITS = envs.splits("language_rearrangement")
RIGHT, SINK, SOFA = RECEPTACLE["right counter"], RECEPTACLE["sink"], RECEPTACLE["sofa"]
LEFT_DRAWER = RECEPTACLE["left drawer"]
ON_SOFA: goals.Goal = {
    "expr_type": "AND", "quantifier": "EXISTS", "inputs": [{"name": "X", "expr_type": "pear"}],
    "sub_exprs": [f"on_top(X, {SOFA})", "not_holding()"],
}  # fmt: skip


def world(
    *things: Thing, goal: goals.Goal = ON_SOFA, subgoals: Sequence[tuple[str, ...]] = ()
) -> Task:
    """A room with these objects, the robot in its middle and far from all."""
    return Task(
        Episode("do it", "test", rooms.room(0), Pose(-9, -9, 0), things, goal, tuple(subgoals))
    )


def on(kind: str, receptacle: str, number: int = 0) -> Thing:
    x, y = rooms.room(0).target(receptacle)
    return Thing(f"{kind}_{number}", kind, receptacle, x, y)


def index(verb: str, target: str) -> np.ndarray:
    return np.array([INDEX[Action(verb, target)]], np.float32)


def solve(task: Task) -> tuple[list[Action], float]:
    """The expert's actions until the goal holds, and their rewards."""
    expert, actions, rewards = Expert(task), [], 0.0
    while not task.solved and len(actions) < SPEC.horizon:
        actions.append(expert.advise())
        rewards += task.step(actions[-1])[0]
        expert.look()
    return actions, rewards


def test_the_actions_are_the_originals_in_its_order() -> None:
    verbs = [action.verb for action in ACTIONS]
    assert len(ACTIONS) == 70 and verbs == (
        ["nav"] * 16
        + ["pick"] * 33
        + ["place"] * 11
        + ["open", "close"]
        + ["open"] * 4
        + ["close"] * 4
    )
    assert [a.target for a in ACTIONS[:16]] == [
        "cab_push_point_7", "cab_push_point_6", "cab_push_point_5", "cab_push_point_4", FRIDGE, *RECEPTACLES,
    ]  # fmt: skip
    assert SPEC.choices[5:9] == ("nav chair", "nav black table", "nav brown table", "nav TV stand")
    assert SPEC.choices[16] == "pick ball" and SPEC.choices[48] == "pick wrench"
    assert len(set(SPEC.choices)) == 70
    # Without the further words, the original's 67.
    assert len({words.removesuffix(" inside") for words in SPEC.choices}) == 67
    assert SPEC.time_limit == "terminal" and envs.spec("metaworld").time_limit == "bootstrap"


def test_adapters_that_write_actions_can_write_all_of_them() -> None:
    tokenizer = train_text_tokenizer(SPEC.choices, 512)
    words = action_words.words(tokenizer, SPEC.choices)
    digits = action_words.digit_sequences(SPEC.choices, words, action_words.digits(tokenizer))
    assert len(set(words)) == len(set(digits)) == 70
    assert [len(sequence) for sequence in digits] == [len(sequence) for sequence in words]


def test_an_action_whose_precondition_fails_changes_nothing() -> None:
    task = world(on("pear", RIGHT), on("plum", SOFA))
    scene = task.world

    def refused(verb: str, target: str) -> bool:
        before = dict(scene.copy().__dict__)
        task.step(Action(verb, target))
        return scene.__dict__ == before

    assert refused("pick", "pear") and refused("place", SOFA) and refused("open", FRIDGE)
    task.step(Action("nav", RIGHT))
    assert refused("pick", "plum")  # out of reach
    assert refused("pick", "apple")  # there is none
    assert refused("place", RIGHT)  # nothing is held
    assert not refused("pick", "pear") and scene.held == "pear_0"
    assert refused("pick", "pear") and refused("place", SOFA)
    assert not refused("place", SINK)  # the neighbour is within 2 m
    assert scene.receptacle["pear_0"] == SINK and scene.held is None
    assert refused("close", "cab_push_point_5") and not refused("open", "cab_push_point_5")
    assert refused("open", "cab_push_point_5") and not refused("close", "cab_push_point_5")


def test_what_is_in_a_closed_drawer_cannot_be_picked_but_what_is_in_a_closed_fridge_can() -> None:
    task = world(on("pear", LEFT_DRAWER), on("plum", RECEPTACLE["fridge"]))
    for action in (Action("nav", LEFT_DRAWER), Action("pick", "pear")):
        task.step(action)
    assert task.world.held is None
    task.step(Action("open", "cab_push_point_7"))
    task.step(Action("pick", "pear"))
    assert task.world.held == "pear_0"
    task.step(Action("close", "cab_push_point_7"))
    task.step(Action("place", LEFT_DRAWER))  # nothing about being open
    assert task.world.receptacle["pear_0"] == LEFT_DRAWER
    task.step(Action("nav", FRIDGE))
    task.step(Action("pick", "plum"))
    assert task.world.held == "plum_0" and FRIDGE not in task.world.opened


def test_reach_ends_at_its_distance_and_angle() -> None:
    task = world(Thing("pear_0", "pear", RIGHT, 0, 0))
    distance, angle = GRASP
    for r, turn, expected in (
        (distance - 0.01, 0.0, True), (distance + 0.01, 0.0, False),
        (0.5, angle - 0.01, True), (0.5, angle + 0.01, False), (0.5, -angle - 0.01, False),
    ):  # fmt: skip
        task.world.robot = Pose(3.0, 2.0, 1.1)
        heading = 1.1 + turn
        task.world.position["pear_0"] = (3 + r * math.cos(heading), 2 + r * math.sin(heading))
        assert task.world.is_valid(Action("pick", "pear")) == expected, (r, turn)


def test_the_nearest_object_of_a_class_is_picked() -> None:
    x, y = rooms.room(0).target(RIGHT)
    robot = rooms.room(0).stand(RIGHT)
    closer = (0.6 * x + 0.4 * robot.x, 0.6 * y + 0.4 * robot.y)
    task = world(on("pear", RIGHT), Thing("pear_1", "pear", RIGHT, *closer))
    task.step(Action("nav", RIGHT))
    task.step(Action("pick", "pear"))
    assert task.world.held == "pear_1"


def test_progress_is_paid_once_and_success_ends_it() -> None:
    subgoals = ((f"robot_at({RIGHT})",), ("holding(pear_0)",), ("holding(pear_0)", f"robot_at({SOFA})"),
                (f"on_top(pear_0, {SOFA})",))  # fmt: skip
    task = world(on("pear", RIGHT), subgoals=subgoals)
    steps = [("nav", RIGHT, 1.25), ("nav", RIGHT, 0), ("pick", "pear", 1.25), ("place", RIGHT, 0),
             ("pick", "pear", 0), ("nav", SOFA, 1.25), ("nav", RIGHT, 0), ("nav", SOFA, 0),
             ("pick", "plum", 0), ("place", SOFA, 11.25)]  # fmt: skip
    for verb, target, reward in steps:
        found, success = task.step(Action(verb, target))
        assert found == pytest.approx(reward) and success == (reward > 10)
    assert task.progress == 1


def test_what_is_true_at_the_start_is_paid_at_the_first_step() -> None:
    task = world(on("pear", RIGHT), subgoals=(("not_holding()",), ("holding(pear_0)",)))
    assert task.step(Action("nav", SOFA)) == (2.5, False)


def test_quantifiers() -> None:
    task = world(on("pear", SOFA), on("pear", RIGHT, 1), on("plum", RIGHT))

    def goal(kind: str, quantifier: str | None, *parts: goals.Goal) -> goals.Goal:
        inputs = [{"name": "X", "expr_type": "pear"}] if quantifier else []
        return {
            "expr_type": kind,
            "quantifier": quantifier,
            "inputs": inputs,
            "sub_exprs": [*parts],
        }

    on_sofa = f"on_top(X, {SOFA})"
    for kind, quantifier, expected in (
        ("AND", "EXISTS", True), ("AND", "FORALL", False), ("NAND", "EXISTS", True), ("NAND", "FORALL", False),
    ):  # fmt: skip
        assert goals.holds(goal(kind, quantifier, on_sofa), task.world) == expected
    both = goal("AND", None, "not_holding()", goal("AND", "EXISTS", on_sofa))
    assert goals.holds(both, task.world)
    assert not goals.holds(goal("NAND", None, both), task.world)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 149_999),
    st.integers(0, 2**31),
    st.sampled_from([task for task in envs.instructions(SPEC.name) if task != "llarp"]),
)
def test_the_expert_solves_every_episode(configuration: int, seed: int, task: str) -> None:
    episode = language_rearrangement.episode(task, configuration, seed)
    trial = Task(episode)
    shortest = plan(trial)
    actions, reward = solve(trial)
    assert trial.solved and len(shortest) <= len(actions) <= 20
    assert 10 <= reward <= 15
    for action in shortest:  # which is what the subgoals are made of
        (again := Task(episode)) if action is shortest[0] else again
        again.step(action)
    assert again.solved


def test_the_expert_acts_on_what_it_could_have_seen() -> None:
    actions, _ = solve(world(on("plum", SOFA), on("pear", RIGHT)))
    visited = [a.target for a in actions if a.verb == "nav"]
    assert visited == [RECEPTACLE[word] for word in OPEN_AIR[:5]] + [SOFA]
    assert actions[5:] == [Action("pick", "pear"), Action("nav", SOFA), Action("place", SOFA)]


def test_the_expert_takes_over_from_any_state() -> None:
    rng = np.random.default_rng(0)
    env = envs.make(SPEC.name, render=False)
    for configuration in range(5):
        env.reset("rearrange", configuration, 5)
        success = False
        for step in range(SPEC.horizon):
            action = [rng.integers(70)] if step < 6 else env.expert_action()
            *_, success = env.step(np.array(action, np.float32))
            if success:
                break
        assert success


def test_a_demonstration_is_the_experts_actions_without_noise() -> None:
    env = envs.make(SPEC.name, render=False)
    env.spec = dataclasses.replace(SPEC, cameras=())  # nothing is drawn here
    arrays, success = recording.attempt_episode(env, "move-from-to", 3, 0)
    assert success and arrays["reward"].sum() == 15
    np.testing.assert_array_equal(arrays["action"], arrays["executed_action"])
    said = [SPEC.choices[int(action)] for action in arrays["action"][:, 0]]
    assert [text.split()[0] for text in said] == ["nav", "pick", "place"]  # two places side by side
    assert all(text.split()[-1] in str(arrays["instruction"]) for text in said)


def test_an_episode_depends_on_its_job_only() -> None:
    first = language_rearrangement.episode("rearrange", 17, 3)
    language_rearrangement.episode("swap", 18, 4)
    rooms.room.cache_clear()
    assert language_rearrangement.episode("rearrange", 17, 3) == first
    assert first.layout == rooms.room(17)
    others = [language_rearrangement.episode("rearrange", *job) for job in ((17, 4), (77, 3))]
    assert all(other.things != first.things for other in others)
    # On any machine and in any process.
    assert (
        first.instruction
        == "Switch the scissors at the left counter with the hammer at the right counter."
    )


def test_rooms_have_space_for_the_robot_and_put_everything_in_its_reach() -> None:
    layouts = [rooms.room(number) for number in range(80)]
    assert len({str(layout) for layout in layouts}) == 80
    for layout in layouts:
        assert set(layout.furniture) == set(SIZES)
        for place in PLACES:
            stand = layout.stand(place)
            assert layout.is_free(stand.x, stand.y, 0.3), (layout, place)
            if place in SURFACES:
                surface = SURFACES[place]
                pose = layout.furniture[surface.furniture]
                for a in (-1, 1):
                    for b in (-1, 1):
                        x, y = stand.local(*pose.point(
                            surface.x + a * surface.half_x, surface.y + b * surface.half_y))  # fmt: skip
                        assert math.hypot(x, y) < GRASP[0] and abs(math.atan2(y, x)) < GRASP[1], (
                            place
                        )
            else:
                assert HANDLES[place][0] in layout.furniture


def test_generated_episodes_hold_out_what_evaluation_asks_for() -> None:
    trained = set(OBJECTS) - set(HELD_OUT)
    seen: set[str] = set()
    for configuration in range(60):
        episode = generate("rearrange", configuration % 60, (0, configuration))
        template = instructions.TEMPLATES[episode.template]
        seen.add(episode.template)
        named = {kind for kind in OBJECTS if f'"{kind}"' in str(episode.goal).replace("'", '"')}
        if episode.template in ("move-from-to", "move-to", "find"):
            assert named and named <= trained
        assert episode.instruction.endswith((".", "?")) and "{" not in episode.instruction
        assert sorted({thing.kind for thing in episode.things}) == sorted(OBJECTS)
        assert len(episode.things) in (33, 34, 35)
        assert {RECEPTACLES[thing.receptacle] for thing in episode.things} <= set(OPEN_AIR)
        assert episode.fridge_open == template.fridge_open
        assert episode.subgoals and not Task(episode).solved
    assert len(seen) > 8


def test_templates_are_drawn_by_their_weights() -> None:
    assert sum(template.weight for template in instructions.TEMPLATES.values()) == 26
    assert len(instructions.TEMPLATES) == 11
    for template in instructions.TEMPLATES.values():
        assert len(set(template.wordings)) == len(template.wordings)


def test_the_splits_are_apart() -> None:
    assert sum(map(len, SPLITS.values())) == len(
        {c for numbers in SPLITS.values() for c in numbers}
    )
    assert len(SPLITS) == 13 and all(len(SPLITS[name]) == 100 for name in list(SPLITS)[2:])
    rooms_of = {
        split: {
            str(language_rearrangement.episode("go-to", c, 0).layout) for c in SPLITS[split][:70]
        }
        for split in ("train", "test")
    }
    assert len(rooms_of["train"]) == 60 and len(rooms_of["test"]) == 20
    assert not rooms_of["train"] & rooms_of["test"]


def test_bad_input_is_named() -> None:
    env = envs.make(SPEC.name, render=False)
    with pytest.raises(
        UserError, match="no task 'swapp' in language_rearrangement: did you mean 'swap'"
    ):
        env.reset("swapp", 0, 0)
    with pytest.raises(UserError, match=r"no configuration 151300, expected 0\.\.151299"):
        env.reset("swap", 151_300, 0)
    with pytest.raises(
        UserError, match="expected rearrange or llarp, the tasks of the official split new_scenes"
    ):
        env.reset("swap", SPLITS["new_scenes"][0], 0)
    with pytest.raises(RuntimeError, match="step 0 without a reset"):
        env.step(index("nav", SOFA))
    env.reset("swap", 1, 0)
    with pytest.raises(UserError, match="step 0: expected the index of an action.*found 70"):
        env.step(np.array([70.0]))
    for _ in range(SPEC.horizon):
        env.step(index("nav", SOFA))
    with pytest.raises(RuntimeError, match="step 32 without a reset"):
        env.step(index("nav", SOFA))


def test_objects_are_placed_apart() -> None:
    kinds = OBJECTS[:9]
    task = world(*(on(kind, SOFA) for kind in kinds))
    for kind in kinds:
        for action in (
            Action("nav", SOFA),
            Action("pick", kind),
            Action("nav", RIGHT),
            Action("place", RIGHT),
        ):
            task.step(action)
    positions = list(task.world.position.values())
    assert set(task.world.receptacle.values()) == {RIGHT}
    assert min(math.dist(a, b) for i, a in enumerate(positions) for b in positions[:i]) > 0.15


def test_a_world_is_copied_whole() -> None:
    task = world(on("pear", RIGHT))
    copy = task.world.copy()
    assert isinstance(copy, World) and copy.__dict__ == task.world.__dict__
    assert isinstance(copy.layout, Layout)
    copy.act(Action("nav", RIGHT))
    copy.act(Action("pick", "pear"))
    assert task.world.held is None and task.world.receptacle["pear_0"] == RIGHT
