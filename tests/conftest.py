"""What every test runs under: one thread a process, no hub, no trackers. Set before anything imports torch."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist has the cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "agg"
