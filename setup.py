"""Puts ``launch``, ``ds_configs`` and ``slurm`` into the wheel; all else about the package is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("launch", "ds_configs", "slurm")  # oneshot/shipped.py finds them, in a checkout and in a wheel


class BuildWithShipped(build_py):
    """setuptools' own step, which takes package data from inside the package only."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout has them
            return
        for source, target in self._shipped():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + [target for _, target in self._shipped()]

    def _shipped(self) -> list[tuple[str, str]]:
        files = sorted(str(path) for folder in SHIPPED for path in Path(folder).rglob("*") if path.is_file())
        return [(file, str(Path(self.build_lib, "oneshot", "shipped_files", file))) for file in files]


setup(cmdclass={"build_py": BuildWithShipped})
