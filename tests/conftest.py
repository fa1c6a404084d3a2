"""Programs compiled once are shared by all tests of a run; property tests draw the same examples in every run."""

import os
import tempfile

from hypothesis import settings

# Before JAX is imported anywhere; pytest's workers and the programs that tests start inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mllm_act_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

# A failure that another run does not show helps nobody; new examples come with a change of the test.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
