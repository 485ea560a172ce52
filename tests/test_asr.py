# SPDX-License-Identifier: Apache-2.0
import io
import shutil
import subprocess
import sys
import wave
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from dataengine.corpus import Corpus
from dataengine.errors import DependencyError
from dataengine.models.answers import Failure
from dataengine.models.asr import (
    SAMPLE_RATE,
    FasterWhisperConfig,
    PocketsphinxConfig,
    PocketsphinxTranscriber,
    Segment,
    Transcript,
    WhisperConfig,
    build_transcriber,
    group_words,
    spoken_word,
)
from dataengine.models.faster_whisper import FasterWhisperTranscriber
from dataengine.models.hallucination import GuardsConfig
from dataengine.models.speech_pieces import (
    SAMPLES_PER_MS,
    PiecesConfig,
    Window,
    pack,
    speech_windows_of,
    split_long,
    voiced_spans,
)
from dataengine.models.whisper import decoding_task, halved, joint_languages, read_tokens
from dataengine.needs import Package, Weights
from dataengine.stage import Kept
from dataengine.stages.transcribe import TranscribeStage
from tests.helpers import clip_row, clips_table, ledger_row

SENTENCE = "the quick brown fox jumps over the lazy dog"


def speak(text):
    """Speech from flite in a system ffmpeg, float32 mono; skips where there is none."""
    ffmpeg = shutil.which("ffmpeg") or pytest.skip("no ffmpeg")
    command = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", f"flite=text='{text}':voice=rms"]
    command += ["-ar", str(SAMPLE_RATE), "-ac", "1", "-f", "f32le", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("ffmpeg without flite")
    return np.frombuffer(done.stdout, "<f4")


def test_words_are_grouped_by_pauses():
    words = [Segment(0, 200, "good"), Segment(300, 500, "morning"), Segment(1000, 1400, "all")]
    assert group_words(words, 500) == [Segment(0, 500, "good morning"), Segment(1000, 1400, "all")]
    assert group_words(words, 501) == [Segment(0, 1400, "good morning all")]
    assert group_words([], 500) == []


def test_fillers_are_no_words():
    tokens = ["<s>", "the(2)", "<sil>", "[NOISE]", "++BREATH++", "dog"]
    assert [spoken_word(token) for token in tokens] == [None, "the", None, None, None, "dog"]


def test_pocketsphinx_writes_down_a_sentence():
    waveform = speak(SENTENCE)
    transcriber = build_transcriber(PocketsphinxConfig())
    (first,) = transcriber.transcribe([waveform])
    assert isinstance(first, Transcript)
    heard = " ".join(segment.text for segment in first.segments).split()
    assert len(set(heard) & set(SENTENCE.split())) >= 6  # of 8 different words
    length_ms = len(waveform) / SAMPLE_RATE * 1000
    assert 0 <= first.segments[0].start_ms < first.segments[-1].end_ms <= length_ms + 20
    # What it heard before must not change what it hears next.
    transcriber.transcribe([0.1 * waveform[::-1].copy()])
    assert transcriber.transcribe([waveform]) == [first]


def test_pocketsphinx_hears_the_same_after_any_other_sound():
    """The mean of the features shows it sooner than the words."""
    rng = np.random.default_rng(0)
    sounds = [rng.normal(0, level, SAMPLE_RATE).astype(np.float32) for level in (0.05, 0.2)]
    transcriber = PocketsphinxTranscriber(PocketsphinxConfig())
    features = []
    for sound in (sounds[0], sounds[1], sounds[0]):
        transcriber.transcribe([sound])
        features.append(transcriber._decoder.get_cmn())
    assert features[0] == features[2] != features[1]


# ------------------------------------------------------------------------- windows of speech


def voice(*frames):
    """Frames of 30 ms: 20 of no voice, 10 of voice and so on, in turns."""
    return np.repeat(np.arange(len(frames)) % 2 == 1, frames)


def test_speech_keeps_its_surroundings_and_short_silences():
    spans = voiced_spans(voice(20, 10, 10, 10, 100, 10, 5), 5_000, pad_ms=300, max_gap_ms=2000)
    # 600-900 and 1200-1500 stay together; 3 s later comes 4500-4800, at the end of the sound.
    assert spans == [(300, 1800), (4200, 5_000)]
    assert voiced_spans(voice(5, 10), 450, pad_ms=300, max_gap_ms=0) == [(0, 450)]


def test_a_click_is_no_speech():
    assert voiced_spans(voice(100, 2, 100), 6_060, pad_ms=300, max_gap_ms=500) == []
    assert voiced_spans(voice(100, 3, 100), 6_090, pad_ms=300, max_gap_ms=500) != []
    assert voiced_spans(np.zeros(0, bool), 20, pad_ms=300, max_gap_ms=500) == []


def test_padded_parts_never_overlap():
    rng = np.random.default_rng(0)
    for _ in range(50):
        heard = rng.random(400) < 0.1
        spans = voiced_spans(heard, 12_000, pad_ms=300, max_gap_ms=100)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
        assert all(0 <= start < end <= 12_000 for start, end in spans)


def test_long_speech_is_cut_in_its_pause():
    waveform = np.random.default_rng(0).normal(0, 0.1, 70 * SAMPLE_RATE).astype(np.float32)
    for pause_s in (21.0, 44.0):
        start = round(pause_s * SAMPLE_RATE)
        waveform[start : start + SAMPLE_RATE // 5] = 0
    parts = split_long((0, 70_000), waveform)
    assert [start for start, _ in parts[1:]] == [end for _, end in parts[:-1]]
    assert 21_000 <= parts[0][1] <= 21_200
    assert 44_000 <= parts[1][1] <= 44_200
    assert all(end - start <= 30_000 for start, end in parts)


def test_windows_are_filled_in_order_and_map_back():
    windows = pack(3, [(1000, 11_000), (20_000, 35_000), (40_000, 50_000)])
    assert [window.parts for window in windows] == [
        ((1000, 11_000), (20_000, 35_000)),
        ((40_000, 50_000),),
    ]
    first = windows[0]
    assert (first.clip, first.duration_ms) == (3, 25_000)
    assert [first.to_clip(ms) for ms in (0, 9_999, 10_000, 25_000, 29_000)] == [
        1000, 10_999, 20_000, 35_000, 35_000,
    ]  # fmt: skip
    assert first.to_clip(10_000, is_end=True) == 11_000
    assert first.rest(4_000).parts == ((5000, 11_000), (20_000, 35_000))
    assert first.rest(10_000).parts == ((20_000, 35_000),)
    waveform = np.arange(60 * SAMPLE_RATE, dtype=np.float32)
    cut = first.cut(waveform)
    assert (len(cut), cut[0], cut[10 * SAMPLE_RATE]) == (
        25 * SAMPLE_RATE, SAMPLE_RATE, 20 * SAMPLE_RATE,
    )  # fmt: skip


def test_real_speech_is_found_and_silence_is_left_out():
    spoken = speak(SENTENCE)
    silence = np.zeros(4 * SAMPLE_RATE, np.float32)
    waveform = np.concatenate([silence, spoken, silence, spoken])
    (window,) = speech_windows_of(0, waveform, PiecesConfig())
    length_ms = len(spoken) // SAMPLES_PER_MS
    (start, end), (second_start, _) = window.parts
    assert 3_500 <= start <= 4_400
    assert 4_000 + length_ms - 400 <= end <= 4_000 + length_ms + 700
    assert abs(second_start - (start + 4_000 + length_ms)) <= 100
    assert speech_windows_of(0, silence, PiecesConfig()) == []
    # What was heard before changes nothing.
    assert speech_windows_of(0, waveform, PiecesConfig()) == [window]
    (everything,) = speech_windows_of(0, waveform[: 20 * SAMPLE_RATE], None)
    assert everything.parts[0][0] == 0


# ------------------------------------------------------------------------------------- whisper

EOT, T0 = 50257, 50364
"""Whisper's end of text and its first timestamp."""


def stamp(seconds):
    return T0 + round(seconds * 50)


@pytest.mark.parametrize(
    ("tokens", "said", "rest_ms"),
    [
        ([], [], None),
        ([stamp(0)], [], None),
        ([stamp(0), 7, 8, stamp(2), stamp(2.5), 9, stamp(4)], [(0, 2000, (7, 8)), (2500, 4000, (9,))], None),
        # One opened and left empty: there is more.
        ([stamp(0), 7, stamp(2), stamp(2)], [(0, 2000, (7,))], 2000),
        # Not closed, after something that was: read on from there.
        ([stamp(0), 7, stamp(2), stamp(2), 8, 9], [(0, 2000, (7,))], 2000),
        # Not closed from the start: reading on would not lead on.
        ([stamp(0), 7, 8], [(0, 10_000, (7, 8))], None),
        ([7, 8], [(0, 10_000, (7, 8))], None),
        ([stamp(0), 7, stamp(9.5), stamp(9.5), 8], [(0, 9500, (7,)), (9500, 10_000, (8,))], None),
        ([stamp(0), 7, stamp(9.5), stamp(9.5)], [(0, 9500, (7,))], None),
        # Beyond the window there is nothing.
        ([stamp(1), 7, stamp(29)], [(1000, 10_000, (7,))], None),
    ],
)  # fmt: skip
def test_timestamp_tokens_are_read(tokens, said, rest_ms):
    pieces, rest = read_tokens(tokens, EOT, T0, 10_000)
    assert [(piece.start_ms, piece.end_ms, piece.tokens) for piece in pieces] == said
    assert rest == rest_ms


def test_a_sound_has_one_language():
    windows = [Window(0, ((0, 5000),)), Window(0, ((9000, 29_000),)), Window(1, ((0, 1000),))]
    probabilities = [{"de": 0.9, "nl": 0.1}, {"de": 0.3, "nl": 0.7}, {"de": 0.2, "en": 0.8}]
    told = joint_languages(list(zip(windows, probabilities, strict=True)))
    assert told == {0: "nl", 1: "en"}


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory):
    """A random one-layer model in openai-whisper's own checkpoint format."""
    import torch
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    dims = ModelDimensions(80, 1500, 32, 2, 1, 51865, 448, 32, 2, 1)
    path = tmp_path_factory.mktemp("whisper") / "tiny.pt"
    model = Whisper(dims)
    for parameter in model.parameters():  # one of them is not even initialised
        torch.nn.init.normal_(parameter, std=0.2)
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, path)
    return path


BELIEVE = GuardsConfig(
    no_speech=None, max_compression=None, max_repeats=None, max_chars_per_s=None,
    min_chars_per_s=None, boilerplate=False,
)  # fmt: skip
"""What a random model writes is nothing but repetition."""


def noises(*seconds):
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, (round(s * SAMPLE_RATE),)).astype(np.float32) for s in seconds]


@pytest.mark.parametrize("language", [None, "de"])
def test_whisper_checkpoint_writes_batches_as_one_by_one(tiny_whisper, language):
    config = WhisperConfig(
        model=str(tiny_whisper), language=language, max_tokens=6, pieces=None, guards=BELIEVE,
        batch_size=3,
    )  # fmt: skip
    transcriber = build_transcriber(config)
    waveforms = noises(2.0, 0.5, 35.0, 1.0)
    together = transcriber.transcribe(waveforms)
    alone = [answer for waveform in waveforms for answer in transcriber.transcribe([waveform])]
    assert together == alone
    assert transcriber.transcribe([]) == []
    for waveform, answer in zip(waveforms, together, strict=True):
        assert isinstance(answer, Transcript)
        assert answer.segments
        for segment in answer.segments:
            assert 0 <= segment.start_ms <= segment.end_ms <= len(waveform) / 16
    assert transcriber.model == "whisper:tiny.pt"
    assert len(transcriber.revision) == 16


class Script:
    """In whisper's place: says which tokens it writes, and remembers what it was shown."""

    def __init__(self, transcriber, *answers, language="en"):
        self.tokenizer, self.language = transcriber._tokenizer, language
        self.answers, self.shown = list(answers), []

    def encode(self, sounds):
        self.shown += [round(len(sound) / SAMPLE_RATE, 2) for sound in sounds]
        return [(None, {self.language: 1.0})] * len(sounds)

    def decode_batch(self, items, temperature):
        return [self.result(*self.answers.pop(0)) for _ in items]

    def result(self, *entries, no_speech_prob=0.0, avg_logprob=-0.3):
        """Entries: seconds are timestamps, texts are spoken; measurements as a dict."""
        tokens = []
        for entry in entries:
            if isinstance(entry, dict):
                no_speech_prob = entry.get("no_speech_prob", no_speech_prob)
                avg_logprob = entry.get("avg_logprob", avg_logprob)
            elif isinstance(entry, str):
                tokens += self.tokenizer.encode(entry)
            else:
                tokens.append(stamp(entry))
        text = self.tokenizer.decode([token for token in tokens if token < EOT])
        return SimpleNamespace(
            tokens=tokens, text=text, no_speech_prob=no_speech_prob, avg_logprob=avg_logprob
        )


@pytest.fixture
def scripted(tiny_whisper, monkeypatch):
    def make(*answers, **config):
        settings = {"model": str(tiny_whisper), "pieces": None, "language": "en"} | config
        transcriber = build_transcriber(WhisperConfig(**settings))
        script = Script(transcriber, *answers)
        monkeypatch.setattr(transcriber, "_encode", script.encode)
        monkeypatch.setattr(transcriber, "_decode_batch", script.decode_batch)
        return transcriber, script

    return make


def texts_of(answer):
    assert isinstance(answer, Transcript)
    return [(s.start_ms, s.end_ms, s.text) for s in answer.segments]


def test_times_in_windows_become_times_in_the_clip(scripted):
    """Two sentences with a silence between them that whisper never hears."""
    spoken, silence = speak(SENTENCE), np.zeros(5 * SAMPLE_RATE, np.float32)
    waveform = np.concatenate([silence, spoken, silence, spoken, silence])
    (window,) = speech_windows_of(0, waveform, PiecesConfig())
    (first_start, first_end), (second_start, second_end) = window.parts
    seam_s = (first_end - first_start) / 1000
    transcriber, script = scripted(
        [0.0, " The quick brown fox", seam_s, seam_s, " jumps over", window.duration_ms / 1000],
        pieces=PiecesConfig(),
    )
    (answer,) = transcriber.transcribe([waveform])
    assert len(script.shown) == 1
    assert script.shown[0] < 2 * len(spoken) / SAMPLE_RATE + 1.3  # 20 s became two sentences
    (a, b, first), (c, d, second) = texts_of(answer)
    assert (first, second) == ("The quick brown fox", "jumps over")
    for told, true in ((a, first_start), (b, first_end), (c, second_start), (d, second_end)):
        assert abs(told - true) <= 20  # a tick of whisper's clock


def test_what_whisper_leaves_is_read_on(scripted):
    transcriber, script = scripted(
        [0.0, " One", 4.0, 4.0, " tw"],  # out of tokens in the second
        [0.0, " Else"],
        [0.0, " two", 5.0],
    )
    first, second = transcriber.transcribe(noises(10.0, 2.0))
    assert script.shown == [10.0, 2.0, 6.0]
    assert texts_of(first) == [(0, 4000, "One"), (4000, 9000, "two")]
    assert texts_of(second) == [(0, 2000, "Else")]


def test_guards_leave_out_what_nobody_said_and_say_so(scripted):
    silent = {"no_speech_prob": 0.9, "avg_logprob": -0.4}
    transcriber, _ = scripted(
        [0.0, " Good morning to all", 2.0, 2.0, " Subtitles by the Amara.org community", 4.0],
        [0.0, " Thanks for watching!", 3.0, silent],
        [0.0, " Thanks for watching!", 3.0],
        [0.0, " mumble mumble", 3.0, {"no_speech_prob": 0.9, "avg_logprob": -1.4}],
    )
    answers = transcriber.transcribe(noises(5, 4, 4, 4))
    assert [[text for *_, text in texts_of(answer)] for answer in answers] == [
        ["Good morning to all"], [], ["Thanks for watching!"], [],
    ]  # fmt: skip
    assert [answer.note for answer in answers] == [
        "guard:boilerplate", "guard:boilerplate", None, "guard:no_speech",
    ]  # fmt: skip


def test_poor_windows_are_decoded_again_at_the_next_temperature(scripted):
    loop = [0.0, " Hello there my friend" * 20, 9.0]
    transcriber, script = scripted(
        loop, [0.0, " Fine words", 3.0], [0.0, " Hello there", 4.0], temperatures=(0.0, 0.4)
    )
    first, second = transcriber.transcribe(noises(10, 10))
    assert [text for *_, text in texts_of(first)] == ["Hello there"]
    assert [text for *_, text in texts_of(second)] == ["Fine words"]
    assert script.answers == []
    greedy, script = scripted(loop)
    (answer,) = greedy.transcribe(noises(10))
    assert (texts_of(answer), answer.note) == ([], "guard:compression")


def test_one_window_too_many_for_the_memory_costs_its_sound_alone(scripted, monkeypatch):
    import torch

    transcriber, script = scripted([0.0, " One", 2.0], [0.0, " Three", 2.0], batch_size=4)

    def decode(items, temperature):
        if len(items) > 1 or script.answers == [] or script.shown.pop(0) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return script.decode_batch(items, temperature)

    monkeypatch.setattr(transcriber, "_decode_batch", decode)
    script.shown = []
    first, second, third = transcriber.transcribe(noises(2, 4, 2))
    assert [text for *_, text in texts_of(first)] == ["One"]
    assert second == Failure("out_of_memory", "CUDA out of memory.")
    assert [text for *_, text in texts_of(third)] == ["Three"]


def test_languages_of_a_batch_reach_the_decoder(tiny_whisper):
    """whisper's own task takes one language for all."""
    import torch
    import whisper
    from whisper.decoding import DecodingOptions

    model = whisper.load_model(str(tiny_whisper), device="cpu")
    task = decoding_task(
        model, DecodingOptions(language="en", fp16=False, sample_len=1), ["de", "fr"]
    )
    tokens = torch.tensor([task.initial_tokens] * 2)
    languages, _ = task._detect_language(torch.zeros(2, 1500, 32), tokens)
    tokenizer = task.tokenizer
    assert languages == ["de", "fr"]
    assert tokens[:, 1].tolist() == [tokenizer.to_language_token(code) for code in ("de", "fr")]
    results = task.run(torch.zeros(2, 1500, 32))
    assert [result.language for result in results] == ["de", "fr"]


def test_halved_weights_write_the_same(tiny_whisper):
    """On a GPU weights are kept in float16; the CPU can do it too, slowly."""
    import torch
    import whisper
    from whisper.decoding import DecodingOptions, DecodingTask

    model = whisper.load_model(str(tiny_whisper), device="cpu")
    mel = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (1, 80, 3000))).half()
    options = DecodingOptions(language="en", fp16=True, sample_len=4)
    (kept,) = DecodingTask(model, options).run(mel)
    (converted,) = DecodingTask(halved(model), options).run(mel)
    assert model.decoder.token_embedding.weight.dtype == torch.float16
    assert model.decoder.ln.weight.dtype == torch.float32
    assert converted.tokens == kept.tokens
    assert converted.avg_logprob == pytest.approx(kept.avg_logprob, abs=1e-3)


def test_segments_begin_and_end_with_their_words(tiny_whisper, monkeypatch):
    from whisper import timing

    for name in ("dtw_cpu", "backtrace"):  # as Python: compiling them takes longer than the test
        monkeypatch.setattr(timing, name, getattr(timing, name).py_func)
    config = WhisperConfig(
        model=str(tiny_whisper),
        language="en",
        max_tokens=5,
        pieces=None,
        guards=BELIEVE,
        words=True,
    )
    (timed,) = build_transcriber(config).transcribe(noises(3.0))
    (plain,) = build_transcriber(config.model_copy(update={"words": False})).transcribe(noises(3.0))
    assert [text for *_, text in texts_of(timed)] == [text for *_, text in texts_of(plain)]
    assert texts_of(timed) != texts_of(plain)
    assert all(0 <= start < end <= 3000 for start, end, _ in texts_of(timed))


def wav(waveform):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def test_whisper_fills_columns_of_a_shard(tiny_whisper, tmp_path):
    """Clips with speech, with noise, and without sound; times on the source's clock."""
    config = WhisperConfig(model=str(tiny_whisper), max_tokens=6, guards=BELIEVE)
    stage = TranscribeStage(TranscribeStage.Config(model=config))
    stage.setup()
    rows = [
        clip_row("v", start, start + 4000, has_audio=sound is not None)
        | {"video": {"bytes": b"x" if sound is None else wav(sound), "path": None}}
        for start, sound in zip((0, 5000, 9000), (speak(SENTENCE), None, noises(4)[0]), strict=True)
    ]
    rows += [rows[0] | clip_row("v", 20_000, 24_000, video=rows[0]["video"])]
    for row, outcome in zip(rows, stage.process(rows), strict=True):
        assert isinstance(outcome, Kept)
        row |= dict(outcome.rows[0])
    corpus = Corpus.create(str(tmp_path / "corpus"))
    corpus.take_over("r-1")
    corpus.commit(clips_table(rows), [ledger_row("v", rows)], run_id="r-1", fingerprint="f")
    (shard,) = (tmp_path / "corpus" / "shards").glob("*.parquet")
    columns = ["transcript", "transcript_segments", "provenance"]
    first, silent, noise, later = pq.read_table(shard, columns=columns).to_pylist()
    assert (silent["transcript"], noise["transcript"]) == (None, None)
    assert first["transcript"] == later["transcript"]
    assert first["transcript"]
    for row, start_ms in ((first, 0), (later, 20_000)):
        assert {entry["model"] for entry in row["provenance"]} == {"whisper:tiny.pt"}
        for segment in row["transcript_segments"]:
            assert start_ms <= segment["start_ms"] <= segment["end_ms"] <= start_ms + 4000


def test_whisper_that_is_not_there_is_an_error_that_names_it(tmp_path):
    missing = str(tmp_path / "none.pt")
    with pytest.raises(DependencyError, match=r"none\.pt"):
        build_transcriber(WhisperConfig(model=missing))


def test_a_language_that_whisper_does_not_know_is_an_error(tiny_whisper):
    with pytest.raises(DependencyError, match="'klingon'"):
        build_transcriber(WhisperConfig(model=str(tiny_whisper), language="klingon"))


def test_damaged_whisper_is_an_error(tmp_path, tiny_whisper):
    import torch

    checkpoint = torch.load(tiny_whisper, weights_only=True)
    del checkpoint["model_state_dict"]["decoder.ln.weight"]
    damaged = tmp_path / "damaged.pt"
    torch.save(checkpoint, damaged)
    with pytest.raises(DependencyError, match=r"decoder\.ln\.weight"):
        build_transcriber(WhisperConfig(model=str(damaged)))


# ------------------------------------------------------------------------------ faster-whisper


@pytest.fixture(scope="module")
def tiny_ct2(tmp_path_factory):
    """A random Whisper of transformers, converted to CTranslate2's format, which takes it for English."""
    converters = pytest.importorskip("ctranslate2.converters")
    pytest.importorskip("faster_whisper")
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )
    from transformers import WhisperConfig as HfConfig
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from whisper.tokenizer import LANGUAGES

    vocab = {char: byte for byte, char in bytes_to_unicode().items()}
    vocab |= {f"filler{index}": index for index in range(256, EOT)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    languages = [f"<|{code}|>" for code in list(LANGUAGES)[:99]]
    specials = ["<|endoftext|>", "<|startoftranscript|>", *languages, "<|translate|>"]
    specials += ["<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    specials += ["<|notimestamps|>", *(f"<|{tick * 0.02:.2f}|>" for tick in range(1501))]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    assert tokenizer.token_to_id("<|0.00|>") == T0
    torch.manual_seed(0)
    config = HfConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, pad_token_id=EOT, bos_token_id=EOT, eos_token_id=EOT,
        decoder_start_token_id=EOT + 1, init_std=0.3,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(suppress_tokens=[], begin_suppress_tokens=[220, EOT])
    folder = tmp_path_factory.mktemp("ct2")
    model.save_pretrained(folder / "hf")
    special = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special, eos_token=special, bos_token=special
    ).save_pretrained(folder / "hf")
    WhisperFeatureExtractor().save_pretrained(folder / "hf")
    copied = ["tokenizer.json", "preprocessor_config.json"]
    converter = converters.TransformersConverter(str(folder / "hf"), copy_files=copied)
    return converter.convert(str(folder / "model"))


@pytest.mark.parametrize("language", [None, "en"])
def test_faster_whisper_writes_batches_as_one_by_one(tiny_ct2, language):
    config = FasterWhisperConfig(
        model=tiny_ct2, language=language, max_tokens=12, pieces=None, guards=BELIEVE, batch_size=2,
        device="cpu", compute_type="float32",
    )  # fmt: skip
    transcriber = build_transcriber(config)
    waveforms = noises(2.0, 0.5, 35.0)
    together = transcriber.transcribe(waveforms)
    assert together == [transcriber.transcribe([waveform])[0] for waveform in waveforms]
    for waveform, answer in zip(waveforms, together, strict=True):
        assert isinstance(answer, Transcript)
        assert answer.segments
        for segment in answer.segments:
            assert 0 <= segment.start_ms <= segment.end_ms <= len(waveform) / 16
    assert transcriber.transcribe([np.zeros(0, np.float32)]) == [Transcript()]
    assert transcriber.model == "faster-whisper:model"
    assert len(transcriber.revision) == 16


def test_segments_of_faster_whisper_go_to_their_own_windows(tiny_ct2, monkeypatch):
    transcriber = build_transcriber(FasterWhisperConfig(model=tiny_ct2, pieces=None, device="cpu"))
    assert isinstance(transcriber, FasterWhisperTranscriber)
    transcriber._multilingual = True
    asked = {}

    def transcribe(sound, **options):
        asked.update(options, seconds=len(sound) / SAMPLE_RATE)
        rows = [
            (0, 0.5, 1.5, " One", 0.1),
            (3000, 30.2, 31.0, " Two", 0.9),
            (3000, 31.0, 45.0, " more", 0.9),
        ]
        entries = [
            SimpleNamespace(
                seek=seek, start=start, end=end, text=text, no_speech_prob=silent, avg_logprob=-0.5
            )
            for seek, start, end, text, silent in rows
        ]
        return iter(entries), None

    monkeypatch.setattr(transcriber._pipeline, "transcribe", transcribe)
    first, second = transcriber.transcribe(noises(2.0, 3.0))
    assert texts_of(first) == [(500, 1500, "One")]
    assert texts_of(second) == [(200, 1000, "Two"), (1000, 3000, "more")]
    assert asked["clip_timestamps"] == [{"start": 0.0, "end": 2.0}, {"start": 30.0, "end": 33.0}]
    assert (asked["vad_filter"], asked["multilingual"], asked["seconds"]) == (False, True, 60.0)


def test_a_language_that_an_english_model_does_not_know_is_an_error(tiny_ct2):
    with pytest.raises(DependencyError, match="'de'"):
        build_transcriber(FasterWhisperConfig(model=tiny_ct2, language="de", device="cpu"))


def test_faster_whisper_that_is_not_there_is_an_error_that_names_it(tmp_path, monkeypatch):
    pytest.importorskip("faster_whisper")
    (tmp_path / "model.bin").write_bytes(b"no model")
    with pytest.raises(DependencyError, match=str(tmp_path.name)):
        build_transcriber(FasterWhisperConfig(model=str(tmp_path), device="cpu"))
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(DependencyError) as raised:
        build_transcriber(FasterWhisperConfig(model="large-v2"))
    assert "--extra faster-whisper" in raised.value.hint


def test_what_recognisers_need_is_known_before_the_run():
    needs = WhisperConfig(model="large-v2").needs()
    assert Weights("whisper", "large-v2") in needs
    assert [need.module for need in needs if isinstance(need, Package)] == [
        "whisper",
        "pocketsphinx",
    ]
    package, weights = FasterWhisperConfig(model="large-v2", pieces=None).needs()
    assert isinstance(package, Package)
    assert "faster-whisper" in package.install
    assert weights == Weights("hub", "Systran/faster-whisper-large-v2")
