"""How much of the bare model's speed is left: `python tests/benchmark.py`. Prints ratios; each is measured side by side in one run.

    rollout    tokens/s of envs.play with the policy, against a bare cached decode loop of the same model, batch and lengths
    update     tokens/s of ppo.update, against bare forward + backward on the same conversations in the same microbatches
    iteration  time of rollout and update alone, over that of a whole PPO iteration (scoring, advantages and logging included)
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import envs  # noqa: E402
import ppo  # noqa: E402
import sftrl  # noqa: E402


@torch.no_grad()
def bare_decode(model, prompts: torch.Tensor, steps: int) -> float:
    """Seconds of the shortest loop that samples `steps` tokens for equally long prompts."""
    start, cache, ids = time.perf_counter(), transformers.DynamicCache(), prompts
    for _ in range(steps):
        hidden = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        p = model.get_output_embeddings()(hidden).float().softmax(-1)
        ids = torch.multinomial(p, 1)
    return time.perf_counter() - start


def bare_update(policy, streams, microbatch_size: int) -> float:
    """Seconds of forward and backward of the mean log-probability of the reply tokens."""
    start = time.perf_counter()
    for i in range(0, len(streams), microbatch_size):
        batch = policy.collate(streams[i : i + microbatch_size])
        mask = batch["mask"].bool()
        hidden = policy.model.base_model(input_ids=batch["ids"], use_cache=False).last_hidden_state[:, :-1][mask[:, 1:]]
        logp = policy.model.get_output_embeddings()(hidden).float().log_softmax(-1).gather(-1, batch["ids"][mask][:, None])
        logp.mean().backward()
    policy.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, a folder or a Hub id; a model that answers in form gives lifelike lengths")
    parser.add_argument("--episodes", type=int, default=512, help="episodes per iteration (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="the median of this many (default: %(default)s)")
    args = parser.parse_args()
    policy = sftrl.Policy.load(args.model)
    study = sftrl.STUDIES["gp-l"]
    config = study.rl
    config.episodes = args.episodes
    environments = [envs.make("gp-l", verify_iter=study.verify_iter) for _ in range(args.episodes)]
    optimizers = policy.optimizers(0.0, 0.0)
    micro = config.microbatch_size
    rollout_ratio, update_ratio, iteration_ratio, padding = [], [], [], []
    for repeat in range(args.repeats + 1):  # the first one warms up
        # One turn, so that both loops decode the same batch: prompts and replies of like length.
        single = [envs.make("gp-l", verify_iter=1) for _ in range(min(args.episodes, policy.rollout_batch))]
        start = time.perf_counter()
        streams, _ = ppo.rollout(policy, single, config, repeat)
        seconds = time.perf_counter() - start
        generated = sum(sum(s.mask) for s in streams)
        width = min(s.replies[0][0] for s in streams)
        prompts = torch.tensor([s.ids[:width] for s in streams], device=policy.model.device)
        steps = round(generated / len(streams))
        with policy.rollout_weights() as model:
            bare = bare_decode(model, prompts, steps)
        rollout = (generated / seconds) / (len(streams) * steps / bare)

        start = time.perf_counter()
        streams, episodes = ppo.rollout(policy, environments, config, repeat)
        rolled = time.perf_counter() - start
        batch = ppo.collect(policy, streams, episodes, config, "formula")
        before = time.perf_counter()
        ppo.update(policy, optimizers, batch, config, 0)
        updated = time.perf_counter() - before
        whole = time.perf_counter() - start
        order = torch.randperm(len(streams)).split(config.minibatch_size)
        bare = sum(bare_update(policy, sorted((streams[i] for i in rows), key=len), micro) for rows in order) * config.epochs
        parts = [int(batch["length"][rows].max()) * len(rows) for rows in torch.arange(len(streams)).split(micro)]
        if repeat:
            rollout_ratio.append(rollout)
            update_ratio.append(bare / updated)
            iteration_ratio.append((rolled + updated) / whole)
            padding.append(1 - int(batch["length"].sum()) / sum(parts))
            print(f"rollout {sum(sum(s.mask) for s in streams) / rolled:.0f} tokens/s, update {config.epochs * int(batch['length'].sum()) / updated:.0f} tokens/s")
    for name, values in (("rollout / bare decode loop", rollout_ratio), ("update / bare forward + backward", update_ratio),
                         ("(rollout + update) / whole iteration", iteration_ratio), ("share of padding", padding)):  # fmt: skip
        print(f"{name}: {statistics.median(values):.2f} (from {min(values):.2f} to {max(values):.2f})")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB; {policy.parameter_count} parameters, "
          f"{torch.get_num_threads()} threads, sampling in {policy.rollout_dtype}")  # fmt: skip


if __name__ == "__main__":
    main()
