"""The tokenizer's training program on a small RLDS dataset."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines.reading import rlds
from data_pipelines.reading.episodes import read_actions
from mllm_act import replay, train_tokenizer
from mllm_act.action_tokenizer import fast
from mllm_act.action_tokenizer.checkpoint import load_tokenizer, tokenizer_arrays
from mllm_act.checkpoints.checkpoint import Checkpointer
from mllm_act.config import load_config
from mllm_act.envs import spec
from mllm_act.errors import UserError
from mllm_act.training.embodiments import open_sources
from tests.command_line import start
from tests.data_pipelines import tiny_rlds

pytestmark = pytest.mark.slow

SMALL = {
    "tokenizer": {"codes": 16, "width": 8, "hidden": 16},
    "quantizer": {"initial_samples": 64},
    "data": {"batch_size": 16},
    "steps": 8,
    "log_every": 2,
    "checkpoint_every": 4,
    "replay": False,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_rlds.write_lengths(tmp_path_factory.mktemp("data") / "tiny", [[30, 20], [25]])
    box = {"action_low": [-1.0] * 4, "action_high": [1.0] * 4}
    metadata = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").write_text(json.dumps(metadata | box))
    return directory


def run(
    directory: Path, workdir: Path, variant: str = "rvq", **changes: Any
) -> dict[str, np.ndarray]:
    """Runs the program in this process; returns the arrays of its last checkpoint."""
    config = load_config(f"configs/tokenizer/metaworld.py:{variant}")
    for values in (changes,) if variant.startswith("fast") else (SMALL, changes):
        config.update(values)
    config.data.directory = str(directory)
    train_tokenizer.main(config, workdir)
    return jax.device_get(tokenizer_arrays(load_tokenizer(workdir).model))


def losses(workdir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines]


@pytest.fixture(scope="module")
def whole(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    run(directory, workdir)
    return workdir


def test_metrics_report_and_checkpoint_of_a_run(directory: Path, whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    for name in ("val/mse", "val/rmse_dx_m", "val/use_0", "val/perplexity_1", "train/loss"):
        assert np.isfinite(lines[-1][name])
    assert (whole / "report" / "precision.png").stat().st_size > 10_000
    loaded = load_tokenizer(whole)
    assert loaded.step == 8 and loaded.config.codes == 16
    assert loaded.metadata["action_names"] == list(spec("metaworld").action_names)
    normalized = np.zeros((3, 4), np.float32)
    assert loaded.model.decode(loaded.model.encode(jnp.asarray(normalized))).shape == (3, 4)


def test_resumed_is_uninterrupted_bit_for_bit(
    directory: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after step 6; the newest checkpoint is that of step 4."""
    write = train_tokenizer.MetricsWriter.write

    def interrupted(self: Any, step: int, scalars: Any) -> None:
        write(self, step, scalars)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tokenizer.MetricsWriter, "write", interrupted)
        run(directory, tmp_path)
    assert load_tokenizer(tmp_path).step == 4
    resumed = run(directory, tmp_path)
    expected = jax.device_get(tokenizer_arrays(load_tokenizer(whole).model))
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    assert losses(tmp_path) == losses(whole)


def test_a_loaded_tokenizer_encodes_as_the_saved_one(whole: Path) -> None:
    first, second = (load_tokenizer(whole).model for _ in range(2))
    actions = jnp.array(np.random.default_rng(0).uniform(-1, 1, (50, 4)), jnp.float32)
    np.testing.assert_array_equal(
        first.encode(jnp.asarray(actions)), second.encode(jnp.asarray(actions))
    )
    graph, state = nnx.split(first)
    merged = nnx.merge(graph, state)
    np.testing.assert_array_equal(
        merged.decode(first.encode(jnp.asarray(actions))),
        second.decode(second.encode(jnp.asarray(actions))),
    )


@pytest.mark.parametrize("variant", ["vq,chunk=3", "fast,chunk=3"])
def test_a_tokenizer_of_chunks(
    directory: Path, tmp_path: Path, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its statistics are of single actions, its report covers all steps, and there is no replay."""
    run(directory, tmp_path, variant, replay=True)
    printed = capsys.readouterr().out
    assert "No replay: it needs chunk=1" in printed and "tokens for 3 actions" in printed
    loaded = load_tokenizer(tmp_path)
    assert loaded.config.kind == variant.split(",")[0]
    assert (loaded.config.action_dim, loaded.config.chunk) == (4, 3)
    assert len(loaded.statistics.action.min) == 4
    codes = loaded.model.encode(jnp.zeros((2, 12)))
    assert loaded.model.decode(codes).shape == (2, 12)
    summary = json.loads((tmp_path / "report" / "precision.json").read_text())
    assert [row["name"] for row in summary["dimensions"]] == ["dx", "dy", "dz", "gripper"]
    assert (summary["actions"], summary["chunk"]) == (15, 3)
    assert (tmp_path / "report" / "precision.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="single actions, found one of chunks of 3"):
        replay.measure(loaded.model, loaded.statistics, "metaworld", ["reach-v3"], tmp_path)


def test_fast_is_fitted_once_and_loads_unchanged(directory: Path, tmp_path: Path) -> None:
    first = run(directory, tmp_path, "fast")
    loaded = load_tokenizer(tmp_path)
    assert loaded.step == 0 and loaded.config.chunk == 8 and loaded.config.codes <= 512
    dataset = rlds.open_dataset(directory)
    statistics = loaded.statistics.chunked(8)
    actions = statistics.normalize_action(read_actions(dataset, "train").chunked(8))
    fitted = fast.fit(np.asarray(actions), 4, 8, 512, 10.0)
    np.testing.assert_array_equal(
        loaded.model.encode(jnp.asarray(actions)), fitted.encode(jnp.asarray(actions))
    )
    again = run(directory, tmp_path, "fast")
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    with pytest.raises(
        UserError, match=r"config.tokenizer.scale: expected 10.0.*another --workdir"
    ):
        run(directory, tmp_path, "fast", tokenizer={"scale": 5.0})
    with pytest.raises(UserError, match="another --workdir"):
        run(directory, tmp_path, "rvq")


def test_normalization_is_kept_and_the_policy_takes_it(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(directory, tmp_path, "fast", normalization="quantiles")
    assert "Actions of tiny: 4 dimensions, normalised by quantiles" in capsys.readouterr().out
    assert load_tokenizer(tmp_path).statistics.normalization == "quantiles"
    config = load_config("configs/policy/metaworld.py:fast")
    config.update_from_flattened_dict(
        {"data.directory": str(directory), "tokenizer": str(tmp_path)}
    )
    (source,) = open_sources(config).values()
    assert source.statistics.normalization == "quantiles"
    config.normalization = "range"
    with pytest.raises(UserError, match=r"^config.normalization: expected 'quantiles'.*'range'"):
        open_sources(config)
    with pytest.raises(UserError, match=r"config.normalization: expected 'quantiles'.*--workdir"):
        run(directory, tmp_path, "fast", normalization="meanstd")


def test_a_tokenizer_of_an_older_version_is_refused(directory: Path, tmp_path: Path) -> None:
    run(directory, tmp_path / "new", "fast")
    with Checkpointer(tmp_path / "new") as checkpoints:
        meta = checkpoints.meta(0)
    del meta["statistics"]["normalization"], meta["statistics"]["action"]["two_valued"]
    arrays = tokenizer_arrays(load_tokenizer(tmp_path / "new").model)
    with Checkpointer(tmp_path / "old") as checkpoints:
        checkpoints.save(0, {"model": arrays}, meta)
    with pytest.raises(
        UserError, match=r"old/checkpoints/0: .*mllm_act .*train the tokenizer again"
    ):
        load_tokenizer(tmp_path / "old")


def test_another_config_cannot_resume(directory: Path, whole: Path) -> None:
    with pytest.raises(UserError, match=r"config.quantizer.*expected .*0.95.*another --workdir"):
        run(directory, whole, quantizer={"decay": 0.5})


def test_a_loss_that_is_not_finite_names_step_and_last_checkpoint(
    directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"step \d+: expected a finite loss.*good checkpoint is"):
        run(directory, tmp_path, optimizer={"learning_rate": 1e30, "max_grad_norm": 1e30})


def test_bad_settings(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of config.log_every"):
        run(directory, tmp_path, checkpoint_every=3)
    with pytest.raises(UserError, match="config.tokenizer.chunk: expected at least 1 .*, found 0"):
        run(directory, tmp_path, "rvq,chunk=0")
    for variant, words in (
        ("rqv", "did you mean 'rvq'"),
        ("rvq,chunks=8", "expected KIND or KIND,chunk=H"),
        ("fast,chunk=many", "found chunk=many"),
    ):
        with pytest.raises(UserError, match=words):
            load_config(f"configs/tokenizer/metaworld.py:{variant}")


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, {"model": {"a": jnp.zeros(2)}}, {"step": 3})
    with pytest.raises(UserError, match="expected the key 'tokenizer'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.data.directory=/nonexistent", ("error: ", "/nonexistent")),
        ("--config.optimizer.learning_rat=1", ("did you mean 'optimizer.learning_rate'",)),
    ],
)
def test_errors_of_the_command_line(
    tmp_path: Path,
    argument: str,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    workdir, default = tmp_path / "run", "configs/tokenizer/metaworld.py:rvq"
    assert start(monkeypatch, train_tokenizer.main, default, f"--workdir={workdir}", argument) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words) and not workdir.exists()
