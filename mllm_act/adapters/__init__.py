"""The action space adapters."""

from mllm_act.adapters.base import Adapter
from mllm_act.adapters.categorical import Categorical
from mllm_act.adapters.fast import Fast
from mllm_act.adapters.language import Language
from mllm_act.adapters.regression import Regression
from mllm_act.adapters.uniform import Uniform
from mllm_act.adapters.vector_quantized import VectorQuantized

__all__ = [
    "Adapter",
    "Categorical",
    "Fast",
    "Language",
    "Regression",
    "Uniform",
    "VectorQuantized",
]
