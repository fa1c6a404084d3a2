"""Set-up of all tests: fast compilation, shapes checked at run time, repeatable properties."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from pathlib import Path
from types import CodeType

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook
from jaxtyping._import_hook import _JaxtypingLoader

import tests.shape_checks  # noqa: F401 (the hook below looks it up by name)
from tests.shared import once

# Compiled programs are shared by all tests of a run. XLA compiles fast rather than well, because the tests run little:
# without fusions it takes a third of the time. Both are set before JAX is imported anywhere; pytest's workers and the
# programs that tests start inherit them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="mllm_act_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name  # deleted when this process ends
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
FAST = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    FAST += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip()


# Every annotation of a shape or dtype holds where the tests pass by. The hook's own loader looks for all bytecode under
# another name while a module is run, also for that of what it imports: TensorFlow was compiled in every process of the
# tests, 10 s. So bytecode of checked modules is not kept, and other modules load as ever.
def compiled(loader: _JaxtypingLoader, name: str) -> CodeType:
    path = loader.get_filename(name)
    return loader.source_to_code(loader.get_data(path), path)


_JaxtypingLoader.get_code = compiled
_JaxtypingLoader.exec_module = SourceFileLoader.exec_module
install_import_hook(("mllm_act", "data_pipelines"), "tests.shape_checks.checked")

# A shell starts its background jobs with Ctrl-C ignored, and so would the programs be that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a failure that the next run does not show helps nobody.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def no_signal() -> Iterator[None]:
    """A program that a test stopped by a signal leaves it on record, and would stop those of the next tests."""
    yield
    if "mllm_act.errors" in sys.modules:
        from mllm_act.errors import signals

        signals.received, signals.deferred, signals.kept = None, False, ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that train or simulate come first: a long one at the end would leave a core idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def metaworld(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, two demonstrations of each of two Meta-World tasks, and a ``tokenizer`` for ``rvq``."""

    def make(home: Path) -> None:
        from data_pipelines.generate import generate
        from mllm_act import train_tokenizer
        from mllm_act.config import load_config

        tasks = "drawer-close-v3,handle-press-v3"
        generate("metaworld", tasks, episodes=2, out=home / "data", workers=2, seed=0)
        config = load_config("configs/tokenizer/metaworld.py:rvq")
        config.update_from_flattened_dict({
            "data.directory": str(home / "data"), "data.batch_size": 32, "steps": 10, "log_every": 5,
            "checkpoint_every": 10, "tokenizer.hidden": 32, "tokenizer.width": 16, "tokenizer.codes": 16,
            "replay": False,
        })  # fmt: skip
        train_tokenizer.main(config, home / "tokenizer")

    return once(tmp_path_factory, "metaworld", make)
