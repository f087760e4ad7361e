"""Evaluation: success under one variant, the distance to the initial policy, and the study's report and
figures.

Every checkpoint is asked the same deals (seeds "test/0", "test/1", ...), so the difference between two
checkpoints is a paired one. Training deals and those for choices ("valid/...") have other seeds. There are
only 1,820 sets of four ranks, so under the training rule most sets were seen in training; what is held out is
the other rule.
"""

import fnmatch
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import Any

import torch
from PIL import Image

import envs


def standard_error(p: float, n: int) -> float:
    """sqrt(p (1 - p) / N), of a share p of N (paper, section 4)."""
    return math.sqrt(p * (1 - p) / n) if n else 0.0


PICTURES = ("own", "blank", "shuffled")


@dataclass
class Reference:
    """The policy from which distances are measured, and what it says itself: by variant and number the first
    conversations, once they were sampled."""

    policy: Any
    conversations: dict[tuple[str, int], list] = field(default_factory=dict)


def evaluate(
    policy,
    environments: Sequence,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    series: str = "test",
    reference: Reference | None = None,
    pictures: str = "own",
    watch: Callable[[int], None] = lambda done: None,
) -> tuple[dict, list[envs.Episode]]:
    """Plays one episode per environment, shared out over the ranks; environment i plays hand i of the series,
    or walks route i of its world.

    Temperature 0 is greedy. `pictures`: as a control, others than the policy's "own", see `Disguise`. With a
    `reference` the result holds the `distances` to it. `outcomes` holds for each hand the number of the reply
    that solved it, 0 if none did; for a route, of the waypoint that took most replies. `watch` is told how
    many of this rank's episodes have ended.
    """
    for env in environments:
        env.continue_after_failure = (
            True  # accuracy speaks of all waypoints, and not of those before the first failure
        )
    streams, episodes = sampled(policy, environments, temperature, max_new_tokens, series, pictures, watch)
    result = {}
    if reference is not None:
        first = environments[: SAMPLED_FOR_KL * policy.world]
        which = first[0].variant, len(first)
        if which not in reference.conversations:
            own, _ = sampled(reference.policy, first, 1.0, max_new_tokens, series)
            reference.conversations[which] = own
        result = distances(policy, reference.policy, streams, reference.conversations[which])
    episodes = policy.gather(episodes)
    measured = summary(episodes, environments[0].verdicts)
    return measured | environments[0].measures(episodes) | result, episodes


def sampled(
    policy,
    environments: Sequence,
    temperature: float,
    max_new_tokens: int,
    series: str,
    pictures: str = "own",
    watch: Callable[[int], None] = lambda done: None,
) -> tuple[list, list[envs.Episode]]:
    """Lets the policy play this rank's share of the episodes: its conversations as streams, and the
    episodes."""
    n, k, world = len(environments), policy.rank, policy.world
    if n < world:
        raise ValueError(f"{n} episodes cannot be shared by {world} ranks")
    own = range(n * k // world, n * (k + 1) // world)
    seeds, options = zip(*environments[0].starts(series, n)[own.start : own.stop])
    with policy.responder(temperature, max_new_tokens, policy.generator(series)) as respond:
        shown = respond if pictures == "own" else Disguise(respond, pictures)
        mine = [environments[i] for i in own]
        episodes = envs.play(mine, shown, seeds, options, policy.rollout_batch, watch)
    return [stream for i in range(len(own)) for stream in respond.streams[i]], episodes


SAMPLED_FOR_KL = 128  # conversations of each rank, or as many as every rank has


def distances(policy, initial, streams: list, initial_streams: list) -> dict:
    """How far a policy has gone from the initial one: `kl_to_init`, the k3 estimate of
    KL(policy || initial) in nats per reply token, from `streams` that the policy sampled at temperature 1;
    `kl_from_init`, KL(initial || policy), from those of the initial one; `changed`, the share of weights that
    differ after rounding to bf16."""
    result = {}
    for name, p, q, own in (
        ("kl_to_init", policy, initial, streams),
        ("kl_from_init", initial, policy, initial_streams),
    ):
        fewest = -int(policy.largest(-len(own)))  # shards want as many forward passes on every rank
        total, tokens = policy.sum(*kl_sums(p, q, own[: min(SAMPLED_FOR_KL, fewest)]))
        result[name] = total / tokens
    differ = count = 0
    for p, q in zip(policy.model.parameters(), initial.model.parameters()):
        p, q = (x.to_local() if hasattr(x, "to_local") else x for x in (p.detach(), q.detach()))
        differ, count = differ + (p.bfloat16() != q.bfloat16()).sum().item(), count + p.numel()
    differ, count = policy.sum(differ, count)
    return result | {"changed": differ / count}


class Disguise:
    """Plays like `respond`, which is shown grey pictures ("blank") or, of those seen so far, any of other
    episodes ("shuffled"): what a policy can do without seeing. Raises ValueError where there are no
    pictures, or those of a single episode."""

    def __init__(self, respond: Callable, how: str):
        self.respond, self.how, self.random = respond, how, random.Random(0)
        self.seen: list[tuple[int, Image.Image]] = []  # the newest: environment and picture
        # By environment: its own picture and the one it is shown.
        self.instead: dict[int, tuple[Image.Image, Image.Image]] = {}

    def __call__(self, indices: list[int], observations: list[envs.Observation]) -> list[str]:
        new = [
            (i, o.image)
            for i, o in zip(indices, observations)
            if i not in self.instead or self.instead[i][0] is not o.image
        ]
        self.seen = (self.seen + new)[-512:]
        for i, image in new:
            others = [other for k, other in self.seen if k != i]
            if image is None or not others:
                raise ValueError(f"{self.how} pictures need a task with pictures and at least two episodes")
            shown = (
                Image.new("RGB", image.size, "grey")
                if self.how == "blank"
                else self.random.choice(others).copy()
            )
            self.instead[i] = image, shown
        return self.respond(
            indices, [envs.Observation(o.messages, self.instead[i][1]) for i, o in zip(indices, observations)]
        )


def summary(episodes: Sequence[envs.Episode], kinds: Sequence[str]) -> dict:
    """Success within the budget and at the first reply (of each waypoint) with standard errors, shares of the
    verdicts, which are of `kinds`, and of replies that were parsed and name the dealt cards, or at
    waypoints with a landmark that landmark; `recognized` has the latter for each hand."""
    n, shown = len(episodes), [[turn.recognized for turn in e.turns if turn.landmark] for e in episodes]
    outcomes = [e.most_tries() if e.success else 0 for e in episodes]
    success, first = sum(o > 0 for o in outcomes) / n, sum(o == 1 for o in outcomes) / n
    verdicts = Counter(turn.verdict for e in episodes for turn in e.turns)
    return {
        "episodes": n,
        "success": success,
        "success_se": standard_error(success, n),
        "first_success": first,
        "first_success_se": standard_error(first, n),
        "turns": verdicts.total() / n,
        "recognition": sum(map(sum, shown)) / max(1, sum(map(len, shown))),
        "recognized": [round(sum(named) / max(1, len(named)), 3) for named in shown],
        "verdicts": {kind: verdicts[kind] / verdicts.total() for kind in kinds},
        "outcomes": outcomes,
    }


@torch.no_grad()
def kl_sums(policy, other, streams: list, microbatch_size: int = 32) -> tuple[float, int]:
    """Sum over reply tokens of the k3 estimate of KL(policy || other), from streams that `policy` sampled at
    temperature 1, and the number of those tokens."""
    total, tokens, streams = 0.0, 0, sorted(streams, key=len)
    for i in range(0, len(streams), microbatch_size):
        batch = policy.collate(streams[i : i + microbatch_size])
        log_ratio = other(batch)["logp"] - policy(batch)["logp"]
        total += (log_ratio.clamp(max=20).exp() - 1 - log_ratio)[batch["mask"] > 0].sum().item()
        tokens += int(batch["mask"].sum())
    return total, tokens


# ------------------------------------------------------------------------------------------------ the results


# By measure, the field of a point that has it for each hand or route; a route without turns has None in
# "at_turns".
MEASURES = {
    "success": "outcomes",
    "recognition": "recognized",
    "step_accuracy": "steps",
    "turn_accuracy": "at_turns",
}


def of_hands(point: dict, key: str) -> list[float | None]:
    """What a point measured of each hand; None on a route without turns."""
    values = point[MEASURES[key]]
    return [outcome > 0 for outcome in values] if key == "success" else values


def over_hands(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean, and half of its 95% interval over hands. A row has one seed's values, of the same hands in all
    rows, or of the first of them; each hand's are averaged over seeds first."""
    hands = [mean(column) for column in zip(*rows)]
    return mean(hands), 1.96 * stdev(hands) / math.sqrt(len(hands))


def difference(a: Sequence[dict], b: Sequence[dict], key: str = "success") -> dict:
    """Paired difference a - b of success or another of MEASURES. Points of the same seeds on the same hands
    or routes; where one was measured on fewer, on those.

    `interval`, over hands, speaks of these seeds' checkpoints and other deals. `seed_interval`: Student's t
    over the seeds' differences; it speaks of other seeds after the same base."""
    rows = [
        [x - y for x, y in zip(of_hands(p, key), of_hands(q, key)) if x is not None]
        for p, q in zip(a, b, strict=True)
    ]
    seeds = [mean(row) for row in rows]
    middle, half = over_hands(rows)
    out = {"mean": middle, "interval": (middle - half, middle + half), "seeds": seeds, "seed_interval": None}
    if len(seeds) > 1:
        half = _T95[min(len(seeds) - 1, len(_T95)) - 1] * stdev(seeds) / math.sqrt(len(seeds))
        out["seed_interval"] = (middle - half, middle + half)
    return out


# Student's t, 97.5%, by degrees of freedom from 1.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Results:
    """The measured points of a study: `results.jsonl`, one line each."""

    def __init__(self, path: Path):
        self.path = path
        self.points = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, point: dict, write: bool = True) -> None:
        """Appends a point; the file is replaced whole, so a reader never sees half a line. Under torchrun
        one rank writes."""
        self.points.append(point)
        if not write:
            return
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(p) + "\n" for p in self.points))
        aside.replace(self.path)

    def of(self, seeds: Sequence[int], hands: Sequence[int]) -> "Results":
        """The points of some seeds (and of the base, whose seed is -1) on one of these numbers of hands."""
        chosen = Results(self.path)
        chosen.points = [p for p in self.points if p["episodes"] in hands and p["seed"] in (-1, *seeds)]
        return chosen

    def find(self, **wanted) -> list[dict]:
        """Points whose fields equal the wanted ones, in the order of seed and step."""
        found = [p for p in self.points if all(p.get(k) == v for k, v in wanted.items())]
        return sorted(found, key=lambda p: (p["seed"], p["step"]))

    def curve(self, arm: str, few: bool = False, **place) -> list[dict]:
        """The points of an arm on test hands, at temperature 1 unless `place` says otherwise; of each
        checkpoint the one on most hands, or with `few` on fewest, as all points between are measured."""
        place = {"series": "test", "temperature": 1.0, "pictures": "own"} | place
        points = sorted(self.find(arm=arm, **place), key=lambda p: p["episodes"], reverse=few)
        one = {(p["seed"], p["step"]): p for p in points}
        return [one[which] for which in sorted(one)]

    def ends(self, arm: str, **place) -> list[dict]:
        """One point per seed: of an arm's last checkpoint; of "ARM best", its best by success on validation
        hands (ID, temperature 1); of "ARM@K", its checkpoint number K."""
        name, best, _ = arm.partition(" best")
        name, number, k = name.partition("@")
        points = []
        for seed in sorted({p["seed"] for p in self.find(arm=name)}):
            curve = self.curve(name, **place, seed=seed)
            if best and curve:
                valid = self.find(arm=name, seed=seed, variant="id", series="valid")
                step = max(valid, key=lambda p: p[envs.task_class(p["task"]).headline])["step"]
                curve = [p for p in curve if p["step"] == step]
            elif number:  # counted over all that was measured, as greedily only the last one is
                steps = sorted({p["step"] for p in self.find(arm=name, seed=seed)})
                curve = [p for p in curve if p["step"] in steps[int(k) - 1 : int(k)]]
            points += curve[-1:]
        return points


# ------------------------------------------------------------------------------------------------- the claims


@dataclass(frozen=True)
class Claim:
    """That `arm` ends above (sign +1) or below (-1) `other`; both as `Results.ends` names them."""

    text: str
    arm: str
    other: str
    sign: int
    variant: str
    temperature: float = 1.0
    measure: str = "success"
    place: dict = field(default_factory=dict)  # how both were measured
    paper: str = "-"  # what it reports


def main_claims(task: str, where: dict[str, str], headline: str) -> list[Claim]:
    """What the paper found; `where`: the variants and what the report calls them."""
    claims = []

    def claim(text: str, variant: str, arm: str, other: str, sign: int, measure: str = headline, greedy=True):
        paper = PAPER.get((task, variant, measure), {})
        shown = f"{paper[arm]} against {paper[other]}" if other in paper else "-"
        words = f"{text} {where[variant]}"
        words += ", whole routes" if measure == "success" != headline else ""
        claims.append(Claim(words, arm, other, sign, variant, 1.0, measure, paper=shown))
        if greedy:
            claims.append(Claim(f"{words}, greedy", arm, other, sign, variant, 0.0, measure))

    for variant in where:
        # In other cities the paper counts whole routes.
        measures = ["success", headline] if variant == "visual" else [headline]
        for measure in dict.fromkeys(measures):
            claim("RL ends above init", variant, "rl", "init", +1, measure)
            if variant == "id":
                claim("SFT ends above init", variant, "sft", "init", +1)
                continue
            claim("SFT ends below init", variant, "sft", "init", -1, measure)
            claim("RL ends above SFT", variant, "rl", "sft", +1, measure)
            claim("RL ends above SFT's best checkpoint", variant, "rl", "sft best", +1, measure, greedy=False)
        if variant == "rule" and headline == "step_accuracy":  # the rest of a walk is the same under both
            claim("RL ends above init at turns", variant, "rl", "init", +1, "turn_accuracy")
            claim("SFT ends below init at turns", variant, "sft", "init", -1, "turn_accuracy")
            claim("RL ends above SFT at turns", variant, "rl", "sft", +1, "turn_accuracy")
        if "visual" in where and variant != "rule":
            claim("RL raises recognition", variant, "rl", "init", +1, "recognition")
            claim("SFT lowers recognition", variant, "sft", "init", -1, "recognition")
    return claims


# What the paper reports of init, SFT and RL in percent, by (task, variant, measure); its temperature is .2.
PAPER = {
    ("gp-l", "rule", "success"): {"init": 11.5, "sft": 3.4, "rl": 15.0},
    ("gp-vl", "rule", "success"): {"init": 11.2, "sft": 5.6, "rl": 14.2},
    ("gp-vl", "visual", "success"): {"init": 23.6, "sft": 13.7, "rl": 41.2},
    ("virl-l", "rule", "step_accuracy"): {"init": 80.8, "sft": 1.3, "rl": 91.8},
    ("virl-vl", "rule", "step_accuracy"): {"init": 35.7, "sft": 2.5, "rl": 45.0},
    ("virl-vl", "visual", "success"): {"init": 16.7, "sft": 11.1, "rl": 77.8},
}


@dataclass(frozen=True)
class Section:
    """What the report says of an experiment: a question, and claims about its arms. Each claim is (text, arm,
    compared with, sign, paper), "*" in a name stands for anything."""

    question: str
    claims: Sequence[tuple[str, str, str, int, str]] = ()
    figure: str = "ends"  # or "budgets", "starts", "distances", "none"


SECTIONS = {
    "no-init": Section(
        "Does RL need the init? Here it starts from the base, at three rates. `unparsed` are replies that "
        "are not in the form asked for.",
        [("RL from the base, {arm}, ends below RL from the init", "no-init-*", "rl", -1, "yes")],
        "none",
    ),
    "verification": Section(
        "Do more replies per hand help RL? It trains with 1, 3, 5 or 10 at equal compute; one evaluation "
        "with 10 replies tells all smaller budgets. So the shares of verdicts are of up to 10 replies here.",
        [
            ("{arm} ends above init", "rl-budget-*", "init", +1, "+0.5, +2.2, +3.0, +6.0 for 1, 3, 5, 10"),
            ("a budget of 10 ends above one of 1", "rl-budget-10", "rl-budget-1", +1, "yes"),
        ],
        "budgets",
    ),
    "start": Section(
        "From where does RL still heal what SFT forgot? RL starts from SFT's checkpoints, the later the more "
        "overfitted. A start was measured on a quarter of the hands, and differences are taken on those.",
        [("{arm} ends above its start", "rl-from-sft-*", "sft@*", +1, "not from an overfitted start")],
        "starts",
    ),
    "recognition": Section(
        "Do the policies look at the cards? They are shown grey pictures (`blank`), or those of other hands "
        "(`shuffled`), which name the same number of cards.",
        figure="none",
    ),
    "revision-sft": Section(
        "Is it the single turn that makes SFT forget? Here it learns from conversations with errors and the "
        "verifier's feedback.",
        [("SFT on revisions ends below init", "sft-revision", "init", -1, "yes")],
    ),
    "sft-search": Section("Does another rate, or a frozen part, save SFT? The paper: none passes 30% ID."),
    "reply-ratio": Section(
        "The paper's PPO has one ratio, value and advantage for each reply, half the weight for what stands "
        "before the answer, a value head that trains the trunk and a clip range of .1; ours a ratio for each "
        "token, a detached value head and .2.",
        [
            ("reply-level RL ends above init", "rl-reply", "init", +1, "yes"),
            ("token-level RL ends above reply-level RL", "rl", "rl-reply", +1, "-"),
        ],
    ),
    "rivals": Section(
        "What else keeps the other rule? All have the same compute and the same search for rates: DFT "
        "weights each token's loss by its probability, sft-at-dft-rate has DFT's rate alone; self-SFT "
        "samples as RL does and learns the replies that the verifier accepts; diverse arms are trained with "
        "J, Q, K counting anything from 1 to 10 in each hand, never 11 to 13; rl-kl has a KL penalty to the "
        "init.",
        [
            ("{arm} ends above init", "dft", "init", +1, "-"),
            ("{arm} ends above init", "self-sft", "init", +1, "-"),
            ("{arm} ends above init", "diverse-*", "init", +1, "-"),
            ("{arm} ends above init", "rl-kl", "init", +1, "-"),
            ("{arm} ends above {other}", "dft", "sft-at-dft-rate", +1, "-"),
            ("RL ends above {other}", "rl", "dft", +1, "-"),
            ("RL ends above {other}", "rl", "self-sft", +1, "-"),
            ("RL ends above {other}", "rl", "diverse-sft", +1, "-"),
            ("RL ends above {other}", "rl", "diverse-rl", +1, "-"),
            ("RL ends above {other}", "rl", "rl-kl", +1, "-"),
        ],
    ),
    "forgetting": Section(
        "Does the distance to the init predict what is forgotten? If so (2509.04259: the more KL(init, "
        "policy), the more is forgotten), the correlation with the change under the other rule is negative. "
        "One dot for every measured checkpoint: KL(p, q) in nats per reply token, in distribution, on "
        "replies of p; weights that changed after rounding to bf16.",
        figure="distances",
    ),
}


def section_claims(results: Results, name: str, variant: str, where: str, headline: str) -> list[Claim]:
    """The claims of an experiment under one variant, at temperature 1 and greedily, one for each arm that a
    "*" stands for."""
    budget = {"verify_iter": 10} if name == "verification" else {}
    names = list(dict.fromkeys(p["arm"] for p in results.points))
    claims = []
    for text, pattern, other, sign, paper in SECTIONS[name].claims:
        for arm in fnmatch.filter(names, pattern):
            against = other.replace("*", arm.rpartition("-")[2])
            words = f"{text.format(arm=arm, other=against)} {where}"
            claim = Claim(words, arm, against, sign, variant, 1.0, headline, place=budget, paper=paper)
            claims += [claim, replace(claim, text=f"{words}, greedy", temperature=0.0, paper="-")]
    return claims


def verdict(d: dict, sign: int) -> str:
    """What a difference says of a claim that expects `sign`: by the interval over hands, and every seed must
    agree in sign."""
    low, high = d["interval"]
    if low <= 0 <= high:
        return "not significant"
    if any(s * d["mean"] <= 0 for s in d["seeds"]):
        return "seeds disagree"
    return "holds" if d["mean"] * sign > 0 else "does not hold"


# ------------------------------------------------------------------------------------------------- the report


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _interval(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"[{100 * pair[0]:+.1f}, {100 * pair[1]:+.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


# Words of the report, by class of the task.
WORDS = {
    envs.Environment: {
        "hands": "episodes",
        "measure": "success",
        "columns": ("success", "first reply"),  # measures
        "last": "first reply",
        "cells": "First reply is the share of episodes solved by the first reply",
        "reads": "name what is shown",
    },
    envs.GeneralPoints: {
        "id": "In distribution: J, Q, K count 10, as in training.",
        "rule": "Other rule: 11, 12, 13, and every hand holds a face card.",
        "visual": "Other colour: red suits, the training rule.",
        "hands": "hands",
        "columns": ("success", "first reply", "illegal"),
        "last": "wrong numbers",
        "cells": "Illegal are the replies in form, in percent, with no legal equation, such as those with an "
        "x for a product (the tiny corpus's bad habit); wrong numbers are replies with a number which the "
        "rule in force does not give",
        "reads": "name the cards",
    },
    envs.VIRL: {
        "id": "In distribution: turns by the compass, on routes that training never walks.",
        "rule": "Other rule: left and right, on the same routes.",
        "visual": "Other cities: the training rule in nine cities that post-training never sees.",
        "hands": "routes",
        "measure": "per-step accuracy",
        "columns": ("steps", "first reply of each step", "routes"),
        "last": "turns",
        "cells": "Steps is the share of waypoints with the expert's action within the budget, turns that of "
        "the waypoints where one must turn, routes the share of routes with all of them",
        "reads": "name the landmark, where there is one",
    },
}


def words_of(cls: type[envs.Environment]) -> dict:
    """The words of the first base of a class that has some."""
    return WORDS[envs.Environment] | next(WORDS[base] for base in cls.__mro__ if base in WORDS)


@dataclass
class Report:
    """Writes report.md and, where matplotlib is installed, figures/*.png.

    `experiments`: by name, what was measured of each arm, as (arm, place) for `Results.ends`."""

    results: Results
    folder: Path
    settings: dict  # of the study
    experiments: dict[str, list[tuple[str, dict]]]

    def __post_init__(self):
        self.task = self.settings["task"]
        cls = envs.task_class(self.task)
        self.words, self.headline = words_of(cls), cls.headline
        self.usual = {"verify_iter": self.settings["verify_iter"]}
        self.where = {v: text for v, text in cls.variants.items() if self.ends("init", v)}
        self.last = "rule" if "rule" in self.where else "id"

    def ends(self, arm: str, variant: str, temperature: float = 1.0, **place) -> list[dict]:
        """`Results.ends`, measured as usual but for `place`."""
        return self.results.ends(arm, variant=variant, temperature=temperature, **self.usual | place)

    def write(self) -> list[str]:
        """Returns the lines of the table of claims."""
        claims = self.claims_table(main_claims(self.task, self.where, self.headline))
        lines = [*self.first_page(claims), *self.checkpoints()]
        for name in self.experiments:
            if name in SECTIONS:
                lines += self.section(name)
        lines += [
            "## Settings",
            "",
            "Compute counts processed tokens: 6 N per trained token, 2 N per generated or scored one. All "
            "arms get the same, and end with the step or update that reaches it: RL overshoots by up to one "
            "update.",
            "",
            "Every number is a mean over lines of `results.jsonl`: those of its arm, variant, temperature, "
            "`verify_iter` and `pictures`, of series `test`, at the last step of each seed.",
            "",
            "The arms, each with its settings where they are not the defaults of `sftrl sft` or `sftrl ppo`:",
            "",
            *table(["arm", "start", "algorithm", "settings"], self.settings["arms"]),
            "",
        ]
        (self.folder / "report.md").write_text("\n".join(lines), "utf-8")
        Figures(self).draw()
        return claims

    def first_page(self, claims: list[str]) -> list[str]:
        """Question, set-up, claims and curves of the main comparison."""
        words, first = self.words, self.ends("init", "id")
        seeds, n = ", ".join(str(p["seed"]) for p in first), first[0]["episodes"]
        others = ", ".join(text for v, text in self.where.items() if v != "id")
        counted = ["waypoints"] * (self.headline == "step_accuracy")
        counted += ["replies, for recognition"] * ("visual" in self.where)
        weighed = f" Differences average {words['hands']}, the shares before them {' and '.join(counted)}."
        weighed = weighed if counted else ""
        return [
            f"# Study {self.task}: does post-training teach the rule, or only its examples?",
            "",
            "```",
            f"base --> init: a short SFT --+--> SFT: demonstrations    --+--> tested {self.where['id']},",
            f"                             +--> RL: PPO and a verifier --+    {others}",
            "```",
            "",
            f"Seeds {seeds}; {n} evaluation {words['hands']} per end of an arm, the same for "
            f"all, and a quarter of them between; {words['measure']} in percent within "
            f"{self.settings['verify_iter']} replies. "
            + " ".join(words[v] for v in self.where if v in words),
            "",
            f"The model, {self.settings['model']}, has {self.settings['parameters'] / 1e6:,.1f}M parameters "
            "and is sampled at temperature 1 and greedily; the paper's has 11B, and a temperature of .2. "
            + self.settings["note"],
            "",
            "## Claims",
            "",
            *claims,
            "",
            f"A claim *holds* if the paired interval over {words['hands']} excludes 0 on the expected side "
            "and every seed's difference has that sign; it *does not hold* if all that is so on the other "
            "side. *Seeds disagree*: the interval excludes 0, but the signs differ. *Not significant*: the "
            "interval holds 0. That interval speaks of these checkpoints; the one over seeds (Student's t) "
            "speaks of other seeds after the same base. All speak of the learning rates in force." + weighed,
            "",
            "![success against compute](figures/curves.png)",
            "",
            "Lines are means over seeds, bands reach from the lowest seed to the highest.",
            "",
        ]

    def checkpoints(self) -> list[str]:
        """The main comparison in numbers: ends and curves."""
        words, best = self.words, ", ".join(str(p["step"]) for p in self.ends("sft best", "id"))
        recognition = (
            f"; recognition counts the replies that {words['reads']}" if "visual" in self.where else ""
        )
        return [
            "## Checkpoints",
            "",
            f"Means over seeds. {words['cells']}; KL is KL(policy || init) in nats per reply token on the "
            f"policy's own replies{recognition}.",
            "",
            *self.ends_table([("base", {}), *MAIN]),
            "",
            "SFT's best checkpoint is the one with the highest ID success on validation deals (seeds of "
            f"their own). Steps: {best}.",
            "",
            "## Curves",
            "",
            f"{words['measure'].capitalize()} at temperature 1, mean over seeds [lowest, highest]. Points "
            f"between are measured on a quarter of the {words['hands']}.",
            "",
            *self.curves_table(),
            "",
        ]

    def section(self, name: str) -> list[str]:
        """One experiment: its question, claims, ends and figure."""
        claims = []
        for variant in (v for v in self.where if v != "id"):
            claims += section_claims(self.results, name, variant, self.where[variant], self.headline)
        lines = [f"## {name}", "", SECTIONS[name].question, ""]
        lines += [*self.claims_table(claims), ""] if claims else []
        if name == "forgetting":
            lines += [*self.distances_table(), ""]
        else:
            main = MAIN if SECTIONS[name].figure == "ends" else []
            lines += [*self.ends_table(main + self.experiments[name], SECTIONS[name]), ""]
        return lines + ([f"![{name}](figures/{name}.png)", ""] if SECTIONS[name].figure != "none" else [])

    def claims_table(self, claims: Sequence[Claim]) -> list[str]:
        """One row for each claim whose arms were measured."""
        rows = []
        for c in claims:
            a, b = (self.ends(arm, c.variant, c.temperature, **c.place) for arm in (c.arm, c.other))
            shared = {p["seed"] for p in a} & {p["seed"] for p in b}
            a, b = ([p for p in points if p["seed"] in shared] for points in (a, b))
            if not shared:
                continue
            d = difference(a, b, c.measure)
            rows.append(
                [
                    c.text,
                    f"{_percent(_mean(a, c.measure))} against {_percent(_mean(b, c.measure))}",
                    f"{100 * d['mean']:+.1f} {_interval(d['interval'])}",
                    _interval(d["seed_interval"]),
                    ", ".join(f"{100 * s:+.1f}" for s in d["seeds"]),
                    f"**{verdict(d, c.sign)}**",
                    c.paper,
                ]
            )
        over = f"difference, 95% over {self.words['hands']}"
        return table(["claim", "measured", over, "95% over seeds", "each seed", "verdict", "paper"], rows)

    def ends_table(self, arms: Sequence[tuple[str, dict]], section: Section | None = None) -> list[str]:
        """What was measured of arms at their ends, by decoding."""
        columns = [*self.words["columns"], "KL"] + ["recognition"] * ("visual" in self.where)
        columns += ["unparsed"] * (section is SECTIONS["no-init"])
        head = [f"{text}: {c}" if not i else c for text in self.where.values() for i, c in enumerate(columns)]
        names = {"sft": "SFT, last", "sft best": "SFT, best by ID validation", "rl": "RL, last"}
        rows = []
        for arm, place in arms:
            for t in (1.0, 0.0):
                points = {v: self.ends(arm, v, t, **place) for v in self.where}
                if all(points.values()):
                    how = [place["pictures"]] if place.get("pictures", "own") != "own" else []
                    cells = [_cell(own, column) for own in points.values() for column in columns]
                    label = ", ".join([names.get(arm, arm), *how])
                    cells.append(_cell(points[self.last], self.words["last"]))
                    rows.append([label, "temperature 1" if t else "greedy", *cells])
        return table(
            ["checkpoint", "decoding", *head, f"{self.where[self.last]}: {self.words['last']}"], rows
        )

    def curves(self, arm: str, variant: str, key: str) -> list[tuple[float, list[float]]]:
        """An arm at temperature 1, seeds side by side, the init first: (compute, values of the seeds). All
        points between are on the same hands."""
        init = self.results.curve("init", few=True, variant=variant, **self.usual)
        points = [(0.0, [p[key] for p in init])]
        by_seed: dict[int, list[dict]] = {}
        for p in self.results.curve(arm, few=True, variant=variant, **self.usual):
            by_seed.setdefault(p["seed"], []).append(p)
        return points + [
            (mean(p["flops"] for p in same), [p[key] for p in same]) for same in zip(*by_seed.values())
        ]

    def curves_table(self) -> list[str]:
        """The main comparison's arms by compute."""
        rows = []
        for arm in ("sft", "rl"):
            sides = [self.curves(arm, v, self.headline) for v in self.where]
            for same in zip(*sides):
                spread = [f"{_percent(mean(x))} [{_percent(min(x))}, {_percent(max(x))}]" for _, x in same]
                rows.append([arm, f"{same[0][0] / 1e12:.2f}", *spread])
        return table(["arm", "compute, 10^12 FLOP", *self.where.values()], rows)

    def distances(self) -> list[tuple[str, dict, float]]:
        """Of every checkpoint after the init: arm, its point in distribution, and the change since the init
        under the other rule. Arms straight from the base have left no init."""
        start = {p["seed"]: p for p in self.ends("init", self.last)}
        others = {"init"} | {arm for arm, _ in self.experiments.get("no-init", [])}
        arms = sorted({p["arm"] for p in self.results.points if p["seed"] >= 0} - others)
        found = []
        for arm in arms:
            there = {(p["seed"], p["step"]): p for p in self.results.curve(arm, variant="id", **self.usual)}
            for p in self.results.curve(arm, variant=self.last, **self.usual):
                here = there.get((p["seed"], p["step"]))
                if here and "changed" in here and p["seed"] in start:
                    change = difference([p], [start[p["seed"]]], self.headline)["mean"]
                    found.append((arm, here, change))
        return found

    def distances_table(self) -> list[str]:
        """Each arm at its end, and how well the distances' ranks tell those of the change."""
        found = self.distances()
        rows = []
        for arm in dict.fromkeys(arm for arm, *_ in found):
            ends = {p["seed"]: (p, change) for name, p, change in found if name == arm}.values()
            cells = [f"{mean(p[key] for p, _ in ends):.3f}" for key in DISTANCES]
            changes = [100 * change for _, change in ends]
            rows.append([arm, *cells, f"{mean(changes):+.1f}", ", ".join(f"{x:+.1f}" for x in changes)])
        change = [x for *_, x in found]
        told = [f"{rank_correlation([p[key] for _, p, _ in found], change):+.2f}" for key in DISTANCES]
        rows.append([f"rank correlation with the change, {len(found)} checkpoints", *told, "", ""])
        head = f"change {self.where[self.last]}"
        return table(["arm at its end", *DISTANCES.values(), head, "each seed"], rows)


# The main comparison's ends, as measured usually.
MAIN: list[tuple[str, dict]] = [("init", {}), ("sft", {}), ("sft best", {}), ("rl", {})]
DISTANCES = {
    "kl_to_init": "KL(policy, init)",
    "kl_from_init": "KL(init, policy)",
    "changed": "weights changed",
}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho."""
    ranks = [[mean((sum(b < a for b in own), sum(b <= a for b in own) - 1)) for a in own] for own in (x, y)]
    return correlation(*ranks) if len(set(x)) > 1 and len(set(y)) > 1 else math.nan


def _mean(points: Sequence[dict], key: str = "success") -> float:
    if key == "turn_accuracy":
        return mean(p["step_accuracy_by_action"]["turn"] for p in points)
    return mean(p[key] for p in points)


def _cell(points: Sequence[dict], column: str) -> str:
    """One number of the table of ends."""
    if column in ("illegal", "wrong numbers", "unparsed"):
        return _percent(mean(p["verdicts"][column.replace(" ", "_")] for p in points))
    if column == "KL":
        return f"{_mean(points, 'kl_to_init'):.3f}" if all("kl_to_init" in p for p in points) else "-"
    names = {
        "turns": "turn_accuracy",
        "first reply": "first_success",
        "steps": "step_accuracy",
        "first reply of each step": "first_step_accuracy",
        "routes": "success",
    }
    return _percent(_mean(points, names.get(column, column)))


class Figures:
    """Draws figures/*.png of a report; without matplotlib nothing."""

    looks = {
        "init": {"color": "tab:gray", "marker": "*", "label": "init"},
        "sft": {"color": "tab:orange", "marker": "o", "label": "SFT"},
        "rl": {"color": "tab:blue", "marker": "s", "label": "RL (PPO)"},
    }

    def __init__(self, report: Report):
        self.report = report
        others = sorted({p["arm"] for p in report.results.points} - self.looks.keys())
        free = zip(others, cycle(("C2", "C3", "C4", "C5", "C6", "C8", "C9")), cycle("^vDPX"))
        self.looks = self.looks | {
            arm: {"color": color, "marker": marker, "label": arm} for arm, color, marker in free
        }

    def draw(self) -> None:
        """All figures of the experiments that were measured."""
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use("Agg")
        report, variants = self.report, list(self.report.where)
        (report.folder / "figures").mkdir(exist_ok=True)
        success = f"{report.words['measure']} within budget, %"
        self.panels("curves", variants, "compute after init, 10$^{12}$ FLOP", success, self.curve)
        if "visual" in variants:
            reads = f"replies that {report.words['reads']}, %"
            self.panels("recognition", variants, reads, success, self.path)
        labels = {
            "ends": (variants, f"{success} [95% over {report.words['hands']}]", ""),
            "budgets": (variants, "replies per hand", "solved within so many replies, %"),
            "starts": (variants, "compute of SFT before, 10$^{12}$ FLOP", success),
        }
        for name in report.experiments:
            kind = SECTIONS[name].figure if name in SECTIONS else None
            if kind == "distances":
                change = f"change {report.where[report.last]}, points"
                self.panels(name, list(DISTANCES), "distance to init", change, self.scatter)
            elif kind in labels:
                self.panels(name, *labels[kind], lambda axis, v: getattr(self, kind)(axis, v, name))

    def panels(self, name: str, parts: Sequence[str], x: str, y: str, draw: Callable) -> None:
        """One figure: a panel for each of `parts`, into which `draw(axis, part)` draws."""
        import matplotlib.pyplot as plt

        size = {"figsize": (4.5 * len(parts) + 1.5, 3.6), "squeeze": False, "layout": "constrained"}
        figure, axes = plt.subplots(1, len(parts), sharey=True, **size)
        for axis, part in zip(axes[0], parts):
            axis.set(title=self.report.where.get(part) or DISTANCES[part], xlabel=x)
            draw(axis, part)
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel(y)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        figure.savefig(self.report.folder / "figures" / f"{name}.png", dpi=120)
        plt.close(figure)

    def curve(self, axis, variant: str) -> None:
        """Both arms against compute, a band from the lowest to the highest seed."""
        for arm in ("sft", "rl"):
            look = self.looks[arm]
            points = self.report.curves(arm, variant, self.report.headline)
            x = [flops / 1e12 for flops, _ in points]
            low, middle, high = ([100 * f(values) for _, values in points] for f in (min, mean, max))
            axis.plot(x, middle, markersize=4, ls="-" if len(x) > 2 else "", **look)
            axis.fill_between(x, low, high, color=look["color"], alpha=0.2, lw=0)
        axis.axhline(middle[0], color="gray", lw=1, ls="--", label="SFT init")
        axis.set_ylim(0, None)

    def path(self, axis, variant: str) -> None:
        """Success against recognition along both arms."""
        for arm in ("sft", "rl"):
            look = self.looks[arm]
            x, y = (
                [100 * mean(values) for _, values in self.report.curves(arm, variant, key)]
                for key in ("recognition", self.report.headline)
            )
            axis.plot(x, y, markersize=4, alpha=0.8, **look)
            axis.annotate("end", (x[-1], y[-1]), color=look["color"])

    def ends(self, axis, variant: str, name: str) -> None:
        """A dot for each arm's end, with 95% over hands."""
        report = self.report
        for arm, place in MAIN + report.experiments[name]:
            points = report.ends(arm, variant, **place)
            if points:
                middle = _mean(points, report.headline)
                _, half = over_hands([of_hands(p, report.headline) for p in points])
                look = self.looks[arm.removesuffix(" best")] | {"label": None}
                axis.errorbar(100 * middle, arm, xerr=100 * half, capsize=3, **look)
        axis.set_xlim(left=-2)
        axis.yaxis.set_inverted(True)

    def budgets(self, axis, variant: str, name: str) -> None:
        """Of each arm, hands solved within 1 to 10 replies."""
        for arm, place in self.report.experiments[name]:
            points = self.report.ends(arm, variant, **place)
            shares = [
                100 * mean(mean(0 < o <= k for o in p["outcomes"]) for p in points) for k in range(1, 11)
            ]
            axis.plot(range(1, 11), shares, markersize=4, **self.looks[arm])
        axis.set_ylim(0, None)

    def starts(self, axis, variant: str, name: str) -> None:
        """SFT's checkpoints, and where RL from them ends."""
        report, rows = self.report, []
        for arm, place in report.experiments[name]:
            before = report.ends(arm.replace("rl-from-sft-", "sft@"), variant)
            after = report.ends(arm, variant, **place)
            if before and after:  # a short run has fewer checkpoints
                rows.append((mean(p["flops"] for p in before) / 1e12, before, after))
        x = [flops for flops, *_ in rows]
        for k, look in ((1, self.looks["sft"]), (2, self.looks["rl"] | {"label": "RL from there"})):
            axis.plot(x, [100 * _mean(row[k], report.headline) for row in rows], **look)
        axis.axhline(
            100 * _mean(report.ends("init", variant), report.headline), color="gray", ls="--", label="init"
        )
        axis.set_ylim(0, None)

    def scatter(self, axis, key: str) -> None:
        """Change under the other rule against a distance, one dot per checkpoint."""
        found = self.report.distances()
        for arm in dict.fromkeys(arm for arm, *_ in found):
            dots = [(p[key], 100 * change) for name, p, change in found if name == arm]
            axis.scatter(*zip(*dots), s=12, **self.looks[arm])
        if key != "changed":
            axis.set_xscale("log", subs=())
            axis.xaxis.get_major_locator().set_params(subs=(1, 3))
            axis.xaxis.set_major_formatter("{x:g}")
