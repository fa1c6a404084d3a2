"""The order in which training reads windows: a function of the seed and the position, which is found at once.

An epoch takes the episodes in random order, each cut at a random offset. Its windows, one after another, are divided
into blocks. Inside a block, each row of the batch gets an equal run of neighbouring windows, and takes them in random
order. So a batch holds windows of many episodes; any process knows its rows' windows without reading those of others;
and a position is reached by reading one block.

Every random number is a hash of the seed, the epoch and what it is for. Nothing depends on the number of processes, or
on a library's random generator.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt64

from data_pipelines.reading.segments import Segments

WINDOWS_PER_ROW = 8  # of a block, at least, so that a batch mixes episodes
_EPISODES, _OFFSETS, _WINDOWS = range(3)  # what random numbers are for


@dataclasses.dataclass(frozen=True)
class Block:
    """One process's windows of a block.

    Attributes:
      epoch: they are of this epoch.
      episodes: the episodes to read, in this order, int64[e].
      offsets: where each is cut, int32[e].
      skip: windows of the first episode that are not of these rows.
      order: which of the windows after ``skip`` come one after another, int64[w].
    """

    epoch: int
    episodes: Int[np.ndarray, " e"]
    offsets: Int[np.ndarray, " e"]
    skip: int
    order: Int[np.ndarray, " w"]


class Epoch:
    """The windows of one epoch.

    Attributes:
      windows: how many there are.
    """

    def __init__(self, segments: Segments, context: int, seed: int, number: int) -> None:
        """Takes milliseconds for a million episodes."""
        count = len(segments.first)
        self._random = lambda use, index: _hash(seed, number, use, index)
        self._episodes = np.argsort(self._random(_EPISODES, np.arange(count)), kind="stable")
        self._offsets = self._random(_OFFSETS, np.arange(count)) % np.uint64(context)
        self._offsets = self._offsets.astype(np.int32)
        counts = segments.windows(context, self._offsets)
        self._ends = np.cumsum(counts[self._episodes])
        self.number, self.windows = number, int(self._ends[-1])

    def block(
        self, begin: int, end: int, row: int, rows: int, own: tuple[int, int], passed: int
    ) -> Block:
        """Returns the windows ``begin`` to ``end`` of the epoch that belong to some rows.

        Args:
          begin: the first window of the block.
          end: the window after its last.
          row: the row that the block begins in.
          rows: of a batch.
          own: the first of the rows asked for, and the row after the last.
          passed: windows of the block that have been read already, in the order of reading.
        """
        length = end - begin
        counts = (length - (np.arange(rows) - row) % rows + rows - 1) // rows  # of each row
        first = np.concatenate([[0], np.cumsum(counts)])
        low, high = int(first[own[0]]), int(first[own[1]])
        rows_of = np.repeat(np.arange(own[0], own[1]), counts[own[0] : own[1]])
        index = np.arange(low, high)
        shuffled = index[np.lexsort((self._random(_WINDOWS, begin + index), rows_of))]
        position = (rows_of - row) % rows + (index - first[rows_of]) * rows
        order = np.argsort(position, kind="stable")
        order = order[position[order] >= passed]
        if not len(order):
            none = np.zeros(0, np.int64)
            return Block(self.number, none, none.astype(np.int32), 0, none)
        episodes = np.searchsorted(self._ends, [begin + low, begin + high - 1], side="right")
        read = self._episodes[episodes[0] : episodes[1] + 1]
        skip = begin + low - (int(self._ends[episodes[0] - 1]) if episodes[0] else 0)
        return Block(self.number, read, self._offsets[read], skip, shuffled[order] - low)


class Order:
    """The endless sequence of windows of all epochs, of which each batch takes the next ``batch_size``."""

    def __init__(
        self, segments: Segments, context: int, seed: int, batch_size: int, block_windows: int
    ) -> None:
        """Knows the order of ``segments``, cut into windows of ``context`` steps.

        Args:
          segments: of the split.
          context: T.
          seed: of the run.
          batch_size: rows of a batch, over all processes.
          block_windows: the size of a block, over all processes; at least ``WINDOWS_PER_ROW`` of each row.
        """
        self._segments, self._context, self._seed = segments, context, seed
        self._batch_size = batch_size
        self._newest: Epoch | None = None
        self.block_windows = max(block_windows, WINDOWS_PER_ROW * batch_size)

    def epoch(self, number: int) -> Epoch:
        """Returns an epoch."""
        if self._newest is None or self._newest.number != number:
            self._newest = Epoch(self._segments, self._context, self._seed, number)
        return self._newest

    def blocks(self, epoch: int, begins: int, window: int, own: tuple[int, int]) -> Iterator[Block]:
        """Yields the blocks that are left after a position, without end.

        Args:
          epoch: an epoch that has ended at the position, or has begun.
          begins: the number of windows in all epochs before it.
          window: the position, how many windows have been read by all rows; a multiple of the batch size.
          own: the first of the rows to read, and the row after the last.
        """
        while True:
            now = self.epoch(epoch)
            blocks = max(1, round(now.windows / self.block_windows))
            edges = now.windows * np.arange(blocks + 1) // blocks
            for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                if begins + end <= window:
                    continue
                row, passed = (begins + begin) % self._batch_size, max(0, window - begins - begin)
                block = now.block(begin, end, row, self._batch_size, own, passed)
                if len(block.order):
                    yield block
            epoch, begins = epoch + 1, begins + now.windows


class Position:
    """Counts the windows that have been read, and knows the epoch of the last of them."""

    def __init__(self, order: Order, epoch: int = 0, begins: int = 0, window: int = 0) -> None:
        """Starts at ``window``, which lies in ``epoch`` or at its end; that begins at the window ``begins``."""
        self._order, self.epoch, self.begins, self.window = order, epoch, begins, window
        self._windows: int | None = None  # of the epoch

    def advance(self, windows: int) -> None:
        """Counts ``windows`` more."""
        self.window += windows
        while True:
            if self._windows is None:
                self._windows = self._order.epoch(self.epoch).windows
            if self.window <= self.begins + self._windows:
                return
            self.begins, self.epoch = self.begins + self._windows, self.epoch + 1
            self._windows = None


def _hash(
    seed: int, epoch: int, use: int, index: Int[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """Returns random 64-bit numbers: splitmix64 (Steele, Lea and Flood, OOPSLA 2014), once for each word."""
    state = np.zeros_like(index, np.uint64)
    with np.errstate(over="ignore"):
        for word in (
            np.uint64(seed % 2**64),
            np.uint64(epoch),
            np.uint64(use),
            index.astype(np.uint64),
        ):
            state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state
