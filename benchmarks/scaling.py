"""Measures how training scales over the GPUs of one host: the update of mllm_act.train, the same windows per GPU.

    python benchmarks/scaling.py                                    # all cases, on 1, 2, 4 and 8 GPUs as they are there
    python benchmarks/scaling.py --gpus=1,2 --cases=llava --steps=20

Every row is a process of its own, ``python -m mllm_act.bench train``, that sees the first n GPUs. Efficiency is samples
per second and GPU, relative to one GPU of the same machine in the same case. "Collectives" is the share of a step in
which NCCL's kernels run on the first GPU, "exposed" the share in which nothing else runs there. The table is Markdown;
``--out`` gets the benchmark's reports, one JSON line per row.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

SCAN = ("--scan",)
LLAVA = ("--remat=projections", "--batch_size=32")
# Name -> flags of one GPU. ``batch_size`` counts windows of one GPU.
CASES = {
    "llava Meta-World bfloat16": LLAVA,
    "llava Meta-World float8": (*LLAVA, "--weight_dtype=float8"),
    "llava CALVIN bfloat16": (*LLAVA, "--context=12"),
    "llava CALVIN float8": (*LLAVA, "--context=12", "--weight_dtype=float8"),
    "smollm2": ("--preset=smollm2_vit_s", "--bridge=mixer", "--batch_size=64"),
}


def meshes(case: str, gpus: int) -> list[tuple[int, int, int]]:
    """Returns the meshes of a case, as devices along data, fsdp and tensor."""
    if gpus == 1:
        return [(1, 1, 1)]
    found = [(gpus, 1, 1), (1, gpus, 1)]
    if case.startswith("llava"):
        found.append((1, gpus // 2, 2))
    return found


def measure(flags: tuple[str, ...], mesh: tuple[int, int, int], steps: int) -> dict:
    """Runs one benchmark and returns its report, or its last line of error."""
    data, fsdp, tensor = mesh
    gpus = data * fsdp * tensor
    flags = tuple(
        f"--batch_size={int(flag.partition('=')[2]) * gpus}"
        if flag.startswith("--batch_size")
        else flag
        for flag in flags
    )
    command = [
        sys.executable, "-m", "mllm_act.bench", "train", *flags, f"--mesh={data},{fsdp},{tensor}", f"--steps={steps}"
    ]  # fmt: skip
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(visible[:gpus])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [
            line
            for line in done.stderr.splitlines()
            if re.search(r"Error|Check failed|^F\d|error:", line)
        ]
        return {"error": lines[0] if lines else f"status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def row(case: str, mesh: tuple[int, int, int], report: dict, one: float | None) -> str:
    """Returns a row of the table; ``one`` is the rate of one GPU."""
    gpus = mesh[0] * mesh[1] * mesh[2]
    start = f"| {case} | {gpus} | {'x'.join(map(str, mesh))} |"
    if "error" in report:
        return f"{start} {report['error'][:200]} |"
    rate, ms = report["samples_per_s"] / gpus, report["step_ms"]
    efficiency = "" if one is None else f"{rate / one:.1%}"
    shares = f"{report['collective_ms'] / ms:.1%} | {report['exposed_ms'] / ms:.1%}"
    return (
        f"{start} {report['memory_gib']:.1f} | {ms:.1f} | {rate:.1f} | {efficiency} | {shares} "
        f"| {report['compile_s']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpus", default="1,2,4,8", help="numbers of GPUs; those that are not there are left out"
    )
    parser.add_argument(
        "--cases", default="", help="only cases whose name contains one of these, with commas"
    )
    parser.add_argument(
        "--meshes", default="", help="only these, such as 1x2x1,2x1x1 (1x1x1 is always measured)"
    )
    parser.add_argument(
        "--scan", action="store_true", help="layers stacked, not unrolled: compiles faster"
    )
    parser.add_argument("--layers", type=int, help="only so many of each encoder: compiles faster")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a file for the reports")
    flags = parser.parse_args()
    listed = subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True
    )
    there = len(listed.stdout.splitlines())
    chosen = [n for n in map(int, flags.gpus.split(",")) if n <= there]
    print(
        f"{there} GPUs: {listed.stdout.splitlines()[0].split('(')[0]}; XLA_FLAGS={os.environ.get('XLA_FLAGS', '')}"
    )
    print("| case | GPUs | data x fsdp x tensor | GiB a GPU | ms a step | samples/s a GPU | efficiency | collectives "
          "| exposed | compile s |\n|---|---|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    for case, options in CASES.items():
        if flags.cases and not any(part in case for part in flags.cases.split(",")):
            continue
        one: float | None = None
        for gpus in chosen:
            for mesh in meshes(case, gpus):
                if (
                    flags.meshes
                    and gpus > 1
                    and "x".join(map(str, mesh)) not in flags.meshes.split(",")
                ):
                    continue
                fewer = () if flags.layers is None else (f"--layers={flags.layers}",)
                report = measure(
                    (*options, *(SCAN if flags.scan else ()), *fewer), mesh, flags.steps
                )
                if gpus == 1 and "error" not in report:
                    one = report["samples_per_s"]
                print(row(case, mesh, report, one), flush=True)
                if flags.out:
                    with flags.out.open("a") as file:
                        file.write(json.dumps({"case": case, "mesh": mesh, **report}) + "\n")


if __name__ == "__main__":
    main()
