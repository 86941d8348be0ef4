"""What a machine must have for the demo: one function a thing, each fed with what was found.

Standard library only, Python 3.8 or newer: it has to run on the machines that it refuses.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from devtools.setup.pins import PROJECT_ROOT, read_pins

GB = 1_000_000_000
# measured: 2.7 GB of environment, 0.9 GB of downloads kept by pip, and what pip unpacks on the way
SETUP_DISK = 5 * GB
SERVE_MEMORY = 5 * GB  # measured: 4 GB resident plus 1 GiB of KV cache that is touched as it fills
OLDEST_GLIBC = (2, 28)  # the wheels are manylinux_2_28
LIBRARIES = {"libnuma.so.1": "libnuma1", "libstdc++.so.6": "libstdc++6"}  # file: Debian package

CGROUP = Path("/sys/fs/cgroup")

# Runs in the interpreter under test, which may be any Python 3.
PROBE = """
import ctypes, json, platform, sys
def loads(name):
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
def importable(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "system": platform.system(),
    "machine": platform.machine(),
    "libc": list(platform.libc_ver()),
    "venv": importable("venv") and importable("ensurepip"),
    "libraries": {name: loads(name) for name in sys.argv[1:]},
}))
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `problem` is empty if it is fine, and `remedy` says what to do otherwise."""

    name: str
    figure: str
    problem: str = ""
    remedy: str = ""


def check_platform(system: str, machine: str, libc: tuple[str, str]) -> Finding:
    figure = f"{system} {machine}, {' '.join(libc).strip() or 'unknown libc'}"
    if system != "Linux" or machine != "x86_64":
        return Finding(
            "platform",
            figure,
            f"the demo runs on Linux x86_64, this is {system} {machine}",
            "use an x86_64 Linux machine or virtual machine; Debian 12 and Ubuntu 24.04 are known to work",
        )
    name, version = libc
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < OLDEST_GLIBC:
        oldest = ".".join(str(part) for part in OLDEST_GLIBC)
        return Finding(
            "platform",
            figure,
            f"vLLM's and PyTorch's wheels need glibc {oldest} or newer, this is {figure.split(', ')[1]}",
            "use a distribution with a newer glibc (Debian 12, Ubuntu 24.04); musl (Alpine) cannot work",
        )
    return Finding("platform", figure)


def check_python(executable: str, version: tuple[int, ...], oldest: str, newest: str) -> Finding:
    figure = f"{'.'.join(str(part) for part in version)} ({executable})"
    low, high = (tuple(int(part) for part in bound.split(".")) for bound in (oldest, newest))
    if low <= tuple(version[:2]) <= high:
        return Finding("python", figure)
    return Finding(
        "python",
        figure,
        f"Python {oldest} to {newest} is needed, {executable} is {'.'.join(str(part) for part in version)}",
        f"apt-get install python3 python3-venv (Debian 12 and Ubuntu 24.04 have {oldest} and 3.12), or name "
        f"another interpreter: make demo PYTHON=/path/to/python{oldest}",
    )


def check_venv(executable: str, version: tuple[int, ...], has_venv: bool) -> Finding:
    if has_venv:
        return Finding("venv", "modules venv and ensurepip found")
    package = f"python{version[0]}.{version[1]}-venv"
    return Finding(
        "venv",
        "missing",
        f"{executable} lacks the module venv or ensurepip, so no environment can be made",
        f"apt-get install {package}",
    )


def check_libraries(found: dict[str, bool]) -> Finding:
    missing = [name for name, present in found.items() if not present]
    if not missing:
        return Finding("libraries", ", ".join(found))
    return Finding(
        "libraries",
        f"{', '.join(missing)} missing",
        f"{' and '.join(missing)} cannot be loaded; vLLM's CPU kernels are linked to it",
        f"apt-get install {' '.join(LIBRARIES[name] for name in missing)}",
    )


def check_compiler(found: str | None) -> Finding:
    if found:
        return Finding("compiler", found)
    return Finding(
        "compiler",
        "no C++ compiler",
        "torch.compile needs one (g++ or clang++) for the first request that asks for log-probabilities",
        "apt-get install g++",
    )


def compiler() -> str | None:
    """The C++ compiler that torch.compile would find: CXX, g++ or clang++."""
    names = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    return next((path for path in map(shutil.which, names) if path), None)


def check_cpu(flags: frozenset[str]) -> Finding:
    if "avx2" not in flags:
        return Finding(
            "cpu",
            "no AVX2",
            "vLLM's CPU build needs AVX2, which this CPU (or this virtual machine's CPU model) does not show",
            "use a CPU of 2015 or later, or expose the host's CPU model to the virtual machine (-cpu host)",
        )
    if "avx512_bf16" not in flags:
        return Finding(
            "cpu", "AVX2 without AVX512-BF16: DeepSeek-V4 runs on torch instead of vLLM's C++ kernels"
        )
    return Finding("cpu", "AVX512-BF16" + (", AMX" if "amx_tile" in flags else ""))


def check_disk(folder: Path, free: int, needed: int) -> Finding:
    figure = f"{free / GB:.1f} GB free at {folder}, {needed / GB:.1f} needed"
    if free >= needed:
        return Finding("disk", figure)
    return Finding(
        "disk",
        figure,
        f"{folder} has {free / GB:.1f} GB free, {needed / GB:.1f} GB are needed",
        f"free {(needed - free) / GB:.1f} GB there (`pip cache purge` may do), or clone elsewhere",
    )


def check_memory(available: int, needed: int) -> Finding:
    figure = f"{available / GB:.1f} GB available, {needed / GB:.1f} needed"
    if available >= needed:
        return Finding("memory", figure)
    return Finding(
        "memory",
        figure,
        f"{available / GB:.1f} GB of memory are available, the server needs {needed / GB:.1f} GB",
        "stop other programs, or give the machine or container more memory",
    )


def check_port(host: str, port: int, in_use: bool, owner: str) -> Finding:
    if not in_use:
        return Finding("port", f"{host}:{port} is free")
    return Finding(
        "port",
        f"{host}:{port} is in use",
        f"{host}:{port} is in use by {owner or 'a process that this user cannot see'}",
        f"stop it, or choose another port: make demo PORT={port + 1}",
    )


def cpu_flags() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def available_memory() -> int:
    """Bytes this process may still take: the kernel's estimate, or less where a cgroup says so."""
    meminfo = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    )
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def port_in_use(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # a closing connection does not hold the port
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def port_owner(port: int) -> str:
    """'pid 123 (name)' of the process that listens on `port`, or '' if this user may not see it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if not os.path.exists(table):
            continue
        for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in inodes for fd in (process / "fd").iterdir()):
                return f"pid {process.name} ({(process / 'comm').read_text().strip()})"
        except OSError:  # it ended meanwhile, or belongs to someone else
            continue
    return ""


def probe_python(executable: str) -> dict:
    """What the interpreter says about itself; ValueError if it cannot be run."""
    try:
        answer = subprocess.run(
            [executable, "-c", PROBE, *LIBRARIES], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", "") or str(error)).split())[:200]
        raise ValueError(
            f"{executable} is not a working Python 3: {reason}. "
            f"Install python3, or set PYTHON=/path/to/python3"
        ) from None
    return json.loads(answer.stdout)


def setup_findings(python: str) -> list[Finding]:
    pins, probe = read_pins(), probe_python(python)
    return [
        check_platform(probe["system"], probe["machine"], tuple(probe["libc"])),
        check_python(python, tuple(probe["version"]), pins["PYTHON_MIN"], pins["PYTHON_MAX"]),
        check_venv(python, tuple(probe["version"]), probe["venv"]),
        check_libraries(probe["libraries"]),
        check_compiler(compiler()),
        check_cpu(cpu_flags()),
        check_disk(PROJECT_ROOT, shutil.disk_usage(PROJECT_ROOT).free, SETUP_DISK),
    ]


def serve_findings(host: str, port: int) -> list[Finding]:
    return [
        check_cpu(cpu_flags()),
        check_compiler(compiler()),
        check_memory(available_memory(), SERVE_MEMORY),
        check_port(host, port, port_in_use(host, port), port_owner(port)),
    ]


def report(findings: list[Finding]) -> bool:
    """Print one line a finding, the remedy under each problem -> whether nothing is missing."""
    for finding in findings:
        print(f"  {'FAIL' if finding.problem else 'ok':5}{finding.name:10} {finding.figure}")
    problems = [finding for finding in findings if finding.problem]
    for finding in problems:
        print(f"missing: {finding.problem}. Remedy: {finding.remedy}", file=sys.stderr)
    return not problems
