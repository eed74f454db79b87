"""``rso-ds comm``: what a step sends, in closed form, and how long that takes on given links."""
