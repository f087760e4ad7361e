"""What the tests share: small policies, built offline, in fp32."""

import copy
import sys
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sftrl  # noqa: E402


SMALL = {"size": (96, 48), "font_size": 0.36}  # pictures of gp-vl that cost little

_trained = lru_cache(maxsize=None)(sftrl.build_tokenizer)  # training one takes longer than most tests
sftrl.build_tokenizer = lambda *args: copy.deepcopy(_trained(*args))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run with `pytest -m slow`")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with `pytest -m slow`"))


def tokenizer_with(*special):
    """The tiny tokenizer with more special tokens, and their ids."""
    tokenizer = sftrl.build_tokenizer()
    more = {"additional_special_tokens": list(special)}
    tokenizer.add_special_tokens(more, replace_extra_special_tokens=False)
    return tokenizer, tokenizer.convert_tokens_to_ids(list(special))


def text_config(tokenizer, **settings):
    """Of a small random language model."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    } | settings


def tiny_llama():
    tokenizer = sftrl.build_tokenizer()
    config = transformers.LlamaConfig(**text_config(tokenizer, initializer_range=0.2))
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config), tokenizer


def put_before(core, token):
    """Lets a tokenizer write its first token before a text."""
    options = {"single": f"{token} $A", "pair": f"{token} $A $B", "special_tokens": [(token, 0)]}
    core.post_processor = processors.TemplateProcessing(**options)


def tiny_mllama():
    """The paper's architecture: cross-attention layers 1 and 3, gates opened; its image token lies beyond the
    output head, and a picture is cut into tiles."""
    configs = transformers.models.mllama.configuration_mllama
    tokenizer, (image,) = tokenizer_with("<|image|>")
    vision = configs.MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=4,
        image_size=32,
        patch_size=16,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=96,
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        max_num_tiles=2,
    )
    # Initialized at 0.2, logits reach 50, where fp32 itself rounds by more than 1e-5.
    layers = {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    text = configs.MllamaTextConfig(**text_config(tokenizer, vocab_size=image, bos_token_id=0, **layers))
    torch.manual_seed(2)
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)
    model = transformers.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name:
                p.fill_(0.5)
    tokenizer.bos_token = "<|pad|>"  # as Llama's, which puts it before a text
    put_before(tokenizer.backend_tokenizer, "<|pad|>")
    images = transformers.MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=2)
    template = sftrl.CHAT_TEMPLATE.replace("<image>", "<|image|>")
    return model, transformers.MllamaProcessor(images, tokenizer, chat_template=template)


class QwenProcessor:
    """The library's for pictures, where torchvision is missing, which it needs for videos."""

    def __init__(self, images, tokenizer, chat_template):
        self.images, self.tokenizer, self.chat_template = images, tokenizer, chat_template

    def apply_chat_template(self, messages, **options):
        return self.tokenizer.apply_chat_template(messages, **options)

    def __call__(self, text, images, **options):
        out = self.images([image for (image,) in images], return_tensors="pt")
        text = [
            t.replace("<|image_pad|>", "<|image_pad|>" * int(grid.prod() // 4))
            for t, grid in zip(text, out["image_grid_thw"])
        ]
        out |= self.tokenizer(text, **options)
        image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return out | {"mm_token_type_ids": (out["input_ids"] == image_id).int()}


def tiny_qwen(family="Qwen2_5_VL"):
    """Qwen2.5-VL, or Qwen2VL: all patches of a batch in one row, positions of three coordinates."""
    tokenizer, (image, video) = tokenizer_with("<|image_pad|>", "<|video_pad|>")
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2}
    if family == "Qwen2VL":
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    else:
        vision |= {"intermediate_size": 64, "out_hidden_size": 32, "window_size": 32}
        vision |= {"fullatt_block_indexes": [1]}
    config = getattr(transformers, family + "Config")(
        text_config=text_config(tokenizer, rope_parameters=rope),
        vision_config=vision | {"initializer_range": 0.2},
        image_token_id=image,
        video_token_id=video,
    )
    torch.manual_seed(3)
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=48 * 48
    )
    template = sftrl.CHAT_TEMPLATE.replace("<image>", "<|image_pad|>")
    try:
        processor = getattr(transformers, family + "Processor")(
            images, tokenizer, transformers.Qwen2VLVideoProcessor(), chat_template=template
        )
    except ImportError:
        processor = QwenProcessor(images, tokenizer, template)
    return getattr(transformers, family + "ForConditionalGeneration")(config), processor


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def chat_tokenizer(
    template=CHATML, special=("<|end|>", "<|im_start|>", "<|im_end|>"), plain=(), bos=False, **named
):
    """`special` tokens are so in the tokenizer's own file alone, `plain` ones are not special, the library
    knows the `named` ones; `bos`: the first token stands before a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(sftrl.card_texts()[:200], trainer)
    core.add_tokens([AddedToken(token, special=False) for token in plain])
    if bos:
        put_before(core, special[0])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **named)


def random_model(architecture, tokenizer, **settings):
    """A small random language model; many tokens end its replies, so that their lengths differ."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 4096}
    usual = text_config(tokenizer, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **usual | settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = list(range(300, 360))
    return model


def tiny_llava_1_5():
    """Llava-1.5's kind: plain text between the turns, a BOS that the template lacks."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = chat_tokenizer(VICUNA, ("<s>", "</s>", "<image>", "<pad>"), bos=True, **named)
    model, processor = sftrl.build_tiny()
    config = model.config
    config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size, config.text_config.initializer_range = len(tokenizer), 0.2
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    return model, transformers.LlavaProcessor(
        processor.image_processor,
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 8}


def tiny_gemma3():
    """Image tokens see each other both ways (token_type_ids)."""
    names = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
    tokenizer, (image, start, end) = tokenizer_with(*names)
    tokenizer.image_token, tokenizer.boi_token, tokenizer.eoi_token = names
    tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id = image, start, end
    config = transformers.Gemma3Config(
        text_config=text_config(tokenizer, head_dim=8, sliding_window=64),
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=start,
        eoi_token_index=end,
    )
    torch.manual_seed(4)
    images = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    template = sftrl.CHAT_TEMPLATE.replace("<image>", "<start_of_image>")
    processor = transformers.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    return transformers.Gemma3ForConditionalGeneration(config), processor


def tiny_idefics3():
    """A picture is cut into tiles, with a mask of their pixels."""
    tiles = [f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)]
    marks = "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"
    tokenizer, (image, *_) = tokenizer_with("<image>", *marks, *tiles)
    config = transformers.Idefics3Config(
        text_config=text_config(tokenizer, model_type="llama"),
        vision_config=VISION,
        scale_factor=2,
        image_token_id=image,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(5)
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    processor = transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=sftrl.CHAT_TEMPLATE
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def tiny_llava_next():
    """A picture is cut into as many tiles as its size (image_sizes) asks for."""
    tokenizer, (image,) = tokenizer_with("<image>")
    grids = [[32, 64], [64, 32], [64, 64]]
    config = transformers.LlavaNextConfig(
        text_config=text_config(tokenizer, model_type="llama"),
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=image,
        image_grid_pinpoints=grids,
    )
    torch.manual_seed(6)
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grids
    )
    processor = transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=sftrl.CHAT_TEMPLATE,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


SIGHTED = {"llava": sftrl.build_tiny, "mllama": tiny_mllama, "qwen": tiny_qwen}
MORE_SIGHTED = {
    "llava-1.5": tiny_llava_1_5,
    "qwen2-vl": partial(tiny_qwen, "Qwen2VL"),
    "gemma3": tiny_gemma3,
    "idefics3": tiny_idefics3,
    "llava-next": tiny_llava_next,
}
MODELS = {"llava": sftrl.build_tiny, "llama": tiny_llama, "mllama": tiny_mllama}


def make_policy(kind="llava", **options):
    torch.manual_seed(0)
    return sftrl.Policy(*(MODELS | SIGHTED | MORE_SIGHTED)[kind](), rollout_dtype=torch.float32, **options)


@pytest.fixture
def policy():
    """A fresh tiny policy."""
    return make_policy()
