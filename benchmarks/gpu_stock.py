"""The stock sides of benchmarks/gpu.py: what a careful user of torch, PEFT, bitsandbytes, TRL or Unsloth would run."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_models import EXAMPLE, RANK, SCALES, TALKS, Scale

RATE = 1e-4  # learning rate of every fine-tune here


@dataclass(frozen=True)
class Place:
    """Where a part runs: cuda or cpu, the scale by name, and the folder of what is measured on."""

    device: str
    scale: str
    folder: Path

    @property
    def sizes(self) -> Scale:
        return SCALES[self.scale]

    @property
    def main(self) -> Path:
        return self.folder / "main"

    @property
    def small(self) -> Path:
        return self.folder / "small"

    def model_of(self, method: str) -> Path:
        """Return the checkpoint that a fine-tune by this method starts from."""
        return self.small if method == "full" else self.main


class NotHere(Exception):
    """A part cannot run here, for the reason that it gives; no failure."""


def settled(device: str) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak(device: str) -> None:
    """Give the device's unused memory back, and begin to look for its peak anew (on a CPU the old one stays)."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """Return the most bytes of tensors on the GPU so far; on a CPU those of the process."""
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def adamw(place: Place) -> dict[str, Any]:
    """AdamW (fused) on all weights, held and stepped in bf16: 8 bytes a parameter, the least that AdamW can do with."""
    import torch

    model = _pretrained(place.main, dtype=torch.bfloat16).to(place.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
    return {"method": "adamw", "precision": "bf16", **_steps(place, model, optimizer)}


def qlora(place: Place) -> dict[str, Any]:
    """QLoRA as PEFT's and bitsandbytes' pages have it: NF4 weights, a LoRA on all linear layers, AdamW (fused)."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    model = _pretrained(place.main, dtype=torch.bfloat16, quantization_config=packed, device_map={"": place.device})
    prepare: Any = prepare_model_for_kbit_training  # it has no types
    model = prepare(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, _lora(LoraConfig))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)
    return {"method": "qlora", "precision": "nf4", **_steps(place, model, optimizer)}


def _pretrained(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **options)


def _lora(kind: Any) -> Any:
    return kind(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def _steps(place: Place, model: Any, optimizer: Any) -> dict[str, Any]:
    """Train on the one example; every step is waited for, and the first is not timed."""
    import torch

    ids, labels = (torch.tensor([row], device=place.device) for row in _encoded(place, EXAMPLE)[0].values())
    losses, took = [], []
    for _ in range(place.sizes.steps):
        settled(place.device)
        clock = time.perf_counter()
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        settled(place.device)
        took.append(time.perf_counter() - clock)
    return {
        "tokens": ids.numel(), "seconds_per_step": statistics.median(took[1:]), "step_seconds": took[1:],
        "peak_bytes": peak_bytes(place.device), "losses": losses,
    }  # fmt: skip


def _encoded(place: Place, name: str) -> list[dict[str, list[int]]]:
    """The conversations of a file as input_ids and labels."""
    from transformers import AutoTokenizer

    from oneshot.data.conversations import read_conversations
    from oneshot.data.encoding import encode
    from oneshot.settings import DataSettings

    tokenizer = AutoTokenizer.from_pretrained(place.main)
    rows = read_conversations(str(place.folder / name), DataSettings())
    return [dict(vars(encode(row, tokenizer, None))) for row in rows]


def _batches(place: Place) -> list[dict[str, list[int]]]:
    """The conversations in the order in which oneshot's steps take them, so that losses can be compared."""
    from oneshot.training.stream import step_indices

    rows, batch = _encoded(place, TALKS), place.sizes.batch
    return [rows[i] for step in range(place.sizes.steps) for i in step_indices(len(rows), batch, step, seed=0)]


def trl(place: Place, method: str) -> dict[str, Any]:
    """TRL's SFTTrainer on the same batches: all weights (fp32, computing in bf16, as ours are) or a LoRA on bf16."""
    import torch

    _require("trl")
    from peft import LoraConfig

    dtype = torch.float32 if method == "full" else torch.bfloat16
    model = _pretrained(place.model_of(method), dtype=dtype)
    lora = _lora(LoraConfig) if method == "lora" else None
    return {"method": method, **_trained(place, model, lora)}


def unsloth(place: Place) -> dict[str, Any]:
    """Unsloth's LoRA on the same batches, through the same trainer. Not run yet anywhere: it needs a GPU."""
    _require("unsloth")
    if place.device != "cuda":
        raise NotHere("Unsloth needs a GPU")
    from unsloth import FastLanguageModel

    longest = place.sizes.longest
    model, _ = FastLanguageModel.from_pretrained(str(place.main), max_seq_length=longest, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0.0, bias="none", use_gradient_checkpointing=False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    return {"method": "lora", **_trained(place, model, None)}


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise NotHere(f"{package} is not installed")


def _trained(place: Place, model: Any, lora: Any) -> dict[str, Any]:
    """Train with TRL; tokens per second from the end of the second step on, as for ours."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    sizes, on_cpu = place.sizes, place.device == "cpu"
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            settled(place.device)
            ends.append(time.time())

    config = SFTConfig(
        output_dir=str(place.folder / "trl"), max_steps=sizes.steps, per_device_train_batch_size=sizes.batch,
        learning_rate=RATE, train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
        report_to="none", max_length=None, use_cpu=on_cpu, bf16=True, gradient_checkpointing=False,
    )  # fmt: skip
    rows = _batches(place)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora, callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(place.main),
    )  # fmt: skip
    trainer.train()
    tokens = sum(len(row["input_ids"]) for row in rows[2 * sizes.batch :])
    return {
        "tokens_per_second": tokens / (ends[-1] - ends[1]), "peak_bytes": peak_bytes(place.device),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }  # fmt: skip


def loaders(device: str) -> dict[str, Callable[[Path], Any]]:
    """Return the other ways to get a checkpoint onto the device, by name."""
    import torch
    from safetensors.torch import load_file

    def transformers(folder: Path) -> Any:
        return _pretrained(folder, dtype=torch.bfloat16, device_map={"": device})

    def safetensors(folder: Path) -> Any:
        return [load_file(path, device=device) for path in sorted(folder.glob("*.safetensors"))]

    def fast(folder: Path) -> Any:
        from fastsafetensors import fastsafe_open

        held = []
        for path in sorted(folder.glob("*.safetensors")):
            with fastsafe_open(filenames=[str(path)], nogds=True, device=device) as tensors:
                held.append({name: tensors.get_tensor(name).clone() for name in tensors.keys()})  # noqa: SIM118
        return held

    ways = {"transformers": transformers, "safetensors": safetensors}
    return ways | ({"fastsafetensors": fast} if importlib.util.find_spec("fastsafetensors") else {})
