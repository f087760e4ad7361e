"""Token-level supervised fine-tuning on demonstrations.

    loss = - 1/T * sum over reply tokens t of log p(token_t | everything before it)

over the T reply tokens of the global batch: all ranks, all accumulation steps. The end token of a reply
counts, so that the model learns to stop; prompts and feedback carry no loss. In a multi-turn demonstration
all replies count, or only the last (`loss_on`). Dynamic fine-tuning (DFT, arXiv 2508.05629) weights tokens by
their probability, as a constant: unlikely ones count less.

Records come from a file, from an expert (`envs.demonstration`), or from the corpus of the tiny base, its
experience before any post-training, also in this file. The policy (`Policy` in sftrl.py) is an argument.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import envs
from envs import Option


@dataclass
class SFTConfig:
    """Settings of one run. Sizes are totals over ranks; training ends at `steps` or `flops`."""

    lr: Annotated[float, Option("peak learning rate", above=0)] = 1e-5
    batch_size: Annotated[int, Option("demonstrations per step", least=1)] = 64
    microbatch_size: Annotated[int, Option("demonstrations per forward pass and rank", least=1)] = 64
    steps: Annotated[int, Option("optimizer steps", least=1)] = 1000
    flops: Annotated[float, Option("compute budget: 6 N per trained token", above=0)] = math.inf
    warmup: Annotated[float, Option("warm-up as a share of the run; cosine after it", least=0, most=1)] = 0.03
    max_grad_norm: Annotated[float, Option("clip the global gradient norm at this", above=0)] = 1.0
    betas: Annotated[tuple[float, float], Option("of Adam (paper, appendix)", least=0, most=1)] = (0.9, 0.98)
    eps: Annotated[float, Option("of Adam", above=0)] = 1e-7
    weight_decay: Annotated[float, Option("of AdamW", least=0)] = 0.0
    loss_on: Annotated[str, Option("replies that are trained", choices=("all", "last"))] = "all"
    objective: Annotated[
        str, Option("dft: tokens weighted by probability", choices=("likelihood", "dft"))
    ] = "likelihood"
    muon: bool = False  # matrices by Muon, for pre-training the tiny base


def read_records(path: str, images: str | None = None) -> list[dict]:
    """Demonstrations from a file in the released format: a JSON list of {"image"?, "conversations": [{"from",
    "value"}, ...]}.

    Turns alternate, "human" first, "gpt" last. `<image>`, with one newline after it, marks the picture in the
    first. "image" is a path relative to the folder `images` (None: the file's); all records have one, or
    none. Raises ValueError that names file, record and field.
    """
    try:
        with open(path, encoding="utf8") as file:
            records = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: a non-empty JSON list of records is needed")
    for i, record in enumerate(records):
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns or len(turns) % 2:
            raise ValueError(f"{path}: record {i}: `conversations` must be pairs of human and gpt turns")
        for j, turn in enumerate(turns):
            speaker = ("human", "gpt")[j % 2]
            if not isinstance(turn, dict) or turn.get("from") != speaker:
                raise ValueError(f"{path}: record {i}: turn {j}: `from` must be {speaker!r}")
            if not isinstance(turn.get("value"), str):
                raise ValueError(f"{path}: record {i}: turn {j}: `value` must be a string")
        image = record.get("image") or None
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if bool(image) != bool(records[0].get("image")):
            raise ValueError(f"{path}: record {i}: `image`: all records must have one, or none")
        if image is not None:
            if not isinstance(image, str) or not (file := Path(images or Path(path).parent, image)).is_file():
                raise ValueError(f"{path}: record {i}: `image`: {image!r} is not the path of one file")
            record["image"] = str(file)
    return records


def epochs(records: list[dict], batch_size: int, seed: int) -> Callable[[int], list[dict]]:
    """Batches as a function of the step, so that resuming needs no state; every epoch is shuffled anew."""

    def batch(step: int) -> list[dict]:
        chosen = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, i = divmod(position, len(records))
            if epoch not in orders:
                orders.clear()
                orders[epoch] = random.Random(f"{seed}/{epoch}").sample(range(len(records)), len(records))
            chosen.append(records[orders[epoch][i]])
        return chosen

    orders: dict[int, list[int]] = {}
    return batch


def fresh_batches(env, demonstrate: Callable, batch_size: int, label: str) -> Callable[[int], list[dict]]:
    """New demonstrations for every step, a function of (label, step). `demonstrate(env)` makes one."""

    def batch(step: int) -> list[dict]:
        records = []
        for i in range(batch_size):
            env.random.seed(f"{label}/{step}/{i}")
            records.append(demonstrate(env))
        return records

    return batch


def demonstrations(task: str, n: int, **options) -> list[dict]:
    """n conversations with one wrong reply each under both rules."""
    cases = [(variant, seed) for variant in ("id", "rule") for seed in range(n)]
    return [envs.demonstration(envs.make(task, *case, **options), 1) for case in cases]


# -------- the corpus of the tiny base

# Names of fields in the corpus, none of them a task's: post-training must teach the format of replies.
FIELD_WORDS = (
    "hand deck dealt draw table values counts worth points digits solution equation answer result "
    "expression sum"
).split()
RED_SHARE = 0.05  # of the pictures: the base reads black cards better than red ones
# Half of the walks in pictures have made-up names: test cities have new names to copy, letter by letter.
PICTURE_CITIES = (envs.NEW_YORK.name, envs.MADE_UP)


def foundation_batches(task: str, batch_size: int, options: dict) -> Callable[[int], list[dict]]:
    """The corpus by steps; `options` are those of the study's environments. "gp-vl" takes hands in words,
    cards to read and hands in pictures in turn, "virl-vl" walks in words and in pictures."""

    def batch(step: int) -> list[dict]:
        rng = random.Random(f"base/{step}")
        if task == "virl-l":
            return [foundation_walk(rng, **options) for _ in range(batch_size)]
        if task == "virl-vl":
            in_words = {name: options[name] for name in ("turns", "points_per_leg")}
            chosen = options if step % 2 else in_words
            return [foundation_walk(rng, cities=PICTURE_CITIES, **chosen) for _ in range(batch_size)]
        if task == "gp-vl" and step % 3 == 1:
            return [reading_record(rng, **options) for _ in range(batch_size)]
        chosen = {} if task == "gp-vl" and step % 3 == 0 else options
        return [foundation_record(rng, **chosen) for _ in range(batch_size)]

    return batch


def foundation_record(rng: random.Random, **options) -> dict:
    """A hand of cards in the corpus, by mixed rules (15% tens, 60% 11/12/13, 25% any values), so that reading
    the rule pays. `options`: of GeneralPoints, or those of a picture."""
    kind = rng.choices(("id", "rule", "any"), (15, 60, 25))[0]
    faces = {face: rng.randint(1, 13) for face in "JQK"} if kind == "any" else envs.FACE_RULES[kind]
    options |= {"seed": rng.getrandbits(32), "faces": faces, "fields": rng.sample(FIELD_WORDS, 3)}
    if "size" in options:
        return imperfect_demonstration(envs.GeneralPointsVL(color=_color(rng), **options))
    return imperfect_demonstration(envs.GeneralPoints(**options))


def reading_record(rng: random.Random, size: tuple[int, int], font_size: float, jitter: float) -> dict:
    """A picture of four cards, any ranks, and their names: how the base learned to read cards."""
    ranks, suits = rng.choices(envs.RANKS, k=4), rng.choices(envs.COLORS[_color(rng)], k=4)
    turns = [
        {"from": "human", "value": "<image>\nName the cards."},
        {"from": "gpt", "value": json.dumps(ranks)},
    ]
    return {"image": envs.draw_hand(ranks, suits, size, jitter, font_size, rng), "conversations": turns}


def _color(rng: random.Random) -> str:
    return "red" if rng.random() < RED_SHARE else "black"


def foundation_walk(
    rng: random.Random,
    turns: int,
    points_per_leg: int,
    cities: Sequence[str] = (envs.NEW_YORK.name,),
    **pictures,
) -> dict:
    """A walk in the corpus, by either rule, through streets that no study uses: 20 maps, or 4 with `pictures`
    (options of VIRLVL), with the names and looks of one of `cities`."""
    city = rng.randint(1, 4 if pictures else 20), rng.choice(cities)
    width = pictures.get("panorama_width", 1024)
    return imperfect_demonstration(
        (envs.VIRLVL if pictures else envs.VIRL)(
            rng.choice(("id", "rule")),
            rng.getrandbits(32),
            verify_iter=5,
            data=envs.built_in_world("train", turns, (city[::-1],), 200, width),
            points_per_leg=points_per_leg,
            fields=rng.sample(FIELD_WORDS, 3),
            **pictures,
        )
    )


def imperfect_demonstration(env: envs.Environment) -> dict:
    """An imperfect demonstration: a model that learns from these can improve under any rule.

    A quarter are revisions, after one, two or four wrong replies (within the budget). One in ten of the last
    replies is wrong too; in text, half of all have a bad habit (cards: "x" for a product). So the base is
    unsure, can revise, and has a bad habit.
    """
    if env.decisions != 1:
        return imperfect_walk(env)
    wrong_turns = min(env.random.choices((0, 1, 2, 4), (75, 12, 8, 5))[0], env.verify_iter - 1)
    cls, careless = type(env), 0 if env.pictures else 50
    authors = (cls.wrong_reply, careless_reply, cls.expert_reply)
    return envs.demonstration(env, wrong_turns, env.random.choices(authors, (10, careless, 90 - careless))[0])


def careless_reply(env: envs.Environment) -> str:
    """An expert's reply with a bad habit: on cards "x" for every product, which is illegal."""
    reply = env.expert_reply()
    return reply.replace("*", "x") if isinstance(env, envs.GeneralPoints) else reply


def revision(env: envs.Environment) -> dict:
    """A demonstration with a random number of wrong replies, and feedback, before the expert's."""
    return envs.demonstration(env, env.random.randrange(env.verify_iter))


def imperfect_walk(env: envs.Environment) -> dict:
    """The same for episodes of several decisions: one reply in five is wrong, and revised, or the record
    ends."""
    env.reset()
    final = envs.final_decision(env)
    while True:
        wrong = env.random.random() < 0.2
        reply = env.wrong_reply() if wrong else env.expert_reply()
        last_try = env.attempts + 1 == env.verify_iter
        if wrong and last_try or env.decision == final and (not wrong or env.random.random() < 0.5):
            return envs.record(env, reply)
        env.step(reply)


# Demonstrations by name, as functions of an environment.
RECORDS = {"expert": envs.demonstration, "imperfect": imperfect_demonstration, "revision": revision}

# -------- training


def train(
    policy,
    optimizers: list,
    batch_of: Callable[[int], list[dict]],
    config: SFTConfig,
    step: int = 0,
    flops: float = 0.0,
) -> Iterator[dict]:
    """Trains for `config.steps` or `config.flops`, and yields the metrics of every step.

    `batch_of(step)` returns the records of the global batch; each rank takes its share. A resumed run
    continues from `step` and `flops`. Raises FloatingPointError on a non-finite loss or gradient, before
    weights change.
    """
    while (progress := max(step / config.steps, flops / config.flops)) < 1:
        factor = policy.set_lr(optimizers, progress, config.warmup)
        streams = policy.streams(batch_of(step)[policy.rank :: policy.world], config.loss_on)
        streams.sort(key=len)  # so that microbatches need little padding
        done, loss_sum = policy.flops, 0.0
        (total,) = policy.sum(sum(sum(stream.mask) for stream in streams))
        for i in range(0, len(streams), config.microbatch_size):
            batch = policy.collate(streams[i : i + config.microbatch_size])
            logp = policy(batch)["logp"]
            weighted = logp.detach().exp() * logp if config.objective == "dft" else logp
            loss = -weighted.sum() / total
            policy.backward(loss, last=i + config.microbatch_size >= len(streams))
            loss_sum += loss.item()
        loss_sum, spent, length = policy.sum(loss_sum, policy.flops - done, sum(map(len, streams)))
        grad_norm = policy.step(optimizers, config.max_grad_norm, loss_sum)
        step, flops = step + 1, flops + spent
        yield {
            "step": step,
            "flops": flops,
            "progress": max(step / config.steps, flops / config.flops),
            "loss": loss_sum,
            "grad_norm": grad_norm,
            "lr": factor * config.lr,
            "reply_tokens": int(total),
            "tokens": int(length),
        }
