"""Settings of every test: one thread, no network, no progress bars. Set before torch and diffusers are imported."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}

import torch

torch.set_num_threads(1)
