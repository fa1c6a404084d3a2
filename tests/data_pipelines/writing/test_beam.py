"""Demonstrations recorded and written on Apache Beam's direct runner. Needs the extra ``beam``."""

from pathlib import Path

import pytest

from data_pipelines.generate import generate
from data_pipelines.reading.episodes import read_episodes
from data_pipelines.reading.rlds import open_dataset

pytestmark = pytest.mark.slow


def test_beam_records_the_episodes_that_workers_do(tmp_path: Path) -> None:
    pytest.importorskip("apache_beam")
    arguments = {"env": "babyai", "tasks": "goto", "episodes": 3, "seed": 1, "workers": 1}
    alone, on_beam = tmp_path / "alone", tmp_path / "beam"
    expected = generate(**arguments, out=alone)
    record = generate(**arguments, out=on_beam, beam_options="--runner=DirectRunner")
    for key in ("episodes", "frames"):
        assert record["results"][key] == expected["results"][key] > 0
    for split in ("train", "val"):
        found, right = (
            {
                episode["action"].tobytes(): episode["instruction"].tolist()
                for _, episode in read_episodes(dataset, dataset.split(split), images=False)
            }
            for dataset in map(open_dataset, (on_beam, alone))
        )
        assert found == right
    assert generate(**arguments, out=on_beam, beam_options="") == record  # nothing to do
