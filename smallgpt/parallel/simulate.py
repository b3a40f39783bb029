"""A step of train_fsdp.py without its machines, to count what plan.py computes.

The processes are PyTorch's fake group: every collective returns at once. Tensors are fake: they
have shapes and no memory. So the code of the real step runs, at full width, on any computer.
"""
