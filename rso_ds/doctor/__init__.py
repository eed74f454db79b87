"""``rso-ds doctor``: what a job will meet where it is to run, found before it starts."""
