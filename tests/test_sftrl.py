"""Policy, run folders, the command line."""

import copy
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import MODELS, MORE_SIGHTED, SIGHTED, SMALL, chat_tokenizer, make_policy, random_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import decoders, normalizers

import envs
import evaluate
import ppo
import sft
import sftrl

ROOT, ONE_THREAD = Path(__file__).resolve().parent.parent, os.environ | {"OMP_NUM_THREADS": "1"}
CASES = [(kind, "gp-l") for kind in MODELS] + [(kind, "gp-vl") for kind in SIGHTED]


def sampled(policy, n=6, max_new_tokens=12, temperature=1.0, task="gp-l"):
    """The streams of n conversations of up to three turns."""
    options = SMALL if task == "gp-vl" else {}
    environments = [envs.make(task, verify_iter=3, **options) for _ in range(n)]
    with policy.responder(temperature, max_new_tokens, policy.generator("test")) as respond:
        envs.play(environments, respond, [f"test/{i}" for i in range(n)])
    return [respond.streams[i][0] for i in range(n)]


def gap(policy, streams, temperature=1.0):
    """The largest difference of log-probabilities as sampled and as scored; both are 0 on context."""
    with torch.no_grad():
        scored = policy(policy.collate(streams), temperature)["logp"]
    rows = [torch.tensor(stream.logp) for stream in streams]
    return (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) - scored).abs().max().item()


def run(command):
    """The exit status of a command in this process."""
    try:
        return sftrl.main(shlex.split(command))
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def prints(capsys):
    """Runs a command that must succeed; returns what it prints."""

    def prints(command):
        capsys.readouterr()
        assert run(command) == 0
        return capsys.readouterr().out

    return prints


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with status 2 and one line, which is returned."""

    def fails(command):
        capsys.readouterr()
        assert run(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("sftrl: error: ") and error.count("\n") == 1
        return error

    return fails


# ---- the tiny model


def test_tiny_model_size_and_determinism():
    a, b = sftrl.Policy.load("tiny"), sftrl.Policy.load("tiny")
    outline = sftrl.Policy.load("tiny", torch.device("meta"))  # tied weights count once here too
    assert 0.8e6 < a.parameter_count == outline.parameter_count < 1.3e6
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))


def test_tiny_tokenizer(policy):
    for text in [*envs.RANKS, *"0123456789+-*/()=", "11", "12", "13", *envs.FIELDS]:
        assert text in [policy.decode([i]) for i in policy.tokenize([f'"{text}"'])[0]]
    env = envs.make("gp-l", "rule", seed=1)
    prompt = policy.tokenize([policy.render(env.reset()[0].messages)])[0]
    assert len(prompt) <= 45 and len(policy.tokenize([env.expert_reply()])[0]) <= 40
    for text in ('{"cards": ["A"]}', "Γειά 😀\n\t\\", " 10/(3-8/3)=24 "):
        assert policy.decode(policy.tokenize([text])[0]) == text


def test_tokenizer_corpus_has_all_feedback():
    texts = set(sftrl.card_texts())
    raised = "".join(re.findall(r"raise Illegal\(.*", inspect.getsource(envs)))
    reasons = re.findall('"([a-z ,]{9,})"', raised)
    expected = {string.Template(envs.FEEDBACK["illegal"]).substitute(reason=reason) for reason in reasons}
    expected |= {envs.PICTURE_FEEDBACK[verdict] for verdict in ("unparsed", "misread")}
    expected |= {"A number was left out. Try again.", "There is no 2 left to use. Try again."}
    assert len(reasons) > 8 and expected <= texts
    assert any(re.fullmatch(r"The formula gives .*, not 24\. Try again\.", text) for text in texts)


# ---- scoring and sampling

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
WINDOW = {"head_dim": 16, "sliding_window": 64}
ARCHITECTURES = {  # with what each needs beside the usual sizes
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 64},
    "phi3": {},
    "gpt2": {},
    "gpt_oss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]} | WINDOW,
    "gemma2": {"final_logit_softcapping": 5.0} | WINDOW,
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "lm_head_multiplier": 0.3,
    },
    "deepseek_v3": MIXTURE | LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "cohere": {"logit_scale": 0.5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False} | MIXTURE,
    "bloom": {},
    "gemma3_text": WINDOW,
    "deepseek_v2": MIXTURE | LATENT,
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "granite": {"logits_scaling": 2.0},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "head_dim": 16,
        "shared_expert_intermediate_size": 32,
    }
    | MIXTURE,
    **dict.fromkeys(("qwen3", "olmo2", "smollm3", "mpt"), {}),
}
KEPT = "llama qwen2 qwen3 phi3 deepseek_v2 deepseek_v3 granite cohere olmo2 smollm3 "
KEPT += "llava llava-1.5 idefics3 llava-next"  # their caches are kept
SERVED = [(name, "gp-l", 1.0) for name in ARCHITECTURES]
SERVED += [(kind, "gp-l", 0.6) for kind in MODELS if kind != "llama"]
SERVED += [(kind, "gp-vl", 0.6) for kind in (*SIGHTED, *MORE_SIGHTED)]


@pytest.mark.parametrize("kind, task, temperature", SERVED)
def test_sampled_logp_equals_scored(kind, task, temperature):
    if kind in ARCHITECTURES:
        tokenizer = chat_tokenizer(eos_token="<|end|>")
        model = random_model(kind, tokenizer, **ARCHITECTURES[kind])
        policy = sftrl.Policy(model, tokenizer, rollout_dtype=torch.float32)
    else:
        try:
            policy = make_policy(kind, pictures=task == "gp-vl")
        except ImportError:
            pytest.skip("its processor needs torchvision in this version of the library")
        policy.model.get_output_embeddings().weight.data.mul_(2)
        policy.stop_ids |= set(range(300, 400))
    assert policy.keeps_caches == (kind in KEPT.split())
    streams = sampled(policy, n=8, max_new_tokens=24, task=task, temperature=temperature)
    assert gap(policy, streams, temperature) < 1e-4 and max(len(s.replies) for s in streams) == 3
    replies = [s.ids[start:stop] for s in streams for start, stop in s.replies]
    assert len({len(ids) for ids in replies}) > 5
    for *ids, last in replies:  # no end token is forged, and nothing follows one
        assert not policy.stop_ids & set(ids) and (last in policy.stop_ids or len(ids) == 23)


@pytest.mark.parametrize("kind", MODELS)
def test_scores_against_whole_logits(kind):
    policy = make_policy(kind)
    streams = sampled(policy, n=3, max_new_tokens=5, temperature=0.0)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    with torch.no_grad():
        scores = policy(policy.collate(streams), 0.5, values="detached", entropy=True)
        expected = {name: torch.zeros_like(x) for name, x in scores.items()}
        for b, stream in enumerate(streams):
            ids, t = torch.tensor(stream.ids), torch.tensor(stream.mask).nonzero()[:, 0]
            out = policy.model(input_ids=ids[None], output_hidden_states=True)
            out.logits[..., policy.never_drawn] = -1e9
            logp = (out.logits[0, t - 1] / 0.5).log_softmax(-1)
            assert torch.equal(logp.argmax(-1), ids[t])
            expected["logp"][b, t] = logp.max(-1).values
            expected["entropy"][b, t] = -(logp.exp() * logp).sum(-1)
            expected["value"][b, t] = policy.value_head(out.hidden_states[-1][0, t - 1])[:, 0]
    for name, x in scores.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=1e-4)


WALK = {"turns": 1, "points_per_leg": 1, "view_size": 16, "continue_after_failure": True}


@pytest.mark.parametrize("kind, task", [*CASES[:2], ("llava", "gp-vl"), ("llava", "virl-vl")])
def test_kept_cache_changes_no_numbers(kind, task):
    """Four episodes, three at once, that end at different turns; on the walk some stay at a waypoint while
    others open a new conversation."""
    options = {"gp-l": {}, "gp-vl": SMALL, "virl-vl": WALK}[task]
    played, read, looks = [], [], []
    for keeps in (False, True):
        policy, tokens = make_policy(kind, rollout_batch=3), []
        embedding = policy.model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
        if task == "gp-vl" and keeps:
            tower = policy.model.model.vision_tower
            tower.register_forward_hook(lambda _, args, out: looks.append(len(out.last_hidden_state)))
        assert policy.keeps_caches
        policy.keeps_caches = keeps
        environments = [envs.make(task, seed=i, verify_iter=1 + i % 3, **options) for i in range(4)]
        with policy.responder(0.0, 6, policy.generator("kept")) as respond:
            envs.play(environments, respond, at_once=3)
        played.append([stream for i in range(4) for stream in respond.streams[i]])
        read.append(sum(tokens))
        work = policy.parameter_count * sum(map(len, played[0]))
        assert policy.flops == 2 * work  # each token counts once
    assert read[1] < 0.9 * read[0] and sum(looks) == 4 * (task == "gp-vl")  # a picture is looked at once
    for a, b in zip(*played, strict=True):
        assert a.ids == b.ids and a.replies == b.replies
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), rtol=0, atol=2e-5)
    if task == "gp-l":
        policy(policy.collate(played[0]))
        assert policy.flops == (2 + 6) * work


def test_generation_config_is_saved_but_not_used(tmp_path):
    tokenizer = chat_tokenizer(eos_token="<|end|>")
    sftrl.Policy(random_model("llama", tokenizer), tokenizer).save(tmp_path / "model")
    # A temperature without sampling: the library loads this, but refuses to save it.
    odd = {"do_sample": False, "temperature": 0.9, "top_k": 1, "repetition_penalty": 1.5, "min_new_tokens": 9}
    odd |= {"forced_eos_token_id": 50, "suppress_tokens": list(range(60, 90)), "bad_words_ids": [[40]]}
    set_in(tmp_path / "model/generation_config.json", **odd)
    policy = sftrl.Policy.load(str(tmp_path / "model"))
    assert gap(policy, sampled(policy, temperature=0.5), 0.5) < 1e-4
    policy.save(tmp_path / "again")
    again = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert again.items() >= (odd | {"do_sample": True, "eos_token_id": list(range(300, 360))}).items()


def test_samples_follow_the_reported_distribution(policy):
    stream = policy.open([{"role": "user", "content": "7"}])
    generator, state, n = torch.Generator().manual_seed(0), torch.get_rng_state(), 4000
    with policy.rollout_weights() as model:
        drawn = [policy.sample(model, [stream] * 500, 1, 0.5, generator) for _ in range(n // 500)]
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        p = (policy.model(input_ids=torch.tensor([stream.ids])).logits[0, -1] / 0.5).softmax(-1)
    counts = torch.tensor([ids[0] for replies in drawn for ids, _ in replies]).bincount(minlength=len(p))
    common = p > 0.01
    assert common.sum() >= 5
    z = (counts[common] - n * p[common]) / (n * p[common] * (1 - p[common])).sqrt()
    assert z.abs().max() < 4.5


def test_ids_without_text_are_never_drawn(policy):
    policy.model.get_output_embeddings().weight.data[policy.image_id] *= 100
    tokenizer = chat_tokenizer(eos_token="<|end|>")  # the model has more rows than this has tokens
    wide = sftrl.Policy(random_model("llama", tokenizer, vocab_size=4096), tokenizer)
    for policy, never in ((policy, [policy.image_id]), (wide, [*range(len(tokenizer), 4096)])):
        streams = sampled(policy, n=16)
        drawn = {token for s in streams for start, stop in s.replies for token in s.ids[start:stop]}
        assert policy.never_drawn.tolist() == never and not drawn & set(never) and len(drawn) > 50
        assert gap(policy, streams) < 1e-4


def test_bf16_rollout_is_close_to_fp32(policy):
    policy.rollout_dtype = torch.bfloat16
    assert 1e-4 < gap(policy, sampled(policy)) < 0.2
    assert all(p.dtype == torch.float32 for p in policy.parameters())


# ---- the chat models that users bring

LOOP = (
    "START{% for m in messages %}{% if m['role'] == 'user' %}USER{% else %}REPLY{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}OPENING{% else %}CLOSE{% endif %}"
)
ENDED, BOS = {"eos_token": "<|eos|>", "pad_token": "<|eos|>"}, {"bos": True, "bos_token": "<s>"}
IM, ROLES = "<|eos|> <|im_start|> <|im_end|>", "<|eos|> <|end|> <|user|> <|assistant|>"
THINK, STOPS = ROLES + " <think>", "<|eos|> <|user|>"
USER, ASSISTANT = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
# By kind: what stands around a message of the user, what opens a reply, what stands around it; special
# tokens, those that stop sampling, options of the tokenizer.
TEMPLATES = {
    "chatml": (USER, ASSISTANT, "{}<|im_end|>\n", IM, IM, ENDED),
    "end not special": (USER, ASSISTANT, "{}<|im_end|>\n", "<|eos|>", IM, ENDED | {"plain": IM.split()[1:]}),
    "newline before the end": (USER.replace("{}", "{}\n"), ASSISTANT, "{}\n<|im_end|>\n", IM, IM, ENDED),
    "no eos": (USER, ASSISTANT, "{}<|im_end|>\n", IM, "<|im_start|> <|im_end|>", {}),
    "phi-3": ("<|user|>\n{}<|end|>\n", "<|assistant|>\n", "{}<|end|>\n", ROLES, "<|end|> " + STOPS, ENDED),
    "glm-4": ("<|user|>\n{}", "<|assistant|>\n", "{}", "[gMASK] " + ROLES, STOPS, ENDED),
    "plain text": ("user: {} ", "assistant:", " {}<|eos|> ", "<s> <|eos|>", "<|eos|>", ENDED | BOS),
    "gpt-oss": (
        "<|start|>user<|message|>{}<|end|>",
        "<|start|>assistant",
        "<|channel|>final<|message|>{}<|end|>",
        "<|eos|> <|start|> <|channel|> <|message|> <|end|>",
        "<|eos|> <|end|> <|start|>",
        ENDED,
    ),
    "llama-2": ("<s>[INST] {} [/INST]", "", " {} </s>", "<s> </s>", "<s> </s>", BOS | {"eos_token": "</s>"}),
    "thoughts": ("<|user|>{}", "<|assistant|><think>", "{}<|eos|>", THINK, STOPS, ENDED),
}
# What a conversation begins with: in the template, in the text.
BEGIN = {"glm-4": ("[gMASK]", "[gMASK]"), "plain text": ("", "<s>")}
BEGIN["chatml"] = "{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"  # the same on every day


def tokenizer_of(kind):
    user, opening, reply, special, _, options = TEMPLATES[kind]
    reply = opening.removesuffix("<think>") + reply  # later turns lack the thought
    parts = {"START": BEGIN.get(kind, [""])[0], "USER": user, "OPENING": opening}
    parts["REPLY"] = reply.replace("<|eos|>", "") if kind == "plain text" else reply
    parts["CLOSE"] = "<|eos|>" * (kind == "phi-3")
    template = LOOP
    for name, text in parts.items():
        template = template.replace(name, text.replace("{}", "{{ m['content'] }}"))
    return chat_tokenizer(template, special.split(), **options)


TURNS = 'Say "24".', '{"cards": ["A"]}', "No. Again.", '{"cards": ["2"]}'


def conversation(policy):
    """The stream of a demonstration of TURNS."""
    turns = [{"from": who, "value": value} for who, value in zip(("human", "gpt") * 2, TURNS)]
    (stream,) = policy.streams([{"conversations": turns}])
    return stream


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chat_templates(kind):
    user, opening, form, _, stops, _ = TEMPLATES[kind]
    tokenizer = tokenizer_of(kind)
    model = random_model("llama", tokenizer)
    model.generation_config.eos_token_id = None
    policy = sftrl.Policy(model, tokenizer)
    stream, (q, a, f, b) = conversation(policy), TURNS
    turn, (before, _, end) = user + opening + form, form.partition("{}")
    end = end.rstrip() or "<|user|>"  # the next role ends a reply
    text = BEGIN.get(kind, [""])[-1] + (turn.format(q, a) + turn.format(f, b)).rstrip()
    assert stream.ids == policy.tokenize([text.removesuffix(end) + end])[0]
    for (start, stop), reply in zip(stream.replies, (a, b)):
        ids = stream.ids[start:stop]
        assert tokenizer.decode(ids) == before + reply + end
        assert policy.decode(ids) == policy.decode(ids[:-1]) == before + reply
    assert tokenizer.convert_ids_to_tokens(policy.end_id) == end.strip()
    assert policy.stop_ids == set(tokenizer.convert_tokens_to_ids(stops.split()))
    # Sampled tokens stay, though the tokenizer would write others. A reply that was cut off, or stopped with
    # another token, gets its end as context.
    start, stop = stream.replies[0]
    stop -= len(policy.tokenize([end])[0])
    closing = stream.ids[stop : stream.replies[1][0]][kind == "plain text" :]
    odd = [token for letter in a for token in policy.tokenize([letter])[0]]
    assert odd != stream.ids[start:stop]
    for extra in ([], [300]):
        cut = policy.open([{"role": "user", "content": q}])
        cut.reply(odd + extra)
        policy.extend(cut, f)
        assert cut.ids == stream.ids[:start] + odd + extra + closing and sum(cut.mask) == len(odd + extra)


@pytest.mark.parametrize("kind, first", [("llama-2", ""), ("plain text", " ")])
def test_blanks_between_turns(kind, first):
    """SentencePiece's kinds: a decoder that drops a text's first blank, a tokenizer that adds one."""
    tokenizer, turn = tokenizer_of(kind), "".join(TEMPLATES[kind][:3])
    if kind == "llama-2":
        strip = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        tokenizer.backend_tokenizer.decoder = strip
    else:
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    assert tokenizer.decode(tokenizer(" x", add_special_tokens=False)["input_ids"]) == first * 2 + "x"
    ids = conversation(sftrl.Policy(random_model("llama", tokenizer), tokenizer)).ids
    text = first + (turn.format(*TURNS[:2]) + turn.format(*TURNS[2:])).rstrip()
    assert tokenizer.decode(ids).removeprefix("<s>") == text.removeprefix("<s>")


@pytest.mark.parametrize(
    "template, words",
    [
        (None, "no chat template"),
        (LOOP, "no eos token, and its chat template ends replies with no token"),
        ("{{ messages[-1]['content'] }}", "leaves out replies"),
        ("{{ raise_exception('no user') }}", "its chat template cannot be used: no user"),
    ],
)
def test_unusable_templates_are_refused(template, words):
    tokenizer = chat_tokenizer(template and re.sub("USER|REPLY", "x {{ m['content'] }}", template))
    model = random_model("llama", tokenizer)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=words):
        sftrl.Policy(model, tokenizer)


def test_unservable_architecture_is_refused(tmp_path, fails):
    tokenizer = chat_tokenizer(eos_token="<|end|>", pad_token="<|end|>")
    random_model("rwkv", tokenizer, attention_hidden_size=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    error = fails(f"{SFT} --steps 1 --model {tmp_path}/model --out {tmp_path}/run")
    assert "RwkvForCausalLM cannot be served" in error and not (tmp_path / "run").exists()


REFUSED = "no output head, called 2 times, not finite, log-probabilities differ, Llava.*differ".split(", ")


@pytest.mark.parametrize("words", REFUSED)
def test_models_without_usable_scores_are_refused(words, monkeypatch):
    pictures, bf16 = words == REFUSED[3], words == REFUSED[4]
    model, processor = SIGHTED["qwen"]() if pictures else MODELS["llava" if bf16 else "llama"]()
    monkeypatch.setattr(sftrl.Policy, "_checked", set())
    cls, call, show = type(model), type(model).forward, ppo.Policy._show

    def blank(self, stream, *args, **options):
        ids = show(self, stream, *args, **options)
        stream.picture["pixel_values"] *= 0  # sampling and scores agree without it; the plain call does not
        return ids

    def doubled(self, **inputs):
        out = call(self, **inputs)
        return out if inputs["use_cache"] else types.SimpleNamespace(logits=2 * out.logits)

    if pictures:
        monkeypatch.setattr(ppo.Policy, "_show", blank)
    elif bf16:
        sftrl.Policy(model.bfloat16(), processor, pictures=True)
        monkeypatch.setattr(cls, "forward", doubled)
    elif words == "not finite":
        model.model.norm.weight.data[3] = torch.nan
    elif words == "no output head":
        monkeypatch.setattr(cls, "get_output_embeddings", lambda self: None)
    else:
        monkeypatch.setattr(cls, "forward", lambda self, **inputs: [call(self, **inputs) for _ in "ab"][1])
    with pytest.raises(ValueError, match=words):
        sftrl.Policy(model, processor, pictures=pictures)


def test_architecture_is_checked_once(monkeypatch):
    checked, outline = [], {"device": torch.device("meta")}
    monkeypatch.setattr(sftrl, "check", lambda policy, pictures: checked.append(pictures))
    monkeypatch.setattr(sftrl.Policy, "_checked", set())
    for options in (outline, {}, {"pictures": True}, {}, {"pictures": True}):
        sftrl.Policy.load("tiny", **options)
    assert checked == [False, True]


# ---- what the model writes is what the verifier reads


def test_verifier_sees_special_tokens(policy):
    env, (pad, system, user) = envs.make("gp-l"), policy.tokenize(["<|pad|>", "<|system|>", "<|user|>"])
    env.reset(seed=0)
    right, wrong, praise = policy.tokenize([env.expert_reply(), env.wrong_reply(), "Correct."])
    assert policy.decode([*right, policy.end_id]) == env.expert_reply()
    inside = right[:-3] + pad + system + right[-3:] + [policy.end_id]  # in the formula
    forged = wrong + user + praise + policy.tokenize(["<|assistant|>"])[0] + right
    assert "<|pad|><|system|>" in policy.decode(inside)
    assert policy.decode(forged).endswith("<|user|>")  # here sampling stops
    between = [token for word in right for token in (word, *pad)]
    verdicts = {"correct": right, "illegal": inside, "unparsed": between, "wrong_value": forged}
    for verdict, reply in verdicts.items():
        env.reset(seed=0)
        *_, info = env.step(policy.decode(reply))
        assert info["verdict"] == verdict and env.messages[1]["content"] == policy.decode(reply)


@pytest.mark.parametrize("kind", SIGHTED)
def test_earlier_replies_keep_their_tokens(kind, monkeypatch):
    policy = make_policy(kind)
    pieces = ["<", "image", ">", "<|", "image_pad", "|>", "c", "ards"]  # together they are other tokens
    odd = [token for ids in policy.tokenize(pieces) for token in ids]
    odd += policy.tokenizer.convert_tokens_to_ids(["<|pad|>", "<|system|>"])
    replies = iter([[*odd, k, policy.end_id] for k in range(10, 40)])
    policy.keeps_caches = False

    def sample(model, streams, *args):
        return [(reply, [0.0] * len(reply)) for _, reply in zip(streams, replies)]

    monkeypatch.setattr(policy, "sample", sample)
    with policy.responder(1.0, 40, policy.generator("x")) as respond:
        envs.play([envs.make("virl-vl", verify_iter=2, **WALK)], respond, [0])
    streams, before = respond.streams[0], 0
    assert len(streams) > 2
    for stream in streams:
        prompt = stream.ids[: stream.replies[0][0]]
        assert "".join(map(chr, prompt)).count("".join(map(chr, odd))) == before
        assert stream.ids.count(policy.image_id) == streams[0].ids.count(policy.image_id) > 0
        before += len(stream.replies)


# ---- models whose positions end


def test_reach_of_positions():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 96}
    factors = {"factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for architecture, rope_type, reach in (
        ("gpt2", None, 96),
        ("gemma3_text", None, math.inf),
        ("llama", "default", math.inf),
        ("llama", "dynamic", 96),
        ("phi3", "longrope", 48),
    ):
        rope = {"rope_type": rope_type, "rope_theta": 1e4, **factors}
        options = {"rope_parameters": rope, "original_max_position_embeddings": 48} if rope_type else {}
        config = transformers.AutoConfig.for_model(architecture, **sizes, **options)
        assert ppo.longest_conversation(config) == reach


def test_position_limit(tmp_path, fails, prints):
    tokenizer, model = chat_tokenizer(eos_token="<|end|>", pad_token="<|end|>"), tmp_path / "model"

    def policy_of(reach):
        policy = sftrl.Policy(random_model("gpt2", tokenizer, max_position_embeddings=reach), tokenizer)
        policy.save(model)
        return policy

    # All demonstrations must fit before anything is trained or measured, not the first one alone.
    far, env, out = policy_of(999), envs.make("gp-l", target=18), tmp_path / "run"
    small = "--episodes 2 --minibatch-size 2 --max-new-tokens 4"
    for command, seeds in (
        (f"sft --out {out} --steps 12 --batch-size 1", [f"sft/0/{k}/0" for k in range(12)]),
        (f"ppo --out {out} --steps 20 {small}", [f"train/0/{k}/{i}" for k in range(20) for i in (0, 1)]),
        ("evaluate --episodes 30 --max-new-tokens 4", [f"test/{i}" for i in range(30)]),
    ):
        records = [envs.demonstration(env, start=(seed, None)) for seed in seeds]
        first, *lengths = map(len, far.streams(records))
        reach = max(lengths) - 1
        policy_of(reach)
        error = fails(f"{command} --model {model} --target 18")
        assert f"a demonstration has {reach + 1} tokens, but the positions of GPT2LMHeadModel" in error
        assert first <= reach and f"reach no farther than {reach}" in error and not out.exists()

    policy = policy_of(150)
    with policy.responder(1.0, 40, policy.generator("x")) as respond:
        episodes = envs.play([envs.make("gp-l", seed=i) for i in range(8)], respond)
        long = envs.make("gp-l", prompt="$cards $rule " + "so " * 200)
        with pytest.raises(ValueError, match="a prompt has [0-9]+ tokens"):
            respond([8], [long.reset()[0]])
    streams = [respond.streams[i][0] for i in range(8)]
    assert 140 < max(map(len, streams)) <= 150 and gap(policy, streams) < 1e-4
    for episode, stream in zip(episodes, streams):
        assert 1 <= len(episode.turns) == len(stream.replies) < 5 and not episode.success
    text = prints(f"play --model {model} --max-new-tokens 40")
    assert "cut off: the model's positions reach no farther than 150 tokens" in text


# ---- pictures


@pytest.mark.parametrize("kind", SIGHTED)
def test_pictures_affect_their_row_alone(kind):
    policy = make_policy(kind)
    batch = policy.collate(sampled(policy, n=3, task="gp-vl"))
    with torch.no_grad():
        before = policy(batch)["logp"]
        batch["pictures"] = [batch["pictures"][1], *batch["pictures"][1:]]
        after = policy(batch)["logp"]
    assert (after[0] - before[0]).abs().max() > 0.01
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-6)


def test_stack_pads_with_zeros():
    a, b = torch.ones(1, 2, 3), 2 * torch.ones(2, 1, 4)
    joined = ppo.stack([a, b])
    assert joined.shape == (3, 2, 4) and joined.sum() == 6 + 16
    assert torch.equal(joined[:1, :, :3], a) and torch.equal(joined[1:, :1], b)


def test_pictures_are_never_lost(policy):
    record, text = envs.demonstration(envs.make("gp-vl", **SMALL)), envs.demonstration(envs.make("gp-l"))
    (stream,) = policy.streams([record])
    assert stream.picture["pixel_values"].shape[0] == 1 and stream.ids.count(policy.image_id) > 1
    without = copy.copy(policy)
    without._template_text = sftrl.CHAT_TEMPLATE.replace("<image>", "")
    for reader, records, words in (
        (policy, [record, text], "1 of 2 conversations of a batch have no picture"),
        (make_policy("llama"), [record], "reads no pictures"),
        (policy, [{"conversations": record["conversations"]}], "an image token without a picture"),
        (without, [record], "image|picture"),  # which the library finds, or we do
    ):
        with pytest.raises(ValueError, match=words):
            reader.streams(records)


# ---- saving, loading, and the memory of parts, activations and bf16


@pytest.mark.parametrize("kind", MODELS)
def test_save_and_load_round_trip(kind, tmp_path):
    policy = make_policy(kind)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    policy.save(tmp_path)
    again = sftrl.Policy.load(str(tmp_path), rollout_dtype=torch.float32)
    assert type(again.model) is type(policy.model)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), policy.parameters(), strict=True))
    messages, streams = [{"role": "user", "content": "x"}], sampled(policy, n=2)
    assert again.render(messages) == policy.render(messages) and gap(again, streams) == gap(policy, streams)


@pytest.mark.parametrize("kind", SIGHTED)
@pytest.mark.parametrize("train", sftrl.TRAINED)
def test_only_chosen_parts_are_trained(kind, train):
    policy = make_policy(kind).set_trainable(train)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    record, config = envs.demonstration(envs.make("gp-vl", **SMALL)), sft.SFTConfig(steps=1)
    next(sft.train(policy, policy.optimizers(1e-2), lambda step: [record], config))
    changed = {n for n, p in policy.model.named_parameters() if not torch.equal(p, before[n])}
    changed = {"merger" if "merger" in name else name.split(".")[1] for name in changed}
    tower = {"llava": "vision_tower", "mllama": "vision_model", "qwen": "visual"}[kind]
    adapter = "merger" if kind == "qwen" else "multi_modal_projector"
    expected = {"all": {tower, adapter}, "language": set(), "language+adapter": {adapter}}[train]
    assert changed - {"weight"} == {"language_model"} | expected  # `lm_head.weight`, where it is not tied


@pytest.mark.parametrize("kind, task", CASES)
def test_recomputed_activations(kind, task):
    policy = make_policy(kind)
    batch = policy.collate(sampled(policy, n=4, task=task))
    gradients, kept = [], []
    for recompute in (False, True):
        policy.set_trainable(recompute=recompute)
        sizes = {}

        def keep(x):
            sizes[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = policy(batch, values="shared")["logp"].sum()
        loss.backward()
        gradients.append([p.grad for p in policy.model.parameters() if p.grad is not None])
        kept.append(sum(sizes.values()))
        policy.zero_grad(set_to_none=True)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()))
    assert kept[1] < 0.7 * kept[0]


def test_stochastic_rounding_is_unbiased():
    policy = sftrl.Policy.load("tiny", dtype=torch.bfloat16)
    rounding, head = policy.optimizers(1e-6, 1e-6)
    assert type(rounding) is sftrl.RoundingAdamW and policy.value_head[0].weight.dtype == torch.float32
    torch.manual_seed(0)
    start = torch.empty(20_000).uniform_(0.015, 0.03).bfloat16()
    settings = {"lr": 1e-6, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.0}
    moved = {}
    for name, cls, dtype in (
        ("exact", torch.optim.AdamW, torch.float32),
        ("random", sftrl.RoundingAdamW, torch.bfloat16),
        ("nearest", torch.optim.AdamW, torch.bfloat16),
    ):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer, noise = cls([p], **settings), torch.Generator().manual_seed(1)
        for _ in range(100):
            p.grad = (0.01 + 0.01 * torch.randn(p.shape, generator=noise)).to(dtype)
            optimizer.step()
        moved[name] = (p.detach().double() - start.double()).mean().item()
        assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == dtype
    assert moved["exact"] < -5e-5 and moved["random"] == pytest.approx(moved["exact"], rel=0.03)
    assert abs(moved["nearest"]) < 0.1 * abs(moved["exact"])


# ---- run folders


def cli(command, timeout=600):
    """A command in a process of its own, which is killed (signal 9) when the time is over."""
    words = [sys.executable, str(ROOT / "sftrl.py"), *shlex.split(command)]
    subprocess.run(words, capture_output=True, timeout=timeout, env=ONE_THREAD, check=True)


SFT = "sft --batch-size 2"
PPO = "ppo --episodes 8 --minibatch-size 4 --max-new-tokens 8 --epochs 1 --lr 1e-3 --value-warmup 2"
EVALUATE = "evaluate --model tiny --episodes 2 --max-new-tokens 4"


FILES = ["config.json", "metrics.jsonl", "resume.pt", "samples.jsonl"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_run_folder_files(tmp_path):
    assert run(f"sft --out {tmp_path}/sft --steps 3 --batch-size 4 --checkpoints 2 --wrong-turns 1") == 0
    assert names(tmp_path / "sft") == ["checkpoint-1", "checkpoint-3", *FILES]
    assert run(f"{PPO} --steps 3 --out {tmp_path}/ppo --model {tmp_path}/sft/checkpoint-3") == 0
    lines = sftrl.read_lines(tmp_path / "ppo/metrics.jsonl")
    logged = "return success reward/unparsed approx_kl explained_variance reply_length flops seconds"
    assert {*logged.split()} <= lines[0].keys() and lines[0]["first_ratio_error"] < 1e-5
    assert len(sftrl.read_lines(tmp_path / "ppo/samples.jsonl")) == len(lines) == 3
    config = json.loads((tmp_path / "ppo/config.json").read_text())
    assert config["settings"]["episodes"] == 8 and config["versions"]["torch"] == torch.__version__


def test_results_are_written_before_printing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open(os.devnull))  # to which nothing can be written
    assert run(f"{EVALUATE} --verify-iter 1 --out {tmp_path}") == 2
    assert json.loads((tmp_path / "result.json").read_text())["episodes"] == 2
    assert len(sftrl.read_lines(tmp_path / "transcripts.jsonl")) == 2


def test_encodings(tmp_path, monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), "cp1252") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert run("play --cards 'A 3 K 10' --reply '5 → 24 \udcff'") == 0
        terminal.flush()
        assert b"model: 5 ? 24 ?" in terminal.buffer.getvalue()
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *level: encoding or "ascii")
    sftrl.write_text(tmp_path / "table.md", "1 ± 2")
    assert (tmp_path / "table.md").read_bytes() == "1 ± 2".encode()


def in_step_2(monkeypatch, act):
    """Lets `act` happen in the second step of SFT, before it is saved."""
    train = sft.train

    def acting(*args):
        for metrics in train(*args):
            if metrics["step"] == 2:
                act()
            yield metrics

    monkeypatch.setattr(sft, "train", acting)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_frozen_bf16_run_resumes_exactly(tmp_path, monkeypatch):
    task = "--task gp-vl --size 96 48 --font-size 0.36"
    command = f"{SFT} {task} --weights bfloat16 --train language --lr 1e-2 --steps 4 --out {tmp_path}"
    assert run(f"{command}/whole") == 0
    with monkeypatch.context() as patch:
        in_step_2(patch, interrupt)
        assert run(f"{command}/broken") == 130
    assert run(f"{command}/broken") == 0
    whole, broken = (tmp_path / name / "checkpoint-4" for name in ("whole", "broken"))
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    assert sftrl.Policy.load(str(whole), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def interrupted(command, folder, number, delay):
    """Starts a command, sends it a signal so long after its training began, and returns its exit status."""

    def began():  # it is written anew at every start
        return (folder / "metrics.jsonl").stat().st_ino if (folder / "metrics.jsonl").exists() else None

    before = began()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    while began() == before:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "stage, kills", [("ppo", 3), pytest.param("ppo", 20, marks=SLOW), pytest.param("sft", 20, marks=SLOW)]
)
def test_killed_run_resumes_bit_identically(tmp_path, stage, kills, fails):
    sftrl.Policy.load("tiny").save(tmp_path / "model")  # a process that loads it need not train a tokenizer
    whole, broken, chance = tmp_path / "whole", tmp_path / "broken", random.Random(kills)
    size = PPO if stage == "ppo" else "sft --batch-size 8 --lr 1e-3"
    command = f"{size} --steps {4 * kills} --checkpoints {2 * kills} --threads 1 --model {tmp_path}/model"
    words = [sys.executable, str(ROOT / "sftrl.py"), *command.split(), "--out"]
    unbroken = subprocess.Popen([*words, str(whole)], stderr=subprocess.DEVNULL, env=ONE_THREAD)
    words.append(str(broken))
    assert interrupted(words, broken, signal.SIGINT, 0.1) == 130
    steps = torch.load(broken / "resume.pt", weights_only=True)["step"]
    assert steps == sftrl.read_lines(broken / "metrics.jsonl")[-1]["step"] > 0
    for _ in range(kills):
        status = interrupted(words, broken, signal.SIGKILL, chance.uniform(0, 0.3))
        assert status == -signal.SIGKILL, "killed too late"
        for checkpoint in sftrl.checkpoints(broken):
            sftrl.Policy.load(str(checkpoint))
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "half a li')
    assert run(f"{command} --out {broken}") == 0 == unbroken.wait()
    last = f"checkpoint-{4 * kills}"
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (broken / last / name).read_bytes() == (whole / last / name).read_bytes()
    logs = [sftrl.read_lines(folder / "metrics.jsonl") for folder in (whole, broken)]
    for line in (*logs[0], *logs[1]):
        for name in ("rollout_tokens_per_s", "update_tokens_per_s", "seconds"):
            line.pop(name, None)
    assert logs[0] == logs[1] and [line["step"] for line in logs[1]] == list(range(1, 4 * kills + 1))
    other = "--clip 0.3" if stage == "ppo" else "--warmup 0.5"
    assert "other settings" in fails(f"{command} --out {broken} {other}")


@pytest.mark.parametrize("command", ["study", SFT, PPO, EVALUATE])
def test_second_command_on_a_folder_is_refused(command, tmp_path, monkeypatch, fails):
    monkeypatch.setattr(sftrl, "load_policy", None)
    with sftrl.locked(tmp_path / "run"):
        error = fails(f"{command} --out {tmp_path}/run")
    assert f"another process writes to {tmp_path / 'run'}" in error and not (tmp_path / "run").exists()


def test_lock_of_a_killed_process_is_free(tmp_path, fails):
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    hold += "; print(flush=True); input()"
    command, lock = f"{SFT} --steps 1 --out {tmp_path}", tmp_path / ".sftrl.lock"
    words = [sys.executable, "-c", hold, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert "another process" in fails(command)
        holder.kill()
    assert lock.exists() and run(command) == 0 and not lock.exists()


@pytest.mark.parametrize("lacking", ["system", "file system"])
def test_missing_locks_warn_once(lacking, tmp_path, monkeypatch, recwarn):
    def flock(*arguments):
        raise OSError(37, "No locks available")

    fcntl = types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4) if lacking == "file system" else None
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)
    assert run(f"{EVALUATE} --out {tmp_path}") == 0 and "result.json" in names(tmp_path)
    assert sum("cannot be locked" in str(warning.message) for warning in recwarn.list) == 1


def test_full_disk(tmp_path, monkeypatch, capsys):
    command, limit = f"{SFT} --steps 3 --checkpoints 3 --out {tmp_path}", resource.RLIMIT_FSIZE
    free = resource.getrlimit(limit)
    with monkeypatch.context() as patch:  # no file may grow beyond a megabyte any more
        in_step_2(patch, lambda: resource.setrlimit(limit, (2**20, free[1])))
        try:
            assert run(command) == 1
        finally:
            resource.setrlimit(limit, free)
    assert "checkpoint-2 could not be written: " in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path) == ["checkpoint-1", *FILES]
    sftrl.Policy.load(str(tmp_path / "checkpoint-1"))
    assert run(command) == 0
    assert [line["step"] for line in sftrl.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_out_of_memory(tmp_path, capsys):
    free = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 300 * 2**20, free[1]))
        assert run(f"sft --out {tmp_path} --steps 1 --batch-size 1024 --microbatch-size 1024") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, free)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sftrl: out of memory, or a worker was killed: lower --microbatch-size")


def test_keep_newest_checkpoints_and_foreign_files(tmp_path, monkeypatch, capsys):
    folder, blocked = tmp_path / "run", tmp_path / "blocked"
    command = f"{SFT} --out {folder} --steps 5 --checkpoints 5 --keep 2"
    with monkeypatch.context() as patch:
        in_step_2(patch, interrupt)
        assert run(command) == 130
    foreign = {f"checkpoint-{x}" for x in ("2-backup", "9-backup", "best", "", "-1")}
    for name in foreign:
        shutil.copytree(folder / "checkpoint-1", folder / name)
    (folder / "checkpoint-7").symlink_to(tmp_path)
    (folder / "checkpoint-9").write_text("mine")
    assert run(command) == 0
    kept = ["checkpoint-4", "checkpoint-5"]
    assert [path.name for path in sftrl.checkpoints(folder)] == kept
    assert {*names(folder)} == {*kept, *foreign, "checkpoint-7", "checkpoint-9", *FILES}
    blocked.mkdir()
    (blocked / "checkpoint-1").write_text("mine")
    for _ in range(2):  # the second time the run is not taken for finished
        assert run(f"{SFT} --out {blocked} --steps 1") == 1
        assert "checkpoint-1 could not be written: [Errno 20] Not a directory" in capsys.readouterr().err
    assert (blocked / "checkpoint-1").read_text() == (folder / "checkpoint-9").read_text() == "mine"


def test_progress_bar(tmp_path, capsys, monkeypatch):
    for command in ("evaluate --model tiny --max-new-tokens 2", f"{SFT} --out {tmp_path} --steps 20"):
        assert run(command) == 0
        lines = [line for line in capsys.readouterr().err.replace("\r", "").split("\n") if line]
        assert 2 <= len(lines) <= 8 and "100%" in lines[-1]
    assert f"loss={sftrl.read_lines(tmp_path / 'metrics.jsonl')[-1]['loss']:.3g}" in lines[-1]
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    with sftrl.progress_bar("run", 1) as show:
        for k in range(1, 5):
            time.sleep(0.11)  # the bar moves ten times a second at most
            show(k / 4, loss=1 / k)
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.count("\r") > 4 and "loss=0.25" in text


# ---- studies

ARMS = "init sft rl".split()


@pytest.fixture(scope="module")
def short_studies():
    """Short replies: a model that knows nothing would write to the end each time."""
    with pytest.MonkeyPatch.context() as patch:
        for task, study in [*sftrl.STUDIES.items(), ("look", sftrl.LOOK)]:
            rl = replace(study.rl, episodes=8, minibatch_size=4, max_new_tokens=4)
            sizes = {"base": replace(study.base, batch_size=8), "init": study.init | {"batch_size": 8}}
            sizes |= {"sft": replace(study.sft, batch_size=8), "rl": rl}
            sizes |= {
                "count": 2 if task == "gp-l" else 1,
                "verify_iter": 1 if task == "virl-vl" else study.verify_iter,
            }
            patch.setitem(sftrl.STUDIES, task, replace(study, **sizes, grid=(1e-4, 1e-3)))
        patch.setattr(sftrl, "LOOK", sftrl.STUDIES.pop("look"))
        smaller = {"turns": 1, "points_per_leg": 0, "view_size": 16, "panorama_width": 64}
        patch.setattr(sftrl.STUDIES["virl-vl"], "options", smaller)
        yield


@pytest.fixture(scope="module")
def cards(short_studies, tmp_path_factory):
    """The folder of a study of gp-l, and the command that goes on with it."""
    folder = tmp_path_factory.mktemp("cards")
    command = f"study --out {folder} --scale 0.001 --hands 4 --threads 1"
    assert run(f"{command} --seeds 2 --workers 2") == 0
    return folder, command


def settings_of(run_folder):
    return json.loads((run_folder / "config.json").read_text())["settings"]


def test_study_and_its_repetition(cards, monkeypatch, prints):
    folder, command = cards
    text, report = ((folder / name).read_text() for name in ("results.jsonl", "report.md"))
    (folder / "report.md").unlink()
    monkeypatch.setattr(sft, "train", None)
    monkeypatch.setattr(evaluate, "evaluate", None)
    assert "| claim | temperature 1 |" in prints(f"{command} --seeds 2")
    assert (folder / "results.jsonl").read_text() == text and (folder / "report.md").read_text() == report
    lines = sftrl.read_lines(folder / "results.jsonl")
    for variant, temperature in (("id", 0.0), ("rule", 0.0), ("id", 1.0), ("rule", 1.0)):
        points = [p for p in lines if (p["variant"], p["temperature"]) == (variant, temperature)]
        assert {p["arm"] for p in points} - {"base"} == {*ARMS}
    keys = "task experiment arm seed step flops variant episodes success kl_to_init checkpoint".split()
    assert all({*keys} <= p.keys() for p in points)
    assert all((folder / p["checkpoint"] / "config.json").exists() for p in lines)
    assert next(p for p in points if p["arm"] == "init")["kl_to_init"] < 1e-2
    budgets = [settings_of(folder / f"seed-0/{arm}")["flops"] for arm in ARMS]
    assert budgets == [None, 1.6e10, 1.6e10]  # SFT and RL at equal compute
    assert "holds" in report or "not significant" in report
    assert "tiny, has 1.1M parameters" in report
    assert "Learning rates: init 0.0003, sft 0.001, rl 0.0002 (" in report


def test_workers_measure_the_same(cards, tmp_path):
    folder, command = cards
    shutil.copytree(folder / "base", tmp_path / "base")
    assert run(f"{command.replace(str(folder), str(tmp_path))} --seeds 1") == 0
    one, two = (sftrl.read_lines(path / "results.jsonl") for path in (folder, tmp_path))
    one = [p for p in one if p["seed"] < 1 and p["experiment"] == "main"]
    assert sorted(map(str, one)) == sorted(map(str, two))


EXPERIMENTS = {  # by name, arms
    "start": {"rl-from-sft-1", "rl-from-sft-2"},
    "no-init": {"no-init-0.0001", "no-init-0.0004"},
    "verification": {"rl-budget-1", "rl-budget-10"},
    "revision-sft": {"sft-revision"},
    "reply-ratio": {"rl-reply"},
    "rivals": {"dft", "sft-at-dft-rate", "self-sft", "rl-kl", "diverse-sft", "diverse-rl"},
    "forgetting": {"sft", "rl"},
}


@pytest.mark.parametrize("name", ["start", *(pytest.param(x, marks=SLOW) for x in (*EXPERIMENTS, "all")[1:])])
def test_experiments(cards, name):
    folder, command = cards
    assert run(f"{command} --seeds 1 --experiment {name}") == 0
    lines, report = sftrl.read_lines(folder / "results.jsonl"), (folder / "report.md").read_text()
    for experiment in EXPERIMENTS if name == "all" else [name]:
        assert EXPERIMENTS[experiment] <= {p["arm"] for p in lines} and f"## {experiment}" in report
        if importlib.util.find_spec("matplotlib"):
            assert (folder / f"figures/{experiment}.png").read_bytes()[:4] == b"\x89PNG"
    if name == "start":  # each starts from another checkpoint of SFT
        models = [settings_of(folder / f"seed-0/rl-from-sft-{k}")["model"] for k in (1, 2)]
        assert models == [f"seed-0/sft/{path.name}" for path in sftrl.checkpoints(folder / "seed-0/sft")]
        assert "rl-from-sft-1 ends above its start under the other rule" in report


def test_frontier(cards, prints):
    folder, command = cards
    unfinished = {"experiment": "frontier", "series": "valid", "arm": "sft-0.001", "variant": "id"}
    point = sftrl.read_lines(folder / "results.jsonl")[0] | unfinished | {"seed": 7}
    sftrl.append_line(folder / "results.jsonl", point)  # of another seed
    prints(f"{command} --seeds 1 --experiment frontier --grid 1e-3 1e-4")
    lines, rates = sftrl.read_lines(folder / "results.jsonl"), ("0.0001", "0.001")
    lines.remove(point)
    found = [p for p in lines if p["experiment"] == "frontier"]
    arms = {f"{algorithm}-{rate}" for algorithm in ("sft", "rl") for rate in rates}
    valid = [p for p in found if p["series"] == "valid"]
    assert {(p["arm"], p["temperature"]) for p in valid} == {(arm, 1.0) for arm in ("init", *arms)}
    assert {p["variant"] for p in valid} == {"id", "rule"}
    for arm in arms:  # every checkpoint, the last one on all hands
        steps = [sftrl.step_of(path) for path in sftrl.checkpoints(folder / f"seed-0/{arm}")]
        points = evaluate.find(valid, arm=arm, variant="rule")
        assert [p["step"] for p in points] == steps and points[-1]["episodes"] > points[0]["episodes"]
        assert settings_of(folder / f"seed-0/{arm}")["lr"] == float(arm.partition("-")[2])
    tested = {(p["seed"], p["arm"]) for p in found if p["series"] == "test"}
    chosen = evaluate.chosen_arms(lines, "success").values()
    assert tested == {run for arms in chosen for run in arms.items()}  # no other run
    report = (folder / "report.md").read_text()
    assert "| rl-best ends above sft-best under the other rule |" in report
    assert "| in distribution | sft 0.0001 | sft 0.001 | rl 0.0001 |" in report


def test_look(short_studies, tmp_path, prints):
    out = prints(f"study --experiment look --out {tmp_path} --seeds 1 --scale 0.001 --hands 90")
    lines = sftrl.read_lines(tmp_path / "results.jsonl")
    ends = [p for p in lines if p["variant"] == "rule" and p["episodes"] == 90]
    assert {p["arm"] for p in ends} == {*ARMS, "sft-tenth"} and {p["distinct"] for p in ends} == {86}
    assert "| claim | temperature 1 | difference [95% over episodes] | verdict | paper |" in out
    assert "| sft-tenth ends above SFT under the other rule |" in out
    rates = [settings_of(tmp_path / f"seed-0/{arm}")["lr"] for arm in ("sft", "sft-tenth")]
    assert rates[0] == 10 * rates[1]


WALKS = ["step accuracy", "RL ends above SFT under the other rule, turn accuracy", "95% over episodes"]
STUDIED = {  # by task, what the report says
    "gp-vl": [f"| RL {x} on the other colour |" for x in ("ends above init", "raises recognition")],
    "virl-l": ["91.8 against 80.8", "turns 3 (7), points_per_leg 1 (4).", *WALKS],
    "virl-vl": [
        "RL raises recognition in other cities",
        "in other cities, success",
        "turns 1 (7), points_per_leg 0 (4), view_size 16 (300), panorama_width 64 (1024).",
        *WALKS,
    ],
}


@pytest.mark.parametrize("task", ["gp-vl", pytest.param("virl-l", marks=SLOW), "virl-vl"])
def test_study_of_other_tasks(short_studies, task, tmp_path):
    assert run(f"study --task {task} --out {tmp_path} --seeds 1 --scale 0.0005 --hands 2") == 0
    lines, report = sftrl.read_lines(tmp_path / "results.jsonl"), (tmp_path / "report.md").read_text()
    for variant in envs.TASKS[task].variants:
        assert {p["arm"] for p in lines if p["variant"] == variant} == {"base", *ARMS}
    assert all(words in report for words in STUDIED[task])
    assert ("77.8 against 16.7" in report) == (task == "virl-vl")
    if task == "gp-vl":
        assert all(0 <= p["recognition"] <= 1 for p in lines)
        pytest.importorskip("matplotlib")
        assert (tmp_path / "figures/recognition.png").exists()
    else:
        assert all(0 <= p["step_accuracy"] <= 1 and len(p["steps"]) == p["episodes"] == 2 for p in lines)


@SLOW
def test_frozen_parts_and_control_pictures(short_studies, tmp_path):
    for name in ("recognition", "sft-search"):
        command = f"study --task gp-vl --out {tmp_path} --seeds 1 --scale 0.002 --hands 8"
        assert run(f"{command} --experiment {name}") == 0
    lines = sftrl.read_lines(tmp_path / "results.jsonl")
    assert {p["pictures"] for p in lines if p["arm"] == "rl"} == {"own", "blank", "shuffled"}
    base, whole, language = (
        load_file(next((tmp_path / f"seed-0/{arm}").glob("checkpoint-*")) / "model.safetensors")
        for arm in ("init", "sft-all-0.0001", "sft-language-0.0001")
    )
    tower = next(key for key in base if "vision_tower" in key and key.endswith("weight"))
    assert torch.equal(base[tower], language[tower]) and not torch.equal(base[tower], whole[tower])


@SLOW
def test_killed_study_measures_the_same(tmp_path):
    command = "study --seeds 1 --scale 0.01 --hands 8 --threads 1 --workers 2 --out"
    start = time.monotonic()
    cli(f"{command} {tmp_path}/whole")
    length, chance, kills = time.monotonic() - start, random.Random(0), 0
    for _ in range(6):
        try:
            cli(f"{command} {tmp_path}/broken", timeout=chance.uniform(0.2, 0.45) * length)
        except subprocess.TimeoutExpired:  # it has been killed
            kills += 1
    assert kills >= 2
    cli(f"{command} {tmp_path}/broken")
    whole, broken = (
        [p | {"checkpoint": ""} for p in sftrl.read_lines(tmp_path / name / "results.jsonl")]
        for name in ("whole", "broken")
    )
    assert sorted(map(str, whole)) == sorted(map(str, broken))
    assert (tmp_path / "broken/report.md").read_text() == (tmp_path / "whole/report.md").read_text()


# ---- data, streets, play


def test_data_writes_what_sft_reads(tmp_path, fails):
    path = tmp_path / "demos.json"
    assert run(f"data --task gp-vl --out {path} --episodes 2 --size 128 64") == 0
    for record in json.loads(path.read_text()):
        assert (tmp_path / record["image"]).exists()
        assert record["conversations"][0]["value"].startswith("<image>\nMake 24")
    command = f"{SFT} --demos {path} --steps 1 --out {tmp_path}"
    assert run(f"{command}/run") == 0
    next((tmp_path / "demos").iterdir()).write_bytes(b"no picture")
    assert "cannot be read" in fails(f"{command}/broken")
    assert run(f"data --task virl-l --out {path} --episodes 2 --wrong-turns 1") == 0
    for record in json.loads(path.read_text()):
        assert "Walk this route" in record["conversations"][0]["value"]


def test_written_city_is_walked(tmp_path, prints, fails):
    data = "data --task virl-l --episodes 3"
    assert run(f"{data} --out {tmp_path}") == 0
    assert envs.load_world(tmp_path).routes == envs.built_in_world().routes[:3]
    walk = f"--task virl-l --data {tmp_path} --points-per-leg 0 --max-new-tokens 2 --transcripts 0"
    assert json.loads(prints(f"evaluate --model tiny-streets {walk}"))["episodes"] == 3  # all routes
    assert run(f"{data} --turns 1 --seed 4 --out {tmp_path}/other") == 0
    expected = envs.built_in_world("train", 1, (("new york", 4000),), 3).routes
    assert envs.load_world(tmp_path / "other").routes == expected
    for option in ("--wrong-turns 1", f"--data {tmp_path}"):
        assert option.split()[0] in fails(f"{data} {option} --out {tmp_path}/again")


def test_written_pictures_are_read_back(tmp_path):
    assert run(f"data --task virl-vl --turns 1 --panorama-width 64 --out {tmp_path}") == 0
    walks = []
    for source in ({"turns": 1, "panorama_width": 64}, {"data": tmp_path}):
        env = envs.make("virl-vl", view_size=32, **source)
        walks.append([])
        for seed in range(5):
            end = env.reset(seed)
            while not any(env.done):
                walks[-1].append((end[0].messages, end[-1], np.asarray(end[0].image, dtype=int)))
                end = env.step(env.expert_reply())
    for a, b in zip(*walks, strict=True):
        assert a[:2] == b[:2] and np.abs(a[2] - b[2]).max() <= 4  # JPEG


def test_evaluation_on_streets(tmp_path, monkeypatch, prints, fails):
    command = "evaluate --model tiny-streets --task virl-vl --turns 1 --points-per-leg 0 --view-size 16"
    command += " --episodes 2 --max-new-tokens 2 --transcripts 1"
    pictures = tmp_path / "pictures"
    for more in (f"--save {pictures}", "--pictures blank", "--pictures shuffled", "--variant visual"):
        out = prints(f"{command} {more}")
        assert '"step_accuracy"' in out and '"recognition"' in out
    env = envs.make("virl-vl", continue_after_failure=True, turns=1, points_per_leg=0, view_size=16)
    observation, _ = env.reset("test/0", {"route": 0})
    assert names(pictures) == ["0"]
    first, *others = sorted((pictures / "0").iterdir(), key=lambda path: int(path.stem))
    assert len(others) == env.decisions - 1 and np.array_equal(Image.open(first), observation.image)
    assert "no pictures" in fails(f"{EVALUATE} --save {tmp_path}")
    assert run(f"{EVALUATE} --pictures blank") == 2
    monkeypatch.setattr(sftrl, "load_policy", None)  # a wrong path ends it before the work
    assert str(first) in fails(f"{command} --save {first}")


def test_play(prints):
    out = prints("play --cards 'A 3 K 10' --reply hello")
    assert "A, 3, K, 10" in out and '"formula": "10+10+3+1=24"' in out and "[unparsed -3]" in out
    env = envs.make("virl-vl", drop=1.0, view_size=16)
    env.reset(options={"route": 5})
    walk = "play --task virl-vl --route 5 --drop 1 --view-size 16"
    out = prints(f"{walk} --reply '{env.expert_reply()}' --reply x")
    assert "verifier: [correct +1] <image>\nYou are at an intersection." in out
    assert "Try again." in out and "{'type'" not in out


def test_prompt_file(tmp_path, prints):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfCards: $cards_list. $rule")
    out = prints(f"play --cards 'A 3 K 10' --prompt {tmp_path}/prompt.txt")
    assert "user: Cards: ['A', '3', 'K', '10']. J is 10, Q is 10, K is 10\n" in out


def test_rewards_option(tmp_path):
    command = f"{PPO} --out {tmp_path} --steps 1 --verify-iter 1 --rewards unparsed=-6 budget=-2"
    assert run(command) == 0 and settings_of(tmp_path)["rewards"] == {"unparsed": -6, "budget": -2}
    (metrics,) = sftrl.read_lines(tmp_path / "metrics.jsonl")
    assert metrics["reward/unparsed"] == -8 * metrics["share/unparsed"] != 0


# ---- what is wrong ends in one line and status 2


WRONG = """study --task chess: unknown task
study --experiment recognition: invalid choice
study --rates rl=0: rl=0
study --rates odd=1: an arm and a positive number are needed
study --experiment look --model tiny-streets: for the tiny model
study --grid 1e-3 0: an arm and a positive number are needed
ppo: --out
ppo --out x --nope: --nope
ppo --out x --variant odd: unknown variant
ppo --out x --ratio odd: --ratio
ppo --out x --lr fast: --lr
ppo --out x --lr nan: --lr
ppo --out x --temperature 0: --temperature
ppo --out x --gamma 1.1: --gamma
ppo --out x --model missing: missing
ppo --out x --color red: --color
sft --out x --demos missing.json: missing.json
sft --out x --wrong-turns 9: 9 wrong turns leave no reply
play --rewards correct: --rewards
play --cards 'A A A A': cannot make
play --save x.png: no picture
data --out /dev/null/x.json: /dev/null"""


@pytest.mark.parametrize("line", WRONG.splitlines())
def test_wrong_values(line, tmp_path, monkeypatch, fails):
    command, words = line.split(": ")
    monkeypatch.chdir(tmp_path)
    assert words in fails(command) and not (tmp_path / "x").exists()  # or a corrected one would be refused


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])


def set_in(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(file, edit):
    weights = {name: edit(name, w) for name, w in load_file(file).items()}
    weights = {name: w for name, w in weights.items() if w is not None}
    save_file(weights, file, metadata={"format": "pt"})


def without_a_layer(file):
    edit_weights(file, lambda name, w: None if "layers.1." in name else w)


def with_fewer_tokens(file):
    set_in(file, text_config=json.loads(file.read_text())["text_config"] | {"vocab_size": 500})


def with_fewer_embeddings(file):
    with_fewer_tokens(file.with_name("config.json"))
    edit_weights(file, lambda name, w: w[:500].clone() if "embed_tokens" in name else w)


CODE = {"model_type": "odd", "auto_map": {"AutoConfig": "code.Config"}}
DAMAGES = [
    ("model.safetensors", cut, "cannot be loaded"),
    ("config.json", cut, "not a valid JSON file"),
    ("value_head.safetensors", cut, "value_head.safetensors cannot be loaded"),
    ("processor_config.json", Path.unlink, "image processor"),
    ("chat_template.jinja", Path.unlink, "chat_template.jinja"),
    ("model.safetensors", without_a_layer, "of its weights are missing"),
    ("config.json", with_fewer_tokens, "of another shape than its config.json says"),
    ("model.safetensors", with_fewer_embeddings, "its vocabulary 500"),
    ("adapter_config.json", Path.touch, "merge it into its base model"),
    ("config.json", lambda file: set_in(file, **CODE), "a model that transformers has"),
    ("processor_config.json", lambda file: set_in(file, patch_size=None), 'add "patch_size" to'),
]


@pytest.mark.parametrize("file, harm, words", DAMAGES)
def test_damaged_checkpoint(file, harm, words, policy, tmp_path, fails):
    policy.save(tmp_path / "bad")
    harm(tmp_path / "bad" / file)
    command = f"{SFT} --model {tmp_path}/bad --out {tmp_path}/run --steps 1"
    if "patch_size" in words:
        sftrl.Policy.load(str(tmp_path / "bad"))  # pictures alone need one
        command += " --task gp-vl --size 64 32"
    assert words in fails(command) and not (tmp_path / "run").exists()


def test_damaged_resume_state(tmp_path, fails):
    command, state = f"{SFT} --out {tmp_path} --steps 2 --checkpoints 1", tmp_path / "resume.pt"
    assert run(command) == 0
    sftrl.remove(sftrl.checkpoints(tmp_path)[-1])
    old = {"model": {}, "optimizer": {}, "step": 2, "flops": 1.0}  # of another version
    for harm in (cut, lambda state: torch.save(old, state)):
        harm(state)
        assert "resume.pt cannot be read" in fails(command)


# ---- help


def test_help(prints):
    texts = {}
    for task in envs.TASKS:
        (commands,) = [a.choices for a in sftrl.build_parser(task)._actions if a.dest == "command"]
        assert set(commands) == {"study", "sft", "ppo", "evaluate", "play", "data"}
        for command in commands.values():
            assert command.format_help() and all(action.help for action in command._actions)
        texts[task] = " ".join(prints(f"ppo --task {task} --help").split())
        for name in envs.options_of(envs.TASKS[task]):
            assert f"--{name.replace('_', '-')} " in texts[task]
    for tasks, words in (
        ("gp-l gp-vl", "wrong_value=-1"),
        ("gp-vl", "misread=-1.5"),
        ("gp-vl", "(default: 1200 480)"),
        ("virl-l virl-vl", "turning points of a built-in route, at least 1 and at most 7 (default: 7)"),
        ("virl-l virl-vl", "train, valid, test (default: train)"),
        ("virl-vl", "--view-size"),
    ):
        assert [task for task, text in texts.items() if words in text] == tasks.split()
