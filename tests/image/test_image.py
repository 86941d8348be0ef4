"""What the container serves and reports, and what the image says of itself."""

import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request

import pytest

from devtools.patches.series import read_series
from devtools.setup.pins import read_pins
from tests.image.container import COMPOSE, ROOT, Service, run

pytestmark = pytest.mark.image


def test_the_real_patched_vllm_serves(service: Service):
    version = service.execute("python3", "-c", "import vllm; print(vllm.__version__)")
    assert version.splitlines()[-1].split("+")[0] == read_pins()["VLLM_VERSION"]
    service.execute("python3", "/opt/cutedsl_nvfp4/devtools/patches/apply.py", "--check")


@pytest.mark.parametrize("tool", ["convert", "calibrate", "compare", "inspect"])
def test_checkpoints_are_made_in_the_image(service: Service, tool):
    help_text = service.execute(
        f"/opt/cutedsl_nvfp4/scripts/{tool}_checkpoint{'s' * (tool == 'compare')}.py", "--help"
    )
    assert help_text.startswith(f"usage: {tool}_checkpoint")


def test_names_without_suffix_forward(service: Service):
    assert "--max-model-len" in service.execute("/opt/cutedsl_nvfp4/scripts/plan_memory", "flash", "4xH200")
    service.execute("python3", "/opt/cutedsl_nvfp4/scripts/apply_patches", "--check")


def test_a_plan_is_made_in_the_image(service: Service):
    assert "--max-model-len" in service.execute(
        "/opt/cutedsl_nvfp4/scripts/plan_memory.py", "flash", "4xH200"
    )


def test_labels_tell_what_was_built(service: Service):
    labels = service.inspect()["Config"]["Labels"]
    assert labels["cutedsl_nvfp4.vllm.version"] == read_pins()["VLLM_VERSION"]
    assert labels["cutedsl_nvfp4.patches.sha256"] == read_series(ROOT / "patches").sha256
    compiled = service.execute("ls", "/opt/cutedsl_nvfp4/compiled").split()
    assert labels["cutedsl_nvfp4.kernels.architectures"] == (",".join(compiled) or "none")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])


def board_queries() -> list[str]:
    board = json.loads((ROOT / "monitoring/grafana/boards/vllm.json").read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_every_metric_of_the_board_exists(service: Service):
    service.complete()
    exposed = set(re.findall(r"^([a-z0-9_:]+)[{ ]", service.request("/metrics")[1].decode(), re.MULTILINE))
    queried = set(re.findall(r"\b(?:vllm:|cutedsl_nvfp4_)[a-z0-9_]+", " ".join(board_queries())))
    assert queried, "the board queries nothing"
    assert queried <= exposed, f"not in /metrics: {sorted(queried - exposed)}"


def test_prometheus_answers_every_query_of_the_board(service: Service):
    """The `metrics` profile's Prometheus, its configuration and its way to the server; Grafana only draws this."""
    address = f"http://127.0.0.1:{os.environ['PROMETHEUS_PORT']}/api/v1/query?"

    def ask(query: str) -> list[dict]:
        url = address + urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    scraped = ['up{job="vllm"} == 1', "sum(vllm:generation_tokens_total) >= 8"]
    deadline = time.monotonic() + 90
    while unanswered := [query for query in (*scraped, *board_queries()) if not ask(query)]:
        assert time.monotonic() < deadline, f"Prometheus has no answer to {unanswered}"
        service.complete()
        time.sleep(2)
    (foreign,) = ask(next(query for query in board_queries() if 'ours="true"' in query))
    assert float(foreign["value"][1]) == 0


def test_the_status_of_compose_run_smoke_is_the_verdict(service: Service):
    """Green on the demo as it is, red on another text, and 2 where there is no server."""
    folder = ROOT / ".cache/container-results"
    expected = json.loads((ROOT / "demo/expected.json").read_text())
    document = expected["documents"][0]
    document["text"] = document["text"][:-1] + ("x" if document["text"][-1] != "x" else "y")
    (folder / "wrong.json").write_text(json.dumps(expected))

    def verdict(*arguments: str) -> int:
        command = (*COMPOSE, "run", "--rm", "--no-deps", "-v", f"{folder}:/wrong:ro", "smoke", *arguments)
        return subprocess.run(command, timeout=300).returncode

    assert verdict("--only", "demo_text") == 0
    assert verdict("--only", "demo_text", "--expected", "/wrong/wrong.json") == 1
    assert verdict("--only", "health", "--base-url", "http://vllm:9") == 2


def test_an_ordinary_user_can_serve(service: Service):
    """What served all along is one; a second container as uid 2000 prints the registration and can write caches."""
    assert service.execute("id", "-u") == "2000"
    image = service.inspect()["Config"]["Image"]
    said = run(
        "docker", "run", "--rm", "--network", "none", "--user", "2000:2000", "--entrypoint", "sh", image,
        "-ec", "touch /cache/models/x /cache/jit/x; id -u; "
        "exec python3 /opt/cutedsl_nvfp4/devtools/image/register_kernels.py",
    )  # fmt: skip
    assert said.splitlines()[0] == "2000"
    assert said.splitlines()[-1] == "ours is first"
