# SPDX-License-Identifier: Apache-2.0
"""500 URLs, a tenth of them with each fault, through the command line, Ray and yt-dlp."""

from collections import Counter

import pytest

from benchmarks.downloads import CONCURRENCY, HOSTS, KINDS, PAUSE_S, WINDOW, run
from dataengine.corpus import Corpus
from dataengine.query.verify import verify


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_url_ends_with_its_class_and_retry_mends_what_can_be_mended(tmp_path):
    result = run(tmp_path, 500)
    assert result.wrong() == []
    assert Counter(result.kinds.values()) == dict.fromkeys(KINDS, 50)
    assert verify(Corpus.open(str(tmp_path / "corpus"))).problems == []

    mendable = {kind for kind, (before, after) in KINDS.items() if before and not after}
    for source, row in result.second.items():
        before = result.first[source]
        if result.kinds[source] in mendable:
            assert (before["status"], row["status"]) == ("failed", "kept")
            assert row["attempts"] == before["attempts"] + 1
        else:
            assert row == before, "a source was tried again that was not named"
    assert result.num_late_requests == 0

    server = result.server
    assert set(server.most_at_work()) == set(HOSTS)
    assert max(server.most_at_work().values()) == CONCURRENCY
    assert min(server.least_pause_s(WINDOW).values()) > 0.9 * PAUSE_S
    assert not any((tmp_path / "corpus" / "cache").glob("[!.]*")), "what was fetched stayed behind"
