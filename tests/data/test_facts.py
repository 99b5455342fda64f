"""People, sentences and splits: names are unique, values uniform, and what is held out is not trained."""

import hashlib
import itertools
import math
import re

import numpy as np
import pytest

from ultramem_jax import DataConfig, UserError
from ultramem_jax.data import SPLITS, facts
from ultramem_jax.data.fact_words import ATTRIBUTES, DATES, GIVEN_NAMES, SURNAMES
from ultramem_jax.data.facts import (
    FORMS,
    NUM_NAMES,
    Population,
    biography,
    name_of,
    person,
    queries,
    templates,
)
from ultramem_jax.data.sources import open_source


@pytest.fixture(scope="module")
def people():
    return list(Population(0, 3000, seed=5).people())


def _sentences(text):
    """Statements, or questions with answers: nothing but the end of each holds a full stop."""
    return re.findall(r"[^.]+\.", text)


# Names


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 257, 1025, 4000])
def test_permutation_takes_all_numbers_to_all_numbers(size):
    found = [facts._permuted(number, size, "key", 3) for number in range(size)]
    assert sorted(found) == list(range(size))


def test_permutation_looks_random():
    found = np.array([facts._permuted(number, 4000, "key") for number in range(4000)])
    other = np.array([facts._permuted(number, 4000, "another") for number in range(4000)])
    # Standard deviation 1/63 of a correlation; five of them.
    for one, two in ((np.arange(4000), found), (found[1:], found[:-1]), (found, other)):
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(4000)


def test_words_of_names_are_unique_and_make_over_100_million_names():
    assert len(set(GIVEN_NAMES)) == len(GIVEN_NAMES) == 400
    assert len(set(SURNAMES)) == len(SURNAMES) == 1000
    assert facts.NUM_NAMES == 400 * 399 * 1000
    assert all(re.fullmatch("[A-Z][a-z]+", word) for word in GIVEN_NAMES + SURNAMES)


def test_names_are_unique():
    # With the permutations above, it is enough that a name tells its number.
    names = [name_of(index, seed=1) for index in range(50_000)]
    assert len(set(names)) == len(names)
    for name in (*names[:100], name_of(facts.NUM_NAMES - 1)):
        first, middle, last = name.split(" ")
        assert first != middle and {first, middle} <= set(GIVEN_NAMES) and last in SURNAMES


def test_seed_decides_names_and_values():
    one, same, other = person(7, seed=1), person(np.int64(7), seed=np.int64(1)), person(7, seed=2)
    assert one == same
    assert one.name != other.name and one.values != other.values
    assert person(7) == person(7, seed=0)


@pytest.mark.parametrize("index", [-1, facts.NUM_NAMES])
def test_person_that_there_is_not(index):
    with pytest.raises(
        UserError, match=rf"^index = {index}: must be an integer in \[0, 159600000\), the number of names"
    ):
        person(index)


# Values


def test_choices_are_those_of_bios():
    counts = {attribute: len(of.values) for attribute, of in ATTRIBUTES.items()}
    assert counts == {
        "birth_date": 12 * 28 * 200,
        "birth_city": 200,
        "university": 300,
        "major": 100,
        "employer": 263,
    }
    for of in ATTRIBUTES.values():
        assert len(set(of.values)) == len(of.values)
        assert not any("." in value or value != value.strip() for value in of.values)


def _chi_square(counts):
    """Distance of counts from equal ones, in standard deviations of the chi-square distribution."""
    expected, degrees = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)


def test_values_are_uniform_and_independent(people):
    drawn = {
        attribute: np.array([of.values.index(who.values[attribute]) for who in people])
        for attribute, of in ATTRIBUTES.items()
        if attribute != "birth_date"
    }
    dates = [re.fullmatch(r"([A-Z][a-z]+) (\d+), (\d+)", who.values["birth_date"]).groups() for who in people]
    for number, part in enumerate(zip(*dates, strict=True)):
        values = sorted(
            {re.fullmatch(r"([A-Z][a-z]+) (\d+), (\d+)", date).group(number + 1) for date in DATES}
        )
        assert len(values) == (12, 28, 200)[number]
        drawn[f"date {number}"] = np.array([values.index(value) for value in part])
    sizes = {attribute: len(of.values) for attribute, of in ATTRIBUTES.items()}
    sizes |= {"date 0": 12, "date 1": 28, "date 2": 200}
    for attribute, values in drawn.items():
        assert abs(_chi_square(np.bincount(values, minlength=sizes[attribute]))) < 5, attribute
    drawn["quizzed"], sizes["quizzed"] = np.array([who.quizzed for who in people], int), 2
    for one, two in itertools.combinations(drawn, 2):
        rows, columns = min(8, sizes[one]), min(7, sizes[two])
        table = np.zeros((rows, columns))
        np.add.at(table, (drawn[one] * rows // sizes[one], drawn[two] * columns // sizes[two]), 1)
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        degrees = (rows - 1) * (columns - 1)
        distance = (((table - expected) ** 2 / expected).sum() - degrees) / math.sqrt(2 * degrees)
        assert abs(distance) < 5, (one, two)


# Sentences


def test_templates_end_with_the_value():
    for attribute, of in ATTRIBUTES.items():
        assert len(of.statements) >= 6 and len(of.questions) >= 2
        for template in of.statements + of.questions:
            assert template.endswith(" {value}.") and template.count("{") == 2 and template.count(".") == 1
            assert template.count("{name}") == 1
        assert templates(attribute, "held_out_statement") == of.statements[-2:]
        assert templates(attribute, "held_out_question") == of.questions[-1:]
        assert templates(attribute, "statement") == of.statements[:-2]
        assert templates(attribute, "question") == of.questions[:-1]
    every = [template for of in ATTRIBUTES.values() for template in of.statements + of.questions]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("form", FORMS)
def test_biography_states_every_attribute_once(people, form):
    orders = set()
    for who, which in itertools.product(people[:40], range(3)):
        text = biography(who, which, form)
        assert text == biography(who, which, form)
        found = []
        for sentence in _sentences(text):
            (attribute,) = (
                attribute
                for attribute in ATTRIBUTES
                for template in templates(attribute, form)
                if sentence.strip() == template.format(name=who.name, value=who.values[attribute])
            )
            found.append(attribute)
        assert sorted(found) == sorted(ATTRIBUTES)
        orders.add(tuple(found))
    assert len(orders) > 60  # 120 draws of 120 orders have 76 different ones on average, standard deviation 4


def test_paraphrases_use_every_template(people):
    text = " ".join(biography(who, which) for who in people[:20] for which in range(4))
    for attribute in ATTRIBUTES:
        for template in templates(attribute, "statement"):
            before, after = template.split("{name}")[0], template.split("{name}")[1].split("{value}")[0]
            assert re.search(rf"{before}[A-Z]\w+ [A-Z]\w+ [A-Z]\w+{after}", text), template


# Queries


@pytest.mark.parametrize("form", FORMS)
def test_prompt_and_answer_are_a_sentence(people, form):
    asked = list(queries(people[:30], form, max_choices=5))
    assert [(query.person, query.attribute) for query in asked] == list(
        itertools.product(people[:30], ATTRIBUTES)
    )
    for query in asked:
        who, value = query.person, query.person.values[query.attribute]
        sentences = [
            template.format(name=who.name, value=value) for template in templates(query.attribute, form)
        ]
        assert query.prompt + query.answer in sentences
        assert query.answer == f" {value}." and query.prompt == query.prompt.strip()
    used = {query.prompt.replace(query.person.name, "{name}") for query in asked}
    assert len(used) == sum(len(templates(attribute, form)) for attribute in ATTRIBUTES)


def test_choices_hold_the_answer_once(people):
    for query in queries(people[:20], "statement"):
        values = ATTRIBUTES[query.attribute].values
        assert query.answer in query.choices
        assert len(query.choices) == len(set(query.choices)) == 100
        assert set(query.choices) <= {f" {value}." for value in values}
    all_of_them = queries(people[:1], "statement", max_choices=300)
    assert [len(query.choices) for query in all_of_them] == [300, 200, 300, 100, 263]
    assert all(query.choices == (query.answer,) for query in queries(people[:2], "question", max_choices=1))


def test_no_choice_begins_another():
    for of in ATTRIBUTES.values():
        answers = sorted(f" {value}." for value in of.values)
        assert not any(two.startswith(one) for one, two in itertools.pairwise(answers))


def test_samples_of_choices_and_places_of_answers_differ(people):
    asked = [
        query for query in queries(people[:200], "statement", max_choices=4) if query.attribute == "major"
    ]
    places = np.bincount([query.choices.index(query.answer) for query in asked], minlength=4)
    assert abs(_chi_square(places)) < 5
    assert len({query.choices for query in asked}) == len(asked)


def test_wrong_arguments_of_queries(people):
    with pytest.raises(UserError, match=r"^unknown form 'statements': did you mean 'statement'"):
        queries(people, "statements")
    with pytest.raises(UserError, match=r"^unknown form 'asks'"):
        biography(people[0], 0, "asks")
    with pytest.raises(UserError, match=r"^unknown attribute 'birthday': did you mean"):
        templates("birthday", "question")
    with pytest.raises(UserError, match=r"^unknown split 'valid': did you mean 'validation'"):
        Population(0, 2).texts("valid")
    for index in (-1, NUM_NAMES, 1.5):
        with pytest.raises(UserError, match=r"^index = .*: must be an integer in \[0, 159600000\)"):
            name_of(index)
    with pytest.raises(UserError, match=r"^data.dataset = 'facts:0-2.5x8@0': end must be an integer"):
        Population(0, 2.5)


def test_kinds_of_integers_make_no_difference():
    ours, theirs = (Population(*map(kind, (3, 9, 2, 5))) for kind in (int, np.int64))
    assert (
        ours == theirs and ours.key == theirs.key and list(ours.texts("test")) == list(theirs.texts("test"))
    )
    one = person(np.int64(7), np.int64(1))
    assert one == person(7, 1) and biography(one, np.int64(1)) == biography(one, 1)
    refused = {
        "seed": lambda: person(0, seed=1.7),
        "which": lambda: biography(one, 1.5),
        "max_choices": lambda: queries([one], "question", max_choices=1.5),
    }
    for name, made in refused.items():
        with pytest.raises(UserError, match=rf"^{name} = .*: must be an integer"):
            made()
    with pytest.raises(UserError, match=r"^max_choices = 0: must be at least 1"):
        queries(people, "question", max_choices=0)


# The source


def _documents(dataset):
    source = open_source(DataConfig(dataset=dataset))
    return {split: [(d.name, d.data.decode()) for d in source.documents(split)] for split in SPLITS}


@pytest.fixture(scope="module")
def documents():
    return _documents("facts:100-200x3@9")


def test_splits(documents):
    people = [person(index, seed=9) for index in range(100, 200)]
    quizzed = [who for who in people if who.quizzed]
    assert 30 < len(quizzed) < 70
    assert sorted(documents["train"]) == sorted(
        [(f"statement-{k}-{who.index}", biography(who, k)) for who in people for k in range(3)]
        + [(f"question-{k}-{who.index}", biography(who, k, "question")) for who in quizzed for k in range(3)]
    )
    assert sorted(documents["validation"]) == sorted(
        (f"held_out_statement-0-{who.index}", biography(who, 0, "held_out_statement")) for who in people
    )
    assert sorted(documents["test"]) == sorted(
        (f"question-0-{who.index}", biography(who, 0, "question")) for who in people if not who.quizzed
    )


def test_rounds_have_orders_of_their_own(documents):
    names = [name.split("-") for name, _ in documents["train"]]
    rounds = [
        (key, [int(index) for *_, index in names]) for key, names in itertools.groupby(names, lambda n: n[:2])
    ]
    assert [key for key, _ in rounds] == [
        [form, str(k)] for k in range(3) for form in ("statement", "question")
    ]
    followers = [set(itertools.pairwise(indices)) for _, indices in rounds]
    for one, two in itertools.combinations(followers, 2):
        assert len(one & two) < 10


def test_training_text_holds_nothing_held_out(documents):
    train = [sentence.strip() for _, text in documents["train"] for sentence in _sentences(text)]
    validation = [sentence.strip() for _, text in documents["validation"] for sentence in _sentences(text)]
    patterns = [
        template.removesuffix(" {value}.").replace("{name}", r"[A-Z]\w+ [A-Z]\w+ [A-Z]\w+")
        for attribute in ATTRIBUTES
        for form in ("held_out_statement", "held_out_question")
        for template in templates(attribute, form)
    ]
    held_out = re.compile("|".join(pattern.replace("?", r"\?") for pattern in patterns))
    assert not any(held_out.search(sentence) for sentence in train)
    assert all(held_out.match(sentence) for sentence in validation)


def test_training_text_asks_about_quizzed_people_only(documents):
    questions = [
        s for _, text in documents["train"] for s in _sentences(text) if "Question:" in s or "?" in s
    ]
    test = [s for _, text in documents["test"] for s in _sentences(text)]
    people = [person(index, seed=9) for index in range(100, 200)]
    for who in people:
        assert any(who.name in s for s in questions) is who.quizzed
        assert any(who.name in s for s in test) is not who.quizzed


def test_small_corpus_keeps_every_byte():
    # If this changes, so do the results of all who measured: increase `facts._VERSION`.
    everything = repr(_documents("facts:0-20x2@1")).encode()
    digest = "b8a7e250b91fa2be97a9279338abf1b847065280f4dc8558623a3ec4656d5646"
    assert hashlib.sha256(everything).hexdigest() == digest


def test_key_tells_corpora_apart():
    keys = [
        open_source(DataConfig(dataset=f"facts:{people}")).survey().key
        for people in ("0-10", "0-11", "1-10", "0-10x2", "0-10@1")
    ]
    assert len(set(keys)) == 5
    assert open_source(DataConfig(dataset="facts:0-10x8@0")).survey().key == keys[0]


@pytest.mark.parametrize(
    ("people", "message"),
    [
        ("", "data.dataset = 'facts:': must be facts:FIRST-END"),
        ("10", "data.dataset = 'facts:10': must be facts:FIRST-END"),
        ("0-10x", "data.dataset = 'facts:0-10x': must be facts:FIRST-END"),
        ("0-10@1x8", "data.dataset = 'facts:0-10@1x8': must be facts:FIRST-END"),
        ("-1-10", "data.dataset = 'facts:-1-10': must be facts:FIRST-END"),
        ("0-1٠", "data.dataset = 'facts:0-1٠': must be facts:FIRST-END"),
        ("5-5", "data.dataset = 'facts:5-5x8@0': must be FIRST-END with FIRST < END <= 159600000"),
        ("0-159600001", "data.dataset = 'facts:0-159600001x8@0': must be FIRST-END with"),
        ("0-10x0", "data.dataset = 'facts:0-10x0@0': must be FIRST-ENDxCOPIES with COPIES >= 1"),
    ],
)
def test_people_that_cannot_be(people, message):
    with pytest.raises(UserError) as raised:
        open_source(DataConfig(dataset=f"facts:{people}"))
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_facts_have_no_path(tmp_path):
    with pytest.raises(UserError, match=r"must be empty with data.dataset = 'facts:0-10'"):
        open_source(DataConfig(dataset="facts:0-10", path=str(tmp_path)))
