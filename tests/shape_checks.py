"""The type checker of the tests: ``conftest.py`` has all functions of the packages that name a shape checked by it."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the arguments and the result of a function, if one of them has a shape; plain types are mypy's."""
    hints = getattr(function, "__annotations__", {}).values()
    return _beartype(function) if any(map(_has_shape, hints)) else function


def _has_shape(hint: Any) -> bool:
    return getattr(hint, "__module__", "") == "jaxtyping" or "jaxtyping." in repr(hint)
