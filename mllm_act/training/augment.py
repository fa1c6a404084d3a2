"""Random changes of images in training, so that a policy does not rely on where a camera stands and on the light.

All steps of a window are changed alike, so that motion between frames stays; every window and camera is drawn anew.
Images keep their shape and dtype. Validation, evaluation and acting see images as they are.

* ``crop``: a window of this share of each side at a random place, resized (bilinear) to the whole image. OpenVLA
  (arXiv 2406.09246) keeps 90 % of the area and openpi 95 % of each side: 0.95 is both. Octo (arXiv 2405.12213) draws
  80 to 100 % of the area.
* ``color``: strength s of the changes of colour. Brightness moves by up to s of full scale; contrast (around middle
  grey) and saturation are multiplied by 1 - s to 1 + s; hue turns by up to s / 4 of a circle. With 0.2 these are the
  strengths of OpenVLA, and of Octo, whose hue turns twice as far; openpi has 0.3 to 0.5.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from mllm_act.batch import Images

# RGB to luma and two axes of chroma, in whose plane hue is an angle (YIQ, of NTSC).
_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Changes images at random; by default not at all.

    Attributes:
      crop: the share of each side that is kept, above 0; 1 for no crop.
      color: the strength of changes of colour, 0 to 1; 0 for none.
    """

    crop: float = 1.0
    color: float = 0.0

    def __call__(self, images: Images, key: PRNGKeyArray) -> Images:
        """Changes the images of every camera, uint8[B, T, H, W, 3]; without a change they are returned as they are."""
        if self.crop == 1 and self.color == 0:
            return images
        return {
            camera: self._camera(images[camera], jax.random.fold_in(key, number))
            for number, camera in enumerate(sorted(images))
        }

    def _camera(
        self, images: UInt8[Array, "B T H W 3"], key: PRNGKeyArray
    ) -> UInt8[Array, "B T H W 3"]:
        places, colors = jax.random.split(key)
        x = images.astype(jnp.float32) / 255
        if self.crop < 1:
            x = jax.vmap(self._cropped)(x, jax.random.uniform(places, (len(x), 2)))
        if self.color > 0:
            x = jax.vmap(self._colored)(x, jax.random.uniform(colors, (len(x), 4), minval=-1))
        return jnp.round(255 * jnp.clip(x, 0, 1)).astype(jnp.uint8)

    def _cropped(
        self, x: Float[Array, "T H W 3"], place: Float[Array, " 2"]
    ) -> Float[Array, "T H W 3"]:
        """Crops at ``place``, 0 to 1 from the top and from the left."""
        room = (1 - self.crop) * jnp.array(x.shape[1:3])
        scale = jnp.full(2, 1 / self.crop)
        return jax.image.scale_and_translate(
            x, x.shape, (1, 2), scale, -place * room * scale, method="linear", antialias=False
        )

    def _colored(
        self, x: Float[Array, "T H W 3"], draw: Float[Array, " 4"]
    ) -> Float[Array, "T H W 3"]:
        """Changes brightness, contrast, saturation and hue by ``draw``, -1 to 1 each: one linear map of RGB."""
        brightness, contrast, saturation = self.color * draw[:3]
        angle = self.color * draw[3] * np.pi / 2
        cos, sin = (1 + saturation) * jnp.cos(angle), (1 + saturation) * jnp.sin(angle)
        turn = jnp.eye(3).at[1:, 1:].set(jnp.array([[cos, -sin], [sin, cos]]))
        to_rgb = (1 + contrast) * np.linalg.inv(_YIQ) @ turn @ _YIQ
        return (x - 0.5) @ to_rgb.T + 0.5 + brightness
