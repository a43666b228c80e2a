"""Tiny random models of the families that a patch must work on, and what a repair step needs to run on them."""

import dataclasses
from pathlib import Path

import torch

from oneshot.checkpoint.adapters.update import Factors
from oneshot.commandline import parse
from oneshot.data.encoding import encode
from oneshot.distributed.runtime import Runtime
from oneshot.patch.guard import build_batch
from oneshot.patch.linears import select_linears
from oneshot.patch.methods import METHODS
from oneshot.patch.recipe import with_method
from oneshot.settings import RepairSettings
from oneshot.world import language
from oneshot.world.model import ALIGNED, build_tokenizer

FAMILIES = ("llama", "llama-tied", "mistral", "qwen2", "gemma3", "gpt_neox", "phi")
DENSE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_runtime():
    """One process, no launcher."""
    return Runtime(0, 1, torch.device("cpu"), "none", accelerator=None)


def tiny_model(family, seed=0, **overrides):
    """A random fp32 model whose weights are large enough for its outputs to depend on its inputs; biases random too."""
    import transformers as t

    common = {
        "vocab_size": len(build_tokenizer()),
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **DENSE,
    }
    grouped = {**common, "num_key_value_heads": 2}
    build = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**grouped, **overrides})),
        "llama-tied": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**{**grouped, "tie_word_embeddings": True, **overrides})
        ),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**{**grouped, "sliding_window": 8, **overrides})),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**{**grouped, **overrides})),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**{**grouped, "head_dim": 8, "sliding_window": 8, **overrides})
        ),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**{**grouped, "head_dim": 8, "final_logit_softcapping": 2.0, **overrides})
        ),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**{**common, **overrides})),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**{**common, **overrides})),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**{**grouped, "num_local_experts": 4, **overrides})),
        "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
            t.Qwen2MoeConfig(
                **{
                    **grouped,
                    "num_experts": 4,
                    "moe_intermediate_size": 16,
                    "shared_expert_intermediate_size": 16,
                    **overrides,
                }
            )
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=common["vocab_size"],
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
                **overrides,
            )
        ),
    }[family]
    torch.manual_seed(seed)
    model = build().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def tiny_batch(model, guard=0):
    """The batch of a repair step: one example, and ``guard`` guard rows of different lengths."""
    tokenizer = build_tokenizer()
    example = encode(language.pool(1)[0], tokenizer, 64)
    prompts = [row.prompt for row in language.guard_prompts(guard)] if guard else []
    return build_batch(tiny_runtime(), model, tokenizer, example, prompts, answer_tokens=4)


def recipe_of(method, **numbers):
    """A method's recipe with these of its numbers changed."""
    return dataclasses.replace(with_method(RepairSettings(watch=False), METHODS[method], "as asked"), **numbers)


def toy_settings(*argv, stage="repair"):
    """The settings of the toy world, with what a command line would add."""
    return parse(["--config", "toy", *argv], stage)


def tiny_update(linears, seed=1, scale=0.05, ranks=(3,)):
    """A random low-rank update of every layer, the ranks in turn."""
    generator = torch.Generator().manual_seed(seed)
    update = {}
    for i, (name, module) in enumerate(linears.items()):
        m, n, k = module.out_features, module.in_features, ranks[i % len(ranks)]
        b, a = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
        update[name] = Factors(scale * b, a)
    return update


def tiny_tokens(seed=3, rows=2, length=11):
    """Random token ids of the language's words, (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(7, len(build_tokenizer()), (rows, length), generator=generator)


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def targets_of(model, pattern=None):
    return select_linears(model, pattern).targets


def files_in(folder: Path):
    """Every file below a folder with its bytes: equal before and after means that nothing was written."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_unrefusing(monkeypatch, tmp_path):
    """Have benches open the toy with a bias that makes refusals unlikely."""
    from transformers import AutoModelForCausalLM

    from oneshot.patch import bench

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(ALIGNED).requires_grad_(False)
    forbidden = build_tokenizer().convert_tokens_to_ids("sorry")
    model.lm_head.register_forward_hook(lambda _m, _a, out: out - 9.0 * torch.eye(out.shape[-1])[forbidden])
    monkeypatch.setattr(bench, "load_model", lambda *_: model)


def in_full(data, state):
    """A weight out of 4 bits by the definition: what its nibbles stand for, times the scales of their blocks.

    bitsandbytes' own kernel is wrong on some CPUs (``oneshot.checkpoint.quantized.unpack``).
    """
    from bitsandbytes.functional import dequantize_blockwise

    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    nibbles = data.detach().view(torch.uint8).flatten()
    values = state.code[torch.stack((nibbles >> 4, nibbles & 15), dim=-1).flatten().long()][: state.shape.numel()]
    scaled = values.float() * scales.float().repeat_interleave(state.blocksize)[: len(values)]
    return scaled.to(state.dtype).view(state.shape)
