"""vLLM's process groups for one rank: layers and models cannot be built without."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)

from cutedsl_nvfp4.vllm import plugin


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """Our kernels registered and the groups of one rank, whose store is a file in `folder`."""
    plugin.register()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
        initialize_model_parallel(1)
    yield
    cleanup_dist_env_and_memory()
