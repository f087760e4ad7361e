"""What one GPU makes of a big model: `python tests/benchmark_gpu.py` prints the tables for docs/gpus.md in
one call.

The model is Llama-3.2-Vision's architecture with random bf16 weights (`--layers 40` is the 11B one),
trained by RoundingAdamW with activations computed again; it is read from no disk and no network. For
GeneralPoints in words and in pictures:

    update     processed tokens per second of an SFT step and of a PPO update, and their 6 N FLOPs as a
               share of the measured matmul rate
    decode     tokens per second at several batch sizes, as a share of what memory bandwidth allows:
               weights and cache are read once per token
    memory     the peak
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import envs  # noqa: E402
import ppo  # noqa: E402
import sft  # noqa: E402
import sftrl  # noqa: E402


def seconds(device: torch.device, work, repeats: int = 1) -> float:
    """Of one call of `work`, after a first one to warm up."""
    work()
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait(device)
    return (time.perf_counter() - start) / repeats


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def limits(device: torch.device, size: int) -> tuple[float, float]:
    """FLOP/s of a bf16 matrix product, and bytes per second of a copy."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * size**3 / seconds(device, lambda: a @ b, 10)
    x = torch.empty(size, size, 8, device=device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return rate, 2 * x.nbytes / seconds(device, lambda: y.copy_(x), 10)


def build(device: torch.device, layers: int, width: int) -> sftrl.Policy:
    """Llama-3.2-Vision with so many blocks, every fifth of them with cross-attention, and so wide; the tiny
    model's words."""
    tokenizer = sftrl.build_tokenizer()
    vocabulary = 128256
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|image|>"]}, replace_extra_special_tokens=False
    )
    scale = width / 4096
    text = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": int(14336 * scale),
        "vocab_size": vocabulary,
        "num_attention_heads": width // 128,
        "num_key_value_heads": max(1, width // 512),
        "cross_attention_layers": list(range(3, layers, 5)),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": 0,
    }
    vision = {
        "image_size": 560,
        "num_hidden_layers": max(1, layers * 4 // 5),
        "num_global_layers": max(1, layers // 5),
        "intermediate_layers_indices": [0],
        "vision_output_dim": 2560,
    }
    if layers == 40:
        vision |= {"intermediate_layers_indices": [3, 7, 15, 23, 30], "vision_output_dim": 7680}
    config = transformers.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=tokenizer.convert_tokens_to_ids("<|image|>")
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = transformers.MllamaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    for name, p in model.named_parameters():
        if "gate" in name:
            p.data.fill_(0.5)
    images = transformers.MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)
    tokenizer.bos_token = "<|pad|>"
    processor = transformers.MllamaProcessor(
        images, tokenizer, chat_template=sftrl.CHAT_TEMPLATE.replace("<image>", "<|image|>")
    )
    return sftrl.Policy(model, processor).to(device).set_trainable(recompute=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=40,
        help="blocks of the language model; 40 is the 11B model (default: %(default)s)",
    )
    parser.add_argument(
        "--width", type=int, default=4096, help="its width, a multiple of 128 (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 64], help="batch sizes of decoding (default: 16 64)"
    )
    parser.add_argument(
        "--rows", type=int, default=32, help="conversations of an update (default: %(default)s)"
    )
    parser.add_argument(
        "--microbatch", type=int, default=8, help="conversations per forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens decoded per reply (default: %(default)s)"
    )
    args = parser.parse_args()
    device = sftrl.best_device()
    rate, bandwidth = limits(device, 8192 if device.type == "cuda" else 512)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}: "
        f"bf16 matmul {rate / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s"
    )
    policy = build(device, args.layers, args.width)
    print(f"{policy.parameter_count / 1e9:.2f}e9 parameters in bf16")
    optimizers = policy.optimizers(1e-6, 1e-5)
    for task in ("gp-l", "gp-vl"):
        env = envs.make(task)
        records = [envs.demonstration(env, k % env.verify_iter) for k in range(args.rows)]
        config = sft.SFTConfig(lr=1e-6, steps=10**9, batch_size=args.rows, microbatch_size=args.microbatch)
        steps = sft.train(policy, optimizers, lambda step: records, config)
        speed(f"{task}: SFT step", policy, device, rate, lambda: next(steps))
        rl = ppo.PPOConfig(
            episodes=args.rows, minibatch_size=args.rows, microbatch_size=args.microbatch, epochs=1
        )
        streams = policy.streams(records)
        episodes = [
            envs.Episode("", [], [envs.Turn("", -1.0, "wrong_value", "", True) for _ in s.replies])
            for s in streams
        ]
        batch = ppo.collect(policy, [[s] for s in streams], episodes, rl, env.fields[-1])
        speed(
            f"{task}: PPO update", policy, device, rate, lambda: ppo.update(policy, optimizers, batch, rl, 0)
        )
        if device.type == "cuda":
            print(f"    peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
            torch.cuda.reset_peak_memory_stats()
        for size in args.batches:
            decode(f"{task}: decoding at batch {size}", policy, device, bandwidth, env, size, args.tokens)


def speed(what: str, policy: sftrl.Policy, device: torch.device, rate: float, work) -> None:
    """One line on an update: tokens per second and share of the matmul rate."""
    work()
    spent = policy.flops
    work()
    spent = policy.flops - spent
    took = seconds(device, work)
    tokens = spent / (6 * policy.parameter_count)
    print(f"{what}: {tokens / took:.0f} tokens/s, {spent / took / rate:.0%} of the matmul rate")


def decode(
    what: str, policy: sftrl.Policy, device: torch.device, bandwidth: float, env, size: int, tokens: int
) -> None:
    """One line on decoding: tokens per second without the prompt's pass, and share of the bound by
    bandwidth."""
    observation, _ = env.reset(seed=0)
    streams = [policy.open(observation.messages, observation.image) for _ in range(size)]
    policy.rollout_batch = size
    took = []
    with torch.no_grad(), policy.rollout_weights() as model:
        for length in (1, tokens + 1):
            took.append(
                seconds(
                    device, lambda n=length: policy.sample(model, streams, n, 1.0, policy.generator("gpu"))
                )
            )
        ids = torch.tensor([s.ids for s in streams], device=device)
        inputs = policy._beside(streams, torch.ones(ids.shape, dtype=torch.bool)) if observation.image else {}
        cache = model(input_ids=ids, use_cache=True, **inputs)[policy._cache_argument]
    # Read per step: all weights, and the cache of the prompt and its picture.
    read = 2 * policy.parameter_count + sum(
        x.keys.nbytes + x.values.nbytes for x in cache.layers if x.is_initialized
    )
    speed_of_light, got = bandwidth / read * size, size * tokens / (took[1] - took[0])
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0
    share = f"{got / speed_of_light:.0%} of the bandwidth's bound"
    print(f"{what}: {got:.0f} tokens/s, {share}, {memory:.1f} GB")


if __name__ == "__main__":
    main()
