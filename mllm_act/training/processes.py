"""Messages between the processes of a run."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines.reading.statistics import Processes


def processes() -> Processes:
    """Returns the processes of this run, to read a dataset together."""
    return Processes(jax.process_index(), jax.process_count(), _exchange)


def _exchange(message: bytes) -> Iterator[bytes]:
    """Yields the message of each process in order, one at a time, so that memory does not grow with their number."""
    if jax.process_count() == 1:
        yield message
        return
    for process in range(jax.process_count()):
        mine = process == jax.process_index()
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message)), mine))
        content = np.zeros(size, np.uint8)
        if mine:
            content[:] = np.frombuffer(message, np.uint8)
        yield np.asarray(multihost_utils.broadcast_one_to_all(content, mine)).tobytes()
