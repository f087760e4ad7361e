"""Two gloo processes with FSDP against one process. This file is also the program that torchrun runs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_policy
from safetensors.torch import load_file

import envs
import evaluate
import ppo
import sft
import sftrl

HERE = Path(__file__).resolve()
PROGRAM = HERE.parent.parent / "sftrl.py"
CASES = {"text": ("llama", "gp-l"), "pictures": ("mllama", "virl-vl")}
VIEWS = {"view_size": 16, "panorama_width": 128, "turns": 1, "points_per_leg": 1}


def command(n, *args):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    return [str(arg) for arg in (*torchrun, n, *args)]


def torchrun(n, *args, check=0):
    done = subprocess.run(command(n, *args), capture_output=True, text=True, timeout=300)
    assert done.returncode == check, done.stderr[-3000:]
    return done


def walk(env, route):
    """The demonstrations of every waypoint of a route."""
    env.reset(seed=route, options={"route": route})
    records = []
    while not any(env.done):
        records.append(envs.record(env, env.expert_reply()))
        env.step(env.expert_reply())
    return records


def conversations(policy, records, env):
    """This rank's streams, and episodes with made-up rewards. Walks differ in length, so ranks have unlike
    numbers of rows."""
    streams, episodes = [], []
    for k in range(policy.rank, 8, policy.world):
        walks = isinstance(env, envs.VIRLVL)
        streams.append(policy.streams(walk(env, k), "last") if walks else policy.streams([records[k]]))
        rewards = [-1.0 - k for stream in streams[-1] for _ in stream.replies]
        rewards[-1] += 6.0
        turns = [envs.Turn("", reward, "correct", "", True) for reward in rewards]
        episodes.append(envs.Episode("", [], turns, True))
    return streams, episodes


def train(policy, task, out):
    """One SFT step, one PPO update, a rollout that stops unevenly, an SFT step. One process takes each batch
    as one microbatch, two take several."""
    micro = 8 if policy.world == 1 else 2
    options = VIEWS if task == "virl-vl" else {}
    env = envs.make(task, seed=2, **options)
    records = [envs.demonstration(env, wrong_turns=k % 2) for k in range(8)]
    # Plain gradient descent: its step is the gradient itself, the first of Adam only its sign.
    descent = torch.optim.SGD(policy.parameters(), lr=0.5)
    config = sft.SFTConfig(batch_size=8, microbatch_size=micro, steps=1, max_grad_norm=1.0)
    (metrics,) = sft.train(policy, [descent], lambda step: records, config)
    policy.save(out / "sft")

    config = ppo.PPOConfig(
        episodes=8, minibatch_size=8, microbatch_size=micro, epochs=2, entropy_coef=0.1, kl_coef=0.1
    )
    streams, episodes = conversations(policy, records, env)
    policy.keep_initial_weights()
    optimizers = policy.optimizers(1e-3, 1e-2, eps=1e-3)
    batch = ppo.collect(policy, streams, episodes, config, "formula", center_values=True)
    metrics |= ppo.update(policy, optimizers, batch, config, 0)
    metrics |= ppo.episode_metrics(policy, episodes, batch, config, env.rewards)
    policy.save(out / "ppo")

    uneven = [envs.make(task, verify_iter=1 + 4 * policy.rank, **options) for _ in range(2 + 6 * policy.rank)]
    with policy.responder(1.0, 5 + 20 * policy.rank, policy.generator("uneven")) as player:
        envs.play(uneven, player)
    config = sft.SFTConfig(batch_size=8, steps=1)
    metrics["after_rollout"] = next(sft.train(policy, optimizers, lambda step: records, config))["loss"]
    if policy.rank == 0:
        (out / "metrics.json").write_text(json.dumps(metrics))


def accumulate(policy, out):
    """SFT over several microbatches, of a model whose vision blocks stay unused; then 65 hands, one more on
    the second rank than the 32 of a forward pass."""
    records = [envs.demonstration(envs.make("gp-l", seed=k)) for k in range(8)]
    config = sft.SFTConfig(lr=1e-2, batch_size=8, microbatch_size=1, steps=3)
    steps = sft.train(policy, policy.optimizers(1e-2), lambda step: records, config)
    losses = [metrics["loss"] for metrics in steps]
    hands = [envs.make("gp-l", verify_iter=1) for _ in range(65)]
    result, _ = evaluate.evaluate(policy, hands, 1.0, 2, reference=evaluate.Reference(policy))
    if policy.rank == 0:
        (out / "result.json").write_text(json.dumps({"losses": losses, **result}))


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """The folders of one process and of two, which train at the same time."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    policies = {name: make_policy(kind) for name, (kind, _) in CASES.items()}
    for name, policy in policies.items():
        policy.save(one / name / "start")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with subprocess.Popen(command(2, HERE, one, two), stderr=subprocess.PIPE, text=True) as ranks:
        for name, policy in policies.items():
            train(policy, CASES[name][1], one / name)
        error = ranks.communicate(timeout=300)[1]
    torch.set_num_threads(threads)
    assert ranks.returncode == 0, error[-3000:]
    return one, two


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_steps_of_one_process(one_and_two, case):
    for stage in ("sft", "ppo"):
        for name in ("model.safetensors", "value_head.safetensors"):
            one, two = (load_file(folder / case / stage / name) for folder in one_and_two)
            before = load_file(one_and_two[0] / case / "sft" / name)
            # Steps are some 1e-3 long. In the value head rounding may carry a unit across its ReLU's kink.
            tolerance = 1e-5 if name == "value_head.safetensors" else 1e-6
            assert one.keys() == two.keys()
            for key in one:
                torch.testing.assert_close(one[key], two[key], rtol=0, atol=tolerance)
            assert stage == "sft" or any((before[key] - one[key]).abs().max() > 1e-4 for key in one)
    one, two = (json.loads((folder / case / "metrics.json").read_text()) for folder in one_and_two)
    assert one.keys() == two.keys()
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


def test_bf16_shards_accumulate_gradients_and_share_65_hands(one_and_two):
    result = json.loads((one_and_two[1] / "result.json").read_text())
    assert len(losses := result["losses"]) == 3 and losses[2] < losses[0]
    assert result["episodes"] == len(result["outcomes"]) == 65 and result["kl_to_init"] == 0


def test_the_command_line_under_torchrun_and_its_checkpoints_on_one_process(tmp_path):
    start = tmp_path / "start"
    sftrl.Policy.load("tiny").save(start)  # processes that load it need not train a tokenizer
    last, sizes = tmp_path / "ppo/checkpoint-2", ("--episodes", 4, "--minibatch-size", 2)
    args = ("--max-new-tokens", 8, "--threads", 1, "--steps", 2)
    torchrun(2, PROGRAM, "ppo", "--out", last.parent, "--model", start, *sizes, *args)
    trained, fresh = (sftrl.Policy.load(str(name)).model.state_dict() for name in (last, start))
    assert trained.keys() == fresh.keys() and any(not torch.equal(trained[k], fresh[k]) for k in fresh)
    assert len(sftrl.read_lines(last.parent / "metrics.jsonl")) == 2
    out = torchrun(2, PROGRAM, "evaluate", "--model", last, "--episodes", 5, "--max-new-tokens", 8).stdout
    assert out.count('"episodes": 5') == 1  # all hands, and rank 0 alone prints


def test_all_ranks_learn_that_another_command_writes_to_the_folder(tmp_path):
    with sftrl.locked(tmp_path):
        error = torchrun(2, PROGRAM, "sft", "--out", tmp_path, "--batch-size", 4, check=1).stderr
    assert error.count("sftrl: ") == error.count("another process writes") == 1
    assert "exitcode  : 2" in error and 'sftrl.py", line' not in error


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_run_begun_on_some_ranks_goes_on_on_others(tmp_path, first, then):
    """Interrupted on `first` processes, ended on `then`: the weights are those of a run on one, but for
    rounding."""
    args = (PROGRAM, "sft", "--batch-size", 4, "--steps", 30, "--lr", 1e-4, "--threads", 1, "--out")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    torchrun(1, *args, whole)
    lines = broken / "metrics.jsonl"
    process = subprocess.Popen(command(first, *args, broken), stderr=subprocess.DEVNULL)
    while not lines.exists() or len(lines.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # which torchrun hands on to all ranks
    assert process.wait() != 0
    done = sftrl.read_lines(lines)[-1]["step"]
    assert 3 <= done < 30 and torch.load(broken / "resume.pt", weights_only=True)["step"] == done
    torchrun(then, *args, broken)
    a, b = (load_file(folder / "checkpoint-30/model.safetensors") for folder in (whole, broken))
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=0, atol=1e-4)  # they moved by about 1e-3
    assert [line["step"] for line in sftrl.read_lines(lines)] == list(range(1, 31))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    one, two = map(Path, sys.argv[1:])
    # Recomputed activations may not change anything either.
    options = {"recompute": True, "rollout_dtype": torch.float32}
    for name, (_, task) in CASES.items():
        start = str(one / name / "start")
        train(sftrl.Policy.load_shards(start, torch.float32, **options), task, two / name)
    accumulate(sftrl.Policy.load_shards(start, torch.bfloat16), two)
    sftrl.exit_rank(0)
