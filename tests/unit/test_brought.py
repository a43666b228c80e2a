"""What people bring: checkpoints as they are in the wild, which every way of reading must read alike."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import logits_of, targets_of, tiny_model, tiny_runtime, tiny_tokens, tiny_update

from oneshot.checkpoint.files import INDEX, SINGLE, list_tensors
from oneshot.checkpoint.load import find_source, load_model
from oneshot.checkpoint.merge import merge_update
from oneshot.checkpoint.reference import check_reference, vocabularies, why_grown
from oneshot.checkpoint.save import save_checkpoint
from oneshot.checkpoint.verify import check_shards
from oneshot.errors import UserError
from oneshot.patch import directions as of_update
from oneshot.patch.teacher import of_vocabulary
from oneshot.settings import ModelSettings
from oneshot.training.objective import kl_sum
from oneshot.world.model import build_tokenizer

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
    from oneshot.checkpoint.digests import fingerprint

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
