"""What the 33 classes of objects look like: a few coloured shapes each, in metres, standing on z = 0.

They are larger than real ones (`SCALE`), so that they can be told apart in small images. Long ones lie along x.
"""

import math
from collections.abc import Sequence

from mllm_act.envs.language_rearrangement.entities import OBJECTS

Numbers = Sequence[float]
SCALE = 1.2

WHITE, BLACK, GRAY, STEEL = (
    (0.93, 0.93, 0.9),
    (0.08, 0.08, 0.09),
    (0.45, 0.46, 0.48),
    (0.72, 0.74, 0.77),
)
RED, GREEN, BLUE, YELLOW = (
    (0.8, 0.08, 0.07),
    (0.13, 0.55, 0.16),
    (0.1, 0.25, 0.75),
    (0.95, 0.8, 0.1),
)
ORANGE, BROWN, WOOD, PURPLE = (
    (0.95, 0.45, 0.05),
    (0.33, 0.18, 0.08),
    (0.8, 0.6, 0.38),
    (0.32, 0.08, 0.32),
)


def _text(values: Numbers) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def geom(
    kind: str,
    size: Numbers,
    color: Numbers,
    at: Numbers = (0, 0, 0),
    turn: Numbers = (0, 0, 0),
    scale: float = SCALE,
) -> str:
    """Returns a MuJoCo geom.

    Args:
      kind: box, sphere, ellipsoid, cylinder or capsule.
      size: MuJoCo's: half sides, radii, or radius and half length (along z).
      color: red, green, blue, 0 to 1.
      at: its middle.
      turn: about x, y and z, in degrees.
      scale: of size and middle.
    """
    size, at = [scale * value for value in size], [scale * value for value in at]
    return (
        f'<geom type="{kind}" size="{_text(size)}" rgba="{_text(color)} 1" pos="{_text(at)}" '
        f'euler="{_text(turn)}"/>'
    )


def rod(start: Numbers, end: Numbers, radius: float, color: Numbers) -> str:
    """Returns a capsule from one point to another."""
    ends = [SCALE * value for value in (*start, *end)]
    return (
        f'<geom type="capsule" fromto="{_text(ends)}" size="{SCALE * radius:.4g}" '
        f'rgba="{_text(color)} 1"/>'
    )


def turned(name: str, color: Numbers) -> str:
    """Returns a solid of revolution, one of `PROFILES`."""
    return f'<geom type="mesh" mesh="{name}" rgba="{_text(color)} 1"/>'


# Solids of revolution: (radius, height) along the outline, outside upwards and inside downwards.
PROFILES: dict[str, list[tuple[float, float]]] = {
    "bowl": [
        (0, 0.004),
        (0.045, 0),
        (0.075, 0.025),
        (0.098, 0.07),
        (0.09, 0.072),
        (0.066, 0.03),
        (0, 0.016),
    ],
    "cup": [(0, 0), (0.036, 0), (0.05, 0.115), (0.046, 0.115), (0.033, 0.01), (0, 0.01)],
    "mug": [(0, 0), (0.048, 0), (0.05, 0.1), (0.044, 0.1), (0.042, 0.012), (0, 0.012)],
    "plate": [(0, 0), (0.07, 0), (0.125, 0.02), (0.124, 0.025), (0.072, 0.009), (0, 0.008)],
    "lid": [(0, 0), (0.12, 0), (0.12, 0.012), (0.09, 0.032), (0.03, 0.044), (0, 0.046)],
    "bottle": [
        (0, 0),
        (0.05, 0),
        (0.052, 0.15),
        (0.045, 0.19),
        (0.02, 0.215),
        (0.02, 0.235),
        (0, 0.235),
    ],
    "pear": [
        (0, 0),
        (0.03, 0.004),
        (0.052, 0.04),
        (0.042, 0.08),
        (0.024, 0.115),
        (0.012, 0.132),
        (0, 0.134),
    ],
    "strawberry": [(0, 0), (0.012, 0.008), (0.034, 0.05), (0.026, 0.066), (0, 0.068)],
}
SIDES = 14


def meshes() -> str:
    """Returns the assets of the solids of revolution."""
    assets = []
    for name, profile in PROFILES.items():
        points, faces = [], []
        for ring, (radius, height) in enumerate(profile):
            for side in range(SIDES):
                angle = 2 * math.pi * side / SIDES
                x, y = radius * math.cos(angle), radius * math.sin(angle)
                points += [SCALE * x, SCALE * y, SCALE * height]
                if ring:
                    a, b = (ring - 1) * SIDES + side, (ring - 1) * SIDES + (side + 1) % SIDES
                    c, d = a + SIDES, b + SIDES
                    if profile[ring - 1][0] > 0:
                        faces += [a, b, c] if radius == 0 else [a, b, d]
                    if radius > 0:
                        faces += [a, d, c]
        assets.append(
            f'<mesh name="{name}" vertex="{_text(points)}" face="{" ".join(map(str, faces))}" inertia="shell"/>'
        )
    return "".join(assets)


def _stickers() -> list[str]:
    """Returns the coloured faces of a Rubik's cube of side 0.09."""
    colors = {"z": WHITE, "x": RED, "-x": ORANGE, "y": BLUE, "-y": GREEN}
    geoms: list[str] = []
    for face, color in colors.items():
        sign = -1 if face[0] == "-" else 1
        for a in (-0.029, 0, 0.029):
            for b in (-0.029, 0, 0.029):
                # Some stickers are of other colours: the cube is not solved.
                turn = round(a / 0.029) + 3 * round(b / 0.029) + 4 * len(geoms)
                mixed = list(colors.values())[turn % 5] if a * b else color
                half = {
                    "z": (0.0125, 0.0125, 0.001),
                    "x": (0.001, 0.0125, 0.0125),
                    "y": (0.0125, 0.001, 0.0125),
                }
                at = {
                    "z": (a, b, 0.09),
                    "x": (sign * 0.045, a, 0.045 + b),
                    "y": (a, sign * 0.045, 0.045 + b),
                }
                geoms.append(geom("box", half[face[-1]], mixed, at[face[-1]]))
    return geoms


def _banana() -> list[str]:
    points = [
        (0.11 * math.sin(t), 0.11 * (1 - math.cos(t)) - 0.03, 0.02)
        for t in (-0.9, -0.45, 0, 0.45, 0.9)
    ]
    radii = (0.014, 0.02, 0.02, 0.014)
    parts = [rod(a, b, r, YELLOW) for a, b, r in zip(points, points[1:], radii, strict=False)]
    return [
        *parts,
        geom("sphere", (0.011,), BROWN, points[0]),
        geom("sphere", (0.013,), BROWN, points[-1]),
    ]


def _fruit(radius: float, color: Numbers, leaf: Numbers | None) -> list[str]:
    parts = [
        geom("sphere", (radius,), color, (0, 0, radius)),
        rod((0, 0, 2 * radius - 0.006), (0.006, 0, 2 * radius + 0.016), 0.004, BROWN),
    ]
    if leaf is not None:
        parts.append(
            geom(
                "ellipsoid", (0.022, 0.011, 0.003), leaf, (0.02, 0, 2 * radius + 0.008), (0, -20, 0)
            )
        )
    return parts


SHAPES: dict[str, list[str]] = {
    "ball": [
        geom("sphere", (0.05,), (0.75, 0.9, 0.15), (0, 0, 0.05)),
        geom("cylinder", (0.0508, 0.004), WHITE, (0, 0, 0.05), (40, 30, 0)),
    ],
    "clamp": [
        geom("box", (0.1, 0.012, 0.012), BLACK, (0, 0.0, 0.012)),
        geom("box", (0.012, 0.05, 0.014), ORANGE, (-0.09, 0.05, 0.014)),
        geom("box", (0.012, 0.05, 0.014), ORANGE, (0.04, 0.05, 0.014)),
        rod((0.05, 0.085, 0.016), (0.12, 0.085, 0.016), 0.012, BLACK),
    ],
    "hammer": [
        rod((-0.13, 0, 0.016), (0.09, 0, 0.016), 0.014, WOOD),
        geom("box", (0.024, 0.06, 0.024), GRAY, (0.1, 0, 0.024)),
        geom("cylinder", (0.03, 0.012), GRAY, (0.1, 0.065, 0.026), (90, 0, 0)),
    ],
    "screwdriver": [
        rod((-0.11, 0, 0.022), (-0.01, 0, 0.022), 0.02, RED),
        geom("cylinder", (0.0215, 0.015), BLACK, (-0.05, 0, 0.022), (0, 90, 0)),
        rod((0.01, 0, 0.022), (0.14, 0, 0.022), 0.006, STEEL),
    ],
    "padlock": [
        geom("box", (0.036, 0.018, 0.03), (0.85, 0.62, 0.18), (0, 0, 0.03)),
        rod((-0.022, 0, 0.06), (-0.022, 0, 0.088), 0.007, STEEL),
        rod((0.022, 0, 0.06), (0.022, 0, 0.088), 0.007, STEEL),
        rod((-0.022, 0, 0.09), (0.022, 0, 0.09), 0.007, STEEL),
        geom("cylinder", (0.008, 0.019), BLACK, (0, 0, 0.03), (90, 0, 0)),
    ],
    "scissors": [
        geom("box", (0.075, 0.009, 0.004), STEEL, (0.06, 0, 0.012), (0, 0, 12)),
        geom("box", (0.075, 0.009, 0.004), STEEL, (0.06, 0, 0.008), (0, 0, -12)),
        *(
            rod((-0.04 + 0.03 * math.cos(t), s * 0.035 + 0.024 * math.sin(t), 0.011),
                (-0.04 + 0.03 * math.cos(t + 1.05), s * 0.035 + 0.024 * math.sin(t + 1.05), 0.011), 0.008, RED)
            for s in (-1, 1) for t in (0, 1.05, 2.1, 3.14, 4.19, 5.24)
        ),
    ],
    "block": [
        geom("box", (0.04, 0.04, 0.075), WOOD, (0, 0, 0.075)),
        geom("box", (0.0405, 0.0405, 0.004), BROWN, (0, 0, 0.03)),
        geom("box", (0.0405, 0.0405, 0.004), BROWN, (0, 0, 0.12)),
    ],
    "drill": [
        geom("cylinder", (0.032, 0.075), YELLOW, (0, 0, 0.165), (0, 90, 0)),
        geom("cylinder", (0.02, 0.03), BLACK, (0.1, 0, 0.165), (0, 90, 0)),
        rod((0.12, 0, 0.165), (0.17, 0, 0.165), 0.006, STEEL),
        geom("box", (0.022, 0.02, 0.055), YELLOW, (-0.045, 0, 0.09), (0, 12, 0)),
        geom("box", (0.05, 0.03, 0.022), BLACK, (-0.05, 0, 0.022)),
    ],
    "spatula": [
        rod((-0.16, 0, 0.02), (0.04, 0, 0.02), 0.01, BLACK),
        geom("box", (0.055, 0.042, 0.005), (0.3, 0.3, 0.32), (0.1, 0, 0.014), (0, 8, 0)),
        *(geom("box", (0.035, 0.005, 0.0056), WOOD, (0.1, y, 0.0145), (0, 8, 0)) for y in (-0.02, 0, 0.02)),
    ],
    "knife": [
        geom("box", (0.05, 0.012, 0.01), BLACK, (-0.1, 0, 0.01)),
        geom("box", (0.07, 0.016, 0.004), STEEL, (0.02, 0, 0.01)),
        geom("box", (0.04, 0.01, 0.004), STEEL, (0.105, -0.003, 0.01), (0, 0, -8)),
    ],
    "spoon": [
        rod((-0.13, 0, 0.009), (0.05, 0, 0.009), 0.007, STEEL),
        geom("ellipsoid", (0.042, 0.028, 0.012), STEEL, (0.085, 0, 0.012)),
        geom("ellipsoid", (0.032, 0.02, 0.005), GRAY, (0.086, 0, 0.0215)),
    ],
    "plate": [turned("plate", WHITE), geom("cylinder", (0.072, 0.001), (0.3, 0.45, 0.8), (0, 0, 0.0095))],
    "sponge": [
        geom("box", (0.06, 0.038, 0.016), YELLOW, (0, 0, 0.016)),
        geom("box", (0.06, 0.038, 0.006), GREEN, (0, 0, 0.038)),
    ],
    "cleanser": [
        turned("bottle", WHITE),
        geom("cylinder", (0.0535, 0.04), BLUE, (0, 0, 0.085)),
        geom("cylinder", (0.022, 0.016), RED, (0, 0, 0.245)),
    ],
    "plum": _fruit(0.04, PURPLE, None),
    "pear": [turned("pear", (0.65, 0.75, 0.2)), rod((0, 0, 0.13), (0.008, 0, 0.155), 0.004, BROWN)],
    "peach": _fruit(0.045, (0.98, 0.6, 0.42), GREEN),
    "apple": _fruit(0.05, (0.72, 0.05, 0.08), GREEN),
    "lemon": [
        geom("ellipsoid", (0.052, 0.038, 0.038), (1.0, 0.88, 0.1), (0, 0, 0.038)),
        geom("sphere", (0.012,), (0.9, 0.8, 0.1), (0.052, 0, 0.038)),
        geom("sphere", (0.012,), (0.9, 0.8, 0.1), (-0.052, 0, 0.038)),
    ],
    "can": [
        geom("cylinder", (0.042, 0.06), STEEL, (0, 0, 0.06)),
        geom("cylinder", (0.0425, 0.025), RED, (0, 0, 0.088)),
        geom("cylinder", (0.0425, 0.025), WHITE, (0, 0, 0.034)),
    ],
    "box": [
        geom("box", (0.075, 0.03, 0.11), RED, (0, 0, 0.11)),
        geom("box", (0.0755, 0.0305, 0.03), YELLOW, (0, 0, 0.13)),
        geom("box", (0.0755, 0.0305, 0.01), BLUE, (0, 0, 0.05)),
    ],
    "banana": _banana(),
    "strawberry": [
        turned("strawberry", (0.9, 0.06, 0.1)),
        geom("cylinder", (0.026, 0.004), GREEN, (0, 0, 0.068)),
        rod((0, 0, 0.07), (0, 0, 0.086), 0.004, GREEN),
    ],
    "lego": [
        geom("box", (0.06, 0.03, 0.024), BLUE, (0, 0, 0.024)),
        *(geom("cylinder", (0.01, 0.006), BLUE, (x, y, 0.054)) for x in (-0.045, -0.015, 0.015, 0.045)
          for y in (-0.015, 0.015)),
    ],
    "cube": [geom("box", (0.045, 0.045, 0.045), BLACK, (0, 0, 0.045)), *_stickers()],
    "book": [
        geom("box", (0.1, 0.075, 0.004), (0.1, 0.35, 0.35), (0, 0, 0.004)),
        geom("box", (0.096, 0.072, 0.012), WHITE, (0.002, 0, 0.018)),
        geom("box", (0.1, 0.075, 0.004), (0.1, 0.35, 0.35), (0, 0, 0.032)),
        geom("box", (0.004, 0.075, 0.016), (0.07, 0.25, 0.25), (-0.1, 0, 0.018)),
        geom("box", (0.06, 0.012, 0.001), YELLOW, (0, 0.02, 0.0365)),
    ],
    "bowl": [turned("bowl", (0.9, 0.35, 0.1))],
    "cup": [turned("cup", (0.1, 0.6, 0.65))],
    "mug": [
        turned("mug", (0.75, 0.1, 0.1)),
        geom("cylinder", (0.043, 0.002), BROWN, (0, 0, 0.085)),
        rod((0.05, 0, 0.084), (0.088, 0, 0.08), 0.009, (0.75, 0.1, 0.1)),
        rod((0.088, 0, 0.08), (0.088, 0, 0.034), 0.009, (0.75, 0.1, 0.1)),
        rod((0.088, 0, 0.034), (0.05, 0, 0.022), 0.009, (0.75, 0.1, 0.1)),
    ],
    "orange": _fruit(0.055, (1.0, 0.5, 0.0), None),
    "lid": [
        turned("lid", (0.6, 0.65, 0.7)),
        geom("cylinder", (0.012, 0.01), BLACK, (0, 0, 0.055)),
        geom("ellipsoid", (0.028, 0.028, 0.012), BLACK, (0, 0, 0.074)),
    ],
    "toy": [
        rod((-0.08, 0, 0.045), (0.07, 0, 0.045), 0.024, YELLOW),
        geom("box", (0.028, 0.13, 0.006), RED, (0.02, 0, 0.05)),
        geom("box", (0.018, 0.05, 0.005), RED, (-0.09, 0, 0.055)),
        geom("box", (0.018, 0.004, 0.026), BLUE, (-0.09, 0, 0.085)),
        geom("box", (0.004, 0.04, 0.006), BLACK, (0.098, 0, 0.045), (25, 0, 0)),
        geom("sphere", (0.018,), BLACK, (0.04, 0, 0.0), ),
    ],
    "wrench": [
        geom("box", (0.1, 0.014, 0.008), STEEL, (-0.02, 0, 0.008)),
        geom("box", (0.026, 0.03, 0.01), STEEL, (0.085, 0, 0.01)),
        geom("box", (0.022, 0.009, 0.011), STEEL, (0.125, 0.023, 0.011), (0, 0, 10)),
        geom("box", (0.022, 0.009, 0.011), STEEL, (0.125, -0.023, 0.011), (0, 0, -10)),
        geom("cylinder", (0.018, 0.0085), GRAY, (-0.12, 0, 0.008)),
    ],
}  # fmt: skip
assert set(SHAPES) == set(OBJECTS)
