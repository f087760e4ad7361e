"""Two gloo processes with FSDP against one process. This file is also the program that torchrun runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent


def torchrun(n, *args, check=0):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n),
        *map(str, args),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == check, done.stderr[-3000:]
    return done


def walk(env, route: int) -> list[dict]:
    """The demonstrations of every waypoint of a route."""
    import envs

    env.reset(seed=route, options={"route": route})
    records = []
    while not any(env.done):
        records.append(envs.record(env, env.expert_reply()))
        env.step(env.expert_reply())
    return records


def worker(kind: str, task: str, out: Path) -> None:
    """One SFT step, then one PPO update on the same conversations, then a rollout that stops unevenly;
    saves weights and metrics."""
    import torch.distributed as dist
    from conftest import SMALL, make_policy

    import envs
    import ppo
    import sft
    import sftrl

    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    policy = make_policy(kind)
    # A checkpoint that rank 0 alone reads, and activations computed again: neither may change anything.
    if world > 1:
        if policy.rank == 0:
            policy.save(out / "start")
        dist.barrier()
        policy = sftrl.Policy.load_shards(
            str(out / "start"), torch.float32, recompute=True, rollout_dtype=torch.float32
        )
    small = {
        "gp-vl": SMALL,
        "virl-vl": {"view_size": 16, "panorama_width": 128, "turns": 1, "points_per_leg": 1},
    }.get(task, {})
    env = envs.make(task, seed=2, **small)
    records = [envs.demonstration(env, wrong_turns=k % 2) for k in range(8)]

    # plain gradient descent, so that the step shows the gradient itself and not only its sign as Adam's
    # first step does
    optimizers = [torch.optim.SGD(list(policy.parameters()), lr=0.5)]
    optimizers[0].param_groups[0]["initial_lr"] = 0.5
    config = sft.SFTConfig(lr=0.5, batch_size=8, microbatch_size=2, steps=1, max_grad_norm=1.0)
    (metrics,) = sft.train(policy, optimizers, lambda step: records, config)
    policy.save(out / "sft")

    config = ppo.PPOConfig(
        episodes=8, minibatch_size=8, microbatch_size=2, epochs=2, entropy_coef=0.1, kl_coef=0.1
    )
    streams, episodes = [], []
    for k in list(range(8))[policy.rank :: world]:
        # Of unlike length, so the ranks have unlike numbers of rows.
        chain = [records[k]] if task == "gp-l" else walk(env, k)
        streams.append(policy.streams(chain, "all" if task == "gp-l" else "last"))
        n = sum(len(stream.replies) for stream in streams[-1])
        episodes.append(
            envs.Episode(
                "",
                [],
                [envs.Turn("", -1.0 - k + 6.0 * (j == n - 1), "correct", "", True) for j in range(n)],
                True,
            )
        )
    policy.keep_initial_weights()
    optimizers = policy.optimizers(1e-3, 1e-2, eps=1e-3)
    batch = ppo.collect(policy, streams, episodes, config, "formula", center_values=True)
    metrics |= ppo.update(policy, optimizers, batch, config, 0) | ppo.episode_metrics(
        policy, episodes, batch, config, env.rewards
    )
    policy.save(out / "ppo")

    environments = [
        envs.make(task, verify_iter=1 + 4 * policy.rank, **small) for _ in range(2 + 6 * policy.rank)
    ]
    with policy.responder(1.0, 5 + 20 * policy.rank, policy.generator("uneven")) as respond:
        envs.play(environments, respond)
    metrics["after_rollout"] = next(
        sft.train(policy, optimizers, lambda step: records, sft.SFTConfig(batch_size=8, steps=1))
    )["loss"]
    if policy.rank == 0:
        (out / "metrics.json").write_text(json.dumps(metrics))
    if world > 1:
        sftrl.exit_rank(0)


def accumulate(out: Path) -> None:
    """SFT in words on a model with vision blocks, which stay unused, over several microbatches, with bf16
    shards as on GPUs; then 65 hands, one more on the second rank than the 32 of a forward pass."""
    import torch.distributed as dist
    from conftest import make_policy

    import envs
    import evaluate
    import sft
    import sftrl

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        make_policy("mllama").save(out / "start")
    dist.barrier()
    policy = sftrl.Policy.load_shards(str(out / "start"), torch.bfloat16)
    records = [envs.demonstration(envs.make("gp-l", seed=k)) for k in range(8)]
    config = sft.SFTConfig(lr=1e-2, batch_size=8, microbatch_size=1, steps=3)
    losses = [
        metrics["loss"]
        for metrics in sft.train(policy, policy.optimizers(1e-2), lambda step: records, config)
    ]
    hands = [envs.make("gp-l", verify_iter=1) for _ in range(65)]
    result, _ = evaluate.evaluate(policy, hands, 1.0, 2, reference=evaluate.Reference(policy))
    if policy.rank == 0:
        (out / "result.json").write_text(json.dumps({"losses": losses, **result}))
    sftrl.exit_rank(0)


def test_bf16_shards_accumulate_gradients_where_vision_blocks_are_unused_and_share_65_hands(tmp_path):
    torchrun(2, HERE, "accumulate", "-", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(losses := result["losses"]) == 3 and losses[2] < losses[0]
    assert result["episodes"] == len(result["outcomes"]) == 65 and result["kl_to_init"] == 0


@pytest.fixture(scope="module", params=[("llama", "gp-l"), ("mllama", "virl-vl")], ids=["text", "pictures"])
def one_and_two(tmp_path_factory, request):
    """The folders of one process and of two."""
    folders = []
    for n in (1, 2):
        folders.append(tmp_path_factory.mktemp(f"ranks{n}"))
        torchrun(n, HERE, *request.param, folders[-1])
    return folders


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("name", ["model.safetensors", "value_head.safetensors"])
def test_two_ranks_take_the_same_step_as_one_process(one_and_two, stage, name):
    one, two = (load_file(folder / stage / name) for folder in one_and_two)
    # Steps are some 1e-3 long. In the value head rounding may carry a unit across the kink of its ReLU.
    tolerance = 1e-5 if name == "value_head.safetensors" else 1e-6
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=tolerance)
    if stage == "ppo":
        before = load_file(one_and_two[0] / "sft" / name)
        assert any((before[key] - one[key]).abs().max() > 1e-4 for key in one)


def test_two_ranks_log_what_one_process_logs_and_go_on_after_uneven_rollouts(one_and_two):
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in one_and_two)
    assert one.keys() == two.keys()
    for key in one:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


def test_the_command_line_under_torchrun_and_its_checkpoints_on_one_process(tmp_path):
    args = ("--steps", 2, "--threads", 1, "--max-new-tokens", 8)
    torchrun(2, ROOT / "sftrl.py", "sft", "--out", tmp_path / "sft", "--batch-size", 4, *args[:4])
    torchrun(
        2,
        ROOT / "sftrl.py",
        "ppo",
        "--out",
        tmp_path / "ppo",
        "--model",
        tmp_path / "sft/checkpoint-2",
        "--episodes",
        8,
        "--minibatch-size",
        4,
        *args,
    )
    import sftrl

    policy = sftrl.Policy.load(str(tmp_path / "ppo/checkpoint-2"))
    trained, fresh = policy.model.state_dict(), sftrl.Policy.load("tiny").model.state_dict()
    assert trained.keys() == fresh.keys() and any(not torch.equal(trained[k], fresh[k]) for k in fresh)
    assert len(sftrl.read_lines(tmp_path / "ppo/metrics.jsonl")) == 2
    out = torchrun(
        2,
        ROOT / "sftrl.py",
        "evaluate",
        "--model",
        tmp_path / "ppo/checkpoint-2",
        "--episodes",
        5,
        "--max-new-tokens",
        8,
    ).stdout
    assert out.count('"episodes": 5') == 1  # all hands, and rank 0 alone prints


def test_all_ranks_learn_that_another_command_writes_to_the_folder(tmp_path):
    import sftrl

    with sftrl.locked(tmp_path):
        error = torchrun(2, ROOT / "sftrl.py", "sft", "--out", tmp_path, "--batch-size", 4, check=1).stderr
    assert error.count("sftrl: ") == error.count("another process writes") == 1
    assert "exitcode  : 2" in error and 'sftrl.py", line' not in error


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_a_run_begun_on_some_ranks_goes_on_on_others(tmp_path, first, then):
    """Interrupted on `first` processes, ended on `then`: the weights are those of a run on one, but for
    rounding."""
    args = ("sft", "--batch-size", "4", "--steps", "30", "--lr", "1e-4", "--threads", "1", "--out")
    torchrun(1, ROOT / "sftrl.py", *args, tmp_path / "whole")
    folder = tmp_path / "broken"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(first),
        str(ROOT / "sftrl.py"),
        *args,
        str(folder),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while (
        not (folder / "metrics.jsonl").exists()
        or len((folder / "metrics.jsonl").read_text().splitlines()) < 3
    ):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # which torchrun hands on to all ranks
    assert process.wait() != 0
    import sftrl

    done = sftrl.read_lines(folder / "metrics.jsonl")[-1]["step"]
    assert 3 <= done < 30 and torch.load(folder / "resume.pt", weights_only=True)["step"] == done
    torchrun(then, ROOT / "sftrl.py", *args, folder)
    whole, broken = (
        load_file(tmp_path / name / "checkpoint-30/model.safetensors") for name in ("whole", "broken")
    )
    for key in whole:
        torch.testing.assert_close(broken[key], whole[key], rtol=0, atol=1e-4)  # they moved by about 1e-3
    assert [line["step"] for line in sftrl.read_lines(folder / "metrics.jsonl")] == list(range(1, 31))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    if sys.argv[1] == "accumulate":
        accumulate(Path(sys.argv[3]))
    else:
        worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
