"""The nodes, in the order of a graph."""

from .apply import ApplyZippedLoRA
from .bridge.saved import register_folder
from .direct import DirectMergeLoRA
from .export import ExportMergedLoRA
from .optimize import ZipLoRAOptimize
from .pair import LoadLoRAPair, PairLoRAs
from .report import ZippedLoRAReport
from .saved import LoadZippedLoRA, SaveZippedLoRA
from .scores import BlindABSheet, ZipLoRAScores
from .sparse import SparsifyLoRA
from .style import StyleStrength
from .training import TrainConceptLoRA
from .unzip import UnZipLoRA

register_folder()

NODES = [
    LoadLoRAPair,
    ZipLoRAOptimize,
    DirectMergeLoRA,
    StyleStrength,
    ApplyZippedLoRA,
    ZippedLoRAReport,
    SaveZippedLoRA,
    LoadZippedLoRA,
    ExportMergedLoRA,
    SparsifyLoRA,
    ZipLoRAScores,
    BlindABSheet,
    TrainConceptLoRA,
    PairLoRAs,
    UnZipLoRA,
]
