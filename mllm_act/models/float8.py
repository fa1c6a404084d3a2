"""Frozen matrices held and multiplied in 8-bit floating point (e4m3; Micikevicius et al., arXiv 2209.05433).

A matrix keeps one scale a column, an input gets one scale a row when it arrives; both are factors of the result, so
that the product itself is of 8-bit numbers alone, at twice bfloat16's rate on Hopper. The gradient of the input is
computed alike. The matrix has no gradient: it is frozen.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPE = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(DTYPE).max)  # 448


def quantize(
    kernel: Float[Array, "... I O"],
) -> tuple[Float[Array, "... I O"], Float[Array, "... O"]]:
    """Returns a matrix in float8 and float32 scales of its columns: ``kernel ~= quantized * scale``."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(kernel).max(-2), 1e-12) / LARGEST
    return (kernel / scale[..., None, :]).astype(DTYPE), scale


def _product(
    x: Float[Array, "... I"], kernel: Float[Array, "I O"], contracted: int
) -> Float[Array, "... O"]:
    """Multiplies rows, quantised on the way, by a float8 matrix over its axis ``contracted``; float32."""
    scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32), 1e-12) / LARGEST
    rows = (x.astype(jnp.float32) / scale).astype(DTYPE)
    out = jax.lax.dot_general(
        rows,
        kernel,
        (((x.ndim - 1,), (contracted,)), ((), ())),
        preferred_element_type=x.dtype,
    )
    return out.astype(jnp.float32) * scale


@jax.custom_vjp
def matmul(
    x: Float[Array, "... I"], kernel: Float[Array, "I O"], scale: Float[Array, " O"]
) -> Float[Array, "... O"]:
    """Returns ``x @ (kernel * scale)`` in the dtype of ``x``, for a matrix from ``quantize``."""
    return (_product(x, kernel, 0) * scale).astype(x.dtype)


def _forward(x: Array, kernel: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel, scale), (kernel, scale)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    kernel, scale = kept
    scaled = (gradient.astype(jnp.float32) * scale).astype(gradient.dtype)
    return _product(scaled, kernel, 1).astype(gradient.dtype), None, None


matmul.defvjp(_forward, _backward)
