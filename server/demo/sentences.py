"""Single plain sentences of everyday life, the raw material of the style task and of copying tasks.

The space is some tens of thousands of sentences, so that held-out ones are new to every reader of
a few hundred.
"""

import random

from server.demo import lexicon as lex

_ACTIVITIES = [
    "reading a book", "cooking soup", "singing a song", "cleaning the boat", "looking for the key",
    "drinking water", "eating an apple", "painting the door", "talking to the teacher",
    "feeding the dog", "carrying a box", "waiting for a friend", "playing the drum",
    "writing a letter", "counting the money",
]  # fmt: skip


def _who(rng: random.Random) -> tuple[str, str]:
    """A subject and its form of `be`."""
    job = rng.choice(list(lex.JOBS))
    return rng.choice(
        [
            (rng.choice(lex.PEOPLE).name, "is"),
            (rng.choice(lex.PEOPLE).name, "is"),
            ("my friend", "is"),
            ("my brother", "is"),
            ("my sister", "is"),
            (f"the {job}", "is"),
            (f"the {rng.choice(lex.ADJECTIVES)} {job}", "is"),
            ("the children", "are"),
            ("my friends", "are"),
            ("you", "are"),
            ("we", "are"),
            ("I", "am"),
        ]
    )


def sentence(rng: random.Random) -> str:
    """One statement, question or greeting with its final mark."""
    who, be = _who(rng)
    place, thing = rng.choice(lex.PLACES), rng.choice(lex.THINGS)
    colour, adjective = rng.choice(lex.COLOURS), rng.choice(lex.ADJECTIVES)
    animal, activity = rng.choice(lex.ANIMALS).name, rng.choice(_ACTIVITIES)
    has = "has" if be == "is" else "have"
    wants = "wants" if be == "is" else "want"
    text = rng.choice(
        [
            f"{who} {be} {place}.",
            f"{who} {be} {activity} {place}.",
            f"{who} {be} {activity}.",
            f"{who} {has} a {colour} {thing}.",
            f"{who} {has} {lex.with_article(adjective)} {animal}.",
            f"{who} {wants} to buy your {thing}.",
            f"{who} {wants} to see my {animal}.",
            f"the {animal} {place} is {adjective}.",
            f"your {thing} is {place}.",
            f"my {colour} {thing} is {place}.",
            f"yes, {who} {be} very {adjective} today.",
            f"no, {who} {be} not {place}.",
            f"hello, my friend, {who} {be} {place}.",
            f"where is your {colour} {thing}?",
            f"{be} {who} {activity} {place}?",
            f"do you have {lex.with_article(adjective)} {animal}?",
        ]
    )
    return lex.capitalised(text)
