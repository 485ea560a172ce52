# SPDX-License-Identifier: Apache-2.0
"""The whole corridor as a user walks it: real Ray, real media, real models, broken files among them."""

import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dataengine import media
from dataengine.corpus import Corpus
from dataengine.demo import render_demo
from tests.media_factory import make_audio, make_video

ROOT = Path(__file__).parent.parent


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def send_error(self, code, message=None, explain=None):
        """A host that says 404 in a page of its own, with the type of a video."""
        self.send_response(code)
        self.send_header("Content-Type", "video/mp4")
        self.end_headers()
        self.wfile.write(b"<html>404, not here</html>")


def dataengine(*args):
    return subprocess.run(
        [sys.executable, "-m", "dataengine", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def corridor(tmp_path_factory):
    """Three good videos, one over HTTP, and one of every kind of broken source."""
    folder = tmp_path_factory.mktemp("corridor")
    truth = json.loads(render_demo(folder / "demo", num_videos=3, seed=11, workers=1).read_text())
    videos = folder / "demo" / "videos"
    good = sorted(videos.glob("*.mp4"))
    served = folder / "served"
    served.mkdir()
    good[2].rename(served / "remote.mp4")
    (videos / "truncated.mp4").write_bytes(good[0].read_bytes()[:3000])
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("this is not a video\n" * 50)
    (videos / "z_copy.mp4").write_bytes(good[0].read_bytes())
    make_audio(videos / "sound_only.mp4")
    make_video(videos / "pcm.mov", audio="pcm_s16le")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    listing = folder / "list.txt"
    listing.write_text(f"{url}/remote.mp4\n{url}/gone.mp4\nhttp://127.0.0.1:9/x.mp4\nmissing.mp4\n")
    command = ["ingest", "pipelines/quickstart.yaml", "--sources", videos, "--sources", listing]
    command += ["--corpus", folder / "corpus", "--set", "stages.download.retries=0"]
    command += ["--set", "stages.download.allow_private=true"]
    first = dataengine(*command)
    # The unreachable one failed, and would be tried again.
    again = dataengine(*command, "--set", "runtime.max_attempts=1")
    server.shutdown()
    return {
        "truth": truth["videos"], "corpus": folder / "corpus", "first": first, "again": again,
        "served": served, "videos": videos,
    }  # fmt: skip


def test_every_source_ends_once_with_clips_or_a_reason(corridor):
    assert corridor["first"].returncode == 0, corridor["first"].stderr
    rows = Corpus.open(str(corridor["corpus"])).videos().to_pylist()
    ends = {row["source"].rsplit("/", 1)[-1]: (row["status"], row["reason"]) for row in rows}
    assert ends == {
        "z_copy.mp4": ("dropped", "duplicate"),
        "demo_0000.mp4": ("kept", None),
        "demo_0001.mp4": ("kept", None),
        "remote.mp4": ("kept", None),
        "pcm.mov": ("kept", None),
        "truncated.mp4": ("dropped", "not_a_video"),
        "empty.mp4": ("dropped", "empty_file"),
        "text.mp4": ("dropped", "not_a_video"),
        "sound_only.mp4": ("dropped", "no_video_stream"),
        "gone.mp4": ("dropped", "http_4xx"),
        "x.mp4": ("failed", "connection_failed"),
        "missing.mp4": ("dropped", "missing_file"),
    }
    assert "Report:" in corridor["first"].stderr
    assert list((corridor["corpus"] / "cache").iterdir()) == [], "what was fetched stayed behind"


def test_the_corpus_verifies_down_to_the_last_frame(corridor):
    result = dataengine("verify", corridor["corpus"], "--decode")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "all in order" in result.stderr


def test_running_again_does_nothing(corridor):
    assert corridor["again"].returncode == 0
    assert "Nothing to do" in corridor["again"].stderr


def test_a_clip_shows_exactly_its_part_of_the_source(corridor):
    corpus = Corpus.open(str(corridor["corpus"]))
    sources = {row["video_id"]: row["source"] for row in corpus.videos().to_pylist()}
    checked = 0
    for row in corpus.catalog().to_pylist():
        source = sources[row["video_id"]]
        if source.startswith("http"):
            source = str(corridor["served"] / "remote.mp4")
        clip = corpus.read_clip(row, ["video"])["video"]["bytes"]
        start, end = row["start_ms"], row["end_ms"]
        with media.VideoReader(source) as reader:
            want = [f for f in reader if start <= media.floor_ms(f.time_us) < end]
            pictures = [f.picture.to_ndarray(format="gray") for f in want]
        with media.VideoReader(clip) as reader:
            got = [f.picture.to_ndarray(format="gray") for f in reader]
        assert len(got) == len(pictures)
        for index in (0, -1):
            assert np.array_equal(got[index], pictures[index]), row["clip_id"]
        checked += 1
    assert checked > 8


def test_annotations_say_what_is_known_to_be_there(corridor):
    corpus = Corpus.open(str(corridor["corpus"]))
    names = {row["video_id"]: Path(row["source"]).name for row in corpus.videos().to_pylist()}
    num_objects = num_named = num_cues = num_heard = 0
    for row in corpus.catalog().to_pylist():
        assert row["caption"]
        assert -1 <= row["clip_score"] <= 1
        written = {entry["column"] for entry in row["provenance"]}
        assert written >= {"video", "caption_video", "clip_score"}
        truth = corridor["truth"].get(names[row["video_id"]])
        if truth is None:
            continue  # not one of the demo's, or served under another name
        middle = (row["start_ms"] + row["end_ms"]) / 2
        shot = next(s for s in truth["shots"] if s["start_ms"] <= middle < s["end_ms"])
        num_objects += len(shot["objects"])
        num_named += sum(thing["colour"] in row["caption_video"] for thing in shot["objects"])
        cues = [
            (language, cue["text"])
            for language, track in truth["subtitles"].items()
            for cue in track
            if language != "en"
            and row["start_ms"] <= (cue["start_ms"] + cue["end_ms"]) / 2 < row["end_ms"]
        ]
        num_cues += len(cues)
        num_heard += sum(
            text in (row["transcript"] or "") and row["language"] == language
            for language, text in cues
        )
    assert num_named >= 0.6 * num_objects > 0
    assert num_heard == num_cues > 0


def test_the_report_is_one_file_with_clips_to_look_at(corridor):
    (report,) = corridor["corpus"].glob("runs/*/report.html")
    page = report.read_text()
    assert page.count("<article>") == 12
    assert "data:video/mp4;base64," in page
    assert "http://" not in page.replace("http://127.0.0.1", "")
    for reason in ("no_video_stream", "http_4xx", "duplicate"):
        assert reason in page


def test_the_run_is_written_down(corridor):
    (folder,) = [p.parent for p in corridor["corpus"].glob("runs/*/run.json")]
    record = json.loads((folder / "run.json").read_text())
    assert record["finished"]
    assert {"ray", "pyarrow", "torch"} <= set(record["packages"])
    assert "threshold: 27" in (folder / "pipeline.yaml").read_text()
    funnel = json.loads((folder / "funnel.json").read_text())
    assert funnel["num_videos"] == funnel["kept_videos"] + sum(
        x["num"] for x in funnel["video_losses"]
    )
    assert funnel["num_clips"] == funnel["kept_clips"] + sum(
        x["num"] for x in funnel["clip_losses"]
    )


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["ingest", "nowhere.yaml", "--sources", ".", "--corpus", "x"], 2, "cannot be read"),
        (["query", "nowhere"], 1, "Not a corpus"),
        (["verify", "."], 1, "Not a corpus"),
        (["demo", "Makefile"], 1, "Not a directory"),
        (
            ["ingest", "pipelines/quickstart.yaml", "--sources", "/nowhere", "--corpus", "out/x"],
            2,
            "No such source",
        ),
    ],
)
def test_a_users_mistake_is_one_message(args, code, said, tmp_path):
    args = [str(tmp_path / "new") if a in ("x", "out/x") else a for a in args]
    result = dataengine(*args)
    assert result.returncode == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
