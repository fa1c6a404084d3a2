"""Batches of windows from an RLDS dataset: ``TrainBatches`` is endless, ``EvalBatches`` makes one pass.

Windows are cut as ``windows`` says. Every step is in exactly one of them per epoch. In training, episodes are cut at an
offset drawn for each episode and epoch, so that over the epochs a step appears at every position of a window.

A batch is a dict of numpy arrays, which are read-only if they share TensorFlow's memory:
  images       {camera: uint8[B, T, H, W, 3]}  as stored; the model resizes them on the device
  proprio      float32[B, T, P]
  action       float32[B, T, H * A]            in the environment's own units
  mask         bool[B, T]
  instruction  object[B] of bytes
  task         object[B] of bytes

Stages: episodes in random order -> their records, ``RECORDS_AT_ONCE`` at a time -> encoded windows -> shuffle buffer
-> batches of encoded windows -> images decoded in parallel -> numpy. Order and content depend only on the seed and the
files, never on threads or timing. The position is (epoch, window). Restoring it cuts and shuffles the encoded windows
of that epoch again, without decoding images.

``host_memory_megabytes`` bounds the memory of the host: the shuffle buffer, the files being read, and the decoded
batches that are prefetched, being built or in use by the caller. It is the growth of the process's resident set;
TensorFlow itself takes another 0.65 GB.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.reading.episodes import READ_ERRORS, explain, read_segments
from data_pipelines.reading.layout import decode_image
from data_pipelines.reading.rlds import Dataset
from data_pipelines.reading.splits import Split
from data_pipelines.reading.windows import Arrays, cut
from data_pipelines.tensorflow_cpu import as_written, tf
from mllm_act.errors import UserError
from mllm_act.normalization import expect_chunk

RECORDS_AT_ONCE = 8
BATCHES_AHEAD = 2
BATCHES_DECODING = 2
_WINDOW_OVERHEAD = 1024  # bytes per encoded window, for tensor headers and allocation
_SLACK_MEGABYTES = 32  # fragmentation by the allocator, measured


def _decode(windows: Arrays, dataset: Dataset) -> Arrays:
    """Decodes the images of a batch of windows with TensorFlow's default decoder, as acting does.

    One map over all B * T positions writes every image once into the batch. Cutting windows after decoding, or stacking
    them one by one, would copy every image again (docs/experiments.md).
    """
    mask = tf.reshape(windows["mask"], [-1])
    images = {}
    for camera, shape in dataset.image_shapes.items():

        def decode(position: tuple[tf.Tensor, tf.Tensor], shape: tuple = shape) -> tf.Tensor:
            encoded, valid = position

            return tf.cond(
                valid, lambda: decode_image(encoded, shape), lambda: tf.zeros(shape, tf.uint8)
            )

        encoded = windows["images"][camera]
        decoded = tf.map_fn(
            decode,
            (tf.reshape(encoded, [-1]), mask),
            fn_output_signature=tf.TensorSpec(shape, tf.uint8),
            parallel_iterations=max(4, cores()),
        )
        images[camera] = tf.reshape(decoded, (*encoded.shape, *shape))
    return {**windows, "images": images}


def _batches(windows: tf.data.Dataset, dataset: Dataset, batch_size: int) -> tf.data.Dataset:
    decode = as_written(lambda batch: _decode(batch, dataset))
    return (
        windows.batch(batch_size, drop_remainder=True)
        .prefetch(BATCHES_AHEAD)  # encoded, so that reading does not wait for decoding
        .map(decode, num_parallel_calls=BATCHES_DECODING)
        .prefetch(BATCHES_AHEAD)
        .with_options(options())
    )


def options() -> tf.data.Options:
    """Returns options for a deterministic order, and bounded memory and threads, on any host."""
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # fixed parallelism and buffers
    options.threading.private_threadpool_size = max(2, cores())
    options.threading.max_intra_op_parallelism = 1
    return options


def cores() -> int:
    """Returns the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expect_memory(settings: str, megabytes: float) -> None:
    """Raises ``UserError``, which names ``settings``, if the host has less memory than ``megabytes``."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    if megabytes > installed:
        raise UserError(
            f"{settings}: expected to need at most the host's {installed:.0f} MB, found {megabytes:.0f} MB; "
            "lower either"
        )


class TrainBatches(Iterator[Arrays]):
    """An endless iterator over shuffled batches; all processes together read every step once per epoch.

    A batch may span two epochs, so no window is dropped and no batch is padded.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        context: int,
        seed: int,
        chunk: int = 1,
        shuffle_megabytes: int = 256,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Reads about 16 episodes, to estimate the size of a window.

        Args:
          batch_size: windows per batch of this process.
          shuffle_megabytes: size of the shuffle buffer, in 10^6 bytes. Its number of windows follows from the mean size
            of an encoded window, plus the actions that chunks add and 1 kB of overhead.

        Raises:
          UserError: ``chunk`` is below 1, the split does not exist, there are fewer episodes than processes, or the
            host has too little memory.
        """
        expect_chunk(chunk)
        self._dataset = dataset
        self._split = dataset.split(split)
        if len(self._split) < process_count:
            raise UserError(
                f"{dataset.directory}: split {split!r}: expected at least one episode for each of "
                f"{process_count} processes, found {len(self._split)}; start at most that many processes"
            )
        self._episodes = np.arange(process_index, len(self._split), process_count)
        self._batch_size = batch_size
        self._context, self._chunk = context, chunk
        self._seed, self._shuffle_megabytes = seed, shuffle_megabytes
        self._settings: dict[str, Any] = {
            "fingerprint": self._split.fingerprint,
            "context": context,
            "chunk": chunk,
            "seed": seed,
            "shuffle_megabytes": shuffle_megabytes,
            "process_index": process_index,
            "process_count": process_count,
        }
        steps, encoded = _sample(dataset, self._split)
        growth = (
            1 + 4 * (chunk - 1) * dataset.action_dim * steps / encoded
        )  # of a window, by chunks
        window_bytes = encoded * growth / steps * context + _WINDOW_OVERHEAD
        self.shuffle_windows = max(1, int(shuffle_megabytes * 1e6 / window_bytes))
        self.host_memory_megabytes = self._memory(growth)
        expect_memory(
            f"shuffle_megabytes={shuffle_megabytes}, batch_size={batch_size}",
            self.host_memory_megabytes,
        )
        self._epoch, self._window = 0, 0
        self._iterator: Iterator[Arrays] | None = None

    def __next__(self) -> Arrays:
        """Returns the next batch. Raises ``UserError`` with file, record and cause if a record is bad."""
        if self._iterator is None:
            self._iterator = iter(self._build().as_numpy_iterator())
        try:
            batch = next(self._iterator)
        except READ_ERRORS as error:
            raise explain(self._dataset, self._split, error) from None
        self._epoch = int(batch.pop("epoch")[-1])
        self._window = int(batch.pop("window")[-1]) + 1
        return _with_proprio(batch)

    @property
    def epoch(self) -> int:
        """The epoch of the last window of the last batch returned."""
        return self._epoch

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch returned, as plain JSON types."""
        return {**self._settings, "epoch": self._epoch, "window": self._window}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues bit for bit after the batch at which ``state()`` was called.

        Raises:
          UserError: the state is of other data, or of a different setting that the order depends on.
        """
        for key, value in self._settings.items():
            if state.get(key) != value:
                raise UserError(
                    f"data iterator state: {key}: expected {state.get(key)!r} that it was saved with, "
                    f"found {value!r}; resume with the data and settings of the checkpoint"
                )
        self._epoch, self._window = int(state["epoch"]), int(state["window"])
        self._iterator = None

    def _build(self) -> tf.data.Dataset:
        start_epoch, start_window = self._epoch, self._window
        seed, context, chunk = self._seed, self._context, self._chunk

        def cut_at_random(number: tf.Tensor, record: tf.Tensor, epoch_seed: tf.Tensor) -> Arrays:
            episode_seed = tf.random.experimental.stateless_fold_in(epoch_seed, number)
            return cut(record, self._dataset.layout, context, chunk, episode_seed)

        @as_written
        def epoch_windows(epoch: tf.Tensor) -> tf.data.Dataset:
            epoch_seed = tf.stack([tf.constant(seed, tf.int64), epoch])
            episodes = tf.constant(self._episodes, tf.int64)
            order = tf.random.experimental.stateless_shuffle(episodes, epoch_seed)
            windows = (
                self._split.records(order, RECORDS_AT_ONCE)
                .map(lambda number, record: cut_at_random(number, record, epoch_seed))
                .unbatch()
            )
            shuffle_seed = tf.random.stateless_uniform((), epoch_seed, None, None, tf.int64)
            return (
                windows.shuffle(self.shuffle_windows, seed=shuffle_seed)
                .enumerate()
                .skip(tf.where(epoch == start_epoch, tf.constant(start_window, tf.int64), 0))
                .map(lambda window, content: {**content, "epoch": epoch, "window": window})
            )

        epochs = tf.data.Dataset.range(start_epoch, np.iinfo(np.int64).max)
        return _batches(epochs.flat_map(epoch_windows), self._dataset, self._batch_size)

    def _memory(self, growth: float) -> float:
        """Returns the megabytes of the shuffle buffer, the records being read (raw and parsed), and the batches."""
        record = self._split.num_bytes / len(self._split)
        images = sum(int(np.prod(shape)) for shape in self._dataset.image_shapes.values())
        chunk = 4 * self._chunk * self._dataset.action_dim
        batch = self._batch_size * self._context * (images + chunk)
        # A batch being decoded counts twice: its images, and the array that they are copied to.
        batches = BATCHES_AHEAD + 2 * BATCHES_DECODING + 2
        reading = 2 * growth * record + RECORDS_AT_ONCE * (record + 2**18)
        return self._shuffle_megabytes + _SLACK_MEGABYTES + (reading + batches * batch) / 1e6


class EvalBatches:
    """One pass over a split in file order, without shuffling, each time it is iterated.

    Reads all windows, or about ``windows`` of them, evenly spaced. The first window of an episode starts at its first
    step. The last batch is padded with windows of zeros whose mask is False. Every process has the same number of
    batches (``len``), so that none waits forever in a collective operation; a process without files has only padding.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        batch_size: int,
        context: int,
        chunk: int = 1,
        windows: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Reads the split once, without images, to count its windows.

        Raises:
          UserError: ``chunk`` is below 1, the split does not exist, or a record is bad.
        """
        expect_chunk(chunk)
        self._dataset = dataset
        self._split = dataset.split(split)
        self._episodes = np.arange(process_index, len(self._split), process_count)
        self._batch_size, self._context, self._chunk = batch_size, context, chunk
        episode, steps = read_segments(dataset, split)
        per_episode = np.bincount(episode, weights=-(-steps // context)).astype(int)
        self._stride = max(1, int(per_episode.sum()) // windows) if windows else 1
        largest_share = max(
            int(per_episode[index::process_count].sum()) for index in range(process_count)
        )
        count = -(-largest_share // self._stride)
        self._batches = -(-count // batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Arrays]:
        layout, context, chunk = self._dataset.layout, self._context, self._chunk
        windows = (
            self._split.records(tf.constant(self._episodes, tf.int64))
            .map(as_written(lambda number, record: cut(record, layout, context, chunk)))
            .unbatch()
            .shard(self._stride, 0)  # skips windows before their images are decoded
        )
        empty = {
            key: tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), specs)
            for key, specs in windows.element_spec.items()
        }
        padding = tf.data.Dataset.from_tensors(empty).repeat()
        windows = windows.concatenate(padding).take(self._batches * self._batch_size)
        try:
            batches = _batches(windows, self._dataset, self._batch_size).as_numpy_iterator()
            yield from map(_with_proprio, batches)
        except READ_ERRORS as error:
            raise explain(self._dataset, self._split, error) from None


def _with_proprio(batch: Arrays) -> Arrays:
    """Adds proprioception of width 0 where there is none."""
    return {"proprio": np.zeros((*batch["mask"].shape, 0), np.float32), **batch}


def _sample(dataset: Dataset, split: Split) -> tuple[int, int]:
    """Returns the steps and encoded bytes of about 16 episodes."""
    steps = encoded = 0
    order = tf.range(0, len(split), max(1, len(split) // 16), tf.int64)
    try:
        for _, record in split.records(order):
            steps += len(dataset.layout.parse(record)["action"])
            encoded += len(record.numpy())
    except READ_ERRORS as error:
        raise explain(dataset, split, error) from None
    if not steps:
        raise explain(dataset, split, ValueError("no steps"))
    return steps, encoded
