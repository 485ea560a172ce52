# SPDX-License-Identifier: Apache-2.0
"""What a pipeline's settings need before they can run: packages, weights, servers.

Every `Settings` may answer `needs()`; `dataengine doctor` says what is missing, `dataengine prefetch`
fetches the weights.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Package:
    """An importable module and what installs it."""

    module: str
    install: str = "uv sync --extra ingest"


@dataclass(frozen=True, slots=True)
class Weights:
    """Files of a model.

    Attributes:
        kind: Where ``name`` is looked for: ``hub`` (Hugging Face id or a local folder), ``tokenizer``
            (the same, of which only the tokenizer's files are taken, never weights), ``whisper``
            (a name openai-whisper knows or a file), ``open_clip`` (as in `OpenClipConfig`, with
            ``revision`` its ``pretrained``), ``file`` (a local path, which only the user can bring).
        name: Id, name or path.
        revision: Commit, tag or branch; empty takes the newest.
        mend: Command that makes a ``file`` that is missing; empty where none does.
    """

    kind: Literal["hub", "tokenizer", "whisper", "open_clip", "file"]
    name: str
    revision: str = ""
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server.

    Attributes:
        base_url: With ``/v1``.
        model: Name that the server must serve.
        api_key_env: Environment variable with the key; empty sends none.
    """

    base_url: str
    model: str
    api_key_env: str = ""


Need = Package | Weights | Endpoint
