# SPDX-License-Identifier: Apache-2.0
"""Asks vLLM in this process; a script for an environment that has vLLM, but not pytest.

``python -m tests.vllm_in_process JOB RESULT`` reads a pickled `Job` and writes a pickled `Result`.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataengine.models.answers import Failure
from dataengine.models.fusion import Captions, FusedCaptions, LLMFuserConfig
from dataengine.models.fusion_llm import LLMFuser
from dataengine.models.llm import Request, build_llm
from tests.llm_server import VLLM_ENV

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """What is asked; every sequence is one call."""

    fuser: str
    """A `LLMFuserConfig` as JSON."""
    asked: Sequence[Sequence[Request]]
    fused: Sequence[Sequence[Captions]]


@dataclass(frozen=True)
class Result:
    """What came back, in the order of the calls."""

    model: str
    revision: str
    answers: list[dict[str, str | Failure]]
    captions: list[list[FusedCaptions]]


def ask_in_process(
    python: Path,
    folder: Path,
    config: LLMFuserConfig,
    asked: Sequence[Sequence[Request]],
    fused: Sequence[Sequence[Captions]],
) -> Result:
    """Runs a `Job` in a Python that has vLLM; ``folder`` keeps its files and its log."""
    job, result, log = folder / "job.pickle", folder / "result.pickle", folder / "vllm.log"
    job.write_bytes(pickle.dumps(Job(config.model_dump_json(), asked, fused), protocol=4))
    with log.open("wb") as out:
        done = subprocess.run(
            [str(python), "-m", "tests.vllm_in_process", str(job), str(result)],
            cwd=ROOT, env={**os.environ, **VLLM_ENV}, stdout=out, stderr=out, check=False,
            timeout=900,
        )  # fmt: skip
    assert done.returncode == 0, log.read_text()[-4000:]
    return pickle.loads(result.read_bytes())


def main(job_path: Path, result_path: Path) -> None:
    job: Job = pickle.loads(job_path.read_bytes())
    config = LLMFuserConfig.model_validate_json(job.fuser)
    llm = build_llm(config.llm)
    fuser = LLMFuser(config, llm)
    result = Result(
        model=llm.model,
        revision=llm.revision,
        answers=[llm.answer(requests) for requests in job.asked],
        captions=[fuser.fuse(captions) for captions in job.fused],
    )
    result_path.write_bytes(pickle.dumps(result, protocol=4))


if __name__ == "__main__":
    from tests import vllm_in_process  # pickles name this module, not __main__

    vllm_in_process.main(Path(sys.argv[1]), Path(sys.argv[2]))
