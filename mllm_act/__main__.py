"""Lists the programs, one line each; ``python -m mllm_act --version`` prints the versions."""

import argparse
import ast
import platform
from pathlib import Path

from mllm_act import __version__
from mllm_act.provenance import LIBRARIES, ROOT, git_commit, library_version

EXTRAS = ("tensorflow-datasets", "mujoco", "metaworld", "minigrid")  # of the optional dependencies
RUNNERS = ("run", "run_with_config")  # a program ends with one of these; a worker's module does not


def programs() -> dict[str, str]:
    """Returns the first line of every program's docstring by module name, read from the source without importing it."""
    result = {}
    for package in ("data_pipelines", "mllm_act"):
        for path in sorted((ROOT / package).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            if path == Path(__file__) or "__main__" not in source:
                continue
            tree = ast.parse(source)
            if _is_program(tree):
                parts = path.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts).removesuffix(".__main__")
                result[name] = (ast.get_docstring(tree) or "").partition("\n")[0].replace("``", "")
    return result


def _is_program(tree: ast.Module) -> bool:
    """Whether a module's last statement runs a program: ``if __name__ == "__main__": run(main)``."""
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.If):
        return False
    calls = [node.func for node in ast.walk(last) if isinstance(node, ast.Call)]
    names = [call.attr if isinstance(call, ast.Attribute) else ast.unparse(call) for call in calls]
    return any(name in RUNNERS for name in names)


def version_lines() -> list[str]:
    """Returns the version of mllm_act, its commit if known, Python's version and those of the main libraries."""
    commit = git_commit()
    libraries = {name: library_version(name) for name in (*LIBRARIES, *EXTRAS)}
    return [
        f"mllm_act {__version__}" + (f" (commit {commit})" if commit else ""),
        f"python {platform.python_version()}",
        *(f"{name} {version or 'not installed'}" for name, version in libraries.items()),
    ]


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(prog="python -m mllm_act", description=__doc__)
    parser.add_argument("--version", action="store_true", help="print versions and the commit")
    if parser.parse_args().version:
        print("\n".join(version_lines()))
        return
    descriptions = programs()
    width = max(map(len, descriptions))
    print("Programs, each with --help:")
    for name, description in descriptions.items():
        print(f"  python -m {name:<{width}}  {description}")


if __name__ == "__main__":
    main()
