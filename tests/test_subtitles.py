# SPDX-License-Identifier: Apache-2.0
import pytest

from dataengine.fetch.pages import choose_subtitles
from dataengine.stages.transcribe import TranscribeStage, best_origin, original_language
from dataengine.subtitles import parse_subtitles, sidecars, subtitle_language

ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.000 --> 00:00:02.000 align:start position:0%
{blank}
never<00:00:00.500><c> say</c><00:00:01.000><c> never</c>

00:00:02.000 --> 00:00:02.010 align:start position:0%
never say never
{blank}

00:00:02.010 --> 00:00:04.000 align:start position:0%
never say never
say<00:00:02.500><c> it</c><00:00:03.000><c> again</c>

00:00:04.000 --> 00:00:04.010 align:start position:0%
say it again
{blank}

00:00:04.010 --> 00:00:06.000 align:start position:0%
say it again
no

00:00:20.000 --> 00:00:21.000 align:start position:0%
no
""".replace("{blank}", " ")


def cue(start_ms, end_ms, text, language="en", origin="manual"):
    return {
        "language": language, "start_ms": start_ms, "end_ms": end_ms, "text": text,
        "origin": origin,
    }  # fmt: skip


def test_rolling_captions_say_every_line_once():
    cues = parse_subtitles(ROLLING, "en", "automatic")
    assert cues == [
        cue(0, 2000, "never say never", origin="automatic"),
        cue(2010, 4000, "say it again", origin="automatic"),
        cue(4010, 6000, "no", origin="automatic"),
        cue(20000, 21000, "no", origin="automatic"),  # long after: said once more
    ]


def test_a_line_that_is_said_twice_stays_twice():
    lines = ["No.", "No.", "Never!", "Why?", "No."]
    text = "WEBVTT\n\n" + "".join(
        f"00:0{i}.000 --> 00:0{i + 1}.000\n{line}\n\n" for i, line in enumerate(lines)
    )
    assert [cue["text"] for cue in parse_subtitles(text, "en")] == lines


def test_names_notes_and_entities_of_webvtt_are_not_spoken():
    text = "WEBVTT\r\n\r\nNOTE not said\r\n\r\nintro\r\n00:01.000 --> 00:02.000\r\nA &amp; <v Ann>B\r\n"
    text += "\r\noutro\r\n01:00:00.000 --> 01:00:01.500 line:0\r\nC\r\nD\r\n"
    assert parse_subtitles(text, "en", "manual") == [
        cue(1000, 2000, "A & B"),
        cue(3_600_000, 3_601_500, "C D"),
    ]


def test_text_in_no_subtitle_format_is_refused():
    with pytest.raises(ValueError, match=r".+"):
        parse_subtitles("just words", "en")


def test_subtitles_that_cannot_be_read_cost_nothing(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    (tmp_path / "a.en.srt").write_bytes(b"\xff\xfe\x00 not subtitles")
    (tmp_path / "a.fr.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.000\nBonjour\n")
    cues = sidecars(str(tmp_path / "a.mp4"))
    assert cues is not None
    assert [cue["text"] for cue in cues] == ["Bonjour"]


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("a.de.srt", "de"), ("a.srt", "und"), ("a.pt-BR.vtt", "pt-BR"), ("ab.de.srt", None),
        ("a.de.txt", None), ("a.final cut.srt", None),
    ],
)  # fmt: skip
def test_sidecar_names(name, language):
    assert subtitle_language("a", name) == language


F = ({"ext": "vtt", "url": "x"},)


@pytest.mark.parametrize(
    ("wanted", "spoken", "manual", "automatic", "tracks"),
    [
        # What people wrote, in the spoken language and in those asked for; nothing heard is needed.
        (("original", "en"), "de", "en de fr", "de-orig en", ["manual de", "manual en"]),
        # Nobody wrote the spoken language: it is heard; another language heard is a translation.
        (("original", "en"), "de", "en", "de-orig de en", ["manual en", "automatic de"]),
        (("original", "en"), None, "", "en fr-orig", ["automatic fr"]),
        (("en",), "de", "", "en de", ["automatic de"]),
        (("original", "en"), "de", "", "", []),
        # Tags of the same language serve; the very tag goes first.
        (("en",), "en", "en-GB en-US", "", ["manual en-GB"]),
        (("en-US",), "en", "en-GB en-US", "", ["manual en-US"]),
        # Nothing says what is spoken.
        (("original", "en"), None, "ja", "", ["manual ja"]),
        (("original", "en"), None, "ja fr en", "", ["manual en"]),
        (("original", "en"), None, "", "en", ["automatic en"]),
        (("all",), "de", "de en live_chat", "fr", ["manual de", "manual en"]),
    ],
)
def test_which_subtitles_are_fetched(wanted, spoken, manual, automatic, tracks):
    chosen = choose_subtitles(
        wanted, spoken, dict.fromkeys(manual.split(), F), dict.fromkeys(automatic.split(), F)
    )
    assert [f"{track.origin} {track.language}" for track in chosen] == tracks


def test_the_spoken_language_is_the_sources_own_else_the_one_heard():
    assert original_language(["en", "de"]) == "de"
    assert original_language(["en", "de"], spoken="en") == "en"
    assert original_language(["en", "de"], spoken="fr") == "de"
    assert original_language(["fr", "de", "en"], heard=["de"]) == "de"
    assert best_origin([cue(0, 1, "x", origin="automatic"), cue(0, 1, "y")], "en") == "manual"


def transcript(language, *cues):
    stage = TranscribeStage(TranscribeStage.Config(model=None))
    stage.setup()
    row = {
        "video": None, "has_audio": True, "start_ms": 0, "end_ms": 5000, "_subtitles": cues,
        "_video": {"language": language},
    }  # fmt: skip
    (outcome,) = stage.process([row])
    columns = outcome.rows[0]  # type: ignore[union-attr]
    (author,) = {(entry["model"], entry["revision"]) for entry in columns["provenance"]}
    return columns["transcript"], *author


def test_a_transcript_names_whose_subtitles_it_is_from():
    written, heard = cue(0, 900, "written"), cue(0, 900, "herd", origin="automatic")
    foreign = cue(0, 900, "geschrieben", "de")
    assert transcript("en", heard, written) == ("written", "subtitles/manual", "en")
    assert transcript("en", heard) == ("herd", "subtitles/automatic", "en")
    assert transcript(None, heard, foreign) == ("herd", "subtitles/automatic", "en")
    assert transcript(None, written, foreign) == ("geschrieben", "subtitles/manual", "de")
    assert transcript("en-GB", written, foreign) == ("written", "subtitles/manual", "en")
