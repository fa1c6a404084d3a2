"""Rules over parameter paths, (pattern, value) pairs: for freezing, sharding and weight decay alike.

A parameter's path is, for example, ``mllm/language/blocks/q/kernel``. Patterns are regular expressions searched in it;
the first rule that matches decides.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

Value = TypeVar("Value")


def name(path: Sequence[Any]) -> str:
    """Returns a tree path as text: dictionary keys, attributes and indices joined by slashes."""
    parts = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    return "/".join(part for part in parts if part != "value")


def find(rules: Sequence[tuple[str, Value]], path: str) -> Value:
    """Returns the value of the first rule that matches.

    Raises:
      ValueError: if no rule matches.
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise ValueError(
        f"no rule matches the parameter {path!r}; the last rule should match everything: ('.', ...)"
    )


def flatten(tree: Any) -> dict[str, Any]:
    """Returns a tree's leaves by path; ``unflatten`` is its inverse."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {name(path): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the tree have the same path"
    return named


def unflatten(named: dict[str, jax.Array], like: Any) -> Any:
    """Returns a tree structured as ``like`` with the leaves of ``named``."""
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [named[name(path)] for path, _ in paths])


def split(
    module: nnx.Module, trained: Sequence[tuple[str, bool]]
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits a module into its structure, the parameters that the rules mark as trained, and all the rest."""
    wanted = nnx.All(nnx.Param, lambda path, _: find(trained, name(path)))
    graph, chosen, rest = nnx.split(module, wanted, ...)  # type: ignore[misc]
    return graph, chosen, rest


def table(trained: Any, frozen: Any) -> str:
    """Returns the sizes of trained and frozen parameters as text, grouped by the first three parts of their paths."""
    groups: dict[tuple[str, str], int] = {}
    for kind, tree in (("trained", trained), ("frozen", frozen)):
        for path, leaf in flatten(tree).items():
            group = ("/".join(path.split("/")[:3]), kind)
            groups[group] = groups.get(group, 0) + leaf.size
    lines = [
        f"  {group:<40} {kind:<8} {size:>14,}" for (group, kind), size in sorted(groups.items())
    ]
    total = {
        kind: sum(s for (_, k), s in groups.items() if k == kind) for kind in ("trained", "frozen")
    }
    lines.append(
        f"  {'parameters':<40} {'trained':<8} {total['trained']:>14,}   frozen {total['frozen']:,}"
    )
    return "\n".join(lines)
