# SPDX-License-Identifier: Apache-2.0
"""What a pipeline needs and whether it is here: packages, weights, servers, GPUs, disk.

Nothing is loaded, fetched or changed. Every check answers with a `Finding`, so that one call says all
there is to mend.
"""

import http.client
import importlib.util
import json
import os
import shlex
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dataengine.config import Pipeline
from dataengine.errors import EngineError
from dataengine.needs import Endpoint, Package, Weights
from dataengine.pools import Pool, StageSpec, plan_pools
from dataengine.prefetch import FETCH_HINT, Found, find, label, needs_of, size_text
from dataengine.prompts import prompt_files, prompt_sha256
from dataengine.stages.download import DownloadStage

ENGINE = "engine"
"""Stands in the place of a stage for what every pipeline needs."""

_ENGINE_PACKAGES = ("av", "cv2", "duckdb", "jinja2", "ray", "torch", "yt_dlp")
_TIMEOUT_S = 5.0
_VLLM_PORT = 8000
_LEAST_FREE_BYTES = 2 * 10**9
"""Free space below which a run is not worth starting: Ray spills to it and clips are cut in it."""
GPU_FACTOR = 1.3
"""GPU memory per byte of weights on disk: the weights themselves and 30 % for activations and the cache
of a short prompt. An estimate: a long context takes more, weights stored as float32 take less."""

Status = Literal["ok", "missing", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        stage: Who needs it; `ENGINE` for all.
        kind: ``package``, ``weights``, ``endpoint``, ``gpu``, ``gpu memory``, ``cpu``, ``disk``,
            ``binary`` or ``prompt``.
        name: What is needed.
        status: ``unknown`` where it cannot be told yet; only ``missing`` stands in a run's way.
        detail: Where it is, or what is wrong.
        hint: What mends it; a command where there is one.
    """

    stage: str
    kind: str
    name: str
    status: Status
    detail: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Devices:
    """What there is to run on.

    Attributes:
        where: Whose it is, for messages.
        num_cpus: Cores.
        num_gpus: GPUs.
        gpu_bytes: Memory of the smallest GPU; None where it is not known.
    """

    where: str
    num_cpus: float
    num_gpus: float
    gpu_bytes: int | None


def examine(
    pipeline: Pipeline, *, address: str | None = None, corpus: str | None = None
) -> list[Finding]:
    """Returns everything a pipeline needs, with its state, in the order of its stages.

    Args:
        pipeline: What is to run.
        address: Of a Ray cluster; its CPUs and GPUs then count. Packages, weights and disks are those
            of this machine, for which every node of a cluster is expected to stand.
        corpus: Where clips will go; its disk is looked at as well.
    """
    findings = [_guarded(_package, ENGINE, Package(module)) for module in _ENGINE_PACKAGES]
    findings.append(_guarded(_ffmpeg, ENGINE, "ffmpeg"))
    wanted = [(cls.name, need) for cls, config in pipeline.stages for need in needs_of(config)]
    servers = list(dict.fromkeys(need for _, need in wanted if isinstance(need, Endpoint)))
    with ThreadPoolExecutor(max_workers=max(1, len(servers))) as pool:
        answers = dict(zip(servers, pool.map(_endpoint_or_why, servers), strict=True))
    for cls, config in pipeline.stages:
        needs = [need for stage, need in wanted if stage == cls.name]
        for need in dict.fromkeys(needs):
            match need:
                case Package():
                    findings.append(_guarded(_package, cls.name, need))
                case Weights():
                    findings.append(_guarded(_weights, cls.name, need))
                case Endpoint():
                    findings.append(_endpoint_finding(cls.name, need, answers[need]))
        findings += [_guarded(_prompt, cls.name, file) for file in prompt_files(config)]
    findings += _devices_findings(pipeline.stages, address)
    findings += _disk_findings(pipeline, corpus)
    return findings


def _guarded(check: Callable[[str, Any], Finding], stage: str, need: Any) -> Finding:
    """Returns what a check finds; one that fails itself is a finding too."""
    try:
        return check(stage, need)
    except Exception as error:  # noqa: BLE001 - the other checks still have something to say
        name = need.name if isinstance(need, Weights) else getattr(need, "module", str(need))
        why = f"{type(error).__name__}: {_line(error)}"
        return Finding(stage, "check", name, "missing", why, "please report it")


# --------------------------------------------------------------------------------- single checks


def _package(stage: str, need: Package) -> Finding:
    """Looks for a module without running any of it."""
    top, _, rest = need.module.partition(".")
    spec = importlib.util.find_spec(top)
    inside = bool(spec) and (not rest or _has_submodule(spec, rest))
    if inside:
        return Finding(stage, "package", need.module, "ok")
    return Finding(stage, "package", need.module, "missing", "not installed", need.install)


def _has_submodule(spec: Any, dotted: str) -> bool:
    """Returns whether a package has a submodule; asking Python would import the package."""
    path = dotted.replace(".", os.sep)
    return any(
        Path(folder, path).is_dir() or list(Path(folder).glob(f"{path}.*"))
        for folder in spec.submodule_search_locations or ()
    )


def _ffmpeg(stage: str, _: str) -> Finding:
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return Finding(
            stage, "binary", "ffmpeg", "missing", "not installed", "uv sync --extra ingest"
        )
    import imageio_ffmpeg

    try:
        return Finding(stage, "binary", "ffmpeg", "ok", imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        hint = "install ffmpeg, or set IMAGEIO_FFMPEG_EXE to one"
        return Finding(stage, "binary", "ffmpeg", "missing", _line(error), hint)


def _weights(stage: str, need: Weights) -> Finding:
    state = find(need)
    if isinstance(state, Found):
        detail = f"{size_text(state.num_bytes)} in {state.path}"
        return Finding(stage, "weights", label(need), "ok", detail)
    return Finding(stage, "weights", label(need), "missing", state.why, state.hint)


def _prompt(stage: str, file: str) -> Finding:
    try:
        return Finding(stage, "prompt", file, "ok", prompt_sha256(file)[:12])
    except EngineError:
        hint = "run where the folder prompts/ is, or change the setting"
        return Finding(stage, "prompt", file, "missing", "no such file", hint)


def _endpoint_or_why(need: Endpoint) -> tuple[str, str]:
    """Returns ("", what a server says) or (what is wrong, what mends it)."""
    serve = f"start one, e.g.: {_serve_command(need)}"
    headers = {"Accept": "application/json"}
    if need.api_key_env:
        key = os.environ.get(need.api_key_env, "")
        if not key:
            return (
                f"the environment variable {need.api_key_env} is not set",
                f"export {need.api_key_env}=...",
            )
        headers["Authorization"] = f"Bearer {key}"
    url = f"{need.base_url.rstrip('/')}/models"
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            models = json.loads(answer.read(1 << 22))["data"]
        served = [str(model["id"]) for model in models]
    except urllib.error.HTTPError as error:
        hint = serve
        if error.code in (401, 403):
            hint = f"check the key in {need.api_key_env or 'api_key_env'}"
        elif error.code == 404:
            hint = "base_url ends in /v1"
        return f"{url} answers {error.code} {error.reason}", hint
    except http.client.InvalidURL as error:
        return f"not an address: {url} ({_line(error)})", "correct base_url"
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return f"no answer from {url} ({_line(reason)})", serve
    except (ValueError, KeyError, TypeError):
        return f"{url} does not answer as OpenAI's API does", "base_url ends in /v1"
    if need.model not in served:
        shown = ", ".join(served[:5]) or "nothing"
        return f"serves {shown}", "set model to one that is served, or start another server"
    return "", f"answers, serves {need.model}"


def _serve_command(need: Endpoint) -> str:
    """Returns what starts a server where an endpoint is expected."""
    try:
        port = urlsplit(need.base_url).port
    except ValueError:  # no number; the request says so
        port = None
    words = ["vllm", "serve", need.model]
    if port not in (None, _VLLM_PORT):
        words += ["--port", str(port)]
    # The pairing of questions and answers can then be checked.
    return shlex.join([*words, "--enable-request-id-headers"])


def _endpoint_finding(stage: str, need: Endpoint, answer: tuple[str, str]) -> Finding:
    why, text = answer
    name = f"{need.model} at {need.base_url}"
    if why:
        return Finding(stage, "endpoint", name, "missing", why, text)
    return Finding(stage, "endpoint", name, "ok", text)


# ------------------------------------------------------------------------------ CPUs, GPUs, disk


def _devices_findings(stages: Sequence[StageSpec], address: str | None) -> list[Finding]:
    pools = _asked(stages)
    gpus = sum(pool.num_gpus * pool.min_actors for pool in pools)
    cpus = sum(pool.num_cpus * pool.min_actors for pool in pools)
    try:
        devices = devices_of(address, with_gpus=gpus > 0)
    except EngineError as error:
        return [Finding(ENGINE, "cluster", address or "Ray", "missing", error.message, error.hint)]
    room = f"{cpus:g} asked, {devices.num_cpus:g} {devices.where}"
    if cpus > devices.num_cpus:
        room += ": stages take turns"
    findings = [Finding(ENGINE, "cpu", "cores", "ok", room)]
    if gpus:
        enough = devices.num_gpus >= gpus
        findings.append(
            Finding(
                *(ENGINE, "gpu", "GPUs", "ok" if enough else "missing"),
                detail=f"{gpus:g} asked, {devices.num_gpus:g} {devices.where}",
                hint=""
                if enough
                else "set a smaller resources.num_gpus, or run on a cluster with --address",
            )
        )
        findings += _memory_findings(pools, devices)
    return findings


def _asked(stages: Sequence[StageSpec]) -> list[Pool]:
    """Returns the actor pools as they are on a cluster with room for all of them."""
    return plan_pools(stages, 10**6, 10**6)


def _memory_findings(pools: Sequence[Pool], devices: Devices) -> list[Finding]:
    """Returns, for every actor with a GPU, whether its models are likely to fit."""
    findings = []
    for pool in pools:
        share = pool.num_gpus
        needs = [need for _, config in pool.stages for need in needs_of(config)]
        # A tokenizer takes no room on a GPU.
        loaded = (n for n in needs if isinstance(n, Weights) and n.kind != "tokenizer")
        weights = list(dict.fromkeys(loaded))
        if not share or not weights:
            continue
        name = " + ".join(cls.name for cls, _ in pool.stages)
        states = [_find_or_none(one) for one in weights]
        known = [state for state in states if state is not None]
        if len(known) < len(states):
            findings.append(
                Finding(name, "gpu memory", f"{share:g} GPU", "unknown", "unknown until fetched")
            )
            continue
        asked = round(sum(state.num_bytes for state in known) * GPU_FACTOR)
        text = f"about {size_text(asked)} ({GPU_FACTOR:g} x weights)"
        if devices.gpu_bytes is None:
            detail = f"{text}; the memory of the GPUs {devices.where} is not known"
            findings.append(Finding(name, "gpu memory", f"{share:g} GPU", "unknown", detail))
            continue
        room = round(devices.gpu_bytes * share)
        fits = asked <= room
        findings.append(
            Finding(
                *(name, "gpu memory", f"{share:g} GPU", "ok" if fits else "missing"),
                detail=f"{text}, {size_text(room)} in its share of the smallest GPU",
                hint="" if fits else "raise resources.num_gpus, or name a smaller model",
            )
        )
    return findings


def _find_or_none(need: Weights) -> Found | None:
    try:
        state = find(need)
    except Exception:  # noqa: BLE001 - the check of the weights has said so
        return None
    return state if isinstance(state, Found) else None


def devices_of(address: str | None, *, with_gpus: bool) -> Devices:
    """Returns what a run would find: a cluster's devices, or this machine's.

    Args:
        address: Of a Ray cluster; None uses ``RAY_ADDRESS``, or this machine.
        with_gpus: Whether this machine is asked for GPUs, for which torch is imported.

    Raises:
        EngineError: If the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        from dataengine.runner import cluster_size

        num_cpus, num_gpus = cluster_size(address)
        return Devices(f"in the cluster at {address}", num_cpus, num_gpus, None)
    num_cpus = os.cpu_count() or 1
    if not with_gpus or importlib.util.find_spec("torch") is None:
        return Devices("here", num_cpus, 0, None)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
    return Devices("here", num_cpus, count, min(memory, default=None))


def _disk_findings(pipeline: Pipeline, corpus: str | None) -> list[Finding]:
    places = {"temporary files": tempfile.gettempdir()}
    for _, config in pipeline.stages:
        if isinstance(config, DownloadStage.Config) and config.cache_dir:
            places["fetched files"] = config.cache_dir
    if corpus and "://" not in corpus:
        places["corpus"] = corpus
    findings = []
    for name, place in places.items():
        path = Path(place).expanduser().absolute()
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        writable = os.access(path, os.W_OK)
        enough = free >= _LEAST_FREE_BYTES and writable
        detail = f"{size_text(free)} free at {path}" + ("" if writable else ", not writable")
        hint = f"make room: at least {size_text(_LEAST_FREE_BYTES)}"
        if not writable:
            hint = "name a folder that can be written to"
        elif name == "temporary files":
            hint += ", or set TMPDIR"
        findings.append(
            Finding(
                *(ENGINE, "disk", name, "ok" if enough else "missing"),
                detail=detail,
                hint="" if enough else hint,
            )
        )
    return findings


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------- output


def is_ready(findings: Sequence[Finding]) -> bool:
    """Returns whether nothing stands in a run's way."""
    return not any(finding.status == "missing" for finding in findings)


def show(findings: Sequence[Finding], console: Console, pipeline_file: str) -> None:
    """Prints findings as a table, and what to type, each command once.

    Args:
        findings: From `examine`.
        console: Where to.
        pipeline_file: Put into hints where they name a pipeline.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "kind", "name", "state", "detail"):
        table.add_column(name, overflow="fold")
    styles = {"ok": "green", "missing": "bold red", "unknown": "yellow"}
    for finding in findings:
        state = f"[{styles[finding.status]}]{finding.status}[/]"
        table.add_row(
            finding.stage, finding.kind, escape(finding.name), state, escape(finding.detail)
        )
    console.print(table)
    missing = [finding for finding in findings if finding.status == "missing"]
    console.print()
    if not missing:
        console.print("Nothing is missing.", highlight=False)
        return
    console.print(f"{len(missing)} missing. To mend:", highlight=False)
    mends: dict[str, list[str]] = {}
    for finding in missing:
        hint = finding.hint.replace(FETCH_HINT, f"dataengine prefetch {pipeline_file}")
        mends.setdefault(hint or "(see above)", []).append(finding.name)
    for hint, names in mends.items():
        line = f"  {hint}\n      {', '.join(dict.fromkeys(names))}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
