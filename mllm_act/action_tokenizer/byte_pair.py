"""Byte-pair encoding of sequences of small integers: learnt with Hugging Face's tokenizers, applied under ``jax.jit``.

A sequence is a row of codes: 1 .. S, the symbols, then as many ``END`` as fill it up. Merge r replaces two
adjacent codes by a third one, which is above S; ``merges[r]`` = (left, right, merged), the first learnt first. Applying
them merges the pair of lowest r, the leftmost of these first, until none is left (arXiv 1508.07909).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tokenizers import Tokenizer, models, trainers

END = 0

# The library merges characters: code c is this private one (none has a meaning there) plus c.
_FIRST_CHARACTER = 0xE000


def learn(sequences: Int[np.ndarray, "n L"], symbols: int, codes: int) -> Int[np.ndarray, "R 3"]:
    """Returns int32 merges, learnt from sequences of the symbols 1 .. ``symbols``.

    There are fewer than ``codes`` has room for, END and the symbols counted, where too few pairs are seen twice: what
    is seen once says nothing of other sequences.
    """
    # numpy takes zeros at the end of a text for none: END leaves no character.
    points = np.where(sequences == END, 0, _FIRST_CHARACTER + sequences).astype("<u4")
    words = np.ascontiguousarray(points).view(f"<U{sequences.shape[1]}")[:, 0].tolist()
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=codes,
        min_frequency=2,
        special_tokens=["END"],  # it gets the first number, the alphabet those after it
        initial_alphabet=[chr(_FIRST_CHARACTER + code) for code in range(1, symbols + 1)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    code = model["vocab"]
    merges = [(code[left], code[right], code[left + right]) for left, right in model["merges"]]
    return np.array(merges, np.int32).reshape(-1, 3)


def expand(merges: Int[np.ndarray, "R 3"], symbols: int) -> list[tuple[int, ...]]:
    """Returns the symbols that each code stands for; END for none."""
    found: list[tuple[int, ...]] = [(), *((symbol,) for symbol in range(1, symbols + 1))]
    for left, right, merged in merges:
        if merged == len(found):  # two pairs may make the same code
            found.append(found[left] + found[right])
    return found


def merge(sequences: Int[Array, "n L"], merges: Int[Array, "R 3"], codes: int) -> Array:
    """Returns the sequences int32[n, L] with their pairs merged, filled up with END.

    The number of rounds is fixed, L - 1, so that no device waits to hear whether the others' sequences are done.
    """
    size = sequences.shape[-1]
    left, right, merged = merges.T
    none = len(merges)
    # Of a pair: its merge. K x K small integers, made at each call, are cheaper than a search for each pair.
    rank = jnp.full(codes * codes, none, jnp.int32).at[left * codes + right].set(jnp.arange(none))
    merged = jnp.append(merged, END)  # so that it is not empty
    place = jnp.arange(size)

    def one(_: Array, row: Int[Array, "n L"]) -> Int[Array, "n L"]:
        after = jnp.pad(row[:, 1:], ((0, 0), (0, 1)), constant_values=END)
        ranks = rank[row * codes + after]
        lowest = ranks.min(-1, keepdims=True)
        at = ranks.argmin(-1, keepdims=True)
        done = jnp.where(place < at, row, jnp.where(place == at, merged[lowest], after))
        return jnp.where(lowest < none, done, row)

    return jax.lax.fori_loop(0, size - 1, one, sequences)
