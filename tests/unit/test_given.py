"""A user's adapter that PEFT loads in part is found before a repair; its repair is written so that PEFT loads all."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_brought import conversations, probes
from test_carrier import close, logits_of, merged, tiny
from tiny import build_tokenizer, tiny_runtime

from oneshot.checkpoint.adapters.adapter import read_adapter, write_patch
from oneshot.checkpoint.adapters.carrier import APART, Carried
from oneshot.checkpoint.adapters.injected import not_injected
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.loading.load import Source, find_source
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.patch import given
from oneshot.patch.check import check
from oneshot.patch.given import check_given
from oneshot.patch.linears import select_linears
from oneshot.patch.write import _write_factors
from oneshot.settings import ModelSettings

GATED, MIXTRALS = ("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3")


def adapter_on(name: str, leaves: tuple[str, ...], folder: Path) -> tuple[Any, Source]:
    """A mixture on disk, and an adapter of its stored matrices of these names, as transformers 4 has them."""
    model, generator, factors = tiny(name), torch.Generator().manual_seed(2), {}
    model.save_pretrained(folder / "base")
    build_tokenizer().save_pretrained(folder / "base")
    for tensor, weight in load_file(folder / "base" / "model.safetensors").items():
        module = tensor.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in leaves:
            sizes = ((weight.shape[0], 2), (2, weight.shape[1]))
            factors[module] = Factors(*(0.1 * torch.randn(*size, generator=generator) for size in sizes))
    experts = frozenset(one for one in factors if ".experts." in one)
    held = Carried(factors, APART, {"down_proj": 2}, leaves, (), experts)
    write_patch(folder / "own", held, [], str(folder / "base"), torch.float32)
    config = json.loads((folder / "own" / "adapter_config.json").read_text())
    config |= {"target_modules": list(leaves), "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "own" / "adapter_config.json").write_text(json.dumps(config))
    return model, find_source(ModelSettings(path=str(folder / "own"), dtype="float32"), tiny_runtime())


@pytest.mark.parametrize(
    ("name", "leaves", "own"),
    [
        ("deepseek_v3", ("q_a_proj", *GATED), False),
        ("qwen2_moe", ("q_proj", *GATED), False),
        ("jamba", ("q_proj", *GATED), False),
        ("mixtral", ("q_proj", "w1"), False),  # PEFT refuses a gate without its up
        ("mixtral", ("q_proj", *MIXTRALS), True),
        ("qwen3_moe", ("q_proj", *GATED), False),  # its first layer is dense
    ],
)
def test_a_repaired_adapter_is_loaded_whole_whatever_the_given_one_is(name, leaves, own, tmp_path):
    model, source = adapter_on(name, leaves, tmp_path)
    adapter = read_adapter(source.adapter)
    check_given(source, adapter, trust_remote_code=False)
    repaired = {name: Factors(0.5 * one.b, one.a) for name, one in adapter.update.items()}
    recipe = SimpleNamespace(method=SimpleNamespace(keeps_adapter=True))
    request = SimpleNamespace(source=source, recipe=recipe, adapter=adapter)
    bench: Any = SimpleNamespace(request=request, linears=select_linears(model))
    meta = copy.deepcopy(model).to("meta")
    _write_factors(bench, repaired, tmp_path / "new", meta)
    assert not_injected(tmp_path / "new", meta) == []
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "new").eval()
    assert close(logits_of(loaded), logits_of(merged(model, repaired)))
    before, after = (json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("own", "new"))
    assert (before == after) == own


def test_what_no_form_holds_is_refused_with_what_helps(tmp_path, monkeypatch):
    _, source = adapter_on("deepseek_v3", ("q_a_proj", *GATED), tmp_path)

    def nowhere(*_):
        raise UserError("PEFT does not")

    monkeypatch.setattr(given, "write_loadable", nowhere)
    with pytest.raises(UserError, match=r"oneshot export --model .*--adapter .* repair MERGED with --reference"):
        check_given(source, read_adapter(source.adapter), trust_remote_code=False)


def test_a_repair_looks_at_the_adapter_before_it_loads_a_model(tmp_path):
    _, source = adapter_on("mixtral", ("q_proj", "w3"), tmp_path)
    example = conversations(tmp_path / "example.jsonl", "fold")
    asked = ["--example", example, "--guard", example, "--score.probes", probes(tmp_path / "probes.jsonl", "plum")]
    with pytest.raises(UserError, match=r"experts\.0\.up_proj, which is no linear layer of this base"):
        check(parse(["--model.path", str(source.adapter), *asked], "repair"), tiny_runtime())
