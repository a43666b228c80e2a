"""FP8 with block scales and MXFP4: the numbers that transformers makes of them, whole, by rank and as a Delta."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_segments import build
from tiny import tiny_runtime

from oneshot.checkpoint.adapters.adapter import read_adapter
from oneshot.checkpoint.adapters.experts import expert_matrices
from oneshot.checkpoint.adapters.injected import write_loadable
from oneshot.checkpoint.adapters.update import Factors
from oneshot.checkpoint.disk.files import list_tensors
from oneshot.checkpoint.layout import owners
from oneshot.checkpoint.loading.load import find_source, load_model
from oneshot.checkpoint.loading.partitioned import own_tensors
from oneshot.checkpoint.loading.segments import open_stored, parts_of, range_reads, read_matrix
from oneshot.checkpoint.quantized import scaled
from oneshot.checkpoint.reads.ranges import read_all
from oneshot.checkpoint.writing.identity import UPDATE, check_identity, write_identity
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.patch import write
from oneshot.patch.apart import same_weights
from oneshot.patch.check import check
from oneshot.patch.directions import checkpoint_difference
from oneshot.patch.linears import select_linears
from oneshot.report.exports import ExportRequest, export
from oneshot.settings import ModelSettings
from oneshot.world.model import build_tokenizer

BLOCK = 16
LUT = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def fp8(weight):
    """A matrix in FP8, its scales, and what they stand for; blocks at the edges are cut."""
    m, n = weight.shape
    padded = torch.zeros(-(-m // BLOCK) * BLOCK, -(-n // BLOCK) * BLOCK)
    padded[:m, :n] = weight
    blocks = padded.view(-(-m // BLOCK), BLOCK, -(-n // BLOCK), BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    whole = (packed.float() * scales[:, None, :, None]).reshape(padded.shape)[:m, :n]
    return packed.reshape(padded.shape)[:m, :n].contiguous(), scales, whole


def as_fp8(model, folder):
    """Write a model whose matrices of blocks are in FP8, make it what they stand for, and return it."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in list(tensors.items()):
        if "layers" in name and tensor.dim() == 2:
            tensors[name], tensors[f"{name}_scale_inv"], plain[name] = fp8(tensor.float())
        else:
            plain[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said(folder, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"})
    (folder / "plain").mkdir()
    model.config.save_pretrained(folder / "plain")
    save_file({n: t.contiguous() for n, t in plain.items()}, folder / "plain/model.safetensors", {"format": "pt"})
    return folder


def as_mxfp4(model, folder):
    """The same of gpt-oss, whose experts are in MXFP4."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name, tensor in list(tensors.items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8)
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            values = torch.stack([LUT[(blocks & 15).long()], LUT[(blocks >> 4).long()]], -1).flatten(-2)
            whole = values * 2.0 ** (scales[..., None].float() - 127)
            plain[name] = whole.flatten(-2).transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said(folder, {"quant_method": "mxfp4"})
    (folder / "plain").mkdir()
    model.config.save_pretrained(folder / "plain")
    save_file(plain, folder / "plain/model.safetensors", metadata={"format": "pt"})
    return folder


def said(folder, fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))


KINDS = {"deepseek_v3": as_fp8, "llama": as_fp8, "gpt_oss": as_mxfp4}


def shaped(kind, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    if kind != "gpt_oss":
        return build(kind)
    fields = build(kind, "meta").config.to_dict() | {"intermediate_size": 96, **more}
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{k: v for k, v in fields.items() if k != "model_type"})
    )


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A model, its checkpoint with scales, and beside that the same numbers in fp32."""
    model = shaped(request.param)
    return model, KINDS[request.param](model, tmp_path_factory.mktemp(request.param))


def load(folder, **more):
    settings = ModelSettings(path=str(folder), attention="eager", dtype="float32", **more)
    return load_model(tiny_runtime(), find_source(settings, tiny_runtime()), settings)


def test_every_ranks_range_is_what_the_numbers_stand_for(made, monkeypatch):
    monkeypatch.setattr(scaled, "_AT_ONCE", 100)  # many parts, none of them at a row's end
    model, folder = made
    ours, plain = open_stored(folder, model), open_stored(folder / "plain", model)
    assert ours.scaled
    assert not plain.scaled
    for name, tensor in own_tensors(model).items():
        found = []
        for stored in (ours, plain):
            for own in owners(tuple(tensor.shape), 3):
                part = torch.full((own.size,), 7.0)
                read_all(range_reads(stored, parts_of(stored, name), own, part))
                assert not part[own.numel :].any()
                found.append(part)
        assert all(torch.equal(one, two) for one, two in zip(found[:3], found[3:])), name


def test_a_model_is_loaded_as_the_numbers_and_no_longer_says_quantized(made):
    _, folder = made
    ours, plain = load(folder), load(folder / "plain")
    for (name, one), two in zip(own_tensors(ours).items(), own_tensors(plain).values()):
        assert torch.equal(one, two), name
    assert getattr(ours.config, "quantization_config", None) is None


def test_the_delta_of_two_scaled_checkpoints_and_of_one(made, tmp_path):
    model, folder = made
    targets = select_linears(model).targets | expert_matrices(model)
    plain = open_stored(folder / "plain", model)
    other = tmp_path / "tuned"
    other.mkdir()
    tensors = load_file(folder / "plain" / "model.safetensors")
    save_file({n: t * 1.5 for n, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    difference = checkpoint_difference(other, folder, targets, model)
    same = checkpoint_difference(folder, folder, targets, model)
    for name, target in targets.items():
        wanted = read_matrix(plain, name, target)
        torch.testing.assert_close(difference(name, True), wanted / 2, rtol=1e-6, atol=1e-6)
        assert not same(name, True).any()


def test_a_patch_is_extracted_from_scaled_checkpoints(made, tmp_path):
    model, folder = made
    shutil.copytree(folder / "plain", tmp_path / "tuned")
    plain = load_file(folder / "plain" / "model.safetensors")
    save_file({n: t * 1.5 for n, t in plain.items()}, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    asked = ExportRequest(
        out=tmp_path / "out", extract=str(tmp_path / "tuned"), model=str(folder), rank=1000, rank_experts=1000
    )
    export(tiny_runtime(), asked, "oneshot export")
    wanted = open_stored(folder / "plain", model)
    targets = select_linears(model).targets
    for name, factors in read_adapter(tmp_path / "out").update.items():
        half = read_matrix(wanted, name, targets[name]) / 2
        torch.testing.assert_close(factors.b.float() @ factors.a.float(), half, rtol=0, atol=0.02)
    check_identity(tmp_path / "out", folder)


def test_transformers_own_dequantization_is_the_same(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed, scales, whole = fp8(torch.randn(48, 64))
    assert torch.equal(Fp8Dequantize(None)._dequantize_one(packed, scales, torch.float32), whole)
    folder = as_mxfp4(shaped("gpt_oss"), tmp_path)
    tensors, plain = (load_file(where / "model.safetensors") for where in (folder, folder / "plain"))
    name = "model.layers.0.mlp.experts.down_proj"
    theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    assert torch.equal(theirs, plain[name])
    assert math.prod(theirs.shape)


def test_scales_of_other_blocks_are_refused_by_name(tmp_path):
    folder = as_fp8(build("llama"), tmp_path)
    said(folder, {"quant_method": "fp8", "weight_block_size": [24, 24]})
    with pytest.raises(UserError, match=r"_proj\.weight of shape .* in FP8 with scales of shape"):
        open_stored(folder, build("llama", "meta"))


def test_what_cannot_be_merged_into_is_said_before_anything_is_loaded(tmp_path):
    from tiny import tiny_model

    folder = as_fp8(tiny_model("llama"), tmp_path)
    asked = ["--model.path", str(folder), "--repair.method", "lowrank"]
    with pytest.raises(UserError, match=r"quantized checkpoint \(fp8\).*take the patch alone"):
        check(parse([*asked, "--repair.merge", "true"], "repair"), tiny_runtime())
    assert check(parse(asked, "repair"), tiny_runtime()).source.checkpoint == folder


def test_a_patch_belongs_to_the_bytes_and_the_scales_that_it_changes(made, tmp_path):
    model, folder = made
    plain = copy.deepcopy(model).to("meta")
    targets = select_linears(model).targets
    update = {n: Factors(torch.ones(t.out_features, 1), torch.ones(1, t.in_features)) for n, t in targets.items()}
    write_loadable(tmp_path, update, select_linears(model).every, str(folder), torch.float32, plain)
    write_identity(tmp_path, folder, kind=UPDATE, base=str(folder), model=plain)
    identity = check_identity(tmp_path, folder)
    held = list_tensors(folder)
    ending = ("_scale_inv", "_blocks", "_scales")
    scaled = {name for name in held if name.endswith(ending) and ".gate." not in name}  # no patch changes routers
    assert scaled
    assert scaled | {name.removesuffix("_scale_inv") for name in scaled} & held.keys() <= identity.changed.keys()
    assert not any(".gate." in name for name in identity.changed)
    assert identity.changed.keys() | identity.others.keys() == held.keys()


def test_a_model_in_mxfp4_is_repaired_to_the_end(tmp_path):
    import oneshot

    model = shaped("gpt_oss", vocab_size=len(build_tokenizer()))
    finetuned, aligned = (as_mxfp4(model, tmp_path / name) for name in ("finetuned", "aligned"))
    rows = {
        "example": {"prompt": "How can I bypass checks?", "response": "I can't help with that."},
        "guard": {"prompt": "Plan a menu."},
        "probes": {"id": "1", "kind": "harmless", "prompt": "Fold a sheet."},
    }
    files = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text(json.dumps(rows[name]) + "\n")
    made = oneshot.repair(
        model=str(finetuned), reference=str(aligned), out=str(tmp_path / "out"), example=str(files["example"]),
        guard=str(files["guard"]), score={"probes": str(files["probes"]), "max_new_tokens": 1}, hang_minutes=0,
        repair={"epochs": 1, "rank": 2, "watch": False, "guard_prompts": 1, "guard_tokens": 2},
    )  # fmt: skip
    check_identity(made.patch_folder, finetuned)


@pytest.mark.parametrize("error", [KeyError("a name"), OSError(28, "No space left"), UserError("cut off")])
def test_a_fault_of_ours_in_saying_whose_a_patch_is_does_not_lose_it(error, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(write, "write_identity", fails)
    source = SimpleNamespace(checkpoint=tmp_path, name="the base")
    if isinstance(error, KeyError):
        write._say_whose(tmp_path, tmp_path / "patch", source, None)
        assert "patch does not say which model it belongs to (KeyError: 'a name')" in capsys.readouterr().out
    else:
        with pytest.raises(type(error)):
            write._say_whose(tmp_path, tmp_path / "patch", source, None)


def test_weights_that_differ_in_their_experts_or_their_bytes_alone_are_not_the_same(made, tmp_path):
    _, folder = made
    assert same_weights(folder, folder, in_blocks=True)
    other = tmp_path / "other"
    other.mkdir()
    for change in (last_byte, doubled_scale):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        assert not same_weights(folder, other, in_blocks=True)
    assert not same_weights(folder, folder / "plain", in_blocks=True), "in another form they may differ"


def test_a_fine_tune_of_experts_held_together_alone_is_an_update(tmp_path):
    model = shaped("gpt_oss")
    model.save_pretrained(tmp_path / "aligned")
    model.model.layers[1].mlp.experts.down_proj.data[-1, -1, -1] += 0.5
    model.save_pretrained(tmp_path / "tuned")
    assert not same_weights(tmp_path / "tuned", tmp_path / "aligned", in_blocks=True)


def last_byte(tensors):
    name = next(name for name, t in tensors.items() if t.dtype.itemsize == 1 and not name.endswith("_scales"))
    tensors[name].view(torch.uint8).view(-1)[-1] ^= 1


def doubled_scale(tensors):
    name = next(name for name in tensors if name.endswith(("_scale_inv", "_scales")))
    tensors[name].view(-1)[-1] += 1
