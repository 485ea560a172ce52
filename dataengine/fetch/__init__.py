# SPDX-License-Identifier: Apache-2.0
"""From a URL to a file: HTTP, pages through yt-dlp, object stores, and the rules all of them keep."""
