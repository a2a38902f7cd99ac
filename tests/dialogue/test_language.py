"""Laws of the language check: only a clear answer counts."""

import time

import polars as pl
import pyarrow as pa
import pytest

from tasks.dialogue.language import SCHEMA, detect, in_own_script, primary, prose

# Article 1 of the Universal Declaration of Human Rights.
ARTICLES = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience"
    " and should act towards one another in a spirit of brotherhood.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt"
    " und sollen einander im Geiste der Brüderlichkeit begegnen.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y"
    " conciencia, deben comportarse fraternalmente los unos con los otros.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de"
    " conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и"
    " должны поступать в отношении друг друга в духе братства.",
    "ja": "すべての人間は、生れながらにして自由であり、かつ、尊厳と権利とについて平等である。"
    "人間は、理性と良心とを授けられており、互いに同胞の精神をもって行動しなければならない。",
    "zh": "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神互相对待。",
}  # fmt: skip


def found(*texts: str, chars: int = 20) -> list[str | None]:
    batch = detect(pa.array(texts, pa.string()), chars)
    assert batch.schema == SCHEMA
    languages: list[str | None] = batch["detected"].to_pylist()
    return languages


def test_the_language_of_a_long_text_is_found() -> None:
    assert found(*ARTICLES.values()) == list(ARTICLES)


def test_short_texts_names_code_and_filler_get_no_verdict() -> None:
    assert found("Guten Morgen!", "", "\n" * 100, chars=20) == [None] * 3
    assert (
        found("ok " * 9, "{{{[[[]]]}}} += 0x1f3a; >>> 7 / 3 == 2.333", "Lima, Peru; Paris, France; Rome, Italy")
        == [None] * 3
    )
    assert found(
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit. Vestibulum quis dolor non nibh sodales."
    ) == [None]


def test_what_white_space_is_around_a_text_makes_it_no_longer() -> None:
    assert found(f"Guten Morgen, wie geht es?{' ' * 100}", chars=60) == [None]


def test_a_result_is_of_its_own_text_alone() -> None:
    alone = [found(text)[0] for text in ARTICLES.values()]
    assert found(*list(ARTICLES.values())[::-1]) == alone[::-1]


@pytest.mark.parametrize("odd", ["\x00", "\x1b[31m", "\ufffe", "\ufdd0", "\U0001fffe", "\x85", "\u0378"])
def test_characters_that_are_not_for_interchange_do_no_harm(odd: str) -> None:
    assert found(odd + ARTICLES["de"] + odd) == ["de"]


def test_a_text_of_a_megabyte_costs_no_more_than_its_beginning() -> None:
    started = time.process_time()
    assert found(ARTICLES["de"] * 6_000, "a" * 10**6, "\u0301" * 10**6)[0] == "de"
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("tag", "name"),
    [("pt-BR", "pt"), ("EN_us", "en"), ("zh-Hant", "zh"), ("nn", "nb"), ("iw", "he"), ("uk-UA", "uk"), (" de ", "de")],
)
def test_tags_of_one_written_language_have_one_name(tag: str, name: str) -> None:
    assert primary(tag) == name


ASKED = {  # about code, in languages that CLD2 would take for the code's English
    "es": "Explica este código y corrige los errores.",
    "pt-BR": "Explique este código e corrija os erros, por favor.",
    "de": "Erkläre mir bitte diesen Code und behebe die Fehler.",
    "fr": "Explique ce code et corrige les erreurs, s'il te plaît.",
    "it": "Spiega questo codice e correggi gli errori.",
    "pl": "Wyjaśnij ten kod i popraw błędy.",
    "ru": "Объясни этот код и исправь ошибки.",
    "zh": "请解释这段代码并修正其中的错误。",
}
CODE = {
    "python": '''import argparse
import collections
from pathlib import Path

def step_0(values, limit=0):
    """Return the mean of the values that are larger than the limit given."""
    # this loop goes through all of the values and adds them up
    total = sum(value for value in values if value > limit)
    return total / max(len(values), 1)

class Reader:
    def __init__(self, path, encoding="utf-8"):
        self.path = path
        self.encoding = encoding

    def read_all_lines_of_the_file(self):
        with open(self.path, encoding=self.encoding) as file:
            for line in file:
                if not line:
                    continue
                yield line.strip()
''',
    "javascript": """const express = require('express');
const app = express();

// return all users that are not deleted
app.get('/users', async (request, response) => {
  const users = await database.collection('users').find({ deleted: false }).toArray();
  if (users.length === 0) {
    response.status(404).send('No users were found in the database');
    return;
  }
  response.json(users.map(user => user.name));
});

function formatDate(value) {
  let date = new Date(value);
  return date.toLocaleDateString();
}
""",
    "sql": """SELECT customers.name, orders.total, orders.created_at
FROM customers
INNER JOIN orders ON customers.id = orders.customer_id
WHERE orders.total > 100 AND customers.country = 'Spain'
GROUP BY customers.name
HAVING COUNT(orders.id) > 3
ORDER BY orders.created_at DESC
LIMIT 10;
CREATE TABLE employees (
    id INTEGER PRIMARY KEY,
    first_name VARCHAR(100) NOT NULL,
    department_id INTEGER REFERENCES departments(id)
);
""",
    "shell": """#!/bin/bash
sudo apt-get update && sudo apt-get install -y nginx
cd /var/www/html
for file in *.log; do
    echo "Processing file $file and moving it to the archive folder"
    mv "$file" /archive/
done
docker run --name database -p 5432:5432 -d postgres
git commit -m "Add the first version of the script"
if [ -f /etc/hosts ]; then
    cat /etc/hosts | grep localhost
fi
""",
    "html": """<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>The best restaurant in town</title>
  <link rel="stylesheet" href="style.css">
</head>
<body>
  <h1>Welcome to our restaurant</h1>
  <p class="intro">We serve fresh food every day of the week.</p>
  <a href="/menu">See the menu</a>
</body>
</html>
""",
    "json": """{
  "name": "project",
  "description": "A small project that does something useful for the user",
  "scripts": {
    "start": "node server.js",
    "test": "jest --coverage"
  },
  "dependencies": {
    "express": "4.18.2",
    "mongoose": "7.0.3"
  },
  "keywords": ["server", "example", "database"]
}
""",
    "traceback": """Traceback (most recent call last):
  File "/home/user/project/main.py", line 42, in <module>
    result = process(data)
  File "/home/user/project/lib.py", line 17, in process
    return values[index] / total
ZeroDivisionError: division by zero

During handling of the above exception, another exception occurred:
TypeError: unsupported operand type(s) for /: 'str' and 'int'
""",
    "yaml": """version: "3.8"
services:
  web:
    image: nginx:latest
    ports:
      - "80:80"
    environment:
      - DATABASE_HOST=database
      - DATABASE_NAME=production
    depends_on:
      - database
  database:
    image: postgres:15
    volumes:
      - data:/var/lib/postgresql/data
""",
}  # fmt: skip


@pytest.mark.parametrize("around", ["{ask}\n```\n{code}```", "{ask}\n\n{code}", "{code}\n{ask}"])
@pytest.mark.parametrize("code", CODE)
def test_the_code_that_one_asks_about_is_not_the_language_of_a_text(code: str, around: str) -> None:
    asked = [around.format(ask=ask, code=CODE[code]) for ask in ASKED.values()]
    shares = detect(pa.array(asked, pa.string()), 100).to_pydict()
    clear = [name for name, share in zip(shares["detected"], shares["share"], strict=True) if share and share >= 0.95]
    assert "en" not in clear


def test_prose_around_code_is_judged() -> None:
    code = CODE["python"]
    assert found(f"{ARTICLES['de']}\n```python\n{code}```\n{ARTICLES['de']}", f"{code}\n{ARTICLES['fr']}") == [
        "de",
        "fr",
    ]


def test_lists_and_paragraphs_are_no_code() -> None:
    listed = "\n".join(f"{number}. {ARTICLES['es']}\n    - {ARTICLES['es']}" for number in (1, 2))
    assert prose(pl.Series([listed])).to_list() == [listed]


@pytest.mark.parametrize(
    ("tagged", "detected", "text", "own"),
    [
        ("zh", "en", "请翻译: The quick brown fox jumps over the lazy dog", False),  # three characters are a quotation
        ("zh", "en", "请解释这段代码 def f(x): return x", True),
        ("ru", "en", "Переведи: the quick brown fox", True),
        ("ru", "uk", "Всі люди народжуються вільними", False),  # both are written in Cyrillic
        ("zh", "ja", "すべての人間は、生れながらにして自由であり", False),  # Japanese is written in Han, too
        ("ja", "zh", "すべての人間は、生れながらにして自由であり", True),  # but Chinese not in kana
        ("en", "de", "Alle Menschen sind frei", False),
        ("ru", "en", "All human beings are born free", False),
    ],
)
def test_words_in_the_script_of_the_tag_alone_speak_for_it(tagged: str, detected: str, text: str, own: bool) -> None:
    row = {"text": text, "tagged": tagged, "detected": detected}
    assert in_own_script(pl.DataFrame([{**row, "detected": None}, row, {**row, "tagged": None}])).to_list() == [
        False, own, False,
    ]  # fmt: skip
