"""Policy, run folders, the command line."""

import contextlib
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
from conftest import CHATML, MODELS, SIGHTED, SMALL, chat_tokenizer, make_policy, random_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import decoders, normalizers

import envs
import ppo
import sft
import sftrl

ROOT = Path(__file__).resolve().parent.parent


CASES = [(kind, "gp-l") for kind in MODELS] + [(kind, "gp-vl") for kind in SIGHTED]


def sampled(policy, n=6, verify_iter=3, max_new_tokens=12, temperature=1.0, task="gp-l"):
    """Streams of a few multi-turn conversations."""
    environments = [
        envs.make(task, verify_iter=verify_iter, **(SMALL if task == "gp-vl" else {})) for _ in range(n)
    ]
    with policy.responder(temperature, max_new_tokens, policy.generator("test")) as respond:
        envs.play(environments, respond, [f"test/{i}" for i in range(n)])
    return [respond.streams[i][0] for i in range(n)]


# ---- the tiny model


def status_of(args):
    """The exit status of the command line, however it ends."""
    try:
        return sftrl.main([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code


def test_tiny_model_is_about_a_million_parameters_and_deterministic():
    a, b = sftrl.Policy.load("tiny"), sftrl.Policy.load("tiny")
    assert 0.8e6 < a.parameter_count < 1.3e6
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))


def test_numbers_ranks_and_operators_are_tokens_and_fixed_text_is_short(policy):
    for text in [*envs.RANKS, *"0123456789+-*/()=", "11", "12", "13", *envs.FIELDS]:
        quoted = f'"{text}"'
        assert text in [policy.decode([i]) for i in policy.tokenize([quoted])[0]]
    env = envs.make("gp-l", "rule", seed=1)
    prompt = policy.tokenize([policy.render(env.reset()[0].messages)])[0]
    reply = policy.tokenize([env.expert_reply()])[0]
    assert len(prompt) <= 45 and len(reply) <= 40


def test_the_tokenizer_learns_from_all_that_the_verifier_of_cards_says():
    said = set(sftrl.card_texts())
    raised = "".join(re.findall(r"raise Illegal\(.*", inspect.getsource(envs)))
    reasons = re.findall('"([a-z ,]{9,})"', raised)
    wanted = {string.Template(envs.FEEDBACK["illegal"]).substitute(reason=reason) for reason in reasons}
    wanted |= {envs.PICTURE_FEEDBACK[verdict] for verdict in ("unparsed", "misread")}
    wanted |= {"A number was left out. Try again.", "There is no 2 left to use. Try again."}
    assert len(reasons) > 8 and wanted <= said
    assert any(re.fullmatch(r"The formula gives .*, not 24\. Try again\.", text) for text in said)


def test_text_survives_the_tokenizer(policy):
    for text in ('{"cards": ["A"]}', "Γειά 😀\n\t\\", " 10/(3-8/3)=24 "):
        assert policy.decode(policy.tokenize([text])[0]) == text


# ---- scoring and sampling, on three architectures


@pytest.mark.parametrize("kind, task", CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_log_probabilities_equal_teacher_forced_ones(kind, task, temperature):
    policy = make_policy(kind, rollout_batch=4)
    streams = sampled(policy, temperature=temperature, task=task)
    batch = policy.collate(streams)
    with torch.no_grad():
        scores = policy(batch, temperature, values="detached", entropy=True)
    sampler = torch.zeros_like(batch["mask"])
    for b, stream in enumerate(streams):
        sampler[b, : len(stream)] = torch.tensor(stream.logp)
    assert sampler.min() < -0.1
    torch.testing.assert_close(scores["logp"], sampler, rtol=0, atol=1e-5)
    for scored in scores.values():
        assert not scored[batch["mask"] == 0].any()
    assert (scores["entropy"][batch["mask"] > 0] > 0).all()


@pytest.mark.parametrize("kind, task", CASES)
def test_padded_equals_unpadded(kind, task):
    policy = make_policy(kind)
    streams = sampled(policy, task=task)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    with torch.no_grad():
        together = policy(policy.collate(streams), values="shared", entropy=True)
        for b, stream in enumerate(streams):
            alone = policy(policy.collate([stream]), values="shared", entropy=True)
            for name in alone:
                torch.testing.assert_close(
                    together[name][b : b + 1, : len(stream)], alone[name], rtol=1e-4, atol=1e-5
                )


def test_scores_against_the_whole_logits(policy):
    streams = sampled(policy, n=2)
    batch = policy.collate(streams)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    with torch.no_grad():
        scores = policy(batch, 0.5, values="detached", entropy=True)
        for b, stream in enumerate(streams):
            out = policy.model(input_ids=torch.tensor([stream.ids]), output_hidden_states=True)
            for t, chosen in enumerate(stream.mask):
                if chosen:
                    words = torch.arange(out.logits.shape[-1]) != policy.image_id
                    logp = (
                        (out.logits[0, t - 1] / 0.5)
                        .masked_fill(~words, -torch.inf)
                        .log_softmax(-1)
                        .clamp(min=-1e9)
                    )
                    assert scores["logp"][b, t].item() == pytest.approx(logp[stream.ids[t]].item(), abs=1e-4)
                    assert scores["entropy"][b, t].item() == pytest.approx(
                        -(logp.exp() * logp).sum().item(), abs=1e-4
                    )
                    value = policy.value_head(out.hidden_states[-1][0, t - 1])
                    assert scores["value"][b, t].item() == pytest.approx(value.item(), abs=1e-4)


def stream_of(ids):
    """A conversation that waits for a reply."""
    stream = ppo.Stream()
    stream.context(ids)
    return stream


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_equals_the_librarys_greedy(kind):
    policy = make_policy(kind)
    prompts = [s.ids[: s.replies[0][0]] for s in sampled(policy)]
    with policy.rollout_weights() as model:
        drawn = policy.sample(model, [stream_of(ids) for ids in prompts], 10, 0.0, torch.Generator())
    for prompt, (ids, _) in zip(prompts, drawn):
        ids_of_prompt = torch.tensor([prompt])
        expected = policy.model.generate(
            input_ids=ids_of_prompt,
            attention_mask=torch.ones_like(ids_of_prompt),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=sorted(policy.stop_ids),
            pad_token_id=policy.pad_id,
        )
        assert ids == expected[0, len(prompt) :].tolist()


KEEPING = [("llava", "gp-l"), ("llama", "gp-l"), ("llava", "gp-vl"), ("llava", "virl-vl")]


@pytest.mark.parametrize("kind, task", KEEPING)
def test_what_is_kept_from_turn_to_turn_is_what_would_be_read_again(kind, task):
    """Six episodes, four at once, that end at different turns; on the walk some stay at a waypoint while
    others open a new conversation."""
    small = {"virl-vl": {"turns": 2, "points_per_leg": 1, "view_size": 16, "panorama_width": 64}}
    options = small.get(task, SMALL if task == "gp-vl" else {}) | (
        {"continue_after_failure": True} if task == "virl-vl" else {}
    )
    played = []
    for keeps in (True, False):
        policy = make_policy(kind, rollout_batch=4)
        assert policy.keeps_caches
        policy.keeps_caches = keeps
        environments = [envs.make(task, seed=i, verify_iter=1 + i % 3, **options) for i in range(6)]
        with policy.responder(0.0, 12, policy.generator("kept")) as respond:
            envs.play(environments, respond, at_once=4)
        played.append((policy.flops, [s for i in range(6) for s in respond.streams[i]]))
    (kept_flops, kept), (flops, anew) = played
    assert flops == kept_flops == 2 * policy.parameter_count * sum(map(len, kept))
    for a, b in zip(kept, anew, strict=True):
        assert a.ids == b.ids and a.replies == b.replies
        torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), rtol=0, atol=2e-5)


def test_a_cache_that_is_kept_is_read_but_for_the_new_block(monkeypatch):
    policy, read = make_policy("llama"), []
    call = type(policy.model.model).forward

    def forward(self, input_ids, **inputs):
        read.append(input_ids.shape[1])
        return call(self, input_ids, **inputs)

    monkeypatch.setattr(type(policy.model.model), "forward", forward)
    streams = sampled(policy, n=3, max_new_tokens=5)
    longest = max(s.replies[0][0] for s in streams)
    blocks = [n for n in read if n > 1]
    assert blocks[0] == longest and len(blocks) == 3 and max(blocks[1:]) < longest


@pytest.mark.parametrize("kind", SIGHTED)
def test_conversations_that_go_on_at_different_lengths_do_not_see_each_others_columns(kind):
    policy = make_policy(kind)
    observation, _ = envs.make("gp-vl", prompt="$cards", **SMALL).reset()
    streams = [policy.open(observation.messages, observation.image) for _ in range(4)]
    cache = ppo.KeptCache(list(range(4))) if policy.keeps_caches else None
    with policy.rollout_weights() as model:
        policy.sample(model, streams, 1, 0.0, torch.Generator(), cache)
        for stream, n in zip(streams, (1, 4, len(streams[0]) - 3, len(streams[0]) + 9)):
            stream.context([5] * n)
        together = policy.sample(model, streams, 5, 0.0, torch.Generator(), cache)
        alone = [policy.sample(model, [stream], 5, 0.0, torch.Generator())[0] for stream in streams]
    for (ids, logp), (expected, expected_logp) in zip(together, alone):
        assert ids == expected
        torch.testing.assert_close(torch.tensor(logp), torch.tensor(expected_logp), rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_nothing_of_the_folders_generation_config_reaches_the_samples(temperature, tmp_path):
    tokenizer = chat_tokenizer(eos_token="<|end|>")
    model = random_model("llama", tokenizer)
    odd = {
        "do_sample": True,
        "top_k": 1,
        "repetition_penalty": 1.5,
        "typical_p": 0.5,
        "min_new_tokens": 9,
        "bad_words_ids": [[40], [41, 42]],
        "forced_eos_token_id": 50,
        "suppress_tokens": list(range(60, 90)),
    }
    model.generation_config.update(**odd)
    sftrl.Policy(model, tokenizer).save(tmp_path / "model")
    policy = sftrl.Policy.load(str(tmp_path / "model"))
    assert largest_gap(policy, temperature) < 1e-4
    policy.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert again.items() >= (odd | {"eos_token_id": list(range(300, 360))}).items()


def test_sampling_draws_from_the_distribution_it_reports_and_leaves_the_global_random_state(policy):
    prompt = policy.tokenize([policy.render([{"role": "user", "content": "7"}])])[0]
    generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
    with policy.rollout_weights() as model:
        streams = [stream_of(prompt)] * 500
        drawn = [reply[0] for _ in range(8) for reply in policy.sample(model, streams, 1, 0.5, generator)]
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        p = (policy.model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=len(p))
    common = p > 0.01
    assert common.sum() >= 5
    z = (counts[common] - 4000 * p[common]) / (4000 * p[common] * (1 - p[common])).sqrt()
    assert z.abs().max() < 4.5


def test_rows_that_finish_leave_the_batch_and_no_end_token_is_forged(policy):
    with torch.no_grad():  # an end token that is likely, so rows finish at all lengths
        head = policy.model.get_output_embeddings().weight
        head[policy.end_id] = head.mean(0) + 0.02 * torch.randn(
            128, generator=torch.Generator().manual_seed(0)
        )
        policy.model.model.language_model.norm.weight.mul_(0.3)
    streams = sampled(policy, n=40, verify_iter=1, max_new_tokens=400)
    lengths = {len(s) for s in streams}
    assert len(lengths) > 5
    for stream in streams:
        reply = stream.ids[stream.replies[0][0] :]
        assert not policy.stop_ids & set(reply[:-1]) and (reply[-1] in policy.stop_ids or len(reply) == 400)
    batch = policy.collate(streams)
    with torch.no_grad():
        scored = policy(batch)["logp"]
    for b, stream in enumerate(streams):
        torch.testing.assert_close(scored[b, : len(stream)], torch.tensor(stream.logp), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_streams_grow_without_being_tokenized_again(kind):
    policy = make_policy(kind)
    stream = ppo.Stream([], [])
    stream.context(policy.tokenize([policy.render([{"role": "user", "content": "go"}])])[0])
    # The tokenizer itself would write one token.
    odd = policy.tokenize(["c"])[0] + policy.tokenize(["ards"])[0]
    assert policy.tokenize(["cards"])[0] != odd
    stream.reply(odd + [policy.end_id])
    policy.extend(stream, "Again.")
    closed = list(stream.ids)
    assert closed[stream.replies[0][0] :][: len(odd)] == odd
    text = policy.tokenizer.decode(closed)
    assert text == policy.render(
        [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "cards"},
            {"role": "user", "content": "Again."},
        ]
    )
    cut = ppo.Stream([], [])
    cut.context(policy.tokenize([policy.render([{"role": "user", "content": "go"}])])[0])
    cut.reply(odd)
    policy.extend(cut, "Again.")
    # The missing end token joined as context, without loss.
    assert cut.ids == closed and sum(cut.mask) == len(odd)


# ---- the chat models that users bring

PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "[gMASK]{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
THINK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
HARMONY = (  # gpt-oss: the reply goes to a channel
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
CHANNELS = ("<|eos|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>")
LLAMA = (  # a blank before and behind the reply
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
NEWLINE = CHATML.replace("m['content'] + '<|im_end|>", "m['content'] + '\n<|im_end|>")
ENDED = {"eos_token": "<|eos|>", "pad_token": "<|eos|>"}
WORDS, ROLES = ("<|eos|>", "<|im_start|>", "<|im_end|>"), ("<|eos|>", "<|end|>", "<|user|>", "<|assistant|>")
CHATML_TEXT = (
    "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
    "<|im_start|>user\n{f}<|im_end|>\n<|im_start|>assistant\n{b}<|im_end|>"
)
# By kind: tokenizer, the text of a conversation of two turns as its template writes it, the end of a reply,
# tokens at which sampling stops.
TEMPLATES = {
    "chatml": (dict(special=WORDS, **ENDED), CHATML_TEXT, "<|im_end|>", {*WORDS}),
    "end token with a name": (
        dict(special=WORDS, additional_special_tokens=["<|im_end|>"], **ENDED),
        CHATML_TEXT,
        "<|im_end|>",
        {*WORDS},
    ),
    "end token added, but not special": (
        dict(special=WORDS[:1], plain=WORDS[1:], **ENDED),
        CHATML_TEXT,
        "<|im_end|>",
        {*WORDS},
    ),
    "newline before the end": (
        dict(template=NEWLINE, special=WORDS, **ENDED),
        CHATML_TEXT.replace("<|im_end|>\n<|im_start|>user", "\n<|im_end|>\n<|im_start|>user")
        .replace("<|im_end|>\n<|im_start|>assistant", "\n<|im_end|>\n<|im_start|>assistant")
        .replace("{b}", "{b}\n"),
        "\n<|im_end|>",
        {*WORDS},
    ),
    "no eos": (dict(special=WORDS), CHATML_TEXT, "<|im_end|>", {*WORDS[1:]}),
    "phi-3": (
        dict(template=PHI, special=ROLES, **ENDED),
        "<|user|>\n{q}<|end|>\n<|assistant|>\n{a}<|end|>\n<|user|>\n{f}<|end|>\n<|assistant|>\n{b}<|end|>",
        "<|end|>",
        {"<|eos|>", "<|end|>", "<|user|>"},
    ),
    "glm-4: the next role ends a reply": (
        dict(template=GLM, special=("[gMASK]", *ROLES), **ENDED),
        "[gMASK]<|user|>\n{q}<|assistant|>\n{a}<|user|>\n{f}<|assistant|>\n{b}<|user|>",
        "<|user|>",
        {"<|eos|>", "<|user|>"},
    ),
    "plain text": (
        dict(template=PLAIN, special=ROLES, **ENDED),
        "user: {q} assistant: {a}<|eos|> user: {f} assistant: {b}<|eos|>",
        "<|eos|>",
        {"<|eos|>"},
    ),
    "gpt-oss": (
        dict(template=HARMONY, special=CHANNELS, **ENDED),
        "<|start|>user<|message|>{q}<|end|><|start|>assistant<|channel|>final<|message|>{a}<|end|>"
        "<|start|>user<|message|>{f}<|end|><|start|>assistant<|channel|>final<|message|>{b}<|end|>",
        "<|end|>",
        {"<|eos|>", "<|end|>", "<|start|>"},
    ),
    "llama-2": (
        dict(template=LLAMA, special=("<s>", "</s>"), eos_token="</s>"),
        "<s>[INST] {q} [/INST] {a} </s><s>[INST] {f} [/INST] {b} </s>",
        " </s>",
        {"<s>", "</s>"},
    ),
    "thoughts": (
        dict(template=THINK, special=("<|eos|>", "<|user|>", "<|assistant|>", "<think>"), **ENDED),
        "<|user|>{q}<|assistant|><think>{a}<|eos|><|user|>{f}<|assistant|><think>{b}<|eos|>",
        "<|eos|>",
        {"<|eos|>", "<|user|>"},
    ),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_between_turns_stand_the_templates_own_tokens(kind):
    options, text, end, stops = TEMPLATES[kind]
    tokenizer = chat_tokenizer(**options)
    model = random_model("llama", tokenizer)
    model.generation_config.eos_token_id = None
    policy = sftrl.Policy(model, tokenizer)
    q, a, f, b = said = 'Say "24".', '{"cards": ["A"]}', "No. Again.", '{"cards": ["2"]}'
    speakers = ("human", "gpt", "human", "gpt")
    (stream,) = policy.streams(
        [{"conversations": [{"from": who, "value": value} for who, value in zip(speakers, said)]}]
    )
    whole = text.format(q=q, a=a, f=f, b=b)
    assert stream.ids == policy.tokenize([whole])[0]
    blank = {"plain text": " ", "llama-2": " ", "gpt-oss": "<|channel|>final<|message|>"}.get(kind, "")
    for (start, stop), reply in zip(stream.replies, (a, b)):
        assert policy.tokenizer.decode(stream.ids[start:stop]) == blank + reply + end
        assert (
            policy.decode(stream.ids[start:stop])
            == policy.decode(stream.ids[start : stop - 1])
            == blank + reply
        )
    assert policy.tokenizer.convert_ids_to_tokens(policy.end_id) == end.strip()
    assert policy.stop_ids == set(policy.tokenizer.convert_tokens_to_ids(sorted(stops)))
    # A reply that was cut off gets its end from the template, as context; one that stopped with another
    # token keeps it.
    opened = policy.open([{"role": "user", "content": q}])
    start, stop = stream.replies[0]
    said = stop - len(policy.tokenize([end])[0])  # up to here it is the reply's text
    closing = stream.ids[said : stream.replies[1][0]][kind == "plain text" :]
    for extra in ([], [300]):
        cut = copy.deepcopy(opened)
        cut.reply(stream.ids[start:said] + extra)
        policy.extend(cut, f)
        assert cut.ids == stream.ids[:said] + extra + closing and sum(cut.mask) == said - start + len(extra)


def test_a_template_that_asks_for_the_date_is_always_given_the_same():
    template = "{{ 'Today: ' + strftime_now('%d %b %Y, %-m/%-d') + '<|end|>' }}" + CHATML
    tokenizer = chat_tokenizer(template, eos_token="<|end|>")
    policy = sftrl.Policy(random_model("llama", tokenizer), tokenizer)
    text = policy.render([{"role": "user", "content": "24?"}])
    assert text.startswith("Today: 26 Jul 2024, 7/26<|end|><|im_start|>user")


def test_a_model_whose_replies_end_with_nothing_is_refused():
    tokenizer = chat_tokenizer(PLAIN)
    model = random_model("llama", tokenizer)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no eos token, and its chat template ends replies with no token"):
        sftrl.Policy(model, tokenizer)
    with pytest.raises(ValueError, match="leaves out replies"):
        sftrl.Policy(model, chat_tokenizer("{{ messages[-1]['content'] }}", eos_token="<|end|>"))
    with pytest.raises(ValueError, match="its chat template cannot be used: no user"):
        sftrl.Policy(model, chat_tokenizer("{{ raise_exception('no user') }}", eos_token="<|end|>"))


def test_a_blank_before_the_end_of_a_turn_stays_where_the_tokenizers_decoder_would_drop_it():
    """SentencePiece's kind: the decoder drops the first blank of a text."""
    tokenizer = chat_tokenizer(LLAMA, special=("<s>", "</s>"), eos_token="</s>")
    strip = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.backend_tokenizer.decoder = strip
    assert tokenizer.decode(tokenizer(" ")["input_ids"]) == ""
    policy = sftrl.Policy(random_model("llama", tokenizer), tokenizer)
    turns = [("human", "q"), ("gpt", "a"), ("human", "f"), ("gpt", "b")]
    (stream,) = policy.streams([{"conversations": [{"from": who, "value": text} for who, text in turns]}])
    text = "<s>[INST] q [/INST] a </s><s>[INST] f [/INST] b </s>"
    assert stream.ids == policy.tokenize([text])[0]


def test_a_tokenizer_that_puts_a_blank_before_a_text_puts_none_between_turns():
    """Llama-2's kind (SentencePiece): tokenized alone, what follows a reply would begin with one blank too
    many."""
    tokenizer = chat_tokenizer(PLAIN, special=ROLES, **ENDED)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    assert tokenizer.decode(tokenizer("x")["input_ids"]) == " x"
    policy = sftrl.Policy(random_model("llama", tokenizer), tokenizer)
    turns = [
        {"from": who, "value": value}
        for who, value in (("human", "q"), ("gpt", "a"), ("human", "f"), ("gpt", "b"))
    ]
    (stream,) = policy.streams([{"conversations": turns}])
    assert tokenizer.decode(stream.ids) == " user: q assistant: a<|eos|> user: f assistant: b<|eos|>"


@pytest.mark.parametrize("task", ["gp-l", "gp-vl"])
def test_a_bos_that_the_template_lacks_stands_before_the_first_words(task):
    policy = make_policy("llava-1.5")
    observation, _ = envs.make(task, **(SMALL if task == "gp-vl" else {})).reset(seed=0)
    stream = policy.open(observation.messages, observation.image)
    ((text,),) = [[m["content"] for m in observation.messages]]
    parts = (
        [{"type": "text", "text": text}]
        if task == "gp-l"
        else [{"type": "image", "image": observation.image}, *text[1:]]
    )
    library = policy.processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=True, add_generation_prompt=True, return_dict=True
    )
    expected = torch.tensor(library["input_ids"]).flatten().tolist()
    assert stream.ids == expected and expected[0] == policy.tokenizer.bos_token_id != expected[1]
    assert policy.tokenizer.decode(expected[:4]) == "<s>USE"


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
# What a model of each architecture needs beside the usual sizes, and whether its caches are kept.
BROUGHT = {
    "llama": (True, {}),
    "llama-3": (
        True,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen2": (True, {"tie_word_embeddings": True}),
    "qwen3": (True, {"head_dim": 16}),
    "mistral": (False, {"sliding_window": 64}),
    "phi3": (True, {}),
    "gpt2": (False, {}),
    "gpt_oss": (
        False,
        {
            "sliding_window": 64,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma2": (False, {"head_dim": 16, "final_logit_softcapping": 5.0, "sliding_window": 64}),
    "gemma3_text": (False, {"head_dim": 16, "sliding_window": 64}),
    "falcon_h1": (
        False,
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
            "lm_head_multiplier": 0.3,
        },
    ),
    "deepseek_v2": (True, LATENT),
    "deepseek_v3": (True, LATENT | {"first_k_dense_replace": 1}),
    "lfm2": (False, {"layer_types": ["conv", "full_attention"]}),
    "mamba": (False, {"state_size": 8}),
    "mamba2": (False, {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16}),
    "granite": (True, {"logits_scaling": 2.0}),
    "cohere": (True, {"logit_scale": 0.5}),
    "olmo2": (True, {}),
    "opt": (False, {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "jamba": (
        False,
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "smollm3": (True, {}),
    "qwen3_next": (
        False,
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "head_dim": 16,
            "shared_expert_intermediate_size": 32,
            **MIXTURE,
        },
    ),
    "bloom": (False, {}),
    "mpt": (False, {}),
}


def largest_gap(policy, temperature=1.0, task="gp-l"):
    """Between sampled and scored log-probabilities, over three turns of replies of different lengths."""
    streams = sampled(policy, n=8, max_new_tokens=24, task=task, temperature=temperature)
    assert (
        len({stop - start for s in streams for start, stop in s.replies}) > 5
        and max(len(s.replies) for s in streams) == 3
    )
    with torch.no_grad():
        scored = policy(policy.collate(streams), temperature)["logp"]
    return max(
        abs(scored[b, t] - s.logp[t]) for b, s in enumerate(streams) for t in range(len(s)) if s.mask[t]
    )


@pytest.mark.parametrize("architecture", BROUGHT)
def test_a_chat_model_is_sampled_from_its_own_distribution_over_three_turns(architecture):
    tokenizer, (keeps, settings) = chat_tokenizer(eos_token="<|end|>"), BROUGHT[architecture]
    model = random_model(architecture.removesuffix("-3"), tokenizer, **settings)
    policy = sftrl.Policy(model, tokenizer, rollout_dtype=torch.float32)
    assert policy.keeps_caches == keeps and largest_gap(policy) < 1e-4


@pytest.mark.parametrize("kind", ["llava-1.5", "qwen2-vl", "gemma3", "idefics3", "llava-next", *SIGHTED])
def test_a_vision_language_model_is_sampled_from_its_own_distribution_over_three_turns(kind):
    try:
        policy = make_policy(kind, pictures=True)
    except ImportError:
        pytest.skip("its processor needs torchvision in this version of the library")
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(3)
    policy.stop_ids |= set(range(300, 400))
    assert largest_gap(policy, task="gp-vl") < 1e-4


def test_an_architecture_that_cannot_be_served_is_refused_in_one_line_that_names_it(tmp_path, capsys):
    tokenizer = chat_tokenizer(eos_token="<|end|>", pad_token="<|end|>")
    model = random_model("rwkv", tokenizer, attention_hidden_size=64)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert sftrl.main(["sft", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "RwkvForCausalLM cannot be served" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["no head", "head twice", "weights"])
def test_a_model_without_usable_logits_is_refused(fault, monkeypatch):
    model, tokenizer = MODELS["llama"]()
    monkeypatch.setattr(sftrl.Policy, "_checked", set())
    if fault == "no head":
        monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    elif fault == "head twice":
        call = type(model).forward
        monkeypatch.setattr(
            type(model), "forward", lambda self, **inputs: (call(self, **inputs), call(self, **inputs))[1]
        )
    else:
        model.model.norm.weight.data[3] = torch.nan
    words = {"no head": "no output head", "head twice": "called 2 times", "weights": "not finite"}
    with pytest.raises(ValueError, match=words[fault]):
        sftrl.Policy(model, tokenizer)


def test_a_processor_whose_tensors_are_dropped_is_found(monkeypatch):
    """Sampling and scores agree without them; the plain call does not."""
    model, processor = SIGHTED["qwen"]()
    sftrl.Policy(model, processor, pictures=True)
    monkeypatch.setattr(sftrl.Policy, "_checked", set())
    show = ppo.Policy._show

    def dropping(self, stream, *given, **options):
        ids = show(self, stream, *given, **options)
        stream.picture["pixel_values"] = stream.picture["pixel_values"] * 0
        return ids

    monkeypatch.setattr(ppo.Policy, "_show", dropping)
    with pytest.raises(ValueError, match="cannot be served: its log-probabilities differ"):
        sftrl.Policy(model, processor, pictures=True)


def test_an_architecture_is_checked_once_in_a_process_and_not_without_weights(monkeypatch):
    checked = []
    monkeypatch.setattr(sftrl, "check", lambda policy, pictures: checked.append(pictures))
    monkeypatch.setattr(sftrl.Policy, "_checked", set())
    for _ in range(2):
        sftrl.Policy.load("tiny", torch.device("meta"))
    assert checked == []
    for pictures in (False, True, False, True):
        sftrl.Policy.load("tiny", pictures=pictures)
    assert checked == [False, True]


@pytest.mark.parametrize("name", sftrl.TINY_MODELS)
def test_an_outline_counts_tied_weights_once(name):
    outline, whole = (sftrl.Policy.load(name, torch.device(device)) for device in ("meta", "cpu"))
    assert outline.parameter_count == whole.parameter_count


def test_a_check_in_bf16_passes_what_is_right_and_finds_what_is_not(monkeypatch):
    model, processor = MODELS["llava"]()
    policy = sftrl.Policy(model.bfloat16(), processor)
    sftrl.check(policy, True)
    call = policy.model.forward
    monkeypatch.setattr(  # other logits where nothing is kept: in `forward`, and in the plain call
        policy.model,
        "forward",
        lambda **inputs: (
            call(**inputs)
            if inputs["use_cache"]
            else transformers.modeling_outputs.CausalLMOutput(logits=2 * call(**inputs).logits)
        ),
    )
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration cannot be served"):
        sftrl.check(policy, False)


# ---- what the model said is what the verifier sees


def test_special_tokens_in_a_reply_are_shown_to_the_verifier(policy):
    ids = policy.tokenizer.convert_tokens_to_ids
    env = envs.make("gp-l")
    env.reset(seed=0)
    (right,), (wrong,) = policy.tokenize([env.expert_reply()]), policy.tokenize([env.wrong_reply()])
    assert policy.decode([*right, policy.end_id]) == env.expert_reply()
    inside = right[:-3] + ids(["<|pad|>", "<|system|>"]) + right[-3:] + [policy.end_id]  # in the formula
    between = [token for word in right for token in (word, ids("<|pad|>"))]
    forged = wrong + [ids("<|user|>")] + policy.tokenize(["Correct."])[0] + [ids("<|assistant|>")] + right
    assert "<|pad|><|system|>" in policy.decode(inside)
    assert policy.decode(forged).endswith("<|user|>")  # here sampling stops
    for said, verdict in (
        (right, "correct"),
        (inside, "illegal"),
        (between, "unparsed"),
        (forged, "wrong_value"),
    ):
        env.reset(seed=0)
        *_, info = env.step(policy.decode(said))
        assert info["verdict"] == verdict, policy.decode(said)
        assert env.messages[1]["content"] == policy.decode(said)


@pytest.mark.parametrize("kind", SIGHTED)
def test_on_a_walk_in_pictures_earlier_replies_keep_their_tokens(kind, monkeypatch):
    policy = make_policy(kind)
    ids = policy.tokenizer.convert_tokens_to_ids
    written = [
        token
        for piece in ("<", "image", ">", "<|", "image_pad", "|>")
        for token in policy.tokenize([piece])[0]
    ]
    image = policy.tokenizer.convert_ids_to_tokens(policy.image_id)
    odd = (
        written
        + policy.tokenize(["c"])[0]
        + policy.tokenize(["ards"])[0]
        + [ids("<|pad|>"), ids("<|system|>")]
    )
    assert policy.image_id not in odd and policy.image_id in policy.tokenize([image])[0]
    env = envs.make(
        "virl-vl",
        verify_iter=2,
        continue_after_failure=True,
        turns=1,
        points_per_leg=1,
        view_size=16,
        panorama_width=64,
    )
    said = iter([[*odd, k, policy.end_id] for k in range(10, 40)])
    policy.keeps_caches = False

    def sample(model, streams, *args):
        return [(reply, [0.0] * len(reply)) for _, reply in zip(streams, said)]

    monkeypatch.setattr(policy, "sample", sample)
    with policy.responder(1.0, 40, policy.generator("x")) as respond:
        envs.play([env], respond, [0])
    own, k = respond.streams[0], 0
    assert len(own) > 2
    for stream in own:
        opened = stream.replies[0][0]
        assert "".join(map(chr, stream.ids[:opened])).count("".join(map(chr, odd))) == k
        assert stream.ids.count(policy.image_id) == own[0].ids.count(policy.image_id) > 0
        k += len(stream.replies)


# ---- models whose positions end


def test_how_far_positions_reach():
    def reach(architecture, **settings):
        return ppo.longest_conversation(transformers.AutoConfig.for_model(architecture, **settings))

    assert reach("gpt2", n_positions=150) == 150 and reach("opt", max_position_embeddings=99) == 99
    assert reach("llama", max_position_embeddings=64) == reach("gemma3_text") == math.inf
    rope = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
    assert reach("llama", max_position_embeddings=64, rope_parameters=rope) == 64
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_theta": 1e4, "rope_type": "longrope", **factors}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 96}
    assert reach("phi3", **sizes, original_max_position_embeddings=48, rope_parameters=rope) == 48


def test_a_conversation_that_is_longer_than_positions_reach_ends_and_an_experts_is_refused(tmp_path, capsys):
    tokenizer = chat_tokenizer(eos_token="<|end|>", pad_token="<|end|>")
    policy = sftrl.Policy(random_model("gpt2", tokenizer, max_position_embeddings=150), tokenizer)
    policy.save(tmp_path / "model")
    environments = [envs.make("gp-l", seed=i) for i in range(8)]
    with policy.responder(1.0, 40, policy.generator("x")) as respond:
        episodes = envs.play(environments, respond)
    lengths = [len(stream) for own in respond.streams.values() for stream in own]
    assert 140 < max(lengths) <= 150 and all(1 <= len(e.turns) < 5 and not e.success for e in episodes)
    assert all(len(e.turns) == len(respond.streams[i][0].replies) for i, e in enumerate(episodes))
    policy(policy.collate([respond.streams[i][0] for i in range(8)]))
    with (
        policy.responder(1.0, 40, policy.generator("x")) as respond,
        pytest.raises(ValueError, match="a prompt has [0-9]+ tokens"),
    ):
        envs.play([envs.make("gp-l", prompt="$cards $rule " + "so " * 200)], respond)
    model = ["--model", str(tmp_path / "model"), "--n-cards", "6", "--max-new-tokens", "8"]
    for command in (
        ["sft", "--wrong-turns", "1", *model[:2], "--out", str(tmp_path / "a")],
        ["ppo", *model, "--prompt", str(tmp_path / "long"), "--out", str(tmp_path / "a")],
        ["evaluate", *model, "--prompt", str(tmp_path / "long"), "--episodes", "2"],
    ):
        (tmp_path / "long").write_text("$cards $rule " + "so " * 60)
        capsys.readouterr()
        assert sftrl.main(command) == 2
        error = capsys.readouterr().err
        assert (
            error.count("\n") == 1
            and "but the positions of GPT2LMHeadModel reach no farther than 150" in error
        )
    assert not (tmp_path / "a").exists()
    assert sftrl.main(["play", *model[:2], "--max-new-tokens", "40"]) == 0
    assert "cut off: the model's positions reach no farther than 150 tokens" in capsys.readouterr().out


def test_every_experts_episode_must_fit_before_anything_is_trained_or_measured(tmp_path, capsys):
    tokenizer = chat_tokenizer(eos_token="<|end|>", pad_token="<|end|>")
    far = sftrl.Policy(random_model("gpt2", tokenizer, max_position_embeddings=999), tokenizer)
    env = envs.make("gp-l", n_cards=5)

    def lengths(seeds):
        return [len(far.streams([envs.demonstration(env, start=(seed, None))])[0]) for seed in seeds]

    def one_fault(*command):
        longest = {"sft": sft_lengths, "ppo": ppo_lengths, "evaluate": test_lengths}[command[0]]
        reach = max(longest) - 1
        assert longest[0] <= reach  # the first one fits
        model = tmp_path / f"{command[0]}-model"
        sftrl.Policy(random_model("gpt2", tokenizer, max_position_embeddings=reach), tokenizer).save(model)
        capsys.readouterr()
        assert inside(*command, "--model", model, "--n-cards", 5) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"a demonstration has {reach + 1} tokens" in error
        assert not (tmp_path / "run").exists()

    sft_lengths = lengths(f"sft/0/{step}/{i}" for step in range(20) for i in range(2))
    ppo_lengths = lengths(f"train/0/{step}/{i}" for step in range(20) for i in range(2))
    test_lengths = lengths(f"test/{i}" for i in range(40))
    small = ("--out", tmp_path / "run", "--max-new-tokens", 4)
    one_fault("sft", *small[:2], "--steps", 20, "--batch-size", 2)
    one_fault("ppo", *small, "--steps", 20, "--episodes", 2, "--minibatch-size", 2)
    one_fault("evaluate", "--episodes", 40, "--max-new-tokens", 4)


def test_a_generation_config_that_the_library_would_not_save_is_repaired(tmp_path):
    policy = make_policy()
    policy.save(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    odd = json.loads(path.read_text()) | {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    path.write_text(json.dumps(odd))
    config = transformers.GenerationConfig(**odd)
    with pytest.raises(ValueError):
        config.validate(strict=True)
    sftrl.Policy.load(str(tmp_path / "model")).save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (again["temperature"], again["top_p"]) == (0.9, 0.6)


# ---- pictures


@pytest.mark.parametrize("kind", SIGHTED)
def test_a_picture_changes_the_scores_of_its_own_row_alone(kind):
    policy = make_policy(kind)
    batch = policy.collate(sampled(policy, n=3, task="gp-vl"))
    with torch.no_grad():
        before = policy(batch)["logp"]
        batch["pictures"] = [batch["pictures"][1], *batch["pictures"][1:]]
        after = policy(batch)["logp"]
    assert (after[0] - before[0]).abs().max() > 0.01
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-6)


def test_a_picture_is_looked_at_once_for_all_turns_of_an_episode():
    policy, seen = make_policy("llava"), []
    policy.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else ()))),
        with_kwargs=True,
    )
    streams = sampled(policy, n=5, task="gp-vl")
    assert max(len(s.replies) for s in streams) == 3 and seen == [5]


@pytest.mark.parametrize("kind", SIGHTED)
def test_what_stands_beside_a_prompt_keeps_its_place_in_the_row(kind):
    policy = make_policy(kind)
    streams = sampled(policy, n=3, task="gp-vl")
    widest = max(map(len, streams))
    shown = torch.stack([torch.arange(widest) < len(s) for s in streams])
    right = policy._beside(policy.model, streams, shown)
    left = policy._beside(policy.model, streams, shown.flip(1))
    for b, stream in enumerate(streams):
        assert right["attention_mask"][b].sum() == len(stream)
        for name, x in stream.columns.items():
            n, extra = x.shape[1], len(stream) - x.shape[1]
            expected = torch.cat([x[0], x[0, -1:].repeat(extra, *[1] * (x.dim() - 2))])
            assert extra > 0 and stream.ids.index(policy.image_id) < n
            assert torch.equal(right[name][b, : len(stream)], expected)
            assert torch.equal(left[name][b, widest - len(stream) :], expected)
            assert not right[name][b, len(stream) :].any() and not left[name][b, : widest - len(stream)].any()
    assert bool(streams[0].columns) == (kind != "llava")


def test_pictures_of_unlike_size_are_joined_with_zeros():
    a, b = torch.ones(1, 2, 3), 2 * torch.ones(2, 1, 4)
    joined = ppo.stack([a, b])
    assert joined.shape == (3, 2, 4) and joined.sum() == 6 + 16
    assert torch.equal(joined[:1, :, :3], a) and torch.equal(joined[1:, :1], b)


def test_the_image_token_is_never_said(policy):
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[policy.image_id] *= 100
    streams = sampled(policy, n=16)
    said = {token for s in streams for start, stop in s.replies for token in s.ids[start:stop]}
    assert len(said) > 50 and policy.image_id not in said


def test_the_file_of_a_demonstrations_picture_is_read_as_an_image_viewer_shows_it(policy, tmp_path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "transparent.png")
    turns = [{"from": "human", "value": "<image>Which color?"}, {"from": "gpt", "value": "white"}]
    images = str(tmp_path / "transparent.png"), Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8))
    scores = [
        policy(policy.collate(policy.streams([{"image": image, "conversations": turns}])))["logp"]
        for image in images
    ]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


def test_ids_without_text_are_never_drawn():
    """A model may have more rows than the tokenizer has tokens."""
    tokenizer = chat_tokenizer(eos_token="<|end|>")
    policy = sftrl.Policy(random_model("llama", tokenizer, vocab_size=4096), tokenizer)
    streams = sampled(policy, n=16)
    assert all(token < len(tokenizer) for s in streams for token in s.ids)
    assert policy.never_drawn.tolist() == list(range(len(tokenizer), 4096))
    assert largest_gap(policy) < 1e-4


def test_pictures_are_never_lost(policy):
    env = envs.make("gp-vl", **SMALL)
    with_picture, without = envs.demonstration(env), envs.demonstration(envs.make("gp-l"))
    stream = policy.streams([with_picture])[0]
    assert stream.picture["pixel_values"].shape[0] == 1 and stream.ids.count(policy.image_id) > 1
    with pytest.raises(ValueError, match="1 of 2 conversations of a batch have no picture"):
        policy.streams([with_picture, without])
    with pytest.raises(ValueError, match="reads no pictures"):
        make_policy("llama").streams([with_picture])
    with pytest.raises(ValueError, match="an image token without a picture"):
        policy.streams([{"conversations": with_picture["conversations"]}])
    policy._template_text = sftrl.CHAT_TEMPLATE.replace("<image>", "")
    with pytest.raises(ValueError, match="image|picture"):  # the library says it, or we do
        policy.streams([with_picture])


def test_flops_count_each_token_of_the_text_once(policy):
    policy.flops = 0.0
    streams = sampled(policy, n=3, max_new_tokens=5)
    total = sum(map(len, streams))
    assert policy.flops == 2 * policy.parameter_count * total and max(len(s.replies) for s in streams) == 3
    policy.flops = 0.0
    policy(policy.collate(streams))
    assert policy.flops == 6 * policy.parameter_count * total


def test_bf16_rollout_is_close_to_fp32(policy):
    policy.rollout_dtype = torch.bfloat16
    streams = sampled(policy)
    batch = policy.collate(streams)
    with torch.no_grad():
        scored = policy(batch)["logp"]
    for b, stream in enumerate(streams):
        assert (scored[b, : len(stream)] - torch.tensor(stream.logp)).abs().max() < 0.2
    assert all(p.dtype == torch.float32 for p in policy.parameters())


# ---- saving and loading


@pytest.mark.parametrize("kind", MODELS)
def test_save_and_load_round_trip_through_auto_classes(kind, tmp_path):
    policy = make_policy(kind)
    torch.nn.init.normal_(policy.value_head[-1].weight)
    policy.save(tmp_path)
    again = sftrl.Policy.load(str(tmp_path), rollout_dtype=torch.float32)
    assert type(again.model) is type(policy.model)
    batch = policy.collate(sampled(policy))
    with torch.no_grad():
        a, b = policy(batch, values="shared"), again(batch, values="shared")
    assert torch.equal(a["logp"], b["logp"]) and torch.equal(a["value"], b["value"])
    assert again.render([{"role": "user", "content": "x"}]) == policy.render(
        [{"role": "user", "content": "x"}]
    )
    auto = transformers.AutoModelForCausalLM if kind == "llama" else transformers.AutoModelForImageTextToText
    loaded = auto.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), policy.model.parameters()))
    transformers.AutoProcessor.from_pretrained(tmp_path)


def test_a_tokenizer_without_chat_template_is_refused():
    model, tokenizer = MODELS["llama"]()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        sftrl.Policy(model, tokenizer)


# ---- memory: parts of a model, activations, bf16


@pytest.mark.parametrize("kind", SIGHTED)
@pytest.mark.parametrize("train", sftrl.TRAINED)
def test_only_the_chosen_parts_of_a_model_are_trained(kind, train):
    policy = make_policy(kind).set_trainable(train)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizers = policy.optimizers(1e-2)
    env = envs.make("gp-vl", **SMALL)
    config = sftrl.sft.SFTConfig(lr=1e-2, steps=1, batch_size=2)
    list(
        sftrl.sft.train(policy, optimizers, lambda step: [envs.demonstration(env) for _ in range(2)], config)
    )
    changed = {
        name.split(".")[1] if "merger" not in name else "merger"
        for name, p in policy.model.named_parameters()
        if not torch.equal(p, before[name])
    }
    tower = {"llava": "vision_tower", "mllama": "vision_model", "qwen": "visual"}[kind]
    adapter = "merger" if kind == "qwen" else "multi_modal_projector"
    expected = {"all": {tower, adapter}, "language": set(), "language+adapter": {adapter}}[train]
    # `lm_head.weight`, where it is a parameter of its own.
    assert changed - {"weight"} == {"language_model"} | expected


@pytest.mark.parametrize("kind, task", CASES)
def test_activations_computed_again_give_the_same_gradients_in_less_memory(kind, task):
    policy = make_policy(kind)
    batch = policy.collate(sampled(policy, task=task))
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


def test_rounding_at_random_moves_bf16_parameters_as_fp32_ones_and_rounding_to_the_nearest_does_not():
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
    assert moved["exact"] < -5e-5 and moved["random"] == pytest.approx(moved["exact"], rel=0.03)
    assert abs(moved["nearest"]) < 0.1 * abs(moved["exact"])


def test_a_model_in_bf16_learns_as_one_in_fp32_and_its_moments_are_bf16():
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        policy, env = sftrl.Policy.load("tiny", dtype=dtype), envs.make("gp-l")
        optimizers, config = policy.optimizers(1e-3), sftrl.sft.SFTConfig(lr=1e-3, steps=40, batch_size=4)
        batches = sft.fresh_batches(env, envs.demonstration, 4, "bf16")
        losses.append([metrics["loss"] for metrics in sftrl.sft.train(policy, optimizers, batches, config)])
        (optimizer,) = optimizers
        assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {dtype} and policy.value_head[
            0
        ].weight.dtype == torch.float32
    assert losses[0][-1] < 0.6 * losses[0][0] and losses[1][-1] == pytest.approx(losses[0][-1], rel=0.05)


def test_a_run_with_frozen_parts_in_bf16_resumes_to_the_same_weights(tmp_path):
    env = envs.make("gp-vl", **SMALL)
    batches = sft.fresh_batches(env, envs.demonstration, 2, "frozen")
    config = sftrl.sft.SFTConfig(lr=1e-2, steps=4, batch_size=2)

    def run(folder, batch_of=batches):
        def load():
            return sftrl.Policy.load("tiny", dtype=torch.bfloat16).set_trainable("language")

        sftrl.train_run(folder, load, config, batch_of, {}, count=4)

    def broken(step):
        if step == 2:
            raise KeyboardInterrupt
        return batches(step)

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", broken)
    run(tmp_path / "broken")
    saved = [
        (tmp_path / name / "checkpoint-4/model.safetensors").read_bytes() for name in ("whole", "broken")
    ]
    assert saved[0] == saved[1]
    assert (
        sftrl.Policy.load(str(tmp_path / "whole/checkpoint-4"), dtype=torch.bfloat16).model.dtype
        == torch.bfloat16
    )


# ---- the command line


def cli(*args, check=0, env=None):
    command = [sys.executable, str(ROOT / "sftrl.py"), *map(str, args)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )
    assert done.returncode == check, done.stderr
    return done


def inside(*args):
    """A command in this process, which need not import everything again: its exit status."""
    return sftrl.main([str(arg) for arg in args])


TINY_PPO = (
    "--steps",
    6,
    "--episodes",
    8,
    "--minibatch-size",
    4,
    "--max-new-tokens",
    8,
    "--epochs",
    1,
    "--lr",
    1e-3,
    "--value-warmup",
    2,
)


def test_training_stages_and_evaluation_end_to_end(tmp_path, capsys):
    cli(
        "sft",
        "--out",
        tmp_path / "sft",
        "--steps",
        3,
        "--batch-size",
        4,
        "--checkpoints",
        2,
        "--wrong-turns",
        1,
    )
    assert sorted(p.name for p in (tmp_path / "sft").iterdir()) == [
        "checkpoint-1",
        "checkpoint-3",
        "config.json",
        "metrics.jsonl",
        "resume.pt",
        "samples.jsonl",
    ]
    model = tmp_path / "sft/checkpoint-3"
    assert inside("ppo", "--out", tmp_path / "ppo", "--model", model, *TINY_PPO) == 0
    lines = sftrl.read_lines(tmp_path / "ppo/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    logged = {
        "return",
        "success",
        "reward/unparsed",
        "approx_kl",
        "clip_fraction",
        "explained_variance",
        "entropy",
        "value_loss",
        "grad_norm",
        "reply_length",
        "rollout_tokens_per_s",
        "update_tokens_per_s",
        "flops",
    }
    assert logged <= lines[0].keys() and lines[0]["first_ratio_error"] < 1e-5
    assert len(sftrl.read_lines(tmp_path / "ppo/samples.jsonl")) == 6
    config = json.loads((tmp_path / "ppo/config.json").read_text())
    assert config["settings"]["episodes"] == 8 and config["versions"]["torch"] == torch.__version__
    capsys.readouterr()
    assert (
        inside(
            "evaluate",
            "--model",
            tmp_path / "ppo/checkpoint-6",
            "--episodes",
            4,
            "--max-new-tokens",
            8,
            "--variant",
            "rule",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "verifier: [" in out and json.loads(out[out.index("\n{") :])["episodes"] == 4


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_results_are_written_before_anything_is_printed(tmp_path, monkeypatch, capsys):
    args = ("evaluate", "--model", "tiny", "--episodes", 2, "--max-new-tokens", 4, "--verify-iter", 1)
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    assert inside(*args, "--out", tmp_path) == 2 and "Broken pipe" in capsys.readouterr().err
    assert json.loads((tmp_path / "result.json").read_text())["episodes"] == 2
    assert len(sftrl.read_lines(tmp_path / "transcripts.jsonl")) == 2


def test_a_wrong_path_for_pictures_ends_an_evaluation_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sftrl, "load_policy", None)
    args = ("--model", "tiny", "--task", "gp-vl", "--size", 64, 32, "--save", tmp_path / "file")
    assert inside("evaluate", *args) == 2 and str(tmp_path / "file") in capsys.readouterr().err


def test_what_a_terminals_encoding_lacks_is_replaced_and_files_are_utf8_anywhere(tmp_path, monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), "cp1252") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert inside("play", "--cards", "A 3 K 10", "--reply", "5 → 24 \udcff") == 0
        terminal.flush()
        assert b"model: 5 ? 24 ?" in terminal.buffer.getvalue()
    # The encoding of files where none is named, in a locale of old.
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *level: encoding or "ascii")
    sftrl.write_text(tmp_path / "table.md", "1 ± 2")
    assert (tmp_path / "table.md").read_bytes() == "1 ± 2".encode()


def interrupted(command, folder, number, delay):
    """Starts a command, sends it a signal so long after its training began, and returns its exit status."""

    def began():
        # It is written anew at every start.
        return (folder / "metrics.jsonl").stat().st_ino if (folder / "metrics.jsonl").exists() else None

    before = began()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while began() == before:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait()


@pytest.mark.parametrize(
    "stage, kills",
    [
        ("ppo", 3),
        pytest.param("ppo", 20, marks=pytest.mark.slow),
        pytest.param("sft", 20, marks=pytest.mark.slow),
    ],
)
def test_a_run_interrupted_and_killed_at_random_moments_ends_in_bit_identical_weights(tmp_path, stage, kills):
    sftrl.Policy.load("tiny").save(tmp_path / "model")  # a process that loads it need not train a tokenizer
    whole, broken, chance = tmp_path / "whole", tmp_path / "broken", random.Random(kills)
    size = TINY_PPO if stage == "ppo" else ("--batch-size", 8, "--lr", 1e-3)
    args = (
        stage,
        *size,
        "--steps",
        4 * kills,
        "--checkpoints",
        2 * kills,
        "--threads",
        1,
        "--model",
        tmp_path / "model",
    )
    assert inside(*args, "--out", whole) == 0
    command = [sys.executable, str(ROOT / "sftrl.py"), *map(str, args), "--out", str(broken)]
    assert interrupted(command, broken, signal.SIGINT, 0.1) == 130
    (state,) = broken.glob("resume*")
    steps = torch.load(state, weights_only=True)["step"]
    assert steps == sftrl.read_lines(broken / "metrics.jsonl")[-1]["step"] > 0
    for _ in range(kills):
        assert interrupted(command, broken, signal.SIGKILL, chance.uniform(0, 0.3)) == -signal.SIGKILL, (
            "killed too late"
        )
        for checkpoint in sftrl.checkpoints(broken):
            sftrl.Policy.load(str(checkpoint))
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "half a li')
    cli(*args, "--out", broken)
    last = f"checkpoint-{4 * kills}"
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (broken / last / name).read_bytes() == (whole / last / name).read_bytes()
    of_time = {"rollout_tokens_per_s", "update_tokens_per_s", "seconds"}
    lines = [
        [
            {k: v for k, v in line.items() if k not in of_time}
            for line in sftrl.read_lines(folder / "metrics.jsonl")
        ]
        for folder in (whole, broken)
    ]
    assert lines[0] == lines[1] and [line["step"] for line in lines[1]] == list(range(1, 4 * kills + 1))
    changed = cli(
        *args, "--out", broken, *(("--clip", 0.3) if stage == "ppo" else ("--warmup", 0.5)), check=2
    )
    assert "other settings" in changed.stderr


SHORT = {  # by command, options of a short one
    "study": (),
    "sft": ("--steps", 1, "--batch-size", 2),
    "ppo": TINY_PPO,
    "evaluate": ("--model", "tiny", "--episodes", 2, "--max-new-tokens", 4),
}


@pytest.mark.parametrize("command", SHORT)
def test_a_second_command_on_a_folder_is_refused_in_one_line_before_a_model_is_loaded(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sftrl, "load_policy", None)
    with sftrl.locked(tmp_path / "run"):
        assert inside(command, *SHORT[command], "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert f"another process writes to {tmp_path / 'run'}" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_lock_of_a_process_that_was_killed_refuses_nobody(tmp_path, capsys):
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
    hold += "; print(flush=True); input()"
    args, lock = ("sft", *SHORT["sft"], "--out", tmp_path), tmp_path / ".sftrl.lock"
    command = [sys.executable, "-c", hold, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert inside(*args) == 2 and "another process" in capsys.readouterr().err
        holder.kill()
    assert lock.exists() and inside(*args) == 0 and not lock.exists()


@pytest.mark.parametrize("lacking", ["system", "file system"])
def test_where_there_are_no_locks_one_warning_says_so(lacking, tmp_path, monkeypatch, recwarn):
    def flock(*arguments):
        raise OSError(37, "No locks available")

    fcntl = types.SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4) if lacking == "file system" else None
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)
    assert inside("evaluate", *SHORT["evaluate"], "--out", tmp_path) == 0
    assert (tmp_path / "result.json").exists()
    assert sum("cannot be locked" in str(warning.message) for warning in recwarn.list) == 1


def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint(tmp_path):
    config = sftrl.sft.SFTConfig(batch_size=2, steps=3, lr=1e-3)
    batches = sft.fresh_batches(envs.make("gp-l"), envs.demonstration, 2, "full")
    free = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(step):
        if step == 1:
            # No file may grow beyond a megabyte any more.
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, free[1]))
        return batches(step)

    def run(batch_of):
        torch.manual_seed(0)
        sftrl.train_run(tmp_path, lambda: sftrl.Policy.load("tiny"), config, batch_of, {}, count=3)

    try:
        with pytest.raises(sftrl.NotSaved, match="checkpoint-2 could not be written: "):
            run(filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-1",
        "config.json",
        "metrics.jsonl",
        "resume.pt",
        "samples.jsonl",
    ]
    sftrl.Policy.load(str(tmp_path / "checkpoint-1"))
    run(batches)
    assert [line["step"] for line in sftrl.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(sftrl.checkpoints(tmp_path)) == 3


def test_running_out_of_memory_ends_in_one_line_that_says_what_to_lower(tmp_path, capsys):
    free = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 300 * 2**20, free[1]))
        status = inside(
            "sft", "--out", tmp_path, "--steps", 1, "--batch-size", 2048, "--microbatch-size", 2048
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, free)
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        status == 1
        and said.startswith("sftrl: out of memory: lower --microbatch-size")
        and not list(tmp_path.glob("checkpoint*"))
    )


def test_tensorboard_gets_every_metric_or_is_refused_in_one_line(tmp_path, capsys):
    args = ("sft", "--out", tmp_path, "--steps", 2, "--batch-size", 2, "--tensorboard")
    if not importlib.util.find_spec("tensorboard"):
        assert (
            inside(*args) == 2
            and "pip install tensorboard" in capsys.readouterr().err
            and not list(tmp_path.iterdir())
        )
        return
    assert inside(*args) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2] and "grad_norm" in events.Tags()["scalars"]


def test_the_newest_checkpoints_alone_are_kept(tmp_path):
    assert (
        inside("sft", "--out", tmp_path, "--steps", 4, "--batch-size", 2, "--checkpoints", 4, "--keep", 2)
        == 0
    )
    assert [path.name for path in sftrl.checkpoints(tmp_path)] == [
        "checkpoint-3",
        "checkpoint-4",
    ] and not list(tmp_path.glob("*.tmp"))


def test_only_folders_named_checkpoint_and_digits_belong_to_a_run(tmp_path, monkeypatch):
    command = ("sft", "--out", tmp_path, "--steps", 4, "--batch-size", 2, "--checkpoints", 4, "--keep", 1)
    train = sft.train

    def interrupted_train(*args):
        for metrics in train(*args):
            if metrics["step"] == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield metrics

    monkeypatch.setattr(sft, "train", interrupted_train)
    assert inside(*command) == 130
    monkeypatch.undo()
    foreign = [
        "checkpoint-2-backup",
        "checkpoint-9-backup",
        "checkpoint-best",
        "checkpoint-",
        "checkpoint--1",
    ]
    for name in foreign:
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    assert [path.name for path in sftrl.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert inside(*command) == 0
    assert [path.name for path in sftrl.checkpoints(tmp_path)] == ["checkpoint-4"]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", *foreign}


def test_a_file_or_a_link_with_a_checkpoints_name_stays(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoint-7").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint-9").write_text("mine")
    command = ("sft", "--out", tmp_path / "run", "--batch-size", 2, "--checkpoints", 1, "--keep", 1)
    assert inside(*command, "--steps", 2) == 0
    assert [path.name for path in sftrl.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert (tmp_path / "run" / "checkpoint-7").is_symlink()
    for path in (tmp_path / "run").iterdir():  # the run begins anew
        if path.name.split("-")[-1] not in ("7", "9"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "run" / "checkpoint-2").write_text("mine")
    assert inside(*command, "--steps", 2) == 1
    assert "checkpoint-2 could not be written: [Errno 20] Not a directory" in capsys.readouterr().err
    assert inside(*command, "--steps", 2) == 1  # not taken for finished
    for name in ("checkpoint-2", "checkpoint-9"):
        assert (tmp_path / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("command", ["sft", "evaluate"])
def test_progress_in_a_file_is_a_line_now_and_then_with_its_figures(tmp_path, command):
    words = (
        ["sft", "--out", tmp_path / "run", "--steps", 40]
        if command == "sft"
        else ["evaluate", "--model", "tiny", "--episodes", 4]
    )
    words += ["--batch-size", 2] if command == "sft" else ["--max-new-tokens", 8]
    with open(tmp_path / "log", "wb") as file:
        subprocess.run(
            [sys.executable, ROOT / "sftrl.py", *map(str, words), "--threads", "1"],
            stderr=file,
            stdout=subprocess.DEVNULL,
            check=True,
        )
    log = (tmp_path / "log").read_text()
    lines = [line for line in log.replace("\r", "").split("\n") if line]
    assert 2 <= len(lines) <= 8 and "100%" in lines[-1]
    if command == "sft":
        loss = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        assert f"loss={loss:.3g}" in lines[-1]


def test_progress_on_a_terminal_moves_in_one_line(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with sftrl.progress_bar("run", 1) as show:
        for k in range(1, 5):
            time.sleep(0.11)  # the bar moves ten times a second at most
            show(k / 4, loss=1 / k)
    assert (
        terminal.getvalue().count("\n") == 1
        and terminal.getvalue().count("\r") > 4
        and "loss=0.25" in terminal.getvalue()
    )


def shorten(monkeypatch, task, **settings):
    """Few and short replies in the study of a task: a model that knows nothing would write to the end each
    time."""
    study = sftrl.STUDIES[task]
    monkeypatch.setitem(
        sftrl.STUDIES,
        task,
        replace(
            study,
            base=replace(study.base, batch_size=8),
            init=study.init | {"batch_size": 8},
            max_new_tokens=4,
            rl=replace(study.rl, episodes=8, minibatch_size=4, max_new_tokens=4),
            **settings,
        ),
    )


def test_visual_study_in_miniature(tmp_path, monkeypatch):
    shorten(monkeypatch, "gp-vl", count=2)
    assert (
        inside("study", "--task", "gp-vl", "--out", tmp_path, "--seeds", 1, "--scale", 0.003, "--hands", 6)
        == 0
    )
    lines = sftrl.read_lines(tmp_path / "results.jsonl")
    assert {(p["arm"], p["variant"]) for p in lines} >= {
        (a, v) for a in ("base", "init", "sft", "rl") for v in ("id", "rule", "visual")
    }
    assert all(0 <= p["recognition"] <= 1 for p in lines)
    report = (tmp_path / "report.md").read_text()
    assert "| RL ends above init on the other colour |" in report
    assert "| RL raises recognition on the other colour |" in report
    pytest.importorskip("matplotlib")
    assert (tmp_path / "figures/recognition.png").exists()


@pytest.mark.parametrize("task", [pytest.param("virl-l", marks=pytest.mark.slow), "virl-vl"])
def test_study_of_routes_in_miniature(tmp_path, monkeypatch, task):
    shorten(monkeypatch, task, count=1)
    variants = ("id", "rule", "visual") if task == "virl-vl" else ("id", "rule")
    args = ("study", "--task", task, "--out", tmp_path, "--seeds", 1, "--scale", 0.0005, "--hands", 2)
    assert inside(*args) == 0
    lines = sftrl.read_lines(tmp_path / "results.jsonl")
    assert {(p["arm"], p["variant"]) for p in lines} >= {
        (a, v) for a in ("base", "init", "sft", "rl") for v in variants
    }
    assert all(0 <= p["step_accuracy"] <= 1 and len(p["steps"]) == p["episodes"] == 2 for p in lines)
    report = (tmp_path / "report.md").read_text()
    assert "step accuracy" in report and "RL ends above SFT under the other rule, turn accuracy" in report
    assert ("91.8 against 80.8" if task == "virl-l" else "RL raises recognition in other cities") in report
    whole_routes = "in other cities, success" in report and "77.8 against 16.7" in report
    assert whole_routes == (task == "virl-vl")
    smaller = {
        "virl-l": "turns 3 (7), points_per_leg 1 (4).",
        "virl-vl": "turns 2 (7), points_per_leg 1 (4), view_size 64 (300), panorama_width 256 (1024).",
    }
    assert "95% over episodes" in report and smaller[task] in report


@pytest.mark.parametrize(
    "success, path, chosen",
    [
        ({1e-4: 2, 1e-3: 4, 1e-2: 3}, [1e-3, 1e-2, 1e-4], 1e-3),
        ({1e-4: 2, 1e-3: 4, 1e-2: 5}, [1e-3, 1e-2], 1e-2),  # the one below the last is known
        ({1e-5: 7, 1e-4: 6, 1e-3: 4, 1e-2: 3}, [1e-3, 1e-2, 1e-4, 1e-5], 1e-5),
        ({1e-4: 4, 1e-3: 4, 1e-2: 4}, [1e-3, 1e-2, 1e-4], 1e-3),  # no better is not better
    ],
)
def test_the_search_climbs_from_the_middle_of_the_grid(success, path, chosen, tmp_path, monkeypatch):
    asked = []

    def try_rate(run, arm, rate=None):
        if arm.name == "sft":
            asked.append(rate)
        return success.get(rate, 0), [arm.name, f"{rate}"]

    monkeypatch.setattr(sftrl.StudyRun, "try_rate", try_rate)
    study = replace(sftrl.STUDIES["gp-l"], grid=(1e-5, 1e-4, 1e-3, 1e-2))
    sftrl.StudyRun("gp-l", study, tmp_path).search("main")
    assert asked == path
    assert f"| sft | **chosen by id: {chosen:g}** |" in (tmp_path / "search-main.md").read_text()


def test_the_search_prints_every_rate_and_chooses_by_the_training_rule(tmp_path, monkeypatch):
    shorten(monkeypatch, "gp-l", count=1, grid=(1e-4, 1e-3))
    args = ("study", "--search", "--out", tmp_path, "--scale", 0.002, "--hands", 4)
    assert inside(*args) == 0
    table = (tmp_path / "search-main.md").read_text()
    assert re.findall(
        r"\| (init|sft|rl) \| ([0-9.e-]+)(?: \| [0-9.]+ ± [0-9.]+, [0-9.]+ ± [0-9.]+){2} \|", table
    ) == [("init", "0.0003"), ("sft", "0.0001"), ("sft", "0.001"), ("rl", "0.0001"), ("rl", "0.001")]
    # id and rule of both seeds' inits, then of each rate, the larger first; the second seed tips the scales
    # for SFT, and RL goes on to the lower rate
    shown = iter(
        [0.3, 0.2, 0.3, 0.2, 0.6, 0.1, 0.7, 0.1, 0.7, 0.9, 0.5, 0.9, 0.5, 0.3, 0.6, 0.3, 0.6, 0.2, 0.6, 0.2]
    )
    monkeypatch.setattr(
        sftrl.evaluate,
        "evaluate",
        lambda *args: ({"success": next(shown), "success_se": 0.0, "episodes": 4}, []),
    )
    (tmp_path / "results.jsonl").unlink()
    monkeypatch.setattr(sftrl.sft, "train", None)  # trains nothing again
    assert inside(*args) == 0
    assert next(shown, None) is None
    assert re.findall(
        r"\| (sft|rl) \| \*\*chosen by id: ([0-9.e-]+)", (tmp_path / "search-main.md").read_text()
    ) == [("sft", "0.001"), ("rl", "0.0001")]


def test_study_end_to_end_in_miniature_and_again(tmp_path, monkeypatch, capsys):
    shorten(monkeypatch, "gp-l", count=3)
    args = ("study", "--out", tmp_path, "--seeds", 2, "--scale", 0.002, "--hands", 6)
    assert inside(*args) == 0
    assert "| claim | temperature 1 |" in capsys.readouterr().out
    lines = sftrl.read_lines(tmp_path / "results.jsonl")
    assert {(p["arm"], p["variant"], p["temperature"]) for p in lines} >= {
        (a, v, t) for a in ("init", "sft", "rl") for v in ("id", "rule") for t in (0.0, 1.0)
    }
    keys = {
        "task",
        "experiment",
        "arm",
        "seed",
        "step",
        "flops",
        "variant",
        "episodes",
        "success",
        "kl_to_init",
        "checkpoint",
    }
    assert all(keys <= p.keys() for p in lines if p["temperature"])
    assert all((tmp_path / p["checkpoint"] / "config.json").exists() for p in lines)
    assert next(p for p in lines if p["arm"] == "init" and p["temperature"])["kl_to_init"] < 1e-2
    report = (tmp_path / "report.md").read_text()
    assert "holds" in report or "not significant" in report
    assert "tiny, has 1.1M parameters" in report and "| sft | init | sft | lr 0.001, batch_size" not in report
    assert "| sft | init | sft | lr 0.001, microbatch_size 16, flops" in report
    before = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "report.md").unlink()
    start = time.time()
    assert inside(*args) == 0
    assert (
        (tmp_path / "results.jsonl").read_text() == before
        and (tmp_path / "report.md").read_text() == report
        and time.time() - start < 60
    )


EXPERIMENTS = {  # by name, arms with what they are about
    "no-init": {"no-init-0.0001", "no-init-0.0004"},
    "verification": {"rl-budget-1", "rl-budget-10"},
    "start": {"rl-from-sft-1", "rl-from-sft-2"},
    "revision-sft": {"sft-revision"},
    "reply-ratio": {"rl-reply"},
    "rivals": {"dft", "sft-at-dft-rate", "self-sft", "rl-kl", "diverse-sft", "diverse-rl"},
    "forgetting": {"sft", "rl"},
}


@pytest.mark.parametrize(
    "name",
    [
        "start",
        *(pytest.param(x, marks=pytest.mark.slow) for x in (*sorted(EXPERIMENTS.keys() - {"start"}), "all")),
    ],
)
def test_experiments_in_miniature(tmp_path, monkeypatch, name):
    shorten(monkeypatch, "gp-l", count=2)
    args = ("study", "--out", tmp_path, "--seeds", 1, "--scale", 0.006, "--hands", 8, "--experiment", name)
    assert inside(*args) == 0
    lines, report = sftrl.read_lines(tmp_path / "results.jsonl"), (tmp_path / "report.md").read_text()
    for experiment, arms in EXPERIMENTS.items() if name == "all" else [(name, EXPERIMENTS[name])]:
        assert arms <= {p["arm"] for p in lines} and f"## {experiment}" in report
        if importlib.util.find_spec("matplotlib"):
            assert (tmp_path / f"figures/{experiment}.png").read_bytes()[:4] == b"\x89PNG"
    if name == "start":  # each starts from another checkpoint of SFT
        started = [json.loads((tmp_path / f"seed-0/rl-from-sft-{k}/config.json").read_text()) for k in (1, 2)]
        assert started[0]["settings"]["model"] != started[1]["settings"]["model"]
        assert all(run["settings"]["model"].startswith("seed-0/sft/checkpoint-") for run in started)
        assert "rl-from-sft-1 ends above its start under the other rule" in report


@pytest.mark.slow
def test_frozen_parts_and_controls_in_miniature(tmp_path, monkeypatch):
    shorten(monkeypatch, "gp-vl", count=1, grid=(1e-4,))
    args = ("study", "--task", "gp-vl", "--out", tmp_path, "--seeds", 1, "--scale", 0.002, "--hands", 8)
    for name in ("recognition", "sft-search"):
        assert inside(*args, "--experiment", name) == 0
    lines = sftrl.read_lines(tmp_path / "results.jsonl")
    assert {p["pictures"] for p in lines if p["arm"] == "rl"} == {"own", "blank", "shuffled"}
    assert {"sft-all-0.0001", "sft-language-0.0001"} < {p["arm"] for p in lines}
    base, all_parts, language = (
        load_file(next((tmp_path / f"seed-0/{arm}").glob("checkpoint-*")) / "model.safetensors")
        for arm in ("init", "sft-all-0.0001", "sft-language-0.0001")
    )
    tower = next(key for key in base if "vision_tower" in key and key.endswith("weight"))
    assert torch.equal(base[tower], language[tower]) and not torch.equal(base[tower], all_parts[tower])


def test_an_unknown_experiment_is_one_line(tmp_path, capsys):
    assert inside("study", "--out", tmp_path, "--experiment", "recognition") == 2
    assert "choose from main, no-init" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_killed_at_random_moments_measures_what_an_unbroken_one_does(tmp_path):
    args = ("study", "--seeds", 1, "--scale", 0.01, "--hands", 8, "--threads", 1, "--out")
    start = time.monotonic()
    cli(*args, tmp_path / "whole")
    length, chance, kills = time.monotonic() - start, random.Random(0), 0
    command = [sys.executable, str(ROOT / "sftrl.py"), *map(str, args), str(tmp_path / "broken")]
    for _ in range(6):
        process = subprocess.Popen(
            command,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0.2, 0.45) * length)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 2
    cli(*args, tmp_path / "broken")
    whole, broken = (
        [p | {"checkpoint": ""} for p in sftrl.read_lines(tmp_path / name / "results.jsonl")]
        for name in ("whole", "broken")
    )
    assert whole == broken
    assert (tmp_path / "broken/report.md").read_text() == (tmp_path / "whole/report.md").read_text()


def test_data_writes_what_sft_reads(tmp_path, capsys):
    path = tmp_path / "demos.json"
    assert inside("data", "--out", path, "--episodes", 6, "--wrong-turns", 1) == 0
    assert len(json.loads(path.read_text())) == 6
    assert inside("sft", "--out", tmp_path / "run", "--demos", path, "--steps", 2, "--batch-size", 4) == 0
    assert inside("data", "--task", "gp-vl", "--out", path, "--episodes", 2, "--size", 128, 64) == 0
    for record in json.loads(path.read_text()):
        assert (tmp_path / record["image"]).exists()
        assert record["conversations"][0]["value"].startswith("<image>\nMake 24")
    assert inside("data", "--task", "virl-l", "--out", tmp_path / "walks.json", "--episodes", 2) == 0
    assert all(
        "Walk this route" in record["conversations"][0]["value"]
        for record in json.loads((tmp_path / "walks.json").read_text())
    )
    assert inside("sft", "--out", tmp_path / "seen", "--demos", path, "--steps", 1, "--batch-size", 2) == 0
    next((tmp_path / "demos").iterdir()).write_bytes(b"no picture")
    assert inside("sft", "--out", tmp_path / "broken", "--demos", path, "--steps", 1, "--batch-size", 2) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_the_built_in_city_is_written_and_walked_from_its_files(tmp_path, capsys):
    assert sftrl.main(["data", "--task", "virl-l", "--episodes", "3", "--out", str(tmp_path)]) == 0
    assert envs.load_world(tmp_path).routes == envs.built_in_world().routes[:3]
    model = [
        "evaluate",
        "--model",
        "tiny-streets",
        "--task",
        "virl-l",
        "--data",
        str(tmp_path),
        "--points-per-leg",
        "0",
        "--max-new-tokens",
        "2",
    ]
    capsys.readouterr()
    assert sftrl.main([*model, "--transcripts", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 3  # all routes
    for wrong, said in (
        (["data", "--task", "virl-l", "--wrong-turns", "1", "--out", str(tmp_path)], "--wrong-turns"),
        (["data", "--task", "virl-l", "--data", str(tmp_path), "--out", str(tmp_path / "again")], "--data"),
        (["play", "--task", "virl-l", "--cards", "A 3 K 10"], "--cards"),
        (["play", "--route", "3"], "--route"),
        (["play", "--task", "virl-l", "--data", str(tmp_path), "--turns", "3"], "turns is for built-in"),
    ):
        assert status_of(wrong) == 2 and said in capsys.readouterr().err


def test_a_city_in_pictures_that_was_written_is_read_back_as_the_same_episodes_until_a_picture_breaks(
    tmp_path, capsys
):
    assert (
        sftrl.main(
            ["data", "--task", "virl-vl", "--turns", "1", "--panorama-width", "64", "--out", str(tmp_path)]
        )
        == 0
    )
    written, read = (
        envs.make("virl-vl", turns=1, panorama_width=64, view_size=32),
        envs.make("virl-vl", data=tmp_path, view_size=32),
    )
    for seed in range(10):
        ends = [env.reset(seed) for env in (written, read)]
        while not any(written.done):
            (a, *_, said), (b, *_, again) = ends
            assert a.messages == b.messages and said == again
            assert np.abs(np.asarray(a.image, dtype=int) - np.asarray(b.image, dtype=int)).max() <= 4  # JPEG
            reply = written.expert_reply()
            ends = [env.step(reply) for env in (written, read)]
        assert read.done == written.done
    read.reset(options={"route": 0})
    point = next(w for w in read.waypoints if w.action == "forward()")  # between two turning points
    (tmp_path / "street_views" / f"{read.world.panoramas[point.geocode]}.jpg").unlink()
    capsys.readouterr()
    command = [
        "play",
        "--task",
        "virl-vl",
        "--data",
        str(tmp_path),
        "--route",
        "0",
        "--drop",
        "0",
        "--view-size",
        "32",
    ]
    with pytest.warns(UserWarning, match=r"street_views: 1 of \d+ panoramas"):
        assert sftrl.main([*command, "--reply", read.expert_reply()]) == 0
    said = capsys.readouterr()
    assert "[correct +1]" in said.out
    assert not said.err
    file = tmp_path / "street_views" / f"{read.world.panoramas[read.waypoints[0].geocode]}.jpg"
    file.write_bytes(b"no picture")
    assert sftrl.main(command) == 2
    assert file.name in (said := capsys.readouterr().err) and said.count("\n") == 1
    file.unlink()  # now the next panorama stands in
    with pytest.warns(UserWarning, match=r"street_views: 2 of \d+ panoramas"):
        assert sftrl.main(command) == 0


def test_evaluation_on_streets_saves_the_pictures_of_its_transcripts_and_takes_controls(tmp_path, capsys):
    streets = ["--task", "virl-vl", "--turns", "1", "--points-per-leg", "0", "--view-size", "16"]
    evaluation = [
        "evaluate",
        "--model",
        "tiny-streets",
        *streets,
        "--episodes",
        "2",
        "--max-new-tokens",
        "2",
        "--transcripts",
        "1",
    ]
    results = []
    for more in (
        ["--save", str(tmp_path / "pictures")],
        ["--pictures", "blank"],
        ["--pictures", "shuffled"],
        ["--variant", "visual"],
    ):
        assert sftrl.main([*evaluation, *more]) == 0
        results.append(capsys.readouterr().out)
        assert '"step_accuracy"' in results[-1] and '"recognition"' in results[-1]
    env = envs.make("virl-vl", turns=1, points_per_leg=0, view_size=16, continue_after_failure=True)
    observation, _ = env.reset("test/0", {"route": 0})
    pictures = sorted((tmp_path / "pictures" / "0").glob("*.png"), key=lambda path: int(path.stem))
    assert len(pictures) == env.decisions and not (tmp_path / "pictures" / "1").exists()
    assert np.array_equal(Image.open(pictures[0]), observation.image)
    assert sftrl.main(["evaluate", "--model", "tiny", "--episodes", "2", "--pictures", "blank"]) == 2
    assert (
        sftrl.main(["evaluate", "--model", "tiny", "--episodes", "2", "--save", str(tmp_path)]) == 2
        and "no pictures" in capsys.readouterr().err
    )
    other = (
        "data",
        "--task",
        "virl-l",
        "--turns",
        1,
        "--seed",
        4,
        "--episodes",
        3,
        "--out",
        tmp_path / "other",
    )
    assert inside(*other) == 0
    read = envs.load_world(tmp_path / "other").routes
    assert read == envs.built_in_world("train", 1, (("new york", 4000),), 3).routes


def test_play_shows_the_next_street_view_as_a_place_in_the_text(capsys):
    env = envs.make("virl-vl", drop=1.0, view_size=16)
    env.reset(options={"route": 5})
    args = [
        "play",
        "--task",
        "virl-vl",
        "--route",
        "5",
        "--drop",
        "1",
        "--view-size",
        "16",
        "--reply",
        env.expert_reply(),
        "--reply",
        "x",
    ]
    assert sftrl.main(args) == 0
    said = capsys.readouterr().out
    assert (
        "verifier: [correct +1] <image>\nYou are at an intersection." in said
        and "Try again." in said
        and "{'type'" not in said
    )


def test_play_shows_prompt_expert_and_verdict(capsys):
    assert inside("play", "--cards", "A 3 K 10", "--reply", "hello") == 0
    out = capsys.readouterr().out
    assert "A, 3, K, 10" in out and '"formula": "10+10+3+1=24"' in out and "[unparsed -3]" in out
    assert inside("play", "--model", "tiny", "--max-new-tokens", 5) == 0
    assert "verifier: [" in capsys.readouterr().out


def test_a_prompt_of_ones_own_states_the_cards(tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfCards: $cards_list. $rule")
    assert inside("play", "--cards", "A 3 K 10", "--prompt", file) == 0
    out, err = capsys.readouterr()
    assert "user: Cards: ['A', '3', 'K', '10']. J is 10, Q is 10, K is 10\n" in out and not err
    file.write_text("Make $target. $rule")
    assert inside("play", "--task", "gp-vl", "--size", 64, 32, "--prompt", file) == 0
    assert inside("play", "--prompt", file) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("sftrl: error: the prompt template states the cards nowhere")
        and error.count("\n") == 1
    )
    file.write_text("Cards: $cards")  # and may leave out the rule
    assert inside("play", "--cards", "A 3 K 10", "--prompt", file) == 0
    assert capsys.readouterr() == (out.replace(out.split("\n")[0], "user: Cards: A, 3, K, 10"), "")


@pytest.mark.parametrize(
    "args, words",
    [
        (("study", "--task", "chess"), "chess"),
        (("study", "--seeds", "0"), "--seeds"),
        (("ppo", "--out", "x", "--nope"), "--nope"),
        (("ppo",), "--out"),
        (("nothing",), "nothing"),
        (("ppo", "--out", "x", "--task", "chess"), "unknown task"),
        (("ppo", "--out", "x", "--variant", "odd"), "unknown variant"),
        (("ppo", "--out", "x", "--ratio", "odd"), "--ratio"),
        (("ppo", "--out", "x", "--lr", "fast"), "--lr"),
        (("ppo", "--out", "x", "--lr", "nan"), "--lr"),
        (("ppo", "--out", "x", "--temperature", "0"), "--temperature"),
        (("ppo", "--out", "x", "--gamma", "1.1"), "--gamma"),
        (("ppo", "--out", "x", "--seed", "99999999999999999999"), "--seed"),
        (("sft", "--out", "x", "--flops", "0"), "--flops"),
        (("study", "--scale", "-1"), "--scale"),
        (("study", "--rates", "rl=0"), "--rates rl=0"),
        (("study", "--rates", "odd=1"), "--rates odd=1"),
        (("play", "--threads", "-1"), "--threads"),
        (("evaluate", "--model", "tiny", "--temperature", "-1"), "--temperature"),
        (("ppo", "--out", "x", "--model", "missing"), "missing"),
        (("sft", "--out", "x", "--demos", "missing.json"), "missing.json"),
        (("ppo", "--out", "x", "--task", "gp-l", "--color", "red"), "--color"),
        (("play", "--task", "gp-vl", "--color", "blue"), "unknown color 'blue'"),
        (("play", "--task", "gp-vl", "--size", "8", "64"), "size must be at least 32"),
        (("play", "--task", "virl-l", "--split", "all"), "unknown split"),
        (("play", "--task", "virl-l", "--turns", "8"), "at most 7"),
        (("play", "--task", "virl-l", "--drop", "x"), "--drop"),
        (("play", "--rewards", "odd=1"), "unknown reward 'odd'"),
        (("play", "--rewards", "correct"), "--rewards"),
        (("play", "--rewards", "correct=nan"), "finite"),
        (("play", "--task", "missing.py:World"), "missing.py"),
        (("play", "--task", "setup.cfg:World"), "unknown task"),
        (("sft", "--out", "x", "--wrong-turns", "9"), "9 wrong turns leave no reply"),
        (("data", "--out", "x", "--wrong-turns", "-1"), "--wrong-turns"),
        (("evaluate", "--model", "tiny", "--prompt", "missing.txt"), "missing.txt"),
        (("play", "--cards", "A A A A"), "cannot make"),
        (("play", "--save", "x.png"), "no picture"),
        (("data", "--out", "/nonexistent/x.json"), "/nonexistent"),
    ],
)
def test_a_wrong_value_is_one_line_and_status_2(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = status_of(args)
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.startswith("sftrl: error: ") and error.count("\n") == 1
    assert not (tmp_path / "x").exists()  # or a corrected command would be refused


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def without_a_layer(file):
    weights = {name: w for name, w in load_file(file).items() if "layers.1." not in name}
    save_file(weights, file, metadata={"format": "pt"})


def smaller_vocabulary(folder, weights_too):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 500
    (folder / "config.json").write_text(json.dumps(config))
    if weights_too:
        weights = load_file(folder / "model.safetensors")
        save_file(
            {
                name: w[:500].clone() if "embed" in name and "language" in name else w
                for name, w in weights.items()
            },
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )


def adapter(folder, whole):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    if not whole:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def set_in(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CODE = {"model_type": "odd", "auto_map": {"AutoConfig": "code.Config"}}
DAMAGES = {
    "cut short": (lambda d: cut(d / "model.safetensors", 100_000), "cannot be loaded"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
    "a layer missing": (lambda d: without_a_layer(d / "model.safetensors"), "of its weights are missing"),
    "other shapes": (lambda d: smaller_vocabulary(d, False), "of another shape than its config.json says"),
    "vocabularies differ": (lambda d: smaller_vocabulary(d, True), "its vocabulary 500"),
    "an adapter": (lambda d: adapter(d, whole=False), "merge it into its base model"),
    "an adapter beside a model": (lambda d: adapter(d, whole=True), "merge it into its base model"),
    "code of its own": (lambda d: set_in(d / "config.json", **CODE), "a model that transformers has"),
    "no config": (lambda d: (d / "config.json").unlink(), "model_type"),
    "half a config": (lambda d: cut(d / "config.json", 50), "not a valid JSON file"),
    "half a tokenizer": (lambda d: cut(d / "tokenizer.json", 500), "cannot be loaded"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer"),
    "no processor": (lambda d: (d / "processor_config.json").unlink(), "image processor"),
    "no chat template": (lambda d: (d / "chat_template.jinja").unlink(), "chat_template.jinja"),
    "half a value head": (
        lambda d: cut(d / "value_head.safetensors", 500),
        "value_head.safetensors cannot be loaded",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "good"
    sftrl.Policy.load("tiny").save(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_and_status_2(damage, checkpoint, tmp_path, capsys):
    harm, words = DAMAGES[damage]
    shutil.copytree(checkpoint, tmp_path / "bad")
    harm(tmp_path / "bad")
    assert (
        inside("sft", "--model", tmp_path / "bad", "--out", tmp_path / "run", "--steps", 1, "--batch-size", 2)
        == 2
    )
    error = capsys.readouterr().err
    assert words in error and error.startswith("sftrl: error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_processor_without_patch_size_is_refused_where_pictures_are_to_be_read(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "bad")
    set_in(tmp_path / "bad" / "processor_config.json", patch_size=None)
    with pytest.raises(ValueError, match='bad.*add "patch_size" to processor_config.json'):
        sftrl.Policy.load(str(tmp_path / "bad"), pictures=True)
    sftrl.Policy.load(str(tmp_path / "bad"))


def test_a_damaged_resume_state_is_one_line_and_status_2(tmp_path, capsys):
    args = ("sft", "--out", tmp_path, "--batch-size", 2, "--steps", 2, "--checkpoints", 1)
    assert inside(*args) == 0
    sftrl.remove(sftrl.checkpoints(tmp_path)[-1])
    state = torch.load(tmp_path / "resume.pt")
    for damage in ("an old format", "cut short"):
        if damage == "an old format":
            torch.save(
                {"model": state["tensors"], "optimizer": {}, "step": 2, "flops": 1.0}, tmp_path / "resume.pt"
            )
        else:
            cut(tmp_path / "resume.pt", 5000)
        capsys.readouterr()
        assert inside(*args) == 2
        error = capsys.readouterr().err
        assert "resume.pt cannot be read" in error and error.startswith("sftrl: error: ")
        assert error.count("\n") == 1


def commands_of(task):
    parser = sftrl.build_parser(task)
    (commands,) = [a for a in parser._actions if a.dest == "command"]
    return commands.choices


@pytest.mark.parametrize("task", envs.TASKS)
def test_every_option_has_a_help_text(task):
    assert set(commands_of(task)) == {"study", "sft", "ppo", "evaluate", "play", "data"}
    for command in commands_of(task).values():
        assert all(action.help for action in command._actions)
        command.format_help()


def test_help_shows_the_options_of_the_task_alone_with_defaults_and_limits(capsys):
    shown = {}
    for task in envs.TASKS:
        with pytest.raises(SystemExit) as stop:
            sftrl.main(["ppo", "--task", task, "--help"])
        assert stop.value.code == 0
        shown[task] = " ".join(capsys.readouterr().out.split())
        for name in envs.options_of(envs.TASKS[task]):
            assert f"--{name.replace('_', '-')} " in shown[task]
    own = {"--target": {"gp-l", "gp-vl"}, "--size": {"gp-vl"}, "--turns": {"virl-l", "virl-vl"}}
    own |= {"--view-size": {"virl-vl"}, "wrong_value=-1": {"gp-l", "gp-vl"}, "misread=-1.5": {"gp-vl"}}
    for option, tasks in own.items():
        assert {task for task, text in shown.items() if option in text} == tasks
    assert "most turning points of a built-in route, at least 1 and at most 7 (default: 7)" in shown["virl-l"]
    assert (
        "train, valid, test (default: train)" in shown["virl-vl"] and "(default: 1200 480)" in shown["gp-vl"]
    )


def test_rewards_are_given_on_the_command_line_and_stand_in_the_runs_config(tmp_path, capsys):
    reply = json.dumps({"cards": [], "number": [1, 3, 10, 10], "formula": "10+10+3-1"})
    hand = ("play", "--cards", "A 3 K 10", "--reply", reply, "--verify-iter", 1)
    assert inside(*hand, "--rewards", "wrong_value=0.5", "budget=-2") == 0
    assert "[wrong_value -1.5]" in capsys.readouterr().out
    assert inside(*hand) == 0 and "[wrong_value -2]" in capsys.readouterr().out
    small = ("--episodes", 4, "--minibatch-size", 4, "--steps", 1, "--max-new-tokens", 4, "--verify-iter", 1)
    assert inside("ppo", "--out", tmp_path / "run", *small, "--rewards", "unparsed=-7", "illegal=-7") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert config["rewards"] == {"unparsed": -7, "illegal": -7}
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert metrics["reward/unparsed"] == -8 * metrics["share/unparsed"] != 0
