"""What reaches each NVFP4 layer on texts of the user's: worker methods around ordinary requests.

For scripts/calibrate_checkpoint.py. The engine runs with CUTEDSL_NVFP4_ACTIVATIONS=nvfp4,
CUTEDSL_NVFP4_ACTIVATION_SCALE=warmup and CUTEDSL_NVFP4_IMPL=reference; while it observes, layers compute in W4A16.
"""

import re

from ..checkpoint.layers import EXPERTS, linears_in
from ..checkpoint.names import native_name
from ..format import AMAX_PER_GLOBAL_SCALE
from .backend import W2_INPUT
from .warmup import fold_in_twins, static_layers

START_METHOD, STOP_METHOD = "cutedsl_nvfp4_start_calibration", "cutedsl_nvfp4_stop_calibration"


def start_calibration(worker) -> None:
    model = worker.get_model()
    for _, _, scales in static_layers(model):
        scales.start_observing(next(model.parameters()).device)


def stop_calibration(worker) -> dict[str, float]:
    """{DeepSeek's name of a linear: amax / (6 * 448) of its input, 0.0 where nothing reached it} of this rank."""
    layers = static_layers(worker.get_model())
    fold_in_twins(layers)
    found: dict[str, float] = {}
    for path, module, scales in layers:
        assert scales.observed is not None, f"{path}: calibration was not started"
        seen = [(amax / AMAX_PER_GLOBAL_SCALE).tolist() for amax in scales.observed]
        scales.observed = None
        name = re.sub(r"^.*?(?=layers\.\d)", "", native_name(path))
        if W2_INPUT in scales.inputs:
            layer = name[: name.index(f".{EXPERTS}")]
            for expert, w2 in zip(_global_ids(module, len(seen[1])), seen[1], strict=True):
                reached = seen[0][0] if w2 else 0.0  # no token came to this expert
                prefix = f"{layer}.{EXPERTS}.{expert}"
                found |= {f"{prefix}.w1": reached, f"{prefix}.w2": w2, f"{prefix}.w3": reached}
            continue
        found |= dict.fromkeys(linears_in(name), seen[0][0])
    return found


def _global_ids(experts, local: int) -> list[int]:
    """The checkpoint's number of each of `local` experts of the module `experts`."""
    expert_map = experts.expert_map
    if expert_map is None:
        return list(range(local))
    ids = [0] * local
    for number, place in enumerate(expert_map.tolist()):
        if place >= 0:
            ids[place] = number
    return ids
