"""Environments: tasks, verifiers, episodes and demonstrations. The lowest module: it knows no model.

    env = make("gp-l", variant="id", seed=0, verify_iter=5)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step(env.expert_reply())

An episode is a conversation (sequential revision, section 3 of arXiv 2501.17161): the model replies, the
verifier judges the whole reply and answers, and both join the prompt of the next turn, until all decisions
are solved or the budget of one, `verify_iter` replies, is used up. Arithmetic is exact; model text is never
evaluated as code. A new task subclasses `Environment`: `--task FILE.py:CLASS`.
"""

import argparse
import ast
import cmath
import copy
import importlib.util
import json
import math
import operator
import pickle
import pickletools
import random
import re
import string
import sys
import typing
import unicodedata
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property, lru_cache, partial
from itertools import combinations, combinations_with_replacement, pairwise, product, takewhile, zip_longest
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

# ---- options


@dataclass(frozen=True)
class Option:
    """Help text and limits of one option. A class lists its options as annotated attributes, which its
    constructor checks and the command line makes flags:

        target: Annotated[int, Option("the number to make", least=1)] = 24
    """

    help: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # an exclusive `least`
    choices: tuple = ()
    metavar: str | None = None  # FILE: the flag takes a file's text

    def check(self, name: str, kind: Any, value: Any) -> None:
        """Raises ValueError in one line for a value of another type or outside the limits."""
        if not _fits(kind, value):
            words = kind.__name__ if isinstance(kind, type) else re.sub(r"\w+\.", "", str(kind))
            raise ValueError(f"{name} must be {words}, not {one_line(repr(value))}")
        if self.choices and value is not None and value not in self.choices:
            raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(map(str, self.choices))}")
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, (int, float)) and not (self.least <= x <= self.most and x > self.above):
                raise ValueError(f"{name} must be {self.limits() or 'a finite number'}, not {x}")

    def limits(self) -> str:
        """The limits in words, "" if there are none."""
        limits = (("at least", self.least), ("above", self.above), ("at most", self.most))
        return " and ".join(f"{words} {x}" for words, x in limits if math.isfinite(x))

    def flag(self, kind: Any, default: Any) -> dict:
        """Arguments of argparse's `add_argument`; the default ... makes the option required."""
        parts, many = typing.get_args(kind), typing.get_origin(kind) is tuple
        kind = parts[0] if parts else kind  # of int | None, or of a pair of them, the integer
        limits = ": " + ", ".join(self.choices) if self.choices else ", " + self.limits()
        text = (self.help + limits).removesuffix(", ")
        if default not in (None, ...) and self.metavar != "FILE":
            words = " ".join(map(str, default)) if many else default
            text += f" (default: {('no', 'yes')[default] if kind is bool else words})"
        flag = {"help": text.replace("%", "%%"), "default": default, "required": default is ...}
        if kind is bool:
            return flag | {"action": argparse.BooleanOptionalAction}
        return flag | {"type": kind, "metavar": self.metavar, "nargs": len(parts) if many else None}


# ---- episodes

Picture = Image.Image | Callable[[], Image.Image] | None  # a function draws it on first use


@dataclass(frozen=True)
class Observation:
    """The model's input: all chat messages of the episode and its picture, if any. Then one message's content
    is a list of parts, and the part of type "image" marks the position of the picture.
    """

    messages: list[dict[str, Any]]
    picture: Picture = None

    @property
    def image(self) -> Image.Image | None:
        """The picture, the same object at every access."""
        return self.picture() if callable(self.picture) else self.picture


class Verdict(NamedTuple):
    """The verifier's judgement of one reply."""

    verdict: str  # a key of the task's rewards; "correct" solves the decision
    feedback: str
    recognized: bool = False  # the reply names what the picture shows


class Environment:
    """One task. A subclass defines `begin`, `judge`, `expert_reply`, `wrong_reply` and, for other
    verdicts, `rewards`.

    An episode has one decision (a hand of cards) or several (the waypoints of a route). A correct reply leads
    to the next one; a wrong one gets feedback, and `verify_iter` wrong ones end the episode. Attributes
    annotated with an `Option` are options of the constructor and the command line.

    Args:
        variant: a key of `variants`; training takes "id".
        seed: of the random generator.
        rewards: by verdict, over the task's defaults.

    Raises ValueError for a wrong argument.
    """

    variants = {"id": "in distribution"}  # and their names in the report
    rewards = {"correct": 1.0, "wrong": -1.0, "budget": 0.0}  # "budget" is added when the last reply fails
    decisions = 1  # per episode
    pictures = False  # whether every decision comes with a picture
    answer_field = ""  # the last of `fields`; what stands before it is thought
    start_options = {}  # of `reset`, by name: type and help for `sftrl play`
    headline = "success"  # or "step_accuracy": the main measure of a study

    verify_iter: Annotated[int, Option("most replies per decision, the verification budget", least=1)] = 5
    fields: Sequence[str] = ()  # names of a reply's fields, the answer's last
    continue_after_failure: bool = False  # go on to the next decision, in evaluation

    def __init__(
        self,
        variant: str = "id",
        seed: int = 0,
        rewards: dict[str, float] | None = None,
        **options,
    ):
        Option("", choices=tuple(self.variants)).check("variant", str, variant)
        if not _fits(dict | None, rewards):
            raise ValueError(f"rewards must be a dict by verdict, not {one_line(repr(rewards))}")
        defaults = {"budget": 0.0} | self.rewards
        for name, value in (rewards or {}).items():
            Option("", choices=tuple(defaults)).check("reward", str, name)
            if not _fits(float, value) or not math.isfinite(value):
                raise ValueError(f"the reward {name!r} must be a finite number, not {one_line(repr(value))}")
        cls = type(self)
        known, listed = _type_hints(cls), options_of(cls)
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"{cls.__name__} has no option {name!r}: choose from {', '.join(listed)}")
            if name in listed:
                kind, _, option = listed[name]
                option.check(name, kind, value)
            setattr(self, name, value)
        if not len(set(self.fields)) == len(self.fields) == len(cls.fields):
            raise ValueError(f"fields must be {len(cls.fields)} different names, not {self.fields!r}")
        self.answer_field = self.fields[-1] if self.fields else self.answer_field
        self.variant, self.random, self.rewards = variant, random.Random(seed), defaults | (rewards or {})
        self.picture: Picture = None

    # What a subclass defines:

    def begin(self, options: dict) -> str:
        """Draws an episode from `self.random`, or as `options` of `reset` fix it, and returns its prompt."""
        raise NotImplementedError

    def judge(self, reply: str) -> Verdict:
        """Judges any string as the reply to the current decision."""
        raise NotImplementedError

    def expert_reply(self) -> str:
        """A reply that the verifier accepts now."""
        raise NotImplementedError

    def wrong_reply(self) -> str:
        """A reply that is not correct now."""
        raise NotImplementedError

    def next_message(self, right: bool, moved: bool) -> str:
        """The user message after a reply; `moved`: it presents the next decision, `self.decision`, too."""
        return self.verdict.feedback

    def draw(self) -> Picture:
        """The picture of the current decision, or a cached function that draws it."""
        return None

    def describe(self) -> dict:
        """More entries of `info`."""
        return {}

    def starts(self, series: str, n: int | None = None) -> list[tuple[str, dict | None]]:
        """Seed and options of `reset` for each of `n` evaluation episodes (None: the paper's 234)."""
        return [(f"{series}/{i}", None) for i in range(n or 234)]

    @staticmethod
    def measures(episodes: Sequence["Episode"]) -> dict:
        """Measures of an evaluation beside success."""
        return {}

    # What all tasks share:

    def reset(self, seed: int | str | None = None, options: dict | None = None) -> tuple[Observation, dict]:
        """Starts an episode. A seed restarts the random generator."""
        if seed is not None:
            self.random.seed(seed)
        self.decision = self.last_decision = 0  # now, and of the last reply
        self.attempts = 0  # replies to the current decision
        self.failed, self.done = False, (False, False)
        self.verdict: Verdict | None = None
        self.messages: list[dict[str, Any]] = []
        self._append_user_message(self.begin(options or {}), new_picture=True)
        observation = self.observe()
        observation.image  # raises here if it cannot be read
        return observation, self._info()

    def step(self, reply: str) -> tuple[Observation, float, bool, bool, dict]:
        """Judges one reply, any string: observation, reward, terminated (solved), truncated (failed), info.
        After the end of an episode the reward is 0 and nothing changes."""
        if any(self.done):
            return self.observe(), 0.0, *self.done, self._info()
        self.verdict = self.judge(reply)
        if self.verdict.verdict not in self.rewards:
            raise ValueError(f"{type(self).__name__} has no reward for {self.verdict.verdict!r}")
        self.last_decision, self.attempts = self.decision, self.attempts + 1
        right = self.verdict.verdict == "correct"
        used_up = not right and self.attempts >= self.verify_iter
        self.failed |= used_up
        moved = right or used_up
        if moved:
            self.decision, self.attempts = self.decision + 1, 0
        ended = self.decision == self.decisions or used_up and not self.continue_after_failure
        self.done = (ended and not self.failed, ended and self.failed)
        self.messages.append({"role": "assistant", "content": reply})
        if not ended:
            self._append_user_message(self.next_message(right, moved), new_picture=moved)
        reward = self.rewards[self.verdict.verdict] + (self.rewards["budget"] if used_up else 0.0)
        return self.observe(), reward, *self.done, self._info()

    def _append_user_message(self, text: str, new_picture: bool) -> None:
        """Only the newest picture stays in the conversation."""
        content: str | list[dict] = text
        if new_picture and self.pictures:
            for message in self.messages:
                if not isinstance(message["content"], str):
                    message["content"] = message["content"][-1]["text"]
            self.picture = self.draw()
            content = [{"type": "image"}, {"type": "text", "text": text}]
        self.messages.append({"role": "user", "content": content})

    def observe(self) -> Observation:
        return Observation([dict(message) for message in self.messages], self.picture)

    def _info(self) -> dict:
        verdict = self.verdict._asdict() if self.verdict else dict.fromkeys(Verdict._fields)
        return {"decision": self.last_decision} | verdict | self.describe()

    def _reply(self, *values: Any) -> str:
        return json.dumps(dict(zip(self.fields, values)), ensure_ascii=False)

    def _field_names(self) -> dict[str, str]:
        return {f"field_{name.split()[-1]}": given for name, given in zip(type(self).fields, self.fields)}

    @property
    def verdicts(self) -> list[str]:
        return [name for name in self.rewards if name != "budget"]

    def fresh_copy(self) -> "Environment":
        """Another environment with the same options and a new random generator."""
        fresh = copy.copy(self)
        fresh.random = random.Random(0)
        return fresh


@dataclass
class Turn:
    """One reply and its judgement."""

    reply: str
    reward: float
    verdict: str
    feedback: str  # the next user message, at the end the feedback
    recognized: bool
    decision: int = 0  # on a route the waypoint
    landmark: bool = True  # there is something to recognize


@dataclass
class Episode:
    """One conversation. `prompt` is the first user message, `expected` the dealt ranks or a route's expert
    actions."""

    prompt: str
    expected: list[str]
    turns: list[Turn] = field(default_factory=list)
    success: bool = False

    def most_tries(self) -> int:
        return max(Counter(turn.decision for turn in self.turns).values())

    def transcript(self) -> dict:
        names = "reply", "verdict", "reward", "feedback"
        turns = [{name: getattr(turn, name) for name in names} for turn in self.turns]
        return {"prompt": self.prompt, "success": self.success, "turns": turns}


def play(
    environments: Sequence[Environment],
    respond: Callable[[list[int], list[Observation]], list[str | None]],
    seeds: Sequence[int | str] | None = None,
    options: Sequence[dict] | None = None,
    at_once: int | None = None,
    watch: Callable[[int], None] = lambda done: None,
) -> list[Episode]:
    """Plays one episode in every environment, in lockstep, `at_once` of them at a time (None: all).

    `respond` gets the indices and observations of the running environments and returns one reply each; None
    ends an episode without success. `seeds` and `options` go to `reset`; `watch` gets the number of
    finished episodes.
    """
    observations, episodes = [], []
    for i, env in enumerate(environments):
        observation, info = env.reset(seeds[i] if seeds else None, options[i] if options else None)
        observations.append(observation)
        expected = info.get("actions", info.get("cards", []))
        episodes.append(Episode(text_of(observation.messages[0]["content"]), expected))
    n = len(environments)
    size = at_once or max(n, 1)
    for first in range(0, n, size):
        last = min(first + size, n)
        running = list(range(first, last))
        while running:
            replies = respond(running, [observations[i] for i in running])
            unfinished = []
            for i, reply in zip(running, replies, strict=True):
                if reply is None:
                    continue
                observations[i], reward, terminated, truncated, info = environments[i].step(reply)
                ended = terminated or truncated
                read = info["feedback"] if ended else text_of(observations[i].messages[-1]["content"])
                where = info.get("decision", 0), info.get("landmark", True)
                turn = Turn(reply, reward, info["verdict"], read, info["recognized"], *where)
                episodes[i].turns.append(turn)
                episodes[i].success = terminated
                if not ended:
                    unfinished.append(i)
            running = unfinished
            watch(last - len(running))
    return episodes


def demonstration(
    env: Environment,
    wrong_turns: int = 0,
    author: Callable[[Any], str] | None = None,
    start: tuple[Any, dict | None] = (None, None),
) -> dict:
    """One SFT record in the released format: for each decision `wrong_turns` wrong replies, then the
    expert's or `author`'s. `start` goes to `reset`. A visual task adds one picture, so its record ends at a
    random decision. Raises ValueError if the budget ends before."""
    if wrong_turns >= env.verify_iter:
        raise ValueError(f"{wrong_turns} wrong turns leave no reply in a budget of {env.verify_iter}")
    env.reset(*start)
    final = final_decision(env)
    for k in range(final + 1):
        for _ in range(wrong_turns):
            env.step(env.wrong_reply())
        reply = author(env) if author else env.expert_reply()
        if k < final:
            env.step(reply)
    return record(env, reply)


def final_decision(env: Environment) -> int:
    """Where a record of this episode ends: at the last decision, with pictures at a random one."""
    if env.pictures and env.decisions > 1:
        return env.random.randrange(env.decisions)
    return env.decisions - 1


def record(env: Environment, reply: str) -> dict:
    """The conversation so far and one more reply, in the released format."""
    speaker, observation = {"user": "human", "assistant": "gpt"}, env.observe()
    messages = [*observation.messages, {"role": "assistant", "content": reply}]
    turns = [{"from": speaker[m["role"]], "value": text_of(m["content"])} for m in messages]
    return ({"image": observation.image} if observation.image else {}) | {"conversations": turns}


def text_of(content: str | list[dict]) -> str:
    """A message's content as text, `<image>` and a newline for a picture, as in the released data."""
    if isinstance(content, str):
        return content
    return "".join("<image>\n" if part["type"] == "image" else part["text"] for part in content)


def parts_of(text: str) -> list[dict]:
    """The inverse of `text_of` for a message with a picture; without `<image>` the picture comes first."""
    *before, after = re.split("<image>\n?", text, maxsplit=1)
    texts = [{"type": "text", "text": text} for text in (*before, after)]
    return [part for part in (*texts[:-1], {"type": "image"}, texts[-1]) if part.get("text") != ""]


# ---- cards: rules and prompt

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("spades", "clubs", "hearts", "diamonds")
COLORS = {"black": SUITS[:2], "red": SUITS[2:], "mixed": SUITS}
OPERATORS = "+-*/"
# What J, Q and K count, by variant (paper, section 3.1).
FACE_RULES = {"id": {"J": 10, "Q": 10, "K": 10}, "rule": {"J": 11, "Q": 12, "K": 13}}
FIELDS = ("cards", "number", "formula")
PROMPT = (  # $cards_list would be the cards as a Python list
    "Make $target from the numbers of the cards, each used once, with the operators $operators and brackets. "
    "Cards: $cards. The ace counts one, $rule. Answer in this form: "
    '{"$field_cards": [...], "$field_number": [...], "$field_formula": "an equation"}'
)
# Feedback by verdict: templates with $target, and $value, $reason or $number (the missing or extra one).
FEEDBACK = {
    "correct": "Correct.",
    "wrong_value": "The formula gives $value, not $target. Try again.",
    "wrong_numbers": "$reason. Try again.",
    "illegal": "The formula is not a legal equation: $reason. Try again.",
    "unparsed": "The answer is not in the form asked for. Try again.",
}
PICTURE_FEEDBACK = FEEDBACK | {"misread": "These are not the cards on the table. Try again."}


class GeneralPoints(Environment):
    """Make `target` from the numbers of `n_cards` cards (paper, section 3.1).

    Variants: "id" (J, Q, K count 10) and "rule" (11, 12, 13, and every hand holds a face card).

    In Python also: `faces`, the values of J, Q, K; `feedback`, templates over those of FEEDBACK.
    """

    variants = {"id": "in distribution", "rule": "under the other rule"}
    # Paper, appendix; an unparsed reply counts as an illegal equation.
    rewards = dict(
        correct=5.0, wrong_value=-1.0, wrong_numbers=-2.0, illegal=-3.0, unparsed=-3.0, budget=-1.0
    )
    start_options = {"cards": (str, 'deal this hand, for example "A 3 K 10"')}
    suits = SUITS

    n_cards: Annotated[int, Option("cards per hand", least=1, most=6)] = 4
    target: Annotated[int, Option("the number to make", least=1)] = 24
    operators: Annotated[str, Option("operators allowed")] = OPERATORS
    replacement: Annotated[bool, Option("deal each rank by itself, as the released code does")] = False
    diverse: Annotated[bool, Option("J, Q, K count anything from 1 to 10, anew in each hand")] = False
    prompt: Annotated[str, Option("a template in place of PROMPT", metavar="FILE")] = PROMPT
    faces: dict[str, int] | None = None
    fields: Sequence[str] = FIELDS
    feedback: dict[str, str] = FEEDBACK

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if not self.operators or set(self.operators) - set(OPERATORS):
            raise ValueError(f"operators must be some of {OPERATORS}, not {self.operators!r}")
        self.operators = "".join(op for op in OPERATORS if op in self.operators)
        self.faces = dict(self.faces or FACE_RULES.get(self.variant, FACE_RULES["id"]))
        if not all(_fits(int, n) and n >= 1 for n in self.faces.values()):
            raise ValueError("what faces count must be integers from 1")
        texts, usual = self.feedback, type(self).feedback
        known = isinstance(texts, dict) and texts.keys() <= usual.keys()
        if not known or not all(isinstance(text, str) for text in texts.values()):
            raise ValueError(f"feedback must be a dict of texts by {', '.join(usual)}")
        self.feedback = usual | texts
        try:
            self._prompt(["A"] * self.n_cards)
        except (KeyError, ValueError) as error:
            raise ValueError(f"the prompt template has a wrong placeholder: {error}") from None
        placeholders = set(string.Template(self.prompt).get_identifiers())
        if not self.pictures and not placeholders & {"cards", "cards_list"}:
            raise ValueError("the prompt template states the cards nowhere: it needs $cards or $cards_list")

    def starts(self, series: str, n: int | None = None) -> list[tuple[str, dict | None]]:
        """New deals; of up to three cards all hands in turn."""
        if self.n_cards > 3 or self.diverse:
            return super().starts(series, n)
        generator = random.Random(series)
        hands = [h for h in combinations_with_replacement(RANKS, self.n_cards) if self._solution(h)]
        if self.variant == "rule":
            hands = [hand for hand in hands if set(hand) & set("JQK")]
        hands = [generator.sample(hand, self.n_cards) for hand in generator.sample(hands, len(hands))]
        return [(f"{series}/{i}", {"cards": hands[i % len(hands)]}) for i in range(n or len(hands))]

    def value_of(self, card: str) -> int:
        """A rank's number under the rule in force."""
        return self.faces.get(card) or (1 if card == "A" else int(card))

    def _prompt(self, cards: Sequence[str]) -> str:
        where = "in the picture, from left to right" if self.pictures else ""
        return string.Template(self.prompt).substitute(
            cards=where or ", ".join(cards),
            cards_list=where or str(list(cards)),
            target=self.target,
            operators=self.operators,
            rule=", ".join(f"{face} is {self.faces[face]}" for face in "JQK"),
            **self._field_names(),
        )

    def begin(self, options: dict) -> str:
        if self.diverse:
            self.faces = {face: self.random.randint(1, 10) for face in "JQK"}
        given = options.get("cards")
        self.cards = self._deal() if given is None else self._checked(given)
        self.numbers = [self.value_of(card) for card in self.cards]
        return self._prompt(self.cards)

    def _checked(self, given: Any) -> list[str]:
        given = given.replace(",", " ").split() if isinstance(given, str) else given
        cards = [str(card).strip().upper() for card in given] if isinstance(given, (list, tuple)) else []
        if len(cards) != self.n_cards or any(card not in RANKS for card in cards):
            raise ValueError(f"cards must be a list of {self.n_cards} of {' '.join(RANKS)}")
        if max(Counter(cards).values()) > len(SUITS) and not self.replacement:
            raise ValueError(f"a deck has no more than {len(SUITS)} cards of a rank")
        if not self._solution(cards):
            raise ValueError(f"the hand {' '.join(cards)} cannot make {self.target}")
        return cards

    def _solution(self, cards: Sequence[str]) -> str | None:
        return solve(tuple(sorted(self.value_of(card) for card in cards)), self.target, self.operators)

    def _deal(self) -> list[str]:
        deck = [rank for rank in RANKS for _ in self.suits]
        n, least = self.n_cards, int(self.variant == "rule")  # J, Q, K in the hand
        for _ in range(100_000):
            if self.replacement:
                cards = self.random.choices(RANKS, k=n - least) + self.random.choices("JQK", k=least)
                self.random.shuffle(cards)
            else:
                cards = self.random.sample(deck, n)
            if sum(card in "JQK" for card in cards) >= least and self._solution(cards):
                return cards
        raise ValueError(f"no hand of {self.n_cards} cards makes {self.target} with {self.operators}")

    def judge(self, reply: str) -> Verdict:
        return judge(reply, self.cards, self.numbers, self.target, self.fields, self.feedback)

    def describe(self) -> dict:
        return {"cards": list(self.cards), "numbers": list(self.numbers)}

    def reply(self, formula: str, cards: Sequence[str] | None = None) -> str:
        """A reply in the required form; `cards` are the dealt ones if None."""
        cards = self.cards if cards is None else cards
        return self._reply(cards, [self.value_of(card) for card in cards], formula)

    def expert_reply(self) -> str:
        return self.reply(f"{self._solution(self.cards)}={self.target}")

    def wrong_reply(self) -> str:
        """A near miss: a solution with its numbers shuffled and an operator changed."""
        solution = re.findall("[0-9]+|.", self._solution(self.cards))
        numbers = [i for i, token in enumerate(solution) if token.isdigit()]
        operators = [i for i, token in enumerate(solution) if token in OPERATORS]
        for _ in range(1000):
            tokens = list(solution)
            for i, k in zip(numbers, self.random.sample(numbers, len(numbers))):
                tokens[i] = solution[k]
            if operators:
                tokens[self.random.choice(operators)] = self.random.choice(self.operators)
            with suppress(Illegal):
                if evaluate_formula("".join(tokens))[0] != self.target:
                    return self.reply("".join(tokens) + f"={self.target}")
        raise ValueError(f"no wrong formula was found for the hand {' '.join(self.cards)}")


# ---- cards: the verifier


def judge(
    reply: str,
    cards: Sequence[str],
    numbers: Sequence[int],
    target: int,
    fields: Sequence[str] = FIELDS,
    feedback: dict[str, str] = FEEDBACK,
) -> Verdict:
    """One verdict per reply, by the first test that fails: form, cards, equation, numbers, value, from the
    gravest fault to the mildest, so penalties never add up.

    `cards` are the dealt ranks, `numbers` their values under the rule in force, `feedback` the templates; the
    cards field is judged only if these have a text for "misread". The right side counts only if the left one
    hits the target.
    """

    def verdict(name: str, **values: str) -> Verdict:
        text = string.Template(feedback[name]).safe_substitute(values, target=target)
        return Verdict(name, text, recognized)

    parsed, recognized = parse_reply(reply, fields) or {}, False
    named, stated, formula = map(parsed.get, fields)
    if not (isinstance(stated, list) and isinstance(formula, str)):
        return verdict("unparsed")
    if isinstance(named, list) and len(named) == len(cards):
        recognized = Counter(str(card).strip().upper() for card in named) == Counter(cards)
    if "misread" in feedback and not recognized:
        return verdict("misread")
    left, equals, right = formula.partition("=")
    try:
        value, used = evaluate_formula(left)
        stated = [str(n).strip() for n in stated[: len(numbers) + 1]]
        if any(re.match("-?0[0-9]", n) for n in stated):
            raise Illegal("a number begins with a zero")
        if value == target and equals and evaluate_formula(right)[0] != target:
            raise Illegal("its two sides differ")
    except Illegal as reason:
        return verdict("illegal", reason=str(reason))
    have = Counter(map(str, numbers))
    for count in (Counter(stated), Counter(map(str, used))):
        if extra := count - have:
            number = _short(next(iter(extra)))
            return verdict("wrong_numbers", reason=f"There is no {number} left to use", number=number)
        if missing := have - count:
            return verdict("wrong_numbers", reason="A number was left out", number=next(iter(missing)))
    if value != target:
        return verdict("wrong_value", value=_short(str(value)))
    return verdict("correct")


def _short(text: str) -> str:
    """A number of a reply, if it is short; feedback repeats nothing else of a reply."""
    return text if re.fullmatch("-?[0-9]{1,10}(/[0-9]{1,10})?", text) else "such number"


# Limits of one side, in characters and nested brackets, so that judging stays fast.
MAX_FORMULA, MAX_BRACKETS = 200, 20


class Illegal(ValueError):
    """Not a legal equation; the message is the reason, as the model reads it."""


def evaluate_formula(side: str) -> tuple[Fraction, list[int]]:
    """Exact value and numbers of one side: integers, brackets and + - * /. Raises `Illegal`."""
    if len(side) > MAX_FORMULA:
        raise Illegal("it is too long")
    if "=" in side:
        raise Illegal("it holds more than one equals sign")
    text = side.translate(str.maketrans("×÷−", "*/-"))
    if not re.fullmatch(r"[-+*/()\s0-9]*", text):
        raise Illegal("it holds something else than numbers, operators and brackets")
    tokens, depth, operand = re.findall(r"[0-9]+|[-+*/()]", text), 0, True  # an operand is expected
    for token in tokens:  # only a plain formula reaches Python's parser
        if operand:
            depth += token == "("
            if depth > MAX_BRACKETS:
                raise Illegal("it has too many brackets")
            if token != "(" and not token.isdigit():
                raise Illegal("a number is missing")
            if token[0] == "0" and token != "0":
                raise Illegal("a number begins with a zero")
            operand = token == "("
        elif token in OPERATORS:
            operand = True
        elif token == ")" and depth:
            depth -= 1
        else:
            raise Illegal("its brackets do not match" if depth or token == ")" else "an operator is missing")
    if operand or depth:
        raise Illegal("a number is missing" if operand else "its brackets do not match")

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        op = OPERATORS[(ast.Add, ast.Sub, ast.Mult, ast.Div).index(type(node.op))]
        a, b = value(node.left), value(node.right)
        if op == "/" and not b:
            raise Illegal("it divides by zero")
        return APPLY[op](a, b)

    tree = ast.parse("".join(tokens), mode="eval").body
    return value(tree), [int(token) for token in tokens if token.isdigit()]


# ---- cards: the solver

APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


class Expression(NamedTuple):
    """A formula in normal form: a sum, first - second, or a product, first / second, of sorted parts. So
    a+(b+c), (c+a)+b and a-(0-b-c) have one text."""

    value: Fraction
    kind: str  # "n" a number, "+" a sum, "*" a product
    first: tuple["Expression", ...]
    second: tuple["Expression", ...]
    text: str


@cache
def solve(numbers: tuple[int, ...], target: int = 24, operators: str = OPERATORS) -> str | None:
    """The canonical formula with value `target` that uses each of `numbers` (sorted) once, or None: that with
    the fewest divisions, then subtractions, then brackets, so that demonstrations follow one rule."""
    if len(numbers) == 1:
        return str(target) if numbers[0] == target else None
    found, t = set(), Fraction(target)
    for left, right in _splits(numbers):
        partners = _expressions(right, operators)
        for value, same in _expressions(left, operators).items():
            # Solve x op y = t for y instead of trying all pairs.
            wanted = [("+", t - value, False), ("-", value - t, False), ("-", t + value, True)]
            if value:
                wanted += [("*", t / value, False), ("/", value / t, False), ("/", t * value, True)]
            for op, need, swap in wanted:
                if op in operators and need in partners:
                    for x, y in product(same.values(), partners[need].values()):
                        found.add(_combine(*((y, op, x) if swap else (x, op, y))).text)
    return min(found, key=lambda f: (f.count("/"), f.count("-"), f.count("("), len(f), f), default=None)


@cache
def _expressions(numbers: tuple[int, ...], operators: str) -> dict[Fraction, dict[str, Expression]]:
    """All formulas that use each of the sorted numbers once: value -> text -> expression."""
    if len(numbers) == 1:
        value, text = Fraction(numbers[0]), str(numbers[0])
        return {value: {text: Expression(value, "n", (), (), text)}}
    found = {}
    for pair in _splits(numbers):
        sides = [[e for same in _expressions(p, operators).values() for e in same.values()] for p in pair]
        for (x, y), op in product(product(*sides), operators):
            for a, b in ((x, y), (y, x))[: 1 + (op in "-/")]:
                if (e := _combine(a, op, b)) is not None:
                    found.setdefault(e.value, {})[e.text] = e
    return found


def _splits(numbers: tuple[int, ...]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All partitions of a sorted multiset into two non-empty ones, the smaller one first."""
    sizes = range(1, len(numbers) // 2 + 1)
    lefts = {left for size in sizes for left in combinations(numbers, size)}
    pairs = ((left, tuple((Counter(numbers) - Counter(left)).elements())) for left in lefts)
    return {tuple(sorted(pair, key=lambda part: (len(part), part))) for pair in pairs}


def _combine(x: Expression, op: str, y: Expression) -> Expression | None:
    if op == "/" and not y.value:
        return None
    kind, join, inverse, bracketed = ("+", "+", "-", "") if op in "+-" else ("*", "*", "/", "+")
    (x1, x2), (y1, y2) = ((e.first, e.second) if e.kind == kind else ((e,), ()) for e in (x, y))
    if op in "-/":
        y1, y2 = y2, y1

    def order(part: Expression) -> tuple:  # compound parts first, then numbers from high to low
        return (1, -part.value, "") if part.kind == "n" else (0, 0, part.text)

    first, second = (tuple(sorted(parts, key=order)) for parts in (x1 + y1, x2 + y2))
    a, b = ([f"({p.text})" if p.kind == bracketed else p.text for p in parts] for parts in (first, second))
    text = join.join(a) + "".join(inverse + part for part in b)
    return Expression(APPLY[op](x.value, y.value), kind, first, second, text)


# ---- cards: the pictures


class GeneralPointsVL(GeneralPoints):
    """GeneralPoints with the cards in a picture, which the reply must name. Variants: also "visual", the
    training rule on red suits."""

    variants = GeneralPoints.variants | {"visual": "on the other colour"}
    rewards = GeneralPoints.rewards | {"misread": -1.5}
    feedback = PICTURE_FEEDBACK
    pictures = True

    color: Annotated[str | None, Option("of the suits; None: the variant's", choices=tuple(COLORS))] = None
    size: Annotated[tuple[int, int], Option("pixels of the picture", least=32, most=4096)] = (1200, 480)
    jitter: Annotated[float, Option("disorder of the cards", least=0, most=1)] = 0.3
    font_size: Annotated[float, Option("the ranks' share of a card's height", least=0.05, most=0.5)] = 0.17

    @property
    def suits(self) -> tuple[str, ...]:
        return COLORS[self.color or ("red" if self.variant == "visual" else "black")]

    def draw(self) -> Image.Image:
        """The hand. Cards of one rank get different suits as long as there are some."""
        left, suits = {}, []
        for card in self.cards:
            left[card] = left.get(card) or self.random.sample(self.suits, len(self.suits))
            suits.append(left[card].pop())
        return draw_hand(self.cards, suits, tuple(self.size), self.jitter, self.font_size, self.random)

    def wrong_reply(self) -> str:
        """A solution of the hand with one card misread, or (half the time) a wrong formula."""
        for _ in range(1000 if self.random.random() < 0.5 else 0):
            cards, i = list(self.cards), self.random.randrange(self.n_cards)
            cards[i] = self.random.choice([rank for rank in RANKS if rank != cards[i]])
            if solution := self._solution(cards):
                return self.reply(f"{solution}={self.target}", cards)
        return super().wrong_reply()


TABLE, PAPER, GOLD, SKIN = (31, 107, 66), (252, 251, 246), (226, 178, 60), (240, 208, 176)  # RGB
INK = dict.fromkeys(COLORS["black"], (20, 20, 24)) | dict.fromkeys(COLORS["red"], (226, 78, 78))
# Rows of the marks on a number card, 0 (top) to 6, in the outer columns and in the middle one.
PIPS = {
    "2": ((), (0, 6)),
    "3": ((), (0, 3, 6)),
    "4": ((0, 6), ()),
    "5": ((0, 6), (3,)),
    "6": ((0, 3, 6), ()),
    "7": ((0, 3, 6), (1.5,)),
    "8": ((0, 3, 6), (1.5, 4.5)),
    "9": ((0, 2, 4, 6), (3,)),
    "10": ((0, 2, 4, 6), (1, 5)),
}


def draw_hand(
    ranks: Sequence[str],
    suits: Sequence[str],
    size: tuple[int, int],
    jitter: float,
    font_size: float,
    rng: random.Random,
) -> Image.Image:
    """Cards side by side on a table of `size` = (width, height) pixels. `jitter` from 0 to 1 moves, turns (up
    to 12 degrees) and scales (up to 10%) each card at random within its slot."""
    picture, slot = Image.new("RGB", size, TABLE), size[0] / len(ranks)
    tall = min(0.94 * size[1], 0.94 * slot * 7 / 5) * (1 - 0.25 * jitter)
    for i, (rank, suit) in enumerate(zip(ranks, suits, strict=True)):
        grow, turn, right, down = (jitter * rng.uniform(-1, 1) for _ in range(4))
        card = draw_card(rank, suit, max(8, round(tall * (1 + 0.1 * grow))), font_size)
        if turn:
            card = card.rotate(12 * turn, Image.BICUBIC, expand=True)
        x = round(slot * i + (slot - card.width) / 2 * (1 + 0.8 * right))
        picture.paste(card, (x, round((size[1] - card.height) / 2 * (1 + 0.8 * down))), card)
    return picture


@lru_cache(maxsize=512)
def draw_card(rank: str, suit: str, height: int, font_size: float) -> Image.Image:
    """One card as RGBA, `height` pixels high and 5/7 as wide; `font_size` is the rank's share of the height.
    Where large letters leave no room a number has one large mark, as the ace."""
    h = 4 * height  # scaled down at the end, for smooth edges
    w = round(h * 5 / 7)
    card, half = (Image.new("RGBA", (w, h)) for _ in range(2))  # half: drawn mirrored, then turned
    mark, gap, ink = _mark(rank, suit, font_size * h), round(0.035 * h), INK[suit]
    card.paste(mark, (gap, gap))
    if rank in PIPS and font_size <= 0.22:
        outer, middle = PIPS[rank]
        for column, row in [(c, r) for c in (-1, 1) for r in outer] + [(0, r) for r in middle]:
            sign, picture = (1, card) if row <= 3 else (-1, half)
            x, y = w * (0.5 + 0.16 * sign * column), h * (0.5 + 0.64 * sign * (row / 6 - 0.5))
            _suit(_Pen(picture, x, y, 0.14 * h), suit)
    elif rank in "JQK":
        frame = [0.24 * w, 0.18 * h, 0.76 * w, 0.775 * h]
        ImageDraw.Draw(card).rectangle(frame, outline=ink, width=max(1, h // 120))
        _figure(_Pen(card, w / 2, 0.52 * h, 0.42 * h), rank, ink)
    else:
        _suit(_Pen(card, w / 2, h / 2, (0.3 if font_size <= 0.22 else 0.2) * h), suit)
    half.alpha_composite(mark, (gap, gap))
    card.alpha_composite(half.rotate(180))
    paper = Image.new("RGBA", (w, h))
    edge = {"outline": (90, 90, 90), "width": max(1, h // 150)}
    ImageDraw.Draw(paper).rounded_rectangle([0, 0, w - 1, h - 1], h // 14, fill=PAPER, **edge)
    paper.alpha_composite(card)
    return paper.resize((round(w / 4), height), Image.LANCZOS)


def _mark(rank: str, suit: str, size: float) -> Image.Image:
    """A card's corner: the rank in a font of `size` pixels, and the suit below it."""
    font, weight = ImageFont.load_default(size), size * 0.035
    left, top, right, bottom = font.getbbox(rank, stroke_width=weight)
    glyph = Image.new("RGBA", (round(right - left), round(bottom - top)))
    ink = {"fill": INK[suit], "stroke_fill": INK[suit], "stroke_width": weight}
    ImageDraw.Draw(glyph).text((-left, -top), rank, font=font, **ink)
    if rank == "10":
        glyph = glyph.resize((round(0.72 * glyph.width), glyph.height))
    mark = Image.new("RGBA", (max(glyph.width, round(0.6 * size)), glyph.height + round(0.65 * size)))
    mark.paste(glyph, (0, 0), glyph)
    _suit(_Pen(mark, glyph.width / 2, glyph.height + 0.36 * size, 0.55 * size), suit)
    return mark


class _Pen:
    """Draws shapes given in units of `size` pixels around the point (x, y)."""

    def __init__(self, picture: Image.Image, x: float, y: float, size: float):
        self.draw, self.x, self.y, self.size = ImageDraw.Draw(picture), x, y, size

    def _at(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(self.x + a * self.size, self.y + b * self.size) for a, b in points]

    def disc(self, a: float, b: float, r: float, color: tuple) -> None:
        self.draw.ellipse(self._at((a - r, b - r), (a + r, b + r)), fill=color)

    def polygon(self, color: tuple, *points: tuple[float, float]) -> None:
        self.draw.polygon(self._at(*points), fill=color)

    def line(self, color: tuple, width: float, *points: tuple[float, float]) -> None:
        self.draw.line(self._at(*points), fill=color, width=max(1, round(width * self.size)))


def _suit(pen: _Pen, suit: str) -> None:
    """A suit mark one unit high."""
    ink = INK[suit]
    if suit == "diamonds":
        return pen.polygon(ink, (0, -0.5), (0.36, 0), (0, 0.5), (-0.36, 0))
    if suit == "hearts":
        pen.disc(-0.22, -0.2, 0.25, ink), pen.disc(0.22, -0.2, 0.25, ink)
        return pen.polygon(ink, (-0.44, -0.08), (0, -0.2), (0.44, -0.08), (0, 0.5))
    if suit == "spades":
        pen.disc(-0.22, 0.12, 0.24, ink), pen.disc(0.22, 0.12, 0.24, ink)
        pen.polygon(ink, (0, -0.5), (0.44, 0.04), (0, 0.2), (-0.44, 0.04))
    else:
        for a, b, radius in ((0, -0.26, 0.22), (-0.26, 0.08, 0.22), (0.26, 0.08, 0.22), (0, 0, 0.12)):
            pen.disc(a, b, radius, ink)
    pen.polygon(ink, (0, -0.1), (0.2, 0.5), (-0.2, 0.5))


def _figure(pen: _Pen, rank: str, ink: tuple) -> None:
    """A head with a feathered cap (J), a crown with balls (Q), or a crown with a cross (K)."""
    pen.polygon(ink, (-0.42, 0.6), (0.42, 0.6), (0.26, 0.24), (-0.26, 0.24))
    if rank == "Q":
        pen.disc(0, 0.06, 0.3, ink)
    pen.disc(0, 0.02, 0.22, SKIN)
    if rank == "J":
        pen.polygon(ink, (-0.3, -0.1), (0.3, -0.1), (0.18, -0.3), (-0.24, -0.26))
        pen.line(GOLD, 0.07, (0.18, -0.2), (0.42, -0.56))
    elif rank == "Q":
        left = (-0.26, -0.12), (-0.34, -0.42), (-0.12, -0.26)
        pen.polygon(GOLD, *left, (0, -0.46), *((-a, b) for a, b in reversed(left)))
        for a, b in ((-0.34, -0.44), (0, -0.48), (0.34, -0.44)):
            pen.disc(a, b, 0.06, ink)
    else:
        pen.polygon(ink, (-0.2, 0.1), (0.2, 0.1), (0, 0.46))
        pen.polygon(GOLD, (-0.28, -0.12), (-0.28, -0.36), (0.28, -0.36), (0.28, -0.12))
        pen.line(GOLD, 0.08, (0, -0.64), (0, -0.36))
        pen.line(GOLD, 0.08, (-0.12, -0.52), (0.12, -0.52))


# ---- streets: angles and distances

Geocode = tuple[float, float]  # latitude, longitude, in degrees
COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
RELATIVE = ("left", "right", "slightly left", "slightly right")
METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of 6,371 km
NEAR = 20.0  # metres from a point to its panorama, at most (released code)
NOTHING = "No landmarks nearby"


def wrap(degrees: float) -> float:
    """An angle in (-180, 180]."""
    return 180.0 - (180.0 - degrees) % 360.0


def offset(a: Geocode, b: Geocode) -> tuple[float, float]:
    """Metres to the east and to the north from a to b in one city."""
    shrink = math.cos(math.radians((a[0] + b[0]) / 2))
    return wrap(b[1] - a[1]) * METRES_PER_DEGREE * shrink, (b[0] - a[0]) * METRES_PER_DEGREE


def distance(a: Geocode, b: Geocode) -> float:
    """Metres from a to b."""
    return math.hypot(*offset(a, b))


def bearing(a: Geocode, b: Geocode) -> float:
    """Compass heading from a to b in degrees, 0 north, 90 east."""
    return math.degrees(math.atan2(*offset(a, b))) % 360.0


def compass_word(heading: float) -> str:
    """The nearest of the eight compass words."""
    return COMPASS[round(heading / 45.0) % 8]


def relative_word(turn: float) -> str:
    """The relative word of a turn in degrees, right positive."""
    turn = wrap(turn)
    return ("slightly " if abs(turn) <= 45.0 else "") + ("right" if turn > 0 else "left")


# ---- streets: routes

PanoramaOf = Callable[[Geocode], tuple[Image.Image, float]]  # equirectangular, and its rotation in degrees


class Leg(NamedTuple):
    """A straight part of a route, to a turning point or the destination."""

    end: Geocode
    heading: float  # of the leg, compass degrees
    compass: str  # its word in the file, one of COMPASS
    landmark: str  # at its end: "Starbucks is on your left behind", or NOTHING


class Route(NamedTuple):
    """`heading` is the agent's at the start, None: random."""

    start: Geocode
    heading: float | None
    legs: tuple[Leg, ...]


@dataclass(frozen=True)
class World:
    """Routes, ids of panoramas by geocode, and their pictures, if any."""

    routes: tuple[Route, ...]
    panoramas: dict[Geocode, str]
    picture: PanoramaOf | None = None

    @cached_property
    def names(self) -> frozenset[str]:
        landmarks = {leg.landmark for route in self.routes for leg in route.legs} - {NOTHING}
        return frozenset(_landmark(landmark)[1] for landmark in landmarks)

    @cached_property
    def _sorted(self) -> list[Geocode]:
        return sorted(self.panoramas)

    def nearest(self, geocode: Geocode) -> Geocode:
        """The nearest panorama. Raises ValueError if none is within NEAR metres."""
        if geocode in self.panoramas:
            return geocode
        reach = NEAR / METRES_PER_DEGREE + 1e-9  # degrees of latitude
        first, last = (bisect_left(self._sorted, (geocode[0] + side,)) for side in (-reach, reach))
        best = min(self._sorted[first:last], key=lambda p: distance(p, geocode), default=None)
        if best is None or distance(best, geocode) > NEAR:
            raise ValueError(f"no panorama within {NEAR:.0f} m of {geocode[0]:.6f}, {geocode[1]:.6f}")
        return best


class Waypoint(NamedTuple):
    """One decision of a route: the landmark, the sentence of the instruction, and the expert's action."""

    geocode: Geocode
    heading: float  # degrees, before the action
    landmark: str
    intersection: bool
    sentence: str
    action: str

    @property
    def observation(self) -> str:
        return self.landmark + ("; an intersection" if self.intersection else "")


# ---- streets: the tasks

STREET_FIELDS = ("current observation", "current instruction", "action")
STREET_PROMPT = string.Template(
    "Walk this route: $route Actions: forward(), turn_direction(x) with x one of $words, stop(). "
    'Answer in this form: {"$field_observation": "...", "$field_instruction": "...", "$field_action": "..."}'
    "$report $observation"
)
Cities = tuple[tuple[str, int], ...]  # NEW_YORK.name or MADE_UP, and a seed
# Seed and final quarters of the built-in routes; test routes are drawn anew after a study.
SPLITS = {"train": ("train", (0, 1)), "valid": ("valid", (2,)), "test": ("test, sixth draw", (3,))}
# Degrees right of the heading, top row first.
VIEW_LAYOUTS = {"compass": (0, 90, 180, 270), "legacy": (-135, -45, 45, 135)}


class VIRL(Environment):
    """Follow a route through streets, in words (paper, section 3.2).

    Decisions are the waypoints of a route. A reply reports the observation, quotes the current sentence of
    the instruction, and acts. A wrong action is not executed.

    Variants: "id" (turns by the eight compass words) and "rule" (left, right, slightly left, slightly right).
    `data` may also be a World.
    """

    variants = {"id": "in distribution", "rule": "under the other rule"}
    # Paper, appendix; a wrong observation: also a false report of an intersection.
    rewards = dict(correct=1.0, wrong_action=-1.0, wrong_observation=-1.5, unparsed=-1.0, budget=-1.0)
    headline = "step_accuracy"
    start_options = {"route": (int, "walk the route of this number, from 0")}
    report = ""  # for pictures: the wording of a report
    panorama_width = 1024

    verify_iter: Annotated[int, Option("most replies per waypoint, the verification budget", least=1)] = 2
    data: Annotated[
        str | Path | World | None,
        Option("folder in the released format; None: the built-in city", metavar="DIR"),
    ] = None
    split: Annotated[str, Option("of the built-in routes", choices=tuple(SPLITS))] = "train"
    turns: Annotated[int, Option("most turning points of a built-in route", least=1, most=7)] = 7
    points_per_leg: Annotated[int, Option("points between two turning points", least=0, most=100)] = 4
    drop: Annotated[float, Option("probability that such a point is left out", least=0, most=1)] = 0.5
    fields: Sequence[str] = STREET_FIELDS

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.words = RELATIVE if self.variant == "rule" else COMPASS
        self.waypoints: list[Waypoint] = []
        if isinstance(self.data, World):
            self.world = self.data
        elif self.data is None:
            self.world = built_in_world(self.split, self.turns, self.cities, width=self.panorama_width)
        else:
            for name in ("split", "turns", "panorama_width"):
                if name in options:
                    raise ValueError(f"{name} is for built-in streets alone")
            self.world = load_world(self.data, self.pictures)
        if self.pictures and self.world.picture is None:
            raise ValueError("the routes have no panoramas")

    @property
    def cities(self) -> Cities:
        return TEST_CITIES if self.variant == "visual" else TRAINING_CITIES

    @property
    def decisions(self) -> int:
        return len(self.waypoints)

    def starts(self, series: str, n: int | None = None) -> list[tuple[str, dict]]:
        """Every route once, or `n` times one route."""
        routes = len(self.world.routes)
        return [(f"{series}/{i}", {"route": i % routes}) for i in range(n or routes)]

    def begin(self, options: dict) -> str:
        number, routes = options.get("route"), self.world.routes
        if number is None:
            number = self.random.randrange(len(routes))
        Option("", least=0, most=len(routes) - 1).check("route", int, number)
        self.number, (sentences, self.waypoints) = number, self._plan(number)
        return STREET_PROMPT.substitute(
            route=" ".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1)),
            words=", ".join(self.words),
            report=self.report,
            observation=self._seen(),
            **self._field_names(),
        )

    def _plan(self, number: int) -> tuple[list[str], list[Waypoint]]:
        """Sentences and waypoints of a route: the expert turns at the start and at every turning point, and
        goes forward between them."""
        route = self.world.routes[number]
        heading = self.random.randrange(360) if route.heading is None else route.heading
        at, seen, intersection = self.world.nearest(route.start), NOTHING, False
        sentences, waypoints = [], []
        for leg in route.legs:
            last, relative = leg is route.legs[-1], relative_word(leg.heading - heading)
            sentences.append(f"Turn {relative} to face {leg.compass}.")
            action = f"turn_direction({leg.compass if self.words is COMPASS else relative})"
            waypoints.append(Waypoint(at, heading, seen, intersection, sentences[-1], action))
            end, goal = self.world.nearest(leg.end), "the destination" if last else "an intersection"
            if leg.landmark != NOTHING:
                goal += ": " + (leg.landmark[:1].lower() + leg.landmark[1:] if last else leg.landmark)
            sentences.append(f"Move forward to {goal}.")
            for between in self._between(at, end):
                waypoints.append(Waypoint(between, leg.heading, NOTHING, False, sentences[-1], "forward()"))
            at, heading, seen, intersection = end, leg.heading, leg.landmark, not last
        waypoints.append(Waypoint(at, heading, seen, False, sentences[-1], "stop()"))
        return sentences, waypoints

    def _between(self, a: Geocode, b: Geocode) -> list[Geocode]:
        """Points of a leg, moved to the nearest panorama."""
        found = []
        for k in range(1, self.points_per_leg + 1) if distance(a, b) > 5 else ():
            share = k / (self.points_per_leg + 1)
            if self.random.random() < 1 - self.drop:
                point = (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share)
                with suppress(ValueError):  # no panorama is near
                    near = self.world.nearest(point)
                    if min(distance(near, a), distance(near, b)) > 8:
                        found.append(near)
        return found

    @property
    def here(self) -> Waypoint:
        """The current waypoint, at the end of a route the last one."""
        return self.waypoints[min(self.decision, len(self.waypoints) - 1)]

    def _seen(self) -> str:
        return f"You see: {self.here.observation}."

    def judge(self, reply: str) -> Verdict:
        return judge_step(reply, self.here, self.fields, self.world.names)

    def next_message(self, right: bool, moved: bool) -> str:
        if right:
            return self._seen()
        return f"{self.verdict.feedback} {f'You are led on. {self._seen()}' if moved else 'Try again.'}"

    def describe(self) -> dict:
        k, actions = self.last_decision, [waypoint.action for waypoint in self.waypoints]
        landmark = self.waypoints[k].landmark != NOTHING
        return {"route": self.number, "waypoint": k, "landmark": landmark, "actions": actions}

    def _act(self, action: str) -> str:
        here = self.here
        return self._reply(here.observation, here.sentence, action)

    def expert_reply(self) -> str:
        return self._act(self.here.action)

    def wrong_reply(self) -> str:
        right = self.here.action
        actions = ["forward()", "stop()", *(f"turn_direction({word})" for word in self.words)]
        return self._act(self.random.choice([action for action in actions if action != right]))

    def write(self, folder: Path, seed: int, n: int | None, watch: Callable[[float], None]) -> str:
        """Writes `n` built-in routes (None: all; with a seed: of other cities) and their panoramas in the
        released format. `watch` gets the finished share. Returns a summary."""
        cities = tuple((name, number + 1000 * seed) for name, number in self.cities)
        what = (self.split, self.turns, cities, n or 2048)
        routes, world = built_in_routes(*what), built_in_world(*what, self.panorama_width)
        picture = world.picture if self.pictures else None
        write_world(folder, [routes, len(routes)], world.panoramas, picture, watch)
        return f"{len(routes)} routes and {len(world.panoramas)} panoramas in {folder}"

    @staticmethod
    def measures(episodes: Sequence[Episode]) -> dict:
        """Per-step accuracy (paper, section 4): the share of all waypoints, reached or not, with the expert's
        action within the budget; also at the first reply, by kind of action, for each route (`steps`) and its
        turns. The standard error counts routes, whose waypoints fail together."""
        tries = [
            [[t.verdict for t in e.turns if t.decision == k] for k in range(len(e.expected))]
            for e in episodes
        ]
        right = [["correct" in verdicts for verdicts in route] for route in tries]

        def of_kind(kind: str) -> list[list[bool]]:
            pairs = (zip(route, e.expected) for route, e in zip(right, episodes))
            return [[r for r, action in pair if action.startswith(kind)] for pair in pairs]

        n = sum(map(len, right))
        accuracy = sum(map(sum, right)) / n
        spread = sum((sum(route) - accuracy * len(route)) ** 2 for route in right)
        by_kind = {kind: sum(of_kind(kind), []) for kind in ("turn", "forward", "stop")}
        return {
            "step_accuracy": accuracy,
            "step_accuracy_se": math.sqrt(spread * len(right) / max(1, len(right) - 1)) / n,
            "first_step_accuracy": sum(t[:1] == ["correct"] for route in tries for t in route) / n,
            "step_accuracy_by_action": {kind: mean(values) for kind, values in by_kind.items() if values},
            "waypoints": n,
            "steps": [round(mean(route), 4) for route in right],
            "at_turns": [round(mean(turns), 4) if turns else None for turns in of_kind("turn")],
        }


class VIRLVL(VIRL):
    """VIRL with a picture of four street views per waypoint in place of words. Variants: also "visual", the
    training rule in nine other cities."""

    variants = VIRL.variants | {"visual": "in other cities"}
    pictures = True
    report = (
        ' Report a landmark of the route as "NAME is on your left" (right, left behind, right behind), '
        f'none as "{NOTHING}".'
    )

    view_layout: Annotated[
        str, Option("front, right, back, left, or as in the released code", choices=tuple(VIEW_LAYOUTS))
    ] = "compass"
    view_size: Annotated[int, Option("pixels of each of the four views", least=16, most=2048)] = 300
    panorama_width: Annotated[int, Option("width of built-in panoramas, pixels", least=64, most=8192)] = 1024
    tell_intersections: Annotated[bool, Option("say in words where there is an intersection")] = True

    def _seen(self) -> str:
        intersection = self.tell_intersections and self.here.intersection
        return "You are at an intersection." if intersection else "You see the picture."

    def draw(self) -> Callable[[], Image.Image]:
        here, size, layout = self.here, self.view_size, self.view_layout
        return cache(lambda: look_around(*self.world.picture(here.geocode), here.heading, size, layout))


# ---- streets: the verifier


def judge_step(
    reply: str, waypoint: Waypoint, fields: Sequence[str] = STREET_FIELDS, names: frozenset[str] = frozenset()
) -> Verdict:
    """One verdict per reply, by its action: the expert's is right, whatever the report. A wrong one is worse
    if the report is false about an intersection. Recognition of the landmark is only measured; `names` as in
    World."""
    parsed = parse_reply(reply, fields) or {}
    report, _, action = map(parsed.get, fields)
    if not isinstance(action, str):
        return Verdict("unparsed", "The answer is not in the form asked for.")
    report = report[:1000] if isinstance(report, str) else ""
    claims, recognized = _read_report(_words(report), waypoint.landmark, names)
    words = " ".join(re.sub("['\"]", "", action.lower()).split())
    if re.sub(r" ?([()]) ?", r"\1", words) == waypoint.action:
        return Verdict("correct", "Correct.", recognized)
    if claims == waypoint.intersection:
        return Verdict("wrong_action", "That action is wrong here.", recognized)
    truth = f"there is {'an' if waypoint.intersection else 'no'} intersection here"
    return Verdict("wrong_observation", f"That action is wrong: {truth}.", recognized)


# Patterns for the output of `_words`.
_JOIN = re.compile(r" ?(?:;|\b(?:and|but|with|where)\b) ?")  # between two clauses
_NO = r"\b(?:no|not|any|never|without|or|nor|neither|cannot)\b"
_NO_INTERSECTION = re.compile(rf"{_NO}(?!.*\blandmark)")
# With its usual context: "Intersection Cafe is on your left" is a name.
_INTERSECTION = re.compile(
    r"(?:\b(?:i|you|we|it|there|this|at)\b.{0,40}?|\b(?:an?|the)\b(?: \w{1,20}(?: way)?){0,2}"
    r"|^(?:\w{1,20} way|t)?)"
    r" ?\bintersections?\b(?: (?:here|ahead|nearby|of|at|in|is|lies|observed|detected|seen)\b"
    r"(?!.*\bon (?:your|my)\b).*)?$"
)
_NO_LANDMARK = re.compile(
    rf"{_NO} (?:(?!other)\w+ ){{0,4}}landmarks?\b(?: nearby)?|\b(?:nothing|none)\b(?! else)"
)
_DENIAL = re.compile(rf"{_NO}(?![^X]*\bintersection)")


def _read_report(report: str, landmark: str, names: frozenset[str]) -> tuple[bool, bool]:
    """Whether a report claims an intersection, as "X is on my left; I observe an intersection" does, and
    recognizes the landmark: its name and side, or that there is none, and no other name, side or denial."""
    words, (letters, name, sides) = re.findall("[^ ;]+", report), _landmark(landmark)
    named = {"".join(words[i : i + n]) for n in range(1, 9) for i in range(len(words))} & names
    mark = _NO_LANDMARK if landmark == NOTHING else rf"(?<!\S){'[ ;]*+'.join(name)}(?!\S)"
    report = re.sub(mark, "X", report)  # all other letters are small
    clauses = _JOIN.split(report)
    found = filter(None, map(_INTERSECTION.search, clauses))
    claims = any(not _NO_INTERSECTION.search(m.string[: m.end()]) for m in found)
    says_so = "X" in report or claims and landmark == NOTHING
    alone = all(other in letters for other in named) and _sides(report) == sides
    denials = (clause for clause in clauses if _DENIAL.search(clause))
    denied = _NO_LANDMARK.search(report) or any(re.search("X|left|right", clause) for clause in denials)
    return claims, says_so and alone and not denied


@cache
def _landmark(text: str) -> tuple[str, str, list[str]]:
    """The letters of a landmark's text, those of its name, and its sides: of "Joe's is on your left"
    joesisonyourleft, joes and left."""
    words = _words(text)
    name, *side = words.rsplit(" is on your ", 1)
    letters, name = (re.sub("[ ;]", "", part) for part in (words, name.removeprefix("the destination ")))
    return letters, name or letters, _sides(" ".join(side))


def _sides(words: str) -> list[str]:
    words = re.sub(r"\b(?:back|rear)\b", "behind", words)
    return sorted(re.findall(r"\b(?:left|right|behind)\b", words))


def _words(text: str) -> str:
    """A text's words in lower case, semicolons between clauses."""
    text = re.sub("n['’]t\\b", " not", unicodedata.normalize("NFC", text.lower()))
    kept = (
        c if c.isalnum() or unicodedata.category(c)[0] == "M" else " ; " if c in ";.,:!?\n" else " "
        for c in text
    )
    return " ".join("".join(kept).split())


# ---- streets: the released files


@contextmanager
def reading(what: Any, advice: str = "") -> Iterator[None]:
    """Turns errors of any kind into a ValueError in one line that names the file."""
    try:
        yield
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise ValueError(f"{what} cannot be read: {reason}{advice}") from None


def load_world(folder: str | Path, pictures: bool = False) -> World:
    """Reads a folder in the released format: route_infos.json, gps_pano_mapping.pkl and, for pictures,
    street_views/, whose files are read when they are drawn. Panoramas without a picture and routes that
    cannot be walked are left out, with one warning for each kind. Raises ValueError in one line that names
    file, route and field if nothing is left."""
    folder = Path(folder)
    path, mapping, views = (folder / n for n in ("route_infos.json", "gps_pano_mapping.pkl", "street_views"))
    with reading(path):
        content = json.loads(path.read_bytes())
    panoramas = names = _read_mapping(mapping)
    if pictures:
        if not views.is_dir():
            raise ValueError(f"{folder} has no street_views/")
        files = set(views.iterdir())
        panoramas = {at: name for at, name in names.items() if files.issuperset(_picture_files(views, name))}
        if lost := len(names) - len(panoramas):
            warnings.warn(f"{views}: {lost} of {len(names)} panoramas are missing", stacklevel=2)
    routes = read_routes(content, str(path), World((), panoramas).nearest)
    return World(routes, panoramas, partial(_read_picture, views, panoramas) if pictures else None)


# The opcodes of a pickled dict from pairs of numbers to strings or None.
_NUMBERS = {"FLOAT", "BINFLOAT", "INT", "BININT", "BININT1", "BININT2", "LONG1"}
_ALLOWED_CODES = _NUMBERS | set(
    "PROTO MARK NONE EMPTY_DICT DICT SETITEM SETITEMS TUPLE TUPLE2 UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET STOP".split()
)


def _read_mapping(path: Path) -> dict[Geocode, str]:
    with reading(path):
        content = _read_pickle(path.read_bytes())
    ids = {}
    for key, name in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII):  # part of a file name
            with suppress(ValueError):
                ids[_geocode(key)] = name
    if not ids:
        raise ValueError(f"{path}: no panorama id: not a dict from (latitude, longitude) to names")
    return ids


def _read_pickle(data: bytes) -> Any:
    """A pickled dict from pairs of numbers to strings. Raises ValueError before anything is built for a call,
    a memo larger than the file, or nested keys (whose hash could take for ever)."""
    before = ["", "", ""]
    for code, argument, _ in pickletools.genops(data):
        if code.name == "FRAME":  # anywhere in protocols 4 and 5; it builds nothing
            continue
        if code.name not in _ALLOWED_CODES:
            raise ValueError(f"it asks for {code.name} {'' if argument is None else argument}")
        if "PUT" in code.name and int(argument) > len(data):
            raise ValueError("its memo is too large")
        if "TUPLE" in code.name:  # TUPLE takes all since the mark
            if not _NUMBERS.issuperset(before[1:]) or code.name == "TUPLE" and before[0] != "MARK":
                raise ValueError("its keys are no pairs of numbers")
        before = [*before[1:], code.name]
    return pickle.loads(data)


def _picture_files(views: Path, name: str) -> tuple[Path, Path]:
    return views / f"{name}.jpg", views / f"{name}.metadata.json"


def _read_picture(views: Path, names: dict[Geocode, str], geocode: Geocode) -> tuple[Image.Image, float]:
    path, metadata = _picture_files(views, names[geocode])
    picture = read_picture(path, ["JPEG"])
    with reading(metadata):
        return picture, _field(json.loads(metadata.read_bytes()), _degrees, "rotation")


def read_picture(path: str | Path, formats: Sequence[str] | None = None) -> Image.Image:
    """A picture file in RGB, as an image viewer shows it: first frame, turned by its EXIF data, 16 bits cut
    to 8, transparency on white. `formats` are Pillow's names. Raises ValueError in one line that names the
    file if it is damaged, too large or deeper than 16 bits."""
    with reading(f"picture {path}"):
        with warnings.catch_warnings(action="ignore"):  # of odd EXIF data and large pictures
            with open(path, "rb") as file:  # given a path, Pillow 13.0 misreads a turned TIFF
                picture = ImageOps.exif_transpose(Image.open(file, formats=formats))
        if picture.mode.startswith(("I", "F")):  # Pillow would clip at 255
            pixels = np.array(picture)
            if picture.mode == "F" or not 0 <= pixels.min() <= pixels.max() < 2**16:
                raise ValueError("its pixels are deeper than 16 bits")
            pixels[pixels == picture.info.get("transparency")] = 2**16 - 1
            picture = Image.fromarray((pixels / 257).round().astype(np.uint8))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return picture.convert("RGB")


def read_routes(
    content: Any, name: str = "routes", check: Callable[[Geocode], Any] = lambda geocode: None
) -> tuple[Route, ...]:
    """The routes of route_infos.json, parsed: [[route, ...], number], or one route. Those that cannot be
    read, or with a geocode for which `check` raises ValueError, are left out with one warning that names the
    file. Raises ValueError if no route is left."""
    records = content if isinstance(content, list) else [content]
    if records and isinstance(records[0], list):
        records = records[0]
    routes, faults = [], []
    for k, record in enumerate(records):
        try:
            routes.append(_read_route(record, check))
        except ValueError as error:
            faults.append(f"route {k}: {error}")
    if not routes:
        raise ValueError(f"{name}: {faults[0] if faults else 'no routes'}")
    if faults:
        lost = f"{len(faults)} of {len(records)} routes cannot be walked and are left out"
        warnings.warn(f"{name}: {lost}, such as {faults[0]}", stacklevel=2)
    return tuple(routes)


def _read_route(record: Any, check: Callable[[Geocode], Any]) -> Route:
    """One route. Raises ValueError in one line that names the field and its value."""

    def geocode(value: Any) -> Geocode:
        check(geocode := _geocode(value))
        return geocode

    start = _field(record, geocode, "start_place", "relocated_geocode")
    ends = _field(record, len, "route_results", "geocode_list")
    blocks = _field(record, _milestones, "milestone_info")
    if not ends or len(blocks) != ends:
        raise ValueError(f"milestone_info: {len(blocks)} blocks for {ends} points of geocode_list")
    record = record | {f"block {i}": {"landmarks": ""} | block for i, block in enumerate(blocks, 1)}
    legs = []
    for i in range(ends):
        end = _field(record, geocode, "route_results", "geocode_list", i)
        block = f"block {i + 1}"
        heading, word = _field(record, _heading, block, "to_next_intersection_heading")
        read = partial(_landmark_of, _destination(record) if i == ends - 1 else NOTHING)
        legs.append(Leg(end, heading, word, _field(record, read, block, "landmarks")))
    heading = _field({"init_heading": None} | record, lambda x: _degrees(x or 0), "init_heading") % 360.0
    return Route(start, heading or None, tuple(legs))  # 0: draw one


def _field(record: Any, read: Callable, *path: str | int) -> Any:
    """What `read` makes of a field. Raises ValueError that names the field and its value."""
    try:
        for key in path:
            record = record[key]
        return read(record)
    except (LookupError, TypeError, AttributeError):
        reason = f"missing or of another type: {one_line(repr(record))}"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{'.'.join(map(str, path))}: {reason}")


def _geocode(value: Any) -> Geocode:
    if _fits(tuple[float, float], value) and abs(value[0]) <= 90 and abs(value[1]) <= 180:
        return float(value[0]), float(value[1])
    raise ValueError(f"no [latitude, longitude]: {one_line(value)}")


def _degrees(value: Any) -> float:
    if not (_fits(float, value) and -360 <= value <= 360):
        raise ValueError(f"no number of degrees: {one_line(value)}")
    return float(value)


def _heading(text: str) -> tuple[float, str]:
    number = re.fullmatch(r"\s*(-?\d{1,3}(?:\.\d{1,9})?)\s*(?:\((.*)\)\s*)?", text, re.ASCII)
    degrees = _degrees(float(number[1]) if number else text) % 360.0
    word = (number[2] or "").strip().lower()
    return degrees, word if word in COMPASS else compass_word(degrees)


def _destination(record: dict) -> str:
    goal = record.get("dest_place")
    name = goal.get("name") if isinstance(goal, dict) else None
    return f"The destination {name}" if isinstance(name, str) else "The destination"


@cache
def _landmark_of(otherwise: str, text: str) -> str:
    """What is seen at the end of a leg; `otherwise` if the file has no landmark."""
    landmark = text.strip().rstrip(".")
    if not landmark or _NO_LANDMARK.fullmatch(_words(landmark)):
        landmark = otherwise
    landmark = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", landmark).split())
    unprintable = any(unicodedata.category(c) in ("Cc", "Cs") for c in landmark)
    if len(landmark) > 300 or not _landmark(landmark)[0] or "<image>" in landmark or unprintable:
        raise ValueError(f"no text of up to 300 characters: {one_line(repr(landmark))}")
    return landmark


# The beginning of a block, or a key and its value, up to the next key or the end of the block.
_MILESTONE = re.compile(
    r'(?:\A|\}|\n)[\s,]*\{|"(\w+)"[^\S\n]*:\s*"(.*?)"(?=\s*,?\s*(?:"\w+"\s*:|\}\s*,?\s*(?:\{|\Z)|\Z))'
)


def _milestones(text: str) -> list[dict[str, str]]:
    """The non-empty blocks of milestone_info, which is no JSON: values may hold quotes and braces."""
    blocks = []
    for match in _MILESTONE.finditer(text):
        if not match[1]:
            blocks.append({})
        elif blocks:
            blocks[-1][match[1]] = match[2]
    return [block for block in blocks if block]


def write_world(
    folder: Path,
    content: Any,
    ids: dict[Geocode, str],
    picture: PanoramaOf | None = None,
    watch: Callable[[float], None] = lambda share: None,
) -> None:
    """Writes a folder that `load_world` reads, the routes last. `watch` gets the finished share."""
    folder.mkdir(parents=True, exist_ok=True)
    routes = folder / "route_infos.json"
    routes.unlink(missing_ok=True)
    (folder / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(ids))
    if picture:
        views = folder / "street_views"
        views.mkdir(exist_ok=True)
        for k, (geocode, name) in enumerate(ids.items()):
            watch(k / len(ids))
            image, rotation = picture(geocode)
            file, metadata = _picture_files(views, name)
            image.save(file, quality=100, subsampling=0)
            metadata.write_text(json.dumps({"rotation": rotation}))
    aside = routes.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(routes)
    watch(1.0)


# ---- streets: synthetic cities

Array = np.ndarray
Color = tuple[int, int, int]  # RGB
Point = complex  # metres to the east + 1j * metres to the north
Crossing = tuple[int, int]  # column and row
EYE, SIGHT = 2.5, 150.0  # metres: camera height, and the range of signs and ground
BOARD, BOARD_FOOT = (6, 4), 3.2  # metres: size of signs, and the clearance below


class CityPlan(NamedTuple):
    """Map, names and looks of a synthetic city. All lengths in metres."""

    name: str
    centre: Geocode
    words: Sequence[str]  # first words of names
    trades: Sequence[str]  # second words
    block: tuple[float, float] = (140.0, 90.0)  # east-west and north-south
    turned: float = 29.0  # degrees from north to the grid
    jitter: float = 0.06  # of the crossings, as a share of a block
    diagonals: float = 0.08  # share of the blocks with a diagonal street
    street: float = 18.0  # from facade to facade
    pavement: float = 3.0
    heights: tuple[float, float] = (12.0, 42.0)  # of the buildings
    walls: Sequence[Color] = (150, 92, 74), (176, 160, 140), (120, 126, 136), (196, 180, 150), (142, 110, 88)
    glass: Color = (60, 80, 104)
    window: tuple[float, float] = (0.44, 0.5)  # share of its bay, across and up
    awnings: Sequence[Color] = ((170, 40, 44), (36, 92, 60), (40, 70, 140), (200, 150, 40))
    sign: tuple[Color, Color] = ((24, 30, 60), (250, 246, 230))  # board and letters
    sky: tuple[Color, Color] = ((96, 150, 210), (200, 220, 238))  # overhead and at the horizon
    light: float = 1.0
    road: Color = (70, 70, 74)


NEW_YORK = CityPlan(
    "new york",
    (40.7527, -73.9772),
    "Amber Bishop Cedar Delta Elm Falcon Golden Harbor Ivory Juniper King Laurel Maple North Orchid "
    "Pearl".split(),
    "Bakery Bank Books Cafe Cinema Deli Florist Hotel Market Museum Pharmacy Theatre".split(),
)
MADE_UP = "anywhere"  # random cities
TRAINING_CITIES = ((NEW_YORK.name, 0),)
TEST_CITIES = tuple((MADE_UP, seed) for seed in range(101, 110))  # of variant "visual" alone


def made_up_plan(seed: int) -> CityPlan:
    """Random parameters of a synthetic city."""
    rng = random.Random(f"city/{seed}")
    between = rng.uniform
    words, trades = (list({_made_up_name(rng): None for _ in range(12)}) for _ in range(2))

    def color(hue: tuple[int, int], saturation: tuple[int, int], lightness: tuple[int, int]) -> Color:
        degrees, *percent = (rng.randint(*limits) for limits in (hue, saturation, lightness))
        return ImageColor.getrgb("hsl({}, {}%, {}%)".format(degrees, *percent))

    anything, blues, stone = (0, 359), (195, 225), rng.choice(((5, 50), (15, 45), (60, 170), (190, 240)))
    sign = (color(anything, (50, 90), (14, 34)), color(anything, (30, 90), (80, 95)))
    return CityPlan(
        f"{MADE_UP}{seed}",
        (between(-50, 55), between(-170, 170)),
        words,
        trades,
        block=(between(70, 180), between(70, 180)),
        turned=between(-45, 45),
        jitter=between(0, 0.5),
        diagonals=between(0, 0.3),
        street=between(12, 28),
        pavement=between(1, 4),
        road=color((20, 60), (0, 14), (22, 44)),
        heights=(between(5, 15), between(16, 60)),
        window=(between(0.3, 0.7), between(0.3, 0.7)),
        walls=[color(stone, (10, 45), (42, 80)) for _ in range(4)] + [color(anything, (20, 45), (45, 75))],
        glass=color(blues, (5, 40), (16, 44)),
        awnings=[color(anything, (45, 85), (28, 52)) for _ in range(3)],
        sign=rng.choice((sign, sign[::-1])),
        sky=(color(blues, (10, 75), (48, 72)), color((30, 220), (10, 45), (78, 90))),
        light=between(0.8, 1.15),
    )


def _made_up_name(rng: random.Random) -> str:
    starts = ("", *"bcdfghjklmnprstvwz", "br", "ch", "fl", "gr", "sh", "st", "th", "tr")
    ends = ("", "", *"dlmnrst")
    parts = (starts, "aeiou", ends)
    return "".join(rng.choice(part) for _ in range(rng.randint(2, 3)) for part in parts).capitalize()


class City:
    """Streets, landmarks and panoramas of a plan, a function of the seed: 7 x 7 crossings, Points from the
    plan's centre."""

    def __init__(self, plan: CityPlan, seed: int):
        self.plan, rng = plan, random.Random(f"{plan.name}/{seed}")
        self.crossings = self._grid(rng)
        self.ways: dict[Crossing, list[Crossing]] = {c: [] for c in self.crossings}
        for i, j in self.crossings:
            ends = [(i + 1, j), (i, j + 1)] + [(i + 1, j + 1)] * (rng.random() < plan.diagonals)
            for end in ends:
                if end in self.crossings:
                    self.ways[i, j].append(end)
                    self.ways[end].append((i, j))
        at = self.crossings
        streets = [(at[a], at[b]) for a, ends in self.ways.items() for b in ends if a < b]
        self.streets = np.array(streets)  # [n, 2]
        self._name_places(rng)
        stands = list(at.values())
        for start, end in streets:
            n = max(1, round(abs(end - start) / 12))
            stands += [start + (end - start) * k / n for k in range(1, n)]
        stem = plan.name.replace(" ", "")
        self.panoramas = {self.geocode(stand): f"{stem}-{k:05d}" for k, stand in enumerate(stands)}

    def _grid(self, rng: random.Random) -> dict[Crossing, Point]:
        def moved(side: float) -> float:
            return side * self.plan.jitter * rng.uniform(-0.5, 0.5)

        width, depth = self.plan.block
        columns, rows = ([side * i + moved(side) for i in range(7)] for side in (width, depth))
        turned = cmath.rect(1, -math.radians(self.plan.turned))
        return {
            (i, j): complex(columns[i] + moved(width), rows[j] + moved(depth)) * turned
            for i, j in product(range(7), repeat=2)
        }

    def _name_places(self, rng: random.Random) -> None:
        """At most one landmark per crossing, on a facade near it, and its sign."""
        names = [f"{word} {trade}" for word in self.plan.words for trade in self.plan.trades]
        rng.shuffle(names)
        self.landmarks: dict[Crossing, dict] = {}
        self.boards: dict[Crossing, tuple[Point, Point]] = {}  # ends of the sign
        for crossing, corner in self.crossings.items():
            spot = self._facade_near(crossing, rng)
            if spot and rng.random() < 0.9 and names:
                name, (at, outwards) = names.pop(), spot
                board = at, at + BOARD[0] * outwards
                if self._to_one_side(crossing, board):
                    self.boards[crossing] = board
                    self.landmarks[crossing] = {
                        "name": name,
                        "geocode": list(self.geocode(at)),
                        "relocated_geocode": list(self.geocode(corner)),
                    }

    def geocode(self, at: Point) -> Geocode:
        lat = self.plan.centre[0] + at.imag / METRES_PER_DEGREE
        width = METRES_PER_DEGREE * math.cos(math.radians((lat + self.plan.centre[0]) / 2))
        return lat, self.plan.centre[1] + at.real / width

    def _facade_near(self, crossing: Crossing, rng: random.Random) -> tuple[Point, Point] | None:
        """A random point of a facade near a crossing and its outward direction, or None."""
        corner, half = self.crossings[crossing], self.plan.street / 2
        for _ in range(20):
            way = self.crossings[rng.choice(self.ways[crossing])] - corner
            along, away, outwards = way / abs(way), rng.uniform(6, 14), rng.choice((-1j, 1j))
            at = corner + along * (half + away - outwards * half)
            if nearest_street(np.array([at]), self.streets)[0] > half - 0.1:
                return at, outwards * along
        return None

    def _to_one_side(self, crossing: Crossing, board: tuple[Point, Point]) -> bool:
        """Whether a sign is clearly left or right on arrival from any street."""
        away = sum(board) / 2 - self.crossings[crossing]
        headings = (math.radians(self._heading(end, crossing)) for end in self.ways[crossing])
        return all(abs((away * cmath.rect(1, heading)).real) > 2 for heading in headings)

    def route(self, rng: random.Random, turns: int, quarters: Sequence[int] = (0, 1, 2, 3)) -> dict:
        """A route in the released format that ends in some of the four interleaved quarters of the city."""
        while True:
            path = self._path(rng, turns)
            if path and path[-1] in self.landmarks and (path[-1][0] + 2 * path[-1][1]) % 4 in quarters:
                return self._record(rng, path)

    def _path(self, rng: random.Random, turns: int) -> list[Crossing] | None:
        """Crossings where a route starts, turns and ends; None if it cannot turn or crosses itself."""
        at = rng.choice(sorted(self.crossings))
        path, seen = [at], {at}
        for _ in range(turns + 1):
            ways = self._onward(path[-2], at, 20, 150) if len(path) > 1 else self.ways[at]
            if not ways:
                return None
            on = [rng.choice(ways)]
            for _ in range(rng.randint(1, 2)):  # along the same street
                if not on:
                    break
                if on[0] in seen:
                    return None
                at, on = on[0], self._onward(at, on[0], 0, 10)
                seen.add(at)
            path.append(at)
        headings = [self._heading(a, b) for a, b in pairwise(path)]
        return path if all(20 <= abs(wrap(b - a)) <= 150 for a, b in pairwise(headings)) else None

    @cache
    def _onward(self, a: Crossing, b: Crossing, least: float, most: float) -> list[Crossing]:
        """The crossings after b at a turn between `least` and `most` degrees, coming from a."""
        came = self._heading(a, b)
        return [c for c in self.ways[b] if least <= abs(wrap(self._heading(b, c) - came)) <= most]

    @cache
    def _heading(self, a: Crossing, b: Crossing) -> float:
        return bearing(self.geocode(self.crossings[a]), self.geocode(self.crossings[b]))

    def _record(self, rng: random.Random, path: list[Crossing]) -> dict:
        geocodes = [list(self.geocode(self.crossings[c])) for c in path]
        blocks = [self._milestone(k, a, b, b == path[-1]) for k, (a, b) in enumerate(pairwise(path), 1)]
        return {
            "start_place": {"relocated_geocode": geocodes[0]},
            "dest_place": self.landmarks[path[-1]],
            "init_heading": rng.randint(1, 359),
            "route_results": {
                "geocode_list": geocodes[1:],
                "landmark_list": [self.landmarks.get(c) for c in path[1:-1]],
            },
            "milestone_info": "\n".join(blocks),
        }

    @cache
    def _milestone(self, number: int, a: Crossing, b: Crossing, last: bool) -> str:
        whole, landmark = round(self._heading(a, b)) % 360, NOTHING
        if sign := self.landmarks.get(b):
            middle = self.geocode(sum(self.boards[b]) / 2)
            turn = wrap(bearing(self.geocode(self.crossings[b]), middle) - whole)
            side = ("right" if turn > 0 else "left") + (" behind" if abs(turn) > 90 else "")
            landmark = f"{'The destination ' if last else ''}{sign['name']} is on your {side}"
        lines = {
            "intersection_idx": number,
            "landmarks": landmark,
            "distance": f"{round(abs(self.crossings[a] - self.crossings[b]))} meters",
            "human_heading": whole,
            "to_next_intersection_heading": f"{whole} ({compass_word(whole)})",
        }
        return "{\n" + "".join(f'    "{key}": "{value}",\n' for key, value in lines.items()) + "}"

    @cached_property
    def facades(self) -> tuple[Array, Array]:
        """Walls [n, 2] (from, to) and buildings [m, 10]: 1000 * wall + metres along it, by which they are
        sorted, width, height, bay, paint, awning (negative: none)."""
        plan = self.plan
        rng, half = random.Random(f"facades of {plan.name}"), plan.street / 2
        walls, buildings = [], []
        for k, (start, end) in enumerate(self.streets):
            along, metres = (end - start) / abs(end - start), np.arange(0.0, abs(end - start))
            for outwards in (-1j, 1j):
                line = start + along * (metres - outwards * half)
                free = nearest_street(line, np.delete(self.streets, k, 0))[0] >= half - 0.01
                ends = np.flatnonzero(np.diff(free, prepend=False, append=False))
                for first, last in zip(ends[::2], ends[1::2] - 1):
                    buildings += self._row_of_buildings(rng, 1000.0 * len(walls), last - first)
                    walls.append((line[first], line[last]))
        return np.array(walls), np.array(buildings)

    @cached_property
    def signs(self) -> tuple[Array, list[Array]]:
        """Ends [n, 2] and pictures."""
        return np.array([*self.boards.values()]), [self._board(x["name"]) for x in self.landmarks.values()]

    def _row_of_buildings(self, rng: random.Random, start: float, length: float) -> list[tuple[float, ...]]:
        plan, at, row = self.plan, 0.0, []
        while at < length:
            width, height, bay = rng.uniform(8, 16), rng.uniform(*plan.heights), rng.uniform(1.8, 3.2)
            paint = rng.choice(plan.walls)
            awning = rng.choice(plan.awnings) if rng.random() < 0.6 else (-1, -1, -1)
            row.append((start + at, width, height, bay, *paint, *awning))
            at += width
        return row

    def _board(self, name: str) -> Array:
        board, letters = self.plan.sign
        text, picture = name.replace(" ", "\n"), Image.new("RGB", (BOARD[0] * 40, BOARD[1] * 40), board)
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(40)
        left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, align="center")
        scale = min((picture.width - 20) / (right - left), (picture.height - 20) / (bottom - top))
        middle, font = (picture.width / 2, picture.height / 2), ImageFont.load_default(40 * scale)
        draw.multiline_text(middle, text, fill=letters, font=font, anchor="mm", align="center")
        return np.asarray(picture, dtype=np.float32)

    def draw(self, at: Geocode, size: tuple[int, int], rotation: float = 0.0) -> Image.Image:
        """The equirectangular panorama at a geocode, (width, height) pixels. Heading h is in the column at
        (h + rotation) / 360 of the width, as in the released data."""
        width, height = size
        plan, eye = self.plan, complex(*offset(self.plan.centre, at))
        heading = np.radians((np.arange(width) + 0.5) / width * 360.0 - rotation)
        ray = np.sin(heading) + 1j * np.cos(heading)
        elevation = np.radians(90.0 - (np.arange(height) + 0.5) / height * 180.0)
        up = np.clip(elevation / (math.pi / 2), 0, 1)[:, None, None]
        sky = np.array(plan.sky[1]) * (1 - up) ** 2 + np.array(plan.sky[0]) * (1 - (1 - up) ** 2)
        picture = np.broadcast_to(sky, (height, width, 3)).astype(np.float32)
        reach = np.minimum(EYE / np.tan(-elevation[elevation < 0]), SIGHT)
        streets = self.streets[abs(self.streets.mean(1) - eye) < SIGHT + max(plan.block)]
        ground = (eye + reach[:, None] * ray).astype(np.complex64)
        picture[elevation < 0] = self._ground(ground, streets.astype(np.complex64))
        far = self._paint_facades(picture, eye, ray, elevation)
        self._paint_boards(picture, eye, ray, elevation, far)
        return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))

    def _ground(self, points: Array, streets: Array) -> Array:
        """Colours of Points on the ground [...]."""
        plan = self.plan
        apart, along, street = nearest_street(points, streets)
        to_end = np.minimum(along, abs(streets[:, 1] - streets[:, 0])[street] - along)
        half, kerb = plan.street / 2, plan.street / 2 - plan.pavement
        color = np.where((apart < kerb)[..., None], np.float32(plan.road), np.float32((150, 148, 142)))
        color[(abs(apart - kerb) < 0.15) & (to_end > kerb)] = (112, 111, 106)
        lane = (apart < 0.12) & (along % 6 < 3) & (to_end > half + 4)
        stripes = (apart < kerb) & (apart % 1.2 < 0.6) & (to_end > half - 1) & (to_end < half + 2)
        color[lane | stripes] = (232, 232, 228)
        return color * plan.light

    def _paint_facades(self, picture: Array, eye: Array, ray: Array, elevation: Array):
        """Paints the nearest wall of every column; returns its distance [width], infinite for none."""
        plan, (walls, buildings) = self.plan, self.facades
        distances, shares = _meet(eye, ray, walls)
        columns = np.flatnonzero(np.isfinite(distances.min(1)))
        wall = distances.argmin(1)[columns]
        far = distances[columns, wall]
        way = walls[wall, 1] - walls[wall, 0]
        metres = shares[columns, wall] * abs(way)
        number = np.searchsorted(buildings[:, 0], 1000.0 * wall + metres, side="right") - 1
        building = buildings[number].astype(np.float32)
        left = (1000.0 * wall + metres - buildings[number, 0]).astype(np.float32)
        width, top, bay = building[:, 1:4].T
        # Metres above the ground [height, columns]:
        z = (EYE + far * np.tan(elevation)[:, None]).astype(np.float32)
        light = np.float32(plan.light * (0.78 + 0.22 * abs((way / abs(way) * (0.8 + 0.6j)).real)))[:, None]
        across, floor = left / bay % 1, (z - 4.4) / 3.4 % 1
        within = (abs(across - 0.5) < plan.window[0] / 2) & (abs(floor - 0.5) < plan.window[1] / 2)
        inside = (left > 0.5) & (left < width - 0.5)
        shop = inside & (z > 0.5) & (z < 2.7)
        glass = within & (z > 4.4) & (z < top - 1) | shop
        color = np.where(glass[..., None], np.float32(plan.glass) * light, building[:, 4:7] * light)
        stripes = np.where(left / 0.6 % 2 < 1, np.float32(1.0), np.float32(0.8))[:, None]
        awning = inside & (building[:, 7] >= 0) & (z > 2.5) & (z < 3.3)
        color = np.where(awning[..., None], building[:, 7:10] * stripes * light, color)
        color = np.where(((z > top - 0.5) | (left < 0.15))[..., None], color * 0.75, color)  # cornice, edge
        mist = np.float32(np.minimum(far / 400, 1)[:, None])
        color = color * (1 - mist) + np.float32(plan.sky[1]) * mist
        picture[:, columns] = np.where(((z >= 0) & (z <= top))[..., None], color, picture[:, columns])
        return distances.min(1)

    def _paint_boards(self, picture: Array, eye: Array, ray: Array, elevation: Array, far):
        lines, boards = self.signs
        distances, shares = _meet(eye, ray, lines)
        for k in np.argsort(-distances.min(0)):
            columns = np.flatnonzero((distances[:, k] < far) & (distances[:, k] < SIGHT))
            if not len(columns):
                continue
            board, away, share = boards[k], distances[columns, k], shares[columns, k]
            to_the_right = (ray[columns] * (lines[k, 1] - lines[k, 0]).conj()).imag > 0
            across = np.where(to_the_right, share, 1 - share)
            top = BOARD_FOOT + BOARD[1] - EYE  # above the camera
            down = (top - away * np.tan(elevation)[:, None]) / BOARD[1]  # 0 to 1 on the board
            rows = (down * board.shape[0]).clip(0, board.shape[0] - 1).astype(int)
            pixels = board[rows, (across * board.shape[1]).clip(0, board.shape[1] - 1).astype(int)]
            on_board = ((down >= 0) & (down <= 1))[..., None]
            picture[:, columns] = np.where(on_board, pixels * self.plan.light, picture[:, columns])


def nearest_street(points: Array, streets: Array) -> tuple[Array, Array, Array]:
    """For Points [...] the nearest of the streets [n, 2] (from, to): distance, metres along it, and index."""
    start, way = streets[:, 0], streets[:, 1] - streets[:, 0]
    length, parts = abs(way), []
    for part in np.split(points.ravel(), range(256, points.size, 256)):  # to bound memory
        turned = (part[:, None] - start) * (way / length).conj()  # as if each street led to the east
        walked = turned.real.clip(0, length)
        apart = abs(turned - walked)
        best, rows = apart.argmin(1), np.arange(len(part))
        parts.append((apart[rows, best], walked[rows, best], best))
    return tuple(np.concatenate(a).reshape(points.shape) for a in zip(*parts))


def _meet(eye: Point, ray: Array, lines: Array) -> tuple[Array, Array]:
    """Intersections of rays [width] with segments [n, 2]: distance (infinite: none) and share of the segment,
    both [width, n]."""
    start, way = (lines[:, 0] - eye).conj(), lines[:, 1] - lines[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = (ray[:, None].conj() * way).imag
        far, share = (start * way).imag / cross, (start * ray[:, None]).imag / cross
    return np.where((share >= 0) & (share <= 1) & (far > 0.1), far, np.inf), share


@cache
def built_in_city(name: str, seed: int) -> City:
    """A city of Cities."""
    return City(NEW_YORK if name == NEW_YORK.name else made_up_plan(seed), seed)


@cache
def built_in_routes(split: str, turns: int, cities: Cities, n: int) -> list[dict]:
    """Up to `n` different routes of one to `turns` turning points, in the released format, cities in turn.
    Routes of different splits end at different points."""
    of_city = []
    for name, seed in cities:
        (draw, ends), city, fruitless = SPLITS[split], built_in_city(name, seed), 0
        rng = random.Random(f"routes/{seed}/{draw}")
        records = {}
        while len(records) < max(1, n // len(cities)) and fruitless < 500:  # few routes have one turn
            record = city.route(rng, rng.randint(1, turns), ends)
            key = json.dumps([record["start_place"], record["route_results"]["geocode_list"]])
            fruitless = fruitless + 1 if key in records else 0
            records.setdefault(key, record)
        of_city.append(records.values())
    return [record for one_of_each in zip_longest(*of_city) for record in one_of_each if record]


@cache
def built_in_world(
    split: str = "train", turns: int = 7, cities: Cities = TRAINING_CITIES, n: int = 2048, width: int = 1024
) -> World:
    """Those routes and all panoramas of the cities, `width` pixels wide."""
    ids = {geocode: name for key in cities for geocode, name in built_in_city(*key).panoramas.items()}
    routes = read_routes(built_in_routes(split, turns, cities, n))
    return World(routes, ids, partial(_album(width), cities))


@cache
def _album(width: int) -> Callable:
    """Draws the panorama at a geocode in the nearest of some cities; caches 800 MB."""

    @lru_cache(maxsize=2**29 // width**2)
    def draw(cities: Cities, geocode: Geocode) -> tuple[Image.Image, float]:
        nearest = min(cities, key=lambda key: distance(built_in_city(*key).plan.centre, geocode))
        return built_in_city(*nearest).draw(geocode, (width, width // 2)), 0.0

    return draw


# ---- streets: views


def look_around(
    panorama: Image.Image, rotation: float, heading: float, size: int, layout: str = "compass"
) -> Image.Image:
    """Four views in a 2 x 2 grid with a black gap of 5 pixels, in the order of VIEW_LAYOUTS."""
    pixels, grid = np.asarray(panorama.convert("RGB")), Image.new("RGB", (2 * size + 5, 2 * size + 5))
    for k, turn in enumerate(VIEW_LAYOUTS[layout]):
        corner = (k % 2 * (size + 5), k // 2 * (size + 5))
        grid.paste(view(pixels, heading + turn, rotation, size), corner)
    return grid


def view(panorama: Array, heading: float, rotation: float, size: int) -> Image.Image:
    """The perspective (gnomonic) view of a panorama [H, W, 3] (columns as in `City.draw`) at a heading, 90
    degrees wide, `size` pixels square, bilinear."""
    height, width = panorama.shape[:2]
    sideways, latitude = _sight(size)
    x = (heading % 360.0 + rotation + sideways) / 360.0 * width - 0.5
    y = ((90.0 - latitude) / 180.0 * height - 0.5).clip(0, height - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[:, None], (y - y0)[..., None]
    x1, y1 = (x0 + 1) % width, np.minimum(y0 + 1, height - 1)
    x0 %= width
    upper, lower = (panorama[row, x0] * (1 - fx) + panorama[row, x1] * fx for row in (y0, y1))
    return Image.fromarray((upper * (1 - fy) + lower * fy).round().astype(np.uint8))


@cache
def _sight(size: int) -> tuple[Array, Array]:
    """Angles of a view's pixels in degrees: to the right [size], up [size, size]."""
    line = (np.arange(size) + 0.5) / size * 2 - 1
    right, up = np.meshgrid(line, -line)
    return np.degrees(np.arctan(line)), np.degrees(np.arctan2(up, np.hypot(1, right)))


# ---- reading a reply

# A string may hold its quotes: it ends at the first before comma, colon, closing bracket or end. (Python
# before 3.11.5 needs the atomic group: its possessive ones may not hold what can backtrack.)
_STRING = r'"[^"\\]*+(?:(?>"(?!\s*+(?:[,:\]}]|\Z))|\\.?)[^"\\]*+)*+"?'
_KEY = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_WORD = r"""[^\s{}\[\]:,"']++"""
_REPLY_TOKEN = re.compile(
    rf"""\s*+(?:({_STRING}|{_STRING.replace('"', "'")})|([{{}}\[\]:,])|({_WORD}))""", re.DOTALL
)
_OBJECT_START = re.compile(rf"""{{(?=\s*+(?:{_KEY}|{_KEY.replace('"', "'")}|{_WORD})\s*+:)""", re.DOTALL)
_LITERAL = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]{0,5})(?:\.[0-9]{1,6})?")


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if abs(value) < 1e6 and value.is_integer() else value


_decoder = json.JSONDecoder(strict=False, parse_float=_number)


def parse_reply(reply: str, required: Sequence[str]) -> dict[str, Any] | None:
    """The object in `reply` that has all `required` keys and ends last, alone or inside others, or None.

    Accepts strict JSON and the JSON-like form of the released data: single quotes, bare words, trailing
    commas, quotes inside strings. 1.0 is the integer 1.

    Objects are read from the first one on, for the strings of the answer may hold anything, and from the last
    one on, for what precedes the answer must not hide it, each time within a budget: time is linear.
    """
    stop = min((reply.rfind(key) for key in required), default=len(reply))  # what starts later lacks a key
    starts = [*takewhile(stop.__gt__, (match.start() for match in _OBJECT_START.finditer(reply)))]
    found, last = None, -1
    for read, order in product((_read_json, _read_json_like), (starts, starts[::-1])):
        end, budget = 0, 150_000 + len(reply) / 2  # characters; what is read costs 200 more
        for start in order:
            if order is starts and start < end:
                continue
            value, end, budget = read(reply, start, budget)
            if value is not None and end > last and all(key in value for key in required):
                found, last = value, end
            if budget < 0:
                break
    return found


def _read_json(text: str, start: int, budget: float) -> tuple[dict | None, int, float]:
    """The object at `start` (None: no JSON), its end, and the remaining budget."""
    try:
        value, end = _decoder.raw_decode(text, start)
    except (ValueError, RecursionError) as error:  # its message counts the lines before the fault
        pos = getattr(error, "pos", len(text))
        return None, start, budget - 200 - (pos - start) - start / 10
    return value, end, budget - 200 - (end - start)


def _read_json_like(text: str, start: int, budget: float) -> tuple[dict | None, int, float]:
    """The same for the JSON-like form, rewritten token by token as strict JSON."""
    pieces, depth, before, at = [], 0, "[", start
    while (depth or not pieces) and budget >= 0 and (match := _REPLY_TOKEN.match(text, at)):
        budget -= (200 + len(match[0])) * (3 if "\\" in match[0] else 1)
        at, (quoted, mark, word) = match.end(), match.groups()
        if before not in "[{,:" and (not mark or mark in "[{"):
            break  # a comma is missing
        before = mark or "value"
        if mark and mark in "]}" and pieces[-1] == ",":
            pieces.pop()
        depth += (before in "[{") - (before in "]}")
        if quoted:
            pieces.append(json.dumps(_unescape(quoted[1:-1])))
        elif word:
            word = {"True": "true", "False": "false", "None": "null"}.get(word, word)
            pieces.append(word if _LITERAL.fullmatch(word) else json.dumps(word))
        else:
            pieces.append(mark)
    try:
        return _decoder.decode("".join(pieces)), at, budget
    except (ValueError, RecursionError):
        return None, start, budget


def _unescape(text: str) -> str:
    """A string without its escapes; as it stands if JSON does not know one of them."""
    if "\\" in text:
        with suppress(ValueError):
            return _decoder.decode('"' + re.sub(r'\\?"', r'\\"', text.replace(r"\'", "'")) + '"')
    return text


# ---- option checks


_type_hints = cache(partial(typing.get_type_hints, include_extras=True))


@cache
def options_of(cls: type) -> dict[str, tuple[Any, Any, Option]]:
    """Type, default (... if none) and Option of a class's options, by name."""
    return {
        name: (hint.__origin__, getattr(cls, name, ...), hint.__metadata__[0])
        for name, hint in _type_hints(cls).items()
        if typing.get_origin(hint) is Annotated
    }


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of an annotated type; an int is a float too, a bool is no int."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(_fits, inner, value))
    if inner:
        return any(_fits(one, value) for one in inner)
    accepted = (int, float) if kind is float else kind
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def one_line(value: Any) -> str:
    """In one line, cut short."""
    return " ".join(str(value).split())[:200]


# ---- tasks by name

TASKS = {"gp-l": GeneralPoints, "gp-vl": GeneralPointsVL, "virl-l": VIRL, "virl-vl": VIRLVL}


def make(task: str, variant: str = "id", seed: int = 0, **options) -> Environment:
    """An environment of one of TASKS or of FILE.py:CLASS. Raises ValueError for an unknown task or a wrong
    option or value."""
    return task_class(task)(variant, seed, **options)


def task_class(task: str) -> type[Environment]:
    """The class of one of TASKS or of FILE.py:CLASS. Raises ValueError."""
    if task in TASKS:
        return TASKS[task]
    path, _, name = task_name(task).rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}, or FILE.py:CLASS")
    found = getattr(_module(path), name, None)
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ValueError(f"{path} has no class {name!r} that is an Environment")
    return found


def task_name(task: str) -> str:
    """A task's name, for FILE.py:CLASS with the absolute path."""
    path, colon, name = task.rpartition(":")
    return f"{Path(path).resolve()}:{name}" if colon else task


@cache
def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(path, path)
    sys.modules[path] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it can raise anything
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {one_line(error)}") from None
    return module
