# SPDX-License-Identifier: Apache-2.0
"""What nobody said is left out; what somebody may have said stays."""

import pytest

from dataengine.models.hallucination import (
    BOILERPLATE,
    COMPRESSION,
    NO_SPEECH,
    REPETITION,
    SPEECH_RATE,
    GuardsConfig,
    Utterance,
    chars_per_s,
    compression_ratio,
    has_loop,
    is_credit,
    is_farewell,
    judge,
    note,
    repeated,
)

TALK = "We are going down to the harbour this morning to see the boats."


def judged(text=TALK, start_ms=0, end_ms=4000, **measured):
    measured.setdefault("window_text", text)
    guards = measured.pop("guards", GuardsConfig())
    (reason,) = judge([Utterance(start_ms, end_ms, text, **measured)], guards)
    return reason


def test_plain_talk_stays():
    assert judged() is None
    assert judged("No, no, no, no. Come here!") is None
    assert judged("Ha ha ha ha ha!") is None
    assert judged("我们今天早上去港口看船。") is None


@pytest.mark.parametrize(
    ("no_speech_prob", "avg_logprob", "reason"),
    [(0.7, -1.2, NO_SPEECH), (0.5, -1.2, None), (0.7, -0.9, None), (0.6, -1.2, None)],
)
def test_silence_is_believed_where_words_are_unlikely_too(no_speech_prob, avg_logprob, reason):
    assert judged(no_speech_prob=no_speech_prob, avg_logprob=avg_logprob) == reason


def test_a_window_that_compresses_too_well_is_left_out_whole():
    window = " ".join([TALK] * 8)
    assert compression_ratio(window) > 2.4 > compression_ratio(TALK)
    assert judged(window_text=window) == COMPRESSION
    assert judged(window_text=window, guards=GuardsConfig(max_compression=None)) is None
    assert compression_ratio("") == 0


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("you " * 8, False),
        ("you " * 9, True),
        ("Good dog. " * 4, False),
        ("Good dog. " * 5, True),
        ("I say: I am going, I am going; I am going! I am going? I am going.", True),
        ("one two three four five six seven eight nine ten one two three four", False),
        ("我们走吧" * 4, False),
        ("我们走吧" * 5, True),
        ("", False),
    ],
)
def test_phrases_that_follow_themselves_are_counted(text, loops):
    assert has_loop(text, max_repeats=4) == loops
    if loops:
        assert judged(text, window_text="") == REPETITION


def test_of_a_loop_of_segments_the_first_stays():
    texts = ["Hello.", "Thank you.", "Thank you!", "thank you", "Thank you.", "Thank you.", "Bye."]
    assert repeated(texts, 4) == [False, False, True, True, True, True, False]
    assert repeated(texts, 5) == [False] * 7
    assert repeated(texts, None) == [False] * 7
    assert repeated(["...", "!", "?"], 2) == [False] * 3
    assert repeated([], 4) == []
    utterances = [Utterance(1000 * i, 1000 * i + 900, text) for i, text in enumerate(texts)]
    reasons = judge(utterances, GuardsConfig())
    assert reasons == [None, None, *[REPETITION] * 4, None]


@pytest.mark.parametrize(
    "text",
    [
        "Subtitles by the Amara.org community",
        "Captioned by Jane Doe",
        "Untertitel im Auftrag des ZDF, 2017",
        "Untertitel der Amara.org-Community",
        "Sous-titres réalisés para la communauté d'Amara.org",
        "Sous-titrage Société Radio-Canada",
        "Subtítulos realizados por la comunidad de Amara.org",
        "Sottotitoli creati dalla comunità Amara.org",
        "Legendas pela comunidade Amara.org",
        "Napisy stworzone przez społeczność Amara.org",
        "Субтитры сделал DimaTorzok",
        "Altyaz\u0131 M.K.",
        "字幕由Amara.org社区提供",
    ],
)
def test_credits_are_never_spoken(text):
    assert is_credit(text)
    assert judged(text) == BOILERPLATE
    assert judged(text, guards=GuardsConfig(boilerplate=False)) is None


@pytest.mark.parametrize(
    "text",
    [
        "The subtitles by that studio are good.",
        TALK,
        "Translated by hand, these books are what the monks of the island gave away, and the kings of "
        "the north kept them for more than three hundred years.",
    ],
)
def test_talk_about_subtitles_is_no_credit(text):
    assert not is_credit(text)


@pytest.mark.parametrize(
    "text",
    [
        "Thanks for watching!",
        "Thank you so much for watching. See you next time!",
        "Please like and subscribe!",
        "Vielen Dank fürs Zuschauen.",
        "Merci d\u2019avoir regardé cette vidéo !",
        "¡Gracias por ver el video!",
        "Спасибо за просмотр!",
        "İzlediğiniz için teşekkür ederim.",
        "ご視聴ありがとうございました",
        "시청해주셔서 감사합니다.",
        "谢谢大家观看",
    ],
)
def test_farewells_are_believed_unless_the_window_sounds_silent(text):
    assert is_farewell(text)
    assert judged(text) is None
    assert judged(text, no_speech_prob=0.7, avg_logprob=-0.2) == BOILERPLATE


def test_talk_with_a_farewell_in_it_is_no_farewell():
    assert not is_farewell(f"{TALK} Thanks for watching.")
    assert judged(f"{TALK} Thanks for watching.", no_speech_prob=0.7, avg_logprob=-0.2) is None


def test_speech_has_a_speed():
    assert chars_per_s("Good dog!", 1000) == 7
    assert chars_per_s("你好", 1000) == 6  # each counts as three
    assert chars_per_s("word", 0) == float("inf")
    assert judged(end_ms=1000) == SPEECH_RATE  # 49 letters
    assert judged(end_ms=2000) is None
    assert judged("you", end_ms=10_000) == SPEECH_RATE
    assert judged("you", end_ms=2_000) is None
    assert judged("...", end_ms=500) == SPEECH_RATE  # says nothing
    off = GuardsConfig(max_chars_per_s=None, min_chars_per_s=None)
    assert judged(end_ms=1000, guards=off) is None


def test_reasons_are_noted_once_and_in_order():
    assert note([None, REPETITION, BOILERPLATE, REPETITION]) == "guard:boilerplate,repetition"
    assert note([None, None]) is None
    assert note([]) is None
