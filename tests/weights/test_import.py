"""Imports Hugging Face folders: our model with their weights computes the same as theirs."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mllm_act import export_hf
from mllm_act.errors import UserError
from mllm_act.weights import safetensors
from mllm_act.weights.folder import (
    WEIGHTS,
    pretrained_meta,
    pretrained_paths,
    pretrained_tensors,
    pretrained_text_tokenizer,
)
from tests.weights import small


def test_a_tied_llama_with_grouped_heads_and_a_dinov2_with_interpolated_positions(
    tmp_path: Path,
) -> None:
    config, language, vision = small.dinov2(), small.llama(tied=True, theta=1e5), small.dino()
    sources = (small.save(language, tmp_path / "llama"), small.save(vision, tmp_path / "dino"))
    ours = small.model(config, small.imported(config, tmp_path / "out", *sources))
    np.testing.assert_allclose(small.logits(ours), small.their_logits(language), atol=1e-4)
    expected = small.their_features(vision, "dinov2", layer=-2)
    np.testing.assert_allclose(small.features(ours), expected, atol=1e-4)
    assert not any("bridge" in path for path in pretrained_paths(tmp_path / "out"))


def test_an_untied_llama_with_full_heads_and_a_clip(tmp_path: Path) -> None:
    config, language, vision = small.config(language_kv_heads=4), small.llama(4), small.clip()
    sources = (small.save(vision, tmp_path / "clip"), small.save(language, tmp_path / "llama"))
    ours = small.model(config, small.imported(config, tmp_path / "out", *sources))
    np.testing.assert_allclose(small.logits(ours), small.their_logits(language), atol=1e-4)
    expected = small.their_features(vision, "clip", layer=-2)
    np.testing.assert_allclose(small.features(ours), expected, atol=1e-4)


def respell(path: Path, change: dict[str, str]) -> None:
    """Renames the tensors of a sharded folder by their prefixes."""

    def new(name: str) -> str:
        old = next(
            prefix for prefix in sorted(change, key=len, reverse=True) if name.startswith(prefix)
        )
        return change[old] + name.removeprefix(old)

    for shard in path.glob("*.safetensors"):
        tensors = {new(n): t for n, t in safetensors.read(shard).items()}
        values = [(name, np.array(tensor.read())) for name, tensor in tensors.items()]
        safetensors.write(shard, tensors, values)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {new(n): shard for n, shard in index["weight_map"].items()}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


# Each applies to the one before: as transformers saves it, as LLaVA-1.5 was released, as transformers 5 names it.
SPELLINGS = (
    {"vision_tower.": "vision_tower.vision_model.", "": ""},
    {
        "vision_tower.vision_model.": "model.vision_tower.",
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "": "model.",
    },
)


def test_llava_in_shards_in_every_spelling(tmp_path: Path) -> None:
    theirs = small.llava()
    source = small.save(theirs, tmp_path / "llava", max_shard_size="20KB")
    assert len(list((tmp_path / "llava").glob("*.safetensors"))) > 3
    out = small.imported(small.config(), tmp_path / "out", source)
    expected = small.their_whole_logits(theirs)
    ours = small.model(small.config(), out)
    np.testing.assert_allclose(small.whole_logits(ours), expected, atol=1e-4)
    for index, spelling in enumerate(SPELLINGS):
        respell(tmp_path / "llava", spelling)
        again = small.imported(small.config(), tmp_path / f"out{index}", source)
        weights = (again / WEIGHTS, out / WEIGHTS)
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_released_llavas_config_leaves_defaults_out(tmp_path: Path) -> None:
    """``text_config`` of llava-hf/llava-1.5-7b-hf has no sizes: they are compared by Llama's defaults."""
    source = small.save(small.llava(), tmp_path / "llava")
    path = tmp_path / "llava" / "config.json"
    values = json.loads(path.read_text())
    values["text_config"] = {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 40}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="text_config.hidden_size: expected 32, found 4096"):
        small.imported(small.config(), tmp_path / "out", source)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_dtype_is_the_sources_by_default(tmp_path: Path, dtype: str | None) -> None:
    source = small.save(small.llava(), tmp_path / "llava")
    out = small.imported(small.config(), tmp_path / "out", source, dtype=dtype)
    dtypes = {tensor.dtype for tensor in pretrained_tensors(out).values()}
    assert dtypes == {np.dtype(ml_dtypes.bfloat16 if dtype else np.float32)}
    assert pretrained_text_tokenizer(out) == (tmp_path / "llava" / "tokenizer.json").read_text()
    assert pretrained_meta(out)["sources"] == [{"source": source, "revision": None}]


def test_a_hub_id_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache on disk."""
    hub = pytest.importorskip("huggingface_hub")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--llava"
    small.save(small.llava(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    out = small.imported(small.config(), tmp_path / "out", "owner/llava")
    assert pretrained_meta(out)["sources"] == [{"source": "owner/llava", "revision": commit}]
    assert export_hf.from_folder(out).base == "owner/llava"
    with pytest.raises(
        UserError, match="--source=owner/none: expected a folder, .* check the name"
    ):
        small.open_source("owner/none")
