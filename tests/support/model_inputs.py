"""The models of ``model_types`` without chance, and something to feed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.model_types import KINDS
from torch import Tensor, nn


def build(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model in training mode that draws no random numbers: no dropout, no jitter of routers."""
    torch.manual_seed(0)
    model = KINDS[kind].build().to(dtype).train()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if ("drop" in name or "jitter" in name or (name == "p" and "Dropout" in type(module).__name__)) and value:
                setattr(module, name, 0.0 if isinstance(value, float) else value)
    model.config._experts_implementation = "eager"  # the grouped product knows no float64
    return model


def batch_for(model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments for which ``model`` reads all its inputs, and computes a loss if it has one."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def tokens(length: int = 12) -> Tensor:
        return torch.randint(5, 50, (2, length), generator=generator)

    name, kind = type(model).__name__, model.config.model_type
    classes = torch.tensor([0, 2])
    if kind in ("gemma3", "paligemma", "llava"):
        ids = tokens()
        ids[:, 1:5] = 60
        types = {} if kind == "llava" else {"token_type_ids": (ids == 60).long()}
        return {"input_ids": ids, "labels": ids.clone(), "pixel_values": noise(2, 3, 8, 8), **types}
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        ids = tokens()
        ids[:, 1], ids[:, 2:6], ids[:, 6] = 62, 60, 63
        grid = torch.tensor([[1, 4, 4]] * 2)
        pixels = {"pixel_values": noise(32, 96), "image_grid_thw": grid, "mm_token_type_ids": (ids == 60).int()}
        return {"input_ids": ids, "labels": ids.clone(), **pixels}
    if "ImageClassification" in name:
        size = getattr(model.config, "vision_config", model.config).image_size
        return {"pixel_values": noise(2, 3, size, size), "labels": classes}
    if kind == "dinov3_vit":
        return {"pixel_values": noise(2, 3, 8, 8)}
    if kind == "siglip2":
        pixels = {"pixel_values": noise(2, 4, 48), "pixel_attention_mask": torch.ones(2, 4, dtype=torch.long)}
        return {"input_ids": tokens(), "return_loss": True, "spatial_shapes": torch.tensor([[2, 2]] * 2), **pixels}
    if kind in ("clip", "siglip"):
        return {"input_ids": tokens(), "pixel_values": noise(2, 3, 8, 8), "return_loss": True}
    if kind in ("wav2vec2", "hubert", "wavlm"):
        labels = torch.tensor([[3, 4], [5, 6]]) if "CTC" in name else torch.tensor([0, 1])
        return {"input_values": noise(2, 400), "labels": labels}
    if kind == "audio-spectrogram-transformer":
        return {"input_values": noise(2, 16, 8), "labels": classes}
    if kind == "whisper":
        return {"input_features": noise(2, 8, 20), "labels": classes if "Classification" in name else tokens(6)}
    return {"input_ids": tokens(), "labels": tokens(6 if model.config.is_encoder_decoder else 12)}


def loss_of(forward: Callable[..., Any], batch: dict[str, Any]) -> Tensor:
    """The loss; of a bare model, the mean square of its output."""
    outputs = forward(**batch)
    loss = getattr(outputs, "loss", None)
    return outputs[0].pow(2).mean() if loss is None else loss
