"""What the server of ranks does before it forks any: imports, and DeepSpeed's operations built and loaded.

A process that loads an operation by itself asks the build system first, and DeepSpeed's ZeRO-1 and 2 have something
compiled at their start, for which torch imports its compiler: seconds each time.
"""

import contextlib

import deepspeed
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from deepspeed.accelerator import get_accelerator

import rso_ds.recipes.training.command  # noqa: F401

OPERATIONS = ("CPUAdamBuilder", "FusedAdamBuilder", "ShareMemCommBuilder")

for name in OPERATIONS:
    builder = get_accelerator().create_op_builder(name)
    if builder is not None and builder.name in deepspeed.ops.__compatible_ops__:
        with contextlib.suppress(Exception):  # a rank that needs it will say what is wrong
            builder.load(verbose=False)

# Imports the compiler, with all that it looks up when it compiles for the first time; no graph stays.
torch.compile(torch.nn.Linear(2, 2), backend="aot_eager")(torch.ones(1, 2)).sum().backward()
torch._dynamo.reset()
torch.compile(abs)
