from ast_plugin.hookspecs import hookimpl


class TransformersSelection:
    """stub"""

    @hookimpl
    def ast_select_parameters(self, model, include, exclude):
        return None
