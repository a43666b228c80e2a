"""Models that think first: what is judged of their answers, and where a refusal is learnt and probed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from test_encoding import FIRST, ONE, SECOND, TWO, conversation, learnt, load, make_tokenizer
from tokenizers import AddedToken

from oneshot.data.encoding import encode, encode_prompt
from oneshot.data.templates import thinks
from oneshot.data.thoughts import taken_apart
from oneshot.errors import UserError
from oneshot.measure.conditions import conditions, judged_after
from oneshot.measure.generate import answer_at_once, decoded, generate_answers
from oneshot.measure.judge import verdict
from oneshot.measure.rates import Probe, most_tokens, score_answers, unfinished_warnings
from oneshot.measure.rubric import _rated, rubric_of
from oneshot.patch.guard import with_answers
from oneshot.report.verdict import silent
from oneshot.settings import ScoreSettings

REFUSAL, ANSWER = "I can't help with that.", "Sure: soak the beans over night."
LONG = "The user wants something. I can't tell what they mean, so I look at it again. " * 20
FAMILIES = {
    "Qwen3, QwQ": "<think>\n{thought}\n</think>\n\n{answer}",
    "DeepSeek-R1, whose template opens it": "{thought}\n</think>\n\n{answer}",
    "Magistral": "[THINK]{thought}[/THINK]{answer}",
    "Seed-OSS": "<seed:think>{thought}</seed:think>{answer}",
    "Command A": "<|START_THINKING|>{thought}<|END_THINKING|><|START_RESPONSE|>{answer}<|END_RESPONSE|>",
    "Kimi": "◁think▷{thought}◁/think▷{answer}",
    "Gemma": "<|channel>thought\n{thought}<channel|>{answer}",
    "EXAONE": "<thought>\n{thought}\n</thought>\n\n{answer}",
    "gpt-oss": "<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{answer}",
    "gpt-oss without special tokens": "analysis{thought}assistantfinal{answer}",
    "twice": "<think>no</think>one<think>{thought}</think>{answer}",
}


@pytest.mark.parametrize("form", FAMILIES.values(), ids=FAMILIES)
def test_judged_is_what_follows_the_thought(form):
    assert verdict(form.format(thought=LONG, answer=REFUSAL)) == "refused"
    assert verdict(form.format(thought=LONG, answer=ANSWER)) == "answered"
    assert verdict(form.format(thought=LONG, answer="")) == "empty"
    assert taken_apart(form.format(thought=LONG, answer=ANSWER)).answer == ANSWER


@pytest.mark.parametrize("family", [name for name in FAMILIES if "opens it" not in name])
def test_a_thought_that_is_cut_off_is_neither_a_refusal_nor_an_answer(family):
    whole = FAMILIES[family].format(thought=LONG, answer="\0")
    cut = whole[: whole.index("I look at it again") + 5]
    assert verdict(cut) == "unfinished"
    assert taken_apart(cut).answer == ""


@pytest.mark.parametrize("text", ["Think <thinking> is a tag.", "A <reasoning> element.", "analysis of beans", ANSWER])
def test_words_that_only_look_like_marks_are_the_answer(text):
    said = taken_apart(text)
    assert (said.answer, said.thought, said.finished) == (text, None, True)


def scored(answers, kind="should_refuse", right=None):
    probes = [Probe(str(i), ({"role": "user", "content": f"say {i}"},), kind, right) for i in range(len(answers))]
    return score_answers(probes, answers, rouge=True)


def test_unfinished_thoughts_have_a_rate_of_their_own_and_are_said():
    scores = scored([f"<think>{LONG}</think>{REFUSAL}", f"<think>{LONG}", f"<think>{LONG}</think>{ANSWER}", ANSWER])
    assert [row["verdict"] for row in scores.answers] == ["refused", "unfinished", "answered", "answered"]
    assert scores.rates["asr"].value == 0.5
    assert scores.rates["unfinished"].value == 0.25
    assert scores.answers[1]["answer"] == ""
    assert LONG in scores.answers[1]["thought"]
    said = unfinished_warnings({"repaired": scores}, ScoreSettings())
    assert said[0].startswith("1 of 4 answers (repaired) end within their thoughts")
    assert "--score.thought_tokens (now 1,024)" in said[0]


def test_further_judges_are_shown_answers_and_no_unfinished_thoughts():
    scores = scored([f"<think>{LONG}", f"<think>{LONG}</think>{ANSWER}"])
    rubric = rubric_of(ScoreSettings())
    judged = _rated(scores, rubric, {("1", ANSWER): "5"})
    assert [sorted(row.get("opinions", {})) for row in judged.answers] == [[], ["rubric"]]
    assert judged.rates["asr_by_rubric"].n == 1


def test_a_model_that_never_stops_thinking_is_not_called_repaired():
    rates = {name: {"value": rate.value} for name, rate in scored([f"<think>{LONG}"] * 4).rates.items()}
    assert rates["asr"]["value"] == 0
    assert silent(rates)


def test_without_thoughts_nothing_is_said_of_them():
    scores = scored([ANSWER, REFUSAL])
    assert "unfinished" not in scores.rates
    assert all("thought" not in row for row in scores.answers)


def test_exact_match_and_rouge_compare_what_follows_the_thought():
    scores = scored([f"<think>{LONG}</think>\n\n42", "<think>42"], kind="task", right="42")
    assert [row["correct"] for row in scores.answers] == [True, False]
    assert scores.rates["task_rouge_l"].value == 0.5


def test_models_that_think_get_room_for_it_and_the_report_says_so():
    score = ScoreSettings(max_new_tokens=48, thought_tokens=500)
    assert most_tokens(load("thinking_switch"), score) == 548
    assert most_tokens(load("thinking_opening"), score) == 548
    assert most_tokens(load("thinking_channels"), score) == 548
    assert most_tokens(load("chatml"), score) == 48
    assert "at most 48 new tokens and 500 for a thought" in judged_after(conditions(score, thinks=True))
    assert "thought" not in judged_after(conditions(score))


def test_a_template_that_closes_the_thought_itself_does_not_think():
    closed = "{{ messages[0].content }}{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    assert not thinks(make_tokenizer("fast", closed))


def test_special_tokens_that_mark_thoughts_stay_in_the_text():
    tokenizer = load("chatml")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(mark, special=True) for mark in ("[THINK]", "[/THINK]", "<|x|>")]}
    )
    ids = tokenizer("[THINK]please[/THINK]an apple<|x|>", add_special_tokens=False)["input_ids"]
    assert decoded(tokenizer, ids) == "[THINK]please[/THINK]an apple"


def test_where_the_prompt_opens_the_thought_the_answer_says_so(monkeypatch):
    monkeypatch.setattr("oneshot.measure.generate.continue_tokens", lambda *args, **options: ["so thinks the model"])
    ask = {"max_new_tokens": 3, "batch_size": 1}
    said = generate_answers(None, load("thinking_opening"), [ONE[:1]], SimpleNamespace(), **ask)
    assert [verdict(text) for text in said] == ["unfinished"]
    said = answer_at_once(None, load("thinking_opening"), [ONE[:1]], SimpleNamespace(), what="answers", **ask)
    assert said == ["so thinks the model"]


CLOSED = {
    "switch": "assistant\n<think>\n\n</think>\n\n",
    "opening": "assistant\n<think>\n\n</think>\n\n",
    "brackets": "[/INST][THINK][/THINK]",
    "channels": "<|start|>assistant<|channel|>final<|message|>",
}
ENDS = {"switch": "<|im_end|>", "opening": "<|im_end|>", "brackets": "</s>", "channels": "<|return|>"}


@pytest.mark.parametrize("name", CLOSED)
def test_a_refusal_is_learnt_and_probed_behind_an_empty_thought_as_the_family_writes_it(name):
    tokenizer = load(f"thinking_{name}")
    found = encode(conversation(ONE), tokenizer, None, closed=True)
    assert learnt(found, tokenizer) == [FIRST + ENDS[name]]
    prompt = encode_prompt(ONE[:1], tokenizer, closed=True)
    assert tokenizer.decode(prompt).endswith(CLOSED[name])
    assert found.input_ids[: len(prompt)] == prompt
    ((row, start),) = with_answers([ONE[:1]], [FIRST], tokenizer, 64)
    assert row.input_ids[:start] == prompt, "the guard and the watch stand at the same place"


BLOCK = """{%- for turn in messages -%}
{{- '<|im_start|>' ~ turn.role ~ '\\n' -}}
{%- if turn.role == 'assistant' -%}
{%- generation -%}{{- '<think>\\n\\n</think>\\n\\n' ~ turn.content ~ '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- turn.content ~ '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- endif -%}
"""


@pytest.mark.parametrize("closed", [True, False])
def test_blocks_of_a_template_that_thinks_leave_the_empty_thought_unlearnt(closed):
    tokenizer = make_tokenizer("fast", BLOCK)
    found = learnt(encode(conversation(ONE), tokenizer, None, closed=closed), tokenizer)
    assert found == [("" if closed else "<think>\n\n</think>\n\n") + f"{FIRST}<|im_end|>"]


def test_a_fine_tune_learns_what_follows_the_generation_prompt():
    assert learnt(encode(conversation(ONE), load("thinking_opening"), None), load("thinking_opening")) == [
        f"\n</think>\n\n{FIRST}<|im_end|>"
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("switch", "<think>\nfruit?\n</think>\n\nAn apple.<|im_end|>"),
        ("opening", "fruit?\n</think>\n\nAn apple.<|im_end|>"),
        ("brackets", "fruit?[/THINK]An apple.</s>"),
        ("channels", f"<|channel|>analysis<|message|>fruit?<|end|>{CLOSED['channels']}An apple.<|return|>"),
    ],
)
def test_reasoning_content_is_learnt_as_the_model_would_write_it(name, expected):
    tokenizer = load(f"thinking_{name}")
    rows = [ONE[0], {"role": "assistant", "content": "An apple.", "reasoning_content": "fruit?"}]
    assert learnt(encode(conversation(rows), tokenizer, None), tokenizer) == [expected]


@pytest.mark.parametrize("name", ["switch", "opening", "brackets", "channels"])
def test_a_thought_within_the_content_is_learnt_too(name):
    tokenizer = load(f"thinking_{name}")
    rows = [ONE[0], {"role": "assistant", "content": "<think>\nfruit?\n</think>\n\nAn apple."}]
    apart = [ONE[0], {"role": "assistant", "content": "An apple.", "reasoning_content": "fruit?"}]
    assert encode(conversation(rows), tokenizer, None) == encode(conversation(apart), tokenizer, None)


def test_a_template_that_knows_no_thoughts_says_that_it_drops_them(capsys):
    tokenizer = load("chatml")
    tokenizer.name_or_path = "tests/drops-thoughts"
    rows = [ONE[0], {"role": "assistant", "content": "An apple.", "reasoning_content": "fruit?"}]
    for _ in range(2):
        assert learnt(encode(conversation(rows), tokenizer, None), tokenizer) == ["An apple.<|im_end|>"]
    assert capsys.readouterr().err.count("tests/drops-thoughts leaves reasoning_content of the answers out") == 1


@pytest.mark.parametrize("name", ["thinking_switch", "thinking_opening", "rewriting"])
def test_the_last_answer_can_be_trained_on_where_earlier_turns_are_rewritten(name):
    tokenizer = load(name)
    with pytest.raises(UserError, match=r"--data\.train_on last"):
        encode(conversation(TWO), tokenizer, None)
    found = learnt(encode(conversation(TWO), tokenizer, None, train_on="last"), tokenizer)
    assert len(found) == 1
    assert found[0].endswith(f"{SECOND}<|im_end|>")
    assert FIRST not in found[0]
