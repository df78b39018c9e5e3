"""Everyday facts as short paragraphs: opposites, colours, animals, days, months, jobs, tools,
counting.

`fact_pair` gives one fact as a question with its answer; paragraphs and `dialogs` are both made of
those.
"""

import random

from server.demo import lexicon as lex


def _opposite(rng: random.Random) -> tuple[str, str]:
    first, second = rng.choice(lex.OPPOSITES)
    if rng.random() < 0.5:
        first, second = second, first
    return f"What is the opposite of {first}?", f"The opposite of {first} is {second}."


def _colour(rng: random.Random) -> tuple[str, str]:
    thing, colour = rng.choice(list(lex.COLOUR_OF.items()))
    return f"What colour is {thing}?", f"{lex.capitalised(thing)} is {colour}."


def _animal(rng: random.Random) -> tuple[str, str]:
    animal = rng.choice(lex.ANIMALS)
    name = lex.with_article(animal.name)
    title = lex.capitalised(name)
    return rng.choice(
        [
            (f"What sound does {name} make?", f"{title} {animal.sound}."),
            (f"How many legs does {name} have?", f"{title} has {animal.num_legs} legs."),
            (f"Where does {name} live?", f"{title} lives in {animal.home}."),
            (f"What does {name} eat?", f"{title} eats {animal.food}."),
            (
                f"What kind of animal is {name}?",
                f"{title} is {lex.with_article(animal.kind)}.",
            ),
            (
                f"What do we call a young {animal.name}?",
                f"A young {animal.name} is called {lex.with_article(animal.young)}.",
            ),
        ]
    )


def _calendar(rng: random.Random) -> tuple[str, str]:
    names, unit = rng.choice([(lex.DAYS, "day"), (lex.MONTHS, "month")])
    idx = rng.randrange(len(names))
    name, after, before = names[idx], names[(idx + 1) % len(names)], names[idx - 1]
    if rng.random() < 0.6:
        return f"Which {unit} comes after {name}?", f"The {unit} after {name} is {after}."
    return f"Which {unit} comes before {name}?", f"The {unit} before {name} is {before}."


def _job(rng: random.Random) -> tuple[str, str]:
    job, work = rng.choice(list(lex.JOBS.items()))
    name = lex.with_article(job)
    return f"What does {name} do?", f"{lex.capitalised(name)} {work}."


def _purpose(rng: random.Random) -> tuple[str, str]:
    tool, purpose = rng.choice(list(lex.PURPOSES.items()))
    return f"What do we use {tool} for?", f"We use {tool} to {purpose}."


def _dish(rng: random.Random) -> tuple[str, str]:
    cuisine, dish = rng.choice(list(lex.DISHES.items()))
    name = lex.with_article(cuisine)
    return (
        f"What does {name} restaurant serve?",
        f"{lex.capitalised(name)} restaurant serves {dish}.",
    )


def _count(rng: random.Random) -> tuple[str, str]:
    start = rng.randrange(0, 31)
    stop = start + rng.randrange(3, 10)
    numbers = ", ".join(str(number) for number in range(start, stop + 1))
    return f"Can you count from {start} to {stop}?", f"{numbers}."


_KINDS = [_opposite, _colour, _animal, _animal, _calendar, _job, _purpose, _dish, _count]


def fact_pair(rng: random.Random) -> tuple[str, str]:
    """One fact as (question, answer), both whole sentences."""
    return rng.choice(_KINDS)(rng)


def facts_text(rng: random.Random) -> str:
    """A paragraph of two to five facts, as statements or as questions with answers."""
    kind = rng.choice(_KINDS)
    # Half of the paragraphs keep to one subject, as a person would.
    pairs = [
        (kind if rng.random() < 0.5 else rng.choice(_KINDS))(rng) for _ in range(rng.randint(2, 5))
    ]
    if rng.random() < 0.3:
        return "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)
    return " ".join(answer for _, answer in pairs)
