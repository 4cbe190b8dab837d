"""The nodes, in the order of a graph."""

from .apply import ApplyZippedLoRA
from .bridge.saved import register_folder
from .direct import DirectMergeLoRA
from .files import ExportMergedLoRA, LoadZippedLoRA, SaveZippedLoRA
from .load import LoadLoRAPair
from .optimize import ZipLoRAOptimize
from .report import ZippedLoRAReport
from .scores import BlindABSheet, ZipLoRAScores
from .sparse import SparsifyLoRA
from .style import StyleStrength
from .train import PairLoRAs, TrainConceptLoRA
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
