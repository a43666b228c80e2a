"""``oneshot init DIR``: the files that start runs, copied into a folder of the user's to be changed there."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from oneshot.errors import UserError
from oneshot.shipped import FOLDERS, root

PROG = "oneshot init"
DESCRIPTION = "Copy launch/, ds_configs/ and slurm/ into a folder of yours, to change them there."


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``oneshot init``."""
    from oneshot.commandline import run_command

    run_command(argv, PROG, run)


def run(argv: list[str]) -> None:
    """Copy the files, and print what was written and what to type next."""
    options = parser().parse_args(argv)
    written = copy_shipped(options.folder, force=options.force)
    for name in FOLDERS:
        here = [path for path in written if path.parts[0] == name]
        print(f"{name}/: {f'files written: {len(here)}' if here else 'as shipped already'}")
    change = "" if options.folder.resolve() == Path.cwd() else f"cd {options.folder} && "
    print(f"Next: {change}oneshot repair --launch launch/ddp_cpu.yaml --config launch/runs/tiny.yaml")
    print(f"   or {change}accelerate launch --config_file launch/zero3.yaml -m oneshot.repair --config FILE")
    print(f"   or {change}sbatch slurm/patch_70b.sh --model.path DIR")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from oneshot.commandline import CommandParser

    made = CommandParser(PROG, DESCRIPTION)
    made.add_argument("folder", metavar="DIR", type=Path, help="folder to write into, made where there is none")
    made.add_argument("--force", action="store_true", help="overwrite files that differ from what ships")
    return made


def copy_shipped(folder: Path, *, force: bool = False) -> list[Path]:
    """Copy what ships into ``folder``; return the paths written, relative to it. Files that are alike are left alone.

    Raises:
        UserError: a file is there that differs from what ships, unless ``force``; then nothing is written
    """
    for path in (*folder.parents, folder, *(folder / name for name in FOLDERS)):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: take another folder for oneshot init.")
    shipped = [path for name in FOLDERS for path in sorted((root() / name).rglob("*")) if path.is_file()]
    names = [path.relative_to(root()) for path in shipped]
    differ = [name for name in names if (folder / name).exists() and not _alike(root() / name, folder / name)]
    if differ and not force:
        some = ", ".join(map(str, differ[:3])) + (", ..." if len(differ) > 3 else "")
        raise UserError(
            f"Files in {folder} differ from what ships ({some}): take another folder, or --force to overwrite them."
        )
    written = [name for name in names if name in differ or not (folder / name).exists()]
    for name in written:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        half = (folder / name).with_name(f".{name.name}.oneshot-partial")
        shutil.copyfile(root() / name, half)
        # an installer may have dropped the bit; scripts start each other by path
        half.chmod(0o755 if name.suffix == ".sh" else 0o644)
        os.replace(half, folder / name)
    return written


def _alike(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
