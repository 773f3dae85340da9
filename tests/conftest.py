import torch

# Two threads on tiny models collapse as soon as anything else runs on the machine.
torch.set_num_threads(1)
