"""Models that other libraries have rebuilt: what RSO cannot train, and what to do instead."""

from __future__ import annotations

from torch import Tensor, nn

from rso_ds.errors import RSOUnsupportedError

# Where the classes of quantised layers, parameters and tensors come from.
_QUANTISERS = (
    "bitsandbytes", "torchao", "transformers.integrations.bitnet", "gptqmodel", "auto_gptq", "awq", "optimum.quanto",
    "quanto", "hqq", "aqlm", "compressed_tensors",
)  # fmt: skip


def refuse_foreign(model: nn.Module) -> None:
    """Raise ``RSOUnsupportedError`` if ``model`` holds quantised weights or adapters of peft.

    The boundary of RSO writes W + B P^T into W. A quantised W would have to be quantised anew each time, which
    rounds most of a small update away; LoRA's point, a base that stays as it is, is not RSO's.
    """
    for name, module in model.named_modules():
        if _is_from(module, ("peft.tuners",)):
            raise RSOUnsupportedError(
                f"'{name}' is an adapter of peft: merge it first, model = model.merge_and_unload(), and unfreeze the"
                " weights, model.requires_grad_(True). RSO trains the weights themselves."
            )
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        kind = next((x for x in (module, *held) if _is_from(x, _QUANTISERS)), None)
        if kind is not None:
            raise RSOUnsupportedError(
                f"'{name}' is quantised ({type(kind).__name__}): RSO adds B P^T to W at every boundary, which a"
                " quantised W would mostly round away. Load the model without quantization_config; bf16 weights with"
                " 'merge_rounding': \"stochastic\" or 'master_weights' take the least memory."
            )


def _is_from(thing: nn.Module | Tensor, packages: tuple[str, ...]) -> bool:
    found = [type(thing).__module__]
    if isinstance(thing, nn.Parameter):
        found.append(type(thing.data).__module__)
    return any(module == package or module.startswith(f"{package}.") for module in found for package in packages)
