"""``rso-ds evaluate``: the held-out loss of each checkpoint, also beside the run that writes them."""
