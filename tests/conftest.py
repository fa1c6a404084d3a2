"""Set-up of all tests: fast compilation, shapes checked at run time, repeatable properties."""

import os
import signal
import tempfile

from hypothesis import settings
from jaxtyping import install_import_hook

import tests.shape_checks  # noqa: F401 (the hook below looks it up by name)

# Compiled programs are shared by all tests of a run. XLA compiles fast rather than well, because the tests run little:
# without fusions it takes a third of the time. Both are set before JAX is imported anywhere; pytest's workers and the
# programs that tests start inherit them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mllm_act_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}".strip()

# Every annotation of a shape or dtype holds where the tests pass by.
install_import_hook(("mllm_act", "data_pipelines"), "tests.shape_checks.checked")

# A shell starts its background jobs with Ctrl-C ignored, and so would the programs be that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a failure that the next run does not show helps nobody.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
