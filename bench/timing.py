"""Time short kernels: CUDA graphs over rotated operands, medians, and the ceilings of the machine at hand."""

import time
from collections.abc import Callable

import torch

ROTATED_BYTES = 300_000_000  # several times the 60 MB of L2, so that weights come from memory as in a model
DATASHEET_BYTES_PER_S = 4.8e12  # NVIDIA H200 SXM
DATASHEET_FLOPS = 989e12


def copies(bytes_each: int) -> int:
    """How many distinct weights to rotate through."""
    return max(4, min(256, ROTATED_BYTES // bytes_each + 1))


def capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def warm_up(seconds: float = 0.3) -> None:
    """Keep the GPU busy until its clocks have risen: what is timed in the first 0.2 s would take up to 25% longer."""
    words = torch.zeros(1 << 26, dtype=torch.int32, device="cuda")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for _ in range(50):
            torch.bitwise_not(words, out=words)
        torch.cuda.synchronize()


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int = 1) -> float:
    """Time of one replay, on average."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / replays


def _replays(graph: torch.cuda.CUDAGraph, target_us: float) -> int:
    """How many replays are long enough to time."""
    _replay_us(graph)
    return max(1, min(200, round(target_us / _replay_us(graph))))


def microseconds(
    graph: torch.cuda.CUDAGraph, calls: int, repeats: int = 5, target_us: float = 3000.0
) -> float:
    """Median time of one call, each repeat long enough (`target_us`) to time."""
    replays = _replays(graph, target_us)
    times = sorted(_replay_us(graph, replays) for _ in range(repeats))
    return times[len(times) // 2] / calls


def interleaved(
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], repeats: int, target_us: float = 1000.0
) -> dict[str, list[float]]:
    """{name: time of one call in each repeat} of {name: (graph, its calls)}; a repeat goes through all graphs.

    A graph is replayed once untimed before each of its repeats, since another one ran before it.
    """
    replays = {name: _replays(graph, target_us) for name, (graph, _) in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, (graph, calls) in graphs.items():
            graph.replay()
            times[name].append(_replay_us(graph, replays[name]) / calls)
    return times


def ceilings() -> dict[str, float]:
    """Bytes/s of a large elementwise kernel (read + written) and FLOP/s of a large bf16 product, now."""
    source = torch.randint(0, 1 << 30, (1 << 29,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds(capture([lambda: torch.bitwise_not(source, out=target)]), 1)
    a = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    product = microseconds(capture([lambda: torch.mm(a, b)]), 1, target_us=20000.0)
    return {"bytes_per_s": 2 * source.nbytes / copy * 1e6, "flops": 2 * 8192**3 / product * 1e6}


def floor_us(shape, m: int, bytes_per_s: float, flops: float) -> float:
    """The least time a W4A16 linear can take: its bytes once, or its products."""
    moved = shape.weight_bytes + 2 * m * (shape.groups * shape.k + shape.n)
    return max(moved / bytes_per_s, 2 * m * shape.n * shape.k / flops) * 1e6
