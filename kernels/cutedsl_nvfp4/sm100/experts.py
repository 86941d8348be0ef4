"""NVFP4 W4A4 mixture of experts on data-centre Blackwell: blackwell/experts.py with products of experts_kernel.py.

Keeps family.Experts.
"""

from functools import cache

from ..blackwell.experts import Experts
from . import tiles

_EXPERTS = Experts("sm100", tiles)

run, chosen, kernels = _EXPERTS.run, _EXPERTS.chosen, _EXPERTS.kernels
shipped, choices = cache(_EXPERTS.shipped), cache(_EXPERTS.choices)
