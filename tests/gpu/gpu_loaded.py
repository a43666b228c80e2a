"""One rank under ZeRO-3, started by gpu_checks.py: compares what it has read with the file.

python tests/gpu/gpu_loaded.py FOLDER nf4|none
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.distributed.engine import gathered
from oneshot.distributed.runtime import Runtime, start
from oneshot.settings import ModelSettings


def main() -> None:
    folder, quantize = Path(sys.argv[1]) / "model", sys.argv[2]
    settings = ModelSettings(path=str(folder), quantize="nf4" if quantize == "nf4" else None)
    runtime = start()
    assert runtime.sharding == "zero3"
    source = find_source(settings, runtime)
    model = load_model(runtime, source, settings)
    wanted = load_file(folder / "model.safetensors")
    if quantize == "nf4":
        alone = Runtime(0, 1, runtime.device, "none", runtime.accelerator)
        wanted |= {name: p.data.cpu() for name, p in load_model(alone, source, settings).named_parameters()}
    for name, parameter in model.named_parameters():
        with gathered(runtime, [parameter]):
            found = parameter.data.cpu()
            # packed bytes are no numbers: some are NaN
            same = torch.equal(found.flatten().view(torch.uint8), wanted[name].flatten().view(torch.uint8))
            assert same, f"{name} is not what the file holds"


if __name__ == "__main__":
    main()
