#!/usr/bin/env python3
"""Say what this machine lacks for the demo, each with its remedy. Changes nothing.

    devtools/setup/preflight.py                   everything: what setting up needs and what serving needs
    devtools/setup/preflight.py --for setup       only what devtools/setup/setup_env.py needs
    devtools/setup/preflight.py --for serve       only what starting a server needs

Exit status: 0 nothing is missing, 1 something is.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from devtools.setup.machine import Finding, report, serve_findings, setup_findings


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--for", dest="purpose", choices=("setup", "serve", "all"), default="all")
    parser.add_argument(
        "--python", default=os.environ.get("PYTHON") or sys.executable, help="default: $PYTHON"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--port", type=int, default=int(os.environ.get("PORT") or 8000), help="default: $PORT or 8000"
    )
    args = parser.parse_args(argv)
    findings: dict[str, Finding] = {}
    try:
        if args.purpose in ("setup", "all"):
            findings.update((finding.name, finding) for finding in setup_findings(args.python))
        if args.purpose in ("serve", "all"):
            findings.update((finding.name, finding) for finding in serve_findings(args.host, args.port))
    except ValueError as error:
        print(f"preflight: {error}", file=sys.stderr)
        return 1
    return 0 if report(list(findings.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
