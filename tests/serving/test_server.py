"""The server, over real sockets: protocol, bad messages, draining."""

import asyncio
import hmac
import io
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import msgpack
import numpy as np
import pytest
import websockets.sync.client as websocket
from mllm_act_client import Client, Disconnected, wire
from mllm_act_client.client import BadRequest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from mllm_act import serve
from mllm_act.serving.recording import Recorder
from tests.serving.conftest import observation
from tests.serving.server_thread import Loaded, Running, running

pytestmark = pytest.mark.slow


def http(server: Running, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metadata_says_all_that_a_client_needs(server: Running, policy) -> None:
    with Client(server.url) as client:
        found = client.metadata
    assert json.loads(json.dumps(found)) == found
    assert found["observation"]["observation/corner4"]["shape"] == [16, 16, 3]
    assert found["observation"]["observation/state"]["shape"] == [3]
    assert found["action"]["shape"] == [4, 4] and found["action"]["units"][0] == "m"
    assert found["chunk"] == 4 and found["context"] == 3 and found["step"] == 0
    assert found["statistics"] == policy.meta["statistics"]["tiny"]["fingerprint"]
    assert len(found["session"]) == 32


def test_the_clients_histories_are_apart(server: Running) -> None:
    """Three clients at once get what each gets alone, whatever batch it was in."""

    def episode(client: Client, seed: int) -> list[np.ndarray]:
        answers = []
        for i in range(5):
            message = observation(seed + i) | {"obs_id": i, "timestamp": 0.5, "reset": i == 0}
            answer = client.infer(message)
            assert (answer["obs_id"], answer["timestamp"], answer["step"]) == (i, 0.5, i)
            answers.append(answer["actions"])
        return answers

    seeds = (0, 100, 200)
    with Client(server.url) as client:
        expected = [episode(client, seed) for seed in seeds]
    found: dict[int, list[np.ndarray]] = {}

    def play(seed: int) -> None:
        with Client(server.url) as client:
            found[seed] = episode(client, seed)

    threads = [threading.Thread(target=play, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, answers in zip(seeds, expected, strict=True):
        assert answers[0].shape == (4, 4) and answers[0].dtype == np.float32
        np.testing.assert_allclose(found[seed], answers, atol=1e-5)
    assert not np.allclose(expected[0], expected[1])


def test_bytes_on_the_wire(server: Running) -> None:
    """The example of openpi's encoding, byte for byte, and an answer that its client can read."""
    array = np.zeros((2, 3), np.uint8)
    expected = (
        b"\x81\xa1i\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x06" + bytes(6)
        + b"\xc4\x05dtype\xa3|u1\xc4\x05shape\x92\x02\x03"
    )  # fmt: skip
    from mllm_act.serving import wire as servers

    assert wire.pack({"i": array}) == servers.pack({"i": array}) == expected
    with websocket.connect(server.url, compression=None) as connection:
        msgpack.unpackb(connection.recv())  # the metadata is plain msgpack
        connection.send(wire.pack(observation(0)))
        answer = msgpack.unpackb(connection.recv())
        assert set(answer["actions"]) == {b"__ndarray__", b"data", b"dtype", b"shape"}
        assert {"policy_timing", "server_timing"} <= set(answer)
        assert "prev_total_ms" not in answer["server_timing"]
        connection.send(wire.pack(observation(0)))
        assert "prev_total_ms" in msgpack.unpackb(connection.recv())["server_timing"]


def jpeg(image: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def test_images_may_be_compressed(server: Running) -> None:
    message = observation(0)
    image = message["observation/corner4"]
    with Client(server.url) as client:
        raw = client.infer(message | {"reset": True})["actions"]
        png = message | {"observation/corner4": jpeg(image, "png"), "reset": True}
        np.testing.assert_array_equal(client.infer(png)["actions"], raw)
        lossy = jpeg(image, "jpeg")
        pixels = np.asarray(Image.open(io.BytesIO(lossy)))
        as_jpeg = message | {"observation/corner4": lossy, "reset": True}
        as_pixels = message | {"observation/corner4": pixels, "reset": True}
        np.testing.assert_array_equal(
            client.infer(as_jpeg)["actions"], client.infer(as_pixels)["actions"]
        )


BAD = {
    "observation/corner4: expected uint8[16, 16, 3]": {
        "observation/corner4": np.zeros((8, 16, 3), np.uint8)
    },
    "a JPEG or PNG of that size as bytes, found float32[16, 16, 3]": {
        "observation/corner4": np.zeros((16, 16, 3), np.float32)
    },
    "expected a JPEG or PNG of 16 x 16 pixels, found 17 x 16": {
        "observation/corner4": jpeg(np.zeros((16, 17, 3), np.uint8), "png")
    },
    "found 5 bytes that are none": {"observation/corner4": b"image"},
    "observation/state: expected float32[3], found float32[2]": {
        "observation/state": np.zeros(2, np.float32)
    },
    "expected finite numbers": {"observation/state": np.array([0, np.nan, 0], np.float32)},
    "prompt: expected a text": {"prompt": 3},
    "prompt: expected an instruction whose prompt has at most 16 tokens": {"prompt": "x y z " * 20},
    "did you mean observation/corner4?": {"observation/corner": 1},
    "reset: expected true or false": {"reset": "yes"},
    "obs_id: expected a number or a text": {"obs_id": [1]},
    "random_key: expected it only where the server samples": {"random_key": np.zeros(2, np.uint32)},
    "resume: expected it alone": {"resume": "me"},
    "committed: expected float32[d, 4], d from 1 to 2, found float32[3, 4]": {
        "committed": np.zeros((3, 4), np.float32)
    },
    "committed: expected finite numbers": {"committed": np.full((1, 4), np.inf, np.float32)},
    "committed: expected it only with whole chunks": {
        "committed": np.zeros((1, 4), np.float32),
        "step_by_step": True,
    },
}


def test_an_answer_begins_with_the_committed_actions(server: Running) -> None:
    with Client(server.url) as client:
        assert client.metadata["max_delay"] == 2
        given = client.infer(observation(0) | {"reset": True})["actions"][:2] * 0.5
        answer = client.infer(observation(1) | {"committed": given})["actions"]
        np.testing.assert_array_equal(answer[:2], given)
        assert answer.shape == (4, 4)


def test_a_bad_message_is_answered_by_name_and_the_connection_goes_on(server: Running) -> None:
    with Client(server.url) as client, Client(server.url) as other:
        before = client.infer(observation(0) | {"reset": True})["actions"]
        for expected, change in BAD.items():
            with pytest.raises(BadRequest) as error:
                client.infer(observation(1) | change)
            assert expected in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(
            BadRequest, match="observation/corner4: expected it in every observation"
        ):
            client.infer({"prompt": "x"})
        with pytest.raises(BadRequest, match="message: expected the keys"):
            client.infer({})
        answer = client.infer(observation(1))
        assert answer["step"] == 1, "a bad message is no part of the history"
        other.infer(observation(0))
        np.testing.assert_allclose(
            other.infer(observation(1))["actions"], answer["actions"], atol=1e-5
        )
        assert not np.allclose(answer["actions"], before)
        assert client.reconnects == 0
    with websocket.connect(server.url, compression=None) as connection:
        connection.recv()
        connection.send("text")  # openpi's clients take a text frame for an error
        assert (
            connection.recv()
            == "message: expected a binary frame with a msgpack map, found a text frame"
        )
        connection.send(b"\xc1")
        assert str(connection.recv()).startswith(
            "message: expected a msgpack map with NumPy arrays"
        )


def test_health_and_metrics(server: Running) -> None:
    with Client(server.url) as client:
        client.infer(observation(0))
    assert http(server, "/healthz") == (200, "OK\n")
    status, text = http(server, "/metrics")
    assert status == 200 and "mllm_act_answer_seconds_bucket" in text
    assert http(server, "/")[0] == 426  # not a WebSocket handshake


def test_a_slow_policy_loses_no_client_and_is_drained(loaded: Loaded) -> None:
    """Inference takes ten times as long as a ping may; then the server stops in the middle of a request."""
    slots, checker, metadata = loaded
    act = slots.act
    entered = threading.Event()

    def slow(*args: object) -> object:
        entered.set()
        time.sleep(2.0)
        return act(*args)

    with running(loaded, ping=0.2) as server, Client(server.url) as client:
        slots.act = slow
        try:
            answers = []
            thread = threading.Thread(target=lambda: answers.append(client.infer(observation(0))))
            thread.start()
            assert entered.wait(10)
            assert http(server, "/healthz") == (200, "OK\n")
            server.stop()
            thread.join()
        finally:
            del slots.act
        assert answers[0]["step"] == 0 and client.reconnects == 0


def test_a_failure_of_the_policy_is_told_and_the_server_goes_on(
    loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    slots = loaded[0]

    def fail(*args: object) -> None:
        raise RuntimeError("secret of the device")

    with running(loaded) as server, Client(server.url) as client, Client(server.url) as other:
        expected = client.infer(observation(0))["actions"]
        other.infer(observation(5))
        slots.act = fail
        try:
            with pytest.raises(
                BadRequest, match="inference failed, and the session's history"
            ) as error:
                client.infer(observation(1))
        finally:
            del slots.act
        assert "secret" not in str(error.value) and "secret of the device" in caplog.text
        assert other.infer(observation(0))["step"] == 0
        np.testing.assert_allclose(client.infer(observation(0))["actions"], expected, atol=1e-5)


def test_handshakes_wait_until_everything_is_compiled(loaded: Loaded) -> None:
    from mllm_act.serving.server import Options

    go = threading.Event()

    class Slow(Running):
        def __init__(self) -> None:
            super().__init__(self._later, Options(port=free), 8, None)

        def _later(self) -> Loaded:
            assert go.wait(60)
            return loaded

    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    server = Slow()
    server.port = free
    clients: list[Client] = []
    thread = threading.Thread(
        target=lambda: clients.append(Client(f"ws://127.0.0.1:{free}", wait=60))
    )
    thread.start()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            status, text = http(server, "/healthz")
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    assert (status, text) == (503, "starting\n")
    with pytest.raises(InvalidStatus):
        websocket.connect(f"ws://127.0.0.1:{free}")
    go.set()
    thread.join()
    assert clients[0].metadata["ready"] and http(server, "/healthz") == (200, "OK\n")
    clients[0].close()
    server.stop()


def test_key_limits_and_rate(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(1) or compare(a, b))
    with running(loaded, sessions=2, key="k" * 20, rate=2.0, largest=2000) as server:
        with pytest.raises(BadRequest, match="expected an API key"):
            Client(server.url)
        with pytest.raises(BadRequest, match="expected an API key"):
            Client(server.url, api_key="k" * 19)
        assert len(compared) == 2
        with Client(server.url, api_key="k" * 20) as client:
            for i in range(2):
                client.infer(observation(i))
            with pytest.raises(BadRequest, match="rate: expected at most 2 messages per second"):
                for i in range(50):
                    client.infer(observation(i))
            with Client(server.url, api_key="k" * 20), pytest.raises(Disconnected):
                Client(server.url, api_key="k" * 20, wait=0.3)  # the third
            client._connection.send(bytes(3000))
            with pytest.raises(ConnectionClosed) as error:
                client._connection.recv(timeout=10)
            assert error.value.rcvd.code == 1009  # too large


def test_the_newest_observation_wins_where_a_client_asks_for_it(server: Running) -> None:
    with websocket.connect(server.url, compression=None) as connection:
        connection.recv()
        for i in range(8):
            connection.send(wire.pack(observation(i) | {"latest": True, "obs_id": i}))
        answers = [wire.unpack(connection.recv()) for _ in range(8)]
    assert [answer["obs_id"] for answer in answers] == list(range(8))
    dropped = sum("dropped" in answer and "actions" not in answer for answer in answers)
    assert "actions" in answers[-1] and answers[-1]["dropped"] == dropped
    assert answers[-1]["step"] == 7 - dropped


def test_requests_are_recorded_and_replayed(loaded: Loaded, tmp_path: Path) -> None:
    with running(loaded, recorder=Recorder(tmp_path)) as server:
        for episode in range(2):
            with Client(server.url) as client:
                for i in range(3):
                    client.infer(observation(episode + i) | {"step_by_step": i == 2})
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 4  # of two sessions; answers of one file have one shape
    assert serve.replay(tmp_path, loaded[0]).startswith("6 requests: 6 answered equally")
    with np.load(paths[0], allow_pickle=False) as file:
        arrays = dict(file)
    np.savez(paths[0], **{**arrays, "actions": arrays["actions"] + 0.5})
    text = serve.replay(tmp_path, loaded[0])
    assert f"{6 - len(arrays['actions'])} answered equally" in text and "is 0.5" in text


def test_tls(loaded: Loaded, tmp_path: Path) -> None:
    import subprocess

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    trusted = ssl.create_default_context(cafile=str(cert))
    with running(loaded, tls=serve._tls(cert, key)) as server:
        with Client(f"wss://127.0.0.1:{server.port}", ssl=trusted) as client:
            assert client.infer(observation(0))["actions"].shape == (4, 4)
        with pytest.raises(Disconnected):
            Client(server.url, wait=0.3)


def test_a_stopped_server_leaves_no_thread(loaded: Loaded) -> None:
    before = set(threading.enumerate())
    with running(loaded) as server, Client(server.url) as client:
        client.infer(observation(0))
    left = {t.name for t in set(threading.enumerate()) - before if t.is_alive()}
    assert not {name for name in left if name in ("inference", "record")}
    assert asyncio.get_event_loop_policy() is not None
