# SPDX-License-Identifier: Apache-2.0
"""How well methods train: searches, comparisons, sensitivity."""
