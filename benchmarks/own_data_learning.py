"""Shows that a policy learns from the images of a foreign dataset, without a simulator.

    python benchmarks/own_data_learning.py --out=/tmp/learning                 # rvq: a tokenizer, then the policy
    python benchmarks/own_data_learning.py --out=/tmp/learning --adapter=regression

It writes 3,000 episodes of 10 steps in the layout of ``rlds_dataset_builder``: a disc of 20 pixels in an image of 100 x
100, on a background of another colour in each episode. The action is the way from the disc to the middle of the image,
and 1 for a red disc or 0 for a blue one. Nothing but the image tells it: the instruction is always the same, and there
is no proprioception. Then it runs the commands of README's "Train on your own data". At least 90 % of the variance of
each number must be explained on the held-out episodes; the exit status is 1 if not.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from data_pipelines.tensorflow_cpu import tf
from mllm_act.errors import UserError, expect_new, run
from mllm_act.files import user_path

EPISODES, LENGTH, SIZE, RADIUS = 3000, 10, 100, 10
EXPLAINED = 0.9
# For actions of three numbers; the config's own size and 2,000 updates are for robots.
TOKENIZER = {"tokenizer.codes": 32, "tokenizer.hidden": 128, "tokenizer.width": 32, "steps": 600}
MAPPING = """from data_pipelines.mapping import DataMapping, Part

MAPPING = DataMapping(
    name="disc",
    cameras={"front": "observation/image"},
    action=(Part("action", ("dx", "dy"), "m", scale=0.1), Part("action", ("gripper",), start=2)),
    instruction=("language_instruction",),
)
"""


def features() -> tfds.features.FeaturesDict:
    """Returns the features of the set."""
    return tfds.features.FeaturesDict({
        "steps": tfds.features.Dataset({
            "observation": {"image": tfds.features.Image(shape=(SIZE, SIZE, 3))},
            "action": tfds.features.Tensor(shape=(3,), dtype=np.float32),
            "language_instruction": tfds.features.Text(),
        })
    })  # fmt: skip


def episode(draw: np.random.Generator) -> dict[str, Any]:
    """Returns an episode: the disc wanders, and its colour and the background stay."""
    red, background = bool(draw.integers(2)), draw.integers(60, 200, 3, np.uint8)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    place, steps = draw.uniform(RADIUS, SIZE - RADIUS, 2), []
    for _ in range(LENGTH):
        place = np.clip(place + draw.normal(0, 15, 2), RADIUS, SIZE - RADIUS)
        disc = (columns - place[0]) ** 2 + (rows - place[1]) ** 2 < RADIUS**2
        colour = np.uint8((230, 20, 20) if red else (20, 20, 230))
        to_middle = 1 - 2 * place / SIZE
        steps.append({
            "observation": {"image": np.where(disc[..., None], colour, background)},
            "action": np.float32([*to_middle, red]),
            "language_instruction": "move the disc to the middle",
        })  # fmt: skip
    return {"steps": steps}


def write(folder: Path) -> None:
    """Writes the dataset."""
    folder.mkdir(parents=True)
    draw, layout = np.random.default_rng(0), features()
    serializer = example_serializer.ExampleSerializer(layout.get_serialized_info())
    with tf.io.TFRecordWriter(str(folder / "disc-train.tfrecord-00000-of-00001")) as writer:
        for _ in range(EPISODES):
            writer.write(serializer.serialize_example(layout.encode_example(episode(draw))))
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="disc", split="train", filetype_suffix="tfrecord"
    )
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[EPISODES], num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(data_dir=folder, features=layout, split_infos=[info])


def command(module: str, *flags: str) -> None:
    """Runs a program. Raises ``UserError`` if it fails."""
    print(f"python -m {module} {' '.join(flags)}", flush=True)
    if subprocess.run([sys.executable, "-m", module, *flags]).returncode:
        raise UserError(f"{module}: expected it to succeed, found an error; see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=user_path, required=True, help="a new folder")
    parser.add_argument("--adapter", default="rvq", help="rvq, vq, uniform or regression")
    parser.add_argument("--steps", type=int, default=600, help="updates of the policy")
    flags = parser.parse_args()
    expect_new(flags.out)
    folder, mapping = flags.out / "data", flags.out / "disc.py"
    write(folder)
    mapping.write_text(MAPPING)
    data = [f"--config.data.directory={folder}", f"--config.data.mapping={mapping}"]
    started = time.perf_counter()
    variant = f"{flags.adapter},preset=tiny_grid"  # its bridge finds a place in an image from few examples
    policy = [f"--config=configs/policy/robot.py:{variant}", f"--workdir={flags.out / 'run'}"]
    if flags.adapter in ("vq", "rvq"):
        config = f"--config=configs/tokenizer/robot.py:{flags.adapter}"
        small = [f"--config.{key}={value}" for key, value in TOKENIZER.items()]
        workdir = f"--workdir={flags.out / 'tokenizer'}"
        command("mllm_act.train_tokenizer", config, workdir, *data, *small)
        policy.append(f"--config.tokenizer={flags.out / 'tokenizer'}")
    settings = {
        "steps": flags.steps, "validate_every": flags.steps, "checkpoint_every": flags.steps, "data.context": 1,
        "prompt_tokens": 24, "optimizer.learning_rate": 1e-3,
    }  # fmt: skip
    policy += [f"--config.{key}={value}" for key, value in settings.items()]
    command("mllm_act.train", *policy, *data)
    evaluation = [f"--checkpoint={flags.out / 'run'}", f"--data={folder}"]
    command("mllm_act.evaluate", *evaluation, "--split=val")
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads((flags.out / "run/offline/disc/val/summary.json").read_text())
    explained = {row["dimension"]: round(row["r2"], 4) for row in summary["dimensions"]}
    result = {"adapter": flags.adapter, "updates": flags.steps, "seconds": round(seconds),
              "processor_seconds": round(used.ru_utime + used.ru_stime)}  # fmt: skip
    print(json.dumps({**result, "episodes": summary["episodes"], "explained": explained}))
    sys.exit(min(explained.values()) < EXPLAINED)


if __name__ == "__main__":
    run(main)
