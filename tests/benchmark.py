"""How much of the bare model's speed is left: `python tests/benchmark.py`. Prints ratios; each is measured
side by side in one run.

    rollout    a bare cached decode loop of the same model, batches and lengths, over envs.play with the
               policy
    update     bare forward + backward on the same conversations in the same microbatches, over
               ppo.update
    iteration  the sum of both bare loops, over a whole PPO iteration (scoring, advantages and logging
               included)

Ratios of time, 1 is the bare model's speed; for episodes of one reply, of up to three as in the study, and
of up to three with pictures. The bare loops are given drawn and preprocessed pictures and look at them anew
in every turn; ours are drawn and preprocessed within the time."""

import argparse
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import envs  # noqa: E402
import ppo  # noqa: E402
import sftrl  # noqa: E402


@torch.no_grad()
def bare_rollout(policy, model, streams) -> float:
    """Seconds of the shortest loop that samples as many tokens after the same prompts, turn by turn, cut to
    one length per batch."""
    start = time.perf_counter()
    for turn in range(max(len(s.replies) for s in streams)):
        rows = sorted((s for s in streams if len(s.replies) > turn), key=lambda s: s.replies[turn][0])
        for i in range(0, len(rows), policy.rollout_batch):
            chunk = rows[i : i + policy.rollout_batch]
            width = chunk[0].replies[turn][0]
            ids, cache = (
                torch.tensor([s.ids[:width] for s in chunk], device=model.device),
                transformers.DynamicCache(),
            )
            pictures = pixels(chunk, model)
            for _ in range(
                round(statistics.mean(stop - first for first, stop in (s.replies[turn] for s in chunk)))
            ):
                hidden = model.base_model(
                    input_ids=ids, **pictures, past_key_values=cache, use_cache=True
                ).last_hidden_state[:, -1]
                pictures = {}
                p = model.get_output_embeddings()(hidden).float().softmax(-1)
                ids = torch.multinomial(p, 1)
    return time.perf_counter() - start


def pixels(streams, model) -> dict:
    """The tiny model's pictures of some conversations, as its forward pass takes them."""
    return (
        {
            "pixel_values": torch.cat([s.picture["pixel_values"] for s in streams]).to(
                model.device, model.dtype
            )
        }
        if streams[0].picture
        else {}
    )


def bare_update(policy, streams, microbatch_size: int) -> float:
    """Seconds of forward and backward of the mean log-probability of the reply tokens."""
    start = time.perf_counter()
    for i in range(0, len(streams), microbatch_size):
        batch = policy.collate(streams[i : i + microbatch_size])
        mask = batch["mask"].bool()
        pictures = pixels(streams[i : i + microbatch_size], policy.model)
        hidden = policy.model.base_model(
            input_ids=batch["ids"], **pictures, use_cache=False
        ).last_hidden_state[:, :-1][mask[:, 1:]]
        logp = (
            policy.model.get_output_embeddings()(hidden)
            .float()
            .log_softmax(-1)
            .gather(-1, batch["ids"][mask][:, None])
        )
        logp.mean().backward()
    policy.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="tiny",
        help="tiny, a folder or a Hub id; a model that answers in form gives lifelike lengths",
    )
    parser.add_argument(
        "--episodes", type=int, default=512, help="episodes per iteration (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="the median of this many (default: %(default)s)"
    )
    args = parser.parse_args()
    policy = sftrl.Policy.load(args.model)
    optimizers = policy.optimizers(0.0, 0.0)
    for task, verify_iter in (("gp-l", 1), ("gp-l", 3), ("gp-vl", 3)):
        study = sftrl.STUDIES[task]
        config, micro = replace(study.rl, episodes=args.episodes), study.rl.microbatch_size
        environments = [
            envs.make(task, verify_iter=verify_iter, **study.options) for _ in range(args.episodes)
        ]
        ratios: dict[str, list[float]] = {
            "rollout": [],
            "update": [],
            "iteration": [],
            "share of padding": [],
        }
        for repeat in range(args.repeats + 1):  # the first one warms up
            start = time.perf_counter()
            streams, episodes = ppo.rollout(policy, environments, config, repeat)
            rolled = time.perf_counter()
            batch = ppo.collect(policy, streams, episodes, config, "formula")
            scored = time.perf_counter()
            ppo.update(policy, optimizers, batch, config, 0)
            updated = time.perf_counter()
            streams = [stream for own in streams for stream in own]
            with policy.rollout_weights() as model:
                bare_rolled = bare_rollout(policy, model, streams)
            order = torch.randperm(len(streams)).split(config.minibatch_size)
            bare_updated = (
                sum(bare_update(policy, sorted((streams[i] for i in rows), key=len), micro) for rows in order)
                * config.epochs
            )
            parts = [
                int(batch["length"][rows].max()) * len(rows)
                for rows in torch.arange(len(streams)).split(micro)
            ]
            if repeat:
                ratios["rollout"].append(bare_rolled / (rolled - start))
                ratios["update"].append(bare_updated / (updated - scored))
                ratios["iteration"].append((bare_rolled + bare_updated) / (updated - start))
                ratios["share of padding"].append(1 - int(batch["length"].sum()) / sum(parts))
        replies = sum(len(e.turns) for e in episodes)
        print(f"{task}, up to {verify_iter} replies per episode, {len(streams)} episodes, {replies} replies:")
        for name, values in ratios.items():
            print(
                f"    {name}: {statistics.median(values):.2f} (from {min(values):.2f} to {max(values):.2f})"
            )
        print(
            f"    generated {sum(sum(s.mask) for s in streams) / (rolled - start):.0f} tokens/s, "
            f"trained {config.epochs * int(batch['length'].sum()) / (updated - scored):.0f} tokens/s"
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"peak memory: {memory:.2f} GiB; {policy.parameter_count} parameters, "
        f"{torch.get_num_threads()} threads, sampling in {policy.rollout_dtype}"
    )


if __name__ == "__main__":
    main()
