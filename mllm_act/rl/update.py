"""PPO's update: several epochs over a rollout's segments, in the same minibatches each time.

Old log-probabilities and values come from a pass of the update itself, before its first step, over the blocks that it
learns from. The rollout decodes with a cache, in other shapes; in 16 bits its log-probabilities differ by several
hundredths of a nat, which is as much as a step of the optimizer changes. The difference is a metric.

That pass is the same compiled program as the gradient's, with the backward pass left out at run time. So the ratio of
an unchanged policy is 1, bit for bit.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mllm_act.batch import Observation
from mllm_act.policy.network import PolicyNetwork
from mllm_act.rl import gae, losses
from mllm_act.rl.returns import ReturnScale
from mllm_act.rl.segments import NO_CELL, Block, Grid, Segment, minibatches
from mllm_act.training import sharding

State = dict[str, Any]  # "trained" and "value" (nnx.State) and "optimizer"
LEARNED = ("trained", "value")


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The numbers of PPO. Defaults are the paper's where it has them (arXiv 2406.07904, appendix), else LLaRP's.

    Attributes:
      epochs: over each rollout.
      minibatches: updates of each epoch.
      discount: gamma.
      decay: lambda of the advantages.
      clip: how far the ratio may go from 1.
      value_loss: one of ``losses.VALUE_LOSSES``.
      value_clip: how far a value may go from the old one, where ``value_loss`` limits it.
      value_coefficient: of the value loss.
      entropy_coefficient: of the entropy, as a share of the highest possible.
      reward_scale: what rewards are multiplied by to learn from, so that values are of the order of 1.
      running_scale: whether they are divided by the standard deviation of returns so far as well; see ``rl.returns``.
      normalize_advantages: over the rollout.
      log_prob: one of ``losses.LOG_PROBS``.
      target_kl: an update ends before a step whose minibatch has diverged by more; None never.
    """

    epochs: int = 2
    minibatches: int = 6
    discount: float = 0.99
    decay: float = 0.95
    clip: float = 0.2
    value_loss: str = "none"
    value_clip: float = 0.2
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.01
    reward_scale: float = 1.0
    running_scale: bool = False
    normalize_advantages: bool = False
    log_prob: str = "sum"
    target_kl: float | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the compiled functions need besides arrays.

    Attributes:
      name: of the embodiment.
      graph: the structure of the network.
      value_graph: that of the value head.
      optimizer: of the network's trained parameters and the value head.
      mesh: the devices.
      ppo: the numbers.
      actions: the logarithm of the number of valid actions.
    """

    name: str
    graph: nnx.GraphDef
    value_graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    mesh: Mesh
    ppo: PPOConfig
    actions: float

    def placed(self) -> Any:
        """Returns a context in which the model states where its activations live; see ``mllm_act.placement``."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


class Targets(NamedTuple):
    """What a block learns, [R, T]; all zero in the first pass."""

    log_prob: Any  # old
    value: Any  # old
    advantage: Any
    returns: Any
    exists: Any  # which steps have an action that is learned from


def compute(
    recipe: Recipe,
    learned: Mapping[str, nnx.State],
    frozen: nnx.State,
    observation: Observation,
    tokens: Array,
) -> tuple[Array, Array, Array]:
    """Returns log-probability, entropy and value at every step of a block, [R, T]."""
    network: PolicyNetwork = nnx.merge(recipe.graph, learned["trained"], frozen)
    shards = recipe.mesh.shape["data"] * recipe.mesh.shape["fsdp"]
    adapter, hidden = network.hidden(recipe.name, observation, tokens, skip_padding=shards)
    log_probs, column = adapter.log_probs(hidden, tokens)
    value = nnx.merge(recipe.value_graph, learned["value"])(hidden[..., 0, :])
    log_prob = losses.log_prob(log_probs, column, recipe.ppo.log_prob)
    return log_prob, losses.entropy(log_probs, recipe.actions), value


def loss(
    ppo: PPOConfig,
    log_prob: Float[Array, "R T"],
    entropy: Float[Array, "R T"],
    value: Float[Array, "R T"],
    targets: Targets,
    count: Float[Array, ""],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns a block's part of its minibatch's loss, and of the metrics: sums divided by the minibatch's ``count``."""
    # Where there is no action, a ratio could be infinite, and its gradient NaN.
    log_ratio = jnp.where(targets.exists, log_prob - targets.log_prob, 0)
    ratio = jnp.exp(log_ratio)

    def mean(x: Float[Array, "R T"]) -> Float[Array, ""]:
        return losses.mean_over(x, targets.exists, count)

    metrics = {
        "policy_loss": mean(losses.surrogate(ratio, targets.advantage, ppo.clip)),
        "value_loss": mean(
            losses.value_loss(value, targets.value, targets.returns, ppo.value_clip, ppo.value_loss)
        ),
        "entropy": mean(entropy),
        "kl": mean(losses.divergence(log_ratio)),
        "clip_share": mean((jnp.abs(ratio - 1) > ppo.clip).astype(jnp.float32)),
    }
    total = (
        metrics["policy_loss"]
        + ppo.value_coefficient * metrics["value_loss"]
        - ppo.entropy_coefficient * metrics["entropy"]
    )
    return total, {"loss": total, **metrics}


def learn_block(
    recipe: Recipe,
    learned: Mapping[str, nnx.State],
    frozen: nnx.State,
    observation: Observation,
    tokens: Array,
    targets: Targets,
    count: Array,
    gradients: Any,
    differentiate: Array,
) -> tuple[Any, dict[str, Array], Array, Array]:
    """Adds a block's gradients to those of its minibatch, or with ``differentiate`` false only looks.

    Returns:
      The gradients, the metrics, and the log-probability and the value at every step.
    """
    with recipe.placed():
        (log_prob, entropy, value), backward = jax.vjp(
            lambda learned: compute(recipe, learned, frozen, observation, tokens), learned
        )
        (_, metrics), slopes = jax.value_and_grad(partial(loss, recipe.ppo), (0, 1, 2), True)(
            log_prob, entropy, value, targets, count
        )
        gradients = jax.lax.cond(
            differentiate,
            lambda: optax.tree.add(gradients, backward(slopes)[0]),
            lambda: gradients,
        )
    return gradients, metrics, log_prob, value


def apply(recipe: Recipe, state: State, gradients: Any) -> tuple[State, dict[str, Array]]:
    """Makes a step of the optimizer; returns the new state and the norms of gradients and weights."""
    learned = {part: state[part] for part in LEARNED}
    updates, optimizer = recipe.optimizer.update(gradients, state["optimizer"], learned)
    learned = optax.apply_updates(learned, updates)
    norms = {"grad_norm": optax.tree.norm(gradients), "weight_norm": optax.tree.norm(learned)}
    return {**learned, "optimizer": optimizer}, norms


class Learner:
    """The compiled functions, and the way of a rollout through them."""

    def __init__(
        self,
        recipe: Recipe,
        state: State,
        seed: int,
        context: int,
        steps: int,
        prompt_tokens: int,
        no_action: np.ndarray,
        returns: ReturnScale | None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          recipe: see there.
          state: its shardings are those of the results.
          seed: of minibatches.
          context: of segments at most.
          steps: of a rollout, over all simulators.
          prompt_tokens: N.
          no_action: the tokens of any action.
          returns: scales rewards, where ``ppo.running_scale`` asks for it.
        """
        self.recipe, self.seed, self.returns = recipe, seed, returns
        shards = recipe.mesh.shape["data"] * recipe.mesh.shape["fsdp"]
        self._packing = {
            "context": context, "steps": -(-steps // recipe.ppo.minibatches), "shards": shards,
            "prompt_tokens": prompt_tokens, "no_action": no_action,
        }  # fmt: skip
        where = jax.tree.map(lambda leaf: leaf.sharding, state)
        learned = {part: where[part] for part in LEARNED}
        self._learn = jax.jit(
            partial(learn_block, recipe),
            donate_argnums=6,
            out_shardings=(learned, None, None, None),
        )
        self._apply = jax.jit(partial(apply, recipe), donate_argnums=0, out_shardings=(where, None))
        self._zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like), out_shardings=learned)

    def update(
        self, state: State, frozen: nnx.State, segments: Sequence[Segment], grid: Grid, number: int
    ) -> tuple[State, dict[str, float]]:
        """Learns from a rollout.

        Args:
          state: is replaced and cannot be used again.
          frozen: the other parameters.
          segments: of the rollout.
          grid: of the rollout.
          number: of this update, from 1 on; minibatches are drawn by it and the seed.

        Returns:
          The new state, and metrics: means over the minibatches that were learned from.
        """
        ppo, rng = self.recipe.ppo, np.random.default_rng((self.seed, number))
        blocks = minibatches(segments, ppo.minibatches, rng, **self._packing)
        placed = [[self._placed(block) for block in minibatch] for minibatch in blocks]
        log_probs, values, next_values = self._look(state, frozen, blocks, placed, grid)
        scale = ppo.reward_scale * (1.0 if self.returns is None else self.returns.update(grid))
        rewards = (scale * grid.rewards).astype(np.float32)
        advantage = gae.advantages(rewards, values, next_values, grid.last, ppo.discount, ppo.decay)
        returns, exists = advantage + values, grid.exists
        found = self._about(grid, log_probs, values, returns)
        if ppo.normalize_advantages:
            advantage = losses.normalized(advantage, exists)
        targets = [
            [self._targets(block, log_probs, values, advantage, returns) for block in minibatch]
            for minibatch in blocks
        ]
        counts = [np.float32(max(sum((b.cells >= 0).sum() for b in m), 1)) for m in blocks]
        history: list[dict[str, float]] = []
        stopped = False
        for _ in range(ppo.epochs):
            for i in rng.permutation(len(blocks)):
                gradients = self._zeros({part: state[part] for part in LEARNED})
                parts = []
                for device, target in zip(placed[i], targets[i], strict=True):
                    gradients, metrics, _, _ = self._call(
                        state, frozen, device, target, counts[i], gradients, True
                    )
                    parts.append(metrics)
                sums = {k: float(sum(jax.device_get([p[k] for p in parts]))) for k in parts[0]}
                stopped = ppo.target_kl is not None and sums["kl"] > ppo.target_kl
                if stopped:
                    break
                state, norms = self._apply(state, gradients)
                history.append({**sums, **{k: float(x) for k, x in norms.items()}})
            if stopped:
                break
        means = {k: float(np.mean([h[k] for h in history])) for k in (history or [{}])[0]}
        return state, {**means, **found, "reward_scale": scale, "steps": float(len(history))}

    def _place(self, arrays: Any) -> Any:
        return jax.device_put(arrays, sharding.of_batch(self.recipe.mesh))

    def _placed(self, block: Block) -> tuple[Observation, Array]:
        placed: tuple[Observation, Array] = self._place((block.observation, block.tokens))
        return placed

    def _call(
        self,
        state: State,
        frozen: nnx.State,
        block: tuple[Observation, Array],
        targets: Targets,
        count: np.float32,
        gradients: Any,
        differentiate: bool,
    ) -> Any:
        learned = {part: state[part] for part in LEARNED}
        return self._learn(
            learned, frozen, *block, targets, count, gradients, np.bool_(differentiate)
        )

    def _look(
        self,
        state: State,
        frozen: nnx.State,
        blocks: Sequence[Sequence[Block]],
        placed: Sequence[Sequence[Any]],
        grid: Grid,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns log-probabilities, values and next values [S, E] under the current parameters."""
        gradients = self._zeros({part: state[part] for part in LEARNED})
        results = []
        for minibatch, devices in zip(blocks, placed, strict=True):
            for block, device in zip(minibatch, devices, strict=True):
                nothing = np.zeros(block.cells.shape, np.float32)
                targets = Targets(nothing, nothing, nothing, nothing, nothing > 0)
                targets = self._place(targets)
                gradients, _, log_prob, value = self._call(
                    state, frozen, device, targets, np.float32(1), gradients, False
                )
                results.append((block, log_prob, value))
        log_probs, values, next_values = (np.zeros_like(grid.rewards) for _ in range(3))
        for block, log_prob, value in results:
            log_prob, value = np.asarray(log_prob), np.asarray(value)
            acted, follows = block.cells != NO_CELL, block.values_of != NO_CELL
            log_probs.flat[block.cells[acted]] = log_prob[acted]
            values.flat[block.cells[acted]] = value[acted]
            next_values.flat[block.values_of[follows]] = value[follows]
        later = np.concatenate([values[1:], np.zeros_like(values[:1])])
        return log_probs, values, np.where(grid.last, next_values, later)

    def _targets(self, block: Block, *grids: np.ndarray) -> Targets:
        exists = block.cells != NO_CELL
        cells = np.where(exists, block.cells, 0)
        log_prob, value, advantage, returns = (
            np.where(exists, grid.reshape(-1)[cells], 0).astype(np.float32) for grid in grids
        )
        targets = Targets(log_prob, value, advantage, returns, exists)
        placed: Targets = self._place(targets)
        return placed

    def _about(
        self, grid: Grid, log_probs: np.ndarray, values: np.ndarray, returns: np.ndarray
    ) -> dict[str, float]:
        exists = grid.exists
        gap = np.abs(log_probs - grid.log_probs)[exists]
        return {
            "gap_mean": float(gap.mean()) if gap.size else math.nan,
            "gap_max": float(gap.max(initial=0)),
            "explained_variance": losses.explained_variance(values[exists], returns[exists]),
            "value_mean": float(values[exists].mean()) if gap.size else math.nan,
        }
