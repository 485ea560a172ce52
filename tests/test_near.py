# SPDX-License-Identifier: Apache-2.0
import csv
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from dataengine.cli import app
from dataengine.compact import compact
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError, DependencyError
from dataengine.models.known_pairs import KNOWN_PAIRS
from dataengine.query import near
from dataengine.query.embeddings import Author, coverage
from dataengine.query.sql import connect
from tests.helpers import clip_row, clips_table, ledger_row

WIDTH = 16
AUTHOR = Author("open_clip:some", "1")


def wrote(author=AUTHOR, note=None):
    return {
        "column": "clip_image_embedding", "model": author.model, "revision": author.revision,
        "note": note,
    }  # fmt: skip


def embedded_corpus(path, vectors, *, per_video=5, per_shard=2, author=AUTHOR, **columns) -> Corpus:
    """Clips v0_0_1000, v0_1000_2000, ... with the vectors as embeddings, null where one is None.

    Every column is a list with a value per clip.
    """
    corpus = Corpus.create(str(path))
    corpus.take_over("r-1")
    videos = {}
    for at, vector in enumerate(vectors):
        video, start = f"v{at // per_video}", 1000 * (at % per_video)
        embedding = None if vector is None else np.asarray(vector, np.float16)
        own = {name: values[at] for name, values in columns.items()}
        row = clip_row(
            video, start, start + 1000, clip_image_embedding=embedding,
            provenance=[wrote(author, None if vector is not None else "failed:oom")], **own,
        )  # fmt: skip
        videos.setdefault(video, []).append(row)
    names = list(videos)
    for at in range(0, len(names), per_shard):
        part = names[at : at + per_shard]
        rows = [row for name in part for row in videos[name]]
        ledger = [ledger_row(name, videos[name]) for name in part]
        corpus.commit(
            clips_table(rows), ledger, run_id="r-1", fingerprint="f", row_group_bytes=4000
        )
    return corpus


def unit_vectors(num, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(num, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def clip_ids(num, per_video=5):
    return [
        f"v{at // per_video}_{1000 * (at % per_video)}_{1000 * (at % per_video) + 1000}"
        for at in range(num)
    ]


def brute_force(vectors, query, limit, ids):
    vectors = vectors.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ (query / np.linalg.norm(query))
    best = sorted(zip(-cosines.round(6), ids, strict=True))[:limit]
    return [clip_id for _, clip_id in best], [-value for value, _ in best]


@pytest.mark.parametrize("per_shard", [1, 3, 100])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_nearest_clips_are_those_of_brute_force(tmp_path, per_shard, threads):
    vectors = unit_vectors(60)
    vectors[7] = vectors[33] = vectors[52]  # ties
    corpus = embedded_corpus(tmp_path / "c", vectors, per_shard=per_shard)
    for query in (unit_vectors(1, seed=5)[0], vectors[7]):
        ids, cosines = brute_force(vectors, query.astype(np.float64), 10, clip_ids(60))
        with connect(corpus) as db:
            found = near.find(db, corpus, "clips", query, 10, threads=threads)
        assert found["clip_id"].to_pylist() == ids
        assert np.allclose(found["similarity"].to_numpy(), cosines, atol=2e-6)


def test_of_equally_near_clips_the_first_ids_are_taken(tmp_path):
    """However late in the order of the shards they come."""
    corpus = embedded_corpus(tmp_path / "c", np.ones((60, WIDTH)), per_shard=1)
    with connect(corpus) as db:
        for video in range(12):
            source = f"clips where video_id >= 'v{video}'"
            found = near.find(db, corpus, source, np.ones(WIDTH), 3)
            first = [clip_id for clip_id in clip_ids(60) if clip_id.split("_")[0] >= f"v{video}"]
            assert found["clip_id"].to_pylist() == sorted(first)[:3]


def ask(corpus, *args):
    result = CliRunner().invoke(app, ["query", corpus.url, *args, "-f", "csv"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return list(csv.DictReader(io.StringIO(result.stdout))), result.stderr


def test_a_clip_is_searched_by_with_conditions_and_columns(tmp_path):
    vectors = unit_vectors(40)
    corpus = embedded_corpus(tmp_path / "c", vectors, clip_score=[at / 40 for at in range(40)])
    compact(corpus)
    ids = clip_ids(40)
    expected, _ = brute_force(vectors[20:], vectors[3].astype(np.float64), 4, ids[20:])
    rows, _ = ask(
        corpus, "clip_score >= 0.5", "--near-clip", ids[3], "--limit", "4",
        "--select", "clip_id, round(similarity, 3) as s",
    )  # fmt: skip
    assert [row["clip_id"] for row in rows] == expected
    assert [float(row["s"]) for row in rows] == sorted(float(row["s"]) for row in rows)[::-1]
    rows, _ = ask(corpus, "", "--near-clip", ids[3])
    assert len(rows) == near.DEFAULT_LIMIT
    assert ids[3] not in [row["clip_id"] for row in rows], "it is not its own neighbour"
    assert next(iter(rows[0])) == "similarity"
    by_time, _ = ask(corpus, "", "--near-clip", ids[3], "--order-by", "clip_id")
    assert [row["clip_id"] for row in by_time] == sorted(row["clip_id"] for row in rows)
    top, err = ask(corpus, "clip_score > p50", "--near-clip", ids[3], "--limit", "100")
    assert len(top) == 20
    assert "p50 of clip_score" in err


def test_clips_whose_model_failed_are_counted_not_found(tmp_path):
    vectors = [*unit_vectors(11), None]
    corpus = embedded_corpus(tmp_path / "c", vectors)
    rows, err = ask(corpus, "", "--near-clip", "v0_0_1000", "--limit", "99")
    assert len(rows) == 10
    assert "1 clips have no embedding and are not found" in err
    with connect(corpus) as db, pytest.raises(CorpusError, match="has no embedding"):
        near.clip_vector(db, corpus, clip_ids(12)[11])
    with connect(corpus) as db, pytest.raises(CorpusError, match="No clip x_0_1"):
        near.clip_vector(db, corpus, "x_0_1")


def test_what_cannot_be_searched_says_why_and_what_to_type(tmp_path):
    none = embedded_corpus(tmp_path / "none", [None] * 4)
    with connect(none) as db, pytest.raises(CorpusError, match="none of 4 clips") as caught:
        near.near_statement(db, none, near_clip="v0_0_1000")
    assert "stages.score.embeddings=true" in caught.value.hint
    half = embedded_corpus(tmp_path / "half", [*unit_vectors(20), *[None] * 10])
    with connect(half) as db:
        with pytest.raises(CorpusError, match=r"1 of 3 shards lack embeddings \(10 clips\)"):
            near.near_statement(db, half, near_clip="v0_0_1000")
        # A condition that leaves them out makes the rest searchable.
        _, covered = near.near_statement(db, half, "video_id < 'v4'", near_clip="v0_0_1000")
    assert (covered.num_with, covered.num_without) == (20, 0)
    two = embedded_corpus(tmp_path / "two", unit_vectors(5), author=replace(AUTHOR, revision="2"))
    rows = [clip_row("x", 0, 1000, clip_image_embedding=unit_vectors(1)[0], provenance=[wrote()])]
    two.commit(clips_table(rows), [ledger_row("x", rows)], run_id="r-1", fingerprint="f")
    with connect(two) as db, pytest.raises(CorpusError, match="of 2 models") as caught:
        coverage(db, "clips")
    assert "some 1 (1 clips); open_clip:some 2 (5 clips)" in caught.value.message


def test_one_thing_is_searched_by(tmp_path):
    corpus = embedded_corpus(tmp_path / "c", unit_vectors(5))
    with connect(corpus) as db:
        with pytest.raises(ConfigError, match="Near what"):
            near.near_statement(db, corpus, near="a dog", near_clip="v0_0_1000")
        with pytest.raises(ConfigError, match="have 16 numbers, what is searched for 4"):
            near.find(db, corpus, "clips", np.full(4, 0.5), 3)
        with pytest.raises(CorpusError, match="No clip passes"):
            near.near_statement(db, corpus, "duration_ms > 5000", near_clip="v0_0_1000")
    with pytest.raises(ConfigError, match="--count takes no --near"):
        ask(corpus, "", "--near", "a dog", "--count")


def test_a_damaged_shard_is_named(tmp_path):
    corpus = embedded_corpus(tmp_path / "c", unit_vectors(5))
    (shard,) = corpus.names("shards")
    (tmp_path / "c" / "shards" / f"{shard}.parquet").write_bytes(b"x" * 100)
    with connect(corpus) as db, pytest.raises(CorpusError, match=shard):
        near.find(db, corpus, "clips", np.ones(WIDTH), 3)


# ------------------------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def tiny():
    from dataengine.models.clip import OpenClipConfig, build_clip_scorer

    return build_clip_scorer(OpenClipConfig(device="cpu"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, tiny):
    """A corpus of the known pictures, one a clip, whose run says who embedded them."""
    vectors = tiny.embed_images([tiny.prepare(pair.draw()) for pair in KNOWN_PAIRS])
    path = tmp_path_factory.mktemp("n") / "c"
    corpus = embedded_corpus(path, vectors, author=Author(tiny.model, tiny.revision))
    (path / "runs" / "20260101T000000-0000").mkdir()
    text = "stages:\n  score:\n    model: {kind: open_clip, model: '', device: cuda:7}\n"
    (path / "runs" / "20260101T000000-0000" / "pipeline.yaml").write_text(text)
    (path / "runs" / "20260102T000000-0000").mkdir()
    other = "stages:\n  score:\n    model: {kind: open_clip, model: local-dir:/nowhere/else}\n"
    (path / "runs" / "20260102T000000-0000" / "annotate.yaml").write_text(other)
    return corpus


def test_texts_and_pictures_are_embedded_by_the_model_of_the_corpus(pictures, tiny, tmp_path):
    ids = clip_ids(len(KNOWN_PAIRS))
    right = 0
    with connect(pictures) as db:
        covered = coverage(db, "clips")
        for clip_id, pair in zip(ids, KNOWN_PAIRS, strict=True):
            vector = near.text_vector(pictures, covered.author, pair.text)
            assert np.allclose(vector, tiny.embed_texts([pair.text])[0], atol=1e-6)
            found = near.find(db, pictures, "clips", vector, 1)
            right += found["clip_id"].to_pylist() == [clip_id]
    assert right >= len(KNOWN_PAIRS) - 1
    path = tmp_path / "p.png"
    Image.fromarray(KNOWN_PAIRS[2].draw()).save(path)
    rows, _ = ask(pictures, "", "--near-image", str(path), "--limit", "1")
    assert rows[0]["clip_id"] == ids[2]
    assert float(rows[0]["similarity"]) == pytest.approx(1, abs=2e-3)
    (tmp_path / "no.jpg").write_text("text")
    with pytest.raises(ConfigError, match="Not a picture"):
        ask(pictures, "", "--near-image", str(tmp_path / "no.jpg"))


def test_other_weights_are_refused(pictures, tiny, tmp_path):
    with pytest.raises(DependencyError, match="others now"):
        near.load_scorer(pictures, Author(tiny.model, "0123"))
    with pytest.raises(DependencyError, match="No run of") as caught:
        near.load_scorer(pictures, Author("open_clip:ViT-L-14", ""))
    assert "--near-clip" in caught.value.hint


def test_similarity_is_a_column_of_every_format(tmp_path):
    corpus = embedded_corpus(tmp_path / "c", unit_vectors(9))
    args = ["query", corpus.url, "", "--near-clip", "v0_0_1000", "--limit", "2"]
    out = CliRunner().invoke(app, [*args, "-f", "jsonl"]).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    path = tmp_path / "x.parquet"
    CliRunner().invoke(app, [*args, "-f", "parquet", "-o", str(path)])
    assert [line["similarity"] for line in lines] == pytest.approx(
        pq.read_table(path)["similarity"].to_pylist()
    )
    assert "similarity" in CliRunner().invoke(app, args).stdout
