"""Bring any 1-Lipschitz or equilibrium network into one form, keep its Lipschitz constant, certify it.

    import lipconvert as lc

    net = lc.convert(model)                 # LBEN stages and glue, same function, same constant
    report = lc.certify(net, data)          # natural and certified accuracy
    lc.save(net, "net.safetensors")

Only the names below are promised.
"""

from .attacks.attack import apgd, attack, pgd
from .certification.bounds import LipschitzBound, lipschitz_bound
from .certification.certify import Certifier, certified_radii, certify
from .certification.documents import AttackConfig, RobustnessReport
from .certification.empirical import empirical_lipschitz
from .certification.proofs import Enclosure, NotProved, Proof, prove_constant, prove_gains, prove_lmi, prove_monotone
from .checkpoints.checkpoint import load, save
from .checkpoints.container import read_manifest
from .checkpoints.documents import Manifest, VerificationReport
from .checkpoints.verify import verify
from .conversion.convert import convert, to_dae
from .conversion.documents import ValidationReport
from .conversion.validate import validate
from .dae.activations import Activation, Activations, MaxMin, activation_module, activation_of
from .dae.compose import absorb, affine, coarsen, compose, densify, elementwise, eliminate, gauge, max_min, scale
from .dae.conditions import Conditions, H_matrix, X_matrix, check, strict_multiplier
from .dae.dae import DAE
from .equilibria.equilibrium import Solution, SolverOptions, Status, equilibrium, full_precision, solve
from .errors import (
    AmbiguousModelError,
    CheckpointError,
    DataError,
    EquivalenceError,
    InsufficientMemoryError,
    InvalidParameterError,
    LipconvertError,
    MissingOptionError,
    ModelError,
    ModifiedModuleError,
    NoCertificateError,
    NotConvergedError,
    NotFiniteError,
    NotPSDError,
    PluginError,
    ProcessError,
    ShapeError,
    UnreadableError,
    UnsupportedActivationError,
    UnsupportedModuleError,
    WeightsError,
)
from .foundation.arguments import count, number
from .foundation.integrity import computes_as
from .interop.hub import from_hub, push_to_hub
from .interop.interchange import explicit, export_vnnlib, write_vnnlib
from .linalg.spectrum import (
    Grid,
    conv2d_adjoint,
    conv2d_same,
    linear_solve,
    pixel_unshuffle,
    psd_factor,
    psd_sqrt,
    spectral_norm,
    strided_weight,
)
from .linalg.state_map import StateMap
from .networks.documents import Provenance, TrainingSummary
from .networks.glue import FirstFeatures, MeanPool, Normalize, PadChannels, dense_operator
from .networks.lben import LBEN
from .networks.network import Network
from .plugin_api.hookspecs import PluginInfo, hookimpl
from .plugin_api.registry import Plugin, Registry, plugins, registry, required_option
from .plugin_api.weights import from_state_dict, read_weights
from .reports.report import write as write_report
from .training.documents import FinetuneReport, TrainingConfig
from .training.finetune import finetune, train

__all__ = [
    "DAE",
    "LBEN",
    "Activation",
    "Activations",
    "AmbiguousModelError",
    "AttackConfig",
    "Certifier",
    "CheckpointError",
    "Conditions",
    "DataError",
    "Enclosure",
    "EquivalenceError",
    "FinetuneReport",
    "FirstFeatures",
    "Grid",
    "H_matrix",
    "InsufficientMemoryError",
    "InvalidParameterError",
    "LipconvertError",
    "LipschitzBound",
    "Manifest",
    "MaxMin",
    "MeanPool",
    "MissingOptionError",
    "ModelError",
    "ModifiedModuleError",
    "Network",
    "NoCertificateError",
    "Normalize",
    "NotConvergedError",
    "NotFiniteError",
    "NotPSDError",
    "NotProved",
    "PadChannels",
    "Plugin",
    "PluginError",
    "PluginInfo",
    "ProcessError",
    "Proof",
    "Provenance",
    "Registry",
    "RobustnessReport",
    "ShapeError",
    "Solution",
    "SolverOptions",
    "StateMap",
    "Status",
    "TrainingConfig",
    "TrainingSummary",
    "UnreadableError",
    "UnsupportedActivationError",
    "UnsupportedModuleError",
    "ValidationReport",
    "VerificationReport",
    "WeightsError",
    "X_matrix",
    "absorb",
    "activation_module",
    "activation_of",
    "affine",
    "apgd",
    "attack",
    "certified_radii",
    "certify",
    "check",
    "coarsen",
    "compose",
    "computes_as",
    "conv2d_adjoint",
    "conv2d_same",
    "convert",
    "count",
    "dense_operator",
    "densify",
    "elementwise",
    "eliminate",
    "empirical_lipschitz",
    "equilibrium",
    "explicit",
    "export_vnnlib",
    "finetune",
    "from_hub",
    "from_state_dict",
    "full_precision",
    "gauge",
    "hookimpl",
    "linear_solve",
    "lipschitz_bound",
    "load",
    "max_min",
    "number",
    "pgd",
    "pixel_unshuffle",
    "plugins",
    "prove_constant",
    "prove_gains",
    "prove_lmi",
    "prove_monotone",
    "psd_factor",
    "psd_sqrt",
    "push_to_hub",
    "read_manifest",
    "read_weights",
    "registry",
    "required_option",
    "save",
    "scale",
    "solve",
    "spectral_norm",
    "strict_multiplier",
    "strided_weight",
    "to_dae",
    "train",
    "validate",
    "verify",
    "write_report",
    "write_vnnlib",
]
