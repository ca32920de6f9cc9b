# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices for every test and doctest, so that no multi-device test can skip."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile hundreds of small programs; the examples and the multi-process tests, which run in
# processes of their own, are compiled as a user's are.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """Fails loudly where the backend was started before the lines above could act."""
    assert jax.device_count() == 8, f"tests need 8 CPU devices, got {jax.devices()}"
