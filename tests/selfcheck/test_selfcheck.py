"""The self-check on the CPU, with Hopper's layout multiplied by the reference: it passes what is right and names
what is planted wrong. tests/sm90/gpu/test_selfcheck.py plants the same in front of the real kernels."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from cutedsl_nvfp4.family import Layout
from cutedsl_nvfp4.prepare import prepare_experts, prepare_linear
from cutedsl_nvfp4.selfcheck import child as children
from cutedsl_nvfp4.selfcheck import report as reports
from cutedsl_nvfp4.selfcheck.products import (
    ExpertsLayer,
    LinearLayer,
    SelfCheckFailed,
    Variant,
    check_experts,
    check_product,
)
from cutedsl_nvfp4.selfcheck.report import Report
from cutedsl_nvfp4.sm90 import FAMILY
from tests.support.faults.kernel import PLANTED, emulated
from tests.support.paths import ROOT

ARCH = "sm_90a"
LINEAR = FAMILY.linear.shipped(ARCH)


def variant(operation, name):
    return Variant("sm90", ARCH, operation, name)


KERNEL = variant("linear", next(iter(LINEAR)))


def layer(
    random_weight,
    n=200,
    k=144,
    groups=1,
    out_dtype=torch.bfloat16,
    name="model.layers.3.attn.wo_b",
    bias=None,
):
    operands = prepare_linear(
        *random_weight(n, k),
        torch.tensor([0.5, 0.002]),
        [n // 4, n - n // 4],
        layout=Layout.SM90,
        groups=groups,
    )
    return LinearLayer(name, operands, out_dtype, bias)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n, k, groups", [(200, 144, 1), (64, 64, 1), (96, 80, 2), (1280, 64, 2)])
def test_right_products_pass(random_weight, n, k, groups, out_dtype):
    """Ragged rows and K, padding between groups, more panels and tokens than are compared."""
    report = Report()
    checked = layer(random_weight, n, k, groups, out_dtype)
    reports.check_layers([checked], 256, False, report, emulated)
    assert report.layers == 1 and report.products == len(checked.tiles(256, False)) > 1
    assert 0 < report.worst_error <= 1


def test_bias_is_part_of_the_product(random_weight):
    checked = layer(random_weight, bias=torch.full((200,), 50.0))
    generator = torch.Generator().manual_seed(0)
    (tile,) = list(checked.tiles(1, False))
    assert check_product(checked, 1, tile, generator, emulated) <= 1
    without = LinearLayer(checked.name, checked.operands, checked.out_dtype)

    def forgets_the_bias(inputs, layer, tile, out):
        emulated(inputs, without, tile, out)

    with pytest.raises(SelfCheckFailed, match="relative error"):
        check_product(checked, 1, tile, generator, forgets_the_bias)


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught_and_named(random_weight, fault):
    layers = [layer(random_weight), layer(random_weight, name="model.layers.4.attn.wo_b")]

    def wrong_on_the_second(inputs, layer, tile, out):
        (emulated if layer is layers[0] else PLANTED[fault])(inputs, layer, tile, out)

    with pytest.raises(SelfCheckFailed) as failed:
        reports.check_layers(layers, 64, False, Report(), wrong_on_the_second)
    message = str(failed.value)
    assert message.startswith("model.layers.4.attn.wo_b (N = 200, K = 144, groups = 1, torch.bfloat16, M = ")
    assert ("not written" if fault == "dropped_tile" else "relative error") in message


def test_weights_of_zeros_pass(random_weight):
    codes, scales = random_weight(64, 128)
    operands = prepare_linear(
        codes, torch.zeros_like(scales.view(torch.uint8)).view(scales.dtype), torch.tensor([1.0]), [64],
        layout=Layout.SM90,
    )  # fmt: skip
    zeros = LinearLayer("zeros", operands, torch.bfloat16)
    (tile,) = list(zeros.tiles(1, False))
    assert check_product(zeros, 1, tile, torch.Generator(), emulated) == 0


def test_any_error_names_the_layer(random_weight):
    def runs_out_of_memory(inputs, layer, tile, out):
        raise MemoryError("32 MB")

    with pytest.raises(SelfCheckFailed, match=r"model\.layers\.3\.attn\.wo_b .*: MemoryError: 32 MB"):
        reports.check_layers([layer(random_weight)], 64, False, Report(), runs_out_of_memory)


def test_experts_meet_the_tokens_of_all_data_parallel_ranks(random_weight):
    alone = experts_layer(random_weight)
    together = replace(alone, ranks=64)
    assert set(alone.tiles(8, False)) < set(together.tiles(8, False))


def test_every_tile_is_checked_on_the_first_layer_of_a_shape_and_all_layers_are(random_weight):
    layers = [layer(random_weight, name=str(i)) for i in range(5)]
    planned = list(reports.products(layers, 4096, False))
    tiles = set(layers[0].tiles(4096, False))
    assert {tile for checked, tile, _ in planned if checked is layers[0]} == tiles
    for other in layers[1:]:
        assert sum(checked is other for checked, _, _ in planned) == min(2, len(tiles))


# --- experts ---


def experts_layer(random_weight, name="model.layers.3.ffn.experts", seed=0) -> ExpertsLayer:
    operands = prepare_experts(
        *random_weight(8, 96, 128, seed=seed), torch.full((8, 2), 0.01), *random_weight(8, 128, 48, seed=seed + 1),
        torch.full((8,), 0.5), layout=Layout.SM90,
    )  # fmt: skip
    return ExpertsLayer(name, operands, 6, 8, None, 10.0)


def test_right_experts_pass(random_weight):
    report = Report()
    checked = experts_layer(random_weight)
    reports.check_layers([checked], 64, False, report, emulated)
    assert report.layers == 1 and report.products == len(checked.tiles(64, False)) > 1
    assert 0 < report.worst_error <= 1


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_in_experts_is_caught_and_named(random_weight, fault):
    with pytest.raises(SelfCheckFailed) as failed:
        reports.check_layers([experts_layer(random_weight)], 64, False, Report(), PLANTED[fault])
    message = str(failed.value)
    assert message.startswith("model.layers.3.ffn.experts (E = 8 of 8, H = 128, I = 48, top-k = 6, M = ")
    assert ("not written" if fault == "dropped_tile" else "relative error") in message


def test_experts_of_other_ranks_add_nothing(random_weight):
    elsewhere = replace(experts_layer(random_weight), expert_map=torch.full((8,), -1, dtype=torch.int32))
    tiles, m = next(iter(elsewhere.tiles(1, False).items()))
    generator = torch.Generator().manual_seed(0)
    assert check_experts(elsewhere, m, tiles, generator, emulated) == 0

    def adds_something(inputs, layer, tile, out):
        out.fill_(1e-3)

    with pytest.raises(SelfCheckFailed, match="tokens without a local expert got a result"):
        check_experts(elsewhere, m, tiles, generator, adds_something)


def test_tokens_are_compared_where_few_experts_are_local(random_weight):
    layer = experts_layer(random_weight)
    one_of_many = torch.full((512,), -1, dtype=torch.int32)
    one_of_many[7] = 3
    rare = replace(layer, num_global_experts=512, expert_map=one_of_many)
    generator = torch.Generator().manual_seed(0)
    tiles = next(iter(rare.tiles(1, False)))
    assert 0 < check_experts(rare, 400, tiles, generator, emulated) <= 1


# --- the child process ---


def child(tmp_path, body: str) -> tuple[str, ...]:
    """The command of a child that runs `body`, in place of what serves the kernels'."""
    script = tmp_path / "child.py"
    script.write_text(
        "import os, signal, sys\n"
        "from cutedsl_nvfp4.selfcheck import child\n"
        "from tests.support.faults.kernel import PLANTED, emulated\n" + body
    )
    return sys.executable, str(script)


@pytest.fixture(autouse=True)
def no_limit_is_reached(monkeypatch):
    """However slow the machine is; a test whose child must run into a limit sets that one."""
    for limit in ("START_SECONDS", "COMPILE_SECONDS", "RUN_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(children, limit, 600.0)


@pytest.fixture(autouse=True)
def tests_are_importable(monkeypatch):
    """Children import tests/support/faults/kernel.py."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_child_checks_every_kernel(tmp_path):
    variants = [KERNEL, variant("linear", list(LINEAR)[-1])]
    variants.append(variant("experts", next(iter(FAMILY.experts.choices()))))
    errors = children.check_in_child(
        variants, "cpu", command=child(tmp_path, "print('noise')\nchild.serve(emulated)")
    )
    assert len(errors) == 3 and all(0 < error <= 1 for error in errors)


@pytest.mark.parametrize("fault", PLANTED)
def test_fault_in_the_child_names_the_kernel(tmp_path, fault):
    with pytest.raises(SelfCheckFailed, match=rf"while running {KERNEL}: .*SelfCheckFailed: ") as failed:
        children.check_in_child([KERNEL], "cpu", command=child(tmp_path, f"child.serve(PLANTED[{fault!r}])"))
    assert ("not written" if fault == "dropped_tile" else "relative error") in str(failed.value)


CRASHES = "def crash(*_):\n    os.abort()\nchild.serve(crash)"
HANGS = "def hang(*_):\n    signal.pause()\nchild.serve(hang)"
DIES_LATE = "child.serve(emulated)\nos._exit(3)"
CUDA_ERROR = """
def stray(*_):
    raise RuntimeError("CUDA error: an illegal memory access\\nSearch for `cudaErrorIllegalAddress' in https://docs")
child.serve(stray)
"""
ENDS_EARLY = "child.serve(check_variant=lambda *a: os._exit(0))"


@pytest.mark.parametrize(
    "body, words",
    [
        (CRASHES, rf"ended with status -6 \(SIGABRT\) while running {KERNEL}"),
        (CUDA_ERROR, rf"while running {KERNEL}: .*RuntimeError: CUDA error: an illegal memory access"),
        (ENDS_EARLY, rf"ended with status 0 while running {KERNEL}, and printed nothing"),
        (
            "sys.exit('no such device')",
            "the child process ended with status 1 while starting: no such device; a GPU in",
        ),
        (DIES_LATE, "the child process ended with status 3 while ending, and printed nothing"),
    ],
    ids=["crash", "illegal address", "ends early", "no device", "dies late"],
)
def test_child_that_does_not_answer_is_a_failure(tmp_path, body, words):
    with pytest.raises(SelfCheckFailed, match=words):
        children.check_in_child([KERNEL], "cpu", command=child(tmp_path, body))


def test_child_that_hangs_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "RUN_SECONDS", 1.0)
    with pytest.raises(SelfCheckFailed, match=rf"for 1 s while running {KERNEL}: the kernel prob") as failed:
        children.check_in_child([KERNEL], "cpu", command=child(tmp_path, HANGS))
    assert failed.value.variant == KERNEL


def test_both_stages_are_reported(random_weight, tmp_path):
    layers = [layer(random_weight, n=256, k=128), layer(random_weight, n=64, k=128, out_dtype=torch.float32)]
    command = child(tmp_path, "child.serve(emulated)")
    report = reports.check(
        layers, torch.device("cpu"), 16, False, emulated, partial(children.check_in_child, command=command)
    ).as_dict()
    variants = {found for checked in layers for found in checked.variants(16, False)}
    assert report["verdict"] == "passed" and report["layers"] == 2 and report["kernels"] == len(variants)
    assert report["products"] > report["kernels"]
    assert {found.name for found in variants} <= set(LINEAR)


def test_nothing_to_check_is_no_failure():
    assert reports.check([], torch.device("cpu"), 16, False).as_dict()["products"] == 0
