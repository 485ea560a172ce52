# SPDX-License-Identifier: Apache-2.0
"""Limits per host hold for all processes of a node: asserted from the server's own log."""

import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dataengine.fetch.faults import FetchError
from dataengine.fetch.fetcher import Job
from dataengine.fetch.guard import is_allowed, is_private
from dataengine.fetch.polite import HostLimits
from dataengine.fetch.process import FetchProcess
from dataengine.fetch.settings import FetchSettings
from tests.fault_server import FaultServer

HOSTS = ("127.0.0.1", "127.0.0.2")


@pytest.fixture
def server():
    server = FaultServer(bytes(5000))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def own_node(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def soon(seconds=5.0):
    return time.monotonic() + seconds


def fetch_all(urls, cache, num_processes, **settings):
    """Fetches URLs in as many processes, each taking the next as soon as it is free."""
    processes = [FetchProcess() for _ in range(num_processes)]
    base = {"cache_dir": str(cache), "allow_private": True, "retries": 0, "timeout_s": 20}
    fetch_settings = FetchSettings.model_validate(base | settings)
    todo = iter(urls)

    def work(process):
        for url in todo:
            suffix = ".mp4" if url.endswith(".mp4") else ""
            process.fetch(Job(source=url, suffix=suffix, user="nobody:0", fetch=fetch_settings))

    try:
        with ThreadPoolExecutor(num_processes) as pool:
            list(pool.map(work, processes))
    finally:
        for process in processes:
            process.close()


def test_processes_share_the_places_at_each_host(server, tmp_path):
    urls = [server.url(f"nap/{n}.mp4", host) for n in range(8) for host in HOSTS]
    fetch_all(urls, tmp_path / "c", 5, per_host_concurrency=2)
    assert len(server.hits) == 16
    assert server.most_at_work() == dict.fromkeys(HOSTS, 2)


def test_processes_share_the_pauses_of_each_host(server, tmp_path):
    urls = [server.url(f"ok/{n}{suffix}") for n in range(4) for suffix in (".mp4", "")]
    fetch_all(urls, tmp_path / "c", 2, sleep_interval_s=0.1, max_sleep_interval_s=0.15)
    assert len(server.hits) == 4 + 2 * 4
    assert server.least_pause_s(11)["127.0.0.1"] > 0.095


def test_a_pause_is_kept_however_many_wait_for_it():
    everybody = [HostLimits(8, (0.05, 0.06)) for _ in range(8)]
    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda limits: limits.take_turn("a", soon(20)), everybody))
    assert time.monotonic() - begin > 7 * 0.05
    for limits in everybody:
        limits.leave()


def test_the_place_of_a_killed_process_is_free_again(server, tmp_path):
    process = FetchProcess()
    settings = FetchSettings(cache_dir=str(tmp_path), allow_private=True, per_host_concurrency=1)
    job = Job(source=server.url("stall/a.mp4"), suffix=".mp4", user="nobody:0", fetch=settings)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(process.fetch, job)
        while not server.hits:
            time.sleep(0.01)
        limits = HostLimits(1, (0, 0))
        with pytest.raises(FetchError, match="its turn"):
            limits.take_turn("127.0.0.1", soon(0.3))
        assert process._child is not None
        os.killpg(process._child.pid, signal.SIGKILL)
        limits.take_turn("127.0.0.1", soon())
        with pytest.raises(FetchError, match="SIGKILL"):
            future.result()
    limits.leave()


def test_nobody_holds_a_place_while_waiting_for_another():
    first, second = HostLimits(1, (0, 0)), HostLimits(1, (0, 0))
    first.take_turn("a", soon())
    second.take_turn("b", soon())
    with ThreadPoolExecutor(1) as pool:
        crossing = pool.submit(first.take_turn, "b", soon())
        second.take_turn("a", soon())
        crossing.result()
    first.leave()
    second.leave()


def test_a_host_that_wants_to_be_left_alone_is_left_alone_by_all():
    first, second = HostLimits(4, (0, 0)), HostLimits(4, (0, 0))
    first.postpone("a", 0.3, soon())
    begin = time.monotonic()
    second.take_turn("b", soon())
    second.take_turn("a", soon())
    assert time.monotonic() - begin > 0.25
    first.postpone("a", 100, soon())
    with pytest.raises(FetchError, match="longer pause") as caught:
        second.take_turn("A", soon())
    assert caught.value.reason == "http_429"


def test_a_stamp_that_was_not_written_whole_blocks_nobody(tmp_path):
    limits = HostLimits(1, (0, 0), tmp_path / "hosts")
    limits.take_turn("a", soon())
    (stamp,) = (tmp_path / "hosts").glob("*/stamp")
    for text in ("[17", "", f"[{time.time() + 1e6}, {time.time() + 1e6}]"):
        stamp.write_text(text)
        limits.take_turn("a", soon(1))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
    ],
)  # fmt: skip
def test_private_addresses_are_known(address):
    assert is_private(address)
    assert not is_allowed(address, False)
    assert is_allowed(address, True)


def test_public_addresses_and_allowed_networks_pass():
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert not is_private(address)
        assert is_allowed(address, False)
    assert is_allowed("10.1.2.3", ["10.1.0.0/16"])
    assert is_allowed("::ffff:10.1.2.3", ["10.1.0.0/16"])
    assert not is_allowed("10.2.2.3", ["10.1.0.0/16"])
    assert not is_allowed("metadata.internal", False)
