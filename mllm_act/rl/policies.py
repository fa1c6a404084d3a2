"""The policy that a PPO run begins with: a fresh one, or that of another run."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections.config_dict import ConfigDict

from mllm_act import envs
from mllm_act.adapters import ADAPTERS, adapter_class
from mllm_act.adapters.base import Adapter, RunFacts
from mllm_act.envs.base import EnvSpec
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.normalization import Moments, Statistics
from mllm_act.policy.load import load_network
from mllm_act.policy.network import (
    EmbodimentConfig,
    NetworkConfig,
    longest_prompt,
    override_model,
)
from mllm_act.policy.prompt import Prompt, fill, readable, train_text_tokenizer
from mllm_act.rl.episodes import Episodes
from mllm_act.weights.folder import pretrained_text_tokenizer

SAMPLES = (
    500  # instructions that the text tokenizer learns from, where they differ between episodes
)


def statistics_of(spec: EnvSpec, instructions: Iterable[str]) -> Statistics:
    """Returns what stands for the statistics of demonstrations: the bounds of actions; proprioception as it is."""
    low, high = spec.action_low, spec.action_high
    middle = tuple((a + b) / 2 for a, b in zip(low, high, strict=True))
    spread = tuple((b - a) / math.sqrt(12) for a, b in zip(low, high, strict=True))
    action = Moments(middle, spread, low, high, low, high, (False,) * len(low))
    n = len(spec.proprio_names)
    zero, one = (0.0,) * n, (1.0,) * n
    proprio = Moments(zero, one, (-1.0,) * n, one, (-1.0,) * n, one, (False,) * n)
    texts = tuple(sorted(set(instructions)))
    return Statistics(action, proprio, 0, 0, 0, "none", "", (), texts)


def sample_instructions(name: str, episodes: Episodes) -> list[str]:
    """Returns instructions of the tasks; where they differ between episodes, those of some first episodes."""
    sentences = envs.instructions(name)
    if not any("<" in sentences[task] for task in episodes.tasks):
        return [sentences[task] for task in episodes.tasks]
    env = envs.make(name, render=False)
    jobs = [episodes.job(0, number) for number in range(SAMPLES)]
    found = [str(env.reset(*job)["instruction"]) for job in jobs]
    env.close()
    return found


def from_scratch(
    config: ConfigDict, spec: EnvSpec, episodes: Episodes
) -> tuple[NetworkConfig, Statistics, Prompt, Path | None]:
    adapter = adapter_class(config.adapter.name)
    if adapter.needs_tokenizer:
        raise UserError(
            f"config.adapter.name: expected an adapter without a trained tokenizer, found {config.adapter.name!r}; "
            "train a policy with python -m mllm_act.train first, and pass --config.init=ITS_WORKDIR"
        )
    preset = presets.get(config.preset)
    model = override_model(preset.model, config)
    instructions = sample_instructions(spec.name, episodes)
    actions = spec.choices
    if adapter.discrete != bool(actions):
        kind = "discrete" if actions else "continuous"
        fitting = ", ".join(n for n, a in ADAPTERS.items() if a.discrete == bool(actions))
        raise UserError(
            f"config.adapter.name: expected an adapter for the {kind} actions of {spec.name} ({fitting}), found "
            f"{config.adapter.name!r}"
        )
    pretrained = Path(config.pretrained) if config.pretrained else None
    if preset.text_tokenizer == "pretrained" and pretrained is not None:
        text_tokenizer = pretrained_text_tokenizer(pretrained)
    else:
        texts = [fill(config.prompt_template, text) for text in instructions]
        texts += actions if adapter.writes_words else ()
        text_tokenizer = train_text_tokenizer(texts, model.language.action_tokens)
    settings = {key: value for key, value in config.adapter.items() if key != "name"}
    facts = RunFacts(actions, None, text_tokenizer, chunk=1)
    part = EmbodimentConfig(
        adapter=config.adapter.name,
        adapter_config=adapter.configure(settings, facts),
        cameras=tuple(sorted(spec.cameras)),
        context=_context(config, spec),
        chunk=1,
    )
    network = NetworkConfig(config.preset, model, preset.trained, {spec.name: part})
    prompt = Prompt(config.prompt_template, text_tokenizer, config.prompt_tokens)
    vocabulary, first = model.language.vocabulary, model.language.action_tokens
    rows = range(0) if adapter.discrete else range(first, vocabulary)
    prompt = readable(prompt, instructions, vocabulary, rows)
    return network, statistics_of(spec, instructions), prompt, pretrained


def from_run(config: ConfigDict, spec: EnvSpec) -> tuple[Any, ...] | None:
    """Returns network, statistics, prompt, arrays and JSON document of ``config.init``, None where there is none."""
    if not config.init:
        return None
    saved = load_network(Path(config.init), jax.devices("cpu")[0])
    if spec.name not in saved.config.embodiments:
        raise UserError(
            f"config.init={config.init}: expected a policy of {spec.name}, found one of "
            f"{', '.join(saved.config.embodiments)}; choose another --config.env.name"
        )
    part = saved.config.embodiments[spec.name]
    if part.chunk != 1:
        raise UserError(
            f"config.init={config.init}: expected a policy that decides on one action at a time, found chunks of "
            f"{part.chunk}; train with --config.chunk=1"
        )
    part = dataclasses.replace(part, context=_context(config, spec))
    model = saved.config.model
    if config.remat:
        model = dataclasses.replace(model, remat=config.remat)
    network = dataclasses.replace(saved.config, model=model, embodiments={spec.name: part})
    other = tuple(f"adapters/{name}/" for name in saved.config.embodiments if name != spec.name)
    arrays = {p: x for p, x in saved.arrays.items() if not (other and p.startswith(other))}
    statistics = Statistics.from_dict(saved.meta["statistics"][spec.name])
    prompt = Prompt(**saved.meta["prompt"][spec.name])
    return network, statistics, prompt, arrays, saved.meta


def _context(config: ConfigDict, spec: EnvSpec) -> int:
    return int(config.context or config.env.horizon or spec.horizon)


def check(network: NetworkConfig, spec: EnvSpec, prompt: Prompt) -> None:
    part = network.embodiments[spec.name]
    if adapter_class(part.adapter).log_probs is Adapter.log_probs:
        fitting = ", ".join(n for n, a in ADAPTERS.items() if a.log_probs is not Adapter.log_probs)
        raise UserError(
            f"config.adapter.name: expected an adapter with a distribution of actions ({fitting}), found "
            f"{part.adapter!r}, which predicts one action; choose another"
        )
    if network.model.history != "observations":
        raise UserError(
            f"config.history: expected observations, whose keys and values a rollout can keep, found "
            f"{network.model.history!r}"
        )
    longest = longest_prompt(network.model, part, 1)
    if prompt.length > longest:
        raise UserError(
            f"config.prompt_tokens: expected at most {longest}, what {part.context} steps leave of the model's "
            f"positions, found {prompt.length}; lower it or config.context"
        )
