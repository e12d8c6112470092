"""What all tests share."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each take every core spend their time waiting for one another.
    torch.set_num_threads(1)
