"""Hopper (H100, H200, H20): NVFP4 weights decoded in registers to bf16, W4A16."""

from ..family import Family, Layout

FAMILY = Family(
    name="sm90",
    chip="Hopper",
    capabilities=(90,),
    layout=Layout.SM90,
    w4a4=False,
    batch_invariant=True,
    proven=True,
    f32_limit=2e-5,
)
