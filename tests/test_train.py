"""The training program: resume after a kill, NaN, dry runs, bad input. Real processes and files."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mllm_act import train
from mllm_act.checkpoints import checkpoint
from mllm_act.config import load_config
from mllm_act.errors import UserError
from mllm_act.models import presets
from mllm_act.models.layers import LoRA
from mllm_act.policy import Policy
from mllm_act.policy.load import load_network
from tests import pretrained_folder
from tests.checkpoints import documents
from tests.command_line import start
from tests.data_pipelines import tiny_rlds

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CONFIG = "configs/policy/metaworld.py:uniform"
STEPS, EVERY = 24, 8
OVERRIDES: dict[str, Any] = {
    "steps": STEPS,
    "checkpoint_every": EVERY,
    "validate_every": STEPS,
    "log_every": 1,
    "data.batch_size": 2,
    "adapter.bins": 16,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_rlds.write_lengths(tmp_path_factory.mktemp("data"), [[5, 4, 7], [6, 3]])


def run(data: Path, workdir: Path, **overrides: Any) -> None:
    """Trains in this process."""
    config = load_config(str(ROOT / CONFIG))
    config.data.directory = str(data)
    for key, value in {**OVERRIDES, **overrides}.items():
        node, _, name = key.rpartition(".")
        (config[node] if node else config)[name] = value
    train.main(config, workdir)


def command(data: Path, workdir: Path, **overrides: Any) -> list[str]:
    values = {"data.directory": data, **OVERRIDES, **overrides}
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    return [
        sys.executable,
        "-m",
        "mllm_act.train",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        *flags,
    ]


def arrays(workdir: Path, *items: str) -> dict[str, np.ndarray]:
    """Reads the arrays of the last checkpoint's items, without a model to fit them to."""
    import orbax.checkpoint as ocp

    found, step = checkpoint.find(workdir)
    result = {}
    for item in items:
        tree = ocp.StandardCheckpointer().restore(found / "checkpoints" / str(step) / item)
        result |= {name: np.asarray(value) for name, value in tree.items()}
    return result


def frozen(workdir: Path) -> dict[str, np.ndarray]:
    """Reads the frozen arrays of a run."""
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer().restore(workdir / "frozen" / "arrays")


def tiny_lora() -> presets.Preset:
    """The pretrained presets' way of training at the tiny preset's size."""
    tiny = presets.get("tiny")
    language = dataclasses.replace(tiny.model.language, lora=LoRA(rank=2))
    model = dataclasses.replace(tiny.model, language=language, weight_dtype="bfloat16")
    return presets.Preset(model, presets.LORA_AND_ADAPTER, tiny.text_tokenizer)


def losses(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, which keeps an average of the weights."""
    workdir = tmp_path_factory.mktemp("whole")
    run(data, workdir, ema=0.5)
    return workdir


def test_stopped_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"

    def interrupt(number: signal.Signals, step: int) -> tuple[int, str]:
        """Trains in another process, and sends it a signal once a step is saved; returns its end."""
        process = subprocess.Popen(
            command(data, killed, ema=0.5),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while not (killed / "checkpoints" / str(step)).exists():
            assert process.poll() is None, "the run ended before it could be interrupted"
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate()
        assert checkpoint.find(killed)[1] < STEPS
        return process.returncode, errors.decode().strip().splitlines()[-1]

    status, line = interrupt(signal.SIGTERM, EVERY)
    stopped = checkpoint.find(killed)[1]
    assert status == 128 + signal.SIGTERM
    assert line.startswith(f"SIGTERM: stopped after step {stopped} of {STEPS}, saved in {killed}/")
    assert interrupt(signal.SIGKILL, 2 * EVERY)[0] == -signal.SIGKILL
    run(data, killed, ema=0.5)

    for item in ("trained", "optimizer", "ema"):
        expected, found = arrays(whole, item), arrays(killed, item)
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=f"{item}/{name}")
    assert losses(killed) == losses(whole)
    assert sorted(losses(killed)) == list(range(1, STEPS + 1))


def test_a_dry_run_compiles_the_update_for_a_mesh_that_is_not_there(
    data: Path, tmp_path: Path
) -> None:
    overrides = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "data.batch_size": 8}
    line = [*command(data, tmp_path / "none", **overrides), "--dry_run", "--topology=cpu:8"]
    done = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True)
    report = done.stdout
    assert "Mesh: data 2, fsdp 2, tensor 2" in report and "8 windows, 1 a device" in report
    assert re.search(r"all-gather +over fsdp", report), report
    assert re.search(r"total +[0-9.]+ MiB", report) and "Prediction: none" in report
    assert not (tmp_path / "none").exists()


def test_what_is_frozen_stays_to_the_bit_and_has_no_optimizer_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's way: LoRA, Perceiver and adapter are trained; vision encoder and language base are not."""

    monkeypatch.setitem(presets.PRESETS, "tiny_lora", tiny_lora())
    run(data, tmp_path / "before", preset="tiny_lora", steps=0)
    run(data, tmp_path / "after", preset="tiny_lora", steps=3, ema=0.5)
    before, after = (frozen(tmp_path / name) for name in ("before", "after"))
    assert before.keys() == after.keys() and any("vision/blocks" in name for name in before)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    trained = arrays(tmp_path / "after", "trained")
    untouched = arrays(tmp_path / "before", "trained")
    moved = {name for name in trained if not np.array_equal(trained[name], untouched[name])}
    assert {"mllm/language/blocks/q/lora_b", "adapters/tiny/head"} <= moved
    acting = load_network(tmp_path / "after", jax.devices()[0]).arrays
    average = arrays(tmp_path / "after", "ema")
    assert average.keys() == trained.keys()
    for name, array in average.items():
        np.testing.assert_array_equal(acting[name], array, err_msg=name)
    assert not np.array_equal(average["adapters/tiny/head"], trained["adapters/tiny/head"])
    moments = [name for name in arrays(tmp_path / "after", "optimizer") if "mllm/" in name]
    assert moments and all("lora_" in name or "perceiver/" in name for name in moments)


def test_a_pretrained_base_is_the_folders_and_its_checkpoint_needs_no_folder_and_no_preset(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = dataclasses.replace(tiny_lora(), text_tokenizer="pretrained")
    texts = ["Prompt: control the robot. USER: do task 0 ASSISTANT: ", "do task 1"]
    weights = pretrained_folder.write(tmp_path / "weights", preset.model, texts, 400)
    given = {"preset": "small", "pretrained": str(tmp_path / "weights"), "prompt_tokens": 64}
    with monkeypatch.context() as patched:
        patched.setitem(presets.PRESETS, "small", preset)
        run(data, tmp_path / "run", steps=0, **given)
    start, base = arrays(tmp_path / "run", "trained"), frozen(tmp_path / "run")
    for path, array in weights.items():
        np.testing.assert_array_equal(base[f"mllm/{path}"], array, err_msg=path)
    first, bins = preset.model.language.action_tokens, OVERRIDES["adapter.bins"]
    rows = weights["language/embedding"][first : first + bins].astype(np.float32)
    np.testing.assert_array_equal(start["adapters/tiny/embedding"], rows)
    np.testing.assert_array_equal(start["adapters/tiny/head"], rows)

    shutil.rmtree(tmp_path / "weights")
    policy = Policy.load(tmp_path / "run")
    assert policy.meta["pretrained"] == [{"source": "random", "revision": "0"}]
    images = {"corner4": np.zeros((1, 16, 16, 3), np.uint8)}
    action, _ = policy.act(
        images, np.zeros((1, 3), np.float32), ["do task 1"], np.array([True]), policy.start(1)
    )
    assert action.shape == (1, 4) and np.isfinite(action).all()
    with pytest.raises(UserError, match=r"instruction: expected a prompt of at most 4072 tokens"):
        policy.act(images, np.zeros((1, 3)), ["z9" * 3000], np.array([True]), policy.start(1))


def test_prompts_that_use_rows_of_actions_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_lora()
    model = dataclasses.replace(
        tiny.model, language=dataclasses.replace(tiny.model.language, action_tokens=60)
    )
    preset = presets.Preset(model, tiny.trained, "pretrained")
    pretrained_folder.write(tmp_path / "weights", model, ["do task 0"], 400)
    monkeypatch.setitem(presets.PRESETS, "small", preset)
    given = {"preset": "small", "pretrained": str(tmp_path / "weights"), "prompt_tokens": 64}
    with pytest.raises(UserError, match="expected prompts without the ids 60 to 75, .* reword it"):
        run(data, tmp_path / "run", steps=0, **given)


def test_a_run_without_its_frozen_part_or_of_another_architecture_is_refused(
    data: Path, tmp_path: Path
) -> None:
    run(data, tmp_path / "run", steps=0)
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "half" / "checkpoints")
    for use in (Policy.load, lambda path: run(data, path, steps=0)):
        with pytest.raises(UserError, match="half/frozen: expected the frozen parameters of the"):
            use(tmp_path / "half")

    def resize(meta: dict[str, Any]) -> None:
        meta["network"]["model"]["language"]["vocabulary"] = 1030

    documents.edit(tmp_path / "run", resize)
    message = r"language/embedding \(expected float32\[1030, 128\], found float32\[1024, 128\]\)"
    with pytest.raises(UserError, match=message):
        Policy.load(tmp_path / "run")
    with pytest.raises(UserError, match="network.model.language.vocabulary: expected 1030"):
        run(data, tmp_path / "run", steps=0)
    documents.edit(
        tmp_path / "run", lambda meta: meta["network"]["model"]["language"].update(windows=3)
    )
    with pytest.raises(UserError, match="network: expected the description .*windows"):
        Policy.load(tmp_path / "run")


def test_nan_stops_the_run_and_names_step_and_last_good_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    overrides = {"optimizer.learning_rate": 1e12, "optimizer.warmup": 0.0, "checkpoint_every": 1}
    with pytest.raises(UserError, match=r"step \d+: expected a finite loss") as caught:
        run(data, tmp_path, **overrides)
    workdir, step = checkpoint.find(tmp_path)
    assert f"the last good checkpoint is {workdir}/checkpoints/{step};" in str(caught.value)
    assert all(np.isfinite(array).all() for array in arrays(tmp_path, "trained").values())


def test_the_last_good_checkpoint_has_finite_weights(data: Path, tmp_path: Path) -> None:
    """One update of a size that no float holds: the loss before it was fine, what it left is not."""
    overrides = {"optimizer.learning_rate": 1e38, "optimizer.warmup": 0.0, "checkpoint_every": 1}
    with pytest.raises(UserError, match=r"weight_norm inf|weight_norm nan"):
        run(data, tmp_path, **overrides)
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.find(tmp_path)


def test_an_untrained_policy_is_not_taken_for_anothers(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, steps=0)
    run(data, tmp_path, steps=0)
    with pytest.raises(UserError, match="config.adapter.bins: expected 16"):
        run(data, tmp_path, steps=0, **{"adapter.bins": 32})


def test_resuming_with_another_config_is_refused(data: Path, whole: Path) -> None:
    with pytest.raises(
        UserError, match=r"config.seed: expected 0 as in the checkpoint there, found 1"
    ):
        run(data, whole, ema=0.5, seed=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter.name": "rqv"}, "did you mean 'rvq'"),
        ({"adapter.name": "rvq"}, "config.adapter.bins: expected settings of the adapter 'rvq'"),
        ({"preset": "tinny"}, "did you mean 'tiny'"),
        ({"adapter.bins": 513}, "at most 512 codes"),
        ({"prompt_tokens": 3}, "prompt_tokens"),
        ({"prompt_template": "do it"}, r"expected \{instruction\}"),
        ({"mesh.data": 3}, "config.mesh: expected sizes"),
        ({"history": "all"}, "history"),
        ({"data.directory": "/nowhere"}, "no such directory"),
        ({"data.context": 0}, "data.context"),
        ({"steps": -1}, "config.steps"),
        ({"validation_windows": 0}, "validation_windows"),
        ({"mesh.fsdp": 0}, "config.mesh"),
        ({"bridge": "perciever"}, "bridge: expected one or more of projector, perceiver, mixer"),
        ({"weight_dtype": "int8"}, "weight_dtype: expected one of float32, bfloat16, float8"),
        (
            {"weight_dtype": "bfloat16"},
            "config.weight_dtype: expected float32 where the matrices are",
        ),
        ({"remat": "some"}, "remat: expected one of none, projections, full"),
        (
            {"preset": "smollm2_vit_s", "pretrained": "", "lora.targets": "query"},
            "lora.targets: expected a pattern that matches some of q",
        ),
        (
            {"preset": "smollm2_vit_s", "pretrained": "", "lora.targets": "q("},
            "lora.targets: expected a regular expression",
        ),
        ({"lora.targets": "q"}, "config.lora.targets: expected no LoRA settings for the preset"),
        ({"lora.rank": 0}, "config.lora.rank: expected at least 1"),
        ({"lora.alpha": -1.0}, "config.lora.alpha: expected a finite number above 0"),
        ({"lora.dropout": 1.0}, "config.lora.dropout"),
        (
            {"prompt_tokens": 4085},
            "config.prompt_tokens: expected at most 4072, what 3 steps leave",
        ),
        ({"data.context": 2000}, "config.prompt_tokens: expected at most -11904"),
        ({"preset": "smollm2_vit_s", "pretrained": "nowhere"}, "nowhere: expected a folder"),
        (
            {"preset": "smollm2_vit_s", "pretrained": "", "data.batch_size": 2**16},
            r"memory: expected a run that fits .* for activations; try --config.remat=full",
        ),
    ],
)
def test_bad_config_is_one_clear_error(
    data: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(data, tmp_path, **overrides)
    assert not (tmp_path / "checkpoints").exists()


def test_unknown_config_key_names_the_nearest_and_exits_1(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = command(data, tmp_path, **{"optimizer.learnin_rate": 1})[3:]
    assert start(monkeypatch, train.main, CONFIG, *arguments) == 1
    assert "did you mean 'optimizer.learning_rate'?" in capsys.readouterr().err.splitlines()[-1]
