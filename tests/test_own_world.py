"""A new world is one class in one file, and every command works with it."""

import json
from typing import Annotated

import pytest
from conftest import chat_tokenizer, random_model
from PIL import Image

import envs
import sft
import sftrl

WORLD = '''
from typing import Annotated

import envs


class Backwards(envs.Environment):
    """Spell a word backwards."""

    variants = {"id": "in distribution", "rule": "on capitals"}
    rewards = {"correct": 2.0, "wrong": -0.5, "unparsed": -1.0, "budget": -1.0}
    answer_field = "answer"

    letters: Annotated[int, envs.Option("letters of a word", least=2, most=9)] = 3

    def begin(self, options):
        alphabet = "abc" if self.variant == "id" else "ABC"
        self.word = options.get("word") or "".join(self.random.choices(alphabet, k=self.letters))
        return f'Spell {self.word} backwards: {{"answer": "..."}}'

    def judge(self, reply):
        parsed = envs.parse_reply(reply, ["answer"])
        if not parsed:
            return envs.Verdict("unparsed", "That is no answer.")
        if parsed["answer"] != self.word[::-1]:
            return envs.Verdict("wrong", "No. Try again.")
        return envs.Verdict("correct", "Yes.", True)

    def expert_reply(self):
        return f'{{"answer": "{self.word[::-1]}"}}'

    def wrong_reply(self):
        return f'{{"answer": "{self.word}!"}}'
'''


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The file, and the working directory that holds it."""
    assert len(WORLD.partition("class ")[2].splitlines()) <= 40
    (tmp_path / "backwards.py").write_text(WORLD)
    monkeypatch.chdir(tmp_path)
    return "backwards.py:Backwards"


def run(*args):
    return sftrl.main([str(arg) for arg in args])


def test_in_python(task, tmp_path):
    env = envs.make(task, "rule", seed=3, verify_iter=2, letters=4, rewards={"wrong": 0})
    observation, info = env.reset(options={"word": "CAAB"})
    prompt = {"role": "user", "content": 'Spell CAAB backwards: {"answer": "..."}'}
    assert observation.messages == [prompt] and observation.image is None and info["verdict"] is None
    observation, *judgement, info = env.step(env.wrong_reply())
    assert judgement == [0, False, False] and info["verdict"] == "wrong"
    reply, feedback = '{"answer": "CAAB!"}', {"role": "user", "content": "No. Try again."}
    assert observation.messages == [prompt, {"role": "assistant", "content": reply}, feedback]
    observation, *judgement, _ = env.step("?")
    assert judgement == [-2, False, True] and observation.messages[-1]["content"] == "?"
    after, *judgement, _ = env.step(env.expert_reply())  # after the end
    assert judgement == [0, False, True] and after.messages == observation.messages
    after.messages[0]["content"] = "changed by the caller"
    assert env.observe().messages == observation.messages
    env.reset(seed=1)
    assert env.step(env.expert_reply())[1:4] == (2, True, False)
    record = envs.demonstration(envs.make(task), wrong_turns=2)
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * 3
    with pytest.raises(ValueError, match="leave no reply"):
        envs.demonstration(env, wrong_turns=2)
    lengths = [len(sft.imperfect_demonstration(env)["conversations"]) for _ in range(60)]
    assert lengths.count(2) > 30 and max(lengths) == 4
    again = envs.make(task, seed=7), envs.make(f"{tmp_path}/backwards.py:Backwards", seed=7)
    assert again[0].reset()[0] == again[1].reset()[0] and again[0].rewards["wrong"] == -0.5
    for wrong in ({"letters": 1}, {"letters": "x"}, {"odd": 1}, {"rewards": {"odd": 1}}, {"variant": "x"}):
        with pytest.raises(ValueError):
            envs.make(task, **wrong)
    del env.rewards["unparsed"]
    env.reset()
    with pytest.raises(ValueError, match="Backwards has no reward for 'unparsed'"):
        env.step("?")


def test_every_command(task, tmp_path, capsys):
    assert run("play", "--task", task, "--letters", 5, "--reply", "?", "--rewards", "unparsed=-3") == 0
    out = capsys.readouterr().out
    assert "expert: {" in out and "[unparsed -3] That is no answer." in out
    with pytest.raises(SystemExit):
        run("ppo", "--task", task, "--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "letters of a word, at least 2 and at most 9 (default: 3)" in out and "--target" not in out
    assert run("data", "--task", task, "--out", "demos.json", "--episodes", 8, "--wrong-turns", 1) == 0
    small = ("--task", task, "--model", "tiny", "--steps", 2)
    assert run("sft", *small, "--out", "demos", "--batch-size", 4, "--demos", "demos.json") == 0
    assert run("sft", *small, "--out", "sft", "--batch-size", 4, "--wrong-turns", 1) == 0
    rollout = ("--episodes", 8, "--minibatch-size", 8, "--max-new-tokens", 8, "--ratio", "reply")
    assert run("ppo", *small, "--out", "ppo", *rollout, "--verify-iter", 2, "--letters", 2) == 0
    config = json.loads((tmp_path / "ppo" / "config.json").read_text())["settings"]
    assert config["task"] == f"{tmp_path}/backwards.py:Backwards"
    assert (config["letters"], config["verify_iter"]) == (2, 2)
    metrics = sftrl.read_lines(tmp_path / "ppo" / "metrics.jsonl")[-1]
    assert {"reward/correct", "reward/wrong", "share/unparsed"} <= metrics.keys()
    options = ("--episodes", 6, "--max-new-tokens", 8, "--transcripts", 1, "--variant", "rule", "--out", "e")
    assert run("evaluate", "--task", task, "--model", "ppo/checkpoint-2", *options) == 0
    assert "user: Spell" in capsys.readouterr().out
    result = json.loads((tmp_path / "e" / "result.json").read_text())
    assert result["episodes"] == 6 and set(result["verdicts"]) == {"correct", "wrong", "unparsed"}
    transcripts = sftrl.read_lines(tmp_path / "e" / "transcripts.jsonl")
    assert len(transcripts) == 6 and all(t["prompt"].startswith("Spell") and t["turns"] for t in transcripts)
    assert run("play", "--task", task, "--model", "sft/checkpoint-2", "--max-new-tokens", 8) == 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("backwards.py:Nothing", "no class 'Nothing'"),
        ("backwards.py:envs", "no class 'envs'"),
        ("broken.py:World", "cannot be loaded: SyntaxError"),
        ("missing.py:World", "cannot be loaded: FileNotFoundError"),
        ("backwards:Backwards", "unknown task"),
        ("taken.py:Taken", "conflicting option string: --seed"),
    ],
)
def test_unusable_classes_are_refused_in_one_line(task, tmp_path, capsys, name, words):
    (tmp_path / "broken.py").write_text("class")
    taken = WORLD.replace("Backwards", "Taken").replace("letters:", "seed:").replace("self.letters", "3")
    (tmp_path / "taken.py").write_text(taken)
    assert run("play", "--task", name) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


class Countdown(envs.Environment):
    """Name the numbers from n down to 1, one after another, each as a picture shows it."""

    rewards = {"correct": 1.0, "wrong": -1.0, "budget": -5.0}
    pictures = True
    verify_iter = 2
    decisions = 3
    size: Annotated[int, envs.Option("pixels", least=1)] = 4

    def begin(self, options):
        return "Count down."

    def draw(self):
        return Image.new("L", (self.size, self.size), self.decisions - self.decision)

    def judge(self, reply):
        right = reply == self.expert_reply()
        return envs.Verdict("correct" if right else "wrong", "Yes." if right else "No.", right)

    def expert_reply(self):
        return str(self.decisions - self.decision)

    def wrong_reply(self):
        return "zero"


@pytest.mark.parametrize("go_on", [False, True])
def test_several_decisions_each_with_its_budget_and_its_picture(go_on):
    env = Countdown(continue_after_failure=go_on, size=2)
    observation, _ = env.reset()
    assert observation.image.getpixel((0, 0)) == 3 and observation.image.size == (2, 2)
    observation, reward, _, _, info = env.step("3")
    assert (reward, info["decision"], observation.image.getpixel((0, 0))) == (1, 0, 2)
    texts = [envs.text_of(m["content"]) for m in observation.messages]
    assert texts == ["Count down.", "3", "<image>\nYes."]
    again = env.step("zero")[0]
    assert again.image is observation.image and again.messages[-1]["content"] == "No."
    observation, *judgement, info = env.step("zero")
    assert judgement == [-6, False, not go_on] and info["decision"] == 1
    if go_on:  # led on to the last number; the episode counts as failed
        assert observation.image.getpixel((0, 0)) == 1 and env.decision == 2
        assert env.step("1")[1:4] == (1, False, True)
    (episode,) = envs.play([env], lambda indices, observations: [env.expert_reply()])
    assert episode.success and [turn.decision for turn in episode.turns] == [0, 1, 2]
    pictures = {envs.demonstration(env)["image"].getpixel((0, 0)) for _ in range(40)}
    assert pictures == {1, 2, 3}
    record = sft.imperfect_demonstration(env)
    assert record["conversations"][-1]["from"] == "gpt" and record["image"].size == (2, 2)
    fresh = env.fresh_copy()
    env.reset(), fresh.reset(), fresh.step("x")
    assert (env.attempts, fresh.attempts, fresh.size) == (0, 1, 2) and fresh.random is not env.random


def test_a_study_needs_a_model_and_writes_a_report(task, tmp_path, capsys):
    study = ("study", "--task", task, "--out", "study", "--seeds", 1, "--hands", 2, "--scale", 0.001)
    assert run(*study) == 2
    assert "the tiny model has no study of" in capsys.readouterr().err
    tokenizer = chat_tokenizer(eos_token="<|end|>", pad_token="<|im_end|>")
    model = random_model("llama", tokenizer)
    model.generation_config.eos_token_id = list(range(20, len(tokenizer)))
    model.save_pretrained("base"), tokenizer.save_pretrained("base")
    assert run(*study, "--model", "base", "--rates", "sft=1e-3") == 0
    lines = sftrl.read_lines(tmp_path / "study" / "results.jsonl")
    arms = {(p["arm"], p["variant"]) for p in lines}
    assert arms >= {(arm, v) for arm in ("base", "init", "sft", "rl") for v in ("id", "rule")}
    report = (tmp_path / "study" / "report.md").read_text()
    assert "| RL ends above init on capitals |" in report and "on the same 2 evaluation episodes" in report
    configs = ((tmp_path / f"study/seed-0/{arm}/config.json").read_text() for arm in ("init", "sft", "rl"))
    assert [json.loads(config)["settings"]["lr"] for config in configs] == [1e-5, 1e-3, 1e-6]
