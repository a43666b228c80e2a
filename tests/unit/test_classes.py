"""Which class a checkpoint is loaded as, what of it is the language part, and what no text passes through."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers as t
from tiny import tiny_model, tiny_runtime

from oneshot.checkpoint.classes import auto_class, outside_language, refuses_sdpa, train_language
from oneshot.checkpoint.disk.files import find_weight
from oneshot.checkpoint.loading.load import find_source, load_model, what_to_say
from oneshot.errors import UserError
from oneshot.patch.linears import select_linears
from oneshot.patch.reached import reached
from oneshot.settings import ModelSettings

EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
       "patch_size": 14}  # fmt: skip
TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def seeing() -> Any:
    """A Gemma 3 with its vision tower."""
    config = t.Gemma3Config(text_config=TEXT, vision_config=EYE, mm_tokens_per_image=4, image_token_index=6)
    return t.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("config", "architecture", "auto"),
    [
        (t.LlamaConfig, "LlamaForCausalLM", t.AutoModelForCausalLM),
        (t.LlamaConfig, None, t.AutoModelForCausalLM),
        (t.Qwen3_5Config, "Qwen3_5ForConditionalGeneration", t.AutoModelForImageTextToText),
        (t.Qwen3_5Config, "Qwen3_5ForCausalLM", t.AutoModelForCausalLM),
        (t.Llama4Config, "Llama4ForConditionalGeneration", t.AutoModelForImageTextToText),
        (t.Qwen2_5_VLConfig, None, t.AutoModelForImageTextToText),
    ],
)
def test_a_checkpoint_is_loaded_as_what_it_says_it_is(config: Any, architecture: str | None, auto: Any) -> None:
    assert auto_class(config(architectures=architecture and [architecture])) is auto


def test_the_language_part_is_all_but_towers_and_what_joins_them(seeing: Any) -> None:
    assert sorted(outside_language(seeing)) == ["model.multi_modal_projector.", "model.vision_tower."]
    assert outside_language(tiny_model("llama")) == []
    targets = select_linears(seeing).targets
    assert len(targets) == 14
    assert all(name.startswith("model.language_model.layers.") for name in targets)
    assert {"model.multi_modal_projector", "model.vision_tower"} <= set(select_linears(seeing).left_out)
    train_language(seeing)
    frozen = {name.split(".")[1] for name, p in seeing.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_tower", "multi_modal_projector"}
    assert seeing.lm_head.weight.requires_grad


def test_layers_that_no_text_passes_through_are_left_out_and_named(seeing: Any) -> None:
    asked = select_linears(seeing, r"q_proj|fc1")
    assert any("vision_tower" in name for name in asked.targets)
    found = reached(tiny_runtime(), seeing, asked, [9, 10, 11])
    assert list(found.targets) == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert {name for name in asked.targets if "vision_tower" in name} <= set(found.left_out)
    assert not any(module._forward_hooks for module in seeing.modules())
    with pytest.raises(UserError, match=r"No text passes through model\.vision_tower"):
        reached(tiny_runtime(), seeing, select_linears(seeing, r"vision_tower"), [9, 10])


def test_layers_that_are_met_and_experts_that_may_be_stay() -> None:
    model = tiny_model("llama")
    linears = select_linears(model)
    assert reached(tiny_runtime(), model, linears, [9, 10]) is linears
    expert = torch.nn.Linear(4, 4)
    more = dataclasses.replace(linears, targets={**linears.targets, "model.layers.0.mlp.experts.3.up_proj": expert})
    assert reached(tiny_runtime(), model, more, [9, 10]) is more


def test_attention_falls_back_where_there_is_no_sdpa_and_says_so(tmp_path: Any) -> None:
    assert refuses_sdpa({"architectures": ["Gemma2ForCausalLM"]})
    assert not refuses_sdpa({"architectures": ["LlamaForCausalLM"]})
    assert not refuses_sdpa({"architectures": ["OfAnotherLibrary"]})
    assert not refuses_sdpa({})
    for family, kind in (("gemma2", "eager"), ("llama", "sdpa")):
        tiny_model(family).save_pretrained(tmp_path / family)
        settings = ModelSettings(path=str(tmp_path / family))
        source = find_source(settings, tiny_runtime())
        assert load_model(tiny_runtime(), source, settings).config._attn_implementation == kind
        assert [said for said in what_to_say(source) if "eager" in said] == (
            ["Attention is computed plainly (eager), as transformers has no sdpa for this architecture."]
            if kind == "eager" else []
        )  # fmt: skip
    settings = ModelSettings(path=str(tmp_path / "gemma2"), attention="eager")
    assert not what_to_say(find_source(settings, tiny_runtime())), "it was asked for"


def test_of_two_weights_of_one_end_that_of_the_language_part_is_found() -> None:
    stored: dict[str, Any] = dict.fromkeys(
        f"{before}.layers.0.self_attn.q_proj.weight"
        for before in ("language_model.model", "vision_tower.vision_model.encoder")
    )
    wanted = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert find_weight(stored, "model.language_model.layers.0.self_attn.q_proj") == wanted
    assert find_weight(stored, "model.text.layers.0.self_attn.q_proj") is None
