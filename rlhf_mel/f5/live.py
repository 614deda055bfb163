"""An f5-tts model that is already in memory as a policy: the same parameters, run by this package's backbone.

    policy = policy_from_f5(f5_tts_cfm)      # then train `policy`; f5_tts_cfm.sample(...) speaks with what was learned

Nothing of f5-tts is edited or called. The policy's parameters ARE the model's (one storage, one requires_grad), so an
update of one is an update of the other; what differs is who computes with them. f5-tts keeps the text embedding of a
solve in the module: a solve that is interrupted leaves a stale one, and its thread-local makes `copy.deepcopy` raise.
This package's backbone has no such state: gradients flow, nothing goes stale, and a deepcopy copies weights alone.
A forward pass of both is compared when the policy is made: a model with another forward is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import load_backbone, merged_state
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.f5_text import byte_vocab
from rlhf_mel.speech.text import load_tokenizer

TOLERANCE = 1e-4
"""Relative difference of the two forward passes that float32 can explain."""


def policy_from_f5(model: nn.Module, *, tokenizer: str | None = None, check: bool = True) -> CFM:
    """The policy that shares all parameters with `model`, a `f5_tts.model.CFM`; eval mode.

    Args:
        tokenizer: "pinyin" unless given, as in f5-tts's inference, and "byte" where the model has no vocabulary.
        check: compare one forward pass of both.

    Raises:
        ValueError: not a CFM of f5-tts 1.1.22 in float32, or one whose forward pass gives other numbers.
    """
    live: Any = model
    transformer = getattr(live, "transformer", None)
    name = type(transformer).__name__
    if name not in READERS or not hasattr(live, "vocab_char_map"):
        raise ValueError(f"policy_from_f5: expected f5-tts's CFM on one of {list(READERS)}, got {type(live)} on {name}")
    if (dtype := next(live.parameters()).dtype) != torch.float32:
        raise ValueError(
            f"policy_from_f5: expected float32 weights, got {dtype} (f5-tts loads half precision on a GPU); call"
            " .float() on a model loaded with dtype=torch.float32: what was rounded stays rounded"
        )
    with torch.device("meta"):
        backbone = load_backbone(name)(**READERS[name](transformer))
    _share(backbone, transformer)
    policy = CFM(
        backbone,
        sigma=live.sigma,
        odeint_kwargs=live.odeint_kwargs,
        audio_drop_prob=live.audio_drop_prob,
        cond_drop_prob=live.cond_drop_prob,
        num_channels=live.num_channels,
        mel_spec_module=_mel_spec(live.mel_spec),
        frac_lengths_mask=live.frac_lengths_mask,
        vocab_char_map=byte_vocab() if live.vocab_char_map is None else dict(live.vocab_char_map),
        tokenizer=load_tokenizer(tokenizer or ("byte" if live.vocab_char_map is None else "pinyin")),
    ).eval()
    if check:
        _compare(backbone, transformer)
    return policy


def _share(backbone: nn.Module, transformer: Any) -> None:
    """Make the parameters of f5-tts's backbone those of ours; the rotary buffer is made anew."""
    theirs = transformer.state_dict(keep_vars=True)
    ours = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    actual = {key: tuple(value.shape) for key, value in theirs.items()}
    if ours != actual:
        differing = sorted(key for key in ours.keys() | actual.keys() if ours.get(key) != actual.get(key))
        raise ValueError(
            f"policy_from_f5: expected the tensors of f5-tts 1.1.22's {type(transformer).__name__}, got others, first"
            f" {[f'{key}: {ours.get(key)} here, {actual.get(key)} there' for key in differing[:3]]}"
        )
    backbone.load_state_dict({**theirs, "rotary_embed.inv_freq": theirs["rotary_embed.inv_freq"].clone()}, assign=True)


@torch.no_grad()
def _compare(backbone: Any, transformer: Any) -> None:
    device = next(transformer.parameters()).device
    generator = torch.Generator().manual_seed(0)
    mels = backbone.arch["mel_dim"]
    x, cond = (torch.randn(2, 24, mels, generator=generator).to(device) for _ in range(2))
    text = torch.tensor([[0, 1, 2, 0, 1, 1], [2, 2, 1, -1, -1, -1]], device=device)
    call: dict[str, Any] = dict(x=x, cond=cond, text=text, time=torch.tensor(0.3, device=device), cfg_infer=True)
    modes = [(module, module.training) for module in transformer.modules()]
    try:
        theirs = transformer.eval()(**call, cache=False)
    finally:
        for module, mode in modes:
            module.training = mode
    difference = (backbone.eval()(**call) - theirs).norm() / theirs.norm().clamp(min=1e-6)
    if difference > TOLERANCE:
        raise ValueError(
            f"policy_from_f5: expected the forward pass of f5-tts 1.1.22, got one that differs by {difference:.2g};"
            " write an adapter for this model (docs/foreign_flows.md)"
        )


def _mel_spec(module: Any) -> MelSpec:
    kind = "bigvgan" if "bigvgan" in getattr(module.extractor, "__name__", "") else "vocos"
    return MelSpec(
        sample_rate_hz=module.target_sample_rate,
        n_fft=module.n_fft,
        hop_length=module.hop_length,
        win_length=module.win_length,
        n_mels=module.n_mel_channels,
        kind=kind,
    )


def _read_attention(attention: Any) -> dict[str, Any]:
    return {
        "heads": attention.heads,
        "dim_head": attention.inner_dim // attention.heads,
        "dropout": attention.dropout,
        "qk_norm": None if attention.q_norm is None else "rms_norm",
        "attn_mask_enabled": attention.processor.attn_mask_enabled,
    }


def _read_text(embedding: Any) -> dict[str, Any]:
    return {
        "text_num_embeds": embedding.text_embed.num_embeddings - 1,
        "text_mask_padding": embedding.mask_padding,
    }


def _read_frame_text(embedding: Any) -> dict[str, Any]:
    """Of the text embedding that is laid over frames, in DiT and UNetT."""
    return {
        **_read_text(embedding),
        "text_dim": embedding.text_embed.embedding_dim,
        "conv_layers": len(embedding.text_blocks) if embedding.extra_modeling else 0,
    }


def _read_sizes(transformer: Any, feed_forward: Any) -> dict[str, Any]:
    return {
        "dim": transformer.dim,
        "depth": transformer.depth,
        "ff_mult": feed_forward.ff[0][0].out_features / transformer.dim,
        "mel_dim": transformer.proj_out.out_features,
    }


def _read_dit(transformer: Any) -> dict[str, Any]:
    block = transformer.transformer_blocks[0]
    return {
        **_read_sizes(transformer, block.ff),
        **_read_attention(block.attn),
        **_read_frame_text(transformer.text_embed),
        "pe_attn_head": block.attn.processor.pe_attn_head,
        "text_embedding_average_upsampling": transformer.text_embed.average_upsampling,
        "long_skip_connection": transformer.long_skip_connection is not None,
        "checkpoint_activations": transformer.checkpoint_activations,
    }


def _read_unett(transformer: Any) -> dict[str, Any]:
    _, _, attention, _, feed_forward = transformer.layers[0]
    return {
        **_read_sizes(transformer, feed_forward),
        **_read_attention(attention),
        **_read_frame_text(transformer.text_embed),
        "pe_attn_head": attention.processor.pe_attn_head,
        "skip_connect_type": transformer.skip_connect_type,
    }


def _read_mmdit(transformer: Any) -> dict[str, Any]:
    block = transformer.transformer_blocks[0]
    return {
        **_read_sizes(transformer, block.ff_x),
        **_read_attention(block.attn),
        **_read_text(transformer.text_embed),
        "checkpoint_activations": transformer.checkpoint_activations,
    }


READERS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "DiT": _read_dit,
    "UNetT": _read_unett,
    "MMDiT": _read_mmdit,
}


def write_back(policy: CFM, model: nn.Module) -> None:
    """Put the policy's weights, LoRA merged, into the f5-tts model; only needed for LoRA, or for a copied policy."""
    model.load_state_dict(merged_state(policy))
