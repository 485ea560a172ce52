# SPDX-License-Identifier: Apache-2.0
"""The viewer's addresses, and how their work is run, interrupted and bounded."""

import asyncio
import contextlib
import os
import secrets
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import anyio.to_thread
import duckdb
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.types import ASGIApp

from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, EngineError
from dataengine.query import sql, subsets
from dataengine.viewer.catalog import Catalog, Connection, Filter, Locator, NotFoundError, Order
from dataengine.viewer.export import Export, Format
from dataengine.viewer.guard import Guard
from dataengine.viewer.media import Media

QUERY_SECONDS = 120.0
"""After so long a question is given up."""

_NUM_QUERIES = 4
_NUM_READS = 4
_CHUNK_BYTES = 256 << 10
_KEPT = "private, max-age=600"
"""A frame of a page that is turned back to is not asked for again."""

_T = TypeVar("_T")


class SubsetRequest(BaseModel):
    """A filter to be saved; see `dataengine.query.subsets.Definition`."""

    name: str
    where: str = ""
    text: str = ""
    preset: str = ""
    order: str = ""
    score: str = Field("clip_score", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    num_clips: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    per_video: int | None = Field(None, ge=1)
    replace: bool = False


class Viewer:
    """The web application over one corpus.

    Args:
        corpus: What is shown.
        subset: Shown first.
        token: Whoever knows it may ask.
        cookie: Name of the cookie that carries it.
        host: Address it listens on; requests to other names are refused.
        memory: What DuckDB may hold, such as ``2GB``.
        query_seconds: After so long a question is given up.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        subset: str = "",
        token: str,
        cookie: str = "dataengine_view",
        host: str = "127.0.0.1",
        memory: str = "2GB",
        query_seconds: float = QUERY_SECONDS,
    ) -> None:
        self.corpus = corpus
        self.catalog = Catalog(corpus, memory=memory)
        self.media = Media(corpus)
        self._subset = subset
        self._memory = memory
        self._query_seconds = query_seconds
        self._queries = asyncio.Semaphore(_NUM_QUERIES)
        self._reads = asyncio.Semaphore(_NUM_READS)
        self._saving = threading.Lock()
        self.app: ASGIApp = Guard(self._routes(), token=token, cookie=cookie, host=host)

    def _routes(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            self.catalog.close()

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
        app.add_exception_handler(EngineError, _on_engine_error)
        app.add_exception_handler(NotFoundError, _on_not_found)
        app.add_exception_handler(RequestValidationError, _on_bad_request)
        app.add_exception_handler(Exception, _on_unexpected)
        for path, name, kind in (
            ("/", "index.html", "text/html"),
            ("/viewer.js", "viewer.js", "text/javascript"),
            ("/viewer.css", "viewer.css", "text/css"),
            ("/icon.svg", "icon.svg", "image/svg+xml"),
        ):
            content = files("dataengine.viewer").joinpath("page", name).read_bytes()
            app.get(path)(_constant(content, kind))
        app.get("/api/corpus")(self._about)
        app.get("/api/clips")(self._clips)
        app.get("/api/count")(self._count)
        app.get("/api/clip")(self._clip)
        app.get("/api/export")(self._export)
        app.post("/api/subsets")(self._save)
        app.get("/media/poster")(self._poster)
        app.get("/media/frame")(self._frame)
        app.get("/media/video")(self._video)
        return app

    # ------------------------------------------------------------------------------- questions

    async def _about(self, request: Request) -> Response:
        def work(connection: Connection) -> dict[str, Any]:
            return {
                "corpus": self.corpus.url,
                "subset": self._subset,
                "subsets": self.corpus.names("subsets"),
                "columns": connection.types,
                "orders": connection.orders,
            }

        return await self._answer(request, "", work)

    async def _clips(
        self,
        request: Request,
        where: str = "",
        text: str = "",
        subset: str = "",
        order: str = "",
        descending: bool = False,
        after: str = "",
        limit: Annotated[int, Query(ge=1, le=500)] = 60,
    ) -> Response:
        wanted, by = Filter(where, text, subset), Order(order, descending)

        def work(connection: Connection) -> dict[str, Any]:
            return self.catalog.page(connection, wanted, by, after, limit)

        return await self._answer(request, subset, work)

    async def _count(
        self, request: Request, where: str = "", text: str = "", subset: str = ""
    ) -> Response:
        wanted = Filter(where, text, subset)
        return await self._answer(request, subset, lambda c: self.catalog.count(c, wanted))

    async def _clip(self, request: Request, id: str) -> Response:
        return await self._answer(request, "", lambda c: self.catalog.clip(c, id))

    async def _export(
        self,
        request: Request,
        format: Format = "csv",
        where: str = "",
        text: str = "",
        subset: str = "",
        order: str = "",
        descending: bool = False,
    ) -> Response:
        """Streams rows; what is wrong with the filter is said before the first byte."""
        wanted, by = Filter(where, text, subset), Order(order, descending)
        statement = await self._ask(request, subset, lambda c: self.catalog.select(c, wanted, by))
        export = Export(self.catalog, subset, statement, format)
        export.start()
        # What goes wrong while rows are read goes wrong here, for most conditions.
        first = asyncio.create_task(asyncio.to_thread(export.take))
        await self._watch(request, first, export.stop, float("inf"))

        async def chunks() -> AsyncIterator[bytes]:
            try:
                chunk = first.result()
                while chunk is not None:
                    yield chunk
                    chunk = await asyncio.to_thread(export.take)
            finally:
                await asyncio.shield(asyncio.to_thread(export.stop))

        kinds = {"csv": "text/csv", "jsonl": "application/x-ndjson"}
        headers = {"content-disposition": f'attachment; filename="clips.{format}"'}
        kind = kinds.get(format, "application/vnd.apache.parquet")
        return StreamingResponse(chunks(), headers=headers, media_type=kind)

    async def _save(self, request: Request, wanted: SubsetRequest) -> Response:
        subsets.check_name(wanted.name)
        if wanted.preset:
            if wanted.order:
                raise ConfigError("A preset has its own order")
            definition = subsets.preset(wanted.preset, score=wanted.score)
        else:
            definition = subsets.Definition(score=wanted.score)
        if wanted.order:
            definition = replace(definition, order=subsets.check_order(wanted.order))

        def check(connection: Connection) -> str:
            self.catalog.resolved(connection, Filter(wanted.where, wanted.text))
            return sql.with_text(connection.db, wanted.where, wanted.text)

        where = await self._ask(request, "", check)
        if where and definition.where:
            where = f"({definition.where}) and ({where}\n)"
        definition = replace(
            definition,
            where=where or definition.where,
            num_clips=wanted.num_clips,
            seed=wanted.seed,
            per_video=wanted.per_video,
        )

        def draw() -> dict[str, Any]:
            with self._saving:
                made = subsets.make_subset(
                    self.corpus,
                    wanted.name,
                    definition,
                    replace_existing=wanted.replace,
                    memory=self._memory,
                )
            return asdict(made) | {"subsets": self.corpus.names("subsets")}

        return JSONResponse(await anyio.to_thread.run_sync(draw))

    # ----------------------------------------------------------------------------------- media

    async def _poster(self, request: Request, id: str) -> Response:
        jpeg = await self._read(request, id, lambda at: self.media.frame(id, at, None))
        return Response(jpeg, media_type="image/jpeg", headers={"cache-control": _KEPT})

    async def _frame(self, request: Request, id: str, n: Annotated[int, Query(ge=0)]) -> Response:
        jpeg = await self._read(request, id, lambda at: self.media.frame(id, at, n))
        return Response(jpeg, media_type="image/jpeg", headers={"cache-control": _KEPT})

    async def _video(self, request: Request, id: str) -> Response:
        data, tag = await self._read(request, id, lambda at: self.media.video(id, at))
        etag = f'"{tag}"'
        headers = {"accept-ranges": "bytes", "cache-control": "private, no-cache", "etag": etag}
        span = None
        if request.headers.get("if-range", etag) == etag:
            try:
                span = byte_range(request.headers.get("range", ""), data.size)
            except ValueError:
                headers["content-range"] = f"bytes */{data.size}"
                return Response(status_code=416, headers=headers)
        start, stop = span or (0, data.size)
        if span:
            headers["content-range"] = f"bytes {start}-{stop - 1}/{data.size}"
        headers["content-length"] = str(stop - start)
        view = memoryview(data)[start:stop]

        async def chunks() -> AsyncIterator[bytes]:
            for offset in range(0, len(view), _CHUNK_BYTES):
                yield bytes(view[offset : offset + _CHUNK_BYTES])

        return StreamingResponse(chunks(), 206 if span else 200, headers, "video/mp4")

    async def _read(self, request: Request, clip_id: str, read: Callable[[Locator], _T]) -> _T:
        """Reads media of a clip; a place that is out of date is looked up once more."""
        where = self.catalog.known_locator(clip_id)
        if where is not None:
            try:
                return await self._read_at(where, read)
            except NotFoundError:
                pass
        fresh = await self._ask(request, "", lambda c: self.catalog.locate(c, clip_id))
        return await self._read_at(fresh, read)

    async def _read_at(self, where: Locator, read: Callable[[Locator], _T]) -> _T:
        async with self._reads:
            return await anyio.to_thread.run_sync(read, where)

    # --------------------------------------------------------------------------------- running

    async def _answer(
        self, request: Request, subset: str, work: Callable[[Connection], dict[str, Any]]
    ) -> Response:
        begun = time.monotonic()
        answer = await self._ask(request, subset, work)
        return JSONResponse({**answer, "seconds": round(time.monotonic() - begun, 3)})

    async def _ask(self, request: Request, subset: str, work: Callable[[Connection], _T]) -> _T:
        """Asks the catalog in a thread, until the answer, the time-out or the client's going away."""
        holder: list[Connection] = []

        def run() -> _T:
            with self.catalog.connection(subset) as connection:
                holder.append(connection)
                return work(connection)

        def interrupt() -> None:
            if holder:
                with contextlib.suppress(duckdb.Error):
                    holder[0].db.interrupt()

        async with self._queries:
            if await request.is_disconnected():
                raise _GoneError("The client went away")
            task = asyncio.create_task(asyncio.to_thread(run))
            return await self._watch(request, task, interrupt, self._query_seconds)

    async def _watch(
        self, request: Request, task: asyncio.Task[_T], stop: Callable[[], None], seconds: float
    ) -> _T:
        """Waits for work in a thread, which it has stopped when nobody waits for it any more."""
        ends = time.monotonic() + seconds
        reason: EngineError | None = None
        pause = 0.005  # most questions are short
        try:
            while not (await asyncio.wait({task}, timeout=pause))[0]:
                pause = min(2 * pause, 0.1)
                if await request.is_disconnected():
                    reason = _GoneError("The client went away")
                elif time.monotonic() > ends:
                    reason = ConfigError(
                        f"No answer within {seconds:g} s; it was given up",
                        "a narrower condition; or dataengine query, which has no limit",
                    )
                if reason is not None:
                    stop()  # again and again: the thread may be between two statements
        except asyncio.CancelledError:
            stop()
            raise
        if reason is not None and (task.exception() is not None or isinstance(reason, _GoneError)):
            raise reason
        return task.result()


class _GoneError(EngineError):
    """Nobody waits for the answer any more."""


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Returns ``[start, stop)`` of a Range header of one range, or None if it is to be ignored.

    Several ranges at once, and what is no range of bytes, may be answered with the whole (RFC 9110,
    section 14.2).

    Raises:
        ValueError: If the range lies outside.
    """
    unit, _, spec = header.partition("=")
    first, dash, last = (part.strip() for part in spec.partition("-"))
    numbers = all(not n or (n.isascii() and n.isdigit() and len(n) < 20) for n in (first, last))
    if unit.strip().lower() != "bytes" or not dash or not numbers or not (first or last):
        return None
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return None
    if start >= size or start >= stop:
        raise ValueError(header)
    return start, stop


def _constant(content: bytes, kind: str) -> Callable[[], Any]:
    async def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


async def _on_engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    status = 499 if isinstance(error, _GoneError) else 400
    return JSONResponse({"message": error.message, "hint": error.hint}, status)


async def _on_not_found(request: Request, error: Exception) -> Response:
    return JSONResponse({"message": str(error), "hint": ""}, 404)


async def _on_bad_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors()]
    return JSONResponse({"message": "; ".join(problems), "hint": ""}, 400)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(
        {"message": "Something went wrong in the viewer", "hint": "its terminal says what"}, 500
    )


# ------------------------------------------------------------------------------------- serving


def listen(host: str, port: int) -> socket.socket:
    """Returns a listening socket.

    Raises:
        ConfigError: If the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Cannot listen on {host}, port {port}: {error}", "--port 0 takes a free one"
        ) from None


def address_of(sock: socket.socket, token: str) -> str:
    """Returns the URL to open."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/?token={token}"


def server(
    corpus: Corpus,
    sock: socket.socket,
    *,
    subset: str = "",
    token: str,
    memory: str = "2GB",
    query_seconds: float = QUERY_SECONDS,
) -> uvicorn.Server:
    """Returns a server for a socket; run it with ``run(sockets=[sock])``."""
    host, port = sock.getsockname()[:2]
    viewer = Viewer(
        corpus,
        subset=subset,
        token=token,
        cookie=f"dataengine_view_{port}",
        host=host,
        memory=memory,
        query_seconds=query_seconds,
    )
    config = uvicorn.Config(
        viewer.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def view(
    data: str,
    *,
    host: str,
    port: int,
    open_browser: bool,
    memory: str,
    say: Callable[[str], None],
) -> None:
    """Shows ``CORPUS`` or ``CORPUS#SUBSET`` until interrupted.

    Args:
        data: What to show.
        host: Address to listen on.
        port: 0 takes a free one.
        open_browser: Opens the page, where there is a screen.
        memory: What DuckDB may hold, such as ``2GB``.
        say: Is given the URL.

    Raises:
        CorpusError: If there is no such corpus or subset.
        ConfigError: If it cannot listen there.
    """
    corpus, subset = sql.open_data(data)
    token = secrets.token_urlsafe(24)
    with listen(host, port) as sock:
        url = address_of(sock, token)
        running = server(corpus, sock, subset=subset, token=token, memory=memory)
        say(url)
        if open_browser and _has_screen():
            webbrowser.open(url)
        running.run(sockets=[sock])


def _has_screen() -> bool:
    """A text browser in the terminal is not what anyone wants."""
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or bool(shown)
