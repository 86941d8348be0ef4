"""What Blackwell's experts kernels are compiled for: whose an activation scale is, and what a product leaves behind.

Plain data: imports neither torch nor CuTe DSL.
"""

from enum import StrEnum


class Scale(StrEnum):
    """Whose the global scale of an activation is."""

    TENSOR = "tensor"  # f32 [1]
    EXPERT = "expert"  # f32 [E]
    TOKEN = "token"  # found here: amax / (6 * 448), 1 for a row of zeros


class Result(StrEnum):
    """What an epilogue makes of the accumulators."""

    NVFP4 = "nvfp4"  # w13: SwiGLU, rounded to NVFP4 with a scale that is known
    BF16 = "bf16"  # w13: SwiGLU, for a scale that depends on all of a slot
    ROWS = "rows"  # w2: scaled, by pair
