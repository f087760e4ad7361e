"""Cards, streets, solver, verifier, episodes."""

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
from collections import Counter
from fractions import Fraction  # noqa: F401, of `exact`

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image, ImageChops

import envs
import sft

HAND = ["A", "3", "K", "10"]
REWARDS = {"correct": 5, "wrong_value": -1, "wrong_numbers": -2, "illegal": -3, "unparsed": -3}


def card_env(task="gp-l", cards=HAND, **options):
    env = envs.make(task, **(SMALL if task == "gp-vl" else {}) | options)
    env.reset(options={"cards": cards})
    return env


def judged(text, task="gp-l", **options):
    return card_env(task, **options).step(text)[4]


def answer(formula, cards=HAND, number=(1, 3, 10, 10)):
    return json.dumps({"cards": list(cards), "number": list(number), "formula": formula})


ANSWER = answer("10+10+3+1=24")


def exact(formula):
    """A formula's value in fractions, by Python's parser."""
    assert re.fullmatch(r"[-+*/()\s0-9]+", formula)
    return eval(re.sub("([0-9]+)", r"Fraction(\1)", formula))


def numbers_of(formula):
    return sorted(map(int, re.findall("[0-9]+", formula)))


def seconds(work):
    """CPU time that this thread spends on `work`."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


# ---- cards: the solver


def test_solver_on_every_hand():
    """1,362 of the 1,820 hands make 24, as is well known. Demonstrations depend on the very formulas."""
    for cached in (envs.solve, envs._expressions):
        cached.cache_clear()
    hands, start = list(itertools.combinations_with_replacement(range(1, 14), 4)), time.process_time()
    formulas = [envs.solve(hand) for hand in hands]
    assert time.process_time() - start < 10
    assert len(hands) == 1820 and sum(formula is not None for formula in formulas) == 1362
    for hand, formula in zip(hands, formulas):
        assert formula is None or exact(formula) == 24 and numbers_of(formula) == list(hand)
    assert hashlib.sha256("\n".join(map(str, formulas)).encode()).hexdigest()[:16] == "4a2cd4e2a6db6d55"


def test_solver_options():
    assert envs.solve((2, 3), 6, "*") == "3*2" and envs.solve((2, 3), 6, "+-") is None
    assert envs.solve((24,)) == "24" and envs.solve((23,)) is None
    assert exact(envs.solve((1, 2, 3, 4, 25), 100)) == 100


def test_hands_of_three_cards_take_turns():
    for variant, n in (("id", 150), ("rule", 86)):
        env = envs.make("gp-l", variant, n_cards=3, target=12)
        starts = env.starts("test", 2 * n + 1)
        cards = [tuple(options["cards"]) for _, options in starts]
        assert len({tuple(sorted(hand)) for hand in cards[:n]}) == n and cards[n:] == [*cards[:n], cards[0]]
        assert cards != [tuple(options["cards"]) for _, options in env.starts("valid", 2 * n + 1)]
        for start in starts[:n]:
            env.reset(*start)
            assert variant == "id" or {*"JQK"} & {*env.cards}
    dealt = {tuple(sorted(env.reset(seed)[1]["cards"])) for seed in range(3000)}
    assert dealt <= {tuple(sorted(hand)) for hand in cards} and len(dealt) > 0.9 * n


# ---- cards: the verifier


@pytest.mark.parametrize(
    "formula, verdict, feedback",
    [
        (" ( 10 + 10 ) + 3*1  + 1 = 24", "wrong_numbers", "no 1"),
        ("10+10+3+1=24", "correct", "Correct"),
        ("10+10+3", "wrong_numbers", "left out"),
        ("10+13+1=24", "wrong_numbers", "no 13"),
        ("10+10+3-1=24", "wrong_value", "22, not 24"),
        ("10+10+3+1=25", "illegal", "sides"),
        ("10+10+3+1=-24", "illegal", "number is missing"),
        ("10+10+3+1=24=24", "illegal", "equals"),
        ("(10+10+3+1=24", "illegal", "brackets"),
        ("10+10+3+1)=24", "illegal", "brackets"),
        ("10 10+3+1=24", "illegal", "operator"),
        ("-10+10+3+1=24", "illegal", "number"),
        ("10/(10-10)*3=24", "illegal", "zero"),
        ("٣+10+10+1", "illegal", "something else"),
        ("(" * 30 + "10+10+3+1" + ")" * 30, "illegal", "too many"),
        ("", "illegal", "number"),
        ("10+10+3+1" + "+0" * 100, "illegal", "long"),
        ("10+10+3+00+1", "illegal", "begins with a zero"),
        # Where the left side misses the target, the right side is not read.
        ("1-10+10/3=-17/3", "wrong_value", "-17/3, not 24"),
        ("10+10+3-1=22=24", "wrong_value", "22, not 24"),
        ("10+10+3-1 = " + "about " * 1000, "wrong_value", "22, not 24"),
        ("10÷10×3−1=2", "wrong_value", "2, not 24"),
    ],
)
def test_verdict_of_a_formula(formula, verdict, feedback):
    _, reward, terminated, _, info = card_env().step(answer(formula))
    assert info["verdict"] == verdict and feedback in info["feedback"]
    assert reward == REWARDS[verdict] and terminated == (verdict == "correct")


@pytest.mark.parametrize(
    "number, formula, verdict",
    [
        ("[1.0, 3.0, 10.00, 10]", "10+10+3+1=24", "correct"),
        ('["1", " 3", "10", 10]', "10+10+3+1=24", "correct"),
        ("[1, 03, 10, 10]", "10+10+3+1=24", "illegal"),
        ("[1, 3, 10, 10.5]", "10+10+3+1=24", "wrong_numbers"),
        ("[1, 3, 13, 10]", "10+10+3+1=24", "wrong_numbers"),
        ("[9, 9, 9, 9, 9]", "(((", "illegal"),
        ("3", "10+10+3+1=24", "unparsed"),
        ("[1, 3, 10, 10]", None, "unparsed"),
    ],
)
def test_number_field_and_order_of_verdicts(number, formula, verdict):
    assert judged(answer(formula).replace("[1, 3, 10, 10]", number))["verdict"] == verdict


@pytest.mark.parametrize(
    "cards, recognized",
    [
        ('["a", 3, "k ", "10"]', True),
        ('["A", "3", "K", "9"]', False),
        ('["A", "3", "K", "10", "10"]', False),
        ('["A", "3", "K", ["10"]]', False),
        ("null", False),
    ],
)
def test_cards_field(cards, recognized):
    text = ANSWER.replace(json.dumps(HAND), cards)
    for task, otherwise in (("gp-l", "correct"), ("gp-vl", "misread")):
        info = judged(text, task)
        assert (info["verdict"], info["recognized"]) == ("correct" if recognized else otherwise, recognized)
        info = judged(text.replace('"cards"', '"ranks"'), task)
        assert (info["verdict"], info["recognized"]) == ("unparsed", False)
    assert judged(answer("(((", cards=["A", "3", "K", "9"]), "gp-vl")["verdict"] == "misread"


def random_formula(rng, numbers):
    if len(numbers) == 1:
        return str(numbers[0])
    k = rng.randrange(1, len(numbers))
    left, right = random_formula(rng, numbers[:k]), random_formula(rng, numbers[k:])
    return f"({left}{rng.choice('+-*/')}{right})"


def test_verdicts_match_a_reference():
    rng, env, seen = random.Random(1), card_env(), Counter()
    for _ in range(3000):
        numbers = rng.choice([[1, 3], [1, 3], [10], [3, 2]]) + [10, 10]
        formula = random_formula(rng, rng.sample(numbers, len(numbers)))
        right = rng.choice(["24", "24", "=24", "-24", "8.71", ""])
        try:
            value = exact(formula)
            expected = "wrong_value" if numbers_of(formula) == [1, 3, 10, 10] else "wrong_numbers"
            if value == 24:
                expected = expected.replace("wrong_value", "correct") if right == "24" else "illegal"
        except ZeroDivisionError:
            expected = "illegal"
        assert env.judge(answer(f"{formula}={right}")).verdict == expected, (formula, right)
        seen[expected] += 1
    assert len(seen) == 4 and seen["correct"] > 2


# ---- reading a reply

DRAFT = {"cards": [], "number": [], "formula": "x"}
STEPS = json.dumps({"steps": [{"formula": "8*3", "value": 24.0, "ok": False}] * 400})[:-1] + ", " + ANSWER[1:]


@pytest.mark.parametrize(
    "text",
    [
        "{'cards': [A, 3, K, 10], 'number': [1, 3, 10, 10,], 'formula': '10+10+3+1=24'}",
        "Here {is} my answer: ```json\n" + ANSWER[:-1] + ', "x": {"y": []}}``` ok?',
        r'\frac{1}{2} {x} {"cards": [...], "number": [...], "formula": "?"} ' + ANSWER + " {done}",
        r"\frac{8}{3} " * 20_000 + ANSWER,
        "{" * 100_000 + ANSWER,
        '{"a":' * 20_000 + ANSWER,
        json.dumps(DRAFT) * 3000 + ANSWER,
        '{"thoughts": "' + "so " * 400_000 + '", ' + ANSWER[1:],
        '{"thoughts": ' + json.dumps('\\frac{8}{3} "so" {x: it\'s} ' * 500) + ", " + ANSWER[1:],
        '{"thoughts": "' + r'I "think {8}" of {\"cards\": [1]} and it\'s ' * 100 + '", ' + ANSWER[1:],
        '{x: 1} {"thought": "' + "{'a': 1} " * 500 + '", ' + ANSWER[1:],
        ANSWER + " {" * 2000,
        ANSWER + '{"cards": [1], "number": [' * 500,
        ANSWER + ANSWER[:-1],
        "x {a: 1} " + ANSWER + '{"cards":1}{"number":2}{"formula":3}' * 100,
        '[1, {"answer": [[' + ANSWER + "]]}]",
        *('{"a":' * n + ANSWER + "}" * n for n in (100, 10_000)),
        ANSWER[:-1] + ', "check": ' + json.dumps(DRAFT) + "}",
        ANSWER[:-1] + ', "note": ' + json.dumps(f"not {DRAFT} but {json.dumps(DRAFT)}") + "}",
        f'It\'s not "{json.dumps(DRAFT)}", but "{ANSWER}".',
        '{"note": "' + str(DRAFT) + '", ' + ANSWER[1:],
        ANSWER[:-1] + ', "steps": [[], {}, [{"x": [1, {}]}]], }',
        *(before + STEPS for before in ("", '{"cards": ["A", ' * 4, "{x: 1} " * 500)),
    ],
)
def test_last_complete_object_decides(text):
    assert judged(text)["verdict"] == "correct"
    assert judged(text.replace("10+10+3+1", "10+10+3-1"))["verdict"] == "wrong_value"


def test_incomplete_object_is_no_answer():
    for text in (ANSWER[:-1], ANSWER[1:], ANSWER.replace("}", "]"), ANSWER.replace('"number": ', "")):
        assert envs.parse_reply(text, envs.FIELDS) is None, text
    for text in (ANSWER + json.dumps(DRAFT), json.dumps(DRAFT) + ANSWER[:-1]):
        assert envs.parse_reply(text, envs.FIELDS) == DRAFT


@pytest.mark.parametrize(
    "written, value",
    [
        ('"Joe\'s "Best" Pizza is on your left"', 'Joe\'s "Best" Pizza is on your left'),
        ("'Joe's 'Best' Pizza'", "Joe's 'Best' Pizza"),
        (r'"Joe\u2019s "Best" \"Pizza\""', 'Joe’s "Best" "Pizza"'),
        (r"'it\'s \"so\" \u00e9'", 'it\'s "so" é'),
        ("''", ""),
        (r"'\q'", r"\q"),
        ('"line\nbreak"', "line\nbreak"),
        ('"' + r"\"" * 20_000 + '"', '"' * 20_000),
        ("forward()", "forward()"),
        ("3.0", 3),
        ("08", "08"),
        ("None", None),
        ("true", True),
        ("['A',3,K,]", ["A", 3, "K"]),
        ("{a: {'b': [], }, }", {"a": {"b": []}}),
    ],
)
def test_values_in_json_and_in_the_released_form(written, value):
    for form in ('{{"x": {}, "y": 1}}', "{{y:1,'x':{},}}", '{{\n"y" : 1 ,\n"x" : {}\n}} "and so on"'):
        read = envs.parse_reply(form.format(written), ("x", "y"))
        assert read == {"x": value, "y": 1} and type(read["x"]) is type(value), form


def test_reader_matches_a_reference():
    rng, pieces = random.Random(0), [*"{}[]:,\"'\\ \n7a\0é", '{"a":', '["', '":', '",', "{x: 'y'}", "it's"]
    pieces += ['\\"', "{a:'", "{}", '"formula":', "cards"]

    def garbage(most):
        return [rng.choice(pieces) for _ in range(rng.randint(0, most))]

    def value(depth):
        kind = rng.randrange(6 if depth else 4)
        if kind < 4:
            return "".join(garbage(6)) if kind < 2 else rng.choice([0, -12, 345, None])
        values = [value(depth - 1) for _ in range(rng.randint(0, 3))]
        return values if kind == 4 else {rng.choice("abc") * rng.randint(1, 2): v for v in values}

    def planted():
        names = [*envs.FIELDS, "more"]
        rng.shuffle(names)
        found = {name: value(4) for name in names}
        return rng.choice(
            [found, found, {"answer": found}, [1, found], found | {"answer": found | {"more": 1}}]
        )

    def reference(text):
        found, last, decoder = None, -1, json.JSONDecoder()
        for start in (i for i, c in enumerate(text) if c == "{"):
            try:
                read, end = decoder.raw_decode(text, start)
            except ValueError:
                continue
            if end > last and all(name in read for name in envs.FIELDS):
                found, last = read, end
        return found

    for _ in range(1500):
        parts = garbage(40)
        for _ in range(rng.randint(1, 3)):
            parts.insert(rng.randint(0, len(parts)), json.dumps(planted(), ensure_ascii=rng.random() < 0.5))
        text = "".join(parts)
        read, expected = envs.parse_reply(text, envs.FIELDS), reference(text)
        assert [read[name] for name in envs.FIELDS] == [expected[name] for name in envs.FIELDS], text


HOSTILE = [
    *("{", "[", "}", '"', "'", "\\", '\\"', "\"'", "{'", '{"', "\0", " ", "{a:", '{"a":', "{a:[", "[{", "1,"),
    *('"a":1,', "{a:1},", '{"cards":', '{"cards":["', '{"cards":1,"number":1,"formula":', '{a:"x'),
    *('{a:"x",', '":', '",', r"'\'\"', ", ANSWER, ANSWER[:-1], ANSWER[1:], "it's {x: ", r'{"\n":"\n",'),
]


def test_replies_are_judged_in_linear_time():
    """In the time of a plain loop over six times as many numbers, and of 300,000 more."""
    names, env = '"cards":1,"number":1,"formula":1', card_env()
    loop = min(seconds(lambda: sum(i * i for i in range(100_000))) for _ in range(10))
    for size, pattern in itertools.product((20_000, 300_000), HOSTILE):
        limit, much = loop * (3 + 6 * size / 100_000), pattern * ((size - 200) // len(pattern))
        for text in (
            much,
            names + much + names,
            ANSWER[:-1] + ', "x": ' + much + names + "}",
            '{"cards": ["' + much + '"], ' + names + "}",
        ):
            # Other processes of a busy machine slow a single try down.
            assert any(seconds(lambda: env.judge(text)) < limit for _ in range(8)), (pattern, text[:100])


def hostile_replies():
    yield from ["\ud800", '{"formula": "\\', "{'a': '\\'", "٣" * 50, "[" * 1_000_000]
    yield from (pattern * (9000 // len(pattern)) for pattern in HOSTILE)
    yield from [answer("(" * 100 + "10+10+3+1" + ")" * 90), answer("/".join(["9"] * 99))]
    yield from [answer("1", ["A" * 10_000]), answer("10+10+3+1", number=[10**400, "\ud800", "<|end|>", None])]
    parts = (
        "a ",
        "you ",
        "intersection of ",
        "- way ",
        "and ",
        "no landmark ",
        "no a ",
        "x",
        "; ",
        "there is ",
    )
    for part in parts:
        yield step_reply(part * (19_000 // len(part)), "")
        yield step_reply((part * 1000)[:987] + " intersection", "")
    rng, alphabet = random.Random(0), "{}[]:,\"'\\ \n\t0123456789+-*/=()AJQKcardsnumberformula\0é😀"
    for _ in range(1500):
        chars = list(ANSWER)
        for _ in range(rng.randint(1, 12)):
            at = rng.randrange(len(chars))
            chars[at : at + rng.randint(0, 3)] = rng.choices(alphabet, k=rng.randint(0, 3)) or [" "]
        yield "".join(chars)


@pytest.mark.parametrize("task", ["gp-l", "virl-l"])
def test_hostile_replies(task):
    env = card_env(verify_iter=1) if task == "gp-l" else street_env(verify_iter=1)
    start = {"cards": HAND} if task == "gp-l" else None
    for text in hostile_replies():
        env.reset(options=start)
        _, reward, terminated, truncated, info = env.step(text)
        assert terminated != truncated
        assert reward == env.rewards[info["verdict"]] + (env.rewards["budget"] if truncated else 0)
        assert info["feedback"].isascii() and "<" not in info["feedback"] and len(info["feedback"]) < 120
        if terminated:
            formula = envs.parse_reply(text, envs.FIELDS)["formula"].split("=")[0]
            assert exact(formula) == 24 and numbers_of(formula) == [1, 3, 10, 10]
        env.reset(options=start)
        assert any(seconds(lambda: env.judge(text)) < 0.010 for _ in range(5)), text[:100]


# ---- cards: the environment


def test_seed_fixes_the_episodes():
    state, hands = random.getstate(), []
    for seed in (7, 7, 8):
        env = envs.make("gp-l", "rule", seed=seed)
        hands.append([env.reset()[1]["cards"] for _ in range(20)])
    assert hands[0] == hands[1] != hands[2] and random.getstate() == state
    assert env.reset(seed=7)[1]["cards"] == hands[0][0]


@pytest.mark.parametrize("variant, faces", [("id", (10, 10, 10)), ("rule", (11, 12, 13))])
def test_hands_can_be_solved_and_follow_the_rule(variant, faces):
    value = {rank: i + 1 for i, rank in enumerate(envs.RANKS)} | dict(zip("JQK", faces))
    for replacement in (False, True):
        env = envs.make("gp-l", variant, 3, replacement=replacement)
        for _ in range(200):
            _, info = env.reset()
            assert info["numbers"] == [value[card] for card in info["cards"]]
            assert variant == "id" or set(info["cards"]) & set("JQK")
            info = env.step(env.wrong_reply())[4]  # a near miss
            assert info["verdict"] == "wrong_value"
            assert env.step(env.expert_reply())[1:4] == (5.0, True, False)


@pytest.mark.parametrize("variant", ["id", "rule"])
def test_replacement_deals_as_the_released_code_does(variant):
    """Any ranks; under the other rule three, and J, Q or K anywhere."""
    env, n = envs.make("gp-l", variant, replacement=True), 10_000
    dealt, expected, seen = Counter(tuple(env.reset()[1]["cards"]) for _ in range(n)), Counter(), Counter()
    for hand in itertools.product(envs.RANKS, repeat=4):
        faces = [rank in "JQK" for rank in hand]
        if env._solution(hand):
            expected[hand[0], *faces] += sum(faces) if variant == "rule" else 1
            seen[hand[0], *faces] += dealt[hand]
    assert sum(seen.values()) == n
    scale = n / sum(expected.values())
    cells = {cell: weight * scale for cell, weight in expected.items() if weight * scale >= 5}
    chi_square = sum((seen[cell] - expected) ** 2 / expected for cell, expected in cells.items())
    assert chi_square < len(cells) + 4 * math.sqrt(2 * len(cells)), (chi_square, len(cells))


def test_diverse_hands_draw_their_rule():
    env, rules = envs.make("gp-l", seed=5, diverse=True), []
    for seed in range(80):
        observation, info = env.reset(seed)
        rules.append(tuple(env.faces.values()))
        assert "J is {J}, Q is {Q}, K is {K}".format(**env.faces) in observation.messages[0]["content"]
        assert env.step(env.expert_reply())[1] == 5
    assert len(set(rules)) > 60 and set().union(*rules) == set(range(1, 11))
    assert envs.make("gp-l", seed=0, diverse=True).reset(79)[1] == info


def test_prompts():
    env = envs.make("gp-l", "rule", target=30, operators="+*")
    text = env.reset()[0].messages[0]["content"]
    for part in ("30", "+*", "J is 11, Q is 12, K is 13", ", ".join(env.cards), '"formula"'):
        assert part in text
    for prompt, words, in_pictures in (
        (
            "${cards}, make $target {x}",
            "A, 3, K, 10, make 24 {x}",
            "in the picture, from left to right, make",
        ),
        ("$cards_list", "['A', '3', 'K', '10']", "in the picture"),
    ):
        assert card_env(prompt=prompt).messages[0]["content"] == words
        assert card_env("gp-vl", prompt=prompt).messages[0]["content"][-1]["text"].startswith(in_pictures)
    assert card_env("gp-vl", prompt="Make $target.").messages[0]["content"][-1]["text"] == "Make 24."


def test_feedback_can_be_replaced():
    table = {  # by verdict: template, reply, feedback
        "wrong_value": ("$$ $value is not $target", answer("10+10+3-1"), "$ 22 is not 24"),
        "wrong_numbers": ("[$number] $reason", answer("10+13+1"), "[13] There is no 13 left to use"),
        "illegal": ("No: ${reason}!", answer("(1"), "No: its brackets do not match!"),
        "unparsed": ("JSON for $target", "$target", "JSON for 24"),
        "misread": ("Look again", answer("1", cards=[]), "Look again"),
        "correct": ("Bravo", ANSWER, "Bravo"),
    }
    env = card_env("gp-vl", feedback={name: row[0] for name, row in table.items()}, verify_iter=9)
    for name, (_, text, feedback) in table.items():
        observation, *_, info = env.step(text)
        assert (info["verdict"], info["feedback"]) == (name, feedback)
        assert name == "correct" or observation.messages[-1]["content"] == feedback
    texts = {"wrong_numbers": "$number is missing"}
    assert judged(answer("10+10+3=24"), feedback=texts)["feedback"] == "1 is missing"


def test_field_names_of_other_alphabets():
    env = card_env(fields=("карты", "числа", "формула"))
    assert "карты" in env.expert_reply() and env.step(env.expert_reply())[1] == 5


def test_play_runs_in_lockstep():
    environments, calls = [envs.make("gp-l", seed=i, verify_iter=3) for i in range(4)], []

    def respond(indices, observations):
        calls.append(list(indices))
        return [environments[i].expert_reply() if len(calls) > i else "?" for i in indices]

    episodes = envs.play(environments, respond)
    assert calls == [[0, 1, 2, 3], [1, 2, 3], [2, 3]] and [len(e.turns) for e in episodes] == [1, 2, 3, 3]
    assert [e.success for e in episodes] == [True, True, True, False]


def test_foundation_corpus_of_cards():
    rng = random.Random(0)
    records = [sft.foundation_record(rng)["conversations"] for _ in range(600)]
    prompts = [turns[0]["value"] for turns in records]
    assert 0.08 < np.mean(["J is 10, Q is 10, K is 10" in text for text in prompts]) < 0.22
    assert 0.5 < np.mean(["J is 11, Q is 12, K is 13" in text for text in prompts]) < 0.7
    assert 0.15 < np.mean([len(turns) > 2 for turns in records]) < 0.35
    assert not any(f'"{name}"' in t["value"] for turns in records for t in turns for name in envs.FIELDS)
    answers = [envs.parse_reply(turns[-1]["value"], ()).values() for turns in records]
    formulas = [next(value for value in values if isinstance(value, str)) for values in answers]
    assert 0.41 < np.mean(["x" in f for f in formulas if "x" in f or "*" in f]) < 0.59


# ---- options


@pytest.mark.parametrize("task", envs.TASKS)
def test_option_limits_and_defaults(task):
    for name, (kind, default, option) in envs.options_of(envs.TASKS[task]).items():
        wrong = [object()] + [option.least - 1, option.most + 1, True] * (kind in (int, float))
        for value in wrong + ["odd"] * bool(option.choices):
            if value not in (math.inf, -math.inf):
                with pytest.raises(ValueError, match=name):
                    envs.make(task, **{name: value})
        assert default is None or option.check(name, kind, default) is None
        assert getattr(envs.TASKS[task], name) == default


@pytest.mark.parametrize(
    "task, wrong, words",
    [
        ("chess", {}, "unknown task"),
        ("gp-l", {"variant": "odd"}, "unknown variant"),
        ("gp-l", {"odd": 1}, "no option 'odd'"),
        ("gp-l", {"operators": "^"}, "operators must be some of"),
        ("gp-l", {"prompt": "$nope"}, "wrong placeholder"),
        ("gp-l", {"prompt": "Make $target. $rule. $$cards"}, "states the cards nowhere"),
        ("gp-l", {"fields": ("a", "a", "b")}, "3 different names"),
        ("gp-l", {"faces": {"J": 0, "Q": 1, "K": 1}}, "integers from 1"),
        ("gp-l", {"feedback": {"misread": "x"}}, "feedback must be"),
        ("gp-l", {"feedback": {"illegal": 5}}, "feedback must be"),
        ("gp-l", {"rewards": {"correct": math.nan}}, "finite number"),
        ("gp-l", {"rewards": {"correct": "5"}}, "finite number"),
        ("gp-l", {"rewards": ["correct"]}, "rewards must be a dict"),
        ("gp-vl", {"size": (9, 9)}, "size must be at least 32"),
        ("virl-l", {"data": ".", "split": "test"}, "split is for built-in streets"),
    ],
)
def test_wrong_options_are_named(task, wrong, words):
    with pytest.raises(ValueError, match=words):
        envs.make(task, **wrong)


def test_chosen_hands():
    _, info = envs.make("gp-l").reset(options={"cards": "a 3, K 10"})
    assert info["cards"] == HAND and info["numbers"] == [1, 3, 10, 10]
    env = card_env(cards=["3", "3", "8", "8"])
    assert env.step(env.reply("8/(3-8/3)=24"))[1] == 5  # exact where floats fail
    for cards in (["A", "A", "A", "A"], ["A", "3"], ["A", "3", "K", "11"], 5):
        with pytest.raises(ValueError):
            card_env(cards=cards)
    with pytest.raises(ValueError, match="no more than 4 cards"):
        card_env(cards=["5", "5", "5", "5", "5"], n_cards=5)
    with pytest.raises(ValueError, match="no hand"):
        envs.make("gp-l", n_cards=1, target=30).reset()


# ---- cards: the pictures


def has_red(picture):
    return (np.asarray(picture, int) @ (1, -1, -1) > 40).any()


def test_pictures_follow_seed_and_variant():
    first, again, other = (envs.make("gp-vl", seed=s).reset()[0].image for s in (1, 1, 2))
    assert first.size == (1200, 480) and first.tobytes() == again.tobytes() != other.tobytes()
    black, red = (envs.make("gp-vl", v, seed=5, **SMALL).reset() for v in ("id", "visual"))
    assert black[1] == red[1] and not has_red(black[0].image) and has_red(red[0].image)
    # With no jitter, the suits still differ.
    hands = [card_env("gp-vl", seed=s, jitter=0).picture.tobytes() for s in range(8)]
    assert len(set(hands)) > 1


@pytest.mark.parametrize("size, font_size, suit", [((1200, 480), 0.17, "hearts"), ((128, 64), 0.36, "clubs")])
def test_ranks_look_unlike_each_other(size, font_size, suit):
    pictures = [
        envs.draw_hand([rank] * 4, [suit] * 4, size, 0, font_size, random.Random(0)).convert("L")
        for rank in envs.RANKS
    ]
    for a, b in itertools.combinations(pictures, 2):
        assert sum(ImageChops.difference(a, b).histogram()[40:]) >= size[0] * size[1] / 250


def test_jitter_keeps_every_card_on_the_table():
    rng = random.Random(0)
    for _ in range(50):
        pixels = np.asarray(envs.draw_hand(["8"] * 4, ["spades"] * 4, (400, 160), 1.0, 0.17, rng))
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge == envs.TABLE).all()


def test_cards_in_pictures():
    env = card_env("gp-vl", ["A", "J", "Q", "A"], variant="rule", seed=3)
    record = envs.record(env, "")
    prompt = record["conversations"][0]["value"]
    assert prompt.startswith("<image>\nMake 24") and "J is 11, Q is 12, K is 13" in prompt
    assert "A, J" not in prompt and env.numbers == [1, 11, 12, 1] and record["image"] is env.observe().image
    _, reward, *_, info = env.step(env.expert_reply().replace('"Q"', '"K"'))
    assert (info["verdict"], reward, info["recognized"]) == ("misread", -1.5, False)
    assert not set("JQK") & set(info["feedback"]) and "misread" not in envs.make("gp-l").rewards
    assert (
        env.step(env.expert_reply())[1] == 5 and envs.record(env, "")["conversations"][0]["value"] == prompt
    )
    wrong = [env.reset()[0] and env.step(env.wrong_reply())[4]["verdict"] for _ in range(60)]
    assert set(wrong) == {"misread", "wrong_value"} and 15 < wrong.count("misread") < 45


def test_image_mark_and_its_newline():
    for text, parts in (
        ("<image>\n\nName.", ["<image>", "\nName."]),
        ("See <image>\nthis.", ["See ", "<image>", "this."]),
        ("See\n<image>\n", ["See\n", "<image>"]),
    ):
        assert [part.get("text", "<image>") for part in envs.parts_of(text)] == parts
        assert envs.text_of(envs.parts_of(text)) == text
    assert envs.parts_of("<image>Name.") == envs.parts_of("Name.") == envs.parts_of("<image>\nName.")
    assert envs.parts_of("\nName.") == [{"type": "image"}, {"type": "text", "text": "\nName."}]


# ---- streets: angles and distances


def test_angles_and_their_words():
    assert envs.wrap(180) == envs.wrap(-180) == 180 and envs.relative_word(180) == "right"
    for angle in range(-400, 400):
        turn = envs.wrap(angle)
        assert -180 < turn <= 180 and (turn - angle) % 360 == 0
        side = "right" if turn > 0 else "left"
        assert envs.relative_word(angle) == ("slightly " if abs(turn) <= 45 else "") + side
    words = [envs.compass_word(heading) for heading in (0, 22, 23, 90, 180, 270, 337, 338, 359.9)]
    assert words == "north north northeast east south west northwest north north".split()


def great_circle(a, b):
    """Metres and compass heading by spherical trigonometry."""
    (x, _), (y, _) = np.radians([a, b])
    apart, turn = y - x, math.radians(b[1] - a[1])
    chord = math.hypot(math.sin(apart / 2), math.sin(turn / 2) * math.sqrt(math.cos(x) * math.cos(y)))
    north = math.cos(x) * math.sin(y) - math.sin(x) * math.cos(y) * math.cos(turn)
    heading = math.degrees(math.atan2(math.sin(turn) * math.cos(y), north)) % 360
    return 6_371_000 * 2 * math.asin(chord), heading


def test_distance_and_bearing():
    rng = random.Random(0)
    for centre in ((40.75, -73.98), (-37.8, 144.96), (6.5, 3.4), (51.5, -0.0001), (60.0, 179.999)):
        for _ in range(200):
            a, b = (tuple(x + rng.uniform(-0.01, 0.01) for x in centre) for _ in range(2))
            metres, heading = great_circle(a, b)
            assert envs.distance(a, b) == pytest.approx(metres, rel=1e-4, abs=0.01)
            assert abs(envs.wrap(envs.bearing(a, b) - heading)) < 0.05


@pytest.mark.parametrize("lat, lon", [(40.75, 7), (-37.8, 7), (0.0, 7), (-16.8, 180)])  # 180: the date line
def test_nearest_panorama_matches_a_search_of_all(lat, lon):
    rng, found = random.Random(1), 0

    def near(reach):
        return lat + rng.uniform(-reach, reach), envs.wrap(lon + rng.uniform(-reach, reach))

    world = envs.World((), {near(0.002): str(k) for k in range(300)})
    for at in [*world.panoramas, *(near(0.0025) for _ in range(500))]:
        best = min(world.panoramas, key=lambda p: envs.distance(p, at))
        if envs.distance(best, at) <= 20:
            assert world.nearest(at) == best
            found += 1
        else:
            with pytest.raises(ValueError, match="no panorama within 20 m"):
                world.nearest(at)
    assert 400 < found < 750


# ---- streets: the released files

# A route as docs/formats has it, written by hand: about 110 m a leg, west, then north, then north-east.
MILESTONES = """{
  "intersection_idx": "1",
  "landmarks": "Starbucks is on your left behind",
  "to_next_intersection_heading": "270 (west)",
}
{
  "landmarks": "No landmarks nearby",
  "to_next_intersection_heading": "0 (north)",
}
{
  "landmarks": "The destination Joe's Bar is on your right",
  "to_next_intersection_heading": "37 (northeast)",
}"""
CORNERS = [[40.7500, -73.9800], [40.7500, -73.9813], [40.7510, -73.9813], [40.7517, -73.9806]]
ROUTE = {
    "start_place": {"relocated_geocode": CORNERS[0], "rating": 4.5},
    "init_heading": 350,
    "polyline": None,
    "dest_place": {"name": "Joe's Bar", "geocode": [40.7518, -73.9806]},
    "route_results": {"geocode_list": CORNERS[1:], "landmark_list": [{"name": "Starbucks"}, None]},
    "milestone_info": MILESTONES,
}


IDS = {
    (a[0] + (b[0] - a[0]) * k / 10, a[1] + (b[1] - a[1]) * k / 10): f"p{i}_{k}"
    for i, (a, b) in enumerate(zip(CORNERS, CORNERS[1:]))
    for k in range(11)
}  # a panorama at every corner and about every 11 m between


def write_folder(folder, content=None, ids=IDS, pictures=False):
    """A released folder of ROUTE. Pictures are ramps of grey from left to right, turned by 30 degrees."""
    text = content if isinstance(content, str) else json.dumps(content or [[ROUTE], 7])
    (folder / "route_infos.json").write_text(text)
    (folder / "gps_pano_mapping.pkl").write_bytes(ids if isinstance(ids, bytes) else pickle.dumps(ids))
    if pictures:
        (folder / "street_views").mkdir()
        ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (32, 1, 3))
        for name in ids.values():
            Image.fromarray(ramp).save(folder / "street_views" / f"{name}.jpg", quality=100)
            metadata = json.dumps({"rotation": 30.0, "date": "2019"})
            (folder / "street_views" / f"{name}.metadata.json").write_text(metadata)
    return folder


def route_with(**changes):
    """ROUTE in a list, with some fields changed."""
    route = copy.deepcopy(ROUTE)
    for names, value in changes.items():
        *path, last = names.split("__")
        record = route
        for name in path:
            record = record[name]
        record[last] = value
    return [[route], 1]


def milestones_with(old, new):
    assert old in MILESTONES
    return route_with(milestone_info=MILESTONES.replace(old, new))


def street_env(variant="id", content=ROUTE, ids=IDS, **options):
    """An environment of ROUTE, or of other routes, with no points between the turns."""
    world = envs.World(envs.read_routes(content), ids)
    return envs.make("virl-l", variant, data=world, **{"drop": 1.0} | options)


def walk(env, seed=None, options=None):
    """An episode of the expert."""
    (episode,) = envs.play([env], lambda indices, observations: [env.expert_reply()], [seed], [options])
    assert episode.success and all(turn.reward == 1 for turn in episode.turns)
    return episode


def test_released_folder_loads_and_plays(tmp_path):
    env = envs.make("virl-l", data=write_folder(tmp_path), drop=0.0, points_per_leg=1)
    episode = walk(env, 0)
    assert (
        "1. Turn left to face west. 2. Move forward to an intersection: Starbucks is on your left behind. "
        "3. Turn right to face north. 4. Move forward to an intersection. 5. Turn slightly right to face "
        "northeast. 6. Move forward to the destination: the destination Joe's Bar is on your right. "
    ) in episode.prompt
    turns = [f"turn_direction({word})" for word in ("west", "north", "northeast")]
    assert episode.expected == [action for turn in turns for action in (turn, "forward()")] + ["stop()"]
    texts = [turn.feedback for turn in episode.turns]
    assert texts[1] == "You see: Starbucks is on your left behind; an intersection."
    assert texts[5] == "You see: The destination Joe's Bar is on your right."
    assert [turn.landmark for turn in episode.turns] == [False, False, True, False, False, False, True]
    assert all(turn.recognized for turn in episode.turns)
    turns = [f"turn_direction({word})" for word in ("left", "right", "slightly right")]
    assert walk(street_env("rule"), 0).expected == [*turns, "stop()"]
    write_folder(tmp_path, json.dumps(ROUTE))  # some released files hold one bare route
    assert envs.load_world(tmp_path).routes == env.world.routes


@pytest.mark.parametrize(
    "first, heading, relative, compass",
    [
        (350, "10 (north)", "slightly right", "north"),
        (10, "-80 (west)", "left", "west"),
        (10, "170 ( SouthEast ) ", "right", "southeast"),
        (10, "170", "right", "south"),
        (10, "350 (uptown)", "slightly left", "north"),
    ],
)
def test_expert_turns(first, heading, relative, compass):
    """By the compass word of the file. The second leg goes on as the first."""
    milestones = MILESTONES.replace("270 (west)", heading).replace('"0 (north)', f'"{heading}')
    content = route_with(init_heading=first, milestone_info=milestones)
    for variant, words in (("id", (compass, compass)), ("rule", (relative, "slightly left"))):
        episode = walk(street_env(variant, content))
        assert episode.expected[:2] == [f"turn_direction({word})" for word in words]
        assert episode.expected[2].startswith("turn_direction") and episode.expected[3:] == ["stop()"]
        assert f" 1. Turn {relative} to face {compass}. " in episode.prompt
        assert f" 3. Turn slightly left to face {compass}. " in episode.prompt


def test_points_between_turns():
    env = street_env(drop=0.0)
    actions = walk(env).expected
    names = [IDS[waypoint.geocode] for waypoint in env.waypoints]
    assert names[1:5] == ["p0_2", "p0_4", "p0_6", "p0_8"]
    assert [k for k, action in enumerate(actions) if action != "forward()"] == [0, 5, 10, 15]
    # Of points every 11 m, three are near the panorama halfway, and the outer ones are the ends.
    ids = {at: name for at, name in IDS.items() if name.partition("_")[2] in ("0", "5", "10")}
    env = street_env(ids=ids, drop=0.0, points_per_leg=9)
    env.reset()
    assert [IDS[waypoint.geocode] for waypoint in env.waypoints[1:4]] == ["p0_5"] * 3
    assert [waypoint.action for waypoint in env.waypoints[4:6]] == ["turn_direction(north)", "forward()"]


class Bomb:
    def __reduce__(self):
        return print, ("code ran",)


def framed(*parts):
    """A pickle of protocol 4, each part in its frame."""
    frames = (b"\x95" + len(part).to_bytes(8, "little") + part for part in (b"\x80\x04}", *parts))
    return b"".join(frames)


@pytest.mark.parametrize(
    "content, words",
    [
        ([], "no routes"),
        ([[3]], "route 0: start_place"),
        (route_with(start_place__relocated_geocode=None), "start_place.relocated_geocode: no"),
        (route_with(start_place__relocated_geocode=[1000, 2]), "latitude"),
        (route_with(start_place__relocated_geocode=["a\nb", 2]), "latitude"),
        (route_with(route_results__geocode_list=[]), "geocode_list"),
        (route_with(route_results__geocode_list=[[1, 2]]), "3 blocks for 1 points"),
        (route_with(init_heading=10**400), "init_heading"),
        *(
            (milestones_with("37 (", f"{degrees}("), "block 3.to_next_intersection_heading")
            for degrees in ("", "999 ", "\u0663 ")
        ),
        *(
            (milestones_with("Starbucks is on your left behind", text), "block 1.landmarks")
            for text in ("<image>", "\ud800", "a" * 400, "***")
        ),
    ],
)
def test_unusable_routes_are_named_in_one_line(content, words):
    check_refusal(lambda: envs.read_routes(content, "FILE"), f"FILE: .*{words}")


@pytest.mark.parametrize(
    "content, ids, words",
    [
        ('[[{"start_place": ', IDS, "cannot be read"),
        ("[" * 100_000, IDS, "cannot be read"),
        (route_with(start_place__relocated_geocode=[41, -73.98]), IDS, "route 0: start_place.*no panorama"),
        (None, b"", "cannot be read"),
        (None, pickle.dumps(Bomb()), "GLOBAL"),
        (None, framed(b"cos\nsystem\n."), "GLOBAL"),
        # Deep tuples, whose hash could take for ever.
        (None, b"\x80\x04}K\x01K\x01" + b"\x86" * 10**6 + b"K\x01s.", "pairs of numbers"),
        (None, framed(b"(" * 3 + b"K\x01", b"K\x01t", b"K\x01", b"K\x01t", b"K\x01s."), "pairs of numbers"),
        (None, b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}.", "cannot be read"),  # a frame of eight exabytes
        (None, b"\x80\x04}r" + (64_000_000).to_bytes(4, "little") + b".", "memo"),  # a gigabyte
        *(
            (None, pickle.dumps(ids), ": no panorama id: not a dict")
            for ids in ({"a": "b"}, {(1, 2): 3}, {(1, 2): "../p"}, {(1, 2): "a\nb"}, {(1, 2): "p" * 5000})
        ),
    ],
)
def test_unusable_files_are_named_in_one_line(tmp_path, capsys, content, ids, words):
    folder = write_folder(tmp_path, content, ids)
    check_refusal(lambda: envs.load_world(folder), f"(route_infos.json|gps_pano_mapping.pkl).*{words}")
    assert capsys.readouterr().out == ""


def check_refusal(work, words):
    with pytest.raises(ValueError, match=words) as error:
        work()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("protocol, n", [(0, 9), (2, 9), (4, 45_000)])
def test_mappings_of_any_pickle_protocol_load(protocol, n):
    rng = random.Random(0)
    ids = {(rng.uniform(40, 41), rng.uniform(-74, -73)): "p" * rng.randint(1, 40) for _ in range(n)}
    data = pickle.dumps(ids | {(40, -73): "integers"}, protocol)
    names = [code.name for code, *_ in pickletools.genops(data)]
    # A large pickle is cut into frames, here also inside a key.
    assert n == 9 or ("BINFLOAT", "FRAME") in itertools.pairwise(names)
    assert envs._read_pickle(data) == ids | {(40, -73): "integers"}


def test_unusable_parts_of_a_folder_are_left_out(tmp_path, recwarn):
    whole = envs.load_world(write_folder(tmp_path))
    unused = {(0, 0): None, (1, 1): 7, (2, 2): "../p", (3, 3): "", (1000, 4): "p", (5, math.nan): "p"}
    for blank in ("\n{\n}", "\n{", ",\n{ },\n{\n}"):
        content = route_with(milestone_info=MILESTONES + blank)
        assert envs.load_world(write_folder(tmp_path, content, unused | IDS)) == whole
    assert not recwarn.list
    (far,), _ = route_with(route_results__geocode_list=[*CORNERS[1:3], [41, -73]])
    (short,), _ = route_with(milestone_info="{}")
    world = envs.load_world(write_folder(tmp_path, [[far, ROUTE, short, 3, ROUTE], 5]))
    (warning,) = recwarn.list
    fault = r"route 0: route_results.geocode_list.2: no panorama within 20 m of 41.000000, -73.000000"
    reason = f"route_infos.json: 3 of 5 routes cannot be walked and are left out, such as {fault}$"
    assert re.search(reason, str(warning.message)) and world.routes == 2 * whole.routes
    write_folder(tmp_path, [[far, short], 2])
    check_refusal(lambda: envs.load_world(tmp_path), f"route_infos.json: {fault}")


@pytest.mark.parametrize("old, new", [("\n", " "), (",\n}\n{", "},{"), ("\n}\n{\n  ", "}\n{")])
def test_milestones_may_stand_on_one_line(old, new):
    text = MILESTONES.replace("Starbucks", 'The "{Old}", "Mill"')
    blocks = envs._milestones(text)
    assert len(blocks) == 3 and blocks[0]["landmarks"] == 'The "{Old}", "Mill" is on your left behind'
    assert old in text and envs._milestones(text.replace(old, new)) == blocks


def test_landmarks_of_the_file():
    text = re.sub('"landmarks": "(No|The)', r'"l": "\1', MILESTONES)
    for blank in ("\t", "\v", " \t ", "\x1f", "\u00a0"):
        milestones = text.replace("Starbucks is", f"Star{blank}bucks{blank}is{blank}")
        env = street_env(content=route_with(milestone_info=milestones, dest_place__name=f"Joe's{blank}Bar"))
        walk(env)
        landmarks = ["Star bucks is on your left behind", envs.NOTHING, "The destination Joe's Bar"]
        assert [waypoint.landmark for waypoint in env.waypoints[1:]] == landmarks
    content = milestones_with("The destination Joe's Bar is on your right", "no landmark nearby")
    assert envs.read_routes(content)[0].legs[-1].landmark == "The destination Joe's Bar"
    content[0][0]["dest_place"]["name"] = "<image>"
    check_refusal(lambda: envs.read_routes(content), "block 3.landmarks")
    assert envs.read_routes(route_with(init_heading=0))[0].heading is None  # drawn in each episode


def test_written_world_reads_back(tmp_path):
    city, rng = envs.built_in_city("new york", 0), random.Random(4)
    content = [[city.route(rng, turns) for turns in range(1, 6)], 5]
    envs.write_world(tmp_path, content, city.panoramas)
    assert envs.load_world(tmp_path) == envs.World(envs.read_routes(content), city.panoramas)

    def interrupted(at):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        envs.write_world(tmp_path, content, city.panoramas, interrupted)
    check_refusal(lambda: envs.load_world(tmp_path), "route_infos.json cannot be read")


# ---- streets: the built-in cities

CITIES = [("new york", 0), *envs.TEST_CITIES]


def moves(words):
    return {"forward()", "stop()", *(f"turn_direction({word})" for word in words)}


def test_built_in_routes():
    ends = {}
    for split in envs.SPLITS:
        for variant, words in (("id", envs.COMPASS), ("rule", envs.RELATIVE)):
            env = envs.make("virl-l", variant, split=split, drop=0.8)
            for number in range(0, 2048, 64):
                assert set(walk(env, number, {"route": number}).expected) <= moves(words)
        routes = env.world.routes
        ends[split] = {route.legs[-1].end for route in routes}
        assert {len(route.legs) for route in routes} == set(range(2, 9))
        assert len({(route.start, tuple(leg.end for leg in route.legs)) for route in routes}) == 2048
    assert sum(map(len, ends.values())) == len(set().union(*ends.values()))
    assert 100 < len(envs.make("virl-l", turns=1, split="test").world.routes) < 2048
    env, seen = envs.make("virl-l", "rule", drop=1.0), Counter()
    for number in range(2048):
        env.reset(options={"route": number})
        seen.update((k == 0, waypoint.action) for k, waypoint in enumerate(env.waypoints[:-1]))
    assert len(seen) == 8 and all(n > (200 if at_start else 20) for (at_start, _), n in seen.items())


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_visual_variant_walks_all_test_cities(every):
    for split in envs.SPLITS if every == 1 else ("train",):
        env = envs.make("virl-vl", "visual", split=split, view_size=16, panorama_width=64)
        for number in range(0, len(env.world.routes), every):
            walk(env, number, {"route": number})
    centres = {key: envs.built_in_city(*key).plan.centre for key in envs.TEST_CITIES}
    routes = env.world.routes
    starts = [min(centres, key=lambda key: envs.distance(centres[key], route.start)) for route in routes]
    assert Counter(starts) == dict.fromkeys(envs.TEST_CITIES, 2048 // 9)
    assert starts[:18] == 2 * list(envs.TEST_CITIES)
    for number, key in enumerate(envs.TEST_CITIES):
        assert set(walk(env, options={"route": number}).expected) <= moves(envs.COMPASS)
        at = env.waypoints[0].geocode
        assert env.world.picture(at)[0].tobytes() == envs.built_in_city(*key).draw(at, (64, 32)).tobytes()


def test_cities_share_no_names():
    assert [seed for _, seed in envs.TEST_CITIES] == list(range(101, 110))
    cities = [envs.built_in_city(*key) for key in CITIES]
    for a, b in itertools.combinations([city.plan for city in cities], 2):
        assert envs.distance(a.centre, b.centre) > 100_000 and not set(a.words) & set(b.words)
    ids = [name for city in cities for name in city.panoramas.values()]
    assert len(ids) == len(set(ids))


def test_foundation_corpus_of_walks():
    rng = random.Random(5)
    plans = [envs.built_in_city(*key).plan for key in CITIES]
    known = {word for plan in plans for word in (*plan.words, *plan.trades)}
    for _ in range(60):
        record = sft.foundation_walk(rng, 1, 1, cities=(envs.MADE_UP,), view_size=16, panorama_width=64)
        prompt, *turns = [turn["value"] for turn in record["conversations"]]
        fields = re.findall(r'"([a-z]+)": "\.\.\."', prompt)
        assert len(fields) == 3 and all(field in turns[-1] for field in fields)
        assert not set(fields) & set(envs.STREET_FIELDS) and not known & set(
            re.findall("[A-Z][a-z]+", prompt)
        )


def test_one_reply_in_five_of_a_walk_is_wrong():
    env, replies, stops = envs.make("virl-l", turns=1, points_per_leg=0, verify_iter=5), [], []
    for seed in range(300):
        env.random.seed(seed)
        turns = [turn["value"] for turn in sft.imperfect_demonstration(env)["conversations"]]
        replies += [not text.startswith("You see") for text in turns[2::2] if "You are led on" not in text]
        if env.decision == env.decisions - 1:
            stops.append(envs.parse_reply(turns[-1], env.fields)["action"] == "stop()")
    assert 0.15 < np.mean(replies) < 0.25 and np.mean(stops) > 0.7


# ---- streets: the verifier

STRAND, CAFE = "Strand Cafe is on your left behind", "Intersection Cafe is on your left"
LEFT, BEHIND = "Starbucks is on your left", "The destination Joe's Bar is on your right behind"
BANK = "No. 9, Left Bank and Not Just Bagels is on your right"
NOTHING = "No landmarks nearby"
ODD = [
    "Left is on your right",
    "Back Bay is on your back left",
    "No landmarks, nothing at all! is on your left",
    "Don't Walk is on your left behind, no entry",
    "The destination",
    "Turn right at the X",
    "\u0130\u0e01\u0e35_3 is on your left",
]


def step_reply(report, action):
    return json.dumps(dict(zip(envs.STREET_FIELDS, (report, "Go.", action))))


def judged_step(report, action, landmark=STRAND, intersection=False, right="forward()"):
    waypoint = envs.Waypoint((0, 0), 0.0, landmark, intersection, "Go.", right)
    names = {"starbucks", "joesbar", "left", "right", "your", "thedestination"}
    return envs.judge_step(step_reply(report, action), waypoint, names=names)


def test_wrong_steps_and_budget():
    for go_on in (False, True):
        env = street_env(continue_after_failure=go_on)
        env.reset()
        observation, *judgement, info = env.step(step_reply(NOTHING, "forward()"))
        assert judgement == [-1, False, False] and info["verdict"] == "wrong_action" and env.decision == 0
        assert observation.messages[-1]["content"] == "That action is wrong here. Try again."
        observation, *judgement, info = env.step(step_reply("an intersection", "stop()"))
        assert judgement == [-2.5, False, not go_on] and info["verdict"] == "wrong_observation"
        assert (info["waypoint"], env.decision) == (0, 1)
    feedback = "That action is wrong: there is no intersection here. You are led on. You see: Starbucks"
    assert observation.messages[-1]["content"].startswith(feedback)
    assert all(env.judge(env.wrong_reply()).verdict == "wrong_action" for _ in range(50))
    assert env.world.names == {"starbucks", "joesbar"}  # a report may name no other one
    for other, recognized in (("Joe's Bar", False), ("the corner", True)):
        report, action = f"Starbucks and {other} are on my left, behind", env.here.action
        info = env.step(step_reply(report, action if recognized else ""))[4]
        assert (info["landmark"], info["recognized"]) == (True, recognized)
    assert env.step(env.expert_reply())[4]["landmark"] is False
    *judgement, info = env.step(env.expert_reply())[2:]  # at the goal, but the route has failed
    assert (*judgement, info["verdict"]) == (False, True, "correct")
    assert env.step(env.expert_reply())[1:4] == (0.0, False, True)


def test_actions_may_differ_in_case_quotes_and_blanks():
    right = "turn_direction(slightly left)"
    same = [" Turn_Direction( slightly  LEFT ) ", "'turn_direction'(\"slightly left\" )"]
    others = ["turn_direction(slightlyleft)", "t-u-r-n_direction(slightly left)", f"{right}!", ""]
    for action in same + others:
        verdict = judged_step(NOTHING, action, right=right).verdict
        assert verdict == ("correct" if action in same else "wrong_action"), action


def test_action_counts_whatever_the_report():
    long = ("I wonder {so} far, " + "hm, " * 12) * 250
    for report in ("x" * 5000, long + STRAND, None, 5, [STRAND], {"a": 1}, STRAND, f"{STRAND:5000}"):
        recognized = isinstance(report, str) and report.startswith("Strand")
        assert judged_step(report, "forward()") == ("correct", "Correct.", recognized)
        # A report without a word of the intersection leaves it out.
        verdict = judged_step(report, "stop()", intersection=True)
        assert (verdict.verdict, verdict.recognized) == ("wrong_observation", recognized)
    for action in (None, 5, ["forward()"]):
        unread = "unparsed", "The answer is not in the form asked for.", False
        assert judged_step(STRAND, action) == unread


@pytest.mark.parametrize(
    "report, landmark, claims, recognized",
    [
        (f"{STRAND}; an intersection", STRAND, True, True),
        (f"There is an intersection where {STRAND}", STRAND, True, True),
        ("Cafe\u0301 Noir is on my left", "Café Noir is on your left", False, True),
        ("Strand Cafe is on my left behind; I observe an intersection", STRAND, True, True),
        ("You are at an intersection.", NOTHING, True, True),
        (STRAND, NOTHING, False, False),
        ("Bank is on your left", "The destination Bank is on your left", False, True),
        ("The Intersection", "The Intersection", False, True),
        ("Intersection Cafe is on my left; an intersection", CAFE, True, True),
        *((f"{words}; an intersection", words, True, True) for words in ODD),
    ],
)
def test_verdict_of_a_report(report, landmark, claims, recognized):
    for there in (False, True):
        right, wrong = (judged_step(report, action, landmark, there) for action in ("Forward ( )", "stop()"))
        assert right == ("correct", "Correct.", recognized)
        expected = "wrong_action", "That action is wrong here."
        if claims != there:
            truth = f"there is {'an' if there else 'no'} intersection here"
            expected = "wrong_observation", f"That action is wrong: {truth}."
        assert wrong == (*expected, recognized)


CLAIMS = """\
There’s a busy intersection here.
I am at a T-intersection
There are 4-way intersections.
Intersection ahead
You are at the intersection of Broadway and 5th
There are no landmarks at this intersection
No landmarks nearby and an intersection
""".splitlines()
NO_CLAIMS = """\
There is no intersection
There’s no 4-way intersection
I am not at an intersection
There is no landmark and no intersection
Intersection Cafe is on your left
Cafe at the Intersection is on your left

""".splitlines()


@pytest.mark.parametrize("report", CLAIMS + NO_CLAIMS)
def test_claims_of_an_intersection(report):
    for there in (False, True):
        verdict = judged_step(report, "stop()", NOTHING, there).verdict
        assert verdict == ("wrong_action" if (report in CLAIMS) == there else "wrong_observation")


REPORTS = {  # by landmark: reports that recognize it, and reports that do not
    LEFT: (
        """
Starbucks (left)
There's a Starbucks to my left and an intersection ahead
I'm not at an intersection, but Starbucks is on my left
Starbucks is on your left; there are no other landmarks and nothing else""",
        """
I see Starbucks
Starbuck is on your left
Starbucks is on your right
Starbucks is on your left; behind me there is a park
Starbucks is on your rear left
Starbucks is on your left; McDonald's is on your left
Starbucks is on my left, near the destination Joe's Bar
Starbucks isn’t on your left
I can't see any Starbucks at the intersection on my left
No landmarks nearby; Starbucks is on your left""",
    ),
    BEHIND: (
        """
joes bar on the right, to the rear
You have reached the destination, Joe's Bar, on your right, back there""",
        """
The destination Joe's Bar is on your right
The destination is on your right behind""",
    ),
    BANK: (
        """
I see No 9 Left Bank and Not Just Bagels on my right""",
        """
I see No 9 Left Bank and Not Just Bagels on my left
I see no No. 9, Left Bank and Not Just Bagels on my right""",
    ),
    "The destination": (
        """
I have reached the destination""",
        """
I have not reached the destination""",
    ),
    NOTHING: (
        """
No landmark
There are no landmarks here; no intersection
There isn't a single landmark nearby, but an intersection
Nothing
none""",
        """
a zebra
Nothing but Joe's Bar
No landmarks nearby; Starbucks is on your left
an intersection; something on my left""",
    ),
}


@pytest.mark.parametrize("landmark", REPORTS)
def test_recognition_of_landmarks(landmark):
    for recognized, reports in zip((True, False), REPORTS[landmark]):
        for report in reports.strip().splitlines():
            verdict = judged_step(report, "forward()", landmark)
            assert verdict == ("correct", "Correct.", recognized), report


# ---- streets: the views


@pytest.mark.parametrize("heading, rotation", [(0, 0), (181, 0), (359, 77.5), (90, 300)])
def test_view_is_gnomonic(heading, rotation):
    def colors(longitude, up):  # smooth on the sphere
        waves = np.cos(longitude), np.sin(longitude), up
        return 127.5 + 127.5 * np.stack(np.broadcast_arrays(*waves), -1)

    column, row = np.radians(np.arange(360) + 0.5), np.radians(np.arange(180) + 0.5)
    panorama = colors(column, np.cos(row)[:, None])
    # The pixels' directions in space: x to the right, y up, z ahead.
    x, y = np.meshgrid(np.linspace(-8 / 9, 8 / 9, 9), np.linspace(8 / 9, -8 / 9, 9))
    longitude = np.radians(heading + rotation) + np.arctan2(x, 1)
    expected = colors(longitude, y / np.sqrt(x * x + y * y + 1))
    assert np.abs(np.asarray(envs.view(panorama, heading, rotation, 9)) - expected).max() <= 0.52


def test_signs_in_pictures():
    city = envs.built_in_city("new york", 0)
    for crossing in list(city.landmarks)[:4]:
        at = city.geocode(city.crossings[crossing])
        bearing = great_circle(at, city.geocode(sum(city.boards[crossing]) / 2))[1]
        for rotation in (0.0, 123.0, -bearing):
            panorama, heading = city.draw(at, (720, 360), rotation), (bearing + 40) % 360
            views = np.asarray(envs.look_around(panorama, rotation, heading, 100)).astype(int)
            dark = np.abs(views - city.plan.sign[0]).max(-1) < 12
            column = 50 + 50 * math.tan(math.radians(-40))
            rows, columns = np.nonzero(dark[:100, : int(column) + 12])
            assert len(columns) > 20 and abs(columns.mean() + 0.5 - column) < 3 and rows.mean() < 50
            front, *others = (
                half[:, k : k + 100].sum() for half in (dark[:100], dark[105:]) for k in (0, 105)
            )
            assert front > max(others)


@pytest.mark.parametrize("key", CITIES)
def test_sides_of_signs(key):
    city, rng, sides = envs.built_in_city(*key), random.Random(3), set()
    boards = {
        city.landmarks[crossing]["name"]: np.mean(city.boards[crossing], 0) for crossing in city.landmarks
    }
    for _ in range(60):
        for leg in envs.read_routes(city.route(rng, rng.randint(1, 7)))[0].legs:
            if name := next((name for name in boards if name in leg.landmark), None):
                away = boards[name] - complex(*envs.offset(city.plan.centre, leg.end))
                ahead = away * np.exp(1j * math.radians(leg.heading))  # as if the leg led to the north
                side = ("right" if ahead.real > 0 else "left") + ("" if ahead.imag >= 0 else " behind")
                assert leg.landmark.endswith(f"is on your {side}"), (leg, ahead)
                sides.add(side)
    assert sides == {"right", "left", "right behind", "left behind"}


def test_judging_does_not_wait_for_pictures():
    env, times = envs.make("virl-vl", turns=1), []
    for seed in range(2):
        env.reset(seed=seed)
        reply = env.expert_reply()
        times.append(seconds(lambda: env.step(reply)))
        observation = env.observe()
        assert env.decision == 1 and observation.image is observation.image is env.observe().image
        assert observation.image.size == (605, 605)
    assert min(times) < 0.010


def test_walk_in_pictures(tmp_path):
    with pytest.raises(ValueError, match="street_views"):
        envs.make("virl-vl", data=write_folder(tmp_path))
    options = {"data": write_folder(tmp_path, pictures=True), "drop": 1.0, "view_size": 16}
    env, pictures = envs.make("virl-vl", **options), []

    def respond(indices, observations):
        texts = [envs.text_of(m["content"]) for m in observations[0].messages if m["role"] == "user"]
        assert "".join(texts).count("<image>") == 1 and texts[-1].startswith("<image>\n")
        assert all("".join(texts).count(name) == 1 for name in ("Starbucks", "Joe's Bar"))  # of the route
        pictures.append(observations[0].image)
        return [env.expert_reply()]

    assert envs.play([env], respond)[0].success
    assert len(pictures) == len(env.waypoints) == 4 and pictures[0] != pictures[1]
    # Facing 350 degrees with rotation 30: front is 20 degrees from the panorama's left edge.
    for layout, angles in (("compass", (20, 110, 200, 290)), ("legacy", (245, 335, 65, 155))):
        image = envs.make("virl-vl", view_layout=layout, **options).reset(seed=0)[0].image
        assert image.size == (37, 37)
        for corner, degrees in zip(((8, 8), (29, 8), (8, 29), (29, 29)), angles):
            assert image.getpixel(corner)[0] == pytest.approx(degrees / 360 * 255, abs=8)
    for tell, text in ((True, "You are at an intersection."), (False, "You see the picture.")):
        episode = walk(envs.make("virl-vl", tell_intersections=tell, **options))
        assert episode.turns[0].feedback == f"<image>\n{text}"


# ---- picture files


def encoded(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def row(mode, pixels, kind="PNG", **options):
    """A file of a picture of one row."""
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    if mode == "P":
        picture.putpalette([0, 0, 0, 200, 100, 0, 0, 0, 255])
    return encoded(picture, kind, **options)


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
PICTURES = {
    "16 bits": (row("I;16", [0, 257 * 100, 257 * 128 + 100, 2**16 - 1]), [0, 100, 128, 255]),
    "16 bits, big-endian": (b"P5 2 1 65535 \x64\x64\xff\xff", [100, 255]),
    "16 bits, one transparent": (row("I;16", [0, 257], transparency=257), [0, 255]),
    "alpha": (row("RGBA", [(*RED, 255), (*RED, 0), (*BLACK, 51)]), [RED, WHITE, (204, 204, 204)]),
    "a transparent color": (row("RGB", [RED, BLACK], transparency=BLACK), [RED, WHITE]),
    "palette, one transparent": (row("P", [0, 1], "GIF", transparency=0), [WHITE, (200, 100, 0)]),
    "ink": (row("CMYK", [(0, 255, 255, 0), (0, 0, 0, 255)], "TIFF"), [RED, BLACK]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_read_as_a_viewer_displays_them(name, tmp_path, recwarn):
    content, expected = PICTURES[name]
    (tmp_path / "file").write_bytes(content)
    picture = envs.read_picture(tmp_path / "file")
    assert picture.mode == "RGB" and picture.size == (len(expected), 1)
    pixels = np.asarray(picture).reshape(-1, 3).tolist()
    assert pixels == [list(x) if isinstance(x, tuple) else [x, x, x] for x in expected] and not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_pictures_are_set_upright(kind, tmp_path):
    lying = np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3)
    for orientation, upright in ((6, np.rot90(lying, -1)), (8, np.rot90(lying))):
        Image.fromarray(lying).save(tmp_path / "file", kind, exif=turned(orientation))
        pixels = np.asarray(envs.read_picture(tmp_path / "file"))[..., 0]
        assert pixels.shape == (3, 2) and np.abs(pixels - upright.astype(int)).max() <= 4


NOISE = Image.effect_noise((64, 64), 100)


@pytest.mark.parametrize(
    "content",
    [
        *(encoded(NOISE, kind)[:-1000] for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")),
        row("F", [0.5], "TIFF"),
        row("I", [2**16], "TIFF"),
        encoded(Image.new("1", (20_000, 10_000))),
        b"P5 1 1 65535 ",
        b"no picture",
        b"",
    ],
)
def test_unreadable_pictures_are_named_in_one_line(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError) as error:
        envs.read_picture(tmp_path / "file")
    assert re.fullmatch(rf"picture {tmp_path}/file cannot be read: .*\w.*", str(error.value))


@pytest.mark.parametrize(
    "name, content",
    [
        *(("p0_0.jpg", content) for content in (b"\xff\xd8 no picture", row("1", [0]))),
        *(("p0_0.metadata.json", content) for content in (b"{", b"[" * 100_000, b"[]", b'{"turned": 1}')),
        *(
            ("p0_0.metadata.json", b'{"rotation": %s}' % x)
            for x in (b"NaN", b"1e18", b"1" + b"0" * 400, b'"30"')
        ),
    ],
)
def test_unreadable_street_views_are_named_in_one_line(tmp_path, capsys, name, content):
    write_folder(tmp_path, pictures=True)
    env = envs.make("virl-vl", data=tmp_path, view_size=16)
    (tmp_path / "street_views" / name).write_bytes(content)
    check_refusal(env.reset, f"street_views/{name}")
    assert capsys.readouterr() == ("", "")


def test_missing_street_views(tmp_path, recwarn):
    folder = write_folder(tmp_path, pictures=True)
    options = {"data": folder, "drop": 0.0, "points_per_leg": 1, "view_size": 16}
    actions = walk(envs.make("virl-vl", **options), 0).expected
    assert not recwarn.list
    for name in ("p0_5.jpg", "p1_3.metadata.json"):
        (folder / "street_views" / name).unlink()
    env = envs.make("virl-vl", **options)
    assert walk(env, 0).expected == actions and env.observe().image
    assert IDS[env.waypoints[1].geocode] in ("p0_4", "p0_6")  # the next ones stand in
    for at, name in IDS.items():
        if envs.distance(at, CORNERS[2]) <= 20:
            (folder / "street_views" / f"{name}.jpg").unlink()
    with pytest.raises(ValueError, match="route 0: .*geocode_list.1: no panorama"):
        envs.make("virl-vl", **options)
    first, _ = recwarn.list
    assert "street_views: 2 of 31 panoramas are missing" in str(first.message)
