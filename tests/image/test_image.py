"""What the container serves and reports, and what the image says of itself."""

import json
import re

import pytest
from container import ROOT, Service, run

from patch_series import read_series
from pins import read_pins

pytestmark = pytest.mark.image


def test_the_real_patched_vllm_serves(service: Service):
    version = service.execute("python3", "-c", "import vllm; print(vllm.__version__)")
    assert version.splitlines()[-1].split("+")[0] == read_pins()["VLLM_VERSION"]
    service.execute("python3", "/opt/cutedsl_nvfp4/scripts/apply_patches", "--check")


def test_labels_tell_what_was_built(service: Service):
    labels = service.inspect()["Config"]["Labels"]
    assert labels["cutedsl_nvfp4.vllm.version"] == read_pins()["VLLM_VERSION"]
    assert labels["cutedsl_nvfp4.patches.sha256"] == read_series(ROOT / "patches").sha256
    compiled = service.execute("ls", "/opt/cutedsl_nvfp4/compiled").split()
    assert labels["cutedsl_nvfp4.kernels.architectures"] == (",".join(compiled) or "none")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])


def test_every_metric_of_the_board_exists(service: Service):
    service.complete()
    exposed = set(re.findall(r"^([a-z0-9_:]+)[{ ]", service.request("/metrics")[1].decode(), re.MULTILINE))
    board = json.loads((ROOT / "monitoring/grafana/boards/vllm.json").read_text())
    queries = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    queried = set(re.findall(r"\b(?:vllm:|cutedsl_nvfp4_)[a-z_]+", queries))
    assert queried, "the board queries nothing"
    assert queried <= exposed, f"not in /metrics: {sorted(queried - exposed)}"


def test_an_ordinary_user_can_serve(service: Service):
    """A second container of the same image, as uid 2000, prints the registration and has caches to write to."""
    image = service.inspect()["Config"]["Image"]
    said = run(
        "docker", "run", "--rm", "--network", "none", "--user", "2000:2000", "--entrypoint", "sh", image,
        "-ec", "touch /cache/models/x /cache/jit/x; id -u; exec python3 /opt/cutedsl_nvfp4/scripts/register_kernels",
    )  # fmt: skip
    assert said.splitlines()[0] == "2000"
    assert said.splitlines()[-1] == "ours is first"
