"""A prediction of step time: what a program computes, reads and sends, against what the chip can do.

Read from the program that XLA compiled, loops multiplied out. An operation, which may be many fused ones, takes what
its matrix products take at the chip's peak, or what reading and writing its arrays takes, whichever is longer (the
roofline of Williams et al. 2009). Operations follow each other; collectives, each in a ring, run beside them. So the
step takes the longer of both sums. Latencies, and products too small for the chip's units, are not counted: a real
step takes longer. Nothing here was measured.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from mllm_act.training.chips import Chip
from mllm_act.training.compiled import ARRAY, Collective, array_bytes, lines, run_counts

PASSED_ON = (
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "copy-done",
)


INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?(%[\w.\-]+) = (\(.*?\)(?= [a-z])|\S+) ([\w\-]+)\((.*?)\)(?:,|$)"
)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one step on one chip.

    Attributes:
      operations: of its matrix products and convolutions, recomputation included, two for a multiply-add.
      traffic: bytes read and written in memory.
      sent: bytes sent to other chips.
      computing: seconds of all operations, one after another.
      sending: seconds of all collectives, one after another.
    """

    operations: float
    traffic: float
    sent: float
    computing: float
    sending: float

    @property
    def step(self) -> float:
        """Seconds."""
        return max(self.computing, self.sending)


def predict(text: str, collectives: Sequence[Collective], chip: Chip) -> Prediction:
    """Predicts a step of a program compiled for TPUs.

    Args:
      text: the compiled program.
      collectives: of it.
      chip: the target.
    """
    sent = sum(c.sent * c.times for c in collectives if c.axes)
    parts = list(_operations(text))
    return Prediction(
        sum(operations * times for operations, _, times in parts),
        sum(size * times for _, size, times in parts),
        sent,
        sum(
            max(operations / chip.flops, size / chip.bandwidth) * times
            for operations, size, times in parts
        ),
        sent / chip.interconnect,
    )


def _operations(text: str) -> Iterator[tuple[float, float, int]]:
    """Yields the operations of matrix products, the bytes, and the number of runs of each step of a program.

    Of an argument that a fused operation only slices, the slices count; of one that it updates in place, nothing; nor
    do arrays that the compiler keeps in on-chip memory.
    """
    times = run_counts(text)
    fused = set(re.findall(r" fusion\(.*?calls=(%[\w.\-]+)", text))
    sliced = _sliced(text, fused)
    updating = _containing(text, ("dynamic-update-slice(", "all-gather(", "async"), fused)
    sizes: dict[tuple[str, str], list[float]] = {}
    shapes: dict[tuple[str, str], list[int]] = {}
    products: Counter[str] = Counter()  # operations of one run of a computation
    for computation, line in lines(text):
        head = INSTRUCTION.match(line)
        if head is None:
            continue
        name, kind, operation, arguments = head.groups()
        names = re.findall(r"%[\w.\-]+", arguments)
        written = sizes[computation, name] = _sizes(kind)
        shapes[computation, name] = _shape(kind)
        called = re.search(r"calls=(%[\w.\-]+)", line)
        own = products[called[1]] if called else 0
        if operation == "convolution":
            own = _convolution(line, shapes[computation, name], shapes[computation, names[1]])
        products[computation] += own
        if computation in fused or operation in PASSED_ON or not times.get(computation):
            continue
        read: list[float] = []
        for i, argument in enumerate(names):
            part = sliced.get((called[1], i)) if called else None
            whole = sizes.get((computation, argument), [])
            read += whole if part is None else [min(part, sum(whole))]
        if operation == "dynamic-slice":
            read = list(written)
        if operation == "dynamic-update-slice" or (called and called[1] in updating):
            written, read = _less_shared(written, read)
        yield float(own), sum(read) + sum(written), times[computation]


def _convolution(line: str, output: list[int], kernel: list[int]) -> int:
    """Returns the operations of a convolution, which is what TPUs make of every product of matrices.

    A batch of products is one over a window whose dilation leaves a single number of the input in it.
    """
    labels = re.search(r"dim_labels=\w+_(\w+)->", line)
    window = re.search(r"window=\{size=([\dx]+)(.*?)\}", line)
    assert labels, line
    taps = 1
    if window:
        dilation = re.search(r"lhs_dilate=([\dx]+)", window[2])
        dilations = dilation[1].split("x") if dilation else ["1"] * len(window[1].split("x"))
        for size, dilated in zip(window[1].split("x"), dilations, strict=True):
            taps *= int(size) if dilated == "1" else 1
    return 2 * math.prod(output) * kernel[labels[1].index("i")] * taps


def _shape(kind: str) -> list[int]:
    array = ARRAY.search(kind)
    return [int(n) for n in array[2].split(",") if n] if array else []


def _sizes(types: str) -> list[float]:
    """Returns the bytes of the arrays of a type that are in the main memory, which is space 0."""
    found = re.findall(rf"{ARRAY.pattern}(\{{[^}}]*\}})?", types)
    return [
        float(array_bytes(dtype, shape)) for dtype, shape, layout in found if "S(" not in layout
    ]


def _less_shared(written: list[float], read: list[float]) -> tuple[list[float], list[float]]:
    """Takes out what is both read and written at the same size: it stays in place."""
    left = list(read)
    kept = []
    for size in written:
        if size in left:
            left.remove(size)
        else:
            kept.append(size)
    return kept, left


def _containing(text: str, marks: Sequence[str], fused: set[str]) -> set[str]:
    """Returns the fused computations that have one of the operations, in themselves or in those they call."""
    found: set[str] = set()
    for computation, line in lines(text):
        if computation in fused:
            called = re.search(r"calls=(%[\w.\-]+)", line)
            if any(mark in line for mark in marks) or (called and called[1] in found):
                found.add(computation)
    return found


def _sliced(text: str, fused: set[str]) -> dict[tuple[str, int], float]:
    """Returns, for the arguments of fused computations that are only sliced, the bytes of the slices."""
    numbers: dict[tuple[str, str], int] = {}
    result: dict[tuple[str, int], float] = {}
    whole: set[tuple[str, int]] = set()  # arguments that are read otherwise
    for computation, line in lines(text):
        head = INSTRUCTION.match(line)
        if computation not in fused or head is None:
            continue
        name, kind, operation, arguments = head.groups()
        if operation == "parameter":
            numbers[computation, name] = int(arguments)
            continue
        called = re.search(r"calls=(%[\w.\-]+)", line)
        for i, argument in enumerate(re.findall(r"%[\w.\-]+", arguments)):
            number = numbers.get((computation, argument))
            if number is None:
                continue
            part = result.get((called[1], i)) if called and (called[1], i) not in whole else None
            if operation == "dynamic-slice" and i == 0:
                part = sum(_sizes(kind))
            if part is None:
                whole.add((computation, number))
            else:
                result[computation, number] = result.get((computation, number), 0.0) + part
    return {key: size for key, size in result.items() if key not in whole}
