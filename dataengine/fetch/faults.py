# SPDX-License-Identifier: Apache-2.0
"""Why a source could not be fetched: one class per cause, each known to be worth a retry or not."""

import errno
import re

CLASSES: dict[str, tuple[str, bool]] = {
    # What the site says of the video.
    "unavailable": ("the site says that the video was removed or never was", False),
    "private": ("needs a login, a membership or a password", False),
    "geo": ("not shown in the country the request came from", False),
    "age_limited": ("for older viewers than age_limit allows, or asks for a proof of age", False),
    "bot_check": ("the site asks whether a person is there", True),
    "live": ("a stream that is on air or announced", True),
    "drm": ("encrypted against copying", False),
    # What our own limits say of it.
    "too_long": ("longer than max_duration_s", False),
    "too_short": ("shorter than min_duration_s", False),
    "too_small": ("less high than min_height", False),
    "too_large": ("more bytes than max_file_mb", False),
    # What was named is not one video.
    "unsupported": ("no extractor knows the page, or it offers nothing that can be fetched", False),
    "playlist": ("a page with several videos: list them one by one", False),
    "not_a_video": ("a page or text where a video was to be", False),
    "empty_file": ("no bytes", False),
    # What the server answered.
    "http_429": ("the server is asked too often", True),
    "http_4xx": ("the server refuses: not found, gone, forbidden", False),
    "http_5xx": ("the server failed", True),
    "redirect_loop": ("more redirects than are followed", False),
    # What happened on the way.
    "timeout": ("no byte for timeout_s, or not done after fetch_timeout_s", True),
    "incomplete": ("the body broke off, and could not be completed", True),
    "connection_failed": ("the name is not known, or nobody answers there", True),
    # What we do not ask for.
    "private_address": ("an address inside a private network; see allow_private", False),
    "refused_scheme": ("neither HTTP nor an object store", False),
    # Files and object stores.
    "missing_file": ("no such file or object", False),
    "permission": ("the store or file system refuses to give it", False),
    "unreadable": ("the file system failed", False),
    # This machine.
    "disk_full": ("no room left for the file", True),
    "out_of_memory": ("fetching took more than memory_mb", True),
    "fetch_crashed": ("the process that fetched it died", True),
    "download_failed": ("anything else; the detail says what", True),
}
"""Class -> (what it means, whether a later attempt may succeed)."""

# What the messages of yt-dlp's extractors mean; the first match wins.
_MESSAGES: tuple[tuple[str, str], ...] = (
    (r"not a bot|captcha|unusual traffic", "bot_check"),
    (r"HTTP Error 429|too many requests|rate.?limit", "http_429"),
    (r"age.restricted|confirm your age|inappropriate for some users", "age_limited"),
    (r"private video|log.?in|sign.?in|members.only|password|subscri(be|ption)|paid", "private"),
    (r"in your (country|location|region)|geo.?(restrict|block)", "geo"),
    (r"\bDRM\b", "drm"),
    (r"live event will begin|premieres? in|is not currently live|offline", "live"),
    (r"unsupported url|no suitable extractor|requested format|no video formats", "unsupported"),
    (r"redirect loop", "redirect_loop"),
    (r"HTTP Error 408|timed? ?out", "timeout"),
    (r"HTTP Error 4\d\d", "http_4xx"),
    (r"HTTP Error 5\d\d", "http_5xx"),
    (r"more expected|bytes, expected|too short", "incomplete"),
    (r"did not get any data|file is empty", "empty_file"),
    (r"unavailable|removed|deleted|does not exist|no longer|terminated|not found", "unavailable"),
    (r"resolve|connection|unreachable|refused|certificate", "connection_failed"),
)


class FetchError(Exception):
    """A source that could not be fetched.

    Attributes:
        reason: A key of `CLASSES`.
        detail: One line for the ledger.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = one_line(detail)

    @property
    def retryable(self) -> bool:
        """Whether a later attempt may succeed."""
        return CLASSES[self.reason][1]


def classify_status(status: int) -> str:
    """Returns the class of an HTTP status that is not a success."""
    match status:
        case 429:
            return "http_429"
        case 408:
            return "timeout"
        case _:
            return "http_5xx" if status >= 500 else "http_4xx"


def classify_message(message: str) -> str:
    """Returns the class that an extractor's message stands for."""
    for pattern, reason in _MESSAGES:
        if re.search(pattern, message, re.IGNORECASE):
            return reason
    return "download_failed"


def classify_os_error(error: OSError) -> str:
    """Returns the class of an error of the file system, or of a socket that is not wrapped."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ConnectionError):
        return "connection_failed"
    if isinstance(error, FileNotFoundError):
        return "missing_file"
    if isinstance(error, PermissionError):
        return "permission"
    return "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "unreadable"


def one_line(message: str) -> str:
    """Returns a message without colours, line breaks and passwords, short enough for a ledger."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", message)
    plain = re.sub(r"//[^/@\s]+@", "//***@", plain)
    return " ".join(plain.split())[:300]
