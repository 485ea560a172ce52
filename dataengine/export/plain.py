# SPDX-License-Identifier: Apache-2.0
"""Plain files: a clip encoded again, so that no frame in it is hidden behind an edit list.

A clip cut by stream copy begins at a key frame and hides what lies before its first frame. Readers that
do not know edit lists (decord among them) show that pre-roll. Encoded again, the clip has no frames
but its own, in the order of decoding, the first of them at 0. Its sound begins with the 21 ms that every
AAC track hides.
"""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from dataengine.errors import DependencyError, MediaError
from dataengine.stage import provenance

TIMEOUT_S = 600.0
"""Limit for one clip."""

PLAIN_PROVENANCE = provenance("video", "ffmpeg/libx264 crf 18", "encoded again without B-frames")
"""What the provenance of such a clip says in the place of how it was cut."""


def plain_mp4(data: bytes, timeout_s: float = TIMEOUT_S) -> bytes:
    """Returns a clip as H.264 and AAC without hidden frames.

    Args:
        data: An MP4.
        timeout_s: Limit for ffmpeg.

    Raises:
        MediaError: ``reencode_failed``, ``reencode_timeout``.
    """
    with tempfile.TemporaryDirectory(prefix="dataengine-plain-") as folder:
        source, target = os.path.join(folder, "in.mp4"), os.path.join(folder, "out.mp4")
        with open(source, "wb") as file:
            file.write(data)
        command = [_ffmpeg(), "-nostdin", "-v", "error", "-threads", "1", "-i", f"file:{source}"]
        command += ["-map", "0:v:0", "-map", "0:a:0?", "-map_metadata", "-1", "-map_chapters", "-1"]
        # Without B-frames the decoding order is the order of showing: nothing to delay, nothing to hide.
        command += ["-c:v", "libx264", "-crf", "18", "-preset", "veryfast", "-bf", "0"]
        command += ["-pix_fmt", "yuv420p", "-vf", "scale=trunc(iw/2)*2:trunc(ih/2)*2"]
        command += ["-fps_mode", "passthrough", "-enc_time_base", "demux", "-threads", "1"]
        command += ["-c:a", "aac", "-b:a", "128k", "-movflags", "+faststart"]
        command += ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact"]
        command += ["-f", "mp4", f"file:{target}"]
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise MediaError("reencode_timeout", f"over {timeout_s:g} s") from None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines()
            raise MediaError("reencode_failed", lines[-1] if lines else "ffmpeg gave up") from None
        with open(target, "rb") as file:
            return file.read()


def plain_mp4s(clips: Sequence[bytes | None]) -> list[bytes | MediaError | None]:
    """Returns many clips as `plain_mp4` does, as many at a time as there are cores.

    Args:
        clips: MP4s; None stays None.

    Returns:
        One for each, in order; the error of one that cannot be encoded.
    """

    def one(data: bytes | None) -> bytes | MediaError | None:
        try:
            return None if data is None else plain_mp4(data)
        except MediaError as error:
            return error

    # Each waits for an ffmpeg of its own, which uses one core.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, clips))


def _ffmpeg() -> str:
    try:
        import imageio_ffmpeg
    except ImportError:
        raise DependencyError(
            "Encoding clips again takes ffmpeg", "pip install 'dataengine[ingest]'"
        ) from None
    return imageio_ffmpeg.get_ffmpeg_exe()
