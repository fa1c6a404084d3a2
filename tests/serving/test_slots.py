"""Episodes that do not keep step, acting together as each would alone."""

import numpy as np
import pytest

from mllm_act.errors import UserError
from mllm_act.policy import Policy
from tests.serving.conftest import observation
from tests.serving.server_thread import Loaded


def arrays(rows: list[dict]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    return (
        {"corner4": np.stack([row["observation/corner4"] for row in rows])},
        np.stack([row["observation/state"] for row in rows]),
    )


@pytest.mark.slow
def test_slots_act_as_the_policy_does(policy: Policy, loaded: Loaded) -> None:
    """Two episodes, one of which begins later and changes its instruction; step by step as ``Policy.act``."""
    slots = loaded[0]
    slots.clear()
    one = [observation(i) for i in range(6)]
    two = [observation(10 + i, "do task 1" if i < 2 else "do task 0") for i in range(4)]

    def alone(episode: list[dict]) -> list[np.ndarray]:
        memory, found = policy.start(1), []
        for i, row in enumerate(episode):
            images, proprio = arrays([row])
            action, memory = policy.act(
                images, proprio, [row["prompt"]], np.array([i == 0]), memory
            )
            found.append(action[0])
        return found

    expected, found = {3: alone(one), 5: alone(two)}, {3: [], 5: []}
    before: dict[int, str] = {}
    for i in range(6):
        playing = {3: one[i]} | ({5: two[i - 2]} if i >= 2 else {})
        first = {slot: not found[slot] for slot in playing}
        for slot, row in playing.items():
            if first[slot] or row["prompt"] != before[slot]:
                slots.read(slot, slots.encode(row["prompt"]), again=not first[slot])
        before = {slot: row["prompt"] for slot, row in playing.items()}
        _, actions = slots.act(
            list(playing), *arrays(list(playing.values())), np.array(list(first.values())), np.zeros(len(playing), bool)
        )  # fmt: skip
        for slot, action in zip(playing, actions, strict=True):
            found[slot].append(action)
    for slot in (3, 5):
        np.testing.assert_allclose(found[slot], expected[slot], atol=1e-5)


@pytest.mark.slow
def test_deciding_gives_a_whole_chunk(loaded: Loaded) -> None:
    slots = loaded[0]
    slots.clear()
    slots.read(0, slots.encode("do task 0"), again=False)
    row = arrays([observation(0)])
    chunk, action = slots.act([0], *row, np.array([True]), np.array([True]))
    assert chunk.shape == (1, 4, 4)
    np.testing.assert_array_equal(chunk[:, 0], action)
    # Step by step, the chunk is executed; what is seen does not change it.
    later, second = slots.act([0], *arrays([observation(1)]), np.array([False]), np.array([False]))
    np.testing.assert_array_equal(later, chunk)
    np.testing.assert_array_equal(second, chunk[:, 1])


@pytest.mark.slow
def test_a_chunk_begins_with_the_committed_actions(loaded: Loaded) -> None:
    """Of each episode as many as it has; none gives the plain chunk."""
    slots, rows = loaded[0], [observation(0), observation(0)]
    yes = np.array([True, True])

    def chunks(committed: list[np.ndarray | None]) -> np.ndarray:
        slots.clear()
        for slot in (0, 1):
            slots.read(slot, slots.encode("do task 0"), again=False)
        return slots.act([0, 1], *arrays(rows), yes, yes, None, committed)[0]

    plain = chunks([None, None])
    given = plain[0, :2] * 0.7 + 0.01
    found = chunks([given, None])
    np.testing.assert_array_equal(found[0, :2], given)
    np.testing.assert_array_equal(found[1], plain[1])
    np.testing.assert_array_equal(chunks([plain[0, :2], plain[1, :1]]), plain)


def test_a_long_prompt_is_refused(loaded: Loaded) -> None:
    with pytest.raises(
        UserError, match="prompt: expected .* at most 16 tokens, found .*--prompt-tokens="
    ):
        loaded[0].encode("x y z " * 20)
