"""A checkpoint on the Hugging Face hub: listed, read by range requests, or downloaded into huggingface-hub's cache."""

from __future__ import annotations

import errno
import glob
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from .disk import Use, format_bytes
from .headers import CheckpointError

# what HTTP clients call it, old and new
_NO_ANSWER = {"TransportError", "ConnectionError", "Timeout", "TimeoutError"}
BLOCK_BYTES = 2**20  # the least that a read fetches: one request takes in most headers


class Unreachable(CheckpointError):
    """No answer came from the hub, or it may not be asked."""


class Hub:
    """A model repository at one commit; only the byte ranges that are read are fetched, and what is cached is not."""

    readers = 8  # requests at a time: a header is a few round trips

    def __init__(self, repository: str, revision: str | None):
        """Ask the hub for the files of `revision` (a branch, tag or commit; main if None).

        Raises CheckpointError for a repository or revision that cannot be read, Unreachable if nobody answers.
        """
        try:
            import huggingface_hub
            from huggingface_hub import constants
        except ImportError:
            raise CheckpointError(
                f"{repository} is no folder here, and reading it from the hub needs the package huggingface-hub: "
                f"pip install huggingface-hub, or use .venv/bin/python"
            ) from None
        self.label = repository
        self.incomplete = f"{repository} is incomplete on the hub: take another revision, or tell its owner"
        self.revision = revision
        self.page = f"{constants.ENDPOINT}/{repository}"
        self.cache = Path(constants.HF_HUB_CACHE)
        self.own_cache = self.cache / f"models--{repository.replace('/', '--')}"
        api = huggingface_hub.HfApi()
        with self._errors():
            # no other call of the client's has a time limit
            info = api.model_info(repository, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            self.commit = info.sha
            self._tree = {
                row.path: row
                for row in api.list_repo_tree(repository, recursive=True, revision=self.commit)
                if isinstance(row, huggingface_hub.hf_api.RepoFile)
            }
        self._system = huggingface_hub.HfFileSystem()

    # --- what there is ---

    def files(self) -> dict[str, int]:
        """Name -> bytes of every file at the top of the repository."""
        return {path: row.size for path, row in self._tree.items() if "/" not in path}

    def below(self, folder: str) -> dict[str, int]:
        """Path -> bytes of every file in `folder` and its subfolders."""
        return {path: row.size for path, row in self._tree.items() if path.startswith(f"{folder}/")}

    def identity(self, file: str) -> tuple[int, str]:
        """(bytes, hash of the contents), the hash being the file's name in the cache."""
        row = self._tree[file]
        return row.size, row.lfs.sha256 if row.lfs else row.blob_id

    def _cached(self, file: str) -> Path | None:
        size, name = self.identity(file)
        for path in (self.own_cache / "blobs" / name, self.own_cache / "snapshots" / self.commit / file):
            if path.exists():
                if path.stat().st_size != size:
                    raise CheckpointError(
                        f"{path} has {path.stat().st_size} bytes, {file} of {self.label} has {size}: delete it, and "
                        f"run the same command again"
                    )
                return path
        return None

    @contextmanager
    def open(self, file: str) -> Iterator[BinaryIO]:
        cached = self._cached(file)
        if cached is not None:
            with cached.open("rb") as handle:
                yield handle
            return
        path = f"{self.label}@{self.commit}/{file}"
        with self._errors(file), self._system.open(path, "rb", block_size=BLOCK_BYTES) as handle:
            yield handle

    # --- download ---

    def missing(self, files: Iterable[str]) -> dict[str, int]:
        """Those of `files` that the cache lacks -> bytes."""
        return {file: self._tree[file].size for file in files if self._cached(file) is None}

    def disk_use(self, files: Iterable[str]) -> Use:
        """What a download of `files` is going to write."""
        what = f"the download of {self.label} into {self.cache}"
        remedy = "set HF_HOME to a folder on another disk"
        if abandoned := self._parts():
            remedy += f", or {self._clean_up(abandoned)}"
        return Use(self.cache, sum(self.missing(files).values()), what, remedy)

    def download(self, files: list[str]) -> Path:
        """Fetch what the cache lacks of `files` -> the folder they are in.

        Where it breaks off, files that are whole stay in the cache, and the next download fetches the others.
        """
        from huggingface_hub import snapshot_download

        missing, abandoned = self.missing(files), self._parts()
        if abandoned:
            print(f"note: {self._clean_up(abandoned)}", file=sys.stderr)
        if missing:
            print(
                f"downloading {self.label} at commit {self.commit[:12]}: {len(missing)} of {len(files)} files, "
                f"{format_bytes(sum(missing.values()))}, into {self.own_cache}",
                file=sys.stderr,
            )
        patterns = [glob.escape(file) for file in files]
        with self._errors(download=True), self._stopped_at_once(abandoned):
            folder = snapshot_download(self.label, revision=self.revision, allow_patterns=patterns)
        if os.path.basename(folder) != self.commit:
            raise CheckpointError(
                f"{self.label} was changed on the hub meanwhile; run the same command again"
            )
        return Path(folder)

    def _parts(self) -> set[Path]:
        """Files of the cache that downloads are, or were, in the middle of."""
        return set(self.own_cache.glob("blobs/*.incomplete"))

    def _clean_up(self, parts: set[Path]) -> str:
        nbytes = format_bytes(sum(path.stat().st_size for path in parts))
        return (
            f"unless another download of {self.label} is running, delete the {nbytes} that killed ones left behind: "
            f"rm {self.own_cache}/blobs/*.incomplete"
        )

    @contextmanager
    def _stopped_at_once(self, others: set[Path]) -> Iterator[None]:
        """On Ctrl-C the client would first finish every file that it is in the middle of: minutes, unsaid."""

        def stop(*_: object) -> None:
            for part in self._parts() - others:
                part.unlink(missing_ok=True)
            print("\ninterrupted; the same command goes on from here", file=sys.stderr, flush=True)
            os._exit(1)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # --- errors ---

    @contextmanager
    def _errors(self, file: str | None = None, download: bool = False) -> Iterator[None]:
        """Whatever huggingface-hub and its HTTP client raise -> CheckpointError, in one line."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            raise self._explain(error, file, download) from None

    def _explain(self, error: Exception, file: str | None, download: bool) -> CheckpointError:
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        kinds = {base.__name__ for found in chain for base in type(found).__mro__}
        statuses = {getattr(getattr(found, "response", None), "status_code", None) for found in chain}
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "GatedRepoError" in kinds:
            refused = "the account of HF_TOKEN has no access" if 403 in statuses else "no HF_TOKEN is set"
            return CheckpointError(
                f"{self.label} is gated, and {refused}: accept its terms on {self.page}, and set HF_TOKEN to a token "
                f"of that account"
            )
        if "RevisionNotFoundError" in kinds:
            return CheckpointError(
                f"{self.label} has no revision {self.revision!r}; name a branch, tag or commit of {self.page}"
            )
        if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
            urls = [
                str(found.response.url) for found in chain if getattr(found, "response", None) is not None
            ]
            file = file or unquote(urls[0].partition(f"/resolve/{self.commit}/")[2])
            return CheckpointError(
                f"{self.label} lists {file}, which the hub does not have; {self.incomplete}"
            )
        if "RepositoryNotFoundError" in kinds or 401 in statuses:
            return CheckpointError(
                f"{self.label} is no folder here, and no model on the hub ({self.page}) that may be read: check the "
                f"name; for a private one set HF_TOKEN to a token that has access"
            )
        if any(getattr(found, "errno", None) == errno.ENOSPC for found in chain):
            return CheckpointError(
                f"the disk of {self.cache} is full; free some of it, or set HF_HOME to a folder on another disk, and "
                f"run the same command again"
            )
        if download:
            return CheckpointError(
                f"the download of {self.label} broke off ({said}); run the same command again: whole files are kept"
            )
        if "OfflineModeIsEnabled" in kinds:
            return Unreachable(
                f"{self.label} is no folder here, and HF_HUB_OFFLINE forbids to ask the hub: unset it"
            )
        if kinds & _NO_ANSWER or any(status and status >= 500 for status in statuses):
            return Unreachable(
                f"{self.label} is no folder here, and the hub ({self.page}) cannot be reached ({said}): check the "
                f"network, proxies and HF_ENDPOINT"
            )
        return CheckpointError(f"{self.label} cannot be read from the hub ({said}); try again later")


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The folder of the cache that was downloaded last for `revision`, if any; nothing is asked of the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository, revision=revision, local_files_only=True, allow_patterns=["config.json"]
            )
        )
    except FileNotFoundError:
        return None
