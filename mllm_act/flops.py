"""The floating-point operations of a model by formula, two for a multiply-add.

Matrix products and attention scores are counted as they are computed (the whole N x N, masked or not). In the forward
pass a matrix [I, O] takes ``2 I O`` per row. The gradient of its input takes as many again, and so does the gradient of
a trained matrix. Frozen vision encoders have no backward pass. Recomputation does not count.
"""

from mllm_act import parameters
from mllm_act.models.bridge.bridge import PARTS, part_config, shapes
from mllm_act.models.mllm import MLLMConfig
from mllm_act.models.presets import Rules


def vision(config: MLLMConfig) -> float:
    """Operations to encode one image."""
    c = config.vision
    rows = c.patches + 1
    block = 2 * rows * (4 * c.width**2 + 2 * c.width * c.mlp_width) + 4 * rows**2 * c.width
    return c.layers * block + 2 * c.patches * 3 * c.patch_size**2 * c.width


def bridge(config: MLLMConfig) -> float:
    """Operations to turn one image's features into latents."""
    vision, width = config.vision, config.language.width
    parts = shapes(config.bridge, config.sizes, vision.patches, vision.width, width)
    return sum(
        PARTS[name].flops(part_config(name, config.sizes), shape) for name, shape in parts.items()
    )


def language(
    config: MLLMConfig, rows: int, seen: int, backward: bool = False, base: bool = False
) -> float:
    """Operations for ``rows`` inputs of one sequence that attend to ``seen`` positions; with or without backward.

    ``base`` says whether the matrices themselves are trained, not only LoRA's factors.
    """
    c = config.language
    head = c.width // c.heads
    shapes = {
        "q": (c.width, c.heads * head),
        "k": (c.width, c.kv_heads * head),
        "v": (c.width, c.kv_heads * head),
        "o": (c.heads * head, c.width),
        "gate": (c.width, c.mlp_width),
        "up": (c.width, c.mlp_width),
        "down": (c.mlp_width, c.width),
    }
    frozen = sum(i * o for i, o in shapes.values())
    trained = 0
    if c.lora is not None:
        trained = sum(
            c.lora.rank * (i + o) for name, (i, o) in shapes.items() if c.lora.aims_at(name)
        )
    attention = 4 * rows * seen * c.heads * head
    if not backward:
        return c.layers * (2 * rows * (frozen + trained) + attention)
    return c.layers * (rows * ((6 if base else 4) * frozen + 6 * trained) + 3 * attention)


def train(
    config: MLLMConfig,
    rules: Rules,
    batch: int,
    cameras: int,
    context: int,
    prompt_tokens: int,
    tokens: int,
    codes: int,
) -> float:
    """Operations of one update, over all devices.

    Args:
      config: of the model.
      rules: which parameters are trained.
      batch: windows.
      cameras: images of a step.
      context: T, all steps of a window, whether they exist or not.
      prompt_tokens: N, padding included.
      tokens: M; all but the last token of an action are fed back.
      codes: rows of the vocabulary that logits are computed for.
    """
    sees, speaks = (
        parameters.find(rules, f"mllm/{part}/blocks/q/kernel") for part in ("vision", "language")
    )
    rows = prompt_tokens + context * (cameras * config.latents_per_image + tokens - 1)
    head = 6 * context * tokens * codes * config.language.width
    images = context * cameras * ((3 if sees else 1) * vision(config) + 3 * bridge(config))
    decoder = language(config, rows, rows, backward=True, base=speaks)
    for name in config.bridge:
        if PARTS[name].reads_instruction:
            depth = part_config(name, config.sizes).instruction_layer
            share = min(depth / config.language.layers, 1)
            read = language(config, prompt_tokens, prompt_tokens, backward=True, base=speaks)
            decoder += share * read
    return batch * (images + decoder + head)
