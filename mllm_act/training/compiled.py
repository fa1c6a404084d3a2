"""The collectives of a compiled program: kind, mesh axes, bytes and how often they run, read from XLA's text."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
ARRAY = re.compile(r"(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|\w+_computation|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective puts out on each device.

    Attributes:
      kind: one of ``KINDS``.
      axes: those of the mesh along which devices exchange something; none where all data stays on its device.
      devices: how many take part together.
      shape: of the array, on one device.
      dtype: in XLA's notation.
      scope: JAX's name of the operation, where the compiler kept it.
      times: how often the program runs it; of a loop whose length the compiler does not know, once.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    shape: tuple[int, ...]
    dtype: str
    scope: str
    times: int

    @property
    def bytes(self) -> int:
        """Of the array, on one device."""
        return array_bytes(self.dtype, ",".join(map(str, self.shape)))

    @property
    def sent(self) -> float:
        """The bytes that one device sends in one run, in a ring: the least that is possible."""
        n = self.devices
        if self.kind == "all-reduce":
            return 2 * self.bytes * (n - 1) / n
        if self.kind == "reduce-scatter":  # the array is a part of what was reduced
            return self.bytes * (n - 1)
        return self.bytes * (n - 1) / n if self.kind != "collective-permute" else self.bytes


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Reads the collectives of a compiled program.

    Args:
      text: ``jax.stages.Compiled.as_text()``.
      mesh: the one that it was compiled for, whose devices are in XLA's order.
    """
    times = run_counts(text)
    found, seen = [], set()
    for computation, line in lines(text):
        head = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if head is None or times[computation] == 0:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        if channel and channel[1] in seen:  # TPUs split one into parts that run beside products
            continue
        seen.add(channel[1] if channel else line)
        scope = re.search(r'op_name="([^"]*)"', line)
        groups = _groups(line, mesh.size)
        for dtype, shape in _outputs(head[1], head[2], bool(head[3])):
            found.append(
                Collective(
                    head[2],
                    _axes(groups, mesh),
                    max(map(len, groups)),
                    shape,
                    dtype,
                    scope[1] if scope else "",
                    times[computation],
                )
            )
    return found


def array_bytes(dtype: str, shape: str) -> int:
    """Returns the bytes of an array in XLA's notation, such as ``bf16`` and ``32,80,4096``."""
    bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(re.sub(r"\D", "", dtype))
    return math.prod(_numbers(shape)) * max(1, bits // 8)


def lines(text: str) -> Iterator[tuple[str, str]]:
    """Yields the lines of a program, each with the name of its computation."""
    computation = ""
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?(%[\w.\-]+) ", line)
        if head and line.endswith("{"):
            computation = head[1]
        elif line.startswith(" "):
            yield computation, line


def run_counts(text: str) -> Mapping[str, int]:
    """Returns how often each computation runs. XLA writes a computation before those that call it.

    A loop's length is what XLA says of it, else the constant that its condition compares the counter with.
    """
    calls: dict[str, list[tuple[str, int]]] = {}
    limits: dict[str, list[int]] = {}
    for computation, line in lines(text):
        calls.setdefault(computation, [])
        if constant := re.search(r"= s32\[\]\S* constant\((\d+)\)", line):
            limits.setdefault(computation, []).append(int(constant[1]))
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        condition = re.search(r"condition=(%[\w.\-]+)", line)
        for names in CALLED.findall(line):
            for name in names.split(", "):
                count = 1
                if f"body={name}" in line and condition:
                    limit = limits.get(condition[1], [])
                    count = int(known[1]) if known else limit[0] if len(limit) == 1 else 1
                calls[computation].append((name, count))
    entry = re.search(r"^ENTRY (%[\w.\-]+) ", text, re.MULTILINE)
    assert entry, "a program has an entry"
    times = dict.fromkeys(calls, 0) | {entry[1]: 1}
    for computation in reversed(calls):
        for name, count in calls[computation]:
            if name in times:
                times[name] += times[computation] * count
    return times


def _outputs(types: str, kind: str, asynchronous: bool) -> list[tuple[str, tuple[int, ...]]]:
    arrays = [(dtype, tuple(_numbers(shape))) for dtype, shape in ARRAY.findall(types)]
    if not asynchronous or kind == "all-reduce":
        return arrays
    # The start of an asynchronous one puts out its operands, its results, and sometimes its state.
    return arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]


def _axes(groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    sizes = tuple(mesh.shape.values())
    places = [np.stack(np.unravel_index(group, sizes)) for group in groups]
    differ = [any((place[i] != place[i][0]).any() for place in places) for i in range(len(sizes))]
    return tuple(itertools.compress(mesh.axis_names, differ))


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _groups(line: str, devices: int) -> list[list[int]]:
    """Returns the devices that exchange data with each other, from any of XLA's notations."""
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    mesh = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line
    )  # fmt: skip
    if mesh:
        return _groups_of_mesh(mesh[1], mesh[2], mesh[3], mesh[4])
    plain = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line)
    if plain:
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", plain[1])]
    return [list(range(devices))]


def _groups_of_mesh(
    axes: str, shape: str | None, permutation: str | None, used: str
) -> list[list[int]]:
    """``'a'=2,'b'=4``, devices in some order, ``'b'`` or a part of it, ``'b':(1)2``: the groups along what is used."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    parts: dict[str, tuple[int, int]] = {}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used):
        parts[name] = (int(before), int(size)) if before else (1, sizes[name])
    dims: list[int] = []
    chosen = []
    for name, size in sizes.items():
        before, taken = parts.get(name, (1, 1))
        chosen.append(len(dims) + 1)
        dims += [before, taken, size // before // taken]
    ids = _iota(shape, permutation) if shape else np.arange(math.prod(sizes.values()))
    together = np.moveaxis(ids.reshape(dims), chosen, range(-len(chosen), 0))
    return together.reshape(-1, math.prod(taken for _, taken in parts.values())).tolist()
