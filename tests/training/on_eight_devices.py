"""Run by test_placement.py in a process with eight devices: compiles and runs updates on meshes, prints JSON.

python -m tests.training.on_eight_devices
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mllm_act import parameters, placement
from mllm_act.action_tokenizer.autoencoder import TokenizerConfig
from mllm_act.adapters.regression import Regression
from mllm_act.adapters.vector_quantized import VectorQuantizedConfig
from mllm_act.batch import Batch
from mllm_act.bench import synthetic
from mllm_act.models import presets
from mllm_act.models.bridge.bridge import PARTS, part_config
from mllm_act.models.layers import unstack
from mllm_act.models.mllm import MLLMConfig
from mllm_act.policy.network import EmbodimentConfig, NetworkConfig, build_network
from mllm_act.training import sharding
from mllm_act.training.compiled import collectives
from mllm_act.training.step import Recipe, State, jit_update

HERE = Path(__file__).parent
MESHES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))
ROWS = 11  # windows of a device; no size of a parameter is a multiple of it, every size of an activation is
CONTEXT, PROMPT = 3, 6
# Preset, weight dtype (then with unrolled layers), mesh. The mixture has smollm2_vit_s's model.
CASES = (
    ("tiny", "", (2, 2, 2)),
    ("tiny_grid", "", (1, 8, 1)),
    ("llava_1_5_7b", "", (1, 8, 1)),
    ("llava_1_5_7b", "float8", (2, 2, 2)),
)


def shrunk(preset: str) -> MLLMConfig:
    """A preset's model with two layers of few channels: its parts, its numbers of heads, its dtypes."""
    model = presets.get(preset).model
    language, vision = model.language, model.vision
    lora = language.lora and dataclasses.replace(language.lora, rank=8)
    small = {
        "width": 32,
        "heads": 4,
        "mlp_width": 64,
        "blocks": 1,
        "queries": 2,
        "instruction_layer": 1,
        "sums": 4,
    }
    sizes = []
    for name in PARTS:
        config = part_config(name, model.sizes)
        fields = {field.name for field in dataclasses.fields(config)}
        sizes.append(
            (name, dataclasses.replace(config, **{k: v for k, v in small.items() if k in fields}))
        )
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(
            vision, image_size=4 * vision.patch_size, width=32, heads=4, layers=2, mlp_width=64,
            position_side=vision.position_side and 5,
        ),
        sizes=tuple(sizes),
        language=dataclasses.replace(
            language, vocabulary=256, action_tokens=128, width=8 * language.heads, layers=2, mlp_width=64, lora=lora,
        ),
    )  # fmt: skip


def network(model: MLLMConfig, preset: str, mixture: bool) -> NetworkConfig:
    tokenizer = TokenizerConfig(synthetic.ACTIONS, codes=16, width=8, hidden=16)
    adapters = {"rvq": VectorQuantizedConfig(dataclasses.asdict(tokenizer))}
    if mixture:
        adapters["regression"] = Regression.Config(hidden=16)
    embodiments = {
        name: EmbodimentConfig(name, config, (synthetic.CAMERA,), CONTEXT, 1)
        for name, config in adapters.items()
    }
    return NetworkConfig(preset, model, presets.get(preset).trained, embodiments)


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), placement.AXES)


def prepare(
    config: NetworkConfig, mesh: Mesh, rows: int, unrolled: bool = False
) -> tuple[Recipe, State, Any, dict[str, Batch]]:
    """An update on abstract arrays; the windows of the last embodiment are mostly padding, which is skipped."""
    statistics = dict.fromkeys(config.embodiments, synthetic.statistics())
    module = nnx.eval_shape(lambda: build_network(config, statistics, nnx.Rngs(0)))
    graph, trained, frozen = parameters.split(module, config.trained)
    optimizer = optax.sgd(1.0, momentum=0.5)  # a weight's change is its gradient, however small
    state = {"trained": trained, "optimizer": jax.eval_shape(optimizer.init, trained)}
    if unrolled:
        frozen = jax.eval_shape(functools.partial(unstack, backward=True), frozen)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    names = list(config.embodiments)
    recipe = Recipe(
        graph=graph, mesh=mesh, optimizer=optimizer, key=jax.random.key(0),
        shares={name: 1 / len(names) for name in names},
        skip_padding={name: shards if len(names) > 1 and name == names[-1] else None for name in names},
        action_units={},
    )  # fmt: skip
    batches = {
        name: jax.eval_shape(lambda: synthetic.batch(config.model, rows, CONTEXT, PROMPT))
        for name in names
    }
    place = functools.partial(
        jax.tree.map,
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.of_batch(mesh)),
    )
    return recipe, sharding.abstract(state, mesh), sharding.abstract(frozen, mesh), place(batches)


def compiled(
    recipe: Recipe, state: State, frozen: Any, batches: dict[str, Batch]
) -> tuple[Any, list[Any]]:
    """The compiled update, and its collectives that move activations: kind, axes, shape."""
    step = jax.ShapeDtypeStruct((), jnp.int32)
    program = jit_update(recipe, state).lower(state, frozen, batches, step).compile()
    found = collectives(program.as_text(), recipe.mesh)
    assert found or recipe.mesh.size == 1
    moved = [c for c in found if math.prod(c.shape) % ROWS == 0]
    gathers = sum(c.times for c in found if c.kind == "all-gather" and c.axes == ("fsdp",))
    return program, [gathers, sorted({(c.kind, c.axes, c.shape) for c in moved})]


def run(shape: tuple[int, ...]) -> dict[str, Any]:
    """Two updates of a mixture with LoRA and its dropout, from the same parameters on every mesh."""
    mesh, rows = mesh_of(shape), 8 * ROWS
    model = dataclasses.replace(shrunk("smollm2_vit_s"), dtype="float32", weight_dtype="float32")
    config = network(model, "smollm2_vit_s", mixture=True)
    recipe, state, frozen, batches = prepare(config, mesh, rows)
    program, read = compiled(recipe, state, frozen, batches)
    arrays = parameters.flatten({"state": state, "frozen": frozen})

    def draw(path: str, leaf: Any) -> Any:
        rng = np.random.default_rng(len(path) + sum(path.encode()))
        values = rng.normal(size=leaf.shape) * 0.1 + path.endswith("scale")
        values = 0 * values if "optimizer" in path else values
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    made = parameters.unflatten(
        {k: draw(k, x) for k, x in arrays.items()}, {"state": state, "frozen": frozen}
    )
    state, frozen, losses = made["state"], made["frozen"], []
    steps = {name: 2 if recipe.skip_padding[name] else None for name in batches}
    batches = {
        name: jax.device_put(
            synthetic.batch(model, rows, CONTEXT, PROMPT, steps[name]), sharding.of_batch(mesh)
        )
        for name in batches
    }
    for step in (1, 2):
        state, metrics = program(state, frozen, batches, jnp.int32(step))
        losses.append(float(metrics["loss"]))
    weights = {path: np.asarray(x) for path, x in parameters.flatten(state["trained"]).items()}
    return {"losses": losses, "weights": weights, "read": read}


def main() -> None:
    one = run((1, 1, 1))
    result: dict[str, Any] = {"losses": {}, "largest": {}, "read": {}}
    for shape in MESHES:
        many, name = run(shape), str(shape)
        result["losses"][name] = [one["losses"], many["losses"]]
        result["largest"][name] = max(
            float(np.abs(many["weights"][path] - x).max() / np.abs(x).max())
            for path, x in one["weights"].items()
        )
        result["read"][f"mixture {name}"] = many["read"]
    for preset, dtype, shape in CASES:
        model = shrunk(preset)
        model = dataclasses.replace(model, weight_dtype=dtype or model.weight_dtype)
        mesh = mesh_of(shape)
        rows = ROWS * mesh.shape["data"] * mesh.shape["fsdp"]
        parts = prepare(network(model, preset, mixture=False), mesh, rows, unrolled=bool(dtype))
        result["read"][f"{preset} {dtype} {shape}"] = compiled(*parts)[1]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
