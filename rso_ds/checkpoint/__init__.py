"""What is saved, and the way back to a dense model."""

from rso_ds.checkpoint.dense import dense_state_dict, save_dense
from rso_ds.checkpoint.state import read_state, write_state

__all__ = ["dense_state_dict", "read_state", "save_dense", "write_state"]
