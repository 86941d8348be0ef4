"""Stage one of the self-check in a child process: an illegal address or a deadlock costs the child, not the server.

    python3 -m cutedsl_nvfp4.selfcheck.child < REQUEST.json        what the child runs; see `serve`

The request is {"device": str, "topk": int, "variants": [the fields of a Variant]}. The child answers a line of JSON a
step, {"phase", "variant", "error"}, and is killed when one takes too long.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .products import Multiply, SelfCheckFailed, Variant, multiply
from .synthetic import check_variant, kernels

START_SECONDS = 120.0  # for the child to import torch and reach the device
# for one kernel: compiling it, or for the first, tvm_ffi building its bridge to torch
COMPILE_SECONDS = 300.0
RUN_SECONDS = 20.0  # for one kernel's products; they take milliseconds
END_SECONDS = 10.0  # for the child to end after its last answer
ANSWER = "self-check: "  # how a child's lines begin
TOPK = 6  # of DeepSeek-V4; what is checked where no layer says
COMMAND = (
    sys.executable,
    "-P",
    "-m",
    "cutedsl_nvfp4.selfcheck.child",
)  # -P: not what lies in the current folder


def serve(multiply: Multiply = multiply, check_variant=check_variant) -> None:
    """The child: read a request from stdin, answer a line a step."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def say(**line: object) -> None:
        print(ANSWER + json.dumps(line), file=answers, flush=True)

    request = json.load(sys.stdin)
    device, topk = torch.device(request["device"]), request["topk"]
    torch.zeros(1, device=device)
    say(phase="started")
    for fields in request["variants"]:
        variant = Variant(**fields)
        if device.type == "cuda":
            for kernel in kernels(variant, topk):
                kernel.load()
        say(phase="loaded", variant=str(variant))
        say(phase="checked", variant=str(variant), error=check_variant(variant, topk, device, multiply))
    say(phase="done")


def _lines(stream) -> queue.Queue:
    """What `stream` says, line by line as it comes; None at its end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _rest(lines: queue.Queue) -> list[str]:
    """What came until the end, or until nothing more does; without empty lines."""
    said: list[str] = []
    try:
        while (line := lines.get(timeout=END_SECONDS)) is not None:
            said.append(line.strip())
    except queue.Empty:
        pass  # a process of the child's holds the other end open
    return [line for line in said if line]


def _ended(status: int) -> str:
    """How messages tell an exit status: with the signal's name where one ended the process."""
    try:
        return f"{status} ({signal.Signals(-status).name})"
    except ValueError:
        return str(status)


def check_in_child(
    variants: Sequence[Variant], device: str, topk: int = TOPK, command: tuple[str, ...] = COMMAND
) -> list[float]:
    """Stage one for `variants` -> the errors over their limits; SelfCheckFailed if one is wrong, crashes or hangs."""
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    answers, complaints = _lines(child.stdout), _lines(child.stderr)
    errors: list[float] = []
    doing, seconds, status, current = "starting", START_SECONDS, None, None
    request = {"device": device, "topk": topk, "variants": [asdict(variant) for variant in variants]}
    try:
        try:
            child.stdin.write(json.dumps(request))
            child.stdin.close()
        except BrokenPipeError:
            pass  # it died before it read all: its status tells
        while (line := answers.get(timeout=seconds)) is not None:
            if not line.startswith(ANSWER):
                continue  # printed by a library
            answer = json.loads(line.removeprefix(ANSWER))
            if answer["phase"] == "loaded":
                doing, seconds = f"running {answer['variant']}", RUN_SECONDS
                continue
            if answer["phase"] == "checked":
                errors.append(answer["error"])
            if len(errors) < len(variants):
                current = variants[len(errors)]
                doing, seconds = f"loading {current}", COMPILE_SECONDS
            else:
                doing, seconds, current = "ending", RUN_SECONDS, None
        status = child.wait(timeout=END_SECONDS)
    except queue.Empty:
        raise SelfCheckFailed(
            f"no answer from the child process for {seconds:.0f} s while {doing}: the kernel probably deadlocks; "
            "the child was killed",
            current,
        ) from None
    except subprocess.TimeoutExpired:
        raise SelfCheckFailed(
            f"the child process did not end within {END_SECONDS:.0f} s of its last answer, while {doing}; it was killed"
        ) from None
    finally:
        child.kill()  # of no effect on one that has ended
        child.wait()
    if len(errors) != len(variants) or status != 0:
        said = _rest(complaints)
        telling = (line for line in reversed(said) if "Error: " in line or "Failed: " in line)
        reason = f": {next(telling, said[-1])}" if said else ", and printed nothing"
        if doing == "starting":
            reason += (
                "; a GPU in exclusive mode has no room for it (CUTEDSL_NVFP4_SELF_CHECK=off starts without)"
            )
        raise SelfCheckFailed(
            f"the child process ended with status {_ended(status)} while {doing}{reason}", current
        )
    return errors


if __name__ == "__main__":
    serve()
