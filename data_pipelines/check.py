"""Says what an RLDS dataset holds before anything is trained on it.

    python -m data_pipelines.check DIR                          # its features; writes a draft, my_robot.py
    python -m data_pipelines.check DIR --mapping=my_robot.py    # all that is wrong, or what there is to learn from

With a mapping it prints episodes, lengths, instructions, dimensions that are constant, two-valued or heavy-tailed, and
frames that repeat; and it writes ``frames.png`` (the first, middle and last frame of some episodes) and
``actions.png`` to ``--out``. A mapping is code that is executed: do not use a stranger's.
"""

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tokenizers import Tokenizer

from data_pipelines import draft
from data_pipelines.mapping import load_mapping
from data_pipelines.reading.episodes import read_episodes, read_segments
from data_pipelines.reading.layout import decode_image, find
from data_pipelines.reading.rlds import Dataset, features_of, is_own, open_dataset
from data_pipelines.reading.statistics import dataset_statistics
from mllm_act import normalization
from mllm_act.errors import UserError, run
from mllm_act.files import user_path, whole_file

DRAFT = "my_robot.py"  # in the current folder
SHOWN = 6  # episodes in the pictures
BATCH_SIZE = 32  # of configs/policy/common.py


def main(argv: Sequence[str]) -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", help="a TFDS folder; several with commas between them are one set"
    )
    parser.add_argument("--mapping", help="a file, or a name in configs/robots")
    parser.add_argument("--out", type=user_path, default=Path("check"), help="folder for pictures")
    parser.add_argument("--context", type=int, default=3, help="steps of a window (default: 3)")
    parser.add_argument(
        "--tokenizer", type=user_path, help="a tokenizer.json, to count the tokens of prompts"
    )
    args = parser.parse_args(argv)
    if args.context < 1:
        raise UserError(f"--context: expected at least 1, found {args.context}")
    if args.mapping is None and not is_own(args.directory):
        _write_draft(args.directory)
        return
    mapping = None if args.mapping is None else load_mapping(args.mapping)
    dataset = open_dataset(args.directory, mapping)
    for line in describe(dataset, args.context, args.tokenizer):
        print(line)
    args.out.mkdir(parents=True, exist_ok=True)
    repeats = _frames(dataset, args.out / "frames.png")
    for camera, share in repeats.items():
        print(
            f"camera {camera}: {share:.1%} of the frames repeat the one before, in the episodes shown"
        )
    print(f"Pictures are in {args.out}; look at them")
    flags = f"--config.data.directory={args.directory}"
    flags += f" --config.data.mapping={args.mapping}" if args.mapping else ""
    print(
        "Next: python -m mllm_act.train_tokenizer --config=configs/tokenizer/robot.py:rvq "
        f"--workdir=runs/{dataset.metadata['name']}/tokenizer {flags}"
    )


def describe(dataset: Dataset, context: int, tokenizer: Path | None) -> Iterator[str]:
    """Yields what is worth knowing about a dataset, a line or a table at a time.

    Raises:
      UserError: records are faulty, and the faults of all splits are listed; or there is no tokenizer.
    """
    metadata, found, faults = dataset.metadata, {}, []
    for name in dataset.splits:
        try:
            found[name] = np.bincount(*read_segments(dataset, name)).astype(int)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
    for name, lengths in found.items():
        split = dataset.split(name)
        yield (
            f"{name}: {len(split)} episodes of {lengths.min()} to {lengths.max()} steps (median "
            f"{np.median(lengths):.0f}), {lengths.sum()} in all, {split.num_bytes / 1e6:.1f} MB"
        )
    for camera, (height, width, _) in dataset.image_shapes.items():
        note = "" if height == width else ", not square: see config.fit"
        yield f"camera {camera}: {width} x {height} pixels{note}"
    statistics = dataset_statistics(dataset)
    yield normalization.table("config", metadata["name"], metadata["action_names"], statistics)
    yield from _unused(dataset)
    texts = [text for text in statistics.instructions if text]
    if not texts:
        yield "instructions: none; every prompt is the same"
    else:
        longest = max(texts, key=lambda text: len(text.encode()))
        size = f"{len(longest.encode())} bytes"
        if tokenizer is not None:
            if not tokenizer.is_file():
                raise UserError(f"--tokenizer={tokenizer}: expected a tokenizer.json, found none")
            size = f"{len(Tokenizer.from_file(str(tokenizer)).encode(longest).ids)} tokens"
        yield (
            f"instructions: {len(texts)} different; the longest has {size}: {longest[:80]!r}; config.prompt_tokens "
            "must hold it and the prompt around it"
        )
    windows = (statistics.num_steps + statistics.num_segments * (context - 1)) / context
    yield (
        f"one epoch is {windows:.0f} windows of {context} steps, {windows / BATCH_SIZE:.0f} updates at a batch of "
        f"{BATCH_SIZE}"
    )


def _unused(dataset: Dataset) -> Iterator[str]:
    """Yields the features that the mapping leaves out, and the numbers that it leaves out of those it takes."""
    layout = dataset.layout
    mapping = layout.mapping
    parts = (*mapping.action, *mapping.proprio)
    keys = [*mapping.cameras.values(), *mapping.instruction, mapping.task, *(p.key for p in parts)]
    used = {find(layout.features, key) for key in keys}
    left = sorted(set(layout.features) - used)
    if left:
        yield f"not used: {', '.join(left)}"
    for key in dict.fromkeys(part.key for part in parts):
        path = find(layout.features, key)
        if path is None:  # made by the mapping's step
            continue
        taken = {
            part.start + i for part in parts if part.key == key for i in range(len(part.names))
        }
        size = int(np.prod(layout.features[path].shape, initial=1))
        missing = sorted(set(range(size)) - taken)
        if missing:
            yield f"not used: {', '.join(f'{path}[{i}]' for i in missing[:20])}"


def _frames(dataset: Dataset, path: Path) -> dict[str, float]:
    """Draws frames and actions of some episodes; returns the share of frames that repeat, for each camera."""
    cameras = dataset.cameras
    split = dataset.split("train")
    shown = split.take(
        np.unique(np.linspace(0, len(split) - 1, SHOWN).round().astype(int)), "shown"
    )
    episodes = [episode for _, episode in read_episodes(dataset, shown)]
    rows = len(episodes) * len(cameras)
    figure = Figure(figsize=(7.5, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False)
    for (episode, camera), row in zip(itertools.product(episodes, cameras), axes, strict=True):
        images = episode["images"][camera]
        for step, axis in zip((0, len(images) // 2, len(images) - 1), row, strict=True):
            axis.imshow(decode_image(images[step], dataset.image_shapes[camera]).numpy())
            axis.set_title(f"\n{camera}, step {step}", fontsize=8, loc="left")
            axis.set_axis_off()
        sentence = episode["instruction"][0].decode()[:80].replace("\n", " ")
        title = f"{sentence}\n{camera}, step 0"
        text = row[0].set_title(title, fontsize=8, loc="left", parse_math=False)
        text.set_in_layout(False)  # it may be wider than the image
    _save(figure, path)
    _draw_actions(dataset.metadata, episodes, path.with_name("actions.png"))
    return {
        camera: _repeats([episode["images"][camera] for episode in episodes]) for camera in cameras
    }


def _draw_actions(
    metadata: Mapping[str, Any], episodes: Sequence[dict[str, Any]], path: Path
) -> None:
    names, units = metadata["action_names"], metadata["action_units"]
    figure = Figure(figsize=(9, 1.5 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for d, axis in enumerate(axes):
        for episode in episodes:
            axis.plot(episode["action"][:, d] * metadata["action_scale"][d], linewidth=0.8)
        axis.set_ylabel(f"{names[d]} {f'({units[d]})' if units[d] else ''}", fontsize=8)
    axes[-1].set_xlabel("step")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as partial, warnings.catch_warnings():
        # The font lacks Chinese, for example; boxes stand in the picture, and nothing else depends on it.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(partial, dpi=110)


def _repeats(episodes: Sequence[np.ndarray]) -> float:
    """Returns the share of encoded frames that equal the one before them."""
    same = sum(int((images[1:] == images[:-1]).sum()) for images in episodes)
    return same / max(1, sum(len(images) - 1 for images in episodes))


def _write_draft(directory: str) -> None:
    features = features_of(directory)
    for path, feature in sorted(features.items()):
        print(f"  {path:<50} {feature!r}")
    text = draft.write(directory, features)
    file, imported = Path(DRAFT), Path(directory) / "mapping.py"
    if imported.is_file():  # by data_pipelines.import_lerobot
        print(f"Next: python -m data_pipelines.check {directory} --mapping={imported}")
        return
    if file.exists():
        print(f"{file} exists and was left as it is; the draft:\n{text}")
    else:
        with whole_file(file) as partial:
            partial.write_text(text)
        print(f"Wrote a draft of the mapping to {file}: correct it")
    print(f"Next: python -m data_pipelines.check {directory} --mapping={file}")


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
