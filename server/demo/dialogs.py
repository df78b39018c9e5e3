"""Chats between a user and the assistant, so that chat requests to the base model get readable
turns.
"""

import random

from server.demo import lexicon as lex
from server.demo.arithmetic import number_fact
from server.demo.facts import fact_pair
from server.demo.sentences import sentence
from server.demo.stories import animal_story

Message = dict[str, str]
"""A chat message as the chat template takes it: `role` and `content`."""

_SYSTEM = [
    "You are a helpful assistant.", "You are a friendly assistant.", "Be brief.",
    "Answer in one sentence.",
]  # fmt: skip

_SMALL_TALK = [
    (["Hello!", "Hi!", "Good morning!", "Hello", "Hi", "Hi there!", "Hello there."],
     ["Hello! How can I help you?", "Hi! What can I do for you?"]),
    (["How are you?", "How are you today?", "Are you well?"],
     ["I am well, thank you. How are you?", "I am fine, thank you."]),
    (["Who are you?", "What are you?", "What is your name?"],
     ["I am a very small language model. I know a few facts and stories."]),
    (["What can you do?", "How can you help me?", "Help me.", "Help!"],
     ["I can answer simple questions, count, add small numbers "
      "and tell short stories."]),
    (["Thank you.", "Thanks!", "Thank you very much!", "That is good."],
     ["You are welcome.", "You are welcome! Ask me more."]),
    (["Goodbye.", "Bye!", "See you soon."], ["Goodbye!", "Goodbye! Come back soon."]),
]  # fmt: skip

_UNKNOWN = [
    "Who is the president?", "What is the meaning of life?", "What is the news today?",
    "How tall is that tower?", "Can you write code?", "What is the weather tomorrow?",
    "How far is the moon?", "Who won the game?", "Can you speak French?",
    "What is the capital of France?", "How do I fix my computer?",
]  # fmt: skip


def _exchange(rng: random.Random) -> tuple[str, str]:
    """One user turn and its answer."""
    kind = rng.random()
    if kind < 0.45:
        return fact_pair(rng)
    if kind < 0.55:
        return number_fact(rng)
    if kind < 0.70:
        questions, answers = rng.choice(_SMALL_TALK)
        return rng.choice(questions), rng.choice(answers)
    if kind < 0.82:
        text = sentence(rng)
        return f"{rng.choice(['Please repeat', 'Repeat', 'Say', 'Please say'])}: {text}", text
    if kind < 0.94:
        hero, text = animal_story(rng)
        ask = rng.choice(
            ["Tell me a story about", "Please tell me a short story about", "Tell me about"]
        )
        return f"{ask} {lex.with_article(hero)}.", text
    return rng.choice(_UNKNOWN), "I do not know. I am a very small model."


def dialog(rng: random.Random) -> list[Message]:
    """One to four exchanges, now and then under a system message."""
    messages: list[Message] = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM)})
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        question, answer = _exchange(rng)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages
