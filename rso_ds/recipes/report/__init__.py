"""``rso-ds report``: runs beside each other on one page."""
