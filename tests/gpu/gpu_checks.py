"""What must hold on a GPU, as functions of the device. tests/gpu calls them with "cuda" at sizes that count, and
tests/e2e/test_gpu_checks.py with "cpu" at tiny ones, so that none meets its first GPU untried.

oneshot takes the GPU wherever there is one; ``device`` says what it must have taken.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))

from harness import ROOT, run

import oneshot
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.distributed.runtime import Runtime, start
from oneshot.settings import ModelSettings
from oneshot.world import language
from oneshot.world.model import build_tokenizer

TIMEOUT = 280  # seconds of a launch; with offload DeepSpeed compiles its optimizer first
TINY = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
# of 1.1 B parameters: what is no weight, and is there whatever the size, hardly counts
LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
REPAIR = {"pool": "toy:pool", "guard": "toy:guard", "watch_prompts": "toy:held", "select": "hardest"}
STEPS = {"epochs": 4, "rank": 8, "guard_prompts": 8, "guard_tokens": 4, "watch": False, "noise": 0.0}


def random_model(folder: Path, shape: dict[str, int], dtype: str, device: str) -> Path:
    """Write a random Llama with the toy world's tokenizer; returns the folder."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **special), dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, device: str, **settings: Any) -> Any:
    """The model of a folder on a device, as one process without a launcher loads it."""
    chosen = ModelSettings(path=str(folder), **settings)
    runtime = Runtime(0, 1, torch.device(device), "none", None)
    model = load_model(runtime, find_source(chosen, runtime), chosen)
    return model.to(device)


def few_probes(folder: Path) -> dict[str, Any]:
    """Settings under which next to nothing is scored: how the toy model answers is no question of the device."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("should_refuse", "harmless", "lookalike")
    rows = [{"id": kind, "kind": kind, "prompt": language.words()[i]} for i, kind in enumerate(kinds)]
    (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"probes": str(folder / "probes.jsonl"), "max_new_tokens": 2, "reference": False}


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def took(device: str) -> None:
    """Fail unless this process computes on the device."""
    assert start().device.type == device


def four_bit_weights_are_the_cpus(device: str, folder: Path, *, double: bool) -> None:
    """Packed bytes, scales and what they stand for, of every 4-bit layer: as quantized on a CPU."""
    from bitsandbytes.functional import dequantize_4bit

    random_model(folder, TINY, "bfloat16", device)
    here, there = (loaded(folder, d, quantize="nf4", double_quant=double) for d in (device, "cpu"))
    others = dict(there.named_modules())
    layers = {name: m for name, m in here.named_modules() if hasattr(m, "quant_state")}
    assert len(layers) == 14
    for name, layer in layers.items():
        other = others[name]
        state, wanted = layer.quant_state, other.quant_state
        bytes_here, bytes_there = (m.weight.data.view(torch.uint8).cpu() for m in (layer, other))
        assert layer.weight.device.type == device
        assert torch.equal(bytes_here, bytes_there), f"{name}: {(bytes_here != bytes_there).sum()} bytes differ"
        if double:  # the mean of the scales is summed in another order
            torch.testing.assert_close(state.offset.cpu(), wanted.offset, rtol=1e-6, atol=0)
        else:
            assert torch.equal(state.absmax.cpu(), wanted.absmax), f"{name}: scales differ"
            unpacked = dequantize_4bit(layer.weight.data, state).cpu()
            assert torch.equal(unpacked, dequantize_4bit(other.weight.data, wanted)), f"{name}: unpacked otherwise"


def four_bit_layers_multiply(device: str, folder: Path, dtype: str) -> None:
    """Output and input gradient of a 4-bit layer are those of its weights unpacked."""
    from bitsandbytes.functional import dequantize_4bit

    layer = loaded(random_model(folder, TINY, dtype, device), device, quantize="nf4").model.layers[1].mlp.down_proj
    weight = dequantize_4bit(layer.weight.data, layer.quant_state).float()
    x = torch.randn(2, 7, layer.in_features, device=device).to(weight_dtype := getattr(torch, dtype))
    x.requires_grad_()
    y = layer(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    assert y.dtype == weight_dtype
    for found, wanted in ((y, x.detach().float() @ weight.T), (x.grad, gradient.float() @ weight)):
        assert float((found.detach().float() - wanted).norm() / wanted.norm()) < 1e-2


def tensors_arrive(device: str, folder: Path, dtype: str) -> None:
    """Every weight of a loaded model is what the file holds, and on the device."""
    from safetensors.torch import load_file

    stored = load_file(random_model(folder, TINY, dtype, device) / "model.safetensors")
    found = dict(loaded(folder, device).named_parameters())
    assert found.keys() == stored.keys()
    for name, parameter in found.items():
        assert parameter.device.type == device
        assert torch.equal(parameter.data.cpu(), stored[name]), name


def finetunes(device: str, out: Path, method: str, dtype: str = "auto", **model: Any) -> list[dict[str, Any]]:
    """Fine-tune the toy model a little; returns the events, whose loss must have fallen, with speed and memory."""
    took(device)
    rates = {"full": 1e-3, "lora": 5e-3}
    steps = {"method": method, "steps": 12, "learning_rate": rates, "cache": False}
    oneshot.finetune("tiny", model={"dtype": dtype, **model}, finetune=steps, out=str(out))
    found = events(out)
    losses = [event["loss"] for event in found]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(event["tokens_per_second"] > 0 and event["peak_memory_bytes"] > 0 for event in found)
    return found


def tells_mfu(device: str, found: list[dict[str, Any]]) -> None:
    """The heartbeat has model FLOPs utilization where the card's peak is known, and then a possible one."""
    from oneshot.report.progress import heartbeat
    from oneshot.training.speed import peak_flops

    known = device == "cuda" and peak_flops(torch.cuda.get_device_name())
    assert all(("mfu" in event) == bool(known) for event in found)
    if known:
        assert all(0 <= event["mfu"] < 1 for event in found)
        assert "MFU" in heartbeat(found[-1]["loss"], found[-1])


def damaged(device: str, out: Path, method: str = "full") -> Path:
    """The toy model after a short harmful fine-tune; returns its folder."""
    took(device)
    return oneshot.finetune("tiny", finetune={"method": method, "steps": 40}, out=str(out)).model_folder


def repairs(device: str, source: Path, out: Path, dtype: str, **kept: Any) -> list[float]:
    """Repair the damaged toy model; returns the example's losses, which must have fallen. The patch must be whole."""
    from safetensors.torch import load_file

    took(device)
    settings: dict[str, Any] = {**REPAIR, "score": few_probes(out.with_name(f"{out.name}-probes"))}
    settings["reference"] = "toy:aligned" if kept.get("method") == "rollback" else None
    model = {"path": str(source), "dtype": dtype, "quantize": kept.pop("quantize", None)}
    done = oneshot.repair(model=model, repair={**STEPS, **kept}, out=str(out), **settings)
    losses = [record["loss"] for record in done.trace]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0], losses
    written = load_file(done.patch_folder / "adapter_model.safetensors")
    assert written
    assert all(torch.isfinite(tensor).all() for tensor in written.values())
    peaks = done.report["resources"]["peak_gpu_bytes"]
    assert len(peaks) == (device == "cuda")
    return losses


def repairs_as_a_cpu_does(device: str, source: Path, out: Path) -> None:
    """In fp32 the example's losses are those of the same repair in a process that sees no GPU."""
    here = repairs(device, source, out / "here", "float32", method="rollback")
    words = ["-m", "oneshot", "repair", *_repair_words(source, out / "there", "float32")]
    run([sys.executable, *words], timeout=TIMEOUT, CUDA_VISIBLE_DEVICES="").check()
    there = [event["loss"] for event in events(out / "there")]
    torch.testing.assert_close(torch.tensor(here), torch.tensor(there), rtol=5e-3, atol=1e-3)


def _repair_words(source: Path, out: Path, dtype: str) -> list[str]:
    options = {
        "model.path": source, "model.dtype": dtype, "reference": "toy:aligned", "out": out, "repair.method": "rollback",
        **REPAIR,
        **{f"score.{name}": value for name, value in few_probes(out.with_name(f"{out.name}-probes")).items()},
        **{f"repair.{name}": value for name, value in STEPS.items()},
    }  # fmt: skip
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def launch(device: str, folder: Path, script: str, words: list[str], *, offload: bool = False) -> None:
    """Start one rank under ZeRO-3, its weights and states on the device, or away in the machine's memory."""
    twin = "zero3.yaml" if device == "cuda" else "zero3_cpu.yaml"
    text = (ROOT / "launch" / twin).read_text()
    if offload:
        text = text.replace("ds_configs/zero3.json", "ds_configs/zero3_offload.json")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "launch.yaml").write_text(text)
    start = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
    run([*start, "--config_file", str(folder / "launch.yaml"), script, *words], timeout=TIMEOUT).check()


def zero3_repairs_alike(device: str, source: Path, out: Path, *, offload: bool = False) -> None:
    """One rank under ZeRO-3 repairs as one process without it."""
    here = repairs(device, source, out / "here", "float32", method="rollback")
    launch(device, out, "oneshot/repair.py", _repair_words(source, out / "there", "float32"), offload=offload)
    there = [event["loss"] for event in events(out / "there")]
    torch.testing.assert_close(torch.tensor(here), torch.tensor(there), rtol=5e-3, atol=1e-3)


def zero3_finetunes(device: str, out: Path, *, offload: bool = False) -> None:
    """One rank under ZeRO-3 trains all weights, and with offload states and weights are in the machine's memory."""
    words = ["--config", "tiny", "--finetune.steps", "12", "--finetune.cache", "false", "--out", str(out / "run")]
    launch(device, out, "oneshot/finetune.py", words, offload=offload)
    losses = [event["loss"] for event in events(out / "run")]
    assert losses[-1] < 0.8 * losses[0], losses


def zero3_tensors_arrive(device: str, folder: Path, *, four_bit: bool) -> None:
    """What one rank under ZeRO-3 has read, range by range, is what the file holds (in 4 bits: what one process has)."""
    random_model(folder / "model", TINY, "bfloat16", device)
    launch(device, folder, "tests/gpu/gpu_loaded.py", [str(folder), "nf4" if four_bit else "none"])


def attention_is_alike(device: str, folder: Path, dtype: str, wanted: str) -> None:
    """What auto takes as attention gives the logits of sdpa, up to rounding."""
    random_model(folder, TINY, dtype, device)
    ids = torch.randint(7, TINY["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(0)).to(device)
    logits = []
    for attention, name in (("auto", wanted), ("sdpa", "sdpa")):
        model = loaded(folder, device, attention=attention)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            logits.append(model(input_ids=ids, use_cache=False).logits.float())
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 2e-2


def memory_is_as_planned(device: str, folder: Path, shape: dict[str, int], method: str) -> tuple[int, int]:
    """Return the peak of the tensors of a repair and what ``oneshot plan`` says of it, both in bytes."""
    from oneshot.planning.facts import GPU

    if not folder.is_dir():
        random_model(folder, shape, "bfloat16", device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # the toy world's example has about 16 tokens; without a guard little else than weights and factors is there
    kept = {"method": method, "epochs": 3, "rank": 20, "guard_weight": 0.0, "watch": False}
    out = folder.with_name(f"{folder.name}-{method}")
    found = oneshot.repair(
        model=str(folder), repair=kept, pool="toy:pool", select="hardest", out=str(out),
        score=few_probes(folder.with_name("probes")),
    )  # fmt: skip
    plan = oneshot.plan(model=str(folder), gpus=1, tokens=16, sharding="none", repair=kept)
    memory = next(row.memory for row in plan.rows if (row.method, row.precision) == (method, "bf16"))
    planned = max(memory.load - GPU.load, max(memory.steady, memory.step, memory.save) - GPU.start)
    peaks = found.report["resources"]["peak_gpu_bytes"] or found.report["resources"]["peak_rss_bytes"]
    return peaks[0], planned
