"""Success in Meta-World while the robot goes on during the decision, with and without delay-aware training.

    python benchmarks/delay.py --data=runs/demo/data --out=runs/delay --steps=1200

It trains the demo's policy twice with the same settings, on chunks of 8 actions: once with ``config.max_delay=0``, once
with 4. Then both play unseen configurations of the demo's tasks. A chunk is decided on every 4 steps; its actions are
there D steps later, and the robot executes the old chunk meanwhile. The first chunk of an episode is waited for. The
policy trained for it is given the D actions that are executed meanwhile; of the other's chunk they are skipped.
``--data`` is what the demo, or its first command (docs/guide.md), wrote.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mllm_act.envs.base import EnvObservation
from mllm_act.envs.play import Episode, episodes, play
from mllm_act.envs.results import summarize, table
from mllm_act.envs.workers import EnvPool
from mllm_act.errors import run
from mllm_act.files import write_json
from mllm_act.policy import Policy
from mllm_act.policy.slots import Slots
from mllm_act.serving.metadata import image_shapes

CHUNK, EVERY = 8, 4  # actions of a decision, and steps between decisions
HORIZON = 200  # as in the demo


class Delayed:
    """Acts in a pool of simulators with chunks that arrive ``delay`` steps after their observation."""

    def __init__(self, slots: Slots, delay: int) -> None:
        self._slots, self._delay = slots, delay
        self._plans = [np.zeros((0, slots.policy.actions), np.float32)] * slots.count
        slots.clear()

    def __call__(
        self, playing: Mapping[int, Episode], started: Sequence[int], seen: EnvObservation
    ) -> np.ndarray:
        """See ``play.Decide``. A plan is what is left to execute, from the present step on."""
        slots, count = self._slots, self._slots.count
        first = np.isin(np.arange(count), started)
        steps = np.array([playing[i].steps if i in playing else 1 for i in range(count)])
        for slot in started:
            self._plans[slot] = self._plans[slot][:0]
            slots.read(slot, slots.encode(seen["instruction"][slot]), again=False)
        decide = steps % EVERY == 0
        committed = [
            plan[: self._delay] if now else None
            for plan, now in zip(self._plans, decide, strict=True)
        ]
        chunks, _ = slots.act(
            range(count), seen["images"], seen["proprio"], first, decide, None, committed
        )
        for slot in np.flatnonzero(decide):
            late = min(self._delay, len(self._plans[slot]))
            self._plans[slot] = np.concatenate([self._plans[slot][:late], chunks[slot, late:]])
        now = [self._plans[slot][0] for slot in sorted(playing)]
        for slot in playing:
            self._plans[slot] = self._plans[slot][1:]
        return np.stack(now)


def train(out: Path, data: str, adapter: str, steps: int, seed: int, max_delay: int) -> Path:
    """Trains a policy unless it is there, and returns its folder."""
    workdir = out / f"max_delay_{max_delay}"
    options = {
        "data.directory": data, "chunk": CHUNK, "max_delay": max_delay, "steps": steps, "seed": seed,
    }  # fmt: skip
    command = [
        *f"-m mllm_act.train --config=configs/policy/metaworld_demo.py:{adapter}".split(),
        *(f"--config.{key}={value}" for key, value in options.items()),
        f"--workdir={workdir}",
    ]
    subprocess.run([sys.executable, *command], check=True)
    return workdir


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--adapter", default="regression", choices=("regression", "uniform"))
    parser.add_argument("--steps", type=int, default=1200, help="updates of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--envs", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2, help="processes of simulators")
    flags = parser.parse_args()
    workdirs = {
        max_delay: train(flags.out, flags.data, flags.adapter, flags.steps, flags.seed, max_delay)
        for max_delay in (0, max(flags.delays))
    }
    results = {}
    for max_delay, workdir in workdirs.items():
        policy = Policy.load(workdir)
        shapes = image_shapes(policy, {})
        slots = Slots(policy, flags.envs, (flags.envs,), policy.prompt.length, shapes)
        tasks = ",".join(policy.meta["dataset"][policy.name]["tasks"])
        with EnvPool("metaworld", flags.envs, flags.workers) as pool:
            for delay in flags.delays:
                todo = episodes("metaworld", tasks, "test")
                for _ in play(pool, todo, HORIZON, Delayed(slots, delay), f"delay {delay}"):
                    pass
                name = f"delay {delay}, " + (
                    f"trained with 0 to {max_delay}" if max_delay else "plain"
                )
                results[name] = summarize(todo)
                print(table({name: results[name]}), flush=True)
    write_json(flags.out / "delay.json", results)
    print(table(dict(sorted(results.items()))))


if __name__ == "__main__":
    run(main)
