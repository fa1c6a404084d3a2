"""Cuts episodes into windows of consecutive steps, as tensors.

A window is ``context`` consecutive steps of one segment. A segment is the steps of one episode under one instruction:
where the instruction, or one of several, changes inside an episode, a new segment begins. Windows may be shorter at the
ends of a segment: they are padded at the end with zeros, where ``mask`` is False.

With ``chunk`` H > 1, the action of a step is a chunk: its own action and the H - 1 that follow in the segment, even
beyond the window, in one vector with time first (``action.reshape(H, A)``). Past the end of the segment its last action
is repeated, not masked.
"""

from typing import Any, TypeAlias

from data_pipelines.reading.layout import Layout, choose_text
from data_pipelines.tensorflow_cpu import tf

Arrays = dict[str, Any]  # names to arrays, or to dicts of arrays
Number: TypeAlias = tf.Tensor | int


def segments(texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the first and the last step of each step's segment, int32[L] each; ``texts`` are string[L, K]."""
    differ = tf.reduce_any(texts[1:] != texts[:-1], axis=1)
    changes = tf.concat([[True], differ], axis=0)
    starts = tf.cast(tf.where(changes)[:, 0], tf.int32)
    ends = tf.concat([starts[1:], tf.shape(texts)[:1]], axis=0) - 1
    number = tf.cumsum(tf.cast(changes, tf.int32)) - 1
    return tf.gather(starts, number), tf.gather(ends, number)


def window_index(first: tf.Tensor, offset: Number, context: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Cuts an episode of L >= 1 steps into windows.

    Args:
      first: the first step of each step's segment, int32[L], from ``segments``.
      offset: where the first window of a segment ends, unless it is 0.
      context: T.

    Returns:
      The steps, int32[W, T], and the mask of the positions that have a step, bool[W, T]. The windows contain every step
      once, in order; where they are padded, at the end, the step is the last of the episode at the most.
    """
    length = tf.shape(first)
    position = tf.range(length[0]) - first
    begins = (position == 0) | ((position - offset) % context == 0)
    starts = tf.cast(tf.where(begins)[:, 0], tf.int32)
    ends = tf.concat([starts[1:], length], axis=0)
    index = starts[:, None] + tf.range(context)
    return tf.minimum(index, length - 1), index < ends[:, None]


def _chunks(action: tf.Tensor, last: tf.Tensor, chunk: int) -> tf.Tensor:
    """Turns actions, float32[L, A], into chunks, float32[L, H * A]; the action of step ``last``, int32[L], repeats."""
    index = tf.range(tf.shape(action)[0])[:, None] + tf.range(chunk)
    index = tf.minimum(index, last[:, None])
    return tf.reshape(tf.gather(action, index), (-1, chunk * action.shape[1]))


def cut(
    record: tf.Tensor,
    layout: Layout,
    context: int,
    chunk: int,
    offset: Number = 0,
    seed: tf.Tensor | None = None,
) -> Arrays:
    """Checks one stored episode and cuts it into W windows of encoded images.

    Args:
      record: of the episode.
      layout: of the dataset.
      context: T.
      chunk: H.
      offset: where the first window of a segment ends, unless it is 0.
      seed: int64[2], draws the instruction where there are several; without one it is the first.
    """
    episode = layout.parse(record)
    instruction = choose_text(episode["instruction"], seed)
    length = tf.shape(episode["action"])[0]
    checks = [tf.debugging.assert_positive(length, "an episode without steps")]
    for values in (episode["proprio"], instruction, *episode["images"].values()):
        checks.append(tf.debugging.assert_equal(tf.shape(values)[0], length, "steps missing"))
    for values in (episode["action"], episode["proprio"]):
        checks.append(tf.debugging.assert_all_finite(values, "not finite"))
    with tf.control_dependencies([check for check in checks if check is not None]):
        first, last = segments(episode["instruction"])
        index, mask = window_index(first, offset, context)

    def windows(values: tf.Tensor) -> tf.Tensor:
        return tf.where(mask[..., None], tf.gather(values, index), 0.0)

    result = {
        "images": {
            camera: tf.where(mask, tf.gather(encoded, index), "")
            for camera, encoded in episode["images"].items()
        },
        "action": windows(_chunks(episode["action"], last, chunk)),
        "mask": mask,
        "instruction": tf.gather(instruction, index[:, 0]),
        "task": tf.fill([tf.shape(index)[0]], episode["task"]),
    }
    if episode["proprio"].shape[
        1
    ]:  # TensorFlow 2.21 crashes when it batches tensors without elements
        result["proprio"] = windows(episode["proprio"])
    return result
