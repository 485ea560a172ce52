# SPDX-License-Identifier: Apache-2.0
"""Keeps fetching out of private networks: every address is judged when it is connected to.

A URL can name a public host that redirects to ``http://169.254.169.254/``, embeds a video there,
or resolves to it at the second look-up (DNS rebinding). So names and URLs prove nothing; what is
judged is the address of each connection, through the interpreter's audit events, which libraries
cannot go around. Programs that fetch by themselves (ffmpeg on a URL) are not started.
"""

import contextlib
import ipaddress
import re
import socket
import sys
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dataengine.fetch.faults import FetchError

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: IPv4 inside IPv6
_REMOTE_ARGUMENT = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class _Rules:
    allow: bool | tuple[str, ...]
    proxies: frozenset[str]


_rules: _Rules | None = None
_installed = False


def is_private(address: str) -> bool:
    """Returns whether an IP address is not one of the public Internet's.

    An IPv4 address inside an IPv6 one (mapped, 6to4, Teredo, NAT64) counts as itself.

    Raises:
        ValueError: If it is no IP address.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return not ip.is_global or ip.is_multicast


def is_allowed(address: str, allow: bool | Sequence[str]) -> bool:
    """Returns whether ``allow_private`` lets a connection go to an address."""
    if allow is True:
        return True
    try:
        if not is_private(address):
            return True
    except ValueError:
        return False  # a name where an address must be cannot be judged
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    networks = () if allow is False else allow
    return any(ip in ipaddress.ip_network(network) for network in networks)


@contextlib.contextmanager
def guarded(allow: bool | tuple[str, ...], proxies: Sequence[str] = ()) -> Iterator[None]:
    """Refuses connections of this process to private addresses while in its ``with`` block.

    Args:
        allow: True for all addresses, or networks to which connections may go.
        proxies: URLs of proxies that the user named; connections to them are allowed.

    Raises:
        FetchError: Where a connection is tried: ``private_address``, or ``unsupported`` for a
            program that would fetch by itself.
    """
    global _rules, _installed  # one per process: so are audit hooks
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    named = [*proxies, *environment_proxies()]
    before, _rules = _rules, _Rules(allow, frozenset(_addresses(_hosts(named))))
    try:
        yield
    finally:
        _rules = before


def environment_proxies() -> list[str]:
    """Returns the proxies that the environment names; ``no_proxy`` names hosts, not proxies."""
    return [url for scheme, url in urllib.request.getproxies().items() if scheme != "no"]


def check_host(host: str, allow: bool | Sequence[str]) -> None:
    """Refuses a host that is known here to be private: for requests that a proxy will make.

    Raises:
        FetchError: ``private_address``.
    """
    for address in _addresses([host]):
        if not is_allowed(address, allow):
            raise FetchError("private_address", f"{host} is {address}")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _rules is None:
        return
    match event:
        case "socket.connect":
            family, address = arguments[0].family, arguments[1]
            if family not in (socket.AF_INET, socket.AF_INET6) or address[0] in _rules.proxies:
                return
            if not is_allowed(str(address[0]), _rules.allow):
                raise FetchError("private_address", f"leads to {address[0]}")
        case "subprocess.Popen":
            words = arguments[1] if isinstance(arguments[1], list | tuple) else [arguments[1]]
            if any(_REMOTE_ARGUMENT.match(str(word)) for word in words):
                raise FetchError("unsupported", "only another program could fetch it")


def _hosts(urls: Iterable[str]) -> Iterator[str]:
    for url in urls:
        host = urlsplit(url if "://" in url else f"//{url}").hostname
        if host:
            yield host


def _addresses(hosts: Iterable[str]) -> Iterator[str]:
    for host in hosts:
        with contextlib.suppress(OSError, UnicodeError):
            for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
                yield str(address[0])
