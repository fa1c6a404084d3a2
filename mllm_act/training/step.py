"""One update and one validation pass, as functions of arrays; ``train`` and ``bench train`` compile them."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from mllm_act.adapters.base import Adapter
from mllm_act.batch import Batch
from mllm_act.policy.network import PolicyNetwork
from mllm_act.training.augment import Augmentation

State = dict[
    str, Any
]  # "trained" (nnx.State), "optimizer" (optax.OptState), with an average "ema" (nnx.State)
AUGMENTATION = (
    2**32 - 2
)  # the key of augmentation is this part of an update's; see policy.network.NOISE
Scores = dict[str, tuple[jax.Array, jax.Array]]  # means by name, each with its number of items


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the compiled functions need besides arrays.

    Attributes:
      graph: the structure of the network.
      optimizer: updates the trained parameters.
      key: dropout of step n is drawn from this key and n.
      shares: each embodiment's weight in the loss; they sum to 1.
      skip_padding: by embodiment, see ``PolicyNetwork.loss``.
      action_units: by embodiment, the name, unit and scale of each dimension of a continuous action.
      augmentation: how images are changed at random in updates, by keys drawn like those of dropout.
      accumulate: the number of parts that a batch is cut into, to need less memory.
      ema: the decay of the moving average of the trained parameters, if the state has one (``ema``).
      mesh: the devices, over which the model then states where its activations live; see ``mllm_act.placement``.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    key: PRNGKeyArray
    shares: Mapping[str, float]
    skip_padding: Mapping[str, int | None]
    action_units: Mapping[str, Sequence[tuple[str, str, float]]]
    augmentation: Augmentation = Augmentation()
    accumulate: int = 1
    ema: float = 0.0
    mesh: Mesh | None = None

    def scalar(self, embodiment: str, name: str) -> str:
        """Returns the name of a scalar in the log, which begins with the embodiment where there are several."""
        return name if len(self.shares) == 1 else f"{embodiment}/{name}"

    def placed(self) -> contextlib.AbstractContextManager:
        """Returns a context in which the model states where its activations live."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


def update(
    recipe: Recipe, state: State, frozen: nnx.State, batches: Mapping[str, Batch], step: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
    """Makes one update.

    Args:
      recipe: see above; static.
      state: is replaced, so that it can be donated.
      frozen: the parameters that are not trained.
      batches: windows of each embodiment.
      step: int32[], the number of this update, from 1 on.

    Returns:
      The new state, and metrics: ``loss``, ``grad_norm``, ``update_norm``, ``weight_norm``, ``supervised_steps``,
      those of the adapters.
    """
    with recipe.placed():
        return _update(recipe, state, frozen, batches, step)


def jit_update(recipe: Recipe, state: State) -> Any:
    """Returns ``update`` for ``jax.jit`` to compile: the state is donated, and put out where it was (its shardings)."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        functools.partial(update, recipe), donate_argnums=0, out_shardings=(shardings, None)
    )


def _update(
    recipe: Recipe, state: State, frozen: nnx.State, batches: Mapping[str, Batch], step: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
    key = jax.random.fold_in(recipe.key, step)
    batches = {name: _augmented(recipe, batch, key) for name, batch in batches.items()}
    # One embodiment after another, so that only the activations of one are kept.
    loss, gradients = jnp.zeros(()), None
    metrics: dict[str, jax.Array] = {}
    for name, batch in batches.items():
        gradient, scalars = _gradient(recipe, state["trained"], frozen, name, batch, key)
        loss += recipe.shares[name] * scalars["loss"]
        metrics |= {recipe.scalar(name, k): x for k, x in scalars.items()}
        gradients = gradient if gradients is None else optax.tree.add(gradients, gradient)
    updates, optimizer_state = recipe.optimizer.update(
        gradients, state["optimizer"], state["trained"]
    )
    trained = optax.apply_updates(state["trained"], updates)
    after = {"trained": trained, "optimizer": optimizer_state}
    if "ema" in state:
        # As in TensorFlow's ExponentialMovingAverage, so that the first weights are soon forgotten.
        decay = jnp.minimum(recipe.ema, (1 + step) / (10 + step))
        after["ema"] = optax.incremental_update(trained, state["ema"], 1 - decay)
    norms = {
        "grad_norm": optax.tree.norm(gradients),
        "update_norm": optax.tree.norm(updates),
        "weight_norm": optax.tree.norm(trained),
    }
    supervised = sum(batch.observation.mask.sum() for batch in batches.values())
    return after, {**metrics, "loss": loss, **norms, "supervised_steps": supervised}


def _gradient(
    recipe: Recipe,
    trained: Any,
    frozen: Any,
    name: str,
    batch: Batch,
    key: PRNGKeyArray,
) -> tuple[Any, dict[str, jax.Array]]:
    """Returns the gradient of one embodiment's loss times its share, and its loss and metrics.

    With accumulation a batch is cut into parts that follow each other. A part weighs as much as it has items that the
    loss is a mean over, so that their sum is what the whole batch gives; only dropout draws other numbers.
    """

    def loss_of(trained: nnx.State, part: Batch, key: PRNGKeyArray, weight: Any) -> Any:
        network: PolicyNetwork = nnx.merge(recipe.graph, trained, frozen)
        loss, metrics = network.loss(name, part, key, recipe.skip_padding[name])
        return weight * loss, {"loss": loss, **metrics}

    gradient_of = jax.grad(loss_of, has_aux=True)
    if recipe.accumulate == 1:
        return gradient_of(trained, batch, key, recipe.shares[name])

    adapter = nnx.merge(recipe.graph, trained, frozen).adapters[name]

    def accumulate(part: Batch, i: jax.Array) -> tuple[nnx.State, dict[str, jax.Array], Any]:
        tokens, mask = adapter.encode(part.action), part.observation.mask
        weight = recipe.shares[name] * adapter.counts(tokens, mask).get("loss", mask.sum())
        gradient, means = gradient_of(trained, part, jax.random.fold_in(key, i), weight)
        scores = weighted(adapter, means, tokens, mask)
        sums = {k: mean * count for k, (mean, count) in scores.items()}
        return gradient, sums, {k: jnp.float32(count) for k, (_, count) in scores.items()}

    parts = jax.tree.map(lambda x: _parts(recipe, x), batch)
    indices = jnp.arange(recipe.accumulate)
    first = jax.eval_shape(accumulate, jax.tree.map(lambda x: x[0], parts), indices[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def body(sums: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return optax.tree.add(sums, accumulate(*part)), None

    (gradient, sums, counts), _ = jax.lax.scan(body, zeros, (parts, indices))
    items = {k: jnp.maximum(count, 1) for k, count in counts.items()}
    gradient = jax.tree.map(lambda x: x / items["loss"], gradient)
    return gradient, {k: sums[k] / items[k] for k in sums}


def _parts(recipe: Recipe, x: jax.Array) -> jax.Array:
    """Cuts axis B into equal parts [parts, B / parts], each with windows of all devices, none of which moves."""
    shards = 1 if recipe.mesh is None else recipe.mesh.shape["data"] * recipe.mesh.shape["fsdp"]
    rows = len(x) // recipe.accumulate
    cut = x.reshape(shards, recipe.accumulate, rows // shards, *x.shape[1:])
    return cut.swapaxes(0, 1).reshape(recipe.accumulate, rows, *x.shape[1:])


def _augmented(recipe: Recipe, batch: Batch, key: PRNGKeyArray) -> Batch:
    observation, key = batch.observation, jax.random.fold_in(key, AUGMENTATION)
    images = recipe.augmentation(observation.images, key)
    return dataclasses.replace(batch, observation=dataclasses.replace(observation, images=images))


def validate(
    recipe: Recipe, trained: nnx.State, frozen: nnx.State, name: str, batch: Batch
) -> Scores:
    """Returns the loss and metrics of a batch, over steps or what the adapter counts, and the action error."""
    with recipe.placed():
        return _validate(recipe, trained, frozen, name, batch)


def _validate(
    recipe: Recipe, trained: nnx.State, frozen: nnx.State, name: str, batch: Batch
) -> Scores:
    network: PolicyNetwork = nnx.merge(recipe.graph, trained, frozen)
    adapter, mask = network.adapters[name], batch.observation.mask
    loss, metrics = network.loss(name, batch, skip_padding=recipe.skip_padding[name])
    scores = weighted(adapter, {"loss": loss, **metrics}, adapter.encode(batch.action), mask)
    return scores | _action_error(recipe, network, name, batch)


def weighted(
    adapter: Adapter, means: Mapping[str, jax.Array], tokens: jax.Array, mask: jax.Array
) -> Scores:
    """Returns an adapter's loss and metrics, each with the number of items that it is the mean of."""
    counts, steps = adapter.counts(tokens, mask), mask.sum()
    return {name: (mean, counts.get(name, steps)) for name, mean in means.items()}


def _action_error(recipe: Recipe, network: PolicyNetwork, name: str, batch: Batch) -> Scores:
    """Decodes the newest step of every window greedily.

    Returns:
      The mean absolute error in physical units over all actions of a chunk, or for discrete actions the share that
      differs from the expert's, over windows.
    """
    observation, adapter = batch.observation, network.adapters[name]
    latents = network.latents(observation, recipe.skip_padding[name])
    rows = jnp.arange(len(batch.action))
    newest = jnp.maximum(observation.mask.sum(1) - 1, 0)
    tokens = network.act(
        name,
        network.mllm.read(observation.prompt, observation.prompt_mask),
        latents,
        observation.mask,
        observation.proprio[rows, newest],
        adapter.encode(batch.action),
    )
    decoded, expert = adapter.decode(tokens), batch.action[rows, newest]
    exists = observation.mask.any(1)
    count = jnp.maximum(exists.sum(), 1)
    if adapter.discrete:
        wrong = jnp.where(exists, (decoded != expert).any(-1), False)
        return {"wrong_actions": (wrong.sum() / count, exists.sum())}
    units = recipe.action_units[name]
    error = jnp.abs(decoded - expert).reshape(len(rows), -1, len(units)).mean(1)
    error = jnp.where(exists[:, None], error, 0).sum(0) / count
    error = error * jnp.array([scale for _, _, scale in units])
    return {
        "_".join(filter(None, ("error", dim, unit))): (error[i], exists.sum())
        for i, (dim, unit, _) in enumerate(units)
    }


def average(scores: Sequence[Scores]) -> dict[str, float]:
    """Averages the scores of batches, weighted by their numbers of items: batches of any size give the same.

    The loss comes first.
    """
    averages = {}
    for name in sorted(scores[0], key=lambda name: name != "loss"):
        parts = [(float(mean), float(count)) for mean, count in (part[name] for part in scores)]
        total = sum(count for _, count in parts)
        averages[name] = sum(mean * count for mean, count in parts) / total
    return averages
