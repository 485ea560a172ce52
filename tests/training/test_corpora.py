# SPDX-License-Identifier: Apache-2.0
# Parts of a Batch are optional; where one is missing, a test fails by itself.
# pyright: reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false
# pyright: reportOptionalIterable=false
# pyright: reportArgumentType=false
"""Sources, their weights and kinds, mixes of media, kept indexes."""

import io
import itertools
import json
import logging
import os
import pickle

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import training.data.index
from dataengine.errors import ConfigError, CorpusError
from training.config import MixConfig
from training.data.corpora import open_corpora
from training.data.index import open_index, open_split


def take(stream, count):
    return list(itertools.islice(stream, count))


def epoch_of(loader):
    return take(loader, loader.steps_per_epoch)


@pytest.fixture(scope="module")
def video_with_sound():
    """Bytes of a second of grey with a tone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        picture = container.add_stream("mpeg4", rate=5)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=16000)
        for _ in range(5):
            image = np.full((48, 64, 3), 120, np.uint8)
            container.mux(picture.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        tone = np.sin(np.arange(16000) / 16000 * 2 * np.pi * 440).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*sound.encode(frame), *sound.encode(None)])
        container.mux(picture.encode(None))
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def make_rows(make_row, make_frames):
    """Returns a function: the numbers of videos -> two clips of each, all good."""
    frames = make_frames("red", "square", "grey", np.random.default_rng(0))

    def make(videos, **columns):
        return [
            make_row(video, i, caption=f"Clip {i} of {video}", frames=frames, **columns)
            for video in videos
            for i in range(2)
        ]

    return make


def test_no_source_is_told(recipe):
    with pytest.raises(ConfigError, match="names no corpus") as caught:
        open_corpora(recipe())
    assert "--data" in caught.value.hint


def test_several_corpora_are_seen_as_their_weights_say(write_corpus, make_rows, recipe):
    small, large = write_corpus(make_rows(range(10)), "a"), write_corpus(make_rows(range(40)), "b")
    sources = [{"data": small, "weight": 2}, {"data": large, "weight": 0.5}]
    config = recipe(data__sources=sources, data__held_out=0.0, data__batch_size=10)
    corpora = open_corpora(config)
    assert len(corpora.train_index) == 100
    assert corpora.train_index.num_videos == 40
    assert corpora.held_out_loader() is None
    loader = corpora.train_loader(seed=1)
    assert loader.steps_per_epoch == 8
    seen = [torch.cat([batch.position for batch in epoch_of(loader)]) for _ in range(2)]
    for epoch in seen:
        count = torch.bincount(epoch, minlength=100)
        assert (count[:20] == 2).all()
        assert sorted(count[20:].tolist()) == [0] * 40 + [1] * 40
    assert (torch.bincount(torch.cat(seen), minlength=100)[20:] == 1).all()
    assert not loader.skipped


def test_clips_of_every_source_are_read_from_their_own_corpus(write_corpus, make_rows, recipe):
    first = write_corpus(make_rows(range(5)), "a")
    second = write_corpus(make_rows(range(5, 12)), "b", shard_rows=6, row_group_rows=4)
    config = recipe(
        data__sources=[{"data": first}, {"data": second}],
        data__held_out=0.0,
        data__eval_batch_size=5,
    )
    batches = list(open_corpora(config, hold_out_all=True).held_out_loader())
    assert torch.cat([batch.position for batch in batches]).tolist() == list(range(24))
    assert all(batch.valid.all() for batch in batches)
    # Captions name the clips: all are different.
    assert len(torch.cat([batch.caption_id for batch in batches]).unique()) == 24
    assert len(torch.cat([batch.video_id for batch in batches]).unique()) == 12


def test_held_out_videos_are_in_no_training_batch(shapes_corpus, write_corpus, make_rows, recipe):
    # Video 3, for one, is in both corpora: on the same side of the split.
    other = write_corpus(make_rows(range(20)), "b")
    config = recipe(data__sources=[{"data": shapes_corpus}, {"data": other}])
    corpora = open_corpora(config)
    train, held_out = corpora.train_index, corpora.held_out_index
    assert len(train) + len(held_out) == 130
    assert not set(train.video_hash.tolist()) & set(held_out.video_hash.tolist())
    seen = torch.cat([batch.video_id for batch in epoch_of(corpora.train_loader())])
    assert set(seen.tolist()) <= set(train.video_hash.tolist())
    tested = torch.cat([batch.video_id for batch in corpora.held_out_loader()])
    assert tested.tolist() == held_out.video_hash.tolist()


def test_a_mix_takes_turns_with_kinds(shapes_corpus, recipe):
    mix = {"video": {}, "image": {"batch_size": 16, "weight": 0.5}}
    config = recipe(data__sources=[{"data": shapes_corpus}], data__held_out=0.0, data__mix=mix)
    corpora = open_corpora(config)
    loader = corpora.train_loader(seed=1)
    assert loader.steps_per_epoch == 11 + 2
    first, second = epoch_of(loader), epoch_of(loader)
    orders = [[batch.kind for batch in epoch] for epoch in (first, second)]
    assert all(order.count("image") == 2 for order in orders)
    assert orders[0] != orders[1]
    for batch in first + second:
        size, num_frames = (16, 1) if batch.kind == "image" else (8, 2)
        assert batch.frames.shape == (size, num_frames, 32, 32, 3)
    seen = torch.cat([batch.position for batch in first if batch.kind == "video"])
    assert len(seen.unique()) == 88
    # Half of the clips as images, the other half in the next epoch; 13 sit out, but take turns.
    images = torch.cat([b.position for b in first + second if b.kind == "image"])
    assert len(images.unique()) == 64
    # The same kinds and clips in two processes.
    for rank in range(2):
        part = epoch_of(corpora.train_loader(seed=1, rank=rank, world_size=2))
        for batch, own in zip(first, part, strict=True):
            half = len(batch.position) // 2
            assert batch.kind == own.kind
            assert torch.equal(batch.position[rank * half : (rank + 1) * half], own.position)


def test_readers_of_a_mix_keep_out_of_each_others_row_groups(shapes_corpus, recipe):
    """Steps go to readers in turn, whatever kind they are of."""
    config = recipe(
        data__sources=[{"data": shapes_corpus}], data__held_out=0.0, data__batch_size=2,
        data__slots=1, data__lanes=2, data__shuffle_buffer=1,
        data__mix={"video": {}, "image": {}},
    )  # fmt: skip
    corpora = open_corpora(config)
    batches = epoch_of(corpora.train_loader())
    for kind in ("video", "image"):
        read = []
        for worker in range(2):
            own = [b.position for b in batches[worker::2] if b.kind == kind]
            read.append(set(corpora.train_index.group_of(torch.cat(own).numpy()).tolist()))
        assert len(read[0] | read[1]) == 18
        assert len(read[0] & read[1]) <= 1  # on the cut between the lanes


@pytest.mark.parametrize("taken", [1, 7, 12, 13, 14])
def test_a_mix_is_resumed_exactly(shapes_corpus, recipe, taken):
    mix = {"image": {"batch_size": 16, "weight": 0.5}, "video": {}}
    options = {"data__sources": [{"data": shapes_corpus}], "data__held_out": 0.0}
    corpora = open_corpora(recipe(data__mix=mix, **options))
    whole = take(corpora.train_loader(seed=1), taken + 4)
    first = corpora.train_loader(seed=1, rank=1, world_size=4)
    take(first, taken)
    # In the other order of the recipe's lines, too.
    other = open_corpora(recipe(data__mix=dict(reversed(mix.items())), **options))
    second = other.train_loader(seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch, same in zip(take(second, 4), whole[taken:], strict=True):
        assert batch.kind == same.kind
        assert torch.equal(batch.position, same.position)
        assert torch.equal(batch.frames, same.frames)


def test_sources_feed_the_kinds_they_name(shapes_corpus, write_corpus, make_rows, recipe):
    other = write_corpus(make_rows(range(20)), "b")
    sources = [{"data": shapes_corpus, "kinds": ["image"]}, {"data": other}]
    options = {"data__sources": sources, "data__held_out": 0.0}
    corpora = open_corpora(recipe(data__mix={"video": {}, "image": {}}, **options))
    assert {kind: len(feed.index) for kind, feed in corpora.train.items()} == {
        "video": 40,
        "image": 130,
    }
    sources[1]["kinds"] = ["image"]
    config = recipe(data__mix={"video": {}, "image": {}}, **options)
    with pytest.raises(ConfigError, match="trains on video, which no source feeds"):
        open_corpora(config)


def test_kinds_read_their_own_captions(write_corpus, make_row, make_frames, recipe):
    frames = make_frames("red", "square", "grey", np.random.default_rng(0))
    rows = [
        make_row(i, 0, frames=frames, caption="same", caption_video=f"own {i}" if i < 8 else None)
        for i in range(16)
    ]
    config = recipe(
        data__sources=[{"data": write_corpus(rows)}],
        data__held_out=0.0,
        data__mix={"video": {}, "image": {"caption": "caption_video"}},
    )
    corpora = open_corpora(config)
    assert len(corpora.train["image"].index) == 8  # the others have none
    for batch in epoch_of(corpora.train_loader()):
        assert len(batch.caption_id.unique()) == (1 if batch.kind == "video" else 8)


def test_without_captions_all_clips_are_read(write_corpus, make_row, make_frames, recipe):
    frames = make_frames("red", "square", "grey", np.random.default_rng(0))
    rows = [make_row(i, 0, frames=frames, caption="x" if i % 2 else None) for i in range(16)]
    config = recipe(data__sources=[{"data": write_corpus(rows)}])
    # A recipe refuses this for models that read; readers go by the data section alone.
    config = config.model_copy(update={"data": config.data.model_copy(update={"caption": None})})
    corpora = open_corpora(config)
    assert len(corpora.train_index) + len(corpora.held_out_index) == 16
    assert corpora.held_out_loader() is None
    batch = next(iter(corpora.train_loader()))
    assert batch.tokens.shape == (8, 0)
    assert batch.tokens.dtype == torch.int64
    assert len(batch.caption_id.unique()) == 8
    assert batch.valid.all()


def test_sound_is_read_where_there_is_some(
    write_corpus, make_rows, video_with_sound, recipe, caplog
):
    rows = make_rows(range(6), video=video_with_sound, has_audio=True)
    rows += make_rows(range(6, 9), has_audio=False) + make_rows(range(9, 10))
    rows += make_rows(range(10, 11), video={"bytes": b"no mp4", "path": None}, has_audio=True)
    mix = {"video": {}, "audio": {"batch_size": 14}, "audio_video": {"batch_size": 7}}
    config = recipe(data__sources=[{"data": write_corpus(rows)}], data__held_out=0.0)
    # A recipe refuses sound for models that hear nothing; readers go by the mix alone.
    mixed = {kind: MixConfig(**fields) for kind, fields in mix.items()}
    config = config.model_copy(update={"data": config.data.model_copy(update={"mix": mixed})})
    with caplog.at_level(logging.WARNING):
        corpora = open_corpora(config)
    assert "8 clips of" in caplog.text
    assert "have no sound and are left out" in caplog.text
    assert [len(corpora.train[kind].index) for kind in mix] == [22, 14, 14]
    loader = corpora.train_loader()
    kinds = set()
    for batch in epoch_of(loader):
        kinds.add(batch.kind)
        if batch.kind == "video":
            assert batch.fbank is None
            assert batch.valid.all()
            continue
        assert batch.fbank.shape == (len(batch.valid), 998, 64)
        assert batch.fbank.dtype == torch.float32
        assert (batch.frames is None) == (batch.kind == "audio")
        assert torch.equal(batch.valid, batch.position < 12)
        assert batch.fbank[batch.valid].std(dim=(1, 2)).min() > 0.1
        assert (batch.fbank[~batch.valid] == 0).all()
        if batch.frames is not None:
            assert (batch.frames[~batch.valid] == 0).all()
    assert kinds == set(mix)
    assert set(loader.skipped) == {"video-10_0_1000", "video-10_1000_2000"}


def test_a_batch_whose_sound_is_all_broken_has_zeros(write_corpus, make_rows, recipe):
    rows = make_rows(range(4), video={"bytes": b"no mp4", "path": None}, has_audio=True)
    config = recipe(data__sources=[{"data": write_corpus(rows)}], data__held_out=0.0)
    mix = {"audio": MixConfig()}
    config = config.model_copy(update={"data": config.data.model_copy(update={"mix": mix})})
    batch = next(iter(open_corpora(config).train_loader()))
    assert batch.frames is None
    assert batch.fbank.shape == (8, 998, 64)
    assert not batch.valid.any()
    assert (batch.fbank == 0).all()


def test_no_sound_at_all_is_told(shapes_corpus):
    with pytest.raises(CorpusError, match="No clip with sound and a caption"):
        open_index(shapes_corpus, "caption", sound=True)


def test_held_out_images_are_middle_frames(write_corpus, make_row, make_frames, recipe):
    rng = np.random.default_rng(0)
    frames = [make_frames(c, "bar", "grey", rng, 1)[0] for c in ("red", "green", "blue")]
    rows = [make_row(i, 0, frames=frames, caption="x") for i in range(4)]
    config = recipe(
        data__sources=[{"data": write_corpus(rows)}],
        data__mix={"image": {}},
        data__held_out=0.0,
        data__batch_size=4,
    )
    corpora = open_corpora(config, hold_out_all=True)
    (batch,) = list(corpora.held_out_loader())
    assert batch.kind == "image"
    assert batch.frames.shape == (4, 1, 32, 32, 3)
    red, green, blue = batch.frames[:, 0, 16, 16].float().mean(0).tolist()
    assert green > 1.5 * max(red, blue)
    drawn = [b.frames[:, 0, 16, 16].argmax(1) for b in take(corpora.train_loader(), 12)]
    assert set(torch.cat(drawn).tolist()) == {0, 1, 2}


# ------------------------------------------------------------------------------- kept indexes


def read_again(monkeypatch):
    """Returns a list that grows whenever the catalog is read."""
    reads = []
    plain = training.data.index.open_index
    monkeypatch.setattr(
        training.data.index, "open_index", lambda *a, **o: reads.append(a) or plain(*a, **o)
    )
    return reads


def assert_same_index(index, other):
    for name in ("shard_number", "row_group", "row", "video_hash"):
        assert np.array_equal(getattr(index, name), getattr(other, name))
    for name in ("shards", "fingerprint", "num_videos"):
        assert getattr(index, name) == getattr(other, name)


@pytest.mark.parametrize("held_out", [0.0, 0.25, 0.999])
def test_a_kept_index_is_the_one_that_was_read(shapes_corpus, tmp_path, monkeypatch, held_out):
    made = open_split(shapes_corpus, "caption", held_out=held_out)
    reads = read_again(monkeypatch)
    kept = made
    for number in range(3):
        kept = open_split(shapes_corpus, "caption", held_out=held_out, cache=tmp_path)
        assert len(reads) == 1, number
        for index, other in zip(kept, made, strict=True):
            assert_same_index(index, other)
    # As spawned reader processes get it: a path, not the arrays.
    pickled = pickle.dumps(kept[0])
    assert_same_index(pickle.loads(pickled), made[0])
    assert b"held_out" not in pickled
    assert len(pickled) < 500


def test_a_kept_index_is_used_only_for_what_it_was_made_of(
    write_corpus, make_rows, tmp_path, monkeypatch
):
    url, cache = write_corpus(make_rows(range(20))), tmp_path / "cache"
    reads = read_again(monkeypatch)

    def size(data=url, caption: str | None = "caption", **options):
        return sum(len(side) for side in open_split(data, caption, cache=cache, **options))

    assert [size(), size()] == [40, 40]
    assert len(reads) == 1
    # Another question is another index; the first one stays.
    assert size(caption=None) == 40
    assert size(held_out=0.5) == 40
    assert len(reads) == 3
    (tmp_path / "corpus" / "subsets").mkdir()
    subset = tmp_path / "corpus" / "subsets" / "some.parquet"
    pq.write_table(pa.table({"clip_id": ["video-0_0_1000"]}), subset)
    assert [size(f"{url}#some"), size(f"{url}#some")] == [1, 1]
    assert [size(), size(caption=None), size(held_out=0.5)] == [40, 40, 40]
    assert len(reads) == 4
    pq.write_table(pa.table({"clip_id": ["video-0_0_1000", "video-2_0_1000"]}), subset)
    assert size(f"{url}#some") == 2
    # The corpus grows: all are read again, and the old ones are gone.
    write_corpus(make_rows(range(20, 25)), "more")
    for folder in ("shards", "catalog"):
        rows = pq.read_table(tmp_path / "more" / folder / "shard00.parquet")
        if folder == "catalog":
            rows = rows.set_column(rows.schema.get_field_index("shard"), "shard", [["x"] * 10])
        pq.write_table(rows, tmp_path / "corpus" / folder / "x.parquet")
    assert [size(), size(), size(caption=None), size(held_out=0.5)] == [50, 50, 50, 50]
    assert size(f"{url}#some") == 2
    assert len(list(cache.iterdir())) == 4
    # A catalog file is written again without a change in its name or size.
    count = len(reads)
    path = tmp_path / "corpus" / "catalog" / "x.parquet"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    size()
    assert len(reads) == count + 1


def test_a_cache_that_cannot_be_written_is_no_obstacle(shapes_corpus, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        train, held_out = open_split(
            shapes_corpus, "caption", held_out=0.25, cache=tmp_path / "cache"
        )
    assert len(train) + len(held_out) == 90
    assert "cannot be kept" in caplog.text


def test_a_damaged_cache_is_made_again(shapes_corpus, tmp_path, caplog):
    made, _ = open_split(shapes_corpus, "caption", cache=tmp_path)
    (kept,) = tmp_path.iterdir()
    for name in ("row.npy", "index.json"):
        (kept / "train" / name).unlink()  # `made` maps it
        (kept / "train" / name).write_bytes(b"")
        with caplog.at_level(logging.WARNING):
            again, _ = open_split(shapes_corpus, "caption", cache=tmp_path)
        assert "is damaged and made again" in caplog.text
        assert_same_index(again, made)
        caplog.clear()


def test_a_run_from_kept_indexes_reads_the_same_batches(shapes_corpus, recipe, tmp_path):
    config = recipe(data__sources=[{"data": shapes_corpus}], data__num_workers=1)
    plain = take(open_corpora(config).train_loader(), 6)
    for _ in range(2):
        kept = take(open_corpora(config, tmp_path).train_loader(), 6)
        for batch, same in zip(plain, kept, strict=True):
            assert torch.equal(batch.position, same.position)
            assert torch.equal(batch.frames, same.frames)
