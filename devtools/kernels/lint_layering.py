#!/usr/bin/env python3
"""Check the layers of kernels/cutedsl_nvfp4 (docs/development.md): who may import what, and no circles.

Exit status: 0 clean, 1 findings.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.setup.pins import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "kernels" / "cutedsl_nvfp4"


@dataclass(frozen=True)
class Confined:
    """`module`, with everything below it, is imported or named only in files that match one of `allowed`."""

    module: str
    allowed: tuple[str, ...]


DEVICE_CODE = ("device/*", "blackwell/*", "sm*/*")

CONFINED = (
    Confined("vllm", ("vllm/*", "checkpoint/calibrate.py")),
    Confined("cutlass", (*DEVICE_CODE, "compiled.py")),
    # our ops; and where vLLM's build for this CPU lacks its own, torch implementations of those
    Confined("torch.library", ("ops.py", "vllm/cpu/operators.py")),
)

# Files that match the pattern import nothing of these: a family knows no other, and what they share knows none of them.
APART = {
    "sm90/*": ("sm100", "sm120", "blackwell"),
    "sm100/*": ("sm90", "sm120"),
    "sm120/*": ("sm90", "sm100"),
    "blackwell/*": ("sm90", "sm100", "sm120"),
    "device/*": ("sm90", "sm100", "sm120", "blackwell"),
    "checkpoint/*": ("vllm.linear", "vllm.experts", "sm90", "sm100", "sm120", "blackwell", "device"),
}

IMPORT_FUNCTIONS = ("__import__", "import_module", "importlib.import_module")

# Besides the standard library these files import the modules named and nothing else.
CLOSED = {
    "format.py": ("torch",),
    "reference.py": ("torch", "cutedsl_nvfp4.format"),
    "settings.py": (),
    "tile_choice.py": (),
    **{f"{family}/tiles.py": ("cutedsl_nvfp4.tile_choice",) for family in ("sm90", "sm100", "sm120")},
}


def absolute(node: ast.ImportFrom, file: str) -> str:
    """The full name of the module an import statement in `file` (relative to the package) takes from."""
    if not node.level:
        return node.module or ""
    package = ["cutedsl_nvfp4", *Path(file).parts[:-1]]
    parent = package[: len(package) - node.level + 1]
    return ".".join(parent + ([node.module] if node.module else []))


def imported(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, at any depth; `from a import b` yields a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{absolute(node, file)}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORT_FUNCTIONS:
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))


def attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every attribute chain that starts at a name: torch.library.custom_op."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield node.lineno, ".".join([inner.id, *reversed(parts)])


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def check_file(source: str, file: str) -> list[str]:
    """Findings in one file of the package; `file` is its path relative to the package, with slashes."""
    tree = ast.parse(source, filename=file)
    imports = list(imported(tree, file))
    findings = []
    for rule in CONFINED:
        if any(fnmatch(file, pattern) for pattern in rule.allowed):
            continue
        used = [use for use in imports if within(use[1], rule.module)]
        if "." in rule.module:
            used += [use for use in attributes(tree) if within(use[1], rule.module)]
        for line in sorted({line for line, _ in used}):
            findings.append(
                f"{file}:{line}: {rule.module} is used only in {', '.join(rule.allowed)}; move this there"
            )
    if file in CLOSED:
        for line, name in imports:
            standard = name.split(".")[0] in sys.stdlib_module_names
            if not standard and not any(within(name, module) for module in CLOSED[file]):
                allowed = ", ".join(CLOSED[file]) or "the standard library"
                findings.append(f"{file}:{line}: imports {name}, but {file} imports {allowed} alone")
    for pattern, others in APART.items():
        if fnmatch(file, pattern):
            for line, name in imports:
                for other in others:
                    if within(name, f"cutedsl_nvfp4.{other}"):
                        findings.append(
                            f"{file}:{line}: imports {name}, but {pattern} stays apart from {other}"
                        )
    return findings


def modules_of(package: Path) -> dict[str, Path]:
    """{dotted name: file} of every module under `package`."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def find_circles(package: Path) -> list[list[str]]:
    """Groups of modules under `package` that import each other, by any statement at any depth."""
    modules = modules_of(package)
    uses: dict[str, set[str]] = {}
    for name, file in modules.items():
        relative = file.relative_to(package).as_posix()
        found = set()
        for _, imported_name in imported(ast.parse(file.read_text(encoding="utf-8")), relative):
            while imported_name not in modules and "." in imported_name:
                imported_name = imported_name.rpartition(".")[0]
            found.add(imported_name)
        uses[name] = found & modules.keys() - {name}

    def reached_from(start: str) -> set[str]:
        seen: set[str] = set()
        pending = list(uses[start])
        while pending:
            if (module := pending.pop()) not in seen:
                seen.add(module)
                pending.extend(uses[module])
        return seen

    reached = {name: reached_from(name) for name in modules}
    circles = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in modules
        if name in reached[name]
    }
    return [list(circle) for circle in sorted(circles)]


def check_package(package: Path) -> list[str]:
    """Findings in every Python file under `package`."""
    files = sorted(package.rglob("*.py"))
    if not files:
        return [f"{package} holds no Python file; nothing was checked"]
    findings = [
        finding
        for file in files
        for finding in check_file(file.read_text(encoding="utf-8"), file.relative_to(package).as_posix())
    ]
    findings += [f"these modules import each other: {', '.join(circle)}" for circle in find_circles(package)]
    return findings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", type=Path, default=PACKAGE, metavar="DIR")
    args = parser.parse_args(argv)
    findings = check_package(args.package)
    for finding in findings:
        print(f"lint_layering: {finding}", file=sys.stderr)
    print(f"{len(list(args.package.rglob('*.py')))} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
