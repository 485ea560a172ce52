# SPDX-License-Identifier: Apache-2.0
"""Weights of a pipeline: where they lie on this machine, and how they come here.

Every library finds what is fetched here by itself: the Hugging Face cache, whisper's, open_clip's.
What transformers would not load is left where it is: of the same weights in several formats only
the first of safetensors, PyTorch's own and ``.pt`` comes.
"""

import errno
import glob
import hashlib
import http.client
import json
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from dataengine.config import Pipeline
from dataengine.errors import DependencyError, EngineError
from dataengine.models.pretrained import is_folder_name
from dataengine.needs import Need, Weights
from dataengine.stage import Settings

LOCAL_SCHEMA, HUB_SCHEMA = "local-dir:", "hf-hub:"
"""What open_clip writes before a folder and before a hub id."""

WHISPER_FILES = {
    **{name: name for size in ("tiny", "base", "small", "medium") for name in (size, f"{size}.en")},
    **{name: name for name in ("large-v1", "large-v2", "large-v3", "large-v3-turbo")},
    "large": "large-v3",
    "turbo": "large-v3-turbo",
}
"""Name that openai-whisper knows -> its file in the cache, without ``.pt``."""

FETCH_HINT = "dataengine prefetch PIPELINE"
"""What brings weights that only have to be fetched."""
_BRING = "put the file there, or change the setting"

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_OTHER_LIBRARIES = (
    *(".onnx", ".onnx_data", ".gguf", ".ggml", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel"),
    *(".mlpackage", ".pb", ".engine", ".nemo", ".npz", ".tar", ".zip"),
)
_NOT_FOR_LOADING = (
    *(".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4", ".wav", ".mp3"),
    *(".flac", ".csv", ".parquet", ".ipynb", ".sh", ".html"),
)
_OTHER_FOLDERS = frozenset(
    ["onnx", "openvino", "coreml", "original", "runs", "logs", "checkpoints", "assets", "images"]
)
_TRAINING = ("optimizer", "scheduler", "rng_state", "training_args", "trainer_state", "scaler")
_VOCABULARIES = (
    *(
        ("tokenizer.json",),
        ("vocab.txt",),
        ("vocab.json", "merges.txt"),
        ("vocab.json", "source.spm"),
    ),
    *(("tokenizer.model",), ("spiece.model",), ("sentencepiece.bpe.model",), ("spm.model",)),
    *(("vocab.bpe", "encoder.json"), ("tokenizer.tiktoken",), ("tekken.json",)),
)
"""Files of which any one group is a whole vocabulary, by the names that transformers' tokenizers use."""
_TOKENIZER_EXTRAS = frozenset(
    [
        *("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("chat_template.jinja", "chat_template.json", "target.spm", "normalizer.json"),
    ]
)
"""Small files that a tokenizer reads beside its vocabulary; ``config.json`` tells its class."""
_CHUNK = 1 << 20
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Found:
    """Weights on this machine.

    Attributes:
        path: Their file or folder.
        num_bytes: Of the weights alone.
    """

    path: Path
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Missing:
    """Why weights cannot be used as they are: what is wrong, and what to type or change."""

    why: str
    hint: str = FETCH_HINT


@dataclass(frozen=True, slots=True)
class Fetch:
    """What is to be fetched of one model.

    Attributes:
        weights: Which.
        num_bytes: Still to come; None where the server does not say.
        files: File names on the hub, or one URL.
        repo: Hub id; empty for a URL.
        target: Where a URL's file goes.
        sha256: Beginning of the hash of a URL's file; empty where it is not known.
    """

    weights: Weights
    num_bytes: int | None
    files: tuple[str, ...]
    repo: str = ""
    target: Path | None = None
    sha256: str = ""


def needs_of(settings: Settings) -> Iterator[Need]:
    """Yields what settings need, and those nested in them."""
    yield from settings.needs()
    for name in type(settings).model_fields:
        yield from _nested(getattr(settings, name))


def _nested(value: object) -> Iterator[Need]:
    if isinstance(value, Settings):
        yield from needs_of(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _nested(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nested(item)


def weights_of(pipeline: Pipeline) -> list[Weights]:
    """Returns the weights of a pipeline, each once, in the order of its stages."""
    needs = (need for _, config in pipeline.stages for need in needs_of(config))
    return list(dict.fromkeys(need for need in needs if isinstance(need, Weights)))


def label(weights: Weights) -> str:
    """Returns how weights are called in messages."""
    at = f"@{weights.revision}" if weights.revision else ""
    return f"{weights.kind} {weights.name or '(in this package)'}{at}"


# ---------------------------------------------------------------------------------- what is here


def find(weights: Weights) -> Found | Missing:
    """Returns where weights lie on this machine; asks no server.

    A tag of open_clip has to be looked up in that package, which imports torch.
    """
    match weights.kind:
        case "hub":
            return _find_hub(weights.name, weights.revision)
        case "tokenizer":
            return _find_hub(weights.name, weights.revision, kind="tokenizer")
        case "whisper":
            return _find_whisper(weights.name)
        case "open_clip":
            return _find_open_clip(weights.name, weights.revision)
        case "file":
            path = Path(weights.name).expanduser()
            if path.is_file():
                return Found(path, path.stat().st_size)
            return Missing(f"no such file: {path}", weights.mend or _BRING)


def _find_hub(
    name: str, revision: str, names: tuple[str, ...] = (), kind: str = "hub"
) -> Found | Missing:
    """Returns the folder of a model; one of ``names`` is its weights file, if any are given."""
    folder = Path(name).expanduser()
    if folder.is_dir() and kind == "tokenizer":
        return _whole_tokenizer(folder, "the folder holds no tokenizer: fetch or copy it again")
    if folder.is_dir():
        return _complete(folder, names, "the folder is not a whole model: fetch or copy it again")
    if is_folder_name(name):
        return Missing(f"no such folder: {name}", "change the setting, or put the model there")
    snapshot = _snapshot(name, revision)
    if snapshot is None:
        return Missing("not in the Hugging Face cache")
    if kind == "tokenizer":
        return _whole_tokenizer(snapshot, FETCH_HINT)
    return _complete(snapshot, names, FETCH_HINT)


def _snapshot(name: str, revision: str) -> Path | None:
    """Returns a model's folder in the Hugging Face cache, by the cache's documented layout."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        commit = (cache / "refs" / (revision or "main")).read_text().strip()
    except OSError:
        commit = revision  # a commit itself
    folder = cache / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def _complete(folder: Path, names: tuple[str, ...], hint: str) -> Found | Missing:
    """Returns a model's folder, unless a file that would be loaded is not there."""
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    if names:
        weights = [name for name in names if name in files][:1]
        expected = list(weights)
    else:
        wanted = wanted_files(files)
        weights = [name for name in wanted if name.endswith(_WEIGHTS)]
        expected = [name for index in wanted for name in _indexed(folder / index)]
    if not weights:
        return Missing(f"no weights in {folder}", hint)
    lacking = sorted(set(expected) - set(files))
    if lacking:
        return Missing(f"{len(lacking)} files are missing in {folder}, such as {lacking[0]}", hint)
    return Found(folder, sum((folder / name).stat().st_size for name in weights))


def _whole_tokenizer(folder: Path, hint: str) -> Found | Missing:
    """Returns a tokenizer's folder, unless its vocabulary is not there."""
    files = tokenizer_files(path.name for path in folder.iterdir() if path.is_file())
    if not files:
        return Missing(f"no tokenizer in {folder}", hint)
    return Found(folder, sum((folder / name).stat().st_size for name in files))


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Returns the files of a model on the hub that its tokenizer reads; none without a vocabulary.

    Args:
        names: All of its files, with ``/`` between folders.
    """
    names = list(names)
    whole = [group for group in _VOCABULARIES if set(group) <= set(names)]
    wanted = _TOKENIZER_EXTRAS.union(*whole)
    return [name for name in names if name in wanted] if whole else []


def _indexed(index: Path) -> list[str]:
    """Returns the files that an index of weights in several files names."""
    if not index.name.endswith(".index.json"):
        return []
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return [f"{index.name} (readable)"]


def _find_whisper(name: str) -> Found | Missing:
    path = Path(name)
    if name in WHISPER_FILES:
        path = _whisper_cache() / f"{WHISPER_FILES[name]}.pt"
        if not path.is_file():
            return Missing(f"not in {path.parent}")
    elif not path.is_file():
        return Missing(
            "whisper knows no such model, and there is no such file",
            f"name one of {', '.join(WHISPER_FILES)}, or a checkpoint file",
        )
    if not _whole_archive(path):
        return Missing(f"cut short: {path}", f"rm {path} && {FETCH_HINT}")
    return Found(path, path.stat().st_size)


def _whisper_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
    return Path(home) / "whisper"


def _whole_archive(path: Path) -> bool:
    """Returns whether a checkpoint that is a ZIP file, as torch writes them, has its end."""
    import zipfile

    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    return not is_zip or zipfile.is_zipfile(path)


def _find_open_clip(name: str, tag: str) -> Found | Missing:
    if not name:
        from dataengine.models.clip import BUNDLED_CLIP

        name = f"{LOCAL_SCHEMA}{BUNDLED_CLIP}"
    if name.startswith(LOCAL_SCHEMA):
        folder = Path(name.removeprefix(LOCAL_SCHEMA)).expanduser()
        if not (folder / "open_clip_config.json").is_file():
            return Missing(f"no open_clip_config.json in {folder}", "change the setting")
        return _complete(folder, (), "put open_clip_model.safetensors there")
    if name.startswith(HUB_SCHEMA):
        return _find_hub(name.removeprefix(HUB_SCHEMA), "", _OPEN_CLIP)
    if os.path.isfile(tag):
        return Found(Path(tag), os.path.getsize(tag))
    match _open_clip_origin(name, tag):
        case Missing() as missing:
            return missing
        case ("hub", repo, names):
            return _find_hub(repo, "", names)
        case (_, url, _):
            path = _url_target(url)
            return Found(path, path.stat().st_size) if path.is_file() else Missing(f"not in {path}")


def _open_clip_origin(name: str, tag: str) -> tuple[str, str, tuple[str, ...]] | Missing:
    """Returns (``hub``, id, names its file may have) or (``url``, URL, ()) of a tag of open_clip."""
    try:
        import open_clip
    except ImportError:
        return Missing("open_clip is not installed", "uv sync --extra ingest")
    known = open_clip.list_pretrained_tags_by_model(name)
    if not tag or not open_clip.get_pretrained_cfg(name, tag):
        told = f"name one of {', '.join(known)}" if known else "see open_clip.list_pretrained()"
        return Missing(f"open_clip knows no weights {tag or '(none named)'} of {name}", told)
    config = open_clip.get_pretrained_cfg(name, tag)
    if origin := config.get("hf_hub", ""):
        repo, _, file = origin.rpartition("/")
        stem, suffix = os.path.splitext(file)
        safe = (f"{stem}.safetensors",) if suffix in (".bin", ".pth") else ()
        return "hub", repo, (*safe, file) if file else _OPEN_CLIP
    return "url", config["url"], ()


def _url_target(url: str) -> Path:
    """Returns where open_clip keeps what it fetches by URL."""
    return Path.home() / ".cache" / "clip" / url.rsplit("/", 1)[-1]


# ------------------------------------------------------------------------------ what is worth it


def wanted_files(names: Iterable[str]) -> list[str]:
    """Returns the files of a model on the hub that are read when it is loaded.

    Args:
        names: All of its files, with ``/`` between folders.
    """
    names = list(names)
    kept = [name for name in names if _may_be_read(PurePosixPath(name))]
    weights = [name for name in kept if _is_weights(name)]
    chosen: set[str] = set()
    for folder in {str(PurePosixPath(name).parent) for name in weights}:
        chosen |= _preferred([n for n in weights if str(PurePosixPath(n).parent) == folder])
    # Optimiser states and other people's formats in subfolders are not the model.
    if any("/" not in name for name in chosen):
        chosen = {name for name in chosen if "/" not in name}
    indices = {name.removesuffix(".index.json") for name in chosen}
    return [
        name
        for name in kept
        if (name in chosen if _is_weights(name) else _index_wanted(name, indices))
    ]


def _is_weights(name: str) -> bool:
    return name.endswith((*_WEIGHTS, ".safetensors.index.json", ".bin.index.json"))


def _index_wanted(name: str, indices: set[str]) -> bool:
    return not name.endswith(".index.json") or name.removesuffix(".index.json") in indices


def _may_be_read(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    other = bool(_OTHER_FOLDERS & set(path.parts[:-1])) or path.name.startswith(_TRAINING)
    suffix = path.suffix.lower()
    return not (
        hidden or other or suffix in _OTHER_LIBRARIES or suffix in _NOT_FOR_LOADING
    ) and path.name.upper() not in {"LICENSE", "NOTICE", "LICENCE"}


def _preferred(names: Sequence[str]) -> set[str]:
    """Returns the weights of one folder in the one format that transformers takes first."""
    base = {name: PurePosixPath(name).name for name in names}
    for stem, suffix in (
        ("model", ".safetensors"),
        ("", ".safetensors"),
        ("pytorch_model", ".bin"),
    ):
        chosen = {
            name
            for name in names
            if base[name].startswith(stem)
            and base[name].removesuffix(".index.json").endswith(suffix)
            # Of model.safetensors and model.fp16.safetensors the plain one is loaded.
            and not _is_variant(base[name], suffix)
        }
        if chosen:
            return chosen
    for suffix in _WEIGHTS:
        chosen = {n for n in names if base[n].removesuffix(".index.json").endswith(suffix)}
        if chosen:
            return chosen
    return set()


def _is_variant(name: str, suffix: str) -> bool:
    stem = name.removesuffix(".index.json").removesuffix(suffix)
    return stem.endswith((".fp16", ".bf16", ".fp32", ".non_ema", ".int8"))


# -------------------------------------------------------------------------------------- fetching


def plan_fetch(weights: Weights) -> Fetch | Found | Missing:
    """Returns what has to be fetched for weights; asks the server where they come from.

    Returns:
        `Found` where they are here already, `Missing` where they cannot be fetched.
    """
    here = find(weights)
    kind, origin, names = weights.kind, weights.name, ()
    is_local = kind in ("hub", "tokenizer") and Path(origin).expanduser().is_dir()
    if kind == "file" or is_local:
        return here
    if kind == "open_clip":
        if not origin or origin.startswith(LOCAL_SCHEMA) or os.path.isfile(weights.revision):
            return here
        if origin.startswith(HUB_SCHEMA):
            return _plan_hub(weights, origin.removeprefix(HUB_SCHEMA), "", here, _OPEN_CLIP)
        match _open_clip_origin(origin, weights.revision):
            case Missing() as missing:
                return missing
            case ("hub", repo, names):
                return _plan_hub(weights, repo, "", here, names)
            case (_, url, _):
                return here if isinstance(here, Found) else _plan_url(weights, url)
    if kind == "whisper":
        if isinstance(here, Found) or origin not in WHISPER_FILES:
            return here
        try:
            import whisper
        except ImportError:
            return Missing("whisper is not installed", "uv sync --extra ingest")
        return _plan_url(weights, whisper._MODELS[origin])  # whisper tells its URLs nowhere else
    return _plan_hub(weights, origin, weights.revision, here)


def _plan_hub(
    weights: Weights,
    repo: str,
    revision: str,
    here: Found | Missing,
    names: tuple[str, ...] = (),
) -> Fetch | Found | Missing:
    from huggingface_hub import snapshot_download

    if isinstance(here, Missing) and here.why.startswith("no such folder"):
        return here
    try:
        entries = snapshot_download(repo, revision=revision or None, dry_run=True)
    except Exception as error:  # noqa: BLE001 - the hub's client raises its own, httpx's, the system's
        if isinstance(here, Found):
            return here  # it may be a newer one that could not be asked for
        return explain(error)
    if weights.kind == "tokenizer":
        wanted = weight = tokenizer_files(entry.filename for entry in entries)
        if not wanted:
            return Missing("there is no tokenizer in it", "name another model")
    elif names:
        files = [entry.filename for entry in entries]
        weight = [name for name in names if name in files][:1]
        wanted = [n for n in wanted_files(files) if not _is_weights(n)] + weight
    else:
        wanted = wanted_files(entry.filename for entry in entries)
        weight = [name for name in wanted if _is_weights(name)]
    if not weight:
        return Missing("there are no weights that can be loaded", "name another model")
    lacking = [e for e in entries if e.filename in wanted and not e.is_cached]
    if not lacking:
        return here
    size = sum(entry.file_size or 0 for entry in lacking)
    return Fetch(weights, size, tuple(wanted), repo)


def _plan_url(weights: Weights, url: str) -> Fetch | Missing:
    file = url.rsplit("/", 1)[-1]
    if weights.kind == "whisper":
        target, sha256 = _whisper_cache() / file, url.split("/")[-2]
    else:
        target = _url_target(url)
        sha256 = url.split("/")[-2] if "openaipublic" in url else ""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            size = answer.headers.get("Content-Length")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return explain(error)
    part = _part(target)
    have = part.stat().st_size if part.is_file() else 0
    left = max(0, int(size) - have) if size else None
    return Fetch(weights, left, (url,), target=target, sha256=sha256)


def fetch(plan: Fetch, console: Console) -> Found | Missing:
    """Fetches what a plan says, going on where an earlier attempt has ended.

    Args:
        plan: From `plan_fetch`.
        console: Where progress goes.
    """
    place = plan.target or _hub_cache()
    free = _free_bytes(place)
    if plan.num_bytes and plan.num_bytes > free:
        return Missing(
            f"{size_text(plan.num_bytes)} to fetch, {size_text(free)} free at {place}",
            "make room, or set HF_HOME or XDG_CACHE_HOME to a larger disk",
        )
    try:
        if plan.target:
            _download(plan.files[0], plan.target, plan.sha256, console)
        else:
            from huggingface_hub import snapshot_download

            snapshot_download(
                plan.repo,
                revision=None
                if plan.weights.kind == "open_clip"
                else plan.weights.revision or None,
                allow_patterns=[glob.escape(name) for name in plan.files],
            )
        if plan.weights.kind == "open_clip":
            import open_clip

            open_clip.get_tokenizer(plan.weights.name)  # some models' tokenizers lie elsewhere
    except Exception as error:  # noqa: BLE001 - as above
        return explain(error)
    return find(plan.weights)


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _free_bytes(path: Path) -> int:
    """Returns the free space where a path is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _download(url: str, target: Path, sha256: str, console: Console) -> None:
    """Downloads a file, which appears under its name whole and checked, or not at all.

    Raises:
        OSError: If it fails; what has come stays, and the next call goes on from there.
        DependencyError: If the file is not the one that was expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part(target)
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bars:
        try:
            answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # all of it has come before
                raise
        else:
            with answer, part.open("ab" if answer.status == 206 else "wb") as file:
                have = have if answer.status == 206 else 0
                length = answer.headers.get("Content-Length")
                total = have + int(length) if length else None
                task = bars.add_task(target.name, total=total, completed=have)
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    bars.update(task, advance=len(chunk))
            if total and part.stat().st_size < total:
                raise ConnectionError("the connection broke off; the next call goes on")
    if sha256:
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(sha256):
            part.unlink()
            raise DependencyError(f"{url} is not the file it should be", "try again later")
    os.replace(part, target)


def explain(error: BaseException) -> Missing:
    """Returns what a failed fetch means for its user, in one line."""
    from huggingface_hub import errors

    while (
        isinstance(error, errors.DryRunError | errors.LocalEntryNotFoundError) and error.__cause__
    ):
        error = error.__cause__
    login = "set HF_TOKEN, or log in with: hf auth login"
    match error:
        case EngineError():
            return Missing(error.message, error.hint)
        case errors.OfflineModeIsEnabled():
            return Missing("HF_HUB_OFFLINE forbids fetching", "unset HF_HUB_OFFLINE")
        case errors.GatedRepoError():
            return Missing("its authors want their terms accepted, on its page on the hub", login)
        case errors.RepositoryNotFoundError():
            return Missing("no such model on the hub, or a private one", f"check the name; {login}")
        case errors.RevisionNotFoundError():
            return Missing("the model has no such revision", "check the setting revision")
        case errors.HFValidationError():
            return Missing("neither a folder nor a hub id", "check the name")
        case OSError(errno=errno.ENOSPC):
            return Missing("the disk is full", "make room, or set HF_HOME to a larger disk")
        case errors.HfHubHTTPError():
            return Missing(f"the hub answers: {_line(error)}", "try again later")
        case urllib.error.HTTPError():
            return Missing(f"{error.url} answers {error.code} {error.reason}", "try again later")
        case _:
            name = type(error).__name__
            if name in _UNREACHABLE or isinstance(error, urllib.error.URLError | ConnectionError):
                return Missing(
                    f"its server cannot be reached ({_line(error)})", "check the network"
                )
            return Missing(f"{name}: {_line(error)}", "")


_UNREACHABLE = frozenset(
    [
        "ConnectError",
        "ConnectTimeout",
        "ReadTimeout",
        "ProxyError",
        "ReadError",
        "RemoteProtocolError",
    ]
)
"""The HTTP client's own errors, by name: which client it is depends on the hub package's version."""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def size_text(num_bytes: int | None) -> str:
    """Returns a size as a person says it."""
    if num_bytes is None:
        return "unknown size"
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:.1f} {unit}"
    return f"{num_bytes} bytes"


def prefetch(pipeline: Pipeline, console: Console, *, dry_run: bool = False) -> bool:
    """Fetches the weights of a pipeline that are not here, and says how each ended in one line.

    Args:
        pipeline: Whose.
        console: Where lines and progress go.
        dry_run: Only says what would be fetched.

    Returns:
        Whether all of them are here now, or could be fetched in a dry run.
    """
    weights = weights_of(pipeline)
    if not weights:
        console.print(f"{pipeline.name} needs no weights beyond its packages.", highlight=False)
    good = True
    total = 0
    for one in weights:
        with console.status(f"Asking for {label(one)}"):
            state = plan_fetch(one)
        verb = "there"
        if isinstance(state, Fetch):
            total += state.num_bytes or 0
            if dry_run:
                _say(console, "to fetch", one, size_text(state.num_bytes))
                continue
            _say(console, "fetching", one, size_text(state.num_bytes))
            state, verb = fetch(state, console), "fetched"
        if isinstance(state, Found):
            _say(console, verb, one, f"{size_text(state.num_bytes)} in {state.path}")
        elif isinstance(state, Missing):
            good = False
            # Who is here already needs no advice to come here.
            hint = f" ({state.hint})" if state.hint and "prefetch" not in state.hint else ""
            _say(console, "MISSING", one, f"{state.why}{hint}")
    if dry_run and total:
        console.print(f"{size_text(total)} to fetch", highlight=False)
    return good


def _say(console: Console, state: str, weights: Weights, text: str) -> None:
    line = f"{state:<9} {label(weights)}: {text}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
