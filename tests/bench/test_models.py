"""The benchmarks of models run, and count the operations that XLA counts."""

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import jax
import pytest
from flax import nnx

from mllm_act import flops
from mllm_act.bench import act, data, synthetic, train
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.models.bridge.bridge import part_config
from mllm_act.models.mllm import MLLM

pytestmark = pytest.mark.slow

SMALL = ["--preset=tiny", "--context=1", "--prompt_tokens=7", "--steps=1", "--batch_size=1"]


def test_training_ends_with_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(SMALL)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["losses"][2] < result["losses"][0]  # the same batch again and again
    assert 0.5 < result["estimated_gib"] / result["memory_gib"] < 2


def test_acting_ends_with_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    act.main(SMALL)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < result["ms_min"] <= result["ms"] <= result["ms_max"]


@pytest.mark.parametrize(
    ("bench", "flag"),
    [
        (train, "--batch_size=0"), (train, "--context=0"), (train, "--steps=0"), (train, "--tokens=-1"),
        (train, "--episode=0"), (act, "--prompt_tokens=0"), (act, "--steps=0"), (data, "--repeats=0"),
    ],
)  # fmt: skip
def test_flags_out_of_range_are_refused_by_name(
    bench: ModuleType, flag: str, tmp_path: Path
) -> None:
    required = [f"--data={tmp_path / 'none'}"] if bench is data else []
    name, value = flag.split("=")
    with pytest.raises(UserError, match=f"^{name}: expected at least 1 .*, found {value}$"):
        bench.main([*required, flag])


@pytest.mark.parametrize(
    "bridge", [("perceiver",), ("projector",), ("projector", "perceiver"), ("mixer",), ("film",)]
)
def test_the_formula_agrees_with_xlas_count(bridge: tuple[str, ...]) -> None:
    """XLA also counts resizing, norms, softmax and activations: up to a fifth of so small a model."""
    config = dataclasses.replace(presets.get("tiny").model, bridge=bridge)
    # XLA counts the body of a loop over layers once, so there is one layer of each kind.
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=1),
        sizes=(
            ("perceiver", dataclasses.replace(part_config("perceiver", config.sizes), layers=1)),
        ),
        language=dataclasses.replace(config.language, layers=1),
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: MLLM(config, nnx.Rngs(0))))
    seen = synthetic.batch(config, 1, 1, 7).observation

    def forward(state: nnx.State) -> jax.Array:
        model = nnx.merge(graph, state)
        instruction = model.instruction(seen.prompt, seen.prompt_mask)
        latents = model.latents(seen.images, instruction)
        none = latents[:, :, :0]
        return model(seen.prompt, seen.prompt_mask, latents, seen.mask, none)

    counted = jax.jit(forward).lower(state).compile().cost_analysis()["flops"]
    rows = -(-(7 + config.latents_per_image) // 8) * 8  # padded to a multiple of 8
    formula = flops.vision(config) + flops.bridge(config) + flops.language(config, rows, rows)
    if "film" in bridge:
        formula += flops.language(config, 7, 7)  # the prompt by itself
    assert 0.95 < counted / formula < 1.25
