"""Measures how long training data takes to go on at a late position, and whether the host's memory stays flat.

    python -m mllm_act.bench resume --data=DIR [--window=10000000] [--read=50000]

The episodes of DIR are listed as often as it takes for an epoch to have twice ``--window`` windows: the index is
synthetic, the records and images are real. The time is from a new iterator to its first batch at ``--window``. Then
``--read`` windows are read, and the resident memory is printed five times on the way.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np

from data_pipelines.reading.pipeline import TrainBatches, cores
from data_pipelines.reading.rlds import Dataset, open_dataset
from data_pipelines.reading.segments import Segments, keep_segments, segments_of
from mllm_act.files import user_path
from mllm_act.ranges import check_flags


def repeated(dataset: Dataset, split: str, times: int) -> Dataset:
    """Returns a dataset whose split lists its episodes several times; nothing is copied."""
    once, segments = dataset.split(split), segments_of(dataset, split)
    many = once.take(np.tile(np.arange(len(once)), times), split)
    result = dataclasses.replace(dataset, splits={**dataset.splits, split: many})
    found = Segments.of_counts(np.tile(segments.length, times), np.tile(segments.count, times))
    keep_segments(result, split, found, write=False)
    return result


def resident_megabytes() -> float:
    """Returns the resident memory of this process in 10^6 bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mllm_act.bench resume", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=user_path, required=True, help="RLDS dataset directory")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--context", type=int, default=3, help="steps per window")
    parser.add_argument("--window", type=int, default=10_000_000, help="the position to go on at")
    parser.add_argument("--read", type=int, default=50_000, help="windows to read from there")
    flags = parser.parse_args(argv)
    check_flags(flags)

    dataset = open_dataset(flags.data)
    once = int(segments_of(dataset, "train").windows(flags.context).sum())
    dataset = repeated(dataset, "train", -(-2 * flags.window // once))
    episodes = len(dataset.split("train"))
    print(f"{flags.data}: {episodes} episodes listed, {cores()} cores")

    began = time.perf_counter()
    batches = TrainBatches(
        dataset, "train", batch_size=flags.batch_size, context=flags.context, seed=0
    )
    made, processor = time.perf_counter(), time.process_time()
    window = flags.window - flags.window % flags.batch_size
    state = {**batches.state(), "window": window}
    batches.restore(state)
    next(batches)
    seconds, processor = time.perf_counter() - made, time.process_time() - processor
    print(
        f"first batch at window {window} after {seconds:.2f} s, {processor:.2f} s of the processor (and "
        f"{made - began:.2f} s to make the iterator), "
        f"state of {len(json.dumps(state))} bytes"
    )
    memory = []
    for _ in range(5):
        for _ in range(flags.read // flags.batch_size // 5):
            next(batches)
        memory.append(round(resident_megabytes()))
        print(f"window {batches.state()['window']}: {memory[-1]} MB resident")
    result = {
        "benchmark": "resume", "window": window, "seconds": round(seconds, 2), "processor_seconds": round(processor, 2),
        "state_bytes": len(json.dumps(state)),
        "episodes": episodes, "resident_megabytes": memory, "cores": cores(), "batch_size": flags.batch_size,
        "context": flags.context,
    }  # fmt: skip
    print(json.dumps(result))
