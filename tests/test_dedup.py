# SPDX-License-Identifier: Apache-2.0
import io
import itertools
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from typer.testing import CliRunner

from dataengine.cli import app
from dataengine.compact import compact
from dataengine.errors import ConfigError, CorpusError
from dataengine.query import dedup
from dataengine.query.subsets import Definition, make_subset, read_definition
from tests.test_near import WIDTH, clip_ids, embedded_corpus, unit_vectors


def picture(seed, size=(320, 240)):
    """Soft blobs: low frequencies, as photographs have."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    return image.filter(ImageFilter.GaussianBlur(2))


def jpeg(image, quality=90):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def shots(seed, change=lambda image: image, quality=90, num=3):
    """The frames of a clip, changed."""
    return [jpeg(change(picture(100 * seed + at)), quality) for at in range(num)]


CHANGES = {
    "re-encoded": (lambda image: image, 30),
    "smaller": (lambda image: image.resize((200, 150), Image.Resampling.BILINEAR), 80),
    "brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.1), 90),
    "darker": (lambda image: ImageEnhance.Brightness(image).enhance(0.75), 90),
}


# ---------------------------------------------------------------------------------- the hashes


@pytest.mark.parametrize("name", CHANGES)
def test_the_same_picture_hashes_alike_and_another_does_not(name):
    change, quality = CHANGES[name]
    original = dedup.frame_hashes([jpeg(picture(seed)) for seed in range(40)])
    changed = dedup.frame_hashes([jpeg(change(picture(seed)), quality) for seed in range(40)])
    distance = np.bitwise_count(original[:, None] ^ changed[None])
    assert distance.diagonal().max() <= 8
    assert distance[~np.eye(40, dtype=bool)].min() > 8


def test_a_hash_is_the_signs_of_low_frequencies():
    """Against the DCT written out, on one picture."""
    grey = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(float)
    n = np.arange(32)
    low = np.empty((8, 8))
    for u, v in itertools.product(range(8), repeat=2):
        wave = np.outer(np.cos(np.pi * (2 * n + 1) * u / 64), np.cos(np.pi * (2 * n + 1) * v / 64))
        low[u, v] = (
            (grey * wave).sum() / 16 * (0.5**0.5 if u == 0 else 1) * (0.5**0.5 if v == 0 else 1)
        )
    low[0, 0] = 0
    expected = low > max(float(np.median(low.ravel()[1:])), 4.0)
    (found,) = dedup.phash(grey[None])
    bits = np.unpackbits(np.array([found], np.uint64).view(np.uint8)).reshape(8, 8)
    assert (bits == expected).all()


def test_plain_pictures_and_what_is_none_hash_to_nothing():
    plain = [jpeg(Image.new("RGB", (320, 240), colour), 40) for colour in ("black", "red", "white")]
    assert dedup.frame_hashes([*plain, b"no picture", b""]).tolist() == [0] * 5
    assert dedup.frame_hashes([]).shape == (0,)


# ------------------------------------------------------------------------------- which ones go


def greedy(alike):
    """Indices that go, clip after clip: the definition."""
    stays = []
    for at in range(len(alike)):
        if not any(alike[at, other] for other in stays):
            stays.append(at)
    return sorted(set(range(len(alike))) - set(stays))


@pytest.mark.parametrize("bits", [0, 1, 4, 8, 16])
@pytest.mark.parametrize("width", [1, 2, 8])
def test_near_duplicates_are_those_of_brute_force(bits, width):
    rng = np.random.default_rng(bits * 10 + width)
    hashes = rng.integers(0, 1 << 63, (300, width), dtype=np.uint64)
    for _ in range(200):  # chains and groups, some just within the bound, some just outside
        source, target = rng.integers(0, 300, 2)
        for frame in range(width):
            most = bits + 2 if frame == width - 1 else bits + 1
            flips = rng.choice(64, rng.integers(0, most), replace=False)
            mask = np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0)
            hashes[target, frame] = hashes[source, frame] ^ np.uint64(mask)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None]).max(axis=2)
    expected = greedy(distance <= bits)
    assert dedup.near_duplicates(hashes, bits).tolist() == expected
    assert 10 < len(expected) < 250


def test_many_copies_of_one_picture_are_no_burden():
    hashes = np.full((200_000, 8), 7, np.uint64)
    hashes[1234:1240] += np.uint64(1 << 40)
    assert len(dedup.near_duplicates(hashes, 0)) == 200_000 - 2
    assert len(dedup.near_duplicates(hashes, 1)) == 200_000 - 1


@pytest.mark.parametrize("block", [4, 1024])
def test_semantic_duplicates_are_those_of_brute_force(monkeypatch, block):
    monkeypatch.setattr(dedup, "_BLOCK", block)
    vectors = unit_vectors(200).astype(np.float32)
    rng = np.random.default_rng(1)
    for _ in range(150):
        source, target = rng.integers(0, 200, 2)
        near = vectors[source] + rng.normal(size=WIDTH) * rng.choice([0, 0.05, 0.1])
        vectors[target] = near / np.linalg.norm(near)
    order = rng.permutation(200)
    cosines = vectors[order] @ vectors[order].T
    for threshold in (0.5, 0.9, 0.97):
        expected = greedy(cosines > threshold)
        assert dedup.semantic_duplicates(vectors, order, threshold).tolist() == expected
        assert expected


# ---------------------------------------------------------------------------------- in subsets


def drawn(corpus, definition, **options):
    subset = make_subset(corpus, "x", definition, replace_existing=True, **options)
    return pq.read_table(corpus.path("subsets", "x.parquet"))["clip_id"].to_pylist(), subset


GROUPS = [("a", 4), ("b", 1), ("c", 3), ("d", 1), ("e", 2), ("f", 1)]
"""Which clips are the same, and how many there are of each."""


def grouped_corpus(path, per_shard=2):
    """Copies of each group in different encodings; frames of as many clips of a video differ."""
    which = [group for group, size in GROUPS for _ in range(size)]
    which = [which[at] for at in np.random.default_rng(3).permutation(len(which))]
    copies = {group: itertools.count() for group, _ in GROUPS}
    frames, vectors = [], []
    for group in which:
        change, quality = list(CHANGES.values())[next(copies[group]) % len(CHANGES)]
        frames.append(shots(ord(group), change, quality))
        wobble = np.random.default_rng(len(frames)).normal(size=WIDTH) * 0.01
        vectors.append(unit_vectors(1, seed=ord(group))[0] + wobble)
    scores = [None if at == 2 else ((at * 7) % 12) / 12 for at in range(len(which))]
    corpus = embedded_corpus(
        path, vectors, per_video=4, per_shard=per_shard, frames=frames, clip_score=scores,
        frame_ms=[[1000 * (at % 4) + 10 * i for i in range(3)] for at in range(len(which))],
    )  # fmt: skip
    best = {}
    for clip_id, group, score in zip(clip_ids(12, per_video=4), which, scores, strict=True):
        key = (-score if score is not None else 1, clip_id)
        best[group] = min(best.get(group, (9, "")), key)
    return corpus, sorted(clip_id for _, clip_id in best.values())


BOTH = [Definition(dedup_near=8), Definition(dedup_semantic=0.9)]


@pytest.mark.parametrize("definition", BOTH)
def test_of_each_group_the_best_stays_and_nothing_else_goes(tmp_path, definition):
    corpus, best = grouped_corpus(tmp_path / "c")
    kept, subset = drawn(corpus, definition)
    assert sorted(kept) == best
    assert sum(subset.removed.values()) == 6
    assert (subset.num_candidates, subset.num_clips) == (6, 6)
    other, _ = grouped_corpus(tmp_path / "d", per_shard=9)
    compact(other)
    assert sorted(drawn(other, definition, threads=1)[0]) == best


def test_conditions_come_first_and_draws_last(tmp_path):
    corpus, best = grouped_corpus(tmp_path / "c")
    definition = Definition(where="clip_score < 0.6", dedup_near=8, dedup_semantic=0.9)
    kept, subset = drawn(corpus, definition)
    with_near, _ = drawn(corpus, replace(definition, dedup_semantic=None))
    assert sorted(kept) == sorted(with_near)
    assert subset.removed.keys() == {"near", "semantic"}
    assert subset.removed["semantic"] == 0, "near-duplicates went first"
    assert len(kept) + subset.removed["near"] == 7
    assert not set(kept) <= set(best), "the best of those that pass, not of all"
    both = Definition(dedup_near=8, per_video=1, order="top", num_clips=2)
    kept, subset = drawn(corpus, both)
    assert len(kept) == 2
    assert set(kept) <= set(best)
    about = read_definition(corpus, "x")
    assert about["removed"] == {"near": 5}  # one clip has no score
    assert about["definition"]["dedup_near"] == 8


def test_clips_that_cannot_be_compared_stay(tmp_path):
    same = unit_vectors(1)[0]
    corpus = embedded_corpus(
        tmp_path / "c",
        [same, same, None, None],
        frames=[None, [], [jpeg(Image.new("RGB", (64, 64)))] * 2, [b"", b""]],
    )
    assert drawn(corpus, Definition(dedup_near=16))[1].num_clips == 4
    assert len(drawn(corpus, Definition(dedup_semantic=0.9))[0]) == 3


def test_more_clips_than_fit_one_cluster(tmp_path, monkeypatch):
    """Copies always share a cluster; who goes has its like among those that stay."""
    vectors = unit_vectors(300, seed=2)
    rng = np.random.default_rng(4)
    copies = rng.permutation(300)[:120]
    vectors[copies[60:]] = vectors[copies[:60]]
    corpus = embedded_corpus(tmp_path / "c", vectors, per_shard=60)
    wide, _ = drawn(corpus, Definition(dedup_semantic=0.8))
    monkeypatch.setattr(dedup, "_EXACT_CLIPS", 100)
    kept, _ = drawn(corpus, Definition(dedup_semantic=0.8))
    ids = clip_ids(300)
    exact = vectors.astype(np.float32)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    stay = np.isin(ids, kept)
    assert (exact[~stay] @ exact[stay].T).max(axis=1).min() > 0.8
    assert len({vector.tobytes() for vector in vectors[stay]}) == stay.sum(), "no copy stays"
    assert 0 <= len(kept) - len(wide) < 0.5 * (300 - len(wide)), "most pairs share a cluster"
    again = embedded_corpus(tmp_path / "d", vectors, per_shard=7)
    assert sorted(drawn(again, Definition(dedup_semantic=0.8))[0]) == sorted(kept)


def test_bounds_are_checked_and_embeddings_must_be_there(tmp_path):
    corpus = embedded_corpus(tmp_path / "c", [None] * 3)
    for wrong in (
        Definition(dedup_near=17),
        Definition(dedup_near=-1),
        Definition(dedup_semantic=1.5),
    ):
        with pytest.raises(ConfigError, match="takes"):
            drawn(corpus, wrong)
    with pytest.raises(CorpusError, match="No embeddings were kept"):
        drawn(corpus, Definition(dedup_semantic=0.9))
    with pytest.raises(ConfigError, match="A mixture is of finished"):
        drawn(corpus, Definition(mix={"x": 1.0}, num_clips=2, dedup_near=4))


def test_the_command_says_how_many_went(tmp_path):
    corpus, best = grouped_corpus(tmp_path / "c")
    args = ["subset", corpus.url, "--name", "y", "--dedup-near", "8", "--dedup-semantic", "0.9"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0
    assert "6 near duplicates removed." in result.stderr
    assert "0 semantic duplicates removed." in result.stderr
    assert len(best) == pq.read_metadata(corpus.path("subsets", "y.parquet")).num_rows
