"""Adapters of the algorithm to training engines. Import the engine you use; none is imported here."""
