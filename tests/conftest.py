"""Settings of all tests."""

import torch

# The models are tiny: a second thread costs them more than it gives, many times more where cores are shared.
torch.set_num_threads(1)
