"""SFT: loss, masks, records, learning."""

import json
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


def test_the_mask_holds_replies_and_their_end_tokens_only_in_the_rendered_conversation(policy):
    turns = records(1, wrong_turns=2)[0]["conversations"]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in turns]
    every, last = (policy.streams([{"conversations": turns}], which)[0] for which in ("all", "last"))
    assert every.ids == last.ids == policy.tokenizer.apply_chat_template(messages, return_dict=False)
    assert every.replies == last.replies and len(every.replies) == 3
    for (start, stop), turn in zip(every.replies, turns[1::2]):
        assert every.ids[stop - 1] == policy.end_id
        assert policy.decode(every.ids[start : stop - 1]) == turn["value"]
    for stream, trained in ((every, every.replies), (last, every.replies[-1:])):
        inside = [t for start, stop in trained for t in range(start, stop)]
        assert [t for t, m in enumerate(stream.mask) if m] == inside


@pytest.mark.parametrize(
    "objective, loss_on", [("likelihood", "all"), ("likelihood", "last"), ("dft", "all")]
)
def test_loss_and_gradient_are_those_of_a_loop_over_the_global_batch(policy, objective, loss_on):
    batch, total, n = records(5, wrong_turns=1), 0.0, 0
    for stream in policy.streams(batch, loss_on):  # one token at a time
        logits = policy.model(input_ids=torch.tensor([stream.ids])).logits[0].double()
        logits = logits.index_fill(-1, torch.tensor([policy.image_id]), -torch.inf)  # never sampled
        for t in (t for t, trained in enumerate(stream.mask) if trained):
            logp = logits[t - 1].log_softmax(-1)[stream.ids[t]]
            total, n = total - logp * (logp.exp().item() if objective == "dft" else 1.0), n + 1
    parameters = list(policy.model.base_model.language_model.parameters())
    gradients = torch.autograd.grad(total / n, parameters)
    policy.step = lambda *args: 0.0  # keeps the gradients
    for micro in (1, 2, 5):
        policy.zero_grad()
        config = sft.SFTConfig(
            batch_size=5, microbatch_size=micro, steps=1, objective=objective, loss_on=loss_on
        )
        (metrics,) = sft.train(policy, [], lambda step: batch, config)
        assert metrics["loss"] == pytest.approx(total.item() / n, rel=1e-5) and metrics["reply_tokens"] == n
        for p, gradient in zip(parameters, gradients):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)


def test_muon_makes_the_momentum_orthogonal_and_is_torchs_but_for_bf16():
    for shape in ((24, 64), (64, 24), (32, 32)):
        torch.manual_seed(0)
        a, b = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
        ours = sftrl.Muon([a], lr=0.1)
        theirs = torch.optim.Muon([b], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            a.grad, before = torch.randn(shape), a.detach().clone()
            b.grad = a.grad.clone()
            ours.step(), theirs.step()
            sizes = torch.linalg.svdvals(a.detach() - before) / (0.1 * 0.2 * max(shape) ** 0.5)
            assert 0.5 < sizes.min() and sizes.max() < 1.3
        torch.testing.assert_close(a, b, rtol=0, atol=0.1 * a.abs().max().item())


def test_revisions_are_right_replies_after_none_or_some_wrong_ones():
    env, lengths = envs.make("gp-l", seed=0, verify_iter=3), set()
    for _ in range(60):
        turns = sft.revision(env)["conversations"]
        lengths.add(n := len(turns) // 2)
        env.reset(options={"cards": env.cards})
        verdicts = [env.step(turn["value"])[4]["verdict"] for turn in turns[1::2]]
        assert verdicts == ["wrong_value"] * (n - 1) + ["correct"]
    assert lengths == {1, 2, 3}


@pytest.mark.parametrize("kind", ["llama", *SIGHTED])
def test_sft_learns_text_and_what_only_pictures_show(kind):
    policy, muon = make_policy(kind), kind == "llava"
    env = envs.make("gp-l", seed=4) if kind == "llama" else envs.make("gp-vl", seed=4, **SMALL)
    chosen = [envs.demonstration(env) for _ in range(3)]
    config = sft.SFTConfig(lr=1e-2, batch_size=3, microbatch_size=3, steps=40 if muon else 100)
    optimizers = policy.optimizers(config.lr, muon=muon)
    losses = [metrics["loss"] for metrics in sft.train(policy, optimizers, lambda step: chosen, config)]
    assert losses[-1] < 0.05 < losses[0]
    streams = policy.streams(chosen)
    for shift in (0, 1):  # with the next prompt or picture, the model gives the next reply
        rolled = streams[shift:] + streams[:shift]
        prompts = [replace(s, ids=s.ids[: s.replies[0][0]], mask=[], replies=[]) for s in rolled]
        with policy.rollout_weights() as model:
            drawn = policy.sample(model, prompts, 80, 0.0, torch.Generator())
        assert [ids for ids, _ in drawn] == [s.ids[s.replies[0][0] :] for s in rolled]


@pytest.mark.parametrize("kind", SIGHTED)
def test_sft_on_a_released_record_and_ppo_read_the_same_prompt(kind):
    policy, env = make_policy(kind), envs.make("gp-vl", seed=4, **SMALL)
    observation, _ = env.reset()
    opened = policy.open(observation.messages, observation.image)
    text = observation.messages[0]["content"][1]["text"]
    reply = {"from": "gpt", "value": env.expert_reply()}
    for human in (f"<image>\n{text}", f"<image>{text}", text):
        turns = [{"from": "human", "value": human}, reply]
        (stream,) = policy.streams([{"image": observation.image, "conversations": turns}])
        assert stream.ids[: stream.replies[0][0]] == opened.ids


@pytest.mark.slow
def test_the_tiny_model_learns_to_read_cards_and_shuffled_pictures_bring_chance():
    policy, pictures = make_policy(), sftrl.TINY_PICTURES | {"jitter": 0.3}

    def batch(step, n=64):
        rng = random.Random(f"reading/{step}")
        return [sft.reading_record(rng, **pictures) for _ in range(n)]

    config = sft.SFTConfig(lr=3e-3, batch_size=64, microbatch_size=16, steps=250, warmup=0.05)
    list(sft.train(policy, policy.optimizers(config.lr, muon=True), batch, config))
    tested = batch("test", 256)
    images = [record["image"] for record in tested]
    question = [{"role": "user", "content": envs.parts_of(tested[0]["conversations"][0]["value"])}]
    wanted = [json.loads(record["conversations"][1]["value"]) for record in tested]

    def recognition(images):
        with policy.responder(0.0, 32, policy.generator("reading")) as player:
            replies = player(range(256), [envs.Observation(question, image) for image in images])
        named = [re.findall('"([^"]*)"', reply) for reply in replies]
        return sum(a == b for x, y in zip(named, wanted) if len(x) == 4 for a, b in zip(x, y)) / (4 * 256)

    chance = 1 / 13
    assert recognition(images) > 0.95
    assert abs(recognition(images[1:] + images[:1]) - chance) < 4 * (chance / (4 * 256)) ** 0.5


def test_flops_are_six_n_per_trained_token_and_end_the_run(policy):
    chosen = records(4)
    each = 6 * policy.parameter_count * sum(map(len, policy.streams(chosen)))
    config = sft.SFTConfig(batch_size=4, microbatch_size=2, flops=2.5 * each)
    metrics = list(sft.train(policy, policy.optimizers(1e-4), lambda step: chosen, config))
    assert [m["flops"] for m in metrics] == [each, 2 * each, 3 * each]


def test_epochs_visit_every_record_once_in_a_new_order_and_need_no_state():
    data = [{"i": i} for i in range(10)]
    batch = sft.epochs(data, 4, seed=1)
    seen = [record["i"] for step in range(5) for record in batch(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert sft.epochs(data, 4, seed=1)(3) == batch(3)


HUMAN, GPT = {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}
PAIR = {"conversations": [HUMAN, GPT]}


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be read"),
        ([], "non-empty"),
        ([{"conversations": []}], "record 0"),
        ([{"conversations": [GPT, HUMAN]}], "turn 0: `from`"),
        ([{"conversations": [HUMAN, GPT | {"value": 3}]}], "turn 1: `value`"),
        ([PAIR | {"image": "a.png"}], "record 0: `image`: 'a.png'"),
        ([PAIR | {"image": ["a", "b"]}], "record 0: `image`"),
        ([PAIR, PAIR | {"image": "a.png"}], "record 1: `image`: all"),
    ],
)
def test_a_bad_file_is_named_with_record_and_field(tmp_path, content, words):
    path = tmp_path / "demos.json"
    path.write_text(content if content == "{" else json.dumps(content))
    with pytest.raises(ValueError, match="demos.json") as error:
        sft.read_records(str(path))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_record_of_a_walk_shows_one_picture_and_trains_the_replies_to_it(policy):
    env = envs.make("virl-vl", seed=3, view_size=16, turns=2, points_per_leg=1)
    decisions = set()
    for _ in range(6):
        record = envs.demonstration(env, wrong_turns=1)
        values = [turn["value"] for turn in record["conversations"]]
        # The last waypoint: picture, wrong reply, feedback, right reply.
        assert [k for k, value in enumerate(values) if "<image>" in value] == [len(values) - 4]
        assert record["image"] is env.observe().image
        decisions.add(env.decision)
        waypoint = env.waypoints[env.decision]
        right = [envs.judge_step(value, waypoint).verdict == "correct" for value in values[-3::2]]
        assert right == [False, True]
        (stream,) = policy.streams([record])
        assert [policy.decode(stream.ids[start:stop]) for start, stop in stream.replies] == values[-3::2]
        assert sum(stream.mask) == sum(stop - start for start, stop in stream.replies)
        opened = policy.open(env.messages[:-2], env.observe().image)
        assert stream.ids[: len(opened)] == opened.ids
    assert len(decisions) > 2
