"""Writes recorded demonstrations as RLDS, several files at a time.

Which episodes a file has, and in which order, follows from their names and sizes alone. So each file can be written by
another worker process, and its bytes do not depend on their number.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipelines.resumable import in_workers
from data_pipelines.tensorflow_cpu import tf
from data_pipelines.writing.builder import Demonstrations, example, features
from mllm_act.envs import spec

import tensorflow_datasets as tfds  # isort: skip
from tensorflow_datasets.core import example_serializer  # isort: skip

# Files are small, so that every process of a large run has several.
SHARD_BYTES = 32 * 2**20
FEW = 2  # files that are sooner written than another process has imported TensorFlow

Shard = tuple[list[str], str]  # the recorded episodes, and the file to write


def write(
    env: str, splits: Mapping[str, Sequence[Path]], folder: Path, workers: int, timeout: float
) -> Path:
    """Writes the dataset below ``folder`` and returns its own folder. Equal input gives equal files.

    Args:
      env: the environment.
      splits: the files of each split, as ``data_pipelines.writing.recording`` wrote them.
      folder: a new one.
      workers: how many processes write.
      timeout: seconds that a file may take.

    Raises:
      OSError: the folder cannot be written to, or the disk is full.
      UserError: a recorded episode is damaged, or a worker died.
    """
    builder = Demonstrations(env, splits, data_dir=folder)
    out = Path(builder.data_dir)
    out.mkdir(parents=True)
    planned: dict[str, list[Shard]] = {}
    for split, files in splits.items():
        template, parts = _template(env, split, out), divide(files)
        names = [
            str(template.sharded_filepath(shard_index=i, num_shards=len(parts)))
            for i in range(len(parts))
        ]
        planned[split] = [([str(f) for f in p], n) for p, n in zip(parts, names, strict=True)]
    todo = list(itertools.chain(*planned.values()))
    done: Iterable[tuple[Shard, int]]
    if workers == 1 or len(todo) <= FEW:
        write_shard = serve(env)
        done = ((shard, write_shard(shard)) for shard in todo)
    else:
        done = in_workers(
            "data_pipelines.shards:serve", todo, min(workers, len(todo)), timeout,
            request=lambda shard: shard, doing=lambda shard: f"writing {shard[1]}", env=env,
        )  # fmt: skip
    sizes = {shard[1]: size for shard, size in tqdm(done, "writing", len(todo), unit="file")}
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(files) for files, _ in shards],
            num_bytes=sum(sizes[name] for _, name in shards),
            filename_template=_template(env, split, out),
        )
        for split, shards in planned.items()
    ]
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(out)
    return out


def divide(files: Iterable[Path]) -> list[list[Path]]:
    """Returns the episodes of each shard, in a random order that depends on their names."""
    ordered = sorted(files, key=lambda file: hashlib.sha256(_name(file).encode()).digest())
    sizes = np.array([file.stat().st_size for file in ordered])
    number = max(1, round(sizes.sum() / SHARD_BYTES))
    shard = (np.cumsum(sizes) - 1) * number // sizes.sum()
    parts = [[ordered[i] for i in np.flatnonzero(shard == n)] for n in range(number)]
    return [part for part in parts if part]


def serve(env: str) -> Callable[[Shard], int]:
    """Returns a worker's handler (see ``mllm_act.envs.processes``): it writes a file, and returns its bytes."""
    layout = features(spec(env))
    serializer = example_serializer.ExampleSerializer(layout.get_serialized_info())

    def write_shard(shard: Shard) -> int:
        files, name = shard
        num_bytes = 0
        try:
            with tf.io.TFRecordWriter(name) as writer:
                for file in files:
                    _, content = example(Path(file))
                    record = serializer.serialize_example(layout.encode_example(content))
                    # Protobuf orders keys by a hash that differs in each process, unless it is told not to.
                    ordered = tf.train.Example.FromString(record).SerializeToString(
                        deterministic=True
                    )
                    writer.write(ordered)
                    num_bytes += len(ordered)
        except tf.errors.OpError as error:
            raise OSError(error.message.partition("\n")[0]) from None
        return num_bytes

    return write_shard


def _template(env: str, split: str, out: Path) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=out, dataset_name=env, split=split, filetype_suffix="tfrecord"
    )


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"
