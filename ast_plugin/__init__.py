"""Alternating sparse training: several sparse sub-nets of one network from one ordinary training run.

Source: Yang, Meng, Seo, Fan: "Get More at Once: Alternating Sparse Training with Gradient Correction", NeurIPS 2022.
"""

from ast_plugin.config import ASTConfig, CorrectionOptions
from ast_plugin.dynamic import DynamicInference
from ast_plugin.dynamic_policy import Hysteresis
from ast_plugin.elastic import Elastic, load
from ast_plugin.errors import (
    ActivationError,
    ASTError,
    BudgetError,
    ConfigError,
    ElasticFileError,
    MissingExtraError,
    PluginError,
    SaveError,
    SelectionError,
    StateError,
    WrapError,
)
from ast_plugin.hookspecs import hookimpl
from ast_plugin.methods import MaskDecision, MaskInputs, Method, ScoreInputs
from ast_plugin.profiles import profile
from ast_plugin.profiles_records import Profile
from ast_plugin.report import Report
from ast_plugin.sub_nets import SubNetSpec
from ast_plugin.training import AlternatingSparseTraining
from ast_plugin.version import __version__
from ast_plugin.wrapping import wrap

__all__ = [
    "ASTConfig",
    "ASTError",
    "ActivationError",
    "AlternatingSparseTraining",
    "BudgetError",
    "ConfigError",
    "CorrectionOptions",
    "DynamicInference",
    "Elastic",
    "ElasticFileError",
    "Hysteresis",
    "MaskDecision",
    "MaskInputs",
    "Method",
    "MissingExtraError",
    "PluginError",
    "Profile",
    "Report",
    "SaveError",
    "ScoreInputs",
    "SelectionError",
    "StateError",
    "SubNetSpec",
    "WrapError",
    "__version__",
    "hookimpl",
    "load",
    "profile",
    "wrap",
]
