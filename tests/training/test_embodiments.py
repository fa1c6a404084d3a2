"""Discrete actions and several embodiments through the programs: real BabyAI and Meta-World demonstrations."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from data_pipelines.generate import generate
from data_pipelines.reading import pipeline, rlds
from mllm_act import train, train_tokenizer
from mllm_act.adapters import ADAPTERS
from mllm_act.config import load_config
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.policy import Policy
from mllm_act.policy.network import PolicyNetwork
from tests import pretrained_folder
from tests.data_pipelines import tiny_rlds
from tests.policy.window import decider

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = {
    "data.batch_size": 4,
    "log_every": 1,
    "validation_windows": 4,
    "optimizer.learning_rate": 1e-3,
}


def configure(file: str, **overrides: Any) -> Any:
    config = load_config(str(ROOT / "configs" / file))
    with config.unlocked():
        config.update_from_flattened_dict({**SMALL, **overrides})
    return config


def metrics(workdir: Path, name: str) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def babyai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("babyai") / "data"
    generate("babyai", "goto,pickup", episodes=6, out=out, workers=2, seed=0)
    return out


def discrete(babyai: Path, adapter: str, **overrides: Any) -> Any:
    given = {"data.directory": str(babyai), "data.context": 4, "prompt_tokens": 64, "steps": 12}
    given |= {"validate_every": 12, "checkpoint_every": 12}
    given |= {"adapter.hidden": 64} if adapter == "categorical" else {}
    return configure(f"policy/babyai.py:{adapter}", **{**given, **overrides})


@pytest.mark.parametrize("adapter", [n for n, kind in ADAPTERS.items() if kind.discrete])
def test_a_policy_of_discrete_actions_learns_and_acts_as_in_training(
    babyai: Path, tmp_path: Path, adapter: str
) -> None:
    train.main(discrete(babyai, adapter), tmp_path)
    losses = metrics(tmp_path, "train/loss")
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert 0 <= metrics(tmp_path, "val/wrong_actions")[-1] <= 1

    policy = Policy.load(tmp_path)
    dataset = rlds.open_dataset(babyai)
    [episode, *_] = pipeline.EvalBatches(dataset, "train", batch_size=1, context=3)
    [text] = [text.decode() for text in episode["instruction"]]
    memory, decide = policy.start(batch=1), decider(policy)
    assert episode["mask"].all()
    for t in range(3):
        images = {"top": episode["images"]["top"][:, t]}
        first = np.array([t == 0])
        action, memory = policy.act(images, episode["proprio"][:, t], [text], first, memory)
        assert action.shape == (1, 1) and action[0, 0] in range(6)
    expected = decide(text, episode["images"], episode["action"], episode["proprio"][:, t])
    np.testing.assert_array_equal(action, expected)
    if adapter != "semlang":  # all draw through the same code
        return
    drawn = set()
    for seed in range(20):
        key, memory = jax.random.key(seed), policy.start(1)
        action, _ = policy.act(
            images, episode["proprio"][:, t], [text], np.array([True]), memory, key
        )
        drawn.add(float(action[0, 0]))
    assert len(drawn) > 1 and drawn <= set(range(6))  # so few updates leave more than one likely


def test_semlangs_words_and_langs_digits_are_the_text_tokenizers(
    babyai: Path, tmp_path: Path
) -> None:
    names = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle")
    found = {}
    for adapter in ("semlang", "lang"):
        train.main(discrete(babyai, adapter, steps=0, actions=names), tmp_path / adapter)
        policy = Policy.load(tmp_path / adapter)
        found[adapter] = policy.embodiment.adapter_config.sequences
        text = Tokenizer.from_str(policy.prompt.tokenizer_json)
        words = [text.decode(ids) for ids in found[adapter]]
        if adapter == "semlang":
            assert words == list(names)
        else:
            assert all(word.isdigit() for word in words) and len(set(words)) == 6
    assert list(map(len, found["semlang"])) == list(map(len, found["lang"]))


@pytest.mark.parametrize(
    ("adapter", "overrides", "message"),
    [
        ("rvq", {}, "config.adapter.name: expected an adapter for discrete actions.* found 'rvq'"),
        ("semlng", {}, "did you mean 'semlang'"),
        ("semlang", {"actions": ("left", "right")}, "config.actions: expected a name for each of"),
        ("semlang", {"actions": ("a", "b", "c", "d", "e", "a")}, "found 'a' and 'a'"),
        ("semlang", {"actions": ("a", "b", "c", "d", "e", "")}, "found '', which has no token"),
        ("semlang", {"chunk": 2}, "config.chunk: expected 1 for discrete actions, found 2"),
        ("categorical", {"chunk": 0}, "config.chunk: expected at least 1 and at most .* found 0"),
    ],
)
def test_bad_config_of_discrete_actions_is_one_clear_error(
    babyai: Path, tmp_path: Path, adapter: str, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train.main(discrete(babyai, adapter, **overrides), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_vocabulary_without_digits_is_refused_for_lang(
    babyai: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = presets.get("tiny")
    monkeypatch.setitem(
        presets.PRESETS, "small", dataclasses.replace(tiny, text_tokenizer="pretrained")
    )
    pretrained_folder.write(tmp_path / "weights", tiny.model, ["go to the ball"], 400)
    path = tmp_path / "weights" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for digit in "0123456789":
        vocabulary[f"<{digit}>"] = vocabulary.pop(digit)
    path.write_text(json.dumps(tokenizer))
    given = {"preset": "small", "pretrained": str(tmp_path / "weights")}
    with pytest.raises(UserError, match="expected a vocabulary with the digits 0 to 9"):
        train.main(discrete(babyai, "lang", **given), tmp_path / "run")


@pytest.fixture(scope="module")
def mixture(babyai: Path, metaworld: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The config of Meta-World with RVQ and BabyAI with SemLang, and where it was trained."""
    home = tmp_path_factory.mktemp("mixture")
    config = configure(
        "policy/mixture.py:metaworld=rvq,babyai=semlang",
        **{
            "mixture.metaworld.data.directory": str(metaworld / "data"),
            "mixture.metaworld.tokenizer": str(metaworld / "tokenizer"),
            "mixture.babyai.data.directory": str(babyai),
            "mixture.babyai.data.context": 4,
            "mixture.babyai.weight": 3.0,
            "steps": 16,
            "validate_every": 16,
            "checkpoint_every": 12,
        },
    )
    traced = []
    loss = PolicyNetwork.loss

    def counted(self: PolicyNetwork, name: str, *args: Any, **named: Any) -> Any:
        traced.append(name)
        return loss(self, name, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PolicyNetwork, "loss", counted)
        train.main(config, home / "run")
    return config, home / "run", sorted(traced)


def test_one_model_learns_both_embodiments_in_one_compiled_step(mixture: Any) -> None:
    _, workdir, traced = mixture
    for name in ("metaworld", "babyai"):
        losses = metrics(workdir, f"train/{name}/loss")
        assert len(losses) == 16 and np.mean(losses[-3:]) < np.mean(losses[:3]), name
    # Once for training and once for validation, whatever the number of steps.
    assert traced == ["babyai"] * 2 + ["metaworld"] * 2
    whole, parts = (metrics(workdir, f"train/{name}") for name in ("loss", "metaworld/loss"))
    babyai = metrics(workdir, "train/babyai/loss")
    np.testing.assert_allclose(whole, 0.25 * np.array(parts) + 0.75 * np.array(babyai), rtol=1e-5)
    assert metrics(workdir, "val/babyai/wrong_actions") and metrics(
        workdir, "val/metaworld/error_dx_m"
    )


def test_acting_picks_the_embodiment(mixture: Any) -> None:
    _, workdir, _ = mixture
    with pytest.raises(
        UserError, match="embodiment: expected one of babyai, metaworld, .* found None"
    ):
        Policy.load(workdir)
    with pytest.raises(UserError, match="found 'calvin'"):
        Policy.load(workdir, embodiment="calvin")
    first = np.array([True])
    for name, camera, size, proprio in (("babyai", "top", 1, 1), ("metaworld", "corner4", 4, 4)):
        policy = Policy.load(workdir, embodiment=name)
        images = {camera: np.zeros((1, 200, 200, 3), np.uint8)}
        action, _ = policy.act(
            images, np.zeros((1, proprio), np.float32), ["go"], first, policy.start(1)
        )
        assert action.shape == (1, size) and np.isfinite(action).all()


def test_a_mixture_resumes_bit_for_bit(mixture: Any, tmp_path: Path) -> None:
    config, workdir, _ = mixture
    for part in ("frozen", "checkpoints/12"):
        shutil.copytree(workdir / part, tmp_path / part)
    train.main(config, tmp_path)
    for name in ("metaworld", "babyai"):
        whole = metrics(workdir, f"train/{name}/loss")
        assert metrics(tmp_path, f"train/{name}/loss") == whole[12:]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mixture.babyai.weight": -1.0}, "config.mixture.babyai.weight: expected a finite number"),
        (
            {"mixture.babyai.adapter.name": ""},
            "config.mixture.babyai.adapter.name: expected one of",
        ),
        ({"mixture.metaworld.tokenizer": ""}, "config.mixture.metaworld.tokenizer: adapter 'rvq'"),
        ({"data.batch_size": 1}, "config.data.batch_size: expected"),
    ],
)
def test_bad_mixtures_are_one_clear_error(
    mixture: Any, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    config = mixture[0].copy_and_resolve_references()
    config.update_from_flattened_dict(overrides)
    with pytest.raises(UserError, match=message):
        train.main(config, tmp_path)


def test_data_of_an_embodiment_without_an_adapter_is_named(mixture: Any, tmp_path: Path) -> None:
    config = mixture[0].copy_and_resolve_references()
    config.mixture.metaworld.adapter.name = "uniform"
    config.mixture.metaworld.data.directory = str(
        tiny_rlds.write_lengths(tmp_path / "tiny", [[5, 4]])
    )
    message = "expected demonstrations of metaworld, found those of tiny, for which the config has no adapter"
    with pytest.raises(UserError, match=message):
        train.main(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("adapter", "tokens"),
    [("regression", 1), ("uniform", 12), ("vq", 1), ("rvq", 2), ("fast", None)],
)
def test_every_continuous_adapter_decides_on_chunks(
    tmp_path: Path, adapter: str, tokens: int | None
) -> None:
    """Carried out one after another; between decisions the chunk's own numbers come out.

    Averaged too, which knows nothing of the adapter, with one of them. Training on chunks is another matter of the
    first and the last; the rest decide untrained.
    """
    data, chunk = tiny_rlds.write_lengths(tmp_path / "data", [[9, 6, 12]]), 3
    given: dict[str, Any] = {"data.directory": str(data), "chunk": chunk}
    given |= {"uniform": {"adapter.bins": 16}, "regression": {"adapter.hidden": 32}}.get(
        adapter, {}
    )
    if ADAPTERS[adapter].needs_tokenizer:
        config = load_config(f"{ROOT}/configs/tokenizer/metaworld.py:{adapter},chunk={chunk}")
        config.data.directory, config.replay = str(data), False
        if adapter == "fast":
            config.tokenizer.vocabulary = 64
        else:
            config.update_from_flattened_dict({
                "data.batch_size": 8, "steps": 2, "log_every": 2, "checkpoint_every": 2, "tokenizer.hidden": 16,
                "tokenizer.width": 8, "tokenizer.codes": 8,
            })  # fmt: skip
        train_tokenizer.main(config, tmp_path / "tokenizer")
        given["tokenizer"] = str(tmp_path / "tokenizer")
    given["steps"] = steps = 2 if adapter in ("regression", "fast") else 0
    given |= {"validate_every": 2, "checkpoint_every": 2}
    train.main(configure(f"policy/metaworld.py:{adapter}", **given), tmp_path / "run")
    assert steps == 0 or np.isfinite(metrics(tmp_path / "run", "val/error_dx_m")).all()

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 1, 16, 16, 3), np.uint8)
    proprio = rng.normal(size=(5, 1, 3)).astype(np.float32)
    decided = {}
    for ensembling in (None, 0.01) if adapter == "regression" else (None,):
        policy = Policy.load(tmp_path / "run", ensembling=ensembling)
        network = policy._network(policy.parameters)
        assert tokens is None or network.adapters[policy.name].tokens_per_action == tokens
        memory, chunks, actions = policy.start(1), [], []
        for t in range(5):
            first = np.array([t == 0])
            seen = {"corner4": frames[t]}
            action, memory = policy.act(seen, proprio[t], ["do task 0"], first, memory)
            newest = memory.steps.plan.chunks[0, -1]
            assert newest.shape == (chunk, 4)
            actions.append(action[0])
            chunks.append(np.asarray(newest))
        decided[ensembling] = chunks
        if ensembling is None:
            expected = [chunks[0][0], chunks[0][1], chunks[0][2], chunks[3][0], chunks[3][1]]
        else:
            weights = [np.exp(-0.01 * np.arange(n)) for n in (1, 2, 3, 3, 3)]
            said = [[chunks[s][t - s] for s in range(max(0, t - 2), t + 1)] for t in range(5)]
            expected = [
                np.average(a, axis=0, weights=w) for a, w in zip(said, weights, strict=True)
            ]
        np.testing.assert_allclose(actions, expected, atol=1e-5)
    for chunks in decided.values():  # the decision itself is the same in both
        np.testing.assert_allclose(chunks[3], decided[None][3], atol=1e-5)


def test_what_chunks_cannot_be_is_refused(tmp_path: Path) -> None:
    data = tiny_rlds.write_lengths(tmp_path / "data", [[9, 6]])
    given: dict[str, Any] = {"data.directory": str(data), "adapter.bins": 16, "steps": 0}
    with pytest.raises(UserError, match="config.history: expected observations with chunks of 2"):
        config = configure(
            "policy/metaworld.py:uniform", chunk=2, history="observations_and_actions", **given
        )
        train.main(config, tmp_path / "run")
    train.main(configure("policy/metaworld.py:uniform", **given), tmp_path / "run")
    with pytest.raises(UserError, match="ensembling: expected a policy that decides on several"):
        Policy.load(tmp_path / "run", ensembling=0.01)
    with pytest.raises(UserError, match="ensembling: expected a decay of 0 or more, found -1"):
        Policy.load(tmp_path / "run", ensembling=-1.0)
