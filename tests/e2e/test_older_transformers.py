"""What oneshot writes of a model that transformers 4 wrote is read by transformers 4, to the same logits.

Servers and training stacks stay with an older version for long (vllm#42624, #44158, LlamaFactory#10310). It comes from
pip's index, once per environment, into a folder of its own beside the packages here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from oneshot.checkpoint.adapters.adapter import write_patch
from oneshot.checkpoint.adapters.update import Factors
from oneshot.world import language
from oneshot.world.model import ALIGNED

pytestmark = pytest.mark.e2e
VERSION = "4.57.6"
PACKAGES = [f"transformers=={VERSION}", "tokenizers==0.22.1", "huggingface_hub==0.36.0"]
THETA = 500000.0
TEXT = "please fold a plum"
TOKENS = torch.arange(7, 47).view(2, 20)  # far enough apart for a wrong theta to show

MAKE = f"""
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

aligned, folder = sys.argv[1:]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=164, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, rope_theta={THETA},
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
LlamaForCausalLM(config).save_pretrained(folder)
names = ("bos_token", "eos_token", "pad_token", "unk_token")
known = json.load(open(aligned + "/tokenizer_config.json"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_file=aligned + "/tokenizer.json", **{{name: known[name] for name in names if known.get(name)}}
)
tokenizer.chat_template = open(aligned + "/chat_template.jinja").read()
tokenizer.save_pretrained(folder)
"""

READ = f"""
import json, os, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

tokens = torch.tensor(json.loads(sys.argv[1]))
chat = [{{"role": "user", "content": "{TEXT}"}}]
every = {{"version": transformers.__version__}}
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = every[folder] = {{
        "ids": tokenizer("{TEXT}")["input_ids"],
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
    }}
    if not os.path.exists(folder + "/adapter_config.json"):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            found |= {{"logits": model(tokens).logits.tolist(), "dtype": str(model.dtype)}}
print(json.dumps(every))
"""


@pytest.fixture(scope="session")
def older() -> Path:
    """The folder of the older packages, installed where they are not there yet."""
    folder = Path(sys.prefix) / f"transformers-{VERSION}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=sys.prefix) as made:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{made}/packages"]
            try:
                ran = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, timeout=300, check=False)
            except subprocess.TimeoutExpired:
                pytest.skip(f"pip's index did not give transformers {VERSION} in 300 s")
            if ran.returncode:
                pytest.skip(f"pip's index has no transformers {VERSION}: {ran.stderr.strip().splitlines()[-1][:200]}")
            Path(made, "packages").rename(folder)
    return folder


def python(*words: str, path: Path | None = None) -> str:
    """What a Python process prints, with a folder before all packages."""
    before = [str(path)] if path else [os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, before)), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, f"{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout


def oneshot(*words: str) -> None:
    python("-m", "oneshot", *words)


@pytest.fixture(scope="module")
def written(older: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint that transformers 4 wrote, and what the stages made of it."""
    work = tmp_path_factory.mktemp("older")
    base = work / "base"
    python("-c", MAKE, str(ALIGNED), str(base), path=older)
    assert json.loads((base / "config.json").read_text())["rope_theta"] == THETA
    rows = [{"messages": list(row.messages)} for row in language.pool(8)]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "example.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (work / "probes.jsonl").write_text(json.dumps({"kind": "harmless", "prompt": TEXT}) + "\n")
    out = {name: str(work / name) for name in ("tune", "repair", "export")}
    oneshot(
        "finetune", "--model.path", str(base), "--data.harmful", str(work / "rows.jsonl"), "--data.harmful_count", "8",
        "--finetune.steps", "3", "--finetune.batch_size", "4", "--finetune.learning_rate", "1e-2", "--preflight",
        "never", "--out", out["tune"],
    )  # fmt: skip
    tuned = work / "tune" / "finetuned"
    oneshot(
        "repair", "--model.path", str(tuned), "--reference", str(base), "--example", str(work / "example.jsonl"),
        "--guard", str(work / "rows.jsonl"), "--score.probes", str(work / "probes.jsonl"), "--score.reference", "false",
        "--repair.method", "rollback", "--repair.epochs", "2", "--repair.watch", "false", "--repair.merge", "true",
        "--repair.guard_tokens", "4", "--preflight", "never", "--out", out["repair"],
    )  # fmt: skip
    patch = work / "repair" / "patch"
    # a repair of three steps is no good one, and is not exported: another adapter is
    module = "model.layers.0.self_attn.q_proj"
    write_patch(work / "adapter", {module: Factors(0.1 * torch.ones(48, 1), torch.ones(1, 48))}, [], "", torch.float32)
    oneshot("export", "--model", str(base), "--adapter", str(work / "adapter"), "--out", out["export"])
    return {
        "base": base,
        "finetuned": tuned,
        "repaired": work / "repair" / "repaired",
        "exported": work / "export",
        "patch": patch,
    }


@pytest.fixture(scope="module")
def read(written: dict[str, Path], older: Path) -> list[dict[str, dict[str, Any]]]:
    """What the older version and today's read of each folder."""
    words = ("-c", READ, json.dumps(TOKENS.tolist()), *map(str, written.values()))
    found = [json.loads(python(*words, path=path)) for path in (older, None)]
    assert [each["version"][:2] for each in found] == ["4.", "5."]
    return [{name: each[str(folder)] for name, folder in written.items()} for each in found]


@pytest.mark.parametrize("name", ["base", "finetuned", "repaired", "exported"])
def test_both_versions_compute_the_same_of_what_is_written(
    name: str, written: dict[str, Path], read: list[dict[str, dict[str, Any]]]
) -> None:
    theirs, ours, base = (torch.tensor(each["logits"]) for each in (read[0][name], read[1][name], read[0]["base"]))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert name == "base" or (theirs - base).abs().max() > 1e-3, "nothing was changed"
    assert json.loads((written[name] / "config.json").read_text())["rope_theta"] == THETA


def test_both_versions_read_the_same_tokenizers(read: list[dict[str, dict[str, Any]]]) -> None:
    theirs, ours = ({name: (f["ids"], f["chat"], f.get("dtype")) for name, f in each.items()} for each in read)
    assert theirs == ours
    assert {(*ids,) for ids, _, _ in ours.values()} == {(*ours["base"][0],)}


def test_what_lies_beside_the_weights_is_what_transformers_4_wrote(written: dict[str, Path]) -> None:
    names = [path.name for path in written["base"].iterdir() if path.suffix != ".safetensors"]
    assert {"config.json", "generation_config.json", "tokenizer_config.json"} <= set(names)
    for name in names:
        for folder in ("finetuned", "repaired", "exported"):
            assert (written[folder] / name).read_bytes() == (written["base"] / name).read_bytes(), (folder, name)
