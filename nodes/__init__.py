"""The nodes, in the order of a graph."""

from .apply import ApplyZippedLoRA
from .bridge.lora import routes
from .bridge.saved import register_folder
from .check import ZipCheck
from .compare import CompareMerges
from .custom_diffusion import MergeCustomDiffusion, TrainCustomDiffusion
from .direct import DirectMergeLoRA
from .ed_lora import TrainEDLoRA
from .embedding import TrainEmbedding
from .export import ExportMergedLoRA
from .guider import TwoScaleGuider
from .k_lora import KLoRA
from .optimize import ZipLoRAOptimize
from .pair import LoadLoRAPair, PairLoRAs
from .reference import ZipLoRAReference
from .report import ZippedLoRAReport
from .saved import LoadZippedLoRA, SaveZippedLoRA
from .scores import BlindABSheet, ZipLoRAScores
from .sparse import SparsifyLoRA
from .split import SplitConcept
from .stack import LoadLoRAStack
from .style import ConceptStrengths, StyleStrength
from .text_fusion import FuseTextEncoders
from .training import TrainConceptLoRA
from .unzip import UnZipLoRA
from .zip import ZipLoRAs

register_folder()
routes.register()

NODES = [
    ZipLoRAs,
    ZipCheck,
    LoadLoRAPair,
    ZipLoRAOptimize,
    DirectMergeLoRA,
    StyleStrength,
    ApplyZippedLoRA,
    CompareMerges,
    ZippedLoRAReport,
    SaveZippedLoRA,
    LoadZippedLoRA,
    ExportMergedLoRA,
    SparsifyLoRA,
    ZipLoRAScores,
    BlindABSheet,
    TrainConceptLoRA,
    TrainEmbedding,
    SplitConcept,
    TrainCustomDiffusion,
    MergeCustomDiffusion,
    TrainEDLoRA,
    FuseTextEncoders,
    PairLoRAs,
    UnZipLoRA,
    LoadLoRAStack,
    ZipLoRAReference,
    ConceptStrengths,
    TwoScaleGuider,
    KLoRA,
]
