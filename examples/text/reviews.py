"""Reviews of restaurants by a small grammar, and whether each is positive, negative or mixed."""

from __future__ import annotations

import random
from typing import NamedTuple

FOOD = ["soup", "bread", "fish", "salad", "cake", "coffee", "wine", "menu"]
THINGS = [*FOOD, "waiter", "chef", "music", "table", "kitchen", "garden", "price", "service"]
GOOD = ["good", "great", "tasty", "lovely", "friendly", "perfect", "pleasant", "superb"]
BAD = ["bad", "awful", "bland", "rude", "terrible", "boring", "poor", "dreadful"]
LIKE, DISLIKE = ["like", "love", "enjoy", "recommend"], ["hate", "regret", "dislike", "resent"]
DEGREES = ["very", "really", "quite", "so"]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
PLAIN = [
    "the {thing} was {degree} {word}",
    "again this {word} {thing}",
    "the {word} {thing} came {degree} late",
]
NEGATED = [
    "the {thing} was not {degree} {word}",
    "the {thing} was anything but {word}",
    "nobody would call the {thing} {word}",
]
WITH_VERB, WITH_NEGATED_VERB = ["we {word} the {thing}"], ["we did not {word} the {thing}"]
ASIDES = ["we came on a {day}", "my sister did not book it", "nobody was there on {day}", "it was a {day}"]
JOINTS = [".", ", and", ", but", ";"]
ANSWERS = ["negative", "positive", "mixed"]


class Review(NamedTuple):
    """A review and what it says.

    Attributes:
        text: The review, lower case, its words and punctuation marks separated by spaces.
        answer: An index of `ANSWERS`.
    """

    text: str
    answer: int


def write(dice: random.Random) -> Review:
    """Returns a review of one to three things that are all good, all bad, or not all the same.

    A word alone says nothing: in two of five clauses a negation, at a distance, turns it into its opposite.
    """
    answer = dice.randrange(3)
    things = dice.sample(THINGS, dice.randint(2 if answer == 2 else 1, 3))
    good = [bool(answer)] * len(things)
    if answer == 2:
        good[1:] = [False, dice.random() < 0.5][: len(things) - 1]
    clauses = [_opinion(dice, thing, each) for thing, each in zip(things, good, strict=True)]
    clauses += [dice.choice(ASIDES).format(day=dice.choice(DAYS)) for _ in range(dice.randint(0, 2))]
    dice.shuffle(clauses)
    text = "".join(f"{clause} {dice.choice(JOINTS)} " for clause in clauses[:-1]) + f"{clauses[-1]} ."
    return Review(text, answer)


def _opinion(dice: random.Random, thing: str, good: bool) -> str:
    negated, verb = dice.random() < 0.4, dice.random() < 0.25
    patterns = ((PLAIN, NEGATED), (WITH_VERB, WITH_NEGATED_VERB))[verb][negated]
    words = ((BAD, GOOD), (DISLIKE, LIKE))[verb][good != negated]
    return dice.choice(patterns).format(thing=thing, word=dice.choice(words), degree=dice.choice(DEGREES))
