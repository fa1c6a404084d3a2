"""Executes chunks step by step, and asks for the next one while the last is executed.

A chunk of H actions begins with the observation that it was asked for. While the answer is on its way the robot goes
on with the actions it has. When it arrives, as many of its first actions lie in the past as were executed since, and
are skipped. This delay is a difference of step numbers, never an estimate of time.

A policy trained for it (``max_delay`` in the metadata) is told the actions that the robot goes on with: as many as the
longest of the last ``RECENT`` delays, at first ``max_delay``. The answer begins with them, so that the next actions
continue them.
"""

import collections
import threading

import numpy as np

from mllm_act_client.client import SessionLost

RECENT = 10  # chunks whose delays are remembered


class Stale(RuntimeError):
    """There has been no new chunk for too long: the robot must stop."""


class ChunkClient:
    """Gives one action for each control step. One thread calls ``act``; another one talks to the server."""

    def __init__(self, client, ahead=None, blend=False, stale=None):
        """Wraps a client.

        Args:
          client: a ``Client``; used by this object alone.
          ahead: how many actions may be left when the next chunk is asked for; half of the chunk if it is None, 0 to
            ask only when none is left, and wait.
          blend: whether actions that the old and the new chunk give for the same step are averaged, the weight of the
            new one growing over the overlap; otherwise the new one replaces them.
          stale: steps for which the last action is held when no chunk is left; then ``act`` raises ``Stale``. None
            waits for the answer instead of holding.
        """
        action = client.metadata["action"]
        self._client, self._blend, self._stale = client, blend, stale
        self._length = action["shape"][0]
        self._ahead = self._length // 2 if ahead is None else ahead
        if not 0 <= self._ahead < self._length:
            raise ValueError(f"ahead: expected 0 to {self._length - 1}, found {self._ahead}")
        # In between, observations are sent too where the policy remembers them.
        self._all = self._length > 1 and client.metadata.get("context", 1) > 1
        self._max_delay = client.metadata.get("max_delay", 0)
        self._delays = collections.deque([self._max_delay], RECENT)
        self._changed = threading.Condition()
        self._outbox = collections.deque()
        self._asked = None  # the step of the observation whose chunk is on its way
        self._error = None
        self._closed = False
        self._begin()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def reset(self):
        """The next observation begins an episode; answers that are on their way belong to the old one."""
        with self._changed:
            self._begin()

    def _begin(self):
        self._episode = object()
        self._step = 0
        self._plan = {}  # step -> action
        self._last = None
        self._held = 0
        self._asked = None
        self._outbox.clear()
        self.delay = 0  # actions executed between the newest chunk's observation and its arrival

    def act(self, observation):
        """Returns the action of this control step, float32[A].

        Raises:
          Stale: the last action has been held for ``stale`` steps and there is still no chunk.
          SessionLost, BadRequest, Disconnected: as ``Client.infer``; the next call asks again.
        """
        with self._changed:
            step = self._step
            self._raise()
            left = sum(1 for known in self._plan if known >= step)
            if self._asked is None and left <= self._ahead:
                self._send(observation, step, True)
            elif self._all:
                self._send(observation, step, False)
            wait = self._stale is None or self._last is None
            while step not in self._plan and wait and self._error is None:
                self._changed.wait(0.1)
            self._raise()
            if step in self._plan:
                self._held, self._last = 0, self._plan.pop(step)
            else:
                self._held += 1
                if self._held > self._stale:
                    raise Stale(f"no chunk for {self._held} steps; stop the robot")
            self._step += 1
            return self._last

    def _raise(self):
        if self._error is not None:
            error, self._error, self._asked = self._error, None, None
            raise error

    def _send(self, observation, step, ask):
        message = dict(observation)
        if step == 0:
            message["reset"] = True
        if not ask:
            message["step_by_step"] = True  # only seen
        else:
            self._asked = step
            committed = self._committed(step)
            if committed:
                message["committed"] = np.stack(committed).astype(np.float32)
        self._outbox.append((self._episode, step, ask, message))
        self._changed.notify_all()

    def _committed(self, step):
        """Returns the planned actions that are executed while the answer is on its way, without a gap."""
        actions = []
        while len(actions) < min(max(self._delays), self._max_delay):
            if step + len(actions) not in self._plan:
                break
            actions.append(self._plan[step + len(actions)])
        return actions

    def _talk(self):
        while True:
            with self._changed:
                while not self._outbox and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                episode, step, ask, message = self._outbox.popleft()
            try:
                actions = self._client.infer(message)["actions"]
            except Exception as error:
                with self._changed:
                    if episode is self._episode:
                        self._error = error
                        self._outbox.clear()
                        self._changed.notify_all()
                continue
            with self._changed:
                if ask and episode is self._episode:
                    self._take(step, actions)
                    self._changed.notify_all()

    def _take(self, begin, actions):
        """Puts a chunk that begins at a step into the plan; what lies in the past is skipped."""
        self.delay = self._step - begin
        if begin or not self._max_delay:  # the first chunk of an episode is waited for
            self._delays.append(self.delay)
        self._asked = None
        overlap = [step for step in self._plan if step >= self._step]
        new = {begin + i: action for i, action in enumerate(actions) if begin + i >= self._step}
        if self._blend:
            for i, step in enumerate(sorted(overlap)):
                if step in new:
                    weight = (i + 1.0) / (len(overlap) + 1.0)
                    new[step] = (weight * new[step] + (1 - weight) * self._plan[step]).astype(
                        np.float32
                    )
        self._plan = new

    def close(self):
        """Ends the thread. The client stays open."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=5)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


__all__ = ["ChunkClient", "SessionLost", "Stale"]
