"""Compiled noise: z made and used in one pass over memory, with the bits of the eager code in zoft/noise/counter.py.

On a CPU it is noise.cpp, built by the C++ compiler that is there; on a GPU noise_triton.py. Neither is left to
inductor: what it makes for a GPU could be tested only where there is one, and on a CPU it is slower. Measured on one
core (AMD EPYC with AVX-512, torch 2.13, g++ 12.2; CPU time, 4 Mi elements):

| ns per element                  | eager | inductor | noise.cpp |
|---------------------------------|-------|----------|-----------|
| Gaussian, added                 |   3.5 |      2.0 |       1.2 |
| Gaussian, two scales, float32   |   4.7 |      2.1 |       1.7 |
| Gaussian, two scales, bfloat16  |   4.8 |        - |       1.3 |
| Gaussian, any elements (gather) |  26   |        - |       1.2 |
| Rademacher, added               |   1.2 |      0.7 |       0.1 |
| Rademacher, two scales, float32 |   2.0 |      0.8 |       0.7 |

and before the first number: inductor takes 8 s for every operation, law and dtype the first time and 4.5 s in every
process after that; noise.cpp takes 0.45 s once a machine, and 30 ms in a process (most of it to compare its bits with
the eager code's). `zoft doctor` says what is in use, and how fast it is here.
"""

from zoft.noise.kernels.base import Kernels, Stream
from zoft.noise.kernels.choice import MODES, prepare, using, why

__all__ = ["MODES", "Kernels", "Stream", "prepare", "using", "why"]
