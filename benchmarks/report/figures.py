# SPDX-License-Identifier: Apache-2.0
"""Matplotlib, loaded where a picture is drawn: tables and pages need none."""

from typing import Any


def pyplot() -> Any:
    """``matplotlib.pyplot`` that writes files and needs no display."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt
