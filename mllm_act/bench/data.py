"""Compares the throughput of the training pipeline with that of a minimal reader of the same files.

    python -m mllm_act.bench data --data=DIR [--mapping=my_robot.py]

Both read the same split on the same cores with the same thread pool, alternately, each with a
warm-up that is not timed. The minimal reader only reads TFRecords, parses their images and decodes
one episode at a time: no windows, no shuffling, no batches, no numpy. The pipeline does everything
that training needs. Padding does not count as frames. CPU time per frame is reported as well,
because other programs on the machine affect it less than the rate.
"""

import argparse
import json
import time
from collections.abc import Iterator
from statistics import median

import tensorflow_datasets as tfds

from data_pipelines.reading.episodes import read_segments
from data_pipelines.reading.layout import STEPS
from data_pipelines.reading.pipeline import TrainBatches, cores, options
from data_pipelines.reading.rlds import Dataset, open_dataset
from data_pipelines.reading.splits import Split
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from mllm_act.files import user_path
from mllm_act.ranges import check_flags


def bare_frames(dataset: Dataset, split: Split) -> Iterator[int]:
    """Reads and decodes the images of a split, repeatedly; yields the number of frames of each episode.

    Raises:
      UserError: images are not JPEG or PNG, or files not TFRecords.
    """
    keys = [STEPS + key for key in dataset.layout.mapping.cameras.values()]
    encoded = all(isinstance(dataset.layout.features[key], tfds.features.Image) for key in keys)
    if not encoded or split.file_format != "tfrecord":
        raise UserError(
            f"{dataset.directory}: expected JPEG or PNG images in TFRecord files, to compare with a minimal reader of "
            "these, found others; convert a copy with tfds convert_format"
        )
    spec = {key: tf.io.FixedLenSequenceFeature((), tf.string, allow_missing=True) for key in keys}

    def decode(record: tf.Tensor) -> list[tf.Tensor]:
        return [
            # despite its name it decodes PNG, too
            tf.map_fn(tf.io.decode_jpeg, encoded, fn_output_signature=tf.uint8)
            for encoded in tf.io.parse_single_example(record, spec).values()
        ]

    episodes = (
        tf.data.TFRecordDataset([str(file) for file in split.files])
        .repeat()
        .map(decode, num_parallel_calls=max(2, cores()))
        .with_options(options())
    )
    for images in episodes:
        yield int(images[0].shape[0])


def pipeline_frames(dataset: Dataset, split: str, batch_size: int, context: int) -> Iterator[int]:
    """Runs the training pipeline; yields the number of frames of each batch."""
    batches = TrainBatches(dataset, split, batch_size=batch_size, context=context, seed=0)
    for batch in batches:
        yield int(batch["mask"].sum())


def measure(frames: Iterator[int], count: int, warm_up: int) -> tuple[float, float]:
    """Returns frames per second, and CPU microseconds per frame, over at least ``count`` frames.

    ``warm_up`` frames are read first, to use up what was prefetched while the other reader ran.
    """
    while warm_up > 0:
        warm_up -= next(frames)
    wall_start, cpu_start, total = time.perf_counter(), time.process_time(), 0
    while total < count:
        total += next(frames)
    cpu_seconds = time.process_time() - cpu_start
    return total / (time.perf_counter() - wall_start), 1e6 * cpu_seconds / total


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m mllm_act.bench data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", type=user_path, required=True, help="RLDS dataset directory")
    parser.add_argument("--mapping", default="", help="a file, or a name in configs/robots")
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--context", type=int, default=3, help="steps per window")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements")
    flags = parser.parse_args(argv)
    check_flags(flags)

    dataset = open_dataset(flags.data, flags.mapping)
    split = dataset.split(flags.split)
    epoch = int(read_segments(dataset, flags.split)[1].sum())
    count = max(epoch, 5000)  # small datasets are read several times
    warm_up = max(1000, 8 * flags.batch_size * flags.context)
    bare = bare_frames(dataset, split)
    pipeline = pipeline_frames(dataset, flags.split, flags.batch_size, flags.context)
    size = split.num_bytes / epoch / 1e3
    print(f"{flags.data}: {epoch} frames, {size:.1f} kB per frame, {cores()} cores")
    print("  bare: frames/s  us/frame   pipeline: frames/s  us/frame   ratio of frames/s")
    rows = []
    for _ in range(flags.repeats):
        rows.append((*measure(bare, count, warm_up), *measure(pipeline, count, warm_up)))
        row = rows[-1]
        print(f"{row[0]:16.0f}{row[1]:10.0f}{row[2]:21.0f}{row[3]:10.0f}{row[2] / row[0]:20.3f}")
    medians = [median(column) for column in zip(*rows, strict=True)]
    result = {
        "benchmark": "data",
        "bare_frames_per_s": round(medians[0]),
        "pipeline_frames_per_s": round(medians[2]),
        "ratio": round(median(row[2] / row[0] for row in rows), 3),
        "bare_cpu_us_per_frame": round(medians[1]),
        "pipeline_cpu_us_per_frame": round(medians[3]),
        "frames": epoch,
        "cores": cores(),
        "batch_size": flags.batch_size,
        "context": flags.context,
    }
    print(
        f"median: bare {result['bare_frames_per_s']} frames/s, pipeline "
        f"{result['pipeline_frames_per_s']} frames/s, ratio {result['ratio']} (target: 0.8)"
    )
    print(json.dumps(result))
