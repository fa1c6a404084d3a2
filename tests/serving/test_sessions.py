"""A client's history in the server, over real sockets: resumed, taken over, lost, saved."""

from pathlib import Path

import numpy as np
import pytest
import websockets.sync.client as websocket
from mllm_act_client import Client, Disconnected, SessionLost, wire
from websockets.exceptions import ConnectionClosed

from tests.serving.conftest import observation
from tests.serving.server_thread import Loaded, Running, running

pytestmark = pytest.mark.slow


def test_a_session_goes_on_in_another_connection(server: Running) -> None:
    with Client(server.url) as client:
        expected = [client.infer(observation(i))["actions"] for i in range(4)]
    with Client(server.url) as client:
        found = [client.infer(observation(i))["actions"] for i in range(2)]
        client._connection.socket.close()
        found += [client.infer(observation(i))["actions"] for i in range(2, 4)]
        assert client.reconnects == 1
        np.testing.assert_allclose(found, expected, atol=1e-5)
        client.reset()
        assert client.infer(observation(0))["step"] == 0
        # Another client does not get at it without the id, and takes it over with it.
        with websocket.connect(server.url, compression=None) as other:
            other.recv()
            other.send(wire.pack({"resume": "0" * 32}))
            assert wire.unpack(other.recv())["resumed"] is False
            other.send(wire.pack({"resume": client.session}))
            assert wire.unpack(other.recv())["step"] == 1
            with pytest.raises(ConnectionClosed):
                client._connection.recv(timeout=10)


def test_an_answer_that_was_lost_comes_again(server: Running) -> None:
    """The connection ends after the observation was sent: it is not seen twice."""
    with Client(server.url) as client:
        expected = [client.infer(observation(i))["actions"] for i in range(4)]
    with Client(server.url) as client:
        found = [client.infer(observation(i))["actions"] for i in range(2)]
        exchange = client._exchange

        def lose(data: bytes) -> dict:
            client._exchange = exchange
            exchange(data)
            client._drop()
            raise ConnectionClosed(None, None)

        client._exchange = lose
        found += [client.infer(observation(i))["actions"] for i in range(2, 4)]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_server_has_no_history_and_the_client_is_told(loaded: Loaded) -> None:
    with running(loaded) as server:
        client = Client(server.url, wait=20)
        client.infer(observation(0))
        port = server.port
    with running(loaded) as other:
        client._url = other.url
        with pytest.raises(SessionLost):
            client.infer(observation(1))
        assert client.infer(observation(1))["step"] == 0
        client.close()
    with pytest.raises(Disconnected, match="no server in 0.2 s"):
        Client(f"ws://127.0.0.1:{port}", wait=0.2)


def test_a_saved_history_outlives_the_server(loaded: Loaded, tmp_path: Path) -> None:
    """Chunks that are executed by the server go on in the middle, and another policy's histories are ignored."""

    def act(client: Client, steps: range) -> list[np.ndarray]:
        return [client.infer(observation(i) | {"step_by_step": True})["actions"] for i in steps]

    with running(loaded) as server, Client(server.url) as client:
        expected = act(client, range(6))
    with running(loaded, histories=tmp_path) as server:
        client = Client(server.url, wait=20)
        found = act(client, range(2))
    with running(loaded, histories=tmp_path) as other:
        client._url = other.url
        found += act(client, range(2, 6))
        np.testing.assert_allclose(found, expected, atol=1e-5)
    slots, checker, metadata = loaded
    with running((slots, checker, metadata | {"step": 7}), histories=tmp_path) as third:
        client._url = third.url
        with pytest.raises(SessionLost):
            act(client, range(1))
        client.close()
