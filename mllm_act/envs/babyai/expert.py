"""minigrid's BabyAI bot as an expert that always returns.

The bot can plan in an endless loop, fail an assertion, or return ``done``, which is not an action here. Each of these
raises `ExpertFailed`. The limit counts rounds of planning and not seconds, so that slow and fast machines record and
discard the same episodes.
"""

from collections.abc import Sequence
from typing import Any

from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.utils.baby_ai_bot import BabyAIBot

from mllm_act.envs.base import ExpertFailed

ROUNDS = 500  # of planning per action (0.05 s); the maximum in 1,500 demonstrations is 9


class _Plan(list[Any]):
    """The bot's stack of subgoals. The bot checks once per round whether it is empty."""

    rounds = 0

    def __len__(self) -> int:
        self.rounds += 1
        if self.rounds > ROUNDS:
            raise ExpertFailed(f"no action after {ROUNDS} rounds of planning")
        return super().__len__()


class Expert:
    """The bot, playing a copy of the episode for which it chooses actions."""

    def __init__(self, level: RoomGridLevel, actions: int) -> None:
        """Takes over ``level``.

        Args:
          level: at its start, used by nothing else.
          actions: only the first ``actions`` of minigrid's actions are valid.
        """
        self._level = level
        self._bot = BabyAIBot(level)
        self._plan = self._bot.stack = _Plan(self._bot.stack)
        self._actions = actions
        self._taken: int | None = None
        self._steps = 0
        self._advice: int | None = None

    def advise(self, taken: Sequence[int]) -> int:
        """Returns the action for the state after ``taken``, all actions since the start.

        The bot is shown every one of them, because it keeps track of what is already done.

        Raises:
          ExpertFailed: the bot has no action for this state or an earlier one.
        """
        for action in taken[self._steps :]:
            self._advise()
            self._level.step(action)
            self._taken, self._advice = action, None
            self._steps += 1
        return self._advise()

    def _advise(self) -> int:
        if self._advice is None:
            self._plan.rounds = 0
            try:
                action = int(self._bot.replan(self._taken))
            except ExpertFailed:
                raise
            except Exception as error:  # the bot may raise anything
                raise ExpertFailed(f"the bot stopped with {error!r}") from error
            if action >= self._actions:
                raise ExpertFailed("the bot considers the mission done")
            self._advice = action
        return self._advice
