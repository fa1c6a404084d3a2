"""Shows what is in a run's checkpoint, in a screen.

    python -m mllm_act.inspect runs/mine

Reads the checkpoint's JSON document and the results beside it; no array is loaded. ``python -m mllm_act.doctor RUN``
checks that the arrays are whole.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_act import parameters
from mllm_act.checkpoints.checkpoint import find, parsing, read_meta, steps
from mllm_act.errors import run
from mllm_act.files import user_path
from mllm_act.normalization import Statistics
from mllm_act.policy.load import abstract, check_format
from mllm_act.policy.network import EmbodimentConfig, NetworkConfig

SHOWN = 16  # dimensions of an action, at most


def describe(path: Path) -> str:
    """Returns what a checkpoint holds, as text.

    Args:
      path: a run's folder, whose newest checkpoint is taken, or one step of it.

    Raises:
      UserError: there is no whole checkpoint, or another version wrote it.
    """
    workdir, step = find(path)
    meta = read_meta(workdir, step)
    where = f"{workdir}/checkpoints/{step}"
    made = meta.get("provenance", {})
    commit = (made.get("git_commit") or "unknown")[:12]
    lines = [
        f"{workdir}: step {step}; steps kept: {', '.join(map(str, steps(workdir)))}",
        f"written by mllm_act {made.get('mllm_act')} (commit {commit}), jax {made.get('libraries', {}).get('jax')}, on "
        f"{made.get('devices')}",
    ]
    if "network" in meta:
        with parsing(meta, where):
            check_format(meta, where)
            config = NetworkConfig.from_dict(meta["network"])
            lines += ["", *_network(config, meta)]
            for name, embodiment in config.embodiments.items():
                lines += ["", *_embodiment(name, embodiment, meta)]
    else:
        lines += ["", "no policy; its JSON document has: " + ", ".join(sorted(meta))]
    lines += ["", *_results(workdir)]
    lines += [f"disk: {name} {size / 2**20:,.1f} MiB" for name, size in _sizes(workdir)]
    return "\n".join(lines)


def _network(config: NetworkConfig, meta: Mapping[str, Any]) -> Iterator[str]:
    model = config.model
    vision, language, lora = model.vision, model.language, model.language.lora
    yield (
        f"model: preset {config.preset}; images {model.fit} to {vision.image_size} pixels; bridge "
        + (", ".join(model.bridge) or "none")
    )
    yield (
        f"language: {language.layers} layers of width {language.width}, at most {language.max_positions} positions, "
        + (f"LoRA of rank {lora.rank}" if lora else "no LoRA")
    )
    yield f"history: {model.history}; computes in {model.dtype}"
    _, trained, frozen = parameters.split(abstract(config, meta), config.trained)
    counts = [
        sum(math.prod(leaf.shape) for leaf in parameters.flatten(part).values())
        for part in (trained, frozen)
    ]
    yield f"parameters: {counts[0]:,} trained, {counts[1]:,} frozen"
    for source in meta.get("pretrained") or ():
        yield f"pretrained: {json.dumps(source)[:100]}"


def _embodiment(name: str, embodiment: EmbodimentConfig, meta: Mapping[str, Any]) -> Iterator[str]:
    dataset, prompt = meta["dataset"][name], meta["prompt"][name]
    statistics = Statistics.from_dict(meta["statistics"][name])
    shapes = dataset.get("image_shapes", {})
    cameras = [
        camera + (f" {shapes[camera][0]} x {shapes[camera][1]}" if camera in shapes else "")
        for camera in embodiment.cameras
    ]
    settings = ", ".join(
        f"{key} {value}" for key, value in meta["network"]["embodiments"][name]["adapter_config"].items()
        if isinstance(value, int | float | str)
    )  # fmt: skip
    yield f"{name}: adapter {embodiment.adapter}" + (f" ({settings})" if settings else "")
    yield f"  cameras {', '.join(cameras)}; {len(statistics.proprio.mean)} numbers of proprioception"
    yield (
        f"  context {embodiment.context}, chunk {embodiment.chunk}, prompts of {prompt['length']} tokens, "
        f"{dataset.get('control_hz', 'unknown')} Hz"
    )
    yield (
        f"  trained on {statistics.num_episodes:,} episodes, {statistics.num_steps:,} steps, {len(statistics.tasks)} "
        f"tasks, {len(statistics.instructions)} sentences; split {statistics.split}, data {statistics.fingerprint[:12]}"
    )
    if dataset.get("choices"):
        yield f"  actions: {', '.join(dataset['choices'])}"
        return
    yield f"  actions, normalised by {statistics.normalization}; in stored numbers:"
    yield f"    {'':16} {'unit':>10} {'scale':>8} {'min':>9} {'q01':>9} {'mean':>9} {'q99':>9} {'max':>9}"
    action, names = statistics.action, dataset["action_names"]
    for i, dimension in enumerate(names[:SHOWN]):
        numbers = (action.min[i], action.q01[i], action.mean[i], action.q99[i], action.max[i])
        kind = (
            " two values"
            if action.two_valued[i]
            else " constant"
            if action.min[i] == action.max[i]
            else ""
        )
        yield (
            f"    {dimension:16} {dataset['action_units'][i]:>10} {dataset['action_scale'][i]:>8.4g} "
            + " ".join(f"{number:>9.4g}" for number in numbers)
            + kind
        )
    if len(names) > SHOWN:
        yield f"    and {len(names) - SHOWN} more"


def _results(workdir: Path) -> Iterator[str]:
    last: dict[str, Any] = {}
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        last |= json.loads(line)
    shown = [f"{key} {last[key]:.4g}" for key in sorted(last) if key.endswith("loss")]
    if shown:
        yield f"last logged, up to step {last['step']}: {', '.join(shown)}"
    for summary in sorted(workdir.glob("evaluation/*/*/summary.json")):
        found = json.loads(summary.read_text())
        total = found["tasks"][-1]
        yield (
            f"evaluated at step {found.get('step')} in {summary.parent.parent.name}, {summary.parent.name}: "
            f"{total['success']:.0%} ({total['low']:.0%} to {total['high']:.0%}) of {total['episodes']} episodes"
        )


def _sizes(workdir: Path) -> Iterator[tuple[str, int]]:
    folders = [*sorted((workdir / "checkpoints").iterdir()), workdir / "frozen"]
    for folder in folders:
        if folder.is_dir():
            files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            yield str(folder.relative_to(workdir)), sum(files)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=user_path, help="a run's folder, or one of its steps")
    print(describe(parser.parse_args().run))


if __name__ == "__main__":
    run(main)
