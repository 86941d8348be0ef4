#!/usr/bin/env python3
"""Check patches/: headers, series against files, tests named by Verify, overlapping hunks, README table.

    devtools/patches/lint.py                  and, where .cache/ has vLLM's sources, that it applies
    devtools/patches/lint.py --write-table    rewrite the table of patches/README.md

Exit status: 0 clean, 1 findings.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.patches.series import (
    REASONS,
    REQUIRED_HEADERS,
    Conflict,
    Overlay,
    Patch,
    PatchSyntaxError,
    apply_patch,
    parse_patch,
    tree_reader,
)
from devtools.patches.vllm_source import CACHE
from devtools.setup.pins import PROJECT_ROOT, read_pins

TABLE_START, TABLE_END = "<!-- table: devtools/patches/lint.py --write-table -->", "<!-- end of table -->"


def series_names(folder: Path) -> list[str]:
    lines = (folder / "series").read_text(encoding="utf-8").splitlines()
    return [name for name in (line.split("#")[0].strip() for line in lines) if name]


def check_series(folder: Path) -> list[str]:
    """Missing, unused and duplicate entries."""
    names = series_names(folder)
    files = {file.name for file in folder.glob("*.patch")}
    findings = [
        f"series: {name} does not exist" for name in dict.fromkeys(names) if not (folder / name).is_file()
    ]
    findings += [
        f"series: {name} is listed {names.count(name)} times"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    findings += [f"{name}: not in series; add it or delete the file" for name in sorted(files - set(names))]
    findings += [f"{name}: patch files are named *.patch" for name in names if not name.endswith(".patch")]
    findings += [
        f"{name}: names carry no numbers, series has the order" for name in names if re.match(r"\d", name)
    ]
    return findings


def check_headers(patch: Patch, version: str, tests: Path) -> list[str]:
    """Required headers, their forms, and that every Verify names a test that exists."""
    headers = patch.headers
    findings = [
        f"{patch.name}: header {name} is missing" for name in REQUIRED_HEADERS if not headers.get(name)
    ]
    reason = headers.get("Reason", "")
    if reason and not re.match(rf"({'|'.join(REASONS)})\b", reason):
        findings.append(f"{patch.name}: Reason is {reason!r}; it starts with one of {', '.join(REASONS)}")
    if headers.get("Applies-To") and version not in patch.versions:
        findings.append(
            f"{patch.name}: Applies-To is {headers['Applies-To']!r}, versions.env pins vLLM {version}"
        )
    forwarded = headers.get("Forwarded", "")
    if forwarded and not re.match(r"(no|not yet|https://\S+)\b", forwarded):
        findings.append(
            f"{patch.name}: Forwarded is {forwarded!r}; write no, not yet (with the why) or a link"
        )
    if headers.get("Last-Update") and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", headers["Last-Update"]):
        findings.append(f"{patch.name}: Last-Update is {headers['Last-Update']!r}; write YYYY-MM-DD")
    for node in patch.verify:
        if not test_exists(node, tests):
            findings.append(f"{patch.name}: Verify names {node}, which does not exist")
    return findings


def test_exists(node: str, root: Path) -> bool:
    """Whether a pytest node id (file::[Class::]function[parameters]) is defined under `root`."""
    file, *path = node.split("::")
    if not path or not (root / file).is_file():
        return False
    path[-1] = path[-1].split("[")[0]
    scope = ast.parse((root / file).read_text(encoding="utf-8")).body
    for name in path:
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = next((item for item in scope if isinstance(item, definitions) and item.name == name), None)
        if found is None:
            return False
        scope = found.body
    return path[-1].startswith("test")


@dataclass(frozen=True)
class Claim:
    """Lines of vLLM's own file that an earlier patch replaces, and by how many lines it grows there."""

    start: int
    stop: int
    growth: int
    patch: str


def check_overlaps(patches: list[Patch]) -> list[str]:
    """Hunks out of order within a patch, and lines that two patches of the series both change."""
    findings: list[str] = []
    claims: dict[str, list[Claim]] = {}
    for patch in patches:
        paths = [change.path for change in patch.changes]
        findings += [
            f"{patch.name}: {path} is changed in two places of the patch; refresh it"
            for path in dict.fromkeys(paths)
            if paths.count(path) > 1
        ]
        for change in patch.changes:
            earlier = sorted(claims.get(change.path, []), key=lambda claim: claim.start)
            previous_stop = 0
            for hunk in change.hunks:
                if hunk.old_start < previous_stop:
                    findings.append(f"{patch.name}: {change.path} {hunk.header} overlaps the hunk before it")
                previous_stop = hunk.old_start + len(hunk.old)
                start, stop = hunk.changed_range()
                shift = 0  # what the earlier patches add before this hunk
                for claim in earlier:
                    taken, free = claim.start + shift, claim.stop + shift + claim.growth
                    if start >= free:
                        shift += claim.growth
                    elif taken < stop:
                        findings.append(
                            f"{patch.name}: {change.path} {hunk.header} changes lines that {claim.patch} "
                            f"changes; one patch, one reason: move them into one of the two"
                        )
                growth = len(hunk.new) - len(hunk.old)
                claims.setdefault(change.path, []).append(
                    Claim(start - shift, stop - shift, growth, patch.name)
                )
    return findings


def check_applies(patches: list[Patch], tree: Path) -> list[str]:
    overlay = Overlay(tree_reader(tree))
    findings = []
    for patch in patches:
        try:
            offset = apply_patch(patch, overlay)
        except Conflict as conflict:
            findings.append(f"{patch.name}: does not apply to {tree.name}: {conflict}")
            continue
        if offset:
            findings.append(f"{patch.name}: its hunks are up to {offset} lines off; refresh it")
    for path, text in overlay.changed.items():
        if text is not None and path.endswith(".py"):
            try:
                compile(text, path, "exec", dont_inherit=True)
            except SyntaxError as error:
                findings.append(f"{path} does not compile once patched: line {error.lineno}: {error.msg}")
    return findings


def table(patches: list[Patch]) -> str:
    """The README's table: what each patch does, why, when it goes, and the test that fails without it."""
    rows = ["| patch | what | reason | drop when | test that fails without it |", "|---|---|---|---|---|"]
    for patch in patches:
        reason = (
            patch.headers.get("Reason", "").split()[0].rstrip(":,;") if patch.headers.get("Reason") else ""
        )
        tests = "<br>".join(f"`{node}`" for node in patch.verify)
        cells = [
            f"[{patch.name.removesuffix('.patch')}]({patch.name})",
            patch.headers.get("Subject", ""),
            reason,
        ]
        cells += [patch.headers.get("Drop-When", ""), tests]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def readme_table(readme: Path) -> tuple[str, str, str]:
    """(text before, the table, text after); ValueError if the markers are missing."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, start, rest = text.partition(TABLE_START)
    body, end, after = rest.partition(TABLE_END)
    if not start or not end:
        raise ValueError(f"{readme}: the lines {TABLE_START!r} and {TABLE_END!r} are missing; put them back")
    return before + start, body.strip("\n"), end + after


def lint(folder: Path, version: str, tests: Path, tree: Path | None) -> list[str]:
    """All findings for a patch folder; `tests` is the root of the Verify paths, `tree` vLLM's own sources."""
    if not (folder / "series").is_file():
        return [f"{folder}/series does not exist"]
    findings = check_series(folder)
    patches = []
    for name in dict.fromkeys(series_names(folder)):
        if not (folder / name).is_file():
            continue
        try:
            patches.append(parse_patch((folder / name).read_bytes().decode("utf-8"), name))
        except PatchSyntaxError as error:
            findings.append(str(error))
    for patch in patches:
        findings += check_headers(patch, version, tests)
    findings += check_overlaps(patches)
    if tree is not None:
        findings += check_applies(patches, tree)
    try:
        if readme_table(folder / "README.md")[1] != table(patches):
            findings.append("README.md: the table is out of date; run devtools/patches/lint.py --write-table")
    except ValueError as error:
        findings.append(str(error))
    return findings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patches", type=Path, default=PROJECT_ROOT / "patches", metavar="DIR")
    parser.add_argument(
        "--write-table", action="store_true", help="rewrite the README's table from the headers"
    )
    args = parser.parse_args(argv)
    version = read_pins()["VLLM_VERSION"]
    if args.write_table:
        patches = [
            parse_patch((args.patches / n).read_text(encoding="utf-8"), n) for n in series_names(args.patches)
        ]
        readme = args.patches / "README.md"
        before, _, after = readme_table(readme)
        readme.write_text(f"{before}\n{table(patches)}\n{after}", encoding="utf-8")
    tree = CACHE / f"vllm-{version}"
    findings = lint(args.patches, version, PROJECT_ROOT, tree if tree.is_dir() else None)
    for finding in findings:
        print(f"lint_patches: {finding}", file=sys.stderr)
    tried = (
        f"applied to vLLM {version}"
        if tree.is_dir()
        else f"not applied: {tree} is not there (make patches-check)"
    )
    print(f"{len(series_names(args.patches))} patches, {len(findings)} findings; {tried}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
