"""How many floating-point operations a model's arithmetic takes, by formula: two for a multiply-add.

Counted are matrix products and attention scores, as they are computed (the whole N x N, masked or not). Forward, a
matrix [I, O] takes ``2 I O`` for each row. The gradient of its input takes as many again, that of a trained matrix as
many once more. Frozen vision encoders have no backward pass. Recomputation does not count.
"""

import math

from mllm_act.models.mllm import MLLMConfig


def vision(config: MLLMConfig) -> float:
    """Operations to encode one image."""
    c = config.vision
    rows = c.patches + 1
    block = 2 * rows * (4 * c.width**2 + 2 * c.width * c.mlp_width) + 4 * rows**2 * c.width
    return c.layers * block + 2 * c.patches * 3 * c.patch_size**2 * c.width


def bridge(config: MLLMConfig) -> float:
    """Operations to turn one image's features into latents."""
    features, out, total = config.vision.width, config.language.width, 0.0
    rows, width = config.vision.patches, features
    for i, part in enumerate(config.bridge):
        target = out if i + 1 == len(config.bridge) else features
        if part == "projector":
            total += 2 * rows * (width * out + out * out)
            width = out
        elif part == "mixer":
            m = config.mixer
            sums = m.latents * m.sums
            total += 2 * rows * m.width * (width + sums)
            total += 2 * m.latents * m.mlp_width * (m.sums * m.width + target)
            rows, width = m.latents, target
        elif part == "film":
            f = config.film
            side = math.isqrt(rows) // f.merge
            taps = (3 * side - 2) ** 2  # those of all places that are on the grid
            told = f.queries * f.width
            total += 2 * f.width * (rows * width + side**2 * f.width)
            total += f.blocks * 2 * f.width * (taps * f.width + 2 * told)
            total += 2 * f.mlp_width * (f.width + f.latents * target)
            rows, width = f.latents, target
        else:
            p = config.perceiver
            d, latents, seen = p.width, p.latents, rows + p.latents
            layer = 2 * (2 * latents * d * d + 2 * seen * d * d + 2 * latents * d * p.mlp_width)
            total += p.layers * (layer + 4 * latents * seen * d)
            total += 2 * latents * d * target + (2 * rows * width * d if width != d else 0)
            rows, width = latents, target
    return total


def language(config: MLLMConfig, rows: int, seen: int, backward: bool = False) -> float:
    """Operations for ``rows`` inputs of one sequence that attend to ``seen`` positions; with or without backward."""
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
    return c.layers * (rows * (4 * frozen + 6 * trained) + 3 * attention)


def train(config: MLLMConfig, batch: int, context: int, prompt_tokens: int, tokens: int) -> float:
    """Operations of one update where the vision encoder and the language model's base are frozen.

    ``tokens`` is M; all but the last token of an action are fed back.
    """
    rows = prompt_tokens + context * (config.latents_per_image + tokens - 1)
    head = 6 * context * tokens * 512 * config.language.width
    images = context * (vision(config) + 3 * bridge(config))
    decoder = language(config, rows, rows, backward=True)
    if "film" in config.bridge:
        part = min(config.film.instruction_layer / config.language.layers, 1)
        decoder += part * language(config, prompt_tokens, prompt_tokens, backward=True)
    return batch * (images + decoder + head)
