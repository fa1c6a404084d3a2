"""Imports a LeRobot dataset (v2.0, v2.1 or v3.0: parquet and mp4) as RLDS, and writes the mapping to train on it.

    python -m data_pipelines.import_lerobot --source=DIR --out=data/my_robot
    python -m mllm_act.train_tokenizer --config=configs/tokenizer/robot.py:rvq --workdir=runs/tokenizer \\
        --config.data.directory=data/my_robot --config.data.mapping=data/my_robot/mapping.py

Each row becomes a step: the frames nearest to its time as JPEG at the videos' size, images in parquet files unchanged,
``observation.*`` under observation/, the sentence of its task, and everything else under its own name. Floating-point
numbers are float32 and integers int64. LeRobot records no units: add them to mapping.py.

All faults of the dataset are listed at once. An interrupted import continues when the same command is started again:
until the dataset is complete, imported episodes are kept in DIR/.episodes. The bytes of the dataset do not depend on
the number of workers, nor on interruptions.
"""

import argparse
import contextlib
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines import resumable
from data_pipelines.mapping import DataMapping, Part, load_mapping
from data_pipelines.reading.rlds import open_dataset
from data_pipelines.resumable import EPISODES
from data_pipelines.writing import recording
from data_pipelines.writing.lerobot import (
    Shapes,
    Source,
    faulty,
    image_shapes,
    open_source,
    stamp,
)
from data_pipelines.writing.lerobot_features import ACTION, STATE
from mllm_act import errors
from mllm_act.envs.processes import LONGEST_TIMEOUT
from mllm_act.errors import UserError
from mllm_act.files import user_path, whole_file

MAPPING = "mapping.py"


def make_mapping(source: Source) -> DataMapping:
    """Returns how an imported dataset is read: all cameras, the action, the state if there is one."""

    def parts(keys: tuple[str, ...]) -> tuple[Part, ...]:
        feature = source.first(keys)
        return (Part(feature.path, feature.names),) if feature else ()

    return DataMapping(
        name=source.robot,
        cameras={camera.path.partition("/")[2]: camera.path for camera in source.cameras},
        action=parts(ACTION),
        proprio=parts(STATE),
        instruction=("language_instruction",),
        task="episode_metadata/task",
        rate=source.fps,
    )


def mapping_text(mapping: DataMapping) -> str:
    """Returns the file that ``load_mapping`` reads the mapping from. Names are a stranger's: each is one literal."""

    def parts(values: tuple[Part, ...]) -> list[str]:
        return [
            f"        Part({part.key!r}, {part.names!r}, unit={part.unit!r}),\n" for part in values
        ]

    return "".join(
        [
            '"""How training reads this dataset: see data_pipelines/mapping.py.\n\n',
            "LeRobot records no units: write them here. A Part has one unit; a feature can have several Parts,\n",
            'each with its own `start`.\n"""\n\n',
            "from data_pipelines.mapping import DataMapping, Part\n\n",
            "MAPPING = DataMapping(\n",
            f"    name={mapping.name!r},\n",
            "    cameras={\n",
            *(f"        {ours!r}: {theirs!r},\n" for ours, theirs in mapping.cameras.items()),
            "    },\n    action=(\n",
            *parts(mapping.action),
            "    ),\n    proprio=(\n",
            *parts(mapping.proprio),
            "    ),\n",
            f"    instruction={mapping.instruction!r},\n",
            f"    task={mapping.task!r},\n",
            f"    rate={mapping.rate!r},\n",
            ")\n",
        ]
    )


def import_dataset(source: Path, out: Path, workers: int) -> dict[str, Any]:
    """Writes the dataset to ``out``, unless it is complete already.

    Returns:
      The content of ``generation.json``: ``arguments``, ``recipe``, ``results``, and the ``sha256`` of the files.

    Raises:
      UserError: an argument is wrong; the LeRobot dataset has faults, and all are listed; ``out`` has something else
        in it, is in use or cannot be written to; a worker died; or the import was interrupted.
    """
    if workers < 1:
        raise UserError(f"--workers: expected at least 1, found {workers}")
    opened = open_source(source)
    for reason in opened.left_out:
        print(f"notice: left out: {reason}")
    files = {e.index: out / EPISODES / f"{e.index:09d}.npz" for e in opened.episodes}
    with resumable.writing(out, files.values()):
        record = _open(out, opened)
        if "results" not in record:
            return _complete(record, opened, files, workers, out)
        _check(out)
        shutil.rmtree(out / EPISODES, ignore_errors=True)
        print(f"{out} is complete: nothing to do")
        return record


def _open(out: Path, source: Source) -> dict[str, Any]:
    """Returns the content of ``generation.json``; see ``resumable.open_record``."""
    arguments = {"program": "import_lerobot", "metadata_sha256": source.digest}
    recipe = {"jpeg_quality": recording.JPEG_QUALITY}
    return resumable.open_record(
        out, {"arguments": arguments, "recipe": recipe}, f"the import of {source.folder}"
    )


def _check(out: Path) -> None:
    """Raises UserError unless the dataset in ``out`` opens with its mapping."""
    try:
        open_dataset(out, load_mapping(str(out / MAPPING)))
    except UserError as error:
        raise UserError(f"{error}; to import it again here, delete {out} first") from None


def _complete(
    record: dict[str, Any], source: Source, files: dict[int, Path], workers: int, out: Path
) -> dict[str, Any]:
    """Reads the missing episodes, then writes the dataset and the results."""
    _read(source, files, workers)
    from data_pipelines.writing import lerobot_rlds  # imports TensorFlow

    mapping = make_mapping(source)
    dataset = lerobot_rlds.write(source, files, mapping.metadata(), resumable.staging(out))
    record["sha256"] = resumable.publish(dataset, out)
    with whole_file(out / MAPPING) as partial:
        partial.write_text(mapping_text(mapping), encoding="utf-8")
    _check(out)
    frames = sum(episode.length for episode in source.episodes)
    record["results"] = {"episodes": len(files), "frames": frames}
    resumable.finish(out, record)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{len(files)} episodes, {frames} frames, {size / 1e6:.1f} MB in {out}")
    print(
        f"next: python -m data_pipelines.check {out} --mapping={out / MAPPING}, after writing the units into that file"
    )
    return record


def _read(source: Source, files: dict[int, Path], workers: int) -> None:
    """Has the missing episodes read; raises UserError with the faults of all of them."""
    sizes: dict[str, Counter[tuple[int, ...]]] = {f.key: Counter() for f in source.cameras}
    faults: list[str] = []

    def count(shapes: Shapes) -> None:
        for key, shape in shapes.items():
            sizes[key][shape] += 1
        bar.update()

    missing = []
    next(iter(files.values())).parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(files), unit="episode", desc="reading") as bar:
        for episode in source.episodes:
            with contextlib.suppress(UserError):  # there is none, or it is damaged
                arrays = recording.load(files[episode.index])
                if str(arrays["stamp"]) == stamp(source, episode):
                    count(image_shapes(arrays))
                    continue
            missing.append(episode)
        for _, (found, shapes) in resumable.in_workers(
            "data_pipelines.writing.lerobot_episode:serve", missing, min(workers, len(missing)), LONGEST_TIMEOUT,
            request=lambda episode: (episode, str(files[episode.index])),
            doing=lambda episode: f"episode {episode.index}",
            source=source,
        ):  # fmt: skip
            faults += found
            count(shapes)
    for key, counts in sizes.items():
        if len(counts) > 1:
            listed = ", ".join(f"{h} x {w} in {n} episodes" for (h, w), n in sorted(counts.items()))
            faults.append(f"{key}: expected images of one height and width, found {listed}")
    if faults:
        raise faulty(source.folder, sorted(faults))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.import_lerobot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", type=user_path, required=True, help="folder of the LeRobot dataset, with meta/"
    )
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder to write the dataset to"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that decode (default: number of cores)",
    )
    arguments = parser.parse_args()
    import_dataset(arguments.source, arguments.out, arguments.workers)


if __name__ == "__main__":
    errors.run(main)
