"""What people bring: checkpoints as they are in the wild, which every way of reading must read alike."""

import contextlib
import dataclasses
import json
import re
import shlex
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits_of, targets_of, tiny_model, tiny_runtime, tiny_tokens, tiny_update

from oneshot.checkpoint.adapters.adapter import read_adapter, write_patch
from oneshot.checkpoint.disk.files import (
    INDEX,
    PICKLED_ADAPTER,
    PICKLED_MODEL,
    SINGLE,
    TensorEntry,
    list_tensors,
    resolve,
)
from oneshot.checkpoint.loading.load import find_source, load_model, what_to_say
from oneshot.checkpoint.loading.reference import check_reference, vocabularies, why_grown
from oneshot.checkpoint.merging.merge import merge_update
from oneshot.checkpoint.quantized.scheme import is_left_over
from oneshot.checkpoint.writing.beside import Changes, changed, copy_tokenizer
from oneshot.checkpoint.writing.save import save_checkpoint
from oneshot.checkpoint.writing.verify import check_shards
from oneshot.commandline import parse
from oneshot.errors import UserError
from oneshot.patch import directions as of_update
from oneshot.patch.teacher import of_vocabulary
from oneshot.settings import ModelSettings
from oneshot.training.objective import kl_sum
from oneshot.world.model import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WAYS = ({}, {"stock_io": True}, {"quantize": "nf4"})
WAY_NAMES = ["as it is", "transformers' own way", "nf4"]
TOKENS = tiny_tokens()


def brought(folder, family="llama", *, seed=0, shards="1GB", config=(), **options):
    """Write a model with its tokenizer, and say these fields in its config."""
    tiny_model(family, seed=seed, **options).save_pretrained(folder, max_shard_size=shards)
    build_tokenizer().save_pretrained(folder)
    say(folder, dict(config))
    return folder


def say(folder, fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


def loaded(folder, **settings):
    asked, runtime = ModelSettings(path=str(folder), **settings), tiny_runtime()
    return load_model(runtime, find_source(asked, runtime), asked)


def logits(folder, **settings):
    return logits_of(loaded(folder, **settings), TOKENS)


# a config that ties what the files hold apart


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Two folders with the same embedding and another head; the config of the second one ties them all the same."""
    root = tmp_path_factory.mktemp("apart")
    told = brought(root / "told", "qwen2")
    tied = shutil.copytree(told, root / "tied")
    say(tied, {"tie_word_embeddings": True})
    return told, tied


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_a_head_of_its_own_is_kept_though_the_config_ties_it(apart, way):
    told, tied = apart
    assert torch.equal(logits(tied, **way), logits(told, **way))


def test_a_head_equal_to_the_embedding_is_one_weight(tmp_path):
    folder = brought(tmp_path, "llama-tied")
    wanted = logits(folder)
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / SINGLE)
    for way in WAYS[:2]:
        model = loaded(folder, **way)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(logits_of(model, TOKENS), wanted)
    assert logits(folder, quantize="nf4").isfinite().all()


@pytest.mark.parametrize("way", WAYS[:2], ids=WAY_NAMES[:2])
def test_what_is_written_of_a_head_of_its_own_says_so(apart, tmp_path, way):
    """Older versions and servers go by the config alone."""
    from transformers import AutoModelForCausalLM

    told, tied = apart
    model = loaded(tied, **way)
    save_checkpoint(tiny_runtime(), model, build_tokenizer(), tmp_path / "saved", torch.float32)
    update = tiny_update(targets_of(model))
    merge_update(tiny_runtime(), tied, update, tmp_path / "merged")
    for folder in (tmp_path / "saved", tmp_path / "merged"):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= list_tensors(folder).keys()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits_of(found, TOKENS), logits(told))


def test_a_patch_may_change_a_head_of_its_own(apart, tmp_path):
    _, tied = apart
    model = loaded(tied)
    update = tiny_update({"lm_head": model.lm_head})
    merge_update(tiny_runtime(), tied, update, tmp_path / "merged")
    before, after = load_file(tied / SINGLE), load_file(tmp_path / "merged" / SINGLE)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


# a stale index beside the single file


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """A model in one file, beside which an older save in shards has stayed."""
    root = tmp_path_factory.mktemp("stale")
    clean = brought(root / "clean", seed=1)
    left = brought(root / "left", seed=2, shards="15KB")
    shutil.copy(clean / SINGLE, left / SINGLE)
    assert (left / INDEX).is_file()
    return clean, left


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_the_single_file_counts_beside_a_stale_index(stale, way):
    clean, left = stale
    assert torch.equal(logits(left, **way), logits(clean, **way))


def test_the_single_file_counts_for_exports_references_and_digests(stale, tmp_path):
    from oneshot.checkpoint.reads.digests import fingerprint

    clean, left = stale
    assert fingerprint(left) == fingerprint(clean)
    model = loaded(clean)
    update = tiny_update(targets_of(model))
    for folder in (clean, left):
        merge_update(tiny_runtime(), folder, update, tmp_path / folder.name)
    assert (tmp_path / "left" / SINGLE).read_bytes() == (tmp_path / "clean" / SINGLE).read_bytes()
    assert not (tmp_path / "left" / INDEX).exists()
    difference = of_update.checkpoint_difference(clean, left, targets_of(model))
    assert not any(difference(name, True).any() for name in targets_of(model))


def test_verify_names_a_stale_index(stale):
    clean, left = stale
    assert not any(shard.problems for shard in check_shards(clean))
    problems = [(shard.name, problem) for shard in check_shards(left) for problem in shard.problems]
    assert [name for name, _ in problems] == [INDEX]
    assert SINGLE in problems[0][1]


def test_weights_that_only_the_config_names_are_refused(tmp_path):
    folder = brought(tmp_path, config={"transformers_weights": "other.safetensors"})
    with pytest.raises(UserError, match=r"names other\.safetensors as transformers_weights where model\.safetensors"):
        loaded(folder)


# a vocabulary that grew


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """(model, reference), of which one has 28 rows of embedding and head more; and targets of the model's class."""
    root = tmp_path_factory.mktemp("grown")
    rows = len(build_tokenizer())
    small = brought(root / "small", seed=3)
    large = brought(root / "large", seed=4, vocab_size=rows + 28)
    return small, large, rows


@pytest.mark.parametrize("more", [True, False], ids=["model", "reference"])
def test_a_vocabulary_that_grew_is_compared_as_far_as_both_go(grown, more):
    small, large, rows = grown
    model, reference = (large, small) if more else (small, large)
    check_reference(model, reference)
    assert vocabularies(model, reference) == ((rows + 28, rows) if more else (rows, rows + 28))
    assert f"28 rows {'more' if more else 'fewer'}" in why_grown(model, reference)
    assert why_grown(model, model) is None
    targets = targets_of(loaded(model), "lm_head|q_proj")
    difference = of_update.checkpoint_difference(model, reference, targets)
    ours, theirs = (load_file(folder / SINGLE)["lm_head.weight"] for folder in (model, reference))
    delta = difference("lm_head", True)
    assert delta.shape == ours.shape
    torch.testing.assert_close(delta[:rows], ours[:rows] - theirs[:rows])
    assert not delta[rows:].any()


def test_other_shapes_are_no_grown_vocabulary(grown, tmp_path):
    small, *_ = grown
    other = brought(tmp_path, hidden_size=64)
    with pytest.raises(UserError, match=r"give the aligned checkpoint that this model was fine-tuned from"):
        check_reference(small, other)


def test_logits_of_a_smaller_vocabulary_say_nothing_of_the_rows_beyond_it():
    torch.manual_seed(0)
    theirs, ours = torch.randn(3, 10), torch.randn(3, 14)
    wider = of_vocabulary(theirs, 14)
    assert torch.equal(wider[:, :10], theirs)
    assert torch.equal(wider.softmax(-1)[:, 10:], torch.zeros(3, 4))
    assert kl_sum(ours, wider).isfinite()
    assert torch.equal(of_vocabulary(ours, 10), ours[:, :10])


# what lies beside the weights


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A checkpoint as transformers 4 wrote it: rope_theta, torch_dtype, a tokenizer class of its own."""
    folder = brought(tmp_path_factory.mktemp("older") / "model", "llama-tied")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for name in ("rope_parameters", "dtype"):
        del fields[name]
    fields |= {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32", "transformers_version": "4.46.0"}
    path.write_text(json.dumps(fields, indent=4))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=3))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    (folder / "LICENSE").write_text("as it came\n")
    (folder / "training_args.bin").write_bytes(b"no weights, and a pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    return folder


def source_of(folder, **settings):
    return find_source(ModelSettings(path=str(folder), **settings), tiny_runtime())


BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("stock", [False, True], ids=["by range", "transformers' own way"])
def test_what_a_run_does_not_change_goes_along_byte_for_byte(older, tmp_path, stock):
    model = loaded(older)
    save_checkpoint(tiny_runtime(), model, source_of(older), tmp_path / "saved", torch.float32, stock=stock)
    for name in (*BESIDE, "special_tokens_map.json", "LICENSE"):
        assert (tmp_path / "saved" / name).read_bytes() == (older / name).read_bytes(), name
    assert not any((tmp_path / "saved" / name).exists() for name in ("training_args.bin", "checkpoint-5"))
    assert torch.equal(logits(tmp_path / "saved"), logits(older))


@pytest.mark.parametrize("stock", [False, True], ids=["by range", "transformers' own way"])
def test_another_dtype_is_all_that_changes_in_the_config(older, tmp_path, stock):
    source = source_of(older, dtype="bfloat16")
    save_checkpoint(tiny_runtime(), loaded(older), source, tmp_path / "saved", source.written, stock=stock)
    wanted = json.loads((older / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == wanted


def test_a_config_of_parts_changes_in_all_of_them():
    fields = {"torch_dtype": "float16", "text_config": {"dtype": "float16", "vocab_size": 5}, "vision_config": {}}
    after = changed(fields, Changes(dtype="float32", architecture="Both"))
    assert after["text_config"] == {"dtype": "float32", "vocab_size": 5}
    assert (after["torch_dtype"], after["vision_config"], after["architectures"]) == ("float32", {}, ["Both"])


def test_patches_carry_the_tokenizer_as_it_was(older, tmp_path):
    copy_tokenizer(older, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*BESIDE[2:], "special_tokens_map.json"}


def test_every_chat_template_goes_along(older, tmp_path):
    """Of several all but the default one lie in a folder of their own."""
    from transformers import AutoTokenizer

    older, patch = shutil.copytree(older, tmp_path / "model"), tmp_path / "patch"
    templates = older / "additional_chat_templates"
    templates.mkdir()
    patch.mkdir()
    (templates / "tool_use.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    copy_tokenizer(older, patch)
    save_checkpoint(tiny_runtime(), loaded(older), source_of(older), tmp_path / "saved", torch.float32)
    merge_update(tiny_runtime(), older, {}, tmp_path / "merged", tokenizer=patch)
    for folder in (patch, tmp_path / "saved", tmp_path / "merged"):
        assert AutoTokenizer.from_pretrained(folder).chat_template.keys() == {"default", "tool_use"}


def test_a_merge_takes_the_tokenizer_that_the_run_used(older, tmp_path):
    """An adapter with a chat template of its own was scored with that one."""
    used = tmp_path / "adapter"
    used.mkdir()
    build_tokenizer().save_pretrained(used)
    (used / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    update = tiny_update(targets_of(loaded(older)))
    merge_update(tiny_runtime(), older, update, tmp_path / "merged", tokenizer=used)
    for name in BESIDE[2:]:
        assert (tmp_path / "merged" / name).read_bytes() == (used / name).read_bytes()
    assert not (tmp_path / "merged" / "special_tokens_map.json").exists()
    assert (tmp_path / "merged" / "config.json").read_bytes() == (older / "config.json").read_bytes()


# weights that only the config calls quantized


@pytest.fixture(scope="module")
def called_quantized(tmp_path_factory):
    folder = brought(tmp_path_factory.mktemp("called"), seed=5)
    fields = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    plain = shutil.copytree(folder, folder / "plain")
    say(folder, {"quantization_config": fields})
    return folder, plain


@pytest.mark.parametrize("way", WAYS, ids=WAY_NAMES)
def test_weights_in_full_are_read_so_whatever_the_config_says(called_quantized, way):
    folder, plain = called_quantized
    assert torch.equal(logits(folder, **way), logits(plain, **way))
    source = source_of(folder, **way)
    assert source.four_bit == ("quantize" in way)
    assert any("says that the weights are quantized" in said for said in what_to_say(source))
    assert not what_to_say(source_of(plain))


@pytest.mark.parametrize(
    "fields", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "nobody's"}]
)
def test_other_schemes_are_left_over_too(called_quantized, tmp_path, fields):
    _, plain = called_quantized
    shutil.copytree(plain, tmp_path / "model")
    say(tmp_path / "model", {"quantization_config": fields})
    assert torch.equal(logits(tmp_path / "model"), logits(plain))


def test_what_is_written_of_them_no_longer_says_so(called_quantized, tmp_path):
    folder, plain = called_quantized
    model = loaded(folder)
    save_checkpoint(tiny_runtime(), model, source_of(folder), tmp_path / "saved", torch.float32)
    merge_update(tiny_runtime(), folder, tiny_update(targets_of(model)), tmp_path / "merged")
    for name in ("saved", "merged"):
        fields = (json.loads((path / "config.json").read_text()) for path in (tmp_path / name, plain))
        assert next(fields) == next(fields)


@pytest.mark.parametrize("stored", [torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_are_not_left_over(stored):
    entry = {torch.uint8: "U8", torch.int32: "I32"}.get(stored, "F8_E4M3")
    tensors = {"a.weight": TensorEntry(None, entry, (2, 2), 0), "norm.weight": TensorEntry(None, "F32", (2,), 0)}
    said = {"quantization_config": {"quant_method": "any"}}
    assert not is_left_over(said, tensors)
    assert is_left_over(said, {"norm.weight": tensors["norm.weight"]})
    scaled = {"a.weight": TensorEntry(None, "BF16", (2, 2), 0), "a.weight_scale": TensorEntry(None, "F32", (1,), 0)}
    assert not is_left_over(said, scaled)


# tokens beyond the embedding


@pytest.fixture
def extended(tmp_path):
    """A model whose tokenizer got two tokens that its embedding has no rows for; one of them pads if asked for."""

    def made(*, pads=False):
        folder = brought(tmp_path / "model")
        tokenizer = build_tokenizer()
        tokenizer.add_tokens(["<extra>"])
        if pads:
            tokenizer.add_special_tokens({"pad_token": "<pads>"})
        tokenizer.save_pretrained(folder)
        return folder

    return made


def conversations(path, *prompts):
    rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "sorry"}]} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def probes(path, *prompts):
    path.write_text("".join(json.dumps({"kind": "harmless", "prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def stages(folder, tmp_path, *said):
    """(stage, what it does before a model is loaded) with these words in what it reads."""
    from oneshot.measure.probes import collect_probes
    from oneshot.patch.check import check
    from oneshot.patch.scoring import score_local
    from oneshot.training.finetune import prepare

    runtime, model = tiny_runtime(), ["--model.path", str(folder)]
    words = conversations(tmp_path / "words.jsonl", "fold a plum", *said)
    asked = probes(tmp_path / "probes.jsonl", "fold a plum", *said)
    plain = probes(tmp_path / "plain.jsonl", "fold a plum")
    example = conversations(tmp_path / "example.jsonl", "please")
    repair = [*model, "--repair.method", "lowrank", "--example", example, "--guard"]
    told = [*repair, conversations(tmp_path / "guard.jsonl", "fold"), "--score.probes", asked]
    guarded = [*repair, words, "--score.probes", plain]

    def score():
        settings = parse([*model, "--score.probes", asked], "score")
        score_local(runtime, settings, collect_probes(settings), lambda _: tmp_path / "run", lambda _: None)

    def finetune():
        settings = parse([*model, "--data.harmful", words, "--data.harmful_count", "9"], "finetune")
        prepare(dataclasses.replace(settings, finetune=dataclasses.replace(settings.finetune, cache=False)), runtime)

    return {
        "score": score,
        "finetune": finetune,
        "repair's probes": lambda: check(parse(told, "repair"), runtime),
        "repair's guard": lambda: check(parse(guarded, "repair"), runtime),
    }


STAGES = ("score", "finetune", "repair's probes", "repair's guard")


@pytest.fixture
def unloaded(monkeypatch):
    def refuse(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("oneshot.patch.scoring.load_model", refuse)


@pytest.mark.parametrize("stage", STAGES)
def test_a_token_beyond_the_embedding_is_named_before_the_model_is_loaded(extended, tmp_path, stage, unloaded):
    rows = len(build_tokenizer())
    with pytest.raises(UserError, match=rf"token '<extra>', number {rows}, of the text .* has {rows} rows"):
        stages(extended(), tmp_path, "fold <extra>")[stage]()


@pytest.mark.parametrize("stage", STAGES)
def test_padding_beyond_the_embedding_is_named_before_the_model_is_loaded(extended, tmp_path, stage, unloaded):
    rows = len(build_tokenizer())
    with pytest.raises(UserError, match=rf"pads with token '<pads>', number {rows + 1}, .* has {rows} rows"):
        stages(extended(pads=True), tmp_path)[stage]()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_tokens_that_no_text_has_may_lie_beyond_the_embedding(extended, tmp_path, stage):
    """Gemma 3's text models come so: their tokenizer knows a token for images."""
    stages(extended(), tmp_path)[stage]()


# adapters without their base, and pickles


def test_a_base_that_is_gone_is_said_with_the_setting_that_gives_it(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for base, said in ((str(tmp_path / "gone"), "does not exist"), ("models/gone", "neither a folder here nor")):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=rf"{said}.*--model\.base") as told:
            source_of(adapter)
        assert str(adapter / "adapter_config.json") in str(told.value)


def run_command(message):
    """Run the Python command that a message ends with, here: another interpreter would take seconds to start."""
    _, option, code = shlex.split(re.search(r'python -c ".*"', str(message.value))[0])
    assert option == "-c"
    exec(code, {})


def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path):
    folder = brought(tmp_path / "model")
    wanted = logits(folder)
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which can run code") as told:
        loaded(folder)
    run_command(told)
    assert torch.equal(logits(folder), wanted)


def test_a_pickled_adapter_is_refused_with_the_command_that_converts_it(tmp_path):
    update = tiny_update(targets_of(tiny_model("llama")))
    write_patch(tmp_path, update, [], "", torch.float32)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.bin alone, a pickle, which can run code") as told:
        read_adapter(tmp_path)
    run_command(told)
    assert read_adapter(tmp_path).update.keys() == update.keys()


def test_other_forms_are_named(tmp_path):
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(UserError, match=r"model-q4\.gguf is made for llama\.cpp"):
        list_tensors(tmp_path)


# models with code of their own

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .parts_own import double


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = double(found.logits)
        return found
"""


@pytest.fixture
def with_code(tmp_path):
    folder = brought(tmp_path / "own")
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    say(folder, {"model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": classes})
    (folder / "modeling_own.py").write_text(OWN_CODE)
    (folder / "parts_own.py").write_text("def double(x):\n    return 2 * x\n")
    return folder


def test_a_model_with_code_of_its_own_is_written_with_it_and_loads_again(with_code, tmp_path):
    model = loaded(with_code, trust_remote_code=True)
    source, wanted = source_of(with_code, trust_remote_code=True), logits_of(model, TOKENS)
    save_checkpoint(tiny_runtime(), model, source, tmp_path / "saved", torch.float32)
    update = tiny_update(targets_of(model), scale=0.0)
    merge_update(tiny_runtime(), with_code, update, tmp_path / "merged", trust_remote_code=True)
    for name in ("saved", "merged"):
        for file in ("modeling_own.py", "parts_own.py"):
            assert (tmp_path / name / file).read_bytes() == (with_code / file).read_bytes()
    shutil.rmtree(with_code)
    for name in ("saved", "merged"):
        assert torch.equal(logits(tmp_path / name, trust_remote_code=True), wanted)


def test_code_of_a_models_own_is_fetched_with_it(monkeypatch, tmp_path):
    """What is fetched is not run: that takes trust_remote_code."""
    asked = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve("owner/name") == tmp_path
    for name in ("modeling_own.py", "tokenization_own.py", "qwen.tiktoken"):
        assert any(fnmatch(name, pattern) for pattern in asked)
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in asked)


def test_the_guide_has_the_commands_that_convert_pickles():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert all(command.format(folder="DIR") in guide for command in (PICKLED_MODEL, PICKLED_ADAPTER))


def test_text_that_only_the_model_has_rows_for_is_not_asked_of_the_reference(grown, tmp_path):
    from oneshot.patch.check import check

    small, large, rows = grown
    model = shutil.copytree(large, tmp_path / "model")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    example = conversations(tmp_path / "example.jsonl", "please")
    argv = ["--model.path", str(model), "--reference", str(small), "--example", example, "--guard", example]
    for word, scored in (("fold", "true"), ("<extra>", "false"), ("<extra>", "true")):
        asked = [*argv, "--score.probes", probes(tmp_path / "probes.jsonl", word), "--score.reference", scored]
        expected = pytest.raises(
            UserError, match=rf"token '<extra>', number {rows}, where the embedding of the reference"
        )
        with expected if (word, scored) == ("<extra>", "true") else contextlib.nullcontext():
            check(parse(asked, "repair"), tiny_runtime())
