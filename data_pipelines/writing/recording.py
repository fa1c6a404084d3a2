"""Records one demonstration: an environment's scripted expert, with noise, until it succeeds.

The expert's actions are disturbed while they are executed (arXiv 2406.07904, appendix on
Meta-World: Gaussian noise of 0.1), so that the demonstrations also show how to come back; the label
is the expert's own action at each state, without the noise. Discrete actions are executed as they are,
and their episodes end with the success.
"""

import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm_act import envs
from mllm_act.envs.base import EnvSpec, ExpertFailed
from mllm_act.errors import UserError

NOISE_STD = 0.1  # of the action's own numbers
# Steps recorded after the first success. An episode that stops right there has no step beyond the
# threshold of the success test, and a policy learnt from it slows down just short of it.
HOLD_STEPS = 5
MAX_ATTEMPTS = 10  # with fresh noise each, before a configuration counts as failed
# 4:2:0 as JPEG usually is. 14 kB a frame of 200 x 200; a lower quality blurs the small goal
# markers.
JPEG_QUALITY = 95


def attempt_seed(seed: int, task: str, episode: int, attempt: int) -> int:
    """The seed of one attempt's noise, from these four numbers only (int64, not negative)."""
    entropy = np.random.SeedSequence([seed, zlib.crc32(task.encode()), episode, attempt])
    return int(entropy.generate_state(1, np.uint64)[0] >> 1)


def recipe(spec: EnvSpec) -> dict[str, Any]:
    """How demonstrations of an environment are made."""
    return {
        "noise_std": 0.0 if spec.choices else NOISE_STD,
        "hold_steps": 0 if spec.choices else HOLD_STEPS,
        "max_attempts": MAX_ATTEMPTS,
        "jpeg_quality": JPEG_QUALITY,
    }


def attempt_episode(
    env: envs.Env, task: str, configuration: int, seed: int
) -> tuple[dict[str, np.ndarray], bool]:
    """Lets the expert act with noise until ``hold_steps`` after its first success, the horizon, or
    where it has no action.

    Returns:
      Arrays over the T steps: ``proprio`` float32[T, P], ``action`` float32[T, A] (the label),
      ``executed_action`` float32[T, A], ``reward`` float32[T] (for the executed action), and for
      each camera ``jpeg/<camera>`` uint8[bytes] with ``jpeg_sizes/<camera>`` int64[T]; the
      ``instruction`` str[]; and whether it succeeded. Observations are those that the action was
      chosen on.
    """
    rng, how = np.random.default_rng(seed), recipe(env.spec)
    low = np.array(env.spec.action_low, np.float32)
    high = np.array(env.spec.action_high, np.float32)
    steps: dict[str, list[Any]]
    steps = {key: [] for key in ("proprio", "action", "executed_action", "reward")}
    pictures: dict[str, list[bytes]] = {camera: [] for camera in env.spec.cameras}
    observation = env.reset(task, configuration, seed)
    left, succeeded = env.spec.horizon, False
    while left > 0:
        try:
            action = env.expert_action()
        except ExpertFailed:
            break
        noise = rng.normal(0.0, how["noise_std"], action.shape).astype(np.float32)
        executed = np.clip(action + noise, low, high)
        steps["proprio"].append(observation["proprio"])
        for camera, jpegs in pictures.items():
            jpegs.append(_jpeg(observation["images"][camera]))
        observation, reward, success = env.step(executed)
        steps["action"].append(action)
        steps["executed_action"].append(executed)
        steps["reward"].append(np.float32(reward))
        left -= 1
        if success and not succeeded:
            succeeded, left = True, min(left, how["hold_steps"])
    arrays = {name: np.array(values) for name, values in steps.items()}
    arrays["instruction"] = observation["instruction"]
    for camera, jpegs in pictures.items():
        arrays[f"jpeg/{camera}"] = np.frombuffer(b"".join(jpegs), np.uint8)
        arrays[f"jpeg_sizes/{camera}"] = np.array([len(jpeg) for jpeg in jpegs])
    return arrays, succeeded


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=JPEG_QUALITY)
    return buffer.getvalue()


def serve(env: str, seed: int) -> Callable[[tuple[str, int, str]], None]:
    """The worker's side (see `mllm_act.envs.processes`): records (task, episode, file) into file.

    Episode i shows training configuration i modulo their number. The file appears whole or not at
    all; where `MAX_ATTEMPTS` failed, it holds the last attempt, with ``success`` False.
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
        _save(
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


def _save(path: Path, arrays: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def load(path: Path) -> dict[str, np.ndarray]:
    """Reads what `serve` wrote. Raises UserError where the file is damaged."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{path}: expected a recorded episode, found {error}; delete it") from None


def summary(path: Path) -> dict[str, Any]:
    """What became of an episode, without its images."""
    with np.load(path) as arrays:
        return {
            "success": bool(arrays["success"]),
            "attempts": int(arrays["attempts"]),
            "steps": len(arrays["reward"]),
            "frames_drawn": int(arrays["frames_drawn"]),
        }
