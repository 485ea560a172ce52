# SPDX-License-Identifier: Apache-2.0
import csv
import io
import json
import tarfile
from itertools import pairwise
from typing import Any

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner
from webdataset.compat import WebDataset

from dataengine import lists, media, records, sources
from dataengine.cli import app
from dataengine.corpus import Corpus
from dataengine.cut import cut
from dataengine.errors import ConfigError, CorpusError, EngineError, MediaError
from dataengine.export import huggingface, pieces, run
from dataengine.export import webdataset as wds
from dataengine.export.imports import import_export
from dataengine.export.plain import plain_mp4
from dataengine.export.run import export, exports_of, read_record
from dataengine.export.settings import bytes_of, forms_of, settings_of
from dataengine.query.subsets import Definition, make_subset
from dataengine.query.verify import verify
from dataengine.remove import remove
from tests.helpers import clip_row, clips_table, ledger_row, small_corpus
from tests.media_factory import make_video

YOUTUBE = "dQw4w9WgXcQ"


@pytest.fixture(scope="module")
def clip_mp4(tmp_path_factory) -> bytes:
    """Ten frames cut out of the middle of a group of pictures: a pre-roll lies hidden before them."""
    path = make_video(tmp_path_factory.mktemp("video") / "v.mp4", (50,), options={"g": "25"})
    frame_us = [40_000 * number for number in range(10, 21)]
    clip = cut(str(path), media.probe(str(path)), frame_us)
    assert clip.mode == "copy"
    return clip.data


def commit(corpus: Corpus, *videos: tuple[str, list[dict]], **ledger) -> str:
    rows = [row for _, clips in videos for row in clips]
    shard = corpus.commit(
        clips_table(rows),
        [ledger_row(name, clips, **ledger) for name, clips in videos],
        run_id="r-1",
        fingerprint="f",
        row_group_bytes=3000,
    )
    assert shard
    return shard


def rich_corpus(path, num_shards: int = 3, num_videos: int = 2, num_clips: int = 5) -> Corpus:
    """Clips that use every kind of column: text in many scripts, nulls, lists, embeddings."""
    corpus = Corpus.create(str(path))
    corpus.take_over("r-1")
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        videos = []
        for video in range(num_videos):
            name = f"-v{shard}_{video}"
            clips = [
                clip_row(
                    name, 1000 * i, 1000 * i + 900,
                    caption=None if i == 4 else f'Ein "Ross" läuft, \n{i} 馬 \x01',
                    transcript=f" word {i} " if i % 2 else None,
                    transcript_segments=[{"start_ms": 0, "end_ms": 5, "text": "ü"}] if i else [],
                    caption_video_fine=["a", None, "c"],
                    clip_score=float(np.float32(rng.random())),
                    aesthetic_score=float(np.float32(10 * rng.random())) if i else None,
                    video_text_score=float(np.float32(0.1 * i)),
                    frames=[bytes([0xFF, 0xD8, 0xFF, i, n]) * 50 for n in range(i + 1)],
                    frame_ms=[1000 * i + n for n in range(i + 1)],
                    video={"bytes": bytes([0, 0, 0, i]) + b"ftyp" + rng.bytes(500 + i), "path": None if i else "x.mp4"},
                    clip_image_embedding=None if i == 2 else rng.random(8).astype(np.float16),
                    tags=[], title=None, language="de" if i % 2 else None,
                )
                for i in range(num_clips)
            ]  # fmt: skip
            videos.append((name, clips))
        commit(corpus, *videos)
    return corpus


def all_clips(corpus: Corpus) -> list[dict]:
    rows = []
    for shard in corpus.names("catalog"):
        with corpus.open_shard(shard) as file:
            rows += [row for row in file.read().to_pylist() if row["clip_id"]]
    return sorted(rows, key=lambda row: row["clip_id"])


def write(corpus: Corpus, format_name: str, out, replace: bool = False, **options):
    settings = settings_of(format_name, {"corpus": corpus.url, **options})
    return export(settings, str(out), replace=replace)


def samples_of(*tars, decode: bool = False) -> list[dict[str, Any]]:
    opened: Any = WebDataset([str(tar) for tar in tars], shardshuffle=False)
    return list(opened.decode() if decode else opened)


def tree(folder) -> dict[str, tuple[int, bytes]]:
    """Name -> (inode, content) of an export's own files."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("export.json", ".lock", "README.md")
    }


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


# ------------------------------------------------------------------------------------ internvid


def test_internvid_lines_are_as_released(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    hour = 3_723_004
    clips = [
        clip_row(YOUTUBE, 0, 1500, caption="a man", aesthetic_score=4.1, video_text_score=0.3),
        clip_row(YOUTUBE, hour, hour + 999, caption='sie sagt "ja"\n馬', aesthetic_score=None),
    ]
    commit(corpus, (YOUTUBE, clips), source=f"https://www.youtube.com/watch?v={YOUTUBE}")
    write(corpus, "internvid", tmp_path / "o.jsonl")
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "YoutubeID": YOUTUBE,
            "Start_timestamp": "00:00:00.000",
            "End_timestamp": "00:00:01.500",
            "Caption": "a man",
            "Aesthetic_Score": 4.1,
            "UMT_Score": 0.3,
        },
        {
            "YoutubeID": YOUTUBE,
            "Start_timestamp": "01:02:03.004",
            "End_timestamp": "01:02:04.003",
            "Caption": 'sie sagt "ja"\n馬',
            "Aesthetic_Score": None,
            "UMT_Score": None,
        },
    ]
    assert list(json.loads(lines[0])) == [
        "YoutubeID", "Start_timestamp", "End_timestamp", "Caption", "Aesthetic_Score", "UMT_Score",
    ]  # fmt: skip
    assert json.loads((tmp_path / "o.jsonl.export.json").read_text())["counts"] == {"clips": 2}


def test_internvid_list_gives_back_the_same_clips(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    (tmp_path / "local.mp4").write_bytes(b"video")
    name = records.file_video_id(str(tmp_path / "local.mp4"))
    commit(
        corpus, (name, [clip_row(name, 40, 1040, caption="x")]), source=str(tmp_path / "local.mp4")
    )
    clips = [clip_row(YOUTUBE, 100, 2100, caption="tube", aesthetic_score=5.5)]
    commit(corpus, (YOUTUBE, clips), source=f"https://www.youtube.com/watch?v={YOUTUBE}")
    write(corpus, "internvid", tmp_path / "o.jsonl")

    listed = list(sources.expand([str(tmp_path / "o.jsonl")], lists.SourceColumns()))
    assert not any(row.reason or row.bad_span for row in listed)
    by_source = {row["source"]: row["video_id"] for row in corpus.videos().to_pylist()}
    assert by_source[str(tmp_path / "local.mp4")] == name
    again = {}
    for row in listed:
        video_id = row.video_id or by_source[row.source]
        again[records.clip_id(video_id, row.start_ms, row.end_ms)] = (  # pyright: ignore[reportArgumentType]
            row.caption, as_float32(row.aesthetic_score), as_float32(row.video_text_score),
        )  # fmt: skip
    # A list's cells are stripped, and nothing else.
    assert again == {
        clip["clip_id"]: (
            clip["caption"].strip() if clip["caption"] else None,
            clip["aesthetic_score"],
            clip["video_text_score"],
        )
        for clip in all_clips(corpus)
    }


def as_float32(value: float | None) -> float | None:
    return None if value is None else float(np.float32(value))


def test_other_columns_and_conditions(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    done = write(
        corpus, "internvid", tmp_path / "o.jsonl",
        where="clip_score > p70", caption="transcript", umt_score="clip_score",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    scores = sorted(clip["clip_score"] for clip in all_clips(corpus))
    assert sorted(float(np.float32(row["UMT_Score"])) for row in rows) == scores[-9:]
    assert done.counts == {"clips": 9}
    assert {row["Caption"] for row in rows} <= {" word 1 ", " word 3 ", None}


# ----------------------------------------------------------------------------------- webdataset


def test_webdataset_is_read_by_its_library(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    write(corpus, "webdataset", tmp_path / "o", max_bytes=1 << 16)
    tars = sorted(str(path) for path in (tmp_path / "o").glob("*.tar"))
    samples = {sample["__key__"]: sample for sample in samples_of(*tars, decode=True)}
    clips = {clip["clip_id"]: clip for clip in all_clips(corpus)}
    assert samples.keys() == clips.keys()
    for key, sample in samples.items():
        clip = clips[key]
        assert sample["mp4"] == clip["video"]["bytes"]
        assert sample["txt"] == (clip["caption"] or "")
        assert [sample[f"{n:03d}.jpg"] for n in range(len(clip["frames"]))] == clip["frames"]
        assert sample["json"]["provenance"] == clip["provenance"]
        assert sample["json"]["clip_score"] == clip["clip_score"]
        if clip["clip_image_embedding"] is None:
            assert "clip_image_embedding.npy" not in sample
        else:
            array = sample["clip_image_embedding.npy"]
            assert array.dtype == np.float16
            assert array.tolist() == clip["clip_image_embedding"]


def test_tars_are_bounded_and_always_the_same(tmp_path):
    corpus = rich_corpus(tmp_path / "c", num_shards=4)
    for name in ("one", "two"):
        write(corpus, "webdataset", tmp_path / name, max_bytes=4000)
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert [(k, v[1]) for k, v in one.items()] == [(k, v[1]) for k, v in two.items()]
    tars = [name for name in one if name.endswith(".tar")]
    assert len(tars) > 5
    for name in tars:
        with tarfile.open(tmp_path / "one" / name) as tar:
            sizes = [m.size for m in tar if m.name.endswith((".mp4", ".jpg"))]
            assert sum(sizes) <= 4000


def test_a_killed_export_goes_on_to_the_same_files(tmp_path, monkeypatch):
    corpus = rich_corpus(tmp_path / "c", num_shards=4)
    settings = settings_of("webdataset", {"corpus": corpus.url, "max_bytes": 4000})
    export(settings, str(tmp_path / "plain"))
    calls = [0]
    real = wds.WebDatasetWriter._add

    def killed(self, *arguments):
        calls[0] += 1
        if calls[0] % 17 == 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(wds.WebDatasetWriter, "_add", killed)
    for _ in range(100):
        try:
            export(settings, str(tmp_path / "killed"))
            break
        except KeyboardInterrupt:
            continue
    assert calls[0] > 17
    plain, again = tree(tmp_path / "plain"), tree(tmp_path / "killed")
    assert [(k, v[1]) for k, v in plain.items()] == [(k, v[1]) for k, v in again.items()]


def test_keys_hold_no_dots(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    commit(corpus, ("a.b/c%", [clip_row("a.b/c%", 0, 1000)]))
    write(corpus, "webdataset", tmp_path / "o")
    (sample,) = samples_of(tmp_path / "o" / "000000.tar")
    assert sample["__key__"] == "a%2Eb%2Fc%25_0_1000"
    assert json.loads(sample["json"])["clip_id"] == "a.b/c%_0_1000"


def test_reencoded_clips_have_no_hidden_frames(tmp_path, clip_mp4):
    def times(data: bytes, **options: str) -> list[float]:
        container: Any
        with av.open(io.BytesIO(data), options=options) as container:
            return [float(frame.time or 0) for frame in container.decode(video=0)]

    plain = plain_mp4(clip_mp4)
    assert len(times(clip_mp4)) == 10
    assert len(times(clip_mp4, ignore_editlist="1")) > 10
    assert times(plain) == times(plain, ignore_editlist="1") == pytest.approx(times(clip_mp4))
    with pytest.raises(MediaError, match="reencode_failed"):
        plain_mp4(b"not a video")


def test_a_clip_that_cannot_be_encoded_is_named(tmp_path, clip_mp4):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    good = clip_row("v", 0, 400, video={"bytes": clip_mp4, "path": None}, width=321)
    commit(corpus, ("v", [good, clip_row("v", 1000, 2000)]))
    done = write(corpus, "webdataset", tmp_path / "o", reencode=True)
    assert done.counts == {"clips": 1, "problems": 1, "pieces": 1}
    index = pq.read_table(tmp_path / "o" / "index" / "000000.parquet").to_pylist()
    assert [row["problem"] is None for row in index] == [True, False]
    assert "reencode_failed" in index[1]["problem"]
    (sample,) = samples_of(tmp_path / "o" / "000000.tar", decode=True)
    assert {"column": "video", "model": "ffmpeg/libx264 crf 18"}.items() <= (
        sample["json"]["provenance"][-1].items()
    )
    assert sample["json"]["width"] == 320


# ---------------------------------------------------------------------------------- huggingface


@pytest.mark.parametrize("part", ["", "clip_score > 0"])
def test_huggingface_folder_is_a_dataset(tmp_path, part, clip_mp4):
    corpus = rich_corpus(tmp_path / "c")
    commit(
        corpus,
        (
            "real",
            [clip_row("real", 0, 400, clip_score=0.5, video={"bytes": clip_mp4, "path": "p.mp4"})],
        ),
    )
    write(corpus, "huggingface", tmp_path / "o", where=part or None)
    clips = {clip["clip_id"]: clip for clip in all_clips(corpus)}
    for streaming in (False, True):
        loaded = datasets.load_dataset(
            str(tmp_path / "o"), split="train", streaming=streaming, cache_dir=str(tmp_path / "hf")
        )
        assert isinstance(loaded.features["video"], datasets.Video)  # pyright: ignore[reportOptionalSubscript]
        assert loaded.features["clip_image_embedding"].feature.dtype == "float16"  # pyright: ignore
        rows = list(loaded.cast_column("video", datasets.Video(decode=False)))
        assert {row["clip_id"] for row in rows} == clips.keys()
        for row in rows:
            assert row["video"]["bytes"] == clips[row["clip_id"]]["video"]["bytes"]
            assert row["clip_image_embedding"] == clips[row["clip_id"]]["clip_image_embedding"]
        real = next(row for row in rows if row["video_id"] == "real")
        container: Any
        with av.open(io.BytesIO(real["video"]["bytes"])) as container:
            assert len(list(container.decode(video=0))) == 10


def test_huggingface_part_has_the_format_of_shards(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    write(corpus, "huggingface", tmp_path / "o", where="duration_ms > 0")
    file = pq.ParquetFile(tmp_path / "o" / "data" / "000000.parquet")
    assert file.schema_arrow.equals(corpus.clip_schema)
    assert b"huggingface" in file.schema_arrow.metadata
    column = next(
        file.metadata.row_group(0).column(i)
        for i in range(file.metadata.num_columns)
        if file.metadata.row_group(0).column(i).path_in_schema == "video.bytes"
    )
    assert column.compression == "UNCOMPRESSED"


def test_row_groups_are_made_anew(monkeypatch):
    monkeypatch.setattr(huggingface, "ROW_GROUP_BYTES", 5000)
    tables = [
        clips_table([clip_row("v", 10 * i + j, 10 * i + j + 1) for j in range(n)])
        for i, n in enumerate((1, 9, 2, 1))
    ]
    groups = list(huggingface._regrouped(tables, tables[0].schema))
    assert sum(group.num_rows for group in groups) == 13
    assert pa.concat_tables(groups).equals(pa.concat_tables(tables))
    from dataengine.corpus import media_bytes

    assert all(sum(media_bytes(group)) >= 5000 for group in groups[:-1])
    assert all(sum(media_bytes(group)) < 5000 + 1300 for group in groups)


def test_a_whole_corpus_is_linked_but_never_its_empty_rows(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    write(corpus, "huggingface", tmp_path / "o")
    names = corpus.names("catalog")
    for name in names:
        own = tmp_path / "o" / "data" / f"{name}.parquet"
        assert own.samefile(tmp_path / "c" / "shards" / f"{name}.parquet")
    before = tree(tmp_path / "o")
    remove(corpus, ["-v1_0"])
    done = write(corpus, "huggingface", tmp_path / "o")
    assert done.counts["clips"] == 25
    assert done.sync is not None
    (shard,) = done.sync.rewritten
    after = tree(tmp_path / "o")
    assert changed(before, after) == {f"data/{shard}.parquet", f"index/{shard}.parquet"}
    for path in (tmp_path / "o" / "data").iterdir():
        ids = pq.read_table(path, columns=["clip_id"])["clip_id"]
        assert ids.null_count == 0
        assert not any(clip_id.startswith("-v1_0") for clip_id in ids.to_pylist())


def test_the_card_says_what_the_dataset_is(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    make_subset(corpus, "best", Definition(where="aesthetic_score >= 4"))
    done = write(corpus, "huggingface", tmp_path / "o", subset="best", where="clip_score > 0.1")
    text = (tmp_path / "o" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert header["size_categories"] == ["n<1K"]
    assert header["language"] == ["en", "de"]
    own = datasets.Features._from_yaml_list(header["dataset_info"]["features"])
    stored = pq.read_schema(tmp_path / "o" / "data" / "000000.parquet")
    assert own == datasets.Features.from_arrow_schema(stored)
    for words in (f"{done.counts['clips']:,} clips", "aesthetic_score >= 4", "clip_score > 0.1",
                  "## Bias", "## Takedown", "## Licence", "| `caption` |", "| caption | m | 1 |"):  # fmt: skip
        assert words in text


def test_card_only_is_for_whole_shards(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    with pytest.raises(ConfigError, match="into the corpus"):
        write(corpus, "huggingface", tmp_path / "o", card_only=True)
    write(corpus, "huggingface", tmp_path / "c", card_only=True)
    loaded = datasets.load_dataset(str(tmp_path / "c"), split="train", streaming=True)
    assert len(list(loaded.cast_column("video", datasets.Video(decode=False)))) == 30
    assert not verify(corpus).problems
    remove(corpus, ["-v1_0"])
    with pytest.raises(CorpusError, match="empty rows"):
        write(corpus, "huggingface", tmp_path / "c", card_only=True)


# ---------------------------------------------------------------------------------- interleaved


def documents(folder) -> dict[str, list[dict]]:
    rows = pq.read_table(folder / "interleaved.parquet").to_pylist()
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["form"], []).append(row)
    return found


def test_interleaved_documents_have_the_three_forms(tmp_path):
    corpus = rich_corpus(tmp_path / "c", num_shards=3, num_videos=3)
    commit(corpus, ("short", [clip_row("short", 0, 900)]))
    done = write(corpus, "interleaved", tmp_path / "o", drop_video=0.0, jsonl=True)
    found = documents(tmp_path / "o")
    # 9 videos have four captioned clips each; the one with a single clip gives nothing.
    assert done.counts == {"clips": 36, "sequence": 9, "transcript": 9, "pair": 4}
    catalog = {clip["clip_id"]: clip for clip in corpus.catalog().to_pylist()}
    for document in found["sequence"]:
        (video_id,) = document["video_ids"]
        kinds = [(part["type"], part["clip_id"]) for part in document["parts"]]
        ids = [records.clip_id(video_id, 1000 * i, 1000 * i + 900) for i in range(4)]
        assert kinds == [(kind, name) for name in ids for kind in ("clip", "text")]
        for part in document["parts"]:
            clip = catalog[part["clip_id"]]
            if part["type"] == "clip":
                assert all(part[name] == clip[name] for name in ("shard", "row_group", "row"))
                assert corpus.read_clip(part, ["clip_id"]) == {"clip_id": part["clip_id"]}
            else:
                assert (part["column"], part["text"]) == ("caption", clip["caption"])
            assert (part["start_ms"], part["end_ms"]) == (clip["start_ms"], clip["end_ms"])
    for document in found["transcript"]:
        texts = [
            (part["column"], part["text"]) for part in document["parts"] if part["type"] == "text"
        ]
        assert [column for column, _ in texts] == ["caption", "caption", "transcript"] * 2
        assert [text for column, text in texts if column == "transcript"] == ["word 1", "word 3"]
    whole = {tuple(doc["video_ids"]): doc["parts"] for doc in found["sequence"]}
    used = [video_id for document in found["pair"] for video_id in document["video_ids"]]
    assert len(set(used)) == len(used) == 8
    for document in found["pair"]:
        first, second = document["video_ids"]
        assert document["parts"] == whole[(first,)] + whole[(second,)]
    lines = [
        json.loads(line) for line in (tmp_path / "o" / "interleaved.jsonl").read_text().splitlines()
    ]
    stored = pq.read_table(tmp_path / "o" / "interleaved.parquet").to_pylist()
    assert [line["document_id"] for line in lines] == [row["document_id"] for row in stored]


def test_videos_are_left_out_with_the_papers_probability(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=20, num_clips=50)
    texts = {}
    for seed in (0, 0, 1):
        write(corpus, "interleaved", tmp_path / "o", seed=seed, replace=True)
        found = documents(tmp_path / "o")
        dropped = 1 - sum(doc["num_clips"] for doc in found["sequence"]) / 1000
        assert 0.25 < dropped < 0.35
        for document in found["sequence"]:
            texts_of = [part for part in document["parts"] if part["type"] == "text"]
            assert len(texts_of) == 50  # the text stays
            assert all(a["start_ms"] <= b["start_ms"] for a, b in pairwise(document["parts"]))
        drawn = [
            [p["clip_id"] for p in d["parts"] if p["type"] == "clip"] for d in found["sequence"]
        ]
        pairs = [doc["video_ids"] for doc in found["pair"]]
        if seed in texts:
            assert texts[seed] == (drawn, pairs)
        texts[seed] = drawn, pairs
    assert texts[0][0] != texts[1][0]
    assert texts[0][1] != texts[1][1]


def test_a_document_keeps_at_least_one_video(tmp_path):
    corpus = small_corpus(tmp_path / "c", num_videos=10, num_clips=2)
    write(corpus, "interleaved", tmp_path / "o", drop_video=0.99, forms=("sequence",))
    found = documents(tmp_path / "o")
    assert found.keys() == {"sequence"}
    assert [document["num_clips"] for document in found["sequence"]] == [1] * 10


# ----------------------------------------------------------------------------------- generation


def test_generation_writes_files_and_a_table(tmp_path, clip_mp4):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    video = {"bytes": clip_mp4, "path": None}
    clips = [
        clip_row("v", 0, 2000, video=video, aesthetic_score=4.5, clip_score=0.25),
        clip_row("v", 2000, 3000, video=video, aesthetic_score=9.0),  # too short
        clip_row("v", 3000, 6000, video=video, aesthetic_score=3.9),  # too plain
        clip_row("v", 6000, 9000, video=video),  # no score
        clip_row("v", 9000, 12000, aesthetic_score=5.0),  # does not play
        clip_row("v", 12000, 15000, video=video, aesthetic_score=5.0, caption=None),
    ]
    commit(corpus, ("v", clips))
    done = write(corpus, "generation", tmp_path / "o")
    assert done.counts == {"clips": 1, "problems": 1, "pieces": 1}
    with open(tmp_path / "o" / "metadata.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row)[:8] == [
        "path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps",
    ]  # fmt: skip
    assert row["path"] == "videos/000000/v_0_2000.mp4"
    assert (tmp_path / "o" / row["path"]).read_bytes() == clip_mp4
    assert (row["num_frames"], row["height"], row["width"], row["aspect_ratio"]) == (
        "10", "240", "320", "0.75",
    )  # fmt: skip
    assert (row["resolution"], float(row["aes"]), float(row["match"])) == ("76800", 4.5, 0.25)
    assert pq.read_table(tmp_path / "o" / "metadata.parquet")["clip_id"].to_pylist() == ["v_0_2000"]
    done = write(corpus, "generation", tmp_path / "all", min_aesthetic=0.0, min_seconds=0.0)
    assert done.counts["clips"] == 4
    remove(corpus, ["v"])
    assert write(corpus, "generation", tmp_path / "o").counts["clips"] == 0
    assert not list((tmp_path / "o" / "videos").iterdir())
    assert (tmp_path / "o" / "metadata.csv").read_text().count("\n") == 1


# ------------------------------------------------------------------------------ following the corpus


@pytest.mark.parametrize("format_name", ["webdataset", "huggingface"])
def test_a_takedown_rewrites_exactly_the_files_that_held_it(tmp_path, format_name):
    corpus = rich_corpus(tmp_path / "c", num_shards=6)
    write(corpus, format_name, tmp_path / "o", where="clip_score > p50", max_bytes=4000)
    before = tree(tmp_path / "o")
    held = {
        piece for piece, rows in pieces.index_rows(Corpus(str(tmp_path / "o")))
        if any(row["clip_id"].startswith("-v2_1_") for row in rows)
    }  # fmt: skip
    assert 0 < len(held) < 10
    remove(corpus, ["-v2_1"])
    again, _ = read_record(str(tmp_path / "o"))
    done = export(again, str(tmp_path / "o"))
    after = tree(tmp_path / "o")
    touched = {name.rsplit("/", 1)[-1].partition(".")[0] for name in changed(before, after)}
    assert touched == held == {*done.sync.rewritten, *done.sync.removed}  # pyright: ignore[reportOptionalMemberAccess]
    assert not any(b"-v2_1" in content for _, content in after.values())
    # The percentile is the one that was drawn first: nothing else came or went.
    assert done.sync.added == 0  # pyright: ignore[reportOptionalMemberAccess]
    assert tree(tmp_path / "o") == after
    export(again, str(tmp_path / "o"))
    assert tree(tmp_path / "o") == after


def test_new_clips_and_new_values_come_in(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    write(corpus, "webdataset", tmp_path / "o")
    before = tree(tmp_path / "o")
    commit(corpus, ("new", [clip_row("new", 0, 1000)]))
    done = write(corpus, "webdataset", tmp_path / "o")
    assert changed(before, tree(tmp_path / "o")) == {"000001.tar", "index/000001.parquet"}
    assert done.counts["clips"] == 31
    commit(corpus, ("new", [clip_row("new", 0, 1000, caption="another")]))
    write(corpus, "webdataset", tmp_path / "o")
    (sample,) = samples_of(tmp_path / "o" / "000001.tar")
    assert sample["txt"] == b"another"


@pytest.mark.parametrize("format_name", ["webdataset", "huggingface"])
def test_a_takedown_in_the_middle_of_an_export(tmp_path, monkeypatch, format_name):
    corpus = rich_corpus(tmp_path / "c")
    real = run.write_places

    def late(db, choice, path):
        count = real(db, choice, path)
        remove(corpus, ["-v1_0"])
        return count

    monkeypatch.setattr(run, "write_places", late)
    done = write(corpus, format_name, tmp_path / "o")
    assert done.counts["clips"] == 25
    files = tree(tmp_path / "o")
    assert not any(b"-v1_0" in content for _, content in files.values())


def test_what_a_killed_process_left_is_removed(tmp_path, clip_mp4):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    row = clip_row("v", 0, 2000, video={"bytes": clip_mp4, "path": None}, aesthetic_score=5.0)
    commit(corpus, ("v", [row]))
    for format_name, left in (
        ("webdataset", ".000000.tar.abc.tmp"),
        ("huggingface", "data/.x.parquet.abc.tmp"),
        ("generation", "videos/.000000.tmp"),
    ):
        out = tmp_path / format_name
        write(corpus, format_name, out)
        before = tree(out)
        for index in (out / "index").iterdir():
            index.unlink()  # as if killed before the piece counted
        (out / left).mkdir() if format_name == "generation" else (out / left).write_bytes(b"half")
        assert write(corpus, format_name, out).counts["clips"] == 1
        after = tree(out)
        assert before.keys() == after.keys()
        assert not (out / left).exists()


def test_another_export_is_not_written_over(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    write(corpus, "webdataset", tmp_path / "o")
    with pytest.raises(ConfigError, match="Another export"):
        write(corpus, "webdataset", tmp_path / "o", caption="transcript")
    with pytest.raises(ConfigError, match="Another export"):
        write(corpus, "huggingface", tmp_path / "o")
    write(corpus, "huggingface", tmp_path / "o", replace=True)
    assert not list((tmp_path / "o").glob("*.tar"))
    assert len(list((tmp_path / "o" / "data").iterdir())) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for replace in (False, True):
        with pytest.raises(ConfigError, match="not empty"):
            write(corpus, "webdataset", tmp_path / "mine", replace=replace)
    (tmp_path / "o.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        write(corpus, "internvid", tmp_path / "o.jsonl")


def test_only_other_clips_are_swapped_in_place(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    write(corpus, "webdataset", tmp_path / "o", where="start_ms < 3000")
    done = write(corpus, "webdataset", tmp_path / "o", where="start_ms > 1000", replace=True)
    assert done.counts["clips"] == 18
    names = []
    for tar in sorted((tmp_path / "o").glob("*.tar")):
        names += [sample["__key__"] for sample in samples_of(tar)]
    assert sorted(names) == [c["clip_id"] for c in all_clips(corpus) if c["start_ms"] > 1000]


def test_the_record_and_the_note_in_the_corpus(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    make_subset(corpus, "few", Definition(num_clips=7))
    write(corpus, "webdataset", tmp_path / "o", subset="few", where="clip_score > p20")
    settings, record = read_record(str(tmp_path / "o"))
    assert (settings.corpus, settings.subset, settings.where) == (
        corpus.url,
        "few",
        "clip_score > p20",
    )
    assert record["finished"]
    assert record["resolved"]["percentiles"][0]["percent"] == 20
    assert record["facts"]["num_clips"] == record["counts"]["clips"] == 5
    assert record["subset"]["definition"]["num_clips"] == 7
    assert exports_of(corpus) == [str(tmp_path / "o")]
    assert not verify(corpus).problems


# ---------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("format_name", ["webdataset", "huggingface"])
def test_what_was_exported_comes_back_exactly(tmp_path, format_name):
    corpus = rich_corpus(tmp_path / "c")
    about = json.loads((tmp_path / "c" / "corpus.json").read_text())
    about["columns"] = {"caption_x": "caption", "embedding_x": "clip_text_embedding"}
    (tmp_path / "c" / "corpus.json").write_text(json.dumps(about))
    rows = [
        clip_row("added", 0, 900) | {"caption_x": "später", "embedding_x": [0.5, 0.25]}
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=corpus.clip_schema)
    corpus.commit(table, [ledger_row("added", rows)], run_id="r-1", fingerprint="f")
    write(corpus, format_name, tmp_path / "o")
    done = import_export(str(tmp_path / "o"), str(tmp_path / "new"), shard_bytes=6000)
    assert (done.num_clips, done.num_videos, done.num_known) == (31, 7, 0)
    assert done.num_shards > 1
    again = Corpus.open(str(tmp_path / "new"))
    assert not [p for p in verify(again).problems if "JPEG" not in p and "MP4" not in p]
    assert again.clip_schema == corpus.clip_schema
    wanted = [{"caption_x": None, "embedding_x": None} | row for row in all_clips(corpus)]
    assert all_clips(again) == wanted
    # Again: everything is there.
    done = import_export(str(tmp_path / "o"), str(tmp_path / "new"), shard_bytes=6000)
    assert (done.num_clips, done.num_known) == (0, 7)
    remove(again, ["added"])
    done = import_export(str(tmp_path / "o"), str(tmp_path / "new"))
    assert (done.num_clips, again.catalog(["clip_id"]).num_rows) == (0, 30)


def test_a_video_that_lies_apart_is_refused(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    write(corpus, "webdataset", tmp_path / "o", where="start_ms < 1000")
    write(corpus, "webdataset", tmp_path / "o", where="start_ms >= 0", replace=True)
    with pytest.raises(CorpusError, match="apart"):
        import_export(str(tmp_path / "o"), str(tmp_path / "new"))


def test_what_cannot_be_imported_is_said(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    write(corpus, "interleaved", tmp_path / "o")
    with pytest.raises(ConfigError, match="no media"):
        import_export(str(tmp_path / "o"), str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="Not an export"):
        import_export(str(tmp_path), str(tmp_path / "new"))
    write(corpus, "webdataset", tmp_path / "w")
    (tmp_path / "w" / "000000.tar").write_bytes(b"broken" * 1000)
    with pytest.raises(CorpusError, match=r"000000\.tar cannot be read"):
        import_export(str(tmp_path / "w"), str(tmp_path / "new"))


# --------------------------------------------------------------------------------------- command


def test_command_line(tmp_path):
    corpus = rich_corpus(tmp_path / "c")
    runner = CliRunner()
    out = str(tmp_path / "o")
    result = runner.invoke(app, ["export", corpus.url, "webdataset", out, "-w", "start_ms = 0"])
    assert result.exit_code == 0, result.output
    assert "6 clips" in result.output
    result = runner.invoke(app, ["export", "--refresh", out])
    assert result.exit_code == 0, result.output
    assert "Written now: 0 clips" in result.output
    result = runner.invoke(app, ["remove", corpus.url, "--video-id", "-v0_0"])
    assert result.exit_code == 0, result.output
    assert f"dataengine export --refresh {out}" in result.output
    result = runner.invoke(app, ["export", "--refresh", out])
    assert "5 clips" in result.output
    result = runner.invoke(app, ["import", out, "-c", str(tmp_path / "new")])
    assert "5 clips of 5 videos" in result.output


@pytest.mark.parametrize(
    ("format_name", "options", "words"),
    [
        ("zip", {}, "Unknown format"),
        ("webdataset", {"seed": 1}, "--seed means nothing"),
        ("interleaved", {"drop_video": 1.5}, "drop_video"),
        ("webdataset", {"caption": "nope"}, "no column nope"),
        ("webdataset", {"subset": "nope"}, "Unknown subset"),
        ("webdataset", {"where": "nope = 1"}, "cannot be run"),
        ("webdataset", {"where": "false"}, "No clip passes"),
        ("generation", {"min_aesthetic": 11.0}, "No clip passes"),
    ],
)
def test_bad_input_is_one_message(tmp_path, format_name, options, words):
    corpus = rich_corpus(tmp_path / "c", num_shards=1, num_videos=1)
    with pytest.raises(EngineError, match=words):
        write(corpus, format_name, tmp_path / "o", **options)


def test_sizes_and_forms():
    assert [bytes_of(text) for text in ("1GB", "1GiB", "500 mb", "7")] == [
        10**9,
        2**30,
        5 * 10**8,
        7,
    ]
    assert forms_of("pair, sequence") == ("sequence", "pair")
    for text in ("big", "-1GB", ""):
        with pytest.raises(ConfigError):
            bytes_of(text)
    with pytest.raises(ConfigError):
        forms_of("sonnet")
