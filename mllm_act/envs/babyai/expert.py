"""minigrid's BabyAI bot as an expert that cannot hang.

The bot can plan in circles for ever, stop with an assertion, or say ``done``, which is no action
here. Each of these is an `ExpertFailed`. The cap counts the rounds of planning, not seconds: the
same episode is then recorded, or given up, on a slow machine as on a fast one.
"""

from collections.abc import Sequence
from typing import Any

from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.utils.baby_ai_bot import BabyAIBot

from mllm_act.envs.base import ExpertFailed

ROUNDS = 500  # of planning before one action, 0.05 s; the most seen in 1,500 demonstrations is 9


class _Plan(list[Any]):
    """The bot's stack of subgoals. The bot asks whether it is empty once in every round."""

    rounds = 0

    def __len__(self) -> int:
        self.rounds += 1
        if self.rounds > ROUNDS:
            raise ExpertFailed(f"no action after {ROUNDS} rounds of planning")
        return super().__len__()


class Expert:
    """The bot in an episode of its own, a copy of the one that it advises."""

    def __init__(self, level: RoomGridLevel, actions: int) -> None:
        """``level`` at its start, for the expert alone; ``actions``: how many of minigrid's may be
        used.
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

        The bot sees each of them, since it keeps in mind what is done already.

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
            except Exception as error:  # whatever it is, of the bot's own
                raise ExpertFailed(f"the bot stopped with {error!r}") from error
            if action >= self._actions:
                raise ExpertFailed("the bot thinks that the mission is done")
            self._advice = action
        return self._advice
