"""PPO for a language model in a conversation with a verifier: hand-written, to be read from top to bottom.

One update:

    rollout     N episodes are played; a reply is a run of sampled tokens, the verifier's words stand between two replies
    score       log-probabilities and values of the sampled tokens, by the same forward pass that training uses
    gae         advantages and returns over the policy's tokens alone
    update      a few epochs of minibatches: clipped policy loss, clipped value loss, entropy, KL to the initial policy

An action is a token (`ratio="token"`, the default) or, as in the paper, a whole reply (`ratio="reply"`). The reward of a turn falls on
the last token of its reply. Everything is a tensor [B, T]: B rows, T tokens of the longest one, with a mask that is 1 where the
policy chose the token. The mask comes from the sampler, never from comparing ids with a padding id. A row is an episode, or on a walk
with pictures what was said at one waypoint; then the batch also holds the B pictures, which only the policy looks into.

Of the policy (`Policy` in sftrl.py) this module uses: responder, collate, forward, backward, step, shift_value, set_lr, sum,
largest, initial_weights, generator, decode, flops, rank, world.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import envs


@dataclass
class PPOConfig:
    """Settings of one run. Sizes count episodes over all ranks; training ends at `steps` or `flops`, whichever is first."""

    lr: float = 1e-6
    value_lr: float = 1e-4
    episodes: int = 256  # per update
    minibatch_size: int = 128  # episodes' worth of rows per optimizer step
    microbatch_size: int = 64  # rows per forward pass and rank
    epochs: int = 4
    steps: int = 20  # updates
    flops: float = math.inf  # 6 N per trained token, 2 N per generated or scored token
    warmup: float = 0.0  # share of the run in which the rate rises; then it follows a cosine to 0
    gamma: float = 0.9  # discount from one turn to the next; inside a reply it is 1
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 1.0  # in units of the return, which spans about -13 to 5
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    kl_coef: float = (
        0.0  # weight of KL(policy || initial policy) in the loss; 0 keeps no copy of the initial weights
    )
    max_grad_norm: float = 1.0
    ratio: str = "token"  # or "reply": one ratio, value and advantage per reply
    thought_coef: float = (
        1.0  # with ratio "reply": weight of the log-probabilities before the answer field (paper: 0.5)
    )
    value_trunk: str = "detached"  # or "shared": the value loss trains the language model too
    value_warmup: int = 0  # first updates that train the value head alone, on the detached trunk
    temperature: float = 1.0
    max_new_tokens: int = 128
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-7
    weight_decay: float = 0.0
    seed: int = 0


# --------------------------------------------------------------------------------------------------------------- mathematics


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over policy tokens (Schulman et al. 2016, equation 16). All tensors [B, T] float.

    `mask` is 1 where the policy chose the token. From one policy token t to the next, t':

        delta_t = r_t + d V_t' - V_t,    A_t = delta_t + d lam A_t',    d = 1 if t' = t + 1, else gamma

    A gap between t and t' is the verifier's turn, so gamma acts once per turn and not per token. After the last policy token value
    and advantage are 0: an episode that ends, solved or with its budget used up, is over. values[b, t] = V(s_t), the state before
    token t was chosen. A reward that stands in a gap, or after the end, counts for the policy token before it.
    Returns advantages and returns A + V, both 0 where the mask is 0.
    """
    batch, length = rewards.shape
    advantages = torch.zeros_like(values)
    next_value = next_advantage = pending = torch.zeros(batch, dtype=values.dtype, device=values.device)
    adjacent = torch.zeros(batch, dtype=torch.bool, device=values.device)  # is t + 1 a policy token?
    inside, between = values.new_tensor(1.0), values.new_tensor(gamma)
    for t in reversed(range(length)):
        chosen = mask[:, t] > 0
        discount = torch.where(adjacent, inside, between)
        delta = rewards[:, t] + pending + discount * next_value - values[:, t]
        advantage = delta + discount * lam * next_advantage
        advantages[:, t] = torch.where(chosen, advantage, 0.0)
        next_value = torch.where(chosen, values[:, t], next_value)
        next_advantage = torch.where(chosen, advantage, next_advantage)
        pending = torch.where(chosen, 0.0, pending + rewards[:, t])
        adjacent = chosen
    return advantages, torch.where(mask > 0, advantages + values, 0.0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1; 0 if that is nowhere. x and mask [B, T]."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Clipped surrogate loss, a scalar to minimise (Schulman et al. 2017, equation 7). All tensors [B, T].

    - mean over the mask of min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A), ratio = exp(logp - old_logp).
    """
    ratio = torch.exp(logp - old_logp)
    return -masked_mean(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Clipped value loss, a scalar: 1/2 mean over the mask of max((V - R)^2, (V_clipped - R)^2). All tensors [B, T].

    V_clipped stays within `clip` of the rollout's value, so one batch cannot pull the critic far.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def kl_estimate(logp: Tensor, other_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(p || q) in nats from samples of p: q/p - 1 - log(q/p), never negative (Schulman 2020, "Approximating KL
    divergence"). logp of p, other_logp of q, of any shape."""
    log_ratio = other_logp - logp
    return torch.exp(log_ratio) - 1 - log_ratio


def per_reply(x: Tensor, starts: Tensor) -> Tensor:
    """Sums x [B, T], which is 0 outside replies, over each reply; the sum stands on the reply's first token (starts [B, T] is 1)."""
    reply = starts.cumsum(1).long()  # 0 before the first reply, then 1, 2, ...
    sums = torch.zeros(len(x), int(reply.max()) + 1, dtype=x.dtype, device=x.device).scatter_add(1, reply, x)
    return sums.gather(1, reply) * starts


# --------------------------------------------------------------------------------------------------------- from episode to batch


def rollout(
    policy, environments: Sequence, config: PPOConfig, step: int
) -> tuple[list[list], list[envs.Episode]]:
    """Plays one episode in each of this rank's environments: the token streams of each episode (one, or on a walk with pictures one for each
    waypoint) and the episodes, in the same order.

    Hands and samples are a function of (seed, step, rank), so a resumed run sees what the unbroken one would have seen.
    """
    seeds = [
        f"train/{config.seed}/{step}/{policy.rank * len(environments) + i}" for i in range(len(environments))
    ]
    generator = policy.generator(f"rollout/{config.seed}/{step}")
    with policy.responder(config.temperature, config.max_new_tokens, generator) as respond:
        episodes = envs.play(environments, respond, seeds)
    return [respond.streams[i] for i in range(len(episodes))], episodes


def collect(
    policy,
    streams: list[list],
    episodes: list[envs.Episode],
    config: PPOConfig,
    answer_field: str,
    first: bool = False,
) -> dict[str, Any]:
    """The batch of one update: tokens, masks, rewards, old log-probabilities, values, advantages and returns; a row for each stream.

    `answer_field` is the name of the field where a reply's thought ends. In the `first` update the value head is shifted by a constant,
    so that its mean is the mean return: a fresh head says 0 everywhere, and with lam < 1 an error that all tokens share does not cancel.
    Along a solved reply the advantage would grow towards its end (lam^k R, k tokens before it), and its early tokens could fall below
    the mean and be unlearned.

    `mask` marks the policy's tokens, `actions` what has a ratio: the same tokens, or the first token of each reply.
    """
    rows, rows_of_episode = arrange(policy, streams)
    batch = policy.collate(rows)
    batch["rewards"], starts, weights = (torch.zeros_like(batch["mask"]) for _ in range(3))
    for own, episode in zip(rows_of_episode, episodes):
        replies = [(b, start, stop) for b in own for start, stop in rows[b].replies]
        for (b, start, stop), turn in zip(replies, episode.turns, strict=True):
            batch["rewards"][b, stop - 1] = turn.reward
            starts[b, start] = 1
            if config.ratio == "reply":
                answer = start + thought_length(policy, rows[b].ids[start:stop], answer_field)
                weights[b, start:answer], weights[b, answer:stop] = config.thought_coef, 1
    if config.ratio == "reply":
        batch["actions"], batch["weights"] = starts, weights
    else:
        batch["actions"] = batch["mask"]
    # One pass of the training forward gives the old log-probabilities: the first ratio is 1, whatever precision sampled the tokens.
    scores = score(policy, batch, config, values=True)
    if first:
        _, returns = gae_of_episodes(
            rows_of_episode,
            batch["rewards"],
            torch.zeros_like(scores["value"]),
            batch["actions"],
            config.gamma,
            1.0,
        )
        error, count = policy.sum(
            ((returns - scores["value"]) * batch["actions"]).sum(), batch["actions"].sum()
        )
        policy.shift_value(error / count)
        scores["value"] += error / count
    sampled = torch.zeros_like(batch["mask"])
    for b, stream in enumerate(rows):
        sampled[b, : len(stream)] = torch.tensor(stream.logp)
    batch["sampler_gap"] = (sampled - scores["logp"]).abs()
    batch["old_logp"], batch["old_values"] = (
        action_logp(scores["logp"], batch),
        scores["value"] * batch["actions"],
    )
    if config.kl_coef:
        with policy.initial_weights():
            batch["initial_logp"] = score(policy, batch, config)["logp"]
    batch["advantages"], batch["returns"] = gae_of_episodes(
        rows_of_episode, batch["rewards"], batch["old_values"], batch["actions"], config.gamma, config.lam
    )
    batch["advantages"] = whiten(policy, batch["advantages"], batch["actions"])
    return batch


def arrange(policy, streams: list[list]) -> tuple[list, list[list[int]]]:
    """The rows of a batch, and of each episode its rows in the order of time.

    Rows are sorted by length, so that neighbours share a microbatch with little padding. All ranks get as many: where episodes have several
    rows, a rank with fewer adds copies of its shortest one that train nothing.
    """
    rows = [(e, k, stream) for e, own in enumerate(streams) for k, stream in enumerate(own)]
    *_, short = min(rows, key=lambda row: len(row[2]))
    spare = replace(short, mask=[0] * len(short), logp=[0.0] * len(short), replies=[])
    rows += [(None, 0, spare)] * int(policy.largest(len(rows)) - len(rows))
    rows.sort(key=lambda row: len(row[2]))
    rows_of_episode = [[0] * len(own) for own in streams]
    for b, (e, k, _) in enumerate(rows):
        if e is not None:
            rows_of_episode[e][k] = b
    return [stream for _, _, stream in rows], rows_of_episode


def gae_of_episodes(
    rows_of_episode: list[list[int]], rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae` where an episode may have several rows, one after another in time: they are joined, so that the value of a row's end is that
    of the next row's beginning. Arguments and results as in `gae`, all [B, T]; `rows_of_episode` lists the rows of each episode in
    order."""
    joined = [
        pad_sequence([x[rows].flatten() for rows in rows_of_episode], batch_first=True)
        for x in (rewards, values, mask)
    ]
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for out, long in zip((advantages, returns), gae(*joined, gamma, lam)):
        for rows, line in zip(rows_of_episode, long):
            out[rows] = line[: len(rows) * out.shape[1]].view(len(rows), -1)
    return advantages, returns


def thought_length(policy, ids: list[int], answer_field: str) -> int:
    """Number of a reply's tokens before the one in which the name of the answer field ends."""
    text = ""
    for k, token in enumerate(ids):
        text += policy.decode([token])
        if answer_field in text:
            return k
    return len(ids)


def rows_of(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of a batch (rows: their indices [n]), cut to the longest of them."""
    width, part = int(batch["length"][rows].max()), {}
    for name, values in batch.items():
        if name == "pictures":
            part[name] = [values[i] for i in rows.tolist()]
        else:
            part[name] = values[rows, :width] if values.dim() > 1 else values[rows]
    return part


@torch.no_grad()
def score(policy, batch: dict[str, Any], config: PPOConfig, values: bool = False) -> dict[str, Tensor]:
    """What the policy says of a whole batch, by microbatches: "logp" and, if asked for, "value", both [B, T]."""
    out = {"logp": torch.zeros_like(batch["mask"]), "value": torch.zeros_like(batch["mask"])}
    for rows in torch.arange(len(batch["ids"]), device=batch["ids"].device).split(config.microbatch_size):
        part = rows_of(batch, rows)
        scores = policy(part, config.temperature, values=config.value_trunk if values else None)
        for name, scored in scores.items():
            out[name][rows, : scored.shape[1]] = scored
    return out


def action_logp(logp: Tensor, batch: dict[str, Any]) -> Tensor:
    """Log-probability of each action [B, T]: of the token, or the weighted sum over the reply, on its first token."""
    return per_reply(logp * batch["weights"], batch["actions"]) if "weights" in batch else logp


def whiten(policy, x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T] with mean 0 and standard deviation 1 over the mask of all ranks; 0 elsewhere."""
    total, first, second = policy.sum(mask.sum(), (x * mask).sum(), (x * x * mask).sum())
    mean = first / total
    variance = max(second / total - mean * mean, 0.0)
    return (x - mean) / (variance**0.5 + 1e-8) * mask


# --------------------------------------------------------------------------------------------------------- from batch to weights


def update(
    policy, optimizers: list[torch.optim.Optimizer], batch: dict[str, Any], config: PPOConfig, step: int
) -> dict[str, float]:
    """Epochs of minibatches over one batch, one optimizer step per minibatch; returns the means of what is logged.

    Policy and value loss are normalised by the number of actions in the global minibatch, entropy and KL by that of tokens. Every rank
    has the same number of rows, hence of minibatches and microbatches; a minibatch has the share of them that `minibatch_size` is of
    the episodes. Raises FloatingPointError on a non-finite loss or gradient.
    """
    sums: Counter[str] = Counter()
    largest, norms, first_ratio = 1.0, [], None
    warming = step < config.value_warmup
    shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    size = math.ceil(len(batch["ids"]) * config.minibatch_size / config.episodes)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(batch["ids"]), generator=shuffle).split(size):
            rows = rows.sort().values.to(
                batch["ids"].device
            )  # rows are in order of length: sorted ones pad least
            actions, tokens = policy.sum(batch["actions"][rows].sum(), batch["mask"][rows].sum())
            microbatches = rows.split(config.microbatch_size)
            minibatch_loss = 0.0
            for k, micro in enumerate(microbatches):
                part = rows_of(batch, micro)
                scores = policy(
                    part,
                    config.temperature,
                    values="detached" if warming else config.value_trunk,
                    entropy=True,
                )
                logp, act = action_logp(scores["logp"], part), part["actions"]
                share = (
                    act.sum() / actions
                )  # makes the mean over this microbatch its part of the mean over the global minibatch
                pg = policy_loss(logp, part["old_logp"], part["advantages"], act, config.clip) * share
                vf = (
                    value_loss(scores["value"], part["old_values"], part["returns"], act, config.value_clip)
                    * share
                )
                entropy = scores["entropy"].sum() / tokens
                loss = config.value_coef * vf
                if not warming:
                    loss = loss + pg - config.entropy_coef * entropy
                    if config.kl_coef:
                        # The gradient of half the squared log-ratio is that of KL(policy || initial); that of k3 is the reverse KL's.
                        squared = ((scores["logp"] - part["initial_logp"]) ** 2).sum() / tokens
                        loss = loss + config.kl_coef * 0.5 * squared
                if config.kl_coef:
                    with torch.no_grad():
                        sums["kl_to_init"] += (
                            (kl_estimate(scores["logp"], part["initial_logp"]) * part["mask"]).sum() / tokens
                        ).item()
                policy.backward(loss, last=k == len(microbatches) - 1)
                minibatch_loss += loss.item()
                with torch.no_grad():
                    ratio = torch.exp(logp - part["old_logp"])
                    largest = max(largest, (ratio * act).max().item())
                    sums["policy_loss"] += pg.item()
                    sums["value_loss"] += vf.item()
                    sums["entropy"] += entropy.item()
                    sums["approx_kl"] += (
                        masked_mean(kl_estimate(part["old_logp"], logp), act) * share
                    ).item()
                    sums["clip_fraction"] += (
                        masked_mean(((ratio - 1).abs() > config.clip).float(), act) * share
                    ).item()
                    if not norms:
                        first_ratio = max(first_ratio or 0.0, ((ratio - 1).abs() * act).max().item())
            norms.append(policy.step(optimizers, config.max_grad_norm, policy.sum(minibatch_loss)[0]))
    names = sorted(sums)
    means = {
        name: total / len(norms) for name, total in zip(names, policy.sum(*(sums[name] for name in names)))
    }
    return means | {
        "grad_norm": sum(norms) / len(norms),
        "largest_ratio": policy.largest(largest),
        "first_ratio_error": policy.largest(first_ratio),
    }


def episode_metrics(
    policy,
    streams: list[list],
    episodes: list[envs.Episode],
    batch: dict[str, Any],
    config: PPOConfig,
    names: Sequence[str],
) -> dict[str, float]:
    """What the rollout says, over all ranks: return, success, verdicts (`names`: those that the task knows), lengths, and how much of the
    return the critic explains."""
    turns = [turn for episode in episodes for turn in episode.turns]
    discounted = sum(
        turn.reward * config.gamma**k for episode in episodes for k, turn in enumerate(episode.turns)
    )
    verdicts = sorted(names)
    counts, rewards = Counter(turn.verdict for turn in turns), Counter()
    for turn in turns:
        rewards[turn.verdict] += turn.reward
    error, act = batch["returns"] - batch["old_values"], batch["actions"]
    n, replies, solved, first, ret, tokens, actions, gap, error1, error2, return1, return2, *by_verdict = (
        policy.sum(
            len(episodes),
            len(turns),
            sum(e.success for e in episodes),
            sum(e.success and e.most_tries() == 1 for e in episodes),
            discounted,
            sum(sum(stream.mask) for own in streams for stream in own),
            act.sum(),
            batch["sampler_gap"].sum(),
            (error * act).sum(),
            (error**2 * act).sum(),
            (batch["returns"] * act).sum(),
            (batch["returns"] ** 2 * act).sum(),
            *(counts[v] for v in verdicts),
            *(rewards[v] for v in verdicts),
        )
    )
    variance = return2 / actions - (return1 / actions) ** 2
    return {
        "return": ret / n,
        "success": solved / n,
        "first_success": first / n,
        "turns": replies / n,
        "reply_length": tokens / replies,
        "sampler_gap": gap / tokens,
        "explained_variance": 1 - (error2 / actions - (error1 / actions) ** 2) / variance
        if variance > 0
        else 0.0,
        **{f"share/{v}": c / replies for v, c in zip(verdicts, by_verdict)},
        **{f"reward/{v}": r / n for v, r in zip(verdicts, by_verdict[len(verdicts) :])},
    }


def train(
    policy,
    optimizers: list[torch.optim.Optimizer],
    environments: Sequence,
    config: PPOConfig,
    step: int = 0,
    flops: float = 0.0,
) -> Iterator[dict]:
    """Trains until `config.steps` updates or `config.flops`, and yields the metrics of every update.

    `environments` are this rank's, one episode each per update. `step` and `flops` are where a resumed run stands.
    """
    while (progress := max(step / config.steps, flops / config.flops)) < 1:
        factor = policy.set_lr(optimizers, progress, config.warmup)
        spent, clock = policy.flops, time.perf_counter()
        streams, episodes = rollout(policy, environments, config, step)
        rolled = time.perf_counter()
        batch = collect(policy, streams, episodes, config, environments[0].fields[-1], first=step == 0)
        scored = time.perf_counter()
        losses = update(policy, optimizers, batch, config, step)
        updated = time.perf_counter()
        generated, trained, work = policy.sum(
            batch["mask"].sum(), batch["length"].sum() * config.epochs, policy.flops - spent
        )
        step, flops = step + 1, flops + work
        yield {
            "step": step,
            "flops": flops,
            "progress": max(step / config.steps, flops / config.flops),
            "lr": factor * config.lr,
            **episode_metrics(policy, streams, episodes, batch, config, environments[0].rewards),
            **losses,
            "rollout_tokens_per_s": generated / (rolled - clock),
            "update_tokens_per_s": trained / (updated - scored),
            "seconds": updated - clock,
            "transcript": episodes[0].transcript(),
        }
