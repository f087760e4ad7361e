"""PPO: the mathematics against naive references, masks, and learning."""

import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import SIGHTED, SMALL, make_policy

import envs
import ppo
import sft

SHORT = {"turns": 1, "points_per_leg": 1}
OPTIONS = {"gp-l": {}, "gp-vl": SMALL, "virl-l": SHORT, "virl-vl": SHORT | {"view_size": 16}}
small_config = partial(
    ppo.PPOConfig, episodes=6, minibatch_size=3, microbatch_size=2, epochs=2, max_new_tokens=12, lr=1e-3
)


def naive_gae(rewards, values, gamma, lam):
    """By the definition, over one line of all tokens: A_t = sum over j >= t of (product of discounts and
    lambdas) delta_j."""
    line = [(k, t) for k, reply in enumerate(values) for t in range(len(reply))]
    value = [values[k][t] for k, t in line] + [0.0]
    reward = [rewards[k] if t + 1 == len(values[k]) else 0.0 for k, t in line]
    discount = [gamma if t + 1 == len(values[k]) else 1.0 for k, t in line]
    delta = [reward[i] + discount[i] * value[i + 1] - value[i] for i in range(len(line))]
    advantages = [[0.0] * len(reply) for reply in values]
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
        computed = ppo.gae(rewards, values, gamma, lam)
        for advantages, returns, expected, value in zip(
            *computed, naive_gae(rewards, values, gamma, lam), values
        ):
            assert advantages == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert returns == pytest.approx([a + v for a, v in zip(expected, value)], rel=1e-12, abs=1e-12)


def test_gae_by_hand_discounts_once_per_turn_and_not_per_token():
    # A reply of two tokens, reward -1; a reply of one, reward 5.
    advantages, returns = ppo.gae([-1.0, 5.0], [[0.0, 0.0], [0.0]], gamma=0.9, lam=1.0)
    assert advantages == returns == [[-1 + 0.9 * 5, -1 + 0.9 * 5], [5.0]]
    assert ppo.gae([], [], 0.9, 1.0) == ([], [])
    with pytest.raises(ValueError):
        ppo.gae([1.0], [[0.0], [0.0]], 0.9, 1.0)


def naive_losses(scores, part, config, actions, tokens):
    """Action by action and token by token: what `ppo.losses` logs, and the loss."""
    out, ratios, penalty = Counter(), [], 0.0
    numbers = {name: x.tolist() for name, x in (scores | part).items()}
    for b, t in part["actions"].nonzero().tolist():
        n = {name: rows[b][t] for name, rows in numbers.items()}
        ratios.append(ratio := math.exp(n["logp"] - n["old_logp"]))
        surrogate = min(ratio * n["advantages"], min(max(ratio, 0.8), 1.2) * n["advantages"])
        clipped = min(max(n["value"], n["old_values"] - 0.3), n["old_values"] + 0.3)
        out["policy_loss"] -= surrogate if config.objective == "ppo" else n["logp"] * n["advantages"]
        out["value_loss"] += 0.5 * max((n["value"] - n["returns"]) ** 2, (clipped - n["returns"]) ** 2)
        out["approx_kl"] += ratio - 1 - math.log(ratio)
    for b, t in part["mask"].nonzero().tolist():
        gap = numbers["initial_logp"][b][t] - numbers["logp"][b][t]
        out["entropy"] += numbers["entropy"][b][t]
        out["kl_to_init"] += math.exp(gap) - 1 - gap
        penalty += 0.5 * gap**2 / tokens
    out = {k: x / (tokens if k in ("entropy", "kl_to_init") else actions) for k, x in out.items()}
    out["clip_fraction"] = sum(abs(ratio - 1) > 0.2 for ratio in ratios) / actions
    out |= {"largest_ratio": max(ratios), "ratio_error": max(abs(ratio - 1) for ratio in ratios)}
    return out, out["policy_loss"] - 0.1 * out["entropy"] + 0.7 * penalty


@pytest.mark.parametrize("objective", ["ppo", "imitate"])
def test_losses_against_a_loop_and_finite_differences(objective):
    g = torch.Generator().manual_seed(0)
    config = ppo.PPOConfig(objective=objective, clip=0.2, value_clip=0.3, entropy_coef=0.1, kl_coef=0.7)
    mask = (torch.rand(4, 6, generator=g) < 0.7).double()
    part = {"mask": mask, "actions": mask * (torch.rand(4, 6, generator=g) < 0.6)}
    names = ("old_logp", "advantages", "old_values", "returns", "initial_logp", "logp", "value", "entropy")
    part |= {name: torch.randn(4, 6, generator=g, dtype=torch.double) * 0.5 * mask for name in names}
    scores = {name: part.pop(name) for name in names[-3:]}
    actions, tokens = 2 * part["actions"].sum().item(), 3 * mask.sum().item()  # of the whole minibatch
    logged, loss = naive_losses(scores, part, config, actions, tokens)
    for warming, expected in ((True, 0.0), (False, loss)):
        computed, metrics = ppo.losses(scores, part, config, actions, tokens, warming)
        assert computed.item() == pytest.approx(0.5 * logged["value_loss"] + expected, rel=1e-12)
        assert {name: x.item() for name, x in metrics.items()} == pytest.approx(logged, rel=1e-12)

    def loss_of(*values):
        return ppo.losses(dict(zip(scores, values)), part, config, actions, tokens, False)[0]

    assert torch.autograd.gradcheck(loss_of, [x.requires_grad_() for x in scores.values()])


def test_clipping_stops_gradients_in_the_advantages_direction_alone_and_all_are_finite():
    logp = torch.tensor([[0.5, 0.5, -0.5, -0.5, 100.0, 100.0, 0.1]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0]])
    loss = ppo.policy_loss(logp, torch.zeros(1, 7), advantages, torch.ones(1, 7), 0.2)
    loss.backward()
    assert [bool(g) for g in logp.grad[0]] == [False, True, True, False, False, True, True]
    assert 0 < logp.grad[0, 5] < math.inf and logp.grad[0, 6].item() == pytest.approx(-math.exp(0.1) / 7)
    assert loss.isfinite() and ppo.kl_estimate(torch.zeros(1), torch.full((1,), 100.0)).isfinite()


def test_kl_estimate_is_unbiased_and_never_negative():
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, generator=g).log_softmax(-1)
    draws = torch.multinomial(p.exp(), 400_000, replacement=True, generator=g)
    estimate = ppo.kl_estimate(p[draws], q[draws])
    exact = (p.exp() * (p - q)).sum().item()
    assert estimate.min() >= 0 and estimate.mean().item() == pytest.approx(exact, rel=0.02)


def test_per_reply_sums_each_reply_onto_its_first_token():
    starts = torch.tensor([[0.0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]])
    x = torch.tensor([[0.0, 1, 2, 0, 4, 0], [1, 1, 0, 0, 0, 0]])
    assert ppo.per_reply(x, starts).tolist() == [[0, 3, 0, 0, 4, 0], [2, 0, 0, 0, 0, 0]]


# ---- with a policy


def played(policy, config, task="gp-l"):
    environments = [envs.make(task, verify_iter=3, **OPTIONS[task]) for _ in range(config.episodes)]
    return ppo.rollout(policy, environments, config, step=0)


def collected(policy, config):
    return ppo.collect(policy, *played(policy, config), config, "formula")


def copies(module):
    return [p.clone() for p in module.parameters()]


def unchanged(before, module):
    return all(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize(
    "kind, task, ratio",
    [
        ("llava", "gp-l", "token"),
        ("llava", "virl-l", "reply"),
        ("mllama", "gp-l", "token"),
        ("llava", "virl-vl", "reply"),
        *zip(SIGHTED, ["gp-vl"] * 3, ["reply", "token", "reply"]),
    ],
)
def test_first_ratio_is_one_and_moves_after_a_step(kind, task, ratio):
    policy, config = make_policy(kind), small_config(ratio=ratio, thought_coef=0.5)
    streams, episodes = played(policy, config, task)
    for stream in sum(streams, []):  # the ratio is to the training forward, not to the sampler
        stream.logp = [0.9 * x for x in stream.logp]
    batch = ppo.collect(policy, streams, episodes, config, "formula")
    metrics = ppo.update(policy, policy.optimizers(config.lr, 1e-3), batch, config, step=0)
    assert metrics["first_ratio_error"] < 1e-5 < metrics["largest_ratio"] - 1


def guided(player, environments):
    """To each decision the first reply is the model's, the second the expert's."""

    def respond(indices, observations):
        replies = dict(zip(indices, player(indices, observations)))
        return [environments[i].expert_reply() if environments[i].attempts else replies[i] for i in replies]

    return respond


@pytest.mark.parametrize(
    "kind, task", [("llava", "gp-l"), ("llava", "virl-l"), ("llava", "virl-vl"), ("mllama", "virl-vl")]
)
def test_a_batch_holds_what_was_sampled_and_naive_advantages(kind, task):
    policy, config = make_policy(kind), small_config(lam=0.9, temperature=0.7, microbatch_size=4)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    environments = [envs.make(task, verify_iter=2, **OPTIONS[task]) for _ in range(3)]
    with policy.responder(0.7, 12, policy.generator("guided")) as player:
        episodes = envs.play(environments, guided(player, environments), seeds=range(3))
    streams = [player.streams[i] for i in range(3)]
    batch = ppo.collect(policy, streams, episodes, config, "action")
    rows = [ids[:n] for ids, n in zip(batch["ids"].tolist(), batch["length"].tolist())]
    assert sorted(rows) == sorted(stream.ids for stream in sum(streams, []))
    mask, logp, advantages, returns = torch.zeros(4, *batch["ids"].shape)
    for chain, env, episode in zip(streams, environments, episodes):
        assert episode.success and len(episode.turns) == 2 * env.decisions
        assert len(chain) == (env.decisions if task == "virl-vl" else 1)
        spans = []
        for stream in chain:
            b = rows.index(stream.ids)
            mask[b, : len(stream)], logp[b, : len(stream)] = map(torch.tensor, (stream.mask, stream.logp))
            spans += [(b, start, stop) for start, stop in stream.replies]
            if stream.picture:
                pixels = batch["pictures"][b].picture["pixel_values"]
                assert torch.equal(pixels, stream.picture["pixel_values"])
        values = [batch["old_values"][b, start:stop].tolist() for b, start, stop in spans]
        lines = naive_gae([turn.reward for turn in episode.turns], values, config.gamma, config.lam)
        for (b, start, stop), line, value in zip(spans, lines, values):
            advantages[b, start:stop] = torch.tensor(line)
            returns[b, start:stop] = torch.tensor(line) + torch.tensor(value)
    chosen = advantages[mask > 0]
    white = (advantages - chosen.mean()) / chosen.std(correction=0) * mask
    assert torch.equal(batch["mask"], mask)
    for name, x in {"old_logp": logp, "returns": returns, "advantages": white}.items():
        torch.testing.assert_close(batch[name], x, rtol=0, atol=1e-4 if name == "returns" else 2e-5)


def test_imitation_learns_from_right_replies_alone_and_metrics_by_hand(policy):
    config, env = small_config(objective="imitate", episodes=2, minibatch_size=2), envs.make("gp-l", seed=1)
    streams = policy.streams([envs.demonstration(env, wrong_turns) for wrong_turns in (2, 0)])
    rewards = {"correct": 5.0, "wrong_value": -1.0}
    verdicts = [["wrong_value", "wrong_value", "correct"], ["wrong_value"]]  # the last one's is made up
    episodes = [
        envs.Episode("", [], [envs.Turn("", rewards[v], v, "", True) for v in line], "correct" in line)
        for line in verdicts
    ]
    batch = ppo.collect(policy, [[s] for s in streams], episodes, config, "formula")
    start, stop = streams[0].replies[-1]
    for row, stream in zip(batch["advantages"].tolist(), sorted(streams, key=len)):
        right = range(start, stop) if stream is streams[0] else ()
        assert row == [float(t in right) for t in range(len(row))]
    measured = ppo.episode_metrics(policy, episodes, batch, config, rewards)
    expected = {"return": (-1 - 0.9 + 0.81 * 5 - 1) / 2, "success": 0.5, "first_success": 0.0, "turns": 2.0}
    expected |= {"share/correct": 1 / 4, "reward/correct": 2.5, "share/wrong_value": 3 / 4}
    assert {name: measured[name] for name in expected} == pytest.approx(expected)


def test_the_first_update_shifts_the_values_to_the_mean_return(policy):
    config = small_config(lam=0.95)
    streams, episodes = played(policy, config)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    before, after, again = (
        ppo.collect(policy, streams, episodes, config, "formula", center_values=k == 1) for k in range(3)
    )
    returns = []  # of every token: the reward of its turn and, discounted, those of later ones
    for (stream,), episode in zip(streams, episodes):
        for k, (start, stop) in enumerate(stream.replies):
            later = [turn.reward * config.gamma**j for j, turn in enumerate(episode.turns[k:])]
            returns += [sum(later)] * (stop - start)
    shift = (sum(returns) - before["old_values"].sum().item()) / len(returns)
    expected = before["old_values"] + shift * before["mask"]
    torch.testing.assert_close(after["old_values"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(again["old_values"], after["old_values"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes, moves",
    [
        ({"value_trunk": "detached"}, False),
        ({"value_trunk": "shared"}, True),
        ({"value_trunk": "shared", "value_warmup": 1, "kl_coef": 1.0, "entropy_coef": 0.1}, False),
    ],
)
def test_which_updates_train_the_language_model(policy, changes, moves):
    config = small_config(epochs=1, **changes)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    policy.keep_initial_weights()
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.1)
    before, head = copies(policy.model), policy.value_head[0].weight.clone()
    batch = collected(policy, config)
    assert unchanged(before, policy.model)
    if config.kl_coef:
        assert (batch["initial_logp"] - batch["old_logp"]).abs().max() > 1e-3
    else:
        batch["advantages"].zero_()  # leaves the value loss alone
    ppo.update(policy, policy.optimizers(1e-3, 1e-3), batch, config, step=0)
    assert unchanged(before, policy.model) != moves
    assert not torch.equal(head, policy.value_head[0].weight)


@pytest.mark.parametrize("reward", [-3.1, 0.7])
def test_equal_rewards_teach_nothing_though_fp32_does_not_hold_them(policy, reward):
    rewards = {"unparsed": reward, "budget": 0.0}
    environments = [envs.make("gp-l", verify_iter=1, rewards=rewards) for _ in range(8)]
    config = small_config(episodes=8, minibatch_size=8, microbatch_size=8, steps=1, max_new_tokens=9)
    before = copies(policy.model)
    (logged,) = ppo.train(policy, policy.optimizers(1e-3, 1e-3), environments, config)
    assert logged["return"] == pytest.approx(reward) and logged["explained_variance"] == 0
    equal = torch.full((64, 700), 0.1)
    assert ppo.whiten(policy, equal, torch.ones_like(equal)).abs().max() < 1e-3
    assert unchanged(before, policy.model)


@pytest.mark.parametrize("field", ["answer", "答案", "réponse"])
def test_a_thought_ends_before_the_last_token_of_the_answer_field(policy, field):
    start, rest = policy.tokenize([f'{{"why": "so", "{field}', '": "7"}'])
    stream, n = ppo.Stream(), len(start)
    stream.context([5, 6, 7])
    stream.reply(start + rest)
    assert ppo.thought_length(policy, start + rest, field) == n - 1
    assert ppo.thought_length(policy, start[:3], field) == 3
    mask, config = torch.tensor([stream.mask]).float(), small_config(thought_coef=0.5)
    starts, weights = ppo.reply_weights(policy, [stream], mask, field, config)
    assert starts[0].nonzero().tolist() == [[3]]
    assert weights[0].tolist() == [0] * 3 + [0.5] * (n - 1) + [1] * (len(rest) + 1)


def test_a_step_is_clipped_and_not_taken_where_loss_or_gradient_is_not_finite(policy):
    parameters, before = list(policy.parameters()), copies(policy)
    for gradient, loss in ((math.nan, 1.0), (1.0, math.inf), (1.0, 1.0)):
        for p in parameters:
            p.grad = torch.full_like(p, gradient)
        optimizers = [torch.optim.SGD(parameters, lr=1.0)]
        if math.isfinite(gradient * loss):
            assert policy.step(optimizers, 0.5, loss) == pytest.approx(sum(map(torch.numel, before)) ** 0.5)
        else:
            with pytest.raises(FloatingPointError):
                policy.step(optimizers, 0.5, loss)
            assert unchanged(before, policy)
    moved = sum(((p - old) ** 2).sum().item() for p, old in zip(parameters, before)) ** 0.5
    assert moved == pytest.approx(0.5, rel=1e-3)


def test_minibatches_are_drawn_anew_for_every_epoch_and_every_update(policy, monkeypatch):
    config = small_config(minibatch_size=2)
    batch, drawn, rows_of = collected(policy, config), [], ppo.rows_of
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


class SayDigit:
    """A trivial task with the environments' interface: a reply must start with the prompt's digit."""

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


def test_ppo_learns_a_trivial_task(policy):
    rng = random.Random(0)  # first the form: a digit, whatever the prompt is
    turns = [[{"from": who, "value": rng.choice("37")} for who in ("human", "gpt")] for _ in range(64)]
    records = [{"conversations": pair} for pair in turns]
    config = sft.SFTConfig(lr=3e-3, steps=15)
    list(sft.train(policy, policy.optimizers(3e-3), lambda step: records, config))
    config = ppo.PPOConfig(
        lr=1e-3, episodes=64, minibatch_size=64, microbatch_size=64, epochs=2, steps=20, max_new_tokens=1
    )
    environments = [SayDigit() for _ in range(64)]
    success = []
    for metrics in ppo.train(policy, policy.optimizers(config.lr, 1e-2), environments, config):
        success.append(metrics["success"])
    assert success[0] < 0.75 and max(success[-5:]) > 0.95
