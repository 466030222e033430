"""Tiny randomly initialised Hugging Face models, as their configuration builds them: attention left at its default,
training mode, dropout where the architecture has it. Nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from judge import (
    BFLOAT16,
    FLOAT32_TINY,
    MUS,
    PLAIN_MU,
    WideCGE,
    autograd,
    judge,
    plain_quotients,
    sampled,
    tolerance,
)

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, ROWS, LABELS = 40, 6, 2, 3
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32}


def ints(high: int, *size: int, seed: int = 0) -> Tensor:
    return torch.randint(high, size, generator=torch.Generator().manual_seed(seed))


def tokens(length: int = LENGTH, seed: int = 0) -> Tensor:
    """Ids from 4 up: the first few are padding and other special tokens."""
    return 4 + ints(VOCABULARY - 4, ROWS, length, seed=seed)


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def padded() -> Tensor:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, -2:] = 0
    return mask


def classifier(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = getattr(transformers, f"{name}Config")(num_labels=LABELS, **options)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return model, {"input_ids": tokens(), "attention_mask": padded(), "labels": ints(LABELS, ROWS, seed=1)}


def causal(name: str, suffix: str = "ForCausalLM", **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = getattr(transformers, f"{name}Config")(pad_token_id=0, bos_token_id=1, eos_token_id=2, **options)
    model = getattr(transformers, f"{name}{suffix}")(config)
    return model, {"input_ids": tokens(), "labels": tokens()}


def images(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = getattr(transformers, f"{name}Config")(num_labels=LABELS, **options)
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    return model, {"pixel_values": normal(ROWS, 3, 32, 32), "labels": ints(LABELS, ROWS, seed=1)}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    return model, {"input_ids": tokens(), "attention_mask": padded(), "labels": tokens(5, seed=1)}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        dropout=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"input_features": normal(ROWS, 8, 20), "labels": tokens(5)}


LLAMA = TEXT | {"num_key_value_heads": 1}

ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "bert": lambda: classifier("Bert", **TEXT),
    "roberta": lambda: classifier("Roberta", **TEXT, pad_token_id=1),
    "distilbert": lambda: classifier(
        "DistilBert", vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32
    ),
    "gpt2": lambda: causal(
        "GPT2", "LMHeadModel", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32
    ),
    "opt": lambda: causal(
        "OPT",
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    ),
    "llama": lambda: causal("Llama", **LLAMA),
    "mistral": lambda: causal("Mistral", **LLAMA, sliding_window=4),
    "qwen2": lambda: causal("Qwen2", **LLAMA),
    "t5": t5,
    "vit": lambda: images(
        "ViT", **{k: TEXT[k] for k in list(TEXT)[:4]}, image_size=32, patch_size=16, hidden_dropout_prob=0.1
    ),
    "resnet": lambda: images(
        "ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=3
    ),
    "convnext": lambda: images(
        "ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, drop_path_rate=0.5, layer_scale_init_value=0.1
    ),
    "whisper": whisper,
}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


@functools.cache
def references(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], dict[float, dict[str, Tensor]]]:
    """Model, batch, sampled coordinates, and quotients by step: plain float64, below 1e-4 propagated in float64."""
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[name]()
    model.train()
    mask = sampled(model, loss, batch, 1)
    found = {mu: plain_quotients(model, loss, batch, mask, mu) for mu in MUS if mu >= PLAIN_MU}
    wide = WideCGE(model, loss, precision="float64", strict=True)
    for mu in MUS:
        if mu < PLAIN_MU:
            wide.mu = mu
            found[mu] = wide.estimate(batch, mask).grads
    return model, batch, mask, found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_op_has_a_rule_and_every_quotient_is_exact(name):
    """strict=True: no op falls back. Tied embeddings, causal and padding masks, rotary positions, dropout and all."""
    model, batch, mask, found = references(name)
    assert mask.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    slope = autograd(model, loss, batch, mask)
    for precision in ("float32", "bfloat16"):
        estimator = WideCGE(model, loss, precision=precision, strict=True)
        for mu, wanted in found.items():
            estimator.mu = mu
            got = estimator.estimate(batch, mask).grads
            judge(got, wanted).check(tolerance(precision, mu))
        judge(got, slope).check(FLOAT32_TINY if precision == "float32" else BFLOAT16)


def test_dropout_is_on_where_the_architecture_has_it():
    """Random states give different losses: the models above really are in training mode."""
    quiet = []
    for name in ARCHITECTURES:
        model, batch, _, _ = references(name)
        seen = set()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for seed in range(8):
                torch.manual_seed(seed)
                seen.add(float(loss(model, batch)))
        if len(seen) == 1:
            quiet.append(name)
    assert quiet == ["llama", "mistral", "qwen2", "resnet"]
