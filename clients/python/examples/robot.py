"""A robot's loop. Put your robot in place of ``Robot``: python robot.py ws://HOST:8000"""

import sys
import time

from mllm_act_client import ChunkClient, Client, Stale
from my_robot import Robot  # observe() -> {"observation/...": ...}, send(action), stop()

robot = Robot()
with Client(sys.argv[1], wait=120) as client, ChunkClient(client, stale=5) as policy:
    period, due = 1.0 / client.metadata["control_hz"], time.monotonic()
    while True:
        observation = dict(robot.observe(), prompt="Close the window.")
        try:
            robot.send(policy.act(observation))
        except Stale:
            robot.stop()
            break
        due += period
        time.sleep(max(0.0, due - time.monotonic()))
