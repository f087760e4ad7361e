"""Evaluation: counting, pairing, the distance to the initial policy, the report."""

import io
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import make_policy

import envs
import evaluate

KINDS, STEP_KINDS = (envs.make(task).verdicts for task in ("gp-l", "virl-l"))


def episode(outcome, budget=3):
    verdicts = ["wrong_value"] * (outcome - 1) + ["correct"] if outcome else ["illegal"] * budget
    turns = [envs.Turn("", 0.0, v, "", v != "illegal") for v in verdicts]
    return envs.Episode("", [], turns, outcome > 0)


def test_summary_counts_successes_first_replies_verdicts_and_recognition():
    result = evaluate.summary([episode(o) for o in (1, 0, 2, 1)], KINDS)
    assert result["outcomes"] == [1, 0, 2, 1] and result["success"] == 0.75 and result["first_success"] == 0.5
    assert result["success_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4)) and result["turns"] == 7 / 4
    shares = {"correct": 3 / 7, "illegal": 3 / 7, "wrong_value": 1 / 7}
    assert result["verdicts"] == pytest.approx(dict.fromkeys(KINDS, 0.0) | shares)
    assert result["recognition"] == 4 / 7 and result["recognized"] == [1.0, 0.0, 1.0, 1.0]


def test_step_accuracy_counts_all_waypoints_and_its_error_routes():
    def turns(*marks):
        return [envs.Turn("", 0.0, "correct" if right else "wrong_action", "", True, k) for k, right in marks]

    actions = ["turn_direction(left)", "forward()", "stop()"]
    routes = [
        envs.Episode("", actions, turns((0, True), (1, False), (1, True), (2, True)), True),
        envs.Episode("", actions, turns((0, False), (0, False), (1, True), (2, True)), False),
        envs.Episode("", actions, turns((0, True), (1, False), (1, False)), False),
    ]
    result = envs.VIRL.measures(routes)
    assert result["waypoints"] == 9 and result["at_turns"] == [1, 0, 1]
    assert result["step_accuracy"] == pytest.approx(6 / 9)
    assert result["first_step_accuracy"] == pytest.approx(5 / 9)
    by_action = dict.fromkeys(("turn", "forward", "stop"), 2 / 3)
    assert result["step_accuracy_by_action"] == pytest.approx(by_action)
    assert result["steps"] == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-4)
    assert result["step_accuracy_se"] == pytest.approx(math.sqrt((1 / 9 + 0 + 1 / 9) / 2 / 3))
    assert evaluate.summary(routes, STEP_KINDS)["outcomes"] == [2, 0, 0]
    for verdict, recognized, right in (("wrong_observation", True, 5), ("correct", False, 6)):
        routes[1].turns[0] = envs.Turn("", 0.0, verdict, "", recognized, 0)
        assert envs.VIRL.measures(routes)["first_step_accuracy"] == pytest.approx(right / 9)
    routes.append(envs.Episode("", ["forward()", "stop()"]))
    assert envs.VIRL.measures(routes)["at_turns"] == [1, 1, 1, None]


def test_evaluation_walks_every_route_to_its_end(policy):
    environments = [envs.make("virl-l", split="test", points_per_leg=0, verify_iter=1) for _ in range(3)]
    result, episodes = evaluate.evaluate(policy, environments, 1.0, 4)
    assert (
        result["waypoints"] == sum(len(e.turns) for e in episodes) == sum(len(e.expected) for e in episodes)
    )
    assert result["step_accuracy"] == result["success"] == 0 and set(result["verdicts"]) == set(STEP_KINDS)


def test_difference_is_paired():
    rng = random.Random(0)
    a = [rng.choice((0, 1, 2, 3)) for _ in range(1000)]
    b = [0 if i % 10 == 0 else x for i, x in enumerate(a)]
    d = evaluate.difference([{"outcomes": a}] * 2, [{"outcomes": b}] * 2)
    p = sum((x > 0) - (y > 0) for x, y in zip(a, b)) / 1000
    half = 1.96 * math.sqrt(p * (1 - p) / 999)
    assert half < 1.96 * math.sqrt(2 * 0.25 / 1000) / 1.5  # of two samples
    assert d["mean"] == pytest.approx(p) and d["interval"] == pytest.approx((p - half, p + half), abs=1e-9)
    assert evaluate.verdict(d, +1) == "holds" and evaluate.verdict(d, -1) == "does not hold"
    same = evaluate.difference([{"outcomes": a}], [{"outcomes": a}])
    assert evaluate.verdict(same, +1) == "not significant" and same["seed_interval"] is None
    d |= {"seeds": [0.1, -0.02, 0.03]}
    assert evaluate.verdict(d, +1) == evaluate.verdict(d, -1) == "seeds disagree"


@pytest.mark.parametrize(
    "measure, field, a, b, differences",
    [
        ("recognition", "recognized", [0.5, 0.0, 0.75], [0.5, 0.5, 0.5], [0.0, -0.5, 0.25]),
        ("turn_accuracy", "at_turns", [1.0, None, 0.5], [0.5, None, 0.5], [0.5, 0.0]),  # None: no turns
    ],
)
def test_other_measures_are_paired_over_the_episodes_that_have_them(measure, field, a, b, differences):
    d, middle = evaluate.difference([{field: a}], [{field: b}], measure), np.mean(differences)
    half = 1.96 * np.std(differences, ddof=1) / math.sqrt(len(differences))
    assert d["mean"] == pytest.approx(middle)
    assert d["interval"] == pytest.approx((middle - half, middle + half))


def test_repeated_hands_are_not_more_hands():
    """Three hands in turn, the first of them three times: their means count, not seven replies."""
    points = [{"outcomes": outcomes, "distinct": 3} for outcomes in ([1, 0, 0, 2, 1, 0, 0], [0] * 7)]
    d, hands = evaluate.difference(*([p] for p in points)), [2 / 3, 1 / 2, 0]
    half = 1.96 * np.std(hands, ddof=1) / math.sqrt(3)
    assert d["interval"] == pytest.approx((np.mean(hands) - half, np.mean(hands) + half))
    walks = {"at_turns": [1.0, None, 0.5, 0.0, None], "distinct": 3}
    assert evaluate.of_episodes(walks, "turn_accuracy") == [0.5, None, 0.5]


def test_seeds_on_the_same_hands_are_not_more_hands():
    a, b = (np.random.default_rng(0).random((2, 1000)) < 0.3).astype(float)
    middle, half = evaluate.over_episodes([a, a])
    assert middle == pytest.approx(a.mean()) and half == pytest.approx(1.96 * a.std(ddof=1) / 1000**0.5)
    _, both = evaluate.over_episodes([a, b])
    assert both == pytest.approx(1.96 * ((a + b) / 2).std(ddof=1) / 1000**0.5) and both < 0.8 * half


def test_the_interval_over_seeds_is_students_t():
    points = [{"outcomes": [1] * k + [0] * (10 - k)} for k in (5, 6, 7)]
    d, half = evaluate.difference(points, [{"outcomes": [0] * 10}] * 3), 4.303 * 0.1 / math.sqrt(3)
    assert d["seed_interval"] == pytest.approx((0.6 - half, 0.6 + half))


def test_a_walker_who_reports_that_there_is_no_landmark_recognizes_none():
    environments = [envs.make("virl-l", seed=k, split="test", continue_after_failure=True) for k in range(20)]
    nothing = json.dumps(dict(zip(envs.STREET_FIELDS, (envs.NOTHING, "", "forward()"))))
    blind, expert = (
        evaluate.summary(envs.play(environments, lambda indices, _: [reply(i) for i in indices]), STEP_KINDS)
        for reply in (lambda i: nothing, lambda i: environments[i].expert_reply())
    )
    assert blind["verdicts"]["correct"] > 0.3 and blind["recognition"] == 0 and not any(blind["recognized"])
    assert expert["recognition"] == 1


def test_the_same_hands_for_every_checkpoint_and_none_of_training(policy):
    hands = {}
    for series in ("test", "valid", "train/0/0"):
        environments = [envs.make("gp-l", verify_iter=1) for _ in range(20)]
        first, again = (evaluate.evaluate(policy, environments, t, 4, series)[1] for t in (1.0, 0.0))
        hands[series] = [e.expected for e in first]
        assert [e.expected for e in again] == hands[series]
    for series in ("valid", "train/0/0"):
        assert not any(a == b for a, b in zip(hands["test"], hands[series]))


@torch.no_grad()
def exact_kl(first, second, streams):
    """Mean of KL(first || second) over reply tokens."""
    terms = []
    for stream in streams:
        ids, chosen = torch.tensor([stream.ids]), torch.tensor(stream.mask[1:]) > 0
        p, q = (m.model(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (first, second))
        terms += (p.exp() * (p - q)).sum(-1)[chosen].tolist()
    return sum(terms) / len(terms)


def test_distances_to_itself_are_zero_and_to_another_near_the_exact_ones(policy):
    other, environments = make_policy(), [envs.make("gp-l", verify_iter=1) for _ in range(64)]
    matrix = other.model.get_output_embeddings().weight
    with torch.no_grad():
        matrix[: len(matrix) // 2].mul_(0.5)
        matrix[len(matrix) // 2 :].mul_(1 + 2**-12)  # bf16 has steps of 2^-8: hardly a weight crosses one
    reference = evaluate.Reference(policy)
    measured, _ = evaluate.evaluate(other, environments, 1.0, 12, reference=reference)
    streams, _ = evaluate.sampled(other, environments, 1.0, 12, "test")
    initial_streams = reference.conversations["id", "test", 64]
    assert measured["kl_to_init"] == pytest.approx(exact_kl(other, policy, streams), rel=0.15)
    assert measured["kl_from_init"] == pytest.approx(exact_kl(policy, other, initial_streams), rel=0.15)
    half = matrix.numel() / 2 / policy.parameter_count
    assert half * 0.9 < measured["changed"] < half * 1.3
    same, _ = evaluate.evaluate(policy, environments, 1.0, 12, reference=reference)
    assert same["kl_to_init"] == same["kl_from_init"] == same["changed"] == 0
    assert reference.conversations["id", "test", 64] is initial_streams  # sampled once
    evaluate.evaluate(policy, environments, 1.0, 12, "valid", reference)
    assert reference.conversations["id", "valid", 64] is not initial_streams


def test_kl_against_a_loop_and_without_overflow(policy):
    streams = policy.streams([envs.demonstration(envs.make("gp-l", seed=0))])
    gaps = (0.1 * policy(policy.collate(streams))["logp"][0]).tolist()
    kl = evaluate.kl(policy, lambda batch: {"logp": 1.1 * policy(batch)["logp"]}, streams)
    expected = sum(math.exp(gap) - 1 - gap for gap in gaps) / sum(streams[0].mask)
    assert kl == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(evaluate.kl(policy, lambda batch: {"logp": 200.0 * batch["mask"]}, streams))


def test_rank_correlation_is_spearmans():
    rng = random.Random(0)
    x = [rng.choice(range(10)) for _ in range(50)]
    y = [a + rng.choice(range(10)) for a in x]

    def ranks(values):
        order = sorted(values)
        return [order.index(a) + (order.count(a) - 1) / 2 for a in values]

    assert evaluate.rank_correlation(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert evaluate.rank_correlation([1, 2, 3], [1, 8, 27]) == pytest.approx(1)


def test_controls_show_grey_pictures_or_those_of_other_episodes():
    options = {"view_size": 16, "turns": 1, "points_per_leg": 0, "verify_iter": 2}
    environments, observed = [envs.make("virl-vl", **options) for _ in range(3)], []

    def expert(indices, observations):
        replies = []
        for i, observation in zip(indices, observations):
            env = environments[i]
            observed.append((i, env.decision, env.observe().image, observation.image))
            replies.append(env.expert_reply() if env.attempts else env.wrong_reply())
        return replies

    for how in ("blank", "shuffled"):
        observed.clear()
        episodes = envs.play(environments, evaluate.image_control(expert, how), seeds=[1, 2, 3])
        assert all(e.success for e in episodes)
        seen: dict = {}
        for i, at, original, picture in observed:
            # One for each waypoint, for both tries there.
            assert picture is seen.setdefault((i, at), picture) and picture is not original
            assert (np.ptp(picture, (0, 1)).max() == 0) == (how == "blank")
            if how == "shuffled":
                others = [other for j, _, other, _ in observed if j != i]
                assert any(np.array_equal(picture, other) for other in others)
                assert picture.size == original.size
        assert len({id(picture) for picture in seen.values()}) == len(seen)
        assert len(seen) == sum(env.decisions for env in environments)
    with pytest.raises(ValueError, match="need a task with pictures"):
        envs.play([envs.make("gp-l")], evaluate.image_control(expert, "blank"))


# ---- the report

SETTINGS = {"task": "gp-l", "verify_iter": 3}
FIELDS = {"task": "gp-l", "series": "test", "verify_iter": 3, "pictures": "own"}


def points_of(rates):
    """A study's points with success rates by (arm, step, variant, series)."""
    points, rng = [], random.Random(0)
    for seed in (0, 1):
        for (arm, step, variant, series), rate in rates.items():
            for temperature in (1.0, 0.0):
                outcomes = [int(rng.random() < rate) for _ in range(400)]
                fields = {"arm": arm, "seed": seed, "step": step, "variant": variant, "series": series}
                fields |= {"flops": step * 1e12, "temperature": temperature, "kl_to_init": 0.1}
                points.append(FIELDS | fields | evaluate.summary([episode(o) for o in outcomes], KINDS))
    return points


def test_report_states_what_the_points_say(tmp_path, monkeypatch):
    rates = {
        ("init", 0, "id", "test"): 0.5,
        ("init", 0, "rule", "test"): 0.3,
        ("sft", 1, "id", "valid"): 0.95,
        ("sft", 2, "id", "valid"): 0.8,
    }
    for step, sft_id, sft_rule, rl in ((1, 0.9, 0.97, 0.4), (2, 0.9, 0.1, 0.6)):
        rates |= {("sft", step, "id", "test"): sft_id, ("sft", step, "rule", "test"): sft_rule}
        rates |= {("rl", step, "id", "test"): 0.8, ("rl", step, "rule", "test"): rl}
    points = points_of(rates)
    settings = SETTINGS | {"note": "modèle", "model": "M", "parameters": 2_500_000}
    report = evaluate.Report(points, tmp_path, settings, {})
    # An old locale: files whose encoding is not named are ASCII.
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *level: encoding or "ascii")
    claims = report.write()
    assert "modèle" in (tmp_path / "report.md").read_text("utf-8")
    rows = {row.split(" | ")[0].strip("| "): row for row in claims.splitlines()[2:]}
    assert "| **holds** | 15.0 against 11.5 |" in rows["RL ends above init under the other rule"]
    assert "| **holds** | 3.4 against 11.5 |" in rows["SFT ends below init under the other rule"]
    curve = report.curve("rl", "rule")
    assert [compute for compute, _ in curve] == [0, 1, 2] and len(curve[1][1]) == 2  # in 10^12 FLOP

    def steps(arm, **fields):
        return [p["step"] for p in report.final(arm, variant="rule", **fields)]

    assert steps("sft best") == [1, 1] and steps("sft") == [2, 2] and steps("sft@1") == [1, 1]
    # Greedily only last checkpoints are measured; their numbers stay.
    report.points = [p for p in report.points if p["temperature"] or p["step"] != 1]
    assert steps("sft@2", temperature=0.0) == [2, 2] and steps("sft@1", temperature=0.0) == []
    plt = pytest.importorskip("matplotlib.pyplot")
    assert (tmp_path / "figures/curves.png").read_bytes()[:4] == b"\x89PNG"
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    evaluate.draw(report)
    for axis in figures[0].axes:
        assert max(max(line.get_ydata()) for line in axis.lines) < axis.get_ylim()[1]


def test_ends_are_compared_on_most_episodes_and_points_between_on_the_same(tmp_path):
    fields = FIELDS | {"variant": "id", "seed": 0, "temperature": 1.0, "flops": 0.0}
    points = [
        fields | {"arm": arm, "step": step, "episodes": episodes, "success": episodes / 100}
        for arm, step, episodes in (("init", 0, 40), ("sft", 1, 10), ("sft", 2, 40), ("sft", 2, 10))
    ]
    report = evaluate.Report(points, tmp_path, SETTINGS, {})
    assert [p["episodes"] for p in report.final("sft", variant="id")] == [40]
    assert [value for _, value in report.curve("sft", "id")] == [[0.4], [0.1], [0.1]]


def test_a_section_has_a_row_for_each_arm_with_both_decodings(tmp_path):
    rates = {"init": (0, 0.3), "rl": (0, 0.6), "x-1": (1, 0.3), "x-3": (1, 0.9)}
    points = points_of({(a, n, v, "test"): r for a, (n, r) in rates.items() for v in ("id", "rule")})
    points = [p for p in points if p["arm"] != "x-1" or p["temperature"]]
    report = evaluate.Report(points, tmp_path, SETTINGS, {"no-init": [("x-1", {}), ("x-3", {})]})
    _, _, low, high = (row.split(" | ") for row in report.section("no-init")[0].splitlines())
    assert low[0] == "| x-1 ends below RL under the other rule" and low[4:8] == ["", "", "", "**holds**"]
    assert high[0] == "| x-3 ends below RL under the other rule" and high[7] == "**does not hold**"
    for against, d, seeds in (high[1:4], high[4:7]):  # at temperature 1, and greedy
        assert " against " in against and d.startswith("+") and d.count("+") == 3
        assert len(seeds.split(" [")[0].split(", ")) == 2


def test_forgetting_covers_the_arms_that_start_from_the_init(tmp_path):
    arms = (("init", 0), ("rl", 1), ("raw", 1))
    points = points_of({(arm, step, v, "test"): 0.5 for arm, step in arms for v in ("id", "rule")})
    points = [point | {"changed": 0.1, "kl_from_init": 0.1} for point in points]
    report = evaluate.Report(points, tmp_path, SETTINGS, {"no-init": [("raw", {})]})
    assert sorted((arm, p["seed"]) for arm, p, _ in report.changes) == [("rl", 0), ("rl", 1)]
    assert "| 2 checkpoints | +nan | +nan | +nan |" in report.section("forgetting")[0].splitlines()


def frontier_points():
    """A frontier's: (in distribution, under the other rule) by arm, seed and step."""
    init, sft, fast, rl = [(0.4, 0.2)], [(0.6, 0.3), (0.8, 0.4)], [(0.7, 0.1), (0.9, 0.0)], [(0.5, 0.3)]
    curves = {("init", s): init for s in (0, 1)} | {("sft-0.0001", 0): sft, ("sft-0.001", 0): fast}
    curves |= {("sft-0.0001", 1): [sft[0], (0.9, 0.4)], ("sft-0.001", 1): [fast[0], (0.7, 0.0)]}
    curves |= {("rl-0.0001", s): [*rl, (0.7, 0.5)] for s in (0, 1)}
    points = points_of({(a, 2, v, "test"): 0.5 for a, _ in curves for v in ("id", "rule")})
    for (arm, seed), curve in curves.items():
        for step, pair in enumerate(curve, 1):
            fields = {"arm": arm, "seed": seed, "step": step, "flops": step * 1e12, "series": "valid"}
            fields |= {"temperature": 1.0, "experiment": "frontier", "episodes": 20 if arm == "init" else 10}
            for variant, x in zip(("id", "rule"), pair):
                outcomes = [int(i < round(10 * x)) for i in range(20)]  # the init fails after the first ten
                points.append(FIELDS | fields | {"variant": variant, "success": x, "outcomes": outcomes})
    return points


def test_a_rate_is_chosen_on_the_other_seeds():
    ends = {1e-5: [(0.5, 0.9)] * 2, 1e-4: [(0.86, 0.5), (0.87, 0.3)], 1e-3: [(0.9, 0.0), (0.86, 0.1)]}
    # Means .5, .865 and .88; the last one's standard error is .02.
    assert evaluate.choose(ends) == {"best": 1e-3, "smallest": 1e-4, "peeking": 1e-5}
    assert evaluate.choose({rate: x[:1] for rate, x in ends.items()})["smallest"] == 1e-3
    chosen = evaluate.chosen_arms(frontier_points(), "success")
    assert chosen["sft-best"] == {0: "sft-0.0001", 1: "sft-0.001"}
    assert chosen["sft-peeking"] == {0: "sft-0.0001", 1: "sft-0.0001"}
    alone = [p for p in frontier_points() if p["seed"] == 0]
    assert evaluate.chosen_arms(alone, "success")["sft-best"] == {0: "sft-0.001"}


def test_success_elsewhere_at_equal_success_in_distribution(tmp_path):
    curve = [(0.3, 0.1), (0.5, 0.2), (0.4, 0.9), (0.7, 0.0)]  # the first crossing counts
    assert [evaluate.at_level(curve, x) for x in (0.4, 0.5, 0.8)] == pytest.approx([0.15, 0.2, None])
    report = evaluate.Report(frontier_points(), tmp_path, SETTINGS, {"frontier": []})
    title, _, head, _, *rows = report.levels("rule").splitlines()
    assert "RL at 6." in title and head.split(" | ")[1:4] == ["sft 0.0001", "sft 0.001", "rl 0.0001"]
    assert "| 50 | 25.0 | 16.7 | 30.0 | 20.8 | 30.0 | +9.2 [+9.2, +9.2] |" in rows
    assert "| 75 | 36.2 |  |  |  |  |  |" in rows and len(rows) == 8  # from 45 to 80
    lines = dict(report.series("frontier", "rule"))
    assert lines["sft 1e-3"] == [(40, [0.2, 0.2]), (70, [0.1, 0.1]), (80, [0.0, 0.0])]
    text = "\n".join(report.section("frontier"))
    assert "| rl-best ends above sft-best under the other rule |" in text
    assert "| best: highest success in distribution | 0.0001, 0.001 | 0.0001, 0.0001 |" in text
