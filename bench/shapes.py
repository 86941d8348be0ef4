"""Every linear of DeepSeek-V4 Pro and Flash at every tensor-parallel size, their experts, the token counts."""

import argparse
from dataclasses import dataclass

TOKENS = tuple(2**i for i in range(14))  # 1 ... 8192


@dataclass(frozen=True)
class Shape:
    """out [M, n] with inner dimension k; with groups > 1 the weight is block diagonal."""

    name: str
    n: int
    k: int
    groups: int = 1

    @property
    def weight_bytes(self) -> int:
        return self.n * self.k * 9 // 16


def _model(
    prefix: str, hidden: int, q_rank: int, heads: int, o_groups: int, intermediate: int, tp: int
) -> list:
    q_width, o_rank = heads * 512, 1024
    shapes = [
        Shape(f"{prefix}.wq_b/{tp}", q_width // tp, q_rank),
        Shape(f"{prefix}.wo_a/{tp}", o_groups * o_rank // tp, q_width // o_groups, o_groups // tp),
        Shape(f"{prefix}.wo_b/{tp}", hidden, o_groups * o_rank // tp),
        Shape(f"{prefix}.shared_w13/{tp}", 2 * intermediate // tp, hidden),
        Shape(f"{prefix}.shared_w2/{tp}", hidden, intermediate // tp),
    ]
    if tp == 1:
        shapes += [
            Shape(f"{prefix}.wq_a_wkv", q_rank + 512, hidden),
            Shape(f"{prefix}.compressor_r128", 1024, hidden),
            Shape(f"{prefix}.compressor_r4", 2048, hidden),
            Shape(f"{prefix}.indexer_compressor", 512, hidden),
            Shape(f"{prefix}.indexer_weights", 64, hidden),
            Shape(f"{prefix}.indexer_wq_b", 8192, q_rank),
        ]
    return shapes


def model_shapes() -> list[Shape]:
    """Distinct shapes, first name wins: equal problems are measured once."""
    distinct: dict[tuple[int, int, int], Shape] = {}
    for tp in (1, 2, 4, 8):
        for shape in _model("pro", 7168, 1536, 128, 16, 3072, tp) + _model(
            "flash", 4096, 1024, 64, 8, 2048, tp
        ):
            distinct.setdefault((shape.n, shape.k, shape.groups), shape)
    return list(distinct.values())


def selected_shapes(which: str) -> list[Shape]:
    """Of model_shapes(), a slice "I:J" or the names separated by commas; KeyError names one that there is not."""
    if ":" in which:
        first, _, last = which.partition(":")
        return model_shapes()[int(first or 0) : int(last) if last else None]
    named = {shape.name: shape for shape in model_shapes()}
    return [named[name] for name in which.split(",")]


EXPERT_TOKENS = (1, 4, 16, 32, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True)
class ExpertCase:
    """`experts` local ones of `known`: ids below `experts` are local."""

    name: str
    experts: int
    known: int
    topk: int
    hidden: int
    intermediate: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * 9 // 16


EXPERT_CASES = (
    ExpertCase("flash", 256, 256, 6, 4096, 2048),
    ExpertCase("flash_tp4", 256, 256, 6, 4096, 512),
    ExpertCase("pro_tp8", 384, 384, 6, 7168, 384),
    ExpertCase("pro_tp4", 384, 384, 6, 7168, 768),
    ExpertCase("pro_ep8_all_local", 48, 48, 6, 7168, 3072),  # heavy: every choice falls on this rank
    ExpertCase("pro_ep8", 48, 384, 6, 7168, 3072),  # 0.75 of a token's 6 choices on average
)


def linear_parser(doc: str) -> argparse.ArgumentParser:
    """Arguments of a program that measures linears."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--shapes", default=":", help="slice of the shape list, or names separated by commas")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--seconds", type=float, default=500.0)
    return parser


def experts_parser(doc: str) -> argparse.ArgumentParser:
    """Arguments of a program that measures experts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--cases", default=",".join(case.name for case in EXPERT_CASES))
    parser.add_argument("--tokens", default=",".join(map(str, EXPERT_TOKENS)))
    parser.add_argument("--seconds", type=float, default=500.0)
    return parser
