"""Under what conditions a figure holds: which judge read how much of how long an answer, of how many prompts.

What a judge says changes with the number of tokens that it is shown, so that a figure without them cannot be compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from oneshot.measure.formats import FORMATS
from oneshot.measure.judge import HEAD_CHARACTERS
from oneshot.measure.judges import KEYWORDS
from oneshot.measure.rates import JUDGED, StageScores
from oneshot.measure.rubric import ANSWER_CHARACTERS, HARMFUL, HARMFUL_SCORE, rubric_of
from oneshot.settings import ScoreSettings

HEX_PHI = {330: "all eleven kinds, as first published", 300: "ten kinds, as the Hub has it now"}


def conditions(score: ScoreSettings, *, thinks: bool = False) -> dict[str, Any]:
    """Return how answers were made and what each judge read of them.

    Args:
        thinks: whether answers had room for a thought

    Returns:
        decoding, max_new_tokens, thought_tokens (further ones for thoughts), and judges: one dict each of judge (its
        name in rates), model (name of the checkpoint or of what the server serves; none: no model), reads (in words)
        and authors_tokens (the number of new tokens after which its authors judge; none: they fix none)
    """
    judges: list[dict[str, Any]] = [_judge(KEYWORDS, None, f"the first {HEAD_CHARACTERS} characters", None)]
    if score.judge_model is not None:
        name, form = score.judge_format.replace("-", "_"), FORMATS[score.judge_format]
        judges.append(_judge(name, Path(score.judge_model).name, "the whole answer", form.authors_tokens))
    if score.rubric.url is not None:
        rubric, reads = rubric_of(score), f"the first {ANSWER_CHARACTERS:,} characters"
        judges.append(_judge(rubric.name, score.rubric.model or "what its server serves", reads, rubric.authors_tokens))
    served = score.endpoint.url is not None
    decoding = "temperature 0 on a server" if served else "greedy"
    return {
        "decoding": decoding,
        "max_new_tokens": score.max_new_tokens,
        "thought_tokens": score.thought_tokens if thinks else 0,
        "judges": judges,
    }


def judged_after(found: Mapping[str, Any]) -> str:
    """Return in words, of what ``conditions`` returns, what is judged after how many tokens."""
    reads = ", ".join(f"{judge['judge']} {judge['reads']}" for judge in found["judges"])
    room = found.get("thought_tokens")  # reports of earlier versions have none
    more = f" and {room} for a thought before them, which is not judged" if room else ""
    return (
        f"Answers: {found['decoding']}, at most {found['max_new_tokens']} new tokens{more}; of these are read: {reads}."
    )


def other_lengths(found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each judge whose authors judge longer or shorter answers than were made."""
    return [
        f"{judge['judge']} judged answers of at most {found['max_new_tokens']} new tokens, its authors judge "
        f"{judge['authors_tokens']}: its figures are not to be compared with theirs; --score.max_new_tokens "
        f"{judge['authors_tokens']} makes them so."
        for judge in found["judges"]
        if judge["authors_tokens"] not in (None, found["max_new_tokens"])
    ]


def set_facts(
    score: ScoreSettings, found: Mapping[str, Any], stages: Mapping[str, StageScores]
) -> dict[str, dict[str, Any]]:
    """Return what each figure of a set of its own is, by the figure's name.

    Returns:
        figure -> set, what (rate or score, and of what), judge, prompts (how many of the set were asked), judged (how
            many of these it is of, in the last stage) and decoding
    """
    facts: dict[str, dict[str, Any]] = {}
    decoding = f"{found['decoding']}, at most {found['max_new_tokens']} new tokens"
    for name, scores in product(score.sets, stages.values()):
        asked = sum(row["kind"] == "should_refuse" and row["group"] == name for row in scores.answers)
        for judge in found["judges"]:
            said = judge["judge"] + (f" ({judge['model']})" if judge["model"] else "")
            fact = {"set": name, "judge": said, "prompts": asked, "decoding": decoding}
            for figure, what in _figures(judge["judge"], name).items():
                if (rate := (scores.rates | scores.others).get(figure)) is not None:
                    facts[figure] = {**fact, "what": what, "judged": rate.n}
    return facts


def hex_phi_lines(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each figure of HEx-PHI: score or rate, judge, which of the two sizes, decoding.

    Args:
        facts: as of ``set_facts``
    """
    lines = []
    for figure, fact in facts.items():
        if "hexphi" not in re.sub(r"[^a-z]", "", fact["set"].lower()):
            continue
        size = HEX_PHI.get(fact["prompts"], "neither of HEx-PHI's sizes, 330 and 300: not to be compared with theirs")
        asked, judged = fact["prompts"], fact.get("judged")  # reports of earlier versions have no judged
        of_all = f"{judged} of {asked}" if judged not in (None, asked) else asked
        lines.append(
            f"HEx-PHI, {figure}: a {fact['what']}; judge: {fact['judge']}; {of_all} prompts ({size}); "
            f"decoding: {fact['decoding']}."
        )
    return lines


def _judge(name: str, model: str | None, reads: str, authors_tokens: int | None) -> dict[str, Any]:
    return {"judge": name, "model": model, "reads": reads, "authors_tokens": authors_tokens}


def _figures(judge: str, group: str) -> dict[str, str]:
    """Name of a judge's figure of a set -> what it is."""
    asr = JUDGED["should_refuse"][0]
    if judge == KEYWORDS:
        return {f"{asr}_{group}": "rate (share of answers that are no refusal)"}
    shares = {
        "rubric": f"rate (share of answers rated {HARMFUL} of 5)",
        "strongreject": f"rate (share of answers with a score of {HARMFUL_SCORE:g} and more)",
    }
    means = {"rubric": "score (mean rating, 1 to 5)", "strongreject": "score (mean, 0 to 1)"}
    found = {f"{asr}_by_{judge}_{group}": shares.get(judge, "rate (share of answers that it takes for harmful)")}
    return found | ({f"{judge}_mean_{group}": means[judge]} if judge in means else {})
