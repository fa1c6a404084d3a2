"""Turns the records of an RLDS dataset into episodes, as its mapping says.

``tensorflow_datasets`` knows the layout of the records from ``features.json``: dtypes, encodings and nested features
are its business. Here features are chosen and put together, and images stay as they are stored.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_parser import ExampleParser

from data_pipelines.mapping import DataMapping, Part
from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError, nearest

STEPS = "steps/"
_LARGEST_IMAGE = 100_000_000  # bytes of pixels; 8K video has 99,532,800
_MOST_CAMERAS = 64
_LONGEST_VECTOR = 1_000_000

Feature: TypeAlias = Any  # tfds.features.FeatureConnector, which is loaded lazily
Numbers = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to parse a record.

    Attributes:
      mapping: what is taken from it.
      features: all features by their paths in ``features.json``.
      image_shapes: (height, width, 3) of each camera; None where the images of a camera may differ.
    """

    mapping: DataMapping
    features: Mapping[str, Feature]
    image_shapes: Mapping[str, tuple[int, int, int] | None]

    @functools.cached_property
    def _step(self) -> Any:
        """The mapping's own function. It may have Python conditions on tensors."""
        return tf.function(self.mapping.step)

    def parse(self, record: tf.Tensor, images: bool = True) -> dict[str, Any]:
        """Parses one episode of L steps, as tensors.

        Returns:
          ``images`` {camera: string[L]}, for ``decode_image``; ``action`` float32[L, A]; ``proprio`` float32[L, P];
          ``instruction`` string[L, K], the texts to choose one of; ``task`` string[].
        """
        mapping, cameras = self.mapping, self.mapping.cameras if images else {}
        numeric = [part.key for part in (*mapping.action, *mapping.proprio)]
        if mapping.step is not None:
            numeric += numeric_keys(self.features)
        texts = [*mapping.instruction, *filter(None, [mapping.task])]
        paths = {key: find(self.features, key) for key in (*cameras.values(), *numeric, *texts)}
        chosen = sorted({path for path in paths.values() if path is not None})
        values = ExampleParser(
            {path: _stored(self.features, path) for path in chosen}
        ).parse_example(record)
        numbers = {
            key: self._numbers(values, path)
            for key, path in paths.items()
            if path and key in numeric
        }
        if mapping.step is not None:
            numbers |= {key: _rows(x) for key, x in self._step(numbers).items()}
        length = tf.shape(numbers[mapping.action[0].key])[0]
        return {
            "images": {ours: _encoded(values[paths[theirs]]) for ours, theirs in cameras.items()},
            "action": _join(numbers, mapping.action, length),
            "proprio": _join(numbers, mapping.proprio, length),
            "instruction": _texts([values[paths[key]] for key in mapping.instruction], length),
            "task": _first(values[paths[mapping.task]]) if mapping.task else tf.constant(""),
        }

    def _numbers(self, values: Mapping[str, tf.Tensor], path: str) -> tf.Tensor:
        feature = self.features[path]
        if values[path].dtype == tf.string:  # stored encoded
            return _rows(feature.decode_batch_example(values[path]))
        return _rows(values[path])


def make_layout(path: Path, features: Mapping[str, Feature], mapping: DataMapping) -> Layout:
    """Checks a mapping against the features of a dataset.

    Args:
      path: of ``features.json``, for errors.
      features: from ``read_features``.
      mapping: what to take.

    Raises:
      UserError: a key is missing, or its feature has the wrong kind, dtype or width; all such faults are listed.
    """
    problems, shapes = [], {}
    if len(mapping.cameras) > _MOST_CAMERAS:
        problems.append(f"cameras: expected at most {_MOST_CAMERAS}, found {len(mapping.cameras)}")
    for ours, theirs in sorted(mapping.cameras.items()):
        wrong, shape = _image_shape(features, theirs)
        problems += [f"cameras: {ours}: {wrong}"] if wrong else []
        shapes[ours] = shape
    widths: dict[str, int] = {}
    for key in {part.key for part in (*mapping.action, *mapping.proprio)} | (
        set(numeric_keys(features)) if mapping.step else set()
    ):
        wrong, numbers = width(features, key)
        if wrong and mapping.step is None:
            problems.append(wrong)
        widths |= {} if wrong else {key: numbers}
    if mapping.step is not None:
        problems += _apply(mapping.step, features, widths)
    for field in ("action", "proprio"):
        for part in getattr(mapping, field):
            end = part.start + len(part.names)
            if part.key not in widths:
                if mapping.step is not None:
                    problems.append(
                        f"{field}: {part.key}: expected a feature, or one that step returns, found none"
                    )
            elif end > widths[part.key]:
                problems.append(
                    f"{field}: {part.key}: expected at least {end} numbers for {', '.join(part.names)}, found "
                    f"{widths[part.key]}"
                )
    for key in (*mapping.instruction, *filter(None, [mapping.task])):
        found = find(features, key)
        if found is None or not is_text(features, found):
            problems.append(_missing(features, key, "a text"))
    if problems:
        raise UserError(
            f"{path}: {'; '.join(dict.fromkeys(problems))}; fix the mapping or the dataset"
        )
    return Layout(mapping, features, shapes)


def read_features(folder: Path, tree: Mapping[str, Any]) -> dict[str, Feature]:
    """Returns the leaves of a dataset's features by their paths, such as ``steps/observation/image``.

    Args:
      folder: the dataset's.
      tree: its ``features.json``; it may be a stranger's.

    Raises:
      ValueError: it names a class outside of ``tensorflow_datasets``, which would be imported, or is nested too deep.
    """
    _check_classes(tree)
    return _leaves(tfds.features.FeatureConnector.from_config(str(folder)), "")


def find(features: Mapping[str, Feature], key: str) -> str | None:
    """Returns the path of a key: inside a step, else inside the episode; None if there is neither."""
    return next((path for path in (STEPS + key, key) if path in features), None)


def numeric_keys(features: Mapping[str, Feature]) -> list[str]:
    """Returns the keys of the numbers in a step."""
    inside = [path.removeprefix(STEPS) for path in features if path.startswith(STEPS)]
    return [key for key in inside if not width(features, key)[0]]


def is_image(features: Mapping[str, Feature], path: str) -> bool:
    """Whether a feature of steps can be a camera."""
    return not _image_shape(features, path.removeprefix(STEPS))[0]


def is_text(features: Mapping[str, Feature], path: str) -> bool:
    """Whether a feature is a text."""
    return isinstance(features[path], tfds.features.Text) or (
        features[path].get_tensor_info().tf_dtype == tf.string
    )


def choose_text(texts: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
    """Returns one of K texts in each of L steps: string[L, K] to string[L].

    It is drawn among those that are not empty in the first step; without a seed it is the first of them.
    """
    count = texts.shape[1]
    if count == 0:
        return tf.fill([tf.shape(texts)[0]], "")
    if count == 1:
        return texts[:, 0]
    exists = tf.strings.length(texts[0]) > 0
    score = -tf.cast(tf.range(count), tf.float32)
    if seed is not None:
        score = tf.random.stateless_uniform([count], seed)
    return tf.gather(texts, tf.argmax(tf.where(exists, score, -float(count + 1))), axis=1)


def image_size(encoded: tf.Tensor) -> tf.Tensor:
    """Returns the height and width in the header of a JPEG or PNG, int32[2]."""

    def png() -> tf.Tensor:
        header = tf.strings.substr(encoded, 16, 8)
        return tf.reshape(tf.io.decode_raw(header, tf.int32, little_endian=False), [2])[::-1]

    return tf.cond(_is_jpeg(encoded), lambda: tf.io.extract_jpeg_shape(encoded)[:2], png)


def _is_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    return tf.strings.substr(encoded, 0, 2) == b"\xff\xd8"


def decode_image(encoded: tf.Tensor, shape: tuple[int, int, int]) -> tf.Tensor:
    """Decodes one image of ``parse`` to uint8[H, W, 3]: JPEG, PNG, or a serialised tensor.

    The size in the header is compared first: a few hundred bytes can ask the decoder for half a gigabyte.
    """

    def picture() -> tf.Tensor:
        check = tf.debugging.assert_equal(image_size(encoded), shape[:2], "size of an image")
        with tf.control_dependencies([check]):
            return tf.cond(
                _is_jpeg(encoded),
                lambda: tf.io.decode_jpeg(encoded, channels=3),
                lambda: tf.io.decode_png(encoded, channels=3),
            )

    is_png = tf.strings.substr(encoded, 0, 4) == b"\x89PNG"
    raw = functools.partial(tf.io.parse_tensor, encoded, tf.uint8)
    return tf.ensure_shape(tf.cond(_is_jpeg(encoded) | is_png, picture, raw), shape)


def _check_classes(tree: Any, depth: int = 0) -> None:
    if depth > 64:
        raise ValueError("features nested more than 64 deep")
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            # Feature classes are imported by name.
            named = key in ("pythonClassName", "type") and isinstance(value, str)
            if named and not value.startswith("tensorflow_datasets."):
                raise ValueError(
                    f"the feature class {value[:100]!r}, which is not one of tensorflow_datasets"
                )
            _check_classes(value, depth + 1)


def _leaves(feature: Feature, path: str) -> dict[str, Feature]:
    if isinstance(feature, tfds.features.FeaturesDict):
        children: dict[str, Feature] = {}
        for name, child in feature.items():
            children |= _leaves(child, f"{path}/{name}" if path else name)
        return children
    # Steps are a Dataset; older writers used a Sequence of a dictionary.
    inner = getattr(feature, "feature", None)
    if isinstance(inner, tfds.features.FeaturesDict) and path == STEPS.rstrip("/"):
        return _leaves(inner, path)
    return {path: feature}


def _stored(features: Mapping[str, Feature], path: str) -> tfds.features.TensorInfo:
    """Returns how a feature is stored; those of steps have the steps as their first axis."""
    feature = features[path]
    if path.startswith(STEPS):
        feature = tfds.features.Dataset(feature)
    return feature.get_serialized_info()


def _is_image(feature: Feature) -> bool:
    return isinstance(feature, tfds.features.Image)


def _missing(features: Mapping[str, Feature], key: str, kind: str) -> str:
    path = find(features, key)
    if path is not None:
        return f"{path}: expected {kind}, found {features[path]!r}"
    return f"{STEPS}{key}: expected {kind}, found no such feature; {nearest(STEPS + key, features)}"


def _image_shape(
    features: Mapping[str, Feature], key: str
) -> tuple[str, tuple[int, int, int] | None]:
    """Returns what is wrong with a camera, if anything, and the shape of its images."""
    path, kind = find(features, key), "JPEG or PNG images, or uint8[H, W, 3], in each step"
    if path is None or not path.startswith(STEPS):
        return _missing(features, key, kind), None
    info = features[path].get_tensor_info()
    shape = tuple(info.shape)
    if info.tf_dtype != tf.uint8 or len(shape) != 3 or shape[2] not in (1, 3, 4):
        return _missing(features, key, kind), None
    if not _is_image(features[path]) and (None in shape or shape[2] != 3):
        return _missing(features, key, kind), None
    if None in shape[:2]:
        return "", None
    if math.prod(shape) > _LARGEST_IMAGE or min(shape) < 1:
        return (
            f"{path}: expected at most {_LARGEST_IMAGE:,} bytes an image, found the shape {shape}",
            None,
        )
    return "", (shape[0], shape[1], 3)


def width(features: Mapping[str, Feature], key: str) -> tuple[str, int]:
    """Returns what is wrong with a feature of numbers in each step, if anything, and how many they are."""
    path, kind = find(features, key), "numbers in each step"
    if path is None or not path.startswith(STEPS):
        return _missing(features, key, kind), 0
    info = features[path].get_tensor_info()
    dtype = info.tf_dtype
    is_number = isinstance(features[path], tfds.features.Tensor | tfds.features.Scalar) and (
        dtype.is_floating or dtype.is_integer or dtype.is_bool
    )
    if not is_number or None in info.shape or not 1 <= math.prod(info.shape) <= _LONGEST_VECTOR:
        return _missing(features, key, kind), 0
    return "", math.prod(info.shape)


def _apply(
    step: Callable[[Numbers], Numbers], features: Mapping[str, Feature], widths: dict[str, int]
) -> list[str]:
    """Adds the widths of what ``step`` returns; returns what is wrong with it."""
    specs = {key: tf.TensorSpec([None, n], tf.float32) for key, n in widths.items()}
    try:
        shapes = tf.function(step).get_concrete_function(specs).structured_outputs
    except Exception as error:
        first = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return [f"step: expected a function of {', '.join(sorted(widths))}, found {first}"]
    if not isinstance(shapes, dict):
        return [
            f"step: expected a function that returns a dictionary, found {type(shapes).__name__}"
        ]
    problems = []
    for key, tensor in shapes.items():
        if tensor.shape.rank not in (1, 2) or (tensor.shape.rank == 2 and tensor.shape[1] is None):
            problems.append(f"step: {key}: expected [steps, numbers], found {tensor.shape}")
        else:
            widths[key] = 1 if tensor.shape.rank == 1 else tensor.shape[1]
    return problems


def _rows(values: tf.Tensor) -> tf.Tensor:
    """Returns numbers of any dtype and shape [L, ...] as float32[L, n]."""
    return tf.reshape(tf.cast(values, tf.float32), [-1, math.prod(values.shape[1:])])


def _join(numbers: Numbers, parts: tuple[Part, ...], length: tf.Tensor) -> tf.Tensor:
    if not parts:
        return tf.zeros([length, 0])
    return tf.concat(
        [numbers[part.key][:, part.start : part.start + len(part.names)] for part in parts], axis=1
    )


def _texts(values: list[tf.Tensor], length: tf.Tensor) -> tf.Tensor:
    """Returns K texts of each step or episode as string[L, K]."""
    if not values:
        return tf.zeros([length, 0], tf.string)
    each = [tf.fill([length], text) if text.shape.rank == 0 else text for text in values]
    return tf.stack(each, axis=1)


def _first(text: tf.Tensor) -> tf.Tensor:
    return text if text.shape.rank == 0 else text[0]


def _encoded(images: tf.Tensor) -> tf.Tensor:
    """Returns the images of L steps as strings."""
    if images.dtype == tf.string:
        return images
    return tf.map_fn(tf.io.serialize_tensor, images, fn_output_signature=tf.string)
