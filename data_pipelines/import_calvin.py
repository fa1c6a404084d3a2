"""Imports a CALVIN dataset as it is downloaded (task_ABC_D, task_D_D, debug: a .npz file a frame) as RLDS.

    python -m data_pipelines.import_calvin --source=task_ABC_D --out=data/calvin
    python -m mllm_act.train_tokenizer --config=configs/tokenizer/robot.py:rvq --workdir=runs/calvin/tokenizer \\
        --config.data.directory=data/calvin --config.data.mapping=calvin

Each annotation becomes an episode, with its sentence and task; training/ becomes the split train, validation/ val.
Images are stored as JPEG, numbers as float32. Play without a sentence, depth and touch are left out.

All faults of the dataset are listed at once. An interrupted import continues when the same command is started again:
until the dataset is complete, imported episodes are kept in DIR/.episodes. The bytes of the dataset do not depend on
the number of workers, nor on interruptions.
"""

import argparse
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines import resumable
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.resumable import EPISODES
from data_pipelines.writing import recording
from data_pipelines.writing.calvin import Episode, Source, faulty, open_source
from mllm_act import errors
from mllm_act.envs.processes import LONGEST_TIMEOUT
from mllm_act.errors import UserError
from mllm_act.files import user_path

MAPPING = "calvin"


def import_dataset(source: Path, out: Path, workers: int) -> dict[str, Any]:
    """Writes the dataset to ``out``, unless it is complete already.

    Returns:
      The content of ``generation.json``: ``arguments``, ``recipe``, ``results``, and the ``sha256`` of the files.

    Raises:
      UserError: an argument is wrong; the CALVIN dataset has faults, and all are listed; ``out`` has something else in
        it, is in use or cannot be written to; a worker died; or the import was interrupted.
    """
    if workers < 1:
        raise UserError(f"--workers: expected at least 1, found {workers}")
    opened = open_source(source)
    files = {e: out / EPISODES / e.folder / f"{e.number:09d}.npz" for e in opened.episodes}
    arguments = {"program": "import_calvin", "annotations_sha256": opened.digest}
    recipe = {"jpeg_quality": recording.JPEG_QUALITY}
    with resumable.writing(out, files.values()):
        record = resumable.open_record(
            out, {"arguments": arguments, "recipe": recipe}, f"the import of {source}"
        )
        if "results" not in record:
            _complete(record, opened, files, workers, out)
            return record
        _check(out)
        shutil.rmtree(out / EPISODES, ignore_errors=True)
        print(f"{out} is complete: nothing to do")
        return record


def _complete(
    record: dict[str, Any], source: Source, files: Mapping[Episode, Path], workers: int, out: Path
) -> None:
    """Reads the missing episodes, then writes the dataset and the results."""
    _read(source, files, workers)
    from data_pipelines.writing import calvin_rlds  # imports TensorFlow

    record["sha256"] = resumable.publish(calvin_rlds.write(files, resumable.staging(out)), out)
    _check(out)
    frames = sum(episode.last + 1 - episode.first for episode in files)
    record["results"] = {"episodes": len(files), "frames": frames}
    resumable.finish(out, record)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{len(files)} episodes, {frames} frames, {size / 1e6:.1f} MB in {out}")
    print(f"Next: python -m data_pipelines.check {out} --mapping={MAPPING}")


def _check(out: Path) -> None:
    """Raises UserError unless the dataset in ``out`` opens with its mapping."""
    try:
        open_dataset(out, MAPPING)
    except UserError as error:
        raise UserError(f"{error}; to import it again here, delete {out} first") from None


def _read(source: Source, files: Mapping[Episode, Path], workers: int) -> None:
    """Has the missing episodes read; raises UserError with the faults of all of them."""
    missing = [episode for episode, file in files.items() if not resumable.kept(file)]
    for episode in missing:
        files[episode].parent.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with tqdm(
        total=len(files), initial=len(files) - len(missing), unit="episode", desc="reading"
    ) as bar:
        for _, found in resumable.in_workers(
            "data_pipelines.writing.calvin:serve", missing, min(workers, len(missing)), LONGEST_TIMEOUT,
            request=lambda episode: (episode, str(files[episode])),
            doing=lambda episode: episode.name,
            folder=source.folder,
        ):  # fmt: skip
            faults += found
            bar.update()
    if faults:
        raise faulty(source.folder, sorted(faults))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.import_calvin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source",
        type=user_path,
        required=True,
        help="folder of the dataset, with training/ and validation/",
    )
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder to write the dataset to"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that read (default: number of cores)",
    )
    arguments = parser.parse_args()
    import_dataset(arguments.source, arguments.out, arguments.workers)


if __name__ == "__main__":
    errors.run(main)
