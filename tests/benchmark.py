"""Speed. `python tests/benchmark.py` compares with the bare model, `python tests/benchmark.py --gpu` with a
GPU's limits (the tables of docs/gpus.md).

The bare model's time over ours, 1 being its speed, measured side by side, for episodes of one reply, of up to
three as in the study, and of up to three with pictures:

    rollout    a cached decode loop with the same batches and lengths, over `ppo.rollout`
    update     forward and backward on the same microbatches, over `ppo.update`
    iteration  both loops, over a PPO iteration with scoring, advantages and logging

With `--gpu` the model has Llama-3.2-Vision's architecture (`--layers 40` is the 11B one) and random bf16
weights, with RoundingAdamW and activation checkpointing; no disk and no network:

    update     tokens per second of an SFT step and a PPO update, their 6 N FLOPs over the matmul rate
    decode     tokens per second by batch size, over the bound of reading weights and cache once per token
"""

import argparse
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
import sft  # noqa: E402
import sftrl  # noqa: E402

DEVICE = sftrl.best_device()


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# -------- against the bare model


def pixels(streams, model) -> dict:
    """Pictures as the tiny model takes them."""
    made = [s.picture["pixel_values"] for s in streams if s.picture]
    return {"pixel_values": torch.cat(made).to(model.device, model.dtype)} if made else {}


@torch.no_grad()
def bare_rollout(policy, model, streams) -> None:
    """Samples as many tokens after the same prompts, turn by turn, one length per batch."""
    for turn in range(max(len(s.replies) for s in streams)):
        rows = sorted((s for s in streams if len(s.replies) > turn), key=lambda s: s.replies[turn][0])
        for i in range(0, len(rows), policy.rollout_batch):
            chunk = rows[i : i + policy.rollout_batch]
            width, cache = chunk[0].replies[turn][0], transformers.DynamicCache()
            ids = torch.tensor([s.ids[:width] for s in chunk], device=model.device)
            inputs = pixels(chunk, model)
            for _ in range(round(statistics.mean(b - a for a, b in (s.replies[turn] for s in chunk)))):
                out = model(input_ids=ids, **inputs, **{policy._cache_argument: cache}, logits_to_keep=1)
                ids, inputs = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1), {}


def bare_update(policy, streams) -> None:
    """Forward and backward of the mean log-probability of the reply tokens."""
    batch = policy.collate(streams)
    mask, inputs = batch["mask"].bool(), pixels(streams, policy.model)
    states = policy.model.base_model(input_ids=batch["ids"], **inputs, use_cache=False).last_hidden_state
    logits = policy.model.get_output_embeddings()(states[:, :-1][mask[:, 1:]])
    logits.float().log_softmax(-1).gather(-1, batch["ids"][mask][:, None]).mean().backward()


def compare(args) -> None:
    policy = sftrl.Policy.load(args.model)
    optimizers = policy.optimizers(0.0, 0.0)
    for task, verify_iter in (("gp-l", 1), ("gp-l", 3), ("gp-vl", 3)):
        study = sftrl.STUDIES[task]
        config, micro = replace(study.rl, episodes=args.episodes), study.rl.microbatch_size
        options = study.options | {"verify_iter": verify_iter}
        environments = [envs.make(task, **options) for _ in range(args.episodes)]
        ratios = {"rollout": [], "update": [], "iteration": []}
        for repeat in range(args.repeats + 1):
            times = [clock()]
            streams, episodes = ppo.rollout(policy, environments, config, repeat)
            times.append(clock())
            batch = ppo.collect(policy, streams, episodes, config, "formula")
            times.append(clock())
            ppo.update(policy, optimizers, batch, config, 0)
            times.append(clock())
            rows = [stream for streams_of_one in streams for stream in streams_of_one]
            with policy.rollout_weights() as model:
                bare_rollout(policy, model, rows)
            times.append(clock())
            for chosen in config.epochs * torch.randperm(len(rows)).split(config.minibatch_size):
                ordered = sorted((rows[i] for i in chosen), key=len)
                for i in range(0, len(ordered), micro):
                    bare_update(policy, ordered[i : i + micro])
                policy.zero_grad()
            times.append(clock())
            rollout, collect, update, sample, train = (b - a for a, b in zip(times, times[1:]))
            if repeat:  # the first one warms up
                ratios["rollout"].append(sample / rollout)
                ratios["update"].append(train / update)
                ratios["iteration"].append((sample + train) / (rollout + collect + update))
        print(f"{task}, up to {verify_iter} replies per episode:")
        for name, values in ratios.items():
            print(f"    {name} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"    {sum(sum(s.mask) for s in rows) / rollout:.0f} tokens/s sampled")


# -------- against a GPU's limits


def seconds(work, repeats: int = 1) -> float:
    """Of one call of `work`, after a first one to warm up."""
    work()
    start = clock()
    for _ in range(repeats):
        work()
    return (clock() - start) / repeats


def build(layers: int, width: int) -> sftrl.Policy:
    """Llama-3.2-Vision with `layers` blocks, every fifth with cross-attention, and the tiny tokenizer."""
    tokenizer = sftrl.build_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|image|>"]}, replace_extra_special_tokens=False
    )
    tokenizer.bos_token = "<|pad|>"
    text = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": int(3.5 * width)}
    text |= {"num_attention_heads": width // 128, "num_key_value_heads": max(1, width // 512)}
    text |= {"vocab_size": 128256, "cross_attention_layers": list(range(3, layers, 5)), "bos_token_id": 0}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    whole = layers == 40
    vision = {"image_size": 560, "num_hidden_layers": max(1, layers * 4 // 5)}
    vision |= {"num_global_layers": max(1, layers // 5), "vision_output_dim": 7680 if whole else 2560}
    vision["intermediate_layers_indices"] = [3, 7, 15, 23, 30] if whole else [0]
    image = {"image_token_index": tokenizer.convert_tokens_to_ids("<|image|>")}
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, **image)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = transformers.MllamaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    for name, p in model.named_parameters():
        if "gate" in name:
            p.data.fill_(0.5)
    pictures = transformers.MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)
    template = sftrl.CHAT_TEMPLATE.replace("<image>", "<|image|>")
    processor = transformers.MllamaProcessor(pictures, tokenizer, chat_template=template)
    return sftrl.Policy(model, processor).to(DEVICE).set_trainable(recompute=True)


def measure(args) -> None:
    size = 8192 if DEVICE.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * size**3 / seconds(lambda: a @ b, 10)
    x = torch.empty(size, size, 8, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    bandwidth = 2 * x.nbytes / seconds(lambda: y.copy_(x), 10)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}: ", end="")
    print(f"bf16 matmul {rate / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s")
    policy = build(args.layers, args.width)
    print(f"{policy.parameter_count / 1e9:.2f}e9 parameters in bf16")
    optimizers, n, micro = policy.optimizers(1e-6, 1e-5), args.rows, args.microbatch

    def speed(what: str, work) -> None:
        work()
        spent = policy.flops
        took = seconds(work) * 2
        spent = policy.flops - spent
        tokens = spent / (6 * policy.parameter_count)
        print(f"{what}: {tokens / took:.0f} tokens/s, {spent / took / rate:.0%} of the matmul rate")

    for task in ("gp-l", "gp-vl"):
        env = envs.make(task)
        records = [envs.demonstration(env, k % env.verify_iter) for k in range(n)]
        config = sft.SFTConfig(lr=1e-6, steps=10**9, batch_size=n, microbatch_size=micro)
        steps = sft.train(policy, optimizers, lambda step: records, config)
        speed(f"{task}: SFT step", lambda: next(steps))
        rl = ppo.PPOConfig(episodes=n, minibatch_size=n, microbatch_size=micro, epochs=1)
        streams, wrong = policy.streams(records), envs.Turn("", -1.0, "wrong_value", "", True)
        episodes = [envs.Episode("", [], [wrong for _ in s.replies]) for s in streams]
        batch = ppo.collect(policy, [[s] for s in streams], episodes, rl, env.fields[-1])
        speed(f"{task}: PPO update", lambda: ppo.update(policy, optimizers, batch, rl, 0))
        memory()
        for rows in args.batches:
            decode(f"{task}: decoding at batch {rows}", policy, bandwidth, env, rows, args.tokens)


def memory() -> None:
    if DEVICE.type == "cuda":
        print(f"    peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        torch.cuda.reset_peak_memory_stats()


def decode(what: str, policy, bandwidth: float, env, rows: int, tokens: int) -> None:
    """Tokens per second without the prompt's pass, as a share of the bandwidth's bound."""
    observation, _ = env.reset(seed=0)
    streams = [policy.open(observation.messages, observation.image) for _ in range(rows)]
    ids = torch.tensor([s.ids for s in streams], device=DEVICE)
    inputs = (
        policy._beside(policy.model, streams, torch.ones(ids.shape, dtype=torch.bool))
        if observation.image
        else {}
    )
    with torch.no_grad(), policy.rollout_weights() as model:
        one, more = (
            seconds(lambda: policy.sample(model, streams, length, 1.0, policy.generator("gpu")))
            for length in (1, tokens + 1)
        )
        cache = model(input_ids=ids, use_cache=True, **inputs)[policy._cache_argument]
    held = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers if x.is_initialized)
    bound, got = bandwidth / (2 * policy.parameter_count + held) * rows, rows * tokens / (more - one)
    print(f"{what}: {got:.0f} tokens/s, {got / bound:.0%} of the bandwidth's bound")
    memory()


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--gpu", action="store_true", help="a big model against the GPU's limits")
    parser.add_argument("--model", default="tiny", help="tiny, a folder or a Hub id, trained if possible")
    numbers = {"episodes": (512, "episodes per iteration"), "repeats": (5, "the median of this many")}
    numbers |= {"layers": (40, "blocks of the big model"), "width": (4096, "its width, a multiple of 128")}
    numbers |= {"rows": (32, "conversations of an update"), "microbatch": (8, "rows per forward pass")}
    numbers["tokens"] = 128, "tokens decoded per reply"
    for name, (default, text) in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="batch sizes of decoding")
    args = parser.parse_args()
    (measure if args.gpu else compare)(args)


if __name__ == "__main__":
    main()
