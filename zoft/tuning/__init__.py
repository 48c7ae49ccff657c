"""Hyper-parameters of training jobs: `zoft tune` on top of `zoft.blackbox.tune` and `zoft.run`."""
