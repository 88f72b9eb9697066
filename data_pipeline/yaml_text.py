"""YAML as it is meant in settings: what PyYAML would read otherwise, or drop, without a word.

Numbers are those of JSON and YAML 1.2: 1e-6 is one, and 010 or 1:30 is not an octal or a time. Keys
are names, also `on` and `2024`; dates are text; a key that stands twice in a section is an error.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from data_pipeline.errors import InputError

_KEPT = ("null", "bool", "merge")
_MERGE = "tag:yaml.org,2002:merge"
_INT = r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)$"
_FLOAT = r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$
            |[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"""


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the rules above."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's attribute

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key must be text", key.start_mark)
            if key.value in lines:
                where = sorted({str(lines[key.value]), str(line)}, key=int)
                problem = f"{key.value} is written twice (line {' and '.join(where)}); keep one"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            key.tag = self.DEFAULT_SCALAR_TAG
            lines[key.value] = line
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(str(self.construct_scalar(node)).replace("_", ""), 0)


class _Dumper(yaml.SafeDumper):
    """Quotes also what only the loader above would take for a number."""


_FLOAT_RULE = ("tag:yaml.org,2002:float", re.compile(_FLOAT, re.VERBOSE), [*"-+0123456789."])
_Dumper.add_implicit_resolver(*_FLOAT_RULE)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INT), [*"-+0123456789"])
_Loader.add_implicit_resolver(*_FLOAT_RULE)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    for _tag, _regexp in _resolvers:
        if _tag.rpartition(":")[2] in _KEPT:
            _Loader.add_implicit_resolver(_tag, _regexp, [_first])


def read_yaml(text: str, source: Hashable) -> Any:
    """The content of a YAML text.

    Raises:
        InputError: naming `source`, the line and what is wrong there.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "cannot be read"
        if "'\\t'" in problem:
            problem = "a tab; indent with spaces"
        raise InputError(f"{source} is not valid YAML{place}: {problem}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{source} is not valid YAML: {message}") from error


def write_yaml(content: Any) -> str:
    """Text that `read_yaml` reads as the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def ends_early(text: str) -> bool:
    """Whether something in a one-line YAML value is a comment, which YAML drops."""
    node = yaml.compose(text, _Loader)
    return bool(text.strip()) and (node is None or bool(text[node.end_mark.index :].strip()))
