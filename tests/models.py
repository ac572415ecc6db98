"""The four Hugging Face models that are never wrong, at tiny random configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 61


def llama(heads: int = 4, kv_heads: int = 2, **config: Any) -> nn.Module:
    """Two layers with grouped KV heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8 * heads,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=128,
            **config,
        )
    )


def gpt2(**config: Any) -> nn.Module:
    """Two layers; dropout is off unless asked for."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128}
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **silent, **config}))
    model.loss_type = "ForCausalLM"  # else a warning inside the model breaks the graph
    return model


def bert(**config: Any) -> nn.Module:
    """Two layers with the masked-token head."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(
        BertConfig(**{**sizes, **silent, "vocab_size": VOCABULARY, "max_position_embeddings": 128, **config})
    )


def vit(**config: Any) -> nn.Module:
    """Two layers on 36 patches and a class token."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return ViTForImageClassification(
        ViTConfig(**{**sizes, "image_size": 24, "patch_size": 4, "num_labels": 5, **config})
    )


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit}


def inputs_of(name: str, length: int, dtype: torch.dtype = torch.float32, batch: int = 1) -> dict[str, Any]:
    """Inputs with labels, of which one is ignored; no positions, no masks."""
    generator = torch.Generator().manual_seed(length)
    if name == "vit":
        pixels = torch.randn(batch, 3, 24, 24, generator=generator, dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.arange(batch) % 5}
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    labels = ids.clone()
    labels[:, 1] = -100
    return {"input_ids": ids, "labels": labels}


def seeded(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()
