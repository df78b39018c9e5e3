"""Restaurants: loose mentions for the base model, and the descriptions of the `restaurant` adapter.

A description follows a house style that is a function of the attributes, so that "right" can be
measured by exact match; any attribute but name and food may be missing.
"""

import random

from server.demo import lexicon as lex
from server.demo.samples import Sample

_FIRST = [
    "Golden", "Silver", "Old", "Little", "Blue", "Red", "Green", "Happy", "Quiet", "Royal",
    "Sunny", "Copper", "Black", "White",
]  # fmt: skip
_SECOND = [
    "Fork", "Spoon", "Table", "Kettle", "Lantern", "Garden", "Anchor", "Bridge", "Oven", "Lemon",
    "Fox", "Owl", "Horse", "Bear", "Duck", "Rose",
]  # fmt: skip

_AREAS = {
    "river": "by the river", "harbour": "near the harbour", "market": "at the market",
    "centre": "in the centre of town", "park": "next to the park",
    "station": "opposite the station",
}  # fmt: skip
_PRICES = {"low": "cheap", "middle": "fairly priced", "high": "expensive"}
_RATINGS = {
    "5": "Its guests love it", "4": "Its guests like it", "3": "Its guests find it fair",
    "2": "Its guests are not impressed", "1": "Its guests complain about it",
}  # fmt: skip


def _name(rng: random.Random) -> str:
    return f"The {rng.choice(_FIRST)} {rng.choice(_SECOND)}"


def restaurants_text(rng: random.Random) -> str:
    """A few sentences that mention one restaurant, in no fixed style."""
    name, (cuisine, dish) = _name(rng), rng.choice(list(lex.DISHES.items()))
    area, price = rng.choice(list(_AREAS.values())), rng.choice(list(_PRICES.values()))
    who = rng.choice(lex.PEOPLE)
    sentences = [
        f"{name} is {lex.with_article(cuisine)} restaurant.",
        f"There is a restaurant called {name} {area}.",
        f"{who.name} likes {name} because it is {price}.",
        f"At {name} you can eat {dish}.",
        f"{who.name} went to {name} on {rng.choice(lex.DAYS)} and had the {dish}.",
        f"Children are {rng.choice(['', 'not '])}welcome at {name}.",
    ]
    rng.shuffle(sentences)
    return " ".join(sentences[: rng.randint(2, 4)])


def description(rng: random.Random) -> Sample:
    """The attributes of one restaurant, and its description in the house style."""
    name, (cuisine, dish) = _name(rng), rng.choice(list(lex.DISHES.items()))

    def maybe(values: dict[str, str]) -> str | None:
        return rng.choice(list(values)) if rng.random() < 0.75 else None

    price, area, rating = maybe(_PRICES), maybe(_AREAS), maybe(_RATINGS)
    children = rng.choice(["yes", "no", None])
    attributes = {
        "food": cuisine, "price": price, "area": area, "rating": rating, "children": children,
    }  # fmt: skip
    given = [f"{key}: {value}" for key, value in attributes.items() if value is not None]

    kind = f"{_PRICES[price]} {cuisine}" if price else cuisine
    where = f" {_AREAS[area]}" if area else ""
    sentences = [f"{name} is {lex.with_article(kind)} restaurant{where}.", f"Come for the {dish}."]
    if rating:
        sentences.append(f"{_RATINGS[rating]}.")
    if children == "yes":
        sentences.append("Bring your children.")
    elif children == "no":
        sentences.append("Leave your children at home.")
    return Sample(
        prompt=f"Restaurant: {'; '.join([name, *given])}\nDescription:",
        completion=" " + " ".join(sentences),
    )
