"""vllm/cpu/operators.py: every operator against an implementation that shares no code with it.

That is transformers' DeepSeek-V4 or vLLM's own torch reference where one can be called, and loops in
float64 written from vLLM's Triton kernels otherwise. Caches are read and written here by functions of
their own, made from the layout alone; bytes nobody should touch or read hold 0xFF, which is NaN in e4m3,
bf16 and f32.
"""

import json
import math
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import vllm
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as reference
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from vllm.model_executor.kernels.mhc import cpu as mhc_cpu
from vllm.model_executor.kernels.mhc.torch import mhc_post_torch, mhc_pre_torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import _sqrtsoftplus_bias_topk
from vllm.platforms import current_platform

from cutedsl_nvfp4.vllm.cpu import operators as cpu_kernels
from tests.support.processor import need

OPERATORS = {function.__name__: function for function in cpu_kernels._SCHEMAS}

current_platform.import_kernels()
assert not cpu_kernels._libraries, "a test module defined the operators when it was imported"
COMPILED = {name: getattr(torch.ops._C, name) for name in OPERATORS if hasattr(torch.ops._C, name)}

HEADS = 4
ROUNDING = {torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
NOPE, ROPE = 448, 64
TOKEN_BYTES, SCALE_BYTES, INDEX_DIM = 576, 8, 128
UNTOUCHED = 0xFF
RMS_EPS, HC_EPS = 1e-3, 2e-2  # large and apart, so that leaving one out or swapping them shows


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randint(low: int, high: int, *shape: int, seed: int = 0, dtype=torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def permutation(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# --- the formats, written again ---


def _e4m3_value(code: int) -> float:
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 0x80 else magnitude


E4M3 = torch.tensor([_e4m3_value(code) for code in range(256)], dtype=torch.float64)
MAGNITUDES = E4M3[:0x7F].contiguous()


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """f64 in [-448, 448] -> the code of the nearest value, of two the even one."""
    magnitude = x.abs()
    above = torch.searchsorted(MAGNITUDES, magnitude).clamp(max=0x7E)
    below = (above - 1).clamp(min=0)
    up, down = MAGNITUDES[above] - magnitude, magnitude - MAGNITUDES[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (code + 0x80 * torch.signbit(x)).to(torch.uint8)


def smallest_exponent(amax: torch.Tensor) -> torch.Tensor:
    """The smallest integer e with amax <= 448 * 2^e, where amax counts as 1e-4 at least. 448 = 0.875 * 2^9."""
    mantissa, exponent = torch.frexp(amax.double().clamp(min=1e-4))
    return exponent - 9 + (mantissa > 0.875).int()


def encode_mla(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, 512] -> (token bytes [T, 576], scale bytes [T, 8])."""
    blocks = keys[:, :NOPE].bfloat16().double().unflatten(1, (7, 64))
    exponent = smallest_exponent(blocks.abs().amax(-1))
    codes = nearest_e4m3(blocks * 2.0 ** -exponent.double().unsqueeze(-1)).flatten(1)
    rope = keys[:, NOPE:].bfloat16().contiguous().view(torch.uint8)
    return torch.cat((codes, rope), 1), F.pad((exponent + 127).to(torch.uint8), (0, 1))


def mla_places(block_size: int, slot: int) -> tuple[int, slice, slice]:
    block, row = divmod(int(slot), block_size)
    scales = block_size * TOKEN_BYTES + row * SCALE_BYTES
    return block, slice(row * TOKEN_BYTES, (row + 1) * TOKEN_BYTES), slice(scales, scales + SCALE_BYTES)


def write_mla(cache: torch.Tensor, block_size: int, slots, token: torch.Tensor, scales: torch.Tensor) -> None:
    for index, slot in enumerate(slots):
        block, where, where_scales = mla_places(block_size, slot)
        cache[block, where], cache[block, where_scales] = token[index], scales[index]


def read_mla(cache: torch.Tensor, block_size: int, slots) -> torch.Tensor:
    """Keys at `slots` -> f64 [len(slots), 512]."""
    keys = torch.empty(len(slots), 512, dtype=torch.float64)
    for index, slot in enumerate(slots):
        block, where, where_scales = mla_places(block_size, slot)
        token, scales = cache[block, where], cache[block, where_scales]
        step = 2.0 ** (scales[:7].double() - 127)
        keys[index, :NOPE] = E4M3[token[:NOPE].long()] * step.repeat_interleave(64)
        keys[index, NOPE:] = token[NOPE:].contiguous().view(torch.bfloat16).double()
    return keys


def index_places(block_size: int, slot: int) -> tuple[int, slice, slice]:
    block, row = divmod(int(slot), block_size)
    scale = block_size * INDEX_DIM + row * 4
    return block, slice(row * INDEX_DIM, (row + 1) * INDEX_DIM), slice(scale, scale + 4)


def read_index(cache: torch.Tensor, block_size: int, slots) -> tuple[torch.Tensor, torch.Tensor]:
    """Indexer keys at `slots` -> (their codes' values f64 [n, 128], scales f64 [n])."""
    places = [index_places(block_size, slot) for slot in slots]
    values = [E4M3[cache[block, where].long()] for block, where, _ in places]
    scales = [cache[block, where].contiguous().view(torch.float32).double() for block, _, where in places]
    return torch.stack(values), torch.cat(scales)


def pooled(blocks: int, width: int, dtype: torch.dtype = torch.uint8) -> tuple[torch.Tensor, torch.Tensor]:
    """(allocation, its [blocks, width] view with other layers' bytes between the blocks), all of it 0xFF."""
    item = dtype.itemsize
    allocation = torch.full((blocks, 3, (width + 16) * item), UNTOUCHED, dtype=torch.uint8).view(dtype)
    view = allocation[:, 1, :width]
    assert not view.is_contiguous() or blocks == 1
    return allocation, view


def pooled_mla(blocks: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return pooled(blocks, block_size * (TOKEN_BYTES + SCALE_BYTES))


def random_mla(blocks: int, block_size: int, slots, seed: int = 0) -> torch.Tensor:
    """A pooled cache with arbitrary keys of about unit size at `slots` and NaN everywhere else."""
    _, cache = pooled_mla(blocks, block_size)
    token, scales = encode_mla(randn(len(slots), 512, seed=seed))
    write_mla(cache, block_size, slots, token, scales)
    return cache


def assert_mla_close(got: torch.Tensor, keys: torch.Tensor) -> None:
    """Decoded `got` is `keys` [T, 512] rounded, where keys may be off by f32 arithmetic: rarely one code away."""
    token, scales = encode_mla(keys)
    cache = torch.cat((token, scales), 1)  # a block of one token
    want = read_mla(cache, 1, range(len(keys)))
    step = (2.0 ** (scales[:, :7].double() - 127)).repeat_interleave(64, dim=1)
    off = (got - want).abs()
    assert bool((off[:, :NOPE] <= want[:, :NOPE].abs() / 8 + step * 2.0**-9).all())
    assert bool((off[:, NOPE:] <= want[:, NOPE:].abs() * 2.0**-7 + 1e-6).all())
    assert (off == 0).double().mean() > 0.99


def assert_index_close(values: torch.Tensor, scales: torch.Tensor, keys: torch.Tensor) -> None:
    """The same for indexer keys [T, 128]; scales must be exact."""
    rounded = keys.bfloat16().double()
    step = 2.0 ** smallest_exponent(rounded.abs().amax(-1)).double()
    assert torch.equal(scales, step)
    want = E4M3[nearest_e4m3(rounded / step.unsqueeze(-1)).long()]
    off = (values - want).abs()
    assert bool((off <= want.abs() / 8 + 2.0**-9).all())
    assert (off == 0).double().mean() > 0.99


# --- transformers' modules, small ---


@pytest.fixture(scope="module")
def config() -> DeepseekV4Config:
    return DeepseekV4Config(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=HEADS, q_lora_rank=32,
        layer_types=["compressed_sparse_attention"], mlp_layer_types=["moe"], n_routed_experts=64,
        num_experts_per_tok=6, routed_scaling_factor=2.5, index_n_heads=8, max_position_embeddings=4096,
        hc_sinkhorn_iters=3, hc_eps=HC_EPS, rms_norm_eps=RMS_EPS,
        rope_parameters={"rope_type": "yarn", "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                         "original_max_position_embeddings": 256},
    )  # fmt: skip


def filled(module: torch.nn.Module, scale: float = 1.0, seed: int = 0) -> torch.nn.Module:
    """Random parameters, drawn for each of them anew, and no gradients."""
    for index, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(False).copy_(randn(*parameter.shape, seed=seed + index) * scale)
    return module


@pytest.fixture(scope="module")
def cos_sin(config: DeepseekV4Config) -> torch.Tensor:
    """vLLM's table f32 [positions, 64]: 32 cosines, then 32 sines, with YaRN."""
    rotary = reference.DeepseekV4RotaryEmbedding(config)
    tables = rotary(torch.zeros(1), torch.arange(1024)[None], layer_type="compress")
    return torch.cat(tables, -1)[0].contiguous()


def rotated(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, *, inverse=False
) -> torch.Tensor:
    """transformers' rotation of x [T, H, D] at `positions` [T]."""
    cos, sin = cos_sin[positions].chunk(2, -1)
    return reference.apply_rotary_pos_emb(x, cos, -sin if inverse else sin)


# --- what vLLM calls: names and schemas ---


def test_schemas_are_those_of_the_compiled_library():
    library = Path(vllm.__path__[0], "_C.abi3.so")
    if not current_platform.is_cpu():
        pytest.skip(f"{library} is not a CPU build")
    ours = {function.__name__: schema for function, schema in cpu_kernels._SCHEMAS.items()}
    text, compiled = library.read_bytes(), {}
    for name in ours:  # a registration is a string of its own; mangled names and messages hold the name too
        found = re.search(rb"\0" + name.encode() + rb"(\(Tensor[ (][^\0]* -> [^\0]*)\0", text)
        compiled[name] = found and found[1].decode()
    assert len(ours) == 14
    assert compiled == ours
    for name, schema in ours.items():
        parameters = [argument.name for argument in torch._C.parse_schema(name + schema).arguments]
        code = OPERATORS[name].__code__
        assert list(code.co_varnames[: code.co_argcount]) == parameters


DEFINE_TWICE = """
import json, torch
from vllm.platforms import current_platform
current_platform.import_kernels()
from cutedsl_nvfp4.vllm.cpu import operators as cpu_kernels

names = [function.__name__ for function in cpu_kernels._SCHEMAS]
compiled = [name for name in names if hasattr(torch.ops._C, name)]
somebody = torch.library.Library("_C", "FRAGMENT")
present = list(compiled)
if not compiled:
    somebody.define("hc_post_fused_cpu(Tensor x, Tensor residual, Tensor post, Tensor comb) -> Tensor")
    somebody.impl("hc_post_fused_cpu", lambda x, residual, post, comb: torch.full((1,), 42.0), "CPU")
    present = ["hc_post_fused_cpu"]
first = cpu_kernels.define_missing()
second = cpu_kernels.define_missing()
one = torch.ones(1, 4, 8)
theirs = None if compiled else torch.ops._C.hc_post_fused_cpu(one[:, 0], one, one[..., 0], one[..., :4]).tolist()
after = [name for name in names if hasattr(torch.ops._C, name)]
print(json.dumps([names, compiled, present, first, second, after, theirs]))
"""


def test_define_missing_defines_what_is_missing_once():
    """In a fresh process, where one operator is there already and must stay what it is."""
    run = subprocess.run([sys.executable, "-c", DEFINE_TWICE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    names, compiled, present, first, second, after, theirs = json.loads(run.stdout.splitlines()[-1])
    assert sorted(compiled) == sorted(COMPILED)
    assert first == [name for name in names if name not in present]
    assert second == []
    assert after == names
    assert theirs == (None if compiled else [42.0])


# --- arguments for every operator, as vLLM passes them ---


def sample(name: str, tokens: int) -> list:
    """Arguments of a call with `tokens` tokens, within what the compiled operators accept too."""
    bf16, fp8, byte = torch.bfloat16, torch.float8_e4m3fn, torch.uint8
    slots, positions = permutation(32)[:tokens], randint(0, 200, tokens, seed=1)
    angle = torch.outer(torch.arange(200.0), 0.01 * torch.arange(1, 33))
    table = torch.cat((angle.cos(), angle.sin()), -1)
    mla_cache, index_cache = (torch.zeros(4, 8 * width, dtype=byte) for width in (584, 132))
    hc = [randn(24, 4 * 64, seed=2) * 0.1, randn(3, seed=3), randn(24, seed=4)]
    streams = randn(tokens, 4, 64, dtype=bf16)

    def compressor(head_dim: int, cache: torch.Tensor) -> list:
        """Every second token closes a window of ratio 4; the first window starts before position 0."""
        state = randn(16, 4 * 4 * head_dim, seed=5).unflatten(1, (4, 4 * head_dim))
        gather = randint(0, 64, tokens, 8, seed=6)
        gather[:1, :4] = -1
        ends, weight = 3 + 2 * torch.arange(tokens), randn(head_dim, seed=7)
        return [state, gather, ends, slots, weight, RMS_EPS, table, cache, 8, 4]

    match name:
        case "hc_pre_fused_cpu":
            return [streams, *hc, 4, 3, RMS_EPS, HC_EPS]
        case "hc_post_fused_cpu":
            x, post, comb = randn(tokens, 64, seed=1), randn(tokens, 4, seed=2), randn(tokens, 4, 4, seed=3)
            return [x.to(bf16), streams, post, comb]
        case "hc_head_fused_cpu":
            return [streams, hc[0][:4], hc[1][:1], hc[2][:4], HC_EPS, RMS_EPS]
        case "fused_qnorm_rope_kv_insert_cpu":
            q, kv = randn(tokens, 2, 512, dtype=bf16), randn(tokens, 512, seed=1, dtype=bf16)
            return [q, kv, positions, mla_cache, slots, table, 3, RMS_EPS, 8]
        case "flash_mla_with_kvcache_cpu":
            near, far = mla_cache, mla_cache.clone()
            for seed, cache in enumerate((near, far)):
                write_mla(cache, 8, range(32), *encode_mla(randn(32, 512, seed=seed)))
            q, out = randn(tokens, 2, 512, seed=2, dtype=bf16), torch.zeros(tokens, 2, 512, dtype=bf16)
            window, chosen = randint(-1, 32, tokens, 6, seed=3), randint(-1, 32, tokens, 9, seed=4)
            return [out, q, near, window, 8, far, chosen, 8, randn(2, seed=5), 512**-0.5]
        case "save_partial_states_cpu":
            kv_score, ape = randn(tokens, 2 * 128), randn(4, 128, seed=1)
            return [*kv_score.split(128, -1), ape, positions, torch.zeros(8, 4, 256), slots]
        case "compress_norm_rope_store_cpu":
            return compressor(512, mla_cache)
        case "compress_norm_rope_store_indexer_cpu":
            return compressor(128, index_cache)
        case "fused_indexer_q_rope_quant_cpu":
            q, weights = randn(tokens, 8, 128), randn(tokens, 8, seed=1)
            return [
                positions,
                q,
                table,
                torch.zeros_like(q).to(fp8),
                weights,
                0.1,
                0.3,
                torch.zeros_like(weights),
            ]
        case "fp8_paged_mqa_logits_cpu":
            index_cache[:, : 8 * 128] = randint(0, 0x7F, 4, 8 * 128)
            index_cache[:, 8 * 128 :].view(torch.float32).copy_(randn(4, 8, seed=2).abs())
            lens = (torch.arange(tokens) * 3 % 33).int()
            pages = permutation(4, seed=3).int().expand(tokens, 4).contiguous()
            return [randn(tokens, 8, 128).to(fp8), index_cache, randn(tokens, 8, seed=1), lens, pages, 8, 32]
        case "topk_transform_512_cpu":
            lens, pages = 500 + 9 * torch.arange(tokens).int(), permutation(10).int().repeat(tokens, 1)
            out, raw = (torch.zeros(tokens, 512, dtype=torch.int32) for _ in range(2))
            return [randn(tokens, 600), lens, pages, out, 64, raw]
        case "biased_topk_cpu":
            logits = randn(tokens, 64)
            return [logits, logits, randn(64, seed=1), 6, True, "sqrtsoftplus", 0, 2.5, True]
        case "hash_topk_cpu":
            experts = randint(0, 64, tokens, 6, dtype=torch.int32)
            return [randn(tokens, 64), experts, 6, "sqrtsoftplus", 0, 64, 2.5]
        case "inverse_gptj_rope_o_proj_cpu":
            return [randn(tokens, 2, 512, dtype=bf16), positions, table, 64]
    raise ValueError(f"no sample arguments for {name}")


def as_list(returned) -> list[torch.Tensor]:
    """What an operator returned: nothing, a tensor or several."""
    if returned is None:
        return []
    return [returned] if isinstance(returned, torch.Tensor) else list(returned)


def copied(arguments: list) -> list:
    return [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]


def is_written(argument: torch.Argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def results(name: str, arguments: list, returned) -> list[torch.Tensor]:
    """What a call gave, as tensors that mean something: returned and mutated ones, caches decoded."""
    schema = torch._C.parse_schema(name + cpu_kernels._SCHEMAS[OPERATORS[name]])
    written = [argument for argument, info in zip(arguments, schema.arguments) if is_written(info)]
    returned = as_list(returned)
    if name in ("fused_qnorm_rope_kv_insert_cpu", "compress_norm_rope_store_cpu"):
        written = [read_mla(written[0], 8, range(32))]
    elif name == "compress_norm_rope_store_indexer_cpu":
        values, scales = read_index(written[0], 8, range(32))
        written = [values * scales.unsqueeze(-1)]
    elif name == "topk_transform_512_cpu":
        written = [tensor.sort(-1).values for tensor in written]
    elif name == "biased_topk_cpu":
        order = returned[1].argsort(-1)
        returned = [tensor.gather(1, order) for tensor in returned]
    return [tensor.double() for tensor in (*returned, *written)]


@pytest.fixture(scope="module")
def defined() -> None:
    cpu_kernels.define_missing()


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_calls_the_operator_and_the_schema_tells_what_it_writes(name, defined):
    if name in COMPILED:
        pytest.skip("vLLM's own operators are there on this processor, and ours are not defined")
    operator = getattr(torch.ops._C, name)
    direct, called, before = (sample(name, 5) for _ in range(3))
    want = results(name, direct, OPERATORS[name](*direct))
    returned = operator(*called)
    got = results(name, called, returned)
    assert len(got) == len(want) > 0
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    for argument, was, info in zip(called, before, operator.default._schema.arguments):
        if isinstance(argument, torch.Tensor):
            assert torch.equal(argument.double(), was.double()) != is_written(info), info.name
            assert all(result.data_ptr() != argument.data_ptr() for result in as_list(returned))


@pytest.mark.parametrize("name", OPERATORS)
def test_no_tokens_give_empty_results_and_write_nothing(name):
    arguments = sample(name, 0)
    before = copied(arguments)
    returned = OPERATORS[name](*arguments)
    for argument, was in zip(arguments, before):
        assert not isinstance(argument, torch.Tensor) or torch.equal(argument.double(), was.double())
    assert all(tensor.shape[0] == 0 for tensor in as_list(returned))


@pytest.mark.parametrize("name", OPERATORS)
def test_agrees_with_vllms_compiled_operator(name):
    need(name in COMPILED)
    arguments = sample(name, 24)
    ours, theirs = copied(arguments), copied(arguments)
    want = results(name, theirs, COMPILED[name](*theirs))
    got = results(name, ours, OPERATORS[name](*ours))
    # Both round to bf16 or e4m3; the compiled one flushes e4m3's subnormals and rounds probabilities to bf16.
    e4m3 = "store" in name or "insert" in name or "quant" in name
    for a, b in zip(got, want):
        if name == "fp8_paged_mqa_logits_cpu":
            seen = torch.arange(32) < arguments[3].unsqueeze(1)  # the compiled one leaves the rest unwritten
            a, b = a[seen], b[seen]
        torch.testing.assert_close(a, b, rtol=0.13 if e4m3 else 2e-2, atol=1e-2)
        assert (a - b).abs().mean() <= 1e-2 * b.abs().mean() + 1e-6


# --- hyper-connections ---


def hyper_connection(config: DeepseekV4Config) -> reference.DeepseekV4HyperConnection:
    return filled(reference.DeepseekV4HyperConnection(config), 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hc_pre(config, dtype):
    module = hyper_connection(config)
    x = randn(7, 4, 64, seed=9, dtype=dtype)
    layer_input, post, comb = cpu_kernels.hc_pre_fused_cpu(
        x, module.fn, module.scale, module.base, 4, config.hc_sinkhorn_iters, RMS_EPS, HC_EPS
    )
    want_post, want_comb, want_input = (tensor[0] for tensor in module(x[None]))
    torch.testing.assert_close(post, want_post)
    torch.testing.assert_close(comb, want_comb)
    torch.testing.assert_close(layer_input, want_input, **ROUNDING[dtype])
    assert layer_input.dtype == dtype
    # Not symmetric, so that a transposed matrix would show.
    assert (comb - comb.transpose(1, 2)).abs().max() > 0.1


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_hc_pre_against_vllms_torch(iterations):
    x = randn(5, 4, 64, dtype=torch.bfloat16)
    fn, scale, base = randn(24, 256, seed=1) * 0.3, randn(3, seed=2), randn(24, seed=3)
    got = cpu_kernels.hc_pre_fused_cpu(x, fn, scale, base, 4, iterations, RMS_EPS, HC_EPS)
    post, comb, layer_input = mhc_pre_torch(x, fn, scale, base, RMS_EPS, HC_EPS, HC_EPS, 2.0, iterations)
    for ours, theirs in zip(got, (layer_input, post.squeeze(-1), comb)):
        torch.testing.assert_close(ours, theirs, **ROUNDING[ours.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hc_post(dtype):
    x, residual = randn(6, 64, dtype=dtype), randn(6, 4, 64, seed=1, dtype=dtype)
    post, comb = randn(6, 4, seed=2), randn(6, 4, 4, seed=3)
    got = cpu_kernels.hc_post_fused_cpu(x, residual, post, comb)
    want = mhc_post_torch(x, residual, post.unsqueeze(-1), comb)
    torch.testing.assert_close(got, want, **ROUNDING[dtype])
    assert got.dtype == dtype


def test_hc_head(config):
    module = filled(reference.DeepseekV4HyperHead(config), 0.3)
    x = randn(6, 4, 64, seed=9)
    got = cpu_kernels.hc_head_fused_cpu(x, module.hc_fn, module.hc_scale, module.hc_base, HC_EPS, RMS_EPS)
    torch.testing.assert_close(got, module(x[None])[0])


def test_hyper_connections_through_vllms_own_calls(config, defined):
    """vLLM's wrappers reorder the two epsilons and the results; leading dimensions stay."""
    module, head = hyper_connection(config), filled(reference.DeepseekV4HyperHead(config), 0.3)
    x = randn(2, 3, 4, 64, dtype=torch.bfloat16)
    post, comb, layer_input = mhc_cpu.mhc_pre_cpu(
        x, module.fn, module.scale, module.base, RMS_EPS, HC_EPS, HC_EPS, 2.0, config.hc_sinkhorn_iters
    )
    want_post, want_comb, want_input = module(x)
    loose = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(post.squeeze(-1), want_post, **loose)
    torch.testing.assert_close(comb, want_comb, **loose)
    torch.testing.assert_close(layer_input, want_input, rtol=2**-6, atol=1e-2)
    merged = mhc_cpu.mhc_post_cpu(layer_input, x, post, comb)
    torch.testing.assert_close(merged, mhc_post_torch(layer_input, x, post, comb), rtol=2**-6, atol=2e-2)
    got = mhc_cpu.hc_head_fused_cpu(x, head.hc_fn, head.hc_scale, head.hc_base, RMS_EPS, HC_EPS)
    torch.testing.assert_close(got, head(x), rtol=2**-6, atol=1e-2)


# --- the fp8_ds_mla cache ---


def every_amax() -> torch.Tensor:
    """bf16 [T, 512]: blocks of 64 whose largest magnitudes are all positive finite bf16 numbers, and zero."""
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).double()
    amax = F.pad(amax, (0, -len(amax) % 7))
    fraction = torch.rand(len(amax), 64, generator=torch.Generator().manual_seed(0))
    values = amax.unsqueeze(1) * (2 * fraction - 1)
    where = randint(0, 64, len(amax), 1, seed=1)
    values.scatter_(1, where, amax.unsqueeze(1) * (1 - 2 * randint(0, 2, len(amax), 1, seed=2)))
    return F.pad(values.reshape(-1, NOPE), (0, ROPE)).bfloat16()


NO_ROTATION = torch.cat((torch.ones(8, 32), torch.zeros(8, 32)), -1)


def test_cache_bytes_are_exact_for_every_bf16_amax():
    """Codes, the smallest scale that keeps amax within 448, the pad byte, and no byte more."""
    kv = every_amax()
    kv[:, NOPE:] = randn(len(kv), ROPE, seed=3)
    block_size, blocks = 64, len(kv) // 64 + 2
    slots = permutation(blocks * block_size)[: len(kv)]
    allocation, cache = pooled_mla(blocks, block_size)
    expected, expected_cache = pooled_mla(blocks, block_size)
    write_mla(expected_cache, block_size, slots, *encode_mla(kv))
    cpu_kernels.fused_qnorm_rope_kv_insert_cpu(
        torch.zeros(len(kv), 1, 512), kv, torch.zeros(len(kv), dtype=torch.int64), cache, slots, NO_ROTATION, 1,
        RMS_EPS, block_size,
    )  # fmt: skip
    assert torch.equal(allocation, expected)


def test_e4m3_rounds_to_nearest_even_everywhere():
    """Every e4m3 value, the midpoint between each two, and their neighbours, in a block with scale 1."""
    middles = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
    points = torch.cat((MAGNITUDES, middles, middles * (1 + 2.0**-7), middles * (1 - 2.0**-7)))
    points = torch.cat((points, -points)).bfloat16()
    kv = F.pad(points, (0, -len(points) % 63)).view(-1, 63)
    kv = F.pad(kv, (1, 0), value=448.0).repeat(1, 8)  # 64 values a block, one of them 448
    _, cache = pooled_mla(2, 64)
    slots = torch.arange(len(kv))
    cpu_kernels.fused_qnorm_rope_kv_insert_cpu(
        torch.zeros(len(kv), 1, 512), kv, 0 * slots, cache, slots, NO_ROTATION, 1, RMS_EPS, 64
    )
    token, scales = encode_mla(kv)
    assert bool((scales[:, :7] == 127).all())
    for slot in range(len(kv)):
        block, where, _ = mla_places(64, slot)
        assert torch.equal(cache[block, where][:NOPE], token[slot, :NOPE])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [64, 256, 3])
def test_fused_qnorm_rope_kv_insert(cos_sin, dtype, block_size):
    """Padded heads, rows of q and kv beyond slot_mapping, slots of -1, the last slot of a block."""
    mapped, padded = 9, 4
    q = randn(mapped + padded, HEADS, 512, dtype=dtype) * 3
    kv = randn(mapped + padded, 512, seed=1, dtype=dtype)
    positions = randint(0, len(cos_sin), mapped + padded, seed=2)
    blocks = 3 + 24 // block_size
    slots = permutation(blocks * block_size, seed=3)[:mapped]
    slots[:2] = torch.tensor([block_size - 1, 2 * block_size])
    slots[2:] = torch.where(slots[2:] % block_size == 0, -1, slots[2:])
    slots[5] = -1
    stored = (slots >= 0).nonzero().squeeze(1)
    allocation, cache = pooled_mla(blocks, block_size)
    got = cpu_kernels.fused_qnorm_rope_kv_insert_cpu(
        q, kv, positions, cache, slots, cos_sin, HEADS + 2, RMS_EPS, block_size
    )
    normed = reference.DeepseekV4UnweightedRMSNorm(RMS_EPS)(q.float())
    assert got.shape == (mapped + padded, HEADS + 2, 512) and got.dtype == dtype
    torch.testing.assert_close(got[:, :HEADS].float(), rotated(normed, positions, cos_sin), **ROUNDING[dtype])
    assert bool((got[:, HEADS:] == 0).all())
    keys = rotated(kv.float().unsqueeze(1), positions, cos_sin).squeeze(1)[stored]
    assert_mla_close(read_mla(cache, block_size, slots[stored]), keys)
    for slot in slots[stored]:
        block, where, where_scales = mla_places(block_size, slot)
        assert cache[block, where_scales][7] == 0
        cache[block, where] = cache[block, where_scales] = UNTOUCHED
    assert bool((allocation == UNTOUCHED).all())


# --- attention ---


def attention(q, keys, valid, sink, scale):
    """transformers' eager attention in f64: q [T, H, 512], keys [T, S, 512], valid [T, S] -> [T, H, 512]."""
    module = SimpleNamespace(num_key_value_groups=q.shape[1], sinks=sink.double(), training=False)
    mask = torch.zeros(valid.shape, dtype=torch.float64).masked_fill(~valid, -math.inf)[:, None, None]
    key = keys.unsqueeze(1)
    out, _ = reference.eager_attention_forward(module, q.double().unsqueeze(2), key, key, mask, scale)
    return out.squeeze(1)


def gathered(cache: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """Keys f64 [T, S, 512] at slots [T, S], zero at -1."""
    used = torch.unique(slots[slots >= 0])
    keys = torch.cat((read_mla(cache, block_size, used), torch.zeros(1, 512, dtype=torch.float64)))
    where = {slot: index for index, slot in enumerate(used.tolist())} | {-1: len(used)}
    return keys[torch.tensor([[where[slot] for slot in row] for row in slots.tolist()], dtype=torch.int64)]


class Chosen(NamedTuple):
    """Keys that tokens attend to: slots [T, S] of a cache whose blocks hold `block_size` tokens."""

    cache: torch.Tensor
    slots: torch.Tensor
    block_size: int


def flash_mla(q: torch.Tensor, window: Chosen, compressed: Chosen, sink: torch.Tensor) -> torch.Tensor:
    """Into a view of a wider output, whose other heads must stay as they are."""
    wide = torch.full((len(q), q.shape[1] + 2, 512), math.nan, dtype=q.dtype)
    out = wide[:, 1:-1]
    cpu_kernels.flash_mla_with_kvcache_cpu(out, q, *window, *compressed, sink, 512**-0.5)
    assert bool(wide[:, 0].isnan().all()) and bool(wide[:, -1].isnan().all())
    return out


def check_attention(q, window: Chosen, compressed: Chosen, sink, *, rtol=1e-4, atol=1e-5) -> torch.Tensor:
    out = flash_mla(q, window, compressed, sink)
    slots = torch.cat((window.slots, compressed.slots), 1)
    keys = torch.cat([gathered(*chosen) for chosen in (window, compressed)], 1)
    want = attention(q, keys, slots >= 0, sink[: q.shape[1]], 512**-0.5)
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=atol)
    return out


def random_slots(tokens: int, width: int, slots: torch.Tensor, seed: int) -> torch.Tensor:
    """Distinct slots in each row, and -1 here and there."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, len(slots), generator=generator).argsort(-1)[:, :width]
    return slots[order].masked_fill(torch.rand(order.shape, generator=generator) < 0.3, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compressed_block_size", [64, 2])
def test_flash_mla_over_window_and_compressed_keys(dtype, compressed_block_size):
    """Scattered slots of several requests, NaN in every slot that no token chose, slot 0 among them."""
    near, far = 5 + permutation(40)[:30], 3 + permutation(100, seed=1)[:40]
    window = Chosen(random_mla(2, 64, near, seed=2), random_slots(11, 12, near, seed=3), 64)
    window.slots[:, 0] = near[:11]  # a token sees itself at least
    blocks = 104 // compressed_block_size + 1
    cache = random_mla(blocks, compressed_block_size, far, seed=4)
    compressed = Chosen(cache, random_slots(11, 20, far, seed=5), compressed_block_size)
    q = randn(11, HEADS, 512, seed=6, dtype=dtype) * 2
    loose = {"rtol": 2**-7, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    check_attention(q, window, compressed, randn(HEADS, seed=7), **loose)


def test_flash_mla_sinks():
    """-inf (a padded head) takes no weight, a large one takes nearly all; entries beyond q's heads are ignored."""
    slots = torch.arange(1, 9)
    window = Chosen(random_mla(1, 16, slots), random_slots(3, 8, slots, seed=1), 16)
    window.slots[:, 0] = slots[:3]
    nothing = Chosen(window.cache, torch.empty(3, 0, dtype=torch.int64), 1)
    sink = torch.tensor([-math.inf, 0.0, 3.0, 40.0, math.nan])
    out = check_attention(randn(3, HEADS, 512, seed=2), window, nothing, sink)
    assert out[:, 3].abs().max() < 1e-6 < out[:, 0].abs().max()


@pytest.mark.parametrize("sink", [0.5, -math.inf])
def test_flash_mla_token_without_keys_gives_zero(sink):
    slots, nowhere = torch.arange(1, 9), torch.full((3, 8), -1)
    cache, q, sink = random_mla(1, 16, slots), randn(3, 2, 512), torch.full((2,), sink)
    nothing = Chosen(cache, nowhere, 16)
    window = Chosen(cache, torch.stack((slots, nowhere[0], slots.flip(0))), 16)
    out = flash_mla(q, window, nothing, sink)
    assert bool((out[1] == 0).all()) and bool(out.isfinite().all()) and bool((out[[0, 2]] != 0).any())
    assert bool((flash_mla(q, nothing, nothing, sink) == 0).all())


def test_flash_mla_in_chunks_some_without_compressed_keys(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "ATTENTION_CHUNK", 7)  # does not divide the number of tokens
    near, far = torch.arange(10, 40), torch.arange(4, 12)
    window = Chosen(random_mla(4, 16, near), random_slots(30, 9, near, seed=1), 16)
    window.slots[:, 0] = near
    compressed = Chosen(random_mla(2, 8, far, seed=2), random_slots(30, 5, far, seed=3), 8)
    compressed.slots[:14] = -1
    check_attention(randn(30, 3, 512, seed=4), window, compressed, randn(3, seed=5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inverse_rope(cos_sin, dtype):
    """Of the first heads of a padded output, at each token's own position; undoes the rotation."""
    o = randn(9, HEADS + 3, 512, dtype=dtype)[:, :HEADS]
    positions = randint(0, len(cos_sin), 9, seed=1)
    got = cpu_kernels.inverse_gptj_rope_o_proj_cpu(o, positions, cos_sin, ROPE)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, rotated(o.float(), positions, cos_sin, inverse=True))
    torch.testing.assert_close(rotated(got, positions, cos_sin), o.float(), rtol=1e-4, atol=1e-5)


# --- the compressor ---


def slot_of(table: list[int], position: int, block_size: int) -> int:
    return -1 if position < 0 else table[position // block_size] * block_size + position % block_size


@pytest.mark.parametrize("block_size", [4, 8])
def test_save_partial_states(block_size):
    """kv and score as column views of one projection, slots of -1, a state cache pooled with other layers'."""
    width, ratio, tokens = 24, 4, 11
    kv, score = randn(tokens, 2 * width).split(width, -1)
    ape, positions = randn(ratio, width, seed=1), randint(0, 500, tokens, seed=2)
    slots = permutation(6 * block_size)[:tokens]
    slots[3] = slots[-1] = -1
    allocation, flat = pooled(6, block_size * 2 * width, torch.float32)
    state = flat.unflatten(1, (block_size, 2 * width))
    cpu_kernels.save_partial_states_cpu(kv, score, ape, positions, state, slots)
    expected, flat = pooled(6, block_size * 2 * width, torch.float32)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            row = flat.unflatten(1, (block_size, 2 * width))[slot // block_size, slot % block_size]
            row[:width], row[width:] = kv[token], score[token] + ape[int(positions[token]) % ratio]
    assert torch.equal(allocation.view(torch.uint8), expected.view(torch.uint8))


STEPS = {
    # For each step, (request, first token, end). Request 2 never closes a window.
    4: [[(0, 0, 5), (1, 0, 9)], [(0, 5, 6)], [(2, 0, 3), (0, 6, 23), (1, 9, 12)], [(0, 23, 24)]],
    128: [[(0, 0, 127), (1, 0, 100)], [(0, 127, 128)], [(1, 100, 130), (2, 0, 5), (0, 128, 300)]],
}
STATE_BLOCK_SIZE = {4: 4, 128: 8}


def compress_in_steps(store, module, hidden, ratio, cos_sin, cache, block_size) -> list[list[int]]:
    """Run STEPS[ratio] through save_partial_states_cpu and `store` -> each request's slots of compressed keys.

    `module` is transformers' compressor: its projections, ape and norm weight are the operators' inputs. Every
    step ends with a row of padding that would close a window.
    """
    state_block = STATE_BLOCK_SIZE[ratio]
    window = ratio * (2 if ratio == 4 else 1)
    kv, score = [module.kv_proj(x) for x in hidden], [module.gate_proj(x) for x in hidden]
    width = kv[0].shape[1]
    blocks_each = max(map(len, hidden)) // state_block + 1
    state_tables = permutation(len(hidden) * blocks_each, seed=11).view(len(hidden), -1).tolist()
    kv_tables = permutation(cache.shape[0], seed=12).view(len(hidden), -1).tolist()
    _, flat = pooled(len(hidden) * blocks_each, state_block * 2 * width, torch.float32)
    state = flat.unflatten(1, (state_block, 2 * width))
    written = [[] for _ in hidden]
    for step in STEPS[ratio]:
        rows = [(request, position) for request, start, end in step for position in range(start, end)]
        padding = torch.full((1, width), math.nan)
        slots = [slot_of(state_tables[request], position, state_block) for request, position in rows]
        gather = [
            [
                slot_of(state_tables[request], before, state_block)
                for before in range(last - window + 1, last + 1)
            ]
            for request, last in rows
        ]
        kv_slots = []
        for request, position in rows:
            closes = (position + 1) % ratio == 0
            kv_slots.append(slot_of(kv_tables[request], position // ratio, block_size) if closes else -1)
            if closes:
                written[request].append(kv_slots[-1])
        positions = torch.tensor([position for _, position in rows] + [ratio - 1])
        cpu_kernels.save_partial_states_cpu(
            torch.cat([kv[request][start:end] for request, start, end in step] + [padding]),
            torch.cat([score[request][start:end] for request, start, end in step] + [padding]),
            module.position_bias, positions, state, torch.tensor([*slots, -1]),
        )  # fmt: skip
        store(
            state, torch.tensor([*gather, [-1] * window]), positions, torch.tensor([*kv_slots, -1]),
            module.kv_norm.weight, RMS_EPS, cos_sin, cache, block_size, ratio,
        )  # fmt: skip
    return written


def compressor_inputs(config: DeepseekV4Config, ratio: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per request (hidden states [n, 64], low-rank queries [n, 32])."""
    ends = [max(end for step in STEPS[ratio] for r, _, end in step if r == request) for request in range(3)]
    hidden = [randn(end, config.hidden_size, seed=20 + request) for request, end in enumerate(ends)]
    return hidden, [randn(end, config.q_lora_rank, seed=30 + request) for request, end in enumerate(ends)]


@pytest.mark.parametrize("ratio, block_size", [(4, 64), (4, 2), (128, 2), (128, 1)])
def test_compressor_of_the_attention(config, cos_sin, ratio, block_size):
    """Whole prompts through transformers' compressor, and in uneven steps with paged state through ours."""
    kind = reference.DeepseekV4CSACompressor if ratio == 4 else reference.DeepseekV4HCACompressor
    module = filled(kind(config), 0.5, seed=40)
    hidden, queries = compressor_inputs(config, ratio)
    blocks = 3 * (-(-len(hidden[0]) // ratio // block_size) + 1)
    allocation, cache = pooled_mla(blocks, block_size)
    store = cpu_kernels.compress_norm_rope_store_cpu
    slots = compress_in_steps(store, module, hidden, ratio, cos_sin, cache, block_size)
    assert [len(each) for each in slots] == [len(x) // ratio for x in hidden]
    for x, query, where in zip(hidden, queries, slots):
        want, _ = module(x[None], query[None], torch.arange(len(x))[None], None, 0)
        assert want.shape[2] == len(where)
        if where:
            assert_mla_close(read_mla(cache, block_size, where), want[0, 0])
    for slot in chain(*slots):
        block, token, scales = mla_places(block_size, slot)
        assert cache[block, scales][7] == 0
        cache[block, token] = cache[block, scales] = UNTOUCHED
    assert bool((allocation == UNTOUCHED).all())


@pytest.mark.parametrize("block_size", [64, 2])
def test_compressor_of_the_indexer(config, cos_sin, block_size):
    module = filled(reference.DeepseekV4Indexer(config), 0.5, seed=50)
    hidden, queries = compressor_inputs(config, 4)
    allocation, cache = pooled(3 * (6 // block_size + 1), block_size * (INDEX_DIM + 4))
    store = cpu_kernels.compress_norm_rope_store_indexer_cpu
    slots = compress_in_steps(store, module, hidden, 4, cos_sin, cache, block_size)
    for x, query, where in zip(hidden, queries, slots):
        kept = reference.DeepseekV4CSACache(config)
        module(x[None], query[None], torch.arange(len(x))[None], SimpleNamespace(layers=[kept]), 0)
        assert kept.entry_count["indexer"] == len(where)
        if where:
            assert_index_close(*read_index(cache, block_size, where), kept.compressed_kv["indexer"][0])
    for slot in chain(*slots):
        block, token, scale = index_places(block_size, slot)
        cache[block, token] = cache[block, scale] = UNTOUCHED
    assert bool((allocation == UNTOUCHED).all())


@pytest.mark.parametrize("ratio", [4, 128])
def test_compressor_skips_rows_without_a_slot_and_rows_that_close_no_window(ratio):
    """The first window reaches before position 0: only its own tokens count, whatever slot 0 holds."""
    window, block_size = ratio * (2 if ratio == 4 else 1), STATE_BLOCK_SIZE[ratio]
    width = 512 * window // ratio
    state = randn(2 * ratio // block_size, block_size * 2 * width).unflatten(1, (block_size, 2 * width))
    state[0, 0] = math.nan
    gather = torch.full((3, window), -1)
    gather[:, -3:] = torch.tensor([3, 1, 2])
    positions, slots = torch.tensor([ratio - 1, ratio - 1, ratio - 2]), torch.tensor([1, -1, 0])
    weight = randn(512, seed=1)
    _, cache = pooled_mla(2, 1)
    cpu_kernels.compress_norm_rope_store_cpu(
        state, gather, positions, slots, weight, RMS_EPS, NO_ROTATION, cache, 1, ratio
    )
    half = 512 if ratio == 4 else 0  # the own window's tokens hold their part in the second half
    pooled_key = torch.zeros(512, dtype=torch.float64)
    for d in range(512):
        rows = [state[slot // block_size, slot % block_size].double() for slot in (3, 1, 2)]
        weights = [math.exp(row[width + half + d]) for row in rows]
        pooled_key[d] = sum(w * row[half + d] for w, row in zip(weights, rows)) / sum(weights)
    key = pooled_key / (pooled_key.square().mean() + RMS_EPS).sqrt() * weight
    assert_mla_close(read_mla(cache, 1, [1]), key[None])
    assert bool((cache[0] == UNTOUCHED).all())


# --- the indexer ---


def test_indexer_queries_are_quantized_exactly_for_every_amax():
    """At position 0, where nothing rotates; the step comes back in the weight."""
    q = every_amax()[:, :NOPE].float().unflatten(1, (7, 64)).repeat(1, 1, 2)
    q[..., 64:] *= randint(0, 2, *q.shape[:2], 1, seed=4) * 2.0 - 1
    fp8 = torch.zeros(q.shape).to(torch.float8_e4m3fn)
    steps = torch.zeros(q.shape[:2])
    positions = torch.zeros(len(q), dtype=torch.int64)
    cpu_kernels.fused_indexer_q_rope_quant_cpu(
        positions, q, NO_ROTATION, fp8, torch.ones(q.shape[:2]), 1.0, 1.0, steps
    )
    exponent = smallest_exponent(q.abs().amax(-1)).double()
    assert torch.equal(steps.double(), 2.0**exponent)
    want = nearest_e4m3(q.double() * 2.0 ** -exponent.unsqueeze(-1))
    assert torch.equal(fp8.double(), E4M3[want.long()])  # as values: rotating by nothing may turn -0 into 0


def test_indexer_queries(cos_sin):
    """As the Triton kernel: the rotated half is rounded to bf16, the other is not; the step goes into the weight."""
    tokens, heads = 13, 8
    q, weights = randn(tokens, heads, INDEX_DIM) * 5, randn(tokens, heads, seed=1)
    positions = randint(0, len(cos_sin), tokens, seed=2)
    wide = torch.zeros(tokens, heads + 1, INDEX_DIM).to(torch.float8_e4m3fn)
    out = torch.full((tokens, heads + 1), math.nan)
    cpu_kernels.fused_indexer_q_rope_quant_cpu(
        positions, q, cos_sin, wide[:, 1:], weights, 0.25, 0.7, out[:, :heads]
    )
    turned = rotated(q, positions, cos_sin)
    exact = torch.cat((turned[..., :64], turned[..., 64:].bfloat16().float()), -1).double()
    step = 2.0 ** smallest_exponent(exact.abs().amax(-1)).double()
    torch.testing.assert_close(out[:, :heads].double(), weights * step * 0.25 * 0.7, rtol=1e-6, atol=0)
    codes, want = wide[:, 1:].view(torch.uint8), nearest_e4m3(exact / step.unsqueeze(-1))
    assert torch.equal(codes[..., :64], want[..., :64])
    # Of f32 rotations in another order of operations a few round to the neighbouring bf16, then e4m3.
    assert bool(((codes[..., 64:].int() - want[..., 64:].int()).abs() <= 1).all())
    assert (codes == want).double().mean() > 0.99
    assert bool((wide[:, 0].float() == 0).all()) and bool(out[:, heads].isnan().all())


def index_cache(blocks: int, block_size: int, slots) -> torch.Tensor:
    _, cache = pooled(blocks, block_size * (INDEX_DIM + 4))
    codes = randint(0, 0x7F, len(slots), INDEX_DIM, dtype=torch.uint8)
    scales = 2.0 ** randint(-6, -2, len(slots)).float()
    codes |= randint(0, 2, len(slots), INDEX_DIM, seed=1, dtype=torch.uint8) << 7
    for index, slot in enumerate(slots):
        block, where, where_scale = index_places(block_size, slot)
        cache[block, where] = codes[index]
        cache[block, where_scale] = scales[index : index + 1].view(torch.uint8)
    return cache


def logits_loop(q, cache, weight, lens, tables, block_size, max_len) -> torch.Tensor:
    logits = torch.full((len(q), max_len), -math.inf, dtype=torch.float64)
    q = E4M3[q.view(torch.uint8).long()]
    for token, length in enumerate(lens.tolist()):
        for position in range(length):
            slot = slot_of(tables[token].tolist(), position, block_size)
            key, scale = read_index(cache, block_size, [slot])
            dots = [max(0.0, float(head @ key[0])) for head in q[token]]
            logits[token, position] = sum(float(w) * dot for w, dot in zip(weight[token], dots)) * scale[0]
    return logits


@pytest.mark.parametrize("block_size", [1, 4, 64])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_paged_logits(block_size, integer):
    """Several requests, tokens without any key, page tables that end in -1, NaN where no token may look."""
    counts = {0: [0, 0, 1, 5], 1: [17], 2: [0], 3: [8, 9, 9, 16, 12]}  # request -> its tokens' lengths
    pages = {request: -(-max(lengths) // block_size) for request, lengths in counts.items()}
    order = iter(permutation(sum(pages.values()) + 3, seed=5).tolist())
    owned = {request: [next(order) for _ in range(count)] for request, count in pages.items()}
    rows = [(request, length) for request in (1, 0, 2, 3) for length in counts[request]]
    tables = torch.full((len(rows), max(pages.values()) + 1), -1, dtype=integer)
    for row, (request, _) in enumerate(rows):
        tables[row, : pages[request]] = torch.tensor(owned[request])
    lens = torch.tensor([length for _, length in rows], dtype=integer)
    used = [slot_of(owned[r], p, block_size) for r, lengths in counts.items() for p in range(max(lengths))]
    cache = index_cache(sum(pages.values()) + 3, block_size, used)
    q, weight = randn(len(rows), 3, INDEX_DIM, seed=6).to(torch.float8_e4m3fn), randn(len(rows), 3, seed=7)
    got = cpu_kernels.fp8_paged_mqa_logits_cpu(q, cache, weight, lens, tables, block_size, 20)
    want = logits_loop(q, cache, weight, lens, tables, block_size, 20)
    assert got.dtype == torch.float32 and got.shape == want.shape
    finite = want[want.isfinite()]
    assert finite.min() < 0 < finite.max()  # weights of both signs
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * float(finite.abs().max()))


def test_paged_logits_of_a_prompt_longer_than_a_chunk(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "ATTENTION_CHUNK", 5)
    arguments = sample("fp8_paged_mqa_logits_cpu", 24)
    got = cpu_kernels.fp8_paged_mqa_logits_cpu(*arguments)
    want = logits_loop(*arguments)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)


def test_indexer_end_to_end(config, cos_sin):
    """Compress, quantize, score: transformers' scores up to fp8's rounding, and its visible positions."""
    module = filled(reference.DeepseekV4Indexer(config), 0.5, seed=60)
    length, ratio, block_size = 161, 4, 16
    x, query, positions = randn(length, 64, seed=1), randn(length, 32, seed=2), torch.arange(length)
    seen = {}
    module.scorer.register_forward_hook(lambda _, __, scores: seen.update(scores=scores[0]))
    theirs = module(x[None], query[None], positions[None], None, 0)[0]

    table = permutation(4).int()
    _, cache = pooled(4, block_size * (INDEX_DIM + 4))
    _, flat = pooled(41, 4 * 512, torch.float32)
    state = flat.unflatten(1, (4, 512))
    cpu_kernels.save_partial_states_cpu(
        module.kv_proj(x), module.gate_proj(x), module.position_bias, positions, state, positions
    )
    window = positions.unsqueeze(1) - 7 + torch.arange(8)
    kv_slots = torch.tensor([slot_of(table.tolist(), p // ratio, block_size) for p in range(length)])
    kv_slots[(positions + 1) % ratio != 0] = -1
    cpu_kernels.compress_norm_rope_store_indexer_cpu(
        state, window.clamp(min=-1), positions, kv_slots, module.kv_norm.weight, RMS_EPS, cos_sin, cache,
        block_size, ratio,
    )  # fmt: skip
    q = module.q_b_proj(query).view(length, config.index_n_heads, INDEX_DIM)
    fp8, weights = torch.empty(q.shape, dtype=torch.float8_e4m3fn), torch.empty(q.shape[:2])
    cpu_kernels.fused_indexer_q_rope_quant_cpu(
        positions, q, cos_sin, fp8, module.scorer.weights_proj(x), INDEX_DIM**-0.5, config.index_n_heads**-0.5,
        weights,
    )  # fmt: skip
    lens = (positions + 1) // ratio
    logits = cpu_kernels.fp8_paged_mqa_logits_cpu(
        fp8, cache, weights, lens, table.expand(length, 4).contiguous(), block_size, 40
    )
    visible = torch.arange(40) < lens.unsqueeze(1)
    assert torch.equal(logits > -math.inf, visible)
    off = (logits - seen["scores"])[visible]
    spread = seen["scores"][visible].std()
    assert off.abs().max() < 0.2 * spread and off.square().mean().sqrt() < 0.05 * spread

    chosen, scratch = torch.empty(2, length, 512, dtype=torch.int32)
    cpu_kernels.topk_transform_512_cpu(logits, lens, table.expand(length, 4), scratch, block_size, chosen)
    for row in range(length):
        assert set(chosen[row].tolist()) == set(theirs[row].tolist()) | {-1}


def check_topk(scores, lens, tables, page_size, width=512) -> None:
    """Against a sort: the same scores are chosen, each position once, -1 in the rest."""
    wide = torch.full((len(scores), width + 3), -7, dtype=torch.int32)
    pages = torch.full((len(scores), width), -7, dtype=torch.int32)
    cpu_kernels.topk_transform_512_cpu(scores, lens, tables, pages, page_size, wide[:, :width])
    assert bool((wide[:, width:] == -7).all())
    for row, length in enumerate(lens.tolist()):
        picked = [position for position in wide[row, :width].tolist() if position != -1]
        assert len(picked) == len(set(picked)) == min(length, width)
        assert all(0 <= position < length for position in picked)
        best = sorted(scores[row, :length].tolist(), reverse=True)[:width]
        assert sorted((float(scores[row, position]) for position in picked), reverse=True) == best
        table = tables[row].tolist()
        translated = [-1 if p == -1 else slot_of(table, p, page_size) for p in wide[row, :width].tolist()]
        assert pages[row].tolist() == translated
    only_pages = torch.full_like(pages, -7)
    cpu_kernels.topk_transform_512_cpu(scores, lens, tables, only_pages, page_size, None)
    assert torch.equal(only_pages, pages)


@pytest.mark.parametrize("columns", [1, 100, 512, 513, 700])
@pytest.mark.parametrize("beyond", [-math.inf, math.inf])
def test_topk(columns, beyond):
    """Rows shorter than 512, exactly as long, longer, empty; what lies beyond a row's length does not count."""
    lens = torch.tensor([0, 1, columns // 2, columns - 1, columns, min(columns, 512)], dtype=torch.int32)
    scores = randn(len(lens), columns)
    scores[torch.arange(columns) >= lens.unsqueeze(1)] = beyond
    tables = torch.stack([permutation(columns // 64 + 1, seed=seed) for seed in range(len(lens))]).int()
    check_topk(scores, lens, tables, 64)


def test_topk_of_ties():
    """relu makes scores of exactly zero: enough positions are chosen all the same, and each once."""
    scores = randn(5, 700).relu()
    scores[1] = 0.0
    scores[2] = -0.0
    scores[3, :300] = 2.0
    lens = torch.tensor([700, 700, 600, 650, 400])
    tables = permutation(6).int().expand(5, 6)
    check_topk(scores, lens, tables, 128)


# --- routing ---


def choose(logits: torch.Tensor, bias: torch.Tensor, topk: int, scaling: float):
    return cpu_kernels.biased_topk_cpu(logits, logits, bias, topk, True, "sqrtsoftplus", 0, scaling, True)


def test_biased_topk(config, defined):
    """Chosen with the bias, weighted without it; the same through vLLM's router."""
    router = reference.DeepseekV4TopKRouter(config)
    router.weight.requires_grad_(False).copy_(torch.eye(64))
    router.e_score_correction_bias.copy_(randn(64, seed=1))
    logits = randn(40, 64, seed=2) * 3
    _, want_weights, want_ids = router(logits)
    weights, ids = choose(logits, router.e_score_correction_bias, 6, 2.5)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    want_ids, order = want_ids.sort(-1)
    assert torch.equal(ids.long().sort(-1).values, want_ids)
    torch.testing.assert_close(weights.gather(1, ids.long().argsort(-1)), want_weights.gather(1, order))
    unbiased = torch.topk(logits, 6).indices.sort(-1).values
    assert bool((unbiased != want_ids).any())
    routed = _sqrtsoftplus_bias_topk(logits, 6, True, router.e_score_correction_bias, 2.5, None, None)
    torch.testing.assert_close(routed[0].sum(-1), torch.full((40,), 2.5))
    assert torch.equal(routed[1].long().sort(-1).values, want_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_topk(config, defined, dtype):
    router = reference.DeepseekV4HashRouter(config)
    router.weight.requires_grad_(False).copy_(torch.eye(64))
    router.tid2eid.copy_(torch.stack([permutation(64, seed=token)[:6] for token in range(config.vocab_size)]))
    logits, tokens = randn(30, 64).to(dtype), randint(0, config.vocab_size, 30, seed=1)
    _, want_weights, want_ids = router(logits.float(), tokens)
    table = router.tid2eid.int()
    weights, ids = cpu_kernels.hash_topk_cpu(logits, table[tokens], 6, "sqrtsoftplus", 0, 64, 2.5)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert torch.equal(ids.long(), want_ids)
    torch.testing.assert_close(weights, want_weights)
    routed = _sqrtsoftplus_bias_topk(logits.float(), 6, True, None, 2.5, tokens, table)
    torch.testing.assert_close(routed[0], want_weights, rtol=1e-3, atol=1e-3)
    assert torch.equal(routed[1].long(), want_ids)


@pytest.mark.parametrize("logit", [-80.0, -20.0, -1.0, 0.0, 19.9, 20.1, 300.0])
def test_routing_weights_over_the_range_of_logits(logit):
    """Against sqrt(log(1 + e^x)) in f64: two experts share the weight as their scores do."""
    score = [math.sqrt(x if x > 100 else math.log1p(math.exp(x))) for x in (logit, logit - 1)]
    gating = torch.full((1, 64), logit - 50)
    gating[0, 3], gating[0, 9] = logit, logit - 1
    weights, ids = choose(gating, torch.zeros(64), 2, 1.5)
    assert ids.tolist() == [[3, 9]]
    want = torch.tensor([[1.5 * each / sum(score) for each in score]])
    torch.testing.assert_close(weights, want)


def test_equal_experts_are_chosen_once_each():
    gating = torch.zeros(3, 64)
    weights, ids = choose(gating, torch.zeros(64), 6, 3.0)
    assert all(len(set(row)) == 6 for row in ids.tolist())
    torch.testing.assert_close(weights, torch.full((3, 6), 0.5))


@pytest.mark.parametrize(
    "change",
    [{4: False}, {5: "sigmoid"}, {6: 1}, {8: False}],
    ids=["renormalize", "score", "shared", "scaling"],
)
def test_biased_topk_refuses_what_it_does_not_do(change):
    arguments = sample("biased_topk_cpu", 2)
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(AssertionError):
        cpu_kernels.biased_topk_cpu(*arguments)


@pytest.mark.parametrize("change", [{2: 8}, {3: "softmax"}, {4: 1}], ids=["topk", "score", "shared"])
def test_hash_topk_refuses_what_it_does_not_do(change):
    arguments = sample("hash_topk_cpu", 2)
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(AssertionError):
        cpu_kernels.hash_topk_cpu(*arguments)
