# SPDX-License-Identifier: Apache-2.0
import io
import itertools
import json
import logging

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
from dataengine.errors import ConfigError, CorpusError
from dataengine.query.subsets import Definition, make_subset
from training.data.index import open_index, split_by_video
from training.data.loader import TrainLoader, coverage_loader
from training.trainer import reader


def loader(data, config, **world):
    index = open_index(data, config.data.caption)
    return TrainLoader(reader(index, config), index, config.data, seed=1, **world)


def take(stream, count):
    return list(itertools.islice(stream, count))


def assert_equal_batches(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for field, same in zip(batch[:-1], other[:-1], strict=True):
            assert torch.equal(field, same)
        assert batch.skipped == other.skipped


def test_ranks_read_every_clip_once_per_epoch(shapes_corpus, recipe):
    config = recipe(data__batch_size=5)
    seen = []
    for rank in range(2):
        own = loader(shapes_corpus, config, rank=rank, world_size=2)
        seen += [batch.position for batch in take(iter(own), own.steps_per_epoch)]
    assert sorted(torch.cat(seen).tolist()) == list(range(90))


def test_batches_do_not_depend_on_the_number_of_readers(shapes_corpus, recipe):
    alone = take(iter(loader(shapes_corpus, recipe())), 15)
    helped = take(iter(loader(shapes_corpus, recipe(data__num_workers=2))), 15)
    assert_equal_batches(alone, helped)


@pytest.mark.parametrize("taken", [1, 10, 11, 13])  # 11 batches an epoch
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_stream_goes_on_where_it_was_left(shapes_corpus, recipe, taken, num_workers):
    config = recipe(data__num_workers=num_workers)
    whole = take(iter(loader(shapes_corpus, recipe())), taken + 4)
    first = loader(shapes_corpus, config)
    take(iter(first), taken)
    # Through JSON: the state must be plain values.
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(shapes_corpus, recipe())
    second.load_state_dict(state)
    assert_equal_batches(take(iter(second), 4), whole[taken:])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"data__batch_size": 4}, ["batch_size: 8 then, 4 now"]),
        ({"data__lanes": 4, "data__shuffle_buffer": 3}, ["lanes", "shuffle_buffer"]),
    ],
)
def test_position_in_other_batches_is_refused(shapes_corpus, recipe, change, names):
    state = loader(shapes_corpus, recipe()).state_dict()
    with pytest.raises(ConfigError) as caught:
        loader(shapes_corpus, recipe(**change)).load_state_dict(state)
    assert all(name in caught.value.message for name in names)


def test_position_in_another_corpus_is_refused(shapes_corpus, recipe, write_corpus, make_row):
    state = loader(shapes_corpus, recipe()).state_dict()
    rows = [make_row(0, i, caption="x", frames=[b""]) for i in range(90)]
    with pytest.raises(ConfigError, match=r"clips: .* then"):
        loader(write_corpus(rows), recipe()).load_state_dict(state)


def test_broken_clips_are_named_once_and_keep_their_place(
    write_corpus, make_row, make_frames, recipe, caplog
):
    good = make_frames("red", "square", "grey", np.random.default_rng(0))
    broken = [good[0][:200], b"", b"no jpeg", b"\xff\xd8\xff\xd9"]
    rows = [make_row(v, 0, caption=f"clip {v}", frames=good) for v in range(6)]
    rows += [make_row(6 + i, 0, caption="broken", frames=[bad] * 4) for i, bad in enumerate(broken)]
    rows += [make_row(10, 0, caption="no frames", frames=[]), make_row(11, 0, caption="  ")]
    config = recipe(data__batch_size=12)
    own = loader(write_corpus(rows), config)
    with caplog.at_level(logging.WARNING):
        batches = take(iter(own), 3)
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
    assert [(index.shards[s], int(g), int(r)) for s, g, r in places] == [
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
    with pytest.raises(ConfigError, match="90 training clips do not fill one batch of 64 x 2"):
        loader(shapes_corpus, recipe(data__batch_size=64), world_size=2)


def test_coverage_reads_every_clip_once_without_augmentation(shapes_corpus, recipe):
    config = recipe(data__eval_batch_size=7)
    index = open_index(shapes_corpus, "caption")
    passes = [
        [
            batch
            for rank in range(2)
            for batch in coverage_loader(
                reader(index, config), len(index), config.data, rank=rank, world_size=2
            )
        ]
        for _ in range(2)
    ]
    assert torch.cat([batch.position for batch in passes[0]]).tolist() == list(range(90))
    assert_equal_batches(*passes)


def test_missing_shard_is_told_as_one_message(write_corpus, make_row, recipe, tmp_path):
    corpus = write_corpus([make_row(v, 0, caption="x", frames=[b""]) for v in range(8)])
    (tmp_path / "corpus" / "shards" / "shard00.parquet").unlink()
    with pytest.raises(CorpusError, match=r"^Cannot read shards/shard00\.parquet") as caught:
        next(iter(loader(corpus, recipe(data__num_workers=1))))
    assert "Traceback" not in caught.value.message


def test_object_store_gives_the_same_batches(shapes_corpus, recipe):
    memory = fsspec.filesystem("memory")
    memory.put(shapes_corpus, "/bucket/corpus", recursive=True)
    try:
        remote = take(iter(loader("memory://bucket/corpus", recipe(), is_remote=True)), 12)
    finally:
        memory.rm("/bucket", recursive=True)
    assert_equal_batches(remote, take(iter(loader(shapes_corpus, recipe())), 12))


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
    config = recipe(data__media="video")
    index = open_index(write_corpus(rows), "caption")
    batch = next(iter(coverage_loader(reader(index, config), 2, config.data)))
    assert batch.valid.tolist() == [True, False]
    means = batch.frames[0].float().mean(dim=(1, 2))
    assert means[0, 0] > 150
    assert means[0, 2] < 60
    assert means[1, 0] < 60
    assert means[1, 2] > 150
