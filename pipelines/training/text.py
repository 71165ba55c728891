"""Text: frozen random encoders behind a word-level tokenizer; enough to tell a few hundred captions apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 64  # channels of a token


def build_tokenizer(captions: Sequence[str], length: int) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of the captions; unknown words become <unk>."""
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^a-z\-]+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=length,
    )


def build_clip(
    vocabulary: int, length: int, width: int = WIDTH, projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Frozen random CLIP, from torch's seed. `initializer_factor` 20 spreads its pooled outputs far enough apart."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        initializer_factor=20.0,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,  # 2 would select CLIP's legacy pooling at the largest token id
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def build_t5(vocabulary: int, multilingual: bool = False) -> T5EncoderModel | UMT5EncoderModel:
    """Frozen random T5 (or UMT5, which Wan uses). Draws from torch's seed."""
    kind, config = (UMT5EncoderModel, UMT5Config) if multilingual else (T5EncoderModel, T5Config)
    return kind(
        config(
            vocab_size=vocabulary,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=3,
        )
    ).eval()


def seeded(seed: int = 0) -> None:
    """Frozen parts are the same whatever the training seed is."""
    torch.manual_seed(seed)
