"""The names and shapes under which transformers saves a model: not always those that it has in memory.

transformers 5 fuses the experts of most mixtures when it loads them, and takes them apart again in ``save_pretrained``.
A folder that other programs are to read has to have the tensors of the latter.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Published:
    """``config_file``: config.json of the model. Tensors of a class that transformers does not have are left as they
    are, and so they are by its versions that rename nothing."""

    def __init__(self, config_file: Path) -> None:
        self._model = _skeleton(config_file)

    def parts(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What the tensor ``name`` of the model is saved as; ``tensor`` may be on the meta device."""
        if self._model is None:
            return {name: tensor}
        from transformers.core_model_loading import revert_weight_conversion

        parts: dict[str, Tensor] = revert_weight_conversion(self._model, {name: tensor})
        return parts

    def shapes(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """{name in the file: shape} of the tensor ``name``."""
        return {part: tuple(t.shape) for part, t in self.parts(name, torch.empty(shape, device="meta")).items()}


def _skeleton(config_file: Path) -> Any:
    """The model without memory, or None."""
    import transformers

    if importlib.util.find_spec("transformers.core_model_loading") is None:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(config_file)
    except (ValueError, KeyError):  # code of the model's own, or no model's configuration: not of transformers
        return None
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        return None
    with torch.device("meta"):
        return kind(config)
