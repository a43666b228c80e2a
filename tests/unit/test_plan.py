"""The plan: parameter counts equal to real models, memory that follows from them, and refusals by lower bounds only."""

import importlib
import io
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from oneshot.checkpoint.disk.files import read_json
from oneshot.checkpoint.layout import rank_bytes
from oneshot.errors import UserError
from oneshot.patch.cost import Cost
from oneshot.patch.guard import AT_ONCE
from oneshot.patch.methods import METHODS
from oneshot.planning import check
from oneshot.planning.check import CannotFit, refuse_what_cannot_fit
from oneshot.planning.duration import Rates, duration
from oneshot.planning.facts import CPU, GPU, MIB, Choice, Precision, Sharded, Work, Zero, shipped
from oneshot.planning.lookup import model_shape
from oneshot.planning.memory import estimate
from oneshot.planning.model import PlannedModel, read_model
from oneshot.planning.plan import Plan, as_json, make_plan
from oneshot.planning.rows import bytes_of, own_rows, row, rows
from oneshot.planning.work import work_of
from oneshot.settings import FinetuneSettings, ModelSettings, PlanSettings, RepairSettings, Settings
from oneshot.world.model import ALIGNED

# the stages' modules: the package's own names are functions
plan = importlib.import_module("oneshot.plan")


def config(kind, hidden, inner, layers, heads, kv_heads, vocabulary, **more):
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary, **more,
    }  # fmt: skip


LLAMA_8B = config("llama", 4096, 14336, 32, 32, 8, 128256)
LLAMA_70B = config("llama", 8192, 28672, 80, 64, 8, 128256)
TOY = config("llama", 64, 128, 4, 4, 2, 256)
MIXTURE = config("qwen3_moe", 64, 112, 3, 4, 2, 96, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
WORK = Work(rows=2, tokens=32, answers=8, held=4, total=64, reference=4)


FIGURES = {
    "sft": (26587, 16.85), "lora": (9254, 13.94), "lowrank": (13325, 27.24), "project": (8590, 20.44),
    "rollback": (12688, 41.54),
}  # fmt: skip


def test_experts_are_quantized_where_each_is_used_by_itself():
    shape = model_shape(MIXTURE)
    experts = [weight for weight in shape.weights if weight.kind == "fused"]
    assert experts
    assert all(weight.alone for weight in experts)
    found = {r.choice.precision: r for r in rows(Settings(), PlannedModel("m", shape)) if r.choice.method == "lora"}
    assert found["nf4"].fits
    assert not found["nf4"].impossible
    apart = replace(shape, weights=tuple(replace(weight, alone=False) for weight in shape.weights))
    one, other = (estimate(s, Choice("lora", "nf4", "zero3", 1), WORK, shipped("zero3"), CPU) for s in (shape, apart))
    numel = shape.of("fused")
    scales = sum(4 * -(-weight.numel // 64) * weight.count for weight in experts)
    assert other.lower - one.lower == 2 * numel - (numel // 2 + scales)


def test_a_rank_loads_exactly_its_partitions():
    shape = model_shape(TOY)
    shapes = {f"{i}-{n}": w.shape for i, w in enumerate(shape.weights) for n in range(w.count)}
    for ranks in (1, 3):
        found = estimate(shape, Choice("lowrank", "bf16", "zero3", ranks), WORK, shipped("zero3"), CPU)
        assert found.load - CPU.load == rank_bytes(shapes, 2, 0, ranks)


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights_take_what_bitsandbytes_holds(double):
    from bitsandbytes.functional import quantize_4bit

    shape = model_shape(TOY)
    expected = 0
    for weight in shape.weights:
        if weight.kind == "linear":
            packed, state = quantize_4bit(torch.randn(weight.shape), quant_type="nf4", compress_statistics=double)
            size = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
        else:
            size = 2 * weight.numel
        expected += weight.count * size
    choice = Choice("lowrank", "nf4", "none", 1, double_quant=double)
    found = estimate(shape, choice, WORK, Zero(), CPU)
    assert found.load - CPU.load == found.lower == expected


def test_training_holds_sixteen_bytes_a_weight_and_frozen_methods_none():
    shape, zero = model_shape(LLAMA_8B), shipped("zero3")
    lower = {m: estimate(shape, Choice(m, "bf16", "zero3", 8), WORK, zero, GPU).lower for m in METHODS}
    gathered = 2 * shape.largest
    assert lower["sft"] == pytest.approx(18 * shape.parameters / 8 + gathered, rel=1e-6)
    assert lower["lowrank"] == lower["rollback"] == pytest.approx(2 * shape.parameters / 8 + gathered, rel=1e-6)
    alone = estimate(shape, Choice("sft", "bf16", "none", 1), WORK, Zero(), GPU)
    assert alone.lower == 16 * shape.parameters
    by_method = {r.choice.method: r for r in rows(Settings(), PlannedModel("m", shape)) if r.choice.precision == "bf16"}
    assert by_method["lowrank"].optimizer == by_method["lowrank"].state == 0
    assert by_method["sft"].state == 12 * shape.parameters
    assert by_method["lora"].state == 12 * shape.low_rank(32)


def test_a_fine_tune_without_deepspeed_holds_twelve_bytes_a_weight_between_steps():
    shape, tuned = model_shape({**TOY, "tie_word_embeddings": True}), Work(1, 1, 1, finetune=True)
    alone = estimate(shape, Choice("sft", "bf16", "none", 1, item=4), tuned, Zero(), CPU)
    assert alone.steady == 12 * shape.parameters + CPU.start
    assert alone.step == 16 * shape.parameters + CPU.start, "and the gradients, of which AdamW makes no copy"
    both = estimate(shape, Choice("sft", "bf16", "none", 2, item=4), tuned, Zero(), CPU)
    copies = 4 * (shape.parameters + 2 * shape.vocabulary * shape.hidden)
    assert both.step - alone.step == copies, "DDP's buckets, and a tied embedding's gradient thrice"
    device = estimate(shape, Choice("sft", "bf16", "none", 1, item=4), tuned, Zero(), GPU)
    assert device.step == 20 * shape.parameters + GPU.start


def test_a_fine_tune_holds_its_logits_once_and_a_repair_its_held_ones_thrice():
    shape = model_shape(TOY)

    def step(method, item=4, **counts):
        work = Work(1, 4000, **{"answers": 1000, **counts})
        return estimate(shape, Choice(method, "bf16", "none", 1, item=item), work, Zero(), CPU).step

    more = 500 * shape.vocabulary
    assert step("sft", finetune=True, answers=1500) - step("sft", finetune=True) == 4 * more
    assert step("sft", item=2, finetune=True, answers=1500) - step("sft", item=2, finetune=True) == (4 + 2) * more
    for item in (4, 2):
        most, least = (step("rollback", item=item, held=held, reference=held) for held in (600, 100))
        assert most - least == 3 * item * more
        kept, twice = (step("rollback", item=item, held=held, reference=600) for held in (100, 300))
        assert kept == twice, "of many that have another turn the reference, twice while it is made"
        assert most - kept == item * 600 * shape.vocabulary
    assert step("rollback", answers=1500) - step("rollback") == (2 + 3) * 4 * more


def test_fp32_takes_twice_as_much(monkeypatch):
    shape, zero = model_shape(TOY), shipped("zero3")
    two, four = (estimate(shape, Choice("rollback", "bf16", "zero3", 1, item=n), WORK, zero, CPU) for n in (2, 4))
    assert four.load - CPU.load == 2 * (two.load - CPU.load)
    assert four.lower == 2 * two.lower
    settings = Settings(model=ModelSettings(dtype="float32"), plan=PlanSettings(sharding="zero3"))
    found = {one.method: one for one in rows(settings, PlannedModel("m", shape)) if one.precision == "bf16"}
    assert {one.choice.held_in for one in found.values()} == {"fp32"}
    assert found["sft"].result == 4 * shape.parameters
    alone, toy = runtime_of(sharding="none", world_size=1), model_shape(read_json(ALIGNED / "config.json"))
    monkeypatch.setattr(check, "_machine", lambda: 4 * toy.parameters - 1)
    refuse_what_cannot_fit(Settings(), alone, ALIGNED, "rollback")
    with pytest.raises(CannotFit, match="in fp32"):
        refuse_what_cannot_fit(Settings(), alone, ALIGNED, "rollback", item=4)


def test_offload_moves_weights_and_states_to_the_machine():
    shape, work = model_shape(LLAMA_8B), WORK
    here = estimate(shape, Choice("sft", "bf16", "zero3", 8), work, shipped("zero3"), GPU)
    away = estimate(shape, Choice("sft", "bf16", "zero3 offload", 8), work, shipped("zero3 offload"), GPU)
    moved = 18 * shape.parameters
    assert away.host - here.host == pytest.approx(moved, rel=1e-3)
    assert away.steady < here.steady - moved / 8 * 0.99
    assert away.host_lower == pytest.approx(moved, rel=1e-3)
    disk = replace(shipped("zero3 offload"), nvme=True)
    assert estimate(shape, Choice("sft", "bf16", "zero3 offload", 8), work, disk, GPU).host_lower == 0


def test_a_model_that_fits_is_gathered_once_a_larger_one_is_not():
    small, large = model_shape(TOY), model_shape(LLAMA_70B)
    zero = shipped("zero3")
    choice = Choice("rollback", "bf16", "zero3", 8)
    kept = estimate(small, choice, WORK, zero, GPU)
    assert kept.steady - GPU.start == pytest.approx(2 * small.parameters * (1 + 1 / 8), rel=1e-2)
    passing = estimate(large, choice, WORK, zero, GPU)
    assert passing.steady - GPU.start == pytest.approx(2 * large.parameters / 8, rel=1e-2)
    assert passing.step - passing.steady > 2 * 10**9, "the weights that are live within a step"


def test_no_estimate_is_below_its_lower_bound_and_more_gpus_take_no_more():
    settings, model = Settings(), PlannedModel("m", model_shape(LLAMA_8B))
    for method in METHODS:
        for precision in get_args(Precision):
            for sharding in get_args(Sharded):
                found = []
                for gpus in (2, 4, 8, 16):
                    work = work_of(settings, method, gpus)
                    choice = Choice(method, precision, sharding, gpus)
                    found.append(estimate(model.shape, choice, work, shipped(sharding), GPU))
                assert all(memory.lower <= memory.peak for memory in found)
                assert all(memory.host_lower <= memory.host for memory in found)
                assert [m.peak for m in found] == sorted((m.peak for m in found), reverse=True)


def test_checkpointing_activations_takes_less():
    shape, choice = model_shape(LLAMA_8B), Choice("sft", "bf16", "zero3", 8)
    work = Work(4, 1024, 512)
    plain = estimate(shape, choice, work, shipped("zero3"), GPU)
    again = estimate(shape, choice, replace(work, checkpointing=True), shipped("zero3"), GPU)
    assert again.step < plain.step - 10**9
    assert again.steady == plain.steady


def test_numbers_come_from_the_deepspeed_json():
    assert shipped("zero3") == Zero(10**9, 10**8, 10**8, 5 * 10**8, 10**9)
    assert shipped("zero3", "nf4").max_live == 250_000_000, "packed elements hold four weights"
    assert shipped("zero3 offload").offload_weights
    assert shipped("zero3 offload").offload_states
    section = {"stage3_max_live_parameters": 5e8, "reduce_bucket_size": "auto", "offload_param": {"device": "nvme"}}
    found = Zero.of({"zero_optimization": section})
    assert (found.max_live, found.reduce_bucket) == (5 * 10**8, Zero().reduce_bucket)
    assert found.nvme
    assert found.offload_weights
    assert not found.offload_states


def test_duration_follows_the_rates():
    shape, zero, rates = model_shape(LLAMA_70B), shipped("zero3"), Rates(2 * 10**9, 10**10, 1e14)
    work = Work(1, 100, 10)
    read = 2 * shape.parameters
    found = duration(shape, Choice("rollback", "bf16", "zero3", 16, 8), work, zero, rates, 60, read)
    assert found.load == pytest.approx(2 * shape.parameters / 2 / 2e9), "two machines read half each"
    gathered = 2 * 2 * shape.parameters * 15 / 16
    assert found.step == pytest.approx(2 * shape.active * 100 * 2 / 1e14 + gathered / 1e10)
    assert found.total == pytest.approx(found.load + 60 * found.step)
    wide = duration(shape, Choice("rollback", "bf16", "zero3", 16, 8, item=4), work, zero, rates, 60, read)
    assert wide.step - found.step == pytest.approx(gathered / 1e10), "twice the bytes travel"
    sft = Choice("sft", "bf16", "none", 1)
    trained = duration(shape, sft, work, Zero(), rates, 60, read)
    again = duration(shape, sft, replace(work, checkpointing=True), Zero(), rates, 60, read)
    assert trained.step == pytest.approx(2 * shape.active * 100 * 3 / 1e14)
    assert again.step == pytest.approx(trained.step * 4 / 3)


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("24 GiB", 24 * 2**30), ("1.5TB", 15 * 10**11)])
def test_sizes(text, size):
    assert bytes_of(text, "plan.gpu_memory") == size


@pytest.mark.parametrize("text", ["80", "", "much", "80XB", "-1GB", "0GB", "1.2.3GB"])
def test_no_size(text):
    with pytest.raises(UserError, match=r"plan\.gpu_memory"):
        bytes_of(text, "plan.gpu_memory")


@pytest.fixture
def llama_70b(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_70B))
    return str(path)


def planned(capsys, *arguments):
    """Run the stage; returns its exit code, output and errors."""
    code = 0
    try:
        plan.main(list(arguments))
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_exit_code_says_whether_the_settings_own_choice_fits(llama_70b, capsys):
    on_eight = ["--model.path", llama_70b, "--gpus", "8", "--gpu_memory", "80GB"]
    assert planned(capsys, *on_eight)[0] == 0, "no choice is given, and some row fits"
    assert planned(capsys, *on_eight, "--repair.method", "sft", "--sharding", "zero3")[0] == 3
    tuned = ["--stage", "finetune", "--finetune.method", "lora", "--model.gradient_checkpointing", "true"]
    assert planned(capsys, *on_eight, *tuned)[0] == 0
    assert planned(capsys, "--model.path", llama_70b, "--gpus", "1", "--gpu_memory", "8GB")[0] == 3
    code, _, said = planned(capsys, "--gpus", "8")
    assert (code, "--model.path" in said) == (2, True)


def test_table_is_whole_in_a_log_file(llama_70b, capsys):
    _, out, _ = planned(capsys, "--model.path", llama_70b, "--gpus", "8")
    assert "70,553,706,496" in out
    assert "…" not in out
    body = [line.split() for line in out.splitlines() if line.split()[:2] == ["rollback", "bf16"]]
    assert [line[2] for line in body] == ["none", "zero2", "zero3", "zero3"]
    assert "4-bit weights cannot be trained" in out
    assert max(map(len, out.splitlines()[3:])) <= 160


def test_json_holds_every_row(llama_70b, capsys):
    _, out, _ = planned(capsys, "--model.path", llama_70b, "--gpus=24", "--json")
    found = json.loads(out)
    assert found["parameters"] == 70_553_706_496
    assert len(found["rows"]) == 5 * 2 * 4
    sft = next(r for r in found["rows"] if (r["method"], r["precision"], r["sharding"]) == ("sft", "bf16", "zero3"))
    assert sft["fits"]
    assert sft["smallest_gpus"] in range(16, 25)
    assert sft["optimizer_bytes"] == 16 * 70_553_706_496


def test_a_plan_is_a_value(llama_70b):
    settings = Settings(model=ModelSettings(path=llama_70b), repair=RepairSettings(method="lora"))
    found = make_plan(settings)
    assert isinstance(found, Plan)
    assert (found.model.shape.parameters, found.gpus, found.fits) == (70_553_706_496, 8, True)
    assert {(one.method, one.precision) for one in found.own} == {("lora", "bf16")}
    assert len(found.rows) == 5 * 2 * 4
    one = next(one for one in found.rows if (one.method, one.precision, one.sharding) == ("sft", "bf16", "zero3"))
    assert one.result + one.state == (2 + 12) * 70_553_706_496
    assert not make_plan(replace(settings, plan=PlanSettings(gpus=1, gpu_memory="8GB"))).fits


def test_what_each_method_takes_of_a_known_model():
    """Peak of a GPU in MiB and seconds: a change of these is a change of what people are told."""
    model = PlannedModel("m", model_shape(LLAMA_8B))
    found = {one.method: one for one in rows(Settings(plan=PlanSettings(sharding="zero3")), model)[::2]}
    assert {name: (one.memory.peak // MIB, round(one.time.total, 2)) for name, one in found.items()} == FIGURES
    read = found["rollback"].memory.host - found["project"].memory.host
    assert read == 8 * 4 * 4096 * 14336, "every rank reads a matrix of the reference at a time"


def test_a_further_method_is_planned_by_what_it_says_of_itself(monkeypatch):
    own = replace(METHODS["lowrank"], name="another", cost=Cost(factors=2), four_bit=None)
    monkeypatch.setitem(METHODS, "another", own)
    model = PlannedModel("m", model_shape(LLAMA_8B))
    found = {(one.method, one.precision): one for one in rows(Settings(plan=PlanSettings(sharding="zero3")), model)}
    another, lowrank = found["another", "bf16"], found["lowrank", "bf16"]
    assert another.memory.step > lowrank.memory.step, "two generations of factors, not one"
    assert another.time.total == pytest.approx(lowrank.time.total - lowrank.time.step), "no further pass"
    assert found["another", "nf4"].impossible
    assert not found["lowrank", "nf4"].impossible
    assert make_plan(Settings(model=ModelSettings(path=str(ALIGNED)), repair=RepairSettings(method="another"))).fits


def test_smallest_number_fits_and_the_next_smaller_does_not(llama_70b):
    model = PlannedModel("m", model_shape(LLAMA_70B))

    def at(gpus):
        return row(Settings(plan=PlanSettings(gpus=gpus)), model, "lora", "bf16", "zero3")

    smallest = at(1).smallest
    assert at(smallest).fits
    assert not at(smallest - 1).fits
    assert at(smallest - 1).advice


def test_host_memory_is_what_stops_whole_copies():
    plan, model = PlanSettings(gpus=8, host_memory="100GB"), PlannedModel("m", model_shape(LLAMA_8B))
    own, stock = (
        Settings(model=ModelSettings(gradient_checkpointing=True, stock_io=io), plan=plan) for io in (False, True)
    )
    assert row(own, model, "lora", "bf16", "zero2").fits, "weights are read to the GPU"
    assert row(stock, model, "lora", "bf16", "zero3").fits
    found = row(stock, model, "lora", "bf16", "zero2")
    assert found.memory.peak < 80 * 10**9
    assert found.memory.host > 8 * 16 * 10**9, "each process builds the whole model"
    assert not found.fits
    assert found.advice == "host memory: zero3"


def test_the_fewest_that_fit_are_no_more_than_those_given():
    model = PlannedModel("m", model_shape(LLAMA_70B))
    for gpus in (9, 12, 20):
        found = row(Settings(plan=PlanSettings(gpus=gpus)), model, "sft", "bf16", "zero3")
        assert found.fits == (found.smallest is not None and found.smallest <= gpus)
        assert not found.advice.startswith(f"{gpus} ")


def test_what_rollback_compares_takes_time_unless_the_update_is_known():
    shape, plan = model_shape(LLAMA_8B), PlanSettings(sharding="zero3", disk="2GB")
    loads = {
        (method, adapter): row(
            Settings(plan=plan), PlannedModel("m", shape, adapter), method, "bf16", "zero3"
        ).time.load
        for method in ("rollback", "lowrank")
        for adapter in (False, True)
    }
    assert loads["rollback", False] - loads["rollback", True] == pytest.approx(2 * 2 * shape.reached / 2e9)
    assert loads["rollback", True] == loads["lowrank", True] == loads["lowrank", False]


def test_weights_are_planned_as_the_files_hold_them(tmp_path):
    """Of a dtype that nobody asks for, and of bitsandbytes' 4 bits, from headers or from the config alone."""
    folder = tmp_path / "fp32"
    folder.mkdir()
    tensors = {name: tensor.float() for name, tensor in load_file(ALIGNED / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = read_json(ALIGNED / "config.json")
    for here, said in ((True, "bfloat16"), (False, "float32")):
        config = folder / "config.json"
        config.write_text(json.dumps({**fields, "dtype": said}))
        path = folder if here else config
        found = make_plan(Settings(model=ModelSettings(path=str(path)), plan=PlanSettings(sharding="zero3")))
        assert found.checkpoint_bytes == 4 * found.model.shape.parameters
        assert {one.choice.item for one in found.rows} == {4}
        assert as_json(found)["stored_as"] == "fp32"
        asked = make_plan(Settings(model=ModelSettings(path=str(path), dtype="bfloat16")))
        assert {one.choice.item for one in asked.rows} == {2}
        assert asked.checkpoint_bytes == found.checkpoint_bytes

    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    sizes = []
    for double in (False, True):
        named = {**LLAMA_8B, "quantization_config": {**packed, "bnb_4bit_use_double_quant": double}}
        (tmp_path / "config.json").write_text(json.dumps(named))
        found = make_plan(Settings(model=ModelSettings(path=str(tmp_path / "config.json"))))
        sizes.append(found.checkpoint_bytes / 1e9)
        assert {one.precision for one in found.own} == {"nf4"}
        assert {one.choice.double_quant for one in found.rows} == {double}
        assert not any(one.fits for one in found.rows if one.precision == "bf16")
        lowrank = next(one for one in found.rows if (one.method, one.precision) == ("lowrank", "nf4"))
        assert lowrank.time.load == pytest.approx(found.checkpoint_bytes / 2e9)
    assert sizes == pytest.approx([6.03, 5.70], abs=0.01)


def test_own_rows():
    model = PlannedModel("m", model_shape(LLAMA_8B))
    found = rows(Settings(), model)
    assert own_rows(Settings(), model, found) == found
    with_reference = Settings(reference="there", model=ModelSettings(quantize="nf4"))
    assert {(r.choice.method, r.choice.precision) for r in own_rows(with_reference, model, found)} == {
        ("rollback", "nf4")
    }
    asked = Settings(repair=RepairSettings(method="lora"))
    assert {(r.choice.method, r.choice.precision) for r in own_rows(asked, model, found)} == {("lora", "bf16")}


def test_model_by_folder_adapter_and_file(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(ALIGNED)}))
    whole = read_model(Settings(model=ModelSettings(path=str(ALIGNED))))
    by_adapter = read_model(Settings(model=ModelSettings(path=str(tmp_path))))
    by_file = read_model(Settings(model=ModelSettings(path=str(ALIGNED / "config.json"))))
    assert whole.shape == by_adapter.shape == by_file.shape
    assert (whole.adapter, by_adapter.adapter) == (False, True)
    with pytest.raises(UserError, match="nowhere"):
        read_model(Settings(model=ModelSettings(path="nowhere")))


def test_an_adapter_that_names_no_base_is_not_planned_as_what_lies_here(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
    monkeypatch.chdir(ALIGNED)
    with pytest.raises(UserError, match="names no base model"):
        read_model(Settings(model=ModelSettings(path=str(tmp_path))))


def runtime_of(sharding="zero3", world_size=2, deepspeed=None):
    plugin = SimpleNamespace(deepspeed_config=deepspeed or {"zero_optimization": {"stage": 3}})
    accelerator = SimpleNamespace(deepspeed_plugin=plugin)
    return SimpleNamespace(
        rank=0, world_size=world_size, device=torch.device("cpu"), sharding=sharding, accelerator=accelerator
    )


def other_config(folder, **fields):
    """A copy of the toy model, with other fields in its config."""
    shutil.copy(ALIGNED / "model.safetensors", folder)
    (folder / "config.json").write_text(json.dumps({**read_json(ALIGNED / "config.json"), **fields}))
    return folder


def test_of_a_large_guard_rollback_takes_a_part_in_each_epoch():
    """Its logits are kept of all; the other methods take all of it at once."""
    few, many = (Settings(repair=RepairSettings(guard_prompts=count)) for count in (AT_ONCE, 4 * AT_ONCE))
    turned = [work_of(settings, "rollback", 2) for settings in (few, many)]
    assert turned[1] == replace(turned[0], reference=4 * turned[0].reference)
    assert turned[0].reference == turned[0].held > 0
    whole = [work_of(settings, "lowrank", 2) for settings in (few, many)]
    assert (whole[1].guard, whole[1].held) == (4 * whole[0].guard, 4 * whole[0].held)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_refused_at_its_lower_bound_and_not_above(method, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    settings, runtime = Settings(), runtime_of()
    shape = model_shape(read_json(ALIGNED / "config.json"))
    work = work_of(settings, method, 2)
    lower = 2 * estimate(shape, Choice(method, "bf16", "zero3", 2, 2), work, Zero(), CPU).lower
    monkeypatch.setattr(check, "_machine", lambda: lower)
    refuse_what_cannot_fit(settings, runtime, ALIGNED, method)
    monkeypatch.setattr(check, "_machine", lambda: lower - 1)
    with pytest.raises(CannotFit, match=r"oneshot plan.*plan\.force") as refused:
        refuse_what_cannot_fit(settings, runtime, ALIGNED, method)
    assert refused.value.code == 3
    refuse_what_cannot_fit(replace(settings, plan=PlanSettings(force=True)), runtime, ALIGNED, method)


def test_what_is_not_sure_is_not_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "_machine", lambda: 1)
    smaller = {"bf16": {"bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 3}}
    refuse_what_cannot_fit(Settings(), runtime_of(deepspeed=smaller), ALIGNED, "sft")
    folder = other_config(tmp_path, quantization_config={"quant_method": "awq"})
    (folder / "model.safetensors").unlink()  # which holds weights in full, whatever the config says of them
    refuse_what_cannot_fit(Settings(), runtime_of(), folder, "lora")
    refuse_what_cannot_fit(Settings(), runtime_of(), other_config(tmp_path, model_type="made-up"), "sft")


def test_a_lora_counts_as_far_as_it_is_known(monkeypatch):
    shape = model_shape(read_json(ALIGNED / "config.json"))
    without = 2 * shape.parameters
    settings = Settings(finetune=FinetuneSettings(lora_rank=4), repair=RepairSettings(rank=8))
    alone = runtime_of(sharding="none", world_size=1)

    def refused(settings, stage, bytes_there):
        monkeypatch.setattr(check, "_machine", lambda: bytes_there)
        try:
            refuse_what_cannot_fit(settings, alone, ALIGNED, "lora", stage=stage)
        except CannotFit:
            return True
        return False

    for stage, rank in (("finetune", 4), ("repair", 8)):
        least = without + 16 * shape.low_rank(rank)
        assert not refused(settings, stage, least)
        assert refused(settings, stage, least - 1)
    some = replace(settings, repair=RepairSettings(targets="q_proj"))
    assert not refused(some, "repair", without), "how many layers that are is not known here"


@pytest.mark.parametrize(
    ("columns", "below"), [(200, ""), (130, "sft, bf16, zero3: "), (92, "Left out for want of"), (80, "load, save")]
)
def test_no_cell_of_the_plan_is_cut_in_a_narrow_terminal(columns, below, llama_70b):
    from oneshot.planning.table import print_plan
    from oneshot.shown import open_console

    options = PlanSettings(gpus=8, gpu_memory="80GB")
    console = open_console(file=io.StringIO(), force_terminal=True, width=columns, color_system=None)
    print_plan(options, make_plan(replace(Settings(), model=ModelSettings(path=llama_70b), plan=options)), console)
    said = console.file.getvalue()
    assert "…" not in said
    assert below in said
    assert ("Left out for want of" in said) == (columns <= 92)
    assert max(len(line) for line in said.splitlines() if line.startswith((" sft", " method"))) <= columns
