"""Evaluation: what a checkpoint solves under one variant, its distance to the initial policy, and the report
and figures of a study.

All checkpoints play the same episodes (seeds "test/0", "test/1", ...), so the difference of two checkpoints
is a paired one. Training and validation ("valid/...") have other seeds.
"""

import fnmatch
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import Any

import numpy as np
import torch
from PIL import Image

import envs

PICTURES = ("own", "blank", "shuffled")


@dataclass
class Reference:
    """The policy from which distances are measured, and the conversations that it sampled, by variant,
    series and number of episodes."""

    policy: Any
    conversations: dict[tuple[str, str, int], list] = field(default_factory=dict)


def evaluate(
    policy,
    environments: Sequence,
    temperature: float,
    max_new_tokens: int,
    series: str = "test",
    reference: Reference | None = None,
    **options,
) -> tuple[dict, list[envs.Episode]]:
    """Plays one episode per environment, divided among the ranks; environment i plays hand i of the series,
    or walks route i of its world.

    Temperature 0 is greedy. `options`: see `sampled`. Returns the `summary`, with a `reference` also the
    `distances` to it, and all episodes.
    """
    for env in environments:
        env.continue_after_failure = True  # accuracy counts all waypoints
    streams, mine = sampled(policy, environments, temperature, max_new_tokens, series, **options)
    env, episodes = environments[0], policy.gather(mine)
    result = summary(episodes, env.verdicts)
    distinct = {str(options or seed) for seed, options in env.starts(series, len(episodes))}
    if len(distinct) < len(episodes):
        result["distinct"] = len(distinct)
    result |= env.measures(episodes)
    if reference is not None:
        first = environments[: SAMPLED_FOR_KL * policy.world]
        key = env.variant, series, len(first)
        if key not in reference.conversations:
            reference.conversations[key], _ = sampled(reference.policy, first, 1.0, max_new_tokens, series)
        result |= distances(policy, reference.policy, streams, reference.conversations[key])
    return result, episodes


def sampled(
    policy, environments: Sequence, temperature, max_new_tokens, series, pictures="own", **watch
) -> tuple[list, list[envs.Episode]]:
    """This rank's share of `evaluate`'s episodes: their conversations as streams, and the episodes.
    `pictures`: the task's "own", or a control, see `image_control`. `watch`: see `envs.play`."""
    n, k, world = len(environments), policy.rank, policy.world
    if n < world:
        raise ValueError(f"{n} episodes cannot be shared by {world} ranks")
    part = slice(n * k // world, n * (k + 1) // world)
    seeds, options = zip(*environments[0].starts(series, n)[part])
    with policy.responder(temperature, max_new_tokens, policy.generator(series)) as respond:
        reply = respond if pictures == "own" else image_control(respond, pictures)
        episodes = envs.play(environments[part], reply, seeds, options, policy.rollout_batch, **watch)
    return [stream for i in range(len(episodes)) for stream in respond.streams[i]], episodes


SAMPLED_FOR_KL = 128  # conversations of each rank, or as many as every rank has


def distances(policy, initial, streams: list, initial_streams: list) -> dict:
    """Distance to the initial policy: `kl_to_init` and `kl_from_init`, the k3 estimates of
    KL(policy || initial) and KL(initial || policy) in nats per reply token, from streams that the first one
    of the two sampled at temperature 1; `changed`, the share of weights that differ in bf16."""
    differ = 0
    for p, q in zip(policy.model.parameters(), initial.model.parameters()):
        p, q = (x.to_local() if hasattr(x, "to_local") else x for x in (p.detach(), q.detach()))
        differ += (p.bfloat16() != q.bfloat16()).sum().item()
    return {
        "kl_to_init": kl(policy, initial, streams),
        "kl_from_init": kl(initial, policy, initial_streams),
        "changed": policy.sum(differ)[0] / policy.parameter_count,
    }


def image_control(respond: Callable, kind: str) -> Callable:
    """A responder that sees grey pictures ("blank") or recent ones of other episodes ("shuffled"): what a
    policy can do without seeing. Raises ValueError where there are no pictures, or those of one episode."""
    generator = random.Random(0)
    recent: list[tuple[int, Image.Image]] = []  # environment and picture
    latest: dict[int, tuple[Image.Image, Image.Image]] = {}  # by environment: its picture, the substitute

    def controlled(indices: list[int], observations: list[envs.Observation]) -> list[str]:
        images = [(i, o.image) for i, o in zip(indices, observations)]
        new = [(i, image) for i, image in images if i not in latest or latest[i][0] is not image]
        recent[:] = (recent + new)[-512:]
        for i, image in new:
            others = [other for k, other in recent if k != i]
            if image is None or not others:
                raise ValueError(f"{kind} pictures need a task with pictures and at least two episodes")
            blank = Image.new("RGB", image.size, "grey")
            latest[i] = image, blank if kind == "blank" else generator.choice(others).copy()
        replaced = [envs.Observation(o.messages, latest[i][1]) for i, o in zip(indices, observations)]
        return respond(indices, replaced)

    return controlled


def summary(episodes: Sequence[envs.Episode], kinds: Sequence[str]) -> dict:
    """What all tasks measure (docs/metrics.md lists the fields); `kinds`: the task's verdicts."""
    n, named = len(episodes), [[turn.recognized for turn in e.turns if turn.landmark] for e in episodes]
    outcomes = [e.most_tries() if e.success else 0 for e in episodes]
    success, first = sum(o > 0 for o in outcomes) / n, sum(o == 1 for o in outcomes) / n
    verdicts = Counter(turn.verdict for e in episodes for turn in e.turns)
    return {
        "episodes": n,
        "success": success,
        "success_se": math.sqrt(success * (1 - success) / n),
        "first_success": first,
        "first_success_se": math.sqrt(first * (1 - first) / n),
        "turns": verdicts.total() / n,
        "recognition": sum(map(sum, named)) / max(1, sum(map(len, named))),
        "recognized": [round(sum(replies) / max(1, len(replies)), 3) for replies in named],
        "verdicts": {kind: verdicts[kind] / verdicts.total() for kind in kinds},
        "outcomes": outcomes,
    }


@torch.no_grad()
def kl(policy, other, streams: list) -> float:
    """The k3 estimate of KL(policy || other) in nats per reply token, over all ranks' streams, which `policy`
    sampled at temperature 1."""
    fewest = -int(policy.largest(-len(streams)))  # shards want as many forward passes on every rank
    total, tokens, streams = 0.0, 0.0, sorted(streams[: min(SAMPLED_FOR_KL, fewest)], key=len)
    for i in range(0, len(streams), 32):
        batch = policy.collate(streams[i : i + 32])
        log_ratio = other(batch)["logp"] - policy(batch)["logp"]
        total += (log_ratio.clamp(max=20).exp() - 1 - log_ratio)[batch["mask"] > 0].sum().item()
        tokens += batch["mask"].sum().item()
    total, tokens = policy.sum(total, tokens)
    return total / tokens


# ---- the results

# By measure, the field of a point that has its value for each episode.
MEASURES = {
    "success": "outcomes",
    "recognition": "recognized",
    "step_accuracy": "steps",
    "turn_accuracy": "at_turns",  # None on a route without turns
}


def of_episodes(point: dict, measure: str) -> list[float | None]:
    """A measure's value for each episode, or the mean of each of `distinct` starts in turn; None on a
    route without turns."""
    values, n = point[MEASURES[measure]], point.get("distinct")
    values = [outcome > 0 for outcome in values] if measure == "success" else values
    return [None if values[i] is None else mean(values[i::n]) for i in range(n)] if n else values


def over_episodes(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean, and half of its 95% interval over episodes. Each row has one seed's values of the same episodes
    (or of the first of them), which are averaged over seeds first."""
    averages = [mean(column) for column in zip(*rows)]
    return mean(averages), 1.96 * stdev(averages) / math.sqrt(len(averages))


def difference(a: Sequence[dict], b: Sequence[dict], measure: str = "success") -> dict:
    """Paired difference a - b of points of the same seeds on the same episodes; where one was measured on
    fewer, on those.

    `interval`, over episodes, holds for these checkpoints and other episodes. `seed_interval`, Student's t
    over the seeds' differences, holds for other seeds after the same base."""
    rows = [
        [x - y for x, y in zip(of_episodes(p, measure), of_episodes(q, measure)) if x is not None]
        for p, q in zip(a, b, strict=True)
    ]
    seeds = [mean(row) for row in rows]
    middle, half = over_episodes(rows)
    out = {"mean": middle, "interval": (middle - half, middle + half), "seeds": seeds}
    return out | {"seed_interval": over_seeds(seeds)[1]}


def over_seeds(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean, and its 95% interval by Student's t; None for one seed."""
    middle, n = mean(values), len(values)
    if n == 1:
        return middle, None
    half = _T95[min(n - 1, len(_T95)) - 1] * stdev(values) / math.sqrt(n)
    return middle, (middle - half, middle + half)


# Student's t, 97.5%, by degrees of freedom from 1.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def verdict(d: dict, sign: int) -> str:
    """Verdict of a `difference` on a claim that expects `sign`; every seed must agree in sign."""
    low, high = d["interval"]
    if low <= 0 <= high:
        return "not significant"
    if any(s * d["mean"] <= 0 for s in d["seeds"]):
        return "seeds disagree"
    return "holds" if d["mean"] * sign > 0 else "does not hold"


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho."""
    ranks = [[mean((sum(b < a for b in z), sum(b <= a for b in z) - 1)) for a in z] for z in (x, y)]
    return correlation(*ranks) if len(set(x)) > 1 and len(set(y)) > 1 else math.nan


def flat(point: dict) -> dict:
    """A point with verdicts' shares and accuracies by action as fields, and the compute after the init."""
    by_action = point.get("step_accuracy_by_action", {}).items()
    named = point.get("verdicts", {}) | {f"{action}_accuracy": x for action, x in by_action}
    return named | point | ({"flops": 0.0} if point["arm"] == "init" else {})


def average(points: Sequence[dict], key: str) -> float:
    """Mean of a field over points."""
    return mean(p[key] for p in points)


def find(points: Sequence[dict], **wanted) -> list[dict]:
    """Points whose fields equal the wanted values, or are among them where a tuple is wanted, by seed, step
    and number of episodes."""
    options = {key: value if isinstance(value, tuple) else (value,) for key, value in wanted.items()}
    found = [p for p in points if all(p.get(key) in values for key, values in options.items())]
    return sorted(found, key=lambda p: (p["seed"], p["step"], p["episodes"]))


# ---- the frontier: every learning rate

# Ways to choose a rate on validation episodes, by the last checkpoints of the other seeds.
WAYS = {
    "best": "highest success in distribution",
    "smallest": "smallest rate within one standard error of that",
    "peeking": "highest success under the other rule: an upper bound",
}
Curve = list[tuple[float, float]]  # (in distribution, elsewhere), from the init to the last checkpoint


def frontier(
    points: Sequence[dict], variant: str, measure: str, paired: bool = False
) -> dict[tuple[str, float], dict[int, Curve]]:
    """Curves on validation episodes by (algorithm, rate), sorted, and seed; elsewhere is `variant`. `paired`:
    all points on the same episodes, those of the points between."""
    valid = find(points, experiment="frontier", series="valid")
    n = min((p["episodes"] for p in valid), default=0)

    def value(p: dict) -> float:
        return mean(of_episodes(p, measure)[:n]) if paired else p[measure]

    curves: dict[tuple[str, float], dict[int, Curve]] = {}
    for arm, seed in sorted({(p["arm"], p["seed"]) for p in valid if p["arm"] != "init"}):
        run = find(valid, arm="init", seed=seed) + find(valid, arm=arm, seed=seed)
        here, there = (
            {(p["arm"], p["step"]): value(p) for p in run if p["variant"] == v} for v in ("id", variant)
        )
        algorithm, _, rate = arm.partition("-")
        curves.setdefault((algorithm, float(rate)), {})[seed] = list(zip(here.values(), there.values()))
    return dict(sorted(curves.items()))


def choose(ends: dict[float, Curve]) -> dict[str, float]:
    """The rate that each of WAYS chooses; `ends` are last points of curves, by rate in ascending order."""
    here, there = ({rate: mean(p[k] for p in pairs) for rate, pairs in ends.items()} for k in (0, 1))
    best = max(here, key=here.get)
    error = stdev(x for x, _ in ends[best]) / math.sqrt(len(ends[best])) if len(ends[best]) > 1 else 0.0
    within = [rate for rate in here if here[rate] >= here[best] - error]
    return {"best": best, "smallest": min(within), "peeking": max(there, key=there.get)}


def chosen_arms(points: Sequence[dict], measure: str) -> dict[str, dict[int, str]]:
    """By "sft-WAY" or "rl-WAY" and seed, the arm that is chosen on the other seeds (on itself, if alone)."""
    curves = frontier(points, "rule" if find(points, variant="rule") else "id", measure)
    chosen: dict[str, dict[int, str]] = {f"{a}-{way}": {} for way in WAYS for a in ("sft", "rl")}
    for algorithm in ("sft", "rl"):
        runs = {rate: by for (a, rate), by in curves.items() if a == algorithm}
        seeds = sorted({seed for by in runs.values() for seed in by})
        for seed in seeds:
            others = [s for s in seeds if s != seed] or seeds
            ends = {rate: [by[s][-1] for s in others if s in by] for rate, by in runs.items()}
            for way, rate in choose({rate: pairs for rate, pairs in ends.items() if pairs}).items():
                chosen[f"{algorithm}-{way}"][seed] = f"{algorithm}-{rate:g}"
    return chosen


def at_level(curve: Curve, level: float) -> float | None:
    """Success elsewhere where success in distribution first reaches a level, interpolated; None if never."""
    for (x, y), (u, v) in zip(curve, curve[1:]):
        if x < level <= u:
            return y + (v - y) * (level - x) / (u - x)
    return None


# ---- the claims

# The other experiments, each with its question.
SECTIONS = {
    "look": "A small world: RL, and SFT at its rate and at a tenth of it. A demonstration, not evidence.",
    "frontier": "At every learning rate, and at equal success in distribution: who keeps the other rule?",
    "no-init": "Does RL need the init? Here it starts from the base.",
    "verification": "Do more replies per hand help RL, at equal compute? All are tested with 10.",
    "start": "From which checkpoints of SFT does RL recover what SFT forgot?",
    "recognition": "Do the policies look? They play with grey pictures, and with those of other episodes.",
    "revision-sft": "Does SFT forget because it sees single turns? Here it sees errors and feedback.",
    "sft-search": "Does another rate, or a frozen part, keep SFT from forgetting?",
    "reply-ratio": "Does the paper's PPO, with one ratio, value and advantage per reply, do as well?",
    "rivals": "What else keeps the other rule, at equal compute?",
    "forgetting": "Does the distance to the init, in distribution, predict the change under the other rule?",
}

# Claims by topic ("main ..." or a section): arm, other arm, sign of the difference, and the paper's result if
# PAPER lacks it. Arms are named as by `Report.final`; "*" is every matching arm of the section, in the name
# of the other arm the end of that name.
CLAIMS = {
    "main id": [("rl", "init", +1), ("sft", "init", +1)],
    "main ood": [("rl", "init", +1), ("sft", "init", -1), ("rl", "sft", +1), ("rl", "sft best", +1)],
    "main recognition": [("rl", "init", +1), ("sft", "init", -1)],
    "look": [("*", "sft", +1)],
    "frontier": [("rl-*", "init", +1), ("sft-*", "init", -1), ("rl-*", "sft-*", +1)],
    "no-init": [("*", "rl", -1, "yes")],
    "verification": [
        ("rl-*", "init", +1, "by .5, 2.2, 3.0, 6.0"),
        ("rl-budget-10", "rl-budget-1", +1, "yes"),
    ],
    "start": [("*", "sft@*", +1, "not from an overfitted start")],
    "revision-sft": [("*", "init", -1, "yes")],
    "sft-search": [("*", "init", +1, "none passes 30% ID")],
    "reply-ratio": [("*", "init", +1, "yes"), ("*", "rl", -1)],
    "rivals": [("*", "init", +1), ("*", "rl", -1), ("dft", "sft-at-dft-rate", +1)],
}

NAMES = {"rl": "RL", "sft": "SFT", "sft best": "SFT's best checkpoint"}  # in the report

# What the paper reports of init, SFT and RL in percent, by (task, variant, measure); its temperature is .2.
PAPER = {
    ("gp-l", "rule", "success"): (11.5, 3.4, 15.0),
    ("gp-vl", "rule", "success"): (11.2, 5.6, 14.2),
    ("gp-vl", "visual", "success"): (23.6, 13.7, 41.2),
    ("virl-l", "rule", "step_accuracy"): (80.8, 1.3, 91.8),
    ("virl-vl", "rule", "step_accuracy"): (35.7, 2.5, 45.0),
    ("virl-vl", "visual", "success"): (16.7, 11.1, 77.8),
}


# ---- the report

# Columns of the table of checkpoints, each where it was measured.
COLUMNS = ("step_accuracy", "first_step_accuracy", "turn_accuracy", "success", "first_success", "unparsed")
COLUMNS += ("illegal", "wrong_numbers", "recognition")
DISTANCES = {
    "kl_to_init": "KL(policy, init)",
    "kl_from_init": "KL(init, policy)",
    "changed": "weights changed",
}
MAIN = [(arm, {}) for arm in ("init", "sft", "sft best", "rl")]


def _label(key: str) -> str:
    return DISTANCES.get(key, key.replace("_", " "))


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _signed(values: Sequence[float], interval: Sequence[float] | None = None) -> str:
    text = ", ".join(f"{100 * x:+.1f}" for x in values)
    return f"{text} [{_signed(interval)}]" if interval else text


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


@dataclass
class Report:
    """Writes report.md and, where matplotlib is installed, figures/*.png.

    Args:
        points: lines of `results.jsonl`.
        folder: of the study.
        settings: `task`, `model`, `parameters`, `verify_iter`, and a `note`.
        experiments: by name, each arm and the fields of its points that are not as in the main comparison.
    """

    points: Sequence[dict]
    folder: Path
    settings: dict
    experiments: dict[str, list[tuple[str, dict]]]

    def __post_init__(self):
        self.points, self.task = [flat(p) for p in self.points], self.settings["task"]
        cls = envs.task_class(self.task)
        self.headline, self.label = cls.headline, _label(cls.headline)
        self.usual = {"series": "test", "temperature": 1.0, "pictures": "own"}
        self.usual["verify_iter"] = self.settings["verify_iter"]
        self.chosen: dict[str, dict[int, str]] = {}
        self.where = {v: text for v, text in cls.variants.items() if self.final("init", variant=v)}
        self.ood = "rule" if "rule" in self.where else "id"
        if "frontier" in self.experiments:  # the chosen runs become arms named by the way
            self.chosen = chosen_arms(self.points, self.headline)
            self.experiments |= {"frontier": [(name, {}) for name in self.chosen]}

    def final(self, arm: str, **fields) -> list[dict]:
        """One point per seed, on most episodes, as in the main comparison but for `fields`: of an arm's last
        checkpoint; of "ARM best", its best by success on validation episodes (ID, temperature 1), if all
        seeds have it; of "ARM@K", its checkpoint number K."""
        name, best, _ = arm.partition(" best")
        name, _, number = name.partition("@")
        runs = self.chosen.get(name) or {p["seed"]: name for p in self.points if p["arm"] == name}
        final = []
        for seed, run in sorted(runs.items()):
            measured = find(self.points, arm=run, seed=seed)
            steps = sorted({p["step"] for p in measured})  # greedily only the last checkpoint is measured
            if best and (valid := find(measured, variant="id", series="valid")):
                steps = [max(valid, key=lambda p: p.get("step_accuracy", p["success"]))["step"]]
            elif number:
                steps = steps[int(number) - 1 : int(number)]
            final += find(measured, step=tuple(steps), **self.usual | fields)[-1:]
        return final if not best or len(final) == len(runs) else []  # greedily it may be measured in some

    def write(self) -> str:
        """Returns a table of all claims."""
        settings, init = self.settings, self.final("init", variant="id")
        paragraphs = [
            f"# Study {self.task}: does post-training teach the rule, or only its examples?",
            "SFT on demonstrations and RL (PPO) start from one init, a short SFT, and have equal compute; "
            f"they are tested {', '.join(self.where.values())}. Numbers are {self.label} in percent, within "
            f"{settings['verify_iter']} replies, on the same {init[0]['episodes']} evaluation episodes, "
            f"means over seeds {', '.join(str(p['seed']) for p in init)}. The model, {settings['model']}, "
            f"has {settings['parameters'] / 1e6:,.1f}M parameters, the paper's 11B. {settings['note']}",
            "## Claims",
            self.claims("main"),
            "docs/metrics.md explains verdicts, intervals and columns.",
            "![success against compute](figures/curves.png)",
            "## Checkpoints",
            self.checkpoints([("base", {}), *MAIN]),
        ]
        if "visual" in self.where:
            paragraphs.append("![success against recognition](figures/recognition.png)")
        for name in self.experiments:
            paragraphs += [f"## {name}", SECTIONS[name], *self.section(name)]
            paragraphs += [f"![{name}](figures/{name}.png)"]
        text = "\n\n".join(filter(None, paragraphs))  # a table without rows is empty
        (self.folder / "report.md").write_text(text + "\n", "utf-8")
        draw(self)
        return self.claims("main", *self.experiments)

    def section(self, name: str) -> list[str]:
        """The tables of one experiment; of the frontier also the chosen rates, and what every run has
        elsewhere at equal success in distribution."""
        if name == "forgetting":
            changes = self.changes
            change = [x for *_, x in changes]
            rhos = [rank_correlation([p[key] for _, p, _ in changes], change) for key in DISTANCES]
            row = [f"{len(changes)} checkpoints", *(f"{rho:+.2f}" for rho in rhos)]
            arms = [(arm, {}) for arm in dict.fromkeys(arm for arm, *_ in changes)]
            return [table(["rank correlation", *DISTANCES.values()], [row]), self.checkpoints(arms)]
        tables = [self.claims(name), self.checkpoints(self.experiments[name])]
        if name == "frontier":
            head, rows = ["rate chosen on the other seeds by", "SFT, each seed", "RL, each seed"], []
            for way, text in WAYS.items():
                arms = [self.chosen[f"{a}-{way}"].values() for a in ("sft", "rl")]
                rows.append([f"{way}: {text}", *(", ".join(x.partition("-")[2] for x in xs) for xs in arms)])
            tables += [table(head, rows), *(self.levels(v) for v in self.where if v != "id")]
        return tables

    def levels(self, variant: str) -> str:
        """Success under a variant where runs first reach levels of success in distribution, by rate (means
        over seeds, if all reach the level) and over these rates; validation episodes."""
        curves = frontier(self.points, variant, self.headline, paired=True)
        runs = {run: by for a in ("sft", "rl") for run, by in curves.items() if run[0] == a}
        seeds = sorted(set.intersection(*map(set, runs.values())))
        start = max(by[seed][0][0] for by in runs.values() for seed in seeds)
        rows, wins = [], Counter()
        for level in range(5 * math.ceil(20 * start + 0.01), 100, 5):
            found = {key: [at_level(by[seed], level / 100) for seed in seeds] for key, by in runs.items()}
            reached = {key: values for key, values in found.items() if None not in values}
            row = [str(level), *(_percent(mean(reached[key])) if key in reached else "" for key in runs)]
            arms = [[values for key, values in reached.items() if key[0] == a] for a in ("sft", "rl")]
            if all(arms):
                averages = [[mean(column) for column in zip(*values)] for values in arms]
                middle, interval = over_seeds([y - x for x, y in zip(*averages)])
                row += [*(_percent(mean(x)) for x in averages), _signed([middle], interval)]
                clear = interval and interval[0] * interval[1] > 0
                wins[("RL" if middle > 0 else "SFT") if clear else "neither"] += 1
            if reached:
                rows.append(row + [""] * (len(runs) + 4 - len(row)))
        counts = ", ".join(f"{name} at {n}" for name, n in wins.most_common()) or "no level is common"
        head = ["in distribution", *(f"{a} {rate:g}" for a, rate in runs), "SFT", "RL", "RL - SFT [95%]"]
        title = f"At equal success in distribution, who has more {self.where[variant]}, by levels: {counts}."
        return f"{title}\n\n{table(head, rows)}"

    def topics(self, name: str) -> Iterator[tuple[str, str, str]]:
        """What the claims of "main" or of an experiment are about: (topic, variant, measure)."""
        if name != "main":
            yield from ((name, variant, self.headline) for variant in self.where if variant != "id")
            return
        walks = self.headline == "step_accuracy"
        for variant in self.where:
            topic = "main id" if variant == "id" else "main ood"
            if walks and variant == "visual":
                yield topic, variant, "success"  # in other cities the paper counts whole routes
            yield topic, variant, self.headline
            if walks and variant == "rule":
                yield topic, variant, "turn_accuracy"  # the rest of a walk is the same under both rules
            if "visual" in self.where and variant != "rule":
                yield "main recognition", variant, "recognition"

    def claims(self, *names: str) -> str:
        """The table of claims of "main" or experiments, without empty columns: a row for each claim's arm."""
        rows = []
        for topic, variant, measure in (topic for name in names for topic in self.topics(name)):
            fields = dict(self.experiments.get(topic, []))
            for pattern, *claim in CLAIMS.get(topic, []):
                for arm in fnmatch.filter(fields, pattern) or [pattern]:
                    rows += self.row(fields, variant, measure, arm, *claim)
        if not rows:
            return ""
        head = ["difference [95% over episodes]", "each seed [95% over seeds]"]
        head = ["claim", "temperature 1", *head, "greedy", *head, "verdict", "paper"]
        head, *rows = zip(*(column for column in zip(head, *rows) if any(column[1:])))
        return table(head, rows)

    def row(
        self, fields: dict, variant: str, measure: str, arm: str, other: str, sign: int, finding: str = ""
    ) -> list[list[str]]:
        """A row of the table of claims, if both arms were measured; `fields` of their points, by arm."""
        other = other.replace("*", arm.rpartition("-")[2])
        cells, verdicts = [], []
        for t in (1.0, 0.0):
            a, b = (
                self.final(name, variant=variant, temperature=t, **fields.get(name, {}))
                for name in (arm, other)
            )
            pairs = [(p, q) for p in a for q in b if p["seed"] == q["seed"]]
            if not pairs:
                cells += ["", "", ""]
                continue
            a, b = zip(*pairs)
            d = difference(a, b, measure)
            cells += [
                f"{_percent(average(a, measure))} against {_percent(average(b, measure))}",
                _signed([d["mean"]], d["interval"]),
                _signed(d["seeds"], d["seed_interval"]) if len(pairs) > 1 else "",
            ]
            verdicts.append(f"**{verdict(d, sign)}**")
        one, two = (NAMES.get(name, "its start" if "@" in name else name) for name in (arm, other))
        text = f"{one} ends {'above' if sign > 0 else 'below'} {two} {self.where[variant]}"
        if measure == "recognition":
            text = f"{one} {'raises' if sign > 0 else 'lowers'} recognition {self.where[variant]}"
        elif measure != self.headline:
            text += f", {_label(measure)}"
        paper = dict(zip(("init", "sft", "rl"), PAPER.get((self.task, variant, measure), ())))
        if not finding and {arm, other} <= paper.keys():
            finding = f"{paper[arm]} against {paper[other]}"
        return [[text, *cells, "; greedy ".join(dict.fromkeys(verdicts)), finding]] if verdicts else []

    def checkpoints(self, arms: Sequence[tuple[str, dict]]) -> str:
        """What was measured of arms at their ends, at temperature 1 / greedy."""
        measured = self.final("init", variant="id")[0]
        columns = [key for key in (*COLUMNS, *DISTANCES) if key in measured]
        rows = []
        for arm, fields in arms:
            for variant, text in self.where.items():
                decodings = [self.final(arm, variant=variant, temperature=t, **fields) for t in (1.0, 0.0)]
                if not (decodings := [points for points in decodings if points]):
                    continue
                unusual = [f"{key} {value}" for key, value in fields.items() if value != self.usual[key]]
                row = [", ".join([arm, *unusual]), ", ".join(str(p["step"]) for p in decodings[0]), text]
                for key in columns:
                    means = [average(points, key) for points in decodings if key in points[0]]
                    row.append(" / ".join(f"{x:.3f}" if key in DISTANCES else _percent(x) for x in means))
                rows.append(row)
        return table(["checkpoint", "steps", "tested (temperature 1 / greedy)", *map(_label, columns)], rows)

    def curve(self, arm: str, variant: str, x="flops", unit=1e12) -> list[tuple[float, list[float]]]:
        """An arm at temperature 1, the init first: (mean of a field, as 10^12 FLOP after it; main measure
        of each seed), on the episodes that points between were measured on."""
        curve = []
        for name in dict.fromkeys(["init", arm]):
            by_seed: dict[int, dict[int, dict]] = {}
            for p in find(self.points, arm=name, variant=variant, **self.usual):
                by_seed.setdefault(p["seed"], {}).setdefault(p["step"], p)  # on the fewest episodes
            for points in zip(*(steps.values() for steps in by_seed.values())):
                curve.append((average(points, x) / unit, [p[self.headline] for p in points]))
        return curve

    @cached_property
    def changes(self) -> list[tuple[str, dict, float]]:
        """Of every later checkpoint: arm, its point in distribution, the change under the other rule."""
        here, there = (
            {(p["arm"], p["seed"], p["step"]): p for p in find(self.points, variant=v, **self.usual)}
            for v in ("id", self.ood)
        )
        init = {p["seed"]: p for p in self.final("init", variant=self.ood)}
        others = {"init", *(arm for arm, _ in self.experiments.get("no-init", []))}
        changes = []
        for arm, seed, step in sorted(here.keys() & there.keys()):
            p, q = here[arm, seed, step], there[arm, seed, step]
            if arm not in others and seed in init:
                changes.append((arm, p, difference([q], [init[seed]], self.headline)["mean"]))
        return changes

    def series(self, name: str, part: str) -> Iterator[tuple[str, list[tuple[float, list[float]]]]]:
        """The lines of a figure's panel, which is for a variant or, of forgetting, for a distance: (arm,
        [(x, value of each seed)])."""
        if name == "curves":
            for arm in ("init", "sft", "rl", *(arm for arm, _ in self.experiments.get("look", []))):
                yield arm, self.curve(arm, part)
        if name == "forgetting":
            for arm, p, change in self.changes:
                yield arm, [(p[part], [change])]
        if name == "frontier":
            curves = frontier(self.points, part, self.headline, paired=True)
            for (algorithm, rate), by_seed in curves.items():
                steps = zip(*by_seed.values())
                line = [(100 * mean(x for x, _ in step), [y for _, y in step]) for step in steps]
                yield f"{algorithm} {np.format_float_scientific(rate, trim='-', exp_digits=1)}", line
        if name == "recognition":
            for arm in ("sft", "rl"):
                yield arm, self.curve(arm, part, "recognition", 0.01)
        if name == "verification":
            for arm, fields in self.experiments[name]:
                points = self.final(arm, variant=part, **fields)
                shares = [[mean(0 < o <= k for o in p["outcomes"]) for p in points] for k in range(1, 11)]
                yield arm, list(enumerate(shares, 1))
        if name == "start":
            # RL from the init and from each of SFT's checkpoints, over the compute of SFT before it
            curve, arms = self.curve("sft", part), ["rl", *(arm for arm, _ in self.experiments[name])]
            ends = [[p[self.headline] for p in self.final(arm, variant=part)] for arm in arms]
            yield "sft", curve
            yield "rl", [(x, y) for (x, _), y in zip(curve, ends) if y]


# ---- the figures

# Labels of the axes; y is the main measure unless there is another one.
AXES = {
    "frontier": ("in distribution, %", None),
    "curves": ("compute after init, 10$^{12}$ FLOP", None),
    "recognition": ("recognition, %", None),
    "verification": ("replies", "solved within so many replies, %"),
    "start": ("compute of SFT before RL, 10$^{12}$ FLOP", None),
    "forgetting": ("distance to init", "change since init, points"),
}


def draw(report: Report) -> None:
    """Writes figures/*.png of what was measured; without matplotlib nothing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    (report.folder / "figures").mkdir(exist_ok=True)
    looks = {"init": ("C7", "*"), "sft": ("C1", "o"), "rl": ("C0", "s")}
    others = sorted({*report.chosen, *(p["arm"] for p in report.points)} - looks.keys())
    looks |= {arm: (f"C{'2345689'[i % 7]}", "^vDPX"[i % 5]) for i, arm in enumerate(others)}
    names = ["curves", *["recognition"] * ("visual" in report.where), *report.experiments]
    for name in dict.fromkeys(names):
        (lines if name in AXES else ends)(report, name, looks)


def panels(report: Report, name: str, parts: dict[str, str], x: str, y: str):
    """Yields (axis, part) for each panel of a figure, then saves it; `parts`: panels with their titles."""
    import matplotlib.pyplot as plt

    size = (4.5 * len(parts) + 1.5, 3.6) if len(parts) > 1 else (8, 4.8)
    options = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(parts), sharey=True, **options)
    for axis, (part, title) in zip(axes[0], parts.items()):
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
        yield axis, part
    axes[0, 0].set_ylabel(y)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles))
    if by_label:
        figure.legend(by_label.values(), by_label, loc="outside right upper", fontsize=8)
    figure.savefig(report.folder / "figures" / f"{name}.png", dpi=120)
    plt.close(figure)


def lines(report: Report, name: str, looks: dict) -> None:
    """Lines through means over seeds, with bands from the lowest seed to the highest; of the frontier, the
    darker the higher the rate. The init alone is a dashed line, a checkpoint in forgetting a dot."""
    dots, (x_label, y_label) = name == "forgetting", AXES[name]
    parts = DISTANCES if dots else {v: t for v, t in report.where.items() if (name, v) != ("frontier", "id")}
    for axis, part in panels(report, name, parts, x_label, y_label or f"{report.label}, %"):
        shades: Counter[str] = Counter()
        for label, points in report.series(name, part):
            arm, _, rate = label.partition(" ")
            shades[arm] += 1 if rate else 6
            x, (color, marker) = [x for x, _ in points], looks[arm]
            low, middle, high = ([100 * f(values) for _, values in points] for f in (min, mean, max))
            if arm == "init" and len(x) == 1:
                axis.axhline(middle[0], ls="--", lw=1, color=color, label=arm)
                continue
            style = {"color": color, "marker": marker, "label": label, "ls": "" if dots else "-"}
            axis.plot(x, middle, markersize=4, alpha=min(1, 0.1 + 0.15 * shades[arm]), **style)
            if rate or name == "recognition":
                end = {"xytext": (4, 0), "textcoords": "offset points", "fontsize": 7}
                axis.annotate(rate or "end", (x[-1], middle[-1]), color=color, **end)
            else:
                axis.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        if not dots:
            axis.set_ylim(0, None, auto=True)  # the next panel may need more
        elif part != "changed":
            axis.set_xscale("log")


def ends(report: Report, name: str, looks: dict) -> None:
    """A dot for the end of each arm, with its 95% interval over episodes."""
    for axis, part in panels(report, name, report.where, f"{report.label}, % [95% over episodes]", ""):
        for arm, fields in MAIN + report.experiments[name]:
            if points := report.final(arm, variant=part, **fields):
                _, half = over_episodes([of_episodes(p, report.headline) for p in points])
                color, marker = looks[arm.removesuffix(" best")]
                middle = average(points, report.headline)
                axis.errorbar(100 * middle, arm, xerr=100 * half, color=color, marker=marker, capsize=3)
        axis.set_xlim(left=-2)
        axis.yaxis.set_inverted(True)
