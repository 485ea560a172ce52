# SPDX-License-Identifier: Apache-2.0
"""Names, texts and paths as DuckDB's SQL writes them."""

import re
from pathlib import Path

CLIP_ID = "video_id || '_' || start_ms || '_' || (start_ms + duration_ms)"
"""A clip's id made again rather than read: of all columns clip_id takes longest to read."""


def identifier(name: str) -> str:
    """Returns a column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def quoted(text: str | Path) -> str:
    """Returns a string as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def exact(path: str | Path) -> str:
    """Returns a path in which ``read_parquet`` takes ``*``, ``?`` and ``[`` for themselves."""
    return re.sub(r"[*?[]", r"[\g<0>]", str(path))
