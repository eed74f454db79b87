"""The programs behind ``launch/`` and of ``rso-ds``: training, fine-tuning, evaluation, reports."""
