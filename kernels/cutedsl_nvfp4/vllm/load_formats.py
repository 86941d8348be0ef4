"""Which of vLLM's --load-format lead NVFP4 tensors through our checks, and why the others are refused.

What a tensor passes on its way into a layer:

    names        transformers' and compressed-tensors' -> DeepSeek's     the model's own mapper, in load_weights
    divisors     compressed-tensors' global scales inverted              patches on get_all_weights
    coverage     every tensor has a place, every parameter its tensors   patches on load_weights
    preparation  parameters -> operands, refused a second time           BaseModelLoader.load_model

The first three are DeepSeek-V4's; preparation is every NVFP4 model's that our kernels serve.
"""

# --load-format -> the loader of vLLM's that takes every tensor through all of it
CHECKED = {
    **dict.fromkeys(
        ("auto", "hf", "safetensors", "mistral", "fastsafetensors", "instanttensor"), "DefaultModelLoader"
    ),
    "runai_streamer": "RunaiModelStreamerLoader",
}
# -> the loader that reads no tensor at all and still prepares
EMPTY = {"dummy": "DummyModelLoader"}

_STATE = (
    "it reads parameters as a running vLLM wrote them, and ours are operands already, which would be prepared a second "
    "time"
)
# -> why NVFP4 layers that our kernels serve cannot be loaded so
UNPREPARED = {
    "tensorizer": "it fills the model without preparing operands",
    "sharded_state": _STATE,
    "runai_streamer_sharded": _STATE,
    "ipc_cache": "it maps another process's operands, without what goes with them on each layer",
    "modelexpress": "it loads the model in a package of its own, which this project has not seen",
}
# -> why the NVFP4 layers of a DeepSeek-V4 cannot be loaded so; other models can
UNCOVERED = dict.fromkeys(
    ("pt", "npcache"),
    "it reads pickles, and coverage is checked from safetensors headers before anything is read",
)
REMEDY = "leave it out, or use runai_streamer; the checkpoint must be safetensors"


def refusal(load_format: str, deepseek_v4: bool) -> str | None:
    """Why NVFP4 layers are not loaded by `load_format`, with the remedy; None where they pass every check.

    `deepseek_v4`: of a DeepSeek-V4, whoever's kernels serve it; else of another model, by our kernels.
    """
    if load_format in CHECKED or load_format in EMPTY:
        return None
    if load_format in UNCOVERED and not deepseek_v4:
        return None
    reason = {**UNPREPARED, **UNCOVERED}.get(load_format, "this project does not know it")
    return f"{reason}; {REMEDY}"
