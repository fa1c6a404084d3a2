"""Runs everything end to end on real data: ``make demo``, or ``make demo ADAPTERS=all``.

Records demonstrations of the scripted experts, trains the action tokenizer and a tiny policy from scratch, evaluates
the policy on held-out start and goal configurations, and writes a report. Each stage runs one of the programs that a
user would call, in its own process, and prints the command. An interrupted demo continues when it is run again.
``make demo ENV=language_rearrangement`` does the same for a home robot with discrete skills, ``ENV=fetch_pick`` for a
mobile robot that picks up an object.
"""

import argparse
import dataclasses
import shlex
import subprocess
import sys
import time
from pathlib import Path

from mllm_act import report
from mllm_act.errors import Interrupted, UserError, nearest, run, signals
from mllm_act.files import user_path


@dataclasses.dataclass(frozen=True)
class Demo:
    """What a demo runs.

    Attributes:
      env: the environment.
      tasks: short ones, at which an untrained policy fails.
      episodes: demonstrations of each.
      adapters: the paper's, of the environment's kind of actions; the last is the default.
      config: of the policy.
      tokenizer: config of the action tokenizer; empty for discrete actions.
      horizon: maximum steps in the evaluation.
      out: the default folder.
      next_steps: what to read or run then.
    """

    env: str
    tasks: str
    episodes: int
    adapters: tuple[str, ...]
    config: str
    tokenizer: str
    horizon: int
    out: str
    next_steps: dict[str, str]


DEMOS = {
    "metaworld": Demo(
        env="metaworld",
        # Some others (drawer-close, handle-press) succeed by accident when the arm drifts.
        tasks="window-close-v3,faucet-open-v3,door-close-v3,"  # articulated, in the paper's groups
        "button-press-topdown-v3,coffee-button-v3,"  # press
        "plate-slide-side-v3",  # push
        episodes=40,
        adapters=("regression", "uniform", "vq", "rvq"),
        config="configs/policy/metaworld_demo.py",
        tokenizer="configs/tokenizer/metaworld.py",
        horizon=200,  # the experts take 50 to 100 steps; the default of 500 would triple the evaluation time
        out="runs/demo",
        next_steps={
            "make demo ADAPTERS=all": "all four continuous adapters side by side",
            "docs/guide.md, The programs": "the same on all of ML-45, step by step",
        },
    ),
    "fetch_pick": Demo(
        env="fetch_pick",
        tasks="orange",
        episodes=400,
        adapters=("uniform", "vq", "rvq", "regression"),  # the last also reads joints and suction
        config="configs/policy/fetch_pick_demo.py",
        tokenizer="configs/tokenizer/fetch_pick.py",
        horizon=100,  # the expert takes 30
        out="runs/demo_fetch_pick",
        next_steps={
            "make demo ENV=fetch_pick ADAPTERS=all": "all four continuous adapters side by side",
            "docs/environments.md": "all 20 objects, the splits, what differs from Habitat",
        },
    ),
    "language_rearrangement": Demo(
        env="language_rearrangement_112",
        tasks="move-from-to,go-to,open-fridge,close-fridge",
        episodes=1000,
        adapters=("categorical", "lang", "semlang"),
        config="configs/policy/language_rearrangement_demo.py",
        tokenizer="",
        horizon=8,  # the expert takes 4; a policy that is lost stays lost
        out="runs/demo_language_rearrangement",
        next_steps={
            "make demo ENV=language_rearrangement ADAPTERS=all": "the three discrete adapters side by side",
            "docs/environments.md": "all tasks, the official evaluation splits",
        },
    ),
}


def call(stage: str, *command: str) -> None:
    """Runs one stage in its own process and prints how long it took.

    Raises:
      UserError: the stage failed; its own error is printed above.
      Interrupted: a signal arrived; the stage got it too, and has ended.
    """
    print(f"\n=== {stage}\n$ {shlex.join(['python', *command])}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command])
    signals.deferred = True  # the stage may take longer to save and end than a program has
    while (status := process.poll()) is None:
        time.sleep(0.1)
        if signals.received:
            process.terminate()  # if Ctrl-C has reached it already, it takes both for one
            process.wait()
            raise Interrupted(f"interrupted in the stage {stage!r}; run the demo again to continue")
    signals.deferred = False
    if status:
        raise UserError(
            f"{stage}: the command above failed; fix the error it printed and run the demo again"
        )
    print(f"=== {stage}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--env", default="metaworld", help=f"{' or '.join(DEMOS)} (default: metaworld)"
    )
    parser.add_argument(
        "--adapters",
        default="",
        help="comma-separated, or all (default: rvq, regression or semlang)",
    )
    parser.add_argument("--out", type=user_path, help="default: runs/demo, or runs/demo_ENV")
    args = parser.parse_args()
    if args.env not in DEMOS:
        raise UserError(f"--env={args.env}: no demo of it; {nearest(args.env, DEMOS)}")
    demo = DEMOS[args.env]
    adapters = demo.adapters
    chosen = adapters if args.adapters == "all" else tuple(args.adapters.split(","))
    if not args.adapters:
        chosen = adapters[-1:]
    for adapter in chosen:
        if adapter not in adapters:
            raise UserError(
                f"--adapters={args.adapters}: no adapter {adapter!r}; {nearest(adapter, adapters)}"
            )
    run_demo(demo, chosen, args.out or Path(demo.out))


def run_demo(demo: Demo, chosen: tuple[str, ...], out: Path) -> None:
    """Runs all stages."""
    start, data = time.monotonic(), out / "data"
    call(
        "Demonstrations: scripted experts in MuJoCo, written as RLDS",
        *f"-m data_pipelines.generate --env={demo.env} --tasks={demo.tasks}".split(),
        f"--episodes={demo.episodes}",
        f"--out={data}",
    )
    policies = {}
    for adapter in chosen:
        policies[adapter] = out / f"policy_{adapter}"
        train = [
            *f"-m mllm_act.train --config={demo.config}:{adapter}".split(),
            f"--config.data.directory={data}",
        ]
        if adapter in ("vq", "rvq"):
            tokenizer = out / f"tokenizer_{adapter}"
            call(
                f"Action tokenizer {adapter} and the experts' success with it",
                *f"-m mllm_act.train_tokenizer --config={demo.tokenizer}:{adapter}".split(),
                f"--config.data.directory={data}",
                "--config.steps=300",
                f"--workdir={tokenizer}",
            )
            train.append(f"--config.tokenizer={tokenizer}")
        if "untrained" not in policies:  # all adapters are equally untrained
            policies = {"untrained": out / f"policy_untrained_{adapter}", **policies}
            call(
                "An untrained policy",
                *train,
                "--config.steps=0",
                f"--workdir={policies['untrained']}",
            )
        call(f"Policy with the {adapter} adapter", *train, f"--workdir={policies[adapter]}")
    for name, workdir in policies.items():
        call(
            f"Success of {name} on unseen configurations",
            *f"-m mllm_act.evaluate --env={demo.env} --split=test --horizon={demo.horizon}".split(),
            f"--checkpoint={workdir}",
        )

    print("\n" + report.write(out / "report", policies, "test", demo.env))
    best = policies[chosen[-1]]
    outputs = {
        f"{out}/report/": "success by task with 95 % intervals; loss and action errors; frames of episodes",
        f"{best}/evaluation/{demo.env}/test/videos/": "an episode of each task",
        f"{best}/checkpoints/": f'the policy: Policy.load("{best}")',
        f"{out}/*/tensorboard/": "the curves: tensorboard --logdir=DIR",
    }
    if any(adapter in ("vq", "rvq") for adapter in chosen):
        outputs[f"{out}/tokenizer_*/report/"] = (
            "the tokenizer's precision in physical units, and its replay"
        )
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Results:")
    print("\n".join(f"  {file:<46} {text}" for file, text in outputs.items()))
    print("Next:")
    print("\n".join(f"  {command:<46} {text}" for command, text in demo.next_steps.items()))


if __name__ == "__main__":
    run(main)
