"""Serve a deep model from the weights of a few layers: for timing models that no disk at hand can hold.

    python3 -m bench.serving.repeat_layers SHALLOW DEEP --layers 43     folder DEEP: SHALLOW's files, more layers
    python3 -m bench.serving.repeat_layers --install FOLDER             the vLLM plugin, in a folder of PYTHONPATH
    VLLM_PLUGINS=repeat_layers,… vllm serve DEEP --load-format repeat_layers

SHALLOW is a folder of bench/serving/random_checkpoint.py. Layer L of DEEP is loaded from the stored layer with its
compression ratio. Every layer has memory of its own: only the values repeat. Stock vLLM takes it as the
patched one does; the check that checkpoint and model fit is left out.
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path

SOURCES = "repeat_layers.json"  # the stored layer of each layer
PLUGIN = "repeat_layers"


def write_deep(shallow: Path, deep: Path, layers: int) -> None:
    config = json.loads((shallow / "config.json").read_text())
    stored = config["compress_ratios"][: config["num_hidden_layers"]]
    middle = [ratio for ratio in (4, 128) if ratio in stored]
    ratios = stored[:3] + [middle[i % len(middle)] for i in range(layers - len(stored[:3]))]
    config |= {"num_hidden_layers": layers, "compress_ratios": ratios, "num_hash_layers": layers}
    deep.mkdir(parents=True)
    for file in shallow.iterdir():
        if file.name != "config.json":
            (deep / file.name).symlink_to(file.resolve())
    (deep / "config.json").write_text(json.dumps(config, indent=1))
    (deep / SOURCES).write_text(json.dumps([stored.index(ratio) for ratio in ratios]))


def install(folder: Path) -> None:
    """Make `folder`, which PYTHONPATH must name, hold this module and the entry point that vLLM looks for."""
    info = folder / f"{PLUGIN}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PLUGIN} = {PLUGIN}:register\n")
    (folder / f"{PLUGIN}.py").write_text(Path(__file__).read_text())


def register() -> None:
    """vllm.general_plugins: offer `--load-format repeat_layers`."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    if PLUGIN in _LOAD_FORMAT_TO_MODEL_LOADER:
        return

    @register_model_loader(PLUGIN)
    class RepeatedLayersLoader(DefaultModelLoader):
        def __init__(self, load_config):
            super().__init__(dataclasses.replace(load_config, load_format="safetensors"))

        def load_weights(self, model, model_config) -> None:
            sources = json.loads((Path(model_config.model) / SOURCES).read_text())
            self._init_ep_weight_filter(model_config)
            model.load_weights(_repeated(self.get_all_weights(model_config, model), sources))


def _repeated(weights, sources: list[int]):
    for name, tensor in weights:
        layer = re.match(r"layers\.(\d+)\.", name)
        if layer is None:
            yield name, tensor
            continue
        for index, source in enumerate(sources):
            if source == int(layer.group(1)):
                yield f"layers.{index}.{name[layer.end() :]}", tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shallow", type=Path, nargs="?")
    parser.add_argument("deep", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=43)
    parser.add_argument("--install", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.install:
        install(arguments.install)
    elif arguments.deep:
        write_deep(arguments.shallow, arguments.deep, arguments.layers)
    else:
        parser.error("give SHALLOW and DEEP, or --install FOLDER")


if __name__ == "__main__":
    main()
