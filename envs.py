"""Environments: GeneralPoints, its prompt, its pictures, its solver, its verifier, and how an episode is played.

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
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

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
REWARDS = {"correct": 5.0, "wrong_value": -1.0, "wrong_numbers": -2.0, "illegal": -3.0, "misread": -1.5, "unparsed": -3.0}
BUDGET_PENALTY = -1.0  # added to the last verdict's reward when the verification budget is used up without success
MAX_REPLY, MAX_FORMULA, MAX_BRACKETS = 20_000, 200, 20  # characters, characters, pairs: more is no answer, and judging stays fast

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
    return Expression(value, kind, first, second, join.join(texts[0]) + "".join(inverse + t for t in texts[1]))


def _combine(x: Expression, op: str, y: Expression) -> Expression | None:
    """x op y in normal form; None for a division by zero."""
    kind = "+" if op in "+-" else "*"
    (x1, x2), (y1, y2) = ((e.first, e.second) if e.kind == kind else ((e,), ()) for e in (x, y))
    if op in "-/":
        y1, y2 = y2, y1
    if op == "/" and not y.value:
        return None
    value = {"+": x.value.__add__, "-": x.value.__sub__, "*": x.value.__mul__, "/": x.value.__truediv__}[op](y.value)
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
                for a, op, b in [(x, op, y) for op in operators] + [(y, op, x) for op in operators if op in "-/"]:
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


_REPLY_TOKEN = re.compile(r"""\s*(?:("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|([{}\[\]:,])|([^\s{}\[\]:,"']+))""", re.DOTALL)


def parse_reply(reply: str, required: Sequence[str] = FIELDS) -> dict[str, Any] | None:
    """The last object in `reply` that has all `required` keys, or None: what stands before it is thought.

    Accepts strict JSON and the JSON-like form of the released data: single quotes, bare words, trailing commas. Values are strings,
    integers, None, lists and objects.
    """
    if len(reply) > MAX_REPLY:
        return None
    reader, found, start = _Reader(reply), None, reply.find("{")
    while start >= 0:
        end = start + 1
        try:
            value, end = reader.value(start)
            if isinstance(value, dict) and all(key in value for key in required):
                found = value
        except OverflowError:
            break
        except ValueError:
            pass
        start = reply.find("{", end)
    return found


class _Reader:
    """A recursive-descent reader of JSON-like text. Its effort is bounded, whatever the text and however often it starts anew."""

    MAX_DEPTH = 8

    def __init__(self, text: str):
        self.text, self.effort = text, 60_000  # 20 a token and 1 a character; a reply in form takes about 1,000

    def token(self, at: int) -> tuple[str, Any, int]:
        """Kind ("value" or the punctuation itself), value, and the position after the token."""
        match = _REPLY_TOKEN.match(self.text, at)
        self.effort -= 20 + (match.end() if match else len(self.text)) - at
        if self.effort < 0:
            raise OverflowError("too much to read")
        if not match:
            raise ValueError("end of text or an open quote")
        quoted, mark, word = match.groups()
        if mark:
            return mark, mark, match.end()
        if quoted is None:
            return "value", int(word) if re.fullmatch("-?[0-9]{1,6}", word) else None if word in ("null", "None") else word, match.end()
        try:
            return "value", json.loads(quoted if quoted[0] == '"' else '"' + quoted[1:-1].replace('"', '\\"') + '"'), match.end()
        except ValueError:  # an escape that JSON does not know: the characters as they stand
            return "value", quoted[1:-1], match.end()

    def value(self, at: int, depth: int = 0) -> tuple[Any, int]:
        """The value that starts at `at`, and the position after it."""
        kind, value, at = self.token(at)
        if kind == "value":
            return value, at
        if kind not in "[{" or depth == self.MAX_DEPTH:
            raise ValueError("not a value")
        close, items = {"[": "]", "{": "}"}[kind], []
        after, _, end = self.token(at)
        while after != close:
            item, at = self.value(at, depth + 1)
            if kind == "{":
                colon, _, at = self.token(at)
                if colon != ":" or not isinstance(item, str):
                    raise ValueError("a key and a colon are missing")
                value, at = self.value(at, depth + 1)
                item = (item, value)
            items.append(item)
            after, _, end = self.token(at)
            if after == ",":
                at = end
                after, _, end = self.token(at)
            elif after != close:
                raise ValueError("a comma is missing")
        return (dict(items) if kind == "{" else items), end


class Verdict(NamedTuple):
    """The verifier's judgement of one reply."""

    verdict: str  # a key of REWARDS
    feedback: str
    recognized: bool  # the reply was parsed and its `cards` field names the dealt cards


def judge(reply: str, cards: Sequence[str], numbers: Sequence[int], target: int, fields: Sequence[str] = FIELDS) -> Verdict:
    """One verdict per reply, by the first test that fails: form, cards, equation, numbers, value.

    `cards` are the dealt rank names, `numbers` what they count under the rule in force. The order goes from the fault that
    makes all later tests meaningless to the mildest, so that penalties never add up.
    """
    parsed = parse_reply(reply, fields)
    named, stated, formula = [parsed[f] for f in fields] if parsed else (None, None, None)
    if not (isinstance(named, list) and isinstance(stated, list) and isinstance(formula, str)):
        return Verdict("unparsed", "The answer is not in the form asked for. Try again.", False)
    if Counter(str(card).strip().upper() for card in named) != Counter(cards):
        return Verdict("misread", "These are not the cards on the table. Try again.", False)
    try:
        value, right, used = evaluate_formula(formula)
    except Illegal as reason:
        return Verdict("illegal", f"The formula is not a legal equation: {reason}. Try again.", True)
    have = Counter(numbers)
    if value == target and right not in (None, target):
        return Verdict("illegal", "The formula is not a legal equation: its two sides differ. Try again.", True)
    for count in (Counter(str(n).strip() for n in stated), Counter(str(n) for n in used)):
        extra = count - Counter({str(n): k for n, k in have.items()})
        if extra:
            return Verdict("wrong_numbers", f"There is no {_short(next(iter(extra)))} left to use. Try again.", True)
        if count.total() < have.total():
            return Verdict("wrong_numbers", "A number was left out. Try again.", True)
    if value != target:
        return Verdict("wrong_value", f"The formula gives {_short(str(value))}, not {target}. Try again.", True)
    return Verdict("correct", "Correct.", True)


def _short(text: str) -> str:
    """A number that a model wrote, if it is one and short; the verifier repeats nothing else of what it was told."""
    return text if re.fullmatch("-?[0-9]{1,10}(/[0-9]{1,10})?", text) else "such number"


# ------------------------------------------------------------------------------------------------------------- the pictures

TABLE, PAPER, GOLD, SKIN = (31, 107, 66), (252, 251, 246), (226, 178, 60), (240, 208, 176)  # RGB
INK = {"spades": (20, 20, 24), "clubs": (20, 20, 24), "hearts": (226, 78, 78), "diamonds": (226, 78, 78)}
# Rows of the marks on a number card, from 0 (top) to 6, in the two outer columns and in the middle one.
PIPS = {"2": ((), (0, 6)), "3": ((), (0, 3, 6)), "4": ((0, 6), ()), "5": ((0, 6), (3,)), "6": ((0, 3, 6), ()), "7": ((0, 3, 6), (1.5,)),
        "8": ((0, 3, 6), (1.5, 4.5)), "9": ((0, 2, 4, 6), (3,)), "10": ((0, 2, 4, 6), (1, 5))}  # fmt: skip


class _Pen:
    """Draws shapes given in units of `size` pixels around the point (x, y)."""

    def __init__(self, picture: Image.Image, x: float, y: float, size: float):
        self.draw, self.x, self.y, self.size = ImageDraw.Draw(picture), x, y, size

    def _at(self, *points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(self.x + a * self.size, self.y + b * self.size) for a, b in points]

    def disc(self, a: float, b: float, r: float, color: tuple) -> None:
        self.draw.ellipse([c for point in self._at((a - r, b - r), (a + r, b + r)) for c in point], fill=color)

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
        pen.disc(0, -0.26, 0.22, ink), pen.disc(-0.26, 0.08, 0.22, ink), pen.disc(0.26, 0.08, 0.22, ink), pen.disc(0, 0, 0.12, ink)
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
        pen.polygon(GOLD, (-0.26, -0.12), (-0.34, -0.42), (-0.12, -0.26), (0, -0.46), (0.12, -0.26), (0.34, -0.42), (0.26, -0.12))
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
    ImageDraw.Draw(glyph).text((-left, -top), rank, font=font, fill=INK[suit], stroke_width=weight, stroke_fill=INK[suit])
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
            _suit(_Pen(picture, w * (0.5 + 0.16 * sign * column), h * (0.5 + 0.64 * sign * (row / 6 - 0.5)), 0.14 * h), suit)
        card.alpha_composite(half.rotate(180))
    elif rank in "JQK":
        ImageDraw.Draw(card).rectangle([0.24 * w, 0.18 * h, 0.76 * w, 0.775 * h], outline=ink, width=max(1, h // 120))
        _figure(_Pen(card, w / 2, 0.52 * h, 0.42 * h), rank, ink)
    else:
        _suit(_Pen(card, w / 2, h / 2, (0.3 if font_size <= 0.22 else 0.2) * h), suit)
    card.alpha_composite(corner.rotate(180))
    paper = Image.new("RGBA", (w, h))
    ImageDraw.Draw(paper).rounded_rectangle([0, 0, w - 1, h - 1], h // 14, fill=PAPER, outline=(90, 90, 90), width=max(1, h // 150))
    paper.alpha_composite(card)
    return paper.resize((round(w / 4), height), Image.LANCZOS)


def draw_hand(ranks: Sequence[str], suits: Sequence[str], size: tuple[int, int], jitter: float, font_size: float,
              rng: random.Random) -> Image.Image:  # fmt: skip
    """Cards side by side on a green table, `size` = (width, height) in pixels. `jitter` from 0 to 1 moves, turns (at most 12 degrees)
    and scales (at most 10%) each card at random; every card stays in its own part of the table."""
    picture, slot = Image.new("RGB", size, TABLE), size[0] / len(ranks)
    tall = min(0.94 * size[1], 0.94 * slot * 7 / 5) * (1 - 0.25 * jitter)
    for i, (rank, suit) in enumerate(zip(ranks, suits, strict=True)):
        grow, turn, right, down = (jitter * rng.uniform(-1, 1) for _ in range(4))
        card = draw_card(rank, suit, max(8, round(tall * (1 + 0.1 * grow))), font_size)
        if turn:
            card = card.rotate(12 * turn, Image.BICUBIC, expand=True)
        place = (round(slot * i + (slot - card.width) / 2 * (1 + 0.8 * right)), round((size[1] - card.height) / 2 * (1 + 0.8 * down)))
        picture.paste(card, place, card)
    return picture


# ----------------------------------------------------------------------------------------------------------- the environment


@dataclass(frozen=True)
class Observation:
    """What the model is given: the whole episode so far as chat messages, and the picture (None in text-only tasks). With a picture
    the first message's content is a list of parts, and the part of type "image" marks its place."""

    messages: list[dict[str, Any]]
    image: Image.Image | None = None


def text_of(content: str | list[dict]) -> str:
    """A message's content as text, `<image>` at the place of a picture, as the released data writes it."""
    return content if isinstance(content, str) else "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


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
        replacement: deal with replacement, as the paper's released code does.
        prompt: text with the placeholders $target $operators $cards $rule $field_cards $field_number $field_formula.
        fields: the names of the three fields of a reply.

    Raises ValueError for a wrong argument.
    """

    rules = FACE_RULES  # what J, Q and K count, by variant
    suits: tuple[str, ...] = SUITS  # in the deck
    image: Image.Image | None = None  # of the hand, in visual tasks

    def __init__(self, variant: str = "id", seed: int = 0, verify_iter: int = 5, *, n_cards: int = 4, target: int = 24,
                 operators: str = OPERATORS, faces: dict[str, int] | None = None, replacement: bool = False,
                 prompt: str | None = None, fields: Sequence[str] = FIELDS):  # fmt: skip
        if variant not in self.rules:
            raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(self.rules)}")
        numbers = (verify_iter, target, n_cards, *(faces or self.rules[variant]).values())
        if not all(isinstance(n, int) and n >= 1 for n in numbers) or n_cards > 6:
            raise ValueError("verify_iter, target and what faces count must be integers from 1, and n_cards from 1 to 6")
        if len(set(fields)) != len(FIELDS):
            raise ValueError(f"fields must be {len(FIELDS)} different names, not {fields!r}")
        if not isinstance(operators, str) or not operators or set(operators) - set(OPERATORS):
            raise ValueError(f"operators must be some of {OPERATORS}, not {operators!r}")
        self.variant, self.verify_iter, self.n_cards, self.target = variant, verify_iter, n_cards, target
        self.operators = "".join(op for op in OPERATORS if op in operators)
        self.faces = dict(faces or self.rules[variant])
        self.replacement, self.fields = replacement, tuple(fields)
        self.template = PROMPT if prompt is None else string.Template(prompt)
        self.random = random.Random(seed)
        self.cards: list[str] = []
        try:
            self._prompt(["A"] * n_cards)
        except (KeyError, ValueError) as error:
            raise ValueError(f"the prompt template has a wrong placeholder: {error}") from None

    def value_of(self, card: str) -> int:
        """What a rank counts under the rule in force."""
        return self.faces.get(card) or (1 if card == "A" else int(card))

    def _prompt(self, cards: Sequence[str]) -> str:
        return self.template.substitute(
            target=self.target, operators=self.operators, cards=self._stated(cards),
            rule=", ".join(f"{face} is {self.faces[face]}" for face in "JQK"),
            **{f"field_{name}": own for name, own in zip(FIELDS, self.fields)})  # fmt: skip

    def _stated(self, cards: Sequence[str]) -> str:
        """What the prompt says of the cards."""
        return ", ".join(cards)

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
        for _ in range(100_000):
            cards = self.random.choices(deck, k=self.n_cards) if self.replacement else self.random.sample(deck, self.n_cards)
            if (self.variant != "rule" or any(card in "JQK" for card in cards)) and self._solutions(cards):
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
        self.verdict = judge(reply, self.cards, self.numbers, self.target, self.fields)
        self.judged += 1
        solved = self.verdict.verdict == "correct"
        self.done = (solved, not solved and self.judged >= self.verify_iter)
        reward = REWARDS[self.verdict.verdict] + (BUDGET_PENALTY if self.done[1] else 0.0)
        self.messages.append({"role": "assistant", "content": reply})
        if not any(self.done):
            self.messages.append({"role": "user", "content": self.verdict.feedback})
        return self._observation(), reward, *self.done, self._info()

    def _observation(self) -> Observation:
        return Observation(copy.deepcopy(self.messages), self.image)

    def _info(self) -> dict:
        verdict, feedback, recognized = self.verdict or (None, None, None)
        return {"cards": list(self.cards), "numbers": list(self.numbers), "verdict": verdict, "feedback": feedback,
                "recognized": recognized}  # fmt: skip

    def reply(self, formula: str, cards: Sequence[str] | None = None) -> str:
        """A reply in the required form that names `cards`, the dealt ones if None, with their numbers and gives `formula`."""
        cards = self.cards if cards is None else cards
        return json.dumps(dict(zip(self.fields, (cards, [self.value_of(card) for card in cards], formula))))

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

    def __init__(self, variant: str = "id", seed: int = 0, verify_iter: int = 5, *, color: str | None = None,
                 size: tuple[int, int] = (1200, 480), jitter: float = 0.3, font_size: float = 0.17, **options):  # fmt: skip
        color = color or ("red" if variant == "visual" else "black")
        if color not in COLORS:
            raise ValueError(f"unknown color {color!r}: choose from {', '.join(COLORS)}")
        if not (len(size) == 2 and all(isinstance(n, int) and 32 <= n <= 4096 for n in size)):
            raise ValueError("size must be two integers from 32 to 4096")
        if not (0 <= jitter <= 1 and 0.05 <= font_size <= 0.5):
            raise ValueError("jitter must lie between 0 and 1, font_size between .05 and .5")
        self.suits, self.size, self.jitter, self.font_size = COLORS[color], tuple(size), jitter, font_size
        super().__init__(variant, seed, verify_iter, **options)

    def _stated(self, cards: Sequence[str]) -> str:
        return "in the picture, from left to right"

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


TASKS = {"gp-l": GeneralPoints, "gp-vl": GeneralPointsVL}


def make(task: str, variant: str = "id", seed: int = 0, verify_iter: int = 5, **options) -> GeneralPoints:
    """An environment of `task`, one of TASKS; `options` go to its class. Raises ValueError for an unknown task or option."""
    if task not in list(TASKS):
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    known = [name for cls in TASKS[task].__mro__[:-1] for name, p in inspect.signature(cls).parameters.items() if p.kind != p.VAR_KEYWORD]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"task {task!r} has no option {unknown[0]!r}: choose from {', '.join(known)}")
    return TASKS[task](variant, seed, verify_iter, **options)


# ------------------------------------------------------------------------------------------------------- playing an episode


@dataclass
class Turn:
    """One reply and what the verifier made of it."""

    reply: str
    reward: float
    verdict: str
    feedback: str
    recognized: bool


@dataclass
class Episode:
    """One conversation. `prompt` is the first user message, `cards` the dealt ranks."""

    prompt: str
    cards: list[str]
    turns: list[Turn] = field(default_factory=list)
    success: bool = False

    def transcript(self) -> dict:
        """The episode to read, as samples.jsonl keeps it."""
        turns = [{"reply": t.reply, "verdict": t.verdict, "reward": t.reward, "feedback": t.feedback} for t in self.turns]
        return {"prompt": self.prompt, "success": self.success, "turns": turns}


def play(environments: Sequence[GeneralPoints], respond: Callable[[list[int], list[Observation]], list[str]],
         seeds: Sequence[int] | None = None) -> list[Episode]:  # fmt: skip
    """Plays one episode in every environment, in lockstep.

    `respond(indices, observations)` is given the environments that still run, by index, and what each one shows, and returns
    one reply each: a model that samples a batch, or a script. `seeds` restart the environments' generators.
    """
    starts = [env.reset(seeds[i] if seeds is not None else None) for i, env in enumerate(environments)]
    observations = [observation for observation, _ in starts]
    episodes = [Episode(text_of(o.messages[0]["content"]), info["cards"]) for o, info in starts]
    running = list(range(len(environments)))
    while running:
        replies = respond(running, [observations[i] for i in running])
        still = []
        for i, reply in zip(running, replies, strict=True):
            observations[i], reward, terminated, truncated, info = environments[i].step(reply)
            episodes[i].turns.append(Turn(reply, reward, info["verdict"], info["feedback"], info["recognized"]))
            episodes[i].success = terminated
            if not (terminated or truncated):
                still.append(i)
        running = still
    return episodes


def demonstration(env: GeneralPoints, wrong_turns: int = 0, author: Callable[[GeneralPoints], str] | None = None) -> dict:
    """One SFT record in the released format: `wrong_turns` wrong replies with the verifier's feedback, then the expert's.

    An `author` writes the last reply in the expert's place; a visual task adds the picture as "image". Raises ValueError if the budget
    ends before the last reply.
    """
    if wrong_turns >= env.verify_iter:
        raise ValueError(f"{wrong_turns} wrong turns leave no reply in a budget of {env.verify_iter}")
    env.reset()
    for _ in range(wrong_turns):
        env.step(env.wrong_reply())
    env.step(author(env) if author else env.expert_reply())
    end = next(i for i in reversed(range(len(env.messages))) if env.messages[i]["role"] == "assistant") + 1
    speaker = {"user": "human", "assistant": "gpt"}
    image = {"image": env.image} if env.image else {}
    return image | {"conversations": [{"from": speaker[m["role"]], "value": text_of(m["content"])} for m in env.messages[:end]]}


def imperfect_demonstration(env: GeneralPoints) -> dict:
    """A demonstration as text in the wild has them, from which post-training can learn better under any rule.

    A quarter are revisions, after one, two or four wrong tries (as the budget allows). One in ten of the last answers is wrong too; half of
    them, where the cards are told in words, come from people who multiply with an "x". A model that learned from these is unsure, knows
    how to try again, and has a bad habit.
    """
    wrong_turns = min(env.random.choices((0, 1, 2, 4), (75, 12, 8, 5))[0], env.verify_iter - 1)
    cls, careless = type(env), 0 if isinstance(env, GeneralPointsVL) else 50
    author = env.random.choices((cls.wrong_reply, cls.careless_reply, cls.expert_reply), (10, careless, 90 - careless))[0]
    return demonstration(env, wrong_turns, author)


_FIELD_WORDS = ("hand", "deck", "dealt", "draw", "table", "values", "counts", "worth", "points", "digits", "solution", "equation",
                "answer", "result", "expression", "sum")  # fmt: skip


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


def reading_record(rng: random.Random, size: tuple[int, int], font_size: float, jitter: float, color: str | None = None) -> dict:
    """A picture of four cards, any ranks, and their names: how the foundation model learned to read cards. `color` None: as in the corpus."""
    ranks, suits = rng.choices(RANKS, k=4), rng.choices(COLORS[color or _color(rng)], k=4)
    turns = [{"from": "human", "value": "<image>Name the cards."}, {"from": "gpt", "value": json.dumps(ranks)}]
    return {"image": draw_hand(ranks, suits, size, jitter, font_size, rng), "conversations": turns}
