"""Matrices as inference reads them: LoRA merged, projections of the same input fused, one array per layer."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mllm_act.models import float8
from mllm_act.models.layers import Linear, LoRA, RMSNorm

ARRAYS = ("kernel", "kernel_scale", "bias", "lora_a", "lora_b")


class ActingLinear(Linear):
    """``y = x W + b``, with ``W`` stored as [O, I], in float8 or the dtype of the computation.

    ``input_scale`` is the argument of that name of ``float8.matmul``, if it is known before the input.
    """

    def __init__(
        self,
        kernel: Any,
        kernel_scale: Any,
        bias: Any,
        input_scale: Array | None,
    ) -> None:
        """Wraps tuples of one array per layer; those of ``kernel`` are from ``float8.lay_out``."""
        self.kernel = nnx.Param(kernel)
        self.kernel_scale = None if kernel_scale is None else nnx.Param(kernel_scale)
        self.bias = None if bias is None else nnx.Param(bias)
        self.input_scale = None if input_scale is None else nnx.Param(input_scale)
        self.lora = None

    def __call__(
        self,
        x: Float[Array, "... I"],
        dropped: Float[Array, "... I"] | None = None,
        bound: Float[Array, ""] | None = None,
    ) -> Float[Array, "... O"]:
        """See ``Linear.__call__``."""
        kernel = self.kernel.get_value()
        if self.kernel_scale is None:
            y = x @ kernel[1].T.astype(x.dtype)
        else:
            scale = None if bound is None else float8.scale_of(bound)
            scale = scale if self.input_scale is None else self.input_scale[...]
            y = float8.matmul(x, kernel, self.kernel_scale[...], scale)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def fuse(
    projections: Sequence[Linear],
    dtype: str,
    in_float8: bool,
    norm: RMSNorm | None = None,
    lora: LoRA | None = None,
    input_bound: Float[Array, " L"] | None = None,
) -> ActingLinear:
    """Fuses stacked projections of the same input into one matrix per layer.

    Args:
      projections: with a leading layer axis.
      dtype: of the computation.
      in_float8: whether the matrices stay in float8. Those that LoRA adds to do not: most of an update is smaller than
        half a step of e4m3, and rounding the sum would lose it.
      norm: whose factors the matrix takes up.
      lora: the sizes of LoRA's factors, where projections have them.
      input_bound: a bound on the inputs of each layer, where one is known.
    """
    parts = [_arrays(projection) for projection in projections]
    if norm is not None:
        parts[0]["factors"] = norm.scale[...]
    in_float8 = in_float8 and not any("lora_a" in part for part in parts)
    make = jax.jit(functools.partial(_fused, lora=lora, dtype=dtype, in_float8=in_float8))
    layers = [
        make(jax.tree.map(operator.itemgetter(i), parts)) for i in range(len(parts[0]["kernel"]))
    ]

    def entries(name: str) -> tuple[Any, ...] | None:
        return tuple(layer[name] for layer in layers) if name in layers[0] else None

    scale = None if input_bound is None else float8.scale_of(input_bound)
    return ActingLinear(entries("kernel"), entries("kernel_scale"), entries("bias"), scale)


def _arrays(linear: Linear) -> dict[str, Any]:
    variables = {name: getattr(linear, name, None) for name in ARRAYS}
    return {name: variable[...] for name, variable in variables.items() if variable is not None}


def _fused(
    parts: list[dict[str, Any]], lora: LoRA | None, dtype: str, in_float8: bool
) -> dict[str, Any]:
    """Returns the arrays of one layer's matrix, by name."""
    kernels = [part["kernel"].astype(jnp.float32) * part.get("kernel_scale", 1.0) for part in parts]
    if lora is not None:
        for i, part in enumerate(parts):
            if "lora_a" in part:
                update = jnp.matmul(part["lora_a"], part["lora_b"], precision="highest")
                kernels[i] += update * (lora.alpha / lora.rank)
    kernel = jnp.concatenate(kernels, axis=-1)
    if "factors" in parts[0]:
        kernel *= parts[0]["factors"][:, None]
    result: dict[str, Any] = {}
    if in_float8:
        kernel, result["kernel_scale"] = float8.quantize(kernel)
    result["kernel"] = float8.lay_out(kernel if in_float8 else kernel.astype(dtype), backward=False)
    if "bias" in parts[0]:
        result["bias"] = jnp.concatenate([part["bias"] for part in parts])
    return result
