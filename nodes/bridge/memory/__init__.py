"""How much memory a run takes, estimated beforehand, and how it is run to fit."""
