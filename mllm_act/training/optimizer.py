"""AdamW with linear warm-up, cosine decay to zero and gradient clipping (arXiv 2406.07904, appendix, table 3)."""

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


def build(config: ConfigDict, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes the optimizer.

    Args:
      config: ``learning_rate`` (peak), ``warmup`` (fraction of the steps), ``b1``, ``b2``, ``weight_decay`` and
        ``max_grad_norm``.
      steps: how many updates the run makes.

    Returns:
      The optimizer, and its learning rate by step.
    """
    warmup = round(config.warmup * steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(steps, warmup + 1)
    )

    def decayed(params: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: parameters.find(DECAYED, parameters.name(path)), params
        )

    adamw = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw), schedule
