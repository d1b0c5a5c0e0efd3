"""The stage ``tune``: launch settings that win on this GPU, as the file that ships them."""

import argparse


def is_possible(options: argparse.Namespace) -> bool:
    return False


def run_stage(options: argparse.Namespace, deadline: float) -> int:
    return 0
