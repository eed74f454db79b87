"""Before renting GPUs: what a rank holds, what a step sends, and which plan to use."""
