"""Before any test imports torch or DeepSpeed."""

from environment import prepare

prepare()
