# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test and doctest, so that no multi-device test can skip."""

import os
import tempfile

import jax
import jax.experimental
import pytest

# Many programs are compiled more than once, by tests, their processes and pytest's workers.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="distlion-tests-", ignore_cleanup_errors=True)
    cache = {
        "jax_compilation_cache_dir": compiled.name,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in cache.items():
        jax.config.update(name, value)  # here
        os.environ[name.upper()] = str(value)  # and in the processes that are started
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


@pytest.fixture
def float64():
    """A test in float64."""
    # The second is before jax 0.8.
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    with enable(True):
        yield
