"""Data-centre Blackwell (B200, B300): native FP4 tensor cores with accumulators in tensor memory, W4A4."""

from ..family import Family, Layout

FAMILY = Family(
    name="sm100",
    chip="Blackwell",
    capabilities=(100, 103),
    layout=Layout.BLOCK_SCALED,
    w4a4=True,
    batch_invariant=False,
    proven=False,  # compiled, and proven by each device's own self-check alone
    f32_limit=2e-4,  # nobody here has measured how FP4 tensor cores accumulate
)
