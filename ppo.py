"""PPO for a language model in a conversation with a verifier, to be read from top to bottom.

One update (`train`):

    rollout   N episodes are played: `Player` lets the policy sample replies (`Policy.sample`), the verifier
              judges them (`envs.play`) and its words join the prompt (`Policy.extend`)
    collect   log-probabilities and values of the sampled tokens by the training forward (`Policy.forward`),
              then advantages and returns, one episode at a time (`gae`)
    update    epochs of minibatches: `losses`, backward, one optimizer step for each

The file follows that order. Then come the policy in detail (text and tokens, scores, sampling), how families
of models take pictures, and the key-value caches.

Words used here: a *reply* is a run of tokens that the policy sampled, up to its end token. A *stream* is one
conversation in tokens. An *episode* is what an environment plays: one stream, or on a walk with pictures
one for each place. A *row* is a stream in a batch. An *action* has one ratio, value and advantage: a token
(`ratio="token"`, the default) or, as in the paper, a whole reply (`ratio="reply"`).

Batches are tensors [B, T]: B rows, T tokens of the longest one, padded on the right. `mask` is 1 where the
policy chose the token. It comes from the sampler, never from comparing ids with a padding id.

Left out, to stay short: value functions of their own (the value head reads the policy's trunk), adaptive KL
coefficients, and partial episodes: every episode ends within its rollout.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Annotated, Any

import jinja2
import torch
import torch.distributed as dist
import transformers
from PIL import Image
from torch import Tensor, nn

import envs
from envs import Option

Batch = dict[str, Any]  # tensors by name, and perhaps "pictures"
Spans = list[list[tuple[int, int, int]]]  # for each episode, its replies' (row, start, stop) in order of time
Optimizers = list[torch.optim.Optimizer]


@dataclass
class PPOConfig:
    """Settings of one run. Sizes count episodes over all ranks; training ends at `steps` or `flops`,
    whichever is first."""

    lr: Annotated[float, Option("peak learning rate", above=0)] = 1e-6
    value_lr: Annotated[float, Option("learning rate of the value head", least=0)] = 1e-4
    episodes: Annotated[int, Option("episodes per update", least=1)] = 256
    minibatch_size: Annotated[int, Option("episodes' worth of rows per optimizer step", least=1)] = 128
    microbatch_size: Annotated[int, Option("rows per forward pass and rank", least=1)] = 64
    epochs: Annotated[int, Option("passes over each batch of episodes", least=1)] = 4
    steps: Annotated[int, Option("updates", least=1)] = 20
    flops: Annotated[
        float, Option("end here: 6 N per trained, 2 N per generated or scored token", above=0)
    ] = math.inf
    warmup: Annotated[
        float, Option("share of the run in which the rate rises; then a cosine to 0", least=0, most=1)
    ] = 0.0
    gamma: Annotated[float, Option("discount per turn; inside a reply it is 1", least=0, most=1)] = 0.9
    lam: Annotated[float, Option("lambda of GAE, per action", least=0, most=1)] = 0.95
    clip: Annotated[float, Option("clip range of the ratio", above=0)] = 0.2
    value_clip: Annotated[float, Option("clip range of the value, in units of the return", above=0)] = 1.0
    value_coef: Annotated[float, Option("weight of the value loss", least=0)] = 0.5
    entropy_coef: Annotated[float, Option("weight of the entropy bonus, in nats", least=0)] = 0.0
    kl_coef: Annotated[float, Option("weight of KL(policy || initial policy), in nats", least=0)] = 0.0
    max_grad_norm: Annotated[float, Option("clip the global gradient norm at this", above=0)] = 1.0
    ratio: Annotated[str, Option("one ratio, value and advantage per", choices=("token", "reply"))] = "token"
    objective: Annotated[
        str, Option("ppo, or SFT on one's own accepted replies", choices=("ppo", "imitate"))
    ] = "ppo"
    thought_coef: Annotated[
        float, Option("with ratio reply: weight of what stands before the answer field (paper: .5)", least=0)
    ] = 1.0
    value_trunk: Annotated[
        str, Option("shared: the value loss trains the language model too", choices=("detached", "shared"))
    ] = "detached"
    value_warmup: Annotated[int, Option("updates at first that train the value head alone", least=0)] = 0
    temperature: Annotated[float, Option("sampling temperature", above=0)] = 1.0
    max_new_tokens: Annotated[int, Option("longest reply, in tokens", least=1)] = 128
    betas: Annotated[tuple[float, float], Option("of Adam", least=0, most=1)] = (0.9, 0.98)
    eps: Annotated[float, Option("of Adam", above=0)] = 1e-7
    weight_decay: Annotated[float, Option("of AdamW", least=0)] = 0.0
    seed: Annotated[int, Option("random seed", least=0, most=2**32 - 1)] = 0


@dataclass
class Stream:
    """One conversation as the model sees it.

    `mask` is 1 on the tokens that are trained: those of replies, end tokens included (in demonstrations
    perhaps of the last reply alone), never those of prompts and feedback. `replies` holds the [start, stop)
    of every reply, `logp` the log-probabilities of a sampled conversation's tokens, `picture` what the
    processor made of its picture, each tensor with a leading dimension of 1.
    """

    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    replies: list[tuple[int, int]] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    picture: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def context(self, ids: Sequence[int]) -> None:
        """Appends tokens that the policy did not choose."""
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logp += [0.0] * len(ids)

    def reply(self, ids: Sequence[int], logp: Sequence[float] | None = None) -> None:
        """Appends one reply of the policy."""
        self.replies.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids
        self.mask += [1] * len(ids)
        self.logp += logp or [0.0] * len(ids)


# -------------------------------------------------------------------------------- one update after the other


def train(
    policy: Policy, optimizers: Optimizers, environments: Sequence, config: PPOConfig, step=0, flops=0.0
) -> Iterator[dict]:
    """Trains until `config.steps` updates or `config.flops`, and yields the metrics of every update.

    `environments` are this rank's, one episode each per update. `step` and `flops` are where a resumed run
    stands.
    """
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


# ------------------------------------------------------------------------------------ from prompt to verdict


def rollout(
    policy: Policy, environments: Sequence, config: PPOConfig, step: int
) -> tuple[list[list[Stream]], list[envs.Episode]]:
    """Plays one episode in each of this rank's environments; the streams of each, and the episodes.

    Episodes and samples are a function of (seed, step, rank): a resumed run sees what the unbroken one would
    have seen.
    """
    seeds = episode_seeds(policy, len(environments), config, step)
    generator = policy.generator(f"rollout/{config.seed}/{step}")
    with policy.responder(config.temperature, config.max_new_tokens, generator) as player:
        episodes = envs.play(environments, player, seeds)
    return [player.streams[i] for i in range(len(episodes))], episodes


def episode_seeds(policy: Policy, n: int, config: PPOConfig, step: int) -> list[str]:
    """Of this rank's n episodes in an update."""
    return [f"train/{config.seed}/{step}/{policy.rank * n + i}" for i in range(n)]


class Player:
    """Answers the environments of `envs.play` by sampling from a policy. `streams[i]` is environment i's
    conversation: one stream, or on a walk with pictures one for each place, opened anew with the picture seen
    there and the words of the walk so far."""

    def __init__(self, policy: Policy, model: nn.Module, *settings):
        self.policy, self.model, self.settings = policy, model, settings  # the last as of `Policy.sample`
        self.streams: dict[int, list[Stream]] = {}
        # Of each environment's last stream:
        self.images: dict[int, Image.Image | None] = {}
        self.features: dict[int, dict[str, Tensor]] = {}  # what the vision tower makes of the image
        self.caches: dict[int, KVCache] = {}

    def __call__(self, indices: list[int], observations: list[envs.Observation]) -> list[str | None]:
        """One reply each; None where the conversation is as long as the model's positions reach. Raises
        ValueError for a first prompt of that length."""
        policy, seen = self.policy, dict(zip(indices, observations))
        if not self.streams:  # more caches might not find room
            self.keeps_caches = len(indices) <= policy.rollout_batch
        # 1. Conversations that begin, or that go on with another picture, are opened.
        new = [i for i in indices if i not in self.streams or self.images[i] is not seen[i].image]
        said = [[s.ids[a:b] for s in self.streams.get(i, []) for a, b in s.replies] for i in new]
        opened = dict(zip(new, policy.open([(seen[i].messages, seen[i].image) for i in new], said)))
        if pictures := [stream.picture for stream in opened.values() if stream.picture]:
            self.features |= zip(opened, policy.image_features(self.model, pictures))
        # 2. The others are extended. What leaves no room for a reply ends the episode.
        ready = [i for i in indices if self._take_in(i, seen[i], opened.get(i))]
        # 3. One reply is sampled for each.
        now = [self.streams[i][-1] for i in ready]
        features = [self.features[i] for i in ready] if self.features else None
        caches = [self.caches[i] for i in ready] if self.keeps_caches else None
        drawn = policy.sample(self.model, [s.ids for s in now], *self.settings, features, caches)
        for stream, reply in zip(now, drawn):
            stream.reply(*reply)
        texts = {i: policy.decode(ids) for i, (ids, _) in zip(ready, drawn)}
        return [texts.get(i) for i in indices]

    def _take_in(self, i: int, observation: envs.Observation, opened: Stream | None) -> bool:
        """Takes what environment i says into its conversation, `opened` anew or the last one; False if no
        room is left for a reply."""
        if opened is None:
            stream = self.streams[i][-1]
            before = len(stream)
            self.policy.extend(stream, observation.messages[-1]["content"])
            fits = len(stream) < self.policy.max_length
            if not fits:
                del stream.ids[before:], stream.mask[before:], stream.logp[before:]
            return fits
        if i not in self.streams:
            self.policy.require_room(len(opened), "a prompt")
        self.caches[i], self.images[i] = self._kept(i, opened.ids), observation.image
        fits = len(opened) < self.policy.max_length
        if fits:
            self.streams.setdefault(i, []).append(opened)
        return fits

    def _kept(self, i: int, ids: list[int]) -> KVCache:
        """What the cache of environment i's last conversation holds of a new one: the words before either
        one's picture. Mllama's keeps nothing, for there all words know the picture."""
        if i not in self.streams or isinstance(self.policy.family, Mllama):
            return KVCache()
        pairs = zip(self.streams[i][-1].ids[: self.caches[i].length], ids[:-1])
        same = takewhile(lambda pair: pair[0] == pair[1] != self.policy.image_id, pairs)
        return self.caches[i].first(sum(1 for _ in same))


# ------------------------------------------------------------------------------------- from episode to batch


def collect(
    policy: Policy,
    streams: list[list[Stream]],
    episodes: list[envs.Episode],
    config: PPOConfig,
    answer_field: str,
    center_values: bool = False,
) -> Batch:
    """The batch of one update: tokens, masks, old log-probabilities, old values, advantages and returns.

    `answer_field` is the name of the field where a reply's thought ends. `actions` marks what has a ratio:
    the policy's tokens, or the first token of each reply.

    With `center_values`, for the first update, the value head is shifted by a constant, so that its mean is
    the mean return. A fresh head says 0 everywhere, and with lam < 1 an error that all tokens share does not
    cancel: along a solved reply the advantage would grow towards its end (lam^k R, k tokens before it), and
    its early tokens could fall below the mean and be unlearned.
    """
    # 1. The rows, and where in them the replies of each episode stand.
    rows, spans = arrange(policy, streams)
    batch = policy.collate(rows)
    batch["actions"] = batch["mask"]
    if config.ratio == "reply":
        batch["actions"], batch["weights"] = reply_weights(policy, rows, batch["mask"], answer_field, config)
        spans = [[(b, start, start + 1) for b, start, _ in own] for own in spans]
    # 2. One pass of the training forward gives the old log-probabilities: the first ratio is 1, whatever
    # precision sampled the tokens.
    scores = score(policy, batch, config, values=True)
    batch["old_logp"], values = action_logp(scores["logp"], batch), scores["value"]
    sampled = torch.zeros_like(batch["mask"])
    for b, stream in enumerate(rows):
        sampled[b, : len(stream)] = torch.tensor(stream.logp)
    batch["sampler_gap"] = (sampled - scores["logp"]).abs()
    if config.kl_coef:
        with policy.initial_weights():
            batch["initial_logp"] = score(policy, batch, config)["logp"]
    # 3. Advantages and returns of each episode.
    rewards = [[turn.reward for turn in episode.turns] for episode in episodes]
    if center_values:  # V = 0 and lam = 1 make the return the discounted sum of later rewards
        _, returns = advantages_of(rewards, torch.zeros_like(values), spans, config.gamma, 1.0)
        error, count = policy.sum(((returns - values) * batch["actions"]).sum(), batch["actions"].sum())
        policy.shift_value(error / count)
        values = values + error / count
    batch["old_values"] = values * batch["actions"]
    advantages, batch["returns"] = advantages_of(rewards, values, spans, config.gamma, config.lam)
    batch["advantages"] = whiten(policy, advantages, batch["actions"])
    if config.objective == "imitate":  # 1 on the tokens of right replies, 0 on the others
        right = [[float(turn.verdict == "correct") for turn in episode.turns] for episode in episodes]
        batch["advantages"], _ = advantages_of(right, torch.zeros_like(values), spans, 0.0, 1.0)
    return batch


def arrange(policy: Policy, streams: list[list[Stream]]) -> tuple[list[Stream], Spans]:
    """The rows of a batch, and where in them the replies of each episode stand.

    Rows are sorted by length, so that neighbours share a microbatch with little padding. All ranks get as
    many: where episodes have several rows, a rank with fewer adds copies of its shortest one that train
    nothing."""
    rows = sorted((stream for own in streams for stream in own), key=len)
    spare = replace(rows[0], mask=[0] * len(rows[0]), logp=[0.0] * len(rows[0]), replies=[])
    rows = [spare] * int(policy.largest(len(rows)) - len(rows)) + rows
    number = {id(stream): b for b, stream in enumerate(rows)}
    spans = [[(number[id(s)], start, stop) for s in own for start, stop in s.replies] for own in streams]
    return rows, spans


def reply_weights(
    policy: Policy, rows: list[Stream], mask: Tensor, answer_field: str, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """For the reply-level ratio, both [B, T]: 1 on the first token of each reply, and the weights of the
    tokens' log-probabilities, `thought_coef` before the answer field and 1 from there on."""
    starts, weights = torch.zeros_like(mask), torch.zeros_like(mask)
    for b, stream in enumerate(rows):
        for start, stop in stream.replies:
            answer = start + thought_length(policy, stream.ids[start:stop], answer_field)
            starts[b, start], weights[b, start:answer], weights[b, answer:stop] = 1, config.thought_coef, 1
    return starts, weights


def thought_length(policy: Policy, ids: list[int], answer_field: str) -> int:
    """Number of a reply's tokens before the one in which the name of the answer field ends."""
    text = ""
    for k, token in enumerate(ids):
        text += policy.decode([token])
        if answer_field in text:
            return k
    return len(ids)


@torch.no_grad()
def score(policy: Policy, batch: Batch, config: PPOConfig, values: bool = False) -> dict[str, Tensor]:
    """What the policy says of a whole batch, by microbatches: "logp" and, if asked for, "value", [B, T]."""
    out = {"logp": torch.zeros_like(batch["mask"]), "value": torch.zeros_like(batch["mask"])}
    for rows in torch.arange(len(batch["ids"]), device=batch["ids"].device).split(config.microbatch_size):
        part = rows_of(batch, rows)
        scores = policy(part, config.temperature, values=config.value_trunk if values else None)
        for name, scored in scores.items():
            out[name][rows, : scored.shape[1]] = scored
    return out


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch (rows: their indices [n]), cut to the longest of them."""
    width, part = int(batch["length"][rows].max()), {}
    for name, values in batch.items():
        if name == "pictures":
            part[name] = [values[i] for i in rows.tolist()]
        else:
            part[name] = values[rows, :width] if values.dim() > 1 else values[rows]
    return part


def action_logp(logp: Tensor, batch: Batch) -> Tensor:
    """Log-probability of each action [B, T]: of the token, or the weighted sum over the reply, on its first
    token."""
    return per_reply(logp * batch["weights"], batch["actions"]) if "weights" in batch else logp


def per_reply(x: Tensor, starts: Tensor) -> Tensor:
    """Sums x [B, T], which is 0 outside replies, over each reply; the sum stands on the reply's first token,
    where starts [B, T] is 1."""
    reply = starts.cumsum(1).long()  # 0 before the first reply, then 1, 2, ...
    sums = torch.zeros(len(x), int(reply.max()) + 1, dtype=x.dtype, device=x.device).scatter_add(1, reply, x)
    return sums.gather(1, reply) * starts


# ----------------------------------------------------------------------------------- mathematics


def gae(
    rewards: Sequence[float], values: Sequence[Sequence[float]], gamma: float, lam: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Generalized advantage estimation for one episode (Schulman et al. 2016, equation 16).

    rewards[k] is the reward of reply k, values[k] the list of V before each of its tokens. From one token of
    the policy to the next one, t':

        delta_t = r_t + d V_t' - V_t,    A_t = delta_t + d lam A_t',    d = 1 inside a reply, else gamma

    The reward falls on the reply's last token. Gamma acts once per turn, not per token. Behind the last reply
    value and advantage are 0: an episode that ends, solved or with its budget used up, is over. Returns the
    advantages and the returns A + V, shaped like the values.
    """
    advantages: list[list[float]] = []
    next_value = next_advantage = 0.0
    for reward, own in zip(reversed(rewards), reversed(values), strict=True):
        line, discount = [], gamma
        for value in reversed(own):
            delta = reward + discount * next_value - value
            line.append(delta + discount * lam * next_advantage)
            next_value, next_advantage, reward, discount = value, line[-1], 0.0, 1.0
        advantages.append(line[::-1])
    advantages.reverse()
    return advantages, [[a + v for a, v in zip(*pair)] for pair in zip(advantages, values)]


def advantages_of(
    rewards: list[list[float]], values: Tensor, spans: Spans, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae` of all episodes: advantages and returns [B, T], 0 where there is no action. values [B, T]."""
    before, advantages, returns = values.tolist(), torch.zeros(values.shape), torch.zeros(values.shape)
    for reward, own in zip(rewards, spans):
        lines = gae(reward, [before[b][start:stop] for b, start, stop in own], gamma, lam)
        for (b, start, stop), a, r in zip(own, *lines):
            advantages[b, start:stop], returns[b, start:stop] = torch.tensor(a), torch.tensor(r)
    return advantages.to(values.device), returns.to(values.device)


def whiten(policy: Policy, x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T] with mean 0 and standard deviation 1 over the mask of all ranks; 0 elsewhere."""
    total, first, second = policy.sum(mask.sum(), (x * mask).sum(), (x * x * mask).sum())
    mean = first / total
    variance = max(second / total - mean * mean, 0.0)
    return (x - mean) / (variance**0.5 + 1e-8) * mask


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
    """Clipped value loss, a scalar: 1/2 mean over the mask of max((V - R)^2, (V_clipped - R)^2), all [B, T].

    V_clipped stays within `clip` of the rollout's value, so one batch cannot pull the critic far.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def kl_estimate(logp: Tensor, other_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(p || q) in nats from samples of p: q/p - 1 - log(q/p), never negative (Schulman
    2020, "Approximating KL divergence"). logp of p, other_logp of q, of any shape."""
    log_ratio = other_logp - logp
    return torch.exp(log_ratio) - 1 - log_ratio


def losses(
    scores: dict[str, Tensor], part: Batch, config: PPOConfig, actions: float, tokens: float, warming: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one microbatch and, by name, what is logged of it; all are its shares of the means over the
    global minibatch, which has so many actions and tokens. `warming`: the value loss alone."""
    logp, act = action_logp(scores["logp"], part), part["actions"]
    share = act.sum() / actions  # makes a mean over this microbatch its part of the global one
    if config.objective == "ppo":
        pg = policy_loss(logp, part["old_logp"], part["advantages"], act, config.clip) * share
    else:
        pg = -masked_mean(logp * part["advantages"], act) * share
    vf = value_loss(scores["value"], part["old_values"], part["returns"], act, config.value_clip) * share
    entropy = scores["entropy"].sum() / tokens
    loss = config.value_coef * vf
    if not warming:
        loss = loss + pg - config.entropy_coef * entropy
    logged = {"policy_loss": pg, "value_loss": vf, "entropy": entropy}
    if config.kl_coef:
        now, initial = scores["logp"], part["initial_logp"]
        if not warming:
            # The gradient of half the squared log-ratio is that of KL(policy || initial); that of k3 is the
            # reverse KL's.
            loss = loss + config.kl_coef * 0.5 * (((now - initial) ** 2).sum() / tokens)
        logged["kl_to_init"] = (kl_estimate(now, initial) * part["mask"]).sum() / tokens
    ratio = torch.exp(logp - part["old_logp"])
    logged["approx_kl"] = masked_mean(kl_estimate(part["old_logp"], logp), act) * share
    logged["clip_fraction"] = masked_mean(((ratio - 1).abs() > config.clip).float(), act) * share
    logged["largest_ratio"] = (ratio * act).max()
    logged["ratio_error"] = ((ratio - 1).abs() * act).max()
    return loss, {name: x.detach() for name, x in logged.items()}


# -------------------------------------------------------------------------- from batch to weights


def update(
    policy: Policy, optimizers: Optimizers, batch: Batch, config: PPOConfig, step: int
) -> dict[str, float]:
    """Epochs of minibatches over one batch, one optimizer step per minibatch; returns the means of what is
    logged.

    Policy and value loss are normalised by the number of actions in the global minibatch, entropy and KL by
    that of tokens. Every rank has the same number of rows, hence of minibatches and microbatches; a minibatch
    has the share of them that `minibatch_size` is of the episodes. Raises FloatingPointError on a non-finite
    loss or gradient.
    """
    sums: Counter[str] = Counter()
    largest, first_error, norms = 1.0, 0.0, []
    warming = step < config.value_warmup
    trunk = "detached" if warming else config.value_trunk
    shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    size = math.ceil(len(batch["ids"]) * config.minibatch_size / config.episodes)
    for _ in range(config.epochs):
        for rows in torch.randperm(len(batch["ids"]), generator=shuffle).split(size):
            rows = rows.sort().values.to(batch["ids"].device)  # in order of length: sorted ones pad least
            actions, tokens = policy.sum(batch["actions"][rows].sum(), batch["mask"][rows].sum())
            microbatches, minibatch_loss = rows.split(config.microbatch_size), 0.0
            for k, micro in enumerate(microbatches):
                part = rows_of(batch, micro)
                scores = policy(part, config.temperature, values=trunk, entropy=True)
                loss, logged = losses(scores, part, config, actions, tokens, warming)
                policy.backward(loss, last=k == len(microbatches) - 1)
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
    """What the rollout says, over all ranks: return, success, shares of the task's `verdicts`, lengths, and
    how much of the return the critic explains."""
    turns = [turn for episode in episodes for turn in episode.turns]
    n, replies, tokens, act = len(episodes), len(turns), batch["mask"].sum(), batch["actions"]
    rewards = {v: [turn.reward for turn in turns if turn.verdict == v] for v in verdicts}
    means = {  # of each the sum and what it is divided by
        "return": (sum(t.reward * config.gamma**k for e in episodes for k, t in enumerate(e.turns)), n),
        "success": (sum(e.success for e in episodes), n),
        "first_success": (sum(e.success and e.most_tries() == 1 for e in episodes), n),
        "turns": (replies, n),
        "reply_length": (tokens, replies),
        "sampler_gap": (batch["sampler_gap"].sum(), tokens),
        **{f"share/{v}": (len(own), replies) for v, own in rewards.items()},
        **{f"reward/{v}": (sum(own), n) for v, own in rewards.items()},
    }
    for name, x in (("R", batch["returns"]), ("error", batch["returns"] - batch["old_values"])):
        means |= {name: ((x * act).sum(), act.sum()), f"{name}^2": ((x**2 * act).sum(), act.sum())}
    sums = policy.sum(*(number for pair in means.values() for number in pair))
    mean = {name: total / count for name, total, count in zip(means, sums[::2], sums[1::2])}
    variance, unexplained = (mean.pop(f"{x}^2") - mean.pop(x) ** 2 for x in ("R", "error"))
    return mean | {"explained_variance": 1 - unexplained / variance if variance > 0 else 0.0}


# ----------------------------------------------------------------------- the policy: tokens, scores, samples


class Policy(nn.Module):
    """A chat model with a value head: all that training and evaluation ask of a model.

    Args:
        model: a Hugging Face causal language or vision-language model.
        processor: its processor, or its tokenizer; must have a chat template.
        rollout_dtype: of the weights while sampling; None takes bf16 where the device is fast in it, else
            the weights' own. Training log-probabilities are always computed by `forward`.
        rollout_batch: conversations decoded together. If there are no more than these, their key-value
            caches are kept from turn to turn.

    Raises ValueError for a model whose chat template or tokenizer cannot be used.

    `flops` counts the work of this process: 6 N per trained token, 2 N per generated or scored token, N the
    parameters of `model`, padding left out. Pictures count as the tokens that stand for them in the text;
    Mllama's, which stand beside it, as 6 or 2 parameters of the vision tower per patch.

    This class is for one process; `Policy` in sftrl.py adds loading, saving and shards over several.
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
        width = model.config.get_text_config().hidden_size
        # At the paper's width of 4096 the value head's layers are 1024 and 512 wide. It starts at 0.
        m, n = max(64, width // 4), max(64, width // 8)
        layers = [nn.Linear(width, m), nn.ReLU(), nn.Linear(m, n), nn.ReLU(), nn.Linear(n, 1)]
        self.value_head = nn.Sequential(*layers).float()
        nn.init.zeros_(self.value_head[-1].weight)
        nn.init.zeros_(self.value_head[-1].bias)
        self.rollout_dtype = rollout_dtype or (torch.bfloat16 if fast_bfloat16(model.device) else model.dtype)
        self.rollout_batch, self._rollout_copy = rollout_batch, None
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.parameter_count, self.flops = sum(p.numel() for p in model.parameters()), 0.0
        self.family = family_of(model)
        ids = (getattr(model.config, name, None) for name in ("image_token_id", "image_token_index"))
        self.image_id = next((i for i in ids if i is not None), None)
        self._ask_template()
        self.pad_id = self.end_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.max_length = longest_conversation(model.config.get_text_config())
        self.eval()  # no dropout: the ratio of PPO must be 1 before the first step

    # ---- text and tokens

    def render(self, messages: list[dict], reply_follows: bool = True) -> str:
        """The conversation as text by the model's own chat template."""
        if self._content_as_parts:  # templates of some vision-language models read nothing else
            messages = [dict(m) for m in messages]
            for m in messages:
                if isinstance(m["content"], str):
                    m["content"] = [{"type": "text", "text": m["content"]}]
        options = {"add_generation_prompt": reply_follows, "tokenize": False}
        try:
            return self._template.apply_chat_template(messages, **options)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"its chat template cannot be used: {error}") from None

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, without the tokens that a tokenizer may put around a text."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        """What a reply says, special tokens included: only its end of turn is cut off. Nothing counts that
        stands behind a stop."""
        stop = next((k for k, token in enumerate(ids) if token in self.stop_ids), len(ids))
        said = ids[:stop] if ids[stop:] and ids[stop] in self.end_ids else ids[: stop + 1]
        text = self.tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.removesuffix(self.end_blank)

    _MARK = "\u2063REPLY\u2063"

    def _ask_template(self) -> None:
        """Asks the chat template what it writes around a reply, for example

            <|im_start|>user\\n QUESTION <|im_end|>\\n<|im_start|>assistant\\n REPLY
            <|im_end|>\\n<|im_start|>user\\n

        `opening` is the text before a reply, `reply_start` what some put between: a blank, or the channel
        that the reply goes to. `end_id` ends a reply: the first special or added token after it, for some
        templates the next role's, with the blank or newline that may stand before (`end_blank`); eos where
        the template writes plain text. `end_ids` are all tokens that end a turn. Sampling stops at the
        `stop_ids`: those, and the tokens with which a turn of the user begins. `bos` is what the tokenizer
        puts before a text."""
        templates = [x for x in (self.processor, self.tokenizer) if getattr(x, "chat_template", None)]
        if not templates:
            advice = "take a chat model, or add chat_template.jinja to its folder"
            raise ValueError(f"its tokenizer has no chat template; {advice}")
        self._template = templates[0]
        start = self.tokenizer("x")["input_ids"][:1]
        self.bos = start if start == [self.tokenizer.bos_token_id] else []
        asked, replied = ({"role": role, "content": self._MARK} for role in ("user", "assistant"))
        self._content_as_parts = False
        try:
            self._content_as_parts = self._MARK not in self.render([asked])
        except ValueError:
            self._content_as_parts = True
        self.opening = self.render([asked]).split(self._MARK)[-1]
        parts = self.render([asked, replied, asked]).split(self._MARK)
        if len(parts) != 4:
            raise ValueError("its chat template leaves out replies, or what is said after them")
        whole = parts[1].startswith(self.opening)  # a template may open a thought that it drops later
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
            lacking = "its chat template ends replies with no token of its own"
            raise ValueError(f"its tokenizer has no eos token, and {lacking}")
        self.end_id, self.end_ids = ends[0], set(ends)
        self.stop_ids = self.end_ids | (set(marks) - set(inside))

    def _continue(self, texts: list[str], before: str = "x") -> list[list[int]]:
        """Tokens of texts that go on where the text `before` ended: some tokenizers put a blank before a
        text, but not inside."""
        start, *whole = self.tokenize([before, *(before + text for text in texts)])
        n = len(start)
        return [ids[n:] if ids[:n] == start else self.tokenize([t])[0] for ids, t in zip(whole, texts)]

    def extend(self, stream: Stream, feedback: str) -> None:
        """Appends the verifier's message. Sampled tokens stay as they are: nothing is decoded and tokenized
        again. If the reply closed its turn, the template's end token stands already; if it was cut off, the
        end token joins as context."""
        turns = (("user", "x"), ("assistant", ""), ("user", feedback))
        messages = [{"role": role, "content": content} for role, content in turns]
        self._go_on(stream, *self._continue(self._around_replies(messages, 1)[-1:]))

    def _go_on(self, stream: Stream, ids: list[int]) -> None:
        """Appends what the template writes after a reply: `ids`, less the end that the reply has already."""
        closed = stream.ids[-1] == self.end_id and self.end_id in ids
        stream.context(ids[ids.index(self.end_id) + 1 :] if closed else ids)

    def open(
        self,
        conversations: Sequence[tuple[list[dict], Image.Image | None]],
        replies: Sequence[Sequence[list[int]]] | None = None,
    ) -> list[Stream]:
        """Streams of conversations (messages, picture) that wait for their next reply; a picture belongs to
        the last message.

        `replies`: of each conversation the tokens of its last replies, which join as they are: no text that a
        model wrote becomes a special token. Raises ValueError if a picture would be lost: the model reads
        none, its chat template leaves out the picture's place, or only some conversations have one.
        """
        replies = replies or [[] for _ in conversations]
        texts = [self._around_replies(asked, len(own)) for (asked, _), own in zip(conversations, replies)]
        first = self.tokenize([parts[0] for parts in texts])
        later = iter(self._continue([part for parts in texts for part in parts[1:]]))
        spoken = [[ids, *(next(later) for _ in parts[1:])] for ids, parts in zip(first, texts)]
        images, pictures = [image for _, image in conversations], [None] * len(texts)
        if any(image is not None for image in images):
            prompts, pictures = self._beside_pictures(texts, images)
            spoken = [[*parts[:-1], prompt] for parts, prompt in zip(spoken, prompts)]
        streams = [Stream(picture=picture) for picture in pictures]
        for stream, (start, *parts), own in zip(streams, spoken, replies):
            stream.context(start if start[:1] == self.bos else self.bos + start)
            for reply, ids in zip(own, parts, strict=True):
                stream.context(reply)
                self._go_on(stream, ids)
        return streams

    def _around_replies(self, messages: list[dict], n: int) -> list[str]:
        """The template's text before the last n replies of a conversation, between them, and after the
        last."""
        places = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        marked = places[len(places) - n :]
        messages = [m | {"content": self._MARK} if k in marked else m for k, m in enumerate(messages)]
        return self.render(messages).split(self._MARK)

    def _beside_pictures(
        self, texts: list[list[str]], images: list[Image.Image | None]
    ) -> tuple[list[list[int]], list[dict[str, Tensor]]]:
        """Of conversations as `_around_replies` says them, the tokens of the last parts, with the places of
        the pictures, and what the processor makes of these."""
        name, lacking = type(self.model).__name__, sum(image is None for image in images)
        if lacking:
            lot = f"{lacking} of {len(images)} conversations of a batch"
            raise ValueError(f"{lot} have no picture: all must have one, or none")
        if self.processor is self.tokenizer:
            raise ValueError(f"{name} reads no pictures: choose a vision-language model, or a text task")
        # What follows a reply is tokenized as in `_continue`; BOS keeps Mllama's processor from writing one.
        before = f"{self.tokenizer.bos_token or ''}x"
        follow = [len(parts) > 1 for parts in texts]
        out = self.processor(
            text=[before * after + parts[-1] for parts, after in zip(texts, follow)],
            images=[[image] for image in images],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        n = len(self.tokenize([before])[0])  # last, for it ends the padding, which would be saved
        rows = zip(out.pop("input_ids"), out.pop("attention_mask").bool(), follow)
        prompts = [ids[mask].tolist()[n * after :] for ids, mask, after in rows]
        if any(self.image_id not in prompt for prompt in prompts):
            raise ValueError("the chat template leaves out the picture's place")
        for known in ("cross_attention_mask", "mm_token_type_ids"):  # of the prompt's length alone
            out.pop(known, None)
        if unknown := out.keys() - self.family.inputs:
            raise ValueError(f"{name} takes {', '.join(sorted(unknown))}, which is not known here")
        rows = self.family.split(dict(out))
        return prompts, [{key: values[i] for key, values in rows.items()} for i in range(len(texts))]

    def streams(self, records: list[dict], loss_on: str = "all") -> list[Stream]:
        """Demonstrations in the released format as streams, built turn by turn exactly as `Player` builds
        them; "image" holds a picture or its path. Replies before the message with the picture (its text has
        "<image>") are context: they answered other pictures. `loss_on`: "all" other replies, or the "last",
        whose forerunners then have mask 0. Raises ValueError for a picture's place without a picture, and for
        a demonstration that is longer than the model's positions reach."""
        opened, known = [], []  # conversations up to the message with the picture, and the replies before it
        for record in records:
            image, turns, shown = record.get("image"), record["conversations"], 0
            if isinstance(image, str):
                try:
                    image = Image.open(image).convert("RGB")
                except OSError as error:
                    raise ValueError(f"picture {image} cannot be read: {error}") from None
            if image:
                shown = next((k for k, t in enumerate(turns) if k % 2 == 0 and "<image>" in t["value"]), 0)
            roles = {"human": "user", "gpt": "assistant"}
            messages = [{"role": roles[t["from"]], "content": t["value"]} for t in turns[: shown + 1]]
            if image:
                messages[-1]["content"] = envs.parts_of(turns[shown]["value"])
            opened.append((messages, image))
            known.append(shown // 2)
        said = [[turn["value"] for turn in record["conversations"][1::2]] for record in records]
        texts = [self.reply_start + text + self.end_blank for own in said for text in own]
        tokens = iter(self._continue(texts, self.opening))
        replies = [[next(tokens) + [self.end_id] for _ in own] for own in said]
        streams = self.open(opened, [own[:n] for own, n in zip(replies, known)])
        for stream, record, own, n in zip(streams, records, replies, known):
            for k in range(n, len(own)):
                if k > n:
                    self.extend(stream, record["conversations"][2 * k]["value"])
                if loss_on == "last":
                    stream.mask = [0] * len(stream)
                stream.reply(own[k])
            places = [t for t, token in enumerate(stream.ids) if token == self.image_id]
            if places and (stream.picture is None or places[-1] >= stream.replies[0][0]):
                wrong = "a picture's place without a picture, or after its first message"
                raise ValueError(f"a demonstration has {wrong}")
            self.require_room(len(stream), "a demonstration", least=0)
        return streams

    def require_room(self, length: int, what: str, least: int = 1) -> None:
        """Raises ValueError if positions do not reach `least` tokens beyond a text of so many."""
        if length + least > self.max_length:
            reach = f"positions of {type(self.model).__name__} reach no farther than {self.max_length}"
            raise ValueError(f"{what} has {length} tokens, but the {reach}")

    def collate(self, streams: Sequence[Stream]) -> Batch:
        """ids, mask [B, T], padded on the right, length [B] and, in visual tasks, pictures: a list of B."""
        lengths = torch.tensor([len(s) for s in streams])
        ids = torch.full((len(streams), int(lengths.max())), self.pad_id)
        mask = torch.zeros(ids.shape)
        for i, s in enumerate(streams):
            ids[i, : len(s)], mask[i, : len(s)] = torch.tensor(s.ids), torch.tensor(s.mask, dtype=torch.float)
        device = self.model.device
        batch = {"ids": ids.to(device), "mask": mask.to(device), "length": lengths.to(device)}
        return batch | {"pictures": [s.picture for s in streams]} if streams[0].picture else batch

    # ---- scores

    def forward(
        self, batch: Batch, temperature: float = 1.0, values: str | None = None, entropy: bool = False
    ) -> dict[str, Tensor]:
        """Teacher-forced scores of the tokens where `mask` is 1; all [B, T] fp32, 0 elsewhere.

        logp[b, t]: log-probability of ids[b, t] given ids[b, :t], at `temperature`. value[b, t] = V(s_t),
        read on the token before (`values`: "detached" trunk, "shared", or None). entropy[b, t]: of the
        distribution that token t was drawn from."""
        ids, mask = batch["ids"], batch["mask"].bool()
        # Padding stands on the right, where no real token can see it: causal attention needs no padding mask.
        pictures = self._stack(batch["pictures"]) if "pictures" in batch else {}
        inputs = dict(pictures)
        if pictures:
            inputs |= self.family.forward_inputs(self, ids, batch["length"], pictures)
        mixed = ids.is_cuda and self.model.dtype == torch.float32 and not self.sharded
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=mixed):
            hidden = self.model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        self._count(6 if torch.is_grad_enabled() else 2, int(batch["length"].sum()), pictures)
        hidden = hidden[:, :-1][mask[:, 1:]]  # [n, H]: only where a reply token comes next
        logps = self._log_probabilities(self.model, hidden, temperature)
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

    sharded = False  # over several processes

    def _log_probabilities(self, model: nn.Module, hidden: Tensor, temperature: float) -> Tensor:
        """Of the next token after states [n, H]: [n, vocabulary], fp32. The image token is never said: it
        would promise a picture."""
        logits = model.get_output_embeddings()(hidden).float() / temperature
        if self.image_id is not None and self.image_id < logits.shape[-1]:
            logits[:, self.image_id] = -1e9
        return logits.log_softmax(-1)

    def _count(self, per_parameter: int, tokens: int, pictures: dict[str, Tensor]) -> None:
        """Adds the work on so many tokens and on pictures that stand beside them."""
        self.flops += per_parameter * self.parameter_count * tokens
        if pictures:
            self.flops += per_parameter * self.family.tower_work(self.model, pictures)

    def _stack(self, pictures: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pictures as one batch on the model's device."""
        return {name: torch.cat([p[name] for p in pictures]).to(self.model.device) for name in pictures[0]}

    # ---- sampling

    @contextmanager
    def rollout_weights(self) -> Iterator[nn.Module]:
        """The model to sample from, in the rollout's precision."""
        if self.rollout_dtype == self.model.dtype:
            yield self.model
            return
        if self._rollout_copy is None:  # kept out of the module tree: no part of the policy's state
            object.__setattr__(self, "_rollout_copy", copy.deepcopy(self.model))
            for p in self._rollout_copy.parameters():
                p.data = p.data.to(self.rollout_dtype)  # buffers such as RoPE frequencies stay in fp32
        for copied, p in zip(self._rollout_copy.parameters(), self.model.parameters()):
            copied.data.copy_(p.data)
        yield self._rollout_copy

    @torch.no_grad()
    def image_features(self, model: nn.Module, pictures: Sequence[dict], chunk: int = 16) -> list[dict]:
        """What the vision tower makes of pictures: once per rollout, for all turns of an episode. So many
        at a time: the 11B model's tower needs half a gigabyte for each."""
        features: list[dict] = []
        for i in range(0, len(pictures), chunk):
            inputs = self._stack(pictures[i : i + chunk])
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            self._count(2, 0, inputs)
            features += self.family.features(model, inputs)
        return features

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
        features: Sequence[dict[str, Tensor]] | None = None,
        caches: Sequence[KVCache] | None = None,
    ) -> list[tuple[list[int], list[float]]]:
        """Draws one reply per prompt: its tokens, end token included if it was drawn, and their
        log-probabilities.

        `model` comes from `rollout_weights()`, `features` (of the prompts' pictures) from `image_features`.
        Temperature 0 is greedy. Nothing is filtered: what is drawn is what the log-probabilities say (no
        top-k, no top-p, no generation config). What the `caches` hold of the prompts is not computed again;
        afterwards they hold the prompts.
        """
        replies: list[tuple[list[int], list[float]]] = [([], [])] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.rollout_batch):
            rows = order[start : start + self.rollout_batch]
            given = items_at(rows, prompts, features, caches)
            for i, reply in zip(rows, self._decode(model, *given, max_new_tokens, temperature, generator)):
                replies[i] = reply
        return replies

    def _decode(self, model, prompts, features, caches, max_new_tokens, temperature, generator):
        """The decoding loop for one batch; arguments and result as of `sample`."""
        device, cached = model.device, sum(cache.length for cache in caches or ())
        stops = torch.tensor(sorted(self.stop_ids), device=device)
        drawn = torch.full((len(prompts), max_new_tokens), self.pad_id, device=device)
        logps = torch.zeros(drawn.shape, device=device)
        room = [min(max_new_tokens, self.max_length - len(prompt)) for prompt in prompts]
        lengths = torch.tensor(room, device=device)
        order, batch = self._prefill(model, prompts, features, caches, max_new_tokens)
        rows = torch.tensor(order, device=device)  # which prompt each row of the batch is
        writing = torch.ones(len(prompts), dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            logp = self._log_probabilities(model, batch.hidden, temperature or 1.0)
            ids = draw(logp, generator) if temperature else logp.argmax(-1, keepdim=True)
            drawn[rows, t], logps[rows, t] = ids[:, 0], logp.gather(-1, ids)[:, 0]
            ended = writing & (torch.isin(ids[:, 0], stops) | (lengths[rows] == t + 1))
            lengths[rows[ended]] = t + 1
            writing = writing & ~ended
            still = int(writing.sum())
            if not still or t + 1 == max_new_tokens:
                break
            if still <= 0.75 * len(ids):  # finished rows leave, but not one by one: the cache is copied
                keep = writing.nonzero()[:, 0]
                batch.keep(keep)
                ids, rows, writing = ids[keep], rows[keep], writing[keep]
            batch.feed(ids)
        self._count(2, sum(map(len, prompts)) - cached + int(lengths.sum()) - len(prompts), {})
        return [(d[:n], l[:n]) for d, l, n in zip(drawn.tolist(), logps.tolist(), lengths.tolist())]

    def _prefill(self, model, prompts, features, caches, room: int) -> tuple[list[int], Decoder]:
        """Reads the prompts of one batch, but for what the caches hold of them, in parts of PREFILL tokens.
        Returns which prompt each row is, and the batch with room for more tokens."""
        cached = [cache.length for cache in caches] if caches else [0] * len(prompts)
        unread = [len(prompt) - n for prompt, n in zip(prompts, cached)]
        parts: list[list[int]] = []
        for i in sorted(range(len(prompts)), key=lambda i: (cached[i] > 0, unread[i])):
            fits = parts and (len(parts[-1]) + 1) * unread[i] <= PREFILL
            if not fits or (cached[i] > 0) != (cached[parts[-1][0]] > 0):
                parts.append([])
            parts[-1].append(i)
        config, columns = model.config.get_text_config(), max(map(len, prompts))
        crossing = getattr(config, "cross_attention_layers", ())  # Mllama's: they hold the picture alone
        widths = [None if k in crossing else columns + room for k in range(config.num_hidden_layers)]
        cache = transformers.Cache(layers=[GrowingLayer(len(prompts), width) for width in widths])
        read, first = [], 0
        for part in parts:
            rows, first = slice(first, first + len(part)), first + len(part)
            given = items_at(part, prompts, features, caches)
            new = unread[part[-1]]  # the most of the part
            read.append(self._read(model, cache, rows, columns, *given, new))
        for layer in cache.layers:
            layer.show(slice(0, None), 0, layer.stop)
        hidden, positions, tiles = zip(*read)
        order = [i for part in parts for i in part]
        lengths = torch.tensor([len(prompts[i]) for i in order], device=model.device)
        shown = None if tiles[0] is None else torch.cat(tiles)
        return order, Decoder(model, torch.cat(hidden), cache, lengths, torch.cat(positions, -2), shown)

    def _read(self, model, cache, rows: slice, columns: int, prompts, features, caches, new: int):
        """Reads the last `new` tokens of prompts whose other tokens the caches hold into these rows of the
        batch's cache; afterwards the caches hold them all.

        All rows must end in the same column, the last of `columns`, where the next token joins, and no masked
        column may stand inside a row, for sliding windows and some positions count columns. So all padding
        stands on the left, and every row reads as many tokens as the one that lacks most, some of them again.
        Returns what a `Decoder` holds of these rows: hidden, positions and tiles."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        width = int(lengths.max())
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=model.device)
        attention = left_padded(lengths, width)
        positions = self.family.positions(self, ids, attention, features)[..., -new:]
        inputs = self.family.read(self, model, ids, new, features)
        before = [kept.first(max(0, len(p) - new)) for kept, p in zip(caches or (), prompts) if kept.length]
        for k, layer in enumerate(cache.layers):
            if layer.columns is None:
                layer.show(rows, 0, 0)
            else:
                layer.show(rows, columns - width, columns - new, [kept.layers[k] for kept in before])
        hidden = read_on(model, cache, positions, inputs | {"attention_mask": attention})
        for b, (kept, prompt) in enumerate(zip(caches or (), prompts)):
            kept.length = len(prompt)
            kept.layers = [layer.row(b, len(prompt)) for layer in cache.layers]
        shown = inputs["cross_attention_mask"][:, -1:] if "cross_attention_mask" in inputs else None
        return hidden, positions[..., -1:], shown

    @contextmanager
    def responder(
        self, temperature: float, max_new_tokens: int, generator: torch.Generator
    ) -> Iterator[Player]:
        """A player for `envs.play`. Afterwards it still has the streams of its conversations."""
        with self.rollout_weights() as model:
            player = Player(self, model, max_new_tokens, temperature, generator)
            yield player
        player.features.clear()  # their memory is for what comes next
        player.caches.clear()

    def generator(self, seed: str) -> torch.Generator:
        """A random generator for sampling, a function of `seed` and the rank alone."""
        return torch.Generator("cpu").manual_seed(random.Random(f"{seed}/rank{self.rank}").getrandbits(63))

    # ---- training

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds the gradient of this rank's part of a loss that is a sum over ranks and microbatches; `last`
        marks the last one. (Over ranks gradients are summed in sftrl.py.)"""
        loss.backward()

    def step(self, optimizers: Optimizers, max_grad_norm: float, loss: float) -> float:
        """Clips by the global norm, steps, clears the gradients; returns the norm before clipping.

        Raises FloatingPointError if `loss` (already summed over ranks) or the norm is not finite: every rank
        decides alike, and the weights are still those of the last step.
        """
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    @staticmethod
    def set_lr(optimizers: Optimizers, progress: float, warmup: float) -> float:
        """Learning rates at `progress` in [0, 1): linear warm-up from a tenth, then cosine to 0. Returns the
        factor."""
        if progress < warmup:
            factor = 0.1 + 0.9 * progress / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = factor * group["initial_lr"]
        return factor

    @torch.no_grad()
    def shift_value(self, amount: float) -> None:
        """Adds a constant to all values."""
        self.reshard()
        self.value_head[-1].bias.add_(amount)

    def reshard(self) -> None:
        """Before weights are changed by hand: lets go of those that were gathered from other ranks."""

    def keep_initial_weights(self) -> None:
        """Keeps a copy of the weights as they are now (of this rank's shards)."""
        self.reshard()
        self._initial = [p.detach().clone() for p in self.model.parameters()]

    @contextmanager
    def initial_weights(self) -> Iterator[None]:
        """Inside, the model has the weights that `keep_initial_weights` kept."""
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
        if self.world == 1:
            return number
        value = torch.tensor(number, dtype=torch.float64, device=self.model.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    def gather(self, items: list) -> list:
        """All ranks' items, in the order of ranks."""
        if self.world == 1:
            return items
        lists: list[list] = [[] for _ in range(self.world)]
        dist.all_gather_object(lists, items)
        return [item for own in lists for item in own]


def draw(logp: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row, [B, 1], of log-probabilities [B, vocabulary]: inverse transform sampling, one
    uniform number per row, in double precision."""
    mass = logp.double().exp().cumsum(-1)
    point = torch.rand(len(logp), 1, generator=generator, device=generator.device, dtype=torch.double)
    ids = torch.searchsorted(mass, point.to(logp.device) * mass[:, -1:], right=True)
    return ids.clamp(max=logp.shape[-1] - 1)


def items_at(rows: Sequence[int], *lists: Sequence | None) -> list[list | None]:
    """The items of each list at these rows; None for a list that is empty or None."""
    return [[items[i] for i in rows] if items else None for items in lists]


# Tokens of prompts read together: many more at once are too much for a CPU's cache and a GPU's memory.
PREFILL = 4096


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bf16 natively; a CPU without it is slower in bf16 than in
    fp32."""
    if device.type == "cuda":
        return True
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


def longest_conversation(config: transformers.PretrainedConfig) -> float:
    """How many tokens a language model's positions reach: without end for rotary embeddings (RoPE), but for
    those whose frequencies change beyond some length, for which keys that were kept would then be wrong."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and "rope_type" in kind]
    changing = [kind for kind in kinds if kind["rope_type"] in ("dynamic", "longrope")]
    reach = getattr(config, "max_position_embeddings", None) or math.inf
    if kinds and not changing:
        return math.inf
    return min([reach, *(kind.get("original_max_position_embeddings") or reach for kind in changing)])


# ------------------------------------------------------------------- pictures, by model family


class Llava:
    """Pictures stand in the text: one image token for each of their features. Also what models without
    pictures need."""

    inputs = {"pixel_values"}  # what the processor makes of a picture

    def split(self, out: dict[str, Tensor]) -> dict[str, Sequence[Tensor]]:
        """What the processor made of a batch of pictures, by picture."""
        return {name: values.split(1) for name, values in out.items()}

    def forward_inputs(self, policy: Policy, ids: Tensor, lengths: Tensor | None, pictures: dict) -> dict:
        """What the model's forward pass over ids [B, T], padded on the right, takes beside the pictures."""
        return {}

    def plain_inputs(self, policy: Policy, ids: Tensor, pictures: dict) -> dict[str, Tensor]:
        """The same for a call of the whole model, without anything worked out for it."""
        return self.forward_inputs(policy, ids, None, pictures)

    def features(self, model: nn.Module, pictures: dict) -> list[dict[str, Tensor]]:
        """What the vision tower and its projection make of pictures: "features" [n, H] each."""
        return [{"features": f} for f in model.get_image_features(**pictures).pooler_output]

    def positions(self, policy: Policy, ids: Tensor, attention: Tensor, pictures) -> Tensor:
        """The position of each token of ids [B, T], padded on the left: its place in the row, [B, T]."""
        return (attention.cumsum(-1) - 1).clamp(min=0)

    def read(self, policy: Policy, model: nn.Module, ids: Tensor, new: int, pictures) -> dict[str, Tensor]:
        """What the model reads of the last `new` tokens of ids [B, T] when it samples: tokens, or embeddings
        where image tokens are among them. The features of a picture that was cut are its last ones."""
        places = ids[:, -new:] == policy.image_id
        if not pictures or not places.any():
            return {"input_ids": ids[:, -new:]}
        if int((ids == policy.image_id).sum()) != sum(len(p["features"]) for p in pictures):
            raise ValueError("the prompts have places for more or fewer parts of pictures than there are")
        counts = places.sum(1).tolist()
        features = torch.cat([p["features"][len(p["features"]) - n :] for p, n in zip(pictures, counts)])
        embeddings = model.get_input_embeddings()(ids[:, -new:])
        return {"inputs_embeds": embeddings.masked_scatter(places[:, :, None], features)}

    def tower_work(self, model: nn.Module, pictures: dict) -> int:
        """Parameters times patches of a vision tower whose work the count of tokens does not tell."""
        return 0


class Qwen(Llava):
    """Qwen2-VL and Qwen2.5-VL: a batch's patches lie in one row, and a token's position has three
    coordinates: time, row and column in the picture."""

    inputs = {"pixel_values", "image_grid_thw"}

    def split(self, out: dict[str, Tensor]) -> dict[str, Sequence[Tensor]]:
        rows = super().split(out)
        return rows | {"pixel_values": out["pixel_values"].split(out["image_grid_thw"].prod(-1).tolist())}

    def forward_inputs(self, policy, ids, lengths, pictures):
        attention = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        return {"position_ids": self._rope(policy, ids, attention, pictures["image_grid_thw"])}

    def plain_inputs(self, policy, ids, pictures):
        return {"mm_token_type_ids": (ids == policy.image_id).int()}

    def features(self, model, pictures):
        grids = pictures["image_grid_thw"]
        return [f | {"grid": grid} for f, grid in zip(super().features(model, pictures), grids)]

    def positions(self, policy, ids, attention, pictures):
        if not pictures:
            return super().positions(policy, ids, attention, pictures)
        return self._rope(policy, ids, attention, torch.stack([p["grid"] for p in pictures]))

    def _rope(self, policy, ids, attention, grids) -> Tensor:
        """[3, B, T]"""
        known = self.plain_inputs(policy, ids, {}) | {"image_grid_thw": grids, "attention_mask": attention}
        return policy.model.base_model.get_rope_index(ids, **known)[0]


class Mllama(Llava):
    """Llama-3.2-Vision: pictures stand beside the text, which looks at them in cross-attention layers."""

    inputs = {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"}

    def forward_inputs(self, policy, ids, lengths, pictures):
        return {"cross_attention_mask": self._tiles(policy, ids, pictures["aspect_ratio_mask"])}

    def features(self, model, pictures):
        tower = model.base_model.vision_model(**pictures).last_hidden_state  # [B, 1, tiles, patches, D]
        features = model.base_model.multi_modal_projector(tower).flatten(1, 3)
        return [{"features": f, "tiles": t} for f, t in zip(features, pictures["aspect_ratio_mask"])]

    def read(self, policy, model, ids, new, pictures):
        if not pictures:
            return {"input_ids": ids[:, -new:]}
        return {
            "input_ids": ids[:, -new:],
            "cross_attention_mask": self._tiles(policy, ids, torch.stack([p["tiles"] for p in pictures])),
            "cross_attention_states": torch.stack([p["features"] for p in pictures]),
        }

    def _tiles(self, policy, ids: Tensor, tiles: Tensor) -> Tensor:
        """The cross-attention mask [B, T, 1, tiles] for ids [B, T]: from the picture's place on, each token
        sees the tiles in use. In bytes, for the library repeats it for every patch."""
        shown = (ids == policy.image_id).cumsum(1)[:, :, None, None].clamp(max=1)
        return (shown * tiles[:, None]).to(torch.uint8)

    def tower_work(self, model, pictures):
        tower = model.base_model.vision_model
        patches = pictures["pixel_values"].numel() // (3 * tower.patch_size**2)
        return sum(p.numel() for p in tower.parameters()) * patches


def family_of(model: transformers.PreTrainedModel) -> Llava:
    """How a model takes pictures."""
    if hasattr(model.base_model, "get_rope_index"):
        return Qwen()
    return Mllama() if hasattr(model.config.get_text_config(), "cross_attention_layers") else Llava()


# -------------------------------------------------------------------- key-value caches


class GrowingLayer(transformers.cache_utils.DynamicLayer):
    """One layer of a batch's key-value cache, with room for so many columns from the start; None takes those
    of the first keys. The library's own layer copies all keys and values for every token: in long
    conversations a third of the decoding time.

    The model sees and fills a part of it at a time: `rows`, and their columns from `start` to `stop`."""

    def __init__(self, count: int, columns: int | None):
        super().__init__()
        self.count, self.columns = count, columns

    def show(self, rows: slice, start: int, stop: int, kept: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Goes on with this part. What was `kept` of its rows, keys and values [heads, n, d], is put before
        its end."""
        for b, keys_and_values in enumerate(kept, rows.start):
            self._write(b, stop, *keys_and_values)
        self.rows, self.start, self.stop = rows, start, stop
        if self.is_initialized:
            self.keys, self.values = (whole[rows, :, start:stop] for whole in self.whole)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends keys and values [B, heads, n, d], each of its own d; returns all so far."""
        stop = self.stop + key_states.shape[2]
        self._write(self.rows, stop, key_states, value_states)
        self.show(self.rows, self.start, stop)
        return self.keys, self.values

    def _write(self, rows: int | slice, stop: int, *keys_and_values: Tensor) -> None:
        if not self.is_initialized:
            first = keys_and_values[0]
            self.dtype, self.device, self.is_initialized = first.dtype, first.device, True
            columns = self.columns or first.shape[-2]
            # Of 0, for padding is masked, but 0 times a stray NaN would be NaN.
            shapes = [(self.count, x.shape[-3], columns, x.shape[-1]) for x in keys_and_values]
            self.whole = [first.new_zeros(shape) for shape in shapes]
        for x, whole in zip(keys_and_values, self.whole):
            whole[rows, :, stop - x.shape[-2] : stop] = x

    def row(self, b: int, length: int) -> tuple[Tensor, Tensor] | None:
        """A copy of the last keys and values of a row, to keep; None of those of a picture."""
        if self.columns is not None:
            return self.keys[b, :, -length:].clone(), self.values[b, :, -length:].clone()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows of the batch."""
        if self.is_initialized:
            self.whole = [whole[indices] for whole in self.whole]
            self.show(slice(0, None), self.start, self.stop)


@dataclass
class KVCache:
    """The key-value cache of one conversation, kept from one turn to the next: of its first `length` tokens,
    by layer ([heads, n, d] twice). Mllama's cross-attention layers hold the picture, and have None here."""

    length: int = 0
    layers: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)

    def first(self, length: int) -> KVCache:
        """The cache of the first `length` tokens alone."""
        return KVCache(length, [kept and (kept[0][:, :length], kept[1][:, :length]) for kept in self.layers])


@dataclass
class Decoder:
    """A batch of conversations that grow token by token, padded on the left: the state after the last token
    [B, H], the cache, the number of tokens so far [B], the position of the last one [(3,) B, 1], and the last
    row of Mllama's cross-attention mask [B, 1, 1, tiles]."""

    model: nn.Module
    hidden: Tensor
    cache: transformers.Cache
    lengths: Tensor
    positions: Tensor
    tiles: Tensor | None

    def feed(self, ids: Tensor) -> None:
        """Reads one more token of every row, ids [B, 1]."""
        self.lengths, self.positions = self.lengths + 1, self.positions + 1
        columns = self.cache.get_seq_length() + 1
        inputs = {"input_ids": ids, "attention_mask": left_padded(self.lengths, columns)}
        if self.tiles is not None:
            inputs["cross_attention_mask"] = self.tiles.expand(-1, columns, -1, -1)
        self.hidden = read_on(self.model, self.cache, self.positions, inputs)

    def keep(self, rows: Tensor) -> None:
        """Goes on with some rows of the batch."""
        self.cache.batch_select_indices(rows)
        self.lengths, self.positions = self.lengths[rows], self.positions[..., rows, :]
        self.tiles = None if self.tiles is None else self.tiles[rows]


def read_on(model: nn.Module, cache: transformers.Cache, positions: Tensor, inputs: dict) -> Tensor:
    """Reads tokens behind those of the cache, where theirs join; the state after the last one [B, H]."""
    out = model.base_model(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.last_hidden_state[:, -1]


def left_padded(lengths: Tensor, columns: int) -> Tensor:
    """The attention mask [B, columns] of rows that are padded on the left: 1 on the last lengths[b] ones."""
    return (torch.arange(columns, device=lengths.device) >= columns - lengths[:, None]).long()
