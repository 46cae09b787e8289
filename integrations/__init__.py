"""Hosts: launchers, callbacks and adapters for timm, Hugging Face and other frameworks.

This folder is installed as ``ast_plugin.integrations``. It is the only part that may name a host; the
core below it never imports from here.
"""
