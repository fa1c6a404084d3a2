"""Batches of windows from an RLDS dataset: ``TrainBatches`` is endless, ``EvalBatches`` makes one pass.

Windows are cut as ``windows`` says. Every step is in exactly one of them per epoch. In training, episodes are cut at an
offset drawn for each episode and epoch, so that over the epochs a step appears at every position of a window.

A batch is a dict of numpy arrays, which are read-only if they share TensorFlow's memory:
  images       {camera: uint8[B, T, H, W, 3]}  as stored; the model resizes them on the device. With ``packed``
               uint8[N, H, W, 3]: the N that ``mask`` says exist, in its order, row by row
  proprio      float32[B, T, P]
  action       float32[B, T, H * A]            in the environment's own units
  mask         bool[B, T]
  instruction  object[B] of bytes
  task         object[B] of bytes

Stages: blocks of episodes (see ``order``) -> their records, ``RECORDS_AT_ONCE`` at a time -> encoded windows, in the
order of reading -> batches of encoded windows -> images decoded in parallel -> numpy. Order and content depend only on
the seed, the size of the whole batch and the files: never on threads, timing, or how many processes share the batch.
The position is a number of windows. Restoring it reads one block.

``host_memory_megabytes`` bounds the memory of the host: the block being read out and the one being filled, the files
being read, and the decoded batches that are prefetched, being built or in use by the caller. It is the growth of the
process's resident set; TensorFlow itself takes another 0.65 GB.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.reading.episodes import READ_ERRORS, explain
from data_pipelines.reading.layout import decode_image
from data_pipelines.reading.order import Block, Order, Position
from data_pipelines.reading.rlds import Dataset
from data_pipelines.reading.segments import segments_of
from data_pipelines.reading.splits import Split
from data_pipelines.reading.windows import Arrays, cut
from data_pipelines.tensorflow_cpu import as_written, close_at_exit, tf
from mllm_act.errors import UserError
from mllm_act.normalization import expect_chunk

RECORDS_AT_ONCE = 8
BATCHES_AHEAD = 2
BATCHES_DECODING = 2
_WINDOW_OVERHEAD = 1024  # bytes per encoded window, for tensor headers and allocation
_SLACK_MEGABYTES = 32  # fragmentation by the allocator, measured


def _decode(windows: Arrays, dataset: Dataset, packed: bool) -> Arrays:
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
        if packed:
            images[camera] = tf.map_fn(
                lambda x, shape=shape: decode_image(x, shape),
                tf.boolean_mask(encoded, windows["mask"]),
                fn_output_signature=tf.TensorSpec(shape, tf.uint8),
                parallel_iterations=max(4, cores()),
            )
            continue
        decoded = tf.map_fn(
            decode,
            (tf.reshape(encoded, [-1]), mask),
            fn_output_signature=tf.TensorSpec(shape, tf.uint8),
            parallel_iterations=max(4, cores()),
        )
        images[camera] = tf.reshape(decoded, (*encoded.shape, *shape))
    return {**windows, "images": images}


def _batches(
    windows: tf.data.Dataset, dataset: Dataset, batch_size: int, packed: bool
) -> tf.data.Dataset:
    decode = as_written(lambda batch: _decode(batch, dataset, packed))
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
        packed: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Reads about 16 episodes, to estimate the size of a window; and all of them, without images, the first time.

        Args:
          batch_size: windows per batch, over all processes; of these, each process reads an equal part, to one window.
          shuffle_megabytes: size of two blocks, over all processes, in 10^6 bytes. Their number of windows follows from
            the mean size of an encoded window, plus the actions that chunks add and 1 kB of overhead.
          packed: leave out the images of padding.

        Raises:
          UserError: ``chunk`` is below 1, the split does not exist, there are fewer windows than processes, or the host
            has too little memory.
        """
        expect_chunk(chunk)
        self._dataset = dataset
        self._split = dataset.split(split)
        first, end = (batch_size * (process_index + i) // process_count for i in (0, 1))
        self._own = (first, end)
        self._rows = self._own[1] - self._own[0]
        if not self._rows:
            raise UserError(
                f"config.data.batch_size: expected a window for each of {process_count} processes, found {batch_size} "
                "windows; raise it"
            )
        self._batch_size, self._context, self._chunk = batch_size, context, chunk
        self._seed, self._packed = seed, packed
        self._settings: dict[str, Any] = {
            "fingerprint": self._split.fingerprint,
            "batch_size": batch_size,
            "context": context,
            "chunk": chunk,
            "seed": seed,
            "shuffle_megabytes": shuffle_megabytes,
        }
        steps, encoded = _sample(dataset, self._split)
        growth = (
            1 + 4 * (chunk - 1) * dataset.action_dim * steps / encoded
        )  # of a window, by chunks
        window_bytes = encoded * growth / steps * context + _WINDOW_OVERHEAD
        self.shuffle_windows = max(1, int(shuffle_megabytes * 1e6 / window_bytes))
        self._order = Order(
            segments_of(dataset, split), context, seed, batch_size, self.shuffle_windows // 2
        )
        blocks = 2e-6 * self._order.block_windows * window_bytes * self._rows / batch_size
        self.host_memory_megabytes = self._memory(growth, blocks)
        expect_memory(
            f"shuffle_megabytes={shuffle_megabytes}, batch_size={batch_size}",
            self.host_memory_megabytes,
        )
        self._position = Position(self._order)
        self._iterator: Iterator[Arrays] | None = None
        close_at_exit(self)

    def __next__(self) -> Arrays:
        """Returns the next batch. Raises ``UserError`` with file, record and cause if a record is bad."""
        if self._iterator is None:
            self._iterator = iter(self._build().as_numpy_iterator())
        try:
            batch = next(self._iterator)
        except READ_ERRORS as error:
            raise explain(self._dataset, self._split, error) from None
        self._position.advance(self._batch_size)
        return _with_proprio(batch)

    @property
    def epoch(self) -> int:
        """The epoch of the last window of the last batch returned, over all processes."""
        return self._position.epoch

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch returned, as plain JSON types; the same in all processes.

        ``window`` is how many windows all processes have read; ``epoch`` began at the window ``begins``.
        """
        now = self._position
        return {**self._settings, "epoch": now.epoch, "begins": now.begins, "window": now.window}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues bit for bit after the batch at which ``state()`` was called, in any number of processes.

        Raises:
          UserError: the state is of other data, or of a different setting that the order depends on.
        """
        for key, value in self._settings.items():
            if state.get(key) != value:
                raise UserError(
                    f"data iterator state: {key}: expected {state.get(key)!r} that it was saved with, "
                    f"found {value!r}; resume with the data and settings of the checkpoint"
                )
        place = {key: int(state[key]) for key in ("epoch", "begins", "window")}
        self._position = Position(self._order, **place)
        self.close()

    def close(self) -> None:
        """Ends reading; ``next`` would begin again at the same position."""
        self._iterator = None

    def _build(self) -> tf.data.Dataset:
        start = (self._position.epoch, self._position.begins, self._position.window)
        layout, context, chunk = self._dataset.layout, self._context, self._chunk

        def plans() -> Iterator[tuple[Any, ...]]:
            for block in self._order.blocks(*start, own=self._own):
                yield tuple(getattr(block, field.name) for field in dataclasses.fields(Block))

        @as_written
        def read(
            epoch: tf.Tensor,
            episodes: tf.Tensor,
            offsets: tf.Tensor,
            skip: tf.Tensor,
            order: tf.Tensor,
        ) -> tuple[Arrays, tf.Tensor]:
            seed = tf.stack([tf.constant(self._seed, tf.int64), epoch])

            @as_written
            def cut_one(numbered: tuple[tf.Tensor, tf.Tensor], offset: tf.Tensor) -> Arrays:
                number, record = numbered
                own = tf.random.experimental.stateless_fold_in(seed, number)
                return cut(record, layout, context, chunk, offset, own)

            records = self._split.records(episodes, RECORDS_AT_ONCE)
            count = tf.reduce_max(order) + 1
            windows = (
                tf.data.Dataset.zip(records, tf.data.Dataset.from_tensor_slices(offsets))
                .map(cut_one)
                .unbatch()
                .skip(skip)
                .take(count)
                .batch(count)
            )
            return windows.get_single_element(), order

        vector = tf.TensorSpec([None], tf.int64)
        signature = (
            tf.TensorSpec([], tf.int64), vector, tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int64), vector,
        )  # fmt: skip

        @as_written
        def in_order(windows: Arrays, order: tf.Tensor) -> tf.data.Dataset:
            return tf.data.Dataset.from_tensor_slices(order).map(
                as_written(lambda i: tf.nest.map_structure(lambda x: tf.gather(x, i), windows))
            )

        blocks = tf.data.Dataset.from_generator(plans, output_signature=signature)
        # The next block is filled while this one is read out.
        windows = blocks.map(read).prefetch(1).flat_map(in_order)
        return _batches(windows, self._dataset, self._rows, self._packed)

    def _memory(self, growth: float, blocks: float) -> float:
        """Returns the megabytes of the blocks, the records being read (raw and parsed), and the batches."""
        record = self._split.num_bytes / len(self._split)
        images = sum(int(np.prod(shape)) for shape in self._dataset.image_shapes.values())
        chunk = 4 * self._chunk * self._dataset.action_dim
        batch = self._rows * self._context * (images + chunk)
        # A batch being decoded counts twice: its images, and the array that they are copied to.
        batches = BATCHES_AHEAD + 2 * BATCHES_DECODING + 2
        reading = 2 * growth * record + RECORDS_AT_ONCE * (record + 2**18)
        return blocks + _SLACK_MEGABYTES + (reading + batches * batch) / 1e6


class EvalBatches:
    """One pass over a split in file order, without shuffling, each time it is iterated.

    Reads all windows, or about ``windows`` of them, evenly spaced. The first window of an episode starts at its first
    step. The last batch is padded with windows of zeros whose mask is False. Every process has the same number of
    batches (``len``), so that none waits forever in a collective operation; together they read the windows that one
    process would.
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
        packed: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Reads the split without images, the first time, to count its windows.

        Args:
          batch_size: windows per batch of this process.
          windows: about how many to read; None for all.
          packed: leave out the images of padding.

        Raises:
          UserError: ``chunk`` is below 1, the split does not exist, or a record is bad.
        """
        expect_chunk(chunk)
        self._dataset = dataset
        self._split = dataset.split(split)
        self._batch_size, self._context, self._chunk = batch_size, context, chunk
        self._packed = packed
        ends = np.cumsum(segments_of(dataset, split).windows(context))
        self._stride = max(1, int(ends[-1]) // windows) if windows else 1
        chosen = np.arange(0, ends[-1], self._stride)
        self._batches = -(-len(chosen) // (batch_size * process_count))
        share = self._batches * batch_size
        own = chosen[process_index * share : (process_index + 1) * share]
        self._episodes, self._skip = np.arange(0), 0
        if len(own):
            first, last = np.searchsorted(ends, own[[0, -1]], side="right")
            self._episodes = np.arange(first, last + 1)
            self._skip = int(own[0] - (ends[first - 1] if first else 0))
        self._windows = len(own)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Arrays]:
        layout, context, chunk = self._dataset.layout, self._context, self._chunk
        windows = (
            self._split.records(tf.constant(self._episodes, tf.int64))
            .map(as_written(lambda number, record: cut(record, layout, context, chunk)))
            .unbatch()
            .skip(self._skip)
            .shard(self._stride, 0)  # skips windows before their images are decoded
            .take(self._windows)
        )
        empty = {
            key: tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), specs)
            for key, specs in windows.element_spec.items()
        }
        padding = tf.data.Dataset.from_tensors(empty).repeat()
        windows = windows.concatenate(padding).take(self._batches * self._batch_size)
        try:
            batches = _batches(windows, self._dataset, self._batch_size, self._packed)
            yield from map(_with_proprio, batches.as_numpy_iterator())
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
