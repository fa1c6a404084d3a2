"""The embodiments of a training run: everything the config names for each of them is opened and checked first.

A config of one environment describes one embodiment. ``config.mixture`` describes several by the names of their
environments, each with the keys that a config of that environment has for itself, and a weight.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections.config_dict import ConfigDict

from data_pipelines.reading import mixture, rlds
from data_pipelines.reading.pipeline import EvalBatches, TrainBatches
from data_pipelines.reading.statistics import dataset_statistics
from mllm_act import normalization
from mllm_act.action_tokenizer.checkpoint import LoadedTokenizer, load_tokenizer, tokenizer_arrays
from mllm_act.adapters import ADAPTERS, adapter_class
from mllm_act.adapters.base import Adapter, RunFacts
from mllm_act.batch import Batch, Observation, check_batch
from mllm_act.errors import UserError
from mllm_act.models.mllm import MLLMConfig
from mllm_act.normalization import Statistics
from mllm_act.policy.network import EmbodimentConfig, build_adapter, longest_prompt
from mllm_act.policy.prompt import Prompt, fill, pad, readable
from mllm_act.training.processes import processes

# Keys of a config that belong to its embodiment, besides ``data.directory`` and ``data.context``.
KEYS = (
    "adapter", "chunk", "max_delay", "tokenizer", "normalization", "actions", "prompt_template", "prompt_tokens",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """What the config names for one embodiment, opened.

    Attributes:
      key: the path of its part of the config, for errors.
      config: that part.
      weight: its share of every batch, relative to the other embodiments.
      dataset: its demonstrations.
      statistics: of the demonstrations; where there is a tokenizer, actions are normalised as in its training.
      tokenizer: of stage one, where the adapter needs one.
      actions: the names of discrete actions; none for continuous ones.
    """

    key: str
    config: ConfigDict
    weight: float
    dataset: rlds.Dataset
    statistics: Statistics
    tokenizer: LoadedTokenizer | None
    actions: tuple[str, ...]

    @property
    def windows(self) -> float:
        """The windows of an epoch: the mean over the random offsets at which episodes are cut."""
        context, statistics = self.config.data.context, self.statistics
        return (statistics.num_steps + statistics.num_segments * (context - 1)) / context

    @property
    def mostly_padding(self) -> bool:
        """Whether less than half of the steps of a window exist, as with episodes shorter than the context."""
        return self.statistics.num_steps < 0.5 * self.windows * self.config.data.context


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """One robot of a training run.

    Attributes:
      name: of its environment.
      source: what the config names, opened.
      share: its windows in every batch, over all processes; the same on any mesh.
      rows: ``share`` and the padding after it, so that the devices split a batch into equal parts.
      part: which part of a batch this process reads, and how many parts there are.
      config: its part of the network's config.
      adapter: its adapter, abstract: sizes without parameters.
      prompt: turns its instructions into tokens.
    """

    name: str
    source: Source
    share: int
    rows: int
    part: tuple[int, int]
    config: EmbodimentConfig
    adapter: Adapter
    prompt: Prompt

    def train_batches(self, seed: int, shuffle_megabytes: int) -> TrainBatches:
        """Returns this process's share of the training batches, without end."""
        return TrainBatches(
            self.source.dataset,
            "train",
            batch_size=self.share,
            seed=seed,
            shuffle_megabytes=shuffle_megabytes,
            **self._windows,
        )

    def validation_batches(self, windows: int) -> EvalBatches:
        """Returns this process's share of the held-out windows, the same in every pass."""
        rows = self.rows // self.part[1]
        return EvalBatches(
            self.source.dataset, "val", batch_size=rows, windows=windows, **self._windows
        )

    @property
    def _windows(self) -> dict[str, Any]:
        return {
            "packed": self.source.mostly_padding,
            "context": self.config.context,
            "chunk": self.config.chunk,
            "process_index": self.part[0],
            "process_count": self.part[1],
        }

    def to_batch(self, arrays: Mapping[str, Any]) -> Batch:
        """Turns what the pipeline reads into a ``Batch`` of numpy arrays, with this process's part of ``rows`` rows."""
        missing = self.rows // self.part[1] - len(arrays["mask"])
        images = arrays["images"]
        if not self.source.mostly_padding:  # else they are packed
            images = jax.tree.map(lambda x: _pad(x, missing), images)
        arrays = {key: _pad(x, missing) for key, x in arrays.items() if key != "images"}
        texts = [text.decode() for text in arrays["instruction"]]
        encoded = [self._known_prompts.get(text) or self.prompt.fitting(text) for text in texts]
        ids, exists = pad(encoded, self.prompt.length)
        observation = {key: arrays[key] for key in ("proprio", "mask")}
        batch = Batch(
            Observation(images=images, **observation, prompt=ids, prompt_mask=exists),  # type: ignore[arg-type]
            arrays["action"],
        )
        check_batch(batch)
        return batch

    @functools.cached_property
    def _known_prompts(self) -> dict[str, list[int]]:
        instructions = self.source.statistics.instructions
        return {instruction: self.prompt.encode(instruction) for instruction in instructions}

    def tokenizer_arrays(self) -> dict[str, jax.Array]:
        """Returns the arrays of stage one by their paths in the network; none where there is no tokenizer."""
        if self.source.tokenizer is None:
            return {}
        arrays = tokenizer_arrays(self.source.tokenizer.model)
        return {f"adapters/{self.name}/tokenizer/{path}": x for path, x in arrays.items()}


def open_sources(config: ConfigDict) -> dict[str, Source]:
    """Opens what a training config names, by the names of the environments.

    Raises:
      UserError: if a part of the config does not fit; it names the key.
    """
    if "mixture" not in config:
        source = _open("config", config, weight=1.0)
        return {source.dataset.metadata["name"]: source}
    sources: dict[str, Source] = {}
    problems = []
    for name, part in config.mixture.items():
        key = f"config.mixture.{name}"
        try:
            source = _open(key, part, part.weight)
        except UserError as error:
            problems.append(str(error))
            continue
        env = source.dataset.metadata["name"]
        if not part.data.mapping and env != name:  # a mapping names the robot
            problems.append(
                f"{key}.data.directory: expected demonstrations of {name}, found those of {env}, for which the config "
                f"has {'another part' if env in config.mixture else 'no adapter'}; give the directory to the part of "
                f"its environment, config.mixture.{env}"
            )
        elif env in sources:
            problems.append(_twice(sources[env], source))
        sources.setdefault(env, source)
    if problems:
        raise UserError("; ".join(problems))
    if not sources:
        raise UserError(
            "config.mixture: expected at least one embodiment, found none; name one in the variant"
        )
    return sources


def _twice(one: Source, other: Source) -> str:
    """Returns the fault of two parts of a mixture that name the same robot."""
    name = other.dataset.metadata["name"]
    differ = [
        f"{key} are {one.dataset.metadata[key]} and {other.dataset.metadata[key]}"
        for key in ("action_names", "action_units", "action_scale")
        if one.dataset.metadata[key] != other.dataset.metadata[key]
    ]
    found = f", whose {', '.join(differ)}" if differ else ""
    fix = "give them different names" if differ else "give both folders to one part, with a comma"
    return f"{other.key}: expected another robot than {one.key}, found {name!r} in both mappings{found}; {fix}"


def make_embodiments(
    sources: dict[str, Source],
    model: MLLMConfig,
    text_tokenizer: str,
    batch_size: int,
    shards: int,
    part: tuple[int, int] = (0, 1),
) -> dict[str, Embodiment]:
    """Puts together what training needs to know about each embodiment.

    Args:
      sources: from ``open_sources``.
      model: the sizes of the model.
      text_tokenizer: a ``tokenizer.json`` as text.
      batch_size: windows of a batch, over all embodiments and processes.
      shards: the number of devices that a batch is split over.
      part: which part of a batch this process reads, and how many parts there are.

    Raises:
      UserError: if an adapter or a prompt does not fit the model, or the batch cannot be shared out.
    """
    weights = {name: source.weight for name, source in sources.items()}
    shares = mixture.shares(weights, batch_size)
    if min(shares.values()) < part[1]:
        name = min(shares, key=lambda name: shares[name])
        raise UserError(
            f"config.data.batch_size: expected at least one window of {name} for each of {part[1]} processes, found "
            f"{shares[name]} of {batch_size} windows; raise the batch size, or its weight"
        )
    embodiments = {}
    for name, source in sources.items():
        config = _embodiment_config(source, text_tokenizer)
        statistics = source.statistics
        adapter = nnx.eval_shape(
            lambda config=config, statistics=statistics: build_adapter(
                config, model, statistics, nnx.Rngs(0)
            )
        )
        prompt = _prompt(source, config, model, adapter, text_tokenizer)
        rows = shards * -(-shares[name] // shards)
        embodiments[name] = Embodiment(
            name, source, shares[name], rows, part, config, adapter, prompt
        )
    return embodiments


def _pad(x: np.ndarray, missing: int) -> np.ndarray:
    """Appends ``missing`` rows of zeros, or of empty text."""
    if not missing:
        return x
    empty = np.full((missing, *x.shape[1:]), b"" if x.dtype == object else 0, x.dtype)
    return np.concatenate([x, empty])


def texts(sources: Iterable[Source]) -> list[str]:
    """Returns the text that a text tokenizer learned for these embodiments should know: prompts and action names."""
    result = []
    for source in sources:
        template = source.config.prompt_template
        result += [fill(template, text) for text in source.statistics.instructions]
        if adapter_class(source.config.adapter.name).writes_words:
            result += source.actions
    return result


def _open(key: str, config: ConfigDict, weight: float) -> Source:
    for name, value in (("chunk", config.chunk), ("data.context", config.data.context)):
        if value < 1:
            raise UserError(f"{key}.{name}: expected at least 1, found {value}")
    adapter = adapter_class(config.adapter.name, f"{key}.adapter.name")
    dataset = rlds.open_dataset(config.data.directory, config.data.mapping)
    actions = _actions(key, config, adapter, dataset)
    statistics = dataset_statistics(dataset, processes=processes())
    if actions and not 0 <= statistics.action.min[0] <= statistics.action.max[0] < len(actions):
        raise UserError(
            f"{dataset.directory}: action: expected an index below {len(actions)}, that of one of the choices "
            f"{', '.join(actions)}, found {statistics.action.min[0]:g} to {statistics.action.max[0]:g}; correct the "
            "dataset or the choices of its mapping"
        )
    tokenizer = None
    if adapter.needs_tokenizer:
        if not config.tokenizer:
            raise UserError(
                f"{key}.tokenizer: adapter {config.adapter.name!r} needs a trained tokenizer, found none; run "
                f"python -m mllm_act.train_tokenizer, then pass --{key}.tokenizer=ITS_WORKDIR"
            )
        tokenizer = load_tokenizer(Path(config.tokenizer))
        _check_tokenizer(key, config, tokenizer, dataset)
        # Codes keep the meaning they had in stage one: its normalisation of actions is used.
        statistics = dataclasses.replace(statistics, action=tokenizer.statistics.action)
    statistics = dataclasses.replace(statistics, normalization=normalization.choose(
        key, config.normalization, config.adapter.name, adapter.normalizations,
        None if tokenizer is None else tokenizer.statistics.normalization,
    ))  # fmt: skip
    return Source(key, config, weight, dataset, statistics, tokenizer, actions)


def _actions(
    key: str, config: ConfigDict, adapter: type[Adapter], dataset: rlds.Dataset
) -> tuple[str, ...]:
    """Returns the names of discrete actions, none for continuous ones; refuses an adapter of the other kind."""
    choices = tuple(dataset.metadata.get("choices", ()))
    if adapter.discrete != bool(choices):
        fitting = [name for name, kind in ADAPTERS.items() if kind.discrete == bool(choices)]
        raise UserError(
            f"{key}.adapter.name: expected an adapter for {'discrete' if choices else 'continuous'} actions, as in "
            f"{dataset.directory}, one of {', '.join(fitting)}, found {config.adapter.name!r}"
        )
    actions = tuple(config.actions) or choices
    if len(actions) != len(choices):
        raise UserError(
            f"{key}.actions: expected a name for each of the {len(choices)} actions of {dataset.directory} "
            f"({', '.join(choices) or 'none: they are continuous'}), found {len(actions)}: {', '.join(actions)}"
        )
    if choices and config.chunk != 1:
        raise UserError(
            f"{key}.chunk: expected 1 for discrete actions, found {config.chunk}; chunks are for continuous ones"
        )
    return actions


def _check_tokenizer(
    key: str, config: ConfigDict, tokenizer: LoadedTokenizer, dataset: rlds.Dataset
) -> None:
    """Raises UserError if the tokenizer is of another kind, or of another environment's actions."""
    dataset.expect_actions(tokenizer.config.action_dim)
    name, kind, chunk = (
        config.adapter.name,
        tokenizer.config.kind,
        tokenizer.config.chunk,
    )
    if (kind, chunk) != (name, config.chunk):
        raise UserError(
            f"{key}.tokenizer={config.tokenizer}: expected one for the adapter {name!r} and chunks of "
            f"{config.chunk} actions, found one for {kind!r} and chunks of {chunk}; train it with "
            f"--config=configs/tokenizer/...:{name},chunk={config.chunk}, or set {key}.chunk={chunk}"
        )
    for field in ("name", "action_names", "action_scale"):
        expected, found = dataset.metadata[field], tokenizer.metadata[field]
        if list(expected) != list(found):
            raise UserError(
                f"{key}.tokenizer={config.tokenizer}: {field}: expected {expected!r} as in {dataset.directory}, found "
                f"{found!r}; train a tokenizer on this dataset"
            )


def _embodiment_config(source: Source, text_tokenizer: str) -> EmbodimentConfig:
    config = source.config
    settings = {key: value for key, value in config.adapter.items() if key != "name"}
    sizes = None if source.tokenizer is None else source.tokenizer.config
    facts = RunFacts(source.actions, sizes, text_tokenizer, config.chunk)
    return EmbodimentConfig(
        adapter=config.adapter.name,
        adapter_config=adapter_class(config.adapter.name).configure(settings, facts),
        cameras=source.dataset.cameras,
        context=config.data.context,
        chunk=config.chunk,
        max_delay=config.max_delay,
    )


def _prompt(
    source: Source,
    config: EmbodimentConfig,
    model: MLLMConfig,
    adapter: Adapter,
    text_tokenizer: str,
) -> Prompt:
    """Returns the prompt, and checks that the model can read it.

    Raises:
      UserError: if a prompt is too long, or uses ids that the model lacks or that the adapter must write over.
    """
    key, language = source.key, model.language
    prompt = Prompt(source.config.prompt_template, text_tokenizer, source.config.prompt_tokens)
    rows = range(language.action_tokens, language.action_tokens + adapter.codes)
    prompt = readable(prompt, source.statistics.instructions, language.vocabulary, rows)
    longest = longest_prompt(model, config, adapter.tokens_per_action)
    if prompt.length > longest:
        raise UserError(
            f"{key}.prompt_tokens: expected at most {longest}, what {config.context} steps leave of the model's "
            f"{language.max_positions} positions, found {prompt.length}; lower it or {key}.data.context"
        )
    return prompt
