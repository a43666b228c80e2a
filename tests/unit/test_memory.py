"""What a full fine-tune keeps: the bits of torch's own arithmetic, and nothing of a weight's or logits' size twice."""

import copy
import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oneshot.data.encoding import IGNORE
from oneshot.distributed import adamw
from oneshot.distributed.adamw import AdamWInPieces
from oneshot.distributed.engine import start_training
from oneshot.distributed.resources import give_back_freed_memory
from oneshot.distributed.tied import accumulate_rows
from oneshot.training.objective import MicroBatch, answer_loss

WORDS, WIDTH, PAD = 700, 24, 0
CPU = SimpleNamespace(device=torch.device("cpu"), sharding="none")


class Made(TorchDispatchMode):
    """Counts the tensors that operations make, by their number of elements."""

    def __init__(self):
        super().__init__()
        self.sizes = []
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        taken = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in taken:
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


def of_size(made, numel):
    return sum(size == numel for size in made.sizes)


class Model(nn.Module):
    """An embedding that is the head as well, or not, and a layer between them."""

    def __init__(self, tied=True, last=nn.Identity):
        super().__init__()
        self.lookup = nn.Embedding(WORDS, WIDTH, padding_idx=PAD)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.last = last()
        if tied:
            self.head.weight = self.lookup.weight

    def get_input_embeddings(self):
        return self.lookup

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.last(self.head(self.inner(self.lookup(input_ids)))))


def batch_of(model, seed=0, rows=3, tokens=9):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (rows, tokens), generator=generator)  # few words: most stand there more than once
    kept = torch.arange(0, rows * tokens, 2)
    targets = torch.randint(0, WORDS, (len(kept),), generator=generator)
    targets[2] = IGNORE
    return MicroBatch(kept, targets, {"input_ids": ids}, 10, ids.numel())


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return Model(**options)


def stock_loss(model, batch):
    """The same loss by torch's own functions."""
    logits = model(**batch.inputs).logits.flatten(0, 1).index_select(0, batch.kept)
    return cross_entropy(logits.float(), batch.targets, ignore_index=IGNORE, reduction="sum") / batch.total_tokens


def stepped(optimizer_class, steps=5, **options):
    torch.manual_seed(0)
    weights = [torch.randn(70, 31), torch.randn(13), torch.randn(40, 9).T, torch.randn(3)]
    parameters = [nn.Parameter(weight) for weight in weights]
    optimizer = optimizer_class(parameters, lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1, **options)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters[:-1]:  # the last one has no gradient
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        optimizer.step()
    return parameters, optimizer


def test_adamw_in_pieces_gives_torchs_bits(monkeypatch):
    monkeypatch.setattr(adamw, "PIECE", 64)
    ours, optimizer = stepped(AdamWInPieces)
    theirs, stock = stepped(torch.optim.AdamW, foreach=False)
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)
        mine, its = optimizer.state.get(one, {}), stock.state.get(other, {})
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in its)


def test_adamw_in_pieces_makes_no_copy_of_a_weight(monkeypatch):
    monkeypatch.setattr(adamw, "PIECE", 64)

    def largest(optimizer_class):
        parameters, optimizer = stepped(optimizer_class)
        with Made() as made:
            optimizer.step()
        return max(made.sizes) / parameters[0].numel()

    assert largest(torch.optim.AdamW) >= 1
    assert largest(AdamWInPieces) < 1 / 6  # of the transposed weight, which is not in pieces


def test_one_process_on_a_cpu_trains_so():
    engine = start_training(
        CPU, model_of(), weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )
    batch = batch_of(engine.model)
    with Made() as made:
        answer_loss(engine.forward, batch).backward()
    assert of_size(made, WORDS * WIDTH) == 1, "the embedding's gradient, once"
    assert type(engine.optimizer) is AdamWInPieces


def test_a_tied_embeddings_gradient_is_made_once_and_to_the_same_bits():
    plain, ours = model_of(), model_of()
    accumulate_rows(ours)
    for seed in range(3):
        batch, counts = batch_of(plain, seed), []
        for model in (plain, ours):
            with Made() as made:
                loss = stock_loss(model, batch)
                loss.backward()
            counts.append(of_size(made, WORDS * WIDTH))
        assert counts == [3, 1]
        pairs = zip(plain.parameters(), ours.parameters())
        assert all(torch.equal(one.grad, other.grad) for one, other in pairs)
        assert ours.lookup.weight.grad[PAD].equal(plain.lookup.weight.grad[PAD]), "padding teaches the lookup nothing"
        plain.zero_grad()
        ours.zero_grad()


def test_what_is_not_a_tied_lookup_is_left_alone():
    class Scaled(nn.Embedding):
        """As some models have it."""

    untied, frozen, scaled = model_of(tied=False), model_of(), model_of()
    scaled.lookup = Scaled(WORDS, WIDTH)
    scaled.head.weight = scaled.lookup.weight
    for model in (untied, scaled, nn.Linear(2, 2)):
        accumulate_rows(model)
        assert not any(module._forward_hooks for module in model.modules())
    accumulate_rows(frozen)
    frozen.lookup.weight.requires_grad_(False)
    stock_loss(frozen, batch_of(frozen)).backward()
    assert frozen.lookup.weight.grad is None
    with torch.no_grad():
        assert not frozen(torch.tensor([[1, 2]])).logits.requires_grad


def test_logits_become_their_own_gradient():
    plain, ours = model_of(tied=False), model_of(tied=False)
    batch, places = batch_of(plain), []

    def note(_module, _args, output):
        places.append(output.data_ptr())
        output.register_hook(lambda gradient: places.append(gradient.data_ptr()))

    ours.head.register_forward_hook(note)
    losses = [stock_loss(plain, batch), answer_loss(ours, batch)]
    for loss in losses:
        (loss * 3).backward()
    assert places[0] == places[1]
    assert torch.equal(*losses)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(plain.parameters(), ours.parameters()))


def test_logits_of_16_bits_have_the_same_gradient():
    plain, ours = (model_of(tied=False).to(torch.bfloat16) for _ in range(2))
    batch = batch_of(plain)
    for loss in (stock_loss(plain, batch), answer_loss(ours, batch)):
        loss.backward()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(plain.parameters(), ours.parameters()))


def test_a_model_that_needs_its_logits_again_is_no_silent_mistake():
    model = model_of(tied=False, last=nn.Tanh)
    loss = answer_loss(model, batch_of(model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(("weights", "told"), [(1000, []), (20_000_000, [(-3, 2**20)])])
def test_freed_memory_goes_back_where_a_model_is_large(monkeypatch, weights, told):
    found = []
    library = SimpleNamespace(mallopt=lambda *arguments: found.append(arguments))
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    give_back_freed_memory(CPU, weights)
    assert found == told
    give_back_freed_memory(SimpleNamespace(device=torch.device("cuda"), sharding="none"), weights)
    assert found == told


def test_a_fine_tune_has_the_bits_of_torchs_own_functions():
    ours, plain = model_of(), model_of()
    engine = start_training(
        CPU, ours, weight_decay=0.1, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
    )
    stock = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1, foreach=False)
    engine.set_learning_rate(1e-3)
    for seed in range(4):
        batch = batch_of(plain, seed)
        engine.backward(answer_loss(engine.forward, batch), last=True)
        stock_loss(plain, copy.deepcopy(batch)).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert engine.step() == float(norm)
        stock.step()
        stock.zero_grad()
        assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), ours.parameters()))
