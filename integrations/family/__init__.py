"""More ways to train and use a family of sub-nets, all of them plugins.

They come in through the hooks of `ast_plugin.hookspecs` and the public controller alone, as anybody's would.
"""

from ast_plugin.integrations.family.alternations import DensePivotOrder, JointOrder
from ast_plugin.integrations.family.ensembles import Ensemble, EnsemblePrediction, ensemble
from ast_plugin.integrations.family.sup_tickets import SupTickets

__all__ = ["DensePivotOrder", "Ensemble", "EnsemblePrediction", "JointOrder", "SupTickets", "ensemble"]
