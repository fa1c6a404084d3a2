"""Byte-pair encoding of integer sequences: learnt with Hugging Face's tokenizers, applied under ``jax.jit``.

A sequence is a row of symbols 1 .. S, padded with ``END``. Merge r replaces two adjacent codes by a third one, which is
above S: ``merges[r]`` = (left, right, merged), in the order they were learnt. Encoding merges the pair of lowest r, the
leftmost first, until no pair is left (arXiv 1508.07909).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tokenizers import Tokenizer, models, trainers

END = 0

# The library merges characters: code c is this character, the first for private use, plus c.
_FIRST_CHARACTER = 0xE000


def learn(sequences: Int[np.ndarray, "n L"], symbols: int, codes: int) -> Int[np.ndarray, "R 3"]:
    """Learns merges from sequences of the symbols 1 .. ``symbols``.

    Returns:
      int32[R, 3]. END, the symbols and the merged codes are at most ``codes`` together. There are fewer if few pairs
      occur twice: pairs that occur once are not merged, as they tell nothing about other sequences.
    """
    # numpy strips zeros at the end of a string, so END becomes no character.
    points = np.where(sequences == END, 0, _FIRST_CHARACTER + sequences).astype("<u4")
    words = np.ascontiguousarray(points).view(f"<U{sequences.shape[1]}")[:, 0].tolist()
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=codes,
        min_frequency=2,
        special_tokens=["END"],  # gets code 0, the alphabet the next ones
        initial_alphabet=[chr(_FIRST_CHARACTER + code) for code in range(1, symbols + 1)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    codes_of = model["vocab"]
    merges = [
        (codes_of[left], codes_of[right], codes_of[left + right]) for left, right in model["merges"]
    ]
    return np.array(merges, np.int32).reshape(-1, 3)


def expand(merges: Int[np.ndarray, "R 3"], symbols: int) -> list[tuple[int, ...]]:
    """Returns the symbols that each code stands for; none for END."""
    expanded: list[tuple[int, ...]] = [(), *((symbol,) for symbol in range(1, symbols + 1))]
    for left, right, merged in merges:
        if merged == len(expanded):  # two pairs may merge to the same code
            expanded.append(expanded[left] + expanded[right])
    return expanded


def merge(sequences: Int[Array, "n L"], merges: Int[Array, "R 3"], codes: int) -> Array:
    """Returns the sequences int32[n, L] with their pairs merged, padded with END.

    The number of rounds is fixed, L - 1: stopping early would need a synchronisation between devices in every round.
    """
    size = sequences.shape[-1]
    left, right, merged = merges.T
    none = len(merges)
    # The merge of each pair. A table of K x K integers, made at each call, is cheaper than a search for each pair.
    rank = jnp.full(codes * codes, none, jnp.int32).at[left * codes + right].set(jnp.arange(none))
    merged = jnp.append(merged, END)  # not empty even without merges
    position = jnp.arange(size)

    def merge_one(_: Array, row: Int[Array, "n L"]) -> Int[Array, "n L"]:
        following = jnp.pad(row[:, 1:], ((0, 0), (0, 1)), constant_values=END)
        ranks = rank[row * codes + following]
        lowest = ranks.min(-1, keepdims=True)
        at = ranks.argmin(-1, keepdims=True)
        shifted = jnp.where(position == at, merged[lowest], following)
        return jnp.where(lowest < none, jnp.where(position < at, row, shifted), row)

    return jax.lax.fori_loop(0, size - 1, merge_one, sequences)
