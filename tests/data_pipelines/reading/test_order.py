"""The order of windows, as arithmetic: complete, shared out, and found from any position."""

import itertools
import json
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.reading.order import Block, Order, Position
from data_pipelines.reading.segments import Segments

EPISODES = st.lists(
    st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=12
)  # the lengths of the segments of each


def order_of(episodes: list[list[int]], context: int, batch_size: int, block: int) -> Order:
    lengths = np.array(list(itertools.chain(*episodes)), np.int32)
    segments = Segments.of_counts(lengths, np.array([len(x) for x in episodes]))
    return Order(segments, context, seed=3, batch_size=batch_size, block_windows=block)


def windows(blocks: list[Block], order: Order) -> list[tuple[int, int, int]]:
    """(epoch, episode, window of the episode) in the order of reading."""
    result = []
    for block in blocks:
        cut = [
            (block.epoch, int(episode), window)
            for episode, offset in zip(block.episodes, block.offsets, strict=True)
            for window in range(_count(order, int(episode), int(offset)))
        ]
        result += [cut[block.skip + i] for i in block.order.tolist()]
    return result


def _count(order: Order, episode: int, offset: int) -> int:
    segments, context = order._segments, order._context
    first = segments.first[episode]
    lengths = segments.length[first : first + segments.count[episode]]
    return sum(
        sum(1 for step in range(n) if step == 0 or (step - offset) % context == 0) for n in lengths
    )


def first_epochs(
    order: Order, rows: tuple[int, int], window: int = 0
) -> list[tuple[int, int, int]]:
    blocks = itertools.takewhile(lambda b: b.epoch < 2, order.blocks(0, 0, window, rows))
    return windows(list(blocks), order)


@settings(max_examples=25, deadline=None)
@given(EPISODES, st.integers(1, 4), st.integers(1, 6), st.integers(1, 40))
def test_every_window_once_an_epoch_whoever_reads_it(
    episodes: list[list[int]], context: int, batch_size: int, block: int
) -> None:
    order = order_of(episodes, context, batch_size, block)
    whole = first_epochs(order, (0, batch_size))
    assert len(whole) == order.epoch(0).windows + order.epoch(1).windows
    assert set(Counter(whole).values()) == {1}
    for processes in range(1, batch_size + 1):
        edges = [batch_size * i // processes for i in range(processes + 1)]
        for rows in itertools.pairwise(edges):
            mine = [w for i, w in enumerate(whole) if rows[0] <= i % batch_size < rows[1]]
            assert first_epochs(order, rows) == mine
    for batch in range(len(whole) // batch_size):
        left = first_epochs(order, (0, batch_size), batch * batch_size)
        assert left == whole[batch * batch_size :]


@settings(max_examples=25, deadline=None)
@given(EPISODES, st.integers(1, 4), st.integers(1, 6))
def test_the_position_knows_its_epoch(
    episodes: list[list[int]], context: int, batch_size: int
) -> None:
    order = order_of(episodes, context, batch_size, 1)
    whole, position = first_epochs(order, (0, batch_size)), Position(order)
    for batch in range(len(whole) // batch_size):
        position.advance(batch_size)
        assert position.epoch == whole[(batch + 1) * batch_size - 1][0]
        again = Position(order, position.epoch, position.begins, position.window)
        left = order.blocks(again.epoch, again.begins, again.window, (0, batch_size))
        expected = whole[position.window :][:1]
        assert windows([next(left)], order)[: len(expected)] == expected


def test_ten_million_windows_are_a_position_like_any_other() -> None:
    """Not a block before it is looked at, and nothing of it is kept."""
    order = order_of([[100]] * 3000, 3, 32, 3000)
    per_epoch = order.epoch(0).windows
    far = 10_000_000 // 32 * 32
    position = Position(order, window=far)
    position.advance(0)
    assert position.epoch == far // per_epoch or abs(position.begins - far) < 2 * per_epoch
    block = next(order.blocks(position.epoch, position.begins, far, (0, 32)))
    assert block.epoch in (position.epoch, position.epoch + 1) and len(block.order) <= 3100
    state = {"epoch": position.epoch, "begins": position.begins, "window": position.window}
    assert len(json.dumps(state)) < 100
