"""Token-level supervised fine-tuning on demonstrations.

    loss = - 1/T * sum over reply tokens t of log p(token_t | everything before it)

over the T reply tokens of the global batch: all ranks, all accumulation steps. A reply's end token counts, for the model must
learn to stop; prompts and the verifier's feedback are context and carry no loss. In a multi-turn demonstration every reply counts,
or only the last (`loss_on`).

The module takes a policy (see `Policy` in sftrl.py) and records, and imports nothing of ours.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class SFTConfig:
    """Settings of one run. Sizes count demonstrations over all ranks; training ends at `steps` or `flops`, whichever is first."""

    lr: float = 1e-5
    batch_size: int = 64
    microbatch_size: int = 64  # demonstrations per forward pass and rank
    steps: int = 1000
    flops: float = math.inf  # 6 N per trained token
    warmup: float = 0.03  # share of the run in which the rate rises linearly; then it follows a cosine to 0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)  # paper, appendix
    eps: float = 1e-7
    weight_decay: float = 0.0
    loss_on: str = "all"  # or "last": earlier replies of a demonstration are context, as they should be where they are wrong
    muon: bool = False  # matrices by Muon, for pre-training the tiny base


def read_records(path: str, images: str | None = None) -> list[dict]:
    """Demonstrations from a file in the released format: a JSON list of {"image"?, "conversations": [{"from", "value"}, ...]}.

    Turns alternate and start with "human", the last is "gpt"; `<image>` in the first one marks the picture's place. "image" is one path,
    relative to the folder `images` (None: the file's own); all records have one, or none. Raises ValueError that names file, record and
    field.
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
            raise ValueError(
                f"{path}: record {i}: `conversations` must be a list of human and gpt turns in pairs"
            )
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
    """The batch of any step as a function of the step: every epoch is a new shuffle, and resuming needs no state."""

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


def train(
    policy,
    optimizers: list,
    batch_of: Callable[[int], list[dict]],
    config: SFTConfig,
    step: int = 0,
    flops: float = 0.0,
) -> Iterator[dict]:
    """Trains until `config.steps` or `config.flops`, and yields the metrics of every step.

    `batch_of(step)` returns the records of the global batch; each rank takes its share. `step` and `flops` are where a resumed run
    stands. Raises FloatingPointError on a non-finite loss or gradient, before the weights are touched.
    """
    while (progress := max(step / config.steps, flops / config.flops)) < 1:
        factor = policy.set_lr(optimizers, progress, config.warmup)
        streams = policy.streams(batch_of(step)[policy.rank :: policy.world], config.loss_on)
        streams.sort(key=len)  # neighbours of like length share a microbatch, so little of it is padding
        done, loss_sum = policy.flops, 0.0
        (total,) = policy.sum(sum(sum(stream.mask) for stream in streams))
        for i in range(0, len(streams), config.microbatch_size):
            batch = policy.collate(streams[i : i + config.microbatch_size])
            loss = -policy(batch)["logp"].sum() / total
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
