"""What the furniture looks like: boxes that are seen and touched, in each piece's two colours.

Every piece is drawn at its greatest height, front towards +x. A lower one stands deeper in the floor.
"""

from collections.abc import Callable, Sequence

from mllm_act.envs.fetch_pick.objects import FURNITURE
from mllm_act.envs.fetch_pick.rooms import SURFACES

MAIN, TRIM = "main", "trim"
DARK = (0.07, 0.08, 0.1)
BELOW = 0.5  # metres that legs and bodies go on below the floor

Numbers = Sequence[float]
Part = tuple[str | Numbers, Numbers, Numbers]  # main, trim or a colour; half sides; middle


def _column(color: str | Numbers, half_x: float, half_y: float, top: float, x: float, y: float) -> Part:  # fmt: skip
    """Returns a part that goes from below the floor to ``top``."""
    return color, (half_x, half_y, (top + BELOW) / 2), (x, y, (top - BELOW) / 2)


def _table(kind: str, thick: float) -> list[Part]:
    surface = SURFACES[kind]
    x, y, top = surface.half_x, surface.half_y, surface.heights[1]
    legs = [
        _column(TRIM, thick, thick, top - 0.04, a * (x - thick - 0.02), b * (y - thick - 0.02))
        for a in (-1, 1) for b in (-1, 1)
    ]  # fmt: skip
    rails: list[Part] = [
        (TRIM, (0.015, y - 0.06, 0.035), (a * (x - 0.06), 0, top - 0.075)) for a in (-1, 1)
    ]
    return [(MAIN, (x, y, 0.02), (0, 0, top - 0.02)), *legs, *rails]


def _cabinet(kind: str, doors: int, rows: int) -> list[Part]:
    """A closed body with doors or drawers and their handles."""
    surface = SURFACES[kind]
    x, y, top = surface.half_x, surface.half_y, surface.heights[1]
    parts = [
        _column(MAIN, x - 0.02, y - 0.01, top - 0.03, -0.02, 0),
        (TRIM, (x, y, 0.015), (0, 0, top - 0.015)),
    ]
    width, tall = (y - 0.02) / doors, (top - 0.12) / rows
    for column in range(doors):
        for row in range(rows):
            middle = -y + 0.02 + width * (2 * column + 1)
            z = 0.08 + tall * (row + 0.5)
            parts.append((MAIN, (0.008, width - 0.012, tall / 2 - 0.012), (x - 0.02, middle, z)))
            handle = (0.008, min(width * 0.4, 0.12), 0.008)
            parts.append((TRIM, handle, (x - 0.008, middle, z + tall * 0.28)))
    return parts


def _shelves(kind: str, boards: int) -> list[Part]:
    """An open piece with boards."""
    surface = SURFACES[kind]
    x, y, top = surface.half_x, surface.half_y, surface.heights[1]
    sides = [_column(MAIN, x, 0.015, top, 0, a * (y - 0.015)) for a in (-1, 1)]
    levels = [top - 0.015 - step * (top - 0.1) / (boards - 1) for step in range(boards)]
    return [
        *sides,
        *((MAIN, (x, y - 0.02, 0.015), (0, 0, z)) for z in levels),
        _column(TRIM, 0.01, y - 0.02, top - 0.02, -x + 0.01, 0),
    ]


def _bookcase() -> list[Part]:
    surface = SURFACES["bookcase"]
    top = surface.heights[1]
    colors = ((0.6, 0.2, 0.2), (0.2, 0.3, 0.5), (0.25, 0.45, 0.3), (0.75, 0.65, 0.4))
    books: list[Part] = [
        (colors[(3 * i) % 4], (0.09, 0.03, 0.09 + 0.015 * (i % 3)), (0.02, -0.4 + 0.075 * i, top - 0.29))
        for i in range(9)
    ]  # fmt: skip
    return [*_shelves("bookcase", 3), *books]


def _television() -> list[Part]:
    surface = SURFACES["TV stand"]
    x, top = surface.half_x, surface.heights[1]
    screen = top + 0.55
    return [
        *_shelves("TV stand", 2),
        (DARK, (0.02, 0.55, 0.32), (-x - 0.0, 0, screen)),
        (DARK, (0.02, 0.05, 0.15), (-x + 0.0, 0, top + 0.12)),
    ]


def _sofa() -> list[Part]:
    surface = SURFACES["sofa"]
    x, y, top = surface.half_x, surface.half_y, surface.heights[1]
    return [
        _column(TRIM, x, y - 0.18, top - 0.12, 0, 0),
        *((MAIN, (x - 0.1, y / 2 - 0.1, 0.06), (0.1, a * (y / 2 - 0.09), top - 0.06)) for a in (-1, 1)),
        _column(TRIM, 0.1, y, top + 0.38, -x + 0.1, 0),
        *((MAIN, (0.06, y / 2 - 0.11, 0.17), (-x + 0.24, a * (y / 2 - 0.09), top + 0.17)) for a in (-1, 1)),
        *(_column(TRIM, x, 0.1, top + 0.16, 0, a * (y - 0.1)) for a in (-1, 1)),
    ]  # fmt: skip


def _desk() -> list[Part]:
    surface = SURFACES["desk"]
    x, y, top = surface.half_x, surface.half_y, surface.heights[1]
    return [
        (MAIN, (x, y, 0.018), (0, 0, top - 0.018)),
        _column(TRIM, x - 0.03, 0.18, top - 0.036, -0.02, -y + 0.2),
        *((MAIN, (0.008, 0.16, 0.08), (x - 0.05, -y + 0.2, top - 0.14 - 0.2 * i)) for i in range(3)),
        _column(TRIM, 0.025, 0.025, top - 0.036, x - 0.05, y - 0.05),
        _column(TRIM, 0.025, 0.025, top - 0.036, -x + 0.05, y - 0.05),
        _column(TRIM, 0.01, y - 0.1, top - 0.3, -x + 0.03, 0),
    ]  # fmt: skip


MAKERS: dict[str, Callable[[], list[Part]]] = {
    "dining table": lambda: _table("dining table", 0.035),
    "coffee table": lambda: _table("coffee table", 0.03),
    "sideboard": lambda: _cabinet("sideboard", 3, 1),
    "counter": lambda: _cabinet("counter", 3, 2),
    "bookcase": _bookcase,
    "sofa": _sofa,
    "TV stand": _television,
    "desk": _desk,
}


def body(kind: str) -> str:
    """Returns a piece's body. The names of its geoms begin with the kind and, where it has one, the colour's name."""
    geoms = []
    for index, (color, half, at) in enumerate(MAKERS[kind]()):
        named = color if isinstance(color, str) else "fixed"
        rgb = (0.5, 0.5, 0.5) if isinstance(color, str) else color
        size, place, rgba = (" ".join(f"{v:.4g}" for v in values) for values in (half, at, rgb))
        geoms.append(
            f'<geom name="{kind}/{named}/{index}" type="box" size="{size}" pos="{place}" rgba="{rgba} 1" '
            f'contype="{FURNITURE}" conaffinity="0"/>'
        )
    return f'<body name="{kind}" mocap="true" pos="{5 * list(SURFACES).index(kind)} 0 -50">{"".join(geoms)}</body>'
