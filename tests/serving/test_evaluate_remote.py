"""An evaluation against a server gives what it gives in one process."""

import json
import sys
from pathlib import Path

import pytest

from mllm_act import envs, evaluate, serve
from mllm_act.errors import UserError
from mllm_act.policy import Policy
from tests.serving.server_thread import running

pytestmark = pytest.mark.slow


def test_evaluating_a_server_gives_the_same_results(
    workdir: Path, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(envs.ENVS, "tiny", "tests.envs.tiny_env")

    def run(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate", "--env=tiny", "--tasks=all", "--workers=1", "--no-videos",
                                          f"--out={tmp_path / name}", "--sample", *options])  # fmt: skip
        evaluate.main()
        return (tmp_path / name / "episodes.csv").read_text()

    alone = run("alone", f"--checkpoint={workdir}", "--envs=2")
    loaded = serve.prepare(policy, (2,), 2, sample=True)
    with running(loaded, sessions=2) as server:
        remote = run("remote", f"--policy={server.url}", "--envs=2")
        with pytest.raises(UserError, match="--policy: expected a simulator and --out"):
            run("other", f"--policy={server.url}", "--ensembling=0.1")
        with pytest.raises(UserError, match="one of them, found both"):
            run("other", f"--policy={server.url}", f"--checkpoint={workdir}")
    assert remote == alone and len(set(alone.splitlines())) == 7
    found = json.loads((tmp_path / "remote" / "summary.json").read_text())
    assert found["checkpoint"] == server.url and found["chunk"] == 4
