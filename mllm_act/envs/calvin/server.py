"""Runs CALVIN's simulator in its own Python environment and answers requests over its standard input and output.

    python -I server.py CHECKOUT CAMERAS

``CHECKOUT`` is a checkout of github.com/mees/calvin_env, which is used as it is; ``CAMERAS`` are names with commas.
`client` starts this program. It imports nothing of mllm_act, because the other environment does not have it.

A message is a length in four bytes (little endian), that many bytes of JSON, and the bytes of the arrays that its key
``arrays`` lists as [name, dtype, shape]. Nothing is pickled.
"""

import json
import os
import struct
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

BLOCKS = ("block_red", "block_blue", "block_pink")
PARTS = ("slide_link", "drawer_link", "switch_link", "button_link", "plank_link")


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Writes a message: JSON types, and NumPy arrays of numbers on its first level."""
    arrays = {key: value for key, value in message.items() if isinstance(value, np.ndarray)}
    head = {key: value for key, value in message.items() if key not in arrays}
    head["arrays"] = [(key, array.dtype.str, array.shape) for key, array in arrays.items()]
    encoded = json.dumps(head).encode()
    stream.write(struct.pack("<I", len(encoded)) + encoded)
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> dict[str, Any]:
    """Reads a message. Raises EOFError if the other side has closed the stream."""
    (length,) = struct.unpack("<I", _exactly(stream, 4))
    message: dict[str, Any] = json.loads(_exactly(stream, length))
    for key, code, shape in message.pop("arrays"):
        dtype = np.dtype(code)
        if dtype.hasobject:
            raise ValueError(f"{key}: expected an array of numbers, found {dtype}")
        size = dtype.itemsize * int(np.prod(shape))
        message[key] = np.frombuffer(_exactly(stream, size), dtype).reshape(shape)
    return message


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


class Simulator:
    """CALVIN's environment."""

    def __init__(self, checkout: Path, cameras: str) -> None:
        sys.path.insert(0, str(checkout))
        from hydra import compose, initialize_config_dir

        self._checkout, self._names = checkout, list(filter(None, cameras.split(",")))
        self._env: Any = None
        self._cameras: list[Any] = []
        self._task = ""
        self._start: dict[str, Any] = {}
        initialize_config_dir(str(checkout / "conf"), version_base=None)
        self._compose = compose
        self._oracle = self._instantiate(self._config("D").tasks)

    def _config(self, scene: str) -> Any:
        cameras = "static_and_gripper" if self._names else "no_cameras"
        return self._compose(
            "config_data_collection",
            [
                f"cameras={cameras}",
                f"scene=calvin_scene_{scene}",
                f"data_path={self._checkout / 'data'}",
                "use_vr=false",
                "env.use_egl=false",
            ],
        )

    def _instantiate(self, config: Any, **arguments: Any) -> Any:
        from hydra.utils import instantiate

        return instantiate(config, **arguments)

    def surfaces(self, scene: str) -> dict[str, Any]:
        """Returns where blocks may lie in a scene: {surface: [lowest xyz, highest xyz]}, metres."""
        boxes = self._config(scene).scene.surfaces
        return {name: [list(corner) for corner in box] for name, box in boxes.items()}

    def reset(self, scene: str, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        """Puts robot and scene into a state. The answer to `begin` shows it.

        ``robot_obs`` float64[15] and ``scene_obs`` float64[24] are in CALVIN's layout, the blocks in the order of
        `BLOCKS`; the scenes have them in three different orders.

        It makes a new simulation (0.5 s), because Bullet remembers contacts: the same actions would not give quite the
        same episode again.
        """
        if self._env is not None:
            self._env.close()
            self._env.ownsPhysicsClient = False  # it would close again when it is collected
        self._env = self._instantiate(
            self._config(scene).env, show_gui=False, use_vr=False, use_scene_info=True
        )
        self._cameras = [camera for camera in self._env.cameras if camera.name in self._names]
        self._env.robot.gripper_action = int(robot_obs[14])
        own = np.copy(scene_obs)
        own[6:] = scene_obs[6:].reshape(3, 6)[np.argsort(self._order())].ravel()
        self._env.cameras = []
        self._env.reset(robot_obs=robot_obs, scene_obs=own)

    def _order(self) -> list[int]:
        """Returns the place of each of `BLOCKS` in this scene's own layout."""
        names = [block.name for block in self._env.scene.movable_objects]
        return [names.index(name) for name in BLOCKS]

    def begin(self, task: str, draw: bool) -> dict[str, Any]:
        """Takes the present state as the start of a task; returns the observation, with images if ``draw``."""
        self._env.cameras = self._cameras if draw else []
        self._task, self._start = task, self._env.get_info()
        return self._found(self._env.get_obs(), self._start)

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """Executes a relative action, float64[7], whose last number is -1 or 1; returns the observation."""
        if action[6] not in (-1.0, 1.0):
            raise ValueError(
                f"the gripper's action is 1 (open) or -1 (closed), found {action[6]:g}"
            )
        observation, _, _, info = self._env.step(action)
        return self._found(observation, info)

    def _found(self, observation: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        env, table = self._env, info["scene_info"]["fixed_objects"]["table"]
        boxes = [
            env.p.getAABB(table["uid"], table["links"][part], physicsClientId=env.cid)
            for part in PARTS
        ]
        solved = self._oracle.get_task_info_for_set(self._start, info, {self._task})
        scene = np.array(observation["scene_obs"], np.float64)
        scene[6:] = scene[6:].reshape(3, 6)[self._order()].ravel()
        return {
            "robot_obs": np.asarray(observation["robot_obs"], np.float64),
            "scene_obs": scene,
            "target": np.array([*env.robot.target_pos, *env.robot.target_orn], np.float64),
            "parts": np.array(boxes, np.float64),  # lowest and highest xyz of each of PARTS
            "success": len(solved) > 0,
            **{key.removeprefix("rgb_"): image for key, image in observation["rgb_obs"].items()},
        }


def main() -> None:
    """Answers requests until the standard input is closed."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Bullet and CALVIN print on the standard output
    simulator = None
    while True:
        try:
            request = receive(requests)
        except EOFError:
            os._exit(0)
        try:
            if simulator is None:
                simulator = Simulator(Path(sys.argv[1]), sys.argv[2])
            method = request.pop("method")
            send(replies, getattr(simulator, method)(**request) or {})
        except Exception as error:
            send(replies, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
