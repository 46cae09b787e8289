"""More ways to train and use a family of sub-nets.

They come in through the hooks of `ast_plugin.hookspecs` and the public controller alone, as anybody's would.
"""
