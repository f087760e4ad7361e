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

KINDS = envs.make("gp-l").verdicts
STEP_KINDS = envs.make("virl-l").verdicts


def episode(outcome, budget=3):
    verdicts = ["wrong_value"] * (outcome - 1) + ["correct"] if outcome else ["illegal"] * budget
    turns = [envs.Turn("", 0.0, v, "", True) for v in verdicts]
    return envs.Episode("", [], turns, outcome > 0)


def test_summary_counts_successes_first_replies_and_verdicts():
    result = evaluate.summary([episode(o) for o in (1, 0, 2, 1)], KINDS)
    assert result["outcomes"] == [1, 0, 2, 1] and result["success"] == 0.75 and result["first_success"] == 0.5
    assert result["verdicts"]["correct"] == pytest.approx(3 / 7) and result["verdicts"][
        "illegal"
    ] == pytest.approx(3 / 7)
    assert result["success_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4)) and result["turns"] == 7 / 4


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
    assert (
        result["waypoints"] == 9
        and result["step_accuracy"] == pytest.approx(6 / 9)
        and result["first_step_accuracy"] == pytest.approx(5 / 9)
    )
    assert result["step_accuracy_by_action"] == {
        "turn": pytest.approx(2 / 3),
        "forward": pytest.approx(2 / 3),
        "stop": pytest.approx(2 / 3),
    }
    assert result["steps"] == pytest.approx([1, 2 / 3, 1 / 3], abs=1e-4)
    assert result["at_turns"] == [1, 0, 1]
    # Routes of one length: that of a mean.
    assert result["step_accuracy_se"] == pytest.approx(math.sqrt((1 / 9 + 0 + 1 / 9) / 2 / 3))
    assert evaluate.summary(routes, STEP_KINDS)["outcomes"] == [2, 0, 0]
    for verdict, recognized, right in (("wrong_observation", True, 5), ("correct", False, 6)):
        routes[1].turns[0] = envs.Turn("", 0.0, verdict, "", recognized, 0)
        assert envs.VIRL.measures(routes)["first_step_accuracy"] == pytest.approx(right / 9)
    assert envs.VIRL.measures([*routes, envs.Episode("", ["forward()", "stop()"])])["at_turns"] == [
        1,
        1,
        1,
        None,
    ]


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
    b = [0 if i % 10 == 0 else x for i, x in enumerate(a)]  # loses a tenth of a's hands at most
    d = evaluate.difference([{"outcomes": a}] * 2, [{"outcomes": b}] * 2)
    lost = [(x > 0) - (y > 0) for x, y in zip(a, b)]
    p = sum(lost) / 1000
    half = 1.96 * math.sqrt(p * (1 - p) / 999)
    assert d["mean"] == pytest.approx(p) and d["interval"] == pytest.approx((p - half, p + half), abs=1e-9)
    unpaired = 1.96 * math.sqrt(2 * 0.25 / 1000)
    assert half < unpaired / 1.5
    assert evaluate.verdict(d, +1) == "holds" and evaluate.verdict(d, -1) == "does not hold"
    same = evaluate.difference([{"outcomes": a}], [{"outcomes": a}])
    assert evaluate.verdict(same, +1) == "not significant" and same["seed_interval"] is None


def test_seeds_on_the_same_hands_are_not_more_hands():
    """Two seeds that solve the same hands tell as much as one, two that differ at random more."""
    rng = np.random.default_rng(0)
    a, b = (rng.random((2, 1000)) < 0.3).astype(float)
    middle, half = evaluate.over_episodes([a, a])
    assert middle == pytest.approx(a.mean()) and half == pytest.approx(1.96 * a.std(ddof=1) / 1000**0.5)
    _, both = evaluate.over_episodes([a, b])
    assert both == pytest.approx(1.96 * ((a + b) / 2).std(ddof=1) / 1000**0.5)
    assert both < 0.8 * half


def test_recognition_is_counted_over_replies_and_paired_over_hands():
    turns = [[True, False], [False], [True, True, True, False]]
    episodes = [
        envs.Episode("", [], [envs.Turn("", 0.0, "illegal", "", seen) for seen in replies])
        for replies in turns
    ]
    summary = evaluate.summary(episodes, KINDS)
    assert summary["recognition"] == 4 / 7 and summary["recognized"] == [0.5, 0.0, 0.75]
    # The route without turns is left out.
    turned = evaluate.difference(
        [{"at_turns": [1.0, None, 0.5]}], [{"at_turns": [0.5, None, 0.5]}], "turn_accuracy"
    )
    assert turned["mean"] == 0.25 and turned["interval"] == pytest.approx(
        (0.25 - 1.96 * 0.25, 0.25 + 1.96 * 0.25)
    )
    d = evaluate.difference([summary], [summary | {"recognized": [0.5, 0.5, 0.5]}], "recognition")
    assert d["mean"] == pytest.approx(-0.25 / 3) and d["interval"][0] < 0 < d["interval"][1]


def test_a_walker_who_reports_that_there_is_no_landmark_recognizes_none():
    environments = [envs.make("virl-l", seed=k, split="test", continue_after_failure=True) for k in range(20)]
    nothing = json.dumps(dict(zip(envs.STREET_FIELDS, (envs.NOTHING, "", "forward()"))))
    blind = evaluate.summary(
        envs.play(environments, lambda indices, observations: [nothing] * len(indices)), STEP_KINDS
    )
    assert blind["verdicts"]["correct"] > 0.3 and blind["recognition"] == 0 and not any(blind["recognized"])
    expert = evaluate.summary(
        envs.play(
            environments, lambda indices, observations: [environments[i].expert_reply() for i in indices]
        ),
        STEP_KINDS,
    )
    assert expert["recognition"] == 1


def test_seeds_that_disagree_are_not_called_a_finding():
    d = {"mean": 0.03, "interval": (0.01, 0.05), "seeds": [0.1, -0.02, 0.03]}
    assert evaluate.verdict(d, +1) == evaluate.verdict(d, -1) == "seeds disagree"


def test_the_interval_over_seeds_is_students_t():
    points = [{"outcomes": [1] * k + [0] * (10 - k)} for k in (5, 6, 7)]
    d = evaluate.difference(points, [{"outcomes": [0] * 10}] * 3)
    assert d["seed_interval"] == pytest.approx(
        (0.6 - 4.303 * 0.1 / math.sqrt(3), 0.6 + 4.303 * 0.1 / math.sqrt(3))
    )


def test_the_same_hands_for_every_checkpoint_and_none_of_training(policy):
    hands = {}
    for series in ("test", "valid", "train/0/0"):
        environments = [envs.make("gp-l", verify_iter=1) for _ in range(20)]
        _, episodes = evaluate.evaluate(policy, environments, 1.0, 4, series)
        hands[series] = [e.expected for e in episodes]
        _, again = evaluate.evaluate(policy, environments, 0.0, 4, series)
        assert [e.expected for e in again] == hands[series]
    assert not any(
        a == b for x, y in (("test", "valid"), ("test", "train/0/0")) for a, b in zip(hands[x], hands[y])
    )


def test_kl_to_init_is_zero_for_itself_and_near_the_exact_value_for_another():
    policy, other = make_policy(), make_policy()
    with torch.no_grad():
        other.model.get_output_embeddings().weight.mul_(0.8)
    environments = [envs.make("gp-l", verify_iter=1) for _ in range(64)]
    assert (
        evaluate.evaluate(policy, environments, 1.0, 12, reference=evaluate.Reference(policy))[0][
            "kl_to_init"
        ]
        == 0
    )
    measured = evaluate.evaluate(policy, environments, 1.0, 12, reference=evaluate.Reference(other))[0][
        "kl_to_init"
    ]
    with policy.responder(1.0, 12, policy.generator("x")) as respond:
        envs.play(environments, respond, [f"test/{i}" for i in range(64)])
    exact = []
    with torch.no_grad():
        for (stream,) in (respond.streams[i] for i in range(64)):
            ids = torch.tensor([stream.ids])
            p, q = (m.model(input_ids=ids).logits[0].log_softmax(-1) for m in (policy, other))
            exact += [
                (p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item()
                for t, chosen in enumerate(stream.mask)
                if chosen
            ]
    assert measured == pytest.approx(sum(exact) / len(exact), rel=0.15)


def test_the_divergence_from_init_is_measured_on_inits_own_replies(policy):
    """KL(init, policy) is near the exact one; weights count as changed after rounding to bf16 alone."""
    other = make_policy()
    assert all(torch.equal(p, q) for p, q in zip(policy.model.parameters(), other.model.parameters()))
    matrix = other.model.get_output_embeddings().weight
    with torch.no_grad():
        matrix[: len(matrix) // 2].mul_(0.8)
        matrix[len(matrix) // 2 :].mul_(1 + 2**-12)  # bf16 tells steps of 2^-8 apart: few weights cross one
    environments = [envs.make("gp-l", verify_iter=1) for _ in range(64)]
    reference = evaluate.Reference(policy)
    measured = evaluate.evaluate(other, environments, 1.0, 12, reference=reference)[0]
    (streams,) = reference.conversations.values()
    exact = []
    with torch.no_grad():
        for stream in streams:
            ids = torch.tensor([stream.ids])
            p, q = (m.model(input_ids=ids).logits[0].log_softmax(-1) for m in (policy, other))
            chosen = torch.tensor(stream.mask[1:]) > 0
            exact += (p[:-1].exp() * (p[:-1] - q[:-1])).sum(-1)[chosen].tolist()
    assert measured["kl_from_init"] == pytest.approx(sum(exact) / len(exact), rel=0.15)
    assert measured["kl_from_init"] != measured["kl_to_init"]
    half = matrix.numel() / 2 / sum(p.numel() for p in other.model.parameters())
    assert half * 0.9 < measured["changed"] < half * 1.3
    streams_before = reference.conversations["id", 64]
    evaluate.evaluate(policy, environments, 1.0, 12, reference=reference)
    assert reference.conversations["id", 64] is streams_before  # sampled once


def test_rank_correlation_is_spearmans():
    rng = random.Random(0)
    x = [rng.choice(range(10)) for _ in range(50)]
    y = [a + rng.choice(range(10)) for a in x]

    def ranks(own):
        order = sorted(own)
        return [order.index(a) + (order.count(a) - 1) / 2 for a in own]

    expected = np.corrcoef(ranks(x), ranks(y))[0, 1]
    assert evaluate.rank_correlation(x, y) == pytest.approx(expected)
    assert evaluate.rank_correlation([1, 2, 3], [1, 8, 27]) == pytest.approx(1)


def results_of(tmp_path, rates):
    """A study's points with success rates by (arm, step, variant)."""
    results, rng = evaluate.Results(tmp_path / "results.jsonl"), random.Random(0)
    for seed in (0, 1):
        for (arm, step, variant, series), rate in rates.items():
            for temperature in (1.0, 0.0):
                outcomes = [int(rng.random() < rate) for _ in range(400)]
                summary = evaluate.summary([episode(o) for o in outcomes], KINDS)
                results.add(
                    {
                        "task": "gp-l",
                        "arm": arm,
                        "seed": seed,
                        "step": step,
                        "flops": step * 1e12,
                        "variant": variant,
                        "series": series,
                        "temperature": temperature,
                        "verify_iter": 3,
                        "pictures": "own",
                        **summary,
                        "kl_to_init": 0.1,
                        "checkpoint": "x",
                    }
                )
    return results


def test_report_states_what_the_points_say(tmp_path, monkeypatch):
    rates = {
        ("init", 0, "id", "test"): 0.5,
        ("init", 0, "rule", "test"): 0.3,
        ("sft", 1, "id", "valid"): 0.95,
        ("sft", 2, "id", "valid"): 0.8,
    }
    for step, sft_id, sft_rule, rl in ((1, 0.9, 0.5, 0.4), (2, 0.9, 0.1, 0.6)):
        rates |= {
            ("sft", step, "id", "test"): sft_id,
            ("sft", step, "rule", "test"): sft_rule,
            ("rl", step, "id", "test"): 0.8,
            ("rl", step, "rule", "test"): rl,
        }
    results = results_of(tmp_path, rates)
    settings = {
        "task": "gp-l",
        "verify_iter": 3,
        "note": "modèle",
        "model": "M",
        "parameters": 2_500_000,
        "arms": [],
    }
    report = evaluate.Report(results.points, tmp_path, settings, {})
    # The encoding of files where none is named, in a locale of old.
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *level: encoding or "ascii")
    claims = report.write()
    assert "modèle" in (tmp_path / "report.md").read_text("utf-8")
    rows = {row.split(" | ")[0].strip("| "): row for row in claims[2:]}
    assert "| **holds** | 15.0 against 11.5 |" in rows["RL ends above init under the other rule"]
    assert "| **holds** | 3.4 against 11.5 |" in rows["SFT ends below init under the other rule"]

    def steps(arm, **fields):
        return [p["step"] for p in evaluate.final_points(results.points, arm, variant="rule", **fields)]

    assert steps("sft best") == [1, 1] and steps("sft") == [2, 2] and steps("sft@1") == [1, 1]
    assert evaluate.Results(tmp_path / "results.jsonl").points == results.points
    # Greedily only last checkpoints are measured; their numbers stay.
    results.points = [p for p in results.points if p["temperature"] or p["step"] != 1]
    assert steps("sft@2", temperature=0.0) == [2, 2] and steps("sft@1", temperature=0.0) == []
    curve = report.curve("rl", "rule")
    assert [compute for compute, _ in curve] == [0, 1, 2] and len(curve[1][1]) == 2  # in 10^12 FLOP
    pytest.importorskip("matplotlib")
    assert (tmp_path / "figures/curves.png").read_bytes()[:4] == b"\x89PNG"


def test_controls_show_grey_pictures_or_those_of_other_episodes():
    observed, environments = (
        [],
        [envs.make("virl-vl", view_size=16, turns=1, points_per_leg=0, verify_iter=2) for _ in range(3)],
    )

    def expert(indices, observations):
        observed.extend(
            (i, environments[i].decision, environments[i].observe().image, o.image)
            for i, o in zip(indices, observations)
        )
        return [
            environments[i].wrong_reply() if not environments[i].attempts else environments[i].expert_reply()
            for i in indices
        ]

    for how in ("blank", "shuffled"):
        observed.clear()
        assert all(
            e.success for e in envs.play(environments, evaluate.image_control(expert, how), seeds=[1, 2, 3])
        )
        seen: dict = {}
        for i, at, original, picture in observed:
            # One for each waypoint, for both tries there.
            assert picture is seen.setdefault((i, at), picture) and picture is not original
            colors = picture.getcolors(2)
            assert (colors is not None and len(colors) == 1) == (how == "blank")
            if how == "shuffled":
                assert (
                    any(np.array_equal(picture, other) for j, _, other, _ in observed if j != i)
                    and picture.size == original.size
                )
        assert (
            len({id(picture) for picture in seen.values()})
            == len(seen)
            == sum(env.decisions for env in environments)
        )
    with pytest.raises(ValueError, match="need a task with pictures"):
        envs.play([envs.make("gp-l")], evaluate.image_control(expert, "blank"))


def test_ends_are_compared_on_most_episodes_and_points_between_on_the_same(tmp_path):
    fields = {"task": "gp-l", "variant": "id", "verify_iter": 3}
    fields |= {"seed": 0, "series": "test", "temperature": 1.0, "pictures": "own"}
    points = [
        fields | {"arm": arm, "step": step, "episodes": episodes, "success": episodes / 100, "flops": 0.0}
        for arm, step, episodes in (("init", 0, 40), ("sft", 1, 10), ("sft", 2, 40), ("sft", 2, 10))
    ]
    report = evaluate.Report(points, tmp_path, {"task": "gp-l", "verify_iter": 3}, {})
    assert [p["episodes"] for p in report.final("sft", variant="id")] == [40]
    assert [value for _, value in report.curve("sft", "id")] == [[0.4], [0.1], [0.1]]


def test_both_decodings_stand_in_one_row_and_the_arms_of_a_section_in_one_each(tmp_path):
    rates = {(arm, 0, v, "test"): r for arm, r in (("init", 0.3), ("rl", 0.6)) for v in ("id", "rule")}
    rates |= {(f"x-{k}", 1, v, "test"): 0.3 * k for k in (1, 3) for v in ("id", "rule")}
    points = results_of(tmp_path, rates).points
    points = [p for p in points if p["arm"] != "x-1" or p["temperature"]]
    settings = {"task": "gp-l", "verify_iter": 3}
    report = evaluate.Report(points, tmp_path, settings, {"no-init": [("x-1", {}), ("x-3", {})]})
    _, _, low, high = (row.split(" | ") for row in report.section("no-init")[:4])
    assert low[0] == "| x-1 ends below RL under the other rule" and low[4:8] == ["", "", "", "**holds**"]
    assert high[0] == "| x-3 ends below RL under the other rule" and high[7] == "**does not hold**"
    for against, d, seeds in (high[1:4], high[4:7]):  # at temperature 1, and greedy
        assert " against " in against and d.startswith("+") and d.count("+") == 3
        assert len(seeds.split(" [")[0].split(", ")) == 2


def test_forgetting_covers_the_arms_that_start_from_the_init(tmp_path):
    rates = {
        (arm, step, v, "test"): 0.5
        for arm, step in (("init", 0), ("rl", 1), ("raw", 1))
        for v in ("id", "rule")
    }
    results = results_of(tmp_path, rates)
    for point in results.points:
        point |= {"changed": 0.1, "kl_from_init": 0.1}
    settings = {"task": "gp-l", "verify_iter": 3}
    report = evaluate.Report(results.points, tmp_path, settings, {"no-init": [("raw", {})]})
    assert sorted((arm, p["seed"]) for arm, p, _ in report.changes) == [("rl", 0), ("rl", 1)]
    assert "| 2 checkpoints | +nan | +nan | +nan |" in report.section("forgetting")


def test_distances_stay_finite_where_a_token_was_all_but_impossible(policy):
    streams = policy.streams([envs.demonstration(envs.make("gp-l", seed=0))])

    def other(batch):
        return {"logp": torch.full_like(batch["mask"], 200.0) * batch["mask"]}

    total, tokens = evaluate.kl_sums(policy, other, streams)
    assert math.isfinite(total) and tokens == sum(streams[0].mask)
