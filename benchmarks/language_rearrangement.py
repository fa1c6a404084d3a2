"""Language Rearrangement: the expert on all official episodes, the hold-out of 10,000 generated ones, and rates.

    python benchmarks/language_rearrangement.py             # the official part needs LANGR_EPISODES
    python benchmarks/language_rearrangement.py --generated=1000 --frames=200

The hold-out fails if a generated episode says what an official evaluation episode says (except ``new_scenes``, whose
instructions are the training's), names a held-out class where one object is carried or found, or has a layout of an
official room. Rates are frames per second of processor time, of one process with one thread: what a worker reaches on
an idle core.
"""

import argparse
import json
import os
import re
import statistics
import time
from collections import Counter

from mllm_act import envs
from mllm_act.envs.language_rearrangement import language_rearrangement, official
from mllm_act.envs.language_rearrangement.entities import ACTIONS, HELD_OUT
from mllm_act.envs.language_rearrangement.expert import Expert
from mllm_act.envs.language_rearrangement.language_rearrangement import ANY, LLARP, SPEC, SPLITS
from mllm_act.envs.language_rearrangement.scene import Scene
from mllm_act.envs.language_rearrangement.world import Task, World


def expert_on_official_episodes() -> None:
    """Prints the expert's success, steps and progress on every official split."""
    print(f"{'split':26} solved  steps  most  progress")
    total = 0
    for split in official.SPLITS:
        steps, progress, solved = [], [], 0
        for configuration in SPLITS[split]:
            task = Task(language_rearrangement.episode(ANY, configuration, 0))
            expert, count = Expert(task), 0
            while not task.solved and count < SPEC.horizon:
                task.step(expert.advise())
                expert.look()
                count += 1
            solved += task.solved
            steps.append(count)
            progress.append(task.progress)
        total += solved
        print(
            f"{split:26} {solved:6d}  {statistics.mean(steps):5.1f}  {max(steps):4d}  {statistics.mean(progress):8.3f}"
        )
    print(f"{'all':26} {total:6d} of {100 * len(official.SPLITS)}")


def hold_out(task: str, count: int) -> None:
    """Generates ``count`` training episodes of a task and checks that they hold out what evaluation asks for."""
    said: dict[str, str] = {}
    layouts = set()
    if os.environ.get(official.VARIABLE):
        for split in official.SPLITS[1:]:
            for configuration in SPLITS[split]:
                found = language_rearrangement.episode(ANY, configuration, 0)
                layouts.add(str(found.layout))
                if split != "new_scenes":
                    said[found.instruction.lower().strip(" .?")] = split
    templates: Counter[str] = Counter()
    texts = set()
    started = time.process_time()
    for configuration in range(count):
        episode = language_rearrangement.episode(task, configuration, 0)
        templates[episode.template] += 1
        texts.add(episode.instruction)
        same = said.get(episode.instruction.lower().strip(" .?"))
        assert same is None, f"{episode.instruction!r} is of {same}"
        assert str(episode.layout) not in layouts
        if episode.template in ("move-from-to", "move-to", "find"):
            named = set(re.findall(r"'expr_type': '(\w+)'", str(episode.goal)))
            assert not named & set(HELD_OUT), episode.instruction
    seconds = time.process_time() - started
    print(
        f"{task}: {count} generated episodes: none of {len(said)} evaluation instructions, none of {len(layouts)} "
        f"rooms, no held-out class; {len(texts)} different instructions; {count / seconds:.0f} episodes/s"
    )
    print(json.dumps(templates.most_common()))


def rates(frames: int) -> None:
    """Prints frames per second of processor time at both image sizes, a new room every 8 frames."""
    episodes = [language_rearrangement.episode(ANY, c, 0) for c in range(60)]
    for name in ("language_rearrangement_112", "language_rearrangement"):
        size = envs.spec(name).image_size
        scene = Scene(size)
        scene.start(episodes[0])
        scene.render(World(episodes[0]))
        started, world = time.process_time(), World(episodes[0])
        for frame in range(frames):
            if frame % 8 == 0:
                world = World(episodes[frame // 8 % len(episodes)])
                scene.start(episodes[frame // 8 % len(episodes)])
            world.act(ACTIONS[frame % 16])
            scene.render(world)
        print(f"{size} pixels: {frames / (time.process_time() - started):.0f} frames/s")


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generated", type=int, default=10_000, help="episodes of the hold-out")
    parser.add_argument("--frames", type=int, default=2_000, help="of each size")
    args = parser.parse_args()
    rates(args.frames)
    if os.environ.get(official.VARIABLE):
        expert_on_official_episodes()
    hold_out(ANY, args.generated)
    if os.environ.get(official.VARIABLE):
        hold_out(LLARP, args.generated)


if __name__ == "__main__":
    main()
