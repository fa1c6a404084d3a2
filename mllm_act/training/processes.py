"""The processes of a run, for what reads a dataset together."""

from data_pipelines.reading.statistics import Processes
from mllm_act.distributed.exchange import group


def processes() -> Processes:
    """Returns the processes of this run."""
    return Processes(group.process, group.count, group.everyone)
