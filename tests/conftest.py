"""Markers, threads, the order of the tests, a clean environment, and the random weights the tests share."""

import os
from collections.abc import Callable

import pytest
import torch

# one thread beside other test processes (make test JOBS=…): two OpenMP teams on the same cores are far slower
torch.set_num_threads(1 if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1 else 2)

pytest.register_assert_rewrite("tests.support.parity.distances")  # tests that classes inherit

MARKERS = {
    "gpu_sm90": "needs a Hopper GPU (compute capability 9.0); skipped, with the reason, where there is none",
    "image": "needs the container that .ci/container starts; left out unless asked for with -m image",
    "serving": "starts a vLLM server",
    "proof": "takes every patch out in turn; minutes long, left out unless asked for with -m proof",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers first: they take longest, and the rest fills the gaps between them."""
    items.sort(key=lambda item: item.get_closest_marker("serving") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """pytest-xdist groups by a suffix of the node id; where pytest does not take it, groups would come apart unsaid."""
    if not getattr(session.config.option, "loadgroup", False):
        return
    for item in session.items:
        if item.get_closest_marker("xdist_group") and "@" not in item.nodeid.rpartition("]")[2]:
            raise pytest.UsageError(
                f"--dist loadgroup does not group {item.nodeid}: pytest {pytest.__version__} and this pytest-xdist do "
                f"not fit; install requirements/dev.txt's versions (make setup-dev)"
            )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The only place that leaves GPU tests out, so that the summary has one line of them."""
    if item.get_closest_marker("gpu_sm90") is None:
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a Hopper GPU (compute capability 9.0): no CUDA device")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"needs a Hopper GPU (compute capability 9.0): {torch.cuda.get_device_name()} is none")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see the defaults unless they set a variable themselves."""
    for variable in os.environ:
        if variable.startswith("CUTEDSL_NVFP4_"):
            monkeypatch.delenv(variable)


@pytest.fixture
def random_weight() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(*shape, seed=0) -> (codes uint8 [..., N, K/2], block_scales e4m3 [..., N, K/16]) of shape [..., N, K].

    Every code occurs; scales lie in 2**-3 .. 2**3, so that products stay far from f32's limits.
    """

    def make(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        *rows, k = shape
        codes = torch.randint(0, 256, (*rows, k // 2), dtype=torch.uint8, generator=generator)
        scales = torch.randint(0x20, 0x50, (*rows, k // 16), dtype=torch.uint8, generator=generator)
        return codes, scales.view(torch.float8_e4m3fn)

    return make
