"""Many nodes: what started this process, and what to know before a job runs."""
