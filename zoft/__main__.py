"""`python -m zoft`, for torchrun: `torchrun --nproc-per-node 2 -m zoft train ...`."""

from zoft.cli import run

run()
