"""The embodiments of a training run: what the config says of each is opened and looked at before anything is built.

A config of one environment describes one embodiment. ``config.mixture`` describes several by the names of their
environments, each with the keys that a config of that environment has for itself, and a weight.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from ml_collections.config_dict import ConfigDict

from data_pipelines.reading import rlds
from data_pipelines.reading.statistics import statistics as dataset_statistics
from mllm_act.action_tokenizer import checkpoint as tokenizer_checkpoint
from mllm_act.action_tokenizer import kinds
from mllm_act.action_tokenizer.checkpoint import LoadedTokenizer
from mllm_act.adapters import Adapter, action_words
from mllm_act.adapters.language import digit_sequences
from mllm_act.errors import UserError, nearest
from mllm_act.models.mllm import MLLMConfig
from mllm_act.normalization import Statistics
from mllm_act.policy import network as networks
from mllm_act.policy import prompt as prompts
from mllm_act.policy.prompt import Prompt

# Keys of a config that are of its embodiment alone; with ``data.directory`` and ``data.context``.
KEYS = ("adapter", "chunk", "tokenizer", "actions", "hidden", "bins", "prompt_template", "prompt_tokens")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Opened:
    """One embodiment: its part of the config and what that names.

    Attributes:
      key: where its part of the config is, for errors.
      config: that part.
      weight: its share of every batch, beside the others'.
      dataset: its demonstrations.
      statistics: of them; where there is a tokenizer, actions are normalised as in its training.
      tokenizer: of stage one, where the adapter needs one.
      actions: the names of discrete actions.
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
        """How many windows an epoch cuts the demonstrations into: the mean over the cuts' random offsets."""
        context, seen = self.config.data.context, self.statistics
        return (seen.num_steps + seen.num_episodes * (context - 1)) / context

    @property
    def mostly_padding(self) -> bool:
        """Whether less than half of the windows' places hold a step, as with episodes shorter than the context."""
        return self.statistics.num_steps < 0.5 * self.windows * self.config.data.context


def open_all(config: ConfigDict) -> dict[str, Opened]:
    """Opens all embodiments of a training config.

    Returns:
      Them by the names of their environments.

    Raises:
      UserError: if a part of the config cannot be; it names the key.
    """
    if "mixture" not in config:
        opened = _open("config", config, weight=1.0)
        return {opened.dataset.metadata["name"]: opened}
    found = {}
    for name, part in config.mixture.items():
        key = f"config.mixture.{name}"
        found[name] = _open(key, part, part.weight)
        env = found[name].dataset.metadata["name"]
        if env != name:
            raise UserError(
                f"{key}.data.directory: expected demonstrations of {name}, found those of {env}, for which the config "
                f"has {'another part' if env in config.mixture else 'no adapter'}; give the directory to the part of "
                f"its environment, config.mixture.{env}"
            )
    if not found:
        raise UserError(
            "config.mixture: expected at least one embodiment, found none; name one in the variant"
        )
    return found


def _open(key: str, config: ConfigDict, weight: float) -> Opened:
    for name, value in (("chunk", config.chunk), ("data.context", config.data.context)):
        if value < 1:
            raise UserError(f"{key}.{name}: expected at least 1, found {value}")
    dataset = rlds.open_dataset(config.data.directory)
    actions = _actions(key, config, dataset)
    statistics = dataset_statistics(dataset)
    tokenizer = None
    if config.adapter in networks.TOKENIZED:
        if not config.tokenizer:
            raise UserError(
                f"{key}.tokenizer: adapter {config.adapter!r} needs a trained tokenizer, found none; run "
                f"python -m mllm_act.train_tokenizer, then pass --{key}.tokenizer=ITS_WORKDIR"
            )
        tokenizer = tokenizer_checkpoint.load(Path(config.tokenizer))
        _check_tokenizer(key, config, tokenizer, dataset)
        # Codes mean what they meant in stage one: its normalisation of actions is kept.
        statistics = dataclasses.replace(statistics, action=tokenizer.statistics.action)
    return Opened(key, config, weight, dataset, statistics, tokenizer, actions)


def _actions(key: str, config: ConfigDict, dataset: rlds.Dataset) -> tuple[str, ...]:
    """Returns the names of discrete actions, none for continuous ones, and refuses an adapter of the other kind."""
    kind, choices = config.adapter, tuple(dataset.metadata.get("choices", ()))
    if kind not in networks.ADAPTERS:
        raise UserError(
            f"{key}.adapter: expected one of {', '.join(networks.ADAPTERS)}, found {kind!r}; "
            + nearest(kind, networks.ADAPTERS)
        )
    fitting = networks.DISCRETE if choices else networks.CONTINUOUS
    if kind not in fitting:
        raise UserError(
            f"{key}.adapter: expected an adapter of {'discrete' if choices else 'continuous'} actions for "
            f"{dataset.directory}, one of {', '.join(fitting)}, found {kind!r}"
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
    """Raises UserError if the tokenizer is of the other kind, or of another environment's actions."""
    dataset.expect_actions(tokenizer.config.action_dim)
    kind, chunk = kinds.kind(tokenizer.config), tokenizer.config.chunk
    if (kind, chunk) != (config.adapter, config.chunk):
        raise UserError(
            f"{key}.tokenizer={config.tokenizer}: expected one for the adapter {config.adapter!r} and chunks of "
            f"{config.chunk} actions, found one for {kind!r} and chunks of {chunk}; train it with "
            f"--config=configs/tokenizer/...:{config.adapter},chunk={config.chunk}, or set {key}.chunk={chunk}"
        )
    for name in ("name", "action_names", "action_scale"):
        expected, found = dataset.metadata[name], tokenizer.metadata[name]
        if list(expected) != list(found):
            raise UserError(
                f"{key}.tokenizer={config.tokenizer}: {name}: expected {expected!r} as in {dataset.directory}, found "
                f"{found!r}; train a tokenizer on this data set"
            )


def texts(opened: Iterable[Opened]) -> list[str]:
    """Returns all the text that a text tokenizer learnt for these embodiments should know: prompts and action names."""
    found = []
    for one in opened:
        template = one.config.prompt_template
        found += [prompts.fill(template, text) for text in one.statistics.instructions]
        if one.config.adapter in ("semlang", "lang"):
            found += one.actions
    return found


def describe(opened: Opened, text_tokenizer: str) -> networks.Embodiment:
    """Returns the description of an embodiment; ``text_tokenizer`` is the text of a ``tokenizer.json``.

    Raises:
      UserError: if the tokenizer has no tokens for an adapter that writes text.
    """
    config = opened.config
    sequences: action_words.Sequences = ()
    end = 0
    if config.adapter in ("semlang", "lang"):
        sequences = action_words.words(text_tokenizer, opened.actions)
        end = action_words.end(text_tokenizer)
    if config.adapter == "lang":
        digits = action_words.digits(text_tokenizer)
        sequences = digit_sequences(opened.actions, sequences, digits)
    return networks.Embodiment(
        adapter=config.adapter,
        cameras=opened.dataset.cameras,
        context=config.data.context,
        chunk=config.chunk,
        hidden=config.hidden,
        bins=config.bins,
        tokenizer=None if opened.tokenizer is None else dataclasses.asdict(opened.tokenizer.config),
        actions=opened.actions,
        sequences=sequences,
        end=end,
    )


def prompt(
    opened: Opened,
    embodiment: networks.Embodiment,
    model: MLLMConfig,
    adapter: Adapter,
    text_tokenizer: str,
) -> Prompt:
    """Returns the prompt of an embodiment, and looks at whether the model can read it.

    Raises:
      UserError: if a prompt is too long, or uses ids that the model has not, or that the adapter writes over.
    """
    config, language = opened.config, model.language
    made = Prompt(config.prompt_template, text_tokenizer, config.prompt_tokens)
    instructions = opened.statistics.instructions
    made.tokens(instructions)  # one that is too long is told of now
    rows = range(language.action_tokens, language.action_tokens + adapter.codes)
    prompts.check_ids(made, instructions, language.vocabulary, rows)
    longest = networks.longest_prompt(model, embodiment, adapter.tokens_per_action)
    if config.prompt_tokens > longest:
        raise UserError(
            f"{opened.key}.prompt_tokens: expected at most {longest}, what {config.data.context} steps leave of the "
            f"model's {language.max_positions} positions, found {config.prompt_tokens}; lower it or "
            f"{opened.key}.data.context"
        )
    return made
