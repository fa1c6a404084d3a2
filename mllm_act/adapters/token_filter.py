"""The token filter: probabilities over the tokens that may follow, and over no others.

Which may follow is read from a prefix trie of the valid token sequences, held as tables over its nodes (the prefixes)
and the candidates (the tokens that occur in some sequence). A token is two look-ups, whatever the sequences.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

Keys = PRNGKeyArray | Key[Array, " B"]  # one for the batch, or one for each of its rows


def filtered_log_softmax(
    logits: Float[Array, "... V"], allowed: Bool[Array, "... V"]
) -> Float[Array, "... V"]:
    """Returns log-probabilities renormalised over the allowed tokens; -inf elsewhere. Computed in float32.

    At least one token must be allowed.
    """
    masked = jnp.where(allowed, logits.astype(jnp.float32), -jnp.inf)
    return jax.nn.log_softmax(masked, axis=-1)


def draw(key: Keys, logits: Float[Array, "... V"]) -> Int[Array, "..."]:
    """Draws from the softmax of logits. With a key per row, a row's draw does not depend on the other rows."""
    if _per_row(key):
        return jax.vmap(jax.random.categorical)(key, logits)
    return jax.random.categorical(key, logits)


def fold_in(key: Keys, data: int) -> Keys:
    """Returns ``jax.random.fold_in(key, data)``, of every key where there is one per row."""
    if _per_row(key):
        return jax.vmap(jax.random.fold_in, (0, None))(key, data)
    return jax.random.fold_in(key, data)


def _per_row(key: Keys) -> bool:
    return jax.random.key_data(key).ndim > 1


def choose(
    logits: Float[Array, "... V"], allowed: Bool[Array, "... V"], key: Keys | None = None
) -> Int[Array, "..."]:
    """Returns the likeliest allowed token, or with a key one drawn from ``filtered_log_softmax``'s distribution.

    It is an allowed one even where logits are infinite or no numbers. At least one token must be allowed.
    """
    lowest = float(jnp.finfo(jnp.float32).min)
    finite = jnp.nan_to_num(logits.astype(jnp.float32), nan=lowest)
    masked = jnp.where(allowed, finite, -jnp.inf)
    return masked.argmax(-1) if key is None else draw(key, masked)


@dataclasses.dataclass(frozen=True)
class Trie:
    """The prefix trie of A token sequences, distinct and all of M tokens.

    Its tables are numpy arrays: constants of a compiled program. Node 0 is the empty prefix.
    """

    sequences: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def candidates(self) -> Int[np.ndarray, " C"]:
        """The tokens that occur in some sequence, each once, sorted."""
        return np.unique(np.array(self.sequences, np.int32))

    @functools.cached_property
    def follow(self) -> Int[np.ndarray, "nodes C"]:
        """The node that each candidate leads to; -1 where it must not follow, 0 where it ends a sequence."""
        column = {int(token): c for c, token in enumerate(self.candidates)}
        nodes: dict[tuple[int, ...], int] = {}
        for j in range(len(self.sequences[0])):
            for sequence in self.sequences:
                nodes.setdefault(sequence[:j], len(nodes))
        follow = np.full((len(nodes), len(column)), -1, np.int32)
        for prefix, node in nodes.items():
            for sequence in self.sequences:
                if sequence[: len(prefix)] == prefix:
                    after = sequence[: len(prefix) + 1]
                    follow[node, column[after[-1]]] = nodes.get(after, 0)
        return follow

    @functools.cached_property
    def decisions(self) -> tuple[int, ...]:
        """The places of a sequence where some prefix leaves more than one token."""
        return tuple(
            j
            for j in range(len(self.sequences[0]))
            if len({s[:j] for s in self.sequences}) < len({s[: j + 1] for s in self.sequences})
        )

    def allowed(self, node: Int[Array, "..."]) -> Bool[Array, "... C"]:
        """Returns which candidates may follow a node; at least one of them may."""
        return jnp.asarray(self.follow)[node] >= 0

    def step(self, node: Int[Array, "..."], column: Int[Array, "..."]) -> Int[Array, "..."]:
        """Returns the node that a candidate, named by its column, leads to; from one that must not follow to node 0."""
        return jnp.maximum(jnp.asarray(self.follow)[node, column], 0)

    def columns(self, tokens: Int[Array, "..."]) -> Int[Array, "..."]:
        """Returns which candidate each token is; 0 for one that is none."""
        return (tokens[..., None] == self.candidates).argmax(-1)

    def walk(self, tokens: Int[Array, "... j"]) -> Int[Array, "... j+1"]:
        """Returns the nodes along j tokens: before the first of them, up to after the last."""
        nodes = [jnp.zeros(tokens.shape[:-1], jnp.int32)]
        columns = self.columns(tokens)
        for j in range(tokens.shape[-1]):
            nodes.append(self.step(nodes[-1], columns[..., j]))
        return jnp.stack(nodes, axis=-1)

    def index(self, tokens: Int[Array, "... M"]) -> Int[Array, "..."]:
        """Returns which sequence whole tokens are; -1 where they are none."""
        same = (tokens[..., None, :] == jnp.asarray(self.sequences)).all(-1)
        return jnp.where(same.any(-1), same.argmax(-1), -1)
