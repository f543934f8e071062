"""The native kernels for benchmarks of their parts."""

import argparse

import torch

from workers.native.library import Threads, library


def native_threads(parser: argparse.ArgumentParser, count: int) -> Threads:
    """`count` of them; torch computes with as many. Raises SystemExit where the kernels cannot be built."""
    built = library()
    if built is None:
        parser.error("the native kernels cannot be built here")
    torch.set_num_threads(count)
    return Threads(built, count)
