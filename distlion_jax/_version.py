# SPDX-License-Identifier: Apache-2.0
"""The version, where code and packaging both read it."""

VERSION = "0.1.0"
