"""The program on a run's folder: a policy with LoRA, Perceiver and adapter, written as training writes it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from mllm_act import export_hf, parameters
from mllm_act.checkpoints import frozen
from mllm_act.checkpoints.checkpoint import Checkpointer
from mllm_act.errors import UserError
from mllm_act.models.presets import LORA_AND_ADAPTER
from mllm_act.normalization import Moments, Statistics
from mllm_act.policy import network as networks
from mllm_act.policy.prompt import Prompt
from mllm_act.weights import safetensors
from tests.weights import small
from tests.weights.test_export import loads_strictly

transformers = pytest.importorskip("transformers")


MOMENTS = Moments(*[(0.0, 0.0)] * 2, *[(-1.0, -1.0), (1.0, 1.0)] * 2)
STATISTICS = Statistics(MOMENTS, MOMENTS, 1, 1, "train", "0", ("t",), ("i",))


def save_run(
    network: networks.PolicyNetwork, description: networks.Description, workdir: Path
) -> None:
    """Writes a checkpoint as ``mllm_act.train`` does."""
    _, *parts = parameters.split(network, description.trained)
    trained, still = map(parameters.flatten, parts)
    meta = {
        "network": dataclasses.asdict(description),
        "statistics": {"arm": STATISTICS.to_dict()},
        "prompt": {"arm": Prompt("{instruction}", small.tokenizer().to_str(), 8).to_dict()},
        "pretrained": [{"source": "owner/model@main", "revision": "a" * 40}],
        "frozen": frozen.save(workdir, still),
    }
    with Checkpointer(workdir) as checkpoints:
        checkpoints.save(7, {"trained": trained}, meta)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[networks.PolicyNetwork, Path]:
    workdir = tmp_path_factory.mktemp("run")
    description = networks.Description(
        preset="small",
        model=small.config(bridge=("projector", "perceiver"), language_lora=small.LORA),
        trained=LORA_AND_ADAPTER,
        embodiments={"arm": networks.Embodiment("uniform", ("front",), 1, 1, 8, 4, None)},
    )
    statistics = {"arm": STATISTICS}
    network = small.random(lambda: networks.build(description, statistics, nnx.Rngs(0)))
    save_run(network, description, workdir)
    return network, workdir


def test_a_policy_as_llava_with_what_is_its_own_beside_and_its_lora_on_the_base(
    policy: tuple[networks.PolicyNetwork, Path], tmp_path: Path
) -> None:
    network, workdir = policy
    command = ["mllm_act.export_hf", f"--checkpoint={workdir}", f"--out={tmp_path / 'full'}"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    theirs = loads_strictly(transformers.LlavaForConditionalGeneration, tmp_path / "full")
    expected = small.logits(network.mllm)
    np.testing.assert_allclose(small.their_logits(theirs), expected, atol=1e-4)

    arrays = small.arrays(network)
    own = {path for path in arrays if path.startswith(("adapters/", "mllm/bridge/perceiver/"))}
    beside = safetensors.read(tmp_path / "full" / "mllm_act.safetensors")
    assert beside.keys() == {path.removeprefix("mllm/") for path in own}
    np.testing.assert_array_equal(beside["adapters/arm/head"].read(), arrays["adapters/arm/head"])

    model = export_hf.from_run(workdir / "checkpoints" / "7")
    export_hf.export_model(model, tmp_path / "lora", lora=True)
    trained = {path.removeprefix("mllm/") for path in arrays if "mllm/bridge/projector/" in path}
    assert trained  # peft's format has no place for it
    with_lora = safetensors.read(tmp_path / "lora" / "mllm_act.safetensors")
    assert with_lora.keys() == beside.keys() | trained
    peft = pytest.importorskip("peft")
    found = peft.PeftConfig.from_pretrained(tmp_path / "lora")
    assert found.base_model_name_or_path == "owner/model"


def test_what_is_no_policy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no whole checkpoint"):
        export_hf.from_run(tmp_path)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {}, {"tokenizer": {}})
    with pytest.raises(UserError, match="expected a policy's checkpoint, found none of network"):
        export_hf.from_run(tmp_path)
