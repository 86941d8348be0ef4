#!/usr/bin/env python3
"""Apply, check or reverse this project's patch series on an installed vLLM or an unpacked tree.

    devtools/patches/apply.py                     the vLLM of the interpreter that runs this
    devtools/patches/apply.py --python PYTHON     the vLLM of another interpreter
    devtools/patches/apply.py --site DIR          any folder that contains vllm/

The whole series is applied in memory first (no fuzz, see patch_series.py) and every patched file must
compile; only then is anything written. The originals are kept in vllm/.cutedsl_nvfp4_originals, what was
applied in vllm/.cutedsl_nvfp4_patches.json: so a run that was interrupted is completed by the next one, a
series that changed replaces the old one, and --reverse restores every byte.

Exit status: 0 done (or, with --check, applied exactly), 1 not applied or refused, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.patches.series import (
    Conflict,
    Overlay,
    PatchSyntaxError,
    Series,
    apply_patch,
    is_upstream,
    read_series,
    tree_reader,
    tree_version,
)

STAMP = "vllm/.cutedsl_nvfp4_patches.json"
ORIGINALS = "vllm/.cutedsl_nvfp4_originals"
DEFAULT_PATCHES = Path(__file__).resolve().parents[2] / "patches"


class Refused(Exception):
    """The tree cannot be patched (or is not patched); nothing was written."""


def find_site() -> Path:
    """The folder that contains the running interpreter's vllm/, without importing it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise Refused(
            f"{sys.executable} has no vLLM installed; install it (devtools/setup/setup_env.py), or name an interpreter "
            f"with --python or a folder with --site"
        )
    return Path(next(iter(spec.submodule_search_locations))).resolve().parent


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder`; leaves nothing behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise Refused(f"another apply_patches works on {folder}; wait for it to end") from None
    finally:
        os.close(handle)


def sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode("utf-8")).hexdigest()


class Site:
    """One vLLM tree and what is recorded about its patches."""

    def __init__(self, root: Path):
        self.root = root
        self.distribution, self.version = tree_version(root)
        self.stamp = self._read_stamp()
        self.disk = tree_reader(root)
        self.originals = tree_reader(root / ORIGINALS)

    def _read_stamp(self) -> dict | None:
        file = self.root / STAMP
        if not file.is_file():
            return None
        stamp = json.loads(file.read_text(encoding="utf-8"))
        # pip uninstall leaves the stamp behind; it says nothing about another vLLM installed later
        return stamp if stamp["vllm_version"] == self.version else None

    def pristine(self, path: str) -> str | None:
        """The file as vLLM shipped it."""
        recorded = self.stamp["files"].get(path) if self.stamp else None
        if recorded is None:
            return self.disk(path)
        current = self.disk(path)
        if sha256(current) == recorded["before"]:
            return current
        if sha256(current) != recorded["after"]:
            raise Refused(
                f"{self.root / path} is neither vLLM's file nor the patched one: it was edited after "
                f"patching. Reinstall {self.distribution}=={self.version} into {self.root} and run this again"
            )
        original = self.originals(path) if recorded["before"] else None
        if sha256(original) != recorded["before"]:
            raise Refused(
                f"{self.root / ORIGINALS / path}, the original of a patched file, is missing or changed. "
                f"Reinstall {self.distribution}=={self.version} into {self.root} and run this again"
            )
        return original

    def differences(self, series: Series) -> list[str]:
        """Why the tree is not exactly `series` applied; empty if it is."""
        if self.stamp is None:
            return ["no patch is recorded as applied"] if series.patches else []
        reasons = []
        if self.stamp["state"] != "applied":
            reasons.append("an earlier run was interrupted while writing")
        if self.stamp["series_sha256"] != series.sha256:
            reasons.append(
                "a different series is applied: " + (", ".join(self.stamp["patches"]) or "an empty one")
            )
        for path, recorded in self.stamp["files"].items():
            if sha256(self.disk(path)) != recorded["after"]:
                reasons.append(f"{path} does not hold the patched text")
        return reasons

    def plan(self, series: Series) -> dict[str, str | None]:
        """Text of every file the series changes, computed from vLLM's own files."""
        overlay = Overlay(self.pristine)
        for patch in series.patches:
            if self.version not in patch.versions:
                raise Refused(
                    f"{self.root} holds {self.distribution} {self.version}, but {patch.name} applies to "
                    f"{', '.join(patch.versions) or 'no version (Applies-To is missing)'}. Install that "
                    f"version, or see what has to change with `make patches-check VERSION={self.version}`"
                )
            try:
                apply_patch(patch, overlay)
            except Conflict as conflict:
                if is_upstream(patch, overlay):
                    raise Refused(
                        f"{patch.name} is already in {self.root} ({self.distribution} {self.version}): its "
                        f"reverse applies. Upstream has it: drop it from series. If this tree was patched by "
                        f"other means, reinstall vLLM"
                    ) from None
                raise Refused(
                    f"{patch.name} does not apply to {self.distribution} {self.version}: {conflict}"
                ) from None
        for path, text in overlay.changed.items():
            if text is not None and path.endswith(".py"):
                try:
                    compile(text, path, "exec", dont_inherit=True)
                except SyntaxError as error:
                    raise Refused(
                        f"{path} does not compile once patched: line {error.lineno}: {error.msg}"
                    ) from None
        return overlay.changed

    def restore(self) -> None:
        """Put vLLM's own files back; the stamp goes last, so that a rerun can complete it."""
        if self.stamp is None:
            return
        pristine = {path: self.pristine(path) for path in self.stamp["files"]}
        self._write_stamp({**self.stamp, "state": "interrupted"})
        for path, text in pristine.items():
            self._replace(path, text)
        (self.root / STAMP).unlink()
        shutil.rmtree(self.root / ORIGINALS)
        self.stamp = None

    def write(self, target: dict[str, str | None], series: Series) -> None:
        """Bring a tree of vLLM's own files to `target`, originals and stamp first."""
        before = {path: self.disk(path) for path in sorted(target)}
        self.root.joinpath(ORIGINALS).mkdir(exist_ok=True)
        for path, text in before.items():
            if text is not None:
                self._write_file(self.root / ORIGINALS / path, text)
        self.stamp = {
            "state": "interrupted",
            "vllm_version": self.version,
            "distribution": self.distribution,
            "series_sha256": series.sha256,
            "patches": [patch.name for patch in series.patches],
            "files": {
                path: {"before": sha256(before[path]), "after": sha256(target[path])} for path in before
            },
        }
        self._write_stamp(self.stamp)
        for path in before:
            self._replace(path, target[path])
        self._write_stamp({**self.stamp, "state": "applied"})

    def _write_stamp(self, stamp: dict) -> None:
        self._write_file(self.root / STAMP, json.dumps(stamp, indent=1) + "\n")

    def _write_file(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # a new inode: installers may have hard-linked this file to a cache that other environments share
        scratch = file.with_name(file.name + ".cutedsl-new")
        scratch.write_bytes(text.encode("utf-8"))
        if file.exists():
            shutil.copymode(file, scratch)
        os.replace(scratch, file)

    def _replace(self, path: str, text: str | None) -> None:
        """Write or delete one file of the tree, with its byte code."""
        file = self.root / path
        for stale in file.parent.glob(f"__pycache__/{file.stem}.*.pyc"):
            stale.unlink()
        if text is not None:
            self._write_file(file, text)
            if file.suffix == ".py":
                py_compile.compile(str(file), doraise=True)
            return
        file.unlink(missing_ok=True)
        for folder in (file.parent / "__pycache__", *file.parents):
            if folder == self.root / "vllm" or (folder.is_dir() and any(folder.iterdir())):
                break
            if folder.is_dir():
                folder.rmdir()


def run(site: Site, series: Series, args: argparse.Namespace) -> int:
    label = f"{site.distribution} {site.version} in {site.root}"
    if args.list:
        state = "not applied" if site.differences(series) else "applied"
        for patch in series.patches:
            reason = patch.headers.get("Reason", "?").split()[0].rstrip(":,")
            print(f"{patch.name:44} {reason:10} {patch.headers.get('Subject', '')}")
        print(f"{len(series.patches)} patches, {state} to {label}")
        return 0
    if args.check:
        reasons = site.differences(series)
        for reason in reasons:
            print(f"not applied to {label}: {reason}", file=sys.stderr)
        if not reasons:
            print(f"{len(series.patches)} patches are applied to {label}")
        return 1 if reasons else 0
    if args.reverse:
        if site.stamp is None:
            print(f"nothing to reverse: no patch is recorded in {label}")
            return 0
        site.restore()
        print(f"reversed: {label} is as shipped")
        return 0
    if site.stamp is not None and not site.differences(series):
        print(f"{len(series.patches)} patches are already applied to {label}")
        return 0
    target = site.plan(series)
    site.restore()
    site.write(target, series)
    for patch in series.patches:
        print(f"  {patch.name}: {', '.join(change.path for change in patch.changes)}")
    print(f"applied {len(series.patches)} patches, {len(target)} files, to {label}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--site", type=Path, metavar="DIR", help="folder that contains vllm/")
    where.add_argument("--python", metavar="PYTHON", help="interpreter whose vLLM is meant")
    parser.add_argument(
        "--patches", type=Path, default=DEFAULT_PATCHES, metavar="DIR", help="folder with series"
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="exit 0 only if exactly this series is applied")
    action.add_argument("--reverse", action="store_true", help="restore vLLM's own files")
    action.add_argument("--list", action="store_true", help="print the series")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.python:
        rest = [f"--patches={args.patches}"] + [
            f"--{a}" for a in ("check", "reverse", "list") if getattr(args, a)
        ]
        return subprocess.call([args.python, os.path.abspath(__file__), *rest])
    try:
        site = Site(args.site.resolve() if args.site else find_site())
        with locked(site.root / "vllm"):
            return run(site, read_series(args.patches), args)
    except (Refused, PatchSyntaxError, ValueError) as error:
        print(f"apply_patches: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
