"""Records one demonstration: an environment's scripted expert acts, with noise, until it succeeds.

Noise is added to the expert's actions when they are executed (arXiv 2406.07904, appendix on Meta-World: Gaussian, 0.1),
so that demonstrations also show how to recover. The label is the expert's action at each state, without the noise.
Discrete actions get no noise, and their episodes end at the first success.
"""

import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_act import envs
from mllm_act.envs.base import EnvSpec, ExpertFailed
from mllm_act.errors import UserError
from mllm_act.files import whole_file

NOISE_STD = 0.1  # in the environment's own units of the action
# Steps recorded after the first success. An episode that stops at the success has no step beyond the threshold of the
# success test, and a policy trained on it slows down just short of the threshold.
HOLD_STEPS = 5
MAX_ATTEMPTS = 10  # each with fresh noise, before an episode counts as failed
# With 4:2:0 chroma subsampling, 14 kB per image of 200 x 200. A lower quality blurs the small goal markers.
JPEG_QUALITY = 95
_DIGEST = hashlib.sha256().digest_size  # bytes


def attempt_seed(seed: int, task: str, episode: int, attempt: int) -> int:
    """Returns the seed of one attempt, a non-negative int64 that depends only on the arguments."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(task.encode()), episode, attempt])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


def recipe(spec: EnvSpec) -> dict[str, Any]:
    """Returns the settings that demonstrations of an environment are recorded with."""
    return {
        "noise_std": 0.0 if spec.choices else NOISE_STD,
        "hold_steps": 0 if spec.choices else HOLD_STEPS,
        "max_attempts": MAX_ATTEMPTS,
        "jpeg_quality": JPEG_QUALITY,
    }


def attempt_episode(
    env: envs.Env, task: str, configuration: int, seed: int
) -> tuple[dict[str, np.ndarray], bool]:
    """Runs the expert with noise until ``hold_steps`` after its first success, the horizon, or the expert's failure.

    Returns:
      The arrays of T steps, and whether the attempt succeeded. The arrays are ``proprio`` float32[T, P], ``action``
      float32[T, A] (the label), ``executed_action`` float32[T, A], ``reward`` float32[T] (for the executed action),
      ``instruction`` str[], and for each camera ``jpeg/<camera>`` uint8[bytes] (all images concatenated) and
      ``jpeg_sizes/<camera>`` int64[T]. Observations are from before the action.
    """
    rng, settings = np.random.default_rng(seed), recipe(env.spec)
    low = np.array(env.spec.action_low, np.float32)
    high = np.array(env.spec.action_high, np.float32)
    steps: dict[str, list[Any]]
    steps = {key: [] for key in ("proprio", "action", "executed_action", "reward")}
    images: dict[str, list[bytes]] = {camera: [] for camera in env.spec.cameras}
    observation = env.reset(task, configuration, seed)
    remaining, succeeded = env.spec.horizon, False
    while remaining > 0:
        try:
            action = env.expert_action()
        except ExpertFailed:
            break
        noise = rng.normal(0.0, settings["noise_std"], action.shape).astype(np.float32)
        executed = np.clip(action + noise, low, high)
        steps["proprio"].append(observation["proprio"])
        for camera, jpegs in images.items():
            jpegs.append(_jpeg(observation["images"][camera]))
        observation, reward, success = env.step(executed)
        steps["action"].append(action)
        steps["executed_action"].append(executed)
        steps["reward"].append(np.float32(reward))
        remaining -= 1
        if success and not succeeded:
            succeeded, remaining = True, min(remaining, settings["hold_steps"])
    arrays = {name: np.array(values) for name, values in steps.items()}
    arrays["instruction"] = observation["instruction"]
    for camera, jpegs in images.items():
        arrays[f"jpeg/{camera}"] = np.frombuffer(b"".join(jpegs), np.uint8)
        arrays[f"jpeg_sizes/{camera}"] = np.array([len(jpeg) for jpeg in jpegs])
    return arrays, succeeded


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=JPEG_QUALITY)
    return buffer.getvalue()


def serve(env: str, seed: int) -> Callable[[tuple[str, int, str]], None]:
    """Returns a worker's handler (see ``mllm_act.envs.processes``): (task, episode, file) records that episode.

    Episode i has training configuration i, modulo their number. The file is written whole or not at all. If all
    ``MAX_ATTEMPTS`` fail, it contains the last attempt, with ``success`` False.
    """
    simulator = envs.make(env)
    configurations = envs.splits(env)["train"]

    def record(request: tuple[str, int, str]) -> None:
        task, episode, file = request
        configuration = configurations[episode % len(configurations)]
        frames = 0
        for attempt in range(MAX_ATTEMPTS):  # noqa: B007 (used after the loop)
            noise_seed = attempt_seed(seed, task, episode, attempt)
            arrays, success = attempt_episode(simulator, task, configuration, noise_seed)
            frames += len(arrays["action"])
            if success:
                break
        save(
            Path(file),
            arrays
            | {
                "configuration": np.int32(configuration),
                "seed": np.int64(noise_seed),
                "success": np.bool_(success),
                "attempts": np.int64(attempt + 1),
                "frames_drawn": np.int64(frames),
            },
        )

    return record


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Writes the arrays of an episode, and then the SHA-256 of what was written, whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    content = buffer.getvalue()
    try:
        with whole_file(path) as partial:
            partial.write_bytes(content + hashlib.sha256(content).digest())
    except OSError as error:
        raise UserError(
            f"{path}: expected to write an episode, found {error.strerror}; free space, then run the same command to "
            "continue"
        ) from None


def load(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an episode. Raises ``UserError`` if the file cannot be read or is damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: expected a recorded episode, found {error.strerror}; run the same command to record it again"
        ) from None
    content, digest = data[:-_DIGEST], data[-_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        raise UserError(
            f"{path}: expected a recorded episode, found one that fails its checksum; "
            "run the same command to record it again"
        )
    with np.load(io.BytesIO(content)) as arrays:
        return dict(arrays)


def summary(path: Path) -> dict[str, Any]:
    """Returns whether an episode succeeded, and its numbers of attempts, steps and simulated frames.

    Raises:
      UserError: the file cannot be read or is damaged.
    """
    arrays = load(path)
    return {
        "success": bool(arrays["success"]),
        "attempts": int(arrays["attempts"]),
        "steps": len(arrays["reward"]),
        "frames_drawn": int(arrays["frames_drawn"]),
    }
