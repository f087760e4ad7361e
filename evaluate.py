"""Evaluation: success under one variant, the distance to the initial policy, and the study's report and
figures.

Every checkpoint is asked the same deals (seeds "test/0", "test/1", ...), so the difference between two
checkpoints is a paired one. Training deals and those for choices ("valid/...") have other seeds. There are
only 1,820 sets of four ranks, so under the training rule most sets were seen in training; what is held out is
the other rule.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image

import envs


def standard_error(p: float, n: int) -> float:
    """sqrt(p (1 - p) / N), of a share p of N (paper, section 4)."""
    return math.sqrt(p * (1 - p) / n) if n else 0.0


PICTURES = ("own", "blank", "shuffled")


def evaluate(
    policy,
    environments: Sequence,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    series: str = "test",
    initial=None,
    pictures: str = "own",
    watch: Callable[[int], None] = lambda done: None,
) -> tuple[dict, list[envs.Episode]]:
    """Plays one episode per environment, shared out over the ranks; environment i plays hand i of the series,
    or walks route i of its world.

    Temperature 0 is greedy. `pictures`: as a control, others than the policy's "own", see `Disguise`. With
    `initial`, another policy, the result holds `kl_to_init`: the mean over the sampled reply tokens of the k3
    estimate of KL(policy || initial), in nats per token, over the first 128 conversations of each rank, or as
    many as every rank has. `outcomes` holds one digit per hand: the number of the reply that solved it, 0 if
    none did (a tenth reply and later ones count as 9); for a route, of the waypoint that took most replies.
    `watch` is told how many of this rank's episodes have ended.
    """
    if len(environments) < policy.world:
        raise ValueError(f"{len(environments)} episodes cannot be shared by {policy.world} ranks")
    own = range(
        len(environments) * policy.rank // policy.world, len(environments) * (policy.rank + 1) // policy.world
    )
    for env in environments:
        env.go_on = (
            True  # so that accuracy speaks of all waypoints, and not of those before the first failure
        )
    seeds, options = zip(*(environments[i].start_of(series, i) for i in own))
    with policy.responder(temperature, max_new_tokens, policy.generator(series)) as respond:
        answer = respond if pictures == "own" else Disguise(respond, pictures)

        def player(indices: list[int], observations: list[envs.Observation]) -> list[str | None]:
            watch(len(own) - len(indices))
            return answer(indices, observations)

        episodes = envs.play([environments[i] for i in own], player, seeds, options)
    watch(len(own))
    result = {}
    if initial is not None:
        conversations = [stream for i in range(len(own)) for stream in respond.streams[i]]
        fewest = -int(
            policy.largest(-len(conversations))
        )  # sharded weights want as many forward passes on every rank
        total, tokens = policy.sum(*kl_sums(policy, initial, conversations[: min(128, fewest)]))
        result["kl_to_init"] = total / tokens
    episodes = policy.gather(episodes)
    measured = summary(episodes, environments[0].verdicts)
    return measured | environments[0].measures(episodes) | result, episodes


class Disguise:
    """Plays like `respond`, which is shown grey pictures ("blank") or, of those seen so far, any of other
    episodes ("shuffled"): what a policy can do without seeing. Raises ValueError where there are no
    pictures, or those of a single episode."""

    def __init__(self, respond: Callable, how: str):
        self.respond, self.how, self.random = respond, how, random.Random(0)
        self.seen: list[tuple[int, Image.Image]] = []  # the newest: environment and picture
        self.instead: dict[
            int, tuple[Image.Image, Image.Image]
        ] = {}  # by environment: its own picture and the one it is shown

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
    outcomes = [min(e.most_tries(), 9) if e.success else 0 for e in episodes]
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
        "outcomes": "".join(map(str, outcomes)),
    }


@torch.no_grad()
def kl_sums(policy, other, streams: list, microbatch_size: int = 32) -> tuple[float, int]:
    """Sum over reply tokens of the k3 estimate of KL(policy || other), from streams that `policy` sampled at
    temperature 1, and the number of those tokens."""
    total, tokens, streams = 0.0, 0, sorted(streams, key=len)
    for i in range(0, len(streams), microbatch_size):
        batch = policy.collate(streams[i : i + microbatch_size])
        log_ratio = other(batch)["logp"] - policy(batch)["logp"]
        total += (log_ratio.exp() - 1 - log_ratio)[batch["mask"] > 0].sum().item()
        tokens += int(batch["mask"].sum())
    return total, tokens


def reading(policy, records: Sequence[dict]) -> dict:
    """Shares of whole hands ("success") and of single cards ("recognition") that a policy names, greedily,
    asked for nothing else; `records` from `sft.reading_record`. Every rank reads them all."""
    asked = [r["conversations"][0]["value"].removeprefix("<image>") for r in records]
    observations = [
        envs.Observation(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}], r["image"]
        )
        for text, r in zip(asked, records)
    ]
    named = [json.loads(r["conversations"][1]["value"]) for r in records]
    with policy.responder(0.0, 32, policy.generator("reading")) as respond:
        replies = respond(list(range(len(records))), observations)
    right = []
    for reply, cards in zip(replies, named):
        read = re.findall('"([^"]*)"', reply)
        right.append(sum(a == b for a, b in zip(read, cards)) if len(read) == len(cards) else 0)
    n = len(records)
    return {
        "episodes": n,
        "success": (whole := sum(k == 4 for k in right) / n),
        "success_se": standard_error(whole, n),
        "recognition": sum(right) / (4 * n),
    }


# ------------------------------------------------------------------------------------------------- the report


# By measure, the field of a point that has it for each hand or route; a route without turns has None in
# "at_turns".
MEASURES = {
    "success": "outcomes",
    "recognition": "recognized",
    "step_accuracy": "steps",
    "turn_accuracy": "at_turns",
}


def difference(a: Sequence[dict], b: Sequence[dict], key: str = "success") -> dict:
    """Paired difference a - b of success or another of MEASURES, points of the same seeds on the same hands
    or routes.

    `interval`: mean +- 1.96 standard errors over hands, each hand's difference averaged over seeds first;
    it speaks of these seeds' checkpoints and other deals. `seed_interval`: Student's t over the seeds'
    differences; it speaks of other seeds after the same base."""

    def of_hands(point: dict) -> list[float]:
        return [outcome > "0" for outcome in point["outcomes"]] if key == "success" else point[MEASURES[key]]

    rows = [
        [x - y for x, y in zip(of_hands(p), of_hands(q), strict=True) if x is not None]
        for p, q in zip(a, b, strict=True)
    ]
    hands = [mean(column) for column in zip(*rows)]
    seeds = [mean(row) for row in rows]
    middle, half = mean(hands), 1.96 * stdev(hands) / math.sqrt(len(hands))
    out = {"mean": middle, "interval": (middle - half, middle + half), "seeds": seeds, "seed_interval": None}
    if len(seeds) > 1:
        half = _T95.get(len(seeds) - 1, 2.262) * stdev(seeds) / math.sqrt(len(seeds))
        out["seed_interval"] = (middle - half, middle + half)
    return out


_T95 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}  # Student's t, 97.5%


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

    def of(self, seeds: Sequence[int], episodes: int) -> "Results":
        """The points of some seeds (and of the base, whose seed is -1) that were measured on so many
        hands."""
        chosen = Results(self.path)
        chosen.points = [
            p
            for p in self.points
            if p["episodes"] == episodes and p["seed"] in (-1, *seeds) and p.get("pictures", "own") == "own"
        ]
        return chosen

    def find(self, **wanted) -> list[dict]:
        """Points whose fields equal the wanted ones, in the order of seed and step."""
        found = [p for p in self.points if all(p.get(k) == v for k, v in wanted.items())]
        return sorted(found, key=lambda p: (p["seed"], p["step"]))

    def ends(self, arm: str, variant: str, temperature: float, pick: str = "last") -> list[dict]:
        """One point per seed: an arm's last checkpoint, or its best by success on the validation hands (ID,
        temperature 1)."""
        points = []
        for seed in sorted({p["seed"] for p in self.find(arm=arm)}):
            curve = self.find(arm=arm, seed=seed, variant=variant, temperature=temperature)
            if pick == "best":
                valid = self.find(arm=arm, seed=seed, variant="id", series="valid", temperature=1.0)
                step = max(valid, key=lambda p: p[envs.task_class(p["task"]).headline])["step"]
                points.append(next(p for p in curve if p["step"] == step and p["series"] == "test"))
            else:
                points.append(max((p for p in curve if p["series"] == "test"), key=lambda p: p["step"]))
        return points


def _claims(where: dict[str, str], headline: str) -> list[tuple[str, str, str, float, str, str, int]]:
    """What the paper found, as (claim, measure, variant, temperature, arm at its end, compared with, expected
    sign); `where`: the variants and what the report calls them."""
    claims, decodings = [], ((1.0, ""), (0.0, ", greedy"))

    def claim(
        text: str, variant: str, arm: str, other: str, sign: int, measure: str = headline, how=decodings
    ):
        for temperature, decoding in how:
            words = f"{text} {where[variant]}{decoding}"
            claims.append((words, measure, variant, temperature, arm, other, sign))

    for variant in where:
        claim("RL ends above init", variant, "rl", "init", +1)
        if variant == "id":
            claim("SFT ends above init", variant, "sft", "init", +1)
            continue
        claim("SFT ends below init", variant, "sft", "init", -1)
        claim("RL ends above SFT", variant, "rl", "sft", +1)
        claim("RL ends above SFT's best checkpoint", variant, "rl", "sft best", +1, how=decodings[:1])
        if (
            variant == "rule" and headline == "step_accuracy"
        ):  # the rest of a walk is the same under both rules
            claim("RL ends above init at turns", variant, "rl", "init", +1, "turn_accuracy")
            claim("SFT ends below init at turns", variant, "sft", "init", -1, "turn_accuracy")
            claim("RL ends above SFT at turns", variant, "rl", "sft", +1, "turn_accuracy")
        if variant == "visual":
            claim("RL raises recognition", variant, "rl", "init", +1, "recognition")
            claim("SFT lowers recognition", variant, "sft", "init", -1, "recognition")
    return claims


# Success, or per-step accuracy, in percent that the paper reports of init, SFT and RL, by (task, variant);
# its
# temperature is .2.
PAPER = {
    ("gp-l", "rule"): {"init": 11.5, "sft": 3.4, "rl": 15.0},
    ("gp-vl", "rule"): {"init": 11.2, "sft": 5.6, "rl": 14.2},
    ("gp-vl", "visual"): {"init": 23.6, "sft": 13.7, "rl": 41.2},
    ("virl-l", "rule"): {"init": 80.8, "sft": 1.3, "rl": 91.8},
    ("virl-vl", "rule"): {"init": 35.7, "sft": 2.5, "rl": 45.0},
}


def verdict(d: dict, sign: int) -> str:
    """What a difference says of a claim that expects `sign`: by the interval over hands, and every seed must
    agree in sign."""
    low, high = d["interval"]
    if low <= 0 <= high:
        return "not significant"
    if any(s * d["mean"] <= 0 for s in d["seeds"]):
        return "not significant (seeds disagree)"
    return "holds" if d["mean"] * sign > 0 else "does not hold"


def _percent(x: float) -> str:
    return f"{100 * x:.1f}"


def _interval(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"[{100 * pair[0]:+.1f}, {100 * pair[1]:+.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def write_report(results: Results, folder: Path, settings: dict) -> list[str]:
    """Writes report.md and, where matplotlib is installed, figures/*.png; returns the lines of the table of
    claims."""
    cls = envs.task_class(settings["task"])
    words = cls.words
    where = {v: text for v, text in cls.variants.items() if results.find(arm="init", variant=v)}
    ends = _ends(results, list(where))
    claims = _claims_table(ends, where, settings["task"], cls.headline)
    first, n = ends["init", "id", 1.0], ends["init", "id", 1.0][0]["episodes"]
    seeds = ", ".join(str(p["seed"]) for p in first)
    read = [
        f"Asked only to name the cards, the base reads {_percent(p['recognition'])}% of the cards and "
        f"{_percent(p['success'])}% of the hands {where[p['variant']]} (greedy)."
        for p in results.find(series="reading")
    ]
    recognition = f"; recognition counts the replies that {words['reads']}" if "visual" in where else ""
    best = ", ".join(str(p["step"]) for p in ends["sft best", "id", 1.0])
    lines = [
        f"# Study {settings['task']}: does post-training teach the rule, or only its examples?",
        "",
        f"{len(first)} seeds ({seeds}), {n} evaluation {words['hands']} per point, the same for every "
        f"checkpoint; {words['measure']} in percent within {settings['verify_iter']} replies. "
        + " ".join([words[v] for v in where if v in words] + read),
        "",
        "## Claims",
        "",
        *claims,
        "",
        f"A claim *holds* if the paired interval over {words['hands']} excludes 0 on the expected side and "
        "every seed's difference has that sign. That interval speaks of these checkpoints; the one over "
        "seeds (Student's t) speaks of other seeds after the same base.",
        "",
        "## Checkpoints",
        "",
        f"Means over seeds. {words['cells']}; KL is KL(policy || init) in nats per reply token on the "
        f"policy's own replies{recognition}.",
        "",
        *_checkpoints_table(ends, where, words),
        "",
        "SFT's best checkpoint is the one with the highest ID success on validation deals (seeds of their "
        f"own). Steps: {best}.",
        "",
        "## Curves",
        "",
        f"{words['measure'].capitalize()} at temperature 1, mean over seeds [lowest, highest].",
        "",
        *_curves_table(results, where, cls.headline),
        "",
        "![success against compute](figures/curves.png)",
        "",
        "## Settings",
        "",
        "Compute counts processed tokens: 6 N per trained token, 2 N per generated or scored one. Both arms "
        "start from the same init and get the same compute. " + settings["note"],
        "",
        "```json",
        json.dumps(settings, indent=1),
        "```",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines))
    draw(results, where, folder / "figures", cls.headline, words)
    return claims


def _ends(results: Results, variants: Sequence[str]) -> dict[tuple, list[dict]]:
    """By (arm, variant, temperature), the last point of each seed; of "sft best" the best by validation."""
    ends = {}
    for v in variants:
        for t in (1.0, 0.0):
            ends |= {(arm, v, t): results.ends(arm, v, t) for arm in ("init", "sft", "rl")}
            ends["sft best", v, t] = results.ends("sft", v, t, "best")
            ends["base", v, t] = results.find(arm="base", series="test", variant=v, temperature=t)
    return ends


def _claims_table(ends: dict, where: dict[str, str], task: str, headline: str) -> list[str]:
    rows, hands = [], envs.task_class(task).words["hands"]
    for text, measure, variant, temperature, arm, other, sign in _claims(where, headline):
        a, b = ends[arm, variant, temperature], ends[other, variant, temperature]
        d = difference(a, b, measure)
        paper = PAPER.get((task, variant), {}) if measure == headline and temperature else {}
        rows.append(
            [
                text,
                f"{_percent(_mean(b, measure))} -> {_percent(_mean(a, measure))}",
                f"{100 * d['mean']:+.1f} {_interval(d['interval'])}",
                _interval(d["seed_interval"]),
                ", ".join(f"{100 * s:+.1f}" for s in d["seeds"]),
                f"**{verdict(d, sign)}**",
                f"{paper[other]} -> {paper[arm]}" if other in paper else "-",
            ]
        )
    head = ["claim of the paper", "measured", f"difference, 95% over {hands}", "95% over seeds", "each seed"]
    return table([*head, "verdict", "paper"], rows)


def _checkpoints_table(ends: dict, where: dict[str, str], words: dict) -> list[str]:
    columns = [*words["columns"], "KL"] + ["recognition"] * ("visual" in where)
    head = [f"{where[v]}: {column}" if not i else column for v in where for i, column in enumerate(columns)]
    last = "rule" if "rule" in where else "id"
    shown = {"sft": "SFT, last", "sft best": "SFT, best by ID validation", "rl": "RL, last"}
    rows = []
    for name in ("base", "init", "sft", "sft best", "rl"):
        for t in (1.0, 0.0):
            points = [ends.get((name, v, t)) for v in where]
            if all(points):
                cells = [_cell(own, column) for own in points for column in columns]
                decoding = "temperature 1" if t else "greedy"
                rows.append(
                    [shown.get(name, name), decoding, *cells, _cell(ends[name, last, t], words["last"])]
                )
    return table(["checkpoint", "decoding", *head, f"{where[last]}: {words['last']}"], rows)


def _curves_table(results: Results, where: dict[str, str], headline: str) -> list[str]:
    rows = []
    for arm, points in curves(results, list(where), headline).items():
        for p in points:
            spread = [f"{_percent(mean(p[v]))} [{_percent(min(p[v]))}, {_percent(max(p[v]))}]" for v in where]
            rows.append([arm, f"{p['flops'] / 1e12:.2f}", *spread])
    return table(["arm", "compute, 10^12 FLOP", *where.values()], rows)


def _mean(points: Sequence[dict], key: str = "success") -> float:
    if key == "turn_accuracy":
        return mean(p["step_accuracy_by_action"]["turn"] for p in points)
    return mean(p[key] for p in points)


def _cell(points: Sequence[dict], column: str) -> str:
    """One number of the table of checkpoints."""
    if column in ("illegal", "wrong numbers"):
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


def curves(results: Results, variants: Sequence[str], key: str) -> dict[str, list[dict]]:
    """Both arms' points at temperature 1, seeds side by side: arm -> [{"flops", variant: [success of each
    seed], ...}, ...], the init first, at compute 0."""
    out: dict[str, list[dict]] = {}
    for arm in ("sft", "rl"):
        by_order: list[dict] = []
        for name in ("init", arm):
            for variant in variants:
                for seed in sorted({p["seed"] for p in results.find(arm=name)}):
                    points = results.find(
                        arm=name, variant=variant, temperature=1.0, series="test", seed=seed
                    )
                    for i, p in enumerate(points, start=0 if name == "init" else 1):
                        while len(by_order) <= i:
                            by_order.append({"flops": [], **{v: [] for v in variants}})
                        by_order[i]["flops"].append(p["flops"] if name != "init" else 0.0)
                        by_order[i][variant].append(p[key])
        out[arm] = [p | {"flops": mean(p["flops"])} for p in by_order]
    return out


LOOKS = {
    "sft": {"color": "tab:orange", "marker": "o", "label": "SFT"},
    "rl": {"color": "tab:blue", "marker": "s", "label": "RL (PPO)"},
}


def draw(results: Results, where: dict[str, str], folder: Path, headline: str, words: dict) -> None:
    """figures/curves.png: success, or per-step accuracy, against compute for every variant side by side, a
    band from the lowest to the highest seed. figures/recognition.png, in visual tasks: success against
    recognition along both arms."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(exist_ok=True)
    variants = list(where)
    success = curves(results, variants, headline)

    def panels(name: str, label: str, draw_arm: Callable) -> None:
        """One figure: a panel for each variant, in it `draw_arm(axis, variant, arm, points, **look)` for
        each arm."""
        figure, axes = plt.subplots(1, len(variants), figsize=(4.5 * len(variants), 3.6))
        for axis, variant in zip(axes, variants):
            for arm, points in success.items():
                draw_arm(axis, variant, arm, points, **LOOKS[arm])
            axis.set(title=where[variant], xlabel=label, ylim=(0, None))
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(f"{words['measure']} within budget, %")
        axes[0].legend(frameon=False)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)

    def curve(axis, variant: str, arm: str, points: list[dict], **look) -> None:
        x = [p["flops"] / 1e12 for p in points]
        axis.plot(x, [100 * mean(p[variant]) for p in points], markersize=4, **look)
        axis.fill_between(
            x,
            *([100 * f(p[variant]) for p in points] for f in (min, max)),
            color=look["color"],
            alpha=0.2,
            lw=0,
        )
        if arm == "rl":
            axis.axhline(100 * mean(points[0][variant]), color="gray", lw=1, ls="--", label="SFT init")

    panels("curves.png", "compute after init, 10$^{12}$ FLOP", curve)
    if "visual" in variants:
        recognition = curves(results, variants, "recognition")

        def path(axis, variant: str, arm: str, points: list[dict], **look) -> None:
            x, y = ([100 * mean(p[variant]) for p in side] for side in (recognition[arm], points))
            axis.plot(x, y, markersize=4, alpha=0.8, **look)
            axis.annotate("end", (x[-1], y[-1]), color=look["color"])

        panels("recognition.png", f"replies that {words['reads']}, %", path)
