"""Opens a large dataset, and computes the statistics of its actions and proprioception: seconds and memory.

    python benchmarks/data_scale.py --steps=10000000 --shards=1000

It writes a synthetic dataset in a foreign layout to a temporary folder (1.7 GB for ten million steps): 14 actions and
14 numbers of proprioception, normally distributed, and an image of 2 x 2 pixels. Then the functions that training calls
open it and read it. Memory is the resident set of the process; TensorFlow is loaded before.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.mapping import DataMapping, Part
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.reading.statistics import dataset_statistics
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import run

NUMBERS = 14
LENGTH = 250  # steps of an episode
NAMES = tuple(f"joint_{index}" for index in range(NUMBERS))
MAPPING = DataMapping(
    name="synthetic",
    cameras={"front": "observation/image"},
    action=(Part("action", NAMES, "rad"),),
    proprio=(Part("observation/state", NAMES),),
    instruction=("language_instruction",),
)


def features() -> tfds.features.FeaturesDict:
    """Returns the features of the synthetic set."""
    vector = tfds.features.Tensor(shape=(NUMBERS,), dtype=np.float32)
    image = tfds.features.Tensor(shape=(2, 2, 3), dtype=np.uint8)
    return tfds.features.FeaturesDict({
        "steps": tfds.features.Dataset({
            "observation": {"image": image, "state": vector},
            "action": vector,
            "language_instruction": tfds.features.Text(),
        })
    })  # fmt: skip


def write(folder: Path, steps: int, shards: int) -> None:
    """Writes the dataset."""
    draw, episodes = np.random.default_rng(0), steps // LENGTH
    lengths = [episodes // shards + (index < episodes % shards) for index in range(shards)]
    for shard, count in enumerate(lengths):
        name = f"synthetic-train.tfrecord-{shard:05d}-of-{shards:05d}"
        with tf.io.TFRecordWriter(str(folder / name)) as writer:
            for _ in range(count):
                example = tf.train.Example()
                feature = example.features.feature
                for key in ("action", "observation/state"):
                    numbers = draw.normal(size=NUMBERS * LENGTH).astype(np.float32)
                    feature[f"steps/{key}"].float_list.value.extend(numbers.tolist())
                feature["steps/observation/image"].int64_list.value.extend([7] * 12 * LENGTH)
                text = f"task {draw.integers(50)}".encode()
                feature["steps/language_instruction"].bytes_list.value.extend([text] * LENGTH)
                writer.write(example.SerializeToString())
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="synthetic", split="train", filetype_suffix="tfrecord"
    )
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=lengths, num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features(), split_infos=[info])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(
            target=write, args=(Path(folder), flags.steps, flags.shards)
        )
        writer.start()
        writer.join()
        start = time.perf_counter()
        dataset = open_dataset(folder, MAPPING)
        opened = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        statistics = dataset_statistics(dataset)
        seconds = time.perf_counter() - opened
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "shards": flags.shards,
        "steps": statistics.num_steps,
        "open_seconds": round(opened - start, 2),
        "statistics_seconds": round(seconds, 1),
        "growth_megabytes": round((peak - before) / 1e3),
        "peak_megabytes": round(peak / 1e3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
