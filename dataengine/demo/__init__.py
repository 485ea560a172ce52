# SPDX-License-Identifier: Apache-2.0
"""The demo: a procedural corpus of videos with sound, speech, subtitles and the truth about them.

It stands in for footage where there is none, and measures what the engine does to it: shot
boundaries, captions, transcripts, languages, retrieval. `render_demo` is all one needs.
"""

from dataengine.demo.render import render_demo

__all__ = ["render_demo"]
