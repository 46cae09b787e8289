"""`ast-plugin plugins`: which plugins are loaded, from where, and what they offer."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping

from ast_plugin.hookspecs import Record
from ast_plugin.plugins import PluginRegistry
from ast_plugin.report_format import clean
from ast_plugin.report_text import TextTable, plain_table


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "plugins",
        help="list the loaded plugins, where they come from, and the names they offer",
        description="List the loaded plugins, where they come from, and the methods, patterns, distributions and "
        "alternations\nthat can be asked for by name.",
        epilog="examples:\n  ast-plugin plugins\n  AST_PLUGIN_BLOCK=my_plugin ast-plugin plugins\n"
        "  ast-plugin plugins --json | jq '.plugins[].name'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(args: argparse.Namespace) -> int:
    """Print the plugins and what they offer."""
    registry = PluginRegistry()
    offers: dict[str, Mapping[str, Record]] = {
        "methods": registry.methods(),
        "patterns": registry.patterns(),
        "distributions": registry.distributions(),
        "alternations": registry.alternations(),
    }
    if args.json:
        listing = {
            "plugins": [dataclasses.asdict(plugin) for plugin in registry.loaded()],
            **{
                kind: [{"name": record.name, "description": record.description} for record in records.values()]
                for kind, records in offers.items()
            },
        }
        print(json.dumps(listing, indent=1))
        return 0
    rows = tuple(
        (clean(plugin.name), clean(plugin.version or "-"), clean(plugin.origin)) for plugin in registry.loaded()
    )
    print(plain_table(TextTable(title="Plugins", columns=("name", "version", "from"), rows=rows)))
    for kind, records in offers.items():
        print(f"\n{kind.capitalize()}")
        width = max((len(name) for name in records), default=0)
        for name, record in records.items():
            print(f"  {clean(name):<{width}}  {clean(record.description)}")
    return 0
