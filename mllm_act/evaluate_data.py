"""Offline evaluation: a policy acts on recorded episodes, and its actions are compared with the recorded ones.

    python -m mllm_act.evaluate --checkpoint=runs/my_robot --data=DIR --split=val

The frames of each episode pass through ``Policy.act`` in their order, as on the robot: memory begins with the episode,
chunks are executed, and instructions change where they change in the recording. The next frame is the recorded one
whatever the policy says.

Errors are in physical units, over all steps, beside those of two policies that see no image: the mean action of the
training data, and the action recorded one step before (at an episode's first step the mean action). Those of discrete
actions are shares of wrong actions, and the most frequent action of the split stands in for the mean. ``horizon.csv``
has the error by position in a chunk, beside that of repeating the last action before the chunk was decided on.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.mapping import DataMapping, Part
from data_pipelines.reading.episodes import READ_ERRORS, explain, read_episodes
from data_pipelines.reading.layout import decode_image
from data_pipelines.reading.rlds import Dataset, open_dataset
from data_pipelines.reading.splits import Split
from mllm_act.checkpoints.checkpoint import parsing
from mllm_act.errors import UserError
from mllm_act.files import write_csv
from mllm_act.open_loop import (
    Acted,
    Columns,
    dimension_rows,
    episode_row,
    horizon_rows,
    most_frequent,
    plot,
    table,
)
from mllm_act.policy import Policy

NOTE = "Open-loop error is not success: on the robot, each action decides what is seen next."
PLOTS = 8  # episodes that are plotted


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Episodes to evaluate a policy on; ``open_recordings`` makes one that fits it."""

    policy: Policy
    dataset: Dataset
    split: Split

    @property
    def columns(self) -> Columns:
        """The name, unit and scale of each dimension of an action."""
        metadata = self.dataset.metadata
        keys = ("action_names", "action_units", "action_scale")
        return list(zip(*(metadata[key] for key in keys), strict=True))


def open_recordings(
    policy: Policy, data: str, mapping: DataMapping | None, split: str, episodes: int | None
) -> Recordings:
    """Opens recorded episodes.

    Args:
      policy: acts on them.
      data: a folder of the dataset, or several with commas between them.
      mapping: see ``data_pipelines.mapping``; without it the one that is kept in the checkpoint is taken, if any.
      split: of the dataset.
      episodes: how many, evenly spaced over the split; None for all.

    Raises:
      UserError: if the data cannot be opened or does not fit the policy; all that does not fit is listed.
    """
    kept = policy.meta["dataset"][policy.name].get("mapping")
    if mapping is None and kept is not None:
        mapping = kept_mapping(policy, kept)
    dataset = open_dataset(data, mapping)
    _check(policy, dataset)
    found = dataset.split(split)
    train = dataset.splits.get("train")
    trained_on = policy.meta["statistics"][policy.name]["fingerprint"]
    if train is not None and split != "train" and set(found.files) & set(train.files):
        if train.fingerprint != trained_on:
            print(
                f"notice: {data}: {split} was held out from other episodes than those that the policy was trained on, "
                "and may contain some of these; name the folders and the mapping of the training"
            )
    if episodes is not None and episodes < len(found):
        found = found.take(np.linspace(0, len(found) - 1, episodes).round().astype(int), split)
    return Recordings(policy, dataset, found)


def kept_mapping(policy: Policy, values: Mapping[str, Any]) -> DataMapping:
    """Returns the mapping that a checkpoint keeps as plain values."""
    values = dict(values)
    if values.pop("step", None):
        raise UserError(
            f"--mapping: expected the file of the mapping of {policy.name}, whose function step relabelled the "
            "demonstrations and is not kept in a checkpoint, found none; pass --mapping=FILE.py"
        )
    with parsing(policy.meta, "mapping"):
        parts = {
            key: tuple(Part(**{**part, "names": tuple(part["names"])}) for part in values[key])
            for key in ("action", "proprio")
        }
        texts = {key: tuple(values[key]) for key in ("instruction", "choices")}
        return DataMapping(**{**values, **parts, **texts})


def _check(policy: Policy, dataset: Dataset) -> None:
    trained, metadata = policy.meta["dataset"][policy.name], dataset.metadata
    problems = [
        f"{key}: expected {trained[key]!r}, found {metadata.get(key)!r}"
        for key in ("name", "action_names", "action_units", "action_scale")
        if metadata.get(key) != trained[key]
    ]
    if list(metadata.get("choices", ())) != list(trained.get("choices", ())):
        problems.append("choices: expected those of the training data, found others")
    missing = sorted(set(policy.embodiment.cameras) - set(dataset.cameras))
    if missing:
        problems.append(
            f"cameras: expected {', '.join(policy.embodiment.cameras)}, found no {', '.join(missing)}"
        )
    proprio = len(policy.meta["statistics"][policy.name]["proprio"]["mean"])
    if dataset.proprio_dim != proprio:
        problems.append(f"proprio: expected {proprio} numbers, found {dataset.proprio_dim}")
    if problems:
        raise UserError(
            f"--data={dataset.directory}: expected data like that which the policy was trained on, found others: "
            f"{'; '.join(problems)}; pass the mapping of the training (--mapping), or other data"
        )


class _Slot:
    """A recorded episode that a policy is acting on."""

    def __init__(self, number: int, location: str, episode: Mapping[str, Any]) -> None:
        self.number, self.location, self.episode = number, location, episode
        self.predicted: list[np.ndarray] = []
        self.position: list[int] = []

    @property
    def ended(self) -> bool:
        return len(self.predicted) == len(self.episode["action"])

    def acted(self) -> Acted:
        episode = self.episode
        return Acted(
            self.number, self.location, episode["task"].decode(), episode["instruction"][0].decode(),
            episode["action"], np.stack(self.predicted), np.array(self.position),
        )  # fmt: skip


def act(recordings: Recordings, batch: int) -> Iterator[Acted]:
    """Lets the policy act on all episodes, ``batch`` at a time, and yields each as it ends.

    Raises:
      UserError: if a record or an image is damaged; it names file and record.
    """
    policy, dataset, split = recordings.policy, recordings.dataset, recordings.split
    waiting = enumerate(read_episodes(dataset, split))
    batch = min(batch, len(split))
    slots: list[_Slot | None] = [None] * batch
    # A slot without an episode keeps its last observation, so that arrays have the same shape at every step.
    images = {
        camera: np.zeros((batch, *dataset.image_shapes[camera]), np.uint8)
        for camera in policy.embodiment.cameras
    }
    proprio = np.zeros((batch, dataset.proprio_dim), np.float32)
    instructions, memory = [""] * batch, policy.start(batch)
    with tqdm(total=len(split), desc="evaluate", unit="episode") as bar:
        while True:
            first = np.zeros(batch, bool)
            for i in range(batch):
                if slots[i] is None and (following := next(waiting, None)) is not None:
                    number, (location, episode) = following
                    slots[i], first[i] = _Slot(number, location, episode), True
            playing = [(i, slot) for i, slot in enumerate(slots) if slot is not None]
            if not playing:
                return
            for i, slot in playing:
                step, recorded = len(slot.predicted), slot.episode
                for camera, shape in dataset.image_shapes.items():
                    if camera in images:
                        try:
                            image = decode_image(recorded["images"][camera][step], shape)
                        except READ_ERRORS as error:
                            raise explain(dataset, split, error) from None
                        images[camera][i] = image.numpy()
                proprio[i] = recorded["proprio"][step]
                instructions[i] = recorded["instruction"][step].decode()
            action, memory = policy.act(images, proprio, instructions, first, memory)
            position = np.asarray(memory.steps.plan.age)[:, -1] - 1
            for i, slot in playing:
                slot.predicted.append(action[i])
                slot.position.append(int(position[i]))
                if slot.ended:
                    slots[i] = None
                    bar.update()
                    yield slot.acted()


def evaluate(recordings: Recordings, batch: int, out: Path) -> tuple[dict[str, Any], str]:
    """Evaluates the policy and writes ``dimensions.csv``, ``episodes.csv``, ``horizon.csv`` and plots.

    Returns:
      What belongs into ``summary.json``, and the text to print.
    """
    policy, columns = recordings.policy, recordings.columns
    episodes = sorted(act(recordings, batch), key=lambda episode: episode.number)
    choices = list(recordings.dataset.metadata.get("choices", ()))
    if choices:
        usual = most_frequent(episodes)
    else:
        usual = np.array(policy.meta["statistics"][policy.name]["action"]["mean"])
    dimensions = dimension_rows(episodes, columns, usual, bool(choices))
    rows = [episode_row(episode, columns, bool(choices)) for episode in episodes]
    horizon = []
    if any(episode.position.any() for episode in episodes):  # chunks are executed to their end
        horizon = horizon_rows(episodes, columns, usual)
        write_csv(out / "horizon.csv", horizon)
    write_csv(out / "dimensions.csv", dimensions)
    write_csv(out / "episodes.csv", rows)
    (out / "episodes").mkdir()
    shown = np.linspace(0, len(episodes) - 1, min(PLOTS, len(episodes))).round().astype(int)
    for number in shown:
        path = out / "episodes" / f"{episodes[number].number:05d}.png"
        plot(episodes[number], columns, choices, path)
    summary = {
        "embodiment": policy.name, "adapter": policy.embodiment.adapter, "chunk": policy.embodiment.chunk,
        "episodes": len(episodes), "steps": sum(len(episode.true) for episode in episodes),
        "dimensions": dimensions, "horizon": horizon, "note": NOTE,
    }  # fmt: skip
    return summary, f"{table(dimensions)}\n{NOTE}"
