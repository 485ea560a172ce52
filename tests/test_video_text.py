# SPDX-License-Identifier: Apache-2.0
# Answers may be failures; a wrong guess fails the test.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOptionalSubscript=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
"""Video-text scores: every way a ViCLIP can come, and InternVideo2, from the weights to the shard."""

import copy
import json
import shutil
import sys
from types import ModuleType

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dataengine.corpus import Corpus
from dataengine.errors import DependencyError
from dataengine.flow import apply_stage
from dataengine.media import jpeg_decode, jpeg_encode
from dataengine.models.answers import OUT_OF_MEMORY, Failure
from dataengine.models.internvideo2 import InternVideo2ScorerConfig
from dataengine.models.known_pairs import KNOWN_PAIRS
from dataengine.models.video_text import (
    TrainedScorerConfig,
    ViCLIPScorerConfig,
    build_video_text,
    middle_frames,
)
from dataengine.needs import Package, Weights
from dataengine.networks.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BeatsNetworkConfig,
    BertConfig,
    InternVideo2ClipConfig,
    InternVideo2Config,
    InternVideo2Stage2Config,
    MobileClipTextConfig,
    ViCLIPConfig,
)
from dataengine.networks.internvideo2 import LayerScale
from dataengine.networks.internvideo2_clip import InternVideo2Clip
from dataengine.networks.internvideo2_stage2 import InternVideo2Stage2, published_stage2
from dataengine.networks.text import clean_caption, tokenise
from dataengine.prefetch import Found, Missing, find
from dataengine.records import CLIP_SCHEMA, DROP_STRUCT
from dataengine.stage import Drop, Kept
from dataengine.stages.score_video_text import ScoreVideoTextStage
from tests import helpers
from tests.tiny_scorers import VICLIP_CONFIG, fit, make_viclip
from training import export

WAYS = ("run", "export", "half", "shards", "published", "published.safetensors")
TOWERS = ("vision_encoder.proj", "text_encoder.text_projection")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def viclip():
    """A tiny model that knows the known pairs, and the order of frames a little."""
    torch.set_num_threads(1)
    model = make_viclip()
    torch.manual_seed(0)
    with torch.no_grad():
        model.vision_encoder.temporal_positional_embedding += 0.05 * torch.randn(1, 4, 64)
    return model


def shape():
    # What training alone does, masks and stochastic depth, must not reach the scores.
    video = VICLIP_CONFIG["video"] | {"mask_ratio": 0.5, "drop_path": 0.3}
    return ViCLIPConfig.model_validate(VICLIP_CONFIG | {"video": video, "init_temperature": 0.1})


def write_published(path, model):
    """A training run's whole state, as DeepSpeed leaves it, its settings in a class of its own."""

    def settings(**values):
        """A dict whose entries are attributes too, and so stored twice."""
        made = module.EasyDict(values)
        made.__dict__.update(values)
        return made

    module = ModuleType("utils.easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "utils.easydict"})
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    payload = {
        "model": state,
        "optimizer": {"state": {0: torch.zeros(2)}, "param_groups": [{"lr": 1e-5, "betas": (0.9, 1)}]},
        "config": settings(model=settings(name="ViCLIP"), epochs=3),
        "epoch": 3,
        "global_step": 70,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "utils", ModuleType("utils"))
        patch.setitem(sys.modules, "utils.easydict", module)
        torch.save(payload, path)
    return path


@pytest.fixture(scope="module")
def weights(viclip, tmp_path_factory):
    """The same model, in every way it can come."""
    root = tmp_path_factory.mktemp("viclip")
    state = viclip.state_dict()
    (root / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    export.export_folder(state, shape(), root / "run" / "model")
    export.export_folder(state, shape(), root / "export")
    export.export_folder(state, shape(), root / "half", half=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "MAX_SHARD_SIZE", "100KB")
        export.export_folder(state, shape(), root / "shards")
    save_file(state, root / "viclip-10M.safetensors")
    return {
        "run": root / "run",
        "export": root / "export",
        "half": root / "half",
        "shards": root / "shards",
        "published": write_published(root / "ViClip-10M.pth", viclip),
        "published.safetensors": root / "viclip-10M.safetensors",
    }


def stage_of(path, kind=ViCLIPScorerConfig, **columns):
    config = {"model": kind(weights=str(path), **columns)}
    stage = ScoreVideoTextStage(ScoreVideoTextStage.Config(**config))
    stage.setup()
    return stage


def clip(number, num_frames, caption="A red circle moves over a white ground.", seed=None):
    """A clip of pictures of noise, each about another colour."""
    rng = np.random.default_rng(number if seed is None else seed)
    frames = [
        jpeg_encode((rng.integers(0, 60, (24, 40, 3)) + rng.integers(0, 195, 3)).astype(np.uint8))
        for _ in range(num_frames)
    ]
    start = 1000 * number
    return helpers.clip_row(
        "v", start, start + 1000, frames=frames, frame_ms=[start] * num_frames
    ) | {"caption_video": caption}


def through_a_shard(folder, stage, rows):
    """Scores and who gave them, by clip, as a corpus gives them back."""
    table = helpers.clips_table(rows).append_column("_drop", pa.nulls(len(rows), DROP_STRUCT))
    table = apply_stage(stage, table, stage.process)
    assert table["_drop"].null_count == len(rows)
    corpus = Corpus.create(str(folder))
    corpus.take_over("r-1")
    clips = table.select(CLIP_SCHEMA.names).cast(CLIP_SCHEMA)
    corpus.commit(clips, [helpers.ledger_row("v", rows)], run_id="r-1", fingerprint="f")
    read = {
        row["clip_id"]: row
        for row in corpus.catalog(["clip_id", "video_text_score", "provenance"]).to_pylist()
    }
    return [
        (
            read[row["clip_id"]]["video_text_score"],
            [e for e in read[row["clip_id"]]["provenance"] if e["column"] == "video_text_score"],
        )
        for row in rows
    ]


def own_score(model, row, places):
    """A score with nothing of the scorer in it but the network."""
    pictures = [
        Image.fromarray(jpeg_decode(row["frames"][at])).resize((32, 32), Image.Resampling.BICUBIC)
        for at in places
    ]
    pixels = (np.stack([np.asarray(p) for p in pictures]) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    frames = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)[None]
    with torch.no_grad():
        video = model.encode_video(frames)
        text = model.encode_text(tokenise([clean_caption(row["caption_video"])], 32))
    return float((video * text).sum())


# --------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("available", "wanted", "chosen"),
    [
        (16, 8, [0, 2, 4, 6, 8, 10, 12, 14]),
        (8, 4, [0, 2, 4, 6]),
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (10, 4, [0, 3, 5, 8]),
        (3, 4, [0, 1, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
    ],
)
def test_frames_are_the_middles_of_equal_intervals(available, wanted, chosen):
    assert middle_frames(available, wanted) == chosen


# --------------------------------------------------------------------------------------- ViCLIP


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_scores_in_a_shard(way, weights, viclip, tmp_path):
    places = {0: [0, 2, 4, 6], 1: [0, 1, 2, 2], 2: [0, 0, 0, 0], 3: [0, 3, 5, 8]}
    rows = [clip(0, 8), clip(1, 3, "Dogs"), clip(2, 1, "a dog, " * 40), clip(3, 10)]
    rows.append(clip(4, 4, None))
    stage = stage_of(weights[way])
    *scored, unscored = through_a_shard(tmp_path / "corpus", stage, rows)
    expected = [own_score(viclip, rows[at], places[at]) for at in range(4)]
    tolerance = 2e-3 if way == "half" or torch.cuda.is_available() else 1e-5
    assert [score for score, _ in scored] == pytest.approx(expected, abs=tolerance)
    assert max(expected) - min(expected) > 0.05
    assert unscored == (None, [])
    names = {"published": "ViClip-10M", "published.safetensors": "viclip-10M"}
    name = names.get(way, way)
    for _, (entry,) in scored:
        assert (entry["model"], entry["note"]) == (f"viclip:{name}", None)
        assert entry["revision"] == stage._scorer.revision
        assert len(entry["revision"]) >= 8


def test_revision_follows_the_weights(weights, viclip, tmp_path):
    other = copy.deepcopy(viclip)
    with torch.no_grad():
        other.text_encoder.ln_final.weight += 1e-3
    for name, model, about in (
        ("moved", viclip, {"steps": 3}),
        ("changed", other, {}),
        ("uncleaned", viclip, {"clean_captions": False}),
    ):
        export.export_folder(model.state_dict(), shape(), tmp_path / name, about=about)
    first, moved, changed, uncleaned = (
        build_video_text(ViCLIPScorerConfig(weights=str(path))).revision
        for path in (weights["export"], *(tmp_path / n for n in ("moved", "changed", "uncleaned")))
    )
    assert first == moved
    assert len({first, changed, uncleaned}) == 3


def test_a_clip_scores_alike_in_any_batch(weights):
    rows = [clip(number, 1 + number, f"caption number {number}") for number in range(6)]
    stage, one = (
        stage_of(weights["export"], batch_size=4),
        stage_of(weights["export"], batch_size=1),
    )
    together = [outcome.rows[0]["video_text_score"] for outcome in stage.process(rows)]
    alone = [one.process([row])[0].rows[0]["video_text_score"] for row in rows]
    assert together == pytest.approx(alone, abs=0.02 if torch.cuda.is_available() else 1e-5)
    assert stage.process([]) == []


def test_order_of_the_frames_counts(weights):
    """That is what tells the score from CLIP's."""
    stage, row = stage_of(weights["export"]), clip(0, 4)
    turned = row | {"frames": row["frames"][::-1]}
    first, second = (
        outcome.rows[0]["video_text_score"] for outcome in stage.process([row, turned])
    )
    assert abs(first - second) > 1e-4


def test_other_column_is_scored_when_named(weights):
    row = clip(0, 4, "one thing") | {"caption_avs": "quite another thing"}
    config = {"model": ViCLIPScorerConfig(weights=str(weights["export"]))}
    stage = ScoreVideoTextStage(ScoreVideoTextStage.Config(**config, caption_column="caption_avs"))
    stage.setup()
    (outcome,) = stage.process([row])
    (expected,) = stage_of(weights["export"]).process([clip(0, 4, "quite another thing")])
    assert outcome.rows[0]["video_text_score"] == expected.rows[0]["video_text_score"]


def test_what_fails_costs_that_clip_alone(weights, monkeypatch):
    stage = stage_of(weights["export"], batch_size=3)
    broken = clip(1, 4)
    broken["frames"][1] = b"broken"
    unused = clip(2, 8)
    unused["frames"][1] = b"broken"  # of 8 frames, 4 are looked at, and not this one
    rows = [clip(0, 4), broken, unused, clip(3, 4) | {"frames": []}, clip(4, 4), clip(5, 4)]
    clean = stage.process(rows)
    assert clean[1] == Drop("bad_frames", "6 bytes that are no picture")
    assert [type(outcome) for outcome in clean] == [Kept, Drop, *[Kept] * 4]
    assert clean[3].rows[0] == {"video_text_score": None}
    assert all(isinstance(clean[at].rows[0]["video_text_score"], float) for at in (0, 2, 4, 5))

    encode = stage._scorer.embed_videos

    def full(prepared):
        return [Failure(OUT_OF_MEMORY, "full") if n == 1 else a for n, a in enumerate(encode(prepared))]  # fmt: skip

    monkeypatch.setattr(stage._scorer, "embed_videos", full)
    failed = stage.process(rows)
    # The second good clip of the first batch, and of the second.
    lost = [at for at in (0, 2, 4, 5) if failed[at].rows[0]["video_text_score"] is None]
    assert lost == [2, 5]
    for at in lost:
        assert failed[at].rows[0]["provenance"][0]["note"] == "failed:out_of_memory"
    assert [failed[at] for at in (0, 1, 3, 4)] == [clean[at] for at in (0, 1, 3, 4)]


# ---------------------------------------------------------------------------- what is refused


def rewritten(way, weights, viclip, tmp_path, change):
    """Returns a path with the weights changed, or without those whose change is None."""
    state = {k: v for k, v in {**viclip.state_dict(), **change}.items() if v is not None}
    match way:
        case "run" | "export":
            folder = tmp_path / "model" if way == "run" else tmp_path
            folder.mkdir(exist_ok=True)
            save_file(state, folder / "model.safetensors")
            (folder / "config.json").write_bytes((weights["export"] / "config.json").read_bytes())
            return tmp_path
        case "published":
            torch.save({"model": state}, tmp_path / "v.pth")
            return tmp_path / "v.pth"


@pytest.mark.parametrize("way", ["run", "export", "published"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_encoder.ln_final.bias": None}, r"missing text_encoder\.ln_final\.bias"),
        ({"vision_encoder.conv1.weight": None}, r"missing vision_encoder\.conv1\.weight"),
        ({"temp": None}, "missing temp"),
        ({"vision_encoder.spare": torch.zeros(1)}, r"unexpected vision_encoder\.spare"),
        (
            {"text_encoder.ln_final.bias": torch.zeros(3)},
            r"of another shape text_encoder\.ln_final\.bias \[3\] instead of \[64\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(way, change, said, weights, viclip, tmp_path):
    path = rewritten(way, weights, viclip, tmp_path, change)
    with pytest.raises(DependencyError, match=said):
        stage_of(path)


@pytest.mark.parametrize("way", ["run", "export", "published"])
def test_a_model_at_random_is_refused(way, weights, tmp_path):
    random = make_viclip(fitted=False)
    path = rewritten(way, weights, random, tmp_path, {})
    with pytest.raises(DependencyError, match="scores a known pair wrongly") as caught:
        stage_of(path)
    assert "damaged" in caught.value.hint


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_model_with_shuffled_weights_is_refused(tower, seed, weights, viclip, tmp_path):
    """All names and shapes are right, and every number is there: only its place is not."""
    rng = torch.Generator().manual_seed(seed)
    projection = viclip.state_dict()[tower]
    shuffled = projection[:, torch.randperm(projection.shape[1], generator=rng)].contiguous()
    path = rewritten("export", weights, viclip, tmp_path, {tower: shuffled})
    with pytest.raises(DependencyError, match="scores a known pair wrongly"):
        stage_of(path)


@pytest.mark.parametrize("kind", [ViCLIPScorerConfig, TrainedScorerConfig])
def test_paths_that_hold_no_model_are_refused_with_a_hint(kind, weights, tmp_path):
    step = weights["run"] / "checkpoints" / "step_00000003"
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    for path in (step, tmp_path / "unfinished"):
        with pytest.raises(DependencyError, match="checkpoints of training, not a model") as caught:
            stage_of(path, kind)
        assert f"python -m training.export {path} FOLDER" in caught.value.hint
    with pytest.raises(DependencyError, match=r"No .* weights at"):
        stage_of(tmp_path / "nowhere", kind)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DependencyError, match=r"No model in .* \(no config\.json\)"):
        stage_of(tmp_path / "empty", kind)


def test_a_model_of_another_kind_is_named(weights, tmp_path):
    vision = InternVideo2Config(
        image_size=28, width=64, layers=1, heads=2, mlp_width=64, pool_heads=2
    )
    config = json.loads((weights["export"] / "config.json").read_text())
    config |= {"kind": "internvideo2", "model": vision.model_dump()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(DependencyError, match="internvideo2 model, not a ViCLIP") as caught:
        stage_of(tmp_path)
    assert caught.value.hint == "write kind: trained"
    with pytest.raises(DependencyError, match="a vision encoder alone, which reads no text"):
        stage_of(tmp_path, TrainedScorerConfig)


def test_captions_are_cleaned_as_in_training(viclip, tmp_path):
    """A model that learnt case and punctuation is shown them."""
    scores = {}
    for clean in (True, False):
        folder = tmp_path / str(clean)
        export.export_folder(viclip.state_dict(), shape(), folder, about={"clean_captions": clean})
        scorer = build_video_text(TrainedScorerConfig(weights=str(folder)))
        scores[clean] = scorer.embed_texts(["a dog, a cat!", "a dog a cat"])
    assert np.array_equal(*scores[True])
    assert np.array_equal(scores[True][1], scores[False][1])
    assert not np.array_equal(*scores[False])


class Evil:
    def __reduce__(self):
        return (sys.exit, ("a file ran code",))


@pytest.mark.parametrize(
    "payload",
    [{"model": {"w": Evil()}}, {"model": 3}, {"epoch": 1}, [1, 2], {"model": {"a": torch.ones(1)}}],
    ids=["code", "number", "nothing", "list", "another"],
)
def test_published_files_are_read_as_weights_alone(payload, tmp_path):
    torch.save(payload, tmp_path / "v.pth")
    with pytest.raises(DependencyError, match=r"v\.pth"):
        stage_of(tmp_path / "v.pth")
    (tmp_path / "v.pth").write_bytes(b"no file of torch")
    with pytest.raises(DependencyError, match="Cannot be read as weights alone"):
        stage_of(tmp_path / "v.pth")


def test_needs_name_the_weights(weights, tmp_path):
    needs = ViCLIPScorerConfig(weights="w.pth").needs()
    assert needs == (Package("open_clip"), Weights("file", "w.pth"))
    for way, model in (("run", "run/model"), ("export", "export"), ("shards", "shards")):
        _, need = TrainedScorerConfig(weights=str(weights[way])).needs()
        assert need == Weights("hub", str(weights["export"].parent / model))
        assert isinstance(find(need), Found)
    (tmp_path / "config.json").write_text("{}")
    _, need = TrainedScorerConfig(weights=str(tmp_path)).needs()
    assert isinstance(find(need), Missing)


# --------------------------------------------------------------------------------- InternVideo2


VISION = InternVideo2Config(
    image_size=28, num_frames=2, width=64, layers=1, heads=4, mlp_width=96, pool_heads=4,
    embed_dim=32,
)  # fmt: skip
BEATS = BeatsNetworkConfig(
    embed_dim=16, width=32, mlp_width=32, layers=1, heads=2, conv_pos=8, conv_pos_groups=2,
    num_buckets=16, max_distance=32,
)  # fmt: skip
TEXTS = [pair.text for pair in KNOWN_PAIRS]


def fitted(network, tokens):
    """Teaches a network of `VISION` the known pairs."""
    pictures = [
        np.asarray(Image.fromarray(pair.draw()).resize((28, 28), Image.Resampling.BICUBIC))
        for pair in KNOWN_PAIRS
    ]
    pixels = (np.stack(pictures) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    frames = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
    clips = frames[:, None].expand(-1, 2, -1, -1, -1)
    # Its own first weights are so small that six texts look alike.
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.1)
        elif isinstance(module, LayerScale):
            torch.nn.init.constant_(module.gamma, 0.1)
    fit(network, lambda: network.encode_video(clips), lambda: network.encode_text(tokens), 2e-4)
    return network


@pytest.fixture(scope="module")
def stage2(tmp_path_factory):
    """InternVideo2's second stage, which knows the known pairs: its shape and its network."""
    from transformers import BertTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    words = sorted({word for text in TEXTS for word in clean_caption(text).split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "."]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate([*special, *words])})
    tokenizer.save_pretrained(folder)
    text = BertConfig(
        vocab_size=len(tokenizer), width=64, layers=2, fusion_layer=1, heads=1, mlp_width=96,
        max_positions=16, dropout=0.0, mask_id=4,
    )  # fmt: skip
    config = InternVideo2Stage2Config(
        kind="internvideo2_stage2", vision=VISION, text=text, tokenizer=str(folder),
        context_length=16, embed_dim=16,
    )  # fmt: skip
    tokens = tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt")
    return config, fitted(InternVideo2Stage2(config), tokens["input_ids"])


@pytest.fixture(scope="module")
def internvideo2(stage2, tmp_path_factory):
    """The same as a published file: its weights, and the scorer's settings."""
    config, network = stage2
    root = tmp_path_factory.mktemp("internvideo2")
    state = published_stage2(network.state_dict(), config)
    torch.save(
        {"module": {f"module.{name}": value for name, value in state.items()}}, root / "s.pt"
    )
    settings = {
        "weights": str(root / "s.pt"), "tokenizer": config.tokenizer, "num_frames": 2,
        "heads": 4, "pool_heads": 4, "max_tokens": 16,
    }  # fmt: skip
    return state, settings


def internvideo2_stage(settings):
    config = {"model": InternVideo2ScorerConfig(**settings)}
    stage = ScoreVideoTextStage(ScoreVideoTextStage.Config(**config))
    stage.setup()
    return stage


def known_rows():
    """Two clips of each known picture: with its own text, and with another one's."""
    rows = []
    for number, pair in enumerate(KNOWN_PAIRS):
        row = clip(number, 5, pair.text)
        rows.append(row | {"frames": [jpeg_encode(pair.draw())] * 5})
        wrong = KNOWN_PAIRS[(number + 1) % len(KNOWN_PAIRS)].text
        rows.append(clip(100 + number, 5, wrong) | {"frames": rows[-1]["frames"]})
    return rows


def assert_known(read, model):
    """Own texts fit better than others', and the shard says who found so."""
    scores = [score for score, _ in read]
    assert min(np.subtract(scores[::2], scores[1::2])) > 0.1
    for _, (entry,) in read:
        assert (entry["model"], entry["note"]) == (model, None)


def test_internvideo2_reaches_the_shard(internvideo2, tmp_path):
    """Clips of the known pictures fit their own texts, whatever else is in the batch."""
    stage, rows = internvideo2_stage(internvideo2[1]), known_rows()
    read = through_a_shard(tmp_path / "corpus", stage, [*rows, clip(200, 3, None)])
    assert read.pop() == (None, [])
    assert_known(read, "internvideo2:s")
    alone = [stage.process([row])[0].rows[0]["video_text_score"] for row in rows]
    tolerance = 0.02 if torch.cuda.is_available() else 1e-5
    assert alone == pytest.approx([score for score, _ in read], abs=tolerance)


def test_a_trained_second_stage_scores_as_the_published_file(stage2, internvideo2, tmp_path):
    config, network = stage2
    moved = config.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    shutil.copytree(config.tokenizer, tmp_path / "tokenizer")
    about = {"clean_captions": False}
    export.export_folder(network.state_dict(), moved, tmp_path / "run" / "model", about=about)
    shutil.rmtree(tmp_path / "tokenizer")  # the folder has its own
    rows = known_rows()
    stage = stage_of(tmp_path / "run", TrainedScorerConfig)
    read = through_a_shard(tmp_path / "corpus", stage, rows)
    assert_known(read, "internvideo2_stage2:run")
    published = internvideo2_stage(internvideo2[1]).process(rows)
    expected = [outcome.rows[0]["video_text_score"] for outcome in published]
    assert [score for score, _ in read] == pytest.approx(expected, abs=1e-5)


def test_a_published_file_that_hears_reads_text_and_video_alone(stage2, tmp_path):
    """The 6B model's file holds BEATs, and its decoder looks at tokens of another width."""
    config = stage2[0].model_copy(update={"audio": BEATS, "fusion_width": 48})
    torch.manual_seed(0)
    network = InternVideo2Stage2(config).eval()
    torch.save(published_stage2(network.state_dict(), config), tmp_path / "6b.pt")
    settings = {"num_frames": 2, "heads": 4, "pool_heads": 4, "max_tokens": 16, "device": "cpu"}
    scorer = build_video_text(
        InternVideo2ScorerConfig(
            weights=str(tmp_path / "6b.pt"), tokenizer=config.tokenizer, **settings
        )
    )
    folder = tmp_path / "folder"
    export.export_folder(network.state_dict(), config, folder, about={"clean_captions": False})
    trained = build_video_text(TrainedScorerConfig(weights=str(folder), device="cpu"))
    video = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 3), np.uint8)
    for own, theirs in (
        (scorer.embed_videos([video]), trained.embed_videos([video])),
        (scorer.embed_texts(TEXTS), trained.embed_texts(TEXTS)),
    ):
        assert np.array_equal(own, theirs)


def test_a_trained_internvideo2_clip_scores(tmp_path):
    torch.manual_seed(0)
    text = MobileClipTextConfig(context_length=20, width=32, layers=1, heads=2, mlp_width=64)
    config = InternVideo2ClipConfig(
        kind="internvideo2_clip", vision=VISION, text=text, embed_dim=16, train="all",
        train_text=True,
    )  # fmt: skip
    network = fitted(InternVideo2Clip(config), tokenise([clean_caption(t) for t in TEXTS], 20))
    export.export_folder(network.state_dict(), config, tmp_path / "mine")
    stage = stage_of(tmp_path / "mine", TrainedScorerConfig)
    read = through_a_shard(tmp_path / "corpus", stage, known_rows())
    assert_known(read, "internvideo2_clip:mine")


@pytest.mark.parametrize("part", ["vision_proj.weight", "text_proj.weight"])
def test_internvideo2_with_shuffled_weights_is_refused(part, internvideo2, tmp_path):
    state, settings = internvideo2
    rng = torch.Generator().manual_seed(0)
    shuffled = state[part][torch.randperm(len(state[part]), generator=rng)]
    torch.save({"module": {**state, part: shuffled}}, tmp_path / "s.pt")
    with pytest.raises(DependencyError, match="scores a known pair wrongly"):
        internvideo2_stage({**settings, "weights": str(tmp_path / "s.pt")})


def test_internvideo2_files_are_read_as_weights_alone(internvideo2, tmp_path):
    torch.save({"module": {"w": Evil()}}, tmp_path / "s.pt")
    with pytest.raises(DependencyError, match="Cannot be read as weights alone"):
        internvideo2_stage({**internvideo2[1], "weights": str(tmp_path / "s.pt")})
