"""Byte pairs under jit give the same codes as the library that learns them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from mllm_act.action_tokenizer import byte_pair
from mllm_act.action_tokenizer.byte_pair import END
from tests.action_tokenizer.tables import random_merges

LENGTH, SYMBOLS, CODES = 12, 3, 24
MERGE = jax.jit(byte_pair.merge, static_argnums=2)


def rows(seed: int, count: int = 30) -> np.ndarray:
    """Sequences of all lengths; one symbol is more frequent, so that it forms runs."""
    rng = np.random.default_rng(seed)
    symbols = rng.choice([1, 2, 2, 2, 3], (count, LENGTH)).astype(np.int32)
    return np.where(np.arange(LENGTH) < rng.integers(0, LENGTH + 1, (count, 1)), symbols, END)


def by_the_library(sequences: np.ndarray, merges: np.ndarray) -> list[list[int]]:
    expanded = byte_pair.expand(merges, SYMBOLS)
    text = ["".join("?abc"[symbol] for symbol in symbols) for symbols in expanded]
    vocabulary = {word: code for code, word in enumerate(text) if code != END}
    pairs = [(text[left], text[right]) for left, right, _ in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    words = ["".join("?abc"[symbol] for symbol in row if symbol != END) for row in sequences]
    return [tokenizer.encode(word).ids for word in words]


def without_end(row: np.ndarray) -> list[int]:
    """The codes before the first END; only END may follow."""
    count = int((row != END).sum())
    assert (row[count:] == END).all()
    return row[:count].tolist()


def check(sequences: np.ndarray, merges: np.ndarray) -> None:
    merged = np.array(MERGE(sequences, merges, CODES))
    assert [without_end(row) for row in merged] == by_the_library(sequences, merges)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_random_merges_match_the_library(seed: int) -> None:
    """Also if two pairs make the same code, so that a pair can have a lower rank than the pairs it is made of."""
    check(rows(seed), random_merges(seed, SYMBOLS, 20))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_learnt_merges_match_the_library(seed: int) -> None:
    sequences = rows(seed, 100)
    merges = byte_pair.learn(sequences, SYMBOLS, CODES)
    assert merges.shape[1] == 3 and len(byte_pair.expand(merges, SYMBOLS)) <= CODES
    check(sequences, merges)
    check(rows(seed + 1), merges)


def test_the_most_frequent_pair_is_first_and_a_code_may_be_a_whole_sequence() -> None:
    sequences = np.array([[1, 2, 1, 2], [1, 2, 3, END], [1, 2, 1, 2]], np.int32)
    merges = byte_pair.learn(sequences, 3, 100)
    np.testing.assert_array_equal(merges, [[1, 2, 4], [4, 4, 5]])  # [4, 3] occurs once
    assert byte_pair.expand(merges, 3) == [(), (1,), (2,), (3,), (1, 2), (1, 2, 1, 2)]
    np.testing.assert_array_equal(
        MERGE(sequences, merges, 6), [[5, END, END, END], [4, 3, END, END], [5, END, END, END]]
    )


@pytest.mark.parametrize("length", [1, 4])
def test_nothing_to_merge(length: int) -> None:
    sequences = np.full((2, length), END, np.int32)
    sequences[0] = 1
    merges = byte_pair.learn(sequences[:, :1], 2, 50)
    assert merges.shape == (0, 3)
    np.testing.assert_array_equal(MERGE(sequences, merges, 3), sequences)


def test_batches_trace_under_vmap() -> None:
    sequences, merges = rows(0), random_merges(0, SYMBOLS, 20)
    by_row = jax.vmap(lambda row: partial(MERGE, codes=CODES)(row[None], jnp.array(merges))[0])
    np.testing.assert_array_equal(by_row(sequences), MERGE(sequences, merges, CODES))
