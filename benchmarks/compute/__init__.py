# SPDX-License-Identifier: Apache-2.0
"""What packing, counting and updating cost on one machine."""
