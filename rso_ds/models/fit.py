"""Whether a tokenizer and a length fit a model: the one check of all programs."""

from __future__ import annotations

from typing import Any

from torch import nn

from rso_ds.errors import RSOConfigError

RESIZE_FLAG = "--resize-embeddings"
RESIZE_HELP = (
    "Grow the embeddings, and the head with them, to the tokens of the tokenizer; the new rows begin as transformers'"
    " resize_token_embeddings makes them."
)
# Names of position embeddings in transformers; what says "rel" counts distances, and "distance_embedding" too.
_POSITIONS = ("wpe", "position_embedding", "position_embeddings", "positions_embed", "embed_positions", "pos_embed",
              "pos_emb", "position_embeds_layer")  # fmt: skip


def rows_needed(tokenizer: Any) -> int:
    """Embeddings that a model needs for ``tokenizer``: its largest id and one. Ids may have gaps, so that these are
    more than ``len(tokenizer)``."""
    return 1 + max([len(tokenizer) - 1, *tokenizer.get_vocab().values(), *tokenizer.all_special_ids])


def check_tokens(config: Any, tokenizer: Any, resize: bool, remedy: str = "") -> int:
    """Embeddings that the model of ``config`` is to have for ``tokenizer``: its own, or more with ``resize``.

    Raises ``RSOConfigError``, with both numbers and the flag that mends it, if they are too few. ``remedy``: what else
    would.
    """
    own, needed = config.get_text_config().vocab_size, rows_needed(tokenizer)
    if needed > own and not resize:
        raise RSOConfigError(
            f"the tokenizer has ids up to {needed - 1} and the model has {own} embeddings, {needed - own} too few."
            f" {RESIZE_FLAG} grows them{remedy}."
        )
    return max(own, needed)


def check_length(config: Any, positions: int | None, length: int, flag: str) -> str | None:
    """A warning if ``length``, of the option ``flag``, is more than the model was made for and it computes positions
    (rotary ones); None if it fits. ``config``: None for a named shape, which is made for any; ``positions``: those of
    ``learned_positions``.

    Raises ``RSOConfigError``, with both numbers, if it is more than the positions that the model has learned.
    """
    if positions is not None:
        if length > positions:
            raise RSOConfigError(
                f"{flag} {length} is more than the {positions} positions that the model has embeddings for: give"
                f" {flag} {positions} or less."
            )
        return None
    made_for = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(made_for, int) or length <= made_for:
        return None
    return (
        f"warning: {flag} {length} is more than the {made_for} positions (max_position_embeddings) of the model's"
        " config.json. Positions are computed, so that it trains, but it may have seen none beyond these, and the saved"
        f" config.json goes on saying {made_for}. To extend the model, change max_position_embeddings, and the rope"
        " parameters, in the config.json of --model."
    )


def learned_positions(model: nn.Module) -> int | None:
    """The number of positions that ``model`` has embeddings for, learned or in a table; None if it computes them, as
    rotary ones."""
    found = []
    for name, module in model.named_modules():
        of_text = not any(other in name for other in ("vision", "visual", "image", "audio"))
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS and of_text:
            # OPT and BART count from 2, RoBERTa from the row after that of padding.
            first = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - first)
    made_for = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not found:  # tables that are no parameters: GPT-J's sines
        tabled = isinstance(made_for, int) and any(made_for in buffer.shape for buffer in model.buffers())
        return made_for if tabled else None
    return min([*found, made_for] if isinstance(made_for, int) else found)


def grow_embeddings(model: Any, rows: int) -> None:
    """Give ``model`` embeddings for ``rows`` tokens, if it has fewer: also in its head, tied or not, and in its
    configuration."""
    if rows > model.config.get_text_config().vocab_size:
        model.resize_token_embeddings(rows)


def ensure_padding(tokenizer: Any, name: str) -> None:
    """Let ``tokenizer`` pad with its end-of-text token if it has no token for padding. Raises ``RSOConfigError`` if it
    has neither."""
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise RSOConfigError(
            f"the tokenizer of --model {name} has neither a padding token nor an end-of-text token, so that rows cannot"
            " be padded: add one (tokenizer.add_special_tokens({'pad_token': '[PAD]'}), save_pretrained) and give"
            f" {RESIZE_FLAG}."
        )
    tokenizer.pad_token = tokenizer.eos_token
