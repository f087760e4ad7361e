"""Environments: what all tasks share, GeneralPoints with its cards, V-IRL with its streets, and how an
episode is played.

This is the ground floor. It knows chat messages and strings, and no model:

    env = make("gp-l", variant="id", seed=0, verify_iter=5)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step(env.expert_reply())

An episode is a conversation (sequential revision, section 3 of arXiv 2501.17161): the model replies, the
verifier judges the whole reply and answers in words, and both join the prompt of the next turn, until a reply
is correct or `verify_iter` replies have been judged. Numbers are exact integers and fractions throughout, and
model text is never evaluated as code. A world of your own is a subclass of `Environment`; `FILE.py:CLASS`
names it.
"""

import ast
import cmath
import copy
import importlib.util
import json
import math
import os
import pickle
import pickletools
import random
import re
import string
import sys
import types
import typing
import unicodedata
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, cached_property, lru_cache, partial
from itertools import combinations, product, takewhile, zip_longest
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

# ---------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class Option:
    """What is said of an option beside its name, type and default. A class lists its options as attributes:

        target: Annotated[int, Option("the number to make", least=1)] = 24

    The constructor of an environment checks the limits, and the command line makes a flag of each.
    """

    help: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # like `least`, but the limit itself is too small
    choices: tuple = ()
    metavar: str | None = None  # with FILE the command line takes the text of a file

    def check(self, name: str, kind: Any, value: Any) -> None:
        """Raises ValueError in one line for a value of another type or outside the limits."""
        if not _fits(kind, value):
            raise ValueError(f"{name} must be {_type_name(kind)}, not {_line(repr(value))}")
        if self.choices and value is not None and value not in self.choices:
            raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(map(str, self.choices))}")
        for x in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(x, (int, float)) and not (self.least <= x <= self.most and x > self.above):
                raise ValueError(f"{name} must be {self.limits()}, not {x}")

    def limits(self) -> str:
        """The limits in words, "" if there are none."""
        said = (("at least", self.least), ("above", self.above), ("at most", self.most))
        return " and ".join(f"{word} {x}" for word, x in said if math.isfinite(x))


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of an annotated type. Integers are floats too; True and False are bool alone."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(_fits, inner, value))
    if inner:
        return any(_fits(one, value) for one in inner)
    accepted = (int, float) if kind is float else kind
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("pathlib.", "").replace("envs.", "")


def _line(value: Any) -> str:
    """Something foreign as one short line of an error."""
    return " ".join(str(value).split())[:120]


@cache
def options_of(cls: type) -> dict[str, tuple[Any, Any, Option]]:
    """Type, default (... if there is none) and Option of all options of a class, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: (hint.__origin__, getattr(cls, name, ...), hint.__metadata__[0])
        for name, hint in hints.items()
        if typing.get_origin(hint) is Annotated
    }


# --------------------------------------------------------------------------------------- what all tasks share


@dataclass(frozen=True)
class Observation:
    """What the model is given: the whole episode so far as chat messages, and the picture (None in words
    alone).

    With a picture one message's content is a list of parts, and the part of type "image" marks its place.
    `picture` may be a function that draws it when someone looks: judging a reply need not wait for it.
    """

    messages: list[dict[str, Any]]
    picture: Image.Image | Callable[[], Image.Image] | None = None

    @property
    def image(self) -> Image.Image | None:
        """The picture; the same object whenever one looks."""
        return self.picture() if callable(self.picture) else self.picture


def text_of(content: str | list[dict]) -> str:
    """A message's content as text, `<image>` and a newline for a picture, as the released data writes it."""
    if isinstance(content, str):
        return content
    return "".join("<image>\n" if part["type"] == "image" else part["text"] for part in content)


def parts_of(text: str) -> list[dict]:
    """The inverse of `text_of` for a message with a picture; without `<image>` that comes first."""
    *before, after = re.split("<image>\n?", text, maxsplit=1)
    texts = [{"type": "text", "text": text} for text in (*before, after)]
    return [part for part in (*texts[:-1], {"type": "image"}, texts[-1]) if part.get("text") != ""]


def read_picture(path: str | Path, formats: Sequence[str] | None = None) -> Image.Image:
    """A user's picture file in RGB, as an image viewer shows it: of several frames the first, turned as its
    EXIF data say, 16 bits scaled to 8, transparency on white. `formats` are Pillow's names, None: all.

    Raises ValueError in one line that names the file if it is damaged, too large or deeper than 16 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF data and large pictures
            with open(path, "rb") as file:  # given the path, Pillow 13.0 maps a turned TIFF in a wrong shape
                picture = ImageOps.exif_transpose(Image.open(file, formats=formats))
        if picture.mode.startswith(("I", "F")):  # Pillow would cut off what is above 255
            pixels = np.array(picture)
            if picture.mode == "F" or not 0 <= pixels.min() <= pixels.max() < 2**16:
                raise ValueError("its pixels are deeper than 16 bits")
            pixels[pixels == picture.info.get("transparency")] = 2**16 - 1
            picture = Image.fromarray((pixels / 257).round().astype(np.uint8))
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return picture.convert("RGB")
    except Exception as error:  # a damaged file can raise nearly anything
        reason = _line(error) or type(error).__name__
        raise ValueError(f"picture {path} cannot be read: {reason}") from None


class Verdict(NamedTuple):
    """The verifier's judgement of one reply."""

    verdict: str  # a key of the task's rewards
    feedback: str
    recognized: bool = False  # the reply names what is shown: the cards, the landmark, or that there is none


class Environment:
    """One task. A subclass says how an episode begins, how a reply is judged, and what an expert replies.

    An episode has one decision (a hand of cards) or several, one after another (the waypoints of a route).
    A right reply leads to the next one. A wrong one gets the verifier's feedback, until `verify_iter` replies
    to this decision were judged. The annotated attributes are the options, of the constructor and of the
    command line. A task of one's own needs `begin`, `judge`, `expert_reply` and `wrong_reply`, its `variants`
    and its `rewards`.

    Args:
        variant: a key of `variants`; training takes "id".
        seed: of the one random generator of this environment.
        verify_iter: None takes the task's own.
        rewards: by verdict, in place of some of the task's own.
        options: the task's other options.

    Raises ValueError for a wrong argument.
    """

    variants = {"id": "in distribution"}  # and what the report calls them
    rewards = {"correct": 1.0, "wrong": -1.0, "budget": 0.0}  # "budget" is added where it is used up
    decisions = 1  # right replies that finish an episode
    pictures = False  # whether a decision comes with a picture
    answer_field = ""  # the field of a reply that holds the answer, after the thought; "" if there is none
    start_options = {}  # of `reset`, by name: type and help for `sftrl play`
    series_length = 234  # episodes of an evaluation (paper, section 4)
    headline = "success"  # or "step_accuracy": the measure of the report

    verify_iter: Annotated[int, Option("replies judged per decision, the verification budget", least=1)] = 5
    go_on: bool = False  # for evaluation: where the budget of a decision is used up, go on with the next one

    def __init__(
        self,
        variant: str = "id",
        seed: int = 0,
        verify_iter: int | None = None,
        rewards: dict[str, float] | None = None,
        **options,
    ):
        if variant not in self.variants:
            raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(self.variants)}")
        if not isinstance(rewards, (dict, type(None))):
            raise ValueError(f"rewards must be a dict by verdict, not {_line(repr(rewards))}")
        usual = {"budget": 0.0} | self.rewards
        for name, value in (rewards or {}).items():
            if name not in usual:
                raise ValueError(f"unknown reward {name!r}: choose from {', '.join(usual)}")
            if not _fits(float, value) or not math.isfinite(value):
                raise ValueError(f"the reward {name!r} must be a finite number, not {_line(repr(value))}")
        if verify_iter is not None:
            options["verify_iter"] = verify_iter
        known, listed = typing.get_type_hints(type(self)), options_of(type(self))
        for name, value in options.items():
            if name not in known:
                said = f"{type(self).__name__} has no option {name!r}"
                raise ValueError(f"{said}: choose from {', '.join(listed)}")
            if name in listed:
                kind, _, option = listed[name]
                option.check(name, kind, value)
            setattr(self, name, value)
        self.variant, self.random, self.rewards = variant, random.Random(seed), usual | (rewards or {})
        self.messages: list[dict[str, Any]] = []
        self.picture: Image.Image | Callable[[], Image.Image] | None = None

    # What a task says:

    def begin(self, options: dict) -> str:
        """Starts an episode, drawn from `self.random` or as the options of `reset` say, and returns the
        prompt."""
        raise NotImplementedError

    def judge(self, reply: str) -> Verdict:
        """Judges any string as the reply to the present decision."""
        raise NotImplementedError

    def expert_reply(self) -> str:
        """A reply that the verifier accepts now."""
        raise NotImplementedError

    def wrong_reply(self) -> str:
        """A reply that it does not accept."""
        raise NotImplementedError

    def careless_reply(self) -> str:
        """An expert's reply with a bad habit, for the corpus of the tiny base."""
        return self.expert_reply()

    def next_message(self, right: bool, moved: bool) -> str:
        """What the model reads after a reply, if the episode goes on; `moved`: with the next decision."""
        return self.verdict.feedback

    def draw(self) -> Image.Image | Callable[[], Image.Image] | None:
        """The picture of the present decision, or a function that draws it and keeps it."""
        return None

    def describe(self) -> dict:
        """What `info` holds beside the verdict."""
        return {}

    def start_of(self, series: str, i: int) -> tuple[str, dict | None]:
        """Seed and options of `reset` for episode i of a series of evaluation."""
        return f"{series}/{i}", None

    @staticmethod
    def measures(episodes: Sequence["Episode"]) -> dict:
        """What an evaluation reports of this task beside success."""
        return {}

    # What all tasks do alike:

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[Observation, dict]:
        """Starts an episode. A seed restarts the random generator, None goes on with it."""
        if seed is not None:
            self.random.seed(seed)
        self.at = self.judged_at = 0  # the present decision, and that of the last reply
        self.judged = 0  # replies to the present decision
        self.failed, self.done = False, (False, False)
        self.verdict: Verdict | None = None
        prompt, self.messages = self.begin(options or {}), []
        self._tell(prompt, new=True)
        observation = self._observation()
        if self.pictures:
            observation.image  # one that cannot be read ends here
        return observation, self._info()

    def step(self, reply: str) -> tuple[Observation, float, bool, bool, dict]:
        """Judges one reply: observation, reward, terminated (solved), truncated (ended otherwise), info.

        Takes any string. After the end of an episode nothing is judged any more: the reward is 0, nothing
        changes.
        """
        self._check_started()
        if any(self.done):
            return self._observation(), 0.0, *self.done, self._info()
        self.verdict = self.judge(reply)
        self.judged_at, self.judged = self.at, self.judged + 1
        right = self.verdict.verdict == "correct"
        used_up = not right and self.judged >= self.verify_iter
        self.failed |= used_up
        if right or used_up:
            self.at, self.judged = self.at + 1, 0
        ended = self.at == self.decisions or used_up and not self.go_on
        self.done = (ended and not self.failed, ended and self.failed)
        self.messages.append({"role": "assistant", "content": reply})
        if not ended:
            self._tell(self.next_message(right, right or used_up), new=right or used_up)
        reward = self.rewards[self.verdict.verdict] + (self.rewards["budget"] if used_up else 0.0)
        return self._observation(), reward, *self.done, self._info()

    def _tell(self, text: str, new: bool) -> None:
        """A message to the model. A `new` decision has a picture of its own; earlier messages lose theirs."""
        content: str | list[dict] = text
        if new and self.pictures:
            for message in self.messages:
                if not isinstance(message["content"], str):
                    message["content"] = message["content"][-1]["text"]
            self.picture = self.draw()
            content = [{"type": "image"}, {"type": "text", "text": text}]
        self.messages.append({"role": "user", "content": content})

    def _check_started(self) -> None:
        if not self.messages:
            raise RuntimeError("call reset() first")

    def _observation(self) -> Observation:
        return Observation(copy.deepcopy(self.messages), self.picture)

    def _info(self) -> dict:
        verdict, feedback, recognized = self.verdict or (None, None, None)
        said = {"verdict": verdict, "feedback": feedback, "recognized": recognized}
        return {"decision": self.judged_at} | said | self.describe()

    @property
    def image(self) -> Image.Image | None:
        """The picture of the present decision, None in words alone."""
        return Observation([], self.picture).image

    @property
    def verdicts(self) -> list[str]:
        """All that `info["verdict"]` may be."""
        return [name for name in self.rewards if name != "budget"]

    def twin(self) -> "Environment":
        """Another environment of the same task, options and world, with a random generator of its own."""
        twin = copy.copy(self)
        twin.random = random.Random(0)
        return twin


# ----------------------------------------------------------------------------------------- playing an episode


@dataclass
class Turn:
    """One reply and what the verifier made of it."""

    reply: str
    reward: float
    verdict: str
    feedback: str  # what the model read next; after the last reply the verifier's words alone
    recognized: bool
    decision: int = 0  # to which it was the reply: on a route the waypoint
    landmark: bool = True  # there was something to recognize: cards, or a landmark


@dataclass
class Episode:
    """One conversation. `prompt` is the first user message, `asked` the dealt ranks or a route's expert
    actions."""

    prompt: str
    asked: list[str]
    turns: list[Turn] = field(default_factory=list)
    success: bool = False

    def most_tries(self) -> int:
        """Replies to the decision that took most."""
        return max(Counter(turn.decision for turn in self.turns).values())

    def transcript(self) -> dict:
        """The episode to read, as samples.jsonl keeps it."""
        turns = [
            {"reply": t.reply, "verdict": t.verdict, "reward": t.reward, "feedback": t.feedback}
            for t in self.turns
        ]
        return {"prompt": self.prompt, "success": self.success, "turns": turns}


def play(
    environments: Sequence[Environment],
    respond: Callable[[list[int], list[Observation]], list[str | None]],
    seeds: Sequence[int | str] | None = None,
    options: Sequence[dict] | None = None,
    at_once: int | None = None,
    watch: Callable[[int], None] = lambda done: None,
) -> list[Episode]:
    """Plays one episode in every environment, `at_once` of them in lockstep (None: all), to their end before
    the next begin.

    `respond(indices, observations)` is given the environments that still run, by index, and what each one
    shows, and returns one reply each: a model that samples a batch, or a script; None breaks the episode off,
    without success. `seeds` restart the environments' generators, `options` go to `reset`, `watch` learns how
    many episodes have ended.
    """
    observations, episodes = [], []
    for i, env in enumerate(environments):
        observation, info = env.reset(seeds[i] if seeds else None, options[i] if options else None)
        observations.append(observation)
        asked = info.get("actions", info.get("cards", []))
        episodes.append(Episode(text_of(observation.messages[0]["content"]), asked))
    waiting, running = list(range(len(environments))), []
    while waiting or running:
        if not running:
            running, waiting = waiting[:at_once], waiting[at_once:] if at_once else []
        replies = respond(running, [observations[i] for i in running])
        still = []
        for i, reply in zip(running, replies, strict=True):
            if reply is None:
                continue
            observations[i], reward, terminated, truncated, info = environments[i].step(reply)
            goes_on = not (terminated or truncated)
            read = text_of(observations[i].messages[-1]["content"]) if goes_on else info["feedback"]
            where = info.get("decision", 0), info.get("landmark", True)
            episodes[i].turns.append(Turn(reply, reward, info["verdict"], read, info["recognized"], *where))
            episodes[i].success = terminated
            if goes_on:
                still.append(i)
        running = still
        watch(len(environments) - len(waiting) - len(running))
    return episodes


def demonstration(
    env: Environment,
    wrong_turns: int = 0,
    author: Callable[[Any], str] | None = None,
    start: tuple[Any, dict | None] = (None, None),
) -> dict:
    """One SFT record in the released format: for each decision `wrong_turns` wrong replies with the
    verifier's feedback, then the expert's.

    The episode begins with `start`, seed and options of `reset`. An `author` writes the last reply in the
    expert's place. A visual task adds the picture as "image"; a record has one, so that of several decisions
    it ends with one drawn at random. Raises ValueError if the budget ends before the last reply.
    """
    if wrong_turns >= env.verify_iter:
        raise ValueError(f"{wrong_turns} wrong turns leave no reply in a budget of {env.verify_iter}")
    env.reset(*start)
    last = last_decision(env)
    for k in range(last + 1):
        for _ in range(wrong_turns):
            env.step(env.wrong_reply())
        reply = author(env) if author else env.expert_reply()
        if k < last:
            env.step(reply)
    return record(env, reply)


def last_decision(env: Environment) -> int:
    """The decision with which a record ends: the episode's last, or in pictures any one."""
    if env.pictures and env.decisions > 1:
        return env.random.randrange(env.decisions)
    return env.decisions - 1


def record(env: Environment, reply: str) -> dict:
    """The conversation so far and one more reply, in the released format."""
    speaker = {"user": "human", "assistant": "gpt"}
    messages = [*env.messages, {"role": "assistant", "content": reply}]
    turns = [{"from": speaker[m["role"]], "value": text_of(m["content"])} for m in messages]
    return ({"image": env.image} if env.image else {}) | {"conversations": turns}


# -------------------------------------------------------------------------------------------- reading a reply

# A string may hold quotes of its own kind: it ends at the first before comma, colon, closing bracket or end.
_STRING = r'"[^"\\]*+(?:(?:"(?!\s*+(?:[,:\]}]|\Z))|\\.?)[^"\\]*+)*+"?'
_KEY = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_WORD = r"""[^\s{}\[\]:,"']++"""
_REPLY_TOKEN = re.compile(
    rf"""\s*+(?:({_STRING}|{_STRING.replace('"', "'")})|([{{}}\[\]:,])|({_WORD}))""", re.DOTALL
)
_OBJECT_START = re.compile(rf"""{{(?=\s*+(?:{_KEY}|{_KEY.replace('"', "'")}|{_WORD})\s*+:)""", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,5})(?:\.[0-9]{1,6})?")
_NAMES = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}
_decoder = json.JSONDecoder(strict=False)


def parse_reply(reply: str, required: Sequence[str]) -> dict[str, Any] | None:
    """The object in `reply` that has all `required` keys and ends last, alone or inside others, or None.

    Accepts strict JSON and the JSON-like form of the released data: single quotes, bare words, trailing
    commas, quotes inside strings. 1.0 is the integer 1.

    Strict JSON is read first, then the JSON-like form: first the first object, for if the reply is one object
    its strings may hold anything, and then all objects, from the last to the first, for what stands before
    the answer, however long, must not hide it. Time is linear for any text: the effort of each round is
    bounded by the reply's length; once it is spent, what was found by then decides.
    """
    stop = min((reply.rfind(key) for key in required), default=len(reply))  # what starts later lacks a key
    starts = [*takewhile(stop.__gt__, (match.start() for match in _OBJECT_START.finditer(reply)))]
    found, last = _last_strict(reply, starts, required)
    for order in (starts[:1], reversed(starts)):
        effort = _Effort(1_500 + len(reply) / 100)  # one a token and 50 characters; a reply takes 40
        for start in order:
            try:
                text, end = _as_json(reply, start, effort)
                value = _decoder.decode(text)
            except OverflowError:
                break
            except (ValueError, RecursionError):
                continue
            if end > last and all(key in value for key in required):
                found, last = {key: _plain_numbers(x) for key, x in value.items()}, end
    return found


def _last_strict(reply: str, starts: Sequence[int], required: Sequence[str]) -> tuple[dict | None, int]:
    """Of the objects in strict JSON that begin at `starts`, the one that ends last and has all keys, and its
    end. They are read from the first one on, without those inside others, and once more from the last one
    on: neither what stands before the answer nor what stands in it uses up the effort of both rounds."""
    found, last = None, -1
    for order in (starts, reversed(starts)):
        end, effort = 0, len(reply) + 60_000  # characters
        for start in order:
            if effort < 0:
                break
            if order is starts and start < end:
                continue
            try:
                value, end = _decoder.raw_decode(reply, start)
            except (ValueError, RecursionError) as error:  # a fault costs time up to its place in the text
                effort -= 50 + getattr(error, "pos", len(reply)) - start + start // 10
                continue
            effort -= 50 + end - start
            if end > last and all(key in value for key in required):
                found, last = {key: _plain_numbers(x) for key, x in value.items()}, end
    return found, last


def _plain_numbers(value: Any) -> Any:
    """1.0 as 1, also in a list."""
    if isinstance(value, list):
        return [_plain_numbers(item) if isinstance(item, float) else item for item in value]
    return int(value) if isinstance(value, float) and abs(value) < 1e6 and value.is_integer() else value


class _Effort:
    """What may still be spent on reading a text."""

    def __init__(self, left: float):
        self.left = left

    def spend(self, effort: float) -> None:
        self.left -= effort
        if self.left < 0:
            raise OverflowError("too much to read")


def _as_json(text: str, at: int, effort: _Effort) -> tuple[str, int]:
    """The JSON-like object that starts at `at`, token by token as strict JSON, and where it ends."""
    pieces, depth, before = [], 0, "["
    while depth or not pieces:
        match = _REPLY_TOKEN.match(text, at)
        if not match:
            raise ValueError("end of text")
        effort.spend(1 + (match.end() - at) / 50)
        at, (quoted, mark, word) = match.end(), match.groups()
        if before not in "[{,:" and (not mark or mark in "[{"):
            raise ValueError("a comma is missing")
        before = mark or "value"
        if mark and mark in "]}" and pieces[-1] == ",":
            pieces.pop()
        depth += (before in "[{") - (before in "]}")
        if quoted:
            pieces.append(json.dumps(_unquoted(quoted[1:-1], effort)))
        elif word:
            word = _NAMES.get(word, word)
            pieces.append(word if word in _NAMES.values() or _NUMBER.fullmatch(word) else json.dumps(word))
        else:
            pieces.append(mark)
    return "".join(pieces), at


def _unquoted(text: str, effort: _Effort) -> str:
    """A string without its escapes; as it stands if JSON does not know one of them."""
    if "\\" not in text:
        return text
    effort.spend(2)
    with suppress(ValueError):
        return _decoder.decode(f'"{text}"')
    if len(text) < 2_000:  # a longer one is no answer
        effort.spend(len(text) / 10)
        with suppress(ValueError):  # between single quotes, or with quotes of its own
            as_json = {'"': r"\"", r"\'": "'"}
            text = _decoder.decode('"' + re.sub(r'\\.|"', lambda m: as_json.get(m[0], m[0]), text) + '"')
    return text


# ------------------------------------------------------------------------------------------ cards: the solver

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("spades", "clubs", "hearts", "diamonds")
COLORS = {"black": SUITS[:2], "red": SUITS[2:], "mixed": SUITS}
OPERATORS = "+-*/"


class Expression(NamedTuple):
    """A formula in normal form: a chain is a sum, first - second, or a product, first / second, its parts
    sorted.

    So a+(b+c), (c+a)+b and a-(0-b-c) written by other brackets are one and the same text.
    """

    value: Fraction
    kind: str  # "n" a number, "+" a sum, "*" a product
    first: tuple["Expression", ...]
    second: tuple["Expression", ...]
    text: str


def _order(part: Expression) -> tuple:
    """Compound parts first, then numbers from high to low: the one order in which a chain is written."""
    return (1, -part.value, "") if part.kind == "n" else (0, 0, part.text)


def _combine(x: Expression, op: str, y: Expression) -> Expression | None:
    """x op y in normal form; None for a division by zero."""
    if op == "/" and not y.value:
        return None
    kind, join, inverse, bracketed = ("+", "+", "-", "") if op in "+-" else ("*", "*", "/", "+")
    (x1, x2), (y1, y2) = ((e.first, e.second) if e.kind == kind else ((e,), ()) for e in (x, y))
    if op in "-/":
        y1, y2 = y2, y1
    first, second = (tuple(sorted(parts, key=_order)) for parts in (x1 + y1, x2 + y2))
    a, b = ([f"({p.text})" if p.kind == bracketed else p.text for p in parts] for parts in (first, second))
    return Expression(
        _apply(op, x.value, y.value), kind, first, second, join.join(a) + "".join(inverse + t for t in b)
    )


def _apply(op: str, a: Fraction, b: Fraction) -> Fraction:
    return {"+": a.__add__, "-": a.__sub__, "*": a.__mul__, "/": a.__truediv__}[op](b)


def _splits(numbers: tuple[int, ...]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every way to part a sorted multiset in two non-empty ones, once each, the smaller one first."""
    places = range(len(numbers))
    chosen = [set(c) for size in range(1, len(numbers) // 2 + 1) for c in combinations(places, size)]
    parts = ([[numbers[i] for i in places if (i in c) == side] for side in (True, False)] for c in chosen)
    return {tuple(sorted(map(tuple, pair), key=lambda part: (len(part), part))) for pair in parts}


@lru_cache(maxsize=None)
def _expressions(numbers: tuple[int, ...], operators: str) -> dict[Fraction, dict[str, Expression]]:
    """All formulas over a sorted multiset that use every number once: value -> text -> expression."""
    if len(numbers) == 1:
        value, text = Fraction(numbers[0]), str(numbers[0])
        return {value: {text: Expression(value, "n", (), (), text)}}
    found: dict[Fraction, dict[str, Expression]] = {}
    for pair in _splits(numbers):
        sides = [[e for same in _expressions(p, operators).values() for e in same.values()] for p in pair]
        for (x, y), op in product(product(*sides), operators):
            for a, b in ((x, y), (y, x))[: 1 + (op in "-/")]:
                if (e := _combine(a, op, b)) is not None:
                    found.setdefault(e.value, {})[e.text] = e
    return found


@lru_cache(maxsize=None)
def solve(numbers: tuple[int, ...], target: int = 24, operators: str = OPERATORS) -> str | None:
    """The canonical formula with value `target` that uses each of `numbers` (sorted) exactly once; None:
    there is none.

    Canonical is the one with the fewest divisions, then subtractions, then brackets: a fixed choice with few
    patterns, so that demonstrations follow one rule.
    """
    if len(numbers) == 1:
        return str(target) if numbers[0] == target else None
    found: set[str] = set()
    t = Fraction(target)
    for left, right in _splits(numbers):
        partners = _expressions(right, operators)
        for value, same in _expressions(left, operators).items():
            # Solve x op y = t for y instead of trying all pairs: so all hands take a second.
            wanted = [("+", t - value, False), ("-", value - t, False), ("-", t + value, True)]
            if value:
                wanted += [("*", t / value, False), ("/", value / t, False), ("/", t * value, True)]
            for op, need, swap in wanted:
                if op in operators and need in partners:
                    for x, y in product(same.values(), partners[need].values()):
                        found.add(_combine(*((y, op, x) if swap else (x, op, y))).text)
    return min(found, key=lambda f: (f.count("/"), f.count("-"), f.count("("), len(f), f), default=None)


# ---------------------------------------------------------------------------------------- cards: the verifier

FIELDS = ("cards", "number", "formula")
# Of one side, characters and brackets within brackets: more is no answer, and judging stays fast.
MAX_FORMULA, MAX_BRACKETS = 200, 20

# What the verifier says, by verdict: templates that may hold $target and the placeholders of PLACEHOLDERS.
FEEDBACK = {
    "correct": "Correct.",
    "wrong_value": "The formula gives $value, not $target. Try again.",
    "wrong_numbers": "$reason. Try again.",
    "illegal": "The formula is not a legal equation: $reason. Try again.",
    "unparsed": "The answer is not in the form asked for. Try again.",
}
PICTURE_FEEDBACK = FEEDBACK | {"misread": "These are not the cards on the table. Try again."}
# $number is there once too often or left out; $reason says which of the two, or why a formula is illegal.
PLACEHOLDERS = {"wrong_value": {"value"}, "wrong_numbers": {"reason", "number"}, "illegal": {"reason"}}


class Illegal(ValueError):
    """A formula that is not a legal equation; the message is the reason, in words for the model."""


def evaluate_formula(side: str) -> tuple[Fraction, list[int]]:
    """Exact value and numbers of one side of an equation: integers and brackets with + - * /; no sign, no
    power, no function. Raises `Illegal`."""
    if len(side) > MAX_FORMULA:
        raise Illegal("it is too long")
    if "=" in side:
        raise Illegal("it holds more than one equals sign")
    text = side.replace("×", "*").replace("÷", "/").replace("−", "-")
    if not re.fullmatch(r"[-+*/()\s0-9]*", text):
        raise Illegal("it holds something else than numbers, operators and brackets")
    tokens, depth, operand = re.findall(r"[0-9]+|[-+*/()]", text), 0, True  # whether an operand is to come
    for token in tokens:  # what is no plain formula ends here, before Python parses it
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
        op = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(node.op)]
        a, b = value(node.left), value(node.right)
        if op == "/" and not b:
            raise Illegal("it divides by zero")
        return _apply(op, a, b)

    tree = ast.parse("".join(tokens), mode="eval").body
    return value(tree), [int(token) for token in tokens if token.isdigit()]


def judge(
    reply: str,
    cards: Sequence[str],
    numbers: Sequence[int],
    target: int,
    fields: Sequence[str] = FIELDS,
    feedback: dict[str, str] = FEEDBACK,
) -> Verdict:
    """One verdict per reply, by the first test that fails: form, cards, equation, numbers, value.

    `cards` are the dealt rank names, `numbers` what they count under the rule in force, `feedback` the
    templates of what the verifier says. If these have no word for misread cards, what the reply says of the
    cards is not judged. The order goes from the fault that makes all later tests meaningless to the mildest,
    so penalties never add up. The right side counts only where the left one hits the target.
    """

    def verdict(name: str, **values: str) -> Verdict:
        return Verdict(name, string.Template(feedback[name]).substitute(values, target=target), recognized)

    parsed, recognized = parse_reply(reply, fields), False
    named, stated, formula = [parsed[f] for f in fields] if parsed else (None, None, None)
    if not (isinstance(stated, list) and isinstance(formula, str)):
        return verdict("unparsed")
    if isinstance(named, list) and len(named) == len(cards):
        recognized = Counter(str(card).strip().upper() for card in named) == Counter(cards)
    if "misread" in feedback and not recognized:
        return verdict("misread")
    left, equals, right = formula.partition("=")
    try:
        value, used = evaluate_formula(left)
        if any(re.match(r"\s*-?0[0-9]", str(n)) for n in stated[: len(numbers) + 1]):
            raise Illegal("a number begins with a zero")
        if value == target and equals and evaluate_formula(right)[0] != target:
            raise Illegal("its two sides differ")
    except Illegal as reason:
        return verdict("illegal", reason=str(reason))
    have = Counter(map(str, numbers))
    for count in (Counter(str(n).strip() for n in stated[: len(numbers) + 1]), Counter(map(str, used))):
        if extra := count - have:
            number = _short(next(iter(extra)))
            return verdict("wrong_numbers", reason=f"There is no {number} left to use", number=number)
        if missing := have - count:
            return verdict("wrong_numbers", reason="A number was left out", number=next(iter(missing)))
    if value != target:
        return verdict("wrong_value", value=_short(str(value)))
    return verdict("correct")


def _short(text: str) -> str:
    """A number that a model wrote, if it is one and short; the verifier repeats nothing else of a reply."""
    return text if re.fullmatch("-?[0-9]{1,10}(/[0-9]{1,10})?", text) else "such number"


# ---------------------------------------------------------------------------------------- cards: the pictures

TABLE, PAPER, GOLD, SKIN = (31, 107, 66), (252, 251, 246), (226, 178, 60), (240, 208, 176)  # RGB
INK = {"spades": (20, 20, 24), "clubs": (20, 20, 24), "hearts": (226, 78, 78), "diamonds": (226, 78, 78)}
# Rows of the marks on a number card, from 0 (top) to 6, in the two outer columns and in the middle one.
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
    """A head and shoulders. The hat tells the ranks apart: a feathered cap, a crown with balls, a crown with
    a cross over a beard."""
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


def _mark(rank: str, suit: str, size: float) -> Image.Image:
    """What stands in a card's corner: the rank, of a font of `size` pixels, and the suit below it."""
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


@lru_cache(maxsize=512)
def draw_card(rank: str, suit: str, height: int, font_size: float) -> Image.Image:
    """One card as RGBA, `height` pixels high and 5/7 as wide, transparent outside its rounded corners.

    Rank and suit stand in two corners, the second pair upside down; `font_size` is the rank's share of the
    height. In the middle: the marks that the rank counts, a framed figure for J, Q, K, and one large mark for
    the ace and where large letters leave no room.
    """
    h = 4 * height  # drawn four times as large and scaled down: smooth edges
    w = round(h * 5 / 7)
    corner, gap, ink = Image.new("RGBA", (w, h)), round(0.035 * h), INK[suit]
    corner.paste(_mark(rank, suit, font_size * h), (gap, gap))
    card = corner.copy()
    if rank in PIPS and font_size <= 0.22:
        outer, middle = PIPS[rank]
        half = Image.new("RGBA", (w, h))
        for column, row in [(c, r) for c in (-1, 1) for r in outer] + [(0, r) for r in middle]:
            # Marks below the middle stand on their heads: they are drawn mirrored, and then turned.
            sign, picture = (1, card) if row <= 3 else (-1, half)
            x, y = w * (0.5 + 0.16 * sign * column), h * (0.5 + 0.64 * sign * (row / 6 - 0.5))
            _suit(_Pen(picture, x, y, 0.14 * h), suit)
        card.alpha_composite(half.rotate(180))
    elif rank in "JQK":
        frame = [0.24 * w, 0.18 * h, 0.76 * w, 0.775 * h]
        ImageDraw.Draw(card).rectangle(frame, outline=ink, width=max(1, h // 120))
        _figure(_Pen(card, w / 2, 0.52 * h, 0.42 * h), rank, ink)
    else:
        _suit(_Pen(card, w / 2, h / 2, (0.3 if font_size <= 0.22 else 0.2) * h), suit)
    card.alpha_composite(corner.rotate(180))
    paper = Image.new("RGBA", (w, h))
    edge = {"outline": (90, 90, 90), "width": max(1, h // 150)}
    ImageDraw.Draw(paper).rounded_rectangle([0, 0, w - 1, h - 1], h // 14, fill=PAPER, **edge)
    paper.alpha_composite(card)
    return paper.resize((round(w / 4), height), Image.LANCZOS)


def draw_hand(
    ranks: Sequence[str],
    suits: Sequence[str],
    size: tuple[int, int],
    jitter: float,
    font_size: float,
    rng: random.Random,
) -> Image.Image:
    """Cards side by side on a green table, `size` = (width, height) in pixels. `jitter` from 0 to 1 moves,
    turns (at most 12 degrees) and scales (at most 10%) each card at random; every card stays in its own
    part of the table."""
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


# ------------------------------------------------------------------------------------- cards: the environment

FACE_RULES = {  # what J, Q and K count, by variant (paper, section 3.1)
    "id": {"J": 10, "Q": 10, "K": 10},
    "rule": {"J": 11, "Q": 12, "K": 13},
}
PROMPT = (  # $cards is A, 3, K, 10; $cards_list in its place is the same as a Python list
    "Make $target from the numbers of the cards, each used once, with the operators $operators and brackets. "
    "Cards: $cards. The ace counts one, $rule. Answer in this form: "
    '{"$field_cards": [...], "$field_number": [...], "$field_formula": "an equation"}'
)


class GeneralPoints(Environment):
    """Make `target` from the numbers of `n_cards` cards (paper, section 3.1).

    Variants: "id" (J, Q, K count 10) and "rule" (11, 12, 13, and every hand holds a face card).

    Options that are not flags of the command line:
        faces: what J, Q, K count; None takes the variant's rule.
        fields: the names of the three fields of a reply.
        feedback: other words for the verifier: templates by verdict, see FEEDBACK and PLACEHOLDERS.
    """

    variants = {"id": "in distribution", "rule": "under the other rule"}
    rules = FACE_RULES
    # Paper, appendix. A reply that cannot be read counts like any other illegal equation.
    rewards = {
        "correct": 5.0,
        "wrong_value": -1.0,
        "wrong_numbers": -2.0,
        "illegal": -3.0,
        "unparsed": -3.0,
        "budget": -1.0,
    }
    start_options = {"cards": (str, 'deal this hand, for example "A 3 K 10"')}
    default_feedback = FEEDBACK
    suits = SUITS  # in the deck

    n_cards: Annotated[int, Option("cards per hand", least=1, most=6)] = 4
    target: Annotated[int, Option("the number to make", least=1)] = 24
    operators: Annotated[str, Option("operators allowed")] = OPERATORS
    replacement: Annotated[bool, Option("deal each rank by itself, as the released code does")] = False
    diverse: Annotated[bool, Option("J, Q, K count anything from 1 to 10, anew in each hand")] = False
    prompt: Annotated[str, Option("a prompt of your own, a template as PROMPT", metavar="FILE")] = PROMPT
    faces: dict[str, int] | None = None
    fields: Sequence[str] = FIELDS
    feedback: dict[str, str] | None = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if len(set(self.fields)) != len(FIELDS):
            raise ValueError(f"fields must be {len(FIELDS)} different names, not {self.fields!r}")
        if not self.operators or set(self.operators) - set(OPERATORS):
            raise ValueError(f"operators must be some of {OPERATORS}, not {self.operators!r}")
        self.operators = "".join(op for op in OPERATORS if op in self.operators)
        self.faces = dict(self.faces or self.rules[self.variant])
        if not all(_fits(int, n) and n >= 1 for n in self.faces.values()):
            raise ValueError("what faces count must be integers from 1")
        self.answer_field, self.cards = self.fields[-1], []
        if not isinstance(self.feedback, (dict, type(None))):
            raise ValueError("feedback must be a dict of texts by verdict")
        self.feedback = self.default_feedback | (self.feedback or {})
        self._check_prompt()
        self._check_feedback()

    def _check_prompt(self) -> None:
        try:
            self._prompt(["A"] * self.n_cards)
        except (KeyError, ValueError) as error:
            raise ValueError(f"the prompt template has a wrong placeholder: {error}") from None
        stated = set(string.Template(self.prompt).get_identifiers())
        if not self.pictures and not stated & {"cards", "cards_list"}:
            raise ValueError("the prompt template states the cards nowhere: it needs $cards or $cards_list")

    def _check_feedback(self) -> None:
        for verdict, text in self.feedback.items():
            if verdict not in self.default_feedback:
                known = ", ".join(self.default_feedback)
                raise ValueError(f"unknown verdict {verdict!r}: choose from {known}")
            template = string.Template(text if isinstance(text, str) else "$")  # a lone $ is no template
            allowed = {"target"} | PLACEHOLDERS.get(verdict, set())
            if not template.is_valid() or set(template.get_identifiers()) - allowed:
                names = ", ".join(f"${name}" for name in sorted(allowed))
                raise ValueError(f"the feedback of {verdict!r} must be text with no placeholders but {names}")

    def value_of(self, card: str) -> int:
        """What a rank counts under the rule in force."""
        return self.faces.get(card) or (1 if card == "A" else int(card))

    def _prompt(self, cards: Sequence[str]) -> str:
        return string.Template(self.prompt).substitute(
            self._stated(cards),
            target=self.target,
            operators=self.operators,
            rule=", ".join(f"{face} is {self.faces[face]}" for face in "JQK"),
            **{f"field_{name}": own for name, own in zip(FIELDS, self.fields)},
        )

    def _stated(self, cards: Sequence[str]) -> dict[str, str]:
        """What the prompt says of the cards, by placeholder."""
        return {"cards": ", ".join(cards), "cards_list": str(list(cards))}

    def begin(self, options: dict) -> str:
        """Deals a new solvable hand, or `options["cards"]`, whatever the variant."""
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
        n, least = self.n_cards, int(self.variant == "rule")  # at least so many of J, Q, K
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
        """A reply in the required form that names `cards`, the dealt ones if None, and gives `formula`."""
        self._check_started()
        cards = self.cards if cards is None else cards
        parts = cards, [self.value_of(card) for card in cards], formula
        return json.dumps(dict(zip(self.fields, parts)), ensure_ascii=False)

    def expert_reply(self) -> str:
        return self.reply(f"{self._solution(self.cards)}={self.target}")

    def careless_reply(self) -> str:
        """The canonical solution with "x" for every product, as people write it: then no legal equation."""
        return self.reply(self._solution(self.cards).replace("*", "x") + f"={self.target}")

    def wrong_reply(self) -> str:
        """A reply with the right cards and numbers whose formula, a near miss of a solution, has another
        value."""
        solution = re.findall("[0-9]+|.", self._solution(self.cards))
        for _ in range(1000):
            tokens = list(solution)
            numbers = [i for i, token in enumerate(tokens) if token.isdigit()]
            for i, value in zip(numbers, self.random.sample([tokens[i] for i in numbers], len(numbers))):
                tokens[i] = value
            operators = [i for i, token in enumerate(tokens) if token in OPERATORS]
            if operators:
                tokens[self.random.choice(operators)] = self.random.choice(self.operators)
            with suppress(Illegal):
                if evaluate_formula("".join(tokens))[0] != self.target:
                    return self.reply("".join(tokens) + f"={self.target}")
        raise ValueError(f"no wrong formula was found for the hand {' '.join(self.cards)}")


class GeneralPointsVL(GeneralPoints):
    """GeneralPoints with the cards in a picture (paper, section 3.1): the reply must name what is seen.

    Variants: also "visual", the training rule and the other colour, red.
    """

    variants = GeneralPoints.variants | {"visual": "on the other colour"}
    rules = FACE_RULES | {"visual": FACE_RULES["id"]}
    rewards = GeneralPoints.rewards | {"misread": -1.5}
    default_feedback = PICTURE_FEEDBACK
    pictures = True

    color: Annotated[str | None, Option("of the suits; None: the variant's", choices=tuple(COLORS))] = None
    size: Annotated[tuple[int, int], Option("pixels of the picture", least=32, most=4096)] = (1200, 480)
    jitter: Annotated[float, Option("disorder of the cards", least=0, most=1)] = 0.3
    font_size: Annotated[float, Option("the ranks' share of a card's height", least=0.05, most=0.5)] = 0.17

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.suits = COLORS[self.color or ("red" if self.variant == "visual" else "black")]

    def _stated(self, cards: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(("cards", "cards_list"), "in the picture, from left to right")

    def draw(self) -> Image.Image:
        """The hand. Cards of one rank get different suits as long as the deck has them."""
        left: dict[str, list[str]] = {}
        suits = []
        for card in self.cards:
            if not left.get(card):
                left[card] = self.random.sample(self.suits, len(self.suits))
            suits.append(left[card].pop())
        return draw_hand(self.cards, suits, tuple(self.size), self.jitter, self.font_size, self.random)

    def wrong_reply(self) -> str:
        """Half the time the wrong formula of the text task, else a solution of the hand with one card
        misread."""
        for _ in range(1000 if self.random.random() < 0.5 else 0):
            cards, place = list(self.cards), self.random.randrange(self.n_cards)
            cards[place] = self.random.choice([rank for rank in RANKS if rank != cards[place]])
            if solution := self._solution(cards):
                return self.reply(f"{solution}={self.target}", cards)
        return super().wrong_reply()


# ---------------------------------------------------------------------------------- streets: where things are

Geocode = tuple[float, float]  # latitude, longitude, in degrees
COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
RELATIVE = ("left", "right", "slightly left", "slightly right")
METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of 6,371 km
NEAR = 20.0  # metres: a panorama farther from a point does not show it (released code)
NOTHING = "No landmarks nearby"


def wrap(degrees: float) -> float:
    """An angle in (-180, 180]."""
    return 180.0 - (180.0 - degrees) % 360.0


def offset(a: Geocode, b: Geocode) -> tuple[float, float]:
    """Metres to the east and to the north from a to b, two points of one city."""
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
    return COMPASS[round(heading % 360.0 / 45.0) % 8]


def relative_word(turn: float) -> str:
    """What one says of a turn of so many degrees, right positive."""
    turn = wrap(turn)
    return ("slightly " if abs(turn) <= 45.0 else "") + ("right" if turn > 0 else "left")


class Panoramas:
    """Panorama ids by place, and the nearest one within NEAR metres."""

    def __init__(self, ids: dict[Geocode, str]):
        self.ids, self.places = ids, sorted(ids)

    def nearest(self, place: Geocode) -> Geocode | None:
        """The place of the nearest panorama, None if none is within NEAR metres."""
        if place in self.ids:
            return place
        reach = NEAR / METRES_PER_DEGREE + 1e-9  # in degrees of latitude, by which the places are sorted
        first, last = (bisect_left(self.places, (place[0] + side,)) for side in (-reach, reach))
        best = min(self.places[first:last], key=lambda p: distance(p, place), default=None)
        return best if best is not None and distance(best, place) <= NEAR else None


# ---------------------------------------------------------------------------- streets: routes and their files


class Leg(NamedTuple):
    """A straight stretch of a route, by where it ends: a turning point or, last, the destination."""

    end: Geocode
    heading: float  # of the leg, compass degrees
    compass: str  # and the word of COMPASS that the file has for it
    landmark: str  # what is seen at its end, as "Starbucks is on your left behind", or NOTHING


class Route(NamedTuple):
    """One route. `heading` is where the agent looks at the start, None: anywhere."""

    start: Geocode
    heading: float | None
    legs: tuple[Leg, ...]


@dataclass(frozen=True)
class World:
    """What `VIRL` walks through: routes and panoramas. `picture(place)` is the equirectangular picture of a
    panorama and its rotation in degrees, None where there are no pictures; of the panoramas at `lost` it is
    missing, and between turning points no walk comes by."""

    routes: tuple[Route, ...]
    panoramas: Panoramas
    picture: Callable[[Geocode], tuple[Image.Image, float]] | None = None
    lost: frozenset[Geocode] = frozenset()

    @cached_property
    def names(self) -> frozenset[str]:
        """The letters of all landmarks' names."""
        landmarks = {leg.landmark for route in self.routes for leg in route.legs} - {NOTHING}
        return frozenset(_landmark(landmark)[1] for landmark in landmarks)


# What a pickled dict from pairs of numbers to strings or None is made of, and nothing else.
_NUMBERS = {"FLOAT", "BINFLOAT", "INT", "BININT", "BININT1", "BININT2", "LONG1"}
_ALLOWED_CODES = _NUMBERS | set(
    "PROTO MARK NONE EMPTY_DICT DICT SETITEM SETITEMS TUPLE TUPLE2 UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET STOP".split()
)


def _read_pickle(data: bytes) -> Any:
    """A pickled dict from pairs of numbers to strings. Raises ValueError before anything is built if the
    pickle asks for something else: a function to call, a memo larger than the file, keys of keys (whose hash
    could take for ever)."""
    before = ["", "", ""]
    for code, argument, _ in pickletools.genops(data):
        if code.name == "FRAME":  # protocols 4 and 5 cut the codes into frames, anywhere; it builds nothing
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


def _read_mapping(path: Path) -> dict[Geocode, str]:
    """The entries of gps_pano_mapping.pkl that can be used. Raises ValueError if there are none."""
    try:
        content = _read_pickle(path.read_bytes())
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} cannot be read: {_line(error)}") from None
    ids = {
        place: name
        for place, name in (content.items() if isinstance(content, dict) else ())
        # The name will be that of a file.
        if _is_geocode(place) and isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII)
    }
    if not ids:
        raise ValueError(f"{path}: no panorama id: not a dict from (latitude, longitude) to names")
    return ids


def load_world(folder: str | Path, pictures: bool = False) -> World:
    """Reads a folder in the released format: route_infos.json, gps_pano_mapping.pkl and, for pictures,
    street_views/.

    What no route uses may be anything. A route that cannot be walked is left out, with one warning that
    counts them; without a single one that can, ValueError in one line names file, route and field. With
    `pictures` the files of the panoramas where a route starts, turns and ends must be there, and a warning
    says how many others are missing; what is in them is read when a walk comes by.
    """
    folder = Path(folder)
    path, mapping, views = (folder / n for n in ("route_infos.json", "gps_pano_mapping.pkl", "street_views"))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {_line(error)}") from None
    ids = _read_mapping(mapping)
    if pictures and not views.is_dir():
        raise ValueError(f"{folder}: the routes have no panoramas: there is no street_views/")
    panoramas = Panoramas(ids)

    def check(route: Route) -> None:
        named = {f"route_results.geocode_list[{i}]": leg.end for i, leg in enumerate(route.legs)}
        for name, place in {"start_place.relocated_geocode": route.start, **named}.items():
            near = panoramas.nearest(place)
            if near is None:
                raise ValueError(f"{name}: {mapping.name} has {_nothing_near(place)}")
            for file in _picture_files(views, ids[near]) if pictures else ():
                if not file.is_file():
                    raise ValueError(f"{name}: there is no {file}")

    routes = read_routes(content, str(path), check)
    if not views.is_dir():
        return World(routes, panoramas)
    lost = frozenset(_without_picture(views, ids) if pictures else ())
    if lost:
        said = f"{views}: {len(lost)} of {len(ids)} panoramas are missing; no walk comes by"
        warnings.warn(said, stacklevel=2)
    return World(routes, panoramas, partial(_read_picture, views, ids), lost)


def _nothing_near(place: Geocode) -> str:
    return f"no panorama within {NEAR:.0f} m of {place[0]:.6f}, {place[1]:.6f}"


def _picture_files(views: Path, name: str) -> tuple[Path, Path]:
    return views / f"{name}.jpg", views / f"{name}.metadata.json"


def _without_picture(views: Path, ids: dict[Geocode, str]) -> list[Geocode]:
    """The places of the panoramas that are not, or not wholly, in street_views/."""
    there = {entry.name for entry in os.scandir(views) if entry.is_file()}
    return [p for p, name in ids.items() if not there.issuperset(f.name for f in _picture_files(views, name))]


def _read_picture(views: Path, ids: dict[Geocode, str], place: Geocode) -> tuple[Image.Image, float]:
    """A panorama from street_views/, and its rotation. Raises ValueError in one line if either is broken."""
    path, metadata = _picture_files(views, ids[place])
    picture = read_picture(path, ["JPEG"])
    try:
        return picture, _degrees(json.loads(metadata.read_text(encoding="utf-8"))["rotation"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{metadata}: rotation: {_line(error)}") from None


def _is_geocode(value: Any) -> bool:
    return _fits(tuple[float, float], value) and abs(value[0]) <= 90 and abs(value[1]) <= 180


def _geocode(value: Any) -> Geocode:
    if not _is_geocode(value):
        raise ValueError(f"no [latitude, longitude]: {_line(value)}")
    return float(value[0]), float(value[1])


def _degrees(value: Any) -> float:
    if not (_fits(float, value) and -360 <= value <= 360):
        raise ValueError(f"no number of degrees: {_line(value)}")
    return float(value)


def read_routes(
    content: Any, name: str = "routes", check: Callable[[Route], None] = lambda route: None
) -> tuple[Route, ...]:
    """The routes in what route_infos.json holds: [[route, ...], number], or one bare route.

    Those that cannot be read, or for which `check` raises ValueError, are left out with a warning. Raises
    ValueError if no route is left. `name` is the file's, for both.
    """
    records = content if isinstance(content, list) else [content]
    if records and isinstance(records[0], list):
        records = records[0]
    routes, faults = [], []
    for k, record in enumerate(records):
        try:
            route = _read_route(record)
            check(route)
            routes.append(route)
        except ValueError as error:
            faults.append(f"route {k}: {error}")
    if not routes:
        raise ValueError(f"{name}: {faults[0] if faults else 'no routes'}")
    if faults:
        lost = f"{len(faults)} of {len(records)} routes cannot be walked and are left out"
        warnings.warn(f"{name}: {lost}, such as {faults[0]}", stacklevel=2)
    return tuple(routes)


def _read_route(route: Any) -> Route:
    """One route. Whatever is wrong with it ends in one line that names the field and the reason."""
    where = "start_place.relocated_geocode"  # what is being read
    try:
        start = _geocode(route["start_place"]["relocated_geocode"])
        where = "route_results.geocode_list"
        ends = [_geocode(end) for end in route["route_results"]["geocode_list"]]
        where = "milestone_info"
        blocks, legs = _milestones(route["milestone_info"]), []
        if not ends or len(blocks) != len(ends):
            raise ValueError(f"{len(blocks)} blocks for {len(ends)} points of route_results.geocode_list")
        for i, (block, end) in enumerate(zip(blocks, ends), 1):
            where = f"milestone_info, block {i}: to_next_intersection_heading"
            heading = block["to_next_intersection_heading"]
            number = re.fullmatch(r"\s*(-?\d{1,3}(?:\.\d{1,9})?)\s*(?:\((.*)\)\s*)?", heading, re.ASCII)
            degrees = _degrees(float(number[1]) if number else heading) % 360.0
            word = (number[2] or "").strip().lower()
            where = f"milestone_info, block {i}: landmarks"
            landmark = _landmark_of(block.get("landmarks", ""), route if i == len(ends) else None)
            legs.append(Leg(end, degrees, word if word in COMPASS else compass_word(degrees), landmark))
        where = "init_heading"
        heading = route.get("init_heading")
        heading = None if heading is None else _degrees(heading)
    except KeyError as missing:
        raise ValueError(f"{where}: no field {missing}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not in the released format: {_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Route(start, heading % 360.0 if heading else None, tuple(legs))  # 0: draw one


def _landmark_of(text: str, last_of: dict | None) -> str:
    """What is seen at the end of a leg. At the last one of a route nobody would know where to stop without a
    sign."""
    landmark = text.strip().rstrip(".")
    if not landmark or _NO_LANDMARK.fullmatch(_words(landmark)):
        landmark = NOTHING
        if last_of:
            place = last_of.get("dest_place")
            name = place.get("name") if isinstance(place, dict) else None
            landmark = f"The destination {name}" if isinstance(name, str) else "The destination"
    landmark = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", landmark).split())
    unprintable = any(unicodedata.category(c) in ("Cc", "Cs") for c in landmark)
    if len(landmark) > 300 or not _landmark(landmark)[0] or "<image>" in landmark or unprintable:
        raise ValueError(f"no text of up to 300 characters: {_line(repr(landmark))}")
    return landmark


# In milestone_info: where a block begins, or a key and its value, which ends before another key or the
# block's end.
_MILESTONE = re.compile(
    r'(?:\A|\}|\n)[\s,]*\{|"(\w+)"[^\S\n]*:\s*"(.*?)"(?=\s*,?\s*(?:"\w+"\s*:|\}\s*,?\s*(?:\{|\Z)|\Z))'
)


def _milestones(text: str) -> list[dict[str, str]]:
    """The blocks of milestone_info that hold something. It is no JSON: a value may hold quotes and braces,
    and lines may be joined."""
    blocks: list[dict[str, str]] = []
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
    picture: Callable[[Geocode], tuple[Image.Image, float]] | None = None,
    watch: Callable[[float], None] = lambda share: None,
) -> None:
    """Writes a folder that `load_world` reads; `picture` as in World. `watch` is told the share that is done.

    The routes come last: a folder that was not finished does not load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    routes = folder / "route_infos.json"
    routes.unlink(missing_ok=True)
    (folder / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(ids))
    if picture:
        views = folder / "street_views"
        views.mkdir(exist_ok=True)
        for k, (place, name) in enumerate(ids.items()):
            watch(k / len(ids))
            image, rotation = picture(place)
            file, metadata = _picture_files(views, name)
            image.save(file, quality=100, subsampling=0)
            metadata.write_text(json.dumps({"rotation": rotation}))
    aside = routes.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(routes)
    watch(1.0)


# ---------------------------------------------------------------------------------- streets: synthetic cities

Color = tuple[int, int, int]  # RGB
Point = complex  # metres to the east, and north as the imaginary part: turning is multiplying
Crossing = tuple[int, int]  # its column and row
BOARD, BOARD_FOOT = (6, 4), 3.2  # metres, of signs: width and height, and what is free below them


class CityPlan(NamedTuple):
    """How one synthetic city differs from others: its map, its names, its looks. All lengths in metres."""

    name: str
    centre: Geocode
    words: Sequence[str]  # first words of the names of places
    trades: Sequence[str]  # and second ones
    block: tuple[float, float] = (140.0, 90.0)  # east-west and north-south
    turned: float = 29.0  # degrees that the grid is turned against north
    jitter: float = 0.06  # of the crossings, as a share of a block
    diagonals: float = 0.08  # share of the blocks with a diagonal street
    street: float = 18.0  # from facade to facade
    pavement: float = 3.0
    heights: tuple[float, float] = (12.0, 42.0)  # of the buildings
    walls: Sequence[Color] = (
        (150, 92, 74),
        (176, 160, 140),
        (120, 126, 136),
        (196, 180, 150),
        (142, 110, 88),
    )
    glass: Color = (60, 80, 104)
    window: tuple[float, float] = (0.44, 0.5)  # a window's share of its bay, across and up
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
MADE_UP = "anywhere"  # cities of made-up names, maps and looks
CityKey = tuple[str, int]  # NEW_YORK.name or MADE_UP, and a seed
TRAINING_CITIES = ((NEW_YORK.name, 0),)
TEST_CITIES = tuple((MADE_UP, seed) for seed in range(101, 110))  # of variant "visual" alone


def _made_up_name(rng: random.Random) -> str:
    """A name of two or three syllables."""
    starts = ("", *"bcdfghjklmnprstvwz", "br", "ch", "fl", "gr", "sh", "st", "th", "tr")
    ends = ("", "", *"dlmnrst")
    parts = (starts, "aeiou", ends)
    return "".join(rng.choice(part) for _ in range(rng.randint(2, 3)) for part in parts).capitalize()


def made_up_plan(seed: int) -> CityPlan:
    """A city as no other one: names, map, looks and its place on the globe are drawn at random."""
    rng = random.Random(f"city/{seed}")
    words, trades = (list({_made_up_name(rng): None for _ in range(12)}) for _ in range(2))

    def color(hue: tuple[int, int], saturation: tuple[int, int], lightness: tuple[int, int]) -> Color:
        degrees, *percent = (rng.randint(*limits) for limits in (hue, saturation, lightness))
        return ImageColor.getrgb("hsl({}, {}%, {}%)".format(degrees, *percent))

    anything, blues, stone = (0, 359), (195, 225), rng.choice(((5, 50), (15, 45), (60, 170), (190, 240)))
    sign = (color(anything, (50, 90), (14, 34)), color(anything, (30, 90), (80, 95)))
    return CityPlan(
        f"{MADE_UP}{seed}",
        (rng.uniform(-50, 55), rng.uniform(-170, 170)),
        words,
        trades,
        block=(rng.uniform(70, 180), rng.uniform(70, 180)),
        turned=rng.uniform(-45, 45),
        jitter=rng.uniform(0, 0.5),
        diagonals=rng.uniform(0, 0.3),
        street=rng.uniform(12, 28),
        pavement=rng.uniform(1, 4),
        road=color((20, 60), (0, 14), (22, 44)),
        heights=(rng.uniform(5, 15), rng.uniform(16, 60)),
        window=(rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)),
        walls=[color(stone, (10, 45), (42, 80)) for _ in range(4)] + [color(anything, (20, 45), (45, 75))],
        glass=color(blues, (5, 40), (16, 44)),
        awnings=[color(anything, (45, 85), (28, 52)) for _ in range(3)],
        sign=rng.choice((sign, sign[::-1])),
        sky=(color(blues, (10, 75), (48, 72)), color((30, 220), (10, 45), (78, 90))),
        light=rng.uniform(0.8, 1.15),
    )


def nearest_street(points: np.ndarray, streets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of Points [...] the distance to the nearest of the streets [n, 2] (from where, to where), the metres
    along it, and which one it is."""
    start, way = streets[:, 0], streets[:, 1] - streets[:, 0]
    length, parts = abs(way), []
    for part in np.split(points.ravel(), range(256, points.size, 256)):  # all at once would need much memory
        turned = (part[:, None] - start) * (way / length).conj()  # as if each street led to the east
        walked = turned.real.clip(0, length)
        apart = abs(turned - walked)
        best, rows = apart.argmin(1), np.arange(len(part))
        parts.append((apart[rows, best], walked[rows, best], best))
    return tuple(np.concatenate(a).reshape(points.shape) for a in zip(*parts))


class City:
    """Streets, places and panoramas of a plan, the same for the same seed: a grid of 7 x 7 crossings.

    `crossings` are Points from the plan's centre, by column and row.
    """

    def __init__(self, plan: CityPlan, seed: int = 0):
        self.plan, rng = plan, random.Random(f"{plan.name}/{seed}")
        self.crossings = self._grid(rng)
        self.ways: dict[Crossing, list[Crossing]] = {c: [] for c in self.crossings}
        for i, j in self.crossings:
            ends = [(i + 1, j), (i, j + 1)] + [(i + 1, j + 1)] * (rng.random() < plan.diagonals)
            for end in ends:
                if end in self.crossings:
                    self.ways[i, j].append(end)
                    self.ways[end].append((i, j))
        edges = [(a, b) for a, ends in self.ways.items() for b in ends if a < b]
        self.streets = np.array([(self.crossings[a], self.crossings[b]) for a, b in edges])  # [n, 2]
        self._name_places(rng)
        stands = list(self.crossings.values())
        for a, b in edges:
            start, way = self.crossings[a], self.crossings[b] - self.crossings[a]
            n = max(1, round(abs(way) / 12))
            stands += [start + way * k / n for k in range(1, n)]
        stem = plan.name.replace(" ", "")
        self.panoramas = {self.geocode(at): f"{stem}-{k:05d}" for k, at in enumerate(stands)}

    def _grid(self, rng: random.Random, size: int = 7) -> dict[Crossing, Point]:
        def moved(side: float) -> float:
            return side * self.plan.jitter * rng.uniform(-0.5, 0.5)

        width, depth = self.plan.block
        columns, rows = ([side * i + moved(side) for i in range(size)] for side in (width, depth))
        turned = cmath.rect(1, -math.radians(self.plan.turned))
        return {
            (i, j): complex(columns[i] + moved(width), rows[j] + moved(depth)) * turned
            for i, j in product(range(size), repeat=2)
        }

    def _name_places(self, rng: random.Random) -> None:
        """At most one place for each crossing, on a facade near it; its sign is a board that stands out from
        there."""
        names = [f"{word} {trade}" for word in self.plan.words for trade in self.plan.trades]
        rng.shuffle(names)
        self.places: dict[Crossing, dict] = {}
        self.boards: dict[Crossing, tuple[Point, Point]] = {}  # where the sign begins and ends
        for crossing, corner in self.crossings.items():
            spot = self._facade_near(crossing, rng)
            if spot and rng.random() < 0.9 and names:
                name, (at, outwards) = names.pop(), spot
                board = at, at + BOARD[0] * outwards
                if self._to_one_side(crossing, board):
                    self.boards[crossing] = board
                    self.places[crossing] = {
                        "name": name,
                        "geocode": list(self.geocode(at)),
                        "relocated_geocode": list(self.geocode(corner)),
                    }

    def geocode(self, at: Point) -> Geocode:
        """Latitude and longitude of a point."""
        lat = self.plan.centre[0] + at.imag / METRES_PER_DEGREE
        width = METRES_PER_DEGREE * math.cos(math.radians((lat + self.plan.centre[0]) / 2))
        return lat, self.plan.centre[1] + at.real / width

    def _facade_near(self, crossing: Crossing, rng: random.Random) -> tuple[Point, Point] | None:
        """A point of a facade not far from a crossing, and the direction from there out into the street.

        None if chance finds none that lies in no other street.
        """
        corner, half = self.crossings[crossing], self.plan.street / 2
        for _ in range(20):
            way = self.crossings[rng.choice(self.ways[crossing])] - corner
            along, away, outwards = way / abs(way), rng.uniform(6, 14), rng.choice((-1j, 1j))
            at = corner + along * (half + away - outwards * half)
            if nearest_street(np.array([at]), self.streets)[0] > half - 0.1:
                return at, outwards * along
        return None

    def _to_one_side(self, crossing: Crossing, board: tuple[Point, Point]) -> bool:
        """Whether the middle of a sign is clearly to the left or to the right, whichever way one comes."""
        away = sum(board) / 2 - self.crossings[crossing]
        headings = (math.radians(self._heading(end, crossing)) for end in self.ways[crossing])
        return all(abs((away * cmath.rect(1, heading)).real) > 2 for heading in headings)

    def route(self, rng: random.Random, turns: int, quarters: Sequence[int] = (0, 1, 2, 3)) -> dict:
        """A route with so many turning points, in the released format, to a place in some of the four
        interleaved quarters of the city."""
        while True:
            path = self._path(rng, turns)
            if path and path[-1] in self.places and (path[-1][0] + 2 * path[-1][1]) % 4 in quarters:
                return self._record(rng, path)

    def _path(self, rng: random.Random, turns: int) -> list[Crossing] | None:
        """The crossings where a walk starts, turns and ends; None if it met a corner or crossed itself."""
        at = rng.choice(sorted(self.crossings))
        path, seen = [at], {at}
        for _ in range(turns + 1):
            ways = self._onward(path[-2], at, 20, 150) if len(path) > 1 else self.ways[at]
            if not ways:
                return None
            end, length = rng.choice(ways), rng.randint(1, 2)
            while True:  # on along the same street
                if end in seen:
                    return None
                seen.add(end)
                on, at, length = self._onward(at, end, 0, 10), end, length - 1
                if not length or not on:
                    break
                end = on[0]
            path.append(at)
        headings = [self._heading(a, b) for a, b in zip(path, path[1:])]
        return path if all(20 <= abs(wrap(b - a)) <= 150 for a, b in zip(headings, headings[1:])) else None

    @cache  # drawing 2,048 routes asks for the same few a million times, and for the same few headings
    def _onward(self, a: Crossing, b: Crossing, least: float, most: float) -> list[Crossing]:
        """The crossings next to b to which one who comes from a turns by so many degrees."""
        came = self._heading(a, b)
        return [c for c in self.ways[b] if least <= abs(wrap(self._heading(b, c) - came)) <= most]

    @cache
    def _heading(self, a: Crossing, b: Crossing) -> float:
        return bearing(self.geocode(self.crossings[a]), self.geocode(self.crossings[b]))

    def _record(self, rng: random.Random, path: list[Crossing]) -> dict:
        places = [list(self.geocode(self.crossings[c])) for c in path]
        blocks = [self._milestone(k, a, b, b == path[-1]) for k, (a, b) in enumerate(zip(path, path[1:]), 1)]
        return {
            "start_place": {"relocated_geocode": places[0]},
            "dest_place": self.places[path[-1]],
            "init_heading": rng.randint(1, 359),
            "route_results": {
                "geocode_list": places[1:],
                "landmark_list": [self.places.get(c) for c in path[1:-1]],
            },
            "milestone_info": "\n".join(blocks),
        }

    def _milestone(self, number: int, a: Crossing, b: Crossing, last: bool) -> str:
        """The block of milestone_info for the leg from a to b."""
        whole, landmark = round(self._heading(a, b)) % 360, NOTHING
        if place := self.places.get(b):
            middle = self.geocode(sum(self.boards[b]) / 2)  # of what one sees
            side = _side(bearing(self.geocode(self.crossings[b]), middle) - whole)
            landmark = f"{'The destination ' if last else ''}{place['name']} is on your {side}"
        lines = {
            "intersection_idx": number,
            "landmarks": landmark,
            "distance": f"{round(abs(self.crossings[a] - self.crossings[b]))} meters",
            "human_heading": whole,
            "to_next_intersection_heading": f"{whole} ({compass_word(whole)})",
        }
        return "{\n" + "".join(f'    "{key}": "{value}",\n' for key, value in lines.items()) + "}"


def _side(turn: float) -> str:
    """Where a place is that lies so many degrees to the right of where one looks."""
    turn = wrap(turn)
    return ("right" if turn > 0 else "left") + (" behind" if abs(turn) > 90 else "")


# -------------------------------------------------------------------------------- streets: the built-in world

# Of the built-in routes: the name of their draw, and the quarters where they lead. The test routes are drawn
# anew when a study has been seen.
SPLITS = {"train": ("train", (0, 1)), "valid": ("valid", (2,)), "test": ("test, sixth draw", (3,))}


@cache
def built_in_city(name: str, seed: int) -> City:
    """The city of a CityKey."""
    return City(NEW_YORK if name == NEW_YORK.name else made_up_plan(seed), seed)


@cache
def built_in_routes(
    split: str = "train",
    turns: int = 7,
    cities: tuple[CityKey, ...] = TRAINING_CITIES,
    n: int = 2048,
) -> list[dict]:
    """Up to `n` different routes of one to `turns` turning points, in the released format, of each city in
    turn.

    Routes of different splits lead to different places, so no route, and no instruction, of one is in
    another.
    """
    of_city = []
    for name, seed in cities:
        (draw, ends), city, fruitless = SPLITS[split], built_in_city(name, seed), 0
        rng = random.Random(f"routes/{seed}/{draw}")
        records: dict[str, dict] = {}
        while len(records) < max(1, n // len(cities)) and fruitless < 500:  # few routes have one turn
            record = city.route(rng, rng.randint(1, turns), ends)
            key = json.dumps([record["start_place"], record["route_results"]["geocode_list"]])
            fruitless = fruitless + 1 if key in records else 0
            records.setdefault(key, record)
        of_city.append(records.values())
    return [record for one_of_each in zip_longest(*of_city) for record in one_of_each if record]


@cache
def built_in_world(
    split: str = "train",
    turns: int = 7,
    cities: tuple[CityKey, ...] = TRAINING_CITIES,
    n: int = 2048,
    width: int = 1024,
) -> World:
    """Those routes and all panoramas of the cities, pictures of so many pixels across."""
    ids = {place: name for key in cities for place, name in built_in_city(*key).panoramas.items()}
    routes = read_routes(built_in_routes(split, turns, cities, n))
    return World(routes, Panoramas(ids), partial(_album(width), cities))


@cache
def _album(width: int) -> Callable:
    """Draws the panorama at a place in the nearest of some cities, with a memory of 800 MB."""

    @lru_cache(maxsize=2**29 // width**2)
    def draw(cities: tuple[CityKey, ...], place: Geocode) -> tuple[Image.Image, float]:
        nearest = min(cities, key=lambda key: distance(built_in_city(*key).plan.centre, place))
        return _scene(*nearest).draw(place, (width, width // 2)), 0.0

    return draw


@cache
def _scene(name: str, seed: int) -> "Scene":
    return Scene(built_in_city(name, seed))


# ------------------------------------------------------------------------------- streets: what one sees there

EYE, SIGHT = 2.5, 150.0  # metres: height of the camera, and how far signs and the ground are drawn


class Scene:
    """The facades of a city and their signs. `draw` shows what one sees from a place."""

    def __init__(self, city: City):
        self.city, plan = city, city.plan
        rng, half = random.Random(f"facades of {plan.name}"), plan.street / 2
        walls, buildings = [], []
        for k, (start, end) in enumerate(city.streets):
            along, metres = (end - start) / abs(end - start), np.arange(0.0, abs(end - start))
            for outwards in (-1j, 1j):
                line = start + along * (metres - outwards * half)
                # A wall stands wherever no other street comes through.
                free = nearest_street(line, np.delete(city.streets, k, 0))[0] >= half - 0.01
                ends = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(int)))
                for first, last in zip(ends[::2], ends[1::2] - 1):
                    buildings += self._row_of_buildings(rng, 1000.0 * len(walls), last - first)
                    walls.append((line[first], line[last]))
        self.walls = np.array(walls)  # [n, 2]: from where to where
        # By 1000 * wall + metres along it: start, width, height, bay, paint, awning (negative: none)
        self.buildings = np.array(buildings)
        self.signs = [
            (city.boards[crossing], self._board(place["name"])) for crossing, place in city.places.items()
        ]

    def _row_of_buildings(self, rng: random.Random, start: float, length: float) -> list[tuple[float, ...]]:
        plan, at, row = self.city.plan, 0.0, []
        while at < length:
            width, height, bay = rng.uniform(8, 16), rng.uniform(*plan.heights), rng.uniform(1.8, 3.2)
            paint = rng.choice(plan.walls)
            awning = rng.choice(plan.awnings) if rng.random() < 0.6 else (-1, -1, -1)
            row.append((start + at, width, height, bay, *paint, *awning))
            at += width
        return row

    def _board(self, name: str) -> np.ndarray:
        """The pixels of a board that stands out from a facade, to be read from both sides."""
        board, letters = self.city.plan.sign
        text, picture = name.replace(" ", "\n"), Image.new("RGB", (BOARD[0] * 40, BOARD[1] * 40), board)
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(40)
        left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, align="center")
        scale = min((picture.width - 20) / (right - left), (picture.height - 20) / (bottom - top))
        middle, font = (picture.width / 2, picture.height / 2), ImageFont.load_default(40 * scale)
        draw.multiline_text(middle, text, fill=letters, font=font, anchor="mm", align="center")
        return np.asarray(picture, dtype=np.float32)

    def draw(self, at: Geocode, size: tuple[int, int] = (1024, 512), rotation: float = 0.0) -> Image.Image:
        """The equirectangular panorama at a place, (width, height) pixels.

        Compass heading h stands in the column at the share (h + rotation) / 360 of the width (released data:
        at longitude h - 180 + rotation, 0 in the middle).
        """
        width, height = size
        plan, eye = self.city.plan, complex(*offset(self.city.plan.centre, at))
        heading = np.radians((np.arange(width) + 0.5) / width * 360.0 - rotation)
        ray = np.sin(heading) + 1j * np.cos(heading)
        elevation = np.radians(90.0 - (np.arange(height) + 0.5) / height * 180.0)
        up = np.clip(elevation / (math.pi / 2), 0, 1)[:, None, None]
        sky = np.array(plan.sky[1]) * (1 - up) ** 2 + np.array(plan.sky[0]) * (1 - (1 - up) ** 2)
        picture = np.broadcast_to(sky, (height, width, 3)).astype(np.float32)
        reach = np.minimum(EYE / np.tan(-elevation[elevation < 0]), SIGHT)  # beyond it lie less than two rows
        streets = self.city.streets[abs(self.city.streets.mean(1) - eye) < SIGHT + max(plan.block)]
        ground = (eye + reach[:, None] * ray).astype(np.complex64)
        picture[elevation < 0] = self._ground(ground, streets.astype(np.complex64))
        far = self._paint_facades(picture, eye, ray, elevation)
        self._paint_boards(picture, eye, ray, elevation, far)
        return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))

    def _ground(self, points: np.ndarray, streets: np.ndarray) -> np.ndarray:
        """Colours of Points on the ground [...]: road with lanes and crossing marks, kerb, pavement."""
        plan = self.city.plan
        apart, along, street = nearest_street(points, streets)
        to_end = np.minimum(along, abs(streets[:, 1] - streets[:, 0])[street] - along)
        half, kerb = plan.street / 2, plan.street / 2 - plan.pavement
        color = np.where((apart < kerb)[..., None], np.float32(plan.road), np.float32((150, 148, 142)))
        color[(abs(apart - kerb) < 0.15) & (to_end > kerb)] = (112, 111, 106)
        lane = (apart < 0.12) & (along % 6 < 3) & (to_end > half + 4)
        stripes = (apart < kerb) & (apart % 1.2 < 0.6) & (to_end > half - 1) & (to_end < half + 2)
        color[lane | stripes] = (232, 232, 228)
        return color * plan.light

    def _paint_facades(self, picture: np.ndarray, eye: np.ndarray, ray: np.ndarray, elevation: np.ndarray):
        """Paints the nearest wall of every column over sky and ground; returns its distance [width], infinite
        for none."""
        plan, (distances, shares) = self.city.plan, _meet(eye, ray, self.walls)
        columns = np.flatnonzero(np.isfinite(distances.min(1)))
        wall = distances.argmin(1)[columns]
        far = distances[columns, wall]
        way = self.walls[wall, 1] - self.walls[wall, 0]
        metres = shares[columns, wall] * abs(way)
        number = np.searchsorted(self.buildings[:, 0], 1000.0 * wall + metres, side="right") - 1
        building = self.buildings[number].astype(np.float32)
        left = (1000.0 * wall + metres - self.buildings[number, 0]).astype(np.float32)
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

    def _paint_boards(
        self, picture: np.ndarray, eye: np.ndarray, ray: np.ndarray, elevation: np.ndarray, far
    ):
        """Paints the signs that stand before the walls, the farthest first."""
        lines = np.array([line for line, _ in self.signs])
        distances, shares = _meet(eye, ray, lines)
        for k in np.argsort(-distances.min(0)):
            columns = np.flatnonzero((distances[:, k] < far) & (distances[:, k] < SIGHT))
            if not len(columns):
                continue
            board, away, share = self.signs[k][1], distances[columns, k], shares[columns, k]
            to_the_right = (ray[columns] * (lines[k, 1] - lines[k, 0]).conj()).imag > 0
            across = np.where(to_the_right, share, 1 - share)
            top = BOARD_FOOT + BOARD[1] - EYE  # above the camera
            down = (top - away * np.tan(elevation)[:, None]) / BOARD[1]  # 0 to 1 on the board
            rows = (down * board.shape[0]).clip(0, board.shape[0] - 1).astype(int)
            pixels = board[rows, (across * board.shape[1]).clip(0, board.shape[1] - 1).astype(int)]
            on_board = ((down >= 0) & (down <= 1))[..., None]
            picture[:, columns] = np.where(on_board, pixels * self.city.plan.light, picture[:, columns])


def _meet(eye: Point, ray: np.ndarray, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays [width] from a point meet line segments [n, 2]: the distance, infinite for none, and the
    share of the segment from its start to there, both [width, n]."""
    start, way = (lines[:, 0] - eye).conj(), lines[:, 1] - lines[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = (ray[:, None].conj() * way).imag
        far, share = (start * way).imag / cross, (start * ray[:, None]).imag / cross
    return np.where((share >= 0) & (share <= 1) & (far > 0.1), far, np.inf), share


@lru_cache(maxsize=8)
def _sight(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of a view lie, in degrees: a column how far right [size], a pixel how high [size,
    size]."""
    line = (np.arange(size) + 0.5) / size * 2 - 1
    right, up = np.meshgrid(line, -line)
    return np.degrees(np.arctan(line)), np.degrees(np.arctan2(up, np.hypot(1, right)))


def view(panorama: np.ndarray, heading: float, rotation: float = 0.0, size: int = 300) -> Image.Image:
    """The perspective (gnomonic) view of an equirectangular panorama [H, W, 3] at a compass heading, 90
    degrees wide: a square picture of `size` pixels, bilinear. The panorama's columns are those of
    `Scene.draw`."""
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


# Degrees right of the heading, of the top row and the bottom row.
VIEW_LAYOUTS = {"compass": (0, 90, 180, 270), "legacy": (-135, -45, 45, 135)}


def look_around(
    panorama: Image.Image, rotation: float, heading: float, size: int = 300, layout: str = "compass"
) -> Image.Image:
    """Four views in a 2 x 2 grid with a black gap of 5 pixels: front and right over back and left, or the
    released code's four."""
    pixels, grid = np.asarray(panorama.convert("RGB")), Image.new("RGB", (2 * size + 5, 2 * size + 5))
    for k, turn in enumerate(VIEW_LAYOUTS[layout]):
        corner = (k % 2 * (size + 5), k // 2 * (size + 5))
        grid.paste(view(pixels, (heading + turn) % 360.0, rotation, size), corner)
    return grid


# -------------------------------------------------------------------------------------- streets: the verifier

STREET_FIELDS = ("current observation", "current instruction", "action")


class Waypoint(NamedTuple):
    """One decision of a route: what is seen there, the sentence of the instruction it belongs to, and the
    expert's action."""

    place: Geocode
    heading: float  # where the agent looks before it acts, compass degrees
    landmark: str
    intersection: bool
    sentence: str
    action: str

    @property
    def observation(self) -> str:
        return self.landmark + ("; an intersection" if self.intersection else "")


def judge_step(
    reply: str, waypoint: Waypoint, fields: Sequence[str] = STREET_FIELDS, names: Set[str] = frozenset()
) -> Verdict:
    """One verdict per reply, by its action: the expert's is right, whatever the report. A wrong one is worse
    if the report claims an intersection, in any of the usual words, that is not there or leaves out one that
    is. Whether it recognizes the landmark is measured, not judged; `names` as in World."""
    parsed = parse_reply(reply, fields)
    report, _, action = [parsed[f] for f in fields] if parsed else (None, None, None)
    if not isinstance(action, str):
        return Verdict("unparsed", "The answer is not in the form asked for.", False)
    report = report[:1000] if isinstance(report, str) else ""  # a landmark has up to 300 characters
    claims, recognized = _read_report(_words(report), waypoint.landmark, names)
    words = " ".join(re.sub("['\"]", "", action.lower()).split())
    if re.sub(r" ?([()]) ?", r"\1", words) == waypoint.action:
        return Verdict("correct", "Correct.", recognized)
    if claims == waypoint.intersection:
        return Verdict("wrong_action", "That action is wrong here.", recognized)
    truth = f"there is {'an' if waypoint.intersection else 'no'} intersection here"
    return Verdict("wrong_observation", f"That action is wrong: {truth}.", recognized)


# These read what `_words` makes of a report.
_JOIN = re.compile(r" ?(?:;|\b(?:and|but|with|where)\b) ?")  # between two clauses
_NO = r"\b(?:no|not|any|never|without|or|nor|neither|cannot)\b"
_NO_INTERSECTION = re.compile(rf"{_NO}(?!.*\blandmark)")
# What leads to the word, and what may follow it: "Intersection Cafe is on your left" is a name.
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


def _read_report(report: str, landmark: str, names: Set[str]) -> tuple[bool, bool]:
    """Whether a report claims an intersection, as "X is on my left; I observe an intersection" does (paper,
    appendix), and whether it recognizes the landmark: it names it and, once, its side, in any words, or says
    that there is none. It does not if it names another one of `names` or another side, or denies it."""
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


@lru_cache(maxsize=4096)  # a city's routes name the same few landmarks ten thousand times
def _landmark(text: str) -> tuple[str, str, list[str]]:
    """The letters of what is said of a landmark, those of its name, and its sides: of "Joe's is on your left"
    joesisonyourleft, joes and left."""
    said = _words(text)
    name, *side = said.rsplit(" is on your ", 1)
    letters, name = (re.sub("[ ;]", "", part) for part in (said, name.removeprefix("the destination ")))
    return letters, name or letters, _sides(" ".join(side))


def _sides(words: str) -> list[str]:
    """The sides that are named, sorted."""
    named = re.findall(r"\b(?:left|right|behind|back|rear)\b", words)
    return sorted({"back": "behind", "rear": "behind"}.get(side, side) for side in named)


def _words(text: str) -> str:
    """The words of a text in small letters, their marks and digits; blanks between them, semicolons between
    clauses."""
    text = re.sub("n['’]t\\b", " not", unicodedata.normalize("NFC", text.lower()))
    kept = (
        c if c.isalnum() or unicodedata.category(c)[0] == "M" else " ; " if c in ";.,:!?\n" else " "
        for c in text
    )
    return " ".join("".join(kept).split())


# ----------------------------------------------------------------------------------- streets: the environment

STREET_PROMPT = string.Template(
    "Walk this route: $route Actions: forward(), turn_direction(x) with x one of $words, stop(). "
    'Answer in this form: {"$field_observation": "...", "$field_instruction": "...", "$field_action": "..."}'
    "$report $observation"
)


class VIRL(Environment):
    """Follow a route through streets (paper, section 3.2), told in words.

    An episode is a route, its decisions are the waypoints. A reply reports what is seen, quotes the sentence
    of the instruction that it follows, and acts. A right action leads to the next waypoint; a wrong one is
    not executed.

    Variants: "id" (turns by the eight compass words) and "rule" (left, right, slightly left, slightly right).
    `data` may also be a World, and `fields` names the three fields of a reply.
    """

    variants = {"id": "in distribution", "rule": "under the other rule"}
    rules = {"id": COMPASS, "rule": RELATIVE}  # the words of a turn
    # Paper, appendix; a wrong observation is a wrong action with a false report of an intersection, and a
    # reply that cannot be read counts like a wrong action.
    rewards = {
        "correct": 1.0,
        "wrong_action": -1.0,
        "wrong_observation": -1.5,
        "unparsed": -1.0,
        "budget": -1.0,
    }
    headline = "step_accuracy"
    start_options = {"route": (int, "walk the route of this number, from 0")}
    report = ""  # how a report is worded, where the model is not told what is seen
    panorama_width = 1024

    verify_iter: Annotated[int, Option("replies judged per waypoint, the verification budget", least=1)] = 2
    data: Annotated[
        str | Path | World | None,
        Option("a folder of routes in the released format; without it the built-in city", metavar="DIR"),
    ] = None
    split: Annotated[str, Option("of the built-in routes", choices=tuple(SPLITS))] = "train"
    turns: Annotated[int, Option("most turning points of a built-in route", least=1, most=7)] = 7
    points_per_leg: Annotated[int, Option("points between two turning points", least=0, most=100)] = 4
    drop: Annotated[float, Option("probability that such a point is left out", least=0, most=1)] = 0.5
    fields: Sequence[str] = STREET_FIELDS

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if len(set(self.fields)) != len(STREET_FIELDS):
            raise ValueError(f"fields must be {len(STREET_FIELDS)} different names, not {self.fields!r}")
        self.answer_field = self.fields[-1]
        self.waypoints: list[Waypoint] = []
        if isinstance(self.data, World):
            self.world = self.data
        elif self.data is None:
            self.world = built_in_world(self.split, self.turns, self.cities, width=self.panorama_width)
        else:
            for name in ("split", "turns", "panorama_width"):
                if name in options:
                    raise ValueError(f"{name} is for built-in streets; those of data are what they are")
            self.world = load_world(self.data, self.pictures)

    @property
    def cities(self) -> tuple[CityKey, ...]:
        """The built-in cities of the variant."""
        return TEST_CITIES if self.variant == "visual" else TRAINING_CITIES

    @property
    def decisions(self) -> int:
        """The waypoints of the route; 0 before the first one."""
        return len(self.waypoints)

    @property
    def series_length(self) -> int:
        """An evaluation walks every route once."""
        return len(self.world.routes)

    def start_of(self, series: str, i: int) -> tuple[str, dict]:
        return f"{series}/{i}", {"route": i % len(self.world.routes)}

    def begin(self, options: dict) -> str:
        """A route drawn at random, or number `options["route"]`."""
        number, routes = options.get("route"), self.world.routes
        if number is None:
            number = self.random.randrange(len(routes))
        elif not _fits(int, number) or not 0 <= number < len(routes):
            raise ValueError(f"route must be a number from 0 to {len(routes) - 1}, not {number!r}")
        self.sentences, self.waypoints = self._plan(number)
        self.number = number
        return STREET_PROMPT.substitute(
            route=" ".join(f"{i}. {sentence}" for i, sentence in enumerate(self.sentences, 1)),
            words=", ".join(self.rules[self.variant]),
            report=self.report,
            observation=self._seen(),
            **{f"field_{name.split()[-1]}": own for name, own in zip(STREET_FIELDS, self.fields)},
        )

    def _plan(self, number: int) -> tuple[list[str], list[Waypoint]]:
        """The instruction's sentences and the waypoints of a route, by the released data's rules.

        At the start and at every turning point the expert turns, however little, and between them it goes on.
        """
        route = self.world.routes[number]
        heading = self.random.randrange(360) if route.heading is None else route.heading
        at, seen, intersection = self._standing(route.start, number), NOTHING, False
        sentences: list[str] = []
        waypoints: list[Waypoint] = []
        for leg in route.legs:
            last, relative = leg is route.legs[-1], relative_word(leg.heading - heading)
            sentences.append(f"Turn {relative} to face {leg.compass}.")
            action = f"turn_direction({leg.compass if self.rules[self.variant] is COMPASS else relative})"
            waypoints.append(Waypoint(at, heading, seen, intersection, sentences[-1], action))
            end, goal = self._standing(leg.end, number), "the destination" if last else "an intersection"
            if leg.landmark != NOTHING:
                goal += ": " + (leg.landmark[:1].lower() + leg.landmark[1:] if last else leg.landmark)
            sentences.append(f"Move forward to {goal}.")
            for between in self._between(at, end):
                waypoints.append(Waypoint(between, leg.heading, NOTHING, False, sentences[-1], "forward()"))
            at, heading, seen, intersection = end, leg.heading, leg.landmark, not last
        waypoints.append(Waypoint(at, heading, seen, False, sentences[-1], "stop()"))
        return sentences, waypoints

    def _standing(self, place: Geocode, number: int) -> Geocode:
        near = self.world.panoramas.nearest(place)
        if near is None:
            raise ValueError(f"route {number}: gps_pano_mapping.pkl has {_nothing_near(place)}")
        return near

    def _between(self, a: Geocode, b: Geocode) -> list[Geocode]:
        """Some of the points of a leg, moved to the nearest panorama; on a short leg several stand on one."""
        found: list[Geocode] = []
        for k in range(1, self.points_per_leg + 1) if distance(a, b) > 5 else ():
            share = k / (self.points_per_leg + 1)
            if self.random.random() < 1 - self.drop:
                point = (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share)
                near = self.world.panoramas.nearest(point)
                if near and near not in self.world.lost and min(distance(near, a), distance(near, b)) > 8:
                    found.append(near)
        return found

    def _here(self) -> Waypoint:
        """The present waypoint; after the end of a route its last one."""
        self._check_started()
        return self.waypoints[min(self.at, len(self.waypoints) - 1)]

    def _seen(self) -> str:
        """What the model is told of the present waypoint."""
        return f"You see: {self.waypoints[self.at].observation}."

    def judge(self, reply: str) -> Verdict:
        return judge_step(reply, self.waypoints[self.at], self.fields, self.world.names)

    def next_message(self, right: bool, moved: bool) -> str:
        if right:
            return self._seen()
        return f"{self.verdict.feedback} {f'You are led on. {self._seen()}' if moved else 'Try again.'}"

    def describe(self) -> dict:
        landmark = self.waypoints[self.judged_at].landmark != NOTHING
        actions = [waypoint.action for waypoint in self.waypoints]
        return {"route": self.number, "waypoint": self.judged_at, "landmark": landmark, "actions": actions}

    def _reply(self, action: str) -> str:
        here = self._here()
        return json.dumps(
            dict(zip(self.fields, (here.observation, here.sentence, action))), ensure_ascii=False
        )

    def expert_reply(self) -> str:
        return self._reply(self._here().action)

    def wrong_reply(self) -> str:
        right = self._here().action
        actions = ["forward()", "stop()", *(f"turn_direction({word})" for word in self.rules[self.variant])]
        return self._reply(self.random.choice([action for action in actions if action != right]))

    def write(
        self, folder: Path, seed: int = 0, n: int | None = None, watch: Callable = lambda share: None
    ) -> str:
        """Writes the built-in world of these options, or with a seed that of other cities, as a folder in the
        released format: `n` routes (None: all) and the panoramas, in pictures if the task has them.
        Returns what was written.

        `watch` is told the share of the panoramas that are done.
        """
        cities = tuple((name, number + 1000 * seed) for name, number in self.cities)
        what = (self.split, self.turns, cities, n or 2048)
        routes, world = built_in_routes(*what), built_in_world(*what, self.panorama_width)
        ids, picture = world.panoramas.ids, world.picture if self.pictures else None
        write_world(folder, [routes, len(routes)], ids, picture, watch)
        return f"{len(routes)} routes and {len(ids)} panoramas in {folder}"

    @staticmethod
    def measures(episodes: Sequence[Episode]) -> dict:
        """Per-step accuracy (paper, section 4): the share of all waypoints, reached or not, where the
        expert's action was found within the budget; the same at the first reply and by kind of action.

        `steps` has it for each route, `at_turns` that of its turns, None where there are none. Its standard
        error counts routes, for the waypoints of one route go wrong together.
        """
        within: list[list[bool]] = []
        at_turns: list[list[bool]] = []
        first, kinds = [], {kind: [] for kind in ("turn", "forward", "stop")}
        for episode in episodes:
            verdicts: list[list[str]] = [[] for _ in episode.asked]  # of each waypoint
            for turn in episode.turns:
                verdicts[turn.decision].append(turn.verdict)
            within.append(["correct" in tries for tries in verdicts])
            first += [tries[:1] == ["correct"] for tries in verdicts]
            at_turns.append([])
            for action, right in zip(episode.asked, within[-1]):
                kinds[kind := action.partition("(")[0].removesuffix("_direction")].append(right)
                if kind == "turn":
                    at_turns[-1].append(right)
        n = sum(map(len, within))
        accuracy = sum(map(sum, within)) / n
        spread = sum((sum(route) - accuracy * len(route)) ** 2 for route in within)
        return {
            "step_accuracy": accuracy,
            "step_accuracy_se": math.sqrt(spread * len(within) / max(1, len(within) - 1)) / n,
            "first_step_accuracy": sum(first) / n,
            "step_accuracy_by_action": {kind: mean(right) for kind, right in kinds.items() if right},
            "waypoints": n,
            "steps": [round(mean(route), 4) for route in within],
            "at_turns": [round(mean(turns), 4) if turns else None for turns in at_turns],
        }


class VIRLVL(VIRL):
    """The same walk in pictures: of each waypoint one picture of four street views (paper, section 3.2), and
    no word of what it shows.

    Variants: also "visual", the training rule in nine other cities.
    """

    variants = VIRL.variants | {"visual": "in other cities"}
    rules = VIRL.rules | {"visual": COMPASS}
    pictures = True
    report = (
        ' Report a landmark of the route as "NAME is on your left" (right, left behind, right behind), '
        f'none as "{NOTHING}".'
    )

    view_layout: Annotated[
        str,
        Option(
            "of the views: front, right, back, left (compass), or as in the released code (legacy)",
            choices=tuple(VIEW_LAYOUTS),
        ),
    ] = "compass"
    view_size: Annotated[int, Option("pixels of each of the four views", least=16, most=2048)] = 300
    panorama_width: Annotated[
        int, Option("pixels of the built-in cities' panoramas, from left to right", least=64, most=8192)
    ] = 1024
    tell_intersections: Annotated[bool, Option("say in words where there is an intersection")] = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        if self.world.picture is None:
            raise ValueError("the routes have no panoramas")

    def _seen(self) -> str:
        intersection = self.tell_intersections and self.waypoints[self.at].intersection
        return "You are at an intersection." if intersection else "You see the picture."

    def draw(self) -> Callable[[], Image.Image]:
        """The picture of the present waypoint, drawn when someone looks."""
        return cache(partial(self._look_around, self.number, self.waypoints[self.at]))

    def _look_around(self, number: int, here: Waypoint) -> Image.Image:
        try:
            panorama, rotation = self.world.picture(here.place)
        except ValueError as error:
            raise ValueError(f"route {number}: {error}") from None
        return look_around(panorama, rotation, here.heading, self.view_size, self.view_layout)


# ---------------------------------------------------------------------------------------------- tasks by name

TASKS = {"gp-l": GeneralPoints, "gp-vl": GeneralPointsVL, "virl-l": VIRL, "virl-vl": VIRLVL}


def task_name(task: str) -> str:
    """The name of a task wherever one stands: of a world of the user's own with the file's absolute path."""
    path, colon, name = task.rpartition(":")
    return f"{Path(path).resolve()}:{name}" if colon else task


def task_class(task: str) -> type[Environment]:
    """The class of a task: one of TASKS, or a class of the user's own as FILE.py:CLASS. Raises ValueError."""
    if task in TASKS:
        return TASKS[task]
    path, _, name = task_name(task).rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}, or FILE.py:CLASS")
    found = getattr(_module(path), name, None)
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ValueError(f"{path} has no class {name!r} that is an Environment")
    return found


@cache
def _module(path: str) -> types.ModuleType:
    """A file of the user's, run once."""
    spec = importlib.util.spec_from_file_location(path, path)
    sys.modules[path] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it can raise anything
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {_line(error)}") from None
    return module


def make(
    task: str, variant: str = "id", seed: int = 0, verify_iter: int | None = None, **options
) -> Environment:
    """An environment of a task, one of TASKS or FILE.py:CLASS; `options` are those of its class.

    Raises ValueError for an unknown task, a wrong option or a wrong value.
    """
    return task_class(task)(variant, seed, verify_iter, **options)
