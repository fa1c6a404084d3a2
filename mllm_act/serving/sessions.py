"""Sessions: whose history lies in which slot.

A connection begins with a session of its own. Its slot is assigned with the first observation, and stays when the
connection ends, so that the client can come back and go on, until another session needs it. Ids are random and cannot
be guessed; whoever knows one may take the session over.
"""

import asyncio
import secrets
from typing import Any

from mllm_act.errors import UserError


class Session:
    """One client's episode.

    Attributes:
      id: names it to its client.
      slot: of its memory; None before the first observation, and after another session took it.
      steps: observations since the episode began; with 0 the next one begins an episode.
      instruction: as last read into the slot.
      last: the last answer, for a client that lost it with its connection.
      owner: the connection; None while the client is away.
      busy: held while one of its requests is worked on.
    """

    def __init__(self) -> None:
        self.id = secrets.token_hex(16)
        self.slot: int | None = None
        self.steps = 0
        self.instruction: str | None = None
        self.last: dict[str, Any] | None = None
        self.owner: Any = None
        self.busy = asyncio.Lock()

    def forget(self) -> None:
        """The history is gone; the next observation begins an episode."""
        self.steps, self.instruction, self.last = 0, None, None


class Sessions:
    """The sessions of a server, of which ``count`` have a slot. Used by the event loop only."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._known: dict[str, Session] = {}  # those with a slot, the longest unused first

    @property
    def held(self) -> int:
        """How many have a slot."""
        return len(self._known)

    def open(self, owner: Any) -> Session:
        """Returns a new session of a connection."""
        session = Session()
        session.owner = owner
        return session

    def use(self, session: Session) -> int:
        """Returns the session's slot, and gives it one if it has none: a free one, or that of one whose client left.

        Raises:
          UserError: all slots are in use.
        """
        if session.slot is None:
            session.forget()
            if not self._free:
                known = self._known.values()
                away = next((s for s in known if s.owner is None and not s.busy.locked()), None)
                if away is None:
                    raise UserError(
                        f"session: expected fewer than {len(self._known)} clients, found so many; try again later, or "
                        "start the server with a larger --sessions"
                    )
                self._give_up(away)
            session.slot = self._free.pop()
        self._known.pop(session.id, None)
        self._known[session.id] = session
        return session.slot

    def find(self, identity: str) -> Session | None:
        """Returns the session of this id if its history is still here."""
        return self._known.get(identity)

    def leave(self, session: Session) -> None:
        """The connection of a session ended."""
        session.owner = None
        if session.slot is not None and session.steps == 0:
            self._give_up(session)

    def forget_all(self) -> None:
        """All histories are lost."""
        for session in self._known.values():
            session.forget()

    def _give_up(self, session: Session) -> None:
        assert session.slot is not None
        self._free.append(session.slot)
        session.slot = None
        session.forget()
        del self._known[session.id]
