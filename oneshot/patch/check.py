"""The first step of a repair: from settings to a request. What can be wrong is found before a model is loaded."""

from __future__ import annotations

from typing import Any

from oneshot.checkpoint.disk.files import list_tensors, resolve
from oneshot.checkpoint.loading.around import users_adapter
from oneshot.checkpoint.loading.configs import read_config
from oneshot.checkpoint.loading.load import find_source, load_tokenizer
from oneshot.checkpoint.loading.reference import check_reference
from oneshot.checkpoint.names import CONFIG
from oneshot.checkpoint.quantized.dequantize import packed_weights
from oneshot.data.conversations import Messages
from oneshot.data.encoding import context_length, encode
from oneshot.data.vocabulary import check_for_reference, check_tokens, rendered
from oneshot.distributed.runtime import Runtime, agree
from oneshot.errors import UserError
from oneshot.measure.further import check_judges
from oneshot.measure.probes import check_systems, collect_probes
from oneshot.patch.examples import Prompts, check_apart, read_candidates, read_guard, read_held, read_refusable
from oneshot.patch.given import check_given
from oneshot.patch.objective import check_same_tokens
from oneshot.patch.recipe import recipe_for
from oneshot.patch.request import Request
from oneshot.settings import Settings
from oneshot.world.sources import check_words


def check(settings: Settings, runtime: Runtime) -> Request:
    """Read and check everything that can be wrong before a model is loaded or a file is written. Collective.

    Raises:
        UserError: a checkpoint, reference, file, prompt, judge or method that cannot be used
    """
    source = find_source(settings.model, runtime)
    adapter = users_adapter(source, trust_remote_code=settings.model.trust_remote_code)
    reference = None
    if settings.reference:
        reference = resolve(settings.reference, "reference", revision=settings.reference_revision)
    if reference is not None and adapter is None:
        check_reference(source.checkpoint, reference, trust_remote_code=settings.model.trust_remote_code)
    tokenizer = load_tokenizer(source, settings.model)
    check_words(settings, tokenizer)
    config = read_config(source.checkpoint, trust_remote_code=settings.model.trust_remote_code)
    length = context_length(config, tokenizer, settings.model.max_length)
    check_judges(runtime, settings.score)
    probes, conversations = collect_probes(settings), read_candidates(settings)
    check_systems(probes, tokenizer)
    check_apart(conversations, probes)
    recipe = recipe_for(settings.repair, has_update=bool(adapter or reference), four_bit=source.four_bit)
    if adapter is not None and recipe.method.keeps_adapter:
        with agree(runtime, "looking whether PEFT loads the adapter"):
            if runtime.is_main:
                check_given(source, adapter, trust_remote_code=settings.model.trust_remote_code)
    if settings.repair.merge and not recipe.method.changes_all:
        packed_weights(source.checkpoint, list_tensors(source.checkpoint))  # what cannot be merged into is found now
    wants_guard = recipe.guard_weight or (settings.select == "bilevel" and len(conversations) > 1)
    guard = read_guard(settings, recipe.guard_prompts) if wants_guard else Prompts([], [])
    train_on = settings.data.train_on
    candidates = [encode(row, tokenizer, length, train_on=train_on, closed=True) for row in conversations]
    held = read_held(settings, guard) if recipe.bounds else Prompts([], [])
    refusable = read_refusable(settings) if recipe.bounds or reference or adapter else []
    own = _within(tokenizer, length, guard=guard.own, watch=held.own)
    asked = [row.input_ids for row in candidates]
    asked += _within(tokenizer, length, guard=guard.general, watch=[*refusable, *held.general])
    scored = list(rendered(tokenizer, [probe.messages for probe in probes]))
    check_tokens(config, tokenizer, [*asked, *scored, *own])
    if reference is not None and adapter is None:
        if (reference / CONFIG).is_file():
            theirs = read_config(reference, trust_remote_code=settings.model.trust_remote_code)
            check_for_reference(theirs, tokenizer, asked + (scored if settings.score.reference else []), reference)
        check_same_tokens(candidates, tokenizer, reference)
    return Request(
        runtime=runtime,
        settings=settings,
        recipe=recipe,
        source=source,
        tokenizer=tokenizer,
        adapter=adapter,
        reference=reference,
        length=length,
        conversations=conversations,
        candidates=candidates,
        guard=guard,
        refusable=refusable,
        held=held,
        probes=probes,
    )


def _within(tokenizer: Any, length: int, **prompts: list[Messages]) -> list[list[int]]:
    """Return the token ids of prompts, which are given by what they are of.

    Raises:
        UserError: one fills the context, so that nothing can be said to it
    """
    found = list[list[int]]()
    for name, each in prompts.items():
        for messages, ids in zip(each, rendered(tokenizer, each)):
            if len(ids) >= length:
                begun = messages[-1]["content"][:40]
                raise UserError(
                    f"A prompt of the {name}, {begun!r}..., has {len(ids)} tokens, the limit is {length}: shorten it, "
                    "leave it out or raise model.max_length."
                )
            found.append(ids)
    return found
