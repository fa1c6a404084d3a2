"""Exported models load in transformers and peft with nothing missing, and compute the same."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_act import export_hf
from mllm_act.errors import UserError
from mllm_act.models.mllm import MLLMConfig
from mllm_act.weights import safetensors
from mllm_act.weights.folder import WEIGHTS, pretrained_text_tokenizer
from tests.weights import small

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")


def loads_strictly(kind: Any, path: Path) -> Any:
    """Loads a folder; fails if a tensor is missing, unexpected, of another shape or newly initialized."""
    model, info = kind.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def with_lora(config: MLLMConfig, source: Path) -> tuple[export_hf.Model, Any]:
    """A model as after training: the weights of a folder, and LoRA's factors."""
    language = dataclasses.replace(config.language, lora=small.LORA)
    config = dataclasses.replace(config, language=language)
    ours = small.model(config, source)
    arrays = {path: export_hf.tensor(array) for path, array in small.arrays(ours).items()}
    text = pretrained_text_tokenizer(source)
    return export_hf.Model(config, arrays, {}, {"tokenizer.json": text}, base=None), ours


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llava")
    source = small.save(small.llava(), path / "source")
    return small.imported(small.config(), path / "ours", source)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama and a DINOv2 in one folder of ours."""
    path = tmp_path_factory.mktemp("pair")
    language = small.save(small.llama(tied=True, theta=1e5), path / "llama")
    vision = small.save(small.dino(), path / "dino")
    return small.imported(small.dinov2(), path / "ours", language, vision)


def test_llava_round_trip_in_shards(llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_hf.export_model(export_hf.from_folder(llava), out, lora=False, shard=20_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3 and all(shard.stat().st_size < 25_000 for shard in shards)
    theirs = loads_strictly(transformers.LlavaForConditionalGeneration, out)
    assert theirs.config.vision_config.num_hidden_layers == 3
    expected = small.whole_logits(small.model(small.config(), llava))
    np.testing.assert_allclose(small.their_whole_logits(theirs), expected, atol=1e-4)

    words = transformers.AutoTokenizer.from_pretrained(out)
    assert words("B C <image>")["input_ids"] == [1, 2, small.IMAGE]
    image = transformers.AutoImageProcessor.from_pretrained(out)(
        images=small.IMAGES[0], return_tensors="np"
    )["pixel_values"]
    np.testing.assert_allclose(image[0], small.pixels("clip")[0].numpy(), atol=1e-5)

    again = small.imported(  # blocks left out at import stay left out
        small.config(), tmp_path / "again", str(out)
    )
    assert (again / WEIGHTS).read_bytes() == (llava / WEIGHTS).read_bytes()


def test_a_tied_llama_and_a_dinov2_in_two_folders_with_lora_merged(
    pair: Path, tmp_path: Path
) -> None:
    model, ours = with_lora(small.dinov2(), pair)
    export_hf.export_model(model, tmp_path / "out", lora=False)
    language = loads_strictly(transformers.LlamaForCausalLM, tmp_path / "out" / "language")
    np.testing.assert_allclose(small.their_logits(language), small.logits(ours), atol=1e-4)
    vision = loads_strictly(transformers.Dinov2Model, tmp_path / "out" / "vision")
    theirs = small.their_features(vision, "dinov2", layer=-1)
    np.testing.assert_allclose(theirs, small.features(ours), atol=1e-4)

    beside = safetensors.read(tmp_path / "out" / "mllm_act.safetensors")
    arrays = small.arrays(ours)
    assert beside.keys() == {path for path in arrays if path.startswith("bridge/")}
    for path, tensor in beside.items():
        np.testing.assert_array_equal(tensor.read(), arrays[path])
    assert (tmp_path / "out" / "language" / "tokenizer.json").is_file()


def test_special_tokens_chat_template_and_end_token_come_along(tmp_path: Path) -> None:
    """From a Hugging Face folder through ours to an export, where ``generate`` ends a text."""
    language = small.save(small.llama(tied=True, theta=1e5), tmp_path / "llama")
    words = {"eos_token": "C", "pad_token": "A", "chat_template": "{{ messages[0]['content'] }} C"}
    files = {
        "tokenizer_config.json": words,
        "generation_config.json": {"eos_token_id": [2, 3], "max_length": 7},
    }
    for name, values in files.items():
        (tmp_path / "llama" / name).write_text(json.dumps(values))
    vision = small.save(small.dino(), tmp_path / "dino")
    ours = small.imported(small.dinov2(), tmp_path / "ours", language, vision)
    export_hf.export_model(export_hf.from_folder(ours), tmp_path / "out", lora=False)
    out = tmp_path / "out" / "language"
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("C", "A")
    chat = [{"role": "user", "content": "B"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "B C"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.generation_config.eos_token_id == [2, 3] == theirs.config.eos_token_id
    assert theirs.generation_config.pad_token_id == 0  # only in the source's config.json
    with small.torch.no_grad():  # the last token of every text is made the end
        theirs.lm_head.weight = small.torch.nn.Parameter(theirs.lm_head.weight.clone())
        theirs.lm_head.weight[3] = 100 * theirs.model(small.torch.tensor([[1, 5]]))[0][0, -1]
    text = theirs.generate(small.torch.tensor([[1, 5]]), max_new_tokens=5)
    assert text.tolist() == [[1, 5, 3]]


def test_merged_lora_is_exact_unless_bfloat16_is_chosen(pair: Path, tmp_path: Path) -> None:
    model, ours = with_lora(dataclasses.replace(small.dinov2(), weight_dtype="bfloat16"), pair)
    expected = small.logits(ours)
    errors = {}
    for dtype in (None, "float32", "bfloat16"):
        export_hf.export_model(model, tmp_path / str(dtype), lora=False, dtype=dtype)
        config = json.loads((tmp_path / str(dtype) / "language" / "config.json").read_text())
        assert config["dtype"] == (dtype or "float32")
        theirs = loads_strictly(
            transformers.LlamaForCausalLM, tmp_path / str(dtype) / "language"
        ).float()
        errors[dtype] = np.abs(small.their_logits(theirs) - expected).max()
    assert errors[None] == errors["float32"] < 1e-3 < errors["bfloat16"]


@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float8"])
def test_weights_in_fewer_bits(llava: Path, tmp_path: Path, weight_dtype: str) -> None:
    config = dataclasses.replace(small.config(), weight_dtype=weight_dtype)
    ours = small.model(config, llava)
    arrays = {path: export_hf.tensor(array) for path, array in small.arrays(ours).items()}
    text = pretrained_text_tokenizer(llava)
    model = export_hf.Model(config, arrays, {}, {"tokenizer.json": text}, base=None)
    export_hf.export_model(model, tmp_path / "out", lora=False)
    theirs = loads_strictly(transformers.LlavaForConditionalGeneration, tmp_path / "out").float()
    exact = small.model(small.config(), llava)
    full = {path: np.asarray(array) for path, array in small.arrays(exact).items()}
    actual = theirs.model.language_model.layers[1].mlp.up_proj.weight.detach().numpy().T
    expected = full["language/blocks/up/kernel"][1]
    step = (
        2**-8 if weight_dtype == "bfloat16" else 2**-4
    )  # relative rounding, 8 and 4 bits of significand
    assert np.abs(actual - expected).max() <= step * np.abs(expected).max()


@pytest.mark.parametrize("which", ["llava", "pair"])
def test_lora_as_an_adapter_of_peft(
    request: pytest.FixtureRequest, tmp_path: Path, which: str
) -> None:
    peft = pytest.importorskip("peft")
    source = request.getfixturevalue(which)
    # Even with another bridge, the adapter is for LLaVA.
    config = small.config(bridge=("perceiver",)) if which == "llava" else small.dinov2()
    model, ours = with_lora(config, source)
    export_hf.export_model(export_hf.from_folder(source), tmp_path / "base", lora=False)
    export_hf.export_model(model, tmp_path / "lora", lora=True)
    if which == "llava":
        base = loads_strictly(transformers.LlavaForConditionalGeneration, tmp_path / "base")
    else:
        base = loads_strictly(transformers.LlamaForCausalLM, tmp_path / "base" / "language")
    expected = small.logits(ours)
    assert (
        np.abs(small.their_logits(base) - expected).max() > 0.1
    )  # or the adapter would make no difference
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    np.testing.assert_allclose(small.their_logits(adapted), expected, atol=1e-4)
    factors = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(factors) == 3 * 3 * 2  # layers, targets, factors; none on the vision encoder
    saved = safetensors.read(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(saved) == len(factors)
    peft_config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (peft_config["r"], peft_config["lora_alpha"], peft_config["lora_dropout"]) == (
        4,
        6.0,
        0.1,
    )


def test_no_lora_to_export(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--lora: expected a checkpoint trained with LoRA"):
        export_hf.export_model(export_hf.from_folder(llava), tmp_path / "out", lora=True)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="remove it or name another"):
        export_hf.export_model(export_hf.from_folder(llava), tmp_path, lora=False)
