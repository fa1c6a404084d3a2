"""The action space adapters by name. A new adapter is one file in this folder and one line in ``ADAPTERS``."""

import dataclasses
from typing import Any

from mllm_act.adapters.base import Adapter
from mllm_act.adapters.categorical import Categorical
from mllm_act.adapters.fast import Fast
from mllm_act.adapters.language import Lang, SemLang
from mllm_act.adapters.regression import Regression
from mllm_act.adapters.uniform import Uniform
from mllm_act.adapters.vector_quantized import VectorQuantized
from mllm_act.errors import UserError, nearest

ADAPTERS: dict[str, type[Adapter]] = {
    # continuous actions
    "regression": Regression,
    "uniform": Uniform,
    "vq": VectorQuantized,
    "rvq": VectorQuantized,
    "fast": Fast,
    # discrete actions
    "categorical": Categorical,
    "semlang": SemLang,
    "lang": Lang,
}


def adapter_class(name: str, key: str = "config.adapter.name") -> type[Adapter]:
    """Returns the class of an adapter.

    Raises:
      UserError: if there is no such adapter; it names ``key`` and the nearest name.
    """
    if name not in ADAPTERS:
        raise UserError(
            f"{key}: expected one of {', '.join(ADAPTERS)}, found {name!r}; {nearest(name, ADAPTERS)}"
        )
    return ADAPTERS[name]


def adapter_settings(name: str) -> dict[str, Any]:
    """Returns the settings of an adapter with their defaults: the fields of its ``Config`` that have one."""
    fields = dataclasses.fields(adapter_class(name).Config)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
