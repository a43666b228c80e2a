"""How many tokens a server's model gets: enough for its answer, and for its thoughts where it turns out to think.

A server does not show its chat template. That its model thinks is seen by an answer: by the marks in it, by the
reasoning that the server takes out, or, where the template opens the thought and the answer is cut off within, by
asking once more with room for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from oneshot.data.thoughts import closed_unopened, taken_apart
from oneshot.measure.replies import OF_THIS_REQUEST, Failed, answer_in, cut_off

_LONGEST_TOKEN = 64  # characters that a token stands for at most, on average: of longer answers the rest is not judged
THOUGHT_TOKENS = 1024  # for thoughts, where no setting says


class Room:
    """What is known of a server's model, and how it is asked for an answer.

    Args:
        answer: tokens of the longest answer
        thought: further ones for its thoughts
    """

    def __init__(self, answer: int, thought: int) -> None:
        self.short, self.long = answer, answer + thought
        self.thinks = False
        self._mark = ""  # with which its prompt opens a thought
        self._tried = thought == 0
        self._fits = False  # whether so much room has been taken once
        self._trial = asyncio.Lock()

    async def answer(self, ask: Callable[[int], Awaitable[Any]]) -> str:
        """Return the model's answer, its thought before it.

        Args:
            ask: asks for at most so many tokens, and returns the chat completion
        """
        if self.thinks:
            try:
                return self._marked(self._read(await ask(self.long), self.long))
            except Failed as failure:  # a longer prompt than those before, for which less room is left
                if failure.status not in OF_THIS_REQUEST:
                    raise
        found = await ask(self.short)
        text = self._read(found, self.short)
        if self.short < self.long and not taken_apart(text).finished:
            found = await self._with_room(ask)
            return self._marked(text if found is None else self._read(found, self.long))
        if self.short < self.long and taken_apart(text).thought is None and cut_off(found):
            longer = await self._longer(ask)
            text = text if longer is None else longer
        return self._marked(text)

    async def _longer(self, ask: Callable[[int], Awaitable[Any]]) -> str | None:
        """The answer with room for a thought, where it may be one that has been cut off; none where it is not."""
        async with self._trial:  # one trial tells all that wait here
            if not self.thinks and not self._tried:
                self._tried = True
                found = await self._with_room(ask)
                text = "" if found is None else self._read(found, self.long)
                return text if self.thinks else None
        found = await self._with_room(ask) if self.thinks else None
        return None if found is None else self._read(found, self.long)

    async def _with_room(self, ask: Callable[[int], Awaitable[Any]]) -> Any:
        """A longer completion of a prompt that has had a short one; none where the server takes no more.

        Of the room for a thought as much as it takes, the first time also from then on: its longest text may be shorter
        than what is asked for (vLLM's ``--max-model-len``).
        """
        room = self.long - self.short
        while room > 0:
            try:
                found = await ask(self.short + room)
            except Failed as failure:
                if failure.status not in OF_THIS_REQUEST:
                    raise
                room //= 2
                continue
            if not self._fits:
                self.long, self._fits = self.short + room, True
            return found
        return None

    def _read(self, found: Any, tokens: int) -> str:
        text = answer_in(found, _LONGEST_TOKEN * tokens)
        self._mark = self._mark or closed_unopened(text)
        self.thinks = self.thinks or taken_apart(text).thought is not None
        return text

    def _marked(self, text: str) -> str:
        """The answer with the mark that its prompt ends with; one that never closes the thought is unfinished."""
        if self._mark and (taken_apart(text).thought is None or closed_unopened(text)):
            return f"{self._mark}\n{text}"
        return text
