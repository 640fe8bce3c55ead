"""Environment variables of a training run's ranks."""

import os


def prepare(**variables: str) -> None:
    """Sets them."""
    os.environ.update(variables)
