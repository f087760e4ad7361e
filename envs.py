"""Environments: GeneralPoints with its prompt, pictures, solver and verifier; V-IRL with its routes and streets; how an episode is played.

This is the ground floor. It knows chat messages and strings, and no model:

    env = make("gp-l", variant="id", seed=0, verify_iter=5)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step(env.expert_reply())

An episode is a conversation (sequential revision, section 3 of arXiv 2501.17161): the model replies, the verifier judges the
whole reply and answers in words, and both join the prompt of the next turn, until a reply is correct or `verify_iter` replies
have been judged. Numbers are exact integers and fractions throughout, model text is never evaluated as code.
"""

import copy
import inspect
import json
import math
import os
import pickle
import pickletools
import random
import re
import string
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, lru_cache, partial
from itertools import combinations, takewhile, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("spades", "clubs", "hearts", "diamonds")
COLORS = {"black": SUITS[:2], "red": SUITS[2:], "mixed": SUITS}
OPERATORS = "+-*/"
FACE_RULES = {  # what J, Q and K count, by variant (paper, section 3.1)
    "id": {"J": 10, "Q": 10, "K": 10},
    "rule": {"J": 11, "Q": 12, "K": 13},
}
# Paper, appendix: one verdict per reply. A reply that cannot be read counts like any other illegal equation.
REWARDS = {"correct": 5.0, "wrong_value": -1.0, "wrong_numbers": -2.0, "illegal": -3.0, "unparsed": -3.0}
PICTURE_REWARDS = REWARDS | {"misread": -1.5}  # where the cards are in a picture
BUDGET_PENALTY = (
    -1.0
)  # added to the last verdict's reward when the verification budget is used up without success
MAX_FORMULA, MAX_BRACKETS = 200, 20  # characters, pairs: more is no answer, and judging stays fast

# What the verifier says, by verdict. Every template may hold $target beside the placeholders that TOLD lists.
FEEDBACK = {
    "correct": "Correct.",
    "wrong_value": "The formula gives $value, not $target. Try again.",
    "wrong_numbers": "$reason. Try again.",
    "illegal": "The formula is not a legal equation: $reason. Try again.",
    "unparsed": "The answer is not in the form asked for. Try again.",
}
PICTURE_FEEDBACK = FEEDBACK | {"misread": "These are not the cards on the table. Try again."}
# $number is there once too often or left out; $reason says which of the two, or why a formula is illegal.
TOLD = {"wrong_value": {"value"}, "wrong_numbers": {"reason", "number"}, "illegal": {"reason"}}

PROMPT = string.Template(
    "Make $target from the numbers of the cards, each used once, with the operators $operators and brackets. Cards: $cards. "
    'The ace counts one, $rule. Answer in this form: {"$field_cards": [...], "$field_number": [...], "$field_formula": "an equation"}'
)
FIELDS = ("cards", "number", "formula")


# --------------------------------------------------------------------------------------------------------------- the solver


class Expression(NamedTuple):
    """A formula in normal form. `first` and `second` hold the parts of a flattened chain, sorted: a sum is first - second,
    a product is first / second. So a+(b+c), (c+a)+b and a-(0-b-c) written by other brackets are one and the same text."""

    value: Fraction
    kind: str  # "n" a number, "+" a sum, "*" a product
    first: tuple["Expression", ...]
    second: tuple["Expression", ...]
    text: str


def _number(n: int) -> Expression:
    return Expression(Fraction(n), "n", (), (), str(n))


def _order(part: Expression) -> tuple:
    """Compound parts first, then numbers from high to low: the one order in which a chain is written."""
    return (1, -part.value, "") if part.kind == "n" else (0, 0, part.text)


def _chain(kind: str, value: Fraction, first: tuple, second: tuple) -> Expression:
    first, second = tuple(sorted(first, key=_order)), tuple(sorted(second, key=_order))
    join, inverse, loose = ("+", "-", "") if kind == "+" else ("*", "/", "+")
    texts = [[f"({p.text})" if p.kind == loose else p.text for p in parts] for parts in (first, second)]
    return Expression(
        value, kind, first, second, join.join(texts[0]) + "".join(inverse + t for t in texts[1])
    )


def _combine(x: Expression, op: str, y: Expression) -> Expression | None:
    """x op y in normal form; None for a division by zero."""
    kind = "+" if op in "+-" else "*"
    (x1, x2), (y1, y2) = ((e.first, e.second) if e.kind == kind else ((e,), ()) for e in (x, y))
    if op in "-/":
        y1, y2 = y2, y1
    if op == "/" and not y.value:
        return None
    value = {"+": x.value.__add__, "-": x.value.__sub__, "*": x.value.__mul__, "/": x.value.__truediv__}[op](
        y.value
    )
    return _chain(kind, value, x1 + y1, x2 + y2)


def _splits(numbers: tuple[int, ...]):
    """Every way to part a sorted multiset in two non-empty ones, once each, without regard to order."""
    seen = set()
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in combinations(range(len(numbers)), size):
            left = tuple(numbers[i] for i in chosen)
            right = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
            if (left, right) not in seen and (right, left) not in seen:
                seen.add((left, right))
                yield left, right


@lru_cache(maxsize=None)
def _expressions(numbers: tuple[int, ...], operators: str) -> dict[Fraction, dict[str, Expression]]:
    """All formulas over a sorted multiset that use every number once: value -> text -> expression."""
    found: dict[Fraction, dict[str, Expression]] = {}
    if len(numbers) == 1:
        return {Fraction(numbers[0]): {str(numbers[0]): _number(numbers[0])}}
    for left, right in _splits(numbers):
        for x in (e for same in _expressions(left, operators).values() for e in same.values()):
            for y in (e for same in _expressions(right, operators).values() for e in same.values()):
                for a, op, b in [(x, op, y) for op in operators] + [
                    (y, op, x) for op in operators if op in "-/"
                ]:
                    if (e := _combine(a, op, b)) is not None:
                        found.setdefault(e.value, {})[e.text] = e
    return found


@lru_cache(maxsize=None)
def solve(numbers: tuple[int, ...], target: int = 24, operators: str = OPERATORS) -> tuple[str, ...]:
    """All formulas with value `target` that use each of `numbers` (sorted) exactly once, exact, canonical one first.

    Two formulas are distinct if no reordering of terms or factors and no redundant brackets turn one into the other. The
    canonical one has the fewest divisions, then subtractions, then brackets: a fixed choice with few patterns, so that
    demonstrations follow one rule. Results are cached per process. `target` is a positive integer.
    """
    found: set[str] = set()
    t = Fraction(target)
    for left, right in _splits(numbers):
        partners = _expressions(right, operators)
        for value, same in _expressions(left, operators).items():
            # Solve x op y = t for y instead of trying all pairs: this is what makes all hands take a second.
            wanted = [("+", t - value, False), ("-", value - t, False), ("-", t + value, True)]
            if value:
                wanted += [("*", t / value, False), ("/", value / t, False), ("/", t * value, True)]
            for op, need, swap in wanted:
                if op in operators and need in partners:
                    for x in same.values():
                        for y in partners[need].values():
                            found.add((_combine(y, op, x) if swap else _combine(x, op, y)).text)
    if len(numbers) == 1 and numbers[0] == target:
        found.add(str(target))
    return tuple(sorted(found, key=lambda f: (f.count("/"), f.count("-"), f.count("("), len(f), f)))


# -------------------------------------------------------------------------------------------------------------- the verifier


class Illegal(ValueError):
    """A formula that is not a legal equation; the message is the reason, in words for the model."""


_FORMULA_TOKEN = re.compile(r"([0-9]+|[-+*/()=])|(\s+)")


def evaluate_formula(formula: str) -> tuple[Fraction, Fraction | None, list[int]]:
    """Exact value of the left side, value of the right side (None without "="), and the numbers of the left side.

    The grammar is sums of products of integers and brackets with + - * /; no sign, no power, no function. Raises `Illegal`.
    """
    if len(formula) > MAX_FORMULA:
        raise Illegal("it is too long")
    tokens, at = [], 0
    for match in _FORMULA_TOKEN.finditer(formula.replace("×", "*").replace("÷", "/").replace("−", "-")):
        if match.start() != at:
            break
        at = match.end()
        if match[1]:
            tokens.append(match[1])
    if at != len(formula):
        raise Illegal("it holds something else than numbers, operators and brackets")
    if tokens.count("=") > 1:
        raise Illegal("it holds more than one equals sign")
    equals = tokens.index("=") if "=" in tokens else len(tokens)
    left, numbers = _value(tokens[:equals])
    right = _value(tokens[equals + 1 :])[0] if equals < len(tokens) else None
    return left, right, numbers


def _value(tokens: list[str]) -> tuple[Fraction, list[int]]:
    """Recursive descent over the tokens of one side: its value and its numbers."""
    numbers: list[int] = []
    at = 0

    def peek() -> str:
        return tokens[at] if at < len(tokens) else ""

    def factor() -> Fraction:
        nonlocal at
        token = peek()
        at += 1
        if token == "(":
            if tokens[:at].count("(") > MAX_BRACKETS:
                raise Illegal("it has too many brackets")
            value = total()
            if peek() != ")":
                raise Illegal("its brackets do not match")
            at += 1
            return value
        if not token.isdigit():
            raise Illegal("a number is missing")
        if token[0] == "0" and token != "0":
            raise Illegal("a number begins with a zero")
        numbers.append(int(token))
        return Fraction(numbers[-1])

    def product() -> Fraction:
        nonlocal at
        value = factor()
        while (op := peek()) in ("*", "/"):
            at += 1
            other = factor()
            if op == "/" and not other:
                raise Illegal("it divides by zero")
            value = value * other if op == "*" else value / other
        return value

    def total() -> Fraction:
        nonlocal at
        value = product()
        while (op := peek()) in ("+", "-"):
            at += 1
            value = value + product() if op == "+" else value - product()
        return value

    value = total()
    if at < len(tokens):
        raise Illegal("its brackets do not match" if peek() == ")" else "an operator is missing")
    return value, numbers


# A string may hold quotes of its own kind: it ends at the first before comma, colon, closing bracket or end.
_STRING = r'"[^"\\]*+(?:(?:"(?!\s*+(?:[,:\]}]|\Z))|\\.?)[^"\\]*+)*+"?'
_KEY = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_WORD = r"""[^\s{}\[\]:,"']++"""
_REPLY_TOKEN = re.compile(
    rf"""\s*+(?:({_STRING}|{_STRING.replace('"', "'")})|([{{}}\[\]:,])|({_WORD}))""", re.DOTALL
)
_OBJECT_START = re.compile(rf"""{{(?=\s*+(?:{_KEY}|{_KEY.replace('"', "'")}|{_WORD})\s*+:)""", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,5})(?:\.[0-9]{1,6})?")
_NAMES = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_decoder = json.JSONDecoder(strict=False)


def parse_reply(reply: str, required: Sequence[str] = FIELDS) -> dict[str, Any] | None:
    """The object in `reply` that has all `required` keys and ends last, alone or inside others, or None.

    Accepts strict JSON and the JSON-like form of the released data: single quotes, bare words, trailing
    commas, quotes inside strings. 1.0 is the integer 1.

    Strict JSON is read by the standard library, from the first object on. Then our own reader reads the
    first object, for if the reply is one object its strings may hold anything, and then all objects, from the
    last to the first: what stands before the answer, however long, cannot hide it. Time is linear for any
    text, for the effort of each round is bounded by the reply's length; once it is spent, what was found by
    then decides.
    """
    stop = min((reply.rfind(key) for key in required), default=len(reply))  # what starts later lacks a key
    starts = [*takewhile(stop.__gt__, (match.start() for match in _OBJECT_START.finditer(reply)))]
    found, last = _last_strict(reply, starts, required)
    for order in (starts[:1], reversed(starts)):
        reader = _Reader(reply, 1_500 + len(reply) / 100)  # one a token and 50 characters; a reply takes 40
        for start in order:
            try:
                value, end = reader.value(start)
            except OverflowError:
                break
            except ValueError:
                continue
            if end > last and all(key in value for key in required):
                found, last = value, end
    return found


def _last_strict(reply: str, starts: Sequence[int], required: Sequence[str]) -> tuple[dict | None, int]:
    """Of the objects in strict JSON that begin at some of `starts`, and of those inside them, the one that ends
    last and has all keys, and where the outermost one around it ends."""
    found, last, end, effort = None, -1, 0, 2 * len(reply) + 20_000  # characters
    for start in starts:
        if start < end:  # inside the last one
            continue
        if effort < 0:
            break
        try:
            value, end = _decoder.raw_decode(reply, start)
        except (ValueError, RecursionError) as error:  # a fault costs time up to its place in the text
            effort -= 50 + getattr(error, "pos", len(reply)) - start + start // 10
            continue
        effort -= 50 + end - start
        inside = [value]
        while inside:  # an object ends behind those in it, and the last of these comes next
            item = inside.pop()
            if isinstance(item, dict) and all(key in item for key in required):
                found, last = {key: _plain_numbers(x) for key, x in item.items()}, end
                break
            inner = item.values() if isinstance(item, dict) else item
            inside += [x for x in inner if isinstance(x, (dict, list))]
    return found, last


def _plain_numbers(value: Any) -> Any:
    """1.0 as 1, also in a list."""
    if isinstance(value, list):
        return [_plain_numbers(item) if isinstance(item, float) else item for item in value]
    return int(value) if isinstance(value, float) and abs(value) < 1e6 and value.is_integer() else value


class _Reader:
    """A recursive-descent reader of JSON-like text that remembers what it has read."""

    MAX_DEPTH = 100

    def __init__(self, text: str, effort: float):
        self.text, self.effort = text, effort
        self.known: dict[int, tuple[Any, int] | None] = {}  # lists and objects and their ends

    def token(self, at: int) -> tuple[str, Any, int]:
        """Kind ("value" or the punctuation itself), value, and the position after the token."""
        match = _REPLY_TOKEN.match(self.text, at)
        if not match:
            raise ValueError("end of text")
        self._spend(1 + (match.end() - at) / 50)
        quoted, mark, word = match.groups()
        if mark:
            return mark, mark, match.end()
        if quoted:
            return "value", self._unquoted(quoted[1:-1]), match.end()
        value = float(word) if _NUMBER.fullmatch(word) else _NAMES.get(word, word)
        return "value", _plain_numbers(value), match.end()

    def _spend(self, effort: float) -> None:
        self.effort -= effort
        if self.effort < 0:
            raise OverflowError("too much to read")

    def _unquoted(self, text: str) -> str:
        """A string without its escapes; as it stands if JSON does not know one of them."""
        if "\\" not in text:
            return text
        self._spend(2)
        with suppress(ValueError):
            return _decoder.decode(f'"{text}"')
        if len(text) < 2_000:  # a longer one is no answer
            self._spend(len(text) / 10)
            with suppress(ValueError):  # between single quotes, or with quotes of its own
                as_json = {'"': r"\"", r"\'": "'"}
                text = _decoder.decode('"' + re.sub(r'\\.|"', lambda m: as_json.get(m[0], m[0]), text) + '"')
        return text

    def value(self, at: int) -> tuple[Any, int]:
        """The value that starts at `at`, and the position after it."""
        return self._value(self.token(at), 0)

    def _value(self, token: tuple[str, Any, int], depth: int) -> tuple[Any, int]:
        """The value whose first token has been read."""
        kind, value, end = token
        if kind == "value":
            return value, end
        if kind not in "[{" or depth == self.MAX_DEPTH:
            raise ValueError("not a value")
        if end not in self.known:
            try:
                self.known[end] = self._items(kind, end, depth)
            except ValueError:
                self.known[end] = None
        if not self.known[end]:
            raise ValueError("read before, in vain")
        return self.known[end]

    def _items(self, kind: str, at: int, depth: int) -> tuple[Any, int]:
        """The list or object whose first item starts at `at`, and the position after it."""
        close, items = {"[": "]", "{": "}"}[kind], []
        token = self.token(at)
        while token[0] != close:
            item, at = self._value(token, depth + 1)
            if kind == "{":
                colon, _, at = self.token(at)
                if colon != ":" or not isinstance(item, str):
                    raise ValueError("a key and a colon are missing")
                value, at = self._value(self.token(at), depth + 1)
                item = (item, value)
            items.append(item)
            token = self.token(at)
            if token[0] == ",":
                token = self.token(token[2])
            elif token[0] != close:
                raise ValueError("a comma is missing")
        return (dict(items) if kind == "{" else items), token[2]


class Verdict(NamedTuple):
    """The verifier's judgement of one reply."""

    verdict: str  # a key of the task's rewards
    feedback: str
    recognized: (
        bool  # the reply was parsed and names the dealt cards, or the landmark, or truly that there is none
    )


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
    so that penalties never add up.
    """

    def verdict(name: str, **told: str) -> Verdict:
        return Verdict(name, string.Template(feedback[name]).substitute(told, target=target), recognized)

    parsed, recognized = parse_reply(reply, fields), False
    named, stated, formula = [parsed[f] for f in fields] if parsed else (None, None, None)
    if not (isinstance(stated, list) and isinstance(formula, str)):
        return verdict("unparsed")
    recognized = (
        isinstance(named, list)
        and len(named) == len(cards)
        and Counter(str(card).strip().upper() for card in named) == Counter(cards)
    )
    if "misread" in feedback and not recognized:
        return verdict("misread")
    try:
        value, right, used = evaluate_formula(formula)
        if any(re.match(r"\s*-?0[0-9]", str(n)) for n in stated[: len(numbers) + 1]):
            raise Illegal("a number begins with a zero")
    except Illegal as reason:
        return verdict("illegal", reason=str(reason))
    if value == target and right not in (None, target):
        return verdict("illegal", reason="its two sides differ")
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
    """A number that a model wrote, if it is one and short; the verifier repeats nothing else of what it was told."""
    return text if re.fullmatch("-?[0-9]{1,10}(/[0-9]{1,10})?", text) else "such number"


# ------------------------------------------------------------------------------------------------------------- the pictures

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
        self.draw.ellipse(
            [c for point in self._at((a - r, b - r), (a + r, b + r)) for c in point], fill=color
        )

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
        (
            pen.disc(0, -0.26, 0.22, ink),
            pen.disc(-0.26, 0.08, 0.22, ink),
            pen.disc(0.26, 0.08, 0.22, ink),
            pen.disc(0, 0, 0.12, ink),
        )
    pen.polygon(ink, (0, -0.1), (0.2, 0.5), (-0.2, 0.5))


def _figure(pen: _Pen, rank: str, ink: tuple) -> None:
    """A head and shoulders. The hat tells the ranks apart: a feathered cap, a crown with balls, a crown with a cross over a beard."""
    pen.polygon(ink, (-0.42, 0.6), (0.42, 0.6), (0.26, 0.24), (-0.26, 0.24))
    if rank == "Q":
        pen.disc(0, 0.06, 0.3, ink)
    pen.disc(0, 0.02, 0.22, SKIN)
    if rank == "J":
        pen.polygon(ink, (-0.3, -0.1), (0.3, -0.1), (0.18, -0.3), (-0.24, -0.26))
        pen.line(GOLD, 0.07, (0.18, -0.2), (0.42, -0.56))
    elif rank == "Q":
        pen.polygon(
            GOLD,
            (-0.26, -0.12),
            (-0.34, -0.42),
            (-0.12, -0.26),
            (0, -0.46),
            (0.12, -0.26),
            (0.34, -0.42),
            (0.26, -0.12),
        )
        for a, b in ((-0.34, -0.44), (0, -0.48), (0.34, -0.44)):
            pen.disc(a, b, 0.06, ink)
    else:
        pen.polygon(ink, (-0.2, 0.1), (0.2, 0.1), (0, 0.46))
        pen.polygon(GOLD, (-0.28, -0.12), (-0.28, -0.36), (0.28, -0.36), (0.28, -0.12))
        pen.line(GOLD, 0.08, (0, -0.64), (0, -0.36))
        pen.line(GOLD, 0.08, (-0.12, -0.52), (0.12, -0.52))


def _mark(rank: str, suit: str, size: float) -> Image.Image:
    """What stands in a card's corner: the rank, `size` pixels high as a font counts, and the suit below it."""
    font, weight = ImageFont.load_default(size), size * 0.035
    left, top, right, bottom = font.getbbox(rank, stroke_width=weight)
    glyph = Image.new("RGBA", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(glyph).text(
        (-left, -top), rank, font=font, fill=INK[suit], stroke_width=weight, stroke_fill=INK[suit]
    )
    if rank == "10":
        glyph = glyph.resize((round(0.72 * glyph.width), glyph.height))
    mark = Image.new("RGBA", (max(glyph.width, round(0.6 * size)), glyph.height + round(0.65 * size)))
    mark.paste(glyph, (0, 0), glyph)
    _suit(_Pen(mark, glyph.width / 2, glyph.height + 0.36 * size, 0.55 * size), suit)
    return mark


@lru_cache(maxsize=512)
def draw_card(rank: str, suit: str, height: int, font_size: float) -> Image.Image:
    """One card as RGBA, `height` pixels high and 5/7 as wide, transparent outside its rounded corners.

    Rank and suit stand in two corners, the second pair upside down; `font_size` is the rank's share of the height. In the middle: the
    marks that the rank counts, a framed figure for J, Q, K, and one large mark for the ace and where large letters leave no room.
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
            # Marks below the middle stand on their heads: they are drawn mirrored and turned with their corner.
            sign, picture = (1, card) if row <= 3 else (-1, half)
            _suit(
                _Pen(
                    picture,
                    w * (0.5 + 0.16 * sign * column),
                    h * (0.5 + 0.64 * sign * (row / 6 - 0.5)),
                    0.14 * h,
                ),
                suit,
            )
        card.alpha_composite(half.rotate(180))
    elif rank in "JQK":
        ImageDraw.Draw(card).rectangle(
            [0.24 * w, 0.18 * h, 0.76 * w, 0.775 * h], outline=ink, width=max(1, h // 120)
        )
        _figure(_Pen(card, w / 2, 0.52 * h, 0.42 * h), rank, ink)
    else:
        _suit(_Pen(card, w / 2, h / 2, (0.3 if font_size <= 0.22 else 0.2) * h), suit)
    card.alpha_composite(corner.rotate(180))
    paper = Image.new("RGBA", (w, h))
    ImageDraw.Draw(paper).rounded_rectangle(
        [0, 0, w - 1, h - 1], h // 14, fill=PAPER, outline=(90, 90, 90), width=max(1, h // 150)
    )
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
    """Cards side by side on a green table, `size` = (width, height) in pixels. `jitter` from 0 to 1 moves, turns (at most 12 degrees)
    and scales (at most 10%) each card at random; every card stays in its own part of the table."""
    picture, slot = Image.new("RGB", size, TABLE), size[0] / len(ranks)
    tall = min(0.94 * size[1], 0.94 * slot * 7 / 5) * (1 - 0.25 * jitter)
    for i, (rank, suit) in enumerate(zip(ranks, suits, strict=True)):
        grow, turn, right, down = (jitter * rng.uniform(-1, 1) for _ in range(4))
        card = draw_card(rank, suit, max(8, round(tall * (1 + 0.1 * grow))), font_size)
        if turn:
            card = card.rotate(12 * turn, Image.BICUBIC, expand=True)
        place = (
            round(slot * i + (slot - card.width) / 2 * (1 + 0.8 * right)),
            round((size[1] - card.height) / 2 * (1 + 0.8 * down)),
        )
        picture.paste(card, place, card)
    return picture


# ----------------------------------------------------------------------------------------------------------- the environment


@dataclass(frozen=True)
class Observation:
    """What the model is given: the whole episode so far as chat messages, and the picture (None in text-only tasks). With a picture
    one message's content is a list of parts, and the part of type "image" marks its place. A walk gives a function that draws the picture and
    keeps it: judging a reply need not wait for it, and a demonstration shows one of many."""

    messages: list[dict[str, Any]]
    picture: Image.Image | Callable[[], Image.Image] | None = None

    @property
    def image(self) -> Image.Image | None:
        """The picture; the same object whenever one looks."""
        return self.picture() if callable(self.picture) else self.picture


def text_of(content: str | list[dict]) -> str:
    """A message's content as text, `<image>` at the place of a picture, as the released data writes it."""
    return (
        content
        if isinstance(content, str)
        else "".join("<image>" if part["type"] == "image" else part["text"] for part in content)
    )


def parts_of(text: str) -> list[dict]:
    """The inverse of `text_of` for a message with a picture; one that does not say where it goes comes first."""
    before, mark, after = text.partition("<image>")
    parts = [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]
    return [part for part in (parts if mark else [parts[1], parts[0]]) if part.get("text") != ""]


class GeneralPoints:
    """Make `target` from the numbers of `n_cards` cards (paper, section 3.1).

    Args:
        variant: "id" (J, Q, K count 10) or "rule" (11, 12, 13, and every hand holds a face card).
        seed: of the one random generator of this environment, which deals the hands.
        verify_iter: replies judged per episode, the verification budget.
        faces: what J, Q, K count; None takes the variant's rule.
        replacement: deal as the paper's released code does: each rank by itself, with "rule" one of J, Q, K.
        prompt: text with the placeholders $target $operators $cards (A, 3, K, 10) or $cards_list (the same as
            a Python list) $rule $field_cards $field_number $field_formula.
        fields: the names of the three fields of a reply.
        feedback: other words for the verifier: templates by verdict, see FEEDBACK and TOLD.

    Raises ValueError for a wrong argument.
    """

    rules = FACE_RULES  # what J, Q and K count, by variant
    rewards = REWARDS
    said = FEEDBACK  # by the verifier, if `feedback` has no other words
    decisions = 1  # right replies that finish the episode
    suits: tuple[str, ...] = SUITS  # in the deck
    image: Image.Image | None = None  # of the hand, in visual tasks

    def __init__(
        self,
        variant: str = "id",
        seed: int = 0,
        verify_iter: int = 5,
        *,
        n_cards: int = 4,
        target: int = 24,
        operators: str = OPERATORS,
        faces: dict[str, int] | None = None,
        replacement: bool = False,
        prompt: str | None = None,
        fields: Sequence[str] = FIELDS,
        feedback: dict[str, str] | None = None,
    ):
        if variant not in self.rules:
            raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(self.rules)}")
        numbers = (verify_iter, target, n_cards, *(faces or self.rules[variant]).values())
        if not all(isinstance(n, int) and n >= 1 for n in numbers) or n_cards > 6:
            raise ValueError(
                "verify_iter, target and what faces count must be integers from 1, and n_cards from 1 to 6"
            )
        if len(set(fields)) != len(FIELDS):
            raise ValueError(f"fields must be {len(FIELDS)} different names, not {fields!r}")
        if not isinstance(operators, str) or not operators or set(operators) - set(OPERATORS):
            raise ValueError(f"operators must be some of {OPERATORS}, not {operators!r}")
        self.variant, self.verify_iter, self.n_cards, self.target = variant, verify_iter, n_cards, target
        self.operators = "".join(op for op in OPERATORS if op in operators)
        self.faces = dict(faces or self.rules[variant])
        self.replacement, self.fields = replacement, tuple(fields)
        if not isinstance(prompt, (str, type(None))) or not isinstance(feedback, (dict, type(None))):
            raise ValueError("prompt must be text, and feedback a dict of texts by verdict")
        self.template = PROMPT if prompt is None else string.Template(prompt)
        self.feedback = self.said | (feedback or {})
        self.random = random.Random(seed)
        self.cards: list[str] = []
        self._check_templates()

    def _check_templates(self) -> None:
        try:
            self._prompt(["A"] * self.n_cards)
        except (KeyError, ValueError) as error:
            raise ValueError(f"the prompt template has a wrong placeholder: {error}") from None
        stated = set(self.template.get_identifiers())
        if not isinstance(self, GeneralPointsVL) and not stated & {"cards", "cards_list"}:
            raise ValueError("the prompt template states the cards nowhere: it needs $cards or $cards_list")
        if "rule" not in stated:
            warnings.warn("the prompt template does not state the rule: it has no $rule")
        for verdict, text in self.feedback.items():
            if verdict not in self.said:
                raise ValueError(f"unknown verdict {verdict!r}: choose from {', '.join(self.said)}")
            template = string.Template(text if isinstance(text, str) else "$")  # a lone $ is no template
            told = {"target"} | TOLD.get(verdict, set())
            if not template.is_valid() or set(template.get_identifiers()) - told:
                names = ", ".join(f"${name}" for name in sorted(told))
                raise ValueError(f"the feedback of {verdict!r} must be text with no placeholders but {names}")

    def value_of(self, card: str) -> int:
        """What a rank counts under the rule in force."""
        return self.faces.get(card) or (1 if card == "A" else int(card))

    def _prompt(self, cards: Sequence[str]) -> str:
        return self.template.substitute(
            self._stated(cards),
            target=self.target,
            operators=self.operators,
            rule=", ".join(f"{face} is {self.faces[face]}" for face in "JQK"),
            **{f"field_{name}": own for name, own in zip(FIELDS, self.fields)},
        )

    def _stated(self, cards: Sequence[str]) -> dict[str, str]:
        """What the prompt says of the cards, by placeholder."""
        return {"cards": ", ".join(cards), "cards_list": str(list(cards))}

    def _first_message(self) -> str | list[dict]:
        """The content of the message that opens the episode."""
        return self._prompt(self.cards)

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[Observation, dict]:
        """Deals a new solvable hand, or `options["cards"]`, whatever the variant. A seed restarts the generator; None goes on with it."""
        if seed is not None:
            self.random.seed(seed)
        dealt = (options or {}).get("cards")
        if dealt is not None:
            cards = [str(card).strip().upper() for card in dealt] if isinstance(dealt, (list, tuple)) else []
            if len(cards) != self.n_cards or any(card not in RANKS for card in cards):
                raise ValueError(f"cards must be a list of {self.n_cards} of {' '.join(RANKS)}")
            if max(Counter(cards).values()) > len(SUITS) and not self.replacement:
                raise ValueError(f"a deck has no more than {len(SUITS)} cards of a rank")
            if not self._solutions(cards):
                raise ValueError(f"the hand {' '.join(cards)} cannot make {self.target}")
        else:
            cards = self._deal()
        self.cards, self.numbers = cards, [self.value_of(card) for card in cards]
        self.judged, self.done = 0, (False, False)
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": self._first_message()}]
        self.verdict: Verdict | None = None
        return self._observation(), self._info()

    def _solutions(self, cards: Sequence[str]) -> tuple[str, ...]:
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
            if sum(card in "JQK" for card in cards) >= least and self._solutions(cards):
                return cards
        raise ValueError(f"no hand of {self.n_cards} cards makes {self.target} with {self.operators}")

    def step(self, reply: str) -> tuple[Observation, float, bool, bool, dict]:
        """Judges one reply: observation, reward, terminated (solved), truncated (budget used up), info.

        Takes any string. After the end of an episode nothing is judged any more: the reward is 0 and nothing changes.
        """
        if not self.cards:
            raise RuntimeError("call reset() before step()")
        if any(self.done):
            return self._observation(), 0.0, *self.done, self._info()
        self.verdict = judge(reply, self.cards, self.numbers, self.target, self.fields, self.feedback)
        self.judged += 1
        solved = self.verdict.verdict == "correct"
        self.done = (solved, not solved and self.judged >= self.verify_iter)
        reward = self.rewards[self.verdict.verdict] + (BUDGET_PENALTY if self.done[1] else 0.0)
        self.messages.append({"role": "assistant", "content": reply})
        if not any(self.done):
            self.messages.append({"role": "user", "content": self.verdict.feedback})
        return self._observation(), reward, *self.done, self._info()

    def _observation(self) -> Observation:
        return Observation(copy.deepcopy(self.messages), self.image)

    def _info(self) -> dict:
        verdict, feedback, recognized = self.verdict or (None, None, None)
        return {
            "cards": list(self.cards),
            "numbers": list(self.numbers),
            "verdict": verdict,
            "feedback": feedback,
            "recognized": recognized,
        }

    def reply(self, formula: str, cards: Sequence[str] | None = None) -> str:
        """A reply in the required form that names `cards`, the dealt ones if None, with their numbers and gives `formula`."""
        cards = self.cards if cards is None else cards
        parts = cards, [self.value_of(card) for card in cards], formula
        return json.dumps(dict(zip(self.fields, parts)), ensure_ascii=False)

    def expert_reply(self) -> str:
        """A reply that the verifier accepts now: the canonical solution."""
        if not self.cards:
            raise RuntimeError("call reset() before expert_reply()")
        return self.reply(f"{self._solutions(self.cards)[0]}={self.target}")

    def careless_reply(self) -> str:
        """The canonical solution with "x" for every product, as people write it: no legal equation, unless there is no product."""
        return self.reply(self._solutions(self.cards)[0].replace("*", "x") + f"={self.target}")

    def wrong_reply(self) -> str:
        """A reply with the right cards and numbers whose formula, a near miss of a solution, has another value."""
        solution = re.findall("[0-9]+|.", self._solutions(self.cards)[0])
        for _ in range(1000):
            tokens = list(solution)
            numbers = [i for i, token in enumerate(tokens) if token.isdigit()]
            for i, value in zip(numbers, self.random.sample([tokens[i] for i in numbers], len(numbers))):
                tokens[i] = value
            operators = [i for i, token in enumerate(tokens) if token in OPERATORS]
            if operators:
                tokens[self.random.choice(operators)] = self.random.choice(self.operators)
            try:
                if evaluate_formula("".join(tokens))[0] != self.target:
                    return self.reply("".join(tokens) + f"={self.target}")
            except Illegal:
                continue
        raise ValueError(f"no wrong formula was found for the hand {' '.join(self.cards)}")


class GeneralPointsVL(GeneralPoints):
    """GeneralPoints with the cards in a picture (paper, section 3.1): the reply's `cards` field must name what is seen.

    Args, beside those of GeneralPoints:
        variant: also "visual": the training rule and the other colour, red.
        color: of the suits in the deck: black, red or mixed; None takes the variant's, black but for "visual".
        size: (width, height) of the picture in pixels.
        jitter: from 0 (cards in line) to 1, see `draw_hand`.
        font_size: of the ranks, as a share of the card's height.
    """

    rules = FACE_RULES | {"visual": FACE_RULES["id"]}
    rewards = PICTURE_REWARDS
    said = PICTURE_FEEDBACK

    def __init__(
        self,
        variant: str = "id",
        seed: int = 0,
        verify_iter: int = 5,
        *,
        color: str | None = None,
        size: tuple[int, int] = (1200, 480),
        jitter: float = 0.3,
        font_size: float = 0.17,
        **options,
    ):
        color = color or ("red" if variant == "visual" else "black")
        if color not in COLORS:
            raise ValueError(f"unknown color {color!r}: choose from {', '.join(COLORS)}")
        if not (len(size) == 2 and all(isinstance(n, int) and 32 <= n <= 4096 for n in size)):
            raise ValueError("size must be two integers from 32 to 4096")
        if not (0 <= jitter <= 1 and 0.05 <= font_size <= 0.5):
            raise ValueError("jitter must lie between 0 and 1, font_size between .05 and .5")
        self.suits, self.size, self.jitter, self.font_size = COLORS[color], tuple(size), jitter, font_size
        super().__init__(variant, seed, verify_iter, **options)

    def _stated(self, cards: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(("cards", "cards_list"), "in the picture, from left to right")

    def _first_message(self) -> list[dict]:
        """Picture and prompt. Cards of one rank get different suits as long as the deck has them."""
        left: dict[str, list[str]] = {}
        suits = []
        for card in self.cards:
            if not left.get(card):
                left[card] = self.random.sample(self.suits, len(self.suits))
            suits.append(left[card].pop())
        self.image = draw_hand(self.cards, suits, self.size, self.jitter, self.font_size, self.random)
        return [{"type": "image"}, {"type": "text", "text": self._prompt(self.cards)}]

    def wrong_reply(self) -> str:
        """Half the time the wrong formula of the text task, else a solution of the hand with one card misread."""
        for _ in range(1000 if self.random.random() < 0.5 else 0):
            cards, place = list(self.cards), self.random.randrange(self.n_cards)
            cards[place] = self.random.choice([rank for rank in RANKS if rank != cards[place]])
            if solutions := self._solutions(cards):
                return self.reply(f"{solutions[0]}={self.target}", cards)
        return super().wrong_reply()


# ------------------------------------------------------------------------------------------------------ streets: where things are

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
    """Metres to the east and to the north from a to b, on the plane that touches the sphere between them: for points of one city."""
    return (
        wrap(b[1] - a[1]) * METRES_PER_DEGREE * math.cos(math.radians((a[0] + b[0]) / 2)),
        (b[0] - a[0]) * METRES_PER_DEGREE,
    )


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
    """Panorama ids by place: the nearest one within NEAR metres, from a grid of cells of that size."""

    def __init__(self, ids: dict[Geocode, str]):
        self.ids = ids
        self.cells: dict[tuple[int, int], list[Geocode]] = {}
        for place in ids:
            self.cells.setdefault(self._cell(place), []).append(place)

    @staticmethod
    def _cell(place: Geocode) -> tuple[int, int]:
        row = math.floor(place[0] * METRES_PER_DEGREE / NEAR)
        return row, math.floor(
            place[1] * METRES_PER_DEGREE * math.cos(math.radians(row * NEAR / METRES_PER_DEGREE)) / NEAR
        )

    def nearest(self, place: Geocode) -> Geocode | None:
        """The place of the nearest panorama, None if none is within NEAR metres."""
        if place in self.ids:
            return place
        row = self._cell(place)[0]
        around = []
        for longitude in (
            place[1],
            place[1] - math.copysign(360, place[1]),
        ):  # for the other side of the date line
            for r in (row - 1, row, row + 1):  # a row has its own width of a cell in degrees
                column = self._cell((r * NEAR / METRES_PER_DEGREE + 1e-9, longitude))[1]
                around += [p for c in (column - 1, column, column + 1) for p in self.cells.get((r, c), ())]
        best = min(around, key=lambda p: distance(p, place), default=None)
        return best if best is not None and distance(best, place) <= NEAR else None


# ------------------------------------------------------------------------------------------ streets: routes and their files


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


class World(NamedTuple):
    """What `VIRL` walks through: routes and panoramas. `picture(place)` is the equirectangular picture of a
    panorama and its rotation in degrees, None where there are no pictures; of the panoramas at `lost` it is
    missing, and between turning points no walk comes by."""

    routes: tuple[Route, ...]
    panoramas: Panoramas
    picture: Callable[[Geocode], tuple[Image.Image, float]] | None = None
    lost: frozenset[Geocode] = frozenset()


# What a pickled dict from pairs of numbers to strings is made of, and nothing else.
_NUMBERS = {"FLOAT", "BINFLOAT", "INT", "BININT", "BININT1", "BININT2", "LONG1"}
_PLAIN = _NUMBERS | set(
    "PROTO MARK EMPTY_DICT DICT SETITEM SETITEMS TUPLE TUPLE2 UNICODE BINUNICODE SHORT_BINUNICODE "
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
        if code.name not in _PLAIN:
            raise ValueError(f"it asks for {code.name} {'' if argument is None else argument}")
        if "PUT" in code.name and int(argument) > len(data):
            raise ValueError("its memo is too large")
        if "TUPLE" in code.name:  # TUPLE takes all since the mark
            if not _NUMBERS.issuperset(before[1:]) or code.name == "TUPLE" and before[0] != "MARK":
                raise ValueError("its keys are no pairs of numbers")
        before = [*before[1:], code.name]
    return pickle.loads(data)


def load_world(folder: str | Path, pictures: bool = False) -> World:
    """Reads a folder in the released format: route_infos.json, gps_pano_mapping.pkl and, for pictures, street_views/.

    Raises ValueError, in one line that names file, route and field, for what cannot be used; unknown fields are left alone. With `pictures`
    the files of the panoramas where routes start, turn and end must be there, and a warning says how many
    others are missing; what is in them is read when a walk comes by.
    """
    folder = Path(folder)
    path = folder / "route_infos.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {_line(error)}") from None
    mapping = folder / "gps_pano_mapping.pkl"
    try:
        ids = _read_pickle(mapping.read_bytes())
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{mapping} cannot be read: {_line(error)}") from None
    if not (
        isinstance(ids, dict)
        and ids
        and all(_is_geocode(place) and isinstance(name, str) for place, name in ids.items())
    ):
        raise ValueError(f"{mapping}: not a dict from (latitude, longitude) to panorama ids")
    if odd := [
        name for name in ids.values() if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII)
    ]:  # it names a file
        raise ValueError(f"{mapping}: no panorama id: {_line(repr(odd[0]))}")
    routes, panoramas, views = read_routes(content, str(path)), Panoramas(ids), folder / "street_views"
    if pictures and not views.is_dir():
        raise ValueError(f"{folder}: the routes have no panoramas: there is no street_views/")
    for k, route in enumerate(routes):
        named = {f"route_results.geocode_list[{i}]": leg.end for i, leg in enumerate(route.legs)}
        for name, place in {"start_place.relocated_geocode": route.start, **named}.items():
            if (near := panoramas.nearest(place)) is None:
                raise ValueError(
                    f"{path}: route {k}: {name}: {mapping.name} has no panorama within {NEAR:.0f} m of {place[0]:.6f}, {place[1]:.6f}"
                )
            if pictures and (
                lost := next((f for f in _picture_files(views, ids[near]) if not f.is_file()), None)
            ):
                raise ValueError(f"{path}: route {k}: {name}: there is no {lost}")
    if not views.is_dir():
        return World(routes, panoramas)
    lost = frozenset(_without_picture(views, ids)) if pictures else frozenset()
    if lost:
        said = f"{views}: {len(lost)} of {len(ids)} panoramas are missing; no walk comes by"
        warnings.warn(said, stacklevel=2)
    return World(routes, panoramas, partial(_read_picture, views, ids), lost)


def _picture_files(views: Path, name: str) -> tuple[Path, Path]:
    return views / f"{name}.jpg", views / f"{name}.metadata.json"


def _without_picture(views: Path, ids: dict[Geocode, str]) -> list[Geocode]:
    """The places of the panoramas that are not, or not wholly, in street_views/."""
    there = {entry.name for entry in os.scandir(views) if entry.is_file()}
    return [
        place
        for place, name in ids.items()
        if not there.issuperset(file.name for file in _picture_files(views, name))
    ]


def _read_picture(views: Path, ids: dict[Geocode, str], place: Geocode) -> tuple[Image.Image, float]:
    """A panorama from street_views/. Raises ValueError in one line if picture or metadata are missing or broken."""
    path, metadata = _picture_files(views, ids[place])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF data and large pictures
            picture = Image.open(path, formats=["JPEG"]).convert("RGB")
    except (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {_line(error)}") from None
    try:
        rotation = json.loads(metadata.read_text(encoding="utf-8"))["rotation"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{metadata}: no rotation in degrees: {_line(error)}") from None
    if isinstance(rotation, bool) or not isinstance(rotation, (int, float)) or not -360 <= rotation <= 360:
        raise ValueError(f"{metadata}: no rotation in degrees: {_line(rotation)}")
    return picture, float(rotation)


def _line(value: Any) -> str:
    """Something foreign as one short line of an error."""
    return " ".join(str(value).split())[:120]


def _is_geocode(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(
            isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) <= limit
            for x, limit in zip(value, (90, 180))
        )
    )


def read_routes(content: Any, name: str = "routes") -> tuple[Route, ...]:
    """The routes in what route_infos.json holds: [[route, ...], number], or one bare route. `name` is for the error's text."""
    routes = content if isinstance(content, list) else [content]
    if routes and isinstance(routes[0], list):
        routes = routes[0]
    read = []
    for k, route in enumerate(routes):
        try:
            read.append(_read_route(route))
        except _Fault as fault:
            raise ValueError(f"{name}: route {k}: {fault}") from None
    if not read:
        raise ValueError(f"{name}: no routes")
    return tuple(read)


class _Fault(Exception):
    """What is wrong with one route."""


def _milestones(text: str) -> list[dict[str, str]]:
    """The blocks of milestone_info. It is no JSON: a line is "key": "value", and a value may hold quotes and braces. Lines may be joined."""
    blocks: list[dict[str, str]] = []
    text = re.sub(
        r'",[ \t]*(?="\w+"[ \t]*:)', '",\n', re.sub(r'"[ \t]*,?[ \t]*\}[ \t]*,?[ \t]*\{', '"}\n{', text)
    )
    for line in re.split("\r\n|\r|\n", text):
        line = re.sub(r"^\}\s*,?\s*\{", "{", line.strip())
        if line.startswith("{"):
            blocks.append({})
            line = line[1:].strip()
        line = line.removesuffix("}").rstrip().removesuffix(",").rstrip()
        key, colon, value = line[1:].partition('"')
        value = value.strip().removeprefix(":").strip()
        if blocks and line.startswith('"') and colon and len(value) > 1 and value[0] == value[-1] == '"':
            blocks[-1][key] = value[1:-1]
    return blocks


def _field(record: Any, *names: str) -> Any:
    for name in names:
        if not isinstance(record, dict) or record.get(name) is None:
            raise _Fault(f"no field {'.'.join(names)}")
        record = record[name]
    return record


def _geocode(value: Any, field_name: str) -> Geocode:
    if not _is_geocode(value):
        raise _Fault(f"{field_name} is no [latitude, longitude]: {_line(value)}")
    return float(value[0]), float(value[1])


def _read_route(route: Any) -> Route:
    start = _geocode(_field(route, "start_place", "relocated_geocode"), "start_place.relocated_geocode")
    ends = _field(route, "route_results", "geocode_list")
    if not (isinstance(ends, list) and ends):
        raise _Fault("route_results.geocode_list is no list of places")
    text = _field(route, "milestone_info")
    if not isinstance(text, str):
        raise _Fault("milestone_info is no text")
    blocks = _milestones(text)
    if len(blocks) != len(ends):
        raise _Fault(
            f"milestone_info has {len(blocks)} blocks for {len(ends)} points of route_results.geocode_list"
        )
    legs = []
    for i, (block, end) in enumerate(zip(blocks, ends)):
        heading = block.get("to_next_intersection_heading", "")
        number = re.fullmatch(r"\s*(-?\d{1,3}(?:\.\d{1,9})?)\s*(?:\((.*)\)\s*)?", heading, re.ASCII)
        if not number or not -360 <= float(number[1]) <= 360:
            raise _Fault(
                f"milestone_info, block {i + 1}: to_next_intersection_heading is no number of degrees"
            )
        landmark = block.get("landmarks", "").strip().rstrip(".") or NOTHING
        if _landmark(landmark) == _landmark(NOTHING):
            landmark = NOTHING
        if landmark == NOTHING and i == len(ends) - 1:  # without a sign nobody would know where to stop
            place = route.get("dest_place")
            name = place.get("name") if isinstance(place, dict) else None
            landmark = f"The destination {name}" if isinstance(name, str) else "The destination"
        landmark = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", landmark).split())
        if (
            len(landmark) > 300
            or not _landmark(landmark)
            or "<image>" in landmark
            or any(unicodedata.category(c) in ("Cc", "Cs") for c in landmark)
        ):
            raise _Fault(
                f"milestone_info, block {i + 1}: landmarks is no text of up to 300 characters: {_line(repr(landmark))}"
            )
        degrees, word = float(number[1]) % 360.0, (number[2] or "").strip().lower()
        compass = word if word in COMPASS else compass_word(degrees)
        legs.append(Leg(_geocode(end, f"route_results.geocode_list[{i}]"), degrees, compass, landmark))
    heading = route.get("init_heading")
    if heading is not None and (
        isinstance(heading, bool) or not isinstance(heading, (int, float)) or not -360 <= heading <= 360
    ):
        raise _Fault(f"init_heading is no number of degrees: {_line(heading)}")
    return Route(start, float(heading) % 360.0 if heading else None, tuple(legs))


def write_world(
    folder: Path,
    content: Any,
    ids: dict[Geocode, str],
    picture: Callable[[Geocode], tuple[Image.Image, float]] | None = None,
) -> None:
    """Writes a folder that `load_world` reads; `picture` as in World. The routes come last: a folder that was not finished does not load."""
    folder.mkdir(parents=True, exist_ok=True)
    routes = folder / "route_infos.json"
    routes.unlink(missing_ok=True)
    (folder / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(ids))
    if picture:
        views = folder / "street_views"
        views.mkdir(exist_ok=True)
        for place, name in ids.items():
            image, rotation = picture(place)
            file, metadata = _picture_files(views, name)
            image.save(file, quality=100, subsampling=0)
            metadata.write_text(json.dumps({"rotation": rotation}))
    aside = routes.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(routes)


# ------------------------------------------------------------------------------------------------- streets: a synthetic city

Color = tuple[int, int, int]  # RGB
Metres = tuple[float, float]  # to the east and to the north
BOARD, BOARD_FOOT = (6, 4), 3.2  # metres, of signs: width and height, and what is free below them


class CityPlan(NamedTuple):
    """How a synthetic city differs from others: its map, its names, its looks. All lengths in metres."""

    name: str
    centre: Geocode
    words: tuple[str, ...]  # first words of the names of places
    trades: tuple[str, ...]  # and second ones
    layout: str = "new york"  # cities of one layout differ in nothing that chance decides
    block: tuple[float, float] = (140.0, 90.0)  # east-west and north-south
    turned: float = 29.0  # degrees that the grid is turned against north
    jitter: float = 0.06  # of the crossings, as a share of a block
    diagonals: float = 0.08  # share of the blocks with a diagonal street
    street: float = 18.0  # from facade to facade
    pavement: float = 3.0
    heights: tuple[float, float] = (12.0, 42.0)  # of the buildings
    walls: tuple[Color, ...] = (
        (150, 92, 74),
        (176, 160, 140),
        (120, 126, 136),
        (196, 180, 150),
        (142, 110, 88),
    )
    glass: Color = (60, 80, 104)
    window: tuple[float, float] = (0.44, 0.5)  # a window's share of its bay, across and up
    awnings: tuple[Color, ...] = ((170, 40, 44), (36, 92, 60), (40, 70, 140), (200, 150, 40))
    sign: tuple[Color, Color] = ((24, 30, 60), (250, 246, 230))  # board and letters
    capitals: bool = False  # lettering of the signs
    bold: int = 0  # and how much thicker it is, in pixels of a board 240 wide
    sky: tuple[Color, Color] = ((96, 150, 210), (200, 220, 238))  # overhead and at the horizon
    light: float = 1.0
    road: Color = (70, 70, 74)


def nearest_street(points: np.ndarray, streets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of points [..., 2] the distance to the nearest street of [n, 4], the metres along it, and which one that is; all [...]."""
    x1, y1, x2, y2 = streets.T.astype(float)
    length = np.hypot(x2 - x1, y2 - y1)
    dx, dy, x1, y1, length = (
        a.astype(points.dtype) for a in ((x2 - x1) / length, (y2 - y1) / length, x1, y1, length)
    )
    flat = points.reshape(-1, 2)
    nearest, along, number = (
        np.empty(len(flat), points.dtype),
        np.empty(len(flat), points.dtype),
        np.empty(len(flat), int),
    )
    for part in (slice(i, i + 256) for i in range(0, len(flat), 256)):  # all at once would need much memory
        x, y = flat[part, :1] - x1, flat[part, 1:] - y1
        walked = np.clip(x * dx + y * dy, 0, length)
        apart = np.hypot(x - walked * dx, y - walked * dy)
        best = apart.argmin(1)
        number[part], rows = best, np.arange(len(best))
        nearest[part], along[part] = apart[rows, best], walked[rows, best]
    return tuple(a.reshape(points.shape[:-1]) for a in (nearest, along, number))


class City:
    """Streets, places and panoramas of a plan, the same for the same seed: a grid of `size` x `size` crossings. `crossings` are metres east
    and north of the plan's centre, by column and row; `geocode` makes latitude and longitude of metres."""

    def __init__(self, plan: CityPlan, seed: int = 0, size: int = 7):
        self.plan, rng = plan, random.Random(f"{plan.layout}/{seed}")
        cos, sin = math.cos(math.radians(plan.turned)), math.sin(math.radians(plan.turned))
        across, along = (
            [side * (i + plan.jitter * rng.uniform(-0.5, 0.5)) for i in range(size)] for side in plan.block
        )
        self.crossings: dict[tuple[int, int], Metres] = {}
        for i in range(size):
            for j in range(size):
                x, y = (
                    base + side * plan.jitter * rng.uniform(-0.5, 0.5)
                    for base, side in zip((across[i], along[j]), plan.block)
                )
                self.crossings[i, j] = (x * cos + y * sin, y * cos - x * sin)
        self.ways: dict[tuple[int, int], list[tuple[int, int]]] = {c: [] for c in self.crossings}
        for i, j in self.crossings:
            ends = [(i + 1, j), (i, j + 1)]
            if rng.random() < plan.diagonals:
                ends.append((i + 1, j + 1))
            for end in ends:
                if end in self.crossings:
                    self.ways[i, j].append(end)
                    self.ways[end].append((i, j))
        edges = [(a, b) for a, ends in self.ways.items() for b in ends if a < b]
        self.streets = np.array(
            [self.crossings[a] + self.crossings[b] for a, b in edges]
        )  # [n, 4]: from x, y to x, y
        names = [f"{word} {trade}" for word in plan.words for trade in plan.trades]
        numbers = list(
            range(max(len(names), len(_NEW_YORK.words) * len(_NEW_YORK.trades)))
        )  # chance goes on alike, however many names there are
        rng.shuffle(numbers)
        names = [names[k] for k in numbers if k < len(names)]
        self.places: dict[tuple[int, int], dict] = {}  # at most one for each crossing, on a facade near it
        self.boards: dict[tuple[int, int], tuple[Metres, Metres]] = {}  # where its sign begins and ends
        for crossing in self.crossings:
            spot = self._facade_near(crossing, rng)
            if spot and rng.random() < 0.9 and names:
                name, (at, outwards) = names.pop(), spot
                board = at, (at[0] + BOARD[0] * outwards[0], at[1] + BOARD[0] * outwards[1])
                if nearest_street(np.array(at), self.streets)[
                    0
                ] > plan.street / 2 - 0.1 and self._to_one_side(crossing, board):
                    self.places[crossing] = {
                        "name": name,
                        "geocode": list(self.geocode(at)),
                        "relocated_geocode": list(self.geocode(self.crossings[crossing])),
                    }
                    self.boards[crossing] = board
        stands = list(self.crossings.values())
        for a, b in edges:
            (x1, y1), (x2, y2) = self.crossings[a], self.crossings[b]
            n = max(1, round(math.hypot(x2 - x1, y2 - y1) / 12))
            stands += [(x1 + (x2 - x1) * k / n, y1 + (y2 - y1) * k / n) for k in range(1, n)]
        self.panoramas = {
            self.geocode(at): f"{plan.name.replace(' ', '')}{k:05d}" for k, at in enumerate(stands)
        }

    def geocode(self, at: Metres) -> Geocode:
        lat = self.plan.centre[0] + at[1] / METRES_PER_DEGREE
        return lat, self.plan.centre[1] + at[0] / (
            METRES_PER_DEGREE * math.cos(math.radians((lat + self.plan.centre[0]) / 2))
        )

    def _facade_near(self, crossing: tuple[int, int], rng: random.Random) -> tuple[Metres, Metres] | None:
        """A point of a facade not far from a crossing, and the direction from there out into the street; None if chance finds none. It lies
        in no other street, were they as wide as New York's: what chance decides must not depend on their width."""
        x, y = self.crossings[crossing]
        for _ in range(20):
            u, v = self.crossings[rng.choice(self.ways[crossing])]
            length, away, side = math.hypot(u - x, v - y), rng.uniform(6, 14), rng.choice((1, -1))
            dx, dy = (u - x) / length, (v - y) / length

            def facade(half: float) -> Metres:
                return x + dx * (half + away) - side * dy * half, y + dy * (half + away) + side * dx * half

            half = _NEW_YORK.street / 2
            if nearest_street(np.array(facade(half)), self.streets)[0] > half - 0.1:
                return facade(self.plan.street / 2), (side * dy, -side * dx)
        return None

    def _to_one_side(self, crossing: tuple[int, int], board: tuple[Metres, Metres]) -> bool:
        """Whether the middle of a sign is clearly to the left or to the right, whichever way one comes."""
        away = np.mean(board, 0) - self.crossings[crossing]
        headings = (math.radians(self._heading(end, crossing)) for end in self.ways[crossing])
        return all(abs(away @ (math.cos(heading), -math.sin(heading))) > 2 for heading in headings)

    def route(self, rng: random.Random, turns: int, quarters: Sequence[int] = (0, 1, 2, 3)) -> dict:
        """A route with so many turning points, in the released format, to a place in some of four interleaved quarters of the city."""
        while True:
            path = self._path(rng, turns)
            if path and path[-1] in self.places and (path[-1][0] + 2 * path[-1][1]) % 4 in quarters:
                return self._record(rng, path)

    def _path(self, rng: random.Random, turns: int) -> list[tuple[int, int]] | None:
        """The crossings where a walk starts, turns and ends; None if it ran into a corner or crossed itself."""
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
        turned = [
            wrap(self._heading(b, c) - self._heading(a, b)) for a, b, c in zip(path, path[1:], path[2:])
        ]
        return path if all(20 <= abs(turn) <= 150 for turn in turned) else None

    @lru_cache(
        maxsize=None
    )  # drawing 2,048 routes asks for the same few a million times, and for the same few headings
    def _onward(
        self, a: tuple[int, int], b: tuple[int, int], least: float, most: float
    ) -> list[tuple[int, int]]:
        """The crossings next to b to which one who comes from a turns by so many degrees."""
        return [
            c for c in self.ways[b] if least <= abs(wrap(self._heading(b, c) - self._heading(a, b))) <= most
        ]

    @lru_cache(maxsize=None)
    def _heading(self, a: tuple[int, int], b: tuple[int, int]) -> float:
        return bearing(self.geocode(self.crossings[a]), self.geocode(self.crossings[b]))

    def _record(self, rng: random.Random, path: list[tuple[int, int]]) -> dict:
        blocks, landmarks = [], []
        for k, (a, b) in enumerate(zip(path, path[1:])):
            heading, place, corner = self._heading(a, b), self.places.get(b), self.geocode(self.crossings[b])
            last = b == path[-1]
            if place:
                middle = self.geocode(tuple((p + q) / 2 for p, q in zip(*self.boards[b])))  # of what one sees
                side = "on your " + _side(bearing(corner, middle) - heading)
                told = f"The destination {place['name']} is {side}" if last else f"{place['name']} is {side}"
            else:
                told = NOTHING
            if not last:
                landmarks.append(place)
            whole, metres = round(heading) % 360, round(math.dist(self.crossings[a], self.crossings[b]))
            lines = {
                "intersection_idx": k + 1,
                "landmarks": told,
                "distance": f"{metres} meters",
                "human_heading": whole,
                "to_next_intersection_heading": f"{whole} ({compass_word(whole)})",
            }
            blocks.append(
                "{\n" + "\n".join(f'    "{key}": "{value}",' for key, value in lines.items()) + "\n}"
            )
        places = [list(self.geocode(self.crossings[c])) for c in path]
        return {
            "start_place": {"relocated_geocode": places[0]},
            "dest_place": self.places[path[-1]],
            "init_heading": rng.randint(1, 359),
            "route_results": {"geocode_list": places[1:], "landmark_list": landmarks},
            "milestone_info": "\n".join(blocks),
        }


def _side(turn: float) -> str:
    """Where a place is that lies so many degrees to the right of where one looks."""
    turn = wrap(turn)
    return ("right" if turn > 0 else "left") + (" behind" if abs(turn) > 90 else "")


# ------------------------------------------------------------------------------------------------- streets: the built-in world

_NEW_YORK = CityPlan(
    "new york",
    (40.7527, -73.9772),
    tuple(
        "Amber Bishop Cedar Delta Elm Falcon Golden Harbor Ivory Juniper King Laurel Maple North Orchid Pearl".split()
    ),
    tuple("Bakery Bank Books Cafe Cinema Deli Florist Hotel Market Museum Pharmacy Theatre".split()),
)


def _plan(name: str, centre: Geocode, words: str, trades: str, **differences) -> CityPlan:
    return _NEW_YORK._replace(
        name=name,
        centre=centre,
        words=tuple(words.split()),
        trades=tuple(trades.split()),
        layout=name,
        **differences,
    )


# The training city, and nine that differ from it in every group of DIFFERENCES.
CITIES = {
    plan.name: plan
    for plan in (
        _NEW_YORK,
        _plan(
            "milan",
            (45.4642, 9.1900),
            "Aurora Brera Corvo Dante Edera Fiore Giglio Lauro",
            "Osteria Panificio Libreria Gelateria Farmacia Albergo Galleria Teatro",
            block=(95.0, 120.0),
            turned=-12.0,
            jitter=0.3,
            diagonals=0.2,
            street=13.0,
            pavement=1.6,
            road=(98, 92, 86),
            heights=(14.0, 24.0),
            window=(0.34, 0.62),
            walls=((214, 170, 108), (226, 196, 140), (196, 132, 92), (232, 214, 178)),
            glass=(74, 66, 60),
            awnings=((120, 30, 40), (232, 224, 200)),
            sign=((122, 24, 30), (240, 214, 150)),
            sky=((110, 160, 224), (236, 226, 206)),
            light=1.08,
        ),
        _plan(
            "new delhi",
            (28.6315, 77.2167),
            "Ashok Bharat Chandni Ganga Himal Indra Kamal Lotus",
            "Bhawan Bazaar Dhaba Emporium Mandir Sweets Sarees Tailors",
            block=(170.0, 150.0),
            turned=8.0,
            jitter=0.4,
            diagonals=0.25,
            street=26.0,
            pavement=2.0,
            road=(104, 98, 90),
            heights=(7.0, 16.0),
            window=(0.6, 0.4),
            walls=((232, 224, 206), (206, 120, 92), (236, 190, 130), (178, 196, 190)),
            glass=(50, 52, 58),
            awnings=((240, 140, 20), (20, 140, 70), (230, 60, 120)),
            sign=((250, 200, 30), (150, 20, 30)),
            capitals=True,
            bold=2,
            sky=((170, 172, 160), (226, 208, 172)),
            light=0.94,
        ),
        _plan(
            "buenos aires",
            (-34.6037, -58.3816),
            "Alvear Borges Cortez Defensa Estrella Florida Gaucho Luna",
            "Parrilla Confiteria Kiosco Milonga Heladeria Almacen Imprenta Ferreteria",
            block=(110.0, 110.0),
            turned=0.0,
            jitter=0.02,
            diagonals=0.03,
            street=15.0,
            pavement=2.2,
            road=(84, 84, 80),
            heights=(10.0, 34.0),
            window=(0.3, 0.7),
            walls=((228, 228, 220), (190, 200, 206), (216, 196, 168), (150, 160, 150)),
            glass=(40, 56, 54),
            awnings=((90, 170, 220), (250, 250, 250)),
            sign=((90, 170, 220), (20, 24, 40)),
            bold=1,
            sky=((60, 130, 220), (170, 210, 240)),
            light=1.12,
        ),
        _plan(
            "london",
            (51.5154, -0.1410),
            "Albany Baker Chelsea Dover Eaton Fleet Grosvenor Kensington",
            "Arms Bookshop Chemist Inn Ironmonger Stationer Tearoom Tobacconist",
            block=(120.0, 70.0),
            turned=-24.0,
            jitter=0.45,
            diagonals=0.15,
            street=16.0,
            pavement=3.6,
            road=(60, 62, 66),
            heights=(10.0, 20.0),
            window=(0.36, 0.56),
            walls=((136, 66, 52), (154, 84, 66), (226, 222, 212), (118, 60, 50)),
            glass=(92, 100, 108),
            awnings=((20, 40, 80), (10, 70, 50), (60, 10, 30)),
            sign=((10, 60, 44), (226, 190, 90)),
            sky=((138, 144, 150), (184, 188, 190)),
            light=0.82,
        ),
        _plan(
            "hong kong",
            (22.2830, 114.1580),
            "Bauhinia Canton Dragon Fortune Jade Kowloon Lantern Phoenix",
            "Dimsum Noodles Jewellery Herbs Seafood Mahjong Tailoring Electronics",
            block=(80.0, 60.0),
            turned=40.0,
            jitter=0.35,
            diagonals=0.12,
            street=12.0,
            pavement=1.8,
            road=(52, 52, 56),
            heights=(30.0, 90.0),
            window=(0.7, 0.44),
            walls=((170, 176, 172), (198, 178, 170), (140, 150, 160), (206, 206, 190)),
            glass=(30, 66, 78),
            awnings=((220, 30, 60), (30, 160, 90), (240, 220, 40)),
            sign=((224, 20, 60), (255, 240, 120)),
            capitals=True,
            bold=1,
            sky=((150, 160, 176), (190, 196, 204)),
            light=0.88,
        ),
        _plan(
            "melbourne",
            (-37.8136, 144.9631),
            "Acacia Banksia Carlton Eureka Fitzroy Grevillea Jacaranda Kookaburra",
            "Brewery Butcher Espresso Gallery Grocer Milkbar Records Surfwear",
            block=(200.0, 100.0),
            turned=20.0,
            jitter=0.0,
            diagonals=0.0,
            street=30.0,
            pavement=4.5,
            road=(88, 84, 84),
            heights=(9.0, 60.0),
            window=(0.52, 0.6),
            walls=((96, 104, 110), (206, 206, 204), (160, 130, 110), (70, 76, 84)),
            glass=(120, 150, 160),
            awnings=((60, 60, 60), (200, 80, 30)),
            sign=((250, 250, 250), (30, 30, 30)),
            sky=((90, 150, 230), (226, 236, 244)),
            light=1.05,
        ),
        _plan(
            "lagos",
            (6.4550, 3.3841),
            "Adeola Balogun Chidi Ebony Folake Ikoyi Jollof Kola",
            "Buka Fabrics Fashions Motors Plaza Suya Supermart Ventures",
            block=(130.0, 140.0),
            turned=-35.0,
            jitter=0.5,
            diagonals=0.1,
            street=20.0,
            pavement=1.0,
            road=(120, 100, 80),
            heights=(5.0, 18.0),
            window=(0.5, 0.34),
            walls=((236, 206, 96), (120, 176, 150), (226, 150, 110), (240, 236, 220)),
            glass=(44, 48, 50),
            awnings=((0, 120, 60), (230, 120, 20), (120, 40, 130)),
            sign=((0, 120, 60), (255, 255, 255)),
            capitals=True,
            bold=2,
            sky=((180, 190, 196), (232, 220, 196)),
            light=1.0,
        ),
        _plan(
            "san francisco",
            (37.7793, -122.4193),
            "Alcatraz Bayview Castro Divisadero Embarcadero Filbert Geary Presidio",
            "Burrito Cannery Creamery Sourdough Tattoo Taqueria Vinyl Yoga",
            block=(125.0, 84.0),
            turned=-9.0,
            jitter=0.08,
            diagonals=0.3,
            street=22.0,
            pavement=3.4,
            road=(92, 92, 96),
            heights=(8.0, 15.0),
            window=(0.5, 0.66),
            walls=((186, 214, 214), (240, 214, 200), (206, 196, 226), (248, 236, 196)),
            glass=(70, 84, 110),
            awnings=((240, 240, 240), (90, 120, 170)),
            sign=((240, 236, 226), (40, 80, 140)),
            bold=1,
            sky=((190, 198, 206), (214, 218, 220)),
            light=0.92,
        ),
        _plan(
            "cape town",
            (-33.9249, 18.4241),
            "Agulhas Bokaap Constantia Disa Erica Fynbos Gansbaai Karoo",
            "Biltong Cellars Curios Lodge Pottery Rooibos Shebeen Winery",
            block=(150.0, 110.0),
            turned=15.0,
            jitter=0.25,
            diagonals=0.18,
            street=19.0,
            pavement=2.6,
            road=(78, 76, 80),
            heights=(6.0, 14.0),
            window=(0.4, 0.44),
            walls=((240, 110, 120), (90, 180, 200), (246, 206, 90), (150, 200, 120)),
            glass=(58, 60, 80),
            awnings=((250, 250, 240), (60, 60, 120)),
            sign=((60, 36, 20), (250, 230, 200)),
            sky=((40, 110, 210), (190, 224, 250)),
            light=1.15,
        ),
    )
}
DIFFERENCES = {
    "names": ("words", "trades"),
    "blocks": ("layout", "block", "turned", "jitter", "diagonals"),
    "streets": ("street", "pavement", "road"),
    "facades": ("heights", "window"),
    "palette": ("walls", "glass", "awnings"),
    "signs": ("sign", "capitals", "bold"),
    "weather": ("sky", "light"),
}
TEST_CITIES = tuple(name for name in CITIES if name != _NEW_YORK.name)


def city_plan(name: str, differences: Sequence[str] = tuple(DIFFERENCES)) -> CityPlan:
    """A city of CITIES, or New York at its place with only some of its differences (keys of DIFFERENCES)."""
    city = CITIES[name]
    return _NEW_YORK._replace(
        name=name,
        centre=city.centre,
        **{part: getattr(city, part) for group in differences for part in DIFFERENCES[group]},
    )


ANYWHERE = "anywhere"  # a city of the foundation model's corpus: made-up names, map and looks


def _made_up(rng: random.Random) -> str:
    """A name of two or three syllables."""
    syllables = (
        rng.choice(("", *"bcdfghjklmnprstvwz", "br", "ch", "fl", "gr", "sh", "st", "th", "tr"))
        + rng.choice("aeiou")
        + rng.choice(("", "", *"dlmnrst"))
        for _ in range(rng.randint(2, 3))
    )
    return "".join(syllables).capitalize()


@lru_cache(maxsize=None)
def _city(name: str, seed: int, differences: tuple[str, ...]) -> City:
    if name != ANYWHERE:
        return City(city_plan(name, differences), seed)
    rng = random.Random(f"names/{seed}")
    words, trades = ({_made_up(rng): None for _ in range(12)} for _ in range(2))

    def colors(n: int, darkest: int = 20, lightest: int = 240) -> tuple[Color, ...]:
        return tuple(
            (rng.randint(darkest, lightest), rng.randint(darkest, lightest), rng.randint(darkest, lightest))
            for _ in range(n)
        )

    board, letters = colors(1, 20, 110)[0], colors(1, 180, 250)[0]
    return City(
        CityPlan(
            name,
            _NEW_YORK.centre,
            tuple(words),
            tuple(trades),
            layout=f"{name}/{seed}",
            block=(rng.uniform(70, 180), rng.uniform(70, 180)),
            turned=rng.uniform(-45, 45),
            jitter=rng.uniform(0, 0.5),
            diagonals=rng.uniform(0, 0.3),
            street=rng.uniform(12, 28),
            pavement=rng.uniform(1, 4),
            road=(shade := rng.randint(50, 120), shade, shade),
            heights=(rng.uniform(5, 15), rng.uniform(16, 60)),
            window=(rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)),
            walls=colors(4, 60),
            glass=colors(1, 30, 130)[0],
            awnings=colors(3),
            sign=rng.choice(((board, letters), (letters, board))),
            capitals=rng.random() < 0.3,
            bold=rng.randint(0, 2),
            sky=(colors(1, 40, 220)[0], colors(1, 160, 250)[0]),
            light=rng.uniform(0.8, 1.15),
        ),
        seed,
    )


@lru_cache(maxsize=None)
def _scene(*city) -> "Scene":
    return Scene(_city(*city))


def _draw(width: int, cities: tuple, place: Geocode) -> tuple[Image.Image, float]:
    nearest = min(cities, key=lambda city: distance(_city(*city).plan.centre, place))
    return _scene(*nearest).draw(place, (width, width // 2)), 0.0


@lru_cache(maxsize=None)
def _album(width: int) -> Callable:
    """`_draw` with a memory of 800 MB."""
    return lru_cache(maxsize=2**29 // width**2)(partial(_draw, width))


# Of the built-in routes: the name of their draw, and where they lead. The test routes are drawn anew when a study has been seen.
SPLITS = {"train": ("train", (0, 1)), "valid": ("valid", (2,)), "test": ("test, sixth draw", (3,))}


@lru_cache(maxsize=None)
def built_in_routes(
    split: str = "train",
    turns: int = 7,
    seed: int = 0,
    n: int = 2048,
    cities: tuple[str, ...] = (_NEW_YORK.name,),
    differences: tuple[str, ...] = tuple(DIFFERENCES),
) -> list[dict]:
    """Up to `n` different routes of one to `turns` turning points, in the released format, as many in each of the cities, in turn. Routes of different
    splits lead to different places, so no route, and no instruction, of one is in another. Seed 0 is the streets and places of the study."""
    of_city = []
    for city in cities:
        (draw, ends), streets, fruitless = SPLITS[split], _city(city, seed, differences), 0
        rng = random.Random(f"routes/{seed}/{draw}")
        records: dict[str, dict] = {}
        while (
            len(records) < max(1, n // len(cities)) and fruitless < 500
        ):  # there are not many different routes of one turn
            record = streets.route(rng, rng.randint(1, turns), ends)
            key = json.dumps([record["start_place"], record["route_results"]["geocode_list"]])
            fruitless = fruitless + 1 if key in records else 0
            records.setdefault(key, record)
        of_city.append(records.values())
    return [record for one_of_each in zip_longest(*of_city) for record in one_of_each if record]


@lru_cache(maxsize=None)
def built_in_world(
    split: str = "train",
    turns: int = 7,
    seed: int = 0,
    n: int = 2048,
    cities: tuple[str, ...] = (_NEW_YORK.name,),
    differences: tuple[str, ...] = tuple(DIFFERENCES),
    width: int = 1024,
) -> World:
    """Those routes and all panoramas of the cities, pictures of so many pixels across."""
    keys = tuple((city, seed, differences) for city in cities)
    ids = {place: name for key in keys for place, name in _city(*key).panoramas.items()}
    return World(
        read_routes(built_in_routes(split, turns, seed, n, cities, differences)),
        Panoramas(ids),
        partial(_album(width), keys),
    )


# --------------------------------------------------------------------------------------------------- streets: what one sees there

EYE = 2.5  # metres: height of the camera


class Scene:
    """The facades of a city and their signs. `draw` shows what one sees from a place."""

    def __init__(self, city: City):
        self.city, plan = city, city.plan
        rng, half = random.Random(f"facades of {plan.layout}"), plan.street / 2
        walls, buildings = [], []
        for k, (x1, y1, x2, y2) in enumerate(city.streets):
            length = math.hypot(x2 - x1, y2 - y1)
            dx, dy = (x2 - x1) / length, (y2 - y1) / length
            metres = np.arange(0.0, length)
            for side in (1, -1):
                line = np.stack(
                    [x1 + dx * metres - side * dy * half, y1 + dy * metres + side * dx * half], -1
                )
                free = (
                    nearest_street(line, np.delete(city.streets, k, 0))[0] >= half - 0.01
                )  # where no other street comes through
                ends = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(int)))
                for first, last in zip(ends[::2], ends[1::2] - 1):
                    at = 0.0
                    while at < last - first:
                        width = rng.uniform(8, 16)
                        height, bay, paint = (
                            rng.uniform(*plan.heights),
                            rng.uniform(1.8, 3.2),
                            plan.walls[rng.randrange(len(_NEW_YORK.walls)) % len(plan.walls)],
                        )
                        awning = (
                            plan.awnings[rng.randrange(len(_NEW_YORK.awnings)) % len(plan.awnings)]
                            if rng.random() < 0.6
                            else (-1, -1, -1)
                        )
                        buildings.append((1000.0 * len(walls) + at, width, height, bay, *paint, *awning))
                        at += width
                    walls.append((*line[first], *line[last], side * dy, -side * dx))
        self.walls = np.array([wall[:4] for wall in walls])
        self.normals = np.array([wall[4:] for wall in walls])  # towards the street
        self.buildings = np.array(
            buildings
        )  # by 1000 * wall + metres along it: start, width, height, bay, paint, awning
        self.signs = [
            (np.array(city.boards[crossing]).flatten(), self._board(place["name"]))
            for crossing, place in city.places.items()
        ]

    def _board(self, name: str) -> np.ndarray:
        """The pixels of a board that stands out from a facade, to be read from both sides."""
        plan = self.city.plan
        board, letters = plan.sign
        text, font = (name.upper() if plan.capitals else name).replace(" ", "\n"), ImageFont.load_default(40)
        picture = Image.new("RGB", (BOARD[0] * 40, BOARD[1] * 40), board)
        draw = ImageDraw.Draw(picture)
        left, top, right, bottom = draw.multiline_textbbox(
            (0, 0), text, font=font, align="center", stroke_width=plan.bold
        )
        font = ImageFont.load_default(
            40 * min((picture.width - 20) / (right - left), (picture.height - 20) / (bottom - top))
        )
        draw.multiline_text(
            (picture.width / 2, picture.height / 2),
            text,
            fill=letters,
            font=font,
            anchor="mm",
            align="center",
            stroke_width=plan.bold,
        )
        return np.asarray(picture, dtype=np.float32)

    def draw(self, at: Geocode, size: tuple[int, int] = (1024, 512), rotation: float = 0.0) -> Image.Image:
        """The equirectangular panorama at a place, (width, height) pixels. Compass heading h stands in the
        column at the share (h + rotation) / 360 of the width (released data: at longitude h - 180 + rotation,
        0 in the middle)."""
        width, height = size
        plan, eye = self.city.plan, np.array(offset(self.city.plan.centre, at))
        heading = np.radians((np.arange(width) + 0.5) / width * 360.0 - rotation)
        ray = np.stack([np.sin(heading), np.cos(heading)], -1)
        elevation = np.radians(90.0 - (np.arange(height) + 0.5) / height * 180.0)
        up = np.clip(elevation / (math.pi / 2), 0, 1)[:, None, None]
        sky = np.array(plan.sky[1]) * (1 - up) ** 2 + np.array(plan.sky[0]) * (1 - (1 - up) ** 2)
        picture = np.broadcast_to(sky, (height, width, 3)).astype(np.float32)
        reach = np.minimum(
            EYE / np.tan(-elevation[elevation < 0]), 150.0
        )  # what lies farther is less than two rows high
        middle = (self.city.streets[:, :2] + self.city.streets[:, 2:]) / 2
        streets = self.city.streets[np.hypot(*(middle - eye).T) < 150.0 + max(plan.block)]
        picture[elevation < 0] = self._ground(
            (eye + reach[:, None, None] * ray).astype(np.float32), streets.astype(np.float32)
        )
        far = self._facades(picture, eye, ray, elevation)
        self._boards(picture, eye, ray, elevation, far)
        return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))

    def _ground(self, points: np.ndarray, streets: np.ndarray) -> np.ndarray:
        """Colours of points on the ground [..., 2]: road with its lanes and crossing marks, kerb, pavement."""
        plan = self.city.plan
        apart, along, street = nearest_street(points, streets)
        to_end = np.minimum(along, np.hypot(*(streets[:, 2:] - streets[:, :2]).T)[street] - along)
        half, kerb = plan.street / 2, plan.street / 2 - plan.pavement
        color = np.where((apart < kerb)[..., None], np.float32(plan.road), np.float32((150, 148, 142)))
        color[(abs(apart - kerb) < 0.15) & (to_end > kerb)] = (112, 111, 106)
        lane = (apart < 0.12) & (along % 6 < 3) & (to_end > half + 4)
        stripes = (apart < kerb) & (apart % 1.2 < 0.6) & (to_end > half - 1) & (to_end < half + 2)
        color[lane | stripes] = (232, 232, 228)
        return color * plan.light

    def _facades(
        self, picture: np.ndarray, eye: np.ndarray, ray: np.ndarray, elevation: np.ndarray
    ) -> np.ndarray:
        """Paints the nearest wall of every column over sky and ground; returns how far it is [width], infinite where there is none."""
        plan, (distances, shares) = self.city.plan, _meet(eye, ray, self.walls)
        nearest = distances.argmin(1)
        columns = np.flatnonzero(np.isfinite(distances.min(1)))
        wall = nearest[columns]
        far, share = distances[columns, wall], shares[columns, wall]
        metres = share * np.hypot(*(self.walls[wall, 2:] - self.walls[wall, :2]).T)
        building = self.buildings[
            np.searchsorted(self.buildings[:, 0], 1000.0 * wall + metres, side="right") - 1
        ]
        left, (width, top, bay) = 1000.0 * wall + metres - building[:, 0], building[:, 1:4].T
        z = (EYE + far * np.tan(elevation)[:, None]).astype(
            np.float32
        )  # [height, columns]: metres above the ground
        building, left, width, top, bay = (
            values.astype(np.float32) for values in (building, left, width, top, bay)
        )
        light = np.float32(plan.light * (0.78 + 0.22 * abs(self.normals[wall] @ (0.6, 0.8))))
        color = np.broadcast_to(building[:, 4:7], (*z.shape, 3)) * light[:, None]
        across, floor = left / bay % 1, (z - 4.4) / 3.4 % 1
        window = (
            (abs(across - 0.5) < plan.window[0] / 2)
            & (abs(floor - 0.5) < plan.window[1] / 2)
            & (z > 4.4)
            & (z < top - 1)
        )
        inside = (left > 0.5) & (left < width - 0.5)
        color = np.where(
            (window | inside & (z > 0.5) & (z < 2.7))[..., None],
            np.float32(plan.glass) * light[:, None],
            color,
        )
        shade = np.where(left / 0.6 % 2 < 1, np.float32(1.0), np.float32(0.8))[:, None]
        color = np.where(
            (inside & (building[:, 7] >= 0) & (z > 2.5) & (z < 3.3))[..., None],
            building[:, 7:10] * shade * light[:, None],
            color,
        )
        color = np.where(((z > top - 0.5) | (left < 0.15))[..., None], color * 0.75, color)
        mist = np.float32(np.minimum(far / 400, 1)[:, None])
        color = color * (1 - mist) + np.float32(plan.sky[1]) * mist
        picture[:, columns] = np.where(((z >= 0) & (z <= top))[..., None], color, picture[:, columns])
        return distances.min(1)

    def _boards(
        self, picture: np.ndarray, eye: np.ndarray, ray: np.ndarray, elevation: np.ndarray, far: np.ndarray
    ) -> None:
        """Paints the signs that stand before the walls, the farthest first."""
        lines = np.array([line for line, _ in self.signs])
        distances, shares = _meet(eye, ray, lines)
        way = lines[:, 2:] - lines[:, :2]
        for k in np.argsort(-distances.min(0)):
            columns = np.flatnonzero((distances[:, k] < far) & (distances[:, k] < 150.0))
            if len(columns):
                board = self.signs[k][1]
                to_the_right = ray[columns, 1] * way[k, 0] - ray[columns, 0] * way[k, 1] > 0
                across = np.where(to_the_right, shares[columns, k], 1 - shares[columns, k])
                down = (
                    BOARD_FOOT + BOARD[1] - EYE - distances[columns, k] * np.tan(elevation)[:, None]
                ) / BOARD[1]  # 0 to 1 on the board
                rows = (down * board.shape[0]).clip(0, board.shape[0] - 1).astype(int)
                pixels = (
                    board[rows, (across * board.shape[1]).clip(0, board.shape[1] - 1).astype(int)]
                    * self.city.plan.light
                )
                picture[:, columns] = np.where(
                    ((down >= 0) & (down <= 1))[..., None], pixels, picture[:, columns]
                )


def _meet(eye: np.ndarray, ray: np.ndarray, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays [width, 2] from a point meet line segments [n, 4]: the distance, infinite if they do not, and the share of the segment
    from its start to there, both [width, n]."""
    start, way = lines[:, :2] - eye, lines[:, 2:] - lines[:, :2]
    cross = ray[:, None, 0] * way[:, 1] - ray[:, None, 1] * way[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        far = (start[:, 0] * way[:, 1] - start[:, 1] * way[:, 0]) / cross
        share = (start[:, 0] * ray[:, None, 1] - start[:, 1] * ray[:, None, 0]) / cross
    return np.where((share >= 0) & (share <= 1) & (far > 0.1), far, np.inf), share


@lru_cache(maxsize=8)
def _sight(size: int, fov: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of a view lie, in degrees: of a column how far to the right [size], of a pixel how high [size, size]."""
    line = ((np.arange(size) + 0.5) / size * 2 - 1) * math.tan(math.radians(fov / 2))
    right, up = np.meshgrid(line, -line)
    return np.degrees(np.arctan(line)), np.degrees(np.arctan2(up, np.hypot(1, right)))


def view(
    panorama: np.ndarray, heading: float, rotation: float = 0.0, size: int = 300, fov: float = 90.0
) -> Image.Image:
    """The perspective (gnomonic) view of an equirectangular panorama [H, W, 3] at a compass heading, a square
    of `size` pixels, bilinear; the panorama wraps round, and its columns are those of `Scene.draw`."""
    height, width = panorama.shape[:2]
    sideways, latitude = _sight(size, fov)
    x = (heading % 360.0 + rotation + sideways) / 360.0 * width - 0.5
    y = ((90.0 - latitude) / 180.0 * height - 0.5).clip(0, height - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[:, None], (y - y0)[..., None]
    x1, y1 = (x0 + 1) % width, np.minimum(y0 + 1, height - 1)
    x0 %= width
    upper, lower = (panorama[row, x0] * (1 - fx) + panorama[row, x1] * fx for row in (y0, y1))
    return Image.fromarray((upper * (1 - fy) + lower * fy).round().astype(np.uint8))


VIEW_LAYOUTS = {
    "compass": (0, 90, 180, 270),
    "legacy": (-135, -45, 45, 135),
}  # degrees right of the heading: top row, bottom row


def look_around(
    panorama: Image.Image, rotation: float, heading: float, size: int = 300, layout: str = "compass"
) -> Image.Image:
    """Four views in a 2 x 2 grid with a black gap of 5 pixels: front and right over back and left, or the released code's four."""
    pixels, grid = np.asarray(panorama.convert("RGB")), Image.new("RGB", (2 * size + 5, 2 * size + 5))
    for k, turn in enumerate(VIEW_LAYOUTS[layout]):
        corner = (k % 2 * (size + 5), k // 2 * (size + 5))
        grid.paste(view(pixels, (heading + turn) % 360.0, rotation, size), corner)
    return grid


# --------------------------------------------------------------------------------------------------- streets: the environment

STREET_PROMPT = string.Template(
    "Walk this route: $route Actions: forward(), turn_direction(x) with x one of $words, stop(). "
    'Answer in this form: {"$field_observation": "...", "$field_instruction": "...", "$field_action": "..."}$report $observation'
)
STREET_FIELDS = ("current observation", "current instruction", "action")
# Paper, appendix; a wrong observation is a wrong action with a false report of an intersection, and a reply
# that cannot be read counts like a wrong action.
STREET_REWARDS = {"correct": 1.0, "wrong_action": -1.0, "wrong_observation": -1.5, "unparsed": -1.0}


class Waypoint(NamedTuple):
    """One decision of a route: what is seen there, the sentence of the instruction it belongs to, and the expert's action."""

    place: Geocode
    heading: float  # where the agent looks before it acts, compass degrees
    landmark: str
    intersection: bool
    sentence: str
    action: str

    @property
    def observation(self) -> str:
        return self.landmark + ("; an intersection" if self.intersection else "")


class VIRL:
    """Follow a route through streets (paper, section 3.2), told in words.

    An episode is a route. At each waypoint the reply reports what is seen, quotes the sentence of the instruction that it follows, and acts.
    A right action leads to the next waypoint; a wrong one is not executed: the verifier says what was wrong,
    at most `verify_iter` times.

    Args:
        variant: "id" (turns by the eight compass words) or "rule" (left, right, slightly left, slightly right).
        seed: of the one random generator of this environment, which chooses route, points and the first heading.
        verify_iter: replies judged per waypoint.
        data: a folder in the released format, or a World; None takes the built-in city.
        split: of the built-in routes, "train", "valid" or "test".
        turns: most turning points of a built-in route.
        city: of CITIES, or "others", all but New York; None takes the variant's, New York but for "visual".
        differences: from New York that the city has, keys of DIFFERENCES; None takes all.
        go_on: for evaluation: where the budget of a waypoint is used up, go on from the next one; else the route ends there.
        points_per_leg, drop: points between two turning points, each left out with probability `drop`.
        fields: the names of the three fields of a reply.

    Raises ValueError for a wrong argument and for files that cannot be used.
    """

    rules = {"id": COMPASS, "rule": RELATIVE}  # the words of a turn, by variant
    rewards = STREET_REWARDS
    report = ""  # how a report is worded, where the model is not told what is seen
    picture: Callable[[], Image.Image] | None = None  # draws what is seen at the current waypoint
    panorama_width = 1024

    def __init__(
        self,
        variant: str = "id",
        seed: int = 0,
        verify_iter: int = 2,
        *,
        data: str | Path | World | None = None,
        split: str = "train",
        turns: int = 7,
        city: str | None = None,
        differences: Sequence[str] | None = None,
        go_on: bool = False,
        points_per_leg: int = 4,
        drop: float = 0.5,
        fields: Sequence[str] = STREET_FIELDS,
    ):
        if variant not in self.rules:
            raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(self.rules)}")
        limits = ((verify_iter, 1, 10**6), (turns, 1, 7), (points_per_leg, 0, 100))
        if (
            not all(isinstance(n, int) and low <= n <= high for n, low, high in limits)
            or not isinstance(drop, (int, float))
            or not 0 <= drop <= 1
        ):
            raise ValueError(
                "verify_iter must be an integer from 1, turns one from 1 to 7, points_per_leg one from 0 to 100, and drop a number from 0 to 1"
            )
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
        city, differences = (
            city or ("others" if variant == "visual" else _NEW_YORK.name),
            tuple(DIFFERENCES if differences is None else differences),
        )
        if city not in (*CITIES, "others"):
            raise ValueError(f"unknown city {city!r}: choose from {', '.join(CITIES)}, others")
        if unknown := [group for group in differences if group not in DIFFERENCES]:
            raise ValueError(f"unknown difference {unknown[0]!r}: choose from {', '.join(DIFFERENCES)}")
        if not isinstance(data, (str, Path, World, type(None))):
            raise ValueError(f"data must be a folder, not {_line(data)}")
        if len(set(fields)) != len(STREET_FIELDS):
            raise ValueError(f"fields must be {len(STREET_FIELDS)} different names, not {fields!r}")
        self.variant, self.verify_iter, self.go_on, self.fields = variant, verify_iter, go_on, tuple(fields)
        self.points_per_leg, self.drop = points_per_leg, drop
        self.built_in = {
            "split": split,
            "turns": turns,
            "cities": TEST_CITIES if city == "others" else (city,),
            "differences": differences,
        }
        if data is None:
            data = built_in_world(**self.built_in, width=self.panorama_width)
        self.world = data if isinstance(data, World) else load_world(data, pictures=isinstance(self, VIRLVL))
        self.random = random.Random(seed)
        self.waypoints: list[Waypoint] = []

    @property
    def decisions(self) -> int:
        """How many right replies finish the episode."""
        return len(self.waypoints)

    @property
    def image(self) -> Image.Image | None:
        """What is seen at the current waypoint, None in words."""
        return self.picture() if self.picture else None

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[Observation, dict]:
        """Starts a route drawn at random, or number `options["route"]`. A seed restarts the generator; None goes on with it."""
        if seed is not None:
            self.random.seed(seed)
        number, routes = (options or {}).get("route"), self.world.routes
        if number is None:
            number = self.random.randrange(len(routes))
        elif isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(routes):
            raise ValueError(f"route must be a number from 0 to {len(routes) - 1}, not {number!r}")
        self.sentences, self.waypoints = self._plan(number)
        self.number = number
        self.at = self.judged = self.told = (
            0  # the current waypoint, replies judged there, the waypoint of the last reply
        )
        self.failed, self.done = False, (False, False)
        self.verdict: Verdict | None = None
        words = ", ".join(self.rules[self.variant])
        text = STREET_PROMPT.substitute(
            route=" ".join(f"{i}. {sentence}" for i, sentence in enumerate(self.sentences, 1)),
            words=words,
            report=self.report,
            observation=self._seen(),
            **{f"field_{name.split()[-1]}": own for name, own in zip(STREET_FIELDS, self.fields)},
        )
        self.messages: list[dict[str, Any]] = []
        self._tell(text, arrived=True)
        return self._observation(), self._info()

    def _tell(self, text: str, arrived: bool) -> None:
        """A message to the model; `arrived` at a waypoint, or still where it was."""
        self.messages.append({"role": "user", "content": text})

    def _plan(self, number: int) -> tuple[list[str], list[Waypoint]]:
        """The instruction's sentences and the waypoints of a route, by the released data's rules: at the
        start and at every turning point the expert turns, however little, and between them it goes on."""
        route = self.world.routes[number]
        heading = self.random.randrange(360) if route.heading is None else route.heading
        at, seen, intersection = self._standing(route.start, number), NOTHING, False
        sentences: list[str] = []
        waypoints: list[Waypoint] = []
        for k, leg in enumerate(route.legs):
            relative, last = relative_word(leg.heading - heading), k == len(route.legs) - 1
            sentences.append(f"Turn {relative} to face {leg.compass}.")
            action = f"turn_direction({leg.compass if self.rules[self.variant] is COMPASS else relative})"
            waypoints.append(Waypoint(at, heading, seen, intersection, sentences[-1], action))
            end, place = (
                self._standing(leg.end, number),
                leg.landmark[:1].lower() + leg.landmark[1:] if last else leg.landmark,
            )
            goal = ("the destination" if last else "an intersection") + (
                "" if leg.landmark == NOTHING else f": {place}"
            )
            sentences.append(f"Move forward to {goal}.")
            for between in self._between(at, end):
                waypoints.append(Waypoint(between, leg.heading, NOTHING, False, sentences[-1], "forward()"))
            at, heading, seen, intersection = end, leg.heading, leg.landmark, not last
        waypoints.append(Waypoint(at, heading, seen, False, sentences[-1], "stop()"))
        return sentences, waypoints

    def _standing(self, place: Geocode, number: int) -> Geocode:
        near = self.world.panoramas.nearest(place)
        if near is None:
            raise ValueError(
                f"route {number}: gps_pano_mapping.pkl has no panorama within {NEAR:.0f} m of {place[0]:.6f}, {place[1]:.6f}"
            )
        return near

    def _between(self, a: Geocode, b: Geocode) -> list[Geocode]:
        """Some of the points of a leg, moved to the nearest panorama."""
        found: list[Geocode] = []
        if distance(a, b) > 5:
            for k in range(1, self.points_per_leg + 1):
                share = k / (self.points_per_leg + 1)
                if self.random.random() < 1 - self.drop:
                    near = self.world.panoramas.nearest(
                        (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share)
                    )
                    if near is None or near in self.world.lost or near in found:
                        continue
                    if min(distance(near, a), distance(near, b)) > 8:
                        found.append(near)
        return found

    def _seen(self) -> str:
        """What the model is told of the current waypoint."""
        return f"You see: {self.waypoints[self.at].observation}."

    def step(self, reply: str) -> tuple[Observation, float, bool, bool, dict]:
        """Judges one reply: observation, reward, terminated (every action found within its budget), truncated
        (the route ended otherwise), info. Takes any string. After the end of an episode nothing is judged any
        more: the reward is 0 and nothing changes."""
        if not self.waypoints:
            raise RuntimeError("call reset() before step()")
        if any(self.done):
            return self._observation(), 0.0, *self.done, self._info()
        self.verdict = judge_step(reply, self.waypoints[self.at], self.fields)
        self.judged += 1
        right = self.verdict.verdict == "correct"
        used_up = not right and self.judged >= self.verify_iter
        self.failed |= used_up
        self.told = self.at
        if right or used_up:
            self.at, self.judged = self.at + 1, 0
        ended = self.at == len(self.waypoints) or used_up and not self.go_on
        self.done = (ended and not self.failed, ended and self.failed)
        self.messages.append({"role": "assistant", "content": reply})
        if not ended:
            heard = "" if right else self.verdict.feedback
            next_step = (
                "Try again."
                if not (right or used_up)
                else self._seen()
                if right
                else f"You are led on. {self._seen()}"
            )
            self._tell(f"{heard} {next_step}".strip(), arrived=right or used_up)
        reward = self.rewards[self.verdict.verdict] + (BUDGET_PENALTY if used_up else 0.0)
        return self._observation(), reward, *self.done, self._info()

    def _observation(self) -> Observation:
        return Observation(copy.deepcopy(self.messages), self.picture)

    def _info(self) -> dict:
        verdict, feedback, recognized = self.verdict or (None, None, None)
        return {
            "route": self.number,
            "waypoint": self.told,
            "actions": [w.action for w in self.waypoints],
            "verdict": verdict,
            "feedback": feedback,
            "recognized": recognized,
            "landmark": self.waypoints[self.told].landmark != NOTHING,
        }

    def _reply(self, action: str) -> str:
        now = self.waypoints[min(self.at, len(self.waypoints) - 1)]
        return json.dumps(dict(zip(self.fields, (now.observation, now.sentence, action))), ensure_ascii=False)

    def expert_reply(self) -> str:
        """A reply that the verifier accepts now."""
        if not self.waypoints:
            raise RuntimeError("call reset() before expert_reply()")
        return self._reply(self.waypoints[min(self.at, len(self.waypoints) - 1)].action)

    def careless_reply(self) -> str:
        """The expert's reply, but at the destination it walks on."""
        return self._reply("forward()") if self.at == len(self.waypoints) - 1 else self.expert_reply()

    def wrong_reply(self) -> str:
        """The right report with another action."""
        right = self.waypoints[min(self.at, len(self.waypoints) - 1)].action
        actions = ["forward()", "stop()", *(f"turn_direction({word})" for word in self.rules[self.variant])]
        return self._reply(self.random.choice([action for action in actions if action != right]))


def judge_step(reply: str, waypoint: Waypoint, fields: Sequence[str] = STREET_FIELDS) -> Verdict:
    """One verdict per reply, by its action: the expert's is right, whatever the report. A wrong one is worse
    if the report claims an intersection, in any of the usual words, that is not there or leaves out one that
    is. Whether it names the landmark and its side is measured, not judged."""
    parsed = parse_reply(reply, fields)
    report, _, action = [parsed[f] for f in fields] if parsed else (None, None, None)
    if not isinstance(action, str):
        return Verdict("unparsed", "The answer is not in the form asked for.", False)
    report = report[:1000] if isinstance(report, str) else ""  # a landmark has up to 300 characters
    landmark = _landmark(waypoint.landmark)
    claims, rest = (False, report) if _landmark(report) == landmark else _intersection(report)
    recognized = _landmark(rest) == landmark
    words = " ".join(re.sub("['\"]", "", action.lower()).split())
    if re.sub(r" ?([()]) ?", r"\1", words) == waypoint.action:
        return Verdict("correct", "Correct.", recognized)
    if claims == waypoint.intersection:
        return Verdict("wrong_action", "That action is wrong here.", recognized)
    truth = f"there is {'an' if waypoint.intersection else 'no'} intersection here"
    return Verdict("wrong_observation", f"That action is wrong: {truth}.", recognized)


_JOIN = re.compile(r"((?:\s{0,3}(?:[;.,:!?\n]|\b(?:and|but|with|where)\b))+)", re.IGNORECASE)  # two clauses
# What leads to the word, and what may follow it: "Intersection Cafe is on your left" is a name.
_INTERSECTION = re.compile(
    r"(?:\b(?:i|you|we|it|there|this|at)\b.{0,40}?|\b(?:an?|the)\b(?:\s[\w-]{1,20}){0,2}"
    r"|^(?:\W*(?:[\w-]{1,20}[ -]way|T))?)"
    r"\s*\bintersections?\b(?:\s+(?:here|ahead|nearby|of|at|in|is|lies|observed|detected|seen)\b(?!.*\bon\s+(?:your|my)\b).*)?\W*$",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"(?:\b(?:no|not|never|any|without|or|nor|neither|cannot)\b|n['’]t\b)(?!.*\blandmark)", re.IGNORECASE
)


def _intersection(report: str) -> tuple[bool, str]:
    """Whether a report claims an intersection, as "X is on my left; I observe an intersection" does (paper,
    appendix), and what else it says."""
    parts = _JOIN.split(report)
    for k, clause in enumerate(parts):
        said = _INTERSECTION.search(clause)
        if said and not _NEGATION.search(clause[: said.end()]):
            parts[k] = clause[: said.start()]
            if not _letters(parts[k]):  # all that the clause says: it goes with what joins it to another
                del parts[max(k - 1, 0) : max(k - 1, 0) + 2]
            rest = "".join(parts)
            return True, rest if _letters(rest) else NOTHING
    return False, report


@lru_cache(maxsize=4096)  # a city's routes name the same few landmarks ten thousand times
def _landmark(report: str) -> str:
    """The letters of what a report says of landmarks, without what may be said in several ways."""
    letters = _letters(re.sub(r"\bmy\b", "your", report, flags=re.IGNORECASE))
    return letters.replace("nolandmarknearby", "nolandmarksnearby").removeprefix("thedestination") or letters


def _letters(text: str) -> str:
    """Letters with their marks and digits alone, in lower case."""
    return "".join(
        c
        for c in unicodedata.normalize("NFC", text.lower())
        if c.isalnum() or unicodedata.category(c)[0] == "M"
    )


class VIRLVL(VIRL):
    """The same walk in pictures: of each waypoint one picture of four street views (paper, section 3.2), and no word of what it shows. The
    message of the current waypoint holds the picture; those of earlier ones have lost theirs.

    Args, beside those of VIRL:
        variant: also "visual": the training rule in other cities.
        view_layout: of the views, a key of VIEW_LAYOUTS.
        view_size: of each view, in pixels.
        panorama_width: of the built-in cities' panoramas, in pixels.
        tell_intersections: whether the model is told that it stands at one (paper, appendix).
    """

    rules = VIRL.rules | {"visual": COMPASS}
    report = f' Report a landmark of the route as "NAME is on your left" (right, left behind, right behind), none as "{NOTHING}".'

    def __init__(
        self,
        variant: str = "id",
        seed: int = 0,
        verify_iter: int = 2,
        *,
        view_layout: str = "compass",
        view_size: int = 300,
        panorama_width: int = 1024,
        tell_intersections: bool = True,
        **options,
    ):
        if view_layout not in VIEW_LAYOUTS:
            raise ValueError(f"unknown view_layout {view_layout!r}: choose from {', '.join(VIEW_LAYOUTS)}")
        if not isinstance(view_size, int) or not 16 <= view_size <= 2048:
            raise ValueError("view_size must be an integer from 16 to 2048")
        if not isinstance(panorama_width, int) or not 64 <= panorama_width <= 8192:
            raise ValueError("panorama_width must be an integer from 64 to 8192")
        self.view_layout, self.view_size, self.tell_intersections, self.panorama_width = (
            view_layout,
            view_size,
            tell_intersections,
            panorama_width,
        )
        super().__init__(variant, seed, verify_iter, **options)
        if self.world.picture is None:
            raise ValueError("the routes have no panoramas")

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[Observation, dict]:
        """As in VIRL. Raises ValueError if the first picture cannot be read."""
        observation, info = super().reset(seed, options)
        observation.picture()
        return observation, info

    def _seen(self) -> str:
        told = self.tell_intersections and self.waypoints[self.at].intersection
        return "You are at an intersection." if told else "You see the picture."

    def _tell(self, text: str, arrived: bool) -> None:
        super()._tell(text, arrived)
        if arrived:
            for message in self.messages:
                if not isinstance(message["content"], str):
                    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
                    message["content"] = "".join(texts)
            self.messages[-1]["content"] = [{"type": "image"}, {"type": "text", "text": text}]
            self.picture = cache(partial(self._look, self.number, self.waypoints[self.at]))

    def _look(self, number: int, here: Waypoint) -> Image.Image:
        """The picture of a waypoint of route `number`."""
        try:
            panorama, rotation = self.world.picture(here.place)
        except ValueError as error:
            raise ValueError(f"route {number}: {error}") from None
        return look_around(panorama, rotation, here.heading, self.view_size, self.view_layout)


# ---------------------------------------------------------------------------------------------------------------- tasks by name

Environment = GeneralPoints | VIRL
TASKS: dict[str, type[Environment]] = {
    "gp-l": GeneralPoints,
    "gp-vl": GeneralPointsVL,
    "virl-l": VIRL,
    "virl-vl": VIRLVL,
}


def make(
    task: str, variant: str = "id", seed: int = 0, verify_iter: int | None = None, **options
) -> Environment:
    """An environment of `task`, one of TASKS; `options` go to its class, `verify_iter` None takes the class's default. Raises ValueError
    for an unknown task or option."""
    if task not in list(TASKS):
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    known = [
        name
        for cls in TASKS[task].__mro__[:-1]
        for name, p in inspect.signature(cls).parameters.items()
        if p.kind != p.VAR_KEYWORD
    ]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"task {task!r} has no option {unknown[0]!r}: choose from {', '.join(known)}")
    if verify_iter is not None:
        options["verify_iter"] = verify_iter
    return TASKS[task](variant, seed, **options)


# ------------------------------------------------------------------------------------------------------- playing an episode


@dataclass
class Turn:
    """One reply and what the verifier made of it; on a route, at which waypoint."""

    reply: str
    reward: float
    verdict: str
    feedback: str  # what the model read next; after the last reply the verifier's words alone
    recognized: bool
    waypoint: int = 0
    landmark: bool = True  # there was something to recognize: cards, or a landmark


@dataclass
class Episode:
    """One conversation. `prompt` is the first user message, `asked` what decides the episode: the dealt ranks, or a route's expert actions."""

    prompt: str
    asked: list[str]
    turns: list[Turn] = field(default_factory=list)
    success: bool = False

    def most_tries(self) -> int:
        """Replies to a hand, or at the waypoint that took most."""
        return max(Counter(turn.waypoint for turn in self.turns).values())

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
) -> list[Episode]:
    """Plays one episode in every environment, in lockstep.

    `respond(indices, observations)` is given the environments that still run, by index, and what each one shows, and returns
    one reply each: a model that samples a batch, or a script; None breaks the episode off, without success. `seeds` restart the environments' generators, `options` go to `reset`.
    """
    starts = [
        env.reset(seeds[i] if seeds else None, options[i] if options else None)
        for i, env in enumerate(environments)
    ]
    observations = [observation for observation, _ in starts]
    episodes = [
        Episode(text_of(o.messages[0]["content"]), info["actions"] if "actions" in info else info["cards"])
        for o, info in starts
    ]
    running = list(range(len(environments)))
    while running:
        replies = respond(running, [observations[i] for i in running])
        still = []
        for i, reply in zip(running, replies, strict=True):
            if reply is None:
                continue
            observations[i], reward, terminated, truncated, info = environments[i].step(reply)
            goes_on = not (terminated or truncated)
            read = text_of(observations[i].messages[-1]["content"]) if goes_on else info["feedback"]
            episodes[i].turns.append(
                Turn(
                    reply,
                    reward,
                    info["verdict"],
                    read,
                    info["recognized"],
                    info.get("waypoint", 0),
                    info.get("landmark", True),
                )
            )
            episodes[i].success = terminated
            if goes_on:
                still.append(i)
        running = still
    return episodes


def demonstration(env: Environment, wrong_turns: int = 0, author: Callable[[Any], str] | None = None) -> dict:
    """One SFT record in the released format: at each waypoint of a route, or once for a hand of cards, `wrong_turns` wrong replies with the
    verifier's feedback, then the expert's.

    An `author` writes the last reply in the expert's place; a visual task adds the picture as "image". On a walk with pictures the record
    ends at a waypoint drawn at random, whose picture it shows. Raises ValueError if the budget ends before the last reply.
    """
    if wrong_turns >= env.verify_iter:
        raise ValueError(f"{wrong_turns} wrong turns leave no reply in a budget of {env.verify_iter}")
    env.reset()
    last = _last_decision(env)
    for k in range(last + 1):
        for _ in range(wrong_turns):
            env.step(env.wrong_reply())
        reply = author(env) if author else env.expert_reply()
        if k < last:
            env.step(reply)
    return _record(env, reply)


def _last_decision(env: Environment) -> int:
    """Where a record ends: with the episode, or on a walk with pictures at any waypoint, for a record has one picture."""
    return env.random.randrange(env.decisions) if isinstance(env, VIRLVL) else env.decisions - 1


def _record(env: Environment, reply: str) -> dict:
    """The conversation so far and one more reply, in the released format."""
    speaker = {"user": "human", "assistant": "gpt"}
    messages = [*env.messages, {"role": "assistant", "content": reply}]
    image = {"image": env.image} if env.image else {}
    return image | {
        "conversations": [{"from": speaker[m["role"]], "value": text_of(m["content"])} for m in messages]
    }


def foundation_walk(
    rng: random.Random, turns: int, points_per_leg: int, cities: Sequence[str] = ("new york",), **pictures
) -> dict:
    """One walk of the corpus of the tiny "foundation model", by either rule, in a form whose fields the prompt names and which is never the
    task's own. It leads through streets that no study uses: one of 20 cities, or of 4 if it is walked in `pictures` (options of VIRLVL), with the
    names and looks of one of `cities`; ANYWHERE has made-up ones."""
    seed, city, width = (
        rng.randint(1, 4 if pictures else 20),
        rng.choice(cities),
        pictures.get("panorama_width", 1024),
    )
    cls = VIRLVL if pictures else VIRL
    return imperfect_demonstration(
        cls(
            rng.choice(("id", "rule")),
            rng.getrandbits(32),
            verify_iter=5,
            data=built_in_world("train", turns, seed, 200, (city,), width=width),
            points_per_leg=points_per_leg,
            fields=rng.sample(_FIELD_WORDS, 3),
            **pictures,
        )
    )


def imperfect_demonstration(env: Environment) -> dict:
    """A demonstration as text in the wild has them, from which post-training can learn better under any rule.

    A quarter are revisions, after one, two or four wrong tries (as the budget allows). One in ten of the last answers is wrong too; half of
    them, where the cards are told in words, come from people who multiply with an "x". A model that learned from these is unsure, knows
    how to try again, and has a bad habit. On a route one reply in five is wrong, and six walkers in ten do not stop at the destination; they
    are told so and try again, or the record ends.
    """
    if isinstance(env, VIRL):
        env.reset()
        last, careless = _last_decision(env), env.random.random() < 0.6
        while True:
            reply = (
                env.wrong_reply()
                if env.random.random() < 0.2
                else env.careless_reply()
                if careless
                else env.expert_reply()
            )
            wrong = judge_step(reply, env.waypoints[env.at], env.fields).verdict != "correct"
            last_try = env.judged + 1 == env.verify_iter
            if wrong and last_try or env.at == last and (not wrong or env.random.random() < 0.5):
                return _record(env, reply)
            env.step(reply)
    wrong_turns = min(env.random.choices((0, 1, 2, 4), (75, 12, 8, 5))[0], env.verify_iter - 1)
    cls, careless = type(env), 0 if isinstance(env, GeneralPointsVL) else 50
    author = env.random.choices(
        (cls.wrong_reply, cls.careless_reply, cls.expert_reply), (10, careless, 90 - careless)
    )[0]
    return demonstration(env, wrong_turns, author)


_FIELD_WORDS = (
    "hand",
    "deck",
    "dealt",
    "draw",
    "table",
    "values",
    "counts",
    "worth",
    "points",
    "digits",
    "solution",
    "equation",
    "answer",
    "result",
    "expression",
    "sum",
)


def foundation_record(rng: random.Random, pictures: dict | None = None) -> dict:
    """One record of the corpus of the tiny "foundation model": what such a model has seen before any post-training.

    Rules are mixed (15% tens, 60% 11/12/13, 25% any values), so that reading the rule pays; the reply has three fields whose
    names the prompt draws at random and never the task's own, so that the form must still be learned; the demonstrations are imperfect.
    With `pictures` (options of GeneralPointsVL) the cards are shown, on RED_SHARE of the pictures in red.
    """
    kind = rng.choices(("id", "rule", "any"), (15, 60, 25))[0]
    faces = {face: rng.randint(1, 13) for face in "JQK"} if kind == "any" else FACE_RULES[kind]
    options = {"seed": rng.getrandbits(32), "faces": faces, "fields": rng.sample(_FIELD_WORDS, 3)}
    if pictures is None:
        return imperfect_demonstration(GeneralPoints(**options))
    return imperfect_demonstration(GeneralPointsVL(**options, color=_color(rng), **pictures))


RED_SHARE = 0.05  # of the corpus's pictures: the foundation model has seen more black cards than red ones, and reads them better


def _color(rng: random.Random) -> str:
    return "red" if rng.random() < RED_SHARE else "black"


def reading_record(
    rng: random.Random, size: tuple[int, int], font_size: float, jitter: float, color: str | None = None
) -> dict:
    """A picture of four cards, any ranks, and their names: how the foundation model learned to read cards. `color` None: as in the corpus."""
    ranks, suits = rng.choices(RANKS, k=4), rng.choices(COLORS[color or _color(rng)], k=4)
    turns = [
        {"from": "human", "value": "<image>Name the cards."},
        {"from": "gpt", "value": json.dumps(ranks)},
    ]
    return {"image": draw_hand(ranks, suits, size, jitter, font_size, rng), "conversations": turns}
