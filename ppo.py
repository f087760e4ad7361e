"""PPO for a language model in a conversation with a verifier, from top to bottom.

One update (`train`):

    rollout   plays N episodes: `Player` samples replies (`Policy.sample`), the verifier judges them
              (`envs.play`), its feedback joins the prompt (`Policy.extend`)
    collect   scores the sampled tokens by the training forward pass (`Policy.forward`), then computes
              advantages and returns, one episode at a time (`gae`)
    update    epochs of minibatches: `losses`, backward, one optimizer step each

The file follows that order. The policy comes after it: text and tokens, scores, sampling.

A *reply* is what the policy samples in one turn, end token included. A *stream* is one conversation in
tokens. An *episode* is what an environment plays: one stream, or one per waypoint on a walk with pictures. A
*row* is a stream in a batch. An *action* has one ratio, value and advantage: a token (`ratio="token"`, the
default) or, as in the paper (arXiv 2501.17161), a whole reply (`ratio="reply"`).

Batches are tensors [B, T]: B rows, padded on the right to the T tokens of the longest. `mask` is 1 on trained
tokens, which the policy sampled; it is never inferred from a padding id.

Left out for brevity: a separate value model (the value head reads the policy's trunk), adaptive KL
coefficients, and partial episodes: every episode ends within its rollout.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Annotated, Any

import jinja2
import torch
import torch.distributed as dist
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

import envs
from envs import Option

Batch = dict[str, Any]  # tensors by name, and perhaps "pictures"
Spans = list[list[tuple[int, int, int]]]  # (row, start, stop) of each episode's replies, in order
Optimizers = list[torch.optim.Optimizer]


@dataclass
class PPOConfig:
    """Settings of one run. Sizes are totals over ranks, unless "per rank"."""

    lr: Annotated[float, Option("peak learning rate", above=0)] = 1e-6
    value_lr: Annotated[float, Option("learning rate of the value head", least=0)] = 1e-4
    episodes: Annotated[int, Option("episodes per update", least=1)] = 256
    minibatch_size: Annotated[int, Option("episodes' worth of rows per optimizer step", least=1)] = 128
    microbatch_size: Annotated[int, Option("rows per forward pass and rank", least=1)] = 64
    epochs: Annotated[int, Option("passes over each batch of episodes", least=1)] = 4
    steps: Annotated[int, Option("updates", least=1)] = 20
    flops: Annotated[
        float, Option("compute budget: 6 N per trained, 2 N per sampled or scored token", above=0)
    ] = math.inf
    warmup: Annotated[float, Option("warm-up as a share of the run; cosine after it", least=0, most=1)] = 0.0
    gamma: Annotated[float, Option("discount per turn; inside a reply it is 1", least=0, most=1)] = 0.9
    lam: Annotated[float, Option("lambda of GAE, per action", least=0, most=1)] = 0.95
    clip: Annotated[float, Option("clip range of the ratio", above=0)] = 0.2
    value_clip: Annotated[float, Option("clip range of the value, in units of the return", above=0)] = 1.0
    value_coef: Annotated[float, Option("weight of the value loss", least=0)] = 0.5
    entropy_coef: Annotated[float, Option("weight of the entropy bonus, in nats", least=0)] = 0.0
    kl_coef: Annotated[float, Option("weight of KL(policy || initial policy), in nats", least=0)] = 0.0
    max_grad_norm: Annotated[float, Option("clip the global gradient norm at this", above=0)] = 1.0
    ratio: Annotated[str, Option("unit of ratio, value and advantage", choices=("token", "reply"))] = "token"
    objective: Annotated[str, Option("ppo, or SFT on correct replies", choices=("ppo", "imitate"))] = "ppo"
    thought_coef: Annotated[float, Option("ratio reply: weight of the thought (paper: .5)", least=0)] = 1.0
    value_trunk: Annotated[
        str, Option("shared: the value loss also trains the language model", choices=("detached", "shared"))
    ] = "detached"
    value_warmup: Annotated[int, Option("first updates that train the value head alone", least=0)] = 0
    temperature: Annotated[float, Option("sampling temperature", above=0)] = 1.0
    max_new_tokens: Annotated[int, Option("longest reply, in tokens", least=1)] = 128
    betas: Annotated[tuple[float, float], Option("of AdamW", least=0, most=1)] = (0.9, 0.98)
    eps: Annotated[float, Option("of AdamW", above=0)] = 1e-7
    weight_decay: Annotated[float, Option("of AdamW", least=0)] = 0.0
    seed: Annotated[int, Option("random seed", least=0, most=2**32 - 1)] = 0


@dataclass
class Stream:
    """One conversation in tokens.

    `mask` is 1 on trained tokens: sampled replies with their end tokens, never prompts and feedback.
    `replies` are the [start, stop) of each reply, `logp` the sampler's log-probabilities. `picture` holds the
    processor's tensors for its picture, `columns` those with one entry per prompt token, [n, ...].
    """

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    replies: list[tuple[int, int]] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    picture: dict[str, Tensor] | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def context(self, ids: Sequence[int]) -> None:
        """Appends tokens that the policy did not sample."""
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logp += [0.0] * len(ids)

    def reply(self, ids: Sequence[int], logp: Sequence[float] | None = None) -> None:
        """Appends one reply of the policy."""
        self.replies.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.mask += [1] * len(ids)
        self.logp += logp or [0.0] * len(ids)


# -------- one update after the other


def train(
    policy: Policy, optimizers: Optimizers, environments: Sequence, config: PPOConfig, step=0, flops=0.0
) -> Iterator[dict]:
    """Trains for `config.steps` updates or `config.flops`; yields the metrics of each. This rank's
    `environments` play one episode each per update. A resumed run continues from `step` and `flops`."""
    while (progress := max(step / config.steps, flops / config.flops)) < 1:
        factor = policy.set_lr(optimizers, progress, config.warmup)
        spent, clock = policy.flops, [time.perf_counter()]
        streams, episodes = rollout(policy, environments, config, step)
        clock.append(time.perf_counter())
        batch = collect(policy, streams, episodes, config, environments[0].answer_field, step == 0)
        clock.append(time.perf_counter())
        logged = update(policy, optimizers, batch, config, step)
        clock.append(time.perf_counter())
        tokens = batch["mask"].sum(), batch["length"].sum() * config.epochs
        generated, trained, work = policy.sum(*tokens, policy.flops - spent)
        step, flops = step + 1, flops + work
        yield {
            "step": step,
            "flops": flops,
            "progress": max(step / config.steps, flops / config.flops),
            "lr": factor * config.lr,
            **episode_metrics(policy, episodes, batch, config, environments[0].verdicts),
            **logged,
            "rollout_tokens_per_s": generated / (clock[1] - clock[0]),
            "update_tokens_per_s": trained / (clock[3] - clock[2]),
            "seconds": clock[3] - clock[0],
            "transcript": episodes[0].transcript(),
        }


# -------- from prompt to verdict


def rollout(
    policy: Policy, environments: Sequence, config: PPOConfig, step: int
) -> tuple[list[list[Stream]], list[envs.Episode]]:
    """Plays one episode in each of this rank's environments; returns each one's streams, and the episodes.
    Randomness is a function of (seed, step, rank): a resumed run continues as if never interrupted."""
    seeds = episode_seeds(policy, len(environments), config, step)
    generator = policy.generator(f"rollout/{config.seed}/{step}")
    with policy.responder(config.temperature, config.max_new_tokens, generator) as player:
        episodes = envs.play(environments, player, seeds, at_once=policy.rollout_batch)
    return [player.streams[i] for i in range(len(episodes))], episodes


def episode_seeds(policy: Policy, n: int, config: PPOConfig, step: int) -> list[str]:
    """Seeds of this rank's episodes."""
    return [f"train/{config.seed}/{step}/{policy.rank * n + i}" for i in range(n)]


class Player:
    """Answers environments in `envs.play` by sampling from a policy. `streams[i]` are environment i's: one,
    or one per waypoint on a walk with pictures. The settings are those of `Policy.sample`."""

    def __init__(self, policy: Policy, model: nn.Module, *settings):
        self.policy, self.model, self.settings = policy, model, settings
        self.streams: dict[int, list[Stream]] = {}
        self.images: dict[int, Image.Image | None] = {}  # of each environment's last stream
        self.caches: list[KeptCache] = []  # one per group of streams that began together

    def __call__(self, indices: list[int], observations: list[envs.Observation]) -> list[str | None]:
        """One reply each; None where a conversation has reached the model's maximum length. Raises
        ValueError if a first prompt does. Conversations that are not among `indices` are over."""
        policy, opened, ready = self.policy, [], []
        for i, observation in zip(indices, observations):
            streams, image = self.streams.setdefault(i, []), observation.image
            if streams and self.images[i] is image:
                # 1. Feedback joins the conversation, which ends if no room is left for a reply.
                stream, length = streams[-1], len(streams[-1])
                policy.extend(stream, observation.messages[-1]["content"])
                if len(stream) >= policy.max_length:
                    del stream.ids[length:], stream.mask[length:], stream.logp[length:]
                    continue
            else:
                # 2. Or a conversation begins, or continues with a new picture: a new stream.
                replies = [s.ids[start:stop] for s in streams for start, stop in s.replies]
                stream = policy.open(observation.messages, image, replies)
                if not streams:
                    policy.require_room(len(stream), "a prompt")
                elif len(stream) >= policy.max_length:
                    continue
                streams.append(stream)
                self.images[i] = image
                opened.append(i)
            ready.append(i)
        # 3. Replies are sampled.
        texts: dict[int, str] = {}
        for rows, cache in self._batches(ready, opened):
            batch = [self.streams[i][-1] for i in rows]
            drawn = policy.sample(self.model, batch, *self.settings, cache)
            for i, stream, (ids, logp) in zip(rows, batch, drawn):
                stream.reply(ids, logp)
                texts[i] = policy.decode(ids)
        return [texts.get(i) for i in indices]

    def _batches(self, ready: list[int], opened: list[int]) -> list[tuple[list[int], KeptCache | None]]:
        """Groups to sample together: conversations that began together, with their cache; without kept
        caches, those with equal room for a reply."""
        if not self.policy.keeps_caches:
            longest, reach = self.settings[0], self.policy.max_length
            room = {i: min(longest, reach - len(self.streams[i][-1])) for i in ready}
            return [([i for i in ready if room[i] == n], None) for n in sorted(set(room.values()))]
        for cache in self.caches:
            cache.keep([i for i in cache.rows if i in ready and i not in opened])
        self.caches.append(KeptCache(opened, self.policy.model.device))
        self.caches = [cache for cache in self.caches if cache.rows]
        return [(cache.rows, cache) for cache in self.caches]


# -------- from episode to batch


def collect(
    policy: Policy,
    streams: list[list[Stream]],
    episodes: list[envs.Episode],
    config: PPOConfig,
    answer_field: str,
    center_values: bool = False,
) -> Batch:
    """The batch of one update: tokens, masks, old log-probabilities, old values, advantages and returns.

    `actions` is 1 where there is a ratio: on sampled tokens, or on the first token of each reply. A reply's
    thought ends with the name of its field `answer_field`; without it, all is thought.

    `center_values`, in the first update, shifts the value head to the mean return. A new head is 0
    everywhere, and with lam < 1 an error common to all tokens does not cancel: k tokens before the end of a
    solved reply the advantage would be lam^k R, below the mean for early tokens, and suppress them.
    """
    # 1. Rows, and each episode's replies in them.
    rows, spans = arrange(policy, streams)
    batch = policy.collate(rows)
    batch["actions"] = batch["mask"]
    if config.ratio == "reply":
        batch["actions"], batch["weights"] = reply_weights(policy, rows, batch["mask"], answer_field, config)
        spans = [[(b, start, start + 1) for b, start, _ in replies] for replies in spans]  # of actions
    # 2. Old log-probabilities by the training forward pass: the first ratio is 1 in whatever precision the
    # tokens were sampled.
    scores = score(policy, batch, config)
    batch["old_logp"], values = action_logp(scores["logp"], batch), scores["value"]
    batch["sampler_gap"] = (batch.pop("sampled_logp") - scores["logp"]).abs()
    if config.kl_coef:
        with policy.initial_weights():
            batch["initial_logp"] = score(policy, batch, config)["logp"]
    # 3. Advantages and returns.
    rewards = [[turn.reward for turn in episode.turns] for episode in episodes]
    if center_values:  # with V = 0 and lam = 1, returns are discounted sums of rewards
        _, returns = advantages_of(rewards, torch.zeros_like(values), spans, config.gamma, 1.0)
        error, count = policy.sum(((returns - values) * batch["actions"]).sum(), batch["actions"].sum())
        policy.shift_value(error / count)
        values = values + error / count
    batch["old_values"] = values * batch["actions"]
    advantages, batch["returns"] = advantages_of(rewards, values, spans, config.gamma, config.lam)
    batch["advantages"] = whiten(policy, advantages, batch["actions"])
    if config.objective == "imitate":  # 1 on actions of correct replies, else 0
        right = [[float(turn.verdict == "correct") for turn in episode.turns] for episode in episodes]
        batch["advantages"], _ = advantages_of(right, torch.zeros_like(values), spans, 0.0, 1.0)
    return batch


def arrange(policy: Policy, streams: list[list[Stream]]) -> tuple[list[Stream], Spans]:
    """The rows of a batch, sorted by length so that microbatches need little padding, and each episode's
    replies in them. Ranks need equal numbers of rows: untrained copies of the shortest one fill up."""
    rows = sorted(chain(*streams), key=len)
    spare = replace(rows[0], mask=[0] * len(rows[0]), logp=[0.0] * len(rows[0]), replies=[])
    rows = [spare] * int(policy.largest(len(rows)) - len(rows)) + rows
    number = {id(stream): b for b, stream in enumerate(rows)}
    return rows, [[(number[id(s)], *reply) for s in episode for reply in s.replies] for episode in streams]


def reply_weights(
    policy: Policy, rows: list[Stream], mask: Tensor, answer_field: str, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """For the reply-level ratio, [B, T]: 1 on the first token of each reply, and the tokens' weights:
    `thought_coef` before the answer field, then 1."""
    starts, weights = torch.zeros_like(mask), torch.zeros_like(mask)
    for b, stream in enumerate(rows):
        for start, stop in stream.replies:
            answer = start + thought_length(policy, stream.ids[start:stop], answer_field)
            starts[b, start], weights[b, start:answer], weights[b, answer:stop] = 1, config.thought_coef, 1
    return starts, weights


def thought_length(policy: Policy, ids: list[int], answer_field: str) -> int:
    """Number of a reply's tokens before the one in which the answer field's name ends. Prefixes are decoded
    whole, since one letter may take several tokens."""
    return bisect_left(range(len(ids)), True, key=lambda k: answer_field in policy.decode(ids[: k + 1]))


@torch.no_grad()
def score(policy: Policy, batch: Batch, config: PPOConfig) -> dict[str, Tensor]:
    """Scores of a batch by microbatches, [B, T]: "logp" and "value", which both trunks give alike here."""
    out = {"logp": torch.zeros_like(batch["mask"]), "value": torch.zeros_like(batch["mask"])}
    for rows in torch.arange(len(batch["ids"]), device=batch["ids"].device).split(config.microbatch_size):
        scores = policy(rows_of(batch, rows), config.temperature, values="detached")
        for name, scored in scores.items():
            out[name][rows, : scored.shape[1]] = scored
    return out


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """The rows [n] of a batch, cut to the longest of them."""
    width, part = int(batch["length"][rows].max()), {}
    for name, values in batch.items():
        if name == "pictures":
            part[name] = [values[i] for i in rows.tolist()]
        else:
            part[name] = values[rows, :width] if values.dim() > 1 else values[rows]
    return part


def action_logp(logp: Tensor, batch: Batch) -> Tensor:
    """Log-probability of each action [B, T]: the token's, or the weighted sum over a reply, on its first
    token."""
    return per_reply(logp * batch["weights"], batch["actions"]) if "weights" in batch else logp


def per_reply(x: Tensor, starts: Tensor) -> Tensor:
    """Sums of x [B, T] over each reply, on its first token, where starts [B, T] is 1. x is 0 outside
    replies."""
    reply = starts.cumsum(1).long()  # 0 before the first reply, then 1, 2, ...
    sums = torch.zeros(len(x), int(reply.max()) + 1, dtype=x.dtype, device=x.device).scatter_add(1, reply, x)
    return sums.gather(1, reply) * starts


# -------- mathematics


def gae(
    rewards: Sequence[float], values: Sequence[Sequence[float]], gamma: float, lam: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Generalized advantage estimation for one episode (Schulman et al. 2016, equation 16).

    rewards[k] is the reward of reply k, values[k] the V before each of its tokens. From one sampled token to
    the next, t':

        delta_t = r_t + d V_t' - V_t,    A_t = delta_t + d lam A_t',    d = 1 inside a reply, else gamma

    So gamma acts once per turn, not per token, and the reward falls on a reply's last token. After the end of
    an episode V and A are 0. Returns advantages and returns A + V, shaped like `values`.
    """
    advantages: list[list[float]] = []
    next_value = next_advantage = 0.0
    for reward, reply_values in zip(reversed(rewards), reversed(values), strict=True):
        line, discount = [], gamma
        for value in reversed(reply_values):
            delta = reward + discount * next_value - value
            line.append(delta + discount * lam * next_advantage)
            next_value, next_advantage, reward, discount = value, line[-1], 0.0, 1.0
        advantages.append(line[::-1])
    advantages.reverse()
    return advantages, [[a + v for a, v in zip(*pair)] for pair in zip(advantages, values)]


def advantages_of(
    rewards: list[list[float]], values: Tensor, spans: Spans, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae` of all episodes: advantages and returns, [B, T] like `values`, 0 where there is no action."""
    before, advantages, returns = values.tolist(), torch.zeros(values.shape), torch.zeros(values.shape)
    for reward, replies in zip(rewards, spans):
        lines = gae(reward, [before[b][start:stop] for b, start, stop in replies], gamma, lam)
        for (b, start, stop), a, r in zip(replies, *lines):
            advantages[b, start:stop], returns[b, start:stop] = torch.tensor(a), torch.tensor(r)
    # Where values equal returns, rounding errors are no advantage: whitening would make them large.
    advantages[advantages.abs() < ROUNDING * returns.abs()] = 0
    return advantages.to(values.device), returns.to(values.device)


ROUNDING = 1e-5  # relative rounding error of fp32 sums


def whiten(policy: Policy, x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T] with mean 0 and standard deviation 1 over the mask of all ranks, else 0."""
    exact = x.double()  # in fp32 a small variance would be rounding error
    total, first, second = policy.sum(mask.sum(), (exact * mask).sum(), (exact**2 * mask).sum())
    mean = first / total
    variance = max(second / total - mean * mean, 0.0)
    return (x - mean) / (variance**0.5 + 1e-8) * mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is 1, or 0 without any; both [B, T]."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), at most e^20: fp32 overflows beyond e^88. The gradient is kept, so that a ratio can
    still shrink."""
    return torch.exp(log_ratio - (log_ratio - 20).clamp(min=0).detach())


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Clipped surrogate loss, a scalar (Schulman et al. 2017, equation 7); tensors [B, T]:

    -mean over the mask of min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A), ratio = exp(logp - old_logp)
    """
    ratio = bounded_exp(logp - old_logp)
    return -masked_mean(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Clipped value loss, a scalar: 1/2 mean over the mask of max((V - R)^2, (V_clipped - R)^2), all [B, T].
    V_clipped stays within `clip` of the rollout's value, so that one batch cannot move the critic far."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def kl_estimate(logp: Tensor, other_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(p || q) in nats, from samples of p: q/p - 1 - log(q/p) >= 0 (Schulman 2020,
    "Approximating KL divergence"). logp of p, other_logp of q, of any shape."""
    log_ratio = other_logp - logp
    return bounded_exp(log_ratio) - 1 - log_ratio


def losses(
    scores: dict[str, Tensor],
    part: Batch,
    config: PPOConfig,
    n_actions: float,
    n_tokens: float,
    warming: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one microbatch and what is logged, by name: its shares of means over the global minibatch's
    n_actions and n_tokens. `warming`: the value loss alone."""
    logp, act = action_logp(scores["logp"], part), part["actions"]
    share = act.sum() / n_actions  # of this microbatch's mean in the global one
    if config.objective == "ppo":
        pg = policy_loss(logp, part["old_logp"], part["advantages"], act, config.clip) * share
    else:
        pg = -masked_mean(logp * part["advantages"], act) * share
    vf = value_loss(scores["value"], part["old_values"], part["returns"], act, config.value_clip) * share
    entropy = scores["entropy"].sum() / n_tokens
    loss = pg - config.entropy_coef * entropy
    logged = {"policy_loss": pg, "value_loss": vf, "entropy": entropy}
    if config.kl_coef:
        now, initial = scores["logp"], part["initial_logp"]
        # Half the squared log-ratio has the gradient of KL(policy || initial); k3 that of the reverse.
        loss = loss + config.kl_coef * 0.5 * (((now - initial) ** 2).sum() / n_tokens)
        logged["kl_to_init"] = kl_estimate(now, initial).sum() / n_tokens
    ratio = bounded_exp(logp - part["old_logp"])
    logged["approx_kl"] = masked_mean(kl_estimate(part["old_logp"], logp), act) * share
    logged["clip_fraction"] = masked_mean(((ratio - 1).abs() > config.clip).float(), act) * share
    logged["largest_ratio"] = (ratio * act).max()
    logged["ratio_error"] = ((ratio - 1).abs() * act).max()
    return config.value_coef * vf + (0 if warming else loss), {name: x.detach() for name, x in logged.items()}


# -------- from batch to weights


def update(
    policy: Policy, optimizers: Optimizers, batch: Batch, config: PPOConfig, step: int
) -> dict[str, float]:
    """Epochs of minibatches over one batch, one optimizer step each; returns means of metrics, of ratios the
    largest.

    Policy and value loss are normalised by the global minibatch's actions, entropy and KL by its tokens. A
    minibatch has `minibatch_size / episodes` of the rows. Raises FloatingPointError on a non-finite loss or
    gradient.
    """
    sums: Counter[str] = Counter()
    largest, first_error, norms = 1.0, 0.0, []
    warming = step < config.value_warmup
    trunk = "detached" if warming else config.value_trunk
    shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    size = math.ceil(len(batch["ids"]) * config.minibatch_size / config.episodes)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(batch["ids"]), generator=shuffle).split(size):
            rows = rows.sort().values.to(batch["ids"].device)  # by length: least padding
            counts = policy.sum(batch["actions"][rows].sum(), batch["mask"][rows].sum())
            microbatches, minibatch_loss = rows.split(config.microbatch_size), 0.0
            for micro in microbatches:
                part = rows_of(batch, micro)
                scores = policy(part, config.temperature, values=trunk, entropy=True)
                loss, logged = losses(scores, part, config, *counts, warming)
                policy.backward(loss, last=micro is microbatches[-1])
                minibatch_loss += loss.item()
                largest = max(largest, logged.pop("largest_ratio").item())
                error = logged.pop("ratio_error").item()
                if not norms:  # before the first optimizer step
                    first_error = max(first_error, error)
                sums.update({name: x.item() for name, x in logged.items()})
            norms.append(policy.step(optimizers, config.max_grad_norm, policy.sum(minibatch_loss)[0]))
    totals = zip(sums, policy.sum(*sums.values()))
    return {name: total / len(norms) for name, total in totals} | {
        "grad_norm": sum(norms) / len(norms),
        "largest_ratio": policy.largest(largest),
        "first_ratio_error": policy.largest(first_error),
    }


def episode_metrics(
    policy: Policy, episodes: list[envs.Episode], batch: Batch, config: PPOConfig, verdicts: Sequence[str]
) -> dict[str, float]:
    """Metrics of the rollouts of all ranks: return, success, shares of the task's `verdicts`, lengths, and
    how much of the return's variance the critic explains."""
    turns = [turn for episode in episodes for turn in episode.turns]
    n, replies, tokens, act = len(episodes), len(turns), batch["mask"].sum(), batch["actions"]
    rewards = {v: [turn.reward for turn in turns if turn.verdict == v] for v in verdicts}
    means = {  # (sum, divisor)
        "return": (sum(t.reward * config.gamma**k for e in episodes for k, t in enumerate(e.turns)), n),
        "success": (sum(e.success for e in episodes), n),
        "first_success": (sum(e.success and e.most_tries() == 1 for e in episodes), n),
        "turns": (replies, n),
        "reply_length": (tokens, replies),
        "sampler_gap": (batch["sampler_gap"].sum(), tokens),
        **{f"share/{v}": (len(given), replies) for v, given in rewards.items()},
        **{f"reward/{v}": (sum(given), n) for v, given in rewards.items()},
    }
    returns = batch["returns"].double()
    for name, x in (("R", returns), ("error", returns - batch["old_values"])):
        means |= {name: ((x * act).sum(), act.sum()), f"{name}^2": ((x**2 * act).sum(), act.sum())}
    sums = policy.sum(*chain(*means.values()))
    mean = {name: total / count for name, total, count in zip(means, sums[::2], sums[1::2])}
    noise = ROUNDING**2 * mean["R^2"]
    variance, unexplained = (mean.pop(f"{x}^2") - mean.pop(x) ** 2 for x in ("R", "error"))
    return mean | {"explained_variance": 1 - unexplained / variance if variance > noise else 0.0}


# -------- the policy: tokens, scores, samples


# Some templates write today's date: always this one, or prompts would change from day to day.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


class Policy(nn.Module):
    """A chat model with a value head.

    Args:
        model: a Hugging Face causal language or vision-language model.
        processor: its processor or tokenizer, with a chat template.
        rollout_dtype: dtype of the weights for sampling; by default bf16 where the device is fast in it, else
            the model's.
        rollout_batch: episodes played together.

    Raises ValueError for an output head, chat template or tokenizer that cannot be used.

    `flops` counts this process's compute: 6 N per trained token, 2 N per sampled or scored one, N the
    parameters of `model`. Padding is free, a token counts once however often later turns read it, a picture
    counts as its image tokens. `Policy` in sftrl.py adds loading, saving and sharding.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        processor: Any,
        rollout_dtype: torch.dtype | None = None,
        rollout_batch: int = 256,
    ):
        super().__init__()
        self.model, self.processor = model, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if (head := model.get_output_embeddings()) is None:
            raise ValueError(f"{type(model).__name__} has no output head")
        width = head.in_features
        # For the paper's width of 4096, hidden layers of 1024 and 512. Values start at 0.
        m, n = max(64, width // 4), max(64, width // 8)
        layers = [nn.Linear(width, m), nn.ReLU(), nn.Linear(m, n), nn.ReLU(), nn.Linear(n, 1)]
        self.value_head = nn.Sequential(*layers).float()
        nn.init.zeros_(self.value_head[-1].weight)
        nn.init.zeros_(self.value_head[-1].bias)
        self.rollout_dtype = rollout_dtype or (torch.bfloat16 if fast_bfloat16(model.device) else model.dtype)
        self.rollout_batch, self._rollout_copy = rollout_batch, None
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.parameter_count, self.flops = sum(p.numel() for p in model.parameters()), 0.0
        index = getattr(model.config, "image_token_index", None)
        self.image_id = getattr(model.config, "image_token_id", index)
        # Never sampled: ids without text, and the image token.
        known = set(self.tokenizer.get_vocab().values()) - {self.image_id}
        never = torch.tensor([k for k in range(head.out_features) if k not in known], dtype=torch.long)
        self.register_buffer("never_drawn", never, persistent=False)
        self._ask_template()
        self.pad_id = self.end_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.max_length = longest_conversation(model.config.get_text_config())
        self.keeps_caches = can_keep_caches(model.config.get_text_config())
        new = "cache" in inspect.signature(model.forward).parameters  # depends on transformers' version
        self._cache_argument = "cache" if new else "past_key_values"
        self.eval()  # no dropout: the first ratio must be 1

    # ---- text and tokens

    def render(self, messages: list[dict]) -> str:
        """The conversation up to its next reply as text, by the chat template."""
        if self._content_as_parts:  # some templates read nothing else
            messages = [dict(m) for m in messages]
            for m in messages:
                if isinstance(m["content"], str):
                    m["content"] = [{"type": "text", "text": m["content"]}]
        options = {"add_generation_prompt": True, "tokenize": False}
        try:
            return self._template.apply_chat_template(messages, chat_template=self._template_text, **options)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"its chat template cannot be used: {error}") from None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, without the special tokens that a tokenizer may add."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """A reply's text up to its first stop token, special tokens included but for the end."""
        ids = ids[: self._reply_length(ids)]
        ids = ids[:-1] if ids and ids[-1] in self.end_ids else ids
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.removesuffix(self.end_blank)

    def _reply_length(self, ids: Sequence[int]) -> int:
        """Number of tokens through the first stop token, or of all."""
        return next((n for n, token in enumerate(ids, 1) if token in self.stop_ids), len(ids))

    _MARK = "\u2063REPLY\u2063"

    def _ask_template(self) -> None:
        """Finds out what the chat template writes around a reply, for example

            <|im_start|>user\\n QUESTION <|im_end|>\\n<|im_start|>assistant\\n REPLY
            <|im_end|>\\n<|im_start|>user\\n

        `opening`: the text before a reply; `reply_start`: what some templates add, a blank or a channel;
        `end_id`: the first special or added token after a reply (in some templates the next role's), or eos;
        `end_blank`: whitespace before it; `end_ids`: all tokens that end a turn; `stop_ids`: those and the
        ones that begin a user turn; `bos`: what the tokenizer puts before a text."""
        templates = [x for x in (self.processor, self.tokenizer) if getattr(x, "chat_template", None)]
        if not templates:
            raise ValueError("no chat template: take a chat model, or add chat_template.jinja to its folder")
        self._template, text = templates[0], templates[0].chat_template
        self._template_text = FIXED_DATE + (text["default"] if isinstance(text, dict) else text)
        start = self.tokenizer("x")["input_ids"][:1]
        self.bos = start if start == [self.tokenizer.bos_token_id] else []
        user, reply = ({"role": role, "content": self._MARK} for role in ("user", "assistant"))
        self._content_as_parts = False
        try:
            self._content_as_parts = self._MARK not in self.render([user])
        except ValueError:
            self._content_as_parts = True
        self.opening = self.render([user]).split(self._MARK)[-1]
        parts = self.render([user, reply, user]).split(self._MARK)
        if len(parts) != 4:
            raise ValueError("its chat template leaves out replies, or what follows them")
        whole = parts[1].startswith(self.opening)  # some open a thought that later turns leave out
        self.reply_start = parts[1].removeprefix(self.opening) if whole else ""
        added = {k: t.content for k, t in self.tokenizer.added_tokens_decoder.items() if t.content.strip()}
        inside, after = self._continue([self.reply_start, parts[2]])
        marks = [token for token in after if token in added]
        blank = parts[2].partition(added[marks[0]])[0] if marks else "none"
        closing, self.end_blank = (marks[:1], blank) if not blank.strip() else ([], "")
        named = getattr(self.model.generation_config, "eos_token_id", None)
        named = [self.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
        ends = closing + [token for token in named if token is not None]
        if not ends:
            raise ValueError("no eos token, and its chat template ends replies with no token")
        self.end_id, self.end_ids = ends[0], set(ends)
        self.stop_ids = self.end_ids | (set(marks) - set(inside))

    def _continue(self, texts: list[str], before: str = "x") -> list[list[int]]:
        """Tokens of texts that follow the text `before`: some tokenizers start a text with a blank."""
        start, *whole = self.tokenize([before, *(before + text for text in texts)])
        n = len(start)
        return [ids[n:] if ids[:n] == start else self.tokenize([t])[0] for ids, t in zip(whole, texts)]

    def extend(self, stream: Stream, feedback: str) -> None:
        """Appends the verifier's message, first closing a reply that was cut off. Sampled tokens are never
        tokenized again."""
        turns = (("user", "x"), ("assistant", ""), ("user", feedback))
        messages = [{"role": role, "content": content} for role, content in turns]
        self._go_on(stream, *self._continue(self._around_replies(messages, 1)[-1:]))

    def _go_on(self, stream: Stream, ids: list[int]) -> None:
        """Appends what the template writes after a reply, `ids`, minus an end token already sampled."""
        closed = stream.ids[-1] == self.end_id and self.end_id in ids
        stream.context(ids[ids.index(self.end_id) + 1 :] if closed else ids)

    def open(
        self, messages: list[dict], image: Image.Image | None = None, replies: Sequence[list[int]] = ()
    ) -> Stream:
        """A conversation up to its next reply; the picture belongs to the last message.

        `replies` are the tokens of the last replies, joined as they are: text that a model wrote never turns
        into special tokens. Raises ValueError if the model reads no pictures or the template drops them.
        """
        texts, stream = self._around_replies(messages, len(replies)), Stream()
        prompts = [*self.tokenize(texts[:1]), *self._continue(texts[1:])]
        if image is not None:
            prompts[-1] = self._show(stream, texts[-1], image, follows=len(texts) > 1)
        stream.context(prompts[0] if prompts[0][:1] == self.bos else self.bos + prompts[0])
        for reply, ids in zip(replies, prompts[1:], strict=True):
            stream.context(reply)
            self._go_on(stream, ids)
        for name, x in stream.columns.items():  # 0 before the last message
            stream.columns[name] = torch.cat([x.new_zeros(len(stream) - len(x), *x.shape[1:]), x])
        return stream

    def _around_replies(self, messages: list[dict], n: int) -> list[str]:
        """The template's text before the last n replies, between them, and after the last."""
        written = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        marked = written[len(written) - n :]
        messages = [m | {"content": self._MARK} if k in marked else m for k, m in enumerate(messages)]
        return self.render(messages).split(self._MARK)

    def _show(self, stream: Stream, text: str, image: Image.Image, follows: bool) -> list[int]:
        """Gives a stream its picture; returns the tokens of the `text` with it. `follows`: after a reply."""
        if self.processor is self.tokenizer:
            name = type(self.model).__name__
            raise ValueError(f"{name} reads no pictures: choose a vision-language model, or a text task")
        # After a reply, tokenized as in `_continue`; with BOS, or Mllama's processor would add one.
        before = f"{self.tokenizer.bos_token or ''}x" * follows
        made = self.processor(
            text=[before + text], images=[[image]], add_special_tokens=False, return_tensors="pt"
        )
        cut = len(self.tokenize([before])[0])
        ids = made.pop("input_ids")
        made.pop("attention_mask", None)
        beside = {key: x for key, x in made.items() if x.shape[:2] == ids.shape}
        stream.picture = {key: x for key, x in made.items() if key not in beside}
        stream.columns = {key: x[0, cut:] for key, x in beside.items()}
        if self.image_id not in ids:
            raise ValueError("the chat template leaves out the image token")
        return ids[0, cut:].tolist()

    def streams(self, records: list[dict], loss_on: str = "all") -> list[Stream]:
        """Demonstrations in the released format as streams; "image" is a picture or a path. `loss_on`: "all"
        replies or the "last". Raises ValueError for pictures without image tokens and the reverse, if only
        some have pictures, and beyond the model's maximum length."""
        streams = [self._demonstration(record, loss_on) for record in records]
        n, lacking = len(streams), sum(stream.picture is None for stream in streams)
        if 0 < lacking < n:
            fault = f"{lacking} of {n} conversations of a batch have no picture"
            raise ValueError(f"{fault}: give all one, or none")
        return streams

    def _demonstration(self, record: dict, loss_on: str) -> Stream:
        """One demonstration. Replies before the message with "<image>", to other pictures, are context."""
        turns, image, first = record["conversations"], record.get("image"), 0
        if isinstance(image, str):
            image = envs.read_picture(image)
        if image:
            first = next((k for k, t in enumerate(turns) if k % 2 == 0 and "<image>" in t["value"]), 0)
        roles = {"human": "user", "gpt": "assistant"}
        messages = [{"role": roles[t["from"]], "content": t["value"]} for t in turns[: first + 1]]
        if image:
            messages[-1]["content"] = envs.parts_of(turns[first]["value"])
        texts = [self.reply_start + turn["value"] + self.end_blank for turn in turns[1::2]]
        replies = [ids + [self.end_id] for ids in self._continue(texts, self.opening)]
        stream = self.open(messages, image, replies[: first // 2])
        for k in range(first // 2, len(replies)):
            if 2 * k > first:
                self.extend(stream, turns[2 * k]["value"])
            if loss_on == "last":
                stream.mask = [0] * len(stream)
            stream.reply(replies[k])
        images = [t for t, token in enumerate(stream.ids) if token == self.image_id]
        if images and (stream.picture is None or images[-1] >= stream.replies[0][0]):
            raise ValueError("an image token without a picture, or after a demonstration's first message")
        self.require_room(len(stream), "a demonstration", least=0)
        return stream

    def require_room(self, length: int, what: str, least: int = 1) -> None:
        """Raises ValueError if positions do not reach `least` tokens beyond `length`."""
        if length + least > self.max_length:
            reach = f"positions of {type(self.model).__name__} reach no farther than {self.max_length}"
            raise ValueError(f"{what} has {length} tokens, but the {reach}")

    def check_lengths(self, batches: Iterable[list[dict]], flops: float = math.inf) -> None:
        """Raises ValueError for demonstrations that `streams` refuses, among those that `flops` could train;
        if length is no limit, in one batch."""
        for records in batches:
            flops -= 6 * self.parameter_count * sum(map(len, self.streams(records)))
            if math.isinf(self.max_length) or flops < 0:
                break

    def collate(self, streams: Sequence[Stream]) -> Batch:
        """ids, mask, sampled_logp [B, T], length [B] and, in visual tasks, pictures: the B streams."""
        device = self.model.device
        batch = {
            "ids": pad_rows([s.ids for s in streams], self.pad_id, device),
            "mask": pad_rows([s.mask for s in streams], 0, device).float(),
            "sampled_logp": pad_rows([s.logp for s in streams], 0.0, device),
            "length": torch.tensor([len(s) for s in streams], device=device),
        }
        return batch | {"pictures": list(streams)} if streams[0].picture else batch

    # ---- scores

    def forward(
        self, batch: Batch, temperature: float = 1.0, values: str | None = None, entropy: bool = False
    ) -> dict[str, Tensor]:
        """Teacher-forced scores of the tokens where `mask` is 1: [B, T] in fp32, 0 elsewhere.

        logp[b, t]: log-probability of ids[b, t] given ids[b, :t], at `temperature`. value[b, t]: V(s_t), read
        on the token before; the trunk is "detached" or "shared" as `values` says, None omits it.
        entropy[b, t]: of the distribution of token t."""
        ids, mask = batch["ids"], batch["mask"].bool()
        # No token sees padding on its right: text alone needs no padding mask.
        inputs: dict[str, Tensor] = {}
        if "pictures" in batch:
            real = torch.arange(ids.shape[1]) < batch["length"].cpu()[:, None]
            inputs = self._beside(self.model, batch["pictures"], real)
        mixed = ids.is_cuda and self.model.dtype == torch.float32 and not self.sharded
        autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed)
        with autocast, self._only_before(mask) as states:
            logits = self.model(input_ids=ids, use_cache=False, **inputs).logits
        if len(states) != 1:
            raise ValueError(f"its output head is called {len(states)} times in a pass, not once")
        per_parameter = 6 if torch.is_grad_enabled() else 2
        self.flops += per_parameter * self.parameter_count * int(batch["length"].sum())
        hidden = states[0][0]  # [n, H]
        logps = self.log_probabilities(logits[0], temperature)
        chosen = logps.gather(-1, ids[mask][:, None])[:, 0]

        def scatter(flat: Tensor) -> Tensor:
            return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, flat)

        out = {"logp": scatter(chosen)}
        if values:
            trunk = hidden.detach() if values == "detached" else hidden
            out["value"] = scatter(self.value_head(trunk.float())[:, 0])
        if entropy:
            out["entropy"] = scatter(-(logps.exp() * logps).sum(-1))
        return out

    sharded = False  # over processes, in sftrl.py

    @contextmanager
    def _only_before(self, mask: Tensor) -> Iterator[list[Tensor]]:
        """The model's output head gets only the states before the tokens where mask [B, T] is true, as
        [1, n, H], and runs outside autocast. The list collects these states."""
        states: list[Tensor] = []
        exact = torch.autocast(mask.device.type, enabled=False)

        def choose(head: nn.Module, given: tuple) -> tuple:
            states.append(given[0][:, :-1][mask[:, 1:]][None])
            exact.__enter__()
            return states[-1], *given[1:]

        def end(head: nn.Module, given: tuple, logits: Tensor) -> None:
            exact.__exit__(None, None, None)

        head = self.model.get_output_embeddings()
        with head.register_forward_pre_hook(choose), head.register_forward_hook(end):
            yield states

    def log_probabilities(self, logits: Tensor, temperature: float) -> Tensor:
        """Log-probabilities in fp32 from the model's logits [n, vocabulary]."""
        logits = logits.float() / temperature
        return logits.index_fill(-1, self.never_drawn.to(logits.device), -1e9).log_softmax(-1)

    def _beside(self, model: nn.Module, streams: Sequence[Stream], real: Tensor) -> dict[str, Tensor]:
        """Inputs of streams with pictures, beside the ids. real [B, T], on the CPU: not padding."""
        inputs = {"attention_mask": real.long()}
        for name in streams[0].picture or ():
            inputs[name] = stack([s.picture[name] for s in streams])
        for name, x in streams[0].columns.items():  # later tokens repeat the last column
            inputs[name] = x.new_zeros(*real.shape, *x.shape[1:])
            for row, where, s in zip(inputs[name], real, streams):
                last = len(s.columns[name]) - 1
                row[where] = s.columns[name][torch.arange(int(where.sum())).clamp(max=last)]
        cast = {False: None, True: model.dtype}
        return {k: x.to(model.device, cast[x.is_floating_point()]) for k, x in inputs.items()}

    @torch.no_grad()
    def plain_logp(self, messages: list[dict], image: Image.Image | None) -> Tensor:
        """Log-probabilities [vocabulary] of a reply's first token, by a plain call of the model on its
        processor's (or tokenizer's) output."""
        text, options = self.render(messages), {"add_special_tokens": False, "return_tensors": "pt"}
        if self.bos and not text.startswith(self.tokenizer.bos_token):
            text = self.tokenizer.bos_token + text
        reader, pictures = (self.tokenizer, {}) if image is None else (self.processor, {"images": [[image]]})
        made = reader(text=[text], **pictures, **options)
        inputs = {name: x.to(self.model.device) for name, x in made.items()}
        return self.log_probabilities(self.model(**inputs, use_cache=False).logits[:, -1], 1.0)[0].cpu()

    # ---- sampling

    @contextmanager
    def rollout_weights(self) -> Iterator[nn.Module]:
        """The model to sample from, in `rollout_dtype`."""
        if self.rollout_dtype == self.model.dtype:
            yield self.model
            return
        if self._rollout_copy is None:  # not registered: no part of the policy's state
            object.__setattr__(self, "_rollout_copy", copy.deepcopy(self.model))
            for p in self._rollout_copy.parameters():
                p.data = p.data.to(self.rollout_dtype)  # buffers such as RoPE frequencies stay in fp32
        for copied, p in zip(self._rollout_copy.parameters(), self.model.parameters()):
            copied.data.copy_(p.data)
        yield self._rollout_copy

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        streams: Sequence[Stream],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
        cache: KeptCache | None = None,
    ) -> list[tuple[list[int], list[float]]]:
        """Samples one reply per conversation: its tokens, the end token if it was drawn, and their
        log-probabilities. `model` comes from `rollout_weights()`. Temperature 0 is greedy. No top-k, top-p or
        generation config applies. Tokens in the `cache` are not read again."""
        # 1. Unread tokens become one block, padded on the left.
        read = [0] * len(streams) if cache is None else cache.mask.sum(1).tolist()
        unread = [s.ids[n:] for s, n in zip(streams, read)]
        ids = pad_rows(unread, self.pad_id, model.device, left=True)
        mask = pad_rows([[1] * len(row) for row in unread], 0, model.device, left=True)
        first = streams[0].picture and not read[0]  # the block has the pictures
        inputs = self._beside(model, streams, mask.bool().cpu()) if first else {}
        if cache is not None:
            mask, inputs[self._cache_argument] = torch.cat([cache.mask, mask], 1), cache
        # 2. `generate` decodes with these settings alone, on each rank by itself: replies differ in length.
        longest = int(min(max_new_tokens, self.max_length - max(map(len, streams))))
        settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=longest)
        settings.eos_token_id, settings.pad_token_id = sorted(self.stop_ids), self.pad_id
        sampler, theirs = Sampler(self, temperature, generator), model.generation_config
        model.generation_config = transformers.GenerationConfig()
        try:
            processors, inputs["attention_mask"] = transformers.LogitsProcessorList([sampler]), mask
            out = model.generate(ids, settings, processors, synced_gpus=False, **inputs)[:, ids.shape[1] :]
        finally:
            model.generation_config = theirs
        # 3. A reply ends with its first stop token; padding follows.
        rows, logps = out.tolist(), torch.cat(sampler.logps, 1).tolist()
        lengths = [self._reply_length(row) for row in rows]
        if cache is not None:  # the tokens of all steps but the last are in it
            drawn = torch.arange(out.shape[1] - 1) < torch.tensor(lengths)[:, None]
            cache.mask = torch.cat([mask, drawn.to(mask)], 1)
        new = sum(len(s) - (s.replies[-1][1] if s.replies else 0) for s in streams)
        self.flops += 2 * self.parameter_count * (new + sum(lengths))
        return [(row[:n], logp[:n]) for row, logp, n in zip(rows, logps, lengths)]

    @contextmanager
    def responder(
        self, temperature: float, max_new_tokens: int, generator: torch.Generator
    ) -> Iterator[Player]:
        """A player for `envs.play`; its `streams` remain afterwards."""
        with self.rollout_weights() as model:
            player = Player(self, model, max_new_tokens, temperature, generator)
            yield player
        player.caches.clear()  # frees memory

    def generator(self, seed: str) -> torch.Generator:
        """A random generator for this `seed` and rank."""
        return torch.Generator("cpu").manual_seed(random.Random(f"{seed}/rank{self.rank}").getrandbits(63))

    # ---- training

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds the gradient of a loss that is a sum over ranks and microbatches; `last` marks the last one.
        (sftrl.py sums over ranks.)"""
        loss.backward()

    def step(self, optimizers: Optimizers, max_grad_norm: float, loss: float) -> float:
        """Clips by the global norm, steps, clears gradients; returns the norm before clipping. Raises
        FloatingPointError, weights unchanged, if it or the `loss` of all ranks is not finite."""
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise FloatingPointError(f"non-finite loss {loss} or gradient norm {norm}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    @staticmethod
    def set_lr(optimizers: Optimizers, progress: float, warmup: float) -> float:
        """Sets rates at `progress` in [0, 1): linear warm-up from a tenth, then cosine to 0; returns the
        factor."""
        if progress < warmup:
            factor = 0.1 + 0.9 * progress / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
        return factor

    @torch.no_grad()
    def shift_value(self, amount: float) -> None:
        """Adds a constant to all values."""
        self.reshard()
        self.value_head[-1].bias.add_(amount)

    def reshard(self) -> None:
        """Frees weights gathered from other ranks; before weights are changed by hand."""

    def keep_initial_weights(self) -> None:
        """Copies the current weights (this rank's shards)."""
        self.reshard()
        self._initial = [p.detach().clone() for p in self.model.parameters()]

    @contextmanager
    def initial_weights(self) -> Iterator[None]:
        """Swaps in the weights of `keep_initial_weights`."""
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        self.reshard()
        for p, kept in zip(self.model.parameters(), self._initial):
            current = p.clone()
            p.copy_(kept)
            kept.copy_(current)

    # ---- over all ranks

    def sum(self, *numbers: float) -> list[float]:
        """Sums over all ranks."""
        if self.world == 1:
            return [float(n) for n in numbers]
        total = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=self.model.device)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, number: float) -> float:
        """The largest over all ranks."""
        return max(self.gather([number]))

    def gather(self, items: list) -> list:
        """All ranks' items, in the order of ranks."""
        if self.world == 1:
            return items
        lists: list = [None] * self.world
        dist.all_gather_object(lists, items)
        return list(chain(*lists))


def pad_rows(
    rows: Sequence[Sequence[float]], fill: float, device: torch.device, left: bool = False
) -> Tensor:
    """Rows of different length as one tensor [B, T]."""
    width = max(map(len, rows))
    gaps = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([gap + [*row] if left else [*row] + gap for row, gap in zip(rows, gaps)]).to(device)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined along dimension 0, padded with 0 in the others, as processors pad pictures."""
    shape = [max(sizes) for sizes in zip(*(x.shape for x in parts))]
    gaps = [[(0, whole - n) for whole, n in zip(shape[1:], x.shape[1:])] for x in parts]
    return torch.cat([nn.functional.pad(x, sum(reversed(gap), ())) for x, gap in zip(parts, gaps)])


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices natively; other CPUs are slower than in fp32."""
    return device.type == "cuda" or bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


def longest_conversation(config: transformers.PretrainedConfig) -> float:
    """The longest conversation, in tokens: infinite with rotary embeddings (RoPE), unless their frequencies
    change beyond some length."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and "rope_type" in kind]
    changing = [kind for kind in kinds if kind["rope_type"] in ("dynamic", "longrope")]
    reach = getattr(config, "max_position_embeddings", None) or math.inf
    reaches = [reach, *(kind.get("original_max_position_embeddings") or reach for kind in changing)]
    return min(reaches) if changing or not kinds else math.inf


def can_keep_caches(config: transformers.PretrainedConfig) -> bool:
    """Whether masked columns may stand between keys: full attention in all layers, and positions, one number
    each, rotated into the keys."""
    rope = getattr(config, "rope_parameters", None) or {}
    settings = config.to_dict()
    odd = "mrope_section" in rope or settings.get("cross_attention_layers") or settings.get("alibi")
    full = all(type(layer) is DynamicLayer for layer in transformers.DynamicCache(config=config).layers)
    return bool(rope) and not odd and full and math.isinf(longest_conversation(config))


# -------- given to `generate`


class Sampler(transformers.LogitsProcessor):
    """Draws tokens for `generate`, leaving it one choice, and keeps their log-probabilities: the library's
    temperature, filters and global random state play no part."""

    def __init__(self, policy: Policy, temperature: float, generator: torch.Generator):
        self.policy, self.temperature, self.generator = policy, temperature, generator
        self.logps: list[Tensor] = []  # [B, 1] of each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = self.policy.log_probabilities(scores, self.temperature or 1.0)
        ids = draw(logp, self.generator) if self.temperature else logp.argmax(-1, keepdim=True)
        self.logps.append(logp.gather(-1, ids))
        return torch.full_like(logp, -math.inf).scatter(-1, ids, 0.0)


def draw(logp: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row [B, 1] of log-probabilities [B, vocabulary], by inverse transform sampling in double
    precision."""
    mass = logp.double().exp().cumsum(-1)
    point = torch.rand(len(logp), 1, generator=generator, dtype=torch.double)
    ids = torch.searchsorted(mass, point.to(logp.device) * mass[:, -1:], right=True)
    return ids.clamp(max=logp.shape[-1] - 1)


class GrowingLayer(DynamicLayer):
    """One layer of a key-value cache, with room for more columns. DynamicLayer copies all keys and values
    for every token: in long conversations a third of the decoding time."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, heads, n, d], returns all so far."""
        new, start = (key_states, value_states), self.get_seq_length()
        stop = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.whole = [x[:, :, :0] for x in new]
        if stop > self.whole[0].shape[-2]:
            more = (0, 0, 0, stop + stop // 2 - self.whole[0].shape[-2])
            self.whole = [nn.functional.pad(x, more) for x in self.whole]
        for whole, x in zip(self.whole, new):
            whole[:, :, start:stop] = x
        self.keys, self.values = (whole[:, :, :stop] for whole in self.whole)
        return self.keys, self.values

    def pick(self, rows: Tensor, columns: Tensor) -> None:
        """Keeps only these rows [n] of the batch and their columns [n, k]."""
        n, k = columns.shape
        for x in self.whole:
            x[:n, :, :k] = x[rows[:, None], :, columns].transpose(1, 2)
        self.whole = [x[:n] for x in self.whole]
        self.keys, self.values = (x[:, :, :k] for x in self.whole)


class KeptCache(transformers.Cache):
    """Keys and values of conversations that began together, kept from turn to turn: in row b the first tokens
    of conversation `rows[b]`, where mask [B, columns] is 1, else padding."""

    def __init__(self, rows: list[int], device: torch.device):
        super().__init__(layer_class_to_replicate=GrowingLayer)
        self.rows, self.mask = rows, torch.zeros(len(rows), 0, dtype=torch.long, device=device)

    def keep(self, rows: list[int]) -> None:
        """Keeps some conversations, and drops padding: rotated keys may change columns."""
        at = torch.tensor([self.rows.index(i) for i in rows], dtype=torch.long, device=self.mask.device)
        self.rows, mask = rows, self.mask[at]
        if rows:
            columns = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
            self.mask = mask.gather(1, columns)
            for layer in self.layers:
                layer.pick(at, columns)
