"""Makes synthetic biographies: any number of people, with facts that a model can only know by heart.

People and attributes follow bioS of Allen-Zhu and Li, "Physics of Language Models: Part 3.3, Knowledge
Capacity Scaling Laws" (arXiv 2404.05405): birth date, birth city, university, major and employer, each with
as many values as there. Only the pronoun is left out, one bit: every sentence names the person in full.

Two splits tell knowing from repeating, as in Part 3.1 (arXiv 2309.14316). By *template*: some statements and
questions are in no training text. By *person*: questions about half of the people are in none.

Every draw is the sha256 of a key modulo the number of choices. So nothing is stored, a person depends only on
seed and index, and no version of Python or NumPy changes anything.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from ultramem_jax.data.fact_words import ATTRIBUTES, GIVEN_NAMES, SURNAMES
from ultramem_jax.errors import UserError, at_least, choice, require

FORMS = ("statement", "held_out_statement", "question", "held_out_question")
"""Kinds of sentences. Trained and held-out ones are of the same attributes, in other words."""
NUM_NAMES = len(GIVEN_NAMES) * (len(GIVEN_NAMES) - 1) * len(SURNAMES)
"""Number of people with different names: 159,600,000."""

_VERSION = 1
"""Is part of the key of a corpus. Increase it whenever a text changes."""
_COPIES = 8
_SPEC = re.compile(r"([0-9]{1,18})-([0-9]{1,18})(?:x([0-9]{1,18}))?(?:@([0-9]{1,18}))?")


@dataclass(frozen=True)
class Person:
    """Holds a person. See `person`."""

    seed: int
    index: int
    name: str
    values: dict[str, str]
    """Value of each of `ATTRIBUTES`."""
    quizzed: bool
    """Whether questions about the person, with answers, are part of the training texts."""


class Query(NamedTuple):
    """Holds a prompt and its answer. A sentence of the person is `prompt + answer`."""

    person: Person
    attribute: str
    prompt: str
    """Text without a blank at its end."""
    answer: str
    """A blank, the value and a full stop, so that the beginning of a longer value is not an answer."""
    choices: tuple[str, ...]
    """Answers with the right one among them; their order does not depend on which is right."""


def person(index: int, seed: int = 0) -> Person:
    """Returns the person of an index.

    People of one seed have different names. Values are uniform, and independent of each other and of names.

    Args:
        index: index of the person, in [0, `NUM_NAMES`).
        seed: seed of the names and of all values.

    Raises:
        UserError: there is no such index, or the seed is not an integer.
    """
    name = name_of(index, seed)
    values = {
        key: attribute.values[_draw(len(attribute.values), "value", seed, index, key)]
        for key, attribute in ATTRIBUTES.items()
    }
    quizzed = _draw(2, "quizzed", seed, index) == 1
    return Person(int(seed), int(index), name, values, quizzed)


def name_of(index: int, seed: int = 0) -> str:
    """Returns the full name of a person: two different given names and a surname.

    Raises:
        UserError: there is no such index, or the seed is not an integer.
    """
    _check_integers(seed=seed)
    there_is = isinstance(index, Integral) and 0 <= index < NUM_NAMES
    require(there_is, "index", index, f"must be an integer in [0, {NUM_NAMES}), the number of names")
    rest, last = divmod(_permuted(index, NUM_NAMES, "name", seed), len(SURNAMES))
    first, between = divmod(rest, len(GIVEN_NAMES) - 1)
    middle = (first + 1 + between) % len(GIVEN_NAMES)
    return f"{GIVEN_NAMES[first]} {GIVEN_NAMES[middle]} {SURNAMES[last]}"


def biography(of: Person, which: int, form: str = "statement") -> str:
    """Returns a paraphrase of all facts of a person, with a sentence for each attribute.

    Args:
        of: the person.
        which: number of the paraphrase. With person and form it decides the order and the templates.
        form: one of `FORMS`.

    Raises:
        UserError: an unknown form, or a number that is not an integer.
    """
    _check_integers(which=which)
    key = ("biography", of.seed, of.index, form, which)
    order = sorted(ATTRIBUTES, key=lambda attribute: _draw(1 << 64, *key, "place", attribute))
    sentences = (_template(attribute, form, *key) for attribute in order)
    return " ".join(
        sentence.format(name=of.name, value=of.values[attribute])
        for attribute, sentence in zip(order, sentences, strict=True)
    )


def queries(people: Iterable[Person], form: str, *, max_choices: int = 100) -> Iterator[Query]:
    """Yields a query for each attribute of each person, with a template that is drawn for it.

    Args:
        people: the people. Knowledge is asked of those who are not `quizzed`, with form "question".
        form: one of `FORMS`.
        max_choices: most answers to choose from. They are all values of an attribute if it has no more, and
            else the right one with a sample of the others, drawn for each query.

    Raises:
        UserError: an unknown form, or fewer than one choice.
    """
    choice("form", form, FORMS)
    _check_integers(max_choices=max_choices)
    at_least(1, max_choices=max_choices)
    return (_query(of, attribute, form, max_choices) for of in people for attribute in ATTRIBUTES)


def templates(attribute: str, form: str) -> tuple[str, ...]:
    """Returns the templates of an attribute in one of `FORMS`.

    Raises:
        UserError: an unknown attribute or form.
    """
    choice("attribute", attribute, tuple(ATTRIBUTES))
    choice("form", form, FORMS)
    of = ATTRIBUTES[attribute]
    sentences, held_out = (of.questions, 1) if form.endswith("question") else (of.statements, 2)
    return sentences[-held_out:] if form.startswith("held_out") else sentences[:-held_out]


@dataclass(frozen=True)
class Population:
    """Describes people whose biographies are a corpus, `first` to `end` - 1."""

    first: int
    end: int
    copies: int = _COPIES
    """Paraphrases of each person in the training split."""
    seed: int = 0

    def __post_init__(self) -> None:
        spec = f"facts:{self.first}-{self.end}x{self.copies}@{self.seed}"
        for name, number in list(vars(self).items()):
            require(isinstance(number, Integral), "data.dataset", spec, f"{name} must be an integer")
            object.__setattr__(self, name, int(number))
        there_are = 0 <= self.first < self.end <= NUM_NAMES
        require(there_are, "data.dataset", spec, f"must be FIRST-END with FIRST < END <= {NUM_NAMES}")
        require(self.copies > 0, "data.dataset", spec, "must be FIRST-ENDxCOPIES with COPIES >= 1")

    @classmethod
    def parse(cls, spec: str) -> "Population":
        """Returns the population of `FIRST-END`, `FIRST-ENDxCOPIES` or either with `@SEED`.

        >>> Population.parse("0-1000x4@7")
        Population(first=0, end=1000, copies=4, seed=7)

        Raises:
            UserError: a text that is none of these, or indices outside [0, `NUM_NAMES`).
        """
        found = _SPEC.fullmatch(spec)
        if found is None:
            allowed = "must be facts:FIRST-END[xCOPIES][@SEED], such as facts:0-1000x8@3"
            raise UserError(f"data.dataset = {'facts:' + spec!r}: {allowed}")
        first, end, copies, seed = found.groups()
        return cls(int(first), int(end), int(copies or _COPIES), int(seed or 0))

    @property
    def key(self) -> str:
        """Returns a key of the texts, 64 hexadecimal digits."""
        return hashlib.sha256(repr((_VERSION, self)).encode()).hexdigest()

    def people(self) -> Iterator[Person]:
        """Yields all people in the order of their indices."""
        return (person(index, self.seed) for index in range(self.first, self.end))

    def texts(self, split: str) -> Iterator[tuple[str, str]]:
        """Yields the name and the text of each document of a split.

        - train: `copies` biographies of each person, and as many lists of questions with answers of those who
          are `quizzed`. Round by round all people come in another order, so that no text repeats what is near
          it and none tells who is next.
        - validation: a biography of each person in held-out templates.
        - test: the questions of those who are not `quizzed`, in templates that were trained with others.

        Raises:
            UserError: another split than these.
        """
        choice("split", split, ("train", "validation", "test"))
        return self._texts(split)

    def _texts(self, split: str) -> Iterator[tuple[str, str]]:
        if split == "train":
            for which in range(self.copies):
                yield from self._round("statement", which, quizzed=(False, True))
                yield from self._round("question", which, quizzed=(True,))
        elif split == "validation":
            yield from self._round("held_out_statement", 0, quizzed=(False, True))
        else:
            yield from self._round("question", 0, quizzed=(False,))

    def _round(self, form: str, which: int, quizzed: tuple[bool, ...]) -> Iterator[tuple[str, str]]:
        """Yields one text of each person whose `quizzed` is among those given, in an order of the round."""
        size = self.end - self.first
        for place in range(size):
            of = person(self.first + _permuted(place, size, "round", self.seed, form, which), self.seed)
            if of.quizzed in quizzed:
                yield f"{form}-{which}-{of.index}", biography(of, which, form)


def _template(attribute: str, form: str, *key: int | str) -> str:
    """Returns the template that is drawn for a key."""
    those = templates(attribute, form)
    return those[_draw(len(those), *key, "template", attribute)]


def _query(of: Person, attribute: str, form: str, max_choices: int) -> Query:
    key = ("query", of.seed, of.index, form, attribute)
    prompt = _template(attribute, form, *key).removesuffix(" {value}.").format(name=of.name)
    right, values = of.values[attribute], ATTRIBUTES[attribute].values
    if len(values) > max_choices:
        drawn = (values[_permuted(place, len(values), *key)] for place in range(max_choices))
        others = [value for value in drawn if value != right]
        values = tuple(sorted([right, *others[: max_choices - 1]]))
    return Query(of, attribute, prompt, _answer(right), tuple(map(_answer, values)))


def _answer(value: str) -> str:
    return f" {value}."


def _check_integers(**numbers: object) -> None:
    for name, number in numbers.items():
        require(isinstance(number, Integral), name, number, "must be an integer")


def _draw(below: int, *key: int | str) -> int:
    """Returns an integer in [0, below): the sha256 of a key modulo `below`, uniform but for below / 2^256."""
    # Other kinds of integers, such as NumPy's, are written in other ways.
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    return int.from_bytes(hashlib.sha256(repr(plain).encode()).digest(), "big") % below


def _permuted(number: int, size: int, *key: int | str) -> int:
    """Returns where a permutation of [0, size), which the key decides, takes a number.

    A Feistel network of four rounds permutes the numbers of 2·h bits. It is applied until the result is
    below `size`, at most four times on average. Nothing is stored.
    """
    half = (size - 1).bit_length() + 1 >> 1
    while True:
        left, right = number >> half, number & (1 << half) - 1
        for turn in range(4):
            left, right = right, left ^ _draw(1 << half, *key, turn, right)
        number = left << half | right
        if number < size:
            return number
