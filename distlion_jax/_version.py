# SPDX-License-Identifier: Apache-2.0
"""The version, which packaging and the processes of a job read here."""

__version__ = "0.1.0"
