"""The routing of Hopper's experts, as compiled, run on the CPU (tests/support/emulator)."""

import pytest

from cutedsl_nvfp4.sm90.compile import compile_route
from cutedsl_nvfp4.sm90.experts import ROUTE_CTAS
from tests.support.emulator.host import EmulatedKernel
from tests.support.routed import check_route


@pytest.fixture(scope="module", params=ROUTE_CTAS)
def route(request) -> EmulatedKernel:
    return EmulatedKernel(lambda: compile_route(request.param))


@pytest.mark.parametrize("pairs, mapped, step", [(1, False, 32), (777, True, 32), (3000, False, 96)])
def test_every_local_pair_has_a_slot_and_tiles_are_even(route, pairs, mapped, step):
    check_route(route, pairs, mapped, step)
