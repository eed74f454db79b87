"""Nodes, launchers and networks: what a job finds where it starts."""
