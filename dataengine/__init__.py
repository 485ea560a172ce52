# SPDX-License-Identifier: Apache-2.0
"""From a list of videos to a captioned, queryable, trainable video-text corpus."""

__version__ = "0.1.0"
