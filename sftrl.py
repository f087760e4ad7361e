"""sftrl: does post-training teach a model the rule, or only its examples?

The top floor: loads (and shards) a model, keeps run folders, parses the command line and runs the study.

    sftrl study --task gp-l                              # the whole comparison on the built-in tiny model
    sftrl ppo --model DIR --task gp-l --out runs/rl      # one stage on any chat model
    torchrun --nproc-per-node 8 sftrl.py ppo ...         # the same, sharded by FSDP
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import math
import os
import pickle
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import envs
import evaluate
import ppo
import sft
from envs import Option

# ------------------------------------------------------------------------------------------- the tiny model

ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# Options of the tiny studies: ranks about 10 pixels high, walks of about 6 waypoints.
TINY_PICTURES = {"size": (128, 64), "font_size": 0.36, "jitter": 0.45}
TINY_WALKS = {"turns": 3, "points_per_leg": 1}
TINY_VIEWS = {"view_size": 64, "panorama_width": 256}


def demonstrations(task: str, n: int, **options) -> list[dict]:
    """n conversations with one wrong reply each under both rules."""
    seeds = [(variant, seed) for variant in ("id", "rule") for seed in range(n)]
    return [envs.demonstration(envs.make(task, *which, **options), 1) for which in seeds]


@lru_cache(maxsize=None)  # drawing hands and walks takes seconds
def card_texts() -> list[str]:
    """What is said about cards, for the tokenizer."""
    rng = random.Random(0)
    records = [sft.foundation_record(rng) for _ in range(500)] + demonstrations("gp-l", 200)
    records += [sft.foundation_record(rng, TINY_PICTURES) for _ in range(300)]
    records += [sft.reading_record(rng, **TINY_PICTURES) for _ in range(100)]
    records += demonstrations("gp-vl", 100, **TINY_PICTURES)
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    formulas = ("1)", "(1", "1+", "1 1", "1/0", "x", "24=1=1", "24=1", "01", "1" * 300, "(" * 30, "1", "2")
    answers = [([], [], "")] + [(["A"] * 4, [1] * 4, formula) for formula in formulas]
    for reply in ["", *(json.dumps(dict(zip(envs.FIELDS, answer))) for answer in answers)]:
        texts.append(envs.judge(reply, ["A"] * 4, [1] * 4, 24, feedback=envs.PICTURE_FEEDBACK).feedback)
    return texts


@lru_cache(maxsize=None)
def street_texts() -> list[str]:
    """What is said on a walk."""
    rng = random.Random(0)
    records = [sft.foundation_walk(rng, cities=sft.PICTURE_CITIES, **TINY_WALKS) for _ in range(500)]
    records += demonstrations("virl-l", 100, **TINY_WALKS)
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    env = envs.make("virl-vl", **TINY_WALKS, **TINY_VIEWS)
    env.reset(seed=0)
    while not any(env.done):
        env.step(env.expert_reply())
    # What only walks in pictures hear, and what few walkers do.
    rare = [envs.text_of(message["content"]) for message in env.messages]
    for report, there in (("nothing", False), ("nothing", True), ("an intersection", False), (None, True)):
        reply = json.dumps(dict(zip(envs.STREET_FIELDS, (report, "", ""))))
        here = envs.Waypoint((0, 0), 0, envs.NOTHING, there, "", "forward()")
        rare.append(envs.judge_step(reply, here).feedback)
    return texts + 50 * rare


# By model, what its tokenizer learns from and, as a pattern, what stands alone in it: for cards numbers up to
# 13, digits, operators, ranks and field names; for streets the words of a turn and of names.
TINY_MODELS = {
    "tiny": (card_texts, r'(?<![0-9])1[0-3](?![0-9])|[0-9]|[-+*/()=]|\b[AJQK]\b|(?<=")[a-z]+(?=")'),
    "tiny-streets": (
        street_texts,
        r"[0-9]+|(?:slightly )?(?:left|right)|(?:north|south)(?:east|west)?|east|west|\b[A-Z][a-z]+\b"
        r'|(?<=")[a-z ]+(?=": )',
    ),
}


def build_tokenizer(name: str = "tiny", vocab_size: int = 1024) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on our own prompts and replies. Fixed text merges into single
    tokens, because every token costs study time."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    texts_of, alone = TINY_MODELS[name]
    tokenizer, bytewise = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    texts = [text.replace("<image>\n", "<image>") for text in texts_of()]  # as CHAT_TEMPLATE has it
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(alone), "isolated"), bytewise(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<image>"] + [f"<|{role}|>" for role in ROLES]
    options = {"initial_alphabet": bytewise.alphabet(), "special_tokens": special, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=special[2:],
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny(name: str = "tiny", seed: int = 0) -> tuple[transformers.PreTrainedModel, Any]:
    """A built-in model, one of TINY_MODELS: a Hugging Face Llava of about 1M parameters with random
    weights, and its processor. Needs no network."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = build_tokenizer(name)
    side, patch = 128, 32  # a picture of four cards, stretched to a square, has four of 16 patches for each
    features = {"vision_feature_select_strategy": "full"}
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=side,
        patch_size=patch,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=True,
        **features,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    square = {"height": side, "width": side}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=square, crop_size=square),
        tokenizer,
        patch_size=patch,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        **features,
    )
    return model, processor


# ------------------------------------------------------------------------ loading, sharding, saving


def best_device() -> torch.device:
    """This process's GPU if there is one, else the CPU."""
    gpu = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")


def one_line(error: BaseException) -> str:
    """What a library says of a fault, as one short line."""
    return " ".join(str(error).split())[:200]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU's or the machine's memory is used up."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def on_rank_0(work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on all ranks; its ValueError or OSError ends them all. A collective
    call."""
    sent: list[Any] = [None]
    if policy_rank() == 0:
        try:
            sent = [work()]
        except (ValueError, OSError) as error:
            sent = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(sent)
    if isinstance(sent[0], Exception):
        raise sent[0]
    return sent[0]


# Parts of a model; the adapter stands between vision tower and language model.
TRAINED = ("all", "language", "language+adapter")


def _recomputed(forward, *args, **kwargs):
    """Runs a block so that the backward pass computes its activations again. There is no dropout, so no
    random state to keep."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW for bf16 parameters, with bf16 moments: 8 bytes per parameter with the gradient, where fp32
    needs 16, so that 11B fit on one GPU of 141 GB. New values are rounded up or down at random, in
    proportion to how near they are: on average nothing is lost, whereas rounding to the nearest loses every
    update below 2^-9 of the parameter. What is drawn is a function of step and parameter alone."""

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on the parameters' gradients."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for k, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
                state["step"] += 1
                t, grad = state["step"].item(), p.grad.float()
                first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
                second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                change = first / ((second / (1 - beta2**t)).sqrt_().add_(group["eps"])) / (1 - beta1**t)
                new = p.float().mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])
                dice = torch.Generator(p.device).manual_seed(int(t) * 1_000_003 + k)
                for stored, exact in ((state["exp_avg"], first), (state["exp_avg_sq"], second), (p, new)):
                    # bf16 is the upper half of fp32: a random lower half is added, and what it does not
                    # carry over is cut off
                    bits = exact.view(torch.int32)
                    bits += torch.randint(
                        0, 2**16, bits.shape, generator=dice, device=p.device, dtype=torch.int32
                    )
                    bits &= -(2**16)
                    stored.copy_(exact)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for fp32 matrices: the momentum of the gradient, made nearly orthogonal by
    five Newton-Schulz iterations, as large as a step of AdamW. torch.optim.Muon computes in bf16, which many
    CPUs only emulate."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on the parameters' gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(momentum, group["momentum"])  # Nesterov's
                x = x.T if len(x) > len(x.T) else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    square = x @ x.T
                    x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
                x = x.T if x.shape != p.shape else x
                p.add_(x, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def map_file(path: Path, x: Tensor) -> Tensor:
    """A copy of a tensor that lies in a file and not in memory."""
    with open(path, "wb") as file:
        file.write(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return torch.from_file(str(path), shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)


def read_model(name: str, dtype: torch.dtype, outline: bool) -> tuple[transformers.PreTrainedModel, Any]:
    """A model with weights of `dtype`, or its outline without weights, and its processor."""
    if name in TINY_MODELS:
        model, processor = build_tiny(name)
        for p in model.parameters():
            p.data = p.data.to(dtype)  # buffers such as RoPE frequencies stay in fp32
        if outline:
            model.to("meta").tie_weights()  # which the move has parted
        return model, processor
    if (Path(name) / "adapter_config.json").exists():  # without peft it is left out, with it saved alone
        raise ValueError(
            "by its adapter_config.json it is an adapter (LoRA): merge it into its base model, for example "
            "with merge_and_unload of peft, and save that in another folder"
        )
    trust = {"trust_remote_code": False}  # or the library asks at the terminal
    config = transformers.AutoConfig.from_pretrained(name, **trust)
    processor = transformers.AutoProcessor.from_pretrained(name, **trust)
    # For a vision-language model the causal class would silently drop the vision tower.
    visual = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if visual else transformers.AutoModelForCausalLM
    if outline:
        with torch.device("meta"):
            return auto.from_config(config, dtype=dtype, **trust), processor
    told = trust | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = auto.from_pretrained(name, dtype=dtype, **told)
    faults = sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]}))
    if faults:  # the library would draw these at random
        raise ValueError(
            f"{len(faults)} of its weights are missing or of another shape than its config.json says, "
            f"first {faults[0]}"
        )
    return model, processor


class Policy(ppo.Policy):
    """The policy of ppo.py, loaded and saved in Hugging Face format, on one process or sharded over many:
    after `shard()` the same methods run on FSDP's shards.

    Args, beside those of ppo.Policy:
        pictures: whether the model shall read pictures.

    Raises ValueError in one line for a model that cannot be served.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, processor: Any, pictures: bool = False, **options
    ):
        super().__init__(model, processor, **options)
        if pictures and getattr(processor, "patch_size", "") is None:
            raise ValueError(
                'its processor has no patch_size: add "patch_size" to processor_config.json, as in '
                'vision_config of config.json, and "num_additional_image_tokens" (1 for CLIP)'
            )
        architecture = type(model), model.config.to_json_string(), model.dtype, pictures
        if model.device.type != "meta" and architecture not in self._checked:
            check(self, pictures)
            self._checked.add(architecture)

    _checked: set = set()  # architectures that `check` let pass in this process

    @classmethod
    def load(
        cls, name: str, device: torch.device | None = None, dtype: torch.dtype = torch.float32, **options
    ) -> "Policy":
        """One of TINY_MODELS (random weights), a folder, or a Hub id; a value head beside the weights is
        loaded too. The model's weights are of `dtype`, the value head's fp32; `options` are the
        constructor's. On the device "meta" it is an outline without weights. Raises ValueError in one line
        for what cannot be loaded or served."""
        device, folder = device or best_device(), Path(name).is_dir()
        if name not in TINY_MODELS and not folder and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            known = " nor ".join(TINY_MODELS)
            raise ValueError(f"model {name!r} is neither {known}, nor a folder, nor a Hub id (owner/name)")
        try:
            model, processor = read_model(name, dtype, outline=device.type == "meta")
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            if out_of_memory(error):
                raise
            place = "" if folder else "there is no such folder, and as a Hub id it "
            reason = one_line(error)
            if "trust_remote_code" in str(error):
                reason = "it brings its code (auto_map), which is not run: take a model that transformers has"
            raise ValueError(f"model {name!r}: {place}cannot be loaded: {reason}") from None
        try:
            if model.generation_config:
                repair_generation_config(model.generation_config)
            policy = cls(model.to(device), processor, **options).to(device)
            tokens, rows = len(policy.tokenizer), model.get_input_embeddings().num_embeddings
            if tokens > rows:
                raise ValueError(f"its tokenizer has {tokens} tokens, its vocabulary {rows}")
        except (ValueError, TypeError) as error:
            raise ValueError(f"model {name!r}: {one_line(error)}") from None
        head = Path(name) / "value_head.safetensors"
        if head.exists() and device.type != "meta":
            try:
                policy.value_head.load_state_dict(load_file(head))
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(f"{head} does not fit this model: {one_line(error)}") from None
        return policy

    @classmethod
    def load_shards(
        cls, name: str, param_dtype: torch.dtype, train: str = "all", recompute: bool = False, **options
    ) -> "Policy":
        """`load`, `set_trainable` and `shard` for many processes: rank 0 alone reads the weights, into host
        memory, and sends each rank its parts, tensor by tensor. A collective call."""
        rank, device, whole = dist.get_rank(), best_device(), None

        def read() -> tuple:
            nonlocal whole
            whole = cls.load(name, torch.device("cpu"), **options)
            model = whole.model
            return type(model), model.config, model.generation_config, whole.processor

        architecture, config, generation_config, processor = on_rank_0(read)
        with torch.device("meta"):  # shapes without memory
            model = architecture(config)
        model.generation_config = generation_config
        policy = cls(model, processor, **options).to("meta")
        policy.set_trainable(train, recompute).shard(param_dtype)
        policy.to_empty(device=device)
        policy.model.tie_weights()
        set_model_state_dict(
            policy,
            whole.state_dict() if rank == 0 else {},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        buffers = dict(whole.named_buffers()) if rank == 0 else {}
        # Buffers too that no checkpoint holds, such as RoPE frequencies.
        for key, buffer in policy.named_buffers():
            if rank == 0:
                buffer.copy_(buffers[key])
            dist.broadcast(buffer, 0)
        policy._set_up_shards()
        return policy

    @torch.no_grad()
    def _set_up_shards(self) -> None:
        """FSDP sets itself up in its first forward pass, and a block when it is gathered first. Blocks that
        a task never uses (the vision tower's, for text) would otherwise break the accumulation of
        gradients."""
        spent = self.flops
        self(self.collate([ppo.Stream([self.end_id] * 2, [0, 1])]), values="detached")
        self.flops = spent
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()

    def set_trainable(self, train: str = "all", recompute: bool = False) -> "Policy":
        """Which part of the model is trained (`train`, one of TRAINED), and whether the blocks' activations
        are computed again in the backward pass in place of being kept, the vision tower's too: a third more
        work for a fraction of the memory. Before `shard`."""
        for name, p in self.model.named_parameters():
            parts = set(name.split("."))
            part = (
                "adapter"
                if parts & {"multi_modal_projector", "merger"}
                else "tower"
                if parts & {"vision_tower", "vision_model", "visual"}
                else "language"
            )
            p.requires_grad_(train == "all" or part in train.split("+"))
        for block in self._blocks() if recompute else ():
            block.forward = partial(_recomputed, block.forward)
        return self

    def _blocks(self) -> list[nn.Module]:
        return [m for m in self.model.modules() if type(m).__name__ in (self.model._no_split_modules or ())]

    def shard(self, param_dtype: torch.dtype = torch.float32) -> "Policy":
        """FSDP2: every block of the model, then the root. The value head stays in fp32."""
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        for block in reversed(self._blocks()):  # inner ones first
            fully_shard(block, mp_policy=precision)
        fully_shard(self.value_head)
        return fully_shard(self, mp_policy=precision)

    @property
    def sharded(self) -> bool:
        return isinstance(self, FSDPModule)

    def save(self, folder: Path) -> None:
        """Writes the model in Hugging Face format and the value head beside it. A collective call; rank 0
        writes. Shards are gathered tensor by tensor into files that rank 0 maps and deletes in the end, so
        that no process holds the whole model in memory."""
        state: dict[str, Tensor] = {}
        shared: dict[Tensor, Tensor] = {}  # tied weights are one tensor with two names
        mapped = folder / "gathered.tmp"
        if self.rank == 0:
            mapped.mkdir(parents=True)
        for name, x in self.state_dict(keep_vars=True).items():
            whole = x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()
            if self.rank == 0 and x not in shared:
                shared[x] = map_file(mapped / name, whole) if isinstance(x, DTensor) else whole
            if self.rank == 0:
                state[name] = shared[x]
        if self.rank == 0:
            part = {
                prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                for prefix in ("model.", "value_head.")
            }
            self.model.save_pretrained(folder, state_dict=part["model."], max_shard_size="5GB")
            self.processor.save_pretrained(folder)
            save_file(
                {k: v.contiguous() for k, v in part["value_head."].items()}, folder / "value_head.safetensors"
            )
            shutil.rmtree(mapped)

    def state(
        self, optimizers: list[torch.optim.Optimizer]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """Whole parameters and optimizer states by the parameter's name, in host memory, on rank 0 alone. A
        collective call, one tensor after the other. (torch's own functions for it make up states for
        parameters that had no gradient yet, and hold them twice.)"""

        def whole(x: Tensor) -> Tensor | None:
            x = x.detach()
            x = x.full_tensor() if isinstance(x, DTensor) else x
            return x.cpu() if self.rank == 0 else None

        parameters = dict(self.named_parameters())
        states = {
            name: next((o.state[p] for o in optimizers if p in o.state), {}) for name, p in parameters.items()
        }
        return (
            {name: whole(p) for name, p in parameters.items()},
            {name: {key: whole(x) for key, x in state.items()} for name, state in states.items() if state},
        )

    @torch.no_grad()
    def set_state(
        self,
        parameters: dict[str, Tensor],
        optimizers: list[torch.optim.Optimizer],
        states: dict[str, dict[str, Tensor]],
    ) -> None:
        """Takes over what `state` returned, on any number of ranks; every rank is given all of it."""
        self.reshard()
        names = {p: name for name, p in self.named_parameters()}

        def own(x: Tensor, p: Tensor) -> Tensor:
            """This rank's part of a tensor that belongs to a parameter; a count of steps belongs to all."""
            if not x.dim():
                return x.clone()
            if not isinstance(p, DTensor):
                return x.to(p.device, copy=True)  # `resume` maps them from a file
            return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

        for p, name in names.items():
            p.copy_(own(parameters[name], p))
        for optimizer in optimizers:
            state = optimizer.state_dict()
            chosen = [p for group in optimizer.param_groups for p in group["params"]]
            state["state"] = {
                i: {key: own(x, p) for key, x in states[names[p]].items()}
                for i, p in enumerate(chosen)
                if names[p] in states
            }
            optimizer.load_state_dict(state)

    # ---- training on shards

    @contextlib.contextmanager
    def rollout_weights(self) -> Iterator[nn.Module]:
        """The model to sample from. Shards are gathered once, and let go at the end: decoding itself needs no
        communication, so ranks may stop at different lengths."""
        if not self.sharded:
            with super().rollout_weights() as model:
                yield model
            return
        modules = [m for m in self.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield self.model
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self, recurse=False)

    def reshard(self) -> None:
        """FSDP's root stays gathered after a forward pass; here its parameters become shards again."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """As in ppo.Policy; FSDP averages gradients over ranks, where a sum is wanted."""
        if self.sharded:
            self.set_requires_gradient_sync(last)
            self.set_is_last_backward(last)
            loss = loss * self.world
        loss.backward()

    def optimizers(
        self,
        lr: float,
        value_lr: float = 0.0,
        betas=(0.9, 0.98),
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        muon: bool = False,
    ) -> list[torch.optim.Optimizer]:
        """AdamW on what is trained of the model (RoundingAdamW if it is in bf16) and, if `value_lr` is
        given, on the value head at its own rate. With `muon`, the language model's fp32 matrices are
        trained by Muon at the same rate: pre-training from random weights takes about half the steps."""
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        bf16 = self.model.dtype == torch.bfloat16
        matrices = {p for name, p in trained if p.ndim == 2 and "language_model.layers" in name}
        matrices = matrices if muon and not bf16 else set()
        rest = [p for _, p in trained if p not in matrices]
        settings = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        optimizers = [RoundingAdamW(rest, lr, **settings)] if bf16 else []
        groups = [] if bf16 else [{"params": rest, "lr": lr}]
        if value_lr:
            groups.append({"params": list(self.value_head.parameters()), "lr": value_lr})
        if groups:
            optimizers.append(torch.optim.AdamW(groups, fused=True, **settings))
        if matrices:
            optimizers.append(Muon([p for _, p in trained if p in matrices], lr))
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["initial_lr"] = group["lr"]
        return optimizers


def repair_generation_config(config: transformers.GenerationConfig) -> None:
    """The library refuses to save one that names a temperature but says that it does not sample: then it
    shall say that it samples. Raises ValueError if it cannot be saved all the same."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        config.validate(strict=True)


# --------------------------------------------------------------- is a model sampled as it should be?


@torch.no_grad()
def check(policy: Policy, pictures: bool) -> None:
    """Raises ValueError if what the policy samples, what `forward` says of it and what the model itself says
    differ: by over 1e-3 in fp32, or .1 in the mean in bf16.

    Two conversations of two turns, of five tokens each, are sampled and scored; the first token is compared
    with a plain call of the model on what its processor makes of the prompt.
    """
    name, spent = type(policy.model).__name__, policy.flops
    image = Image.effect_noise((64, 64), 100).convert("RGB") if pictures else None
    texts = ["1?", "Make 24 from 1, 2, 3, 4."]
    asked = [[{"role": "user", "content": envs.parts_of(text) if pictures else text}] for text in texts]
    player = ppo.Player(policy, policy.model, 5, 1.0, torch.Generator().manual_seed(0))
    try:
        plain = [policy.plain_logp(messages, image) for messages in asked]
        if not torch.cat(plain).isfinite().all():
            raise FloatingPointError("with its weights, log-probabilities are not finite")
        first = player([0, 1], [envs.Observation(messages, image) for messages in asked])
        again = [
            [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": text}]
            for messages, reply, text in zip(asked, first, ["No, try again.", "Again."])
        ]
        player([0, 1], [envs.Observation(messages, image) for messages in again])
        streams = [stream for i in (0, 1) for stream in player.streams[i]]
        scores = policy(policy.collate(streams))["logp"].cpu()
    except Exception as error:  # foreign code can raise anything
        if out_of_memory(error):
            raise
        raise ValueError(f"{name} cannot be served: {type(error).__name__}: {one_line(error)}") from None
    gaps = []
    for row, stream, logp in zip(scores, streams, plain):
        at = stream.replies[0][0]
        gaps += [b - a for a, b, m in zip(row.tolist(), stream.logp, stream.mask) if m]
        gaps.append(logp[stream.ids[at]].item() - stream.logp[at])
    gap, policy.flops = torch.tensor(gaps).abs(), spent
    exact = policy.model.dtype == torch.float32 and policy.model.device.type == "cpu"
    if not (gap.max() < 1e-3 if exact else gap.mean() < 0.1):
        raise ValueError(f"{name} cannot be served: its log-probabilities differ by up to {gap.max():.2g}")


# ---------------------------------------------------------------------------------------------- run folders


class NotSaved(Exception):
    """A run could not write its files; what stood there still stands."""


def sync(path: Path) -> None:
    """Brings a file, or a folder with all that is in it, from the system's memory onto the disk."""
    for part in (*path.rglob("*"), path):
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def saving(path: Path) -> Iterator[None]:
    """Raises NotSaved if what is inside cannot write to a path, whichever library met the full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise NotSaved(f"{path} could not be written: {one_line(error)}") from None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path aside for what shall stand at `path`, a file or a folder: it appears there whole or not at
    all."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with saving(path):
            remove(aside)
            yield aside
            sync(aside)
            if path.exists() and aside.is_dir():
                discard(path)
            os.replace(aside, path)
    finally:
        remove(aside)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    with written_whole(path) as aside:
        aside.write_text(text, "utf-8")


def remove(path: Path) -> None:
    """Deletes a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Deletes a folder: it is gone whole or not at all."""
    if folder.is_symlink() or not folder.is_dir():
        raise OSError(f"{folder} is no folder of a run")
    aside = folder.with_name("discarded.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder and holds its lock, which the kernel takes from a process that is killed. Raises
    ValueError if another process holds it; a warning says if there are no locks."""
    new, path = not folder.exists(), folder / ".sftrl.lock"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl  # which Windows has not

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists():  # its holder has just ended
                raise BlockingIOError
        except BlockingIOError:
            advice = "wait for its end, or choose another --out"
            raise ValueError(f"another process writes to {folder}: {advice}") from None
        except (ImportError, OSError) as error:
            warnings.warn(f"{folder} cannot be locked against a second process: {one_line(error)}")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                if new:
                    folder.rmdir()  # which is empty if the command was refused


class Interruption:
    """Inside, a first Ctrl-C is only noted, so that what is being done can be ended and saved; a second one
    counts at once. SIGTERM, which torchrun adds to a Ctrl-C, is only noted."""

    def __enter__(self) -> "Interruption":
        self.noted = self.insisted = False
        if threading.current_thread() is threading.main_thread():  # no other thread hears of signals
            self._before = {
                number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def _note(self, number: int, frame) -> None:
        if number == signal.SIGINT and self.insisted:
            raise KeyboardInterrupt
        self.noted, self.insisted = True, self.insisted or number == signal.SIGINT

    def __exit__(self, *error) -> None:
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)


def git_revision() -> str | None:
    """The revision of the source tree this module lies in, if it is one."""
    try:
        here = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


class Run:
    """A run folder: config.json, metrics.jsonl, samples.jsonl, checkpoint-<step>/, resume.pt
    (docs/metrics.md).

    Raises ValueError if the folder holds a run with other settings.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings, self.config = folder, as_json(settings), folder / "config.json"
        if self.config.exists() and (old := json.loads(self.config.read_text())["settings"]) != self.settings:
            changed = sorted(
                k for k in old.keys() | self.settings.keys() if old.get(k) != self.settings.get(k)
            )
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)}): "
                "choose another --out, or remove it"
            )

    def finished(self) -> bool:
        """Whether training came to its end."""
        lines = read_lines(self.folder / "metrics.jsonl")
        return (
            bool(lines)
            and lines[-1]["progress"] >= 1
            and lines[-1]["step"] in map(step_of, checkpoints(self.folder))
        )

    def resume(self, policy: Policy, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
        """Writes config.json if the run is new. Loads the newest resume state, if there is one, and returns
        the step and the FLOPs it stands at; later lines of the logs are dropped."""
        if policy.rank == 0 and not self.config.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            versions = {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            write_whole(
                self.config,
                json.dumps(
                    {"settings": self.settings, "versions": versions, "git": git_revision()}, indent=1
                ),
            )
        path = self.folder / "resume.pt"
        step, flops = 0, 0.0
        if path.exists():
            try:
                # One copy in memory for all ranks of a node.
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise ValueError(
                    f"{path} cannot be read: {one_line(error)}; remove it to train from the start"
                ) from None
            policy.set_state(state["model"], optimizers, state["optimizer"])
            step, flops = state["step"], state["flops"]
        if policy.rank == 0:
            for path in checkpoints(self.folder):
                if step_of(path) > step:
                    discard(path)
            for name in ("metrics.jsonl", "samples.jsonl"):
                kept = [
                    json.dumps(line) + "\n" for line in read_lines(self.folder / name) if line["step"] <= step
                ]
                write_whole(self.folder / name, "".join(kept))
        return step, flops

    def log(self, metrics: dict) -> None:
        """Appends one line of metrics; a transcript among them goes to samples.jsonl."""
        if policy_rank() == 0:
            sample = metrics.pop("transcript", None)
            lines = {"metrics.jsonl": metrics}
            if sample:
                lines["samples.jsonl"] = {"step": metrics["step"]} | sample
            for name, line in lines.items():
                path = self.folder / name
                with saving(path), open(path, "a") as file:
                    file.write(json.dumps(line) + "\n")

    def save_checkpoint(self, policy: Policy, step: int) -> None:
        """Writes checkpoint-<step>/. A collective call."""
        path = self.folder / f"checkpoint-{step}"
        with written_whole(path) if policy.rank == 0 else contextlib.nullcontext(path) as aside:
            if policy.rank == 0:
                aside.mkdir()
            policy.save(aside)

    def save_state(
        self,
        policy: Policy,
        optimizers: list[torch.optim.Optimizer],
        step: int,
        flops: float,
        keep: int | None = None,
    ) -> None:
        """Writes resume.pt: all that `resume` needs, for everything random is a function of (seed, step).
        Then all but the newest `keep` checkpoints may go."""
        model, optimizer = policy.state(optimizers)
        if policy.rank == 0:
            with written_whole(self.folder / "resume.pt") as aside:
                torch.save({"model": model, "optimizer": optimizer, "step": step, "flops": flops}, aside)
            with saving(self.folder):
                for old in checkpoints(self.folder)[:-keep] if keep else ():
                    discard(old)


def as_json(settings: dict) -> dict:
    """Settings as strict JSON holds them: tuples as lists, no limit as null."""
    return json.loads(json.dumps(settings), parse_constant=lambda _: None)


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a JSONL file; a line that a kill cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first. Other folders beside them are not the run's."""
    named = (path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name))
    return sorted((path for path in named if path.is_dir() and not path.is_symlink()), key=step_of)


def run_stage(
    run: Run,
    policy: Policy,
    optimizers: list[torch.optim.Optimizer],
    train,
    show: Sequence[str],
    save_every: int,
    count: int = 1,
    keep: int | None = None,
    tensorboard: bool = False,
) -> None:
    """Trains in a run folder, from where it stands to its end.

    `train(step, flops)` yields metrics (sft.train or ppo.train). `count` checkpoints are written, at
    progress (k / count)^2: denser early, where out-of-distribution success moves fastest; the newest `keep`
    stay, or all. `show` names the metrics on the progress bar. Ctrl-C ends after the update in progress,
    which is saved; then KeyboardInterrupt is raised."""
    step, flops = run.resume(policy, optimizers)
    board = None
    if tensorboard and policy.rank == 0:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(run.folder / "tensorboard", purge_step=step + 1)
    name = "/".join(run.folder.parts[-2:])
    reached = max(
        (line["progress"] for line in read_lines(run.folder / "metrics.jsonl") if line["step"] <= step),
        default=0.0,
    )
    with Interruption() as interruption, Progress(name, 100) as bar, board or contextlib.nullcontext():
        for metrics in train(step, flops):
            step, flops, progress = metrics["step"], metrics["flops"], metrics["progress"]
            due = any(reached < (k / count) ** 2 <= progress for k in range(1, count + 1))
            reached = progress
            bar.reach(100 * min(progress, 1), **{key: metrics[key] for key in show})
            run.log(metrics)
            for key, value in metrics.items() if board else ():
                board.add_scalar(key, value, step)
            if due:
                run.save_checkpoint(policy, step)
            interrupted = policy.largest(interruption.noted)  # of any rank: all end alike
            if due or interrupted or step % save_every == 0:
                run.save_state(policy, optimizers, step, flops, keep)
            if interrupted:
                raise KeyboardInterrupt


class Progress(tqdm):
    """A progress bar with a count of percent: on a terminal one that moves, in a file a line every half
    minute."""

    def __init__(self, name: str, total: float):
        quiet = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 60}
        super().__init__(desc=name, total=total, disable=policy_rank() > 0, bar_format=self.FORMAT, **quiet)

    FORMAT = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"

    @staticmethod
    def status_printer(file):
        """What writes one state of the bar to a file."""
        if file.isatty():
            return tqdm.status_printer(file)
        before = chain([""], repeat("\n"))  # the last line is ended when the bar is closed
        return lambda text: print(next(before) + text.rstrip(), end="", file=file, flush=True)

    def reach(self, done: float, **figures: float) -> None:
        """So much of the total is done; `figures` stand behind the bar."""
        self.set_postfix_str(
            " ".join(f"{name} {value:.3g}" for name, value in figures.items()), refresh=False
        )
        self.update(done - self.n)


SFT_SHOW, PPO_SHOW = ("loss", "lr"), ("success", "return", "approx_kl", "explained_variance")


def run_sft(make_policy, folder: Path, batch_of, config: sft.SFTConfig, settings: dict, **logs) -> None:
    """One SFT run in its folder, unless it is finished. `make_policy()` loads the model, `batch_of(step)`
    returns a step's records; `settings` say in config.json which model and records these are, `logs` are
    options of `run_stage`."""
    run = Run(folder, settings | asdict(config))
    if run.finished():
        return
    policy = make_policy()
    if config.batch_size % policy.world:
        raise ValueError(f"--batch-size {config.batch_size} cannot be shared by {policy.world} ranks")
    # What the model cannot read ends here, before there is a run folder: pictures, or what is too long.
    tokens = 0
    for step in range(config.steps):
        tokens += sum(map(len, policy.streams(batch_of(step))))
        if math.isinf(policy.max_length) or 6 * policy.parameter_count * tokens > config.flops:
            break
    optimizers = policy.optimizers(config.lr, 0.0, config.betas, config.eps, config.weight_decay, config.muon)
    run_stage(
        run,
        policy,
        optimizers,
        lambda step, flops: sft.train(policy, optimizers, batch_of, config, step, flops),
        SFT_SHOW,
        50,
        **logs,
    )


def check_experts(
    policy: Policy, starts: Iterable[tuple[envs.Environment, Any, Any]], flops: float = math.inf
) -> None:
    """Lets experts play episodes that begin as (environment, seed, options) say, as many as `flops` could
    train. What the model cannot read ends here: pictures, or an episode that is longer than its positions
    reach. Where these have no end, one episode tells."""
    tokens = 0
    for env, seed, options in starts:
        (stream,) = policy.streams([envs.demonstration(env, start=(seed, options))])
        tokens += len(stream)
        if math.isinf(policy.max_length) or 6 * policy.parameter_count * tokens > flops:
            break


def run_ppo(make_policy, folder: Path, make_env, config: ppo.PPOConfig, settings: dict, **logs) -> None:
    """One PPO run in its folder, unless it is finished. `make_env()` returns a training environment."""
    run = Run(folder, settings | asdict(config))
    if run.finished():
        return
    policy = make_policy()
    if config.episodes % policy.world or config.minibatch_size % policy.world:
        raise ValueError(
            f"--episodes {config.episodes} and --minibatch-size {config.minibatch_size} "
            f"cannot be shared by {policy.world} ranks"
        )
    if config.kl_coef:
        policy.keep_initial_weights()
    optimizers = policy.optimizers(config.lr, config.value_lr, config.betas, config.eps, config.weight_decay)
    environments = [make_env() for _ in range(config.episodes // policy.world)]
    seeds = (ppo.episode_seeds(policy, len(environments), config, k) for k in range(config.steps))
    starts = ((env, seed, None) for own in seeds for env, seed in zip(environments, own))
    check_experts(policy, starts, config.flops)
    run_stage(
        run,
        policy,
        optimizers,
        lambda step, flops: ppo.train(policy, optimizers, environments, config, step, flops),
        PPO_SHOW,
        5,
        **logs,
    )


# ------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Loading:
    """How models are loaded: what changes speed and memory, and the parts that are trained."""

    rollout_batch: int = 256
    weights: str = "float32"
    train: str = "all"
    recompute: bool = False


def load_policy(loading: Loading, model: str, pictures: bool = False) -> Policy:
    """The policy on this process's device, sharded if there are several processes."""
    options = {"rollout_batch": loading.rollout_batch, "pictures": pictures}
    if torch.cuda.is_available():
        gc.collect()  # reference cycles (FSDP's hooks, recomputed blocks) may hold an old policy's memory
    if not dist.is_initialized():
        policy = Policy.load(model, dtype=getattr(torch, loading.weights), **options)
        return policy.set_trainable(loading.train, loading.recompute)
    if loading.weights != "float32":
        raise ValueError(
            "--weights bfloat16 is for one process: FSDP shards fp32 weights and computes in bf16"
        )
    precision = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return Policy.load_shards(model, precision, loading.train, loading.recompute, **options)


@dataclass(frozen=True)
class Measure:
    """How the checkpoints of an arm are evaluated: on the way, at temperature 1, on a quarter of the hands;
    the last one on all hands, at every one of `end` (0 is greedy)."""

    curve: bool = True  # on the way too
    end: tuple[float, ...] = (1.0, 0.0)
    series: str = "test"  # of deals or routes
    variants: tuple[str, ...] | None = None  # None: all of the task
    validate: bool = False  # also ID success on validation deals, to choose the best checkpoint
    verify_iter: int | None = None  # replies judged; None: as the study says
    pictures: str = "own"  # or a control, see `evaluate.PICTURES`


@dataclass(frozen=True)
class Arm:
    """One training run of a study. An experiment is a list of arms, which may be measured in several ways;
    arms of one name are one run, which all experiments share."""

    name: str  # of its folder, and in results.jsonl
    algorithm: str = "sft"  # or "ppo"
    start: str = "init"  # the arm whose last checkpoint it starts from; "NAME@K": its checkpoint number K, or
    # the last one of a shorter run
    training: dict = field(default_factory=dict)  # over the study's settings for the algorithm
    environment: dict = field(default_factory=dict)  # over the study's options, in training
    records: str = "expert"  # what SFT learns from, one of RECORDS
    parts: str | None = None  # of the model that are trained; None: those of the command line
    checkpoints: int | None = None  # None: as many as the study says
    searched: bool = False  # the learning rate is: see `StudyRun.search`
    measure: Measure = Measure()


@dataclass
class Study:
    """The settings of `sftrl study` for one task and the tiny model."""

    base: sft.SFTConfig
    sft: sft.SFTConfig
    rl: ppo.PPOConfig
    init: dict  # the init's settings, over those of `sft`
    flops: float  # of each arm, after init
    count: int = 6  # checkpoints of each arm
    hands: int = 1024  # or routes, in the evaluation of a checkpoint
    verify_iter: int = 3  # of training and evaluation; the paper's 5 would double the time of a seed
    max_new_tokens: int = 48
    tiny: str = "tiny"  # the built-in model
    options: dict = field(default_factory=dict)  # of the environments: small enough for the tiny model
    # Learning rates by arm, see docs/results.md; other arms take that of "sft" or "rl".
    rates: dict = field(default_factory=dict)
    grid: tuple[float, ...] = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)  # for all arms' search

    def scaled(self, scale: float) -> "Study":
        """Every stage shortened to `scale` of its length, for a quick look."""
        base = replace(self.base, steps=max(1, round(self.base.steps * scale)))
        init = self.init | {"steps": max(1, round(self.init["steps"] * scale))}
        return replace(self, base=base, init=init, flops=self.flops * scale)

    def for_model(self, parameters: int) -> "Study":
        """The same for a model of the caller's own: the task at full size, as many tokens as the tiny model
        gets, and the rates with which `sftrl sft` and `sftrl ppo` train."""
        return replace(
            self,
            rates={"init": sft.SFTConfig.lr},
            rl=replace(self.rl, value_lr=ppo.PPOConfig.value_lr),
            flops=self.flops * parameters / TINY_PARAMETERS,
            max_new_tokens=256,
            options={},
        )

    def config(self, arm: Arm) -> sft.SFTConfig | ppo.PPOConfig:
        """The training settings of an arm."""
        usual, main = (self.sft, "sft") if arm.algorithm == "sft" else (self.rl, "rl")
        given = {"lr": self.rates.get(arm.name, self.rates.get(main, usual.lr)), "flops": self.flops}
        given |= {"max_new_tokens": self.max_new_tokens} if main == "rl" else {}
        return replace(usual, **given | arm.training)


TINY_PARAMETERS = 1_128_832
_CARDS = Study(
    base=sft.SFTConfig(
        lr=3e-3, batch_size=64, microbatch_size=8, steps=800, warmup=0.05, loss_on="last", muon=True
    ),
    init={"microbatch_size": 8, "steps": 60, "loss_on": "last"},
    sft=sft.SFTConfig(batch_size=64, microbatch_size=16, steps=10**9),
    rl=ppo.PPOConfig(
        value_lr=3e-3,
        episodes=512,
        minibatch_size=64,
        microbatch_size=16,
        epochs=1,
        steps=10**9,
        warmup=0.1,
    ),
    rates={"init": 3e-4, "sft": 1e-3, "rl": 2e-4},
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
    tiny="tiny-streets",
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
        rates=_CARDS.rates | {"sft": 2e-4},
        options=TINY_PICTURES,
    ),
    "virl-l": replace(_WALKS, rates=_WALKS.rates | {"rl-kl": 1e-3}),
    # A walk has a row of tokens for each waypoint: shorter ones, or a seed would take hours.
    "virl-vl": replace(
        _WALKS,
        base=replace(_WALKS.base, steps=800),
        rl=replace(_WALKS.rl, episodes=128, minibatch_size=16),
        rates=_CARDS.rates | {"sft": 2e-4},
        flops=1e13,
        count=3,
        hands=128,
        max_new_tokens=80,
        options=TINY_WALKS | {"turns": 2} | TINY_VIEWS,
    ),
}
SEARCH_SEEDS = (1000, 1001)  # the rates are chosen on these, which no report shows; one alone is not enough


def main_arms(study: Study) -> list[Arm]:
    """The study's main comparison: SFT and RL from one init at equal compute. The init is a short SFT on
    demonstrations as imperfect as the base's corpus; it teaches the reply's form."""
    training = study.init | {"flops": math.inf}
    init = Arm("init", start="base", training=training, records="imperfect", checkpoints=1)
    return [init, Arm("sft", searched=True, measure=Measure(validate=True)), Arm("rl", "ppo", searched=True)]


# PPO as the paper has it (sections 4 and C), but for its rates and sizes.
PAPERS_PPO = {"ratio": "reply", "thought_coef": 0.5, "value_trunk": "shared", "clip": 0.1}


def more_arms(study: Study, experiment: str) -> list[Arm]:
    """The arms of another experiment, after those of the main one."""
    init, demonstrated, reinforced = main_arms(study)
    at_end, rate = Measure(curve=False), study.config(reinforced).lr
    if experiment == "no-init":
        rates = (rate / 2, rate, rate * 2)
        return [Arm(f"no-init-{lr:g}", "ppo", "base", {"lr": lr}, measure=at_end) for lr in rates]
    if experiment == "verification":  # one evaluation with 10 replies tells of all smaller budgets
        ten = Measure(curve=False, end=(1.0,), verify_iter=10)
        budgets = [
            Arm(f"rl-budget-{k}", "ppo", environment={"verify_iter": k}, checkpoints=1) for k in (1, 3, 5, 10)
        ]
        return [replace(arm, measure=ten) for arm in (init, demonstrated, *budgets)]
    if experiment == "start":
        later = range(1, study.count + 1)
        return [Arm(f"rl-from-sft-{k}", "ppo", f"sft@{k}", checkpoints=1, measure=at_end) for k in later]
    if experiment == "recognition":
        arms = init, demonstrated, reinforced
        return [
            replace(a, measure=Measure(False, (1.0,), pictures=p)) for a in arms for p in evaluate.PICTURES
        ]
    if experiment == "revision-sft":
        return [Arm("sft-revision", training={"loss_on": "last"}, records="revision", searched=True)]
    if experiment == "sft-search":
        tried = [(parts, lr) for parts in TRAINED for lr in study.grid[::2]]
        return [
            Arm(f"sft-{parts}-{lr:g}", training={"lr": lr}, parts=parts, checkpoints=1, measure=at_end)
            for parts, lr in tried
        ]
    if experiment == "reply-ratio":
        return [Arm("rl-reply", "ppo", training=PAPERS_PPO, searched=True)]
    if experiment == "rivals":
        diverse, dft = {"diverse": True}, Arm("dft", training={"objective": "dft"}, searched=True)
        own = study.config(dft).lr
        control = Arm("sft-at-dft-rate", training={"lr": own}, measure=at_end)
        return [
            dft,
            *([control] if own != study.config(demonstrated).lr else []),
            Arm("self-sft", "ppo", training={"objective": "imitate"}, searched=True),
            Arm("rl-kl", "ppo", training={"kl_coef": 0.1}, searched=True),
            Arm("diverse-sft", environment=diverse, searched=True),
            Arm("diverse-rl", "ppo", environment=diverse, searched=True),
        ]
    return []  # "main", and "forgetting", which compares what the others measured


def experiments_of(cls: type[envs.Environment]) -> list[str]:
    """The experiments that a task can be asked for: those with frozen parts want pictures."""
    seen = {"recognition", "sft-search"}
    return ["main", *(name for name in evaluate.SECTIONS if cls.pictures or name not in seen)]


def arms_of(study: Study, experiment: str, cls: type[envs.Environment]) -> list[Arm]:
    """The arms of an experiment after those of the main one; without such as change what an environment of
    this class cannot change."""
    known = {"verify_iter", *envs.options_of(cls)}
    return [arm for arm in more_arms(study, experiment) if arm.environment.keys() <= known]


# What SFT learns from, by name: a function of an environment.
RECORDS = {
    "expert": envs.demonstration,
    "imperfect": sft.imperfect_demonstration,
    "revision": sft.revision,
}


class StudyRun:
    """A study in its folder: trains and measures arms, each from where it stands.

    Args:
        task: a task by its name, or FILE.py:CLASS.
        study: its settings, see STUDIES.
        model: "tiny", whose base is trained here, or a folder or Hub id, which is its own base.
        hands: evaluation hands, or routes, per point; None takes the study's.
    """

    def __init__(
        self,
        task: str,
        study: Study,
        out: Path,
        loading: Loading = Loading(),
        model: str = "tiny",
        hands: int | None = None,
        tensorboard: bool = False,
    ):
        self.task, self.out, self.loading, self.tensorboard = task, out, loading, tensorboard
        self.model, self.tiny = model, model in ("tiny", study.tiny)
        self.study, self.hands = study, hands or study.hands
        if self.hands < 2:
            raise ValueError("--hands must be at least 2, for an interval")
        self.results = evaluate.Results(out / "results.jsonl")
        self._reference: tuple[int | None, evaluate.Reference | None] = None, None
        self.cls = envs.task_class(task)
        self.variants, self.headline = tuple(self.cls.variants), self.cls.headline

    def load(self, model: str, parts: str | None = None) -> Policy:
        """A policy for this study's task."""
        loading = replace(self.loading, train=parts) if parts else self.loading
        return load_policy(loading, model, pictures=self.cls.pictures)

    def environment(self, variant: str = "id", series: str = "train", **options):
        """One of the study's environments. `series` "valid" and "test": routes that training does not
        walk."""
        split = {"split": series} if "split" in envs.options_of(self.cls) else {}
        options = {"verify_iter": self.study.verify_iter} | self.study.options | split | options
        return envs.make(self.task, variant, **options)

    # ---- training

    def folder(self, name: str, seed: int) -> Path:
        """Where an arm's run stands; all seeds share the base."""
        return self.out / name if name == "base" else self.out / f"seed-{seed}" / name

    def checkpoint(self, start: str, seed: int) -> str:
        """The model that "NAME" or "NAME@K" means."""
        name, _, number = start.partition("@")
        if name == "base" and not self.tiny:
            return self.model
        found = checkpoints(self.folder(name, seed))
        return str(found[min(int(number or len(found)), len(found)) - 1])

    def place(self, model: str) -> str:
        """A checkpoint by its place in the study's folder, which may move; any other model by its name."""
        path = Path(model)
        return str(path.relative_to(self.out)) if path.is_relative_to(self.out) else model

    def train_base(self) -> None:
        """The tiny foundation model, from random weights on a mixed corpus. A given model is its own base."""
        if self.tiny:
            torch.manual_seed(0)
            study = self.study
            corpus = sft.foundation_batches(self.task, study.base.batch_size, study.options)
            settings = {"stage": "base", "options": study.options}
            run_sft(lambda: self.load(study.tiny), self.out / "base", corpus, study.base, settings)

    def train(self, arm: Arm, seed: int) -> None:
        """One arm, unless it is finished."""
        self._reference = None, None  # training needs its memory
        config, model = self.study.config(arm), self.checkpoint(arm.start, seed)
        settings = {
            "task": self.task,
            "arm": arm.name,
            "model": self.place(model),
            "seed": seed,
            "options": {"verify_iter": self.study.verify_iter} | self.study.options | arm.environment,
            "records": arm.records,
            **asdict(self.loading),
            "train": arm.parts or self.loading.train,
        }
        count = arm.checkpoints or self.study.count
        given = (lambda: self.load(model, arm.parts)), self.folder(arm.name, seed)
        logs = {"count": count, "tensorboard": self.tensorboard}
        if arm.algorithm == "sft":
            env = self.environment(**arm.environment)
            batches = sft.fresh_batches(env, RECORDS[arm.records], config.batch_size, f"{arm.records}/{seed}")
            run_sft(*given, batches, config, settings, **logs)
        else:
            config = replace(config, seed=seed)
            run_ppo(*given, lambda: self.environment(**arm.environment), config, settings, **logs)

    # ---- evaluation

    def measure(self, arm: Arm, seed: int, experiment: str = "main") -> None:
        """Evaluates what results.jsonl does not hold yet of an arm's checkpoints."""
        m, own = arm.measure, arm.name == "base" and not self.tiny
        *early, last = [self.model] if own else checkpoints(self.folder(arm.name, seed))
        few, variants = max(2, self.hands // 4), m.variants or self.variants
        wanted = [(path, few, m.series, variants, 1.0) for path in early if m.curve]
        wanted += [(path, few, "valid", ("id",), 1.0) for path in (*early, last) if m.validate]
        wanted += [(last, self.hands, m.series, variants, t) for t in m.end]
        with Progress(f"seed-{seed}/{arm.name} evaluation", len(wanted) + len(m.end) * m.validate) as bar:
            for point in wanted:
                self.point(arm, seed, experiment, *point)
                bar.update()
            if m.validate:  # the best checkpoint like the last one
                valid = self.results.find(arm=arm.name, seed=seed, series="valid", episodes=few)
                best = self.out / max(valid, key=lambda p: p[self.headline])["checkpoint"]
                for t in m.end:
                    self.point(arm, seed, experiment, best, self.hands, m.series, variants, t)
                    bar.update()

    def reference(self, seed: int) -> evaluate.Reference:
        """The seed's init, from which distances are measured; the last one that was asked for is kept."""
        if self._reference[0] != seed:
            self._reference = seed, evaluate.Reference(self.load(self.checkpoint("init", seed)))
        return self._reference[1]

    def point(
        self,
        arm: Arm,
        seed: int,
        experiment: str,
        path,
        hands: int,
        series: str,
        variants,
        temperature: float,
    ) -> None:
        """Evaluates one checkpoint under some variants, unless that was done."""
        lines = read_lines(Path(path).parent / "metrics.jsonl") if isinstance(path, Path) else []
        line = next((x for x in lines if f"checkpoint-{x['step']}" == path.name), {"step": 0, "flops": 0.0})
        budget, pictures = arm.measure.verify_iter or self.study.verify_iter, arm.measure.pictures
        place = {"arm": arm.name, "seed": -1 if arm.name == "base" else seed, "step": line["step"]}
        place |= {"series": series, "temperature": temperature, "verify_iter": budget, "pictures": pictures}
        missing = [v for v in variants if not self.results.find(**place, variant=v, episodes=hands)]
        policy = self.load(str(path)) if missing else None
        reference = self.reference(seed) if missing and temperature and pictures == "own" else None
        for variant in missing:
            environments = [self.environment(variant, series, verify_iter=budget) for _ in range(hands)]
            result, episodes = evaluate.evaluate(
                policy, environments, temperature, self.study.max_new_tokens, series, reference, pictures
            )
            new = {"task": self.task, "experiment": experiment, **place}
            new |= {"flops": line["flops"], "variant": variant}
            self.results.add(new | result | {"checkpoint": self.place(str(path))}, write=policy.rank == 0)
            if policy.rank == 0:
                self.save_transcripts(new, environments, episodes[:2])

    def save_transcripts(self, point: dict, environments: Sequence, episodes: Sequence[envs.Episode]) -> None:
        """Appends a point's first episodes to transcripts.jsonl, and of greedy ones the pictures."""
        names = ("arm", "seed", "step", "series", "temperature", "variant")
        place = {name: point[name] for name in names}
        with open(self.out / "transcripts.jsonl", "a") as file:
            for i, (env, episode) in enumerate(zip(environments, episodes)):
                if env.image and not place["temperature"]:
                    folder = f"pictures/{place['seed']}-{place['arm']}-{place['step']}-{place['variant']}/{i}"
                    save_pictures(env, episode, env.start_of(place["series"], i), self.out / folder)
                    place["pictures"] = folder
                file.write(json.dumps(place | episode.transcript()) + "\n")

    def measure_reading(self) -> None:
        """How much better the tiny base reads black cards than red ones, on pictures of its reading
        corpus."""
        for variant, color in (("id", "black"), ("visual", "red")):
            place = {"task": self.task, "arm": "base", "seed": -1, "step": 0, "series": "reading"}
            place |= {"temperature": 0.0, "variant": variant}
            if not self.results.find(**place, episodes=self.hands):
                rng = random.Random(f"reading/{color}")
                records = [
                    sft.reading_record(rng, **self.study.options, color=color) for _ in range(self.hands)
                ]
                base = self.checkpoint("base", -1)
                result = evaluate.reading(self.load(base), records)
                new = place | {"flops": 0.0} | result | {"checkpoint": self.place(base)}
                self.results.add(new, write=policy_rank() == 0)

    # ---- experiments

    def compare(self, experiments: Sequence[str], seeds: int, note: str) -> None:
        """The main experiment and others: after every seed the report is written and its table of claims
        printed."""
        if self.tiny and self.task == "gp-vl":
            self.measure_reading()
        main = main_arms(self.study)
        for seed in range(seeds):
            for name in experiments:
                # Others are compared with the main arms' ends.
                arms = main + arms_of(self.study, name, self.cls)
                for arm in arms:
                    self.train(arm, seed)
                base = [Arm("base", measure=Measure(curve=False))] if name == "main" else []
                for arm in base + arms:
                    self.measure(arm, seed, name)
            if policy_rank() == 0:
                print("\n".join(["", *self.report(range(seed + 1), note)]), flush=True)

    def report(self, seeds: Sequence[int], note: str) -> list[str]:
        """Writes the report of all experiments that were measured, with a `note` on page one; returns its
        table of claims."""
        hands = self.hands, max(2, self.hands // 4)
        points = self.results.find(seed=(-1, *seeds), episodes=hands)
        measured, trained = {}, {arm.name: arm for arm in main_arms(self.study)}
        for name in experiments_of(self.cls)[1:]:
            arms = arms_of(self.study, name, self.cls)
            ways = [{"verify_iter": a.measure.verify_iter, "pictures": a.measure.pictures} for a in arms]
            places = [(a.name, {k: v for k, v in way.items() if v}) for a, way in zip(arms, ways)]
            if all(evaluate.find(points, arm=arm, **place) for arm, place in places):
                measured[name] = places
                trained |= {arm.name: arm for arm in arms}
        model = self.study.tiny if self.tiny else self.model
        settings = {
            "task": self.task,
            "model": self.model,
            "parameters": Policy.load(model, torch.device("meta")).parameter_count,
            "verify_iter": self.study.verify_iter,
            "arms": [self.row_of(arm) for arm in trained.values()],
            "note": note,
        }
        claims = evaluate.Report(points, self.out, settings, measured).write()
        return [*claims, "", f"report: {self.out / 'report.md'}"]

    def row_of(self, arm: Arm) -> list[str]:
        """What the report's settings say of an arm."""
        config = self.study.config(arm)
        differ = {k: v for k, v in asdict(config).items() if v != getattr(type(config), k)} | arm.environment
        if config.flops < math.inf:
            differ.pop("steps", None)  # they reach farther
        differ |= {"records": arm.records} if arm.records != "expert" else {}
        differ |= {"train": arm.parts} if arm.parts else {}
        settings = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in differ.items())
        return [arm.name, arm.start, arm.algorithm, settings]

    def search(self, experiment: str) -> None:
        """Chooses the rates of an experiment's arms by ID success on validation deals, in the mean over the
        search's seeds: from the middle of the grid upwards as long as the next rate is better, then downwards
        alike. What the same weights do out of distribution stands beside it and chooses nothing. Prints and
        writes search-EXPERIMENT.md."""
        init, *main = main_arms(self.study)
        arms = main if experiment == "main" else arms_of(self.study, experiment, self.cls)
        grid, rows = self.study.grid, [self.try_rate(init)[1]]
        for arm in (arm for arm in arms if arm.searched):
            tried: dict[int, tuple[float, list[str]]] = {}  # by place in the grid

            def success(k: int) -> float:
                if k not in tried:
                    tried[k] = self.try_rate(arm, grid[k])
                return tried[k][0]

            best = len(grid) // 2
            for step in (1, -1):
                while 0 <= best + step < len(grid) and success(best) < success(best + step):
                    best += step
            rows += [tried[k][1] for k in sorted(tried)]
            rows.append([arm.name, f"**chosen by id: {grid[best]:g}**", *[""] * len(self.variants)])
        if policy_rank() == 0:
            measure = self.headline.replace("_", " ")
            title = f"{measure} on validation hands or routes, temperature 1, in percent, of seeds "
            table = evaluate.table(["arm", "learning rate", *self.variants], rows)
            lines = [title + ", ".join(map(str, SEARCH_SEEDS)), "", *table]
            write_whole(self.out / f"search-{experiment}.md", "\n".join(lines) + "\n")
            print("\n".join(lines))

    def try_rate(self, arm: Arm, rate: float | None = None) -> tuple[float, list[str]]:
        """An arm, at this rate or its own, trained on the search's seeds: ID success on validation deals, the
        sum over seeds, and its row of the search's table."""
        arm = replace(arm, measure=Measure(curve=False, end=(1.0,), series="valid"), checkpoints=1)
        if rate:
            training = arm.training | {"lr": rate}
            arm = replace(arm, name=f"{arm.name}-{rate:g}", training=training)
        for seed in SEARCH_SEEDS:
            self.train(arm, seed)
            self.measure(arm, seed, "search")
        cells, success = [], {}
        for variant in self.variants:
            points = self.results.find(arm=arm.name, variant=variant, series="valid", episodes=self.hands)
            points = [p for p in points if p["seed"] in SEARCH_SEEDS]
            shown = [100 * p[key] for p in points for key in (self.headline, self.headline + "_se")]
            cells.append("{:.1f} ± {:.1f}, {:.1f} ± {:.1f}".format(*shown))
            success[variant] = sum(p[self.headline] for p in points)
        lr = self.study.config(arm).lr
        return success["id"], [arm.name.removesuffix(f"-{lr:g}"), f"{lr:g}", *cells]


def policy_rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


# ------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """Errors in one line, with exit status 2; an option is written out."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        self.exit(2, f"sftrl: error: {message}\n")


def reader(name: str, kind: type, option: Option):
    """A reader of arguments of a kind within an option's limits."""

    def read(text: str):
        value = kind(text)
        try:
            option.check(name, kind, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return value

    read.__name__ = kind.__name__  # argparse names it in its messages
    return read


def add_options(group, cls: type, given_alone: bool = False) -> None:
    """A flag for every option that a class lists. With `given_alone` one that is not given is None."""
    for name, (kind, default, option) in envs.options_of(cls).items():
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = typing.get_args(kind)[0]  # of int | None the integer
        many, inner = typing.get_origin(kind), typing.get_args(kind)
        limits = ": " + ", ".join(option.choices) if option.choices else ", " + option.limits()
        text = (option.help + limits).removesuffix(", ")
        if default not in (None, ..., []) and option.metavar != "FILE":
            shown = " ".join(map(str, default)) if many else default
            text += f" (default: {('no', 'yes')[default] if kind is bool else shown})"
        how = {"help": text.replace("%", "%%"), "default": None if given_alone or default is ... else default}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"type": reader(name, inner[0] if many else kind, option), "metavar": option.metavar}
            how |= {"required": default is ...} | ({"nargs": len(inner)} if many is tuple else {})
        if many is list:
            how["action"] = "append"
        group.add_argument("--" + name.replace("_", "-"), **how)


def named_number(text: str) -> tuple[str, float]:
    """NAME=NUMBER, as --rewards and --rates take it."""
    name, _, value = text.partition("=")
    return name, float(value)


class EveryCommand:
    """Options of all commands."""

    task: Annotated[
        str,
        Option(
            f"the task: {', '.join(envs.TASKS)}, or an environment of your own, FILE.py:CLASS; "
            "--task NAME --help shows its options",
            metavar="NAME",
        ),
    ] = "gp-l"
    threads: Annotated[int, Option("CPU threads; 0 takes all cores", least=0)] = 0
    rollout_batch: Annotated[int, Option("episodes played together", least=1)] = 256


class Training(EveryCommand):
    """Options of the commands that train."""

    train: Annotated[
        str, Option("the parts of a vision-language model that are trained", choices=TRAINED)
    ] = "all"
    weights: Annotated[
        str,
        Option(
            "of the model in training; bfloat16, with bf16 optimizer states and stochastic rounding, halves "
            "the memory, on one GPU",
            choices=("float32", "bfloat16"),
        ),
    ] = "float32"
    tensorboard: Annotated[bool, Option("write the metrics for TensorBoard too (needs its package)")] = False
    recompute: Annotated[bool, Option("activation checkpointing: less memory for a third more work")] = False


class StudyCommand(Training):
    """The whole comparison: base, SFT init, then SFT and RL at equal compute, evaluation, report."""

    experiment: Annotated[
        str, Option(f"main, {', '.join(evaluate.SECTIONS)}, or all (docs/results.md)", metavar="NAME")
    ] = "main"
    seeds: Annotated[int, Option("number of seeds after the base", least=1)] = 3
    out: Annotated[str, Option("the study folder", metavar="DIR")] = "runs/study"
    model: Annotated[
        str, Option("tiny (the task's own built-in model), a folder or a Hub id; those are their own base")
    ] = "tiny"
    hands: Annotated[
        int | None, Option("evaluation hands, or routes, per point; None: the task's", least=1)
    ] = None
    scale: Annotated[float, Option("length of every stage relative to the defaults", above=0)] = 1.0
    search: Annotated[
        bool, Option("only search the learning rates, on ID success and seeds of their own")
    ] = False


class RunCommand(Training):
    """Options of one training run."""

    model: Annotated[str, Option("tiny, tiny-streets, a folder or a Hub id")] = "tiny"
    out: Annotated[str, Option("the run folder; a run that stands there goes on", metavar="DIR")]
    checkpoints: Annotated[int, Option("checkpoints written, denser early", least=1)] = 4
    keep: Annotated[int | None, Option("keep the newest K checkpoints alone", least=1, metavar="K")] = None


class SFTCommand(RunCommand):
    """Supervised fine-tuning on demonstrations."""

    demos: Annotated[
        str | None,
        Option("demonstrations in the released JSON format, in place of the expert's", metavar="PATH"),
    ] = None
    images: Annotated[
        str | None, Option("the folder of their pictures; None: that of --demos", metavar="DIR")
    ] = None
    wrong_turns: Annotated[int, Option("wrong replies before the expert's")] = 0
    seed: Annotated[int, Option("random seed", least=0, most=2**32 - 1)] = 0


class PPOCommand(RunCommand):
    """Reinforcement learning with PPO against the verifier."""


class Sampling(EveryCommand):
    """Options of the commands that let a model play."""

    temperature: Annotated[float, Option("sampling temperature; 0 is greedy", least=0)] = 1.0
    max_new_tokens: Annotated[int, Option("longest reply, in tokens", least=1)] = 128


class EvaluateCommand(Sampling):
    """Success of one checkpoint, with standard errors and sample transcripts."""

    model: Annotated[str, Option("tiny, tiny-streets, a folder or a Hub id")]
    episodes: Annotated[
        int | None,
        Option("hands, or routes in their order; None: 234, as in the paper, or all routes", least=1),
    ] = None
    transcripts: Annotated[int, Option("episodes to print", least=0)] = 2
    out: Annotated[
        str | None,
        Option("write the result and all transcripts, result.json and transcripts.jsonl", metavar="DIR"),
    ] = None
    save: Annotated[
        str | None, Option("visual tasks: write the pictures of those episodes", metavar="DIR")
    ] = None
    pictures: Annotated[
        str, Option("visual tasks: a control that shows others instead", choices=evaluate.PICTURES)
    ] = "own"


class PlayCommand(Sampling):
    """One episode for the eye: prompt, expert reply, and the verdict on a reply."""

    reply: Annotated[list[str], Option("judge this reply; may be given several times", metavar="TEXT")] = []
    model: Annotated[str | None, Option("let this model play the episode")] = None
    save: Annotated[str | None, Option("write the picture of a visual task", metavar="PATH")] = None
    seed: Annotated[int, Option("which episode", least=0, most=2**32 - 1)] = 0


class DataCommand(EveryCommand):
    """Writes expert demonstrations in the released SFT format, or a city of streets in that of the routes."""

    out: Annotated[
        str,
        Option(
            "the JSON file of demonstrations; for virl FILE.json, or the folder for the built-in city, its "
            "routes and, for virl-vl, its panoramas",
            metavar="PATH",
        ),
    ]
    episodes: Annotated[
        int | None, Option("demonstrations, or routes of a city; None: 1000, or all routes", least=1)
    ] = None
    wrong_turns: Annotated[int, Option("wrong replies before the expert's")] = 0
    seed: Annotated[int, Option("random seed, of a city too: 0 is the study's", least=0, most=2**32 - 1)] = 0


def build_parser(task: str = "gp-l") -> argparse.ArgumentParser:
    """All commands and their options, those of the environment for this task. Raises ValueError for none."""
    cls = envs.task_class(task)
    parser = Parser(
        prog="sftrl",
        description="SFT and PPO side by side: which one learns the rule? --help explains every command.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for run, options, config in (
        (command_study, StudyCommand, None),
        (command_sft, SFTCommand, sft.SFTConfig),
        (command_ppo, PPOCommand, ppo.PPOConfig),
        (command_evaluate, EvaluateCommand, None),
        (command_play, PlayCommand, None),
        (command_data, DataCommand, None),
    ):
        name, text = options.__name__.removesuffix("Command").lower(), options.__doc__
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run, train="all", recompute=False, weights="float32", tensorboard=False)
        add_options(sub, options)
        if config:
            add_options(sub.add_argument_group("training"), config)
        if options is StudyCommand:
            text = "other learning rates for some arms, the init among them"
            sub.add_argument("--rates", type=named_number, nargs="+", metavar="ARM=RATE", help=text)
        else:
            add_environment(sub.add_argument_group("environment"), cls)
        if options is PlayCommand:
            for start, (kind, text) in cls.start_options.items():
                sub.add_argument(f"--{start}", type=kind, help=text)
    return parser


def add_environment(group, cls: type[envs.Environment]) -> None:
    """The options of an environment."""
    variants = ", ".join(f"{name} ({where})" for name, where in cls.variants.items())
    group.add_argument("--variant", default="id", metavar="NAME", help=f"{variants} (default: %(default)s)")
    usual = " ".join(f"{name}={value:g}" for name, value in cls.rewards.items())
    text = f"other rewards for some verdicts, or for a budget that is used up (default: {usual})"
    group.add_argument("--rewards", type=named_number, nargs="+", metavar="VERDICT=REWARD", help=text)
    add_options(group, cls, given_alone=True)


def config_of(args: argparse.Namespace, config: type):
    """The training settings that a command's options describe."""
    values = {name: getattr(args, name) for name in envs.options_of(config)}
    return config(**{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})


def environment_of(args: argparse.Namespace) -> envs.Environment:
    """The environment that a command's options describe."""
    options = {"rewards": dict(args.rewards or ())}
    for name, (_, _, option) in envs.options_of(envs.task_class(args.task)).items():
        value = getattr(args, name)
        if value is not None:
            options[name] = Path(value).read_text("utf-8-sig") if option.metavar == "FILE" else value
    return envs.make(args.task, args.variant, getattr(args, "seed", 0), **options)


def wrong_turns_fit(args: argparse.Namespace):
    """The environment of demonstrations, if its budget leaves room for a right reply."""
    env = environment_of(args)
    if not 0 <= args.wrong_turns < env.verify_iter:
        raise ValueError(
            f"--wrong-turns {args.wrong_turns} must be at least 0 and below --verify-iter {env.verify_iter}"
        )
    return env


def environment_settings(args: argparse.Namespace) -> dict:
    """What config.json says of a run's task."""
    options = envs.options_of(envs.task_class(args.task))
    names = ("task", "model", "variant", *options, "rollout_batch", "train", "weights")
    return {name: getattr(args, name) for name in names} | {"rewards": dict(args.rewards or ())}


def logs_of(args: argparse.Namespace) -> dict:
    """What `run_stage` shall write beside the metrics."""
    return {"count": args.checkpoints, "keep": args.keep, "tensorboard": args.tensorboard}


def study_of(args: argparse.Namespace) -> tuple[Study, str]:
    """The settings that a command line asks for, and what the report shall note of them."""
    study, tiny = STUDIES.get(args.task, STUDIES["gp-l"]).scaled(args.scale), True
    note = "How the learning rates were chosen: docs/results.md."
    if args.model not in ("tiny", study.tiny):
        parameters = Policy.load(args.model, torch.device("meta")).parameter_count
        study, tiny, note = study.for_model(parameters), False, "Learning rates: those of sftrl sft and ppo."
    elif args.task not in STUDIES:
        known = ", ".join(STUDIES)
        raise ValueError(f"the tiny model has no study of {args.task}: give --model, or one of {known}")
    cls, given = envs.task_class(args.task), dict(args.rates or ())
    arms = {arm.name for name in experiments_of(cls) for arm in main_arms(study) + arms_of(study, name, cls)}
    for name, rate in given.items():
        if name not in arms or not 0 < rate < math.inf:
            raise ValueError(f"--rates {name}={rate:g}: an arm and a positive number are needed")
    if given:
        note += f" Given on the command line: {given}."
    if study.options and tiny:
        listed = envs.options_of(cls)
        shown = ", ".join(f"{name} {value} ({listed[name][1]})" for name, value in study.options.items())
        note += (
            f" For the tiny model the task is made smaller; its options, the defaults in brackets: {shown}."
        )
    return replace(study, rates=study.rates | given), note


def command_study(args: argparse.Namespace) -> None:
    """`sftrl study`."""
    known = experiments_of(envs.task_class(args.task))
    if args.experiment not in (*known, "all"):
        raise ValueError(f"--experiment {args.experiment!r}: choose from {', '.join(known)}, all")
    chosen = known if args.experiment == "all" else [args.experiment]
    study, note = study_of(args)
    loading = loading_of(args)
    run = StudyRun(args.task, study, Path(args.out), loading, args.model, args.hands, args.tensorboard)
    run.train_base()
    if args.search:
        for name in chosen:
            run.search(name)
    else:
        run.compare(chosen, args.seeds, note)


def loading_of(args: argparse.Namespace) -> Loading:
    """How the command line says that models are loaded."""
    return Loading(args.rollout_batch, args.weights, args.train, args.recompute)


def command_sft(args: argparse.Namespace) -> None:
    """`sftrl sft`."""
    config = config_of(args, sft.SFTConfig)
    pictures = envs.task_class(args.task).pictures
    if args.demos:
        records = sft.read_records(args.demos, args.images)
        batches, pictures = sft.epochs(records, config.batch_size, args.seed), bool(records[0].get("image"))
    else:
        batches = sft.fresh_batches(
            wrong_turns_fit(args),
            lambda env: envs.demonstration(env, args.wrong_turns),
            config.batch_size,
            f"sft/{args.seed}",
        )
    torch.manual_seed(args.seed)
    settings = environment_settings(args) | {
        "demos": args.demos,
        "images": args.images,
        "wrong_turns": args.wrong_turns,
        "seed": args.seed,
    }
    run_sft(
        lambda: load_policy(loading_of(args), args.model, pictures),
        Path(args.out),
        batches,
        config,
        settings,
        **logs_of(args),
    )


def command_ppo(args: argparse.Namespace) -> None:
    """`sftrl ppo`."""
    config = config_of(args, ppo.PPOConfig)
    env = environment_of(args)  # wrong options end here, before the model is loaded
    torch.manual_seed(args.seed)
    run_ppo(
        lambda: load_policy(loading_of(args), args.model, env.pictures),
        Path(args.out),
        env.twin,
        config,
        environment_settings(args),
        **logs_of(args),
    )


def command_evaluate(args: argparse.Namespace) -> None:
    """`sftrl evaluate`."""
    env = environment_of(args)
    n = args.episodes or env.series_length
    environments = [env, *(env.twin() for _ in range(n - 1))]
    if args.save:
        if not env.pictures:
            raise ValueError(f"task {args.task!r} has no pictures to --save")
        Path(args.save).mkdir(parents=True, exist_ok=True)  # a wrong path ends here, before the work
    policy = load_policy(loading_of(args), args.model, env.pictures)
    check_experts(policy, ((env, *env.start_of("test", i)) for i, env in enumerate(environments)))
    with Progress("evaluation", n // policy.world) as bar:
        result, episodes = evaluate.evaluate(
            policy,
            environments,
            args.temperature,
            args.max_new_tokens,
            pictures=args.pictures,
            watch=bar.reach,
        )
    if policy.rank == 0:
        if args.out:
            write_whole(Path(args.out) / "result.json", json.dumps(result, indent=1))
            lines = (json.dumps(episode.transcript()) + "\n" for episode in episodes)
            write_whole(Path(args.out) / "transcripts.jsonl", "".join(lines))
        for i, episode in enumerate(episodes[: args.transcripts]):
            if args.save:
                save_pictures(env, episode, env.start_of("test", i), Path(args.save) / str(i))
            print_transcript(episode)
        shown = {key: value for key, value in result.items() if key not in evaluate.MEASURES.values()}
        print(json.dumps(shown, indent=1))


def print_transcript(episode: envs.Episode) -> None:
    """One episode as a conversation."""
    print(f"--- {'solved' if episode.success else 'not solved'}\nuser: {episode.prompt}")
    for turn in episode.turns:
        print(f"model: {turn.reply}\nverifier: [{turn.verdict} {turn.reward:+g}] {turn.feedback}")


def save_pictures(env, episode: envs.Episode, start: tuple[str, dict | None], folder: Path) -> None:
    """Plays an episode's replies again from its `start` and writes the pictures it showed, each under the
    number of the first reply to it."""
    observation, _ = env.reset(*start)
    folder.mkdir(parents=True, exist_ok=True)
    saved = None
    for k, turn in enumerate(episode.turns):
        if observation.image is not saved:
            saved = observation.image
            saved.save(folder / f"{k}.png")
        observation, *_ = env.step(turn.reply)


def command_play(args: argparse.Namespace) -> None:
    """`sftrl play`."""
    env = environment_of(args)
    observation, info = env.reset(options={name: getattr(args, name) for name in env.start_options})
    if args.save:
        if observation.image is None:
            raise ValueError(f"task {args.task!r} has no picture to save")
        observation.image.save(args.save)
    print(f"user: {envs.text_of(observation.messages[0]['content'])}")

    def judge(reply: str) -> bool:
        """Steps, prints, and says whether the episode goes on."""
        nonlocal observation
        observation, reward, terminated, truncated, info = env.step(reply)
        goes_on = not (terminated or truncated)
        read = envs.text_of(observation.messages[-1]["content"]) if goes_on else info["feedback"]
        print(f"model: {reply}\nverifier: [{info['verdict']} {reward:+g}] {read}")
        return goes_on

    if args.model:
        policy = load_policy(loading_of(args), args.model, env.pictures)
        with policy.responder(
            args.temperature, args.max_new_tokens, policy.generator(f"play/{args.seed}")
        ) as respond:
            while (reply := respond([0], [observation])[0]) is not None and judge(reply):
                pass
        if reply is None:
            print(f"cut off: the model's positions reach no farther than {policy.max_length} tokens")
    else:
        print(f"expert: {env.expert_reply()}")
        all(judge(reply) for reply in args.reply)


def command_data(args: argparse.Namespace) -> None:
    """`sftrl data`."""
    env = wrong_turns_fit(args)
    if hasattr(env, "write") and Path(args.out).suffix != ".json":
        if args.data or args.wrong_turns:
            raise ValueError(
                "a folder takes the built-in city, without --data and --wrong-turns: "
                "for demonstrations let --out end in .json"
            )
        with Progress("panoramas", 1) as bar:
            print(env.write(Path(args.out), args.seed, args.episodes, bar.reach))
        return
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no such folder")
    records = [envs.demonstration(env, args.wrong_turns) for _ in range(args.episodes or 1000)]
    pictures = Path(args.out).with_suffix("")
    for i, record in enumerate(records):
        if "image" in record:
            pictures.mkdir(parents=True, exist_ok=True)
            record["image"].save(pictures / f"{i}.png")
            record["image"] = f"{pictures.name}/{i}.png"
    write_whole(Path(args.out), json.dumps(records, indent=1))
    print(f"{len(records)} demonstrations in {args.out}")


def complain(message: str, own: bool = False) -> None:
    """One line on stderr: of rank 0, for a fault that all ranks meet, or of the rank whose `own` it is."""
    if policy_rank() == 0 or own:
        print(f"sftrl: {message}", file=sys.stderr)


def leave(status: int) -> None:
    """Ends a process of torchrun with this exit status, without the interpreter's own end: FSDP's caches keep
    gloo's threads alive, and one that lets go of a tensor while the interpreter shuts down aborts the
    process (seen with torch 2.13; pytorch issue 190489). A rank that failed does not take leave of the
    others, which may wait for it elsewhere: torchrun ends them."""
    if not status:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def prepare(threads: int) -> bool:
    """Sets the number of threads (0: as many as cores), joins the process group, and prints warnings as one
    line each, on rank 0 alone. Returns whether there are several processes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if threads:
        torch.set_num_threads(threads)
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if distributed:
        if torch.cuda.is_available():
            torch.cuda.set_device(best_device())
        dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    warnings.formatwarning = lambda message, *_: f"sftrl: warning: {message}\n"
    if policy_rank():
        warnings.simplefilter("ignore")
    return distributed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 for a run that failed, 2 for a wrong value, 130 for
    Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # letters that its encoding lacks become question marks
    first = Parser(add_help=False)  # the task decides which options there are
    first.add_argument("--task", default="gp-l")
    try:
        args = build_parser(first.parse_known_args(argv)[0].task).parse_args(argv)
    except (ValueError, argparse.ArgumentError) as error:  # no task, or an option that a command has already
        first.error(str(error))
    args.task = envs.task_name(args.task)
    distributed, status = prepare(args.threads), 0
    try:
        if args.tensorboard and not importlib.util.find_spec("tensorboard"):
            raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard")
        with contextlib.ExitStack() as held:
            if args.command not in ("play", "data") and args.out:  # one command at a time writes to a folder
                on_rank_0(lambda: held.enter_context(locked(Path(args.out))))
            args.run(args)
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        status = 2
    except NotSaved as error:
        complain(f"stopped: {error}; what was saved before is kept", own=True)
        status = 1
    except FloatingPointError as error:
        complain(f"stopped, for a number is not finite: {error}; the last checkpoint is kept")
        status = 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        complain(
            "out of memory: lower --microbatch-size, --rollout-batch or --max-new-tokens, or try "
            "--recompute, --weights bfloat16 or more processes",
            own=True,
        )
        status = 1
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from the last saved state")
        status = 130
    if distributed:
        leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
