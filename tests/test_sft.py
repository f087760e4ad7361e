"""SFT: loss, masks, records, learning."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
from conftest import SIGHTED, SMALL, make_policy
from torch import nn

import envs
import sft
import sftrl


def records(n, wrong_turns=0):
    env = envs.make("gp-l", seed=3)
    return [envs.demonstration(env, wrong_turns) for _ in range(n)]


def test_the_mask_holds_replies_and_their_end_tokens_only(policy):
    record = records(1, wrong_turns=2)[0]
    (stream,) = policy.streams([record])
    replies = [turn["value"] for turn in record["conversations"][1::2]]
    assert len(stream.replies) == 3
    for (start, stop), text in zip(stream.replies, replies):
        assert stream.ids[stop - 1] == policy.end_id and policy.decode(stream.ids[start : stop - 1]) == text
    inside = [t for start, stop in stream.replies for t in range(start, stop)]
    assert [t for t, m in enumerate(stream.mask) if m] == inside
    (last,) = policy.streams([record], "last")
    assert last.ids == stream.ids and last.replies == stream.replies
    assert [t for t, m in enumerate(last.mask) if m] == list(range(*stream.replies[-1]))


def test_a_demonstration_has_the_tokens_of_the_rendered_conversation(policy):
    record = records(1, wrong_turns=2)[0]
    (stream,) = policy.streams([record])
    messages = [
        {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]}
        for t in record["conversations"]
    ]
    assert stream.ids == policy.tokenizer.apply_chat_template(messages, return_dict=False)


def test_loss_is_the_mean_over_reply_tokens_of_the_global_batch(policy):
    batch = records(5, wrong_turns=1)
    total, n = 0.0, 0
    for stream in policy.streams(batch):  # naive: whole logits, one conversation and one token at a time
        logits = policy.model(input_ids=torch.tensor([stream.ids])).logits[0].double()
        logits[:, policy.image_id] = -torch.inf  # never said
        for t, chosen in enumerate(stream.mask):
            if chosen:
                total -= logits[t - 1].log_softmax(-1)[stream.ids[t]].item()
                n += 1
    for micro in (1, 2, 5):
        config = sft.SFTConfig(batch_size=5, microbatch_size=micro, steps=1, lr=0.0)
        (metrics,) = sft.train(policy, policy.optimizers(0.0), lambda step: batch, config)
        assert metrics["loss"] == pytest.approx(total / n, rel=1e-5) and metrics["reply_tokens"] == n


def test_dft_weights_every_token_by_its_own_probability_as_a_constant():
    policy, batch = make_policy(), records(3)
    (plain,) = sft.train(policy, [], lambda step: batch, sft.SFTConfig(batch_size=3, steps=1))
    expected, n = 0.0, 0
    for stream in policy.streams(batch):
        logp = policy(policy.collate([stream]))["logp"][0][torch.tensor(stream.mask) > 0]
        expected, n = expected - sum(p.exp().item() * p for p in logp), n + len(logp)
    gradients = torch.autograd.grad(expected / n, list(policy.model.base_model.language_model.parameters()))
    policy.step = lambda *args: 0.0  # keeps the gradients
    config = sft.SFTConfig(batch_size=3, microbatch_size=2, steps=1, objective="dft")
    policy.zero_grad()
    (metrics,) = sft.train(policy, [], lambda step: batch, config)
    assert metrics["loss"] == pytest.approx(expected.item() / n, rel=1e-5) and metrics["loss"] < plain["loss"]
    for p, g in zip(policy.model.base_model.language_model.parameters(), gradients):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5)


def test_muon_makes_the_momentum_orthogonal_and_is_torchs_but_for_bf16():
    for shape in ((24, 64), (64, 24), (32, 32)):
        torch.manual_seed(0)
        own, other = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        mine = sftrl.Muon([own], lr=0.1)
        torchs = torch.optim.Muon([other], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            own.grad, before = torch.randn(shape), own.detach().clone()
            other.grad = own.grad.clone()
            mine.step(), torchs.step()
            sizes = torch.linalg.svdvals(own.detach() - before) / (0.1 * 0.2 * max(shape) ** 0.5)
            assert 0.5 < sizes.min() and sizes.max() < 1.3
        torch.testing.assert_close(own, other, rtol=0, atol=0.1 * own.abs().max().item())


def test_revisions_are_right_replies_after_none_or_some_wrong_ones():
    env, lengths = envs.make("gp-l", seed=0, verify_iter=3), []
    for _ in range(60):
        turns = sft.revision(env)["conversations"]
        lengths.append(len(turns) // 2)
        env.reset(options={"cards": env.cards})
        verdicts = [env.step(turn["value"])[4]["verdict"] for turn in turns[1::2]]
        assert verdicts == ["wrong_value"] * (len(verdicts) - 1) + ["correct"]
    assert set(lengths) == {1, 2, 3}


def test_accumulation_gives_the_same_step():
    weights = []
    for micro in (1, 4):
        policy = make_policy()
        config = sft.SFTConfig(batch_size=4, microbatch_size=micro, steps=2, lr=1e-3)
        list(sft.train(policy, policy.optimizers(config.lr), lambda step: records(4), config))
        weights.append([p.clone() for p in policy.parameters()])
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "kind, muon, steps",
    [("llava", False, 160), ("llava", True, 30), ("llama", False, 160), ("mllama", False, 160)],
)
def test_sft_learns_its_demonstrations(kind, muon, steps):
    policy = make_policy(kind)
    chosen = records(4)
    config = sft.SFTConfig(lr=5e-3, batch_size=4, microbatch_size=4, steps=steps, muon=muon)
    losses = [
        m["loss"]
        for m in sft.train(policy, policy.optimizers(config.lr, muon=muon), lambda step: chosen, config)
    ]
    assert losses[-1] < 0.05 < losses[0]
    generator = torch.Generator().manual_seed(0)
    streams = policy.streams(chosen)
    with policy.rollout_weights() as model:
        drawn = policy.sample(model, [asked(s) for s in streams], 80, 0.0, generator)
    assert [ids for ids, _ in drawn] == [s.ids[s.replies[0][0] :] for s in streams]


def asked(stream):
    """A conversation before its first reply."""
    start = stream.replies[0][0]
    return replace(stream, ids=stream.ids[:start], mask=stream.mask[:start], replies=[])


@pytest.mark.parametrize("kind", SIGHTED)
def test_sft_learns_what_only_the_picture_shows(kind):
    policy = make_policy(kind)
    env = envs.make("gp-vl", seed=4, **SMALL)
    chosen = [envs.demonstration(env) for _ in range(3)]
    config = sft.SFTConfig(lr=5e-3, batch_size=3, microbatch_size=3, steps=150)
    losses = [m["loss"] for m in sft.train(policy, policy.optimizers(config.lr), lambda step: chosen, config)]
    assert losses[-1] < 0.05 < losses[0]
    streams = policy.streams(chosen)
    for shift in (0, 1):  # shown the next picture, the model gives the next picture's reply
        shown = streams[shift:] + streams[:shift]
        with policy.rollout_weights() as model:
            drawn = policy.sample(model, [asked(s) for s in shown], 80, 0.0, torch.Generator())
        assert [ids for ids, _ in drawn] == [s.ids[s.replies[0][0] :] for s in shown]


@pytest.mark.parametrize("kind", SIGHTED)
def test_sft_on_a_released_record_and_ppo_read_the_same_prompt(kind):
    policy, env = make_policy(kind), envs.make("gp-vl", seed=4, **SMALL)
    observation, _ = env.reset()
    played = policy.open(observation.messages, observation.image)
    text = observation.messages[0]["content"][1]["text"]
    reply = {"from": "gpt", "value": env.expert_reply()}
    for human in (f"<image>\n{text}", f"<image>{text}", text):
        turns = [{"from": "human", "value": human}, reply]
        (learned,) = policy.streams([{"image": observation.image, "conversations": turns}])
        assert learned.ids[: learned.replies[0][0]] == played.ids


@pytest.mark.slow
def test_the_tiny_model_learns_to_read_cards_and_shuffled_pictures_bring_chance():
    policy = make_policy()
    pictures = sftrl.TINY_PICTURES | {"jitter": 0.3}

    def batch(step, n=64):
        rng = random.Random(f"reading/{step}")
        return [sft.reading_record(rng, **pictures) for _ in range(n)]

    config = sft.SFTConfig(lr=3e-3, batch_size=64, microbatch_size=16, steps=250, warmup=0.05)
    list(sft.train(policy, policy.optimizers(config.lr, muon=True), batch, config))
    records = batch("test", 256)
    shuffled = [r | {"image": other["image"]} for r, other in zip(records, records[1:] + records[:1])]

    def recognition(records):
        observations = [
            envs.Observation([{"role": "user", "content": envs.parts_of(turns[0]["value"])}], record["image"])
            for record in records
            for turns in [record["conversations"]]
        ]
        with policy.responder(0.0, 32, policy.generator("reading")) as respond:
            replies = respond(range(len(records)), observations)
        named = [re.findall('"([^"]*)"', reply) for reply in replies]
        wanted = [json.loads(record["conversations"][1]["value"]) for record in records]
        return sum(a == b for x, y in zip(named, wanted) if len(x) == 4 for a, b in zip(x, y)) / (
            4 * len(records)
        )

    assert recognition(records) > 0.95
    chance = 1 / 13
    assert abs(recognition(shuffled) - chance) < 4 * (chance / (4 * 256)) ** 0.5


def test_flops_are_six_n_per_trained_token_and_end_the_run(policy):
    chosen = records(4)
    tokens = sum(map(len, policy.streams(chosen)))
    each = 6 * policy.parameter_count * tokens
    config = sft.SFTConfig(batch_size=4, microbatch_size=2, flops=2.5 * each)
    metrics = list(sft.train(policy, policy.optimizers(1e-4), lambda step: chosen, config))
    assert [m["flops"] for m in metrics] == [each, 2 * each, 3 * each]


def test_epochs_visit_every_record_once_in_a_new_order_and_need_no_state():
    data = [{"i": i} for i in range(10)]
    batch = sft.epochs(data, 4, seed=1)
    seen = [r["i"] for step in range(5) for r in batch(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert sft.epochs(data, 4, seed=1)(3) == batch(3)


PAIR = '[{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]'


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be read"),
        ("[]", "non-empty"),
        ('[{"conversations": []}]', "record 0"),
        (
            '[{"conversations": [{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]}]',
            "turn 0: `from`",
        ),
        (
            '[{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": 3}]}]',
            "turn 1: `value`",
        ),
        (
            '[{"image": "a.png", "conversations": %s}]' % PAIR,
            "record 0: `image`: 'a.png'",
        ),
        (
            '[{"image": ["a", "b"], "conversations": %s}]' % PAIR,
            "record 0: `image`",
        ),
        (
            '[{"conversations": %s}, {"image": "a.png", "conversations": %s}]' % (PAIR, PAIR),
            "record 1: `image`: all",
        ),
    ],
)
def test_a_bad_file_is_named_with_record_and_field(tmp_path, content, words):
    path = tmp_path / "demos.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="demos.json") as error:
        sft.read_records(str(path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_written_file_reads_back(tmp_path):
    path = tmp_path / "demos.json"
    path.write_text(json.dumps(records(3, 1)))
    assert sft.read_records(str(path)) == records(3, 1)


def test_a_non_finite_loss_stops_before_the_weights_change(policy):
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[5] = math.nan
    before = [p.clone() for p in policy.parameters()]
    config = sft.SFTConfig(batch_size=2, microbatch_size=2, steps=1)
    with pytest.raises(FloatingPointError):
        list(sft.train(policy, policy.optimizers(1e-3), lambda step: records(2), config))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, policy.parameters()))


def test_a_record_of_a_walk_shows_one_picture_and_trains_the_replies_to_it(policy):
    env = envs.make("virl-vl", seed=3, view_size=16, turns=2, points_per_leg=1)
    waypoints = set()
    for _ in range(12):
        record = envs.demonstration(env, wrong_turns=1)
        turns = [turn["value"] for turn in record["conversations"]]
        shown = [k for k, value in enumerate(turns) if "<image>" in value]
        # The last waypoint: picture, wrong reply, feedback, right reply.
        assert shown == [len(turns) - 4] and record["image"] is env.observe().image
        waypoints.add(env.decision)
        (stream,) = policy.streams([record])
        said = [policy.decode(stream.ids[start:stop]) for start, stop in stream.replies]
        assert said == turns[-3::2] and sum(stream.mask) == sum(
            stop - start for start, stop in stream.replies
        )
        assert (
            envs.judge_step(turns[-1], env.waypoints[env.decision]).verdict
            == "correct"
            != envs.judge_step(turns[-3], env.waypoints[env.decision]).verdict
        )
        observation = envs.Observation(env.messages[:-2], env.observe().image)  # as the walk itself opens it
        opened = policy.open(observation.messages, observation.image)
        assert stream.ids[: len(opened)] == opened.ids
    assert len(waypoints) > 2
