"""versions.env, the one table of pins, as a dict. Standard library only, Python 3.8 or newer."""

from __future__ import annotations

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
VERSIONS_FILE = PROJECT_ROOT / "versions.env"


def read_pins(file: Path = VERSIONS_FILE) -> dict[str, str]:
    """NAME=value lines of `file`; ValueError names the first line that is nothing of the kind."""
    pins: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if not separator or not name.isidentifier() or not value or any(c in value for c in " \t'\"$"):
            raise ValueError(f"{file}:{number}: expected NAME=value without quotes or spaces, got {line!r}")
        if name in pins:
            raise ValueError(f"{file}:{number}: {name} is pinned twice; keep one line")
        pins[name] = value
    return pins
