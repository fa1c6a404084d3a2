"""The PyTorch benchmark runs on any machine at small sizes, and counts FLOP as we do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_act import flops
from mllm_act.models import presets

pytestmark = pytest.mark.slow

for package in ("torch", "transformers", "peft"):
    pytest.importorskip(package)

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "pytorch_llava.py"


def test_cases_run_one_after_the_other() -> None:
    command = [sys.executable, str(PROGRAM), "--tiny", "--steps=1", "--warmup=0"]
    cases = ["act_3", "train_paper", "train_llava576", "act_12"]
    done = subprocess.run(
        [*command, *(f"--case={case}" for case in cases)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == cases
    assert all(line["step_ms"] > 0 and line["tiny"] for line in lines.values())
    # LoRA's factors are those of the case: on q, k, v; on all matrices; none when acting.
    assert lines["act_12"]["trained_parameters"] == 0
    perceiver = 4 * 32 + 2 * (4 * 32 * 32 + 2 * 4 * 32 * 32 + 6 * 32) + 2 * 32 + 32 * 64
    rows = 2 * 512 * 64
    lora = 2 * 3 * 4 * (64 + 64)
    assert lines["train_paper"]["trained_parameters"] == lora + perceiver + rows
    projector = (32 * 64 + 64) + (64 * 64 + 64)
    lora = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 96))
    assert lines["train_llava576"]["trained_parameters"] == lora + projector + rows


def test_flop_are_counted_as_ours_are() -> None:
    sys.path.insert(0, str(PROGRAM.parent))
    try:
        import pytorch_llava as program
    finally:
        sys.path.pop(0)
    config = presets.get("llava_1_5_7b").model
    for name, context in (("train_paper", 3), ("train_calvin", 12)):
        rows = 64 + 4 * context + 1  # one action a sample
        ours = context * (flops.vision(config) + 3 * flops.bridge(config))
        ours += flops.language(config, rows, rows, backward=True) + 6 * 2 * 512 * 4096
        assert program.flop(program.CASES[name], program.Sizes()) == pytest.approx(32 * ours)
