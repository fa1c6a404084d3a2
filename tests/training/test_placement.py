"""On eight devices training computes what it does on one, and only weights and gradients travel."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mllm_act import placement
from mllm_act.training.compiled import collectives
from tests.shared import once

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MESHES = ("(8, 1, 1)", "(1, 8, 1)", "(1, 1, 8)", "(2, 2, 2)")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(home: Path) -> None:
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
        command = [sys.executable, "-m", "tests.training.on_eight_devices"]
        environment = {**os.environ, "XLA_FLAGS": flags}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
        )
        (home / "found.json").write_bytes(done.stdout)

    return json.loads((once(tmp_path_factory, "eight_devices", make) / "found.json").read_text())


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_weights_are_those_of_one_device(found: Any, mesh: str) -> None:
    """Of a mixture, with LoRA and its dropout, after two updates whose steps are the gradients themselves."""
    one, many = found["losses"][mesh]
    np.testing.assert_allclose(many, one, rtol=1e-6)
    assert found["largest"][mesh] < 1e-5


def test_only_weights_and_gradients_travel(found: Any) -> None:
    """Along ``tensor`` activations are summed, which is what tensor parallelism is."""
    assert len(found["read"]) == len(MESHES) + 4
    for case, (gathers, moved) in found["read"].items():
        data, fsdp, tensor = json.loads("[" + case.partition("(")[2].replace(")", "]"))
        assert (gathers > 0) == (fsdp > 1), case
        assert (len(moved) > 0) == (tensor > 1), case
        for kind, axes, shape in moved:
            assert axes == ["tensor"], f"{case}: {kind} of activations {shape} over {axes}"


def test_collectives_are_read_from_every_notation_of_their_groups() -> None:
    devices = np.array([jax.devices()[0]] * 8).reshape(2, 2, 2)
    program = (ROOT / "tests/training/collectives.hlo.txt").read_text()
    read = [
        (c.kind, c.axes, c.devices, c.shape, c.dtype, c.times)
        for c in collectives(program, Mesh(devices, placement.AXES))
    ]
    assert read == [
        ("all-gather", ("fsdp",), 2, (8, 4), "f32", 30),
        ("all-gather", ("tensor",), 2, (8, 4), "f32", 30),
        ("all-gather", ("tensor",), 2, (8,), "bf16", 1),
        ("all-reduce", ("fsdp",), 2, (4,), "f32", 1),
        ("all-reduce", ("fsdp",), 2, (2,), "f32", 1),
        ("collective-permute", ("data",), 2, (4,), "f32", 1),
    ]
