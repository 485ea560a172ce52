# SPDX-License-Identifier: Apache-2.0
"""Corpora made by hand, with captions that repeat and models that fail."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from dataengine import alarms
from dataengine.alarms import AlarmSettings, NoteCount, check_captions, say_alarms
from dataengine.corpus import Corpus
from dataengine.stage import provenance
from tests.helpers import clip_row, clips_table, ledger_row


def make(path, num_videos, num_clips, columns):
    """A corpus of which ``columns(video, clip)`` gives the columns of every clip."""
    corpus = Corpus.create(str(path))
    corpus.take_over("r-1")
    rows, ledger = [], []
    for video in range(num_videos):
        clips = [
            clip_row(f"v{video:02d}", 1000 * i, 1000 * i + 1000, **columns(video, i))
            for i in range(num_clips)
        ]
        rows += clips
        ledger.append(ledger_row(f"v{video:02d}", clips))
    corpus.commit(clips_table(rows), ledger, run_id="r-1", fingerprint="f")
    return corpus


def text_of(found, column):
    (texts,) = [texts for texts in found.texts if texts.column == column]
    return texts


def own(video, clip):
    return f"clip {clip} of video {video}"


def test_one_text_on_many_videos_is_an_alarm_in_its_column_alone(tmp_path):
    same = ["A black screen.", "a BLACK  screen", "A black screen!!"]
    corpus = make(
        tmp_path / "c", 12, 10,
        lambda video, clip: {
            "caption": own(video, clip),
            "caption_video": same[video % 3] if clip < 2 else own(video, clip),
            "caption_audio": None if clip else "",
        },
    )  # fmt: skip
    found = check_captions(corpus)
    assert [texts.column for texts in found.texts] == ["caption_video", "caption"]
    texts = text_of(found, "caption_video")
    assert (texts.num_clips, texts.num_texts) == (120, 12 * 8 + 1)
    (repeated,) = texts.repeated
    assert repeated.text in same
    assert (repeated.num_clips, repeated.num_videos, repeated.alarm) == (24, 12, True)
    assert repeated.clip_ratio == pytest.approx(0.2)
    assert repeated.clip_ids == ("v00_0_1000", "v01_0_1000", "v02_0_1000")
    assert text_of(found, "caption").repeated == ()
    (sentence,) = found.alarms
    assert "caption_video: one text is on 24 of 120 clips (20%) of 12 videos" in sentence
    json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("num_videos", "copies", "settings", "alarm"),
    [
        (12, 1, {}, False),  # 10 % exactly
        (9, 2, {}, False),  # too few videos to say
        (9, 2, {"min_videos": 9}, True),
        (12, 1, {"max_text_ratio": 0.09}, True),
        (12, 5, {"max_text_ratio": 1}, False),
    ],
)
def test_when_a_text_is_an_alarm_is_a_setting(tmp_path, num_videos, copies, settings, alarm):
    corpus = make(
        tmp_path / "c", num_videos, 10,
        lambda video, clip: {"caption": "same" if clip < copies else own(video, clip)},
    )  # fmt: skip
    found = check_captions(corpus, AlarmSettings(**settings))
    assert bool(found.alarms) is alarm
    assert text_of(found, "caption").repeated[0].num_clips == copies * num_videos


def test_a_text_that_repeats_inside_one_video_is_not_listed(tmp_path):
    corpus = make(tmp_path / "c", 12, 10, lambda video, clip: {"caption": f"lecture {video}"})
    found = check_captions(corpus)
    assert found.alarms == ()
    assert (text_of(found, "caption").num_texts, text_of(found, "caption").repeated) == (12, ())


def test_the_most_frequent_texts_come_first_and_no_more_than_asked(tmp_path):
    names = ["a dog", "a cat", "a cow", "a hen"]
    corpus = make(
        tmp_path / "c", 4, 10,
        lambda video, clip: {"caption": names[clip - 6] if clip > 6 else names[0] if clip > 3 else own(video, clip)},
    )  # fmt: skip
    found = check_captions(corpus, AlarmSettings(num_texts=2, num_examples=9))
    assert [(text.text, text.num_clips) for text in text_of(found, "caption").repeated] == [
        ("a dog", 12), ("a cat", 4),
    ]  # fmt: skip
    assert text_of(found, "caption").repeated[1].clip_ids == tuple(
        f"v{video:02d}_7000_8000" for video in range(4)
    )


def test_texts_that_share_a_bucket_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(alarms, "_BUCKETS", 1)
    corpus = make(
        tmp_path / "c", 4, 5,
        lambda video, clip: {"caption": ("a dog", "a cat")[clip] if clip < 2 else own(video, clip)},
    )  # fmt: skip
    repeated = text_of(check_captions(corpus), "caption").repeated
    assert {(text.text, text.num_clips) for text in repeated} == {("a dog", 4), ("a cat", 4)}


def test_texts_of_other_scripts_and_hostile_texts_are_counted(tmp_path):
    texts = ["\u4e00\u53ea\u72d7", "'; drop table x; --", "\u202e\x00", "e\u0301te\u0301"]
    corpus = make(tmp_path / "c", 3, 4, lambda video, clip: {"caption": texts[clip]})
    found = text_of(check_captions(corpus), "caption")
    assert {text.text for text in found.repeated} == {texts[0], texts[1], texts[3]}


def noted(video, clip):
    """Ten clips: a failure of two kinds, a fallback, no sound, and six in order."""
    notes = {0: "failed:out_of_memory", 1: "failed:timeout"}
    fallback = clip in (2, 3)
    return {
        "caption": own(video, clip),
        "provenance": [
            provenance("caption_video", "vlm", "1", note=notes.get(clip)),
            provenance("caption_audio", "ear", "2", note="no_sound" if clip < 5 else None),
            provenance(
                "caption_avs",
                "template" if fallback else "llm",
                note={2: "template:refusal", 3: "template:not_json"}.get(clip),
            ),
        ],
    }


def test_notes_are_counted_per_column_and_model(tmp_path):
    found = check_captions(make(tmp_path / "c", 3, 10, noted))
    assert [(a.column, a.model, a.revision, a.num_clips, a.notes) for a in found.authors] == [
        ("caption_audio", "ear", "2", 30, (NoteCount("no_sound", "", 15),)),
        ("caption_avs", "llm", "", 24, ()),
        (
            "caption_avs", "template", "", 6,
            (NoteCount("template", "not_json", 3), NoteCount("template", "refusal", 3)),
        ),
        (
            "caption_video", "vlm", "1", 30,
            (NoteCount("failed", "out_of_memory", 3), NoteCount("failed", "timeout", 3)),
        ),
    ]  # fmt: skip
    assert found.alarms == (
        "caption_avs: a template stands in on 6 of 30 clips (20%): not_json 3, refusal 3",
        "caption_video: the model failed on 6 of 30 clips (20%): out_of_memory 3, timeout 3",
    )
    settings = AlarmSettings(max_note_ratio=0.2)
    assert check_captions(make(tmp_path / "d", 3, 10, noted), settings).alarms == ()


def test_an_empty_corpus_is_not_suspicious(tmp_path):
    found = check_captions(Corpus.create(str(tmp_path / "c")))
    assert (found.texts, found.authors, found.alarms) == ((), (), ())


def test_a_corpus_of_before_notes_is_read(tmp_path):
    corpus = make(tmp_path / "c", 2, 2, lambda video, clip: {"caption": own(video, clip)})
    part = corpus.path("catalog", corpus.names("catalog")[0] + ".parquet")
    table = pq.read_table(part)
    old = pa.list_(pa.struct([(n, pa.string()) for n in ("column", "model", "revision")]))
    index = table.schema.get_field_index("provenance")
    rows = [
        [{key: entry[key] for key in ("column", "model", "revision")} for entry in entries]
        for entries in table["provenance"].to_pylist()
    ]
    pq.write_table(table.set_column(index, "provenance", pa.array(rows, old)), part)
    (author,) = check_captions(corpus).authors
    assert (author.column, author.num_clips, author.notes) == ("caption", 4, ())


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"max_text_ratio": 0}, {"min_videos": 1}, {"num_texts": 0}):
        with pytest.raises(ValidationError):
            AlarmSettings(**settings)


def test_a_run_whose_model_failed_on_all_says_so_at_its_end(tmp_path, monkeypatch, capsys):
    """The first thing seen of a captioner that cannot caption must not be the report."""
    from dataengine import cli
    from dataengine.annotate import AnnotationResult

    failed = provenance("caption_video", "blip", note="failed:bad_output")
    corpus = make(tmp_path / "c", 2, 8, lambda *_: {"caption_video": None, "provenance": [failed]})
    sentence = "warning: caption_video: the model failed on 16 of 16 clips (100%): bad_output 16"
    for columns, said in (((), True), (("caption_video",), True), (("caption_audio",), False)):
        out = io.StringIO()
        say_alarms(corpus, Console(file=out, width=40), columns)
        assert (out.getvalue() == sentence + "\n") == said
    monkeypatch.setattr(cli, "LIVE", Console(width=40, stderr=True))
    result = AnnotationResult("r-1", 2, 16, {}, 1.0)
    monkeypatch.setattr("dataengine.annotate.annotate", lambda *_, **__: result)
    cli.annotate(corpus.url, Path("pipelines/quickstart.yaml"), ["caption_video"])
    assert sentence in capsys.readouterr().err


def test_a_column_that_was_declared_and_never_written_is_no_trouble(tmp_path):
    """As an annotation leaves a corpus whose model does not load."""
    from dataengine.annotate import _declare, _todo
    from dataengine.query.verify import verify
    from dataengine.remove import remove
    from tests.test_annotate import make as make_annotation
    from tests.test_annotate import run_here

    corpus = make(tmp_path / "c", 3, 2, lambda video, clip: {"caption": own(video, clip)})
    annotation = make_annotation("_llm")
    _declare(corpus, annotation)
    corpus = Corpus.open(corpus.url)
    assert "caption_llm" in corpus.catalog_schema.names
    assert [texts.column for texts in check_captions(corpus).texts] == ["caption"]
    assert not verify(corpus).problems
    assert remove(corpus, ["v00"]).num_clips == 2
    corpus = Corpus.open(corpus.url)
    assert not verify(corpus).problems
    corpus.take_over("r-3")
    assert len(_todo(corpus, annotation, again=False)[0]) == 1
    run_here(corpus, annotation, run_id="r-3")
    found = check_captions(Corpus.open(corpus.url))
    assert [texts.column for texts in found.texts] == ["caption", "caption_llm"]
    assert not verify(corpus).problems


def test_of_a_large_corpus_a_part_is_looked_at(tmp_path, monkeypatch):
    corpus = make(tmp_path / "c", 30, 4, lambda video, clip: {"caption": "the same"})
    monkeypatch.setattr(alarms, "MOST_CLIPS", 60)
    found = check_captions(corpus)
    assert found.num_clips == 120
    assert 40 <= found.num_looked_at <= 80
    assert found.texts[0].num_clips == found.num_looked_at
    assert found.alarms
    assert sum(a.num_clips for a in found.authors if a.column == "caption") == found.num_looked_at
