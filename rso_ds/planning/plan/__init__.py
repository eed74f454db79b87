"""``rso-ds plan``: the search for stage, rank, micro batch and checkpointing, and its reasons."""
