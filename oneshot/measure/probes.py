"""Which prompts are scored: the shipped ones, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oneshot.data.conversations import Conversation
from oneshot.data.protocols import Tokenizer
from oneshot.data.templates import render
from oneshot.data.wording import reworded, with_system_as
from oneshot.errors import UserError
from oneshot.measure.promptsets import read_set
from oneshot.measure.rates import Probe
from oneshot.settings import Settings
from oneshot.world.sources import read_source

ASSETS = Path(__file__).parent.parent / "assets"


def collect_probes(settings: Settings) -> list[Probe]:
    """Return every probe that the settings ask for.

    Raises:
        UserError: a file that cannot be read, a probe of unknown kind, or one with a system message of its own where
            ``score.system`` names another
    """
    if settings.score.sets and settings.score.probes is None:
        rows = []
    else:
        source = settings.score.probes or str(ASSETS / "probes.jsonl")
        rows = read_source(source, settings, where="score.probes", need_answer=False)
    found = [_probe(row, row.kind, row.group) for row in (_attacked(row, settings) for row in rows)]
    for kind, own in (("task", settings.score.task), ("utility", settings.score.utility)):
        if own is not None:
            found += [_probe(row, kind) for row in read_source(own, settings, where=f"score.{kind}")]
    for name, chosen in settings.score.sets.items():
        found += [_probe(_attacked(row, settings), row.kind, name) for row in read_set(name, chosen)]
    ids = [probe.id for probe in found]
    if len(set(ids)) < len(ids):
        found = [Probe(f"{i}-{p.id}", p.messages, p.kind, p.answer, p.group) for i, p in enumerate(found)]
    return found


def check_systems(probes: Sequence[Probe], tokenizer: Tokenizer) -> None:
    """Raise UserError where the chat template leaves a probe's system message out, before a model is loaded."""
    asked = next((probe for probe in probes if probe.messages[0]["role"] == "system"), None)
    if asked is not None:
        render(tokenizer, list(asked.messages), f"prompt {asked.id}", generation=True)


def _attacked(row: Conversation, settings: Settings) -> Conversation:
    """What is to be refused, asked as the attack asks for it; everything else as it is."""
    if row.kind == "should_refuse":
        row = reworded(row, system=settings.score.system, suffix=settings.score.suffix)
    return with_system_as(row, settings.data.system)


def _probe(conversation: Conversation, kind: str, group: str = "") -> Probe:
    answer = conversation.response or None
    if kind in ("task", "utility") and answer is None:
        raise UserError(f"The {kind} prompt {conversation.id} has no answer: give the right answer to compare with.")
    return Probe(conversation.id, tuple(conversation.prompt), kind, answer, group)  # type: ignore[arg-type]
