# SPDX-License-Identifier: Apache-2.0
"""A local HTTP server with every fault a host can have, and a log of how it was asked.

``/<kind>/<name>.mp4`` is a file, ``/<kind>/<name>`` the same answer without a suffix (a page to a
client), and ``/watch/<kind>/<name>`` a page that embeds the file. Kinds are the methods below.
"""

import select
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VTT = "WEBVTT\n\n00:00.000 --> 00:00.800\nsaid <b>in</b> {language}\n"


@dataclass(frozen=True)
class Hit:
    """One request: when (`time.time`), of which host, with how many others of that host at work."""

    time_s: float
    host: str
    path: str
    range: str
    num_at_work: int


class FaultServer:
    """Serves on all of 127.0.0.0/8, so that ``127.0.0.2`` and ``127.0.0.3`` are different hosts.

    Args:
        video: Bytes of the good file.
        slow_s: How long a slow body takes.
    """

    def __init__(self, video: bytes, slow_s: float = 3.0) -> None:
        self.video = video
        self.slow_s = slow_s
        self.hits: list[Hit] = []
        self.asked: Counter[str] = Counter()
        self.at_work: dict[Any, str] = {}
        self.lock = threading.Lock()
        self.etag = '"1"'
        self.files: dict[str, tuple[bytes, str]] = {}
        """What lies under ``/static/``: name -> bytes and content type."""
        self.mended = False
        """Once set, files that always failed in a way that may pass are served."""
        self.cookies: list[str | None] = []
        handler = type("BoundHandler", (_Handler,), {"faults": self})
        self._server = _Server(("", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        serve = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        serve.start()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"

    def paths(self) -> list[str]:
        return [hit.path for hit in self.hits]

    def most_at_work(self) -> dict[str, int]:
        """Host -> most requests it had to answer at a time."""
        most: Counter[str] = Counter()
        for hit in self.hits:
            most[hit.host] = max(most[hit.host], hit.num_at_work)
        return dict(most)

    def least_pause_s(self, window: int = 1) -> dict[str, float]:
        """Host -> shortest pause between requests, as the mean of so many in a row.

        A request is noted when its thread runs, which on a busy machine is a little late by chance;
        over a window of many that does not matter.
        """
        times: dict[str, list[float]] = {}
        for hit in sorted(self.hits, key=lambda hit: hit.time_s):
            times.setdefault(hit.host, []).append(hit.time_s)
        return {
            host: min((at[i + window] - at[i]) / window for i in range(len(at) - window))
            for host, at in times.items()
            if len(at) > window
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """Clients that hang up are the point."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    faults: FaultServer

    def do_GET(self):
        host = self.headers.get("Host", "").rpartition(":")[0]
        _, kind, *rest = self.path.split("?")[0].split("/")
        self.name = "/".join(rest)
        self.is_file = self.path.endswith(".mp4")
        faults = self.faults
        with faults.lock:
            gone = [c for c in faults.at_work if _hung_up(c)]
            for connection in gone:
                del faults.at_work[connection]
            faults.at_work[self.connection] = host
            count = sum(other == host for other in faults.at_work.values())
            faults.asked[self.path] += 1
            self.turn = faults.asked[self.path]
            hit = Hit(time.time(), host, self.path, self.headers.get("Range", ""), count)
            faults.hits.append(hit)
            faults.cookies.append(self.headers["Cookie"])
        try:
            getattr(self, kind.replace("-", "_"))()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            self.done()

    def do_HEAD(self):
        self.do_GET()

    def done(self):
        with self.faults.lock:
            self.faults.at_work.pop(self.connection, None)

    # What a path may be called.

    def ok(self):
        """The file, whole or in part."""
        self.file(self.faults.video)

    def static(self):
        """A file of the test's own."""
        if self.name in self.faults.files:
            return self.answer(200, *self.faults.files[self.name])
        return self.fail(404)

    def weak(self):
        """A file that cannot be resumed: neither ranges nor a tag."""
        self.answer(200, self.faults.video, "video/mp4")

    def moved(self):
        self.redirect("/ok/" + self.name)

    def loop(self):
        self.redirect(self.path)

    def elsewhere(self):
        """Leads to another host: ``/elsewhere/127.0.0.3/ok/a.mp4``."""
        host, _, path = self.name.partition("/")
        self.redirect(f"http://{host}:{self.faults.port}/{path}")

    def odd(self):
        """Leads to another scheme."""
        self.redirect("ftp://127.0.0.1/a.mp4")

    def slow(self):
        """A body in drops; complete in time only for the patient."""
        if self.faults.mended:
            return self.ok()
        video = self.faults.video
        self.head(200, "video/mp4", len(video))
        pieces = 100
        for index in range(pieces):
            self.wfile.write(
                video[len(video) * index // pieces : len(video) * (index + 1) // pieces]
            )
            if _hung_up(self.connection, self.faults.slow_s / pieces):
                self.close_connection = True
                return None
        return None

    def nap(self):
        """A file after a while."""
        time.sleep(0.1)
        self.ok()

    def stall(self):
        """No answer."""
        if self.faults.mended:
            return self.ok()
        _hung_up(self.connection, 30)
        self.close_connection = True
        return None

    def cut(self):
        """Always half the body, and no ranges."""
        return self.ok() if self.faults.mended else self.half(ranges=False)

    def cut_once(self):
        """Half the body, the rest when asked for it."""
        return self.half(ranges=True) if self.turn == 1 else self.ok()

    def stall_once(self):
        """Half the body and then silence, the rest when asked for it."""
        if self.turn > 1:
            return self.ok()
        self.half(ranges=True)
        _hung_up(self.connection, 30)
        return None

    def reset_once(self):
        """Half the body and then a broken connection, the rest when asked for it."""
        if self.turn > 1:
            return self.ok()
        self.half(ranges=True)
        time.sleep(0.1)  # what is on its way would be lost
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        return None

    def changed(self):
        """Half of an old version of the file, and the file afterwards."""
        if self.turn > 1:
            self.faults.etag = '"2"'
            return self.ok()
        return self.half(ranges=True, video=self.faults.video[::-1])

    def gone(self):
        self.fail(410)

    def missing(self):
        self.fail(404)

    def forbidden(self):
        self.fail(403)

    def full(self):
        """Asked too often, always."""
        return self.ok() if self.faults.mended else self.fail(429)

    def full_once(self):
        """Asked too often, and says for how long."""
        return self.fail(429, {"Retry-After": "1"}) if self.turn == 1 else self.ok()

    def full_long(self):
        self.fail(429, {"Retry-After": "86400"})

    def broken(self):
        return self.ok() if self.faults.mended else self.fail(500)

    def broken_once(self):
        return self.fail(503) if self.turn == 1 else self.ok()

    def hangs_up(self):
        """Closes the connection without an answer."""
        self.close_connection = True

    def text(self):
        self.answer(200, b"<html><p>Nothing to see</p></html>", "text/html; charset=utf-8")

    def disguised(self):
        """A playlist that calls itself a video."""
        self.answer(200, b"#EXTM3U\nfile:///etc/passwd\n", "video/mp4")

    def empty(self):
        self.answer(200, b"", "video/mp4")

    def large(self):
        self.answer(200, bytes(3 << 20), "video/mp4")

    def large_unsaid(self):
        """A large body whose length is not said."""
        self.send_response(200)
        self.send_header("Content-Type", "video/mp4")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for _ in range(30):
            self.wfile.write(bytes(100_000))

    def bomb(self):
        """A small page that unpacks to 400 MB."""
        pack = zlib.compressobj(1, wbits=31)
        pieces = [pack.compress(b"<html>"), *(pack.compress(bytes(4 << 20)) for _ in range(100))]
        body = b"".join([*pieces, pack.flush()])
        self.answer(200, body, "text/html", {"Content-Encoding": "gzip"})

    def subtitles(self):
        language = self.name.partition(".")[0]
        self.answer(200, VTT.format(language=language).encode(), "text/vtt")

    def watch(self):
        """A page with a video and its subtitles."""
        page = (
            "<html><head><title>A day</title></head><body>"
            f'<video src="/{self.name}.mp4" type="video/mp4">'
            '<track kind="subtitles" srclang="en" src="/subtitles/en.vtt">'
            '<track kind="subtitles" srclang="de" src="/subtitles/de.vtt">'
            "</video></body></html>"
        )
        self.answer(200, page.encode(), "text/html; charset=utf-8")

    def watch_two(self):
        """A page with two videos."""
        videos = "".join(f'<video src="/ok/{n}.mp4" type="video/mp4"></video>' for n in "ab")
        self.answer(200, f"<html><body>{videos}</body></html>".encode(), "text/html")

    def watch_away(self):
        """A page whose video lies on another host."""
        source = f"http://127.0.0.9:{self.faults.port}/ok/{self.name}.mp4"
        self.answer(200, f'<html><video src="{source}"></video></html>'.encode(), "text/html")

    # How they are sent.

    def head(self, status, kind, length, headers=None):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, status, body, kind, headers=None):
        self.head(status, kind, len(body), headers)
        if self.command == "GET":
            # The client may ask again as soon as it has the last byte.
            self.wfile.write(body[:-1])
            self.done()
            self.wfile.write(body[-1:])

    def file(self, body):
        tags = {"Accept-Ranges": "bytes", "ETag": self.faults.etag}
        asked = self.headers.get("Range", "")
        same = self.headers.get("If-Range", self.faults.etag) == self.faults.etag
        if not asked or not same:
            return self.answer(200, body, "video/mp4", tags)
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start >= len(body):
            return self.answer(416, b"", "text/plain", {"Content-Range": f"bytes */{len(body)}"})
        tags["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self.answer(206, body[start:], "video/mp4", tags)

    def half(self, ranges, video=None):
        video = video or self.faults.video
        tags = {"Accept-Ranges": "bytes", "ETag": self.faults.etag} if ranges else {}
        self.head(200, "video/mp4", len(video), tags)
        self.wfile.write(video[: len(video) // 2])
        self.close_connection = True

    def fail(self, status, headers=None):
        self.answer(status, b"<html>no</html>", "text/html", headers)

    def redirect(self, where):
        self.answer(302, b"moved", "text/plain", {"Location": where})

    def log_message(self, format, *args):
        pass


def _hung_up(connection, within_s: float = 0.0) -> bool:
    """Whether the client closes a connection within some time."""
    try:
        readable, _, _ = select.select([connection], [], [], within_s)
        return bool(readable) and not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except (OSError, ValueError):
        return True
