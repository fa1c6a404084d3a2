"""openpi's own client, unchanged, against the server."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.server_thread import Loaded, running

OPENPI = "openpi-client==0.1.2"
PROGRAM = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_client.action_chunk_broker import ActionChunkBroker

policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
metadata = policy.get_server_metadata()
assert metadata["action"]["shape"] == [4, 4], metadata
observation = {
    "observation/corner4": np.zeros((16, 16, 3), np.uint8),
    "observation/state": np.zeros(3, np.float32),
    "prompt": "do task 0",
}
answer = policy.infer(observation)
assert answer["actions"].shape == (4, 4) and answer["actions"].dtype == np.float32
assert answer["policy_timing"]["infer_ms"] > 0
broker = ActionChunkBroker(policy, action_horizon=4)
chunk = [broker.infer(observation)["actions"] for _ in range(4)]
assert np.stack(chunk).shape == (4, 4)
try:
    policy.infer({**observation, "observation/state": np.zeros(2, np.float32)})
except RuntimeError as error:
    assert "observation/state: expected float32[3], found float32[2]" in str(error)
else:
    raise AssertionError("a bad observation was accepted")
assert policy.infer(observation)["step"] == 2, "the connection goes on"
"""


@pytest.mark.slow
def test_openpis_client_unchanged(loaded: Loaded, tmp_path: Path) -> None:
    for module in ("tree", "typing_extensions"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module}, which openpi-client imports, is not installed")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*install, "--target", str(tmp_path), OPENPI], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{OPENPI} cannot be had here: {done.stderr[-200:]}")
    with running(loaded) as server:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(server.port)],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
