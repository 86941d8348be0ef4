"""The self-check on the CPU, with Hopper's layout multiplied by the reference: it passes what is right and names
what is planted wrong. tests/sm90/gpu/test_selfcheck.py plants the same in front of the real kernels."""

import sys

import pytest
import torch

from cutedsl_nvfp4.prepare import prepare_experts, prepare_linear
from cutedsl_nvfp4.selfcheck import child as selfcheck
from cutedsl_nvfp4.selfcheck.child import ExpertsLayer, Layer, Report, SelfCheckFailed
from cutedsl_nvfp4.sm90.experts import tiles_by_name
from cutedsl_nvfp4.sm90.linear import kernel_name, shipped_kernels
from cutedsl_nvfp4.support import Layout
from tests.support.faults.kernel import PLANTED, emulated

KERNEL = next(iter(shipped_kernels()))


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
    return Layer(name, operands, out_dtype, bias)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n, k, groups", [(200, 144, 1), (64, 64, 1), (96, 80, 2), (1280, 64, 2)])
def test_right_products_pass(random_weight, n, k, groups, out_dtype):
    """Ragged rows and K, padding between groups, more panels and tokens than are compared."""
    report = Report()
    checked = layer(random_weight, n, k, groups, out_dtype)
    selfcheck.check_layers([checked], 256, False, report, emulated)
    assert report.layers == 1 and report.products == len(checked.tiles(256, False)) > 1
    assert 0 < report.worst_error <= 1


def test_bias_is_part_of_the_product(random_weight):
    checked = layer(random_weight, bias=torch.full((200,), 50.0))
    generator = torch.Generator().manual_seed(0)
    (tile,) = list(checked.tiles(1, False))
    assert selfcheck.check_product(checked, 1, tile, generator, emulated) <= 1
    without = Layer(checked.name, checked.operands, checked.out_dtype)

    def forgets_the_bias(inputs, layer, tile, out):
        emulated(inputs, without, tile, out)

    with pytest.raises(SelfCheckFailed, match="relative error"):
        selfcheck.check_product(checked, 1, tile, generator, forgets_the_bias)


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_caught_and_named(random_weight, fault):
    layers = [layer(random_weight), layer(random_weight, name="model.layers.4.attn.wo_b")]

    def wrong_on_the_second(inputs, layer, tile, out):
        (emulated if layer is layers[0] else PLANTED[fault])(inputs, layer, tile, out)

    with pytest.raises(SelfCheckFailed) as failed:
        selfcheck.check_layers(layers, 64, False, Report(), wrong_on_the_second)
    message = str(failed.value)
    assert message.startswith("model.layers.4.attn.wo_b (N = 200, K = 144, groups = 1, torch.bfloat16, M = ")
    assert ("not written" if fault == "dropped_tile" else "relative error") in message


def test_weights_of_zeros_pass(random_weight):
    codes, scales = random_weight(64, 128)
    operands = prepare_linear(
        codes, torch.zeros_like(scales.view(torch.uint8)).view(scales.dtype), torch.tensor([1.0]), [64],
        layout=Layout.SM90,
    )  # fmt: skip
    zeros = Layer("zeros", operands, torch.bfloat16)
    (tile,) = list(zeros.tiles(1, False))
    assert selfcheck.check_product(zeros, 1, tile, torch.Generator(), emulated) == 0


def test_any_error_names_the_layer(random_weight):
    def runs_out_of_memory(inputs, layer, tile, out):
        raise MemoryError("32 MB")

    with pytest.raises(SelfCheckFailed, match=r"model\.layers\.3\.attn\.wo_b .*: MemoryError: 32 MB"):
        selfcheck.check_layers([layer(random_weight)], 64, False, Report(), runs_out_of_memory)


def test_experts_meet_the_tokens_of_all_data_parallel_ranks(random_weight):
    from dataclasses import replace

    alone = experts_layer(random_weight)
    together = replace(alone, ranks=64)
    assert set(alone.tiles(8, False)) < set(together.tiles(8, False))


def test_every_tile_is_checked_on_the_first_layer_of_a_shape_and_all_layers_are(random_weight):
    layers = [layer(random_weight, name=str(i)) for i in range(5)]
    planned = list(selfcheck.products(layers, 4096, False))
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
    selfcheck.check_layers([checked], 64, False, report, emulated)
    assert report.layers == 1 and report.products == len(checked.tiles(64, False)) > 1
    assert 0 < report.worst_error <= 1


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_in_experts_is_caught_and_named(random_weight, fault):
    with pytest.raises(SelfCheckFailed) as failed:
        selfcheck.check_layers([experts_layer(random_weight)], 64, False, Report(), PLANTED[fault])
    message = str(failed.value)
    assert message.startswith("model.layers.3.ffn.experts (E = 8 of 8, H = 128, I = 48, top-k = 6, M = ")
    assert ("not written" if fault == "dropped_tile" else "relative error") in message


def test_experts_of_other_ranks_add_nothing(random_weight):
    from dataclasses import replace

    elsewhere = replace(experts_layer(random_weight), expert_map=torch.full((8,), -1, dtype=torch.int32))
    tiles, m = next(iter(elsewhere.tiles(1, False).items()))
    generator = torch.Generator().manual_seed(0)
    assert selfcheck.check_experts(elsewhere, m, tiles, generator, emulated) == 0

    def adds_something(inputs, layer, tile, out):
        out.fill_(1e-3)

    with pytest.raises(SelfCheckFailed, match="tokens without a local expert got a result"):
        selfcheck.check_experts(elsewhere, m, tiles, generator, adds_something)


def test_tokens_are_compared_where_few_experts_are_local(random_weight):
    from dataclasses import replace

    layer = experts_layer(random_weight)
    one_of_many = torch.full((512,), -1, dtype=torch.int32)
    one_of_many[7] = 3
    rare = replace(layer, known=512, expert_map=one_of_many)
    generator = torch.Generator().manual_seed(0)
    tiles = next(iter(rare.tiles(1, False)))
    assert 0 < selfcheck.check_experts(rare, 400, tiles, generator, emulated) <= 1


# --- the child process ---


def child(tmp_path, body: str) -> tuple[str, ...]:
    """The command of a child that runs `body` with selfcheck imported, in place of the kernels'."""
    script = tmp_path / "child.py"
    script.write_text(
        "import os, signal, sys\nfrom cutedsl_nvfp4 import selfcheck\nfrom planted import PLANTED, emulated\n"
        + body
    )
    return (
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {sys.path[0]!r}); exec(open({str(script)!r}).read())",
    )


@pytest.fixture(autouse=True)
def no_limit_is_reached(monkeypatch):
    """However slow the machine is; a test whose child must run into a limit sets that one."""
    for limit in ("START_SECONDS", "COMPILE_SECONDS", "RUN_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(selfcheck, limit, 600.0)


@pytest.fixture(autouse=True)
def tests_are_importable(monkeypatch):
    """Children import tests/support/faults/kernel.py."""
    from pathlib import Path

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_child_checks_every_kernel(tmp_path):
    kernels = [KERNEL, kernel_name(*list(shipped_kernels().values())[-1]), next(iter(tiles_by_name()))]
    errors = selfcheck.check_in_child(
        kernels, "cpu", command=child(tmp_path, "print('noise')\nselfcheck.serve_child(emulated)")
    )
    assert len(errors) == 3 and all(0 < error <= 1 for error in errors)


@pytest.mark.parametrize("fault", PLANTED)
def test_fault_in_the_child_names_the_kernel(tmp_path, fault):
    with pytest.raises(SelfCheckFailed, match=rf"running {KERNEL}.*SelfCheckFailed: ") as failed:
        selfcheck.check_in_child(
            [KERNEL], "cpu", command=child(tmp_path, f"selfcheck.serve_child(PLANTED[{fault!r}])")
        )
    assert ("not written" if fault == "dropped_tile" else "relative error") in str(failed.value)


CRASHES = "def crash(*_):\n    os.abort()\nselfcheck.serve_child(crash)"
HANGS = "def hang(*_):\n    signal.pause()\nselfcheck.serve_child(hang)"
DIES_LATE = "selfcheck.serve_child(emulated)\nos._exit(3)"
CUDA_ERROR = """
def stray(*_):
    raise RuntimeError("CUDA error: an illegal memory access\\nSearch for `cudaErrorIllegalAddress' in https://docs")
selfcheck.serve_child(stray)
"""
ENDS_EARLY = "selfcheck.check_kernel = lambda *a: os._exit(0)\nselfcheck.serve_child()"


@pytest.mark.parametrize(
    "body, words",
    [
        (CRASHES, rf"running {KERNEL}: the child process ended with status -6"),
        (CUDA_ERROR, rf"running {KERNEL}: .*: RuntimeError: CUDA error: an illegal memory access"),
        (ENDS_EARLY, rf"running {KERNEL}: the child process ended with status 0: without a word"),
        (
            "sys.exit('no such device')",
            "starting: the child process ended with status 1: no such device; a GPU in",
        ),
        (DIES_LATE, "ending: the child process ended with status 3: without a word"),
    ],
    ids=["crash", "illegal address", "ends early", "no device", "dies late"],
)
def test_child_that_does_not_answer_is_a_failure(tmp_path, body, words):
    with pytest.raises(SelfCheckFailed, match=words):
        selfcheck.check_in_child([KERNEL], "cpu", command=child(tmp_path, body))


def test_child_that_hangs_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(selfcheck, "RUN_SECONDS", 1.0)
    with pytest.raises(SelfCheckFailed, match=rf"running {KERNEL}: no answer for 1 s: it hangs"):
        selfcheck.check_in_child([KERNEL], "cpu", command=child(tmp_path, HANGS))


def test_both_stages_are_reported(random_weight, tmp_path, monkeypatch):
    monkeypatch.setattr(selfcheck.check_layers, "__defaults__", (emulated,))
    layers = [layer(random_weight, n=256, k=128), layer(random_weight, n=64, k=128, out_dtype=torch.float32)]
    report = selfcheck.check(
        layers, torch.device("cpu"), 16, False, child(tmp_path, "selfcheck.serve_child(emulated)")
    ).as_dict()
    kernels = {name for checked in layers for name in checked.kernels(16, False)}
    assert report["verdict"] == "passed" and report["layers"] == 2 and report["kernels"] == len(kernels)
    assert report["products"] > report["kernels"]
    assert set(kernels) <= set(shipped_kernels())


def test_nothing_to_check_is_no_failure():
    assert selfcheck.check([], torch.device("cpu"), 16, False).as_dict()["products"] == 0
