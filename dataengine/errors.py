# SPDX-License-Identifier: Apache-2.0
"""The errors a user can meet. Each carries what is wrong and what to type next."""


class EngineError(Exception):
    """A problem the user can mend; the CLI prints it as one message and a hint.

    Args:
        message: What is wrong, with the offending value and where it stands.
        hint: What to type or change. Empty when there is nothing useful to say.
    """

    exit_code = 1
    is_shared = False
    """Whether every process of a training run has it, so that one voice is enough."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["EngineError"], tuple[str, str], dict[str, bool]]:
        # Exceptions cross process boundaries; the default pickle would lose the hint.
        return type(self), (self.message, self.hint), {"is_shared": self.is_shared}


class ConfigError(EngineError):
    """A pipeline file or a command line that cannot be run as written."""

    exit_code = 2


class DependencyError(EngineError):
    """A package, model or binary that a stage needs is missing."""

    exit_code = 2


class CorpusError(EngineError):
    """A folder that is not a corpus, or a corpus that breaks its own contract."""


class MediaError(Exception):
    """A file that cannot be read as a video; becomes a Drop at the stage boundary.

    Args:
        reason: A snake_case drop reason, e.g. ``undecodable`` or ``no_video_stream``.
        detail: One line for the ledger.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["MediaError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)
