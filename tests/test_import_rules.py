"""The doors: who may import whom, read from the source and seen in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("mllm_act/**/*.py"), *ROOT.glob("data_pipelines/**/*.py")])
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "data_pipelines")

# Folder -> what nothing in it may import. The programs put the parts together and are free.
CLOSED = {
    "mllm_act/envs": (
        "jax",
        "flax",
        *TENSORFLOW,
        "mllm_act.models",
        "mllm_act.adapters",
        "mllm_act.action_tokenizer",
        "mllm_act.training",
        "mllm_act.rl",
        "mllm_act.policy",
    ),
    "data_pipelines": (
        "flax",
        "mllm_act.models",
        "mllm_act.adapters",
        "mllm_act.action_tokenizer",
        "mllm_act.training",
        "mllm_act.rl",
        "mllm_act.policy",
    ),
    "mllm_act/models": (*TENSORFLOW, "mllm_act.envs", "mllm_act.rl", "mllm_act.policy"),
    "mllm_act/adapters": (
        *TENSORFLOW,
        "mllm_act.envs",
        "mllm_act.models",
        "mllm_act.training",
        "mllm_act.rl",
        "mllm_act.policy",
    ),
    "mllm_act/action_tokenizer": (
        *TENSORFLOW,
        "mllm_act.envs",
        "mllm_act.models",
        "mllm_act.adapters",
        "mllm_act.rl",
        "mllm_act.policy",
    ),
    "mllm_act/weights": (
        *TENSORFLOW,
        "transformers",
        "peft",
        "mllm_act.envs",
        "mllm_act.adapters",
        "mllm_act.action_tokenizer",
        "mllm_act.rl",
        "mllm_act.policy",
    ),
    "mllm_act/rl": (*TENSORFLOW,),
}

# Building blocks that know arrays only, so that a closed folder's neighbour may use them.
OPEN = ("mllm_act.models.layers",)

# What runs on a robot: importing any of these brings no TensorFlow in, by whatever way.
ACTING = (
    "mllm_act",
    "mllm_act.batch",
    "mllm_act.errors",
    "mllm_act.normalization",
    "mllm_act.policy.prompt",
    "mllm_act.policy.network",
    "mllm_act.policy",
    "mllm_act.evaluate",
    "mllm_act.serve",
    "mllm_act.envs",
    "mllm_act.adapters",
    "mllm_act.models",
    "mllm_act.action_tokenizer",
)


def name_of(path: Path) -> str:
    """``mllm_act/envs/base.py`` -> ``mllm_act.envs.base``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module a file imports anywhere, at the top or in a function, under its full name."""
    found: set[str] = set()
    package = name_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def within(module: str, door: str) -> bool:
    return module == door or module.startswith(door + ".")


def loaded(module: str) -> set[str]:
    """The top-level packages in ``sys.modules`` after a fresh process has imported a module."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("folder", CLOSED)
def test_doors(folder: str) -> None:
    broken = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in SOURCES
        if path.is_relative_to(ROOT / folder)
        for module in sorted(imports(path))
        if any(within(module, door) for door in CLOSED[folder])
        and not any(within(module, block) for block in OPEN)
    ]
    assert not broken, "\n".join(broken)


def test_pytorch_stays_out_of_the_package() -> None:
    """PyTorch is there for comparisons under benchmarks/ and tests/ only."""
    assert [str(path) for path in SOURCES if any(within(m, "torch") for m in imports(path))] == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"jax", "flax", "numpy", "tensorflow", "mujoco", "metaworld", "matplotlib", "orbax"}
    assert loaded("mllm_act") & heavy == set()


def test_environments_import_neither_jax_nor_tensorflow() -> None:
    modules = [name_of(path) for path in SOURCES if path.is_relative_to(ROOT / "mllm_act" / "envs")]
    for module in modules:
        assert loaded(module) & {"jax", "flax", "tensorflow"} == set(), module


def test_acting_imports_no_tensorflow() -> None:
    modules = [name_of(p) for p in SOURCES if any(within(name_of(p), door) for door in ACTING[1:])]
    modules = [m for m in modules if not within(m, "mllm_act.envs")]  # held by the test above
    # One process for all of them; only when TensorFlow comes in is the culprit looked for.
    if "tensorflow" in loaded(", ".join(["mllm_act", *modules])):
        assert [module for module in modules if "tensorflow" in loaded(module)] == []
