"""What accelerators can do, as their makers publish it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Per chip (a device of JAX).

    Attributes:
      flops: dense operations a second in bfloat16.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      interconnect: bytes a second that a chip sends to its neighbours along one axis of the network, both directions.
    """

    flops: float
    memory: float
    bandwidth: float
    interconnect: float


# TPUs: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e, "key chip specifications". The published bidirectional
# interconnect (400, 1,200 and 800 GB/s) is of all links, sent and received: a half of it is sent, over 2, 3 and 2 axes.
# GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM, without sparsity; NVLink sends 450 GB/s.
CHIPS = {
    "TPU v5 lite": Chip(197e12, 16e9, 819e9, 100e9),
    "TPU v5": Chip(459e12, 95 * 2.0**30, 2765e9, 200e9),
    "TPU v6 lite": Chip(918e12, 32e9, 1638e9, 200e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 450e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 450e9),
}


def named(kind: str) -> Chip | None:
    """Returns the chip of a ``jax.Device.device_kind``, or None where it is not in the table (CPUs are not)."""
    return CHIPS.get(kind)
