"""An argument parser whose errors are one line like all others of this project."""

import argparse
from typing import NoReturn

from megatron_act.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises `UserError` instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")
