r"""Chat templates: how turns become token ids, the same way in training and when the tuned model is asked.

A template is data: the pieces that stand around the turns. A piece is a special token or plain text:

    chat  <|endoftext|> <|user|>Hi<|end|> <|assistant|>Hello.<|end|>
    xml   <|endoftext|> <conversation>\n<user>Hi</user>\n<assistant>Hello.</assistant> <|endoftext|> \n</conversation>

Pieces and texts are encoded one by one, so the ids of a prompt are an exact prefix of the ids of the whole. Trained on
are an assistant's text and the pieces that close it, the last of which is the end of its turn. The seed's `xml` had no
end of turn, so its model never stopped; a special token after `</assistant>` mends that and leaves its text as it was.

Text is only ever text: `<|end|>` in a user's message becomes the ids of those seven characters, here and in training.
Transformers' `apply_chat_template` cannot promise this, as it renders one string and looks for special tokens in all
of it: give it trusted text only, or use `Dialect`. The tags of `xml` are plain text, so whoever types them forges them.

`<|pad|>` fills sequences, and stands in no conversation. Transformers hides every pad token that it finds in a prompt
without a mask, and counts positions without it, so a token that opens or ends a turn must not be the pad.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from tasks.chats.rows import BETWEEN
from tasks.errors import ParameterError

# The pad is the last: the others have the ids that they had before there was one.
EOT, USER, ASSISTANT, END, PAD = SPECIALS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
ROLES: Mapping[str, str] = {
    "prompter": "user",
    "assistant": "assistant",
}  # the dataset's name of a role -> a template's

Encode = Callable[[str], list[int]]  # plain text -> ids, never a special one


@dataclass(frozen=True)
class Template:
    """The pieces around the turns of a conversation; see the top of this module.

    Attributes:
        name: As settings call it.
        start: Before the first turn.
        opens: Before a turn's text: role -> pieces.
        closes: After a turn's text: role -> pieces. An assistant's are trained on, and end on `stop`.
        tail: After the last turn.
        stop: The special token that ends an assistant's turn; generation stops at it.
    """

    name: str
    start: tuple[str, ...]
    opens: Mapping[str, tuple[str, ...]]
    closes: Mapping[str, tuple[str, ...]]
    tail: tuple[str, ...]
    stop: str

    def plain(self) -> tuple[str, ...]:
        """Return the pieces that are plain text: a vocabulary must never join them with the text beside them."""
        return tuple(piece for piece in self.pieces() if piece not in SPECIALS)

    def pieces(self) -> tuple[str, ...]:
        """Return all pieces, each once."""
        turns = [pieces for by_role in (self.opens, self.closes) for pieces in by_role.values()]
        return tuple(dict.fromkeys(piece for group in (self.start, *turns, self.tail) for piece in group))

    def jinja(self) -> str:
        """Return the same template in Jinja, for `apply_chat_template` of transformers.

        A system message is put before the user's, as in the rows that are trained on. What is trained on stands
        between `generation` and `endgeneration`, which `return_assistant_tokens_mask` reads.
        """
        written = {"start": self.start, "between": (BETWEEN,), "tail": self.tail}
        written |= {f"open_{role}": pieces for role, pieces in self.opens.items()}
        written |= {f"close_{role}": pieces for role, pieces in self.closes.items()}
        found = JINJA
        for name, pieces in written.items():
            # JSON is a Jinja string, too: \n and quotes are escaped alike
            found = found.replace(f"<{name}>", json.dumps("".join(pieces)))
        return found


JINJA = """\
{{- <start> -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- if not loop.first or loop.last or loop.nextitem['role'] != 'user' -%}
            {{- raise_exception('a system message stands first, before one of the user') -}}
        {%- endif -%}
    {%- elif message['role'] == 'user' -%}
        {{- <open_user> -}}
        {%- if not loop.first and loop.previtem['role'] == 'system' and loop.previtem['content'] -%}
            {{- loop.previtem['content'] + <between> -}}
        {%- endif -%}
        {{- message['content'] + <close_user> -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- <open_assistant> -}}
        {%- generation -%}
            {{- message['content'] + <close_assistant> -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('a role is system, user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- <open_assistant> -}}
{%- else -%}
    {{- <tail> -}}
{%- endif -%}
"""

CHAT = Template(
    name="chat",
    start=(EOT,),
    opens={"user": (USER,), "assistant": (ASSISTANT,)},
    closes={"user": (END,), "assistant": (END,)},
    tail=(),
    stop=END,
)
XML = Template(
    name="xml",
    start=(EOT, "<conversation>"),
    opens={"user": ("\n<user>",), "assistant": ("\n<assistant>",)},
    closes={"user": ("</user>",), "assistant": ("</assistant>", EOT)},
    tail=("\n</conversation>",),
    stop=EOT,
)
TEMPLATES: Mapping[str, Template] = {template.name: template for template in (CHAT, XML)}


@dataclass(frozen=True)
class Tags:
    """A template's pieces as ids, its attributes by the same names."""

    start: list[int]
    opens: Mapping[str, list[int]]
    closes: Mapping[str, list[int]]
    tail: list[int]

    def prompt(self, turns: Iterable[tuple[str, Sequence[int]]]) -> list[int]:
        """Return the ids of turns up to the open tag of the reply that is to come.

        Args:
            turns: ("user" or "assistant", ids of the text), oldest first.
        """
        ids = list(self.start)
        for role, text in turns:
            ids += [*self.opens[role], *text, *self.closes[role]]
        return ids + self.opens["assistant"]


def tags(template: Template, specials: Mapping[str, int], encode: Encode) -> Tags:
    """Turn a template's pieces into ids."""

    def ids(pieces: tuple[str, ...]) -> list[int]:
        found = ([specials[piece]] if piece in specials else encode(piece) for piece in pieces)
        return [token for piece in found for token in piece]

    opens = {role: ids(pieces) for role, pieces in template.opens.items()}
    closes = {role: ids(pieces) for role, pieces in template.closes.items()}
    return Tags(ids(template.start), opens, closes, ids(template.tail))


def sound(text: str) -> str:
    """Put U+FFFD where half a surrogate pair stands, which no UTF-8 can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Dialect:
    """A template and the vocabulary it was encoded with, ready to put questions to a model and to read its answers.

    Attributes:
        template: The template.
        tags: Its pieces as ids.
        specials: Text of each special token and its id.
        stop: Id of the end-of-turn token; generation stops at it.
        pad: Id that fills the rest of a sequence.
        vocab_size: V, rows of the embedding table.
        used: Ids that stand for something, <= V; a model may emit the others, and they decode to nothing.
        block: T, the longest sequence in training.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: Template, specials: Mapping[str, int], vocab_size: int, block: int
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # yes: "encode them like any text", so that text forges nothing
        self.template, self.specials = template, dict(specials)
        self.stop = specials[template.stop]
        self.pad = specials.get(PAD, specials[EOT])  # a model of before there was a pad was padded with the latter
        self.vocab_size, self.block = vocab_size, block
        self.used: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.tags = tags(template, specials, self.encode)

    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token, written in printable characters, and of each special one."""
        found: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return found

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; what no UTF-8 can hold becomes U+FFFD, as tiktoken does it in training."""
        ids: list[int] = self._tokenizer.encode(sound(text), add_special_tokens=False).ids
        return ids

    def prompt(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """Return the ids of turns up to the open tag of the reply that is to come.

        Args:
            turns: ("user" or "assistant", text), oldest first.

        Raises:
            ParameterError: If a role is another.
        """
        for role, _ in turns:
            if role not in self.tags.opens:
                raise ParameterError(f"expected the role user or assistant, found {role!r}", code="chat.role")
        return self.tags.prompt((role, self.encode(text)) for role, text in turns)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a reply's ids, without special tokens and closing tags."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        closing = "".join(piece for piece in self.template.closes["assistant"] if piece not in self.specials)
        return text.removesuffix(closing)


def load_dialect(folder: Path, tokenizer: Tokenizer | None = None) -> Dialect:
    """Load the dialect of a folder that holds `tokenizer.json` and `encoding.json`: encoded tokens or a tuned model.

    Args:
        folder: The folder.
        tokenizer: What `tokenizer.json` describes, where it was read already.
    """
    encoding = json.loads((folder / "encoding.json").read_bytes())
    template = TEMPLATES[encoding["template"]]
    known = tokenizer or Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Dialect(known, template, encoding["specials"], encoding["vocab_size"], encoding["context_length"])
