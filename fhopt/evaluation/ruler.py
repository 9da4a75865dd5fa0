"""RULER-style tasks: many needles, chains to follow, words to count, text to continue, blocks to copy.

    [sinks | filler | needle | filler | needle | filler ... | question] answer
                      ^ in latents when the question is asked ^

| task | the needles | the answer |
|---|---|---|
| `niah_single` | one key with its number, at 10, 50 and 90% | the number |
| `niah_multikey` | keys with their numbers, one per 150 tokens, at least 8 | the number of one key |
| `niah_multivalue` | one key, with another number in each of four places | the numbers, in order of appearance |
| `variable_tracking` | chains `VAR B = VAR A`, four hops each, one per 300 tokens | the variables of one value |
| `common_words` | a list of words, three of them 30 times, others three times | the three, by first appearance |
| `question` | a sentence of the filler in its place, at 10, 50 and 90% | its rare word, found nowhere else |
| `json_extraction` | records as lines of JSON, one per 150 tokens, at least 4 | a field of one record, as in JSON |
| `long_copy` | twelve lines of random hexadecimal digits, at 10% | all lines |

Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654,
section 3: its retrieval, variable tracking, common words and question answering, reworded; extraction and copying are
additions. RULER gives credit for parts of an answer; here an item is correct only if the whole answer is. If a model
must be shown the form of an answer, the question begins with an example. Needles without a depth are spread evenly, and
`common_words` fills the context with its list as far as words suffice.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from fhopt.errors import FhoptError
from fhopt.texts import tokens

Pieces = tuple[str, ...]  # a text whose pieces are encoded separately
HOPS = 4
VALUES = 4
COMMON, OFTEN, RARELY = 3, 30, 3  # number of common words; occurrences of these, and of the others
COPIED_LINES = 12
QUESTIONS = 8  # max per context
TOKENS_PER_NEEDLE = 150
TOKENS_PER_CHAIN = 300

ADJECTIVES = (
    "amber", "ancient", "bitter", "brave", "bright", "broad", "calm", "careful", "clever", "cold", "curious", "dark",
    "distant", "early", "fast", "gentle", "golden", "green", "heavy", "hollow", "humble", "late", "loud", "narrow",
    "patient", "quiet", "round", "silver", "slow", "small", "warm", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "apple", "basket", "bridge", "candle", "castle", "circle", "cloud", "desert", "door", "engine", "feather",
    "forest", "garden", "hammer", "harbor", "island", "kettle", "ladder", "lantern", "marble", "meadow", "mirror",
    "needle", "ocean", "orchard", "pillow", "river", "saddle", "tower", "valley", "window",
)  # fmt: skip
FIRST_NAMES = ("Anna", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Henry")
CITIES = ("Athens", "Bergen", "Cairo", "Dublin", "Lima", "Lisbon", "Oslo", "Prague", "Quito", "Riga", "Tokyo", "Vienna")


@dataclass(frozen=True)
class Wording:
    """The texts of an item, encoded piece by piece, so that the answer has the same tokens in the needle.

    others: alternative questions about the needle, with their answers. more: further needles, placed after the first in
    this order. around: text before and after the needle; None: filler from anywhere.
    """

    needle: Pieces
    question: Pieces
    answer: Pieces
    others: tuple[tuple[Pieces, Pieces], ...] = ()
    more: tuple[Pieces, ...] = ()
    around: tuple[str, str] | None = None


@dataclass(frozen=True)
class Room:
    """Space for an item.

    tokens: available for needles and question together. count: returns the number of tokens of pieces. text: the
    filler. reach: number of its characters that is sure to fill a context.
    """

    tokens: int
    count: Callable[[Pieces], int]
    text: str
    reach: int


@dataclass(frozen=True)
class RulerTask:
    """Function that words an item from random draws, and the depths of its needle in percent.

    A depth of None spreads the needles evenly over the context.
    """

    word: Callable[[random.Random, Room], Wording]
    depths: tuple[int | None, ...] = (10,)


def _joined(*parts: Sequence[str]) -> Pieces:
    """Concatenate pieces."""
    return tuple(piece for part in parts for piece in part)


def _keys(rng: random.Random, count: int) -> list[str]:
    """Draw distinct keys of two words each; at most as many as there are."""
    pairs = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    return rng.sample(pairs, min(count, len(pairs)))


def _values(rng: random.Random, count: int) -> list[str]:
    """Draw distinct five-digit numbers."""
    return [f" {number}" for number in rng.sample(range(10_000, 100_000), count)]


def _chosen(rng: random.Random, count: int, most: int = QUESTIONS) -> list[int]:
    """Draw the indices of at most `most` of `count` needles to ask for."""
    return rng.sample(range(count), min(count, most))


def _niah_single(rng: random.Random, _: Room) -> Wording:
    (key,), (value,) = _keys(rng, 1), _values(rng, 1)
    asked = f"\nThe code number of the {key} is"
    return Wording((asked, value, ".\n"), (f"\n\nWhat is the code number of the {key}?", asked), (value,))


def _niah_multikey(rng: random.Random, room: Room) -> Wording:
    keys = _keys(rng, max(8, room.tokens // TOKENS_PER_NEEDLE))
    lines = [(f"\nThe code number of the {key} is", v) for key, v in zip(keys, _values(rng, len(keys)), strict=True)]
    chosen = _chosen(rng, len(lines))
    questions = [((f"\n\nWhat is the code number of the {keys[i]}?", lines[i][0]), (lines[i][1],)) for i in chosen]
    first, *more = [(*line, ".\n") for line in lines]
    return Wording(first, *questions[0], tuple(questions[1:]), tuple(more))


def _niah_multivalue(rng: random.Random, _: Room) -> Wording:
    keys, values = _keys(rng, 2), _values(rng, 2 * VALUES)
    shown, asked = [
        [(f"\nA code number of the {key} is", value, ".") for value in part]
        for key, part in zip(keys, (values[:VALUES], values[VALUES:]), strict=True)
    ]
    questions = [f"\nAll code numbers of the {key}, in order of appearance:" for key in keys]
    answers = [_joined(part[:1], *[(",", value) for value in part[1:]]) for part in (values[:VALUES], values[VALUES:])]
    question = _joined(("\n\nExample:",), *shown, (questions[0],), answers[0], ("\n", questions[1]))
    first, *more = [(*line, "\n") for line in asked]
    return Wording(first, question, answers[1], more=tuple(more))


def _variable_tracking(rng: random.Random, room: Room) -> Wording:
    count = max(2, room.tokens // TOKENS_PER_CHAIN)
    letters = string.ascii_uppercase
    drawn = [f" {letters[n // 676]}{letters[n // 26 % 26]}{letters[n % 26]}" for n in _distinct(rng, count + 1)]
    chains = [tuple(drawn[i : i + HOPS + 1]) for i in range(0, len(drawn), HOPS + 1)]
    values = _values(rng, count + 1)
    shown, *lines = [_statements(chain, value) for chain, value in zip(chains, values, strict=True)]
    example = _joined(("\n\nExample:",), *shown, ("\nVariables that hold", values[0], ":"), chains[0])
    turns = [i for i in range(count) for _ in range(HOPS + 1)]
    rng.shuffle(turns)
    waiting = [iter(some) for some in lines]
    first, *more = [(*next(waiting[i]), "\n") for i in turns]  # preserves the order within each chain
    asked = [((*example, "\n", "\nVariables that hold", values[i], ":"), chains[i]) for i in range(1, count + 1)]
    return Wording(first, *asked[0], tuple(asked[1:QUESTIONS]), tuple(more))


def _distinct(rng: random.Random, chains: int) -> list[int]:
    """Draw distinct numbers that encode the three-letter names of all variables of `chains` chains."""
    return rng.sample(range(26**3), chains * (HOPS + 1))


def _statements(chain: Pieces, value: str) -> list[Pieces]:
    """Return statements that assign a value to the first variable, and to each other one its predecessor."""
    hops = [("\nVAR", name, " = VAR", before) for before, name in itertools.pairwise(chain)]
    return [("\nVAR", chain[0], " =", value), *hops]


@cache
def _vocabulary() -> list[str]:
    """Return words of four to nine lowercase letters from the filler's source, both halves of it."""
    return sorted(set(re.findall(r"\b[a-z]{4,9}\b", tokens.read_text("topics"))))


def _common_words(rng: random.Random, room: Room) -> Wording:
    drawn = iter([f" {word}" for word in rng.sample(_vocabulary(), len(_vocabulary()))])
    asked = "\nThe three most common words of list {}, by first appearance:"
    shown_common, shown_others, common = (list(itertools.islice(drawn, n)) for n in (COMMON, COMMON + 1, COMMON))
    shown = _listed(rng, shown_common, shown_others, 4, 1)
    example = _joined(("\n\nList 2:",), shown, (asked.format(2),), _first_seen(shown, shown_common))
    question, before, after = (*example, asked.format(1)), ("\n\nList 1:",), ("\n\n",)
    free = room.tokens - room.count((*question, *before, *after)) - OFTEN * room.count(tuple(common))
    others: list[str] = []
    for word in drawn:
        free -= RARELY * room.count((word,))
        if free < 0 and len(others) >= 2 * COMMON:
            break
        others.append(word)
    words = _listed(rng, common, others, OFTEN, RARELY)
    return Wording((*before, *words, *after), question, _first_seen(words, common))


def _listed(rng: random.Random, common: list[str], others: list[str], often: int, rarely: int) -> list[str]:
    words = often * common + rarely * others
    rng.shuffle(words)
    return words


def _first_seen(words: list[str], common: list[str]) -> Pieces:
    return tuple(sorted(common, key=words.index))


_SENTENCE = re.compile(r"(?<=[.:\n])\s[A-Z][a-z ](?:(?!\n\s*\n)[^.:|*=]){30,300}")
_RARE = re.compile(r'(?:(?<=")| )(?=\w*[A-Z\d_])\w{3,}\b')  # a name, a number or an identifier


def _question(rng: random.Random, room: Room) -> Wording:
    known = _clozes(room.text)
    for body, answer, stop in rng.sample(known, len(known)):
        start = stop - len(body) - len(answer)
        rest = room.text[stop:] + "\n\n" + room.text[:start]  # the filler from the sentence on, wrapped around to it
        rest *= 1 + room.reach // len(rest)
        around = rest[-room.reach :], rest[: room.reach]
        if answer.strip().lower() not in "\n".join((*around, body)).lower():
            question = "\n\nComplete this sentence of the text above:", body
            return Wording((body, answer), question, (answer,), around=around)
    raise FhoptError(
        "the task question found no word that occurs only once in a context of this length. Use shorter --lengths."
    )


@cache
def _clozes(text: str) -> list[tuple[str, str, int]]:
    """Return sentence prefixes, each with the name, number or identifier that follows and its end position."""
    return [
        (sentence.group()[: word.start()], word.group(), sentence.start() + word.end())
        for sentence in _SENTENCE.finditer(text)
        for word in _RARE.finditer(sentence.group(), 30)
    ]


def _json_extraction(rng: random.Random, room: Room) -> Wording:
    count = max(4, room.tokens // TOKENS_PER_NEEDLE)
    ids = [f" {number}" for number in rng.sample(range(1000, 1000 + max(9000, 2 * count)), count)]
    amounts = [f" {cents / 100:.2f}" for cents in rng.sample(range(10_000, 100_000), count)]
    codes = [' "' + "".join(rng.choices(string.ascii_lowercase + string.digits, k=6)) + '"' for _ in ids]
    fields = [{"amount": amount, "code": code} for amount, code in zip(amounts, codes, strict=True)]
    first, *more = [
        ('\n{"id":', number, f', "name": "{rng.choice(FIRST_NAMES)}", "city": "{rng.choice(CITIES)}"',
         ', "amount":', field["amount"], ', "code":', field["code"], "}\n")
        for number, field in zip(ids, fields, strict=True)
    ]  # fmt: skip
    order = _chosen(rng, count, QUESTIONS + 2)
    names = ("amount", "code", *(rng.choice(("amount", "code")) for _ in order[2:]))
    chosen = zip(order, names, strict=True)
    lines = [(('\n{"id":', ids[i], f', "{name}":'), fields[i][name]) for i, name in chosen]
    shown = [(*question, value, "}") for question, value in lines[:2]]
    before = _joined(("\n\nSingle fields of the records above:",), *shown)
    questions = [((*before, *question), (answer,)) for question, answer in lines[2:]]
    return Wording(first, *questions[0], tuple(questions[1:]), tuple(more))


def _long_copy(rng: random.Random, _: Room) -> Wording:
    lines = _joined(*[("\n", f"{rng.getrandbits(32):08x}") for _ in range(COPIED_LINES)])
    header = "\nIdentifiers:"
    return Wording(("\n", header, *lines, "\n\n"), ("\n\nAll identifiers of the list above once more.", header), lines)


RULER = {
    "niah_single": RulerTask(_niah_single, (10, 50, 90)),
    "niah_multikey": RulerTask(_niah_multikey, (None,)),
    "niah_multivalue": RulerTask(_niah_multivalue, (None,)),
    "variable_tracking": RulerTask(_variable_tracking, (None,)),
    "common_words": RulerTask(_common_words, (None,)),
    "question": RulerTask(_question, (10, 50, 90)),
    "json_extraction": RulerTask(_json_extraction, (None,)),
    "long_copy": RulerTask(_long_copy),
}
