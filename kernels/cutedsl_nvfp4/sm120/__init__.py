"""Workstation Blackwell (RTX PRO 6000, DGX Spark): native FP4 warp-level MMAs, W4A4."""

from ..family import Family, Layout

FAMILY = Family(
    name="sm120",
    chip="Blackwell",
    capabilities=(120, 121),
    layout=Layout.BLOCK_SCALED,
    w4a4=True,
    batch_invariant=False,
    proven=False,  # compiled, and proven by each device's own self-check alone
    f32_limit=2e-4,  # nobody here has measured how FP4 tensor cores accumulate
)
