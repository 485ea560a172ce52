# SPDX-License-Identifier: Apache-2.0
# Answers may be failures; a wrong guess fails the test.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""The score stage on known vectors, and with real (tiny) models; aesthetic heads on known numbers."""

import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from dataengine.errors import DependencyError
from dataengine.flow import apply_stage
from dataengine.media import jpeg_decode, jpeg_encode
from dataengine.models import aesthetics
from dataengine.models.aesthetics import BUNDLED_HEAD, AestheticsConfig, load_head
from dataengine.models.answers import OUT_OF_MEMORY, Failure
from dataengine.models.clip import OpenClipConfig
from dataengine.needs import Weights
from dataengine.records import CLIP_SCHEMA, DROP_STRUCT, SHARD_COLUMNS
from dataengine.stage import Drop, Kept
from dataengine.stages import score
from dataengine.stages.score import ScoreStage, draw_frame, spread
from tests.tiny_scorers import write_clip

ANGLES = {"red": 0.0, "green": 0.5, "blue": 1.0, "grey": 2.0}
COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "grey": (99, 99, 99)}


def jpeg(colour):
    return jpeg_encode(np.full((32, 48, 3), COLOURS[colour], np.uint8))


def direction(angle):
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def name_of(picture):
    return min(COLOURS, key=lambda name: abs(picture.reshape(-1, 3).mean(0) - COLOURS[name]).sum())


class Scorer:
    """Sees colours as directions in a plane; a text is a direction in degrees."""

    model, revision, origin, width, batch_size = "plane", "7", "", 2, 3
    bias = 0.0

    def __init__(self):
        self.seen, self.texts = [], []

    def prepare(self, frame):
        return frame

    def embed_images(self, prepared):
        names = [name_of(picture) for picture in prepared]
        self.seen.append(names)
        return [direction(ANGLES[name] + self.bias) for name in names]

    def embed_texts(self, texts):
        self.texts.append(list(texts))
        return [direction(ANGLES[text]) for text in texts]


@pytest.fixture
def scorer(monkeypatch):
    """Replaces the model by one whose answers are known; it has nothing to prove."""
    scorer = Scorer()
    monkeypatch.setattr(score, "build_clip_scorer", lambda config: scorer)
    monkeypatch.setattr(score, "check_clip", lambda scorer: None)
    return scorer


def clip(colours, text="red", clip_id="v_0_1000", **columns):
    row = {"clip_id": clip_id, "frames": [jpeg(colour) for colour in colours]}
    return row | {"caption_video": text} | columns


def run(rows, **config):
    stage = ScoreStage(ScoreStage.Config(**config))
    stage.setup()
    outcomes = stage.process(rows)
    assert len(outcomes) == len(rows)
    return [outcome.rows[0] if isinstance(outcome, Kept) else outcome for outcome in outcomes]


def wrote(columns):
    return {entry["column"]: entry for entry in columns["provenance"]}


# ------------------------------------------------------------------------------------ CLIP scores


def test_score_is_the_mean_of_even_frames_and_of_one_drawn(scorer):
    colours = ["red", "green", "blue", "grey"] * 2
    (columns,) = run([clip(colours)])
    even = [ANGLES[colours[at]] for at in spread(8, 4)]
    assert columns["clip_score"] == pytest.approx(np.cos(even).mean(), abs=1e-6)
    drawn = ANGLES[colours[draw_frame("v_0_1000", 8, 0)]]
    assert columns["clip_score_frame"] == pytest.approx(np.cos(drawn), abs=1e-6)
    assert set(columns) == {"clip_score", "clip_score_frame", "provenance"}
    assert {entry["model"] for entry in columns["provenance"]} == {"plane"}
    assert {entry["revision"] for entry in columns["provenance"]} == {"7"}


def test_every_picture_is_embedded_once_and_in_full_batches(scorer):
    rows = [clip(["red", "green", "blue", "grey"] * 2, clip_id=f"v_{i}_9") for i in range(5)]
    wanted = [sorted({*spread(8, 4), draw_frame(row["clip_id"], 8, 0)}) for row in rows]
    run(rows)
    assert [name for names in scorer.seen for name in names] == [
        ["red", "green", "blue", "grey"][at % 4] for places in wanted for at in places
    ]
    assert {len(names) for names in scorer.seen[:-1]} == {3}
    assert scorer.texts == [["red"] * 5]


def test_draw_is_even_and_never_changes():
    drawn = [draw_frame(f"clip-{number}", 8, 0) for number in range(4000)]
    assert min(Counter(drawn).values()) > 400
    assert draw_frame("v_1000_5000", 8, 0) == draw_frame("v_1000_5000", 8, 0) == 6
    assert [draw_frame("v_1000_5000", 100, seed) for seed in range(3)] == [42, 68, 6]
    assert draw_frame("v", 1, 0) == 0


def test_another_seed_draws_other_frames(scorer):
    rows = [clip(["red", "green", "blue", "grey"], clip_id=f"v_{i}_9") for i in range(12)]
    first, same, other = (
        [columns["clip_score_frame"] for columns in run(rows, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == same != other
    alone = [run([row])[0]["clip_score_frame"] for row in rows]
    assert alone == pytest.approx(first)


def test_broken_frames_are_dropped_and_what_has_no_caption_is_null(scorer):
    broken = clip(["red"]) | {"frames": [jpeg("red"), b"broken"]}
    rows = [
        clip(["red"], "green"),
        broken,
        clip(["red"], None),
        clip([], "red"),
        clip(["blue"], "blue"),
    ]
    first, second, third, fourth, fifth = run(rows)
    assert second == Drop("bad_frames", "6 bytes that are no picture")
    assert first["clip_score"] == pytest.approx(np.cos(0.5), abs=1e-6)
    assert third == fourth == {"clip_score": None, "clip_score_frame": None}
    assert fifth["clip_score"] == pytest.approx(1, abs=1e-6)


def test_column_and_number_of_frames_are_settings(scorer):
    row = clip(["red", "green"], "red", caption_avs="blue")
    (columns,) = run([row], caption_column="caption_avs", max_frames=1)
    assert columns["clip_score"] == pytest.approx(np.cos(0.5), abs=1e-6)
    assert scorer.texts == [["blue"]]


def test_what_the_model_fails_on_costs_that_item_alone(scorer, monkeypatch):
    def partly(prepared):
        names = [name_of(picture) for picture in prepared]
        return [
            Failure(OUT_OF_MEMORY, "full") if name == "grey" else direction(ANGLES[name])
            for name in names
        ]

    monkeypatch.setattr(scorer, "embed_images", partly)
    good, bad = run([clip(["red"]), clip(["grey", "red"])], embeddings=True)
    assert good["clip_score"] == pytest.approx(1, abs=1e-6)
    assert bad["clip_score"] is bad["clip_score_frame"] is bad["clip_image_embedding"] is None
    assert bad["clip_text_embedding"] == [1, 0]
    assert wrote(bad)["clip_score"]["note"] == "failed:out_of_memory"
    assert wrote(bad)["clip_text_embedding"]["note"] is None


def test_model_at_random_stops_the_run_before_it_starts(tmp_path):
    folder = write_clip(tmp_path, fitted=False)
    stage = ScoreStage(ScoreStage.Config(model=OpenClipConfig(model=f"local-dir:{folder}")))
    with pytest.raises(DependencyError, match="known pair"):
        stage.setup()


def test_real_model_scores_alike_in_any_batch():
    rng = np.random.default_rng(0)
    rows = []
    for number in range(3):
        pictures = rng.integers(0, 255, (6, 24, 32, 3)).astype(np.uint8)
        frames = [jpeg_encode(picture) for picture in pictures]
        rows.append({"clip_id": str(number), "frames": frames, "caption_video": "A red circle."})
    together = run(rows)
    alone = [run([row])[0] for row in rows]
    for name in ("clip_score", "clip_score_frame"):
        assert [one[name] for one in together] == pytest.approx(
            [one[name] for one in alone], abs=1e-5
        )


# ------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_kept_in_half_precision(scorer):
    with_text, without = run([clip(["red", "blue"], "green"), clip(["red"], None)], embeddings=True)
    mean = direction(0.0) + direction(1.0)
    mean = (mean / np.linalg.norm(mean)).astype(np.float16)
    assert with_text["clip_image_embedding"] == mean.tolist()
    assert with_text["clip_text_embedding"] == direction(0.5).astype(np.float16).tolist()
    assert without["clip_image_embedding"] == [1, 0]
    assert without["clip_score"] is None
    assert "clip_text_embedding" not in without


def scored_table(scorer, rows, **config):
    stage = ScoreStage(ScoreStage.Config(embeddings=True, **config))
    stage.setup()
    rows = rows.append_column("_drop", pa.nulls(rows.num_rows, DROP_STRUCT))
    return apply_stage(stage, rows, stage.process)


def test_embeddings_go_through_a_corpus_and_duckdb(scorer, tmp_path):
    import duckdb

    from dataengine.corpus import Corpus
    from tests import helpers

    rows = [
        helpers.clip_row("a", start, start + 1000, frames=[jpeg("red"), jpeg("blue")])
        | {"caption_video": "green"}
        for start in (0, 1000)
    ]
    table = scored_table(scorer, helpers.clips_table(rows))
    corpus = Corpus.create(str(tmp_path / "corpus"))
    corpus.take_over("r-1")
    clips = table.select(CLIP_SCHEMA.names).cast(CLIP_SCHEMA)
    corpus.commit(clips, [helpers.ledger_row("a", rows)], run_id="r-1", fingerprint="f")
    assert not set(SHARD_COLUMNS) & set(corpus.catalog().column_names)
    row = corpus.catalog().to_pylist()[0]
    stored = corpus.read_clip(row, list(SHARD_COLUMNS[2:]))
    assert stored["clip_text_embedding"] == direction(0.5).astype(np.float16).tolist()
    (shard,) = (tmp_path / "corpus" / "shards").glob("*.parquet")
    query = f"select list_sum(clip_text_embedding), typeof(clip_text_embedding) from '{shard}'"
    total, type_ = duckdb.sql(query).fetchall()[0]
    assert total == pytest.approx(float(direction(0.5).sum()), abs=1e-3)
    assert type_ == "FLOAT[]"


def test_hugging_face_reads_the_embeddings(scorer, tmp_path):
    import datasets
    import pyarrow.parquet as pq

    from dataengine.records import hugging_face_metadata
    from tests import helpers

    rows = [helpers.clip_row("a", 0, 1000, frames=[jpeg("red")]) | {"caption_video": "green"}]
    table = scored_table(scorer, helpers.clips_table(rows))
    table = table.replace_schema_metadata(hugging_face_metadata(table.schema))
    pq.write_table(table, tmp_path / "s.parquet")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "s.parquet"), cache_dir=str(tmp_path / "cache")
    )["train"].select_columns(["clip_text_embedding"])
    assert loaded.features["clip_text_embedding"].feature.dtype == "float16"
    assert loaded[0]["clip_text_embedding"] == direction(0.5).astype(np.float16).tolist()


# ------------------------------------------------------------------------------------- aesthetics


def write_head(path, arrays):
    import torch

    torch.save({name: torch.tensor(np.asarray(a, np.float32)) for name, a in arrays.items()}, path)
    return AestheticsConfig(head=str(path))


def test_shipped_head_gives_its_published_numbers():
    """Golden numbers: computed with NumPy alone, in float64, from the file's raw bytes."""
    head = load_head(AestheticsConfig())
    assert (head.width, head.trained_on, head.name) == (768, "openai/ViT-L-14", BUNDLED_HEAD.stem)
    waves = np.sin(np.arange(768)[None] * np.array([[0.1], [0.7], [1.3]]))
    waves /= np.linalg.norm(waves, axis=1, keepdims=True)
    golden = [2.5233540771659637, 2.3565215163774447, 1.696385636738334]
    assert head.score(waves) == pytest.approx(golden, abs=1e-4)
    assert (BUNDLED_HEAD.parent / "NOTICE").read_text().count(head.sha256) == 1


@pytest.mark.parametrize("relu", [False, True])
def test_deep_head_computes_what_its_modules_compute(relu, tmp_path):
    """Both published layouts, against the modules their keys come from."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    sizes = [768, 1024, 128, 64, 16, 1]
    modules: list[nn.Module] = []
    for number in range(5):
        modules.append(nn.Linear(sizes[number], sizes[number + 1]))
        if number < 3:
            modules += [nn.ReLU(), nn.Dropout(0.2)] if relu else [nn.Dropout(0.2)]
        elif number == 3 and relu:
            modules.append(nn.ReLU())
    layers = nn.Sequential(*modules).eval()
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, tmp_path / "h.pth")
    head = load_head(AestheticsConfig(head=str(tmp_path / "h.pth")))
    assert (head.relu, head.trained_on) == (relu, "")
    x = torch.nn.functional.normalize(torch.randn(5, 768), dim=1)
    with torch.no_grad():
        expected = layers(x)[:, 0].numpy()
    assert head.score(x.numpy()) == pytest.approx(expected, abs=1e-5)


def test_aesthetic_score_is_the_best_of_the_even_frames(scorer, tmp_path):
    config = write_head(tmp_path / "linear.pth", {"weight": [[1.0, 3.0]], "bias": [5.0]})
    colours = ["red", "green", "blue", "grey"] * 2
    rows = [clip(colours), clip(["green"], None), clip([], "red")]
    best, no_text, nothing = run(rows, aesthetics=config)
    scores = [np.cos(ANGLES[c]) + 3 * np.sin(ANGLES[c]) + 5 for c in ("green", "grey")]
    assert [colours[at] for at in spread(8, 4)] == ["green", "grey"] * 2
    assert best["aesthetic_score"] == pytest.approx(max(scores), abs=1e-5)
    assert no_text["aesthetic_score"] == pytest.approx(scores[0], abs=1e-5)
    assert no_text["clip_score"] is None
    assert "aesthetic_score" not in nothing
    assert sum(map(len, scorer.seen)) <= 6
    entry = wrote(best)["aesthetic_score"]
    digest = hashlib.sha256((tmp_path / "linear.pth").read_bytes()).hexdigest()
    assert (entry["model"], entry["revision"]) == ("linear+plane", digest[:16])


def test_aesthetics_may_have_a_clip_of_their_own(monkeypatch, tmp_path):
    class Turned(Scorer):
        model, bias = "turned", 1.0

    built = {"": Scorer(), "other": Turned()}
    monkeypatch.setattr(score, "build_clip_scorer", lambda config: built[config.model])
    proved = []
    monkeypatch.setattr(score, "check_clip", lambda scorer: proved.append(scorer.model))
    head = write_head(tmp_path / "h.pth", {"weight": [[1.0, 0.0]], "bias": [0.0]}).head
    config = AestheticsConfig(head=head, model=OpenClipConfig(model="other"))
    (columns,) = run([clip(["red"])], aesthetics=config)
    assert columns["clip_score"] == pytest.approx(1, abs=1e-6)
    assert columns["aesthetic_score"] == pytest.approx(np.cos(1.0), abs=1e-6)
    assert wrote(columns)["aesthetic_score"]["model"] == "h+turned"
    assert proved == ["plane", "turned"]


def test_head_of_another_clip_is_refused(scorer, monkeypatch):
    with pytest.raises(DependencyError, match="gives 2 numbers instead of 768") as caught:
        run([], aesthetics=AestheticsConfig())
    assert "ViT-L-14-quickgelu, pretrained: openai" in caught.value.hint
    monkeypatch.setattr(Scorer, "width", 768)
    with pytest.raises(DependencyError, match="openai/ViT-L-14, plane is not known to be that"):
        run([], aesthetics=AestheticsConfig())
    monkeypatch.setattr(Scorer, "origin", "openai/ViT-L-14-336")
    with pytest.raises(DependencyError, match=r"plane is openai/ViT-L-14-336") as caught:
        run([], aesthetics=AestheticsConfig())
    assert "any_clip: true" in caught.value.hint
    run([], aesthetics=AestheticsConfig(any_clip=True))
    monkeypatch.setattr(Scorer, "origin", "openai/ViT-L-14")
    run([], aesthetics=AestheticsConfig())


def linear(**changes):
    return {"weight": np.zeros((1, 4)), "bias": np.zeros(1)} | changes


def deep(**changes):
    sizes = [4, 3, 3, 3, 3, 1]
    arrays = {}
    for place, number in enumerate((0, 2, 4, 6, 7)):
        arrays[f"layers.{number}.weight"] = np.zeros((sizes[place + 1], sizes[place]))
        arrays[f"layers.{number}.bias"] = np.zeros(sizes[place + 1])
    return arrays | {name.replace("__", "."): array for name, array in changes.items()}


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"weight": np.zeros((1, 4))}, "missing bias"),
        (linear(scale=np.zeros(1)), "unexpected scale"),
        ({k: v for k, v in deep().items() if k != "layers.4.bias"}, r"missing layers\.4\.bias"),
        (deep(layers__8__bias=np.zeros(1)), r"unexpected layers\.8\.bias"),
        (linear(weight=np.zeros((2, 4))), "do not fit"),
        (linear(bias=np.zeros(2)), "do not fit"),
        (deep(layers__2__weight=np.zeros((3, 9))), "do not fit"),
    ],
)
def test_head_that_is_not_whole_is_an_error_that_names_why(arrays, named, tmp_path):
    with pytest.raises(DependencyError, match=named):
        load_head(write_head(tmp_path / "h.pth", arrays))


def test_head_is_read_without_running_code(tmp_path):
    import torch

    torch.save({"weight": jpeg_decode}, tmp_path / "code.pth")
    for path in (tmp_path / "code.pth", tmp_path / "none.pth"):
        with pytest.raises(DependencyError, match="cannot be read"):
            load_head(AestheticsConfig(head=str(path)))


def test_needs_name_a_head_that_does_not_ship():
    assert AestheticsConfig().needs() == ()
    assert AestheticsConfig(head="h.pth").needs() == (Weights("file", "h.pth"),)
    assert set(aesthetics._TRAINED_ON.values()) == {
        f"openai/ViT-{x}" for x in ("L-14", "B-16", "B-32")
    }
