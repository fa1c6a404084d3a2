"""Runs everything end to end on real data: ``make demo``, or ``make demo ADAPTERS=all``.

Records demonstrations of the scripted experts, trains the action tokenizer and a tiny policy from scratch, evaluates
the policy on held-out start and goal configurations, and writes a report. Each stage runs one of the programs that a
user would call, in its own process, and prints the command. An interrupted demo continues when it is run again.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from mllm_act import report
from mllm_act.errors import Interrupted, UserError, nearest, run, signals
from mllm_act.files import user_path

# Short tasks at which an untrained policy fails. Some of Meta-World's (drawer-close, handle-press) succeed by accident
# when the arm drifts.
TASKS = (
    "window-close-v3,faucet-open-v3,door-close-v3,"  # articulated, in the paper's groups
    "button-press-topdown-v3,coffee-button-v3,"  # press
    "plate-slide-side-v3"  # push
)
PAPERS = ("regression", "uniform", "vq", "rvq")  # adapters of continuous actions
HORIZON = (
    200  # the experts take 50 to 100 steps; the default of 500 would triple the evaluation time
)


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
    parser.add_argument("--adapters", default="rvq", help="comma-separated, or all (default: rvq)")
    parser.add_argument(
        "--out", type=user_path, default=Path("runs/demo"), help="default: runs/demo"
    )
    args = parser.parse_args()
    chosen = PAPERS if args.adapters == "all" else tuple(args.adapters.split(","))
    for adapter in chosen:
        if adapter not in PAPERS:
            raise UserError(
                f"--adapters={args.adapters}: no adapter {adapter!r}; {nearest(adapter, PAPERS)}"
            )
    start, out = time.monotonic(), args.out
    data = out / "data"
    call(
        "Demonstrations: scripted experts in MuJoCo, written as RLDS",
        *f"-m data_pipelines.generate --env=metaworld --tasks={TASKS} --episodes=40".split(),
        f"--out={data}",
    )
    policies = {}
    for adapter in chosen:
        policies[adapter] = out / f"policy_{adapter}"
        train = [
            *f"-m mllm_act.train --config=configs/policy/metaworld_demo.py:{adapter}".split(),
            f"--config.data.directory={data}",
        ]
        if adapter in ("vq", "rvq"):
            tokenizer = out / f"tokenizer_{adapter}"
            call(
                f"Action tokenizer {adapter} and the experts' success with it",
                *f"-m mllm_act.train_tokenizer --config=configs/tokenizer/metaworld.py:{adapter}".split(),
                f"--config.data.directory={data}",
                "--config.steps=300",
                f"--workdir={tokenizer}",
            )
            train.append(f"--config.tokenizer={tokenizer}")
        if "untrained" not in policies:  # all adapters are equally untrained
            policies = {"untrained": out / f"policy_untrained_{adapter}", **policies}
            workdir = f"--workdir={policies['untrained']}"
            call("An untrained policy", *train, "--config.steps=0", workdir)
        call(f"Policy with the {adapter} adapter", *train, f"--workdir={policies[adapter]}")
    for name, workdir in policies.items():
        call(
            f"Success of {name} on unseen configurations",
            *f"-m mllm_act.evaluate --env=metaworld --split=test --horizon={HORIZON}".split(),
            f"--checkpoint={workdir}",
        )

    print("\n" + report.write(out / "report", policies, "test", "metaworld"))
    best = policies[chosen[-1]]
    outputs = {
        f"{out}/report/": "success by task with 95 % intervals; loss and action errors; frames of episodes",
        f"{best}/evaluation/metaworld/test/videos/": "an episode of each task",
        f"{out}/tokenizer_*/report/": "the tokenizer's precision in physical units, and its replay",
        f"{best}/checkpoints/": f'the policy: Policy.load("{best}")',
        f"{out}/*/tensorboard/": "the curves, for TensorBoard (pip install tensorboard)",
    }
    next_steps = {
        "make demo ADAPTERS=all": "all four continuous adapters side by side",
        "docs/guide.md, The programs": "the same on all of ML-45, step by step",
    }
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes. Results:")
    print("\n".join(f"  {path:<46} {text}" for path, text in outputs.items()))
    print("Next:")
    print("\n".join(f"  {command:<46} {text}" for command, text in next_steps.items()))


if __name__ == "__main__":
    run(main)
