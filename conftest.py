# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test and doctest, so that no multi-device test can skip."""

import os
import tempfile

import jax
import pytest

# Tests, their processes and pytest's workers compile a good half of their programs more than once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="distlion-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    jax.config.update("jax_compilation_cache_dir", compiled.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile hundreds of small programs; the examples and the multi-process tests, which run in
# processes of their own, are compiled as a user's are.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """Fails loudly where the backend was started before the lines above could act."""
    assert jax.device_count() == 8, f"tests need 8 CPU devices, got {jax.devices()}"


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Every program compiled for a CPU maps memory, and a process may hold 65,530 maps on Linux."""
    yield
    jax.clear_caches()
