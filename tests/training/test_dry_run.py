"""Topologies that are not there; compiled for TPUs, only weights and gradients travel."""

import dataclasses
import importlib.util
import math
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from mllm_act import placement
from mllm_act.errors import UserError
from mllm_act.training import chips, dry_run, roofline
from mllm_act.training.compiled import collectives
from tests.training import on_eight_devices

LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.mark.parametrize("topology", ["v9:2x2", "v5p", "v5e:0x", "cpu:", "2*cpu:4", ""])
def test_topologies_that_do_not_exist(topology: str) -> None:
    with pytest.raises(UserError, match="--topology: expected a TPU slice such as v5p:8x8x8"):
        dry_run.target(topology)


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_tpus_compiler_is_named_where_it_is_missing() -> None:
    with pytest.raises(UserError, match=r"expected libtpu, .* pip install 'mllm-act\[tpu\]'"):
        dry_run.target("v5p:2x2x1")


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install 'mllm-act[tpu]'")
@pytest.mark.parametrize(
    ("topology", "shape", "dtype"),
    [
        ("v5e:2x4", (1, 8, 1), "bfloat16"),
        ("v5p:2x2x2", (2, 2, 2), "bfloat16"),
        ("v6e:2x4", (1, 8, 1), "float8"),
    ],
)
def test_compiled_for_tpus_only_weights_and_gradients_travel(
    topology: str, shape: tuple[int, ...], dtype: str
) -> None:
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices).reshape(shape), placement.AXES)
    model = on_eight_devices.shrunk("llava_1_5_7b")
    model = dataclasses.replace(model, weight_dtype=dtype)
    network = on_eight_devices.network(model, "llava_1_5_7b", mixture=False)
    rows = on_eight_devices.ROWS * shape[0] * shape[1]
    program, (gathers, moved) = on_eight_devices.compiled(
        *on_eight_devices.prepare(network, mesh, rows)
    )
    assert gathers > 0 and all(axes == ("tensor",) for _, axes, _ in moved), moved
    chip = chips.named(devices[0].device_kind)
    assert chip is not None
    text = program.as_text()
    found = roofline.predict(text, collectives(text, mesh), chip)
    assert found.operations > 0 and found.traffic > 0 and math.isfinite(found.step)


def test_the_roofline_counts_loops_slices_and_products() -> None:
    """One product in a loop of 30, by hand; weights are sliced from their stack."""
    text = (on_eight_devices.HERE / "roofline.hlo.txt").read_text()
    chip = chips.Chip(flops=1e12, memory=1e9, bandwidth=1e9, interconnect=1e9)
    found = roofline.predict(text, [], chip)
    product = 2 * 64 * 256 * 128
    traffic = 2 * (64 * 128 + 128 * 256 + 64 * 256)  # input, one layer's weights, output; bfloat16
    assert found.operations == 30 * product
    assert found.traffic == 30 * traffic
    np.testing.assert_allclose(found.computing, 30 * traffic / 1e9)
    assert jax.default_backend() == "cpu" and chips.named("cpu") is None
