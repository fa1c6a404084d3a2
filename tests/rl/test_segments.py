"""Segments, and the blocks that they are packed into: every action once, in one place."""

import numpy as np

from mllm_act.envs.base import EnvObservation
from mllm_act.rl.episodes import Player
from mllm_act.rl.segments import NO_CELL, Segment, lengths, minibatches


def observation(number: int) -> EnvObservation:
    image = np.full((2, 2, 3), number % 256, np.uint8)
    return {
        "images": {"front": image}, "proprio": np.array([number], np.float32), "instruction": np.array("go"),
    }  # fmt: skip


def segment(first: int, steps: int) -> Segment:
    result = Segment([3, 4, 5])
    for i in range(steps):
        result.see(observation(first + i))
        result.cells[-1], result.tokens[-1] = first + i, np.array([first + i])
    return result


def test_blocks_hold_every_action_once() -> None:
    sizes = [32, 1, 8, 9, 3, 20, 2, 2, 17, 5, 31]
    starts = np.cumsum([0, *sizes])[:-1]
    segments = [segment(int(first), size) for first, size in zip(starts, sizes, strict=True)]
    assert lengths(32) == [8, 32] and lengths(5) == [5]
    dealt = minibatches(
        segments, 4, np.random.default_rng(0), context=32, steps=40, shards=2, prompt_tokens=4,
        no_action=np.array([-7]),
    )  # fmt: skip
    assert len(dealt) == 4
    cells = []
    for block in (block for blocks in dealt for block in blocks):
        rows, length = block.cells.shape
        assert (rows, length) in ((6, 8), (2, 32))
        acted = block.cells != NO_CELL
        np.testing.assert_array_equal(block.tokens[acted][:, 0], block.cells[acted])
        assert (block.tokens[~acted] == -7).all()
        np.testing.assert_array_equal(block.observation.mask, acted)
        np.testing.assert_array_equal(block.observation.proprio[acted][:, 0], block.cells[acted])
        # Rows without steps have a prompt as well: FiLM's attention to nothing would be NaN.
        assert (block.observation.prompt == [3, 4, 5, 0]).all()
        assert (block.observation.prompt_mask == [True, True, True, False]).all()
        cells += block.cells[acted].tolist()
    assert sorted(cells) == list(range(sum(sizes)))


def test_an_episode_longer_than_the_context_begins_again_with_an_empty_memory() -> None:
    player = Player(0, Segment([1]))
    player.segment.see(observation(0))
    full = [player.see(observation(i), context=3) for i in range(1, 4)]
    assert full[:2] == [None, None] and full[2] is not None and len(full[2].cells) == 3
    assert len(player.segment.cells) == 1 and player.segment.prompt is full[2].prompt


def test_the_past_is_seen_and_not_learned_from_again() -> None:
    before = segment(10, 3)
    after = before.past(3)
    assert after.cells == [NO_CELL] * 3 and not after.counts
    assert [o["proprio"][0] for o in after.observations] == [10, 11, 12]
