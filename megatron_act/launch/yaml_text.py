"""YAML whose scripts stay readable: strings of several lines as literal blocks."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """`yaml.SafeDumper` with literal blocks and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def dump(*documents: dict[str, Any]) -> str:
    """Documents one after the other, keys in their order."""
    return "---\n".join(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000) for document in documents)
