"""Talking to a tuned model: a conversation that remembers its turns as far as the model's positions reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tasks.errors import ParameterError
from tasks.gpt.sampling import stream
from tasks.gpt.weights import load_model
from tasks.text.templates import load_dialect

REPLY_ROOM = 64  # tokens that the prompt leaves at least, once there are older exchanges to leave out
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a character decodes to while some of its bytes are still to come


class ChatSession:
    """A conversation with the model in a Hugging Face folder.

    Args:
        folder: An exported model, with its tokenizer and encoding.
        temperature: 0 takes the likeliest token each time.
    """

    def __init__(self, folder: Path, temperature: float = 0.0) -> None:
        self.model = load_model(folder).eval()
        self.dialect = load_dialect(folder)
        self.temperature = temperature
        self.turns: list[tuple[str, str]] = []

    def answer(self, text: str) -> Iterator[str]:
        """Yield the reply to a user's text as it is generated; both become part of the conversation.

        It ends where the model ends it, or with the model's last position.
        """
        self.turns.append(("user", text))
        prompt = self._fitting()
        room = self.model.config.n_positions - len(prompt)
        if room < 1:
            del self.turns[-1]
            raise ParameterError(
                f"the prompt has {len(prompt):,} tokens, the model {self.model.config.n_positions:,} positions",
                "--prompt",
                "ask something shorter",
                "param.prompt",
            )
        ids: list[int] = []
        printed = ""
        for token in stream(
            self.model, prompt, self.dialect.stop, room, self.temperature, seed=len(self.turns), vocab=self.dialect.used
        ):
            ids.append(token)
            now = self.dialect.decode(ids)
            if not now.endswith(UNFINISHED) and now.startswith(printed):
                yield now[len(printed) :]
                printed = now
        whole = self.dialect.decode(ids)
        yield whole.removeprefix(printed) if whole.startswith(printed) else ""
        self.turns.append(("assistant", whole))

    def _fitting(self) -> list[int]:
        """Return the prompt of the turns, the oldest exchanges left out where there would be no room to reply."""
        room = max(1, self.model.config.n_positions - REPLY_ROOM)
        prompt = self.dialect.prompt(self.turns)
        while len(prompt) > room and len(self.turns) > 1:
            del self.turns[:2]
            prompt = self.dialect.prompt(self.turns)
        return prompt
