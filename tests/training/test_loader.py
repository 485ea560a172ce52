# SPDX-License-Identifier: Apache-2.0
# Parts of a Batch are optional; where one is missing, a test fails by itself.
# pyright: reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false
# pyright: reportArgumentType=false
import io
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import av
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dataengine.compact import compact
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, CorpusError, DependencyError
from dataengine.query.subsets import Definition, make_subset
from training.data.corpora import open_corpora
from training.data.index import Shard, open_index, split_by_video
from training.data.shards import Place, ShardReader


def sources(*urls, **options):
    return {"data__sources": [{"data": url} for url in urls], "data__held_out": 0.0, **options}


def loader(url, recipe, rank=0, world_size=1, **options):
    """Of all clips of a corpus."""
    corpora = open_corpora(recipe(**sources(url, **options)))
    return corpora.train_loader(seed=1, rank=rank, world_size=world_size)


def every_held_out(url, recipe, rank=0, world_size=1, **options):
    corpora = open_corpora(recipe(**sources(url, **options)), hold_out_all=True)
    return list(corpora.held_out_loader(rank, world_size))


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_equal_batches(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in batch._fields:
            field, same = getattr(batch, name), getattr(other, name)
            assert torch.equal(field, same) if torch.is_tensor(field) else field == same, name


def assert_parts_of_batches(parts, whole):
    """``parts``: of every process its batches."""
    for batch, *shares in zip(whole, *parts, strict=True):
        for name in ("frames", "crop", "fbank", "tokens", "valid", "caption_id", "position"):
            field = getattr(batch, name)
            if field is not None:
                assert torch.equal(field, torch.cat([getattr(s, name) for s in shares])), name


def test_processes_share_global_batches_that_do_not_depend_on_their_number(shapes_corpus, recipe):
    options = {"data__flip": True, "data__slots": 3}
    whole = take(loader(shapes_corpus, recipe, **options), 14)  # 11 batches an epoch
    assert [len(batch.frames) for batch in whole] == [8] * 14
    seen = torch.cat([batch.position for batch in whole[:11]]).tolist()
    assert len(set(seen)) == 88
    for world_size in (2, 4):
        parts = [
            take(loader(shapes_corpus, recipe, rank, world_size, **options), 14)
            for rank in range(world_size)
        ]
        assert_parts_of_batches(parts, whole)


def test_batch_must_be_shared_evenly(shapes_corpus, recipe):
    with pytest.raises(ConfigError, match="batch_size 8 cannot be shared evenly by 3") as caught:
        loader(shapes_corpus, recipe, 0, 3)
    assert caught.value.hint == "--set data.batch_size=9"


def test_batches_do_not_depend_on_the_number_of_readers(shapes_corpus, recipe):
    alone = take(loader(shapes_corpus, recipe), 15)
    helped = take(loader(shapes_corpus, recipe, data__num_workers=2), 15)
    assert_equal_batches(alone, helped)


@pytest.mark.parametrize(
    "is_remote",
    [False, pytest.param(True, marks=pytest.mark.slow)],  # forked, spawned
)
@pytest.mark.parametrize("held_out", [False, True])
def test_readers_outlive_what_asks_a_run_to_stop(shapes_corpus, recipe, is_remote, held_out):
    options = sources(shapes_corpus, data__eval_batch_size=6)

    def open_stream(num_workers):
        config = recipe(**options, data__num_workers=num_workers)
        corpora = open_corpora(config, hold_out_all=held_out)
        corpora = replace(corpora, is_remote=is_remote and num_workers > 0)
        return corpora.held_out_loader() if held_out else iter(corpora.train_loader())

    stream = open_stream(1)
    batches = take(stream, 1)
    (reader,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(reader.pid, number)
        time.sleep(0.05)
    # More than what a reader prepares.
    batches += take(stream, 11)
    assert_equal_batches(batches, take(open_stream(0), 12))
    assert multiprocessing.active_children() == [reader]
    del stream
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("taken", [1, 10, 11, 13])  # 11 batches an epoch
@pytest.mark.parametrize(("num_workers", "unique"), [(0, False), (2, False), (0, True)])
def test_resumed_stream_goes_on_where_it_was_left(
    shapes_corpus, recipe, taken, num_workers, unique
):
    options = {"data__unique_videos": unique}
    whole = take(loader(shapes_corpus, recipe, **options), taken + 4)
    first = loader(shapes_corpus, recipe, data__num_workers=num_workers, **options)
    take(first, taken)
    # Through JSON: the state must be plain values.
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(shapes_corpus, recipe, **options)
    second.load_state_dict(state)
    assert_equal_batches(take(second, 4), whole[taken:])
    # With another number of processes, too.
    parts = []
    for rank in range(2):
        part = loader(shapes_corpus, recipe, rank, 2, **options)
        part.load_state_dict(state)
        parts.append(take(part, 4))
    assert_parts_of_batches(parts, whole[taken:])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"data__batch_size": 4}, ["mix.video.batch_size: 8 then, 4 now"]),
        ({"data__lanes": 4, "data__shuffle_buffer": 3}, ["lanes: 2", "shuffle_buffer"]),
        ({"data__mix": {"image": {}}}, ["mix.video.clips", "mix.image.clips: None then"]),
        ({"data__mix": {"video": {"weight": 0.5}}}, ["mix.video.weights: [1.0] then, [0.5] now"]),
        ({"data__unique_videos": True, "data__slots": 2}, ["unique_videos", "slots: 4 then"]),
    ],
)
def test_position_in_other_batches_is_refused(shapes_corpus, recipe, change, names):
    state = loader(shapes_corpus, recipe).state_dict()
    with pytest.raises(ConfigError) as caught:
        loader(shapes_corpus, recipe, **change).load_state_dict(state)
    assert all(name in caught.value.message for name in names), caught.value.message


def test_position_in_another_corpus_is_refused(shapes_corpus, recipe, write_corpus, make_row):
    state = loader(shapes_corpus, recipe).state_dict()
    rows = [make_row(0, i, caption="x", frames=[b""]) for i in range(90)]
    with pytest.raises(ConfigError, match=r"mix.video.clips: .* then"):
        loader(write_corpus(rows), recipe).load_state_dict(state)


def test_broken_clips_are_named_once_and_keep_their_place(
    write_corpus, make_row, make_frames, recipe, caplog
):
    good = make_frames("red", "square", "grey", np.random.default_rng(0))
    at = good[0].index(b"\xff\xc0") + 5  # height and width
    huge = good[0][:at] + b"\xff\xdc\xff\xdc" + good[0][at + 4 :]
    broken = [good[0][:200], huge, b"no jpeg", b"\xff\xd8\xff\xd9"]
    rows = [make_row(v, 0, caption=f"clip {v}", frames=good) for v in range(6)]
    rows += [make_row(6 + i, 0, caption="broken", frames=[bad] * 4) for i, bad in enumerate(broken)]
    rows += [make_row(10, 0, caption="no frames", frames=[]), make_row(11, 0, caption="  ")]
    own = loader(write_corpus(rows), recipe, data__batch_size=12)
    with caplog.at_level(logging.WARNING):
        batches = take(own, 3)
    bad_ids = {f"video-{v}_0_1000" for v in range(6, 12)}
    assert set(own.skipped) == bad_ids
    assert own.skipped["video-10_0_1000"] == "no frames"
    assert own.skipped["video-11_0_1000"] == "no caption"
    named = [record.args[0] for record in caplog.records]
    assert sorted(named) == sorted(bad_ids)
    for batch in batches:
        assert batch.valid.tolist() == [position < 6 for position in batch.position.tolist()]
        assert batch.frames[~batch.valid].max() == 0
        assert batch.frames[batch.valid].amax(dim=(1, 2, 3, 4)).min() > 0


def test_clips_of_a_damaged_row_group_are_skipped(write_corpus, make_row, make_frames, recipe):
    good = make_frames("red", "square", "grey", np.random.default_rng(0))
    rows = [make_row(v, 0, caption=f"clip {v}", frames=good) for v in range(18)]
    url = write_corpus(rows)
    path = f"{url}/shards/shard00.parquet"
    group = pq.read_metadata(path).row_group(1)
    chunk = next(
        group.column(i)
        for i in range(group.num_columns)
        if group.column(i).path_in_schema.startswith("frames")
    )
    with open(path, "r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * 64)
    own = loader(url, recipe, data__batch_size=18)
    batches = take(own, 2)
    for batch in batches:
        assert batch.valid.tolist() == [not 6 <= p < 12 for p in batch.position.tolist()]
    assert set(own.skipped) == {f"shard00/1/{row}" for row in range(6)}
    assert "row group 1 of shards/shard00.parquet is damaged" in own.skipped["shard00/1/0"]


def test_holes_of_a_batch_are_no_clips(write_corpus, make_row, make_frames, recipe, caplog):
    # 20 clips of one video and 20 of others in 4 steps: 16 of the one sit out.
    frames = make_frames("red", "square", "grey", np.random.default_rng(0))
    places = [(0, i) for i in range(20)] + [(video, 0) for video in range(1, 21)]
    rows = [make_row(*place, caption="x", frames=frames) for place in places]
    options = {"data__batch_size": 10, "data__unique_videos": True}
    own = loader(write_corpus(rows), recipe, **options)
    with caplog.at_level(logging.WARNING):
        batches = take(own, 4)
    is_hole = torch.cat([batch.position for batch in batches]) < 0
    assert is_hole.sum() == 16
    assert "16 clips sit epoch 0 out" in caplog.text
    assert not own.skipped
    for batch in batches:
        assert torch.equal(batch.valid, batch.position >= 0)
        assert not batch.frames[~batch.valid].any()
        assert len(batch.video_id[batch.valid].unique()) == batch.valid.sum()


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_batch_of_more_clips_than_videos_is_refused(shapes_corpus, recipe, world_size):
    options = {"data__batch_size": 36, "data__unique_videos": True}
    with pytest.raises(ConfigError, match=r"a batch of 36 .* 30 videos") as caught:
        loader(shapes_corpus, recipe, 0, world_size, **options)
    fits = {1: 30, 4: 28}[world_size]
    assert caught.value.hint.startswith(f"--set data.batch_size={fits} or fewer")
    loader(shapes_corpus, recipe, 0, world_size, **options | {"data__batch_size": fits})
    loader(shapes_corpus, recipe, 0, world_size, **options | {"data__unique_videos": False})
    mix = {"video": {"batch_size": 8}, "image": {"batch_size": 36}}
    with pytest.raises(ConfigError) as caught:
        loader(shapes_corpus, recipe, 0, world_size, **options | {"data__mix": mix})
    assert caught.value.hint.startswith(f"--set data.mix.image.batch_size={fits} or fewer")


def test_missing_torchcodec_is_told_before_anything_is_read(shapes_corpus, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    options = {"data__media": "video", "data__decoder": "torchcodec"}
    with pytest.raises(DependencyError, match="not installed") as caught:
        loader(shapes_corpus, recipe, **options)
    assert "pip install torchcodec" in caught.value.hint
    loader(shapes_corpus, recipe, **options | {"data__decoder": "pyav"})
    loader(shapes_corpus, recipe, **options | {"data__media": "frames"})


def test_whole_frames_go_to_a_device_that_crops_them(shapes_corpus, recipe):
    options = {"data__flip": True, "data__crop_scale": [0.5, 0.9]}
    cut = take(loader(shapes_corpus, recipe, **options), 5)
    whole = take(loader(shapes_corpus, recipe, data__crop_on="device", **options), 5)
    assert {batch.crop for batch in cut} == {None}
    crops = torch.cat([batch.crop for batch in whole])
    left, top, right, bottom, flip = crops.unbind(1)
    assert ((left >= 0) & (top >= 0) & (right <= 1) & (bottom <= 1)).all()
    area = (right - left) * (bottom - top)
    assert (area > 0.49).all()
    assert (area < 0.91).all()
    assert area.std() > 0.05
    assert 0.2 < flip.mean() < 0.8
    for batch, small in zip(whole, cut, strict=True):
        assert torch.equal(batch.position, small.position)
        assert batch.frames.shape == (8, 2, 37, 37, 3)  # 32 * 8 / 7
    shares = crops.reshape(5, 8, 5)[0]
    again = next(iter(loader(shapes_corpus, recipe, data__crop_on="device", **options))).crop
    assert torch.equal(shares, again)


def test_augmentation_is_of_seed_epoch_clip_and_copy(shapes_corpus, recipe):
    """Not of the order in which clips are read."""
    options = {"data__crop_on": "device"}

    def crops(count, **changed):
        stream = take(loader(shapes_corpus, recipe, **options | changed), count)
        return [
            (position, tuple(box))
            for batch in stream
            for position, box in zip(batch.position.tolist(), batch.crop.tolist(), strict=True)
        ]

    first = dict(crops(11))
    other = dict(crops(9, data__batch_size=10, data__lanes=1, data__num_workers=1))
    common = first.keys() & other.keys()
    assert len(common) == 88
    assert all(first[position] == other[position] for position in common)
    later = dict(crops(22)[88:])
    assert sum(first.get(position) == box for position, box in later.items()) == 0
    doubled = crops(22, data__mix={"video": {"weight": 2.0}})
    assert len({position for position, _ in doubled}) < 0.6 * len(doubled)
    assert len(set(doubled)) == len(doubled)  # two copies are cropped differently


def test_clips_without_a_caption_are_no_part_of_the_index(write_corpus, make_row, caplog):
    rows = [make_row(0, i, caption=caption) for i, caption in enumerate(["a", None, "", "b"])]
    with caplog.at_level(logging.WARNING):
        index = open_index(write_corpus(rows), "caption")
    assert index.row.tolist() == [0, 3]
    assert "2 clips have no caption" in caplog.text
    assert "video-0_1000_2000" in caplog.text


def test_corpus_without_captions_names_the_columns_that_have_text(write_corpus, make_row):
    corpus = write_corpus([make_row(0, i, caption_video="a", caption_av="b") for i in range(3)])
    with pytest.raises(CorpusError, match="No clip with a caption") as caught:
        open_index(corpus, "caption")
    hint = "--set data.caption=caption_video (columns with text: caption_video, caption_av)"
    assert caught.value.hint == hint
    with pytest.raises(CorpusError, match="No clip with a caption"):
        open_index(write_corpus([], "empty"), "caption")


def test_subset_chooses_clips_by_id(write_corpus, make_row, tmp_path):
    corpus = write_corpus([make_row(0, i, caption=str(i)) for i in range(30)])
    (tmp_path / "corpus" / "subsets").mkdir()
    ids = {"clip_id": ["video-0_25000_26000", "video-0_3000_4000"]}
    pq.write_table(pa.table(ids), tmp_path / "corpus" / "subsets" / "two.parquet")
    index = open_index(f"{corpus}#two", "caption")
    places = zip(index.shard_number, index.row_group, index.row, strict=True)
    assert [tuple(map(int, place)) for place in places] == [(0, 0, 3), (1, 0, 5)]
    with pytest.raises(CorpusError, match="Unknown subset: three"):
        open_index(f"{corpus}#three", "caption")


def test_a_merged_catalog_gives_the_same_index(write_corpus, make_row):
    rows = [make_row(video, i, caption=f"{video} {i}") for video in range(9) for i in range(4)]
    url = write_corpus(rows)
    before = open_index(url, "caption")
    compact(Corpus.open(url))
    after = open_index(url, "caption")
    assert after.fingerprint == before.fingerprint
    for name in ("shard_number", "row_group", "row", "video_hash"):
        assert np.array_equal(getattr(after, name), getattr(before, name))


def test_a_drawn_subset_is_read_by_its_places(write_corpus, make_row):
    rows = [make_row(video, i, caption=f"{video} {i}") for video in range(9) for i in range(4)]
    url = write_corpus(rows)
    make_subset(Corpus.open(url), "some", Definition(order="div", num_clips=13))
    index = open_index(f"{url}#some", "caption")
    drawn = pq.read_table(Corpus.open(url).subset_path("some")).to_pylist()
    places = zip(index.shard_number, index.row_group, index.row, strict=True)
    assert [(index.shards[s].name, int(g), int(r)) for s, g, r in places] == [
        (row["shard"], row["row_group"], row["row"]) for row in drawn
    ]


def test_subset_of_clips_that_are_gone_is_refused(write_corpus, make_row, tmp_path):
    corpus = write_corpus([make_row(0, 0, caption="a")])
    (tmp_path / "corpus" / "subsets").mkdir()
    gone = pa.table({"clip_id": ["video-0_0_1000", "video-9_0_1000"]})
    pq.write_table(gone, tmp_path / "corpus" / "subsets" / "old.parquet")
    with pytest.raises(CorpusError, match="names 1 clips"):
        open_index(f"{corpus}#old", "caption")


@pytest.mark.parametrize("column", ["captoin", "frame_ms", "caption_video_fine"])
def test_caption_column_must_hold_text(shapes_corpus, column):
    with pytest.raises(ConfigError, match="is not a text column"):
        open_index(shapes_corpus, column)


def test_no_video_is_on_both_sides_of_the_split(write_corpus, make_row):
    rows = [make_row(video, i, caption="x") for video in range(400) for i in range(2)]
    index = open_index(write_corpus(rows, shard_rows=800), "caption")
    train, held_out = split_by_video(index, 0.25)
    assert sorted([*train, *held_out]) == list(range(800))
    assert not set(index.video_hash[train]) & set(index.video_hash[held_out])
    assert 0.2 < len(held_out) / 800 < 0.3
    # A larger share keeps what a smaller one held out.
    assert set(split_by_video(index, 0.1)[1]) < set(held_out)
    assert len(split_by_video(index, 0.0)[1]) == 0


def test_split_of_a_video_survives_growth(write_corpus, make_row):
    def held_out_videos(num_videos, name):
        rows = [make_row(video, 0, caption="x") for video in range(num_videos)]
        index = open_index(write_corpus(rows, name, shard_rows=100), "caption")
        return set(index.video_hash[split_by_video(index, 0.5)[1]]), set(index.video_hash)

    small, known = held_out_videos(20, "small")
    large, _ = held_out_videos(60, "large")
    assert large & known == small


def test_too_few_clips_for_a_batch_is_a_clear_error(shapes_corpus, recipe):
    with pytest.raises(ConfigError, match="90 training clips do not fill one batch of 128") as e:
        loader(shapes_corpus, recipe, 0, 4, data__batch_size=128)
    assert e.value.hint == "--set data.batch_size=88 or fewer"


def test_coverage_reads_every_clip_once_without_augmentation(shapes_corpus, recipe):
    options = {"data__eval_batch_size": 7, "data__crop_on": "device"}
    passes = [
        [
            batch
            for rank in range(2)
            for batch in every_held_out(shapes_corpus, recipe, rank, 2, **options)
        ]
        for _ in range(2)
    ]
    assert torch.cat([batch.position for batch in passes[0]]).tolist() == list(range(90))
    assert {batch.crop for batch in passes[0]} == {None}
    assert {batch.frames.shape[2] for batch in passes[0]} == {32}
    assert_equal_batches(*passes)


def test_missing_shard_is_told_as_one_message(write_corpus, make_row, recipe, tmp_path):
    corpus = write_corpus([make_row(v, 0, caption="x", frames=[b""]) for v in range(8)])
    (tmp_path / "corpus" / "shards" / "shard00.parquet").unlink()
    with pytest.raises(CorpusError, match=r"^Cannot read shards/shard00\.parquet") as caught:
        next(iter(loader(corpus, recipe, data__num_workers=1)))
    assert "Traceback" not in caught.value.message


@pytest.fixture
def in_memory(shapes_corpus):
    memory = fsspec.filesystem("memory")
    memory.put(shapes_corpus, "/bucket/corpus", recursive=True)
    yield "memory://bucket/corpus"
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_object_store_gives_the_same_batches(shapes_corpus, recipe, in_memory, read_ahead):
    options = {"data__read_ahead": read_ahead, "data__cache_mb": 1}
    remote = take(loader(in_memory, recipe, **options), 12)
    assert_equal_batches(remote, take(loader(shapes_corpus, recipe), 12))
    held_out = every_held_out(in_memory, recipe, **options)
    assert_equal_batches(held_out, every_held_out(shapes_corpus, recipe))


def test_next_row_group_is_on_its_way_before_it_is_asked_for(in_memory, monkeypatch):
    """A read of the second row group begins while nobody has asked for it, and is not repeated."""
    reads, begun = [], threading.Event()
    plain = pq.ParquetFile.read_row_group

    def watched(self, number, **options):
        reads.append((number, threading.current_thread() is threading.main_thread()))
        if number == 1:
            begun.set()
        return plain(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    places = [Place(Shard(in_memory, "shard00"), n, ("clip_id", "frames")) for n in range(4)]
    reader = ShardReader(cache_mb=1, read_ahead=1)
    reader.expect(places)
    reader.group(places[0])
    assert begun.wait(timeout=20)
    assert [n for n, _ in reads].count(1) == 1
    ids = [reader.group(place).columns["clip_id"].to_pylist() for place in places]
    assert [len(names) for names in ids] == [6, 6, 6, 2]
    assert sorted(n for n, _ in reads) == [0, 1, 2, 3]
    assert dict(reads)[3] is False


def test_what_is_fetched_ahead_follows_what_is_expected(in_memory):
    places = [Place(Shard(in_memory, "shard00"), n, ("clip_id",)) for n in range(4)]
    reader = ShardReader(cache_mb=1, read_ahead=2)
    for asked in ([0, 1, 2], [3, 1], [0, 3, 2, 2, 1]):
        reader.expect(places[n] for n in asked)
        for n in asked:
            assert reader.group(places[n]).num_rows == (6, 6, 6, 2)[n]
    # A whole shard that is missing is as clear when a thread finds it.
    gone = Place(Shard(in_memory, "gone"), 0, ("clip_id",))
    reader.expect([places[0], gone])
    reader.group(places[0])
    with pytest.raises(CorpusError, match=r"Cannot read shards/gone\.parquet"):
        reader.group(gone)


def test_a_store_that_has_gone_away_is_no_damage(in_memory, monkeypatch):
    """One failed read is repeated; if the shard cannot be opened either, the run must not go on."""
    place = Place(Shard(in_memory, "shard00"), 1, ("clip_id",))
    reader = ShardReader(cache_mb=1)
    reader.group(Place(Shard(in_memory, "shard00"), 0, ("clip_id",)))
    plain, failures = pq.ParquetFile.read_row_group, [ConnectionError("gone for a moment")]

    def failing(self, number, **options):
        if failures:
            raise failures.pop()
        return plain(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", failing)
    assert reader.group(place).num_rows == 6
    failures.append(ConnectionError("gone for good"))
    fsspec.filesystem("memory").rm("/bucket/corpus/shards/shard00.parquet")
    with pytest.raises(CorpusError, match=r"Cannot read shards/shard00\.parquet"):
        reader.group(place._replace(row_group=2))


def test_readers_know_the_next_request(in_memory, recipe, monkeypatch):
    told = []
    plain = ShardReader.expect
    monkeypatch.setattr(ShardReader, "expect", lambda self, p: plain(self, told.append(p) or p))
    take(loader(in_memory, recipe, data__num_workers=0), 3)
    batches = [{place.row_group for place in places} for places in told]
    assert len(batches) >= 3
    monkeypatch.undo()
    # Rows of the present batch and of the following one.
    asked = take(loader(in_memory, recipe), 4)
    index = open_index(in_memory, "caption")
    for number in range(3):
        both = torch.cat([asked[number].position, asked[number + 1].position]).numpy()
        assert batches[number] == set(index.group_number[index.group_of(both)].tolist())


def test_video_column_is_decoded_by_time(write_corpus, make_row, recipe):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):  # one second of red, one of blue
            colour = (220, 0, 0) if number < 10 else (0, 0, 220)
            image = Image.new("RGB", (64, 48), colour)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))
    video = {"bytes": file.getvalue(), "path": None}
    rows = [make_row(0, 0, caption="x", video=video)]
    rows += [make_row(0, 1, caption="x", video={"bytes": b"no mp4", "path": None})]
    (batch,) = every_held_out(write_corpus(rows), recipe, data__media="video")
    assert batch.valid.tolist() == [True, False]
    means = batch.frames[0].float().mean(dim=(1, 2))
    assert means[0, 0] > 150
    assert means[0, 2] < 60
    assert means[1, 0] < 60
    assert means[1, 2] > 150
