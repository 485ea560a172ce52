# SPDX-License-Identifier: Apache-2.0
"""A run as one HTML page: the funnel, twelve clips to look at, and where the time went."""

import base64
import json
import time
from typing import Any

import jinja2

from dataengine.alarms import check_captions
from dataengine.corpus import Corpus
from dataengine.errors import CorpusError
from dataengine.funnel import clock
from dataengine.progress import duration
from dataengine.query.sql import connect

NUM_CLIPS = 12

_MOST_VIDEO_BYTES = 2 << 20
"""A larger clip is shown by its frames only, so that the page stays easy to open."""


def write_report(corpus: Corpus, run_id: str | None = None) -> str:
    """Writes ``runs/<run>/report.html`` and returns its path.

    Args:
        corpus: Where the run is.
        run_id: None takes the newest finished run.

    Raises:
        CorpusError: If there is no such finished run.
    """
    from dataengine.forecast import compare  # it ingests a sample, and an ingest writes a report

    run_id = run_id or _newest_run(corpus)
    if not corpus.fs.exists(corpus.path("runs", run_id)):
        raise CorpusError(
            f"No run {run_id} in {corpus.url}",
            "runs: " + ", ".join(sorted(_finished_runs(corpus))[-10:]),
        )
    record = _load(corpus, run_id, "run.json")
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            run=record,
            funnel=_load(corpus, run_id, "funnel.json"),
            stages=_load(corpus, run_id, "metrics.json"),
            captions=check_captions(corpus),
            comparison=compare(corpus, run_id),
            clips=[_card(corpus, row) for row in _pick(corpus, run_id)],
        )
    )
    name = f"runs/{run_id}/report.html"
    corpus.publish(name, lambda file: file.write(page.encode()))
    return corpus.path(name)


def _newest_run(corpus: Corpus) -> str:
    runs = _finished_runs(corpus)
    if not runs:
        raise CorpusError(f"No finished run in {corpus.url}")
    return max(runs)


def _finished_runs(corpus: Corpus) -> list[str]:
    return [path.split("/")[-2] for path in corpus.run_files("funnel.json")]


def _load(corpus: Corpus, run_id: str, name: str) -> Any:
    try:
        return json.loads(corpus.fs.cat_file(corpus.path("runs", run_id, name)))
    except FileNotFoundError:
        raise CorpusError(
            f"Run {run_id} of {corpus.url} has no {name}: it did not finish"
        ) from None


def _pick(corpus: Corpus, run_id: str) -> list[dict[str, Any]]:
    """Returns catalog rows to show: from different videos while there are any, always the same."""
    with connect(corpus) as db:
        cursor = db.sql(
            "select clips.*, videos.source from clips join videos using (video_id) "
            "where run_id = ? and status = 'kept' order by "
            "row_number() over (partition by video_id order by md5(clip_id)), md5(clip_id) limit ?",
            params=[run_id, NUM_CLIPS],
        )
        return cursor.to_arrow_table().to_pylist()


def _card(corpus: Corpus, row: dict[str, Any]) -> dict[str, Any]:
    """Returns what the page shows of one clip."""
    media = corpus.read_clip(row, ["video", "frames"])
    mp4 = (media["video"] or {}).get("bytes") or b""  # a pipeline may store frames only
    return {
        **row,
        "name": row["title"] or row["source"].rsplit("/", 1)[-1],
        "frames": [_data_url("image/jpeg", frame) for frame in media["frames"] or ()],
        "video": _data_url("video/mp4", mp4) if 0 < len(mp4) <= _MOST_VIDEO_BYTES else None,
    }


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _environment() -> jinja2.Environment:
    from dataengine.forecast import Range, range_text  # as above

    templates = jinja2.PackageLoader("dataengine", "report")
    environment = jinja2.Environment(
        loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "clock": clock,
        "duration": duration,
        "range_text": range_text,
        "amount_text": lambda value, quantity: range_text(Range(value, None, None), quantity),
        "ms": lambda value: f"{value // 60000}:{value % 60000 / 1000:06.3f}",
    }
    environment.globals["today"] = time.strftime("%Y-%m-%d", time.gmtime())
    return environment
