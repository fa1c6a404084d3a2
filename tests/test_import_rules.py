"""Who may import whom, read from the source and observed in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for package in ("mllm_act", "data_pipelines", "launch")
    for path in ROOT.glob(f"{package}/**/*.py")
)

# The rooms from the bottom to the top. A module imports from its own room and from floors below it, never from its own
# floor's other rooms or from above. Every module belongs to the room with the longest name that fits.
FLOORS = (
    ("mllm_act", "mllm_act.errors", "mllm_act.batch", "data_pipelines.tensorflow_cpu"),
    (
        "mllm_act.distributed",
        "mllm_act.files",
        "mllm_act.goodput",
        "mllm_act.normalization",
        "mllm_act.parameters",
        "mllm_act.provenance",
    ),
    ("mllm_act.placement",),
    ("mllm_act.config", "mllm_act.checkpoints", "mllm_act.envs", "mllm_act.models"),
    ("data_pipelines.mapping", "mllm_act.reporting"),
    (
        "mllm_act.ranges",
        "mllm_act.models.acting",
        "mllm_act.weights",
        "mllm_act.action_tokenizer",
        "mllm_act.report",
        "mllm_act.open_loop",
        "mllm_act.flops",
    ),
    ("data_pipelines.reading", "data_pipelines.writing", "mllm_act.adapters"),
    ("data_pipelines", "mllm_act.policy", "mllm_act.replay", "mllm_act.import_hf"),
    ("mllm_act.evaluate_data", "mllm_act.evaluate_remote", "mllm_act.serving"),
    (
        "mllm_act.training",
        "mllm_act.evaluate",
        "mllm_act.export_hf",
        "mllm_act.serve",
        "mllm_act.inspect",
    ),
    ("mllm_act.rl",),
    (
        "mllm_act.train",
        "mllm_act.train_ppo",
        "mllm_act.train_tokenizer",
        "mllm_act.demo",
        "mllm_act.doctor",
    ),
    ("mllm_act.bench", "mllm_act.__main__", "launch"),
)

TENSORFLOW = ("tensorflow", "tensorflow_datasets", "data_pipelines")

# Room -> what nothing in it may import, beyond the order of the floors.
CLOSED = {
    "mllm_act.envs": ("jax", "flax", *TENSORFLOW),
    "mllm_act.models": TENSORFLOW,
    "mllm_act.adapters": (*TENSORFLOW, "mllm_act.checkpoints", "mllm_act.envs", "mllm_act.models"),
    "mllm_act.action_tokenizer": (*TENSORFLOW, "mllm_act.envs", "mllm_act.models"),
    "mllm_act.weights": (*TENSORFLOW, "mllm_act.envs"),
    "mllm_act.policy": (*TENSORFLOW, "mllm_act.envs", "mllm_act.weights"),
    "mllm_act.rl": TENSORFLOW,
    "data_pipelines": ("flax", "mllm_act.models", "mllm_act.adapters", "mllm_act.action_tokenizer"),
}

# A building block that knows only arrays, which the neighbours of ``models`` may use.
OPEN = ("mllm_act.models.layers",)

# What runs on a robot: importing any of these brings no TensorFlow in, by whatever way.
ACTING = (
    "mllm_act",
    "mllm_act.batch",
    "mllm_act.errors",
    "mllm_act.normalization",
    "mllm_act.policy",
    "mllm_act.evaluate",
    "mllm_act.open_loop",
    "mllm_act.serve",
    "mllm_act.serving",
    "mllm_act.envs",
    "mllm_act.adapters",
    "mllm_act.models",
    "mllm_act.action_tokenizer",
    "mllm_act.rl",
    "mllm_act.train_ppo",
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


def importers(modules: list[str], heavy: set[str]) -> list[str]:
    """Those of the modules that import one of ``heavy``. One process for all; only if it does is each tried alone."""
    if not loaded(", ".join(modules)) & heavy:
        return []
    return [module for module in modules if loaded(module) & heavy]


def room_of(module: str) -> tuple[int, str]:
    """The floor and the name of the room that a module belongs to."""
    fitting = [
        (floor, room)
        for floor, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or (room != "mllm_act" and within(module, room))
    ]
    assert fitting, f"{module} belongs to no room; add it to FLOORS"
    return max(fitting, key=lambda item: len(item[1]))


def own_imports(path: Path) -> set[str]:
    """The modules of this project that a file imports."""
    known = {name_of(source) for source in SOURCES}
    return {module for module in imports(path) if module in known} - {
        "mllm_act",
        "data_pipelines",
        "launch",
    }


def test_no_import_runs_up() -> None:
    wrong = []
    for path in SOURCES:
        floor, room = room_of(name_of(path))
        for module in sorted(own_imports(path)):
            other_floor, other_room = room_of(module)
            if other_room != room and other_floor >= floor:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", CLOSED)
def test_closed_rooms(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in SOURCES
        if within(name_of(path), room)
        for module in sorted(imports(path))
        if any(within(module, door) for door in CLOSED[room] if not within(door, room))
        and not any(within(module, block) for block in OPEN)
    ]
    assert not wrong, "\n".join(wrong)


def test_functions_and_files_stay_short() -> None:
    """A file has at most 400 lines, a function fewer than 90."""
    wrong = []
    for path in SOURCES:
        text = path.read_text()
        if len(text.splitlines()) > 400:
            wrong.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length >= 90:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.name}: {length} lines")
    assert not wrong, "\n".join(wrong)


def test_pytorch_stays_out_of_the_package() -> None:
    """PyTorch is there for comparisons under benchmarks/ and tests/ only."""
    assert [str(path) for path in SOURCES if any(within(m, "torch") for m in imports(path))] == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"jax", "flax", "numpy", "tensorflow", "mujoco", "metaworld", "matplotlib", "orbax"}
    assert loaded("mllm_act") & heavy == set()


def test_environments_import_neither_jax_nor_tensorflow() -> None:
    modules = [name_of(path) for path in SOURCES if path.is_relative_to(ROOT / "mllm_act" / "envs")]
    assert importers(modules, {"jax", "flax", "tensorflow"}) == []


def test_acting_imports_no_tensorflow() -> None:
    modules = [name_of(p) for p in SOURCES if any(within(name_of(p), door) for door in ACTING[1:])]
    modules = [m for m in modules if not within(m, "mllm_act.envs")]  # held by the test above
    assert importers(["mllm_act", *modules], {"tensorflow"}) == []
