"""Cards, streets, solver, verifier, episodes."""

import ast
import copy
import hashlib
import io
import itertools
import json
import math
import pickle
import pickletools
import random
import re
import time
import warnings
from collections import Counter
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image, ImageChops

import envs
import sft

ALL_HANDS = list(itertools.combinations_with_replacement(range(1, 14), 4))


# ---- independent references


def exact(formula: str) -> Fraction:
    """Value of a formula by Python's own parser, in fractions."""

    def value(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        a, b = value(node.left), value(node.right)
        return {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}[
            type(node.op)
        ](b)

    return value(ast.parse(formula, mode="eval").body)


def leaves(formula: str) -> list[int]:
    return sorted(node.value for node in ast.walk(ast.parse(formula)) if isinstance(node, ast.Constant))


@lru_cache(maxsize=None)
def reachable(numbers: tuple) -> frozenset:
    """All values that a multiset can make: take two, put back what one operation makes of them."""
    if len(numbers) == 1:
        return frozenset(numbers)
    out = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for made in [a + b, a - b, a * b] + ([a / b] if b else []):
            out |= reachable(tuple(sorted([*rest, made])))
    return frozenset(out)


def every_formula(numbers):
    """All fully bracketed formulas over the numbers, each used once."""
    if len(numbers) == 1:
        yield str(numbers[0])
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = [numbers[i] for i in chosen]
            right = [numbers[i] for i in range(len(numbers)) if i not in chosen]
            for a, b, op in itertools.product(every_formula(left), every_formula(right), "+-*/"):
                yield f"({a}{op}{b})"


# ---- the solver


def test_solver_agrees_with_brute_force_on_every_hand():
    assert len(ALL_HANDS) == 1820
    for hand in ALL_HANDS:
        can = 24 in reachable(tuple(map(Fraction, hand)))
        assert (envs.solve(hand) is not None) == can, hand


def test_every_solution_is_exact_and_uses_the_hand():
    for hand in ALL_HANDS:
        if formula := envs.solve(hand):
            assert exact(formula) == 24 and leaves(formula) == list(hand)


def flattened(node) -> tuple:
    """A formula as nested chains: ("+", parts added, parts subtracted), ("*", factors, divisors), or a
    number."""
    if isinstance(node, ast.Constant):
        return ("n", node.value)
    kind = "+" if isinstance(node.op, (ast.Add, ast.Sub)) else "*"
    sides = []
    for part in (node.left, node.right):
        part = flattened(part)
        sides.append(part[1:] if part[0] == kind else ([part], []))
    (first, second), (more, less) = sides
    if isinstance(node.op, (ast.Sub, ast.Div)):
        more, less = less, more
    return kind, first + more, second + less


def written(part, within="") -> str:
    """Such chains as text: compound parts before numbers, in the order of their text, numbers from high to
    low."""
    if part[0] == "n":
        return str(part[1])
    join, inverse = ("+", "-") if part[0] == "+" else ("*", "/")

    def key(p):
        return (1, -p[1], "") if p[0] == "n" else (0, 0, written(p))

    first, second = ([written(p, part[0]) for p in sorted(parts, key=key)] for parts in part[1:])
    text = join.join(first) + "".join(inverse + p for p in second)
    return f"({text})" if part[0] == "+" and within == "*" else text


@pytest.mark.parametrize(
    "hand",
    [(1, 3, 4, 6), (2, 4, 6, 8), (3, 5, 7, 9), (1, 2, 11, 12), (1, 5, 5, 5), (2, 3, 10, 13), (4, 4, 7, 7)],
)
def test_the_canonical_formula_is_the_first_of_all_that_brute_force_writes(hand):
    """Fewest divisions, then subtractions, then brackets, then the shortest, then by the alphabet."""
    found = set()
    for formula in every_formula(list(hand)):
        try:
            if exact(formula) == 24:
                found.add(written(flattened(ast.parse(formula, mode="eval").body)))
        except ZeroDivisionError:
            continue
    best = min(found, key=lambda f: (f.count("/"), f.count("-"), f.count("("), len(f), f))
    assert envs.solve(hand) == best


def test_the_canonical_formulas_of_all_hands_are_what_they_were():
    """Demonstrations, and so all that was ever trained, depend on them."""
    said = "\n".join(str(envs.solve(hand)) for hand in ALL_HANDS)
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "4a2cd4e2a6db6d55"
    assert envs.solve((1, 3, 10, 10)) == "10+10+3+1" and envs.solve((3, 3, 7, 7)) == "(3/7+3)*7"


def test_solver_is_fast():
    for cached in (envs.solve, envs._expressions):
        cached.cache_clear()
    start = time.process_time()
    for hand in ALL_HANDS:
        envs.solve(hand)
    assert time.process_time() - start < 10


def test_solver_takes_other_targets_numbers_and_operators():
    assert envs.solve((3, 3, 8, 8)) == "8/(3-8/3)"
    assert envs.solve((2, 3), 6, "*") == "3*2" and envs.solve((2, 3), 6, "+-") is None
    assert envs.solve((24,)) == "24" and envs.solve((23,)) is None
    assert exact(envs.solve((1, 2, 3, 4, 25), 100)) == 100


# ---- the verifier


def judged(reply, cards=("A", "3", "K", "10"), variant="id"):
    env = envs.make("gp-l", variant)
    env.reset(options={"cards": list(cards)})
    return env.step(reply)


def in_pictures(reply, cards=("A", "3", "K", "10")):
    env = envs.make("gp-vl", **SMALL)
    env.reset(options={"cards": list(cards)})
    return env.step(reply)[4]


def reply(formula, cards=("A", "3", "K", "10"), number=(1, 3, 10, 10)):
    return json.dumps({"cards": list(cards), "number": list(number), "formula": formula})


@pytest.mark.parametrize(
    "formula, verdict, words",
    [
        ("10+10+3+1=24", "correct", "Correct"),
        ("10+10+1+3", "correct", "Correct"),
        (" ( 10 + 10 ) + (3*1)  + 1 = 24", "wrong_numbers", "no 1"),
        ("10+10+3-1=24", "wrong_value", "22, not 24"),
        ("10+10+3+1=25", "illegal", "sides"),
        ("10/3+10+1=24", "wrong_value", "43/3"),
        ("10+10+4=24", "wrong_numbers", "no 4"),
        ("10+10+3=24", "wrong_numbers", "left out"),
        ("10+13+1=24", "wrong_numbers", "no 13"),
        ("(10+10+3+1=24", "illegal", "brackets"),
        ("10+10+3+1)=24", "illegal", "brackets"),
        ("10 10+3+1=24", "illegal", "operator"),
        ("10+10+3+=24", "illegal", "number"),
        ("-10+10+3+1=24", "illegal", "number"),
        ("10/(10-10)*3=24", "illegal", "zero"),
        ("10**1+10+3=24", "illegal", "number"),
        ("__import__('os')", "illegal", "something else"),
        ("(" * 30 + "10+10+3+1" + ")" * 30, "illegal", "too many"),
        ("10+10+3+<|end|>", "illegal", "something else"),
        ("10+10+3+1=24=24", "illegal", "equals"),
        ("", "illegal", "number"),
        ("1" * 10_000, "illegal", "long"),
        ("10+10+03+1=24", "illegal", "zero"),
        ("10+10+3+1=024", "illegal", "zero"),
        ("10+10+3+1+0=24", "wrong_numbers", "no 0"),
        ("10+10+3+1=0", "illegal", "sides"),
        ("10+10+3+00+1", "illegal", "begins with a zero"),
        ("10+10+3+1=-24", "illegal", "number is missing"),
        ("10+10+3+1=", "illegal", "number is missing"),
        ("10+10+3+1=24.0", "illegal", "something else"),
        ("10+10+3+1=" + "24-0" * 100, "illegal", "long"),
        # Where the left side misses the target, the right side is not read.
        ("3-10-10-1=-18", "wrong_value", "-18, not 24"),
        ("1-10+10/3=-17/3", "wrong_value", "-17/3, not 24"),
        ("10*3/10-1=2.0", "wrong_value", "2, not 24"),
        ("10+10+3-1=22=24", "wrong_value", "22, not 24"),
        ("10+10+3-1=", "wrong_value", "22, not 24"),
        ("10+10+3-1 = " + "about " * 1000, "wrong_value", "22, not 24"),
        ("10-3=-7", "wrong_numbers", "left out"),
        ("-10+3-10-1=-18", "illegal", "number is missing"),
        ("10÷10×3−1=2", "wrong_value", "2, not 24"),
    ],
)
def test_verdict_of_a_formula(formula, verdict, words):
    _, reward, terminated, _, info = judged(reply(formula))
    assert info["verdict"] == verdict and words in info["feedback"]
    assert reward == envs.GeneralPoints.rewards[verdict] and terminated == (verdict == "correct")


def test_exact_arithmetic_where_floats_fail():
    _, reward, *_ = judged(reply("8/(3-8/3)=24", ("3", "3", "8", "8"), (3, 3, 8, 8)), ("3", "3", "8", "8"))
    assert reward == 5


def test_one_verdict_in_a_fixed_order():
    assert judged("no json")[4]["verdict"] == "unparsed"
    assert judged('{"cards": [], "number": 3, "formula": "1"}')[4]["verdict"] == "unparsed"
    assert judged('{"cards": [], "number": [], "formula": null}')[4]["verdict"] == "unparsed"
    assert in_pictures(reply("(((", cards=("A", "3", "K", "9")))["verdict"] == "misread"
    assert judged(reply("(((", number=(9, 9, 9, 9)))[4]["verdict"] == "illegal"
    assert judged(reply("10+10+3+1=24", number=(1, 3, 13, 10)))[4]["verdict"] == "wrong_numbers"


@pytest.mark.parametrize(
    "cards, named",
    [
        ('["A", "3", "K", "10"]', True),
        ('["A", "3", "K", "9"]', False),
        ("[]", False),
        ('["A", "3", "K", "10", "10"]', False),
        ('"A, 3, K, 10"', False),
        ("null", False),
        ("7", False),
        ('{"A": 1}', False),
        ('["A", "3", "K", ["10"]]', False),
    ],
)
def test_in_words_the_cards_field_is_reported_and_in_pictures_it_is_judged(cards, named):
    text = reply("10+10+3+1=24").replace('["A", "3", "K", "10"]', cards)
    _, reward, terminated, _, info = judged(text)
    assert (info["verdict"], reward, terminated, info["recognized"]) == ("correct", 5, True, named)
    seen = in_pictures(text)
    assert (seen["verdict"], seen["recognized"]) == (("correct", True) if named else ("misread", False))
    without = text.replace('"cards"', '"ranks"')
    assert judged(without)[4]["verdict"] == in_pictures(without)["verdict"] == "unparsed"
    assert not judged(without)[4]["recognized"]


def test_misread_is_a_verdict_of_the_picture_task_alone():
    assert "misread" not in envs.make("gp-l").rewards
    assert envs.make("gp-vl", **SMALL).rewards["misread"] == -1.5


@pytest.mark.parametrize(
    "number, verdict",
    [
        ("[1.0, 3.0, 10.00, 10]", "correct"),
        ("[1, 03, 10, 10]", "illegal"),
        ('["1", "03", "10", "10"]', "illegal"),
        ("[1, 3, 10, 010]", "illegal"),
        ("[1, 3, 10, 10.5]", "wrong_numbers"),
        ("[01.0, 3, 10, 10]", "illegal"),
        ("[1, 3, 10, 10, 0]", "wrong_numbers"),
        ("[1, 3, 10]", "wrong_numbers"),
        ("[]", "wrong_numbers"),
    ],
)
def test_numbers_are_integers_without_leading_zeros(number, verdict):
    text = reply("10+10+3+1=24").replace("[1, 3, 10, 10]", number)
    assert judged(text)[4]["verdict"] == verdict


def test_the_number_field_follows_the_rule_in_force():
    good = reply("(13-10)*(3+1)=24", number=(1, 3, 13, 10))
    assert judged(good)[4]["verdict"] == "wrong_numbers"
    env = envs.make("gp-l", "rule")
    env.reset(options={"cards": ["2", "J", "K", "3"]})
    assert env.numbers == [2, 11, 13, 3]


@pytest.mark.parametrize(
    "text",
    [
        """{"cards": ["A", "3", "K", "10"], "number": [1, 3, 10, 10], "formula": "10+10+3+1=24"}""",
        """{\n "cards": ['A', '3', 'K', '10'],\n "number": [1, 3, 10, 10],\n "formula": "10+10+3+1=24",\n}""",
        """{'cards': [A, 3, K, 10], 'number': [1, 3, 10, 10,], 'formula': '10+10+3+1=24'}""",
        """Here {is} my answer: ```json\n{"cards": ["a", 3, "k ", "10"], "number": ["1", 3, 10, 10],
        "formula": "10+10+3+1=24", "x": {"y": []}}``` ok?""",
        r"""\frac{1}{2} {x} {y} {z} {\text{so}} {"cards": [...], "number": [...], "formula": "an equation"}
        {"cards": ["A", "3", "K", "10"], "number": [" 1", 3, 10, 10], "formula": "10+10+3+1=24"} {done}""",
    ],
)
def test_strict_json_and_the_released_form_are_read(text):
    assert judged(text)[4]["verdict"] == "correct"


ANSWER = reply("10+10+3+1=24")
DRAFT = {"cards": [], "number": [], "formula": "x"}


@pytest.mark.parametrize(
    "text",
    [
        r"\frac{8}{3} " * 180 + ANSWER,
        r"\frac{8}{3} " * 20_000 + ANSWER,
        "{" * 100_000 + ANSWER,
        '{"a":' * 20_000 + ANSWER,
        '{"cards": [' * 2000 + ANSWER,
        json.dumps(DRAFT) * 3000 + ANSWER,
        '{"thoughts": "' + "so " * 400_000 + '", ' + ANSWER[1:],
        '{"thoughts": ' + json.dumps('\\frac{8}{3} "so" {x: it\'s} ' * 500) + ", " + ANSWER[1:],
        '{"thoughts": "' + r'I "think {8}" of {\"cards\": [1]} and it\'s ' * 100 + '", ' + ANSWER[1:],
        ANSWER + " {" * 2000,
        ANSWER + '{"cards": [1], "number": [' * 500,
        ANSWER + ANSWER[:-1],
        ANSWER + ANSWER[:-10],
        ANSWER + ' {"cards": [1]} ' * 1000,
        '{"answer": ' + ANSWER + "}",
        '[1, {"answer": [[' + ANSWER + "]]}]",
        '{"a":' * 10_000 + ANSWER + "}" * 10_000,
        "[" * 10_000 + ANSWER + "]" * 10_000,
        '{"answer": ' + ANSWER + ', "sure": ',
        ANSWER[:-1] + ', "check": ' + json.dumps(DRAFT) + "}",
        ANSWER[:-1] + ', "note": ' + json.dumps(f"not {DRAFT} but {json.dumps(DRAFT)}") + "}",
        f'It\'s not "{json.dumps(DRAFT)}", but "{ANSWER}".',
        '{"note": "' + str(DRAFT) + '", ' + ANSWER[1:],
        ANSWER[:-1] + ', "steps": [[], {}, [{"x": [1, {}]}]], }',
    ],
)
def test_the_last_object_with_all_fields_decides_wherever_it_stands(text):
    assert judged(text)[4]["verdict"] == "correct"


def test_an_object_without_a_field_or_cut_off_is_no_answer():
    for text in (ANSWER[:-1], ANSWER[1:], ANSWER.replace("}", "]"), ANSWER.replace('"number": ', "")):
        assert envs.parse_reply(text, envs.FIELDS) is None, text
    for text in (ANSWER + json.dumps(DRAFT), json.dumps(DRAFT) + ANSWER[:-1]):
        assert envs.parse_reply(text, envs.FIELDS) == DRAFT


@pytest.mark.parametrize(
    "value, read",
    [
        ('"Joe\'s "Best" Pizza is on your left"', 'Joe\'s "Best" Pizza is on your left'),
        ("'Joe's 'Best' Pizza'", "Joe's 'Best' Pizza"),
        (r'"Joe\u2019s "Best" \"Pizza\""', 'Joe’s "Best" "Pizza"'),
        (r"'it\'s \"so\" \u00e9'", 'it\'s "so" é'),
        ('"a {b} [c]: d"', "a {b} [c]: d"),
        ("'a \"quoted\" part'", 'a "quoted" part'),
        (r'"\q"', r"\q"),
        ('""', ""),
        ("''", ""),
        ('"line\nbreak"', "line\nbreak"),
        ('"' + r"\"" * 20_000 + '"', '"' * 20_000),
        ("forward()", "forward()"),
        ("-3", -3),
        ("3.0", 3),
        ("3.5", 3.5),
        ("08", "08"),
        ("null", None),
        ("None", None),
        ("true", True),
        ("[A, 3, K, 10]", ["A", 3, "K", 10]),
        ("['A','3',]", ["A", "3"]),
        ("{a: {'b': [], }, }", {"a": {"b": []}}),
        ("[ ]", []),
        ("{\n}", {}),
    ],
)
@pytest.mark.parametrize(
    "form", ['{{"x": {}, "y": 1}}', "{{y:1,'x':{},}}", '{{\n"y" : 1 ,\n"x" : {}\n}} "and so on"']
)
def test_values_in_strict_json_and_in_the_released_form(form, value, read):
    assert envs.parse_reply(form.format(value), ("x", "y")) == {"x": read, "y": 1}


def test_objects_among_garbage_are_read_as_the_standard_library_reads_them():
    rng, pieces = random.Random(0), [*"{}[]:,\"'\\ \n7a\0é", '{"a":', '["', '":', '",', "{x: 'y'}", "it's"]
    pieces += ['\\"', "{a:'", "{}", '"formula":', "cards"]

    def value(depth=0):
        kind = rng.randrange(6 if depth < 4 else 4)
        if kind < 2:
            return "".join(rng.choices(pieces, k=rng.randint(0, 6)))
        if kind < 4:
            return rng.choice([0, -12, 345, None])
        if kind == 4:
            return [value(depth + 1) for _ in range(rng.randint(0, 3))]
        return {rng.choice("abc") * rng.randint(1, 2): value(depth + 1) for _ in range(rng.randint(0, 3))}

    def planted(depth=0):
        items = [(name, value()) for name in envs.FIELDS]
        items += [(f"more {k}", value(3)) for k in range(rng.randint(0, 2))]
        if depth < 2 and rng.random() < 0.3:
            items.append(("answer", planted(depth + 1)))
        rng.shuffle(items)
        within = dict(items)
        return rng.choice([within, within, {"answer": within}, [1, within], {"cards": [within], "number": 1}])

    def reference(text):
        found, last, decoder = None, -1, json.JSONDecoder()
        for start in (i for i, c in enumerate(text) if c == "{"):
            try:
                read, end = decoder.raw_decode(text, start)
            except ValueError:
                continue
            if end > last and all(name in read for name in envs.FIELDS):
                found, last = [read[name] for name in envs.FIELDS], end
        return found

    for _ in range(2000):
        parts = [rng.choice(pieces) for _ in range(rng.randint(0, 40))]
        for _ in range(rng.randint(1, 3)):
            parts.insert(rng.randint(0, len(parts)), json.dumps(planted(), ensure_ascii=rng.random() < 0.5))
        text = "".join(parts)
        read = envs.parse_reply(text, envs.FIELDS)
        assert [read[name] for name in envs.FIELDS] == reference(text), text


HOSTILE = [
    *("{", "[", "}", '"', "'", "\\", '\\"', "\"'", "{'", '{"', "\0", " ", "{a:", '{"a":', "{a:[", "[{", "1,"),
    *('"a":1,', "{a:1},", '{"cards":', '{"cards":["', '{"cards":1,"number":1,"formula":', '{a:"x'),
    *('{a:"x",', '":', '",', r"'\'\"', ", ANSWER, ANSWER[:-1], ANSWER[1:], "it's {x: ", r'{"\n":"\n",'),
]


def test_any_reply_is_judged_in_linear_time():
    """In the time of a plain loop over six times as many numbers, and of 300,000 more: on the slowest machine
    seen 17 ms for 20,000 characters and 0.22 s for a million."""
    names = '"cards":1,"number":1,"formula":1'
    loop = min(seconds(lambda: sum(i * i for i in range(100_000))) for _ in range(10))
    for size in (20_000, 1_000_000):
        limit = loop * (3 + 6 * size / 100_000)
        for pattern in HOSTILE:
            much = pattern * ((size - 200) // len(pattern))
            for text in (
                much,
                names + much + names,
                ANSWER[:-1] + ', "x": ' + much + names + "}",
                '{"cards": ["' + much + '"], ' + names + "}",
            ):
                times = [seconds(lambda: judged(text))]
                while min(times) > limit and len(times) < 8:  # others compute here, too
                    times.append(seconds(lambda: judged(text)))
                assert min(times) < limit, (pattern, text[:100])


def seconds(work):
    """The time that this thread spends on some work."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def hostile_strings():
    rng = random.Random(0)
    good = reply("10+10+3+1=24")
    yield from [
        "",
        "\0",
        "{" * 100_000,
        "[" * 1_000_000,
        '{"cards":' * 5000,
        "a" * 1_000_000,
        "\ud800",
        '{"formula": "\\',
        "{'a': '\\'",
        '{"cards": ["A","3","K","10"], "number": [1,3,10,10], "formula": "' + "(" * 190 + '"}',
        "٣" * 50,
        reply("(" * 100 + "10+10+3+1" + ")" * 90),
        reply("٣+10+10+1"),
        reply("1e3"),
        reply("10+10+3+1=" + "9" * 150),
        reply("/".join(["9"] * 99)),
        good[:-1],
        good + good,
        good.replace('"', "“"),
        '{"cards": [[[[[[[[[[1]]]]]]]]]]}',
        reply("10+10+3+1=24", cards=["A" * 10_000]),
        reply("10+10+3+1=24", number=[10**400, -5, 1.5, None]),
        "{a:" * 7 + "[" + "1," * 9980,
        "{a:" * 7 + "[" + r'"\x",' * 3900,
        "{cards:[" + "1," * 9980 + "],number:[1],formula:a}",
        "{'" * 9000,
        "{" * 19_000,
        '{"' + "a" * 19_000,
        reply("10+10+3+1=24", number=["\ud800", "<|end|>", 10, 10]),
        '"' * 19_999,
        "{" + '"a":' * 4000,
        "\\" * 19_000,
        "'" + "\\'" * 9000,
    ]
    alphabet = "{}[]:,\"'\\ \n\t0123456789+-*/=()AJQKcardsnumberformula\0é😀"
    for _ in range(3000):
        chars = list(good)
        for _ in range(rng.randint(1, 12)):
            at = rng.randrange(len(chars))
            chars[at : at + rng.randint(0, 3)] = rng.choices(alphabet, k=rng.randint(0, 3)) or [" "]
        yield "".join(chars)


def test_no_string_gets_an_exception_or_a_wrong_reward_out_of_step():
    env = envs.make("gp-l", verify_iter=1)
    slowest = 0.0
    for text in hostile_strings():
        times = []
        for _ in range(3):  # the fastest one counts: garbage collection is not the verifier's
            env.reset(options={"cards": ["A", "3", "K", "10"]})
            start = time.thread_time()
            _, reward, terminated, truncated, info = env.step(text)
            times.append(time.thread_time() - start)
        slowest = max(slowest, min(times))
        assert info["verdict"] in env.rewards and terminated != truncated
        assert info["feedback"].isascii() and "<" not in info["feedback"] and len(info["feedback"]) < 120
        assert reward == envs.GeneralPoints.rewards[info["verdict"]] + (
            0 if terminated else envs.GeneralPoints.rewards["budget"]
        )
        if info["verdict"] == "correct":  # an independent judge agrees
            formula = envs.parse_reply(text, envs.FIELDS)["formula"].split("=")[0].replace(" ", "")
            assert exact(formula) == 24 and leaves(formula) == [1, 3, 10, 10]
    assert slowest < 0.010


def test_verdicts_on_generated_formulas_match_an_independent_judge():
    rng = random.Random(1)
    for _ in range(2000):
        numbers = [rng.choice([1, 3, 10, 10, 2]) for _ in range(rng.choice([3, 4, 4, 4, 5]))]
        formula = (
            rng.choice(list(every_formula(numbers[:2])))
            + rng.choice("+-*/")
            + "*".join(map(str, numbers[2:]))
        )
        try:
            value = exact(formula)
            expected = (
                "wrong_numbers"
                if leaves(formula) != [1, 3, 10, 10]
                else "correct"
                if value == 24
                else "wrong_value"
            )
        except ZeroDivisionError:
            expected, value = "illegal", None
        right = rng.choice(["24", "=24", "-24", "8.71", "about", ""])
        if value == 24 and right != "24":
            expected = "illegal"
        assert judged(reply(f"{formula}={right}"))[4]["verdict"] == expected, formula


# ---- the environment


def test_same_seed_same_episodes_and_no_global_random_state():
    random.seed(0)
    state = random.getstate()
    hands = []
    for _ in range(2):
        env = envs.make("gp-l", "rule", seed=7)
        hands.append([env.reset()[1]["cards"] for _ in range(20)])
    assert hands[0] == hands[1] and random.getstate() == state
    assert env.reset(seed=7)[1]["cards"] == hands[0][0]
    assert envs.make("gp-l", "rule", seed=8).reset()[1]["cards"] != hands[0][0]


def test_deals_are_solvable_and_follow_the_variant():
    for variant, replacement in itertools.product(("id", "rule"), (False, True)):
        env = envs.make("gp-l", variant, 3, replacement=replacement)
        for _ in range(300):
            _, info = env.reset()
            assert envs.solve(tuple(sorted(info["numbers"])))
            assert info["numbers"] == [
                {"A": 1, "J": 10, "Q": 10, "K": 10}.get(c) or int(c)
                if variant == "id"
                else {"A": 1, "J": 11, "Q": 12, "K": 13}.get(c) or int(c)
                for c in info["cards"]
            ]
            if variant == "rule":
                assert set(info["cards"]) & set("JQK")


@pytest.mark.parametrize("variant, values", [("id", (10, 10, 10)), ("rule", (11, 12, 13))])
def test_with_replacement_hands_are_dealt_as_the_released_code_deals_them(variant, values):
    """Any ranks; under the other rule three, and J, Q or K at any place: the more of these, the likelier."""
    count = {rank: i + 1 for i, rank in enumerate(envs.RANKS)} | dict(zip("JQK", values))
    weights = {}
    for hand in itertools.product(envs.RANKS, repeat=4):
        if 24 in reachable(tuple(sorted(Fraction(count[rank]) for rank in hand))):
            weights[hand] = sum(rank in "JQK" for rank in hand) if variant == "rule" else 1
    env, n = envs.make("gp-l", variant, replacement=True), 20_000
    dealt = Counter(tuple(env.reset()[1]["cards"]) for _ in range(n))
    assert all(weights[hand] for hand in dealt)
    total = sum(weights.values())
    for cell in (
        lambda hand: tuple(sorted(hand)),
        lambda hand: tuple(rank in "JQK" for rank in hand),
        lambda hand: hand[0],
    ):
        expected, seen = Counter(), Counter()
        for hand, weight in weights.items():
            expected[cell(hand)] += weight * n / total
            seen[cell(hand)] += dealt[hand]
        cells = [key for key in expected if expected[key] >= 5]
        chi_square = sum((seen[key] - expected[key]) ** 2 / expected[key] for key in cells)
        assert chi_square < len(cells) + 4 * math.sqrt(2 * len(cells)), (chi_square, len(cells))


def test_expert_is_always_right_and_wrong_replies_are_near_misses():
    for variant in ("id", "rule"):
        env = envs.make("gp-l", variant, 5)
        for _ in range(200):
            env.reset()
            assert env.step(env.wrong_reply())[4]["verdict"] == "wrong_value"
            assert env.step(env.expert_reply())[1:4] == (5.0, True, False)


def test_budget_is_exact_and_the_episode_grows_by_reply_and_feedback():
    env = envs.make("gp-l", verify_iter=3)
    observation, info = env.reset()
    assert info["verdict"] is None and [m["role"] for m in observation.messages] == ["user"]
    rewards = []
    for k in range(3):
        observation, reward, terminated, truncated, info = env.step(f"try {k}")
        rewards.append(reward)
        assert not terminated and truncated == (k == 2)
    assert rewards == [-3, -3, -4]
    assert [m["content"] for m in observation.messages[1::2]] == ["try 0", "try 1", "try 2"]
    assert (
        observation.messages[2] == {"role": "user", "content": info["feedback"]}
        and observation.messages[-1]["role"] == "assistant"
    )
    after = env.step(env.expert_reply())
    after[0].messages[0]["content"] = "changed by the caller"
    assert env.step("x")[0].messages == observation.messages
    after = env.step("x")
    assert after[1] == 0 and after[3] and after[0].messages == observation.messages


def test_options_cards_and_wrong_arguments():
    env = envs.make("gp-l")
    _, info = env.reset(options={"cards": ["A", "3", "K", "10"]})
    assert info["cards"] == ["A", "3", "K", "10"] and info["numbers"] == [1, 3, 10, 10]
    for cards in (["A", "A", "A", "A"], ["A", "3"], ["A", "3", "K", "11"], 5):
        with pytest.raises(ValueError):
            env.reset(options={"cards": cards})
    for wrong in (
        {"task": "chess"},
        {"variant": "odd"},
        {"verify_iter": 0},
        {"target": 0},
        {"operators": "^"},
        {"prompt": "$nope"},
        {"odd": 1},
        {"target": 24.0},
        {"verify_iter": "5"},
        {"operators": 5},
        {"fields": ("a", "a", "b")},
        {"faces": {"J": 0, "Q": 1, "K": 1}},
    ):
        with pytest.raises(ValueError):
            envs.make(**({"task": "gp-l"} | wrong))
    with pytest.raises(ValueError):
        envs.make("gp-l", target=10**9).reset()


def test_prompt_states_the_task_and_can_be_replaced():
    env = envs.make("gp-l", "rule", target=30, operators="+*")
    text = env.reset()[0].messages[0]["content"]
    assert all(
        part in text for part in ("30", "+*", "J is 11, Q is 12, K is 13", ", ".join(env.cards), '"formula"')
    )
    hand = {"cards": ["A", "3", "K", "10"]}
    own = envs.make("gp-l", prompt="Cards $cards, $rule, make $target {x}").reset(options=hand)[0]
    assert own.messages[0]["content"] == "Cards A, 3, K, 10, J is 10, Q is 10, K is 10, make 24 {x}"
    own = envs.make("gp-l", prompt="Cards: $cards_list; $rule").reset(options=hand)[0]
    assert own.messages[0]["content"] == "Cards: ['A', '3', 'K', '10']; J is 10, Q is 10, K is 10"


def test_a_prompt_states_the_cards_and_may_leave_out_the_rule():
    with pytest.raises(ValueError, match="states the cards nowhere"):
        envs.make("gp-l", prompt="Make $target. $rule. $$cards")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.make("gp-l", prompt="Make $target from ${cards}.")
        seen = envs.make("gp-vl", prompt="Make $target. $rule.", **SMALL).reset()[0].messages[0]["content"]
        told = envs.make("gp-vl", prompt="$cards_list $rule", **SMALL).reset(
            options={"cards": ["A", "3", "K", "10"]}
        )[0]
        envs.make("gp-l", prompt="$cards $rule")
    assert seen[-1]["text"] == "Make 24. J is 10, Q is 10, K is 10."
    assert told.messages[0]["content"][-1]["text"].startswith("in the picture")


def test_the_verifier_speaks_in_other_words_if_it_is_given_them():
    own = {
        "wrong_value": "$$ $value is not $target",
        "wrong_numbers": "[$number] $reason",
        "illegal": "No: ${reason}!",
        "unparsed": "JSON for $target, please",
        "correct": "Bravo",
    }
    for task, options in (("gp-l", {}), ("gp-vl", SMALL)):
        env = envs.make(task, feedback=own, verify_iter=9, **options)
        env.reset(options={"cards": ["A", "3", "K", "10"]})
        for text, said in (
            (reply("10+10+3-1=24"), "$ 22 is not 24"),
            (reply("10+13+1=24"), "[13] There is no 13 left to use"),
            (reply("10+10+3=24"), "[1] A number was left out"),
            (reply("(1"), "No: its brackets do not match!"),
            ("$target", "JSON for 24, please"),
            (reply("10+10+3+1"), "Bravo"),
        ):
            observation, *_, info = env.step(text)
            assert info["feedback"] == said
            assert said == "Bravo" or observation.messages[-1]["content"] == said
        default = envs.make(task, feedback={"unparsed": "?"}, **options)
        default.reset(options={"cards": ["A", "3", "K", "10"]})
        assert default.step("x")[4]["feedback"] == "?"
        *_, info = default.step(reply("10+10+3-1=24"))
        assert info["feedback"] == "The formula gives 22, not 24. Try again."
    env = envs.make("gp-vl", feedback={"misread": "Look again"}, **SMALL)
    env.reset()
    assert env.step(reply("1", cards=[]))[4]["feedback"] == "Look again"
    for wrong in (
        {"odd": "x"},
        {"misread": "x"},
        {"illegal": 5},
    ):
        with pytest.raises(ValueError):
            envs.make("gp-l", feedback=wrong)


def test_field_names_of_other_alphabets_are_written_and_read():
    env = envs.make("gp-l", fields=("карты", "числа", "формула"))
    env.reset()
    assert env.step(env.expert_reply())[4]["verdict"] == "correct"


def test_play_runs_in_lockstep_and_asks_only_running_environments():
    environments = [envs.make("gp-l", seed=i, verify_iter=3) for i in range(4)]
    asked = []

    def respond(indices, observations):
        asked.append(list(indices))
        return [environments[i].expert_reply() if len(asked) > i else "?" for i in indices]

    episodes = envs.play(environments, respond)
    assert asked == [[0, 1, 2, 3], [1, 2, 3], [2, 3]]
    assert [len(e.turns) for e in episodes] == [1, 2, 3, 3] and [e.success for e in episodes] == [
        True,
        True,
        True,
        False,
    ]


def test_demonstrations_have_the_released_form():
    env = envs.make("gp-l", seed=1)
    record = envs.demonstration(env, wrong_turns=2)
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 3
    assert envs.parse_reply(record["conversations"][-1]["value"], envs.FIELDS)["formula"].endswith("=24")
    with pytest.raises(ValueError):
        envs.demonstration(env, wrong_turns=5)


def test_foundation_corpus_mixes_rules_and_never_shows_the_target_form():
    rng = random.Random(0)
    records = [sft.foundation_record(rng) for _ in range(400)]
    prompts = [r["conversations"][0]["value"] for r in records]
    assert 0.08 < sum("J is 10, Q is 10, K is 10" in p for p in prompts) / 400 < 0.22
    assert 0.5 < sum("J is 11, Q is 12, K is 13" in p for p in prompts) / 400 < 0.7
    assert 0.15 < sum(len(r["conversations"]) > 2 for r in records) / 400 < 0.35
    assert not any(
        f'"{name}"' in turn["value"] for r in records for turn in r["conversations"] for name in envs.FIELDS
    )


def test_diverse_hands_have_rules_of_their_own_and_never_the_tests():
    env, rules = envs.make("gp-l", seed=5, diverse=True), set()
    for seed in range(80):
        observation, info = env.reset(seed)
        rules.add(tuple(env.faces.values()))
        assert "J is {J}, Q is {Q}, K is {K}".format(**env.faces) in observation.messages[0]["content"]
        assert (
            info["numbers"] == [env.value_of(card) for card in info["cards"]] and max(info["numbers"]) <= 10
        )
        assert env.step(env.expert_reply())[4]["verdict"] == "correct"
    assert len(rules) > 60 and {value for rule in rules for value in rule} == set(range(1, 11))
    again = envs.make("gp-l", seed=0, diverse=True)
    assert again.reset(79)[1] == info


def test_the_careless_writer_breaks_nothing_but_the_sign_and_writes_half_of_the_corpus():
    env, seen = envs.make("gp-l"), set()
    for seed in range(60):
        env.reset(seed)
        product = "*" in env.expert_reply()
        *_, info = env.step(sft.careless_reply(env))
        assert info["verdict"] == ("illegal" if product else "correct")
        seen.add(product)
    assert seen == {True, False}
    rng = random.Random(1)
    lasts = [
        envs.parse_reply(r["conversations"][-1]["value"], ())
        for r in (sft.foundation_record(rng) for _ in range(600))
    ]
    formulas = [next(v for v in last.values() if isinstance(v, str)) for last in lasts]
    signed = [f for f in formulas if "x" in f or "*" in f]
    # Half, and wrong answers that lost or gained their product.
    assert 0.41 < sum("x" in f for f in signed) / len(signed) < 0.59


# ---- options


@pytest.mark.parametrize("task", envs.TASKS)
def test_rewards_are_a_dict_over_the_tasks_own(task):
    own, options = dict(envs.TASKS[task].rewards), SMALL if task == "gp-vl" else {}
    env = envs.make(task, rewards={"unparsed": -7, "budget": -0.5}, verify_iter=2, **options)
    assert env.rewards == own | {"unparsed": -7, "budget": -0.5} and envs.TASKS[task].rewards == own
    env.reset()
    assert env.step("x")[1] == -7 and env.step("y")[1:4] == (-7.5, False, True)
    env.reset()
    assert env.step(env.expert_reply())[1] == own["correct"]
    usual = envs.make(task, verify_iter=1, **options)
    usual.reset()
    assert usual.rewards == own and usual.step("x")[1] == own["unparsed"] + own["budget"]
    for wrong in ({"odd": 1}, {"correct": "5"}, {"correct": math.nan}, {"correct": True}, ["correct"], 5):
        with pytest.raises(ValueError, match="reward"):
            envs.make(task, rewards=wrong, **options)


@pytest.mark.parametrize("task", envs.TASKS)
def test_every_option_keeps_its_limits_and_the_class_its_defaults(task):
    for name, (kind, default, option) in envs.options_of(envs.TASKS[task]).items():
        wrong = [object()] + [option.least - 1, option.most + 1] * (kind in (int, float))
        wrong += ["odd"] * bool(option.choices) + [True] * (kind in (int, float))
        for value in wrong:
            if value not in (math.inf, -math.inf):
                with pytest.raises(ValueError, match=name):
                    envs.make(task, **{name: value})
        assert default is None or option.check(name, kind, default) is None
        assert getattr(envs.TASKS[task], name) == default


def test_a_fresh_copy_shares_the_world_and_no_episode():
    env = envs.make("virl-l", points_per_leg=1, rewards={"correct": 3})
    fresh = env.fresh_copy()
    assert fresh.world is env.world and fresh.rewards["correct"] == 3
    one, two = (e.reset(seed, {"route": seed})[1]["route"] for e, seed in ((env, 1), (fresh, 2)))
    assert (
        (one, two) == (1, 2)
        and fresh.step(fresh.expert_reply())[1] == 3
        and (env.decision, fresh.decision) == (0, 1)
    )
    assert env.messages != fresh.messages and env.random is not fresh.random


# ---- pictures


def reddish(picture):
    """Number of pixels that are clearly red."""
    return sum(
        count
        for count, (r, g, b) in picture.getcolors(picture.width * picture.height)
        if r > 150 and g < 90 and b < 90
    )


def test_pictures_are_a_function_of_the_seed_and_show_the_variants_suits():
    first, again, other = (envs.make("gp-vl", seed=s).reset()[0].image for s in (1, 1, 2))
    assert first.size == (1200, 480) and first.tobytes() == again.tobytes() != other.tobytes()
    hands = {v: envs.make("gp-vl", v, seed=5).reset() for v in ("id", "visual")}
    assert (
        hands["id"][1]["cards"] == hands["visual"][1]["cards"]
        and hands["id"][1]["numbers"] == hands["visual"][1]["numbers"]
    )
    assert reddish(hands["id"][0].image) == 0 < reddish(hands["visual"][0].image)
    straight = [
        envs.make("gp-vl", seed=s, jitter=0).reset(options={"cards": ["A", "3", "K", "10"]})[0].image
        for s in range(8)
    ]
    # The cards lie in line, but their suits are drawn.
    assert len({picture.tobytes() for picture in straight}) > 1


@pytest.mark.parametrize("size, font_size", [((1200, 480), 0.17), ((128, 64), 0.36)])
def test_every_rank_looks_unlike_every_other_at_any_size(size, font_size):
    for suit in ("clubs", "hearts"):
        pictures = [
            envs.draw_hand([rank] * 4, [suit] * 4, size, 0, font_size, random.Random(0)).convert("L")
            for rank in envs.RANKS
        ]
        for i, a in enumerate(pictures):
            for b in pictures[:i]:
                assert sum(ImageChops.difference(a, b).histogram()[40:]) >= size[0] * size[1] / 250


def test_jitter_keeps_every_card_in_its_part_of_the_table():
    rng = random.Random(0)
    for _ in range(50):
        picture = envs.draw_hand(["8"] * 4, ["spades"] * 4, (400, 160), 1.0, 0.17, rng)
        for x in (0, 399):
            assert all(picture.getpixel((x, y)) == envs.TABLE for y in range(160))
        assert all(picture.getpixel((x, y)) == envs.TABLE for x in range(400) for y in (0, 159))


def test_the_visual_task_hides_the_cards_from_the_text_and_judges_their_names():
    env = envs.make("gp-vl", "rule", seed=3, **SMALL)
    observation, info = env.reset(options={"cards": ["A", "J", "Q", "A"]})
    parts = observation.messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"] and "J is 11, Q is 12, K is 13" in parts[1][
        "text"
    ]
    assert "A, J" not in parts[1]["text"] and info["numbers"] == [1, 11, 12, 1]
    wrong = env.expert_reply().replace('"Q"', '"K"')
    observation, reward, *_, info = env.step(wrong)
    assert (
        info["verdict"] == "misread"
        and reward == -1.5
        and not info["recognized"]
        and not any(c in info["feedback"] for c in "JQK")
    )
    assert env.step(env.expert_reply())[1] == 5 and parts == env.observe().messages[0]["content"]
    (episode,) = envs.play([env], lambda indices, observations: [env.expert_reply()])
    assert episode.success and episode.prompt.startswith("<image>\nMake 24")
    wrong = [env.reset()[0] and env.step(env.wrong_reply())[4]["verdict"] for _ in range(60)]
    assert set(wrong) == {"misread", "wrong_value"} and 15 < wrong.count("misread") < 45
    record = envs.demonstration(env)
    assert record["image"] is env.observe().image and record["conversations"][0]["value"].startswith(
        "<image>\nMake"
    )
    for wrong in (
        {"color": "blue"},
        {"size": (9, 9)},
        {"jitter": 2},
        {"font_size": 3},
        {"variant": "odd"},
        {"odd": 1},
    ):
        with pytest.raises(ValueError):
            envs.make("gp-vl", **wrong)
    with pytest.raises(ValueError):
        envs.make("gp-l", color="red")


@pytest.mark.parametrize(
    "text, before, after",
    [
        ("<image>\nName.", "", "Name."),
        ("<image>\n\nName.", "", "\nName."),
        ("See <image>\nthis.", "See ", "this."),
        ("See\n<image>\n", "See\n", ""),
    ],
)
def test_a_newline_after_a_pictures_mark_belongs_to_it(text, before, after):
    parts = envs.parts_of(text)
    said = "".join("|" if part["type"] == "image" else part["text"] for part in parts)
    assert said == f"{before}|{after}" and envs.text_of(parts) == text


def test_a_text_may_lack_the_newline_or_the_mark():
    assert envs.parts_of("<image>Name.") == envs.parts_of("Name.") == envs.parts_of("<image>\nName.")
    assert envs.parts_of("\nName.") == [{"type": "image"}, {"type": "text", "text": "\nName."}]


# ---- streets


def test_angles_are_wrapped_for_all_pairs_of_headings():
    assert envs.wrap(180) == envs.wrap(-180) == 180 and envs.relative_word(180) == "right"
    for a in range(360):
        for b in range(360):
            turn = envs.wrap(b - a)
            assert -180 < turn <= 180 and (turn - (b - a)) % 360 == 0
            word = envs.relative_word(b - a)
            assert word == ("slightly " if abs(turn) <= 45 else "") + ("right" if turn > 0 else "left")
    assert [envs.compass_word(h) for h in (0, 22, 23, 90, 180, 270, 337, 338, 359.9)] == [
        "north",
        "north",
        "northeast",
        "east",
        "south",
        "west",
        "northwest",
        "north",
        "north",
    ]


def great_circle(a, b):
    """Metres and compass heading by spherical trigonometry, on points of the unit sphere."""
    (x, y), (u, v) = (tuple(map(math.radians, p)) for p in (a, b))
    p, q = (
        (math.cos(la) * math.cos(lo), math.cos(la) * math.sin(lo), math.sin(la))
        for la, lo in ((x, y), (u, v))
    )
    east, north = (
        (-math.sin(y), math.cos(y), 0),
        (-math.sin(x) * math.cos(y), -math.sin(x) * math.sin(y), math.cos(x)),
    )
    heading = math.degrees(
        math.atan2(sum(i * j for i, j in zip(q, east)), sum(i * j for i, j in zip(q, north)))
    )
    return 6_371_000 * 2 * math.asin(math.dist(p, q) / 2), heading % 360


def test_distance_and_bearing_match_spherical_trigonometry():
    rng = random.Random(0)
    for centre in ((40.75, -73.98), (-37.8, 144.96), (6.5, 3.4), (51.5, -0.0001), (60.0, 179.999)):
        for _ in range(200):
            a, b = (
                (centre[0] + rng.uniform(-0.01, 0.01), centre[1] + rng.uniform(-0.01, 0.01)) for _ in range(2)
            )
            metres, heading = great_circle(a, b)
            assert envs.distance(a, b) == pytest.approx(metres, rel=1e-4, abs=0.01)
            assert abs(envs.wrap(envs.bearing(a, b) - heading)) < 0.05


def test_the_nearest_panorama_is_the_one_a_search_of_all_finds():
    rng = random.Random(1)
    for lat, lon in ((40.75, 7), (-37.8, 7), (0.0, 7), (-16.8, 180)):  # the last on the date line
        places = {
            (lat + rng.uniform(-0.002, 0.002), envs.wrap(lon + rng.uniform(-0.002, 0.002))): str(k)
            for k in range(300)
        }
        world, found = envs.World((), places), 0
        for _ in range(500):
            at = (lat + rng.uniform(-0.0025, 0.0025), envs.wrap(lon + rng.uniform(-0.0025, 0.0025)))
            best = min(places, key=lambda p: envs.distance(p, at))
            expected = best if envs.distance(best, at) <= 20 else None
            if expected:
                assert world.nearest(at) == expected
            else:
                with pytest.raises(ValueError, match="no panorama within 20 m"):
                    world.nearest(at)
            found += expected is not None
        assert 100 < found < 450 and world.nearest(best) == best


# A folder as the formats page describes it, written by hand: about 110 m a leg, first west, then north,
# then north-east.
ROUTE = {
    "start_place": {"relocated_geocode": [40.7500, -73.9800], "rating": 4.5},
    "init_heading": 350,
    "time": "?",
    "polyline": None,
    "dest_place": {
        "name": "Joe's Bar",
        "geocode": [40.7518, -73.9806],
        "relocated_geocode": [40.7517, -73.9806],
    },
    "route_results": {
        "geocode_list": [[40.7500, -73.9813], [40.7510, -73.9813], [40.7517, -73.9806]],
        "landmark_list": [{"name": "Starbucks"}, None],
    },
    "milestone_info": """{
  "intersection_idx": "1",
  "landmarks": "Starbucks is on your left behind",
  "distance": "110 meters",
  "human_heading": "259",
  "to_next_intersection_heading": "270 (west)",
}
{
  "intersection_idx": "2",
  "landmarks": "No landmarks nearby",
  "distance": "111 meters",
  "human_heading": "0",
  "to_next_intersection_heading": "0 (north)",
}
{
  "intersection_idx": "3",
  "landmarks": "The destination Joe's Bar is on your right",
  "to_next_intersection_heading": "37 (northeast)",
}""",
}


def by_hand(folder, content=None, ids=None):
    """The folder of ROUTE with a panorama at every corner and about every 11 m between; `content` or `ids`
    replace what it holds."""
    corners = [(40.7500, -73.9800), (40.7500, -73.9813), (40.7510, -73.9813), (40.7517, -73.9806)]
    if ids is None:
        ids = {
            (a[0] + (b[0] - a[0]) * k / 10, a[1] + (b[1] - a[1]) * k / 10): f"p{i}_{k}"
            for i, (a, b) in enumerate(zip(corners, corners[1:]))
            for k in range(11)
        }
    (folder / "route_infos.json").write_text(
        content if isinstance(content, str) else json.dumps(content or [[ROUTE], 7])
    )
    (folder / "gps_pano_mapping.pkl").write_bytes(ids if isinstance(ids, bytes) else pickle.dumps(ids))
    return folder


def test_a_folder_in_the_released_format_loads_and_plays(tmp_path):
    env = envs.make("virl-l", data=by_hand(tmp_path), drop=0.0, points_per_leg=1)
    observation, _ = env.reset(seed=0)
    prompt = observation.messages[0]["content"]
    for k, sentence in enumerate(
        (
            "Turn left to face west.",
            "Move forward to an intersection: Starbucks is on your left behind.",
            "Turn right to face north.",
            "Move forward to an intersection.",
            "Turn slightly right to face northeast.",
            "Move forward to the destination: the destination Joe's Bar is on your right.",
        ),
        1,
    ):
        assert f" {k}. {sentence}" in prompt
    actions = [
        "turn_direction(west)",
        "forward()",
        "turn_direction(north)",
        "forward()",
        "turn_direction(northeast)",
        "forward()",
        "stop()",
    ]
    assert env._info()["actions"] == actions
    heard = []
    for action in actions:
        assert json.loads(env.expert_reply())["action"] == action
        observation, reward, terminated, truncated, info = env.step(env.expert_reply())
        assert reward == 1 and not truncated
        heard.append(observation.messages[-1]["content"])
    assert (
        terminated
        and heard[1] == "You see: Starbucks is on your left behind; an intersection."
        and heard[5] == ("You see: The destination Joe's Bar is on your right.")
    )
    relative = envs.make("virl-l", "rule", data=tmp_path, drop=1.0)
    relative.reset(seed=0)
    assert relative._info()["actions"] == [
        "turn_direction(left)",
        "turn_direction(right)",
        "turn_direction(slightly right)",
        "stop()",
    ]
    (tmp_path / "route_infos.json").write_text(json.dumps(ROUTE))  # some released files hold one bare route
    assert envs.load_world(tmp_path).routes == env.world.routes


@pytest.mark.parametrize(
    "first, written, relative, compass",
    [
        (350, "10 (north)", "slightly right", "north"),
        (10, "350 (north)", "slightly left", "north"),
        (10, "10 (north)", "slightly left", "north"),
        (10, "11 (north)", "slightly right", "north"),
        (10, "55 (northeast)", "slightly right", "northeast"),
        (10, "56 (northeast)", "right", "northeast"),
        (10, "325 (northwest)", "slightly left", "northwest"),
        (10, "324 (northwest)", "left", "northwest"),
        (10, "190 (south)", "right", "south"),
        (10, "191 (south)", "left", "south"),
        (10, "-80 (west)", "left", "west"),
        (10, "170 (southeast)", "right", "southeast"),
        (10, "170 ( SouthEast ) ", "right", "southeast"),
        (10, "170", "right", "south"),
        (10, "170 (uptown)", "right", "south"),
        (10, "170 ()", "right", "south"),
    ],
)
def test_the_expert_turns_at_the_start_and_at_turning_points(tmp_path, first, written, relative, compass):
    """By the file's own word of the compass, however small the angle; the second leg goes on as the first."""
    milestones = ROUTE["milestone_info"].replace("270 (west)", written).replace('"0 (north)', f'"{written}')
    by_hand(tmp_path, altered(init_heading=first, milestone_info=milestones))
    for variant, words in (("id", (compass, compass, "northeast")), ("rule", (relative, "slightly left"))):
        env = envs.make("virl-l", variant, data=tmp_path, drop=1.0)
        prompt, actions = env.reset()[0].messages[0]["content"], env._info()["actions"]
        assert actions[: len(words)] == [f"turn_direction({word})" for word in words]
        assert len(actions) == 4 and actions[2].startswith("turn_direction") and actions[3] == "stop()"
        assert f" 1. Turn {relative} to face {compass}. " in prompt
        assert f" 3. Turn slightly left to face {compass}. " in prompt


def test_the_points_of_a_leg_are_its_fifths(tmp_path):
    env = envs.make("virl-l", data=by_hand(tmp_path), drop=0.0)
    env.reset()
    names = [env.world.panoramas[w.place] for w in env.waypoints]
    assert names[1:5] == ["p0_2", "p0_4", "p0_6", "p0_8"]
    assert names[6:10] == ["p1_2", "p1_4", "p1_6", "p1_8"] and len(names) == 16
    assert [k for k, w in enumerate(env.waypoints) if w.action != "forward()"] == [0, 5, 10, 15]


def test_points_of_a_short_leg_that_fall_on_one_panorama_are_kept(tmp_path):
    """Of points at 8, 16, 24 and 32 m, two are nearest to the panorama halfway, the others to the ends."""
    corners = [(40.75 + metres / envs.METRES_PER_DEGREE, -73.98) for metres in (0, 20, 40)]
    ids = {place: f"p{i}" for i, place in enumerate(corners)}
    route = altered(
        start_place__relocated_geocode=corners[0],
        route_results__geocode_list=[corners[2]],
        milestone_info='{"landmarks": "Shop is on your left", "to_next_intersection_heading": "0 (north)"}',
    )
    env = envs.make("virl-l", data=by_hand(tmp_path, route, ids), drop=0.0)
    env.reset()
    assert [env.world.panoramas[w.place] for w in env.waypoints] == ["p0", "p1", "p1", "p2"]
    assert [w.action for w in env.waypoints[1:]] == ["forward()", "forward()", "stop()"]


def test_built_in_routes_have_turns_of_both_kinds():
    env, at_start, later = envs.make("virl-l", "rule", drop=1.0), Counter(), Counter()
    for number in range(2048):
        env.reset(options={"route": number})
        at_start[env.waypoints[0].action] += 1  # from any heading
        later.update(w.action for w in env.waypoints[1:-1])
    turns = [f"turn_direction({word})" for word in envs.RELATIVE]
    assert set(at_start) == set(later) == set(turns)
    assert all(200 < at_start[turn] and 20 < later[turn] for turn in turns)


class Bomb:
    def __reduce__(self):
        return print, ("code ran",)


def framed(*parts):
    """A pickle whose parts stand in frames of their own."""
    return b"".join(b"\x95" + len(part).to_bytes(8, "little") + part for part in parts)


def altered(**changes):
    """ROUTE with some fields changed; None takes a field out."""
    route = copy.deepcopy(ROUTE)
    for names, value in changes.items():
        *path, last = names.split("__")
        record = route
        for name in path:
            record = record[name]
        record[last] = value
    return [[route], 1]


@pytest.mark.parametrize(
    "content, ids, words",
    [
        ('[[{"start_place": ', None, ("route_infos.json", "cannot be read")),
        ("[" * 100_000, None, ("route_infos.json", "cannot be read")),
        ("[]", None, ("no routes",)),
        ("[[3]]", None, ("route 0", "start_place")),
        (altered(start_place__relocated_geocode=None), None, ("route 0", "start_place.relocated_geocode")),
        (altered(start_place__relocated_geocode=[1000, 2]), None, ("route 0", "latitude")),
        (altered(start_place__relocated_geocode=[float("nan"), 2]), None, ("route 0", "latitude")),
        (altered(route_results__geocode_list=[]), None, ("route 0", "geocode_list")),
        (altered(route_results__geocode_list=[[1, 2]]), None, ("route 0", "3 blocks for 1 points")),
        (altered(milestone_info=["x"]), None, ("route 0", "milestone_info")),
        (
            altered(milestone_info=ROUTE["milestone_info"].replace("37 (", "(")),
            None,
            ("block 3", "to_next_intersection_heading"),
        ),
        (altered(init_heading="west"), None, ("route 0", "init_heading")),
        (altered(init_heading=10**400), None, ("route 0", "init_heading")),
        (altered(start_place__relocated_geocode=["a\nb", 2]), None, ("route 0", "latitude")),
        (
            altered(milestone_info=ROUTE["milestone_info"].replace("37 (", "9" * 400 + " (")),
            None,
            ("block 3", "to_next_intersection_heading"),
        ),
        (
            altered(start_place__relocated_geocode=[41.0, -73.98]),
            None,
            ("route_infos.json: route 0: start_place.relocated_geocode", "no panorama within 20 m"),
        ),
        *(
            (
                altered(milestone_info=ROUTE["milestone_info"].replace("37 (", f"{degrees} (")),
                None,
                ("block 3", "to_next_intersection_heading"),
            )
            for degrees in ("999", "1e5", "17.5.5", "\u0663")
        ),
        *(
            (
                altered(
                    milestone_info=ROUTE["milestone_info"].replace("Starbucks is on your left behind", text)
                ),
                None,
                ("block 1", "landmarks"),
            )
            for text in ("<image>", "\ud800", "a" * 400, "***")
        ),
        (
            altered(
                dest_place__name="<image>",
                milestone_info=ROUTE["milestone_info"].replace(
                    "The destination Joe's Bar is on your right", ""
                ),
            ),
            None,
            ("block 3", "landmarks"),
        ),
        (None, b"", ("gps_pano_mapping.pkl", "cannot be read")),
        (None, pickle.dumps(Bomb()), ("gps_pano_mapping.pkl", "GLOBAL")),
        (None, pickle.dumps(Bomb(), 0), ("gps_pano_mapping.pkl", "GLOBAL")),
        # The hash of a deep tuple.
        (
            None,
            b"\x80\x04})" + b"\x85" * 10**6 + b"K\x01s.",
            ("gps_pano_mapping.pkl", "EMPTY_TUPLE"),
        ),
        (
            None,
            b"\x80\x04}K\x01K\x01" + b"\x86" * 10**6 + b"K\x01s.",
            ("gps_pano_mapping.pkl", "pairs of numbers"),
        ),
        *(
            (None, data, ("gps_pano_mapping.pkl", "pairs of numbers"))
            for data in (
                b"\x80\x04}" + b"(" * 1000 + b"K\x01K\x01t" * 1000 + b"K\x01s.",  # a deep tuple, by marks
                framed(b"\x80\x04}", b"(" * 3 + b"K\x01", b"K\x01t", b"K\x01", b"K\x01t", b"K\x01s."),
                framed(b"\x80\x04}", b"K\x01K\x01\x86", b"K\x01\x86", b"K\x01s."),
            )
        ),
        (None, framed(b"\x80\x04", b"cos\nsystem\n."), ("gps_pano_mapping.pkl", "GLOBAL")),
        (
            None,
            b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.",  # a frame of eight exabytes
            ("gps_pano_mapping.pkl", "cannot be read"),
        ),
        # A gigabyte for nine bytes.
        (
            None,
            b"\x80\x04}r" + (64_000_000).to_bytes(4, "little") + b".",
            ("gps_pano_mapping.pkl", "memo"),
        ),
        (None, pickle.dumps({"a": "b"}), ("gps_pano_mapping.pkl", "not a dict")),
        (None, pickle.dumps([1]), ("gps_pano_mapping.pkl", "EMPTY_LIST")),
        (None, pickle.dumps({(1, 2): 3}), ("gps_pano_mapping.pkl", "not a dict")),
        *(
            (None, pickle.dumps({(1, 2): name}), ("gps_pano_mapping.pkl", "no panorama id"))
            for name in ("../../etc/p", "/p", "a\nb", "\x1b[31m", "p" * 5000, "")
        ),
    ],
)
def test_files_that_cannot_be_used_are_named_in_one_line(tmp_path, capsys, content, ids, words):
    with pytest.raises(ValueError) as error:
        envs.make("virl-l", data=by_hand(tmp_path, content, ids)).reset()
    assert (
        all(word in str(error.value) for word in words)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 400
    )
    assert capsys.readouterr().out == ""


def test_what_no_route_uses_refuses_no_folder(tmp_path, recwarn):
    whole = envs.load_world(by_hand(tmp_path))
    unused = {(0, 0): None, (1, 1): 7, (2, 2): "../p", (3, 3): "", (1000, 4): "p", (5, float("nan")): "p"}
    for blank in ("\n{\n}", "\n{", ",\n{ },\n{\n}"):
        content = altered(milestone_info=ROUTE["milestone_info"] + blank)
        world = envs.load_world(by_hand(tmp_path, content, unused | whole.panoramas))
        assert world.routes == whole.routes and world.panoramas == whole.panoramas
    assert not recwarn.list


def test_routes_that_cannot_be_walked_are_left_out_with_one_warning_that_counts_them(tmp_path, recwarn):
    (far,), _ = altered(route_results__geocode_list=[[40.75, -73.9813], [40.751, -73.9813], [41, -73]])
    (short,), _ = altered(milestone_info="{}")
    whole = envs.load_world(by_hand(tmp_path))
    assert envs.load_world(by_hand(tmp_path, [[far, ROUTE, short, 3, ROUTE], 5])).routes == 2 * whole.routes
    (warning,) = recwarn.list
    assert re.fullmatch(
        r".*route_infos.json: 3 of 5 routes cannot be walked and are left out, such as "
        r"route 0: route_results.geocode_list.2: no panorama within 20 m of 41.000000, -73.000000",
        str(warning.message),
    )
    with pytest.raises(ValueError, match=r"route_infos.json: route 0: route_results.geocode_list.2: "):
        envs.load_world(by_hand(tmp_path, [[far, short], 2]))


def test_a_route_with_no_picture_near_its_turning_point_is_left_out(tmp_path):
    (straight,), _ = altered(
        route_results__geocode_list=[[40.75, -73.9813]],
        milestone_info='{"landmarks": "", "to_next_intersection_heading": "270 (west)"}',
    )
    by_hand(tmp_path, [[ROUTE, straight], 2])
    ids = envs.load_world(tmp_path).panoramas
    with_pictures(tmp_path, ids)
    for place, name in ids.items():
        if envs.distance(place, (40.7510, -73.9813)) <= 20:
            (tmp_path / "street_views" / f"{name}.jpg").unlink()
    with pytest.warns(UserWarning, match="1 of 2 routes .* route 0: .*geocode_list.1: no panorama"):
        env = envs.make("virl-vl", data=tmp_path, view_size=16)
    env.reset()
    assert len(env.world.routes) == 1 and env.waypoints[-1].landmark == "The destination Joe's Bar"


@pytest.mark.parametrize("protocol", range(6))
def test_a_mapping_of_many_places_loads_whatever_the_pickle_protocol(protocol):
    """Protocols 4 and 5 cut the pickle into frames, here also inside a key."""
    rng = random.Random(0)
    ids = {(rng.uniform(40, 41), rng.uniform(-74, -73)): "p" * rng.randint(1, 40) for _ in range(45_000)}
    ids[40, -73] = "integers"
    data = pickle.dumps(ids, protocol)
    names = [code.name for code, *_ in pickletools.genops(data)]
    cut = {names[i - 1] for i, name in enumerate(names) if name == "FRAME"}
    assert ("BINFLOAT" in cut) == (protocol >= 4)
    assert envs._read_pickle(data) == ids


def test_the_expert_finishes_every_built_in_route_in_both_action_spaces():
    ends, told = {}, {}
    for split in envs.SPLITS:
        for variant in ("id", "rule"):
            env = envs.make("virl-l", variant, split=split, drop=0.8)
            for number in range(0, len(env.world.routes), 16):
                env.reset(seed=number, options={"route": number})
                while not any(env.done):
                    *_, reward, _, _, _ = env.step(env.expert_reply())
                    assert reward == 1
                assert env.done == (True, False)
                turns = [w.action for w in env.waypoints if w.action.startswith("turn")]
                assert all(action[len("turn_direction(") : -1] in env.rules[variant] for action in turns)
        ends[split] = {route.legs[-1].end for route in env.world.routes}
        told[split] = {(route.start, tuple(leg.end for leg in route.legs)) for route in env.world.routes}
        assert {len(route.legs) for route in env.world.routes} == set(range(2, 9)) and len(
            told[split]
        ) == len(env.world.routes) == 2048
    assert (
        not ends["train"] & ends["valid"]
        and not ends["train"] & ends["test"]
        and not ends["valid"] & ends["test"]
    )
    assert (
        100
        < len(envs.make("virl-l", turns=1, split="test").world.routes)
        < 2048
        == len(envs.make("virl-l", turns=3, split="test").world.routes)
    )


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_the_expert_finishes_the_routes_of_every_test_city(every):
    for split in envs.SPLITS if every == 1 else ("train",):
        env = envs.make("virl-vl", "visual", split=split, view_size=16, panorama_width=64)
        for number in range(0, len(env.world.routes), every):
            env.reset(seed=number, options={"route": number})
            while not any(env.done):
                assert env.step(env.expert_reply())[1] == 1
            assert env.done == (True, False)


ALL_CITIES = [("new york", 0), *envs.TEST_CITIES]


def test_the_test_cities_are_reserved_and_have_places_and_names_of_their_own():
    assert [seed for _, seed in envs.TEST_CITIES] == list(range(101, 110))
    plans = {key: envs.built_in_city(*key).plan for key in ALL_CITIES}
    for a, b in itertools.combinations(plans.values(), 2):
        assert envs.distance(a.centre, b.centre) > 100_000 and not set(a.words) & set(b.words)
    ids = [set(envs.built_in_city(*key).panoramas.values()) for key in ALL_CITIES]
    assert len(set.union(*ids)) == sum(map(len, ids))
    # what the base's corpus walks through is none of them
    drawn = {seed for seed in range(1, 21)}
    rng, seen = random.Random(0), set()
    for _ in range(300):
        state = rng.getstate()
        seen.add(rng.randint(1, 20))
        rng.setstate(state)
        sft.foundation_walk(rng, 1, 0, sft.PICTURE_CITIES)
    assert seen == drawn and not drawn & {seed for _, seed in envs.TEST_CITIES}


def test_the_corpus_of_walks_in_pictures_ends_at_any_waypoint_and_has_names_of_its_own():
    rng, ends = random.Random(5), set()
    plans = [envs.built_in_city(*key).plan for key in ALL_CITIES]
    known = {word for plan in plans for word in (*plan.words, *plan.trades)}
    for _ in range(60):
        record = sft.foundation_walk(rng, 1, 1, cities=(envs.MADE_UP,), view_size=16, panorama_width=64)
        turns = [turn["value"] for turn in record["conversations"]]
        assert record["image"].size == (37, 37) and sum("<image>" in turn for turn in turns) == 1
        fields = re.findall(r'"([a-z]+)": "\.\.\."', turns[0])
        assert (
            len(fields) == 3
            and not set(fields) & set(envs.STREET_FIELDS)
            and all(field in turns[-1] for field in fields)
        )
        assert not known & set(re.findall("[A-Z][a-z]+", turns[0])), turns[0]
        ends.add(sum("You see the picture." in turn for turn in turns))  # waypoints walked
    assert len(ends) > 2


def test_one_reply_in_five_of_the_corpus_of_walks_is_wrong_and_walkers_stop_at_the_destination():
    env, replies, stops = envs.make("virl-l", turns=1, points_per_leg=0, verify_iter=5), [], []
    for seed in range(300):
        env.random.seed(seed)
        turns = sft.imperfect_demonstration(env)["conversations"]
        said = [turn["value"] for turn in turns[2::2]]
        replies += [not text.startswith("You see") for text in said if "You are led on" not in text]
        if env.decision == env.decisions - 1:
            stops.append(envs.parse_reply(turns[-1]["value"], env.fields)["action"] == "stop()")
    assert 0.15 < np.mean(replies) < 0.25 and np.mean(stops) > 0.7


def test_the_visual_variant_walks_all_other_cities_by_the_training_rule():
    env = envs.make("virl-vl", "visual", view_size=16)
    starts = [
        min(
            envs.TEST_CITIES, key=lambda key: envs.distance(envs.built_in_city(*key).plan.centre, route.start)
        )
        for route in env.world.routes
    ]
    assert {key: starts.count(key) for key in starts} == dict.fromkeys(envs.TEST_CITIES, 2048 // 9)
    assert starts[:18] == 2 * list(envs.TEST_CITIES)  # in turn, so that a few routes are from all cities
    for key in envs.TEST_CITIES:  # each place shows its own city
        env.reset(options={"route": starts.index(key)})
        own = np.asarray(envs.built_in_city(*key).draw(env.waypoints[0].geocode))
        assert np.array_equal(np.asarray(env.world.picture(env.waypoints[0].geocode)[0]), own)
        turns = {w.action[len("turn_direction(") : -1] for w in env.waypoints if w.action.startswith("turn")}
        assert turns and turns <= set(envs.COMPASS)
    with pytest.raises(ValueError, match="no option"):
        envs.make("virl-l", city="london")


def test_a_world_written_and_read_back_gives_the_same_episodes(tmp_path):
    city, rng = envs.built_in_city("new york", 0), random.Random(4)
    content = [[city.route(rng, turns) for turns in range(1, 6)], 5]
    envs.write_world(tmp_path, content, city.panoramas)
    world = envs.load_world(tmp_path)
    assert world.routes == envs.read_routes(content) and world.panoramas == city.panoramas
    one, two = envs.make("virl-l", data=tmp_path), envs.make("virl-l")
    two.world = envs.World(envs.read_routes(content), city.panoramas)
    for seed in range(5):
        assert one.reset(seed)[0] == two.reset(seed)[0] and one.waypoints == two.waypoints


def test_a_wrong_step_is_not_executed_and_the_budget_ends_the_route_or_leads_on(tmp_path):
    by_hand(tmp_path)
    for go_on in (False, True):
        env = envs.make("virl-l", data=tmp_path, drop=1.0, continue_after_failure=go_on)
        env.reset()
        right = json.loads(env.expert_reply())
        observation, reward, terminated, truncated, info = env.step(
            json.dumps(right | {"action": "forward()"})
        )
        assert (reward, info["verdict"], info["waypoint"], terminated, truncated) == (
            -1,
            "wrong_action",
            0,
            False,
            False,
        )
        assert (
            observation.messages[-1]["content"] == "That action is wrong here. Try again."
            and env.decision == 0
        )
        false = {"current observation": "an intersection", "action": "stop()"}
        observation, reward, terminated, truncated, info = env.step(json.dumps(right | false))
        assert (reward, info["verdict"], truncated, env.decision) == (-2.5, "wrong_observation", not go_on, 1)
        if go_on:
            assert observation.messages[-1]["content"].startswith(
                "That action is wrong: there is no intersection here. You are led on. You see: Starbucks"
            )
            silent = json.loads(env.expert_reply()) | {
                "current observation": "starbucks is on your LEFT behind"
            }
            assert env.step(json.dumps(silent))[4]["verdict"] == "correct"  # silent about the intersection
            false = json.loads(env.expert_reply()) | {"current observation": "a zebra"}
            assert env.step(json.dumps(false))[1] == 1
            *_, terminated, truncated, info = env.step(env.expert_reply())
            # At the goal, but the route counts as failed.
            assert (terminated, truncated, info["verdict"]) == (
                False,
                True,
                "correct",
            )
        assert env.step(env.expert_reply())[1:4] == (0.0, False, True)


def test_a_walk_with_every_action_right_succeeds_whatever_is_reported():
    """The paper's success of a route, also for a model that cannot read the names of another city."""
    for report in ("Joe's Bar is on your left", "an intersection", envs.NOTHING, ""):
        env = envs.make("virl-vl", "visual", view_size=16, seed=2)

        def respond(indices, observations):
            return [json.dumps(json.loads(env.expert_reply()) | {"current observation": report})]

        (walk,) = envs.play([env], respond)
        assert walk.success and len(walk.turns) == len(walk.expected) > 4
        assert all((turn.reward, turn.verdict) == (1, "correct") for turn in walk.turns)
        assert not any(turn.recognized for turn in walk.turns if turn.landmark)


@pytest.mark.parametrize(
    "old, new", [("\n", " "), (",\n}\n{", "},{"), (",\n  ", ", "), ("\n}\n{\n  ", "}\n{")]
)
def test_milestones_may_stand_on_one_line(old, new):
    text = ROUTE["milestone_info"].replace("Starbucks", 'The "{Old}", "Mill"')
    assert old in text and envs._milestones(text.replace(old, new)) == envs._milestones(text)
    assert (
        len(envs._milestones(text)) == 3
        and envs._milestones(text)[0]["landmarks"] == 'The "{Old}", "Mill" is on your left behind'
    )


def test_a_world_that_was_not_written_to_its_end_does_not_load(tmp_path):
    city = envs.built_in_city("new york", 0)
    content = [[city.route(random.Random(4), 1)], 1]
    envs.write_world(tmp_path, content, city.panoramas)

    def interrupted(place):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        envs.write_world(tmp_path, content, city.panoramas, interrupted)
    with pytest.raises(ValueError, match="route_infos.json cannot be read"):
        envs.load_world(tmp_path)


def test_milestones_with_odd_but_legal_text(tmp_path):
    odd = (
        ROUTE["milestone_info"]
        .replace("Starbucks", 'The "{Old}" Mill; café')
        .replace("\n", "\r\n")
        .replace("270 (", "-90 (")
    )
    odd = odd.replace("The destination Joe's Bar is on your right", "no landmark nearby").replace(
        "}\r\n{", "}, {"
    )
    content = altered(milestone_info=odd, init_heading=0)
    env = envs.make("virl-l", data=by_hand(tmp_path, content), drop=1.0, verify_iter=3)
    env.reset()
    assert [w.landmark for w in env.waypoints[1:]] == [
        'The "{Old}" Mill; café is on your left behind',
        "No landmarks nearby",
        "The destination Joe's Bar",
    ]
    assert env.waypoints[1].heading == 270 and env.world.routes[0].heading is None
    env.step(env.expert_reply())
    assert "café" in env.expert_reply()
    for report, named in (
        ('The "{Old}" Mill', False),
        ('the "{old}" mill; cafe\u0301 is on your left behind', True),
    ):
        reply = json.loads(env.expert_reply()) | {"current observation": report, "action": ""}
        assert env.step(json.dumps(reply))[4]["recognized"] == named
    for action in ("t-u-r-n_direction(north)", "turn_direction(northeast)!", "turn_direction(north)", ""):
        env.reset(), env.step(env.expert_reply()), env.step(env.expert_reply())
        env.step(json.dumps(json.loads(env.expert_reply()) | {"action": action}))
        assert env.verdict.verdict == "wrong_action", action
    assert (
        env.step(json.dumps(json.loads(env.expert_reply()) | {"action": " Turn_Direction( NorthEast ) "}))[4][
            "verdict"
        ]
        == "correct"
    )
    waypoint = envs.Waypoint((0, 0), 0.0, envs.NOTHING, False, "Go.", "turn_direction(slightly left)")
    for action, right in (
        ("'turn_direction'(\"slightly  left\" )", True),
        ("turn_direction(slightlyleft)", False),
        ("t u r n_direction(slightly left)", False),
    ):
        reply = json.dumps(dict(zip(envs.STREET_FIELDS, (envs.NOTHING, "Go.", action))))
        assert (envs.judge_step(reply, waypoint).verdict == "correct") == right, action


def test_a_block_without_landmarks_has_none_and_white_space_in_a_name_is_a_blank(tmp_path):
    text = re.sub('"landmarks": "(No|The)', r'"l": "\1', ROUTE["milestone_info"])
    for blank in ("\t", "\v", " \t ", "\x1f", "\u00a0"):
        text_now = text.replace("Starbucks is", f"Star{blank}bucks{blank}is{blank}")
        by_hand(tmp_path, altered(milestone_info=text_now, dest_place__name=f"Joe's{blank}Bar"))
        env = envs.make("virl-l", data=tmp_path, drop=1.0)
        env.reset()
        seen = ["Star bucks is on your left behind", envs.NOTHING, "The destination Joe's Bar"]
        assert [w.landmark for w in env.waypoints[1:]] == seen
        assert envs.play([env], lambda indices, observations: [env.expert_reply()])[0].success


SIGN, PLAIN = "Strand Cafe is on your left behind", "No landmarks nearby"


def judged_step(report, action, landmark=SIGN, intersection=False):
    """The verifier's answer to a reply at a waypoint where forward() is right."""
    waypoint = envs.Waypoint((0, 0), 0.0, landmark, intersection, "Go.", "forward()")
    return envs.judge_step(json.dumps(dict(zip(envs.STREET_FIELDS, (report, "Go.", action)))), waypoint)


@pytest.mark.parametrize(
    "report, landmark, claims, recognized",
    [
        (SIGN, SIGN, False, True),
        ("strand cafe is on my left behind.", SIGN, False, True),
        (f"{SIGN}; an intersection", SIGN, True, True),
        (f"{SIGN} at an intersection", SIGN, True, True),
        (f"{SIGN}; You observe an intersection", SIGN, True, True),
        (f"{SIGN}. There is an intersection.", SIGN, True, True),
        ("Strand Cafe is on my left behind; I observe an intersection", SIGN, True, True),
        (f"An intersection; {SIGN}", SIGN, True, True),
        (f"{SIGN} and an intersection", SIGN, True, True),
        ("an intersection", SIGN, True, False),
        ("You are at an intersection.", PLAIN, True, True),
        ("No landmark nearby; You observe an intersection", PLAIN, True, True),
        ("no landmarks nearby", PLAIN, False, True),
        ("an intersection", PLAIN, True, True),
        ("", PLAIN, False, False),
        ("Strand Cafe is on your left", SIGN, False, False),
        ("Cafe is on your left behind", SIGN, False, False),
        (PLAIN, SIGN, False, False),
        (SIGN, PLAIN, False, False),
        ("The Strand; an intersection", "The Strand", True, True),
        ("Bank is on your left", "The destination Bank is on your left", False, True),
        ("The Intersection", "The Intersection", False, True),
        (f"There is an intersection, and {SIGN}", SIGN, True, True),
        (f"You see an intersection where {SIGN}", SIGN, True, True),
        ("Intersection Cafe is on my left; an intersection", "Intersection Cafe is on your left", True, True),
    ],
)
def test_the_action_is_judged_and_then_what_is_said_of_intersections(report, landmark, claims, recognized):
    for there in (False, True):
        right, wrong = (judged_step(report, action, landmark, there) for action in ("Forward ( )", "stop()"))
        assert right == ("correct", "Correct.", recognized)
        if claims == there:
            assert wrong == ("wrong_action", "That action is wrong here.", recognized)
        else:
            feedback = f"That action is wrong: there is {'an' if there else 'no'} intersection here."
            assert wrong == ("wrong_observation", feedback, recognized)
    unread = judged_step(report, None, landmark, there)
    assert unread == ("unparsed", "The answer is not in the form asked for.", False)


@pytest.mark.parametrize(
    "report, claims",
    [
        *(
            (report, True)
            for report in (
                "There is a 4-way intersection",
                "There's an intersection",
                "You observe the intersection",
                "There’s a busy intersection here.",
                "I am at a T-intersection",
                "You're at an intersection",
                "There are 4-way intersections.",
                "Intersection ahead",
                "four-way intersection",
                "You have reached the next intersection",
                "An intersection is ahead",
                "We are at this intersection",
                "You are at the intersection of Broadway and 5th",
                "There are no landmarks at this intersection",
                "No landmarks nearby and an intersection",
                "You don't see any landmarks at the intersection",
            )
        ),
        *(
            (report, False)
            for report in (
                "There is no intersection",
                "No intersection nearby",
                "There isn't an intersection",
                "There’s no 4-way intersection",
                "I am not at an intersection",
                "You do not observe the intersection",
                "No landmark or intersection",
                "without any intersection",
                "There is no landmark and no intersection",
                "Intersection Cafe is on your left",
                "The Intersection is on my right behind",
                "Intersection of Arts is on your left",
                "An Intersection Bar is on your right",
                "Cafe at the Intersection is on your left",
                "Bed and Bath Intersection is on your left",
                "Intersection Cafe",
                "The destination Intersection Cafe is on your right",
                "",
            )
        ),
    ],
)
def test_an_intersection_is_claimed_in_the_usual_words_and_not_by_a_name_or_a_denial(report, claims):
    for there in (False, True):
        verdict = judged_step(report, "stop()", PLAIN, there).verdict
        assert verdict == ("wrong_action" if claims == there else "wrong_observation")


LEFT, BEHIND = "Starbucks is on your left", "The destination Joe's Bar is on your right behind"
ODD = "No. 9, Left Bank and Not Just Bagels is on your right"


@pytest.mark.parametrize(
    "report, landmark, recognized",
    [
        *(
            (report, LEFT, True)
            for report in (
                "I see Starbucks on my left",
                "Starbucks is on your left; no intersection",
                "On the left-hand side, there is a STARBUCKS.",
                "Starbucks (left)",
                "There's a Starbucks to my left and an intersection ahead",
                "Starbucks is on your left without any intersection",
                "I'm not at an intersection, but Starbucks is on my left",
                "There is no intersection near Starbucks on my left",
                "Starbucks is on my left; there are no other landmarks and nothing else",
            )
        ),
        *(
            (report, LEFT, False)
            for report in (
                "I see Starbucks",
                "Something is on your left",
                "Starbuck is on your left",
                "Starbuckses are on your left",
                "Starbucks is on your right",
                "Starbucks is on your left or right",
                "Starbucks is on your left; behind me there is a park",
                "Starbucks is on your rear left",
                "Starbucks is on your left; McDonald's is on your left",
                "Starbucks and Joe\u2019s Bar are on my left",
                "Starbucks is on my left, near the destination Joe's Bar",
                "Starbucks Reserve is on your left",
                "No Starbucks on your left",
                "Starbucks is not on your left",
                "Starbucks isn\u2019t on your left",
                "I can't see any Starbucks at the intersection on my left",
                "I see Starbucks, but not on my left",
                "Starbucks on your left is not there",
                "No landmarks nearby; Starbucks is on your left",
            )
        ),
        ("Joe's Bar is behind me on the right", BEHIND, True),
        ("joes bar: back right", BEHIND, True),
        ("You have reached the destination, Joe's Bar, on your right, behind you", BEHIND, True),
        ("The destination Joe's Bar is on your right", BEHIND, False),
        ("The destination is on your right behind", BEHIND, False),
        ("I see No 9 Left Bank and Not Just Bagels on my right", ODD, True),
        ("I see No 9 Left Bank and Not Just Bagels on my left", ODD, False),
        ("I see no No. 9, Left Bank and Not Just Bagels on my right", ODD, False),
        ("I have reached the destination", "The destination", True),
        ("I have not reached the destination", "The destination", False),
        *(
            (report, PLAIN, True)
            for report in (
                "No landmark",
                "There are no landmarks here; no intersection",
                "I don't see any landmarks",
                "There isn't a single landmark nearby, but an intersection",
                "Nothing",
                "none",
            )
        ),
        *(
            (report, PLAIN, False)
            for report in (
                "a zebra",
                "There are landmarks nearby",
                "Joe's Bar",
                "Nothing but Joe's Bar",
                "No landmarks nearby; Starbucks is on your left",
                "an intersection; something on my left",
            )
        ),
    ],
)
def test_a_landmark_is_recognized_by_its_name_and_its_side_in_usual_words(report, landmark, recognized):
    waypoint = envs.Waypoint((0, 0), 0.0, landmark, False, "Go.", "forward()")
    reply = json.dumps(dict(zip(envs.STREET_FIELDS, (report, "Go.", "forward()"))))
    verdict = envs.judge_step(reply, waypoint, names={"starbucks", "joesbar", "starbucksreserve"})
    assert verdict == ("correct", "Correct.", recognized)


@pytest.mark.parametrize(
    "landmark",
    [
        "Left is on your right",
        "Back Bay is on your back left",
        "No landmarks, nothing at all! is on your left",
        "Don't Walk is on your left behind, no entry",
        "The destination",
        "The destination is on your left",
        "The destination The Right Bank is on your right",
        "Turn right at the X",
        "Right",
        "\u0130\u0e01\u0e35_3 is on your left",
    ],
)
def test_a_landmark_in_the_files_own_words_is_always_recognized(landmark):
    waypoint = envs.Waypoint((0, 0), 0.0, landmark, True, "Go.", "forward()")
    reply = json.dumps(dict(zip(envs.STREET_FIELDS, (waypoint.observation, "Go.", "stop()"))))
    verdict = envs.judge_step(reply, waypoint, names={"left", "right", "your", "thedestination"})
    assert verdict.verdict == "wrong_action" and verdict.recognized


def test_a_report_that_names_another_landmark_of_the_route_recognizes_none(tmp_path):
    env = envs.make("virl-l", data=by_hand(tmp_path), drop=1.0)
    assert env.world.names == {"starbucks", "joesbar"}
    for report, recognized in (
        ("Starbucks and the corner are on my left, behind", True),
        ("Starbucks and Joe's Bar are on my left, behind", False),
    ):
        env.reset()
        env.step(env.expert_reply())
        reply = json.loads(env.expert_reply()) | {"current observation": report}
        assert env.step(json.dumps(reply))[4]["recognized"] == recognized


def test_a_reply_may_think_and_report_at_length():
    waypoint = envs.Waypoint((0, 0), 0.0, SIGN, False, "Go.", "forward()")
    long = ("I wonder {so} far, " + "hm, " * 12) * 250
    for thought, report, recognized in (
        (long, SIGN, True),
        ("", f"{SIGN:5000}", True),
        ("", long + SIGN, False),
    ):
        reply = thought + json.dumps(dict(zip(envs.STREET_FIELDS, (report, "Go.", "forward()"))))
        verdict = envs.judge_step(reply, waypoint)
        assert verdict.verdict == "correct" and verdict.recognized == recognized


def test_no_string_gets_an_exception_out_of_a_step_on_a_route(tmp_path):
    env, slowest = envs.make("virl-l", verify_iter=1, data=by_hand(tmp_path), drop=1.0), 0.0
    reports = (
        " " * 19_000,
        "and " * 4000,
        "an intersection " * 1200,
        "; " * 9000,
        "there is " * 2000,
        *(
            (part * 1000)[:987] + " intersection"
            for part in ("a ", "you ", "intersection of ", "- way ", "and ", "no landmark ", "no a ", "x")
        ),
    )
    for text in [
        *hostile_strings(),
        *(json.dumps(dict(zip(envs.STREET_FIELDS, (report, "", "")))) for report in reports),
    ]:
        times = []
        for _ in range(3):
            env.reset()
            start = time.thread_time()
            _, reward, terminated, truncated, info = env.step(text)
            times.append(time.thread_time() - start)
        slowest = max(slowest, min(times))
        assert (
            info["verdict"] in envs.VIRL.rewards
            and reward == envs.VIRL.rewards[info["verdict"]] - 1
            and truncated
        )
    assert slowest < 0.010
    for wrong in (
        {"variant": "visual"},
        {"verify_iter": 0},
        {"drop": 2},
        {"drop": "x"},
        {"points_per_leg": -1},
        {"turns": 8},
        {"split": "all"},
        {"data": 5},
        {"fields": "aab"},
        {"odd": 1},
    ):
        with pytest.raises(ValueError):
            envs.make("virl-l", **wrong)


# ---- what one sees in the streets


def test_a_view_is_the_gnomonic_projection_of_the_panorama():
    rng = np.random.default_rng(0)
    panorama = rng.uniform(0, 255, (12, 24, 3))
    for heading, rotation in ((0, 0), (181, 0), (359, 77.5), (90, 300)):
        size, picture = 9, np.asarray(envs.view(panorama, heading, rotation, 9))
        for i in range(size):
            for j in range(size):
                # the pixel's direction in space: x to the right, y up, z ahead; then round by the heading
                x, y, z = (j + 0.5) / size * 2 - 1, 1 - (i + 0.5) / size * 2, 1.0
                longitude = heading - 180 + rotation + math.degrees(math.atan2(x, z))  # 0 in the middle
                latitude = math.degrees(math.asin(y / math.sqrt(x * x + y * y + z * z)))
                column = (longitude + 180) / 360 * 24 - 0.5
                row = min(max((90 - latitude) / 180 * 12 - 0.5, 0), 11)
                c, r = math.floor(column), math.floor(row)
                expected = sum(
                    panorama[min(r + b, 11), (c + a) % 24]
                    * (1 - abs(column - c - a))
                    * (1 - abs(row - r - b))
                    for a in (0, 1)
                    for b in (0, 1)
                )
                assert np.abs(picture[i, j] - expected).max() <= 0.51


@pytest.mark.parametrize("rotation, column", [(0, 256), (-90, 0), (30, 341), (180, 768), (300, 85)])
def test_a_stripe_of_the_panorama_is_seen_where_the_released_data_has_it(rotation, column):
    """Heading 90 stands in the column (90 + rotation) / 360 of the width, modulo 1."""
    panorama = np.zeros((512, 1024, 3), np.uint8)
    panorama[:, np.arange(column - 4, column + 4) % 1024] = 255
    for heading, middle in ((90, 50.0), (70, 50 + 50.5 * math.tan(math.radians(20))), (270, None)):
        bright = np.asarray(envs.view(panorama, heading, rotation, 101))[50].mean(-1)
        assert (bright.max() > 200) == (middle is not None)
        if middle:
            assert np.average(np.arange(101), weights=bright) == pytest.approx(middle, abs=0.5)
    views = np.asarray(envs.look_around(Image.fromarray(panorama), rotation, 90, 101)).astype(int)
    assert views[:101, 50].mean() > 200 and views[101:].max() == views[:, 101:].max() == 0  # in front alone


def test_signs_stand_in_the_picture_where_geometry_puts_them():
    city = envs.built_in_city("new york", 0)
    checked = 0
    for crossing in list(city.landmarks)[:6]:
        at = city.geocode(city.crossings[crossing])
        middle = city.geocode(sum(city.boards[crossing]) / 2)
        bearing = great_circle(at, middle)[1]
        for rotation in (0.0, 123.0, -bearing):  # the last one puts the sign on the picture's edge
            panorama = city.draw(at, (720, 360), rotation)
            heading = (bearing + 40) % 360
            views = np.asarray(envs.look_around(panorama, rotation, heading, 100)).astype(int)
            dark = np.abs(views - city.plan.sign[0]).max(-1) < 12
            front, right, back, left = dark[:100, :100], dark[:100, 105:], dark[105:, :100], dark[105:, 105:]
            column = 50 + 50 * math.tan(math.radians(-40))  # 40 degrees to the left of the heading
            rows, columns = np.nonzero(front[:, : int(column) + 12])
            assert len(columns) > 20 and abs(columns.mean() + 0.5 - column) < 3 and rows.mean() < 50, (
                crossing,
                rotation,
            )
            assert front.sum() > max(right.sum(), back.sum(), left.sum())
            checked += 1
    assert checked == 18


@pytest.mark.parametrize("key", ALL_CITIES)
def test_signs_are_on_the_side_that_the_route_says(key):
    """Seen from the turning point, by the middle of the board that stands there."""
    city, rng, said = envs.built_in_city(*key), random.Random(3), set()
    boards = {city.landmarks[crossing]["name"]: np.mean(city.boards[crossing], 0) for crossing in city.landmarks}
    for _ in range(60):
        for leg in envs.read_routes(city.route(rng, rng.randint(1, 7)))[0].legs:
            if told := next((told for told in boards if told in leg.landmark), None):
                heading, here = math.radians(leg.heading), envs.offset(city.plan.centre, leg.end)
                away = np.array((boards[told].real - here[0], boards[told].imag - here[1]))
                right = away @ (math.cos(heading), -math.sin(heading))
                ahead = away @ (math.sin(heading), math.cos(heading))
                side = ("right" if right > 0 else "left") + ("" if ahead >= 0 else " behind")
                assert leg.landmark.endswith(f"is on your {side}"), (leg, right, ahead)
                said.add(side)
    assert said == {"right", "left", "right behind", "left behind"}


def with_pictures(folder, ids, rotation=30.0):
    """street_views/ beside a hand-made folder: each panorama a ramp of grey from left to right."""
    (folder / "street_views").mkdir()
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (32, 1, 3))
    for name in ids.values():
        Image.fromarray(ramp).save(folder / "street_views" / f"{name}.jpg", quality=100)
        (folder / "street_views" / f"{name}.metadata.json").write_text(
            json.dumps({"rotation": rotation, "date": "2019"})
        )


def file_of(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png(size=(8, 4)) -> bytes:
    return file_of(Image.new("1", size))


def saved(mode: str, pixels: list, kind: str = "PNG", **options) -> bytes:
    """A file of a picture of one row."""
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    if mode == "P":
        picture.putpalette([0, 0, 0, 200, 100, 0, 0, 0, 255])
    return file_of(picture, kind, **options)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
SHOWN = {  # files, and what an image viewer shows
    "bits": (saved("1", [0, 255]), [BLACK, WHITE]),
    "16 bits": (saved("I;16", [0, 257 * 100, 257 * 128 + 100, 2**16 - 1]), [0, 100, 128, 255]),
    "16 bits, big-endian": (b"P5 2 1 65535 \x64\x64\xff\xff", [100, 255]),
    "16 bits, one transparent": (saved("I;16", [0, 257], transparency=257), [0, 255]),
    "alpha": (saved("RGBA", [(*RED, 255), (*RED, 0), (*BLACK, 51)]), [RED, WHITE, (204, 204, 204)]),
    "grey and alpha": (saved("LA", [(7, 255), (7, 0)]), [7, 255]),
    "a transparent color": (saved("RGB", [RED, BLACK], transparency=BLACK), [RED, WHITE]),
    "a transparent grey": (saved("L", [0, 7], transparency=0), [255, 7]),
    "palette": (saved("P", [0, 1, 2]), [BLACK, (200, 100, 0), (0, 0, 255)]),
    "palette, one transparent": (saved("P", [0, 1], "GIF", transparency=0), [WHITE, (200, 100, 0)]),
    "palette with alpha": (saved("P", [0, 1], transparency=b"\xcc\x00"), [51, WHITE]),
    "ink": (saved("CMYK", [(0, 255, 255, 0), (0, 0, 0, 255)], "TIFF"), [RED, BLACK]),
    "turned": (saved("RGB", [BLACK, WHITE, RED], exif=turned(3)), [RED, WHITE, BLACK]),
    "frames": (
        saved("L", [0], "GIF", save_all=True, append_images=[Image.new("L", (1, 1), 255)]),
        [BLACK],
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_users_picture_is_read_as_an_image_viewer_shows_it(name, tmp_path, recwarn):
    content, shown = SHOWN[name]
    (tmp_path / "file").write_bytes(content)
    picture = envs.read_picture(tmp_path / "file")
    assert picture.mode == "RGB" and picture.size == (len(shown), 1)
    pixels = np.asarray(picture).reshape(-1, 3).tolist()
    assert pixels == [list(x) if isinstance(x, tuple) else [x, x, x] for x in shown] and not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_a_picture_on_its_side_is_set_upright(kind, tmp_path):
    lying = np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3)
    for orientation, upright in (6, np.rot90(lying, -1)), (8, np.rot90(lying)):
        Image.fromarray(lying).save(tmp_path / "file", kind, exif=turned(orientation))
        shown = np.asarray(envs.read_picture(tmp_path / "file"))[..., 0]
        assert shown.shape == (3, 2) and np.abs(shown - upright.astype(int)).max() <= 4


KINDS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
NOISE = Image.effect_noise((64, 64), 100)


@pytest.mark.parametrize(
    "content",
    [
        *(file_of(NOISE, kind)[:-1000] for kind in KINDS),
        saved("F", [0.5], "TIFF"),
        saved("I", [2**16], "TIFF"),
        png((20_000, 10_000)),
        b"P5 1 1 65535 ",
        b"no picture",
        b"",
    ],
    ids=[*KINDS, "floating point", "32 bits", "huge", "no pixels", "text", "empty"],
)
def test_a_picture_that_cannot_be_shown_is_refused_in_one_line_that_names_it(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError) as error:
        envs.read_picture(tmp_path / "file")
    assert re.fullmatch(rf"picture {tmp_path}/file cannot be read: .*\w.*", str(error.value))


def test_a_street_view_is_turned_as_its_exif_data_say(tmp_path):
    by_hand(tmp_path)
    ids = envs.load_world(tmp_path).panoramas
    with_pictures(tmp_path, ids)
    place, name = next(iter(ids.items()))
    file = tmp_path / "street_views" / f"{name}.jpg"
    Image.open(file).save(file, quality=100, exif=turned(2))  # a mirror image
    panorama, _ = envs.load_world(tmp_path, pictures=True).picture(place)
    assert panorama.getpixel((0, 0))[0] > 200 > 50 > panorama.getpixel((63, 0))[0]


@pytest.mark.parametrize(
    "name, content",
    [
        *(("p0_0.jpg", content) for content in (b"\xff\xd8 no picture", b"", png(), png((10_000, 9_999)))),
        *(
            ("p0_0.metadata.json", content)
            for content in (
                b"",
                b"{",
                b"[" * 100_000,
                b"[]",
                b'{"turned": 1}',
                *(
                    b'{"rotation": %s}' % x
                    for x in (
                        b"NaN",
                        b"Infinity",
                        b"1e400",
                        b"1e18",
                        b"1" + b"0" * 400,
                        b"true",
                        b'"30"',
                        b"null",
                        b"[3]",
                    )
                ),
            )
        ),
    ],
)
def test_broken_pictures_are_named_in_one_line(tmp_path, capsys, name, content):
    by_hand(tmp_path)
    with_pictures(tmp_path, envs.load_world(tmp_path).panoramas)
    env = envs.make("virl-vl", data=tmp_path, view_size=16)
    (tmp_path / "street_views" / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        env.reset()
    assert (
        f"street_views/{name}" in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 400
    )
    assert capsys.readouterr() == ("", "")
    (tmp_path / "street_views" / name).unlink()
    with pytest.warns(UserWarning, match="1 of 31 panoramas are missing"):  # the next one stands in
        envs.make("virl-vl", data=tmp_path, view_size=16).reset()
    envs.make("virl-l", data=tmp_path).reset()  # which needs no pictures


@pytest.mark.parametrize("lost", ["p0_5.jpg", "p0_5.metadata.json"])
def test_a_panorama_without_a_picture_is_left_out_with_one_warning(tmp_path, recwarn, lost):
    by_hand(tmp_path)
    with_pictures(tmp_path, envs.load_world(tmp_path).panoramas)
    options = {"data": tmp_path, "drop": 0.0, "points_per_leg": 1}
    whole = envs.make("virl-vl", view_size=16, **options)
    whole.reset(seed=0)
    assert not recwarn.list and [whole.world.panoramas[w.place] for w in whole.waypoints[1:2]] == ["p0_5"]
    for name in (lost, "p1_3.jpg", "p1_3.metadata.json"):
        (tmp_path / "street_views" / name).unlink()
    env = envs.make("virl-vl", view_size=16, **options)
    said = [str(warning.message) for warning in recwarn.list]
    assert len(said) == 1 and re.fullmatch(".*street_views: 2 of 31 panoramas .*", said[0])

    def respond(indices, observations):
        return [observations[0].image and env.expert_reply()]

    assert envs.play([env], respond, seeds=[0])[0].success and len(recwarn.list) == 1
    assert [w.action for w in env.waypoints] == [w.action for w in whole.waypoints]
    assert env.world.panoramas[env.waypoints[1].geocode] in ("p0_4", "p0_6")  # the next ones stand in
    words = envs.make("virl-l", **options)  # which needs no pictures
    words.reset(seed=0)
    assert words.waypoints == whole.waypoints and len(recwarn.list) == 1


def test_judging_a_reply_does_not_wait_for_the_next_picture():
    env, times = envs.make("virl-vl", turns=1), []
    for seed in range(3):
        env.reset(seed=seed)
        reply, start = env.expert_reply(), time.thread_time()
        observation, reward, *_ = env.step(reply)
        times.append(time.thread_time() - start)
        assert (
            reward == 1
            and observation.image is observation.image is env.observe().image
            and observation.image.size == (605, 605)
        )
    assert min(times) < 0.010


def test_the_visual_walk_shows_a_picture_of_each_waypoint_and_tells_nothing_of_it(tmp_path):
    by_hand(tmp_path)
    with pytest.raises(ValueError, match="street_views"):
        envs.make("virl-vl", data=tmp_path)
    with_pictures(tmp_path, envs.load_world(tmp_path).panoramas)
    env, pictures = envs.make("virl-vl", data=tmp_path, drop=1.0, view_size=16), []
    observation, _ = env.reset(seed=0)
    while not any(env.done):
        said = "".join(envs.text_of(m["content"]) for m in observation.messages if m["role"] == "user")
        assert said.count("<image>") == 1
        assert envs.text_of(observation.messages[-1]["content"]).startswith("<image>\n")
        # In the instruction.
        assert observation.image.size == (37, 37) and said.count("Starbucks") == said.count("Joe's Bar") == 1
        pictures.append(observation.image)
        again, reward, *_ = env.step(env.wrong_reply())
        assert (
            reward == -1
            and again.image == observation.image
            and sum("<image>" in envs.text_of(m["content"]) for m in again.messages) == 1
        )
        observation, reward, *_ = env.step(env.expert_reply())
        assert reward == 1
    assert len(pictures) == len(env.waypoints) == 4 and pictures[0] != pictures[1]
    # facing 350 degrees with rotation 30: front is 20 degrees from the panorama's left edge, right 110
    for corner, degrees in (((8, 8), 20), ((29, 8), 110), ((8, 29), 200), ((29, 29), 290)):
        assert pictures[0].getpixel(corner)[0] == pytest.approx(degrees / 360 * 255, abs=8)
    told = envs.make(
        "virl-vl", data=tmp_path, drop=1.0, view_size=16, tell_intersections=True, view_layout="legacy"
    )
    told.reset()
    assert (
        envs.text_of(told.step(told.expert_reply())[0].messages[-1]["content"])
        == "<image>\nYou are at an intersection."
    )
    for wrong in ({"view_layout": "round"}, {"view_size": 3}, {"variant": "red"}):
        with pytest.raises(ValueError):
            envs.make("virl-vl", data=tmp_path, **wrong)


D = {"cards": ["3", "8", "3", "8"], "number": [3, 8, 3, 8], "formula": "8/(3-8/3)=24"}


@pytest.mark.parametrize(
    "reply",
    [
        json.dumps({"thought": ["so"] * 3000} | D),
        json.dumps({"steps": [{"formula": "8*3", "value": 24.0, "ok": False}] * 400} | D),
        json.dumps({"sentences": ["So I try."] * 2000} | D),
        "{x: 1} " + json.dumps({"thought": "{'a': 1} " * 500} | D),
        "x {a: 1} " + json.dumps(D) + '{"cards":1}{"number":2}{"formula":3}' * 100,
        *('{"a":' * n + json.dumps(D) + "}" * n for n in (98, 99, 100, 101, 5000)),
        json.dumps(D | {"number": [3.0, 8.0, 3, 8]}),
        json.dumps([{"draft": D | {"formula": "8"}}, {"answer": [D]}]),
        *(
            before + json.dumps({"steps": [{"formula": "8*3", "value": 24.0, "ok": False}] * 400} | D)
            for before in ('{"thought": [' * 4, '{"cards": ["A", ' * 4, "{x: 1} " * 500, "{a:b} " * 500)
        ),
        json.dumps(D | {"check": D | {"formula": "8"}}),
    ],
)
def test_what_stands_inside_the_answers_object_hides_nothing(reply):
    assert envs.judge(reply, D["cards"], D["number"], 24).verdict == "correct"
    assert envs.judge(reply.replace("8/(3-8/3)", "8*3"), D["cards"], D["number"], 24).verdict != "correct"


def test_an_action_counts_whatever_the_report_is():
    here = envs.Waypoint((0, 0), 0, "Cafe is on your left", True, "s", "forward()")
    for report in ("x" * 5000, None, 5, ["Cafe is on your left"], {"a": 1}, "Cafe is on your left"):
        for action in ("forward()", "stop()"):
            reply = json.dumps(dict(zip(envs.STREET_FIELDS, (report, None, action))))
            verdict = envs.judge_step(reply, here)
            # A report without a word of the intersection leaves it out.
            assert verdict.verdict == ("correct" if action == "forward()" else "wrong_observation")
            assert verdict.recognized == (report == "Cafe is on your left")
    for action in (None, 5, ["forward()"]):
        reply = json.dumps(dict(zip(envs.STREET_FIELDS, ("", "", action))))
        assert envs.judge_step(reply, here).verdict == "unparsed"
