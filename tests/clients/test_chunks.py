"""The chunk client, against a server that answers when the test lets it."""

import ast
import threading
from pathlib import Path

import numpy as np
import pytest
from mllm_act_client import ChunkClient, Stale
from mllm_act_client.client import BadRequest

CLIENT = Path(__file__).parents[2] / "clients" / "python"


class Server:
    """Answers a chunk of four actions, each [number of the request, step]; holds answers while it is closed."""

    metadata = {"action": {"shape": [4, 2]}, "context": 1, "control_hz": 10.0}

    def __init__(self, context: int = 1) -> None:
        self.metadata = {**self.metadata, "context": context}
        self.open = threading.Event()
        self.open.set()
        self.seen: list[dict] = []
        self.fail = False

    def infer(self, message: dict) -> dict:
        self.open.wait(10)
        if self.fail:
            self.fail = False
            raise BadRequest("bad")
        self.seen.append(message)
        asked = sum("step_by_step" not in seen for seen in self.seen)
        step = message["step"]
        return {"actions": np.array([[asked, step + i] for i in range(4)], np.float32)}


def settle(policy: ChunkClient) -> None:
    """Waits until nothing is on its way."""
    with policy._changed:
        while policy._asked is not None:
            policy._changed.wait(0.01)


def test_without_delay_chunks_follow_each_other() -> None:
    server = Server()
    with ChunkClient(server, ahead=0) as policy:
        actions = [policy.act({"step": step}) for step in range(9)]
    assert [a.tolist() for a in actions] == [[1 + step // 4, step] for step in range(9)]
    assert [seen["step"] for seen in server.seen] == [0, 4, 8]
    assert [seen.get("reset") for seen in server.seen] == [True, None, None]


def test_what_was_executed_meanwhile_is_skipped() -> None:
    server = Server()
    with ChunkClient(server, ahead=2) as policy:
        found = [policy.act({"step": step}) for step in range(2)]
        server.open.clear()
        found += [policy.act({"step": step}) for step in (2, 3)]  # step 2 asks: two are left
        server.open.set()
        settle(policy)
        assert policy.delay == 2
        found += [policy.act({"step": step}) for step in (4, 5)]
    assert [a.tolist() for a in found] == [[1, 0], [1, 1], [1, 2], [1, 3], [2, 4], [2, 5]]


def test_the_actions_of_the_longest_recent_delay_are_committed() -> None:
    """At first as many as the policy takes; of the plan, from the observation on."""
    server = Server()
    server.metadata["max_delay"] = 3
    with ChunkClient(server, ahead=2) as policy:
        for step in range(9):
            policy.act({"step": step})
            settle(policy)
    asked = [seen for seen in server.seen if "step_by_step" not in seen]
    assert [seen["step"] for seen in asked] == [0, 2, 4, 6, 8]
    assert "committed" not in asked[0]
    # Two are left where three could be committed; the delay is 1 at most from then on, as answers come at once.
    assert asked[1]["committed"].tolist() == [[1, 2], [1, 3]]
    assert all(seen["committed"].dtype == np.float32 for seen in asked[1:])
    policy._delays.clear()
    policy._delays.append(1)
    policy._plan = {9: np.zeros(2), 10: np.ones(2)}
    assert np.array(policy._committed(9)).tolist() == [[0, 0]]


def test_a_policy_without_delays_is_told_no_actions() -> None:
    server = Server()
    with ChunkClient(server, ahead=2) as policy:
        for step in range(5):
            policy.act({"step": step})
            settle(policy)
    assert not any("committed" in seen for seen in server.seen)


def test_the_last_action_is_held_and_then_it_stops() -> None:
    server = Server()
    with ChunkClient(server, ahead=2, stale=2) as policy:
        found = [policy.act({"step": step}) for step in range(2)]
        server.open.clear()
        found += [policy.act({"step": step}) for step in range(2, 6)]
        assert [a.tolist() for a in found[2:]] == [[1, 2], [1, 3], [1, 3], [1, 3]]
        with pytest.raises(Stale, match="no chunk for 3 steps"):
            policy.act({"step": 6})
        server.open.set()
        settle(policy)
        # The chunk of step 2 ends with step 5: all of it has expired, so it asks again, and stands until it has one.
        assert policy.delay == 4
        with pytest.raises(Stale):
            policy.act({"step": 6})
        settle(policy)
        assert policy.act({"step": 6}).tolist() == [3, 6]


def test_overlapping_chunks_are_blended() -> None:
    server = Server()
    with ChunkClient(server, ahead=3, blend=True) as policy:
        policy.act({"step": 0})
        policy.act({"step": 1})  # asks: its chunk is for 1 to 4
        settle(policy)
        found = policy.act({"step": 2})
    # Steps 2 and 3 are in both: the new one weighs 1/3, then 2/3.
    np.testing.assert_allclose(found, [1 * 2 / 3 + 2 / 3, 2], rtol=1e-6)


def test_every_observation_is_sent_where_the_policy_remembers_them() -> None:
    server = Server(context=3)
    with ChunkClient(server, ahead=0) as policy:
        for step in range(5):
            policy.act({"step": step})
    assert [seen["step"] for seen in server.seen] == [0, 1, 2, 3, 4]
    assert ["step_by_step" in seen for seen in server.seen] == [False, True, True, True, False]


def test_an_error_reaches_the_loop_and_the_next_call_asks_again() -> None:
    server = Server()
    server.fail = True
    with ChunkClient(server, ahead=0) as policy:
        with pytest.raises(BadRequest):
            policy.act({"step": 0})
        assert policy.act({"step": 0}).tolist() == [1, 0]


def test_answers_of_an_earlier_episode_are_ignored() -> None:
    server = Server()
    with ChunkClient(server, ahead=3) as policy:
        policy.act({"step": 0})
        server.open.clear()
        policy.act({"step": 1})
        policy.reset()
        server.open.set()
        assert policy.act({"step": 0})[1] == 0
        assert server.seen[-1]["reset"]


def test_the_client_is_valid_python_3_8() -> None:
    for path in CLIENT.rglob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 8))
