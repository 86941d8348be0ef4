#!/usr/bin/env python3
"""Check the layers of kernels/cutedsl_nvfp4 (docs/development.md): who may import what.

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


CONFINED = (
    Confined("vllm", ("vllm/*",)),
    Confined("cutlass", ("sm*/*", "compiled.py")),
    # our ops; and where vLLM's build for this CPU lacks its own, torch implementations of those
    Confined("torch.library", ("ops.py", "vllm/cpu_kernels.py")),
)

IMPORT_FUNCTIONS = ("__import__", "import_module", "importlib.import_module")

# Besides the standard library these files import the modules named and nothing else.
CLOSED = {"format.py": ("torch",), "reference.py": ("torch", "cutedsl_nvfp4.format")}


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
                allowed = ", ".join(CLOSED[file])
                findings.append(f"{file}:{line}: imports {name}, but {file} imports {allowed} alone")
    return findings


def check_package(package: Path) -> list[str]:
    """Findings in every Python file under `package`."""
    files = sorted(package.rglob("*.py"))
    if not files:
        return [f"{package} holds no Python file; nothing was checked"]
    return [
        finding
        for file in files
        for finding in check_file(file.read_text(encoding="utf-8"), file.relative_to(package).as_posix())
    ]


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
