# SPDX-License-Identifier: Apache-2.0
"""What may be set about fetching: the download stage's settings without those of the stage itself."""

import ipaddress

from pydantic import Field, SecretStr, field_validator, model_validator

from dataengine.stage import Settings


class FetchSettings(Settings):
    """How sources are fetched, and which are not."""

    # What is taken.
    max_height: int = Field(default=720, ge=1)
    """Pages offer several sizes: the largest up to this height is taken (InternVid: 720p), the
    smallest there is where all are larger."""
    min_height: int = Field(default=0, ge=0)
    """Videos whose shorter side is smaller are dropped as too_small."""
    min_duration_s: float = Field(default=0.0, ge=0)
    """Shorter videos are dropped as too_short; before they are fetched, where a page says so."""
    max_duration_s: float | None = Field(default=None, gt=0)
    """Longer videos are dropped as too_long, likewise; None leaves it to the segment stage."""
    max_file_mb: int = Field(default=4096, ge=1)
    """Larger files are dropped as too_large."""
    age_limit: int = Field(default=17, ge=0)
    """Videos for viewers older than this many years are dropped as age_limited."""
    subtitles: tuple[str, ...] = ("original", "en")
    """Languages of a page's subtitles to fetch; ``original`` is what is spoken, ``all`` all there are."""
    automatic_subtitles: bool = True
    """Whether what the site's recogniser heard serves where nobody wrote subtitles."""

    # How it is asked for.
    cookies_file: str | None = None
    """Cookies in Netscape format, sent with every request of their domain; the file stays as it is."""
    proxies: tuple[SecretStr, ...] = ()
    """Proxy URLs; a video always uses the same one, and the next one on a later attempt."""
    rate_limit_mbps: float | None = Field(default=None, gt=0)
    """Most megabits a second for one download."""
    per_host_concurrency: int = Field(default=4, ge=1)
    """Most videos fetched from one host at a time, of all processes of a node."""
    sleep_interval_s: float = Field(default=0.0, ge=0)
    """Least pause between two requests to one host, of all processes of a node."""
    max_sleep_interval_s: float | None = Field(default=None, ge=0)
    """Pauses are drawn from sleep_interval_s to this; None makes them all alike."""
    retries: int = Field(default=3, ge=0)
    """Further tries of one request on a fault that may pass (429, 5xx, a broken connection)."""
    backoff_s: float = Field(default=1.0, ge=0)
    """Pause before the first further try; it doubles with each. Retry-After is kept instead."""
    max_retry_after_s: float = Field(default=60.0, ge=0)
    """A server that asks for a longer pause is not asked again: the video ends as http_429."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds without a byte after which a connection is given up."""
    fetch_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds for one video in all, waiting for its turn included."""
    memory_mb: int = Field(default=4096, ge=256)
    """Most memory of the process that fetches; Linux only."""
    allow_private: bool | tuple[str, ...] = False
    """Whether URLs may lead into private networks (127.0.0.1, 10.0.0.0/8, ...): a list of networks
    allows these alone."""

    # Where it is kept.
    cache_dir: str = ""
    """Folder for fetched files. Empty: ``cache`` in a local corpus, else a temporary folder of
    the node, which suits pipelines whose segment stage is colocated."""
    cache_mb: int = Field(default=51_200, ge=0)
    """Leftovers of the cache beyond this are removed, the least recently used first."""
    keep: bool = False
    """Whether fetched files stay in the cache when their clips are committed."""

    @field_validator("allow_private")
    @classmethod
    def _networks(cls, value: bool | tuple[str, ...]) -> bool | tuple[str, ...]:
        for network in () if isinstance(value, bool) else value:
            ipaddress.ip_network(network)
        return value

    @field_validator("proxies")
    @classmethod
    def _known(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for proxy in value:
            url = proxy.get_secret_value()
            if set(url) == {"*"}:
                raise ValueError("a corpus does not store proxies, which hold passwords: name them")
            if not url.startswith(("http://", "https://", "socks4", "socks5")):
                raise ValueError("a proxy is a URL: http://, https://, socks4:// or socks5://")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "FetchSettings":
        if self.max_sleep_interval_s is not None and (
            self.max_sleep_interval_s < self.sleep_interval_s
        ):
            raise ValueError("max_sleep_interval_s < sleep_interval_s")
        if self.max_duration_s is not None and self.max_duration_s < self.min_duration_s:
            raise ValueError("max_duration_s < min_duration_s")
        return self

    @property
    def max_bytes(self) -> int:
        """Most bytes of a file."""
        return self.max_file_mb << 20

    @property
    def bytes_per_s(self) -> float | None:
        """Most bytes a second, None for no limit."""
        return None if self.rate_limit_mbps is None else self.rate_limit_mbps * 1e6 / 8


NEUTRAL = frozenset(FetchSettings.model_fields) - {
    "max_height",
    "min_height",
    "min_duration_s",
    "max_duration_s",
    "max_file_mb",
    "age_limit",
    "subtitles",
    "automatic_subtitles",
}
"""Settings that change how a video is fetched, but not which video or what it holds."""
