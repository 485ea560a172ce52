# SPDX-License-Identifier: Apache-2.0
"""One HTTP session for one video: every request, redirects included, waits for its turn.

yt-dlp's requests and our own go through the same adapter (`pages` mounts it in yt-dlp's session),
so limits, retries, Retry-After and the guard are one piece of code and cannot disagree.
"""

import email.utils
import http.cookiejar
import random
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import BaseAdapter, HTTPAdapter

from dataengine import __version__
from dataengine.fetch import guard
from dataengine.fetch.faults import FetchError
from dataengine.fetch.polite import HostLimits
from dataengine.fetch.settings import FetchSettings

MAX_REDIRECTS = 10
_TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_BACKOFF_S = 60.0


class Visit:
    """What one video's fetch keeps in mind: its deadline, its proxy and its place at a host.

    Args:
        settings: How to fetch.
        number: A number of the video and the attempt, which picks the proxy.
        limits: Of the node; by default those that the settings ask for.
    """

    def __init__(
        self, settings: FetchSettings, number: int = 0, limits: HostLimits | None = None
    ) -> None:
        self.settings = settings
        self.deadline = time.monotonic() + settings.fetch_timeout_s
        proxies = settings.proxies
        self.proxy = proxies[number % len(proxies)].get_secret_value() if proxies else None
        least = settings.sleep_interval_s
        most = settings.max_sleep_interval_s or least
        self.limits = limits or HostLimits(settings.per_host_concurrency, (least, most))
        self.given_up: set[str] = set()
        self.tags: dict[str, str] = {}
        self.open_answer: requests.Response | None = None

    def __enter__(self) -> "Visit":
        self._guard = guard.guarded(self.settings.allow_private, [self.proxy] if self.proxy else [])
        self._guard.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close_answer()
        self.limits.leave()
        self._guard.__exit__(*exc)

    def check_time(self) -> None:
        """Raises FetchError (``timeout``) when the video's time is over."""
        if time.monotonic() > self.deadline:
            seconds = self.settings.fetch_timeout_s
            raise FetchError("timeout", f"not done after {seconds:g} s (fetch_timeout_s)")

    def pause(self, tries: int) -> None:
        """Sleeps before a further try; twice as long each time, and never quite alike."""
        seconds = min(self.settings.backoff_s * 2**tries, _LONGEST_BACKOFF_S)
        seconds *= random.uniform(0.75, 1.25)
        self.check_time()
        time.sleep(max(0.0, min(seconds, self.deadline - time.monotonic())))

    def close_answer(self) -> None:
        """Closes the answer that is still open: one video never has two at a time."""
        if self.open_answer is not None:
            self.open_answer.close()
            self.open_answer = None

    def make_session(self) -> requests.Session:
        """Returns a session for plain HTTP, with the user's cookies and proxy."""
        session = requests.Session()
        session.max_redirects = MAX_REDIRECTS
        session.headers["User-Agent"] = f"dataengine/{__version__}"
        session.headers["Accept-Encoding"] = "identity"  # lengths and ranges are of the file itself
        if self.proxy:
            session.trust_env = False
            if self.proxy.startswith("socks"):
                import yt_dlp.networking  # noqa: F401 - gives requests a client for SOCKS
            session.proxies = {"http": self.proxy, "https": self.proxy}
        if self.settings.cookies_file:
            for cookie in read_cookies(self.settings.cookies_file):
                session.cookies.set_cookie(cookie)
        for scheme in ("http://", "https://"):
            session.mount(scheme, PoliteAdapter(HTTPAdapter(), self))
        return session


def read_cookies(path: str) -> http.cookiejar.CookieJar:
    """Returns the cookies of a file in Netscape format.

    Raises:
        OSError: If it cannot be read, or is in another format.
    """
    jar = http.cookiejar.MozillaCookieJar(path)
    jar.load(ignore_discard=True, ignore_expires=True)
    for cookie in jar:
        if cookie.expires == 0:  # how browsers write down a session's cookie
            cookie.expires = None
    return jar


class PoliteAdapter(BaseAdapter):
    """Sends requests through another adapter: in turn, and again where a fault may pass."""

    def __init__(self, inner: BaseAdapter, visit: Visit) -> None:
        super().__init__()
        self._inner = inner
        self._visit = visit

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:  # type: ignore[override]
        """Sends one request, and returns its answer whatever its status.

        Raises:
            FetchError: If time is over, or the address is refused.
            requests.RequestException: If nobody answers.
        """
        visit = self._visit
        url = request.url or ""
        host = place = urlsplit(url).hostname or ""
        repeatable = request.method in ("GET", "HEAD") and url not in visit.given_up
        tries_left = visit.settings.retries if repeatable else 0
        tries = 0
        if visit.proxy or guard.environment_proxies():
            guard.check_host(host, visit.settings.allow_private)
        if visit.proxy:
            # What the host sees, and counts, is the proxy's address.
            place = f"{host} through {urlsplit(visit.proxy).netloc.rpartition('@')[2]}"
        if "Range" in request.headers and url in visit.tags:
            # The rest of a file is of use only if it is still the same file; yt-dlp does not ask.
            request.headers.setdefault("If-Range", visit.tags[url])
        while True:
            visit.check_time()
            visit.close_answer()
            visit.limits.take_turn(place, visit.deadline)
            try:
                answer = self._inner.send(request, **options)
            except (requests.ConnectionError, requests.Timeout):
                if tries >= tries_left:
                    visit.given_up.add(url)
                    raise
                visit.pause(tries)
            else:
                visit.open_answer = answer
                if answer.status_code == 200 and (tag := file_tag(answer.headers)):
                    visit.tags[url] = tag
                if answer.status_code not in _TRY_AGAIN:
                    return answer
                seconds = retry_after_s(answer.headers, time.time())
                if seconds is not None:
                    longest = visit.settings.max_retry_after_s
                    visit.limits.postpone(place, min(seconds, longest), visit.deadline)
                    tries = tries_left if seconds > longest else tries
                if tries >= tries_left:
                    visit.given_up.add(url)
                    return answer
                visit.close_answer()
                if seconds is None:
                    visit.pause(tries)
            tries += 1

    def close(self) -> None:
        """Closes the connections."""
        self._inner.close()


def file_tag(headers: Mapping[str, str]) -> str:
    """Returns what names this very version of a file, to be asked for in If-Range; empty if nothing.

    A weak ETag promises the same meaning, not the same bytes (RFC 9110, 8.8.3).
    """
    tag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if tag[:2] in ("", "W/") else tag


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Returns how long a server wants to be left alone (RFC 9110, 10.2.3), None if it does not say.

    Args:
        headers: Of its answer; ``Retry-After`` holds seconds or a date.
        now: Unix time.
    """
    said = headers.get("Retry-After", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - now)
    except ValueError:
        return None
