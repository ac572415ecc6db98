"""Real models at tiny random configurations: two layers, a width of 32, no dropout, in training mode.

Every Hugging Face model comes with SDPA and, where the library allows, with eager attention; those that have no
attention, or only their own, are called eager. A length is a number of tokens; of an image, its side in pixels, and of
a latent one, in patches. `tests/test_zoo.py` compares them with one device, `tests/commands/coverage.py` prints what of
them ran sharded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from sp_compile import RewrittenGraph

from .equivalence import Step, run_simulated
from .models import VOCABULARY, bert, gpt2, llama, vit

Make = Callable[[str, int], nn.Module]
Inputs = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """One architecture."""

    name: str
    family: str
    make: Make
    """From an attention implementation and a length."""
    inputs: Inputs
    """The keywords of one call, for a length."""
    attentions: tuple[str, ...] = ("sdpa", "eager")
    short: int = 13
    """A length that is quick, and that few numbers of ranks divide."""
    long: int = 130
    """At least 64 tokens a rank on 2 ranks."""
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-6
    """Of the largest value; parts of most models compute in fp32 whatever their dtype is."""
    dynamo: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `torch._dynamo.config` that it is compiled with."""


ZOO: dict[str, Model] = {}


def add(name: str, family: str, make: Make, inputs: Inputs, **rest: Any) -> None:
    ZOO[name] = Model(name, family, make, inputs, **rest)


def build(model: Model, attention: str, length: int) -> nn.Module:
    """The model in training mode, from a fixed seed."""
    torch.manual_seed(0)
    return model.make(attention, length).to(model.dtype).train()


def run_on_ranks(model: Model, module: nn.Module, length: int, parts: int) -> tuple[Step, list[RewrittenGraph]]:
    """One step of `module` on simulated ranks, under the settings of its model."""
    torch.manual_seed(1)
    with torch._dynamo.config.patch(**model.dynamo):
        return run_simulated(module, (), model.inputs(length), parts)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]), dtype=torch.float64)


def tokens(length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def language(length: int) -> dict[str, Any]:
    labels = tokens(length)
    labels[:, 1] = -100
    return {"input_ids": tokens(length), "labels": labels}


# Hugging Face

# The names under which configurations have them.
SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "embedding_size", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "n_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_heads", "n_heads", "n_head"), 4),
    "vocab_size": VOCABULARY,
    **{"pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "use_cache": False,
}
OFF = ("dropout", "pdrop", "layerdrop", "drop_path")


def configured(config: type, attention: str, **own: Any) -> Any:
    """A tiny configuration: the sizes that it knows and has one of, no dropout, and `own`."""
    parameters = inspect.signature(config.__init__).parameters
    known = {name for name, each in parameters.items() if not isinstance(each.default, (list, tuple))}
    known -= {"classifier_dropout"}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    silent = {name: 0.0 for name in known if any(word in name for word in OFF) and parameters[name].default != 0}
    return config(**{**sizes, **silent, "attn_implementation": attention, **own})


def huggingface(name: str, family: str, architecture: str, config: str, inputs: Inputs = language, **own: Any) -> None:
    """Add a model by the names of its class and its configuration; settings may depend on the length."""
    rest = {key: own.pop(key) for key in ("attentions", "dtype", "dynamo", "tolerance", "short", "long") if key in own}

    def make(attention: str, length: int) -> nn.Module:
        sized = {key: value(length) if callable(value) else value for key, value in own.items()}
        model: nn.Module = getattr(transformers, architecture)(
            configured(getattr(transformers, config), attention, **sized)
        )
        return model

    add(name, family, make, inputs, **rest)


def room(length: int) -> int:
    """A number of positions."""
    return max(128, 2 * length)


EAGER: Mapping[str, Any] = {"attentions": ("eager",)}
POSITIONS: Mapping[str, Any] = {"max_position_embeddings": room}
GROUPED: Mapping[str, Any] = {"num_key_value_heads": 2}
EXPERTS: Mapping[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
# grouped_mm, the default of the library, does not run in fp64.
SORTED: Mapping[str, Any] = {
    "num_experts_per_tok": 2,
    "experts_implementation": "grouped_mm",
    "dtype": torch.float32,
    "tolerance": 1e-5,
}

decoder = partial(huggingface, family="decoder")
add("llama", "decoder", lambda a, n: llama(attn_implementation=a, use_cache=False), language)
add("gpt2", "decoder", lambda a, n: gpt2(attn_implementation=a, n_positions=room(n), use_cache=False), language)
decoder("qwen2", architecture="Qwen2ForCausalLM", config="Qwen2Config", **GROUPED)
decoder("qwen3", architecture="Qwen3ForCausalLM", config="Qwen3Config", **GROUPED, head_dim=8)
decoder("mistral", architecture="MistralForCausalLM", config="MistralConfig", **GROUPED, sliding_window=5)
decoder(
    "gemma2", architecture="Gemma2ForCausalLM", config="Gemma2Config", **GROUPED, head_dim=8, sliding_window=5, **EAGER
)
decoder("gpt_neox", architecture="GPTNeoXForCausalLM", config="GPTNeoXConfig")
decoder("phi", architecture="PhiForCausalLM", config="PhiConfig")
decoder("opt", architecture="OPTForCausalLM", config="OPTConfig", **POSITIONS, word_embed_proj_dim=32)
decoder("bloom", architecture="BloomForCausalLM", config="BloomConfig", **EAGER)
decoder("falcon", architecture="FalconForCausalLM", config="FalconConfig", multi_query=True)
decoder("olmo2", architecture="Olmo2ForCausalLM", config="Olmo2Config", **GROUPED)
decoder(
    "gpt_oss",
    architecture="GptOssForCausalLM",
    config="GptOssConfig",
    **GROUPED,
    head_dim=8,
    sliding_window=5,
    num_local_experts=4,
    **SORTED,
    **EAGER,
)

mixture = partial(huggingface, family="mixture of experts")
mixture(
    "mixtral",
    architecture="MixtralForCausalLM",
    config="MixtralConfig",
    **GROUPED,
    num_local_experts=4,
    **SORTED,
)
mixture(
    "qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    config="Qwen3MoeConfig",
    **GROUPED,
    head_dim=8,
    num_experts=4,
    moe_intermediate_size=16,
    decoder_sparse_step=1,
    **SORTED,
)
mixture("olmoe", architecture="OlmoeForCausalLM", config="OlmoeConfig", num_experts=4, **EXPERTS)

state_space = partial(huggingface, family="state-space", **EAGER)
state_space("mamba", architecture="MambaForCausalLM", config="MambaConfig", state_size=4)
state_space(
    "mamba2",
    architecture="Mamba2ForCausalLM",
    config="Mamba2Config",
    state_size=4,
    head_dim=16,
    n_groups=1,
    chunk_size=8,
)
state_space("rwkv", architecture="RwkvForCausalLM", config="RwkvConfig", attention_hidden_size=32)

encoder = partial(huggingface, family="encoder")
add("bert", "encoder", lambda a, n: bert(attn_implementation=a, max_position_embeddings=room(n)), language)
encoder("roberta", architecture="RobertaForMaskedLM", config="RobertaConfig", **POSITIONS)
encoder("distilbert", architecture="DistilBertForMaskedLM", config="DistilBertConfig", **POSITIONS)
encoder("electra", architecture="ElectraForMaskedLM", config="ElectraConfig", **POSITIONS)
encoder("albert", architecture="AlbertForMaskedLM", config="AlbertConfig", **POSITIONS)
encoder(
    "modernbert",
    architecture="ModernBertForMaskedLM",
    config="ModernBertConfig",
    local_attention=8,
    global_attn_every_n_layers=2,
    cls_token_id=1,
    sep_token_id=2,
)
encoder(
    "deberta",
    architecture="DebertaForMaskedLM",
    config="DebertaConfig",
    **POSITIONS,
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
    # It cuts its table at a length that it reads from a tensor, within each attention: else a graph ends there.
    dynamo={"capture_scalar_outputs": True},
    **EAGER,
)
encoder("fnet", architecture="FNetForMaskedLM", config="FNetConfig", **POSITIONS, **EAGER)


def translation(length: int) -> dict[str, Any]:
    return {"input_ids": tokens(length), "labels": tokens(length - 3)}


seq2seq = partial(huggingface, family="encoder-decoder", inputs=translation)
seq2seq(
    "t5",
    architecture="T5ForConditionalGeneration",
    config="T5Config",
    d_kv=8,
    num_decoder_layers=2,
    decoder_start_token_id=0,
)
seq2seq("bart", architecture="BartForConditionalGeneration", config="BartConfig", **POSITIONS)
seq2seq("marian", architecture="MarianMTModel", config="MarianConfig", **POSITIONS)


def image(side: int) -> dict[str, Any]:
    return {"pixel_values": random(1, 3, side, side)}


def labelled(side: int) -> dict[str, Any]:
    return {**image(side), "labels": torch.tensor([1])}


PATCHES: Mapping[str, Any] = {"image_size": int, "patch_size": 4, "long": 48}

vision = partial(huggingface, family="vision")
add("vit", "vision", lambda a, n: vit(attn_implementation=a, image_size=n), labelled, short=20, long=48)
vision(
    "dinov2", architecture="Dinov2ForImageClassification", config="Dinov2Config", inputs=labelled, **PATCHES, short=20
)
vision(
    "swin",
    architecture="SwinForImageClassification",
    config="SwinConfig",
    inputs=labelled,
    **PATCHES,
    short=24,
    embed_dim=16,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=3,
)
vision("clip", architecture="CLIPVisionModel", config="CLIPVisionConfig", inputs=image, **PATCHES, short=20)
vision("siglip", architecture="SiglipVisionModel", config="SiglipVisionConfig", inputs=image, **PATCHES, short=20)
RELATIVE = {"short": 20, "attentions": ("eager",)}
vision(
    "vitdet",
    architecture="VitDetModel",
    config="VitDetConfig",
    inputs=image,
    **PATCHES,
    **RELATIVE,
    num_channels=3,
    use_relative_position_embeddings=True,
    window_size=3,
    window_block_indices=[0],
)
vision(
    "sam",
    architecture="SamVisionModel",
    config="SamVisionConfig",
    inputs=image,
    **PATCHES,
    **RELATIVE,
    window_size=3,
    global_attn_indexes=[1],
    mlp_dim=64,
    output_channels=16,
    num_pos_feats=16,
)


def speech(length: int) -> dict[str, Any]:
    return {"input_values": random(1, 10 * length), "labels": torch.tensor([[5, 3, 8]])}


def spectrogram(length: int) -> dict[str, Any]:
    return {"input_features": random(1, 8, 2 * length), "labels": tokens(length)}


# The head of a model that spells is small: the real ones have 32 letters for a width of 768.
WAVE: Mapping[str, Any] = {
    "vocab_size": 9,
    **{"conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 5, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False},
}

audio = partial(huggingface, family="audio")
audio("wav2vec2", architecture="Wav2Vec2ForCTC", config="Wav2Vec2Config", inputs=speech, **WAVE)
audio("hubert", architecture="HubertForCTC", config="HubertConfig", inputs=speech, **WAVE)
audio(
    "whisper",
    architecture="WhisperForConditionalGeneration",
    config="WhisperConfig",
    inputs=spectrogram,
    num_mel_bins=8,
    max_source_positions=int,
    max_target_positions=room,
)

# diffusers

TEXT = 13
TIME = torch.tensor([0.5], dtype=torch.float64)
STEP = torch.tensor([3])
PROMPT: Mapping[str, Any] = {"encoder_hidden_states": random(1, TEXT, 12)}
POOLED: Mapping[str, Any] = {"pooled_projections": random(1, 10)}


def diffusion(name: str, architecture: str, inputs: Inputs, short: int = 5, long: int = 12, **own: Any) -> None:
    """Add a transformer of diffusers: two blocks of 4 heads, 8 wide."""

    def make(attention: str, length: int) -> nn.Module:
        sized = {key: value(length) if callable(value) else value for key, value in own.items()}
        model: nn.Module = getattr(diffusers, architecture)(
            **{"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, **sized}
        )
        return model

    def call(length: int) -> dict[str, Any]:
        return {**inputs(length), "return_dict": False}

    add(name, "diffusion", make, call, attentions=("sdpa",), short=short, long=long)


def latent(side: int) -> Tensor:
    return random(1, 4, 2 * side, 2 * side)


def clip(side: int) -> Tensor:
    return random(1, 4, 3, 2 * side, 2 * side)


def flux(side: int) -> dict[str, Any]:
    rows = torch.arange(side, dtype=torch.float64)
    places = torch.cartesian_prod(torch.zeros(1, dtype=torch.float64), rows, rows)
    none = torch.zeros(TEXT, 3, dtype=torch.float64)
    patches = random(1, side * side, 8)
    return {"hidden_states": patches, "timestep": TIME, "img_ids": places, "txt_ids": none, **PROMPT, **POOLED}


def sd3(side: int) -> dict[str, Any]:
    return {"hidden_states": latent(side), "timestep": TIME, **PROMPT, **POOLED}


def dit(side: int) -> dict[str, Any]:
    return {"hidden_states": latent(side), "timestep": STEP, "class_labels": torch.tensor([1])}


def pixart(side: int) -> dict[str, Any]:
    none = {"resolution": None, "aspect_ratio": None}
    return {"hidden_states": latent(side), "timestep": STEP, "added_cond_kwargs": none, **PROMPT}


def wan(side: int) -> dict[str, Any]:
    return {"hidden_states": clip(side), "timestep": STEP, **PROMPT}


def cogvideox(side: int) -> dict[str, Any]:
    return {"hidden_states": clip(side).transpose(1, 2), "timestep": STEP, **PROMPT}


def hunyuan_video(side: int) -> dict[str, Any]:
    guidance = torch.tensor([3.0], dtype=torch.float64)
    seen = torch.ones(1, TEXT)
    return {**wan(side), "encoder_attention_mask": seen, "guidance": guidance, **POOLED}


def ltx(side: int) -> dict[str, Any]:
    patches, sizes = random(1, 3 * side * side, 8), {"num_frames": 3, "height": side, "width": side}
    seen = torch.ones(1, TEXT)
    return {"hidden_states": patches, "timestep": STEP, "encoder_attention_mask": seen, **sizes, **PROMPT}


def pixels(side: int) -> int:
    """The side of a latent image, in patches of 2."""
    return 2 * side


LATENT: Mapping[str, Any] = {"in_channels": 4, "out_channels": 4}
JOINT: Mapping[str, Any] = {"joint_attention_dim": 12, "pooled_projection_dim": 10}
VIDEO: Mapping[str, Any] = {"short": 3, "long": 12}

diffusion(
    "flux",
    "FluxTransformer2DModel",
    flux,
    **JOINT,
    in_channels=8,
    num_layers=1,
    num_single_layers=1,
    axes_dims_rope=(2, 2, 4),
)
diffusion(
    "sd3",
    "SD3Transformer2DModel",
    sd3,
    **LATENT,
    **JOINT,
    sample_size=pixels,
    caption_projection_dim=32,
    pos_embed_max_size=16,
)
diffusion("dit", "DiTTransformer2DModel", dit, **LATENT, sample_size=pixels, num_embeds_ada_norm=10)
diffusion(
    "pixart",
    "PixArtTransformer2DModel",
    pixart,
    long=24,
    in_channels=4,
    out_channels=8,
    sample_size=pixels,
    cross_attention_dim=32,
    caption_channels=12,
    use_additional_conditions=False,
)
diffusion(
    "wan",
    "WanTransformer3DModel",
    wan,
    **LATENT,
    **VIDEO,
    attention_head_dim=12,
    text_dim=12,
    freq_dim=16,
    ffn_dim=128,
    rope_max_seq_len=32,
)
diffusion(
    "ltx",
    "LTXVideoTransformer3DModel",
    ltx,
    **VIDEO,
    in_channels=8,
    out_channels=8,
    cross_attention_dim=32,
    caption_channels=12,
)
diffusion(
    "cogvideox",
    "CogVideoXTransformer3DModel",
    cogvideox,
    **LATENT,
    **VIDEO,
    time_embed_dim=8,
    text_embed_dim=12,
    sample_width=pixels,
    sample_height=pixels,
    sample_frames=9,
    max_text_seq_length=TEXT,
)
diffusion(
    "hunyuan_video",
    "HunyuanVideoTransformer3DModel",
    hunyuan_video,
    **LATENT,
    **VIDEO,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    text_embed_dim=12,
    pooled_projection_dim=10,
    rope_axes_dim=(2, 2, 4),
)


# Convolutions over an image, with attention where it is small.
IMAGE: Mapping[str, Any] = {**LATENT, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}


def unet(side: int) -> dict[str, Any]:
    return {"sample": random(1, 4, side, side), "timestep": STEP, "return_dict": False, **PROMPT}


def unet_of(attention: str, side: int) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=side,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **IMAGE,
    )


class Decoder(nn.Module):
    """Images of latents, as the last step of most diffusion models."""

    def __init__(self) -> None:
        super().__init__()
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        self.vae = diffusers.AutoencoderKL(latent_channels=4, **blocks, **IMAGE)
        del self.vae.encoder, self.vae.quant_conv

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(z, return_dict=False)[0]
        return image


IN_CONVOLUTIONS: Mapping[str, Any] = {"attentions": ("sdpa",), "short": 12, "long": 16}
add("unet", "diffusion", unet_of, unet, **IN_CONVOLUTIONS)
add("vae_decoder", "diffusion", lambda a, n: Decoder(), lambda n: {"z": random(1, 4, n, n)}, **IN_CONVOLUTIONS)
