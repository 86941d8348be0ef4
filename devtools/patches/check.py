#!/usr/bin/env python3
"""Try the patch series on another vLLM release and report patch by patch. Changes nothing but .cache/.

    devtools/patches/check.py --version 0.33.0
    devtools/patches/check.py --site DIR             an unpacked tree instead of a download

applies           fits, perhaps some lines further up or down
already upstream  the release holds it: drop it when moving there
conflicts         the first hunk that does not fit is shown; the patches after it are tried without it

Exit status: 0 the report is complete, 1 --strict and not every patch applies, 2 nothing to report on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.patches.series import (
    Conflict,
    Hunk,
    Overlay,
    PatchSyntaxError,
    Series,
    apply_patch,
    is_upstream,
    read_series,
    tree_reader,
    tree_version,
)
from devtools.patches.vllm_source import source_tree
from devtools.setup.pins import PROJECT_ROOT


@dataclass(frozen=True)
class Verdict:
    patch: str
    status: str  # "applies" | "already upstream" | "conflicts"
    detail: str = ""
    hunk: Hunk | None = None


def judge(series: Series, tree: Path) -> list[Verdict]:
    """One verdict a patch, in order, each on top of those before it that apply."""
    overlay = Overlay(tree_reader(tree))
    verdicts = []
    for patch in series.patches:
        try:
            offset = apply_patch(patch, overlay)
            verdicts.append(
                Verdict(patch.name, "applies", f"moved by up to {offset} lines" if offset else "")
            )
        except Conflict as conflict:
            if is_upstream(patch, overlay):
                verdicts.append(Verdict(patch.name, "already upstream", patch.headers.get("Drop-When", "")))
            else:
                verdicts.append(Verdict(patch.name, "conflicts", str(conflict), conflict.hunk))
    return verdicts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--version", help="vLLM release to fetch")
    where.add_argument("--site", type=Path, metavar="DIR", help="folder that contains vllm/")
    parser.add_argument("--patches", type=Path, default=PROJECT_ROOT / "patches", metavar="DIR")
    parser.add_argument("--strict", action="store_true", help="exit 1 unless every patch applies")
    args = parser.parse_args(argv)
    try:
        series = read_series(args.patches)
        tree = args.site or source_tree(args.version)
        distribution, version = tree_version(tree)
    except (PatchSyntaxError, ValueError, RuntimeError) as error:
        print(f"check_patches: {error}", file=sys.stderr)
        return 2
    verdicts = judge(series, tree)
    print(f"{len(series.patches)} patches on {distribution} {version}\n")
    for verdict in verdicts:
        print(
            f"  {verdict.status:17} {verdict.patch:44} "
            f"{verdict.detail if verdict.status != 'conflicts' else ''}".rstrip()
        )
    for verdict in verdicts:
        if verdict.status == "conflicts":
            print(f"\n{verdict.patch}: {verdict.detail}")
            if verdict.hunk:
                print("".join(f"    {tag}{text.rstrip()}\n" for tag, text in verdict.hunk.lines), end="")
    counts = {
        status: sum(v.status == status for v in verdicts)
        for status in ("applies", "already upstream", "conflicts")
    }
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if args.strict and counts["applies"] != len(verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
