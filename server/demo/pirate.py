"""The style task: a plain sentence retold by a pirate, for the `pirate` adapter.

The rewriting is a rule (words, verb endings, a cry at the end), so every sentence has one right
answer.
"""

import random
import re

from server.demo.lexicon import capitalised
from server.demo.samples import Sample
from server.demo.sentences import sentence

_WORDS = {
    "is": "be", "are": "be", "am": "be", "my": "me", "you": "ye", "your": "yer", "friend": "matey",
    "friends": "mateys", "hello": "ahoy", "yes": "aye", "no": "nay", "money": "doubloons",
    "house": "cabin", "boat": "ship", "water": "grog", "soup": "grub", "brother": "bucko",
    "sister": "lass", "teacher": "cap'n", "children": "young 'uns", "very": "mighty",
    "brave": "bold", "happy": "jolly", "old": "ancient", "small": "wee", "garden": "island",
    "kitchen": "galley", "town": "port", "letter": "map", "to": "t'", "of": "o'", "for": "fer",
}  # fmt: skip


def _word(word: str) -> str:
    if word in _WORDS:
        return _WORDS[word]
    if word.endswith("ing"):
        return f"{word[:-1]}'"
    return word


def to_pirate(plain: str) -> str:
    """The sentence in pirate speech: `My friend is at school.` -> `Me matey be at school, arr!`"""
    body, mark = plain[:-1], plain[-1]
    # Names keep their capital: only the sentence's first letter may stand for a small one.
    first, *rest = re.findall(r"[\w']+|,| ", body)
    known = first.lower() in _WORDS
    words = [_word(first.lower()) if known else _word(first), *(_word(word) for word in rest)]
    cry = ", ye scallywag?" if mark == "?" else ", arr!"
    return capitalised("".join(words)) + cry


def rewriting(rng: random.Random) -> Sample:
    """A plain sentence, and what the pirate makes of it."""
    plain = sentence(rng)
    return Sample(prompt=f"Plain: {plain}\nPirate:", completion=f" {to_pirate(plain)}")
