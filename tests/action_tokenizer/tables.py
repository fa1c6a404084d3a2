"""FAST tokenizers with random tables, which need no fitting."""

import jax.numpy as jnp
import numpy as np

from mllm_act.action_tokenizer import byte_pair
from mllm_act.action_tokenizer.fast import FastConfig, FastTokenizer


def random_merges(seed: int, symbols: int, count: int, longest: int = 100) -> np.ndarray:
    """Random merges of existing codes; two of them may make the same code."""
    rng = np.random.default_rng(seed)
    merges: list[tuple[int, int, int]] = []
    while len(merges) < count:
        expanded = byte_pair.expand(np.array(merges, np.int32).reshape(-1, 3), symbols)
        left, right = (int(code) for code in rng.integers(1, len(expanded), 2))
        merged = expanded[left] + expanded[right]
        if len(merged) > longest or any((left, right) == pair[:2] for pair in merges):
            continue
        code = expanded.index(merged) if merged in expanded else len(expanded)
        merges.append((left, right, code))
    return np.array(merges, np.int32)


def random_tokenizer(seed: int, config: FastConfig) -> FastTokenizer:
    """A tokenizer of the sizes of ``config``; if its merges make fewer codes, the others stand for one zero."""
    symbols, size = config.high - config.low + 1, config.chunk * config.action_dim
    merges = random_merges(seed, symbols, config.merges, size)
    expanded = byte_pair.expand(merges, symbols)
    expanded += [(1 - config.low,)] * (config.codes - len(expanded))
    coefficients = np.zeros((config.codes, size), np.int32)
    for code, symbols_of in enumerate(expanded):
        coefficients[code, : len(symbols_of)] = np.array(symbols_of, np.int32) - 1 + config.low
    tokenizer = FastTokenizer(config)
    tokenizer.merges[...] = jnp.array(merges)
    tokenizer.coefficients[...] = jnp.array(coefficients)
    tokenizer.lengths[...] = jnp.array([len(symbols_of) for symbols_of in expanded])
    return tokenizer
