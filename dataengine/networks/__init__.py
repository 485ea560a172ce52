# SPDX-License-Identifier: Apache-2.0
"""Networks that both annotation and training use: torch modules and their shapes, no I/O."""
