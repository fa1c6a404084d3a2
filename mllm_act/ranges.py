"""The range of every number in a config, and the names that some keys choose from, in one table."""

import argparse
import dataclasses
import math
from collections.abc import Mapping

from ml_collections.config_dict import ConfigDict

from mllm_act.config import leaves
from mllm_act.errors import UserError
from mllm_act.models.vision import FITS
from mllm_act.normalization import NORMALIZATIONS

MAX = 2**31 - 1  # counts and sizes are int32 on the device


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; an ``open`` end does not belong to them. Infinity and NaN never do."""

    low: int | float
    high: int | float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) == math.inf:
            return False
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low}"
        if self.high == math.inf:
            return f"a finite number {'' if self.open_low else 'of '}{low}"
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several names."""

    names: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.names))}"


COUNT = Range(1, MAX)
WIDTH = Range(1, 2**16)  # of a layer; a matrix of this side takes 17 GB
CHUNK = Range(1, 4096)  # actions of a decision
BATCH = Range(1, 2**20)
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, open_high=True)

# Of the benchmarks' flags, by name.
FLAGS: Mapping[str, Range] = {
    "batch_size": BATCH,
    "context": COUNT,
    "prompt_tokens": COUNT,
    "tokens": COUNT,
    "episode": COUNT,
    "layers": COUNT,
    "steps": COUNT,
    "repeats": COUNT,
}

# By the name of a key, without the ``mixture.NAME.`` of an embodiment.
RANGES: Mapping[str, Range | Choice] = {
    "seed": Range(0, 2**32 - 1),
    "steps": Range(0, MAX),
    "epochs": Range(0, 10**6, open_low=True),
    "weight": POSITIVE,
    "chunk": CHUNK,
    "max_delay": Range(0, CHUNK.high),
    "normalization": Choice(("", *NORMALIZATIONS)),  # "": the tokenizer's
    "prompt_tokens": COUNT,
    "fit": Choice(FITS),
    "augment.crop": Range(0, 1, open_low=True),
    "augment.color": FRACTION,
    "log_every": COUNT,
    "validate_every": COUNT,
    "checkpoint_every": COUNT,
    "stall_minutes": POSITIVE,
    "validation_windows": COUNT,
    "validation_actions": COUNT,
    "data.batch_size": BATCH,
    "data.context": COUNT,
    "data.shuffle_megabytes": COUNT,
    "optimizer.learning_rate": NOT_NEGATIVE,
    "optimizer.warmup": FRACTION,
    "optimizer.b1": BELOW_ONE,
    "optimizer.b2": BELOW_ONE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.max_grad_norm": POSITIVE,
    "optimizer.schedule": Choice(("cosine", "linear", "constant", "warmup_stable_decay")),
    "optimizer.decay": FRACTION,
    "accumulate": COUNT,
    "ema": BELOW_ONE,
    "lora.rank": WIDTH,
    "lora.alpha": POSITIVE,
    "lora.dropout": BELOW_ONE,
    "adapter.bins": Range(2, MAX),
    "adapter.hidden": WIDTH,
    "tokenizer.chunk": CHUNK,
    "tokenizer.quantizers": Range(1, 1024),
    "tokenizer.codes": Range(2, 2**20),
    "tokenizer.width": WIDTH,
    "tokenizer.hidden": WIDTH,
    "tokenizer.layers": Range(1, 1024),
    "tokenizer.vocabulary": Range(2, 2**14),  # encoding makes a table of its square
    "tokenizer.scale": POSITIVE,
    # Of reinforcement learning.
    "context": COUNT,
    "env.stride": COUNT,
    "env.horizon": COUNT,
    "rollout.simulators": BATCH,
    "rollout.steps": Range(1, 2**16),
    "rollout.workers": Range(0, 2**12),
    "rollout.timeout": Range(0, 1e6, open_low=True),
    "ppo.epochs": COUNT,
    "ppo.minibatches": COUNT,
    "ppo.discount": FRACTION,
    "ppo.decay": FRACTION,
    "ppo.clip": POSITIVE,
    "ppo.value_loss": Choice(("none", "clipped", "replaced")),
    "ppo.value_clip": POSITIVE,
    "ppo.value_coefficient": NOT_NEGATIVE,
    "ppo.entropy_coefficient": NOT_NEGATIVE,
    "ppo.reward_scale": POSITIVE,
    "ppo.log_prob": Choice(("sum", "mean")),
    "ppo.target_kl": POSITIVE,
    "evaluate.every": Range(0, MAX),
    "evaluate.configurations": COUNT,
    "value.layers": Range(1, 64),
    "value.hidden": WIDTH,
    "optimizer.epsilon": POSITIVE,
    "quantizer.decay": BELOW_ONE,
    "quantizer.commitment": NOT_NEGATIVE,
    "quantizer.revive_below": FRACTION,
    "quantizer.initial_samples": COUNT,
}


def check_ranges(config: ConfigDict, ranges: Mapping[str, Range | Choice] = RANGES) -> None:
    """Checks every value of a config that has a range; None leaves a key open.

    Raises:
      UserError: naming the first key whose value is outside its range.
    """
    for key, value in leaves(config):
        parts = key.split(".")
        name = ".".join(parts[2:] if parts[0] == "mixture" else parts)
        if name in ranges and value is not None and value not in ranges[name]:
            raise UserError(f"config.{key}: expected {ranges[name]}, found {value!r}")


def check_flags(flags: argparse.Namespace) -> None:
    """Checks every flag of a benchmark that has a range.

    Raises:
      UserError: naming the first flag whose value is outside its range.
    """
    for name, value in vars(flags).items():
        if name in FLAGS and value is not None and value not in FLAGS[name]:
            raise UserError(f"--{name}: expected {FLAGS[name]}, found {value}")
