# SPDX-License-Identifier: Apache-2.0
"""How fast steps are over real links."""
