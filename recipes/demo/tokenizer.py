"""The byte-level tokenizer of the demo pairs, trained on their own captions and prompts.

All families share one byte-pair vocabulary and each adds its own special tokens after it, so that a text
model of one family can start another. It encodes any text, but spends few tokens only on our captions. A
timestamp of Qwen3-VL, `<1.2 seconds>`, has six tokens, as it has in the vocabulary of the real checkpoints.
"""

import json
from typing import Any, Final, Literal

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from recipes.demo.captions import PROMPTS, caption_for
from recipes.demo.clips import scene_for, seed_for

Family = Literal["qwen", "llava", "qwen3"]

BASE_VOCABULARY: Final = 600
QWEN_SYSTEM: Final = "You are a helpful assistant."
_SHARED_SPECIALS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_SPECIALS: Final = (
    *_SHARED_SPECIALS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_SPECIALS: Final[dict[str, tuple[str, ...]]] = {
    "qwen": _QWEN_SPECIALS,
    "llava": (*_SHARED_SPECIALS, "<image>", "<video>"),
    "qwen3": _QWEN_SPECIALS,
}
_QWEN_CONTENT: Final = (
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
)
QWEN_TEMPLATE: Final = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    f"{QWEN_SYSTEM}<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    f"{_QWEN_CONTENT}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_TEMPLATE: Final = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    f"{_QWEN_CONTENT}"
    "{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As that of Qwen2.5-VL, but nothing replaces a system prompt that is not given."""
LLAVA_TEMPLATE: Final = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


_TEMPLATES: Final[dict[str, str]] = {
    "qwen": QWEN_TEMPLATE,
    "llava": LLAVA_TEMPLATE,
    "qwen3": QWEN3_TEMPLATE,
}


def train_tokenizer(family: Family, clips: int = 3000) -> Qwen2Tokenizer:
    """Train the vocabulary on captions of training clips and wrap it as the family's tokenizer."""
    blank = Qwen2Tokenizer()
    captions = [caption_for(scene_for(seed_for("train", i))) for i in range(clips)]
    prompts = [f"system\n{QWEN_SYSTEM}\nuser\n{prompt}\nassistant\n" for prompt in PROMPTS] * (clips // 6)
    trained: Tokenizer = blank.backend_tokenizer
    trained.model = models.BPE()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    trained.train_from_iterator([*captions, *prompts], trainer)
    model: dict[str, Any] = json.loads(trained.to_str())["model"]
    return tokenizer_from(model["vocab"], model["merges"], family)


def tokenizer_from(vocabulary: dict[str, int], merges: list[Any], family: Family) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer with this vocabulary and the family's special tokens."""
    specials = _SPECIALS[family]
    kind: Any = Qwen2Tokenizer
    tokenizer: Qwen2Tokenizer = kind(
        vocab=vocabulary,
        merges=[tuple(m) for m in merges],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        model_max_length=32768,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    for name in ("image", "video"):
        token = f"<{name}>" if family == "llava" else f"<|{name}_pad|>"
        setattr(tokenizer, f"{name}_token", token)
    tokenizer.chat_template = _TEMPLATES[family]
    return tokenizer


def token_id(tokenizer: Qwen2Tokenizer, token: str) -> int:
    """Id of one token, which must exist."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found
