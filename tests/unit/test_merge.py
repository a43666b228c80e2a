"""Merges streamed from files, against PEFT's own in memory and against bitsandbytes' own NF4."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DENSE, files_in, in_full, targets_of, tiny_model, tiny_runtime, tiny_update

from oneshot.checkpoint.adapters.adapter import read_adapter, write_patch
from oneshot.checkpoint.disk.files import INDEX, SINGLE, list_tensors, read_tensor
from oneshot.checkpoint.loading.architecture import architecture_of
from oneshot.checkpoint.merging import merge as merging
from oneshot.checkpoint.merging.merge import merge, merge_update
from oneshot.checkpoint.merging.merge_plan import Term, adapter_terms, plan_merge, shared_out
from oneshot.checkpoint.reads.manifest import check_share
from oneshot.checkpoint.writing.verify import check_shards
from oneshot.errors import UserError
from oneshot.world.model import build_tokenizer

TARGETS = {
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi": ["q_proj", "fc1"],
    "gpt2": ["c_attn", "c_proj"],
}
LLAMA = ["q_proj", "v_proj", "down_proj"]


def everything(folder):
    return {name: read_tensor(entry, name) for name, entry in list_tensors(folder).items()}


def save_base(folder, family="llama", dtype=torch.float32, seed=0, shard="20KB", **overrides):
    model = tiny_model(family, seed, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return model


def save_lora(folder, base, *, seed=5, std=0.2, **options):
    """A LoRA on a saved base, both factors random, as a user would have trained it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = {"r": 4, "lora_alpha": 12, "target_modules": LLAMA, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    model.save_pretrained(str(folder))
    return folder


def merged_by_peft(base, lora, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, str(lora)).merge_and_unload().save_pretrained(folder)
    return everything(folder)


def merged_by_us(base, loras, folder, *, weights=(1.0,), **options):
    adapters = zip(loras, itertools.cycle(weights))
    parts = [(f"The adapter {lora}", adapter_terms(read_adapter(lora), weight)) for lora, weight in adapters]
    merge(tiny_runtime(), plan_merge(base, parts, **options), folder)
    assert not any(shard.problems for shard in check_shards(folder)), "finite, and with the checksums of its manifest"
    return everything(folder)


def same_bits(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def changed(one, other):
    return sorted(name for name in one if not torch.equal(one[name], other[name]))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *[
            (family, torch.bfloat16)
            for family in ("llama", "llama-tied", "gemma3", "gpt_neox", "phi", "gpt2", "mixtral")
        ],
        *[(family, torch.float32) for family in ("llama", "gpt2")],
        *[(family, torch.float16) for family in ("llama-tied", "phi")],
    ],
    ids=str,
)
def test_a_merge_has_the_bits_of_pefts(family, dtype, tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base, family, dtype)
    targets = TARGETS.get(family, ["q_proj", "o_proj"] if family == "mixtral" else LLAMA)
    save_lora(lora, base, target_modules=targets)
    ours = merged_by_us(base, [lora], tmp_path / "ours")
    same_bits(ours, merged_by_peft(base, lora, tmp_path / "theirs"))
    before = everything(base)
    assert len(changed(ours, before)) == 2 * len(targets) + 2 * (family == "gpt2")  # c_proj: attention's and the MLP's
    assert all(any(target in name for target in targets) for name in changed(ours, before))


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}}, {"lora_alpha": 1, "r": 7}],
    ids=lambda options: next(iter(options)),
)
def test_pefts_scalings_have_pefts_bits(options, tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base, dtype=torch.bfloat16)
    save_lora(lora, base, **options)
    same_bits(merged_by_us(base, [lora], tmp_path / "ours"), merged_by_peft(base, lora, tmp_path / "theirs"))


def test_a_bf16_adapter_is_merged_as_peft_loads_it(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base, dtype=torch.bfloat16)
    save_lora(lora, base)
    path = lora / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    same_bits(merged_by_us(base, [lora], tmp_path / "ours"), merged_by_peft(base, lora, tmp_path / "theirs"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pieces_of_a_matrix_have_the_bits_of_the_whole(family, tmp_path, monkeypatch):
    """Rows are cut small here: 48 x 32 matrices never are, so these are larger, and of odd sizes."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    sizes = {"intermediate_size": 193} if family == "llama" else {"n_inner": 193}
    save_base(base, family, torch.bfloat16, **sizes)
    save_lora(lora, base, target_modules=TARGETS.get(family, [*LLAMA, "up_proj"]))
    monkeypatch.setattr(merging, "_PIECE", 3 * 64 * 32)
    monkeypatch.setattr(merging, "_BLOCK", 1)
    read = []
    plain = merging.read_range

    def counting(entry, own, out, name, pieces):
        read.append((name, own.numel))
        plain(entry, own, out, name, pieces)

    monkeypatch.setattr(merging, "read_range", counting)
    ours = merged_by_us(base, [lora], tmp_path / "ours")
    same_bits(ours, merged_by_peft(base, lora, tmp_path / "theirs"))
    tall = {name for name, tensor in ours.items() if len(tensor) >= 128 and tensor.ndim == 2}
    assert len(tall) >= 2
    assert all(numel < 128 * ours[name].shape[1] for name, numel in read if name in tall), "none is held whole"
    assert sum(numel for _, numel in read) == sum(tensor.numel() for tensor in ours.values()), "all is read once"


def test_cuts_cover_all_rows_and_leave_no_small_rest():
    for rows, most in [(1, 1), (63, 1), (64, 1), (65, 1), (127, 64), (128, 64), (193, 64), (1000, 200), (5632, 128)]:
        cuts = list(merging._cuts(rows, most))
        assert [row for first, last in cuts for row in range(first, last)] == list(range(rows))
        assert all(last - first >= min(64, rows) for first, last in cuts)
        assert all(last - first < max(64, most) + 64 for first, last in cuts)
    assert list(merging._cuts(0, 64)) == []


@pytest.mark.parametrize("shard", ["5KB", "1GB"])
def test_shards_in_and_out_do_not_matter(shard, tmp_path):
    from transformers import AutoModelForCausalLM

    base, lora = tmp_path / "base", tmp_path / "lora"
    model = save_base(base, shard=shard)
    assert (base / SINGLE).exists() == (shard == "1GB")
    save_lora(lora, base)
    one = merged_by_us(base, [lora], tmp_path / "one")
    several = merged_by_us(base, [lora], tmp_path / "several", max_bytes=10_000)
    assert (tmp_path / "one" / SINGLE).is_file()
    assert (tmp_path / "several" / INDEX).is_file()
    same_bits(one, several)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "several", dtype="auto").state_dict()
    same_bits({name: loaded[name] for name in one}, one)
    assert set(loaded) == set(model.state_dict())


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_names_with_a_prefix_are_found(prefix, tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base)
    save_lora(lora, base)
    plain = merged_by_us(base, [lora], tmp_path / "plain")
    path = lora / "adapter_model.safetensors"
    named = {k.replace("base_model.model.", f"base_model.model.{prefix}"): t for k, t in load_file(path).items()}
    save_file(named, path)
    same_bits(merged_by_us(base, [lora], tmp_path / "prefixed adapter"), plain)
    tensors = {f"{prefix}{name}": tensor for name, tensor in everything(base).items()}
    for file in base.glob("model*"):
        file.unlink()
    save_file(tensors, base / SINGLE)
    ours = merged_by_us(base, [lora], tmp_path / "prefixed base")
    same_bits({name.removeprefix(prefix): tensor for name, tensor in ours.items()}, plain)


def test_everything_else_is_carried_over_byte_for_byte(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base, dtype=torch.bfloat16)
    save_lora(lora, base)
    texts = ["LICENSE", "vocab.txt", "additional_chat_templates/tool.jinja", "modeling_own.py"]
    weights = ["pytorch_model.bin", "original/consolidated.pth", "gguf/model.gguf", "stray.safetensors", "README.md"]
    for name in [*texts, *weights, ".cache/lock", "pytorch_model.bin.index.json"]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(name.encode())
    before = files_in(base)
    ours = merged_by_us(base, [lora], tmp_path / "ours")
    assert files_in(base) == before, "the base is left alone"
    after = files_in(tmp_path / "ours")
    config = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert set(after) == {*config, *texts, SINGLE, "manifest.json"}
    assert all(after[name] == before[name] for name in [*config, *texts])
    kept = {name: tensor for name, tensor in everything(base).items() if not any(part in name for part in LLAMA)}
    same_bits({name: ours[name] for name in kept}, kept)


def test_tensors_of_any_dtype_are_copied(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base, shard="1GB")
    save_lora(lora, base)
    odd = {
        "flags": torch.tensor([True, False, True]),
        "eight": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "counts": torch.tensor([[1, -(2**40)]]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(float("nan")),
    }
    save_file({**load_file(base / SINGLE), **odd}, base / SINGLE)
    parts = [("it", adapter_terms(read_adapter(lora), 1.0))]
    merge(tiny_runtime(), plan_merge(base, parts), tmp_path / "ours")
    ours = everything(tmp_path / "ours")
    for name, tensor in odd.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert ours[name].view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist(), name
    check_share(tiny_runtime(), tmp_path / "ours")
    problems = [problem for shard in check_shards(tmp_path / "ours") for problem in shard.problems]
    assert problems == ["empty is empty", "scalar holds 1 values that are not finite"]


def test_a_link_to_nothing_in_the_base_is_named(tmp_path):
    save_base(tmp_path)
    (tmp_path / "extra.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"extra\.txt is a link to what is not there"):
        plan_merge(tmp_path, [])


def test_adapters_are_summed_with_their_weights(tmp_path):
    base = tmp_path / "base"
    save_base(base)
    first = save_lora(tmp_path / "first", base, seed=1)
    second = save_lora(tmp_path / "second", base, seed=2, r=2, target_modules=["q_proj", "up_proj"])
    ours = merged_by_us(base, [first, second], tmp_path / "ours", weights=(0.5, 2.0))
    wanted = everything(base)
    for lora, weight in ((first, 0.5), (second, 2.0)):
        for module, factors in read_adapter(lora).update.items():
            wanted[f"{module}.weight"] += weight * (factors.b @ factors.a)
    assert len(changed(ours, everything(base))) == 8
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_taking_a_patch_out_again_is_right_within_two_roundings(dtype, tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base, dtype=dtype)
    save_lora(lora, base, std=0.05)
    before, there = everything(base), merged_by_us(base, [lora], tmp_path / "there")
    back = merged_by_us(tmp_path / "there", [lora], tmp_path / "back", weights=(-1.0,))
    half = torch.finfo(dtype).eps / 2  # the error of one rounding, relative
    for name, tensor in back.items():
        one, two, three = (t.double() for t in (before[name], there[name], tensor))
        bound = half * (two.abs() + one.abs()) * 1.01 + 1e-6 * two.abs() + 1e-7
        assert ((three - one).abs() <= bound).all(), name
    assert len(changed(there, before)) == 6


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_dequantized_base_is_what_qlora_computes_with(dtype, double, tmp_path):
    from bitsandbytes.functional import quantize_4bit

    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base, dtype=dtype)
    save_lora(lora, base)
    ours = merged_by_us(base, [lora], tmp_path / "ours", through_nf4=True, double_quant=double)
    update = read_adapter(lora).update
    linears = targets_of(tiny_model("llama"))
    assert len(linears) == 14
    for name, tensor in everything(base).items():
        module = name.removesuffix(".weight")
        if module in linears:
            packed, state = quantize_4bit(tensor, blocksize=64, compress_statistics=double, quant_type="nf4")
            wanted = in_full(packed, state)
            assert not torch.equal(wanted, tensor)
            if module in update:
                wanted = (wanted.float() + update[module].b @ update[module].a).to(dtype)
                torch.testing.assert_close(ours[name], wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
                continue
            tensor = wanted
        assert torch.equal(ours[name], tensor), f"{name}: head, embedding and norms stay as they are"


def save_packed(folder, base, *, double=False):
    """What transformers writes of a model that bitsandbytes loaded in 4 bits."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=double,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.bfloat16)
    model.train().save_pretrained(folder)  # in eval mode bitsandbytes repacks the weights on some CPUs
    build_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("double", [False, True])
def test_a_base_in_nf4_is_dequantized_as_it_is_read(double, tmp_path):
    from transformers import AutoModelForCausalLM

    base, lora, packed = tmp_path / "base", tmp_path / "lora", tmp_path / "packed"
    save_base(base, dtype=torch.bfloat16)
    save_lora(lora, base)
    save_packed(packed, base, double=double)
    assert list_tensors(packed)["model.layers.0.mlp.up_proj.weight"].dtype == "U8"
    ours = merged_by_us(packed, [lora], tmp_path / "ours")
    same_bits(ours, merged_by_us(base, [lora], tmp_path / "same", through_nf4=True, double_quant=double))
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization_config" not in fields
    assert fields["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_other_quantized_bases_are_refused(tmp_path):
    base = tmp_path / "base"
    save_base(base)
    path = base / "config.json"
    plain = json.loads(path.read_text())
    shard = list_tensors(base)["model.layers.0.mlp.up_proj.weight"].shard
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(shard).items()}, shard)  # or nothing is
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    for fields in ({"quant_method": "gptq"}, eight, {**eight, "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}):
        path.write_text(json.dumps({**plain, "quantization_config": fields}))
        with pytest.raises(UserError, match=r"is a quantized checkpoint .* give the checkpoint from before"):
            plan_merge(base, [])


def refused(base, module, match, m=32, n=32):
    factors = next(iter(tiny_update({module: torch.nn.Linear(n, m)}).values()))
    with pytest.raises(UserError, match=match):
        plan_merge(base, [("The adapter A", {module: Term(factors, 1.0)})])


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    base = tmp_path / "base"
    save_base(base)
    q = "model.layers.0.self_attn.q_proj"
    refused(base, q, rf"A changes {q} by 32 x 16, but {q}\.weight in \S*base is 32 x 32: it belongs to another", n=16)
    refused(base, q.replace("0", "7"), r"A changes model\.layers\.7\.\S*, for which \S*base holds no weight")
    refused(base, "model.norm", r"A changes model\.norm, which is no linear layer")
    refused(base, "model.embed_tokens", r"A changes model\.embed_tokens, which is no linear layer")
    plan_merge(base, [("it", {q: Term(tiny_update(targets_of(tiny_model("llama")))[q], 1.0)})])


def test_a_head_that_is_the_embedding_is_refused(tmp_path):
    save_base(tmp_path / "tied", "llama-tied")
    words = len(build_tokenizer())
    refused(tmp_path / "tied", "lm_head", r"lm_head, which shares its weights with the embedding in \S*tied", m=words)
    refused(tmp_path / "tied", "model.embed_tokens", "shares its weights with the output head", m=words)
    save_base(tmp_path / "untied")
    plan = plan_merge(
        tmp_path / "untied",
        [("it", {"lm_head": Term(tiny_update({"lm_head": torch.nn.Linear(32, words)})["lm_head"], 1.0)})],
    )
    assert set(plan.terms) == {"lm_head.weight"}


def test_tensors_that_transformers_converts_are_refused(tmp_path):
    save_base(tmp_path, "mixtral")
    stored = next(name for name in list_tensors(tmp_path) if "experts.0.w1" in name)
    refused(tmp_path, stored.removesuffix(".weight"), "another form than transformers computes with", m=48)


def test_the_architecture_tells_layers_apart(tmp_path):
    save_base(tmp_path, "mixtral")
    tensors = list_tensors(tmp_path)
    found = architecture_of(tmp_path, tensors)
    assert {name for name in tensors if ".experts." in name} == found.converted
    assert set(found.patchable) == {n for n in found.linears if n != "lm_head" and "experts" not in n}
    assert "lm_head.weight" not in found.quantized
    assert "model.embed_tokens.weight" in found.others


def test_a_merge_that_is_not_finite_leaves_nothing(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base, dtype=torch.float16)
    save_lora(lora, base, std=300.0)
    with pytest.raises(UserError, match=r"model\.layers\.\d\.\S*weight holds NaN or infinity after the merge, in F16"):
        merged_by_us(base, [lora], tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"]


def test_a_base_that_is_not_what_was_written_is_refused(tmp_path):
    base, lora = tmp_path / "base", tmp_path / "lora"
    save_base(base)
    save_lora(lora, base)
    merged_by_us(base, [lora], tmp_path / "ours")
    entry = list_tensors(tmp_path / "ours")["model.embed_tokens.weight"]
    with entry.shard.open("r+b") as handle:
        handle.seek(entry.offset + 9)
        handle.write(b"\x55")
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight"):
        merged_by_us(tmp_path / "ours", [lora], tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_ranks_share_all_tensors_evenly(world, tmp_path):
    base = tmp_path / "base"
    save_base(base)
    plan = plan_merge(
        base, [("it", {n: Term(f, 1.0) for n, f in tiny_update(targets_of(tiny_model("llama"))).items()})]
    )
    shares = shared_out(plan, world)
    assert sorted(name for share in shares for name in share) == sorted(plan.slots)
    sizes = [sum(plan.tensors[name].shape[0] for name in share) for share in shares]
    if world <= 3:
        assert max(sizes) < 1.5 * sum(sizes) / world


def test_an_update_in_memory_is_merged_alike(tmp_path):
    base, patch = tmp_path / "base", tmp_path / "patch"
    save_base(base, dtype=torch.bfloat16)
    linears = targets_of(tiny_model("llama"))
    update = tiny_update(linears)
    write_patch(patch, update, list(linears), "base", torch.float32)
    merge_update(tiny_runtime(), base, update, tmp_path / "ours")
    same_bits(everything(tmp_path / "ours"), merged_by_us(base, [patch], tmp_path / "same"))
    assert DENSE["num_hidden_layers"] * 7 == len(changed(everything(tmp_path / "ours"), everything(base)))
