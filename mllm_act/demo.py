"""The main job end to end on real input: ``make demo``, or ``make demo ADAPTERS=all``.

Demonstrations from the scripted experts, the action tokenizer, a tiny policy trained from scratch, its success on start
and goal configurations it never saw, and a report. Each stage is one of the programs a user would call, in its own
process; the command is printed. A stage that is done already goes on from where it is: run again, the demo continues.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from mllm_act import report
from mllm_act.errors import UserError, nearest, run

# Short tasks that an untrained policy fails at: some of Meta-World's (drawer-close, handle-press) succeed by themselves
# when an arm is left to drift.
TASKS = (
    "window-close-v3,faucet-open-v3,door-close-v3,"  # articulated, in the paper's groups
    "button-press-topdown-v3,coffee-button-v3,"  # press
    "plate-slide-side-v3"  # push
)
PAPERS = ("regression", "uniform", "vq", "rvq")  # adapters of continuous actions
HORIZON = 200  # the experts take 50 to 100 steps; the environment's own limit of 500 would triple the evaluation


def call(what: str, *command: str) -> None:
    """Runs one stage, in a process of its own, and tells what it took.

    Raises:
      UserError: if the stage fails; its own words are above.
    """
    shown = shlex.join(["python", *command])
    print(f"\n=== {what}\n$ {shown}", flush=True)
    began = time.monotonic()
    if subprocess.run([sys.executable, *command], check=False).returncode:
        raise UserError(
            f"{what}: the command above failed; mend what it says and run the demo again"
        )
    print(f"=== {what}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m mllm_act.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", default="rvq", help="comma-separated, or all (default: rvq)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    args = parser.parse_args()
    chosen = PAPERS if args.adapters == "all" else tuple(args.adapters.split(","))
    for adapter in chosen:
        if adapter not in PAPERS:
            raise UserError(
                f"--adapters={args.adapters}: no adapter {adapter!r}; {nearest(adapter, PAPERS)}"
            )
    began, out = time.monotonic(), args.out
    data = out / "data"
    call(
        "Demonstrations: scripted experts in MuJoCo, written as RLDS",
        *f"-m data_pipelines.generate --env=metaworld --tasks={TASKS} --episodes=40 --out={data}".split(),
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
                f"Action tokenizer {adapter}, and the experts' success through it",
                *f"-m mllm_act.train_tokenizer --config=configs/tokenizer/metaworld.py:{adapter}".split(),
                f"--config.data.directory={data}",
                "--config.steps=300",
                f"--workdir={tokenizer}",
            )
            train.append(f"--config.tokenizer={tokenizer}")
        if "untrained" not in policies:  # one adapter's first guesses are as good as another's
            policies = {"untrained": out / f"policy_untrained_{adapter}", **policies}
            workdir = f"--workdir={policies['untrained']}"
            call("An untrained policy", *train, "--config.steps=0", workdir)
        call(f"Policy with the {adapter} adapter", *train, f"--workdir={policies[adapter]}")
    for name, workdir in policies.items():
        call(
            f"Success of {name} on unseen configurations",
            *f"-m mllm_act.evaluate --checkpoint={workdir} --env=metaworld --split=test --horizon={HORIZON}".split(),
        )

    print("\n" + report.write(out / "report", policies, "test"))
    best = policies[chosen[-1]]
    look = {
        f"{out}/report/": "success by task with 95 % intervals; loss and action error; strips of roll-outs",
        f"{best}/evaluation/test/videos/": "an episode of each task",
        f"{out}/tokenizer_*/report/": "the tokenizer's precision in physical units, and its replay",
        f"{best}/checkpoints/": f'the policy: Policy.load("{best}")',
        f"{out}/*/tensorboard/": "the curves, for TensorBoard (pip install tensorboard)",
    }
    more = {
        "make demo ADAPTERS=all": "all four continuous adapters side by side",
        "README.md, The programs": "the same on all of ML-45, step by step",
    }
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Look at")
    print("\n".join(f"  {where:<46} {what}" for where, what in look.items()))
    print("Next:")
    print("\n".join(f"  {where:<46} {what}" for where, what in more.items()))


if __name__ == "__main__":
    run(main)
