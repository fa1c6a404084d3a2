"""CALVIN with its static camera only, as in arXiv 2406.07904: twice as many frames per second."""

import dataclasses

from mllm_act.envs.calvin import calvin
from mllm_act.envs.calvin.calvin import GROUPS, INSTRUCTIONS, SPLITS, CalvinEnv, task_of

__all__ = ["GROUPS", "INSTRUCTIONS", "SPEC", "SPLITS", "make", "task_of"]

SPEC = dataclasses.replace(calvin.SPEC, name="calvin_static", cameras=("static",), image_sizes=())


def make(render: bool = True) -> CalvinEnv:
    """Returns a simulator."""
    return CalvinEnv(SPEC, render)
