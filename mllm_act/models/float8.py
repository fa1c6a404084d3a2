"""Frozen matrices held and multiplied in 8-bit floating point (e4m3; Micikevicius et al., arXiv 2209.05433).

A matrix has one scale. Its input is quantised when it arrives: with one scale where a bound on it is known beforehand
(what a norm puts out), else with one a row. Scales are powers of two, so that they are exact in any format; e4m3 keeps
its three bits of mantissa over four decades, so that a loose bound costs no precision. On Hopper the product is of
8-bit numbers alone, at twice bfloat16's rate. The gradient of the input is computed alike. The matrix has no
gradient: it is frozen.

Hopper multiplies 8-bit numbers along axes that are contiguous in both factors. ``lay_out`` holds a matrix beside its
transpose, one for the gradient and one for the product, where transposing it in every step would cost more.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPE = jnp.float8_e4m3fn
Kernel = Array | tuple[Array | None, Array]  # [I, O], or that and its transpose
LARGEST = float(jnp.finfo(DTYPE).max)  # 448


def scale_of(largest: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the least power of two that brings numbers up to ``largest`` into e4m3's range; float32."""
    exponent = jnp.ceil(jnp.log2(jnp.maximum(largest.astype(jnp.float32), 1e-30) / LARGEST))
    return jnp.ldexp(jnp.float32(1.0), exponent.astype(jnp.int32))  # exp2 is not exact everywhere


def _cast(x: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    scaled = x.astype(jnp.float32) / scale
    return jnp.clip(scaled, -LARGEST, LARGEST).astype(DTYPE)  # beyond the range e4m3 has NaN alone


def quantize(
    kernel: Float[Array, "*stack I O"],
) -> tuple[Float[Array, "*stack I O"], Float[Array, "*stack"]]:
    """Returns matrices in float8, and a float32 scale of each: ``kernel ~= quantized * scale``."""
    scale = scale_of(jnp.abs(kernel).max((-2, -1)))
    return _cast(kernel, scale[..., None, None]), scale


def lay_out(kernel: Float[Array, "I O"], backward: bool) -> Kernel:
    """Returns a matrix as ``matmul`` reads it: its transpose, and itself where there will be gradients."""
    return kernel if backward else None, jnp.asarray(kernel.T)


def _product(
    x: Float[Array, "... I"],
    kernel: Float[Array, "O I"],
    scale: Float[Array, ""],
    own: Float[Array, ""] | None,
) -> Float[Array, "... O"]:
    """Multiplies rows, quantised on the way, by the rows of a float8 matrix."""
    if own is None:
        own = scale_of(jnp.abs(x).max(-1, keepdims=True))
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    # Both factors in 8 bits: the form that XLA gives to cuBLAS as it is. Scales multiply what comes out.
    out = jax.lax.dot_general(_cast(x, own), kernel, axes, preferred_element_type=x.dtype)
    return out * (own * scale).astype(x.dtype)


@jax.custom_vjp
def matmul(
    x: Float[Array, "... I"],
    kernel: Kernel,
    scale: Float[Array, ""],
    input_scale: Float[Array, ""] | None = None,
) -> Float[Array, "... O"]:
    """Returns ``x @ (kernel * scale)`` in the dtype of ``x``.

    Args:
      x: rows.
      kernel: from ``quantize``, or ``lay_out`` of that.
      scale: from ``quantize``.
      input_scale: ``scale_of`` a bound on ``x``, where one is known; entries beyond it are cut. Else a row has its own.
    """
    transposed = kernel[1] if isinstance(kernel, tuple) else kernel.T
    return _product(x, transposed, scale, input_scale)


def _forward(
    x: Array, kernel: Kernel, scale: Array, input_scale: Array | None
) -> tuple[Array, tuple[Kernel, Array]]:
    return matmul(x, kernel, scale, input_scale), (kernel, scale)


def _backward(kept: tuple[Kernel, Array], gradient: Array) -> tuple[Array, None, None, None]:
    kernel, scale = kept
    plain = kernel[0] if isinstance(kernel, tuple) else kernel
    assert plain is not None, "a matrix laid out for acting has no gradient"
    return _product(gradient, plain, scale, None), None, None, None


matmul.defvjp(_forward, _backward)
