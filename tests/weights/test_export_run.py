"""The export program on a run of ``mllm_act.train`` with LoRA, projector, Perceiver and adapter."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from mllm_act import export_hf, train
from mllm_act.checkpoints.checkpoint import Checkpointer
from mllm_act.config import load_config
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.policy.load import load_network
from mllm_act.policy.network import PolicyNetwork
from mllm_act.weights import safetensors
from tests.data_pipelines import tiny_rlds
from tests.weights import small
from tests.weights.test_export import loads_strictly

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[PolicyNetwork, Path]:
    """Trains a small LLaVA for three updates; returns its network and its folder."""
    home = tmp_path_factory.mktemp("run")
    source = small.save(small.llava(), home / "source")
    pretrained = small.imported(small.config(), home / "pretrained", source)
    model = small.config(bridge=("projector", "perceiver"), language_lora=small.LORA)
    config = load_config(f"{ROOT}/configs/policy/metaworld.py:uniform")
    config.update_from_flattened_dict({
        "preset": "small", "pretrained": str(pretrained), "adapter.bins": 4, "history": model.history,
        "prompt_template": "{instruction}", "prompt_tokens": 4, "data.context": 1, "data.batch_size": 2,
        "data.directory": str(tiny_rlds.write_lengths(home / "data", [[5, 4]])),
        "steps": 3, "validation_windows": 1, "optimizer.learning_rate": 0.1, "optimizer.warmup": 0.0,
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        preset = presets.Preset(model, presets.LORA_AND_ADAPTER, "pretrained")
        patch.setitem(presets.PRESETS, "small", preset)
        train.main(config, home / "policy")
    saved = load_network(home / "policy", jax.devices()[0])
    return saved.network(), home / "policy"


def test_a_policy_as_llava_with_the_rest_beside_it_and_its_lora_on_the_base(
    policy: tuple[PolicyNetwork, Path], tmp_path: Path
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
    np.testing.assert_array_equal(beside["adapters/tiny/head"].read(), arrays["adapters/tiny/head"])

    model = export_hf.from_run(workdir / "checkpoints" / "3")
    export_hf.export_model(model, tmp_path / "lora", lora=True)
    trained = {path.removeprefix("mllm/") for path in arrays if "mllm/bridge/projector/" in path}
    assert trained  # peft's format has no place for it
    with_lora = safetensors.read(tmp_path / "lora" / "mllm_act.safetensors")
    assert with_lora.keys() == beside.keys() | trained
    peft = pytest.importorskip("peft")
    assert peft.PeftConfig.from_pretrained(tmp_path / "lora").r == small.LORA.rank


def test_what_is_not_a_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no whole checkpoint"):
        export_hf.from_run(tmp_path)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {}, {"tokenizer": {}})
    with pytest.raises(UserError, match="expected a policy's checkpoint .*, found no network"):
        export_hf.from_run(tmp_path)
