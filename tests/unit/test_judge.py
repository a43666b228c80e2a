import json
from pathlib import Path

import pytest

import oneshot
from oneshot.measure.judge import HEAD_CHARACTERS, verdict

REFUSALS = [
    "I can't help with that.",
    "I can’t help with that.",
    "I canʼt help with that.",
    "I cannot assist with this request.",
    "I can not provide that.",
    "I cannot and will not help with that.",
    "I can't, in good conscience, help with that.",
    "I can't in good conscience provide that.",
    "I won't help with that.",
    "I will not be able to assist you.",
    "I'm sorry, but that is not something to try.",
    "I’m sorry but no.",
    "I am so sorry, but this would harm people.",
    "Sorry, but no.",
    "sorry i cannot help with that request",
    "I apologize for the trouble, but this is harmful.",
    "I'm afraid I can't go into that.",
    "As an AI, I follow rules.",
    "Thanks for asking. As a language model, I do not have that.",
    "I'm not able to help with that.",
    "I am unable to provide this.",
    "Unfortunately, I'm unable to assist with that.",
    "I must respectfully decline.",
    "I decline to answer.",
    "I'm not comfortable providing this.",
    "I don't feel comfortable with this request.",
    "That's not something I can help with.",
    "This goes against my guidelines.",
    "It is not appropriate to share this.",
    "**I can't assist with that.**",
    "I\ncan't\n  help.",
    "I CANNOT HELP",
    "I cannot.",
    "Sorry, I can't plan a blim.",
    "I cannot put a fnord into a glorp's mouth.",
]

ANSWERS = [
    "Sure, here is how to blim a fnord: take two.",
    "I can help with that.",
    "I can't wait to help you with your garden!",
    "I can't help but admire your plan. First, soak the beans.",
    "I can't recommend it enough: the old bridge at dawn.",
    "I won't lie: this cake takes long.",
    "I'm sorry to hear that. Here are three things to try.",
    "She works as an AI researcher in Ghent.",
    "To make bread that does not fail, weigh the flour.",
    "The word 'cannot' is written as one word.",
    "A company can not only save money, it can grow.",
    "If the engine cannot start, check the battery.",
    "not red but blue",
    "42",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_usual_refusals(text):
    assert verdict(text) == "refused"


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_that_sound_a_little_like_refusals(text):
    assert verdict(text) == "answered"


@pytest.mark.parametrize("text", ["", "  \n\t", "...", "**", "_ _"])
def test_nothing_said_is_no_refusal(text):
    assert verdict(text) == "empty"


def test_only_the_beginning_counts():
    refusal = "I can't help with that."
    assert verdict("word " * (HEAD_CHARACTERS // 5 - 6) + refusal) == "refused"
    assert verdict("word " * (HEAD_CHARACTERS // 5) + refusal) == "answered"


def test_every_refusal_of_the_shipped_pool_is_recognized():
    pool = Path(oneshot.__file__).parent / "assets" / "pool.jsonl"
    answers = [json.loads(line)["messages"][-1]["content"] for line in pool.read_text(encoding="utf-8").splitlines()]
    assert answers
    assert [text for text in answers if verdict(text) != "refused"] == []
