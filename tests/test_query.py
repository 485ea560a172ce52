# SPDX-License-Identifier: Apache-2.0
import csv
import io
import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dataengine.cli import app
from dataengine.corpus import Corpus
from dataengine.errors import ConfigError, EngineError
from dataengine.query.sql import connect, run, select_statement
from tests.helpers import clip_row, clips_table, ledger_row


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    corpus = Corpus.create(str(tmp_path_factory.mktemp("q") / "it's a corpus"))
    corpus.take_over("r-1")
    for video in range(3):
        rows = [
            clip_row(
                f"v{video}", 1000 * i, 1000 * i + 500 * (i + 1), clip_score=video / 10 + i / 100,
                language=("en", "de", None)[i],
            )
            for i in range(3)
        ]  # fmt: skip
        corpus.commit(
            clips_table(rows), [ledger_row(f"v{video}", rows)], run_id="r-1", fingerprint="f"
        )
    return corpus


def ask(corpus, *args):
    result = CliRunner().invoke(app, ["query", corpus.url, *args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_a_condition_gives_the_clips_it_is_true_of(corpus):
    out = ask(
        corpus, "language = 'de' and clip_score > 0.1", "-f", "csv", "--select", "clip_id,tags"
    )
    assert list(csv.reader(io.StringIO(out))) == [
        ["clip_id", "tags"],
        ["v1_1000_2000", '["a", "b"]'],
        ["v2_1000_2000", '["a", "b"]'],
    ]


def test_order_and_limit_and_whole_selects(corpus):
    out = ask(corpus, "", "--order-by", "clip_score desc", "--limit", "2", "-f", "jsonl")
    assert [json.loads(line)["clip_id"] for line in out.splitlines()] == [
        "v2_2000_3500",
        "v2_1000_2000",
    ]
    out = ask(
        corpus, "select language, count(*) as n from clips group by all order by all", "-f", "jsonl"
    )
    assert [json.loads(line) for line in out.splitlines()] == [
        {"language": "de", "n": 3}, {"language": "en", "n": 3}, {"language": None, "n": 3},
    ]  # fmt: skip
    out = ask(
        corpus, "select status, sum(num_clips)::int as n from videos group by all", "-f", "jsonl"
    )
    assert json.loads(out) == {"status": "kept", "n": 9}


def test_parquet_keeps_types_and_a_table_is_for_reading(corpus, tmp_path):
    path = tmp_path / "x.parquet"
    ask(corpus, "", "--select", "*", "-f", "parquet", "-o", str(path))
    assert pq.read_table(path).num_rows == 9
    assert "shard" in pq.read_schema(path).names
    assert "video" not in pq.read_schema(path).names
    assert "v0_0_500" in ask(corpus, "video_id = 'v0'")
    with pytest.raises(EngineError, match="not for a terminal"):
        ask(corpus, "", "-f", "parquet")


def test_media_is_never_read(corpus):
    """A corpus without its shards answers every query."""
    shards = corpus.path("shards")
    import os

    os.rename(shards, shards + ".away")
    try:
        assert len(ask(corpus, "", "-f", "jsonl").splitlines()) == 9
    finally:
        os.rename(shards + ".away", shards)


@pytest.mark.parametrize(
    "sql",
    [
        "select * from read_csv('/etc/passwd')",
        "select * from read_text('/etc/hostname')",
        "select * from 'https://example.org/x.parquet'",
        "drop view clips",
        "select 1; select 2",
        "copy clips to '/tmp/never.csv'",
        "1=1; attach '/tmp/never.db'",
        "set enable_external_access = true",
    ],
)
def test_the_sql_reaches_nothing_but_the_corpus(corpus, sql):
    with connect(corpus) as db, pytest.raises(ConfigError):
        list(run(db, select_statement(db, sql).sql)[1])


@pytest.mark.parametrize("order_by", ["1; copy (select 1 as a) to '{}'", "1; select 2"])
def test_a_plan_runs_nothing_else(corpus, order_by):
    path = corpus.path("catalog", "evil.parquet")
    for question in (["--order-by", order_by.format(path)], [f"select 1; {order_by[3:]}"]):
        result = CliRunner().invoke(app, ["query", corpus.url, *question, "--explain"])
        assert isinstance(result.exception, ConfigError)
    assert "evil" not in corpus.names("catalog")


def test_in_a_store_too_the_sql_reaches_nothing_but_the_corpus():
    corpus = Corpus.create("memory://locked/c")
    corpus.take_over("r-1")
    rows = [clip_row("a", 0, 1000)]
    corpus.commit(clips_table(rows), [ledger_row("a", rows)], run_id="r-1", fingerprint="f")
    corpus.fs.pipe("/secret/x.csv", b"a,b\n1,2\n")
    with connect(corpus) as db:
        assert db.execute("select count(*) from clips").fetchall() == [(1,)]
        for path in ("memory:///secret/x.csv", "/etc/hostname"):
            with pytest.raises(ConfigError, match="disabled"):
                run(db, f"select * from read_csv('{path}')")


def test_a_wrong_name_is_answered_with_the_names_there_are(corpus):
    with connect(corpus) as db, pytest.raises(ConfigError, match="scor") as error:
        run(db, select_statement(db, "scor > 1").sql)
    assert "clip_score" in error.value.hint


def test_an_empty_corpus_answers_with_no_rows(tmp_path):
    empty = Corpus.create(str(tmp_path / "c"))
    assert ask(empty, "clip_score > 0", "-f", "jsonl") == ""


def test_words_are_found_in_captions(tmp_path):
    corpus = Corpus.create(str(tmp_path / "c"))
    corpus.take_over("r-1")
    texts = (
        "A red Dog runs.",
        "Scattered dogs, 50% off",
        "Ein roter Ball",
        "一只狗在跑",
        'say "red dog"',
        "Die Straße in İzmir",
    )
    rows = [clip_row("v", 1000 * i, 1000 * i + 1000, caption=t) for i, t in enumerate(texts)]
    rows[2]["transcript"] = "a dog"
    corpus.commit(clips_table(rows), [ledger_row("v", rows)], run_id="r-1", fingerprint="f")

    def found(text: str) -> list[int]:
        out = ask(corpus, "--text", text, "--select", "start_ms // 1000 as i", "-f", "jsonl")
        return [json.loads(line)["i"] for line in out.splitlines()]

    assert found("dog") == [0, 1, 2, 4]
    assert found("RED dog") == [0, 4]
    assert found('"dog runs"') == [0]
    assert found("50%") == [1]
    assert found("狗") == [3]
    assert found("ed") == []
    assert found("straße") == found("İzmir") == [5]
    with pytest.raises(ConfigError, match="quote"):
        found('"dog')


def test_counts_percentiles_and_plans(corpus):
    out = ask(corpus, "clip_score >= p50", "--count", "-f", "jsonl")
    assert json.loads(out) == {"clips": 5, "videos": 2, "hours": 0.002}
    sql = ask(corpus, "clip_score >= p50", "--explain")
    assert "0.11" in sql
    assert "PARQUET" in sql.upper()


def test_aggregates_have_no_order(corpus):
    assert json.loads(ask(corpus, "", "--select", "count(*) as n", "-f", "jsonl")) == {"n": 9}


@pytest.mark.parametrize("size", ["nonsense", "-4GB", "0GB", "1KB", "4"])
def test_a_size_is_a_size(corpus, size):
    error = CliRunner().invoke(app, ["query", corpus.url, "--memory", size]).exception
    assert isinstance(error, ConfigError)
    assert "4GB" in error.hint


def test_a_subset_is_asked_like_a_corpus(corpus):
    result = CliRunner().invoke(
        app, ["subset", corpus.url, "--name", "two", "-n", "2", "--where", "clip_score > p50"]
    )
    assert result.exit_code == 0, result.output
    out = CliRunner().invoke(app, ["query", f"{corpus.url}#two", "-f", "jsonl"]).stdout
    assert len(out.splitlines()) == 2
    assert all(json.loads(line)["clip_score"] > 0.11 for line in out.splitlines())
    error = CliRunner().invoke(app, ["query", f"{corpus.url}#three"]).exception
    assert isinstance(error, EngineError)
    assert "two" in error.hint
