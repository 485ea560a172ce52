# SPDX-License-Identifier: Apache-2.0
"""Looking at a corpus through its catalog; media is never read."""
