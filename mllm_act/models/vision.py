"""The vision encoder: a transformer over patches, of CLIP (Radford et al. 2021) or DINOv2 (Oquab et al. 2023).

Features are those after ``layers`` blocks without the final norm and without the class token. LLaVA-1.5 takes CLIP's
layer before the last, so its ViT-L/14 has ``layers = 23`` here.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from mllm_act.errors import UserError
from mllm_act.models.layers import MULTIPLE, LayerNorm, Linear, attend, fused, heads, scan, stack

FITS = ("squash", "pad", "crop")  # how an image that is not square becomes the encoder's square


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets the encoders apart, beside their sizes. Pixel statistics are of RGB in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    norm_first: bool  # a norm before the first block; no bias in the patches' projection
    layer_scale: bool  # a trained factor on what each block adds (Touvron et al. 2021)
    epsilon: float


FAMILIES = {
    "clip": Family(
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        norm_first=True,
        layer_scale=False,
        epsilon=1e-5,
    ),
    "dinov2": Family(
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        norm_first=False,
        layer_scale=True,
        epsilon=1e-6,
    ),
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the encoder; ``layers`` counts the blocks that run. The input is ``image_size`` pixels square.

    ``position_side`` is the side of the grid that position embeddings are stored for, where it is not the image's own.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    family: str = "clip"
    position_side: int | None = None

    @property
    def patches(self) -> int:
        """The number of features of an image."""
        return (self.image_size // self.patch_size) ** 2


def square(images: UInt8[Array, "... H W 3"], fit: str) -> UInt8[Array, "... h w 3"]:
    """Makes images square as one of ``FITS``: ``pad`` adds black bars, ``crop`` keeps the centre.

    ``squash`` returns them as they are: the resize that follows changes their proportions. An odd pixel is added, or
    cut off, at the bottom or the right.
    """
    height, width = images.shape[-3:-1]
    if fit == "pad":
        side = max(height, width)
        bars = [((side - n) // 2, (side - n + 1) // 2) for n in (height, width)]
        return jnp.pad(images, [(0, 0)] * (images.ndim - 3) + [*bars, (0, 0)])
    if fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return images[..., top : top + side, left : left + side, :]
    return images


def preprocess(
    images: UInt8[Array, "... H W 3"], size: int, family: str = "clip", fit: str = "squash"
) -> Float[Array, "... size size 3"]:
    """Resizes (bicubic, antialiased) to ``size`` pixels square and standardises with the family's statistics."""
    pixels = square(images, fit).astype(jnp.float32) / 255.0
    if pixels.shape[-3:-1] != (size, size):
        shape = (*images.shape[:-3], size, size, 3)
        pixels = jnp.clip(jax.image.resize(pixels, shape, "cubic", antialias=True), 0, 1)
    kind = FAMILIES[family]
    return (pixels - jnp.array(kind.mean)) / jnp.array(kind.std)


def interpolation(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Returns the matrix of a bicubic resize of one axis, as ``torch.nn.functional.interpolate`` does it.

    Keys' kernel with a = -0.75, pixel centres at halves, edges repeated, no antialiasing; DINOv2's position embeddings
    are resized with it.
    """
    a = -0.75
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        index = np.floor(centre).astype(int) + tap
        d = np.abs(centre - index)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        weight = np.where(d <= 1, near, far)
        np.add.at(matrix, (np.arange(target), np.clip(index, 0, source - 1)), weight)
    return matrix.astype(np.float32)


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP: QuickGELU in CLIP, GELU and LayerScale in DINOv2."""

    def __init__(self, config: VisionConfig, weight_dtype: str, rngs: nnx.Rngs) -> None:
        d, residual = config.width, (2 * config.layers) ** -0.5
        self.family, self.heads = FAMILIES[config.family], config.heads

        def linear(name: str, inputs: int, outputs: int, scale: float = 1.0) -> Linear:
            return Linear(
                inputs,
                outputs,
                name=name,
                bias=True,
                scale=scale,
                weight_dtype=weight_dtype,
                rngs=rngs,
            )

        epsilon = self.family.epsilon
        self.norm1, self.norm2 = LayerNorm(d, epsilon=epsilon), LayerNorm(d, epsilon=epsilon)
        self.q, self.k, self.v = (linear(name, d, d) for name in "qkv")
        self.o = linear("o", d, d, residual)
        self.up = linear("up", d, config.mlp_width)
        self.down = linear("down", config.mlp_width, d, residual)
        if self.family.layer_scale:
            self.scale1, self.scale2 = nnx.Param(jnp.ones(d)), nnx.Param(jnp.ones(d))

    def __call__(self, x: Float[Array, "B N D"], length: int) -> Float[Array, "B N D"]:
        """Runs the block; what comes after the first ``length`` of N fills up and is not seen."""
        y, bound = self.norm1(x), self.norm1.bound()
        q, k, v = (
            heads(project(y, bound=bound), self.heads) for project in (self.q, self.k, self.v)
        )
        bound = self.v.bound(self.norm1.length())  # attention averages values
        y = self.o(attend(q, k, v, length=length), bound=bound)
        x = x + (y * self.scale1[...].astype(x.dtype) if self.family.layer_scale else y)
        y = self.up(self.norm2(x), bound=self.norm2.bound())
        bound = self.up.bound(self.norm2.length())  # no activation makes its input larger
        if self.family.layer_scale:
            y = self.down(jax.nn.gelu(y, approximate=False), bound=bound)
            return x + y * self.scale2[...].astype(x.dtype)
        return x + self.down(y * jax.nn.sigmoid(1.702 * y), bound=bound)


class VisionTransformer(nnx.Module):
    """Images to patch features."""

    def __init__(self, config: VisionConfig, weight_dtype: str, rngs: nnx.Rngs) -> None:
        """Makes the encoder; ``weight_dtype``, one of ``layers.WEIGHT_DTYPES``, is how its matrices are held.

        Raises:
          UserError: if the patches do not fill the image.
        """
        if config.image_size % config.patch_size:
            raise UserError(
                f"vision.image_size: expected a multiple of patch_size {config.patch_size}, found {config.image_size}"
            )
        self.config, self.family = config, FAMILIES[config.family]
        d, p = config.width, config.patch_size
        side = config.position_side or config.image_size // p
        self.patch = Linear(3 * p * p, d, bias=not self.family.norm_first, rngs=rngs)
        self.class_token = nnx.Param(jax.random.normal(rngs.params(), (d,)) * d**-0.5)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (1 + side**2, d)) * 0.02)
        self.norm = LayerNorm(d, epsilon=self.family.epsilon) if self.family.norm_first else None
        self.blocks = stack(lambda r: VisionBlock(config, weight_dtype, r), config.layers, rngs)

    def _positions(self) -> Float[Array, "N D"]:
        c, stored = self.config, self.position[...]
        side, wanted = c.position_side, c.image_size // c.patch_size
        if side is None or side == wanted:
            return stored
        matrix = interpolation(side, wanted)
        grid = stored[1:].reshape(side, side, -1)
        grid = jnp.einsum("ai,bj,ijd->abd", matrix, matrix, grid).reshape(wanted**2, -1)
        return jnp.concatenate([stored[:1], grid])

    def __call__(
        self,
        images: UInt8[Array, "B H W 3"],
        *,
        dtype: jnp.dtype,
        remat: str = "none",
        fit: str = "squash",
    ) -> Float[Array, "B patches D"]:
        """Encodes images of any size, made square as ``fit`` says; computes in ``dtype``."""
        c, p = self.config, self.config.patch_size
        pixels = preprocess(images, c.image_size, c.family, fit).astype(dtype)
        side = c.image_size // p
        patches = (
            pixels.reshape(-1, side, p, side, p, 3)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(-1, side**2, 3 * p * p)
        )
        x = self.patch(patches)
        first = jnp.broadcast_to(self.class_token[...].astype(dtype), (len(x), 1, c.width))
        x = jnp.concatenate([first, x], axis=1) + self._positions().astype(dtype)
        if self.norm is not None:
            x = self.norm(x)
        length = x.shape[1]
        if fused(x.dtype):
            x = jnp.pad(x, ((0, 0), (0, -length % MULTIPLE), (0, 0)))
        x, _ = scan(self.blocks, lambda block, x, _: (block(x, length), None), x, remat=remat)
        return x[:, 1:length]
