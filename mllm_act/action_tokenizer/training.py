"""Trains the autoencoder: state, update function, order of the data, reconstruction.

arXiv 2406.07904 does not state the following defaults. They were chosen on Meta-World actions: ML-45, training on 16
configurations of each task, selection on 4 others; two codebooks, 400 updates of 512 actions.

* Learning rate 3e-4 with 5 % warm-up and cosine decay to 0. 1.5e-4 to 5e-4 do equally well; 2e-3 adds 50 % to the
  error.
* Decay 0.95 of the moving averages. 0.9 adds 15 % to the error, 0.8 more; 0.99 doubles it.
* Commitment weight 1.0, as in GEA (arXiv 2412.08442). 0.25 to 4 do equally well.
* Straight-through gradients. The rotation trick (arXiv 2410.06424) does not help.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.action_tokenizer import Tokenizer, quantizer
from mllm_act.action_tokenizer.autoencoder import ActionTokenizer
from mllm_act.action_tokenizer.quantizer import Codebooks


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of the update function other than the optimizer's."""

    batch_size: int = 512
    decay: float = 0.95  # of the moving averages behind the codebooks
    commitment: float = 1.0  # weight of the commitment loss, relative to the squared error
    revive_below: float = 0.03  # fraction of the mean use below which a code is revived; 0: never
    initial_samples: int = 8192  # actions for the k-means initialisation of the codebooks
    seed: int = 0


class TrainingState(NamedTuple):
    """Everything that an update changes; ``step`` is int32[], the number of updates made."""

    params: Any
    codebooks: Codebooks
    optimizer: Any
    step: Array


Update = Callable[
    [TrainingState, Float[Array, "S B A"]], tuple[TrainingState, dict[str, Float[Array, " S"]]]
]


def initial_state(
    model: ActionTokenizer,
    actions: Float[np.ndarray, "n A"],
    optimizer: optax.GradientTransformation,
    config: TrainingConfig,
) -> TrainingState:
    """Returns the state before the first update: codebooks by k-means of the untrained encoder's latents.

    ``actions`` are the normalised training actions.
    """
    rng = np.random.default_rng([config.seed, 1])
    samples = actions[rng.permutation(len(actions))[: config.initial_samples]]
    sizes = model.config

    @jax.jit
    def codebooks(latents: Array) -> Codebooks:
        key = jax.random.key(config.seed)
        return quantizer.initialise(key, latents, sizes.quantizers, sizes.codes, config.batch_size)

    model.set_quantizer_state(codebooks(jax.jit(model.encoder)(samples)))
    moments = optimizer.init(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return training_state(model, moments, 0)


def training_state(model: ActionTokenizer, moments: Any, step: int) -> TrainingState:
    """Makes a state of a module, the optimizer's state and the number of updates made."""
    # Copies, because the update donates its state and the module must keep its arrays.
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    codebooks = Codebooks(*(jnp.copy(part) for part in model.quantizer_state()))
    return TrainingState(params, codebooks, moments, jnp.int32(step))


def make_update(
    model: ActionTokenizer, optimizer: optax.GradientTransformation, config: TrainingConfig
) -> Update:
    """Returns a jitted function that makes S updates, each of a batch of B normalised actions.

    It donates the state. Several updates in one dispatch save copies of the parameters: on two CPU cores an update
    takes 168 ms instead of 184 ms. Metrics of each update: ``loss``, ``reconstruction`` (mean squared error),
    ``commitment``, ``grad_norm``, ``weight_norm``.
    """
    graph, trained_and_others = nnx.split(model)
    others = nnx.filter_state(trained_and_others, nnx.Not(nnx.Param))
    root = jax.random.key(config.seed)

    def update(state: TrainingState, action: Array) -> tuple[TrainingState, dict[str, Array]]:
        def loss_of(params: Any) -> tuple[Array, tuple[Codebooks, dict[str, Array]]]:
            network = nnx.merge(graph, nnx.State(params), others)
            latent = network.encoder(action)
            key = jax.random.fold_in(root, state.step)
            quantized = quantizer.quantize(
                key, state.codebooks, latent, config.decay, config.revive_below
            )
            error = jnp.mean((network.decoder(quantized.latent) - action) ** 2)
            loss = error + config.commitment * quantized.commitment
            parts = {"loss": loss, "reconstruction": error, "commitment": quantized.commitment}
            return loss, (quantized.state, parts)

        gradient, (codebooks, metrics) = jax.grad(loss_of, has_aux=True)(state.params)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"grad_norm": optax.tree.norm(gradient), "weight_norm": optax.tree.norm(params)}
        return TrainingState(params, codebooks, moments, state.step + 1), metrics

    def update_all(
        state: TrainingState, actions: Float[Array, "S B A"]
    ) -> tuple[TrainingState, dict[str, Array]]:
        return jax.lax.scan(update, state, actions)

    return jax.jit(update_all, donate_argnums=0)


def store(state: TrainingState, model: ActionTokenizer) -> None:
    """Copies the state's parameters and codebooks into the module."""
    # Copies, as in training_state.
    nnx.update(model, nnx.State(jax.tree.map(jnp.copy, state.params)))
    model.set_quantizer_state(Codebooks(*(jnp.copy(part) for part in state.codebooks)))


def batch_indices(n: int, batch_size: int, first: int, count: int, seed: int) -> np.ndarray:
    """Returns which of n actions the ``count`` updates after ``first`` train on: int64[count, batch_size].

    Every epoch is a new permutation; a batch may span two epochs. The result depends on the arguments only, so a
    resumed run needs no iterator state.
    """
    position = np.arange(first * batch_size, (first + count) * batch_size)
    epochs, offsets = np.divmod(position, n)
    index = np.empty_like(position)
    for epoch in range(epochs[0], epochs[-1] + 1):
        in_epoch = epochs == epoch
        order = np.random.default_rng([seed, 2, epoch]).permutation(n)
        index[in_epoch] = order[offsets[in_epoch]]
    return index.reshape(count, batch_size)


def reconstruct(
    model: Tokenizer, actions: Float[np.ndarray, "n HA"], batch_size: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the decoded chunks float32[n, H*A] and codes int32[n, M] of normalised chunks."""
    graph, variables = nnx.split(model)
    decoded, codes = [], []
    for start in range(0, len(actions), batch_size):
        part = actions[start : start + batch_size]
        padded = np.resize(part, (min(batch_size, len(actions)), part.shape[-1]))
        part_decoded, part_codes = jax.device_get(_reconstruct(graph, variables, padded))
        decoded.append(part_decoded[: len(part)])
        codes.append(part_codes[: len(part)])
    return np.concatenate(decoded), np.concatenate(codes)


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(graph: nnx.GraphDef, variables: nnx.State, batch: Array) -> tuple[Array, Array]:
    network = nnx.merge(graph, variables)
    codes = network.encode(batch)
    return network.decode(codes), codes
