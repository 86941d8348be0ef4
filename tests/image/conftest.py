"""The container that .ci/container has started; these tests run through it alone."""

import os

import pytest

from tests.image.container import Service


@pytest.fixture
def service() -> Service:
    """The `vllm` service, healthy; the test may break it, the next one waits until it is whole again."""
    if "DOCKER_HOST" not in os.environ or "PORT" not in os.environ:
        pytest.fail("start these tests through .ci/container: it sets DOCKER_HOST and PORT")
    found = Service(int(os.environ["PORT"]))
    found.wait_until_healthy()
    return found
