"""How every kernel of this project is launched."""

import cuda.bindings.driver as cuda


def launch(called, grid: tuple, block: tuple, stream: cuda.CUstream, **how) -> None:
    """Launch what `self.kernel(...)` returned; `how`: cluster and min_blocks_per_mp, where a kernel needs them.

    With `use_pdl` (programmatic dependent launch) a kernel may start while its predecessor on the stream still runs.
    It waits (griddepcontrol_wait) before it reads what that one writes.
    """
    called.launch(grid=grid, block=block, stream=stream, use_pdl=True, **how)
