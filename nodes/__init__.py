"""The nodes, in the order of a graph."""

from .apply import ApplyZippedLoRA
from .load import LoadLoRAPair
from .optimize import ZipLoRAOptimize
from .style import StyleStrength

NODES = [LoadLoRAPair, ZipLoRAOptimize, StyleStrength, ApplyZippedLoRA]
