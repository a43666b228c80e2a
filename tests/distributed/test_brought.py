"""Checkpoints as people bring them: one process, 4-bit weights and ZeRO-3 on two ranks read the same of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantized_jobs as jobs
import repair_jobs
import torch
from ranks import start_ranks
from safetensors.torch import load_file, save_file

from oneshot.checkpoint.names import INDEX, SINGLE
from oneshot.world.model import ALIGNED, build_tokenizer

pytestmark = pytest.mark.distributed
WAYS: tuple[dict[str, Any], ...] = ({}, {"quantize": "nf4", "double_quant": True})
SHARDINGS = {"none": 1, "zero3": 2}
PAIRS = {  # what is brought -> what it is to be read as
    "tied, but apart": "apart",
    "tied, and stored twice": "tied",
    "tied, only the head stored": "tied",
    "stale index": "single",
    "quantized, it says": "single",
}
MORE = 28  # rows


def _say(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _single(family: str, folder: Path) -> Path:
    """A model in one file."""
    jobs.make(family, "float32", folder)
    tensors = {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    _single("llama", root / "apart")
    shutil.copytree(root / "apart", root / "tied, but apart")
    _say(root / "tied, but apart", tie_word_embeddings=True)

    _single("qwen2-tied", root / "tied")
    tensors = load_file(root / "tied" / SINGLE)
    twice = shutil.copytree(root / "tied", root / "tied, and stored twice")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, twice / SINGLE, metadata={"format": "pt"})
    other = shutil.copytree(root / "tied", root / "tied, only the head stored")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors | head, other / SINGLE, metadata={"format": "pt"})

    _single("llama-biased", root / "single")
    jobs.make("llama-biased", "float32", root / "stale index")
    for path in (root / "stale index").glob("*.safetensors"):  # of an older save
        shard = {name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}
        save_file(shard, path, metadata={"format": "pt"})
    shutil.copy(root / "single" / SINGLE, root / "stale index" / SINGLE)
    said = shutil.copytree(root / "single", root / "quantized, it says")
    _say(said, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    return root


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By sharding, what rank 0 found; that all ranks found the same is looked at here."""
    cases = [(name, way) for name in sorted({*PAIRS, *PAIRS.values()}) for way in WAYS]
    cases = [(name, way) for name, way in cases if not (way and "only the head" in name)]
    results = {}
    for sharding, size in SHARDINGS.items():
        arguments = {"folder": str(models), "cases": cases}
        ranks = start_ranks(jobs.describe, size, sharding, tmp_path_factory.mktemp("ranks") / "run", arguments)
        every = ranks.results()
        assert all(rank[key]["logits"] == every[0][key]["logits"] for rank in every for key in every[0])
        results[sharding] = every[0]
    return results


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("way", WAYS, ids=["in full", "nf4"])
@pytest.mark.parametrize("name", PAIRS)
def test_it_is_read_as_transformers_reads_it(
    name: str, way: dict[str, Any], sharding: str, found: dict[str, dict[str, Any]]
) -> None:
    if way and "only the head" in name:
        pytest.skip("refused in 4 bits")
    key = json.dumps(way)
    assert found[sharding][name + key]["logits"] == found[sharding][PAIRS[name] + key]["logits"]
    others = {json.dumps(found[sharding][other + key]["logits"]) for other in set(PAIRS.values())}
    assert len(others) == len(set(PAIRS.values())), "the models differ"


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune of the toy with ``MORE`` rows of embedding and head, and a padding token among them."""
    folder = Path(shutil.copytree(ALIGNED, tmp_path_factory.mktemp("grown") / "model"))
    torch.manual_seed(0)
    tensors = {name: t + 0.02 * torch.randn_like(t) for name, t in load_file(folder / SINGLE).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = 0.02 * torch.randn(MORE, tensors[name].shape[1])
        tensors[name] = torch.cat([tensors[name], rows])
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    _say(folder, vocab_size=tensors["lm_head.weight"].shape[0])
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pads>"})  # that the reference has no row for
    tokenizer.save_pretrained(folder)
    return folder


def _says_grown(out: Path) -> bool:
    return f"{MORE} rows" in json.dumps(json.loads((out / "report.json").read_text())["warnings"])


def _repaired(sharding: str, size: int, model: Path, reference: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """What the patch of a repair adds, by module."""
    argv = [
        "--model.path", str(model), "--reference", str(reference), "--score.reference", "false",
        "--pool", "toy:pool", "--select", "pool-should_refuse-0",
        "--guard", "toy:guard-plain", "--repair.method", "rollback", "--repair.epochs", "2",
        "--repair.guard_prompts", "4", "--repair.guard_tokens", "4", "--preflight", "never", "--out", str(out), *more,
    ]  # fmt: skip
    probes = out.with_suffix(".jsonl")
    probes.write_text(json.dumps({"kind": "harmless", "prompt": "please fold a plum"}) + "\n")
    argv += ["--score.probes", str(probes)]
    given = {"argv": argv, "attack": 0.0, "writing": str(out.with_suffix(".writing"))}
    start_ranks(repair_jobs.repair, size, sharding, out.with_suffix(".ranks"), given).results()
    tensors = load_file(out / "patch" / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0] for name in tensors}
    return {m: tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"] for m in modules}


@pytest.mark.parametrize("way", [[], ["--model.quantize", "nf4"]], ids=["in full", "nf4"])
def test_a_vocabulary_that_grew_is_repaired_alike(way: list[str], grown: Path, tmp_path: Path) -> None:
    one = _repaired("none", 1, grown, ALIGNED, tmp_path / "one", *way)
    two = _repaired("zero3", 2, grown, ALIGNED, tmp_path / "two", *way)
    assert _says_grown(tmp_path / "one")
    assert _says_grown(tmp_path / "two")
    assert set(one) == set(two)
    assert not any("embed" in name or "head" in name for name in one)
    for name, wanted in one.items():
        torch.testing.assert_close(two[name], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()), msg=name)


def test_a_reference_whose_vocabulary_is_larger_serves_too(grown: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(ALIGNED, tmp_path / "model"))
    assert _repaired("none", 1, model, grown, tmp_path / "run")
    assert _says_grown(tmp_path / "run")


@pytest.mark.parametrize("way", [[], ["--model.quantize", "nf4"]], ids=["in full", "nf4"])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_config_of_transformers_4_is_written_as_it_was(sharding: str, way: list[str], tmp_path: Path) -> None:
    model = Path(shutil.copytree(ALIGNED, tmp_path / "model"))
    torch.manual_seed(0)
    tensors = {name: t + 0.02 * torch.randn_like(t) for name, t in load_file(model / SINGLE).items()}
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    fields = json.loads((model / "config.json").read_text())
    theta = fields.pop("rope_parameters")["rope_theta"]
    older = {"rope_theta": theta, "torch_dtype": fields.pop("dtype"), "transformers_version": "4.46.0"}
    (model / "config.json").write_text(json.dumps(fields | older, indent=3))
    out = tmp_path / "run"
    _repaired(sharding, SHARDINGS[sharding], model, ALIGNED, out, *way, "--repair.merge", "true")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / "repaired" / name).read_bytes() == (model / name).read_bytes(), name
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / "patch" / name).read_bytes() == (model / name).read_bytes(), name
