"""A model's shape from its config.json alone: the weights of the real model, kept in a cache, of models by their id."""

import contextlib
import importlib
import json
import logging
import math
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as t
from accelerate import init_empty_weights
from tiny import tiny_runtime
from tiny_configs import SPARSE, TINY, H, V, tiny
from torch import nn

from oneshot.checkpoint.classes import outside_language
from oneshot.checkpoint.disk.files import list_tensors, read_json
from oneshot.checkpoint.loading.load import find_source
from oneshot.errors import UserError
from oneshot.patch.linears import select_linears
from oneshot.planning import lookup, meta_model
from oneshot.planning.lookup import model_shape
from oneshot.planning.model import PlannedModel, read_model
from oneshot.planning.rows import rows
from oneshot.planning.shapes import Weight
from oneshot.settings import ModelSettings, Settings
from oneshot.shipped import root
from oneshot.world.model import ALIGNED

plan = importlib.import_module("oneshot.plan")  # the package's own name is a function
CONFIGS = {kind: {"model_type": kind, **fields} for kind, fields in TINY.items()}
CONFIGS |= {f"{kind}, mixture": {"model_type": kind, **fields} for kind, (fields, _) in SPARSE.items()}
CONFIGS |= {
    "llama, biases, tied": {
        "model_type": "llama", **tiny(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    },
    "qwen2, untied": {"model_type": "qwen2", **tiny("head_dim", tie_word_embeddings=False)},
    "gemma3": {
        "model_type": "gemma3", "text_config": tiny(), "mm_tokens_per_image": 4,
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "oneshot" / "shapes"


@pytest.fixture
def counted(monkeypatch):
    """How often a model was built."""
    built = []
    own = meta_model.built_shape
    monkeypatch.setattr(meta_model, "built_shape", lambda *given: built.append(given) or own(*given))
    return built


def model_of(fields):
    """The model of a config.json, another way than the package builds it."""
    config = t.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    with init_empty_weights():
        model = t.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_equal_those_of_the_real_model(name):
    fields = CONFIGS[name]
    model, shape = model_of(fields), model_shape(fields)
    ours = Counter()
    for weight in shape.weights:
        ours[tuple(sorted(weight.shape))] += weight.count  # Conv1D is transposed
    assert ours == Counter(tuple(sorted(parameter.shape)) for parameter in model.parameters())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    outside = tuple(outside_language(model))
    language = [m for name, m in model.named_modules() if not name.startswith(outside)]
    towers = [p for name, p in model.named_parameters() if name.startswith(outside)]
    assert shape.of("tower") == sum(parameter.numel() for parameter in towers)
    assert bool(towers) == (name == "gemma3")
    embeddings = {m.weight for m in language if isinstance(m, nn.Embedding)}
    assert shape.of("embedding") == sum(weight.numel() for weight in embeddings)
    head = model.get_output_embeddings()
    assert shape.of("head") == (0 if head is None or head.weight in embeddings else head.weight.numel())
    linears = [m for m in language if isinstance(m, nn.Linear) and m is not head]
    assert shape.of("linear") == sum(module.weight.numel() for module in linears)
    if linears:
        found = select_linears(model)
        patched = [layer for layer in found.targets.values() if isinstance(layer, nn.Linear)]
        assert patched == [m for m in linears if any(m is one for one in patched)], "what a patch may change"
        odd = [name for name, module in model.named_modules() if module in linears and module not in patched]
        assert set(odd) <= set(found.left_out), "the plan counts layers that a mixer reads past them, too"
    assert (shape.vocabulary, shape.hidden) == (V, H)
    assert shape.of("fused", "expert") == 0 or "mixture" in name, "convolutions are no experts"


@pytest.mark.parametrize("kind", SPARSE)
def test_of_a_mixture_a_token_meets_the_experts_that_it_is_sent_to(kind):
    fields, (blocks, experts, chosen, inner, matrices, beside) = SPARSE[kind]
    shape = model_shape({"model_type": kind, **fields})
    assert shape.of("fused") == blocks * experts * matrices * inner * H
    assert shape.active == V * H + shape.of("linear") + blocks * chosen * matrices * inner * H
    assert (shape.ffn, shape.gated) == (chosen * inner + beside, matrices == 3)


def test_shared_experts_are_met_by_every_token():
    fields = {"model_type": "inkling_text", **tiny()}
    if "inkling_text" not in t.CONFIG_MAPPING:
        pytest.skip("this transformers has no model whose shared experts are fused")
    model = model_of(fields)
    shape = model_shape(fields)
    fused = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n}
    shared = sum(numel for name, numel in fused.items() if "shared" in name)
    assert shared
    assert shape.active >= V * H + shape.of("linear") + shared


def test_linear_layers_of_single_experts_are_patched_and_fused_ones_are_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(3))
            self.router = nn.Linear(8, 3)

    model = t.LlamaForCausalLM(t.LlamaConfig(**tiny()))
    model.model.layers[0].mlp = Block()
    found = Counter(weight.kind for weight in meta_model._weights(model))
    assert found["expert"] == 3
    shape = model_shape({"model_type": "llama", **tiny()})
    more = replace(shape, weights=(*shape.weights, Weight("expert", (4, 8), 3), Weight("fused", (3, 4, 8), 1)))
    assert more.low_rank(2) - shape.low_rank(2) == 3 * 2 * (4 + 8)


def test_a_mixture_in_single_layers_counts_those_that_a_token_meets():
    mixture = meta_model._Mixture(chosen=2, experts=8)
    one = meta_model._Found("layers.0.experts.3.up", "layers.0.experts.3", "expert", (16, 32), True)
    assert mixture.met(one) == 16 * 32 * 2 // 8
    assert meta_model._Mixture(0, 0).met(one) == 16 * 32, "a config that does not say is taken for all"


KNOWN = {
    "google/gemma-2-9b-it": 9_241_705_984,
    "meta-llama/Llama-2-13b-chat-hf": 13_015_864_320,
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "openai/gpt-oss-120b": 116_829_156_672,
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_of_known_models(name):
    shape = read_model(Settings(model=ModelSettings(path=name))).shape
    assert shape.parameters == KNOWN[name]


@pytest.mark.parametrize(
    ("kind", "parameters", "active"),
    [("deepseek_v3", 671_026_404_352, 36.5e9), ("gpt_oss", 116_829_156_672, 5.1e9), ("qwen3_next", 79.67e9, 3.5e9)],
)
def test_known_mixtures_from_their_kind_alone(kind, parameters, active):
    shape = model_shape({"model_type": kind})
    assert shape.parameters == pytest.approx(parameters, rel=1e-3)
    assert shape.active == pytest.approx(active, rel=0.02)


PRESETS = sorted(path.stem for path in (root() / "launch" / "runs").glob("*.yaml") if path.stem not in ("toy", "tiny"))


def test_every_preset_needs_neither_network_nor_access(monkeypatch, capsys):
    def refused(*_):
        raise AssertionError("nothing is looked up")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr("oneshot.planning.model._from_hub", refused)
    assert len(PRESETS) == len(KNOWN)
    for preset in (*PRESETS, "toy"):
        with contextlib.suppress(SystemExit):
            plan.main(["--config", preset, "--json"])
        found = json.loads(capsys.readouterr().out)
        if preset != "toy":
            assert found["parameters"] == KNOWN[found["model"]]
        else:
            stored = list_tensors(ALIGNED).values()
            assert found["parameters"] == sum(math.prod(entry.shape) for entry in stored)


def test_the_users_own_folder_wins_over_what_ships(tmp_path, monkeypatch):
    name = "meta-llama/Meta-Llama-3-8B-Instruct"
    own = tmp_path / name
    own.mkdir(parents=True)
    (own / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    monkeypatch.chdir(tmp_path)
    assert read_model(Settings(model=ModelSettings(path=name))).shape == model_shape(CONFIGS["llama"])


def test_a_config_is_built_once_and_then_read_from_the_cache(cache, counted):
    first = model_shape(CONFIGS["gemma2"])
    assert model_shape(CONFIGS["gemma2"]) == first
    assert model_shape({**CONFIGS["gemma2"], "_name_or_path": "elsewhere"}) == first
    assert model_shape({**CONFIGS["gemma2"], "quantization_config": {"quant_method": "awq"}}) == first
    assert (len(counted), len(list(cache.iterdir()))) == (1, 1)
    model_shape({**CONFIGS["gemma2"], "vocab_size": 100})
    assert len(counted) == 2


def test_the_cache_goes_by_versions_too(counted, monkeypatch, tmp_path):
    model_shape(CONFIGS["llama"])
    monkeypatch.setattr(lookup, "package_version", lambda _: "0.0")
    model_shape(CONFIGS["llama"])
    monkeypatch.setattr(lookup, "__version__", "0.0")
    model_shape(CONFIGS["llama"])
    changed = tmp_path / "changed.py"
    changed.write_text("")
    monkeypatch.setattr(lookup, "_READER", changed)
    model_shape(CONFIGS["llama"])
    assert len(counted) == 4


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"sha256": "", "shape": {}}', "cut", "altered"])
def test_a_damaged_cache_is_passed_over(cache, counted, damage):
    first = model_shape(CONFIGS["llama"])
    (file,) = cache.iterdir()
    held = file.read_text()
    file.write_text({"cut": held[:-9], "altered": held.replace('"hidden": 64', '"hidden": 65')}.get(damage, damage))
    assert file.read_text() != held
    assert model_shape(CONFIGS["llama"]) == first
    assert len(counted) == 2
    assert file.read_text() == held, "made again"


def test_a_cache_that_cannot_be_written_stops_nothing(counted, monkeypatch, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert model_shape(CONFIGS["llama"]) == model_shape(CONFIGS["llama"])
    assert len(counted) == 2
    assert capfd.readouterr() == ("", "")


def test_a_known_config_needs_no_torch(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["mixtral, mixture"]))
    model_shape(read_json(path))
    code = (
        "import sys; from oneshot.plan import main\n"
        f"try: main(['--model.path', {str(path)!r}])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_building_leaves_no_trace(monkeypatch):
    """No random number is drawn, no default is changed and nothing is said: a run comes after it."""
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    before, dtype, verbosity = torch.get_rng_state(), torch.get_default_dtype(), t.logging.get_verbosity()
    model_shape(CONFIGS["diffllama"])  # draws numbers for parameters that are not on the meta device
    model_shape({**CONFIGS["gpt2"], "bos_token_id": 50256})  # is out of range, which transformers tells
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == dtype
    assert torch.empty(1).device.type == "cpu"
    assert t.logging.get_verbosity() == verbosity
    assert not said


def test_configs_that_cannot_be_built():
    with pytest.raises(UserError, match=rf"'made-up' is not known to transformers {t.__version__}") as told:
        model_shape({"model_type": "made-up"})
    assert "trust_remote_code" not in str(told.value)
    with pytest.raises(UserError, match=r"--model\.trust_remote_code true"):
        model_shape({"model_type": "made-up", "auto_map": {"AutoConfig": "made.Config"}})
    with pytest.raises(UserError, match="None is not known"):
        model_shape({"hidden_size": 64})
    for fields in ({**CONFIGS["llama"], "hidden_size": "wide"}, {"model_type": "vit"}, {"model_type": "nemotron"}):
        with pytest.raises(UserError, match=rf"builds no causal language model .* type '{fields['model_type']}'"):
            model_shape(fields)


def test_own_code_is_run_where_the_user_says_so(tmp_path, cache):
    (tmp_path / "made.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MadeConfig(LlamaConfig):\n    model_type = 'made-up'\n"
        "class MadeModel(LlamaForCausalLM):\n    config_class = MadeConfig\n"
    )
    auto = {"AutoConfig": "made.MadeConfig", "AutoModelForCausalLM": "made.MadeModel"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["llama"], "model_type": "made-up", "auto_map": auto}))
    path = ModelSettings(path=str(tmp_path), trust_remote_code=True)
    assert read_model(Settings(model=path)).shape.weights == model_shape(CONFIGS["llama"]).weights
    assert len(list(cache.iterdir())) == 1, "code may change without its config"
    with pytest.raises(UserError, match="trust_remote_code"):
        read_model(Settings(model=replace(path, trust_remote_code=False)))


def test_code_of_a_kind_that_transformers_knows_is_not_run():
    auto = {"AutoConfig": "nowhere.Config", "AutoModelForCausalLM": "nowhere.Model"}
    assert model_shape({**CONFIGS["llama"], "auto_map": auto}).weights == model_shape(CONFIGS["llama"]).weights


def test_files_are_compared_with_the_config():
    fields, tensors = read_json(ALIGNED / "config.json"), list_tensors(ALIGNED)
    shape = model_shape(fields, tensors)
    assert shape.parameters == model_shape(fields).parameters
    with pytest.raises(UserError, match="not of one checkpoint"):
        model_shape({**fields, "num_hidden_layers": 9}, tensors)
    more = {**tensors, "masked": replace(next(iter(tensors.values())), dtype="BOOL", shape=(1, 8, 8))}
    assert model_shape(fields, more) == shape, "which loading passes over"
    model_shape({**fields, "num_hidden_layers": 9, "quantization_config": {"quant_method": "awq"}}, tensors)


@pytest.mark.parametrize("name", ["gemma2", "qwen2, untied", "deepseek_v3, mixture", "nemotron_h, mixture", "gpt2"])
def test_files_as_transformers_writes_them_are_of_the_config(name, tmp_path):
    config = t.CONFIG_MAPPING[CONFIGS[name]["model_type"]].from_dict(dict(CONFIGS[name]))
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path))
    assert read_model(Settings(model=settings)).shape.weights == model_shape(CONFIGS[name]).weights
    assert find_source(settings, tiny_runtime()).checkpoint == Path(tmp_path)


def test_files_may_hold_more_than_the_text_part_of_a_model():
    fields = {"model_type": "llama4", "text_config": SPARSE["llama4_text"][0]}
    shape = model_shape(fields)
    assert shape.weights == model_shape({"model_type": "llama4_text", **SPARSE["llama4_text"][0]}).weights
    entry = next(iter(list_tensors(ALIGNED).values()))
    held = replace(entry, shape=(shape.parameters + 5,))
    model_shape(fields, {"all": held})
    with pytest.raises(UserError, match="not of one checkpoint"):
        model_shape(fields, {"all": replace(entry, shape=(shape.parameters - 5,))})


def test_every_row_of_every_kind_is_planned():
    for name in ("gpt2", "mamba", "rwkv", "gemma3", "gpt_oss, mixture", "nemotron_h, mixture"):
        found = rows(Settings(), PlannedModel("m", model_shape(CONFIGS[name])))
        assert all(row.memory.lower <= row.memory.peak for row in found)
        assert all(row.time.total > 0 for row in found)
