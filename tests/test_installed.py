"""The wheel, installed into a folder of its own and used outside the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = (
    "mllm_act",
    "data_pipelines",
    "launch",
    "configs",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, as site-packages would be."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"  # a copy: building leaves build/ and egg-info beside the sources
    checkout.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, checkout / name, ignore=ignore)
        else:
            shutil.copy(source, checkout / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, *build, str(checkout)], check=True)
    shutil.rmtree(checkout)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)],
        check=True,
    )
    return target


def installed(site: Path, cwd: Path, *arguments: str) -> str:
    """Runs Python on the installed copy from another folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_packages_and_configs(site: Path) -> None:
    """Each module and config of the checkout, and no top-level package but these two."""
    packages = {path.name for path in site.iterdir() if path.is_dir()}
    assert {name for name in packages if not name.endswith(".dist-info")} == {
        "mllm_act",
        "data_pipelines",
        "launch",
        "bin",
    }
    shipped = {
        name: {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
        for name, folder in (
            ("configs", site / "mllm_act" / "configs"),
            ("data_pipelines", site / "data_pipelines"),
            ("mllm_act", site / "mllm_act"),
        )
    }
    shipped["mllm_act"] = {x for x in shipped["mllm_act"] if not x.startswith("configs/")}
    for name, files in shipped.items():
        assert files == {
            str(path.relative_to(ROOT / name)) for path in ROOT.glob(f"{name}/**/*.py")
        }
    assert (site / "mllm_act" / "py.typed").exists() and (
        site / "data_pipelines" / "py.typed"
    ).exists()


def test_the_installed_copy_is_used(site: Path, tmp_path: Path) -> None:
    code = "import data_pipelines, mllm_act; print(data_pipelines.__file__, mllm_act.__file__)"
    for file in installed(site, tmp_path, "-c", code).split():
        assert Path(file).is_relative_to(site)


def test_versions(site: Path, tmp_path: Path) -> None:
    from mllm_act import __version__

    module = installed(site, tmp_path, "-m", "mllm_act", "--version")
    assert module.splitlines()[0] == f"mllm_act {__version__}"  # the commit is not known
    assert installed(site, tmp_path, str(site / "bin" / "mllm_act"), "--version") == module
    assert "python -m mllm_act.train " in installed(site, tmp_path, "-m", "mllm_act")


def test_doctor_starts(site: Path, tmp_path: Path) -> None:
    assert "python -m mllm_act.doctor" in installed(
        site, tmp_path, "-m", "mllm_act.doctor", "--help"
    )
    finding = "from mllm_act import doctor; print(doctor.packages().status)"
    assert installed(site, tmp_path, "-c", finding) == "note\n"  # no lock to compare with


def test_training_finds_the_shipped_config(site: Path, tmp_path: Path) -> None:
    config = "configs/policy/metaworld.py:uniform"
    output = installed(site, tmp_path, "-m", "mllm_act.train", f"--config={config}", "--help")
    assert (
        f"keys of {config}, with their values:" in output and "--config.data.directory=" in output
    )
