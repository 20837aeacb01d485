"""From what a person types after `--model` to a checkpoint folder.

Owns the search (a folder, `nano`, a model in the local Hugging Face cache) and the download into
that cache. It does not look into the files: `Checkpoint.open` does.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from hybridk2.checkpoint.progress import LoadProgress
from hybridk2.errors import CheckpointError

NANO = "nano"

# What inference needs. Python files of a model repository are never fetched, let alone run.
_NEEDED_FILES = ("*.safetensors", "*.json", "tiktoken.model")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_POLL_SECONDS = 0.25


def locate_model(model: str) -> Path:
    """The checkpoint folder that `model` means.

    model: a folder; "nano", the embedded model; or a Hugging Face id such as
    "moonshotai/Kimi-K2-Thinking" that is in the local cache. Raises CheckpointError saying what
    can be done, for example how to download it.
    """
    if model == NANO:
        return _nano_folder()
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: expected the folder of a checkpoint, found a file")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model}: there is no such folder, and it is no Hugging Face id "
            '(organisation/name). Give a checkpoint folder, an id, or "nano"'
        )
    hub = _import_hub(model)
    config = hub.try_to_load_from_cache(model, "config.json")
    if not isinstance(config, str):
        raise CheckpointError(
            f"{model}: no such folder, and not in the local Hugging Face cache "
            f"({hub.constants.HF_HUB_CACHE}). Run the command again with --download to fetch it"
        )
    return Path(config).parent


def download_model(hub_id: str, on_progress: Callable[[LoadProgress], None]) -> Path:
    """Fetch a model into the local Hugging Face cache, or complete it, and return its folder.

    Files that an interrupted download had finished are kept. on_progress counts what was missing
    at the start; it is called from another thread, about four times a second, and once at the end.
    Raises CheckpointError when the hub cannot be reached or
    refuses.
    """
    if not _HUB_ID.fullmatch(hub_id):
        raise CheckpointError(f"{hub_id}: expected a Hugging Face id (organisation/name)")
    hub = _import_hub(hub_id)
    blobs = Path(hub.constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}", "blobs")
    try:
        files = hub.HfApi().model_info(hub_id, files_metadata=True).siblings
        needed = hub.utils.filter_repo_objects(
            files, allow_patterns=list(_NEEDED_FILES), key=lambda file: file.rfilename
        )
        missing_bytes = sum(file.size for file in needed if not (blobs / _blob_name(file)).exists())
        with _CacheWatch(blobs, missing_bytes, on_progress):
            folder = hub.snapshot_download(
                hub_id, allow_patterns=list(_NEEDED_FILES), tqdm_class=_silent_bar(hub)
            )
    except hub.errors.GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id}: the hub asks for consent first. Accept the terms on the model's page, "
            "then run `hf auth login`"
        ) from error
    except hub.errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id}: the hub knows no such model, or it is private and needs `hf auth login`"
        ) from error
    except Exception as error:
        # What a broken connection raises belongs to the HTTP library under the client, which has
        # changed from version to version.
        raise CheckpointError(
            f"{hub_id}: the download failed: {error}. Run the command again to resume it"
        ) from error
    return Path(folder)


def _nano_folder() -> Path:
    folder = Path(str(resources.files("hybridk2"))) / "nano" / "checkpoint"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: the embedded model is missing from this installation. Install HybridK2 "
            "again, or give --model a checkpoint folder"
        )
    return folder


def _import_hub(model: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise CheckpointError(
            f"{model}: there is no such folder, and Hugging Face models need "
            "`pip install 'hybridk2[hub]'`"
        ) from error
    return huggingface_hub


def _blob_name(file: Any) -> str:
    """What the cache calls a file's content: its git hash, or its SHA-256 when git LFS keeps it."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def _silent_bar(hub: Any) -> type:
    """A progress bar class for the hub's client that shows nothing: its bars would cross ours."""

    class SilentBar(hub.utils.tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentBar


class _CacheWatch:
    """Reports how the cached files grow while the hub's client downloads.

    The client's own progress hooks differ from version to version; the cache's layout does not.
    """

    def __init__(
        self, blobs: Path, missing_bytes: int, on_progress: Callable[[LoadProgress], None]
    ) -> None:
        self._blobs = blobs
        self._missing_bytes = missing_bytes
        self._on_progress = on_progress
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = time.monotonic()
        self._sizes_at_start = self._sizes()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        if error[0] is None:
            self._report(self._missing_bytes)

    def _watch(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            grown_bytes = sum(
                size - self._sizes_at_start.get(name, 0) for name, size in self._sizes().items()
            )
            self._report(min(grown_bytes, self._missing_bytes))

    def _report(self, done_bytes: int) -> None:
        seconds = time.monotonic() - self._start
        self._on_progress(LoadProgress("download", done_bytes, self._missing_bytes, seconds))

    def _sizes(self) -> dict[str, int]:
        if not self._blobs.is_dir():
            return {}
        sizes = {}
        for entry in os.scandir(self._blobs):
            try:
                sizes[entry.name] = entry.stat().st_size
            except FileNotFoundError:  # a partial file that has just got its final name
                continue
        return sizes
