"""What is saved, how it comes back, and the way back to a dense model."""

from rso_ds.checkpoint.checkpointer import Checkpointer
from rso_ds.checkpoint.dense import dense_state_dict, save_dense
from rso_ds.checkpoint.folder import Retention
from rso_ds.checkpoint.training_state import TrainingState

__all__ = ["Checkpointer", "Retention", "TrainingState", "dense_state_dict", "save_dense"]
