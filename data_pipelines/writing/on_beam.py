"""Records and writes demonstrations on Apache Beam, through TFDS's own Beam path.

Each of Beam's workers records episodes with a simulator in a child process of its own, so that a dataset is made by as
many machines as the runner has. What TFDS then writes has other files than ``data_pipelines.shards``, with the same
episodes. Needs the extra ``beam``, on the workers too.
"""

import shlex
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines.writing import recording
from data_pipelines.writing.builder import Demonstrations, example, prepare
from mllm_act.envs.processes import Worker

Job = tuple[str, int]  # task and episode

_threads = threading.local()  # a worker process ends with the thread that made it


class Record(beam.DoFn):
    """Records an episode; yields (key, example) if the expert succeeded."""

    def __init__(self, env: str, seed: int, timeout: float) -> None:
        """``timeout``: seconds that an episode may take."""
        super().__init__()
        self._settings: dict[str, Any] = {"timeout": timeout, "env": env, "seed": seed}

    def process(self, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
        """See the class."""
        task, episode = job
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, task, f"{episode:06d}.npz")
            file.parent.mkdir()
            worker = self._worker()
            worker.send((task, episode, str(file)))
            worker.receive(f"{task}, episode {episode}")
            if recording.summary(file)["success"]:
                yield example(file)

    def _worker(self) -> Worker:
        workers = vars(_threads).setdefault("workers", {})
        key = repr(self._settings)
        if key not in workers:
            factory = "data_pipelines.writing.recording:serve"
            workers[key] = Worker(factory, **self._settings)
        return workers[key]


class BeamDemonstrations(Demonstrations):
    """The TFDS builder of one environment's dataset, whose examples are made on Beam."""

    def __init__(
        self, env: str, jobs: Mapping[str, Iterable[Job]], seed: int, timeout: float, **kwargs: Any
    ) -> None:
        """``jobs``: the episodes of each split."""
        self._jobs = {split: list(found) for split, found in jobs.items()}
        self._record = (env, seed, timeout)
        super().__init__(env, {}, **kwargs)

    def _split_generators(self, download: Any) -> dict[str, Any]:
        del download
        return {
            split: beam.Create(jobs) | beam.Reshuffle() | beam.ParDo(Record(*self._record))
            for split, jobs in self._jobs.items()
        }


def write(
    env: str,
    jobs: Mapping[str, Iterable[Job]],
    seed: int,
    timeout: float,
    folder: Path,
    options: str,
) -> Path:
    """Writes the dataset below ``folder``, which all workers must see, and returns its own folder.

    Args:
      env: the environment.
      jobs: the episodes of each split.
      seed: of noise and layouts.
      timeout: seconds that an episode may take.
      folder: a new one.
      options: of Beam's pipeline, as on a command line: ``--runner=DirectRunner --direct_num_workers=4``.

    Raises:
      OSError: the folder cannot be written to.
    """
    builder = BeamDemonstrations(env, jobs, seed, timeout, data_dir=folder)
    return prepare(builder, PipelineOptions(shlex.split(options)))
