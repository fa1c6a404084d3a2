"""The program, with its options and its end."""

import importlib
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
from mllm_act_client import Client
from mllm_act_client.client import BadRequest

from mllm_act import serve
from mllm_act.errors import Interrupted, UserError, signals
from tests.serving.conftest import observation


def main(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", *options])
    serve.main()


@pytest.mark.slow
def test_the_program_serves_until_sigterm(
    workdir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    found: list[object] = []

    def visit() -> None:
        url = f"ws://127.0.0.1:{port}"
        try:
            try:
                Client(url, wait=120)
            except BadRequest as error:
                found.append(str(error))
            with Client(url, api_key="0123456789abcdef", wait=120) as client:
                found.append(client.infer(observation(0))["actions"].shape)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    visitor = threading.Thread(target=visit)
    visitor.start()
    with (
        signals.handled(),
        pytest.raises(Interrupted, match="SIGTERM: stopped; all that was in work"),
    ):
        main(
            monkeypatch, f"--checkpoint={workdir}", f"--port={port}", "--sessions=1", f"--api-key-file={key}",
            f"--record={tmp_path / 'requests'}",
        )  # fmt: skip
    visitor.join()
    assert "expected an API key" in str(found[0]) and found[1] == (4, 4)
    assert f"on ws://127.0.0.1:{port}" in capsys.readouterr().out
    assert len(list((tmp_path / "requests").iterdir())) == 1
    signals.deferred = False


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("mllm_act.serv")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(SystemExit, match=r"error: .*msgpack.*; pip install 'mllm-act\[serve\]'"):
        importlib.import_module("mllm_act.serve")


def test_batch_sizes() -> None:
    assert serve.batch_sizes(1) == (1,)
    assert serve.batch_sizes(8) == (1, 2, 4, 8)
    assert serve.batch_sizes(12) == (1, 2, 4, 8, 12)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("--image=front", "--image: expected CAMERA:HEIGHTxWIDTH, found 'front'"),
        ("--sessions=0", "--sessions: expected 1 to 1e6, found 0"),
        ("--wait-ms=nan", "--wait-ms: expected 0 to 1e6, found nan"),
        ("--tls-key=key.pem", "--tls-cert, --tls-key: expected both or none"),
        ("--api-key-file=/none", "--api-key-file=/none: expected a file with the key"),
    ],
)
def test_options_are_checked_first(
    option: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as raised:
        main(monkeypatch, "--checkpoint=nothing", option)
    assert str(raised.value).startswith(error)
