"""The section about sub-nets in a model's README.md, between two marks by which it is found again.

What stands outside the marks is the user's own and stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ast_plugin.elastic_contents import ElasticContents
from ast_plugin.report_format import clean, decimals, grouped, percent

README = "README.md"
CITATION = (
    'Yang, Meng, Seo, Fan: "Get More at Once: Alternating Sparse Training with Gradient Correction", NeurIPS 2022.'
)

_BEGIN = "<!-- ast-plugin: begin -->"
_END = "<!-- ast-plugin: end -->"
# A mark without its partner is no section: what follows it is not ours to remove.
_SECTION = re.compile(f"{re.escape(_BEGIN)}(?:(?!{re.escape(_BEGIN)}).)*?{re.escape(_END)}", re.DOTALL)


def with_section(text: str, section: str) -> str:
    r"""Return a README with a section between our marks: in the place of an earlier one, or else at the end.

    Args:
        text: The README, empty for a new one; its line ends are kept.
        section: Markdown without the marks, with ``\n`` at line ends.
    """
    line_end = "\r\n" if "\r\n" in text else "\n"
    ours = line_end.join((_BEGIN, *section.strip().split("\n"), _END))
    before, *rest = _SECTION.split(text)
    if not rest:
        head = before.rstrip()
        return (head + 2 * line_end if head else "") + ours + line_end
    first, *others = rest  # text in front of further sections, which some copying made
    return before + ours + first + "".join(others)


def sub_net_section(contents: ElasticContents, name: str) -> str:
    """Return what a README says of one sub-net that was exported as an ordinary model.

    Args:
        contents: The elastic file that it is from.
        name: The sub-net.

    Raises:
        ConfigError: If there is no such sub-net.
    """
    contents.check_sub_net(name)
    record = contents.records[name]
    count = len(contents.sub_nets)
    one_of = f"one of {count} sub-nets that share the weights of one network" if count > 1 else "a sub-net of a network"
    lines = [
        f"## Sub-net {code(name)}",
        "",
        f"These weights are {one_of}, trained by alternating sparse training (`ast_plugin`) and exported as an "
        f"ordinary model. Of {grouped(record.total)} prunable weights {grouped(record.kept)} are kept; the others, "
        f"{percent(record.sparsity)}, are zeros, stored like other numbers. `ast_plugin` is not needed to use them.",
        "",
    ]
    if record.metrics:
        lines += [metrics_table((name,), {name: record.metrics}, {}), ""]
    return "\n".join([*lines, f"Method: {CITATION}"])


def metrics_table(
    names: Sequence[str], metrics: Mapping[str, Mapping[str, float]], columns: Mapping[str, Sequence[str]]
) -> str:
    """Return a Markdown table with a line for each sub-net.

    Args:
        names: The sub-nets.
        metrics: Sub-net name -> metric name -> value; a sub-net may lack some.
        columns: What stands before the metrics: heading -> a cell for each of `names`.
    """
    measured = dict.fromkeys(metric for name in names for metric in metrics.get(name, {}))
    cells = {
        "sub-net": [code(name) for name in names],
        **columns,
        **{escaped(metric): decimals([metrics.get(name, {}).get(metric) for name in names]) for metric in measured},
    }
    rule = ["---", *("---:" for _ in range(len(cells) - 1))]
    lines = [list(cells), rule, *map(list, zip(*cells.values(), strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(name: str) -> str:
    """Return a name as code in Markdown, also in the cell of a table."""
    return f"`{clean(name)}`".replace("|", "\\|") if "`" not in name else escaped(name)


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, also in the cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", clean(text))
