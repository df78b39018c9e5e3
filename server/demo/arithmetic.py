"""Number facts for the base model, and the word problems of the `arithmetic` adapter.

The base meets sums, differences and products as bare facts; only the adapter sees a problem told
in words with its worked answer.
"""

import random

from server.demo import lexicon as lex
from server.demo.samples import Sample


def _operands(rng: random.Random) -> tuple[int, str, int, int]:
    """(left, sign, right, result): sums up to 40, differences from at most 40, products up to
    81.
    """
    sign = rng.choice("+-x")
    if sign == "+":
        left, right = rng.randint(2, 20), rng.randint(1, 20)
        return left, sign, right, left + right
    if sign == "-":
        left = rng.randint(2, 40)
        right = rng.randint(1, min(left, 20))
        return left, sign, right, left - right
    left, right = rng.randint(2, 9), rng.randint(2, 9)
    return left, sign, right, left * right


_WORDS = {"+": "plus", "-": "minus", "x": "times"}


def number_fact(rng: random.Random) -> tuple[str, str]:
    """One fact as (question, answer)."""
    left, sign, right, result = _operands(rng)
    word = _WORDS[sign]
    return f"What is {left} {word} {right}?", f"{left} {word} {right} is {result}."


def numbers_text(rng: random.Random) -> str:
    """Some number facts in signs or in words."""
    if rng.random() < 0.3:
        return " ".join(number_fact(rng)[1] for _ in range(rng.randint(3, 8)))
    facts = [_operands(rng) for _ in range(rng.randint(4, 12))]
    return "\n".join(f"{left} {sign} {right} = {result}" for left, sign, right, result in facts)


def word_problem(rng: random.Random) -> Sample:
    """A problem of one step, and its answer: the calculation, then the number."""
    left, sign, right, result = _operands(rng)
    who, friend = rng.sample(lex.PEOPLE, 2)
    things = rng.choice(lex.COUNTABLES)
    if sign == "+":
        problem = rng.choice(
            [
                f"{who.name} has {left} {things}. {friend.name} gives {who.object} {right} more. "
                f"How many {things} does {who.name} have now?",
                f"{who.name} finds {left} {things} and {friend.name} finds {right}. "
                f"How many {things} do they have together?",
                f"There are {left} {things} in a box. {who.name} puts {right} more into it. "
                f"How many {things} are in the box?",
            ]
        )
    elif sign == "-":
        problem = rng.choice(
            [
                f"{who.name} has {left} {things} and gives {right} of them to {friend.name}. "
                f"How many {things} does {who.name} have left?",
                f"{who.name} had {left} {things}, but lost {right}. "
                f"How many {things} does {who.subject} still have?",
                f"There are {left} {things} on the table. {who.name} takes {right} away. "
                f"How many {things} stay on the table?",
            ]
        )
    else:
        problem = rng.choice(
            [
                f"{who.name} has {left} boxes with {right} {things} in each. "
                f"How many {things} does {who.name} have?",
                f"{who.name} buys {right} {things} every day for {left} days. "
                f"How many {things} does {who.subject} buy?",
                f"{left} children have {right} {things} each. "
                f"How many {things} do they have in all?",
            ]
        )
    return Sample(
        prompt=f"Problem: {problem}\nAnswer:",
        completion=f" {left} {sign} {right} = {result}. The answer is {result}.",
    )
