"""sftrl: does post-training teach a model the rule, or only its examples?

The entry point: models and their shards, run folders, the study, the command line.

    sftrl study --task gp-l                              # the whole comparison on the built-in tiny model
    sftrl ppo --model DIR --task gp-l --out runs/rl      # one stage on any chat model
    torchrun --nproc-per-node 8 sftrl.py ppo ...         # the same, sharded by FSDP
"""

from argparse import ArgumentError, ArgumentParser, Namespace
import gc
import json
import logging
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import envs
import evaluate
import ppo
import sft
from envs import Option, one_line

# -------- the tiny model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# Options of the tiny studies: ranks about 10 pixels high, walks of about 6 waypoints.
TINY_PICTURES = {"size": (128, 64), "font_size": 0.36, "jitter": 0.45}
TINY_WALKS = {"turns": 3, "points_per_leg": 1}
TINY_VIEWS = {"view_size": 64, "panorama_width": 256}


@cache  # takes seconds
def card_texts() -> list[str]:
    """Prompts, replies and feedback of the card tasks, for the tokenizer."""
    rng = random.Random(0)
    records = [sft.foundation_record(rng) for _ in range(500)] + sft.demonstrations("gp-l", 200)
    records += [sft.foundation_record(rng, **TINY_PICTURES) for _ in range(300)]
    records += [sft.reading_record(rng, **TINY_PICTURES) for _ in range(100)]
    records += sft.demonstrations("gp-vl", 100, **TINY_PICTURES)
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    formulas = ("1)", "(1", "1+", "1 1", "1/0", "x", "24=1=1", "24=1", "01", "1" * 300, "(" * 30, "1", "2")
    answers = [([], [], "")] + [(["A"] * 4, [1] * 4, formula) for formula in formulas]
    for reply in ["", *(json.dumps(dict(zip(envs.FIELDS, answer))) for answer in answers)]:
        texts.append(envs.judge(reply, ["A"] * 4, [1] * 4, 24, feedback=envs.PICTURE_FEEDBACK).feedback)
    return texts


@cache
def street_texts() -> list[str]:
    """The same for walks."""
    rng = random.Random(0)
    records = [sft.foundation_walk(rng, cities=sft.PICTURE_CITIES, **TINY_WALKS) for _ in range(500)]
    records += sft.demonstrations("virl-l", 100, **TINY_WALKS)
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    env = envs.make("virl-vl", **TINY_WALKS, **TINY_VIEWS)
    env.reset(seed=0)
    while not any(env.done):
        env.step(env.expert_reply())
    # Rare feedback, or of walks with pictures alone.
    rare = [envs.text_of(message["content"]) for message in env.messages]
    for report, there in (("nothing", False), ("nothing", True), ("an intersection", False), (None, True)):
        reply = json.dumps(dict(zip(envs.STREET_FIELDS, (report, "", ""))))
        here = envs.Waypoint((0, 0), 0, envs.NOTHING, there, "", "forward()")
        rare.append(envs.judge_step(reply, here).feedback)
    return texts + 50 * rare


# By model, the tokenizer's corpus and what always is one token: for cards numbers up to 13, digits, ranks,
# operators and field names; for streets words of directions and names.
TINY_MODELS = {
    "tiny": (card_texts, r'(?<![0-9])1[0-3](?![0-9])|[0-9]|[-+*/()=]|\b[AJQK]\b|(?<=")[a-z]+(?=")'),
    "tiny-streets": (
        street_texts,
        r"[0-9]+|(?:slightly )?(?:left|right)|(?:north|south)(?:east|west)?|east|west|\b[A-Z][a-z]+\b"
        r'|(?<=")[a-z ]+(?=": )',
    ),
}


def build_tokenizer(name: str = "tiny") -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the task's texts: fixed phrases become single tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    corpus, isolated = TINY_MODELS[name]
    texts = [text.replace("<image>\n", "<image>") for text in corpus()]  # as CHAT_TEMPLATE has it
    tokenizer, bytewise = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    split = pre_tokenizers.Split(Regex(isolated), "isolated")
    merged = bytewise(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, merged])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<image>", "<|system|>", "<|user|>", "<|assistant|>"]
    options = {"initial_alphabet": bytewise.alphabet(), "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, **options))
    named = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "additional_special_tokens": special[2:]}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **named
    )


def build_tiny(name: str = "tiny") -> tuple[transformers.PreTrainedModel, Any]:
    """One of TINY_MODELS, a Hugging Face Llava of about 1M random parameters, and its processor."""
    tokenizer = build_tokenizer(name)
    side, patch = 128, 32  # 16 patches: four for each card of a hand, stretched to a square
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    patches = {"image_size": side, "patch_size": patch}
    vision = transformers.CLIPVisionConfig(**sizes, **patches)
    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4}
    text = transformers.LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    features = {"vision_feature_select_strategy": "full"}
    image = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>"), "vision_feature_layer": -1}
    parts = {"vision_config": vision, "text_config": text}
    config = transformers.LlavaConfig(**parts, **image, **features, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaForConditionalGeneration(config)
    square = {"height": side, "width": side}
    pictures = transformers.CLIPImageProcessorPil(size=square, crop_size=square)
    options = {"patch_size": patch, "num_additional_image_tokens": 1, "chat_template": CHAT_TEMPLATE}
    return model, transformers.LlavaProcessor(pictures, tokenizer, **options, **features)


# -------- loading, sharding, saving


def best_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(gpu if torch.cuda.is_available() else "cpu")


def out_of_memory(error: BaseException) -> bool:
    """Whether the GPU's or the machine's memory is used up."""
    kinds = MemoryError, torch.OutOfMemoryError, BrokenExecutor  # the last: a worker was killed
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def on_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` on rank 0 returns or raises (ValueError, OSError), on all ranks. A collective call."""
    result: list[Any] = [None]
    if policy_rank() == 0:
        try:
            result = [work()]
        except (ValueError, OSError) as error:
            result = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


# The adapter is between vision tower and language model.
TRAINED = ("all", "language", "language+adapter")


class RoundingAdamW(torch.optim.AdamW):
    """AdamW for bf16 parameters and moments: 8 bytes per parameter with the gradient, not 16 as in fp32.
    Stochastic rounding, seeded by step and parameter, is unbiased; rounding to nearest loses every update
    below 2^-9 of the parameter."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            options = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
            options |= dict(zip(("beta1", "beta2"), group["betas"]))
            for k, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                stored = state["exp_avg"], state["exp_avg_sq"], p
                first, second, new = exact = [x.float() for x in stored]
                adamw([new], [p.grad.float()], [first], [second], [], [state["step"]], **options)
                random_bits = torch.Generator(p.device).manual_seed(int(state["step"]) * 1_000_003 + k)
                for old, x in zip(stored, exact):
                    # bf16 is the upper half of fp32: add a random lower half, then cut it
                    bits = x.view(torch.int32)
                    bits += torch.empty_like(bits).random_(0, 2**16, generator=random_bits)
                    bits &= -(2**16)
                    old.copy_(x)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for fp32 matrices: momentum orthogonalized by five Newton-Schulz iterations
    and scaled like AdamW. torch.optim.Muon computes in bf16, which is slow on many CPUs."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - 0.95)
                x = p.grad.lerp(momentum, 0.95)  # Nesterov's
                x = x.T if len(x) > len(x.T) else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
                x = x.T if x.shape != p.shape else x
                p.add_(x, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def read_model(name: str, dtype: torch.dtype, meta: bool) -> tuple[transformers.PreTrainedModel, Any]:
    """A model with weights of `dtype`, or its meta-device skeleton, and its processor."""
    if name in TINY_MODELS:
        model, processor = build_tiny(name)
        for p in model.parameters():
            p.data = p.data.to(dtype)  # buffers such as RoPE frequencies stay in fp32
        if meta:
            model.to("meta").tie_weights()  # untied by the move
        return model, processor
    if (Path(name) / "adapter_config.json").exists():  # ignored by the library without peft
        raise ValueError("it is a LoRA adapter: merge it into its base model (merge_and_unload of peft)")
    trust = {"trust_remote_code": False}  # or the library asks at the terminal
    config = transformers.AutoConfig.from_pretrained(name, **trust)
    processor = transformers.AutoProcessor.from_pretrained(name, **trust)
    # AutoModelForCausalLM would silently drop a vision tower.
    visual = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if visual else transformers.AutoModelForCausalLM
    if meta:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype, **trust), processor
    model, found = auto.from_pretrained(
        name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **trust
    )
    faults = sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]}))
    if faults:  # random weights, for the library
        fault = "of its weights are missing or of another shape than its config.json says"
        raise ValueError(f"{len(faults)} {fault}, first {faults[0]}")
    if decoding := model.generation_config:
        try:
            decoding.validate(strict=True)
        except ValueError:  # the library refuses to save a temperature without sampling
            decoding.do_sample = True
            decoding.validate(strict=True)
    return model, processor


def shard_like(p: Tensor, x: Tensor) -> Tensor:
    """This rank's part of a whole tensor of parameter p, on its device."""
    if isinstance(p, DTensor) and x.dim():
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return x.to(p.device)


class Policy(ppo.Policy):
    """The policy of ppo.py, loaded and saved in Hugging Face format, and on FSDP's shards (`load_shards`).
    `pictures`: whether the model must read pictures."""

    def __init__(self, model, processor, pictures: bool = False, **options):
        super().__init__(model, processor, **options)
        if pictures and getattr(processor, "patch_size", "") is None:
            advice = 'add "patch_size" to processor_config.json (CLIP: and "num_additional_image_tokens": 1)'
            raise ValueError(f"its processor has no patch_size: {advice}")
        architecture = type(model), model.config.to_json_string(), model.dtype, pictures
        if model.device.type != "meta" and architecture not in self._checked:
            check(self, pictures)
            self._checked.add(architecture)

    _checked: set = set()  # architectures that passed `check` in this process

    @classmethod
    def load(cls, name: str, device: torch.device | None = None, dtype=torch.float32, **options) -> "Policy":
        """Loads one of TINY_MODELS (random weights), a folder or a Hub id, and its value head (fp32); on the
        device "meta" without weights. Raises ValueError for a model that cannot be served."""
        device, folder, source = device or best_device(), Path(name), f"model {name!r}"
        if name not in TINY_MODELS and not folder.is_dir():
            if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
                built_in = " nor ".join(TINY_MODELS)
                raise ValueError(f"{source} is neither {built_in}, nor a folder, nor a Hub id (owner/name)")
            source += ", no folder, as a Hub id"
        try:
            model, processor = read_model(name, dtype, meta=device.type == "meta")
            policy = cls(model.to(device), processor, **options).to(device)
            tokens, rows = len(policy.tokenizer), model.get_input_embeddings().num_embeddings
            if tokens > rows:
                raise ValueError(f"its tokenizer has {tokens} tokens, its vocabulary {rows}")
            head = folder / "value_head.safetensors"
            if head.exists() and device.type != "meta":
                source = str(head)
                load_model(policy.value_head, head)
        except Exception as error:  # foreign code can raise anything
            if out_of_memory(error):
                raise
            reason = one_line(error if isinstance(error, (OSError, ValueError)) else repr(error))
            if "trust_remote_code" in str(error):
                reason = "its code (auto_map) is not run: take a model that transformers has"
            raise ValueError(f"{source} cannot be loaded: {reason}") from None
        return policy

    @classmethod
    @torch.no_grad()
    def load_shards(
        cls, name: str, param_dtype: torch.dtype, train: str = "all", recompute: bool = False, **options
    ) -> "Policy":
        """`load` and `set_trainable`, on FSDP2's shards of every block, then of the root. Rank 0 alone reads
        files, and broadcasts tensor by tensor, or its error. A collective call."""
        source: dict[str, Tensor] = {}  # on rank 0; some buffers (RoPE frequencies) are in no checkpoint

        def read() -> tuple:
            whole = cls.load(name, torch.device("cpu"), **options)
            source.update([*whole.named_parameters(), *whole.named_buffers()])
            return type(whole.model), whole.model.config, whole.model.generation_config, whole.processor

        architecture, config, generation, processor = on_rank_0(read)
        with torch.device("meta"):
            model = architecture(config)
        model.generation_config = generation
        policy = cls(model, processor, **options).to("meta")
        policy.set_trainable(train, recompute)
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        for block in reversed(policy._blocks()):  # inner ones first
            fully_shard(block, mp_policy=precision)
        fully_shard(policy.value_head)  # stays in fp32
        policy.sharded = True
        fully_shard(policy, mp_policy=precision)
        policy.to_empty(device=best_device())
        policy.model.tie_weights()
        for key, p in (*policy.named_parameters(), *policy.named_buffers()):
            x = source[key] if source else torch.empty(p.shape, dtype=p.dtype)
            x = x.to(p.device).contiguous()
            dist.broadcast(x, 0)
            p.copy_(shard_like(p, x))
        # Gathers, and so initializes, every block: those that a task never uses (vision, for text) would
        # break gradient accumulation.
        policy(policy.collate([ppo.Stream([policy.end_id] * 2, [0, 1])]), values="detached")
        with policy.rollout_weights():
            return policy

    def set_trainable(self, train: str = "all", recompute: bool = False) -> "Policy":
        """Sets the trained part (of TRAINED) and activation checkpointing (`recompute`); before sharding."""
        modules = {"adapter": {"multi_modal_projector", "merger"}}
        modules["tower"] = {"vision_tower", "vision_model", "visual"}
        for name, p in self.model.named_parameters():
            part = next((k for k, names in modules.items() if names & set(name.split("."))), "language")
            p.requires_grad_(train == "all" or part in train.split("+"))
        options = {"use_reentrant": False, "preserve_rng_state": False}  # without dropout there is none
        for block in self._blocks() if recompute else ():
            block.forward = partial(checkpoint, block.forward, **options)
        return self

    def _blocks(self) -> list[nn.Module]:
        return [m for m in self.model.modules() if type(m).__name__ in (self.model._no_split_modules or ())]

    def _gather(self, x: Tensor) -> Tensor | None:
        """The whole tensor, on rank 0's CPU alone. A collective call."""
        x = x.detach()
        x = x.full_tensor() if isinstance(x, DTensor) else x
        return x.cpu() if self.rank == 0 else None

    def save(self, folder: Path) -> None:
        """Writes the model in Hugging Face format and the value head. A collective call: rank 0 gathers the
        weights in host memory."""
        parameters = dict.fromkeys(self.state_dict(keep_vars=True).values())  # tied weights have two names
        whole = {x: self._gather(x) for x in parameters}
        if self.rank == 0:
            model, head = (
                {name: whole[x].contiguous() for name, x in part.state_dict(keep_vars=True).items()}
                for part in (self.model, self.value_head)
            )
            self.model.save_pretrained(folder, state_dict=model, max_shard_size="5GB")
            self.processor.save_pretrained(folder)
            save_file(head, folder / "value_head.safetensors")

    def state(self, optimizers: ppo.Optimizers) -> dict[str, Tensor]:
        """Whole tensors in rank 0's host memory: a parameter as `name`, its optimizer's state as `name/key`.
        A collective call."""
        tensors = dict(self.named_parameters())
        states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
        for name, p in self.named_parameters():
            tensors |= {f"{name}/{key}": x for key, x in states.get(p, {}).items()}
        return {name: self._gather(x) for name, x in tensors.items()}

    @torch.no_grad()
    def set_state(self, tensors: dict[str, Tensor], optimizers: ppo.Optimizers) -> None:
        """Restores what `state` returned, on any number of ranks; each gets all tensors."""
        self.reshard()
        optimizer_of = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
        for key, x in tensors.items():
            name, _, moment = key.partition("/")
            p = self.get_parameter(name)
            if moment:
                optimizer_of[p].state[p][moment] = shard_like(p, x).clone()
            else:
                p.copy_(shard_like(p, x))

    # ---- training on shards

    @contextmanager
    def rollout_weights(self) -> Iterator[nn.Module]:
        """The model to sample from. Shards are gathered once, since ranks sample different lengths."""
        if not self.sharded:
            with super().rollout_weights() as model:
                yield model
            return
        modules = [module for module in self.modules() if isinstance(module, FSDPModule)]
        self.set_reshard_after_forward(False)
        for module in modules:
            module.unshard()
        try:
            yield self.model
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self, recurse=False)

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """As in ppo.Policy. FSDP averages gradients over ranks; here they are summed."""
        if self.sharded:
            self.set_requires_gradient_sync(last)
            self.set_is_last_backward(last)
            loss = loss * self.world
        loss.backward()

    def optimizers(
        self, lr: float, value_lr=0.0, betas=(0.9, 0.98), eps=1e-7, weight_decay=0.0, muon=False
    ) -> ppo.Optimizers:
        """AdamW (RoundingAdamW in bf16) on the trained part of the model and, at `value_lr`, the value head;
        with `muon`, Muon on the language model's fp32 matrices: pre-training takes half the steps."""
        settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        adam = partial(torch.optim.AdamW, fused=True, **settings)
        bf16, matrices, rest = self.model.dtype == torch.bfloat16, [], []
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                matrix = muon and not bf16 and p.ndim == 2 and "language_model.layers" in name
                (matrices if matrix else rest).append(p)
        optimizers = [RoundingAdamW(rest, lr, **settings) if bf16 else adam(rest, lr)]
        if value_lr:
            optimizers.append(adam(self.value_head.parameters(), value_lr))
        if matrices:
            optimizers.append(Muon(matrices, lr))
        return optimizers


# -------- is a model sampled from its distribution?


@torch.no_grad()
def check(policy: Policy, pictures: bool) -> None:
    """Samples two conversations of two turns. Raises ValueError if their log-probabilities differ from those
    of `forward`, or their first tokens' from a plain call of the model: by over 1e-3 in fp32, or .1 in the
    mean in bf16."""
    flops = policy.flops
    image = Image.effect_noise((64, 64), 100).convert("RGB") if pictures else None
    prompts = [envs.parts_of(text) if pictures else text for text in ("1?", "Make 24 from 1, 2, 3, 4.")]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    player = ppo.Player(policy, policy.model, 5, 1.0, torch.Generator().manual_seed(0))
    plain = torch.stack([policy.plain_logp(messages, image) for messages in conversations])
    if not plain.isfinite().all():
        raise ValueError("with its weights, log-probabilities are not finite")
    for _ in range(2):
        replies = player([0, 1], [envs.Observation(messages, image) for messages in conversations])
        for messages, reply in zip(conversations, replies):
            messages += ({"role": "assistant", "content": reply}, {"role": "user", "content": "No."})
    batch = policy.collate([player.streams[i][0] for i in (0, 1)])
    gap = (policy(batch)["logp"] - batch["sampled_logp"])[batch["mask"] > 0].cpu()
    first = batch["mask"].argmax(1, keepdim=True)
    ids, sampled = (batch[key].gather(1, first).cpu() for key in ("ids", "sampled_logp"))
    gap, policy.flops = torch.cat([gap, (plain.gather(1, ids) - sampled)[:, 0]]).abs(), flops
    exact = policy.model.dtype == torch.float32 and policy.model.device.type == "cpu"
    if not (gap.max() < 1e-3 if exact else gap.mean() < 0.1):
        name = type(policy.model).__name__
        raise ValueError(f"{name} cannot be served: its log-probabilities differ by up to {gap.max():.2g}")


# -------- run folders


class NotSaved(Exception):
    """Files could not be written; previous ones are intact."""


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turns errors of writing to a path, from whichever library, into NotSaved."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise NotSaved(f"{path} could not be written: {one_line(error)}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder that appears at `path` whole or, with NotSaved, not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with saving(path):
            remove(temporary)
            yield temporary
            for part in (*temporary.rglob("*"), temporary):  # onto the disk
                descriptor = os.open(part, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
            os.replace(temporary, path)
    finally:
        remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    """The same for JSONL."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def remove(path: Path) -> None:
    """Deletes a file or (whole or not at all) a folder, if it exists."""
    if path.is_dir():
        renamed = path.with_name("removed.tmp")
        shutil.rmtree(renamed, ignore_errors=True)
        shutil.rmtree(path.rename(renamed))
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and holds its lock; the kernel frees it if the process is killed. Raises ValueError if
    another process holds it; warns where there are no locks."""
    new, path = not folder.exists(), folder / ".sftrl.lock"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl  # not on Windows

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (path.exists() and os.path.samefile(path, file.fileno())):  # just deleted
                raise BlockingIOError
        except BlockingIOError:
            raise ValueError(f"another process writes to {folder}: wait, or choose another --out") from None
        except (ImportError, OSError) as error:
            warnings.warn(f"{folder} cannot be locked against a second process: {one_line(error)}")
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                if new:
                    folder.rmdir()  # which is empty if the command was refused


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM (torchrun's) in a list, so that the update in progress is finished and
    saved; a second Ctrl-C raises KeyboardInterrupt."""
    received: list[int] = []

    def record(number: int, frame) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {n: signal.signal(n, record) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(name: str, total: float) -> Iterator[Callable[..., None]]:
    """A progress bar on rank 0; a line every half minute from a worker, or where stderr is no terminal.
    Yields a function of the amount done and metrics to display."""
    form, options = "{l_bar}{bar:20}| {elapsed}<{remaining}{postfix}", {}
    if multiprocessing.parent_process() or not sys.stderr.isatty():
        form, options = form + "\n", {"mininterval": 30, "maxinterval": 60}
    with tqdm(desc=name, total=total, disable=policy_rank() > 0, bar_format=form, **options) as bar:

        def show(done: float, **metrics: float) -> None:
            bar.set_postfix(metrics, refresh=False)
            bar.update(done - bar.n)

        yield show


def read_lines(path: Path) -> list[dict]:
    """Lines of a JSONL file, without one that a kill cut short."""
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; other folders and links are ignored."""
    named = [path for path in folder.glob("*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of)


def resume(folder: Path, settings: dict, policy: Policy, optimizers: ppo.Optimizers) -> tuple[int, float]:
    """Loads a run's resume state, if any; returns its step and FLOPs. Drops later checkpoints and log lines.
    Writes config.json for a new run."""
    path, step, flops = folder / "resume.pt", 0, 0.0
    if path.exists():
        advice = "; damaged, or of another version: remove it to train from the start"
        with envs.reading(path, advice):  # memory-mapped: one copy for all ranks of a node
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            tensors, step, flops = state["tensors"], state["step"], state["flops"]
        policy.set_state(tensors, optimizers)
    if policy.rank > 0:
        return step, flops
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"python": sys.version, "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        config = {"settings": settings, "versions": versions, "git": None}
        command = ["git", "-C", Path(__file__).resolve().parent, "rev-parse", "HEAD"]
        with suppress(OSError):  # no git
            config["git"] = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
        write_text(folder / "config.json", json.dumps(config, indent=1))
    for path in checkpoints(folder):
        if step_of(path) > step:
            remove(path)
    for name in ("metrics.jsonl", "samples.jsonl"):
        write_lines(folder / name, [line for line in read_lines(folder / name) if line["step"] <= step])
    return step, flops


def append_line(path: Path, line: dict) -> None:
    """Appends to a JSONL file, on rank 0."""
    if policy_rank() == 0:
        with saving(path), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def trainer(policy: Policy, config, data: Callable) -> tuple[ppo.Optimizers, Callable]:
    """Optimizers, and sft.train or ppo.train as a function of step and FLOPs. Raises ValueError for
    sizes that ranks cannot share and demonstrations that the policy cannot read."""
    for name in ("batch_size", "episodes", "minibatch_size"):
        if (size := getattr(config, name, 0)) % policy.world:
            raise ValueError(f"--{name.replace('_', '-')} {size} cannot be shared by {policy.world} ranks")
    adam = config.betas, config.eps, config.weight_decay
    if isinstance(config, sft.SFTConfig):
        policy.check_lengths(map(data, range(config.steps)), config.flops)
        optimizers = policy.optimizers(config.lr, 0.0, *adam, config.muon)
        return optimizers, partial(sft.train, policy, optimizers, data, config)
    environments = [data() for _ in range(config.episodes // policy.world)]
    seeds = (ppo.episode_seeds(policy, len(environments), config, k) for k in range(config.steps))
    starts = (start for step_seeds in seeds for start in zip(environments, step_seeds))
    policy.check_lengths(([envs.demonstration(env, start=(x, None))] for env, x in starts), config.flops)
    if config.kl_coef:
        policy.keep_initial_weights()
    optimizers = policy.optimizers(config.lr, config.value_lr, *adam)
    return optimizers, partial(ppo.train, policy, optimizers, environments, config)


DISPLAYED = ("loss", "lr", "success", "return", "approx_kl", "explained_variance")  # on the progress bar


def train_run(
    folder: Path,
    load: Callable[[], Policy],
    config: sft.SFTConfig | ppo.PPOConfig,
    data: Callable,
    settings: dict,
    count: int = 1,
    keep: int | None = None,
) -> None:
    """Trains a run in its folder (docs/metrics.md), from its resume state to its end, unless it is finished.

    Args:
        data: for SFT `data(step)` returns the records of a step, for PPO `data()` a new environment.
        settings: of model and data, for config.json.
        count: checkpoints to write, at progress (k / count)^2: out-of-distribution success moves early.
        keep: newest checkpoints to keep; None: all.

    Raises ValueError, before the folder exists, for settings that do not fit the model, the ranks or the
    folder's run; KeyboardInterrupt after Ctrl-C, once the update in progress is saved.
    """
    # Strict JSON: tuples as lists, no limit as null.
    settings = json.loads(json.dumps(settings | vars(config)), parse_constant=lambda _: None)
    written = folder / "config.json"
    old = json.loads(written.read_text())["settings"] if written.exists() else settings
    changed = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
    if changed:
        fault = f"{folder} holds a run with other settings ({', '.join(changed)})"
        raise ValueError(f"{fault}: choose another --out, or remove it")
    ended = {line["step"] for line in read_lines(folder / "metrics.jsonl") if line["progress"] >= 1}
    if ended.intersection(map(step_of, checkpoints(folder))):
        return
    policy = load()
    optimizers, train = trainer(policy, config, data)
    step, flops = resume(folder, settings, policy, optimizers)
    progress = max(step / config.steps, flops / config.flops)
    save_every = 50 if isinstance(config, sft.SFTConfig) else 5
    writes, bar = policy.rank == 0, progress_bar("/".join(folder.parts[-2:]), 1)
    with deferred_interrupt() as signals, bar as show:
        for metrics in train(step, flops):
            before, step, progress = progress, metrics["step"], metrics["progress"]
            transcript = metrics.pop("transcript", None)
            show(min(progress, 1), **{name: metrics[name] for name in DISPLAYED if name in metrics})
            append_line(folder / "metrics.jsonl", metrics)
            if transcript:
                append_line(folder / "samples.jsonl", {"step": step} | transcript)
            if due := any(before < (k / count) ** 2 <= progress for k in range(1, count + 1)):
                path = folder / f"checkpoint-{step}"
                with atomic_write(path) if writes else nullcontext(path) as temporary:
                    policy.save(temporary)
            interrupted = policy.largest(bool(signals))  # on any rank
            if due or interrupted or step % save_every == 0:
                # Randomness, a function of (seed, step), has no state.
                state = {"tensors": policy.state(optimizers), "step": step, "flops": metrics["flops"]}
                if writes:
                    with atomic_write(folder / "resume.pt") as temporary:
                        torch.save(state, temporary)
                for old in checkpoints(folder)[:-keep] if keep and writes else ():
                    remove(old)
            if interrupted:
                raise KeyboardInterrupt


# -------- the study


def load_policy(model: str, pictures, weights="float32", train="all", recompute=False, **options) -> Policy:
    """The policy on this process's device, sharded if there are several; options as in OPTIONS."""
    options["pictures"] = pictures
    if torch.cuda.is_available():
        gc.collect()  # frees an old policy in reference cycles (FSDP's hooks, recomputed blocks)
    if not dist.is_initialized():
        policy = Policy.load(model, dtype=getattr(torch, weights), **options)
        return policy.set_trainable(train, recompute)
    if weights != "float32":
        raise ValueError("--weights bfloat16 is for one process: FSDP keeps fp32 weights, computes in bf16")
    precision = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return Policy.load_shards(model, precision, train, recompute, **options)


class Arm(NamedTuple):
    """A training run of a study, and how its checkpoints are evaluated. Arms with one name share the run."""

    name: str  # of its folder, and in results.jsonl
    algorithm: str = "sft"  # or "rl"
    start: str = "init"  # from this arm's last checkpoint; "NAME@K": its K-th
    training: dict = {}  # overrides the study's settings for the algorithm
    environment: dict = {}  # overrides the study's options, in training
    records: str = "expert"  # what SFT learns from, one of sft.RECORDS
    loading: dict = {}  # overrides the command line's options of the model
    checkpoints: int | None = None  # None: the study's
    # Of the last checkpoint, on all hands (None: the study's). Earlier ones, and the last without any, are
    # evaluated at temperature 1 on a quarter of the hands.
    temperatures: tuple[float, ...] | None = None
    curve: bool = True  # whether earlier ones are evaluated
    validate: bool = False  # also on validation deals, to choose the best checkpoint
    series: str = "test"  # of deals or routes
    verify_iter: int | None = None  # replies judged in evaluation; None: the study's
    pictures: str = "own"  # or a control, see `evaluate.PICTURES`


@dataclass
class Study:
    """The settings of `sftrl study` for one task and the tiny model."""

    base: sft.SFTConfig | None  # None: the model is the base
    sft: sft.SFTConfig
    rl: ppo.PPOConfig
    init: dict  # overrides `sft` for the init
    rates: dict  # learning rates by arm, see docs/results.md; else that of "sft" or "rl"
    options: dict  # of the environments, small enough for the tiny model
    flops: float  # of each arm, after init
    count: int = 6  # checkpoints of each arm
    hands: int = 1024  # or routes, in the evaluation of a checkpoint
    temperatures: tuple[float, ...] = (1.0, 0.0)  # 0 is greedy
    verify_iter: int = 3  # in training and evaluation; the paper's 5 doubles the time
    model: str = "tiny"  # built-in, or a folder or Hub id
    grid: tuple[float, ...] = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)  # rates of the frontier

    def for_model(self, model: str) -> "Study":
        """For a user's model: the full task, as many tokens, the rates of `sftrl sft` and `ppo`."""
        flops = self.flops * Policy.load(model, torch.device("meta")).parameter_count / TINY_PARAMETERS
        rl = replace(self.rl, value_lr=ppo.PPOConfig.value_lr, max_new_tokens=256)
        rates = {"init": sft.SFTConfig.lr}
        return replace(self, base=None, rl=rl, rates=rates, flops=flops, model=model, options={})

    def config(self, arm: Arm) -> sft.SFTConfig | ppo.PPOConfig:
        """The training settings of an arm."""
        usual = self.sft if arm.algorithm == "sft" else self.rl
        lr = self.rates.get(arm.name, self.rates.get(arm.algorithm, usual.lr))
        return replace(usual, **{"lr": lr, "flops": self.flops} | arm.training)


TINY_PARAMETERS = 1_128_832
_SFT = {"microbatch_size": 8, "loss_on": "last"}
_RL = {"value_lr": 3e-3, "epochs": 1, "steps": 10**9, "warmup": 0.1, "max_new_tokens": 48}
_CARDS = Study(
    base=sft.SFTConfig(lr=3e-3, batch_size=64, steps=800, warmup=0.05, muon=True, **_SFT),
    init=_SFT | {"steps": 60},
    sft=sft.SFTConfig(batch_size=64, microbatch_size=16, steps=10**9),
    rl=ppo.PPOConfig(episodes=512, minibatch_size=64, microbatch_size=16, **_RL),
    rates={"init": 3e-4, "sft": 1e-3, "rl": 2e-4},
    options={},
    flops=1.6e13,
)
_WALKS = replace(
    _CARDS,
    base=replace(_CARDS.base, steps=150, loss_on="all"),
    init={"microbatch_size": 8, "steps": 60},
    sft=replace(_CARDS.sft, microbatch_size=8),
    rl=replace(_CARDS.rl, episodes=256, minibatch_size=32, microbatch_size=8),
    flops=3.2e13,
    count=4,
    hands=256,
    verify_iter=2,
    model="tiny-streets",
    rates=_CARDS.rates | {"rl": 5e-4},
    options=TINY_WALKS,
)
STUDIES = {
    "gp-l": replace(
        _CARDS,
        rates=_CARDS.rates
        | {"dft": 2e-4, "self-sft": 2e-4, "rl-kl": 5e-4, "diverse-sft": 1e-3, "diverse-rl": 2e-4}
        | {"sft-revision": 5e-4, "rl-reply": 2e-4},
    ),
    "gp-vl": replace(
        _CARDS,
        base=replace(_CARDS.base, steps=1200),
        init=_CARDS.init | {"steps": 120},
        rl=replace(_CARDS.rl, minibatch_size=128),
        rates=_CARDS.rates | {"sft": 5e-4},
        options=TINY_PICTURES,
    ),
    "virl-l": replace(_WALKS, rates=_WALKS.rates | {"rl-kl": 1e-3}),
    # Every waypoint is a row of tokens: short walks, or a seed would take hours.
    "virl-vl": replace(
        _WALKS,
        base=replace(_WALKS.base, steps=800),
        rl=replace(_WALKS.rl, episodes=128, minibatch_size=16, max_new_tokens=80),
        rates=_CARDS.rates | {"sft": 5e-4},
        flops=1e13,
        count=3,
        hands=128,
        options=TINY_WALKS | {"turns": 2} | TINY_VIEWS,
    ),
}
# A small world, for a look at the finding in minutes.
LOOK = replace(
    _CARDS,
    base=replace(_CARDS.base, steps=240),
    init=_CARDS.init | {"steps": 30},
    sft=replace(_CARDS.sft, batch_size=32),
    rl=replace(_CARDS.rl, episodes=256),
    flops=2.5e12,
    count=2,
    hands=516,
    temperatures=(1.0,),
    verify_iter=2,
    options={"n_cards": 3, "target": 12, "verify_iter": 2},  # of the base's corpus too
)
# PPO as in the paper (sections 4 and C), except rates and sizes.
PAPERS_PPO = {"ratio": "reply", "thought_coef": 0.5, "value_trunk": "shared", "clip": 0.1}


def main_arms(study: Study) -> list[Arm]:
    """The main comparison: SFT and RL at equal compute from one init, a short SFT that teaches the format of
    replies on demonstrations as imperfect as the base's corpus."""
    training = study.init | {"flops": math.inf}
    init = Arm("init", start="base", training=training, records="imperfect", checkpoints=1)
    return [init, Arm("sft", validate=True), Arm("rl", "rl")]


def arms_of(study: Study, experiment: str, cls: type[envs.Environment]) -> list[Arm]:
    """The arms of an experiment beside the main ones, without those whose options the environment lacks; none
    for "main" and "forgetting", which compares the others."""
    main = init, demonstrated, reinforced = main_arms(study)
    rate, last, diverse = study.config(reinforced).lr, partial(Arm, checkpoints=1), {"diverse": True}
    budgets = [last(f"rl-budget-{k}", "rl", environment={"verify_iter": k}) for k in (1, 3, 5, 10)]
    runs = [
        Arm(f"{algorithm}-{lr:g}", algorithm, training={"lr": lr}, series="valid", temperatures=(1.0,))
        for algorithm in ("sft", "rl")
        for lr in study.grid
    ]
    end = {"curve": False, "validate": False, "temperatures": (1.0,)}  # the last checkpoint alone, sampled
    dft = Arm("dft", training={"objective": "dft"})
    control = last("sft-at-dft-rate", training={"lr": study.config(dft).lr})
    arms = {
        # Rates are compared on validation deals; tests follow for the chosen ones.
        "frontier": [init._replace(**end, series="valid"), *runs],
        "look": [Arm("sft-tenth", training={"lr": study.config(demonstrated).lr / 10})],
        "no-init": [last(f"no-init-{lr:g}", "rl", "base", {"lr": lr}) for lr in (rate / 2, rate, rate * 2)],
        # An evaluation with 10 replies covers all smaller budgets.
        "verification": [arm._replace(**end, verify_iter=10) for arm in (init, demonstrated, *budgets)],
        "start": [last(f"rl-from-sft-{k}", "rl", f"sft@{k}") for k in range(1, study.count + 1)],
        "recognition": [arm._replace(**end, pictures=p) for arm in main for p in evaluate.PICTURES],
        "revision-sft": [Arm("sft-revision", training={"loss_on": "last"}, records="revision")],
        "sft-search": [
            last(f"sft-{parts}-{lr:g}", training={"lr": lr}, loading={"train": parts})
            for parts in TRAINED
            for lr in study.grid[::2]
        ],
        "reply-ratio": [Arm("rl-reply", "rl", training=PAPERS_PPO)],
        "rivals": [
            dft,
            *([control] if study.config(control).lr != study.config(demonstrated).lr else []),
            Arm("self-sft", "rl", training={"objective": "imitate"}),
            Arm("rl-kl", "rl", training={"kl_coef": 0.1}),
            Arm("diverse-sft", environment=diverse),
            Arm("diverse-rl", "rl", environment=diverse),
        ],
    }.get(experiment, [])
    return [arm for arm in arms if arm.environment.keys() <= envs.options_of(cls).keys()]


def experiments_of(cls: type[envs.Environment]) -> list[str]:
    """The experiments of a task; some need pictures, the look cards in words."""
    other = set() if cls.pictures else {"recognition", "sft-search"}
    other |= set() if cls is envs.GeneralPoints else {"look"}
    return ["main", *(name for name in evaluate.SECTIONS if name not in other)]


@dataclass(eq=False)
class StudyRun:
    """A study in its folder: trains and evaluates arms, and resumes each."""

    task: str  # by name, or FILE.py:CLASS
    study: Study
    out: Path
    loading: dict  # options of `load_policy`
    workers: int = 1
    pool: ProcessPoolExecutor | None = None  # of so many workers, which run the jobs

    def __post_init__(self):
        self.quarter = max(2, self.study.hands // 4)  # for earlier checkpoints
        self.prefix = f"{self.out}{os.sep}"  # left out of what is written, for the folder may move
        self.results = read_lines(self.out / "results.jsonl")
        self.cls = envs.task_class(self.task)
        self.options = {"verify_iter": self.study.verify_iter} | self.study.options
        self.running: dict[Future, tuple] = {}

    def __reduce__(self):  # in a worker, with the results so far
        return StudyRun, (self.task, self.study, self.out, self.loading)

    def load(self, model: str, **loading) -> Policy:
        """A policy for this study's task."""
        return load_policy(model, self.cls.pictures, **self.loading | loading)

    def environment(self, variant: str = "id", series: str = "train", **options) -> envs.Environment:
        """An environment of the study; routes of the series "valid" and "test" differ from training's."""
        split = {"split": series} if "split" in envs.options_of(self.cls) else {}
        return self.cls(variant, **self.options | split | options)

    def checkpoints(self, name: str, seed: int) -> list:
        """The checkpoints of an arm; all seeds share the base, here or a user's model."""
        if name == "base" and not self.study.base:
            return [self.study.model]
        return checkpoints(self.out / (name if name == "base" else f"seed-{seed}/{name}"))

    # ---- training

    def train_base(self) -> None:
        """The tiny foundation model, from random weights on a mixed corpus."""
        torch.manual_seed(0)
        study = self.study
        corpus = sft.foundation_batches(self.task, study.base.batch_size, study.options)
        settings = {"stage": "base", "options": study.options}
        train_run(self.out / "base", lambda: self.load(study.model), study.base, corpus, settings)

    def train(self, arm: Arm, seed: int) -> None:
        """One arm, unless it is finished."""
        self.reference.cache_clear()  # training needs its memory
        torch.manual_seed(seed)  # of a new value head
        start, _, number = arm.start.partition("@")
        found = self.checkpoints(start, seed)
        model = found[: int(number or len(found))][-1]
        config, make = self.study.config(arm), partial(self.environment, **arm.environment)
        settings = {"task": self.task, "arm": arm.name, "seed": seed}
        settings["model"] = str(model).removeprefix(self.prefix)
        settings |= {"options": self.options | arm.environment, "records": arm.records}
        settings |= self.loading | arm.loading
        if arm.algorithm == "sft":
            label = f"{arm.records}/{seed}"
            data = sft.fresh_batches(make(), sft.RECORDS[arm.records], config.batch_size, label)
        else:
            config, data = replace(config, seed=seed), make
        folder, count = self.out / f"seed-{seed}" / arm.name, arm.checkpoints or self.study.count
        load = partial(self.load, str(model), **arm.loading)
        train_run(folder, load, config, data, settings, count)

    # ---- evaluation

    @lru_cache(maxsize=1)
    def reference(self, seed: int) -> evaluate.Reference:
        """A seed's init, from which distances are measured."""
        return evaluate.Reference(self.load(str(self.checkpoints("init", seed)[-1])))

    def measure(self, arm: Arm, seed: int, number: int, experiment: str) -> None:
        """Evaluates checkpoint `number` (from 1) of an arm, at the points (hands, series, variant,
        temperature) that results.jsonl lacks; writes two episodes of each to transcripts.jsonl."""
        study, paths = self.study, self.checkpoints(arm.name, seed)
        if number > len(paths) or number < len(paths) and not arm.curve:
            return
        path, line = paths[number - 1], {"step": 0, "flops": 0.0}
        temperatures = study.temperatures if arm.temperatures is None else arm.temperatures
        points = [(study.hands, arm.series, v, t) for t in temperatures for v in self.cls.variants]
        if number < len(paths) or not points:
            points = [(self.quarter, arm.series, v, 1.0) for v in self.cls.variants]
        if arm.validate:
            points.append((self.quarter, "valid", "id", 1.0))
        if isinstance(path, Path):
            line = next(x for x in read_lines(path.parent / "metrics.jsonl") if x["step"] == step_of(path))
        budget = arm.verify_iter or study.verify_iter
        same = {"arm": arm.name, "seed": -1 if arm.name == "base" else seed, "step": line["step"]}
        same |= {"verify_iter": budget, "pictures": arm.pictures}
        names = "episodes", "series", "variant", "temperature"
        points = [p for p in points if not evaluate.find(self.results, **same, **dict(zip(names, p)))]
        if not points:
            return
        policy = self.load(str(path))
        with progress_bar(f"seed-{seed}/{arm.name} evaluation {number}", len(points)) as show:
            for done, (hands, series, variant, temperature) in enumerate(points, 1):
                reference = self.reference(seed) if temperature > 0 and arm.pictures == "own" else None
                environments = [self.environment(variant, series, verify_iter=budget) for _ in range(hands)]
                how = temperature, study.rl.max_new_tokens, series, reference
                result, episodes = evaluate.evaluate(policy, environments, *how, pictures=arm.pictures)
                key = same | {"series": series, "temperature": temperature, "variant": variant}
                point = {"task": self.task, "experiment": experiment, **key, "flops": line["flops"], **result}
                self.results.append(point | {"checkpoint": str(path).removeprefix(self.prefix)})
                append_line(self.out / "results.jsonl", self.results[-1])
                for episode in episodes[:2]:
                    append_line(self.out / "transcripts.jsonl", key | episode.transcript())
                show(done)

    # ---- experiments

    def compare(self, experiments: Sequence[str], seeds: int, note: str) -> None:
        """Trains and evaluates all arms of experiments; reports after every seed, and prints the claims."""
        for name in ("results.jsonl", "transcripts.jsonl") if policy_rank() == 0 else ():
            write_lines(self.out / name, read_lines(self.out / name))  # without a line that was cut short
        jobs = [job for seed in range(seeds) for name in experiments for job in self.jobs(name, seed)]
        for seed in range(seeds):
            while any(seed == job[2] for job in (*jobs, *self.running.values())):
                self.advance(jobs)
            if "frontier" in experiments and seed == seeds - 1:
                chosen = evaluate.chosen_arms(self.points(range(seeds)), self.cls.headline).values()
                for s, name in sorted({run for arms in chosen for run in arms.items()}):
                    last = len(self.checkpoints(name, s))
                    jobs.append((self.measure, Arm(name, curve=False), s, last, "frontier"))
                while jobs or self.running:
                    self.advance(jobs)
            if policy_rank() == 0:
                print(f"\n{self.report(range(seed + 1), note)}", flush=True)

    def jobs(self, experiment: str, seed: int) -> list[tuple]:
        """Methods and their arguments: trainings, then the evaluation of each checkpoint."""
        arms = main_arms(self.study)[: 1 if experiment == "frontier" else 3]
        arms += arms_of(self.study, experiment, self.cls)
        jobs = [(self.train, arm, seed) for arm in arms]
        for arm in [Arm("base", checkpoints=1, temperatures=())] * (experiment == "main" and not seed) + arms:
            for number in range(1, (arm.checkpoints or self.study.count) + 1):
                jobs.append((self.measure, arm, seed, number, experiment))
        return jobs

    def advance(self, jobs: list[tuple]) -> None:
        """Runs the first job; with a pool, gives jobs to free workers until one ends. A job waits for earlier
        ones on its checkpoint, for the training of its arm, and for that of the arm's start or of the init,
        from which distances are measured."""
        busy = {(arm.name, *rest[:2]) for _, arm, *rest in self.running.values()}
        for job in list(jobs):
            work, arm, seed, *rest = job
            key = arm.name, seed, *rest[:1]
            needed = {key, key[:2], ("init" if rest else arm.start.partition("@")[0], seed)}
            if len(self.running) < self.workers and not busy & needed:
                jobs.remove(job)
                if not self.pool:
                    return work(*job[1:])
                self.running[self.pool.submit(*job)] = job
            busy.add(key)
        for future in wait(self.running, return_when=FIRST_COMPLETED).done:
            del self.running[future]
            future.result()
        self.results = read_lines(self.out / "results.jsonl")

    def points(self, seeds: Sequence[int]) -> list[dict]:
        """What was measured of the base and of these seeds, on this study's numbers of episodes."""
        return evaluate.find(self.results, seed=(-1, *seeds), episodes=(self.study.hands, self.quarter))

    def report(self, seeds: Sequence[int], note: str) -> str:
        """Writes the report, with a `note` on page one; returns its table of claims."""
        points, usual, measured = self.points(seeds), self.study.verify_iter, {}
        for name in experiments_of(self.cls)[1:]:
            arms = arms_of(self.study, name, self.cls)
            if not arms or evaluate.find(points, experiment=name):
                of = [(a.name, {"pictures": a.pictures, "verify_iter": a.verify_iter or usual}) for a in arms]
                measured[name] = [
                    (arm, fields)
                    for arm, fields in of
                    if all(evaluate.find(points, arm=arm, variant=v, **fields) for v in self.cls.variants)
                ]
        rates = ", ".join(f"{arm.name} {self.study.config(arm).lr:g}" for arm in main_arms(self.study))
        settings = {
            "task": self.task,
            "model": self.study.model,
            "parameters": Policy.load(self.study.model, torch.device("meta")).parameter_count,
            "verify_iter": usual,
            "note": f"Learning rates: {rates} (a run's config.json has all settings). {note}",
        }
        claims = evaluate.Report(points, self.out, settings, measured).write()
        return f"{claims}\n\nreport: {self.out / 'report.md'}"


def policy_rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


# -------- the command line


class Parser(ArgumentParser):
    """Raises ValueError for a wrong command line."""

    def error(self, message: str) -> None:
        raise ValueError(message)


_MODEL = Option("tiny, tiny-streets, a folder or a Hub id")
_TASKS = f"the task: {', '.join(envs.TASKS)}, or FILE.py:CLASS; --task NAME --help shows its options"
_WEIGHTS = "of the model in training; bfloat16: stochastic rounding, half the memory, one process"
# By commands and name: type, default (...: required), help and limits.
OPTIONS: dict[str, dict] = {
    "study sft ppo evaluate play data": {
        "task": (str, "gp-l", Option(_TASKS, metavar="NAME")),
        "threads": (int, 0, Option("CPU threads; 0 takes all cores", least=0)),
        "rollout_batch": (int, 256, Option("episodes played together", least=1)),
    },
    "study": {
        "seeds": (int, 3, Option("number of seeds after the base", least=1)),
        "workers": (int, 1, Option("arms in parallel, each in a process with its share of threads", least=1)),
        "out": (Path, Path("runs/study"), Option("the study folder", metavar="DIR")),
        "model": (str, "tiny", Option("tiny (the task's built-in model), or a folder or Hub id as the base")),
        "hands": (int, None, Option("evaluation hands, or routes, per point; None: the task's", least=2)),
        "scale": (float, 1.0, Option("length of every stage relative to the defaults", above=0)),
    },
    "sft ppo": {
        "model": (str, "tiny", _MODEL),
        "out": (Path, ..., Option("the run folder; an existing run is resumed", metavar="DIR")),
        "checkpoints": (int, 4, Option("checkpoints written, denser early", least=1)),
        "keep": (int, None, Option("keep only the newest K checkpoints", least=1, metavar="K")),
    },
    "study sft ppo": {
        "train": (str, "all", Option("trained parts of a vision-language model", choices=TRAINED)),
        "weights": (str, "float32", Option(_WEIGHTS, choices=("float32", "bfloat16"))),
        "recompute": (bool, False, Option("activation checkpointing: less memory, a third more work")),
    },
    "sft": {
        "demos": (str, None, Option("JSON file of demonstrations; None: the expert's", metavar="PATH")),
        "images": (str, None, Option("folder of their pictures; None: that of --demos", metavar="DIR")),
        **envs.options_of(sft.SFTConfig),
    },
    "ppo": envs.options_of(ppo.PPOConfig),
    "sft data": {"wrong_turns": (int, 0, Option("wrong replies before the expert's", least=0))},
    "sft play data": {"seed": (int, 0, Option("random seed, of a city too", least=0, most=2**32 - 1))},
    "evaluate play": {
        "temperature": (float, 1.0, Option("sampling temperature; 0 is greedy", least=0)),
        "max_new_tokens": (int, 128, Option("longest reply, in tokens", least=1)),
    },
    "evaluate": {
        "model": (str, ..., _MODEL),
        "episodes": (int, None, Option("hands, or routes in their order; None: 234, or all routes", least=1)),
        "transcripts": (int, 2, Option("episodes to print", least=0)),
        "out": (Path, None, Option("write result.json and transcripts.jsonl, all of them", metavar="DIR")),
        "save": (Path, None, Option("visual tasks: write the pictures of those episodes", metavar="DIR")),
        "pictures": (str, "own", Option("visual tasks: control pictures instead", choices=evaluate.PICTURES)),
    },
    "play": {
        "model": (str, None, Option("let this model play the episode")),
        "save": (str, None, Option("write the picture of a visual task", metavar="PATH")),
    },
    "data": {
        "out": (Path, ..., Option("FILE.json; for the streets of a virl task a folder", metavar="PATH")),
        "episodes": (int, None, Option("demonstrations (None: 1000), or routes (None: all)", least=1)),
    },
}


def build_parser(task: str = "gp-l") -> ArgumentParser:
    """All commands and options, with the task's. Raises ValueError for an unknown task."""
    cls = envs.task_class(task)
    parser = Parser(prog="sftrl", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (command_study, command_sft, command_ppo, command_evaluate, command_play, command_data):
        name = run.__name__.removeprefix("command_")
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        listed: dict = {}
        for names, options in OPTIONS.items():
            listed |= options if name in names.split() else {}
        add_options(sub, listed)
        sub.set_defaults(run=run, listed=listed, cls=cls)
        if run is command_study:
            text, known = "the question to answer (default: main)", [*experiments_of(cls), "all"]
            sub.add_argument("--experiment", default="main", choices=known, help=text)
            text = "other learning rates for some arms, the init among them"
            sub.add_argument("--rates", type=named_number, nargs="+", metavar="ARM=RATE", help=text)
            text = "learning rates of the frontier (default: 2e-5 to 1e-3)"
            sub.add_argument("--grid", type=float, nargs="+", metavar="RATE", help=text)
            continue
        group = sub.add_argument_group("environment")
        variants = ", ".join(f"{variant} ({text})" for variant, text in cls.variants.items())
        group.add_argument("--variant", default="id", metavar="NAME", help=f"{variants} (default: id)")
        usual = " ".join(f"{verdict}={reward:g}" for verdict, reward in cls.rewards.items())
        text = f"other rewards for some verdicts, or for a budget that is used up (default: {usual})"
        group.add_argument("--rewards", type=named_number, nargs="+", metavar="VERDICT=REWARD", help=text)
        add_options(group, envs.options_of(cls))
        sub.set_defaults(**dict.fromkeys(envs.options_of(cls)))  # None: not given
        if run is command_play:
            text = "judge this reply; may be given several times"
            sub.add_argument("--reply", action="append", default=[], metavar="TEXT", help=text)
            for start, (kind, text) in cls.start_options.items():
                sub.add_argument(f"--{start}", type=kind, help=text)
    return parser


def add_options(group, options: dict) -> None:
    """Flags for options as in OPTIONS."""
    for name, (kind, default, option) in options.items():
        group.add_argument("--" + name.replace("_", "-"), **option.flag(kind, default))


def named_number(text: str) -> tuple[str, float]:
    """Reads NAME=NUMBER."""
    name, _, value = text.partition("=")
    return name, float(value)


def environment_of(args: Namespace) -> envs.Environment:
    """The environment of a command's options."""
    options = {"rewards": args.rewards}
    for name, (_, _, option) in envs.options_of(args.cls).items():
        if (value := getattr(args, name)) is not None:
            options[name] = Path(value).read_text("utf-8-sig") if option.metavar == "FILE" else value
    return args.cls(args.variant, getattr(args, "seed", 0), **options)


def study_of(args: Namespace) -> tuple[Study, str]:
    """The settings of a command line, and a note on them for the report."""
    study, cls = STUDIES.get(args.task, STUDIES["gp-l"]), args.cls
    study = LOOK if args.experiment == "look" else study
    base = replace(study.base, steps=max(1, round(study.base.steps * args.scale)))
    init = study.init | {"steps": max(1, round(study.init["steps"] * args.scale))}
    study = replace(study, base=base, init=init, flops=study.flops * args.scale)
    note = "How they were chosen: docs/results.md."
    if args.model not in ("tiny", study.model):
        if args.experiment == "look":
            raise ValueError("--experiment look is for the tiny model")
        study = study.for_model(args.model)
        note = "These are the defaults of sftrl sft and ppo."
    elif args.task not in STUDIES:
        known = ", ".join(STUDIES)
        raise ValueError(f"the tiny model has no study of {args.task}: give --model, or one of {known}")
    grid, hands = tuple(sorted(set(args.grid or study.grid))), args.hands or study.hands
    study = replace(study, grid=grid, hands=hands, rates=study.rates | args.rates)
    arms = {arm.name for name in experiments_of(cls) for arm in main_arms(study) + arms_of(study, name, cls)}
    for name, rate in (*args.rates.items(), *(("sft", rate) for rate in study.grid)):
        if name not in arms or not 0 < rate < math.inf:
            raise ValueError(f"--rates, --grid: {name}={rate:g}: an arm and a positive number are needed")
    if args.rates:
        note = f"Given on the command line: {args.rates}."
    if study.options:
        usual = envs.options_of(cls)
        smaller = ", ".join(f"{name} {value} ({usual[name][1]})" for name, value in study.options.items())
        note += f" A smaller task for the tiny model; its options, defaults in brackets: {smaller}."
    return study, note


def command_study(args: Namespace) -> None:
    """The whole comparison: base, SFT init, then SFT and RL at equal compute, evaluation, report."""
    known, (study, note) = experiments_of(args.cls), study_of(args)
    chosen = [name for name in known if name != "look"] if args.experiment == "all" else [args.experiment]
    workers, pool = args.workers, nullcontext()
    if workers > 1:
        if dist.is_initialized():
            raise ValueError("--workers cannot be combined with torchrun")
        spawn, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // workers)
        pool = ProcessPoolExecutor(workers, spawn, start_worker, (threads,))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as after Ctrl-C, workers save
    with pool as executor:
        run = StudyRun(args.task, study, args.out, args.loading, workers, executor)
        try:
            if study.base:
                run.train_base()
            run.compare(chosen, args.seeds, note)
        except BaseException:  # stops the other workers; those in training save first
            while children := multiprocessing.active_children():
                for process in children:
                    process.terminate()
                    process.join(2)
            raise


def start_worker(threads: int) -> None:
    """Sets up a process of the pool. It ends with its parent; after Ctrl-C the parent terminates it."""
    prepare(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def command_sft(args: Namespace) -> None:
    """Supervised fine-tuning on demonstrations."""
    pictures = args.cls.pictures
    if args.demos:
        records = sft.read_records(args.demos, args.images)
        data, pictures = sft.epochs(records, args.batch_size, args.seed), bool(records[0].get("image"))
    else:
        demonstrate = partial(envs.demonstration, wrong_turns=args.wrong_turns)
        data = sft.fresh_batches(environment_of(args), demonstrate, args.batch_size, f"sft/{args.seed}")
    train_as_asked(args, sft.SFTConfig, data, pictures)


def command_ppo(args: Namespace) -> None:
    """Reinforcement learning with PPO against the verifier."""
    env = environment_of(args)
    train_as_asked(args, ppo.PPOConfig, env.fresh_copy, env.pictures)


# Arguments that may change when a run is resumed: no number depends on them.
NO_SETTINGS = "command run out threads checkpoints keep recompute loading listed cls".split()


def train_as_asked(args: Namespace, config: type, data: Callable, pictures: bool) -> None:
    """`train_run` with a command's options."""
    torch.manual_seed(args.seed)
    settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    config = config(**{name: settings[name] for name in envs.options_of(config)})
    load = partial(load_policy, args.model, pictures, **args.loading)
    train_run(args.out, load, config, data, settings, args.checkpoints, args.keep)


def command_evaluate(args: Namespace) -> None:
    """Success of one checkpoint, with standard errors and sample transcripts."""
    env = environment_of(args)
    starts = env.starts("test", args.episodes)
    environments = [env, *(env.fresh_copy() for _ in starts[1:])]
    if args.save:
        if not env.pictures:
            raise ValueError(f"task {args.task!r} has no pictures to --save")
        args.save.mkdir(parents=True, exist_ok=True)  # a wrong path fails before the work
    policy = load_policy(args.model, env.pictures, **args.loading)
    policy.check_lengths([envs.demonstration(env, start=start)] for start in starts)
    with progress_bar("evaluation", len(starts) // policy.world) as show:
        how = args.temperature, args.max_new_tokens
        result, episodes = evaluate.evaluate(policy, environments, *how, pictures=args.pictures, watch=show)
    if policy.rank > 0:
        return
    if args.out:
        write_text(args.out / "result.json", json.dumps(result, indent=1))
        write_lines(args.out / "transcripts.jsonl", [e.transcript() for e in episodes])
    for i, episode in enumerate(episodes[: args.transcripts]):
        if args.save:
            save_pictures(env, episode, starts[i], args.save / str(i))
        print(f"--- {'solved' if episode.success else 'not solved'}")
        print_transcript(episode)
    per_hand = evaluate.MEASURES.values()
    print(json.dumps({key: value for key, value in result.items() if key not in per_hand}, indent=1))


def print_transcript(episode: envs.Episode, expert: str = "") -> None:
    """The prompt of an episode, perhaps an expert's reply, then replies and verdicts."""
    print(f"user: {episode.prompt}" + (f"\nexpert: {expert}" if expert else ""))
    for turn in episode.turns:
        print(f"model: {turn.reply}\nverifier: [{turn.verdict} {turn.reward:+g}] {turn.feedback}")


def save_pictures(env, episode: envs.Episode, start: tuple[str, dict | None], folder: Path) -> None:
    """Replays an episode and writes its pictures, each by the number of the first reply to it."""
    (observation, _), saved = env.reset(*start), None
    folder.mkdir(exist_ok=True)
    for k, turn in enumerate(episode.turns):
        if observation.image is not saved:
            saved = observation.image
            saved.save(folder / f"{k}.png")
        observation, *_ = env.step(turn.reply)


def command_play(args: Namespace) -> None:
    """One episode to read: prompt, expert reply, and the verdict on each reply."""
    env = environment_of(args)
    options = {name: value for name in env.start_options if (value := getattr(args, name)) is not None}
    observation, _ = env.reset(args.seed, options)
    if args.save:
        if observation.image is None:
            raise ValueError(f"task {args.task!r} has no picture to save")
        observation.image.save(args.save)
    replies, expert = iter(args.reply), "" if args.model else env.expert_reply()
    player = nullcontext(lambda indices, observations: [next(replies, None)])
    if args.model:
        policy = load_policy(args.model, env.pictures, **args.loading)
        generator = policy.generator(f"play/{args.seed}")
        player = policy.responder(args.temperature, args.max_new_tokens, generator)
    with player as respond:
        (episode,) = envs.play([env], respond, [args.seed], [options])
    print_transcript(episode, expert)
    if args.model and not any(env.done):
        print(f"cut off: the model's positions reach no farther than {policy.max_length} tokens")


def command_data(args: Namespace) -> None:
    """Writes expert demonstrations in the released SFT format, or a city of streets in that of the routes."""
    env, out = environment_of(args), args.out
    if hasattr(env, "write") and out.suffix != ".json":
        if args.data or args.wrong_turns:
            advice = "without --data and --wrong-turns: for demonstrations let --out end in .json"
            raise ValueError(f"a folder takes the built-in city, {advice}")
        with progress_bar("panoramas", 1) as show:
            print(env.write(out, args.seed, args.episodes, show))
        return
    out.parent.mkdir(parents=True, exist_ok=True)  # a wrong path fails before the work
    records = [envs.demonstration(env, args.wrong_turns) for _ in range(args.episodes or 1000)]
    pictures = out.with_suffix("")
    for i, record in enumerate(records):
        if "image" in record:
            pictures.mkdir(exist_ok=True)
            record["image"].save(pictures / f"{i}.png")
            record["image"] = f"{pictures.name}/{i}.png"
    write_text(out, json.dumps(records, indent=1))
    print(f"{len(records)} demonstrations in {out}")


def exit_rank(status: int) -> None:
    """Ends a process of torchrun without the interpreter's shutdown, in which gloo's threads may abort it
    (pytorch issue 190489). A failed rank skips the process-group shutdown too: torchrun ends the others."""
    if not status:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(status)


def prepare(threads: int) -> None:
    """Sets the number of threads (0: all cores), joins the process group, prints warnings as one line on rank
    0."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if threads:
        torch.set_num_threads(threads)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if gpu := torch.cuda.is_available():
            torch.cuda.set_device(best_device())
        dist.init_process_group("cuda:nccl,cpu:gloo" if gpu else "gloo")
    warnings.formatwarning = lambda message, *_: f"sftrl: warning: {message}\n"
    if policy_rank():
        warnings.simplefilter("ignore")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 for a run that failed, 2 for a wrong value, 130 for
    Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # letters outside its encoding become question marks
    first = Parser(add_help=False, allow_abbrev=False)  # options depend on the task
    first.add_argument("--task", default="gp-l")
    status, message, of_all = 0, "", True  # whether the fault is that of all ranks
    try:
        args = build_parser(first.parse_known_args(argv)[0].task).parse_args(argv)
        for name, (kind, _, option) in args.listed.items():
            if (value := getattr(args, name)) is not None:
                option.check("--" + name.replace("_", "-"), kind, value)
        args.task = envs.task_name(args.task)
        for name in {"rewards", "rates"} & vars(args).keys():
            setattr(args, name, dict(getattr(args, name) or ()))
        loading = ("rollout_batch", "weights", "train", "recompute")
        args.loading = {name: getattr(args, name) for name in loading if name in args}
        prepare(args.threads)
        with ExitStack() as locks:
            if args.command not in ("play", "data") and args.out:  # one command at a time writes to a folder
                on_rank_0(lambda: locks.enter_context(locked(args.out)))
            args.run(args)
    except (ValueError, OSError, ArgumentError) as error:  # the last: a task's option has a taken name
        status, message = 2, f"error: {error}"
    except (NotSaved, FloatingPointError) as error:  # on rank 0, which alone writes, or on all
        status, message = 1, f"stopped: {error}; what was saved before is kept"
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        smaller = "lower --microbatch-size, --rollout-batch, --max-new-tokens or --workers"
        other = "--recompute, --weights bfloat16 or more processes"
        status, of_all = 1, False
        message = f"out of memory, or a worker was killed: {smaller}, or try {other}"
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command resumes from the last saved state"
    if status and not (of_all and policy_rank()):
        print(f"sftrl: {message}", file=sys.stderr)
    if dist.is_initialized():
        exit_rank(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
