"""Importing the official episodes of Language Rearrangement: restricted unpickling, conversion, and the real files."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from data_pipelines import import_langr
from data_pipelines.import_langr import import_episodes, kind_of, load
from mllm_act import envs
from mllm_act.envs.language_rearrangement import language_rearrangement, official
from mllm_act.envs.language_rearrangement.entities import OPEN_AIR, RECEPTACLE
from mllm_act.envs.language_rearrangement.expert import Expert
from mllm_act.envs.language_rearrangement.world import Task
from mllm_act.errors import UserError

OFFICIAL = Path(os.environ.get("LANGR_PICKLES", "../shared/data/langr_episodes")).resolve()
SPLITS = envs.splits("language_rearrangement")
NAMES = ["016_pear_:0000", "018_plum_:0000", *(f"0{i}_can_:000{i}" for i in range(14))]


def raw_episode(number: int) -> dict[str, Any]:
    """An episode in the layout of the official files: two objects on each of the open receptacles."""
    receptacles = [RECEPTACLE[word] for word in OPEN_AIR for _ in range(2)]
    placed = list(zip(range(len(receptacles)), receptacles, strict=True))
    return {
        "instruction": f"Move a pear to the sofa {number}.",
        "instruct_id": "f0917e29",
        "scene_id": "data/v3_sc3_staging_00.scene_instance.json",
        "goal_preds": {"expr_type": "AND", "quantifier": "EXISTS",
                       "inputs": [{"name": "X", "expr_type": "pear"}],
                       "sub_exprs": [f"on_top(X, {RECEPTACLE['sofa']})", "not_holding()"]},
        "subgoals": [[f"holding({NAMES[0]})", f"robot_at({RECEPTACLE['fridge']})"]],
        "start_preds": [],
        "rigid_objs": np.array([[i, i] for i, _ in placed]),
        "name_to_receptacle": np.array([[100 + i, 200 + i] for i, _ in placed]),
    }  # fmt: skip


def content(episodes: int = official.EPISODES) -> dict[str, Any]:
    transforms = np.tile(np.eye(4, dtype=np.float32), (14, 1, 1))
    transforms[:, [0, 2], 3] = [[2.0 * (i // 2), (i % 2) - 3.0 * (i // 6)] for i in range(14)]
    names = {i: NAMES[i].partition("_:")[0] + ".object_config.json" for i in range(14)}
    names |= {100 + i: NAMES[i].partition("_:")[0] + "_:0000" for i in range(14)}
    names |= {200 + i: RECEPTACLE[OPEN_AIR[i // 2]] for i in range(14)}
    return {"all_transforms": transforms, "idx_to_name": names,
            "all_eps": [raw_episode(i) for i in range(episodes)]}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """The eleven files, one of them with changes."""
    folder.mkdir(exist_ok=True)
    whole = pickle.dumps(content())
    for split in official.SPLITS:
        (folder / f"{split}.pickle").write_bytes(whole)
    (folder / "context.pickle").write_bytes(pickle.dumps(content() | changes))
    return folder


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import_episodes(write(tmp_path / "pickles"), tmp_path / "json")
    monkeypatch.setenv(official.VARIABLE, str(tmp_path / "json"))
    return tmp_path / "json"


def test_the_episodes_are_plain_json_and_play(converted: Path) -> None:
    found = json.loads((converted / "context.json").read_text())
    assert found["format"] == 1 and len(found["episodes"]) == 100
    first = official.episode("context", 0)
    assert first.instruction == "Move a pear to the sofa 0." and len(first.things) == 14
    assert {thing.kind for thing in first.things} == {"pear", "plum", "can"}
    env = envs.make("language_rearrangement", render=False)
    job = ("rearrange", SPLITS["context"][3], 0)
    assert str(env.reset(*job)["instruction"]) == "Move a pear to the sofa 3."
    # The seed only draws where the robot starts.
    other = language_rearrangement.episode("rearrange", job[1], 1)
    mine = language_rearrangement.episode(*job)
    assert other.things == mine.things and other.start != mine.start
    success = False
    for _ in range(12):
        _, reward, success = env.step(env.expert_action())
        if success:
            break
    assert success and reward >= 10


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/never",)


def test_a_foreign_global_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "context.pickle"
    for content, name in ((Evil(), r"(posix|nt)\.system"), (Path("x"), r"pathlib\.")):
        file.write_bytes(pickle.dumps({"all_eps": content}))
        with pytest.raises(
            UserError, match=rf"context\.pickle: expected NumPy arrays.*found '{name}.*do not trust"
        ):
            load(file)
    assert not Path("/tmp/never").exists()


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps([1])]
)
def test_a_damaged_file_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "context.pickle").write_bytes(data)
    with pytest.raises(
        UserError, match=r"context\.pickle: expected an episode file, found .*get the file again"
    ):
        load(tmp_path / "context.pickle")


def test_bad_episodes_are_named(tmp_path: Path) -> None:
    source, out = tmp_path / "pickles", tmp_path / "json"

    def refused(pattern: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=pattern):
            import_episodes(write(source, **changes), out)

    names = content()["idx_to_name"]
    refused(
        r"context\.pickle, episode 0: expected a known receptacle, found 'receptacle_aabb_Sofa_frl' \(did you mean",
        idx_to_name=names | {200: "receptacle_aabb_Sofa_frl"},
    )
    refused("expected an object of a known class, found 'teapot_:0000'",
            idx_to_name=names | {100: "teapot_:0000"})  # fmt: skip
    odd = raw_episode(0) | {"subgoals": [["flies(pear)"]]}
    refused(r"episode 0: expected a predicate, found 'flies\(pear\)'", all_eps=[odd])
    odd = raw_episode(0) | {"subgoals": [["holding(unicorn)"]]}
    refused(r"expected a known object in 'holding\(unicorn\)', found 'unicorn'", all_eps=[odd])
    refused(
        "expected episodes of Language Rearrangement, found others", all_eps=[{"instruction": "x"}]
    )
    write(source)
    (source / "rephrasing.pickle").unlink()
    with pytest.raises(
        UserError, match=r"expected the eleven episode files, found no rephrasing\.pickle"
    ):
        import_episodes(source, out)
    assert not out.exists()


def test_missing_and_damaged_json_is_named(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = converted / "context.json"
    good = json.loads(file.read_text())

    def refused(pattern: str, value: Any) -> None:
        official.read.cache_clear()
        file.write_text(value if isinstance(value, str) else json.dumps(value))
        with pytest.raises(UserError, match=pattern):
            official.episode("context", 0)

    refused(r"context\.json: expected a JSON object", "{")
    refused("expected format 1 of split context, found 2", good | {"format": 2})
    refused("expected 100 episodes, found 3", good | {"episodes": good["episodes"][:3]})
    refused("expected episodes, found something else", good | {"episodes": [{}]})
    good["episodes"][5]["things"][0][2] = "receptacle_aabb_sinkk"
    refused(
        r"context\.json, episode 5: expected a known receptacle, found 'receptacle_aabb_sinkk'",
        good,
    )
    official.read.cache_clear()
    file.unlink()
    with pytest.raises(
        UserError, match=r"split context, found no context\.json; get the episode files"
    ):
        official.episode("context", 0)
    monkeypatch.delenv(official.VARIABLE)
    with pytest.raises(UserError, match="LANGR_EPISODES: expected the folder.*found it not set"):
        official.episode("context", 0)


WORDINGS = {
    "42f1b012": ["Take a `target_object_name` from the `source_receptacle_name` to the `target_receptacle_name`"],
    "f0917e29": ["Bring the `target_object_name` to the `target_receptacle_name`."],
    "9a1dd6ee": ["Clear the `target_object_name` off the `target_receptacle_name`."],
    "fd8dd56c": ["`object1` and `object2` to the `targ_recep`"],
    "6e7f4383": ["Swap `object1` on `receptacle1` and `object2` on `receptacle2`?"],
    "6e3da8a1": ["Shut it."], "68216d8c": ["Open it."], "311525c5": ["To the `target_receptacle_name`."],
    "2f2d797d": ["Seek a `target_object_name`"],
}  # fmt: skip


def test_llarps_own_wordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write(tmp_path / "pickles"), tmp_path / "json"
    file = tmp_path / "instructions.yaml"
    entries: dict[str, Any] = {key: {"lang": {"train": texts}} for key, texts in WORDINGS.items()}
    for key, variant in (("f0917e29", "688ee521"), ("fd8dd56c", "b369767a")):
        entries[key]["semantics"] = {variant: {"lang": {"train": ["Lay the table."]}}}
    file.write_text(yaml.safe_dump({"instructions": entries}))
    import_episodes(source, out, file)
    notices = [line for line in capsys.readouterr().out.splitlines() if line.startswith("notice")]
    assert (
        len(notices) == 11 and "context.pickle is not the file that LLaRP published" in notices[6]
    )
    monkeypatch.setenv(official.VARIABLE, str(out))
    said = {}
    for configuration in range(60):
        found = language_rearrangement.episode("llarp", configuration, 0)
        said[found.template] = found.instruction
    assert said["close-fridge"] == "Shut it." and said["lay-a-place"] == "Lay the table."
    assert re.fullmatch(r"Take a \w+( cube)? from the [\w ]+ to the [\w ]+\.", said["move-from-to"])
    assert re.fullmatch(r"Clear the [\w ]+ off the [\w ]+\.", said["take-away"])
    assert re.fullmatch(r"Swap [\w ]+ on [\w ]+ and [\w ]+ on [\w ]+\?", said["swap"])
    del entries["311525c5"]
    file.write_text(yaml.safe_dump({"instructions": entries}))
    with pytest.raises(
        UserError,
        match="--instructions=.*expected LLaRP's instructions.yaml.*311525c5.*get the file",
    ):
        import_episodes(source, out, file)
    official.wordings_path(out).unlink()
    official._wordings.cache_clear()
    with pytest.raises(
        UserError,
        match=r"wordings for the task llarp, found no instructions\.json.*--instructions=",
    ):
        language_rearrangement.episode("llarp", 0, 0)


def test_classes_of_objects() -> None:
    for name, kind in {
        "065-g_cups": "cup", "077_rubiks_cube": "cube", "036_wood_block": "block", "072-b_toy_airplane": "toy",
        "frl_apartment_book_05": "book", "054_softball": "ball", "053_mini_soccer_ball": "ball",
        "007_tuna_fish_can": "can", "073-g_lego_duplo": "lego",
    }.items():  # fmt: skip
        assert kind_of(f"{name}_:0001", "here") == kind


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"no official episode files in {OFFICIAL}")
def test_the_real_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_episodes(OFFICIAL, tmp_path)
    assert "notice" not in capsys.readouterr().out
    solved = 0
    for split in official.SPLITS:
        for episode in official.read(tmp_path, split)[::25]:
            task = Task(episode)
            expert = Expert(task)
            for _ in range(32):
                if task.solved:
                    break
                task.step(expert.advise())
                expert.look()
            solved += task.solved
    assert solved == 44
    official.read.cache_clear()
    shutil.rmtree(tmp_path)


def test_every_split_has_a_file() -> None:
    assert set(official.SPLITS) <= set(SPLITS) and len(official.SPLITS) == 11
    assert import_langr.GLOBALS.keys() == {
        ("numpy", "ndarray"), ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
    }  # fmt: skip
