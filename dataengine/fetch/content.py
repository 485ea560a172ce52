# SPDX-License-Identifier: Apache-2.0
"""Tells texts from media by their first bytes.

A text must not reach a decoder: a playlist or a script of ffmpeg names further files and URLs, of
this machine too, and they would be opened.
"""

import string
from pathlib import Path

from dataengine.fetch.faults import FetchError

_BEGIN_BYTES = 512
_MARK_BYTES = 8
_PLAIN = frozenset(string.printable.encode())


def is_text(begin: bytes) -> bool:
    """Returns whether a file that begins like this is a text.

    Containers begin with numbers (sizes, versions), so eight plain characters are a text's, even if
    other bytes follow. Only RIFF (AVI) could have a size that reads as characters.
    """
    begin = begin.removeprefix(b"\xef\xbb\xbf")
    if begin.startswith(b"RIFF"):
        return False
    if _PLAIN.issuperset(begin[:_MARK_BYTES]):
        return True
    try:
        text = begin.decode()
    except UnicodeDecodeError as error:
        if error.start < len(begin) - 3:  # not merely a character that is cut in two
            return False
        text = begin[: error.start].decode()
    return all(character.isprintable() or character.isspace() for character in text)


def refuse_text(path: Path) -> None:
    """Raises FetchError (``not_a_video``) for a text."""
    with open(path, "rb") as file:
        begin = file.read(_BEGIN_BYTES)
    if begin and is_text(begin):
        raise FetchError("not_a_video", "a text, not a video")
