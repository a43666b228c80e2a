"""Answers of the model to score, in process or from a server; what is on disk already is not asked again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from oneshot.checkpoint.disk.files import ADAPTER_CONFIG, ADAPTER_TENSORS
from oneshot.checkpoint.loading.load import Source
from oneshot.checkpoint.reads.digests import shared_fingerprint
from oneshot.checkpoint.writing.standing import beside
from oneshot.data.conversations import Messages
from oneshot.data.protocols import CausalLM, Tokenizer
from oneshot.distributed.phases import phase
from oneshot.distributed.runtime import Runtime, gather_objects
from oneshot.distributed.steps import steps
from oneshot.errors import UserError
from oneshot.measure.cache import RESPONSES, Responses, response_key
from oneshot.measure.endpoint import Endpoint, ask
from oneshot.measure.generate import generate_answers
from oneshot.measure.rates import Probe, most_tokens
from oneshot.reading import digest_of
from oneshot.redact import redacted
from oneshot.settings import ScoreSettings

BATCHES_AT_A_TIME = 4  # batches of each rank between two writes: what a run that dies loses at most

Finish = Callable[[int, str], None]


def checkpoint_target(runtime: Runtime, source: Source) -> str:
    """Return what tells a checkpoint (plus adapter) from others, as far as its answers go. Collective."""
    adapter = ""
    if source.adapter is not None:
        files = [source.adapter / ADAPTER_CONFIG, source.adapter / ADAPTER_TENSORS]
        adapter = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    four_bit = "nf4" if source.four_bit else ""
    told = {folder: beside(folder) for folder in (source.checkpoint, source.tokenizer)}
    around = digest_of({str(i): found for i, found in enumerate(told.values())})
    return "|".join([shared_fingerprint(runtime, source.checkpoint), adapter, str(source.dtype), four_bit, around])


def endpoint_target(endpoint: Endpoint, thought_tokens: int) -> str:
    """Return what tells the model on a server from others, and how much of its answers may be thought: what does not
    think gets none of that.
    """
    return f"{endpoint.url}|{endpoint.model}" + (f"|{thought_tokens} for a thought" if thought_tokens else "")


def collect_answers(
    runtime: Runtime,
    run_dir: Path,
    target: str,
    probes: Sequence[Probe],
    max_new_tokens: int,
    answer: Callable[[list[Messages], Finish], None],
) -> list[str | None]:
    """Return one answer per probe: those kept in the run folder, and ``answer`` called for the rest. Collective.

    Args:
        target: which model it is, see ``checkpoint_target`` and ``endpoint_target``
        answer: (prompts, finish); calls finish(index, answer) on every rank alike, or raises; called on every rank with
            the same prompts, and not at all where none is missing. What it leaves out has none as its answer
    """
    keys = [response_key(target, probe.messages, max_new_tokens) for probe in probes]
    responses = Responses(run_dir) if runtime.is_main else None
    kept = {key: responses.known[key] for key in keys if key in responses.known} if responses else {}
    found = gather_objects(runtime, kept)[0]
    missing = {key: list(probe.messages) for key, probe in zip(keys, probes) if key not in found}
    names = list(missing)

    def finish(index: int, text: str) -> None:
        text = redacted(text)  # here, so that what is judged is what is kept
        found[names[index]] = text
        if responses is not None:
            responses.put(names[index], text)

    if missing:
        with phase("generate"), steps("answers", len(names), "prompts"):
            answer([missing[name] for name in names], finish)
    return [found.get(key) for key in keys]


def generate_missing(
    model: CausalLM, tokenizer: Tokenizer, runtime: Runtime, score: ScoreSettings
) -> Callable[[list[Messages], Finish], None]:
    """Return what lets a model in this process answer, a few batches at a time. Collective."""

    def answer(prompts: list[Messages], finish: Finish) -> None:
        for part in _parts(prompts, BATCHES_AT_A_TIME * score.batch_size * runtime.world_size):
            answers = generate_answers(
                model,
                tokenizer,
                [prompts[index] for index in part],
                runtime,
                max_new_tokens=most_tokens(tokenizer, score),
                batch_size=score.batch_size,
            )
            for index, text in zip(part, answers):
                finish(index, text)

    return answer


def ask_missing(endpoint: Endpoint, run_dir: Path, score: ScoreSettings) -> Callable[[list[Messages], Finish], None]:
    """Return what lets a server answer.

    The returned function raises UserError where some prompts stay without an answer, those that the server rejects
    apart where ``leave_out_rejected`` says so; the others' answers are kept.
    """

    def answer(prompts: list[Messages], finish: Finish) -> None:
        failed = ask(
            endpoint, prompts, finish, max_new_tokens=score.max_new_tokens, thought_tokens=score.thought_tokens
        )
        if endpoint.settings.leave_out_rejected:
            failed = [one for one in failed if not one.rejected]
        if failed:
            hint = ", or leave such prompts out with --score.endpoint.leave_out_rejected true"
            said = f"{failed[0].reason}: run again with --resume --out {run_dir}"
            if (run_dir / RESPONSES).is_file():
                said = (
                    f"{failed[0].reason}. The other answers are kept in {run_dir / RESPONSES}: run again with --resume "
                    f"--out {run_dir}, which asks for the rest only"
                )
            raise UserError(
                f"{endpoint.url} left {len(failed)} of {len(prompts)} prompts unanswered, the first one with: "
                f"{said}{hint if failed[0].rejected else ''}."
            )

    return answer


def _parts(prompts: Sequence[Messages], size: int) -> Iterator[list[int]]:
    """Indices in parts, prompts of similar lengths together, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: sum(len(message["content"]) for message in prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
