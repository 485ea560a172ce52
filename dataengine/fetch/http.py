# SPDX-License-Identifier: Apache-2.0
"""URL of a file -> file, by plain HTTP: status and content type checked, broken bodies resumed.

What has arrived stays in a ``.part`` file beside a note of what it is part of. A later try asks for
the rest with ``Range`` and ``If-Range`` (RFC 9110, 13.1.5 and 14.2), and starts again where the
server cannot do that or its file has changed.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import requests
import urllib3.exceptions

from dataengine.fetch.faults import FetchError, classify_os_error, classify_status
from dataengine.fetch.session import MAX_REDIRECTS, Visit, file_tag

_CHUNK_BYTES = 1 << 16
_NOT_VIDEO_TYPES = ("text/", "image/", "application/json", "application/xml", "application/xhtml")
_PLAYLIST_TYPES = ("mpegurl", "dash+xml")


def fetch_file(url: str, folder: Path, suffix: str, visit: Visit) -> Path:
    """Fetches a file into a folder; finishes what an earlier try has left there.

    Args:
        url: Of the file; redirects are followed.
        folder: Existing, of this video alone.
        suffix: Of the file.
        visit: Settings, deadline and turns of this video.

    Returns:
        The file, called ``video`` with the suffix.

    Raises:
        FetchError: With the class of what went wrong.
    """
    part = folder / "video.part"
    tries = 0
    with visit.make_session() as session:
        while True:
            try:
                _receive(url, part, session, visit)
                break
            except _BodyError:
                if tries >= visit.settings.retries:
                    raise
            visit.pause(tries)
            tries += 1
    target = folder / f"video{suffix}"
    os.replace(part, target)
    (folder / "part.json").unlink(missing_ok=True)
    return target


class _BodyError(FetchError):
    """A body that stopped; the rest may be asked for."""


def _receive(url: str, part: Path, session: requests.Session, visit: Visit) -> None:
    """Makes one request and appends its body to the part, or writes it anew."""
    note = part.with_name("part.json")
    known = _read_note(note) if part.exists() else {}
    have = part.stat().st_size if known else 0
    if have and have == known["total"]:
        return  # only the rename was missing
    fault: type[FetchError] = FetchError
    headers = {"Range": f"bytes={have}-", "If-Range": known["tag"]} if have else {}
    try:
        with session.get(
            url, headers=headers, stream=True, timeout=visit.settings.timeout_s
        ) as answer:
            if answer.status_code == 416:  # the file there is shorter than what is here
                part.unlink()
                raise _BodyError("incomplete", "the file has changed on the server")
            total = _check(answer, part, have, known, visit)
            resumed = answer.status_code == 206
            if not resumed:
                tag = file_tag(answer.headers)
                note.write_text(json.dumps({"tag": tag, "total": total}) if tag else "{}")
            fault = _BodyError
            with open(part, "ab" if resumed else "wb") as file:
                received = _copy(answer, file, have if resumed else 0, visit)
    except requests.TooManyRedirects:
        raise FetchError("redirect_loop", f"more than {MAX_REDIRECTS} redirects") from None
    except requests.exceptions.InvalidSchema as error:
        raise FetchError("refused_scheme", str(error)) from None
    except (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError) as error:
        raise fault("timeout", str(error)) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, ConnectionError) as error:
        reason = "incomplete" if fault is _BodyError else "connection_failed"
        raise fault("timeout" if "timed out" in str(error) else reason, str(error)) from None
    except OSError as error:
        raise FetchError(classify_os_error(error), str(error)) from None
    except ValueError as error:  # a header or an address that nothing can be made of
        raise FetchError("download_failed", str(error)) from None
    if not received:
        part.unlink()
        raise FetchError("empty_file", "the server sent no bytes")
    if total is not None and received < total:
        raise _BodyError("incomplete", f"{received} of {total} bytes")


def _check(
    answer: requests.Response, part: Path, have: int, known: dict[str, Any], visit: Visit
) -> int | None:
    """Returns the whole file's size as promised, None if it is not; refuses what is no video."""
    if not 200 <= answer.status_code < 300:
        raise FetchError(classify_status(answer.status_code), f"HTTP {answer.status_code}")
    kind = answer.headers.get("Content-Type", "").lower()
    if kind.startswith(_NOT_VIDEO_TYPES) or any(word in kind for word in _PLAYLIST_TYPES):
        raise FetchError("not_a_video", f"the server sent {kind}")
    if answer.status_code == 206:
        span, _, size = (
            answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        )
        total = int(size) if size.isdecimal() else None
        if not span.startswith(f"{have}-") or total != known.get("total"):
            part.unlink()
            raise _BodyError("incomplete", f"the server sent another part: {span}/{size}")
        return total
    length = answer.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() and "Content-Encoding" not in answer.headers else None
    if total is not None and total > visit.settings.max_bytes:
        _too_large(visit)
    return total


def _copy(answer: requests.Response, file: Any, received: int, visit: Visit) -> int:
    """Writes a body into a file and returns how many bytes are there in all."""
    begin, before = time.monotonic(), received
    while chunk := answer.raw.read1(_CHUNK_BYTES, decode_content=True):
        received += len(chunk)
        if received > visit.settings.max_bytes:
            _too_large(visit)
        file.write(chunk)
        visit.check_time()
        if rate := visit.settings.bytes_per_s:
            ahead_s = (received - before) / rate - (time.monotonic() - begin)
            time.sleep(max(0.0, min(ahead_s, visit.deadline - time.monotonic())))
    return received


def _too_large(visit: Visit) -> None:
    raise FetchError("too_large", f"over {visit.settings.max_file_mb} MiB")


def _read_note(path: Path) -> dict[str, Any]:
    """Returns what a part is part of; empty if that was not written down whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
