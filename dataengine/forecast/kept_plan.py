# SPDX-License-Identifier: Apache-2.0
"""A forecast is kept with the corpus it is for, so that a run can be held against it."""

import json
from pathlib import Path
from typing import cast

import fsspec

from dataengine.corpus import Corpus
from dataengine.forecast.result import Forecast, from_json, to_json


def store(forecast: Forecast, corpus_url: str) -> str:
    """Keeps a forecast for `compare` and returns where.

    It becomes ``plans/<fingerprint>.json`` in the corpus. Where there is none yet, ``ingest`` has to
    find an empty place, and it becomes ``<corpus>.plans/<fingerprint>.json`` beside it.
    """
    data = to_json(forecast)
    corpus = existing(corpus_url)
    if corpus:
        name = f"plans/{forecast.fingerprint}.json"
        corpus.publish(name, lambda file: file.write(data))
        return corpus.path(name)
    fs, root = fsspec.core.url_to_fs(absolute(corpus_url))
    folder = f"{root.rstrip('/')}.plans"
    fs.makedirs(folder, exist_ok=True)
    path = f"{folder}/{forecast.fingerprint}.json"
    fs.pipe_file(path, data)
    return path


def load(corpus: Corpus, fingerprint: str) -> Forecast | None:
    """Returns the forecast that was kept for a pipeline, the one in the corpus before the one beside."""
    for path in (
        corpus.path("plans", f"{fingerprint}.json"),
        f"{corpus.root}.plans/{fingerprint}.json",
    ):
        try:
            return from_json(json.loads(cast(bytes, corpus.fs.cat_file(path))))
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            continue  # there is none, or one that another version wrote
    return None


def existing(url: str | None) -> Corpus | None:
    """Returns a corpus if it is there already.

    Raises:
        CorpusError: If it cannot be opened.
    """
    if url is None:
        return None
    corpus = Corpus(absolute(url))
    return Corpus.open(url) if corpus.fs.exists(corpus.path("corpus.json")) else None


def absolute(url: str) -> str:
    """Returns a URL as it is, and a folder with its whole path."""
    return url if "://" in url else str(Path(url).expanduser().absolute())
