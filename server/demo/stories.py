"""Stories of four to eight sentences from small grammars: someone loses, meets, makes or shares
something.
"""

import random

from server.demo import lexicon as lex


def _lost(rng: random.Random, who: lex.Person, friend: lex.Person) -> list[str]:
    thing, colour = rng.choice(lex.THINGS), rng.choice(lex.COLOURS)
    first, second = rng.sample(lex.PLACES, 2)
    return [
        f"{who.name} had a {colour} {thing}.",
        f"One day {who.subject} could not find the {thing}.",
        f"{lex.capitalised(who.subject)} looked {first}, but the {thing} was not there.",
        f"Then {friend.name} came and helped {who.object}.",
        f"They found the {colour} {thing} {second}.",
        f'"Thank you, {friend.name}," said {who.name}.',
    ]


def _met_animal(rng: random.Random, who: lex.Person, friend: lex.Person) -> list[str]:
    animal, adjective = rng.choice(lex.ANIMALS), rng.choice(lex.ADJECTIVES)
    weather = lex.with_article(rng.choice(lex.WEATHER))
    return [
        f"It was {weather} day, and {who.name} was {rng.choice(lex.PLACES)}.",
        f"{lex.capitalised(who.subject)} saw {lex.with_article(adjective)} {animal.name}.",
        f"The {animal.name} was hungry.",
        f"{who.name} gave it some {animal.food}.",
        f"Now the {animal.name} was happy, and it went home to {animal.home}.",
        f"{who.name} told {friend.name} about the {adjective} {animal.name}.",
    ]


def _shared(rng: random.Random, who: lex.Person, friend: lex.Person) -> list[str]:
    things, num_things = rng.choice(lex.COUNTABLES), rng.randint(3, 20)
    given = rng.randint(1, num_things - 1)
    return [
        f"{who.name} had {num_things} {things}.",
        f"{who.name} met {friend.name} {rng.choice(lex.PLACES)}.",
        f'"May I have some of your {things}?" asked {friend.name}.',
        f'"Yes, you may," said {who.name}, and gave {friend.object} {given}.',
        f"Then {who.name} had {num_things - given} {things}.",
        "They sat down and smiled.",
    ]


def _meal(rng: random.Random, who: lex.Person, friend: lex.Person) -> list[str]:
    cuisine, dish = rng.choice(list(lex.DISHES.items()))
    return [
        f"On {rng.choice(lex.DAYS)} {who.name} and {friend.name} were hungry.",
        f"They went to {lex.with_article(cuisine)} restaurant.",
        f"{who.name} asked for the {dish}.",
        f"{friend.name} asked for some soup.",
        f"The food was {rng.choice(['good', 'cheap and good', 'expensive, but good'])}.",
        f'"Let us come back in {rng.choice(lex.MONTHS)}," said {friend.name}.',
    ]


def _work(rng: random.Random, who: lex.Person, friend: lex.Person) -> list[str]:
    job, work = rng.choice(list(lex.JOBS.items()))
    return [
        f"{who.name} is {lex.with_article(job)}.",
        f"{lex.capitalised(who.subject)} {work} every day.",
        f"On {rng.choice(lex.DAYS)} {who.subject} does not work.",
        f"Then {who.subject} meets {friend.name} {rng.choice(lex.PLACES)}.",
        f"They talk about {rng.choice(lex.COUNTABLES)} and {rng.choice(lex.COUNTABLES)}.",
    ]


def _about(rng: random.Random, first: lex.Animal) -> list[str]:
    second = rng.choice([animal for animal in lex.ANIMALS if animal is not first])
    return [
        f"Once there was {lex.with_article(rng.choice(lex.ADJECTIVES))} {first.name}.",
        f"The {first.name} lived in {first.home} and ate {first.food}.",
        f"One day the {first.name} met {lex.with_article(second.name)}.",
        f'"I like {second.food}," said the {second.name}.',
        f'"I like {first.food} more," said the {first.name}.',
        f"So they shared a meal {rng.choice(lex.PLACES)} and became friends.",
    ]


def _animals(rng: random.Random, _who: lex.Person, _friend: lex.Person) -> list[str]:
    return _about(rng, rng.choice(lex.ANIMALS))


_KINDS = [_lost, _met_animal, _shared, _meal, _work, _animals]


def story(rng: random.Random) -> str:
    """One story; a sentence in the middle is left out now and then, so that no order is certain."""
    who, friend = rng.sample(lex.PEOPLE, 2)
    sentences = rng.choice(_KINDS)(rng, who, friend)
    if rng.random() < 0.3:
        sentences[-1] = rng.choice(["It was a good day.", "Then they all went home.", "The end."])
    return " ".join(sentences)


def animal_story(rng: random.Random) -> tuple[str, str]:
    """An animal's name and a story about it."""
    hero = rng.choice(lex.ANIMALS)
    return hero.name, " ".join(_about(rng, hero))
