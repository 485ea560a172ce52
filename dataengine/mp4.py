# SPDX-License-Identifier: Apache-2.0
"""The boxes of an MP4: rewriting its edit lists without moving a byte of its media, and distrusting it.

An edit list says which part of each track is shown, and when. Source: ISO/IEC 14496-12.
"""

import contextlib
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

MAX_EDITS = 100
"""Edits of a track. Players need one or two; a thousand keep libav busy for seconds, ten thousand for
ever, before it gives out the first packet."""
MAX_BOXES = 10_000
"""Boxes of an index: there are a dozen for each track."""
MAX_SAMPLES = 20_000_000
"""Frames or packets of a track: 90 hours at 60 a second, and a gigabyte of libav's index."""

Buffer = bytearray | mmap.mmap
"""A whole file that can be changed."""

_Span = tuple[int, int]
"""Start and end of a box's content in the file."""


def check_tables(path: str) -> None:
    """Refuses a file whose tables would take for ever, or all memory, to open. Not an MP4: no check.

    Only headers of boxes are read.

    Raises:
        ValueError: What is wrong.
        OSError: If the file cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(8)[4:] not in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
            return
        todo = [(0, file.seek(0, 2))]
        for _ in range(MAX_BOXES):
            if not todo:
                return
            start, end = todo.pop()
            if start + 8 > end:
                continue
            file.seek(start)
            head = file.read(20)
            size, kind = struct.unpack_from(">I4s", head)
            header = 8
            if size == 1 and len(head) >= 16:
                (size,) = struct.unpack_from(">Q", head, 8)
                header = 16
            stop = min(start + max(size, header), end) if size else end
            if kind != b"moov":  # libav reads the first one only, and what follows are fragments
                todo.append((stop, end))
            if kind in (b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl"):
                todo.append((start + header, stop))
            elif kind == b"cmov":
                raise ValueError("its index is compressed")
            elif kind in (b"elst", b"stsz"):
                file.seek(start + header)
                table = file.read(12).ljust(12, b"\0")
                (count,) = struct.unpack_from(">I", table, 4 if kind == b"elst" else 8)
                if kind == b"elst" and count > MAX_EDITS:
                    raise ValueError(f"{count} edits of a track")
                if kind == b"stsz" and count > MAX_SAMPLES:
                    raise ValueError(f"{count} frames in a track")
    raise ValueError(f"more than {MAX_BOXES} boxes before its index ends")


def set_edits(data: Buffer, length: Fraction) -> None:
    """Rewrites an MP4's edit lists, in place, so that they begin with a frame and end on time.

    The first frame that was visible comes to time 0, and everything else keeps its distance to it.

    Args:
        data: An MP4 whose ``moov`` is not compressed; sizes and offsets stay as they are.
        length: New duration in seconds; sound that ends earlier stays shorter.

    Raises:
        ValueError: If no frame was visible, or a box is missing that ffmpeg writes.

    Source: 8.6.5 and 8.6.6 of the standard. (libav's demuxer moves the first visible frame to the
    beginning of its edit, so it cannot be asked where sound and picture stood before.)
    """
    moov = _box(data, (0, len(data)), "moov")
    mvhd = _box(data, moov, "mvhd")
    movie_scale = _timescale(data, mvhd)
    tracks = [
        _read_track(data, (a, b), movie_scale)
        for kind, a, b in _boxes(data, moov)
        if kind == "trak"
    ]
    video = next((track for track in tracks if track.kind == b"vide"), None)
    if video is None:
        raise ValueError("no video track")
    ticks = _frame_ticks(data, video.trak)
    begin_ticks = round(video.begin_s * video.scale)
    visible = ticks[ticks >= begin_ticks]
    if not len(visible):
        raise ValueError("no frame came out")
    zero = video.delay + Fraction(int(visible.min()) - begin_ticks, video.scale)
    longest = 0
    for track in tracks:
        begin, delay = track.begin_s, track.delay - zero
        if delay < 0:  # the track begins before the clip does
            begin, delay = begin - delay, Fraction(0)
        rest = length - delay
        if track.kind != b"vide":
            # Sound may end before the picture. (The media length of video says nothing about it:
            # it leaves out the delay that B-frames bring.)
            rest = min(rest, track.length_s - begin)
        edits = [(round(max(rest, Fraction(0)) * movie_scale), round(begin * track.scale))]
        if round(delay * movie_scale):
            edits.insert(0, (round(delay * movie_scale), -1))
        _write_edits(data, track.elst, edits)
        total = sum(duration for duration, _ in edits)
        _write_duration(data, track.tkhd, total, 20)
        longest = max(longest, total)
    _write_duration(data, mvhd, longest, 16)


def _frame_ticks(data: Buffer, trak: _Span) -> np.ndarray:
    """Returns when the frames of a track are shown, int64 [frames] in its own ticks, edits ignored.

    Source: 8.6.1.2 and 8.6.1.3 of the standard.
    """
    stbl = _box(data, _box(data, _box(data, trak, "mdia"), "minf"), "stbl")
    lengths = _runs(data, _box(data, stbl, "stts"))
    ticks = np.cumsum(lengths) - lengths
    with contextlib.suppress(ValueError):  # no B-frames, no box
        ticks = ticks + _runs(data, _box(data, stbl, "ctts"))
    return ticks


def _runs(data: Buffer, span: _Span) -> np.ndarray:
    """Returns the values of an stts or ctts box, one for each sample, int64."""
    (count,) = struct.unpack_from(">I", data, span[0] + 4)
    # Negative offsets belong to version 1, but stand in version 0 as well.
    table = np.frombuffer(data, ">i4", 2 * count, span[0] + 8).reshape(-1, 2).astype(np.int64)
    return np.repeat(table[:, 1], table[:, 0])


@dataclass(frozen=True, slots=True)
class _Track:
    """A track as its edit list leaves it: after ``delay`` it is shown from ``begin_s`` on."""

    kind: bytes
    scale: int
    length_s: Fraction
    delay: Fraction
    begin_s: Fraction
    trak: _Span
    elst: _Span
    tkhd: _Span


def _read_track(data: Buffer, trak: _Span, movie_scale: int) -> _Track:
    mdia = _box(data, trak, "mdia")
    mdhd, hdlr = _box(data, mdia, "mdhd"), _box(data, mdia, "hdlr")
    elst = _box(data, _box(data, trak, "edts"), "elst")
    scale = _timescale(data, mdhd)
    delay, begin = _read_edits(data, elst, movie_scale)
    return _Track(
        kind=bytes(data[hdlr[0] + 8 : hdlr[0] + 12]),
        scale=scale,
        length_s=Fraction(_duration(data, mdhd), scale),
        delay=delay,
        begin_s=Fraction(begin, scale),
        trak=trak,
        elst=elst,
        tkhd=_box(data, trak, "tkhd"),
    )


def _boxes(data: Buffer, span: _Span) -> Iterator[tuple[str, int, int]]:
    """Yields (type, start, end) of the boxes in a span; start is behind the box's header."""
    position, stop = span
    while position + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, position)
        header = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, position + 8)
            header = 16
        elif size == 0:
            size = stop - position
        yield kind.decode("latin-1"), position + header, position + size
        position += max(size, header)


def _box(data: Buffer, span: _Span, name: str) -> _Span:
    """Returns the content of the first box of a type.

    Raises:
        ValueError: If there is none.
    """
    for kind, start, end in _boxes(data, span):
        if kind == name:
            return start, end
    raise ValueError(f"no {name} box")


def _timescale(data: Buffer, span: _Span) -> int:
    """Returns the timescale of an mvhd or mdhd box."""
    return struct.unpack_from(">I", data, span[0] + (20 if data[span[0]] else 12))[0]


def _duration(data: Buffer, span: _Span) -> int:
    """Returns the duration of an mdhd box."""
    wide = data[span[0]]
    return struct.unpack_from(">Q" if wide else ">I", data, span[0] + (24 if wide else 16))[0]


def _write_duration(data: Buffer, span: _Span, value: int, offset: int) -> None:
    """Writes the duration of a tkhd or mvhd box.

    Args:
        data: The file.
        span: The box's content.
        value: In ticks of the movie.
        offset: Where the duration stands in version 0; version 1 has two 64-bit times before it.
    """
    if data[span[0]]:
        struct.pack_into(">Q", data, span[0] + offset + 8, value)
    else:
        struct.pack_into(">I", data, span[0] + offset, value)


def _read_edits(data: Buffer, span: _Span, movie_scale: int) -> tuple[Fraction, int]:
    """Returns a track's delay in seconds and the media time that is shown first."""
    form, size = (">Qqhh", 20) if data[span[0]] else (">Iihh", 12)
    (count,) = struct.unpack_from(">I", data, span[0] + 4)
    delay = Fraction(0)
    for i in range(count):
        duration, media_time, _, _ = struct.unpack_from(form, data, span[0] + 8 + i * size)
        if media_time >= 0:
            return delay, media_time
        delay += Fraction(duration, movie_scale)
    return delay, 0


def _write_edits(data: Buffer, span: _Span, edits: Sequence[tuple[int, int]]) -> None:
    """Writes a track's edit list over the old one; what is left over becomes a ``free`` box."""
    start, end = span
    form, size = (">Qqhh", 20) if data[start] else (">Iihh", 12)
    used = start + 8 + len(edits) * size
    if used > end:
        raise ValueError("no room for the edit list")
    struct.pack_into(">I", data, start + 4, len(edits))
    for i, (duration, media_time) in enumerate(edits):
        struct.pack_into(form, data, start + 8 + i * size, duration, media_time, 1, 0)
    if used < end:
        struct.pack_into(">I", data, start - 8, used - (start - 8))
        data[used:end] = struct.pack(">I4s", end - used, b"free") + bytes(end - used - 8)
