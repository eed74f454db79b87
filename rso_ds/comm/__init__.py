"""What ranks send each other, counted."""
