"""A peer's message, checked against the metadata. Whatever is wrong with it is said by name, with what was expected.

An observation has one key for each camera, ``observation/state`` and ``prompt``. Beside it may be

* ``reset`` (bool): an episode begins with this observation; alone, with the next one;
* ``step_by_step`` (bool): the server executes its chunk: it answers the action to take now, [1, A], and decides again
  when the chunk is used up. Without it every observation is decided on, and answered by a whole chunk, [H, A];
* ``random_key`` (uint32[2]): draws the action, where the server samples; drawn by the server where it is missing;
* ``latest`` (bool): the observation may be dropped if a newer message of the client is already there;
* ``committed`` (float32[d, A]): the actions that the robot executes from this observation on until the answer, at most
  ``max_delay`` of the metadata; the chunk begins with them;
* ``obs_id``, ``timestamp`` (a number or a text of at most 128 characters): come back in the answer;
* ``resume`` (text), alone: go on with the session of this id.
"""

import dataclasses
import difflib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8, UInt32
from PIL import Image

from mllm_act.errors import UserError
from mllm_act.serving import wire
from mllm_act.serving.metadata import IMAGE, PROMPT, STATE

FLAGS = ("reset", "step_by_step", "latest")
ECHOED = ("obs_id", "timestamp")
EXTRAS = (*FLAGS, *ECHOED, "random_key", "committed", "resume")
TEXT = 4096  # characters of an instruction, at most


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the policy acts on."""

    images: Mapping[str, UInt8[np.ndarray, "H W 3"]]
    proprio: Float[np.ndarray, " P"]
    instruction: str
    prompt: list[int]  # its token ids
    random_key: UInt32[np.ndarray, " 2"] | None
    committed: Float[np.ndarray, "_ A"] | None


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked message; without an observation it is a ``reset`` or a ``resume`` alone."""

    observation: Observation | None
    reset: bool
    step_by_step: bool
    latest: bool
    resume: str | None
    echo: dict[str, Any]


class Checker:
    """Turns messages into requests."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int, int]],
        proprios: int,
        encode: Any,
        sample: bool,
        actions: int,
        max_delay: int,
    ) -> None:
        """Makes one.

        Args:
          shapes: (height, width, 3) of each camera's frames.
          proprios: how many numbers of proprioception.
          encode: instruction -> token ids of its prompt; raises UserError for one that is too long.
          sample: whether the server samples.
          actions: A, the numbers of an action.
          max_delay: how many actions may be committed.
        """
        self._actions, self._max_delay = actions, max_delay
        self._cameras = {IMAGE.format(camera): camera for camera in shapes}
        self._shapes, self._proprios, self._encode, self._sample = shapes, proprios, encode, sample
        self._needed = (*self._cameras, STATE, PROMPT)
        self._prompts: dict[str, list[int]] = {}

    def read(self, data: bytes | str) -> dict[str, Any]:
        """Returns a message's map.

        Raises:
          UserError: it is none.
        """
        if isinstance(data, str):
            raise UserError(
                "message: expected a binary frame with a msgpack map, found a text frame"
            )
        try:
            message = wire.unpack(data)
        except wire.WireError as error:
            raise UserError(
                f"message: expected a msgpack map with NumPy arrays, found {error}"
            ) from None
        if not isinstance(message, dict):
            raise UserError(f"message: expected a msgpack map, found {type(message).__name__}")
        return message

    def check(self, message: Mapping[str, Any]) -> Request:
        """Checks a message's map; images that are JPEG or PNG are decoded.

        Raises:
          UserError: something in it is wrong.
        """
        self._check_keys(message)
        for key in FLAGS:
            if not isinstance(message.get(key, False), bool | np.bool_):
                raise UserError(f"{key}: expected true or false, found {_found(message[key])}")
        echo = {key: message[key] for key in ECHOED if key in message}
        for key, value in echo.items():
            if not isinstance(value, int | float | str) or len(str(value)) > 128:
                raise UserError(
                    f"{key}: expected a number or a text of at most 128 characters, found {_found(value)}"
                )
        resume = message.get("resume")
        if resume is not None and not isinstance(resume, str):
            raise UserError(f"resume: expected the id of a session, found {_found(resume)}")
        observation = None
        if any(key in message for key in self._needed):
            observation = self._observation(message)
        elif resume is None and not message.get("reset"):
            raise UserError(
                f"message: expected the keys {', '.join(self._needed)}, found none of them"
            )
        if observation is not None and resume is not None:
            raise UserError(
                "resume: expected it alone, found an observation with it; send it first"
            )
        return Request(
            observation,
            reset=bool(message.get("reset")),
            step_by_step=bool(message.get("step_by_step")),
            latest=bool(message.get("latest")),
            resume=resume,
            echo=echo,
        )

    def _check_keys(self, message: Mapping[Any, Any]) -> None:
        known = [*self._needed, *EXTRAS]
        for key in message:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise UserError(f"message: expected no key {_found(key)}; {hint}")

    def _observation(self, message: Mapping[str, Any]) -> Observation:
        missing = [key for key in self._needed if key not in message]
        if missing:
            raise UserError(f"{missing[0]}: expected it in every observation, found none; add it")
        images = {camera: self._image(key, message[key]) for key, camera in self._cameras.items()}
        proprio = message[STATE]
        if (
            not isinstance(proprio, np.ndarray)
            or proprio.shape != (self._proprios,)
            or proprio.dtype.kind not in "iuf"
        ):
            raise UserError(f"{STATE}: expected float32[{self._proprios}], found {_found(proprio)}")
        with np.errstate(over="ignore"):
            proprio = proprio.astype(np.float32)
        if not np.isfinite(proprio).all():
            raise UserError(f"{STATE}: expected finite numbers, found {proprio.tolist()}")
        text = message[PROMPT]
        if not isinstance(text, str) or len(text) > TEXT:
            raise UserError(
                f"{PROMPT}: expected a text of at most {TEXT} characters, found {_found(text)}"
            )
        return Observation(
            images, proprio, text, self.prompt(text), self._key(message), self._committed(message)
        )

    def prompt(self, text: str) -> list[int]:
        """Returns the token ids of an instruction's prompt; raises UserError if there are too many."""
        if text not in self._prompts:
            ids = self._encode(text)
            if len(self._prompts) >= 1000:  # of strangers
                self._prompts.clear()
            self._prompts[text] = ids
        return self._prompts[text]

    def _key(self, message: Mapping[str, Any]) -> np.ndarray | None:
        key = message.get("random_key")
        if key is None:
            return None
        if not self._sample:
            raise UserError(
                "random_key: expected it only where the server samples, found it; start the server with --sample"
            )
        if not isinstance(key, np.ndarray) or key.shape != (2,) or key.dtype != np.uint32:
            raise UserError(f"random_key: expected uint32[2], found {_found(key)}")
        return key

    def _committed(self, message: Mapping[str, Any]) -> np.ndarray | None:
        given = message.get("committed")
        if given is None:
            return None
        if not self._max_delay:
            raise UserError(
                "committed: expected it only for a policy trained with config.max_delay, found it; leave it out"
            )
        if message.get("step_by_step"):
            raise UserError("committed: expected it only with whole chunks, found step_by_step")
        if (
            not isinstance(given, np.ndarray)
            or given.dtype.kind not in "iuf"
            or given.ndim != 2
            or not 1 <= len(given) <= self._max_delay
            or given.shape[1] != self._actions
        ):
            raise UserError(
                f"committed: expected float32[d, {self._actions}], d from 1 to {self._max_delay}, found {_found(given)}"
            )
        with np.errstate(over="ignore"):
            given = given.astype(np.float32)
        if not np.isfinite(given).all():
            raise UserError(f"committed: expected finite numbers, found {given.tolist()}")
        return given

    def _image(self, key: str, image: Any) -> np.ndarray:
        shape = self._shapes[self._cameras[key]]
        if isinstance(image, bytes):
            image = _decode(key, image, shape)
        if not isinstance(image, np.ndarray) or image.shape != shape or image.dtype != np.uint8:
            raise UserError(
                f"{key}: expected uint8{list(shape)} in RGB, or a JPEG or PNG of that size as bytes, found "
                f"{_found(image)}; resize it as in training"
            )
        return image


def _decode(key: str, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    expected = f"{key}: expected a JPEG or PNG of {shape[1]} x {shape[0]} pixels, found"
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if (image.height, image.width) != shape[:2]:  # before its pixels take memory
                raise UserError(f"{expected} {image.width} x {image.height}")
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(
            f"{expected} {len(data)} bytes that are none ({type(error).__name__})"
        ) from None


def _found(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"{type(value).__name__} {str(value)[:60]!r}"
