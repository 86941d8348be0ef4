"""Blackwell's experts in torch: what each kernel's docstring says, a layer, and the reference's result for it."""

import math

import torch

from cutedsl_nvfp4 import family, reference
from cutedsl_nvfp4.blackwell import experts
from cutedsl_nvfp4.family import Kernel, Layout
from cutedsl_nvfp4.format import GROUP_SIZE, unswizzle_scales
from cutedsl_nvfp4.prepare import plain_experts, prepare_experts
from cutedsl_nvfp4.sm100 import experts as sm100

LIMIT = 7.0


# --- what each kernel's docstring says, in torch ---


def route(ids, known, pair_of_slot, places, table, has_map, count, tokens):
    local = ids.long()
    if has_map:
        inside = (local >= 0) & (local < known.numel())
        local = torch.where(inside, known.long()[local.clamp(0, known.numel() - 1)], -1)
    local[local >= count] = -1
    places.fill_(-1)
    tile = 0
    for expert in range(count):
        pairs = (local == expert).nonzero().flatten().flip(0)  # no order is promised
        for some in pairs.split(tokens) if len(pairs) else ():
            slots = tile * tokens + torch.arange(len(some))
            pair_of_slot[slots], places[some] = some.int(), slots.int()
            tile += 1
            table[tile, :3] = torch.tensor([expert, (tile - 1) * tokens, len(some)])
    table[0, 0] = tile


def tiles_of(table):
    return [(tile, *entry[:3]) for tile, entry in enumerate(table[1 : 1 + table[0, 0]].tolist())]


def write(slots, rounded, codes, scales, tokens):
    """NVFP4 rows into slots: codes by slot, scales into the atoms of each slot's tile."""
    atoms = -(-tokens // 128)
    codes[slots, : rounded[0].shape[1]] = rounded[0]
    groups = torch.zeros(len(slots), scales.shape[1] * 4, dtype=torch.uint8)
    groups[:, : rounded[1].shape[1]] = rounded[1].view(torch.uint8)
    for slot, row in zip(slots.tolist(), groups, strict=True):
        line = slot % tokens
        tile = scales[slot // tokens * atoms + line // 128]  # [KB, 32, 16]
        tile[:, line % 32, line % 128 // 32 * 4 : line % 128 // 32 * 4 + 4] = row.view(-1, 4)


def gather(scale, from_slots, x, places, table, act_scale, codes, scales, topk, tokens):
    if from_slots:
        slots = torch.tensor(
            [first + i for _, _, first, count in tiles_of(table) for i in range(count)]
        ).long()
        rows = x[slots]
    else:
        pairs = (places >= 0).nonzero().flatten()
        slots, rows = places[pairs].long(), x[pairs // topk]
    if scale == "token":
        act_scale[slots] = reference.dynamic_act_scale(rows)
        of_row = act_scale[slots]
    else:
        experts_of = torch.full((codes.shape[0] // tokens,), -1)
        for tile, expert, _, _ in tiles_of(table):
            experts_of[tile] = expert
        of_row = act_scale[experts_of[slots // tokens]] if scale == "expert" else act_scale
    write(slots, reference.quantize(rows, of_row.view(-1, 1)), codes, scales, tokens)


def product(
    tile, result, weights, weight_scales, row_scale, codes, scales, act_scale, table, pairs, out, out_scales,
    out_act_scale, by_slot, by_expert, out_by_expert, limit, ctas,
):  # fmt: skip
    assert ctas == 148
    matrices = 1 if result == "rows" else 2
    n, k = weights.shape[1] // matrices, weights.shape[2] * 2  # k with its padding, whose scales are zero
    atoms = -(-tile.tokens // 128)
    for index, expert, first, count in tiles_of(table):
        assert first == index * tile.tokens and 1 <= count <= tile.tokens
        slots = first + torch.arange(count)
        values = unswizzle_scales(scales[index * atoms : (index + 1) * atoms], atoms * 128, k // GROUP_SIZE)
        tokens = reference.dequantize(codes[slots], values[:count])
        of_expert = weight_scales[expert].unflatten(0, (matrices, -1))
        block_scales = unswizzle_scales(of_expert, n, k // GROUP_SIZE).flatten(0, 1)
        scale = act_scale[by_slot * slots + by_expert * expert].view(-1, 1)
        sums = tokens @ reference.dequantize(weights[expert], block_scales).T * row_scale[expert] * scale
        if result == "rows":
            out[pairs[slots].long()] = sums.to(torch.bfloat16)
            continue
        h = reference.swiglu(*sums.chunk(2, dim=-1), limit).to(torch.bfloat16)
        if result == "bf16":
            out[slots] = h
        else:
            write(
                slots,
                reference.quantize(h, out_act_scale[out_by_expert * expert]),
                out,
                out_scales,
                tile.tokens,
            )


def combine(topk, dtype, y, ids, known, weights, out, has_map, count):
    local = ids.long()
    if has_map:
        inside = (local >= 0) & (local < known.numel())
        local = torch.where(inside, known.long()[local.clamp(0, known.numel() - 1)], -1)
    chosen = ((local >= 0) & (local < count)).view(-1, topk, 1)
    rows = torch.where(chosen, y.float().view(-1, topk, y.shape[1]), torch.zeros(()))
    out.copy_((rows * weights.view(-1, topk, 1)).sum(1).to(dtype))


def emulate(monkeypatch, capability: int) -> list[tuple]:
    """Kernels of Blackwell's experts are computed here, on CPU tensors -> the (kind, arguments) launched, as they come.

    Fresh memory holds what no kernel writes.
    """
    kernels = {"route": route, "gather": gather, "product": product, "combine": combine}
    calls = []

    def load(kernel: Kernel):
        *arguments, arch = kernel.arguments
        assert arch == f"sm_{capability}a" and kernel.name.startswith(f"nvfp4_experts_sm{capability}a_")
        calls.append((kernel.kind, *arguments))
        return lambda *operands: kernels[kernel.kind](*arguments, *operands)

    def scratch(*args, **kwargs):
        fresh = real(*args, **kwargs)
        return fresh.fill_(
            0x7F if fresh.dtype == torch.uint8 else -77 if fresh.dtype == torch.int32 else math.nan
        )

    real = torch.empty
    monkeypatch.setattr(experts.torch, "empty", scratch)
    monkeypatch.setattr(Kernel, "load", load)
    monkeypatch.setattr(experts, "sm_count", lambda device: 148)
    monkeypatch.setattr(family, "capability_of", lambda device: capability)
    return calls


def layer(random_weight, count=5, hidden=256, intermediate=96):
    w13 = random_weight(count, 2 * intermediate, hidden, seed=1)
    w2 = random_weight(count, hidden, intermediate, seed=2)
    generator = torch.Generator().manual_seed(3)
    scales = [torch.rand(*shape, generator=generator) * 0.01 + 0.002 for shape in ((count, 2), (count,))]
    return prepare_experts(w13[0], w13[1], scales[0], w2[0], w2[1], scales[1], layout=Layout.BLOCK_SCALED)


def both(
    w,
    x,
    weights,
    ids,
    scales,
    expert_map=None,
    tiles=None,
    dtype=torch.float32,
    place=lambda tensor: tensor,
    run=sm100.run,
):
    """(`run`, on operands that `place` puts on the device, and reference.experts) of the same layer."""
    operands = (
        x, w.w13_codes, w.w13_block_scales, w.w13_row_scale, w.w2_codes, w.w2_block_scales, w.w2_row_scale, weights,
        ids, *scales, expert_map,
    )  # fmt: skip
    got = run(
        *(None if operand is None else place(operand) for operand in operands),
        hidden=x.shape[1],
        intermediate=w.w13_row_scale.shape[1] // 2,
        swiglu_limit=LIMIT,
        out_dtype=dtype,
        tiles=tiles,
    )
    w13, w13_scales, w2, w2_scales = plain_experts(w)
    known = ids
    if expert_map is not None:
        known = torch.where((ids >= 0) & (ids < len(expert_map)), ids, torch.full_like(ids, -1))
    expected = reference.experts(
        x, w13, w13_scales, w.w13_row_scale, w2, w2_scales, w.w2_row_scale, weights, known, *scales, expert_map,
        quantize_activations=True, swiglu_limit=LIMIT, out_dtype=torch.float32,
    )  # fmt: skip
    return got, expected


def routing(m, topk, known, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(m, known, generator=generator).argsort(1)[:, :topk].to(torch.int32)
    return torch.rand(m, topk, generator=generator), ids


SCALES = {
    "tensor": (torch.tensor([0.002]), torch.tensor([0.05])),
    "expert": (torch.linspace(0.001, 0.003, 5), torch.linspace(0.02, 0.08, 5)),
    "token": (None, None),
    "mixed": (None, torch.tensor([0.05])),
}
