"""Every key of every config file and variant: printed by --help, overridden on the command line, in its range."""

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ml_collections.config_dict import ConfigDict
from ml_collections.config_flags import config_path

from mllm_act import train_tokenizer
from mllm_act.adapters import ADAPTERS
from mllm_act.config import leaves, load_config, shipped_configs
from mllm_act.errors import UserError
from mllm_act.ranges import RANGES, check_ranges
from mllm_act.training.setup import set_up
from tests.command_line import start

MIXTURE = "configs/policy/mixture.py:metaworld=rvq,babyai=semlang"
TOKENIZER = "configs/tokenizer/metaworld.py"
VALUES: dict[type, Any] = {int: 7, float: 0.5, str: "some text", tuple: ("left", "right")}


def variants() -> Iterator[str]:
    """Yields every policy config with every adapter and tiny preset, and every tokenizer config."""
    presets = ("", ",preset=tiny", ",preset=tiny_grid", ",preset=smollm2_vit_s")
    for file in sorted((shipped_configs() / "policy").glob("*.py")):
        name = f"configs/policy/{file.name}"
        for adapter, preset in itertools.product(ADAPTERS, presets):
            if file.stem == "mixture":
                yield f"{name}:metaworld={adapter},babyai=semlang{preset}"
                yield f"{name}:babyai={adapter},metaworld_demo=fast{preset}"
            else:
                yield f"{name}:{adapter}{preset}"
    for file in sorted((shipped_configs() / "rl").glob("*.py")):
        for adapter in ("semlang", "uniform"):
            yield f"configs/rl/{file.name}:{adapter}"
    for variant in ("rvq", "vq", "fast", "rvq,chunk=4", "fast,chunk=2"):
        yield f"{TOKENIZER}:{variant}"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> ConfigDict | None:
    """Runs a program that does nothing under a command line; returns the config that it was called with."""
    calls: list[ConfigDict] = []
    default = "configs/policy/metaworld.py:rvq"
    assert start(monkeypatch, lambda config, _: calls.append(config), default, *arguments) in (0, 1)
    return calls[0] if calls else None


def changed(config: ConfigDict, key: str) -> Any:
    """Returns a value of the key's type that is not its default."""
    kind = config_path.get_type(key, config)
    if kind is bool:
        return not config_path.get_value(key, config)
    return VALUES[kind] if VALUES[kind] != config_path.get_value(key, config) else VALUES[kind] + 1


def test_every_key_can_be_overridden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variant in variants():
        run(monkeypatch, f"--config={variant}", "--help")
        printed = re.findall(r"^  --config\.([\w.]+)", capsys.readouterr().out, re.MULTILINE)
        config = load_config(variant)
        assert printed == [key for key, _ in leaves(config)], variant
        values = {key: changed(config, key) for key in printed}
        overrides = [f"--config.{key}={value}" for key, value in values.items()]
        overridden = run(monkeypatch, f"--config={variant}", "--workdir=run", *overrides)
        assert overridden is not None, (variant, capsys.readouterr().err)
        assert dict(leaves(overridden)) == values, variant


@pytest.mark.parametrize(
    "override", ["steps=10", "lora.rank=4", "lora.alpha=8", "mixture.babyai.weight=2"]
)
def test_placeholders_of_a_mixture(monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    config = run(monkeypatch, f"--config={MIXTURE}", "--workdir=run", f"--config.{override}")
    assert config is not None
    key, _, value = override.partition("=")
    assert config_path.get_value(key, config) == float(value)


def test_defaults_are_in_range_and_every_number_has_one() -> None:
    for variant in variants():
        config = load_config(variant)
        check_ranges(config)
        for key, value in leaves(config):
            name = re.sub(r"^mixture\.\w+\.", "", key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            assert name in RANGES or name.startswith("mesh."), f"{variant}: {key} has no range"


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("rvq", "steps=none", "--config.steps: expected a whole number, found 'none'"),
        ("rvq", "steps=1e3", "--config.steps: expected a whole number, found '1e3'"),
        ("rvq", "epochs=many", "--config.epochs: expected a number, found 'many'"),
        ("rvq", "optimizer=1", "--config.optimizer: expected a key with a value, found a group"),
        ("rvq", "lora.rnk=1", "did you mean 'lora.rank'?"),
        ("rvqq", "steps=1", "found 'rvqq'; did you mean 'rvq'?"),
        ("rvq,preset=tinny", "steps=1", "found 'tinny'; did you mean 'tiny'?"),
        ("", "actions=a b", "--config.actions: expected names such as"),
    ],
)
def test_wrong_values_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: str,
    override: str,
    message: str,
) -> None:
    file = f"--config=configs/policy/metaworld.py:{config}".removesuffix(":")
    assert run(monkeypatch, file, "--workdir=run", f"--config.{override}") is None
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (f"{TOKENIZER}:rvqq", "did you mean 'rvq'"),
        ("configs/policy/common.py:rvqq", "did you mean 'rvq'"),
        ("configs/policy/babyai.py:semlan", "did you mean 'semlang'"),
        ("configs/policy/babyai_tiny.py:semlan", "did you mean 'semlang'"),
        ("configs/policy/metaworld_demo.py:rvqq", "did you mean 'rvq'"),
        ("configs/policy/mixture.py:metaworld=rvqq", "did you mean 'rvq'"),
        ("configs/policy/mixture.py:metaworld", "expected one of"),
        ("configs/policy/mixture.py:metawrld=rvq", "did you mean 'metaworld'"),
        ("configs/policy/mixture.py:mixture=rvq", "expected environments with a config"),
        ("configs/policy/mixture.py:metaworld=rvq,metaworld=vq", "found one of them twice"),
        ("configs/policy/mixture.py:preset=tiny", "found none"),
        ("configs/policy/mixture.py:metaworld=rvq,preset=tinny", "did you mean 'tiny'"),
        ("configs/policy/babyai.py:semlang,preset=", "preset: expected one of"),
        ("configs/policy/babyai.py:semlang,presets=tiny", "expected ADAPTER or"),
    ],
)
def test_wrong_variants(variant: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(variant)


def test_a_folder_may_have_a_colon_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "a:b.py:c" / "mine.py"
    file.parent.mkdir()
    file.write_text(
        "from ml_collections.config_dict import ConfigDict\n"
        "def get_config(variant='none'):\n    return ConfigDict({'variant': variant})\n"
    )
    assert load_config(f"{file}:x:y").variant == "x:y"
    assert load_config(str(file)).variant == "none"


OUTSIDE = {
    "seed": (-1, 2**32),
    "steps": (-1, 2**31),
    "epochs": (0.0, -1.0, float("nan"), float("inf")),
    "prompt_tokens": (0,),
    "chunk": (0, -1, 10**6),
    "normalization": ("log", "Range"),
    "data.context": (0,),
    "data.batch_size": (0, -4, 2**31 - 1),
    "data.shuffle_megabytes": (0, -1),
    "log_every": (0, -2),
    "validate_every": (0,),
    "validation_windows": (0,),
    "checkpoint_every": (0,),
    "optimizer.learning_rate": (-1e-4, float("nan"), float("inf")),
    "optimizer.warmup": (2.0, -0.1, float("nan")),
    "optimizer.b1": (1.0, -0.5),
    "optimizer.b2": (1.5, 1.0),
    "optimizer.weight_decay": (-0.1,),
    "optimizer.max_grad_norm": (0.0, float("inf")),
    "optimizer.schedule": ("cosin", ""),
    "optimizer.decay": (1.5, -0.1),
    "accumulate": (0,),
    "ema": (1.0, -0.1),
    "lora.rank": (0,),
    "lora.alpha": (0.0, float("nan")),
    "lora.dropout": (1.0, -0.1),
    "adapter.bins": (1, 0),
    "adapter.hidden": (0,),
    "validation_actions": (0,),
    "tokenizer.chunk": (0,),
    "tokenizer.quantizers": (0,),
    "tokenizer.codes": (0, 1, 10**9),
    "tokenizer.width": (0, -8, 10**9),
    "tokenizer.hidden": (0, 10**9),
    "tokenizer.layers": (0, 10**7),
    "tokenizer.vocabulary": (0, 10**9),
    "tokenizer.scale": (0.0, float("nan")),
    "quantizer.decay": (1.0, -0.1),
    "quantizer.commitment": (-1.0,),
    "quantizer.revive_below": (1.5,),
    "quantizer.initial_samples": (0,),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, v) for key in OUTSIDE for v in OUTSIDE[key]])
def test_a_value_outside_its_range(key: str, value: int | float | str) -> None:
    tried = 0
    for variant in (
        "configs/policy/metaworld.py:uniform",
        "configs/policy/babyai.py:categorical",
        f"{TOKENIZER}:vq",
        f"{TOKENIZER}:fast",
    ):
        config = load_config(variant)
        if key in dict(leaves(config)):
            config_path.set_value(key, config, value)
            tried += 1
            with pytest.raises(UserError, match=rf"^config\.{re.escape(key)}: expected .*, found"):
                check_ranges(config)
    assert tried


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("rvq", "data.batch_size", 0), ("rvq", "tokenizer.codes", 0), ("vq", "tokenizer.width", 0),
        ("rvq", "tokenizer.layers", 0), ("rvq", "log_every", 0), ("rvq", "log_every", -2), ("rvq", "seed", -1),
        ("rvq", "epochs", math.nan), ("rvq", "steps", 0), ("fast", "tokenizer.scale", math.nan),
        ("fast", "normalization", ""),
    ],
)  # fmt: skip
def test_tokenizers_are_checked_before_the_data_is_opened(
    tmp_path: Path, kind: str, key: str, value: int | float | str
) -> None:
    config = load_config(f"{TOKENIZER}:{kind}")
    config.update_from_flattened_dict({"data.directory": str(tmp_path / "none"), key: value})
    with pytest.raises(
        UserError, match=rf"^config\.{re.escape(key)}: expected .*, found {value!r}$"
    ):
        train_tokenizer.main(config, tmp_path / "run")


def test_policies_are_checked_before_the_data_is_opened() -> None:
    def refused(file: str, **values: Any) -> str:
        config = load_config(file)
        config.update_from_flattened_dict(values)
        with pytest.raises(UserError) as error:
            set_up(config)
        return str(error.value)

    tiny = "configs/policy/metaworld.py:uniform"
    assert refused(tiny, **{"optimizer.b2": 1.5}) == (
        "config.optimizer.b2: expected at least 0 and below 1, found 1.5"
    )
    key = "mixture.babyai.data.context"
    assert f"config.{key}: expected at least 1" in refused(MIXTURE, **{key: 0})
    assert "no LoRA settings for the preset 'tiny'" in refused(tiny, **{"lora.rank": 4})
    assert "choose the adapter by the variant" in refused(tiny, **{"adapter.name": "rvq"})
    assert "did you mean 'rvq'" in refused(tiny, **{"adapter.name": "rvqq"})
    assert "config.actions: expected names" in refused(tiny, actions=(1, 2))
