# SPDX-License-Identifier: Apache-2.0
"""Models, one family per file, behind small protocols; nothing heavy is imported with them."""
