"""Goals: logical expressions over predicates, some of them over all objects of a class, as in the original's files.

{"expr_type": "AND", "quantifier": "EXISTS", "inputs": [{"name": "X", "expr_type": "pear"}],
 "sub_exprs": ["on_top(X, receptacle_aabb_sink_kitchen_counter)", "not_holding()"]}
"""

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from mllm_act.envs.language_rearrangement.entities import OBJECTS, PLACES, RECEPTACLES
from mllm_act.errors import UserError, nearest

Goal = str | dict[str, Any]
# Predicate -> the kinds of its arguments.
PREDICATES = {
    "on_top": ("object", "receptacle"),
    "in": ("object", "place"),
    "holding": ("object",),
    "not_holding": (),
    "robot_at": ("any",),
    "robot_at_obj": ("object",),
    "opened_fridge": ("place",),
    "closed_fridge": ("place",),
    "opened_cab": ("place",),
    "closed_cab": ("place",),
}


class Predicate(NamedTuple):
    """A statement about the world."""

    name: str
    arguments: tuple[str, ...]


class Facts(Protocol):
    """What a goal is evaluated against."""

    def holds(self, predicate: Predicate) -> bool:
        """Returns whether a predicate of names is true."""
        ...

    def of_kind(self, kind: str) -> Sequence[str]:
        """Returns the names of the objects of a class."""
        ...


@functools.lru_cache(maxsize=100_000)
def parse(text: str) -> Predicate:
    """Returns the predicate of a text such as ``on_top(X, receptacle)``. Raises ValueError if it is none."""
    match = re.fullmatch(r"(\w+)\((.*)\)", text.strip())
    if match is None or match[1] not in PREDICATES:
        raise ValueError(f"{text!r}, which is no predicate")
    arguments = tuple(argument.strip() for argument in match[2].split(",") if argument.strip())
    if len(arguments) != len(PREDICATES[match[1]]):
        raise ValueError(f"{text!r}, with {len(arguments)} arguments")
    return Predicate(match[1], arguments)


def check(goal: Goal, names: Sequence[str], where: str) -> None:
    """Raises UserError unless a goal or a predicate speaks of known predicates, receptacles and objects only.

    Args:
      goal: to check.
      names: of the episode's objects.
      where: the file and the episode, for the error.
    """
    fix = "it is not an episode of Language Rearrangement; get the file again"
    if isinstance(goal, str):
        try:
            predicate = parse(goal)
        except ValueError as error:
            raise UserError(f"{where}: expected a predicate, found {error}; {fix}") from None
        for kind, argument in zip(PREDICATES[predicate.name], predicate.arguments, strict=True):
            known = {
                "object": names, "receptacle": RECEPTACLES, "place": PLACES, "any": (*PLACES, *names),
            }[kind]  # fmt: skip
            if argument not in known:
                kind = {"any": "receptacle or object"}.get(kind, kind)
                raise UserError(
                    f"{where}: expected a known {kind} in {goal!r}, found {argument!r} "
                    f"({nearest(argument, known)}); {fix}"
                )
        return
    if goal.get("expr_type") not in ("AND", "NAND") or goal.get("quantifier") not in (
        None, "EXISTS", "FORALL",
    ):  # fmt: skip
        raise UserError(
            f"{where}: expected AND or NAND, of EXISTS, FORALL or neither, found {goal.get('expr_type')!r} of "
            f"{goal.get('quantifier')!r}; {fix}"
        )
    variables = [variable["name"] for variable in goal.get("inputs", ())]
    for variable in goal.get("inputs", ()):
        if variable["expr_type"] not in OBJECTS:
            raise UserError(
                f"{where}: expected a known class of objects, found {variable['expr_type']!r} "
                f"({nearest(variable['expr_type'], OBJECTS)}); {fix}"
            )
    for part in goal["sub_exprs"]:
        check(part, [*names, *variables], where)


def holds(goal: Goal, facts: Facts, bound: Mapping[str, str] | None = None) -> bool:
    """Returns whether a goal is true.

    A quantifier is over all choices of one object per variable, and outside of the expression: NAND of EXISTS is true
    if there is an object for which the conjunction is false.

    Args:
      goal: the expression.
      facts: the state of the world.
      bound: variable -> name, from expressions around this one.
    """
    bound = bound or {}
    if isinstance(goal, str):
        name, arguments = parse(goal)
        return facts.holds(Predicate(name, tuple(bound.get(a, a) for a in arguments)))
    variables = [variable["name"] for variable in goal.get("inputs", ())]
    choices = [facts.of_kind(variable["expr_type"]) for variable in goal.get("inputs", ())]
    quantified = any if goal.get("quantifier") == "EXISTS" else all

    def one(chosen: tuple[str, ...]) -> bool:
        inner = {**bound, **dict(zip(variables, chosen, strict=True))}
        conjunction = all(holds(part, facts, inner) for part in goal["sub_exprs"])
        return conjunction == (goal["expr_type"] == "AND")

    return quantified(one(chosen) for chosen in itertools.product(*choices))
