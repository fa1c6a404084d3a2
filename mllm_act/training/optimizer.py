"""AdamW with linear warm-up, a schedule and gradient clipping.

The defaults, warm-up and cosine decay to zero, are those of arXiv 2406.07904, appendix, table 3.
"""

import jax
import optax
from ml_collections.config_dict import ConfigDict

from mllm_act import parameters

# The paper does not say what decays. Here matrices do, as is common: not biases, scales (of norms, and DINOv2's layer
# scales), embeddings and learned inputs. Only the end of a path decides: it begins with names that users choose.
DECAYED: tuple[tuple[str, bool], ...] = (
    (r"(^|/)(bias|scale\d*|position|class_token|latents|queries|embedding(/kernel)?)$", False),
    (r".", True),
)


SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")


def schedule(config: ConfigDict, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: a linear warm-up to the peak, then one of ``SCHEDULES``.

    Cosine and linear end at zero; ``warmup_stable_decay`` (Hu et al. 2024, arXiv 2404.06395) stays at the peak and goes
    linearly to zero over the last ``config.decay`` of the steps.
    """
    peak, warmup = config.learning_rate, round(config.warmup * steps)
    rest = max(steps - warmup, 1)
    decay = min(max(round(config.decay * steps), 1), rest)
    after = {
        "cosine": lambda: [(optax.cosine_decay_schedule(peak, rest), 0)],
        "linear": lambda: [(optax.linear_schedule(peak, 0.0, rest), 0)],
        "constant": lambda: [(optax.constant_schedule(peak), 0)],
        "warmup_stable_decay": lambda: [
            (optax.constant_schedule(peak), 0),
            (optax.linear_schedule(peak, 0.0, decay), rest - decay),
        ],
    }[config.schedule]()
    parts = [(optax.linear_schedule(0.0, peak, warmup), 0)] if warmup else []
    parts += [(part, warmup + start) for part, start in after]
    return optax.join_schedules([part for part, _ in parts], [start for _, start in parts[1:]])


def build(config: ConfigDict, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes the optimizer.

    Args:
      config: ``learning_rate`` (peak), ``warmup`` and ``decay`` (fractions of the steps), ``schedule``, ``b1``, ``b2``,
        ``weight_decay`` and ``max_grad_norm``.
      steps: how many updates the run makes.

    Returns:
      The optimizer, and its learning rate by step.
    """
    learning_rate = schedule(config, steps)

    def decayed(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: parameters.find(DECAYED, parameters.name(path)), params
        )

    adamw = optax.adamw(
        learning_rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw), learning_rate
