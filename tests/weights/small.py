"""Small Hugging Face models saved to folders, our configs of them, and the outputs of both.

A test module that imports this is skipped without PyTorch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mllm_act import parameters
from mllm_act.import_hf import open_source
from mllm_act.models import generate
from mllm_act.models.bridge.perceiver import PerceiverConfig
from mllm_act.models.language import LanguageConfig
from mllm_act.models.layers import LoRA
from mllm_act.models.mllm import MLLM, MLLMConfig
from mllm_act.models.vision import FAMILIES, VisionConfig
from mllm_act.weights.convert import convert
from mllm_act.weights.folder import load_pretrained, pretrained_paths
from tests.models import hugging_face
from tests.models.hugging_face import torch, transformers

Module = TypeVar("Module", bound=nnx.Module)

IMAGE = 39  # the id of <image>
PATCHES = 16
TOKENS = np.random.default_rng(1).integers(0, IMAGE, (2, 9))
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)


def config(**changes: Any) -> MLLMConfig:
    """The config of ``tests.models.hugging_face``'s models, with a CLIP; three of its four vision blocks run.

    A keyword with the prefix ``vision_`` or ``language_`` changes a field of that part.
    """
    base = MLLMConfig(
        vision=VisionConfig(image_size=28, patch_size=7, width=16, layers=3, heads=2, mlp_width=40),
        bridge=("projector",),
        sizes=(("perceiver", PerceiverConfig(width=16, heads=2, mlp_width=32, layers=1)),),
        language=LanguageConfig(
            vocabulary=40, action_tokens=30, width=32, layers=3, heads=4, kv_heads=2, mlp_width=48,
            epsilon=hugging_face.EPSILON, max_positions=64,
        ),
        dtype="float32",
    )  # fmt: skip
    parts = {"vision": {}, "language": {}, "": {}}
    for name, value in changes.items():
        part, _, field = name.partition("_") if "_" in name else ("", "", name)
        parts[part][field] = value
    return dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, **parts["vision"]),
        language=dataclasses.replace(base.language, **parts["language"]),
        **parts[""],
    )


def dinov2(stored: int = 9) -> MLLMConfig:
    """The same with a DINOv2, whose positions are interpolated, and a tied language model."""
    return config(
        vision_family="dinov2", vision_mlp_width=48, vision_position_side=stored,
        language_tied=True, language_rope_theta=100_000.0, bridge=("perceiver",),
    )  # fmt: skip


def llava() -> Any:
    """LLaVA with random weights."""
    llava_config = transformers.LlavaConfig(
        vision_config=hugging_face.clip_config(), text_config=hugging_face.llama_config(),
        image_token_index=IMAGE, image_seq_length=PATCHES,
    )  # fmt: skip
    return hugging_face.randomized(transformers.LlavaForConditionalGeneration(llava_config))


def llama(kv_heads: int = 2, *, tied: bool = False, theta: float = 10_000.0) -> Any:
    """A Llama with random weights."""
    llama_config = hugging_face.llama_config(kv_heads, tied=tied, theta=theta)
    return hugging_face.randomized(transformers.LlamaForCausalLM(llama_config))


def clip() -> Any:
    """A CLIP vision encoder with random weights."""
    return hugging_face.randomized(transformers.CLIPVisionModel(hugging_face.clip_config()))


def dino(stored: int = 9) -> Any:
    """A DINOv2 with random weights and ``stored`` positions a side."""
    return hugging_face.randomized(transformers.Dinov2Model(hugging_face.dinov2_config(stored)))


def tokenizer() -> Tokenizer:
    """A tokenizer of one-letter words and ``<image>``; ids below 40."""
    words = {chr(ord("A") + i): i for i in range(IMAGE)}
    result = Tokenizer(models.WordLevel(words, unk_token="A"))
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    result.add_special_tokens([AddedToken("<image>", special=True)])
    assert result.token_to_id("<image>") == IMAGE
    return result


def save(model: Any, path: Path, **options: Any) -> str:
    """Saves a model; a language model gets a tokenizer beside it. Returns the folder's name."""
    model.save_pretrained(path, **options)
    if hasattr(model, "lm_head"):
        tokenizer().save(str(path / "tokenizer.json"))
    return str(path)


def imported(config: MLLMConfig, out: Path, *names: str, dtype: str | None = None) -> Path:
    """Imports sources into ``out``; returns it."""
    convert(config, [open_source(name) for name in names], out, dtype)
    return out


def pretrained_leaves(config: MLLMConfig, path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that training reads from a folder: all but LoRA, and the projector if the folder has it."""
    state = nnx.eval_shape(lambda: nnx.state(MLLM(config, nnx.Rngs(0)), nnx.Param))
    parts = ("vision/", "language/", "bridge/projector/")
    available = pretrained_paths(path)
    return {
        name: leaf
        for name, leaf in parameters.flatten(state).items()
        if name.startswith(parts) and "lora_" not in name
        if not name.startswith("bridge/") or name in available
    }


def random(make: Callable[[], Module], known: Mapping[str, jax.Array] | None = None) -> Module:
    """A module with the known parameters and random others, made without compiling anything."""
    graph, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(2)
    values = dict(known or {})
    for path, leaf in parameters.flatten(state).items():
        if path not in values:
            values[path] = jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype)
    return nnx.merge(graph, parameters.unflatten(values, state))


def model(config: MLLMConfig, path: Path) -> MLLM:
    """Our model with the weights of a folder; arrays that the folder lacks are random."""
    loaded = load_pretrained(path, pretrained_leaves(config, path))
    return random(lambda: MLLM(config, nnx.Rngs(0)), loaded)


def arrays(ours: nnx.Module) -> dict[str, jax.Array]:
    """All of a module's parameters by path."""
    return parameters.flatten(nnx.state(ours, nnx.Param))


LORA = LoRA(targets="q|v|up", rank=4, alpha=6.0)


@nnx.jit
def _logits(ours: MLLM, x: jax.Array) -> jax.Array:
    positions, mask = generate.layout(jnp.ones(x.shape[:2], bool))
    return ours.language.logits(ours.language(x, positions, mask)[0])


def logits(ours: MLLM, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """Our language model's logits."""
    return np.asarray(_logits(ours, ours.language.embed(jnp.asarray(tokens), jnp.dtype("float32"))))


@nnx.jit
def _features(ours: MLLM, images: jax.Array) -> jax.Array:
    return ours.vision(images, dtype=jnp.dtype("float32"))


def features(ours: MLLM, images: np.ndarray = IMAGES) -> np.ndarray:
    """Our vision encoder's features."""
    return np.asarray(_features(ours, jnp.asarray(images)))


def whole_logits(ours: MLLM) -> np.ndarray:
    """Our logits for an image between words."""
    latents = ours.latents({"front": jnp.asarray(IMAGES[:1, None])})[:, 0]
    words = ours.language.embed(jnp.array([[1, 5, 7]]), jnp.dtype("float32"))
    return np.asarray(_logits(ours, jnp.concatenate([words[:, :1], latents, words[:, 1:]], axis=1)))


def their_logits(theirs: Any, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """A Hugging Face language model's logits."""
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(tokens)).logits.numpy()


def pixels(family: str, images: np.ndarray = IMAGES) -> Any:
    """Images as pixel values for Hugging Face's encoders."""
    mean, std = (np.array(v, np.float32) for v in (FAMILIES[family].mean, FAMILIES[family].std))
    return torch.tensor(((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))


def their_features(theirs: Any, family: str, layer: int) -> np.ndarray:
    """Hidden states of a Hugging Face vision encoder, without the class token."""
    with torch.no_grad():
        states = theirs(pixels(family), output_hidden_states=True).hidden_states
    return states[layer][:, 1:].numpy()


def their_whole_logits(theirs: Any) -> np.ndarray:
    """The logits of Hugging Face's LLaVA for the same input."""
    tokens = torch.tensor([[1, *[IMAGE] * PATCHES, 5, 7]])
    with torch.no_grad():
        return theirs(input_ids=tokens, pixel_values=pixels("clip")[:1]).logits.numpy()
