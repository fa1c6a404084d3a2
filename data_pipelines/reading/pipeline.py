"""Batches of windows from an RLDS dataset: ``TrainBatches`` without end, ``EvalBatches`` one pass.

A window is ``context`` steps of one episode; each step of an episode is in exactly one window of
an epoch. In training the cut starts at a random offset of each episode and epoch, so that a step
is seen at every place of a window over the epochs. A window that reaches its episode's end, and one
that ends at the offset, is shorter: it is padded at its end with zeros and ``mask`` False.

The action of a step is a chunk where ``chunk`` H > 1: its own and the H - 1 that follow in the
episode, also those beyond the window, in one vector, time first (``action.reshape(H, A)``). Past
the episode's end its last action is repeated; nothing is masked there.

A batch is a dict of numpy arrays, read-only where they share TensorFlow's memory:
  images       {camera: uint8[B, T, H, W, 3]}  as stored; resizing is the model's, on the device
  proprio      float32[B, T, P]
  action       float32[B, T, H * A]            in the environment's own numbers
  mask         bool[B, T]
  instruction  object[B] of bytes
  task         object[B] of bytes

The way of the data: files in random order -> records of ``FILES_AT_ONCE`` files in turn -> encoded
windows -> shuffle buffer -> batches of encoded windows -> pictures decoded in parallel -> numpy.
Order and content depend on the seed and the files alone, never on threads or timing. The position
is (epoch, window): restoring it cuts and shuffles the epoch's encoded windows again, decoding
nothing.

Host memory is bounded by ``host_memory_mb``: the shuffle buffer as stated, the files being read,
and the decoded batches that are prefetched, in the making and in the reader's hands. Measured, it
is the growth of the process's resident size; TensorFlow itself takes 0.65 GB beside it.
"""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.reading.episodes import explain, parse, read_actions
from data_pipelines.reading.rlds import Dataset, Split
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError
from mllm_act.normalization import expect_chunk

FILES_AT_ONCE = 16
BATCHES_AHEAD = 2
BATCHES_DECODING = 2
_WINDOW_OVERHEAD = 1024  # bytes of tensor headers and allocation around an encoded window
_SLACK_MB = 32  # the allocator's fragmentation, as measured

Batch = dict[str, Any]


def window_index(length: tf.Tensor, offset: tf.Tensor, context: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Cuts an episode of ``length`` >= 1 steps into windows, the first ending at ``offset``.

    Returns:
      int32[W, T] the step at each place, and bool[W, T] whether there is one (else the step is the
      episode's last). The windows hold every step once, in order; places without are at the end.
    """
    starts = tf.range(tf.where(offset > 0, offset - context, 0), length, context)
    ends = tf.minimum(starts + context, length)
    index = tf.maximum(starts, 0)[:, None] + tf.range(context)
    return tf.minimum(index, length - 1), index < ends[:, None]


@dataclasses.dataclass(frozen=True)
class _Share:
    """The files one process reads; ``first[i]`` numbers the first record of file i in the split."""

    files: list[str]
    first: list[int]


def _share(split: Split, process_index: int, process_count: int) -> _Share:
    first = np.cumsum((0, *split.episodes))[:-1]
    return _Share(
        files=[str(file) for file in split.files[process_index::process_count]],
        first=[int(number) for number in first[process_index::process_count]],
    )


def _chunks(action: tf.Tensor, chunk: int) -> tf.Tensor:
    """Returns float32[L, H * A] of float32[L, A]; the index stops at the episode's last step."""
    length, actions = tf.shape(action)[0], action.shape[1]
    index = tf.range(length)[:, None] + tf.range(chunk)
    return tf.reshape(tf.gather(action, tf.minimum(index, length - 1)), (-1, chunk * actions))


def _cut(record: tf.Tensor, dataset: Dataset, offset: tf.Tensor, context: int, chunk: int) -> Batch:
    """Cuts one stored episode into W windows of encoded images, and checks it."""
    episode = parse(record, dataset)
    length = tf.shape(episode["action"])[0]
    checks = [tf.debugging.assert_positive(length, "an episode without steps")]
    for key in (episode["proprio"], episode["instruction"], *episode["images"].values()):
        checks.append(tf.debugging.assert_equal(tf.shape(key)[0], length, "steps missing"))
    for key in (episode["action"], episode["proprio"]):
        checks.append(tf.debugging.assert_all_finite(key, "not finite"))
    with tf.control_dependencies([check for check in checks if check is not None]):
        index, mask = window_index(length, offset, context)
    count = tf.shape(index)[0]

    def numbers(values: tf.Tensor) -> tf.Tensor:
        return tf.where(mask[..., None], tf.gather(values, index), 0.0)

    return {
        "images": {
            camera: tf.where(mask, tf.gather(encoded, index), "")
            for camera, encoded in episode["images"].items()
        },
        "proprio": numbers(episode["proprio"]),
        "action": numbers(_chunks(episode["action"], chunk)),
        "mask": mask,
        "instruction": tf.fill([count], episode["instruction"][0]),
        "task": tf.fill([count], episode["task"]),
    }


def _decode(windows: Batch, dataset: Dataset) -> Batch:
    """Decodes the images of a batch of windows, as acting sees them: TensorFlow's default decoder.

    One map over all B * T places writes each picture once into the batch; cutting windows after
    decoding, or stacking them one by one, would copy every picture again (docs/performance.md).
    """
    mask = tf.reshape(windows["mask"], [-1])
    images = {}
    for camera, shape in dataset.image_shapes.items():

        def decode(place: tuple[tf.Tensor, tf.Tensor], shape: tuple = shape) -> tf.Tensor:
            encoded, there = place
            picture = tf.cond(
                there,
                lambda: tf.io.decode_jpeg(encoded, channels=3),
                lambda: tf.zeros(shape, tf.uint8),
            )
            return tf.ensure_shape(picture, shape)

        encoded = windows["images"][camera]
        pictures = tf.map_fn(
            decode,
            (tf.reshape(encoded, [-1]), mask),
            fn_output_signature=tf.TensorSpec(shape, tf.uint8),
            parallel_iterations=max(4, cores()),
        )
        images[camera] = tf.reshape(pictures, (*encoded.shape, *shape))
    return {**windows, "images": images}


def _batches(windows: tf.data.Dataset, dataset: Dataset, batch_size: int) -> tf.data.Dataset:
    return (
        windows.batch(batch_size, drop_remainder=True)
        .prefetch(BATCHES_AHEAD)  # encoded: reading does not wait for decoding
        .map(lambda batch: _decode(batch, dataset), num_parallel_calls=BATCHES_DECODING)
        .prefetch(BATCHES_AHEAD)
        .with_options(options())
    )


def options() -> tf.data.Options:
    """Returns options that keep order, and memory and threads bounded, whatever the host."""
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
    """Raises ``UserError`` where ``settings`` need more memory than the host has."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    if megabytes > installed:
        raise UserError(
            f"{settings}: expected at most the host's {installed:.0f} MB, found a need of "
            f"{megabytes:.0f} MB; lower either"
        )


class TrainBatches(Iterator[Batch]):
    """Shuffled batches without end; all processes together read every step once an epoch.

    Batches run across the ends of epochs, so nothing is dropped and none is padded to size.
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
        shuffle_mb: int = 256,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """``batch_size`` is this process's; ``shuffle_mb`` (10^6 bytes) of windows are shuffled.

        The buffer's number of windows is ``shuffle_mb`` over the mean size of an encoded window of
        the first episode of up to 16 files, plus what chunks add to it and 1 kB of overhead.

        Raises:
          UserError: ``chunk`` below 1, no such split, fewer files than processes, or more memory
            than the host has.
        """
        expect_chunk(chunk)
        self._dataset = dataset
        self._split = dataset.split(split)
        if len(self._split.files) < process_count:
            raise UserError(
                f"{dataset.directory}: split {split!r}: expected at least one file for each of "
                f"{process_count} processes, found {len(self._split.files)}; start at most that "
                "many processes, or write the dataset anew in more files (TFDS max_shard_size)"
            )
        self._share = _share(self._split, process_index, process_count)
        self._batch_size = batch_size
        self._context, self._chunk = context, chunk
        self._seed, self._shuffle_mb = seed, shuffle_mb
        self._settings: dict[str, Any] = {
            "fingerprint": self._split.fingerprint,
            "context": context,
            "chunk": chunk,
            "seed": seed,
            "shuffle_mb": shuffle_mb,
            "process_index": process_index,
            "process_count": process_count,
        }
        steps, encoded = _sample(dataset, self._split)
        growth = 1 + 4 * (chunk - 1) * dataset.action_dim * steps / encoded  # by chunks
        window_bytes = encoded * growth / steps * context + _WINDOW_OVERHEAD
        self.shuffle_windows = max(1, int(shuffle_mb * 1e6 / window_bytes))
        self.host_memory_mb = self._memory(growth)
        expect_memory(f"shuffle_mb={shuffle_mb}, batch_size={batch_size}", self.host_memory_mb)
        self._epoch, self._window = 0, 0
        self._iterator: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        """Raises ``UserError`` naming file, record and what is wrong with it where one is bad."""
        if self._iterator is None:
            self._iterator = iter(self._build().as_numpy_iterator())
        try:
            batch = next(self._iterator)
        except tf.errors.OpError as error:
            raise explain(self._dataset, self._split, error) from None
        self._epoch = int(batch.pop("epoch")[-1])
        self._window = int(batch.pop("window")[-1]) + 1
        return batch

    @property
    def epoch(self) -> int:
        """The epoch of the last window of the batch returned last."""
        return self._epoch

    def state(self) -> dict[str, Any]:
        """Returns the position after the batch returned last, as plain JSON values."""
        return {**self._settings, "epoch": self._epoch, "window": self._window}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which ``state()`` was taken, bit for bit.

        Raises:
          UserError: the state is of other data, or of another setting that the order depends on.
        """
        saved = {"chunk": 1, **state}  # one without is of before there were chunks
        for key, found in self._settings.items():
            if saved.get(key) != found:
                raise UserError(
                    f"data iterator state: {key}: expected {saved.get(key)!r} as when it was "
                    f"saved, found {found!r}; resume with the data and settings of the checkpoint"
                )
        self._epoch, self._window = int(state["epoch"]), int(state["window"])
        self._iterator = None

    def _build(self) -> tf.data.Dataset:
        start_epoch, start_window = self._epoch, self._window
        files, first = tf.constant(self._share.files), tf.constant(self._share.first, tf.int64)
        seed, context = self._seed, self._context

        def cut(number: tf.Tensor, record: tf.Tensor, epoch_seed: tf.Tensor) -> Batch:
            seed_of_episode = tf.random.experimental.stateless_fold_in(epoch_seed, number)
            offset = tf.random.stateless_uniform((), seed_of_episode, 0, context, tf.int32)
            return _cut(record, self._dataset, offset, context, self._chunk)

        def epoch_windows(epoch: tf.Tensor) -> tf.data.Dataset:
            epoch_seed = tf.stack([tf.constant(seed, tf.int64), epoch])
            order = tf.random.experimental.stateless_shuffle(tf.range(len(first)), epoch_seed)
            records = tf.data.Dataset.from_tensor_slices(
                (tf.gather(files, order), tf.gather(first, order))
            ).interleave(
                lambda file, start: tf.data.TFRecordDataset(file).enumerate(start),
                cycle_length=FILES_AT_ONCE,
            )
            windows = records.map(lambda number, record: cut(number, record, epoch_seed)).unbatch()
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
        """Megabytes: shuffle buffer, episodes being read (record and its parsed copy), batches."""
        episodes = self._split.num_bytes / sum(self._split.episodes)
        picture = sum(int(np.prod(shape)) for shape in self._dataset.image_shapes.values())
        chunk = 4 * self._chunk * self._dataset.action_dim
        batch = self._batch_size * self._context * (picture + chunk)
        # a batch in the making is there twice: its pictures, and the array they are copied to
        batches = BATCHES_AHEAD + 2 * BATCHES_DECODING + 2
        reading = 2 * growth * episodes + FILES_AT_ONCE * 2**18
        return self._shuffle_mb + _SLACK_MB + (reading + batches * batch) / 1e6


class EvalBatches:
    """One pass over a split in the order of its files, each time it is iterated; unshuffled.

    All of its windows, or ``windows`` of them (give or take) spread evenly over it. Windows start
    at each episode's first step. The last batch is filled up with windows of zeros whose mask is
    False, and where there are several processes, all have the same number of batches (``len``), so
    that none waits for another in a collective step; one without a file has only such.
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
        """Reads the split once, without images, to count. Raises ``UserError`` as above."""
        expect_chunk(chunk)
        self._dataset = dataset
        self._split = dataset.split(split)
        self._share = _share(self._split, process_index, process_count)
        self._batch_size, self._context, self._chunk = batch_size, context, chunk
        of_episode = -(-read_actions(dataset, split).lengths // context)
        self._every = max(1, int(of_episode.sum()) // windows) if windows else 1
        ends = np.cumsum(self._split.episodes)
        of_file = [int(part.sum()) for part in np.split(of_episode, ends[:-1])]
        most = max(sum(of_file[index::process_count]) for index in range(process_count))
        kept = -(-most // self._every)
        self._batches = -(-kept // batch_size)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        windows = (
            tf.data.TFRecordDataset(tf.constant(self._share.files, tf.string))
            .map(
                lambda record: _cut(
                    record, self._dataset, tf.constant(0), self._context, self._chunk
                )
            )
            .unbatch()
            .shard(self._every, 0)  # every n-th, before anything is decoded
        )
        empty = {
            key: tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), specs)
            for key, specs in windows.element_spec.items()
        }
        padding = tf.data.Dataset.from_tensors(empty).repeat()
        windows = windows.concatenate(padding).take(self._batches * self._batch_size)
        try:
            yield from _batches(windows, self._dataset, self._batch_size).as_numpy_iterator()
        except tf.errors.OpError as error:
            raise explain(self._dataset, self._split, error) from None


def _sample(dataset: Dataset, split: Split) -> tuple[int, int]:
    """Returns the steps and encoded bytes of the first episode of up to 16 files."""
    files = split.files[:: max(1, len(split.files) // 16)]
    steps = encoded = 0
    for file in files:
        try:
            for record in tf.data.TFRecordDataset(str(file)).take(1):
                episode = parse(record, dataset)
                steps += len(episode["action"])
                encoded += len(record.numpy())
        except tf.errors.OpError as error:
            raise explain(dataset, split, error) from None
    if not steps:
        raise explain(dataset, split, ValueError("no steps"))
    return steps, encoded
