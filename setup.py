"""Lists the packages; everything else is in pyproject.toml.

configs/ stays at the root of the repository and is installed inside the package, as mllm_act/configs: pyproject.toml
can rename a folder or discover packages, but not both.
"""

from setuptools import find_namespace_packages, setup

packages = find_namespace_packages(include=["mllm_act*", "data_pipelines*", "launch*"])
configs = [
    "mllm_act.configs",
    *(f"mllm_act.configs.{name}" for name in find_namespace_packages("configs")),
]

setup(
    packages=[name for name in [*packages, *configs] if "__pycache__" not in name],
    package_dir={"mllm_act.configs": "configs"},
)
