"""PPO: the mathematics against naive references, the masks, and learning."""

import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import SIGHTED, SMALL, make_policy

import envs
import ppo
import sft


def naive_gae(rewards, values, gamma, lam):
    """By the definition, over one line of all tokens: A_t = sum over later tokens j of (product of discounts
    and lambdas) delta_j."""
    line = [(k, t) for k, own in enumerate(values) for t in range(len(own))]
    value = [values[k][t] for k, t in line] + [0.0]
    reward = [rewards[k] if t + 1 == len(values[k]) else 0.0 for k, t in line]
    discount = [gamma if t + 1 == len(values[k]) else 1.0 for k, t in line]
    delta = [reward[i] + discount[i] * value[i + 1] - value[i] for i in range(len(line))]
    advantages = [[0.0] * len(own) for own in values]
    for i, (k, t) in enumerate(line):
        factor = 1.0
        for j in range(i, len(line)):
            advantages[k][t] += factor * delta[j]
            factor *= discount[j] * lam
    return advantages


@pytest.mark.parametrize("gamma, lam", [(0.9, 0.95), (1.0, 1.0), (0.5, 0.0), (0.0, 0.7)])
def test_gae_against_the_definition(gamma, lam):
    rng = random.Random(0)
    for _ in range(20):
        values = [[rng.gauss(0, 1) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 6))]
        rewards = [rng.gauss(0, 1) for _ in values]
        advantages, returns = ppo.gae(rewards, values, gamma, lam)
        for own, expected, returned, value in zip(
            advantages, naive_gae(rewards, values, gamma, lam), returns, values
        ):
            assert own == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert returned == pytest.approx([a + v for a, v in zip(expected, value)], rel=1e-12, abs=1e-12)


def test_gae_by_hand_discounts_once_per_turn_and_not_per_token():
    # A reply of two tokens, reward -1; a reply of one, reward 5.
    advantages, returns = ppo.gae([-1.0, 5.0], [[0.0, 0.0], [0.0]], gamma=0.9, lam=1.0)
    assert advantages == returns == [[-1 + 0.9 * 5, -1 + 0.9 * 5], [5.0]]
    assert ppo.gae([], [], 0.9, 1.0) == ([], [])
    with pytest.raises(ValueError):
        ppo.gae([1.0], [[0.0], [0.0]], 0.9, 1.0)


def test_advantages_of_stand_where_the_replies_do_and_leak_into_no_other_episode():
    values = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    places = [[(2, 1, 4), (2, 6, 7)], [(0, 3, 5), (3, 0, 2), (0, 8, 12)]]  # the second over several rows
    rewards = [[1.0, -2.0], [0.5, 3.0, -1.0]]
    advantages, returns = ppo.advantages_of(rewards, values, places, 0.9, 0.8)
    seen = torch.zeros(4, 12)
    for reward, own in zip(rewards, places):
        lines = naive_gae(reward, [values[b, start:stop].tolist() for b, start, stop in own], 0.9, 0.8)
        for (b, start, stop), line in zip(own, lines):
            expected = torch.tensor(line)
            torch.testing.assert_close(advantages[b, start:stop], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                returns[b, start:stop], expected + values[b, start:stop], rtol=0, atol=1e-5
            )
            seen[b, start:stop] = 1
    assert not advantages[seen == 0].any() and not returns[seen == 0].any() and seen.sum() == 12


def test_policy_loss_against_a_loop_and_its_gradient_against_finite_differences():
    g = torch.Generator().manual_seed(0)
    logp, old, adv = (torch.randn(3, 6, generator=g, dtype=torch.double) * 0.5 for _ in range(3))
    mask = (torch.rand(3, 6, generator=g) < 0.6).double()
    total, n = 0.0, 0
    for b in range(3):
        for t in range(6):
            if mask[b, t]:
                ratio = math.exp(logp[b, t] - old[b, t])
                total += min(ratio * adv[b, t].item(), min(max(ratio, 0.8), 1.2) * adv[b, t].item())
                n += 1
    assert ppo.policy_loss(logp, old, adv, mask, 0.2).item() == pytest.approx(-total / n, rel=1e-12)
    logp.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo.policy_loss(x, old, adv, mask, 0.2), logp)


def test_value_loss_against_a_loop_and_its_gradient_against_finite_differences():
    g = torch.Generator().manual_seed(1)
    values, old, returns = (torch.randn(3, 6, generator=g, dtype=torch.double) for _ in range(3))
    mask = (torch.rand(3, 6, generator=g) < 0.6).double()
    total, n = 0.0, 0
    for b in range(3):
        for t in range(6):
            if mask[b, t]:
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                total += max((v - r) ** 2, (min(max(v, o - 0.3), o + 0.3) - r) ** 2)
                n += 1
    assert ppo.value_loss(values, old, returns, mask, 0.3).item() == pytest.approx(0.5 * total / n, rel=1e-12)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ppo.value_loss(x, old, returns, mask, 0.3), values)


def test_clipping_stops_the_gradient_only_where_the_ratio_left_the_range_in_the_advantages_direction():
    logp = torch.tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    ppo.policy_loss(logp, torch.zeros(1, 4), advantages, torch.ones(1, 4), 0.2).backward()
    assert [bool(g) for g in logp.grad[0]] == [False, True, True, False]


def test_a_ratio_beyond_fp32_has_no_gradient_where_it_is_clipped_and_a_finite_one_elsewhere():
    logp = torch.tensor([[100.0, 100.0, 0.1]], requires_grad=True)
    advantages, ones = torch.tensor([[1.0, -1.0, 1.0]]), torch.ones(1, 3)
    loss = ppo.policy_loss(logp, torch.zeros(1, 3), advantages, ones, 0.2)
    loss.backward()
    clipped, shrinking, usual = logp.grad[0].tolist()
    assert clipped == 0 and 0 < shrinking < math.inf and usual == pytest.approx(-math.exp(0.1) / 3)
    assert loss.isfinite() and ppo.kl_estimate(torch.zeros(1), torch.full((1,), 100.0)).isfinite()


def test_kl_estimate_is_unbiased_and_never_negative():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, generator=g).log_softmax(-1)
    draws = torch.multinomial(p.exp(), 400_000, replacement=True, generator=g)
    estimate = ppo.kl_estimate(p[draws], q[draws])
    assert estimate.min() >= 0 and estimate.mean().item() == pytest.approx(
        (p.exp() * (p - q)).sum().item(), rel=0.02
    )


def test_per_reply_sums_each_reply_onto_its_first_token():
    starts = torch.tensor([[0.0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]])
    x = torch.tensor([[0.0, 1, 2, 0, 4, 0], [1, 1, 0, 0, 0, 0]])
    assert ppo.per_reply(x, starts).tolist() == [[0, 3, 0, 0, 4, 0], [2, 0, 0, 0, 0, 0]]


class OneRank:
    """What `whiten` asks of a policy."""

    @staticmethod
    def sum(*numbers):
        return [float(n) for n in numbers]


def test_whitening_is_masked():
    x, mask = torch.randn(4, 9) * 3 + 7, (torch.rand(4, 9) < 0.5).float()
    white = ppo.whiten(OneRank, x, mask)
    chosen = white[mask > 0]
    assert abs(chosen.mean()) < 1e-5 and chosen.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert not white[mask == 0].any()


# ---- with a policy


def small_config(**changes):
    return ppo.PPOConfig(
        **(
            {
                "episodes": 6,
                "minibatch_size": 3,
                "microbatch_size": 2,
                "epochs": 2,
                "max_new_tokens": 12,
                "lr": 1e-3,
            }
            | changes
        )
    )


def played(policy, config, verify_iter=3, task="gp-l"):
    small = {"gp-vl": SMALL, "virl-vl": {"view_size": 16, "turns": 1, "points_per_leg": 1}}.get(task, {})
    environments = [envs.make(task, verify_iter=verify_iter, **small) for _ in range(config.episodes)]
    return ppo.rollout(policy, environments, config, step=0)


@pytest.mark.parametrize(
    "kind, task",
    [
        ("llava", "gp-l"),
        ("llava", "virl-l"),
        ("mllama", "gp-l"),
        ("llava", "virl-vl"),
        *((kind, "gp-vl") for kind in SIGHTED),
    ],
)
@pytest.mark.parametrize("ratio", ["token", "reply"])
def test_first_ratio_is_one_and_moves_after_a_step(kind, task, ratio):
    policy, config = make_policy(kind), small_config(ratio=ratio, thought_coef=0.5)
    streams, episodes = played(policy, config, task=task)
    batch = ppo.collect(policy, streams, episodes, config, "formula")
    metrics = ppo.update(policy, policy.optimizers(config.lr, 1e-3), batch, config, step=0)
    assert metrics["first_ratio_error"] < 1e-5 < metrics["largest_ratio"] - 1
    assert metrics["approx_kl"] > 0 and metrics["grad_norm"] > 0


def test_batch_masks_rewards_and_old_logp_say_what_the_sampler_did(policy):
    config = small_config(temperature=0.7)
    streams, episodes = played(policy, config)
    batch = ppo.collect(policy, streams, episodes, config, "formula")
    order = sorted(range(6), key=lambda i: len(streams[i][0]))
    for b, i in enumerate(order):
        (stream,) = streams[i]
        n = len(stream)
        assert batch["ids"][b, :n].tolist() == stream.ids and batch["mask"][b, :n].tolist() == stream.mask
        assert not batch["mask"][b, n:].any()
        torch.testing.assert_close(batch["old_logp"][b, :n], torch.tensor(stream.logp), rtol=0, atol=1e-5)
        last = stream.replies[-1][1] - 1
        assert batch["returns"][b, last].item() == pytest.approx(episodes[i].turns[-1].reward, abs=1e-5)
        assert not batch["advantages"][b][batch["mask"][b] == 0].any()


def test_advantages_run_across_the_waypoints_of_a_route(policy):
    config, env = small_config(lam=1.0), envs.make("virl-l", seed=1, drop=1.0)
    stream = policy.streams([envs.demonstration(env)])[0]
    n = len(stream.replies)
    episode = envs.Episode("", [], [envs.Turn("", float(k), "correct", "", True, k) for k in range(n)], True)
    stream.logp = [0.0] * len(stream)
    batch = ppo.collect(policy, [[stream]], [episode], config, "action")
    assert n == env.decisions > 2
    for k, (start, stop) in enumerate(stream.replies):
        expected = sum(j * config.gamma ** (j - k) for j in range(k, n))
        torch.testing.assert_close(
            batch["returns"][0, start:stop], torch.full((stop - start,), expected), rtol=1e-5, atol=1e-5
        )


def test_imitation_learns_from_right_replies_alone_and_every_token_counts_alike():
    policy, config = make_policy(), small_config(objective="imitate", episodes=2, minibatch_size=2)
    env = envs.make("gp-l", seed=1)
    records = [envs.demonstration(env, wrong_turns) for wrong_turns in (2, 0)]
    streams = policy.streams(records)
    verdicts = [["wrong_value", "wrong_value", "correct"], ["wrong_value"]]  # the last one's is made up
    episodes = [
        envs.Episode("", [], [envs.Turn("", 5.0 if v == "correct" else -1.0, v, "", True) for v in own])
        for own in verdicts
    ]
    batch = ppo.collect(policy, [[s] for s in streams], episodes, config, "formula")
    start, stop = streams[0].replies[-1]
    for row, stream in zip(batch["advantages"], sorted(streams, key=len)):
        right = set(range(start, stop)) if stream is streams[0] else set()
        assert {t for t, a in enumerate(row.tolist()) if a == 1} == right and set(row.tolist()) <= {0.0, 1.0}
    part = ppo.rows_of(batch, torch.arange(2))
    scores = policy(part, values="detached", entropy=True)
    actions = part["actions"].sum().item()
    loss, logged = ppo.losses(scores, part, config, actions, actions, warming=False)
    row = [len(s) for s in sorted(streams, key=len)].index(len(streams[0]))
    expected = -scores["logp"][row, start:stop].sum() / actions
    assert logged["policy_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


class Guided:
    """Plays a walk with pictures: the first reply at each waypoint is the model's own, the second the
    expert's."""

    def __init__(self, respond, environments):
        self.respond, self.environments = respond, environments

    def __call__(self, indices, observations):
        own = self.respond(indices, observations)
        return [
            self.environments[i].expert_reply() if self.environments[i].attempts else reply
            for i, reply in zip(indices, own)
        ]


@pytest.mark.parametrize("kind", ["llava", "mllama"])
def test_a_walk_with_pictures_has_a_row_for_each_waypoint_and_its_advantages_run_across_them(kind):
    policy, config = make_policy(kind), small_config(lam=0.9, microbatch_size=4)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    environments = [
        envs.make("virl-vl", verify_iter=2, view_size=16, turns=1, points_per_leg=1) for _ in range(3)
    ]
    with policy.responder(1.0, 12, policy.generator("walk")) as respond:
        episodes = envs.play(environments, Guided(respond, environments), seeds=range(3))
    streams = [respond.streams[i] for i in range(3)]
    batch = ppo.collect(policy, streams, episodes, config, "action")
    assert (
        len(batch["ids"]) == sum(env.decisions for env in environments)
        and len({len(own) for own in streams}) > 1
    )
    for own, env, episode in zip(streams, environments, episodes):
        assert [len(stream.replies) for stream in own] == [2] * env.decisions and episode.success
        rows = [
            next(b for b in range(len(batch["ids"])) if batch["ids"][b, : len(stream)].tolist() == stream.ids)
            for stream in own
        ]
        assert len(set(rows)) == len(own)
        for b, stream in zip(rows, own):  # each waypoint is scored with its own picture, as it was sampled
            assert torch.equal(batch["pictures"][b].picture["pixel_values"], stream.picture["pixel_values"])
            torch.testing.assert_close(
                batch["old_logp"][b, : len(stream)], torch.tensor(stream.logp), rtol=0, atol=2e-5
            )
        tokens = [
            (b, t, k)
            for b, stream in zip(rows, own)
            for k, (start, stop) in enumerate(stream.replies)
            for t in range(start, stop)
        ]
        value, advantage, turn = 0.0, 0.0, iter(reversed(episode.turns))
        # Naive: token by token, from the end of the walk.
        for (b, t, k), later in zip(reversed(tokens), [None, *reversed(tokens)]):
            new_turn = later is None or later[0] != b or later[2] != k
            discount = config.gamma if new_turn else 1.0
            reward, own_value = next(turn).reward if new_turn else 0.0, batch["old_values"][b, t].item()
            advantage = reward + discount * value - own_value + discount * config.lam * advantage
            assert batch["returns"][b, t].item() == pytest.approx(advantage + own_value, abs=1e-4)
            value = own_value


def test_the_first_update_shifts_the_values_to_the_mean_return():
    policy, config = make_policy(), small_config(lam=0.95)
    streams, episodes = played(policy, config)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    before = ppo.collect(policy, streams, episodes, config, "formula")
    after = ppo.collect(policy, streams, episodes, config, "formula", center_values=True)
    again = ppo.collect(policy, streams, episodes, config, "formula")
    # the mean return by hand: every token of a reply is followed by the rewards of its turn and,
    # discounted, of the later ones
    total, count = 0.0, 0
    for (stream,), episode in zip(streams, episodes):
        for k, (start, stop) in enumerate(stream.replies):
            total += (stop - start) * sum(
                turn.reward * config.gamma**j for j, turn in enumerate(episode.turns[k:])
            )
            count += stop - start
    shift = total / count - before["old_values"].sum().item() / count
    torch.testing.assert_close(
        after["old_values"], before["old_values"] + shift * before["mask"], rtol=0, atol=1e-4
    )
    torch.testing.assert_close(again["old_values"], after["old_values"], rtol=0, atol=1e-4)


def test_the_value_head_trains_the_trunk_only_if_shared():
    for trunk, moves in (("detached", False), ("shared", True)):
        policy = make_policy()
        torch.nn.init.normal_(policy.value_head[-1].weight)
        config = small_config(value_trunk=trunk, epochs=1)
        batch = ppo.collect(policy, *played(policy, config), config, "formula")
        batch["advantages"].zero_()  # leaves the value loss alone
        before = [p.clone() for p in policy.model.parameters()]
        head = policy.value_head[0].weight.clone()
        ppo.update(policy, policy.optimizers(1e-3, 1e-3), batch, config, step=0)
        assert any(not torch.equal(a, b) for a, b in zip(before, policy.model.parameters())) == moves
        assert not torch.equal(head, policy.value_head[0].weight)


def test_the_value_warm_up_leaves_the_language_model_alone(policy):
    config = small_config(value_trunk="shared", value_warmup=1, kl_coef=1.0, entropy_coef=0.1)
    policy.keep_initial_weights()
    batch = ppo.collect(policy, *played(policy, config), config, "formula")
    before, head = [p.clone() for p in policy.model.parameters()], policy.value_head[-1].weight.clone()
    ppo.update(policy, policy.optimizers(1e-3, 1e-3), batch, config, step=0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters())) and not torch.equal(
        head, policy.value_head[-1].weight
    )


def test_the_kl_terms_gradient_is_that_of_the_exact_kl():
    g = torch.Generator().manual_seed(0)
    logits, q = (
        torch.randn(5, generator=g, dtype=torch.double, requires_grad=True),
        torch.randn(5, generator=g, dtype=torch.double).log_softmax(-1),
    )
    p = logits.log_softmax(-1)
    exact = torch.autograd.grad((p.exp() * (p - q)).sum(), logits, retain_graph=True)[0]
    in_expectation = torch.autograd.grad((p.detach().exp() * 0.5 * (p - q) ** 2).sum(), logits)[0]
    torch.testing.assert_close(in_expectation, exact)


def test_microbatches_do_not_change_the_gradient():
    policies = []
    for micro in (1, 6):
        policy = make_policy()
        config = small_config(
            microbatch_size=micro, minibatch_size=6, epochs=1, entropy_coef=0.1, kl_coef=0.1
        )
        policy.keep_initial_weights()
        batch = ppo.collect(policy, *played(policy, config), config, "formula")
        ppo.update(policy, policy.optimizers(1e-3, 1e-3), batch, config, step=0)
        policies.append(policy)
    for a, b in zip(policies[0].parameters(), policies[1].parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_kl_to_the_initial_policy_is_zero_at_first_and_restores_the_weights(policy):
    config = small_config(kl_coef=1.0)
    policy.keep_initial_weights()
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.1)
    before = [p.clone() for p in policy.parameters()]
    batch = ppo.collect(policy, *played(policy, config), config, "formula")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    assert (batch["initial_logp"] - batch["old_logp"]).abs().max() > 1e-3


@pytest.mark.parametrize("reward", [-3.0, -3.1, 0.7])
def test_equal_rewards_teach_nothing_though_fp32_does_not_hold_them(policy, reward):
    rewards = {"unparsed": reward, "budget": 0.0}
    environments = [envs.make("gp-l", verify_iter=1, rewards=rewards) for _ in range(8)]
    config = ppo.PPOConfig(
        lr=1e-3, episodes=8, minibatch_size=8, microbatch_size=8, epochs=2, steps=1, max_new_tokens=9
    )
    before = [p.clone() for p in policy.model.parameters()]
    (logged,) = ppo.train(policy, policy.optimizers(1e-3, 1e-3), environments, config)
    assert logged["return"] == pytest.approx(reward) and logged["explained_variance"] == 0
    assert all(torch.equal(p, q) for p, q in zip(before, policy.model.parameters()))


@pytest.mark.parametrize("field", ["answer", "答案", "réponse"])
def test_an_answer_field_is_found_whose_letters_take_several_tokens(policy, field):
    start, rest = policy.tokenize([f'{{"why": "so", "{field}', '": "7"}'])
    assert ppo.thought_length(policy, start + rest, field) == len(start) - 1


def test_thought_length_ends_at_the_answer_field(policy):
    text = '{"cards": ["A"], "number": [1], "formula": "1=24"}'
    ids = policy.tokenize([text])[0]
    k = ppo.thought_length(policy, ids, "formula")
    assert "formula" in policy.decode(ids[: k + 1]) and "formula" not in policy.decode(ids[:k])
    assert ppo.thought_length(policy, ids[:3], "formula") == 3


def test_a_non_finite_loss_stops_before_the_weights_change(policy):
    config = small_config()
    batch = ppo.collect(policy, *played(policy, config), config, "formula")
    batch["advantages"][0] = math.nan
    before = [p.clone() for p in policy.parameters()]
    with pytest.raises(FloatingPointError):
        for _ in range(config.epochs):
            ppo.update(
                policy,
                policy.optimizers(1e-3, 1e-3),
                batch,
                small_config(minibatch_size=6, microbatch_size=6),
                step=0,
            )
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


class SayDigit:
    """A trivial task with the environments' interface: the reply has to start with the digit of the
    prompt."""

    answer_field = "digit"
    verdicts = ["correct", "unparsed"]

    def __init__(self):
        self.random = random.Random(0)

    def reset(self, seed=None, options=None):
        self.random.seed(seed)
        self.digit = self.random.choice("37")
        return envs.Observation([{"role": "user", "content": self.digit}]), {"cards": []}

    def step(self, reply):
        right = reply.startswith(self.digit)
        info = {"verdict": "correct" if right else "unparsed", "feedback": "", "recognized": right}
        return envs.Observation([]), float(right), right, not right, info


@pytest.mark.parametrize("ratio", ["token", "reply"])
def test_ppo_learns_a_trivial_task(policy, ratio):
    rng = random.Random(0)  # first the form: a digit, whatever the prompt says
    turns = [
        [{"from": "human", "value": rng.choice("37")}, {"from": "gpt", "value": rng.choice("37")}]
        for _ in range(64)
    ]
    list(
        sft.train(
            policy,
            policy.optimizers(3e-3),
            lambda step: [{"conversations": t} for t in turns],
            sft.SFTConfig(lr=3e-3, steps=15),
        )
    )
    config = ppo.PPOConfig(
        lr=1e-3,
        value_lr=1e-2,
        episodes=64,
        minibatch_size=64,
        microbatch_size=64,
        epochs=2,
        steps=30,
        max_new_tokens=1,
        ratio=ratio,
    )
    environments = [SayDigit() for _ in range(64)]
    success = [
        m["success"]
        for m in ppo.train(policy, policy.optimizers(config.lr, config.value_lr), environments, config)
    ]
    assert success[0] < 0.75 and max(success[-5:]) > 0.95


def test_minibatches_are_drawn_anew_for_every_epoch_and_every_update(policy, monkeypatch):
    config = small_config(epochs=2, minibatch_size=2)
    batch = ppo.collect(policy, *played(policy, config), config, "formula")
    drawn = []
    monkeypatch.setattr(policy, "sum", lambda *x: [float(n) for n in x])
    rows_of = ppo.rows_of
    monkeypatch.setattr(
        ppo, "rows_of", lambda batch, rows: drawn.append(rows.tolist()) or rows_of(batch, rows)
    )
    for step, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        ppo.update(policy, policy.optimizers(0.0, 0.0), batch, replace(config, seed=seed), step)
    updates = [drawn[k : k + 6] for k in range(0, 24, 6)]
    for update in updates:
        epochs = update[:3], update[3:]
        assert all(sorted(sum(epoch, [])) == list(range(6)) for epoch in epochs) and epochs[0] != epochs[1]
    assert updates[0] == updates[3] and len({str(update) for update in updates}) == 3
