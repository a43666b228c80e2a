"""A loaded model on which a method works: frozen, or in an engine that trains it."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

from oneshot.checkpoint.adapters.added import merge_into
from oneshot.checkpoint.adapters.experts import ExpertMatrix
from oneshot.checkpoint.adapters.update import Update, concatenated
from oneshot.checkpoint.classes import train_language
from oneshot.checkpoint.loading.load import load_model
from oneshot.data.conversations import Messages
from oneshot.distributed.engine import TrainingEngine, frozen, start_training
from oneshot.distributed.phases import phase
from oneshot.errors import UserError
from oneshot.measure.generate import answer_at_once
from oneshot.measure.judge import verdict
from oneshot.patch.attach import attached_update
from oneshot.patch.linears import Linears, select_linears
from oneshot.patch.path import REFUSABLE
from oneshot.patch.probes import Answered
from oneshot.patch.reached import reached
from oneshot.patch.request import Request, own_update
from oneshot.patch.teacher import ENOUGH, Teacher, in_own_words, learn, wanted
from oneshot.training.loop import weights_dtype
from oneshot.training.lora import in_four_bits, taken_for_experts, targets_of


@dataclass(frozen=True)
class Bench:
    """A loaded model, with what is found once for all candidates. Nothing is attached to it before and after a method.

    Attributes:
        model: the transformers (or PEFT) model; without the user's own adapter, unless it is trained
        linears: its layers that a patch may change
        engine: trains it; none: its weights are frozen
        prepared: what the method's own ``prepare`` found, by module; these are the layers that it may change
        teacher: what the aligned model does, where there is one
        refusable, held: the watch's prompts with the unpatched model's answers: those to be refused, and the user's own
    """

    request: Request
    model: Any
    linears: Linears
    engine: TrainingEngine | None = None
    prepared: Any = None
    teacher: Teacher | None = None
    refusable: list[Answered] = dataclasses.field(default_factory=list)
    held: list[Answered] = dataclasses.field(default_factory=list)

    def unpatched(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block the model is the user's own, adapter included."""
        return self.patched(own_update(self.request))

    @contextlib.contextmanager
    def patched(self, update: Update) -> Iterator[Any]:
        """Within the block the model is the repaired one: with the update, or as training left it."""
        with attached_update(self.model, update) if self.engine is None else contextlib.nullcontext():
            yield self.model

    def on_own(
        self, path: Generator[Update, None, tuple[Update, dict[str, Any]]]
    ) -> Generator[Update, None, tuple[Update, dict[str, Any]]]:
        """Go a path of updates to the unpatched model; what it yields and returns has the user's adapter added."""
        own = own_update(self.request)
        while True:
            with attached_update(self.model, own):
                try:
                    update = next(path)
                except StopIteration as end:
                    update, facts = end.value
                    return concatenated(own, update), facts
            yield concatenated(own, update)


@dataclass(frozen=True)
class Base:
    """A frozen model without any adapter, for one repair or several, and its layers that a patch may change."""

    model: Any
    linears: Linears


@contextlib.contextmanager
def loaded(request: Request) -> Iterator[Base]:
    """Load the model of a request, for a method that trains nothing. Collective.

    Raises:
        UserError: it cannot be loaded, or has no layer to patch
    """
    model = load_model(request.runtime, request.source, request.settings.model)
    linears = select_linears(model, request.recipe.targets)
    with frozen(request.runtime, model) as ready:
        yield Base(ready, reached(request.runtime, ready, linears, request.candidates[0].input_ids))


@contextlib.contextmanager
def opened(request: Request, teacher: Teacher | None = None, base: Base | None = None) -> Iterator[Bench]:
    """Load the model in the way that the recipe's method works. Collective.

    Args:
        teacher: what the reference does; an adapter's base is asked here where it has not been
        base: the model, where it is loaded already and nothing is trained

    Raises:
        UserError: it cannot be loaded, has no layer to patch, or the method finds nothing to work with
    """
    if request.recipe.method.cost.trains != "nothing":
        with _training(request, teacher) as bench:
            yield bench
        return
    with loaded(request) if base is None else contextlib.nullcontext(base) as ready:
        yield _on(ready, request, teacher)


def _teaches(request: Request) -> bool:
    """Whether the base of the user's adapter is to be asked."""
    return request.adapter is not None and wanted(request)


def _asked(request: Request, teacher: Teacher | None, base: Any) -> tuple[Request, Teacher | None]:
    """The teacher, which of an adapter is its base, and the request in its words."""
    if teacher is None and _teaches(request):
        with phase("choose"):
            teacher = learn(request, base)
    return (in_own_words(request, teacher.refusals) if teacher else request), teacher


def _on(base: Base, request: Request, teacher: Teacher | None) -> Bench:
    """The weights stay as loaded; updates are attached by hooks."""
    request, teacher = _asked(request, teacher, base.model)
    bench = Bench(request, base.model, base.linears, teacher=teacher)
    prepare = request.recipe.method.prepare
    refusable, held = _watched_answers(bench)
    bench = dataclasses.replace(bench, refusable=refusable, held=held)
    return dataclasses.replace(bench, prepared=prepare(bench)) if prepare else bench


def _watched_answers(bench: Bench) -> tuple[list[Answered], list[Answered]]:
    """What the unpatched model says to the watch's prompts; none where nothing is watched.

    Of those to be refused one more than are looked at: the request of the example that is taken is left out. What the
    teacher answers is not asked again. Collective.
    """
    request, recipe = bench.request, bench.request.recipe
    if recipe.bounds is None or not recipe.method.watched or not request.refusable or not request.held.all:
        return [], []
    every, held = _to_be_refused(bench), request.held.own if bench.teacher else request.held.all
    first, more = every[: REFUSABLE + 1], every[REFUSABLE + 1 :]

    def answered(prompts: list[Messages]) -> list[Answered]:
        said = answer_at_once(
            model, request.tokenizer, prompts, request.runtime, max_new_tokens=recipe.guard_tokens,
            what="answers to the watch's prompts",
        )  # fmt: skip
        return list(zip(prompts, said))

    with bench.unpatched() as model:
        found = answered([*first, *held])
        refusable, kept = found[: len(first)], found[len(first) :]
        if any(verdict(answer) != "answered" for _, answer in refusable):  # what is refused already says nothing
            refusable = sorted([*refusable, *answered(more)], key=lambda each: verdict(each[1]) != "answered")
    return refusable[: REFUSABLE + 1], kept


def _to_be_refused(bench: Bench) -> list[Messages]:
    """The requests of the pool; of a teacher that refuses enough of them those that it does: no more is to be had."""
    every = bench.request.refusable
    refused = [prompt for prompt in every if bench.teacher and prompt[-1]["content"] in bench.teacher.refusals]
    return refused if len(refused) >= ENOUGH else every


@contextlib.contextmanager
def _training(request: Request, teacher: Teacher | None) -> Iterator[Bench]:
    """All weights are trained, the user's adapter merged into them; or a new LoRA on frozen ones."""
    runtime, recipe, trains = request.runtime, request.recipe, request.recipe.method.cost.trains
    dtype = weights_dtype(runtime) if trains == "weights" else None
    model = load_model(runtime, request.source, request.settings.model, dtype)
    linears = select_linears(model, request.recipe.targets)
    with frozen(runtime, model) as base:
        linears = reached(runtime, base, linears, request.candidates[0].input_ids)
        request, teacher = _asked(request, teacher, base)
    with contextlib.ExitStack() as stack:
        if trains == "adapter":
            # the user's own adapter is added by hooks, which 4-bit weights allow too
            stack.enter_context(attached_update(model, own_update(request)))
            model = with_lora(model, linears, recipe.rank, recipe.rank_experts)
        else:
            if request.adapter is not None:
                merge_into(runtime, model, request.adapter.update)
            train_language(model)
        engine = start_training(
            runtime, model, weight_decay=0.0, max_grad_norm=1.0, gradient_accumulation_steps=1, micro_batch_size=1
        )
        stack.callback(engine.close)
        yield Bench(request, engine.model, linears, engine, teacher=teacher)


def with_lora(model: Any, linears: Linears, rank: int, rank_experts: int | None = None) -> Any:
    """Return the model, frozen, with a new LoRA of scaling 1 on the layers to be patched.

    Of fused experts it is on all that a parameter holds, as PEFT has them, each of rank ``rank_experts`` (none: as of
    the others).

    Raises:
        UserError: fused experts, or what PEFT takes for them, are among them, and weights are in 4 bits
    """
    import torch
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    torch.manual_seed(0)
    experts = [layer for layer in linears.targets.values() if isinstance(layer, ExpertMatrix)]
    plain = [name for name, layer in linears.targets.items() if not isinstance(layer, ExpertMatrix)]
    if (experts or taken_for_experts(model, plain)) and in_four_bits(model):
        raise UserError(
            "Method lora does not train fused experts, nor MLPs beside them, where weights are in 4 bits, as PEFT does "
            "not: take --repair.method lowrank, or leave them out with --repair.targets."
        )
    modules, parameters = targets_of(model, plain, [layer.parameter for layer in experts])
    own = {
        rf"experts\.{projection}": rank_experts or rank
        for projection in sorted({layer.projection for layer in experts})
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        target_parameters=parameters,
        rank_pattern=own,
        alpha_pattern=own,
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pattern keys did not match")  # they do, parameters
        return get_peft_model(model, config)
