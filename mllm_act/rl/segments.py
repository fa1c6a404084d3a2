"""What a rollout brings home: segments of episodes, and the blocks of equal shape that the update reads.

A segment is the consecutive steps of one episode that share a memory, at most ``context`` of them. An episode that is
longer goes on in the next segment with an empty memory, in the rollout as in the update, so that both compute the same
policy. Steps from before the rollout are there for later ones to see; their own actions were learned from already.

Segments differ in length by much: an episode that succeeds at once has few steps. Blocks have one of a few lengths, and
the shorter ones have more rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mllm_act.batch import Observation
from mllm_act.envs.base import EnvObservation
from mllm_act.policy.prompt import pad

NO_CELL = -1
SHORTER = 4  # each length of blocks is this part of the one before
LONG = 8  # steps; blocks that are not longer have no shorter ones beside them


@dataclasses.dataclass
class Segment:
    """Steps of one episode; see above. All lists have an entry per observation.

    Attributes:
      prompt: its token ids.
      observations: what was seen.
      tokens: of the action; None where no action of this rollout follows.
      cells: index into the flattened ``Grid`` of the action that follows, or ``NO_CELL``.
      values_of: index of the action whose *next* value this observation's is, where it is asked for, or ``NO_CELL``.
    """

    prompt: list[int]
    observations: list[EnvObservation] = dataclasses.field(default_factory=list)
    tokens: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    cells: list[int] = dataclasses.field(default_factory=list)
    values_of: list[int] = dataclasses.field(default_factory=list)

    def see(self, observation: EnvObservation) -> None:
        """Appends an observation."""
        self.observations.append(observation)
        self.tokens.append(None)
        self.cells.append(NO_CELL)
        self.values_of.append(NO_CELL)

    def past(self, count: int) -> "Segment":
        """Returns the first ``count`` observations as the beginning of the next rollout's segment."""
        segment = Segment(self.prompt)
        for observation in self.observations[:count]:
            segment.see(observation)
        return segment

    @property
    def counts(self) -> bool:
        """Whether anything of it is asked for."""
        return any(cell >= 0 for cell in (*self.cells, *self.values_of))


@dataclasses.dataclass
class Grid:
    """One number for each of S steps in E simulators.

    Attributes:
      rewards: of the step.
      log_probs: of its action, as the rollout computed it.
      exists: whether it is learned from; not where an episode was lost.
      last: whether it is the last of its episode or of the rollout.
      over: whether it is the last of its episode.
    """

    rewards: Float[np.ndarray, "S E"]
    log_probs: Float[np.ndarray, "S E"]
    exists: Bool[np.ndarray, "S E"]
    last: Bool[np.ndarray, "S E"]
    over: Bool[np.ndarray, "S E"]

    @classmethod
    def empty(cls, steps: int, simulators: int) -> "Grid":
        """Returns a grid of zeros."""
        numbers = (np.zeros((steps, simulators), np.float32) for _ in range(2))
        flags = (np.zeros((steps, simulators), bool) for _ in range(3))
        return cls(*numbers, *flags)


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of equal length for one pass of the network: arrays [R, T, ...]."""

    observation: Observation
    tokens: np.ndarray
    cells: Int[np.ndarray, "R T"]
    values_of: Int[np.ndarray, "R T"]


def lengths(context: int) -> list[int]:
    """Returns the lengths of blocks, the shortest first."""
    found = [context]
    while found[-1] > LONG:
        found.append(-(-found[-1] // SHORTER))
    return sorted(found)


def minibatches(
    segments: Sequence[Segment],
    count: int,
    rng: np.random.Generator,
    context: int,
    steps: int,
    shards: int,
    prompt_tokens: int,
    no_action: np.ndarray,
) -> list[list[Block]]:
    """Deals whole segments at random to minibatches, and packs those of each into blocks.

    Args:
      segments: of the rollout.
      count: the minibatches; they differ by one segment at most.
      rng: decides.
      context: T at most.
      steps: how many steps a block should have, padding included.
      shards: rows are a multiple of it.
      prompt_tokens: N.
      no_action: the tokens of any action, for where there is none.
    """
    order = rng.permutation(len(segments))
    dealt = []
    for part in np.array_split(order, count):
        chosen = [segments[i] for i in part]
        blocks = []
        shorter = 0
        for length in lengths(context):
            fitting = [s for s in chosen if shorter < len(s.cells) <= length]
            shorter = length
            rows = shards * max(1, -(-steps // (length * shards)))
            for first in range(0, len(fitting), rows):
                some = fitting[first : first + rows]
                blocks.append(_block(some, rows, length, prompt_tokens, no_action))
        if blocks:
            dealt.append(blocks)
    return dealt


def _block(
    segments: Sequence[Segment],
    rows: int,
    length: int,
    prompt_tokens: int,
    no_action: np.ndarray,
) -> Block:
    first = segments[0].observations[0]
    images = {
        camera: np.zeros((rows, length, *image.shape), np.uint8)
        for camera, image in sorted(first["images"].items())
    }
    proprio = np.zeros((rows, length, len(first["proprio"])), np.float32)
    prompt = np.zeros((rows, prompt_tokens), np.int32)
    prompt_mask, mask = np.zeros((rows, prompt_tokens), bool), np.zeros((rows, length), bool)
    tokens = np.tile(no_action, (rows, length, *[1] * no_action.ndim))
    cells, values_of = (np.full((rows, length), NO_CELL) for _ in range(2))
    # Rows without a segment have a prompt, too: attention to nothing is NaN.
    prompt[:], prompt_mask[:] = _padded(segments[0].prompt, prompt_tokens)
    for row, segment in enumerate(segments):
        n = len(segment.cells)
        for t, seen in enumerate(segment.observations):
            for camera, image in images.items():
                image[row, t] = seen["images"][camera]
            proprio[row, t] = seen["proprio"]
            if segment.tokens[t] is not None:
                tokens[row, t] = segment.tokens[t]
        mask[row, :n] = True
        prompt[row], prompt_mask[row] = _padded(segment.prompt, prompt_tokens)
        cells[row, :n], values_of[row, :n] = segment.cells, segment.values_of
    arrays: Any = (images, proprio, mask, prompt, prompt_mask)
    return Block(Observation(*arrays), tokens, cells, values_of)


def _padded(prompt: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = pad([prompt], length)
    return ids[0], mask[0]
